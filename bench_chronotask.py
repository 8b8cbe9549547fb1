"""How fast ChronoTask is, next to what the machine itself can do.

    python bench_chronotask.py [--quick | --smoke | --full] [--json FILE|-] [--only NAME]... [--against MODULE]

It starts the real service (`chronotask.py --mode http`, beside this file) as a process of its own on a fresh database in
a temporary folder, with its default settings except where a measure says otherwise, and drives it only through REST. In
the same run it measures the limit of the machine: the same libraries with nothing in between. Machines are noisy, so
limit and service take turns, round by round, and the ratio is the median of the rounds' ratios.

    measure     what is timed                                              the limit beside it
    ----------  ---------------------------------------------------------  -----------------------------------------------
    footprint   start until /health answers, resident memory of a fresh    a Python that imports aiohttp
                service
    requests    POST /tasks and GET /tasks/{id}, 32 connections            a bare aiohttp handler with the same JSON
    pages       p99 of GET /tasks?limit=100 and of a long history's page   json.dumps of the same page
    lateness    arrival at the target - slot, 100 interval schedules of    asyncio.sleep until the same instants, at the
                1 s                                                        same time, in this process
    burst       once-schedules due at one instant, a task each: from that  the same requests through one aiohttp
                instant to the last finished_at; lateness of the first     ClientSession, 32 at a time
                arrival; CPU
    bash        the same with the command `true`                           create_subprocess_exec("bash", "-c", "true")
    schedules   memory of a schedule, start with them, CPU while idle      -
    memory      resident memory after many executions                      after 1,000
    retention   p99 of POST /tasks while a long history is being deleted   the same after it
    hostile     /health and starts of other executions while tasks print   the same before
                1 GB, print without end and start 300 children
    cron        slowest answer of POST /schedules/preview for the next     -
                slot of expressions checked before, near clock changes
    growth      (--full only) burst, start and listing at 1, 10 and 100    growth of n log n
                thousand
    many        pages, status and metrics with many tasks, schedules and   the same with a thousand of each
                executions (--full: 100,000, a million and 5 million);
                start, CPU while idle, 100 tasks a page at 16 callers,
                POST /tasks while a long history is deleted

Everything, the limits too, runs with the few environment variables that a service manager gives (ENVIRONMENT), not with
those of the shell it is started from: a bash task inherits the service's, which takes more than 1 us for each of them.
The service runs as the image starts it, by `python -m chronotask`: Python keeps the syntax tree of a script (17 MB).

`--against MODULE` runs another chronotask.py too, in turns with this one, each measure three times, and prints how their
figures compare: that is how a release is held to the one before, on a machine whose speed changes by the minute.

The target of HTTP tasks is a bare asyncio server in a process of its own, which answers a fixed 200: it is not the limit.
One HTTP client, written on asyncio alone, drives both the service and the bare handler. CPU is the process's own clock.

Where so many rows are wanted that making them through REST would take minutes (10,000 tasks, a history of 100,000 or a
million executions, 100,000 schedules), some are made through REST, the service is stopped, their rows are cloned in
its SQLite file, and it is started again. The history page and `retention` run with HISTORY_PER_TASK=0 while it is made.

No measure asserts a time. The exit status is 0 unless a measure could not be taken at all (then 1). `--quick` takes
under two minutes: it has fewer rounds, and smaller sizes where the table says so. `--smoke` shows in seconds that every
measure still works; its figures mean nothing. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import aiohttp
from aiohttp import web

HOST = "127.0.0.1"
API = "/api/v1"
CONNECTIONS = 32
REQUESTS_AT_ONCE = 32  # more through one ClientSession are slower, not faster
SPAWNS_AT_ONCE = 16  # more than two a core start no more processes a second
DEADLINE = 600.0  # seconds after which any single step is given up
# systemd(1) sets these; the others are what a Python may need to be found and to work as the caller's does.
ENVIRONMENT = re.compile(r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_[A-Z]+|TZ|TMPDIR|LD_LIBRARY_PATH|PYTHON[A-Z0-9]*")

PROGRAM = Path(__file__).with_name("chronotask.py")
ROUNDS_AGAINST = 3  # of each measure and program with --against

Pair = tuple[float, float]  # a round's figure and its limit


@dataclass(frozen=True)
class Sizes:
    """How much each measure does. The default is what the wanted figures are meant for."""

    rounds: int = 7
    requests: int = 4_000
    page_reads: int = 300
    tasks: int = 10_000
    history: int = 100_000
    lateness_seconds: int = 20
    http_burst: int = 2_000
    bash_burst: int = 400
    schedules: int = 100_000
    idle_seconds: int = 10
    executions: int = 100_000
    deleted: int = 1_000_000
    hostile_seconds: int = 8
    output_bytes: int = 1_000_000_000
    settle: float = 1.0  # seconds before memory and idle CPU are read, and before lateness counts
    growth: tuple[int, ...] = ()
    many: tuple[int, int, int] = (10_000, 100_000, 200_000)  # tasks, schedules, executions


SIZES = {
    "default": Sizes(),
    "full": Sizes(growth=(1_000, 10_000, 100_000), many=(100_000, 1_000_000, 5_000_000)),
    "quick": Sizes(
        rounds=5, requests=2_000, page_reads=200, lateness_seconds=8, idle_seconds=5, executions=5_000, deleted=100_000,
        hostile_seconds=4, many=(2_000, 20_000, 50_000),
    ),
    "smoke": Sizes(
        rounds=1, requests=100, page_reads=5, tasks=150, history=150, lateness_seconds=1, http_burst=50, bash_burst=10,
        schedules=200, idle_seconds=1, executions=1_050, deleted=1_500, hostile_seconds=1, output_bytes=10_000_000, settle=0.2,
        many=(1_000, 1_000, 1_000),
    ),
}  # fmt: skip


# ======================================================================================================================
# Figures
# ======================================================================================================================


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None where nothing is wanted of the figure."""

    measure: str
    figure: float
    unit: str
    limit: float | None = None
    ratio: float | None = None
    wanted: str = "-"
    met: bool | None = None
    note: str = ""


def compared(measure: str, unit: str, pairs: Sequence[Pair], note: str = "") -> Row:
    """A figure beside its limit, without a wish."""
    figure, limit = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Row(measure, figure, unit, limit, statistics.median(a / b for a, b in pairs), note=note)


def judged(row: Row, wanted: str, met: bool) -> Row:
    return replace(row, wanted=wanted, met=met)


def at_least(floor: float, row: Row) -> Row:
    return judged(row, f"ratio >= {floor:.2f}", row.ratio is not None and row.ratio >= floor)


def at_most(ceiling: float, row: Row) -> Row:
    return judged(row, f"ratio <= {ceiling:g}", row.ratio is not None and row.ratio <= ceiling)


def within(slack: float, row: Row) -> Row:
    """Wanted: not more than `slack` (in the row's unit) above the limit."""
    return judged(row, f"limit + {slack:g} {row.unit}", row.limit is not None and row.figure - row.limit <= slack)


def under(ceiling: float, row: Row) -> Row:
    return judged(row, f"< {ceiling:g} {row.unit}", row.figure < ceiling)


def percentile(values: Iterable[float], percent: float) -> float:
    ordered = sorted(values)
    if not ordered:
        raise RuntimeError("nothing was seen")
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def instant(text: str) -> float:
    """Seconds since the epoch of an ISO 8601 time of the API."""
    return datetime.fromisoformat(text).timestamp()


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


# ======================================================================================================================
# One HTTP client for the service and for its limit
# ======================================================================================================================


class Answer(NamedTuple):
    status: int
    seconds: float
    body: bytes


def request(method: str, path: str, body: object = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    kind = "" if body is None else "Content-Type: application/json\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\n{kind}Content-Length: {len(data)}\r\n\r\n".encode() + data


class Client(asyncio.Protocol):
    """A keep-alive connection that takes the next request of a shared feed as soon as its answer is complete."""

    def __init__(self, feed: Iterator[bytes], answers: list[Answer], over: asyncio.Future[None]) -> None:
        self.feed, self.answers, self.over = feed, answers, over
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        following = next(self.feed, None)
        if following is None:
            self.over.set_result(None)
            self.transport.close()
        else:
            self.sent = time.perf_counter()
            self.transport.write(following)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n") + 4
        if head < 4:
            return
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.buffer[:head])
        status = int(self.buffer[9:12])
        if length is None and status != 204:
            raise ValueError("an answer without Content-Length")
        if len(self.buffer) >= head + (int(length[1]) if length else 0):
            self.answers.append(Answer(status, time.perf_counter() - self.sent, self.buffer[head:]))
            self.buffer = b""
            self.send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(error or ConnectionError("the server closed the connection"))


def drive(port: int, requests: Iterable[bytes], connections: int = 1) -> tuple[list[Answer], float]:
    """Sends `requests` over so many connections. Gives the answers as they came, and the seconds that it took."""

    async def run() -> list[Answer]:
        loop = asyncio.get_running_loop()
        feed, answers = iter(requests), list[Answer]()
        ends = [loop.create_future() for _ in range(connections)]
        async with asyncio.timeout(DEADLINE):
            for over in ends:
                await loop.create_connection(functools.partial(Client, feed, answers, over), HOST, port)
            await asyncio.gather(*ends)
        return answers

    start = time.perf_counter()
    answers = asyncio.run(run())
    return answers, time.perf_counter() - start


def checked(answers: Sequence[Answer]) -> list[Any]:
    """The documents of `answers`, all of which must be successes."""
    for answer in answers:
        if answer.status >= 300:
            raise RuntimeError(f"the service answered {answer.status}: {answer.body[:500].decode()}")
    return [json.loads(answer.body) if answer.body else None for answer in answers]


# ======================================================================================================================
# Processes: the service, the target, the bare handler
# ======================================================================================================================


def cpu_of(pid: int) -> float:
    """Seconds of CPU that process `pid` has used, all its threads: the clock that clock_getcpuclockid(3) names."""
    return time.clock_gettime((~pid << 3) | 2)


def memory_of(pid: int | str, field_name: str = "VmRSS") -> int:
    """Resident memory in bytes (`VmHWM`: at its highest)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{field_name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Service:
    """A running ChronoTask on the database in `folder`; `started_in` is the time until /health answered 200."""

    program = PROGRAM

    def __init__(self, folder: Path, *, as_script: bool = False, **settings: object) -> None:
        self.folder, self.port = folder, free_port()
        self.log = folder / "service.log"
        settings = {"DATABASE_URL": f"sqlite:///{self.database}", "LOG_LEVEL": "WARNING", **settings}
        environment = os.environ | {f"CHRONOTASK_{name}": str(value) for name, value in settings.items()}
        if as_script:
            start_it = [str(self.program)]
        else:
            start_it = ["-m", self.program.stem]
            environment["PYTHONPATH"] = str(self.program.parent)
        start = time.perf_counter()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *start_it, "--mode", "http", "--port", str(self.port)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        self.started_in = time.perf_counter() - start

    @property
    def database(self) -> Path:
        return self.folder / "chronotask.db"

    @property
    def pid(self) -> int:
        return self.process.pid

    def _wait_until_healthy(self) -> None:
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 5) as probe:
                probe.sendall(request("GET", "/health"))
                if b" 200 " in probe.recv(4096)[:15]:
                    return
            time.sleep(0.002)
        raise RuntimeError("the service did not start: " + self.log.read_text(errors="replace")[-2000:])

    def call(self, method: str, path: str, body: object = None) -> Any:
        return checked(drive(self.port, [request(method, path, body)])[0])[0]

    def create(self, path: str, bodies: Iterable[object]) -> list[int]:
        """Makes all of `bodies` with POST, and gives their ids."""
        made = drive(self.port, [request("POST", API + path, body) for body in bodies], CONNECTIONS)[0]
        return [document["id"] for document in checked(made)]

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to a service that does not end in 20 seconds."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.stop()
        if error is not None:
            error.add_note("the service's log ends:\n" + self.log.read_text(errors="replace")[-2000:])


class Helper:
    """A server of the bench's own in another process. It ends when the pipe to it closes, however this process ends."""

    def __init__(self, serve: Callable[..., Any], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=run_helper, args=(serve, other_end, *arguments), daemon=True)
        self.process.start()
        other_end.close()
        self.port: int = self.receive()

    def receive(self, seconds: float = DEADLINE) -> Any:
        if not self.pipe.poll(seconds):
            raise TimeoutError("a helper process does not answer")
        return self.pipe.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join(5)
        self.process.kill()


def run_helper(serve: Callable[..., Any], pipe: Connection, *arguments: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the end of the pipe ends a helper
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asyncio.run(serve(pipe, *arguments))


async def end_of(pipe: Connection, take: Callable[[Any], None]) -> None:
    """Hands what comes over `pipe` to `take`, until the other end is closed."""
    over = asyncio.Event()

    def ready() -> None:
        try:
            take(pipe.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(pipe.fileno())
            over.set()

    asyncio.get_running_loop().add_reader(pipe.fileno(), ready)
    await over.wait()


Arrival = tuple[float, str]  # seconds since the epoch; the X-ChronoTask-Scheduled-For header


class TargetConnection(asyncio.Protocol):
    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
    HEADER = re.compile(rb"(?i)\r\nx-chronotask-scheduled-for: *([^\r]*)")

    def __init__(self, arrived: Callable[[Arrival], None]) -> None:
        self.arrived, self.buffer = arrived, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        *heads, self.buffer = (self.buffer + data).split(b"\r\n\r\n")  # requests of tasks that send no body
        for head in heads:
            slot = self.HEADER.search(head)
            self.arrived((time.time(), slot[1].decode() if slot else ""))
            self.transport.write(self.ANSWER)


async def serve_target(pipe: Connection) -> None:
    """Answers every request with 200. Sent `(count, seconds)`, it forgets what came before, and sends back its arrivals
    when there are so many or when the time is over."""
    loop = asyncio.get_running_loop()
    arrivals: list[Arrival] = []
    wanted = 0
    timer: asyncio.TimerHandle | None = None

    def expect(order: tuple[int, float]) -> None:
        nonlocal wanted, timer
        wanted = order[0]
        arrivals.clear()
        timer = loop.call_later(order[1], report)

    def report() -> None:
        nonlocal wanted
        wanted = 0
        if timer is not None:
            timer.cancel()
        pipe.send(arrivals)

    def arrived(arrival: Arrival) -> None:
        arrivals.append(arrival)
        if len(arrivals) == wanted:
            report()

    server = await loop.create_server(lambda: TargetConnection(arrived), HOST, 0, backlog=4096)
    pipe.send(server.sockets[0].getsockname()[1])
    await end_of(pipe, expect)


async def serve_bare(pipe: Connection, document: dict[str, Any]) -> None:
    """What aiohttp can do: a handler that parses what it is sent and answers with `document` as JSON."""

    async def create(http: web.Request) -> web.Response:
        await http.json()
        return web.json_response(document, status=201)

    async def get(http: web.Request) -> web.Response:
        return web.json_response(document)

    app = web.Application()
    app.add_routes([web.post(API + "/tasks", create), web.get(API + "/tasks/{id}", get)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    pipe.send(runner.addresses[0][1])
    await end_of(pipe, lambda _: None)


# ======================================================================================================================
# What the measures share
# ======================================================================================================================


@dataclass
class Bench:
    sizes: Sizes
    folder: Path
    target: Helper
    sleep_lateness: float | None = None  # ms, p99 of a bare sleep, once it was measured
    histories: dict[int, tuple[Path, int]] = field(default_factory=dict)
    serial: Iterator[int] = field(default_factory=itertools.count)

    def fresh(self) -> Path:
        """A folder for a database that does not exist yet."""
        folder = self.folder / str(next(self.serial))
        folder.mkdir()
        return folder

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.target.port}/"

    def http_task(self, **more: object) -> dict[str, object]:
        return {"name": "bench", "task_type": "http", "config": {"url": self.url}, **more}

    def expect(self, count: int, seconds: float) -> None:
        self.target.pipe.send((count, seconds))

    def arrivals(self) -> list[Arrival]:
        return list(self.target.receive())


def bash_task(command: str, **config: object) -> dict[str, object]:
    return {"name": "bench", "task_type": "bash", "config": {"command": command, **config}, "max_retries": 0}


def clone(database: Path, table: str, total: int) -> None:
    """Copies the rows of `table` until there are `total`. Knows the table's name and its `id`, nothing else."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        described = connection.execute(f"PRAGMA table_info({table})").fetchall()
        columns = ", ".join(str(column[1]) for column in described if column[1] != "id")
        have = int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
        while 0 < have < total:
            copied = min(have, total - have)
            connection.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {table} LIMIT {copied}")
            have += copied
        connection.commit()


def make_history(bench: Bench, count: int) -> tuple[Path, int]:
    """A folder with a database that holds a task with `count` finished executions, and the task's id. Made once."""
    if count not in bench.histories:
        folder = bench.fresh()
        with Service(folder, HISTORY_PER_TASK=0) as service:
            task = service.create("/tasks", [bash_task("echo a line of output")])[0]
            runs = [request("POST", f"{API}/tasks/{task}/execute?wait=30") for _ in range(min(count, 50))]
            checked(drive(service.port, runs, 10)[0])
        clone(folder / "chronotask.db", "executions", count)
        bench.histories[count] = folder, task
    return bench.histories[count]


def recorded(service: Service, schedules: set[int]) -> list[dict[str, Any]]:
    """The finished executions of `schedules`, read page by page, newest first."""
    rows: list[dict[str, Any]] = []
    before = ""
    while len(rows) < len(schedules):
        page = service.call("GET", f"{API}/executions?limit=1000&output=none{before}")
        rows += [row for row in page["executions"] if row["schedule_id"] in schedules and row["finished_at"]]
        if page["next_before_id"] is None:
            break
        before = f"&before_id={page['next_before_id']}"
    return rows


class Burst(NamedTuple):
    seconds: float  # from the due instant to the last finished_at
    arrivals: list[float]  # at the target: seconds after the due instant
    cpu: float
    succeeded: int


def make_due(service: Service, tasks: Sequence[int], count: int, lead: float) -> tuple[float, set[int]]:
    """Deals `count` new once-schedules out to `tasks`, all for one instant, `lead` seconds from now or later. Gives the
    instant and their ids."""
    overlap = "skip" if len(tasks) >= count else "allow"
    while True:
        due = time.time() + lead
        body = {"schedule_type": "once", "schedule_config": {"datetime": iso(due)}, "overlap": overlap}
        posts = [request("POST", API + "/schedules", {**body, "task_id": tasks[k % len(tasks)]}) for k in range(count)]
        answers = drive(service.port, posts, CONNECTIONS)[0]
        if time.time() < due - 0.1:
            return due, {document["id"] for document in checked(answers)}
        time.sleep(1)  # what was made too late runs now, and is not of the burst
        lead *= 2


def fall_due(bench: Bench, service: Service, tasks: Sequence[int], count: int, lead: float, patience: float) -> Burst:
    """Looks at a burst once all of it has reached the target, or when `patience` (seconds) is over."""
    due, ids = make_due(service, tasks, count, lead)
    time.sleep(due - 0.05 - time.time())
    before = cpu_of(service.pid)
    bench.expect(count, 0.05 + patience)
    arrivals = [at - due for at, _ in bench.arrivals()]
    time.sleep(0.2)  # the last ones are being recorded: leave the service alone
    cpu = cpu_of(service.pid) - before
    give_up = time.monotonic() + 10
    while len(rows := recorded(service, ids)) < count and time.monotonic() < give_up:
        time.sleep(0.2)
    seconds = max(instant(row["finished_at"]) for row in rows) - due
    return Burst(seconds, arrivals, cpu, sum(row["status"] == "succeeded" for row in rows))


# ======================================================================================================================
# Limits that are measured in this process
# ======================================================================================================================


def bare_requests(url: str, count: int) -> Pair:
    """Seconds, and seconds of CPU, for `count` requests as the service makes them, through one ClientSession."""

    async def run() -> None:
        numbers = iter(range(count))
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:

            async def work() -> None:
                for number in numbers:
                    headers = {
                        "User-Agent": "ChronoTask/0.0.0",
                        "X-ChronoTask-Execution-Id": str(number),
                        "X-ChronoTask-Scheduled-For": "2026-01-01T00:00:00Z",
                        "X-ChronoTask-Attempt": "1",
                        "Idempotency-Key": "00000000-0000-4000-8000-000000000000",
                    }
                    async with session.get(url, headers=headers) as response:
                        await response.read()

            async with asyncio.timeout(DEADLINE):
                await asyncio.gather(*(work() for _ in range(REQUESTS_AT_ONCE)))

    start, cpu = time.perf_counter(), time.process_time()
    asyncio.run(run())
    return time.perf_counter() - start, time.process_time() - cpu


def bare_spawns(count: int) -> float:
    """Seconds for `count` times `bash -c true`."""

    async def run() -> None:
        numbers = iter(range(count))

        async def work() -> None:
            for _ in numbers:
                process = await asyncio.create_subprocess_exec("bash", "-c", "true")
                await process.wait()

        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*(work() for _ in range(SPAWNS_AT_ONCE)))

    if sys.version_info < (3, 12):  # from 3.12 on it is the one that asyncio takes by itself
        asyncio.get_event_loop_policy().set_child_watcher(asyncio.PidfdChildWatcher())
    start = time.perf_counter()
    asyncio.run(run())
    return time.perf_counter() - start


def bare_sleeps(firsts: Sequence[float], seconds: int) -> list[float]:
    """Milliseconds by which `asyncio.sleep` is late for each of `firsts` and for every second after it."""
    late: list[float] = []

    async def one(first: float) -> None:
        for due in (first + second for second in range(seconds)):
            await asyncio.sleep(due - time.time())
            late.append((time.time() - due) * 1000)

    async def run() -> None:
        await asyncio.gather(*(one(first) for first in firsts))

    asyncio.run(run())
    return late


def bare_dumps(page: object, count: int) -> list[float]:
    """Milliseconds that each of `count` serialisations of `page` took."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        json.dumps(page).encode()
        times.append((time.perf_counter() - start) * 1000)
    return times


def bare_import() -> Pair:
    """Seconds until a new Python has imported aiohttp, and its resident memory then."""
    start = time.perf_counter()
    code = "import aiohttp, sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        seconds, memory = time.perf_counter() - start, memory_of(process.pid)
        process.stdin.close()
    return seconds, float(memory)


# ======================================================================================================================
# The measures
# ======================================================================================================================


def footprint(bench: Bench) -> Iterator[Row]:
    starts: dict[bool, list[Pair]] = {False: [], True: []}
    memories: dict[bool, list[Pair]] = {False: [], True: []}
    for as_script in [False, True] * bench.sizes.rounds:
        seconds, memory = bare_import()
        with Service(bench.fresh(), as_script=as_script) as service:
            starts[as_script].append((service.started_in, seconds))
            memories[as_script].append((memory_of(service.pid) / 1e6, memory / 1e6))
    yield at_most(2.5, compared("start to /health, new database", "s", starts[False]))
    yield compared("the same of a script, compiled each time", "s", starts[True])
    yield at_most(1.6, compared("resident memory, fresh", "MB", memories[False]))
    yield at_most(2.2, compared("the same of a script", "MB", memories[True]))


def requests(bench: Bench) -> Iterator[Row]:
    count = bench.sizes.requests
    with Service(bench.fresh()) as service:
        body = bench.http_task(description="what a client sends")
        document = service.call("POST", API + "/tasks", body)
        posts = [request("POST", API + "/tasks", body)] * count
        gets = [request("GET", f"{API}/tasks/{document['id']}")] * count

        def rate(port: int, what: list[bytes]) -> float:
            answers, seconds = drive(port, what, CONNECTIONS)
            checked(answers)
            return count / seconds

        with Helper(serve_bare, document) as bare:
            pairs = [
                [(rate(service.port, what), rate(bare.port, what)) for what in (posts, gets)]
                for _ in range(bench.sizes.rounds)
            ]  # fmt: skip
    yield at_least(0.45, compared("POST /tasks", "/s", [pair[0] for pair in pairs]))
    yield at_least(0.60, compared("GET /tasks/{id}", "/s", [pair[1] for pair in pairs]))


def read_times(service: Service, path: str, count: int) -> list[float]:
    """Milliseconds of each of `count` GETs of `path`, one after the other."""
    answers, _ = drive(service.port, [request("GET", API + path)] * count)
    checked(answers[:1])
    return [answer.seconds * 1000 for answer in answers]


def pages(bench: Bench) -> Iterator[Row]:
    sizes = bench.sizes
    folder, task = make_history(bench, sizes.history)
    with Service(folder, HISTORY_PER_TASK=0, HISTORY_DAYS=0) as service:
        service.create("/tasks", [bench.http_task(description="one of many") for _ in range(sizes.tasks - 1)])
        for name, path in (
            (f"GET /tasks?limit=100, {sizes.tasks:,} tasks, p99", "/tasks?limit=100"),
            (f"GET history, {sizes.history:,} rows, p99", f"/tasks/{task}/history"),
        ):
            page = service.call("GET", API + path)
            pairs = [
                (percentile(read_times(service, path, reads), 99), percentile(bare_dumps(page, reads), 99))
                for reads in [sizes.page_reads] * sizes.rounds
            ]
            yield at_most(4.5, compared(name, "ms", pairs))


def lateness(bench: Bench) -> Iterator[Row]:
    seconds = bench.sizes.lateness_seconds
    with Service(bench.fresh()) as service:
        tasks = service.create("/tasks", [bench.http_task()] * 100)
        timing = {"schedule_type": "interval", "schedule_config": {"seconds": 1}}
        for task in tasks:
            service.call("POST", API + "/schedules", {"task_id": task, **timing})
        planned = service.call("GET", API + "/schedules?limit=1000")["schedules"]
        start = time.time() + bench.sizes.settle
        firsts = [start + (instant(schedule["next_run"]) - start) % 1 for schedule in planned]
        bench.expect(0, seconds + bench.sizes.settle + 1)
        slept = bare_sleeps(firsts, seconds)
        arrivals = [(at, instant(slot)) for at, slot in bench.arrivals()]
    late = [(at - slot) * 1000 for at, slot in arrivals if start <= slot < start + seconds]
    note = f"{len(late):,} of {100 * seconds:,} starts in {seconds} s"
    bench.sleep_lateness = percentile(slept, 99)
    yield compared("lateness of starts, p50", "ms", [(percentile(late, 50), percentile(slept, 50))], note)
    row = within(5, compared("lateness of starts, p99", "ms", [(percentile(late, 99), percentile(slept, 99))], note))
    yield judged(row, row.wanted, bool(row.met) and len(late) == 100 * seconds)


def bursts(bench: Bench, task: object, count: int, limit: Callable[[], Pair], patience: float) -> list[tuple[Burst, Pair]]:
    """Rounds of a burst of `count` tasks like `task`, and of `limit`: its seconds, and seconds of CPU."""
    rounds = []
    with Service(bench.fresh()) as service:
        start = time.monotonic()
        tasks = service.create("/tasks", [task] * count)
        lead = 0.5 + 2 * (time.monotonic() - start)
        for _ in range(bench.sizes.rounds):
            bare = limit()
            rounds.append((fall_due(bench, service, tasks, count, lead, patience * bare[0]), bare))
    return rounds


def burst_rate(floor: float, kind: str, count: int, rounds: Sequence[tuple[Burst, Pair]]) -> Row:
    rates = [(count / burst.seconds, count / bare[0]) for burst, bare in rounds]
    missing = sum(count - burst.succeeded for burst, _ in rounds)
    note = f"{missing:,} NOT recorded as succeeded" if missing else "all recorded"
    row = at_least(floor, compared(f"{kind} executions, {count:,} due at once", "/s", rates, note))
    return judged(row, row.wanted, bool(row.met) and not missing)


def http_burst(bench: Bench) -> Iterator[Row]:
    count = bench.sizes.http_burst
    rounds = bursts(bench, bench.http_task(), count, lambda: bare_requests(bench.url, count), 20)
    row = burst_rate(0.55, "HTTP", count, rounds)
    arrived = statistics.median(count / max(burst.arrivals) for burst, _ in rounds)
    yield replace(row, note=f"{row.note}; by the last arrival {arrived:,.0f}/s")
    cpu = [(burst.cpu / count * 1e6, bare[1] / count * 1e6) for burst, bare in rounds]
    yield at_most(2.5, compared("CPU of an HTTP execution", "us", cpu))
    first = statistics.median(min(burst.arrivals) * 1000 for burst, _ in rounds)
    row = Row("lateness of the first start of that burst", first, "ms", bench.sleep_lateness)
    yield row if row.limit is None else within(5, row)


def bash_burst(bench: Bench) -> Iterator[Row]:
    count = bench.sizes.bash_burst
    rounds = bursts(bench, bash_task("true"), count, lambda: (bare_spawns(count), 0.0), 3)
    yield burst_rate(0.85, "bash", count, rounds)


def make_schedules(bench: Bench, count: int) -> tuple[Path, int]:
    """A folder with a database of `count` schedules, none due soon (40 cron expressions, and intervals), and the memory
    of a service without any."""
    folder = bench.fresh()
    timings: list[tuple[str, dict[str, object]]] = [("cron", {"expression": f"{minute} 3 29 2 *"}) for minute in range(40)]
    timings += [("interval", {"seconds": 100_000_000 + second}) for second in range(10)]
    with Service(folder) as service:
        time.sleep(bench.sizes.settle)
        empty = memory_of(service.pid)
        task = service.create("/tasks", [bench.http_task()])[0]
        bodies = [{"task_id": task, "schedule_type": kind, "schedule_config": config} for kind, config in timings]
        service.create("/schedules", bodies)
    clone(folder / "chronotask.db", "schedules", count)
    return folder, empty


def schedules(bench: Bench) -> Iterator[Row]:
    count, seconds = bench.sizes.schedules, bench.sizes.idle_seconds
    folder, empty = make_schedules(bench, count)
    with Service(folder) as service:
        time.sleep(bench.sizes.settle)
        each = (memory_of(service.pid) - empty) / count
        before = cpu_of(service.pid)
        time.sleep(seconds)
        idle = (cpu_of(service.pid) - before) / seconds * 100
        total = service.call("GET", API + "/schedules?limit=1")["total"]
    if total != count:
        raise RuntimeError(f"{total:,} of {count:,} schedules are there")
    yield under(1024, Row(f"memory of a schedule, {count:,} of them", each, "B"))
    yield under(2, Row(f"start to /health, {count:,} schedules", service.started_in, "s"))
    yield under(0.5, Row(f"CPU while idle, {count:,} schedules", idle, "% of a core"))


def memory(bench: Bench) -> Iterator[Row]:
    count = bench.sizes.executions
    with Service(bench.fresh()) as service:
        task = service.create("/tasks", [bench.http_task()])[0]
        execute = request("POST", f"{API}/tasks/{task}/execute")

        def run(executions: int) -> None:
            bench.expect(executions, 30.0)
            checked(drive(service.port, [execute] * executions, CONNECTIONS)[0])
            assert len(bench.arrivals()) == executions, "some executions did not reach the target in 30 s"

        run(1000)
        time.sleep(bench.sizes.settle)
        early = memory_of(service.pid)
        for done in range(1000, count, 1000):
            run(min(1000, count - done))
        time.sleep(bench.sizes.settle)
        pair = memory_of(service.pid) / 1e6, early / 1e6
    yield at_most(1.1, compared(f"memory after {count:,} executions : after 1,000", "MB", [pair]))


def retention(bench: Bench) -> Iterator[Row]:
    count = bench.sizes.deleted
    folder, task = make_history(bench, count)
    busy, quiet = list[float](), list[float]()

    def write(service: Service, into: list[float]) -> None:
        answers = drive(service.port, [request("POST", API + "/tasks", bench.http_task())] * 100)[0]
        checked(answers)
        into += [answer.seconds * 1000 for answer in answers]

    with Service(folder, HISTORY_PER_TASK=1000) as service:
        start, left = time.monotonic(), count
        while left > 1000 and time.monotonic() < start + 30 + count / 10_000:
            write(service, busy)
            left = service.call("GET", f"{API}/tasks/{task}/history?limit=1&output=none")["total"]
        seconds = time.monotonic() - start
        for _ in range(2 * bench.sizes.rounds):
            write(service, quiet)
    del bench.histories[count]
    note = f"{count - left:,} of {count:,} rows deleted in {seconds:.1f} s; slowest write {max(busy):.0f} ms"
    pair = percentile(busy, 99), percentile(quiet, 99)
    yield compared("POST /tasks during retention, p99", "ms", [pair], note)


def observe(bench: Bench, service: Service, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds: answers of /health, and lateness of starts at the target, while `seconds` pass."""
    health: list[float] = []
    bench.expect(0, seconds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = drive(service.port, [request("GET", "/health")])[0][0]
        health.append(answer.seconds * 1000 if answer.status == 200 else math.inf)
        time.sleep(0.02)
    return health, [(at - instant(slot)) * 1000 for at, slot in bench.arrivals()]


def hostile(bench: Bench) -> Iterator[Row]:
    seconds = bench.sizes.hostile_seconds
    attacks = [
        bash_task(f"head -c {bench.sizes.output_bytes} /dev/zero", timeout=60),
        bash_task("exec yes", timeout=seconds),
        bash_task(f"for i in {{1..300}}; do sleep {seconds} & done; wait", timeout=60),
    ]
    with Service(bench.fresh()) as service:
        timing = {"schedule_type": "interval", "schedule_config": {"seconds": 1}}
        for task in service.create("/tasks", [bench.http_task()] * 50):
            service.call("POST", API + "/schedules", {"task_id": task, **timing})
        time.sleep(bench.sizes.settle)
        quiet = observe(bench, service, seconds)
        for task in service.create("/tasks", attacks):
            service.call("POST", f"{API}/tasks/{task}/execute")
        busy = observe(bench, service, seconds)
        peak = memory_of(service.pid, "VmHWM") / 1e6
    for name, some, few in (("/health", busy[0], quiet[0]), ("starts of others", busy[1], quiet[1])):
        note = f"worst {max(some):.0f} ms, {len(some)} seen; peak memory {peak:.0f} MB"
        yield compared(f"{name} among hostile tasks, p99", "ms", [(percentile(some, 99), percentile(few, 99))], note)


EXPRESSIONS = (
    "* * * * *", "*/5 * * * *", "0 * * * *", "30 2 * * *", "0 0 * * 0", "15 10 L * *", "0 9 * * MON-FRI", "0 0 29 2 *",
    "0 12 * * MON#2", "0 0 * * L5", "5,35 1-3 * * *", "0 0 1,15 * FRI", "*/7 */3 */2 */5 *", "0 0 31 12 *", "59 23 31 1,3,5 *",
    "* * * * * *", "*/10 * * * * *", "30 30 2 * * *", "0 0 0 1 1 *", "@hourly", "@daily", "@weekly", "@monthly", "@yearly",
)  # fmt: skip
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia", "Africa/Casablanca")
CHANGES = ("2011-12-29T23:59:30Z", "2011-12-30T10:00:00Z", "2024-03-10T06:59:59Z", "2024-03-31T00:59:59Z",
           "2024-10-27T00:30:00Z", "2024-11-03T05:30:00Z", "2024-04-06T15:00:01Z", "2096-02-29T00:00:00Z")  # fmt: skip


def cron(bench: Bench) -> Iterator[Row]:
    slowest = 0.0, ""
    cases = list(itertools.product(EXPRESSIONS, ZONES))
    with Service(bench.fresh()) as service:
        for expression, zone in cases[:: 10 if bench.sizes.rounds == 1 else 1]:
            body = {"schedule_type": "cron", "schedule_config": {"expression": expression, "timezone": zone}, "count": 1}
            asked = ({**body, "after": after} for after in (iso(time.time()), *CHANGES))
            answers = drive(service.port, [request("POST", API + "/schedules/preview", it) for it in asked])[0]
            checked(answers)  # the first one pays for checking a new expression
            slowest = max(slowest, (max(answer.seconds for answer in answers[1:]) * 1000, f"{expression} in {zone}"))
    yield under(50, Row("slowest next slot of a cron expression", slowest[0], "ms", note=slowest[1]))


def growth_row(what: str, sizes: Sequence[int], seconds: Sequence[float]) -> Row:
    """The growth from the first to the last size, beside that of n log n."""
    first, last = sizes[0], sizes[-1]
    limit = last * math.log(last) / (first * math.log(first))
    grown = seconds[-1] / seconds[0]
    power = math.log(grown) / math.log(last / first)
    steps = ", ".join(f"{size:,}: {value:.3g} s" for size, value in zip(sizes, seconds, strict=True))
    return at_most(1, Row(f"growth of {what}", grown, "x", limit, grown / limit, note=f"{steps}; n^{power:.2f}"))


def growth(bench: Bench) -> Iterator[Row]:
    sizes = bench.sizes.growth
    if not sizes:
        return
    with Service(bench.fresh()) as service:
        tasks = service.create("/tasks", [bench.http_task()] * 1000)
        seconds = [fall_due(bench, service, tasks, size, 1 + size / 500, 2 + size / 200).seconds for size in sizes]
    yield growth_row("a burst", sizes, seconds)
    starts, lists = [], []
    for size in sizes:
        folder, _ = make_schedules(bench, size)
        clone(folder / "chronotask.db", "tasks", size)
        with Service(folder) as service:
            starts.append(service.started_in)
            lists.append(statistics.median(read_times(service, "/tasks?limit=100", 100)) / 1000)
    yield growth_row("start to /health", sizes, starts)
    yield growth_row("GET /tasks?limit=100", sizes, lists)


def spread(database: Path, table: str, total: int, **changed: str) -> None:
    """Copies the last row of `table` until there are `total`, with `changed` columns: SQL in which n is the number of the row.
    The service's own triggers count them."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.executescript("PRAGMA cache_size=-400000; PRAGMA synchronous=OFF")
        columns = [str(column[1]) for column in connection.execute(f"PRAGMA table_info({table})") if column[1] != "id"]
        connection.execute(
            f"""WITH RECURSIVE numbers(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM numbers WHERE n < {total})
            INSERT INTO {table} ({", ".join(columns)}) SELECT {", ".join(changed.get(name, name) for name in columns)}
            FROM (SELECT * FROM {table} ORDER BY id DESC LIMIT 1) CROSS JOIN numbers"""
        )
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def make_many(bench: Bench, tasks: int, schedules: int, executions: int) -> Path:
    """A folder with a database of so many, of which some are rare; the second task has a third of the executions."""
    folder = bench.fresh()
    with Service(folder) as service:
        task = service.create("/tasks", [bash_task("true")])[0]
        service.create("/schedules", [{"task_id": task, "schedule_type": "interval", "schedule_config": {"seconds": 10**8}}])
        service.call("POST", f"{API}/tasks/{task}/execute?wait=30")
    database = folder / "chronotask.db"
    spread(database, "tasks", tasks, name="'task ' || n || ' of many'", status="iif(n % 100, 'active', 'paused')")
    spread(database, "schedules", schedules, task_id=f"1 + n % {tasks}", next_fire="next_fire + n * 1000000")
    spread(
        database, "executions", executions, task_id=f"iif(n % 3, 1 + n % {tasks}, 2)", schedule_id=f"n % {schedules}",
        trigger="iif(n % 50000, 'schedule', 'rerun')", scheduled_for="queued_at + n",
        status="CASE WHEN n % 10000 = 1 THEN 'failed' WHEN n % 3000 = 2 THEN 'skipped' ELSE status END",
    )  # fmt: skip
    return folder


def many(bench: Bench) -> Iterator[Row]:
    small, large = (1_000, 1_000, 1_000), bench.sizes.many
    tasks, schedules, executions = large
    figures: list[dict[str, float]] = []
    for size in (small, large):
        pages = {
            "executions": f"{API}/executions", "executions, rare status": f"{API}/executions?status=failed",
            "executions, rare trigger": f"{API}/executions?trigger=rerun",
            "executions of a schedule": f"{API}/executions?schedule_id=7",
            "history, rare status": f"{API}/tasks/2/history?status=skipped", "tasks": f"{API}/tasks",
            "tasks, last page": f"{API}/tasks?skip={size[0] - 100}", "tasks, rare status": f"{API}/tasks?status=disabled",
            "tasks, search": f"{API}/tasks?q=task+777+", "schedules": f"{API}/schedules",
            "schedules, last page": f"{API}/schedules?skip={size[1] - 100}", "scheduler/status": f"{API}/scheduler/status",
            "overview": f"{API}/overview?limit=20", "upcoming": f"{API}/upcoming", "metrics": "/metrics",
        }  # fmt: skip
        with Service(make_many(bench, *size), HISTORY_DAYS=0, HISTORY_PER_TASK=0) as service:
            figures.append({"start to /health": service.started_in * 1000})
            time.sleep(bench.sizes.settle)
            before = cpu_of(service.pid)
            time.sleep(bench.sizes.idle_seconds)
            figures[-1]["idle"] = (cpu_of(service.pid) - before) / bench.sizes.idle_seconds * 100
            for name, path in pages.items():
                answers, _ = drive(service.port, [request("GET", path)] * min(30, bench.sizes.page_reads))
                figures[-1][name] = statistics.median(answer.seconds for answer in answers) * 1000
                if answers[-1].status != 200:
                    raise RuntimeError(f"{path}: {answers[-1].body[:300]!r}")
            reads = [request("GET", f"{API}/tasks?limit=100")] * bench.sizes.page_reads * 5
            figures[-1]["callers"] = len(reads) / drive(service.port, reads, 16)[1]
            posts = [request("POST", f"{API}/tasks", bash_task("true"))] * 200
            alone = statistics.median(answer.seconds for answer in drive(service.port, posts)[0])
            started = time.perf_counter()
            service.call("DELETE", f"{API}/tasks/2")
            figures[-1]["delete"] = time.perf_counter() - started
            meanwhile = statistics.median(answer.seconds for answer in drive(service.port, posts)[0])
            figures[-1]["creates"] = meanwhile / alone
    few, grown = figures
    size_note = f"{tasks:,} tasks, {schedules:,} schedules, {executions:,} executions"
    for name, value in grown.items():
        if name not in ("idle", "callers", "delete", "creates"):
            yield Row(name, value, "ms", few[name], value / few[name], note=size_note)
    yield under(1, Row(f"CPU while idle, {size_note}", grown["idle"], "% of a core"))
    yield Row("100 tasks a page, 16 callers", grown["callers"], "/s", few["callers"], grown["callers"] / few["callers"])
    yield under(6, Row("DELETE of the task with a third of the history", grown["delete"], "s"))
    yield under(3, Row("POST /tasks while its rows are deleted, beside before", grown["creates"], "x"))


MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "footprint": footprint, "requests": requests, "pages": pages, "lateness": lateness, "burst": http_burst, "bash": bash_burst,
    "schedules": schedules, "memory": memory, "retention": retention, "hostile": hostile, "cron": cron, "growth": growth,
    "many": many,
}  # fmt: skip


# ======================================================================================================================
# Table and command line
# ======================================================================================================================


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, which is also readable as it is."""
    cells = [("measure", "figure", "limit", "ratio", "wanted", "met", "note")]
    for row in rows:
        figure, limit = (f"{number(value)} {row.unit}" if value is not None else "-" for value in (row.figure, row.limit))
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        cells.append((row.measure, figure, limit, ratio, row.wanted, {None: "-", True: "yes", False: "NO"}[row.met], row.note))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def machine() -> dict[str, object]:
    return {
        "python": platform.python_version(), "aiohttp": aiohttp.__version__, "sqlite": sqlite3.sqlite_version,
        "cores": os.cpu_count(), "system": platform.system() + " " + platform.machine(), "at": iso(int(time.time())),
    }  # fmt: skip


def measure(names: Iterable[str], sizes: Sizes) -> tuple[list[Row], list[str]]:
    """The rows of all measures, and the names of those that failed."""
    rows: list[Row] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-chronotask-") as folder, Helper(serve_target) as target:
        bench = Bench(sizes, Path(folder), target)
        for name in names:
            start = time.monotonic()
            try:
                rows += MEASURES[name](bench)
            except Exception:  # one broken measure must not cost the others
                traceback.print_exc()
                failed.append(name)
            print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    return rows, failed


def against(other: Path, names: Sequence[str], sizes: Sizes) -> tuple[list[Row], list[str]]:
    """The figures of this program beside those of `other` (as `limit`), measured in turns; the ratio is of their medians."""
    found: dict[Path, list[list[Row]]] = {PROGRAM: [], other: []}
    failed: list[str] = []
    for name in names:
        for _ in range(ROUNDS_AGAINST):
            for Service.program in found:
                rows, broken = measure([name], replace(sizes, rounds=1))
                found[Service.program].append(rows)
                failed += broken
    both: dict[str, tuple[Row, tuple[list[float], list[float]]]] = {}
    for side, program in enumerate(found):
        for row in itertools.chain.from_iterable(found[program]):
            both.setdefault(row.measure, (row, ([], [])))[1][side].append(row.figure)
    rows = []
    for row, (ours, theirs) in both.values():
        figure, limit = statistics.median(ours), statistics.median(theirs)
        rows.append(Row(row.measure, figure, row.unit, limit, figure / limit if limit else None))
    return rows, failed


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures ChronoTask next to the machine's own limits.")
    parser.set_defaults(mode="default")
    modes = parser.add_mutually_exclusive_group()
    for mode, text in (("quick", "under 2 minutes"), ("smoke", "seconds; only shows that it works"), ("full", "with growth")):
        modes.add_argument("--" + mode, dest="mode", action="store_const", const=mode, help=text)
    parser.add_argument("--json", metavar="FILE", help="write JSON too (-: to standard output, instead of the table)")
    parser.add_argument("--only", metavar="NAME", action="append", choices=MEASURES, help="one measure: " + ", ".join(MEASURES))
    parser.add_argument("--against", metavar="MODULE", type=Path, help="another chronotask.py, measured beside this one")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    for name in list(os.environ):
        if not ENVIRONMENT.fullmatch(name):
            del os.environ[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are stopped then, too
    names, sizes = options.only or list(MEASURES), SIZES[options.mode]
    rows, failed = measure(names, sizes) if options.against is None else against(options.against.resolve(), names, sizes)
    report = {"mode": options.mode, "machine": machine(), "failed": failed, "rows": [asdict(row) for row in rows]}
    if options.json and options.json != "-":
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    if options.json == "-":
        print(json.dumps(report, indent=2))
    else:
        print(", ".join(f"{name} {value}" for name, value in machine().items()), end=f"; sizes: {options.mode}\n\n")
        print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the service and the helpers are stopped by now
        sys.exit(130)
