"""Tests of ChronoTask: facts about it, in the order of its sections. `-m "not slow"` leaves real processes out."""

from __future__ import annotations

import ast
import asyncio
import atexit
import base64
import codecs
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import grp
import gzip
import html
import http.client
import http.server
import ipaddress
import itertools
import json
import logging
import os
import pwd
import random
import re
import resource
import runpy
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import tomllib
import tracemalloc
import types
import urllib.parse
import urllib.request
import uuid
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from queue import Queue
from statistics import median
from typing import Any, ClassVar, NamedTuple, Self
from zoneinfo import ZoneInfo

import pytest
from aiohttp import ClientError, web
from aiohttp.test_utils import TestClient, TestServer
from mcp import MCPError
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

import chronotask
from chronotask import (
    API,
    DAY,
    HOUR,
    MASK,
    MINUTE,
    OPERATIONS,
    SECOND,
    TOOLS,
    Clock,
    Conflict,
    Cron,
    Environ,
    InvalidInput,
    LiveOutput,
    Outcome,
    Plan,
    ScheduleQuery,
    Service,
    Settings,
    Store,
    Unavailable,
    backup,
    check_schedule_config,
    due_slots,
    format_instant,
    make_timing,
    open_database,
    parse,
    parse_config,
    read_crontab,
    run_backup,
    set_meta,
    shown,
    to_toml,
)

# ======================================================================================================================
# What all tests share
# ======================================================================================================================


S = 1_000_000  # microseconds in a second
START = 1_767_225_600 * S  # 2026-01-01T00:00:00Z, a Thursday: when every fake clock begins
CHILD_ENVIRON = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}


def settings(tmp_path: Path, **changes: Any) -> Settings:
    """Settings of a service whose database is in `tmp_path`, and that waits for nothing at its end."""
    usual = Settings(database_url=tmp_path / "chronotask.db", shutdown_grace=0.0, secrets_dir=tmp_path / "secrets")
    return dataclasses.replace(usual, **changes)


def sql(path: Path, text: str, *values: Any) -> list[Any]:
    """A statement on a connection of its own: to look at rows, or to damage them."""
    with contextlib.closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as db:
        return db.execute(text, values).fetchall()


def each(names: str, *rows: Any) -> pytest.MarkDecorator:
    """The test runs once for each row, which gives these arguments."""
    return pytest.mark.parametrize(names.replace(" ", ","), rows)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="SKIPPED LOUDLY: only root can be or give to another user")


class FakeClock(Clock):
    """A clock that stands still until a test moves it or sets its `wall`. The scheduler loop ticks once whenever the test says
    so; with `free` it also goes when something wakes it."""

    def __init__(self, now: int = START, free: bool = False) -> None:
        self.wall, self.steady, self.free = now, 1000.0, free
        self.until: int | None = None  # what the scheduler loop waits for
        self.released = False
        self._rounds = asyncio.Semaphore(0)
        self.idle = asyncio.Event()  # it waits
        super().__init__()

    def now(self) -> int:
        return self.wall

    def monotonic(self) -> float:
        return self.steady

    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.wall += round(seconds * S)
        self.steady += seconds

    async def wait(self, event: asyncio.Event, until: int | None) -> None:
        self.until = until
        self.idle.set()
        if self.released:
            await asyncio.sleep(0.001)  # not 0: threads want to go on, too
        elif self.free:
            self._wake = event
            await event.wait()
        else:
            await self._rounds.acquire()

    async def round(self) -> None:
        """One tick of the scheduler loop."""
        self.idle.clear()
        self._wake.set() if self.free else self._rounds.release()
        await self.idle.wait()

    def go(self, seconds: float) -> None:
        """Time passes, and a free scheduler loop notices."""
        self.advance(seconds)
        self._wake.set()

    def release(self) -> None:
        """From now on the scheduler loop goes as fast as it can: for the end of a test."""
        self.released = True
        self._rounds.release()


class Rig:
    """A real service on a real database, and a clock that stands still."""

    def __init__(self, service: Service, clock: FakeClock) -> None:
        self.service, self.clock, self.closed = service, clock, False

    @property
    def path(self) -> Path:
        return self.service.store.path

    def sql(self, text: str, *values: Any) -> list[Any]:
        return sql(self.path, text, *values)

    async def task(self, **fields: Any) -> int:
        body = {"name": "t", "task_type": "bash", "config": {"command": "true"}, "max_retries": 0, **fields}
        return (await self.service.create_task(parse(chronotask.TaskCreate, body)))["id"]

    async def schedule(self, task_id: int, schedule_type: str = "interval", **fields: Any) -> int:
        """A schedule; without a config it fires every 60 s, or in 60 s."""
        usual = {"interval": {"seconds": 60}, "cron": {"expression": "* * * * *"}, "once": {"datetime": "2026-01-01T00:01:00Z"}}
        body = {"task_id": task_id, "schedule_type": schedule_type, "schedule_config": usual.get(schedule_type), **fields}
        return (await self.service.create_schedule(parse(chronotask.ScheduleCreate, body)))["id"]

    async def patch_task(self, task_id: int, **fields: Any) -> Any:
        return await self.service.update_task(task_id, parse(chronotask.TaskUpdate, fields))

    async def patch_schedule(self, schedule_id: int, **fields: Any) -> Any:
        return await self.service.update_schedule(schedule_id, parse(chronotask.ScheduleUpdate, fields))

    async def execute(self, task_id: int, body: Any = None, **query: Any) -> int:
        return (await self.service.execute_task(task_id, chronotask.ExecuteQuery(**query), body or {}))["id"]

    async def begun(self, task_id: int) -> int:
        """An execution by hand that runs, or waits for capacity; its id."""
        execution_id = await self.execute(task_id)
        await self.tick()
        return execution_id

    async def ended(self, execution_id: int) -> None:
        """An execution under way comes to its end, whatever others do."""
        await asyncio.wait([self.service.engine.running[execution_id].job])
        await self.tick()

    async def executed(self, task_id: int) -> int:
        """An execution by hand that is over, or waits for its retry; its id."""
        execution_id = await self.execute(task_id)
        await self.finish()
        return execution_id

    async def tick(self) -> None:
        await self.clock.round()

    async def at(self, *times: float) -> None:
        """The clock reads START + so many seconds, and the scheduler loop ticks; once for each of `times`."""
        for seconds in times:
            self.clock.advance(START / S + seconds - self.clock.wall / S)
            self.clock.wall = START + round(seconds * S)
            await self.tick()

    async def run_at(self, *times: float) -> None:
        """The same, and what each begins comes to its end."""
        for seconds in times:
            await self.at(seconds)
            await self.finish()

    async def let_go(self, target: Target) -> None:
        """The server answers what it holds, and what waited for that comes to its end."""
        target.let_go.set()
        await self.finish()

    async def finish(self) -> None:
        """Waits for all attempts under way and for those that they make way for."""
        for _ in range(100):
            jobs = [active.job for active in self.service.engine.running.values() if active.job is not None]
            if jobs:
                await asyncio.wait(jobs)
            await self.tick()
            if not self.service.engine.running:
                return
        raise AssertionError("executions go on for ever")

    async def rows(self, **query: Any) -> list[chronotask.ExecutionView]:
        """Executions, oldest first."""
        page = await self.service.list_executions(chronotask.ExecutionQuery(**{"limit": 1000, **query}))
        return page["executions"][::-1]

    async def statuses(self, **query: Any) -> list[str]:
        return [row["status"] for row in await self.rows(**query)]

    async def brief(self, **query: Any) -> list[tuple[str, str, int | None]]:
        """Of each execution, oldest slot first: trigger, status, seconds from START to its slot."""
        found = [(r["trigger"], r["status"], offset(r["scheduled_for"])) for r in await self.rows(**query)]
        return sorted(found, key=lambda row: row[2] if row[2] is not None else 0)

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.clock.release()
            await self.service.stop()
            self.service.store.close()


def offset(text: str | None) -> Any:
    """Seconds from START to an instant of the API."""
    return None if text is None else (chronotask.parse_instant(text, "UTC") - START) / S


OpenRig = Callable[..., Awaitable[Rig]]


@functools.cache
def new_database() -> bytes:
    """A database as the first start makes it: copying one is faster than making one for every test."""
    with tempfile.TemporaryDirectory() as folder:
        open_database(Path(folder) / "new.db").close()
        return (Path(folder) / "new.db").read_bytes()


def put_new_database(path: Path) -> None:
    if not path.exists():
        path.touch(0o600)
        path.write_bytes(new_database())


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of tests need not wait for a disk to sync."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
async def open_rig(quick_disk: Path) -> AsyncIterator[OpenRig]:
    """Opens services: `await open_rig(clock=…, kind=…, SETTING=…)`. All are closed at the end of the test."""
    rigs: list[Rig] = []

    async def open_one(clock: FakeClock | None = None, kind: str = "service", environ: Any = None, **changes: Any) -> Rig:
        clock = clock or FakeClock()
        chosen = settings(quick_disk, **changes)
        put_new_database(chosen.database_url)
        store = Store(chosen.database_url, clock.monotonic)
        rig = Rig(Service(chosen, store, clock, Environ({**CHILD_ENVIRON, **(environ or {})}), kind), clock)
        rigs.append(rig)
        await rig.service.start()
        await clock.idle.wait()
        return rig

    yield open_one
    for rig in reversed(rigs):
        await rig.close()


@pytest.fixture
async def rig(open_rig: OpenRig) -> Rig:
    return await open_rig()


def refused(call: Callable[..., Any], *arguments: Any) -> Any:
    """The error that a call ends with."""
    with pytest.raises(chronotask.ChronoTaskError) as caught:
        call(*arguments)
    return caught.value


async def refusal(call: Awaitable[Any]) -> InvalidInput:
    """What a refused call ends with."""
    with pytest.raises(InvalidInput) as caught:
        await call
    return caught.value


async def refused_fields(call: Awaitable[Any]) -> list[str]:
    return [error.field for error in (await refusal(call)).errors]


async def until_true(condition: Any, seconds: float = 2) -> None:
    """Unless it is said, within what the contract allows for a takeover."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def restarted(rig: Rig, open_rig: OpenRig, seconds: float | None = None, **changes: Any) -> Rig:
    """The service is stopped in good order; another one starts on the same database, `seconds` after START."""
    now = rig.clock.wall if seconds is None else START + round(seconds * S)
    await rig.close()
    return await open_rig(clock=FakeClock(now), **changes)


class Target:
    """An HTTP server to call. Answers are taken from `answers` in order; then it is 200 `ok`. `/hold` waits for `let_go`."""

    def __init__(self) -> None:
        self.answers: deque[tuple[int, dict[str, str], bytes]] = deque()
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.held = 0
        self.let_go = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        self.bodies.append(await request.read())
        if request.path == "/hold":
            self.held += 1
            await self.let_go.wait()
        status, headers, body = self.answers.popleft() if self.answers else (200, {}, b"ok")
        return web.Response(status=status, headers=headers, body=body)

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.answers.append((status, headers or {}, body))

    def config(self, path: str = "/", **more: Any) -> dict[str, Any]:
        """The fields of a task that calls this server."""
        return {"task_type": "http", "config": {"url": self.url + path, **more}}


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    server = Target()
    async with serving(server.handle) as server.url:
        yield server
        server.let_go.set()


# --- Real processes ---------------------------------------------------------------------------------------------------

PROGRAM = Path(chronotask.__file__).absolute()
TOP = PROGRAM.parent
FINAL = {"succeeded", "failed", "timed_out", "cancelled", "skipped", "missed", "interrupted"}
Json = Any


class Server:
    """A `chronotask.py` process with its files in `folder`; further keywords are settings, `environ` is added as it is.

    It is asked over REST (`ask`, `expect`), or in MCP by lines on its standard streams (`send`, `answer`, `call`).
    """

    alive: ClassVar[set[Server]] = set()

    def __init__(
        self,
        folder: Path,
        mode: str = "http",
        *,
        program: Path = PROGRAM,
        python: Sequence[str] = (),
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
        database: Path | None = None,
        environ: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.mode, self.pipes = folder, mode, {"stdin": stdin, "stdout": stdout}
        self.database = database or folder / "chronotask.db"
        self.command = [sys.executable, *python, str(program), "--mode", mode]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHRONOTASK_")}
        usual = {"DATABASE_URL": f"sqlite:///{self.database}", "API_PORT": 0, "MCP_PORT": 0}
        own = {f"CHRONOTASK_{name}": str(value) for name, value in {**usual, **settings}.items()}
        self.environ = {**inherited, **own, **(environ or {})}
        self.token = {"Authorization": f"Bearer {settings['API_TOKEN']}"} if "API_TOKEN" in settings else {}
        self.log_file = folder / f"{mode}-{id(self):x}.log"
        self.port = 0

    def start(self, ready: bool = True) -> Self:
        self._log_from = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(self.command, cwd=self.folder, env=self.environ, stderr=log, **self.pipes)
        self.alive.add(self)
        self.stdin: Any = self.process.stdin
        self.lines: Queue[bytes] = Queue()
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True)
        self._reader.start()
        if ready:  # it listens (or leads or follows, in mode mcp, which has no port to ask)
            wanted = r"REST on http://127\.0\.0\.1:(\d+)" if self.mode != "mcp" else r"(this process leads|MCP on stdio)"
            found = until(lambda: re.search(wanted, self.log()) or self.process.poll() is not None, 30, "the service is ready")
            assert isinstance(found, re.Match), f"ended with {self.process.returncode}: {self.log()[-2000:]}"
            self.port = int(found[1]) if self.mode != "mcp" else 0
        return self

    @staticmethod
    def _read(stdout: Any, lines: Queue[bytes]) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in stdout or ():
                lines.put(line)
        lines.put(b"")

    def log(self) -> str:
        return self.log_file.read_bytes()[self._log_from :].decode(errors="replace")

    def mcp_url(self) -> str:
        return str(until(lambda: re.search(r"MCP on (http\S+)", self.log()), 30, "MCP listens")[1])

    def mcp_port(self) -> int:
        return int(self.mcp_url().split(":")[2].partition("/")[0])

    # REST

    def ask(self, method: str, path: str, body: Json = None, timeout: float = 30, **headers: str) -> tuple[int, Json]:
        return ask(self.port, method, path, body, timeout, **{**self.token, **headers})

    def get(self, path: str) -> Json:
        return self.expect(200, "GET", path)

    def expect(self, status: int, method: str, path: str, body: Json = None, timeout: float = 30) -> Json:
        got, answer = self.ask(method, path, body, timeout)
        assert got == status, f"{method} {path}: {got} {answer}\n{self.log()[-1500:]}"
        return answer

    def create(self, what: str, **body: Json) -> int:
        """Makes a task or a schedule; its id."""
        if self.mode == "mcp":
            return int(self.call(1000, f"create_{what}", **body)["structuredContent"]["id"])
        return int(self.expect(201, "POST", f"/{what}s", body)["id"])

    def bash(self, command: str, timeout: float = 300, **fields: Json) -> int:
        """Makes a bash task; its id."""
        config = {"command": command, "timeout": timeout}
        return self.create("task", **{"task_type": "bash", "config": config, **ONE_ATTEMPT, "name": "bash", **fields})

    def http(self, url: str, method: str = "GET", timeout: float = 30, **fields: Json) -> int:
        """Makes an http task; its id."""
        config = {"url": url, "method": method, "timeout": timeout}
        return self.create("task", **{"task_type": "http", "config": config, **ONE_ATTEMPT, "name": "http", **fields})

    def every(self, seconds: int, task_id: int, **fields: Json) -> int:
        """Makes an interval schedule; its id."""
        config = {"seconds": seconds}
        return self.create("schedule", task_id=task_id, schedule_type="interval", schedule_config=config, **fields)

    def execute(self, task_id: int, wait: float = 0) -> Json:
        status, answer = self.ask("POST", f"/tasks/{task_id}/execute" + (f"?wait={wait}" if wait else ""), timeout=wait + 30)
        assert status in (200, 202), f"{status} {answer}"
        return answer

    def connections(self) -> int:
        """Its open sockets. Files are no measure: the database may open some at any time."""
        found = 0
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed just now
                found += os.readlink(descriptor).startswith("socket:")
        return found

    def running(self, task_id: int) -> int:
        """The id of an execution that has been begun, and runs."""
        execution_id = int(self.execute(task_id)["id"])
        until(lambda: self.get(f"/executions/{execution_id}")["status"] == "running", 8, "it runs")
        return execution_id

    def finished(self, execution_id: int, seconds: float = 10) -> Json:
        """The execution, once it is over."""
        path = f"/executions/{execution_id}"
        until(lambda: self.get(path)["status"] in FINAL, seconds, f"execution {execution_id} is over")
        return self.get(path)

    def rows(self, query: str = "") -> list[Json]:
        return list(self.get(f"/executions?limit=1000&output=none{query}")["executions"])

    def is_leader(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.port != 0 and bool(self.ask("GET", "/scheduler/status", timeout=5)[1]["leader"])
        return False

    def healthy_again(self, seconds: float = 5) -> None:
        until(lambda: self.ask("GET", "/health")[0] == 200, seconds, "it recovers by itself")

    # MCP on the standard streams

    def write(self, data: bytes) -> None:
        self.stdin.write(data)
        self.stdin.flush()

    def send(self, method: str, number: Json = None, /, **params: Json) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": params} | ({} if number is None else {"id": number})
        self.write(json.dumps(message).encode() + b"\n")

    def send_call(self, number: int, name: str, /, **arguments: Json) -> None:
        self.send("tools/call", number, name=name, arguments=arguments)

    def answer(self, seconds: float = 20) -> Json:
        """The next line on stdout, which must be a JSON-RPC message."""
        line = self.lines.get(timeout=patient(seconds))
        assert line, self.log()
        message = json.loads(line)
        assert message["jsonrpc"] == "2.0"
        return message

    def rest(self) -> list[Json]:
        """All lines until the end of stdout."""
        return [json.loads(line) for line in iter(lambda: self.lines.get(timeout=patient(20)), b"")]

    def hello(self, version: str = "2025-11-25") -> Json:
        self.send("initialize", 0, protocolVersion=version, capabilities={}, clientInfo={"name": "test", "version": "1"})
        answer = self.answer()
        self.send("notifications/initialized")
        return answer["result"]

    def call(self, number: int, name: str, /, **arguments: Json) -> Json:
        self.send_call(number, name, **arguments)
        answer = self.answer(70)
        assert answer["id"] == number
        return answer["result"]

    # The process

    def kill(self) -> None:
        self.process.kill()
        self.ended(10)

    def stop(self, seconds: float = 20) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.ended(seconds)

    def ended(self, seconds: float = 20) -> int:
        """The exit status of a process that ends by itself within `seconds`."""
        try:
            return self.process.wait(patient(seconds))
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(5)
            self.alive.discard(self)
            self._reader.join(2)
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None and not self._reader.is_alive():
                    with contextlib.suppress(OSError):
                        pipe.close()

    def stat(self) -> list[str]:
        """The fields of /proc/PID/stat from the third one, the state, on."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()

    def cpu(self) -> float:
        """Seconds of CPU used."""
        return sum(map(int, self.stat()[11:13])) / os.sysconf("SC_CLK_TCK")

    def memory(self, name: str = "VmRSS") -> int:
        """Bytes of memory in use; with "VmHWM" the most that ever was."""
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0

    def has_child(self) -> bool:
        pid = self.process.pid
        return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().strip())

    def sql(self, query: str, *values: Any) -> list[Any]:
        return sql(self.database, query, *values)


ONE_ATTEMPT = {"max_retries": 0, "retry_delay": 0.1}


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    kill_all()


@atexit.register
def kill_all() -> None:
    for server in list(Server.alive):
        server.kill()


NewServer = Callable[..., Server]


# pytest gives the mark of a fixture's parameter to each test that asks for the fixture: who starts a process is slow.
@pytest.fixture(params=[pytest.param(None, id="process", marks=pytest.mark.slow)])
def new_server(tmp_path: Path) -> NewServer:
    """Makes a `Server` with its files in `tmp_path`, and something done `before` or `after` its program is imported."""

    def make(*arguments: Any, before: str = "", after: str = "", **more: Any) -> Server:
        return Server(tmp_path, *arguments, **({"program": wrapped(tmp_path, before, after)} if before or after else {}), **more)

    return make


@pytest.fixture
def server(new_server: NewServer) -> Iterator[Server]:
    """A service that runs with the usual settings, and ends well unless the test has ended it."""
    server = new_server().start()
    yield server
    assert server.process.poll() is not None or server.stop() == 0


def ran(folder: Path, *command: object, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A program that ends by itself, with a database in `folder`."""
    variables = {**CHILD_ENVIRON, "CHRONOTASK_DATABASE_URL": f"sqlite:///{folder}/c.db", **(environ or {})}
    how: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run([*map(str, command)], cwd=folder, env=variables, **how)


def wrapped(tmp_path: Path, before: str = "", after: str = "") -> Path:
    """A program that is chronotask.py, with something done before or after it is imported."""
    program = tmp_path / "wrapped.py"
    own = f"import os, resource, sys\nsys.path.insert(0, {str(TOP)!r})"
    alone = f"import runpy\nrunpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
    program.write_text("\n".join([own, before, f"import chronotask\n{after}\nsys.exit(chronotask.main())\n" if after else alone]))
    return program


def ask(port: int, method: str, path: str, body: Json = None, timeout: float = 30, **headers: str) -> tuple[int, Json]:
    """One request, below /api/v1 unless for /health or /metrics: status and JSON or bytes. Raises OSError, HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        data = None if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = named if data is None else {**named, "Content-Type": "application/json"}
        connection.request(method, path if path in ("/health", "/metrics") else f"/api/v1{path}", data, sent)
        answer = connection.getresponse()
        raw = answer.read()
        return answer.status, json.loads(raw) if "json" in answer.headers.get("Content-Type", "") else raw
    finally:
        connection.close()


def patient(seconds: float) -> float:
    """Three times as long on a machine that is busy otherwise."""
    return seconds * (3 if os.getloadavg()[0] > 2 * (os.cpu_count() or 1) else 1)


def until(condition: Callable[[], Any], seconds: float = 30, what: str = "it came about") -> Any:
    """The first true value of `condition()`; fails after `seconds`, or later on a machine that is busy otherwise."""
    end = time.monotonic() + patient(seconds)
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return value


def processes_with(variable: str) -> list[int]:
    """The living processes with this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def children_named(name: str) -> list[int]:
    """Processes that belong to an attempt of a task with this name."""
    return processes_with(f"CHRONOTASK_TASK_NAME={name}")


def of_run(run_id: str) -> list[int]:
    return processes_with(f"CHRONOTASK_RUN_ID={run_id}")


# ======================================================================================================================
# 0. Module docstring, imports
# ======================================================================================================================


MODULE = PROGRAM.read_text(encoding="utf-8")
_WIRE = "web aiohttp mcp CIMultiDict yarl"
_PURE = f"asyncio sqlite3 threading os open Path socket {_WIRE}"
_INNER = "sqlite3 json web mcp BaseModel CIMultiDict"
# What each is called, which sections it may know (an interface knows the service and the models, never what lies behind the
# service), and the imported names that contradict what it promises: no I/O, no SQL, no HTTP, no JSON.
SECTIONS: dict[int, tuple[str, Iterable[int], str]] = {
    1: ("Errors and settings", [], f"asyncio sqlite3 threading json {_WIRE}"),
    2: ("Schedules (pure)", [1], f"random json BaseModel {_PURE}"),
    3: ("Resources", [1, 2], _PURE),
    4: ("Decisions (pure)", [1, 2, 3], f"random json BaseModel {_PURE}"),
    5: ("Clock and timers", [], f"sqlite3 os open datetime {_WIRE}"),
    6: ("Store", [1, 2, 3], f"BaseModel random {_WIRE}"),
    7: ("Executors", [1, 2, 3, 5], "sqlite3 web mcp BaseModel Clock"),
    8: ("Engine", range(8), _INNER),
    9: ("Changes", [1, 2, 3, 6, 8], _INNER),
    10: ("Leadership", range(10), _INNER),
    11: ("Service", range(11), _INNER),
    # Of 5 the helper for calls that may block, of 6 the queries, inside the transaction of 12, of 8 the events of the feed.
    12: ("Files", [1, 2, 3, 5, 6, 11], f"sqlite3 BaseModel {_WIRE}"),
    13: ("REST", [1, 2, 3, 5, 8, 11, 12], "sqlite3 mcp"),
    14: ("MCP", [1, 2, 3, 5, 11, 12, 13], "sqlite3"),
    15: ("Main", range(15), ""),
}
NAMES = {number: name for number, (name, _, _) in SECTIONS.items()}
_CLOCKS = re.compile(
    r"time\.(time|time_ns|monotonic|monotonic_ns|perf_counter|perf_counter_ns|gmtime|localtime|ctime|strftime|sleep)"
    r"|(datetime|date)(\.datetime|\.date)?\.(now|utcnow|today)|.*loop(\(\))?\.time|email\.utils\.(localtime|formatdate)"
)
_BANNER = re.compile(r"^# =+\n# (\d+)\. (.+)\n# =+$", re.MULTILINE)


def breaches_of(source: str) -> list[tuple[int, int, str]]:
    """Section, line and reason wherever the module breaks a rule of the house."""
    starts = [(source.count("\n", 0, m.start()) + 1, int(m[1])) for m in _BANNER.finditer(source)]
    lines, found = source.split("\n"), []
    statements: list[tuple[int, ast.stmt, symtable.SymbolTable]] = []
    home: dict[str, int] = {}  # where each top-level name is at home
    private: dict[str, set[int]] = {}  # and each attribute: `def _x`, `_x: int` and `self._x = …`
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        section = max((number for start, number in starts if start <= statement.lineno), default=0)
        first = min([statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", ()))])
        table = symtable.symtable("\n".join(lines[first - 1 : statement.end_lineno]), "", "exec")
        statements.append((section, statement, table))
        for symbol in table.get_symbols():
            if symbol.is_assigned():
                home.setdefault(symbol.get_name(), section)
        for node in ast.walk(statement):
            private.setdefault(_bound(node), set()).add(section)
    for section, statement, table in statements:
        outside = _from_outside(table)
        for node in ast.walk(statement):
            wrong: Iterable[str] = ()
            if isinstance(node, ast.Name) and node.id in outside:
                wrong = _wrong_name(node.id, section, home.get(node.id, section))
            elif isinstance(node, ast.Attribute):
                wrong = _wrong_attribute(ast.unparse(node), node.attr, section, section in private.get(node.attr, ()))
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                roots = {name.split(".")[0] for name in names}
                refused = roots.intersection(SECTIONS[section][2].split()) if section else ()
                wrong = [f"imports {name}" for name in refused if name != "mcp"]
                wrong += ["imports mcp: only section 14 may"] * ("mcp" in roots and section != 14)
            found += [(section, getattr(node, "lineno", 0), text) for text in wrong]
    return found


def _from_outside(table: symtable.SymbolTable) -> set[str]:
    """The names that a statement of the module takes from outside of itself; what it binds hides others."""
    top = table.get_type() == "module"
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced() and (top or symbol.is_global())}
    return own.union(*map(_from_outside, table.get_children()))


def _bound(node: ast.AST) -> str:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return node.name
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    of_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    return node.attr if isinstance(node, ast.Attribute) and of_self and isinstance(node.ctx, ast.Store) else ""


def _wrong_name(name: str, section: int, home: int) -> Iterator[str]:
    _, known, refused = SECTIONS[section] if section else ("", [], "")
    if name in refused.split():
        yield f"uses {name}"
    if home > section:
        yield f"uses {name} of section {home}, which is below"
    elif home not in (0, section, *known):
        yield f"uses {name} of section {home}, which it may not know"
    elif home != section and name.startswith("_") and not name.startswith("__"):
        yield f"uses the private {name} of section {home}"


def _wrong_attribute(text: str, name: str, section: int, own: bool) -> Iterator[str]:
    if section != 5 and _CLOCKS.fullmatch(text):
        yield f"reads a clock: {text}"
    if section != 15 and re.fullmatch(r"os\.(environ|environb|getenv|putenv|unsetenv)", text):
        yield f"reads the environment: {text}"
    if name.startswith("_") and not name.endswith("__") and not own and text not in ("os._exit", "sys._getframe"):
        yield f"uses the private {text}"


def test_the_banners_are_there_in_order_and_the_modules_docstring_lists_them() -> None:
    assert [(int(m[1]), m[2]) for m in _BANNER.finditer(MODULE)] == list(NAMES.items())
    lines = re.findall(r"^ +(\d+) ([A-Za-z() ]+?)  ", chronotask.__doc__ or "", re.MULTILINE)
    assert {int(number): name for number, name in lines} == NAMES


def test_every_section_keeps_the_dependency_rule() -> None:
    assert breaches_of(MODULE) == []


# A section, what is planted there, and what is complained about: nothing where a local name hides one from below.
PLANTED = [
    (1, "def planted(store, Store) -> object: return [Service for Service in (store, Store)]", ""),
    (2, "def planted() -> object: return Store", "uses Store of section 6, which is below"),
    (2, "def planted(x: Service) -> None: ...", "uses Service of section 11, which is below"),
    (3, "def planted(x=OPERATIONS) -> None: ...", "uses OPERATIONS of section 11, which is below"),
    (1, "class Planted(Task): ...", "uses Task of section 3, which is below"),
    (7, "async def planted(s: Store) -> None: ...", "uses Store of section 6, which it may not know"),
    (13, "PLANTED = get_task", "uses get_task of section 6, which it may not know"),
    (13, "PLANTED = run_bash", "uses run_bash of section 7, which it may not know"),
    (5, "PLANTED = Schedule", "uses Schedule of section 3, which it may not know"),
    (6, "def planted(c: Clock) -> int: ...", "uses Clock of section 5, which it may not know"),
    (8, "PLANTED = _stored", "uses the private _stored of section 6"),
    (15, "def planted(s: Service) -> object: return s._checks", "uses the private s._checks"),
    (8, "def planted(job) -> object: return job._callbacks", "uses the private job._callbacks"),
    (8, "def planted() -> float: return time.time()", "reads a clock: time.time"),
    (7, "def planted(c: Clock) -> int: ...", "uses Clock"),
    (7, "def planted() -> float: return time.monotonic()", "reads a clock: time.monotonic"),
    (6, "def planted() -> None: time.sleep(1)", "reads a clock: time.sleep"),
    (2, "PLANTED = datetime.now(UTC)", "reads a clock: datetime.now"),
    (3, "def planted() -> object: return datetime.today()", "reads a clock: datetime.today"),
    (8, "def planted() -> float: return asyncio.get_running_loop().time()", "reads a clock"),
    (1, "PLANTED = os.environ.get('HOME')", "reads the environment: os.environ"),
    (7, "PLANTED = os.getenv('HOME')", "reads the environment: os.getenv"),
    (2, "def planted() -> object: return open('/etc/hostname')", "uses open"),
    (3, "def planted(r: web.Request) -> None: ...", "uses web"),
    (11, "def planted(r: web.Request) -> None: ...", "uses web"),
    (11, "PLANTED = json.loads('{}')", "uses json"),
    (11, "PLANTED = sqlite3.connect(':memory:')", "uses sqlite3"),
    (15, "def planted() -> None: import mcp.server", "imports mcp: only section 14 may"),
]


def test_planted_violations_are_caught_and_a_local_name_that_hides_one_from_below_is_none() -> None:
    source = MODULE
    for banner in reversed(list(_BANNER.finditer(MODULE))):
        planted = [f"{code}  # planted" for section, code, _ in PLANTED if section == int(banner[1])]
        source = source[: banner.end()] + "\n" + "\n".join(planted) + "\n" + source[banner.end() :]
    lines = source.splitlines()
    found = [(section, lines[line - 1], text) for section, line, text in breaches_of(source)]
    for section, code, complaint in PLANTED:
        caught = [text for *place, text in found if place == [section, f"{code}  # planted"]]
        assert any(complaint in text for text in caught) if complaint else caught == [], (code, caught)


# ---- Patterns: each is linear in what comes from outside


async def slowdown(call: Callable[[Any], Any], once: Any, twice: Any) -> float:
    """How many times longer `call` takes for twice as much: the middle of many turns, as others use this machine too."""
    ratios: list[float] = []
    while len(ratios) < 40:
        moments = [time.thread_time()]
        for text in (once, twice):
            if asyncio.iscoroutine(result := call(text)):
                await result
            moments.append(time.thread_time())
        before, after = (max(later - earlier, 1e-9) for earlier, later in itertools.pairwise(moments))
        ratios.append(after / before)
        if after < 0.001 or (len(ratios) >= 5 and median(ratios) < 3):  # what is over in a millisecond cannot be measured
            return 2.0
    return median(ratios)


_PATTERN_METHODS = ("match", "fullmatch", "search", "sub", "split", "findall")
_CALLS = {"_matching", *(f"re.{method}" for method in _PATTERN_METHODS)}


def pattern_uses(source: str) -> dict[tuple[re.Pattern[Any], str], str]:
    """Each pattern of the module, whether it has a name or stands in a call, with each method that is used with it."""
    names = vars(chronotask) | dict(tag="script", holder="config", pattern="", name="x", begins=b"x", prefix="")  # parts of some
    found: dict[tuple[re.Pattern[Any], str], str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in _PATTERN_METHODS:
            for name in {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}:
                if isinstance(pattern := names.get(name), re.Pattern):
                    found[pattern, node.attr] = name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _CALLS:
            texts = [ast.unparse(argument) for argument in [*node.args, *(keyword.value for keyword in node.keywords)]]
            pattern = re.compile(*(eval(text, names) for text in [texts[0], *(text for text in texts[1:] if text[:3] == "re.")]))
            found[pattern, getattr(node.func, "attr", "fullmatch")] = f"line {node.lineno}"
    return found


_UNITS = (
    'a 0 - . : / @ $ { } " \' \\ ; , < = + [ % x: a@ :a }{ ${env: ${file:a ${file:a} {$ "id": :" ;charset= ;charset auth key'
    " cookie :// http://a a. a+ <script> </script> 2026-01-01 1- mon# LD_ Bearer text/ é #! | application/ /a %2 [a 0. ,a \x1b[0;"
).split()
_UNITS += [" ", "\t", "\n", "\r\n", "\0", "a ", " \\", '"id" ', "; ", ";charset ", "Bearer ", ": command not found", "a: "]


async def test_every_pattern_is_linear_in_hostile_text() -> None:
    uses = pattern_uses(MODULE)
    assert {name for name, value in vars(chronotask).items() if isinstance(value, re.Pattern)} - set(uses.values()) == set()
    slow = []
    for (pattern, method), name in uses.items():
        call = partial(getattr(pattern, method), *[pattern.pattern[:0]] * (method == "sub"))
        for size, head, unit in itertools.product((500, 3_000), ("", "{", "}", "http://", "Bearer ${env:"), _UNITS):
            texts = [head + unit * (length // len(unit)) + "\1" for length in (size, 2 * size)]
            if await slowdown(call, *([text.encode() for text in texts] if isinstance(pattern.pattern, bytes) else texts)) > 3.2:
                slow.append((name, pattern.pattern, method, head, unit))
                break
    assert slow == []


@pytest.mark.slow
async def test_a_run_that_is_given_advice_takes_no_longer_than_one_that_is_not(tmp_path: Path) -> None:
    source = "printf %4000s | tr ' ' a >&2; exit %d"
    run = partial(bash, working_dir=str(tmp_path))
    assert await slowdown(run, source.replace("%d", "126"), source.replace("%d", "127")) < 3


async def test_what_comes_in_by_rest_and_mcp_is_read_in_linear_time(api: Api) -> None:
    def post(text: str) -> Any:
        return api("POST", "/tasks", {**BASH, "task_type": "http", "config": {"url": "http://127.0.0.1/", "body": text}})

    read: Any = chronotask.read_message
    for call, head, unit in ((post, "", "${env:" * 4_000), (read, b"{", b'"id":1,' * 500), (read, b"", b"{" * 40_000)):
        assert await slowdown(call, head + unit, head + unit * 2) < 3  # type: ignore[operator]


NEW_FIELDS: list[tuple[str, str, str, str, Any]] = [
    ("tasks", "description", 'colour: Annotated[str, Field(max_length=9)] = "red"', "TEXT NOT NULL DEFAULT 'red'", "blue"),
    ("tasks", "name", "rank: Annotated[int, Field(ge=0)] | None = None", "INTEGER", 7),
    ("tasks", "config", "labels: list[str] = dataclasses.field(default_factory=list)", "TEXT NOT NULL DEFAULT '[]'", ["a", "b"]),
    ("tasks", "status", "until: Time | None = None", "INTEGER", "2030-01-01T00:00:00Z"),
    ("schedules", "jitter", "note: str | None = None", "TEXT", "why"),
    ("schedules", "overlap", "loud: bool = False", "INTEGER NOT NULL DEFAULT 0", True),
]


async def test_a_field_is_added_in_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its declaration and a migration: then it is in POST, PATCH, GET, the list, OpenAPI and the MCP tool."""
    source = MODULE
    for version, (table, behind, declaration, column, _) in enumerate(NEW_FIELDS, max(chronotask.MIGRATIONS) + 1):
        migration = f'{version}: ("ALTER TABLE {table} ADD COLUMN {declaration.partition(":")[0]} {column}",),'
        declared = rf"^class {table[:-1].capitalize()}:\n(?:.*\n)*?    {behind}: .*\n"
        for place, line in ((declared, declaration), (r"^MIGRATIONS: .*= \{\n(?:.*\n)*?(?=\}\n)", migration)):
            source, places = re.subn(place, rf"\g<0>    {line}\n", source, count=1, flags=re.MULTILINE)
            assert places == 1
    copied: Any = types.ModuleType("copied")
    copied.__file__ = chronotask.__file__
    monkeypatch.setitem(sys.modules, "copied", copied)
    exec(source, vars(copied))
    store = copied.Store(tmp_path / "c.db", FakeClock().monotonic)
    service = copied.Service(copied.Settings(database_url=tmp_path / "c.db"), store, FakeClock(), {})
    async with TestClient(TestServer(copied.make_app(service))) as client:

        async def ask(method: str, path: str, body: Any = None) -> Any:
            async with client.request(method, f"/api/v1{path}", json=body) as answer:
                assert answer.status in (200, 201), await answer.text()
                return await answer.json()

        await ask("POST", "/tasks", BASH)
        for table, _, declaration, _, value in NEW_FIELDS:
            name, kind = declaration.partition(":")[0], table[:-1]
            body = BASH if table == "tasks" else EVERY_MINUTE
            default = (await ask("POST", f"/{table}", body))[name]
            made = await ask("POST", f"/{table}", {**body, name: value})
            assert made[name] == value != default
            path = f"/{table}/{made['id']}"
            assert (await ask("GET", path))[name] == (await ask("GET", f"/{table}"))[table][-1][name] == value
            assert (await ask("PATCH", path, {name: default}))[name] == default == (await ask("GET", path))[name]
            schemas = copied.openapi()["components"]["schemas"]
            assert all(name in schemas[kind.capitalize() + of]["properties"] for of in ("Create", "Update", "View"))
            schemas = {tool.name: tool.input_schema for tool in copied.make_tools().tools}
            assert all(name in schemas[f"{verb}_{kind}"]["properties"] for verb in ("create", "update"))
            called = await copied.run_tool(service, f"update_{kind}", {f"{kind}_id": made["id"], name: value})
            assert called.structured_content[name] == value, called.content
    store.close()


# ======================================================================================================================
# 1. Errors and settings
# ======================================================================================================================


def test_every_error_knows_its_http_status() -> None:
    errors = [getattr(chronotask, name) for name in dir(chronotask) if isinstance(getattr(chronotask, name), type)]
    found = {error.__name__: error.status for error in errors if issubclass(error, chronotask.ChronoTaskError) and error.title}
    assert found.items() >= {
        "ChronoTaskError": 500, "InvalidInput": 422, "MalformedBody": 400, "Unauthorized": 401, "Forbidden": 403, "NotFound": 404,
        "MethodNotAllowed": 405, "Conflict": 409, "BodyTooLarge": 413, "UnsupportedMedia": 415, "Unavailable": 503,
    }.items()  # fmt: skip


def test_what_an_error_says_names_every_field_the_nearest_name_and_one_bounded_line_of_a_value() -> None:
    error = InvalidInput(chronotask.FieldError("name", "must be a valid string"), chronotask.FieldError("", "odd"))
    assert (str(error), error.errors[0].field) == ("name: must be a valid string; odd", "name")
    assert chronotask.nearest("descripton", ["name", "description"]) == "description"
    assert chronotask.nearest("xyz", ["name", "description"]) is None
    assert (shown("a\nb\x1b[0m"), shown({"a": 1}), len(shown("x" * 1000))) == ("'a\\nb\\x1b[0m'", "{'a': 1}", 80)


def refused_start(environ: Mapping[str, str]) -> str:
    """The one line with which these variables end the program."""
    error = refused(Settings.from_env, environ)
    assert (error.exit_status, "\n" in error.detail) == (2, False)
    return str(error.detail)


# Section 2 of the contract: the default, what some texts are read as, and what is refused.
SETTINGS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "DATABASE_URL": (
        TOP / "data" / "chronotask.db",
        {"sqlite:////var/lib/x.db": Path("/var/lib/x.db"), "sqlite:///x/y.db": Path.cwd() / "x" / "y.db"},
        ["chronotask.db", "postgres://x", "sqlite://x", "sqlite:///"],
    ),
    "API_HOST": ("127.0.0.1", {"0.0.0.0": "0.0.0.0", "::1": "::1"}, ["a b", "http://x"]),
    "API_PORT": (8000, {"0": 0, "65535": 65535}, ["-1", "65536", "80.5", "eighty", "8000 ", "1_000", "٣"]),
    "SCHEDULER_TIMEZONE": ("UTC", {"Europe/Berlin": "Europe/Berlin"}, ["Mars/Phobos", "../etc/passwd", "CET+1x", "localtime"]),
    "HTTP_TIMEOUT": (30, {"2.5": 2.5}, ["0", "604801", "nan", "inf", "-5", "1e3"]),
    "BASH_TIMEOUT": (300, {"604800": 604800}, ["0", "604801", "x"]),
    "MAX_RETRIES": (3, {"0": 0, "100": 100}, ["-1", "101", "2.5"]),
    "RETRY_DELAY": (5, {"0.5": 0.5}, ["-1", "86401"]),
    "ALLOW_HOST_COMMANDS": (True, {"false": False, "TRUE": True}, ["maybe", "2"]),
    "ALLOWED_BASH_COMMANDS": ((), {"ls, backup.sh": ("ls", "backup.sh")}, ["a,,b", ","]),
    "ALLOWED_BASH_ENV": ((), {"A,B": ("A", "B")}, ["A,"]),
    "LAUNCHER_DEFAULT": (None, {}, ["Slurm", "a b", "x" * 41]),
    "BASH_USER": (None, {"nobody": pwd.getpwnam("nobody")}, ["no-such-user", "root", "nobody ", "65534"]),
    "API_TOKEN": (None, {"0123456789abcdef": "0123456789abcdef"}, []),
    "API_TOKEN_FILE": (None, {}, []),
    "API_TOKENS_FILE": (None, {}, []),
    "PUBLIC_URL": (None, {"https://example.org/x//": "https://example.org/x/"}, ["x", "ftp://x/", "https:///x", "http://a b/"]),
    "ALLOWED_HOSTS": ((), {"Tasks.Example.com,other": ("tasks.example.com", "other")}, ["http://x", "a b", "x:80/", "d:80"]),
    "SECRETS_DIR": (Path("/run/secrets"), {"/etc/secrets": Path("/etc/secrets")}, []),
    "BLOCK_PRIVATE_NETWORKS": (False, {"true": True}, ["perhaps"]),
    "ALLOWED_NETWORKS": ((), {"10.0.0.0/8,::1": tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "::1")))}, ["10.0.0.1/8", "x"]),
    "MAX_CONCURRENT_RUNS": (100, {"1": 1}, ["0", "x"]),
    "OUTPUT_LIMIT": (65536, {"1024": 1024}, ["0", "-1"]),
    "HISTORY_DAYS": (30, {"0": 0}, ["-1", "1.5"]),
    "HISTORY_PER_TASK": (1000, {"0": 0}, ["-1"]),
    "SHUTDOWN_GRACE": (6, {"0": 0}, ["-1", "x"]),
    "LOG_LEVEL": ("INFO", {"debug": "DEBUG"}, ["LOUD"]),
    "LOG_FILE": (None, {"/tmp/x/y.log": Path("/tmp/x/y.log")}, []),
    "MCP_ENABLED": (True, {"false": False}, ["x"]),
    "MCP_PORT": (8001, {"9001": 9001}, ["70000"]),
}


def test_the_defaults_are_those_of_the_contract() -> None:
    settings, warnings = Settings.from_env({})
    found = {field.name.upper(): getattr(settings, field.name) for field in dataclasses.fields(settings) if field.metadata}
    assert found == {name: default for name, (default, _, _) in SETTINGS.items()}
    assert warnings == []
    empty = Settings.from_env({"CHRONOTASK_API_PORT": "", "CHRONOTASK_ALLOWED_HOSTS": ""})
    assert empty[0] == settings, "an empty variable counts as not set"


@each("name read bad", *((name, read, bad) for name, (_, read, bad) in SETTINGS.items()))
def test_a_setting_is_read_and_a_bad_one_is_named_with_what_is_allowed(name: str, read: dict[str, Any], bad: list[str]) -> None:
    for text, value in read.items():
        settings, warnings = Settings.from_env({f"CHRONOTASK_{name}": text})
        assert (getattr(settings, name.lower()), warnings) == (value, [])
    for text in bad:
        assert refused_start({f"CHRONOTASK_{name}": text}).startswith(f"CHRONOTASK_{name}={shown(text)}: must be ")


def test_a_bad_or_empty_token_is_refused_without_being_shown() -> None:
    for token in ("short", "with a blank in it", "ümlaut-ümlaut"):
        detail = refused_start({"CHRONOTASK_API_TOKEN": token})
        assert token not in detail and detail.startswith("CHRONOTASK_API_TOKEN=")
    for name in ("API_TOKEN", "API_TOKEN_FILE", "API_TOKENS_FILE", "BASH_USER"):  # it would leave the service open
        assert refused_start({f"CHRONOTASK_{name}": ""}).startswith(f"CHRONOTASK_{name}='': must not be empty")


def test_a_typo_in_what_keeps_others_out_ends_the_program_and_shows_no_value() -> None:
    typos = """API_TOKN: API_TOKEN, TOKEN: API_TOKEN, API_TOKENFILE: API_TOKEN_FILE, API_TOKENS_FILES: API_TOKENS_FILE,
        BASH_USR: BASH_USER, ALLOW_HOST_COMANDS: ALLOW_HOST_COMMANDS, ALLOWED_COMMANDS: ALLOWED_BASH_COMMANDS,
        ALLOWED_ENV: ALLOWED_BASH_ENV, ALLOWED_HOST: ALLOWED_HOSTS, NETWORKS: ALLOWED_NETWORKS,
        BLOCK_PRIVATE_NETWORK: BLOCK_PRIVATE_NETWORKS, api_token: API_TOKEN"""
    for typo, meant in re.findall(r"(\w+): (\w+)", typos):
        detail = refused_start({f"CHRONOTASK_{typo}": "hidden value"})
        assert f"'CHRONOTASK_{typo}': did you mean CHRONOTASK_{meant}?" in detail and "hidden value" not in detail


def test_an_unknown_variable_that_is_like_no_protective_setting_is_warned_about_with_the_nearest_name() -> None:
    _, warnings = Settings.from_env({"CHRONOTASK_API_PROT": "1", "OTHER_API_PROT": "1", "CHRONOTASK_TIMEZONE": "UTC"})
    assert warnings == [
        "unknown variable 'CHRONOTASK_API_PROT': did you mean CHRONOTASK_API_PORT?",
        "unknown variable 'CHRONOTASK_TIMEZONE': did you mean CHRONOTASK_SCHEDULER_TIMEZONE?",
    ]
    for name in ("VERSION", "PORT", "SERVICE_HOST", "PORT_8000_TCP_ADDR", "FOO"):
        (warning,) = Settings.from_env({f"CHRONOTASK_{name}": "1"})[1]
        assert warning.startswith(f"unknown variable 'CHRONOTASK_{name}'")
    given = "TASK_ID TASK_NAME EXECUTION_ID SCHEDULE_ID SCHEDULED_FOR ATTEMPT RUN_ID CAUSE_URL SECRET_API_PROT LAUNCHER_X"
    assert Settings.from_env({f"CHRONOTASK_{name}": "1" for name in given.split()})[1] == []


def test_a_file_of_a_token_is_closed_to_others_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    for mode, then, said in [(0o400, 0o400, 0), (0o440, 0o440, 0), (0o644, 0o640, 1), (0o755, 0o750, 1)]:
        path.chmod(mode)
        found, warnings = Settings.from_env({"CHRONOTASK_API_TOKEN_FILE": str(path)})
        assert (found.api_token, stat.S_IMODE(path.stat().st_mode), len(warnings)) == ("0123456789abcdef", then, said), oct(mode)
        assert all("other users could read it" in warning for warning in warnings)
    for content in ("", "short", "two words here", "\x00" * 20, None):
        path.write_text(content) if content is not None else path.unlink()
        assert "CHRONOTASK_API_TOKEN_FILE" in refused_start({"CHRONOTASK_API_TOKEN_FILE": str(path)})
    os.mkfifo(path)
    assert "must be a readable text file (it is no regular file)" in refused_start({"CHRONOTASK_API_TOKEN_FILE": str(path)})


@each("name", "API_TOKEN_FILE", "SECRETS_DIR")
def test_a_token_or_secrets_that_somebody_else_could_write_end_the_program_with_the_remedy(tmp_path: Path, name: str) -> None:
    path = tmp_path / "it"
    path.mkdir() if name == "SECRETS_DIR" else path.write_text("0123456789abcdef\n")
    for mode in (0o620, 0o602, 0o600):
        path.chmod(mode)
        reason = f"may be written by others (mode {mode:04o}): chmod go-w "
        if mode == 0o600:
            if os.geteuid() != 0:  # only root can give files away
                return
            os.chown(path, 4711, -1)
            reason = "belongs to another user (uid 4711): chown 0 "
        assert refused_start({f"CHRONOTASK_{name}": str(path)}) == f"CHRONOTASK_{name}={shown(str(path))}: {reason}'{path}'"


def test_secrets_are_taken_as_kubernetes_mounts_them(tmp_path: Path) -> None:
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "token").write_text("0123456789abcdef")
    (tmp_path / "..2026" / "token").chmod(0o440)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "token").symlink_to("..data/token")
    tmp_path.chmod(0o3777)
    environ = {"CHRONOTASK_SECRETS_DIR": str(tmp_path), "CHRONOTASK_API_TOKEN_FILE": str(tmp_path / "token")}
    settings, warnings = Settings.from_env(environ)
    assert (settings.api_token, warnings) == ("0123456789abcdef", [])


def test_a_launcher_is_split_into_words_as_a_shell_does_it_and_a_bad_one_or_an_unknown_default_ends_the_program() -> None:
    for text, words in {
        "srun --quiet --ntasks=1": ("srun", "--quiet", "--ntasks=1"),
        "bash -c 'exec ssh w \"${*@Q}\"' ssh env {env}": ("bash", "-c", 'exec ssh w "${*@Q}"', "ssh", "env", "{env}"),
        "run --name=a-{name}": ("run", "--name=a-{name}"),
    }.items():
        environ = {"CHRONOTASK_LAUNCHER_BIG_1": text, "CHRONOTASK_LAUNCHER_OTHER": "", "CHRONOTASK_LAUNCHER_DEFAULT": "big_1"}
        settings, warnings = Settings.from_env(environ)
        assert (settings.launchers, settings.launcher_default, warnings) == ({"big_1": words}, "big_1", [])
    for text in ("srun 'x", "  ", "'' x", "env x{env}"):
        detail = refused_start({"CHRONOTASK_LAUNCHER_A": text})
        assert detail.startswith(f"CHRONOTASK_LAUNCHER_A={shown(text)}: must be words as a shell splits them: a program first")
    assert Settings.from_env({"CHRONOTASK_LAUNCHER_a": "env"})[0].launchers == {}, "an unknown variable, and warned about"
    detail = refused_start({"CHRONOTASK_LAUNCHER_KNOWN": "env", "CHRONOTASK_LAUNCHER_DEFAULT": "other"})
    assert detail == "CHRONOTASK_LAUNCHER_DEFAULT='other': must be one of known (CHRONOTASK_LAUNCHER_NAME), not 'other'"


# ======================================================================================================================
# 2. Schedules (pure)
# ======================================================================================================================


# Debian cron's own answers, agreed by other engines: expression | zone | after | the next five slots | why. All UTC. A slot may
# leave out how it begins where the one before begins alike, or (of a year alone) how it ends.
CRON_CASES = """
@midnight | Asia/Kathmandu | 2024-12-31T18:15 | 2025-01-01T18:15 02T18:15 03T18:15 04T18:15 05T18:15 | @midnight
@yearly | Asia/Kolkata | 2024-12-31T18:30 | 2025-12-31T18:30 2026 2027 2028 2029 | @yearly
@HOURLY | Europe/London | 2025-01-01T00:00 | 2025-01-01T01:00 T02:00 T03:00 T04:00 T05:00 | upper case, too
0 0 5 * * | America/Los_Angeles | 2025-01-01T08:00 | 2025-01-05T08:00 02-05T08:00 03-05T08:00 04-05T07:00 05-05T07:00
0 12 10-12 6 MON,TUE | America/New_York | 2025-06-01T04:00 | 2025-06-02T16:00 03T16:00 09T16:00 10T16:00 11T16:00 | or
0 0 * * 1 | Australia/Sydney | 2024-12-31T13:00 | 2025-01-05T13:00 12T13:00 19T13:00 26T13:00 02-02T13:00 | DOM star: Mondays only
0 0 */10 * MON-FRI | Asia/Tokyo | 2024-12-31T15:00 | 2025-01-20T15:00 30T15:00 02-10T15:00 20T15:00 03-10T15:00 | and
0 0 1-7 * */7 | Australia/Sydney | 2024-12-31T13:00 | 2025-01-04T13:00 02-01T13:00 03-01T13:00 04-05T13:00 05-03T14:00 | and
0 0 */1 * MON | Europe/Berlin | 2024-12-31T23:00 | 2025-01-05T23:00 12T23:00 19T23:00 26T23:00 02-02T23:00 | and
# A gap of the clock: fixed times in it run right after it, once; what is wild (minute or hour begins with *) skips it.
*/10 0 * * * | Africa/Cairo | 2024-04-25T21:59 | 2024-04-26T21:00 T21:10 T21:20 T21:30 T21:40
0 0 * * * | Africa/Cairo | 2024-04-25T02:00 | 2024-04-25T22:00 26T21:00 27T21:00 28T21:00 29T21:00
0 0-2 * * * | America/Havana | 2024-03-09T09:00 | 2024-03-10T05:00 T06:00 11T04:00 T05:00 T06:00
*/10 2 * * * | America/New_York | 2007-03-11T06:59 | 2007-03-12T06:00 T06:10 T06:20 T06:30 T06:40
30 2 * * * | America/New_York | 2024-03-10T07:00 | 2024-03-11T06:30 12T06:30 13T06:30 14T06:30 15T06:30
30 */2 * * * | America/Nuuk | 2024-03-30T20:00 | 2024-03-30T20:30 T22:30 31T00:30 T01:30 T03:30
* 0 * * * | America/Sao_Paulo | 2018-11-03T07:00 | 2018-11-05T02:00 T02:01 T02:02 T02:03 T02:04
30 0 * * * | America/Sao_Paulo | 2018-11-03T07:00 | 2018-11-04T03:00 05T02:30 06T02:30 07T02:30 08T02:30
0 2 * * * | Antarctica/Troll | 2024-03-30T05:00 | 2024-03-31T01:00 04-01T00:00 02T00:00 03T00:00 04T00:00
0 0-2 * * * | Asia/Beirut | 2022-03-26T02:00 | 2022-03-26T22:00 T23:00 27T21:00 T22:00 T23:00
15 2 * * * | Australia/Lord_Howe | 2023-09-30T15:30 | 2023-10-01T15:15 02T15:15 03T15:15 04T15:15 05T15:15
*/15 * * * * | Europe/London | 2024-03-31T00:29 | 2024-03-31T00:30 T00:45 T01:00 T01:15 T01:30
@daily | Europe/Moscow | 2011-03-26T03:00 | 2011-03-26T21:00 27T20:00 28T20:00 29T20:00 30T20:00
*/15 * * * * | Pacific/Apia | 2011-09-24T13:29 | 2011-09-24T13:30 T13:45 T14:00 T14:15 T14:30
@daily | Pacific/Apia | 2011-09-23T18:00 | 2011-09-24T11:00 25T10:00 26T10:00 27T10:00 28T10:00
0 12 * * * | Pacific/Kwajalein | 1993-08-20T16:00 | 1993-08-21T00:00 22T00:00 23T00:00 24T00:00 25T00:00
# An hour that comes twice: what has fixed times runs in the first pass only, what is wild in both.
@daily | America/Asuncion | 2023-03-25T07:00 | 2023-03-26T04:00 27T04:00 28T04:00 29T04:00 30T04:00
45 */2 * * * | America/Caracas | 2007-12-09T02:00 | 2007-12-09T02:45 T04:45 T06:45 T07:15 T09:15
15,45 23 * * * | America/Nuuk | 2024-10-26T05:00 | 2024-10-27T00:15 T00:45 28T01:15 T01:45 29T01:15
0 * * * * | America/Santiago | 2023-04-02T00:55 | 2023-04-02T01:00 T02:00 T03:00 T04:00 T05:00
*/7 * * * * | America/Sao_Paulo | 2018-02-18T01:40 | 2018-02-18T01:42 T01:49 T01:56 T02:00 T02:07
30 23 17 2 * | America/Sao_Paulo | 2018-02-17T06:00 | 2018-02-18T01:30 2019-02-18T02:30 2020 2021 2022
*/10 23 * * * | Asia/Beirut | 2022-10-29T20:30 | 2022-10-29T20:40 T20:50 T21:00 T21:10 T21:20
30 23 29 10 * | Asia/Beirut | 2022-10-29T01:00 | 2022-10-29T20:30 2023-10-29T21:30 2024 2025 2026
37,52 23 * * * | Asia/Pyongyang | 2015-08-13T19:00 | 2015-08-14T14:37 T14:52 15T15:07 T15:22 16T15:07
@daily | Asia/Pyongyang | 2015-08-13T19:00 | 2015-08-14T15:30 15T15:30 16T15:30 17T15:30 18T15:30
* 1 * * * | Australia/Lord_Howe | 2024-04-06T14:57 | 2024-04-06T14:58 T14:59 T15:00 T15:01 T15:02
*/7 * * * * | Australia/Lord_Howe | 2024-04-06T14:40 | 2024-04-06T14:42 T14:49 T14:56 T15:05 T15:12
0 * * * * | Australia/Lord_Howe | 2024-04-06T12:55 | 2024-04-06T13:00 T14:00 T15:30 T16:30 T17:30
15,45 1 * * * | Europe/Dublin | 2024-10-26T05:00 | 2024-10-27T00:15 T00:45 28T01:15 T01:45 29T01:15
*/10 3 * * * | Pacific/Chatham | 2024-04-06T13:30 | 2024-04-06T13:35 T13:45 T13:55 T14:15 T14:25
@daily | Pacific/Chatham | 2024-04-05T18:00 | 2024-04-06T10:15 07T11:15 08T11:15 09T11:15 10T11:15
# Forms of fields, from blanks to seconds.
0\t9\t*\t*\t1-5 | Europe/Berlin | 2025-01-03T07:00 | 2025-01-03T08:00 06T08:00 07T08:00 08T08:00 09T08:00 | tabs
00 09 * * * | Europe/London | 2025-01-01T00:00 | 2025-01-01T09:00 02T09:00 03T09:00 04T09:00 05T09:00 | leading zeros
0 0 1 1 * | UTC | 2025-01-01T00:00 | 2026-01-01T00:00 2027 2028 2029 2030 | exactly on New Year
0 0 1 6-6 * | Asia/Kolkata | 2024-12-31T18:30 | 2025-05-31T18:30 2026 2027 2028 2029 | equal month range
0 0 * * SUN-SUN | Europe/Berlin | 2024-12-31T23:00 | 2025-01-04T23:00 11T23:00 18T23:00 25T23:00 02-01T23:00
0 9 15,L * * | Australia/Sydney | 2025-02-13T13:00 | 2025-02-14T22:00 27T22:00 03-14T22:00 30T22:00 04-14T23:00
0 0 L * * | Europe/Berlin | 2024-01-30T23:00 | 2024-02-28T23:00 03-30T23:00 04-29T22:00 05-30T22:00 06-29T22:00
0 0 L 4,6 * | UTC | 2025-01-01T00:00 | 2025-04-30T00:00 06-30T00:00 2026-04-30T00:00 06-30T00:00 2027-04-30T00:00
0 18 L * * | UTC | 2025-04-30T18:00 | 2025-05-31T18:00 06-30T18:00 07-31T18:00 08-31T18:00 09-30T18:00 | last day strictly after
0 0 * 2 L0 | Asia/Kathmandu | 2023-12-31T18:15 | 2024-02-24T18:15 2025-02-22T18:15 2026-02-21T18:15 2027-02-27T18:15
0 9 * * L5 | Europe/London | 2025-01-01T00:00 | 2025-01-31T09:00 02-28T09:00 03-28T09:00 04-25T08:00 05-30T08:00
0 0 29 * * | America/Los_Angeles | 2025-01-30T08:00 | 2025-03-29T07:00 04-29T07:00 05-29T07:00 06-29T07:00 07-29T07:00
30 6 29 FEB * | Asia/Kathmandu | 2024-02-29T00:45 | 2028-02-29T00:45 2032 2036 2040 2044 | strictly after a leap-day fire
0 0 29 2 * | Asia/Kolkata | 2095-12-31T18:30 | 2096-02-28T18:30 2104 2108 2112 2116 | 29 Feb across 2100 (not a leap year)
0 0 30,31 2,3 * | Asia/Kathmandu | 2024-12-31T18:15 | 2025-03-29T18:15 30T18:15 2026-03-29T18:15 30T18:15 2027-03-29T18:15
0 0 31 1,3,5 * | Europe/London | 2025-02-01T00:00 | 2025-03-30T23:00 05-30T23:00 2026-01-31T00:00 03-30T23:00 05-30T23:00
*/30 9-17 * JUN-AUG MON-FRI | Australia/Sydney | 2025-06-30T06:45 | 2025-06-30T07:00 T07:30 T23:00 T23:30 07-01T00:00
0 0 * JAN-DEC/3 SUN | Europe/Berlin | 2025-01-04T23:00 | 2025-01-11T23:00 18T23:00 25T23:00 04-05T22:00 12T22:00
0 8 * * MON-FRI | Europe/London | 2025-01-03T08:00 | 2025-01-06T08:00 07T08:00 08T08:00 09T08:00 10T08:00 | weekday names range
0 0 1 jan,JUL * | UTC | 2025-01-01T00:00 | 2025-07-01T00:00 2026-01-01T00:00 07-01T00:00 2027-01-01T00:00 07-01T00:00
0 9 * * 5#5 | America/Los_Angeles | 2025-01-01T08:00 | 2025-01-31T17:00 05-30T16:00 08-29T16:00 10-31T16:00 2026-01-30T17:00
*/10 8-18 * * MON-FRI | America/Los_Angeles | 2025-01-04T02:45 | 2025-01-04T02:50 06T16:00 T16:10 T16:20 T16:30
0 4 8-14 * * | America/Los_Angeles | 2025-01-08T12:00 | 2025-01-09T12:00 10T12:00 11T12:00 12T12:00 13T12:00 | second week
5 4 * * sun | Europe/London | 2025-01-01T00:00 | 2025-01-05T04:05 12T04:05 19T04:05 26T04:05 02-02T04:05
*/30 12 1 1,7 * | America/New_York | 2024-02-01T05:00 | 2024-07-01T16:00 T16:30 2025-01-01T17:00 T17:30 07-01T16:00
0 1 * * 0 | America/New_York | 2024-10-20T04:00 | 2024-10-20T05:00 27T05:00 11-03T05:00 10T06:00 17T06:00
0 6 1 */2 * | Australia/Sydney | 2024-01-14T13:00 | 2024-02-29T19:00 04-30T20:00 06-30T20:00 08-31T20:00 10-31T19:00
30 * * * * * | Europe/London | 2025-01-01T00:00:30 | 2025-01-01T00:01:30 T00:02:30 T00:03:30 T00:04:30 T00:05:30 | later
0 0 12 * * 7 | UTC | 2025-01-01T00:00 | 2025-01-05T12:00 12T12:00 19T12:00 26T12:00 02-02T12:00 | Sunday as 7 with seconds
0 30 1 * * * | America/New_York | 2024-11-02T16:00 | 2024-11-03T05:30 04T06:30 05T06:30 06T06:30 07T06:30
*/30 * * * * * | Europe/London | 2024-03-31T00:59:30 | 2024-03-31T01:00:00 T01:00:30 T01:01:00 T01:01:30 T01:02:00
15 30 1 * * * | Europe/London | 2024-10-26T11:00 | 2024-10-27T00:30:15 28T01:30:15 29T01:30:15 30T01:30:15 31T01:30:15
30 0 * * * * | Europe/London | 2024-03-31T00:59:30 | 2024-03-31T01:00:30 T02:00:30 T03:00:30 T04:00:30 T05:00:30
0 0 */10 * * | America/New_York | 2025-01-01T05:00 | 2025-01-11T05:00 21T05:00 31T05:00 02-01T05:00 11T05:00 | DOM 1,11,21,31
*/60 * * * * | Asia/Kathmandu | 2024-12-31T18:15 | 2024-12-31T19:15 T20:15 T21:15 T22:15 T23:15
0 0-23/6 * * * | Asia/Kolkata | 2024-12-31T18:30 | 2025-01-01T00:30 T06:30 T12:30 T18:30 02T00:30 | 0-23/6
0 0 * * 0-7 | America/New_York | 2025-01-01T05:00 | 2025-01-02T05:00 03T05:00 04T05:00 05T05:00 06T05:00 | 0-7 is every day
0 0 * * 2-7/2 | America/New_York | 2025-01-01T05:00 | 2025-01-02T05:00 04T05:00 07T05:00 09T05:00 11T05:00 | Tue, Thu, Sat
0 0 * * 1-7/2 | Australia/Sydney | 2024-12-31T13:00 | 2025-01-02T13:00 04T13:00 05T13:00 07T13:00 09T13:00 | 1,3,5,7=Sunday
# What Debian does not know, and what is rare.
10/15 * * * * | UTC | 2025-01-01T00:00 | 2025-01-01T00:10 T00:25 T00:40 T00:55
5-5/2 * * * * | UTC | 2025-01-01T00:00 | 2025-01-01T00:05 T01:05
0 0 * * SAT-SUN | UTC | 2025-01-01T00:00 | 2025-01-04T00:00 05T00:00 11T00:00
0 0 * * 6-0 | UTC | 2025-01-01T00:00 | 2025-01-04T00:00 05T00:00 11T00:00
0 0 * * 6,7/2 | UTC | 2025-01-01T00:00 | 2025-01-04T00:00 05T00:00 11T00:00 | 7/2 is Sunday, and no empty list
0 0 13 * 5,* | UTC | 2025-01-01T00:00 | 2025-01-02T00:00 03T00:00 | starts with 5, so: or
0 0 13 * *,5 | UTC | 2025-01-01T00:00 | 2025-01-13T00:00 02-13T00:00 | starts with *, so: and
0 0 31 2 1 | UTC | 2025-01-01T00:00 | 2025-02-03T00:00 10T00:00
0 0 * * 1#1,L5 | UTC | 2025-01-01T00:00 | 2025-01-06T00:00 31T00:00 02-03T00:00
0 0 * * l7 | UTC | 2025-01-01T00:00 | 2025-01-26T00:00
0 0 29 2 */7 | UTC | 2080-01-01T00:00 | 2088-02-29T00:00 2128 | 40 years apart
59 59 23 31 12 * | UTC | 2025-12-31T23:59:58.5 | 2025-12-31T23:59:59 2026
*,5 0 * * * | UTC | 2025-01-01T00:58 | 2025-01-01T00:59 02T00:00
*/30 * * * * | Africa/Monrovia | 1971-06-01T00:14:29 | 1971-06-01T00:14:30 T00:44:30 T01:14:30 | 44 min 30 s behind until 1972
0 3 * * * | Antarctica/Casey | 2011-10-26T20:00 | 2011-10-28T16:00 29T16:00 | from +08 to +11 at 02:00: a correction of the clock
"""

NOW = chronotask.parse_instant("2026-11-24T05:00:00Z", "UTC")


def at(text: str) -> int:
    return chronotask.parse_instant(text, "UTC")


def shown_slots(timing: chronotask.Timing, after: str, count: int) -> list[str]:
    """The next slots as `2024-03-31T01:00`, UTC."""
    return [format_instant(slot)[:-1].removesuffix(":00") for slot in Plan(timing).upcoming(at(after), count)]


# -- Instants and zones ------------------------------------------------------------------------------------------------

ISO_RULE = (
    "must be an ISO 8601 date and time from 1970 to 9999, such as "
    "2026-12-01T09:00:00, 2026-12-01T08:00:00Z or 2026-12-01T09:00:00+01:00"
)
# Text, zone of the service, and the instant.
DATE_TIMES = """
    2026-11-24T05:00:00Z             | Europe/Berlin | 2026-11-24T05:00:00Z
    2026-11-24 05:00                 | Europe/Berlin | 2026-11-24T04:00:00Z
    2026-11-24T05:00:00.25           | Europe/Berlin | 2026-11-24T04:00:00.250000Z
    2026-11-24t05:00:00z             | UTC           | 2026-11-24T05:00:00Z
    2026-11-24T05:00:00.25+05:30     | UTC           | 2026-11-23T23:30:00.250000Z
    2026-11-24T05:00:00.000001-0800  | UTC           | 2026-11-24T13:00:00.000001Z
    2026-11-24T05:00:00+01           | UTC           | 2026-11-24T04:00:00Z
    1970-01-01T00:00:00Z             | UTC           | 1970-01-01T00:00:00Z
    9999-12-31T23:59:59.999999Z      | Asia/Tokyo    | 9999-12-31T23:59:59.999999Z
    2024-03-31T02:30:00              | Europe/Berlin | 2024-03-31T01:00:00Z         in the gap of spring: right after it
    2024-03-31T02:00:00              | Europe/Berlin | 2024-03-31T01:00:00Z
    2024-10-27T02:30:00              | Europe/Berlin | 2024-10-27T00:30:00Z         in the repeated hour: the first one
    2011-12-30T12:00:00              | Pacific/Apia  | 2011-12-30T10:00:00Z
"""


def test_a_date_time_is_read_with_its_offset_or_in_the_zone() -> None:
    for line in DATE_TIMES.strip().splitlines():
        text, zone, instant = line.split("|")
        assert format_instant(chronotask.parse_instant(text.strip(), zone.strip())) == instant.split()[0], line


@each(
    "text",
    "", "2026-11-24", "2026-11-24T", "05:00", "2026-11-24T24:00", "2026-11-24T05:60", "2026-11-24T05:00:60",
    "2026-02-29T05:00", "2026-11-24T05", "2026-11-24T05:00:00.1234567", "2026-11-24T05:00:00.",
    "2026-11-24T05:00:00+24:00", "2026-11-24T05:00:00+1", "2026-11-24T05:00:00 CET", "20261124T050000Z",
    "1969-12-31T23:59:59Z", "1970-01-01T00:30:00+01:00", "0000-01-01T00:00:00", "10000-01-01T00:00:00Z",
    "9999-12-31T23:59:59-01:00", "２０２６-11-24T05:00:00", "2026-11-24T05:00:00Z\n", "tomorrow", "1795000000",
)  # fmt: skip
def test_what_is_no_date_time_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(ISO_RULE)}"):
        chronotask.parse_instant(text, "UTC")


def test_a_local_time_is_shown_with_its_offset_and_in_utc_where_it_would_be_after_9999() -> None:
    assert chronotask.format_local(1_795_000_000_000_000, "Asia/Kathmandu") == "2026-11-18T16:51:40+05:45"
    assert chronotask.format_local(at("9999-12-31T23:00:00Z"), "Asia/Tokyo") == "9999-12-31T23:00:00Z"


def test_an_unknown_zone_is_refused_with_the_nearest_known_one_and_is_never_a_path_nor_a_private_table() -> None:
    nearest = {"Berlin": "Europe/Berlin", **dict.fromkeys(("new york", "america/new_york"), "America/New_York")}
    paths = ("America", "../etc/passwd", "/usr/share/zoneinfo/UTC", "localtime", "right/UTC", "é" * 5000)
    for name, said in {
        **{name: rf"\(did you mean {zone}\?\)$" for name, zone in nearest.items()},
        **dict.fromkeys(("", "+02:00", "\x00"), "such as Europe/Berlin$"),
        **dict.fromkeys(paths, ""),
    }.items():
        with pytest.raises(ValueError, match=f"^must be an IANA time zone {said}"):
            chronotask.load_zone(name)


# -- Cron --------------------------------------------------------------------------------------------------------------


@each("line", *(line for line in CRON_CASES.strip("\n").split("\n") if line[0] != "#"))
def test_cron_fires_as_debian_cron_does(line: str) -> None:
    expression, zone, after, texts = line.split(" | ")[:4]
    slots: list[str] = []
    for text in texts.split():
        before = slots[-1] if slots else ""
        slots.append(text + before[4:] if len(text) == 4 else before[: len(before) - len(text)] + text)
    expected = [slot.removesuffix(":00") if len(slot) == 19 else slot for slot in slots]
    assert shown_slots(Cron(expression, zone), after + "Z", len(expected)) == expected


def test_slots_end_with_the_year_9999() -> None:
    yearly = Cron("@yearly", "Pacific/Kiritimati")
    assert shown_slots(yearly, "9997-06-01T00:00Z", 5) == ["9997-12-31T10:00", "9998-12-31T10:00"]
    assert Cron("* * * * *", "Asia/Tokyo").next_after(at("9999-12-31T23:59:59Z")) is None
    assert chronotask.Interval(HOUR, 0, 0, "UTC").next_after(at("9999-12-31T23:30:00Z")) is None
    assert chronotask.span_of("1970-01-01/9999-12-31", "Asia/Tokyo") == (0, chronotask.LAST_INSTANT)


# The oracle: Debian's rule, minute by minute, with nothing from the module but the clock of the zone.
class Fields:
    """A random expression and the sets that it means, drawn together, so that no parser is needed to know them."""

    def __init__(self, rnd: random.Random) -> None:
        self.minute, self.minutes = self.draw(rnd, 0, 59)
        self.hour, self.hours = self.draw(rnd, 0, 23)
        self.day, self.days = ("*", set(range(1, 32))) if rnd.random() < 0.6 else self.draw(rnd, 1, 31)
        self.month, self.months = ("*", set(range(1, 13))) if rnd.random() < 0.7 else self.draw(rnd, 1, 12)
        self.weekday, weekdays = ("*", set(range(7))) if rnd.random() < 0.6 else self.draw(rnd, 0, 7)
        self.weekdays = {day % 7 for day in weekdays}

    @staticmethod
    def draw(rnd: random.Random, low: int, high: int) -> tuple[str, set[int]]:
        text, values = [], set()
        for _ in range(rnd.choice([1, 1, 1, 2, 3])):
            first, step = rnd.randint(low, high), rnd.choice([1, 2, 3, 5, 7, 10, 15, 20])
            last = rnd.randint(first, high)
            one, every = (str(first), range(first, first + 1)), "*" if step == 1 else f"*/{step}"
            some = (f"{first}-{last}", range(first, last + 1)), (f"{first}-{last}/{step}", range(first, last + 1, step))
            form, meant = rnd.choice([one, one, *some, (every, range(low, high + 1, step))])
            text.append(form)
            values.update(meant)
        return ",".join(text), values

    @property
    def expression(self) -> str:
        return f"{self.minute} {self.hour} {self.day} {self.month} {self.weekday}"

    @property
    def wild(self) -> bool:
        return self.minute.startswith("*") or self.hour.startswith("*")

    def match(self, local: datetime) -> bool:
        day, weekday = local.day in self.days, local.isoweekday() % 7 in self.weekdays
        on_day = day and weekday if "*" in (self.day[0], self.weekday[0]) else day or weekday
        return on_day and local.month in self.months and local.hour in self.hours and local.minute in self.minutes

    def fire(self, local: datetime, jump: timedelta) -> bool:
        """In this minute, by Debian's rule; the clocks jumped so far just before it."""
        gap = [local - timedelta(minutes=i + 1) for i in range(jump // timedelta(minutes=1)) if jump < timedelta(hours=3)]
        return (self.match(local) and (self.wild or not local.fold)) or (not self.wild and any(map(self.match, gap)))


CHANGES = [
    ("Europe/Berlin", "2024-03-31T01:00Z"), ("Europe/Berlin", "2024-10-27T01:00Z"),
    ("America/New_York", "2024-03-10T07:00Z"), ("America/New_York", "2024-11-03T06:00Z"),
    ("Australia/Lord_Howe", "2023-09-30T15:30Z"), ("Australia/Lord_Howe", "2024-04-06T15:00Z"),  # half an hour
    ("Antarctica/Troll", "2024-03-31T01:00Z"), ("Antarctica/Troll", "2024-10-27T01:00Z"),  # two hours
    ("America/Santiago", "2023-04-02T03:00Z"), ("Africa/Cairo", "2024-04-25T22:00Z"),  # at midnight
    ("Pacific/Apia", "2011-12-30T10:00Z"), ("Antarctica/Casey", "2011-10-27T18:00Z"),  # corrections: 24 h, 3 h
    ("Asia/Pyongyang", "2015-08-14T15:00Z"), ("Africa/Casablanca", "2024-03-10T02:00Z"), ("Asia/Kathmandu", "2024-01-01T00:00Z"),
]  # fmt: skip


@each("zone change", *CHANGES)
def test_around_changes_of_the_clock_cron_agrees_with_a_walk_minute_by_minute(zone: str, change: str) -> None:
    rnd, seen = random.Random(f"{zone} {change}"), 0
    start = at(change) - 240 * MINUTE
    walk = [datetime.fromtimestamp(start // SECOND + i * 60, ZoneInfo(zone)) for i in range(-1, 480)]
    minutes = [(b, b.replace(tzinfo=None) - a.replace(tzinfo=None) - timedelta(minutes=1)) for a, b in itertools.pairwise(walk)]
    for _ in range(40):
        fields = Fields(rnd)
        if rnd.random() < 0.7:  # most are aimed at the hours around the change
            hour = minutes[rnd.randrange(180, 240)][0].hour
            fields.hour, fields.hours = f"{hour}-{min(23, hour + 2)}", {hour, min(23, hour + 1), min(23, hour + 2)}
            fields.day, fields.days = "*", set(range(1, 32))
            fields.month, fields.months = "*", set(range(1, 13))
        expected = [local.astimezone(UTC).isoformat()[:16] for local, jump in minutes if fields.fire(local, jump)]
        after = start - MINUTE if rnd.random() < 0.5 else start + rnd.randrange(480) * MINUTE  # also from within a change
        cron, slots, t = Cron(fields.expression, zone), [], after
        while (slot := cron.next_after(t)) is not None and slot < start + 480 * MINUTE:
            slots.append(format_instant(slot)[:16])
            t = slot
        assert slots == [slot for slot in expected if slot > format_instant(after)[:16]], fields.expression
        seen += len(slots)
    assert seen > 100


def test_for_random_expressions_zones_and_instants_the_next_slot_is_later_and_the_last_one_agrees() -> None:
    rnd = random.Random(20261124)
    accepted = 0
    for _ in range(250):
        expression, zone = Fields(rnd).expression, rnd.choice(CHANGES)[0]
        if rnd.random() < 0.3:
            expression = f"{rnd.choice(['0', '*/7', '15,45', '*', '59'])} {expression}"
        if rnd.random() < 0.1:
            expression = rnd.choice("@hourly|@daily|@weekly|@monthly|@yearly|0 0 L * *|5 4 * * L3|0 12 * 2 MON#5".split("|"))
        t = rnd.randrange(at("1971-01-01T00:00Z"), at("2100-01-01T00:00Z"))
        try:
            check_schedule_config("cron", {"expression": expression, "timezone": zone}, "UTC", t)
        except InvalidInput as error:
            assert "must fire at least once in the next 50 years" in str(error)
            continue
        accepted += 1
        cron = Cron(expression, zone)
        slot = cron.next_after(t)
        assert slot is not None and slot > t
        assert cron.next_after(t) == cron.next_after(slot - 1) == cron.last_at_or_before(slot) == slot
        last = cron.last_at_or_before(slot - 1)
        assert cron.next_after(-1 if last is None else last) == slot  # None: it is the first since 1970
        assert last is None or last <= t
    assert accepted > 200


CRON_RULE = (
    "must be 5 fields (minute hour day-of-month month day-of-week), 6 with seconds first,"
    " or one of @yearly, @annually, @monthly, @weekly, @daily, @midnight, @hourly"
)
NO_MIX = "L and # need * in the other day field and no plain weekday beside them (engines disagree)"
BAD_EXPRESSIONS = {
    "60 * * * *": "minute '60' must be 0 to 59, with , - (upwards) and / (from 1)",
    "* 24 * * *": "hour '24' must be 0 to 23, with , - (upwards) and / (from 1)",
    "* * 0 * *": "day-of-month '0' must be 1 to 31, with , - (upwards) and / (from 1), L for the last day",
    "* * * FOO *": "month 'foo' must be 1 to 12 or JAN to DEC, with , - (upwards) and / (from 1)",
    "0 22-2 * * *": "hour '22-2' must be 0 to 23, with , - (upwards) and / (from 1)",
    "0 0 * * FRI-MON": "day-of-week 'fri-mon' must be 0 to 7 or SUN to SAT, with , - (upwards) and / (from 1)"
    ", MON#2 for the second Monday, L5 for the last Friday",
    "*/0 * * * *": "minute '*/0' must be 0 to 59, with , - (upwards) and / (from 1)",
    "0 0 13 * FRI#2": NO_MIX,
    "0 0 L * FRI": NO_MIX,
    "0 0 * * 1,MON#2": NO_MIX,
    "0 0 30 2 *": "must fire at least once in the next 50 years",
    "0 0 31 4,6,9,11 *": "must fire at least once in the next 50 years",
    "* * * *": CRON_RULE + "; found 4",
    "@dayly": CRON_RULE + " (did you mean @daily?)",
    "０ * * * *": "must be at most 200 ASCII characters",
    "0," * 100 + "0 * * * *": "must be at most 200 ASCII characters",
}


@each("expression why", *BAD_EXPRESSIONS.items())
def test_a_refused_expression_is_told_why(expression: str, why: str) -> None:
    [(field, message)] = errors_of("cron", {"expression": expression})
    assert field == "schedule_config.expression" and message.endswith(("': " + why, "…: " + why))


@each(
    "expression",
    "", " ", "0", "* * * * * * *", "0 0 0 1 1 * 2030", "0 0 1 1 * 2030", "@reboot", "@every 5m", "5- * * * *",
    "-5 * * * *", "5--7 * * * *", ", * * * *", "1,,2 * * * *", "1/ * * * *", "*/ * * * *", "** * * * *", "*-5 * * * *",
    "1-5-7 * * * *", "1.5 * * * *", "+1 * * * *", "0x1 * * * *", "1e1 * * * *", "0 0 * JAN-FOO *", "0 0 MON * *",
    "0 0 * MON *", "0 0 * * 8", "0 0 * * MON#0", "0 0 * * MON#6", "0 0 * * *#1", "0 0 * * 1-5#1", "0 0 * * L",
    "0 0 * * L8", "0 0 * * LFRI", "0 0 L-3 * *", "0 0 LW * *", "0 0 1-L * *", "0 0 L */1 */2", "H(0-5) * * * *",
    "R(1-5) * * * *", "0\n0 * * *", "0\x000 * * *", "0 0 * * \u2003", "0\x1f0 * * * *", "9999999999 * * * *",
    "* * * * */99999", "61 * * * * *", "* 60 * * * *", "*/100000 * * * *", "0 0 * * 7-1", "0 0 15W * *", "H * * * *",
)  # fmt: skip
def test_what_engines_disagree_about_or_nobody_knows_is_refused(expression: str) -> None:
    assert [field for field, _ in errors_of("cron", {"expression": expression})] == ["schedule_config.expression"]


# -- Once and interval -------------------------------------------------------------------------------------------------


def test_a_once_schedule_has_one_slot_and_an_interval_looks_back_by_arithmetic_and_is_counted() -> None:
    once, plan = chronotask.Once(NOW, "UTC"), Plan(chronotask.Once(NOW, "UTC"))
    assert [once.next_after(NOW - 1), once.next_after(NOW)] == [NOW, None]
    assert [once.last_at_or_before(NOW), once.last_at_or_before(NOW - 1)] == [NOW, None]
    assert [plan.count(0, NOW, 10), plan.count(NOW + 1, NOW + 9, 10), plan.count(0, NOW, 0)] == [1, 0, 0]
    interval = chronotask.Interval(7 * SECOND, NOW, NOW, "UTC")
    assert interval.last_at_or_before(NOW + 6 * SECOND) is None
    assert interval.last_at_or_before(NOW + 700 * SECOND + 3) == NOW + 700 * SECOND
    for seconds, count in ((700, 100), (10**9, 1000), (1, 0)):
        assert Plan(interval).count(NOW, NOW + seconds * SECOND, 1000) == count


def test_an_interval_without_a_start_counts_from_its_creation_and_with_one_from_there() -> None:
    since = make_timing("interval", {"seconds": 90, "timezone": "UTC"}, at("2026-11-24T05:00:00.25Z"))
    assert shown_slots(since, "2026-01-01T00:00Z", 2) == ["2026-11-24T05:01:30.250000", "2026-11-24T05:03:00.250000"]
    start = make_timing("interval", {"seconds": 90, "start_date": "2026-11-24T06:00:00+01:00", "timezone": "UTC"}, NOW + HOUR)
    assert shown_slots(start, "2026-01-01T00:00Z", 2) == ["2026-11-24T05:00", "2026-11-24T05:01:30"]


def test_an_interval_never_drifts_across_restarts_and_changes_of_the_clock() -> None:
    config = {"seconds": 86400, "start_date": "2020-03-28T02:30:00+01:00", "timezone": "Europe/Berlin"}
    rnd = random.Random(1)
    for _ in range(200):
        slot = make_timing("interval", config, rnd.randrange(NOW)).next_after(rnd.randrange(at("2020-03-29T00:00Z"), 2 * NOW))
        assert slot is not None and slot % DAY == at("1970-01-01T01:30Z")


def test_an_interval_of_days_is_a_fixed_local_time() -> None:
    for days, start, zone, after, slots in (
        (2, "2026-03-28T02:30", "Europe/Berlin", "2026-03-27T00:00Z", ["28T02:30:00+01:00", "30T02:30:00+02:00"]),
        (1, "2026-03-28T02:30", "Europe/Berlin", "2026-03-28T02:00Z", ["29T03:00:00+02:00", "30T02:30:00+02:00"]),
        (1, "2026-10-24T02:30", "Europe/Berlin", "2026-10-24T01:00Z", ["25T02:30:00+02:00", "26T02:30:00+01:00"]),
        (14, "2026-03-16T09:00", "Europe/Berlin", "2026-03-16T08:00Z", ["30T09:00:00+02:00", "13T09:00:00+02:00"]),
        (1, "2011-12-29T12:00", "Pacific/Apia", "2011-12-29T22:00Z", ["31T12:00:00+14:00", "01T12:00:00+14:00"]),  # no 30th
    ):
        config = check_schedule_config("interval", {"days": days, "start_date": start, "timezone": zone}, "UTC", NOW)
        timing = make_timing("interval", config, NOW)
        first, second = Plan(timing).upcoming(at(after), 2)
        assert [chronotask.format_local(slot, zone)[8:] for slot in (first, second)] == slots
        assert timing.last_at_or_before(second - 1) == first
        begin = timing.next_after(0)
        assert begin is not None and chronotask.format_local(begin, zone)[:16] == start
        assert timing.last_at_or_before(begin - 1) is None and timing.next_after(chronotask.LAST_INSTANT) is None
    timing = make_timing("interval", {"days": 3, "timezone": "Europe/Berlin"}, at("2026-03-28T08:15:30Z") + 5)
    assert timing.next_after(0) == at("2026-03-31T07:15:30Z"), "without a start days count from the creation"
    assert timing.describe() == "Every 3 days at 09:15:30, counted from 2026-03-28 (Europe/Berlin)"
    sent = {"days": 1, "start_date": "2026-12-01T08:00:00Z", "timezone": "Europe/Berlin"}
    assert check_schedule_config("interval", sent, "UTC", NOW)["start_date"] == "2026-12-01T09:00:00"


LARGER = "The step {} is larger than the {} field, of which only the first value is left: every {} is an interval of {}."
MOVES = "172800 s later the local time is another one when the clocks change in Europe/Berlin: {days: 2} keeps to it."
OR = "A day that matches day-of-month or day-of-week is enough, as in Debian's cron: it need not match both."


async def test_notes_say_what_a_schedule_probably_does_not_mean_why_nothing_fires_and_what_became_of_the_zone(rig: Rig) -> None:
    task_id = await rig.task()
    for schedule_type, config, notes in (
        ("cron", {"expression": "*/90 * * * *"}, [LARGER.format(90, "minute", "90 minutes", "5400 s")]),
        ("cron", {"expression": "0 0 */45 * *"}, [LARGER.format(45, "day-of-month", "45 days", "45 days")]),
        ("cron", {"expression": "*/1440 */59 * * * *"}, [LARGER.format(1440, "second", "1440 seconds", "1440 s")]),
        ("cron", {"expression": "0 9 1 * MON"}, [OR]),
        ("cron", {"expression": "0 9 * * MON"}, []),
        ("cron", {"expression": "@daily"}, []),
        ("interval", {"seconds": 172800, "timezone": "Europe/Berlin"}, [MOVES]),
        ("interval", {"seconds": 172800, "timezone": "UTC"}, []),
        ("interval", {"seconds": 3600, "timezone": "Europe/Berlin"}, []),
        ("interval", {"days": 1, "timezone": "Europe/Berlin"}, []),
    ):
        body = {"task_id": task_id, "schedule_type": schedule_type, "schedule_config": config}
        preview = await chronotask.preview_schedule(rig.service, parse(chronotask.SchedulePreview, body))
        made = await rig.service.create_schedule(parse(chronotask.ScheduleCreate, body))
        assert preview["notes"] == made["notes"] == notes, config
    assert not any("notes" in row for row in (await rig.service.list_schedules(ScheduleQuery()))["schedules"])
    daily = {"expression": "0 9 * * *"}
    schedule_id = await rig.schedule(task_id, "cron", schedule_config={**daily, "timezone": "Asia/Tokyo"})
    for fields, *notes in (
        ({"schedule_config": daily}, "The time zone stays Asia/Tokyo: none was sent."),
        ({"schedule_type": "interval", "schedule_config": {"seconds": 60}}, "The time zone is UTC now; it was Asia/Tokyo."),
        ({"schedule_config": {"days": 1, "timezone": "Europe/Berlin"}}, "The time zone is Europe/Berlin now; it was UTC."),
        ({"schedule_type": "after", "schedule_config": {"any": True, "on": ["failure"]}},),
        ({"is_active": False}, "Nothing will fire: is_active is false."),
    ):
        assert (await rig.patch_schedule(schedule_id, **fields))["notes"] == notes, fields
    await rig.patch_schedule(schedule_id, is_active=True, schedule_type="interval", schedule_config={"seconds": 60})
    await rig.patch_task(task_id, status="paused")
    assert (await rig.service.get_schedule(schedule_id))["notes"] == ["Nothing will fire: its task is not active."]
    await rig.service.pause_scheduler({})
    assert (await rig.service.get_schedule(schedule_id))["notes"] == ["Nothing will fire: the scheduler is paused."]
    await rig.service.resume_scheduler()
    await rig.patch_task(task_id, status="active")
    await rig.run_at(60, 120, 180)
    assert (await rig.patch_schedule(schedule_id, max_runs=1))["notes"] == ["max_runs of 1 is reached, and exceeded by 2."]


# -- Words -------------------------------------------------------------------------------------------------------------


@each(
    "config words",
    ("* * * * *", "Every minute"),
    ("*/15 * * * *", "Every 15 minutes"),
    ("0/20 * * * *", "Every 20 minutes"),
    ("*/7 * * * *", "At minute 0, 7, 14, 21, 28, 35, 42, 49 and 56 of every hour"),
    ("@hourly", "Every hour"),
    ("15 * * * *", "Every hour at minute 15"),
    ("15,45 * * * *", "Every 30 minutes from 00:15 to 23:45"),
    ("0 */6 * * *", "Every 6 hours"),
    ("30 */2 * * *", "Every 2 hours at minute 30"),
    ("0 9-17 * * MON-FRI", "Every hour from 09:00 to 17:00, every weekday"),
    ("*/10 8-18 * * *", "Every 10 minutes from 08:00 to 18:50"),
    ("0 9 * * MON-FRI", "Every weekday at 09:00"),
    ("0 8,12,17 * * *", "Every day at 08:00, 12:00 and 17:00"),
    ("30 8 * * 1,3,0", "Every Monday, Wednesday and Sunday at 08:30"),
    ("0 0 * 6-8 *", "Every day in June to August at 00:00"),
    ("@monthly", "On day 1 of every month at 00:00"),
    ("0 6 1,15 1,7 *", "On day 1 and 15 of January and July at 06:00"),
    ("@yearly", "On day 1 of January at 00:00"),
    ("0 18 L * *", "On the last day of every month at 18:00"),
    ("0 9 15,L 2 *", "On day 15 and the last day of February at 09:00"),
    ("0 9 * * MON#2", "On the second Monday of every month at 09:00"),
    ("0 9 * * L5", "On the last Friday of every month at 09:00"),
    ("0 0 13 * FRI", "On day 13 of every month and also every Friday at 00:00"),  # or
    ("0 0 13 6 FRI", "On day 13 of June and also every Friday in June at 00:00"),
    ("0 0 1-7 * */7", "Every Sunday that is day 1 to 7 of the month at 00:00"),  # and
    ("0 0 */10 6 FRI", "Every Friday that is day 1, 11, 21 or 31 of June at 00:00"),
    ("* * * * * *", "Every second"),
    ("*/30 * * * * *", "Every 30 seconds"),
    ("30 * * * * *", "Every minute from 00:00:30 to 23:59:30"),
    ("15 30 1 * * *", "Every day at 01:30:15"),
    ("0 0 12 * * *", "Every day at 12:00"),
    ("*/10 * 9-17 * * 1-5", "Every 10 seconds from 09:00 to 17:59:50, every weekday"),
    ("3-50/7 1-20/3 * * *", "Every day at minute 3, 10, 17, 24, 31, 38 and 45 of hour 1, 4, 7, 10, 13, 16 and 19"),
    ({"datetime": "2026-10-25T01:30Z"}, "Once at 2026-10-25 02:30:00"),  # comes twice
    ({"datetime": "9999-12-31T23:59:59Z"}, "Once at 9999-12-31 23:59:59"),
    ({"seconds": 90}, "Every 90 seconds since 2026-11-24 06:00:00"),
    ({"seconds": 1.5}, "Every 1.5 seconds since 2026-11-24 06:00:00"),
    ({"seconds": 900, "start_date": "2027-01-01T00:00Z"}, "Every 15 minutes from 2027-01-01 01:00:00 on"),
    ({"seconds": 3600}, "Every hour since 2026-11-24 06:00:00"),
    ({"seconds": 172800}, "Every 48 hours since 2026-11-24 06:00:00"),
)
def test_a_schedule_in_words(config: str | dict[str, Any], words: str) -> None:
    named = {"expression": config} if isinstance(config, str) else config
    kind = {"expression": "cron", "datetime": "once", "seconds": "interval"}[next(iter(named))]
    assert make_timing(kind, {**named, "timezone": "Europe/Berlin"}, NOW).describe() == f"{words} (Europe/Berlin)"


# -- Configurations ----------------------------------------------------------------------------------------------------


def test_a_good_config_is_stored_with_its_zone_and_once_in_so_many_seconds_as_its_time() -> None:
    nine = "2026-12-01T09:00"
    for schedule_type, config, stored in (
        ("cron", {"expression": "\r\n@daily\n", "timezone": "UTC\n"}, {"expression": "@daily", "timezone": "UTC"}),
        ("cron", {"expression": " 5-5 9 * * * "}, {"expression": "5-5 9 * * *"}),
        ("cron", {"expression": "@daily", "timezone": None}, {"expression": "@daily"}),
        ("once", {"datetime": nine}, {"datetime": nine}),
        ("once", {"in_seconds": 90.5, "timezone": "UTC"}, {"datetime": "2026-11-24T05:01:30.500000+00:00", "timezone": "UTC"}),
        ("interval", {"seconds": 60.0, "start_date": None}, {"seconds": 60}),
        ("interval", {"seconds": 1.125}, {"seconds": 1.125}),
        ("interval", {"seconds": 315360000}, {"seconds": 315360000}),
        ("interval", {"seconds": 60, "start_date": nine}, {"seconds": 60, "start_date": f"{nine}:00+01:00"}),
        ("interval", {"seconds": 60, "start_date": f"{nine}Z"}, {"seconds": 60, "start_date": f"{nine}Z"}),
    ):
        stored = {"timezone": "Europe/Berlin", **stored}
        assert check_schedule_config(schedule_type, config, "Europe/Berlin", NOW) == stored, config
        assert check_schedule_config(schedule_type, stored, "Asia/Tokyo", NOW) == stored


def test_a_local_time_that_comes_twice_is_the_first_that_is_still_to_come() -> None:
    half_past = {"datetime": "2026-10-25T02:30", "timezone": "Europe/Berlin"}
    for now, stored in {"00:29": half_past, "00:30": {**half_past, "datetime": "2026-10-25T02:30:00+01:00"}}.items():
        assert check_schedule_config("once", half_past, "UTC", at(f"2026-10-25T{now}Z")) == stored


def errors_of(schedule_type: str, config: object) -> list[tuple[str, str]]:
    return [(error.field, error.message) for error in refused(check_schedule_config, schedule_type, config, "UTC", NOW).errors]


# Kind, configuration, and what is said of each bad field.
BAD_SCHEDULE_CONFIGS: list[tuple[str, Any, dict[str, str]]] = [
    ("cron", {}, {".expression": "is required"}),
    ("cron", {"expression": None}, {".expression": "must be a valid string, not null"}),
    ("cron", {"expression": 5}, {".expression": "must be a valid string, not 5"}),
    ("cron", ["* * * * *"], {"": "must be a valid object"}),
    ("cron", {"expression": "* * * * *", "timezone": 5}, {".timezone": "must be a valid string, not 5"}),
    ("cron", {"expression": "@daily", "tz": "UTC"}, {".tz": "unknown field (known: expression, timezone)"}),
    ("once", {"datetime": "2026-11-24T05:00:00Z"},
     {".datetime": "'2026-11-24T05:00:00Z': must be in the future (it is now 2026-11-24T05:00:00+00:00)"}),
    ("once", {}, {"": "must have exactly one of datetime, in_seconds, not none"}),
    ("once", {"datetime": "2100-01-01T00:00", "in_seconds": 5},
     {"": "must have exactly one of datetime, in_seconds, not datetime and in_seconds"}),
    ("once", {"in_seconds": 0}, {".in_seconds": "must be greater than or equal to 0.001, not 0"}),
    ("interval", {}, {"": "must have exactly one of seconds, days, not none"}),
    ("interval", {"seconds": 60, "days": 1}, {"": "must have exactly one of seconds, days, not seconds and days"}),
    *(("interval", {"days": value}, {".days": said}) for value, said in [
        (0, "must be greater than or equal to 1, not 0"), (3651, "must be less than or equal to 3650, not 3651"),
        (1.5, "must be a valid integer, not 1.5"),
    ]),
    *(("interval", {"seconds": value}, {".seconds": said}) for value, said in [
        *((value, f"must be greater than or equal to 1, not {value}") for value in (0, 0.999)), ([60], "must be a valid number"),
        (315360001, "must be less than or equal to 315360000, not 315360001"), (float("nan"), "must be a finite number, not nan"),
        (float("inf"), "must be a finite number, not inf"), (1.0001, "must have at most 3 decimals, not 1.0001"),
        ("60", "must be a valid number, not '60'"), (False, "must be a valid number, not False"),
    ]),
    ("interval", {"second": 60, "seconds": True, "start_date": "2026-12-01", "timezone": "Europe/Berln"}, {
        ".seconds": "must be a valid number, not True", ".start_date": f"'2026-12-01': {ISO_RULE}",
        ".timezone": "'Europe/Berln': must be an IANA time zone (did you mean Europe/Berlin?)",
        ".second": "unknown field (did you mean seconds?)",
    }),
]  # fmt: skip


@each("kind config said", *BAD_SCHEDULE_CONFIGS)
def test_a_refused_config_is_told_why_with_every_bad_field(kind: str, config: Any, said: dict[str, str]) -> None:
    assert errors_of(kind, config) == [(f"schedule_config{field}", message) for field, message in said.items()]


# -- What to do about due slots ----------------------------------------------------------------------------------------


def minutely(**settings: object) -> Plan:
    return Plan(chronotask.Interval(MINUTE, NOW, NOW - 1, "UTC"), schedule_id=7, **settings)  # type: ignore[arg-type]


def test_bounds_are_inclusive_and_max_runs_ends_a_schedule() -> None:
    plan = minutely(start_at=NOW + MINUTE, end_at=NOW + 3 * MINUTE)
    assert list(plan.upcoming(0, 9)) == [NOW + MINUTE, NOW + 2 * MINUTE, NOW + 3 * MINUTE]
    assert (plan.last_slot(NOW + 9 * MINUTE), plan.last_slot(NOW)) == (NOW + 3 * MINUTE, None)
    assert list(minutely(remaining=2).upcoming(0, 9)) == [NOW, NOW + MINUTE]
    assert minutely(remaining=0).next_slot(0) is None


def test_jitter_is_the_same_each_time_differs_by_schedule_and_stays_within_the_gap() -> None:
    plan = minutely(jitter=3600.0)
    fires = [plan.fire_time(NOW + i * MINUTE) for i in range(500)]
    assert minutely(jitter=30.0).fire_time(NOW) - NOW == 10_166_000, "the same in every version, too"
    assert all(0 <= fire - (NOW + i * MINUTE) < MINUTE for i, fire in enumerate(fires))
    assert all(earlier < later for earlier, later in itertools.pairwise(fires))
    assert len({fire % MINUTE for fire in fires}) > 400
    assert Plan(plan.timing, 8, jitter=3600.0).fire_time(NOW) != fires[0]
    assert Plan(plan.timing, None, jitter=3600.0).fire_time(NOW) == NOW
    assert Plan(chronotask.Once(NOW, "UTC"), 7, jitter=2.0).fire_time(NOW) - NOW in range(2 * SECOND + 1)
    assert Plan(chronotask.Once(0, "UTC"), 7, jitter=3600.0).fire_time(chronotask.LAST_INSTANT) == chronotask.LAST_INSTANT
    assert list(plan.upcoming(NOW, 499)) == fires[1:]


# ======================================================================================================================
# 3. Resources
# ======================================================================================================================


def test_a_config_keeps_only_the_fields_that_were_sent_and_a_method_in_upper_case() -> None:
    assert parse_config("bash", {"command": "true", "args": None}) == {"command": "true"}
    assert parse_config("bash", {"command": "a\r\nb\n\r", "working_dir": "~/x"}) == {"command": "a\nb\n\r", "working_dir": "~/x"}
    assert parse_config("http", {"url": "http://a.example/", "method": "post"})["method"] == "POST"


def test_every_bad_field_is_listed_with_its_path_and_none_of_them_shows_a_secret() -> None:
    config = {"url": "ftp://a", "method": "FETCH", "verify_tls": "no", "auth": {"username": "u"}, "tiemout": 3}
    fields = [error.field.removeprefix("config.") for error in refused(parse_config, "http", config).errors]
    assert fields == ["url", "method", "auth.password", "verify_tls", "tiemout"]
    config = {
        "url": "http://user:hunter2secret@[bad/",
        "headers": {"Authorization": "Bearer hunter2secret\n"},
        "auth": {"username": "u", "password": ["hunter2secret"], "hunter": "hunter2secret"},
        "body": {"hunter2secret": float("nan")},
    }
    assert "hunter2secret" not in refused(parse_config, "http", config).detail
    text = {"url": "http://h/", "headers": {"Content-Type": "text/plain", "a b": "x", "X": 2}, "body": "${cause:text}"}
    assert [one.field for one in refused(parse_config, "http", text).errors] == ["config.headers.a b", "config.headers.X"]


ABSENT: Any = object()
# Why a task is refused: values of the field that the message begins with (ABSENT: it has none), or of the whole config.
SECRET_NAMES = "only variables named CHRONOTASK_SECRET_… may be read"
HTTP_FIELDS = "url, method, headers, params, body, auth, timeout, expected_status, follow_redirects, verify_tls"
BAD_CONFIGS: dict[str, dict[str, list[Any]]] = {
    "http": {
        "config: must be a valid object": ["x", [[]]],
        "config: must be a valid object, not null": [None],
        "config.url: is required": [ABSENT],
        "config.url: must be a valid string": [5],
        "config.url: must be a URL that starts with http:// or https:// and names a host": [
            "a.example",
            "http://",
            "file:///etc",
        ],
        "config.url: must be a URL without blanks, backslashes and control characters": [
            f"http://a{text}/" for text in (" b", "\\@b", "/\r\nX: y")
        ],
        "config.url: must be a valid URL: its host or port cannot be read": ["http://a:99999", "http://a:b", "http://[::1"],
        "config.url: must have at most 8192 characters": ["http://a/" + "x" * 8192],
        "config.tiemout: unknown field (did you mean timeout?)": [3],
        f"config.zzz: unknown field (known: {HTTP_FIELDS})": [3],
        "config.method: must be 'GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'HEAD' or 'OPTIONS', not 'CONNECT'": ["CONNECT"],
        "config.timeout: must be greater than or equal to 1, not 0": [0],
        "config.timeout: must be less than or equal to 604800, not 604801": [604801],
        "config.timeout: must be a valid number, not '30'": ["30"],
        "config.timeout: must be a valid number, not True": [True],
        "config.verify_tls: must be a valid boolean, not 1": [1],
        "config.follow_redirects: must be a valid boolean, not 'yes'": ["yes"],
        **{
            f"config.headers.{name}: cannot be set: it follows from the url and the body": [{name: "1"}]
            for name in ("Host", "content-LENGTH", "Transfer-Encoding", "Expect")
        },
        **{
            f"config.headers.{name}: must match pattern '^[A-Za-z0-9!#$%&'*+.^_`|~-]+$'": [{name: "1"}]
            for name in ("X Y", "X:", "")
        },
        "config.headers.X: must not hold control characters": [{"X": value} for value in ("1\r\nEvil: 2", "1\0")],
        "config.headers.X: must have at most 8192 characters": [{"X": "x" * 8193}],
        "config.headers: must not hold a name twice, whatever its case": [{"X-A": "1", "x-a": "2"}],
        "config.headers.X: must be a valid string": [{"X": 1}],
        "config.headers: must be a valid object": ["X: 1"],
        "config.params.a: must be text, a finite number, true or false, or a list of them": [
            {"a": value} for value in (None, [[1]], float("inf"))
        ],
        "config.body: must be an object or a list (sent as JSON), or text (sent as it is)": [5],
        "config.body: must be valid JSON: finite numbers and valid Unicode": [{"a": float("nan")}, "\ud800"],
        "config.expected_status: must not be empty": [[]],
        'config.expected_status[0]: must be a status code from 100 to 599, or a range such as "200-299"': [
            [entry] for entry in (99, -200, "299-200", "2xx", "200-", [200], {})
        ],
        "config.auth.username: must not hold a colon (RFC 7617)": [{"username": "a:b", "password": "x"}],
        "config.auth.password: must be a valid string": [{"username": "a", "password": 12345}],
        "config.auth.password: is required; config.auth.pasword: unknown field (did you mean password?)": [
            {"username": "u", "pasword": "geheim"}
        ],
        "config.auth: must be a valid object": ["user:geheim"],
        f"config.url: ${{env:'HOME'}}: {SECRET_NAMES}": ["http://a/${env:HOME}"],
        f"config.headers.X: ${{env:'CHRONOTASK_API_TOKEN'}}: {SECRET_NAMES}": [{"X": "${env:CHRONOTASK_API_TOKEN}"}],
        "config.body: ${file:…} needs the path of a file below SECRETS_DIR": [{"a": ["${file:}"]}],
    },
    "bash": {
        "config.command: is required": [ABSENT],
        "config.command: must hold a command": ["", " \n"],
        "config.command: must not hold a NUL character": ["a\0b"],
        "config.command: must have at most 65536 characters": ["x" * 65537],
        "config.command: must be a valid string": [["ls"]],
        "config.command: must be a valid string, unable to parse raw data as a unicode string, not '\\ud800'": ["\ud800"],
        "config.args: must be a valid list, not 'b'": ["b"],
        "config.args[1]: must be a valid string, not 3": [["b", 3]],
        "config.args[0]: must not hold a NUL character": [["b\0"]],
        "config.args: must have at most 1000 items after validation, not 1001": [["x"] * 1001],
        **{
            f"config.env.{name}: must match pattern '^[A-Za-z_][A-Za-z0-9_]{{0,254}}$'": [
                {name: "() { :; }"},
                {name: 5},
            ]
            for name in ("1A", "BASH_FUNC_echo%%", "A=B")
        },
        "config.env.CHRONOTASK_RUN_ID: cannot be set: CHRONOTASK_… belongs to the service": [{"CHRONOTASK_RUN_ID": "x"}],
        "config.env.A: must not hold a NUL character": [{"A": "x\0"}],
        "config.env.A: must be a valid string": [{"A": 5}],
        "config.working_dir: must not be empty": [""],
        "config.launcher: must not be empty": [""],
        "config.working_dir: must be an absolute path, or one that starts with ~/ (the home of the service's user), without $": (
            ["a", "./a", "../a", "~bob/a", "$HOME", "/srv/$USER", " /a"]
        ),
        "config.timeout: must be greater than or equal to 1, not 0.5": [0.5],
        "config.comand: unknown field (did you mean command?)": ["a"],
    },
}


def with_changes(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**base, **changes}.items() if value is not ABSENT}


@each("kind message values", *((kind, *row) for kind, rows in BAD_CONFIGS.items() for row in rows.items()))
def test_a_config_is_refused_with_what_would_be_accepted(kind: str, message: str, values: list[Any]) -> None:
    good, field = {"http": {"url": "http://a/"}, "bash": {"command": "a"}}[kind], re.match(r"config\.(\w+)", message)
    for value in values:
        config = with_changes(good, {field[1]: value}) if field else value
        assert refused(parse_config, kind, config).detail == message, value


@each(
    "config",
    *({"url": url} for url in ("https://user:pw@a.example:8443/p?q=1#f", "http://[::1]:8000/", "http://bücher.example/")),
    *({"url": url} for url in ("${env:CHRONOTASK_SECRET_URL}", "https://${env:CHRONOTASK_SECRET_HOST}:8443/x")),
    *({"timeout": timeout} for timeout in (1.5, 604800)),
    {"expected_status": [200, "204", "300-399"]},
    {"params": {"a": "x", "b": 1, "c": 1.5, "d": True, "e": ["x", 2, False]}},
    *({"body": body} for body in ({"a": None, "b": [1, {"c": "é"}]}, [], "", "literal $HOME ${HOME} ${unknown:x}")),
    {"headers": {"X-Tab": "a\tb", "X-Empty": "", "X-Umlaut": "ü"}},
    {"auth": {"username": "u", "password": ""}},
)
def test_an_http_config_is_accepted_as_it_is(config: dict[str, Any]) -> None:
    assert parse_config("http", {"url": "http://a/", **config}) == {"url": "http://a/", **config}


def test_a_deeply_nested_body_is_refused_without_recursion() -> None:
    body: Any = []
    for _ in range(100_000):
        body = [body]
    assert sum(1 for _ in chronotask.walk(body)) == 100_001
    error = refused(parse_config, "http", {"url": "http://a/", "body": body})
    assert error.detail == "config.body: must not be nested deeper than 64 levels"


SECRET_CONFIG = {
    "url": "https://user:pw@a.example/x",
    "headers": {"authorization": "Bearer abc", "COOKIE": "a=${env:B}", "Proxy-Authorization": "Basic x", "X-Plain": "seen"},
    "auth": {"username": "u", "password": "secret"},
}
MASKED_CONFIG = {
    "url": f"https://{MASK}@a.example/x",
    "headers": {"authorization": MASK, "COOKIE": MASK, "Proxy-Authorization": MASK, "X-Plain": "seen"},
    "auth": {"username": "u", "password": MASK},
}


def test_secrets_are_masked_and_references_to_them_stay_readable() -> None:
    assert chronotask.mask_config(SECRET_CONFIG) == MASKED_CONFIG
    assert SECRET_CONFIG["auth"] == {"username": "u", "password": "secret"}
    assert chronotask.mask_config({"command": "true"}) == {"command": "true"}
    headers = {"Authorization": "bearer ${env:CHRONOTASK_SECRET_T}", "Cookie": "${ENV:CHRONOTASK_SECRET_T}"}
    config = {"url": "http://a/", "headers": headers, "auth": {"username": "u", "password": "${file:/run/secrets/p}"}}
    assert chronotask.mask_config(config) == {**config, "headers": headers | {"Cookie": MASK}}


@each(
    "url masked",  # * is the mask
    *(line.split() for line in """
        http://a/x                                  http://a/x
        http://a/x@y                                http://a/x@y
        http://u:p@a/x                              http://*@a/x
        http://token@a                              http://*@a
        HTTP://u:p@x@a:1?q                          HTTP://*@a:1?q
        http://u:${env:CHRONOTASK_SECRET_P}@a/      http://u:${env:CHRONOTASK_SECRET_P}@a/
        http://u:x${env:CHRONOTASK_SECRET_P}@a/     http://*@a/
        ${env:CHRONOTASK_SECRET_URL}                ${env:CHRONOTASK_SECRET_URL}
        http://u:pw${file:a/b}@a/                   http://*@a/
        http://u:${file:a/b}@a/                     http://u:${file:a/b}@a/
        http://${file:a/b}:pw@a:1/x@y               http://*@a:1/x@y
        http://u:p@${file:a@b}/x                    http://*@${file:a@b}/x
        http://a/${file:a@b}                        http://a/${file:a@b}
        ${file:a/b}u:pw@a/x@y                       *@a/x@y
        ${file:a/b}://u:pw@a/x                      ${file:a/b}://*@a/x
        ${file:a/b}/users/@me                       ${file:a/b}/users/@me
        ftp://u:pw@a/x                              ftp://*@a/x
    """.strip().splitlines()),
)  # fmt: skip
def test_credentials_in_urls_are_masked(url: str, masked: str) -> None:
    assert chronotask.mask_config({"url": url})["url"] == masked.replace("*", MASK)


def test_a_mask_sent_back_keeps_the_stored_secret_in_the_fields_that_are_masked() -> None:
    assert chronotask.unmask_config("http", MASKED_CONFIG, SECRET_CONFIG) == SECRET_CONFIG
    new = {"url": "http://a/", "headers": {"X-Plain": MASK}, "body": MASK}
    assert chronotask.unmask_config("http", new, {"url": "http://a/"}) == new
    with pytest.raises(InvalidInput, match=r"config\.headers\.Authorization: give the secret again"):
        chronotask.unmask_config("http", {"url": "http://a/", "headers": {"Authorization": f"Bearer {MASK}"}}, SECRET_CONFIG)
    for stored in ({}, {"url": "http://a/"}):
        with pytest.raises(InvalidInput, match=r"config\.auth\.password: give the secret again"):
            chronotask.unmask_config("http", {"url": "http://a/", "auth": {"username": "u", "password": MASK}}, stored)


# For each stored url, the new ones with which masks keep their secrets, and those with which they do not; * is the mask.
MOVED = """http://*@127.0.0.1:9/ http://*@127.0.0.2:8000/ https://*@127.0.0.1:8000/ http://127.0.0.1:8000@127.0.0.2/
    http://*@127.0.0.1:8000@127.0.0.2/ http://*:127.0.0.1:8000@127.0.0.2/ http://127.0.0.2/*@127.0.0.1:8000
    http://127.0.0.2?*@127.0.0.1:8000 http://127.0.0.2#*@127.0.0.1:8000 http://*@127.0.0.1:8000.evil.example/
    http://*@127.0.0.1:80000/ http://*@127.0.0.1/ http://*@${env:CHRONOTASK_SECRET_X}/
    http://*@127.0.0.1:8000${env:CHRONOTASK_SECRET_X}/"""
KEPT_OR_MOVED = {
    "https://user:pw@a.example/x": (
        "https://*@a.example/elsewhere?x=1 https://*@A.EXAMPLE/x",
        "http://*@a.example/x https://*@a.example:8443/x https://*@evil.example/x https://*@a.example.evil.example/x "
        "https://*@a.example@evil.example/x",
    ),
    "https://u:pw@${env:CHRONOTASK_SECRET_H}/x": (
        "https://*@${env:CHRONOTASK_SECRET_H}/x", "https://*@${env:CHRONOTASK_SECRET_H}/y"
    ),
    "https://${file:a/b}:pw@good.example/x": ("https://*@good.example/y", "https://*@evil.example/x"),
    "https://u:pw${file:a/@good.example/b}@good.example/": ("", "https://*@evil.example/"),
    "https://u:pw@good.example/": ("", "https://*@good.example${file:x/y}/ https://*@evil.example\\@good.example/"),
    "${file:a/b}u:pw@good.example/x": ("*@good.example/x", "*@evil.example/x"),
    "http://u:pw@127.0.0.1:8000/": ("http://*@127.0.0.1:8000/other?x=1", MOVED),
    "http://127.0.0.1:8000/": ("http://127.0.0.1:8000/other?x=1", MOVED.replace("://*@", "://").replace("://*:", "://x:")),
}  # fmt: skip


@each("stored", *KEPT_OR_MOVED)
def test_a_mask_counts_only_while_it_is_sure_that_scheme_host_and_port_are_the_same(stored: str) -> None:
    kept, moved = (text.replace("*", MASK).split() for text in KEPT_OR_MOVED[stored])
    credentials = stored.rpartition("@")[0].rpartition("://")[2]
    for url in kept:
        found = chronotask.override_config("http", {**SECRET_CONFIG, "url": stored}, {**MASKED_CONFIG, "url": url})
        assert found == {**SECRET_CONFIG, "url": url.replace(MASK, credentials)}
    for url in moved:
        error = refused(chronotask.unmask_config, "http", {**MASKED_CONFIG, "url": url}, {**SECRET_CONFIG, "url": stored})
        fields = {found.field.removeprefix("config.") for found in error.errors}
        secret = {"auth.password", "headers.authorization", "headers.COOKIE", "headers.Proxy-Authorization"}
        masked = re.match(rf"(https?://)?[^/?#]*{re.escape(MASK)}[^/?#]*@", url)
        assert fields == (secret | {"url"} if masked else secret), url


# ======================================================================================================================
# 4. Decisions (pure)
# ======================================================================================================================


# --- Due slots --------------------------------------------------------------------------------------------------------


@each(
    # Minutes since NOW. The slot of minute 0 is settled; `down` is when the service looks again.
    "catchup window down missed caught_up on_time settled",
    ("latest", 86400, 59 / 60, [], [], [], 0),
    ("latest", 86400, 1 + 5 / 60, [], [], [1], 1),
    ("latest", 86400, 1 + 5.000001 / 60, [], [1], [], 1),
    ("latest", 86400, 2.0, [], [1], [2], 2),
    ("latest", 86400, 3.5, [(1, 2, 2)], [3], [], 3),
    ("latest", 29, 3.5, [(1, 3, 3)], [], [], 3),
    ("latest", 30, 3.5, [(1, 2, 2)], [3], [], 3),
    ("latest", 0, 4.0, [(1, 3, 3)], [], [4], 4),
    ("latest", 86400, 1200.5, [(1, 1199, 1000)], [1200], [], 1200),
    ("skip", 86400, 1.5, [(1, 1, 1)], [], [], 1),
    ("skip", 86400, 4.0, [(1, 3, 3)], [], [4], 4),
    ("all", 86400, 1.5, [], [1], [], 1),
    ("all", 86400, 4.0, [], [1, 2, 3], [4], 4),
    ("all", 120, 4.5, [(1, 2, 2)], [3, 4], [], 4),
    ("all", 30, 4.5, [(1, 3, 3)], [4], [], 4),
    ("all", 86400, 101.5, [(1, 1, 1)], list(range(2, 102)), [], 101),
    ("all", 86400 * 365, 100000.5, [(1, 99900, 1000)], list(range(99901, 100001)), [], 100000),
)
def test_a_slot_is_on_time_up_to_five_seconds_late_and_then_falls_under_catchup(
    catchup: str, window: float, down: float, missed: list[Any], caught_up: list[int], on_time: list[int], settled: int
) -> None:
    for timing in (chronotask.Interval(MINUTE, NOW, NOW - 1, "UTC"), Cron("* * * * *", "Europe/Berlin")):
        due = due_slots(Plan(timing, 7, catchup=catchup, catchup_window=window), NOW, NOW + round(down * MINUTE))
        assert [(*in_minutes(m.first, m.last), m.count) for m in [due.missed] if m] == missed
        assert (in_minutes(*due.catchup), in_minutes(*due.on_time)) == (caught_up, on_time)
        assert in_minutes(due.settled_until, due.next_slot or 0) == [settled, settled + 1]


def in_minutes(*instants: int) -> list[float]:
    """Since NOW."""
    return [(instant - NOW) / MINUTE for instant in instants]


def test_every_combination_of_catchup_downtime_and_jitter_deals_with_each_slot_once() -> None:
    seconds = (0, 30, 59, 60, 61, 64, 65, 66, 119, 121, 200, 3600, 40000)
    for catchup, jitter, down in itertools.product(("latest", "all", "skip"), (0.0, 7.0, 3600.0), seconds):
        plan, now = minutely(catchup=catchup, jitter=jitter), NOW + down * SECOND
        due = due_slots(plan, NOW - 1, now)
        taken = [*due.catchup, *due.on_time]
        if group := due.missed:
            taken += range(group.first, group.last + 1, MINUTE)
        due_all = [slot for slot in range(NOW, now + 1, MINUTE) if plan.fire_time(slot) <= now]
        assert sorted(taken) == due_all
        assert due.on_time == [slot for slot in due_all if plan.fire_time(slot) >= now - 5 * SECOND]
        assert len(due.catchup) <= {"latest": 1, "all": 100, "skip": 0}[catchup]
        assert due.settled_until == (due_all[-1] if due_all else NOW - 1)
        assert due.next_slot == due.settled_until // MINUTE * MINUTE + MINUTE
        assert due_slots(plan, due.settled_until, now) == chronotask.Due(None, [], [], due.settled_until, due.next_slot)


def test_missed_slots_say_why_they_did_not_run() -> None:
    for catchup, window, reason in (
        ("skip", 86400.0, "catchup=skip"),
        ("all", 86400.0, "catchup=all runs only the newest 100"),
    ):
        due = due_slots(minutely(catchup=catchup, catchup_window=window), NOW, NOW + 500 * MINUTE)
        assert due.missed is not None and due.missed.reason == reason, (catchup, window)
    for last, count, zone, message in (
        (NOW, 1, "UTC", "1 slot, 2026-11-24T05:00:00+00:00 (UTC)"),
        (NOW + MINUTE, 2, "Europe/Berlin", "2 slots from 2026-11-24T06:00:00+01:00 to 2026-11-24T06:01:00+01:00 (Europe/Berlin)"),
        (NOW + DAY, 1000, "UTC", "1000 or more slots from 2026-11-24T05:00:00+00:00 to 2026-11-25T05:00:00+00:00 (UTC)"),
    ):
        assert chronotask.Missed(NOW, last, count, "catchup=skip").message(zone) == f"missed: {message}; catchup=skip"
    once = Plan(chronotask.Once(NOW, "UTC"), 7)  # is caught up within the window, and else recorded
    assert due_slots(once, NOW - DAY, NOW + HOUR) == chronotask.Due(None, [NOW], [], NOW, None)
    late = chronotask.Missed(NOW, NOW, 1, "older than the catchup_window of 86400 s")
    assert due_slots(once, NOW - DAY, NOW + 2 * DAY) == chronotask.Due(late, [], [], NOW, None)


def test_a_long_downtime_is_not_walked_slot_by_slot() -> None:
    # A second-wise cron over ten years: 315 million slots. This ends at once, or the test does not end.
    first, last = NOW - 3650 * DAY + SECOND, NOW - 7 * SECOND
    due = due_slots(Plan(Cron("* * * * * *", "Europe/Berlin"), 7), first - SECOND, NOW)
    assert (due.catchup, due.on_time) == ([NOW - 6 * SECOND], [NOW - i * SECOND for i in (5, 4, 3, 2, 1, 0)])
    assert due.missed == chronotask.Missed(first, last, 1000, "catchup=latest runs only the newest")


def test_a_clock_that_is_set_back_lets_fixed_times_wait_up_to_3_hours_and_all_others_go_on_from_now() -> None:
    """In minutes since NOW: where the schedule stood when the clock was set to NOW, what that had read before at the latest,
    and where it stands."""
    fixed, once = Cron("0 5 * * *", "UTC"), chronotask.Once(NOW + HOUR, "UTC")
    for timing, stood, latest, stands in (
        (fixed, -5, 0, -5),
        (fixed, 179, 179, 179),
        (Cron("0-59 0-23 * * *", "UTC"), 60, 179, 60),
        (fixed, 180, 180, 0),
        (fixed, 60, 180, 0),
        (fixed, -5, 999, -5),
        (once, 60, 179, 60),
        (once, 60, 180, 0),
        (Cron("*/5 * * * *", "UTC"), 5, 5, 0),
        (Cron("0 * * * *", "UTC"), 60, 60, 0),
        (Cron("* * * * * *", "UTC"), 525600, 525600, 0),
        (chronotask.Interval(MINUTE, NOW, NOW - 1, "UTC"), 1, 1, 0),
    ):
        assert in_minutes(chronotask.stands_at(timing, NOW + stood * MINUTE, NOW, NOW + latest * MINUTE)) == [stands], stood


@each(
    # Minutes since NOW: the clock is right again at minute 1.5 after it was behind, and the schedule stands at -180.
    "dealt_with in_force_since ran missed catchup",
    (0, 0, [], [], [1]),
    (-60, -60, [], [[-59, 0]], [1]),
    (1, 0, [], [], []),
    (1, -180, [], [], []),
    (500, 1, [], [], []),  # it was ahead before: what the schedule was not there for is out, the rest was missed
    (500, -2, [], [[-1, 0]], [1]),
    (500, -180, [(-179, 0)], [], [1]),
    (500, -180, [(-178, 1)], [], [-179]),
)
def test_what_was_dealt_with_is_not_made_up_for_when_the_clock_jumps_forward(
    dealt_with: int, in_force_since: int, ran: list[tuple[int, int]], missed: list[list[int]], catchup: list[int]
) -> None:
    stretches = [(NOW + first * MINUTE, NOW + last * MINUTE) for first, last in ran]
    past = {"dealt_with": NOW + dealt_with * MINUTE, "in_force_since": NOW + in_force_since * MINUTE, "ran": stretches}
    plan = Plan(Cron("* * * * *", "UTC"), 7, **past)  # type: ignore[arg-type]
    due = due_slots(plan, NOW - 180 * MINUTE, NOW + 90 * SECOND)
    assert [in_minutes(m.first, m.last) for m in [due.missed] if m] == missed
    assert in_minutes(*due.catchup) == catchup
    assert (due.on_time, due.next_slot) == ([], NOW + 2 * MINUTE)


def test_a_slot_that_ran_is_none_any_more() -> None:
    plan = minutely(ran=[(NOW + MINUTE, NOW + 3 * MINUTE), (NOW + 5 * MINUTE, NOW + 5 * MINUTE)])
    assert plan.next_slot(NOW) == NOW + 4 * MINUTE
    assert plan.last_slot(NOW + 5 * MINUTE) == NOW + 4 * MINUTE
    assert list(plan.upcoming(NOW, 3)) == [NOW + 4 * MINUTE, NOW + 6 * MINUTE, NOW + 7 * MINUTE]
    assert due_slots(plan, NOW, NOW + 5 * MINUTE).catchup == [NOW + 4 * MINUTE]


def test_what_ran_is_remembered_as_a_few_stretches() -> None:
    ran: list[list[int]] = []
    for slot in (1, 2, 3, 4):
        ran = chronotask.add_run(ran, slot, slot - 1)
    assert ran == [[1, 4]]
    assert chronotask.add_run(ran, 9, None) == [[1, 4], [9, 9]]
    assert chronotask.add_run([[1, 4], [9, 9]], 5, 4) == [[1, 5], [9, 9]]  # after the clock was set back
    ran = [[n * n * 10, n * n * 10] for n in range(3, 11)]
    assert chronotask.add_run(ran, 5000, None) == [[90, 160], *ran[2:], [5000, 5000]]  # the two that lie closest are one now


# --- Overlap and claims -----------------------------------------------------------------------------------------------


def a_schedule(**changes: Any) -> chronotask.Schedule:
    """Schedule 7 of task 1: every 60 s, with the usual policies, made at START, nothing of it dealt with yet."""
    moments = dict.fromkeys(("created_at", "updated_at", "settled_until"), START)
    moments |= dict.fromkeys(("next_slot", "next_fire"), START + 60 * S)
    times = {"schedule_type": "interval", "schedule_config": {"seconds": 60, "timezone": "UTC"}}
    return chronotask.Schedule(**{"id": 7, "task_id": 1, **times, **moments, **changes})


def one_unfinished(task_id: int, schedule_id: int | None, trigger: str, hold: int = 0) -> chronotask.NewExecution:
    return chronotask.NewExecution(task_id, schedule_id, trigger, None, 0, hold=hold)


UNFINISHED = {
    "nobody": [],
    "manual": [one_unfinished(1, None, "manual")],
    "own": [one_unfinished(1, 7, "schedule")],
    "own+waiting": [one_unfinished(1, 7, "schedule"), one_unfinished(1, 7, "schedule", chronotask.Hold.OVERLAP)],
    "own catch-up": [one_unfinished(1, 7, "catchup")],
    "other catch-up": [one_unfinished(1, 8, "catchup")],
    "other task": [one_unfinished(2, 9, "schedule")],
}


def claimed(schedule: chronotask.Schedule, unfinished: str, now: float) -> tuple[chronotask.Claim, str]:
    """What the slots turn into at START + now: their seconds, then m(issed), s(kipped), x (cancelled) or q(ueued), which may wait
    behind o(verlap) and behind c(atch-up)."""
    others = {task: list(groups) for task, groups in itertools.groupby(UNFINISHED[unfinished], lambda group: group.task_id)}
    claim = chronotask.Claim(START + round(now * S), others)
    list(claim.slots(schedule))
    words, letters = [], {"missed": "m", "skipped": "s", "cancelled": "x"}
    for row in claim.rows:
        held = "o" * bool(row.hold & chronotask.Hold.OVERLAP) + "c" * bool(row.hold & chronotask.Hold.CATCHUP)
        assert row.scheduled_for is not None
        words.append(f"{(row.scheduled_for - START) // S}{letters.get(row.status, 'q')}{held}")
    return claim, " ".join(words)


# At START + 183 s: the slots 60 and 120 were missed, 180 is on time. What is unfinished (each of these), catchup, then what
# happens by overlap.
CLAIMS = """
nobody, other task                        | latest | 60m 120q 180s     | 60m 120q 180qo    | 60m 120q 180q     | 60m 120x 180qo
nobody, other task                        | all    | 60q 120qc 180s    | 60q 120qc 180qo   | 60q 120qc 180q    | 60x 120x 180qo
nobody, other task                        | skip   | 60m 180q          | 60m 180q          | 60m 180q          | 60m 180q
manual, own, other catch-up               | latest | 60m 120s 180s     | 60m 120qo 180s    | 60m 120q 180q     | 60m 120x 180qo
manual, own, other catch-up               | all    | 60s 120s 180s     | 60qo 120qoc 180s  | 60q 120qc 180q    | 60x 120x 180qo
manual, own, own catch-up, other catch-up | skip   | 60m 180s          | 60m 180qo         | 60m 180q          | 60m 180qo
own+waiting                               | latest | 60m 120s 180s     | 60m 120s 180s     | 60m 120q 180q     | 60m 120x 180qo
own+waiting                               | all    | 60s 120s 180s     | 60s 120s 180s     | 60q 120qc 180q    | 60x 120x 180qo
own+waiting                               | skip   | 60m 180s          | 60m 180s          | 60m 180q          | 60m 180qo
own catch-up                              | latest | 60m 120qc 180s    | 60m 120qc 180qo   | 60m 120qc 180q    | 60m 120x 180qo
own catch-up                              | all    | 60qc 120qc 180s   | 60qc 120qc 180qo  | 60qc 120qc 180q   | 60x 120x 180qo
"""


@each("line", *CLAIMS.strip().splitlines())
def test_overlap_and_catchup_decide_what_becomes_of_due_slots(line: str) -> None:
    names, catchup, *expected = map(str.strip, line.split("|"))
    for unfinished in names.split(", "):
        for overlap, wanted in zip(("skip", "queue", "allow", "cancel"), expected, strict=True):
            schedule = a_schedule(overlap=overlap, catchup=catchup)
            claim, text = claimed(schedule, unfinished, 183)
            assert text == wanted, (unfinished, overlap)
            assert (schedule.settled_until, schedule.next_slot, schedule.is_active) == (START + 180 * S, START + 240 * S, True)
        assert bool(claim.cancels) == ("180qo" in text), f"by cancel it asks for the end of what is unfinished: {unfinished}"


def test_of_many_missed_slots_up_to_1000_are_counted_and_the_newest_100_run_oldest_first() -> None:
    claim, _ = claimed(a_schedule(catchup="skip"), "nobody", 5000 * 60.0)
    assert str(claim.rows[0].error_message).startswith("missed: 1000 or more slots from ")
    claim, text = claimed(a_schedule(catchup="all", overlap="allow"), "nobody", 60 * 105 + 30)
    assert text.startswith("60m 360q 420qc 480qc ") and text.endswith(" 6240qc 6300qc")
    assert str(claim.rows[0].error_message).startswith("missed: 5 slots from ")
    assert len(claim.rows) == 101


def test_a_claim_ends_with_max_runs_or_end_at_and_then_the_schedule_does() -> None:
    schedule = a_schedule(catchup="all", overlap="allow", max_runs=3, run_count=1)
    assert claimed(schedule, "nobody", 630)[1] == "60q 120qc"
    assert (schedule.is_active, schedule.next_slot, schedule.next_fire) == (False, None, None)
    schedule = a_schedule(end_at=START + 60 * S)
    assert claimed(schedule, "nobody", 60)[1] == "60q"
    assert (schedule.is_active, schedule.next_slot) == (False, None)
    schedule = a_schedule(max_runs=1)
    assert claimed(schedule, "own", 60)[1] == "60s", "skipped slots do not use up max_runs"
    assert (schedule.is_active, schedule.next_slot) == (True, START + 120 * S)
    schedule = a_schedule(settled_until=START + 10_740 * S)
    assert claimed(schedule, "nobody", 0)[1] == "", "after a backward step nothing fires until the claimed slot is passed"
    assert schedule.next_slot == START + 10_800 * S


def test_a_claim_remembers_what_ran_and_what_was_dealt_with() -> None:
    past = [START, START]  # by a clock that was ahead then: what is not made up for has not run
    schedule = a_schedule(catchup="latest", overlap="allow", ran=[past], dealt_with=START + 90 * S)
    assert claimed(schedule, "nobody", 183)[1] == "120q 180q"
    assert (schedule.ran, schedule.dealt_with) == ([past, [START + 120 * S, START + 180 * S]], START + 180 * S)
    claimed(schedule, "nobody", 241)
    schedule.overlap = "skip"
    assert claimed(schedule, "own", 301)[1] == "300s"
    claimed(schedule, "nobody", 361)
    assert schedule.ran == [past, [START + 120 * S, START + 240 * S], [START + 360 * S, START + 360 * S]]
    assert (schedule.settled_until, schedule.dealt_with) == (START + 360 * S, START + 360 * S)


def test_of_two_schedules_with_overlap_queue_each_has_one_waiting() -> None:
    schedule, other = a_schedule(overlap="queue"), one_unfinished(1, 8, "schedule", chronotask.Hold.OVERLAP)
    claim = chronotask.Claim(START + 60 * S, {1: [other]})
    list(claim.slots(schedule))
    claim.now += 60 * S
    list(claim.slots(schedule))
    assert [(row.status, row.hold) for row in claim.rows] == [("queued", chronotask.Hold.OVERLAP), ("skipped", 0)]


async def test_late_slots_of_several_schedules_are_judged_oldest_first_so_that_none_cancels_a_later_one(rig: Rig) -> None:
    await rig.schedule(await rig.task(), overlap="allow")
    await rig.schedule(1, "once", schedule_config={"datetime": "2026-01-01T00:01:30Z"}, overlap="cancel")
    await rig.run_at(183)
    ran = [("catchup", "succeeded", 90), ("catchup", "succeeded", 120), ("schedule", "succeeded", 180)]
    assert await rig.brief() == [("schedule", "missed", 60), *ran]


def test_a_broken_schedule_is_switched_off_with_a_row_that_says_why() -> None:
    claim, schedule = chronotask.Claim(START + 60 * S), a_schedule()
    claim.record(schedule, START + 60 * S, "missed", "before it broke")  # two rows of one slot would end every tick
    claim.broken(schedule, ValueError("no such zone"))
    [row] = claim.rows
    assert (row.status, row.scheduled_for, row.trigger) == ("failed", START + 60 * S, "schedule")
    assert "no such zone" in str(row.error_message)
    assert (schedule.is_active, schedule.next_slot, schedule.next_fire) == (False, None, None)


ONCE = {"schedule_type": "once", "schedule_config": {"datetime": "2026-01-01T00:01:00Z", "timezone": "UTC"}}
FIXED = {"schedule_type": "cron", "schedule_config": {"expression": "0-59 0-23 * * *", "timezone": "UTC"}}
AHEAD = {"settled_until": START + 240 * S, "next_slot": START + 300 * S}
#        what                 the schedule                                              resumed at, next slot, row at, active
RESUMED: dict[str, tuple[dict[str, Any], float, float | None, float | None, bool]] = {
    "interval, in between": ({}, 90, 120, None, True),
    "interval, on a slot": ({}, 120, 180, None, True),
    "interval, at once": ({}, 0, 60, None, True),
    "cron": ({"schedule_type": "cron", "schedule_config": {"expression": "* * * * *", "timezone": "UTC"}}, 150, 180, None, True),
    "once, still to come": (ONCE, 30, 60, None, True),
    "once, passed": (ONCE, 90, None, 60, False),
    "once, passed this instant": (ONCE, 60, None, 60, False),
    "end_at passed": ({"end_at": START + 100 * S}, 110, None, None, False),
    "start_at to come": ({"start_at": START + 600 * S}, 110, 600, None, True),
    "max_runs reached": ({"max_runs": 2, "run_count": 2}, 110, None, None, False),
    "clock was set back a little": (AHEAD, 110, 120, None, True),
    "clock was set back a little, fixed": ({**FIXED, **AHEAD}, 110, 300, None, True),
    "clock was set back by 3 h": ({**FIXED, "settled_until": START + 10_910 * S}, 110, 120, None, True),
}


@each("what", *RESUMED)
def test_resuming_goes_on_with_the_next_slot_after_now(what: str) -> None:
    changes, now, next_slot, row_at, active = RESUMED[what]
    schedule = a_schedule(**changes)
    row = chronotask.resume_schedule(schedule, START + round(now * S))
    found = None if schedule.next_slot is None else (schedule.next_slot - START) / S
    assert (found, schedule.is_active) == (next_slot, active)
    told = row and (row.status, row.scheduled_for, "paused" in str(row.error_message))
    assert told == (row_at and ("skipped", START + round(row_at * S), True))


# --- Ends of attempts -------------------------------------------------------------------------------------------------


def end_of(outcome: Outcome, now: int = START, spread: float = 0, seconds: float | None = None, **run: Any) -> Any:
    """The end of an attempt of a run with these fields; up to 3 are retried."""
    return chronotask.decide_end(dataclasses.replace(MANUAL_RUN, **run), outcome, now, spread, seconds)


def test_the_wait_before_a_retry_grows_and_is_capped() -> None:
    waits = [(1, 5, 2, 5), (2, 5, 2, 10), (3, 5, 2, 20), (4, 5, 1, 5), (3, 7, 1.5, 15.75), (1, 0, 2, 0)]
    for attempt, delay, backoff, seconds in (*waits, (20, 5, 2, 3600), (100, 86400, 10, 3600)):
        run = {"attempt": attempt, "max_retries": 100, "retry_delay": delay, "retry_backoff": backoff}
        for spread, times in ((0, 1), (1, 1.1), (-1, 0.9)):
            again = end_of(Outcome("failed", retryable=True), spread=spread, **run).next_attempt_at
            assert again == pytest.approx(START + seconds * times * S, abs=1), run


def test_an_end_that_is_not_retryable_is_final_and_another_is_retried_while_attempts_are_left() -> None:
    for status in ("succeeded", "failed", "timed_out", "cancelled", "interrupted"):
        ended = end_of(Outcome(status))
        assert (ended.status, ended.next_attempt_at) == (status, None)
    for status in ("failed", "timed_out", "interrupted"):
        outcome = Outcome(status, retryable=True)
        again = end_of(outcome, attempt=3)
        assert (again.status, again.attempt_status, again.next_attempt_at) == ("retrying", status, START + 20 * S)
        assert end_of(outcome, attempt=4).status == end_of(outcome, max_retries=0).status == status
    for asked, wait in ((17, 17), (99999, 3600)):  # what the server asks for replaces the wait, up to an hour
        outcome = Outcome("failed", retryable=True, retry_after=asked)
        assert end_of(outcome, spread=1).next_attempt_at == START + wait * S


def test_an_attempt_ends_when_the_steady_clock_says_so_and_never_before_its_start() -> None:
    outcome = Outcome("failed", retryable=True, retry_after=60)
    for wall, seconds, ends in ((5, 5, 5), (-600, 3, 3), (7200, 3, 3), (9, None, 9), (-600, None, 0)):
        ended = end_of(outcome, START + wall * S, seconds=seconds, started_at=START)
        assert (ended.finished_at, ended.next_attempt_at) == (START + ends * S, START + (wall + 60) * S)


# ======================================================================================================================
# 5. Clock and timers
# ======================================================================================================================


def test_timers_say_when_something_is_due_and_go_once_it_is() -> None:
    timers = chronotask.TimerQueue()
    timers.add([30, 10, 20, 10])
    found = [(timers.next_due(), timers.pop_due(now), len(timers)) for now in (9, 20, 20, 30)]
    assert (found, timers.next_due()) == ([(10, False, 4), (10, True, 1), (30, False, 1), (30, True, 0)], None)


def test_the_clock_reads_microseconds_since_the_epoch_and_monotonic_seconds() -> None:
    before, now, after = time.time_ns() // 1000, Clock().now(), time.time_ns() // 1000
    assert before <= now <= after and isinstance(now, int)
    assert time.monotonic() <= Clock().monotonic() <= time.monotonic()


def test_a_step_of_the_wall_clock_is_told_once_and_time_that_just_passes_is_none() -> None:
    clock = FakeClock()
    for passes, step in ((0, 0), (86_400, 0), (0, 3600), (0, 0), (0, -90_000), (0, 30)):
        clock.advance(passes)
        clock.wall += step * S  # a suspend, in which CLOCK_MONOTONIC stands still, looks the same
        assert clock.step() == step * S


async def test_waiting_ends_when_the_event_is_set_or_the_time_has_come_and_looks_at_the_wall_clock_now_and_then() -> None:
    """asyncio sleeps on the monotonic clock: a wait of an hour that trusted it would sleep through a step forward."""
    clock, event = Clock(), asyncio.Event()
    begun = time.monotonic()
    await clock.wait(event, clock.now() - 5 * S)
    asyncio.get_running_loop().call_soon(event.set)
    await clock.wait(event, None)
    await clock.wait(event, clock.now() + 3600 * S)
    assert time.monotonic() - begun < 0.2
    await clock.wait(asyncio.Event(), clock.now() + 3600 * S)
    assert time.monotonic() - begun < 1.2
    with pytest.raises(TimeoutError):  # who cancels it is told
        async with asyncio.timeout(0.01):
            await clock.wait(asyncio.Event(), None)


# ======================================================================================================================
# 6. Store
# ======================================================================================================================


# --- Opening ----------------------------------------------------------------------------------------------------------


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_database_has_the_newest_schema_can_give_space_back_and_stays_as_it_is_when_opened_again(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    pragmas = "user_version application_id auto_vacuum journal_mode synchronous foreign_keys".split()
    for path in (tmp_path / "made" / "for you" / "c.db", tmp_path / "empty.db"):
        with contextlib.closing(open_database(path)) as db:
            values = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]
            assert values == [7, chronotask.APPLICATION_ID, 2, "wal", 2, 1]
            set_meta(db, "x", 5)
        with contextlib.closing(open_database(path)) as db:
            assert chronotask.get_meta(db, "x") == 5


def test_a_failing_migration_leaves_the_database_as_it_was_and_those_before_it_are_kept(tmp_path: Path) -> None:
    first = ("CREATE TABLE a (x)", "INSERT INTO a VALUES (1)")
    second = ("ALTER TABLE a ADD COLUMN y DEFAULT 7", "CREATE TABLE b (z)")
    failing = ("CREATE TABLE c (z)", "UPDATE a SET x = 99", "INSERT INTO nowhere VALUES (1)")
    db, found = sqlite3.connect(tmp_path / "c.db", isolation_level=None), []
    chronotask.migrate(db, {1: first})
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            chronotask.migrate(db, {1: first, 2: second, 3: failing})
        questions = ("PRAGMA user_version", "SELECT sql FROM sqlite_master ORDER BY 1", "SELECT * FROM a")
        found.append([db.execute(question).fetchall() for question in questions])
        found[-1].append([(db.in_transaction, (tmp_path / "c.db").read_bytes())])
    db.close()
    assert found[0] == found[1] and found[0][0] == [(2,)]
    assert found[0][3] == [(False, (tmp_path / "c.db").read_bytes())]


@each("version", *list(chronotask.MIGRATIONS)[:-1])
def test_a_database_of_every_version_gets_the_newest_schema_and_keeps_its_rows(tmp_path: Path, version: int) -> None:
    db = chronotask.connect(tmp_path / "old.db")
    chronotask.migrate(db, {step: of for step, of in chronotask.MIGRATIONS.items() if step <= version})
    task = "INSERT INTO tasks (name, task_type, status, config, max_retries, retry_delay, retry_backoff, created_at, updated_at)"
    db.execute(task + """ VALUES ('t', 'bash', 'active', '{"command": "true"}', 0, 5, 2, 0, 0)""")
    execution = "INSERT INTO executions (task_id, trigger, status, queued_at, uuid) VALUES (1, 'manual', 'queued', 0, 'u')"
    db.executemany(execution, [()] * 3)
    db.executemany("UPDATE executions SET status = ?, finished_at = 5 WHERE id = ?", [("failed", 1), ("succeeded", 2)])
    columns = ", ".join(row[1] for row in db.execute("PRAGMA table_info(executions)"))
    rows = db.execute(f"SELECT {columns} FROM executions").fetchall()
    db.close()
    schema = "SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2"
    with (
        contextlib.closing(open_database(tmp_path / "new.db")) as newest,
        contextlib.closing(open_database(tmp_path / "old.db")) as migrated,
    ):
        for _ in range(2):
            assert migrated.execute(schema).fetchall() == newest.execute(schema).fetchall()
            chronotask.migrate(migrated, chronotask.MIGRATIONS)  # a second time it changes nothing
        assert migrated.execute(f"SELECT {columns} FROM executions").fetchall() == rows
        assert migrated.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert chronotask.counts(migrated)[1] == {"queued": 1, "running": 0, "retrying": 0}
        failures = chronotask.list_executions(migrated, chronotask.HistoryQuery(success=False), 1)[1]
        assert [row.id for row in failures] == [1]


# A database that release 1.0 has written, as SQL: zlib, base85. Three tasks, six schedules (three of which are off), seven
# executions and an attempt, up to 00:05:30 on 2026-01-01.
RELEASE_1_0 = (
    "c-qZcTXUnv5`NFGn9>XO31qnrAeT>-Y~zjU*is_P+2mYGHNapIBT%^blCAykrw0&12!!m~tz@-jNj)<?-92C523=Sm#}hQ4jV5=a%lUXZIs5K%W{u_+nvX7SEJV_"
    "juGVRSPUs7Dveb{lh3}&AWNv-5W@s{<qsjfv4Vqck*36n*T6d_L2#b986ip}S%DS<D<>lz^a&%?!8?Jk7c$B0h%@Q=Xex2`9<CMA!(ze9&LqAz|jnX)d;>C(433;"
    "G7UmitSy3W#tOHxu&ewvMMN3-A1zpUSOHLYYlJw5wwJh`)GbGFG84K|h;pkGEe_txEs%1b=w5kH_V$4ffaWm&^mEdK2iIQrtJ8+{dy=ROY@W#L3F9SjwIkoXTF2?"
    "oP33j+9-x*+yoI2h!gL9OaD&=>Y=N|V7*+zi$TX`F=)0rL%p9tjfqg*$B=^6rUMMywlUbU&YtC$Q?)nt;7hl05d|fXyi&00-#60c8QLtpO&n|L{QLmcwp?K*_;fc"
    "u~CN;rTJG9XyZz$Y|Dug?$*cqNf|50Oae@{mmSSJPPScx+o{MEnc+kwu}PzAXkTk4h<GD1w9g2eQ<L09G2$eQI>&e8#X%z`%PGHu}}e9;@OMaoB%*I$sC7L_c)-x"
    "hrs6w?9tgPAK^4daWIjwU|>fQR4fs}uqhTqQKy<Gsw(kBuAIB$SYoGR5oG^2Jm_8OvEJ2ZQ5iH;b}jnouh*^iY_~+0eR6vKXKO1{!>+FDk|4VZ*h*4~Ks-|v3`Md"
    "P**0WFQnw-uQM#mP9n&X20ynIrM}7hh<Ocx)jYB_tKqt`?jRUeiXDd$&YagM!0?MmA2S#(2*}5G~S`!-DH${`GJBETaM<B3|pz4Yv7@mj)2RlU6s3&QT^Y=xQ%FC"
    "r}D-vcT0F%ZvjbGu6xEdh(4OL7l=~$Lv$TT$dkmW>K!G`VGf=qN%Pz{X=hHGO%(`1bhSyx?*xxYBq_1RC`i*GAGNosJ^<u<o7mBZ9_XSA^n4o4+HGBt2USyTiY8?"
    "In_hN}=_!d`ME!4N4Z2_h)Jyf|7R7=j2V!T-4^4n=t=ir=#jB1)s?pt>DAxu0L2o}tp=&I7Pdk}@w&P!tBQxxa_>8Hh*wFfL4X$cIg_fwO&r@&-bukvE2Qs7*wVD"
    "1u^0x}YkCArM(40`;iv*t$unO8>q-tZy{j`f$ypdrtgyO-CdXY(ydGQAZV25pshqLY7dmjv*LI#5K*o&U8DaYT!T7MNz}_v?Q$Diz!((i=t-|vZ^c#A(yo*N~4st"
    "(PQe+Fhv(P(~BDQK;Ka8e%e%EMWOIId8Ds}Tr~zfdLltaPtm9G{Kx729L=Vm##asKu;mqKI6I2KXE|(2t^|<-qArv`s);?pa7;<?9BjLWtQj_z_CUDHX-%>`;)#c"
    "+K~(?_E*+kf7ycZt9G>-O6w;xU#nGC6xPUss4?z<Ryj0gbT>@8jB%;V3p|+tyaC8*Y!Bi&%V;8%sL>*m~ZBw@uqN@tF6<gHBJ}vV-AsWI?hHYpD0Nj*_EjtF$RIE"
    "S|Ks1{wj;JaW!oKM0s%of;3i~OhVPccIs!kP(J$VnAoAmMRd#LnvO}pA7aLmy2ADY8{vLH?hzSDy2vWjaiDPwyFdGYLrZuAVqTWdDHtWEgchyEvS8OZygoo<MRyW"
    "P=>ye#sxR8bu8q0YuXTf5zZ2~E@BfS>2>8_TWR&2kcJD7U15Bq<YVOMx$7W8iwQGXp<4Fx~`d1)ZIii}N8+#ZP%I_&i7`oU99B60<nzuPDPZ#8p7^;0u@6FHnWU)"
    "FQoeyn)q55wcSSHj^>#PuIAYP~{exSNoNe^AaMC!m=QQo+C*he1cXY($GKHYp|p2PPjOvw(@?x8w6Dp_XsjpM7b*bL>~9+%9<W7g5EyYmEo4D1u8YlHVF#0e-GMD"
    "Sp4cI+$j9()vDgFk=hMWP3%yB1VQwCPy^`=;%ocjxAcBSzbaa{DyDe&EQ+_co&@gI&FmzUC$yi0_w~Z;lHpAb_RXS6)2oyNgpGz`GsRZf@R;-(lGR?8bZO$m{yM+"
    "TD6YfuB;1-%TW=xTvumEWpyT#w(pot}FTQYTKwew2VliqH=P~lUmhtyz!1v~^yzfYoBWAM8?kuK9%v}0O8iAhuGr>-@@80um*)>N^EwggbBLMq3id`sDIh!O)cq^"
    ")-+)tcn1w9zFAOq?wBk&IrKR_h-59?_L|I58!g9LYcBCWEb3NOeO4BLl=l$l(czVEPz>|#Y>J}dJ$PrUC4|5DxyvcK|SxgebQZcw$+%QR&%V$(Z-U|9^U;DFJS;f"
    "D|Og{;;A{UM4UK7bvUlt8}+ru;k@W$7}C{Xa=sgrf^eVkjD424CJ_-|A+icq!X(F`ismzZT(Q!N4+|Y+?s|YoGQA^=xfk3Byess0E7V@+#~u*c8U1)(Mm~eyz6bU"
    "S0}XTiqh;b~@wOn7`cwefkkvh;7+lak-z2f4<)^+ulPIl`wFtKMJZnv}rtl+3;^Xl)0<Cu_1MBqm7a38<kc%?Op{z(0y$#b0Pw2JM?5njM^ih(@M@Fn4crA7~{}r"
    "a#cKxIY(mmwo4kgUBdRW{^udqD-r|Fj^aI@pp)$b0<^iEtYyd9_#=yj1(J#DLi`+E&w*0<a)s-Q{BiI7PgiVNeid<N&5L^nP$8txKQI&)yR$nAP>Z$vXPrxm_wSL"
    "kyQsJVI78Otszb_6oG;`o*-x*l_<y9x#k=tK{hcKVA6oX`2^a4+SKGc@*KI$cts{S<ZF^MyM*G(=->!Gf0d_Vnj)3jFTRogNzHh<jyQO%gAN2|p(^d3TiB$ed;VX"
    "zF?1}`zpk1WBsE~!5=g~c(Vdt^+T~Ev{ew5I|@njpx${#VH>8uvsSeM|ktJelS@0;RmofaXfG~)GadJ8SdAAz6JMZ%tDL+?9ib}WtI-W$Zu1r>I=mS((b(bgDT-t"
    "b;dZ*Rx*v;PCD2{wZ"
)


def a_database_of_release_1_0(path: Path) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript(zlib.decompress(base64.b85decode(RELEASE_1_0)).decode())
    db.execute(f"PRAGMA application_id={chronotask.APPLICATION_ID}")
    db.execute("PRAGMA user_version=2")
    db.close()


def test_a_database_of_release_1_0_keeps_its_rows_and_what_was_dealt_with(tmp_path: Path) -> None:
    a_database_of_release_1_0(tmp_path / "c.db")
    before = {table: sql(tmp_path / "c.db", f"SELECT * FROM {table} ORDER BY 1") for table in ("executions", "attempts", "tasks")}
    db = open_database(tmp_path / "c.db")
    for table, rows in before.items():
        assert [row[: len(rows[0])] for row in db.execute(f"SELECT * FROM {table} ORDER BY 1")] == rows
    found = db.execute(
        """SELECT id, is_active, over, settled_until = dealt_with AND settled_until = in_force_since,
            (settled_until - :start) / :s,
            CASE WHEN ran = '[]' THEN 'none' ELSE (json_extract(ran, '$[0][1]') - json_extract(ran, '$[0][0]')) / :s END
        FROM schedules""",
        {"start": START, "s": S},
    ).fetchall()
    assert found == [
        (1, 1, 0, 1, 300, 300),
        (2, 1, 0, 1, 0, "none"),
        (3, 0, 1, 1, 60, 60),
        (4, 0, 1, 1, 50, 50),
        (5, 0, 0, 1, 0, "none"),
        (6, 1, 0, 1, 0, "none"),
    ]
    db.close()


async def test_a_database_of_release_1_0_goes_on_where_it_was(quick_disk: Path, open_rig: OpenRig) -> None:
    a_database_of_release_1_0(quick_disk / "old.db")
    rig = await open_rig(clock=FakeClock(START + 340 * S), database_url=quick_disk / "old.db")
    views = [await rig.service.get_schedule(schedule_id) for schedule_id in range(1, 7)]
    assert [offset(view["next_run"]) for view in views] == [360, 14_426.302, None, None, None, None]
    tasks = [await rig.service.get_task(task_id) for task_id in (1, 2, 3)]
    counted = [(task["run_count"], task["last_status"], task["failures_in_a_row"]) for task in tasks]
    assert counted == [(4, "succeeded", 0), (1, None, 0), (0, None, 0)]  # the second waits for its retry
    assert [task["status_reason"] for task in tasks] == [None, None, "paused before the upgrade to 1.1"]
    assert (await rig.service.get_execution(4))["attempts"][0]["error_message"] == "exit status 3"
    assert (await rig.patch_schedule(3, schedule_config={"datetime": "2026-01-01T00:30:00Z"}))["is_active"] is True
    assert (await rig.patch_schedule(5, schedule_config={"seconds": 91}))["is_active"] is False
    await rig.run_at(360)
    assert (await rig.brief(schedule_id=1))[-1] == ("schedule", "succeeded", 360)


def test_no_query_of_unfinished_or_failed_executions_reads_the_whole_table(store: Store) -> None:
    """Partial indexes serve only a condition that is written to the letter like theirs."""
    db, queries = store._db, list[str]()
    task = chronotask.insert(db, some_task("t"))
    db.set_trace_callback(queries.append)
    chronotask.unfinished_of(db, [task.id])
    chronotask.changed_timers(db, 0)
    chronotask.queue_retries(db, START)
    chronotask.shift_retries(db, 1, 2)
    chronotask.running_of_others(db, "me")
    chronotask.finished_among(db, [1])
    chronotask.counts(db)
    chronotask.unfinished_statuses(db)
    for status in ("queued", "running", "retrying"):
        chronotask.list_executions(db, chronotask.HistoryQuery(status=status), task.id)
        chronotask.list_executions(db, chronotask.ExecutionQuery(status=status))
    for status in (None, "failed", "timed_out", "interrupted"):
        chronotask.list_executions(db, chronotask.HistoryQuery(success=False, status=status), task.id)
    chronotask.start_ready(db, 10, START, "me")
    for conditions in ({"id = ?": 1}, {chronotask.UNFINISHED_SQL: True, "task_id = ?": task.id}):
        chronotask.cancel_executions(db, conditions, START, "because")
    chronotask.release_held(db, [task.id])
    db.set_trace_callback(None)
    plans = {query: [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}")] for query in queries if "executions" in query}
    assert len(plans) >= 20
    whole = re.compile(r"SCAN (executions|e|held|a)( USING INTEGER PRIMARY KEY.*)?$")
    assert {query: plan for query, plan in plans.items() if any(whole.match(step) for step in plan)} == {}


def refusal_of(path: Path) -> str:
    """The one line that opening `path` ends with; nothing that was there has changed."""
    before = bytes_of(path.parent)
    error = refused(open_database, path)
    after = bytes_of(path.parent)
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys() if name.endswith("-wal"))
    assert (error.exit_status, "\n" in error.detail) == (1, False)
    return str(error.detail)


ANOTHER = "{path} is a database of another program: set CHRONOTASK_DATABASE_URL to another file"
LEFT = "…it was left as it was; restore a backup, or set CHRONOTASK_DATABASE_URL to another file"
WAL = "{path} is missing or empty, but {path}-wal holds data: bring the database back, or move that away"
OTHER = "made by a newer ChronoTask, or on the way to 1.1; this one knows 1, 2, 7: upgrade ChronoTask, or restore an older backup"


@each(
    # What is in the place of a database (None: nothing), and beside it; what is done to it; what opening it ends with.
    "content wal statements said",
    *((new_database(), b"", [f"PRAGMA user_version={n}"], f"{{path}} has schema version {n}, {OTHER}") for n in (3, 6, 99)),
    (b"", b"", ["CREATE TABLE theirs (x)"], ANOTHER),
    (b"", b"", ["PRAGMA user_version=3"], ANOTHER),
    (b"", b"", ["CREATE TABLE tasks (x)", "PRAGMA application_id=77"], ANOTHER),
    *((content, b"", [], LEFT) for content in (b"A letter to my aunt.\n" * 200, b"x", b"\0" * 8192)),
    (b"SQLite format 3\0" + b"\xff" * 8000, b"", [], LEFT),
    (new_database()[: len(new_database()) // 2], b"", [], LEFT),
    *((content, b"precious", [], WAL) for content in (None, b"")),
    (None, b"", [], ""),
)
def test_what_is_no_database_of_ours_is_refused_and_left_as_it_is(
    tmp_path: Path, content: bytes | None, wal: bytes, statements: list[str], said: str
) -> None:
    path = tmp_path / "c.db"
    if content is not None:
        path.write_bytes(content)
    for statement in statements:
        sql(path, statement)
    if not statements and not content:
        (tmp_path / "c.db-wal").write_bytes(wal)
    if not said:  # an empty -wal does no harm
        open_database(path).close()
    elif said.startswith("…"):
        assert said[1:] in refusal_of(path)
    else:
        assert refusal_of(path) == said.format(path=path)


def test_a_database_with_a_bad_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    with contextlib.closing(open_database(path)) as db:
        db.executemany("INSERT INTO meta VALUES (?, zeroblob(200))", [(f"key {number}",) for number in range(500)])
    with path.open("r+b") as file:
        file.seek(-3 * 4096, os.SEEK_END)
        file.write(b"\xa5" * 8192)
    assert re.search("(damaged|malformed).*it was left as it was; restore a backup", refusal_of(path))


def test_a_change_that_a_crash_has_cut_short_is_undone_at_the_start(tmp_path: Path) -> None:
    """As at the first start of a new database or a restored backup: until that is in WAL mode it has a journal."""
    open_database(tmp_path / "c.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "c.db", isolation_level=None)) as db:
        db.executescript("PRAGMA journal_mode=DELETE; PRAGMA cache_size=1; BEGIN")
        db.executemany("INSERT INTO meta VALUES (?, zeroblob(9000))", [(f"k{n}",) for n in range(99)])
        shutil.copytree(tmp_path, tmp_path / "crashed")
    with contextlib.closing(open_database(tmp_path / "crashed" / "c.db")) as db:
        assert [chronotask.get_meta(db, key) for key in ("rev", "k0")] == [0, None]


def test_a_folder_that_cannot_be_made_or_written_is_told_with_the_setting(tmp_path: Path) -> None:
    for place in ("/proc/nowhere/c.db", "/dev/null/c.db", "/dev/full", TOP):
        with pytest.raises(chronotask.StartupError, match=r"(cannot be used|is a folder or a device).*CHRONOTASK_DATABASE_URL"):
            open_database(Path(place))
    if os.getuid() != 0:  # root may write everywhere
        tmp_path.chmod(0o500)
        assert "must be writable" in refused(open_database, tmp_path / "c.db").detail


@needs_root
def test_a_file_or_folder_of_another_owner_is_refused(tmp_path: Path) -> None:
    for name in ("", "c.db", "c.db-wal", "c.db-shm", "c.db-journal", "c.db.leader", "c.db.service"):
        open_database(tmp_path / "c.db").close()
        place = tmp_path / name
        place.touch()
        os.chown(place, 4711, 4711)
        assert refusal_of(tmp_path / "c.db") == (
            f"{place} belongs to another user (uid 4711): chown 0 '{place}', "
            "or run ChronoTask as its owner (in a container: --user), or choose another place"
        )
        os.chown(place, 0, 0)


@needs_root
def test_a_link_that_somebody_else_made_is_refused_and_one_of_our_own_leads_to_a_database_that_is_checked(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "links" / "c.db"
    open_database(real / "c.db").close()
    link.parent.mkdir()
    link.symlink_to(real / "c.db")
    open_database(link).close()
    os.chown(link, 4711, 4711, follow_symlinks=False)
    assert f"{link} belongs to another user (uid 4711)" in refusal_of(link)
    os.chown(link, 0, 0, follow_symlinks=False)
    os.chown(real, 4711, 4711)
    assert f"{real} belongs to another user (uid 4711)" in refusal_of(link)


def test_a_link_in_the_place_of_a_file_beside_the_database_is_refused(tmp_path: Path) -> None:
    for suffix in ("-wal", "-shm", "-journal", ".leader", ".service"):
        link = tmp_path / f"c.db{suffix}"
        link.symlink_to(tmp_path / "elsewhere")
        said = f"{link} is a symbolic link: no file of a database is one; remove it"
        assert refused(open_database, tmp_path / "c.db").detail == said
        link.unlink()
    assert not (tmp_path / "elsewhere").exists()


def test_own_files_that_are_too_open_are_tightened_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, mode, then in (
        *(("c.db", 0o666, 0o600), ("c.db", 0o644, 0o600), ("c.db-wal", 0o660, 0o600), ("c.db.leader", 0o604, 0o600)),
        *(("", 0o777, 0o755), ("", 0o2775, 0o2755), ("", 0o755, 0o755)),
        ("", 0o1777, 0o1777),  # as /tmp is: nobody can replace what belongs to another
    ):
        caplog.clear()
        (folder / name).touch()
        (folder / name).chmod(mode)
        chronotask.check_owners(folder / "c.db")
        assert stat.S_IMODE((folder / name).stat().st_mode) == then
        changed = f"{folder / name} was open to others (mode {mode:04o}): it is {then:04o} now"
        assert [record.message for record in caplog.records] == ([changed] if mode != then else [])


@needs_root
def test_a_folder_that_others_use_as_well_is_refused_and_not_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "theirs").touch()
    os.chown(folder / "theirs", 4711, 4711)
    folder.chmod(0o777)
    assert f"{folder} may be written by others (mode 0777): chmod go-w '{folder}', or run" in refusal_of(folder / "c.db")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777
    open_database(folder / "own" / "c.db").close()


@needs_root
@each("gid mode trusted", (0, 0o775, True), (4711, 0o2775, True), (4711, 0o777, False), (1, 0o775, False))
def test_roots_folder_may_be_written_by_a_group_of_nobody_else(quick_disk: Path, gid: int, mode: int, trusted: bool) -> None:
    """4711 is nobody's group, as the fsGroup of a pod; `daemon` has a user of its own."""
    os.chown(quick_disk, 0, gid)
    quick_disk.chmod(mode)
    os.seteuid(65534)
    try:
        with contextlib.nullcontext() if trusted else pytest.raises(chronotask.StartupError, match="may be written by others"):
            chronotask.check_owners(quick_disk / "c.db")
    finally:
        os.seteuid(0)


@needs_root
def test_a_folder_that_may_not_be_entered_is_refused_with_the_remedy(quick_disk: Path) -> None:
    (quick_disk / "closed").mkdir(mode=0o700)
    quick_disk.chmod(0o755)
    os.seteuid(65534)
    try:
        assert refused(open_database, quick_disk / "closed" / "c.db").detail.endswith(
            "closed cannot be looked at (Permission denied): run ChronoTask as its owner (in a container: --user), "
            "or choose another place"
        )
    finally:
        os.seteuid(0)


def test_a_database_that_another_program_holds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_database(tmp_path / "c.db").close()
    monkeypatch.setattr(chronotask, "BUSY_TIMEOUT", 0.01)
    with contextlib.closing(sqlite3.connect(tmp_path / "c.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(chronotask.StartupError, match=r"locked; .* no other program may hold a lock on the database"):
            open_database(tmp_path / "c.db")


def test_a_database_is_not_upgraded_under_a_process_that_leads(tmp_path: Path) -> None:
    """It would go on leading with SQL that no longer fits, and fire nothing."""
    a_database_of_release_1_0(path := tmp_path / "c.db")
    older = chronotask.FileLock(tmp_path / "c.db.leader")
    assert older.acquire()
    assert "another ChronoTask leads on it: stop that one first" in refused(open_database, path).detail
    assert sql(path, "PRAGMA user_version") == [(2,)]
    older.release()
    open_database(path).close()
    assert older.acquire()
    open_database(path).close()  # of this version: one more process beside it
    older.release()


# --- Writing and reading ----------------------------------------------------------------------------------------------


@pytest.fixture
async def store(quick_disk: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    monkeypatch.setattr(chronotask, "SCANNERS", 1)
    put_new_database(quick_disk / "c.db")
    opened = Store(quick_disk / "c.db", FakeClock().monotonic)
    yield opened
    opened.close()


@contextlib.asynccontextmanager
async def held_up(store: Store, change: Callable[[sqlite3.Connection], Any] = lambda db: None) -> AsyncIterator[None]:
    """The writer has made this change and does not come back before the end of the `with` block."""
    begun, go = threading.Event(), threading.Event()

    def keep_busy(db: sqlite3.Connection) -> None:
        change(db)
        begun.set()
        go.wait(5)

    job = asyncio.ensure_future(store.write(keep_busy))
    await asyncio.to_thread(begun.wait, 5)
    yield
    go.set()
    await job


async def in_one_batch(store: Store, *calls: Callable[[sqlite3.Connection], Any]) -> list[Any]:
    """What the calls give, or raise, as one batch: they gather while the writer is kept busy."""
    async with held_up(store):
        jobs = [asyncio.ensure_future(store.write(call)) for call in calls]
        await asyncio.sleep(0)
    return await asyncio.gather(*jobs, return_exceptions=True)


def put(key: str, value: Any = 1) -> Callable[[sqlite3.Connection], str]:
    return lambda db: set_meta(db, key, value) or key  # type: ignore[func-returns-value]


async def keys_of(store: Store) -> list[str]:
    rows = await store.read(lambda db: db.execute("SELECT key FROM meta WHERE key LIKE 'k%' ORDER BY 1").fetchall())
    return [row[0] for row in rows]


async def test_what_was_written_is_on_disk_when_the_write_returns_and_reads_do_not_wait_for_it(store: Store) -> None:
    async with held_up(store, put("k1", 42)):
        assert await keys_of(store) == []
    assert await store.read(lambda db: chronotask.get_meta(db, "k1")) == 42
    assert await store.write(put("k2", 43)) == "k2"
    assert sql(store.path, "SELECT value FROM meta WHERE key = 'k2'") == [(43,)]


@each("ask", "read", "scan")
async def test_a_read_that_fails_as_one_that_would_write_does_no_harm_to_others(store: Store, ask: Any) -> None:
    await store.write(put("k1"))
    calls = [lambda db: db.execute("SELECT x FROM nowhere"), put("k2"), lambda db: chronotask.get_meta(db, "k1")]
    results = await asyncio.gather(*(getattr(store, ask)(call) for call in calls * 4), return_exceptions=True)
    assert [result for result in results if not isinstance(result, Unavailable)] == [1] * 4
    assert "no such table" in str(results[0]) and "readonly" in str(results[1])


@each("ask", "read", "scan", "write")
async def test_a_failure_leaves_no_old_snapshot_and_no_thread_dead(store: Store, ask: Any) -> None:
    def fails(db: sqlite3.Connection) -> None:
        raise Conflict(f"{(rows := db.execute('SELECT key FROM meta'))}, {rows}")

    with pytest.raises(Conflict):
        await getattr(store, ask)(fails)
    sql(store.path, "INSERT INTO meta VALUES ('k1', 2)")
    assert await getattr(store, ask)(lambda db: chronotask.get_meta(db, "k1")) == 2
    for call in (lambda db: db.close(), put("k1")):
        async with asyncio.timeout(5):
            with pytest.raises(Unavailable, match="closed"):
                await getattr(store, ask)(call)


async def test_writes_that_wait_share_one_transaction_and_one_that_raises_before_a_change_costs_it_nothing(store: Store) -> None:
    def refuses(db: sqlite3.Connection) -> None:
        raise Conflict("no")

    statements: list[str] = []
    await store.write(lambda db: db.set_trace_callback(statements.append))
    statements.clear()
    results = await in_one_batch(store, *(put(f"k{n}") for n in range(9)), refuses, put("k9"))
    assert [str(result) for result in results] == [*(f"k{n}" for n in range(9)), "no", "k9"]
    assert [*map(statements.count, ("BEGIN IMMEDIATE", "COMMIT"))] == [2, 2]  # what kept the writer busy, then all of them


async def test_a_write_that_fails_also_for_a_damaged_table_is_undone_alone_and_told_to_its_caller(store: Store) -> None:
    def changes_its_mind(db: sqlite3.Connection) -> None:
        set_meta(db, "kbad", 1)
        raise Conflict("no")

    await store.write(lambda db: db.execute("CREATE TABLE extra (x)"))
    sql(store.path, "DROP TABLE extra")  # damaged while it is open
    bad: tuple[tuple[Any, type[Exception], str], ...] = (
        (lambda db: set_meta(db, "kbad", 1) or db.execute("INSERT INTO meta VALUES ('kbad', 2)"), Unavailable, "UNIQUE"),
        (changes_its_mind, Conflict, "no"),
        (lambda db: db.execute("INSERT INTO extra VALUES (1)"), Unavailable, "no such table"),
        (lambda db: [][1], IndexError, ""),
    )
    for number, (call, error, words) in enumerate(bad):
        results = await in_one_batch(store, put(f"k{number}a"), call, put(f"k{number}b"))
        assert [type(result) for result in results] == [str, error, str] and words in str(results[1])
    assert await keys_of(store) == [f"k{number}{letter}" for number in range(4) for letter in "ab"]
    assert store.problem() is None


async def test_a_caller_that_has_gone_does_no_harm_to_the_others(store: Store) -> None:
    jobs = [asyncio.ensure_future(store.write(put(f"k{n}"))) for n in range(3)]
    await asyncio.sleep(0)
    jobs[1].cancel()
    await asyncio.wait(jobs)
    assert [jobs[0].result(), jobs[2].result()] == ["k0", "k2"]


async def test_commits_of_other_processes_are_noticed_and_own_ones_are_not(store: Store) -> None:
    await store.foreign_changes()
    await store.write(put("k1"))
    assert await store.foreign_changes() is False
    sql(store.path, "INSERT INTO meta VALUES ('k2', 2)")
    assert [await store.foreign_changes() for _ in range(2)] == [True, False]


async def test_only_a_leader_checkpoints_and_makes_a_log_that_grew_large_small_again(store: Store) -> None:
    for leading, pages in ((None, 0), (True, 1000), (False, 0), (True, 1000)):
        if leading is not None:
            await store.set_leading(leading)
        assert await store.write(lambda db: db.execute("PRAGMA wal_autocheckpoint").fetchone()) == (pages,)
    sizes: list[int] = []
    for value in ("x" * 20_000_000, 1, 1):  # the last is the first write after a checkpoint
        await store.write(put("k1", value))
        sizes.append(Path(f"{store.path}-wal").stat().st_size)
    assert sizes[0] > 20_000_000 and sizes[2] <= 8 * 2**20


async def test_a_database_file_that_is_no_longer_the_one_that_was_opened_is_told(store: Store) -> None:
    aside = store.path.with_name("aside.db")
    for then in ("gone", "replaced"):
        await store.foreign_changes()
        assert store.problem() is None, then
        store.path.rename(aside)
        if then == "replaced":
            shutil.copy(aside, store.path)
        await store.foreign_changes()
        assert store.problem() == "the database file is no longer the one that was opened", then
        aside.rename(store.path)


ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


async def test_no_read_waits_for_scans_each_is_ended_and_one_that_is_given_up_harms_no_other(tmp_path: Path) -> None:
    clock = FakeClock()
    store = Store(tmp_path / "c.db", clock.monotonic)
    asked = [ENDLESS] * 8 + ["SELECT 7"] + [ENDLESS] * 13
    scans = [asyncio.ensure_future(store.scan(lambda db, query=query: db.execute(query).fetchone())) for query in asked]
    async with asyncio.timeout(10):
        assert await store.write(put("k1", 7)) == "k1"
        assert await store.read(lambda db: chronotask.get_meta(db, "k1")) == 7
        assert not any(scan.done() for scan in scans)
        assert scans.pop().cancel() and scans.pop(0).cancel()
        assert await scans.pop(7) == (7,)  # in the thread of the one that was given up
        clock.steady += chronotask.SCAN_TIMEOUT + 0.1  # also of those that wait for a free thread
        results = await asyncio.gather(*scans, return_exceptions=True)
    ended = "this looks at too many rows: it was ended after 3 s; ask for less (fewer pages back, other filters)"
    assert [(type(result), str(result)) for result in results] == [(Unavailable, ended)] * 19
    assert await asyncio.gather(*(store.scan(lambda db: chronotask.get_meta(db, "k1")) for _ in range(30))) == [7] * 30
    store.close()


async def test_a_long_question_holds_up_nobody_and_is_ended(open_rig: OpenRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronotask, "POLL", 60)  # else the engine looks at the endless view, too
    rig = await open_rig()
    task, service = await rig.task(), rig.service
    rig.sql("ALTER TABLE executions RENAME TO few")
    rig.sql(f"CREATE VIEW executions AS SELECT few.* FROM few JOIN ({ENDLESS})")
    rig.sql("INSERT INTO few (task_id, trigger, status, queued_at, uuid) VALUES (?, 'manual', 'queued', 0, 'u')", task)
    for name, ask in {
        "executions": lambda: service.list_executions(chronotask.ExecutionQuery()),
        "history": lambda: service.get_task_history(1, chronotask.HistoryQuery(success=False)),
        "overview": lambda: chronotask.overview(service, chronotask.TaskQuery()),
        "metrics": service.measured,
        "status": lambda: chronotask.get_scheduler_status(service),
    }.items():
        asked = [asyncio.ensure_future(ask()) for _ in range(3)]
        async with asyncio.timeout(10):
            assert (await service.get_task(task))["id"] == task, name
            while not all(job.done() for job in asked):
                rig.clock.steady += 4
                await asyncio.sleep(0.01)
        assert [getattr(job.exception(), "status", job) for job in asked] == [503] * 3, name


async def test_a_write_that_does_not_come_back_is_told(tmp_path: Path) -> None:
    clock = FakeClock()
    store = Store(tmp_path / "c.db", clock.monotonic)
    async with held_up(store):
        assert store.problem() is None
        clock.steady += 12
        assert store.problem() == "a write to the database has not come back for 12 s"
    assert store.problem() is None
    store.close()


# --- Faults of the disk -----------------------------------------------------------------------------------------------


async def test_a_full_database_fails_writes_but_neither_reads_nor_small_ones_of_a_batch_and_loses_nothing(store: Store) -> None:
    more = "INSERT INTO meta VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET value = value + 1"
    await store.write(put("k1"))
    pages = await store.write(lambda db: int(db.execute("PRAGMA page_count").fetchone()[0]))
    await store.write(lambda db: db.execute(f"PRAGMA max_page_count={pages + 1}").fetchone())
    with pytest.raises(Unavailable, match="full"):
        await store.write(put("kbig", "x" * 100_000))
    assert "full" in str(store.problem())
    assert await keys_of(store) == ["k1"]
    small = (lambda db: db.execute(more, ("k1",)).rowcount, lambda db: db.execute(more, ("k2",)).rowcount)
    results = await in_one_batch(store, small[0], put("kbig", "x" * 100_000), small[1])
    assert [type(result) for result in results] == [int, Unavailable, int]
    rows = await store.read(lambda db: db.execute("SELECT key, value FROM meta WHERE key LIKE 'k%' ORDER BY 1").fetchall())
    assert rows == [("k1", 2), ("k2", 1)]  # each ran exactly once, though the batch was rolled back in its middle
    await store.write(lambda db: db.execute(f"PRAGMA max_page_count={pages + 1000}").fetchone())
    assert await store.foreign_changes() in (True, False)  # tries a real write after a failure
    assert store.problem() is None
    await store.write(put("kbig", "x" * 100_000))
    assert await keys_of(store) == ["k1", "k2", "kbig"]


async def test_a_log_that_finds_no_more_room_begins_anew_while_this_process_leads(store: Store) -> None:
    for _ in range(9):
        await store.write(put("k1", "x" * 100_000))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{store.path}-wal").stat().st_size, resource.RLIM_INFINITY))
        for leading in (False, True):
            with pytest.raises(Unavailable, match="disk I/O error"):
                await store.write(put("k2", "x" * 100_000))
            await store.set_leading(leading)
        await store.write(put("k2", "x" * 90_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


async def test_closing_finishes_what_waits_and_leaves_one_file_that_holds_everything(store: Store) -> None:
    await store.set_leading(True)
    await store.write(put("k", "precious"))
    jobs = [asyncio.ensure_future(store.write(put(f"k{n}"))) for n in range(20)]
    await asyncio.sleep(0)
    store.close()
    assert await asyncio.gather(*jobs) == [f"k{n}" for n in range(20)]
    assert list(bytes_of(store.path.parent)) == ["c.db"]
    assert b"precious" in store.path.read_bytes()
    assert sql(store.path, "SELECT count(*) FROM meta WHERE key LIKE 'k%'") == [(21,)]


# --- Locks ------------------------------------------------------------------------------------------------------------


def test_a_lock_has_one_holder_and_shared_ones_exclude_only_an_exclusive_one(tmp_path: Path) -> None:
    first, second, third = (chronotask.FileLock(tmp_path / "lock") for _ in range(3))
    assert (first.acquire(), second.acquire(), first.held(), second.held(), first.acquire()) == (True, False, True, False, True)
    first.release()
    assert (first.held(), second.acquire()) == (False, True)
    second.release()
    assert (first.acquire(shared=True), second.acquire(shared=True), third.acquire()) == (True, True, False)
    for lock, free in ((first, False), (second, True)):
        lock.release()
        assert third.acquire() is free
    third.release()


def test_a_lock_on_a_file_that_was_replaced_is_not_held_and_a_child_keeps_none_of_its_parents(tmp_path: Path) -> None:
    lock, other = chronotask.FileLock(tmp_path / "lock"), chronotask.FileLock(tmp_path / "lock")
    lock.acquire()
    (tmp_path / "lock").unlink()
    assert lock.held() is False
    (tmp_path / "lock").touch()
    assert lock.held() is False
    lock.release()
    assert other.acquire() is True
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        other.release()
        free = lock.acquire()
        child.kill()
    lock.release()
    assert free is True


def test_working_locks_are_recognised_and_leave_nothing_behind_and_a_folder_that_takes_none_is_told(tmp_path: Path) -> None:
    assert chronotask.locks_work(tmp_path / "c.db") is True
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file or directory"):
        chronotask.locks_work(Path("/proc/c.db"))
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        chronotask.FileLock(tmp_path / "lock").acquire()
    assert not (tmp_path / "elsewhere").exists()


def some_task(name: str) -> chronotask.Task:
    config = {"command": "true"}
    return chronotask.Task(name=name, task_type="bash", config=config, max_retries=0, retry_delay=0, created_at=0, updated_at=0)


def test_many_rows_are_written_in_order_and_no_more_of_them(store: Store) -> None:
    task = chronotask.insert(store._db, some_task("t"))
    for count in (0, 1, 2, 300):
        rows = [chronotask.NewExecution(task.id, None, "manual", None, n) for n in range(count)]
        ids = chronotask.insert_executions(store._db, rows)
        found = sql(store.path, "SELECT id, queued_at, uuid FROM executions ORDER BY id DESC LIMIT ?", count)[::-1]
        assert [row[:2] for row in found] == list(zip(ids, range(count), strict=True))
        assert len({row[2] for row in found}) == count
    assert sql(store.path, "SELECT count(*) FROM executions") == [(303,)]


async def test_a_change_of_many_rows_leaves_the_others_alone_and_the_values_as_they_are(store: Store) -> None:
    values = ["new", None, 7, 2**62, 0.1, 'a\\b"c\0', "é😀", '{"text": "\\u0000"}', "\\u0000"]

    def change(db: sqlite3.Connection) -> list[Any]:
        db.execute("CREATE TABLE things (id INTEGER PRIMARY KEY, value)")
        db.executemany("INSERT INTO things VALUES (?, 'old')", [(n,) for n in range(200)])
        statement = "UPDATE things SET value = rows.value FROM rows WHERE things.id = rows.id"
        chronotask.write_rows(db, statement, ("id", "value"), list(enumerate(values * 20)))
        chronotask.write_rows(db, statement, ("id", "value"), [])
        return [row[0] for row in db.execute("SELECT value FROM things ORDER BY id")]

    wanted = [value.replace("\0", "\ufffd") if isinstance(value, str) else value for value in values]  # SQLite's JSON ends there
    assert await store.write(change) == wanted * 20 + ["old"] * 20


def test_outputs_that_are_too_long_together_are_written_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronotask, "OUTPUT_AT_ONCE", 2**20)
    task = chronotask.insert(store._db, some_task("t"))
    chronotask.insert_executions(store._db, [chronotask.NewExecution(task.id, None, "manual", None, 0)] * 9)
    long, runs = json.dumps({"stdout": "x" * 2**19}), chronotask.start_ready(store._db, 9, START, "me")
    ended = [chronotask.Finished(run, "failed", "failed", START, None, None, long) for run in runs]
    store._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 2**21)
    assert [end.execution_id for end in chronotask.finish_attempts(store._db, ended)] == [run.execution_id for run in runs]


def test_the_outputs_of_a_page_are_not_in_memory_together(store: Store) -> None:
    task, peaks = chronotask.insert(store._db, some_task("t")), list[int]()
    chronotask.insert_executions(store._db, [chronotask.NewExecution(task.id, None, "manual", None, 0)] * 50)
    store._db.execute("UPDATE executions SET output_data = json_object('stdout', printf('%.*c', ?, 'x'))", (2**20,))
    for output in (None, "none", "full"):
        tracemalloc.start()
        chronotask.list_executions(store._db, chronotask.ExecutionQuery(output=output))
        peaks.append(tracemalloc.get_traced_memory()[1] // 2**20)
        tracemalloc.stop()
    assert peaks[0] < 10 and peaks[1] < 1 and peaks[2] >= 50


def grown(db: sqlite3.Connection, count: int) -> None:
    """A task of every kind, schedule and execution for each number up to `count`; a few of what is rare."""
    numbers = "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?1)"
    db.execute("BEGIN")
    db.execute(
        f"""{numbers} INSERT INTO tasks (name, task_type, status, config, max_retries, retry_delay, retry_backoff, created_at,
        updated_at, last_run, tags) SELECT 'task ' || n, iif(n % 3, 'http', 'bash'),
        iif(n = 7, 'disabled', iif(n % 9, 'active', 'paused')),
        '{{}}', 0, 0, 2, 1, 1, n, iif(n = 5, '["rare"]', '[]') FROM numbers""",
        (count,),
    )
    db.execute(
        f"""{numbers} INSERT INTO schedules (task_id, schedule_type, schedule_config, is_active, overlap, catchup, catchup_window,
        jitter, created_at, updated_at, settled_until, next_slot, next_fire) SELECT n, iif(n = 3, 'once', 'cron'), '{{}}',
        n % 5 > 0, 'skip', 'latest', 1, 0, 1, 1, 1, n, iif(n % 5, n, NULL) FROM numbers""",
        (count,),
    )
    db.execute(
        f"""{numbers} INSERT INTO executions (task_id, schedule_id, trigger, status, scheduled_for, queued_at, started_at,
        finished_at, attempt, uuid) SELECT iif(n % 2, 2, n), iif(n = 6, 1, 2), iif(n = 4, 'manual', 'schedule'),
        CASE n WHEN 1 THEN 'failed' WHEN 3
        THEN 'cancelled' WHEN 5 THEN 'skipped' ELSE 'succeeded' END, n, n, n, n, 1, '' FROM numbers""",
        (count,),
    )
    db.execute("UPDATE tasks SET status = 'paused' WHERE id = 4")
    db.execute("COMMIT")


def pages_of(count: int) -> dict[str, Callable[[sqlite3.Connection], Any]]:
    """What shows a page, of `count` tasks, schedules and executions."""
    of_tasks = f"""- skip={count - 10} status=disabled status=paused task_type=bash&skip={count // 4} tag=rare key=none
        status=active&task_type=http&skip={count // 3}"""
    of_schedules = f"""- skip={count - 10} is_active=false&skip={count // 6} schedule_type=once task_id=9 tag=rare
        schedule_type=cron&is_active=true&skip={count // 2}"""
    of_executions = """- status=failed status=skipped,failed status=timed_out trigger=manual schedule_id=1 status=unfinished
        schedule_id=2 tag=rare"""
    history = partial(chronotask.list_executions, task_id=2)
    asked: dict[str, Callable[[sqlite3.Connection], Any]] = {}
    for name, ask, model, queries in (
        ("tasks", chronotask.list_tasks, chronotask.TaskQuery, of_tasks),
        ("schedules", chronotask.list_schedules, ScheduleQuery, of_schedules),
        ("executions", chronotask.list_executions, chronotask.ExecutionQuery, of_executions),
        ("history", history, chronotask.HistoryQuery, "- status=failed status=cancelled success=false status=missed,skipped"),
    ):
        for query in queries.split():
            fields = dict(urllib.parse.parse_qsl(query))
            asked[f"{name} {query}"] = partial(ask, query=parse(model, {"limit": "10", **fields}))
    asked["counts"] = chronotask.counts
    asked["measured"] = partial(chronotask.measured_tasks, limit=10)
    asked["next"] = partial(chronotask.next_schedules, query=chronotask.UpcomingQuery(limit=10), until=chronotask.LAST_INSTANT)
    asked["changed timers"] = partial(chronotask.changed_timers, since_rev=10)
    asked["latest known"] = chronotask.latest_known
    asked["surplus"] = partial(chronotask.delete_surplus, task_id=2, keep=10, keep_skipped=1, now=START, limit=10)
    asked["disable"] = partial(chronotask.hold_disabled, task_id=2, disabled=True)
    return asked


def test_what_shows_a_page_reads_no_more_of_many_rows_than_of_few(tmp_path: Path) -> None:
    """SQLite counts the steps of a statement. A page of 10 needs about 3,000 of them; each row read needs 10 or more."""
    steps: list[dict[str, int]] = []
    for count in (3_000, 30_000):
        with contextlib.closing(open_database(tmp_path / f"{count}.db")) as db:
            grown(db, count)
            steps.append({})
            for name, ask in pages_of(count).items():
                taken: list[int] = []
                db.set_progress_handler(lambda taken=taken: taken.append(1), 100)
                ask(db)
                db.set_progress_handler(None, 0)
                steps[-1][name.replace(str(count), "n")] = len(taken)
    few, many = (list(found.values()) for found in steps)
    assert {name: found for name, *found in zip(pages_of(30_000), few, many, strict=True) if found[1] > 1.5 * found[0] + 30} == {}


def test_no_plan_of_a_page_sorts_or_reads_a_whole_table(store: Store) -> None:
    db, queries = store._db, list[str]()
    grown(db, 50)
    db.set_trace_callback(queries.append)
    for name, ask in pages_of(50).items():
        if "tag" not in name and name not in ("executions -", "latest known", "changed timers"):  # by a tag they are sorted
            ask(db)
    db.set_trace_callback(None)
    plans = {query: [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}")] for query in queries}
    bad = re.compile(r"SCAN (tasks|schedules|executions|[ste])$")
    assert {query: plan for query, plan in plans.items() if any(map(bad.match, plan))} == {}


# ======================================================================================================================
# 7. Executors
# ======================================================================================================================


PATH = os.environ.get("PATH", os.defpath)
# Its own in each process: tests beside each other must not end what the others have started.
RUN_UUID = f"11111111-2222-3333-4444-{os.getpid():08x}5555"
SLOT = 1_700_000_000_250_000
# The second attempt of execution 8, of task 7 by schedule 9.
SECOND_RUN = chronotask.Run(8, 7, 9, "schedule", SLOT, SLOT, 2, RUN_UUID, SLOT, "näme", "bash", "{}", 3, 5, 2)
MANUAL_RUN = dataclasses.replace(SECOND_RUN, schedule_id=None, trigger="manual", scheduled_for=None, fire_at=None, attempt=1)
RUN_ID = f"{RUN_UUID[:-4]}0002"


async def bash(
    command: str,
    *,
    settings: Settings | None = None,
    environ: dict[str, str] | None = None,
    live: LiveOutput | None = None,
    run: chronotask.Run = SECOND_RUN,
    **config: Any,
) -> Outcome:
    settings, used = settings or Settings(), Environ(environ or {"PATH": PATH})
    live = live or LiveOutput(settings.output_limit)
    return await chronotask.run_bash({"command": command, **config}, run, settings, used, live)


def output(outcome: Outcome) -> dict[str, Any]:
    assert outcome.output is not None
    return outcome.output


def out(outcome: Outcome) -> str:
    return str(output(outcome)["stdout"])


def masked(secret: str, data: bytes, step: int, *others: str) -> bytes:
    """What is shown of output that comes in pieces of this size."""
    masker = chronotask.SecretMasker([secret, *others])
    return b"".join(masker.feed(data[at : at + step]) for at in range(0, len(data), step)) + masker.feed(b"", last=True)


# ---- Output


def test_output_is_decoded_with_replacement_and_beyond_the_limit_its_first_quarter_and_last_three_quarters_are_kept() -> None:
    head, left_out, tail = ("".join(f"{n:04d}\n" for n in numbers) for numbers in (range(5), range(5, 985), range(985, 1000)))
    data, clipped = f"{head}{left_out}{tail}".encode(), f"{head}\n[… 4900 bytes left out …]\n{tail}"
    for limit, pieces, truncated, text in (
        *((100, [data[at : at + step] for at in range(0, 5000, step)], True, clipped) for step in (1, 3, 7, 64, 5000)),
        (8, (b"12345678",), False, "12345678"),
        (8, (b"12345678", b"9"), True, "12\n[… 1 bytes left out …]\n456789"),
        (100, (b"\xc3", b"\xa9\xff\0"), False, "é\ufffd\0"),
    ):
        clipper = chronotask.Clipper(limit)
        for piece in pieces:
            clipper.feed(piece)
        assert (clipper.total, clipper.truncated, clipper.text()) == (sum(map(len, pieces)), truncated, text), pieces
    clipper, chunk = chronotask.Clipper(65536), b"x" * 65536
    for _ in range(16384):
        clipper.feed(chunk)
    assert (clipper.total, len(clipper.text())) == (1 << 30, 65536 + len("\n[… 1073676288 bytes left out …]\n"))


def test_secrets_are_masked_across_chunk_borders_and_no_more_is_held_back_than_the_longest() -> None:
    data = b"a hunter2! b hunter2!more c hunter2!xyz hunter2 abcdeabcdea hunter2!mor"
    for step in (1, 2, 5, 1000):
        shown = masked("hunter2!", data, step, "hunter2!more", "er2!xyz", "abcdea")
        assert shown == b"a ******** b ******** c ******** hunter2 ******** ********mor"
        assert masked("#1;1;&", b"&#1;1;&", step) == b"&********", "begins within an escape that stands for nothing"
    masker = chronotask.SecretMasker(["secret-value"])
    for fed, seen in ((b"progress 1\n", b"progress 1\n"), (b"is it sec", b"is it "), (b"ond?", b"second?")):
        assert masker.feed(fed) == seen
    for secret in ("aaaaaa", "-" * 3000 + "x", "abcabcabc"):
        masker = chronotask.SecretMasker([secret])
        given, rest = masker.feed((secret[:3] * 20_000).encode()), masker.feed(b"", last=True)
        assert (len(rest) < 10_000, secret.encode() in given + rest) == (True, False)


@each(
    "echo",  # what other programs print for the secret sk/live+é=="1'
    r"sk\/live+\u00e9==\"1'",  # PHP's json_encode
    r"sk/live\u002B\u00E9==\u00221\u0027",  # .NET's System.Text.Json
    r"sk/live+é\u003d\u003d\"1\u0027",  # Gson
    "sk%2flive%2b%c3%a9%3d%3d%221'",  # lower-case percent encoding
    "sk/live+é==&quot;1&#39;",  # HTML
    r"sk/live+\xc3\xa9==\"1\'",  # Python's repr of bytes
    r"sk/live+\xe9==\"1\'",  # Python's ascii
    r"sk/live+\303\251==\"1\'",  # bash's printf %q in the C locale
    r"sk/live+é==\"1\'",  # bash's printf %q
    r"""sk/live+é=="1'\''""",  # bash's set -x
    """sk/live+é=="1'"'"'""",  # Python's shlex
    "c2svbGl2ZSvDqT09IjEn",  # base64, of 15 bytes
)
def test_a_secret_is_found_however_programs_escape_it(echo: str) -> None:
    for step in (1, 4, 1000):
        assert masked("sk/live+é==\"1'", f"before {echo} after".encode(), step) == b"before ******** after"


@each("user", "", "a:", "an:", "ann:", "anna:")
@each("secret", "wo?ds~", "wo?ds~1", "wo?ds~12")
def test_a_secret_is_found_in_base64_behind_anything_padded_or_not(user: str, secret: str) -> None:
    text = base64.b64encode(f"{user}{secret}".encode())
    for echo in (text, text.rstrip(b"="), text.translate(bytes.maketrans(b"+/", b"-_")), text.replace(b"/", b"\\/")):
        shown = chronotask.SecretMasker([secret]).feed(b"[%s]" % echo, last=True).rstrip(b"=]")
        assert b"********" in shown
        # At the ends a character that holds bits of something else too may be left.
        assert len(shown.replace(b"[", b"").replace(b"********", b"")) <= len(user) * 8 // 6 + 2


@each("secret", "a%2fb/c", "100%&more", r"back\slash\n", "line 1\nline 2\ttab", "u002babc\\u0041", 'pä"ss/ w\\"ord')
def test_a_secret_that_looks_escaped_itself_is_found_as_it_is_and_escaped(secret: str) -> None:
    quoted = urllib.parse.quote_plus(secret), urllib.parse.quote(secret, safe="")
    for echo in (secret, json.dumps(secret), *quoted, html.escape(secret), repr(secret), ascii(secret)):
        for step in (1, 1000):
            assert masked(secret, echo.encode(), step).strip(b"\"'") == b"********", echo


@each("encoding", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp037", "iso-8859-1", "shift_jis")
@each("secret", "secret-value/1", "s\u00e9cret")
def test_a_secret_is_found_in_any_character_set_also_where_output_is_clipped(encoding: str, secret: str) -> None:
    with contextlib.suppress(UnicodeEncodeError):  # é in Shift JIS
        for filling in range(8):
            live = LiveOutput(64)
            live.begin(("body",), chronotask.SecretMasker([secret]))
            live.expect(f"text/plain; charset={encoding}")
            data = ("." * filling + f"-{secret}-" * 20).encode(encoding)
            for at in range(0, len(data), 3):
                live.feed("body", data[at : at + 3])
            live.close()
            shown = re.sub(r"\n\[… \d+ bytes left out …\]\n", "", live.snapshot()["body"])
            assert set(shown) <= set("*-.") and shown.count("*") > 30


def test_json_is_masked_again_once_it_is_parsed_keys_too() -> None:
    live = LiveOutput(1000)
    live.begin(("body",), chronotask.SecretMasker(["secret+value"]))
    twice = json.loads(r'{"a": ["secret\\u002Bvalue", 1, null], "secret\\u002Bvalue": {"b": "no secret"}}')
    assert live.masked(twice) == {"a": ["********", 1, None], "********": {"b": "no secret"}}


@each(
    "secret unit",
    ("a" * 30000 + "b", b"a" * 29999 + b"c"), ("secret/value", b"%41"), ("secret\\\\", b"\\"), ("secretx", b"&#x"),
    ("secret\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), rb"\ud83d"), ("ababab", b"ab"),
)  # fmt: skip
async def test_masking_hostile_output_takes_time_in_proportion_to_it(secret: str, unit: bytes) -> None:
    def mask(data: bytes) -> None:
        chronotask.SecretMasker([secret, "ab" * 9, "ba" * 9]).feed(data, last=True)

    once = unit * (90_000 // len(unit))
    assert await slowdown(mask, once, once * 2) < 3


class Watched(LiveOutput):
    """Tells a follower when bytes of an attempt have come in."""

    follower: Callable[[bytes], object] = staticmethod(lambda data: None)

    def feed(self, stream: str, data: bytes, last: bool = False) -> None:
        super().feed(stream, data, last)
        self.follower(data)


def test_onlookers_see_masked_output_as_it_comes() -> None:
    live = LiveOutput(100)
    live.begin(("stdout", "stderr"), chronotask.SecretMasker(["secret-value", "short"]))
    for stream, fed, out, err in (
        ("stdout", b"one secret-", b"one ", b""),
        ("stderr", b"short", b"one ", b"short"),
        ("stdout", b"value two", b"one ******** two", b"short"),
    ):
        live.feed(stream, fed)
        assert live.recent() == [("stdout", len(out), out), ("stderr", len(err), err)]
    sizes = {"stdout_bytes": 20, "stderr_bytes": 5, "truncated": False}
    assert live.snapshot() == {"stdout": "one ******** two", "stderr": "short", **sizes}
    live.close()
    assert live.recent() == [("stdout", 16, b"one ******** two"), ("stderr", 5, b"short")]


# ---- Secrets


def test_secrets_are_resolved_where_they_may_stand(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-file\n")
    environ = {"CHRONOTASK_SECRET_A": "value-a/b?c"}
    config = {
        "url": "http://u:${env:CHRONOTASK_SECRET_A}@a/${env:CHRONOTASK_SECRET_A}?q=${env:CHRONOTASK_SECRET_A}",
        "headers": {"X": "k ${file:token}"},
        "params": {"p": ["${env:CHRONOTASK_SECRET_A}", 1]},
        "body": {"a": [{"b": f"${{file:{tmp_path}/token}}"}]},
        "auth": {"username": "u", "password": "${file:token}"},
        "method": "POST",
    }
    resolved, secrets = chronotask.resolve_secrets("http", config, environ, Settings(secrets_dir=tmp_path))
    assert resolved == {
        "url": "http://u:value-a%2Fb%3Fc@a/value-a/b%3Fc?q=value-a/b%3Fc",
        "headers": {"X": "k from-file"},
        "params": {"p": ["value-a/b?c", 1]},
        "body": {"a": [{"b": "from-file"}]},
        "auth": {"username": "u", "password": "from-file"},
        "method": "POST",
    }
    assert set(secrets) == {"value-a/b?c", "from-file"}


@each(
    "kind config resolved",
    # A whole URL or host may be a secret.
    ("http", {"url": "${env:CHRONOTASK_SECRET_URL}"}, {"url": "https://a.example:1/x?y=1"}),
    ("http", {"url": "https://${env:CHRONOTASK_SECRET_HOST}/x"}, {"url": "https://a.example:1/x"}),
    ("http", {"url": "${env:CHRONOTASK_SECRET_LIKE}/${cause:event}"}, {"url": "http://a/${cause:event}/a%2F"}),  # once
    # What is in the name of a reference ends no authority.
    ("http", {"url": "http://u:${file:a/b}@a.example/x"}, {"url": "http://u:p%40x%2Fy@a.example/x"}),
    ("http", {"url": "http://${file:a/b}:w@a:8/x?${file:a/b}"}, {"url": "http://p%40x%2Fy:w@a:8/x?p%40x/y"}),
    ("http", {"url": "http://a.example/${file:a/b}@c"}, {"url": "http://a.example/p%40x/y@c"}),
    ("http", {"url": "http://a.example?u=${file:a/b}@c"}, {"url": "http://a.example?u=p%40x/y@c"}),
    # A byte order mark is no part of a secret, links inside the folder are followed, as Kubernetes has them.
    ("bash", {"env": {"A": "${file:windows}", "B": "${file:link}"}}, {"env": {"A": "from-file", "B": "from-file"}}),
    # Of a bash task only env is resolved.
    ("bash", {"command": "echo ${UNSET:-a}"}, {"command": "echo ${UNSET:-a}"}),
    ("bash", {"command": "${file:a/b}", "env": {"A": "${file:a/b}"}}, {"command": "${file:a/b}", "env": {"A": "p@x/y"}}),
)
def test_how_references_are_resolved(tmp_path: Path, kind: str, config: dict[str, Any], resolved: dict[str, Any]) -> None:
    environ = {"CHRONOTASK_SECRET_URL": "https://a.example:1/x?y=1", "CHRONOTASK_SECRET_HOST": "a.example:1"}
    environ["CHRONOTASK_SECRET_LIKE"] = "http://a/${cause:event}"
    for file, content in (("a/b", b"p@x/y"), ("windows", b"\xef\xbb\xbffrom-file\r\n"), ("..2026/token", b"from-file")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "link").symlink_to("..data/token")
    assert chronotask.resolve_secrets(kind, config, environ, Settings(secrets_dir=tmp_path), '{"event": "a/"}')[0] == resolved


async def test_a_secret_that_may_not_be_read_fails_the_attempt_for_good(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    (secrets / "sub").mkdir(parents=True)
    for file, content in (("../outside", b"hidden-content"), ("big", b"x" * 65537), ("binary", b"\xff\xfe-hidden-content")):
        (secrets / file).write_bytes(content)
    for link, target in (("link", "../outside"), ("loop", "loop"), ("folder", "..")):
        (secrets / link).symlink_to(target)
    os.mkfifo(secrets / "pipe")
    names = "only variables named CHRONOTASK_SECRET_… may be read"
    for reference, reason in {
        "env:HOME": names,
        "env:CHRONOTASK_API_TOKEN": names,
        "env:CHRONOTASK_SECRET_NO": "the service has no such variable",
        "file:missing": "cannot be read (no such file or directory)",
        **{f"file:{path}": "only files below" for path in "../outside sub/../../outside /etc/passwd link folder/outside".split()},
        **{f"file:{path}": "cannot be read" for path in ("loop", "a\0b")},
        **{f"file:{path}": "cannot be read (is a directory)" for path in (".", "sub")},
        "file:pipe": "is not a regular file",
        "file:big": "is larger than 65536 bytes",
        "file:binary": "is not UTF-8 text",
    }.items():
        environ = {"PATH": PATH, "CHRONOTASK_API_TOKEN": "hidden-content"}
        outcome = await bash("true", settings=Settings(secrets_dir=secrets), environ=environ, env={"A": f"${{{reference}}}"})
        assert (outcome.status, outcome.retryable, reason in str(outcome.error_message)) == ("failed", False, True), reference
        assert "hidden-content" not in str(outcome.error_message)


@each("name", *"token hard-link link sub/../token copy app.env rotated unread /proc/self/fd/{fd} {folder}/token".split())
async def test_no_file_of_the_services_own_token_is_a_secret_of_tasks(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "token").write_text(GOOD_TOKEN)
    (tmp_path / "copy").write_text(f"{GOOD_TOKEN}\r\n")
    (tmp_path / "app.env").write_text(f"CHRONOTASK_API_TOKEN={GOOD_TOKEN}\n")
    (tmp_path / "link").symlink_to("token")
    os.link(tmp_path / "token", tmp_path / "hard-link")
    settings = Settings(secrets_dir=Path("/"), api_token=GOOD_TOKEN, api_token_file=tmp_path / "token")
    if name == "rotated":  # the file holds a new token that the service has not read yet
        (tmp_path / "rotated").symlink_to("token")
        (tmp_path / "token").write_text("the-next-token")
    if name == "unread":  # a file of tokens that was broken while they are in force
        os.link(tokens := tokens_file(tmp_path, f"ci run {GOOD_TOKEN[::-1]}\noops\n"), tmp_path / "unread")
        settings = dataclasses.replace(settings, api_tokens_file=tokens)
    with (tmp_path / "token").open() as file:
        path = name.format(fd=file.fileno(), folder=tmp_path)
        outcome = await bash("true", settings=settings, env={"A": f"${{file:{tmp_path / path}}}"})
    assert (outcome.status, outcome.retryable) == ("failed", False)
    assert str(outcome.error_message).endswith(": holds the service's own token, which is not for tasks")


def test_a_secret_cannot_inject_headers_nor_be_something_else_than_text() -> None:
    config = {"url": "http://a/", "headers": {"X": "${env:CHRONOTASK_SECRET_A}"}}
    said = "config.headers.X: the secret holds a line break or control character"
    for value in ("a\r\nX-Evil: 1", "a\nb", "a\0b", "latin-1: \udce4"):
        error = refused(chronotask.resolve_secrets, "http", config, {"CHRONOTASK_SECRET_A": value}, Settings())
        assert error.detail == ("${env:CHRONOTASK_SECRET_A}: is not UTF-8 text" if value[-1] > "z" else said)


async def test_resolved_secrets_are_masked_in_the_output_of_a_command() -> None:
    environ, env = {"PATH": PATH, "CHRONOTASK_SECRET_A": "value-of-a"}, {"A": "${env:CHRONOTASK_SECRET_A}"}
    small = f"{sys.executable} -c 'import fcntl; print(fcntl.fcntl(1, 1032))'"  # a larger pipe of escapes would hold up the loop
    command = f'echo "one $A two"; {small}; printf value-; sleep 0.05; printf "of-a"; echo "$A" >&2; exit 3'
    outcome = await bash(command, environ=environ, env=env)
    assert (output(outcome)["stdout"], output(outcome)["stderr"]) == ("one ******** two\n4096\n********", "********\n")
    coloured = await bash(r"printf 'value\033[m-of-a' >&2; exit 3", environ=environ, env=env)
    assert outcome.error_message == coloured.error_message == "exit status 3: ********"
    lines = {"PATH": PATH, "LC_ALL": "C", "CHRONOTASK_SECRET_A": "tab\tand-p\xe4r\x1bt\udce4\nline-two"}
    for command in ("echo $A", 'printf %q "$A"', 'set -x; : "$A"', 'ls "/$A"', 'sed "s/^/> /" <<<"$A"', 'exec "$A"'):
        shown = str(await bash(command, environ=lines, env=env))
        assert "********" in shown and not re.search("and-p|line-two", shown), (command, shown)


def test_a_secret_is_read_once_and_a_hundred_different_ones_are_the_most() -> None:
    environ = {f"CHRONOTASK_SECRET_{number}": f"{number:06}" for number in range(101)}
    bodies = ["".join(f"${{env:CHRONOTASK_SECRET_{number}}}" for number in range(count)) * 20 for count in (100, 101)]
    good, bad = (("http", {"url": "http://127.0.0.1/", "body": body}, environ, Settings()) for body in bodies)
    assert len(chronotask.resolve_secrets(*good)[1]) == 100
    assert refused(chronotask.resolve_secrets, *bad).detail == "more than 100 different secrets in one configuration"


# ---- bash


async def test_a_command_succeeds_with_exit_status_0_and_other_ends_are_failures() -> None:
    outcome = await bash("echo hi; echo oops >&2")
    streams = {"stdout": "hi\n", "stderr": "oops\n", "stdout_bytes": 3, "stderr_bytes": 5, "truncated": False}
    assert outcome == Outcome("succeeded", output={"exit_code": 0, "signal": None, **streams})
    for command, message, retryable in (
        ("exit 3", "exit status 3", True),
        ("echo first >&2; echo 'last \\x1b[31mline' >&2; exit 1", "exit status 1: last \\x1b[31mline", True),
        (r"printf 'a\033[1;31mb\033[m\033[2Kc\n' >&2; exit 1", "exit status 1: ab [2Kc", True),
        ("echo why >&2; kill -KILL $$", "was killed by SIGKILL: why", True),
        ("exit 126", "exit status 126", False),
        ("exit 127", "exit status 127", False),
        # The last line of stderr that can be read.
        (r"printf 'why\n\0\n' >&2; exit 1", "exit status 1: why", True),
        (r"printf 'why\n\t \001\033\n\r\n' >&2; exit 1", "exit status 1: why", True),
        (r"printf '\0\n\n' >&2; exit 1", "exit status 1", True),
        (r"printf 'a\0b' >&2; exit 1", "exit status 1: a b", True),
    ):
        outcome = await bash(command)
        assert (outcome.status, outcome.error_message, outcome.retryable) == ("failed", message, retryable), command
    killed = output(await bash("echo before; kill -TERM $$"))
    assert (killed["exit_code"], killed["signal"], killed["stdout"]) == (None, "SIGTERM", "before\n")


async def test_args_are_never_parsed_by_the_shell(tmp_path: Path) -> None:
    words = ["a b", "$HOME", "`id`", "$(id)", ";", "&&", "|", ">", "*", "~", "'", '"', "\\", "", "-n", "é\n2"]
    assert out(await bash("printf '<%s>'", args=words, working_dir=str(tmp_path))) == "".join(f"<{word}>" for word in words)
    assert list(tmp_path.iterdir()) == []


async def test_the_environment_is_the_services_as_it_is_without_its_own_variables_plus_the_attempts() -> None:
    environ = {"PATH": PATH, "KEPT": "1", "CHANGED": "old", "CHRONOTASK_API_TOKEN": "x", "CHRONOTASK_SECRET_A": "y"}
    outcome = await bash("env", environ=environ, env={"CHANGED": "new", "ADDED": "ü"})
    shown = {line for line in out(outcome).splitlines() if line.split("=")[0] not in ("PWD", "SHLVL", "_", "OLDPWD")}
    wanted = f"""KEPT=1 CHANGED=new ADDED=ü CHRONOTASK_TASK_ID=7 CHRONOTASK_TASK_NAME=näme CHRONOTASK_EXECUTION_ID=8
        CHRONOTASK_SCHEDULE_ID=9 CHRONOTASK_SCHEDULED_FOR=2023-11-14T22:13:20.250000Z CHRONOTASK_ATTEMPT=2
        CHRONOTASK_RUN_ID={RUN_ID}"""
    assert shown == {f"PATH={PATH}", *wanted.split()}
    assert "CHRONOTASK_SCHEDULE" not in out(await bash("env", run=MANUAL_RUN))
    outcome = await bash('printf %s "$ODD" | od -An -tx1', environ={"PATH": PATH, "ODD": os.fsdecode(b"\xff\xfe")})
    assert out(outcome).split() == ["ff", "fe"]


async def test_stdin_is_dev_null_the_process_leads_its_session_and_group_and_inherits_no_descriptor(tmp_path: Path) -> None:
    outcome = await bash("readlink /proc/self/fd/0; read -r x; echo $?; ps -o pid=,pgid=,sid= -p $$ | xargs; echo $$")
    null, read, ids, pid = out(outcome).splitlines()
    assert (null, read, ids) == ("/dev/null", "1", f"{pid} {pid} {pid}")
    assert out(await bash("cat; echo lost >&0 && echo fine")) == "fine\n"
    with open(tmp_path / "database", "wb"), socket.create_server(("127.0.0.1", 0)):
        assert out(await bash("ls -l /proc/$$/fd | grep -c -e database -e socket:")) == "0\n"


async def test_the_umask_and_the_limit_of_open_files_are_those_that_were_handed_in() -> None:
    environ = Environ(PATH=PATH)
    environ.umask, environ.open_files = 0o027, 200
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for settings in (Settings(), Settings(allowed_bash_commands=("bash",))):
        source = "bash -c 'umask; ulimit -Sn; ulimit -Hn'"
        for many in (0, 200):  # open files of this process
            with contextlib.ExitStack() as files:
                for _ in range(many):
                    files.enter_context(open(os.devnull))
                outcome = await chronotask.run_bash({"command": source}, SECOND_RUN, settings, environ, LiveOutput(1000))
            assert out(outcome) == f"0027\n200\n{'unlimited' if before[1] < 0 else before[1]}\n"
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


@each(
    "source end",  # "" is a place where words are arguments
    ("backup.sh", ""),
    ("echo a#b", ""),
    ("echo $# ${#x} ${x#y} ${x##*/} $((16#ff))", ""),
    ("echo '# a' \"# b\" \\# $'c\\'# d'", ""),
    ("# what it does\necho", ""),
    ("echo $(date # when\n)", ""),
    ("echo `date # when`", ""),
    ("x=$((1<<2)); ((x<<=1)); echo", ""),
    ("cat <<< '# a'", ""),
    ("cat <<END", ""),
    ("cat <<END\n# a\nEND\necho", ""),
    ("cat <<-'END' | cat\n\ta $(\n\tEND\necho", ""),
    ("echo \"$(cat <<END\nit's # a\nEND\n)\"", ""),
    ("echo \"${x:-'}'# a}\" 'b'", ""),
    ("f() { echo \"$@\"; } # a\nf", ""),
    ("case $x in\n# a\na) ;;\nesac\necho", ""),
    ("x=(1 # a\n2)\necho", ""),
    ("echo a # b", "a comment"),
    ("echo a\n#b", "a comment"),
    ("echo a;#b", "a comment"),
    ("echo \"# a\" # it's", "a comment"),
    ("echo ${x#y} #", "a comment"),
    ("((x = 1))# a", "a comment"),
    ("cat <<END # a", "a here-document"),
    ("(echo a # b\n", ""),
    ("shopt -s extglob\nls !(a|b)", ""),
    ("shopt -s extglob\nls !(a|b) # c", "a comment"),
    ("cat <<END\na\nEND\n# b", "a comment"),
    ("cat <<END\na\nEND", "a here-document"),
    ("cat <<'E D'\n$(\nE D", "a here-document"),
    ("cat <<-END\n\ta\n\tEND", "a here-document"),
    ("cat <<A <<B\na\nA\nb\nB", "a here-document"),
    ("cat <<END\na", "a here-document"),
    ("cat <<END\na\\\nEND\n", "a here-document"),
    ("echo a \\", "a backslash"),
)  # fmt: skip
def test_args_that_bash_would_not_take_for_arguments_are_refused(source: str, end: str) -> None:
    for command in (source, source + " \n\n"):
        chronotask.check_allowed("bash", {"command": command}, Settings())
        config = {"command": command, "args": ["x"]}
        if end:
            said = f"config.args: would be lost or changed: the command ends with {end}"
            assert refused(chronotask.check_allowed, "bash", config, Settings()).detail == said
        else:
            chronotask.check_allowed("bash", config, Settings())


async def test_args_follow_the_last_line_that_is_not_blank_and_no_shell_knows_no_comments() -> None:
    assert out(await bash("echo a\necho b \n \n", args=["c"])) == "a\nb c\n"
    assert (await bash(" ", args=["exit", "127"])).error_message == "exit status 127"
    outcome = await bash("echo a #b", args=["c"])
    assert (outcome.status, outcome.retryable) == ("failed", False)
    assert out(await bash("echo a #b", args=["c"], settings=Settings(allowed_bash_commands=("echo",)))) == "a #b c\n"


@each("unit", "(", "`", "(`", "$(", '"$(', "<<a\n", "<<a ", "`# ", "a ", "# \n", "((", "\\\n", "'", "$'")
def test_the_end_of_a_hostile_source_is_found_without_delay(unit: str) -> None:
    start = time.process_time()
    with contextlib.suppress(InvalidInput):
        chronotask.check_allowed("bash", {"command": unit * (60000 // len(unit)) + "<<#", "args": ["x"]}, Settings())
    assert time.process_time() - start < 2


async def test_a_tilde_at_the_beginning_of_working_dir_is_the_home_of_the_service(tmp_path: Path) -> None:
    for name in ("in it", "~"):
        (tmp_path / name).mkdir()
    home = str(tmp_path)
    for folder, where in {"~": home, "~/": home, "~/in it": f"{home}/in it", "/": "/", f"{home}/~": f"{home}/~"}.items():
        assert out(await bash("pwd", environ={"PATH": PATH, "HOME": home}, working_dir=folder)) == where + "\n"


async def test_an_attempt_that_was_stopped_before_it_began_starts_nothing(tmp_path: Path) -> None:
    for how, said in (("cancelled", "cancelled"), ("interrupted", "the service was stopped")):
        live = LiveOutput(1000)
        live.stop(how)
        outcome = await bash(f"touch {tmp_path}/marker", live=live)
        assert (outcome.status, outcome.error_message, outcome.output) == (how, said, None), how
    assert list(tmp_path.iterdir()) == []


async def test_neither_a_task_nor_a_relative_folder_replaces_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planted_programs(tmp_path, "echo planted")
    assert out(await bash("echo real", env={"PATH": str(tmp_path)}, working_dir=str(tmp_path))) == "real\n"
    assert out(await bash("echo a", settings=LISTED, environ={"PATH": ".::" + PATH})) == "a\n"


def planted_programs(folder: Path, source: str) -> None:
    for name in ("bash", "echo", "ls", "cat", "rc"):
        (folder / name).write_text(f"#!/bin/sh\n{source}\n")
        (folder / name).chmod(0o755)


async def test_what_is_missing_is_named_and_final(tmp_path: Path) -> None:
    listed = Settings(allowed_bash_commands=("no-such-program",))
    for outcome, said in (
        (await bash("true", working_dir="/nonexistent"), "working_dir '/nonexistent': no such file or directory"),
        (await bash("true", environ={"PATH": "/nonexistent"}), "the command 'bash' was not found on the service's PATH"),
        (await bash("no-such-program", settings=listed), "the command 'no-such-program' was not found on the service's PATH"),
    ):
        assert outcome == Outcome("failed", said)
    for name, command, use in (("b.sh", "A=1 b.sh --full", "./b.sh"), ("my b.sh", "'my b.sh'", "'./my b.sh'")):
        (tmp_path / name).write_text("true")
        outcome = await bash(command, working_dir=str(tmp_path))
        hint = str(outcome.error_message).partition(": command not found; ")[2]
        assert (outcome.retryable, hint) == (False, f"the file is in the working directory: use {use}")


async def test_a_timeout_ends_the_group_and_who_left_it_and_keeps_all_output(monkeypatch: pytest.MonkeyPatch) -> None:
    for command, printed, by in (
        ("echo before; sleep 60 & sleep 60", "before\n", "SIGTERM"),
        ("trap 'echo bye; exit 0' TERM; sleep 60 & wait", "bye\n", None),
        ("setsid sleep 60 & setsid setsid sleep 60 & sleep 60", "", "SIGTERM"),
        ("trap '' TERM; echo deaf; while :; do sleep 60; done", "deaf\n", "SIGKILL"),
        ("(trap '' TERM; exec sleep 60) & exec sleep 60", "", "SIGTERM"),
    ):
        if "trap ''" in command:
            monkeypatch.setitem(chronotask.TERM_SECONDS, "timed_out", 0.2)
        outcome = await bash(command, timeout=0.2)
        assert (outcome.status, outcome.error_message, outcome.retryable) == ("timed_out", "was still running after 0.2 s", True)
        assert (out(outcome), output(outcome)["signal"], of_run(RUN_ID)) == (printed, by, []), command


async def begun(command: str, live: Watched) -> asyncio.Task[Outcome]:
    """An attempt whose command has printed something."""
    running = asyncio.create_task(bash(command, live=live))
    seen = asyncio.get_running_loop().create_future()
    live.follower = lambda data: None if seen.done() else seen.set_result(data)
    await seen
    return running


async def test_an_attempt_is_stopped_from_outside_and_a_cancelled_job_kills_everything_at_once() -> None:
    for reason, retryable in (("cancelled", False), ("interrupted", True)):
        live = Watched(1000)
        running = await begun("echo begun; setsid sleep 60 & sleep 60", live)
        live.stop(reason)
        live.stop("cancelled")
        outcome = await running
        assert (outcome.status, outcome.retryable, out(outcome)) == (reason, retryable, "begun\n")
        assert of_run(RUN_ID) == []
    running = await begun("trap '' TERM; echo begun; setsid sleep 60 & sleep 60", Watched(1000))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert of_run(RUN_ID) == []


async def made(*paths: Path) -> list[bool]:
    """Which of these files there are, once the last one is there."""
    await until_true(paths[-1].exists, 20)
    return [path.exists() for path in paths]


@each(
    "command",
    "(sleep 0.4; echo x >&2; touch mark) > log &",
    "(sleep 0.4; echo x; touch mark) 2> log &",
    "(sleep 0.4; printf %300000s x; printf %300000s x >&2; touch mark) &",
    "setsid env -i bash -c 'sleep 0.4; echo x; echo x; touch mark' &",
)
async def test_a_background_child_may_write_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(chronotask, "DRAIN_SECONDS", 0.05)
    threads = threading.active_count()
    run = dataclasses.replace(SECOND_RUN, uuid=str(uuid.uuid4()))  # other tests end what belongs to theirs
    outcome = await bash(f"echo done; {command}", run=run, working_dir=str(tmp_path))
    assert (outcome.status, out(outcome), (tmp_path / "mark").exists()) == ("succeeded", "done\n", False)
    assert (await made(tmp_path / "mark"), threading.active_count()) == ([True], threads)


async def test_of_too_many_pipes_in_the_background_the_oldest_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chronotask, "DRAIN_SECONDS", 0.4)
    monkeypatch.setattr(chronotask, "MAX_LEFT_PIPES", 2)
    environ = Environ(PATH=PATH)
    for name in ("oldest", "older", "newest"):
        source = f"(while [ ! -e go ]; do sleep 0.02; done; echo x; echo x; touch {name}) 2> /dev/null &"
        run = dataclasses.replace(SECOND_RUN, uuid=str(uuid.uuid4()))
        task = {"command": source, "working_dir": str(tmp_path)}
        await chronotask.run_bash(task, run, Settings(), environ, LiveOutput(1000))
    assert caplog.messages == ["3 pipes are open in the background: what writes to the oldest will be killed"]
    (tmp_path / "go").touch()
    assert await made(tmp_path / "older")
    assert await made(tmp_path / "oldest", tmp_path / "newest") == [False, True]


async def test_the_first_output_is_kept_whoever_reads_it_or_holds_the_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronotask, "DRAIN_SECONDS", 0.1)
    assert out(await bash("printf %65536s x")) == f"{'x':>65536}", "as much as a pipe holds"
    left = await bash("sleep 60 & echo done")
    assert (left.status, out(left), len(of_run(RUN_ID))) == ("succeeded", "done\n", 1), "as with cron, it goes on"
    assert chronotask.kill_leftovers({RUN_ID}) == 1
    chatty = await bash("(trap '' PIPE; while :; do echo more; done) & echo done")
    assert (chatty.status, "done\n" in out(chatty)) == ("succeeded", True), "its noise does not keep the run"
    assert chronotask.kill_leftovers({RUN_ID}) == 1
    more = output(await bash("printf %3000000s x; printf %200000s y >&2"))
    assert (more["stdout_bytes"], more["stderr_bytes"]) == (3_000_000, 200_000), "more than a pipe holds, as it comes"


async def test_many_at_once_are_all_run_and_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = await asyncio.gather(*(bash(f"echo {number}; exit {number % 2}") for number in range(100)))
    assert [out(outcome) for outcome in outcomes] == [f"{number}\n" for number in range(100)]
    assert {outcome.status for outcome in outcomes[::2]} == {"succeeded"}
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    monkeypatch.setitem(chronotask.TERM_SECONDS, "timed_out", 0.5)
    seen, scandir = Counter[Any](), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.update([path]) or scandir(path))
    deaf = "(trap '' TERM; exec sleep 60) & exec sleep 60"
    assert {end.status for end in await asyncio.gather(*(bash(deaf, timeout=0.1) for _ in range(20)))} == {"timed_out"}
    assert seen["/proc"] < 100, "what each waits for is not looked for there"


def test_leftovers_of_other_runs_are_not_touched() -> None:
    with sleeping(CHRONOTASK_RUN_ID=RUN_ID + "-other") as other, sleeping(CHRONOTASK_RUN_ID=RUN_ID) as mine:
        assert chronotask.kill_leftovers({"no-such-run"}) == 0
        assert chronotask.kill_leftovers({RUN_ID, "another"}) == 1
        assert (mine.wait(5), other.poll()) == (-signal.SIGKILL, None)


@contextlib.contextmanager
def sleeping(user: dict[str, Any] | None = None, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with these variables, and as this user."""
    with subprocess.Popen(["sleep", "60"], env={"PATH": PATH, **environ}, **(user or {})) as process:
        try:
            until(Path(f"/proc/{process.pid}/cmdline").read_bytes)  # as its environment it is empty until the exec is over
            yield process
        finally:
            process.kill()


async def test_what_tasks_leave_behind_is_reaped_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    prctl = ctypes.CDLL(None).prctl
    assert prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: orphans come to this process, as they come to process 1
    try:
        running = asyncio.ensure_future(bash("exit 3"))
        while not chronotask._children:
            await asyncio.sleep(0)
        check = subprocess.Popen(["sh", "-c", "exit 4"])  # waited for by a thread, as the check of a command
        for own in (*chronotask._children, check.pid):
            os.waitid(os.P_PID, own, os.WEXITED | os.WNOWAIT)
        chronotask.reap()
        assert ((await running).error_message, check.wait()) == ("exit status 3", 4)
        orphan = int(out(await bash("setsid true >/dev/null 2>&1 & echo $!")))
        while Path(f"/proc/{orphan}").exists():
            chronotask.reap()
            await asyncio.sleep(0.01)
        chronotask.reap()
    finally:
        prctl(36, 0, 0, 0, 0)


def test_a_process_that_shows_a_secret_of_the_service_is_warned_about() -> None:
    secret = {"CHRONOTASK_API_TOKEN": f"token-{uuid.uuid4()}", "CHRONOTASK_SECRET_A": f"secret-{uuid.uuid4()}"}
    plain = {"CHRONOTASK_API_PORT": "1", "OTHER": secret["CHRONOTASK_API_TOKEN"]}
    for name, value in (secret | plain).items():
        with sleeping(**{name: value}) as process:
            warnings = chronotask.exposed_secrets({**secret, "CHRONOTASK_API_PORT": "1"})
        assert len(warnings) == (name in secret), warnings
        assert all(warning.startswith(f"process {process.pid} shows {name} in its environment") for warning in warnings)
        assert not any(value in warning for value in secret.values() for warning in warnings)


# ---- Another user: BASH_USER

NOBODY = Settings(bash_user=pwd.getpwnam("nobody"))


@needs_root
async def test_commands_run_as_bash_user_with_its_groups_and_variables() -> None:
    shown = 'id -un; id -gn; id -Gn; echo "$HOME $USER $LOGNAME $SHELL"; echo seen >/dev/stderr; grep CapEff /proc/self/status'
    outcome = await bash(shown, settings=NOBODY, environ={"PATH": PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root"})
    user = pwd.getpwnam("nobody")
    group = grp.getgrgid(user.pw_gid).gr_name
    assert out(outcome).splitlines() == [
        *("nobody", group, group, f"{user.pw_dir} nobody nobody {user.pw_shell}"),
        "CapEff:\t0000000000000000",
    ]
    assert output(outcome)["stderr"] == "seen\n"
    assert out(await bash("echo $HOME", settings=NOBODY, env={"HOME": "/mine"})) == "/mine\n", "the task's own env wins"
    direct = dataclasses.replace(NOBODY, allowed_bash_commands=("id",))
    for config in ({"args": ["-un"]}, {"args": ["-un"], "working_dir": "/"}):
        assert out(await bash("id", settings=direct, **config)) == "nobody\n"


@needs_root
async def test_the_working_dir_is_entered_as_bash_user(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    tmp_path.chmod(0o700)
    assert out(await bash("pwd; exit 0", settings=NOBODY, working_dir="/usr")) == "/usr\n"
    for folder in (str(tmp_path / "open"), str(tmp_path / "none"), "~"):
        outcome = await bash("echo entered", settings=NOBODY, working_dir=folder)
        shown = folder.replace("~", pwd.getpwnam("nobody").pw_dir)
        assert (outcome.status, outcome.retryable, out(outcome)) == ("failed", False, "")
        assert (outcome.error_message or "").startswith("exit status 126") and shown in (outcome.error_message or "")


@needs_root
async def test_what_runs_as_bash_user_is_stopped_and_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chronotask.TERM_SECONDS, "timed_out", 0.2)
    outcome = await bash("trap '' TERM; setsid sleep 60 & while :; do sleep 60; done", settings=NOBODY, timeout=0.5)
    assert (outcome.status, of_run(RUN_ID)) == ("timed_out", [])
    as_nobody = chronotask.as_user(NOBODY.bash_user)
    with sleeping(CHRONOTASK_RUN_ID=RUN_ID) as ours, sleeping(as_nobody, CHRONOTASK_RUN_ID=RUN_ID) as theirs:
        assert chronotask.kill_leftovers({RUN_ID}, NOBODY.bash_user) == 1
        assert (theirs.wait(5), ours.poll()) == (-signal.SIGKILL, None), "another user may choose its environment"
        assert Path("/proc/self/environ").stat().st_uid == 0 and os.access("/etc/shadow", os.R_OK)


# Everything but what the README's compose file gives: CAP_KILL, CAP_SETGID, CAP_SETUID.
FEW_RIGHTS = """
import ctypes
for right in range(64):
    if right not in (5, 6, 7):
        ctypes.CDLL(None).prctl(24, right, 0, 0, 0)
if os.environ.pop("AGAIN", "yes") == "yes":
    os.environ["AGAIN"] = "no"
    os.execv(sys.executable, [sys.executable, *sys.argv])
"""
NOT_FOR_TASKS = """
for file in $FILES; do cat "$file" 2>/dev/null && echo "read $file"; done
for file in environ mem maps; do cat /proc/$PPID/$file 2>/dev/null && echo "read $file"; done
kill -0 $PPID 2>/dev/null && echo "may signal"
for right in Inh Prm Eff Amb; do grep -q "Cap$right:.0*$" /proc/self/status || echo "has $right"; done
setsid sleep 60 & echo ready; sleep 60
"""


@needs_root
@pytest.mark.slow
def test_commands_of_bash_user_read_nothing_of_the_service_and_do_not_survive_its_crash(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "closed").write_text("secret-of-the-service")
    (secrets / "closed").chmod(0o400)
    for folder in (tmp_path, *tmp_path.parents):  # what protects are the files' own modes
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    log = tmp_path / "c.log"
    log.touch(0o644)
    log.chmod(0o644)
    files = dict(API_TOKENS_FILE=tokens_file(tmp_path), LOG_FILE=log, SECRETS_DIR=secrets)
    server = Server(tmp_path, program=wrapped(tmp_path, FEW_RIGHTS), BASH_USER="nobody", **files).start()
    admin = {"Authorization": f"Bearer {ADMIN}"}
    places = [Path(server.database), Path(f"{server.database}-wal"), log, tmp_path / "tokens", secrets / "closed"]
    config = {"command": NOT_FOR_TASKS, "env": {"FILES": " ".join(map(str, places))}}
    server.ask("POST", "/tasks", {"name": "t", "task_type": "bash", "config": config, "max_retries": 0}, **admin)
    server.ask("POST", "/tasks/1/execute", **admin)

    def printed() -> str:
        return str((server.ask("GET", "/executions/1", **admin)[1]["output_data"] or {}).get("stdout"))

    until(lambda: "ready" in printed())
    assert printed() == "ready\n" and all(path.exists() for path in places)
    run_id = f"{server.sql('SELECT uuid FROM executions')[0][0][:-4]}0001"
    assert len(of_run(run_id)) >= 2
    server.kill()
    server.start()
    until(lambda: not of_run(run_id))
    assert server.stop() == 0


@needs_root
def test_without_the_right_to_become_or_to_signal_bash_user_nothing_starts(tmp_path: Path) -> None:
    for rights in ("(6, 7)", "(5, 6)"):
        program = wrapped(tmp_path, FEW_RIGHTS.replace("(5, 6, 7)", rights))
        ended = ran(tmp_path, sys.executable, program, environ={"CHRONOTASK_BASH_USER": "nobody"})
        assert ended.returncode == 2
        assert ended.stderr.startswith("chronotask: CHRONOTASK_BASH_USER=nobody: commands cannot run as that user (")
        assert "CAP_SETUID, CAP_SETGID and CAP_KILL" in ended.stderr


# ---- Launchers


LAUNCHERS = Settings(
    bash_timeout=20,
    launchers={
        "nice": ("nice", "-n", "1"),
        "env": ("env", "-i", f"PATH={PATH}", "NAME={name}", "{env}"),
        "liar": ("true",),
        "down": ("bash", "-c", "echo no controller >&2; exit 1"),
        "shot": ("bash", "-c", "kill -9 $$"),
        "late": ("bash", "-c", '"$@"; echo epilog >&2; exit 4', "late"),
        "twice": ("bash", "-c", '"$@"; N=1 "$@"; exit 0', "twice"),
        "tty": ("bash", "-c", r'"$@" | sed "s/$/\r/"', "tty"),
        "takes_back": ("bash", "-c", 'trap "kill %1; echo taken back; exit 0" TERM; setsid "$@" & wait', "takes_back"),
    },
)
LOST = ", but the command never reported its end"


async def test_success_by_a_launcher_needs_the_word_of_the_far_side_and_no_other_word_against_it() -> None:
    for launcher, command, result, stdout in (
        ("nice", "nice; exit 0", ("succeeded", None, False, 0), f"{os.nice(0) + 1}\n"),
        ("nice", "echo a; exit 3", ("failed", "exit status 3", True, 3), "a\n"),
        ("nice", "exit 127", ("failed", "exit status 127", False, 127), ""),
        ("nice", "exec true 1>&-", ("succeeded", None, False, 0), ""),
        ("nice", "exec 2>&-; kill -9 $PPID", ("failed", f"the launcher was killed by SIGKILL{LOST}", True, None), ""),
        ("liar", "true", ("failed", f"the launcher ended with 0{LOST}", True, 0), ""),
        ("down", "true", ("failed", f"the launcher ended with 1{LOST}: no controller", True, 1), ""),
        ("shot", "true", ("failed", f"the launcher was killed by SIGKILL{LOST}", True, None), ""),
        ("late", "echo a", ("failed", "exit status 4: epilog", True, 4), "a\n"),
        ("late", "exit 5", ("failed", "exit status 5: epilog", True, 5), ""),
        ("twice", "echo a; exit $((7 * !N))", ("failed", "exit status 7", True, 7), "a\na\n"),
        ("tty", "echo a", ("succeeded", None, False, 0), "a\r\n"),
    ):
        outcome = await bash(command, settings=LAUNCHERS, launcher=launcher)
        code = output(outcome)["exit_code"]
        assert (outcome.status, outcome.error_message, outcome.retryable, code) == result, (launcher, command)
        assert out(outcome).startswith(stdout) and len(out(outcome)) <= len(stdout) + 1


async def test_the_output_of_a_command_is_the_same_with_and_without_a_launcher() -> None:
    for command in (
        *("true", "echo", r"printf 'a\n\n\n'; echo b >&2", "printf 'no line break'", r"printf '\xff\x00\n\xfe\r\n'"),
        "printf %100000s x; printf '\n%s' {1..1000}",
        r"for i in 0 1 20; do printf '\n%s %d\n' 0123456789abcdef0123456789abcdef $i; done; printf '\n0123456789abcdef '",
        "tr '\\0' '\\n' </proc/$PPID/environ >/dev/null; echo $CHRONOTASK_RUN_ID 0",
    ):
        here, there = await bash(command, settings=LAUNCHERS), await bash(command, settings=LAUNCHERS, launcher="nice")
        assert here == there and here.status == "succeeded", command


def test_the_report_is_found_and_taken_out_wherever_output_is_cut_into_pieces() -> None:
    for ending in (b"", b"\n", b"\n\n"):
        report = chronotask.Report()
        word = report.word.encode()
        for status, noise in ((0, b""), (0, b"left behind\n"), (217, b"srun: error\n")):
            data = b"a\nb " + word + b" 0\n" + word[:-1] + b"\n\n" + word + b" x\n\xff\0" + ending
            for step in (1, 2, 3, 7, 40, 1000):
                report.status = None
                whole = data + b"\n%s %d\n" % (word, status) + noise
                shown = [report.feed(whole[at : at + step]) for at in range(0, len(whole), step)]
                assert b"".join(shown) + report.feed(b"", last=True) == data + noise
                assert report.status == status
    unseen = chronotask.Report()
    assert (unseen.feed(b"line\n"), unseen.feed(b"next"), unseen.status) == (b"line", b"\nnext", None)


async def test_env_stands_for_the_variables_of_the_task_as_words_and_name_for_the_attempt(tmp_path: Path) -> None:
    names, nasty = set(), {"A": "a b\n'\"$(id)`id`;*\\", "B": "", "C": "-x=1", "D": "{name} {env}", "E": "ü😀", "F": "--"}
    for attempt in (1, 2, 10**4 - 1):
        run = dataclasses.replace(SECOND_RUN, attempt=attempt)
        outcome = await bash("env -0", settings=LAUNCHERS, launcher="env", env=nasty, run=run)
        found = dict(line.split("=", 1) for line in out(outcome).rstrip("\0").split("\0"))
        assert nasty.items() <= found.items() and found["CHRONOTASK_TASK_NAME"] == "näme"
        assert re.fullmatch("[a-z0-9-]{1,63}", found["NAME"])
        names.add(found["NAME"])
    assert len(names) == 3
    own = {"env": ("env", "-u", "X", "{env}"), "own": ("bash", "-c", 'echo "<$A>"; exec "$@"', "own", "env", "{env}")}
    outcome = await bash('echo "<$A>"', settings=Settings(launchers=own), launcher="own", env={"A": "1"})
    assert out(outcome) == "<>\n<1>\n", "the launcher itself does not get what it is to pass on"
    assert out(await bash("pwd", settings=LAUNCHERS, launcher="env", working_dir="~", env={"HOME": "/"})) == "/\n"
    outcome = await bash("true", settings=LAUNCHERS, launcher="env", working_dir="/nonexistent")
    assert (outcome.retryable, output(outcome)["exit_code"]) == (False, 126)


@each("how", "timed_out", "cancelled", "interrupted")
async def test_at_a_stop_the_launcher_gets_sigterm_first_and_takes_its_job_back(how: str) -> None:
    live = Watched(1000)
    live.follower = lambda data: live.stop(how) if b"on" in data and how != "timed_out" else None
    run = dataclasses.replace(SECOND_RUN, uuid=str(uuid.uuid4()))
    config = {"timeout": 0.5} if how == "timed_out" else {}
    outcome = await bash("echo on; sleep 60", settings=LAUNCHERS, launcher="takes_back", live=live, run=run, **config)
    assert (outcome.status, out(outcome), of_run(run.run_id)) == (how, "on\ntaken back\n", [])


def test_what_a_dead_service_left_to_a_launcher_is_asked_to_end_before_it_is_killed(tmp_path: Path) -> None:
    for run_id, source in ((str(uuid.uuid4()), "trap 'touch asked; exit' TERM"), (str(uuid.uuid4()), "trap 'touch deaf' TERM")):
        process = subprocess.Popen(
            ["bash", "-c", f"{source}; echo; while :; do read -t 0.02 -u 9; done 9<>fifo"],
            env={"PATH": PATH, "CHRONOTASK_RUN_ID": run_id}, cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdout and process.stdout.readline() == b"\n"
        threading.Thread(target=process.wait).start()  # a zombie would not be looked for, but be there
        assert chronotask.kill_leftovers({run_id}, looks=10) == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"asked", "deaf"}


async def test_words_of_the_list_are_programs_to_a_launcher_whatever_bash_has_built_in(tmp_path: Path) -> None:
    for name in ("eval", "exec", "source", "command", "-a"):
        settings = dataclasses.replace(LAUNCHERS, allowed_bash_commands=(name,))
        outcome = await bash(name, args=["touch", str(tmp_path / "x")], settings=settings, launcher="nice")
        assert (outcome.status, list(tmp_path.iterdir())) == ("failed", []), name


async def test_the_default_launcher_takes_every_command_and_an_unknown_one_is_refused(api: Api) -> None:
    api.rig.service.settings = dataclasses.replace(LAUNCHERS, launchers={"b": ("true",), "a": ("nice",)})
    assert out(await bash("nice", settings=dataclasses.replace(LAUNCHERS, launcher_default="nice"))) == f"{os.nice(0) + 1}\n"
    bad = await api("POST", "/tasks", {"name": "a", "task_type": "bash", "config": {"command": "true", "launcher": "c"}})
    message = "must be one of a, b (CHRONOTASK_LAUNCHER_NAME), not 'c'"
    assert (bad.status, bad.json["errors"]) == (422, [{"field": "config.launcher", "message": message}])
    good = await api("POST", "/tasks", {"name": "a", "task_type": "bash", "config": {"command": "true", "launcher": "a"}})
    assert good.json["config"] == {"command": "true", "launcher": "a"}
    said = "config.launcher: must be left out: there are no launchers here (CHRONOTASK_LAUNCHER_NAME), not 'slurm'"
    assert (await bash("true", launcher="slurm")).error_message == said


@needs_root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="SKIPPED LOUDLY: there is no setpriv (util-linux)")
def test_rights_that_systemd_gives_to_a_service_that_is_not_root_do_not_reach_its_commands() -> None:
    rights = "+setuid,+setgid,+kill,+dac_override"  # the last one to read this program wherever it is
    given = ["setpriv", "--reuid=daemon", "--regid=daemon", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    program = (
        f"import sys, subprocess, pwd; sys.path.insert(0, {str(TOP)!r}); import chronotask as c\n"
        "settings = c.Settings(bash_user=pwd.getpwnam('nobody'))\n"
        "if sys.argv[1:]: c.check_bash_user(settings.bash_user)\n"
        "subprocess.run(['grep', 'CapEff', '/proc/self/status'], **c.as_user(settings.bash_user))\n"
    )
    shown = [
        subprocess.run([*given, sys.executable, "-c", program, *more], capture_output=True, text=True, timeout=60).stdout.split()
        for more in ([], ["checked"])
    ]
    assert shown == [["CapEff:", "00000000000000e2"], ["CapEff:", "0000000000000000"]]


# ---- The list of allowed commands

LISTED = Settings(
    allowed_bash_commands=("echo", "ls", "cat"),
    allowed_bash_env=("LANG", "LD_PRELOAD", "PATH", "PYTHONPATH"),
    launchers={"nice": ("nice", "env", "{env}")},
)

# With a Cyrillic e, in full width, with a zero width space and with an accent, too.
OTHER_WORDS = """touch env command exec busybox ech echo.exe echo,ls ECHO /bin/echo ./echo ../planted/echo //bin/echo
    {planted}/echo \u0435cho \uff45\uff43\uff48\uff4f echo\u200b echo\u0301""".split()
OTHER_VARIABLES = """PATH={planted} PYTHONPATH={planted} LD_PRELOAD={planted}/x.so LD_AUDIT={planted}/x.so ANYTHING=1
    LD_LIBRARY_PATH={planted} ENV={planted}/rc BASH_ENV={planted}/rc GCONV_PATH={planted} GLIBC_TUNABLES=x PERL5OPT=-Mx
    NODE_OPTIONS=-r""".split()
REFUSED = [
    *("; touch {marker}", "echo a\ntouch {marker}", "echo a\rtouch {marker}", "echo a\x85touch {marker}"),
    *("echo a\u2028touch {marker}", "echo\x0btouch {marker}", "echo\ta", "echo \x1b[2J", "echo\u00a0a"),  # line breaks and blanks
    *("$(echo touch) {marker}", "`echo touch` {marker}", "echo$IFS{marker}", "touch${IFS}{marker}", "{touch,{marker}}"),
    *("$SHELL -c 'touch {marker}'", "bash -c 'touch {marker}'", ">{marker} echo a", "PATH={planted} echo a"),
    *("'echo a; touch {marker}'", "echo 'a", "echo a\\", "$'touch' {marker}", "''", "   ", "'' echo"),
    *(f"{word} touch {{marker}}" for word in OTHER_WORDS),
]
ECHOED = [
    *("a; touch {marker}", "a;touch {marker}", "a && touch {marker}", "a || touch {marker}", "a & touch {marker}"),
    *("a | tee {marker}", "a > {marker}", "a >{marker}", "a 3>{marker}", "a # touch {marker}"),
    *("$(touch {marker})", "`touch {marker}`", "$0", "$((1+1))", "!!"),
]
# Each of over 60: a name, the configuration, and what may come of it: "refused", or the exact output of the harmless command.
# {marker} is a file that must never appear, {planted} a folder of programs that would make it.
ATTACKS: list[tuple[str, dict[str, Any], str]] = [
    *((command, {"command": command}, "refused") for command in REFUSED),
    *((words, {"command": f"echo {words}"}, f"{words}\n") for words in ECHOED),
    *((f"{end!a} in args", {"command": "echo", "args": [f"a{end}touch {{marker}}"]}, "refused") for end in "\n\0"),
    ("quoted substitution", {"command": 'echo "$(touch {marker})"'}, "$(touch {marker})\n"),
    ("process substitution", {"command": "cat <(touch {marker})"}, "cat: "),
    ("here string", {"command": "cat <<< {marker}"}, "cat: "),
    ("quotes inside the word", {"command": "e''cho a"}, "a\n"),
    ("backslash inside the word", {"command": "e\\cho a"}, "a\n"),
    ("planted in the working directory", {"command": "echo a", "working_dir": "{planted}"}, "a\n"),
    ("option of the list", {"command": "ls -d /"}, "/\n"),
    *((line, {"command": "echo a", "env": dict([line.split("=")])}, "refused") for line in OTHER_VARIABLES),
    ("exported function", {"command": "echo a", "env": {"BASH_FUNC_echo%%": "() { touch {marker}; }"}}, "refused"),
    ("listed variable", {"command": "echo a", "env": {"LANG": "C"}}, "a\n"),
    *((f"args {word}", {"command": "echo", "args": [word]}, f"{word}\n") for word in ("a; touch {marker}", "$(touch {marker})")),
    ("args as command", {"command": " ", "args": ["touch", "{marker}"]}, "refused"),
]


def filled(value: Any, marker: Path, planted: Path) -> Any:
    return json.loads(json.dumps(value).replace("{marker}", str(marker)).replace("{planted}", str(planted)))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [{}, {"launcher": "nice"}], ids=["here", "launched"])
@pytest.mark.parametrize(("config", "result"), [(config, result) for _, config, result in ATTACKS], ids=[a[0] for a in ATTACKS])
async def test_an_attack_on_allowed_commands_runs_nothing_else(tmp_path: Path, config: Json, result: str, launcher: Json) -> None:
    marker, planted = tmp_path / "marker", tmp_path / "planted"
    planted.mkdir()
    planted_programs(planted, f"touch {marker}")
    config = filled(config, marker, planted) | launcher
    outcome = await chronotask.run_bash(config, SECOND_RUN, LISTED, Environ(PATH=PATH), LiveOutput(65536))
    assert not marker.exists()
    if result == "refused":
        refused(chronotask.check_allowed, "bash", config, LISTED)
        assert (outcome.status, outcome.retryable, outcome.output) == ("failed", False, None)
    elif result == "cat: ":
        assert output(outcome)["stderr"].startswith(("cat: ", "/"))
    else:
        assert out(outcome) == filled(result, marker, planted)


async def test_what_is_refused_says_what_is_allowed() -> None:
    said = "config.command: the command must be one of echo, ls, cat (CHRONOTASK_ALLOWED_BASH_COMMANDS), not 'rm'"
    assert refused(chronotask.check_allowed, "bash", {"command": "rm -rf /"}, LISTED).detail == said
    error = refused(chronotask.check_allowed, "bash", {"command": "echo", "env": {"LD_PRELOAD": "x", "HOME": "x"}}, LISTED)
    assert [found.field for found in error.errors] == ["config.env.LD_PRELOAD", "config.env.HOME"]
    assert "only LANG (" in error.errors[0].message
    settings = Settings(allowed_bash_commands=("/bin/echo",))  # a path must be given as that path
    assert chronotask.bash_words({"command": "/bin/echo a 'b c'", "args": ["d"]}, settings) == ["/bin/echo", "a", "b c", "d"]
    refused(chronotask.bash_words, {"command": "echo a"}, settings)
    none = Settings(allow_host_commands=False)
    assert isinstance(refused(chronotask.check_allowed, "bash", {"command": "true"}, none), chronotask.Forbidden)
    chronotask.check_allowed("http", {"url": "http://a/"}, none)
    outcome = await bash("true", settings=none)
    assert (outcome.status, outcome.retryable) == ("failed", False)
    assert "CHRONOTASK_ALLOW_HOST_COMMANDS=false" in str(outcome.error_message)


def test_refused_addresses() -> None:
    for (open_net, private_blocked), addresses in {  # what is said of it then: None when it may be called
        (None, None): "8.8.8.8 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808",
        (None, "private"): """
            127.0.0.1 127.8.9.1 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 100.64.0.1 224.0.0.1 255.255.255.255 ::1 ::
            fd12:3456::1 fec0::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 2002:7f00:1::
            64:ff9b:1::808:808 2002:808:808::1 4000::1 1000::1 5f00::1 100::1 2001:db8::1
        """,
        ("link-local", "link-local"): """
            169.254.169.254 169.254.0.1 fe80::1 fe80::1%2 ::ffff:169.254.169.254 64:ff9b::a9fe:a9fe
            2002:a9fe:a9fe::1 fd00:ec2::254 100.100.100.200 168.63.129.16 192.0.0.192 fd00:ec2::23 fd20:ce::254
            fd00:c1::a9fe:a9fe fd00:42::42 fd00:a9fe:a9fe::1 64:ff9b::6464:64c8 64:ff9b:1::a9fe:a9fe
            64:ff9b:1:a9fe:a9:fe00:: 64:ff9b:1:a9:fe:a9fe:: 64:ff9b:1:0:a9:fea9:fe00:0
        """,
    }.items():
        for address in addresses.split():
            found = [chronotask.refused_address(address, Settings(block_private_networks=blocked)) for blocked in (False, True)]
            assert [said and said.split()[0] for said in found] == [open_net, private_blocked], address


def test_allowed_networks_open_what_is_refused_an_address_inside_another_only_when_both_are_listed() -> None:
    for allowed, address, closed in (
        ("169.254.169.254/32", "169.254.169.254", False),
        ("10.0.0.0/8", "::ffff:10.0.0.1", False),
        ("fd00::/8", "fd00:ec2::254", False),
        ("169.254.169.254/32 10.0.0.0/8 fd00::/8", "169.254.169.253", True),
        ("169.254.169.254/32 10.0.0.0/8 fd00::/8", "192.168.0.1", True),
        ("64:ff9b::/96", "64:ff9b::a9fe:a9fe", True),
        ("64:ff9b::/96", "64:ff9b::7f00:1", True),
        ("2002::/16", "2002:a9fe:a9fe::1", True),
        ("::/0", "64:ff9b::a00:1", True),
        ("169.254.0.0/16", "64:ff9b::a9fe:a9fe", True),
        ("64:ff9b::/96 10.0.0.0/8", "64:ff9b::a00:1", False),
        ("::/0 0.0.0.0/0", "2002:a9fe:a9fe::1", False),
    ):
        networks = tuple(ipaddress.ip_network(text) for text in allowed.split())
        settings = Settings(block_private_networks=True, allowed_networks=networks)
        assert (chronotask.refused_address(address, settings) is not None) == closed, (allowed, address)


# ---- http


@contextlib.asynccontextmanager
async def serving(handler: Callable[[Any], Awaitable[Any]], ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A loopback server; the URL without the last slash."""
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl_context).start()
    try:
        yield f"{'https' if ssl_context else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def conversing(talk: Callable[..., Awaitable[None]], ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A loopback server that has this conversation on each connection, by a reader and a writer; its URL."""
    writers = []

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0, ssl=ssl_context)
    try:
        yield f"{'https' if ssl_context else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def http_executors(
    url: str,
    *,
    settings: Settings | None = None,
    environ: dict[str, str] | None = None,
    live: LiveOutput | None = None,
    run: chronotask.Run = SECOND_RUN,
    client: chronotask.HttpClient | None = None,
    **config: Any,
) -> Outcome:
    settings = settings or Settings()
    live = live or LiveOutput(settings.output_limit)
    async with contextlib.nullcontext(client) if client else http_client(settings) as used:
        return await chronotask.run_http({"url": url, **config}, run, used, environ or {}, live)


async def hang(writer: asyncio.StreamWriter) -> None:
    """Goes on for ever, and sends nothing more."""
    await asyncio.Event().wait()


async def answered(answer: bytes, then: Any = None, ssl_context: ssl.SSLContext | None = None, **config: Any) -> Outcome:
    """What an attempt makes of these very bytes, behind which the server closes or does something else."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if then is not None:
            await then(writer)
        await writer.drain()

    async with conversing(talk, ssl_context) as url:
        return await http_executors(url, **config)


@contextlib.asynccontextmanager
async def http_client(settings: Settings) -> AsyncIterator[chronotask.HttpClient]:
    client = chronotask.HttpClient(settings, lambda: SLOT)
    try:
        yield client
    finally:
        await client.close()


async def echo(request: web.Request) -> web.Response:
    headers = {name.lower(): value for name, value in request.headers.items()}
    body = (await request.read()).decode()
    return web.json_response({"method": request.method, "path": request.raw_path, "headers": headers, "body": body})


async def echoed(url: str = "/", **config: Any) -> dict[str, Any]:
    async with serving(echo) as base:
        return dict(output(await http_executors(base + url, **config))["body"])


async def test_a_get_has_the_documented_headers_and_without_a_slot_none_of_it_and_a_tasks_own_ones_win() -> None:
    seen = await echoed("/a?b=c")
    assert (seen["method"], seen["path"], seen["body"]) == ("GET", "/a?b=c", "")
    ours = {"execution-id": "8", "scheduled-for": "2023-11-14T22:13:20.250000Z", "attempt": "2"}
    named = {"user-agent": f"ChronoTask/{chronotask.__version__}", "idempotency-key": RUN_UUID}
    assert seen["headers"].items() >= (named | {f"x-chronotask-{name}": value for name, value in ours.items()}).items()
    assert not {"authorization", "cookie"} & seen["headers"].keys()
    seen = await echoed("/p?a=1", run=MANUAL_RUN, params={"b": "x y&z", "c": [1, 2.5, True], "d": False})
    assert seen["path"] == "/p?a=1&b=x+y%26z&c=1&c=2.5&c=true&d=false"
    assert "x-chronotask-scheduled-for" not in seen["headers"]
    seen = await echoed(headers={"user-agent": "mine", "IDEMPOTENCY-KEY": "own", "X-A": "ü"}, method="PUT")
    assert (seen["headers"]["user-agent"], seen["headers"]["idempotency-key"], seen["method"]) == ("mine", "own", "PUT")


async def test_runs_share_a_configuration_but_not_secrets_nor_what_tells_them_apart() -> None:
    seen = []
    async with serving(echo) as url, http_client(Settings()) as client:
        headers = {"X-A": "is ${env:CHRONOTASK_SECRET_A}"}
        config = {"url": url + "/", "method": "POST", "body": [1], "headers": headers}
        for number, secret in ((1, "one"), (2, "two")):
            run = dataclasses.replace(SECOND_RUN, execution_id=number, attempt=number)
            environ = {"CHRONOTASK_SECRET_A": secret}
            outcome = await chronotask.run_http(config, run, client, environ, LiveOutput(10000))
            seen.append(output(outcome)["body"]["headers"])
    names = ("x-chronotask-execution-id", "x-chronotask-attempt", "x-a", "content-type")
    rows = [tuple(one[name] for name in names) for one in seen]
    assert rows == [("1", "1", "is one", "application/json"), ("2", "2", "is two", "application/json")]


async def test_a_connection_is_used_again_after_a_whole_answer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chronotask.KEEP_SECONDS", 60)
    ports, ends = list[int](), list[Any]()

    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        ports.append(request.transport.get_extra_info("peername")[1])
        ends.append(request.transport)
        if request.path == "/moved":
            return web.Response(status=307, headers={"Location": "/"})
        return web.Response(status=204) if request.path == "/empty" else web.Response(text="x" * 1_000_000)

    async with serving(handler) as url, http_client(Settings()) as client:

        async def get(path: str, **config: Any) -> None:
            assert (await http_executors(url + path, client=client, **config)).status == "succeeded"

        for path, method in (("/", "GET"), ("/empty", "GET"), ("/", "HEAD"), ("/", "GET")):
            await get(path, method=method)
        assert ports == [ports[0]] * 4
        await get("/moved")  # a redirect gets a connection of its own, which is not kept
        assert ports[4] == ports[0] != ports[5]
        await get("/moved")
        assert ports[7] not in ports[:6]
        await get("/", headers={"connection": "keep-alive, Close"})
        await get("/")
        assert ports[8] not in ports[:8] and ports[9] == ports[0]
        ends[0].get_extra_info("socket").shutdown(socket.SHUT_WR)  # the loop has not heard of it yet
        await get("/")
        assert ports[10] not in ports[:10]


async def test_a_body_is_sent_as_json_or_as_it_is_and_only_with_one_a_content_type_that_the_task_does_not_name() -> None:
    for body, content_type, sent in (
        ({"a": [1, None, "é"]}, "application/json", '{"a": [1, null, "é"]}'),
        ([], "application/json", "[]"),
        ("plain é", "text/plain; charset=utf-8", "plain é"),
    ):
        for headers, seen_type in (({}, content_type), ({"content-type": "application/x"}, "application/x")):
            seen = await echoed(method="POST", body=body, headers=headers)
            assert (seen["headers"]["content-type"], seen["body"]) == (seen_type, sent)
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        assert "content-type" not in (await echoed(method=method))["headers"]
        assert (await echoed(method=method, headers={"content-type": "a/b"}))["headers"]["content-type"] == "a/b"


async def test_a_header_wins_over_auth_and_auth_over_the_url(target: Target) -> None:
    auth, own = {"auth": {"username": "a", "password": "b"}}, {"headers": {"authorization": "Token abcdefgh"}}
    odd = {"auth": {"username": "ü", "password": "p:w"}}
    for userinfo, config in (("", odd), ("u%40:p%2F@", {}), ("u:p@", auth), ("u:p@", auth | own)):
        assert (await http_executors(target.url.replace("//", f"//{userinfo}"), **config)).status == "succeeded"
    basic = [f"Basic {base64.b64encode(text.encode()).decode()}" for text in ("ü:p:w", "u@:p/", "a:b")]
    assert [request.headers["Authorization"] for request in target.requests] == [*basic, "Token abcdefgh"]


async def test_an_answer_is_kept_with_its_headers_and_parsed_json_and_a_long_one_is_clipped_in_the_middle() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-A: 1\r\nx-a: 2\r\nX-a: 3\r\n\r\n"
    shown = output(await answered(head + b'{"a": [1, 2]}'))
    headers = {"Content-Type": "application/json", "X-A": "1, 2, 3"}  # names that differ in case are one
    assert shown == {"status_code": 200, "headers": headers, "body": {"a": [1, 2]}, "body_bytes": 13, "truncated": False}
    long = b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 300000 + b"z" * 300000
    shown = output(await answered(long, settings=Settings(output_limit=1024)))
    assert shown["body"] == "a" * 256 + "\n[… 598976 bytes left out …]\n" + "z" * 768
    assert (shown["body_bytes"], shown["truncated"]) == (600000, True)


def deflated(data: bytes, wbits: int = 31) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return packer.compress(data) + packer.flush()


@each(
    "header sent body",
    ("Type: application/problem+json", b'{"a": 1}', {"a": 1}),
    ("Type: text/plain", b'{"a": 1}', '{"a": 1}'),
    ("Type: text/plain;charset=iso-8859-1", b"caf\xe9", "café"),
    ("Type: image/png", b"caf\xe9", "caf\ufffd"),
    *(  # odd character sets are read as UTF-8
        (f"Type: text/plain; charset={charset}", b"\\ud800 +2AA- caf\xc3\xa9", "\\ud800 +2AA- café")
        for charset in ("idna", "punycode", "unicode_escape", "utf-7", "base64", "rot13", "no-such")
    ),
    # What cannot be written again as JSON stays text.
    *(("Type: application/json", text.encode(), text) for text in ("{broken", "", "[NaN]", "[1e999]", '["\\ud800"]')),
    *(("Type: application/json", text.encode(), text) for text in ("[" * 66 + "]" * 66, "[" * 30000, "1" * 5000)),
    # Behind a byte order mark JSON is JSON.
    ("Type: application/json", b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    ("Type: application/problem+json; charset=utf-8", b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    ("Type: application/json; charset=utf-16", '\ufeff{"a": 1}'.encode("utf-16-le"), {"a": 1}),
    ("Type: application/json; charset=utf-16be", '\ufeff{"a": 1}'.encode("utf-16-be"), {"a": 1}),
    # A coding is undone, or what it is unknown for is kept.
    ("Encoding: br", b"\x0b\x02\x80hello\x03", "\x0b\x02\ufffdhello\x03"),
    *((f"Encoding: {coding}", b"hello", "hello") for coding in ("zstd", "gzip, br", "x-unheard-of", "identity")),
    *((f"Encoding: {coding}", deflated(b"hello"), "hello") for coding in ("gzip", "x-gzip")),
    ("Encoding: GZIP", deflated(b"hello"), "hello"),
    ("Encoding: gzip", deflated(b"hello") + b"\0\0padding", "hello"),
    ("Encoding: gzip", b"", ""),
    *(("Encoding: deflate", deflated(b"hello", wbits), "hello") for wbits in (15, -15)),
)
async def test_json_is_parsed_other_bodies_are_text_and_codings_are_undone(header: str, sent: bytes, body: Any) -> None:
    outcome = await answered(f"HTTP/1.1 200 OK\r\nContent-{header}\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent)
    assert (outcome.status, output(outcome)["body"]) == ("succeeded", body)


async def test_the_status_decides_about_success_and_retry_and_an_unexpected_one_is_explained() -> None:
    for status, config, message, retryable in (
        *((status, {}, None, False) for status in (200, 204)),
        *((status, {"expected_status": [entry]}, None, False) for status, entry in ((404, 404), (404, "400-499"), (503, 503))),
        (200, {"expected_status": ["400-499", 301]}, "answered 200 OK; expected 400-499, 301", False),
        (404, {}, "answered 404 Not Found; expected 200-299", False),
        (404, {"expected_status": [200, "204"]}, "answered 404 Not Found; expected 200, 204", False),
        (302, {}, "answered 302 Found; expected 200-299", False),
        (302, {"follow_redirects": False}, "answered 302 Found; expected 200-299", False),
        *((status, {}, f"answered {status} ", True) for status in (408, 425, 429, 500, 501)),
    ):
        head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Length: 0\r\n"
        outcome = await answered((head + "Location: /\r\n" * bool(config) + "\r\n").encode(), **config)
        assert (outcome.status, outcome.retryable) == ("failed" if message else "succeeded", retryable), status
        assert str(outcome.error_message).startswith(str(message))


@each(
    "sent date seconds",
    ("7", None, 7.0),
    ("0", None, 0.0),
    ("999999999999", None, 3600.0),
    *((bad, None, None) for bad in ("-5", "1.5", "soon", None)),
    ("Wed, 21 Oct 2026 07:28:30 GMT", "Wed, 21 Oct 2026 07:28:00 GMT", 30.0),
    ("Wed, 21 Oct 2026 07:28:00 GMT", "Wed, 21 Oct 2026 07:28:30 GMT", 0.0),
    ("Wed, 21 Oct 2026 10:28:30 GMT", "Wed, 21 Oct 2026 07:28:00 GMT", 3600.0),
    ("Thu, 01 Jan 1970 00:00:42 GMT", None, 22.0),
    ("Thu Jan  1 00:00:42 1970", None, 22.0),  # its oldest form: in GMT, too
)
def test_retry_after_is_seconds_or_a_date_of_at_most_an_hour(sent: str | None, date: str | None, seconds: float | None) -> None:
    headers = {name: value for name, value in (("retry-after", sent), ("date", date)) if value is not None}
    assert chronotask.retry_after(headers, lambda: 20_000_000) == seconds


async def test_the_method_changes_on_redirects_as_in_browsers(target: Target) -> None:
    changes = "301 POST GET, 302 POST GET, 303 POST GET, 303 PUT GET, 303 HEAD HEAD, 301 PUT PUT, 302 DELETE DELETE"
    for number, change in enumerate(f"{changes}, 307 POST POST, 308 PATCH PATCH".split(", "), 1):
        status, method, then = change.split()
        target.answer(int(status), {"Location": "next?x=1"})
        assert (await http_executors(target.url + "/", method=method, body="data")).status == "succeeded"
        kept = (b"data", "text/plain; charset=utf-8") if then == method else (b"", None)
        last = target.requests[-1]
        assert (last.method, last.raw_path) == (then, "/next?x=1"), change
        assert (target.bodies[-1], last.headers.get("Content-Type")) == kept, change
        assert len(target.requests) == 2 * number, change


async def test_a_redirect_that_is_not_followed_fails_for_good() -> None:
    for location, message in (
        ("/again", "more than 10 redirects, the last one to 127.0.0.1"),
        ("", "answered 302 Moved; expected 200-299"),
        *((url, "no http or https URL") for url in ("file:///etc/passwd", "ftp://a/", "http://[::1/", "javascript:alert(1)")),
        ("http://169.254.169.254/", "169.254.169.254:80 may not be called"),
        ("http://0177.0.0.1/", "the host 0177.0.0.1 is neither a name nor an IP address"),
    ):
        outcome = await answered(redirect(location.encode()))
        assert (outcome.status, outcome.retryable, message in str(outcome.error_message)) == ("failed", False, True), location


@each(
    "userinfo more",
    ("", {"headers": {"Authorization": "Bearer 1"}}),
    ("", {"auth": {"username": "u", "password": "p"}}),
    ("u:p@", {}),
)
async def test_credentials_are_not_sent_on_to_another_server_and_its_refusal_says_so(userinfo: str, more: Json) -> None:
    credentials = """Cookie Proxy-Authorization X-Api-Key X-Auth-Token X-Amz-Security-Token X-Hub-Signature My-Password
        Client-Secret X-Session-Id X-Jwt-Assertion X-Pwd X-Tenant Referer""".split()
    config = {**more, "headers": dict.fromkeys(credentials, "a=b") | more.get("headers", {})}

    async def handler(request: web.Request) -> web.Response:
        if request.path in ("/here", "/there"):
            answer = await echo(request)
            answer.set_status(401 if request.path == "/there" else 200)
            return answer
        return web.Response(status=307, headers={"Location": "/here" if request.path == "/same" else other + "/there"})

    async with serving(handler) as other, serving(handler) as url:
        base = url.replace("//", f"//{userinfo}")
        same, away = [await http_executors(base + path, **config) for path in ("/same", "/away")]
    secret = {name.lower() for name in credentials} | {"authorization"}
    assert secret <= set(output(same)["body"]["headers"])
    assert not secret & set(output(away)["body"]["headers"])
    assert "idempotency-key" in output(away)["body"]["headers"]
    left_behind = f"(credentials for {url} were not sent on to {other})"
    assert away.error_message == f"answered 401 Unauthorized; expected 200-299 {left_behind}"


async def test_a_header_or_body_with_a_resolved_secret_stays_with_its_server() -> None:
    environ = {"CHRONOTASK_SECRET_A": "value-of-a"}
    async with serving(echo) as other, talking(lambda *_: (redirect(other.encode(), 307), True)) as (url, _):
        header = await http_executors(url, environ=environ, headers={"Accept": "${env:CHRONOTASK_SECRET_A}"})
        body = await http_executors(url, environ=environ, method="POST", body={"a": "${env:CHRONOTASK_SECRET_A}"})
        alert = await http_executors(url, method="POST", body={"a": "${cause:text}"})
    assert output(header)["body"]["headers"]["accept"] == "*/*"
    assert (body.status, body.retryable, output(alert)["body"]["body"]) == ("failed", False, '{"a": ""}')
    assert body.error_message == f"redirected to {other}, which must not get the secret in the body"


@each("value", '"1,=2"', '{"a":1}, b=c%20d')
async def test_cookies_pass_through_the_redirects_of_an_attempt_and_never_to_the_next_one(target: Target, value: str) -> None:
    for status in (302, 200, 302, 200):
        target.answer(status, {"Location": "/next", "Set-Cookie": f"sid={value}; Path=/"})
    await attempts(target.url + "/", 2, headers={"cookie": "own=a b; sid=0"})
    assert [request.headers.get("Cookie") for request in target.requests] == ["own=a b; sid=0", f"sid={value}; own=a b"] * 2


async def test_secrets_and_credentials_are_masked_in_what_a_server_echoes() -> None:
    async def handler(request: web.Request) -> web.Response:
        headers = {"X-Echo": request.headers["X-Key"], "Content-Type": "application/json"}
        return web.Response(body=json.dumps(dict(request.headers) | {"path": request.raw_path}).encode(), headers=headers)

    config: dict[str, Any] = {
        "headers": {"X-Key": "${env:CHRONOTASK_SECRET_A}", "Cookie": "sid=0123456789"},
        "auth": {"username": "user", "password": "pass-word-1"},
        "params": {"q": "${env:CHRONOTASK_SECRET_A}"},
    }
    async with serving(handler) as url:
        environ = {"CHRONOTASK_SECRET_A": 'va"lue/1', "CHRONOTASK_SECRET_U": f"{url}/hook/1234"}
        shown = output(await http_executors(url, environ=environ, **config))
        hook = await http_executors("${env:CHRONOTASK_SECRET_U}", environ=environ, headers={"X-Key": "k"})
    cut = await answered(b"HTTP/1.1 200 OK\r\n" + b"x" * 170 + b'va"lue/1\r\n\r\n', environ=environ, **config)
    assert str(cut.error_message).endswith("xx*****…")
    echoed = {"X-Key": MASK, "Cookie": MASK, "Authorization": f"Basic {MASK}", "path": f"/?q={MASK}"}
    assert shown["headers"]["X-Echo"] == output(hook)["body"]["path"] == MASK and shown["body"].items() >= echoed.items()


@pytest.mark.slow
async def test_a_compressed_bomb_stays_in_bounded_memory() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join([packer.compress(bytes(1 << 20)) for _ in range(300)]) + packer.flush()
    tracemalloc.start()
    try:
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
        outcome = await answered(head + bomb, timeout=120)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert (outcome.status, output(outcome)["body_bytes"], output(outcome)["truncated"]) == ("succeeded", 300 << 20, True)


async def test_an_answer_that_has_come_when_the_attempt_is_stopped_counts(loopback: Web) -> None:
    """Thrown away, it would be asked for a second time: a payment is made twice."""
    live, loop = LiveOutput(1000), asyncio.get_running_loop()
    loop.call_later(0.05, time.sleep, 0.2)  # a busy turn, in which the answer comes
    loop.call_later(0.15, live.stop, "interrupted")
    outcome = await http_executors(loopback.url("/late"), live=live, method="POST", body="pay")
    assert (outcome.status, output(outcome)["body"][-5:]) == ("succeeded", "\n\npay")


async def test_a_body_without_end_stops_at_the_timeout_with_what_came() -> None:
    async def forever(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    outcome = await answered(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", forever, timeout=0.3)
    assert outcome == Outcome("timed_out", "answered 200, but not completely within 0.3 s", outcome.output, retryable=True)
    assert (output(outcome)["truncated"], output(outcome)["headers"]) == (True, {"Content-Type": "text/plain"})
    outcome = await answered(b"", hang, timeout=0.1)
    assert outcome == Outcome("timed_out", "no answer within 0.1 s", None, retryable=True)


async def test_a_request_is_stopped_from_outside_or_with_its_job() -> None:
    async def stop(writer: asyncio.StreamWriter) -> None:
        live.follower = lambda data: live.stop(reason) if data else None
        await writer.drain()
        await hang(writer)

    packed = b"Content-Encoding: gzip\r\n\r\n" + deflated(b"begin")[:-8]
    plain = b"\r\nbegin"
    cases = ("cancelled", "GET", False, packed), ("interrupted", "GET", True, plain), ("interrupted", "POST", False, plain)
    for reason, to, retryable, sent in cases:
        live = Watched(1000)
        outcome = await answered(b"HTTP/1.1 200 OK\r\n" + sent, stop, live=live, method=to)
        assert (outcome.status, outcome.retryable, output(outcome)["body"]) == (reason, retryable, "begin")
    started = asyncio.Event()
    running = asyncio.ensure_future(answered(b"", lambda writer: started.set() or hang(writer)))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_host_or_name_that_cannot_be_reached_is_named_without_the_password() -> None:
    async with serving(echo) as url:
        port = url.rpartition(":")[2]
        assert (await http_executors(url.replace("127.0.0.1", "localhost"))).status == "succeeded"
    outcome = await http_executors(f"http://user:geheim@127.0.0.1:{port}/geheim")
    assert outcome == Outcome("failed", f"could not connect to 127.0.0.1:{port}: connection refused", None, retryable=True)
    assert "connect to [::1]:1: " in str((await http_executors("http://[::1]:1/")).error_message)
    outcome = await http_executors("http://user:geheim@no-such-host.invalid/")
    assert (outcome.status, outcome.retryable) == ("failed", True)
    assert str(outcome.error_message).startswith("the name no-such-host.invalid could not be resolved: ")
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "chronotask-getaddrinfo")
    for url in ("http://a..b/", "http://" + "a" * 64 + ".example/", "http://user:geheim@a..b/", "http://a b/", "http://a\nb/"):
        outcome = await http_executors(url)
        assert outcome.status == "failed" and not re.search("geheim|unexpected", str(outcome.error_message)), url


async def test_metadata_addresses_are_refused_and_private_ones_when_blocked_however_they_are_written() -> None:
    metadata = "169.254.169.254 [fe80::1] [::ffff:169.254.169.254] 0xa9fea9fe 2852039166"
    private = "127.0.0.1 localhost 2130706433 0x7f.1 0 127.1 [::ffff:127.0.0.1]"
    async with talking(lambda *_: (OK, True)) as (url, called):
        for hosts, port, blocked, said in (
            (metadata, "", False, "link-local and cloud metadata addresses are refused (CHRONOTASK_ALLOWED_NETWORKS)"),
            (private, url[16:], True, "private addresses are refused (CHRONOTASK_BLOCK_PRIVATE_NETWORKS)"),
        ):
            for host in hosts.split():
                settings = Settings(block_private_networks=blocked)
                outcome = await http_executors(f"http://{host}{port}/latest/meta-data/", settings=settings, timeout=5)
                assert (outcome.status, outcome.retryable, called) == ("failed", False, []), host
                assert str(outcome.error_message).endswith((said, "nor an IP address"))


# A certificate for localhost and 127.0.0.1 that nobody trusts, valid for a hundred years. Made for these tests alone.
TLS_PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg1P6Pf12FIqVQ9Ezzcm/PgAWLjVkLezyaKTcKatQvz2yhRANCAATvPPmYmI5Kkz7FCsmhz9RHfIgD/+7P
QAem9tuNylFU9XOR2UgAPGxLJbaRg6/GP3by2Vxv3G+m7QReK0OvhSq2
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBnDCCAUGgAwIBAgIUZgkkd5YhQz0+r+WtHi+gtYyYv4QwCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNDA1MjcyMVoYDzIxMjYxMDMx
MDUyNzIxWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATvPPmYmI5Kkz7FCsmhz9RHfIgD/+7PQAem9tuNylFU9XOR2UgAPGxL
JbaRg6/GP3by2Vxv3G+m7QReK0OvhSq2o28wbTAdBgNVHQ4EFgQUqZ80LLQWS0dork9SLVw0qO1rEPkwHwYDVR0jBBgwFoAUqZ80LLQWS0dork9SLVw0qO1rEPkwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZIzj0EAwIDSQAwRgIhAL9OQ+ECnk8KutFqW3Dqm7OkIZ/jfHHWb66SBe7KrhoSAiEA
vLLkAGLgVxgX6VSmwLksAP8GK7CQV5QEoJJ1p/GyATg=
-----END CERTIFICATE-----
"""


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    (tmp_path / "tls.pem").write_text(TLS_PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.pem")
    return context


async def test_an_untrusted_certificate_is_refused_unless_verify_tls_is_false_and_no_tls_is_said(tls: ssl.SSLContext) -> None:
    async with serving(echo, tls) as url, serving(echo) as plain:
        outcomes = [await http_executors(url), await http_executors(plain.replace("http:", "https:"))]
        assert (await http_executors(url, verify_tls=False)).status == "succeeded"
    assert [(outcome.status, outcome.retryable) for outcome in outcomes] == [("failed", False), ("failed", True)]
    said = "the TLS certificate of 127.0.0.1 is refused: self-signed certificate (verify_tls: false accepts any)"
    assert outcomes[0].error_message == said
    assert re.fullmatch(r"TLS with 127\.0\.0\.1:\d+ failed: .+", str(outcomes[1].error_message))


async def test_more_requests_than_a_connection_pool_holds_run_at_once_and_by_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    all_here = asyncio.Barrier(150)
    for name, value in (("HTTP_PROXY", "http://127.0.0.1:1/"), ("http_proxy", "http://127.0.0.1:1/"), ("no_proxy", "")):
        monkeypatch.setenv(name, value)

    async def handler(request: web.Request) -> web.Response:
        await all_here.wait()
        return web.Response()

    async with serving(handler) as url, http_client(Settings()) as client:
        outcomes = await asyncio.gather(*(http_executors(url, client=client) for _ in range(150)))
    assert {outcome.status for outcome in outcomes} == {"succeeded"}


async def test_a_bug_in_an_executor_is_a_failed_attempt_and_shows_no_value_and_where_no_thread_is_left_may_pass(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_is_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    unexpected = "unexpected {} in ChronoTask: its log has the details"
    assert await http_executors("http://a/", timeout="geheim") == Outcome("failed", unexpected.format("TypeError"))
    assert "geheim" not in caplog.text
    monkeypatch.setattr(threading.Thread, "start", none_is_left)
    assert await http_executors("http://a/") == Outcome("failed", unexpected.format("RuntimeError"), retryable=True)
    monkeypatch.undo()  # the loop ends with a thread


async def test_an_address_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(echo) as url:
        port = int(url.rpartition(":")[2])
        with contextlib.ExitStack() as sockets:
            dead = sockets.enter_context(socket.create_server(("127.0.0.3", port), backlog=0))
            for _ in range(3):  # its queue is full: the kernel answers no more
                waiting = sockets.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(dead.getsockname())
            async with http_client(Settings()) as client:
                for name, addresses in (("many", ["127.0.0.3", "127.0.0.2", "127.0.0.1"]), ("one", ["127.0.0.2"])):
                    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]
                    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found: found)
                    config = {"timeout": 10, "headers": {"Connection": "close"}}
                    outcome = await http_executors(f"http://{name}:{port}/", client=client, **config)
                    assert outcome.status == ("succeeded" if name == "many" else "failed")
    assert outcome.error_message == f"could not connect to one:{port}: connection refused"


# ---- http: what real servers do, and curl takes


@contextlib.asynccontextmanager
async def talking(
    answer: Callable[[str, int], tuple[bytes, bool]], ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that keeps connections: `answer` gets the request line and its number on this connection, and gives bytes and
    whether the connection ends behind them. The URL, and the request lines so far."""
    seen: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in itertools.count():
            head = await reader.readuntil(b"\r\n\r\n")
            seen.append(head.split(b" HTTP/")[0].decode())
            if length := re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE):
                await reader.readexactly(int(length[1]))
            data, ends = answer(seen[-1], number)
            writer.write(data)
            await writer.drain()
            if ends:
                break

    async with conversing(talk, ssl_context) as url:
        yield url, seen


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def attempts(url: str, count: int, **config: Any) -> list[Outcome]:
    """One after another, by the same client."""
    async with http_client(Settings()) as client:
        return [await http_executors(url, client=client, **config) for _ in range(count)]


def redirect(location: bytes, status: int = 302) -> bytes:
    return b"HTTP/1.1 %d Moved\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % (status, location)


@each(
    "body status location then",
    *(("paid", code, b"/next", [then]) for code, then in ((302, "GET /next"), (303, "GET /next"), (307, "POST /next"))),
    ("paid", 303, b"//127.0.0.1:PORT/next", ["GET /next"]),
    *((body, 200, b"", []) for body in (None, "paid", "x" * 1_000_000)),
)
async def test_a_server_that_closes_unsaid(body: str | None, status: int, location: bytes, then: list[str]) -> None:
    async with talking(lambda to, _: (OK, False) if to[-5:] == "/next" else (redirect(place, status), True)) as (url, seen):
        place = location.replace(b"PORT", url.rpartition(":")[2].encode())
        assert {outcome.status for outcome in await attempts(url + "/", 20, method="POST", body=body)} == {"succeeded"}
    assert seen == ["POST /", *then] * 20


async def test_a_server_that_closes_at_once_is_not_asked_for_ever() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(1)

    asked: list[int] = []
    async with conversing(talk) as url:
        outcomes = await attempts(url, 2, method="POST", body="x" * 1_000_000)
        said = str((await http_executors(url.replace("http:", "https:"))).error_message)
    assert [outcome.status for outcome in outcomes] == ["failed"] * 2 and len(asked) <= 23
    assert ": connection reset" in said


async def test_an_idle_connection_is_not_used_again_for_long_as_servers_close_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chronotask.KEEP_SECONDS == 0.5
    monkeypatch.setattr("chronotask.KEEP_SECONDS", 0.1)
    numbers = list[int]()
    async with talking(lambda _, number: (numbers.append(number) or OK, False)) as (url, _), http_client(Settings()) as client:
        for _ in range(3):
            await http_executors(url, client=client)
            await asyncio.sleep(0.15)
    assert numbers == [0, 0, 0]


@each("method", "GET", "PUT", "DELETE", "POST")
async def test_a_request_is_sent_once_and_a_post_into_no_kept_connection(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr("chronotask.KEEP_SECONDS", 60)
    async with talking(lambda request, number: (OK if number == 0 else b"", number > 0)) as (url, seen):
        ends = [(end.status, end.error_message, end.retryable) for end in await attempts(url, 2, method=method)]
    broken = ("failed", "the server closed the connection without an answer", True)
    assert ends == [("succeeded", None, False), ("succeeded", None, False) if method == "POST" else broken]
    assert len(seen) == 2


async def test_an_answer_before_the_end_of_a_request_counts_and_is_no_reason_to_send_it_again() -> None:
    asked, too_large = list[str](), b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"
    outcome = await answered(too_large, lambda to: asked.append("once") or hang(to), method="POST", body="x" * 1_000_000)
    assert (outcome.error_message, outcome.retryable) == ("answered 413 Too Large; expected 200-299", False)
    assert asked == ["once"]


@each(
    "method answer body",
    ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello", ""),
    ("GET", b"HTTP/1.1 204 No Content\r\n\r\n{}\n", ""),
    ("GET", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ""),
    ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nhello", ""),
    ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", ""),
    ("GET", OK + b"garbage", "ok"),
    ("GET", OK.replace(b"\r\n", b"\r\nX-Folded: a\r\n b\r\n", 1), "ok"),
    ("GET", OK.replace(b"\r\n", b"\n").replace(b" OK", b""), "ok"),
    ("GET", OK + b"\r\n\r\n<html>", "ok"),
    ("GET", OK + b"HTTP/1.1 500 Forged\r\nContent-Length: 6\r\n\r\nforged", "ok"),
    ("GET", b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 500 Forged\r\nContent-Length: 6\r\n\r\nforged", ""),
    ("GET", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nokgarbage", "ok"),
    ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n1\r\n!\r\n0\r\nX: 1\r\n\r\ngarbage", "ok!"),
    ("GET", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\nokgarbage", "ok"),
    ("GET", b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 60_000 + b"\r\nContent-Length: 2\r\n\r\nok", "ok"),
    ("GET", b"HTTP/1.1 200 OK\r\n" + b"Set-Cookie: a=b\r\n" * 900 + b"Content-Length: 2\r\n\r\nok", "ok"),
    ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\ncontent-length: 2 , 2\r\n\r\nok!", "ok"),
    ("GET", b"HTTP/1.1 200 OK\nTransfer-Encoding: Chunked\nContent-Length:9\n\n2 ; a = b\nok\n1;\r\n!\n0\nX\n\ngarbage", "ok!"),
)
async def test_a_complete_answer_stands_whatever_follows_it(tls: ssl.SSLContext, method: str, answer: bytes, body: str) -> None:
    for context in (None, tls):
        async with talking(lambda request, number: (answer, False), context) as (url, seen):
            outcomes = await attempts(url, 3, method=method, expected_status=["200-399"], verify_tls=False)
        assert [(outcome.status, (outcome.output or {})["body"]) for outcome in outcomes] == [("succeeded", body)] * 3
        assert len(seen) == 3
    whole = b""
    for size in (len(answer), *((1, 2, 3, 7) if len(answer) < 1000 else (1000,))):
        one, pieces = (
            chronotask._OneAnswer(method, LiveOutput(0)),
            iter([answer[at : at + size] for at in range(0, len(answer), size)]),
        )
        taken = b"".join(iter(partial(one.read, partial(next, pieces, b"")), b""))
        whole = whole or taken
        assert (taken, one.read(lambda: b"more")) == (whole, b"")


async def test_an_endless_head_or_trailer_and_lines_that_are_no_chunks_are_given_up() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)  # until what was before has been read
        while True:
            writer.write(b"X-A: " + b"a" * 60_000 + b"\r\n")
            await writer.drain()

    said = "the connection failed: the head of the answer is larger than 307200 bytes"
    outcomes = [await answered(b"HTTP/1.1 200 OK\r\n", endless, method=method) for method in ("GET", "POST")]
    assert [(one.error_message, one.retryable) for one in outcomes] == [(said, True), (said, False)]
    for begin in (b"0\r\n", b"2\r\nok\r\n"):
        assert (await answered(CHUNKED + begin, endless)).error_message == BROKE_OFF, begin


INVALID = "the server's answer is not valid HTTP: "
BROKE_OFF = "the answer broke off before its end, or could not be decoded"
BAD_DEFLATE = zlib.compress(b"x" * 1000)[:-8] + b"garbage!"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@each(
    "answer message post_again",
    (b"", "the server closed the connection without an answer", True),
    (b"SSH-2.0-OpenSSH\r\n\r\n", INVALID, False),
    (b"HTTP/1.1 200 OK\r\nConte", "", False),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", BROKE_OFF, False),
    (CHUNKED + b"5\r\nhel", "", False),
    (CHUNKED + b"oops\r\n", "", False),
    (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nhalf", BROKE_OFF, False),
    (b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\nContent-Length: 29\r\n\r\n" + BAD_DEFLATE, BROKE_OFF, False),
    (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", INVALID, False),
    (b"HTTP/1.1 200 OK\r\n" + b"a:b\r\n" * 1_001 + b"\r\n", INVALID + "Too many headers received", False),
)
async def test_what_cannot_be_read_is_retried_but_no_reason_to_post_again(answer: bytes, message: str, post_again: bool) -> None:
    outcomes = [await answered(answer, method=method) for method in ("GET", "PUT", "POST", "PATCH")]
    assert [outcome.status for outcome in outcomes] == ["failed"] * 4
    assert all(str(outcome.error_message).startswith(message) for outcome in outcomes)
    assert [outcome.retryable for outcome in outcomes] == [True, True, post_again, post_again]


async def test_a_post_that_was_answered_is_not_sent_again_for_what_follows() -> None:
    async with talking(lambda to, _: (b"", True) if to[-2:] == "/x" else (redirect(b"/x", int(to[-3:])), False)) as (url, _):
        moved = [await http_executors(url + path, method="POST") for path in ("/303", "/307")]
    assert [outcome.retryable for outcome in moved] == [False, True]
    for begin in (b"HTTP/1.1 200 OK\r\n\r\nbegin", b"HTTP/1.1 200 O"):
        late = [await answered(begin, hang, method=method, timeout=0.1) for method in ("POST", "GET")]
        assert [(outcome.status, outcome.retryable) for outcome in late] == [("timed_out", False), ("timed_out", True)]


@each("begin again", (b"", True), (b"HTTP/1.1 200 O", False), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", False))
async def test_a_connection_that_is_reset_within_an_answer(tls: ssl.SSLContext, begin: bytes, again: bool) -> None:
    async def reset(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)  # until it has been read: a reset takes away what has not
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    for context in (None, tls):
        outcomes = [await answered(begin, reset, context, method=method, verify_tls=False) for method in ("GET", "POST")]
        assert [(outcome.status, outcome.retryable) for outcome in outcomes] == [("failed", True), ("failed", again)]


async def test_a_url_is_sent_and_a_redirect_followed_as_it_is_written() -> None:
    def answer(request: str, number: int) -> tuple[bytes, bool]:
        return redirect(place or b"/") if request == f"GET {moved or '/'}" else OK, True

    for written, path, followed in (  # bytes: as a redirect only, from a URL without a path
        *((same, same, same) for same in ("/a%3Ab%2Fc%2Cd%2fe?x=%3A%2F%2C%7E", "/a:b,c~d;e=f!$&'()*+@?x=:/,?~@!$'()*+;")),
        ("/a/../b/./c", "/a/../b/./c", "/b/c"),
        ("?x=%41", "/?x=%41", "/away/to?x=%41"),
        ("/é?ü=%C3%A9", *["/%C3%A9?%C3%BC=%C3%A9"] * 2),
        ('/{"a"}|^`<>', *['/{"a"}|^`<>'] * 2),
        ("/a#fragment", "/a", "/a"),
        ("", "/", "/"),
        (b"/caf\xe9?a=\xe9", None, "/caf%E9?a=%E9"),
        (b" next page ", None, "/next%20page"),
        (b"?b=%2F", None, "/?b=%2F"),
        (b"http://localhost:PORT/x%2Fy", None, "/x%2Fy"),
        (b"//user:pass@localhost:PORT?q", None, "/?q"),
    ):
        async with talking(answer) as (base, seen):
            place = written.encode() if isinstance(written, str) else written.replace(b"PORT", base.rpartition(":")[2].encode())
            asked, moved = ([base + written], "/away/to") if isinstance(written, str) else ([], "")
            assert {(await http_executors(url)).status for url in (*asked, base + moved)} == {"succeeded"}
        assert seen == [*(f"GET {path}" for _ in asked), f"GET {moved or '/'}", f"GET {followed}"], written


# ======================================================================================================================
# 8. Engine
# ======================================================================================================================


# --- Slots, end to end ------------------------------------------------------------------------------------------------


RAN, MADE_UP, MISSED = ("schedule", "succeeded"), ("catchup", "succeeded"), ("schedule", "missed")


def all_ran(*slots: int) -> list[tuple[str, str, int]]:
    return [(*RAN, slot) for slot in slots]


async def test_a_slot_fires_at_its_time_and_not_before(rig: Rig) -> None:
    assert rig.clock.until is None, "nothing is planned"
    schedule_id = await rig.schedule(await rig.task())
    await rig.at(59.999)
    assert await rig.rows() == []
    assert rig.clock.until == START + 60 * S
    await rig.run_at(60)
    (row,) = await rig.rows()
    assert (row["schedule_id"], row["trigger"], row["status"], row["success"]) == (schedule_id, "schedule", "succeeded", True)
    assert (row["scheduled_for"], row["queued_at"]) == ("2026-01-01T00:01:00Z", "2026-01-01T00:01:00Z")
    assert rig.clock.until == START + 120 * S
    for view in (await rig.service.get_schedule(schedule_id), await rig.service.get_task(1)):
        assert (view["run_count"], view["last_run"]) == (1, "2026-01-01T00:01:00Z")


async def test_claiming_a_slot_and_moving_the_schedule_on_is_one_transaction_and_a_unique_key_guards_a_slot(rig: Rig) -> None:
    await rig.schedule(await rig.task())
    rig.clock.advance(60)
    for event in ("UPDATE OF next_slot ON schedules", "INSERT ON executions"):
        rig.sql(f"CREATE TRIGGER t BEFORE {event} BEGIN SELECT RAISE(ABORT, 'planted'); END")
        with pytest.raises(Unavailable, match="planted"):
            await rig.service.engine.tick()
        assert rig.sql("SELECT settled_until, (SELECT count(*) FROM executions) FROM schedules") == [(START, 0)]
        rig.sql("DROP TRIGGER t")
    await rig.run_at(60)
    assert await rig.brief() == [("schedule", "succeeded", 60)]
    assert rig.sql("SELECT settled_until FROM schedules") == [(START + 60 * S,)]
    columns = "task_id, schedule_id, trigger, status, scheduled_for, queued_at, uuid"
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        rig.sql(f"INSERT INTO executions ({columns}) VALUES (1, 1, 'catchup', 'queued', ?, 1, 'u')", START + 60 * S)


async def test_an_execution_is_on_disk_before_the_answer_and_running_before_its_side_effect(rig: Rig, target: Target) -> None:
    execution_id = await rig.execute(await rig.task(**target.config("/hold")))
    assert rig.sql("SELECT id, status, trigger FROM executions") == [(execution_id, "queued", "manual")]
    await rig.tick()
    await until_true(lambda: target.held, 20)
    assert rig.sql("SELECT status, attempt FROM executions") == [("running", 1)]
    await rig.let_go(target)


async def test_a_schedule_is_over_after_its_last_slot_and_cannot_be_switched_on_as_it_is(rig: Rig) -> None:
    ends = (
        ({"schedule_type": "once"}, [60], "schedule_config.datetime"),
        ({"max_runs": 2}, [60, 120], "max_runs"),
        ({"start_at": "2026-01-01T00:02:00Z", "end_at": "2026-01-01T00:03:00Z"}, [120, 180], "end_at"),  # both inclusive
    )
    for fields, _, _ in ends:
        await rig.schedule(await rig.task(), **fields)
    await rig.run_at(60, 120, 180, 240)
    for schedule_id, (_, slots, refused) in enumerate(ends, 1):
        assert await rig.brief(schedule_id=schedule_id) == [("schedule", "succeeded", slot) for slot in slots]
        view = await rig.service.get_schedule(schedule_id)
        assert (view["is_active"], view["next_run"], view["run_count"], view["upcoming"]) == (False, None, len(slots), [])
        assert await refused_fields(rig.patch_schedule(schedule_id, is_active=True)) == [refused]
    view = await rig.patch_schedule(2, is_active=True, max_runs=3)
    assert (view["is_active"], [offset(slot["utc"]) for slot in view["upcoming"]]) == (True, [300])


async def test_jitter_moves_the_firing_but_not_the_slot_and_lateness_is_counted_from_there(rig: Rig) -> None:
    schedule_id = await rig.schedule(await rig.task(), jitter=30)
    view = await rig.service.get_schedule(schedule_id)
    fires = offset(view["next_run"])
    assert 60 < fires <= 90  # derived from the id and the slot: the same for ever
    assert view["upcoming"][0]["utc"] == view["next_run"]
    await rig.at(fires - 0.001)
    assert await rig.rows() == []
    await rig.run_at(fires + 4.9)
    assert await rig.brief() == [("schedule", "succeeded", 60)]
    late = (await chronotask.get_scheduler_status(rig.service))["lateness"]
    assert late["count"] == 1 and late["max"] == pytest.approx(4.9)


async def test_a_change_of_a_schedule_takes_effect_at_once_in_the_timer_queue(rig: Rig) -> None:
    schedule_id = await rig.schedule(await rig.task(), schedule_config={"seconds": 3600}, is_active=False)
    await rig.tick()
    assert rig.clock.until is None
    await rig.patch_schedule(schedule_id, schedule_config={"seconds": 10}, is_active=True)
    await rig.run_at(10)
    assert await rig.brief() == [("schedule", "succeeded", 10)]
    await rig.service.delete_schedule(schedule_id)
    await rig.at(20)
    assert len(await rig.rows()) == 1
    assert rig.clock.until is None
    schedule_id = await rig.schedule(1)
    for seconds in range(100, 120):
        rig.service.engine._most_timers = 8
        await rig.patch_schedule(schedule_id, schedule_config={"seconds": seconds})
        await rig.tick()
        assert len(rig.service.engine._timers) <= 9, "of instants at which nothing is due any more"


# --- Bursts -----------------------------------------------------------------------------------------------------------


async def test_each_tick_claims_a_batch_that_grows_with_what_runs_and_starts_what_fits(open_rig: OpenRig, target: Target) -> None:
    rig = await open_rig(max_concurrent_runs=270)
    task_id = await rig.task(**target.config("/hold"))
    for _ in range(300):
        await rig.schedule(task_id, "once", overlap="allow")
    rig.clock.advance(60)
    seen = []
    for _ in range(4):
        await rig.service.engine.tick()
        seen.append(Counter(await rig.statuses()))
    assert seen == [{"running": 4}, {"running": 24}, {"running": 124}, {"running": 270, "queued": 30}]
    await rig.let_go(target)
    assert Counter(await rig.statuses()) == {"succeeded": 300}


async def burst(open_rig: OpenRig, count: int, **fields: Any) -> tuple[Rig, list[int], asyncio.Future[None]]:
    """Executions that a tick under way begins: they are `running` on disk, and the first of them has a job."""
    rig = await open_rig(max_concurrent_runs=count)
    task_id = await rig.task(**fields)
    ids = [await rig.execute(task_id) for _ in range(count)]
    tick = asyncio.ensure_future(rig.service.engine.tick())
    while (active := rig.service.engine.running.get(ids[0])) is None or active.job is None:
        await asyncio.sleep(0)
    return rig, ids, tick


@each("kind", "http", "bash")
async def test_a_burst_begins_little_by_little_so_that_others_have_the_loop(open_rig: OpenRig, target: Target, kind: str) -> None:
    fields = target.config("/hold") if kind == "http" else {"config": {"command": "sleep 30"}}
    rig, _, tick = await burst(open_rig, 12, **fields)
    for begun in (4, 8, 12):
        assert sum(active.job is not None for active in rig.service.engine.running.values()) == begun
        await asyncio.sleep(0)
    await tick


async def test_what_is_cancelled_before_it_has_begun_starts_nothing(open_rig: OpenRig, tmp_path: Path) -> None:
    config = {"command": f"touch {tmp_path}/$CHRONOTASK_EXECUTION_ID; sleep 0.1"}
    rig, ids, tick = await burst(open_rig, 20, config=config)
    assert rig.service.engine.running[ids[-1]].job is None
    rig.service.engine.stop_run(ids[-1])
    await tick
    await rig.finish()
    assert Counter(await rig.statuses()) == {"succeeded": 19, "cancelled": 1}
    assert not (tmp_path / str(ids[-1])).exists()


async def test_a_stop_begins_nothing_more(open_rig: OpenRig, tmp_path: Path) -> None:
    config = {"command": f"touch {tmp_path}/$CHRONOTASK_EXECUTION_ID; sleep 30"}
    rig, _, tick = await burst(open_rig, 40, config=config, max_retries=1)
    await rig.close()
    await tick
    assert rig.sql("SELECT status, count(*) FROM executions GROUP BY 1") == [("retrying", 40)]
    assert len(list(tmp_path.glob("[0-9]*"))) <= 4


async def test_a_stop_while_a_tick_is_being_written_leaves_nothing_running(open_rig: OpenRig, tmp_path: Path) -> None:
    """What that tick starts has its row on disk, and must get its end."""
    rig = await open_rig(max_concurrent_runs=100)
    task_id = await rig.task(config={"command": f"touch {tmp_path}/$CHRONOTASK_EXECUTION_ID; sleep 30"})
    for _ in range(60):
        await rig.execute(task_id)
    async with held_up(rig.service.store):
        tick = asyncio.ensure_future(rig.service.engine.tick())
        await asyncio.sleep(0)
        stop = asyncio.ensure_future(rig.close())
        await asyncio.sleep(0.05)
        assert not stop.done()
    await asyncio.gather(tick, stop)
    assert rig.sql("SELECT status, count(*) FROM executions GROUP BY 1") == [("interrupted", 60)]
    assert list(tmp_path.glob("[0-9]*")) == []


# --- Catch-up, overlap and pause, end to end --------------------------------------------------------------------------


async def test_missed_slots_are_caught_up_by_policy_and_one_by_one(rig: Rig, open_rig: OpenRig, target: Target) -> None:
    policies = {
        "latest": [(*MISSED, 60), (*MADE_UP, 180)],
        "skip": [(*MISSED, 60)],
        "all": [(*MADE_UP, 60), (*MADE_UP, 120), (*MADE_UP, 180)],
    }
    for catchup in policies:
        await rig.schedule(await rig.task(**target.config("/hold")), catchup=catchup, overlap="allow")
    later = await restarted(rig, open_rig, 200)
    assert await later.statuses(schedule_id=3) == ["running", "queued", "queued"]
    await later.let_go(target)
    for schedule_id, expected in enumerate(policies.values(), 1):
        assert await later.brief(schedule_id=schedule_id) == expected
    assert later.clock.until == START + 240 * S
    slots = [request.headers["X-ChronoTask-Scheduled-For"] for request in target.requests]
    assert slots[-2:] == ["2026-01-01T00:02:00Z", "2026-01-01T00:03:00Z"]


@each(
    "overlap first then why",
    ("skip", "running skipped skipped", "succeeded skipped skipped", "the previous execution is still running"),
    ("queue", "running queued skipped", "succeeded succeeded skipped", "another execution is already waiting"),
    ("allow", "running running running", "succeeded succeeded succeeded", ""),
)
async def test_overlap_skips_queues_or_allows(rig: Rig, target: Target, overlap: str, first: str, then: str, why: str) -> None:
    schedule_id = await rig.schedule(await rig.task(**target.config("/hold")), overlap=overlap)
    await rig.at(60, 120, 180)
    assert await rig.statuses() == first.split()
    await rig.let_go(target)
    assert await rig.statuses() == then.split()
    if why:
        last = (await rig.rows())[-1]
        empty = [last[name] for name in ("success", "duration", "started_at", "attempt", "retry_count")]
        assert (empty, last["error_message"]) == ([None, None, None, 0, 0], f"skipped: {why} (overlap={overlap})")
    assert (await rig.service.get_schedule(schedule_id))["run_count"] == then.count("succeeded")


async def backfilled(rig: Rig, schedule_id: int, first: str, last: str, **more: Any) -> tuple[list[int], list[int]]:
    """Seconds from START to the slots, and the ids."""
    body = parse(chronotask.BackfillBody, {"from": first, "to": last, **more})
    answer = await chronotask.backfill_schedule(rig.service, schedule_id, body)
    return [offset(slot["utc"]) for slot in answer["slots"]], answer["executions"]


async def test_a_backfill_runs_the_slots_that_have_not_run_one_after_the_other_and_once(rig: Rig, target: Target) -> None:
    task_id = await rig.task(**target.config("/hold"))
    schedule_id = await rig.schedule(task_id, "cron", schedule_config={"expression": "0 * * * *"}, catchup="skip", max_runs=5)
    await rig.at(3600, 7200)  # the first runs, and holds up the next
    await rig.let_go(target)
    await rig.at(14_500)  # 3 and 4 o'clock are missed
    span = ("2025-12-31T23:00:00Z", "2026-01-01T04:00:00Z")
    missing = [-3600, 0, 7200, 10_800, 14_400]
    assert await backfilled(rig, schedule_id, *span, dry_run=True) == (missing, [])
    assert (await rig.brief(trigger="backfill")) == []
    target.let_go.clear()
    slots, ids = await backfilled(rig, schedule_id, *span)
    assert (slots, len(ids)) == (missing, 5)
    assert await backfilled(rig, schedule_id, *span) == ([], []), "asked twice it adds nothing"
    await rig.tick()
    await rig.tick()
    assert await rig.statuses(trigger="backfill") == ["running", "queued", "queued", "queued", "queued"]
    await rig.let_go(target)
    assert await rig.brief(trigger="backfill") == [("backfill", "succeeded", slot) for slot in missing]
    begun = [str(row["started_at"]) for row in await rig.rows(trigger="backfill")]
    assert begun == sorted(begun)
    assert await rig.statuses(trigger="schedule") == ["succeeded", "skipped", "missed"], "these rows stay"
    assert await backfilled(rig, schedule_id, *span) == ([], [])
    assert (await rig.service.get_schedule(schedule_id))["run_count"] == 1


async def test_a_backfill_keeps_to_bounds_and_excluded_days_and_leaves_due_slots_to_the_tick(rig: Rig) -> None:
    noons = {"schedule_config": {"expression": "0 12 * * *"}, "exclude": ["2025-12-30"], "start_at": "2025-12-29"}
    schedule_id = await rig.schedule(await rig.task(), "cron", **noons)
    assert (await backfilled(rig, schedule_id, "2025-12-01", "2025-12-31"))[0] == [-216_000, -43_200]
    rig.clock.advance(12 * 3600 + 1)
    assert await backfilled(rig, schedule_id, "2026-01-01", "2026-01-01T12:00:01Z", dry_run=True) == ([], [])
    await rig.tick()
    assert ("schedule", 43_200) in [(row[0], row[2]) for row in await rig.brief()]


async def test_a_backfill_that_cannot_be_is_refused_and_leaves_nothing(api: Api) -> None:
    task_id = await api.task()
    schedule_id = await api.schedule(task_id, schedule_type="cron", schedule_config={"expression": "* * * * *"})
    past = {"from": "2025-12-31T00:00", "to": "2025-12-31T10:00"}
    for change, status, fields in (
        ({"to": "2026-01-02"}, 422, ["to"]), ({"from": "2026-01-03", "to": "2026-01-03"}, 422, ["from", "to"]),
        ({"from": "x"}, 422, ["from"]), ({"from": "2025-12-31T11:00"}, 422, ["from"]), ({"to": "2025-12-31T16:40"}, 422, ["to"]),
        ({"when": 1}, 422, ["when"]),
    ):  # fmt: skip
        problem_of(await api("POST", f"/schedules/{schedule_id}/backfill", {**past, **change}), status, *fields)
    after = {"schedule_type": "after", "schedule_config": {"any": True, "on": ["failure"]}}
    problem_of(await api("POST", f"/schedules/{await api.schedule(task_id, **after)}/backfill", past), 422, "")
    problem_of(await api("POST", "/schedules/99/backfill", past), 404)
    answer = await api("POST", f"/schedules/{schedule_id}/backfill", {**past, "dry_run": True})
    assert (answer.status, len(answer.json["slots"]), answer.json["executions"]) == (200, 601, [])
    api.rig.sql("CREATE TRIGGER fault AFTER INSERT ON executions WHEN new.id > 300 BEGIN SELECT RAISE(ABORT, 'full'); END")
    problem_of(await api("POST", f"/schedules/{schedule_id}/backfill", past), 503)
    assert (await api.get("/executions"))["executions"] == [], "all or nothing"
    await api("PATCH", f"/tasks/{task_id}", {"status": "disabled"})
    problem_of(await api("POST", f"/schedules/{schedule_id}/backfill", past), 409)
    api.rig.sql("DROP TRIGGER fault")
    await api("PATCH", f"/tasks/{task_id}", {"status": "paused"})
    answer = await api("POST", f"/schedules/{schedule_id}/backfill", {**past, "to": "2025-12-31T00:01"})
    assert (answer.status, "Location" in answer.headers, answer.json["executions"]) == (202, False, [1, 2])


async def test_an_excluded_day_has_no_slot_no_row_and_is_not_upcoming(rig: Rig) -> None:
    zone, holidays = {"expression": "0 9 * * *", "timezone": "Europe/Berlin"}, ["2026-01-02", "2026-01-04/2026-01-05"]
    schedule_id = await rig.schedule(await rig.task(), "cron", schedule_config=zone, exclude=holidays, catchup="all")
    view = await rig.service.get_schedule(schedule_id)
    assert view["exclude"] == holidays
    assert [slot["local"][8:16] for slot in view["upcoming"]] == ["01T09:00", "03T09:00", "06T09:00", "07T09:00", "08T09:00"]
    await rig.run_at(*(day * 86_400 + 8 * 3600 for day in range(5)))
    assert [row[2] // 86_400 for row in await rig.brief()] == [0, 2]
    assert (await rig.patch_schedule(schedule_id, exclude=[]))["next_run"] == "2026-01-06T08:00:00Z"
    assert (await rig.patch_schedule(schedule_id, exclude=["2026-01-06"]))["next_run"] == "2026-01-07T08:00:00Z"


async def test_the_slots_of_a_day_that_is_excluded_in_its_zone_are_not_missed_either(rig: Rig, open_rig: OpenRig) -> None:
    """The day of New York is from 5 to 5 o'clock UTC."""
    config = {"seconds": 3600, "start_date": "2026-01-01T00:00:00Z", "timezone": "America/New_York"}
    await rig.schedule(await rig.task(), schedule_config=config, exclude=["2026-01-01"], catchup="skip")
    rig = await restarted(rig, open_rig, 36 * 3600 + 60)
    await rig.finish()
    [row] = await rig.rows()
    assert row["error_message"].startswith("missed: 12 slots from 2025-12-31T20:00:00-05:00 to 2026-01-02T07:00:00-05:00")


async def test_a_date_alone_bounds_whole_days_of_the_zone(rig: Rig) -> None:
    config = {"expression": "0 */12 * * *", "timezone": "Europe/Berlin"}
    schedule_id = await rig.schedule(await rig.task(), "cron", schedule_config=config, start_at="2026-01-02", end_at="2026-01-02")
    view = await rig.service.get_schedule(schedule_id)
    assert (view["start_at"], view["end_at"]) == ("2026-01-01T23:00:00Z", "2026-01-02T22:59:59.999999Z")
    assert [slot["local"][:16] for slot in view["upcoming"]] == ["2026-01-02T00:00", "2026-01-02T12:00"]


async def test_a_pause_with_an_end_ends_by_itself_as_by_a_resume(rig: Rig, open_rig: OpenRig) -> None:
    task_id = await rig.task(status="paused", paused_until="2026-01-01T00:02:30Z", pause_after=2)
    await rig.schedule(task_id)
    await rig.run_at(149)
    assert rig.clock.until == START + 150 * S, "the scheduler loop wakes for it"
    view = await rig.service.get_task(task_id)
    assert (view["status"], view["paused_until"], view["next_run"]) == ("paused", "2026-01-01T00:02:30Z", None)
    await rig.run_at(150)
    view = await rig.service.get_task(task_id)
    assert (view["status"], view["paused_until"], view["status_reason"], offset(view["next_run"])) == ("active", None, None, 180)
    await rig.run_at(180)
    assert await rig.brief() == [("schedule", "succeeded", 180)]
    await rig.patch_task(task_id, status="paused", paused_until="2026-01-01T00:10:30Z")
    assert rig.sql("SELECT next_fire FROM schedules") == [(None,)], "in the way of no others"
    await rig.at(200)
    rig = await restarted(rig, open_rig, 720)  # it has ended while nobody ran: what it would have run since was missed
    await rig.finish()
    assert await rig.brief() == [("schedule", "succeeded", 180), ("catchup", "succeeded", 660), ("schedule", "skipped", 720)]
    assert rig.sql("SELECT operation, via FROM changes WHERE via = 'timer'") == [("update", "timer")] * 2


async def test_an_end_is_only_for_a_pause_and_goes_with_it(rig: Rig) -> None:
    task_id, soon = await rig.task(), "2026-01-01T00:01:00Z"
    for status, until in ("active", soon), ("disabled", soon), ("paused", "2026-01-01T00:00:00Z"):
        fields = {"status": status, "paused_until": until}
        assert await refused_fields(rig.patch_task(task_id, **fields)) == ["paused_until"]
        assert await refused_fields(rig.task(**fields)) == ["paused_until"]
    view = await rig.patch_task(task_id, status="paused", paused_until=soon)
    assert (await rig.patch_task(task_id, **view))["paused_until"] == soon, "what GET gave can be sent back"
    assert (await rig.patch_task(task_id, status="disabled"))["paused_until"] is None
    await rig.patch_task(task_id, status="paused", paused_until=soon)
    assert (await rig.patch_task(task_id, paused_until=None))["status"] == "paused"
    await rig.at(61)
    assert (await rig.service.get_task(task_id))["status"] == "paused"


async def test_a_pause_of_the_scheduler_says_until_when_and_by_whom_and_ends(api: Api) -> None:
    await api.schedule(await api.task())
    for wrong in ("2026-01-01T00:00:00Z", "soon", "2026-01-02"):
        problem_of(await api("POST", "/scheduler/pause", {"until": wrong}), 422, "until")
    for _ in range(2):
        answer = await api("POST", "/scheduler/pause", {"until": "2026-01-01T00:02:30Z"})
    said = ("paused", "paused_until", "paused_by")
    assert [answer.json[name] for name in said] == [True, "2026-01-01T00:02:30Z", "-"]
    api.rig.clock.go(150)
    while (status := await api.get("/scheduler/status"))["paused"]:
        await asyncio.sleep(0.002)
    assert [status[name] for name in said] == [False, None, None]
    assert offset(status["next_runs"][0]["utc"]) == 180
    await api("POST", "/scheduler/pause", {"until": "2026-01-01T00:05:00Z"})
    answer = await api("POST", "/scheduler/pause")
    assert [answer.json[name] for name in said] == [True, None, "-"], "without an end it stays"
    api.rig.clock.go(600)
    assert (await api.get("/scheduler/status"))["paused"] is True


async def test_of_a_concurrency_group_one_execution_runs_at_a_time(rig: Rig, target: Target) -> None:
    first, second = [await rig.task(**target.config("/hold"), concurrency_group="disk") for _ in range(2)]
    held = [await rig.execute(task_id) for task_id in (first, second, first)]
    free = await rig.begun(await rig.task())
    await rig.tick()
    assert await rig.statuses() == ["running", "queued", "queued", "running"]
    assert rig.sql("SELECT max(hold) FROM executions") == [(0,)]
    await rig.ended(free)
    for place in range(3):
        target.let_go.set()
        await asyncio.wait([rig.service.engine.running[held[place]].job])
        target.let_go.clear()
        await rig.tick()
        assert (await rig.statuses())[: place + 1] == ["succeeded"] * (place + 1)
        assert (await rig.statuses()).count("running") == (place < 2)
    assert await refused_fields(rig.task(concurrency_group="a b")) == ["concurrency_group"]


async def test_a_retrying_execution_does_not_hold_its_group_and_one_that_leaves_it_goes_on(rig: Rig, target: Target) -> None:
    failing = await rig.task(config={"command": "exit 1"}, max_retries=1, retry_delay=60, concurrency_group="g")
    waiting = await rig.task(**target.config("/hold"), concurrency_group="g")
    for task_id in (failing, waiting, waiting):
        await rig.execute(task_id)
    await rig.tick()
    assert await rig.statuses() == ["running", "queued", "queued"]
    await rig.ended(1)
    assert await rig.statuses() == ["retrying", "running", "queued"]
    await rig.patch_task(waiting, concurrency_group=None)
    await rig.tick()
    assert await rig.statuses() == ["retrying", "running", "running"]
    await rig.let_go(target)


async def test_a_killed_holder_frees_its_group(rig: Rig, open_rig: OpenRig, target: Target, tmp_path: Path) -> None:
    for _ in range(2):
        await rig.begun(await rig.task(**target.config("/hold"), concurrency_group="g"))
    assert await rig.statuses() == ["running", "queued"]
    later = await crashed(rig, open_rig, tmp_path)
    await later.tick()
    assert await later.statuses() == ["interrupted", "running"]
    await later.let_go(target)


async def test_overlap_looks_at_manual_executions_too_but_never_judges_them(rig: Rig, target: Target) -> None:
    task_id = await rig.task(**target.config("/hold"))
    await rig.schedule(task_id)
    await rig.begun(task_id)
    await rig.at(60)
    await rig.begun(task_id)
    assert await rig.brief() == [("manual", "running", None), ("manual", "running", None), ("schedule", "skipped", 60)]
    await rig.let_go(target)


@each(
    "overlap at_the_slot then",
    ("queue", "retrying queued", "succeeded succeeded"),
    ("cancel", "cancelled running", "cancelled succeeded"),
)
async def test_a_retrying_one_is_waited_for_or_ended(rig: Rig, target: Target, overlap: str, at_the_slot: str, then: str) -> None:
    target.answer(500)
    await rig.schedule(await rig.task(**target.config(), max_retries=1, retry_delay=70), overlap=overlap)
    await rig.run_at(60)
    await rig.at(120)
    assert await rig.statuses() == at_the_slot.split()
    await rig.run_at(138)
    assert await rig.statuses() == then.split()
    assert len(target.requests) == 1 + then.count("succeeded")


async def test_overlap_cancel_ends_all_unfinished_ones_and_then_starts(rig: Rig, target: Target) -> None:
    task_id = await rig.task(config={"command": "exec sleep 60"})
    await rig.schedule(task_id, overlap="cancel")
    manual = await rig.begun(task_id)
    await rig.at(60)
    assert await rig.statuses() == ["running", "queued"]
    await rig.patch_task(task_id, config={"command": "true"})
    await rig.finish()
    assert await rig.statuses() == ["cancelled", "succeeded"]
    row = await rig.service.get_execution(manual)
    assert (row["success"], row["error_message"]) == (None, "cancelled: a later slot started instead (overlap=cancel)")


PAUSES = ("task", "schedule", "scheduler")


async def set_pause(rig: Rig, what: str, on: bool, task_id: int = 1, schedule_id: int = 1) -> None:
    if what == "task":
        await rig.patch_task(task_id, status="paused" if on else "active")
    elif what == "schedule":
        await rig.patch_schedule(schedule_id, is_active=not on)
    else:
        await (rig.service.pause_scheduler({}) if on else rig.service.resume_scheduler())


@each("what", *PAUSES)
@each("catchup", "latest", "all", "skip")
async def test_slots_of_a_pause_are_neither_caught_up_nor_recorded(rig: Rig, open_rig: OpenRig, what: str, catchup: str) -> None:
    await rig.schedule(await rig.task(), catchup=catchup)
    for pauses in (1, 2):
        await set_pause(rig, what, True)
        rig.clock.advance(61)
        for jitter in (5, 0):
            await rig.patch_schedule(1, jitter=jitter)
        await rig.tick()
        view = await rig.service.get_schedule(1)
        assert (view["next_run"], view["upcoming"], (await rig.service.get_task(1))["next_run"]) == (None, [], None)
        if pauses == 2:
            rig = await restarted(rig, open_rig, 330)
        assert (await chronotask.get_scheduler_status(rig.service))["paused"] is (what == "scheduler")
        await rig.at(150 * pauses)
        await set_pause(rig, what, False)
        for view in (await rig.service.get_schedule(1), await rig.service.get_task(1)):
            assert offset(view["next_run"]) == 180 * pauses
        await rig.run_at(180 * pauses)
        assert await rig.brief() == all_ran(180, 360)[:pauses]


@each("what", *PAUSES)
async def test_a_once_schedule_whose_time_passed_in_a_pause_gets_one_skipped_row_and_is_over(rig: Rig, what: str) -> None:
    await rig.schedule(await rig.task(), "once")
    await set_pause(rig, what, True)
    await rig.at(90)
    await set_pause(rig, what, False)
    await rig.tick()
    (row,) = await rig.rows()
    assert (row["status"], row["scheduled_for"], row["success"]) == ("skipped", "2026-01-01T00:01:00Z", None)
    assert "paused" in str(row["error_message"]) and rig.service.engine.stats.ended["bash", "skipped"] == 1
    assert (await rig.service.get_schedule(1))["is_active"] is False
    await set_pause(rig, "scheduler", True)
    await set_pause(rig, "scheduler", False)
    assert len(await rig.rows()) == 1


@each("what", *PAUSES)
async def test_in_a_pause_queued_retrying_and_manual_executions_go_on(open_rig: OpenRig, target: Target, what: str) -> None:
    rig = await open_rig(max_concurrent_runs=1)
    target.answer(500)
    task_id = await rig.task(**target.config(), max_retries=1, retry_delay=10)
    await rig.schedule(task_id)
    for _ in range(2):
        await rig.execute(task_id)
    await set_pause(rig, what, True)
    await rig.finish()
    assert await rig.statuses() == ["retrying", "succeeded"]
    await rig.execute(task_id)
    await rig.run_at(30)
    assert await rig.statuses() == ["succeeded"] * 3


@each("status", "active", "paused")
async def test_a_disabled_task_holds_slots_and_what_waits_over_restarts(open_rig: OpenRig, target: Target, status: str) -> None:
    rig = await open_rig(max_concurrent_runs=1)
    target.answer(500)
    task_id = await rig.task(**target.config(), max_retries=1, retry_delay=10)
    await rig.schedule(task_id)
    await rig.executed(task_id)
    blocker = await rig.begun(await rig.task(name="blocker", **target.config("/hold")))
    await rig.execute(task_id)
    await rig.patch_task(task_id, status="disabled")
    assert rig.sql("SELECT next_fire FROM schedules") == [(None,)], "in the way of no others"
    with pytest.raises(Conflict, match="disabled"):
        await rig.execute(task_id)
    target.let_go.set()
    await rig.run_at(70)
    assert (await rig.service.get_execution(blocker))["status"] == "succeeded"
    for _ in range(2):
        assert await rig.statuses(task_id=task_id) == ["retrying", "queued"]
        rig = await restarted(rig, open_rig, 100)
        await rig.finish()
    await rig.patch_task(task_id, status=status)
    await rig.finish()
    assert await rig.statuses(task_id=task_id) == ["succeeded", "succeeded"]
    await rig.run_at(120)
    assert await rig.brief(schedule_id=1) == (all_ran(120) if status == "active" else [])


async def test_when_capacity_is_short_no_slot_is_skipped_and_the_oldest_goes_first(open_rig: OpenRig, target: Target) -> None:
    rig = await open_rig(max_concurrent_runs=1)
    await rig.begun(await rig.task(**target.config("/hold")))
    for seconds in (30, 10, 20):
        await rig.schedule(await rig.task(**target.config(f"/{seconds}")), "once", schedule_config={"in_seconds": seconds})
    rig.clock.advance(33)
    await rig.execute(await rig.task(**target.config("/manual")))
    await rig.at(34)
    assert await rig.statuses() == ["running"] + ["queued"] * 4
    assert (await chronotask.get_scheduler_status(rig.service))["queue_length"] == 4
    await rig.let_go(target)
    assert [request.path for request in target.requests] == ["/hold", "/10", "/20", "/30", "/manual"]


# --- How executions end -----------------------------------------------------------------------------------------------


async def test_a_success_has_all_its_fields(rig: Rig) -> None:
    config = {"command": "echo ${UNSET:-hello}", "env": {"A": "1"}}  # an expansion of the shell is no reference
    execution_id = await rig.execute(await rig.task(config=config))
    await rig.at(1)
    rig.clock.advance(2)
    await rig.finish()
    row = await rig.service.get_execution(execution_id)
    output, [attempt] = row.pop("output_data"), row.pop("attempts")
    times = {"started_at": "2026-01-01T00:00:01Z", "finished_at": "2026-01-01T00:00:03Z", "duration": 2.0}
    shared = {"status": "succeeded", **times, "attempt": 1, "error_message": None}
    whose = {"id": 1, "task_id": 1, "task_name": "t", "schedule_id": None, "scheduled_for": None, "rerun_of": None}
    causes = {"trigger": "manual", "cause": None, "caused": [], "queued_at": "2026-01-01T00:00:00Z", "config": None}
    assert row == {**whose, **causes, **shared, "success": True, "retry_count": 0, "next_attempt_at": None}
    assert output is not None and (output["exit_code"], output["stdout"]) == (0, "hello\n")
    assert attempt == {**shared, "output_data": output}


async def meanwhile(rig: Rig, call: Any) -> Any:
    """The result of a use case that needs the scheduler loop to go on."""
    job = asyncio.ensure_future(call)
    while not job.done():
        await rig.tick()
        await asyncio.wait({job}, timeout=0.005)
    return job.result()


async def test_cancelling_what_waits_for_its_retry_or_for_capacity_ends_it_and_a_retry_that_waits_shows_each_attempt_once(
    open_rig: OpenRig, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await open_rig(max_concurrent_runs=1)
    for _ in range(2):
        target.answer(500)
    retrying = await rig.executed(await rig.task(**target.config(), max_retries=3))
    waiting = await rig.executed(await rig.task(**target.config(), max_retries=1, retry_delay=10))
    await rig.begun(await rig.task(**target.config("/hold")))
    row = await rig.service.cancel_execution(await rig.execute(await rig.task()))
    assert (row["status"], row["started_at"], row["duration"], row["success"]) == ("cancelled", None, None, None)
    assert row["finished_at"] == "2026-01-01T00:00:00Z" and row["attempts"] == []
    row = await rig.service.cancel_execution(retrying)
    assert (row["status"], row["next_attempt_at"], row["attempt"], row["success"]) == ("cancelled", None, 1, None)
    assert [(a["attempt"], a["status"]) for a in row["attempts"]] == [(1, "failed")]
    await rig.at(12)
    row = await rig.service.get_execution(waiting)
    assert (row["status"], row["attempt"]) == ("queued", 1)
    assert [(a["attempt"], a["status"]) for a in row["attempts"]] == [(1, "failed")]
    await rig.let_go(target)
    await rig.run_at(3600)
    assert await rig.statuses() == ["cancelled", "succeeded", "succeeded", "cancelled"] and len(target.requests) == 4
    caplog.set_level(logging.INFO)
    failed = await rig.begun(await rig.task(config=FAIL, max_retries=3))
    await asyncio.wait([rig.service.engine.running[failed].job])  # and is not yet written
    asked = asyncio.create_task(rig.service.cancel_execution(failed))
    await until_true(lambda: rig.sql("SELECT cancel_requested FROM executions WHERE id = ?", failed) == [(1,)])
    await asyncio.gather(asked, rig.tick())
    assert (await rig.statuses())[4:] == ["cancelled"] and "the next is at" not in caplog.text
    assert rig.service.engine.stats.ended == {("bash", "cancelled"): 2, ("http", "cancelled"): 1, ("http", "succeeded"): 2}


async def test_each_attempt_uses_the_task_as_it_is_then_and_is_kept_and_told_the_last_decides(
    rig: Rig, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "chronotask")
    for status in (500, 503):
        target.answer(status, body=b"no")
    execution_id = await rig.executed(await rig.task(**target.config("/before"), max_retries=3, retry_delay=10, retry_backoff=3))
    row = await rig.service.get_execution(execution_id)
    assert (row["status"], row["success"], row["attempt"], row["retry_count"]) == ("retrying", None, 1, 0)
    assert 9 <= offset(row["next_attempt_at"]) <= 11
    assert (row["finished_at"], row["duration"]) == (None, None)
    assert [(a["attempt"], a["status"]) for a in row["attempts"]] == [(1, "failed")]
    (told,) = [record.getMessage() for record in caplog.records if "(t), execution 1" in record.getMessage()]
    assert told.startswith("task 1 (t), execution 1: attempt 1 failed, the next is at 2026-01-01T00:00:")
    assert "500 Internal Server Error" in told
    await rig.patch_task(1, config=target.config("/after")["config"])
    await rig.run_at(11)
    second = await rig.service.get_execution(execution_id)
    assert (second["status"], second["attempt"]) == ("retrying", 2)
    assert 11 + 27 <= offset(second["next_attempt_at"]) <= 11 + 33
    await rig.run_at(50)
    last = await rig.service.get_execution(execution_id)
    assert (last["status"], last["success"], last["attempt"], last["retry_count"]) == ("succeeded", True, 3, 2)
    assert (last["started_at"], last["finished_at"], last["duration"]) == ("2026-01-01T00:00:00Z", "2026-01-01T00:00:50Z", 50.0)
    assert last["error_message"] is None
    attempts = [(a["attempt"], a["status"], (a["output_data"] or {}).get("status_code")) for a in last["attempts"]]
    assert attempts == [(1, "failed", 500), (2, "failed", 503), (3, "succeeded", 200)]
    sent = [(request.path, request.headers["X-ChronoTask-Attempt"]) for request in target.requests]
    assert sent == [("/before", "1"), ("/after", "2"), ("/after", "3")]
    assert len({request.headers["Idempotency-Key"] for request in target.requests}) == 1
    task = await rig.service.get_task(1)
    assert (task["run_count"], task["success_count"], task["failure_count"]) == (1, 1, 0)


async def test_retry_after_replaces_the_wait_on_429_and_503(rig: Rig, target: Target) -> None:
    task_id = await rig.task(**target.config(), max_retries=1, retry_delay=500)
    for status, low, high in ((429, 17, 17), (503, 17, 17), (500, 450, 550)):
        target.answer(status, {"Retry-After": "17"})
        row = await rig.service.get_execution(await rig.executed(task_id))
        assert low <= offset(row["next_attempt_at"]) <= high, status


# --- One thing after another ------------------------------------------------------------------------------------------


def after(*on: str, **which: Any) -> Json:
    """The configuration of a schedule of type `after`."""
    return {"schedule_type": "after", "schedule_config": {**which, "on": list(on)}}


async def listener(rig: Rig, *on: str, name: str = "alert", fields: Json = None, **which: Any) -> tuple[int, int]:
    """A task that a schedule of type `after` fires, and that schedule."""
    task_id = await rig.task(name=name)
    return task_id, await rig.schedule(task_id, **after(*on, **which), **(fields or {}))


async def pair(rig: Rig, *on: str, **fields: Any) -> tuple[int, int]:
    """A task, and one that is fired by what comes of it."""
    watched = await rig.task(**fields)
    return watched, (await listener(rig, *on, task_ids=[watched]))[0]


async def fired(rig: Rig, task_id: int) -> list[Any]:
    """Event, id of the cause and status of the executions of a task, oldest first."""
    rows = await rig.rows(task_id=task_id)
    return [(row["cause"]["event"], row["cause"]["execution_id"], row["status"]) for row in rows]


FAIL = {"command": "exit 3"}


async def test_an_execution_that_fails_has_one_alert_with_its_cause_which_stays_when_history_goes(rig: Rig) -> None:
    watched = await rig.task(name="backup", key="nightly", config={"command": "echo half; echo disk full >&2; exit 2"})
    alert, schedule = await listener(rig, "failure", task_ids=[watched])
    execution = await rig.executed(watched)
    [row] = await rig.rows(task_id=alert)
    assert (row["trigger"], row["schedule_id"], row["scheduled_for"], row["status"]) == ("after", schedule, None, "succeeded")
    task = {"task_id": watched, "task_key": "nightly", "task_name": "backup", "failures_in_a_row": 1}
    times = {"started_at": "2026-01-01T00:00:00Z", "finished_at": "2026-01-01T00:00:00Z", "duration": 0.0}
    end = {"execution_id": execution, "scheduled_for": None, "attempt": 1, "status": "failed", **times}
    output = {"exit_code": 2, "status_code": None, "output": "half\n--- stderr ---\ndisk full\n"}
    said = {"error_message": "exit status 2: disk full", "url": None}
    text = "backup failed (exit status 2: disk full), 2026-01-01 00:00 UTC"
    assert row["cause"] == {"event": "failure", **task, **end, **output, **said, "text": text}
    assert (await rig.service.get_execution(execution))["caused"] == [row["id"]]
    assert (await rig.service.get_schedule(schedule))["run_count"] == 1
    rig.sql("DELETE FROM executions WHERE id = ?", execution)
    await rig.patch_task(watched, name="renamed")
    assert (await rig.rows(task_id=alert))[0]["cause"] == row["cause"]


async def test_an_event_comes_with_its_end(rig: Rig) -> None:
    for config, event, status in (
        ({"command": "true"}, "success", "succeeded"),
        (FAIL, "failure", "failed"),
        ({"command": "sleep 60", "timeout": 1}, "failure", "timed_out"),
        ({"command": "true"}, "started", "running"),
    ):
        watched, alert = await pair(rig, event, config=config)
        execution = await rig.executed(watched)
        assert await fired(rig, alert) == [(event, execution, "succeeded")]
        assert (await rig.rows(task_id=alert))[0]["cause"]["status"] == status


async def test_the_sentence_of_a_cause_is_one_line_without_control_characters(rig: Rig) -> None:
    for printed, why in {
        "disk full": "exit status 3: disk full",
        r"10%%\rBcc: x": "exit status 3: Bcc: x",
        r"\033[31mred\033[0m": "exit status 3: red",
        r"two\nlines\xe2\x80\xa8and more\n\n": "exit status 3: and more",
        "": "exit status 3",
    }.items():
        watched, alert = await pair(rig, "failure", config={"command": f"printf '{printed}' >&2; exit 3"})
        await rig.executed(watched)
        assert (await rig.rows(task_id=alert))[0]["cause"]["text"] == f"t failed ({why}), 2026-01-01 00:00 UTC"


async def test_each_event_of_an_end_is_an_execution_of_its_own_and_others_and_a_retried_attempt_are_none(rig: Rig) -> None:
    watched, other = await rig.task(config=FAIL, pause_after=1, max_retries=1, retry_delay=10), await rig.task(config=FAIL)
    alert, _ = await listener(rig, "started", "failure", "broke", "paused", "success", "cancelled", task_ids=[watched])
    await rig.executed(other)
    execution = await rig.executed(watched)
    assert await fired(rig, alert) == [("started", execution, "succeeded")], "an attempt that is retried is no cause"
    await rig.run_at(20)
    assert await fired(rig, alert) == [(event, execution, "succeeded") for event in ("started", "failure", "broke", "paused")]
    assert (await rig.rows(task_id=alert))[3]["cause"]["text"].startswith("t failed (exit status 3), and is paused now, 2026")
    assert (await rig.service.get_task(watched))["status_reason"].startswith("paused after 1 failure in a row (pause_after), ")


async def test_a_streak_breaks_once_and_recovers_once(rig: Rig) -> None:
    watched = await rig.task(name="backup", config=FAIL)
    alert, _ = await listener(rig, "broke", "recovered", task_ids=[watched], threshold=3)
    _, other = await listener(rig, "broke", "recovered", task_ids=[watched], threshold=6)
    for _ in range(5):
        await rig.executed(watched)
    task = await rig.service.get_task(watched)
    assert (task["failures_in_a_row"], task["last_status"], task["failure_count"]) == (5, "failed", 5)
    await rig.patch_task(watched, config={"command": "true"})
    for _ in range(2):
        await rig.executed(watched)
    broke, recovered = [row["cause"] for row in await rig.rows(task_id=alert)]
    assert (broke["event"], broke["failures_in_a_row"], broke["status"]) == ("broke", 3, "failed")
    assert broke["text"] == "backup failed (exit status 3), 3 times in a row, 2026-01-01 00:00 UTC"
    assert (recovered["event"], recovered["failures_in_a_row"]) == ("recovered", 5)
    assert recovered["text"] == "backup has recovered, after 5 failures in a row, 2026-01-01 00:00 UTC"
    assert await rig.rows(schedule_id=other) == [], "below its threshold it neither breaks nor recovers"
    task = await rig.service.get_task(watched)
    assert (task["failures_in_a_row"], task["last_status"]) == (0, "succeeded")


async def test_a_task_that_is_paused_after_failures_is_told_and_counts_anew(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    watched = await rig.task(config=FAIL, pause_after=2)
    await rig.schedule(watched)
    await rig.run_at(60, 120.25, 180, 240)
    task = await rig.service.get_task(watched)
    assert (task["status"], task["run_count"], task["failures_in_a_row"], task["next_run"]) == ("paused", 2, 2, None)
    assert (why := task["status_reason"]) == "paused after 2 failures in a row (pause_after), 2026-01-01T00:02:00Z"
    assert f"task {watched} (t): {why}" in caplog.messages and rig.service.engine.stats.ended == {("bash", "failed"): 2}
    assert rig.sql("SELECT actor, object_id, operation FROM changes WHERE via = 'pause_after'") == [("-", watched, "update")]
    task = await rig.patch_task(watched, status="active")
    assert (task["failures_in_a_row"], task["status_reason"], task["next_run"]) == (0, None, "2026-01-01T00:05:00Z")
    await rig.run_at(300)
    assert (await rig.service.get_task(watched))["status"] == "active"


async def test_cancelled_skipped_or_missed_ones_are_causes(rig: Rig, target: Target, caplog: pytest.LogCaptureFixture) -> None:
    watched = await rig.task(name="held", **target.config("/hold"))
    await rig.schedule(watched)
    alert, _ = await listener(rig, "cancelled", "skipped", "missed", task_ids=[watched])
    held = await rig.begun(watched)
    await rig.at(60)
    skipped = (await rig.rows(task_id=watched))[-1]
    await meanwhile(rig, rig.service.cancel_execution(held))
    await rig.at(600)
    await rig.let_go(target)
    causes = {row["cause"]["event"]: row["cause"] for row in (await rig.rows(task_id=alert))[::-1]}
    assert (causes["skipped"]["execution_id"], causes["cancelled"]["execution_id"]) == (skipped["id"], held)
    assert causes["missed"]["error_message"].startswith("missed: 7 slots")
    assert causes["missed"]["text"].startswith("held missed a slot (") and len(causes) == 3
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"task {watched} (held): {chronotask.SKIPPED_RUNNING}" in told
    assert any(text.startswith(f"task {watched} (held): missed: 7 slots") for text in told)
    assert rig.service.engine.stats.ended["http", "skipped"] == 2 and rig.service.engine.stats.ended["http", "missed"] == 1


async def test_tags_and_any_choose_tasks_but_never_what_after_itself_started(rig: Rig) -> None:
    tagged, plain = await rig.task(tags=["ops"]), await rig.task()
    by_tag, _ = await listener(rig, "success", tag="ops")
    of_any, _ = await listener(rig, "success", any=True)
    first, second = await rig.executed(tagged), await rig.executed(plain)
    await rig.executed(of_any)  # by hand: no echo of its own task, but the others see it
    await rig.finish()
    assert [cause for _, cause, _ in await fired(rig, by_tag)] == [first]
    assert [cause for event, cause, _ in await fired(rig, of_any) if event == "success"] == [first, second]


async def test_a_chain_runs_one_after_the_other_and_its_tenth_execution_is_the_last(rig: Rig) -> None:
    tasks = [await rig.task(name=f"t{n}") for n in range(13)]
    for before, task_id in itertools.pairwise(tasks):
        await rig.schedule(task_id, **after("success", "skipped", task_ids=[before]))
    await rig.executed(tasks[0])
    for _ in range(15):
        await rig.finish()
    rows = await rig.rows()
    assert [row["task_id"] for row in rows] == tasks[:12]
    assert [row["status"] for row in rows] == ["succeeded"] * 11 + ["skipped"]
    assert rows[-1]["error_message"] == chronotask.TOO_DEEP and rows[-1]["cause"]["event"] == "success"


async def test_an_overdue_task_is_told_once_for_each_success(rig: Rig) -> None:
    watched, alert = await rig.task(name="backup"), await rig.task(name="alert")
    schedule = await rig.schedule(alert, "cron", jitter=3600, exclude=["2026-01-01"])  # of no effect on what it becomes
    view = await rig.patch_schedule(schedule, **after("overdue", task_ids=[watched], seconds=3600))
    assert (view["description"], view["next_run"]) == ("After 'backup' has not succeeded for 1 hour", "2026-01-01T01:00:00Z")
    assert [slot["utc"] for slot in view["upcoming"]] == ["2026-01-01T01:00:00Z"]
    await rig.run_at(1800)
    first = await rig.executed(watched)
    assert (await rig.service.get_schedule(schedule))["next_run"] == "2026-01-01T01:30:00Z"
    await rig.run_at(3600)
    assert await fired(rig, alert) == []
    for seconds in (5400, 50_000):
        await rig.run_at(seconds)
        assert await fired(rig, alert) == [("overdue", first, "succeeded")]
    assert (await rig.service.get_schedule(schedule))["notes"] == ["Nothing will fire before the next success."]
    cause = (await rig.rows(task_id=alert))[0]["cause"]
    assert cause["finished_at"] == "2026-01-01T00:30:00Z"
    assert cause["text"] == "backup is overdue (last success: 2026-01-01 00:30 UTC)"
    await rig.executed(watched)
    for seconds, longer in ((60_000, 50_000), (120_000, 3600)):  # the longer one comes again: it was told
        await rig.run_at(seconds)
        assert len(await fired(rig, alert)) == 2
        await rig.patch_schedule(schedule, **after("overdue", task_ids=[watched], seconds=longer))


async def test_a_task_that_never_succeeded_is_overdue_also_while_paused_or_after_a_time_down(rig: Rig, open_rig: OpenRig) -> None:
    watched = await rig.task(status="paused")
    alert, _ = await listener(rig, "overdue", task_ids=[watched], seconds=60)
    rig = await restarted(rig, open_rig, 7200)
    await rig.finish()
    await rig.run_at(90_000)
    [row] = await rig.rows(task_id=alert)
    assert (row["cause"]["event"], row["cause"]["execution_id"], row["cause"]["finished_at"]) == ("overdue", None, None)
    assert offset(row["queued_at"]) == 7200


@each("paused", *PAUSES)
async def test_while_it_is_paused_nothing_is_recorded_or_made_up_for(rig: Rig, paused: str) -> None:
    watched = await rig.task(config=FAIL)
    alert = await listener(rig, "failure", task_ids=[watched])
    dead = await listener(rig, "overdue", task_ids=[watched], seconds=600)
    for on, seconds in ((True, 700), (False, 800)):
        for ids in (alert, dead):
            await set_pause(rig, paused, on, *ids)
        if on:
            await rig.executed(watched)
        await rig.run_at(seconds)
    assert [await fired(rig, alert[0]), await fired(rig, dead[0])] == [[], []]
    await rig.executed(watched)
    assert len(await fired(rig, alert[0])) == 1


async def test_bounds_max_runs_and_overlap_hold_for_after(rig: Rig, target: Target) -> None:
    watched = await rig.task()
    limited, schedule = await listener(rig, "success", task_ids=[watched], fields={"max_runs": 2})
    later, _ = await listener(rig, "success", task_ids=[watched], fields={"start_at": "2026-01-01T01:00:00Z"})
    ended, end = await listener(rig, "success", task_ids=[watched], fields={"end_at": "2026-01-01T00:00:20Z"})
    for seconds in (10, 20, 30, 3600):
        await rig.at(seconds)
        await rig.executed(watched)
    assert [len(await fired(rig, alert)) for alert in (limited, later, ended)] == [2, 1, 2]
    assert [(await rig.service.get_schedule(one))["is_active"] for one in (schedule, end)] == [False, False]
    for past in ("2026-01-01T00:59Z", "1970-01-01T00:00Z"):
        assert await refused_fields(rig.schedule(later, **after("success", any=True), end_at=past)) == ["end_at"]
    assert (await rig.service.get_schedule(schedule))["run_count"] == 2
    assert await refused_fields(rig.patch_schedule(schedule, is_active=True)) == ["max_runs"]
    alert, chain = [await rig.task(**target.config("/hold")) for _ in range(2)]
    await rig.schedule(alert, **after("success", task_ids=[watched]))
    fields = {**after("success", task_ids=[watched]), "overlap": "skip", "max_runs": 2}
    view = await rig.service.get_schedule(await rig.schedule(chain, **fields))
    assert (view["overlap"], view["catchup"], view["catchup_window"], view["jitter"]) == ("skip", None, None, None)
    ids = list[int]()
    for count in (1, 2):  # the second time both end in one tick: what is skipped uses up no run
        ids += [await rig.execute(watched) for _ in range(count)]
        await rig.tick()
        await asyncio.wait([rig.service.engine.running[one].job for one in ids[-count:]])
        await rig.tick()
    assert [status for *_, status in await fired(rig, chain)] == ["running", "skipped", "skipped"]
    assert [status for _, _, status in await fired(rig, alert)] == ["running"] * 3
    await rig.let_go(target)


async def test_a_deleted_task_takes_the_schedule_with_it_that_watches_only_it(rig: Rig) -> None:
    first, second = await rig.task(name="a"), await rig.task(name="b")
    _, schedule = await listener(rig, "failure", task_ids=[first, second])
    await meanwhile(rig, rig.service.delete_task(first))
    view = await rig.service.get_schedule(schedule)
    assert (view["description"], view["is_active"]) == (f"After task {first} (deleted) or 'b' failed", True)
    await meanwhile(rig, rig.service.delete_task(second))
    view = await rig.service.get_schedule(schedule)
    assert (view["description"], view["is_active"]) == (f"After task {first} (deleted) or task {second} (deleted) failed", False)
    said = (await refusal(rig.patch_schedule(schedule, is_active=True))).detail
    assert said.startswith("schedule_config.task_ids: none of these tasks exists any more")


async def test_an_after_schedule_is_described_in_words(rig: Rig) -> None:
    for name in "ab":
        await rig.task(name=name)
    for words, fields in {
        "After 'a' or 'b' failed": after("failure", task_ids=[1, 2]),
        "After 'a' succeeded or was cancelled": after("success", "cancelled", task_ids=[1]),
        "After a task tagged 'db' failed 3 times in a row, and when it has recovered": after(
            "broke", "recovered", tag="db", threshold=3
        ),
        "After any task began to fail": {"task_id": 1, **after("broke", any=True)},
        "After 'a' has not succeeded for 26 hours": after("overdue", task_ids=[1], seconds=93600),
    }.items():
        preview = await chronotask.preview_schedule(rig.service, parse(chronotask.SchedulePreview, fields))
        assert preview["description"] == words


async def test_a_wrong_after_is_refused_by_field(rig: Rig) -> None:
    _, alert = await rig.task(), await rig.task()
    for config, field, message in (
        ({"on": ["success", "timed_out"], "any": True}, ".on[1]", "write failure, which covers them all"),
        ({"on": ["fail"], "any": True}, ".on[0]", "must be 'success', 'failure'"),
        ({"on": [], "any": True}, ".on", "must not be empty"),
        ({"any": True}, ".on", "is required"),
        ({"on": ["failure"]}, "", "must have exactly one of task_ids, tag, any, not none"),
        ({"on": ["failure"], "any": True, "tag": "x"}, "", "must have exactly one of task_ids, tag, any, not tag and any"),
        ({"on": ["failure"], "any": False}, ".any", "must be True"),
        ({"on": ["failure"], "task_ids": []}, ".task_ids", "must not be empty"),
        ({"on": ["failure"], "task_ids": [99]}, ".task_ids[0]", "there is no task 99"),
        ({"on": ["failure"], "task_ids": ["key:none"]}, ".task_ids[0]", "there is no task key:none"),
        ({"on": ["failure"], "any": True, "threshold": 2}, ".threshold", "is only for broke and recovered"),
        ({"on": ["broke"], "any": True, "threshold": 101}, ".threshold", "must be less than or equal to 100, not 101"),
        ({"on": ["overdue"], "task_ids": [1]}, ".seconds", "is required for overdue"),
        ({"on": ["overdue"], "any": True, "seconds": 60}, ".task_ids", "must be exactly one task"),
        ({"on": ["overdue", "failure"], "task_ids": [1], "seconds": 60}, ".on", "overdue must stand alone"),
        ({"on": ["failure"], "any": True, "seconds": 60}, ".seconds", "is only for overdue"),
        ({"on": ["failure"], "any": True, "timezone": "UTC"}, ".timezone", "unknown field"),
    ):
        error = (await refusal(rig.schedule(alert, "after", schedule_config=config))).detail
        assert error.startswith(f"schedule_config{field}: ") and message in error
    nested = await refused_fields(rig.task(schedules=[after("failure", task_ids=[9])]))
    assert nested == ["schedules[0].schedule_config.task_ids[0]"]


async def test_what_only_slots_have_is_refused_for_after_and_null_for_it_alone(rig: Rig) -> None:
    watched, alert = await rig.task(), await rig.task()
    fields = after("failure", task_ids=[watched])
    for field, value in {"catchup": "all", "catchup_window": 5, "jitter": 1}.items():
        said = (await refusal(rig.schedule(alert, **fields, **{field: value}))).detail
        assert said == f"{field}: must be null: a schedule of type after has none"
        schedule = await rig.schedule(alert, **fields, **{field: None})
        await rig.patch_schedule(schedule, **(await rig.service.get_schedule(schedule)))  # what GET gave
        assert (await refusal(rig.schedule(alert, **{field: None}))).detail.startswith(f"{field}: must not be null")


async def test_a_circle_by_ids_is_refused_and_named(rig: Rig) -> None:
    a, b, c = [await rig.task(name=name, key=name) for name in "abc"]
    await rig.schedule(b, **after("success", task_ids=["key:a"]))
    last = await rig.schedule(c, **after("success", task_ids=[b]))
    for call, circle in (
        (rig.schedule(a, **after("failure", task_ids=[c])), "c → a → b → c"),
        (rig.schedule(a, **after("failure", task_ids=[a])), "a → a"),
        (rig.patch_schedule(last, **after("success", task_ids=[b, c])), "c → c"),
    ):
        assert (await refusal(call)).detail.startswith(f"schedule_config.task_ids: must not be a circle: {circle}")
    assert (await rig.service.get_schedule(1))["schedule_config"]["task_ids"] == [a]


async def test_one_damaged_listener_does_not_stop_the_others(rig: Rig) -> None:
    watched = await rig.task()
    alerts = [await listener(rig, "success", task_ids=[watched]) for _ in range(3)]
    rig.sql("UPDATE schedules SET schedule_config = '{\"on\": 7}' WHERE id = ?", alerts[0][1])
    rig.sql("UPDATE schedules SET schedule_config = '{' WHERE id = ?", alerts[1][1])
    await rig.executed(watched)
    assert [len(await fired(rig, task_id)) for task_id, _ in alerts] == [0, 0, 1]


async def test_the_cause_is_at_most_6_kib_and_holds_no_secret(open_rig: OpenRig) -> None:
    rig = await open_rig(environ={"CHRONOTASK_SECRET_KEY": "s3cr3t-s3cr3t"})
    command = "echo $KEY; head -c 9000 /dev/zero | tr '\\0' '\\001'; echo $KEY; exit 1"
    config = {"command": command, "env": {"KEY": "${env:CHRONOTASK_SECRET_KEY}"}}
    watched, alert = await pair(rig, "failure", name="ö" * 255, config=config)
    await rig.executed(watched)
    [row] = await rig.rows(task_id=alert)
    text = chronotask.compact(row["cause"])
    assert len(text.encode()) <= 6144 and "s3cr3t" not in text and "********" in row["cause"]["output"]


async def test_a_run_by_hand_of_an_alert_gets_sample_facts(rig: Rig) -> None:
    watched = await rig.task()
    alert, _ = await listener(rig, "failure", task_ids=[watched], name="slack")
    config = {"command": 'echo "$X"', "env": {"X": "${cause:text}"}}
    for task_id in (await rig.task(name="slack", config=config), alert):
        row = await rig.service.get_execution(await rig.executed(task_id))
        assert (row["cause"]["event"], row["cause"]["task_name"], row["trigger"]) == ("test", "example", "manual")
        assert row["cause"]["text"].startswith("This is a test of slack. example failed (exit status 1: an example of output), ")
    assert (await rig.service.get_execution(await rig.executed(watched)))["cause"] is None


TOLD_NAME = """it's "}, {"x": 1} & a=b %0d%0a $(touch x) `id` <b>\u202e ${file:key} ${cause:url}"""
PLAIN_NAME = TOLD_NAME.replace("\u202e", "")
TOLD_OUTPUT = TOLD_NAME + "\n\r\nHost: evil\n"


async def told_of_something_nasty(rig: Rig, target: Target, **config: Any) -> tuple[web.Request, str]:
    """What an alert sends when a task of a nasty name has printed something nasty, and its body."""
    (rig.path.parent / "out").write_text(TOLD_OUTPUT)
    watched = await rig.task(name=PLAIN_NAME, config={"command": f"cat '{rig.path.parent}/out'; exit 1"})
    alert = await rig.task(name="alert", **target.config("/p", **config))
    await rig.schedule(alert, **after("failure", task_ids=[watched]))
    await rig.executed(watched)
    assert await rig.statuses(task_id=alert) == ["succeeded"]
    return target.requests[-1], target.bodies[-1].decode()


async def test_facts_in_a_body_are_only_ever_text_in_their_field(rig: Rig, target: Target) -> None:
    facts = {"text": "${cause:task_name}", "deep": [{"o": "<${cause:output}>"}], "n": "${cause:failures_in_a_row}"}
    form, query = "application/x-www-form-urlencoded", urllib.parse.parse_qs
    reads: list[tuple[str, Json, Callable[[str], Any], Json]] = [
        ("", facts, json.loads, {"text": PLAIN_NAME, "deep": [{"o": f"<{TOLD_OUTPUT}>"}], "n": "1"}),
        ("", {"e": "${cause:url}"}, json.loads, {"e": ""}),
        (form, "n=7&text=${cause:output}&e=${cause:event}", query, {"n": ["7"], "text": [TOLD_OUTPUT], "e": ["failure"]}),
        # an object is sent as a form
        (form, {"text": "${cause:output}", "n": 7, "l": [True]}, query, {"text": [TOLD_OUTPUT], "n": ["7"], "l": ["true"]}),
        ("text/plain; charset=utf-8", "${cause:task_name}: ${cause:output}", str, f"{PLAIN_NAME}: {TOLD_OUTPUT}"),
    ]
    for content_type, body, read, expected in reads:
        headers = {"Content-Type": content_type} if content_type else {}
        request, sent = await told_of_something_nasty(rig, target, method="POST", headers=headers, body=body)
        assert (read(sent), request.content_type) == (expected, content_type.split(";")[0] or "application/json")


async def test_facts_in_url_params_and_headers_change_nothing_around_them(rig: Rig, target: Target) -> None:
    url = target.url + "/p/${cause:task_name}/q${cause:url}?a=${cause:output}#f"
    headers = {"X-What": "<${cause:output}>", "Title": "ö ${cause:event}"}
    request, _ = await told_of_something_nasty(rig, target, url=url, params={"b": "${cause:task_name}"}, headers=headers)
    quoted = "/p/it%27s%20%22%7D%2C%20%7B%22x%22%3A%201%7D%20%26%20a%3Db%20%250d%250a%20%24%28touch%20x%29%20%60id%60"
    assert request.raw_path.startswith(quoted)
    assert request.path.startswith("/p/it's") and request.path.endswith("/q")
    assert (request.query["a"], request.query["b"]) == (TOLD_OUTPUT, PLAIN_NAME)
    assert request.headers["X-What"].startswith('<it\'s "}, {"x": 1} & a=b %0d%0a $(touch x)')
    assert "\n" not in request.headers["X-What"] and "\u202e" not in request.headers["X-What"] and "evil" not in request.host
    assert request.headers["Title"] == "ö failure"


async def test_facts_reach_bash_as_variables_that_are_never_source(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "out").write_text(TOLD_OUTPUT)
    watched = await rig.task(name="'; touch x; '", key="k", config={"command": f"cat {tmp_path}/out; exit 4"})
    variables = '"$A" "$CHRONOTASK_CAUSE_TASK_KEY" "$CHRONOTASK_CAUSE_EXIT_CODE" "$CHRONOTASK_CAUSE_URL"'
    config = {"command": f'printf "%s|" {variables}; ls', "env": {"A": "<${cause:task_name}${cause:output}>"}}
    alert = await rig.task(config={**config, "working_dir": str(tmp_path)})
    await rig.schedule(alert, **after("failure", task_ids=[watched]))
    await rig.executed(watched)
    [row] = await rig.rows(task_id=alert)
    assert row["output_data"]["stdout"] == f"<'; touch x; '{TOLD_OUTPUT}>|k|4||out\n"


async def test_a_reference_to_a_cause_is_refused_where_it_cannot_stand(rig: Rig) -> None:
    for config, field in (
        ({"command": "echo ${cause:text}"}, "config.command"),
        ({"command": "echo", "args": ["${cause:text}"]}, "config.args[0]"),
        ({"command": "true", "env": {"A": "${cause:txet}"}}, "config.env.A"),
        ({"url": "http://${cause:output}/"}, "config.url"),
        ({"url": "${cause:url}"}, "config.url"),
        ({"url": "${file:base}${cause:event}/#"}, "config.url"),
        ({"url": "http://u:${cause:text}@h/"}, "config.url"),
        ({"url": "http://h/${cause:nothing}"}, "config.url"),
        ({"url": "http://h/", "auth": {"username": "u", "password": "${cause:text}"}}, "config.auth.password"),
        ({"url": "http://h/", "body": "${cause:text}"}, "config.body"),
        ({"url": "http://h/", "body": "${cause:text}", "headers": {"Content-Type": "application/xml"}}, "config.body"),
        ({"url": "http://h/", "params": {"a": ["${cause:oops}"]}}, "config.params.a"),
        ({"url": "http://h/", "params": {"${cause:text}": 1}}, "config.params.${cause:text}"),
        ({"url": "http://h/", "body": [{"a": {"x${cause:text}": 1}}]}, "config.body"),
    ):
        made = rig.task(task_type="http" if "url" in config else "bash", config=config)
        assert await refused_fields(made) == [field], config


async def test_an_end_and_what_it_causes_are_one_transaction(rig: Rig) -> None:
    watched, alert = await pair(rig, "success")
    rig.sql("CREATE TRIGGER broken BEFORE INSERT ON executions WHEN new.trigger = 'after' BEGIN SELECT raise(ABORT, 'no'); END")
    execution = await rig.begun(watched)
    await asyncio.wait([rig.service.engine.running[execution].job])
    with pytest.raises(Unavailable):
        await rig.service.engine.tick()
    assert ((await rig.service.get_execution(execution))["status"], await fired(rig, alert)) == ("running", [])
    rig.sql("DROP TRIGGER broken")
    await rig.finish()
    assert ((await rig.service.get_execution(execution))["status"], len(await fired(rig, alert))) == ("succeeded", 1)


async def test_a_cancel_in_another_process_causes_what_the_leader_runs(open_rig: OpenRig, target: Target) -> None:
    leader = await open_rig(max_concurrent_runs=1)
    other = await open_rig(kind="mcp", clock=leader.clock, max_concurrent_runs=1)
    reader, _ = await other.service.engine.feed.open(None)
    assert (leader.service.engine.leading, other.service.engine.leading) == (True, False)
    watched = await leader.task(**target.config("/hold"))
    alert, _ = await listener(leader, "cancelled", task_ids=[watched])
    running, waiting = await leader.execute(watched), await other.execute(watched)
    await leader.tick()
    await other.service.cancel_execution(waiting)
    assert await fired(other, alert) == [("cancelled", waiting, "queued")]
    stop = asyncio.create_task(other.service.cancel_execution(running))
    while not stop.done():
        await leader.service.changes.poll()
        await other.service.changes.poll()
        await leader.tick()
        await asyncio.wait({stop}, timeout=0.01)
    await leader.finish()
    assert await fired(leader, alert) == [("cancelled", waiting, "succeeded"), ("cancelled", running, "succeeded")]
    await other.service.changes.poll()
    told = [event.data for _ in range(reader.qsize()) if (event := reader.get_nowait()) and event.kind == "execution"]
    assert {view["id"]: view["status"] for view in told} == {view["id"]: view["status"] for view in await leader.rows()}


async def test_a_thousand_failures_at_once_have_a_thousand_alerts(open_rig: OpenRig) -> None:
    rig = await open_rig(max_concurrent_runs=1000)
    watched = await rig.task()
    alert, _ = await listener(rig, "failure", any=True)
    rows = [chronotask.NewExecution(watched, None, "manual", None, START) for _ in range(1000)]
    ids = await rig.service.store.write(partial(chronotask.insert_executions, rows=rows))
    runs = await rig.service.store.write(lambda db: chronotask.start_ready(db, 1000, START, "gone"))
    await rig.service.engine.finish([chronotask.decide_end(run, Outcome("failed", "no"), START, 0) for run in runs])
    assert rig.sql("SELECT caused_by FROM executions WHERE task_id = ? ORDER BY id", alert) == [(one,) for one in ids]
    assert rig.sql("SELECT failures_in_a_row FROM tasks WHERE id = ?", watched) == [(1000,)]
    rig.sql("UPDATE executions SET status = 'cancelled', finished_at = 1 WHERE finished_at IS NULL")


# --- Time ------------------------------------------------------------------------------------------------------------


YEAR = 31_536_000
HOURLY = {"schedule_type": "cron", "schedule_config": {"expression": "0 * * * *"}}
FIXED_HOURS = {"schedule_type": "cron", "schedule_config": {"expression": "0 0-23 * * *"}}
AT_22 = {"schedule_type": "cron", "schedule_config": {"expression": "0 22 * * *"}}
SECONDLY = {"schedule_type": "cron", "schedule_config": {"expression": "* * * * * *"}}
ONCE_AT_600 = {"schedule_type": "once", "schedule_config": {"datetime": "2026-01-01T00:10:00Z"}}
EDITS = {"off": {"is_active": False}, "on": {"is_active": True}, "edit": {"schedule_config": {"expression": "30 0-23 * * *"}}}
# What: the schedule, made at START; seconds since then: 60 comes, =60 is what the clock is set to; what became of the slots.
STORIES: dict[str, tuple[dict[str, Any], str, list[tuple[str, str, int]]]] = {
    # The clock was behind, and is put right.
    "a slot before the creation": (AT_22, "=-14400 =2 79200", all_ran(79_200)),
    "a slot before the creation, put right in steps": (AT_22, "=-14400 =-3600 =2 79200", all_ran(79_200)),
    "a slot before the creation, at a start": (AT_22, "stop =-14400 start stop =2 start 79200", all_ran(79_200)),
    "slots of a pause": (HOURLY, "off 9000 on =-7200 =9002 10800", all_ran(10_800)),
    "slots that were missed": ({**HOURLY, "catchup": "skip"}, "12610 =-7200 =12612 14400", [(*MISSED, 3600), (*RAN, 14_400)]),
    "slots that ran, and one that was missed": (HOURLY, "3600 forget =-14400 =14410", [(*MISSED, 7200), (*MADE_UP, 14_400)]),
    # It was ahead, and is put right.
    "a year ahead": (AT_22, f"={YEAR + 10} =12 79200", [(*RAN, 79_200), (*MADE_UP, YEAR - 7200)]),
    "a year ahead, once": (ONCE_AT_600, f"={YEAR} =2 600", all_ran(600)),
    "a year ahead, once, seen at a start": (ONCE_AT_600, f"stop ={YEAR} start stop =2 start 600", all_ran(600)),
    "a year ahead, an interval with an end": ({"end_at": "2026-01-01T00:02:00Z"}, f"={YEAR} =2 60 120 180", all_ran(60, 120)),
    "four hours ahead, once, which ran then": (ONCE_AT_600, "=14400 =2 600", [(*MADE_UP, 600)]),
    "four hours ahead, then down": (
        FIXED_HOURS,
        "=16200 =2 3600 stop =10810 start",
        [(*RAN, 3600), (*MISSED, 7200), (*MADE_UP, 10_800), (*MADE_UP, 14_400)],
    ),
    "a day ahead, then edited": (AT_22, "79200 =165610 =79210 edit 81000", [*all_ran(79_200, 81_000), (*MADE_UP, 165_600)]),
    "an interval of a clock that was ahead": ({}, f"=-{YEAR} -{YEAR - 60} -{YEAR - 120}", all_ran(60 - YEAR, 120 - YEAR)),
    # It is set back.
    "2 h, twice, each second": (SECONDLY, "1 =-7200 -7199 -7198 =-14000 -13999", all_ran(-13_999, -7199, -7198, 1)),
    "2 h, twice, an interval": ({}, "60 =-7200 -7140 =-14000 -13980", all_ran(-13_980, -7140, 60)),
    "1 h, fixed times": (FIXED_HOURS, "3600 =30 3600 7200", all_ran(3600, 7200)),
    "1 h, each minute": ({"schedule_type": "cron"}, "60 =-3600 -3540 60 120", all_ran(-3540, 60, 120)),
    "3 h in two steps": (FIXED_HOURS, "3600 =-3600 =-7400 -7200 -3600 0 3600 7200", all_ran(-7200, -3600, 0, 3600, 7200)),
    "3 h, its history is gone": (FIXED_HOURS, "3600 forget =-7400 -7200 -3600 0 3600 7200", all_ran(-7200, -3600, 0, 7200)),
    "3 h, at a start": (FIXED_HOURS, "3600 stop =-7400 start -7200", all_ran(-7200, 3600)),
}


@each("what", *STORIES)
async def test_no_slot_runs_twice_nor_is_lost_when_the_clock_is_set(what: str, rig: Rig, open_rig: OpenRig) -> None:
    fields, story, expected = STORIES[what]
    schedule_id = await rig.schedule(await rig.task(), **fields)
    for word in story.split():
        if word in EDITS:
            await rig.patch_schedule(schedule_id, **EDITS[word])
        elif word == "forget":
            rig.sql("DELETE FROM executions")
        elif word == "stop":
            await rig.close()
        elif word == "start":
            rig = await open_rig(clock=FakeClock(rig.clock.wall))
        elif word.startswith("="):
            rig.clock.wall = START + int(word[1:]) * S
            rig.clock.steady += 2
        else:
            await rig.at(int(word))
        if not rig.closed:
            await rig.finish()
    assert await rig.brief() == expected


async def test_a_skipped_slot_of_a_future_that_did_not_come_runs_when_it_comes(rig: Rig, target: Target) -> None:
    schedule_id = await rig.schedule(await rig.task(**target.config("/hold")), **FIXED_HOURS)
    run = await rig.begun(1)
    rig.clock.wall = START + 14_400 * S
    await rig.tick()
    skipped = [("catchup", "skipped", 10_800), ("schedule", "skipped", 14_400)]
    assert await rig.brief(schedule_id=schedule_id) == [(*MISSED, 3600), *skipped]
    rig.clock.wall = START + 2 * S
    await rig.tick()
    await rig.let_go(target)
    await rig.run_at(*(slots := range(3600, 18_001, 3600)))
    assert await rig.brief(schedule_id=schedule_id) == all_ran(*slots)
    assert (await rig.service.get_execution(run))["status"] == "succeeded"
    assert rig.sql("SELECT s.run_count, history_count FROM schedules s, tasks") == [(5, 6)]


@each("moved", -7200, -600, 600, YEAR)
async def test_durations_are_of_the_monotonic_clock_and_last_run_of_the_wall_clock(rig: Rig, target: Target, moved: int) -> None:
    run = await rig.begun(await rig.task(**target.config("/hold")))
    await until_true(lambda: target.held, 20)
    rig.clock.wall = rig.clock.wall + moved * S
    rig.clock.advance(3)
    await rig.let_go(target)
    view = await rig.service.get_execution(run)
    assert (view["duration"], view["attempts"][0]["duration"], view["status"]) == (3.0, 3.0, "succeeded")
    assert ("_sum", 3.0) in rig.service.engine.stats.durations.samples()
    assert (await chronotask.overview(rig.service, chronotask.TaskQuery()))["tasks"][0]["typical_duration"] == 3.0
    await rig.executed(1)
    assert offset((await rig.service.get_task(1))["last_run"]) == moved + 3


async def test_an_execution_whose_clock_was_set_back_before_its_retry_took_no_negative_time(rig: Rig, target: Target) -> None:
    target.answer(500)
    run = await rig.executed(await rig.task(**target.config(), max_retries=1, retry_delay=10))
    rig.clock.wall = START - 7200 * S
    await rig.tick()
    await rig.run_at(-7180)
    view = await rig.service.get_execution(run)
    assert (view["status"], view["attempt"], view["duration"]) == ("succeeded", 2, 0.0)


async def test_a_retry_waits_for_no_future_that_did_not_come_after_a_restart(rig: Rig, open_rig: OpenRig, target: Target) -> None:
    target.answer(500)
    await rig.executed(await rig.task(**target.config(), max_retries=1, retry_delay=10))
    later = await restarted(rig, open_rig, -86_400)
    assert offset((await later.rows())[0]["next_attempt_at"]) == -86_400 + 3960
    follower = await open_rig(kind="mcp", clock=FakeClock(later.clock.wall + 3000 * S))
    follower.clock.wall = later.clock.wall  # which the leader has followed
    await follower.tick()
    await later.close()
    await follower.service.leadership.look()
    await follower.run_at(-86_400 + 3959)
    assert await follower.statuses() == ["retrying"]
    await follower.run_at(-86_400 + 3960)
    assert await follower.statuses() == ["succeeded"]


# --- Nothing broken stops the rest ------------------------------------------------------------------------------------


@each("at_start", False, True)
async def test_broken_schedules_stop_no_others_no_start_and_no_listing(rig: Rig, open_rig: OpenRig, at_start: bool) -> None:
    unknown = ['{"expression": "nonsense", "timezone": "UTC"}', '{"expression": "* * * * *", "timezone": "Mars/Phobos"}']
    broken = dict(enumerate([*unknown, "{}", "[1, 2]", "{oops", '{"expression": 5, "timezone": 5}'], 2))
    for _ in range(8):
        await rig.schedule(await rig.task(), "cron")
    if at_start:
        await rig.close()
    for schedule_id, config in broken.items():
        rig.sql("UPDATE schedules SET schedule_config = ? WHERE id = ?", config, schedule_id)
        rig.sql("UPDATE tasks SET task_type = 'http', config = '{\"url\": 5}' WHERE id = ?", schedule_id)
    if at_start:
        rig = await open_rig()
        schedules, tasks = await rig.service.list_schedules(ScheduleQuery()), await rig.service.list_tasks(chronotask.TaskQuery())
        assert [made["id"] for made in schedules["schedules"]] == [made["id"] for made in tasks["tasks"]] == [*range(1, 9)]
        assert [(await rig.service.get_schedule(schedule_id))["id"] for schedule_id in broken] == [2, 3, 4, 5, 6, 7]
    await rig.run_at(60)
    found = rig.sql("SELECT schedule_id, status FROM executions ORDER BY schedule_id")
    assert found == [(1, "succeeded"), *((schedule_id, "failed") for schedule_id in broken), (8, "succeeded")]
    assert rig.sql("SELECT is_active FROM schedules ORDER BY id") == [(1,), *[(0,)] * 6, (1,)]
    for schedule_id in broken:
        (row,) = await rig.rows(schedule_id=schedule_id)
        assert "switched off" in str(row["error_message"])
        assert await refused_fields(rig.patch_schedule(schedule_id, is_active=True)) == ["schedule_config"]
        await rig.service.delete_schedule(schedule_id)


async def test_a_broken_task_row_fails_its_own_executions_only_and_loses_no_end_at_a_start(rig: Rig, open_rig: OpenRig) -> None:
    broken = [("config", value) for value in ("{oops", "[]", '{"url": 5}', b'{"command": "true"}')]  # bytes, as of readfile()
    for column, value in (*broken, ("pause_after = 'no', max_retries", "soon"), ("retry_delay", "soon")):
        task_id = await rig.task(config=FAIL, max_retries=3)
        await rig.schedule(task_id)
        rig.sql(f"UPDATE tasks SET {column} = ? WHERE id = ?", value, task_id)
    await rig.schedule(await rig.task())
    rig.sql("UPDATE tasks SET success_count = 'soon', pause_after = 'soon', updated_at = 'soon', name = x'ff' WHERE id = 7")
    rig.sql("UPDATE tasks SET concurrency_group = x'ff', description = CAST(x'ff' AS TEXT) WHERE id = 7")
    rig.sql("UPDATE schedules SET next_slot = 'soon', run_count = 'soon', end_at = 1 << 62, updated_at = 'soon' WHERE id = 7")
    await rig.run_at(60)
    found = rig.sql("SELECT status, error_message FROM executions ORDER BY task_id")
    assert [status for status, _ in found] == ["failed"] * 6 + ["succeeded"]
    assert all(why.endswith("; not retried: the retry settings of the task are damaged") for _, why in found[4:6])
    await rig.close()
    stopped = "status = 'running', finished_at = NULL, attempt_started_at = 1, owner = 'dead'"
    rig.sql(f"UPDATE executions SET {stopped} WHERE task_id > 4")
    rig = await open_rig()
    assert rig.service.engine.leading and (await rig.service.list_schedules(ScheduleQuery()))["total"] == 7
    shown = (await rig.service.list_tasks(chronotask.TaskQuery()))["tasks"][6]
    assert (shown["name"], shown["description"]) == ("X'FF'", "\ufffd")
    assert rig.sql("SELECT status FROM executions WHERE task_id > 4") == [("interrupted",)] * 3
    rig.sql("UPDATE schedules SET schedule_type = 'after', schedule_config = json_object('task_ids', json_array(1)) WHERE id = 7")
    await rig.service.delete_task(1)


# ======================================================================================================================
# 9. Changes
# ======================================================================================================================


# --- Deleting ---------------------------------------------------------------------------------------------------------


async def test_deleting_a_task_starts_none_of_its_queued_executions(open_rig: OpenRig, tmp_path: Path) -> None:
    rig = await open_rig(max_concurrent_runs=1)
    task_id = await rig.task(config={"command": f"echo x >> {tmp_path}/started; exec sleep 60"})
    for _ in range(4):
        await rig.execute(task_id)
    await rig.tick()
    await until_true((tmp_path / "started").exists, 20)
    await meanwhile(rig, rig.service.delete_task(task_id))
    assert (tmp_path / "started").read_text() == "x\n"


async def test_deleting_a_schedule_cancels_its_queued_ones_and_lets_begun_ones_end(open_rig: OpenRig, target: Target) -> None:
    rig = await open_rig(max_concurrent_runs=1)
    target.answer(500)
    task_id = await rig.task(**target.config(), max_retries=1, retry_delay=500)
    schedule_id = await rig.schedule(task_id, overlap="allow")
    await rig.run_at(60)
    await rig.patch_task(task_id, **target.config("/hold"))
    await rig.at(120, 180)
    manual = await rig.execute(task_id)
    assert await rig.statuses() == ["retrying", "running", "queued", "queued"]
    await rig.service.delete_schedule(schedule_id)
    await rig.let_go(target)
    await rig.run_at(700)
    assert [(row["id"], row["status"], row["schedule_id"], row["error_message"]) for row in await rig.rows()] == [
        (1, "succeeded", schedule_id, None),
        (2, "succeeded", schedule_id, None),
        (3, "cancelled", schedule_id, "cancelled: its schedule was deleted"),
        (manual, "succeeded", None, None),
    ]
    with pytest.raises(chronotask.NotFound):
        await rig.service.get_schedule(schedule_id)


# --- Retention --------------------------------------------------------------------------------------------------------


def plant_rows(rig: Rig, count: int, status: str, days: float, schedule_id: int | None = None, slot: Any = None) -> None:
    """Rows of task 1, all of one age."""
    at = rig.clock.now() - round(days * 86400) * S
    end = None if status in ("queued", "running", "retrying") else at
    rows = [(schedule_id, status, None if slot is None else slot + n, at, end) for n in range(count)]
    columns = "schedule_id, status, scheduled_for, queued_at, finished_at, task_id, trigger, next_attempt_at, uuid"
    with contextlib.closing(sqlite3.connect(rig.path)) as db, db:
        db.executemany(f"INSERT INTO executions ({columns}) VALUES (?, ?, ?, ?, ?, 1, 'schedule', {2**60}, 'u')", rows)


BY_AGE, TIGHT, ALL = ({"history_days": days, "history_per_task": count} for days, count in ((30, 0), (1, 1), (0, 0)))


@each(
    "chosen planted left",  # the rows that are planted one after the other: how many, status, age in days, schedule and slot
    (BY_AGE, [(2500, "succeeded", 31), (10, "failed", 29)], {"failed": 10}),
    (TIGHT, [(5, "queued", 99), (5, "failed", 99)], {"queued": 5}),
    (TIGHT, [(5, "retrying", 99), (5, "failed", 99)], {"retrying": 5}),
    (TIGHT, [(3, "succeeded", 99, 1, START + HOUR), (3, "failed", 99, 1, START - HOUR)], {"succeeded": 3}),  # of future slots
    (BY_AGE, [(1500, "failed", -365), (1500, "failed", 31), (5, "succeeded", 1)], {"succeeded": 5}),  # a clock that was ahead
    (ALL, [(1200, "succeeded", 9999), (1, "failed", 0)], {"succeeded": 1200, "failed": 1}),
)
async def test_what_retention_leaves(open_rig: OpenRig, chosen: Json, planted: Json, left: Json) -> None:
    rig = await open_rig(**chosen)
    await rig.schedule(await rig.task(status="disabled"))
    for rows in planted:
        plant_rows(rig, *rows)
    for _ in range(2):
        await rig.service.retention.delete(rig.clock.now())
    assert dict(rig.sql("SELECT status, count(*) FROM executions GROUP BY 1")) == left


async def test_history_is_cut_by_count_oldest_first_with_attempts_and_skipped_or_missed_cut_no_run(open_rig: OpenRig) -> None:
    rig = await open_rig(history_per_task=5)
    await rig.task(config=FAIL, max_retries=1, retry_delay=0)
    for _ in range(8):
        await rig.executed(1)
        await rig.finish()
    await rig.service.retention.delete(rig.clock.now())
    assert [row["id"] for row in await rig.rows()] == [4, 5, 6, 7, 8]
    assert rig.sql("SELECT execution_id FROM attempts") == [(4,), (5,), (6,), (7,), (8,)]
    assert (await rig.service.get_task(1))["run_count"] == 8
    plant_rows(rig, 90, "skipped", 1)
    plant_rows(rig, 60, "missed", 1)
    await rig.executed(1)
    await rig.finish()
    await rig.service.retention.delete(rig.clock.now())
    found = rig.sql("SELECT status, count(*) FROM executions GROUP BY 1 ORDER BY 1")
    assert found == [("failed", 5), ("missed", 60), ("skipped", 40)]


async def test_age_is_told_by_the_rows_around_where_the_clock_was_wrong(open_rig: OpenRig) -> None:
    rig = await open_rig(history_days=30, history_per_task=0)
    await rig.task()
    # In days, oldest row first: -365 was written by a clock that was ahead, 9999 by one that was behind.
    kept = {(31, 1): 1, (31, -365, 31, 1): 1, (31, -365, 1): 2, (-365,): 1, (1, 9999, 1): 3, (31, 1, 9999): 2}
    for ages, count in kept.items():
        for table in ("executions", "changes"):
            rig.sql(f"DELETE FROM {table}")
        for age in ages:
            plant_rows(rig, 1, "succeeded", age)
        rig.sql("INSERT INTO changes SELECT NULL, queued_at, '', '', '', 0, '', NULL, NULL FROM executions ORDER BY id")
        await rig.service.retention.delete(rig.clock.now())
        assert rig.sql("SELECT count(*), (SELECT count(*) FROM changes) FROM executions") == [(count, count)], ages


@each("days at_start waits", (1.01, True, True), (365, True, True), (365, False, True), (0.99, True, False))
async def test_after_a_jump_deletion_by_age_waits(rig: Rig, open_rig: OpenRig, days: float, at_start: bool, waits: bool) -> None:
    await rig.task()
    plant_rows(rig, 10, "succeeded", 29.5)
    if at_start:
        rig = await restarted(rig, open_rig, days * 86400)
    else:
        rig.clock.wall = START + round(days * 86400) * S
        await rig.tick()
    for passed, kept in ((0, 10), (3590, 10), (20, 0)) if waits else ((0, 0),):
        rig.clock.advance(passed)
        await rig.service.retention.delete(rig.clock.now())
        assert rig.sql("SELECT count(*) FROM executions") == [(kept,)]


async def test_a_deletion_that_the_database_refuses_is_tried_again(rig: Rig) -> None:
    task_id = await rig.task()
    refusal = "CREATE TRIGGER refusal BEFORE DELETE ON tasks BEGIN SELECT RAISE(ABORT, 'not now'); END"
    await rig.service.store.write(lambda db: db.execute(refusal))
    await rig.service.change(partial(chronotask.remove_task, task_id=task_id))
    await asyncio.sleep(0.1)
    await rig.service.store.write(lambda db: db.execute("DROP TRIGGER refusal"))
    await until_true(lambda: rig.sql("SELECT count(*) FROM tasks") == [(0,)])


def test_retention_visits_only_tasks_with_more_rows_than_are_kept(store: Store) -> None:
    db = store._db
    for runs, skipped in ((3, 0), (2, 2), (0, 3), (9, 9)):
        task = chronotask.insert(db, some_task("t"))
        for status, count in (("succeeded", runs), ("skipped", skipped)):
            new = [chronotask.NewExecution(task.id, None, "manual", None, START, status) for _ in range(count)]
            chronotask.insert_executions(db, new)
    chronotask.mark_deleted(db, 4)
    assert chronotask.tasks_with_surplus(db, keep=2, keep_skipped=2) == [1, 3]
    assert chronotask.delete_surplus(db, 1, keep=2, keep_skipped=2, now=START, limit=10) == 1
    assert chronotask.tasks_with_surplus(db, keep=2, keep_skipped=2) == [3]
    assert chronotask.tasks_with_surplus(db, keep=0, keep_skipped=0) == []


async def test_a_deleted_task_is_gone_at_once_and_for_good(rig: Rig, open_rig: OpenRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronotask, "PURGE_ROWS", 1)
    monkeypatch.setattr(chronotask, "DELETE_WAIT", 0.0)
    task_id, other = await rig.task(), await rig.task()
    for _ in range(3):
        await rig.schedule(task_id)
    plant_rows(rig, 50, "succeeded", 1)
    kept = await rig.executed(other)
    await rig.service.delete_task(task_id)
    left = rig.sql("SELECT deleted, (SELECT count(*) > 20 FROM executions) FROM tasks ORDER BY id")
    assert left == [(1, 1), (0, 1)], "it does not wait for them"
    for call in (rig.service.get_task(task_id), rig.service.get_execution(50), rig.service.get_schedule(1)):
        with pytest.raises(chronotask.NotFound):
            await call
    assert (await rig.service.list_schedules(ScheduleQuery()))["total"] == 0
    assert [row["id"] for row in await rig.rows()] == [kept]
    rig = await restarted(rig, open_rig)
    await until_true(lambda: rig.sql("SELECT id FROM tasks") == [(other,)], 20)
    assert rig.sql("SELECT id, (SELECT count(*) FROM schedules) FROM executions") == [(kept, 0)]
    await rig.service.delete_task(other)
    again = await rig.task()
    assert (again, await rig.schedule(again), await rig.executed(again)) == (3, 4, kept + 1)


# ======================================================================================================================
# 10. Leadership
# ======================================================================================================================


# --- Restart and recovery ---------------------------------------------------------------------------------------------


async def test_after_a_restart_everything_is_as_it_was(rig: Rig, open_rig: OpenRig) -> None:
    task_id = await rig.task(name="a", description="words", config={"command": "true", "args": ["x"]}, retry_backoff=1.5)
    for schedule_type in ("interval", "cron", "once"):
        await rig.schedule(task_id, schedule_type, jitter=7, overlap="allow", max_runs=9)
    await rig.executed(task_id)
    seen = []
    for _ in range(2):
        schedules = await rig.service.list_schedules(ScheduleQuery())
        seen.append((await rig.service.list_tasks(chronotask.TaskQuery()), schedules, await rig.rows(), rig.clock.until))
        rig = await restarted(rig, open_rig)
    assert seen[0] == seen[1]


async def test_queued_and_retrying_executions_go_on_after_a_restart(open_rig: OpenRig, target: Target) -> None:
    rig = await open_rig(max_concurrent_runs=1)
    target.answer(500)
    await rig.executed(await rig.task(**target.config(), max_retries=1, retry_delay=100))
    await rig.execute(await rig.task())
    later = await restarted(rig, open_rig, 60)
    await later.finish()
    assert await later.statuses() == ["retrying", "succeeded"]
    await later.run_at(120)
    assert await later.statuses() == ["succeeded", "succeeded"]


async def crashed(rig: Rig, open_rig: OpenRig, tmp_path: Path, seconds: float = 30) -> Rig:
    """A service on the database as a crash at this moment leaves it. (The old one runs on, on its own file.)"""
    copy = tmp_path / "after the crash" / "chronotask.db"
    copy.parent.mkdir()
    backup(rig.path, copy).close()
    return await open_rig(clock=FakeClock(START + round(seconds * S)), database_url=copy)


async def test_a_crashed_execution_is_retried_or_interrupted(rig: Rig, open_rig: OpenRig, target: Target, tmp_path: Path) -> None:
    for max_retries in (0, 1):
        await rig.begun(await rig.task(**target.config("/hold"), max_retries=max_retries, retry_delay=10))
    later = await crashed(rig, open_rig, tmp_path)
    row = await later.service.get_execution(1)
    assert (row["status"], row["success"], row["finished_at"]) == ("interrupted", False, "2026-01-01T00:00:30Z")
    assert row["error_message"]
    assert [(a["attempt"], a["status"]) for a in row["attempts"]] == [(1, "interrupted")]
    assert (await later.service.get_task(1))["failure_count"] == 1
    assert later.service.engine.stats.ended == {("http", "interrupted"): 1}  # an end like any other
    row = await later.service.get_execution(2)
    assert (row["status"], row["attempt"]) == ("retrying", 1)
    assert 39 <= offset(row["next_attempt_at"]) <= 41
    target.let_go.set()
    await later.run_at(42)
    row = await later.service.get_execution(2)
    assert [(a["attempt"], a["status"]) for a in row["attempts"]] == [(1, "interrupted"), (2, "succeeded")]
    assert (await later.service.get_task(2))["run_count"] == 1


async def test_a_stop_in_mid_run_counts_as_a_failed_attempt(rig: Rig, open_rig: OpenRig) -> None:
    await rig.execute(await rig.task(name="once", config={"command": "exec sleep 60"}, max_retries=0))
    await rig.begun(await rig.task(name="again", config={"command": "exec sleep 60"}, max_retries=1))
    later = await restarted(rig, open_rig)
    assert await later.statuses() == ["interrupted", "retrying"]
    assert [a["status"] for a in (await later.service.get_execution(2))["attempts"]] == ["interrupted"]


# --- Two processes on one database ------------------------------------------------------------------------------------


async def test_what_a_tick_starts_while_its_process_steps_down_is_not_that_of_a_dead_process(rig: Rig, open_rig: OpenRig) -> None:
    follower = await open_rig(kind="mcp", database_url=rig.path)
    reader, _ = await follower.service.engine.feed.open(None)
    execution_id = await rig.execute(await rig.task(config={"command": "sleep 0.5"}))
    tick = asyncio.create_task(rig.service.engine.tick())
    await asyncio.sleep(0)  # its write is on its way
    await rig.service.leadership._step_down()
    assert [run.execution_id for run in await follower.service.store.read(partial(chronotask.running_of_others, owner=""))] == [1]
    await follower.service.leadership._take_over()
    assert (event := reader.get_nowait()) is not None and event.kind == "task", "written since the follower's last look"
    await tick
    assert (await follower.service.get_execution(execution_id))["status"] == "running"
    await follower.service.leadership._step_down()


async def test_a_leader_that_stops_hands_over_and_can_be_asked_to_end_what_it_runs(open_rig: OpenRig, target: Target) -> None:
    leader, other = await open_rig(shutdown_grace=60), await open_rig(kind="mcp")
    execution_id = await leader.begun(await leader.task(**target.config("/hold")))
    stop = asyncio.create_task(leader.close())
    await until_true(lambda: other.service.engine.leading, 20)
    assert (await other.service.cancel_execution(execution_id))["status"] == "cancelled"
    await stop


async def test_a_process_that_yields_gives_back_the_lock_of_a_take_over_that_failed(open_rig: OpenRig, tmp_path: Path) -> None:
    process = await open_rig(kind="mcp")
    process.service.engine.leading = False  # as a take-over leaves it that the database has refused
    (link := tmp_path / "link.db").symlink_to(process.path)  # which is the same database
    service = await open_rig(database_url=link)
    assert not service.service.engine.leading
    await until_true(lambda: service.service.engine.leading)


async def test_a_lock_that_cannot_be_taken_ends_the_start_on_one_line(open_rig: OpenRig, quick_disk: Path) -> None:
    (quick_disk / "chronotask.db.leader").mkdir()
    with pytest.raises(chronotask.StartupError, match=r"^no file can be made in .*chronotask.db.leader'$"):
        await open_rig()


async def test_changes_that_no_use_case_has_taken_up_are_taken_up_by_the_poll(rig: Rig, open_rig: OpenRig) -> None:
    reader, _ = await rig.service.engine.feed.open(None)
    await rig.schedule(await rig.task(), "cron")
    await rig.service.changes.poll()
    while not reader.empty():
        reader.get_nowait()
    rig.clock.wall -= 7200 * S
    await rig.tick()
    await rig.service.changes.poll()
    assert (event := reader.get_nowait()) is not None and event.kind == "schedule" and reader.empty()
    rig.service.changes.stale = True  # as a look that failed leaves it
    rig.service.engine.forget_timers()
    await rig.service.changes.poll()
    await rig.tick()
    assert rig.clock.until is not None
    await (await open_rig(kind="mcp", database_url=rig.path)).service.delete_schedule(1)
    await rig.service.changes.poll()
    assert [e.data for _ in range(reader.qsize()) if (e := reader.get_nowait())][-1] == {"id": 1, "task_id": 1, "deleted": True}


async def test_changes_after_an_object_of_a_high_id_was_deleted_are_taken_up_while_somebody_reads_events(rig: Rig) -> None:
    reader, _ = await rig.service.engine.feed.open(None)
    task_id = await rig.task()
    await rig.service.store.write(lambda db: db.execute("INSERT INTO sqlite_sequence VALUES ('schedules', 900000)"))
    await rig.service.delete_schedule(await rig.schedule(task_id))
    made = await rig.schedule(task_id)
    assert [e.data["id"] for _ in range(reader.qsize()) if (e := reader.get_nowait())][-2:] == [900001, made]


async def test_readers_look_anew_after_more_changes_than_are_told(rig: Rig, open_rig: OpenRig, monkeypatch: Any) -> None:
    monkeypatch.setattr(chronotask, "MOST_TOLD", 3)
    feed, other = rig.service.engine.feed, await open_rig(kind="mcp", database_url=rig.path)
    await rig.schedule(await rig.task(), "cron")
    many: Any = {"chronotask": 1, "tasks": {key: {"task_type": "bash", "config": {"command": "true"}} for key in "abc"}}
    for changed in (applied(rig, many), backfilled(other, 1, "2025-12-31T23:56:30Z", "2025-12-31T23:59:30Z")):
        reader, last = (await feed.open(None))[0], f"{feed._boot}-{feed._count}"
        await changed
        await rig.service.changes.poll()
        assert (reader.get_nowait(), (await feed.open(last))[1]) == (None, None)


async def test_an_edit_by_a_follower_loses_no_slot_that_was_due(rig: Rig, open_rig: OpenRig) -> None:
    follower = await open_rig(kind="mcp", database_url=rig.path)
    schedule_id = await rig.schedule(await rig.task(), jitter=50)
    for one in (rig, follower):
        one.clock.advance(60)
    await follower.patch_schedule(schedule_id, jitter=0)
    assert await rig.statuses() == ["queued"]
    while await rig.statuses() == ["queued"]:
        await asyncio.sleep(0.01)  # the leader looks four times a second
        await rig.finish()
    await rig.run_at(120)
    assert await rig.brief() == [("schedule", "succeeded", 60), ("schedule", "succeeded", 120)]


# ======================================================================================================================
# 11. Service
# ======================================================================================================================


# --- Changing tasks and schedules -------------------------------------------------------------------------------------


async def test_a_change_of_one_task_field_leaves_the_others(rig: Rig) -> None:
    words = {"name": "new name", "description": "new words", "key": "new-key", "tags": ["a", "b:c"], "status": "paused"}
    numbers = {"max_retries": 9, "retry_delay": 7.5, "retry_backoff": 3, "pause_after": 3}
    for field, value in {**words, **numbers, "config": {"command": "false"}}.items():
        task_id = await rig.task(name="old", description="old words")
        before = await rig.service.get_task(task_id)
        rig.clock.advance(5.25)
        now = format_instant(rig.clock.wall)
        after = await rig.patch_task(task_id, **{field: value})
        reason = {"status_reason": f"paused on request, {format_instant(rig.clock.wall // S * S)}"} if field == "status" else {}
        assert after == {**before, **reason, field: value, "updated_at": now}
        assert await rig.service.get_task(task_id) == after
        await rig.patch_task(task_id, key=None)


async def test_a_change_of_one_schedule_field_leaves_the_others_and_the_next_run(rig: Rig) -> None:
    task_id = await rig.task()
    changes = {"is_active": False, "overlap": "queue", "catchup": "all", "catchup_window": 60, "max_runs": 5}
    for field, value in changes.items():
        schedule_id = await rig.schedule(task_id, schedule_config={"seconds": 3600}, jitter=1800)
        before = await rig.service.get_schedule(schedule_id)
        rig.clock.advance(5)
        after = await rig.patch_schedule(schedule_id, **{field: value})
        notes = ["Nothing will fire: is_active is false."]
        changed = {"next_run": None, "upcoming": [], "notes": notes} if field == "is_active" else {}
        assert after == {**before, field: value, **changed, "updated_at": format_instant(rig.clock.wall)}


async def test_a_change_of_a_timing_field_computes_the_next_run_anew(rig: Rig) -> None:
    task_id = await rig.task()
    for field, value, next_run in (
        ("schedule_config", {"seconds": 90, "timezone": "UTC"}, "2026-01-01T00:01:30Z"),
        ("start_at", "2026-01-01T00:02:00Z", "2026-01-01T00:02:00Z"),
        ("end_at", "2026-01-01T09:00:00Z", "2026-01-01T00:01:00Z"),
    ):
        view = await rig.patch_schedule(await rig.schedule(task_id), **{field: value})
        assert (view[field], view["next_run"]) == (value, next_run)


@each("jitter", 0, 60)
@each(
    "changes",
    {"jitter": 0},
    {"jitter": 3600},
    {"start_at": "2026-01-01T00:02:00Z"},
    {"end_at": "2026-01-02T09:00:00Z"},
    {"schedule_config": {"expression": "30 0 * * *"}},
    {"schedule_type": "interval", "schedule_config": {"seconds": 3600}},
    {"schedule_config": {"expression": "31 0 * * *"}, "jitter": 7, "end_at": "2027-01-01T00:00:00Z", "max_runs": 9},
)
async def test_an_edit_loses_no_slot_that_was_due_and_not_yet_claimed(rig: Rig, changes: dict[str, Any], jitter: int) -> None:
    config = {"expression": "1 0 * * *"}
    schedule_id = await rig.schedule(await rig.task(), "cron", schedule_config=config, jitter=jitter, catchup="skip")
    rig.clock.advance(60)  # not yet noticed, or its jitter has not passed
    assert (await rig.patch_schedule(schedule_id, **changes))["is_active"]
    await rig.finish()
    await rig.run_at(121)
    assert await rig.brief() == [("schedule", "succeeded", 60)]


async def test_in_a_burst_an_edit_loses_no_slot(rig: Rig) -> None:
    task_id = await rig.task()
    ids = [await rig.schedule(task_id, overlap="allow") for _ in range(6)]
    rig.clock.advance(60)
    for schedule_id in ids:
        await rig.patch_schedule(schedule_id, schedule_config={"seconds": 70 + schedule_id})
    await rig.finish()
    assert await rig.brief() == [("schedule", "succeeded", 60)] * 6


async def test_a_slot_that_an_edit_finds_due_is_judged_by_the_rules_before_it(rig: Rig, target: Target) -> None:
    schedule_id = await rig.schedule(await rig.task(**target.config("/hold")), jitter=50)
    await rig.begun(1)
    rig.clock.advance(60)
    await rig.patch_schedule(schedule_id, jitter=0, max_runs=1, overlap="allow")
    assert await rig.brief(schedule_id=schedule_id) == [("schedule", "skipped", 60)]
    target.let_go.set()


@each("off", False, True)
@each(
    "fields changes active",  # how it came to its end, what is changed then, and whether that makes it active again
    ({"schedule_type": "once"}, {"schedule_config": {"in_seconds": 60}}, True),
    ({"schedule_type": "once"}, {"schedule_type": "interval", "schedule_config": {"seconds": 9}}, True),
    ({"end_at": "2026-01-01T00:01:30Z"}, {"end_at": "2026-01-01T09:00:00Z"}, True),
    ({"end_at": "2026-01-01T00:01:30Z"}, {"end_at": None}, True),
    ({"max_runs": 1}, {"max_runs": 2}, True),
    ({"max_runs": 1}, {"max_runs": None}, True),
    ({"max_runs": 1}, {"overlap": "allow"}, False),
    ({"max_runs": 1, "jitter": 0}, {"max_runs": 1, "overlap": "allow"}, False),
    ({"schedule_type": "once"}, {"schedule_config": {"in_seconds": 60}, "is_active": False}, False),
)
async def test_new_slots_activate_unless_switched_off(rig: Rig, fields: Json, changes: Json, active: bool, off: bool) -> None:
    schedule_id = await rig.schedule(await rig.task(), **fields)
    await rig.at(60)
    await rig.run_at(100)
    assert (await rig.service.get_schedule(schedule_id))["is_active"] is False
    if off:
        await rig.patch_schedule(schedule_id, is_active=False)
    view = await rig.patch_schedule(schedule_id, **changes)
    assert (view["is_active"], view["next_run"] is not None) == ((active and not off,) * 2)
    if off and active:
        assert (await rig.patch_schedule(schedule_id, is_active=True))["next_run"] is not None


async def test_a_task_is_made_once_with_its_schedules_beside_one_that_fails_in_the_middle_of_its_own(rig: Rig) -> None:
    minute = {"key": "s", "schedule_type": "interval", "schedule_config": {"seconds": 60}}
    bodies = [parse(chronotask.TaskCreate, {**BASH, "schedules": schedules}) for schedules in ([minute], [minute, minute])]
    made, failed = await asyncio.gather(*map(rig.service.create_task, bodies), return_exceptions=True)
    assert isinstance(failed, Conflict) and isinstance(made, dict) and len(made["schedules"]) == 1
    assert rig.sql("SELECT count(*), (SELECT count(*) FROM schedules) FROM tasks") == [(1, 1)]


async def test_configurations_are_replaced_as_a_whole_a_new_type_with_its_own_in_the_same_request(rig: Rig) -> None:
    task_id = await rig.task(config={"command": "true", "env": {"A": "1"}, "timeout": 5})
    assert (await rig.patch_task(task_id, config={"command": "echo ü"}))["config"] == {"command": "echo ü"}
    assert rig.sql("SELECT config FROM tasks") == [('{"command":"echo ü"}',)], "UTF-8, and compact"
    schedule_id = await rig.schedule(task_id, schedule_config={"seconds": 60, "start_date": "2026-01-01T00:00:30Z"})
    view = await rig.patch_schedule(schedule_id, schedule_config={"seconds": 60})
    assert view["schedule_config"] == {"seconds": 60, "timezone": "UTC"}
    task = await rig.patch_task(task_id, task_type="http", config={"url": "http://127.0.0.1/"})
    assert (task["task_type"], task["config"]["url"]) == ("http", "http://127.0.0.1/")
    schedule = await rig.patch_schedule(schedule_id, schedule_type="cron", schedule_config={"expression": "0 5 * * *"})
    assert (schedule["schedule_type"], schedule["next_run"]) == ("cron", "2026-01-01T05:00:00Z")


async def test_what_get_gave_can_be_sent_back_and_changes_nothing(rig: Rig) -> None:
    task_id = await rig.task(description="words", config={"command": "true", "args": ["a b"], "env": {"A": "1"}})
    for schedule_type, more in [
        ("interval", {"start_at": "2026-01-01T00:01:00.5Z", "jitter": 3}),
        ("cron", {"end_at": "2027-01-01T00:00:00+01:00"}),
        ("once", {"max_runs": 1}),
        ("interval", {"schedule_config": {"seconds": 1.5, "start_date": "2026-01-01T00:00:00"}, "is_active": False}),
    ]:
        schedule_id = await rig.schedule(task_id, schedule_type, **more)
        before = await rig.service.get_schedule(schedule_id)
        assert {**await rig.patch_schedule(schedule_id, **before), "notes": before["notes"]} == before
    await rig.run_at(61)
    for schedule in (await rig.service.list_schedules(ScheduleQuery()))["schedules"]:
        again = await rig.patch_schedule(schedule["id"], **schedule)
        del again["upcoming"], again["notes"]
        assert again == {**schedule, "updated_at": "2026-01-01T00:01:01Z"}
    task = await rig.service.get_task(task_id)
    assert await rig.patch_task(task_id, **task) == {**task, "updated_at": "2026-01-01T00:01:01Z"}


async def test_the_zone_and_the_defaults_of_retries_are_stored_at_creation(open_rig: OpenRig) -> None:
    rig, noon = await open_rig(max_retries=7, retry_delay=2.5), {"expression": "0 12 * * *"}
    view = await rig.service.create_task(parse(chronotask.TaskCreate, BASH))
    assert (view["max_retries"], view["retry_delay"], view["retry_backoff"]) == (7, 2.5, 2)
    await rig.schedule(1, "cron", schedule_config=noon)
    later = await restarted(rig, open_rig, max_retries=1, scheduler_timezone="America/New_York")
    assert (await later.service.get_task(1))["max_retries"] == 7
    assert (await later.service.get_schedule(1))["next_run"] == "2026-01-01T12:00:00Z"
    view = await later.service.get_schedule(await later.schedule(1, "cron", schedule_config=noon))
    assert (view["schedule_config"]["timezone"], view["next_run"]) == ("America/New_York", "2026-01-01T17:00:00Z")


# --- A random life ----------------------------------------------------------------------------------------------------


class Life:
    """Random tasks and schedules, and what happens to them: time, failures, pauses, stops, crashes, hands."""

    def __init__(self, seed: int, open_rig: OpenRig, target: Target, folder: Path) -> None:
        self.draw, self.open_rig, self.target, self.folder = random.Random(seed), open_rig, target, folder
        self.settings = {"max_concurrent_runs": self.draw.choice([1, 2, 100]), "history_per_task": 0}
        self.schedules: dict[int, int] = {}  # id → task
        self.paused: set[int] = set()  # schedules that were paused at some time
        self.rig: Rig = Any

    async def begin(self) -> None:
        pick, self.rig = self.draw.choice, await self.open_rig(**self.settings)
        for _ in range(self.draw.randrange(1, 5)):
            fields = self.target.config(pick(["/", "/", "/hold"]))
            task_id = await self.rig.task(**fields, max_retries=pick([0, 0, 1, 3]), retry_delay=pick([0, 7, 45]))
            for _ in range(self.draw.randrange(1, 3)):
                cron = {"expression": pick(["* * * * *", "*/10 * * * * *", "30 2 * * *"]), "timezone": "Europe/Berlin"}
                interval, once = {"seconds": pick([2, 10, 60, 7.5])}, {"datetime": f"2026-01-01T00:0{pick('12345')}:00Z"}
                kind, config = pick([("interval", interval), ("cron", cron), ("once", once)])
                policies = {"overlap": pick(["skip", "queue", "allow", "cancel"]), "catchup": pick(["latest", "all", "skip"])}
                bounds = {"catchup_window": pick([86400, 100, 0]), "max_runs": pick([None, None, 3, 10])}
                more = {"schedule_config": config, "jitter": pick([0, 0, 1, 20]), **policies, **bounds}
                self.schedules[await self.rig.schedule(task_id, kind, **more)] = task_id

    async def time(self) -> None:
        self.rig.clock.advance(self.draw.choice([0.5, 1, 2, 5, 10, 60, 60, 300, 5000]))
        await self.rig.tick()

    async def failures(self) -> None:
        for _ in range(self.draw.randrange(1, 5)):
            self.target.answer(*self.draw.choice([(500, {}), (404, {}), (503, {"Retry-After": "9"}), (200, {})]))

    async def let_go(self) -> None:
        self.target.let_go.set()
        self.target.let_go = asyncio.Event()
        await asyncio.sleep(0.002)
        await self.rig.tick()

    async def hand(self) -> None:
        await self.rig.execute(self.draw.choice(list(self.schedules.values())))

    async def pause(self) -> None:
        schedule_id, task_id = self.draw.choice(list(self.schedules.items()))
        what = self.draw.choice(PAUSES)
        touched = {"schedule": {schedule_id}, "task": {s for s, t in self.schedules.items() if t == task_id}}
        self.paused |= touched.get(what, set(self.schedules))
        await set_pause(self.rig, what, True, task_id, schedule_id)
        await self.time()
        with contextlib.suppress(InvalidInput):  # no slot is left
            await set_pause(self.rig, what, False, task_id, schedule_id)

    async def cancel(self) -> None:
        for row in [*await self.rig.rows(status="queued"), *await self.rig.rows(status="retrying")][:2]:
            await self.rig.service.cancel_execution(row["id"])

    async def again(self) -> None:
        """A stop or a crash, and a new start after a while."""
        later, path = FakeClock(self.rig.clock.wall + self.draw.choice([0, 30, 4000]) * S), self.rig.path
        if self.draw.random() < 0.5:
            path = self.folder / f"{len(list(self.folder.iterdir()))}.db"
            backup(self.rig.path, path).close()
        await self.rig.close()
        self.rig = await self.open_rig(clock=later, database_url=path, **self.settings)

    async def ends(self) -> None:
        """No slot is claimed any more; what is unfinished comes to its end."""
        for schedule_id in self.schedules:
            await self.rig.patch_schedule(schedule_id, is_active=False)
        for _ in range(1000):
            await self.let_go()
            if not self.rig.sql("SELECT 1 FROM executions WHERE status IN ('queued', 'running', 'retrying')"):
                return
            self.rig.clock.advance(60)
        raise AssertionError("executions never end")

    async def check_task(self, task_id: int) -> None:
        rows, task = await self.rig.rows(task_id=task_id), await self.rig.service.get_task(task_id)
        assert task["run_count"] == sum(row["started_at"] is not None for row in rows)
        assert task["success_count"] == sum(row["success"] is True for row in rows)
        assert task["failure_count"] == sum(row["success"] is False for row in rows)
        for row in rows:
            assert row["status"] not in ("skipped", "missed") or row["error_message"]
            attempts = (await self.rig.service.get_execution(row["id"])).get("attempts", [])
            assert [attempt["attempt"] for attempt in attempts] == list(range(1, row["attempt"] + 1))

    async def check_schedule(self, schedule_id: int) -> None:
        rows, schedule = await self.rig.rows(schedule_id=schedule_id), await self.rig.service.get_schedule(schedule_id)
        runs = sum(row["status"] not in ("skipped", "missed") for row in rows)
        assert schedule["run_count"] == runs <= (schedule["max_runs"] or runs)
        assert len({row["scheduled_for"] for row in rows}) == len(rows)
        if schedule_id not in self.paused and schedule["max_runs"] is None:
            missed = [int(str(row["error_message"]).split()[1]) for row in rows if row["status"] == "missed"]
            (until,) = self.rig.sql("SELECT settled_until FROM schedules WHERE id = ?", schedule_id)[0]
            timing = make_timing(schedule["schedule_type"], schedule["schedule_config"], START)
            if 1000 not in missed and len(rows) - runs < 100:  # there counting stops, and retention begins
                assert sum(missed) + len(rows) - len(missed) == Plan(timing).count(START + 1, until, 10**6)


@each("seed", 1, 2, 3)
async def test_in_a_random_life_every_slot_has_its_row(seed: int, open_rig: OpenRig, target: Target, tmp_path: Path) -> None:
    """And every count is right."""
    life = Life(seed, open_rig, target, tmp_path)
    await life.begin()
    weights = {life.time: 50, life.failures: 8, life.let_go: 10, life.hand: 8, life.pause: 8, life.cancel: 5, life.again: 8}
    for event in life.draw.choices(list(weights), list(weights.values()), k=40):
        await event()
    await life.ends()
    for task_id in set(life.schedules.values()):
        await life.check_task(task_id)
    for schedule_id in life.schedules:
        await life.check_schedule(schedule_id)


# --- Operations -------------------------------------------------------------------------------------------------------


def test_an_operation_has_a_name_and_a_route_of_its_own_says_what_its_id_is_called_and_only_changes_take_a_body() -> None:
    assert len({operation.name for operation in OPERATIONS}) == len(OPERATIONS)
    assert len({(operation.method, operation.path) for operation in OPERATIONS}) == len(OPERATIONS)
    for operation in OPERATIONS:
        assert (operation.id_name is not None) == ("{id}" in operation.path), operation.name
        if operation.id_name is not None:
            thing = re.match(r"/(task|schedule|execution)s/", operation.path)
            assert thing is not None and operation.id_name == f"{thing[1]}_id"
        assert operation.body is None or operation.method in ("POST", "PATCH"), operation.name
        assert (operation.result is None) == (operation.status == 204), operation.name


async def test_pages_and_counts_are_what_the_rows_say_whatever_happened_to_them(rig: Rig) -> None:
    """300 tasks with schedules, made, changed and deleted at random; each page of each filter beside a plain query."""
    chance, tasks, schedules = random.Random(7), list[int](), list[int]()
    statuses = ["active", "paused", "disabled"]
    for _ in range(300):
        tasks.append(await rig.task(status=chance.choice(statuses), tags=chance.sample(["a", "b"], 1)))
        for _ in range(chance.randrange(3)):
            schedules.append(await rig.schedule(tasks[-1], chance.choice(["cron", "interval"]), is_active=chance.random() < 0.7))
    for task_id in chance.sample(tasks, 120):
        await rig.patch_task(task_id, status=chance.choice(statuses), tags=chance.sample(["a", "b", "c"], 2))
    for schedule_id in chance.sample(schedules, 60):
        await rig.patch_schedule(schedule_id, is_active=chance.random() < 0.5)
    for schedule_id in chance.sample(schedules, 30):
        await rig.service.delete_schedule(schedule_id)
    for task_id in chance.sample(tasks, 60):
        await rig.service.store.write(partial(chronotask.mark_deleted, task_id=task_id))
    there = "FROM schedules s JOIN tasks t ON t.id = s.task_id WHERE NOT deleted"
    counted, _ = await rig.service.store.read(chronotask.counts)
    asked = "SELECT (SELECT count(*) FROM tasks WHERE NOT deleted), count(*), sum(is_active AND status = 'active')"
    assert [tuple(counted[name] for name in ("tasks", "schedules", "active_schedules"))] == rig.sql(f"{asked} {there}")

    def found(text: str, *values: Any) -> list[int]:
        return sorted(row[0] for row in rig.sql(text, *values))

    of_tasks = "SELECT id FROM tasks WHERE NOT deleted AND status = ifnull(?, status) AND task_type = ifnull(?, task_type)"
    for skip, status, kind in itertools.product((0, 3, 110, 500), (None, "active", "disabled"), (None, "bash", "http")):
        page = await rig.service.list_tasks(chronotask.TaskQuery(skip=skip, limit=20, status=status, task_type=kind))
        ids = found(of_tasks, status, kind)
        assert (page["total"], [task["id"] for task in page["tasks"]]) == (len(ids), ids[skip : skip + 20])
    of_schedules = f"SELECT s.id {there} AND is_active = ifnull(?, is_active) AND schedule_type = ifnull(?, schedule_type)"
    for skip, active, kind in itertools.product((0, 3, 110, 500), (None, True, False), (None, "cron", "interval")):
        page = await rig.service.list_schedules(ScheduleQuery(skip=skip, limit=20, is_active=active, schedule_type=kind))
        ids = found(of_schedules, active, kind)
        assert (page["total"], [schedule["id"] for schedule in page["schedules"]]) == (len(ids), ids[skip : skip + 20])
    for tag in "abc":
        page = await rig.service.list_tasks(chronotask.TaskQuery(tag=tag, limit=1000))
        ids = found("SELECT t.id FROM tasks t, json_each(tags) WHERE NOT deleted AND value = ?", tag)
        assert [task["id"] for task in page["tasks"]] == ids


async def test_a_task_in_a_list_is_made_anew_only_when_it_has_changed(rig: Rig) -> None:
    first, second = await rig.task(), await rig.task()
    await rig.schedule(second)

    async def listed() -> list[Any]:
        return (await rig.service.list_tasks(chronotask.TaskQuery()))["tasks"]

    before = await listed()
    assert (await listed())[0] is before[0]
    await rig.patch_task(first, description="one\u2028two\x85")
    await rig.begun(second)
    after = await listed()
    assert after == [await rig.service.get_task(first), await rig.service.get_task(second)]
    assert (after[0]["description"], after[1]["run_count"], offset(after[1]["next_run"])) == ("one\u2028two\x85", 1, 60)
    await rig.service.pause_scheduler({})
    assert [task["next_run"] for task in await listed()] == [None, None]


@pytest.mark.slow
@each("killed_in left", ("release_held", 0), ("put_row", 0), ("afterwards", 25))
async def test_a_backfill_that_is_killed_leaves_all_of_its_rows_or_none(rig: Rig, killed_in: str, left: int) -> None:
    """Between its rows and the end of its transaction, by a real kill; or once it was answered. Asked again it is whole."""
    task_id = await rig.task(status="paused")
    await rig.schedule(task_id, "cron", schedule_config={"expression": "0 * * * *"})
    await rig.close()
    program = f"""
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(TOP)!r})
import chronotask as c

def kill(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)

async def main(killed_in):
    store = c.Store(Path({str(rig.path)!r}), c.Clock().monotonic)
    service = c.Service(c.Settings.from_env({{}})[0], store, c.Clock(), c.Environ({{}}))
    setattr(c, killed_in, kill)
    body = {{"from": "2025-03-01T00:00:00Z", "to": "2025-03-02T00:00:00Z"}}
    await c.backfill_schedule(service, 1, c.parse(c.BackfillBody, body))
    kill()

asyncio.run(main(sys.argv[1]))
"""
    for stage, rows in ((killed_in, left), ("afterwards", 25), ("afterwards", 25)):
        done = subprocess.run([sys.executable, "-c", program, stage], capture_output=True, text=True, timeout=60)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert rig.sql("SELECT count(*), count(DISTINCT scheduled_for) FROM executions") == [(rows, rows)]


# ======================================================================================================================
# 12. Files
# ======================================================================================================================


# --- TOML -------------------------------------------------------------------------------------------------------------


def random_text(rng: random.Random) -> str:
    parts = [*"aB9 '\"\\\n\t\x7f\x01é\u2028🙂#=.", "\r\n", "'''", '"""', "\\n"]
    return "".join(rng.choices(parts, k=rng.randrange(7)))


def random_value(rng: random.Random, depth: int = 3) -> Any:
    simple = [True, False, 0, -7, 2**53, 1.5, 1e300, -2.5e-9, random_text(rng), random_text(rng)]
    if depth and rng.random() < 0.4:
        items = [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
        return items if rng.random() < 0.5 else {random_text(rng): item for item in items}
    return rng.choice(simple)


def test_what_is_written_as_toml_is_read_back_equal() -> None:
    rng = random.Random(20)
    for _ in range(300):
        tasks = {
            random_text(rng): {"name": random_text(rng), "config": random_value(rng), "schedules": {random_text(rng): {"a": 1}}}
            for _ in range(3)
        }
        definitions = {"chronotask": 1, "owner": random_text(rng), "tasks": tasks}
        assert tomllib.loads(to_toml(definitions, {"": ["above"], "a": ["of a task"]})) == definitions


def test_toml_is_written_for_a_reader_and_without_nulls_which_it_does_not_have() -> None:
    schedule = {"schedule_type": "cron", "schedule_config": {"expression": "30 2 * * *", "timezone": "UTC"}}
    task = {"name": "backup", "config": {"command": 'cd /x\n./backup "$1"', "args": []}, "schedules": {"at night": schedule}}
    assert to_toml({"chronotask": 1, "tasks": {"backup.sh": task}}, {"": ["made here"], "backup.sh": ["line 1"]}) == (
        'chronotask = 1\n# made here\n\n# line 1\n[tasks."backup.sh"]\nname = "backup"\n'
        'config = { command = """\ncd /x\n./backup \\"$1\\"""", args = [] }\n\n'
        '[tasks."backup.sh".schedules."at night"]\nschedule_type = "cron"\n'
        'schedule_config = { expression = "30 2 * * *", timezone = "UTC" }\n'
    )
    with pytest.raises(InvalidInput, match=r"tasks.a.config.body\[1\].x: is null, which TOML does not have"):
        to_toml({"tasks": {"a": {"config": {"body": [1, {"x": None}]}}}}, {})


# --- Apply and export -------------------------------------------------------------------------------------------------


NIGHTLY = """
chronotask = 1
owner = "ops"

[tasks.nightly]
task_type = "bash"
config = { command = "true" }
max_retries = 0

[tasks.nightly.schedules.night]
schedule_type = "cron"
schedule_config = { expression = "30 2 * * *", timezone = "Europe/Berlin" }
"""
NIGHT = "tasks.nightly.schedules.night"


async def applied(rig: Rig, file: str | dict[str, Any], **query: Any) -> Any:
    sent = tomllib.loads(file) if isinstance(file, str) else file
    return await chronotask.apply_definitions(rig.service, chronotask.ApplyQuery(**query), parse(chronotask.DefinitionFile, sent))


async def exported(rig: Rig, **query: Any) -> Any:
    return await chronotask.export_definitions(rig.service, chronotask.ExportQuery(**query))


def actions(answer: Any) -> list[tuple[str, str]]:
    return [(change["action"], change["key"]) for change in answer["changes"]]


def everything(rig: Rig) -> list[Any]:
    """All rows of tasks, schedules and what is remembered, with the number of the last change."""
    return [rig.sql(f"SELECT * FROM {table}") for table in ("tasks", "schedules", "meta", "executions")]


async def test_a_file_makes_tasks_and_schedules_and_says_what_and_when(rig: Rig) -> None:
    before = everything(rig)
    dry = await applied(rig, NIGHTLY, dry_run=True)
    assert everything(rig) == before
    answer = await applied(rig, NIGHTLY)
    made_task, made_schedule = answer["changes"]
    upcoming = made_schedule.pop("upcoming")
    assert (upcoming[0], len(upcoming)) == ({"utc": "2026-01-01T01:30:00Z", "local": "2026-01-01T02:30:00+01:00"}, 5)
    config, times = {"command": "true"}, {"expression": "30 2 * * *", "timezone": "Europe/Berlin"}
    task = dict(key="nightly", name="nightly", task_type="bash", config=config, max_retries=0, retry_delay=5)
    schedule = {"key": "night", "schedule_type": "cron", "schedule_config": times}
    of_task, of_schedule = [{name: [None, value] for name, value in fields.items()} for fields in (task, schedule)]
    created = {"action": "created", "id": 1}
    assert made_task == {**created, "kind": "task", "key": "nightly", "upcoming": [], "fields": of_task}
    assert made_schedule == {**created, "kind": "schedule", "key": "nightly/night", "fields": of_schedule}
    assert [change["id"] for change in dry["changes"]] == [None, None]
    assert {**dry["changes"][0], "id": 1} == made_task
    assert answer["warnings"] == []
    assert (await rig.service.get_task(1))["managed_by"] == (await rig.service.get_schedule(1))["managed_by"] == "ops"


async def test_what_a_file_does_not_change_is_not_written_and_a_changed_schedule_keeps_its_id_and_counters(rig: Rig) -> None:
    other = '\n[tasks.other]\ntask_type = "bash"\nconfig = { command = "true" }\n'
    await applied(rig, NIGHTLY + other)
    await rig.run_at(5400)  # the slot at 02:30 in Berlin
    before = everything(rig)
    assert await applied(rig, NIGHTLY + other) == {"changes": [], "warnings": []}
    assert everything(rig) == before
    answer = await applied(rig, NIGHTLY + other.replace("true", "false"))
    assert actions(answer) == [("updated", "other")]
    assert answer["changes"][0]["fields"] == {"config": [{"command": "true"}, {"command": "false"}]}
    assert everything(rig)[1] == before[1] and everything(rig)[0][0] == before[0][0]
    await rig.run_at(5400 + 86400)
    assert await rig.brief() == all_ran(5400, 5400 + 86400)
    (change,) = (await applied(rig, NIGHTLY.replace("30 2", "0 9") + other.replace("true", "false")))["changes"]
    assert (change["action"], change["id"], [*change["fields"]]) == ("updated", 1, ["schedule_config"])
    assert change["upcoming"][0]["local"] == "2026-01-02T09:00:00+01:00"
    view = await rig.service.get_schedule(1)
    assert (view["run_count"], view["next_run"]) == (2, "2026-01-02T08:00:00Z")


async def test_a_field_left_out_has_its_default_but_a_pause_stays_and_a_zone_left_out_is_the_services(open_rig: OpenRig) -> None:
    rig = await open_rig(scheduler_timezone="Asia/Tokyo")
    more = NIGHTLY.replace("max_retries = 0", 'description = "d"\ntags = ["a"]\npause_after = 3')
    await applied(rig, more + 'overlap = "queue"\njitter = 5\n')
    await rig.patch_task(1, status="paused", paused_until="2026-01-02T00:00:00Z")
    await rig.patch_schedule(1, is_active=False)
    fields = [change["fields"] for change in (await applied(rig, NIGHTLY))["changes"]]
    assert fields == [
        {"description": ["d", None], "tags": [["a"], []], "max_retries": [3, 0], "pause_after": [3, None]},
        {"overlap": ["queue", "skip"], "jitter": [5, 0]},
    ]
    assert (await rig.service.get_task(1))["paused_until"] and not (await rig.service.get_schedule(1))["is_active"]
    said = NIGHTLY.replace("max_retries = 0", 'max_retries = 0\nstatus = "paused"') + "is_active = true\n"
    fields = [change["fields"] for change in (await applied(rig, said))["changes"]]
    assert fields == [{"paused_until": ["2026-01-02T00:00:00Z", None]}, {"is_active": [False, True]}]
    (change,) = (await applied(rig, said.replace("paused", "active")))["changes"]
    assert change["fields"] == {"status": ["paused", "active"]}
    await applied(rig, NIGHTLY.replace(', timezone = "Europe/Berlin"', ""))
    assert (await rig.service.get_schedule(1))["schedule_config"]["timezone"] == "Asia/Tokyo"


async def test_what_was_changed_by_hand_is_put_back_and_said(rig: Rig) -> None:
    await applied(rig, NIGHTLY)
    rig.clock.advance(60)
    await rig.patch_task(1, max_retries=7)
    await rig.patch_schedule(1, schedule_config={"expression": "0 4 * * *"})
    answer = await applied(rig, NIGHTLY)
    changed = "was changed by other means on 2026-01-01T00:01:00Z"
    assert answer["warnings"] == [
        f"tasks.nightly: {changed}: max_retries as in the file again",
        f"{NIGHT}: {changed}: schedule_config as in the file again",
    ]
    assert actions(answer) == [("updated", "nightly"), ("updated", "nightly/night")]
    rig.clock.advance(60)
    answer = await applied(rig, NIGHTLY.replace("max_retries = 0", "max_retries = 1"))
    assert (actions(answer), answer["warnings"]) == ([("updated", "nightly")], [])


async def test_a_key_of_another_owner_is_taken_over_only_when_the_file_says_so(rig: Rig) -> None:
    await applied(rig, NIGHTLY)
    before = everything(rig)
    theirs = NIGHTLY.replace('"ops"', '"dev"') + '\n[tasks.new]\ntask_type = "bash"\nconfig = { command = "x" }\n'
    with pytest.raises(Conflict) as caught:
        await applied(rig, theirs)
    assert caught.value.detail.split("; ") == [
        "tasks.nightly: task 1 belongs to ops",
        f"{NIGHT}: schedule 1 belongs to ops. With adopt = true the file takes it over.",
    ]
    assert [error.field for error in caught.value.errors] == ["tasks.nightly", NIGHT]
    assert everything(rig) == before
    answer = await applied(rig, "adopt = true\n" + theirs)
    found = {change["key"]: change["fields"].get("managed_by") for change in answer["changes"]}
    assert found == {"nightly": ["ops", "dev"], "new": None, "nightly/night": ["ops", "dev"]}
    assert (await applied(rig, "chronotask = 1\nowner = 'ops'"))["changes"] == []
    await applied(rig, 'chronotask = 1\nadopt = true\n[tasks.nightly]\ntask_type = "bash"\nconfig = { command = "x" }')
    orphans = [("orphaned", "new"), ("orphaned", "nightly/night")]  # of a task that belongs to another owner now
    assert actions(await applied(rig, "chronotask = 1\nowner = 'dev'")) == orphans


async def test_what_has_no_key_is_taken_over_by_the_key_that_an_export_gave_it(rig: Rig) -> None:
    for name in ("Nightly Backup!", "nightly backup", "Ünïcode"):
        await rig.schedule(await rig.task(name=name))
    await rig.schedule(1)
    file = await exported(rig)
    assert [*file["tasks"]] == ["nightly-backup", "nightly-backup-2", "n-code"]
    assert [*file["tasks"]["nightly-backup"]["schedules"]] == ["interval", "interval-4"]
    with pytest.raises(Conflict, match=r"^tasks.nightly-backup: task 1 was not made by a file"):  # nor made a second time
        await applied(rig, file)
    answer = await applied(rig, {**file, "adopt": True})
    assert [(change["action"], {*change["fields"]}) for change in answer["changes"]] == [("updated", {"key", "managed_by"})] * 7
    assert await exported(rig) == file
    assert (await applied(rig, file))["changes"] == []


@each(
    "prune action task active more",
    (None, "orphaned", "active", [True, True], ""),
    ("pause", "paused", "paused", [True, False], ""),
    ("pause", "paused", "paused", [True, False], "status = 'paused'\npaused_until = '2026-01-02T00:00'"),
    ("pause", "paused", "paused", [True, False], "status = 'paused'\npaused_until = '1970-01-01T00:00'"),
    ("delete", "deleted", None, [True], ""),
)
async def test_what_a_file_drops_stays_or_is_pruned(rig: Rig, prune: Any, action: str, task: Any, active: Any, more: str) -> None:
    gone = '\n[tasks.gone]\ntask_type = "bash"\nconfig = { command = "true" }\n'
    second = "[tasks.nightly.schedules.noon]\nschedule_type = 'cron'\nschedule_config = { expression = '0 12 * * *' }\n"
    await applied(rig, NIGHTLY + second + gone + more)
    await applied(rig, 'chronotask = 1\nowner = "dev"\n' + gone.replace("gone", "others"))
    await rig.schedule(1)  # by hand: nobody's business
    rig.sql("UPDATE schedules SET schedule_config = '{' WHERE key = 'noon'")  # a damaged one, too
    answer = await applied(rig, NIGHTLY, prune=prune)
    assert actions(answer) == [(action, "gone"), (action, "nightly/noon")]
    tasks = dict(rig.sql("SELECT key, coalesce(paused_until, status) FROM tasks WHERE NOT deleted"))
    assert tasks == {"nightly": "active", "others": "active"} | ({"gone": task} if task else {})
    found = (await rig.service.list_schedules(ScheduleQuery()))["schedules"]
    assert [view["is_active"] for view in found if view["managed_by"]] == active
    again = await applied(rig, NIGHTLY, prune=prune)
    assert {action for action, _ in actions(again)} <= {"orphaned"} and len(again["changes"]) == 2 * (prune != "delete")


async def test_a_once_schedule_whose_time_has_passed_is_over_and_no_error(rig: Rig) -> None:
    once = "\n[tasks.nightly.schedules.once]\nschedule_type = 'once'\nschedule_config = { datetime = '2026-01-01T00:01:00' }\n"
    await applied(rig, NIGHTLY + once)
    rig.clock.advance(60)  # its slot has come, and nobody has claimed it yet
    for said in ("is_active = true\n", "", "is_active = true\n"):
        assert (await applied(rig, NIGHTLY + once + said))["changes"] == []
        assert [*(await exported(rig))["tasks"]["nightly"]["schedules"]] == ["night"]
        await rig.run_at(60)
    past = once.replace("00:01:00", "00:00:30")
    assert actions(await applied(rig, NIGHTLY + past)) == [("updated", "nightly/once")]
    assert not (await rig.service.get_schedule(2))["is_active"]
    answer = await applied(rig, NIGHTLY + past.replace("s.once", "s.new"))
    assert answer["warnings"] == ["tasks.nightly.schedules.new: its time has passed: it is over, and not created"]
    assert actions(answer) == [("orphaned", "nightly/once")]
    assert len(await rig.rows()) == 1
    later = NIGHTLY + once.replace("00:01:00", "00:02:00") + "is_active = false\n"  # with a slot again: still nobody wants it
    assert [len((await applied(rig, later))["changes"]) for _ in range(2)] == [1, 0]


async def test_a_key_that_was_given_by_hand_is_not_taken_over_and_one_that_was_moved_is_followed(rig: Rig) -> None:
    await applied(rig, NIGHTLY)
    await rig.patch_task(1, key="other")
    await rig.patch_task(await rig.task(), key="nightly")
    with pytest.raises(Conflict, match=r"tasks.nightly: task 2 was not made by a file"):
        await applied(rig, NIGHTLY)
    await rig.patch_task(2, key=None)
    answer = await applied(rig, NIGHTLY)
    assert actions(answer) == [("orphaned", "other"), ("created", "nightly"), ("created", "nightly/night")]


AFTER = """
[tasks.alarm]
task_type = "bash"
config = { command = "true" }
[tasks.alarm.schedules.broke]
schedule_type = "after"
schedule_config = { tasks = ["nightly"], on = ["broke", "recovered"] }
[tasks.alarm.schedules.any]
schedule_type = "after"
schedule_config = { any = true, on = ["failure"] }
overlap = "skip"
"""


async def test_an_after_schedule_names_tasks_by_their_keys_wherever_they_stand_in_the_file(rig: Rig) -> None:
    head, rest = NIGHTLY.split("\n[tasks.nightly]")
    await applied(rig, head + AFTER + "\n[tasks.nightly]" + rest)
    assert (await rig.service.get_schedule(1))["schedule_config"] == {"task_ids": [2], "on": ["broke", "recovered"]}
    assert (await applied(rig, NIGHTLY + AFTER))["changes"] == []
    file = await exported(rig, owner="ops")
    assert file["tasks"]["alarm"]["schedules"] == {
        "broke": {"schedule_type": "after", "schedule_config": {"tasks": ["nightly"], "on": ["broke", "recovered"]}},
        "any": {"schedule_type": "after", "schedule_config": {"any": True, "on": ["failure"]}, "overlap": "skip"},
    }
    rig.sql("UPDATE tasks SET deleted = 1")
    await applied(rig, tomllib.loads(to_toml(file, {})))
    assert await exported(rig, owner="ops") == file
    answer = await applied(rig, NIGHTLY + AFTER.replace('"broke", "rec', '"success", "rec'))
    assert actions(answer) == [("updated", "alarm/broke")]
    path = "tasks.alarm.schedules.broke.schedule_config.tasks"
    assert await refused_fields(applied(rig, NIGHTLY + AFTER.replace('["nightly"]', '["nightly", "no"]'))) == [f"{path}[1]"]
    back = "[tasks.nightly.schedules.back]\nschedule_type = 'after'\nschedule_config = { tasks = ['alarm'], on = ['success'] }\n"
    said = (await refusal(applied(rig, NIGHTLY + back + AFTER))).detail
    circle = "tasks.nightly.schedules.back.schedule_config.tasks: must not be a circle: "
    assert said in (circle + "nightly → alarm → nightly", circle + "alarm → nightly → alarm")


@each(
    "first second", ("ab", "ba"), ("ba ac", "ab bc"), ("ab bc", "cb ba"), ("ba cb dc", "ab bc cd"), ("ba cbd", "cd ac")
)  # abc: a after b, c
async def test_a_file_may_turn_a_chain_round(rig: Rig, first: str, second: str) -> None:
    def file(chain: str) -> dict[str, Any]:
        bash, keys = {"task_type": "bash", "config": {"command": "true"}}, sorted({*chain} - {" "})
        tasks: dict[str, Any] = {key: {**bash, "schedules": {}} for key in keys}
        for key, *causes in chain.split():
            config = {"tasks": causes, "on": ["success"]}
            tasks[key]["schedules"]["s"] = {"schedule_type": "after", "schedule_config": config}
        return {"chronotask": 1, "tasks": tasks}

    await applied(rig, file(first))
    await applied(rig, file(second), prune="delete")
    assert (await applied(rig, file(second)))["changes"] == []


async def test_secrets_are_masked_in_the_answer_and_a_mask_keeps_what_is_stored(rig: Rig) -> None:
    config = '{ url = "https://me:word@example.org/x", auth = { username = "u", password = "hunter2" } }'
    secret = f'chronotask = 1\n[tasks.a]\ntask_type = "http"\nconfig = {config}'
    answer = await applied(rig, secret)
    more = await applied(rig, secret.replace("hunter2", "swordfish").replace("/x", "/y"))
    assert [*more["changes"][0]["fields"]] == ["config"]
    assert "hunter2" not in str((answer, more)) and "swordfish" not in str(more) and ":word" not in str(more)
    file = await exported(rig)
    assert file["warnings"] == ["tasks.a.config: holds ******** instead of a secret: write ${env:CHRONOTASK_SECRET_…} for it"]
    assert (await applied(rig, file))["changes"] == []
    assert rig.sql("SELECT config ->> '$.auth.password' FROM tasks") == [("swordfish",)]
    rig.sql("UPDATE tasks SET deleted = 1")
    assert await refused_fields(applied(rig, file)) == ["tasks.a.config.url", "tasks.a.config.auth.password"]


async def test_all_that_is_wrong_in_a_file_is_said_as_rest_says_it_with_its_path_and_nothing_is_written(rig: Rig) -> None:
    """What stands in NIGHTLY, what stands there instead, the field that is complained about, and how the complaint begins."""
    bad_key = "must match pattern '^[a-z0-9][a-z0-9._-]{0,99}$'"
    for old, new, path, message in (
        ("chronotask = 1", "chronotask = 2", "chronotask", "must be 1, not 2"),
        ('owner = "ops"', 'ownr = "ops"', "ownr", "unknown field (did you mean owner?)"),
        ('owner = "ops"', 'owner = "The Ops"', "owner", bad_key),
        ("tasks.nightly", "tasks.Nightly", "tasks.Nightly", bad_key),
        ("schedules.night", "schedules.Night", "tasks.nightly.schedules.Night", bad_key),
        ("max_retries = 0", "max_retrys = 0", "tasks.nightly.max_retrys", "unknown field (did you mean max_retries?)"),
        ("max_retries = 0", 'key = "x"', "tasks.nightly.key", "unknown field (known: name, "),
        ("max_retries = 0", "max_retries = -1", "tasks.nightly.max_retries", "must be greater than or equal to 0, not -1"),
        (NIGHTLY[NIGHTLY.index("max_") :], "schedules = 3", "tasks.nightly.schedules", "must be a valid object, not 3"),
        ('command = "true"', 'comand = "true"', "tasks.nightly.config.command", "is required"),
        ("30 2", "30 25", f"{NIGHT}.schedule_config.expression", "'30 25 * * *': hour '25' must be 0 to 23"),
        ("Europe/Berlin", "Berlin", f"{NIGHT}.schedule_config.timezone", "'Berlin': must be an IANA"),
        ('"cron"', '"corn"', f"{NIGHT}.schedule_type", "must be 'cron', 'once', "),
        (', timezone = "Europe/Berlin"', ", in_seconds = 5", f"{NIGHT}.schedule_config.in_seconds", "is no fixed time"),
        ('"cron"', '"cron"\ntask_id = 1', f"{NIGHT}.task_id", "unknown field"),
        ('"cron"', '"cron"\nstart_at = "soon"', f"{NIGHT}.start_at", "must be an ISO 8601 date and time"),
    ):
        error = await refusal(applied(rig, NIGHTLY.replace(old, new)))
        assert f"{path}: {message}" in error.detail, new
    good = {"task_type": "bash", "config": {"command": "true"}}
    minute = {"schedule_type": "interval", "schedule_config": {"seconds": 60}}
    tasks = {
        "a": good,
        "b": {**good, "max_retries": "x", "schedules": {"s": {**minute, "jitter": -1}, "t": minute}},
        "c": {**good, "config": {}, "schedules": {"s": {**minute, "schedule_config": {"seconds": 0}}}},
    }
    assert await refused_fields(applied(rig, {"chronotask": 1, "tasks": tasks})) == [
        "tasks.b.max_retries", "tasks.b.schedules.s.jitter", "tasks.c.config.command",
        "tasks.c.schedules.s.schedule_config.seconds",
    ]  # fmt: skip
    assert rig.sql("SELECT count(*) FROM tasks") == [(0,)]


def test_a_file_that_is_cut_short_too_large_or_not_there_is_refused(tmp_path: Path) -> None:
    for content, message in (
        (None, f"{tmp_path}/file: cannot be read: No such file or directory"),
        (b"chronotask = 1\n[tasks.a", "is no TOML: "),
        (b'{"chronotask": 1, "tasks": {', f"{tmp_path}/file: is not valid JSON"),
        (b'{"chronotask": NaN}', f"{tmp_path}/file: is not valid JSON"),
        (b"\xff\xfe", "is no TOML: 'utf-8' codec"),
        (b"x = " + b"[" * 100_000, "is no TOML: "),
        (b"#" * (8 * 2**20 + 1), "is larger than 8 MiB"),
    ):
        if content is not None:
            (tmp_path / "file").write_bytes(content)
        with pytest.raises(chronotask.ChronoTaskError, match=re.escape(message)):
            chronotask.read_definitions(str(tmp_path / "file"))


async def test_of_two_applies_at_once_each_is_whole(rig: Rig) -> None:
    files = [NIGHTLY.replace('"true"', f'"echo {n}"').replace("30 2", f"{n} 3") for n in range(8)]
    answers = await asyncio.gather(*(applied(rig, file) for file in files))
    assert sorted(len(answer["changes"]) for answer in answers) == [2] * 8
    config = (await rig.service.get_task(1))["config"]["command"].split()[1]
    assert (await rig.service.get_schedule(1))["schedule_config"]["expression"] == f"{config} 3 * * *"
    assert rig.sql("SELECT count(*) FROM tasks") == rig.sql("SELECT count(*) FROM schedules") == [(1,)]


def random_file(rng: random.Random) -> dict[str, Any]:
    """Definitions of any kind; secrets are references, times are to come."""

    def some(**fields: Any) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if rng.random() < 0.5}

    def text() -> str:
        return "x" + random_text(rng).replace("\x01", "").replace("\r", "")

    def task() -> dict[str, Any]:
        command = rng.choice([text(), "echo"])
        bash = some(env={"A": text()}, working_dir="/tmp", timeout=rng.choice([5, 7.5])) | {"command": command}
        http = some(headers={"X-A": "b"}, body={"a": [1, 2.5, text()]}, expected_status=[200]) | {"url": "https://example.org/"}
        kind, config = rng.choice([("bash", bash), ("http", http)])
        more = some(
            description="d" + text(), tags=["a", "b:c"], status=rng.choice(["active", "paused", "disabled"]), max_retries=4,
            retry_delay=rng.choice([1, 0.1 + 0.2]), retry_backoff=3, pause_after=2, name="Some name",
            schedules={f"s{n}": schedule() for n in range(rng.randrange(4))},
        )  # fmt: skip
        return {"task_type": kind, "config": config, **more}

    def schedule() -> dict[str, Any]:
        cron = {"expression": "*/5 1-3 * * MON", **some(timezone="Europe/Berlin")}
        once = {"datetime": "2030-01-01T09:00:00", **some(timezone="Asia/Tokyo")}
        interval = {"seconds": rng.choice([60, 1.5]), **some(start_date="2026-03-01T00:00:00", timezone="UTC")}
        kind, config = rng.choice([("cron", cron), ("once", once), ("interval", interval)])
        more = some(
            is_active=rng.random() < 0.5, overlap="queue", catchup="all", catchup_window=60, jitter=0.5, max_runs=3,
            start_at="2026-02-01T00:00:00Z", end_at="2031-01-01T00:00:00Z",
        )  # fmt: skip
        return {"schedule_type": kind, "schedule_config": config, **more}

    return {"chronotask": 1, "owner": "ops", "tasks": {f"t{n}": task() for n in range(rng.randrange(1, 6))}}


@each("seed", *range(20))
async def test_an_export_is_equal_elsewhere_and_applied_again_changes_nothing(rig: Rig, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    file, other = random_file(rng), random_file(rng)
    await applied(rig, file)
    assert (await applied(rig, file))["changes"] == []
    first = await exported(rig)
    (tmp_path / "file.toml").write_text(to_toml(await exported(rig, owner="ops"), {}), newline="")
    (tmp_path / "file.json").write_text(json.dumps(first))
    for name in ("file.json", "file.toml"):
        rig.sql("UPDATE tasks SET deleted = 1")
        await applied(rig, chronotask.read_definitions(str(tmp_path / name)))
        assert await exported(rig) == first
    await applied(rig, other, prune="delete")
    assert (await applied(rig, other))["changes"] == []


# --- A file that is followed ------------------------------------------------------------------------------------------


async def test_a_followed_file_is_applied_when_it_changes_however_it_changes(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chronotask, "CONFIG_POLL", 0.001)
    path, data, state = tmp_path / "file.toml", tmp_path / "v14" / "f", lambda: rig.service.config_file or {}
    path.write_text(NIGHTLY)
    followed = chronotask.ConfigFile(rig.service, path)
    await followed.begin()
    assert state() == {"path": str(path), "applied_at": "2026-01-01T00:00:00Z", "error": None}
    found = rig.sql("SELECT via, operation, kind, object_id, after ->> '$.managed_by' FROM changes")
    assert found == [(f"file {path}", "create", "task", 1, "ops"), (f"file {path}", "create", "schedule", 1, "ops")]
    assert (await chronotask.get_scheduler_status(rig.service))["config_file"] == state()

    def version(retries: int) -> str:
        return NIGHTLY.replace("max_retries = 0", f"max_retries = {retries}")

    async def becomes(retries: int, error: str = "") -> None:
        async with asyncio.timeout(20):
            while (await rig.service.get_task(1))["max_retries"] != retries or error not in (state()["error"] or ""):
                await asyncio.sleep(0.001)

    path.write_text(version(11))
    await becomes(11)
    (tmp_path / "new").write_text(version(12))
    (tmp_path / "new").rename(path)
    await becomes(12)
    for number in (13, 14):  # as Kubernetes does it: a link to a link to a folder
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}" / "f").write_text(version(number))
        (tmp_path / "link").symlink_to(f"v{number}")
        (tmp_path / "link").rename(tmp_path / "data")
        if number == 13:
            path.unlink()
            path.symlink_to("data/f")
        await becomes(number)
    data.write_text("chronotask = 1\n[tasks.x")
    await becomes(14, "is no TOML")
    data.unlink()
    await becomes(14, "cannot be read")
    assert len([r for r in caplog.records if r.levelname == "ERROR" and "everything stays as it was" in r.getMessage()]) >= 2
    data.write_text(NIGHTLY.replace("schedules.night", "schedules.noon"))
    await becomes(0)
    await until_true(lambda: state()["error"] is None and "nightly/night is not in it any more" in caplog.text, 20)
    for again in (followed.reload, partial(path.chmod, 0o640)):  # perhaps it could not be read
        await rig.patch_task(1, max_retries=5)
        again()
        await becomes(0)


async def test_only_a_leader_applies_a_followed_file(open_rig: OpenRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronotask, "CONFIG_POLL", 0.001)
    (tmp_path / "file.toml").write_text(NIGHTLY)
    leader, other = await open_rig(), await open_rig()
    await chronotask.ConfigFile(other.service, tmp_path / "file.toml").begin()
    assert other.service.config_file == {"path": str(tmp_path / "file.toml"), "applied_at": None, "error": None}
    await asyncio.sleep(0.02)
    assert leader.sql("SELECT count(*) FROM tasks") == [(0,)]
    await leader.close()
    await other.service.leadership.look()
    assert other.service.engine.leading
    await until_true(lambda: leader.sql("SELECT count(*) FROM tasks") == [(1,)], 20)


# --- The way in from a crontab ----------------------------------------------------------------------------------------


ROOT = pwd.struct_passwd(("root", "x", 0, 0, "", "/root", "/bin/bash"))
NASTY = r"""SHELL=/bin/sh
  FOO = a b  c  |
BAR="  quoted  "
'QUX' = 'it"s'
BAZ=$HOME/x
EMPTY=""
DQ="'inner'"
HASH=a#b # no comment
TZ=Asia/Tokyo
A==b
LOGNAME=nobody
HOME=/tmp
PATH=/bin:/usr/bin:/sbin
""".replace("|", "")


# What the cron of Debian 12 (3.0pl1-162) wrote to OUT when its spool held these lines, under NASTY.
@each(
    "line written",
    (r"""* * * * * echo 'c\d' "e\%f" back\\slash > OUT""", "c\\d e%f backslash\n"),
    (r"""* * * * * cat > OUT%line one%line \% two\\%x\y%""", "line one\nline % two\\%x\\y\n"),
    (r"""* * * * * cat > OUT; echo end >> OUT%""", "end\n"),
    ("*\t*  * * *\t \tcat > OUT; date +\\%Y | tr 0-9 9 >> OUT", "9999\n"),
    (r"""* * * * * echo {a,b} $0 "$SHELL" "$HOME" > OUT; pwd >> OUT""", "{a,b} /bin/sh /bin/sh /tmp\n/tmp\n"),
    (
        r"""  * * * * * env | grep -E '^(FOO|BAR|QUX|BAZ|EMPTY|DQ|HASH|TZ|LOGNAME|PATH|HOME|SHELL|A)=' | sort > OUT""",
        "A==b\nBAR=  quoted\nBAZ=$HOME/x\nDQ=inner\nEMPTY=\nFOO=a b  c\nHASH=a#b # no comment\nHOME=/tmp\nLOGNAME=root\n"
        'PATH=/bin:/usr/bin:/sbin\nQUX=it"s\nSHELL=/bin/sh\nTZ=Asia/Tokyo\n',
    ),
    (r"""* * * * * echo "it's" 'a "b"' \$HOME `echo sub` # no comment > OUT; echo never > OUT""", None),
    (r"""* * * Jan-Dec sun-Sat echo \\\% \\\\\\\\ > OUT""", "% \\\n"),
    (r"""0-59/1 */1 1-31,1 1-12/1 0-7/1 read x; read y; echo "$y/$x" > OUT% first%second%%""", "second/first\n"),
    ('SHELL=/bin/bash\n* * * * * echo {a,b} $0 "$SHELL" > OUT; exit 3', "a b /bin/bash /bin/bash\n"),
    ("* * * * * /bin/sh -c pwd > OUT 2>&1", "/tmp\n"),
    ("SHELL=/bin/echo\n* * * * * /bin/sh -c pwd > OUT", None),
)
async def test_a_job_of_a_crontab_does_what_it_did_under_cron(tmp_path: Path, line: str, written: str | None) -> None:
    text = NASTY + line.replace("OUT", str(tmp_path / "out")) + "\n"
    (task,) = read_crontab(text, False, ROOT, "UTC")[0].values()
    outcome = await bash(**task["config"])
    assert output(outcome)["exit_code"] == (3 if "exit 3" in line else 0)
    assert ((tmp_path / "out").read_text() if (tmp_path / "out").exists() else None) == written


def cron_task(name: str, expression: str, zone: str, env: dict[str, str], **config: Any) -> dict[str, Any]:
    """What a line of root's crontab becomes."""
    usual = {"SHELL": "/bin/sh", "HOME": "/root", "PATH": "/usr/bin:/bin", "LOGNAME": "root", **env}
    config |= {"env": usual, "working_dir": "/root", "timeout": 86400}
    times = {"schedule_type": "cron", "schedule_config": {"expression": expression, "timezone": zone}}
    schedules = {"cron": {**times, "overlap": "allow", "catchup": "skip"}}
    return {"name": name, "task_type": "bash", "config": config, "max_retries": 0, "schedules": schedules}


def test_a_crontab_becomes_tasks_that_keep_the_ways_of_cron() -> None:
    first, second = "cd / && run-parts --report /etc/cron.hourly", "/usr/local/bin/backup.sh --full >> /var/log/backup.log 2>&1"
    text = f"# m h dom mon dow command\n\n17 * * * * {first}\nCRON_TZ=Europe/Berlin\nTZ=Asia/Tokyo\n@daily\t{second}\n"
    tasks, comments = read_crontab(text, False, ROOT, "America/New_York")
    zones = {"CRON_TZ": "Europe/Berlin", "TZ": "Asia/Tokyo"}
    shell = {"command": 'exec "$SHELL" -c', "args": [first]}
    assert tasks == {
        "cd-run-parts-report-cron-hourly": cron_task(first, "17 * * * *", "America/New_York", {}, **shell),
        "backup-sh-full": cron_task(second, "@daily", "Europe/Berlin", zones, command=second),
    }
    lines = {"cd-run-parts-report-cron-hourly": [f"line 3: 17 * * * * {first}"], "backup-sh-full": [f"line 6: @daily {second}"]}
    assert comments == {"": [], **lines}


def test_what_a_crontab_has_and_chronotask_has_not_is_told_with_its_line_and_what_to_do() -> None:
    tasks, comments = read_crontab("MAILTO=ops@example.org\n@reboot /bin/a\n\n* * * * * /bin/a", False, ROOT, "UTC")
    assert "schedules" not in tasks["a"]
    assert comments["a"] == [
        "line 2: @reboot /bin/a",
        "No schedule here is about the start of the machine: its init system can ask for a run by",
        "curl -X POST http://127.0.0.1:8000/api/v1/tasks/key:a/execute",
    ]
    advice = "output is kept in the history here. To get it by mail as well, take the # away from:"
    assert comments[""][0] == f"MAILTO=ops@example.org: {advice}"
    told = {"schedule_type": "after", "schedule_config": {"tasks": ["a", "a-2"], "on": ["success", "failure"]}}
    assert tomllib.loads("\n".join(comments[""][1:]))["tasks"]["mail-ops-example-org"]["schedules"]["end"] == told
    assert read_crontab('MAILTO=""\n* * * * * /bin/a\n', False, ROOT, "UTC")[1][""] == []


def test_every_line_that_cannot_be_read_is_named() -> None:
    no_job = "must be five time fields or an @word and a command, or NAME = VALUE"
    for line, said in {
        **dict.fromkeys(("* * * * *", "@hourly", "FOO="), no_job),
        **{f"{t} /bin/a": f"'{t}' is none that cron reads" for t in ("5/9 * * * *", "0 0 L * *", "0 0 * * MON#2", "0 0 * * 5-0")},
        "@Daily /bin/a": "'@Daily' is none that cron reads",
        "@weekdays /bin/a": "schedule_config.expression: '@weekdays': ",
        "61 * * * * /bin/a": "schedule_config.expression: '61 * * * *': ",
        "CRON_TZ=Berlin": "must be an IANA time zone (did you mean Europe/Berlin?)",
        "HOME=work": "config.working_dir: ",
        "CHRONOTASK_X=1": "config.env.CHRONOTASK_X: cannot be set",
        "0 0 * * * root /bin/a": "has a user before its command: --system reads it",
        "0 0 30 2 * /bin/a": "schedule_config.expression: '0 0 30 2 *': must fire at least once",
        "0 0 * * * \udcff": "config.args[0]: must be a valid string, unable to parse raw data as a unicode string",
    }.items():
        error = refused(read_crontab, f"{line}\n* * * * * /bin/fine\n{line}\n", False, ROOT, "UTC")
        assert error.detail.startswith(f"line 1: {said}"), line
        assert [found.field[:6] for found in error.errors] == ["line 1", "line 3"], line


def test_a_system_crontab_has_a_user_who_must_be_the_services() -> None:
    tasks, _ = read_crontab("17 *\t* * *\troot  /bin/a b\n@daily root /bin/c\n", True, ROOT, "UTC")
    assert [task["config"]["command"] for task in tasks.values()] == ["/bin/a b", "/bin/c"]
    assert refused(read_crontab, "* * * * * www-data /bin/a\n* * * * * root\n", True, ROOT, "UTC").errors == (
        ("line 1", "is run as 'www-data', ChronoTask as root: import it where ChronoTask runs as that user"),
        ("line 2", "must be five time fields or an @word, a user and a command, or NAME = VALUE"),
    )


# --- From the command line --------------------------------------------------------------------------------------------


def chronotask_says(folder: Path, *arguments: object) -> tuple[int, str, str]:
    """Status, standard output and errors of a call that ends by itself, on the database in `folder`."""
    done = ran(folder, sys.executable, PROGRAM, *arguments)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_line_applies_exports_and_tells_by_its_status_what_became_of_it(tmp_path: Path) -> None:
    file, says = tmp_path / "jobs.toml", partial(chronotask_says, tmp_path)
    file.write_text(NIGHTLY)
    status, told, _ = says("--apply", file, "--dry-run")
    assert status == 3
    assert re.fullmatch(r"created task nightly\ncreated schedule nightly/night, next 20\d\d-.*T02:30:00\+0[12]:00\n", told)
    assert says("--apply", file)[0] == 0
    assert says("--apply", file, "--dry-run") == (0, "nothing to do\n", "")
    server = Server(tmp_path, database=tmp_path / "c.db").start()  # one more process on a database that is in use
    file.write_text(NIGHTLY.replace("max_retries = 0", "max_retries = 1").replace("schedules.night", "schedules.new"))
    status, told, _ = says("--apply", file)
    first = ["orphaned schedule nightly/night", "updated task nightly", "max_retries: 0 -> 1"]
    assert (status, [*map(str.strip, told.splitlines())][0:3]) == (0, first)
    assert server.get("/tasks/key:nightly")["max_retries"] == 1
    assert server.get("/schedules")["total"] == 2
    assert says("--apply", file, "--dry-run")[:2] == (0, "orphaned schedule nightly/night\n")
    assert says("--apply", file, "--dry-run", "--prune", "delete")[:2] == (3, "deleted schedule nightly/night\n")
    file.write_text(NIGHTLY.replace("30 2", "99 2").replace("task_type", "tusk_type"))
    status, told, errors = says("--apply", file)
    assert (status, told, errors.splitlines()) == (2, "", [
        "chronotask: tasks.nightly.task_type: is required",
        "chronotask: tasks.nightly.tusk_type: unknown field (did you mean task_type?)",
        f"chronotask: {NIGHT}.schedule_config.expression: '99 2 * * *': minute '99' must be 0 to 59, "
        "with , - (upwards) and / (from 1)",
    ])  # fmt: skip
    file.write_text(NIGHTLY.replace('"ops"', '"dev"'))
    status, _, errors = says("--apply", file)
    assert (status, errors.splitlines()[0]) == (1, "chronotask: tasks.nightly: task 1 belongs to ops")
    assert says("--export", tmp_path / "out.toml") == (0, "", "")
    exported = server.get("/export")
    assert tomllib.loads((tmp_path / "out.toml").read_text()) == exported == json.loads(says("--export", "-")[1])
    assert "must be a file of its own" in says("--export", tmp_path / "c.db")[2]
    for wrong in ("--dry-run", "--prune pause", "--system", "--apply none", "--export x --apply jobs.toml"):
        assert says(*wrong.split())[0] == 2


@pytest.mark.slow
def test_a_crontab_is_printed_as_a_file_that_can_be_applied(tmp_path: Path) -> None:
    crontab, jobs, says = tmp_path / "crontab", tmp_path / "jobs.toml", partial(chronotask_says, tmp_path)
    crontab.write_text("MAILTO=root\n0 5 * * * tar -zcf /var/backups/home.tgz /home/ # weekly\n@reboot /bin/a\n* * * * * %in\n")
    status, printed, errors = says("--import-crontab", crontab)
    assert (status, errors) == (0, "")
    jobs.write_text(printed)
    assert says("--apply", jobs)[0] == 0
    jobs.write_text(re.sub("(?m)^# (?=\\[tasks.mail|task_type|config|schedule_)", "", printed))
    assert says("--apply", jobs)[:2] == (0, "created task mail-root\ncreated schedule mail-root/end\n")
    crontab.write_text("0 5 * *\n61 * * * * x\n")
    status, printed, errors = says("--import-crontab", crontab)
    assert (status, printed, len(errors.splitlines())) == (2, "", 2)
    assert says("--import-crontab", tmp_path / "none")[0] == 2


def test_a_service_follows_its_file_and_takes_it_and_its_tokens_up_anew_on_sighup(new_server: NewServer, tmp_path: Path) -> None:
    file, tokens = tmp_path / "jobs.toml", tmp_path / "tokens"
    tokens.write_text("me admin 0123456789abcdef\n")
    tokens.chmod(0o600)
    server = new_server(API_TOKENS_FILE=tokens)
    server.token = {"Authorization": "Bearer 0123456789abcdef"}
    server.command += ["--config", os.path.relpath(file, server.folder)]
    for text in (None, NIGHTLY + "x"):
        if text is not None:
            file.write_text(text)
        assert server.start(ready=False).process.wait(20) == 2
        assert str(file) in server.log()
    file.write_text(NIGHTLY)
    server.start()
    assert server.get("/scheduler/status")["config_file"].items() >= {"path": str(file), "error": None}.items()
    server.expect(200, "PATCH", "/tasks/key:nightly", {"max_retries": 9})
    server.process.send_signal(signal.SIGHUP)
    until(lambda: server.get("/tasks/key:nightly")["max_retries"] == 0, 5, "the file is applied anew")
    tokens.write_text("me admin fedcba9876543210\n")
    server.token = {"Authorization": "Bearer fedcba9876543210"}
    until(lambda: server.ask("GET", "/tasks")[0] == 200, 5, "the new token is known")
    file.write_text(NIGHTLY.replace("max_retries = 0", "max_retries = 0."))
    until(lambda: server.get("/scheduler/status")["config_file"]["error"], 5, "the bad file is noticed")
    assert b"chronotask_config_file_ok 0" in server.get("/metrics")
    file.write_text(NIGHTLY.replace("max_retries = 0", "max_retries = 5"))
    until(lambda: b"chronotask_config_file_ok 1" in server.get("/metrics"), 5, "the metrics say that it is good again")
    assert server.get("/tasks/key:nightly")["max_retries"] == 5
    server.expect(201, "POST", "/schedules", {"task_id": 1, "schedule_type": "interval", "schedule_config": {"seconds": 1}})
    assert server.stop() == 0
    file.write_text("x")
    ran_before = sql(server.database, "SELECT count(*) FROM executions")
    assert server.start(ready=False).process.wait(20) == 2
    assert sql(server.database, "SELECT count(*) FROM executions") == ran_before


@pytest.mark.slow
def test_an_apply_that_is_killed_has_done_all_or_nothing(tmp_path: Path) -> None:
    minute = {"schedule_type": "cron", "schedule_config": {"expression": "* * * * *"}}
    task = {"task_type": "bash", "config": {"command": "true"}, "schedules": {"s": minute}}
    rng, kept = random.Random(20), set()
    db = open_database(tmp_path / "chronotask.db")
    db.execute("PRAGMA busy_timeout = 0")
    environ = {**CHILD_ENVIRON, "CHRONOTASK_DATABASE_URL": f"sqlite:///{tmp_path}/chronotask.db"}
    for version in range(10):
        tasks = {f"t{n}": {**task, "max_retries": version} for n in range(1000)}
        (tmp_path / "jobs.json").write_text(json.dumps({"chronotask": 1, "tasks": tasks}))
        command = [sys.executable, str(PROGRAM), "--apply", str(tmp_path / "jobs.json")]
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
        with contextlib.suppress(sqlite3.OperationalError):  # until it holds the lock of its transaction
            while process.poll() is None:
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
                time.sleep(0.005)
        if version:
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
        process.wait()
        [(found, count)] = db.execute("SELECT max_retries, count(*) FROM tasks GROUP BY 1")
        assert (count, db.execute("SELECT count(*) FROM schedules").fetchone()) == (1000, (1000,))
        kept.add(found)
    db.close()
    assert len(kept) < 10, "none was killed in time"


# ======================================================================================================================
# 13. REST
# ======================================================================================================================


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Api:
    """A client of the REST interface of a service whose scheduler loop goes by itself, at a time that stands still."""

    def __init__(self, client: TestClient[Any, Any], rig: Rig) -> None:
        self.client, self.rig = client, rig

    async def __call__(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        """`path` below /api/v1; one that begins with // is taken from the root. A body of bytes is sent as it is."""
        url = path[1:] if path.startswith("//") else API + path
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {**({} if data is None else {"Content-Type": "application/json"}), **more.pop("headers", {})}
        request = self.client.request(method, url, data=data, headers=headers, allow_redirects=False, **more)
        async with request as response:
            return Answer(response.status, response.headers, await response.text())

    async def get(self, path: str) -> Any:
        """What GET answers, which must be 200."""
        answer = await self("GET", path)
        assert answer.status == 200, answer.text
        return answer.json

    async def made(self, path: str, body: Any) -> int:
        answer = await self("POST", path, body)
        assert answer.status == 201, answer.text
        return int(answer.json["id"])

    async def task(self, **fields: Any) -> int:
        return await self.made("/tasks", {**BASH, "max_retries": 0, **fields})

    async def schedule(self, task_id: int, **fields: Any) -> int:
        return await self.made("/schedules", {**EVERY_MINUTE, "task_id": task_id, **fields})

    async def executed(self, task_id: int) -> int:
        """The id of an execution that is over."""
        answer = await self("POST", f"/tasks/{task_id}/execute?wait=30")
        assert answer.status == 200, answer.text
        return int(answer.json["id"])


BASH = {"name": "t", "task_type": "bash", "config": {"command": "true"}}
EVERY_MINUTE = {"task_id": 1, "schedule_type": "interval", "schedule_config": {"seconds": 60}}
OpenApi = Callable[..., Awaitable[Api]]


@pytest.fixture
async def open_api(open_rig: OpenRig, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenApi]:
    """Opens services with a REST interface, or with `mcp=True` one for MCP."""
    monkeypatch.setattr(chronotask, "TOKENS_POLL", 0.01)
    clients: list[TestClient[Any, Any]] = []

    async def open_one(mcp: bool = False, **changes: Any) -> Api:
        rig = await open_rig(clock=FakeClock(free=True), **changes)
        server = chronotask.make_server(rig.service)
        app = chronotask.make_mcp_app(rig.service, server) if mcp else chronotask.make_app(rig.service)
        clients.append(TestClient(TestServer(app)))
        await clients[-1].start_server()
        return Api(clients[-1], rig)

    yield open_one
    for client in clients:
        await client.close()


@pytest.fixture
async def api(open_api: OpenApi) -> Api:
    return await open_api()


@pytest.fixture
async def mcp(open_api: OpenApi) -> Api:
    """A client of the port that MCP has for itself."""
    return await open_api(mcp=True)


def problem_of(answer: Answer, status: int, *fields: str) -> str:
    """The detail of an error answer in the shape of RFC 9457 that complains about exactly these fields."""
    assert answer.status == status, answer.text
    assert answer.headers["Content-Type"].partition(";")[0] == "application/problem+json"
    body = answer.json
    assert set(body) == {"type", "title", "status", "detail", "errors"}
    assert (body["status"], type(body["detail"]), bool(body["title"])) == (status, str, True)
    assert sorted(error["field"] for error in body["errors"]) == sorted(fields), answer.text
    assert all(set(error) == {"field", "message"} and error["message"] for error in body["errors"])
    return str(body["detail"])


# --- Tasks ------------------------------------------------------------------------------------------------------------

TASK_VIEW = json.loads("""
    {"id": 1, "key": null, "name": "t", "description": "words", "tags": [], "task_type": "bash", "status": "active",
    "status_reason": null, "paused_until": null, "concurrency_group": null, "config": {"command": "true"}, "max_retries": 3,
    "retry_delay": 5, "retry_backoff": 2, "pause_after": null, "managed_by": null, "last_status": null,
    "failures_in_a_row": 0, "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z", "last_run": null,
    "next_run": null, "run_count": 0, "success_count": 0, "failure_count": 0}
""")
SCHEDULE_VIEW = json.loads("""
    {"id": 1, "key": null, "task_id": 1, "task_name": "t", "managed_by": null, "schedule_type": "interval",
    "schedule_config": {"seconds": 60, "timezone": "UTC"}, "is_active": true,
    "description": "Every minute since 2026-01-01 00:00:00 (UTC)", "overlap": "skip", "catchup": "latest",
    "catchup_window": 86400, "jitter": 0, "start_at": null, "end_at": null, "max_runs": null, "exclude": [],
    "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z", "last_run": null,
    "next_run": "2026-01-01T00:01:00Z", "run_count": 0, "notes": []}
""")
SCHEDULE_VIEW["upcoming"] = [{"utc": f"2026-01-01T00:0{n}:00Z", "local": f"2026-01-01T00:0{n}:00+00:00"} for n in range(1, 6)]


async def test_a_task_and_a_schedule_are_created_with_all_their_fields(api: Api) -> None:
    made = (("/tasks", {**BASH, "description": "words"}, TASK_VIEW), ("/schedules", EVERY_MINUTE, SCHEDULE_VIEW))
    for path, body, view in made:
        answer = await api("POST", path, body)
        assert (answer.status, answer.headers["Location"]) == (201, f"/api/v1{path}/1"), path
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
        assert answer.json == view == await api.get(f"{path}/1"), path
    problem_of(await api("POST", "/schedules", {**EVERY_MINUTE, "task_id": 99}), 404)


async def test_tasks_and_schedules_are_listed_in_pages_and_can_be_filtered(api: Api) -> None:
    await api.task(name="a_c", description="some Words")
    await api.task(name="b 100%", status="paused")
    await api.task(name="abc", task_type="http", config={"url": "http://127.0.0.1/"})
    for task_id, active in ((1, True), (2, True), (1, False)):
        await api.schedule(task_id, is_active=active)
    for query, total, ids in (
        ("tasks?", 3, [1, 2, 3]),
        ("tasks?skip=1&limit=1", 3, [2]),
        ("tasks?skip=99", 3, []),
        ("tasks?status=paused", 1, [2]),
        ("tasks?status=active", 2, [1, 3]),
        ("tasks?task_type=http", 1, [3]),
        ("tasks?task_type=bash&status=active", 1, [1]),
        ("tasks?q=B", 2, [2, 3]),
        ("tasks?q=%25", 1, [2]),
        *((f"tasks?q={words}", 1, [1]) for words in ("a_c", "words")),
        *((f"tasks?q={words}", 0, []) for words in ("nothing", "\\")),
        ("schedules?limit=2", 3, [1, 2]),
        ("schedules?skip=2", 3, [3]),
        ("schedules?task_id=1", 2, [1, 3]),
        ("schedules?task_id=99", 0, []),
        ("schedules?is_active=true", 2, [1, 2]),
        ("schedules?is_active=false", 1, [3]),
    ):
        page, (kind, _, asked) = await api.get(f"/{query}"), query.partition("?")
        assert [one["id"] for one in page.pop(kind)] == ids, query
        parameters = {name: int(value) for name, value in urllib.parse.parse_qsl(asked) if name in ("skip", "limit")}
        assert page == {"total": total, "skip": 0, "limit": 100, **parameters}, query


async def test_null_clears_nullable_fields_read_only_ones_are_ignored_and_unknown_ones_refused(api: Api) -> None:
    bounds = {"start_at": "2026-02-01T00:00:00Z", "end_at": "2026-03-01T00:00:00Z", "max_runs": 3}
    await api.schedule(await api.task(description="words"), **bounds)
    assert (await api("PATCH", "/tasks/1", {"description": None})).json["description"] is None
    cleared = (await api("PATCH", "/schedules/1", dict.fromkeys(bounds))).json
    assert {name: cleared[name] for name in bounds} == dict.fromkeys(bounds)
    read_only = {"id": 9, "created_at": "x", "updated_at": 1, "last_run": [], "next_run": {}, "run_count": -1}
    assert (await api("PATCH", "/tasks/1", {**read_only, "success_count": 5, "failure_count": 5})).json["run_count"] == 0
    ignored = {**read_only, "description": 5, "upcoming": "never"}
    assert (await api("PATCH", "/schedules/1", ignored)).json["id"] == 1
    problem_of(await api("PATCH", "/schedules/1", {"success_count": 5}), 422, "success_count")


async def test_deleting_answers_204_once_the_rows_are_gone(api: Api) -> None:
    task_id = await api.task(config={"command": "exec sleep 60"})
    gone, kept = await api.schedule(task_id), await api.schedule(task_id)
    await api("POST", f"/tasks/{task_id}/execute")
    await until_true(lambda: api.rig.service.engine.running)
    [run_id] = [active.run.run_id for active in api.rig.service.engine.running.values()]
    for path in (f"/schedules/{gone}", f"/tasks/{task_id}"):
        answer = await api("DELETE", path)
        assert (answer.status, answer.text) == (204, ""), path
        for method in ("GET", "DELETE"):
            problem_of(await api(method, path), 404)
    assert of_run(run_id) == []
    for table in ("tasks", "schedules", "executions", "attempts"):
        assert api.rig.sql(f"SELECT count(*) FROM {table}") == [(0,)], table
    for path in (f"/tasks/{task_id}/history", f"/schedules/{kept}", "/executions/1"):
        problem_of(await api("GET", path), 404)


async def test_what_the_limits_of_a_task_allow_and_what_is_said_of_a_bad_key_or_tag(api: Api) -> None:
    allowed: dict[str, list[Any]] = {"name": ["x" * 255, "ü" * 255], "description": ["x" * 1000, None], "max_retries": [0, 100]}
    allowed |= {"retry_delay": [0, 86400, 0.5], "retry_backoff": [1, 10], "status": ["disabled"]}
    for name, value in [(name, value) for name, values in allowed.items() for value in values]:
        answer = await api("POST", "/tasks", {**BASH, name: value})
        assert (answer.status, answer.json[name]) == (201, value), name
    made = await api("POST", "/tasks", {**BASH, "retry_delay": 5.0})
    for answer in (made, await api("GET", f"/tasks/{made.json['id']}")):
        assert '"retry_delay":5,' in answer.text, "numbers read the same in the first answer as in later ones"
    for field, value, message in (
        ("key", "", "must match pattern '^[a-z0-9][a-z0-9._-]{0,99}$'"),
        ("key", "Backup", "must match pattern '^[a-z0-9][a-z0-9._-]{0,99}$'"),
        ("key", "a" * 101, "must match pattern '^[a-z0-9][a-z0-9._-]{0,99}$'"),
        ("tags", ["a b"], "must match pattern '^[A-Za-z0-9._:-]{1,50}$'"),
        ("tags", ["a"] * 21, "must have at most 20 items after validation, not 21"),
        ("tags", None, "must be a valid list, not null"),
        ("pause_after", 0, "must be greater than or equal to 1, not 0"),
        ("managed_by", "me", "unknown field"),
    ):
        answer = await api("POST", "/tasks", {**BASH, field: value})
        [error] = answer.json["errors"]
        assert (answer.status, error["field"].partition("[")[0]) == (422, field) and error["message"].startswith(message), error


# --- Executing --------------------------------------------------------------------------------------------------------


async def test_executing_answers_202_and_with_wait_200_once_it_is_over_or_202_at_the_time(api: Api, target: Target) -> None:
    await api.task(config={"command": "echo hi"})
    await api.task(config={"command": "exit 3"}, max_retries=2, retry_delay=0)
    answer = await api("POST", "/tasks/1/execute")
    assert (answer.status, answer.headers["Location"]) == (202, "/api/v1/executions/1")
    assert (answer.json["id"], answer.json["trigger"], answer.json["scheduled_for"]) == (1, "manual", None)
    assert answer.json["status"] in ("queued", "running", "succeeded")
    for task_id, status, success, attempts in ((1, "succeeded", True, 1), (2, "failed", False, 3)):
        waiting = asyncio.ensure_future(api("POST", f"/tasks/{task_id}/execute?wait=30"))
        while not waiting.done():
            api.rig.clock.go(1)  # to the retries
            await asyncio.sleep(0.005)
        answer = waiting.result()
        assert (answer.status, answer.json["status"], answer.json["success"]) == (200, status, success), task_id
        assert len(answer.json["attempts"]) == attempts
    answer = await api("POST", f"/tasks/{await api.task(**target.config('/hold'))}/execute?wait=0.05")
    assert (answer.status, answer.json["status"]) == (202, "running")
    target.let_go.set()


async def test_a_wait_that_is_no_number_from_0_to_300_is_refused_and_a_stopping_service_answers_503(api: Api) -> None:
    await api.task()
    for wait in ("-1", "301", "nan", "inf", "x", "", "1,5"):
        problem_of(await api("POST", f"/tasks/1/execute?wait={wait}"), 422, "wait")
    folder, aside = api.rig.path.parent, api.rig.path.parent.with_name("aside")
    for there, then, status in ((folder, aside, 503), (aside, folder, 200)):
        there.rename(then)
        with contextlib.suppress(OSError):
            await api.rig.service.leadership.step()
        asked = [(await api(*call)).status for call in (("GET", "//health"), ("POST", "/scheduler/pause"))]
        assert asked == [status, status], "told, and what a restart loses is not promised"
    api.rig.service.engine.stopping = True
    for stop in (asyncio.sleep(0), api.rig.service.stop()):
        await stop
        for path, body in (("/tasks", BASH), ("/tasks/1/execute", None), ("/schedules", EVERY_MINUTE)):
            problem_of(await api("POST", path, body), 503)
        problem_of(await api("DELETE", "/tasks/1"), 503)
        assert (await api("GET", "/tasks/1")).status == 200
    assert (await api.get("/executions"))["executions"] == []


async def waiting_client(api: Api, target: Target) -> asyncio.Future[Answer]:
    """Somebody who waits for the end of an execution that has begun, of a task that calls `target`."""
    waiting = asyncio.ensure_future(api("POST", f"/tasks/{await api.task(**target.config('/hold'))}/execute?wait=30"))
    await until_true(lambda: target.held)
    return waiting


async def test_a_change_takes_effect_although_its_caller_has_gone_meanwhile(rig: Rig) -> None:
    await rig.executed(task_id := await rig.task(config={"command": "sleep 0.3"}))
    await rig.service.changes.poll()
    for call, status in ((rig.execute(task_id), "running"), (rig.service.cancel_execution(2), "cancelled")):
        await rig.tick()
        busy, job = asyncio.ensure_future(rig.service.store.write(lambda db: time.sleep(0.1))), asyncio.create_task(call)
        await asyncio.sleep(0.02)
        assert job.cancel()
        await asyncio.wait({busy, job, asyncio.ensure_future(rig.service.store.write(lambda db: None))})
        await (rig.tick() if status == "running" else rig.finish())
        assert await rig.statuses() == ["succeeded", status]


async def test_a_waiting_client_hears_404_when_its_task_is_deleted_and_202_at_shutdown(open_api: OpenApi, target: Target) -> None:
    api = await open_api(shutdown_grace=5.0)
    waiting, other = await waiting_client(api, target), await api.task()
    assert (await api("DELETE", f"/tasks/{other}")).status == 204
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done, "it hears nothing of other deletions"
    assert (await api("DELETE", "/tasks/1")).status == 204
    problem_of(await waiting, 404)
    target.held = 0
    waiting = await waiting_client(api, target)
    stopping = asyncio.ensure_future(api.rig.close())
    answer = await waiting
    assert (answer.status, answer.json["status"]) == (202, "running")
    target.let_go.set()
    await stopping


async def test_an_execution_is_run_again_with_its_slot_and_its_override(rig: Rig) -> None:
    schedule_id = await rig.schedule(await rig.task(config={"command": "echo $CHRONOTASK_SCHEDULED_FOR"}), max_runs=2)
    await rig.run_at(60)
    [first] = await rig.rows(output="full")
    for _ in range(2):
        again = (await rig.service.rerun_execution(first["id"], chronotask.WaitQuery()))["id"]
    with pytest.raises(Conflict, match="execution 3 is not over yet: queued"):
        await rig.service.rerun_execution(again, chronotask.WaitQuery())
    await rig.finish()
    rows = await rig.rows(output="full")
    assert [(row["trigger"], row["status"], row["rerun_of"]) for row in rows[1:]] == [("rerun", "succeeded", first["id"])] * 2
    for name in ("schedule_id", "scheduled_for", "config"):
        assert [row[name] for row in rows] == [first[name]] * 3
    assert {row["output_data"]["stdout"] for row in rows} == {"2026-01-01T00:01:00Z\n"}
    assert (await rig.service.get_schedule(schedule_id))["run_count"] == 1, "what somebody asks for is no run of max_runs"
    await rig.patch_task(1, status="disabled")
    with pytest.raises(Conflict, match="task 1 is disabled"):
        await rig.service.rerun_execution(first["id"], chronotask.WaitQuery())


async def test_one_run_replaces_single_fields_of_its_tasks_config(api: Api) -> None:
    usual = {"command": "echo", "args": ["usual"], "env": {"A": "1"}}
    await api.task(config=usual, max_retries=1, retry_delay=0)
    for sent, stdout in (({"args": ["--since", "monday"]}, "--since monday\n"), ({"args": None}, "\n"), ({}, "usual\n")):
        answer = await api("POST", "/tasks/1/execute?wait=30", {"config": sent})
        assert (answer.json["output_data"]["stdout"], answer.json["config"]) == (stdout, sent or None), sent
    assert (await api.get("/tasks/1"))["config"] == usual
    rerun = await api("POST", "/executions/1/rerun?wait=30")
    assert (rerun.status, rerun.headers["Location"]) == (200, "/api/v1/executions/4")
    assert rerun.json["output_data"]["stdout"] == "--since monday\n"
    for wrong, field in (({"arg": []}, "config.arg"), ({"command": None}, "config.command"), ({"timeout": 0}, "config.timeout")):
        problem_of(await api("POST", "/tasks/1/execute", {"config": wrong}), 422, field)
    problem_of(await api("POST", "/tasks/1/execute", {"conf": {}}), 422, "conf")
    problem_of(await api("POST", "/tasks/1/execute", []), 422, "")
    assert len((await api.get("/executions"))["executions"]) == 4


async def test_an_override_is_masked_and_sends_no_secret_of_the_task_elsewhere(api: Api, target: Target) -> None:
    await api.task(**target.config(headers={"Authorization": "Bearer s3cret"}))
    sent = {"url": target.url + "/other", "headers": {"Authorization": "Bearer 0ther", "X-A": "1"}}
    answer = await api("POST", "/tasks/1/execute?wait=30", {"config": sent})
    shown = {"url": target.url + "/other", "headers": {"Authorization": MASK, "X-A": "1"}}
    assert (answer.json["config"], target.requests[0].headers["Authorization"]) == (shown, "Bearer 0ther")
    assert "0ther" not in (await api("GET", "/executions")).text
    await api("POST", "/executions/1/rerun?wait=30")
    assert target.requests[1].headers["Authorization"] == "Bearer 0ther"
    moved = {"url": target.url.replace("127.0.0.1", "localhost")}
    problem_of(await api("POST", "/tasks/1/execute", {"config": moved}), 422, "config.headers.Authorization")
    for secret, arrives in ((MASK, "Bearer s3cret"), ("Bearer 0nce", "Bearer 0nce")):
        await api("PATCH", "/tasks/1", target.config(headers={"Authorization": "Bearer s3cret"}))
        answer = await api("POST", "/tasks/1/execute?wait=30", {"config": {"headers": {"Authorization": secret}}})
        await api("PATCH", "/tasks/1", {"config": moved})
        await api("POST", f"/executions/{answer.json['id']}/rerun?wait=30")
        got = [(request.headers["Authorization"], request.headers["Host"]) for request in target.requests[-2:]]
        assert got == [(arrives, target.url.removeprefix("http://"))] * 2, "to the server that it was given for"
    await api("PATCH", "/tasks/1", {"config": moved | {"body": ["${env:CHRONOTASK_SECRET_OF_THE_NEW_SERVER}"]}})
    problem_of(await api("POST", f"/executions/{answer.json['id']}/rerun"), 422, "config.body")


async def test_an_override_is_checked_when_it_is_asked_for_and_when_it_runs(rig: Rig, open_rig: OpenRig, target: Target) -> None:
    task_id = await rig.task(max_retries=3)
    await rig.execute(task_id, {"config": {"args": ["x"]}})
    await rig.patch_task(task_id, **target.config())
    await rig.finish()
    [row] = await rig.rows()
    assert row["status"] == "failed" and "the config of this execution no longer fits its task" in row["error_message"]
    task_id = await rig.task(config={"command": "echo"}, max_retries=3)
    await rig.execute(task_id, {"config": {"command": "printf x"}})
    rig = await restarted(rig, open_rig, allowed_bash_commands=("echo",))
    await rig.finish()
    [row] = await rig.rows(task_id=task_id)
    assert row["status"] == "failed" and "the command must be one of echo" in row["error_message"]
    call = rig.service.execute_task(task_id, chronotask.ExecuteQuery(), {"config": {"command": "printf x"}})
    for asked in (call, rig.service.rerun_execution(row["id"], chronotask.WaitQuery())):
        assert await refused_fields(asked) == ["config.command"]


async def test_the_same_idempotency_key_runs_a_task_once_within_a_day(rig: Rig) -> None:
    first, other = await rig.task(), await rig.task()
    one = await rig.execute(first, idempotency_key="k")
    assert await rig.execute(first, idempotency_key="k") == one
    await rig.finish()
    assert await rig.execute(first, idempotency_key="k") == one
    assert len({one, await rig.execute(other, idempotency_key="k"), await rig.execute(first, idempotency_key="K")}) == 3
    call = rig.service.execute_task(first, chronotask.ExecuteQuery(idempotency_key="k"), {"config": {"args": ["x"]}})
    assert await refused_fields(call) == ["Idempotency-Key"]
    await rig.finish()
    await rig.run_at(86_399)
    rig.sql("DELETE FROM executions WHERE id = ?", one)  # as retention does
    with pytest.raises(Conflict, match=f"has started execution {one}, which the history no longer holds: it is not run again"):
        await rig.execute(first, idempotency_key="k")
    assert len(await rig.rows()) == 2
    await rig.run_at(86_401)
    assert await rig.execute(first, idempotency_key="k") not in (one, None)
    await rig.service.delete_task(other)
    assert rig.sql("SELECT task_id, key FROM idempotency") == [(first, "k")]


async def test_an_idempotency_key_is_a_header_of_visible_characters(api: Api) -> None:
    await api.task()
    answers = [await api("POST", "/tasks/1/execute", headers={"Idempotency-Key": key}) for key in ("a!~", "a!~", "x" * 255)]
    assert [(answer.status in (200, 202), answer.json["id"]) for answer in answers] == [(True, 1), (True, 1), (True, 2)]
    for key in ("", "a b", "ä", "x" * 256):
        problem_of(await api("POST", "/tasks/1/execute", headers={"Idempotency-Key": key}), 422, "Idempotency-Key")
    problem_of(await api("POST", "/tasks/1/execute?idempotency_key=x"), 422, "idempotency_key")


async def test_executions_and_a_tasks_history_are_newest_first_with_filters_and_a_cursor_or_pages(api: Api) -> None:
    first, second = await api.task(), await api.task(config={"command": "exit 1"})
    await api.schedule(first)
    assert [await api.executed(task) for task in (first, second, first, second)] == [1, 2, 3, 4]
    api.rig.clock.go(60)
    while len(rows := (await api.get("/executions"))["executions"]) < 5 or rows[0]["status"] != "succeeded":
        await asyncio.sleep(0.002)
    await api("PATCH", f"/tasks/{first}", {"config": {"command": "exit 1"}})
    assert await api.executed(first) == 6
    for query, ids in {
        "": [6, 5, 4, 3, 2, 1],
        "task_id=2": [4, 2],
        "schedule_id=1": [5],
        "trigger=schedule": [5],
        "trigger=manual&status=failed": [6, 4, 2],
        "status=running": [],
        "before_id=3": [2, 1],
    }.items():
        assert [row["id"] for row in (await api.get(f"/executions?{query}"))["executions"]] == ids, query
    pages, before = [], ""
    for _ in range(2):
        page = await api.get(f"/executions?limit=4{before}")
        assert set(page) == {"executions", "next_before_id"}
        pages.append([row["id"] for row in page["executions"]])
        before = f"&before_id={page['next_before_id']}"
    assert (pages, page["next_before_id"]) == ([[6, 5, 4, 3], [2, 1]], None)
    for query, total, ids in [
        ("", 4, [6, 5, 3, 1]),
        ("success=true", 3, [5, 3, 1]),
        ("success=false", 1, [6]),
        ("status=failed", 1, [6]),
        ("status=queued", 0, []),
        ("success=true&status=failed", 0, []),
        ("status=failed,cancelled", 1, [6]),
        ("status=unfinished", 0, []),
        ("status=succeeded,unfinished,failed&limit=2", 4, [6, 5]),
        ("until=2025-12-31T23:59:59Z", 0, []),
        ("since=2026-01-01T00:00:00Z", 4, [6, 5, 3, 1]),
        ("since=2026-01-02", 0, []),
        ("since=2026-01-01&until=2026-01-01&status=succeeded", 3, [5, 3, 1]),
        ("skip=1&limit=1", 4, [5]),
    ]:
        page = await api.get(f"/tasks/1/history?{query}")
        assert set(page) == {"total", "skip", "limit", "history"}
        assert (page["total"], [row["id"] for row in page["history"]]) == (total, ids), query
    problem_of(await api("GET", "/tasks/99/history"), 404)


async def test_since_and_until_choose_what_lies_at_least_partly_in_between(rig: Rig, target: Target) -> None:
    quick, slow = await rig.task(), await rig.task(**target.config("/hold"))
    await rig.at(10)
    await rig.execute(slow)  # from 10 to 40
    await rig.at(20)
    await rig.ended(await rig.begun(quick))
    await rig.at(40)
    await rig.let_go(target)
    await rig.execute(quick)  # from 40 on
    asked = {(0, 9): [], (0, 10): [1], (21, 39): [1], (20, 20): [1, 2], (40, None): [1, 3], (41, 50): [3], (None, 39): [1, 2]}
    for (since, until), found in asked.items():
        span = {name: format_instant(START + t * S) for name, t in (("since", since), ("until", until)) if t is not None}
        assert [row["id"] for row in await rig.rows(**span)] == found, span
    assert [row["id"] for row in await rig.rows(status="unfinished,failed")] == [3]
    assert refused(chronotask.parse, chronotask.ExecutionQuery, {"since": "yesterday"}).errors[0].field == "since"


def test_a_page_of_what_is_rare_reads_no_more_rows_than_it_shows(store: Store) -> None:
    """Of 5,000 executions. SQLite counts the steps of a statement."""
    db, task = store._db, chronotask.insert(store._db, some_task("t"))
    new = [chronotask.NewExecution(task.id, n % 2 + 1, "schedule", n, n) for n in range(5_000)]
    new[5].trigger, new[6].schedule_id = "manual", 7
    chronotask.insert_executions(db, new)
    db.execute("UPDATE executions SET status = 'succeeded', finished_at = queued_at")
    db.execute("UPDATE executions SET status = 'failed' WHERE id < 4")
    db.execute("UPDATE executions SET status = 'skipped' WHERE id = 4")
    steps: list[int] = []
    for query in (
        {"status": "failed"}, {"status": "failed,skipped,cancelled"}, {"status": "unfinished"}, {"trigger": "manual"},
        {"trigger": "rerun"}, {"schedule_id": 7}, {"status": "timed_out", "task_id": 1}, {"status": "missed", "task_id": 1},
        {"task_id": 1}, {"status": "succeeded"}, {"schedule_id": 1}, {},
    ):  # fmt: skip
        steps.clear()
        db.set_progress_handler(lambda: steps.append(1), 100)
        chronotask.list_executions(db, chronotask.ExecutionQuery(limit=10, **query))
        db.set_progress_handler(None, 0)
        assert len(steps) < 40, query


def test_what_comes_next_is_found_in_the_order_of_an_index(store: Store) -> None:
    db, queries = store._db, list[str]()
    db.set_trace_callback(queries.append)
    chronotask.next_schedules(db, chronotask.UpcomingQuery(), START)
    db.set_trace_callback(None)
    plan = [row[3] for row in db.execute("EXPLAIN QUERY PLAN " + queries[0])]
    assert "SEARCH s USING INDEX schedules_next (next_fire<?)" in plan and not any("ORDER BY" in step for step in plan)


async def test_cancelling_answers_200_when_it_is_over_and_409_afterwards(api: Api) -> None:
    await api.task(config={"command": "exec sleep 60"}, max_retries=3)
    await api("POST", "/tasks/1/execute")
    answer = await api("POST", "/executions/1/cancel")
    assert (answer.status, answer.json["status"], answer.json["success"]) == (200, "cancelled", None)
    assert answer.json["next_attempt_at"] is None
    assert await api.get("/executions/1") == answer.json
    assert "cancelled" in problem_of(await api("POST", "/executions/1/cancel"), 409)
    for call in ("cancel", "rerun"):
        problem_of(await api("POST", f"/executions/99/{call}"), 404)


async def test_texts_in_lists_are_cut_to_4096_characters(api: Api, target: Target) -> None:
    await api.executed(await api.task(config={"command": "head -c 5000 /dev/zero | tr '\\0' x; echo short >&2"}))
    for path, key in (("/tasks/1/history", "history"), ("/executions", "executions")):
        output = (await api.get(path))[key][0]["output_data"]
        assert (output["stdout"][:4096], len(output["stdout"]) < 4300, output["stderr"]) == ("x" * 4096, True, "short\n")
        assert "904 more" in output["stdout"], path
        assert (await api.get(f"{path}?output=full"))[key][0]["output_data"]["stdout"] == "x" * 5000
        assert (await api.get(f"{path}?output=none"))[key][0]["output_data"] is None, path
        problem_of(await api("GET", f"{path}?output=some"), 422, "output")
    assert (await api.get("/executions/1"))["output_data"]["stdout"] == "x" * 5000
    await api.executed(await api.task(config={"command": "head -c 4096 /dev/zero | tr '\\0' x"}))
    assert (await api.get("/executions"))["executions"][0]["output_data"]["stdout"] == "x" * 4096
    target.answer(200, {"Content-Type": "application/json"}, json.dumps({"list": ["x" * 10] * 2000}).encode())
    large = await api.executed(await api.task(**target.config()))
    assert len(json.dumps((await api.get("/executions"))["executions"][0]["output_data"]["body"])) < 5000
    assert (await api.get(f"/executions/{large}"))["output_data"]["body"] == {"list": ["x" * 10] * 2000}


async def test_a_stream_whose_execution_is_deleted_ends_and_one_that_fails_breaks_off(api: Api) -> None:
    for number, broken in ((1, False), (2, True)):
        await api.task(config={"command": "echo on; sleep 4"})
        await api("POST", f"/tasks/{number}/execute")
        stream = await api.client.get(f"{API}/executions/{number}/output?follow=true")
        assert await stream.content.readline() == b"on\n"
        _ = api.rig.sql("ALTER TABLE attempts RENAME TO others") if broken else await api("DELETE", "/tasks/1")
        with pytest.raises(ClientError, match="Not enough data") if broken else contextlib.nullcontext():  # no answer in it
            assert await stream.read() == b""


async def test_the_output_of_all_attempts_can_be_followed_in_each_process(api: Api, open_api: OpenApi, tmp_path: Path) -> None:
    gated = f"mkfifo {tmp_path}/gate; echo begun; cat {tmp_path}/gate; false"
    command = f"case $CHRONOTASK_ATTEMPT in 1) {gated};; *) echo last; echo lines >&2; esac"
    await api.task(config={"command": command}, max_retries=1, retry_delay=0)
    await api("POST", "/tasks/1/execute")
    apis = [api, await open_api(kind="mcp", database_url=api.rig.path)]
    while (await api("GET", "/executions/1/output")).text != "begun\n":
        await asyncio.sleep(0.01)
    assert (await apis[1]("GET", "/executions/1/output")).text == "begun\n"
    following = [asyncio.ensure_future(one("GET", "/executions/1/output?follow=true")) for one in apis]
    await until_true(lambda: api.rig.sql("SELECT stream FROM live_output WHERE total > 0") == [("stdout 1",)])
    await asyncio.to_thread((tmp_path / "gate").write_text, "ended\n")
    await until_true(lambda: api.rig.sql("SELECT attempt FROM attempts") == [(1,)])
    api.rig.clock.go(1)
    texts = [answer.text for answer in await asyncio.gather(*following, api("GET", "/executions/1/output?follow=true"))]
    assert texts == ["begun\nended\nlast\nlines\n"] * 3
    answer = await api("GET", "/executions/1/output")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert answer.text == "last\n--- stderr ---\nlines\n"
    problem_of(await api("GET", "/executions/1/output?follow=perhaps"), 422, "follow")


# --- Schedules and the scheduler --------------------------------------------------------------------------------------


async def test_a_key_stands_wherever_a_task_s_id_may_stand(api: Api) -> None:
    task_id, key = await api.task(key="nightly.backup-1", tags=["ops", "db:main", "ops"]), "key:nightly.backup-1"
    await api.task(name="other")
    assert await api.made("/schedules", {**EVERY_MINUTE, "task_id": key}) == 1
    assert (await api.get("/schedules/1"))["task_id"] == task_id
    task = await api.get(f"/tasks/{key}")
    assert (task["id"], task["key"], task["tags"]) == (task_id, "nightly.backup-1", ["ops", "db:main"])
    assert (await api("POST", f"/tasks/{key}/execute")).json["task_id"] == task_id
    for name, query in (("schedules", f"task_id={key}"), ("executions", f"task_id={key}"), ("tasks", "key=nightly.backup-1")):
        assert len((await api.get(f"/{name}?{query}"))[name]) == len((await api.get(f"/{name}?tag=db:main"))[name]) == 1, name
        assert (await api.get(f"/{name}?tag=db"))[name] == [], name
    assert {change["object_id"] for change in (await api.get(f"/changes?kind=task&id={key}"))["changes"]} == {task_id}
    problem_of(await api("GET", f"/changes?kind=schedule&id={key}"), 422, "id")
    assert (await api("PATCH", f"/tasks/{key}", {"key": None})).json["key"] is None
    assert problem_of(await api("GET", f"/tasks/{key}"), 404) == f"there is no task {key}"


async def test_a_task_is_made_with_its_schedules_or_not_at_all(api: Api) -> None:
    minute = {name: value for name, value in EVERY_MINUTE.items() if name != "task_id"}
    nested = [{"key": "night", **minute}, {"schedule_type": "cron", "schedule_config": {"expression": "0 2 * * *"}}]
    answer = await api("POST", "/tasks", {**BASH, "key": "a", "schedules": nested})
    task = answer.json
    assert answer.status == 201, answer.text
    found = [(schedule["key"], schedule["task_id"], schedule["task_name"]) for schedule in task["schedules"]]
    assert found == [("night", task["id"], "t"), (None, task["id"], "t")]
    assert task["next_run"] == task["schedules"][0]["next_run"] == "2026-01-01T00:01:00Z"
    assert (await api("PUT", "/tasks/1", task)).status == 200 and (await api.get("/schedules"))["total"] == 2
    bad = [{**minute, "overlapp": "skip"}, {**EVERY_MINUTE, "task_id": 1}]
    answer = await api("POST", "/tasks", {**BASH, "schedules": bad})
    assert "did you mean overlap?" in problem_of(answer, 422, "schedules[0].overlapp", "schedules[1].task_id")
    bad = [minute, {"schedule_type": "cron", "schedule_config": {"expression": "61 * * * *"}}, *nested[:1] * 2]
    answer = await api("POST", "/tasks", {**BASH, "config": {}, "schedules": bad})
    problem_of(answer, 422, "config.command", "schedules[1].schedule_config.expression")
    assert (await api("POST", "/tasks", {**BASH, "schedules": nested[:1] * 2})).status == 409
    assert (await api.get("/tasks"))["total"] == 1


async def test_a_key_belongs_to_one_task_and_to_one_schedule_of_a_task(api: Api) -> None:
    first, second = await api.task(key="a"), await api.task(key="b")
    for call in (("POST", "/tasks", {**BASH, "key": "a"}), ("PATCH", f"/tasks/{second}", {"key": "a"})):
        answer = await api(*call)
        assert (answer.status, answer.json["detail"]) == (409, "key: task 1 has the key a already"), call
    assert (await api("PATCH", f"/tasks/{first}", {"key": "a", "name": "n"})).status == 200
    assert (await api("DELETE", f"/tasks/{first}")).status == 204
    await api.task(key="a")
    await api.schedule(second, key="night")
    await api.schedule(3, key="night")
    assert (await api("POST", "/schedules", {**EVERY_MINUTE, "task_id": 3, "key": "night"})).status == 409
    await api.schedule(3, key="day")
    assert (await api("PATCH", "/schedules/3", {"key": "night"})).status == 409


async def test_a_preview_answers_words_and_slots_found_off_the_loop(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"schedule_type": "cron", "schedule_config": {"expression": "30 9 * * *", "timezone": "Europe/Berlin"}, "count": 2}

    async def preview(body: Any = body, **more: Any) -> Any:
        answer = await api("POST", "/schedules/preview", {**body, **more})
        assert answer.status == 200, answer.text
        return answer.json

    shown = await preview()
    winter = {"utc": "2026-01-01T08:30:00Z", "local": "2026-01-01T09:30:00+01:00"}
    assert shown["upcoming"] == [winter, {"utc": "2026-01-02T08:30:00Z", "local": "2026-01-02T09:30:00+01:00"}]
    assert "Europe/Berlin" in shown["description"]
    summer = (await preview(after="2026-07-01T12:00:00"))["upcoming"][0]
    assert summer == {"utc": "2026-07-02T07:30:00Z", "local": "2026-07-02T09:30:00+02:00"}
    assert len((await preview(count=1000))["upcoming"]) == 1000
    jittered = await preview(jitter=60)
    assert "jitter" in jittered["note"] and jittered["upcoming"][0] == winter
    assert len((await preview(EVERY_MINUTE, overlap="queue"))["upcoming"]) == 5
    monkeypatch.setattr(chronotask.Plan, "upcoming", lambda *_: (threading.get_ident() for _ in "1"))
    assert (await preview())["upcoming"][0]["utc"] != format_instant(threading.get_ident())
    assert (await api.get("/schedules"))["total"] == 0


async def test_the_status_of_the_scheduler_and_its_pause_which_stops_all_firing(api: Api) -> None:
    await api.schedule(await api.task(name="next"))
    await api.schedule(await api.task(), is_active=False)
    status = await api.get("/scheduler/status")
    assert (status["running"], status["leader"], status["paused"], status["timezone"]) == (True, True, False, "UTC")
    assert (status["tasks"], status["schedules"], status["active_schedules"]) == (2, 2, 1)
    assert status["executions"] == {"queued": 0, "running": 0, "retrying": 0}
    assert (len(status["next_runs"]), status["next_runs"][0]["task_name"]) == (5, "next")
    assert status["lateness"]["count"] == 0
    answer = await api("POST", "/scheduler/pause")
    assert (answer.status, answer.json["paused"], answer.json["next_runs"]) == (200, True, [])
    assert (await api.get("/tasks/1"))["next_run"] is (await api.get("/schedules"))["schedules"][0]["next_run"] is None
    answer = await api("POST", "/scheduler/resume")
    assert (answer.status, answer.json["paused"]) == (200, False)
    assert (await api.get("/tasks/1"))["next_run"] == "2026-01-01T00:01:00Z"
    await api("DELETE", "/schedules/1")
    assert (await api.get("/tasks/1"))["next_run"] is None, "without its only schedule"


async def test_upcoming_is_the_true_order_of_what_fires_each_schedule_as_often_as_it_does(api: Api) -> None:
    first, second, idle = await api.task(name="a", tags=["x"]), await api.task(name="b"), await api.task(status="paused")
    await api.schedule(first, schedule_config={"seconds": 40})
    await api.schedule(second, schedule_config={"seconds": 60}, max_runs=1)
    await api.schedule(idle)
    zone = {"expression": "1 1 * * *", "timezone": "Europe/Berlin"}
    await api.schedule(second, schedule_type="cron", schedule_config=zone)
    for query, found in [
        ("limit=5", [(1, 40), (2, 60), (4, 60), (1, 80), (1, 120)]),
        ("until=2026-01-01T00:01:00Z", [(1, 40), (2, 60), (4, 60)]),
        ("until=2026-01-02&task_id=2", [(2, 60), (4, 60), (4, 86_460)]),
        ("task_id=2", [(2, 60), (4, 60)]),
        ("tag=x&limit=2", [(1, 40), (1, 80)]),
        ("tag=y", []),
    ]:
        page = await api.get(f"/upcoming?{query}")
        assert [(row["schedule_id"], offset(row["utc"])) for row in page["upcoming"]] == found, query
    berlin = {"utc": "2026-01-01T00:01:00Z", "local": "2026-01-01T01:01:00+01:00"}
    row = (await api.get("/upcoming?task_id=2"))["upcoming"][1]
    assert row == {"schedule_id": 4, "task_id": 2, "task_name": "b", **berlin}
    status = await api.get("/scheduler/status")
    assert (status["now"], status["next_runs"]) == ("2026-01-01T00:00:00Z", (await api.get("/upcoming?limit=5"))["upcoming"])
    for wrong in ("limit=1001", "until=soon", "until=2025-12-31", "task_id=x"):
        problem_of(await api("GET", f"/upcoming?{wrong}"), 422, wrong.partition("=")[0])
    for broken in ("{", '{"seconds": 40, "timezone": "Mars/Phobos"}', '{"seconds": 0, "timezone": "UTC"}'):
        api.rig.sql("UPDATE schedules SET schedule_config = ? WHERE id = 1", broken)
        assert [offset(row["utc"]) for row in (await api.get("/upcoming?limit=3"))["upcoming"]] == [60, 60], broken
    await api("POST", "/scheduler/pause")
    assert (await api.get("/upcoming"))["upcoming"] == []


# --- Outside of the API -----------------------------------------------------------------------------------------------


async def test_the_root_tells_what_this_is_and_health_is_200_and_503_with_the_reason(api: Api) -> None:
    body = await api.get("//")
    assert (body["name"], body["version"], body["status"]) == ("ChronoTask", chronotask.__version__, "healthy")
    for link in body["links"].values():
        if link != API:
            assert (await api("GET", "/" + link)).status == 200, link
    await api.task()
    for path in ("/tasks", "/tasks/1", "/scheduler/status", "//", "//health"):
        answer = await api("HEAD", path)
        assert (answer.status, answer.text) == (200, ""), path
    assert (await api.get("//health"))["status"] == "healthy"
    api.rig.clock.steady += 11
    answer = await api("GET", "//health")
    assert (answer.status, answer.json["status"]) == (503, "unhealthy")
    assert "has not ticked for 11 s" in answer.json["reason"]


async def test_metrics_are_in_the_format_of_prometheus_whatever_a_task_is_called(api: Api) -> None:
    for name in ('a "quoted"\\ name', 'a"} 1 #', "a\\", 'a\\"', "{}", "a,b=c", "ä\u3000#"):
        await api.executed(await api.task(name=name))
    answer = await api("GET", "//metrics")
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    line = r'(# (HELP|TYPE) [a-z_]+ .+|[a-z_]+(\{([a-z_]+="([^"\\\n]|\\["\\n])*",?)+\})? -?([0-9.]+(e[+-]?[0-9]+)?|\+Inf|NaN))'
    assert [text for text in answer.text.splitlines() if not re.fullmatch(line, text)] == []
    assert 'chronotask_executions_total{task_type="bash",status="succeeded"} 7' in answer.text
    assert "true" not in [text.split()[-1] for text in answer.text.splitlines()]
    of_release_1 = """executions_total execution_duration_seconds start_lateness_seconds executions executions_running_here
        tasks schedules database_size_bytes writer_queue_length loop_lag_seconds leader info""".split()
    assert {f"chronotask_{name}" for name in of_release_1} <= set(re.findall(r"# TYPE (\S+)", answer.text))


async def test_every_task_has_its_series_before_anything_has_happened(api: Api) -> None:
    await api.task(key="k")
    await api.task(config={"command": "exit 1"}, name="bad")
    before = (await api("GET", "//metrics")).text.splitlines()
    of = 'task_id="1",task="t",key="k"'
    assert {f"chronotask_{line}" for line in (
        f'task_last_status{{{of},status="none"}} 1', f"task_failures_total{{{of}}} 0", f"task_failures_in_a_row{{{of}}} 0",
        f"task_last_success_timestamp_seconds{{{of}}} 0.0", f"task_last_run_timestamp_seconds{{{of}}} 0.0",
        'executions_total{task_type="http",status="missed"} 0', 'executions_total{task_type="bash",status="skipped"} 0',
    )} <= set(before)  # fmt: skip
    assert not any("running_since_timestamp_seconds{" in line or "next_slot_timestamp_seconds{" in line for line in before)
    await api.executed(2)
    of, after = 'task_id="2",task="bad",key=""', (await api("GET", "//metrics")).text.splitlines()
    lines = {f'chronotask_task_last_status{{{of},status="failed"}} 1', f"chronotask_task_failures_in_a_row{{{of}}} 1"}
    assert lines <= set(after)


async def test_events_tell_of_changes_of_tasks_schedules_and_executions_and_what_comes_after_a_firing(api: Api) -> None:
    async with api.client.get(f"{API}/events") as stream:
        assert stream.status == 200 and stream.headers["Content-Type"].startswith("text/event-stream")
        await stream.content.readuntil(b"\n\n")
        await api.schedule(await api.task())
        await api.executed(1)
        await api.rig.run_at(60)
        kinds, last = [], {}
        async with asyncio.timeout(5):
            while "execution" not in kinds or kinds[-1] != "schedule":
                lines = (await stream.content.readuntil(b"\n\n")).decode().strip().split("\n")
                fields = dict(line.split(": ", 1) for line in lines)
                kinds.append(fields["event"])
                last = json.loads(fields["data"])
    assert kinds[:2] == ["task", "schedule"] and set(kinds[2:-1]) == {"execution"}
    assert (last["run_count"], last["next_run"]) == (1, "2026-01-01T00:02:00Z")


# --- Errors -----------------------------------------------------------------------------------------------------------


# What is refused over REST and MCP alike: the tool, what is added to arguments that are good, and the fields complained about.
GOOD_ARGUMENTS: dict[str, dict[str, Any]] = {
    "create_task": BASH,
    "update_task": {"task_id": 1},
    "create_schedule": EVERY_MINUTE,
    "update_schedule": {"schedule_id": 1},
    "preview_schedule": {"schedule_type": "interval", "schedule_config": {"seconds": 60}},
}
REFUSED_VALUES: dict[str, dict[str, Sequence[Any]]] = {
    "create_task": {
        "name": ["", "x" * 256, 5, None, " ", "a\nb", "a\rb", "a\x00b", "a\x1b[2J", "\x7f", "\x9b2J", ABSENT],
        "description": ["x" * 1001, 5, "a\x00b"],
        "status": ["Active", "", None, 1],
        "max_retries": [-1, 101, 1.5, "3", True, None],
        "retry_delay": [-1, 86401, "5", True, None],
        "retry_backoff": [0.99, 10.01, "2", None],
        "config": [None, [], "x", 5, ABSENT],
        "task_type": ["HTTP", "", None, 5, ABSENT],
    },
    "update_task": dict.fromkeys("name task_type config status max_retries retry_delay retry_backoff".split(), (None,)),
    "create_schedule": {"exclude": [["2026-01-02"] * 401, ["2026-01-01/9999-12-31"]], "start_at": ["2026-02-30"]},
    "update_schedule": dict.fromkeys(
        "task_id schedule_type schedule_config is_active overlap catchup catchup_window jitter".split(), (None,)
    ),
    "preview_schedule": {"count": [0, 1001, 2.5], "after": ["x", 5], "task": [1]},
}
# Configurations that section 2 refuses, with the fields that it complains about.
BAD_TIMES: list[tuple[str, Any, str]] = [
    ("cron", {}, "expression"),
    ("cron", {"expression": "* * * *"}, "expression"),
    ("cron", {"expression": "* * * * *", "timezone": "Mars"}, "timezone"),
    ("cron", {"expression": "nonsense", "timezone": "Mars", "x": 1}, "expression timezone x"),
    ("once", {"datetime": "tomorrow"}, "datetime"),
    ("once", {"datetime": "2025-01-01T00:00:00Z"}, "datetime"),
    ("interval", {"seconds": 0.5}, "seconds"),
    ("interval", {"seconds": 60, "start_date": "x"}, "start_date"),
    *(("interval", {"seconds": 60, "timezone": zone}, "timezone") for zone in (5, ["x"], "Mars")),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((tool, {name: value}, name) for tool, of in REFUSED_VALUES.items() for name, values in of.items() for value in values),
    ("create_task", {"config": {"command": "true", "comand": "x"}}, "config.comand"),
    (
        "create_task",
        {"name": "", "config": {"command": "x", "timeout": 0}, "schedules": [{"schedule_type": "cron", "schedule_config": {}}]},
        "name config.timeout schedules[0].schedule_config.expression",
    ),
    ("update_task", {"task_type": "http"}, "config"),
    ("update_schedule", {"schedule_type": "cron"}, "schedule_config"),
    ("update_schedule", {"task_id": 9}, "task_id"),
    *(("create_schedule", {"exclude": [day]}, "exclude[0]") for day in ("2026-02-30", "2026-01-05/2026-01-04", "tomorrow")),
    ("create_schedule", {**ONCE, "schedule_config": {"datetime": "2026-01-02T09:00"}, "exclude": ["2026-01-02"]}, "exclude"),
    ("create_schedule", {**after("failure", any=True), "exclude": []}, "exclude"),
    ("create_schedule", {"schedule_config": {"days": 1, "start_date": "9999-12-31T00:00:00Z"}}, "schedule_config"),
    ("preview_schedule", {"count": 0, "after": "x", "end_at": "y", "exclude": ["z"]}, "count after end_at exclude[0]"),
    ("update_task", {"name": "", "paused_until": "x", "task_type": "bash", "config": {}}, "name paused_until config.command"),
    ("preview_schedule", {"after": "x", "schedule_config": {"seconds": 0}}, "schedule_config.seconds after"),
]


for _tool in ("create_schedule", "preview_schedule"):
    for _kind, _config, _fields in BAD_TIMES:
        _named = " ".join(f"schedule_config.{field}" for field in _fields.split())
        REFUSED.append((_tool, {"schedule_type": _kind, "schedule_config": _config}, _named))
    REFUSED.append((_tool, {"start_at": "x"}, "start_at"))
    for _end in ("2026-13-01T00:00:00Z", "2025-01-01T00:00:00Z", "2026-01-01T00:00:30Z"):
        REFUSED.append((_tool, {"end_at": _end}, "end_at"))
    REFUSED.append((_tool, {"start_at": "2026-03-01T00:00:00Z", "end_at": "2026-02-01T00:00:00Z"}, "end_at"))


async def test_rest_and_mcp_refuse_the_same_and_name_the_same_fields_in_the_same_words(api: Api) -> None:
    await api.schedule(await api.task())
    for tool, more, fields in REFUSED:
        arguments = with_changes(GOOD_ARGUMENTS[tool], more)
        operation, body = TOOLS[tool], dict(arguments)
        path = operation.path.replace("{id}", str(body.pop(operation.id_name, "") if operation.id_name else ""))
        refusal = await api(operation.method, path, body)
        detail = problem_of(refusal, 422, *fields.split())
        assert not set(refusal.text) & set("\n\r\x1b\x7f\x9b"), "it could move a cursor or break a line"
        if None in more.values():  # to tools, that is not given
            continue
        answer = await chronotask.run_tool(api.rig.service, tool, arguments)
        assert (answer.is_error, answer.content[0].text) == (True, detail), (tool, more)
    assert ((await api.get("/tasks"))["total"], (await api.get("/schedules"))["total"]) == (1, 1)
    # All that is wrong is said at once, with what is allowed or the nearest name.
    bad = {"status": "on", "max_retries": 101, "retry_delay": -1, "retry_backoff": 0.5, "id": 5, "descripton": "x"}
    body = {"name": "", "task_type": "ftp", "config": [], **bad}
    detail = problem_of(await api("POST", "/tasks", body), 422, *body)
    assert "description" in detail and "'ftp'" in detail
    problem_of(await api("POST", "/tasks", {}), 422, *BASH)
    bad = {"is_active": "yes", "overlap": "maybe", "catchup": "none", "catchup_window": -1, "jitter": 3601, "max_runs": 0}
    body = {"task_id": 0, "schedule_type": "hourly", "schedule_config": 5, "start_at": 5, "end_at": [], "ovrlap": "skip", **bad}
    assert "overlap" in problem_of(await api("POST", "/schedules", body), 422, *body)


async def test_each_route_is_in_openapi_and_another_method_answers_405_and_names_the_allowed_ones(api: Api) -> None:
    routes = {
        path: methods.split()
        for path, methods in re.findall(
            r"(/\S*) ([A-Z ]+\b)",
            """// GET, //health GET, //metrics GET, //openapi.json GET, //docs GET, /tasks GET POST,
            /tasks/{id} GET PUT PATCH DELETE, /tasks/{id}/execute POST, /tasks/{id}/history GET, /schedules GET POST,
            /schedules/preview POST, /schedules/{id} GET PUT PATCH DELETE, /executions GET, /executions/{id} GET,
            /executions/{id}/cancel POST, /executions/{id}/output GET, /scheduler/status GET, /scheduler/pause POST,
            /scheduler/resume POST, /events GET, /backup GET""",
        )
    }
    document = await api.get("//openapi.json")
    assert document["openapi"].startswith("3.1") and not re.search('"default": null|"schema": {}', json.dumps(document))
    assert document["components"]["schemas"]["TaskUpdate"]["properties"]["run_count"] == {"readOnly": True}
    for path, allowed in routes.items():
        assert {*map(str.lower, allowed)} <= {*document["paths"][path[1:] if path.startswith("//") else API + path]}, path
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - {*allowed}:
            if path != "/schedules/preview" or method == "OPTIONS":  # else it is a schedule with an odd id
                answer = await api(method, path.replace("{id}", "1"))
                problem_of(answer, 405)
                assert {*answer.headers["Allow"].split(", ")} >= {*allowed}, path
                assert method not in answer.headers["Allow"].split(", "), path


async def test_a_body_is_declared_as_json_and_a_post_without_one_needs_no_content_type(api: Api) -> None:
    calls = [("POST", "/tasks"), ("POST", "/schedules/preview"), ("PUT", "/tasks/1"), ("POST", "/scheduler/pause")]
    for content_type, (method, path) in itertools.product(NOT_JSON.split("|"), calls):
        problem_of(await api(method, path, BASH, headers={"Content-Type": content_type}), 415)
    assert (await api.get("/scheduler/status"))["paused"] is False
    assert (await api("POST", "/tasks", BASH, headers={"Content-Type": "application/json; charset=utf-8"})).status == 201
    assert (await api("POST", "/scheduler/pause")).status == 200
    assert (await api("POST", "/scheduler/resume", {})).status == 200
    problem_of(await api("POST", "/scheduler/resume", {"a": 1}), 422, "")
    for method, path, body in (("POST", "/tasks", json.dumps(BASH).encode()), ("PUT", "/tasks/1", b'{"name": "b"}')):
        assert (await api(method, path, codecs.BOM_UTF8 + body)).status in (200, 201), "behind a byte order mark"
    assert (await api("POST", "/scheduler/pause", codecs.BOM_UTF8)).status == 200


async def test_what_is_not_there_answers_404(api: Api) -> None:
    paths = """//nothing /nothing /tasks/ /tasks/x /tasks/0 /tasks/-1 /tasks/1.0 /tasks/99999999999999999999 /tasks/%E0%A4%A
        /tasks/1/x /schedules/9 /executions/9 /executions/9/output?follow=1 //api/v2/tasks /tasks/%00 /tasks/٣"""
    said = {problem_of(await api("GET", path), 404) for path in paths.split()}
    assert "there is nothing at this path; GET / lists where to look" in said


async def test_malformed_json_answers_400_what_is_no_object_422_and_a_body_over_1_mib_413(api: Api) -> None:
    for raw in (
        b"{", b"", b"   ", b"{'a': 1}", b'{"a": 1,}', b"[" * 300 + b"]" * 300, b'{"a": NaN}', b'{"a": Infinity}',
        b'{"a": -Infinity}', b"\xff\xfe{}", b'{"name": "\xff"}', b"[" * 100_000, b'{"a":' * 50_000,
        b'{"a": ' + b"9" * 5000 + b"}", b"{} {}", b"x", b"\x00",
    ):  # fmt: skip
        problem_of(await api("POST", "/tasks", raw), 400)
    for raw in (b"[]", b'"x"', b"5", b"true", b'[{"name": "t"}]', b"null"):
        assert "must be a JSON object, not text, " in problem_of(await api("POST", "/tasks", raw), 422, "")
    assert (await api("POST", "/tasks", json.dumps(BASH).encode().ljust(1_048_576))).status == 201
    assert "1048576" in problem_of(await api("POST", "/tasks", json.dumps(BASH).encode().ljust(1_048_577)), 413)


NOT_JSON = "text/plain|application/x-www-form-urlencoded|multipart/form-data||application/jsonp|application/octet-stream"


async def test_a_bad_parameter_answers_422_with_its_name(api: Api) -> None:
    await api.task()
    for path, query in (
        *(("/tasks", f"limit={value}") for value in ("0", "1001", "x", "", "1.5", "1&limit=2")),
        *(("/tasks", query) for query in "skip=-1 skip=99999999999999999999 status=on task_type=x stauts=active q=%00".split()),
        *(("/schedules", query) for query in ("is_active=maybe", "task_id=0")),
        *(("/executions", query) for query in ("trigger=x", "before_id=0", "skip=1", "status=done")),
        ("/tasks/1/history", "success=2"),
        *((path, "x=1") for path in ("/scheduler/status", "/tasks/1")),
    ):
        problem_of(await api("GET", f"{path}?{query}"), 422, query.partition("=")[0])
    assert "status" in problem_of(await api("GET", "/tasks?stauts=active"), 422, "stauts")
    for limit in (1, 1000):
        assert (await api.get(f"/tasks?limit={limit}"))["limit"] == limit


# --- Who may ask ------------------------------------------------------------------------------------------------------

PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
MCP_HEADERS = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}


async def test_which_hosts_and_origins_are_served_on_both_ports(open_api: OpenApi) -> None:
    origins = {
        **dict.fromkeys(["http://127.0.0.1:8000", "https://127.0.0.1:8000"], 200),
        **dict.fromkeys(["http://tasks.example.com", "https://tasks.example.com:444"], 200),
        **dict.fromkeys(["http://127.0.0.1", "http://127.0.0.1:8001", "http://localhost:8000", "http://evil.example"], 403),
        **dict.fromkeys(["http://127.0.0.1:8000.evil.example", "null", "", "file://", "chrome-extension://abcdef"], 403),
    }
    hosts = {
        **dict.fromkeys(
            ["localhost", "localhost:1234", "LOCALHOST", "127.0.0.1", "192.168.7.7:8000", "[::1]", "[::1]:8000"], 200
        ),
        **dict.fromkeys(["tasks.example.com", "Tasks.Example.com:8000"], 200),
        **dict.fromkeys(["evil.example", "localhost.evil.example", "evil.example:127", "tasks.example.com.evil"], 403),
        **dict.fromkeys(["127.0.0.1.evil.example", "127.0.0.1@evil.example", "2130706433", "a b", ""], 403),
    }
    rest = await open_api(allowed_hosts=("tasks.example.com",))
    mcp = await open_api(mcp=True, allowed_hosts=("tasks.example.com",))
    asked = [({"Host": host}, status) for host, status in hosts.items()]
    asked += [({"Host": "127.0.0.1:8000", "Origin": origin}, status) for origin, status in origins.items()]
    for headers, status in asked:
        for call in ("GET /tasks", "GET //", "GET //metrics", "GET //docs", "POST /scheduler/pause"):
            assert (await rest(*call.split(), headers=headers)).status == status, (headers, call)
        assert "Origin" in headers or (await rest("GET", "//health", headers=headers)).status == 200, headers
        for method in ("POST", "GET", "DELETE") if status == 403 else ("POST",):
            answer = await mcp(method, "//mcp", PING if method == "POST" else None, headers={**MCP_HEADERS, **headers})
            assert answer.status == status, (headers, method)
    evil = {"Host": "evil.example"}
    assert "CHRONOTASK_ALLOWED_HOSTS" in problem_of(await rest("GET", "/tasks", headers=evil), 403)


NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


async def test_which_requests_of_a_browser_are_served(api: Api) -> None:
    navigated, image = {"Sec-Fetch-Site": "cross-site", **NAVIGATION}, {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    for headers, status, calls in (
        *(({"Sec-Fetch-Site": site}, 200, "GET /tasks") for site in ("same-origin", "none")),
        *(({"Sec-Fetch-Site": site}, 403, "GET /tasks") for site in ("cross-site", "same-site", "nonsense")),
        (navigated, 200, "GET //, GET //docs"),
        (navigated, 403, "GET /tasks, POST /scheduler/pause, GET //openapi.json, GET //metrics"),
        ({**navigated, **image}, 403, "GET //"),
        ({**navigated, "Sec-Fetch-Dest": "iframe"}, 403, "GET //"),
    ):
        for call in calls.split(", "):
            assert (await api(*call.split(), headers=headers)).status == status, (call, headers)


GOOD_TOKEN = "correct-horse-battery"
BEARER = {"Authorization": f"Bearer {GOOD_TOKEN}"}


# --- Anything at all --------------------------------------------------------------------------------------------------

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 60, 2**31, 2**63, 10**30, 0.5, 1e308, -1e-308, "", " ", "t", "x" * 300, "\0", "a\r\nb",
    "ünï😀", "bash", "http", "cron", "once", "interval", "after", "active", "* * * * *", "@daily", "60/7 25 L W#9 ?",
    "2027-01-01T00:00:00Z", "2026-03-29T02:30:00", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+23:59", "Europe/Berlin",
    "../../etc/passwd", "http://127.0.0.1/", "http://[::1", "http://user:pw@host:99999/\\", "${env:HOME}",
    "${file:/etc/passwd}", [], {}, [[]], [1, "a", None], {"a": {"b": [{}]}}, {"command": "true"}, {"url": "http://127.0.0.1/"},
    {"seconds": 60}, {"expression": "* * * * *"}, "key:t", "${cause:text}", ["failure", "overdue"],
    {"any": True, "on": ["failure"]},
]  # fmt: skip
ODD_NAMES = """name task_type config description status max_retries retry_delay retry_backoff id task_id schedule_type
    schedule_config is_active overlap catchup catchup_window jitter start_at end_at max_runs after count upcoming x
    command args env working_dir timeout launcher url method headers params body auth expected_status follow_redirects verify_tls
    expression timezone datetime seconds start_date username password key tags pause_after task_ids tag any on
    threshold""".split()


def odd_object(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in draw.sample(ODD_NAMES, draw.randrange(1, 9)):
        found[name] = odd_object(draw, depth + 1) if depth < 2 and draw.random() < 0.3 else draw.choice(ODD_VALUES)
    return found


async def test_no_json_and_no_query_at_all_make_the_server_fail(api: Api) -> None:
    draw = random.Random(10)
    await api.schedule(await api.task())
    await api.executed(1)
    asked = [("POST", "/tasks"), ("PATCH", "/tasks/1"), ("PUT", "/tasks/1"), ("POST", "/schedules"), ("PATCH", "/schedules/1")]
    asked += [("POST", "/schedules/preview"), ("POST", "/tasks/1/execute"), ("POST", "/scheduler/pause")]
    cron = {"schedule_type": "cron", "schedule_config": {"expression": "*/5 * * * *", "timezone": "Asia/Tokyo"}}
    url = {"task_type": "http", "config": {"url": "http://127.0.0.1/"}}
    told = {"schedule_type": "after", "schedule_config": {"tag": "ops", "on": ["broke", "recovered"], "threshold": 2}}
    valid = [BASH, {**BASH, **url}, EVERY_MINUTE, {**EVERY_MINUTE, **cron}, {**EVERY_MINUTE, **told}]
    for _ in range(400):
        method, path = draw.choice(asked)
        body = {**draw.choice([{}, *valid]), **odd_object(draw)}
        if path == "/schedules/preview":
            body.pop("task_id", None)
        for name in list(body):
            if isinstance(body[name], dict) and draw.random() < 0.5:
                body[name] = {**body[name], draw.choice(ODD_NAMES): draw.choice(ODD_VALUES)}
        answer = await api(method, path, body)
        assert answer.status < 500, (method, path, body, answer.text)
    paths = ["/tasks", "/schedules", "/executions", "/tasks/1/history", "/scheduler/status", "/executions/1/output", "/overview"]
    names = "status task_type q skip limit task_id is_active success output trigger before_id schedule_id follow wait x".split()
    for _ in range(300):
        pairs = [(draw.choice(names), str(draw.choice(ODD_VALUES))) for _ in range(draw.randrange(4))]
        answer = await api("GET", draw.choice(paths), params=pairs)
        assert answer.status < 500, (pairs, answer.text)


async def test_no_bytes_at_all_make_the_server_fail(api: Api) -> None:
    draw = random.Random(12)
    whole = b"POST /api/v1/tasks?x=1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 62\r\n\r\n"
    whole += b'{"name": "t", "task_type": "bash", "config": {"command": "true"}}'
    for _ in range(150):
        sent = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            at = draw.randrange(len(sent))
            odd = [bytes([draw.randrange(256)]), b"\r\n", b"\0", b"%00", b" ", b"\xff\xfe", b""]
            sent[at : at + draw.randrange(3)] = draw.choice(odd)
        reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)
        writer.write(bytes(sent))
        writer.write_eof()
        async with asyncio.timeout(5):
            head = await reader.read(100)
        writer.close()
        if head:
            assert re.match(rb"HTTP/1\.[01] [1-4]\d\d ", head), (bytes(sent), head)
    assert (await api("GET", "//health")).status == 200


# --- Malformed requests: smuggling, duplicates, what no client sends --------------------------------------------------


async def raw_answer(port: int, data: bytes) -> bytes:
    """All that a server says to these bytes until it closes, or has been silent for a moment."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    with contextlib.suppress(OSError, TimeoutError):
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(10) as limit:
            while piece := await reader.read(65536):
                got += piece
                if b"Connection: close" not in data and b"\r\n\r\n" in got:
                    limit.reschedule(asyncio.get_running_loop().time() + 0.2)
    writer.close()
    return got


def statuses_in(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/\d\.\d (\d\d\d) ", answer)]


UPLOAD = b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps(BASH).encode()
SMUGGLED = UPLOAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def posted(headers: bytes, body: bytes = BODY) -> bytes:
    return UPLOAD + headers + b"\r\n" + body


SMUGGLING = {
    "two lengths": posted(b"Content-Length: 3\r\nContent-Length: %d\r\n" % len(BODY)),
    "two equal lengths": posted(b"Content-Length: %d\r\nContent-Length: %d\r\n" % (len(BODY), len(BODY))),
    "a list of lengths": posted(b"Content-Length: 5, 5\r\n", b"abcde"),
    "a length and chunks": posted(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "chunks and a length": posted(b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", b"0\r\n\r\n" + SMUGGLED),
    "unknown transfer encoding": posted(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "chunked is not the last": posted(b"Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n" + SMUGGLED),
    "chunked twice": posted(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "blank before the colon": posted(b"Transfer-Encoding : chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "tab in the name": posted(b"Transfer-Encoding\t: chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "vertical tab in the value": posted(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "negative length": posted(b"Content-Length: -5\r\n"),
    "length with a sign": posted(b"Content-Length: +5\r\n", b"abcde"),
    "length in hexadecimal": posted(b"Content-Length: 0x5\r\n", b"abcde"),
    "length with an underscore": posted(b"Content-Length: 1_0\r\n", b"abcdefghij"),
    "length in other digits": posted("Content-Length: ٥\r\n".encode(), b"abcde"),
    "length over 64 bits": posted(b"Content-Length: 99999999999999999999999\r\n"),
    "empty length": posted(b"Content-Length:\r\n"),
    "blank before a chunk size": posted(b"Transfer-Encoding: chunked\r\n", b" 2\r\n{}\r\n0\r\n\r\n"),
    "negative chunk size": posted(b"Transfer-Encoding: chunked\r\n", b"-2\r\n{}\r\n0\r\n\r\n"),
    "chunk size with an underscore": posted(b"Transfer-Encoding: chunked\r\n", b"0_2\r\n{}\r\n0\r\n\r\n"),
    "chunk longer than its size": posted(b"Transfer-Encoding: chunked\r\n", b"2\r\n{}{}\r\n0\r\n\r\n"),
    "line ends without CR": posted(b"Content-Length: %d\r\n" % len(BODY)).replace(b"\r\n", b"\n"),
    "line ends without LF": posted(b"Content-Length: %d\r\n" % len(BODY)).replace(b"\r\n", b"\r"),
    "folded header": b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
    "NUL in a header": b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
    "NUL in the path": b"GET /api/v1/ta\0sks HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "blank in the path": b"GET /api/v1/tasks x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two hosts": b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "two hosts, the good one last": b"GET /api/v1/tasks HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /api/v1/tasks HTTP/1.1\r\n\r\n",
    "no host in HTTP/1.0": b"GET /api/v1/tasks HTTP/1.0\r\n\r\n",
    "two content types": posted(b"Content-Type: text/plain\r\nContent-Length: %d\r\n" % len(BODY)),
    "TLS on a plain port": bytes.fromhex("1603010200010001fc0303") + b"a" * 300,
    "HTTP/2 by prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an HTTP version of the future": b"GET / HTTP/1.9\r\nHost: localhost\r\n\r\n",
    "an unknown method": b"FOO /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TRACE": b"TRACE /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a request line of 20 KB": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a request line without end": b"GET /" + b"a" * 3_000_000,
    "a header of 20 KB": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    "a header without end": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 3_000_000,
    "a header name without end": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a" * 3_000_000,
    "1000 headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X%d: a\r\n" % i for i in range(1000)) + b"\r\n",
    "an expectation that nobody can meet": posted(b"Expect: nonsense\r\nContent-Length: %d\r\n" % len(BODY)),
    "a body that is not what its encoding says": posted(b"Content-Encoding: gzip\r\nContent-Length: %d\r\n" % len(BODY)),
    "an unknown encoding": posted(b"Content-Encoding: nonsense\r\nContent-Length: %d\r\n" % len(BODY)),
    "an encoding that needs a package": posted(b"Content-Encoding: br\r\nContent-Length: %d\r\n" % len(BODY)),
}


async def test_a_malformed_request_is_refused_and_smuggles_no_second_one(api: Api) -> None:
    for attack, data in SMUGGLING.items():
        answer = await raw_answer(api.client.port, data)
        found = statuses_in(answer)
        assert found and all(400 <= status < 500 for status in found), (attack, answer)
        assert api.rig.sql("SELECT count(*) FROM tasks") == [(0,)], attack
        assert (await api("GET", "//health")).status == 200, attack


async def test_a_body_that_breaks_off_or_has_broken_chunks_changes_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronotask, "SLOW_BODY", 0.3)
    for header, body, status in ((b"Content-Length: 500", BODY, 408), (b"Transfer-Encoding: chunked", b"2\r\n{}\r\nzz\r\n", 400)):
        assert statuses_in(await raw_answer(api.client.port, posted(header + b"\r\n", body)))[:1] == [status]
    assert api.rig.sql("SELECT count(*) FROM tasks") == [(0,)]


async def test_a_body_without_end_is_refused_at_1_mib(api: Api) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.port)
    writer.write(UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n")
    answer = asyncio.ensure_future(reader.read(2000))
    for _ in range(400):  # 25 MB
        if answer.done():
            break
        writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        await writer.drain()
    assert statuses_in(await answer) == [413]
    writer.close()


async def test_a_compressed_body_is_not_unpacked_with_and_without_the_token(open_api: OpenApi) -> None:
    api = await open_api(api_token=GOOD_TOKEN)
    for headers, status in ((BEARER, 415), ({}, 401)):
        problem_of(await api("POST", "/tasks", bomb(), headers={**headers, "Content-Encoding": "gzip"}), status)


@functools.cache
def bomb() -> bytes:
    return gzip.compress(b" " * (1 << 27), 1)


NUMBERS = ["9" * 4000, "1" + "0" * 400]
NUMBERS += "1e999 -1e999 1e308 -9223372036854775809 18446744073709551616 1.7976931348623159e308".split()


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:12])
async def test_a_huge_number_anywhere_is_a_4xx_or_harmless(api: Api, number: str) -> None:
    task_id = await api.task()
    http = {**BASH, "task_type": "http"}
    bodies = [("/tasks", {**BASH, name: "N"}) for name in "name task_type config max_retries retry_delay".split()]
    for more in ({"body": {"a": ["N"]}}, {"params": {"a": "N"}}, {"expected_status": ["N"]}):
        bodies.append(("/tasks", {**http, "config": {"url": "http://127.0.0.1:9/", **more}}))
    for name in "task_id jitter max_runs catchup_window".split():
        bodies.append(("/schedules", {**EVERY_MINUTE, name: "N"}))
    bodies.append(("/schedules", {**EVERY_MINUTE, "schedule_config": {"seconds": "N"}}))
    bodies.append(("/tasks", {**BASH, "config": {"command": "true", "timeout": "N"}}))
    bodies.append(("/schedules/preview", {**EVERY_MINUTE, "count": "N"}))
    for path, body in bodies:
        answer = await api("POST", path, json.dumps(body).replace('"N"', number).encode())
        assert answer.status in (201, 400, 404, 422) and len(answer.text) < 20_000, (body, answer.text)
    for query in (f"/tasks?limit={number}", f"/executions?before_id={number}", f"/tasks/{number}"):
        assert (await api("GET", query)).status in (404, 422), query
    assert (await api("POST", f"/tasks/{task_id}/execute?wait={number}")).status == 422
    for path in ("/tasks?limit=1000", "/schedules", "/overview"):
        assert await api.get(path), path


@each("character", "\\u0000", "\\ud800", "\\udfff\\ud800")
async def test_nul_and_lone_surrogates_are_refused_in_every_text(api: Api, character: str) -> None:
    await api.task()
    bash = {"command": "X", "args": ["X"], "env": {"A": "X"}, "working_dir": "/X"}
    http = {"url": "http://127.0.0.1:9/X", "headers": {"A": "X"}, "auth": {"username": "X", "password": "X"}}
    for kind, config, fields in (
        ("bash", bash, "command args[0] env.A working_dir"),
        ("bash", {"command": "true", "env": {"AX": "a"}}, r"env.'A\x00'"),
        ("http", http, "url headers.A auth.username auth.password"),
        ("http", {"url": "http://127.0.0.1:9/${file:aX}", "headers": {"AX": "a"}}, r"url headers.'A\x00'"),
        ("cron", {"expression": "* * * * *X", "timezone": "UTCX"}, "expression timezone"),
        ("once", {"datetime": "2027-01-01X"}, "datetime"),
        ("", {"command": "true"}, "name description"),
    ):
        body, path, before = {"name": "t", "task_type": kind, "config": config}, "/tasks", "config."
        if kind in ("cron", "once"):
            body = {"task_id": 1, "schedule_type": kind, "schedule_config": config}
            path, before = "/schedules", "schedule_config."
        elif not kind:
            body, before = {**BASH, "name": "aX", "description": "X"}, ""
        answer = await api("POST", path, json.dumps(body).replace("X", character).encode())
        named = [before + field for field in fields.split()]
        problem_of(answer, *((422, *named) if character == "\\u0000" else (400,)))  # a surrogate makes the body no JSON
    assert api.rig.sql("SELECT count(*) FROM tasks") == [(1,)]


# --- Tokens, and tokens with names and scopes -------------------------------------------------------------------------


async def test_going_round_the_token_by_another_route_method_or_spelling(open_api: OpenApi) -> None:
    api = await open_api(api_token=GOOD_TOKEN)
    task_id = (await api("POST", "/tasks", BASH, headers=BEARER)).json["id"]
    spellings = (
        "//health /health/ /health/../metrics /health;x /health%2f..%2fmetrics /HEALTH /docs/../metrics /docs/x /docs/ /nothing"
    )
    ways = [("GET", path) for path in (*spellings.split(), f"/api/v1/tasks?token={GOOD_TOKEN}")]
    ways += itertools.product(("POST", "PUT", "DELETE", "OPTIONS", "PATCH"), ("/", "/docs"))
    ways += [("GET", path.replace("{id}", "1")) for path in chronotask.PAGES]
    ways += [(operation.method, API + operation.path.replace("{id}", "1")) for operation in OPERATIONS]
    ways += [("PUT", path) for method, path in ways if method == "PATCH"]
    for method, path in ways:
        request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = await raw_answer(api.client.port, request.encode())
        is_open = (method, path) in (("GET", "/health"), ("GET", "/docs"))
        assert statuses_in(answer) == [200 if is_open else 401], (method, path, answer)
        assert is_open or b'\r\nWWW-Authenticate: Bearer realm="ChronoTask"\r\n' in answer, (method, path)
    assert api.rig.sql("SELECT id, deleted FROM tasks") == [(task_id, 0)]
    assert api.rig.sql("SELECT count(*) FROM executions") == [(0,)]


async def test_what_is_open_without_the_token_tells_nothing(open_api: OpenApi) -> None:
    assert "API_TOKEN" in problem_of(await (await open_api())("GET", "/backup"), 403), "nor to all, where there is none"
    api = await open_api(api_token=GOOD_TOKEN)
    assert (await api("POST", "/tasks", {**BASH, "name": "geheim-name"}, headers=BEARER)).status == 201
    problem_of(await api("POST", "/tasks", b"{"), 401)
    assert api.rig.sql("SELECT count(*) FROM tasks") == [(1,)]
    assert (await api("GET", "//health")).text == '{"status":"healthy"}'
    for path in ("//", "//docs"):
        answer = await api("GET", path, headers={"Accept": "text/html"})
        assert answer.status == 200 and "geheim-name" not in answer.text, path
    assert [(await api("GET", "//", headers=headers)).status for headers in ({}, BEARER)] == [401, 200]


async def test_a_token_counts_alone_in_one_header_of_its_scheme_and_odd_ones_are_wrong(open_api: OpenApi, tmp_path: Path) -> None:
    # What may stand behind `Authorization: `, G being the token; then what may not.
    let_in = [b"Bearer G", b"bearer  G ", b"BEARER G"]
    kept_out = [
        b"G", b"Basic G", b"Bearer", b"Bearer ", b"Bearer  ", b"Bearer \tx", b"Bearer null", b"Bearer \\u0063", b"Bearer prom",
        b"Bearer Gx", b"Bearer G,", b"Bearer G G", b"Bearer G, Bearer G", b"Bearer G\r\nAuthorization: Bearer G",
        b"Bearer wrong-horse\r\nAuthorization: Bearer G", b"Bearer correct-horse-batter", b"Bearer correct-horse-batter\xc3\xa4",
        b"Bearer CORRECT-HORSE-BATTERY", b"Bearer \xc3\xa4\xc3\xb6", b"Bearer \xff\xfe", b"Bearer " + b"x" * 8000,
    ]  # fmt: skip
    api = await open_api(api_tokens_file=tokens_file(tmp_path, f"prom read {GOOD_TOKEN}\n"))
    for credentials in (*let_in, *kept_out):
        header = b"Authorization: " + credentials.replace(b"G", GOOD_TOKEN.encode()) + b"\r\n\r\n"
        for method, path in (("GET", "/api/v1/tasks"), ("HEAD", "/api/v1/tasks"), ("HEAD", "/metrics"), ("GET", "/docs/")):
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            status = 401 if credentials in kept_out else 404 if path == "/docs/" else 200
            assert statuses_in(await raw_answer(api.client.port, head.encode() + header)) == [status], (method, path, credentials)
            api.rig.clock.go(1)  # ten wrong tokens a second are counted


def test_guessing_the_token_by_time_meets_a_comparison_in_constant_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compared: list[tuple[bytes, bytes]] = []
    genuine = chronotask.hmac.compare_digest

    def watched(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return genuine(a, b)

    monkeypatch.setattr(chronotask.hmac, "compare_digest", watched)
    tokens = chronotask.Tokens(settings(tmp_path, api_token=GOOD_TOKEN), time.monotonic)
    guesses = ["c", GOOD_TOKEN, GOOD_TOKEN[:-1] + "ä", "\udcff"]
    for guess in guesses:
        with contextlib.suppress(chronotask.Unauthorized):
            tokens.find([f"Bearer {guess}"], "127.0.0.1")
    assert [b for _, b in compared] == [chronotask.token_digest(guess) for guess in guesses]
    assert {a for a, _ in compared} == {chronotask.token_digest(GOOD_TOKEN)}


READER, RUNNER, ADMIN = "reader-token-1", "runner-token-2", "admin-token-3"
SCOPED = f"# who\nprom read {READER}\n\nci run {RUNNER} # builds\nops admin {ADMIN}\n"


def tokens_file(folder: Path, text: str = SCOPED) -> Path:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(0o640)
    return path


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_operations_and_pages_are_given_to_their_scope_and_to_no_smaller_one(open_api: OpenApi, tmp_path: Path) -> None:
    api = await open_api(api_tokens_file=tokens_file(tmp_path))
    runs = "POST /tasks/{id}/execute, POST /executions/{id}/cancel, POST /executions/{id}/rerun, POST /schedules/{id}/backfill"
    for one in OPERATIONS:
        call = f"{one.method} {one.path}"
        is_read = one.method == "GET" or call == "POST /schedules/preview"
        needed = "read" if is_read else "run" if call in runs.split(", ") else "admin"
        assert one.scope == needed, call
        for name, scope, token in (("prom", "read", READER), ("ci", "run", RUNNER), ("ops", "admin", ADMIN)):
            answer = await api(one.method, one.path.format(id=99), {} if one.body else None, headers=bearer(token))
            if chronotask.SCOPES.index(scope) < chronotask.SCOPES.index(needed):
                said = f"this needs the scope {needed}: the token {name} has {scope}"
                assert (answer.status, answer.json["detail"]) == (403, said), (call, name)
            else:
                assert answer.status not in (401, 403), (call, name)
        assert (await api(one.method, one.path.format(id=99))).status == 401, call
    for path, status in (("//metrics", 200), ("//openapi.json", 200), ("/backup", 403), ("/executions/1/output", 404)):
        assert [(await api("GET", path, headers=headers)).status for headers in ({}, bearer(READER))] == [401, status], path
    async with api.client.get(f"{API}/backup", headers=bearer(ADMIN)) as answer:
        assert (answer.status, (await answer.read())[:15]) == (200, b"SQLite format 3")
        assert answer.headers["Content-Disposition"] == 'attachment; filename="chronotask.db"'
    assert (await api.get("//health")) == {"status": "healthy"}


async def test_a_tool_over_http_keeps_to_the_scope_of_its_token(open_api: OpenApi, tmp_path: Path) -> None:
    api = await open_api(mcp=True, api_tokens_file=tokens_file(tmp_path))

    async def refused(token: str, tool: str, **arguments: Any) -> str:
        """What is said when the call is refused; else nothing."""
        headers = {**bearer(token), "MCP-Protocol-Version": "2025-06-18"}
        status, answer, _ = await post(api, rpc("tools/call", name=tool, arguments=arguments), **headers)
        assert status == 200, answer
        return answer["result"]["content"][0]["text"] if answer["result"].get("isError") else ""

    needs_admin = "this needs the scope admin: the token ci has run"
    assert (await refused(RUNNER, "create_task", **BASH)).startswith(needs_admin)
    assert not await refused(ADMIN, "create_task", **BASH)
    assert not await refused(RUNNER, "execute_task", task_id=1)
    override = await refused(RUNNER, "execute_task", task_id=1, config={"args": ["x"]})  # a command of one's own
    assert override.startswith(needs_admin)
    assert await refused(READER, "execute_task", task_id=1) and not await refused(READER, "list_tasks")


async def test_every_tool_keeps_to_the_scopes_before_it_looks_at_anything(rig: Rig) -> None:
    for (tool, operation), scope in itertools.product(chronotask.TOOLS.items(), chronotask.SCOPES):
        needed = operation.scope
        assert needed == "read" if "read_only" in operation.tool else needed in ("run", "admin"), tool
        before = chronotask.CALLER.set(chronotask.Caller("me", "mcp 127.0.0.1", scope))
        answer = str(await chronotask.run_tool(rig.service, tool, {"task_id": 99, "schedule_id": 99, "execution_id": 99}))
        chronotask.CALLER.reset(before)
        refused = f"this needs the scope {needed}: the token me has {scope}" in answer
        assert refused == (chronotask.SCOPES.index(scope) < chronotask.SCOPES.index(needed)), (tool, scope, answer)


def test_a_bad_file_of_tokens_ends_the_start_with_status_2_and_names_the_line(tmp_path: Path) -> None:
    for text, mode, said in (
        ("prom read", 0o640, "line 1: must be NAME SCOPE TOKEN: 1 to 64 of A-Za-z0-9._@-, one of read, run, admin, 8 to"),
        (f"ok read {READER}\nprom write {RUNNER}", 0o640, "line 2: must be"),
        (f"prom {READER} read", 0o640, "line 1: must be"),
        ("prom read short", 0o640, "line 1: must be"),
        (f"a read {READER}\na run {RUNNER}", 0o640, "line 2: must be"),
        (f"a/b read {READER}", 0o640, "line 1: must be"),
        (f"a read {READER}\nb run {READER}", 0o640, "line 2: must be"),
        ("# nobody\n", 0o640, "holds no token"),
        (SCOPED, 0o644, "other users can read it"),
        (SCOPED, 0o660, "may be written by others"),
    ):
        path = tokens_file(tmp_path, text)
        path.chmod(mode)
        detail = refused_start({"CHRONOTASK_API_TOKENS_FILE": str(path)})
        assert said in detail and READER not in detail and "short" not in detail, said


async def test_a_changed_file_of_tokens_is_taken_up_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tokens_file(tmp_path)
    tokens = chronotask.Tokens(settings(tmp_path, api_tokens_file=path), time.monotonic)
    monkeypatch.setattr(chronotask, "TOKENS_POLL", 0)

    async def scopes(*given: str) -> list[str | None]:
        found: list[str | None] = []
        for token in given:
            await tokens.step()
            try:
                found.append((tokens.find([f"Bearer {token}"], "127.0.0.1") or pytest.fail("open")).scope)
            except chronotask.Unauthorized:
                found.append(None)
        return found

    assert await scopes(READER, RUNNER, "nobody-knows") == ["read", "run", None]
    path.write_text(f"prom admin {READER}\n")
    assert await scopes(READER, RUNNER) == ["admin", None]
    path.write_text("half wri")
    assert await scopes(READER, READER) == ["admin", "admin"]
    path.unlink()
    assert await scopes(READER, READER) == ["admin", "admin"]
    assert len([r for r in caplog.records if "the tokens that were known stay valid" in r.getMessage()]) == 2
    tokens_file(tmp_path)
    assert await scopes(READER, ADMIN) == ["read", "admin"]


def test_wrong_tokens_are_slowed_down_and_never_lock_out_a_right_one(tmp_path: Path) -> None:
    now = [0.0]
    tokens = chronotask.Tokens(settings(tmp_path, api_token=GOOD_TOKEN), lambda: now[0])

    def ask(token: str, address: str = "192.0.2.1") -> str:
        try:
            found = tokens.find([f"Bearer {token}"], address)
            return found.name if found else "anybody"
        except chronotask.ChronoTaskError as error:
            return str(error.status)

    assert [ask("guess-guess") for _ in range(12)] == ["401"] * 10 + ["429"] * 2
    assert [ask(GOOD_TOKEN), ask("guess-guess", "192.0.2.2"), ask("guess-guess")] == ["API_TOKEN", "401", "429"]
    now[0] += 1
    assert ask("guess-guess") == "401"
    for number in range(5000):
        ask("guess-guess", str(number))
    assert len(tokens._wrong) <= 1000


async def test_a_stream_ends_with_its_token_and_no_other_does(open_api: OpenApi, tmp_path: Path) -> None:
    api = await open_api(api_tokens_file=tokens_file(tmp_path))
    await api("POST", "/tasks", {**BASH, "config": {"command": "echo on; sleep 20"}}, headers=bearer(ADMIN))
    await api("POST", "/tasks/1/execute", headers=bearer(RUNNER))
    places = ["/events", "/executions/1/output?follow=true"]
    gone, kept = [[await api.client.get(API + place, headers=bearer(token)) for place in places] for token in (READER, RUNNER)]
    tokens_file(tmp_path, SCOPED.replace(READER, "another-token"))
    async with asyncio.timeout(20):
        for stream in gone:
            with contextlib.suppress(ClientError):
                await stream.read()
    assert await reaches(api, READER, 401) and await reaches(api, "another-token", 200)
    assert [stream.content.at_eof() for stream in kept] == [False, False]
    assert (await api("POST", "/executions/1/cancel", headers=bearer(RUNNER))).json["status"] == "cancelled"
    for stream in kept:
        stream.close()


async def test_a_token_works_all_the_while_that_its_file_is_written_anew(open_api: OpenApi, tmp_path: Path) -> None:
    path = tokens_file(tmp_path)
    api = await open_api(api_tokens_file=path)
    with path.open("w") as file:  # as an editor does that writes into the file itself
        for round in range(50):
            file.seek(0)
            file.truncate()
            for line in (f"prom read {READER}\n", f"new{round} run token-{round}-xyz\n"):
                for part in (line[:12], line[12:]):
                    file.write(part)
                    file.flush()
                    assert (await api("GET", "/tasks", headers=bearer(READER))).status == 200
    assert await reaches(api, "token-49-xyz", 200) and await reaches(api, ADMIN, 401)


async def reaches(api: Api, token: str, status: int) -> bool:
    async with asyncio.timeout(20):
        while (await api("GET", "/tasks", headers=bearer(token))).status != status:
            await asyncio.sleep(0.01)
    return True


async def test_a_new_token_in_the_file_of_api_token_replaces_the_old_one(open_api: OpenApi, tmp_path: Path) -> None:
    path = tokens_file(tmp_path, ADMIN)
    api = await open_api(api_token=ADMIN, api_token_file=path)
    assert (await caller(api, ADMIN)) == {"name": "API_TOKEN", "scope": "admin"}
    path.write_text("a-new-token\n")
    assert await reaches(api, "a-new-token", 200) and await reaches(api, ADMIN, 401)


async def test_who_one_is_stands_in_the_status_where_there_are_tokens_and_in_no_event(open_api: OpenApi, tmp_path: Path) -> None:
    assert await caller(await open_api()) is None
    api = await open_api(api_tokens_file=tokens_file(tmp_path))
    assert await caller(api, READER) == {"name": "prom", "scope": "read"}
    assert "caller" not in await chronotask.status_of(api.rig.service)


async def caller(api: Api, token: str = "") -> Any:
    return (await api("GET", "/scheduler/status", headers=bearer(token) if token else {})).json.get("caller")


async def test_no_task_can_read_the_file_of_tokens_or_one_that_holds_one_of_them(open_rig: OpenRig, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    path = tokens_file(tmp_path / "secrets")
    (tmp_path / "secrets" / "copy").write_text(f"x {RUNNER}\n")
    rig = await open_rig(api_tokens_file=path, secrets_dir=tmp_path / "secrets")
    for name in ("tokens", "copy"):
        task_id = await rig.task(config={"command": "echo $X", "env": {"X": f"${{file:{name}}}"}})
        row = await rig.service.get_execution(await rig.executed(task_id))
        assert (row["status"], "holds the service's own token" in row["error_message"]) == ("failed", True)


# --- Changes ----------------------------------------------------------------------------------------------------------


async def test_every_write_is_a_change_with_who_how_and_what(open_api: OpenApi, tmp_path: Path) -> None:
    api = await open_api(api_tokens_file=tokens_file(tmp_path))
    secret = {"url": "http://127.0.0.1:9/", "headers": {"Authorization": "Bearer s3cr3t-s3cr3t"}}
    for token, method, path, body in (
        (ADMIN, "POST", "/tasks", {"name": "t", "task_type": "http", "config": secret, "status": "disabled"}),
        (ADMIN, "PATCH", "/tasks/1", {"name": "u", "status": "active"}),
        (ADMIN, "PATCH", "/tasks/1", {"config": {**secret, "headers": {"Authorization": "Bearer s3cr3t-too"}}}),
        (ADMIN, "POST", "/schedules", {**EVERY_MINUTE, "is_active": False}),
        *[(ADMIN, "PATCH", "/schedules/1", {"jitter": 5})] * 2,  # the second changes nothing
        (ADMIN, "POST", "/scheduler/pause", None),
        (RUNNER, "POST", "/tasks/1/execute", None),
        (ADMIN, "DELETE", "/schedules/1", None),
        (ADMIN, "DELETE", "/tasks/1", None),
    ):
        answer = await api(method, path, body, headers=bearer(token))
        assert answer.status < 300, answer.text
    changes = (await api("GET", "/changes?limit=1000", headers=bearer(READER))).json["changes"][::-1]
    assert [f"{c['operation']} {c['kind']} {c['object_id']} {c['actor']}" for c in changes] == [
        "create task 1 ops", "update task 1 ops", "update task 1 ops", "create schedule 1 ops", "update schedule 1 ops",
        "pause scheduler None ops", "execute execution 1 ci", "delete schedule 1 ops", "delete task 1 ops",
    ]  # fmt: skip
    assert {c["via"] for c in changes} == {"rest 127.0.0.1"}
    assert "s3cr3t" not in json.dumps(changes) and changes[0]["before"] is None and changes[-1]["after"] is None
    assert changes[1]["before"].keys() == changes[1]["after"].keys() == {"name", "status", "status_reason"}
    assert changes[0]["after"]["status_reason"].startswith("disabled by ops, ") and "config" in changes[2]["after"]
    assert (changes[3]["after"]["task_name"], changes[4]["before"]["jitter"], changes[4]["after"]["jitter"]) == ("u", 0, 5)
    some = (await api("GET", "/changes?kind=task&id=1&limit=2", headers=bearer(READER))).json
    assert [c["operation"] for c in some["changes"]] == ["delete", "update"]
    assert some["next_before_id"] == some["changes"][-1]["id"]


@each("call", *[f"{o.method} {o.path}" for o in OPERATIONS if o.method != "GET" and o.scope != "read"])
async def test_every_operation_that_writes_leaves_a_change(api: Api, call: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    writes: dict[str, tuple[str, Json]] = {
        "POST /tasks": ("create task", BASH),
        "PATCH /tasks/{id}": ("update task", {"name": "n"}),
        "DELETE /tasks/{id}": ("delete task", None),
        "POST /schedules": ("create schedule", EVERY_MINUTE),
        "PATCH /schedules/{id}": ("update schedule", {"jitter": 1}),
        "DELETE /schedules/{id}": ("delete schedule", None),
        "POST /schedules/{id}/backfill": ("backfill schedule", {"from": "2025-12-31T23:57", "to": "2025-12-31T23:58"}),
        "POST /tasks/{id}/execute": ("execute execution", None),
        "POST /executions/{id}/rerun": ("rerun execution", None),
        "POST /executions/{id}/cancel": ("cancel execution", None),
        "POST /scheduler/pause": ("pause scheduler", None),
        "POST /scheduler/resume": ("resume scheduler", None),
        "POST /apply": ("create task", {"chronotask": 1, "tasks": {"k": {"task_type": "bash", "config": {"command": "true"}}}}),
    }
    change, body = writes[call]
    await api.rig.schedule(await api.task(config={"command": "sleep 20"}), "cron")
    await api("POST", "/tasks/1/execute")
    await api.executed(await api.task())
    before = api.rig.sql("SELECT count(*) FROM changes")[0][0]
    method, path = call.replace("{id}", "2" if "rerun" in call else "1").split()
    answer = await api(method, path, body)
    assert answer.status < 300, answer.text
    changes = (await api.get("/changes"))["changes"]
    assert len(changes) > before and f"{changes[0]['operation']} {changes[0]['kind']}" == change
    assert (changes[0]["actor"], changes[0]["via"]) == ("-", "rest 127.0.0.1") and "  " not in "".join(caplog.messages)


async def test_a_change_shows_only_what_differs_masked_and_never_at_length(api: Api) -> None:
    env = {"A": "1", "B": "${env:CHRONOTASK_SECRET_B}", "PASSWORD": "hunter2-hunter2"}
    await api.task(config={"command": "true", "env": env})
    auth = {"url": "http://u:s3cr3t-pass@h.test/", "auth": {"username": "u", "password": "s3cr3t-auth"}}
    for changes in (
        {"config": {"command": "true", "env": {**env, "A": "2"}}},
        {"config": {"command": "x" * 60_000}},
        {"task_type": "http", "config": {**auth, "headers": {"Authorization": "Bearer s3cr3t-header"}}},
    ):
        await api("PATCH", "/tasks/1", changes)
    newest, long, small, _ = (await api.get("/changes"))["changes"]
    assert (small["before"], small["after"]) == ({"config": {"env": {"A": "1"}}}, {"config": {"env": {"A": "2"}}})
    assert long["after"]["config"] == '{"command":"' + "x" * 4084 + "… (60014 characters)"
    assert "s3cr3t" not in json.dumps(newest) and len(json.dumps(newest)) < 10_000


async def test_a_thousand_writes_at_once_are_a_thousand_changes_in_the_order_of_their_commits(rig: Rig) -> None:
    await asyncio.gather(*(rig.task(name=f"t{n}") for n in range(500)))
    await asyncio.gather(*(rig.patch_task(n, description="x") for n in range(1, 501)))
    rows = rig.sql("SELECT id, operation, object_id FROM changes ORDER BY id")
    assert [(row[1], row[2]) for row in rows[:500]] == [("create", n) for n in range(1, 501)]
    assert [row[1] for row in rows[500:]] == ["update"] * 500 and sorted(row[2] for row in rows[500:]) == [*range(1, 501)]


async def test_a_write_that_fails_is_no_change_others_are_one_line_and_kept_as_long_as_the_history(
    open_rig: OpenRig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "chronotask")
    rig = await open_rig(history_days=10)
    await rig.task(key="k")
    with pytest.raises(Conflict):
        await rig.task(key="k")
    with pytest.raises(InvalidInput):
        await rig.patch_task(1, config={"url": "x"})
    rig.clock.advance(9 * 86400)
    await rig.patch_task(1, name="n")
    lines = [r.getMessage() for r in caplog.records if " via " in r.getMessage()]
    assert lines == ["create task 1 by - via cli", "update task 1 (name) by - via cli"]
    assert rig.sql("SELECT operation FROM changes ORDER BY id") == [("create",), ("update",)]
    rig.clock.advance(2 * 86400)
    await rig.service.retention.delete(rig.clock.now())
    assert rig.sql("SELECT operation FROM changes") == [("update",)]


def test_listening_to_the_network_without_a_token_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(**changes: Any) -> list[str]:
        caplog.clear()
        chronotask.warn_if_open(settings(tmp_path, **changes))
        assert {record.levelname for record in caplog.records} <= {"WARNING"}
        return caplog.messages

    for host in ("0.0.0.0", "::", "192.0.2.7", "tasks.example.com", "fe80::1"):
        (line,) = said(api_host=host)
        assert host in line and "CHRONOTASK_API_TOKEN" in line and "ANYONE" in line
        assert said(api_host=host, api_token=GOOD_TOKEN) == [], host
    for local in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert said(api_host=local) == [], local
    # What DNS can be made to answer for is said as well.
    lines = said(allowed_hosts=("chronotask", "tasks.example.com", "localhost", "::1", "10.0.0.7", "nas"))
    assert [line.partition(" answer for ")[2].partition(":")[0] for line in lines] == ["chronotask", "nas"]
    assert said(allowed_hosts=("chronotask",), api_token=GOOD_TOKEN) == []


@each("host reached", ("::", "127.0.0.1 ::1"), ("0::0", "127.0.0.1 ::1"), ("::1", "::1"), ("0.0.0.0", "127.0.0.1"))
def test_the_ipv6_wildcard_listens_on_ipv4_too(host: str, reached: str) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in chronotask.bind(host, 0)]
        found = []
        for address in ("127.0.0.1", "::1"):
            with contextlib.suppress(OSError), socket.create_connection((address, sockets[0].getsockname()[1]), 5):
                found.append(address)
        assert found == reached.split()


# --- The MCP port: the same rules -------------------------------------------------------------------------------------


async def test_a_form_an_image_or_a_navigation_of_another_site_on_the_mcp_port(mcp: Api) -> None:
    modes: tuple[dict[str, str], ...] = ({}, NAVIGATION, {"Sec-Fetch-Mode": "no-cors"})
    for site, more, method in itertools.product(("cross-site", "same-site", "nonsense"), modes, ("GET", "POST")):
        headers = {**MCP_HEADERS, "Sec-Fetch-Site": site, **more}
        answer = await mcp(method, "//mcp", PING if method == "POST" else None, headers=headers)
        assert "another site" in problem_of(answer, 403)
    for content_type in (*NOT_JSON.split("|")[:3], "text/plain; application/json", "application/jsonp"):
        answer = await mcp("POST", "//mcp", PING, headers={**MCP_HEADERS, "Content-Type": content_type})
        assert "application/json" in problem_of(answer, 415), content_type
    for header, value in (("Host", "evil.example"), ("Origin", "https://evil.example"), ("Origin", "null")):
        answer = await mcp("POST", "//mcp", PING, headers={**MCP_HEADERS, header: value})
        assert f"{header} '{value}' is not accepted here" in problem_of(answer, 403)


async def test_going_round_the_token_on_the_mcp_port(open_api: OpenApi) -> None:
    api = await open_api(mcp=True, api_token=GOOD_TOKEN)
    paths = ("//mcp", "//mcp/", "//", "//docs", "//x")
    for method, path in itertools.product(("GET", "POST", "DELETE", "PUT", "OPTIONS"), paths):
        answer = await api(method, path, PING if method in ("POST", "PUT") else None, headers=MCP_HEADERS)
        static = method == "GET" and path == "//docs"  # nothing is there on this port
        assert answer.status == (404 if static else 401), (method, path)
        assert static or answer.headers["WWW-Authenticate"] == 'Bearer realm="ChronoTask"', (method, path)
    assert (await api("POST", "//mcp", PING, headers={**MCP_HEADERS, "Authorization": "Bearer wrong-horse"})).status == 401
    assert (await api("GET", "//health")).status == 404
    assert (await api("POST", "//mcp", PING, headers={**MCP_HEADERS, **BEARER})).status == 200


async def test_a_preflight_gets_no_cors_headers_on_either_port(api: Api, mcp: Api) -> None:
    rest = api
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type, authorization"}
    for api, path in ((rest, "/tasks"), (rest, "//metrics"), (rest, "//"), (rest, "/events"), (mcp, "//mcp")):
        same = f"http://127.0.0.1:{api.client.port}"
        for origin, method in itertools.product(("https://evil.example", "null", same), ("OPTIONS", "HEAD", "DELETE")):
            answer = await api(method, path, headers={"Origin": origin, **asked})
            assert not [name for name in answer.headers if name.lower().startswith("access-control")], (path, origin, method)
            assert answer.status >= 400 or (origin == same and method == "HEAD"), (path, origin, method)


CREATE_TASK = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"create_task","arguments":{%s}}}'
MCP_GARBAGE = {
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000,
    "deep arguments": CREATE_TASK % (b'"q":' + b"[" * 150 + b"]" * 150),
    "number of 5000 digits": b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"ping"}',
    "infinite id": b'{"jsonrpc":"2.0","id":1e999,"method":"ping"}',
    "NaN": b'{"jsonrpc":"2.0","id":NaN,"method":"ping"}',
    "NUL": b"\0",
    "NUL in a name": CREATE_TASK % b'"name":"a\\u0000","task_type":"bash","config":{"command":"true"}',
    "lone surrogate": CREATE_TASK % b'"name":"\\ud800","task_type":"bash","config":{"command":"true"}',
    "lone surrogate in JSON as text": CREATE_TASK % b'"name":"a","task_type":"bash","config":"{\\"command\\":\\"\\\\ud800\\"}"',
    "deep JSON as text": CREATE_TASK % (b'"name":"a","task_type":"http","config":"' + b"[" * 100_000 + b'"'),
    "huge number": CREATE_TASK % b'"name":"a","task_type":"http","config":{"url":"http://127.0.0.1:9/","body":{"a":1e999}}',
    "no UTF-8": b'{"jsonrpc":"2.0","id":1,"method":"\xff\xfe"}',
    "a list of a thousand calls": b"[" + b",".join([b'{"jsonrpc":"2.0","id":1,"method":"ping"}'] * 1000) + b"]",
    "terminal escapes as a method": b'{"jsonrpc":"2.0","id":1,"method":"\\u001b[2J\\u001b]0;owned\\u0007\\nforged"}',
}


async def test_garbage_on_the_mcp_port_is_bounded_and_makes_no_task(mcp: Api, caplog: pytest.LogCaptureFixture) -> None:
    for garbage, raw in MCP_GARBAGE.items():
        answer = await mcp("POST", "//mcp", raw, headers=MCP_HEADERS)
        assert answer.status < 500 and len(answer.text) < 10_000, (garbage, answer)
        assert "\x1b" not in answer.text, garbage
        assert mcp.rig.sql("SELECT count(*) FROM tasks") == [(0,)], garbage
        assert not [record for record in caplog.records if record.exc_info], garbage
        assert (await mcp("POST", "//mcp", PING, headers=MCP_HEADERS)).status == 200, garbage


# --- What is stored: a rule that came later, masks, output that is data -----------------------------------------------


@each(
    "rule words",
    ({"allowed_bash_commands": ("echo",)}, "ALLOWED_BASH_COMMANDS"),
    ({"allow_host_commands": False}, "ALLOW_HOST_COMMANDS"),
)
async def test_a_later_rule_stops_a_task_by_slot_retry_or_queue(open_rig: OpenRig, tmp_path: Path, rule: Any, words: str) -> None:
    rig = await open_rig()
    marker = tmp_path / "marker"
    made = await rig.task(config={"command": f"touch {marker}"}, max_retries=3)
    await rig.schedule(made)
    failing = await rig.task(config={"command": f"test -e {tmp_path}/never && touch {marker}"}, max_retries=3, retry_delay=30)
    await rig.executed(failing)
    assert await rig.statuses() == ["retrying"]
    later = await restarted(rig, open_rig, 61, **rule)
    with pytest.raises((chronotask.Forbidden, InvalidInput), match=words):
        await later.task(config={"command": "id"})
    if "allow_host_commands" in rule:
        with pytest.raises(chronotask.Forbidden, match=words):
            await later.execute(made)
    await later.finish()
    await later.run_at(62)
    found = {(row["task_id"], row["status"], row["attempt"]) for row in await later.rows()}
    assert found == {(made, "failed", 1), (failing, "failed", 2)}
    assert all(words in row["error_message"] for row in await later.rows())
    assert not marker.exists()


def secret_config(target: Target) -> dict[str, Any]:
    kept = {"Authorization": "Bearer header-secret-3", "COOKIE": "s=cookie-secret-4", "proxy-authorization": "proxy-secret-5"}
    return {
        "url": target.url.replace("://", "://anna:url-secret-1@"),
        "method": "POST",
        "auth": {"username": "anna", "password": "auth-secret-2"},
        "headers": {**kept, "X": "y"},
        "params": {"a": [1, "b", True]},
        "body": {"x": [1, 2.5, None]},
        "timeout": 2.5,
        "expected_status": [200, "300-399"],
        "follow_redirects": False,
        "verify_tls": False,
    }


SECRETS = ("url-secret-1", "auth-secret-2", "header-secret-3", "cookie-secret-4", "proxy-secret-5")


async def test_stored_secrets_are_masked_in_every_answer_and_kept_when_the_masks_come_back(api: Api, target: Target) -> None:
    task_id = await api.task(task_type="http", config=secret_config(target))
    shown = (await api("GET", f"/tasks/{task_id}")).json
    assert shown["config"]["auth"] == {"username": "anna", "password": MASK}
    assert shown["config"]["headers"] == {"Authorization": MASK, "COOKIE": MASK, "proxy-authorization": MASK, "X": "y"}
    assert shown["config"]["url"] == target.url.replace("://", f"://{MASK}@")
    for method, sent in itertools.product(("PUT", "PATCH"), (shown, {"description": "and nothing else"})):
        answer = await api(method, f"/tasks/{task_id}", sent)
        assert (answer.status, answer.json) == (200, {**shown, **sent})
    answer = await chronotask.run_tool(api.rig.service, "update_task", {"task_id": task_id, "config": shown["config"]})
    assert not answer.is_error
    await api.executed(task_id)
    (request,) = target.requests
    assert (request.headers["Authorization"], request.headers["Cookie"]) == ("Bearer header-secret-3", "s=cookie-secret-4")
    texts = [
        (await api("GET", path)).text
        for path in ("/tasks", f"/tasks/{task_id}", "/overview", "/executions?output=full", "/executions/1")
    ]
    for tool, arguments in (("get_task", {"task_id": task_id}), ("list_tasks", {}), ("get_execution", {"execution_id": 1})):
        texts.append(str((await chronotask.run_tool(api.rig.service, tool, arguments)).model_dump()))
    for secret, text in itertools.product(SECRETS, texts):
        assert secret not in text, secret
        assert base64.b64encode(f"anna:{secret}".encode()).decode() not in text


async def test_a_mask_does_not_follow_the_url_to_another_server_but_to_another_path(api: Api, target: Target) -> None:
    task_id = await api.task(task_type="http", config=secret_config(target))
    shown = (await api.get(f"/tasks/{task_id}"))["config"]
    masked = {f"config.{name}" for name in ("auth.password", *(f"headers.{name}" for name in shown["headers"] if name != "X"))}
    for host in ("127.0.0.2", "127.0.0.1:9", f"{target.url[7:]}.evil.example", f"{target.url[7:]}@127.0.0.2"):
        answer = await api("PATCH", f"/tasks/{task_id}", {"config": {**shown, "url": f"http://{MASK}@{host}/"}})
        assert answer.status == 422, answer.text
        fields = {error["field"] for error in answer.json["errors"]}
        assert fields >= masked or fields == {"config.url"}, fields
        assert not [secret for secret in SECRETS if secret in answer.text]
    kept = json.loads(api.rig.sql("SELECT config FROM tasks WHERE id = ?", task_id)[0][0])
    assert kept == secret_config(target)
    assert (await api("PATCH", f"/tasks/{task_id}", {"config": {**shown, "url": shown["url"] + "/other?x=1"}})).status == 200
    await api.executed(task_id)
    assert [(r.path, r.headers["Authorization"]) for r in target.requests] == [("/other", "Bearer header-secret-3")]


async def test_what_a_task_prints_forges_no_event_and_no_header(api: Api) -> None:
    forged = '\n\nevent: forged\ndata: {"x":1}\n\nid: 9\r\n\r\nHTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\n\r\n'
    forged += "<script>alert(1)</script>\u2028\u2029\x85\x1b[2J\x1b]0;owned\x07"
    quoted = json.dumps(forged).replace("'", "")
    command = f"python3 -c 'import sys; sys.stdout.write({quoted}); sys.stderr.write({quoted}); sys.exit(3)'"
    async with api.client.get(f"{API}/events") as stream:
        await stream.content.readuntil(b"\n\n")
        task_id = await api.task(name="a\u00e4<script>", description="event: forged\ndata: 1\n\n", config={"command": command})
        execution_id = await api.executed(task_id)
        statuses: list[str] = []
        async with asyncio.timeout(10):
            while "failed" not in statuses:
                lines = (await stream.content.readuntil(b"\n\n")).decode()[:-2].split("\n")
                if lines[0].startswith(":"):
                    continue
                assert [line.partition(": ")[0] for line in lines] == ["id", "event", "data"], lines
                assert lines[1].removeprefix("event: ") in {"task", "execution", "schedule", "scheduler"}
                statuses.append(json.loads(lines[2].removeprefix("data: ")).get("status"))
    for path in (f"/executions/{execution_id}/output", f"/executions/{execution_id}/output?follow=true"):
        answer = await api("GET", path)
        assert forged in answer.text and "Set-Cookie" not in answer.headers
        assert answer.headers["Content-Type"].startswith("text/plain") and answer.headers["X-Content-Type-Options"] == "nosniff"
    for path in (f"/executions/{execution_id}", f"/tasks/{task_id}/history", "/executions", "/overview"):
        answer = await api("GET", path)
        assert answer.headers["Content-Type"].startswith("application/json")
        assert answer.headers["X-Content-Type-Options"] == "nosniff" and not set(answer.text) & set("\n\r\x1b\x07")


async def test_what_a_server_answers_sets_no_header_of_ours(api: Api, target: Target) -> None:
    evil = {"Set-Cookie": "a=b", "Location": "http://evil.example/", "Access-Control-Allow-Origin": "*"}
    target.answer(200, {**evil, "Content-Type": "text/html"}, b"<script>alert(1)</script>")
    execution_id = await api.executed(await api.task(**target.config()))
    for path in (f"/executions/{execution_id}", f"/executions/{execution_id}/output"):
        headers = (await api("GET", path)).headers
        assert not {*evil} & {*headers}, path
        assert "html" not in headers["Content-Type"], path


# ======================================================================================================================
# 14. MCP
# ======================================================================================================================


TOOL_NAMES = {
    "create_task", "list_tasks", "get_task", "update_task", "delete_task", "execute_task", "create_schedule", "list_schedules",
    "update_schedule", "delete_schedule", "get_task_history", "get_scheduler_status", "preview_schedule", "get_execution",
    "cancel_execution", "rerun_execution", "list_upcoming", "list_executions", "set_scheduler_paused", "apply_definitions",
}  # fmt: skip
OLD_VERSIONS = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"]
NEW_VERSION = "2026-07-28"
WEEKDAYS = {"expression": "0 9 * * MON-FRI", "timezone": "Europe/Berlin"}


def tools() -> list[Json]:
    return [tool.model_dump(by_alias=True, exclude_none=True, mode="json") for tool in chronotask.make_tools().tools]


# --- What tools/list says ---------------------------------------------------------------------------------------------


def tokens(value: Json) -> int:
    """A little more than o200k makes of it: 4,481 of the tools, when this gave 4,591."""
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":"))) // 4


def test_all_tools_are_described_for_a_stranger_in_less_than_5000_tokens() -> None:
    assert {tool["name"] for tool in tools()} == TOOL_NAMES
    assert tokens({"tools": tools()}) < 5000
    for one in tools():
        assert len(one["description"]) > 60 and one["description"].endswith("."), one["name"]
        assert one["title"] == one["name"].replace("_", " ").capitalize()
        assert "outputSchema" not in one, "clients drop what it does not list"
    words = json.dumps(tools())
    for word in ("L (last day of the month)", "MON#2", "L5 (last Friday)", "IANA", "seconds first", "ISO 8601"):
        assert word in words


def schemas(schema: Json) -> Iterator[Json]:
    yield schema
    items = [schema["items"]] if "items" in schema else []
    for one in (*schema.get("properties", {}).values(), *schema.get("anyOf", ()), *items):
        yield from schemas(one)


def test_schemas_are_what_strict_clients_take() -> None:
    """OpenAI's strict mode and Gemini: every object has properties, every list a type of its items, nothing is null or a list
    of types, no title, reference or pattern."""
    for one in tools():
        for schema in schemas(one["inputSchema"]):
            assert {*schema} <= {"type", "properties", "required", "items", "enum", "default", "maximum", "description", "anyOf"}
            assert isinstance(schema.get("type", ""), str) and ("type" in schema or len(schema["anyOf"]) == 2), one["name"]
            assert schema.get("type") != "object" or schema["properties"], one["name"]
            assert schema.get("type") != "array" or schema["items"], one["name"]
    properties = {one["name"]: one["inputSchema"]["properties"] for one in tools()}
    assert properties["get_task_history"]["limit"] == {"type": "integer", "default": 5, "maximum": 100}
    wait = properties["execute_task"]["wait"]
    assert (wait["default"], wait["maximum"]) == (4, 50), "some clients give a call up after 5 s"


def test_every_tool_has_all_four_annotations() -> None:
    hints = {one["name"]: tuple(one["annotations"].values()) for one in tools()}
    assert [*tools()[0]["annotations"]] == ["readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint"]
    assert {name for name, (read_only, *_) in hints.items() if read_only} == {
        "list_tasks", "get_task", "list_schedules", "get_task_history", "get_scheduler_status", "preview_schedule",
        "get_execution", "list_executions", "list_upcoming",
    }  # fmt: skip
    assert hints["delete_task"] == (False, True, True, False)
    assert hints["execute_task"] == (False, True, False, True)
    assert hints["create_task"] == (False, False, False, False)


def test_every_field_of_a_body_or_of_a_configuration_is_an_argument_of_its_own() -> None:
    offered = {one["name"]: {*one["inputSchema"]["properties"]} for one in tools()}
    for name, kinds in (("create_task", "http bash"), ("update_task", "http bash"), ("execute_task", "http bash"),
                        *((tool, "cron once interval after") for tool in ("create_task", "create_schedule", "update_schedule",
                                                                        "preview_schedule"))):  # fmt: skip
        assert {argument for kind in kinds.split() for argument in chronotask.KINDS[kind]} <= offered[name], name
    for operation in OPERATIONS:
        if operation.tool is not None and operation.name != "apply_definitions":
            fields = {*chronotask.field_names(operation.body or operation.query or chronotask.Query), operation.id_name} - {None}
            unsaid = {one.rpartition(".")[2] for one in chronotask.UNTOLD if one.partition(".")[0] in (one, operation.name)}
            assert fields - unsaid <= offered[operation.name], operation.name


# --- Arguments and answers --------------------------------------------------------------------------------------------


def test_arguments_are_split_into_the_id_and_the_body_and_may_come_as_text() -> None:
    assert chronotask.tool_args(TOOLS["get_task"], {"task_id": "7"})[0] == 7
    many = refused(chronotask.tool_args, TOOLS["get_task"], {f"x{n}": 1 for n in range(5000)}).errors
    assert len(many) == 201, "each costs 0.2 ms: the nearest known name is looked for"
    task_id, _, body_for = chronotask.tool_args(TOOLS["update_task"], {"task_id": "7", "name": "x", "timeout": 9})
    stands = {"task_type": "bash", "config": {"command": "true"}}
    assert (task_id, body_for(stands)) == (7, {"name": "x", "task_type": "bash", "config": {"command": "true", "timeout": 9}})
    sent = {"task_id": 1, "schedule_type": "cron", "schedule_config": json.dumps(WEEKDAYS)}
    assert chronotask.tool_args(TOOLS["create_schedule"], sent)[2]["schedule_config"] == WEEKDAYS
    for text in ("chronotask = 1", '{"chronotask": 1}', {"chronotask": 1}):
        assert chronotask.tool_args(TOOLS["apply_definitions"], {"definitions": text})[2]["chronotask"] == 1


@each(
    "line code number",
    (b"hello", -32700, None),
    (b'{"jsonrpc":"2.0","id":3', -32700, None),
    (b"\xff\xfe", -32700, None),
    (b"[" * 100_000, -32700, None),
    (b'{"jsonrpc":"2.0","id":3}', -32600, 3),
    (b'{"id":"x","method":"ping"}', -32600, "x"),
    (b'[{"jsonrpc":"2.0","id":3,"method":"ping"}]', -32600, None),
    (b"null", -32600, None),
    (b'{"jsonrpc":"2.0","id":1.0,"method":"ping"}', -32600, None),
    (b'{"jsonrpc":"2.0","id":3,"params":{"id":4,"text":"\\ud83d"}}', -32700, 3),
    (b'{"jsonrpc":"2.0","id":"\\ud83d"}', -32700, None),
    (b" " * (chronotask.MAX_BODY + 1), -32700, None),
)
def test_garbage_and_what_is_too_long_are_refused_with_reason_and_id(line: bytes, code: int, number: Json) -> None:
    refused: Any = chronotask.read_message(line)
    assert (refused.error.code, refused.id) == (code, number)
    assert len(line) <= chronotask.MAX_BODY or refused.error.message.endswith("a message may have at most 1048576 bytes")


def test_long_texts_keep_their_end_and_say_how_many_bytes_are_missing() -> None:
    assert chronotask.clip("ä" * 30 + "end", 8, "elsewhere") == "ää\n[… 50 bytes left out: elsewhere …]\näääend"
    assert chronotask.clip("short", 8, "elsewhere") == "short"
    assert chronotask.clip({"a": "x" * 20}, 8, "there") == '{"\n[… 20 bytes left out: there …]\nxxxx"}'
    assert chronotask.clip(7, 0, "") == 7


class Caller:
    """Calls tools as a client does."""

    def __init__(self, client: Json) -> None:
        self.client = client

    async def __call__(self, name: str, /, **arguments: Json) -> Json:
        result = await self.client.call_tool(name, arguments)
        assert not result.is_error, result.content[0].text
        assert json.loads(result.content[0].text) == result.structured_content
        return result.structured_content

    async def refused(self, name: str, /, **arguments: Json) -> str:
        result = await self.client.call_tool(name, arguments)
        assert result.is_error and result.structured_content is None
        return str(result.content[0].text)


@pytest.fixture(params=["legacy", NEW_VERSION])
async def call(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[Caller]:
    """The SDK's client in the same process, in both eras. It lives in one job, as its cancel scopes need."""
    opened: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def live() -> None:
        async with Client(chronotask.make_server(api.rig.service), mode=request.param) as client:
            opened.set_result(client)
            await over.wait()

    job = asyncio.ensure_future(live())
    yield Caller(await opened)
    over.set()
    await job


async def bash_mcp(call: Caller, command: str, **more: Json) -> int:
    body = {"name": "t", "task_type": "bash", "config": {"command": command}, "max_retries": 0, **more}
    return int((await call("create_task", **body))["id"])


async def use_every_tool(call: Caller) -> None:
    """Calls each of the tools."""
    listed = {tool.name for tool in (await call.client.list_tools()).tools}
    assert listed == TOOL_NAMES
    called = set()

    async def use(name: str, /, **arguments: Json) -> Json:
        called.add(name)
        return await call(name, **arguments)

    task = await use("create_task", name="hello", task_type="bash", config={"command": "echo hello"})
    assert (await use("list_tasks", q="hell"))["total"] == 1
    assert (await use("get_task", task_id=task["id"]))["config"] == {"command": "echo hello"}
    for change in ({"description": "says hello"}, {"clear": ["description"]}, {"status": "paused"}, {"status": "active"}):
        changed = await use("update_task", task_id=task["id"], **change)
        same = [name for name in changed if name not in ("notes", "status_reason", *change)]
        assert [changed[name] for name in same] == [task[name] for name in same], change
        task |= changed
    run = await use("execute_task", task_id=task["id"])
    assert (run["status"], run["output_data"]["stdout"]) == ("succeeded", "hello\n")
    assert (await use("get_execution", execution_id=run["id"]))["output_data"] == {"exit_code": 0, "stdout": "hello\n"}
    listed = await use("list_executions", status="succeeded", task_id=task["id"])
    assert [one["id"] for one in listed["executions"]] == [run["id"]]
    assert (await use("get_task_history", task_id=task["id"]))["history"][0]["id"] == run["id"]
    again = await use("execute_task", task_id=task["id"], config={"args": ["again"]}, idempotency_key="k")
    assert (again["output_data"]["stdout"], again["config"]) == ("hello again\n", {"args": ["again"]})
    assert (await use("execute_task", task_id=task["id"], config={"args": ["again"]}, idempotency_key="k"))["id"] == again["id"]
    rerun = await use("rerun_execution", execution_id=again["id"])
    assert (rerun["output_data"]["stdout"], rerun["rerun_of"]) == ("hello again\n", again["id"])
    slow = await use("create_task", name="slow", task_type="bash", config={"command": "sleep 60"}, max_retries=0)
    going = await use("execute_task", task_id=slow["id"], wait=0.05)
    shows = f"get_execution with execution_id {going['id']} and wait shows its end, cancel_execution ends it"
    assert going["status"] in ("queued", "running") and going["notes"] == [f"not over: {shows}"]
    assert (await use("cancel_execution", execution_id=going["id"]))["status"] == "cancelled"
    over = f"execution {going['id']} is over already: cancelled"
    assert await call.refused("cancel_execution", execution_id=going["id"]) == over
    preview = await use("preview_schedule", schedule_type="cron", schedule_config=WEEKDAYS)
    made = await use("create_schedule", task_id=task["id"], schedule_type="cron", schedule_config=WEEKDAYS)
    assert preview["description"] == made["description"] and preview["upcoming"] == made["upcoming"]
    assert (made["schedule_config"], made["description"]) == (WEEKDAYS, "Every weekday at 09:00 (Europe/Berlin)")
    for slot in made["upcoming"]:
        assert re.fullmatch(r"....-..-..T09:00:00\+0[12]:00", slot)
    [listed_schedule] = (await use("list_schedules", task_id=task["id"]))["schedules"]
    assert len(made["upcoming"]) == 5 and listed_schedule["upcoming"] == made["upcoming"][:2]
    first = await use("list_upcoming", until="2099-01-01", limit=1)
    assert first["upcoming"][0]["local"] == made["upcoming"][0] and first["notes"][0].startswith("there may be more: ")
    assert (await use("set_scheduler_paused", paused=True))["paused"] is True
    assert (await use("set_scheduler_paused", paused=False))["paused"] is False
    assert (await use("apply_definitions", definitions="chronotask = 1", dry_run=True))["changes"] == []
    coming = (await use("list_upcoming", task_id=task["id"], until="2100-01-01", limit=5))["upcoming"]
    assert [one["local"] for one in coming] == made["upcoming"]
    assert (await use("update_schedule", schedule_id=made["id"], overlap="queue"))["overlap"] == "queue"
    assert await use("delete_schedule", schedule_id=made["id"]) == {"id": made["id"], "deleted": True}
    assert (await use("get_scheduler_status"))["timezone"] == "UTC"
    assert await use("delete_task", task_id=task["id"]) == {"id": task["id"], "deleted": True}
    assert called == TOOL_NAMES


async def test_every_tool_can_be_called_in_both_eras(call: Caller) -> None:
    await use_every_tool(call)


async def test_what_does_not_exist_is_answered_with_its_name(call: Caller) -> None:
    with pytest.raises(MCPError) as caught:
        await call.client.call_tool("create_tasks", {})
    assert (caught.value.code, caught.value.message) == (-32602, "unknown tool 'create_tasks' (did you mean create_task?)")
    for tool, what in (("get_task", "task"), ("delete_schedule", "schedule"), ("get_execution", "execution")):
        assert await call.refused(tool, **{f"{what}_id": 99}) == f"there is no {what} 99"


async def test_notes_say_what_fires_nothing_or_has_changed_nothing(call: Caller) -> None:
    task_id = await bash_mcp(call, "true", status="paused")
    made = await call("create_schedule", task_id=task_id, schedule_type="interval", schedule_config={"seconds": 60})
    assert made["notes"] == ["Nothing will fire: its task is not active."]
    assert "timezone" not in await call.refused("update_schedule", schedule_id=made["id"], clear=["timezone"])
    off = await call("update_schedule", schedule_id=made["id"], is_active=False)
    waits = await call("create_schedule", task_id=await bash_mcp(call, "true"), **after("failure", any=True))
    assert off["notes"] == ["Nothing will fire: is_active is false."] and not {"upcoming", "notes", "overlap"} & waits.keys()
    await call("update_schedule", schedule_id=waits["id"], clear=["overlap", "exclude"])
    assert (await call("update_schedule", schedule_id=waits["id"], seconds=60))["schedule_type"] == "interval"
    await call("update_schedule", schedule_id=waits["id"], timezone="Asia/Tokyo")
    moved = await call("update_schedule", schedule_id=waits["id"], seconds=90, is_active=True)
    assert "The time zone stays Asia/Tokyo: none was sent." in moved["notes"]
    first = await call("create_task", name="backup", command="true")
    assert first["notes"] == ["it has no schedule: only execute_task runs it, until create_schedule says when"]
    for arguments, why in (({"name": None}, "no field was given"), ({"command": "true", "name": "t"}, "all is so already")):
        assert f"nothing was changed: {why}" in (await call("update_task", task_id=task_id, **arguments))["notes"]
    assert "notes" not in await call("update_task", task_id=f"{first['id']}", command="false")


async def test_history_is_short_and_says_how_to_get_more_and_the_resource_has_all_of_it(call: Caller) -> None:
    task_id = await bash_mcp(call, "head -c 50000 /dev/zero | tr '\\0' x")
    runs = [await call("execute_task", task_id=task_id) for _ in range(6)]
    page = await call("get_task_history", task_id=task_id)
    assert (len(page["history"]), page["notes"]) == (5, ["1 more: ask with skip=5"])
    last = runs[-1]["id"]
    for run, left_out, limit in ((runs[-1], 42_000, 8000), (page["history"][0], 49_500, 500)):
        assert run["id"] == last and len(run["output_data"]["stdout"]) < limit + 110
        where = f"resource chronotask://executions/{last} has all that was kept"
        assert f"\n[… {left_out} bytes left out: {where} …]\n" in run["output_data"]["stdout"]
    read = await call.client.read_resource(f"chronotask://executions/{last}")
    assert json.loads(read.contents[0].text)["output_data"]["stdout"] == "x" * 50_000
    full = await call("get_task_history", task_id=task_id, output="full", limit=1, skip=5)
    assert "[… 42000 bytes left out: " in full["history"][0]["output_data"]["stdout"] and "notes" not in full
    assert "output_data" not in (await call("get_task_history", task_id=task_id, output="none"))["history"][0]


async def test_resources_can_be_read(call: Caller) -> None:
    await bash_mcp(call, "true", key="k")
    listed = [str(one.uri) for one in (await call.client.list_resources()).resources]
    templates = [one.uri_template for one in (await call.client.list_resource_templates()).resource_templates]
    assert [*listed, *templates] == ["chronotask://status", "chronotask://tasks/{id}", "chronotask://executions/{id}"]
    read = (await call.client.read_resource("chronotask://tasks/key%3Ak")).contents[0]
    assert read.mime_type == "application/json" and json.loads(read.text)["name"] == "t"
    for uri in ("chronotask://tasks/99", "chronotask://nothing", "file:///etc/passwd", "chronotask://tasks/1/../2"):
        with pytest.raises(MCPError) as caught:
            await call.client.read_resource(uri)
        assert caught.value.code == -32602


async def test_pipelined_requests_and_one_after_a_refused_upgrade_are_each_checked_in_order(open_api: OpenApi) -> None:
    api = await open_api(api_token=GOOD_TOKEN)
    upgrade = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    stolen = b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n"
    evil = b"GET /api/v1/tasks HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert statuses_in(await raw_answer(api.client.port, upgrade + SMUGGLED)) == [200, 401]
    assert api.rig.sql("SELECT count(*) FROM tasks") == [(0,)]
    assert statuses_in(await raw_answer(api.client.port, one * 40 + stolen + one + evil)) == [200] * 40 + [401, 200, 403]


async def test_a_call_that_is_given_up_does_not_end_the_run(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    service = api.rig.service
    async with Client(chronotask.make_server(service), mode="legacy") as client:
        call = Caller(client)
        os.mkfifo(f"{service.store.path}.gate")
        task_id = await bash_mcp(call, f"read line < {service.store.path}.gate; echo $line")
        calls = [{"task_id": one, "wait": 50} for one in (task_id, await bash_mcp(call, "sleep 60"))]
        waiting = [asyncio.ensure_future(client.call_tool("execute_task", one)) for one in calls]
        await until_true(lambda: len(service.engine.running) == 2)
        assert [one.cancel() for one in waiting] == [True, True]
        await call("delete_task", task_id=calls[1]["task_id"])
        await asyncio.to_thread(Path(f"{service.store.path}.gate").write_text, "on and on\n")
        [run] = (await call("get_task_history", task_id=task_id))["history"]
        await service.engine.feed.wait_for(run["id"], 10)
        assert (await call("get_execution", execution_id=run["id"]))["output_data"]["stdout"] == "on and on\n"
    chronotask.gc.collect()
    assert "never retrieved" not in caplog.text, "what is told to nobody"


async def test_a_bug_is_answered_without_a_trace(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOOLS["get_task"], "use_case", None)
    async with Client(chronotask.make_server(rig.service), mode="legacy") as client:
        text = await Caller(client).refused("get_task", task_id=await rig.task())
    assert text == "something went wrong here; the log has the details"


# --- Stdio: lines, and real processes ---------------------------------------------------------------------------------


async def lines_of(*pieces: bytes) -> list[bytes]:
    """What comes out of a pipe into which `pieces` are written."""
    source, sink = os.pipe()

    def write() -> None:
        with open(sink, "wb", buffering=0) as file:
            file.writelines(pieces)

    with open(source, "rb"):
        writing = asyncio.ensure_future(asyncio.to_thread(write))
        found = [line async for line in chronotask.read_lines(source)]
        await writing
        return found


async def test_lines_come_whole_however_they_are_cut_or_marked_and_of_one_that_is_too_long_a_beginning() -> None:
    assert await lines_of(b'{"a"', b":1}\n\n{", b"}\nrest") == [b'{"a":1}', b"", b"{}", b"rest"]
    assert await lines_of(b"") == [b""]
    [line, end] = await lines_of(b"start", *[b"x" * 60_000] * 50, b"end\nrest")
    assert (line[:6], end, chronotask.MAX_BODY < len(line) <= chronotask.MAX_BODY + 65537) == (b"startx", b"rest", True)
    marked = codecs.BOM_UTF8 + b'{"jsonrpc":"2.0","id":3,"method":"ping"}'
    assert chronotask.read_message(marked) == chronotask.read_message(marked[3:])


@pytest.fixture
def new_session(new_server: NewServer) -> NewServer:
    """Makes processes that speak MCP on their standard streams, and have shaken hands."""

    def open_one(**settings: Json) -> Server:
        server = new_server("mcp", **settings).start(ready=False)
        server.hello()
        return server

    return open_one


META = {
    "io.modelcontextprotocol/protocolVersion": NEW_VERSION,
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


@each("version", *OLD_VERSIONS, NEW_VERSION)
def test_stdio_speaks_every_version_with_a_handshake_and_the_newest_without(new_server: NewServer, version: str) -> None:
    server, meta = new_server("mcp").start(ready=False), {"_meta": META} if version == NEW_VERSION else {}
    if meta:
        server.send("server/discover", 1, **meta)
        assert server.answer()["result"]["supportedVersions"] == [NEW_VERSION]
    else:
        hello = server.hello(version)
        assert (hello["protocolVersion"], hello["serverInfo"]["name"]) == (version, "chronotask")
        assert "by default UTC" in hello["instructions"]
    server.send("tools/list", 1, **meta)
    assert {one["name"] for one in server.answer()["result"]["tools"]} == TOOL_NAMES
    server.send("tools/call", 2, name="get_scheduler_status", arguments={}, **meta)
    assert server.answer()["result"]["structuredContent"]["running"] is True
    server.stdin.close()
    assert server.ended() == 0


@each("mode", "legacy", "auto")
async def test_the_sdks_client_uses_every_tool_over_stdio_and_over_http(both: Server, tmp_path: Path, mode: str) -> None:
    environ = {**CHILD_ENVIRON, "CHRONOTASK_DATABASE_URL": f"sqlite:///{tmp_path}/c.db"}
    program = StdioServerParameters(command=sys.executable, args=[str(PROGRAM), "--mode", "mcp"], env=environ)
    with (tmp_path / "log").open("w") as log:
        for server in (stdio_client(program, errlog=log), both.mcp_url()):
            async with Client(server, mode=mode) as client:
                await use_every_tool(Caller(client))
    assert "ERROR" not in both.log() and "Traceback" not in both.log()


def test_the_end_of_input_ends_the_program_after_the_calls_in_flight_are_answered(new_session: NewServer) -> None:
    server = new_session()
    for number in range(1, 6):
        server.send_call(number, "create_task", name="t", task_type="bash", config={"command": "true"})
    server.write(b'{"jsonrpc":"2.0","id":6,"method":"ping"}')  # the last line needs no newline
    server.stdin.close()
    created = {answer["id"]: answer["result"].get("isError") for answer in server.rest()}
    assert created == {1: False, 2: False, 3: False, 4: False, 5: False, 6: None}
    assert server.ended() == 0


@each("signalled", False, True)
def test_the_end_of_input_stops_a_wait_and_lets_the_run_end(new_session: NewServer, tmp_path: Path, signalled: bool) -> None:
    server = new_session()
    server.send_call(1, "execute_task", task_id=server.bash(f"sleep 1.2; echo done > {tmp_path}/done"), wait=50)
    until(server.has_child)
    server.stdin.close()
    if signalled:
        until(lambda: "stopping" in server.log())
        assert server.stop() == 0  # SIGTERM, as MCP clients send it that find it too slow: no second signal
    assert server.ended() == 0
    assert (tmp_path / "done").read_text() == "done\n"


@each("how", "a signal", "the end of input after notifications/cancelled")
def test_calls_that_wait_are_answered_by_a_signal_and_hold_up_no_end_when_cancelled(new_session: NewServer, how: str) -> None:
    server = new_session(SHUTDOWN_GRACE=0)
    server.send_call(1, "execute_task", task_id=server.bash("sleep 60"), wait=50)
    until(server.has_child)
    if how == "a signal":
        server.process.send_signal(signal.SIGTERM)
        assert server.answer()["id"] == 1
    else:
        server.send("notifications/cancelled", requestId=1)
        server.call(8, "list_tasks")
        server.stdin.close()
        assert server.rest() == []
    assert server.ended(8) == 0


@pytest.mark.parametrize("reads", [True, False], ids=["closes its end", "does not read"])
def test_a_client_that_takes_no_answers_does_not_hold_up_the_end(new_server: NewServer, reads: bool) -> None:
    read_end, write_end = os.pipe()
    server = new_server("mcp", stdout=write_end).start(ready=False)
    os.close(write_end)
    server.send("initialize", 0, protocolVersion="2025-11-25", capabilities={}, clientInfo={"name": "t", "version": "1"})
    for number in range(1, 2 if reads else 201):  # 200 answers are far more than a pipe holds
        server.send("tools/list", number)
    assert os.read(read_end, 10).startswith(b"{")
    if reads:
        os.close(read_end)
        server.send("tools/list", 2)
        assert server.ended() == 0
    else:
        assert server.stop(8) == 0
        os.close(read_end)


def test_a_session_goes_on_after_10_mb_garbage_loud_tasks_and_a_thousand_calls_at_once(new_session: NewServer) -> None:
    server = new_session(LOG_LEVEL="DEBUG")
    assert server.cpu() < 3.0, "the first answer comes soon: in processor time, which does not depend on what else runs"
    server.send_call(7, "create_task", name="t", task_type="bash", config={"command": "x" * 10_000_000})
    error = server.answer()["error"]
    said = "this line is no JSON-RPC message: a message may have at most 1048576 bytes"
    assert (error["code"], error["message"]) == (-32700, said)
    assert server.memory("VmHWM") < 200_000 * 1024
    server.write(b"garbage\n\n\r\n\x00\xff\xfe\n" + b"[" * 100_000 + b'\n{"id":3}\n[]\n')
    errors = [server.answer() for _ in range(5)]
    assert [error.get("id") for error in errors] == [None, None, None, 3, None]
    assert [error["error"]["code"] for error in errors] == [-32700, -32700, -32700, -32600, -32600]
    assert server.call(8, "list_tasks")["structuredContent"]["total"] == 0
    loud = "echo out; echo err >&2; cat; ls -l /proc/self/fd | wc -l; echo '{}' > /proc/$PPID/fd/1; exit 1"
    result = server.call(1, "execute_task", task_id=server.bash(loud))["structuredContent"]
    assert result["output_data"]["stdout"].startswith("out\n")
    for number in range(1, 1001):
        server.send_call(number, "get_scheduler_status")
    assert {server.answer()["id"] for _ in range(1000)} == {*range(1, 1001)}
    server.stdin.close()
    assert server.rest() == [], "nothing that a task prints or reads reaches the wire"
    assert server.ended() == 0


# --- Real processes: both, and HTTP -----------------------------------------------------------------------------------


@pytest.mark.slow
@each("fails", False, True)
def test_mode_http_imports_nothing_of_mcp_and_an_interface_that_cannot_be_closed_is_told(tmp_path: Path, fails: bool) -> None:
    planted = f"""
async def stop(app):
    os.kill(os.getpid(), signal.SIGTERM)
async def fail(app):
    if {fails}:
        raise RuntimeError("planted")
def make(service):
    app = made(service)
    app.on_startup.append(stop)
    app.on_cleanup.append(fail)
    return app
made, chronotask.make_app = chronotask.make_app, make
heavy = {{"mcp", "mcp_types", "starlette", "uvicorn", "anyio"}}
run = chronotask.main
chronotask.main = lambda: run() or print(heavy & sys.modules.keys())
"""
    done = ran(tmp_path, sys.executable, wrapped(tmp_path, "import signal", planted), "--port", "0")
    assert done.returncode == 0 and done.stderr.endswith("set()\n"), done.stderr  # what is printed goes where the log goes
    assert ("could not be closed: planted" in done.stderr) == fails
    assert not (tmp_path / "c.db-wal").exists(), "the database is closed all the same"


def first_tool(server: Server) -> str:
    async def ask_for_it() -> str:
        async with Client(server.mcp_url()) as client:
            return str((await client.list_tools()).tools[0].name)

    return asyncio.run(ask_for_it())


def test_both_with_a_terminal_on_stdin_starts_no_session(new_server: NewServer) -> None:
    master, slave = os.openpty()
    try:
        server = new_server("both", stdin=slave).start()
        os.write(master, b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
        assert first_tool(server) == "create_task"
        assert server.lines.empty()
        assert "MCP on stdio" not in server.log()
    finally:
        os.close(master)
        os.close(slave)


def test_mcp_turned_off_is_told_at_the_start(new_server: NewServer) -> None:
    log = new_server("both", MCP_ENABLED="false").start().log()
    assert "CHRONOTASK_MCP_ENABLED is false: serving HTTP only" in log and "MCP on" not in log


@pytest.fixture(scope="module", params=[pytest.param(None, id="process", marks=pytest.mark.slow)])
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A process in mode `both`, with nobody on its standard streams, for all tests that leave it as it is."""
    server = Server(tmp_path_factory.mktemp("both"), "both", stdin=subprocess.DEVNULL).start()
    server.alive.remove(server)  # it outlives single tests
    yield server
    assert server.stop() == 0


# --- What people ask for: the calls that a model makes who knows only tools/list -----------------------------------------

# What a call of each tool also says, and where its effect is to be seen; else in its answer. T is a task of the key `night-N`
# that fails (`false`), S its schedule (0 3 * * * in New York), E its failed execution, id what the call before has made.
USUAL: dict[str, tuple[Json, str]] = {
    "create_task": ({}, "/tasks/{id}"),
    "update_task": ({"task_id": "T"}, "/tasks/{T}"),
    "execute_task": ({"task_id": "T"}, "/executions/{id}"),
    "create_schedule": ({"task_id": "T"}, "/schedules/{id}"),
    "update_schedule": ({"schedule_id": "S"}, "/schedules/{S}"),
}


SCHEDULES = "/schedules?task_id={id}"
# What people say, the tools, their arguments (of two calls a list), what is to be seen then, and where, unless it is the usual.
SENTENCES: list[tuple[str, str, Json, Json] | tuple[str, str, Json, Json, str]] = [
    ("Back up /tmp/x every weekday at 9 in Berlin", "create_task",
     {"name": "b", "command": "tar -czf x.tgz x", "expression": "0 9 * * MON-FRI", "timezone": "Europe/Berlin"},
     {"schedules": [{"description": "Every weekday at 09:00 (Europe/Berlin)"}]}, SCHEDULES),
    ("Call http://h/ping every 5 minutes, with the key k in a header", "create_task",
     {"name": "p", "url": "http://h/ping", "headers": ["X-Key: k"], "seconds": 300},
     {"task_type": "http", "config": {"url": "http://h/ping", "headers": {"X-Key": "k"}}}),
    ('POST {"a": 1} there, user u, password p', "create_task",
     {"name": "p", "url": "http://h/", "method": "POST", "body": '{"a": 1}', "auth": {"username": "u", "password": "p"}},
     {"config": {"method": "POST", "body": {"a": 1}, "auth": {"username": "u"}}}),
    ("Search with q=1 and page=2; 404 is fine, too", "create_task",
     {"name": "p", "url": "http://h/", "params": ["q=1", "page=2"], "expected_status": ["200-299", "404"]},
     {"config": {"params": {"q": "1", "page": "2"}, "expected_status": ["200-299", "404"]}}),
    ("Run make in /tmp with CI=1, give it an hour, never retry", "create_task",
     {"name": "m", "command": "make", "working_dir": "/tmp", "env": ["CI=1"], "timeout": 3600, "max_retries": 0},
     {"config": {"working_dir": "/tmp", "env": {"CI": "1"}, "timeout": 3600}, "max_retries": 0}),
    ("On the last day of each month at 18:00", "create_schedule", {"expression": "0 18 L * *"},
     {"description": "On the last day of every month at 18:00 (Europe/Berlin)"}),
    ("On each second Monday at 7", "create_schedule", {"expression": "0 7 * * MON#2"},
     {"schedule_config": {"expression": "0 7 * * MON#2"}}),
    ("Every two weeks, from Monday 4 January 2027 at 9 in Berlin", "create_schedule",
     {"days": 14, "start_date": "2027-01-04T09:00:00", "timezone": "Europe/Berlin"},
     {"upcoming": [{"local": "2027-01-04T09:00:00+01:00"}, {"local": "2027-01-18T09:00:00+01:00"}]}),
    ("Once, on 1 June 2030 at noon in New York", "create_schedule",
     {"datetime": "2030-06-01T12:00:00", "timezone": "America/New_York"},
     {"schedule_type": "once", "upcoming": [{"utc": "2030-06-01T16:00:00Z"}]}),
    ("In two hours", "create_schedule", {"in_seconds": 7200}, {"schedule_type": "once"}),
    ("Hourly, five times, not over Christmas", "create_schedule",
     {"expression": "@hourly", "max_runs": 5, "exclude": ["2026-12-24/2026-12-26"]},
     {"max_runs": 5, "exclude": ["2026-12-24/2026-12-26"]}),
    ("Every 10 s; if it is slow let them queue", "create_schedule", {"seconds": 10, "overlap": "queue", "is_active": False},
     {"overlap": "queue", "schedule_config": {"seconds": 10}}),
    ("Tell me on a webhook when it breaks and recovers", "create_task",
     {"name": "a", "url": "http://h/", "method": "POST", "body": '{"text": "${{cause:text}}"}', "after_task_ids": ["T"],
      "on": ["broke", "recovered"]},
     {"schedules": [{"schedule_type": "after", "schedule_config": {"on": ["broke", "recovered"]}}]}, SCHEDULES),
    ("Run `true` when any task fails", "create_task",
     {"name": "a", "command": "true", "after_any": True, "on": ["failure"], "is_active": False},
     {"schedules": [{"schedule_config": {"any": True}}]}, SCHEDULES),
    ("Tell me if it had no success for a day", "create_task",
     {"name": "a", "command": "true", "after_task_ids": ["T"], "on": ["overdue"], "seconds": 86400, "is_active": False},
     {"schedules": [{"schedule_config": {"on": ["overdue"], "seconds": 86400}}]}, SCHEDULES),
    ("What would 0 */2 * * * do?", "preview_schedule", {"expression": "0 */2 * * *", "count": 3}, {"upcoming": [str, str, str]}),
    ("Move it to 4 o'clock", "update_schedule", {"expression": "0 4 * * *"},
     {"schedule_config": {"expression": "0 4 * * *", "timezone": "America/New_York"}}),
    ("Rather each hour", "update_schedule", {"seconds": 3600},
     {"schedule_type": "interval", "schedule_config": {"seconds": 3600, "timezone": "America/New_York"}}),
    ("In Tokyo's time", "update_schedule", {"timezone": "Asia/Tokyo"},
     {"schedule_config": {"expression": "0 3 * * *", "timezone": "Asia/Tokyo"}}),
    ("Until the end of 2030; no, for ever", "update_schedule update_schedule", [{"end_at": "2030-12-31"}, {"clear": ["end_at"]}],
     {"end_at": None}),
    ("Stop that schedule for now", "update_schedule", {"is_active": False}, {"is_active": False}),
    ("Remove the schedule", "delete_schedule", {"schedule_id": "S"}, {"total": 0}, "/schedules?task_id={T}"),
    ("It should run echo 7", "update_task", {"command": "echo 7"}, {"config": {"command": "echo 7"}}),
    ("Give it the argument x", "update_task", {"args": ["x"]}, {"config": {"command": "false", "args": ["x"]}}),
    ("Give it ten minutes; no, the default", "update_task update_task", [{"timeout": 600}, {"clear": ["timeout"]}],
     {"config": {"command": "false"}}),
    ("Make it a request to http://h/", "update_task", {"url": "http://h/"},
     {"task_type": "http", "config": {"url": "http://h/"}}),
    ("Tag it prod and db", "update_task", {"tags": ["prod", "db"]}, {"tags": ["prod", "db"]}),
    ("Pause it until 2030", "update_task", {"status": "paused", "paused_until": "2030-01-01T00:00:00"},
     {"status": "paused", "paused_until": "2029-12-31T23:00:00Z"}),
    ("Pause it after 3 failures in a row", "update_task", {"pause_after": 3}, {"pause_after": 3}),
    ("Delete the task of the key night", "delete_task", {"task_id": "key:night-{n}"}, {"total": 0}, "/tasks?key=night-{n}"),
    ("Which tasks are about night?", "list_tasks", {"q": "night"}, {"tasks": [{"name": "night"}]}),
    ("Run it", "execute_task", {}, {"status": "failed", "trigger": "manual"}),
    ("Run it once with a longer command, and wait", "execute_task", {"command": "sleep 0.2; echo done", "wait": 20},
     {"status": "succeeded", "output_data": {"stdout": "done\n"}}, ""),
    ("Start it and tell me how it ended", "execute_task get_execution", [{"wait": 0}, {"execution_id": "id", "wait": 30}],
     {"status": "failed", "output_data": {"exit_code": 1}}),
    ("Run the failed one again", "rerun_execution", {"execution_id": "E"}, {"rerun_of": "E"}, "/executions/{id}"),
    ("What failed since yesterday?", "list_executions", {"status": "failed,timed_out,interrupted", "since": "2026-01-01"},
     {"executions": [{"status": "failed", "error_message": "exit status 1"}]}),
    ("Is anything stuck?", "get_scheduler_status", {}, {"running": True, "now": str}),
    ("Stop what runs", "execute_task cancel_execution", [{"command": "sleep 60", "wait": 0}, {"execution_id": "id"}],
     {"status": "cancelled"}, "/executions/{id}"),
    ("What comes in the next week?", "list_upcoming", {"until": "2099-01-01", "task_id": "T"},
     {"upcoming": [{"schedule_id": "S"}]}),
    ("Stop everything; go on", "set_scheduler_paused set_scheduler_paused", [{"paused": True}, {"paused": False}],
     {"paused": False}, "/scheduler/status"),
    ("Here is our file, apply it", "apply_definitions get_task",
     [{"definitions": 'chronotask = 1\n[tasks.of-{n}]\ntask_type = "bash"\nconfig = {{command = "true"}}\n'},
      {"task_id": "key:of-{n}"}], {"managed_by": "file"}),
]  # fmt: skip
# What models get wrong, and the one text that puts all of it right. A schedule is one of task 1.
SLIPS: list[tuple[str, Json, str]] = [
    ("create_schedule", {"expression": "0 9 * * *", "timezone": "Berlin"},
     "timezone: 'Berlin': must be an IANA time zone (did you mean Europe/Berlin?)"),
    ("create_schedule", {"expression": "0 9 * * *", "schedule_config": {"expression": "0 9 * * *"}},
     "schedule_config: is given too: say it either there or by expression, not both"),
    ("create_schedule", {"minutes": 30},
     "minutes: unknown field: use seconds; expression or datetime or seconds or on: is required"),
    ("create_schedule", {"datetime": "2020-01-01T09:00:00"},
     r"datetime: '2020-01-01T09:00:00': must be in the future \(it is now .*\)"),
    ("create_schedule", {"expression": "0 9 * * FRI#L"}, r"expression: '0 9 \* \* FRI#L': .* L5 for the last Friday"),
    ("get_task", {"task_id": "night"}, "task_id: must be the id of a task, or key:NAME, not 'night'"),
    ("create_schedule", {"expression": "0 9 * * *", "seconds": 60},
     r"expression \(cron\) and seconds \(interval or after\): do not go together: give those of one kind"),
    ("create_task", {"url": "http://h/", "command": "true", "on": ["failure"]}, r"url \(http\) and command \(bash\): do not go "
     "together: give those of one kind; name: .*; schedule_config: must have exactly one of after_task_ids, after_tag, .*"),
    ("create_task", {"command": None, "url": None, "key": None}, "url or command: is required; name: is required"),
    ("update_task", {"task_id": 1, "clear": ["name_"]}, "clear: must be a list of fields, not given themselves, of key, .*"),
    ("update_task", {"task_id": True, "name": "x"}, "task_id: must be the id of a task, or key:NAME, not True"),
    ("delete_schedule", {"schedule_id": True}, "schedule_id: must be a whole number, not True"),
    ("execute_task", {"task_id": 1, "env": ["CI"]}, "env: must be a list of NAME=VALUE with each name once, or an object"),
    ("create_task", {"name": "n", "url": "http://h/", "params": ["a=1", "b=2", "a=3"]}, "params: must be a list of .*"),
    ("create_task", {"name": "", "task_type": "shell", "config": "ls", "max_retry": 3},
     "max_retry: unknown field (did you mean max_retries?); name: must not be empty; task_type: must be 'http' or 'bash', "
     "not 'shell'; config: must be a valid object"),
    ("get_task", {"id": 3}, "id: unknown field: use task_id; task_id: is required"),
    ("get_execution", {"id": 3}, "id: unknown field: use execution_id; execution_id: is required"),
    ("get_task", {"task_id": 0}, "task_id: must be greater than or equal to 1, not 0"),
    ("execute_task", {"task_id": 1, "wait": 60}, "wait: must be less than or equal to 50, not 60"),
    ("create_task", {"name": "x", "task_type": ["bash"], "command": "x"}, "task_type: must be 'http' or 'bash'"),
]  # fmt: skip


def within(expected: Json, found: Json) -> bool:
    """Whether what is expected is there: fields of objects, first entries of lists, values, or types of them."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(within(value, found.get(name)) for name, value in expected.items())
    if isinstance(expected, list):
        return len(expected) <= len(found) and all(map(within, expected, found))
    return isinstance(found, expected) if isinstance(expected, type) else bool(expected == found)


def test_what_people_ask_for_is_done_by_the_calls_that_a_model_makes_at_once(new_server: NewServer) -> None:
    server = new_server("both", SCHEDULER_TIMEZONE="Europe/Berlin").start()
    server.hello()
    unset = {one["name"]: dict.fromkeys(one["inputSchema"]["properties"]) for one in tools()}
    for number, (sentence, names, calls, expected, *path) in enumerate(SENTENCES):
        task = server.bash("false", name="night", key=f"night-{number}")
        made = {"n": number, "T": task, "E": server.execute(task, 10)["id"]}
        zone = {"expression": "0 3 * * *", "timezone": "America/New_York"}
        made["S"] = server.create("schedule", task_id=task, schedule_type="cron", schedule_config=zone)
        server.expect(200, "PATCH", f"/tasks/{task}", {"config": {"command": "false"}})

        def filled(value: Json, made: Json = made) -> Json:
            if isinstance(value, dict):
                return {name: filled(inner) for name, inner in value.items()}
            if isinstance(value, list):
                return [filled(inner) for inner in value]
            if not isinstance(value, str):
                return value
            text = re.sub(r"(?<!\{)\{(n|T|S|E|id)\}", lambda match: str(made[match[1]]), value)
            return made.get(value, text.replace("{{", "{").replace("}}", "}"))

        for tool, arguments in zip(names.split(), calls if isinstance(calls, list) else [calls], strict=True):
            also, usual_path = USUAL.get(tool, ({}, ""))
            # with null for all else, as some clients send it
            result = server.call(7, tool, **{**unset[tool], **filled(also), **filled(arguments)})
            assert not result["isError"], (sentence, result["content"])
            made |= {"id": result["structuredContent"].get("id")}
            assert len(result["content"][0]["text"]) <= chronotask.MAX_ANSWER
        where = filled(path[0] if path else usual_path)
        found = server.get(where) if where else result["structuredContent"]
        assert within(filled(expected), found), (sentence, found)
        server.ask("DELETE", f"/tasks/{task}")
    assert len(SENTENCES) >= 40 and "Traceback" not in server.log()


async def test_the_slips_that_models_make_are_answered_with_what_to_change(call: Caller) -> None:
    await bash_mcp(call, "true", name="night")
    for name, arguments, wanted in SLIPS:
        text = await call.refused(name, **({"task_id": 1} if name == "create_schedule" else {}) | arguments)
        assert text == wanted or re.fullmatch(wanted, text), (name, arguments, text)
        assert (await call("list_schedules"))["total"] == 0 and (await call("list_tasks"))["total"] == 1


async def test_of_flat_updates_at_once_none_is_lost(call: Caller) -> None:
    task_id = await bash_mcp(call, "true")
    made = await call("create_schedule", task_id=task_id, expression="0 3 * * *", timezone="Asia/Tokyo")
    for number in range(1, 6):
        changes = ({"args": [f"{number}"]}, {"timeout": number}, {"working_dir": f"/{number}"})
        await asyncio.gather(*(call("update_task", task_id=task_id, **change) for change in changes))
        config = (await call("get_task", task_id=task_id))["config"]
        assert config == {"command": "true", "args": [f"{number}"], "timeout": number, "working_dir": f"/{number}"}
        zone = "Europe/Berlin" if number % 2 else "Asia/Tokyo"
        changes = ({"expression": f"{number} 3 * * *"}, {"timezone": zone}, {"jitter": number})
        await asyncio.gather(*(call("update_schedule", schedule_id=made["id"], **change) for change in changes))
        [stands] = (await call("list_schedules"))["schedules"]
        assert stands["schedule_config"] == {"expression": f"{number} 3 * * *", "timezone": zone} and stands["jitter"] == number


async def test_answers_are_short(call: Caller) -> None:
    for number in range(20):
        zone = {"expression": f"{number} 9 * * MON-FRI", "timezone": "Europe/Berlin"}
        made = await call("create_task", name=f"task {number}", command="echo done", **zone)
    listed = await call("list_schedules")
    assert (len(listed["schedules"]), tokens(listed) < 2000) == (20, True), tokens(listed)
    run = await call("execute_task", task_id=made["id"])
    assert {*run} == {"id", "task_name", "status", "started_at", "duration", "output_data"} and tokens(run) < 72
    for _ in range(4):
        await call("rerun_execution", execution_id=run["id"])
    assert tokens(await call("get_task_history", task_id=made["id"])) < 369
    upcoming = await call("list_upcoming", until="2099-01-01", limit=100)
    assert len(upcoming["upcoming"]) == 100 and "utc" not in upcoming["upcoming"][0]


async def test_no_answer_has_more_than_40_000_characters_and_what_is_cut_is_said(call: Caller) -> None:
    long = {"command": "head -c 60000 /dev/zero | tr '\\0' x", "env": {f"V{n}": "x" * 400 for n in range(200)}}
    task_id = (await call("create_task", name="t", **long))["id"]
    last = 0
    for _ in range(6):
        last = (await call("execute_task", task_id=task_id, wait=20))["id"]
    for name, arguments in (
        ("get_task", {"task_id": task_id}),
        ("get_execution", {"execution_id": last, "output": "full"}),
        ("get_task_history", {"task_id": task_id, "output": "full"}),
        ("list_executions", {"output": "full"}),
    ):
        answer = await call(name, **arguments)
        assert len(json.dumps(answer, ensure_ascii=False, separators=(",", ":"))) <= 40_000, name
        assert any(told in str(answer) for told in ("cut to 40000", "fit into an answer", "left out")), name
    assert answer["next_before_id"] == answer["executions"][-1]["id"]
    assert answer["executions"][0]["id"] == last


async def test_an_answer_that_is_cut_leaves_whole_what_others_are_shown(call: Caller, api: Api) -> None:
    for _ in range(100):
        await call("create_task", name="t", command="x" * 450)
    short = [await call("list_tasks", limit=100) for _ in range(2)]
    n = len(short[0]["tasks"])
    assert short[0] == short[1] and n < short[0]["total"] == 100
    assert short[0]["notes"] == [f"{100 - n} more: ask with skip={n}"]
    assert (await call("list_tasks", limit=100, skip=n))["tasks"][0]["id"] == short[0]["tasks"][-1]["id"] + 1
    assert len((await api.get("/tasks?limit=100"))["tasks"]) == 100


async def test_who_asks_for_it_hears_of_progress_while_a_task_runs(both: Server) -> None:
    heard: list[float] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        heard.append(progress)

    async with Client(both.mcp_url()) as client:
        task_id = both.bash("sleep 2.5")
        await client.call_tool("execute_task", {"task_id": task_id, "wait": 20}, progress_callback=hear)
        assert (await client.list_tools()).ttl_ms in (0, 3_600_000)
    assert heard == [1, 2]


async def post(mcp: Api, message: Json, path: str = "//mcp", **headers: str) -> tuple[int, Json, Mapping[str, str]]:
    """Status, the message in the answer (JSON or event stream) and the headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await mcp("POST", path, message, headers={**MCP_HEADERS, **named})
    text = answer.text.partition("data: ")[2] or answer.text
    return answer.status, json.loads(text) if text.startswith("{") else text, answer.headers


def rpc(method: str, number: int = 1, /, **params: Json) -> Json:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


async def test_http_speaks_every_version_with_and_without_a_handshake(mcp: Api) -> None:
    call = rpc("tools/call", 2, name="list_tasks", arguments={})
    for version in OLD_VERSIONS:
        hello = rpc("initialize", protocolVersion=version, capabilities={}, clientInfo={"name": "t", "version": "1"})
        status, answer, headers = await post(mcp, hello)
        assert (status, answer["result"]["protocolVersion"]) == (200, version)
        assert "mcp-session-id" not in headers and headers["x-content-type-options"] == "nosniff"
        initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert (await post(mcp, initialized, MCP_Protocol_Version=version))[0] == 202
        status, answer, _ = await post(mcp, call, MCP_Protocol_Version=version)
        assert (status, answer["id"], answer["result"]["isError"]) == (200, 2, False)
    call["params"]["_meta"], names = META, {"Mcp_Method": "tools/call", "Mcp_Name": "list_tasks"}
    status, answer, headers = await post(mcp, call, MCP_Protocol_Version=NEW_VERSION, **names)
    assert (status, answer["result"]["isError"]) == (200, False)
    assert headers["Content-Type"].startswith("application/json")


async def test_http_refuses_what_is_too_large_or_no_message(mcp: Api) -> None:
    for status, message in ((413, b"x" * (chronotask.MAX_BODY + 1)), (400, b"garbage"), (400, [rpc("ping")])):
        assert (await post(mcp, message))[0] == status
    assert (await post(mcp, rpc("ping"), Accept="text/html"))[0] == 406
    assert (await post(mcp, rpc("ping"), "//"))[0] == 404


def test_a_stream_is_open_at_once_and_a_client_that_leaves_ends_no_run(both: Server, tmp_path: Path) -> None:
    arguments = {"task_id": both.bash(f"sleep 1; echo on > {tmp_path}/on"), "wait": 50}
    connection = http.client.HTTPConnection("127.0.0.1", both.mcp_port(), timeout=30)
    connection.request("POST", "/mcp", json.dumps(rpc("tools/call", name="execute_task", arguments=arguments)), MCP_HEADERS)
    answer = connection.getresponse()
    assert answer.getheader("Content-Type") == "text/event-stream"
    assert not (tmp_path / "on").exists()
    until(both.has_child)
    connection.close()
    answer.close()
    until((tmp_path / "on").exists)


def test_clients_that_leave_at_any_moment_leave_no_trace_in_the_log_and_no_connection_open(new_server: NewServer) -> None:
    server, draw = new_server("both", stdin=subprocess.DEVNULL).start(), random.Random(5)
    assert first_tool(server) == "create_task"
    before = server.connections() if os.access(f"/proc/{server.process.pid}/fd", os.R_OK) else None
    body = json.dumps(rpc("tools/list")).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in {**MCP_HEADERS, "Content-Length": str(len(body))}.items())
    sent = f"POST /mcp HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode() + body
    for _ in range(500):
        with connected(server, sent, server.mcp_port()) as client:
            time.sleep(draw.choice((0, 0.001, 0.003)) * draw.random())
            if draw.random() < 0.3:
                client.recv(100)
    assert first_tool(server) == "create_task"
    if before is not None:
        until(lambda: server.connections() <= before + 1)
    assert server.stop(8) == 0
    assert re.findall(r"ERROR|Traceback", server.log()) == []


def test_both_goes_on_when_the_stdio_client_leaves_and_open_streams_do_not_hold_up_its_stop(new_server: NewServer) -> None:
    server = new_server("both").start()
    server.hello()
    assert server.call(1, "list_tasks")["isError"] is False
    server.stdin.close()
    until(lambda: "client on stdio has gone" in server.log())
    assert first_tool(server) == "create_task"
    streams = [http.client.HTTPConnection("127.0.0.1", server.mcp_port(), timeout=30) for _ in range(5)]
    for stream in streams:
        stream.request("GET", "/mcp", headers={"Accept": "text/event-stream"})
    answers = [stream.getresponse() for stream in streams]
    assert [answer.status for answer in answers] == [200] * 5
    assert_stops_in_time(server, 1)
    for one in (*answers, *streams):
        one.close()
    assert server.rest() == [] and "Traceback" not in server.log()


@pytest.mark.slow
def test_standard_streams_that_are_closed_or_odd_do_not_harm(tmp_path: Path) -> None:
    for closed in ("<&-", "<&- >&-", "<&- >&- 2>&-", "</dev/null"):
        done = ran(tmp_path, "bash", "-c", f"exec {sys.executable} {PROGRAM} --mode mcp {closed}")
        assert (done.returncode, done.stdout) == (0, ""), closed


def test_the_wire_is_kept_from_everything_else() -> None:
    program = f"""
import os, sys
sys.path.insert(0, {str(TOP)!r})
import chronotask
source, sink = chronotask.take_stdio()
print("a stray print", flush=True)
os.system("echo a child; cat")
assert not os.get_inheritable(source) and not os.get_inheritable(sink)
os.write(sink, b"wire:" + os.read(source, 100))
"""
    done = subprocess.run([sys.executable, "-c", program], input=b"hello", capture_output=True, timeout=60)
    assert done.stdout == b"wire:hello"
    assert done.stderr == b"a stray print\na child\n"


# ======================================================================================================================
# 15. Main
# ======================================================================================================================


def test_options_win_over_variables_and_variables_over_defaults() -> None:
    environ = {"CHRONOTASK_API_PORT": "9000", "CHRONOTASK_API_HOST": "0.0.0.0"}
    for argv, given, port, host in (
        ("", {}, 8000, "127.0.0.1"),
        ("", environ, 9000, "0.0.0.0"),
        ("--port 9001 --host ::1", environ, 9001, "::1"),
    ):
        options = chronotask.parse_command_line(argv.split())
        found = Settings.from_env(given, options.port, options.host)[0]
        assert (found.api_port, found.api_host) == (port, host), argv
    assert chronotask.parse_command_line([]).mode == "http"


# What ends the program, its variables first, and what the line that says so holds.
COMMAND_LINES = {
    "--mode x": ["--mode", "x", "http"],
    "--prot 1": ["--prot"],
    "--por 1": ["--por"],
    "serve": ["serve"],
    "--port eighty": ["--port", "eighty", "0 to 65535"],
    "--port ''": ["--port", "0 to 65535"],
    "--host 'a b'": ["--host", "a b", "host name or IP address"],
    "--backup x --apply y": ["--apply", "not allowed with argument --backup"],
    "--port": ["--port"],
    "CHRONOTASK_API_PORT='x\ny'": [r"chronotask: CHRONOTASK_API_PORT='x\ny': must be ", " 0 to 65535\n"],
    "CHRONOTASK_MCP_ENABLED=false --mode mcp": ["--mode=mcp: must be http or both while CHRONOTASK_MCP_ENABLED is false\n"],
}


@each("line", *COMMAND_LINES)
def test_a_bad_option_or_variable_ends_with_status_2_and_one_line(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(line)
    while words[:1] and words[0].startswith("CHRONOTASK_"):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    assert chronotask.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("chronotask: ")) == ("", 1, True)
    assert all(text in err for text in COMMAND_LINES[line])


@pytest.mark.slow
@pytest.mark.parametrize("python", [(), ("-I",), ("-X", "utf8")], ids=" ".join)
def test_a_script_takes_no_module_from_the_working_directory(tmp_path: Path, python: Sequence[str]) -> None:
    for name in ("argparse", "gc", "aiohttp", "chronotask"):
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(66)\n")
    done = ran(tmp_path, sys.executable, *python, PROGRAM, "--version")
    assert (done.returncode, done.stdout) == (0, f"ChronoTask {chronotask.__version__}\n"), done.stderr


@pytest.mark.slow
def test_what_a_shell_calls_ends_with_its_status_and_at_most_one_line(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "c.db").executescript("CREATE TABLE x (y);")
    ended = "os.kill(os.getpid(), int(os.environ['SIGNAL'])) or made(*a, **b)"  # while the copy is made
    ended = wrapped(tmp_path, after=f"made = chronotask.connect\nchronotask.connect = lambda *a, **b: {ended}")
    linked = f"mkdir real; cp {PROGRAM} {TOP}/dashboard.html real; ln -s real/chronotask.py link.py; $PYTHON link.py --backup x"
    for command, status, said in (
        (f"cd {TOP}; $PYTHON -m chronotask --port what", 2, "--port='what'"),
        (f"$PYTHON {PROGRAM} --bad <&- >&- 2>&-", 2, ""),
        (f"$PYTHON {PROGRAM} --host a..b", 2, "--host or CHRONOTASK_API_HOST='a..b': must be an address of this machine"),
        (f"CHRONOTASK_API_HOST=192.0.2.1 $PYTHON {PROGRAM}", 2, "CHRONOTASK_API_HOST='192.0.2.1': must be an address"),
        (f"unset CHRONOTASK_DATABASE_URL; {linked}", 1, f"there is no database {tmp_path}/real/data/chronotask.db\n"),
        (f"$PYTHON {PROGRAM} --backup - >&-", 2, "redirect the output to a file"),
        (f"$PYTHON {PROGRAM} --backup - >/dev/full", 1, "standard output cannot be written: No space left"),
        (f"CHRONOTASK_DATABASE_URL=sqlite:///no.db $PYTHON {PROGRAM} --export -; ls no.db 2>&1", 2, "no.db\n"),
        (f"mkfifo p; CHRONOTASK_DATABASE_URL=sqlite:///y.db $PYTHON {PROGRAM} --port 0 --config p", 2, "must be a regular file"),
        (f"CHRONOTASK_FOO=1 $PYTHON {PROGRAM} --export - 2>&- | head -n 1 | grep -vx {{", 1, ""),
        (f"SIGNAL=15 $PYTHON {ended} --backup copy; echo status $? >&2; ls -A | grep copy", 1, "status 143\n"),
        (f"SIGNAL=2 $PYTHON {ended} --backup copy; echo status $? >&2; ls -A | grep copy", 1, "status 130\n"),
        (f"echo @daily ü | CHRONOTASK_FOO= PYTHONIOENCODING=ascii $PYTHON {PROGRAM} --import-crontab -", 0, "variable 'CHRONOT"),
    ):
        done = ran(tmp_path, "sh", "-c", command, environ={"PYTHON": sys.executable, "CHRONOTASK_LOG_LEVEL": "ERROR"})
        assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (status, 1 if said else 0, True), done.stderr


def test_an_interrupt_during_the_start_leaves_no_trace(new_server: NewServer) -> None:
    """From the first imports on: before, Python reads and compiles the program, and no line of it has run."""
    for delay in (0, 0.05, 0.15, 0.3):
        server = new_server().start(ready=False)
        maps = Path(f"/proc/{server.process.pid}/maps")
        with contextlib.suppress(PermissionError):  # it has hidden itself from other processes: it is through with that
            until(lambda maps=maps: "_asyncio" in maps.read_text())
        time.sleep(delay)
        server.process.send_signal(signal.SIGINT)
        assert server.ended() in (0, 130, -signal.SIGINT)
        assert "Traceback" not in server.log()


@each("taken", "API_PORT", "MCP_PORT", "API_PORT MCP_PORT")
def test_a_port_that_is_taken_is_said_before_anything_runs(new_server: NewServer, taken: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        if " " in taken:  # by itself
            other.close()
        server = new_server("both", **dict.fromkeys(taken.split(), port)).start(ready=False)
        assert server.ended() == 1
        assert f"chronotask: cannot listen on 127.0.0.1 port {port}: " in server.log()
        assert "Traceback" not in server.log() and "leads" not in server.log()


@each("argv", "--version", "--version --mode mcp", "--help")
def test_version_tells_the_version_and_help_names_every_option(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        chronotask.main(argv.split())
    text, names = capsys.readouterr().out, set("--mode --host --port --backup --version --help".split())
    assert text == f"ChronoTask {chronotask.__version__}\n" or (argv == "--help" and set(re.findall("--[a-z]+", text)) >= names)


async def test_a_backup_that_fails_says_why_and_leaves_what_was_there(rig: Rig, tmp_path: Path) -> None:
    await rig.service.store.write(lambda db: db.executemany("INSERT INTO meta VALUES (?, 0)", [[n] for n in range(100_000)]))
    with pytest.raises(Unavailable, match=r"the backup of .* failed: interrupted"):
        backup(rig.path, tmp_path / "target", stopped=lambda: True)
    (tmp_path / "other.db").write_text("no database")
    (tmp_path / "target").write_text("before")
    other = settings(tmp_path, database_url=tmp_path / "other.db")
    for chosen, name in (*((rig.service.settings, bad) for bad in ("no/such/folder.db", "x" * 300, "\udcff")), (other, "target")):
        with pytest.raises(Unavailable, match=r"the backup of .* failed"):
            run_backup(chosen, f"{tmp_path}/{name}")
    with open("/proc/self/mem", "rb") as broken, pytest.raises(chronotask.StartupError, match="target cannot be written: Input"):
        chronotask.write_out(broken, tmp_path / "target")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"other.db": "no database", "target": "before"}


async def test_a_backup_replaces_a_file_and_never_the_database_or_what_belongs_to_it(rig: Rig, tmp_path: Path) -> None:
    other, own = sqlite3.connect(tmp_path / "other.db"), rig.service.settings
    for suffix in ("", "-wal", "-shm", "-journal", ".leader", ".service", ".drain-x"):
        target, link = Path(f"{rig.path}{suffix}"), tmp_path / f"link{suffix}"
        before = target.stat().st_ino if target.exists() else None
        link.symlink_to(target)
        for place in (target, link, rig.path.parent / "." / ".." / rig.path.parent.name / target.name):
            with pytest.raises(chronotask.StartupError, match=r"must be a file of its own, not one of the database") as caught:
                run_backup(own, str(place))
            assert caught.value.exit_status == 2
        assert (target.stat().st_ino if target.exists() else None) == before
    os.mkfifo(tmp_path / "pipe")
    other.executescript("PRAGMA journal_mode=WAL; CREATE TABLE x (y);")
    told = dict.fromkeys((tmp_path / "pipe", tmp_path, "/dev/null", ""), "must be a regular file, or a name that is free")
    for name, said in {**told, tmp_path / "other.db": "not a database that is in use"}.items():
        with pytest.raises(chronotask.StartupError, match=said):
            run_backup(own, str(name))
    other.close()
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "other.db", tmp_path / "loop", f"{rig.path}.bak"):
        run_backup(own, str(place))


def notified(path: str) -> list[str]:
    """What is sent to this socket by the protocol of sd_notify(3), as systemd hears it, while it comes."""
    listener, heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), list[str]()
    listener.bind(path)

    def listen() -> None:
        while heard[-1:] != ["STOPPING=1"]:
            heard.append(listener.recv(4096).decode())

    threading.Thread(target=listen, daemon=True).start()
    return heard


# --- Real processes ---------------------------------------------------------------------------------------------------


class Web(http.server.ThreadingHTTPServer):
    """A loopback server that keeps who asked and for what, and answers 200 with all it was sent. /limit asks the first twenty
    first attempts to wait 2 s, /gone is not there, /hang a minute, /late 0.1 s; /drip sends a byte a second, /endless on."""

    daemon_threads = True

    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.limited = threading.Semaphore(20)
        super().__init__(("127.0.0.1", 0), WebHandler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A killed client is nothing to tell."""


class WebHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Web)
        told = f"{self.path}\n{self.headers}\n".encode() + self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.told.append(told)
        time.sleep({"/hang": 60, "/late": 0.1}.get(self.path, 0))
        first = self.headers["X-ChronoTask-Attempt"] == "1"
        limited = self.path == "/limit" and first and self.server.limited.acquire(blocking=False)
        self.send_response(429 if limited else 404 if self.path == "/gone" else 200)
        if limited:
            self.send_header("Retry-After", "2")
        if self.path in ("/drip", "/endless"):
            piece, pause = (b"x", 1) if self.path == "/drip" else (b"x" * 65536, 0)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(30 if pause else 1_000_000):
                    self.wfile.write(piece)
                    time.sleep(pause)
        else:
            self.send_header("Content-Length", str(len(told)))
            self.send_header("X-Echo", self.headers.get("X-Api-Key", ""))
            self.end_headers()
            self.wfile.write(told)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def loopback() -> Iterator[Web]:
    server = Web()
    yield server
    server.shutdown()
    server.server_close()


def test_systemd_hears_that_it_is_ready_lives_and_stops_and_tasks_do_not_see_it(new_server: NewServer, tmp_path: Path) -> None:
    heard = notified(str(tmp_path / "notify"))
    server = new_server(environ={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}).start()
    until(lambda: len(heard) > 2)
    assert heard[:3] == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
    assert re.search(rf"is up, database {server.database}; this process leads", server.log())
    shown_env = server.execute(server.bash("env"), wait=10)["output_data"]["stdout"]
    assert "NOTIFY_SOCKET" not in shown_env and "WATCHDOG" not in shown_env
    server.database.rename(tmp_path / "moved.db")  # now /health is 503: systemd shall start it anew
    until(lambda: server.ask("GET", "/health")[0] == 503, 20, "it is not healthy")
    heard.clear()
    time.sleep(0.7)
    assert heard == []
    (tmp_path / "moved.db").rename(server.database)
    server.healthy_again()
    assert until(lambda: heard) == ["WATCHDOG=1"]
    assert server.stop() == 0
    until(lambda: heard[-1] == "STOPPING=1")


def test_systemd_is_told_through_an_abstract_socket_too_and_a_socket_that_is_gone_harms_nobody(tmp_path: Path) -> None:
    name = f"chronotask-test-{uuid.uuid4()}"
    heard = notified(f"\0{name}")
    chronotask.Systemd(f"@{name}", "1", "1").tell("STOPPING=1")
    assert until(lambda: heard) == ["STOPPING=1"]
    for gone in (str(tmp_path / "gone"), ""):
        chronotask.Systemd(gone, "", "").tell("READY=1")


async def test_the_page_for_operators_names_only_metrics_that_there_are(api: Api) -> None:
    text = (TOP / "docs" / "operating.md").read_text(encoding="utf-8")
    await api.task()
    metrics = (await api("GET", "//metrics")).text
    assert {name for name in re.findall(r"\bchronotask_(?!token)[a-z_]+", text) if name not in metrics} == set()
    assert len(re.findall(r"- alert: ", text)) == 3
    for option in ("Type=notify", "WatchdogSec=", "LoadCredential=", "User=", "ProtectSystem="):
        assert option in text


# --- Crashes, and a storm of alerts -----------------------------------------------------------------------------------


def test_every_seeded_bug_of_the_crash_harness_fits_the_code() -> None:
    bugs = runpy.run_path(str(TOP / ".ci" / "crash"))["SEEDED_BUGS"]
    assert [(bug, old) for bug, changes in bugs.items() for old, _ in changes if MODULE.count(old) != 1] == []


@pytest.mark.slow
@each("run", "--rounds 6", "--rounds 5 --bug all")
def test_nothing_is_lost_or_doubled_by_kill_9_at_random_moments_and_each_seeded_bug_is_caught(tmp_path: Path, run: str) -> None:
    """.ci/crash has the load, the promises and the bugs."""
    command = [sys.executable, str(TOP / ".ci" / "crash"), *run.split(), "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    accepted = [int(number) for number in re.findall(r"(\d+) answered with 202", done.stdout)]
    assert sum(accepted) > 10 * len(accepted)


def test_a_storm_of_failures_has_one_alert_each_and_makes_nothing_else_miss(new_server: NewServer, loopback: Web) -> None:
    """Whose server asks for a wait gets it."""
    server, count = new_server(MAX_CONCURRENT_RUNS=100, HISTORY_PER_TASK=0).start(), 1000 if LONG else 400
    failing = server.http(loopback.url("/gone"))
    alert = server.http(loopback.url("/limit"), "POST", max_retries=3)
    told = {"task_ids": [failing], "on": ["failure"]}
    server.create("schedule", task_id=alert, schedule_type="after", schedule_config=told)
    every = server.every(1, server.http(loopback.url("/")), overlap="allow")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        causes = list(pool.map(lambda _: server.execute(failing)["id"], range(count)))
    until(lambda: len(server.rows(f"&task_id={alert}&status=succeeded")) == count, 120)
    rows, slots = server.rows(f"&task_id={alert}"), server.rows(f"&schedule_id={every}")
    server.kill()
    assert sorted(row["cause"]["execution_id"] for row in rows) == sorted(causes)
    assert sorted(Counter(row["attempt"] for row in rows).items()) == [(1, count - 20), (2, 20)]
    assert all(row["duration"] >= 2 for row in rows if row["attempt"] == 2)
    assert len(slots) > 2 and {row["trigger"] for row in slots} == {"schedule"}
    assert {row["status"] for row in slots} <= {"succeeded", "running", "queued", "interrupted"}


# --- Several processes on one database --------------------------------------------------------------------------------

LONG = bool(os.environ.get("LONG_TESTS"))  # `LONG_TESTS=1 pytest -m slow`: the full durations and sizes
APPEND = 'echo "$CHRONOTASK_SCHEDULED_FOR $PPID" >>'  # the slot, and which service runs it


def appended(file: Path) -> list[list[str]]:
    """The lines that tasks have appended to a file, as words."""
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def repeated(items: Iterable[Any]) -> list[Any]:
    return [item for item, times in Counter(items).items() if times > 1]


def slots_of(server: Server, schedule: int) -> tuple[int, list[int]]:
    """When the schedule was made, and the slots that have a row, in order: microseconds since the epoch."""
    slots = sorted(at(row["scheduled_for"]) for row in server.rows(f"&schedule_id={schedule}"))
    return at(server.get(f"/schedules/{schedule}")["created_at"]), slots


def assert_each_second_has_one_row(made: int, slots: list[int]) -> None:
    assert slots == [made + k * S for k in range(1, len(slots) + 1)]


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another program holds the database's write lock."""
    with contextlib.closing(sqlite3.connect(database, timeout=10, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def assert_stops_in_time(server: Server, grace: float) -> None:
    start = time.monotonic()
    status = server.stop(20)
    took = time.monotonic() - start
    assert (status, took < grace + 2) == (0, True), (status, took, server.log()[-3000:])  # what the contract allows


@pytest.mark.slow
def test_the_leader_is_killed_again_and_again_and_every_slot_runs_once(tmp_path: Path) -> None:
    """Contract, section 8, with two services and one `mcp` process. Every third time both services die, and `mcp` leads."""
    database, once, again = tmp_path / "shared.db", tmp_path / "once.txt", tmp_path / "again.txt"
    pair = [Server(tmp_path / name, database=database).start() for name in ("one", "two")]
    third = Server(tmp_path / "three", "mcp", database=database).start(ready=False)
    most_once = pair[1].every(1, pair[1].bash(f"{APPEND} {once}", name="once"), overlap="allow", catchup="skip")
    at_least = pair[0].every(1, pair[0].bash(f"{APPEND} {again}", max_retries=3), overlap="allow", catchup="skip")
    end, kills, takeovers = time.monotonic() + (60 if LONG else 0), 0, list[float]()
    while kills < 3 or time.monotonic() < end:
        time.sleep(1.5)
        leader = until(lambda: next((server for server in pair if server.is_leader()), None), 5, "somebody leads")
        follower = pair[1 - pair.index(leader)]
        start = time.monotonic()
        leader.kill()
        if kills % 3 == 2:
            follower.kill()
            until(lambda: any(int(words[1]) == third.process.pid for words in appended(once)), 6, "mcp leads")
            pair[0].start()
        else:
            until(follower.is_leader, 5, "the other leads")
            takeovers.append(time.monotonic() - start)
        kills += 1
        for server in pair:
            if server.process.poll() is not None:
                server.start()
    time.sleep(1.5)
    asked = time.time_ns() // 1000
    for schedule in (most_once, at_least):
        made, slots = slots_of(pair[0], schedule)
        assert [slot for slot in range(made + S, asked - 5 * S, S) if slots.count(slot) != 1] == []
    rows = [pair[0].rows(f"&schedule_id={schedule}") for schedule in (most_once, at_least)]
    assert [row for row in rows[0] + rows[1] if row["status"] in ("missed", "skipped")] == []
    assert repeated(words[0] for words in appended(once)) == []
    ran_again = {words[0] for words in appended(again)}
    assert [row for row in rows[1] if row["status"] == "succeeded" and row["scheduled_for"] not in ran_again] == []
    assert {row["status"] for row in rows[1]} <= {"succeeded", "running", "queued", "retrying"}
    assert max(takeovers) < 4
    for server in [*pair, third]:
        assert server.stop() == 0


@pytest.mark.slow
def test_what_a_process_that_does_not_lead_is_asked_to_do_takes_effect_within_a_second(tmp_path: Path) -> None:
    database, file = tmp_path / "shared.db", tmp_path / "ran.txt"
    leader, other = (Server(tmp_path / name, database=database).start() for name in ("one", "two"))
    assert leader.is_leader() and not other.is_leader()
    quick, long = other.bash(f"date +%s.%N >> {file}"), other.bash("sleep 300", name="long-there")
    figures: dict[str, float] = {}

    def takes(what: str, effect: Callable[[], Any]) -> Any:
        start = time.monotonic()
        result = effect()
        figures[what] = time.monotonic() - start
        return result

    assert takes("execute and wait", lambda: other.execute(quick, wait=10))["status"] == "succeeded"
    run = other.running(long)
    assert takes("cancel", lambda: other.expect(200, "POST", f"/executions/{run}/cancel"))["status"] == "cancelled"
    run = other.execute(long)["id"]
    until(lambda: children_named("long-there"), 3, "it runs")
    takes("delete", lambda: other.expect(204, "DELETE", f"/tasks/{long}"))
    assert children_named("long-there") == []
    assert leader.ask("GET", f"/executions/{run}")[0] == 404

    soon = datetime.now(UTC) + timedelta(seconds=1)
    schedule = other.create("schedule", task_id=quick, schedule_type="once", schedule_config={"datetime": soon.isoformat()})
    until(lambda: other.rows(f"&schedule_id={schedule}&status=succeeded"), 5, "its slot ran")
    figures["slot behind its time"] = float(appended(file)[-1][0]) - soon.timestamp()
    other.expect(200, "POST", "/scheduler/pause")
    takes("pause", lambda: until(lambda: leader.get("/scheduler/status")["paused"], 3, "the leader is paused"))

    waiting: list[Json] = []
    slow = other.bash("sleep 1.2")
    client = threading.Thread(target=lambda: waiting.append(other.execute(slow, wait=20)))
    client.start()
    time.sleep(0.5)
    leader.kill()
    assert until(other.is_leader, 4, "the other takes over")
    client.join(20)
    assert waiting[0]["status"] == "interrupted"  # its wait went on through the change of leader
    assert max(figures.values()) < 3, figures  # 1 s is meant; a busy machine is given some more


@pytest.mark.slow
def test_an_mcp_process_yields_to_a_service_and_finishes_what_it_runs(tmp_path: Path) -> None:
    database, file, slow = tmp_path / "shared.db", tmp_path / "ran.txt", tmp_path / "slow.txt"
    service = Server(tmp_path / "service", database=database).start()
    schedule = service.every(1, service.bash(f"{APPEND} {file}"), overlap="allow", catchup="skip")
    long = service.bash(f'until [ -e {tmp_path}/go ]; do sleep 0.1; done; echo "$PPID" >> {slow}')
    left, doomed = (service.bash("sleep 60", name=name) for name in ("left-by-mcp", "deleted-by-the-leader"))
    assistant = Server(tmp_path / "assistant", "mcp", database=database).start()
    assistant.hello()

    def ran_by(server: Server) -> bool:
        return int(appended(file)[-1][1]) == server.process.pid

    until(lambda: appended(file), 4, "the schedule runs")
    assert ran_by(service)
    assert service.stop() == 0
    until(lambda: ran_by(assistant), 5, "mcp leads")
    asked = (assistant.call(n, "execute_task", task_id=n, wait=0)["structuredContent"]["id"] for n in (long, left, doomed))
    run, lost, _ = asked
    until(lambda: children_named("left-by-mcp") and children_named("deleted-by-the-leader"), 8, "all run")
    service.start()
    until(lambda: ran_by(service), 5, "the service leads")
    assert service.get(f"/executions/{run}")["status"] == "running"
    assert service.ask("DELETE", f"/tasks/{doomed}")[0] == 204
    until(lambda: not children_named("deleted-by-the-leader"), 4, "what another process runs is killed, too")
    (tmp_path / "go").touch()
    assert service.finished(run, 15)["status"] == "succeeded"
    assert appended(slow) == [[str(assistant.process.pid)]]
    assert service.get(f"/executions/{lost}")["status"] == "running"
    assistant.kill()  # what it was finishing is settled by the service
    assert service.finished(lost, 5)["status"] == "interrupted"
    assert children_named("left-by-mcp") == []
    assert repeated(words[0] for words in appended(file)) == []
    wrong = ("missed", "skipped", "interrupted")
    assert [row for row in service.rows(f"&schedule_id={schedule}") if row["status"] in wrong] == []


def test_requests_during_a_stop_get_503_or_no_connection_work_may_finish_and_a_second_signal_ends_at_once(server: Server) -> None:
    server.running(server.bash("sleep 1.5"))
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with contextlib.suppress(ConnectionRefusedError, http.client.RemoteDisconnected):
        assert server.ask("POST", "/tasks/1/execute")[0] == 503
    assert server.ended(8) == 0
    server.start()
    assert [row["status"] for row in server.rows()] == ["succeeded"]
    server.execute(server.bash("sleep 300", name="second-signal"))
    until(lambda: children_named("second-signal"), 5, "it runs")
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert server.process.poll() is None
    start = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.ended(5) != 0
    assert time.monotonic() - start < 1
    server.start()  # its left-over child is found and ended
    until(lambda: not children_named("second-signal"), 5, "no child is left")
    assert [row["status"] for row in server.rows()] == ["interrupted", "succeeded"]


def test_a_killed_services_processes_are_ended_before_the_retry(server: Server, tmp_path: Path) -> None:
    """Both the child and what left its group by setsid: known by the attempt's CHRONOTASK_RUN_ID."""
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    command = f"""if [ "$CHRONOTASK_ATTEMPT" = 1 ]; then
        setsid sleep 300 & echo "$$ $!" > {first}.part; mv {first}.part {first}; trap '' TERM; sleep 300; sleep 300
    else for pid in $(cat {first}); do
        [ "$(tr -d '\\0' < /proc/$pid/cmdline)" ] && echo alive || echo gone
    done > {second}; fi"""
    run = server.execute(server.bash(command, max_retries=1))["id"]
    until(first.exists, 5, "the first attempt runs")
    server.kill()
    assert all(Path(f"/proc/{pid}").exists() for pid in first.read_text().split())
    server.start()
    execution = server.finished(run)
    assert (execution["status"], execution["attempt"]) == ("succeeded", 2)
    assert [attempt["status"] for attempt in execution["attempts"]] == ["interrupted", "succeeded"]
    assert second.read_text().split() == ["gone", "gone"]


# --- Time -------------------------------------------------------------------------------------------------------------


class Stepped(Server):
    """A service with a wall clock of its own, which `step` sets. (Its tasks have it too, and cannot sleep: a libfaketime bug.)"""

    def __init__(self, folder: Path, offset: int = 0) -> None:
        library = next((str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
        if library is None:
            pytest.skip("needs libfaketime (Debian: apt-get install faketime)")
        self._offset_file = folder / "offset"
        fake = {"LD_PRELOAD": library, "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        fake["FAKETIME_FORCE_MONOTONIC_FIX"] = "0"  # which would make whoever waits for the interpreter's lock spin, for seconds
        super().__init__(folder, environ={**fake, "FAKETIME_TIMESTAMP_FILE": str(self._offset_file)})
        self.step(offset)

    def step(self, offset: int) -> None:
        """Sets the wall clock to the real time and `offset` seconds."""
        part = self._offset_file.with_suffix(".part")
        part.write_text(f"{offset:+d}\n")
        part.rename(self._offset_file)
        self.offset = offset


@pytest.mark.slow
def test_clock_steps_of_hours_make_no_burst_and_run_no_slot_twice(tmp_path: Path) -> None:
    server, file = Stepped(tmp_path).start(), tmp_path / "ran.txt"
    schedule = server.every(1, server.bash(f"{APPEND} {file}"), overlap="allow")

    def goes_on(more: int = 0) -> None:
        """Slots run again: of now, but for at most `more`, and two that were on their way."""
        before, start = len(appended(file)), time.time() + server.offset
        until(lambda: len(appended(file)) > before, 10, "the next slot runs")
        time.sleep(1.5)
        slots = [datetime.fromisoformat(words[0]).timestamp() for words in appended(file)[before:]]
        assert len([slot for slot in slots if not start - 1.5 <= slot <= time.time() + server.offset]) <= more + 2

    goes_on()
    first = time.time()
    server.step(5 * 3600)
    goes_on(more=6)  # the newest missed slot, and those of the last 5 seconds
    rows = server.rows(f"&schedule_id={schedule}")
    assert Counter(row["status"] for row in rows)["missed"] == 1
    assert Counter(row["trigger"] for row in rows)["catchup"] == 1
    assert "1000 or more" in next(row for row in rows if row["status"] == "missed")["error_message"]

    used = server.cpu()
    for hours in (4, 3):
        server.step(hours * 3600)
        goes_on()  # set back by less than 3 h: not at fixed times, so from now on
    assert server.cpu() - used < 6, "and no busy loop"
    server.step(5 * 3600)
    goes_on(more=6)

    server.step(round(first - time.time()) - 1)  # back by more than 3 h, into a time whose first slots have run
    goes_on()  # a correction: slots are taken from now on
    assert repeated(words[0] for words in appended(file)) == []
    assert server.ask("POST", "/scheduler/pause")[0] == 200
    idle = {"queued": 0, "running": 0, "retrying": 0}
    until(lambda: server.get("/scheduler/status")["executions"] == idle, 10, "the last slot ended")
    assert server.ask("GET", "/health")[0] == 200
    assert server.stop() == 0


@pytest.mark.slow
def test_a_clock_that_is_wrong_for_two_seconds_runs_nothing_that_was_dealt_with_and_loses_nothing_to_come(tmp_path: Path) -> None:
    server, file = Stepped(tmp_path).start(), tmp_path / "ran.txt"
    task = server.bash(f'echo "$CHRONOTASK_SCHEDULED_FOR" >> {file}')

    def a_schedule(schedule_type: str, **config: Any) -> None:
        server.create("schedule", task_id=task, schedule_type=schedule_type, schedule_config=config, overlap="allow")

    def wrong_for_two_seconds(offset: int) -> None:
        server.step(offset)
        time.sleep(2)
        server.step(0)
        time.sleep(1)

    passed = datetime.fromtimestamp(time.time() - 5400, UTC)
    a_schedule("cron", expression=f"{passed.minute} {passed.hour} * * *")
    wrong_for_two_seconds(-4 * 3600)
    assert (server.rows(), appended(file)) == ([], []), "its time had passed when it was made"
    soon = datetime.fromtimestamp(int(time.time()) + 15, UTC)
    text = soon.isoformat().replace("+00:00", "Z")
    a_schedule("once", datetime=text)
    a_schedule("cron", expression=f"{soon.second} {soon.minute} {soon.hour} * * *")
    wrong_for_two_seconds(365 * 24 * 3600)
    until(lambda: [server.get(f"/schedules/{n}")["next_run"] for n in (2, 3)] == [text, text], 10, "they wait for it again")
    until(lambda: appended(file).count([text]) == 2, 30, "both ran at their time")
    assert server.get("/tasks/1")["last_run"][:19] >= text[:19]
    assert max(Counter(words[0] for words in appended(file) if words != [text]).values()) == 1
    assert server.stop() == 0


@pytest.mark.slow
def test_a_retry_does_not_wait_for_hours_because_the_clock_was_set_back(tmp_path: Path) -> None:
    server = Stepped(tmp_path, offset=2 * 3600).start()
    run = server.execute(server.bash('[ "$CHRONOTASK_ATTEMPT" -gt 1 ]', max_retries=3, retry_delay=3))["id"]
    until(lambda: server.get(f"/executions/{run}")["status"] == "retrying", 5, "it waits for its retry")
    server.step(0)
    ended = server.finished(run)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 2)


@pytest.mark.slow
def test_the_clock_reaches_a_gap_and_the_fixed_job_of_that_night_runs_once_right_after_it(tmp_path: Path) -> None:
    file = tmp_path / "ran.txt"
    eve = datetime(2025, 3, 30, 0, 0, 0, tzinfo=UTC)  # 01:00 in Berlin, where 02:00 becomes 03:00
    server = Stepped(tmp_path, round(eve.timestamp() - time.time())).start()
    config = {"expression": "30 2 * * *", "timezone": "Europe/Berlin"}
    server.create("schedule", task_id=server.bash(f"{APPEND} {file}"), schedule_type="cron", schedule_config=config)
    assert server.get("/schedules/1")["next_run"] == "2025-03-30T01:00:00Z"
    server.step(round(eve.timestamp() + 3597 - time.time()))
    until(lambda: appended(file), 12, "it ran")
    assert [words[0] for words in appended(file)] == ["2025-03-30T01:00:00Z"]
    assert server.get("/schedules/1")["next_run"] == "2025-03-31T00:30:00Z"


def test_a_suspended_process_catches_up_by_the_rule(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "ran.txt"
    schedule = server.every(1, server.bash(f"{APPEND} {file}"), overlap="allow")
    time.sleep(1.2)
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(30 if LONG else 7)
    before = len(appended(file))
    server.process.send_signal(signal.SIGCONT)
    time.sleep(1.5)
    burst = len(appended(file)) - before
    rows = server.rows(f"&schedule_id={schedule}")
    [missed] = [row for row in rows if row["status"] == "missed"]
    count = int(re.findall(r"missed: (\d+) slot", missed["error_message"])[0])
    made, slots = slots_of(server, schedule)
    at = slots.index(chronotask.parse_instant(missed["scheduled_for"], "UTC"))
    slots[at : at + 1] = [slots[at] + k * S for k in range(count)]
    assert_each_second_has_one_row(made, slots)
    assert Counter((row["trigger"], row["status"]) for row in rows)["catchup", "succeeded"] == 1
    assert 5 <= burst <= 9, "one catch-up, and the slots of the last 5 seconds, which count as on time"
    assert repeated(words[0] for words in appended(file)) == []


# --- Storage faults, and a stop under load ----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs root to mount a small tmpfs: {made.stderr.strip()}")
    yield folder
    kill_all()
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as ballast:
        while True:
            ballast.write(b"\0" * 4096)


def assert_unhealthy(server: Server, reason: str) -> None:
    status, health = server.ask("GET", "/health")
    assert status == 503 and reason in health["reason"]


def test_a_full_disk_is_told_reads_work_and_nothing_accepted_is_lost(new_server: NewServer, small_disk: Path) -> None:
    server = new_server(database=small_disk / "chronotask.db").start()
    every = server.every(1, server.bash("true"), overlap="allow", catchup="all")
    accepted, refusal = [server.bash("true") for _ in range(20)], ""
    fill(small_disk / "ballast")
    while not refusal:
        assert len(accepted) < 3000
        status, answer = server.ask("POST", "/tasks", {**BASH, "description": "x" * 1000})
        if status == 201:
            accepted.append(answer["id"])
        else:
            refusal = f"{status} {answer['detail']}"
    assert refusal.startswith("503 ") and "full" in refusal
    assert_unhealthy(server, "full")
    assert server.get("/tasks")["total"] == len(accepted) + 1
    status, answer = server.ask("DELETE", f"/tasks/{accepted[0]}")
    assert status == 204 or (status == 503 and "full" in answer["detail"])
    accepted = accepted[1:] if status == 204 else accepted
    size = len(server.log())
    time.sleep(1.5)
    assert len(server.log()) - size < 1500, server.log()[-3000:]
    (small_disk / "ballast").unlink()
    server.healthy_again()
    assert server.execute(server.bash("echo again"), wait=10)["status"] == "succeeded"
    time.sleep(1)
    assert [task for task in accepted if server.ask("GET", f"/tasks/{task}")[0] != 200] == []
    assert_each_second_has_one_row(*slots_of(server, every))
    assert {row["status"] for row in server.rows(f"&schedule_id={every}")} <= {"succeeded", "running"}
    assert server.stop() == 0
    assert server.sql("PRAGMA integrity_check") == [("ok",)]


def test_a_database_that_another_program_has_locked_is_told_and_waited_for_but_not_by_a_stop(new_server: NewServer) -> None:
    server = new_server(SHUTDOWN_GRACE=1).start()
    task = server.bash("true")
    schedule = server.every(1, task, overlap="allow", catchup="all")
    with locked(server.database):
        assert "locked" in server.expect(503, "POST", f"/tasks/{task}/execute")["detail"]
        assert_unhealthy(server, "locked")
        assert server.get("/tasks")["total"] == 1  # reads go on
    server.healthy_again(8)
    assert server.execute(task, wait=10)["status"] == "succeeded"
    assert_each_second_has_one_row(*slots_of(server, schedule))
    server.expect(200, "POST", "/scheduler/pause")
    run = server.running(server.bash("sleep 60", name="locked"))
    with locked(server.database):
        assert_stops_in_time(server, 1)
    server.start()
    assert server.get(f"/executions/{run}")["status"] == "interrupted"


def test_a_stop_with_a_full_disk_is_in_time_and_the_next_start_settles_the_rest(new_server: NewServer, small_disk: Path) -> None:
    server = new_server(database=small_disk / "chronotask.db", SHUTDOWN_GRACE=1).start()
    run = server.running(server.bash("sleep 60", name="full-disk"))
    fill(small_disk / "ballast")
    until(lambda: server.ask("POST", "/tasks/1/execute")[0] == 503, 20, "the disk is full")
    assert_stops_in_time(server, 1)
    assert children_named("full-disk") == []
    server.start()  # reads work, so it serves them, and leads as soon as it can
    assert_unhealthy(server, "full")
    assert server.get(f"/executions/{run}")["status"] == "running"
    (small_disk / "ballast").unlink()
    server.healthy_again()
    assert server.get(f"/executions/{run}")["status"] == "interrupted"


def refusal_to_start(server: Server) -> str:
    """What it prints when it does not start: one line, status 1."""
    status, text = server.start(ready=False).ended(15), server.log()
    assert status == 1, text
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


def test_a_clean_stop_leaves_one_file_and_a_damaged_one_stops_the_start_and_stays_as_is(server: Server, tmp_path: Path) -> None:
    for number in range(60):
        server.bash("true", name=f"task {number}", description="x" * 500)
    assert server.stop() == 0
    assert not Path(f"{server.database}-wal").exists()
    assert server.sql("SELECT count(*) FROM tasks") == [(60,)]
    [(root,)] = server.sql("SELECT rootpage FROM sqlite_master WHERE name = 'tasks'")
    with server.database.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xa5" * 4096)
    # SQLite may always make its index of the log anew
    before = {file: file.read_bytes() for file in tmp_path.glob("chronotask.db*") if "-shm" not in file.name}
    text = refusal_to_start(server)
    assert all(word in text for word in ("damaged", "left as it", "backup")), text
    assert {file: file.read_bytes() for file in before} == before


def test_a_read_only_file_system_stops_the_start_with_advice(new_server: NewServer, small_disk: Path) -> None:
    server = new_server(database=small_disk / "chronotask.db").start()
    assert server.stop() == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    text = refusal_to_start(server)
    assert "chronotask.db" in text and ("writable" in text or "read-only" in text.lower()), text


def test_a_stop_under_load_ends_in_time_with_all_rows_settled_and_no_child_left(new_server: NewServer, loopback: Web) -> None:
    server = new_server(SHUTDOWN_GRACE=1, MAX_CONCURRENT_RUNS=30).start()
    stubborn = "trap '' TERM; setsid sleep 300 & while true; do sleep 1; done"
    final = server.bash(stubborn, name="stubborn")
    retried = server.bash(stubborn, name="stubborn", max_retries=2)
    hanging = server.http(loopback.url("/hang"), "POST", max_retries=1, retry_delay=5)
    quick = server.bash("sleep 0.5")
    server.every(1, server.bash("true"), overlap="allow")
    heads = (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"POST /api/v1/tasks HTTP/1.1\r\n")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        asked = [
            pool.submit(server.ask, "POST", f"/tasks/{task}/execute?wait=60", None, 70) for task in (final, retried, hanging) * 4
        ]
        idle = [connected(server, heads[number % 3]) for number in range(50)]
        until(lambda: server.get("/scheduler/status")["executions"]["running"] >= 12, 10, "all of it runs")
        until(lambda: len(children_named("stubborn")) >= 16, 5, "the processes run")
        queued = [server.execute(final)["id"] for _ in range(40)] + [server.execute(quick)["id"]]
        assert_stops_in_time(server, 1)
        assert children_named("stubborn") == []
        assert Counter(answer.result(2)[0] for answer in asked) == {202: 12}
    for connection in idle:
        connection.close()
    assert not Path(f"{server.database}-wal").exists()
    found = dict(server.sql("SELECT task_id || ' ' || status, count(*) FROM executions GROUP BY 1"))
    assert found.get(f"{final} interrupted", 0) >= 4 and f"{final} running" not in found
    assert found.get(f"{retried} retrying") == 4 and found.get(f"{hanging} retrying") == 4, found
    assert server.sql("SELECT count(*) FROM executions WHERE status = 'running'") == [(0,)]
    assert server.sql(f"SELECT count(*) FROM executions WHERE id IN ({','.join(map(str, queued))})") == [(41,)]


# --- Backup, retention and the log ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_backup_made_while_the_service_writes_holds_all_that_was_accepted_before_and_can_be_restored(tmp_path: Path) -> None:
    server = Server(tmp_path / "live", API_TOKEN="a-token-for-backups").start()
    over, accepted, task = threading.Event(), list[int](), server.bash("true")

    def client() -> None:
        while not over.is_set():
            accepted.append(server.execute(task)["id"])

    def backed_up_to(target: object) -> bytes:
        return subprocess.check_output([sys.executable, PROGRAM, "--backup", str(target)], env=server.environ, timeout=60)

    writer = threading.Thread(target=client)
    writer.start()
    time.sleep(0.5)
    try:
        for kind in ("file", "stdout", "api"):
            restored, before = Server(tmp_path / kind), list(accepted)
            if kind == "file":
                assert backed_up_to(restored.database) == b"" and restored.database.stat().st_mode == stat.S_IFREG | 0o600
                assert [*restored.folder.iterdir()] == [restored.database]
            else:
                restored.database.write_bytes(server.get("/backup") if kind == "api" else backed_up_to("-"))
            assert restored.sql("PRAGMA integrity_check") == [("ok",)]
            assert before and set(before) - {row[0] for row in restored.sql("SELECT id FROM executions")} == set()
            assert restored.sql("SELECT history_count = (SELECT count(*) FROM executions) FROM tasks") == [(1,)], "consistent"
    finally:
        over.set()
        writer.join()
        server.stop()
    restored.start()
    until(lambda: not sum(restored.get("/scheduler/status")["executions"].values()), 30, "what was waiting is run")
    assert {row["status"] for row in restored.rows()} <= FINAL
    assert list(tmp_path.glob("live/.*")) == []  # nothing half-made is left


def test_old_history_is_deleted_in_the_background_and_writes_go_on(server: Server) -> None:
    task = server.bash("true")
    server.stop()
    count, now = 200_000 if LONG else 60_000, time.time_ns() // 1000
    names = "task_id, trigger, status, queued_at, started_at, finished_at, attempt, uuid, output_data"
    values = "?1, 'manual', 'succeeded', ?2 + value, ?2 + value, ?2 + value, 1, hex(randomblob(16)), printf('%300c', 'x')"
    numbers = "(WITH RECURSIVE n(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE value < ?3) SELECT value FROM n)"
    server.sql(f"INSERT INTO executions ({names}) SELECT {values} FROM {numbers}", task, now - 40 * DAY, count)
    names = "task_id, trigger, status, queued_at, uuid, hold"
    [(held,)] = server.sql(f"INSERT INTO executions ({names}) VALUES (?, 'manual', 'queued', ?, 'u', 4) RETURNING id", task, now)
    size = server.database.stat().st_size
    server.start()
    left, end = count, time.monotonic() + 90
    while left and time.monotonic() < end:
        for number in range(20):
            server.expect(200, "PATCH", f"/tasks/{task}", {"description": f"{left} {number}"})
            time.sleep(0.005)
        left = server.sql("SELECT count(*) FROM executions WHERE finished_at < ?", now - DAY)[0][0]
    assert left == 0
    assert server.get(f"/executions/{held}")["status"] == "queued"
    until(lambda: server.database.stat().st_size < size / 2 or not server.sql("PRAGMA wal_checkpoint"), 15, "space is given back")
    assert server.stop() == 0
    assert server.database.stat().st_size < size / 2


@pytest.fixture
def drain_log() -> Iterator[Callable[[], None]]:
    """Brings the log to its file at once. After the test logging is as before."""
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    level, standard = root.level, (sys.stdout, sys.stderr)

    def drain() -> None:
        for handler in set(root.handlers) - set(before):
            if isinstance(handler, logging.StreamHandler) and isinstance(handler.stream, chronotask.LogStream):
                handler.stream.drain()

    yield drain
    sys.stdout, sys.stderr = standard
    for handler in set(root.handlers) - set(before):
        handler.close()
    root.handlers[:], root.level = before, level


def test_a_message_with_line_breaks_or_escapes_is_one_line_in_the_log(tmp_path: Path, drain_log: Any) -> None:
    chronotask.set_up_logging(settings(tmp_path, log_file=tmp_path / "log.txt"))
    logger = logging.getLogger("chronotask")
    logger.warning("told: %s", "a\n2026-01-01 00:00:00,000 ERROR forged\r\x1b[2J\u2028\x85b\u202ec\td")
    try:
        raise ValueError("x\n2026-01-01 00:00:00,000 ERROR forged\r\x1b[2J")
    except ValueError:
        logger.exception("in %s", "a\nb")
    drain_log()
    lines = (tmp_path / "log.txt").read_text().split("\n")
    assert lines[0].endswith(r"WARNING told: a\n2026-01-01 00:00:00,000 ERROR forged\r\x1b[2J\u2028\x85b\u202ec" + "\td")
    assert lines[1].endswith(r"ERROR in a\nb")
    assert all(line.startswith("    ") for line in lines[2:-1]) and any("forged" in line for line in lines[2:])
    assert "\x1b" not in "".join(lines) and "\r" not in "".join(lines)


@pytest.mark.usefixtures("drain_log")
def test_a_log_that_nobody_reads_holds_up_nobody_and_says_later_how_much_was_lost(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.txt")
    chronotask.set_up_logging(settings(tmp_path, log_file=tmp_path / "log.txt"))
    logger, line = logging.getLogger("chronotask"), "x" * 1000
    for _ in range(2000):
        logger.warning(line)  # 2 MB: more than a pipe and the buffer hold
    reader = os.open(tmp_path / "log.txt", os.O_RDONLY)
    got = b""
    while not got.endswith(b"nobody took them\n"):
        got += os.read(reader, 65536)
    os.close(reader)
    *lines, note = got.decode().splitlines()
    assert all(text.endswith(f"WARNING {line}") for text in lines)
    assert note.endswith(f"WARNING {2000 - len(lines)} lines of the log were lost here: nobody took them")
    assert 1000 < len(lines) < 1100


def test_a_log_file_that_was_moved_is_opened_anew_a_bad_one_is_said_and_prints_never_wait(tmp_path: Path, drain_log: Any) -> None:
    with pytest.raises(chronotask.StartupError, match=r"CHRONOTASK_LOG_FILE=.*: cannot be written: Is a directory"):
        chronotask.set_up_logging(settings(tmp_path, log_file=tmp_path))
    chronotask.set_up_logging(settings(tmp_path, log_file=tmp_path / "a" / "log.txt"))
    for i, moved in enumerate(("one.txt", "two.txt")):
        logging.getLogger("chronotask").warning("%d", i)
        drain_log()
        (tmp_path / "a" / "log.txt").rename(tmp_path / moved)
    shutil.rmtree(tmp_path / "a")
    logging.getLogger("chronotask").warning("2")
    drain_log()
    assert [(tmp_path / name).read_text()[-2:] for name in ("one.txt", "two.txt", "a/log.txt")] == ["0\n", "1\n", "2\n"]
    print("x" * 5_000_000, file=sys.stderr)  # warnings and tracebacks of threads take this way
    assert isinstance(sys.stderr, chronotask.LogStream) and sys.stdout is sys.stderr


# --- Hostile clients and tasks ----------------------------------------------------------------------------------------


def test_hostile_tasks_hold_up_neither_health_nor_others_and_memory_stays_bounded(server: Server, loopback: Web) -> None:
    size = 1_000_000_000 if LONG else 100_000_000
    base, quick, over = server.memory(), server.bash("true", name="quick"), threading.Event()
    waits, most, errors = {"/health": 0.0, "start": 0.0}, 0, list[str]()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.05):
            try:
                start = time.monotonic()
                status, answer = server.ask("GET", "/health", timeout=15)
                waits["/health"] = max(waits["/health"], time.monotonic() - start)
                assert status == 200, answer
                execution = server.execute(quick, wait=15)
                assert execution["status"] == "succeeded", execution
                waits["start"] = max(waits["start"], (at(execution["started_at"]) - at(execution["queued_at"])) / S)
                most = max(most, server.memory())
            except (OSError, http.client.HTTPException, AssertionError) as error:
                errors.append(repr(error))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    hostile = partial(server.bash, name="hostile")
    tasks = {
        "much output": hostile(f"head -c {size} /dev/zero | tr '\\0' x"),
        "endless output": hostile("yes", 3),
        "no newline": hostile("cat /dev/zero", 3),
        "both streams": hostile("yes >&2 & yes", 3),
        "children": hostile("for i in $(seq 300); do sleep 60 & done; wait", 4),
        "ignores TERM": hostile("trap '' TERM; while true; do sleep 1; done", 1),
        "daemons": hostile("setsid sleep 300 & (setsid bash -c 'trap \"\" TERM; sleep 300' &) ; sleep 60", 1),
        "drip": server.http(loopback.url("/drip"), timeout=3),
        "endless body": server.http(loopback.url("/endless"), timeout=3),
    }
    runs = {name: server.execute(task)["id"] for name, task in tasks.items()}
    ends = {name: server.finished(run, 90) for name, run in runs.items()}
    over.set()
    watcher.join(20)
    statuses = {name: end["status"] for name, end in ends.items()}
    assert statuses.pop("much output") == "succeeded"
    assert statuses.pop("endless body") in ("timed_out", "succeeded")  # a gigabyte of it may come before the timeout
    assert set(statuses.values()) == {"timed_out"}
    assert ends["much output"]["output_data"]["stdout_bytes"] == size
    assert all(len(end["output_data"]["stdout"]) < 70_000 for end in ends.values() if "stdout" in end["output_data"])
    assert errors == [] and children_named("hostile") == []
    assert max(waits.values()) < 2 and most < base + 100 * 2**20, (waits, most)


async def test_a_task_that_deletes_itself_while_it_runs_is_gone_with_its_process(api: Api) -> None:
    command = f"""exec 3<>/dev/tcp/127.0.0.1/{api.client.port}
        printf 'DELETE /api/v1/tasks/%s HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n' "$CHRONOTASK_TASK_ID" >&3; sleep 60"""
    await api.schedule(await api.task(config={"command": command}, name="suicidal"))
    problem_of(await api("POST", "/tasks/1/execute?wait=10"), 404)
    until(lambda: not children_named("suicidal"), 4, "its process is gone")
    for table in ("tasks", "schedules", "executions"):
        assert (await api.get(f"/{table}"))[table] == []


def connected(server: Server, data: bytes = b"", port: int = 0) -> socket.socket:
    """A connection to a server, over which `data` has gone as far as it would take it."""
    client = socket.create_connection(("127.0.0.1", port or server.port), timeout=20)
    with contextlib.suppress(OSError):
        client.sendall(data)
    return client


def everything_from(client: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(OSError):
        while piece := client.recv(65536):
            got += piece
    client.close()
    return got


EVENTS = f"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {GOOD_TOKEN}\r\n\r\n".encode()


# stderr is a pipe that is full and that nobody reads.
UNREAD_STDERR = """
unread, full = os.pipe()
os.set_blocking(full, False)
try:
    while True:
        os.write(full, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(full, True)
os.dup2(full, 2)
"""


@each("log", "an unread stderr", "a FIFO without a reader")
@each("mode", "http", "both", "mcp")
def test_a_process_whose_log_nobody_reads_works_and_stops_or_ends_with_its_mcp_client(
    new_server: NewServer, tmp_path: Path, log: str, mode: str
) -> None:
    if log == "an unread stderr":
        server = new_server(mode, before=UNREAD_STDERR, LOG_FILE=tmp_path / "log.txt")
        server.log_file = tmp_path / "log.txt"
    else:
        os.mkfifo(tmp_path / "fifo")
        server = new_server(mode, LOG_FILE=tmp_path / "fifo")
    if mode == "mcp":
        server.start().stdin.close()
        assert server.ended(30) == 0 and "the MCP client on stdio has gone" in server.log()
        return
    task = server.start().bash("false")
    server.every(1, task)
    for _ in range(30):
        assert server.execute(task, wait=10)["status"] == "failed"
    until(lambda: server.rows("&trigger=schedule&status=failed"), 5, "a schedule fires")
    assert server.ask("GET", "/health", timeout=5)[0] == 200
    assert_stops_in_time(server, 6)


@each("mode", "http", "mcp")
def test_a_closed_terminal_stops_the_service_cleanly_like_any_signal(new_server: NewServer, tmp_path: Path, mode: str) -> None:
    server = new_server(mode=mode)
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGINT, signal.SIGTERM):
        server.start()
        if mode == "http":  # something to wait for
            server.execute(server.bash("sleep 0.5"))
        server.process.send_signal(number)
        until(lambda: "stopping: " in server.log())
        server.process.send_signal(signal.SIGHUP)  # as the shell of that terminal does, too
        assert (server.ended(30), [*tmp_path.glob("*.db-wal")]) == (0, [])
        assert mode == "http" or server.rest() == []


def test_a_hangup_is_ignored_where_it_was_ignored_at_the_start(new_server: NewServer) -> None:
    server = new_server(before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does").start()
    server.process.send_signal(signal.SIGHUP)
    assert server.execute(server.bash("true"), wait=10)["status"] == "succeeded"
    assert server.stop() == 0


def test_clients_that_take_nothing_of_any_answer_are_dropped(new_server: NewServer) -> None:
    server = new_server(mode="both", after="chronotask.SLOW_READER = 1.0", API_TOKEN=GOOD_TOKEN).start()
    common = b"Host: localhost\r\nAuthorization: Bearer %s\r\n" % GOOD_TOKEN.encode()
    listing = b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}'
    mcp = b"POST /mcp HTTP/1.1\r\n%sAccept: application/json, text/event-stream\r\n" % common
    mcp += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(listing), listing)
    requests = [b"GET %s HTTP/1.1\r\n%s\r\n" % (path, common) for path in (b"/docs", b"/openapi.json", b"/nothing")]
    ports = (server.port, server.port, server.port, server.mcp_port())
    before = server.connections()
    clients = []
    for request, port in zip((*requests, mcp), ports, strict=True):
        for _ in range(10):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.setblocking(False)
            clients.append((client, request * 500))
    end = time.monotonic() + 30
    while server.connections() > before:
        for client, data in clients:
            with contextlib.suppress(OSError):
                client.send(data)
        assert time.monotonic() < end, f"{server.connections() - before} of 40 are still there"
        time.sleep(0.1)
    until(lambda: server.ask("GET", "/health")[0] == 200, 20, "it is healthy")
    assert server.log().count("\n") < 10, "nothing that the log has to tell"


def test_no_answer_tells_the_versions_of_what_it_is_made_with(both: Server) -> None:
    requests = {
        b"GET / HTTP/1.1\r\nHost: localhost\r\n": 200,
        b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n": 404,
        b"GET / HTTP/1.1\r\nHost: elsewhere\r\n": 403,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: tea\r\n": 417,
        b"DELETE / HTTP/1.1\r\nHost: localhost\r\n": 405,
        b"GET /mcp HTTP/1.1\r\nHost: localhost\r\n": 406,
        b"HZ / HTTP/9.9\r\nHost: localhost\r\n": 400,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n" % (b"a" * 9000): 400,
    }
    for request, status in requests.items():
        port = both.mcp_port() if b"/mcp" in request else both.port
        answer = everything_from(connected(both, request + b"Connection: close\r\n\r\n", port))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert statuses_in(answer) == [status], answer
        assert re.findall(rb"(?im)^server: (.*?)\r?$", head) == [b"ChronoTask"] and b"aiohttp" not in answer
        assert status != 400 or json.loads(body)["title"] == "Malformed request"


def test_2000_idle_connections_to_a_service_with_1024_descriptors_keep_nobody_out(new_server: NewServer) -> None:
    server = new_server(before="resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))", API_TOKEN=GOOD_TOKEN).start()
    task, before = server.bash("echo on"), server.memory()
    half_a_body = b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n{"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip(f"3000 file descriptors are needed, {hard} are allowed")
    with contextlib.ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for i in range(2000):
            stack.enter_context(connected(server, (b"", b"GET / HTTP/1.1\r\nX: ", half_a_body)[i % 3]))
            if i % 250 == 249:
                start = time.monotonic()
                assert server.ask("GET", "/health", timeout=10)[0] == 200
                assert server.execute(task, wait=10)["status"] == "succeeded"
                assert time.monotonic() - start < 5
        assert server.memory() - before < 60_000_000
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 600
    assert "out of system resource" not in server.log() and len(server.log()) < 20_000


def test_slow_heads_and_slow_bodies_are_ended_while_others_are_served(new_server: NewServer) -> None:
    server = new_server("both", after="chronotask.SLOW_BODY = chronotask.IDLE_CONNECTION = 1.0").start()
    port = server.mcp_port()
    body = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n"
    accept = b"Accept: application/json, text/event-stream\r\n"
    slow = {
        "nothing at all": connected(server),
        "half a head": connected(server, b"GET / HTTP/1.1\r\nHost: local"),
        "half a head to MCP": connected(server, b"GET / HTTP/1.1\r\nHost: local", port),
        "half a body": connected(server, b"POST /api/v1/tasks HTTP/1.1\r\n" + body),
        "half a body to MCP": connected(server, b"POST /mcp HTTP/1.1\r\n" + accept + body, port),
        "silence after an answer": connected(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    }
    start = time.monotonic()
    while time.monotonic() - start < 0.8:
        for client in list(slow.values())[1:5]:
            client.sendall(b"x")  # one byte at a time does not help
        assert server.ask("GET", "/health")[0] == 200
        time.sleep(0.1)
    bodies = ("half a body", "half a body to MCP")  # after their answer aiohttp reads on for a while, to drop it
    answers = {what: client.recv(65536) if what in bodies else everything_from(client) for what, client in slow.items()}
    assert time.monotonic() - start < 8
    assert [what for what, answer in answers.items() if statuses_in(answer) == [408]] == ["half a body", "half a body to MCP"]
    assert [answers[what] for what in ("nothing at all", "half a head", "half a head to MCP")] == [b"", b"", b""]


def growth(server: Server, attack: Any, rounds: int) -> int:
    """By how many bytes memory grows over the later rounds of an attack; the first rounds may fill pools."""
    sizes = []
    for _ in range(rounds):
        attack()
        assert server.ask("GET", "/health", timeout=10)[0] == 200
        sizes.append(server.memory())
    return sizes[-1] - min(sizes[: rounds // 2])


def test_broken_and_refused_uploads_bombs_and_garbage_leave_nothing_in_memory_or_log(new_server: NewServer) -> None:
    server = new_server(API_TOKEN=GOOD_TOKEN, LOG_LEVEL="DEBUG").start()
    closing = UPLOAD + b"Connection: close\r\n"
    zipped = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb()) + bomb()
    token = b"Authorization: Bearer %s\r\n" % GOOD_TOKEN.encode()
    attacks = [
        (closing + b"Content-Length: 1000000\r\n\r\n" + b" " * 1_000_000, 401),
        (closing + zipped, 401),
        (closing + token + zipped, 415),
        (closing + token + b"Content-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: localhost\nAuthorization: Bearer %s\n\n" % GOOD_TOKEN.encode(), 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer\r\n %s\r\n\r\n" % GOOD_TOKEN.encode(), 400),
    ]

    def break_off() -> None:
        upload = UPLOAD + token + b"Content-Length: 1000000\r\n\r\n" + b" " * 900_000
        for client in [connected(server, upload) for _ in range(40)]:
            client.close()

    def attack() -> None:
        for data, status in attacks * 4:
            found = statuses_in(everything_from(connected(server, data)))
            assert found in ([status], []), (data[:200], found)  # [] when the reset outran the answer

    start = time.process_time()
    assert growth(server, attack, 8) < 40_000_000
    assert time.process_time() - start < 60
    assert growth(server, break_off, 8) < 60_000_000
    assert GOOD_TOKEN not in server.log() and server.log().count("\n") < 20


def test_requests_piled_up_behind_an_endless_answer_and_answers_nobody_reads_are_bounded(server: Server) -> None:
    one = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    upgrade = b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"
    piles = [(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n", one), (b"", one), (upgrade, b"a" * 100_000)]
    before = server.memory()
    for beginning, pile in piles:
        client = connected(server, beginning)
        client.setblocking(False)
        sent, end = 0, time.monotonic() + 1.5
        while time.monotonic() < end and sent < 100_000_000:
            if select.select([], [client], [], 0.1)[1]:
                with contextlib.suppress(BlockingIOError):
                    sent += client.send(pile)
        assert sent < 50_000_000  # it does not take more: the rest waits in the sender
        assert server.ask("GET", "/health")[0] == 200
        client.close()
    assert server.memory() - before < 40_000_000


def test_nothing_that_comes_from_outside_breaks_out_of_its_line_in_the_log(new_server: NewServer, tmp_path: Path) -> None:
    # Status lines, headers and bodies that try to break out of whatever they are written to.
    answers = (
        b"HTTP/1.1 500 \x1b[2Jforged\r\nX: a\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 200 OK\r\nX\x1b[2J: a\r\n\r\n",
        b"\x1b[2J\n2026-01-01 00:00:00,000 ERROR forged\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\x1b[2J%0a\r\nContent-Length: 0\r\n\r\n",
    )
    server = new_server(LOG_LEVEL="DEBUG", LOG_FILE=tmp_path / "log" / "log.txt").start()
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        for reply in answers:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                client.settimeout(5)
                client.recv(65536)
                client.sendall(reply)
        listener.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    task = server.http(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=5, name="h")
    assert [server.execute(task, wait=20)["status"] for _ in answers] == ["failed"] * 4
    thread.join(10)
    text = r"'\n2026-01-01 00:00:00,000 ERROR forged\r\x1b[2J'"
    server.execute(server.bash(f"printf {text}; printf {text} >&2; exit 1"), wait=20)
    for path in ("/%0a2026-01-01%2000:00:00,000%20ERROR%20forged%1b[2J", "/api/v1/tasks/%1b[2J", "/api/v1/tasks?%0aforged=%1b"):
        everything_from(connected(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()))
    everything_from(connected(server, b"GET / HTTP/1.1\r\nHost: evil\x1b[2J\r\nUser-Agent: \x1b[2J\r\nConnection: close\r\n\r\n"))
    server.stop()
    for log in (server.log(), (tmp_path / "log" / "log.txt").read_text()):
        assert not set(log) & {chr(code) for code in range(32) if code != 10} - {"\t"}
        assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ |    ", line) for line in log.splitlines())
        assert "\n2026-01-01" not in log


def test_no_secret_is_told_by_any_answer_log_metric_or_command_line(new_server: NewServer, tmp_path: Path, loopback: Web) -> None:
    resolved = {"ENV": "resolved-env-value-1", "FILE": "resolved-file-value-2", "URL": "resolved-url-value-3"}
    stored = ("stored-auth-value-4", "stored-header-value-5", "stored-cookie-value-6", "stored-userinfo-value-7")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "f").write_text(resolved["FILE"] + "\n")
    (tmp_path / "token").write_text(GOOD_TOKEN + "\n")
    chosen = {"SECRETS_DIR": tmp_path / "secrets", "SECRET_ENV": resolved["ENV"], "SECRET_URL": resolved["URL"]}
    chosen |= {"LOG_LEVEL": "DEBUG", "LOG_FILE": tmp_path / "log.txt", "API_TOKEN_FILE": tmp_path / "token"}
    server = new_server("both", **chosen).start()
    mcp, port = server.mcp_port(), loopback.server_address[1]
    told: dict[str, bytes] = {}

    def ask(method: str, path: str, body: Any = None, to: int = 0) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", to or server.port, timeout=30)) as client:
            headers = BEARER if body is None else {**BEARER, **MCP_HEADERS}
            client.request(method, path, None if body is None else json.dumps(body), headers)
            answer = client.getresponse()
            text = answer.read()
        told[f"{len(told)} {method} {path} {str(body)[:80]}"] = text + str(answer.headers).encode()
        return answer.status, text

    def listen() -> None:
        told["events"] = everything_from(connected(server, EVENTS))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    everywhere = "${env:CHRONOTASK_SECRET_ENV} ${file:f}"
    url = f"http://anna:{stored[3]}@127.0.0.1:{port}/${{env:CHRONOTASK_SECRET_URL}}?k=${{file:f}}"
    config = {
        "url": url,
        "method": "POST",
        "headers": {"Authorization": f"Bearer {stored[1]}", "Cookie": f"s={stored[2]}", "X-Api-Key": everywhere},
        "params": {"p": everywhere},
        "body": {"deep": [everywhere]},
        "timeout": 5,
        "auth": {"username": "anna", "password": stored[0]},
    }
    command = 'echo "$S"; echo "$S" >&2; echo -n "$S" | base64; (printf %s "${S:0:9}"; sleep 0.3; echo "${S:9}"); exit 1'
    configs: list[dict[str, Any]] = [
        config,
        {"command": command, "env": {"S": everywhere}},
        {**config, "url": url.replace(str(port), "1")},
        {**config, "url": url.replace("127.0.0.1", "no.such.host.invalid")},
        {**config, "expected_status": [201]},
        {**config, "url": "http://127.0.0.1:1${env:CHRONOTASK_SECRET_ENV}/"},
        {"command": "true", "env": {"S": "${env:CHRONOTASK_SECRET_MISSING}${file:../token}"}},
    ]
    for number, each in enumerate(configs, 1):
        body = {"name": f"t{number}", "task_type": "http" if "url" in each else "bash", "config": each, "max_retries": 0}
        assert ask("POST", "/api/v1/tasks", body)[0] == 201, body
        run = json.loads(ask("POST", f"/api/v1/tasks/{number}/execute")[1])
        ask("GET", f"/api/v1/executions/{run['id']}/output?follow=true")
        ask("POST", f"/api/v1/tasks/{number}/execute?wait=20")
        for path in (f"/api/v1/tasks/{number}", f"/api/v1/tasks/{number}/history?output=full"):
            ask("GET", path)
        ask("PATCH", f"/api/v1/tasks/{number}", {"config": {**each, "timeout": -1}})
        calls = {"get_task": {}, "get_task_history": {"output": "full"}, "execute_task": {"wait": 20}}
        for name, more in {**calls, "update_task": {"config": {**each, "no": 1}}}.items():
            ask("POST", "/mcp", rpc("tools/call", name=name, arguments={"task_id": number, **more}), mcp)
    for run in json.loads(ask("GET", "/api/v1/executions?output=full")[1])["executions"]:
        ask("GET", f"/api/v1/executions/{run['id']}")
        ask("GET", f"/api/v1/executions/{run['id']}/output")
    for path in "/ /metrics /openapi.json /api/v1/tasks /api/v1/overview /api/v1/scheduler/status /api/v1/nothing".split():
        ask("GET", path)
    for uri in ("chronotask://status", "chronotask://tasks/1", "chronotask://executions/1"):
        ask("POST", "/mcp", rpc("resources/read", uri=uri), mcp)
    told["command line"] = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    rows = b"".join(path.read_bytes() for path in tmp_path.glob("chronotask.db*"))
    server.stop()
    listener.join(10)
    told["log"], told["stderr"] = (tmp_path / "log.txt").read_bytes(), server.log().encode()
    assert len(told["events"]) > 1000 and b"succeeded" in told["events"]
    assert all(value.encode() in b"".join(loopback.told) for value in resolved.values())  # the tasks had them
    secrets = [*resolved.values(), *stored, GOOD_TOKEN]
    secrets += [base64.b64encode(f"anna:{password}".encode()).decode() for password in (stored[0], stored[3])]
    assert [(what, secret) for what, text in told.items() for secret in secrets if secret.encode() in text] == []
    assert [value for value in (*resolved.values(), GOOD_TOKEN) if value.encode() in rows] == []


def test_other_users_can_read_no_file_of_the_service_and_children_keep_their_umask(new_server: NewServer, tmp_path: Path) -> None:
    data, logs, copy, token = (tmp_path / name for name in ("data", "logs", "copy.db", "token"))
    token.write_text(f"  {GOOD_TOKEN}\r\n")
    before = os.umask(0o000)
    try:
        server = new_server(database=data / "c.db", API_TOKEN_FILE=token, LOG_FILE=logs / "log.txt")
        server.token = BEARER
        server.start()
        subprocess.run([sys.executable, str(PROGRAM), "--backup", str(copy)], env=server.environ, timeout=30, check=True)
    finally:
        os.umask(before)
    run = server.execute(server.bash(f"umask; touch {tmp_path}/made; mkdir {tmp_path}/folder"), wait=10)
    assert run["output_data"]["stdout"] == "0000\n"
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o666
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777
    for credentials in ("", "wrong-horse"):
        assert server.ask("GET", "/backup", Authorization=f"Bearer {credentials}")[0] == 401
    status, made = server.ask("GET", "/backup")
    assert status == 200 and made.startswith(b"SQLite format 3\0")
    own = [copy, data, logs, *data.iterdir(), *logs.iterdir()]
    assert {path.name for path in own} >= {"c.db", "c.db-wal", "c.db-shm", "c.db.leader", "c.db.service", "log.txt", "copy.db"}
    assert [path.name for path in data.iterdir() if "backup" in path.name or "part" in path.name] == [], "no copy is left"
    assert {path.name: oct(path.stat().st_mode & 0o077) for path in own if path.stat().st_mode & 0o077} == {}


PROBE = r"""
for fd in /proc/self/fd/*; do readlink "$fd"; done | grep -v '^/proc/' ; echo --
cat /proc/self/environ | tr '\0' '\n'; echo --
for file in environ mem maps; do ( : </proc/$PPID/$file ) 2>/dev/null && echo "opened $file"; done
for link in fd/0 cwd exe; do readlink /proc/$PPID/$link >/dev/null && echo "followed $link"; done
echo --
cat /proc/$PPID/cmdline | tr '\0' ' '; echo
sleep 100 & ( : </proc/$!/environ && : </proc/$!/maps ) && readlink /proc/$!/fd/0 >/dev/null && echo control; kill $!
"""
# The rights of a user without privileges, for a test that runs as root: root may read everything.
DROP_RIGHTS = """
import ctypes
for right in range(64):
    ctypes.CDLL(None).prctl(24, right, 0, 0, 0)
if os.environ.pop("AGAIN", "yes") == "yes":
    os.environ["AGAIN"] = "no"
    os.execv(sys.executable, [sys.executable, *sys.argv])
"""


def test_the_program_is_hidden_before_any_import(tmp_path: Path) -> None:
    watched = tmp_path / "watched.py"
    watched.write_text(
        "import ctypes, runpy, sys\n"
        "def look(event, arguments):\n"
        "    if event == 'import' and arguments[0] in ('signal', 'argparse', 'asyncio', 'pydantic'):\n"
        "        print(arguments[0], ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), file=sys.stderr)\n"  # PR_GET_DUMPABLE
        "sys.addaudithook(look)\n"
        f"sys.argv = [{str(PROGRAM)!r}, '--version']\n"
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
    )
    seen = subprocess.run([sys.executable, str(watched)], capture_output=True, text=True, timeout=60).stderr.split()
    assert {"argparse", "asyncio", "pydantic"} <= set(seen[::2]) and set(seen[1::2]) == {"0"}


@each("mode", "http", "both")
def test_a_task_inherits_nothing_and_cannot_look_into_the_service(new_server: NewServer, tmp_path: Path, mode: str) -> None:
    before = DROP_RIGHTS if os.geteuid() == 0 else ""
    secret = {"API_TOKEN": GOOD_TOKEN, "SECRET_X": "secret-of-the-service"}
    server = new_server(mode, before=before, LOG_FILE=tmp_path / "l.txt", **secret).start()
    if mode == "both":
        server.mcp_url()
    streams = [connected(server, EVENTS) for _ in range(3)]
    run = server.execute(server.bash("", config={"command": PROBE, "env": {"MINE": "1"}}), wait=20)
    open_files, environ, looked, command = run["output_data"]["stdout"].split("--\n")
    assert {re.sub(r":\[\d+\]", "", line) for line in open_files.split()} == {"/dev/null", "pipe"}, open_files
    names = {line.partition("=")[0] for line in environ.splitlines() if line.startswith("CHRONOTASK_")}
    assert names == {f"CHRONOTASK_{name}" for name in ("TASK_ID", "TASK_NAME", "EXECUTION_ID", "ATTEMPT", "RUN_ID")}
    assert "MINE=1" in environ.splitlines()
    assert looked == "", "the service's memory or environment can be read by its tasks"
    assert "control" in command and GOOD_TOKEN not in command
    assert "secret-of-the-service" not in str(run) and GOOD_TOKEN not in str(run)
    for stream in streams:
        stream.close()


def test_a_backup_does_not_go_into_a_file_that_a_stranger_put_there(server: Server, tmp_path: Path) -> None:
    server.bash("true", name="secret-name")
    shared, copy = tmp_path / "shared", tmp_path / "shared" / "copy.db"
    shared.mkdir()
    plant = (
        "import os; folder = os.environ['SHARED']\n"
        "names = ('.copy.db.%d.part', 'copy.db.%d.part', '.copy.db.part', 'copy.db.part', '.copy.db.tmp', 'copy.db.tmp')\n"
        "for name in names: open(f'{folder}/{name % os.getpid() if chr(37) in name else name}', 'w').close()\n"
    )
    environ = {**server.environ, "SHARED": str(shared)}
    done = ran(tmp_path, sys.executable, wrapped(tmp_path, plant), "--backup", copy, environ=environ)
    planted = [path for path in shared.iterdir() if path.name != "copy.db"]
    assert len(planted) == 6 and [path.name for path in planted if path.stat().st_size] == []
    if done.returncode == 0:
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600


@each("mode", "http", "both")
def test_a_start_that_listens_to_the_network_without_a_token_warns_once(new_server: NewServer, mode: str) -> None:
    alone = "import ctypes\nif ctypes.CDLL(None).unshare(0x40000000): sys.exit('no namespace')"  # CLONE_NEWNET: no other network
    server = new_server(mode, before=alone, API_HOST="0.0.0.0").start(ready=False)
    until(lambda: "REST on" in server.log() or server.process.poll() is not None)
    if "no namespace" in server.log():
        pytest.skip("a network namespace needs more rights")
    assert len(re.findall(r"WARNING .*ANYONE WHO REACHES 0\.0\.0\.0 .*CHRONOTASK_API_TOKEN", server.log())) == 1


# ======================================================================================================================
# The browser and the documentation
# ======================================================================================================================


@pytest.mark.slow
def test_the_dashboard_and_the_docs_in_a_real_browser_and_the_attacks_of_other_pages(tmp_path: Path) -> None:
    """.ci/browser.mjs has the facts; it prints `ok NAME` or `FAILED NAME` for each."""
    modules = Path(os.environ.get("CHRONOTASK_TEST_NODE_MODULES") or "missing")  # with playwright-core and axe-core
    missing = [] if shutil.which("node") else ["node"]
    missing += [] if shutil.which("chromium") or shutil.which("chromium-browser") else ["chromium"]
    wanted = ("playwright-core", "axe-core")
    missing += [f"{name} (CHRONOTASK_TEST_NODE_MODULES)" for name in wanted if not (modules / name).exists()]
    if missing:
        pytest.skip(f"BROWSER TESTS DID NOT RUN: there is no {', no '.join(missing)} (.ci/run installs them)")
    command = ["node", str(TOP / ".ci" / "browser.mjs"), sys.executable, chronotask.__file__, str(tmp_path), str(modules)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CHRONOTASK_")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1500)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    print(done.stdout)
    assert failed == [] and done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("\nok ") >= 20


PAGES = {path.name: path.read_text(encoding="utf-8") for path in (TOP / "README.md", *sorted((TOP / "docs").glob("*.md")))}


def section(title: str, page: str = "README.md") -> str:
    """A section of a page, without its heading."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGES[page], re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def test_every_command_of_the_tour_works_in_order(server: Server) -> None:
    answers: list[Any] = []
    for block in re.findall(r"^```sh\n(.*?)^```", section("Five minutes with curl"), re.MULTILINE | re.DOTALL):
        script = block.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}")
        for command in re.split(r"\n(?=curl |sleep )", script):
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, command
            answers.append(json.loads(done.stdout))
    hello, first_run, cron, once, _, health_run, preview, status, interval, history, paused = answers
    assert hello["id"] == 1 and first_run["status"] == "succeeded"
    assert first_run["output_data"]["stdout"].startswith("hello from ")
    assert cron["description"] == "Every weekday at 09:00 (Europe/Berlin)"
    assert [len(one["upcoming"]) for one in (cron, once, preview)] == [5, 1, 3]
    assert interval["schedule_config"]["seconds"] == 2
    assert health_run["output_data"]["status_code"] == 200
    assert [row["trigger"] for row in history["history"]] == ["schedule", "schedule"]
    assert status["leader"] is True and status["tasks"] == 2 and paused["status"] == "paused"


def test_no_advice_puts_the_services_own_token_where_tasks_read_their_secrets() -> None:
    for name in ("operating.md", "docker-compose.yml"):
        text = PAGES.get(name) or (TOP / name).read_text()
        paths = re.findall(r"CHRONOTASK_API_TOKEN_FILE(?::|, value:|=) *(/[^\s}]+)", text)
        assert paths and not any(path.startswith("/run/secrets") for path in paths), paths


def test_every_setting_is_in_the_readme_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", section("Settings"), re.MULTILINE))
    fields = {field.name.upper(): field.default for field in dataclasses.fields(Settings) if field.metadata}
    assert rows.keys() == fields.keys()
    for name, default in fields.items():
        if isinstance(default, (bool, int, float, str)):
            text = str(default).lower() if isinstance(default, bool) else default if isinstance(default, str) else f"{default:g}"
            assert rows[name] == f"`{text}`"


def test_every_route_field_status_and_tool_is_in_the_documentation() -> None:
    text = section("REST")
    for operation in chronotask.OPERATIONS:
        for method in ("PUT", "PATCH") if operation.method == "PATCH" else (operation.method,):
            path = re.escape(chronotask.API + operation.path)
            row = rf"^\|.*`{method}`.*{path}[`?]|{method} {path}[`?]"
            assert re.search(row, text, re.MULTILINE), f"{method} {operation.path}"
    for path in chronotask.PAGES:
        assert re.search(rf"GET {re.escape(path)}[`?]", text), path
    for kind, title in ((chronotask.Task, "Tasks"), (chronotask.Schedule, "Schedules")):
        for name in chronotask.shape_of(kind).shown:
            assert re.search(rf"\b{name}\b", section(title)), f"{title}: {name}"
    for status in (*chronotask.UNFINISHED, *chronotask.FINISHED):
        assert f"`{status}`" in section("Statuses"), status
    rows = re.findall(r"^\| ((?:`[a-z_]+` ?)+)\|", section("What an assistant can do", "mcp.md"), re.MULTILINE)
    assert sorted(" ".join(rows).replace("`", "").split()) == sorted(chronotask.TOOLS)


@each("page", *PAGES)
def test_the_links_the_names_and_the_json_of_each_page_are_sound(page: str) -> None:
    text, folder = PAGES[page], TOP if page == "README.md" else TOP / "docs"
    for link in re.findall(r"(?:\]\(|src=\"|srcset=\")(?![a-z]+:)([^)\s\"]*)", text):
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else folder / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)", re.sub(r"(?ms)^ *```.*?^ *```", "", PAGES[target.name]), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, link
    settings = {field.name.upper() for field in dataclasses.fields(Settings) if field.metadata}
    given = "TASK_ID TASK_NAME EXECUTION_ID SCHEDULE_ID SCHEDULED_FOR ATTEMPT RUN_ID".split()
    for name in set(re.findall(r"CHRONOTASK_([A-Z_]+[A-Z])", text)) - settings - set(given):
        assert re.match("SECRET|LAUNCHER|CAUSE", name), name
    paths = [re.sub(r"\{id\}", r"[^/]+", operation.path) for operation in chronotask.OPERATIONS]
    paths += [re.escape(path.removeprefix("/api/v1")) for path in chronotask.PAGES]
    for path in re.findall(r"/api/v1(/[^\s`?\"')…]*)", text):
        assert any(re.fullmatch(known, path) for known in paths), path
    for block in re.findall(r"^ *```json\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        json.loads(block)
    assert text.count("\n") < (450 if page == "README.md" else 400)


@each("expression", *re.findall(r"^\| `([^`]+)`(?:,| \|)", section("Cron"), re.MULTILINE))
def test_every_cron_example_is_accepted(expression: str) -> None:
    config = {"expression": expression}
    checked = chronotask.check_schedule_config("cron", config, "UTC", int(time.time() * 1_000_000))
    assert checked == {"expression": expression, "timezone": "UTC"}


def test_the_changelog_begins_with_this_version() -> None:
    text = (TOP / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", text, re.MULTILINE)[0] == chronotask.__version__


def test_each_requirement_gives_its_reason_and_the_inline_script_block_asks_for_those_at_run_time() -> None:
    at_run_time, for_tests = (TOP / "requirements.txt").read_text().split("# --- tests ---")
    lines = [[line for line in part.splitlines() if line and line[0] != "#"] for part in (at_run_time, for_tests)]
    assert all(re.fullmatch(r"[a-z-]+>=[0-9.]+(,<[0-9]+)? +# \S.*", line) for part in lines for line in part), lines
    [block] = re.findall(r"^# /// script\n(.*?)^# ///$", MODULE, re.MULTILINE | re.DOTALL)
    needed = [line.split("#")[0].strip() for line in lines[0]]
    assert tomllib.loads(re.sub(r"(?m)^# ?", "", block)) == {"requires-python": ">=3.11", "dependencies": needed}


def test_the_top_of_the_repository_holds_what_design_md_lists_and_nothing_else() -> None:
    allowed = {
        "chronotask.py", "test_chronotask.py", "bench_chronotask.py", "dashboard.html", "Dockerfile", "docker-compose.yml",
        "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "docs",
    }  # fmt: skip
    listed = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True)
    names = listed.stdout.splitlines() if listed.returncode == 0 else os.listdir(TOP)
    tops = {name.split("/")[0] for name in names} - {"__pycache__", "data"}
    assert {name for name in tops if not name.startswith(".")} <= allowed


async def test_the_dashboard_is_one_small_file_that_fetches_nothing_from_elsewhere_by_its_policy_too(api: Api) -> None:
    page = (TOP / "dashboard.html").read_text(encoding="utf-8")
    assert len(gzip.compress(page.encode())) < 60_000 and max(map(len, page.splitlines())) <= 140
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg|example\.org)\S+", page) == []
    assert re.findall(r"""\son[a-z]+=["']|\sstyle=|<script src|<link rel="stylesheet""", page) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", page) == []
    assert (page.count("<script>"), page.count("<style>")) == (1, 1)
    answer = await api("GET", "//docs")
    policy = answer.headers["Content-Security-Policy"]  # it names these two, and nothing else
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
    first, second = re.findall(r"'nonce-([0-9a-f]{32})'", policy)
    assert first == second and answer.text == re.sub(r"<(script|style)>", rf'<\1 nonce="{first}">', page)


# ---- Recipes

AS_JSON = {"Content-Type": "application/json"}
TEAMS = "x.powerplatform.com/workflows/1/triggers/manual/paths/invoke?sig=x%2F"
# What the real servers take at `https://host/path`: method, headers, the form of the body, and how they answer. In a form a type
# stands for any value of it, a number for text of at most so many characters, and None for any body.
TAKEN: dict[str, tuple[str, dict[str, str], Any, int]] = {
    "hooks.slack.com/services/T0/B0/x":
        ("POST", AS_JSON, {"text": 3000, "blocks": [{"type": "section", "text": {"type": "plain_text", "text": 3000}}]}, 200),
    "discord.com/api/webhooks/1/x": ("POST", AS_JSON, {"content": 2000, "allowed_mentions": {"parse": []}}, 204),
    "api.telegram.org/bot1:x-y/sendMessage":
        ("POST", AS_JSON, {"chat_id": int, "text": 4096, "link_preview_options": {"is_disabled": True}}, 200),
    TEAMS: ("POST", AS_JSON, {"type": "message", "attachments": [{
        "contentType": "application/vnd.microsoft.card.adaptive", "content": {"type": "AdaptiveCard", "version": "1.4", "body": [
            {"type": "RichTextBlock", "inlines": [{"type": "TextRun", "text": 20000}]}]}}]}, 202),
    "ntfy.sh/":
        ("POST", {"Authorization": "Bearer tk_1"}, {"topic": 64, "title": 4096, "message": 4096, "priority": int}, 200),
    "gotify.example.org/message":
        ("POST", {"X-Gotify-Key": "A1", **AS_JSON}, {"title": 4096, "message": 4096, "priority": int}, 200),
    "api.postmarkapp.com/email":
        ("POST", {"X-Postmark-Server-Token": "p1", **AS_JSON}, {"From": 99, "To": 99, "Subject": 2000, "TextBody": 9999}, 200),
    "api.mailgun.net/v3/example.org/messages": (
        "POST", {"Authorization": "Basic YXBpOm0x", "Content-Type": "application/x-www-form-urlencoded"},
        {"from": 99, "to": 99, "subject": 2000, "text": 9999}, 200,
    ),
    **dict.fromkeys(("hc-ping.com/c0ffee/start", "hc-ping.com/c0ffee"), ("POST", {}, None, 200)),
    "hc-ping.com/c0ffee/fail": ("POST", {"Content-Type": "text/plain; charset=utf-8"}, None, 200),
    "ntfy.sh/my-tasks-4711": ("POST", {"Content-Type": "text/plain"}, None, 200),
    "hc-ping.com/beef": ("GET", {}, None, 200),
}  # fmt: skip
RECIPE_SECRETS = {
    "slack_url": "https://hooks.slack.com/services/T0/B0/x", "discord_url": "https://discord.com/api/webhooks/1/x",
    "telegram_token": "1:x-y", "teams_url": f"https://{TEAMS}", "ntfy_token": "tk_1", "gotify_token": "A1",
    "postmark_token": "p1", "mailgun_key": "m1", "backup_check": "c0ffee", "chronotask_check": "beef",
}  # fmt: skip
# Heading of a recipe: what is sent when the backup fails, then succeeds, and then is not heard of for 26 hours.
SENT = {
    "README": 2 * ["ntfy.sh/my-tasks-4711"],
    "Slack": 2 * ["hooks.slack.com/services/T0/B0/x"],
    "Discord": 2 * ["discord.com/api/webhooks/1/x"],
    "Telegram": 2 * ["api.telegram.org/bot1:x-y/sendMessage"],
    "Teams": 2 * [TEAMS],
    "ntfy": 2 * ["ntfy.sh/"],
    "Gotify": 2 * ["gotify.example.org/message"],
    "Mail by sendmail": 2 * ["sendmail -i -t"],
    "Mail by a mail service": 2 * ["api.mailgun.net/v3/example.org/messages"] + 2 * ["api.postmarkapp.com/email"],
    "healthchecks": ["hc-ping.com/c0ffee", "hc-ping.com/c0ffee/fail", "hc-ping.com/c0ffee/start", "hc-ping.com/c0ffee/start"],
    "B only after A": ["rclone copy /var/backups remote:backups"],
    "It did not run": ["ntfy.sh/"],
    "I am alive": ["discord.com/api/webhooks/1/x"],
    "Who watches ChronoTask": ["hc-ping.com/beef"],
}
HOSTILE = 'it said "so" & <!channel> \\ ${cause:url} $(x)'


def recipes_of(title: str) -> list[str]:
    if title == "README":
        return re.findall(r"-d '(\{.*?\})'$", section("An alert in five lines"), re.MULTILINE | re.DOTALL)
    return re.findall(r"^ *```json\n(.*?)^ *```", section(title, "recipes.md"), re.MULTILINE | re.DOTALL)


def is_of_form(value: Any, form: Any) -> bool:
    if isinstance(form, dict):
        return isinstance(value, dict) and value.keys() == form.keys() and all(is_of_form(value[key], form[key]) for key in form)
    if isinstance(form, list):
        return isinstance(value, list) and len(value) == len(form) and all(map(is_of_form, value, form))
    if type(form) is int:
        return isinstance(value, str) and 0 < len(value) <= form
    return form is None or type(value) is form or bool(value == form)


def test_each_recipe_is_tried() -> None:
    page = PAGES["recipes.md"]
    assert re.findall(r"^## (.+)", page, re.MULTILINE) == list(SENT)[1:]
    assert sum(len(recipes_of(title)) for title in SENT) == page.count("```json\n") + 1 == 17


@each("title", *SENT)
async def test_a_recipe_works_as_it_is_written(title: str, open_rig: OpenRig, tmp_path: Path) -> None:
    programs, secrets, sent = tmp_path / "bin", tmp_path / "secrets", list[tuple[str, str]]()

    async def take(request: web.Request) -> web.Response:
        """Stands for all hosts, their names being the first word of the path, and refuses what the real ones would refuse."""
        place, text = request.raw_path[1:], await request.text()
        method, headers, form, status = TAKEN.get(place, ("", {}, None, 0))
        is_form = request.content_type == chronotask.FORM
        value = None if form is None else dict(urllib.parse.parse_qsl(text)) if is_form else json.loads(text)
        fits = all(request.headers.get(name) == wanted for name, wanted in headers.items()) and is_of_form(value, form)
        if request.method != method or not fits:
            return web.Response(status=400)
        words = [text] if form is None else [item for level in chronotask.walk(value) for item in level if isinstance(item, str)]
        sent.append((place, "\n".join(words)))
        return web.Response(status=status)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", take)
    async with TestServer(app) as running:
        here = str(running.make_url("")).rstrip("/")
        for folder in (programs, secrets):
            folder.mkdir(mode=0o700)
        for name, secret in RECIPE_SECRETS.items():
            (secrets / name).write_text(secret.replace("https:/", here) + "\n")
            (secrets / name).chmod(0o600)
        for name in ("sendmail", "rclone"):
            script = f'echo "{name} $*" >> {tmp_path}/ran\n[ $1 != -i ] || cat > {tmp_path}/$PPID.mail'
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o700)
        path = {"PATH": f"{programs}:{CHILD_ENVIRON['PATH']}"}
        rig = await open_rig(environ=path, secrets_dir=secrets, public_url="https://example.org/c/")
        (tmp_path / "said").write_text(HOSTILE)
        command = f"[ -e {tmp_path}/well ] || {{ cat {tmp_path}/said >&2; exit 3; }}"
        backup = await rig.task(name='"Backup"', key="backup", config={"command": command})
        recipes = [json.loads(text.replace("https:/", here)) for text in recipes_of(title)]
        made = [await rig.service.create_task(parse(chronotask.TaskCreate, recipe)) for recipe in recipes]
        await rig.executed(backup)
        (tmp_path / "well").touch()
        await rig.executed(backup)
        by_time = [task["id"] for task in made if task["schedules"][0]["schedule_type"] != "after"]
        for task_id in by_time:
            await rig.executed(task_id)
        if not by_time:
            await rig.run_at(93_600)
        ends = [row["error_message"] for row in await rig.rows() if row["task_id"] != backup]
    assert ends == [None] * len(SENT[title])
    ran = (tmp_path / "ran").read_text().splitlines() if (tmp_path / "ran").exists() else []
    assert sorted([place for place, _ in sent] + ran) == SENT[title]
    mails = dict(file.read_text().split("\n\n") for file in tmp_path.glob("*.mail"))
    usual = "MIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: base64"
    head = f"To: ops@example.org\nFrom: chronotask@example.org\nSubject: backup: %s\n{usual}"
    assert sorted(mails) == ([head % "broke", head % "recovered"] if title == "Mail by sendmail" else [])
    tells = title not in ("B only after A", "It did not run", "I am alive", "Who watches ChronoTask")
    texts = [base64.b64decode(body).decode() for body in mails.values()] + [text for _, text in sent]
    assert any(HOSTILE in text for text in texts) == tells
