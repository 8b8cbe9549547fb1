#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.3,<4", "croniter>=6.0.0", "mcp>=2.3.0"]
# ///
"""ChronoTask: a lightweight, reliable task scheduler in one module.

HTTP requests and bash commands, fired by cron, once and interval schedules, or after each other; a REST API, an MCP
server for AI assistants, and a history in SQLite that survives restarts and `kill -9`.

The words, one meaning each
    task        what to do: an HTTP request or a bash command
    schedule    when a task fires: at its slots, or after executions of other tasks
    key         a name of a task or schedule for programs and files: `key:NAME` stands wherever an id may
    slot        one planned instant of a schedule
    claim       to turn a slot that is due into an execution, and move its schedule on
    execution   one run of a task, past, present or queued; it has one or more attempts
    attempt     one try at it
    cause       the execution, and what it came to, after which a schedule of type `after` fired another one
    tick        one transaction of the engine: finish what has ended, claim what is due, start what is ready
    take up     to follow what was written, by this process or another
    leader      the one process on a database that fires schedules and runs executions
    job         an asyncio task (never called a task here)

How an execution lives
    request → model → Service.use_case → Store ←──── Changes (poll, take up) → feed, who waits
                                           ↑                  │ timers
     TimerQueue → Engine.tick: finish → claim → start: one transaction
                       └→ attempt: run_bash | run_http → Outcome ─┐
                       ↑                                          │
                       └────── decide_end (retry, or the end) ←───┘
    Leadership switches the Engine on and off; Retention deletes what is old.

Where to add something
    a field of a task, schedule or execution    its declaration (3) and a migration (6)
    a setting                                   a line of Settings (1)
    an operation of REST and MCP                a method of Service (11), or below it a function that takes it, where it only
                                                looks: signature, docstring, @Operation
    a kind of schedule                          a Timing and a line of make_timing (2), its line of SCHEDULE_CONFIGS (3)
    an event of `after`                         EVENTS (2), AfterEvent (3) and events_of (4)

The sections, bottom-up: each uses only names from sections above it. A test holds them to it.
     1 Errors and settings   the error tree, the settings; never reads os.environ itself
     2 Schedules (pure)      the timings Cron, Once, Interval and After, their slots and words; no clock, no I/O
     3 Resources             tasks, schedules, executions, each declared once; configurations, masks; no SQL, HTTP or MCP
     4 Decisions (pure)      due slots, overlap, ends of attempts, what follows them, a clock that was set; no clock, no I/O
     5 Clock and timers      the only reads of wall and monotonic time, time limits; a heap of when something is due
     6 Store                 migrations, transactions, queries, file locks; decides nothing, reads no clock
     7 Executors             run_bash, run_http: a config in, an Outcome out; secrets, limits, output; do not see the store
     8 Engine                the scheduler loop, attempts, the feed of events, who waits; does not know requests, JSON or MCP
     9 Changes               taking up what was written, whoever wrote it; retention
    10 Leadership            which process fires and runs; what a dead one left
    11 Service               the use cases, each an operation; one way to change something
    12 Files                 apply, export, and crontabs: definitions in a file
    13 REST                  routes, error answers, OpenAPI; holds no rule of the business
    14 MCP                   tools, resources, transports; holds no rule of the business
    15 Main                  command line, wiring, signals, order of shutdown

All instants are integers: microseconds since the epoch, UTC. Durations are seconds.
"""

from __future__ import annotations

import ctypes
import sys

if __name__ == "__main__" and sys.platform == "linux":
    # PR_SET_DUMPABLE, before anything else is imported: tasks of the same user shall read neither memory nor environment.
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)

import os
import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it serves, Ctrl-C ends it without a trace
    if os.getpid() == 1:  # which gets no signal that it has no handler for
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os._exit(128 + number))

import argparse
import asyncio
import atexit
import base64
import bisect
import calendar
import codecs
import concurrent.futures
import contextlib
import contextvars
import copy
import dataclasses
import difflib
import email.utils
import enum
import errno
import fcntl
import functools
import gc
import grp
import hashlib
import heapq
import hmac
import html
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import pwd
import queue
import random
import re
import resource
import select
import shlex
import shutil
import socket
import sqlite3
import ssl
import stat
import subprocess
import tempfile
import threading
import time
import tomllib
import traceback
import urllib.parse
import uuid
import weakref
import zlib
import zoneinfo
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    BinaryIO,
    ClassVar,
    Literal,
    NamedTuple,
    NotRequired,  # pydantic reads those of `typing` only from 3.12 on
    Required,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import aiohttp
import yarl
from aiohttp import web
from multidict import CIMultiDict
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    WrapValidator,
    create_model,
)
from pydantic_core import from_json, to_json
from typing_extensions import TypedDict, is_typeddict

__version__ = "1.1.0.dev0"
logger = logging.getLogger("chronotask")
T = TypeVar("T")


# ======================================================================================================================
# 1. Errors and settings
# ======================================================================================================================


class FieldError(NamedTuple):
    """One refused field: its dotted path (`config.url`) and what would be accepted."""

    field: str
    message: str


class ChronoTaskError(Exception):
    """An error whose text is meant for the caller. `status` is the HTTP status that REST answers with."""

    status, title = 500, "Internal error"

    def __init__(self, detail: str, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(detail)
        self.detail, self.errors = detail, tuple(errors)


def _answered(name: str, status: int, title: str) -> type[ChronoTaskError]:
    return type(name, (ChronoTaskError,), {"status": status, "title": title})


MalformedBody = _answered("MalformedBody", 400, "Malformed request")
Unauthorized = _answered("Unauthorized", 401, "Unauthorized")
Forbidden = _answered("Forbidden", 403, "Forbidden")
NotFound = _answered("NotFound", 404, "Not found")
MethodNotAllowed = _answered("MethodNotAllowed", 405, "Method not allowed")
RequestTimeout = _answered("RequestTimeout", 408, "Request timeout")
Conflict = _answered("Conflict", 409, "Conflict")
BodyTooLarge = _answered("BodyTooLarge", 413, "Body too large")
UnsupportedMedia = _answered("UnsupportedMedia", 415, "Unsupported media type")
TooManyRequests = _answered("TooManyRequests", 429, "Too many requests")
Unavailable = _answered("Unavailable", 503, "Unavailable")  # the database cannot be written, or the service is stopping


class InvalidInput(ChronoTaskError):
    """Input that was understood but cannot be accepted; `errors` names each bad field."""

    status, title = 422, "Invalid input"

    def __init__(self, *errors: FieldError) -> None:
        super().__init__("; ".join(f"{e.field}: {e.message}" if e.field else e.message for e in errors), errors)


@contextlib.contextmanager
def told_at(path: str, errors: list[FieldError]) -> Iterator[None]:
    """Adds what is refused to `errors`, as fields below `path`."""
    try:
        yield
    except InvalidInput as error:
        errors += [FieldError(path + name, message) for name, message in error.errors]


class StartupError(ChronoTaskError):
    """The program cannot start: it prints the text on one line and ends with `exit_status`."""

    def __init__(self, detail: str, exit_status: int = 1) -> None:
        super().__init__(detail)
        self.exit_status = exit_status


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is most likely a misspelling of, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6) if len(word) <= 100 else None
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, to be put behind a message; nothing when no known word is near."""
    hint = nearest(word, known)
    return f" (did you mean {hint}?)" if hint else ""


_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


def printable(text: str) -> str:
    """On one line, without control characters and a terminal's colours."""
    return " ".join("".join(char if char.isprintable() else " " for char in _COLOUR.sub("", text)).split())


def shown(value: object, limit: int = 80) -> str:
    """`value` as it may stand in a message: quoted, on one line, of bounded length."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@functools.lru_cache(maxsize=1024)
def load_zone(name: str) -> ZoneInfo:
    """The IANA time zone `name`. Raises ValueError, with the nearest known name, when there is none."""
    try:
        # Of these, "localtime" differs from machine to machine and "right/" counts leap seconds.
        if name.startswith(("posix", "right/")) or name == "localtime":
            raise ValueError
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # "America" is a folder: OSError
        known = sorted(zoneinfo.available_timezones() - {"localtime"})
        hint = did_you_mean(name.title().replace(" ", "_"), known) or " such as Europe/Berlin"
        raise ValueError(f"must be an IANA time zone{hint}") from None


ENV_PREFIX = "CHRONOTASK_"
SECRET_PREFIX = "CHRONOTASK_SECRET_"
LAUNCHER_PREFIX = "CHRONOTASK_LAUNCHER_"
# What a running task finds in its environment (section 7): one that starts ChronoTask itself must not be warned about it.
TASK_VARIABLES = ("TASK_ID", "TASK_NAME", "EXECUTION_ID", "SCHEDULE_ID", "SCHEDULED_FOR", "ATTEMPT", "RUN_ID")
# Settings that keep somebody out: who misspells one of them must not get a service that is open.
PROTECTIVE = ("API_TOKEN", "ALLOW_HOST_COMMANDS", "ALLOWED_", "BLOCK_PRIVATE_NETWORKS", "BASH_USER")
SCOPES = ("read", "run", "admin")  # each may do what those before it may
_Reader = Callable[[Any], Any]


def _text(pattern: str, allowed: str, convert: _Reader = str, many: bool = False, accepts: _Reader = lambda _: True) -> _Reader:
    """What reads a setting, or with `many` a tuple of them. It raises ValueError that says what is `allowed`."""
    matches = re.compile(pattern).fullmatch

    def read(text: str) -> Any:
        words = [word.strip() for word in text.split(",")] if many else [text]
        with contextlib.suppress(ValueError, KeyError):
            if text.isprintable() and all(map(matches, words)):
                values = tuple(map(convert, words))
                if all(map(accepts, values)):
                    return values if many else values[0]
        raise ValueError(f"must be {'a comma-separated list ' if many else ''}{allowed}")

    return read


def _number(low: int, high: int, kind: _Reader = float) -> _Reader:
    pattern, what = ("[0-9]{1,12}", "a whole number") if kind is int else (r"[0-9]{1,12}(\.[0-9]{1,6})?", "a number")
    return _text(pattern, f"{what} from {low} to {high}", kind, accepts=lambda number: low <= number <= high)


_path = _text(".+", "a path without control characters", lambda text: Path(text).absolute())
_sqlite_rule = "sqlite:///relative/path.db or sqlite:////absolute/path.db"
_sqlite_path = _text(r"sqlite:///[^?]+", _sqlite_rule, lambda text: _path(text.removeprefix("sqlite:///")))
_host = _text(r"[A-Za-z0-9._:-]+", "a host name or IP address to listen on")
_TOKEN, _token_rule = r"[\x21-\x7e]{8,4096}", "8 to 4096 visible ASCII characters"
_token = _text(_TOKEN, _token_rule)
_flag = _text("(?i)true|false|1|0|yes|no|on|off", "true or false", lambda text: text.lower() in {"true", "1", "yes", "on"})
_log_level = _text("(?i)DEBUG|INFO|WARNING|ERROR|CRITICAL", "one of DEBUG, INFO, WARNING, ERROR, CRITICAL", str.upper)
_public_url = _text(r"https?://(?!/)[^\s?#$]+", "a URL beginning with http:// or https://", lambda text: text.rstrip("/") + "/")
_user_rule = "a user of this machine, neither root nor the service's own"
_user = _text(".+", _user_rule, pwd.getpwnam, accepts=lambda user: user.pw_uid not in (0, os.geteuid()))
_words = _text(".+", "without empty entries or control characters", many=True)
_launcher_words = _text(
    ".+",
    "words as a shell splits them: a program first, and {env}, which stands for several words, not inside one",
    lambda text: tuple(shlex.split(text)),
    accepts=lambda words: words and words[0] and all(word == "{env}" or "{env}" not in word for word in words),
)
_ipv6 = r"\[?[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f.]*\]?"
_hosts = _text(rf"[A-Za-z0-9._-]+|{_ipv6}", "of host names, without scheme and port", str.lower, many=True)
_networks = _text(".+", "of networks, such as 10.0.0.0/8,192.168.1.7/32", ipaddress.ip_network, many=True)


def _setting(parse: _Reader, default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse})


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set, by its environment name in lower case. Durations are seconds, sizes bytes."""

    database_url: Path = _setting(_sqlite_path, Path(__file__).resolve().parent / "data" / "chronotask.db")  # the SQLite database
    api_host: str = _setting(_host, "127.0.0.1")  # address of REST and MCP over HTTP
    api_port: int = _setting(_number(0, 65535, int), 8000)  # port of REST and the dashboard (0: any free one)
    scheduler_timezone: str = _setting(lambda text: load_zone(text).key, "UTC")  # zone of cron and of date-times without offset
    http_timeout: float = _setting(_number(1, 604800), 30.0)  # seconds for one HTTP attempt
    bash_timeout: float = _setting(_number(1, 604800), 300.0)  # seconds for one bash attempt
    max_retries: int = _setting(_number(0, 100, int), 3)  # retries of tasks that set none
    retry_delay: float = _setting(_number(0, 86400), 5.0)  # seconds before the first retry
    allow_host_commands: bool = _setting(_flag, True)  # whether bash tasks may be made and run
    allowed_bash_commands: tuple[str, ...] = _setting(_words, ())  # when set, only these commands run, and no shell
    allowed_bash_env: tuple[str, ...] = _setting(_words, ())  # with ALLOWED_BASH_COMMANDS, the only names a task's env may set
    launcher_default: str | None = _setting(str, None)  # launcher of bash tasks that name none
    # By their names: the words before a command that runs elsewhere.
    launchers: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, hash=False)
    bash_user: pwd.struct_passwd | None = _setting(_user, None)  # user of this machine under which commands run
    api_token: str | None = _setting(_token, None)  # bearer token that every request needs
    api_token_file: Path | None = _setting(_path, None)  # file that holds API_TOKEN
    allowed_hosts: tuple[str, ...] = _setting(_hosts, ())  # further names to accept in Host and Origin
    api_tokens_file: Path | None = _setting(_path, None)  # file of further tokens, each with a name and a scope
    public_url: str | None = _setting(_public_url, None)  # how people reach the dashboard, for links in messages
    secrets_dir: Path = _setting(_path, Path("/run/secrets"))  # where ${file:...} may read
    block_private_networks: bool = _setting(_flag, False)  # refuse loopback and private addresses to HTTP tasks
    allowed_networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = _setting(_networks, ())  # which may be reached
    max_concurrent_runs: int = _setting(_number(1, 10000, int), 100)  # more executions than this wait
    output_limit: int = _setting(_number(1024, 16777216, int), 65536)  # bytes kept of stdout, stderr and response body, each
    history_days: int = _setting(_number(0, 36500, int), 30)  # days that finished executions are kept (0: for ever)
    history_per_task: int = _setting(_number(0, 10000000, int), 1000)  # finished executions kept of each task (0: all)
    shutdown_grace: float = _setting(_number(0, 3600), 6.0)  # seconds that running executions get at a stop
    log_level: str = _setting(_log_level, "INFO")  # from which level on lines are logged
    log_file: Path | None = _setting(_path, None)  # file that gets the log besides stderr
    mcp_enabled: bool = _setting(_flag, True)  # whether MCP is served at all
    mcp_port: int = _setting(_number(0, 65535, int), 8001)  # port of MCP over HTTP (0: any free one)

    @classmethod
    def from_env(cls, environ: Mapping[str, str], port: str | None = None, host: str | None = None) -> tuple[Settings, list[str]]:
        """Settings from `environ`, where an empty variable counts as not set, or from the options; and warnings about typos.
        Raises StartupError (status 2), one line, at the first bad value, and at a typo in a setting that keeps somebody out."""
        fields = {field.name.upper(): field for field in dataclasses.fields(cls) if field.metadata}
        values, launchers, warnings = dict[str, Any](), dict[str, tuple[str, ...]](), list[str]()
        given = {name.removeprefix(ENV_PREFIX): (name, text) for name, text in environ.items() if name.startswith(ENV_PREFIX)}
        given |= {} if port is None else {"API_PORT": ("--port", port)}
        given |= {} if host is None else {"API_HOST": ("--host", host)}
        for word, (name, text) in sorted(given.items()):
            launcher = re.fullmatch("LAUNCHER_([A-Z0-9_]{1,40})", word)
            try:
                if word in fields and (text or name[0] == "-"):
                    values[fields[word].name] = fields[word].metadata["parse"](text)
                elif word in ("API_TOKEN", "API_TOKEN_FILE", "API_TOKENS_FILE", "BASH_USER"):
                    # As it comes from a secret that was not filled in: the service would be open.
                    raise ValueError("must not be empty; remove it if there is to be none")
                elif launcher and text:
                    launchers[launcher[1].lower()] = _launcher_words(text.strip())
            except ValueError as error:
                value = "(hidden)" if text and word.endswith("_TOKEN") else shown(text)
                raise StartupError(f"{name}={value}: {error}", exit_status=2) from None
            if not (word in fields or launcher or word in TASK_VARIABLES or word.startswith(("CAUSE_", "SECRET_"))):
                hint = nearest(word.upper(), fields)  # without the prefix, which would make everything alike
                warnings.append(f"unknown variable {shown(name)}" + (f": did you mean {ENV_PREFIX}{hint}?" if hint else ""))
                if hint is not None and hint.startswith(PROTECTIVE):
                    raise StartupError(f"{warnings[-1]} That one protects the service: correct or remove this one", 2)
        settings = cls(**values, launchers=launchers)
        if settings.launcher_default is not None and (unknown := settings.unknown_launcher(settings.launcher_default)):
            raise StartupError(f"{LAUNCHER_PREFIX}DEFAULT={shown(settings.launcher_default)}: {unknown}", exit_status=2)
        if settings.api_token_file is not None:
            settings = dataclasses.replace(settings, api_token=_read_token(settings.api_token_file, warnings))
        known_tokens(settings)
        with contextlib.suppress(OSError):  # it need not exist
            if why := untrusted(settings.secrets_dir, os.stat(settings.secrets_dir)):
                raise StartupError(f"{ENV_PREFIX}SECRETS_DIR={shown(str(settings.secrets_dir))}: {why}", exit_status=2)
        return settings, warnings

    @property
    def needs_token(self) -> bool:
        return self.api_token is not None or self.api_tokens_file is not None

    def unknown_launcher(self, name: str) -> str | None:
        """Why no task can name this launcher, or None."""
        if name in self.launchers:
            return None
        known = f"one of {', '.join(sorted(self.launchers))}" if self.launchers else "left out: there are no launchers here"
        return f"must be {known} ({LAUNCHER_PREFIX}NAME), not {shown(name)}"


def untrusted(path: Path, found: os.stat_result, alone: bool = False) -> str | None:
    """Why what lies at `path` cannot be relied on, and the remedy: somebody else could have written it (sshd's StrictModes).
    With `alone`, a group in which there is nobody else may write, as Debian's ssh allows it: a volume's fsGroup in Kubernetes."""
    trusted, others = {0, os.geteuid()}, 0o022
    if found.st_uid not in trusted:
        return f"belongs to another user (uid {found.st_uid}): chown {os.geteuid()} {shown(str(path), 4096)}"
    if alone:
        users = pwd.getpwall()
        members = {user.pw_name for user in users if user.pw_gid == found.st_gid}
        with contextlib.suppress(KeyError):
            members.update(grp.getgrgid(found.st_gid).gr_mem)
        others = 0o002 if members <= {user.pw_name for user in users if user.pw_uid in trusted} else others
    shared_folder = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX  # as Kubernetes mounts secrets
    if found.st_mode & others and not shared_folder:
        return f"may be written by others (mode {stat.S_IMODE(found.st_mode):04o}): chmod go-w {shown(str(path), 4096)}"
    return None


def _read_trusted(variable: str, path: Path, warnings: list[str] | None = None) -> tuple[str, str]:
    """A file of tokens that nobody else can write: how messages name it, and its text. One that others can read is closed to
    them where it can be, and that is said in `warnings`; without these it is refused. Raises StartupError (status 2)."""
    name = f"{ENV_PREFIX}{variable}={shown(str(path))}"
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")  # reading a pipe may last for ever, and once only
        with path.open(encoding="utf-8-sig") as file:
            found, text = os.fstat(file.fileno()), file.read()
    except (OSError, ValueError) as error:
        raise StartupError(f"{name}: must be a readable text file ({error})", exit_status=2) from None
    mode, why = stat.S_IMODE(found.st_mode), untrusted(path, found)
    if why is None and mode & 0o007 and warnings is None:
        why = f"other users can read it (mode {mode:04o}): chmod o-rwx {shown(str(path), 4096)}"
    elif why is None and mode & 0o007 and warnings is not None:
        warnings.append(f"{name}: other users could read it (mode {mode:04o}): chmod o-rwx")
        with contextlib.suppress(OSError):  # root's, or on a read-only file system
            path.chmod(mode & ~0o007)
    if why:
        raise StartupError(f"{name}: {why}", exit_status=2)
    return name, text


class Token(NamedTuple):
    """Who may ask, as API_TOKENS_FILE says it. Only the SHA-256 of the token is kept."""

    name: str
    scope: str
    digest: bytes


_TOKEN_LINE = re.compile(rf"([A-Za-z0-9._@-]{{1,64}}) ({'|'.join(SCOPES)}) ({_TOKEN})")
_token_line_rule = f"must be NAME SCOPE TOKEN: 1 to 64 of A-Za-z0-9._@-, one of {', '.join(SCOPES)}, {_token_rule}, each once"


def token_digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read_token(path: Path, warnings: list[str]) -> str:
    """The token in a file that only its owner and group may read."""
    name, text = _read_trusted("API_TOKEN_FILE", path, warnings)
    try:
        return str(_token(text.strip()))
    except ValueError as error:
        raise StartupError(f"{name}: what the file holds {error}", exit_status=2) from None


def _read_tokens(path: Path) -> list[Token]:
    """The tokens of a file: lines NAME SCOPE TOKEN. Raises StartupError (status 2) with the number of the line."""
    (file, text), tokens = _read_trusted("API_TOKENS_FILE", path), list[Token]()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition(" #")[0].split()
        if not words or words[0].startswith("#"):
            continue
        found = _TOKEN_LINE.fullmatch(" ".join(words))
        token = Token(found[1], found[2], token_digest(found[3])) if found else None
        if token is None or any(token.name == other.name or token.digest == other.digest for other in tokens):
            raise StartupError(f"{file}, line {number}: {_token_line_rule}", exit_status=2)  # not the line: it may show one
        tokens.append(token)
    if not tokens:
        raise StartupError(f"{file}: holds no token", exit_status=2)
    return tokens


def known_tokens(settings: Settings) -> list[Token]:
    """API_TOKEN, or what its file holds now, and those of API_TOKENS_FILE. Raises StartupError."""
    file, files = settings.api_token_file, settings.api_tokens_file
    own = settings.api_token if file is None else _read_token(file, [])
    tokens = [] if own is None else [Token("API_TOKEN", "admin", token_digest(own))]
    return tokens if files is None else tokens + _read_tokens(files)


# ======================================================================================================================
# 2. Schedules (pure)
# ======================================================================================================================
#
# Invariants, each with a test of its name:
#   next_after(t) is None or later than t; last_at_or_before(t) is the slot that next_after reaches last without passing t.
#   An interval never drifts: its slots are anchor + k·seconds, whatever happened in between.
#   The jitter of a slot is less than the gap to the next one, so slots fire in their order.

SECOND = 1_000_000  # all instants are whole microseconds since the epoch, UTC
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
LAST_INSTANT = 253_402_300_800 * SECOND - 1  # 9999-12-31T23:59:59.999999Z

CORRECTION = 3 * HOUR  # Debian's cron takes larger steps for corrections of the clock
LONGEST_EXPRESSION = 200
LONGEST_INTERVAL = 10 * 365 * 86400

_LAST_LOCAL = LAST_INSTANT - 2 * DAY  # up to here, all readings of a local time have four digits in their year
_EPOCH = datetime(1970, 1, 1)
_TICK, _ZERO = timedelta(microseconds=1), timedelta()

# --- Instants and zones -----------------------------------------------------------------------------------------------


def _clock_face(t: int) -> datetime:
    return _EPOCH + timedelta(microseconds=t)


@functools.lru_cache(maxsize=4096)  # pages are read again and again
def format_instant(t: int) -> str:
    """`t` as ISO 8601 in UTC: `2026-11-24T05:00:00Z`, with six decimals when it is no whole second."""
    return _clock_face(t).isoformat() + "Z"


def format_local(t: int, zone: str) -> str:
    """`t` as ISO 8601 in `zone`, with its offset: `2026-11-24T06:00:00+01:00`."""
    if t > _LAST_LOCAL:
        return format_instant(t)
    return datetime.fromtimestamp(t // SECOND, load_zone(zone)).replace(microsecond=t % SECOND).isoformat()


def _offset(zone: ZoneInfo, t: int) -> int:
    return 0 if t > _LAST_LOCAL else (datetime.fromtimestamp(t // SECOND, zone).utcoffset() or _ZERO) // _TICK


def _readings(zone: ZoneInfo, local: int) -> tuple[int, int]:
    """The offsets of a local time read the first and the second way (PEP 495). Equal: it is clear. First smaller: it lies in
    a gap. First larger: it comes twice."""
    face = _clock_face(local)
    first, second = zone.utcoffset(face) or _ZERO, zone.utcoffset(face.replace(fold=1)) or _ZERO
    return first // _TICK, second // _TICK


def _instant_of(zone: ZoneInfo, local: int, longest_gap: int = LAST_INSTANT, now: int = -1) -> int | None:
    """The instant of a local time: right after a gap, or None in one of `longest_gap`; of two the first later than `now`."""
    first, second = _readings(zone, local)
    if first >= second:
        return local - (second if local - first <= now < local - second else first)
    if second - first >= longest_gap:
        return None
    seconds = range((local - second) // SECOND, (local - first) // SECOND + 1)
    return seconds[bisect.bisect_left(seconds, second, key=lambda moment: _offset(zone, moment * SECOND))] * SECOND


_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_SPAN = re.compile(rf"({_DATE.pattern})(?:/({_DATE.pattern}))?")
_INSTANT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,6})?)?)"
    r"(?: ?([Zz]|[+-](?:0[0-9]|1[0-9]|2[0-3])(?::?[0-5][0-9])?))?"
)
_INSTANT_RULE = (
    "must be an ISO 8601 date and time from 1970 to 9999, such as 2026-12-01T09:00:00, "
    "2026-12-01T08:00:00Z or 2026-12-01T09:00:00+01:00"
)


@functools.lru_cache(maxsize=1024)  # a schedule's times are asked for at each of its slots and in each list
def parse_instant(text: str, zone: str, now: int = -1) -> int:
    """The instant that an ISO 8601 date-time means; without an offset it is read in `zone`: one in a gap is right after it, one
    that comes twice is the first that is later than `now`. Raises ValueError, saying what is allowed."""
    found = _INSTANT.fullmatch(text)
    if found is None:
        raise ValueError(_INSTANT_RULE)
    try:
        moment = datetime.fromisoformat(f"{found[1]}T{found[2]}{(found[3] or '').upper()}")
    except ValueError as error:  # 31 February, 25:00
        raise ValueError(f"{_INSTANT_RULE} ({error})") from None
    local, shift = (moment.replace(tzinfo=None) - _EPOCH) // _TICK, moment.utcoffset()
    t = _instant_of(load_zone(zone), local, now=now) if shift is None else local - shift // _TICK
    if t is None or not 0 <= t <= LAST_INSTANT:
        raise ValueError(_INSTANT_RULE)
    return t


def start_text(text: str, zone: str, now: int, local: bool) -> str:
    """A start as it is stored: with an offset, so that later rules of its zone can't move the phase; with `local` without one."""
    found, t = _INSTANT.fullmatch(text), parse_instant(text, zone, now)
    if found and bool(found[3]) != local:
        return text
    return _clock_face(t + _offset(load_zone(zone), t)).isoformat() if local else format_local(t, zone)


def parse_bound(text: str, zone: str, end: bool = False) -> int:
    """Like `parse_instant`; a date alone is the start of that day in `zone`, or with `end` its last microsecond."""
    if not _DATE.fullmatch(text):
        return parse_instant(text, zone)
    if text == ("9999-12-31" if end else "1970-01-01"):  # which in some zones reaches beyond the instants that there are
        return LAST_INSTANT if end else 0
    local = parse_instant(f"{text}T00:00", "UTC") + DAY * end
    return parse_instant(_clock_face(local).isoformat(), zone) - end


@functools.lru_cache(maxsize=4096)
def span_of(text: str, zone: str) -> tuple[int, int]:
    """The first and the last instant of a day or of days, as `exclude` has them. Raises ValueError."""
    found = _SPAN.fullmatch(text)
    if found is None or (found[2] or found[1]) < found[1]:
        raise ValueError(f"{shown(text)} must be a date (2026-12-24), or a range that runs upwards (2026-12-24/2026-12-26)")
    return parse_bound(found[1], zone), parse_bound(found[2] or found[1], zone, end=True)


# --- Cron: reading an expression --------------------------------------------------------------------------------------


class _Field(NamedTuple):
    name: str
    low: int
    high: int
    highest: int  # of a day of the week 7, which is Sunday as well
    words: tuple[str, ...] = ()
    more: str = ""


_MONTHS = "January February March April May June July August September October November December".split()
_WEEKDAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_ORDINALS = ("last", "first", "second", "third", "fourth", "fifth")
_SHORT_DAYS = tuple(day[:3].lower() for day in _WEEKDAYS)
_FIELDS = (
    _Field("second", 0, 59, 59),
    _Field("minute", 0, 59, 59),
    _Field("hour", 0, 23, 23),
    _Field("day-of-month", 1, 31, 31, more=", L for the last day"),
    _Field("month", 1, 12, 12, tuple(month[:3].lower() for month in _MONTHS)),
    _Field("day-of-week", 0, 6, 7, _SHORT_DAYS, ", MON#2 for the second Monday, L5 for the last Friday"),
)
_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_CRON_RULE = (
    f"must be 5 fields (minute hour day-of-month month day-of-week), 6 with seconds first, or one of {', '.join(_ALIASES)}"
)
_ITEM = re.compile(r"(?:(\*)|([0-9]{1,3}|[a-z]{3})(?:-([0-9]{1,3}|[a-z]{3}))?)(?:/([0-9]{1,4}))?")
_NTH = re.compile(rf"([0-7]|{'|'.join(_SHORT_DAYS)})#([1-5])|l([0-7])")


class _Expression:
    """A cron expression taken apart; Sunday is 0. Raises ValueError, saying what is allowed."""

    def __init__(self, expression: str) -> None:
        if not expression.isascii() or len(expression) > LONGEST_EXPRESSION:
            raise ValueError(f"must be at most {LONGEST_EXPRESSION} ASCII characters")
        text = expression.strip().lower()
        texts = re.split(r"[ \t]+", _ALIASES.get(text, text))
        if len(texts) not in {5, 6}:
            raise ValueError(_CRON_RULE + (did_you_mean(text, _ALIASES) or f"; found {len(texts)}"))
        self.texts = texts if len(texts) == 6 else ["0", *texts]
        second, minute, hour, day, month, weekday = self.texts
        self.seconds, self.minutes, self.hours = map(_field_values, _FIELDS[:3], (second, minute, hour))
        # Debian: a job whose minute or hour field starts with * keeps to elapsed time; a day must match both of its fields if
        # either starts with *, else one is enough.
        self.wild = minute.startswith("*") or hour.startswith("*")
        self.both = day.startswith("*") or weekday.startswith("*")
        plain = [part for part in day.split(",") if part != "l"]
        self.last_day = "l" in day.split(",")
        special = [_NTH.fullmatch(part) for part in weekday.split(",")]
        if (self.last_day and weekday != "*") or (any(special) and not (all(special) and day == "*")):
            raise ValueError("L and # need * in the other day field and no plain weekday beside them (engines disagree)")
        self.days = _field_values(_FIELDS[3], ",".join(plain)) if plain else ()
        self.months = _field_values(_FIELDS[4], month)
        self.weekdays = () if any(special) else _field_values(_FIELDS[5], weekday)
        # Pairs of weekday and 1 to 5, or 0 for the last one of the month.
        self.nth = sorted({(*_field_values(_FIELDS[5], m[1] or m[3]), int(m[2] or 0)) for m in special if m})

        days = "*" if len(self.days) == 31 else ",".join([*map(str, self.days), *["L"] * self.last_day])
        months = "*" if len(self.months) == 12 else ",".join(map(str, self.months))
        matches = [f"{day}#{n}" if n else f"L{day}" for day, n in self.nth] or map(str, self.weekdays)
        weekdays = "*" if len(self.weekdays) == 7 else ",".join(matches)
        # The day fields for croniter, in plain numbers: it reads an equal range (5-5) as "every", and takes more than engines
        # agree on (H, R, W). Where one of two is enough each stands by itself: of 31 February or a Monday one never comes.
        self.dates = (f"{days} {months} {weekdays}",) if self.both else (f"{days} {months} *", f"* {months} {weekdays}")


_parse_cron = functools.lru_cache(maxsize=2048)(_Expression)


def _field_values(field: _Field, text: str) -> tuple[int, ...]:
    named, values = {word: number for number, word in enumerate(field.words, field.low)}, set[int]()
    for part in text.split(","):
        found = _ITEM.fullmatch(part)
        star, first, last, step = found.groups() if found else (None, "", None, None)
        ends = [named[end] if end in named else int(end) if end.isdigit() else -1 for end in (first, last) if end is not None]
        low, high = (field.low, field.high) if star else (ends[0], ends[-1])
        if step and len(ends) == 1:  # 10/15 is 10-59/15, as most engines have it; 7/2 is Sunday
            high = max(low, field.high)
        if field.highest == 7 and high == 0 < low:
            high = 7  # Sunday may end a range
        if not field.low <= low <= high <= field.highest or int(step or 1) == 0:
            names = f" or {field.words[0].upper()} to {field.words[-1].upper()}" if field.words else ""
            rule = f"must be {field.low} to {field.highest}{names}, with , - (upwards) and / (from 1){field.more}"
            raise ValueError(f"{field.name} {shown(part)} {rule}")
        values.update(range(low, high + 1, int(step or 1)))
    return tuple(sorted({value % 7 for value in values} if field.highest == 7 else values))


# --- Cron: slots ------------------------------------------------------------------------------------------------------
#
# croniter finds the matching days, remembered for all expressions that share their day fields. It sees no zone: its own
# handling of them is wrong around changes of the clocks and can take seconds. The times of a matching day are arithmetic.
# Over both lies the rule of Debian's cron (cron.c, "wakeup kinds"): a wild job keeps to elapsed time; a fixed one that
# falls into a gap runs right after it, and runs once in a repeated hour.


@functools.lru_cache(maxsize=4096)
def _next_day(dates: tuple[str, ...], day: int) -> int | None:
    """The first matching day from `day` on, counted from 1970-01-01; None when the next 50 years have none."""
    from croniter import croniter  # type: ignore[import-untyped]  # takes 15 ms that a start without cron need not pay

    found = list[int]()
    for fields in dates:
        with contextlib.suppress(ValueError, OverflowError):  # also: none before the year 10000
            matches = croniter(f"0 0 {fields}", _clock_face(day * DAY - MINUTE), datetime, day_or=False)
            found.append((matches.get_next() - _EPOCH).days)
    return min(found, default=None)


def _local_times(cron: _Expression, local: int) -> Iterator[int]:
    """The matching local times later than `local`, as clocks show them."""
    day, time = divmod(local, DAY)
    while (found := _next_day(cron.dates, day)) is not None and found * DAY <= _LAST_LOCAL:
        time = time if found == day else -1
        for hour in cron.hours[bisect.bisect_left(cron.hours, time // HOUR) :]:
            past = time - hour * HOUR  # negative in a later hour, of which all is still to come
            for minute in cron.minutes[bisect.bisect_left(cron.minutes, past // MINUTE) :]:
                for second in cron.seconds[bisect.bisect_right(cron.seconds, (past - minute * MINUTE) // SECOND) :]:
                    yield found * DAY + hour * HOUR + minute * MINUTE + second * SECOND
        day, time = found + 1, -1


def _slots_at(local_times: Iterable[int], zone: ZoneInfo, wild: bool = False) -> Iterator[int]:
    for local in local_times:
        if wild:
            first, second = _readings(zone, local)
            yield from (local - first, local - second) if first >= second else ()
        elif (slot := _instant_of(zone, local, CORRECTION)) is not None:
            yield slot


# --- Timings ----------------------------------------------------------------------------------------------------------


class Timing:
    """When something fires. Fixed local times wait when the clock is set back a little, others go on from now."""

    @property
    def fixed(self) -> bool:
        return True

    def next_after(self, t: int) -> int | None:
        raise NotImplementedError

    def describe(self) -> str:
        raise NotImplementedError

    def notes(self, now: int) -> list[str]:
        """What it probably does not mean."""
        return []

    def last_at_or_before(self, t: int) -> int | None:
        """Searched with next_after alone, so the two can't disagree: widen a window backwards, then halve it."""
        back = MINUTE
        while (found := self.next_after(t - back)) is None or found > t:
            if back > t:
                return None
            back *= 8
        beyond = t
        while (later := self.next_after(found)) is not None and later <= t:
            found = later
            middle = (found + beyond) // 2
            later = self.next_after(middle)
            found, beyond = (later, beyond) if later is not None and later <= t else (found, middle)
        return found


@dataclass(frozen=True, slots=True)
class Cron(Timing):
    """Slots of a checked cron expression, read in the local time of `zone`."""

    expression: str
    zone: str

    @property
    def fixed(self) -> bool:
        return not _parse_cron(self.expression).wild

    @functools.lru_cache(maxsize=8192)  # noqa: B019 - many schedules share an expression, and fire together
    def next_after(self, t: int) -> int | None:
        cron, zone, t = _parse_cron(self.expression), load_zone(self.zone), max(t, -1)
        local = t + _offset(zone, t)
        # In an hour that comes twice, what is wild is looked for from where each of its two passes would be.
        starts = {t + offset for offset in _readings(zone, local)} if cron.wild else {local}
        searches = (_slots_at(_local_times(cron, start), zone, cron.wild) for start in starts)
        found = (next((slot for slot in slots if slot > t), None) for slots in searches)
        return min((slot for slot in found if slot is not None), default=None)

    def notes(self, now: int) -> list[str]:
        cron, notes = _parse_cron(self.expression), list[str]()
        for field, text in zip(_FIELDS, cron.texts, strict=True):
            for step in map(int, re.findall("/([0-9]+)", text)):
                seconds, unit = {"second": 1, "minute": 60, "hour": 3600}.get(field.name), field.name.partition("-")[0]
                meant = f"{step * seconds} s" if seconds else f"{step} days" if field.name == "day-of-month" else None
                if step > field.high - field.low:
                    larger = f"The step {step} is larger than the {field.name} field, of which only the first value is left"
                    notes.append(larger + (f": every {step} {unit}s is an interval of {meant}." if meant else "."))
        if not cron.both:
            notes.append("A day that matches day-of-month or day-of-week is enough, as in Debian's cron: it need not match both.")
        return notes

    def describe(self) -> str:
        cron = _parse_cron(self.expression)
        words, days = _clock_words(cron), _day_words(cron)
        if not words.startswith("at "):
            words += f", {days}" if days != "every day" else ""
        elif days != "every day" or len(cron.hours) < 24:
            words = f"{days} {words}"
        return f"{words[0].upper()}{words[1:]} ({self.zone})"


@dataclass(frozen=True, slots=True)
class Once(Timing):
    """A single slot."""

    at: int
    zone: str

    def next_after(self, t: int) -> int | None:
        return self.at if self.at > t else None

    def describe(self) -> str:
        return f"Once at {_local_words(self.at, self.zone)} ({self.zone})"


@dataclass(frozen=True, slots=True)
class Interval(Timing):
    """Slots at anchor + k·step, later than `since`: microseconds. `fixed`: of days, the anchor is what clocks of `zone` show."""

    step: int
    anchor: int
    since: int
    zone: str
    fixed: bool = False

    def next_after(self, t: int) -> int | None:
        t = max(t, self.since)
        if not self.fixed:
            slot = t + self.step - (t - self.anchor) % self.step
            return slot if slot <= LAST_INSTANT else None
        zone = load_zone(self.zone)
        local = t + _offset(zone, t)
        local_times = range(local - (local - self.anchor) % self.step, _LAST_LOCAL + 1, self.step)
        return next((slot for slot in _slots_at(local_times, zone) if slot > t), None)

    def notes(self, now: int) -> list[str]:
        zone = load_zone(self.zone)
        if self.fixed or self.step % DAY or len({_offset(zone, now + month * 30 * DAY) for month in range(13)}) == 1:
            return []
        moves = f"{self.step // SECOND} s later the local time is another one when the clocks change in {self.zone}"
        return [f"{moves}: {{days: {self.step // DAY}}} keeps to it."]

    def describe(self) -> str:
        if self.fixed:
            every, first = "Every day" if self.step == DAY else f"Every {self.step // DAY} days", _clock_face(self.anchor)
            return f"{every} at {_time_words(self.anchor)}, counted from {first.date()} ({self.zone})"
        every, at = f"Every {_span_words(self.step).removeprefix('1 ')}", _local_words(self.anchor, self.zone)
        return f"{every} from {at} on ({self.zone})" if self.since < self.anchor else f"{every} since {at} ({self.zone})"


# An event of an `after` schedule, and how words tell that it came; `{n}` is the threshold.
EVENTS = {
    "success": "succeeded",
    "failure": "failed",
    "cancelled": "was cancelled",
    "skipped": "skipped a slot",
    "missed": "missed a slot",
    "started": "started",
    "broke": "failed {n} times in a row",
    "recovered": "has recovered",
    "paused": "was paused after failures",
    "overdue": "has not succeeded for {span}",
}


@dataclass(frozen=True, slots=True)
class After(Timing):
    """Fires when another task comes to something: no slots, but for the one of `overdue`, at `at`."""

    config: Mapping[str, Any]
    watched: Sequence[Sequence[Any]]  # id and name of the tasks of `task_ids` that exist
    at: int | None

    fixed = False

    def next_after(self, t: int) -> int | None:
        return self.at if self.at is not None and self.at > t else None

    def describe(self) -> str:
        config, names = self.config, {task_id: f"'{name}'" for task_id, name, *_ in self.watched}
        who = f"a task tagged '{config['tag']}'" if "tag" in config else "any task"
        if "task_ids" in config:
            who = _and([names.get(task_id, f"task {task_id} (deleted)") for task_id in config["task_ids"]], "or")
        times, span = config.get("threshold", 1), _span_words(round(config.get("seconds", 0) * SECOND))
        words = {event: EVENTS[event].format(n=times, span=span) for event in config["on"]}
        if times == 1 and "broke" in words:
            words["broke"] = "began to fail"
        recovered = words.pop("recovered", None) if len(words) > 1 else None
        return f"After {who} {_and(list(words.values()), 'or')}" + (", and when it has recovered" if recovered else "")


def make_timing(
    schedule_type: str, config: Mapping[str, Any], created_at: int, since: int | None = None, watched: Sequence[Any] = ()
) -> Timing:
    """The timing of a stored schedule, whose config was checked. An interval without `start_date` counts from `created_at`, and
    has slots later than `since`. `watched` are the tasks that one of type `after` names: id, name, last success."""
    if schedule_type == "after":
        overdue = "overdue" in config["on"] and watched
        last = max(created_at, watched[0][2] or 0) if overdue else 0
        return After(config, watched, last + round(config["seconds"] * SECOND) if overdue else None)
    zone, since = config["timezone"], created_at if since is None else since
    if schedule_type == "cron":
        return Cron(config["expression"], zone)
    if schedule_type == "once":
        return Once(parse_instant(config["datetime"], zone), zone)
    start = config.get("start_date")
    anchor = created_at if start is None else parse_instant(start, zone)
    since = since if start is None else anchor - 1
    if "days" not in config:
        return Interval(round(config["seconds"] * SECOND), anchor, since, zone)
    local = (anchor + _offset(load_zone(zone), anchor)) // SECOND * SECOND
    return Interval(config["days"] * DAY, local if start is None else parse_instant(start, "UTC"), since, zone, fixed=True)


def check_expression(text: str, zone: str, now: int) -> None:
    """Raises ValueError, saying what is allowed, unless this is a cron expression that will fire."""
    if Cron(text, zone).next_after(now) is None:
        raise ValueError("must fire at least once in the next 50 years")


def check_datetime(text: str, zone: str, now: int) -> None:
    """Raises ValueError unless this is an instant to come."""
    if parse_instant(text, zone, now) <= now:
        raise ValueError(f"must be in the future (it is now {format_local(now, zone)})")


# --- Words ------------------------------------------------------------------------------------------------------------


def _local_words(t: int, zone: str) -> str:
    return format_local(t, zone)[:19].replace("T", " ")  # which of two hours it is, `upcoming` tells


def _span_words(span: int) -> str:
    for unit, name in ((HOUR, "hour"), (MINUTE, "minute"), (SECOND, "second")):
        if span % unit == 0:
            return f"1 {name}" if span == unit else f"{span // unit} {name}s"
    return f"{span / SECOND:.3f}".rstrip("0") + " seconds"


def _and(words: Sequence[str], link: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {link} {words[-1]}"


def _listed(values: tuple[int, ...], words: Sequence[str] = (), link: str = "and") -> str:
    names = [words[value] if words else str(value) for value in values]
    in_a_row = len(values) > 2 and values[-1] - values[0] == len(values) - 1
    return f"{names[0]} to {names[-1]}" if in_a_row else _and(names, link)


def _time_words(t: int) -> str:
    return _clock_face(t).strftime("%H:%M:%S" if t % MINUTE else "%H:%M")


def _clock_words(cron: _Expression) -> str:
    """`at 09:00`, or `every 15 minutes from 08:00 to 18:45`."""
    fields = (("second", cron.seconds, 60, SECOND), ("minute", cron.minutes, 60, MINUTE), ("hour", cron.hours, 24, HOUR))
    gaps, first, span = set[int](), 0, 0  # between all times that follow each other, up to this field
    for _, values, _, unit in fields:
        gaps |= {(later - earlier) * unit - span for earlier, later in itertools.pairwise(values)}
        first, span = first + values[0] * unit, span + (values[-1] - values[0]) * unit
    number = math.prod(len(values) for _, values, _, _ in fields)
    if number > 2 and len(gaps) == 1:
        gap = min(gaps)
        every = f"every {_span_words(gap).removeprefix('1 ')}"
        if span + gap == DAY and first < HOUR and (first == 0 or gap % HOUR == 0 == first % MINUTE):  # all the day long
            return every + (f" at minute {first // MINUTE}" if first else "")
        return f"{every} from {_time_words(first)} to {_time_words(first + span)}"
    if number <= 8:
        times = itertools.product(cron.hours, cron.minutes, cron.seconds)
        return "at " + _and([_time_words(hour * HOUR + minute * MINUTE + second * SECOND) for hour, minute, second in times])
    # Field by field: never pretty, never wrong.
    parts = [f"every {name}" if len(values) == full else f"{name} {_listed(values)}" for name, values, full, _ in fields]
    return "at " + " of ".join(parts[1:] if cron.seconds == (0,) else parts)


def _day_words(cron: _Expression) -> str:
    """`every weekday`, `on day 1 of every month`."""
    months = "" if len(cron.months) == 12 else _listed(cron.months, ("", *_MONTHS))
    of_month, in_month = f"of {months or 'every month'}", f" in {months}" if months else ""
    if cron.nth:
        return "on the " + _and([f"{_ORDINALS[number]} {_WEEKDAYS[day]}" for day, number in cron.nth]) + f" {of_month}"
    week = sorted(cron.weekdays, key=lambda day: (day - 1) % 7)  # Monday first
    weekdays = {(1, 2, 3, 4, 5): "weekday", (1, 2, 3, 4, 5, 6, 0): "day"}.get(tuple(week)) or _and([_WEEKDAYS[d] for d in week])
    month_days = [f"day {_listed(cron.days)}"] if cron.days else []
    on_days = f"on {_and(month_days + ['the last day'] * cron.last_day)} {of_month}"
    if not cron.both:
        return f"{on_days} and also every {weekdays}{in_month}"
    if len(cron.days) == 31:
        return f"every {weekdays}{in_month}"
    if len(cron.weekdays) == 7:
        return on_days
    return f"every {weekdays} that is day {_listed(cron.days, link='or')} of {months or 'the month'}"


@dataclass(slots=True)  # made for every slot: frozen, it would take four times as long
class Plan:
    """All that decides when a schedule fires. Bounds are inclusive instants; jitter and catchup_window are seconds."""

    timing: Timing
    schedule_id: int | None = None  # None in a preview, which therefore has no jitter
    start_at: int = 0
    end_at: int = LAST_INSTANT
    jitter: float = 0
    catchup: str = "latest"
    catchup_window: float = 86400
    remaining: float = math.inf  # executions left under max_runs
    # What is remembered of slots. All of it only grows, whatever the clock does: see `due_slots`.
    dealt_with: int = 0  # every slot up to here was dealt with, by a clock that may have been wrong
    in_force_since: int = 0  # the creation, an edit, the end of a pause: nothing from before is made up for
    ran: Sequence[Sequence[int]] = ()  # pairs first, last: slots that ran or lie on excluded days, which are none

    def next_slot(self, after: int) -> int | None:
        """The first slot later than `after`, or None when there is none left."""
        if self.remaining <= 0:
            return None
        slot = self.timing.next_after(max(after, self.start_at - 1))
        while slot is not None and (run := self._run_of(slot)):
            slot = self.timing.next_after(run[1])
        return None if slot is None or slot > self.end_at else slot

    def last_slot(self, t: int) -> int | None:
        """The last slot not later than `t`, or None."""
        slot = self.timing.last_at_or_before(min(t, self.end_at))
        while slot is not None and (run := self._run_of(slot)):
            slot = self.timing.last_at_or_before(run[0] - 1)
        return None if slot is None or slot < self.start_at else slot

    def slots(self, after: int) -> Iterator[int]:
        """The slots later than `after`."""
        while (slot := self.next_slot(after)) is not None:
            yield slot
            after = slot

    def count(self, first: int, last: int, limit: int) -> int:
        """How many slots there are from `first` to `last`, both inclusive; stops at `limit`."""
        return len(list(itertools.islice(itertools.takewhile(lambda slot: slot <= last, self.slots(first - 1)), limit)))

    def upcoming(self, after: int, count: int) -> Iterator[int]:
        """When the next slots later than the slot `after` fire, at most `count` of them."""
        return map(self.fire_time, itertools.islice(self.slots(after), int(min(count, self.remaining))))

    def _run_of(self, slot: int) -> Sequence[int] | None:
        return next((run for run in self.ran if run[0] <= slot <= run[1]), None)

    def fire_time(self, slot: int) -> int:
        """`slot` plus its jitter: whole milliseconds, the same each time, less than the gap to the next slot."""
        if not self.jitter or self.schedule_id is None:
            return slot
        following = self.timing.next_after(slot) or LAST_INSTANT + 1
        choices = min(round(self.jitter * 1000), (following - slot - 1) // 1000) + 1
        digest = hashlib.blake2b(f"{self.schedule_id}:{slot}".encode(), digest_size=8).digest()
        return slot + int.from_bytes(digest, "big") % choices * 1000


# ======================================================================================================================
# 3. Resources
# ======================================================================================================================
#
# Each resource is a dataclass (Task, Schedule, Execution, Attempt), each of its fields a line: name, type, default.
# A new field is one line here and a migration (section 6): the columns, the bodies of create and update, what answers show,
# OpenAPI and the tools' arguments follow from it. A client may write a field, on creation and later, unless its type says:
#
#   ReadOnly[…]   shown, never written by a client
#   Internal[…]   neither shown nor written by a client
#   Queried[…]    no column: the query computes it
#   OrNull[…]     for a client null in a schedule of type `after`, which has no use for it
#
# A field without a default is required on creation. `Time` is microseconds here, and ISO 8601 text for a client. `also_shown`
# names properties that answers show, and the field that each stands behind.

# What a damaged row raises. It stops no others; the claim of a schedule and the run of a task will say so.
DAMAGE = (ChronoTaskError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
MASK = "********"
MASKED_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization"})
# The client library writes these itself, or waits for an answer to them: a task's own would contradict what is sent (RFC 9112).
REFUSED_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "expect"})
FORM = "application/x-www-form-urlencoded"
MAX_NESTING = 64
NOT_IN_HEADERS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110, 5.5: a tab may be in a value
NOT_IN_URLS = re.compile(r"[\x00-\x20\x7f\\]")
# No name holds a `{`: else each of many beginnings without an end would be followed through all the text behind it.
SECRET_REFERENCE = re.compile(r"\$\{(env|file):([^{}]*)\}")
_REFERENCE = r"\$\{(?:env|file):[^{}]*\}"
CAUSE_REFERENCE = re.compile(r"\$\{cause:([^{}]*)\}")
_HARMLESS = re.compile(rf"(?i:(?:Bearer|Basic|Token|Digest|ApiKey) +)?{_REFERENCE}")
_HARMLESS_USERINFO = re.compile(rf"(?:[^:@$]*:)?{_REFERENCE}")
# What is in the name of a reference (`${file:a/b}`) ends no authority and begins no host: it is one piece, never looked into.
_PIECE = rf"(?>{_REFERENCE}|[^/?#\\\s])"
_URL = re.compile(rf"(?:((?i:https?))://|(?>{_REFERENCE}|[^@/?#\\\s])*?//)?(?:({_PIECE}*)@)?({_PIECE}*)(.*)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What an `after` execution knows of its cause, and `${cause:NAME}` may stand for.
CAUSE_NAMES = (
    *("event", "execution_id", "task_id", "task_key", "task_name", "status", "error_message", "scheduled_for", "started_at"),
    *("finished_at", "duration", "attempt", "failures_in_a_row", "exit_code", "status_code", "output", "text", "url"),
)


@dataclass(slots=True)  # like all that is made for every attempt: frozen, it takes four times as long to make
class Outcome:
    """How one attempt ended. `output` is the `output_data` of answers, `retryable` says whether this kind of end allows a retry
    at all, `retry_after` for how many seconds the server asked."""

    status: str  # succeeded, failed, timed_out, cancelled or interrupted
    error_message: str | None = None
    output: dict[str, Any] | None = None
    retryable: bool = False
    retry_after: float | None = None


# --- What is refused, and why -----------------------------------------------------------------------------------------

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
_NEVER_SHOWN = {"config", "auth", "headers", "env", "url", "params", "body"}  # what is in them may be secret
adapter = functools.cache(TypeAdapter[Any])


def _checked(model: Any, data: Any, prefix: str = "", context: Any = None) -> Any:
    """`data` as `model`. Raises InvalidInput with an entry for each bad field, at most 100, with `prefix` before its path."""
    try:
        return adapter(model).validate_python(data, context=context)
    except ValidationError as error:
        if error.error_count() > 1000:  # to take 100,000 of them apart would hold up the loop for a second
            raise InvalidInput(FieldError(prefix, f"{error.error_count()} fields are wrong, too many to name them")) from None
        details = error.errors(include_url=False)[:100]
    found: dict[str, str] = {}  # of a path with several faults the first
    for detail in details:
        kind, loc, value, path = detail["type"], detail["loc"], detail["input"], prefix
        for part in loc:
            if isinstance(part, int):
                path += f"[{part}]"
            elif part != "[key]":  # which stands behind a key that is wrong
                name = part if len(part) <= 80 and part.isprintable() else shown(part)
                path += f".{name}" if path else name
        if kind == "missing":
            why = "is required"
        elif kind == "extra_forbidden":
            inside: dict[Any, Any] = {"auth": HttpAuth, "schedules": NestedSchedule}
            known = field_names(inside.get(loc[0], model) if len(loc) > 1 else model)
            why = "unknown field" + (did_you_mean(str(loc[-1]), known) or f" (known: {', '.join(known) or 'none'})")
        elif kind == "value_error":
            why = str(detail["ctx"]["error"])
        elif detail.get("ctx", {}).get("min_length") == 1:
            why = "must not be empty"
        else:
            why = re.sub(r"\A\w+ should ", "must ", detail["msg"]).replace("dictionary", "object")
            if value is None or ("too_" not in kind and not isinstance(value, (dict, list)) and not _NEVER_SHOWN & {*loc, path}):
                why += ", not null" if value is None else f", not {shown(value)}"
        found.setdefault(path, why)
    raise InvalidInput(*itertools.starmap(FieldError, found.items()))


def _refused(wrong: Callable[[Any], object], why: str) -> AfterValidator:
    """Refuses a value of which `wrong` is true; it stands for `{}` in `why`."""

    def check(value: Any) -> Any:
        if wrong(value):
            raise ValueError(why.replace("{}", shown(value)))
        return value

    return AfterValidator(check)


def _references(text: str, cause: bool = False) -> str:
    """`text`, whose `${env:…}` and `${file:…}` all have a form that may be resolved when the task runs. `cause`: here facts
    about what happened may stand; nowhere else, or they would become source, or a part of something else."""
    for name in CAUSE_REFERENCE.findall(text):
        if name not in CAUSE_NAMES:
            raise ValueError(f"${{cause:…}} must name one of {', '.join(CAUSE_NAMES)}, not {shown(name)}")
        if not cause:
            places = "path and query of url, params, headers, env, and a body that is JSON, text/plain or a form"
            raise ValueError(f"${{cause:{name}}} cannot stand here: only in {places}")
    for kind, name in SECRET_REFERENCE.findall(text):
        if kind == "env" and not re.fullmatch(SECRET_PREFIX + "[A-Za-z0-9_]+", name):
            raise ValueError(f"${{env:{shown(name)}}}: only variables named {SECRET_PREFIX}… may be read")
        if kind == "file" and (not name or _CONTROL.search(name)):
            raise ValueError("${file:…} needs the path of a file below SECRETS_DIR")
    return text


def walk(value: Any) -> Iterator[list[Any]]:
    """A JSON value level by level: itself, what is in it, what is in that. Never recurses; 300,000 entries take 20 ms."""
    level = [value]
    while level:
        yield level
        holders = [item for item in level if isinstance(item, (dict, list))]
        level = [inner for item in holders for inner in (item.values() if isinstance(item, dict) else item)]


# --- The configurations of tasks --------------------------------------------------------------------------------------


class UrlParts(NamedTuple):
    """A URL taken apart as text: it may hold references that nobody has resolved yet."""

    scheme: str  # http or https; empty where a reference, or something else, stands for it
    userinfo: str
    host: str  # with the port, if it names one
    rest: str


def url_parts(url: str) -> UrlParts:
    """The only reading of a URL's authority."""
    scheme, *others = cast(re.Match[str], _URL.match(url)).groups("")
    return UrlParts(scheme.lower(), *others)


def _url(text: str) -> str:
    if NOT_IN_URLS.search(text):
        raise ValueError("must be a URL without blanks, backslashes and control characters")
    parts = url_parts(text)
    _references(parts.rest.partition("#")[0], cause=True)
    _references(text.removesuffix(parts.rest) + parts.rest.partition("#")[2])
    if SECRET_REFERENCE.match(text) or text.startswith(f"{MASK}@"):
        return text  # the whole beginning is a secret, or the mask of one: checked when it is known
    try:
        read = urllib.parse.urlsplit(f"//{SECRET_REFERENCE.sub('0', parts.host)}" if parts.scheme else "")
        read.port  # noqa: B018 - reading it checks it
    except ValueError:
        raise ValueError("must be a valid URL: its host or port cannot be read") from None
    if not read.hostname:
        raise ValueError("must be a URL that starts with http:// or https:// and names a host")
    return text


def body_kind(headers: Any) -> str:
    """The media type that a task names for its body, in lower case; empty if it names none, or headers are none."""
    named = headers.items() if isinstance(headers, dict) else ()
    return next((str(value) for name, value in named if name.lower() == "content-type"), "").partition(";")[0].strip().lower()


def _body(body: Any, info: ValidationInfo) -> Any:
    if not isinstance(body, (dict, list, str)):
        raise ValueError("must be an object or a list (sent as JSON), or text (sent as it is)")
    facts = not isinstance(body, str) or body_kind(cast(Any, info.context).get("headers")) in ("text/plain", FORM)
    for depth, level in enumerate(walk(body)):
        if depth > MAX_NESTING:
            raise ValueError(f"must not be nested deeper than {MAX_NESTING} levels")
        for item in level:
            if isinstance(item, str) and "${" in item:  # hardly ever: to look closer at each of 300,000 takes 0.1 s
                _references(item, cause=facts)
            elif isinstance(item, dict) and (name := next(filter(CAUSE_REFERENCE.search, item), None)):
                raise ValueError(f"{shown(name)}: ${{cause:…}} cannot stand in a name")
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise ValueError("must be valid JSON: finite numbers and valid Unicode") from None
    return body


def _param(value: Any) -> Any:
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, (str, bool, int, float)) or (isinstance(item, float) and not math.isfinite(item)):
            raise ValueError("must be text, a finite number, true or false, or a list of them")
        _references(str(item), cause=True)
    return value


def status_range(entry: object) -> range:
    """The codes that an entry of `expected_status` means: 204, "204" or "200-299"; none of anything else."""
    found = re.fullmatch(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", str(entry))
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)


def plain_number(value: float) -> float:
    """5 instead of 5.0, and 15 digits, as SQLite gives it back."""
    value = float(f"{value:.15g}")
    return int(value) if value == int(value) else value


_PLAIN = AfterValidator(plain_number)
_MILLISECONDS = _refused(lambda seconds: seconds != round(seconds, 3), "must have at most 3 decimals, not {}")
_NO_NUL = _refused(lambda text: "\0" in text, "must not hold a NUL character")
_NO_CONTROL = _refused(_CONTROL.search, "must not hold control characters")
_NO_COLON = _refused(lambda text: ":" in SECRET_REFERENCE.sub("", text), "must not hold a colon (RFC 7617)")
_WITH_FACTS = AfterValidator(partial(_references, cause=True))
_Text = Annotated[str, AfterValidator(_references)]
_Timeout = Annotated[float, Field(ge=1, le=604800, description="Seconds for one attempt."), _PLAIN]
_FactName = Annotated[str, _refused(CAUSE_REFERENCE.search, "${cause:…} cannot stand in a name")]
_Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
_UPPER = BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value)
_SETTABLE = _refused(lambda name: name.lower() in REFUSED_HEADERS, "cannot be set: it follows from the url and the body")
_Header = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"), _SETTABLE]
_NO_BREAK = _refused(NOT_IN_HEADERS.search, "must not hold control characters")
_HeaderValue = Annotated[str, Field(max_length=8192), _NO_BREAK, _WITH_FACTS]
_ONCE = _refused(lambda named: len({*map(str.lower, named)}) < len(named), "must not hold a name twice, whatever its case")
_Param = Annotated[Any, AfterValidator(_param), WithJsonSchema({"type": ["string", "number", "boolean", "array"]})]
_CODES = _refused(lambda entry: not status_range(entry), 'must be a status code from 100 to 599, or a range such as "200-299"')
_Code = Annotated[Any, _CODES, WithJsonSchema({"type": ["integer", "string"]})]
_Body = Annotated[Any, AfterValidator(_body), WithJsonSchema({"type": ["object", "array", "string"]})]


# Checked, they are the dicts that are stored, with the fields that were sent: no default is filled in, no object made.
class HttpAuth(TypedDict):
    """HTTP basic authentication."""

    username: Annotated[_Text, Field(max_length=1024), _NO_CONTROL, _NO_COLON]
    password: Annotated[_Text, Field(max_length=4096), _NO_CONTROL]


class HttpConfig(TypedDict, total=False):
    """What an http task sends. `${env:CHRONOTASK_SECRET_…}` and `${file:/run/secrets/…}` in it are resolved when it runs."""

    url: Required[Annotated[str, Field(max_length=8192), AfterValidator(_url)]]
    method: Annotated[_Method, _UPPER, Field(json_schema_extra={"default": "GET"})]
    headers: Annotated[dict[_Header, _HeaderValue], Field(max_length=100), _ONCE] | None
    params: Annotated[dict[_FactName, _Param], Field(max_length=1000)] | None
    body: Annotated[_Body | None, Field(description="An object or list is sent as JSON, a string as it is.")]
    auth: HttpAuth | None
    timeout: _Timeout | None
    expected_status: Annotated[list[_Code], Field(min_length=1, max_length=100, description='default ["200-299"]')] | None
    follow_redirects: Annotated[bool, Field(json_schema_extra={"default": True})]
    verify_tls: Annotated[bool, Field(json_schema_extra={"default": True})]


# Bash would take one for a variable of this name, or somebody would want facts as source.
_NO_FACTS = _refused(re.compile(r"\$\{cause:[A-Za-z_]+\}").search, "${cause:…} cannot stand here: use $CHRONOTASK_CAUSE_…")
_FOLDER = _refused(
    lambda path: "$" in path or not (path.startswith("/") or path.partition("/")[0] == "~"),
    "must be an absolute path, or one that starts with ~/ (the home of the service's user), without $",
)
_NOT_EMPTY = _refused(lambda text: not text.strip(), "must hold a command")
# From a Windows editor: bash would take the \r for a part of each last word.
_UNIX_LINES = AfterValidator(lambda text: text.replace("\r\n", "\n"))
_Source = Annotated[str, Field(max_length=65536), _NO_NUL, _NO_FACTS]
_NOT_OURS = _refused(lambda name: name.startswith(ENV_PREFIX), f"cannot be set: {ENV_PREFIX}… belongs to the service")
_Variable = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]{0,254}$"), _NOT_OURS]
_Value = Annotated[str, Field(max_length=65536), _NO_NUL, _WITH_FACTS]


class BashConfig(TypedDict, total=False):
    """What a bash task runs: `command` is bash source, `args` are appended to it as literal words."""

    command: Required[Annotated[_Source, _NOT_EMPTY, _UNIX_LINES]]
    args: Annotated[list[_Source], Field(max_length=1000)] | None
    env: Annotated[dict[_Variable, _Value], Field(max_length=1000)] | None
    working_dir: Annotated[str, Field(min_length=1, max_length=4096), _NO_NUL, _FOLDER] | None
    timeout: _Timeout | None
    launcher: Annotated[str, Field(min_length=1, max_length=40, description="What runs it elsewhere; default: here.")] | None


def parse_config(task_type: str, config: Any) -> dict[str, Any]:
    """`config` checked and in normal form, without nulls. Raises InvalidInput that lists every bad field as `config.…`."""
    return {name: value for name, value in _checked(CONFIGS[task_type], config, "config", config).items() if value is not None}


# --- The configurations of schedules ----------------------------------------------------------------------------------


def _read(check: Callable[[str, str, int], object]) -> AfterValidator:
    """Text without blanks around it that `check` accepts in a zone and at an instant. What is wrong is told with the text."""

    def run(text: str, info: ValidationInfo) -> str:
        try:
            check(text.strip(), *cast(Any, info.context))
        except ValueError as error:
            raise ValueError(f"{shown(text)}: {error}") from None
        return text.strip()

    return AfterValidator(run)


AfterEvent = Literal["success", "failure", "cancelled", "skipped", "missed", "started", "broke", "recovered", "paused", "overdue"]
_EXPRESSION = Field(
    description="minute hour day month weekday, or seconds first; also @daily, L (last day of the month), MON#2 (second Monday), "
    "L5 (last Friday)",
    json_schema_extra={"maxLength": LONGEST_EXPRESSION},
)
_Zone = Annotated[str, _read(lambda name, *_: load_zone(name)), Field(description="IANA time zone; default: the service's")]


class CronConfig(TypedDict, total=False):
    """For cron: 5 fields, or 6 with seconds first."""

    expression: Required[Annotated[str, _EXPRESSION, _read(check_expression)]]
    timezone: _Zone | None


class OnceConfig(TypedDict, total=False):
    """For once: ISO 8601, or so many seconds from now."""

    datetime: Annotated[str, Field(examples=["2030-01-31T09:00:00"]), _read(check_datetime)] | None
    in_seconds: Annotated[float, Field(ge=0.001, le=LONGEST_INTERVAL)] | None
    timezone: _Zone | None


class IntervalConfig(TypedDict, total=False):
    """For interval: every so many seconds, or days at a local time, from `start_date` on, else from its creation."""

    seconds: Annotated[float, Field(ge=1, le=LONGEST_INTERVAL), _MILLISECONDS, _PLAIN] | None
    days: Annotated[int, Field(ge=1, le=3650)] | None
    start_date: Annotated[str, _read(lambda text, zone, _: parse_instant(text, zone))] | None
    timezone: _Zone | None


_ENDS = ("failed", "timed_out", "interrupted")
_ONE_EVENT = _refused(lambda name: name in _ENDS, f"{', '.join(_ENDS)} are one event: write failure, which covers them all")
_Event = Annotated[AfterEvent, BeforeValidator(_ONE_EVENT.func)]


class AfterConfig(TypedDict, total=False):
    """For after: when other tasks come to something. Exactly one of task_ids, tag, any."""

    task_ids: Annotated[list[TaskId], Field(min_length=1, max_length=100)] | None
    tag: Tag | None
    any: Literal[True] | None
    on: Required[Annotated[list[_Event], Field(min_length=1, max_length=10), _UNIQUE]]
    threshold: Annotated[int, Field(ge=1, le=100)] | None
    seconds: Annotated[float, Field(ge=60, le=31622400), _MILLISECONDS, _PLAIN] | None


CONFIGS: dict[str, Any] = {"http": HttpConfig, "bash": BashConfig}
SCHEDULE_CONFIGS: dict[str, Any] = {"cron": CronConfig, "once": OnceConfig, "interval": IntervalConfig, "after": AfterConfig}


for _model in (HttpAuth, *CONFIGS.values(), *SCHEDULE_CONFIGS.values()):
    _model.__pydantic_config__ = STRICT


def check_schedule_config(schedule_type: str, config: Any, default_zone: str, now: int) -> dict[str, Any]:
    """A client's `schedule_config` as it is stored, with `timezone` filled in. Raises InvalidInput with every bad field."""
    zone = default_zone
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # what is wrong with it will be told
        zone = load_zone(config["timezone"].strip()).key
    checked = _checked(SCHEDULE_CONFIGS[schedule_type], config, "schedule_config", (zone, now))
    sent = {name: value for name, value in checked.items() if value is not None and name != "timezone"}
    one_of = {"once": ("datetime", "in_seconds"), "interval": ("seconds", "days"), "after": ("task_ids", "tag", "any")}
    either, on = one_of.get(schedule_type, ("expression",)), sent.get("on", ())
    given, overdue = [name for name in either if name in sent], "overdue" in on
    rules: list[tuple[str, object, str]] = [
        ("", len(given) == 1, f"must have exactly one of {', '.join(either)}, not {' and '.join(given) or 'none'}"),
        (".on", not overdue or len(on) == 1, "overdue must stand alone: make a schedule of its own for it"),
        (".task_ids", not overdue or len(sent.get("task_ids", ())) == 1, "must be exactly one task for overdue"),
        (".seconds", not overdue or "seconds" in sent, "is required for overdue: how long without a success"),
        (".seconds", overdue or not on or "seconds" not in sent, "is only for overdue"),
        (".threshold", "threshold" not in sent or {"broke", "recovered"} & {*on}, "is only for broke and recovered"),
    ]
    if wrong := [FieldError(f"schedule_config{field}", why) for field, right, why in rules if not right]:
        raise InvalidInput(*wrong)
    if "in_seconds" in sent:
        sent["datetime"] = format_local(now + math.ceil(sent.pop("in_seconds") * 1000) * 1000, zone)
    if "start_date" in sent:  # of days a local time: no offset of one day may move it
        sent["start_date"] = start_text(sent["start_date"], zone, now, "days" in sent)
    if "datetime" in sent and (t := parse_instant(sent["datetime"], zone, now)) != parse_instant(sent["datetime"], zone):
        sent["datetime"] = format_local(t, zone)
    return sent if schedule_type == "after" else {**sent, "timezone": zone}


# --- Masks: what a reader sees instead of a secret --------------------------------------------------------------------


def _map_secrets(config: dict[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """A configuration, or fields of one, with what `change` makes, of path and text, of each text that may be a secret; bash has
    no such fields."""
    url, result = config.get("url") or "", dict(config)
    if "@" in url and (parts := url_parts(url)).userinfo:
        end = len(url) - len(parts.host) - len(parts.rest) - 1
        result["url"] = url[: end - len(parts.userinfo)] + change("url", parts.userinfo) + url[end:]
    if config.get("auth"):
        result["auth"] = {**config["auth"], "password": change("auth.password", config["auth"]["password"])}
    if config.get("headers"):
        result["headers"] = {
            name: change(f"headers.{name}", value) if name.lower() in MASKED_HEADERS else value
            for name, value in config["headers"].items()
        }
    return result


def mask_config(config: dict[str, Any]) -> dict[str, Any]:
    """A task's `config` as answers, the log and the history may show it; of a damaged one nothing. Values that are only a `${…}`
    reference stay readable."""

    def masked(name: str, text: str) -> str:
        return text if (_HARMLESS_USERINFO if name == "url" else _HARMLESS).fullmatch(text) else MASK

    try:
        return _map_secrets(config, masked)
    except DAMAGE:
        return {}


def _same_server(url: str, kept: str) -> bool:
    """Whether both have one scheme, host and port. While a reference decides about them, only where the URL stays as it is."""
    new, old = url_parts(url), url_parts(kept)
    same = (new.scheme, new.host.lower()) == (old.scheme, old.host.lower()) and new.scheme != "" and "$" not in new.host
    return same or url in (kept, mask_config({"url": kept})["url"])


def unmask_config(task_type: str, new: dict[str, Any], stored: dict[str, Any], kept: Collection[str] = ()) -> dict[str, Any]:
    """`new`, parsed, with the stored secret for each mask that was sent; it has the fields `kept` from `stored`. Raises
    InvalidInput for a mask that stands for nothing, and for every secret of `stored` once the URL's origin differs: else who may
    edit a task, or run it otherwise, could have its secrets sent to a server of their own."""
    if task_type != "http" or not (kept or MASK in str(new)):
        return new
    secrets, refused = dict[str, str](), list[str]()
    if _same_server(new["url"], stored.get("url", "")):
        _map_secrets(stored, lambda name, text: secrets.setdefault(name.lower(), text))
    else:
        refused += [name for name in sorted(kept) if SECRET_REFERENCE.search(compact(stored[name]))]

    def secret(name: str, sent: str) -> str:
        if MASK not in sent:
            return sent
        if sent != MASK or name.lower() not in secrets:
            refused.append(name)
        return secrets.get(name.lower(), sent)

    result = _map_secrets(new, secret)
    if refused:
        why = f"give the secret again: {MASK} alone keeps a stored one, while scheme, host and port of the url stay the same"
        raise InvalidInput(*(FieldError(f"config.{name}", why) for name in refused))
    return result


def override_config(task_type: str, config: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`config` with single fields replaced, or taken away by null. Raises InvalidInput as for a change of the task."""
    new = parse_config(task_type, {**mask_config(config), **override})
    return unmask_config(task_type, new, config, config.keys() - override)


# --- The words of tasks, schedules and executions ---------------------------------------------------------------------

UNFINISHED = ("queued", "running", "retrying")
FINISHED = ("succeeded", "failed", "timed_out", "cancelled", "skipped", "missed", "interrupted")
NEVER_STARTED = ("skipped", "missed")  # rows that record a slot which ran nothing
SUCCESS: dict[str, bool] = {"succeeded": True, "failed": False, "timed_out": False, "interrupted": False}
LIST_TEXT_LIMIT = 4096  # characters of each output text in lists
MAX_RETRY_WAIT = 3600.0  # seconds, also when a server asks for more
MAX_ID = 2**63 - 1  # SQLite's largest rowid
KEY_OF_TASK = re.compile(r"key:[a-z0-9][a-z0-9._-]{0,99}")
# Control characters, line and paragraph separators, and what turns the direction of text around.
_NOT_ONE_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ANY_STATUS = (*UNFINISHED, *FINISHED, "unfinished")


def compact(value: Any) -> str:
    """`value` as compact JSON text."""
    return to_json(value).decode()


def parsed(text: str) -> Any:
    """The value of JSON text that SQLite or `compact` wrote."""
    return from_json(text, cache_strings="keys")  # values may be secrets


def instant_or_none(t: int | None) -> str | None:
    return None if t is None else format_instant(t)


def _task_id(sent: Any, check: Callable[[Any], Any]) -> Any:
    if isinstance(sent, str) and KEY_OF_TASK.fullmatch(sent):
        return sent
    if isinstance(sent, bool) or (isinstance(sent, str) and not re.fullmatch("[0-9]{1,19}", sent)):
        raise ValueError(f"must be the id of a task, or key:NAME, not {shown(sent)}")
    return check(sent)


def _statuses(sent: Any) -> Any:
    names = sent.split(",") if isinstance(sent, str) else sent
    if not isinstance(names, (list, tuple)) or not set(map(str, names)) <= set(_ANY_STATUS):
        raise ValueError(f"must be one or more, comma-separated, of {', '.join(_ANY_STATUS)}")
    return tuple(dict.fromkeys(status for name in names for status in (UNFINISHED if name == "unfinished" else (name,))))


_UNIQUE = AfterValidator(lambda entries: list(dict.fromkeys(entries)))
_NUMBER = _refused(lambda sent: isinstance(sent, (bool, float)), "must be a whole number, not {}")
Id = Annotated[int, Field(ge=1, le=MAX_ID), BeforeValidator(_NUMBER.func)]
Skip = Annotated[int, Field(ge=0, le=MAX_ID)]
Limit = Annotated[int, Field(ge=1, le=1000)]
# The id of a task, or `key:NAME`, which stands for it until `Operation.call`.
_ID_OR_KEY = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": KEY_OF_TASK.pattern}]})
TaskId = Annotated[Id, WrapValidator(_task_id), _ID_OR_KEY]
_BLANK = _refused(lambda text: not text.strip() or _NOT_ONE_LINE.search(text), "must not be blank or contain control characters")
Name = Annotated[str, Field(min_length=1, max_length=255), _BLANK]
Key = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9._-]{0,99}$", description="a name for programs and files, in lower case")]
Tag = Annotated[str, Field(pattern="^[A-Za-z0-9._:-]{1,50}$")]
TaskType = Literal["http", "bash"]
TaskStatus = Annotated[
    Literal["active", "paused", "disabled"],
    Field(description="paused: its schedules do not fire; disabled: execute_task is refused too"),
]
Group = Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,100}$", description="one run at a time of all tasks with this group")]
ScheduleType = Literal["cron", "once", "interval", "after"]
Overlap = Annotated[
    Literal["skip", "queue", "allow", "cancel"],
    Field(description="if the task still runs at a slot: skip the slot, queue it, run both, or cancel what runs"),
]
Catchup = Annotated[
    Literal["latest", "all", "skip"], Field(description="of slots missed while the service was down, run the newest, all or none")
]
CatchupWindow = Annotated[float, Field(ge=0, le=315360000, description="seconds; older slots are never caught up"), _PLAIN]
_Days = Annotated[str, AfterValidator(lambda text: span_of(text, "UTC") and text)]
Exclude = Annotated[list[_Days], Field(max_length=400, description="days without slots: 2026-12-24, or 2026-12-24/2026-12-26")]
_READABLE = _refused(lambda text: parse_bound(text, "UTC") < 0, "")  # it says itself what is wrong
Instant = Annotated[str, Field(max_length=64, description="ISO 8601, without an offset in timezone"), _READABLE]
IdempotencyKey = Annotated[str, Field(pattern="^[!-~]{1,255}$", description="asked again with it, no second run")]
Since = Annotated[str, Field(max_length=64, description="ISO 8601; a date alone is that day"), _READABLE]
Statuses = Annotated[
    tuple[str, ...],
    BeforeValidator(_statuses),
    WithJsonSchema({"type": "array", "items": {"type": "string", "enum": list(_ANY_STATUS)}}),
]


class Hold:
    """Bits that say why a `queued` execution may not start yet, and what lifts it."""

    OVERLAP = 1  # behind every earlier unfinished execution of its task (overlap `queue` and `cancel`)
    CATCHUP = 2  # behind the earlier catch-up (or backfill) executions of its schedule
    DISABLED = 4  # until its task is no longer disabled


# --- Resources, each declared once ------------------------------------------------------------------------------------

Mark = enum.Enum("Mark", "READ_ONLY INTERNAL QUERIED OR_NULL TIME")
ReadOnly = Annotated[T, Mark.READ_ONLY]
Internal = Annotated[T, Mark.INTERNAL]
Queried = Annotated[T, Mark.QUERIED]
OrNull = Annotated[T, Mark.OR_NULL]
Time = Annotated[int, Mark.TIME, WithJsonSchema({"type": "string", "format": "date-time"})]
UNSET: Any = None  # a default that is a setting, or of no effect


@dataclass(slots=True, kw_only=True)
class Task:
    """What to do. `config` is in normal form, with its secrets; `retry_delay` is seconds."""

    id: ReadOnly[int] = 0
    key: Key | None = None
    name: Name
    description: Annotated[str, Field(max_length=1000), _NO_NUL] | None = None
    tags: Annotated[list[Tag], Field(max_length=20), _UNIQUE] = dataclasses.field(default_factory=list)
    task_type: TaskType
    status: TaskStatus = "active"
    status_reason: ReadOnly[str | None] = None
    paused_until: Time | None = None
    config: dict[str, Any]
    max_retries: Annotated[int, Field(ge=0, le=100)] = UNSET
    retry_delay: Annotated[float, Field(ge=0, le=86400, description="seconds before the first retry"), _PLAIN] = UNSET
    retry_backoff: Annotated[float, Field(ge=1, le=10, description="each further wait is this many times longer"), _PLAIN] = 2
    pause_after: Annotated[int, Field(ge=1, le=1000, description="pauses the task after so many failures in a row")] | None = None
    concurrency_group: Group | None = None
    managed_by: ReadOnly[str | None] = None
    created_at: ReadOnly[Time]
    updated_at: ReadOnly[Time]
    last_run: ReadOnly[Time | None] = None
    last_status: ReadOnly[str | None] = None
    last_success: Internal[ReadOnly[Time | None]] = None
    last_success_id: Internal[ReadOnly[int | None]] = None
    next_run: Queried[ReadOnly[Time | None]] = None
    run_count: ReadOnly[int] = 0
    success_count: ReadOnly[int] = 0
    failure_count: ReadOnly[int] = 0
    failures_in_a_row: ReadOnly[int] = 0


@dataclass(slots=True, kw_only=True)
class Schedule:
    """When a task fires. It stands at `settled_until`: `next_slot` is the first slot later than that, `next_fire` that slot with
    its jitter. What `dealt_with`, `in_force_since` and `ran` mean, says `Plan`."""

    also_shown: ClassVar = {"next_run": "last_run", "description": "run_count"}

    id: ReadOnly[int] = 0
    key: Key | None = None
    task_id: ReadOnly[int]
    task_name: Queried[ReadOnly[str]] = ""
    schedule_type: ScheduleType
    schedule_config: dict[str, Any]
    is_active: bool = True
    overlap: Overlap = "skip"
    catchup: OrNull[Catchup] = "latest"
    catchup_window: OrNull[CatchupWindow] = 86400
    jitter: OrNull[Annotated[float, Field(ge=0, le=3600, description="seconds; spreads the starts"), _PLAIN]] = 0
    start_at: Time | None = None
    end_at: Time | None = None
    max_runs: Annotated[int, Field(ge=1, le=2**53)] | None = None
    exclude: OrNull[Exclude] = dataclasses.field(default_factory=list)
    managed_by: ReadOnly[str | None] = None
    created_at: ReadOnly[Time]
    updated_at: ReadOnly[Time]
    settled_until: Internal[Time]
    next_slot: Internal[Time | None] = None
    next_fire: Internal[Time | None] = None
    last_run: ReadOnly[Time | None] = None
    run_count: ReadOnly[int] = 0
    dealt_with: Internal[Time] = 0
    in_force_since: Internal[Time] = 0
    ran: Internal[list[list[int]]] = dataclasses.field(default_factory=list)
    over: Internal[bool] = False  # switched off because no slot was left
    live: Queried[Internal[bool]] = True  # its task is active and, once the service knows it, the scheduler not paused
    # Of the tasks that one of type `after` names, those that exist: id, name, last success, its id.
    watched: Queried[Internal[list[list[Any]]]] = dataclasses.field(default_factory=list)

    @property
    def next_run(self) -> Time | None:
        return self.next_fire if self.live and self.is_active else None

    @property
    def description(self) -> str:
        """The schedule in words; a damaged one says what is wrong."""
        try:
            return self.plan().timing.describe()
        except Exception as error:
            return f"this schedule cannot be evaluated: {error!r}"

    @property
    def zone(self) -> str:
        return str(self.schedule_config.get("timezone", "UTC"))

    def plan(self) -> Plan:
        """The schedule as pure arithmetic."""
        # An interval that was made by a clock that was ahead keeps its phase, and has slots before that.
        since = min(self.created_at, self.settled_until) if self.settled_until < self.dealt_with else self.created_at
        timing = make_timing(self.schedule_type, self.schedule_config, self.created_at, since, self.watched)
        end_at = LAST_INSTANT if self.end_at is None else self.end_at
        plan = Plan(timing, self.id, self.start_at or 0, end_at, self.jitter, self.catchup, self.catchup_window)
        plan.remaining = math.inf if self.max_runs is None else max(0, self.max_runs - self.run_count)
        plan.dealt_with, plan.in_force_since = self.dealt_with, self.in_force_since
        plan.ran = [*self.ran, *(span_of(days, self.zone) for days in self.exclude)]
        return plan

    def stand(self, at: int) -> None:
        """Everything up to `at` is dealt with."""
        self.settled_until, self.dealt_with = at, max(self.dealt_with, at)

    def look_ahead(self) -> None:
        """Finds the first slot after `settled_until`; without one the schedule is over."""
        plan = self.plan()
        self.set_next(plan.next_slot(self.settled_until), plan)

    def set_next(self, next_slot: int | None, plan: Plan) -> None:
        """Sets what comes next. Without a next slot the schedule is over; with one again, it is active again."""
        wanted = self.is_active or self.over  # nobody has switched it off
        self.next_slot = next_slot
        self.next_fire = None if next_slot is None else plan.fire_time(next_slot)
        left = next_slot is not None
        if self.schedule_type == "after":  # one without a slot waits for what comes
            left = bool("task_ids" not in self.schedule_config or self.watched)
            left = left and plan.remaining != 0 and plan.end_at >= self.settled_until
        self.is_active, self.over = wanted and left, wanted and not left


@dataclass(slots=True, kw_only=True)
class Execution:
    """One run of a task, past, present or queued. `started_at` is the first attempt's start."""

    also_shown: ClassVar = {"success": "status", "duration": "finished_at", "retry_count": "attempt"}

    id: ReadOnly[int]
    task_id: ReadOnly[int]
    task_name: Queried[ReadOnly[str]]
    schedule_id: ReadOnly[int | None] = None
    trigger: ReadOnly[str]
    status: ReadOnly[str]
    scheduled_for: ReadOnly[Time | None] = None
    queued_at: ReadOnly[Time]
    started_at: ReadOnly[Time | None] = None
    finished_at: ReadOnly[Time | None] = None
    attempt: ReadOnly[int]
    next_attempt_at: ReadOnly[Time | None] = None
    error_message: ReadOnly[str | None] = None
    output_data: ReadOnly[dict[str, Any] | None] = None
    config: Annotated[dict[str, Any], Field(description="fields of its config, for this run alone")] | None = None
    cause: ReadOnly[dict[str, Any] | None] = None
    rerun_of: ReadOnly[int | None] = None
    attempt_started_at: Internal[Time | None] = None

    @property
    def success(self) -> bool | None:
        return SUCCESS.get(self.status)

    @property
    def duration(self) -> float | None:
        if self.started_at is None or self.finished_at is None:
            return None
        return max(0, self.finished_at - self.started_at) / SECOND

    @property
    def retry_count(self) -> int:
        return max(0, self.attempt - 1)


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One try at an execution. A row of `attempts` was followed by another one; the last one lives on the execution itself."""

    also_shown: ClassVar = {"duration": "finished_at"}

    attempt: ReadOnly[int]
    status: ReadOnly[str]
    started_at: ReadOnly[Time | None]
    finished_at: ReadOnly[Time | None]
    error_message: ReadOnly[str | None]
    output_data: ReadOnly[dict[str, Any] | None]

    duration = Execution.duration


@dataclass(slots=True, kw_only=True)
class Change:
    """What somebody has written: of `before` and `after` only what differs, masked. `via` says which way, and from where."""

    id: ReadOnly[int]
    at: ReadOnly[Time]
    actor: ReadOnly[str]
    via: ReadOnly[str]
    kind: ReadOnly[str]
    object_id: ReadOnly[int | None]
    operation: ReadOnly[str]
    before: ReadOnly[dict[str, Any] | None] = None
    after: ReadOnly[dict[str, Any] | None] = None


class Shape:
    """What follows from the declaration of a resource, or of any dataclass that is made from rows."""

    def __init__(self, resource: Any) -> None:
        hints = get_type_hints(resource, include_extras=True)
        fields = {field.name: field for field in dataclasses.fields(resource)}
        marked = {mark: {name for name in fields if mark in getattr(hints[name], "__metadata__", ())} for mark in Mark}
        self.loaded = tuple(fields)  # columns, and what queries compute
        self.columns = tuple(name for name in self.loaded if name not in marked[Mark.QUERIED])  # of its table
        self.defaults: dict[str, Any] = {  # of the fields that have one
            name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for name, field in fields.items()
            if not (field.default is field.default_factory is dataclasses.MISSING)
        }
        shown = [name for name in fields if name not in marked[Mark.INTERNAL]]
        for name, before in getattr(resource, "also_shown", {}).items():
            shown.insert(shown.index(before) + 1, name)
            hints[name] = get_type_hints(getattr(resource, name).fget, include_extras=True)["return"]
        arms = {name: _arms(kind) for name, kind in hints.items()}
        hints |= {name: hints[name] | None for name in marked[Mark.OR_NULL]}
        self.times = [name for name in arms if Mark.TIME in arms[name]]
        # Columns of other whole numbers; of a Run none: that the settings of its task are damaged is told by `decide_end`.
        self.whole = [name for name in self.loaded if self.times and arms[name][0] is int]
        # Columns that hold JSON. What is damaged is read as NULL, and is empty: it does not stop other rows.
        kinds = {dict: "object", list: "array"}
        self.json = {name: kinds[kind] for name in self.loaded if (kind := get_origin(arms[name][0])) in kinds}
        empty = {name: "or {}" if self.json[name] == "object" else "or []" for name in self.json if len(arms[name]) == 1}
        self.shown = {name: hints[name] for name in shown}  # what a client sees, and its type there
        not_written = marked[Mark.READ_ONLY] | marked[Mark.INTERNAL]
        self.written = {  # what a client may write
            name: Instant | None if name in self.times else hints[name] for name in fields if name not in not_written
        }
        # Of a row of what is loaded, and what is shown. Generated, they take half of what loops over the fields take.
        read = {name: "bool" for name in self.loaded if arms[name] == [bool]}
        values = [f"{name}={read.get(name, '')}(row[{at}]){empty.get(name, '')}" for at, name in enumerate(self.loaded)]
        views = [f"{name!r}: {'text' if name in self.times else ''}(item.{name})" for name in shown]
        self.make: Callable[[Sequence[Any]], Any] = eval(f"lambda row: kind({', '.join(values)})", {"kind": resource})
        self.view: Callable[[Any], dict[str, Any]] = eval(f"lambda item: {{{', '.join(views)}}}", {"text": instant_or_none})


shape_of = functools.cache(Shape)


def _arms(kind: Any) -> list[Any]:
    """The types of which a declared one is a union, without what else is said of them; of a time its mark."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return [Mark.TIME] if Mark.TIME in args else _arms(args[0])
    return [arm for one in args for arm in _arms(one)] if origin in (Union, UnionType) else [kind]


def view_of(item: Any) -> dict[str, Any]:
    """What a client sees of a resource: secrets are masked."""
    view = shape_of(cast(Any, type(item))).view(item)
    if isinstance(item, (Task, Execution)) and item.config:
        view["config"] = mask_config(item.config)
    elif isinstance(item, Schedule) and item.schedule_type == "after":
        view |= dict.fromkeys(NOT_OF_AFTER)
    return view


# --- Executions under way ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class NewExecution:
    """An execution, or the record of a slot that ran nothing, about to be written."""

    task_id: int
    schedule_id: int | None
    trigger: str
    scheduled_for: int | None
    queued_at: int
    status: str = "queued"
    hold: int = 0
    error_message: str | None = None
    fire_at: int | None = None  # the slot with its jitter
    config: str | None = None  # JSON text: what it overrides
    rerun_of: int | None = None
    cause: str | None = None  # JSON text
    caused_by: int | None = None  # an execution; or -task_id: that there is none
    event: str | None = None
    depth: int = 0  # of these, how many `after` has fired one because of the other


@dataclass(slots=True)
class Run:
    """An attempt that was just written as `running`: the execution, and its task as it is now."""

    execution_id: int
    task_id: int
    schedule_id: int | None
    trigger: str
    scheduled_for: int | None
    fire_at: int | None
    attempt: int
    uuid: str
    started_at: int
    task_name: str
    task_type: str
    config: str  # JSON text
    max_retries: int
    retry_delay: float
    retry_backoff: float
    cause: str | None = None  # JSON text
    override: str | None = None  # JSON text
    concurrency_group: str | None = None
    owner: str = ""  # the process that runs it

    @property
    def run_id(self) -> str:
        """A UUID, known again after a crash without being stored: the execution's, its end the attempt's number."""
        return f"{self.uuid[:-4]}{self.attempt:04x}"


@dataclass(slots=True)
class Finished:
    """What becomes of an execution when an attempt of it ends."""

    run: Run
    status: str  # a final status, or `retrying`
    attempt_status: str
    finished_at: int
    next_attempt_at: int | None
    error_message: str | None
    output: str | None  # JSON text: made at once, where the parts are still at hand


@dataclass(slots=True)
class Ended:
    """An execution that is over, or begins (`running`), and the failures in a row of its task before and after that."""

    execution_id: int
    task_id: int
    status: str
    finished_at: int
    before: int | None = None  # None: it does not count
    after: int | None = None
    paused: bool = False


# --- What a client gets -----------------------------------------------------------------------------------------------


class View:
    """Marks a dict as what a client sees of a resource, or of none. `more` are further fields, with their types."""

    config: ClassVar = ConfigDict()

    def __init__(self, resource: Any, name: str, /, **more: Any) -> None:
        self.resource, self.name = resource, name
        self.fields = (shape_of(resource).shown if resource else {}) | more

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> Any:
        made = cast(Any, TypedDict)(self.name, self.fields)
        made.__pydantic_config__ = self.config
        return handler.generate_schema(made)


def mark_of(kind: Any) -> Any:
    """The View or Body that a type is marked with, or None."""
    return next((mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, View)), None)


Upcoming = Annotated[dict[str, Any], View(None, "Upcoming", utc=str, local=str)]
Firing = Annotated[dict[str, Any], View(None, "Firing", utc=str, local=str, schedule_id=int, task_id=int, task_name=str)]
_Coming: dict[str, Any] = {"upcoming": NotRequired[list[Upcoming]], "notes": NotRequired[list[str]]}
ScheduleView = Annotated[dict[str, Any], View(Schedule, "ScheduleView", **_Coming)]
TaskView = Annotated[dict[str, Any], View(Task, "TaskView", schedules=NotRequired[list[ScheduleView]])]
AttemptView = Annotated[dict[str, Any], View(Attempt, "AttemptView")]
_Tried: dict[str, Any] = {"attempts": NotRequired[list[AttemptView]], "caused": NotRequired[list[int]]}
ExecutionView = Annotated[dict[str, Any], View(Execution, "ExecutionView", **_Tried)]
ChangeView = Annotated[dict[str, Any], View(Change, "ChangeView")]
RecentRun = dict[str, Any]
OverviewTask = dict[str, Any]
_COUNTED: dict[str, Any] = {"total": int, "skip": int, "limit": int}
TaskPage = Annotated[dict[str, Any], View(None, "TaskPage", **_COUNTED, tasks=list[TaskView])]
SchedulePage = Annotated[dict[str, Any], View(None, "SchedulePage", **_COUNTED, schedules=list[ScheduleView])]
HistoryPage = Annotated[dict[str, Any], View(None, "HistoryPage", **_COUNTED, history=list[ExecutionView])]
OverviewPage = Annotated[dict[str, Any], View(None, "OverviewPage", **_COUNTED, tasks=list[OverviewTask])]
ChangePage = Annotated[dict[str, Any], View(None, "ChangePage", changes=list[ChangeView], next_before_id=int | None)]
ExecutionPage = Annotated[dict[str, Any], View(None, "ExecutionPage", executions=list[ExecutionView], next_before_id=int | None)]
UpcomingPage = Annotated[dict[str, Any], View(None, "UpcomingPage", upcoming=list[Firing])]
BackfillView = Annotated[dict[str, Any], View(None, "BackfillView", slots=list[Upcoming], executions=list[int])]
_Looked: dict[str, Any] = {"description": str, "upcoming": list[Upcoming], "notes": list[str], "note": NotRequired[str]}
PreviewView = Annotated[dict[str, Any], View(None, "PreviewView", **_Looked)]
SHOWN_DEFAULTS = ("max_retries", "retry_delay", "http_timeout", "bash_timeout", "allow_host_commands")
StatusView = dict[str, Any]  # of the scheduler, for people


def notes_of(schedule: Schedule, now: int, paused: bool = False) -> list[str]:
    """Sentences about what a schedule probably does not mean, and why nothing will fire."""
    notes = schedule.plan().timing.notes(now)
    if schedule.max_runs is not None and (more := schedule.run_count - schedule.max_runs) >= 0:
        notes.append(f"max_runs of {schedule.max_runs} is reached" + (f", and exceeded by {more}." if more else "."))
    elif schedule.over or (schedule.end_at is not None and schedule.end_at < now):
        notes.append("Nothing will fire: no slot is left.")
    elif not schedule.is_active:
        notes.append("Nothing will fire: is_active is false.")
    elif paused or not schedule.live:
        notes.append(f"Nothing will fire: {'the scheduler is paused' if paused else 'its task is not active'}.")
    elif schedule.next_slot is None and "overdue" in schedule.schedule_config.get("on", ()):
        notes.append("Nothing will fire before the next success.")
    return notes


def overview_view(task: TaskView, recent: Sequence[tuple[RecentRun, str | None]]) -> OverviewTask:
    """A task with its recent executions, which are given oldest first, each with its error message."""
    judged = [SUCCESS[run["status"]] for run, _ in recent if run["status"] in SUCCESS]
    times = sorted(run["duration"] for run, _ in recent if run["status"] == "succeeded" and run["duration"] is not None)
    errors = [error for run, error in recent if run["status"] in FINISHED and run["status"] not in NEVER_STARTED]
    return {
        **task,
        "last_error": (errors[-1] or "")[:300] or None if errors else None,
        "success_rate": sum(judged) / len(judged) if judged else None,
        "typical_duration": times[len(times) // 2] if times else None,
        "recent": [run for run, _ in recent],
    }


def output_text(output: dict[str, Any] | None) -> str:
    """Kept output as plain text: the body, or stdout and then stderr."""
    if output is None:
        return ""
    if "body" in output:
        body = output["body"]
        return body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, indent=2)
    stdout, stderr = output.get("stdout") or "", output.get("stderr") or ""
    break_line = "\n" if stdout and not stdout.endswith("\n") else ""
    return stdout + (f"{break_line}--- stderr ---\n{stderr}" if stderr else "")


def firings(schedules: Iterable[Schedule], until: int, limit: int) -> list[Firing]:
    """The next firings of schedules in their true order, each as often as it fires."""

    def of(schedule: Schedule) -> Iterator[tuple[int, int, Firing]]:
        about = {"schedule_id": schedule.id, "task_id": schedule.task_id, "task_name": schedule.task_name}
        with contextlib.suppress(*DAMAGE):
            for t in schedule.plan().upcoming(schedule.settled_until, limit):
                yield t, schedule.id, about | upcoming_view([t], schedule.zone)[0]

    merged = itertools.takewhile(lambda firing: firing[0] <= until, heapq.merge(*map(of, schedules)))
    return [firing for _, _, firing in itertools.islice(merged, limit)]


def upcoming_view(fire_times: Iterable[int], zone: str) -> list[Upcoming]:
    return [{"utc": format_instant(t), "local": format_local(t, zone)} for t in fire_times]


# --- What a client sends ----------------------------------------------------------------------------------------------


class Body(View):
    """Marks a dict of the fields of a resource that a client sent, `without` some. Those that have no default are required, none
    of an `update`: that is the view which can be sent back with it. Unknown fields are refused, types not converted."""

    config = STRICT

    def __init__(self, resource: Any, name: str, /, update: Any = None, without: Collection[str] = (), **more: Any) -> None:
        self.resource, self.name, self.update, self.fields = resource, name, update, more
        for field, kind in shape_of(resource).written.items() if resource else ():
            if field not in {*without, *more}:
                default = shape_of(resource).defaults.get(field, ...)
                if not update and default not in (None, ...):
                    kind = Annotated[kind, Field(json_schema_extra={"default": default})]
                self.fields[field] = NotRequired[kind] if update or default is not ... else kind
        # Whether a request may do without it; and what may be sent, though it changes nothing.
        self.optional = not update and all(get_origin(kind) is NotRequired for kind in self.fields.values())
        self.ignored = mark_of(update).fields.keys() - self.fields.keys() if update else set[str]()


NOT_OF_AFTER = {name for name, kind in Schedule.__annotations__.items() if kind.startswith("OrNull")}
NestedSchedule = Annotated[dict[str, Any], Body(Schedule, "NestedSchedule")]
Nested = NotRequired[Annotated[list[NestedSchedule], Field(max_length=100, description="made with it")]]
TaskCreate = Annotated[dict[str, Any], Body(Task, "TaskCreate", schedules=Nested)]
TaskUpdate = Annotated[dict[str, Any], Body(Task, "TaskUpdate", update=TaskView)]
ScheduleCreate = Annotated[dict[str, Any], Body(Schedule, "ScheduleCreate", task_id=TaskId)]
ScheduleUpdate = Annotated[dict[str, Any], Body(Schedule, "ScheduleUpdate", update=ScheduleView, task_id=NotRequired[TaskId])]
_Previewed: dict[str, Any] = {
    "task_id": NotRequired[TaskId],  # so that the body of a schedule can be previewed as it is
    "after": NotRequired[Instant | None],
    "count": NotRequired[Annotated[Limit, Field(json_schema_extra={"default": 5})]],
}
SchedulePreview = Annotated[dict[str, Any], Body(Schedule, "SchedulePreview", **_Previewed)]
PauseBody = Annotated[dict[str, Any], Body(None, "PauseBody", until=NotRequired[Instant | None])]
BackfillBody = Annotated[dict[str, Any], Body(None, "BackfillBody", **{"from": Since, "to": Since}, dry_run=NotRequired[bool])]
ExecuteBody = Annotated[dict[str, Any], Body(Execution, "ExecuteBody")]


def field_names(model: Any) -> Collection[str]:
    """Of a configuration, a body or a query."""
    mark = mark_of(model)
    return cast(Collection[str], mark.fields if mark else model.__annotations__ if is_typeddict(model) else model.model_fields)


class Query(BaseModel):
    """Base of all query strings: values arrive as text and are converted. `headers`: of fields that a request has as headers."""

    headers: ClassVar[dict[str, str]] = {}
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


class TaskQuery(Query):
    status: TaskStatus | None = None
    task_type: TaskType | None = None
    q: Annotated[str, Field(max_length=255), _NO_NUL] | None = None
    tag: Tag | None = None
    key: Key | None = None
    skip: Skip = 0
    limit: Limit = 100


class ScheduleQuery(Query):
    task_id: TaskId | None = None
    tag: Tag | None = None
    schedule_type: ScheduleType | None = None
    is_active: bool | None = None
    skip: Skip = 0
    limit: Limit = 100


class RunQuery(Query):
    status: Statuses | None = None
    since: Since | None = None
    until: Since | None = None
    output: Literal["full", "none"] | None = None
    limit: Limit = 100


class HistoryQuery(RunQuery):
    success: bool | None = None
    skip: Skip = 0


class ExecutionQuery(RunQuery):
    task_id: TaskId | None = None
    tag: Tag | None = None
    schedule_id: Id | None = None
    trigger: Literal["schedule", "catchup", "manual", "after", "rerun", "backfill"] | None = None
    before_id: Id | None = None


class UpcomingQuery(Query):
    until: Since | None = None
    task_id: TaskId | None = None
    tag: Tag | None = None
    limit: Limit = 100


class ChangeQuery(Query):
    kind: Literal["task", "schedule", "execution", "scheduler"] | None = None
    id: TaskId | None = None  # of whatever kind
    before_id: Id | None = None
    limit: Limit = 100


class WaitQuery(Query):
    wait: Annotated[float, Field(ge=0, le=300)] = 0


class ExecuteQuery(WaitQuery):
    headers = {"idempotency_key": "Idempotency-Key"}
    idempotency_key: IdempotencyKey | None = None


class FollowQuery(Query):
    follow: bool = False


class EventQuery(Query):
    headers = {"last_event_id": "Last-Event-ID"}
    task_id: TaskId | None = None
    last_event_id: str | None = None


def parse(model: Any, data: Any) -> Any:
    """`data` as `model`, a Query or a dict that is marked with a Body. Raises InvalidInput that lists every bad field."""
    body, errors = mark_of(model), list[FieldError]()
    if body is not None and isinstance(data, dict):
        data = {name: value for name, value in data.items() if name not in body.ignored}
    with told_at("", errors):
        return _checked(model, data)
    if body is not None and isinstance(data, dict):
        # What is wrong inside the configuration is told with it: in itself, so that zone and time may be made up.
        nested = enumerate(data["schedules"] if isinstance(data.get("schedules"), list) else ())
        for path, part in [("", data), *((f"schedules[{n}].", part) for n, part in nested if isinstance(part, dict))]:
            with told_at(path, errors):
                if isinstance(part.get("config"), dict) and part.get("task_type") in tuple(CONFIGS):
                    parse_config(part["task_type"], part["config"])
                if isinstance(part.get("schedule_config"), dict) and part.get("schedule_type") in tuple(SCHEDULE_CONFIGS):
                    check_schedule_config(part["schedule_type"], part["schedule_config"], "UTC", 0)
    raise InvalidInput(*errors)


# ======================================================================================================================
# 4. Decisions (pure)
# ======================================================================================================================
#
# What becomes of slots and of attempts, as functions of what is known and of `now`. Invariants, each with a test of its name:
#   What is remembered of slots only grows: what was dealt with, since when a schedule is in force, which slots ran.
#   A slot that ran never runs again; one that is late and was dealt with, or lay before a creation, an edit or the end of a
#   pause, is not made up for.

ON_TIME = 5 * SECOND  # a slot claimed at most this late is on time
CATCHUP_MOST = 100  # slots that catchup=all runs at most
MISSED_COUNTED = 1000  # missed slots are counted up to this many
RUNS_KEPT = 8  # stretches of slots that ran, remembered of each schedule

SKIPPED_RUNNING = "skipped: the previous execution is still running (overlap=skip)"
SKIPPED_WAITING = "skipped: another execution is already waiting (overlap=queue)"
SKIPPED_PAUSED = "skipped: the time passed while the schedule was paused"
CANCELLED_BY_OVERLAP = "cancelled: a later slot started instead (overlap=cancel)"

# --- Due slots --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Missed:
    """Missed slots that follow each other: one history row, at the first of them. `count` stops at MISSED_COUNTED."""

    first: int
    last: int
    count: int
    reason: str

    def message(self, zone: str) -> str:
        first, last = format_local(self.first, zone), format_local(self.last, zone)
        slots = f"{self.count}{' or more' * (self.count >= MISSED_COUNTED)} slots from {first} to {last}"
        return f"missed: {slots if self.count > 1 else f'1 slot, {first}'} ({zone}); {self.reason}"


class Due(NamedTuple):
    """What to do about the slots that are due, in this order: record `missed`, run `catchup`, claim `on_time`."""

    missed: Missed | None
    catchup: list[int]
    on_time: list[int]
    settled_until: int  # every slot up to this one is dealt with
    next_slot: int | None


def due_slots(plan: Plan, settled_until: int, now: int, early: bool = False) -> Due:
    """What is to be done at `now` about the slots later than `settled_until`; with `early` also if the jitter has not passed.

    Where a schedule stands goes back with the clock (`stands_at`). When the clock jumps forward from there, it may have been
    behind and be right again: then nothing up to `dealt_with` is made up for. While it has not reached that again, that was
    a future which did not come, and a slot that is late now was missed, as any other. max_runs is left to the claim.
    """
    missed, catchup = None, list[int]()
    slot = plan.next_slot(settled_until)
    if slot is not None and plan.fire_time(slot) < now - ON_TIME:
        newest = plan.last_slot(now - ON_TIME - 1) or slot
        if plan.fire_time(newest) >= now - ON_TIME:  # a slot fires before the next one, so the one before has fired
            newest = plan.last_slot(newest - 1) or slot
        known = plan.dealt_with if plan.dealt_with <= now else plan.in_force_since
        first = plan.next_slot(max(settled_until, known))
        if first is not None and first <= newest:
            wanted, reason = {
                "skip": (0, "catchup=skip"),
                "latest": (1, "catchup=latest runs only the newest"),
                "all": (CATCHUP_MOST, f"catchup=all runs only the newest {CATCHUP_MOST}"),
            }[plan.catchup]
            last: int | None = newest
            oldest = max(first, now - round(plan.catchup_window * SECOND))
            while last is not None and last >= oldest and len(catchup) < wanted:
                catchup.insert(0, last)
                last = plan.last_slot(last - 1)
            if last is not None and last >= first:
                if wanted and last < oldest:
                    reason = f"older than the catchup_window of {plan.catchup_window:g} s"
                missed = Missed(first, last, plan.count(first, last, MISSED_COUNTED), reason)
        settled_until = max(newest, known) if known <= now else newest
        slot = plan.next_slot(settled_until)
    on_time = []
    while slot is not None and (slot if early else plan.fire_time(slot)) <= now:
        on_time.append(slot)
        settled_until, slot = slot, plan.next_slot(slot)
    return Due(missed, catchup, on_time, settled_until, slot)


# --- A clock that is set, edits, pauses -------------------------------------------------------------------------------


def stands_at(timing: Timing, settled_until: int, now: int, latest: int = 0) -> int:
    """Where a schedule stands when the clock reads `now`, having read `latest` before: later than now only if it was set back.
    Debian cron's rule: by less than 3 h, and fixed times wait until what was dealt with is passed; else all go on from now."""
    if settled_until <= now or (timing.fixed and max(settled_until, latest) < now + CORRECTION):
        return settled_until
    return now


def add_run(ran: Sequence[Sequence[int]], slot: int, before: int | None) -> list[list[int]]:
    """`ran` with `slot`, which comes right after the slot `before`. Of more than 8 stretches the two closest become one."""
    stretches = [[first, slot] if last == before else [first, last] for first, last in ran]
    if all(last != slot for _, last in stretches):
        stretches.append([slot, slot])
    if len(stretches) > RUNS_KEPT:
        stretches.sort()
        closest = min(range(1, len(stretches)), key=lambda i: stretches[i][0] - stretches[i - 1][1])
        _, last = stretches.pop(closest)
        stretches[closest - 1][1] = max(stretches[closest - 1][1], last)
    return stretches


def go_on(schedule: Schedule, now: int) -> None:
    """After an edit or a pause: with the next slot after `now`. Nothing earlier is made up for."""
    schedule.stand(max(now, stands_at(schedule.plan().timing, schedule.settled_until, now)))
    schedule.in_force_since = max(schedule.in_force_since, now)
    schedule.look_ahead()


def resume_schedule(schedule: Schedule, now: int) -> NewExecution | None:
    """Moves a schedule on after a pause, as after an edit. Only a once-schedule whose time has passed is over, with a row."""
    passed = schedule.next_slot
    go_on(schedule, now)
    if schedule.schedule_type == "once" and schedule.next_slot is None and passed is not None and schedule.plan().remaining != 0:
        return NewExecution(schedule.task_id, schedule.id, "schedule", passed, now, "skipped", 0, SKIPPED_PAUSED)
    return None


# --- Overlap and claims -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Claim:
    """What due slots, or causes, turn into at `now`: rows, and schedules that have moved on."""

    now: int
    unfinished: dict[int, list[NewExecution]] = dataclasses.field(default_factory=dict)  # by task, with what is claimed here
    rows: list[NewExecution] = dataclasses.field(default_factory=list)
    schedules: list[Schedule] = dataclasses.field(default_factory=list)
    cancels: list[tuple[Schedule, str]] = dataclasses.field(default_factory=list)  # overlap `cancel`: by which, and its trigger

    def slots(self, schedule: Schedule, early: bool = False) -> Iterator[tuple[int, int]]:
        """Judges a schedule's due slots, and moves it on. Yields each slot first: older ones of other schedules go before it."""
        plan = schedule.plan()
        due = due_slots(plan, schedule.settled_until, self.now, early)
        if due.missed is not None:
            self.record(schedule, due.missed.first, "missed", due.missed.message(schedule.zone))
        left = plan.remaining
        before = schedule.settled_until if schedule.next_slot in due.catchup + due.on_time else None  # else others lie between
        for slot in [*due.catchup, *due.on_time]:
            yield slot, schedule.id
            trigger = "schedule" if slot in due.on_time else "catchup"
            if self._add(schedule, NewExecution(schedule.task_id, schedule.id, trigger, slot, self.now)):
                self.rows[-1].fire_at = plan.fire_time(slot)
                schedule.ran = add_run(schedule.ran, slot, before)
                left -= 1
                if left <= 0:
                    break
            before = slot
        schedule.stand(due.settled_until)
        schedule.set_next(due.next_slot if left > 0 else None, plan)
        self.schedules.append(schedule)

    def after(self, schedule: Schedule, cause: dict[str, Any], caused_by: int, depth: int) -> bool:
        """The execution that an `after` schedule fires because of `caused_by`. Returns whether it will run."""
        row = NewExecution(schedule.task_id, schedule.id, "after", None, self.now)
        row.cause, row.caused_by, row.event, row.depth = compact(cause), caused_by, cause["event"], depth + 1
        if depth < MOST_DEPTH:
            return self._add(schedule, row)
        row.status, row.error_message = "skipped", TOO_DEEP
        self.rows.append(row)
        return False

    def broken(self, schedule: Schedule, error: Exception) -> None:
        """A schedule that cannot be evaluated stops, with one row that says so: it must not stop the others."""
        self.rows = [row for row in self.rows if row.schedule_id != schedule.id]
        slot = schedule.next_slot if schedule.next_slot is not None else self.now
        self.record(schedule, slot, "failed", f"this schedule cannot be evaluated and was switched off: {error}")
        schedule.is_active, schedule.over, schedule.next_slot, schedule.next_fire = False, True, None, None
        self.schedules.append(schedule)

    def record(self, schedule: Schedule, slot: int, status: str, why: str) -> None:
        """The row of a slot that ran nothing."""
        self.rows.append(NewExecution(schedule.task_id, schedule.id, "schedule", slot, self.now, status, 0, why))

    def _add(self, schedule: Schedule, row: NewExecution) -> bool:
        """Adds an execution as the schedule's overlap allows it. Returns whether it will run."""

        def meets(other: NewExecution) -> bool:
            """Catch-up executions of one schedule run one after the other, and do not see each other."""
            return not (row.trigger == other.trigger == "catchup" and other.schedule_id == schedule.id)

        self.rows.append(row)
        others = self.unfinished.setdefault(schedule.task_id, [])
        met = [other for other in others if meets(other)]
        if met and schedule.overlap == "skip":
            row.status, row.error_message = "skipped", SKIPPED_RUNNING
        elif schedule.overlap == "queue" and any(other.hold & Hold.OVERLAP and other.schedule_id == schedule.id for other in met):
            row.status, row.error_message = "skipped", SKIPPED_WAITING
        else:
            waits = bool(met) and schedule.overlap != "allow"
            row.hold = (Hold.CATCHUP if len(met) < len(others) else 0) | (Hold.OVERLAP if waits else 0)
            if met and schedule.overlap == "cancel":
                self.cancels.append((schedule, row.trigger))
                for new in self.rows[:-1]:
                    if new.task_id == schedule.task_id and new.status == "queued" and meets(new):
                        new.status, new.hold, new.error_message = "cancelled", 0, CANCELLED_BY_OVERLAP
                others[:] = [other for other in others if not meets(other)]
            others.append(row)
        return row.status == "queued"


# --- Ends of attempts -------------------------------------------------------------------------------------------------


def decide_end(run: Run, outcome: Outcome, now: int, spread: float, seconds: float | None = None) -> Finished:
    """Decides whether an ended attempt is final or is retried. `spread` is the jitter, from -1 to 1 for ±10 %. It ended `seconds`
    after its start, by the steady clock, whatever the wall clock did meanwhile; None: nobody measured it."""
    status, again, error = outcome.status, None, outcome.error_message
    try:
        if outcome.retryable and run.attempt <= run.max_retries:
            wait = min(run.retry_delay * run.retry_backoff ** (run.attempt - 1), MAX_RETRY_WAIT) * (1 + 0.1 * spread)
            if outcome.retry_after is not None:
                wait = min(outcome.retry_after, MAX_RETRY_WAIT)
            status, again = "retrying", now + round(wait * SECOND)
    except (TypeError, OverflowError):  # a damaged row must not keep others from being settled
        error = f"{error or status}; not retried: the retry settings of the task are damaged"
    output = None if outcome.output is None else compact(outcome.output)
    finished_at = max(run.started_at, now) if seconds is None else run.started_at + round(seconds * SECOND)
    return Finished(run, status, outcome.status, finished_at, again, error, output)


# --- One thing after another ------------------------------------------------------------------------------------------
#
# What an execution comes to is told to schedules of type `after` in the transaction that writes it: a crash leaves both or
# neither. Its row and the event name the execution of the schedule that it causes: exactly one.

MOST_DEPTH = 10  # executions that `after` fires one because of the other
TOO_DEEP = f"skipped: {MOST_DEPTH} executions have followed each other already; is it a circle?"


def count_end(task: Task, end: Ended) -> None:
    """Counts the end of an execution that ran, and pauses the task after `pause_after` failures in a row."""
    end.before = task.failures_in_a_row
    task.last_status = end.status
    if SUCCESS.get(end.status) is True:
        task.success_count += 1
        task.failures_in_a_row = 0
        task.last_success, task.last_success_id = end.finished_at, end.execution_id
    elif SUCCESS.get(end.status) is False:
        task.failure_count += 1
        task.failures_in_a_row += 1
        if task.status == "active" and task.failures_in_a_row >= (task.pause_after or math.inf):
            task.status, end.paused = "paused", True
            failures = f"{task.failures_in_a_row} failure{'s' * (task.failures_in_a_row > 1)} in a row"
            task.status_reason = f"paused after {failures} (pause_after), {format_instant(end.finished_at // SECOND * SECOND)}"
    end.after = task.failures_in_a_row


def events_of(end: Ended, threshold: int) -> list[str]:
    """The events of `after` that this is."""
    success, before = SUCCESS.get(end.status), -1 if end.before is None else end.before
    if success is None:
        return ["started" if end.status == "running" else end.status]
    if success:
        return ["success", *["recovered"] * (before >= threshold)]
    return ["failure", *["broke"] * (before + 1 == threshold), *["paused"] * end.paused]


def watches(schedule: Schedule, task_id: int, tags: Collection[str], by_after: bool) -> bool:
    """Whether an `after` schedule is told of executions of this task. By tag, or of any, none of those that `after` fired."""
    config = schedule.schedule_config
    if "task_ids" in config:
        return task_id in config["task_ids"]
    return not by_after and task_id != schedule.task_id and ("any" in config or config.get("tag") in tags)


def find_circle(fired: Mapping[int, Collection[int]], begin: int, ends: Collection[int]) -> list[int]:
    """The way from the task `begin` to one of `ends`, when each task fires the tasks `fired` after it; empty if there is none."""
    ways, found = [[begin]], {begin}
    for way in ways:  # which grow meanwhile
        if way[-1] in ends:
            return way
        ways += [[*way, task_id] for task_id in fired.get(way[-1], ()) if task_id not in found]
        found.update(fired.get(way[-1], ()))
    return []


def cause_of(event: str, execution: Execution | None, task: Task, streak: int, settings: Settings) -> dict[str, Any]:
    """What an `after` execution knows of its cause: a snapshot of at most 6 KiB. Kept output is masked already."""
    view: dict[str, Any] = view_of(execution) if execution else {"finished_at": instant_or_none(task.last_success)}
    url = settings.public_url
    output = view.get("output_data") or {}
    cause = {name: output.get(name) if name in ("exit_code", "status_code") else view.get(name) for name in CAUSE_NAMES}
    cause |= {"event": event, "execution_id": view.get("id"), "task_id": task.id, "task_key": task.key, "task_name": task.name}
    cause |= {"failures_in_a_row": streak, "output": output_text(output)[-2000:]}
    cause["error_message"] = (view.get("error_message") or "")[:500] or None
    cause["text"] = _cause_text(event, execution, task, streak, settings.scheduler_timezone)
    cause["url"] = f"{url}#/executions/{execution.id}" if url and execution else url
    while (surplus := len(to_json(cause)) - 6144) > 0 and cause["output"]:
        cause["output"] = cause["output"][max(1, surplus // 6) :]
    return cause


def _cause_text(event: str, execution: Execution | None, task: Task, streak: int, zone: str) -> str:
    """One sentence for a message."""

    def minute(t: int) -> str:
        return f"{format_local(t, zone)[:16].replace('T', ' ')} {zone}"

    if event == "overdue":
        return f"{task.name} is overdue (last success: {minute(task.last_success) if task.last_success else 'never'})"
    assert execution is not None
    did = {**EVENTS, "timed_out": "timed out", "interrupted": "was interrupted", "running": "started"}
    words = did["recovered"] if event == "recovered" else did.get(execution.status, execution.status)
    why = printable(execution.error_message or "")[:300]
    stderr = str((execution.output_data or {}).get("stderr") or "").strip().splitlines()
    if why and stderr and (last := printable(stderr[-1])[:200]) not in why:
        why += f": {last}"
    parts = [f"{task.name} {words}{f' ({why})' if why else ''}"]
    if event == "recovered":
        parts.append(f"after {streak} failure{'s' * (streak > 1)} in a row")
    elif streak > 1 and execution.success is False:
        parts.append(f"{streak} times in a row")
    if event == "paused":
        parts.append("and is paused now")
    return f"{', '.join(parts)}, {minute(execution.finished_at or execution.started_at or execution.queued_at)}"


def sample_cause(task: Task, now: int, settings: Settings) -> dict[str, Any]:
    """For a run by hand: what an alert may look like."""
    execution = Execution(id=0, task_id=0, task_name="example", trigger="schedule", status="failed", queued_at=now, attempt=1)
    execution.scheduled_for = execution.started_at = execution.finished_at = now
    execution.error_message = "exit status 1"
    execution.output_data = {"exit_code": 1, "stdout": "", "stderr": "an example of output\n"}
    example = Task(id=0, name="example", task_type="bash", config={}, created_at=now, updated_at=now)
    cause = cause_of("failure", execution, example, 1, settings)
    return {**cause, "event": "test", "text": f"This is a test of {task.name}. {cause['text']}"}


# ======================================================================================================================
# 5. Clock and timers
# ======================================================================================================================

POLL = 0.25  # seconds: asyncio sleeps on the monotonic clock, so wait briefly, then look at the wall clock again


class Clock:
    """The only place that reads time: wall time in microseconds since the epoch, monotonic time in seconds."""

    def __init__(self) -> None:
        self._last = (self.now(), self.monotonic())

    def now(self) -> int:
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        return time.monotonic()

    def step(self) -> int:
        """Microseconds by which the wall clock was set forward (or back, negative) since the last call."""
        before, self._last = self._last, (self.now(), self.monotonic())
        return (self._last[0] - before[0]) - round((self._last[1] - before[1]) * 1_000_000)

    async def wait(self, event: asyncio.Event, until: int | None) -> None:
        """Returns when `event` is set, when the wall clock reads `until`, or after POLL: whichever comes first."""
        seconds = POLL if until is None else min(POLL, max(0.0, (until - self.now()) / 1_000_000))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()


async def in_daemon(call: Callable[..., T], *args: Any) -> T:
    """`call(*args)` on a thread of its own. It may block for ever: that holds up neither others nor the end of the program."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)

    future.set_running_or_notify_cancel()  # so that nobody can cancel it: its thread would find no one to answer
    threading.Thread(target=run, name=f"chronotask-{call.__name__}", daemon=True).start()
    return await asyncio.wrap_future(future)


class TimerQueue:
    """The instants at which something may be due, as a heap. An index only: the store is the truth and tells a tick what is due.
    So an instant too many costs a look, and all may be thrown away and read anew."""

    def __init__(self) -> None:
        self._heap: list[int] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, instants: Iterable[int]) -> None:
        for at in instants:
            heapq.heappush(self._heap, at)

    def next_due(self) -> int | None:
        return self._heap[0] if self._heap else None

    def pop_due(self, now: int) -> bool:
        """Takes out the instants up to `now`. Returns whether there were any."""
        count = len(self)
        while self._heap and self._heap[0] <= now:
            heapq.heappop(self._heap)
        return len(self) < count


# ======================================================================================================================
# 6. Store
# ======================================================================================================================
#
# One writer thread takes all waiting writes as one transaction (group commit: FULL costs next to nothing then); a reader
# thread, on a read-only connection, answers the reads of one turn of the loop from one snapshot. These find their rows by an
# index. What may look at many (`scan`) has a thread and a connection of its own and a time limit: it holds up nobody.
# What is passed to `write`, `read` and `scan` is a function of the connection. One for `write` may run twice (see
# `_write_batch`): it must have no effect but on the database.
#
# The functions below that take `db` are these functions, or parts of them: the queries. They run in their caller's
# transaction. Many rows are read and written in one step (`load`, `write_rows`): sqlite3 gives up and retakes the GIL at every
# step, and each retake costs up to a switch interval while the loop is busy.
#
# Processes on one database notice each other's changes of tasks and schedules by their `rev`, a number that only grows, and
# those of executions by looking at the few that are unfinished.

DB = sqlite3.Connection
_NOT_DELETED = "task_id NOT IN (SELECT id FROM tasks WHERE deleted = 1)"


def _counted(table: str, columns: tuple[str, str, str], n: str, of: str) -> str:
    """Adds to what is counted of a table: in all, and in blocks of ids of two sizes. `columns` are the id, kind and state."""
    row_id, kind, state = columns
    return " ".join(
        f"INSERT INTO counts SELECT '{table}', {size}, {row_id} / {size}, {kind}, {state}, {n} {of} "
        "ON CONFLICT DO UPDATE SET n = n + excluded.n;"
        for size in ("100", "10000", "(1 << 62)")
    )


def _counted_task(n: str, row: str) -> str:
    return _counted("tasks", (f"{row}.id", f"{row}.task_type", f"{row}.status"), n, f"WHERE NOT {row}.deleted")


def _counted_schedule(n: str, row: str) -> str:
    """With how many fire: those that are active, of tasks that are."""
    live = f"(SELECT count(*) FROM tasks WHERE id = {row}.task_id AND status = 'active' AND deleted = 0 AND {row}.is_active)"
    columns = (f"{row}.id", f"{row}.schedule_type", f"{row}.is_active")
    counted = _counted("schedules", columns, n, f"FROM tasks WHERE tasks.id = {row}.task_id AND deleted = 0")
    return f"UPDATE meta SET value = value + {n} * {live} WHERE key = 'firing'; {counted}"


def _added(table: str, columns: str) -> Iterator[str]:
    return (f"ALTER TABLE {table} ADD COLUMN {column.strip()}" for column in columns.split(","))


_SCHEDULE_COLUMNS = ("schedules.id", "schedule_type", "is_active")
_NEW_TAGS = "SELECT DISTINCT value, new.id FROM  json_each(CASE WHEN json_valid(new.tags) THEN new.tags ELSE '[]' END)"

# How a database comes to each schema version from the one before it. Append only. The statements of a version run in one
# transaction with the new user_version.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        """CREATE TABLE tasks (
            id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, description TEXT, task_type TEXT NOT NULL,
            status TEXT NOT NULL, config TEXT NOT NULL, max_retries INTEGER NOT NULL, retry_delay NUMERIC NOT NULL,
            retry_backoff NUMERIC NOT NULL, created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, last_run INTEGER,
            run_count INTEGER NOT NULL DEFAULT 0, success_count INTEGER NOT NULL DEFAULT 0,
            failure_count INTEGER NOT NULL DEFAULT 0, history_count INTEGER NOT NULL DEFAULT 0,
            deleted INTEGER NOT NULL DEFAULT 0, rev INTEGER NOT NULL DEFAULT 0
        )""",
        "CREATE INDEX tasks_rev ON tasks (rev)",
        "CREATE INDEX tasks_kind ON tasks (deleted, status, task_type)",
        """CREATE TABLE schedules (
            id INTEGER PRIMARY KEY AUTOINCREMENT, task_id INTEGER NOT NULL REFERENCES tasks (id), schedule_type TEXT NOT NULL,
            schedule_config TEXT NOT NULL, is_active INTEGER NOT NULL, overlap TEXT NOT NULL, catchup TEXT NOT NULL,
            catchup_window NUMERIC NOT NULL, jitter NUMERIC NOT NULL, start_at INTEGER, end_at INTEGER, max_runs INTEGER,
            created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, settled_until INTEGER NOT NULL, next_slot INTEGER,
            next_fire INTEGER, last_run INTEGER, run_count INTEGER NOT NULL DEFAULT 0, rev INTEGER NOT NULL DEFAULT 0
        )""",
        "CREATE INDEX schedules_task ON schedules (task_id, next_fire)",
        "CREATE INDEX schedules_rev ON schedules (rev)",
        "CREATE INDEX schedules_next ON schedules (next_fire) WHERE is_active",
        """CREATE TABLE executions (
            id INTEGER PRIMARY KEY AUTOINCREMENT, task_id INTEGER NOT NULL REFERENCES tasks (id), schedule_id INTEGER,
            trigger TEXT NOT NULL, status TEXT NOT NULL, scheduled_for INTEGER, fire_at INTEGER, queued_at INTEGER NOT NULL,
            started_at INTEGER, finished_at INTEGER, attempt INTEGER NOT NULL DEFAULT 0, next_attempt_at INTEGER,
            attempt_started_at INTEGER, hold INTEGER NOT NULL DEFAULT 0, cancel_requested INTEGER NOT NULL DEFAULT 0,
            owner TEXT, uuid TEXT NOT NULL, error_message TEXT, output_data TEXT
        )""",
        "CREATE UNIQUE INDEX executions_slot ON executions (schedule_id, scheduled_for) WHERE scheduled_for IS NOT NULL",
        "CREATE INDEX executions_task ON executions (task_id)",
        """CREATE INDEX executions_unfinished ON executions (task_id)
            WHERE status IN ('queued', 'running', 'retrying')""",
        """CREATE INDEX executions_ready ON executions (coalesce(scheduled_for, queued_at))
            WHERE status = 'queued' AND hold = 0""",
        "CREATE INDEX executions_held ON executions (task_id) WHERE status = 'queued' AND hold > 0",
        "CREATE INDEX executions_marks ON executions (task_id) WHERE status IN ('skipped', 'missed')",
        """CREATE INDEX executions_failed ON executions (task_id)
            WHERE status IN ('failed', 'timed_out', 'interrupted')""",
        """CREATE TABLE attempts (
            execution_id INTEGER NOT NULL REFERENCES executions (id) ON DELETE CASCADE, attempt INTEGER NOT NULL,
            status TEXT NOT NULL, started_at INTEGER NOT NULL, finished_at INTEGER NOT NULL, error_message TEXT,
            output_data TEXT, PRIMARY KEY (execution_id, attempt)
        )""",
        """CREATE TABLE live_output (
            execution_id INTEGER NOT NULL, stream TEXT NOT NULL, wanted_until INTEGER NOT NULL, total INTEGER NOT NULL,
            recent BLOB NOT NULL, PRIMARY KEY (execution_id, stream)
        )""",
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
        "INSERT INTO meta VALUES ('paused', 0), ('rev', 0), ('tasks', 0)",
        # `rev` numbers the changes of tasks and schedules that other processes must notice.
        """CREATE TRIGGER tasks_added AFTER INSERT ON tasks BEGIN
            UPDATE meta SET value = new.rev WHERE key = 'rev'; UPDATE meta SET value = value + 1 WHERE key = 'tasks';
        END""",
        """CREATE TRIGGER tasks_deleted AFTER UPDATE OF deleted ON tasks
            BEGIN UPDATE meta SET value = value - 1 WHERE key = 'tasks'; END""",
        "CREATE TRIGGER tasks_changed AFTER UPDATE OF rev ON tasks BEGIN UPDATE meta SET value = new.rev WHERE key = 'rev'; END",
        "CREATE TRIGGER schedules_added AFTER INSERT ON schedules BEGIN UPDATE meta SET value = new.rev WHERE key = 'rev'; END",
        """CREATE TRIGGER schedules_changed AFTER UPDATE OF rev ON schedules
            BEGIN UPDATE meta SET value = new.rev WHERE key = 'rev'; END""",
        # Counting rows for a page takes longer than the page: 10,000 tasks, and still more for a history of 100,000.
        """CREATE TRIGGER executions_added AFTER INSERT ON executions
            BEGIN UPDATE tasks SET history_count = history_count + 1 WHERE id = new.task_id; END""",
        """CREATE TRIGGER executions_removed AFTER DELETE ON executions
            BEGIN UPDATE tasks SET history_count = history_count - 1 WHERE id = old.task_id; END""",
    ),
    # IN with three values builds a table of them for every statement, and `status` changes twice in every run.
    2: (
        "DROP INDEX executions_unfinished",
        "CREATE INDEX executions_unfinished ON executions (task_id) WHERE finished_at IS NULL",
        "DROP INDEX executions_failed",
        """CREATE INDEX executions_failed ON executions (task_id)
            WHERE (status = 'failed' OR status = 'timed_out' OR status = 'interrupted')""",
    ),
    # Release 1.1. A 3, 4, 5 or 6 was only on the way to it: none is upgraded.
    7: (
        *(f"DROP TRIGGER {name}" for name in ("tasks_added", "tasks_deleted", "executions_added", "executions_removed")),
        # Names for programs and files, streaks, and what is not to run now, or not together.
        *_added("tasks", "key TEXT, tags TEXT NOT NULL DEFAULT '[]', status_reason TEXT, pause_after INTEGER, managed_by TEXT"),
        *_added("tasks", "last_status TEXT, last_success INTEGER, last_success_id INTEGER"),
        *_added("tasks", "failures_in_a_row INTEGER NOT NULL DEFAULT 0, paused_until INTEGER, concurrency_group TEXT"),
        *_added("tasks", "marks INTEGER NOT NULL DEFAULT 0"),
        """UPDATE tasks SET (last_success_id, last_success) = (SELECT id, finished_at FROM executions
            WHERE task_id = tasks.id AND status = 'succeeded' ORDER BY id DESC LIMIT 1)""",
        """UPDATE tasks SET last_status = (SELECT status FROM executions WHERE task_id = tasks.id AND started_at IS NOT NULL
                AND finished_at IS NOT NULL ORDER BY id DESC LIMIT 1),
            failures_in_a_row = (SELECT count(*) FROM executions WHERE task_id = tasks.id AND id > coalesce(last_success_id, 0)
                AND (status = 'failed' OR status = 'timed_out' OR status = 'interrupted')),
            marks = (SELECT count(*) FROM executions WHERE task_id = tasks.id AND status IN ('skipped', 'missed')),
            status_reason = CASE WHEN status <> 'active' THEN status || ' before the upgrade to 1.1' END""",
        "CREATE UNIQUE INDEX tasks_key ON tasks (key) WHERE key IS NOT NULL AND deleted = 0",
        "CREATE INDEX tasks_paused ON tasks (paused_until) WHERE paused_until IS NOT NULL",
        "CREATE INDEX tasks_grouped ON tasks (concurrency_group) WHERE concurrency_group IS NOT NULL",
        "CREATE INDEX tasks_ran ON tasks (last_run DESC)",
        # What a clock that is set must not touch. What ran before is taken for one stretch; a future that did not come is not.
        *_added("schedules", "dealt_with INTEGER NOT NULL DEFAULT 0, in_force_since INTEGER NOT NULL DEFAULT 0"),
        *_added("schedules", "ran TEXT NOT NULL DEFAULT '[]', over INTEGER NOT NULL DEFAULT 0, key TEXT, managed_by TEXT"),
        *_added("schedules", "exclude TEXT NOT NULL DEFAULT '[]'"),
        """UPDATE schedules SET dealt_with = settled_until, in_force_since = settled_until,
            over = NOT is_active AND next_slot IS NULL,
            ran = CASE WHEN settled_until > created_at THEN json_array(json_array(created_at, settled_until)) ELSE '[]' END""",
        "INSERT INTO meta SELECT 'clock', settled_until FROM schedules ORDER BY settled_until DESC LIMIT 1",
        "CREATE UNIQUE INDEX schedules_key ON schedules (task_id, key) WHERE key IS NOT NULL",
        "CREATE INDEX schedules_after ON schedules (is_active) WHERE schedule_type = 'after'",
        "CREATE INDEX schedules_kind ON schedules (schedule_type, is_active)",
        # What an execution was caused by; and what is rare is found without reading all rows.
        *_added("executions", "cause TEXT, caused_by INTEGER, event TEXT, depth INTEGER NOT NULL DEFAULT 0, config TEXT"),
        *_added("executions", "rerun_of INTEGER"),
        *(f"DROP INDEX executions_{name}" for name in ("slot", "failed", "marks")),
        """CREATE UNIQUE INDEX executions_slot ON executions (schedule_id, scheduled_for)
            WHERE scheduled_for IS NOT NULL AND trigger IN ('schedule', 'catchup')""",
        "CREATE UNIQUE INDEX executions_caused ON executions (caused_by, schedule_id, event) WHERE caused_by IS NOT NULL",
        "CREATE INDEX executions_schedule ON executions (schedule_id) WHERE schedule_id IS NOT NULL",
        "CREATE INDEX executions_trigger ON executions (trigger)",
        "CREATE INDEX executions_rare ON executions (status) WHERE status <> 'succeeded' AND finished_at IS NOT NULL",
        """CREATE INDEX executions_rare_of_task ON executions (task_id, status)
            WHERE status <> 'succeeded' AND finished_at IS NOT NULL""",
        """CREATE TABLE idempotency (
            task_id INTEGER NOT NULL REFERENCES tasks (id) ON DELETE CASCADE, key TEXT NOT NULL, at INTEGER NOT NULL,
            body TEXT NOT NULL, execution_id INTEGER NOT NULL, PRIMARY KEY (task_id, key)
        ) WITHOUT ROWID""",
        "CREATE INDEX idempotency_at ON idempotency (at)",
        # Who has changed what.
        """CREATE TABLE changes (
            id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, actor TEXT NOT NULL, via TEXT NOT NULL,
            kind TEXT NOT NULL, object_id INTEGER, operation TEXT NOT NULL, before TEXT, after TEXT
        )""",
        "CREATE INDEX changes_object ON changes (kind, object_id)",
        # A page reads what it shows, also of millions: how many rows of each kind there are in each block of ids, words
        # and tags by themselves; and which tasks have more than is kept.
        "DELETE FROM meta WHERE key = 'tasks'",
        """INSERT INTO meta SELECT 'firing', count(*) FROM schedules s JOIN tasks t ON t.id = task_id
            WHERE is_active AND NOT deleted AND status = 'active'""",
        """CREATE TABLE counts (
            name TEXT NOT NULL, size INTEGER NOT NULL, block INTEGER NOT NULL, kind TEXT NOT NULL, state NOT NULL,
            n INTEGER NOT NULL, PRIMARY KEY (name, size, block, kind, state)
        ) WITHOUT ROWID""",
        *_counted("tasks", ("id", "task_type", "status"), "count(*)", "FROM tasks WHERE NOT deleted GROUP BY 3, 4, 5").split(";"),
        *_counted("schedules", _SCHEDULE_COLUMNS, "count(*)", f"FROM schedules WHERE {_NOT_DELETED} GROUP BY 3, 4, 5").split(";"),
        "CREATE TABLE tags (tag TEXT NOT NULL, task_id INTEGER NOT NULL, PRIMARY KEY (tag, task_id)) WITHOUT ROWID",
        "CREATE INDEX tasks_words ON tasks (deleted, name, description)",
        f"""CREATE TRIGGER tasks_added AFTER INSERT ON tasks BEGIN
            UPDATE meta SET value = new.rev WHERE key = 'rev'; {_counted_task("1", "new")} END""",
        f"""CREATE TRIGGER tasks_tagged AFTER INSERT ON tasks WHEN new.tags <> '[]'
            BEGIN INSERT INTO tags {_NEW_TAGS}; END""",
        f"""CREATE TRIGGER tasks_recounted AFTER UPDATE OF status, task_type, deleted ON tasks
            WHEN new.status <> old.status OR new.task_type <> old.task_type OR new.deleted <> old.deleted BEGIN
            {_counted_task("-1", "old")} {_counted_task("1", "new")}
            UPDATE meta SET value = value
                + ((new.status = 'active' AND NOT new.deleted) - (old.status = 'active' AND NOT old.deleted))
                * (SELECT count(*) FROM schedules WHERE task_id = new.id AND is_active) WHERE key = 'firing'; END""",
        # What does not fire is not in the way of what does: a resume computes it anew.
        """CREATE TRIGGER tasks_stopped AFTER UPDATE OF status ON tasks WHEN old.status = 'active' AND new.status <> 'active'
            BEGIN UPDATE schedules SET next_fire = NULL WHERE task_id = new.id AND next_fire IS NOT NULL; END""",
        f"""CREATE TRIGGER tasks_deleted AFTER UPDATE OF deleted ON tasks WHEN new.deleted > old.deleted BEGIN
            DELETE FROM tags WHERE task_id = new.id AND tag IN (SELECT value FROM json_each(new.tags));
            {_counted("schedules", _SCHEDULE_COLUMNS, "-count(*)", "FROM schedules WHERE task_id = new.id GROUP BY 3, 4, 5")}
            END""",
        f"""CREATE TRIGGER tasks_retagged AFTER UPDATE OF tags ON tasks WHEN new.tags <> old.tags BEGIN
            DELETE FROM tags WHERE task_id = new.id AND tag IN (SELECT value FROM json_each(old.tags));
            INSERT INTO tags {_NEW_TAGS}; END""",
        f"CREATE TRIGGER schedules_counted AFTER INSERT ON schedules BEGIN {_counted_schedule('1', 'new')} END",
        f"CREATE TRIGGER schedules_removed AFTER DELETE ON schedules BEGIN {_counted_schedule('-1', 'old')} END",
        f"""CREATE TRIGGER schedules_recounted AFTER UPDATE OF schedule_type, is_active ON schedules
            WHEN new.schedule_type <> old.schedule_type OR new.is_active <> old.is_active
            BEGIN {_counted_schedule("-1", "old")} {_counted_schedule("1", "new")} END""",
        """CREATE TRIGGER executions_added AFTER INSERT ON executions BEGIN UPDATE tasks SET history_count = history_count + 1,
            marks = marks + (new.status IN ('skipped', 'missed')) WHERE id = new.task_id; END""",
        """CREATE TRIGGER executions_removed AFTER DELETE ON executions BEGIN UPDATE tasks SET history_count = history_count - 1,
            marks = marks - (old.status IN ('skipped', 'missed')) WHERE id = old.task_id AND deleted = 0; END""",
    ),
}
APPLICATION_ID = 0x43485254  # "CHRT": tells our files from other programs' databases
# To the letter, so that the partial indexes serve.
UNFINISHED_SQL, _RARE = "finished_at IS NULL", "status <> 'succeeded' AND finished_at IS NOT NULL"
LIVE_SQL = "s.is_active AND t.status = 'active' AND NOT t.deleted"  # whether a schedule's slots fire
GOING_ON_SQL = f"NOT cancel_requested AND {_NOT_DELETED}"  # whether nobody wants an execution to end, nor deletes its task
MIN_SQLITE = (3, 35, 0)  # UPDATE … FROM and RETURNING
BUSY_TIMEOUT = 5.0  # seconds that a write waits for another process's transaction
BESIDE = ("-wal", "-shm", "-journal", ".leader", ".service")  # the files of the database beside it
_LEFT_ALONE = "it was left as it was; restore a backup, or set CHRONOTASK_DATABASE_URL to another file"
_OTHERWISE = "run ChronoTask as its owner (in a container: --user), or choose another place"
REPLACED = "the database file is no longer the one that was opened"
# Where the fault lies with the statement (or is none of SQLite's), not with the file or the disk.
_OF_STATEMENTS = {0, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG}

QUICK_CHECK_BELOW = 2 * 2**30  # bytes: a quick_check takes some seconds a GB
SCANNERS = 8  # scans at a time; further ones wait, and their waiting counts towards their time
SCAN_TIMEOUT = 3.0  # seconds
SCAN_STEP = 200_000  # instructions of SQLite, about 3 ms, after which a scan looks at the time
OUTPUT_AT_ONCE = 2**26  # characters of output in one statement: SQLite takes 10**9 bytes, of which a character may need 8
WAL_LIMIT = 8 * 2**20  # bytes that the log may keep on disk once its content is in the database
STUCK_AFTER = 10.0  # seconds after which a write that has not come back makes /health fail
MOST_TOLD = 1000  # changes of a kind that are told one by one: who reads must look anew after more at once


@dataclass(slots=True)
class _Call:
    """A function on its way to a thread, and what came of it."""

    run: Callable[[DB], Any]
    future: asyncio.Future[Any]
    since: float
    result: Any = None
    error: Exception | None = None


class _Queue:
    """Calls on their way to a thread: what one turn of the loop asks for is handed over at once, as one batch."""

    def __init__(self) -> None:
        self.batches: queue.SimpleQueue[list[_Call]] = queue.SimpleQueue()
        self.turn: list[_Call] = []

    def flush(self) -> None:
        if self.turn:
            self.batches.put(self.turn)
            self.turn = []


class Store:
    """The database: opened with its schema brought up to date, written by one thread, read by others. Made in its loop."""

    def __init__(self, path: Path, monotonic: Callable[[], float]) -> None:
        self.path = path
        self.failure: str | None = None  # why the last commit failed, until one succeeds
        self._loop, self._monotonic = asyncio.get_running_loop(), monotonic
        self._writing: _Call | None = None
        self._version = 0
        self._db = open_database(path)
        self._file, self.replaced = path.stat(), False
        self.writes, self._reads, self._scans = _Queue(), _Queue(), _Queue()
        self._threads: list[tuple[threading.Thread, DB]] = []
        self._closing = False
        self._start("writer", self._db, self.writes, self._write_batch)
        one_of_many = ("scanner", self._scans, 1, SCAN_TIMEOUT)
        for name, calls, most, seconds in (("reader", self._reads, 500, math.inf), *[one_of_many] * SCANNERS):
            db = connect(path, read_only=True)
            self._start(name, db, calls, partial(self._read_batch, db, seconds), most)

    def _start(self, name: str, db: DB, calls: _Queue, run: Callable[[list[_Call]], None], most: int = 500) -> None:
        """Starts a thread that runs what waits in `calls`, up to `most` at once as one batch."""

        def work() -> None:
            while batch := calls.batches.get():
                while len(batch) < most and not calls.batches.empty():
                    batch += calls.batches.get()
                try:
                    run(batch)
                except Exception as error:  # of a disk that failed, at the beginning or end of a transaction
                    for call in batch:
                        call.error = error
                for call in batch:
                    if call.error is not None:  # its frames may hold a cursor, which would hold this connection's snapshot
                        traceback.clear_frames(call.error.__traceback__)
                self._loop.call_soon_threadsafe(_deliver, batch)
                if self._closing:
                    calls.batches.put([])  # the end, which may have been taken with others

        thread = threading.Thread(target=work, name=f"store-{name}", daemon=True)
        thread.start()  # raises where there may be no further one
        self._threads.append((thread, db))

    def _submit(self, calls: _Queue, run: Callable[[DB], Any], at_once: bool) -> asyncio.Future[Any]:
        call = _Call(run, self._loop.create_future(), self._monotonic())
        if not calls.turn:
            self._loop.call_soon(calls.flush)
        calls.turn.append(call)
        if at_once:
            calls.flush()
        return call.future

    async def write(self, run: Callable[[DB], T], at_once: bool = False) -> T:
        """Runs `run(db)` in the next transaction; returns once that is on disk. Raises what `run` raises, Unavailable. With
        `at_once` the writer does not wait for what else the loop has to do in this turn."""
        return cast(T, await self._submit(self.writes, run, at_once))

    async def read(self, run: Callable[[DB], T]) -> T:
        """Runs `run(db)` on a snapshot of everything committed so far."""
        return cast(T, await self._submit(self._reads, run, at_once=False))

    async def scan(self, run: Callable[[DB], T]) -> T:
        """Like `read`, for what may look at many rows: beside everything else. Raises Unavailable after SCAN_TIMEOUT seconds."""
        return cast(T, await self._submit(self._scans, run, at_once=True))

    def _read_batch(self, db: DB, seconds: float, batch: list[_Call]) -> None:
        """All calls on one snapshot. One that takes longer, or was given up, must not keep the thread from those who wait."""

        def is_enough() -> bool:
            late = self._monotonic() > batch[0].since + seconds
            return late or self._closing or all(call.future.cancelled() for call in batch)

        db.set_progress_handler(is_enough, SCAN_STEP)
        db.execute("BEGIN")  # touches nothing yet: the snapshot is taken by the first query
        for call in batch:
            try:
                call.result = call.run(db)
            except Exception as error:  # one that fails must not fail the others
                call.error = error
        if db.in_transaction:
            db.execute("ROLLBACK")  # not COMMIT, which after a failure of the disk may leave the transaction open

    async def foreign_changes(self) -> bool:
        """Whether another process has committed since the last call. After a failure it also tries a real write."""
        before, self._version = self._version, await self.write(self._look)
        return before != self._version

    def _look(self, db: DB) -> int:
        there = False
        with contextlib.suppress(OSError):
            there = os.path.samestat(self.path.stat(), self._file)
        if not there and not self.replaced:
            logger.error("%s: what is written from now on may be lost", REPLACED)
        self.replaced = not there
        if self.failure:
            set_meta(db, "probe", self._monotonic())
        return _pragma(db, "data_version")

    async def set_leading(self, leading: bool) -> None:
        """SQLite before 3.51.3 can corrupt a file that several connections checkpoint: only the leader does."""
        await self.write(lambda db: db.execute(f"PRAGMA wal_autocheckpoint={1000 if leading else 0}").fetchone())

    def _write_batch(self, batch: list[_Call]) -> None:
        """All calls in one transaction; if one fails after a change, each in a transaction of its own."""
        self._writing = batch[0]
        if self.failure and _pragma(self._db, "wal_autocheckpoint"):  # on a full disk, what the log has taken serves again
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint").fetchone()
        if not self._transaction(batch):
            for call in batch:
                call.result = call.error = None
                self._transaction([call])
        self._writing = None

    def _transaction(self, batch: list[_Call]) -> bool:
        """Whether every call of `batch` has its answer. If not, nothing was kept and each must be tried alone."""
        db, before = self._db, self._db.total_changes
        try:
            db.execute("BEGIN IMMEDIATE")
            for call in batch:
                changes = db.total_changes
                try:
                    call.result = call.run(db)
                except Exception as error:
                    call.error = error
                    if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _OF_STATEMENTS:
                        self.failure = str(error)
                    if isinstance(error, sqlite3.Error) or db.total_changes > changes:
                        return False
            db.execute("COMMIT")
            if db.total_changes > before:  # a commit of nothing does not touch the disk, and proves nothing
                self.failure = None
        except sqlite3.Error as error:
            self.failure = str(error)
            for call in batch:
                call.error = error
        finally:
            if db.in_transaction:  # SQLite has rolled back by itself after a full disk or an I/O error
                db.execute("ROLLBACK")
        return True

    def problem(self) -> str | None:
        """Why the database cannot be relied on now, or None."""
        writing = self._writing
        if writing is not None and (stuck := self._monotonic() - writing.since) > STUCK_AFTER:
            return f"a write to the database has not come back for {stuck:.0f} s"
        if self.replaced:
            return REPLACED
        return self.failure and f"the last write to the database failed: {self.failure}"

    def close(self) -> None:
        """Finishes what is waiting and closes all connections. Blocks for 0.2 s at most: a write that waits for another
        program's lock must not hold up the exit, and nothing was promised for it."""
        self._closing = True
        for calls in (self.writes, self._reads, *(self._scans for _ in self._threads)):
            calls.flush()
            calls.batches.put([])
        end = self._monotonic() + 0.2
        for thread, _ in self._threads:
            thread.join(max(0.0, end - self._monotonic()))
        for thread, db in reversed(self._threads):
            if not thread.is_alive():
                db.close()  # the writer's last: then SQLite leaves one file that holds everything


def _deliver(batch: list[_Call]) -> None:
    """Gives the callers what came of their calls: an error of the database as what a client hears."""
    less = "ask for less (fewer pages back, other filters)"
    for call in batch:
        error = call.error
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
            error = Unavailable(f"this looks at too many rows: it was ended after {SCAN_TIMEOUT:g} s; {less}")
        elif isinstance(error, sqlite3.Error):
            error = Unavailable(f"the database cannot do this now: {error}")
        if call.future.cancelled():
            continue
        if error is not None:
            call.future.set_exception(error)
        else:
            call.future.set_result(call.result)


# --- Opening ----------------------------------------------------------------------------------------------------------


def connect(path: Path, read_only: bool = False) -> DB:
    """A connection in autocommit mode: transactions are begun by hand, with BEGIN IMMEDIATE for writes."""
    uri = f"file:{urllib.parse.quote(str(path))}?mode={'ro' if read_only else 'rwc'}"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA foreign_keys=ON")
    db.create_function("cut_texts", 1, _cut_texts, deterministic=True)
    return db


def _cut_texts(output: str) -> str:
    """Output (JSON text) as a list shows it. A function for SQL: the whole outputs of a page are never together in memory."""
    if len(output) <= LIST_TEXT_LIMIT:
        return output
    values = parsed(output)
    for name, value in values.items() if isinstance(values, dict) else ():
        text = compact(value) if isinstance(value, (dict, list)) else value
        if isinstance(text, str) and (more := len(text) - LIST_TEXT_LIMIT) > 0:
            values[name] = f"{text[:LIST_TEXT_LIMIT]}… [{more} more characters: ask for output=full]"
    return compact(values)


def open_database(path: Path) -> DB:
    """The writer's connection, its schema up to date. Raises StartupError; never overwrites what is no database of ours."""
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        raise StartupError(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 or newer is needed")
    real = os.path.realpath(path)
    if os.path.exists(real) and not os.path.isfile(real):
        raise StartupError(f"{path} is a folder or a device: set CHRONOTASK_DATABASE_URL to a file", exit_status=2)
    try:
        Path(real).parent.mkdir(parents=True, exist_ok=True)
        check_owners(path)
        size, wal_size = (os.path.getsize(file) if os.path.exists(file) else 0 for file in (real, f"{real}-wal"))
        if 0 < size < 512:  # SQLite takes what is shorter than a page for a database that is empty, and writes over it
            raise StartupError(f"{path} is not a database: {_LEFT_ALONE}")
        if not size and wal_size:
            raise StartupError(
                f"{path} is missing or empty, but {real}-wal holds data: bring the database back, or move that away"
            )
        with contextlib.ExitStack() as stack:
            db = stack.enter_context(contextlib.closing(connect(path)))
            version, application = _pragma(db, "user_version"), _pragma(db, "application_id")
            if application != APPLICATION_ID and (version or db.execute("SELECT 1 FROM sqlite_master").fetchone()):
                raise StartupError(f"{path} is a database of another program: set CHRONOTASK_DATABASE_URL to another file")
            if version not in (0, *MIGRATIONS):
                raise StartupError(
                    f"{path} has schema version {version}, made by a newer ChronoTask, or on the way to 1.1; this one "
                    f"knows {', '.join(map(str, MIGRATIONS))}: upgrade ChronoTask, or restore an older backup"
                )
            if path.stat().st_size > QUICK_CHECK_BELOW:
                logger.info("the database is over 2 GiB: its check at start is left out (--backup checks its copy)")
            elif (found := [row[0] for row in db.execute("PRAGMA quick_check(3)")]) != ["ok"]:
                raise StartupError(f"the database {path} is damaged ({'; '.join(found)}): {_LEFT_ALONE}")
            if not version:
                db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # only has an effect before the first table
            # Only the leader checkpoints: see `set_leading`.
            for pragma in ("journal_mode=WAL", "synchronous=FULL", f"journal_size_limit={WAL_LIMIT}", "wal_autocheckpoint=0"):
                db.execute(f"PRAGMA {pragma}")
            lead = FileLock(Path(f"{real}.leader"))
            stack.callback(lead.release)
            # With the new schema an older ChronoTask would go on leading, and fire nothing any more.
            if 0 < _pragma(db, "user_version") < max(MIGRATIONS) and not lead.acquire():
                raise StartupError(f"{path} is to be upgraded, but another ChronoTask leads on it: stop that one first")
            migrate(db, MIGRATIONS)
            lead.release()
            stack.pop_all()
        return db
    except (OSError, sqlite3.Error) as error:
        remedy = _LEFT_ALONE
        if isinstance(error, (OSError, sqlite3.OperationalError)):
            remedy = (
                f"{path.parent} must be writable for uid {os.getuid()} (chown -R {os.getuid()} it, or run as its owner, "
                "in a container by --user), with room on its disk, and no other program may hold a lock on the database; or set "
                "CHRONOTASK_DATABASE_URL to another place"
            )
        raise StartupError(f"the database {path} cannot be used: {error}; {remedy}") from None


def check_owners(path: Path) -> None:
    """Refuses a database that somebody else has planted or may change: its schedules would run as this user. The same for
    its folder and the files beside it. Raises StartupError."""
    for place in dict.fromkeys((path, Path(os.path.realpath(path)))):  # a link of our own may lead elsewhere
        check_owner(place.parent, 0o022)
        check_owner(place, 0o077)
        for beside in (Path(f"{place}{suffix}") for suffix in BESIDE):
            if beside.is_symlink():
                raise StartupError(f"{beside} is a symbolic link: no file of a database is one; remove it")
            check_owner(beside, 0o077)


def check_owner(path: Path, closed: int) -> None:
    """Raises StartupError if `path` is not to be trusted. What is our own and open to others as `closed` says (mode bits) is
    tightened first, and that is said: but for a folder where others have files too. What does not exist is trusted."""
    try:
        found, link, me = path.stat(), path.lstat(), os.geteuid()
        mode, closing = stat.S_IMODE(found.st_mode), found.st_uid == me
        if path.is_dir():  # in one such as /tmp nobody can replace what belongs to another
            closing &= not mode & stat.S_ISVTX
            for file in path.iterdir():
                with contextlib.suppress(FileNotFoundError):  # gone by now: that says nothing about the folder
                    closing &= file.lstat().st_uid in (0, me)
        if closing and mode & closed:
            with contextlib.suppress(OSError):
                path.chmod(mode & ~closed)
            found = path.stat()
            logger.warning("%s was open to others (mode %04o): it is %04o now", path, mode, stat.S_IMODE(found.st_mode))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StartupError(f"{path} cannot be looked at ({error.strerror}): {_OTHERWISE}") from None
    if why := untrusted(path, found if link.st_uid in (0, me) else link, alone=True):
        raise StartupError(f"{path} {why}, or {_OTHERWISE}")


def _pragma(db: DB, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def migrate(db: DB, migrations: Mapping[int, Sequence[str]]) -> None:
    """Brings the schema up to date, one transaction a version. A failing one leaves the database as it was."""
    for version, statements in migrations.items():
        db.execute("BEGIN IMMEDIATE")
        with db:  # which commits, or rolls back
            if _pragma(db, "user_version") >= version:  # looked up under the lock: another process may be doing the same
                continue
            for statement in statements:  # not executescript, which commits first
                db.execute(statement)
            db.execute(f"PRAGMA user_version={version}")
            db.execute(f"PRAGMA application_id={APPLICATION_ID}")


def refused_target(path: Path, target: Path) -> str | None:
    """Why a backup of the database at `path` must not replace `target`, or None. Whoever has a database open goes on writing to
    the file that was replaced; and a log of the old file spoils the new one."""
    ours, there = os.path.realpath(path), os.path.realpath(target)  # `os.path` raises for no name and no folder
    own = [f"{ours}{suffix}" for suffix in ("", *BESIDE)]
    same = os.path.exists(there) and any(os.path.exists(file) and os.path.samefile(file, there) for file in own)
    if same or there in own or there.startswith(f"{ours}.drain-"):
        return "a file of its own, not one of the database"
    if any(os.path.exists(f"{target}{suffix}") for suffix in ("-wal", "-journal")):
        return "a file of its own, not a database that is in use"
    if os.path.exists(target) and not os.path.isfile(target):
        return "a regular file, or a name that is free"
    return None


@contextlib.contextmanager
def replacing(target: Path, replace: bool = True) -> Iterator[Path]:
    """The path of a file to write, which then takes the place of `target`, whole and on disk. If not, `target` is as before."""
    # A folder of our own: a file that a stranger has put into the way would get all secrets.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield (part := Path(folder) / "part")
        if replace:
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.rename(target)


def backup(path: Path, target: Path | None = None, stopped: Callable[[], bool] = lambda: False) -> BinaryIO:
    """Writes a consistent, checked copy of the database at `path` to `target`, also while others write. Blocks until it is done
    or `stopped`. Returns it, open; without a target it has no name. Raises Unavailable."""
    try:
        with replacing(target or path, replace=target is not None) as part:
            with contextlib.closing(connect(path, read_only=True)) as source:
                source.set_progress_handler(stopped, SCAN_STEP)
                source.execute("VACUUM INTO ?", (str(part),))
            with contextlib.closing(sqlite3.connect(part)) as copied:
                copied.set_progress_handler(stopped, SCAN_STEP)
                found = copied.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(f"the copy is damaged: {found}")
            return part.open("rb")
    except (OSError, sqlite3.Error, UnicodeError) as error:  # SQLite takes only names that are UTF-8
        raise Unavailable(f"the backup of {path} to {target or 'a download'} failed: {error}") from None


# --- File locks -------------------------------------------------------------------------------------------------------


class FileLock:
    """An flock on a file: the kernel releases it when its holder dies, however it dies. Not fcntl/lockf (any close in the process
    drops it), not a row with a lease (a clock step steals it)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, shared: bool = False) -> bool:
        """Tries to take the lock without waiting. True if it is held."""
        if self.held():
            return True
        self.release()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if not isinstance(error, BlockingIOError):
                raise
        if not self.held():  # the file was replaced between open and lock
            self.release()
        return self._fd is not None

    def held(self) -> bool:
        """Whether this process holds the lock on the file that now has the name."""
        try:
            return self._fd is not None and os.path.samestat(os.fstat(self._fd), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_locked(path: Path) -> bool:
    """Whether another holder has the lock on `path` now. Makes the file if there is none."""
    probe = FileLock(path)
    free = probe.acquire()
    probe.release()
    return not free


def locks_work(path: Path) -> bool:
    """Whether flock excludes a second holder on this file system (some network file systems pretend). Raises OSError."""
    probe = FileLock(path.with_name(f"{path.name}.{uuid.uuid4()}.probe"))
    try:
        return probe.acquire() and is_locked(probe.path)
    finally:
        probe.release()
        probe.path.unlink(missing_ok=True)


# --- Queries: tasks and schedules -------------------------------------------------------------------------------------


# A column as JSON can hold it: bytes, which only a hand can have put there, as text that shows them.
_HELD = "iif(typeof({0}) = 'blob', quote({0}), {0})".format
# The rows of resources, with what their declarations mark as queried.
_TASKS = "SELECT *, (SELECT min(next_fire) FROM schedules WHERE task_id = tasks.id AND is_active) AS next_run FROM tasks"
_S_JOIN = "FROM schedules s CROSS JOIN tasks t ON t.id = s.task_id"
_WATCHED = f"""CASE WHEN s.schedule_type = 'after' AND json_valid(s.schedule_config) THEN (SELECT
    json_group_array(json_array(w.id, {_HELD("w.name")}, w.last_success, w.last_success_id))
    FROM json_each(s.schedule_config, '$.task_ids') j
    CROSS JOIN tasks w ON w.id = j.value AND NOT w.deleted) ELSE '[]' END AS watched"""
_SCHEDULES = f"SELECT s.*, t.name AS task_name, t.status = 'active' AS live, {_WATCHED} {_S_JOIN}"
_EXECUTIONS = "SELECT *, (SELECT name FROM tasks WHERE tasks.id = e.task_id) AS task_name FROM executions e"
# How the output of executions is read, if not whole.
_CUT = "CASE WHEN json_valid(output_data) THEN json(cut_texts(output_data)) END"
_OUTPUTS = {"none": ("output_data", "NULL"), None: ("output_data", _CUT)}
_TAGGED = "SELECT task_id FROM tags WHERE tag = ?"
_THESE = "IN (SELECT value FROM json_each(?))"  # ids as JSON
_NEXT_REV = "(SELECT value + 1 FROM meta WHERE key = 'rev')"  # triggers move the number on
_TABLES: dict[type[Any], str] = {Task: "tasks", Schedule: "schedules"}


def load(
    db: DB, kind: Callable[..., T], query: str, parameters: Sequence[Any] = (), instead: tuple[str, str] = ("", "")
) -> list[T]:
    """What `query` finds as objects of a declared `kind`, by the names of its columns: one step instead of one a row. `instead`:
    a column, and the expression that is read in its place. Damaged JSON is read as NULL, a damaged number or text as one."""
    found = db.execute(f"SELECT CAST(json_group_array({_as_json(kind, instead)}) AS BLOB) FROM ({query})", parameters)
    return [*map(shape_of(kind).make, parsed(found.fetchone()[0].decode("utf-8", "replace")))]


@functools.cache
def _as_json(kind: Any, instead: tuple[str, str] = ("", "")) -> str:
    shape = shape_of(kind)
    sound = "typeof({0}) = 'text' AND json_valid({0}) AND json_type({0}) = '{1}'"
    read = {n: f"CASE WHEN {sound.format(n, kind)} THEN json({n}) END" for n, kind in shape.json.items()}
    read |= {name: f"CAST({name} AS INTEGER)" for name in shape.whole}
    read |= {name: f"min(max(CAST({name} AS INTEGER), 0), {LAST_INSTANT})" for name in shape.times} | dict([instead])
    return f"json_array({', '.join(read.get(name) or _HELD(name) for name in shape.loaded)})"


def existing(rows: Sequence[T], what: str, row_id: int | str) -> T:
    """The one that a query by id has found. Raises NotFound."""
    if not rows:
        raise NotFound(f"there is no {what} {row_id}")
    return rows[0]


def write_rows(db: DB, statement: str, names: tuple[str, ...], rows: Sequence[Sequence[Any]]) -> sqlite3.Cursor:
    """Runs a statement that reads a table `rows` with the columns `names`, in one step."""
    text = compact(rows)
    if r"\u0000" in text:  # where a text ends for SQLite's JSON
        text = compact([[v.replace("\0", "\ufffd") if isinstance(v, str) else v for v in row] for row in rows])
    columns = ", ".join(f"json_extract(value, '$[{i}]') AS {name}" for i, name in enumerate(names))
    return db.execute(f"WITH rows AS (SELECT {columns} FROM json_each(?)) {statement}", (text,))


def _where(conditions: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """WHERE text and parameters from conditions whose value is not None; True adds one without a parameter, `IN ?` takes many."""
    kept = {text: value for text, value in conditions.items() if value is not None and value is not False}
    text = " AND ".join(kept).replace("IN ?", _THESE) or "TRUE"
    values = [value for value in kept.values() if value is not True]
    return f"WHERE {text}", [value if isinstance(value, (int, str)) else compact(list(value)) for value in values]


def _ids(db: DB, query: str, parameters: Sequence[Any] = ()) -> list[int]:
    return [row[0] for row in db.execute(query, parameters)]


def ids_of(db: DB, table: str, conditions: Mapping[str, Any], column: str = "id") -> list[int]:
    """The ids, or another column, of the rows that meet `conditions`."""
    where, values = _where(conditions)
    return _ids(db, f"SELECT {column} FROM {table} {where}", values)


def put_row(db: DB, table: str, *values: Any) -> None:
    """Writes a row in the order of its columns, in place of one with the same key."""
    db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(values))})", values)


def get_meta(db: DB, key: str) -> Any:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return row and row[0]


def set_meta(db: DB, key: str, value: Any) -> None:
    put_row(db, "meta", key, value)


def _stored(item: Any, columns: Iterable[str]) -> list[Any]:
    """The values of some columns, as they are stored."""
    return [compact(value) if isinstance(value, (dict, list)) else value for value in operator.attrgetter(*columns)(item)]


def insert(db: DB, item: T) -> T:
    """Writes a new task or schedule, and gives it its id."""
    kind: Any = type(item)
    columns = [name for name in shape_of(kind).columns if name != "id"]
    statement = f"INSERT INTO {_TABLES[kind]} ({', '.join(columns)}, rev) VALUES ({', '.join('?' * len(columns))}, {_NEXT_REV})"
    cast(Any, item).id = db.execute(statement, _stored(item, columns)).lastrowid
    return item


def update(db: DB, item: Task | Schedule) -> None:
    kind: Any = type(item)
    columns = [name for name in shape_of(kind).columns if name != "id"]
    names = ", ".join(f"{name} = ?" for name in columns)
    db.execute(f"UPDATE {_TABLES[kind]} SET {names}, rev = {_NEXT_REV} WHERE id = ?", [*_stored(item, columns), item.id])


def delete_schedule(db: DB, schedule_id: int) -> None:
    db.execute(f"UPDATE tasks SET rev = {_NEXT_REV} WHERE id = (SELECT task_id FROM schedules WHERE id = ?)", (schedule_id,))
    db.execute("DELETE FROM schedules WHERE id = ?", (schedule_id,))


def get_tasks(db: DB, ids: Collection[int]) -> dict[int, Task]:
    """Those of the tasks `ids` that exist, by id."""
    return {task.id: task for task in tasks_that(db, {"id IN ?": ids, "NOT deleted": True})}


def tasks_that(db: DB, conditions: Mapping[str, Any]) -> list[Task]:
    where, values = _where(conditions)
    return load(db, Task, f"{_TASKS} {where}", values)


def get_task(db: DB, task_id: int) -> Task:
    """Raises NotFound, also for a task that is being deleted."""
    return existing(tasks_that(db, {"id = ?": task_id, "NOT deleted": True}), "task", task_id)


def task_of_key(db: DB, key: str) -> int:
    """Raises NotFound."""
    return existing(ids_of(db, "tasks", {"key = ?": key, "deleted = 0": True}), "task", f"key:{key}")


def _page(
    db: DB, table: str, wanted: tuple[Any, Any], others: Mapping[str, Any], page: TaskQuery | ScheduleQuery
) -> tuple[int, str]:
    """How many rows of `table` meet conditions, and the ids of a page of them, oldest first, as JSON. By what is `wanted` of the
    two columns that are counted (None: all) a page is found without what lies before it; of what meets `others`, all, and cut."""
    counted = {"tasks": ("task_type", "status", "deleted = 0"), "schedules": ("schedule_type", "is_active", _NOT_DELETED)}
    *columns, alive = counted[table]
    if any(value is not None for value in others.values()):
        these = {f"{name} = ?": value for name, value in zip(columns, wanted, strict=True)}
        ids = sorted(ids_of(db, table, {f"+{alive}": True, **these, **others}))  # + so that the planner does not go by this
        return len(ids), compact(ids[page.skip : page.skip + page.limit])
    where, values = _where({"name = ?": table, "kind = ?": wanted[0], "state = ?": wanted[1]})
    groups = db.execute(f"SELECT kind, state, n FROM counts {where} AND size = 1 << 62 AND n > 0", values).fetchall()
    start, skip, total = 0, page.skip, sum(n for _, _, n in groups)
    if skip >= total:
        return total, "[]"
    for size in (10_000, 100) if skip else ():
        blocks = f"SELECT block, sum(n) FROM counts {where} AND size = ? AND block >= ? GROUP BY block ORDER BY block"
        for block, n in db.execute(blocks, [*values, size, start // size]):
            if n > skip:
                start = block * size
                break
            skip -= n
    parts = [
        f"SELECT id FROM {table} WHERE {alive} AND {columns[0]} = '{kind}' AND {columns[1]} = '{state}' AND id >= {start}"
        for kind, state, _ in groups
    ]
    return total, compact(_ids(db, f"{' UNION ALL '.join(parts)} ORDER BY id LIMIT ? OFFSET ?", (page.limit, skip)))


@functools.lru_cache(1000)
def _shown_task(row: str) -> TaskView:
    """What a client sees of a row: of one that has not changed it need not be made again."""
    return view_of(shape_of(Task).make(parsed(row)))


def list_tasks(db: DB, query: TaskQuery) -> tuple[int, list[TaskView]]:
    """A page of tasks as clients see them, oldest first, and how many there are in all."""
    like = None if query.q is None else "%" + re.sub(r"([%_\\])", r"\\\1", query.q) + "%"
    found = r"""id IN (SELECT id FROM (SELECT ? AS words) CROSS JOIN tasks INDEXED BY tasks_words WHERE deleted = 0
        AND (name LIKE words ESCAPE '\' OR description LIKE words ESCAPE '\'))"""  # an index that holds nothing else
    others = {"key = ? AND deleted = 0": query.key, f"id IN ({_TAGGED})": query.tag, found: like}
    total, ids = _page(db, "tasks", (query.task_type, query.status), others, query)
    found = f"SELECT CAST(group_concat({_as_json(Task)}, char(10)) AS BLOB) FROM ({_TASKS} WHERE id {_THESE} ORDER BY id)"
    [rows] = db.execute(found, (ids,)).fetchone()
    return total, [_shown_task(row) for row in rows.decode("utf-8", "replace").split("\n")] if rows else []


def get_schedule(db: DB, schedule_id: int) -> Schedule:
    """Raises NotFound."""
    return existing(schedules_that(db, {"s.id = ?": schedule_id, "NOT t.deleted": True}), "schedule", schedule_id)


def list_schedules(db: DB, query: ScheduleQuery) -> tuple[int, list[Schedule]]:
    """A page of schedules, oldest first, and how many there are in all."""
    wanted = query.schedule_type, None if query.is_active is None else int(query.is_active)
    total, ids = _page(db, "schedules", wanted, {"task_id = ?": query.task_id, f"task_id IN ({_TAGGED})": query.tag}, query)
    return total, load(db, Schedule, f"{_SCHEDULES} WHERE s.id {_THESE} ORDER BY s.id", (ids,))


def schedules_that(db: DB, conditions: Mapping[str, Any]) -> list[Schedule]:
    """The schedules (`s`, with their tasks `t`) that meet `conditions`, also those of deleted tasks."""
    where, values = _where(conditions)
    return load(db, Schedule, f"{_SCHEDULES} {where}", values)


def after_schedules(db: DB) -> list[Schedule]:
    """The schedules of type `after` that fire. Costs next to nothing where there is none."""
    if not _ids(db, "SELECT 1 FROM schedules WHERE schedule_type = 'after' AND is_active = 1 LIMIT 1") or get_meta(db, "paused"):
        return []
    return schedules_that(db, {"s.schedule_type = 'after' AND s.is_active = 1": True, LIVE_SQL: True})


def after_edges(db: DB, without: int) -> dict[int, list[int]]:
    """Which tasks are fired after which, by the ids that `after` schedules name; but for one schedule."""
    edges = f"""SELECT j.value, json_group_array(DISTINCT task_id) FROM schedules s, json_each(s.schedule_config, '$.task_ids') j
        WHERE s.schedule_type = 'after' AND json_valid(s.schedule_config) AND s.id <> ? AND {_NOT_DELETED} GROUP BY 1"""
    return {watched: parsed(fired) for watched, fired in db.execute(edges, (without,))}


def changed_timers(db: DB, since_rev: int) -> tuple[int, list[int], list[int], int | None]:
    """The newest number of a change. Of what was changed (or whose task was) after `since_rev`: when schedules fire next, and
    when executions are retried. And when the next pause ends by itself, of a task or of all."""
    fires = """SELECT DISTINCT next_fire FROM schedules WHERE is_active AND next_fire <= ?2 AND id IN (SELECT id FROM schedules
        WHERE rev > ?1 UNION ALL SELECT c.id FROM tasks CROSS JOIN schedules c ON c.task_id = tasks.id WHERE tasks.rev > ?1)"""
    retries = f"""SELECT DISTINCT next_attempt_at FROM executions WHERE {UNFINISHED_SQL} AND status = 'retrying'
        AND next_attempt_at <= ?2 AND task_id IN (SELECT id FROM tasks WHERE rev > ?1)"""
    pauses = """SELECT min(paused_until) FROM (SELECT paused_until FROM tasks INDEXED BY tasks_paused
            WHERE paused_until IS NOT NULL AND status = 'paused' AND deleted = 0
        UNION ALL SELECT value FROM meta WHERE key = 'paused_until')"""
    found = [_ids(db, instants, (since_rev, LAST_INSTANT)) for instants in (fires, retries)]
    return get_meta(db, "rev"), found[0], found[1], _ids(db, pauses)[0]


def _write_columns(db: DB, table: str, columns: str, items: Iterable[Task | Schedule]) -> None:
    """Writes these columns of many tasks or schedules in one step."""
    names = ("id", *columns.split())
    changes = ", ".join(f"{name} = rows.{name}" for name in names[1:])
    rows = [_stored(item, names) for item in items]
    write_rows(db, f"UPDATE {table} SET {changes} FROM rows WHERE {table}.id = rows.id", names, rows)


def advance_schedules(db: DB, schedules: Sequence[Schedule]) -> None:
    """Writes what a claim changes of schedules."""
    _write_columns(db, "schedules", "settled_until next_slot next_fire is_active run_count dealt_with ran over", schedules)


def mark_deleted(db: DB, task_id: int) -> None:
    """Makes a task invisible; the leader then ends its executions and removes its rows."""
    db.execute(f"UPDATE tasks SET deleted = 1, rev = {_NEXT_REV} WHERE id = ?", (task_id,))
    hold_disabled(db, task_id, True)  # what a killed execution leaves free must not start the next one
    for schedule in schedules_that(db, {"s.schedule_type = 'after' AND s.is_active = 1": True}):
        with contextlib.suppress(*DAMAGE):
            if task_id in schedule.schedule_config.get("task_ids", ()):  # without another one it is over
                schedule.look_ahead()
                update(db, schedule)


def purge_task(db: DB, task_id: int, limit: int) -> bool:
    """Removes up to `limit` rows of a deleted task; True once the task itself is gone."""
    for table in ("executions", "schedules"):
        chosen = f"SELECT id FROM {table} WHERE task_id = ? LIMIT ?"
        if db.execute(f"DELETE FROM {table} WHERE id IN ({chosen})", (task_id, limit)).rowcount == limit:
            return False
    db.execute("DELETE FROM tasks WHERE id = ?", (task_id,))
    db.execute("DELETE FROM counts WHERE n = 0")
    return True


# --- Queries: executions ----------------------------------------------------------------------------------------------


def insert_executions(db: DB, rows: Sequence[NewExecution]) -> list[int]:
    """Writes new rows and returns their ids, in order. Raises sqlite3.IntegrityError if one of the slots has a row."""
    if not rows:
        return []
    # Each column costs time for every row, and most hold nothing.
    names = [name for name in shape_of(NewExecution).columns if any(getattr(row, name) is not None for row in rows)]
    columns = (*names, "finished_at", "uuid")
    values = operator.attrgetter(*names)
    new = [(*values(row), None if row.status == "queued" else row.queued_at, str(uuid.uuid4())) for row in rows]
    last = write_rows(db, f"INSERT INTO executions ({', '.join(columns)}) SELECT * FROM rows", columns, new).lastrowid or 0
    return list(range(last - len(rows) + 1, last + 1))


def insert_slots(db: DB, rows: Sequence[NewExecution]) -> tuple[list[NewExecution], list[int]]:
    """Writes the rows of slots that have none yet, and returns these rows with their ids. A slot has a row already when the clock
    was set back. Only a slot that runs takes the place of a row which says that it did not."""
    slots = compact([[row.schedule_id, row.scheduled_for, row.status not in NEVER_STARTED] for row in rows])
    there = """json_each(?) AS j CROSS JOIN executions e ON schedule_id = json_extract(j.value, '$[0]')
        AND scheduled_for = json_extract(j.value, '$[1]') AND trigger IN ('schedule', 'catchup')"""
    replaced = f"SELECT e.id FROM {there} WHERE status IN ('skipped', 'missed') AND json_extract(j.value, '$[2]')"
    db.execute(f"DELETE FROM executions WHERE id IN ({replaced})", (slots,))
    taken = set(db.execute(f"SELECT schedule_id, scheduled_for FROM {there}", (slots,)))
    free = [row for row in rows if (row.schedule_id, row.scheduled_for) not in taken]
    return free, insert_executions(db, free)


def unfinished_of(db: DB, task_ids: Collection[int]) -> dict[int, list[NewExecution]]:
    """The unfinished executions of these tasks, as overlap looks at them: of those that are alike, one."""
    alike = f"SELECT DISTINCT task_id, schedule_id, trigger, hold FROM executions WHERE {UNFINISHED_SQL} AND task_id {_THESE}"
    groups: dict[int, list[NewExecution]] = {}
    for task_id, schedule_id, trigger, hold in db.execute(alike, (compact(list(task_ids)),)):
        groups.setdefault(task_id, []).append(NewExecution(task_id, schedule_id, trigger, None, 0, hold=hold))
    return groups


_RUNS = """SELECT e.id AS execution_id, task_id, schedule_id, trigger, scheduled_for, fire_at, uuid, name AS task_name, task_type,
    iif(typeof(t.config) = 'text', t.config, '{}') AS config, e.config AS override, concurrency_group, max_retries, retry_delay,
    retry_backoff, cause"""


def start_ready(db: DB, limit: int, now: int, owner: str) -> list[Run]:
    """Turns the first `limit` queued executions that nothing holds back, oldest slot first, to `running`; of each concurrency
    group one, while none of it is `running`."""
    # Of each group what runs, else what has waited longest.
    heads = """SELECT (SELECT a.id FROM tasks m CROSS JOIN executions a ON a.task_id = m.id
            WHERE m.concurrency_group = g.concurrency_group AND a.finished_at IS NULL
                AND (a.status = 'running' OR a.status = 'queued' AND a.hold = 0)
            ORDER BY iif(a.status = 'running', 0, coalesce(a.scheduled_for, a.queued_at)), a.id LIMIT 1)
        FROM tasks g WHERE g.concurrency_group IS NOT NULL GROUP BY g.concurrency_group"""
    ready = f"""{_RUNS}, attempt + 1 AS attempt, ?1 AS started_at, ?2 AS owner
        FROM executions e CROSS JOIN tasks t ON t.id = e.task_id WHERE e.status = 'queued' AND e.hold = 0
            AND (t.concurrency_group IS NULL OR e.id IN ({heads}))
        ORDER BY coalesce(scheduled_for, queued_at), e.id LIMIT ?3"""
    runs = load(db, Run, ready, (now, owner, limit))
    if not runs:
        return []
    db.execute(
        """UPDATE executions SET status = 'running', attempt = attempt + 1, attempt_started_at = ?1, next_attempt_at = NULL,
            started_at = min(coalesce(started_at, ?1), ?1), owner = ?2, error_message = NULL, output_data = NULL
        WHERE id IN (SELECT value FROM json_each(?3))""",
        (now, owner, compact([run.execution_id for run in runs])),
    )
    first = [run for run in runs if run.attempt == 1]
    counts = [(task_id, n, now) for task_id, n in Counter(run.task_id for run in first).items()]
    counted = "UPDATE tasks SET run_count = run_count + n, last_run = now FROM rows WHERE id = task_id"
    write_rows(db, counted, ("task_id", "n", "now"), counts)
    db.execute(f"UPDATE schedules SET last_run = ? WHERE id {_THESE}", (now, compact(list({run.schedule_id for run in first}))))
    return runs


def finish_attempts(db: DB, ended: Sequence[Finished]) -> list[Ended]:
    """Writes how attempts ended, and returns what is over by that. A retry that was cancelled meanwhile becomes `cancelled`."""
    if len(ended) > 1 and sum(len(s.output or "") for s in ended) > OUTPUT_AT_ONCE:
        return finish_attempts(db, ended[: len(ended) // 2]) + finish_attempts(db, ended[len(ended) // 2 :])
    columns = ("id", "attempt", "status", "attempt_status", "finished_at", "next_attempt_at", "error_message", "output")
    ends = [*map(operator.attrgetter("run.execution_id", "run.attempt", *columns[2:]), ended)]
    written = write_rows(
        db,
        """UPDATE executions SET owner = NULL, output_data = rows.output,
            error_message = CASE WHEN cancel_requested AND rows.status IN ('cancelled', 'retrying')
                THEN executions.error_message ELSE rows.error_message END,
            status = CASE WHEN rows.status = 'retrying' AND cancel_requested THEN 'cancelled' ELSE rows.status END,
            finished_at = CASE WHEN rows.status = 'retrying' AND NOT cancel_requested THEN NULL ELSE rows.finished_at END,
            next_attempt_at = CASE WHEN cancel_requested THEN NULL ELSE rows.next_attempt_at END
        FROM rows WHERE executions.id = rows.id AND executions.status = 'running' AND executions.attempt = rows.attempt
        RETURNING id, task_id, status, finished_at""",
        columns,
        ends,
    ).fetchall()
    if any(s.status == "retrying" for s in ended):
        write_rows(
            db,
            """INSERT OR IGNORE INTO attempts SELECT e.id, e.attempt, rows.attempt_status, attempt_started_at,
                rows.finished_at, e.error_message, output_data
            FROM rows CROSS JOIN executions e ON e.id = rows.id AND e.attempt = rows.attempt
            WHERE rows.status = 'retrying' AND e.status = 'retrying'""",
            columns,
            ends,
        )
    release_held(db, {s.run.task_id for s in ended})
    order = {s.run.execution_id: place for place, s in enumerate(ended)}
    return sorted((Ended(*row) for row in written if row[2] != "retrying"), key=lambda end: order[end.execution_id])


def write_standings(db: DB, tasks: Collection[Task], paused: Collection[Task], now: int) -> None:
    """What tasks have come to, as ends change it. `paused` are those among them whose status has changed."""
    counted = "status status_reason failures_in_a_row success_count failure_count last_status last_success last_success_id"
    _write_columns(db, "tasks", counted, tasks)
    for task in paused:
        db.execute(f"UPDATE tasks SET rev = {_NEXT_REV} WHERE id = ?", (task.id,))
        before, after = {"status": "active", "status_reason": None}, {"status": "paused", "status_reason": task.status_reason}
        put_row(db, "changes", None, now, "-", "pause_after", "task", task.id, "update", compact(before), compact(after))


def queue_retries(db: DB, now: int) -> None:
    """Executions whose `next_attempt_at` has come wait for capacity, unless their task is disabled."""
    due = "next_attempt_at <= ? AND (SELECT status FROM tasks WHERE id = task_id AND NOT deleted) <> 'disabled'"
    db.execute(f"UPDATE executions SET status = 'queued' WHERE {UNFINISHED_SQL} AND status = 'retrying' AND {due}", (now,))


def shift_retries(db: DB, by: int, latest: int) -> None:
    """Moves every next attempt by so many microseconds, and to `latest` at most."""
    moved = "next_attempt_at = min(next_attempt_at + ?, ?)"
    db.execute(f"UPDATE executions SET {moved} WHERE {UNFINISHED_SQL} AND status = 'retrying'", (by, latest))


def release_held(db: DB, task_ids: Collection[int]) -> None:
    """Lifts the holds of executions of these tasks that nothing is ahead of any more."""
    if db.execute("SELECT 1 FROM executions WHERE status = 'queued' AND hold > 0 LIMIT 1").fetchone() is None:
        return
    ahead = f"SELECT 1 FROM executions a WHERE a.task_id = held.task_id AND a.id < held.id AND a.{UNFINISHED_SQL}"
    for bit, extra in ((Hold.OVERLAP, ""), (Hold.CATCHUP, "AND a.trigger = held.trigger AND a.schedule_id = held.schedule_id")):
        free = f"hold & {bit:d} AND held.task_id {_THESE} AND NOT EXISTS ({ahead} {extra})"
        lift = f"UPDATE executions AS held SET hold = hold & ~{bit:d} WHERE status = 'queued' AND hold > 0 AND {free}"
        db.execute(lift, (compact(list(task_ids)),))


def hold_disabled(db: DB, task_id: int, disabled: bool) -> None:
    change = f"hold | {Hold.DISABLED:d}" if disabled else f"hold & ~{Hold.DISABLED:d}"
    db.execute(f"UPDATE executions SET hold = {change} WHERE {UNFINISHED_SQL} AND status = 'queued' AND task_id = ?", (task_id,))


def cancel_executions(db: DB, conditions: Mapping[str, Any], now: int, reason: str) -> list[tuple[int, int, str]]:
    """Of the executions that meet `conditions`, ends those that wait, and asks for the end of those that run. Returns their
    ids, those of their tasks, and the statuses that they had, oldest first."""
    where, values = _where({_NOT_DELETED: True, **conditions})
    found = db.execute(f"SELECT id, task_id, status FROM executions {where} ORDER BY +id", values).fetchall()
    db.execute(
        f"""UPDATE executions SET cancel_requested = (status = 'running'), next_attempt_at = NULL,
            status = iif(status = 'running', 'running', 'cancelled'), finished_at = iif(status = 'running', NULL, ?1),
            error_message = ?2 || iif(status = 'running', '', coalesce('; the attempt before: ' || error_message, ''))
        WHERE id IN (SELECT value FROM json_each(?3)) AND {UNFINISHED_SQL}""",
        (now, reason, compact([execution_id for execution_id, _, _ in found])),
    )
    tried = compact([task_id for _, task_id, status in found if status == "retrying"])
    db.execute(f"UPDATE tasks SET last_status = 'cancelled' WHERE id {_THESE}", (tried,))
    release_held(db, {task_id for _, task_id, _ in found})
    return found


def running_of_others(db: DB, owner: str) -> list[Run]:
    """Executions that are `running` under another owner: it has died, or is finishing them."""
    running = f"""{_RUNS}, attempt, attempt_started_at AS started_at, owner FROM executions e JOIN tasks t ON t.id = e.task_id
        WHERE e.{UNFINISHED_SQL} AND e.status = 'running' AND owner IS NOT ?"""
    return load(db, Run, running, (owner,))


def get_execution(db: DB, execution_id: int) -> tuple[Execution, list[Attempt]]:
    """An execution with its earlier attempts, oldest first. Raises NotFound."""
    rows = load(db, Execution, f"{_EXECUTIONS} WHERE id = ? AND {_NOT_DELETED}", (execution_id,))
    past = load(db, Attempt, "SELECT * FROM attempts WHERE execution_id = ? ORDER BY attempt", (execution_id,))
    return existing(rows, "execution", execution_id), past


def get_executions(db: DB, ids: Collection[int], output: bool = False) -> list[Execution]:
    """Those of the executions `ids` that exist, oldest first."""
    how = ("", "") if output else _OUTPUTS["none"]
    return load(db, Execution, f"{_EXECUTIONS} WHERE id {_THESE} ORDER BY id", (compact(list(ids)),), how)


def depths_of(db: DB, ids: Collection[int]) -> dict[int, int]:
    """How many executions `after` fired one because of the other until each of these, which is one of them."""
    return dict(db.execute(f"SELECT id, depth FROM executions WHERE depth > 0 AND id {_THESE}", (compact(list(ids)),)))


def execution_of_key(db: DB, task_id: int, key: str, body: str, now: int) -> int | None:
    """The execution that was asked for with this idempotency key in the last day, or None. Raises InvalidInput, Conflict."""
    db.execute("DELETE FROM idempotency WHERE at < ?", (now - DAY,))
    asked = "SELECT i.body, execution_id, e.id FROM idempotency i LEFT JOIN executions e ON e.id = execution_id"
    row = db.execute(f"{asked} WHERE i.task_id = ? AND key = ?", (task_id, key)).fetchone()
    if row is not None and row[0] != body:
        raise InvalidInput(FieldError("Idempotency-Key", "was sent with another body within the last 24 h: take another key"))
    if row is not None and row[2] is None:
        gone = f"execution {row[1]}, which the history no longer holds"
        raise Conflict(f"this Idempotency-Key has started {gone}: it is not run again")
    return row and int(row[1])


def list_executions(
    db: DB, query: ExecutionQuery | HistoryQuery, task_id: int | None = None, since: int | None = None, until: int | None = None
) -> tuple[int, list[Execution]]:
    """A page of executions, newest first, of all tasks or of one; and how many there are in all, if of one. Raises NotFound.
    Those that lie at least partly between `since` and `until`, from `queued_at` to `finished_at`; with their whole output
    (`full`), without (`none`), or with its texts cut (None)."""
    asked = query.model_dump(exclude_none=True)
    judged = asked.get("success")
    statuses = [s for s in query.status or (SUCCESS if judged is not None else ()) if judged is None or SUCCESS.get(s) is judged]
    where, values = _where(
        {
            _NOT_DELETED: task_id is None,
            "task_id = ?": task_id if task_id is not None else asked.get("task_id"),
            f"task_id IN ({_TAGGED})": asked.get("tag"),
            "schedule_id = ?": asked.get("schedule_id"),
            "trigger = ?": asked.get("trigger"),
            "id < ?": asked.get("before_id"),
            "queued_at <= ?": until,
            "coalesce(finished_at >= ?, TRUE)": since,
            "FALSE": judged is not None and not statuses,
        }
    )
    # One part for each status: each is in the order of an index, and they are merged as far as they are read.
    # + for the index of the few, not the order of all rows.
    parts = list[str]()
    for status in statuses:
        plus, served = ("+", UNFINISHED_SQL) if status in UNFINISHED else ("", "TRUE" if status == "succeeded" else _RARE)
        parts.append(f"SELECT {plus}id AS id FROM executions {where} AND status = '{status}' AND {served}")
    found = " UNION ALL ".join(parts or [f"SELECT id FROM executions {where}"])
    values *= max(1, len(statuses))
    total = 0
    if task_id is not None:
        counted = db.execute("SELECT history_count FROM tasks WHERE id = ? AND NOT deleted", (task_id,)).fetchall()
        total = existing(counted, "task", task_id)[0]
        if asked.keys() & {"status", "success", "since", "until"}:
            total = db.execute(f"SELECT count(*) FROM ({found})", values).fetchone()[0]
    page = f"{_EXECUTIONS} WHERE id IN ({found} ORDER BY id DESC LIMIT ? OFFSET ?) ORDER BY id DESC"
    return total, load(db, Execution, page, [*values, query.limit, asked.get("skip", 0)], _OUTPUTS.get(query.output, ("", "")))


def finished_among(db: DB, ids: Sequence[int]) -> list[int]:
    """Those of the executions `ids` that are over, or gone with their task."""
    return list({*ids}.difference(ids_of(db, "executions", {"id IN ?": ids, UNFINISHED_SQL: True, _NOT_DELETED: True})))


def counts(db: DB) -> tuple[dict[str, int], dict[str, int]]:
    """How many tasks, schedules and active schedules there are, and how many executions wait, run or will be retried."""
    objects = db.execute("SELECT name, sum(n) FROM counts WHERE name IN ('tasks', 'schedules') AND size = 1 << 62 GROUP BY 1")
    rows = db.execute(f"SELECT status, count(*) FROM executions WHERE {UNFINISHED_SQL} GROUP BY status")
    known = {"tasks": 0, "schedules": 0, **dict(objects.fetchall()), "active_schedules": get_meta(db, "firing")}
    return known, {**dict.fromkeys(UNFINISHED, 0), **dict(rows.fetchall())}


def next_schedules(db: DB, query: UpcomingQuery, until: int) -> list[Schedule]:
    """The schedules that fire until then, at most `limit`, by when they fire next."""
    asked = {"s.next_fire <= ?": until, "s.task_id = ?": query.task_id, f"s.task_id IN ({_TAGGED})": query.tag}
    where, values = _where({LIVE_SQL: True, **asked})
    return load(db, Schedule, f"{_SCHEDULES} {where} ORDER BY s.next_fire LIMIT ?", [*values, query.limit])


# --- Queries: looking on ----------------------------------------------------------------------------------------------


def progress(db: DB) -> tuple[tuple[int, int], bool]:
    """The newest number of a changed object and that of the rows of changes; whether the scheduler is paused."""
    [(newest,)] = db.execute("SELECT coalesce(max(id), 0) FROM changes")
    return (get_meta(db, "rev"), newest), bool(get_meta(db, "paused"))


def changed_objects(db: DB, since: tuple[int, int], until: tuple[int, int]) -> tuple[list[Task], list[Schedule], list[Any]]:
    """Tasks and schedules changed from one progress to another; of deleted ones the kind, id and task."""
    revs, rows = zip(since, until, strict=True)
    tasks = load(db, Task, f"{_TASKS} WHERE rev > ? AND rev <= ? AND NOT deleted LIMIT {MOST_TOLD}", revs)
    schedules = load(db, Schedule, f"{_SCHEDULES} WHERE s.rev > ? AND s.rev <= ? LIMIT {MOST_TOLD}", revs)
    task = "coalesce(json_extract(before, '$.task_id'), object_id)"
    deleted = f"SELECT kind, object_id, {task} FROM changes WHERE id > ? AND id <= ? AND operation = 'delete' LIMIT ?"
    return tasks, schedules, db.execute(deleted, (*rows, MOST_TOLD)).fetchall()


def unfinished_statuses(db: DB) -> tuple[int, dict[int, str]]:
    """The highest execution id, and the statuses of unfinished executions."""
    [(top,)] = db.execute("SELECT coalesce(max(id), 0) FROM executions")
    return top, dict(db.execute(f"SELECT id, status FROM executions WHERE {UNFINISHED_SQL} ORDER BY +id DESC LIMIT 2000"))


def changed_executions(db: DB, after_id: int, shown: Mapping[int, str]) -> list[int]:
    """Executions that are newer than `after_id`, or no longer have the status that is shown of them."""
    changed = """SELECT e.id FROM json_each(?) AS j CROSS JOIN executions e ON e.id = CAST(j.key AS INTEGER)
        WHERE e.status <> j.value"""
    new = _ids(db, "SELECT id FROM executions WHERE id > ? ORDER BY id DESC LIMIT ?", (after_id, MOST_TOLD))
    return new + _ids(db, changed, (compact(shown),))


def recent_executions(db: DB, task_ids: Sequence[int], count: int) -> dict[int, list[tuple[RecentRun, str | None]]]:
    """The last `count` executions of each task, oldest first, as an overview shows them; each with its error message."""
    recent = f"""SELECT json_group_array(json_array(task_id, {_HELD("error_message")}, id, status, started_at, duration)) FROM (
        SELECT e.*, max(0, finished_at - started_at) / 1e6 AS duration FROM json_each(?) AS j CROSS JOIN executions AS e
        WHERE e.id IN (SELECT id FROM executions WHERE task_id = j.value ORDER BY id DESC LIMIT ?) ORDER BY e.id)"""
    found: dict[int, list[tuple[RecentRun, str | None]]] = {}
    [(rows,)] = db.execute(recent, (compact(list(task_ids)), count))
    for task_id, error, number, status, started_at, duration in parsed(rows):
        run = dict(id=number, status=status, started_at=instant_or_none(started_at), duration=duration)
        found.setdefault(task_id, []).append((run, error))
    return found


def measured_tasks(db: DB, limit: int) -> tuple[list[Task], dict[int, int]]:
    """The `limit` tasks that ran last, without their configurations; and since when tasks run, by their ids."""
    ids = "SELECT id FROM tasks WHERE NOT deleted ORDER BY last_run DESC, id LIMIT ?"  # what is queried is of these alone
    tasks = load(db, Task, f"{_TASKS} WHERE id IN ({ids}) ORDER BY last_run DESC, id", (limit,), ("config", "NULL"))
    running = f"SELECT task_id, min(started_at) FROM executions WHERE {UNFINISHED_SQL} AND status = 'running' GROUP BY 1"
    return tasks, dict(db.execute(running).fetchall())


def shown_output(db: DB, execution_id: int, attempt: int, now: int) -> list[tuple[str, int, bytes]]:
    """Stream, bytes in all and the last, as the process that runs an attempt shows them; it is asked to go on for 5 s."""
    put_row(db, "live_output", execution_id, "", now + 5 * SECOND, 0, b"")
    sql = "SELECT stream, total, recent FROM live_output WHERE execution_id = ? AND stream LIKE '% ' || ?"
    return [(stream.partition(" ")[0], *rest) for stream, *rest in db.execute(sql, (execution_id, attempt))]


def show_output(db: DB, recent: Mapping[tuple[int, int], Sequence[tuple[str, int, bytes]]], now: int) -> None:
    """Writes recent output of attempts for followers in other processes, and forgets what nobody asks for any more."""
    for (execution_id, attempt), streams in recent.items():
        for stream, total, data in streams:
            put_row(db, "live_output", execution_id, f"{stream} {attempt}", now + 10 * SECOND, total, data)
    db.execute("DELETE FROM live_output WHERE wanted_until < ?", (now,))


def list_changes(db: DB, query: ChangeQuery) -> list[Change]:
    """A page of changes, newest first."""
    where, values = _where({"kind = ?": query.kind, "object_id = ?": query.id, "id < ?": query.before_id})
    return load(db, Change, f"SELECT * FROM changes {where} ORDER BY id DESC LIMIT ?", [*values, query.limit])


# --- Queries: retention -----------------------------------------------------------------------------------------------

_OVER = "status NOT IN ('queued', 'running', 'retrying') AND coalesce(scheduled_for, 0) <= :now"


def latest_known(db: DB) -> int:
    """The latest instant that the database knows of; 0 when it knows none."""
    newest = " UNION ALL SELECT CAST(max({}) AS INTEGER) FROM (SELECT * FROM {} ORDER BY {} DESC LIMIT 1000)"
    known = (
        "SELECT value FROM meta WHERE key = 'clock' "
        + newest.format("max(updated_at, coalesce(last_run, 0))", "tasks", "rev")
        + newest.format("max(updated_at, dealt_with)", "schedules", "rev")
    )
    return max((at for at in _ids(db, known) if at is not None), default=0)


def delete_old(db: DB, table: str, after_id: int, cutoff: int, now: int, limit: int) -> int | None:
    """Deletes changes, or finished executions, older than `cutoff` among the `limit` rows behind `after_id`; returns where to go
    on, or None. Ids grow with time, also where the clock was wrong: what lies behind a young row is young, and what a clock
    that was ahead has written is old when something behind it is."""
    begun, ended, over = {"executions": ("queued_at", "finished_at", _OVER), "changes": ("at", "at", "TRUE")}[table]
    where = {"after": after_id, "cutoff": cutoff, "now": now, "limit": limit}
    rows = db.execute(
        f"""SELECT id, {begun} > :cutoff, {ended} < :cutoff FROM {table} WHERE id > :after AND {begun} <= :now
            ORDER BY id LIMIT :limit""",
        where,
    ).fetchall()
    before_young = [*itertools.takewhile(lambda row: not row[1], rows)]
    where["old"] = max((row_id for row_id, _, old in before_young if old), default=0)
    chosen = f"id > :after AND id <= :old AND NOT {ended} BETWEEN :cutoff AND :now AND {over} ORDER BY id LIMIT :limit"
    if db.execute(f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE {chosen})", where).rowcount == limit:
        return after_id
    return int(rows[-1][0]) if len(before_young) == limit else None


def tasks_with_surplus(db: DB, keep: int, keep_skipped: int) -> list[int]:
    """The tasks with more rows than are kept, by their counters."""
    more = "(?1 AND history_count - marks > ?1) OR (?2 AND marks > ?2)"
    return _ids(db, f"SELECT id FROM tasks WHERE NOT deleted AND ({more})", (keep, keep_skipped))


def delete_surplus(db: DB, task_id: int, keep: int, keep_skipped: int, now: int, limit: int) -> int:
    """Deletes at most `limit` of a task's finished rows: beyond the newest `keep` runs, `keep_skipped` skipped or missed ones."""
    deleted = 0
    ran = "status NOT IN ('skipped', 'missed') ORDER BY id"
    did_not = f"{_RARE} AND status IN ('skipped', 'missed') ORDER BY +id"
    for chosen, kept in ((ran, keep), (did_not, keep_skipped)):
        if kept:
            deleted += db.execute(
                f"""DELETE FROM executions WHERE id IN (SELECT id FROM executions WHERE task_id = :task AND {_OVER}
                    AND {chosen} DESC LIMIT :limit OFFSET :kept)""",
                {"task": task_id, "now": now, "kept": kept, "limit": limit},
            ).rowcount
    return deleted


def give_back_space(db: DB) -> None:
    """Returns some free pages to the file system. (`execute` takes a single step, which frees one page.)"""
    for _ in range(200 if _pragma(db, "freelist_count") > 1000 else 0):
        db.execute("PRAGMA incremental_vacuum(1)")


# ======================================================================================================================
# 7. Executors
# ======================================================================================================================
#
# `run_bash` and `run_http` take a stored configuration and give an Outcome. They never raise, but for the cancellation of
# their own job. Each fills the secrets in, checks once more that this may run here, and feeds what comes back into a
# LiveOutput, through which the service looks on and stops them.

TERM_SECONDS = {"cancelled": 2.0, "interrupted": 1.0, "timed_out": 2.0}  # from SIGTERM to SIGKILL; a stopping service has less
DRAIN_SECONDS = 1.0  # for what is still in the pipes once the process is gone
MAX_LEFT_PIPES = 200  # of them: each is an open file
MAX_REDIRECTS = 10
MAX_HEAD_BYTES = 300 * 1024  # of a response: curl's limit
MAX_HEAD_LINE = 65536
READ_BYTES = 65536  # at once: of chunks of a byte each, or of escapes, this is a tenth of a second
REFUSED_ERRNO = 0x4354  # no system uses it: it survives aiohttp's merging of the errors of several addresses
KEEP_SECONDS = 0.5  # that a connection waits for the next request: enough for a burst; servers close idle ones after 1 s or more
MAX_SECRET_BYTES = 65536
MAX_SECRETS = 100  # of one configuration: each is a file to read and a text to look for in all output
MIN_SECRET_LENGTH = 6  # shorter ones would mask half of every output


# --- Output: bounded, masked, and visible while it grows --------------------------------------------------------------


# What programs make of a character that they do not print as it is: HTML; URLs; literals of JSON (where some escape more than
# they must, as \/ and \u002B), shells, C and Python. The group is one that is not whole yet.
_ESCAPES = {
    b"&": re.compile(rb"(&[#0-9A-Za-z]{0,8}\Z)|&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|amp|lt|gt|quot|apos);"),
    b"%": re.compile(rb"(%[0-9a-fA-F]?\Z)|%[0-9a-fA-F]{2}"),
    b"\\": re.compile(
        rb"(\\(?:u[0-9a-fA-F]{0,3}|u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?|U[0-9a-fA-F]{0,7}|x[0-9a-fA-F]?"
        rb"|[0-3][0-7]?)?\Z)|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U00[01][0-9a-fA-F]{5}"
        rb"|\\x[0-9a-fA-F]{2}|\\[0-3][0-7]{2}|\\[abeEfnrtv]|\\[^A-Za-z0-9]"
    ),
}


@functools.lru_cache(1024)
def _unescaped(escape: bytes) -> bytes:
    if escape.startswith(b"&"):
        return html.unescape(escape.decode()).encode("utf-8", "replace") or b"\0"  # never nothing: each byte has its source
    if escape.startswith(b"%"):
        return bytes.fromhex(escape[1:].decode())
    if escape[1:2] not in b"abeEfnrtvuUx0123":
        return escape[1:]
    text = "\x1b" if escape[1:] in b"eE" else escape.decode("unicode_escape", "replace")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # two may be one character
    return text.encode("utf-8" if escape[1:2] in b"uU" else "latin-1")


class SecretMasker:
    """Replaces secrets in a byte stream, as they are and as programs escape them, also where the border of two chunks cuts one.
    It holds back only what may still become a secret, so that a line is seen as soon as it is printed."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self.forms = sorted({form for secret in secrets if len(secret) >= MIN_SECRET_LENGTH for form in _secret_forms(secret)})
        self._held = b""
        self._known = 0  # so many bytes at the beginning of those are of a secret whose mask has been shown

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """What can be shown by now; all of it after the `last` piece."""
        if not self.forms:
            return data
        data = self._held + data
        cut, secrets = len(data), list[tuple[int, int]]()
        for plain, sources, unfinished in _decodings(data):
            for form in self.forms:
                at = plain.find(form)  # linear, which a regular expression would not be
                while at >= 0:
                    secrets.append((sources[at], sources[bisect.bisect_right(sources, sources[at + len(form) - 1])]))
                    at = plain.find(form, at + 1)  # they may overlap: abcdeabcdea
            if not last:
                cut = min(cut, sources[self._possible_start(plain[: len(plain) - unfinished])])
                cut = sources[bisect.bisect_right(sources, cut) - 1]  # half an escape would be read as something else
        shown: list[bytes] = []
        at = self._known
        for start, end in sorted(secrets):
            if start >= cut:
                break
            if start >= at:  # else it overlaps one that is masked already
                shown += data[at:start], MASK.encode()
            at = max(at, end)
        shown.append(data[at:cut])
        self._held, self._known = data[cut:], max(0, at - cut)
        return b"".join(shown)

    def _possible_start(self, data: bytes) -> int:
        """Where the longest end of `data` that begins a secret (and is not all of it) starts."""
        first = len(data)
        for form in self.forms:
            at = data.find(form[:1], max(0, len(data) - len(form) + 1), first)
            for _ in range(100):  # more that look alike are held back unseen: comparing them all would be quadratic
                if at < 0 or form.startswith(data[at:]):
                    break
                at = data.find(form[:1], at + 1, first)
            first = at if at >= 0 else first
        return first


def _decodings(data: bytes) -> Iterator[tuple[bytes, Sequence[int], int]]:
    """`data` as it is, and with what escapes of one kind mean; where each byte was read from, and how many at the end are no
    whole escape. Backslashes come last: none of the other escapes holds one."""
    yield data, range(len(data) + 1), 0
    for mark, escapes in _ESCAPES.items():
        if mark in data:
            plain, sources, taken, unfinished = bytearray(), list[int](), 0, 0
            for found in escapes.finditer(data):
                if found[1]:
                    unfinished = len(found[1])
                    break
                meant = _unescaped(found[0])
                plain += data[taken : found.start()] + meant
                sources += [*range(taken, found.start()), *[found.start()] * len(meant)]
                taken = found.end()
            yield bytes(plain + data[taken:]), [*sources, *range(taken, len(data) + 1)], unfinished


@functools.lru_cache(32)
def _secret_forms(secret: str) -> set[bytes]:
    """A secret and its lines as programs and servers echo them, once escapes are undone: plain, in a form, UTF-16, base64."""
    plain = secret.encode("utf-8", "surrogateescape")  # bytes of a variable that are no UTF-8 reach a command as they are
    # As Python's ascii() writes it; as a shell and shlex write an apostrophe.
    latin = b"".join(letter.encode("latin-1" if letter < "\u0100" else "utf-8", "surrogateescape") for letter in secret)
    forms = {plain, latin, plain.replace(b"'", b"'\\''"), plain.replace(b"'", b"'\"'\"'")}
    forms |= {re.sub(rb"[\0-\x1f\x7f-\xff]+", rb"'$'\g<0>''", text) for text in forms}  # as ls and cp do in a message
    forms |= {b" ".join(plain.split()), plain.replace(b" ", b"+")}  # of `echo $SECRET`; in a form
    forms |= {line.strip() for form in forms for line in form.split(b"\n")}  # as GitHub's runner masks it
    forms |= {secret.encode("utf-16-le", "replace"), secret.encode("utf-16-be", "replace")}
    encoded = base64.b64encode(plain)
    pieces = {encoded, encoded.rstrip(b"=")}
    for before in range(3):  # bytes of something else, as in the `user:password` of basic authentication
        text = base64.b64encode(bytes(before) + plain)  # in it the characters that the secret alone determines
        pieces.add(text[-(-before * 8 // 6) : (before + len(plain)) * 8 // 6])
    forms |= pieces | {piece.translate(bytes.maketrans(b"+/", b"-_")) for piece in pieces}
    return {form for form in forms if len(form) >= MIN_SECRET_LENGTH}


class Report:
    """The line in which the far side of a launcher tells the exit status of the command: taken out of the output. Only this
    attempt knows how it begins. Where several report (`srun --ntasks=2`), one failure is a failure."""

    def __init__(self) -> None:
        self.word = uuid.uuid4().hex
        self.status: int | None = None
        self._begins = f"\n{self.word} ".encode()
        self._line = re.compile(self._begins + rb"([0-9]{1,3})\r?\n")  # \r from a terminal, as `ssh -tt` has one
        self._held = b""

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """What is shown of the output; what may become that line is held back, a line break at the end at least."""
        data = self._held + data
        for status in self._line.findall(data):
            self.status = self.status or int(status)
        data = self._line.sub(b"", data)
        tail = data[data.rfind(b"\n") :] if b"\n" in data else b""
        begun = self._begins.startswith(tail[: len(self._begins)]) and len(tail) < len(self._begins) + 5
        self._held = tail if begun and not last else b""
        return data[: len(data) - len(self._held)]


# Only character sets: Python's own codecs of other kinds (idna, unicode_escape, utf-7 …) can be slow or give lone surrogates.
_CHARSET = re.compile(
    r";\s*charset\s*=\s*\"?(utf-?(?:16|32)(?:-?[lb]e)?|(?:us-)?ascii|iso-?8859-\d{1,2}|latin-?1|windows-\d{3,4}|cp\d{3,4}"
    r"|koi8-[ru]|gbk|gb2312|gb18030|big5|euc-(?:jp|kr)|shift[_-]jis|iso-2022-jp)(?![\w-])",
    re.IGNORECASE,
)


class Clipper:
    """What is kept of one stream of an attempt, of whatever length, masked: the first quarter and the last three quarters of
    `limit` bytes."""

    def __init__(self, limit: int, masker: SecretMasker | None = None, report: Report | None = None) -> None:
        self.received = self.total = 0  # bytes, as they came and masked
        self.decoder: codecs.IncrementalDecoder | None = None  # while it is not UTF-8
        self._masker, self._report = masker or SecretMasker(), report
        self._limit, self._head, self._tail = limit, bytearray(), bytearray()

    def feed(self, data: bytes, last: bool = False) -> None:
        if self._report is not None:
            data = self._report.feed(data, last)
        self.received += len(data)
        if self.decoder is not None:
            data = self.decoder.decode(data, last).encode("utf-8", "replace")
        data = self._masker.feed(data, last)
        self.total += len(data)
        room = self._limit // 4 - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._limit:  # not at every feed: moving the bytes costs
            del self._tail[: -self._limit]

    @property
    def truncated(self) -> bool:
        return self.total > self._limit

    def text(self) -> str:
        """What was kept, decoded with replacement; where bytes are missing, a line says how many."""
        if not self.truncated:
            return (self._head + self._tail).decode("utf-8", "replace")
        tail = self._tail[self._limit // 4 - self._limit :].decode("utf-8", "replace")
        return f"{self._head.decode('utf-8', 'replace')}\n[… {self.total - self._limit} bytes left out …]\n{tail}"

    def recent(self) -> bytes:
        """The end of the stream, as far as it is kept without a gap."""
        return bytes(self._head + self._tail if self.total == len(self._head) + len(self._tail) else self._tail)


def mapped(value: Any, change: Callable[[str], str], names: bool = False) -> Any:
    """A text changed, or a JSON value with all its texts; with `names` those of its objects, too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name) if names else name: mapped(item, change, names) for name, item in value.items()}
    return [mapped(item, change, names) for item in value] if isinstance(value, list) else value


class LiveOutput:
    """An attempt seen from outside while it runs: its output so far (stdout and stderr, or body), and the way to stop it.
    Secrets are masked before anything is kept or shown."""

    def __init__(self, limit: int) -> None:
        self.reason: str | None = None
        self.closed = False
        self.facts: dict[str, Any] = {}
        self.content_type = ""
        self.acted = False  # a server has answered what must not be sent twice
        self._limit = limit
        self._streams: dict[str, Clipper] = {}
        self._masker = SecretMasker()
        self._timeout: asyncio.Timeout | None = None

    # --- for the executor ---

    def begin(self, streams: Iterable[str], masker: SecretMasker, report: Report | None = None) -> None:
        self._masker = masker
        for name in streams:
            self._streams[name] = Clipper(self._limit, copy.copy(masker), report if name == "stdout" else None)

    def expect(self, content_type: str) -> None:
        """What comes is of this type: it is kept in UTF-8 from the beginning, so that secrets are found in any character set."""
        self.content_type = content_type
        if found := _CHARSET.search(content_type):
            with contextlib.suppress(LookupError):
                for stream in self._streams.values():
                    stream.decoder = codecs.getincrementaldecoder(found[1])("replace")

    def feed(self, stream: str, data: bytes, last: bool = False) -> None:
        self._streams[stream].feed(data, last)

    def close(self) -> None:
        """Nothing more comes."""
        if not self.closed:
            for name in self._streams:
                self.feed(name, b"", last=True)
            self.closed = True

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """The attempt's time limit as a context, to be entered at once; `stop` makes it expire early."""
        self._timeout = asyncio.timeout(0 if self.reason else seconds)
        return self._timeout

    def masked(self, value: Any) -> Any:
        """A text, or a JSON value with all its texts, without the secrets of this attempt."""

        def mask(text: str) -> str:
            return self._masker.feed(text.encode("utf-8", "replace"), last=True).decode("utf-8", "replace")

        return mapped(value, mask, names=True) if self._masker.forms else value

    # --- for everybody else ---

    def stop(self, reason: str) -> None:
        """End the attempt: `reason` is cancelled or interrupted, and becomes its status. The first call counts."""
        if self.reason is None and not self.closed:
            self.reason = reason
            if self._timeout is not None:
                with contextlib.suppress(RuntimeError):  # it is over
                    self._timeout.reschedule(0)  # after this turn of the loop: what has just come to its end keeps its result

    def recent(self) -> list[tuple[str, int, bytes]]:
        """Of each stream its name, its bytes so far, and the last of them."""
        return [(name, stream.total, stream.recent()) for name, stream in self._streams.items()]

    def snapshot(self) -> dict[str, Any]:
        """`output_data` so far; the executor's last word may parse the body and add the exit status."""
        texts = {name: stream.text() for name, stream in self._streams.items()}
        sizes = {f"{name}_bytes": stream.received for name, stream in self._streams.items()}
        return self.facts | texts | sizes | {"truncated": any(stream.truncated for stream in self._streams.values())}


# --- Secrets ----------------------------------------------------------------------------------------------------------

_FILLED = re.compile(r"\$\{(env|file|cause):([^{}]*)\}")


def resolve_secrets(
    task_type: str, config: dict[str, Any], environ: Mapping[str, str], settings: Settings, facts: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """`config` with its `${env:…}` and `${file:…}` replaced, and the secrets that were put in. `facts` (JSON text) replace its
    `${cause:…}`; without facts these are empty. What was put in is not looked at again. Raises ChronoTaskError with the reason,
    never with a content."""
    known = parsed(facts) if facts else {}
    secrets: dict[str, str] = {}
    url = config.get("url", "")
    parts = url_parts(url)
    end = len(url) - len(parts.rest)  # of the host

    def put(found: re.Match[str], of_fact: Callable[[str], str], in_url: bool) -> str:
        reference, at, (kind, name) = found[0], found.start(), found.groups()
        if kind == "cause":
            return of_fact(_fact(known.get(name)))
        if reference not in secrets:
            if len(secrets) == MAX_SECRETS:
                raise ChronoTaskError(f"more than {MAX_SECRETS} different secrets in one configuration")
            secrets[reference] = _secret(kind, name, task_type, environ, settings)
        if not in_url or at == 0 or end - len(parts.host) <= at < end:
            return secrets[reference]
        # At the beginning and in the host of a URL it is taken as it is; elsewhere nothing can change its shape.
        return urllib.parse.quote(secrets[reference], safe="/:," if at >= end else "")

    of_facts: dict[str, Callable[[str], str]] = {"url": partial(urllib.parse.quote, safe="")}
    of_facts["headers"] = partial(_one_line, limit=512)
    if isinstance(config.get("body"), str) and body_kind(config.get("headers")) == FORM:
        of_facts["body"] = urllib.parse.quote_plus
    result = dict(config)
    for field in config.keys() & ({"url", "headers", "params", "body", "auth"} if task_type == "http" else {"env"}):
        of_fact = of_facts.get(field, lambda text: text.replace("\0", ""))
        result[field] = mapped(config[field], partial(_FILLED.sub, partial(put, of_fact=of_fact, in_url=field == "url")))
    for name, value in result.get("headers", {}).items():
        if NOT_IN_HEADERS.search(value):  # a secret must not smuggle in further headers
            raise ChronoTaskError(f"config.headers.{name}: the secret holds a line break or control character")
    return result, [*secrets.values()]


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else compact(value)


def _secret(kind: str, name: str, task_type: str, environ: Mapping[str, str], settings: Settings) -> str:
    if kind == "env":
        if not re.fullmatch(SECRET_PREFIX + "[A-Za-z0-9_]+", name):
            raise ChronoTaskError(f"${{env:{shown(name)}}}: only variables named {SECRET_PREFIX}… may be read")
        if name not in environ:
            raise ChronoTaskError(f"${{env:{name}}}: the service has no such variable")
        if task_type == "http" and re.search("[\udc80-\udcff]", environ[name]):
            raise ChronoTaskError(f"${{env:{name}}}: is not UTF-8 text")
        return environ[name]
    label = f"${{file:{_one_line(name, 200)}}}"
    try:
        path = Path(os.path.realpath(Path(settings.secrets_dir, name), strict=True))
        if not path.is_relative_to(os.path.realpath(settings.secrets_dir)):
            raise ChronoTaskError(f"{label}: only files below {settings.secrets_dir} may be read (CHRONOTASK_SECRETS_DIR)")
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ChronoTaskError(f"{label}: is not a regular file")
            content = file.read(MAX_SECRET_BYTES + 1)
        if len(content) > MAX_SECRET_BYTES:
            raise ChronoTaskError(f"{label}: is larger than {MAX_SECRET_BYTES} bytes")
        # Who can make the service send its token somewhere is an administrator of it, whatever the task may do otherwise.
        own = settings.api_token is not None and settings.api_token.encode() in content
        for own_file in (settings.api_token_file, settings.api_tokens_file):  # of whatever name; others may be in it by now
            own = own or (own_file is not None and own_file.exists() and os.path.samestat(status, own_file.stat()))
        with contextlib.suppress(StartupError):
            words = {token_digest(word) for word in content.decode("utf-8", "replace").split()}
            own = own or any(token.digest in words for token in known_tokens(settings))
        if own:
            raise ChronoTaskError(f"{label}: holds the service's own token, which is not for tasks")
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ChronoTaskError(f"{label}: is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise ChronoTaskError(f"{label}: cannot be read ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    plain = "connection reset" if isinstance(error, ConnectionResetError) else type(error).__name__
    return (getattr(error, "strerror", None) or plain).lower()


def _one_line(text: str, limit: int) -> str:
    """`text` for a message: printable, on one line, of bounded length."""
    clean = printable(text[: 4 * limit])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


# --- What may run -----------------------------------------------------------------------------------------------------


# Variables by which a loader, shell, interpreter or library can be made to run or load other code. glibc's list of
# unsecure variables, and what bash(1), python(1), perlrun(1), node(1), java(1), ruby(1) and git(1) document.
_REFUSED_ENV = re.compile(
    r"LD_.*|DYLD_.*|BASH.*|ENV|IFS|PATH|PS[0-4]|PROMPT_COMMAND|SHELL|SHELLOPTS|CDPATH|GLOBIGNORE|ZDOTDIR|FPATH|PYTHON.*|PERL.*"
    r"|NODE_.*|RUBY.*|GEM_.*|LUA_.*|PHP.*|JAVA_.*|_JAVA_OPTIONS|JDK_JAVA_OPTIONS|CLASSPATH|GCONV_PATH|GETCONF_DIR|LOCPATH|NLSPATH"
    r"|GLIBC_TUNABLES|MALLOC_.*|HOSTALIASES|RESOLV_HOST_CONF|RES_OPTIONS|LOCALDOMAIN|NIS_PATH|TZDIR|OPENSSL_.*|SSLKEYLOGFILE"
    r"|GIT_.*|SSH_ASKPASS|SUDO_ASKPASS|LESSOPEN|LESSCLOSE|PAGER|MANPAGER|EDITOR|VISUAL|BROWSER|TERMINFO.*|TERMCAP|AWKPATH|AWKLIBPATH"
)


def check_allowed(task_type: str, config: dict[str, Any], settings: Settings) -> None:
    """Whether a task may run here. Raises Forbidden (ALLOW_HOST_COMMANDS) or InvalidInput (ALLOWED_BASH_COMMANDS, …_ENV)."""
    if task_type != "bash":
        return
    if not settings.allow_host_commands:
        raise Forbidden("bash tasks are forbidden on this service (CHRONOTASK_ALLOW_HOST_COMMANDS=false)")
    if (launcher := config.get("launcher")) and (unknown := settings.unknown_launcher(launcher)):
        raise InvalidInput(FieldError("config.launcher", unknown))
    if not settings.allowed_bash_commands:
        if config.get("args") and (end := _end_of_source(config["command"].rstrip())):
            raise InvalidInput(FieldError("config.args", f"would be lost or changed: the command ends with {end}"))
        return
    bash_words(config, settings)
    permitted = [name for name in settings.allowed_bash_env if not _REFUSED_ENV.fullmatch(name)]
    if refused := [name for name in config.get("env", {}) if name not in permitted]:
        names = ", ".join(permitted) or "nothing"
        only = f"may not be set: only {names} (CHRONOTASK_ALLOWED_BASH_ENV, without what a loader or shell obeys)"
        raise InvalidInput(*(FieldError(f"config.env.{name}", only) for name in refused))


@functools.lru_cache(64)
def _end_of_source(source: str) -> str | None:
    """What bash is in at the end of `source`, if further words would be no arguments there."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if "#" in source.rpartition("\n")[2] or "<<" in source:
            # A parenthesis that closes nothing is an error, unless it is no part of the program any more. -n executes nothing.
            words = [shutil.which("bash") or "bash", "-O", "extglob", "-nc", source + " )"]
            done = subprocess.run(words, env={"LC_ALL": "C"}, stdin=subprocess.DEVNULL, capture_output=True, timeout=2)
            if done.returncode == 0:
                return "a here-document" if b"here-document" in done.stderr else "a comment"
    return "a backslash" if (len(source) - len(source.rstrip("\\"))) % 2 else None


def bash_words(config: dict[str, Any], settings: Settings) -> list[str]:
    """The words that are executed without a shell, as ALLOWED_BASH_COMMANDS wants it. Raises InvalidInput."""
    command, args, allowed = config["command"], config.get("args", []), settings.allowed_bash_commands
    for place, text in [("config.command", command), *((f"config.args[{i}]", text) for i, text in enumerate(args))]:
        if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text):
            raise InvalidInput(FieldError(place, "must not hold control characters (CHRONOTASK_ALLOWED_BASH_COMMANDS is set)"))
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InvalidInput(FieldError("config.command", f"cannot be split into words: {str(error).lower()}")) from None
    if not words or words[0] not in allowed:
        hint = f"must be one of {', '.join(allowed)} (CHRONOTASK_ALLOWED_BASH_COMMANDS)"
        raise InvalidInput(FieldError("config.command", f"the command {hint}, not {shown(words[0] if words else '')}"))
    return [*words, *args]


# Those of clouds that are not link-local anyway: Amazon, Google, Oracle, Akamai, Scaleway; Alibaba, Azure, Oracle.
_METADATA = [
    *map(ipaddress.ip_network, "fd00:ec2::/32 fd20:ce::254 fd00:c1::a9fe:a9fe fd00:a9fe:a9fe::1 fd00:42::42".split()),
    *map(ipaddress.ip_network, "100.100.100.200 168.63.129.16 192.0.0.192".split()),
]
_IPV6_INTERNET, _NAT64, _NAT64_LOCAL = map(ipaddress.IPv6Network, ("2000::/3", "64:ff9b::/96", "64:ff9b:1::/48"))


def refused_address(address: str, settings: Settings) -> str | None:
    """Why an HTTP task may not talk to this IP address, or None. IPv4 inside IPv6 is judged as both."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip  # dialled as IPv4
    seen: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [ip]
    public = ip.is_global and not ip.is_multicast
    if isinstance(ip, ipaddress.IPv6Address):
        seen += [inner for inner in (ip.sixtofour, *(ip.teredo or ())) if inner is not None]
        if ip in _NAT64 or ip in _NAT64_LOCAL or 1 < int(ip) < 1 << 32:  # the last: IPv4-compatible
            # The local one may be cut into prefixes of 48, 56, 64 and 96 bits, around eight zeros (RFC 6052, 2.2).
            packed = ip.packed[:8] + ip.packed[9:]
            seen += [ipaddress.IPv4Address(packed[at : at + 4]) for at in ((6, 7, 8, 11) if ip in _NAT64_LOCAL else (11,))]
        # Only what is assigned to the internet, and NAT64's well-known prefix (whose IPv4 address is judged, too); not 6to4,
        # which IANA lists as not global and older Pythons do not know to be.
        public = ip in _NAT64 or (public and ip in _IPV6_INTERNET and ip.sixtofour is None)
    if all(any(one in network for network in settings.allowed_networks) for one in seen):
        return None
    if any(one.is_link_local or one in network for one in seen for network in _METADATA):
        return "link-local and cloud metadata addresses are refused (CHRONOTASK_ALLOWED_NETWORKS)"
    if settings.block_private_networks and not (public and all(one.is_global and not one.is_multicast for one in seen[1:])):
        return "private addresses are refused (CHRONOTASK_BLOCK_PRIVATE_NETWORKS)"
    return None


# --- Ends -------------------------------------------------------------------------------------------------------------


class _Passing(ChronoTaskError):
    """Why there is no whole answer, where trying again may help."""


def _output(live: LiveOutput) -> dict[str, Any] | None:
    """`output_data`, once nothing more comes: a body that is JSON is parsed. None where there was none at all."""
    live.close()
    if not live.facts:
        return None
    output = live.snapshot()
    is_json = re.match(r"(?i)(application|text)/([a-z0-9.+-]+\+)?json", live.content_type)
    if is_json and output["body"] and not output["truncated"]:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(output["body"].removeprefix("\ufeff"))
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # what cannot be written again stays text
            if sum(1 for _ in walk(value)) <= MAX_NESTING + 1:
                output["body"] = live.masked(value)  # once more: they may have been escaped twice
    return output


def _stopped(live: LiveOutput, timeout: float) -> Outcome:
    """How an attempt ended that was stopped, or ran out of time."""
    output = _output(live)
    if live.reason:
        message = "the service was stopped" if live.reason == "interrupted" else live.reason
        return Outcome(live.reason, message, output, retryable=live.reason == "interrupted" and not live.acted)
    message = "no answer within" if output is None else "was still running after"
    if output is not None and "status_code" in output:
        message = f"answered {output['status_code']}, but not completely within"
    return Outcome("timed_out", f"{message} {timeout:g} s", output, retryable=not live.acted)


def _failure(error: Exception, live: LiveOutput) -> Outcome:
    if isinstance(error, ChronoTaskError):
        return Outcome("failed", live.masked(error.detail), _output(live), isinstance(error, _Passing) and not live.acted)
    # Not the error's text: it may hold a secret.
    logger.error("%s in an executor\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    passing = isinstance(error, (OSError, RuntimeError, MemoryError)) and not live.acted  # no thread, file or memory is left
    return Outcome("failed", f"unexpected {type(error).__name__} in ChronoTask: its log has the details", _output(live), passing)


# --- bash -------------------------------------------------------------------------------------------------------------


class Environ(dict[str, str]):
    """The service's environment, what else commands inherit of it, and the pipes that they have left open."""

    umask = -1  # as the service's own
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    _left: Sequence[_Pipe] = ()

    def leave(self, pipes: Sequence[_Pipe]) -> None:
        """Goes on reading the pipes of a command that is over, which something in the background may hold."""
        for pipe in pipes:
            pipe.live = None
        self._left = [pipe for pipe in [*self._left, *pipes] if not pipe.over.done()]
        for pipe in self._left[:-MAX_LEFT_PIPES]:
            pipe.transport.close()
            logger.warning("%d pipes are open in the background: what writes to the oldest will be killed", len(self._left))


async def run_bash(config: dict[str, Any], run: Run, settings: Settings, environ: Environ, live: LiveOutput) -> Outcome:
    """Run a bash task. What a process leaves in the background when it ends by itself goes on, as with cron; at a timeout or stop
    everything that carries the attempt's CHRONOTASK_RUN_ID is killed."""
    timeout, user = config.get("timeout", settings.bash_timeout), settings.bash_user
    try:
        check_allowed("bash", config, settings)
        resolved, secrets = resolve_secrets("bash", config, environ, settings, run.cause)
        words, env, folder, report = _command(resolved, run, settings, environ)
        live.begin(("stdout", "stderr"), masker := SecretMasker(secrets), report)
        pipes: list[_Pipe] = []
        writers: list[int] = []
        try:
            for stream in ("stdout", "stderr"):
                reader, writer = os.pipe()
                writers.append(writer)
                if masker.forms and hasattr(fcntl, "F_SETPIPE_SZ"):  # 64 KiB of escapes would hold up the loop for 40 ms
                    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
                if user is not None:  # who opens it by its name, as in `echo >/dev/stderr`
                    os.fchmod(writer, 0o622)
                connect = asyncio.get_running_loop().connect_read_pipe(partial(_Pipe, live, stream), open(reader, "rb", 0))
                transport, pipe = await connect
                pipe.transport = transport
                pipes.append(pipe)
            if live.reason:
                return _stopped(live, timeout)
            process = _spawn(words, env, {"cwd": folder} if user is None else as_user(user), environ, *writers)
        except OSError as error:
            inside = folder is not None and error.filename == folder
            what = f"working_dir {shown(folder)}" if inside else f"{shown(words[0])} could not be started"
            # With these, starting it again would end the same way; what else there is (no memory, too many files) may pass.
            final = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENOEXEC, errno.E2BIG)
            raise (ChronoTaskError if final else _Passing)(f"{what}: {_reason(error)}") from None
        finally:
            for writer in writers:  # where nothing was started, that ends the pipes
                os.close(writer)
        try:
            stopped = await _watch(process, timeout, run, pipes, live, user)
        except BaseException:
            _signal_group(process.pid, signal.SIGKILL)
            kill_leftovers({run.run_id}, user)
            raise
        finally:
            environ.leave(pipes)
        return _stopped(live, timeout) if stopped else _bash_outcome(config["command"], folder, live, report)
    except Exception as error:
        return _failure(error, live)


# What runs on the far side of a launcher: this, fixed, with words that it executes and never parses. `exec` in a subshell: a
# word is a program, whatever bash has built in of that name.
_FAR_SIDE = (
    r'word=$1 dir=$2; shift 2; case $dir in "~"*) dir=$HOME${dir#"~"};; esac; '
    r'if [ -z "$dir" ] || cd -- "$dir"; then (exec -- "$@"); else (exit 126); fi; '
    r'code=$?; printf "\n%s %d\n" "$word" $code; exit $code'
)


def _command(
    config: dict[str, Any], run: Run, settings: Settings, environ: Environ
) -> tuple[list[str], dict[str, str], str | None, Report | None]:
    """The words to execute, their environment, the folder to do it in, and what a launcher owes. Raises ChronoTaskError."""
    folder, user, path = config.get("working_dir"), settings.bash_user, environ.get("PATH", os.defpath)
    if settings.allowed_bash_commands:
        words = bash_words(config, settings)
    else:
        source, args = config["command"], config.get("args", ())  # literal words, on its last line
        words = ["bash", "-c", " ".join([source.rstrip(), *map(shlex.quote, args)]) if args else source]
    values = {name: getattr(run, name.lower()) for name in TASK_VARIABLES}
    if run.schedule_id is None or run.scheduled_for is None:
        del values["SCHEDULE_ID"], values["SCHEDULED_FOR"]
    else:
        values["SCHEDULED_FOR"] = format_instant(run.scheduled_for)
    for name, value in (parsed(run.cause) if run.cause else {}).items():
        values[f"CAUSE_{name.upper()}"] = _fact(value).replace("\0", "")
    of_run = {ENV_PREFIX + name: str(value) for name, value in values.items()}
    env = config.get("env", {}) | of_run
    inherited = {name: value for name, value in environ.items() if not name.startswith(ENV_PREFIX)}
    if user is not None:
        inherited |= {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name, "SHELL": user.pw_shell or "/bin/sh"}
    report = None
    if launcher := settings.launchers.get(config.get("launcher") or settings.launcher_default or ""):
        report = Report()
        far = ["bash", "-c", _FAR_SIDE, "chronotask", report.word, folder or "", *words]
        variables = [f"{name}={value}" for name, value in env.items()]
        job = f"chronotask-{run.run_id}"
        words = [word for part in launcher for word in (variables if part == "{env}" else [part.replace("{name}", job)])] + far
        env, folder = of_run if "{env}" in launcher else env, None
    elif folder is not None and folder.partition("/")[0] == "~":
        folder = (inherited.get("HOME") or os.path.expanduser("~")) + folder[1:]
    words[0] = _program(words[0], path)
    if folder is not None and user is not None:  # Popen enters it before it becomes that user, who might not be let in
        words = [_program("sh", path), "-c", 'cd -- "$0" || exit 126; exec "$@"', folder, *words]
    return words, inherited | env, folder, report


def _program(name: str, path: str) -> str:
    """The absolute file of a command, on the service's own PATH: neither a task's env nor its working_dir can change it."""
    if "/" in name:
        return os.path.abspath(name)
    if file := shutil.which(name, path=os.pathsep.join(filter(os.path.isabs, path.split(os.pathsep)))):
        return file
    raise ChronoTaskError(f"the command {shown(name)} was not found on the service's PATH")


class _Pipe(asyncio.Protocol):
    """The end of a command's stdout or stderr that is read here, also when the attempt is over before: a process that writes to a
    pipe that nobody reads is killed by SIGPIPE. What comes then goes nowhere, and so slowly that it holds up nothing."""

    transport: asyncio.ReadTransport

    def __init__(self, live: LiveOutput, stream: str) -> None:
        self.live: LiveOutput | None = live
        self._stream = stream
        self.over = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        if self.live is not None:
            self.live.feed(self._stream, data)
        else:
            self.transport.pause_reading()
            self.over.get_loop().call_later(0.05, self.transport.resume_reading)

    def connection_lost(self, error: Exception | None) -> None:
        self.over.set_result(None)


def _spawn(
    words: list[str], env: dict[str, str], options: dict[str, Any], environ: Environ, stdout: int, stderr: int
) -> subprocess.Popen[bytes]:
    """Starts a process under the umask and the limit of open files that the service itself was started with."""
    loop = asyncio.get_running_loop()
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL:
        loop.add_signal_handler(signal.SIGCHLD, reap)
    options = options | {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
    options |= {"env": env, "start_new_session": True, "umask": environ.umask}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (environ.open_files, hard))
    if stderr + 64 > environ.open_files:  # numbers that high are in use here, and others could not be opened meanwhile
        process = subprocess.Popen(words, preexec_fn=lower, **options)  # three times as slow
    else:
        lower()  # a limit is inherited as it is at the fork: set in the child later, it might come too late
        try:
            process = subprocess.Popen(words, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    _children[process.pid] = process, loop.create_future()
    return process


# That were started here and are not waited for yet, by their ids. The future is done once the process itself has ended, whoever
# still holds its pipes.
_children: dict[int, tuple[subprocess.Popen[bytes], asyncio.Future[None]]] = {}


def reap() -> None:
    """On SIGCHLD, which may stand for several: waits for the commands that have ended, and as process 1 for what tasks have left
    behind. What this process has started for itself is in its own session, and waited for by another thread."""
    for process, exited in [*_children.values()]:
        if process.poll() is not None:
            del _children[process.pid]
            exited.set_result(None)
    with contextlib.suppress(ChildProcessError):
        while os.getpid() == 1 and (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            if ended.si_pid in _children or os.getsid(ended.si_pid) == os.getsid(0):
                break
            os.waitpid(ended.si_pid, 0)


_sweeper = concurrent.futures.ThreadPoolExecutor(1, "chronotask-sweep")
_to_sweep: set[str] = set()  # run ids


async def _watch(
    process: subprocess.Popen[bytes], limit: float, run: Run, pipes: list[_Pipe], live: LiveOutput, user: pwd.struct_passwd | None
) -> bool:
    """Until the process is over and its output read; whether it had to be ended."""
    live.facts = {"exit_code": None, "signal": None}
    exited, stopped = _children[process.pid][1], False
    try:
        async with live.timeout(limit):
            await asyncio.wait([exited])
    except TimeoutError:
        stopped = True
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERM_SECONDS[live.reason or "timed_out"]):
                await asyncio.wait([exited])
                while _signal_group(process.pid, 0):  # no look into /proc: for a hundred attempts it would take all the time
                    await asyncio.sleep(0.05)
        _signal_group(process.pid, signal.SIGKILL)
        await asyncio.wait([exited], timeout=0.2)  # one that hangs in the kernel (a dead NFS server) is not waited for
        # One look through /proc for all that wait: a hundred attempts may end at once. The only thread's calls never overlap.
        _to_sweep.add(run.run_id)
        await asyncio.get_running_loop().run_in_executor(
            _sweeper, lambda: kill_leftovers({_to_sweep.pop() for _ in range(len(_to_sweep))}, user)
        )
    if ends := [pipe.over for pipe in pipes if not pipe.over.done()]:
        await asyncio.wait(ends, timeout=0.2 if stopped else DRAIN_SECONDS)
    code = process.returncode
    # A real-time signal has no name.
    killer = None if code is None or code >= 0 else next((one.name for one in signal.Signals if one == -code), f"SIG{-code}")
    live.facts = {"exit_code": None if killer else code, "signal": killer}
    return stopped


def _signal_group(group: int, number: int) -> bool:
    """Send a signal; whether the group still has a member that may be signalled."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False


def kill_leftovers(run_ids: set[str], user: pwd.struct_passwd | None = None, looks: int = 0) -> int:
    """Kill every process of this user (with BASH_USER: of that one) whose environment holds one of these CHRONOTASK_RUN_IDs;
    the number that was killed. With `looks`, twenty a second, SIGTERM comes first: a launcher takes its job back. Finds what left
    its group by `setsid`, also after a crash of the service. Looks again until nothing is left, as they may fork meanwhile. Reads
    /proc: does nothing where there is none."""
    wanted = {f"{ENV_PREFIX}RUN_ID={run_id}".encode() for run_id in run_ids}
    killed: set[int] = set()
    libc = ctypes.CDLL(None)
    try:
        if user is not None:  # root may look into that user's processes only with CAP_SYS_PTRACE: setfsuid(2), of this thread
            libc.setfsgid(user.pw_gid)
            libc.setfsuid(user.pw_uid)
        for look in range(looks + 10 if wanted else 0):
            found = [pid for pid, _ in _processes_with(wanted, user)]
            for pid in found if look >= looks else set(found) - killed:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL if look >= looks else signal.SIGTERM)
            killed.update(found)
            if not found:
                break
            if look < looks:
                threading.Event().wait(0.05)
    finally:
        if user is not None:
            libc.setfsuid(os.geteuid())
            libc.setfsgid(os.getegid())
    return len(killed)


def _processes_with(variables: Collection[bytes], user: pwd.struct_passwd | None) -> Iterator[tuple[int, bytes]]:
    """The other processes of this user, or of the service's own, in whose environment one of these is (a zombie's is empty)."""
    uid = os.geteuid() if user is None else user.pw_uid
    with contextlib.suppress(OSError), os.scandir("/proc") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and int(entry.name) != os.getpid() and entry.stat().st_uid == uid:
                    with open(f"{entry.path}/environ", "rb") as file:
                        yield from ((int(entry.name), line) for line in file.read().split(b"\0") if line in variables)


def as_user(user: pwd.struct_passwd) -> dict[str, Any]:
    """What Popen needs to run a command as that user."""
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": os.getgrouplist(user.pw_name, user.pw_gid)}


def check_bash_user(user: pwd.struct_passwd) -> None:
    """Tries to become BASH_USER and to signal what runs as it. Raises StartupError (status 2)."""
    try:
        ctypes.CDLL(None).prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT_CLEAR_ALL: commands would inherit the right to become anybody
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, **as_user(user)) as probe:
            probe.kill()
    except (OSError, AttributeError) as error:
        why = f"({error}): start ChronoTask as root, or with CAP_SETUID, CAP_SETGID and CAP_KILL"
        raise StartupError(f"{ENV_PREFIX}BASH_USER={user.pw_name}: commands cannot run as that user {why}", 2) from None


def exposed_secrets(environ: Mapping[str, str]) -> list[str]:
    """Warns of a process of this user, such as an init, that shows a secret of `environ` to every task."""
    names = [name for name in environ if name == ENV_PREFIX + "API_TOKEN" or name.startswith(SECRET_PREFIX)]
    secrets = {os.fsencode(f"{name}={environ[name]}"): name for name in names if environ[name]}
    for pid, variable in _processes_with(secrets, None) if secrets else ():
        advice = "give it in a file (CHRONOTASK_API_TOKEN_FILE, ${file:…}), or start without that process"
        return [f"process {pid} shows {secrets[variable]} in its environment to every task of this user: {advice}"]
    return []


def _bash_outcome(source: str, folder: str | None, live: LiveOutput, report: Report | None) -> Outcome:
    output = _output(live) or {}
    if report is not None and report.status:  # the launcher's own may be another
        output |= {"exit_code": report.status, "signal": None}
    code, killer, stderr = output["exit_code"], output["signal"], output["stderr"][-4096:]
    lost = report is not None and report.status is None
    if code == 0 and not lost:
        return Outcome("succeeded", output=output)
    message = f"was killed by {killer}" if killer else f"exit status {code}"
    if lost:
        message = f"the launcher {message if killer else f'ended with {code}'}, but the command never reported its end"
    # Masked once more: a colour within a secret is taken out.
    lines = (_one_line(live.masked(printable(line)), 200) for line in reversed(stderr.splitlines()))
    message = ": ".join([message, *itertools.islice(filter(None, lines), 1)])
    if code == 127 and report is None:  # often the command lies in the working directory, which no PATH holds
        said, found, _ = stderr.rpartition(": command not found")
        name = said.rpartition(": ")[2] if found else next(iter(source.split()), "")
        if name and "/" not in name and os.path.isfile(os.path.join(folder or "", name)):
            message += f"; the file is in the working directory: use {_one_line(shlex.quote(f'./{name}'), 100)}"
    return Outcome("failed", message, output, retryable=lost or code not in (126, 127))


# --- HTTP -------------------------------------------------------------------------------------------------------------


# What a redirect to another server may carry along; any other header may be a credential, whatever its name.
_HARMLESS_HEADERS = frozenset(
    "accept accept-encoding accept-language cache-control content-encoding content-language content-type idempotency-key"
    " pragma user-agent x-chronotask-attempt x-chronotask-execution-id x-chronotask-scheduled-for".split()
)
_NOT_REPEATABLE = frozenset({"POST", "PATCH"})  # RFC 9110, 9.2.2
_BROKE_OFF = "the answer broke off before its end, or could not be decoded"
_ASKED: contextvars.ContextVar[_OneAnswer] = contextvars.ContextVar("asked")  # what an attempt waits for


class HttpClient:
    """The connections of all http tasks, and their resolver of names. `now` (microseconds) serves a Retry-After date of a server
    that sends no Date."""

    def __init__(self, settings: Settings, now: Callable[[], int]) -> None:
        self.settings, self.now = settings, now
        self._lookups = asyncio.Semaphore(256)  # one of a dead server holds a thread for half a minute
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    def session(self, keep: bool) -> aiohttp.ClientSession:
        """The one whose connections are used again, or that has a new one for each request."""
        if keep not in self._sessions:
            connections: dict[str, Any] = {"keepalive_timeout": KEEP_SECONDS} if keep else {"force_close": True}
            self._sessions[keep] = aiohttp.ClientSession(
                # MAX_CONCURRENT_RUNS is the limit; a second one gives false timeouts.
                connector=aiohttp.TCPConnector(limit=0, socket_factory=self._socket, resolver=cast(Any, self), **connections),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),  # the attempt's own is above it
                auto_decompress=False,
                max_line_size=MAX_HEAD_LINE,
                max_field_size=MAX_HEAD_LINE,
                max_headers=1000,  # each is looked at, and shown in every list
                middlewares=(_sent_once,),
            )
        return self._sessions[keep]

    def _socket(self, info: Any) -> socket.socket:
        # The one place that sees every address that is really dialled: a resolver is not asked for IP literals.
        family, kind, protocol, _, address = info
        if refusal := refused_address(address[0], self.settings):
            raise OSError(REFUSED_ERRNO, refusal)
        made = _Socket(family, kind, protocol)
        made.answer = _ASKED.get()
        return made

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[dict[str, Any]]:
        """In daemon threads, so that dead DNS servers hold up neither the loop's executor nor the exit."""
        try:
            async with self._lookups:
                found = await in_daemon(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
        except UnicodeError:  # it cannot be asked for, as with an empty label
            raise OSError(None, "invalid name") from None
        same = {"hostname": host, "port": port, "flags": 0}
        return [same | {"host": address[0], "family": kind, "proto": protocol} for kind, _, protocol, _, address in found]

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()


async def _sent_once(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """A session would send a GET again, as the same attempt, when a connection breaks: unless it is told another error. This one
    says what a person can do about it, never in aiohttp's own text: it has URLs."""
    try:
        return await handler(request)
    except aiohttp.ClientConnectorCertificateError as error:
        reason = _one_line(getattr(error.certificate_error, "verify_message", "") or "not valid", 200)
        failure = ChronoTaskError(f"the TLS certificate of {error.host} is refused: {reason} (verify_tls: false accepts any)")
    except aiohttp.ClientConnectorDNSError as error:
        failure = _Passing(f"the name {_one_line(error.host, 255)} could not be resolved: {error.os_error.strerror}")
    except aiohttp.ClientConnectorError as error:
        place, cause = f"[{error.host}]:{error.port}" if ":" in error.host else f"{error.host}:{error.port}", error.os_error
        tls, code = isinstance(cause, ssl.SSLError), cause.errno or 0
        # asyncio's own text of a refused connection names the address and not the reason.
        text = os.strerror(code).lower() if code in errno.errorcode and not tls else cause.strerror or str(cause)[:200]
        what = f"TLS with {place} failed" if tls else f"could not connect to {place}"
        failure = _Passing(f"{what}: {text or 'connection reset'}")
        if code == REFUSED_ERRNO:
            failure = ChronoTaskError(f"{place} may not be called: {text}")
    except aiohttp.ServerDisconnectedError:
        failure = _Passing("the server closed the connection without an answer")
    except aiohttp.InvalidURL as error:  # an address written as one number, say
        failure = ChronoTaskError(f"the host {_one_line(str(error.url), 255)} is neither a name nor an IP address")
    except aiohttp.ClientResponseError as error:
        reason = _one_line(_ASKED.get().live.masked(error.message), 200)
        failure = _Passing(f"the server's answer is not valid HTTP: {reason}")
    except (aiohttp.ClientError, OSError) as error:
        failure = _Passing(f"the connection failed: {_reason(error)}")
    raise failure


@functools.cache
def _tls_context(verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    context.sslobject_class = _TlsObject
    return context


def _answer(to_head: bool, came: bytearray, passed: bytearray) -> Iterator[None]:
    """Moves what belongs to the answer to a request, as its head declares it (RFC 9112, 6), from `came` to `passed`, until it is
    complete. aiohttp's parser refuses framing that curl takes: it gets it in its own way, declared once, also where servers say
    the same again, or a length beside chunks."""
    status = b"100"
    while status[:1] == b"1" and status != b"101":  # the real one is still to come
        head = yield from _taken(came, _HEAD_END.search)
        found = _FRAMING.findall(head.lower())  # a pattern that ignores case would take ten times as long
        coding = b", ".join(value for name, value in found if name == b"transfer-encoding" and value != b"identity")
        lengths = [one.strip() for name, value in found if name == b"content-length" for one in value.split(b",")]
        if (len(found) > 1 or len(lengths) > 1) and (coding or len(set(lengths)) == 1):
            line = b"Transfer-Encoding: " + coding if coding else b"Content-Length: " + lengths[0]
            head = re.sub(rb"(?i)\r?" + _FRAMING.pattern, b"", head)
            head = re.sub(rb"\r?\n", b"\r\n%b\r\n" % line, head, count=1)
        passed += head
        status = head.lstrip()[9:12]  # of what is no HTTP anything: the parser has the last word
    if to_head or status in (b"204", b"304"):
        return
    if not coding.endswith(b"chunked"):  # without a length: until the connection ends
        yield from _moved(came, passed, int(lengths[0]) if lengths and re.fullmatch(b"[0-9]{1,18}", lengths[0]) else math.inf)
        return
    while size := _CHUNK_SIZE.match((yield from _taken(came, _LINE_END.search))):
        passed += size[1] + b"\r\n"
        if int(size[1], 16) == 0:
            yield from _taken(came, _TRAILERS_END.search)
            passed += b"\r\n"
            return
        yield from _moved(came, passed, int(size[1], 16))
        if (yield from _taken(came, _LINE_END.search)).strip():
            break
        passed += b"\r\n"
    raise ConnectionError(None, "the answer has lines that are no chunks")


def _taken(came: bytearray, find_end: Callable[..., re.Match[bytes] | None]) -> Generator[None, None, bytes]:
    seen = 0
    while not (found := find_end(came, max(0, seen - 2))):
        seen = len(came)
        if seen > MAX_HEAD_BYTES:
            raise ConnectionError(None, f"the head of the answer is larger than {MAX_HEAD_BYTES} bytes")
        yield
    taken = bytes(came[: found.end()])
    del came[: found.end()]
    return taken


def _moved(came: bytearray, passed: bytearray, left: float) -> Generator[None, None, None]:
    while left > len(came):
        left -= len(came)
        passed += came
        came.clear()
        yield
    passed += came[: int(left)]
    del came[: int(left)]


_HEAD_END, _LINE_END, _TRAILERS_END = re.compile(rb"\n\r?\n"), re.compile(rb"\n"), re.compile(rb"(?:\A|\n)\r?\n")
_CHUNK_SIZE = re.compile(rb"0*([0-9A-Fa-f]{1,15})(?=[;\s])")
_FRAMING = re.compile(rb"\n(content-length|transfer-encoding):[ \t]*([^\r\n]*?)[ \t]*(?=\r?\n)")


class _OneAnswer:
    """What comes in for one request: its answer, and nothing else. Servers send bodies with 204, a line or a whole page behind an
    answer: aiohttp's parser, which curl's is not like, would give up the answer for it."""

    def __init__(self, method: str, live: LiveOutput) -> None:
        self.unsent = False  # nothing of the request was sent: the connection that was kept had ended
        self.live = live
        self.came, self._passed = bytearray(), bytearray()  # what is behind the answer stays in the first: no more is read then
        self._method = method
        self._moves = _answer(method == "HEAD", self.came, self._passed)

    def read(self, receive: Callable[[], bytes]) -> bytes:
        """What of it has come; nothing at the end of the connection. `receive` raises an error while there is nothing yet."""
        while data := receive():
            self.live.acted = self.live.acted or self._method in _NOT_REPEATABLE
            self.came += data
            complete = next(self._moves, self) is self
            data = bytes(self._passed)
            self._passed.clear()
            if data or (complete and self.came):
                break
        return data


class _Socket(socket.socket):
    answer: _OneAnswer  # to what was sent last

    def send(self, data: Any, flags: int = 0, /) -> int:
        self._asks()
        return super().send(data, flags)

    def sendmsg(self, *arguments: Any) -> int:
        self._asks()
        return super().sendmsg(*arguments)

    def _asks(self) -> None:
        """Raises OSError when a request would begin on a connection that is not to be used again."""
        asked = _ASKED.get(self.answer)
        if asked is not self.answer:
            poll = select.poll()
            poll.register(self, select.POLLIN)
            # The server may have closed it, or begun to say something else, and the loop not have heard of it yet.
            asked.unsent = bool(self.answer.came or poll.poll(0))
            if asked.unsent:
                raise ConnectionResetError
            self.answer = asked

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        return self.answer.read(partial(super().recv, min(size, READ_BYTES), flags))

    def recv_into(self, buffer: Any, *more: Any) -> int:  # below TLS
        return super().recv_into(memoryview(buffer)[:READ_BYTES], *more)


class _TlsObject(ssl.SSLObject):
    """Of a connection for one request: one that is kept would need to know of each next one."""

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        return _ASKED.get().read(partial(super().read, len, buffer))  # asyncio gives no buffer for a protocol that has none


async def run_http(config: dict[str, Any], run: Run, client: HttpClient, environ: Mapping[str, str], live: LiveOutput) -> Outcome:
    """Make the request of an http task."""
    timeout = config.get("timeout", client.settings.http_timeout)
    try:
        request, masker = _http_request(run, *resolve_secrets("http", config, environ, client.settings, run.cause))
        live.begin(("body",), masker)
        if live.reason:
            return _stopped(live, timeout)
        async with live.timeout(timeout):
            request, response = await _exchange(client, config, request, live)
        status, output = response.status, _output(live)
        expected = config.get("expected_status") or ["200-299"]
        if any(status in status_range(entry) for entry in expected):
            return Outcome("succeeded", output=output)
        message = f"answered {status} {_one_line(live.masked(response.reason or ''), 80)}".rstrip()
        message += f"; expected {', '.join(map(str, expected))}"
        if status in (401, 403) and request.left_behind:
            message += live.masked(f" (credentials for {request.left_behind} were not sent on to {request.url.origin()})")
        wait = retry_after(response.headers, client.now) if status in (429, 503) else None
        return Outcome("failed", message, output, retryable=status in (408, 425, 429) or 500 <= status < 600, retry_after=wait)
    except TimeoutError:
        return _stopped(live, timeout)
    except Exception as error:
        return _failure(error, live)


class _Request(NamedTuple):
    method: str
    url: yarl.URL
    headers: CIMultiDict[str]
    body: bytes | None
    left_behind: str | None = None  # the origin whose headers were taken off at a redirect


def _http_request(run: Run, config: dict[str, Any], secrets: list[str]) -> tuple[_Request, SecretMasker]:
    """What a configuration asks for whose references are filled in, and what a server must not put into the history by echoing
    it, references or not. Raises ChronoTaskError."""
    query = [
        (name, str(item).lower() if isinstance(item, bool) else str(item))
        for name, value in config.get("params", {}).items()
        for item in (value if isinstance(value, list) else [value])
    ]
    try:
        url, login = _read_url(config["url"])
    except ValueError:
        raise ChronoTaskError("config.url: is not a valid http or https URL") from None
    if auth := config.get("auth"):
        login = f"{auth['username']}:{auth['password']}"
    headers = CIMultiDict({"Accept-Encoding": "gzip, deflate", "User-Agent": f"ChronoTask/{__version__}"})
    headers["Idempotency-Key"], headers["X-ChronoTask-Execution-Id"] = run.uuid, str(run.execution_id)
    headers["X-ChronoTask-Attempt"] = str(run.attempt)
    if run.scheduled_for is not None:
        headers["X-ChronoTask-Scheduled-For"] = format_instant(run.scheduled_for)
    own, body = config.get("headers", {}), config.get("body")
    credentials = [value for name, value in own.items() if name.lower() in MASKED_HEADERS]
    credentials += [value.partition(" ")[2] for value in credentials] + [login.removesuffix(":"), login.partition(":")[2]]
    credentials += [parts.rest for parts in map(url_parts, secrets) if parts.scheme]  # a page for 404 shows the path alone
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    if body is not None:
        headers["Content-Type"] = "text/plain; charset=utf-8" if isinstance(body, str) else "application/json"
        if isinstance(body, dict) and body_kind(own) == FORM:
            fields = [(name, item) for name, value in body.items() for item in (value if isinstance(value, list) else [value])]
            body = urllib.parse.urlencode([(name, item if isinstance(item, str) else compact(item)) for name, item in fields])
        body = (body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)).encode()
    headers.update(own)
    return _Request(config.get("method", "GET"), url.extend_query(query), headers, body), SecretMasker([*secrets, *credentials])


def _read_url(text: str) -> tuple[yarl.URL, str]:
    """The URL as it is written, but for `user:password`, and these. Raises ValueError."""
    parts = url_parts(text)
    origin = yarl.URL(f"{parts.scheme}://{parts.host}" if parts.scheme else "")
    if not origin.host or NOT_IN_URLS.search(parts.host):
        raise ValueError
    login = parts.userinfo if ":" in parts.userinfo or not parts.userinfo else parts.userinfo + ":"
    return yarl.URL(f"{origin.origin()}{_as_written(parts.rest)}", encoded=True), urllib.parse.unquote(login)


def _as_written(text: str) -> str:
    """Path and query of a URL, in which only what cannot be sent is encoded; a server's bytes come as surrogates."""
    plain = text.partition("#")[0].encode("utf-8", "surrogateescape")
    return re.sub(rb"[^\x21-\x7e]", lambda found: b"%%%02X" % found[0][0], plain).decode()


async def _exchange(
    client: HttpClient, config: dict[str, Any], request: _Request, live: LiveOutput
) -> tuple[_Request, aiohttp.ClientResponse]:
    """Send the request, follow redirects, read the body of the last answer into `live`; the last request and answer. A redirect
    gets a connection of its own, as one may be closed behind any answer, and what came before is not to be done twice. Cookies
    are kept for the attempt, as a browser keeps them."""
    # A server may just be closing a connection that was kept.
    keep = request.method not in _NOT_REPEATABLE and request.url.scheme == "http"
    keep = keep and "close" not in request.headers.get("Connection", "").lower()
    jar = aiohttp.CookieJar(unsafe=True)  # also of IP addresses
    for _ in range(MAX_REDIRECTS + 1):
        headers = request.headers.copy()
        if cookies := jar.filter_cookies(request.url):
            own = [pair for pair in re.split("; *", headers.get("Cookie", "")) if pair and pair.partition("=")[0] not in cookies]
            known = (one for one in jar if one.key in cookies and one.value == cookies[one.key].value)  # as it was written
            headers["Cookie"] = "; ".join([*{one.key: f"{one.key}={one.coded_value}" for one in known}.values(), *own])
        _ASKED.set(answer := _OneAnswer(request.method, live))
        try:
            response = await client.session(keep).request(
                request.method,
                request.url,
                headers=headers,
                data=request.body,
                skip_auto_headers=None if request.method == "GET" else ["Content-Type"],  # which a body without bytes has none of
                ssl=_tls_context(config.get("verify_tls", True)) if request.url.scheme == "https" else True,
                allow_redirects=False,
            )
        except _Passing:
            if not answer.unsent:
                raise
            continue
        finally:
            keep = False
        with contextlib.closing(response):  # unless the connection was given back at its end, with the request all sent
            following = _redirected(config, request, response, live)
            if following is None:
                await _read_body(response, live)
                return request, response
        jar.update_cookies(response.cookies, response.url)
        request = following
        live.acted = live.acted and request.method not in _NOT_REPEATABLE  # else it is asked to be sent again
    raise ChronoTaskError(f"more than {MAX_REDIRECTS} redirects, the last one to {request.url.host}")


def _redirected(config: dict[str, Any], request: _Request, response: aiohttp.ClientResponse, live: LiveOutput) -> _Request | None:
    """The request that follows, if one does: its method is what browsers make it (RFC 9110, 15.4), credentials stay with their
    own server. Raises ChronoTaskError."""
    status, location = response.status, response.headers.get("Location", "").strip()
    if status not in (301, 302, 303, 307, 308) or not location or not config.get("follow_redirects", True):
        return None
    try:
        if re.match("//|[A-Za-z][A-Za-z0-9+.-]*:", location):
            url = _read_url(f"{request.url.scheme}:{location}" if location.startswith("//") else location)[0]
        else:
            url = request.url.join(yarl.URL(_as_written(location), encoded=True))
    except ValueError:
        target = _one_line(live.masked(mask_config({"url": location})["url"]), 100)
        raise ChronoTaskError(f"redirected to {target}, which is no http or https URL") from None
    method, _, headers, body, left_behind = request
    if (status == 303 and method != "HEAD") or (status in (301, 302) and method == "POST"):
        method, body = "GET", None
        headers = CIMultiDict(pair for pair in headers.items() if not pair[0].lower().startswith("content-"))
    if url.origin() != request.url.origin():
        if body is not None and SECRET_REFERENCE.search(compact(config["body"])):
            raise ChronoTaskError(f"redirected to {url.origin()}, which must not get the secret in the body")
        secret = {name.lower() for name, value in config.get("headers", {}).items() if SECRET_REFERENCE.search(value)}
        kept = CIMultiDict(pair for pair in headers.items() if pair[0].lower() in _HARMLESS_HEADERS - secret)
        headers, left_behind = kept, str(request.url.origin()) if len(kept) < len(headers) else left_behind
    return _Request(method, url, headers, body, left_behind)


async def _read_body(response: aiohttp.ClientResponse, live: LiveOutput) -> None:
    live.expect(response.headers.get("Content-Type", ""))
    headers, names = dict[str, str](), dict[str, str]()
    for plain, value in response.headers.items():
        text = live.masked(value.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        name = names.setdefault(plain.lower(), live.masked(str(plain)))  # aiohttp's own kind of string is slow to write as JSON
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    live.facts = {"status_code": response.status, "headers": headers}
    packed = response.headers.get("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip", "deflate")
    unpacker: Any = None
    read = 0
    try:
        while data := await response.content.readany():
            if packed and unpacker is None:  # zlib's header, gzip's, or neither: some servers send deflate without one
                unpacker = zlib.decompressobj(47 if data[0] == 0x1F or data[0] & 15 == 8 else -15)
            while data:
                part, data = data, b""
                if unpacker is not None:  # in small pieces, so that what unpacks to gigabytes needs no memory
                    part, data = unpacker.decompress(part, 65536), unpacker.unconsumed_tail
                live.feed("body", part)
                read += len(part)
                if data or read > 262144:  # a body that always has more never waits: let others have the loop
                    await asyncio.sleep(0)
            if unpacker is not None and unpacker.eof:
                return  # what is behind it is no part of it
        if unpacker is not None:
            live.feed("body", unpacker.flush())
            if not unpacker.eof:
                raise _Passing(_BROKE_OFF)
    except (aiohttp.ClientError, OSError, zlib.error):
        raise _Passing(_BROKE_OFF) from None


def retry_after(headers: Mapping[str, str], now: Callable[[], int]) -> float | None:
    """Seconds that a server asks to wait (RFC 9110, 10.2.3), at most an hour. A date counts from the server's own Date."""
    text, date = headers.get("retry-after", ""), headers.get("date")
    if re.fullmatch("[0-9]{1,12}", text):
        return min(float(text), MAX_RETRY_WAIT)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        until = calendar.timegm(email.utils.parsedate(text) or ())  # always in GMT: the oldest form does not say so
        start = calendar.timegm(email.utils.parsedate(date) or ()) if date else now() / SECOND
        return min(max(until - start, 0.0), MAX_RETRY_WAIT)
    return None


# ======================================================================================================================
# 8. Engine
# ======================================================================================================================
#
# One loop claims due slots, starts what is ready and finishes what has ended, all in one transaction a tick. An attempt
# reports its end to the next tick. Here, too: who looks on (the feed) and who waits for an end.

BATCH = 256  # slots claimed in one tick at most: more would hold up other writes
FIRST_BATCH = 4  # while nothing runs, and as many more for each that runs: the first of a burst do not wait for all claims
BUSY_FROM = 8  # attempts under way from which on ends are gathered
TICK_GAP = 0.02  # seconds between ticks then
TURN = 4  # attempts that begin in one turn of the loop, at most: a spawn holds it up until exec
EVENTS_KEPT = 2 * MOST_TOLD
INTERRUPTED = Outcome("interrupted", "the service was stopped", retryable=True)
K = TypeVar("K", Task, Schedule)


# --- The feed of events -----------------------------------------------------------------------------------------------


def as_it_is(entity: K, paused: bool) -> K:
    """A task or schedule with what only the engine knows: nothing fires while the scheduler is paused."""
    if isinstance(entity, Task) and (paused or entity.status != "active"):
        entity.next_run = None
    elif isinstance(entity, Schedule):
        entity.live = entity.live and not paused
    return entity


class Event(NamedTuple):
    """A change that was committed: `kind` is execution, task, schedule or scheduler."""

    id: str
    kind: str
    task_id: int | None
    data: Mapping[str, Any]


class Feed:
    """Recent events, who reads them, and who waits for an end. No buffer is unbounded: a reader too far behind is dropped."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._boot = uuid.uuid4().hex[:8]
        self._count = 0
        self._unread = 0  # events that are still kept for a reader that comes back
        self._recent: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.readers: set[asyncio.Queue[Event | None]] = set()
        self._shown: dict[int, str] = {}  # unfinished executions as readers know them
        self._shown_up_to = 0
        self.closed = False  # nobody waits any more
        self.waiting = weakref.WeakValueDictionary[int, asyncio.Event]()  # execution id → what whoever waits for its end holds

    @property
    def wanted(self) -> bool:
        """Whether anybody reads, or read not long ago: otherwise events cost nothing."""
        return bool(self.readers) or 0 < self._unread

    def publish(self, kind: str, task_id: int | None, data: Mapping[str, Any]) -> None:
        if not self.wanted:
            return
        self._unread = EVENTS_KEPT if self.readers else self._unread - 1
        self._count += 1
        event = Event(f"{self._boot}-{self._count}", kind, task_id, data)
        self._recent.append(event)
        for reader in list(self.readers):
            if behind := reader.qsize() >= MOST_TOLD:
                self.readers.discard(reader)
            reader.put_nowait(None if behind else event)

    async def open(self, last_id: str | None) -> tuple[asyncio.Queue[Event | None], list[Event] | None]:
        """A queue of events to come (None: dropped), and those after `last_id`; None if they are no longer known."""
        if not self.wanted:
            self._shown_up_to, self._shown = await self._store.read(unfinished_statuses)
        reader: asyncio.Queue[Event | None] = asyncio.Queue()
        self.readers.add(reader)
        self._unread = EVENTS_KEPT
        if last_id is None:
            return reader, []
        ids = [event.id for event in self._recent]
        return reader, list(self._recent)[ids.index(last_id) + 1 :] if last_id in ids else None

    def drop_all(self) -> None:
        """Who reads is dropped, and hears on coming back that something was missed."""
        self._recent.clear()
        for reader in self.readers:
            reader.put_nowait(None)
        self.readers.clear()

    async def publish_executions(self, ids: Collection[int] | None = None) -> None:
        """Those with these ids, and the schedules that fired them; None: what other processes did since the last look."""
        if self.wanted and ids is None:
            ids = await self._store.read(partial(changed_executions, after_id=self._shown_up_to, shown=self._shown))
            if len(ids) >= MOST_TOLD:
                self.drop_all()
        if not ids or not self.wanted:
            return
        executions = await self._store.read(partial(get_executions, ids=set(ids)))
        fired = {one.schedule_id for one in executions if not self._shown.get(one.id)} - {None}
        for execution in executions:
            self.publish("execution", execution.task_id, view_of(execution))
            # What lies between may be another process's: the next look at those will find that it is shown with no status.
            self._shown |= dict.fromkeys(range(max(self._shown_up_to + 1, execution.id - 1000), execution.id), "")
            self._shown_up_to = max(self._shown_up_to, execution.id)
            self._shown[execution.id] = execution.status
            if execution.status in FINISHED:
                del self._shown[execution.id]
        if fired:  # what is next of them has changed, and whether there is a next
            these = {"s.id IN ?": [*fired], "NOT t.deleted": True}
            for schedule in await self._store.read(partial(schedules_that, conditions=these)):
                self.publish("schedule", schedule.task_id, view_of(schedule))

    async def wait_for(self, execution_id: int, seconds: float) -> None:
        """Returns when the execution is over or gone, when `seconds` have passed, or when the service stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.closed:
                    ended = self.waiting.setdefault(execution_id, asyncio.Event())
                    if await self._store.read(partial(finished_among, ids=[execution_id])):
                        return
                    await ended.wait()  # for an attempt, too, that is retried

    def notify(self, execution_ids: Iterable[int] | None = None) -> None:
        """Wakes who waits for these executions (None: for any): they look whether it is over."""
        for execution_id in list(self.waiting) if execution_ids is None else execution_ids:
            if ended := self.waiting.pop(execution_id, None):
                ended.set()


# --- Ticks ------------------------------------------------------------------------------------------------------------


class Histogram:
    """How often values fell below each bound, the way Prometheus counts."""

    BOUNDS = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0)

    def __init__(self) -> None:
        self._counts = [0] * (len(self.BOUNDS) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self.BOUNDS, value)] += 1
        self._sum += value

    def samples(self) -> list[tuple[str, float]]:
        """Suffix with labels, and value."""
        totals = zip((*self.BOUNDS, "+Inf"), itertools.accumulate(self._counts), strict=True)
        buckets = [(f'_bucket{{le="{bound}"}}', float(total)) for bound, total in totals]
        return [*buckets, ("_sum", self._sum), ("_count", float(sum(self._counts)))]


@dataclass(slots=True)
class Stats:
    """Counts since the start of this process, for /metrics and /scheduler/status. Durations in seconds."""

    ended: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)  # by task type and status
    durations: Histogram = dataclasses.field(default_factory=Histogram)
    lateness: Histogram = dataclasses.field(default_factory=Histogram)
    recent_late: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=1000))

    def count(self, s: Finished) -> None:
        """An attempt has ended. That it failed is told in the log, too."""
        run, why = s.run, s.error_message
        what = f"task {run.task_id} ({run.task_name}), execution {run.execution_id}"
        if s.status == "retrying":
            again = format_instant(s.next_attempt_at or 0)
            logger.info("%s: attempt %d failed, the next is at %s: %s", what, run.attempt, again, why or s.attempt_status)
            return
        self.ended[run.task_type, s.status] += 1
        self.durations.add((s.finished_at - run.started_at) / SECOND)
        if SUCCESS.get(s.status) is False:
            logger.warning("%s: %s: %s", what, s.status, why or "no reason was given")


@dataclass(slots=True)
class Active:
    """An attempt that this process is running, from its `running` row on disk to its end on disk."""

    run: Run
    live: LiveOutput
    since: float  # by the monotonic clock
    job: asyncio.Task[None] | None = None  # None until it begins


@dataclass(slots=True)
class Tick:
    """A transaction of the engine, and what it did."""

    db: DB
    now: int
    settings: Settings
    schedules: list[Schedule] = dataclasses.field(default_factory=list)  # that have moved on
    new_ids: list[int] = dataclasses.field(default_factory=list)
    noted: list[tuple[Task, str, str | None]] = dataclasses.field(default_factory=list)  # what no attempt tells, why: for the log
    ended: list[Finished] = dataclasses.field(default_factory=list)  # attempts, as they are on disk
    runs: list[Run] = dataclasses.field(default_factory=list)
    cancelled: list[int] = dataclasses.field(default_factory=list)


class Engine:
    """Fires slots, starts what is ready, finishes what has ended: one transaction a tick, then its effects. What it knows is an
    index over the store, rebuilt when this process begins to lead."""

    def __init__(self, settings: Settings, store: Store, clock: Clock, environ: Environ) -> None:
        self.settings = settings
        self.store = store
        self.clock = clock
        self.feed = Feed(store)
        self.stats = Stats()
        self.http = HttpClient(settings, clock.now)
        self.owner = str(uuid.uuid4())
        self.running: dict[int, Active] = {}
        self.pause_ends: int | None = None  # the next one that ends by itself
        self.rev = 0  # of the newest change that was taken up
        self._most_timers = 0
        self.forget_timers()
        self.leading = False
        self.paused = False
        self.stopping = False
        self.last_tick = clock.monotonic()
        self._last_tick_end = 0.0
        self.distrust_until = 0.0  # by the monotonic clock: until then no history is deleted by age
        self._environ = environ
        self._ended: list[Finished] = []  # of attempts, for the next tick
        self._woken = False  # something was written that the next tick is to look for
        self._ticking = False  # a tick's write is under way
        self.ending = False  # the grace of a stop is over
        self._wake = asyncio.Event()
        self._set_back = 0  # by how much the clock was set back, in all, since schedules followed it
        self._jobs: set[asyncio.Task[Any]] = set()  # all but those of attempts

    def spawn(self, coroutine: Awaitable[T], beside: set[asyncio.Task[Any]] | None = None) -> asyncio.Task[T]:
        """Starts a job that ends with the engine at the latest; one that is kept `beside` its jobs ends by itself."""
        job, jobs = asyncio.ensure_future(coroutine), self._jobs if beside is None else beside
        jobs.add(job)
        job.add_done_callback(jobs.discard)
        return job

    # --- the loop ---

    def wake(self) -> None:
        """Something was written: the next tick looks what fires, and what may start."""
        self._woken = True
        self._wake.set()

    def forget_timers(self) -> None:
        """The next step reads all anew. Not here: a tick under way may write what this would not see."""
        self._timers = TimerQueue()  # when schedules fire
        self._retries = TimerQueue()
        self._timers_rev = -1  # the last change that they know

    async def _load_timers(self) -> None:
        """Takes up when something is due of what has changed; of all, where that was forgotten."""
        if len(self._timers) > self._most_timers:  # of schedules that were changed over and over
            self.forget_timers()
        timers, since = self._timers, self._timers_rev
        rev, fires, retries, self.pause_ends = await self.store.read(partial(changed_timers, since_rev=since))
        if timers is self._timers:  # else they were forgotten meanwhile
            self._timers_rev = rev
            self._timers.add(fires)
            self._retries.add(retries)
        if since < 0:
            self._most_timers = 2 * len(fires) + 10_000

    async def step(self) -> None:
        """One round of the scheduler loop: follows the clock, ticks, and waits until something is due or has happened."""
        # Under load until some more have ended: a tick for many costs little more than a tick for one.
        for _ in range(10):
            if BUSY_FROM <= len(self.running) > len(self._ended) and self.clock.monotonic() < self._last_tick_end + TICK_GAP:
                await asyncio.sleep(TICK_GAP / 10)
        self._wake.clear()
        moved = self.clock.step()
        if moved > DAY:
            self.distrust_clock()
        self._set_back = self._set_back + min(moved, 0) if self.leading else 0  # who takes over looks at the clock by itself
        if self._set_back <= -SECOND:
            logger.warning("the clock was set back by %.0f s, to %s", -self._set_back / SECOND, format_instant(self.clock.now()))
            await self.follow_clock(self._set_back)
            self.forget_timers()
        if self.leading and self._timers_rev < self.rev:
            await self._load_timers()
        self.last_tick = self.clock.monotonic()
        await self.tick()
        self._last_tick_end = self.clock.monotonic()
        fires = None if self.paused else self._timers.next_due()
        times = (fires, self._retries.next_due(), self.pause_ends) if self.leading and not self.stopping else ()
        await self.clock.wait(self._wake, min((at for at in times if at is not None), default=None))

    async def tick(self) -> None:
        """Finishes what has ended, claims what is due now, starts what is ready: one transaction, then the effects."""
        now = self.clock.now()
        acting = self.leading and not self.stopping
        woken = acting and self._woken
        firing = acting and not self.paused and (self._timers.pop_due(now) or woken)
        retrying = acting and self._retries.pop_due(now)
        if not (self._ended or firing or retrying or woken):
            return
        ended, self._ended, self._woken = self._ended, [], False
        batch = min(BATCH, FIRST_BATCH * (1 + len(self.running))) if firing else 0
        capacity = self.settings.max_concurrent_runs - len(self.running) + len(ended) if acting else 0
        work = partial(self._write, now=now, ended=ended, batch=batch, retrying=retrying, capacity=capacity)
        self._ticking = True
        try:
            tick = await self.store.write(work, at_once=True)
        except BaseException:  # nothing is lost: it is all tried again
            self._ended = ended + self._ended
            self._retries.add([now] * retrying)
            self.wake()
            raise
        finally:
            self._ticking = False
        if 0 < batch <= len(tick.schedules):  # there may be more that fires
            self.wake()
        await self.after_write(tick)

    def _write(
        self, db: DB, now: int, ended: Sequence[Finished], batch: int = 0, retrying: bool = False, capacity: int = 0
    ) -> Tick:
        tick, over = Tick(db, now, self.settings), list[Ended]()
        if ended:
            over = finish_attempts(db, ended)
            last = {end.execution_id for end in over}
            for s in ended:  # a retry may have been cancelled meanwhile
                cancelled = s.status == "retrying" and s.run.execution_id in last
                tick.ended.append(dataclasses.replace(s, status="cancelled", next_attempt_at=None) if cancelled else s)
            tasks = get_tasks(db, {end.task_id for end in over})
            for end in over:
                if task := tasks.get(end.task_id):
                    with contextlib.suppress(*DAMAGE):  # of what is counted: the end must reach the disk
                        count_end(task, end)
            paused = [tasks[end.task_id] for end in over if end.paused]
            write_standings(db, tasks.values(), paused, now)
            tick.noted += [(task, "paused", task.status_reason) for task in paused]
        if batch > 0:
            over += claim_due(tick, next_schedules(db, UpcomingQuery(limit=batch), now))
        follow(tick, over)
        if retrying:
            queue_retries(db, now)
        if capacity > 0:
            tick.runs = start_ready(db, capacity, now, self.owner)
            begun = [Ended(run.execution_id, run.task_id, "running", now) for run in tick.runs if run.attempt == 1]
            follow(tick, begun)
        set_meta(db, "clock", max(now, get_meta(db, "clock") or 0))  # the latest reading at which anything was done
        return tick

    async def finish(self, ended: Sequence[Finished]) -> None:
        """Finishes attempts of a process that is gone, as a tick does with those of this one."""
        await self.after_write(await self.store.write(partial(self._write, now=self.clock.now(), ended=ended)))
        self.wake()

    async def after_write(self, tick: Tick) -> None:
        if self.leading:
            self._timers.add(schedule.next_fire for schedule in tick.schedules if schedule.next_fire is not None)
            self._retries.add(s.next_attempt_at for s in tick.ended if s.next_attempt_at is not None)
        for task, status, why in tick.noted:
            if status in FINISHED:
                self.stats.ended[task.task_type, status] += 1
            if why:
                logger.warning("task %d (%s): %s", task.id, task.name, why)
        for s in tick.ended:
            self.running.pop(s.run.execution_id, None)
            self.stats.count(s)
        for execution_id in tick.cancelled:
            self.stop_run(execution_id)
        ended = [*(s.run.execution_id for s in tick.ended), *tick.cancelled]
        self.feed.notify(ended)
        await self._begin(tick.runs)
        await self.feed.publish_executions([*tick.new_ids, *(run.execution_id for run in tick.runs), *ended])

    # --- attempts ---

    async def _begin(self, runs: Sequence[Run]) -> None:
        """Begins attempts, a few in each turn of the loop."""
        begun = [Active(run, LiveOutput(self.settings.output_limit), self.clock.monotonic()) for run in runs]
        self.running.update((active.run.execution_id, active) for active in begun)
        for number, active in enumerate(begun, 1):
            run = active.run
            if run.trigger == "schedule" and run.attempt == 1 and run.fire_at is not None:
                late = max(0.0, (run.started_at - run.fire_at) / SECOND)
                self.stats.recent_late.append(late)
                self.stats.lateness.add(late)
            if self.ending:
                active.live.stop("interrupted")
            active.job = asyncio.create_task(self._attempt(active))
            if number % TURN == 0:
                await asyncio.sleep(0)

    async def _attempt(self, active: Active) -> None:
        run = active.run
        try:
            config = parsed(run.config)
            if run.override is not None:
                config = override_config(run.task_type, config, parsed(run.override))
            if run.task_type == "bash":
                outcome = await run_bash(config, run, self.settings, self._environ, active.live)
            else:
                outcome = await run_http(config, run, self.http, self._environ, active.live)
        except InvalidInput as error:
            outcome = Outcome("failed", f"the config of this execution no longer fits its task: {error.detail}")
        except Exception as error:
            logger.exception("execution %d", run.execution_id)
            outcome = Outcome("failed", f"ChronoTask could not run this task: {error!r}")
        except asyncio.CancelledError:
            outcome = INTERRUPTED
        self._end(active, outcome)
        self._wake.set()

    def _end(self, active: Active, outcome: Outcome) -> None:
        seconds = self.clock.monotonic() - active.since
        self._ended.append(decide_end(active.run, outcome, self.clock.now(), random.uniform(-1, 1), seconds))

    def stop_run(self, execution_id: int) -> None:
        if active := self.running.get(execution_id):
            active.live.stop("cancelled")

    # --- a clock that was set ---

    async def follow_clock(self, moved: int) -> None:
        """The clock may have been set back: slots are looked for from now on, and the wait for a retry does not grow."""
        now, seen = self.clock.now(), self._set_back

        def write(db: DB) -> None:
            shift_retries(db, moved, now + round(1.1 * MAX_RETRY_WAIT * SECOND))
            latest = get_meta(db, "clock") or 0
            for schedule in schedules_that(db, {"settled_until > ?": now, "(is_active OR over)": True}):  # not switched off
                with contextlib.suppress(*DAMAGE):
                    schedule.stand(stands_at(schedule.plan().timing, schedule.settled_until, now, latest))
                    schedule.look_ahead()
                    update(db, schedule)
            if latest >= now + CORRECTION:
                set_meta(db, "clock", now)

        await self.store.write(write)
        self._set_back -= seen  # it may have been set again meanwhile

    def distrust_clock(self) -> None:
        """The clock is more than a day later than it should be: it may be wrong, and history cannot be brought back."""
        self.distrust_until = self.clock.monotonic() + 3600
        logger.warning("the clock went on by more than a day: for an hour no history is deleted by age")

    # --- stopping ---

    async def stop(self, grace: float) -> bool:
        """Nothing more begins. What runs may end within `grace` seconds, then it is stopped, and all is finished. Returns whether
        it is known of every tick what it has written: a write may hang."""
        self.stopping = True
        self._wake.set()
        self.feed.drop_all()
        self.feed.closed = True
        self.feed.notify()
        await self._until_idle(self.clock.monotonic() + grace)
        self.ending = True
        for active in self.running.values():
            active.live.stop("interrupted")
        end = self.clock.monotonic() + 1.5  # of the 2 s that a stop may take after the grace; the rest closes connections, files
        await self._until_idle(end - 0.2)
        known = not self._ticking  # else that write may still reach the disk, or not
        for active in self.running.values():
            if active.job is None:
                self._end(active, INTERRUPTED)
        jobs = [*self._jobs, *(active.job for active in self.running.values() if active.job is not None)]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        with contextlib.suppress(Unavailable, TimeoutError):
            if known and self._ended:
                async with asyncio.timeout(end - self.clock.monotonic()):
                    await self.tick()
        if self._ended:
            logger.error("the database cannot be written: %d executions are finished at the next start", len(self._ended))
        await self.http.close()
        return known

    async def _until_idle(self, end: float) -> None:
        """Until nothing runs, and no tick can start something more. What has ended may be waiting for the disk."""
        while (self._ticking or len(self.running) > len(self._ended)) and self.clock.monotonic() < end:
            await asyncio.sleep(0.02)


def claim_due(tick: Tick, schedules: Sequence[Schedule], early: bool = False) -> list[Ended]:
    """Claims the due slots of schedules and moves these on, in the caller's transaction. Returns what is over by that."""
    claim = Claim(tick.now, unfinished_of(tick.db, {schedule.task_id for schedule in schedules}))

    def judged(schedule: Schedule) -> Iterator[tuple[int, int]]:
        try:
            if schedule.schedule_type == "after":
                claim_overdue(tick, claim, schedule)
            else:
                yield from claim.slots(schedule, early)
        except Exception as error:
            logger.exception("schedule %d", schedule.id)
            claim.broken(schedule, error)

    list(heapq.merge(*map(judged, schedules)))  # oldest first, whichever schedule they are of
    return write_claim(tick, claim)


def write_claim(tick: Tick, claim: Claim) -> list[Ended]:
    """Writes what was claimed, and adds it to `tick`. Returns what is over by that."""
    db, over = tick.db, list[Ended]()
    for schedule, trigger in claim.cancels:
        # A catch-up spares those of its own schedule.
        spared = {"NOT (trigger = 'catchup' AND schedule_id IS ?)": schedule.id} if trigger == "catchup" else {}
        overlapped = {UNFINISHED_SQL: True, "task_id = ?": schedule.task_id, **spared}
        over += end_cancelled(tick, cancel_executions(db, overlapped, tick.now, CANCELLED_BY_OVERLAP))
    claim.rows, new_ids = insert_slots(db, claim.rows)
    runs = Counter(row.schedule_id for row in claim.rows if row.status not in NEVER_STARTED)
    for schedule in claim.schedules:
        schedule.run_count += runs[schedule.id]
        if schedule.schedule_type == "after":
            schedule.look_ahead()
    advance_schedules(db, claim.schedules)
    if any(row.hold for row in claim.rows):  # what they wait for may have been cancelled by another of them
        release_held(db, {row.task_id for row in claim.rows})
    tick.schedules += claim.schedules
    tick.new_ids += new_ids
    noted = [(new_id, row) for new_id, row in zip(new_ids, claim.rows, strict=True) if row.status != "queued"]
    tasks = get_tasks(db, {row.task_id for _, row in noted}) if noted else {}
    tick.noted += [(tasks[row.task_id], row.status, row.error_message) for _, row in noted if row.task_id in tasks]
    return over + [Ended(new_id, row.task_id, row.status, tick.now) for new_id, row in noted]


def end_cancelled(tick: Tick, found: Sequence[tuple[int, int, str]]) -> list[Ended]:
    """Adds what `cancel_executions` has found to `tick`. Returns what is over by that."""
    over = [Ended(number, task_id, "cancelled", tick.now) for number, task_id, before in found if before != "running"]
    tasks = get_tasks(tick.db, {end.task_id for end in over})
    tick.noted += [(tasks[end.task_id], end.status, None) for end in over]
    tick.cancelled += [execution_id for execution_id, _, _ in found]
    return over


def follow(tick: Tick, over: Sequence[Ended]) -> None:
    """Writes the executions that schedules of type `after` fire because of `over`, and because of what is over by them."""
    db, now = tick.db, tick.now
    while over and (schedules := after_schedules(db)):
        tasks, depths = get_tasks(db, {end.task_id for end in over}), depths_of(db, [end.execution_id for end in over])
        claim = Claim(now, unfinished_of(db, {schedule.task_id for schedule in schedules if schedule.overlap != "allow"}))
        executions: dict[int, Execution] = {}
        for schedule in schedules:
            try:
                config, plan, told = schedule.schedule_config, schedule.plan(), list[tuple[Ended, str]]()
                for end in over if plan.start_at <= now <= plan.end_at else ():
                    depth, task = depths.get(end.execution_id, 0), tasks.get(end.task_id)
                    if task and depth <= MOST_DEPTH and watches(schedule, task.id, task.tags, by_after=depth > 0):
                        told += [(end, event) for event in events_of(end, config.get("threshold", 1)) if event in config["on"]]
                left = plan.remaining
                if missing := {end.execution_id for end, _ in told} - executions.keys():
                    executions |= {e.id: e for e in get_executions(db, missing, output=True)}
                for end, event in told if left != 0 else ():
                    task = tasks[end.task_id]
                    streak = end.before if event == "recovered" else task.failures_in_a_row if end.after is None else end.after
                    cause = cause_of(event, executions[end.execution_id], task, streak or 0, tick.settings)
                    ran = claim.after(schedule, cause, end.execution_id, depths.get(end.execution_id, 0))
                    if (left := left - ran) <= 0:
                        break
                if past := plan.end_at < now:
                    schedule.stand(now)
                if past or told or plan.next_slot(schedule.settled_until) != schedule.next_slot:
                    claim.schedules.append(schedule)
            except Exception:
                logger.exception("schedule %d", schedule.id)
        over = write_claim(tick, claim)


def claim_overdue(tick: Tick, claim: Claim, schedule: Schedule) -> None:
    """The slot of an `overdue`, unless a success has moved it."""
    slot = schedule.plan().next_slot(schedule.settled_until)
    if slot is not None and slot <= claim.now:
        [task] = get_tasks(tick.db, schedule.schedule_config["task_ids"]).values()
        by = task.last_success_id or -task.id
        # A longer `seconds`, or a clock that was set back, brings a time again that was told.
        if not ids_of(tick.db, "executions", {"caused_by = ?": by, "schedule_id = ?": schedule.id, "event = 'overdue'": True}):
            last = get_executions(tick.db, [by], output=True)
            cause = cause_of("overdue", last[0] if last else None, task, task.failures_in_a_row, tick.settings)
            claim.after(schedule, cause, by, 0)
        schedule.stand(claim.now)
    claim.schedules.append(schedule)


# ======================================================================================================================
# 9. Changes
# ======================================================================================================================

PURGE_ROWS = 250  # of a deleted task in one delete
RETENTION_ROWS = 1000  # rows in one delete: a larger one holds up other writes


class Retention:
    """Deletes old history, and the rows of deleted tasks, in small pieces: each a write of its own, so that none waits long."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.looked = asyncio.Event()  # since the last purge: tasks may have been deleted

    async def step(self) -> None:
        if self.engine.leading:
            await self.delete(self.engine.clock.now())
        await asyncio.sleep(600.0 if self.engine.leading else 5.0)

    async def delete(self, now: int) -> None:
        """One pass: by age over all rows, by count over the tasks that have more than is kept."""
        engine, settings = self.engine, self.engine.settings
        by_age = settings.history_days > 0 and engine.clock.monotonic() >= engine.distrust_until
        for table in ("executions", "changes") if by_age else ():
            old = partial(delete_old, table=table, cutoff=now - settings.history_days * DAY, now=now, limit=RETENTION_ROWS)
            after: int | None = 0
            while engine.leading and after is not None:
                after = await engine.store.write(partial(old, after_id=after))
                await self._leave_room()
        keep, skipped = settings.history_per_task, 100  # of what ran, and of what was skipped or missed
        for task_id in await engine.store.scan(partial(tasks_with_surplus, keep=keep, keep_skipped=skipped)):
            surplus = partial(delete_surplus, task_id=task_id, keep=keep, keep_skipped=skipped, now=now, limit=RETENTION_ROWS)
            while engine.leading and await engine.store.write(surplus) > 0:
                await self._leave_room()

    async def _leave_room(self) -> None:
        """Gives back free pages, then leaves the writer to others for a moment."""
        await self.engine.store.write(give_back_space)
        await asyncio.sleep(0.01)

    async def purge(self) -> None:
        """Removes what belongs to deleted tasks, then waits until there may be more."""
        engine = self.engine
        self.looked.clear()
        deleted = await engine.store.read(partial(ids_of, table="tasks", conditions={"deleted = 1": True}))
        if engine.leading and deleted:
            while running := [key for key, active in engine.running.items() if active.run.task_id in deleted]:
                for execution_id in running:
                    engine.stop_run(execution_id)
                await asyncio.sleep(0.02)
            for task_id in deleted:
                while not await engine.store.write(partial(purge_task, task_id=task_id, limit=PURGE_ROWS)):
                    await self._leave_room()
            engine.feed.notify()
        await self.looked.wait()


class Changes:
    """Takes up what was written, by this process or another. `status` tells the scheduler's state, for the feed."""

    def __init__(self, engine: Engine, retention: Retention, status: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        self.engine = engine
        self.retention = retention
        self._status = status
        self._seen = (0, 0)  # changes are taken up to here
        self._looking = asyncio.Lock()
        self._asked = self._looked = 0  # looks that were asked for, and how many of these have been answered
        self.stale = True  # other processes have written something that this one has not taken up, or not all of it

    async def poll(self) -> None:
        """Takes up what other processes wrote, and shows them the output that they follow."""
        engine, store = self.engine, self.engine.store
        self.stale = await store.foreign_changes() or self.stale
        await self.take_up(others=self.stale)
        self.stale = False
        if engine.running:
            asked = {"stream = ''": True, "wanted_until > ?": (now := engine.clock.now())}
            wanted = await store.read(partial(ids_of, table="live_output", conditions=asked, column="execution_id"))
            recent = {(key, one.run.attempt): one.live.recent() for key in wanted if (one := engine.running.get(key))}
            if recent:
                await store.write(partial(show_output, recent=recent, now=now))

    async def take_up(self, others: bool = False) -> None:
        """What has changed since the last look, and with `others` what other processes did with executions."""
        self._asked += 1
        number = self._asked
        async with self._looking:  # one after the other: an older look must not overwrite what a newer one found
            if number <= self._looked and not others:  # by a look that began later
                return
            number = self._asked
            engine, store, since, before = self.engine, self.engine.store, self._seen, self.engine.paused
            until, paused = await store.read(progress)
            if until == since and not others:
                return
            engine.rev, engine.paused = until[0], paused
            self.retention.looked.set()
            feed = engine.feed
            if feed.wanted:
                tasks, schedules, deleted = await store.read(partial(changed_objects, since=since, until=until))
                if MOST_TOLD in (len(tasks), len(schedules), len(deleted)):
                    feed.drop_all()
                for task in tasks:
                    feed.publish("task", task.id, view_of(as_it_is(task, paused)))
                for schedule in schedules:
                    feed.publish("schedule", schedule.task_id, view_of(as_it_is(schedule, paused)))
                for kind, object_id, task_id in deleted:
                    feed.publish(kind, task_id, {"id": object_id, "task_id": task_id, "deleted": True})
            if feed.wanted and paused != before:
                feed.publish("scheduler", None, await self._status())
            if others:
                await feed.publish_executions()
                these = {"id IN ?": (ids := [*engine.running]), GOING_ON_SQL: True}
                going_on = await store.read(partial(ids_of, table="executions", conditions=these))
                for ending in {*ids}.difference(going_on):  # a row may be gone already with its task
                    engine.stop_run(ending)
            if feed.waiting:  # perhaps for what another process has finished or deleted
                feed.notify(await store.read(partial(finished_among, ids=list(feed.waiting))))
            self._seen, self._looked = until, number
            engine.wake()  # what it waits for may have changed


# ======================================================================================================================
# 10. Leadership
# ======================================================================================================================
#
# Three kinds of lock files lie beside the database, for the processes that share it:
#   .leader         held by the one process that leads
#   .service        shared by all services, so that a process of kind `mcp` sees that one is alive, and yields to it
#   .drain-OWNER    held by a process that has led, until it ends: what it has started and still runs is not that of a dead
#                   process, whoever leads meanwhile


class Leadership:
    """Which process fires schedules and runs executions: at most one, and a service before one of kind `mcp`."""

    def __init__(self, engine: Engine, changes: Changes, kind: str) -> None:
        self.engine = engine
        self.changes = changes
        self.kind = kind
        path = self._path = Path(os.path.realpath(engine.store.path))  # who opens the database by a link leads no other one
        self._leader_lock = FileLock(Path(f"{path}.leader"))
        self._service_lock = FileLock(Path(f"{path}.service"))
        self._owner_lock = FileLock(Path(f"{path}.drain-{engine.owner}"))
        self._others_run: set[int] = set()  # executions that other processes finish, which have started them as leader

    async def begin(self) -> None:
        """Says that this process is alive, and leads if nobody does. Raises StartupError where file locks do not work."""
        folder = self._path.parent
        try:
            if not locks_work(self._path):
                raise StartupError(f"file locks do not work in {folder}: put the database on a local file system")
            while self.kind == "service" and not self._service_lock.acquire(shared=True):
                await asyncio.sleep(0.01)  # a `mcp` process is looking whether a service is alive
            await self.look()
        except Unavailable as error:  # a full disk: reads work, and the next look tries again
            logger.error("this process cannot lead yet: %s", error.detail)
        except OSError as error:
            raise StartupError(f"no file can be made in {folder}: {error}") from None

    async def step(self) -> None:
        """Looks who leads and what other processes wrote."""
        await asyncio.sleep(POLL)
        try:
            await self.look()
        finally:  # also without the folder of the locks: /health tells then that the database is gone
            if not self.engine.ending:  # then this job was cancelled: a write may wait for ever
                await self.changes.poll()

    @property
    def known(self) -> bool:
        """Whether somebody leads, this process or another."""
        return self.engine.leading or is_locked(self._leader_lock.path)

    def release(self) -> None:
        """At the end of the process: the next leader need not wait."""
        for lock in (self._owner_lock, self._leader_lock, self._service_lock):
            lock.release()
        with contextlib.suppress(OSError):  # there is none, or the disk is read-only by now
            self._owner_lock.path.unlink()

    async def look(self) -> None:
        """Takes over, yields, and finishes what processes left behind that are gone."""
        engine = self.engine
        if engine.stopping:  # another process leads while this one finishes what it runs
            self._service_lock.release()
        yielding = engine.stopping or (self.kind == "mcp" and is_locked(self._service_lock.path))
        if yielding and not engine.stopping:  # asked twice: another `mcp` process may have been looking at the same moment
            await asyncio.sleep(0.01)
            yielding = is_locked(self._service_lock.path)
        held = self._leader_lock.held()
        if (held and yielding) or (engine.leading and not held):  # held, too, where a take-over has failed half-way
            await self._step_down()
        elif not engine.leading and not yielding and self._leader_lock.acquire():
            await self._take_over()
        elif engine.leading and (before := self._others_run):
            await self._finish_orphans()
            if self._others_run != before:  # some may be retried
                engine.forget_timers()

    async def _step_down(self) -> None:
        """Claims nothing more; what runs here is finished here, and so is what a tick under way starts."""
        logger.info("this process no longer leads")
        self.engine.leading = False
        await self.engine.store.set_leading(False)
        self._leader_lock.release()

    async def _take_over(self) -> None:
        """Rebuilds everything from the store, finishes what a dead leader left running, and leads from then on."""
        engine, store = self.engine, self.engine.store
        while not self._owner_lock.acquire():
            await asyncio.sleep(0.01)  # another process is looking whether this one lives
        known = await store.read(latest_known)
        if known and engine.clock.now() > known + DAY:
            engine.distrust_clock()
        await store.set_leading(True)
        await self._finish_orphans()
        if known > engine.clock.now():
            await engine.follow_clock(0)
        engine.leading = self.changes.stale = True  # a look that fails is to be repeated
        engine.forget_timers()
        await self.changes.poll()
        logger.info("this process leads: it fires schedules and runs executions")

    async def _finish_orphans(self) -> None:
        """Executions left `running` by a process that died count as a failed attempt. What it started is killed first."""
        engine = self.engine
        others = await engine.store.read(partial(running_of_others, owner=engine.owner))
        living = set()
        for drain in [file for file in self._path.parent.iterdir() if file.name.startswith(f"{self._path.name}.drain-")]:
            if is_locked(drain):
                living.add(drain.name.rpartition(".drain-")[2])
            else:
                drain.unlink(missing_ok=True)
        dead = [run for run in others if run.owner not in living]
        self._others_run = {run.execution_id for run in others if run.owner in living}
        if not dead:
            return
        left, user = {run.run_id for run in dead if run.task_type == "bash"}, engine.settings.bash_user
        killed = await asyncio.to_thread(kill_leftovers, left, user, looks=20)  # a launcher gets a second to take its job back
        logger.warning("%d executions were left running; %d of their processes were ended", len(dead), killed)
        now = engine.clock.now()
        outcome = Outcome("interrupted", "the service ended while this attempt was running", retryable=True)
        await engine.finish([decide_end(run, outcome, now, random.uniform(-1, 1)) for run in dead])


# ======================================================================================================================
# 11. Service
# ======================================================================================================================

DELETE_WAIT = 5.0  # seconds that a delete waits for its rows to be gone: those of a long history follow
MOST_BACKFILL = 1000  # slots
CHANGE_TEXT = 4096  # characters kept of one field before and after a change
U = TypeVar("U", bound=Callable[..., Any])
TIMING_FIELDS = {"schedule_type", "schedule_config", "start_at", "end_at", "jitter", "exclude"}


# --- Operations -------------------------------------------------------------------------------------------------------
#
# REST makes its routes and its OpenAPI document from them, MCP its tools.


class Caller(NamedTuple):
    """Who asks: the name of the token (`-` without tokens, or an MCP client's name), by which way, and what it may do."""

    actor: str = "-"
    via: str = "cli"
    scope: str = "admin"


_MYSELF = Caller()
CALLER: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller", default=_MYSELF)


def require(scope: str) -> None:
    """Raises Forbidden unless the caller may do what needs this scope."""
    caller = CALLER.get()
    if SCOPES.index(caller.scope) < SCOPES.index(scope):
        raise Forbidden(f"this needs the scope {scope}: the token {caller.actor} has {caller.scope}")


def words_of(documented: Any) -> tuple[str, str]:
    """The first sentence of a docstring, and the rest."""
    summary, _, description = " ".join((documented.__doc__ or "").split()).partition(". ")
    return summary.rstrip("."), description


OPERATIONS: list[Operation] = []
TOOLS: dict[str, Operation] = {}


@dataclass(eq=False)
class Operation:
    """Makes the use case that it decorates an operation of REST, and with `tool` (the hints of its tool: read_only, destructive,
    idempotent, open_world) of MCP. The signature says the rest: with {id} in the path, the first parameter is that id; `query` is
    the query string, `body` the body (like the result a marked dict, or None). The docstring is for who has never seen
    ChronoTask: its first sentence is the summary, the rest is told to models besides, whose arguments are flat."""

    method: str
    path: str
    status: int = 200
    tool: tuple[str, ...] | None = None
    scope: str = ""  # what a token needs: by default `read` for a GET, `admin` for everything else

    def __call__(self, use_case: U) -> U:
        kinds = get_type_hints(use_case, include_extras=True)
        kinds.pop("service", None)
        self.use_case: Any = use_case
        self.methods = ("PUT", "PATCH") if self.method == "PATCH" else (self.method,)
        self.name = use_case.__name__
        self.summary, self.description = words_of(use_case)
        self.scope = self.scope or ("read" if self.method == "GET" else "admin")
        self.id_name: str | None = next(iter(kinds)) if "{id}" in self.path else None
        self.query: type[Query] = kinds.get("query", Query)
        self.body: Any = kinds.get("body")
        self.result: Any = None if kinds["return"] is type(None) else kinds["return"]
        if self.path:  # else it is a tool alone
            OPERATIONS.append(self)
        if self.tool is not None:
            TOOLS[self.name] = self
        return use_case

    async def call(self, service: Service, number: int | str, query: Any, body: Any) -> Any:
        """The use case with checked arguments, as far as it has them. Here a task's key becomes its id. Raises Forbidden."""
        require(self.scope)
        given: dict[str, Any] = {} if self.id_name is None else {self.id_name: await service.task_id(number)}
        if self.body is not None:
            named = isinstance(body, dict) and body.get("task_id")
            given["body"] = {**body, "task_id": await service.task_id(named)} if named else body
        if self.query is not Query:
            if getattr(query, "task_id", None):
                query.task_id = await service.task_id(query.task_id)
            given["query"] = query
        return await self.use_case(service, **given)


# --- The use cases ----------------------------------------------------------------------------------------------------


class Service:
    """The use cases that change something, lists and single things. One per process; of kind "mcp" it yields to services."""

    def __init__(self, settings: Settings, store: Store, clock: Clock, environ: Environ, kind: str = "service") -> None:
        self.settings = settings
        self.store = store
        self.clock = clock
        self.engine = Engine(settings, store, clock, environ)
        self.retention = Retention(self.engine)
        self.changes = Changes(self.engine, self.retention, partial(status_of, self))
        self.leadership = Leadership(self.engine, self.changes, kind)
        self.started_at = clock.now()
        self.config_file: dict[str, str | None] | None = None  # what is followed: path, applied_at, error
        self._changing: set[asyncio.Task[Any]] = set()

    async def start(self, prepare: Callable[[], Awaitable[None]] | None = None) -> None:
        """Becomes leader if nobody is, does what `prepare` is to do before anything fires, and starts the jobs."""
        await self.changes.take_up()
        await self.leadership.begin()
        if prepare is not None:
            await prepare()
        self.engine.spawn(self.keep("scheduler loop", self._step))
        self.engine.spawn(self.keep("poll", self.leadership.step))
        self.engine.spawn(self.keep("retention", self.retention.step))
        self.engine.spawn(self.keep("purge", self.retention.purge))

    async def _step(self) -> None:
        await self.engine.step()
        if self.engine.leading and not self.engine.stopping and (self.engine.pause_ends or LAST_INSTANT) <= self.clock.now():
            await self.change(end_pauses)

    async def keep(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        """Runs `step` for ever: one failure is told and the next round begins a second later."""
        while not self.engine.ending:
            try:
                await step()
            except Exception as error:
                log = logger.error if isinstance(error, Unavailable) else logger.exception
                log("%s: %s", name, error)
                await asyncio.sleep(1)

    async def stop(self) -> None:
        """Lets running executions finish for the grace, ends the others, finishes all, releases the locks."""
        known = await self.engine.stop(self.settings.shutdown_grace)
        if known:  # else the end of the process releases the locks: the next leader must find what that tick has started
            self.leadership.release()

    def problem(self) -> str | None:
        """Why the service is not healthy, or None."""
        silent = self.clock.monotonic() - self.engine.last_tick
        if silent > 10:
            return f"the scheduling job has not ticked for {silent:.0f} s"
        return self.store.problem()

    async def measured(self) -> tuple[tuple[dict[str, int], dict[str, int]], tuple[list[Task], dict[int, int]]]:
        """For /metrics: numbers of objects, executions by status; the tasks that ran last, since when tasks run."""
        return await self.store.scan(lambda db: (counts(db), measured_tasks(db, 1000)))

    async def change(self, write: Callable[[Transaction], T], take_up: bool = True) -> T:
        """The one way to change something: refused while stopping, written, then taken up by whom it concerns, also when the
        caller has gone meanwhile (a client of MCP may cancel its call)."""
        if self.engine.stopping:
            raise Unavailable("the service is shutting down")
        if self.store.replaced:  # what a restart loses must not be promised
            raise Unavailable(f"{REPLACED}: restart ChronoTask")
        now, caller = self.clock.now(), CALLER.get()

        def run(db: DB) -> tuple[Transaction, T]:
            tx = Transaction(db, now, self.settings, caller=caller)
            return tx, write(tx)

        async def changed() -> T:
            tx, done = await self.store.write(run)
            for line in tx.lines:
                logger.info("%s", line)
            if tx.new_ids:
                self.engine.wake()
            await self.engine.after_write(tx)
            if take_up:
                await self.changes.take_up()
            return done

        return await asyncio.shield(self.engine.spawn(changed(), self._changing))

    @Operation("POST", "/tasks", 201, tool=())
    async def create_task(self, body: TaskCreate) -> TaskView:
        """Create a task: what to run. A bash command on ChronoTask's machine, or a request to a url; by arguments of
        create_schedule also when. Example: {"name": "backup", "command": "tar -czf /tmp/x.tgz /tmp/x", "expression": "30 2 * *
        *", "timezone": "Europe/Berlin"}. Secrets: write ${env:CHRONOTASK_SECRET_NAME}; answers show ********. In one that an
        `after` schedule fires ${cause:text} (bash: $CHRONOTASK_CAUSE_TEXT) says what happened."""
        given, errors = (body, self.clock.now(), self.settings), list[FieldError]()
        with told_at("", errors):
            # Bash looks at what arguments follow, and hostile source takes it half a second.
            task = await in_daemon(new_task, *given) if "args" in body["config"] else new_task(*given)
            task.config = unmask_config(task.task_type, task.config, {})

        def write(tx: Transaction) -> tuple[TaskView, list[Schedule]]:
            wrong, schedules = [*errors], list[Schedule]()
            for number, part in enumerate(body.get("schedules", ())):
                with told_at(f"schedules[{number}].", wrong):
                    schedules.append(new_schedule({**part, "task_id": 0}, tx.now, tx.settings))
                    check_watched(tx.db, schedules[-1])
            if wrong:
                raise InvalidInput(*wrong)
            view = tx.put(task)
            for schedule in schedules:
                schedule.task_id = task.id
                add_schedule(tx, schedule)
            return view, schedules

        view, made = await self.change(write, take_up=self.engine.feed.wanted or "schedules" in body)
        if not made:
            return view
        return {**await self.get_task(task.id), "schedules": [await self.get_schedule(schedule.id) for schedule in made]}

    @Operation("GET", "/tasks/{id}", tool=("read_only",))
    async def get_task(self, task_id: int) -> TaskView:
        """Show a task. With its configuration, counts of runs, and `next_run` (null while nothing will fire)."""
        return view_of(as_it_is(await self.store.read(partial(get_task, task_id=task_id)), self.engine.paused))

    @Operation("GET", "/tasks", tool=("read_only",))
    async def list_tasks(self, query: TaskQuery) -> TaskPage:
        """List tasks, paused and disabled ones too. Look here before you create one. `q` searches in names; `total` counts all
        that match."""
        look = self.store.read if query.q is query.tag is None else self.store.scan
        total, tasks = await look(partial(list_tasks, query=query))
        tasks = [{**t, "next_run": None} if self.engine.paused or t["status"] != "active" else t for t in tasks]
        return dict(total=total, skip=query.skip, limit=query.limit, tasks=tasks)

    async def task_id(self, task: int | str) -> int:
        """The id of a task that is named by it or by `key:NAME`. Raises NotFound."""
        return task if isinstance(task, int) else await self.store.read(partial(task_of_key, key=task.removeprefix("key:")))

    @Operation("PATCH", "/tasks/{id}", tool=("destructive", "idempotent"))
    async def update_task(self, task_id: int, body: TaskUpdate) -> TaskView:
        """Change the fields of a task that are sent. What is not given stays. Fields as in create_task. status paused pauses
        it."""

        def write(tx: Transaction) -> None:
            task, given = get_task(tx.db, task_id), cast(Any, body)
            given = given(view_of(task)) if callable(given) else given
            sent = {**given, **read_times(given, shape_of(Task).times, tx.settings.scheduler_timezone, tx.now)}
            task_type = sent.get("task_type", task.task_type)
            if "config" in sent:
                stored = task.config if task_type == task.task_type else {}
                sent["config"] = unmask_config(task_type, parse_config(task_type, sent["config"]), stored)
                check_allowed(task_type, sent["config"], tx.settings)
            elif task_type != task.task_type:
                raise InvalidInput(FieldError("config", f"must be sent too: task_type changes to {task_type}"))
            change_task(tx, task, sent)

        await self.change(write)
        return await self.get_task(task_id)

    @Operation("DELETE", "/tasks/{id}", 204, tool=("destructive", "idempotent"))
    async def delete_task(self, task_id: int) -> None:
        """Delete a task with its schedules and history. Kills what it is running. Cannot be undone; update_task with status
        paused stops it for a while."""
        await self.change(partial(remove_task, task_id=task_id))
        there, end = partial(ids_of, table="tasks", conditions={"id = ?": task_id}), self.clock.monotonic() + DELETE_WAIT
        while await self.store.read(there) and not self.engine.stopping and self.clock.monotonic() < end:
            await asyncio.sleep(0.02)

    @Operation("POST", "/schedules", 201, tool=())
    async def create_schedule(self, body: ScheduleCreate) -> ScheduleView:
        """Create a schedule: when a task fires. By expression (cron), once at datetime, every so many seconds, or after other
        tasks. Weekdays at 9 in Berlin: {"task_id": 1, "expression": "0 9 * * MON-FRI", "timezone": "Europe/Berlin"}. Alert when
        task 1 breaks: {"task_id": 2, "after_task_ids": [1], "on": ["broke", "recovered"]}. Compare description and upcoming in
        the answer with what was asked for."""
        made = await self.change(lambda tx: add_schedule(tx, new_schedule(body, tx.now, tx.settings)))
        return await self.get_schedule(made)

    @Operation("GET", "/schedules/{id}")
    async def get_schedule(self, schedule_id: int) -> ScheduleView:
        """Show a schedule."""
        paused, now = self.engine.paused, self.clock.now()

        def read(db: DB) -> ScheduleView:
            schedule = as_it_is(get_schedule(db, schedule_id), paused)
            view = {**view_of(schedule), "upcoming": [], "notes": []}
            with contextlib.suppress(*DAMAGE):  # its description says so
                view["notes"] = notes_of(schedule, now, paused)
                if schedule.is_active and schedule.live:
                    view["upcoming"] = upcoming_view(schedule.plan().upcoming(schedule.settled_until, 5), schedule.zone)
            return view

        return await self.store.read(read)

    @Operation("GET", "/schedules", tool=("read_only",))
    async def list_schedules(self, query: ScheduleQuery) -> SchedulePage:
        """List schedules. Of all tasks or of one, with words, time zone and next slots."""
        total, rows = await self.store.scan(partial(list_schedules, query=query))
        schedules = [view_of(as_it_is(schedule, self.engine.paused)) for schedule in rows]
        return dict(total=total, skip=query.skip, limit=query.limit, schedules=schedules)

    @Operation("PATCH", "/schedules/{id}", tool=("destructive", "idempotent"))
    async def update_schedule(self, schedule_id: int, body: ScheduleUpdate) -> ScheduleView:
        """Change the fields of a schedule that are sent. What is not given stays, the timezone too. Fields as in create_schedule.
        is_active false pauses it."""

        def write(tx: Transaction) -> tuple[Any, Any]:
            schedule, given = get_schedule(tx.db, schedule_id), cast(Any, body)
            sent = given(view_of(schedule)) if callable(given) else given
            task_id = sent.get("task_id", schedule.task_id)
            if schedule.task_id != (task_of_key(tx.db, task_id.removeprefix("key:")) if isinstance(task_id, str) else task_id):
                raise InvalidInput(FieldError("task_id", "cannot be changed: create a schedule for the other task"))
            change_schedule(tx, schedule_id, _fields_of(sent, schedule, tx.now, tx.settings.scheduler_timezone))
            return schedule.schedule_config.get("timezone"), sent.get("schedule_config", {"timezone": "as it is"})

        try:
            before, sent_config = await self.change(write)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # a zone is gone, or a fault of ours
            logger.exception("schedule %d", schedule_id)
            raise InvalidInput(FieldError("schedule_config", f"cannot be evaluated ({error}): send another one")) from error
        view = await self.get_schedule(schedule_id)
        after = view["schedule_config"].get("timezone")
        if before and after and before != after:
            view["notes"].insert(0, f"The time zone is {after} now; it was {before}.")
        elif after and before not in (None, self.settings.scheduler_timezone) and "timezone" not in sent_config:
            view["notes"].insert(0, f"The time zone stays {after}: none was sent.")
        return view

    @Operation("DELETE", "/schedules/{id}", 204, tool=("destructive", "idempotent"))
    async def delete_schedule(self, schedule_id: int) -> None:
        """Delete a schedule; its history stays. Queued runs of it are cancelled, running ones end."""
        await self.change(partial(remove_schedule, schedule_id=schedule_id))

    @Operation("POST", "/tasks/{id}/execute", 202, tool=("destructive", "open_world"), scope="run")
    async def execute_task(self, task_id: int, query: ExecuteQuery, body: ExecuteBody) -> ExecutionView:
        """Run a task now. Answers when the run is over, or after `wait` seconds with its id: get_execution with wait shows its
        end; do not execute again. Other arguments replace fields of the task for this run alone. Works for paused tasks, too."""
        key, sent = query.idempotency_key, hashlib.sha256(compact(body).encode()).hexdigest()
        if override := body.get("config"):
            require("admin")  # it is a command of one's own

        def write(tx: Transaction) -> Execution:
            if key is not None and (known := execution_of_key(tx.db, task_id, key, sent, tx.now)) is not None:
                return get_execution(tx.db, known)[0]
            execution = queue_execution(tx, NewExecution(task_id, None, "manual", None, tx.now), override)
            if key is not None:
                put_row(tx.db, "idempotency", task_id, key, tx.now, sent, execution.id)
            return execution

        return await self._begin(write, query.wait)

    @Operation("POST", "/executions/{id}/rerun", 202, tool=("destructive", "open_world"), scope="run")
    async def rerun_execution(self, execution_id: int, query: WaitQuery) -> ExecutionView:
        """Run an execution again. With its slot and its config override, and the task as it is now. One that is not over yet is
        refused. Answers as execute_task."""

        def write(tx: Transaction) -> Execution:
            old, _ = get_execution(tx.db, execution_id)
            if old.status in UNFINISHED:
                raise Conflict(f"execution {execution_id} is not over yet: {old.status}")
            cause = None if old.cause is None else compact(old.cause)
            row = NewExecution(old.task_id, old.schedule_id, "rerun", old.scheduled_for, tx.now, cause=cause, rerun_of=old.id)
            return queue_execution(tx, row, old.config)

        return await self._begin(write, query.wait)

    async def _begin(self, write: Callable[[Transaction], Execution], wait: float) -> ExecutionView:
        """Queues an execution, unless it is there already, and waits for its end up to `wait` seconds."""
        execution = await self.change(write, take_up=False)
        if wait <= 0:
            return view_of(execution)
        await self.engine.feed.wait_for(execution.id, wait)
        return await self.get_execution(execution.id)

    @Operation("GET", "/executions/{id}", tool=("read_only",))
    async def get_execution(self, execution_id: int) -> ExecutionView:
        """Show an execution with its attempts and output. Of a running one, the output so far. It is over unless its status is
        queued, running or retrying."""
        (execution, past), caused = await self.store.read(
            lambda db: (get_execution(db, execution_id), sorted(ids_of(db, "executions", {"caused_by = ?": execution_id})))
        )
        if (active := self.engine.running.get(execution_id)) and execution.status == "running":
            execution.output_data = active.live.snapshot()
        elif execution.status == "running" and not self.engine.leading:
            look = partial(shown_output, execution_id=execution_id, attempt=execution.attempt, now=self.clock.now())
            recent = list[tuple[str, int, bytes]]()
            with contextlib.suppress(Unavailable):  # a disk that is full: the rest can be shown all the same
                for _ in range(3):  # the process that runs it shows its output a moment after it was asked to
                    if recent := await self.store.write(look):
                        break
                    await asyncio.sleep(POLL)
            output = {stream: data.decode("utf-8", "replace") for stream, _, data in recent}
            sizes = {f"{stream}_bytes": total for stream, total, _ in recent}
            execution.output_data = output | sizes | {"truncated": any(total > len(data) for _, total, data in recent)}
        if execution.attempt_started_at is not None and execution.attempt not in {attempt.attempt for attempt in past}:
            of_both = {name: getattr(execution, name) for name in shape_of(Attempt).loaded}
            past.append(Attempt(**{**of_both, "started_at": execution.attempt_started_at}))
        return {**view_of(execution), "caused": caused, "attempts": [view_of(attempt) for attempt in past]}

    @Operation("GET", "/tasks/{id}/history", tool=("read_only",))
    async def get_task_history(self, task_id: int, query: HistoryQuery) -> HistoryPage:
        """List the executions of a task, newest first. How each run ended, with error_message and output. Rows with status
        skipped or missed are slots that ran nothing, and say why. For older ones raise `skip`."""
        times = read_times(dict(query), ("since", "until"), self.settings.scheduler_timezone)
        total, rows = await self.store.scan(lambda db: list_executions(db, query, task_id, **times))
        return dict(total=total, skip=query.skip, limit=query.limit, history=list(map(view_of, rows)))

    @Operation("GET", "/executions", tool=("read_only",))
    async def list_executions(self, query: ExecutionQuery) -> ExecutionPage:
        """List executions, newest first. Over all tasks: what failed, ran or is unfinished. since and until choose what ran in
        between. Older: before_id. Rows with status skipped or missed are slots that ran nothing."""
        times = read_times(dict(query), ("since", "until"), self.settings.scheduler_timezone)
        _, rows = await self.store.scan(lambda db: list_executions(db, query, **times))
        return dict(executions=list(map(view_of, rows)), next_before_id=rows[-1].id if len(rows) == query.limit else None)

    @Operation("POST", "/executions/{id}/cancel", tool=("destructive", "idempotent"), scope="run")
    async def cancel_execution(self, execution_id: int) -> ExecutionView:
        """End an execution. Kills its processes and drops its retries. One that is over already is refused."""

        def write(tx: Transaction) -> str:
            [*found] = cancel_executions(tx.db, {"id = ?": execution_id}, tx.now, "cancelled on request")
            _, _, before = existing(found, "execution", execution_id)
            if before not in UNFINISHED:
                raise Conflict(f"execution {execution_id} is over already: {before}")
            tx.note("cancel", "execution", execution_id, {"status": before}, {"status": "cancelled"})
            follow(tx, end_cancelled(tx, found))
            return before

        if await self.change(write) == "running":
            await self.engine.feed.wait_for(execution_id, 5)
        return await self.get_execution(execution_id)

    @Operation("GET", "/changes")
    async def list_changes(self, query: ChangeQuery) -> ChangePage:
        """List what was changed, newest first: who, by which way, and what differs (secrets are masked)."""
        if isinstance(query.id, str) and query.kind != "task":
            raise InvalidInput(FieldError("id", "key:NAME is only for kind=task"))
        query.id = query.id and await self.task_id(query.id)
        rows = await self.store.scan(partial(list_changes, query=query))
        return dict(changes=[view_of(row) for row in rows], next_before_id=rows[-1].id if len(rows) == query.limit else None)

    @Operation("POST", "/scheduler/pause")
    async def pause_scheduler(self, body: PauseBody) -> StatusView:
        """Stop all firing, also after a restart; with `until` it ends by itself."""
        until = read_times(body, ("until",), self.settings.scheduler_timezone, self.clock.now(), days=False).get("until")
        await self.change(partial(pause_all, paused=True, until=until))
        return await get_scheduler_status(self)

    @Operation("POST", "/scheduler/resume")
    async def resume_scheduler(self) -> StatusView:
        """Fire again, from the next slots on."""
        await self.change(partial(pause_all, paused=False))
        return await get_scheduler_status(self)

    async def backup(self) -> BinaryIO:
        """A consistent copy of the database, as an open file without a name. Raises Unavailable."""
        return await in_daemon(backup, self.store.path, None, lambda: self.engine.stopping)


# --- Use cases that only look, and those of a schedule's slots -------------------------------------------------------


@Operation("POST", "/schedules/preview", tool=("read_only",), scope="read")
async def preview_schedule(service: Service, body: SchedulePreview) -> PreviewView:
    """Show a schedule's words and next slots without storing it. Takes what create_schedule takes, and shows `count` slots from
    `after` (default: now) on."""

    def look(db: DB) -> PreviewView:
        now, given = service.clock.now(), {"task_id": 0, **body}
        count, after = given.pop("count", 5), {"after": given.pop("after", None)}
        schedule = new_schedule(given, now, service.settings)
        check_watched(db, schedule)
        at = read_times(after, after, schedule.zone).get("after", now)
        plan = dataclasses.replace(schedule.plan(), schedule_id=None, dealt_with=at)
        upcoming = upcoming_view(plan.upcoming(at, count), schedule.zone)
        view: PreviewView = dict(description=plan.timing.describe(), notes=notes_of(schedule, now), upcoming=upcoming)
        if schedule.jitter:
            view["note"] = f"slots are shown without jitter; each will start up to {schedule.jitter:g} s later"
        return view

    return await service.store.scan(look)


@Operation("POST", "/schedules/{id}/backfill", 202, scope="run")
async def backfill_schedule(service: Service, schedule_id: int, body: BackfillBody) -> BackfillView:
    """Run the slots of a stretch of the past that have not run. One after the other, oldest first, at most 1000. `dry_run` only
    lists them."""
    find = partial(slots_to_fill, schedule_id=schedule_id, body=body, now=service.clock.now(), settings=service.settings)
    if body.get("dry_run"):
        schedule, slots = await service.store.read(find)
        return dict(slots=upcoming_view(slots, schedule.zone), executions=[])

    def write(tx: Transaction) -> BackfillView:
        schedule, slots = find(tx.db)
        if slots:
            rows = [NewExecution(schedule.task_id, schedule_id, "backfill", t, tx.now, hold=Hold.CATCHUP) for t in slots]
            tx.new_ids += insert_executions(tx.db, rows)
            release_held(tx.db, {schedule.task_id})
            about = {"task_id": schedule.task_id, "from": body["from"], "to": body["to"], "executions": len(slots)}
            tx.note("backfill", "schedule", schedule_id, None, about)
        return dict(slots=upcoming_view(slots, schedule.zone), executions=tx.new_ids)

    return await service.change(write, take_up=False)


async def follow_output(service: Service, execution_id: int) -> AsyncIterator[bytes]:
    """What the attempts of an execution print, as it comes, until it is over. Looks four times a second at bounded output, and
    yields b"": a slow reader misses some of it, and is told so, but is never buffered for. Raises NotFound."""
    engine, store = service.engine, service.store
    lives, sent = dict[int, LiveOutput](), Counter[tuple[int, str]]()  # of the attempts
    while True:
        execution, past = await store.read(partial(get_execution, execution_id=execution_id))
        yield b""
        if active := engine.running.get(execution_id):
            lives[active.run.attempt] = active.live
        for attempt in list[Any]([*past, execution]):
            if live := lives.get(attempt.attempt):
                recent = live.recent()
            elif attempt.status == "running":  # the process that runs it is asked to go on showing it
                look = partial(shown_output, execution_id=execution_id, attempt=attempt.attempt, now=service.clock.now())
                recent = await store.write(look)
            else:
                kept = attempt.output_data or {}
                texts = {"body": output_text(kept)} if "body" in kept else {s: kept.get(s) or "" for s in ("stdout", "stderr")}
                parts = {stream: text.encode() for stream, text in texts.items()}
                recent = [(s, kept[f"{s}_bytes"] if kept.get("truncated") else len(data), data) for s, data in parts.items()]
            for stream, total, data in recent:
                fresh, sent[attempt.attempt, stream] = total - sent[attempt.attempt, stream], total
                if fresh > 0:
                    lost = fresh - len(data)  # of it no longer kept
                    yield data[-fresh:] if lost <= 0 else f"\n[... {lost} bytes left out ...]\n".encode() + data
        if execution.status in FINISHED or engine.stopping:
            return
        await asyncio.sleep(POLL)


@Operation("GET", "/overview")
async def overview(service: Service, query: TaskQuery) -> OverviewPage:
    """List tasks with their recent executions."""
    page = await service.list_tasks(query)

    def read(db: DB) -> list[OverviewTask]:  # in its thread: views of 30,000 executions are no work for the loop
        recent = recent_executions(db, [task["id"] for task in page["tasks"]], 30)
        return [overview_view(task, recent.get(task["id"], [])) for task in page["tasks"]]

    return {**page, "tasks": await service.store.scan(read)}


@Operation("GET", "/upcoming", tool=("read_only",))
async def list_upcoming(service: Service, query: UpcomingQuery) -> UpcomingPage:
    """List what fires next, over all tasks. In order, each schedule as often as it fires, until `until` (default: in 24 h)."""
    now, sent = service.clock.now(), {"until": query.until}
    until = read_times(sent, sent, service.settings.scheduler_timezone, now).get("until", now + DAY)
    found = await service.store.scan(lambda db: firings(next_schedules(db, query, until), until, query.limit))
    return dict(upcoming=[] if service.engine.paused else found)


@Operation("GET", "/scheduler/status", tool=("read_only",))
async def get_scheduler_status(service: Service) -> StatusView:
    """Show the scheduler's state and what comes next. With its time zone, the number of tasks and of unfinished executions, and
    the next five runs."""
    status, caller = await status_of(service), CALLER.get()
    return {**status, "caller": {"name": caller.actor, "scope": caller.scope}} if service.settings.needs_token else status


async def status_of(service: Service) -> StatusView:
    """The state of the scheduler, for whoever looks on."""
    engine, settings = service.engine, service.settings
    (objects, executions), paused_until, paused_by = await service.store.scan(
        lambda db: (counts(db), get_meta(db, "paused_until"), get_meta(db, "paused_by"))
    )
    late = sorted(engine.stats.recent_late)
    p50, p99, most = (late[min(len(late) - 1, len(late) * percent // 100)] if late else None for percent in (50, 99, 100))
    return dict(
        running=not engine.stopping,
        leader=engine.leading,
        paused=engine.paused,
        paused_until=instant_or_none(paused_until) if engine.paused else None,  # the end of a pause may have come meanwhile
        paused_by=paused_by if engine.paused else None,
        timezone=settings.scheduler_timezone,
        now=format_instant(service.clock.now()),
        version=__version__,
        started_at=format_instant(service.started_at),
        tasks=objects["tasks"],
        schedules=objects["schedules"],
        active_schedules=objects["active_schedules"],
        executions=executions,
        queue_length=executions["queued"],
        max_concurrent_runs=settings.max_concurrent_runs,
        next_runs=(await list_upcoming(service, UpcomingQuery(limit=5, until="9999-12-31")))["upcoming"],
        lateness={"count": len(late), "p50": p50, "p99": p99, "max": most},  # in seconds behind the slots
        config_file=service.config_file,
        defaults={name: getattr(settings, name) for name in SHOWN_DEFAULTS},
    )


# --- What a client sent, as the store keeps it ------------------------------------------------------------------------

# For these a date alone will do: the start of that day, or its end.
_DAYS = {"start_at": False, "since": False, "from": False, "end_at": True, "until": True, "to": True}


def read_times(sent: Mapping[str, Any], names: Iterable[str], zone: str, after: int = -1, days: bool = True) -> dict[str, int]:
    """Those of the fields `names` that were sent, and not as null, as instants. Raises InvalidInput that lists every bad one, and
    every one that is not later than `after`. Without `days` a date alone will not do."""
    times, errors = dict[str, int](), list[FieldError]()
    for name in names:
        if (text := sent.get(name)) is not None:
            try:
                times[name] = parse_bound(text, zone, _DAYS[name]) if days and name in _DAYS else parse_instant(text, zone)
                if times[name] <= after:
                    raise ValueError(f"must be in the future (it is now {format_instant(after)})")
            except ValueError as error:
                errors.append(FieldError(name, f"{shown(text)}: {error}"))
    if errors:
        raise InvalidInput(*errors)
    return times


def new_task(body: TaskCreate, now: int, settings: Settings, may_be_over: bool = False) -> Task:
    """A task as `body` describes it, masks kept; with `may_be_over` a pause may have ended. Raises InvalidInput, Forbidden."""
    config = parse_config(body["task_type"], body["config"])
    check_allowed(body["task_type"], config, settings)
    fields = {"max_retries": settings.max_retries, "retry_delay": plain_number(settings.retry_delay), **body, "config": config}
    fields |= read_times(body, shape_of(Task).times, settings.scheduler_timezone, -1 if may_be_over else now)
    fields.pop("schedules", None)
    task = Task(**fields, created_at=now, updated_at=now)
    if may_be_over and task.status == "paused" and task.paused_until is not None and task.paused_until <= now:
        task.status, task.paused_until = "active", None
    return task


def new_schedule(body: ScheduleCreate, now: int, settings: Settings, may_be_over: bool = False) -> Schedule:
    """A schedule as `body` describes it, placed before its first slot after now."""
    overlap = defaults_of(Schedule, body["schedule_type"])["overlap"]
    fields = _fields_of({"overlap": overlap, **body}, None, 0 if may_be_over else now, settings.scheduler_timezone)
    schedule = Schedule(**fields, created_at=now, updated_at=now, settled_until=now, dealt_with=now, in_force_since=now)
    if schedule.schedule_type != "after" or schedule.plan().end_at < now:  # else it looks at other tasks first
        schedule.look_ahead()
        if schedule.next_slot is None and not may_be_over:
            raise InvalidInput(_nothing_left(schedule))
    return schedule


def defaults_of(resource: Any, schedule_type: Any) -> dict[str, Any]:
    """Of the fields of a resource; schedules of type `after` have their own."""
    own = {"overlap": "allow", **dict.fromkeys(NOT_OF_AFTER)} if schedule_type == "after" else {}
    return shape_of(resource).defaults | own


def _fields_of(sent: dict[str, Any], stored: Schedule | None, now: int, zone: str) -> dict[str, Any]:
    """What was sent of a schedule, new or `stored`, as the store keeps it. Raises InvalidInput that lists every bad field."""
    errors, fields = list[FieldError](), dict(sent)
    was_type, was = (None, {}) if stored is None else (stored.schedule_type, stored.schedule_config)
    schedule_type, config = cast(Any, sent.get("schedule_type", was_type)), sent.get("schedule_config", was)
    after, same = schedule_type == "after", schedule_type == was_type
    if not same and "schedule_config" not in sent:
        raise InvalidInput(FieldError("schedule_config", f"must be sent too: schedule_type changes to {schedule_type}"))
    if not same or config != was:
        config = {}
        with told_at("", errors):
            kept = was.get("timezone", zone) if same else zone
            fields["schedule_config"] = config = check_schedule_config(schedule_type, sent["schedule_config"], kept, now)
    for name in [name for name in sent if name in NOT_OF_AFTER and after != (sent[name] is None)]:
        errors.append(FieldError(name, "must be null: a schedule of type after has none" if after else "must not be null"))
    with told_at("", errors):
        fields |= read_times(sent, shape_of(Schedule).times, config.get("timezone", zone))
        start, end = (fields.get(name, getattr(stored, name, None)) for name in ("start_at", "end_at"))
        if start is not None and end is not None and end < start:
            raise InvalidInput(FieldError("end_at", "must not be before start_at"))
    if errors:
        raise InvalidInput(*errors)
    return fields | ({name: copy.copy(shape_of(Schedule).defaults[name]) for name in NOT_OF_AFTER} if after else {})


def _nothing_left(schedule: Schedule) -> FieldError:
    """Why a schedule has no slot to come, told at the field that would change it."""
    if schedule.max_runs is not None and schedule.run_count >= schedule.max_runs:
        return FieldError("max_runs", f"{schedule.max_runs} runs are reached: no slot is left; raise max_runs, or set it to null")
    if schedule.schedule_type == "after" and schedule.plan().end_at >= schedule.settled_until:
        return FieldError("schedule_config.task_ids", "none of these tasks exists any more: name others")
    of_type = "schedule_config.datetime" if schedule.schedule_type == "once" else "schedule_config"
    field = next((name for name in ("end_at", "start_at", "exclude") if getattr(schedule, name) not in (None, [])), of_type)
    return FieldError(field, "no slot is left after now: change it")


# --- Transactions -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Transaction(Tick):
    """A change on its way to the disk: who makes it, and what is to be told once it is there."""

    caller: Caller = _MYSELF
    lines: list[str] = dataclasses.field(default_factory=list)  # for the log

    def put(self, item: Task | Schedule, seen: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes a task or schedule with its audit row, and returns its view. `seen` is its view before; None: it is new."""
        if isinstance(item, Task) and item.paused_until is not None and item.status != "paused":
            raise InvalidInput(FieldError("paused_until", "is only for a task with status paused"))
        kind = type(item).__name__.lower()
        others = {"deleted = 0": True} if isinstance(item, Task) else {"task_id = ?": item.task_id}
        same = {"key = ?": item.key, "id <> ?": item.id, **others}
        if item.key is not None and (taken := ids_of(self.db, f"{kind}s", same)):
            raise Conflict(f"key: {kind} {taken[0]} has the key {item.key} already")
        if isinstance(item, Task) and item.status != (seen or {"status": "active"})["status"]:
            by = "on request" if self.caller.actor == "-" else f"by {self.caller.actor}"
            reason = f"{item.status} {by}, {format_instant(self.now // SECOND * SECOND)}"
            item.status_reason = None if item.status == "active" else reason
        if seen is None:
            insert(self.db, item)
        else:
            item.updated_at = self.now
            update(self.db, item)
        view = view_of(item)
        self.note("create" if seen is None else "update", kind, item.id, seen, view)
        return view

    def note(
        self, operation: str, kind: str, object_id: int | None, before: dict[str, Any] | None, after: dict[str, Any] | None
    ) -> None:
        """Writes who has changed what, if anything was. `before` and `after` are views, so masked already."""
        old, new = _differences(before or {}, after or {})
        if operation == "update" and not old and not new:
            return
        kept, by = (before and _kept(old), after and _kept(new)), self.caller
        put_row(self.db, "changes", None, self.now, by.actor, by.via, kind, object_id, operation, *kept)
        what = f" {object_id}" * bool(object_id) + f" ({', '.join({**old, **new})})" * bool(before and after)
        self.lines.append(f"{operation} {kind}{what} by {by.actor} via {by.via}")


def _differences(before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What differs, as it is in both."""
    names = [n for n in {**before, **after} if before.get(n) != after.get(n) and n != "updated_at"]
    old, new = {n: before[n] for n in names if n in before}, {n: after[n] for n in names if n in after}
    for name in names:
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            old[name], new[name] = _differences(old[name], new[name])
    return old, new


def _kept(view: dict[str, Any]) -> str:
    """JSON text in which long fields are cut."""
    texts = {name: text for name, value in view.items() if len(text := compact(value)) > CHANGE_TEXT}
    return compact(view | {name: f"{text[:CHANGE_TEXT]}… ({len(text)} characters)" for name, text in texts.items()})


def change_task(tx: Transaction, task: Task, changes: Mapping[str, Any], at: int | None = None) -> None:
    """`at`: when a pause has ended that this ends; now, if nothing is said."""
    before, until, seen, config = task.status, task.paused_until, view_of(task), task.config
    for name, value in changes.items():
        setattr(task, name, value)
    if task.paused_until == until and task.status != "paused":
        task.paused_until = None
    if task.status == "active" != before:
        task.failures_in_a_row = 0
    if task.config != config and view_of(task)["config"] == seen["config"]:
        seen["config"] = MASK  # only what is masked differs: the audit row names the configuration all the same
    tx.put(task, seen)
    if task.status != before and "disabled" in (before, task.status):
        hold_disabled(tx.db, task.id, task.status == "disabled")
    if task.status != before and task.status == "active":
        _resume(tx, {"s.is_active": True, "s.task_id = ?": task.id}, at)


def remove_task(tx: Transaction, task_id: int) -> None:
    tx.note("delete", "task", task_id, view_of(get_task(tx.db, task_id)), None)
    mark_deleted(tx.db, task_id)


def add_schedule(tx: Transaction, schedule: Schedule) -> int:
    """Writes a new schedule, and returns its id. Raises InvalidInput, NotFound, Conflict."""
    schedule.task_name = get_task(tx.db, schedule.task_id).name
    check_watched(tx.db, schedule)
    tx.put(schedule)
    if schedule.jitter:  # it is derived from the id, which is known only now
        schedule.look_ahead()
        update(tx.db, schedule)
    return schedule.id


def change_schedule(tx: Transaction, schedule_id: int, fields: Mapping[str, Any], may_be_over: bool = False) -> None:
    """Raises InvalidInput if nothing is left to fire, unless it `may_be_over`."""
    db, now, schedule = tx.db, tx.now, get_schedule(tx.db, schedule_id)
    changes = {name: value for name, value in fields.items() if value != getattr(schedule, name)}
    if schedule.over and fields.get("is_active") is False:  # so far nobody had switched it off
        changes["is_active"] = False
    wanted = changes.get("is_active")
    due = schedule.next_slot is not None and schedule.next_slot <= now and not get_meta(db, "paused")
    if due and wanted is not False and changes.keys() & {*TIMING_FIELDS, "max_runs"}:
        # An edit loses no slot: one that has come starts now, as it was, even if its jitter has not passed.
        follow(tx, claim_due(tx, schedules_that(db, {LIVE_SQL: True, "s.id = ?": schedule_id}), early=True))
        schedule = get_schedule(db, schedule_id)
    resumed, retimed = bool(wanted) and not schedule.is_active, bool(changes.keys() & TIMING_FIELDS)
    seen, missed = view_of(schedule), None
    for name, value in changes.items():
        setattr(schedule, name, value)
    schedule.over = schedule.over and wanted is None  # else somebody has said whether it shall fire
    if changes.keys() & {"schedule_config", "exclude"}:
        check_watched(db, schedule)
        # Of a stretch in a future that did not come only the last is known to be a slot which ran: now others may lie in it.
        schedule.ran = [[first if last <= now else last, last] for first, last in schedule.ran]
    if retimed or schedule.over:
        go_on(schedule, now)
    elif resumed and (missed := resume_schedule(schedule, now)):
        follow(tx, write_claim(tx, Claim(now, rows=[missed])))
    elif schedule.max_runs is not None and schedule.run_count >= schedule.max_runs:
        schedule.look_ahead()
    nothing = schedule.over if schedule.schedule_type == "after" else schedule.next_slot is None
    if nothing and (retimed or resumed) and not missed and not may_be_over:
        raise InvalidInput(_nothing_left(schedule))
    tx.put(schedule, seen)


def remove_schedule(tx: Transaction, schedule_id: int) -> None:
    schedule = get_schedule(tx.db, schedule_id)
    queued = {UNFINISHED_SQL: True, "task_id = ?": schedule.task_id, "schedule_id = ?": schedule_id, "status = 'queued'": True}
    found = cancel_executions(tx.db, queued, tx.now, "cancelled: its schedule was deleted")
    delete_schedule(tx.db, schedule_id)
    tx.note("delete", "schedule", schedule_id, view_of(schedule), None)
    follow(tx, end_cancelled(tx, found))


def check_watched(db: DB, schedule: Schedule) -> None:
    """Makes ids of the keys that an `after` schedule names, looks at these tasks, and at what comes next. Raises InvalidInput."""
    if schedule.schedule_type != "after":
        return
    tasks: dict[int, Task] = {}
    for place, named in enumerate(schedule.schedule_config.get("task_ids", ())):
        try:
            task = get_task(db, task_of_key(db, named.removeprefix("key:")) if isinstance(named, str) else named)
        except NotFound as error:
            raise InvalidInput(FieldError(f"schedule_config.task_ids[{place}]", error.detail)) from None
        tasks[task.id] = task
    if tasks:
        schedule.schedule_config = {**schedule.schedule_config, "task_ids": list(tasks)}
        schedule.watched = [[task.id, task.name, task.last_success, task.last_success_id] for task in tasks.values()]
        if schedule.task_id and (circle := find_circle(after_edges(db, schedule.id), schedule.task_id, tasks.keys())):
            names = [get_task(db, task_id).name for task_id in [circle[-1], *circle]]
            raise InvalidInput(FieldError("schedule_config.task_ids", f"must not be a circle: {' → '.join(names)}"))
    schedule.look_ahead()


def _resume(tx: Transaction, conditions: Mapping[str, Any], at: int | None) -> None:
    """After a pause that has ended at `at`, which may be a while ago: slots since then were missed as any others."""
    for schedule in schedules_that(tx.db, conditions):
        with contextlib.suppress(*DAMAGE):
            missed = resume_schedule(schedule, tx.now if at is None else max(at, min(schedule.in_force_since, tx.now)))
            update(tx.db, schedule)
            if missed:
                follow(tx, write_claim(tx, Claim(tx.now, rows=[missed])))


def pause_all(tx: Transaction, paused: bool, until: int | None = None, at: int | None = None) -> None:
    """`at`: when a pause has ended that this ends; now, if nothing is said."""
    db = tx.db
    before = {"paused": bool(get_meta(db, "paused")), "paused_until": instant_or_none(get_meta(db, "paused_until"))}
    set_meta(db, "paused", int(paused))
    set_meta(db, "paused_until", until)
    set_meta(db, "paused_by", tx.caller.actor if paused else None)
    after = {"paused": paused, "paused_until": instant_or_none(until)}
    tx.note("pause" if paused else "resume", "scheduler", None, before, after)
    if before["paused"] and not paused:
        _resume(tx, {LIVE_SQL: True}, at)
    set_meta(db, "rev", get_meta(db, "rev") + 1)


def end_pauses(tx: Transaction) -> None:
    """Ends the pauses whose time has come, as a resume at that time."""
    tx.caller = Caller(via="timer")
    for task in tasks_that(tx.db, {"paused_until <= ?": tx.now, "status = 'paused'": True, "deleted = 0": True}):
        change_task(tx, task, {"status": "active"}, at=task.paused_until)
    if (until := get_meta(tx.db, "paused_until")) is not None and until <= tx.now:
        pause_all(tx, False, at=until)


def runnable_task(db: DB, task_id: int, settings: Settings) -> Task:
    """A task that somebody may run. Raises NotFound, Conflict, Forbidden."""
    task = get_task(db, task_id)
    if task.status == "disabled":
        raise Conflict(f"task {task.id} is disabled: set its status to active or paused first")
    if task.task_type == "bash" and not settings.allow_host_commands:
        raise Forbidden("bash tasks are forbidden here: CHRONOTASK_ALLOW_HOST_COMMANDS is false")
    return task


def queue_execution(tx: Transaction, row: NewExecution, override: dict[str, Any] | None) -> Execution:
    """Writes an execution that somebody asks for. Raises NotFound, Conflict, Forbidden, InvalidInput."""
    settings, task = tx.settings, runnable_task(tx.db, row.task_id, tx.settings)
    if override:
        config = override_config(task.task_type, task.config, override)
        check_allowed(task.task_type, config, settings)
        kept = {name: config.get(name) for name in override}
        if mask_config(kept) != kept:  # what it keeps secret is for this server, wherever the task is moved to
            kept["url"] = config["url"]
        row.config = compact(kept)
    of_after = {"s.task_id = ?": task.id, "s.schedule_type = 'after'": True}
    if row.trigger == "manual" and ("${cause:" in f"{task.config} {row.config}" or schedules_that(tx.db, of_after)):
        row.cause = compact(sample_cause(task, tx.now, settings))
    execution = get_execution(tx.db, insert_executions(tx.db, [row])[0])[0]
    tx.new_ids.append(execution.id)
    about = {"task_id": task.id, "task_name": task.name, "rerun_of": row.rerun_of, "config": view_of(execution)["config"]}
    tx.note("execute" if row.trigger == "manual" else row.trigger, "execution", execution.id, None, about)
    return execution


def slots_to_fill(db: DB, schedule_id: int, body: Mapping[str, Any], now: int, settings: Settings) -> tuple[Schedule, list[int]]:
    """A schedule, and its slots in the stretch that is asked for which have no execution that ran or will."""
    schedule = get_schedule(db, schedule_id)
    runnable_task(db, schedule.task_id, settings)
    if schedule.schedule_type == "after":
        raise InvalidInput(FieldError("", "a schedule of type after has no slots"))
    times = read_times(body, ("from", "to"), schedule.zone)
    if wrong := [FieldError(name, f"must be past (it is now {format_instant(now)})") for name, t in times.items() if t > now]:
        raise InvalidInput(*wrong)
    first, last = times["from"], times["to"]
    if first > last:
        raise InvalidInput(FieldError("from", "must not be after to"))
    if schedule.is_active and schedule.live and not get_meta(db, "paused"):
        last = min(last, schedule.settled_until)  # what comes after that is about to be claimed
    span = {"schedule_id = ?": schedule.id, "scheduled_for >= ?": first, "scheduled_for <= ?": last}
    ran = {*ids_of(db, "executions", {**span, "(started_at IS NOT NULL OR finished_at IS NULL)": True}, "scheduled_for")}
    excluded = [span_of(days, schedule.zone) for days in schedule.exclude]
    plan = dataclasses.replace(schedule.plan(), remaining=math.inf, ran=excluded)
    unrun = (slot for slot in itertools.takewhile(lambda slot: slot <= last, plan.slots(first - 1)) if slot not in ran)
    if len(slots := list(itertools.islice(unrun, MOST_BACKFILL + 1))) > MOST_BACKFILL:
        raise InvalidInput(FieldError("to", f"there are more than {MOST_BACKFILL} slots up to it: ask for a shorter stretch"))
    return schedule, slots


# ======================================================================================================================
# 12. Files
# ======================================================================================================================
#
# Definitions in a file. Tasks and schedules are known by their keys, their fields are those of REST.

MAX_FILE = 8 * 2**20
CONFIG_POLL = 0.5  # seconds


def slug(text: str, taken: Collection[str], number: int = 2) -> str:
    """A key made of `text`, if need be with a number from `number` on, none of those `taken`."""
    base = re.sub("[^a-z0-9_]+", "-", text.lower()[:50]).strip("-_") or "task"
    return base if base not in taken else next(k for n in itertools.count(number) if (k := f"{base}-{n}") not in taken)


def load_json(raw: bytes, what: str = "the body") -> Any:
    """The value of JSON text from outside. Raises MalformedBody."""
    try:
        return from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBody(f"{what} is not valid JSON: {error}") from None


# --- TOML -------------------------------------------------------------------------------------------------------------


def to_toml(definitions: Mapping[str, Any], comments: Mapping[str, Sequence[str]]) -> str:
    """Definitions as TOML. `comments` are lines for the head (under "") and for each task. Raises InvalidInput for a null."""
    lines = [f"{name} = {_toml(value, name)}" for name, value in definitions.items() if name != "tasks"]
    lines += [f"# {line}" for line in comments.get("", ())]
    for key, task in definitions["tasks"].items():
        tables, told = {f"tasks.{_toml_key(key)}": task}, comments.get(key, ())
        tables |= {f"tasks.{_toml_key(key)}.schedules.{_toml_key(name)}": s for name, s in task.get("schedules", {}).items()}
        for table, fields in tables.items():
            lines += ["", *(f"# {line}" for line in told), f"[{table}]"]
            lines += [f"{name} = {_toml(value, f'{table}.{name}')}" for name, value in fields.items() if name != "schedules"]
            told = ()
    return "\n".join(lines) + "\n"


def _toml(value: Any, path: str) -> str:
    if isinstance(value, dict):
        inside = (f"{_toml_key(name)} = {_toml(item, f'{path}.{name}')}" for name, item in value.items())
        return f"{{ {', '.join(inside)} }}" if value else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_toml(item, f'{path}[{i}]') for i, item in enumerate(value))}]"
    if value is None:
        raise InvalidInput(FieldError(path, "is null, which TOML does not have: export JSON instead"))
    if not isinstance(value, str):
        return compact(value)
    if "'" not in value and value.isprintable():
        return f"'{value}'" if '"' in value or "\\" in value else f'"{value}"'
    lines = [json.dumps(line, ensure_ascii=False)[1:-1].replace("\x7f", r"\u007f") for line in value.split("\n")]
    return f'"{lines[0]}"' if len(lines) == 1 else '"""\n' + "\n".join(lines) + '"""'


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False).replace("\x7f", r"\u007f")


# --- The model of a file ----------------------------------------------------------------------------------------------


_Definitions: dict[str, Any] = {
    "chronotask": Annotated[Literal[1], Field(description="version of the format")],
    "owner": NotRequired[Annotated[Key, Field(description="who manages what is in it; default: file")]],
    "adopt": NotRequired[Annotated[bool, Field(description="take over what belongs to nobody or to another owner")]],
    "tasks": NotRequired[
        Annotated[
            dict[Key, dict[str, Any]],
            Field(description="by key: the fields of POST /tasks (name: default the key), and schedules, by key too"),
        ]
    ],
    "warnings": NotRequired[Annotated[list[str], Field(description="what an export says of itself")]],
}
DefinitionFile = Annotated[dict[str, Any], Body(None, "DefinitionFile", **_Definitions)]
_Schedules = NotRequired[dict[Key, dict[str, Any]]]
_FileTask = Annotated[dict[str, Any], Body(Task, "FileTask", without=("key",), name=NotRequired[Name], schedules=_Schedules)]
_FileSchedule = Annotated[dict[str, Any], Body(Schedule, "FileSchedule", without=("key", "task_id"))]
# A change: action (created, updated, orphaned, paused or deleted), kind, key (of a schedule TASK/KEY), id, fields, upcoming.
Applied = Annotated[dict[str, Any], View(None, "Applied", changes=list[dict[str, Any]], warnings=list[str])]


class ApplyQuery(Query):
    dry_run: bool = False
    prune: Literal["pause", "delete"] | None = None


class ExportQuery(Query):
    owner: Key | None = None


def read_file(name: str) -> bytes:
    """What is in a file of definitions or crontab (-: standard input). Raises InvalidInput."""
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
            raw = file.read(MAX_FILE + 1)
    except OSError as error:
        raise InvalidInput(FieldError(name or "''", f"cannot be read: {error.strerror}")) from None
    if len(raw) > MAX_FILE:
        raise InvalidInput(FieldError(name, f"is larger than {MAX_FILE >> 20} MiB"))
    return raw


def read_definitions(name: str, raw: bytes | None = None) -> Any:
    """A file, TOML or JSON, not checked: `raw`, or that of this name (-: standard input). Raises InvalidInput, MalformedBody."""
    raw = (read_file(name) if raw is None else raw).removeprefix(codecs.BOM_UTF8)
    try:
        if not raw.lstrip().startswith(b"{"):
            raw = json.dumps(tomllib.loads(raw.decode()), default=lambda time: time.isoformat()).encode()
        return load_json(raw, f"{name}:")
    except (ValueError, RecursionError) as error:
        raise InvalidInput(FieldError(name, f"is no TOML: {error}")) from None


def _in_file(key: str) -> str:
    return f"tasks.{key.replace('/', '.schedules.')}."


def _refuse(errors: Sequence[FieldError]) -> None:
    if errors:
        told = [FieldError(path.replace("schedule_config.task_ids", "schedule_config.tasks"), why) for path, why in errors]
        raise InvalidInput(*told)


def check_definitions(service: Service, file: Mapping[str, Any], now: int) -> dict[str, tuple[Any, Collection[str]]]:
    """New tasks by KEY and schedules by TASK/KEY, with the fields that the file names. Raises InvalidInput with all bad paths."""
    errors, found = list[FieldError](), dict[str, tuple[Any, Collection[str]]]()
    for key, body in file["tasks"].items():
        with told_at(_in_file(key), errors):
            fields = {"name": key, "key": key, **parse(_FileTask, body)}
            found[key] = new_task(fields, now, service.settings, may_be_over=True), body
        parts = body.get("schedules")
        for name, part in parts.items() if isinstance(parts, dict) and all(isinstance(p, dict) for p in parts.values()) else ():
            with told_at(_in_file(f"{key}/{name}"), errors):
                config = part.get("schedule_config")
                if isinstance(config, dict) and "in_seconds" in config:
                    raise InvalidInput(FieldError("schedule_config.in_seconds", "is no fixed time in a file: write a datetime"))
                if isinstance(config, dict) and "tasks" in config and "task_ids" not in config:  # keys, where REST has ids
                    keys = [f"key:{task}" for task in config["tasks"]] if isinstance(config["tasks"], list) else config["tasks"]
                    part = {**part, "schedule_config": {"task_ids": keys, **{n: v for n, v in config.items() if n != "tasks"}}}
                fields = {"key": name, "task_id": 0, **parse(_FileSchedule, part)}
                found[f"{key}/{name}"] = new_schedule(fields, now, service.settings, may_be_over=True), part
    _refuse(errors)
    return found


# --- Apply ------------------------------------------------------------------------------------------------------------


def _standing(db: DB) -> dict[str, Any]:
    """All tasks by KEY and then all schedules by TASK/KEY; those without a key by one made of their name or type."""
    found: dict[str, Any] = {}
    tasks, schedules = tasks_that(db, {"NOT deleted": True}), schedules_that(db, {"NOT t.deleted": True})
    groups, before = {0: list[Any](tasks)}, {0: ""}  # tasks, and the schedules of each; what stands before their keys
    for schedule in schedules:
        groups.setdefault(schedule.task_id, []).append(schedule)
    for under, items in groups.items():
        taken = {item.key for item in items}
        for item in sorted(items, key=operator.attrgetter("id")):
            key = item.key or slug(item.schedule_type if under else item.name, taken, item.id)
            taken.add(key)
            found[before[under] + key] = item
            before.setdefault(item.id, f"{key}/")
    return found


class _Apply:
    """One transaction, in which what stands becomes what a file wants."""

    def __init__(self, tx: Transaction, file: Mapping[str, Any], prune: str | None) -> None:
        self.tx, self.owner, self.adopt, self.prune = tx, file["owner"], file["adopt"], prune
        self.standing = _standing(tx.db)
        self.changes: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.refused: list[FieldError] = []

    def run(self, wanted: Mapping[str, tuple[Any, Collection[str]]]) -> None:
        left, errors, gone = dict(wanted), list[FieldError](), set[str]()
        for key, item in self.standing.items():
            if item.managed_by == self.owner and key not in wanted and key.rpartition("/")[0] not in gone:
                gone.add(key)  # its schedules go with it
                stop: dict[str, Any] = {"is_active": False}
                if isinstance(item, Task):  # a pause gets no end by itself; what is disabled stays so
                    stop = {} if item.status == "disabled" else {"status": "paused", "paused_until": None}
                stop = {name: value for name, value in stop.items() if self.prune == "pause" and getattr(item, name) != value}
                self._do("deleted" if self.prune == "delete" else "paused" if stop else "orphaned", key, item, stop)
        # All tasks first, since schedules may name any of them; and what was a circle may be none after the other changes.
        for kind in itertools.chain([Task], itertools.repeat(Schedule)):
            before = len(left)
            errors.clear()
            for key in [key for key, (item, _) in left.items() if isinstance(item, kind)]:
                with told_at(_in_file(key), errors):
                    self._put(key, copy.copy(wanted[key][0]), wanted[key][1])
                    del left[key]
            if kind is Task:
                _refuse(errors)
            elif len(left) in (0, before):
                break
        if self.refused:  # first: who watches such a task finds none of this key
            detail = "; ".join(f"{path}: {message}" for path, message in self.refused)
            raise Conflict(f"{detail}. With adopt = true the file takes it over.", self.refused)
        _refuse(errors)
        if any(change["action"] != "orphaned" for change in self.changes):
            set_meta(self.tx.db, f"applied:{self.owner}", self.tx.now)

    def _put(self, key: str, item: Any, given: Collection[str]) -> None:
        """Makes a task or schedule what the file wants. What it does not change is not written."""
        path, task, stored = _in_file(key)[:-1], isinstance(item, Task), cast(Any, self.standing.get(key))
        item.id, item.managed_by = stored.id if stored is not None else 0, self.owner
        if task:
            same = stored is not None and stored.task_type == item.task_type
            item.config = unmask_config(item.task_type, item.config, stored.config if same else {})
        else:
            item.task_id = self.standing[key.partition("/")[0]].id
            check_watched(self.tx.db, item)
        wanted = {name: getattr(item, name) for name in shape_of(cast(Any, type(item))).written}
        if stored is None and not task and item.over:
            self.warnings.append(f"{path}: its time has passed: it is over, and not created")
        elif stored is None:
            self._do("created", key, item, wanted)
            self.standing[key] = item
        elif stored.managed_by != self.owner and not self.adopt:
            whose = f"belongs to {stored.managed_by}" if stored.managed_by else "was not made by a file"
            self.refused.append(FieldError(path, f"{type(stored).__name__.lower()} {stored.id} {whose}"))
        else:
            left = set[str]() if "status" in given else {"status", "paused_until"}  # these stay as they are
            if "is_active" not in given or item.over or item.is_active == (stored.is_active or stored.over):
                left.add("is_active")  # one that is over was not switched off
            wanted = {name: value for name, value in wanted.items() if name not in left}
            changes = {n: value for n, value in wanted.items() if n == "is_active" or value != getattr(stored, n)}
            if stored.managed_by != self.owner:
                changes["managed_by"] = self.owner
            elif changes and stored.updated_at > (get_meta(self.tx.db, f"applied:{self.owner}") or 0):
                drift = f"was changed by other means on {format_instant(stored.updated_at)}: {', '.join(changes)}"
                self.warnings.append(f"{path}: {drift} as in the file again")
            if changes:
                self._do("updated", key, stored, changes)

    def _do(self, action: str, key: str, item: Any, changes: Mapping[str, Any]) -> None:
        """Does to a task or schedule what `action` says, and notes it."""
        task, new, kind = isinstance(item, Task), action == "created", cast(Any, type(item))
        before = shape_of(kind).defaults if new else view_of(item)
        if action == "deleted":
            (remove_task if task else remove_schedule)(self.tx, item.id)
        elif new:
            self.tx.put(item) if task else add_schedule(self.tx, item)
        elif changes:
            change_task(self.tx, item, changes) if task else change_schedule(self.tx, item.id, changes, may_be_over=True)
        item = get_schedule(self.tx.db, item.id) if changes and not task else item
        after, upcoming = view_of(item), list[dict[str, Any]]()
        fields = {n: [None if new else before.get(n), after[n]] for n in changes if not new or after[n] != before.get(n)}
        if fields and not task and item.is_active and item.live:
            upcoming = upcoming_view(item.plan().upcoming(item.settled_until, 5), item.zone)
        change = {"action": action, "kind": kind.__name__.lower(), "key": key, "id": item.id, "fields": fields}
        self.changes.append({**change, "upcoming": upcoming})


class _Undone(Exception):
    """Takes a dry run back, and brings what it would have done."""


@Operation("POST", "/apply", tool=("destructive", "idempotent"))
async def apply_definitions(service: Service, query: ApplyQuery, body: DefinitionFile) -> Applied:
    """Make tasks and schedules what a file says, in one transaction. As it stands in a file: chronotask = 1,
    [tasks.KEY] task_type = "bash", config = {command = "…"}, [tasks.KEY.schedules.KEY] schedule_type = "cron", schedule_config =
    {expression = "30 2 * * *"}. Tasks that it no longer names go on unless prune says otherwise. Try dry_run first."""
    file, now = {"owner": "file", "adopt": False, "tasks": {}, **body}, service.clock.now()
    wanted = await in_daemon(check_definitions, service, file, now)

    def write(tx: Transaction) -> _Apply:
        made = _Apply(tx, file, query.prune)
        made.run(wanted)
        if query.dry_run:
            raise _Undone(made)
        return made

    try:
        done = await service.change(write)
    except _Undone as undone:
        (done,) = undone.args
        for change in done.changes:
            change["id"] = None if change["action"] == "created" else change["id"]
    return {"changes": done.changes, "warnings": done.warnings}


def told(applied: Applied) -> str:
    """An answer for people, a line each."""
    lines = []
    for change in applied["changes"]:
        upcoming = f", next {change['upcoming'][0]['local']}" if change["upcoming"] else ""
        lines.append(f"{change['action']} {change['kind']} {change['key']}{upcoming}")
        if change["action"] != "created":
            lines += [f"    {name}: {compact(old)} -> {compact(new)}" for name, (old, new) in change["fields"].items()]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in applied["warnings"])])


@Operation("GET", "/export")
async def export_definitions(service: Service, query: ExportQuery) -> DefinitionFile:
    """Show all tasks and schedules, or those of an owner, as a file that can be applied. Fields with their default are left
    out, and schedules that are over. Those without a key get one from their name."""

    def export(db: DB) -> DefinitionFile:
        found, tasks, warnings = _standing(db), dict[str, Any](), list[str]()
        keys = {item.id: key for key, item in found.items() if isinstance(item, Task)}
        for key, item in found.items():
            task, _, name = key.partition("/")
            with contextlib.suppress(*DAMAGE):
                if name:  # one whose time has passed is over, though nothing has noticed it during a pause
                    item.stand(max(item.settled_until, service.clock.now()))
                    item.look_ahead()
            if query.owner not in (None, item.managed_by) or (name and (task not in tasks or item.over)):
                continue
            view, kind = view_of(item), cast(Any, type(item))
            defaults = defaults_of(kind, view.get("schedule_type"))
            said = {n: view[n] for n in shape_of(kind).written if n != "key" and view[n] != defaults.get(n)}
            if name:
                tasks[task].setdefault("schedules", {})[name] = said
                if ids := said["schedule_config"].pop("task_ids", None):
                    said["schedule_config"] = {"tasks": [keys[i] for i in ids if i in keys], **said["schedule_config"]}
                continue
            tasks[key] = said
            if view["config"] != item.config:
                warnings.append(f"tasks.{key}.config: holds {MASK} instead of a secret: write ${{env:{SECRET_PREFIX}…}} for it")
        file = {"chronotask": 1, "owner": query.owner, "tasks": tasks, "warnings": warnings}
        return {name: value for name, value in file.items() if value or name == "tasks"}

    return await service.store.scan(export)


# --- --config: a file that is followed --------------------------------------------------------------------------------


class ConfigFile:
    """A file that is applied while this process leads: at the start, when it has changed, and after `reload`."""

    def __init__(self, service: Service, path: Path) -> None:
        self.service, self.path = service, path
        self.state = service.config_file = {"path": str(path), "applied_at": None, "error": None}
        self._seen: Any = None
        self._dealt_with: Any = None

    def reload(self) -> None:
        self._dealt_with = None

    async def begin(self) -> None:
        """Checks the file, applies it if this process leads, and follows it. Raises what is wrong with it."""
        self._seen, leading = self._identity(), self.service.engine.leading
        await self._apply(ApplyQuery(dry_run=not leading))
        self._dealt_with = self._seen if leading else None
        self.service.engine.spawn(self.service.keep("configuration file", self._look))

    def _identity(self) -> Any:
        """Of what the path leads to now: an editor writes another file, Kubernetes turns a link, somebody lets us read it."""
        try:
            found = self.path.stat()
        except OSError as error:
            return error.errno
        return found.st_dev, found.st_ino, found.st_ctime_ns, found.st_size

    async def _look(self) -> None:
        await asyncio.sleep(CONFIG_POLL)
        engine, before, self._seen = self.service.engine, self._seen, self._identity()
        if not engine.leading:
            self.reload()
        elif before == self._seen != self._dealt_with and not engine.stopping:  # nobody is writing it any more
            self._dealt_with = self._seen
            try:
                await self._apply(ApplyQuery())
            except ChronoTaskError as error:
                if self.state["error"] != error.detail:
                    logger.error("%s is not applied, everything stays as it was: %s", self.path, error.detail)
                self.state["error"] = error.detail
                if isinstance(error, Unavailable):
                    self.reload()

    async def _apply(self, query: ApplyQuery) -> None:
        before = CALLER.set(Caller(via=f"file {self.path}"))
        try:
            if self.path.exists() and not self.path.is_file():  # reading a pipe may last for ever, and once only
                raise InvalidInput(FieldError(f"--config={shown(str(self.path))}", "must be a regular file"))
            sent = await in_daemon(read_definitions, str(self.path.absolute()))
            applied = await apply_definitions(self.service, query, parse(DefinitionFile, sent))
        finally:
            CALLER.reset(before)
        if not query.dry_run:
            self.state |= {"applied_at": format_instant(self.service.clock.now()), "error": None}
            left = [change["key"] for change in applied["changes"] if change["action"] == "orphaned"]
            for warning in [*applied["warnings"], *(f"{key} is not in it any more, and stays" for key in left)]:
                logger.warning("%s: %s", self.path, warning)


# --- The way in from a crontab ----------------------------------------------------------------------------------------
#
# What the cron of Debian 12 (3.0pl1-162, crontab(5)) makes of the same lines, also where the page does not say it.

_CRON_SETTING = re.compile(r"""(['"]?)([^\s='"]+)\1\s*=\s*(\S.*)""", re.ASCII | re.DOTALL)
_CRON_COMMAND = re.compile(r"((?:[^\\%]|\\.?)*)(?:%(.*))?", re.DOTALL)
_NOT_OF_CRON = re.compile(r"(?:^|[ ,])(?:l|[0-9a-z]+/)|#|(?<!0)-0+(?![0-9])|(?<!sun)-sun|^@.*(?-i:[A-Z])", re.IGNORECASE)
# What bash and every /bin/sh do alike: a program, its words, files for its output.
_PLAIN_COMMAND = re.compile(r"/[A-Za-z0-9_./-]+(?: +[A-Za-z0-9_./:=@,+-]+)*(?: +(?:2>&1|2?>>? *[A-Za-z0-9_./-]+))*")


def read_crontab(text: str, system: bool, user: pwd.struct_passwd, zone: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Tasks of a crontab of `user` (with `system`: in its user column), comments for `to_toml`. InvalidInput names bad lines."""
    tasks, mail, errors, comments = dict[str, Any](), dict[str, list[str]](), list[FieldError](), {"": list[str]()}
    env = {"SHELL": "/bin/sh", "HOME": user.pw_dir, "PATH": "/usr/bin:/bin", "LOGNAME": user.pw_name}
    for number, line in enumerate(text.split("\n"), 1):
        if not (line := line.lstrip(" \t")) or line.startswith("#"):
            continue
        try:
            if setting := _CRON_SETTING.fullmatch(line):
                value = setting[3]
                for _ in range(2):  # so many pairs of quotes it takes away
                    value = re.sub(r"""\A(['"])(.*)\1\Z""", r"\2", value.rstrip(), flags=re.DOTALL)
                changed = env | {setting[2]: value, "LOGNAME": user.pw_name}
                parse_config("bash", {"command": ":", "env": changed, "working_dir": changed["HOME"]})
                zone = load_zone(changed["CRON_TZ"]).key if "CRON_TZ" in changed else zone
                env = changed
                continue
            times = 1 if line.startswith("@") else 5
            fields = re.split("[ \t]+", line, maxsplit=times + system)
            if len(fields) <= times + system:
                raise ValueError(f"must be five time fields or an @word{', a user' * system} and a command, or NAME = VALUE")
            if not system and fields[-1].startswith("root "):
                raise ValueError("has a user before its command: --system reads it")
            if system and fields[-2] != user.pw_name:
                whose = f"is run as {shown(fields[-2])}, ChronoTask as {user.pw_name}"
                raise ValueError(f"{whose}: import it where ChronoTask runs as that user")
            found = cast(re.Match[str], _CRON_COMMAND.fullmatch(fields[-1]))
            command, data = re.sub(r"\\([\\%])", r"\1", found[1]), found[2]
            config: dict[str, Any] = {"command": command}
            if data or env["SHELL"] not in ("/bin/sh", "/bin/bash") or not _PLAIN_COMMAND.fullmatch(command):
                text_in = re.sub(r"(?<!\\)%", "\n", data or "").replace(r"\%", "%").removesuffix("\n")
                here = "" if not data else f" <<< {shlex.quote(text_in)}"
                config = {"command": f'exec "$SHELL"{here} -c', "args": [command]}
            config = parse_config("bash", config | {"env": env, "working_dir": env["HOME"], "timeout": 86400})
            task = {"name": printable(command)[:100] or f"line {number}", "task_type": "bash", "config": config, "max_retries": 0}
            if _NOT_OF_CRON.search(expression := " ".join(fields[:times])):
                raise ValueError(f"{shown(expression)} is none that cron reads, or not so (MON for MON#2, no day for SAT-SUN)")
            if expression != "@reboot":
                when = check_schedule_config("cron", {"expression": expression, "timezone": zone}, zone, 0)
                kept = {"overlap": "allow", "catchup": "skip"}
                task["schedules"] = {"cron": {"schedule_type": "cron", "schedule_config": when, **kept}}
        except (InvalidInput, ValueError) as error:
            errors.append(FieldError(f"line {number}", str(error)))
            continue
        words = re.split("[<>%]", fields[-1], maxsplit=1)[0].split()
        key = slug(" ".join(word.rpartition("/")[2] for word in words), tasks)
        tasks[key], comments[key] = task, [f"line {number}: {printable(line)}"]
        if fields[0] == "@reboot":
            comments[key].append("No schedule here is about the start of the machine: its init system can ask for a run by")
            comments[key].append(f"curl -X POST http://127.0.0.1:8000/api/v1/tasks/key:{key}/execute")
        if env.get("MAILTO"):
            mail.setdefault(env["MAILTO"], []).append(key)
    if errors:
        raise InvalidInput(*errors)
    for address, keys in mail.items():  # what does what MAILTO does, as lines of TOML
        send = f'printf \'%s\\n\' "$CHRONOTASK_CAUSE_OUTPUT" | mail -s "$CHRONOTASK_CAUSE_TEXT" {shlex.quote(address)}'
        mailer: dict[str, Any] = {"task_type": "bash", "config": {"command": f'[ -z "$CHRONOTASK_CAUSE_OUTPUT" ] || {send}'}}
        watching = {"schedule_type": "after", "schedule_config": {"tasks": keys, "on": ["success", "failure"]}}
        lines = to_toml({"tasks": {slug(f"mail {address}", tasks): {**mailer, "schedules": {"end": watching}}}}, {})
        advice = f"MAILTO={address}: output is kept in the history here. To get it by mail as well, take the # away from:"
        comments[""] += [printable(advice), *lines.split("\n")[1:-1]]
    return tasks, comments


# ======================================================================================================================
# 13. REST
# ======================================================================================================================

API = "/api/v1"
SLOW_BODY = 30.0  # seconds that a body may take to arrive
SLOW_READER = 30.0  # seconds after which the kernel drops a client that takes nothing of its answer
MAX_BODY = 1024 * 1024  # bytes
WRONG_TOKENS = 10  # a second, from one address
TOKENS_POLL = 1.0  # seconds between looks at the files of tokens
PROBLEM = "application/problem+json"  # RFC 9457
# Answers are data: never sniffed as something else, never kept by a cache.
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Server": "ChronoTask"}
DASHBOARD = Path(__file__).resolve().parent / "dashboard.html"
BUSY: dict[Any, Token | None] = {}  # connections whose request is being answered, and the token that it came with


def json_answer(value: Any, status: int = 200, content_type: str = "application/json") -> web.Response:
    return web.Response(body=to_json(value), status=status, headers={**HEADERS, "Content-Type": f"{content_type}; charset=utf-8"})


def problem_answer(error: ChronoTaskError) -> web.Response:
    errors = [{"field": field, "message": message} for field, message in error.errors]
    body = {"type": "about:blank", "title": error.title, "status": error.status, "detail": error.detail, "errors": errors}
    answer = json_answer(body, error.status, PROBLEM)
    if error.status == 401:
        answer.headers["WWW-Authenticate"] = 'Bearer realm="ChronoTask"'
    return answer


# --- Who may ask ------------------------------------------------------------------------------------------------------


class Tokens:
    """Who may ask: API_TOKEN, and the files of tokens as they are now."""

    def __init__(self, settings: Settings, monotonic: Callable[[], float]) -> None:
        self._settings, self._monotonic = settings, monotonic
        self._known, self._error = known_tokens(settings), ""
        self._second, self._wrong = 0.0, Counter[str]()  # since then, from which addresses

    async def step(self) -> None:
        """From now on only the tokens that are in the files are known: streams and calls of others end here."""
        await asyncio.sleep(TOKENS_POLL)
        try:
            known, error = await in_daemon(known_tokens, self._settings), ""
        except StartupError as failure:
            known, error = self._known, failure.detail
        if error and error != self._error:
            logger.error("the tokens that were known stay valid: %s", error)
        if known != self._known:
            logger.info("%d tokens are known now", len(known))
        self._known, self._error = known, error
        for connection in [connection for connection, token in BUSY.items() if token is not None and token not in known]:
            connection.force_close()

    def find(self, headers: Sequence[str], address: str) -> Token | None:
        """Whose token is in the Authorization header; None where no token is needed. Raises Unauthorized, TooManyRequests."""
        if not self._settings.needs_token:
            return None
        scheme, _, given = (headers[0] if len(headers) == 1 else "").partition(" ")
        digest = token_digest(given.strip())
        # It is compared with all of them: the time it takes says nothing.
        found = [token for token in self._known if hmac.compare_digest(token.digest, digest)]
        if found and scheme.lower() == "bearer":
            return found[0]
        if (now := self._monotonic()) >= self._second + 1 or len(self._wrong) >= 1000:
            self._second, self._wrong = now, Counter()
        self._wrong[address] += bool(headers)
        if self._wrong[address] > WRONG_TOKENS:
            raise TooManyRequests(f"more than {WRONG_TOKENS} wrong tokens a second from {address}: wait a moment")
        raise Unauthorized("this needs the header Authorization: Bearer TOKEN, with a token that is known here")


def check_caller(request: web.Request, settings: Settings) -> bool:
    """Raises Forbidden unless this Host, Origin and kind of page may ask for this; says whether it needs a token, if any does."""
    headers, path = request.headers, request.path
    host = ",".join(headers.getall("Host", []))
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?", host)
    name = (match[1] or match[2]).lower().rstrip(".") if match else ""
    if name != "localhost" and name not in settings.allowed_hosts:
        try:
            ipaddress.ip_address(name)  # a hostile page cannot have made an address point here (DNS rebinding)
        except ValueError:
            raise Forbidden(f"Host {shown(name or host)} is not accepted here: add it to CHRONOTASK_ALLOWED_HOSTS") from None
    for origin in headers.getall("Origin", []):
        with contextlib.suppress(ValueError):
            page = yarl.URL(origin)
            same = page.scheme in ("http", "https") and page.origin() == yarl.URL(f"{page.scheme}://{host}").origin()
            if same or page.host in settings.allowed_hosts:
                continue
        raise Forbidden(f"Origin {shown(origin)} is not accepted here: add its host to CHRONOTASK_ALLOWED_HOSTS")
    # Static pages without data: a browser may navigate there without a token.
    navigates = request.method in ("GET", "HEAD") and path in ("/", "/docs")
    if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        if not (navigates and headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"):
            raise Forbidden("requests from pages of another site are refused")
    return not (navigates and (path != "/" or "text/html" in headers.get("Accept", "")))


def gated_app(service: Service, way: str) -> web.Application:
    """An application without routes. Who may ask is checked before every request, and every error becomes an answer after."""
    settings, tokens = service.settings, Tokens(service.settings, service.clock.monotonic)

    @web.middleware
    async def gate(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        BUSY[request.protocol] = None
        try:
            actor, scope = "-", "read"
            if request.path != "/health" and check_caller(request, settings):  # /health is open to any Host
                scope = "admin"
                if token := tokens.find(request.headers.getall("Authorization", []), request.remote or ""):
                    actor, scope, _ = BUSY[request.protocol] = token
            CALLER.set(Caller(actor, f"{way} {request.remote}", scope))
            return await handler(request)
        except ChronoTaskError as error:
            return problem_answer(error)
        except web.HTTPException as error:  # aiohttp's own, of paths, methods and bodies
            kind = {404: NotFound, 405: MethodNotAllowed, 413: BodyTooLarge}.get(error.status, MalformedBody)
            nowhere = "there is nothing at this path; GET / lists where to look" if error.status == 404 else ""
            answer = problem_answer(kind(nowhere or error.text or error.reason))
            if isinstance(error, web.HTTPMethodNotAllowed):
                answer.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            return answer
        except ConnectionError:  # the client has gone, or was dropped because it took nothing: there is nobody to answer
            return web.Response(status=503)
        except Exception:
            logger.exception("%s %s", request.method, shown(request.path))
            return problem_answer(ChronoTaskError("something went wrong here; the log has the details"))
        finally:
            del BUSY[request.protocol]

    async def prepare(request: web.Request, answer: web.StreamResponse) -> None:
        if request.writer.output_size:  # of a stream that failed: an error inside it would be no error; its client sees the break
            raise ConnectionResetError
        answer.headers["Server"] = HEADERS["Server"]  # else aiohttp's and Python's: also where MCP answers, or nothing does

    if settings.needs_token:
        service.engine.spawn(service.keep("tokens", tokens.step))
    app = web.Application(middlewares=[gate], client_max_size=MAX_BODY)
    app.on_response_prepare.append(prepare)
    return app


# --- Requests ---------------------------------------------------------------------------------------------------------


async def json_bytes(request: web.Request) -> bytes:
    """The body without a BOM, b"" if there is none. Raises UnsupportedMedia, RequestTimeout, MalformedBody."""
    if "Content-Encoding" in request.headers:  # RFC 9110, 15.5.16; what is never unpacked cannot be a bomb
        raise UnsupportedMedia("send the body as it is, without Content-Encoding")
    try:
        async with asyncio.timeout(None if request.content.is_eof() else SLOW_BODY):
            raw = await request.read()
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {SLOW_BODY:g} s") from None
    except (ConnectionError, web.RequestPayloadError) as error:
        # aiohttp keeps the error, and its frames hold what had arrived: 1 MiB each, until the next full garbage collection.
        error.__traceback__ = None
        raise MalformedBody("the body broke off, or its chunks are malformed") from None
    if raw and request.content_type != "application/json":
        raise UnsupportedMedia(f"send the body as application/json, not {shown(request.content_type)}")
    return raw.removeprefix(codecs.BOM_UTF8)


def read_query(request: web.Request, model: type[Query]) -> Any:
    if model is Query and not request.query_string:  # as most are: to look for one takes a fifth of a read
        return None
    lists = {name: request.query.getall(name) for name in request.query}
    given: dict[str, Any] = {name: values if values[1:] else values[0] for name, values in lists.items()}
    if wrong := [FieldError(name, f"must be sent as the header {of}") for name, of in model.headers.items() if name in given]:
        raise InvalidInput(*wrong)
    given |= {name: ", ".join(request.headers.getall(of)) for name, of in model.headers.items() if of in request.headers}
    try:
        return parse(model, given)
    except InvalidInput as error:
        raise InvalidInput(*(FieldError(model.headers.get(name, name), why) for name, why in error.errors)) from None


def path_id(request: web.Request) -> int | str:
    text = request.match_info.get("id", "0")
    return text if text.startswith("key:") else int(text)  # its route lets only digits through


async def answer_operation(service: Service, operation: Operation, request: web.Request) -> web.Response:
    require(operation.scope)  # before anything is read
    number, query, model = path_id(request), read_query(request, operation.query), operation.body
    raw = await json_bytes(request) if request.body_exists else b""
    if not raw.strip() and model is not None and not mark_of(model).optional:
        raise MalformedBody("a JSON body is needed")
    value = load_json(raw) if raw.strip() else {}
    if model is None and value != {}:
        raise InvalidInput(FieldError("", "this takes no body"))
    if not isinstance(value, dict):
        raise InvalidInput(FieldError("", "the body must be a JSON object, not text, a number, a list or null"))
    result = await operation.call(service, number, query, None if model is None else parse(model, value))
    if result is None:
        return web.Response(status=204, headers=HEADERS)
    goes_on = result["executions"] if "executions" in result else result.get("status") in UNFINISHED
    answer = json_answer(result, 200 if operation.status == 202 and not goes_on else operation.status)
    if operation.status in (201, 202) and (made := mark_of(operation.result).resource):
        answer.headers["Location"] = f"{API}/{made.__name__.lower()}s/{result['id']}"
    return answer


async def show_root(service: Service, request: web.Request) -> web.StreamResponse:
    """What this is; the dashboard to a browser."""
    if "text/html" in request.headers.get("Accept", ""):
        return await show_docs(service, request)
    status = "healthy" if service.problem() is None else "unhealthy"
    links = {"api": API, "status": f"{API}/scheduler/status", "health": "/health", "metrics": "/metrics"}
    links |= {"openapi": "/openapi.json", "docs": "/docs"}
    return json_answer({"name": "ChronoTask", "version": __version__, "status": status, "links": links})


async def show_docs(_service: Service, request: web.Request) -> web.Response:
    """This document to read and to try. It is dashboard.html, at `/` too."""
    try:
        page = DASHBOARD.read_text(encoding="utf-8")
    except OSError:
        return web.Response(text=f"dashboard.html is not beside chronotask.py; the API is at {API}\n", headers=HEADERS)
    nonce = os.urandom(16).hex()  # of the page's own script and style: no other runs, and it talks to this server alone
    page = re.sub("<(script|style)>", rf'<\1 nonce="{nonce}">', page)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
    answer = web.Response(text=page, content_type="text/html", headers={**HEADERS, **headers, "Vary": "Accept-Encoding"})
    answer.enable_compression()
    return answer


async def show_health(service: Service, request: web.Request) -> web.Response:
    """Whether the service works; needs no token."""
    reason = service.problem()
    answer: dict[str, Any] = {"status": "healthy" if reason is None else "unhealthy"}
    if not service.settings.needs_token:
        answer |= {"version": __version__, "leader": service.engine.leading, "running": len(service.engine.running)}
        answer |= {} if reason is None else {"reason": reason}
    return json_answer(answer, 200 if reason is None else 503)


async def send_output(service: Service, request: web.Request) -> web.StreamResponse:
    """The kept output as plain text; follow=true streams it while the execution runs."""
    query, execution_id = read_query(request, FollowQuery), cast(int, path_id(request))
    if not query.follow:
        return web.Response(text=output_text((await service.get_execution(execution_id))["output_data"]), headers=HEADERS)
    pieces = follow_output(service, execution_id)
    await anext(pieces)  # raises what is to be answered
    answer = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/plain; charset=utf-8"})
    await answer.prepare(request)
    with contextlib.suppress(NotFound):  # it was deleted meanwhile: that is its end
        async for piece in pieces:
            await answer.write(piece)
    return answer


async def show_events(service: Service, request: web.Request) -> web.StreamResponse:
    """Changes as server-sent events: execution, task, schedule, scheduler, reset. Each `data` is one line: none is forged."""
    query = read_query(request, EventQuery)
    only = query.task_id and await service.task_id(query.task_id)
    reader, missed = await service.engine.feed.open(query.last_event_id)
    answer, to_come = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"}), deque(missed or ())
    try:
        await answer.prepare(request)
        await answer.write(b": hello\n\n" if missed is not None else b"event: reset\ndata: {}\n\n")
        while True:
            try:
                async with asyncio.timeout(10):
                    event = to_come.popleft() if to_come else await reader.get()
            except TimeoutError:
                await answer.write(b": still here\n\n")
                continue
            if event is None:
                return answer
            if not only or event.task_id in (only, None):
                await answer.write(f"id: {event.id}\nevent: {event.kind}\ndata: {compact(event.data)}\n\n".encode())
    finally:
        service.engine.feed.readers.discard(reader)


async def show_backup(service: Service, request: web.Request) -> web.StreamResponse:
    """A consistent copy of the database. Without a token this would hand all secrets to whoever asks."""
    require("admin")
    if not service.settings.needs_token:
        raise Forbidden("the backup holds all secrets of all tasks: it is given only when CHRONOTASK_API_TOKEN is set")
    about = {"Content-Type": "application/vnd.sqlite3", "Content-Disposition": 'attachment; filename="chronotask.db"'}
    return web.Response(body=await service.backup(), headers={**HEADERS, **about})


async def show_metrics(service: Service, request: web.Request) -> web.Response:
    """Metrics in Prometheus text format. Labels never hold a command; tasks are those that ran last, at most 1000."""
    engine, stats, path, lines = service.engine, service.engine.stats, service.store.path, list[str]()
    (objects, executions), (tasks, running) = await service.measured()
    tasks = [as_it_is(task, engine.paused) for task in tasks]

    def family(name: str, text: str, samples: Iterable[tuple[str, float]] | float, kind: str = "gauge") -> None:
        lines.append(f"# HELP chronotask_{name} {text}\n# TYPE chronotask_{name} {kind}")
        of_all = [("", samples)] if isinstance(samples, (int, float)) else samples
        lines.extend(f"chronotask_{name}{labels} {value}" for labels, value in of_all)

    kinds = itertools.product(sorted(CONFIGS), FINISHED)
    ended = [(f'{{task_type="{kind}",status="{status}"}}', stats.ended[kind, status]) for kind, status in kinds]
    family("executions_total", "Executions that ended since this process started.", ended, "counter")
    durations, lateness, active = stats.durations.samples(), stats.lateness.samples(), objects["active_schedules"]
    family("execution_duration_seconds", "From the start of the last attempt to its end.", durations, "histogram")
    family("start_lateness_seconds", "From a slot to the start of its execution.", lateness, "histogram")
    waiting = [(f'{{status="{status}"}}', count) for status, count in executions.items()]
    family("executions", "Executions that are not over, of all processes.", waiting)
    family("executions_running_here", "Executions that this process runs.", len(engine.running))
    family("tasks", "Tasks.", objects["tasks"])
    family("schedules", "Schedules.", [('{state="firing"}', active), ('{state="idle"}', objects["schedules"] - active)])
    size = sum(os.path.getsize(file) for file in (path, f"{os.path.realpath(path)}-wal") if os.path.exists(file))
    family("database_size_bytes", "Size of the database and its write-ahead log.", size)
    writes, turn = service.store.writes, service.clock.monotonic()
    family("writer_queue_length", "Writes that wait for the database writer.", len(writes.turn) + writes.batches.qsize())
    await asyncio.sleep(0)
    family("loop_lag_seconds", "How long the last turn of the event loop took.", round(service.clock.monotonic() - turn, 6))
    family("leader", "Whether this process fires schedules.", int(engine.leading))
    if (file := service.config_file) is not None:
        family("config_file_ok", "Whether --config was applied as it is.", int(file["error"] is None))
    family("info", "Version.", [(f'{{version="{__version__}"}}', 1)])
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    named = [(f'task_id="{task.id}",task="{task.name.translate(escapes)}",key="{task.key or ""}"', task) for task in tasks]
    last = [(f'{{{labels},status="{task.last_status or "none"}"}}', 1) for labels, task in named]
    family("task_last_status", "How the latest execution that ran has ended.", last)
    figures: list[tuple[str, str, Callable[[Task], float | None]]] = [
        ("failures_total", "Executions that failed.", lambda task: task.failure_count),
        ("failures_in_a_row", "Failures since the last success.", lambda task: task.failures_in_a_row),
        ("last_success_timestamp_seconds", "End of the last success; 0: never.", lambda task: (task.last_success or 0) / SECOND),
        ("last_run_timestamp_seconds", "Start of the last run; 0: never.", lambda task: (task.last_run or 0) / SECOND),
        ("running_since_timestamp_seconds", "Start of what runs.", lambda task: running.get(task.id, 0) / SECOND or None),
        ("next_slot_timestamp_seconds", "Next firing.", lambda task: (task.next_run or 0) / SECOND or None),
    ]
    for name, text, figure in figures:
        samples = [(f"{{{labels}}}", value) for labels, task in named if (value := figure(task)) is not None]
        family(f"task_{name}", text, samples, "counter" if name.endswith("total") else "gauge")
    about = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    return web.Response(body=("\n".join(lines) + "\n").encode(), headers={**HEADERS, **about})


async def show_openapi(_service: Service, request: web.Request) -> web.Response:
    """This document."""
    return json_answer(openapi())


# Routes that are no operations, outside of the API or streams: who answers, with what, to which query.
PAGES: dict[str, tuple[Callable[[Service, web.Request], Awaitable[web.StreamResponse]], str, type[Query]]] = {
    "/": (show_root, "application/json", Query),
    "/health": (show_health, "application/json", Query),
    "/metrics": (show_metrics, "text/plain", Query),
    "/openapi.json": (show_openapi, "application/json", Query),
    "/docs": (show_docs, "text/html", Query),
    API + "/executions/{id}/output": (send_output, "text/plain", FollowQuery),
    API + "/events": (show_events, "text/event-stream", EventQuery),
    API + "/backup": (show_backup, "application/vnd.sqlite3", Query),
}


def _route(path: str) -> str:
    path = path.replace("tasks/{id}", "tasks/{id:[0-9]{1,18}|key:[a-z0-9._-]+}")
    return path.replace("{id}", "{id:[0-9]{1,18}}")  # else /schedules/{id} would take /schedules/preview, too


def make_app(service: Service) -> web.Application:
    app = gated_app(service, "rest")
    for operation in OPERATIONS:
        for method in (*operation.methods, *(["HEAD"] if operation.method == "GET" else [])):
            app.router.add_route(method, _route(API + operation.path), partial(answer_operation, service, operation))
    for path, (show, _, _) in PAGES.items():
        app.router.add_get(_route(path), partial(show, service), allow_head=not path.startswith(API))  # no HEAD of a stream
    return app


# --- OpenAPI ----------------------------------------------------------------------------------------------------------

_CRON = {"schedule_type": "cron", "schedule_config": {"expression": "0 9 * * MON-FRI", "timezone": "Europe/Berlin"}}
_BACKUP = {"task_type": "bash", "config": {"command": "backup.sh", "args": ["--full"], "timeout": 3600}}
_EXAMPLES: dict[Any, dict[str, Any]] = {  # what /docs offers to send
    TaskCreate: {"name": "nightly backup", **_BACKUP},
    TaskUpdate: {"status": "paused"},
    ScheduleCreate: {"task_id": 1, **_CRON},
    ScheduleUpdate: {"is_active": False},
    DefinitionFile: {"chronotask": 1, "owner": "ops", "tasks": {"nightly-backup": {**_BACKUP, "schedules": {"night": _CRON}}}},
    SchedulePreview: {"schedule_type": "interval", "schedule_config": {"seconds": 900}, "count": 3},
    BackfillBody: {"from": "2026-11-20", "to": "2026-11-22", "dry_run": True},
}
_Refused = Annotated[dict[str, Any], View(None, "Refused", field=str, message=str)]
_Problem = Annotated[dict[str, Any], View(None, "Problem", type=str, title=str, status=int, detail=str, errors=list[_Refused])]


@functools.cache
def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document of everything that can be asked, from the operations, their models and the pages."""
    models = dict.fromkeys(m for o in OPERATIONS for m in (o.body, o.result) if m is not None)
    adapters = [(m, "validation", adapter(m)) for m in (*models, *CONFIGS.values(), *SCHEDULE_CONFIGS.values(), _Problem)]
    refs, found = TypeAdapter.json_schemas(cast(Any, adapters), ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = found["$defs"]
    for body in map(mark_of, (*_EXAMPLES, NestedSchedule)):
        properties = schemas[body.name]["properties"]
        for field, configs in (("config", CONFIGS), ("schedule_config", SCHEDULE_CONFIGS)):
            if field in properties:
                properties[field] = {"anyOf": [refs[config, "validation"] for config in configs.values()]}
        properties |= {name: {"readOnly": True} for name in sorted(body.ignored)}  # what GET gave can be sent back
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        content = None if operation.result is None else {"application/json": {"schema": refs[operation.result, "validation"]}}
        good = {operation.status: content, **({200: content} if operation.status == 202 else {})}
        for method in operation.methods:
            name = operation.name if method != "PUT" else operation.name.replace("update", "put")
            document = _document(operation.path, name, operation.use_case, operation.query, good)
            if operation.body is not None:
                sent = {"schema": refs[operation.body, "validation"], "example": _EXAMPLES.get(operation.body, {})}
                required = not mark_of(operation.body).optional
                document["requestBody"] = {"required": required, "content": {"application/json": sent}}
            paths.setdefault(API + operation.path, {})[method.lower()] = document
    for path, (show, media, query) in PAGES.items():
        content = {media: {"schema": {"type": "object"} if media == "application/json" else {"type": "string"}}}
        paths[path] = {"get": _document(path, show.__name__, show, query, {200: content})}
    about = {"title": "ChronoTask", "version": __version__, "description": "A task scheduler: HTTP requests and bash commands."}
    components = {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    return {"openapi": "3.1.0", "info": about, "paths": paths, "components": components, "security": [{}, {"token": []}]}


def _document(path: str, name: str, documented: Any, query: type[Query], good: Mapping[int, Any]) -> dict[str, Any]:
    """One call. `good` are the statuses of its answers, with their content; all others are errors of one form."""
    parameters: list[dict[str, Any]] = []
    if "{id}" in path:
        schema = adapter(TaskId if "/tasks/" in path else Id).json_schema()
        parameters.append({"name": "id", "in": "path", "required": True, "schema": schema})
    for field, schema in query.model_json_schema().get("properties", {}).items():
        arms = [arm for arm in schema.pop("anyOf", ()) if arm != {"type": "null"}]  # a parameter is left out, never null
        lean = {key: value for key, value in schema.items() if key != "title" and (key, value) != ("default", None)}
        schema = lean | ({"anyOf": arms} if len(arms) > 1 else arms[0] if arms else {})
        listed = {"explode": False} if schema.get("type") == "array" else {}  # comma-separated
        header = query.headers.get(field)
        parameters.append({"name": header or field, "in": "header" if header else "query", "schema": schema, **listed})
    summary, _ = words_of(documented)
    answers = {str(status): {"description": summary} | ({"content": what} if what else {}) for status, what in good.items()}
    problem = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    answers["default"] = {"description": "Why it was refused, or failed", "content": problem}
    return {"operationId": name, "summary": summary, "parameters": parameters, "responses": answers}


# ======================================================================================================================
# 14. MCP
# ======================================================================================================================
#
# The same operations as tools for a language model: flat arguments, answers with what it cannot look up (zones, words, next
# slots, what to change), texts of bounded length. The SDK is imported on first use: it costs 0.4 s and 30 MB.

if TYPE_CHECKING:
    from mcp import types
    from mcp.server.lowlevel import Server
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

TOOL_TEXT = 8000  # characters of each output text in an answer about one execution
TOOL_LIST_TEXT = 500  # the same in lists
MAX_ANSWER = 40_000  # characters of an answer
LIFETIME = 3_600_000  # milliseconds for which a client may keep lists: only another version changes them
_CALLS: set[asyncio.Task[Any]] = set()


class PauseQuery(Query):
    paused: bool
    until: Annotated[Instant, Field(description="ends the pause by itself")] | None = None


@Operation("POST", "", tool=("idempotent",))
async def set_scheduler_paused(service: Service, query: PauseQuery) -> StatusView:
    """Stop or resume all schedules. Runs under way and execute_task go on. What falls into the pause is not made up for."""
    return await (service.pause_scheduler({"until": query.until}) if query.paused else service.resume_scheduler())


# A model pays for each word: other defaults serve it better than a program.
_LIMIT: Any = Annotated[int, Field(ge=1, le=100)]
_WAIT: Any = Annotated[float, Field(ge=0, le=50, description="seconds to wait for its end")]
_HOW_MUCH: Any = Annotated[Literal["short", "full", "none"], Field(description="short cuts long texts")]
_CLEAR: Any = Annotated[list[str], Field(description="fields to empty")]
TOOL_QUERIES: dict[str, dict[str, Any]] = {
    **{name: {"limit": (_LIMIT, 20)} for name in ("list_tasks", "list_schedules", "list_upcoming")},
    "list_executions": {"limit": (_LIMIT, 20), "output": (_HOW_MUCH, "none")},
    "get_task_history": {"limit": (_LIMIT, 5), "output": (_HOW_MUCH, "short")},
    "get_execution": {"wait": (_WAIT, 0), "output": (_HOW_MUCH, "short")},
    **{name: {"wait": (_WAIT, 4)} for name in ("execute_task", "rerun_execution")},  # some clients give a call up after 5 s
    # Some models take no tool without arguments.
    "get_scheduler_status": {"limit": (Annotated[int, Field(ge=0, le=5, description="of what comes next")], 5)},
    **{name: {"clear": (_CLEAR, [])} for name in ("update_task", "update_schedule")},
    "apply_definitions": {"definitions": (Annotated[str, Field(description="TOML or JSON text")], ...)},
}
# Accepted, since what an answer gave may be sent back, but not worth a word: without effect, or said otherwise.
UNTOLD = {"config", "schedule_config", "task_type", "schedule_type", "schedules", "update_schedule.task_id"}

# --- Arguments --------------------------------------------------------------------------------------------------------
#
# The fields of a configuration are arguments of their own, and say of which type it is: some frameworks cannot pass an argument
# of the name `config`, and models forget what is nested.

FLAT = {"config": ("task_type", CONFIGS), "schedule_config": ("schedule_type", SCHEDULE_CONFIGS)}
AFTER = {"task_ids": "after_task_ids", "tag": "after_tag", "any": "after_any"}  # as arguments they would be taken for others
# Of each type the arguments, and the fields that they are.
KINDS: dict[str, dict[str, str]] = {
    kind: {AFTER.get(name, name) if kind == "after" else name: name for name in field_names(model)}
    for kind, model in (CONFIGS | SCHEDULE_CONFIGS).items()
}
MAIN = {"http": "url", "bash": "command", "cron": "expression", "once": "datetime", "interval": "seconds", "after": "on"}
EITHER = ({"seconds", "days"}, {"datetime", "in_seconds"}, {*AFTER})  # one takes the place of the others
PAIRS = {"env": "=", "headers": ":", "params": "="}  # objects as lists of text: strict schemas know no free names
CALLED = {"minutes": "seconds", "hours": "seconds", "weeks": "days", "cron": "expression", "at": "datetime"}  # by models


@functools.cache
def tool_query(operation: Operation) -> type[Query]:
    """What is no part of a body: the id that REST has in the path, and the fields of the query."""
    number: Any = TaskId if operation.id_name == "task_id" else Id
    fields: dict[str, Any] = {operation.id_name: (number, ...)} if operation.id_name else {}
    return create_model(operation.name, __base__=operation.query, **fields, **TOOL_QUERIES.get(operation.name, {}))


@functools.cache
def tool_arguments(operation: Operation) -> dict[str, tuple[str, dict[str, Any], bool]]:
    """Of each argument its part (query, body, a task's schedule, or a configuration), its schema, and whether it is required."""
    models: list[tuple[str, Any, str | None]] = [("query", tool_query(operation), None)]
    found: dict[str, tuple[str, dict[str, Any], bool]] = {}
    if operation.body is not None and operation.name != "apply_definitions":
        models += [("body", operation.body, None), *([("schedule", NestedSchedule, None)] * (operation.name == "create_task"))]
        held = {name for _, model, _ in models for name in field_names(model)}
        models += [(holder, kinds[kind], kind) for holder, (_, kinds) in FLAT.items() if holder in held for kind in kinds]
    for part, model, kind in models:
        whole = adapter(model).json_schema()
        fields, required = whole.get("properties", {}), whole.get("required", ()) if kind is None else ()
        for argument, name in KINDS[kind].items() if kind else zip(fields, fields, strict=True):
            schema = {**fields[name], **whole.get("$defs", {}).get("HttpAuth", {})} if name == "auth" else fields[name]
            found.setdefault(argument, (part, schema, name in required))
    return found


def tool_args(operation: Operation, arguments: Mapping[str, Any]) -> tuple[int | str, Any, Any]:
    """The id, the query and the body of a call, by the rules of REST; the body of an update is a function of the object as it
    stands. Raises InvalidInput that lists every bad argument."""
    known, errors = tool_arguments(operation), list[FieldError]()
    parts: dict[str, dict[str, Any]] = {part: {} for part in ("query", "body", "schedule", *FLAT)}
    update = operation.method == "PATCH"
    ignored = mark_of(operation.body).ignored if update else ()
    for name, value in itertools.islice(arguments.items(), 200):  # of more some are unknown, and 200 of them tell it
        if name in known:
            with told_at("", errors):
                parts[known[name][0]][name] = _as_sent(name, value, known[name][1])
        elif name not in ignored:
            names = [name for name in known if name not in UNTOLD]
            meant = operation.id_name if name == "id" else CALLED.get(name)
            hint = f": use {meant}" if meant in known else did_you_mean(name, names) or f" (known: {', '.join(names)})"
            errors.append(FieldError(name, f"unknown field{hint}"))
    query, body = None, partial(_body_of, operation, parts) if operation.body else None
    with told_at("", errors):
        query = parse(tool_query(operation), parts["query"])
    if body is not None and not update:
        with told_at("", errors):
            body = body({})
    if errors:
        raise InvalidInput(*errors)
    return getattr(query, operation.id_name or "", 0), query, body


def _as_sent(name: str, value: Any, schema: dict[str, Any]) -> Any:
    """An argument as REST takes it: clients send digits and JSON as text, models pairs as lists of text."""
    if isinstance(value, str) and name.endswith("_id") and re.fullmatch("[0-9]{1,19}", value):
        return int(value)
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and (name == "body" or _lean(schema).get("type") != "string"):
        with contextlib.suppress(ChronoTaskError):
            value = load_json(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict) and name == "definitions":
        return compact(value)
    if isinstance(value, list) and name == "after_task_ids":
        return [_as_sent("task_id", one, schema) for one in value]
    if name in PAIRS and isinstance(value, list):
        pairs = [str(one).partition(PAIRS[name]) for one in value]
        named = {key: text.strip() if name == "headers" else text for key, separator, text in pairs if separator}
        if len(named) < len(pairs):
            raise InvalidInput(FieldError(name, f"must be a list of NAME{PAIRS[name]}VALUE with each name once, or an object"))
        return named
    return value


def _body_of(operation: Operation, parts: Mapping[str, dict[str, Any]], before: Mapping[str, Any]) -> Any:
    """The body that REST would have; `before` is the view of what an update changes."""
    body, known, errors = {**parts["body"]}, tool_arguments(operation), list[FieldError]()
    if operation.name == "apply_definitions":
        text = str(parts["query"].get("definitions", ""))
        return parse(operation.body, read_definitions("definitions", text.encode("utf-8", "surrogatepass")))
    mark, clear = mark_of(operation.body), parts["query"].get("clear", [])
    # A zone is always one that is named, so that no edit moves a schedule unseen.
    never = {*UNTOLD, "task_id", "timezone"}
    may = [name for name, (part, *_) in known.items() if part != "query" and name not in {*parts[part], *never}]
    if any(name not in may for name in clear):
        raise InvalidInput(FieldError("clear", f"must be a list of fields, not given themselves, of {', '.join(may)}"))
    targets = [(holder, mark, body) for holder in FLAT if holder in mark.fields]
    if operation.name == "create_task" and (made := {**parts["schedule"]}) | parts["schedule_config"]:
        if "schedules" in body:
            errors.append(FieldError("schedules", "is given too: say it either there or by arguments of their own"))
        body["schedules"] = [made]
        targets.insert(0, ("schedule_config", mark_of(NestedSchedule), made))
    for holder, of, target in targets:
        type_name, kinds = FLAT[holder]
        typed, stood, held = type_name in of.fields, before.get(type_name), before.get(holder, {})
        given = parts[holder] | {name: None for name in clear if known[name][0] == holder}
        if not given and (of.update or not typed or {holder, type_name} & target.keys()):
            continue
        # Of the kinds that have all of these fields: the one that stands, if it holds them all; the one whose main field is
        # given; the one that stands; the only one.
        fitting = [kind for kind in kinds if given.keys() <= KINDS[kind].keys()]
        stands = [stood] if stood in fitting else []
        again = [kind for kind in stands if all(KINDS[kind][name] in held for name in given)]
        likely = again + [kind for kind in fitting if MAIN[kind] in given] + stands + fitting[: len(fitting) == 1]
        kind = target.get(type_name, next(iter(likely), None))
        if holder in target:
            errors.append(FieldError(holder, f"is given too: say it either there or by {', '.join(given)}, not both"))
        elif not fitting:
            which = " and ".join(f"{name} ({' or '.join(kind for kind in kinds if name in KINDS[kind])})" for name in given)
            errors.append(FieldError(which, "do not go together: give those of one kind"))
        elif typed and kind is None:
            errors.append(FieldError(" or ".join(MAIN[kind] for kind in kinds), "is required"))
        else:
            names = KINDS[kind if kind in [*kinds] else fitting[0]]
            config = {names.get(argument, argument): value for argument, value in given.items()}
            rivals = {name: None for group in EITHER if group & config.keys() for name in group}
            # A zone stays by itself where the kind does, and that is told.
            kept = {name: held[name] for name in held if name in names.values() and (name != "timezone" or kind != stood)}
            config = {name: value for name, value in (kept | rivals | config).items() if value is not None}
            target |= {holder: config, type_name: kind} if typed else {holder: config}
    defaults = defaults_of(mark.resource, body.get("schedule_type", before.get("schedule_type")))
    body |= {name: copy.copy(defaults.get(name)) for name in clear if known[name][0] == "body"}
    try:
        made = parse(operation.body, body)
    except InvalidInput as error:
        without = ("_type", "config") if errors else ()  # these are missing because of the errors above
        errors += [one for one in error.errors if one.message != "is required" or not one.field.endswith(without)]
    if errors:
        raise InvalidInput(*errors)
    return made


def _lean(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema in few words, and without null: an object is one of its fields, what may be of many types is text."""
    arms = [_lean(arm) for arm in schema.get("anyOf", ()) if arm != {"type": "null"}]
    whole = (arms[0] if len(arms) == 1 else {"anyOf": arms} if arms else {}) | {k: v for k, v in schema.items() if k != "anyOf"}
    if "properties" in whole:
        return {"type": "object", "properties": {name: _lean(field) for name, field in whole["properties"].items()}}
    if isinstance(whole.get("type"), list):
        whole["type"] = "string"
    lean = {key: whole[key] for key in ("type", "anyOf", "enum", "default", "maximum", "description") if whole.get(key)}
    if lean.get("maximum", 0) >= 1000:
        del lean["maximum"]  # hardly ever met; the error names it
    return lean | ({"items": _lean(whole["items"])} if "items" in whole else {})


@functools.cache
def make_tools() -> types.ListToolsResult:
    """What a model needs to know. What create_task or create_schedule says of an argument is not said again."""
    from mcp import types

    tools, words = [], ("read_only", "destructive", "idempotent", "open_world")
    for tool, operation in TOOLS.items():
        fields, known, resource = dict[str, Any](), tool_arguments(operation), getattr(mark_of(operation.body), "resource", None)
        for name, (part, schema, _) in known.items():
            if UNTOLD & {name, f"{tool}.{name}"}:
                continue
            field = _lean(schema)
            if part != "query" and (default := field.pop("default", None)) is not None:  # which some clients would send
                field["description"] = f"{field.get('description', '')} (default {default})".strip()
            if name in PAIRS:
                field = {"type": "array", "items": {"type": "string"}, "description": f"NAME{PAIRS[name]}VALUE"}
            home = "create_task" if part == "config" or (part == "body" and resource is Task) else "create_schedule"
            if part != "query" and tool != home and name in tool_arguments(TOOLS[home]):
                field = {key: field[key] for key in ("type", "anyOf", "properties") if key in field}
                field |= {"items": {"type": "string"}} if field.get("type") == "array" else {}
            fields[name] = field
        required = [name for name in fields if known[name][2]]
        hints: Any = {f"{word}_hint": word in (operation.tool or ()) for word in words}
        made = types.Tool(
            name=tool,
            title=tool.replace("_", " ").capitalize(),
            description=f"{operation.summary}. {operation.description}",
            # And no schema of the answer: some clients drop what it does not list.
            input_schema={"type": "object", "properties": fields} | ({"required": required} if required else {}),
            annotations=types.ToolAnnotations(**hints),
        )
        tools.append(made)
    return types.ListToolsResult(tools=tools, ttl_ms=LIFETIME)


# --- Answers ----------------------------------------------------------------------------------------------------------
#
# Without nulls, defaults, what follows from other fields, and the same instant twice.

ROWS = {"tasks": Task, "schedules": Schedule, "history": Execution, "executions": Execution, "unfinished": Execution}
ROWS["attempts"] = Attempt
# What is left out where the other is there.
FOLLOWS = {"success": "status", "retry_count": "status", "updated_at": "id", "next_run": "upcoming", "skip": "limit"}
FOLLOWS |= {"finished_at": "started_at", "queued_at": "started_at", "limit": "limit"}


def clip(value: Any, limit: int, where: str) -> Any:
    """`value` with a long text cut to `limit` characters, the first quarter and the last three; an object as JSON text. The cut
    says how many bytes are left out, and `where` they are."""
    text = compact(value) if isinstance(value, (dict, list)) else value
    if not isinstance(text, str) or len(text) <= limit:
        return value
    head, tail = text[: limit // 4], text[limit // 4 - limit :]
    left_out = len(text[limit // 4 : limit // 4 - limit].encode("utf-8", "replace"))
    return f"{head}\n[… {left_out} bytes left out: {where} …]\n{tail}"


def brief(resource: Any, view: Mapping[str, Any], limit: int, without: Collection[str], where: str) -> dict[str, Any]:
    """What a client sees of a resource, or a page (None), as a model needs it; each text is cut to `limit` characters."""
    defaults, times = (defaults_of(resource, view.get("schedule_type")), shape_of(resource).times) if resource else ({}, ())
    if of := {Task: "tasks", Execution: "executions"}.get(resource):
        where = f"resource {SCHEME}{of}/{view['id']} has all that was kept"
        defaults = {**defaults, "status": None, "attempt": 1}
    known = {"created_at", *without} | ({"task_id", "task_name"} if resource is Task or "history" in view else set())
    short = dict[str, Any]()
    for name, value in view.items():
        if value is None or name in without or view.get(FOLLOWS.get(name, "")) or (resource and value == defaults.get(name)):
            continue
        if name in times:
            value = f"{value[:19]}Z"
        elif name in ("upcoming", "next_runs"):
            rows = [{k: v for k, v in row.items() if k != "utc"} | {"local": re.sub(r"\.\d+", "", row["local"])} for row in value]
            value = [row if len(row) > 1 else row["local"] for row in rows]
        elif isinstance(value, list):
            rows = value[:-1] if name == "attempts" else value  # the last one is the execution's
            value = [brief(ROWS.get(name), row, limit, known, where) if isinstance(row, dict) else row for row in rows]
        elif name == "output_data" and limit < MAX_ANSWER:
            gone = {"headers"} if value.get("truncated") else {"headers", "stdout_bytes", "stderr_bytes", "body_bytes"}
            value = {k: v for k, v in value.items() if k not in gone and v is not None and v is not False and v != ""}
        elif name == "cause":
            value = {k: value[k] for k in ("event", "execution_id", "text") if value.get(k)}
        if isinstance(value, dict) and limit < MAX_ANSWER:
            value = {k: clip(v, limit, where) for k, v in value.items()}
        if not resource or value not in ([], {}):
            short[name] = clip(value, limit, where) if isinstance(value, str) else value
    return short


async def _use(service: Service, operation: Operation, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's answer, with what a model cannot look up by itself, and without what is long."""
    require(operation.scope)  # before anything is read
    name, before = operation.name, None
    arguments = {argument: value for argument, value in arguments.items() if value is not None}  # null is not given
    named, query, body = tool_args(operation, arguments)
    number = await service.task_id(named)
    if operation.method == "PATCH":  # to compare; what the change starts from is read with it
        before = await (service.get_task if name == "update_task" else service.get_schedule)(number)
    if name == "get_execution" and query.wait:
        await service.engine.feed.wait_for(number, query.wait)
    view = await operation.call(service, number, query, body)
    if view is None:
        return {"id": number, "deleted": True}
    resource, output = getattr(mark_of(operation.result), "resource", None), getattr(query, "output", "short")
    notes = [*view.pop("notes", ())]
    hidden = MASK in str(view.get("config")) and arguments.keys() & {"config", "url", "headers", "auth"}  # it may differ
    if before and not hidden and all(before[n] == view[n] for n in shape_of(mark_of(operation.body).resource).written):
        notes.append(f"nothing was changed: {'all is so already' if len(arguments) > 1 else 'no field was given'}")
    if name in ("create_task", "get_task"):
        if not (await service.list_schedules(ScheduleQuery(task_id=view["id"], limit=1)))["total"]:
            notes.append("it has no schedule: only execute_task runs it, until create_schedule says when")
    elif resource is Execution and view["status"] in UNFINISHED:
        notes.append(f"not over: get_execution with execution_id {view['id']} and wait shows its end, cancel_execution ends it")
    elif name == "list_upcoming" and len(view["upcoming"]) == query.limit:
        notes.append("there may be more: ask for a task_id or a tag, or for up to 100")
    elif name == "list_schedules":
        for schedule in view["schedules"]:
            with contextlib.suppress(NotFound):  # deleted a moment ago
                schedule["upcoming"] = (await service.get_schedule(schedule["id"]))["upcoming"][:2]
    elif "next_runs" in view:
        going = ExecutionQuery(status=("unfinished",), output="none", limit=20)
        view["now"] = format_local(service.clock.now() // SECOND * SECOND, view["timezone"])
        view["next_runs"] = view["next_runs"][: getattr(query, "limit", 5)]
        view["lateness"] = view["lateness"] if view["lateness"]["count"] else None
        view |= {"unfinished": (await service.list_executions(going))["executions"]}
    without = {"output_data"} if output == "none" else {"trigger", "task_id"} if name == "execute_task" else set()
    short, full = (TOOL_TEXT, MAX_ANSWER) if resource else (TOOL_LIST_TEXT, TOOL_TEXT)
    limit = full if output == "full" else short
    lists = {part: [*rows] for part, rows in view.items() if isinstance(rows, list)}  # the view may be kept for others
    # There is to be room for the notes.
    while len(compact(answer := brief(resource, view | lists, limit, without, "REST has all"))) > MAX_ANSWER - 1000:
        longest = max(lists, key=lambda part: len(lists[part]), default="")
        if len(lists.get(longest, ())) > 1 and (resource is None or limit < 200):
            del lists[longest][len(lists[longest]) * 3 // 4 :]
            if "next_before_id" in view:
                view["next_before_id"] = lists[longest][-1]["id"]
        else:
            limit //= 2
    if "total" in view:
        seen = view["skip"] + sum(len(answer[page]) for page in ROWS.keys() & answer.keys())
        if seen < view["total"]:
            notes.append(f"{view['total'] - seen} more: ask with skip={seen}")
    else:
        rest = "ask for the others, or for less of each" if "next_before_id" in view else "REST has all"
        cut = [part for part in lists if len(lists[part]) < len(view[part])]
        notes += [f"only the first {len(answer.get(part, ()))} of {len(view[part])} fit into an answer: {rest}" for part in cut]
    return answer | ({"notes": notes} if notes else {})


async def run_tool(
    service: Service, name: str, arguments: Mapping[str, Any], progress: Callable[[float], Awaitable[None]] | None = None
) -> types.CallToolResult:
    """Calls a tool, and `progress` with each second. An error is in the result, for the model to mend; an unknown name raises."""
    from mcp import MCPError, types

    if (operation := TOOLS.get(name)) is None:
        raise MCPError(types.INVALID_PARAMS, f"unknown tool {shown(name)}" + did_you_mean(name, TOOLS))

    async def run() -> types.CallToolResult:
        view = None
        try:
            view = await _use(service, operation, arguments)
            text = compact(view)
        except ChronoTaskError as error:
            text = clip(_said(error, arguments), TOOL_TEXT, "correct what is named here first")
        except Exception:
            logger.exception("tool %s", name)
            text = "something went wrong here; the log has the details"
        return types.CallToolResult(content=[types.TextContent(text=text)], structured_content=view, is_error=view is None)

    job = service.engine.spawn(run(), _CALLS)  # goes on when the client goes away: a use case is never left half done
    seconds = itertools.count(1)
    while not (await asyncio.wait({job}, timeout=1))[0]:
        if progress is not None:
            await progress(next(seconds))
    return await job


def _said(error: ChronoTaskError, arguments: Mapping[str, Any]) -> str:
    """An error's text, fields of a configuration as the arguments that gave them."""
    fields: list[FieldError] = []
    for name, message in error.errors:
        name = name if arguments.get("schedules") else name.removeprefix("schedules[0].")
        inside = re.match(r"(config|schedule_config)\.(\w+)", name)
        if inside and arguments.get(inside[1]) is None:
            name = AFTER.get(inside[2], inside[2]) + name[inside.end() :]
        if name == "schedule_config" and arguments.get(name) is None:
            message = re.sub(r"\b(task_ids|tag|any)\b", lambda match: AFTER[match[0]], message)
        fields.append(FieldError("idempotency_key" if name == "Idempotency-Key" else name, message))
    return InvalidInput(*fields).detail if isinstance(error, InvalidInput) else error.detail


# --- Resources, the server --------------------------------------------------------------------------------------------

SCHEME = "chronotask://"
RESOURCES = {"status": "get_scheduler_status", "tasks": "get_task", "executions": "get_execution"}  # the tools that look there
JSON_TEXT: Any = {"mime_type": "application/json"}
INSTRUCTIONS = """\
ChronoTask runs HTTP requests and bash commands by schedule. A task says what to do, a schedule when, an execution is one run.
To plan something: list_tasks (does it exist?), create_task, execute_task (does it work?), create_schedule, then compare the
slots in the answer with what was asked for. Times without an offset are in the schedule's timezone, by default {zone}; times in
answers are UTC (Z) unless they carry another offset. An error says what to change: correct the call and repeat it."""


def make_server(service: Service) -> Server[Any]:
    """The MCP server of a service, for any transport and every protocol version that the SDK knows."""
    from mcp import MCPError, types
    from mcp.server.lowlevel import Server

    kinds: dict[str, Any] = {name: {"name": name, "description": TOOLS[tool].summary} for name, tool in RESOURCES.items()}
    status = types.Resource(uri=f"{SCHEME}status", **kinds.pop("status"), **JSON_TEXT)
    others = [types.ResourceTemplate(uri_template=f"{SCHEME}{name}/{{id}}", **kinds[name], **JSON_TEXT) for name in kinds]
    templates = types.ListResourceTemplatesResult(resource_templates=others, ttl_ms=LIFETIME)

    async def always(result: Any, _: Any, params: Any) -> Any:
        return result

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        caller, client = CALLER.get(), context.session.client_params
        if caller.actor == "-":  # without tokens it is the client that says who it is, before 2026-07-28 on stdio alone
            name = printable(client.client_info.name if client else "")[:64]
            CALLER.set(Caller(name or "-", caller.via.replace("cli", "mcp"), caller.scope))
        progress = partial(context.session.report_progress, message="waiting for the end")  # nothing, unless the client asks
        return await run_tool(service, params.name, params.arguments or {}, progress)

    async def read_resource(_: Any, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
        name, _, named = urllib.parse.unquote(params.uri).removeprefix(SCHEME).partition("/")
        try:
            if not params.uri.startswith(SCHEME) or name not in RESOURCES:
                raise NotFound(f"there is no resource {shown(params.uri)}: {SCHEME} has status, tasks/ID and executions/ID")
            operation = TOOLS[RESOURCES[name]]
            number, query, _ = tool_args(operation, {operation.id_name or "id": named} if named else {})
            text = compact(await operation.call(service, number, query, None))
        except ChronoTaskError as error:
            raise MCPError(types.INVALID_PARAMS, error.detail, {"uri": params.uri}) from None
        return types.ReadResourceResult(contents=[types.TextResourceContents(uri=params.uri, text=text, **JSON_TEXT)])

    return Server(
        "chronotask",
        version=__version__,
        instructions=INSTRUCTIONS.format(zone=service.settings.scheduler_timezone),
        on_list_tools=partial(always, make_tools()),
        on_call_tool=call_tool,
        on_list_resources=partial(always, types.ListResourcesResult(resources=[status], ttl_ms=LIFETIME)),
        on_list_resource_templates=partial(always, templates),
        on_read_resource=read_resource,
        on_list_prompts=partial(always, types.ListPromptsResult(prompts=[], ttl_ms=LIFETIME)),  # some clients always ask
    )


# --- Transports -------------------------------------------------------------------------------------------------------


def take_stdio() -> tuple[int, int]:
    """Keeps stdin and stdout for the protocol: returns duplicates, then points 0 at nothing and 1 at stderr: whatever
    tasks, libraries or children read and write, they cannot reach the wire."""
    wire = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3), fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    for number in wire:
        os.set_blocking(number, True)
    return wire


def write_all(sink: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(sink, view) :]
        except BlockingIOError:  # whoever started this shares the pipe, and wants it so
            select.select([], [sink], [])


async def read_lines(source: int) -> AsyncIterator[bytes]:
    """Each line. Of one over MAX_BODY only a beginning, which is over it too."""
    rest = b""
    while piece := await in_daemon(os.read, source, 65536):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
        rest = rest[: MAX_BODY + 1]
    yield rest


def read_message(line: bytes) -> types.JSONRPCMessage:
    """A line as a message; what is none as the error to answer, with its id (or None)."""
    from mcp import types

    line = line.removeprefix(codecs.BOM_UTF8)  # PowerShell begins what it pipes with one
    code, number = types.INVALID_REQUEST, None
    text = "this line is no JSON-RPC 2.0 message (one object a line, no batches, as id a text or a whole number)"
    try:
        if len(line) > MAX_BODY:
            raise MalformedBody(f"a message may have at most {MAX_BODY} bytes")
        value = load_json(line)
        with contextlib.suppress(ValidationError):
            message = types.jsonrpc_message_adapter.validate_python(value, by_name=False)
            # A notification with an id is a request with a bad one, whose client waits for an answer.
            if "id" not in value or isinstance(message, (types.JSONRPCRequest, types.JSONRPCResponse)):
                return message
    except ChronoTaskError as error:
        code, text = types.PARSE_ERROR, f"this line is no JSON-RPC message: {error.detail}"
    with contextlib.suppress(ValueError, RecursionError, TypeError, LookupError):
        found = json.loads(line)["id"]  # read less strictly, so that its client hears which one is refused
        number = found if type(found) in (int, str) and str(found).isascii() else None
    return types.JSONRPCError(jsonrpc="2.0", id=number, error=types.ErrorData(code=code, message=text))


async def serve_stdio(server: Server[Any], source: int, sink: int) -> None:
    """Serves one client until it closes its end of `source` (calls in flight then get 1.5 s) or of `sink`."""
    import anyio
    from mcp import types
    from mcp.shared.message import SessionMessage

    into, inbox = anyio.create_memory_object_stream[Any](0)
    outbox, out_of = anyio.create_memory_object_stream[Any](0)
    calls = set[str]()  # the ids of those that have no answer yet

    async def at_most(count: int) -> None:
        while len(calls) > count:
            await asyncio.sleep(0.005)

    async def take_in() -> None:
        """Passes messages on to the server, no faster than it answers; what is no message is refused at once."""
        async for line in read_lines(source):
            if not line.strip():
                continue
            if isinstance(message := read_message(line), types.JSONRPCError):
                await outbox.send(SessionMessage(message))
                continue
            await at_most(256)  # further ones stay in the client's pipe
            if isinstance(message, types.JSONRPCRequest):
                calls.add(str(message.id))
            elif isinstance(message, types.JSONRPCNotification) and message.method == "notifications/cancelled":
                calls.discard(str((message.params or {}).get("requestId")))
            await into.send(SessionMessage(message))

    async def give_out() -> None:
        async for outgoing in out_of:
            line = outgoing.message.model_dump_json(by_alias=True, exclude_unset=True) + "\n"
            await in_daemon(write_all, sink, line.encode())
            calls.discard(str(getattr(outgoing.message, "id", None)))

    logger.info("MCP on stdio")
    running = server.run(inbox, outbox, server.create_initialization_options())
    jobs = [asyncio.ensure_future(job) for job in (running, give_out(), take_in())]
    serving, writing, _ = jobs
    try:
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        jobs.append(asyncio.ensure_future(at_most(0)))
        await asyncio.wait({writing, jobs[-1]}, timeout=1.5, return_when=asyncio.FIRST_COMPLETED)
        logger.info("the MCP client on stdio has gone")
    finally:
        await into.aclose()  # the server cancels what is left, and says so to the client
        await asyncio.wait({serving, writing}, timeout=0.3)
        for job in jobs:
            job.cancel()
        for result in await asyncio.gather(*jobs, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, OSError):  # as when the client no longer listens
                logger.error("MCP on stdio", exc_info=result)


async def handle_mcp(manager: StreamableHTTPSessionManager, request: web.Request) -> web.StreamResponse:
    """A request as an ASGI call of the SDK. Headers go out at once: a stream is seen to be open before it has data."""
    messages = [{"type": "http.request", "body": await json_bytes(request)}]
    answer = web.StreamResponse(headers=HEADERS)

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # for ever: a client that goes away cancels the whole call
        return messages.pop()

    async def send(message: Mapping[str, Any]) -> None:
        try:
            if message["type"] == "http.response.start":
                answer.set_status(message["status"])
                answer.headers.update({name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]})
                await answer.prepare(request)
            elif message.get("body"):
                await answer.write(message["body"])
        except ConnectionError:  # the SDK would log it: let the end of the connection end the call
            await asyncio.Event().wait()

    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request.method}
    scope |= {"path": request.path, "query_string": request.query_string.encode()}
    scope["headers"] = [(name.lower(), value) for name, value in request.raw_headers]
    await manager.handle_request(scope, receive, send)
    with contextlib.suppress(ConnectionResetError):  # many clients leave as soon as they have their answer
        await answer.write_eof()
    return answer


def make_mcp_app(service: Service, server: Server[Any]) -> web.Application:
    """MCP over streamable HTTP at `/mcp`. Without sessions: abandoned ones cost memory, and they die with a restart. Run it with
    `handler_cancellation=True`, so that a stream ends with its client."""
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

    # Without security settings: `gate` has checked Host, Origin and token, by rules that the SDK's lists cannot express.
    manager = StreamableHTTPSessionManager(server, stateless=True)
    ready, over = asyncio.Event(), asyncio.Event()

    async def run() -> None:
        async with manager.run():
            ready.set()
            await over.wait()

    async def run_manager(_app: web.Application) -> AsyncIterator[None]:
        job = asyncio.ensure_future(run())  # entered and left in one job, as the manager's cancel scopes need
        await ready.wait()
        yield
        over.set()
        await job

    app = gated_app(service, "mcp")
    for method in ("POST", "GET", "DELETE"):
        app.router.add_route(method, "/mcp", partial(handle_mcp, manager))
    app.cleanup_ctx.append(run_manager)
    return app


# ======================================================================================================================
# 15. Main
# ======================================================================================================================

IDLE_CONNECTION = 30.0  # seconds that one may ask for nothing, or take for the head of a request
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
LOG_BUFFER, LOG_TEXT = 1000, 65536  # texts that may wait for each output of the log, and characters of one


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise StartupError(message, exit_status=2)


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Raises StartupError (status 2) with one line that names what is wrong."""
    parser = _Parser(prog="chronotask", description="A lightweight, reliable task scheduler.", allow_abbrev=False)
    parser.add_argument("--mode", choices=("http", "mcp", "both"), default="http", help="what to serve (default: http)")
    parser.add_argument("--host", help="address to listen on (CHRONOTASK_API_HOST, default 127.0.0.1)")
    parser.add_argument("--port", help="port of REST and the dashboard (CHRONOTASK_API_PORT, default 8000)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--backup", metavar="FILE", help="write a consistent copy of the database to FILE (-: stdout), and end")
    one.add_argument("--config", metavar="FILE", help="definitions (TOML or JSON) to apply at the start and when they change")
    one.add_argument("--apply", metavar="FILE", help="make tasks and schedules what FILE (-: stdin) says, and end")
    parser.add_argument("--dry-run", action="store_true", help="with --apply: only print what would change (status 3)")
    parser.add_argument("--prune", choices=("pause", "delete"), help="with --apply: what becomes of what FILE no longer names")
    one.add_argument("--export", metavar="FILE", help="write definitions to FILE (.toml: as TOML; -: JSON to stdout), and end")
    one.add_argument("--import-crontab", metavar="FILE", help="print a crontab (-: stdin) as definitions in TOML, and end")
    parser.add_argument("--system", action="store_true", help="with --import-crontab: it has a column of users")
    parser.add_argument("--version", action="version", version=f"ChronoTask {__version__}")
    options = parser.parse_args(argv)
    for name, wanted in (("dry_run", "apply"), ("prune", "apply"), ("system", "import_crontab")):
        if getattr(options, name) and getattr(options, wanted) is None:
            parser.error(f"--{name.replace('_', '-')} needs --{wanted.replace('_', '-')}")
    return options


class _Lines(logging.Formatter):
    """One line a record: whatever a task or a client put into a message cannot forge lines or move the cursor."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape_controls(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join("    " + escape_controls(line) for line in super().formatException(ei).splitlines() if line)


def escape_controls(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


_LINES = _Lines("%(asctime)s %(levelname)s %(message)s")


class LogStream(io.TextIOBase):
    """Text on its way to stderr or to a file. Nobody who writes waits: a thread does, for a reader or a disk. What finds
    LOG_BUFFER texts waiting, is too long or cannot be written, is lost. The lines are counted, and said when it flows again."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lost = 0
        self._waiting = queue.SimpleQueue[str | threading.Event]()
        threading.Thread(target=self._write_on, name="chronotask-log", daemon=True).start()
        atexit.register(self.drain)

    def write(self, text: str) -> int:
        if len(text) <= LOG_TEXT and self._waiting.qsize() < LOG_BUFFER:
            self._waiting.put(text)
        else:
            self._lost += text.count("\n")
        return len(text)

    def drain(self) -> None:
        """Waits until all is written, but not for ever."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(0.5)

    def _write_on(self) -> None:
        fd = 2 if self._path is None else os.open(os.devnull, os.O_WRONLY)
        while True:
            item = self._waiting.get()
            text = item if isinstance(item, str) else ""
            if self._lost and self._waiting.empty():
                about = {"levelname": "WARNING", "msg": f"{self._lost} lines of the log were lost here: nobody took them"}
                text += _LINES.format(logging.makeLogRecord(about)) + "\n"
                self._lost = 0
            try:
                if self._path is not None:  # opened anew, as it may have been moved away
                    fd, old = _open_log(self._path), fd
                    os.close(old)
                write_all(fd, text.encode("utf-8", "backslashreplace"))
            except OSError:
                self._lost += text.count("\n")
            if isinstance(item, threading.Event):
                item.set()


def _open_log(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY, 0o666)


def set_up_logging(settings: Settings) -> None:
    """To stderr, and to LOG_FILE. All that anybody prints goes the same way from now on, tracebacks of threads too."""
    sys.stdout = sys.stderr = LogStream()
    streams = [sys.stderr]
    if (path := settings.log_file) is not None:
        try:
            if not path.is_fifo():  # for whose reader its thread waits, the service does not
                os.close(_open_log(path))
        except OSError as error:
            raise StartupError(f"CHRONOTASK_LOG_FILE={shown(str(path))}: cannot be written: {error.strerror}", 2) from None
        streams.append(LogStream(path))
    logging.basicConfig(level=settings.log_level, handlers=[logging.StreamHandler(stream) for stream in streams], force=True)
    for handler in logging.root.handlers:
        handler.setFormatter(_LINES)
    if path is not None and path.is_file():
        check_owner(path, 0o026 if settings.bash_user else 0o022)
    for name in ("aiohttp.access", "mcp", "sse_starlette"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Systemd:
    """What systemd hears of this process, by the protocol of sd_notify(3), if that has started it."""

    def __init__(self, path: str, span: str, pid: str) -> None:
        self._path = "\0" + path[1:] if path.startswith("@") else path
        self._watchdog = int(span) / SECOND if span.isdigit() and pid in ("", str(os.getpid())) else 0.0

    def tell(self, state: str) -> None:
        if self._path:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(state.encode(), self._path)

    async def follow(self, service: Service) -> None:
        """Ready once somebody is known to lead; then signs of life while /health would say that all is well."""
        while self._path and not service.leadership.known:
            await asyncio.sleep(POLL)
        self.tell("READY=1")
        while self._path and self._watchdog:
            if service.problem() is None:
                self.tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / 3)


async def serve(settings: Settings, mode: str, environ: Environ, systemd: Systemd, config: str | None) -> None:
    """Runs until one of STOP_SIGNALS (a second one ends at once), or in mode `mcp` until the client on stdin has gone."""
    wire = take_stdio() if mode != "http" else None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, the kernel would reap children and lose their status
    loop, stop, signalled = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def on_signal(number: int) -> None:
        # Not `stop`: an MCP client closes stdin first, and sends SIGTERM when it grows impatient. Nor SIGHUP: when a terminal
        # closes, the kernel sends one and its shell another.
        if signalled.is_set() and number != signal.SIGHUP:
            os._exit(1)
        signalled.set()
        stop.set()

    for number in STOP_SIGNALS:
        # Whoever starts a program with SIGHUP ignored (nohup) wants it to survive its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal, number)
    clock = Clock()
    sockets = bind(settings.api_host, settings.api_port) if mode != "mcp" else []
    mcp_sockets = bind(settings.api_host, settings.mcp_port) if mode == "both" and settings.mcp_enabled else []
    store = Store(settings.database_url, clock.monotonic)
    service = Service(settings, store, clock, environ, "mcp" if mode == "mcp" else "service")
    runners: list[web.AppRunner] = []
    jobs: list[asyncio.Task[None]] = []
    try:
        # Before this process leads: importing the SDK takes seconds on a small machine, in which nothing would fire.
        server = make_server(service) if mode != "http" and settings.mcp_enabled else None
        followed = None if config is None else ConfigFile(service, Path(config).absolute())  # its folder may be replaced
        await service.start(None if followed is None else followed.begin)
        renewed = config or settings.api_token_file or settings.api_tokens_file
        if renewed and loop.remove_signal_handler(signal.SIGHUP):  # unless it was ignored; tokens are looked at by themselves
            loop.add_signal_handler(signal.SIGHUP, (lambda: None) if followed is None else followed.reload)
        if sockets:
            warn_if_open(settings)
            await _open(runners, "REST on http://%s:%d", sockets, make_app(service))
        if server:
            if mcp_sockets:
                app = make_mcp_app(service, server)
                await _open(runners, "MCP on http://%s:%d/mcp", mcp_sockets, app, handler_cancellation=True)
            # A terminal starts no session in `both`: reading it from the background would stop the whole process.
            if wire is not None and (mode == "mcp" or not os.isatty(wire[0])):
                jobs.append(loop.create_task(serve_stdio(server, *wire)))
                if mode == "mcp":
                    jobs[-1].add_done_callback(lambda _: stop.set())
        elif mode == "both":
            logger.warning("CHRONOTASK_MCP_ENABLED is false: serving HTTP only")
        leads = "this process leads" if service.engine.leading else "another process leads"
        logger.info("ChronoTask %s is up, database %s; %s", __version__, store.path, leads)
        jobs.append(loop.create_task(systemd.follow(service)))
        gc.freeze()  # what is there stays, so the garbage collector need not look at it
        gc.set_threshold(10_000)  # requests and attempts free what they used without its help
        await stop.wait()
        logger.info("stopping: running executions get %g s", settings.shutdown_grace)
    finally:
        systemd.tell("STOPPING=1")
        await service.stop()
        for job in jobs:  # after the service: the calls that waited for it are answered
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        for result in await asyncio.gather(*(runner.cleanup() for runner in runners), return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("a server could not be closed: %s", result, exc_info=result)
        store.close()
        for number in STOP_SIGNALS:  # nothing is left to stop: the exit status is that of a clean end
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


async def _open(runners: list[web.AppRunner], what: str, sockets: list[socket.socket], app: web.Application, **more: Any) -> None:
    """Serves `app`, and adds its runner to those to clean up."""
    runner = web.AppRunner(app, shutdown_timeout=0.2, **more)
    runners.append(runner)

    class Connection(web.RequestHandler):
        def handle_error(self, request: Any, status: int = 500, exc: Any = None, message: Any = None) -> web.StreamResponse:
            """What is no HTTP is answered in our words too. The log gets none of it: its bytes may hold a token."""
            if status != 400:
                return super().handle_error(request, status, exc, message)
            reason = (message or "").partition(":")[0].strip()  # what follows are bytes of the request
            answer = problem_answer(MalformedBody(f"this is no valid HTTP request ({reason})"))
            answer.force_close()
            return answer

    await runner.setup()
    loop, server = asyncio.get_running_loop(), cast(web.Server, runner.server)
    limit = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def connect() -> asyncio.Protocol:
        # Else a stranger's idle connections would take all file descriptors from clients and tasks.
        if len(server.connections) >= limit:
            idle = (other for other in server.connections if other.transport is not None and other not in BUSY)
            if (oldest := next(idle, None)) is not None:
                oldest.force_close()
        return Connection(server, loop=loop, keepalive_timeout=IDLE_CONNECTION, auto_decompress=False)

    for sock in sockets:
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux, tcp(7). Each connection inherits it.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(SLOW_READER * 1000))
        # As many are accepted before the first of them can be closed again; and where the system has no more files, asyncio
        # tries that often each second, each time with a traceback in the log.
        await loop.create_server(connect, sock=sock, backlog=max(1, min(16, limit // 4)))
        sock.listen(1024)  # the kernel's queue may be longer than what is accepted in one turn
        host, port = sock.getsockname()[:2]
        logger.info(what, f"[{host}]" if ":" in host else host, port)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets for all addresses of `host`, bound before anything runs: a port that is taken must not start a scheduler."""
    sockets: list[socket.socket] = []
    with contextlib.suppress(socket.gaierror, UnicodeError):  # it is no name of anything
        for family, _, _, _, address in dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)):
            # `::` is all addresses, IPv4 too. Any other name's IPv4 address has a socket of its own.
            dual = address[0] == "::" and socket.has_dualstack_ipv6()
            try:
                sockets.append(socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=dual))
            except OSError as error:
                # `localhost` has an IPv6 address, too, also where the kernel has none.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise StartupError(f"cannot listen on {host} port {port}: {error}") from None
    if not sockets:
        raise StartupError(f"--host or CHRONOTASK_API_HOST={shown(host)}: must be an address of this machine", exit_status=2)
    return sockets


def warn_if_open(settings: Settings) -> None:
    """Listening on more than loopback without a token hands a shell to the network: said once, loudly."""
    host, local = settings.api_host, settings.api_host == "localhost"
    with contextlib.suppress(ValueError):
        local = ipaddress.ip_address(host).is_loopback
    if not local and not settings.needs_token:
        logger.warning("ANYONE WHO REACHES %s CAN RUN COMMANDS HERE: set CHRONOTASK_API_TOKEN, or listen on 127.0.0.1", host)
    for name in settings.allowed_hosts:
        if not settings.needs_token and name != "localhost" and not set(name) & set(".:"):
            # A search domain or a local resolver decides what a name of one label is: a page under it could call this API.
            logger.warning("CHRONOTASK_ALLOWED_HOSTS: DNS can be made to answer for %s: set CHRONOTASK_API_TOKEN", name)


def run_backup(settings: Settings, target: str) -> None:
    """Writes a copy of the database to a file, or to standard output. Raises StartupError, Unavailable."""
    source = settings.database_url
    if target == "-":
        if sys.stdout is None or sys.stdout.isatty():
            raise StartupError("--backup=-: a database is no text for a terminal; redirect the output to a file", 2)
        with backup(source) as copy:
            write_out(copy)
    elif refusal := refused_target(source, Path(target).absolute()):
        raise StartupError(f"--backup={shown(target)}: must be {refusal}", 2)
    else:
        backup(source, Path(target).absolute()).close()


def write_out(source: BinaryIO, target: Path | None = None) -> None:
    """Writes all of a file, or to standard output. Raises StartupError."""
    try:
        with contextlib.nullcontext(1) if target is None else replacing(target) as sink:
            with open(sink, "wb", closefd=target is not None) as file:
                shutil.copyfileobj(source, file)
    except OSError as error:
        raise StartupError(f"{target or 'standard output'} cannot be written: {error.strerror}") from None


def print_crontab(name: str, system: bool, user: pwd.struct_passwd) -> None:
    """Prints a crontab as definitions. Raises InvalidInput that names every line that cannot be read."""
    # crontab(5): all times are in the zone of the machine.
    zone = os.path.realpath("/etc/localtime").partition("/zoneinfo/")[2] or "UTC"
    tasks, comments = read_crontab(read_file(name).decode("utf-8", "surrogateescape"), system, user, zone)
    owner = slug("crontab" if name == "-" else Path(name).name, ())
    comments[""].insert(0, "What cron would do. Look through it, then: python chronotask.py --apply FILE")
    write_out(io.BytesIO(to_toml({"chronotask": 1, "owner": owner, "tasks": tasks}, comments).encode()))


async def use_definitions(settings: Settings, options: argparse.Namespace, environ: Environ, body: Any) -> int:
    """--apply (of `body`) and --export, as one more process on the database. Returns the exit status."""
    clock = Clock()
    with contextlib.closing(Store(settings.database_url, clock.monotonic)) as store:
        service = Service(settings, store, clock, environ)
        if options.export is not None:
            file = await export_definitions(service, ExportQuery())
            warnings = file.pop("warnings", ())
            toml = options.export.endswith(".toml")
            text = to_toml(file, {"": warnings}) if toml else json.dumps(file, indent=2, ensure_ascii=False) + "\n"
            target = None if options.export == "-" else Path(os.path.realpath(options.export))  # a link goes on leading there
            if target is not None and (why := refused_target(settings.database_url, target)):
                raise StartupError(f"--export={shown(options.export)}: must be {why}", 2)
            write_out(io.BytesIO(text.encode()), target)
            print("".join(f"chronotask: warning: {warning}\n" for warning in warnings), end="", file=sys.stderr)
            return 0
        applied = await apply_definitions(service, ApplyQuery(dry_run=options.dry_run, prune=options.prune), body)
        write_out(io.BytesIO(f"{told(applied) or 'nothing to do'}\n".encode()))
        return 3 if options.dry_run and any(change["action"] != "orphaned" for change in applied["changes"]) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns its exit status: 0, 1 (it cannot run) or 2 (bad option or variable)."""
    try:
        while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
            continue  # where the parent has closed one, the next file or socket must not become a standard stream
        os.close(spare)
        sys.stderr = sys.stderr or open(2, "w", closefd=False)  # else `print` would tell standard output, a backup
        options = parse_command_line(sys.argv[1:] if argv is None else argv)
        settings, warnings = Settings.from_env(os.environ, options.port, options.host)
        if options.mode == "mcp" and not settings.mcp_enabled:
            raise StartupError("--mode=mcp: must be http or both while CHRONOTASK_MCP_ENABLED is false", exit_status=2)
        # Taken away, before tasks inherit it.
        systemd = Systemd(*(os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")))
        environ = Environ(os.environ)
        environ.umask = os.umask(0o077)
        if any(getattr(options, name) is not None for name in ("backup", "apply", "export", "import_crontab")):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # no half of a copy, with all secrets, shall stay behind
                    signal.signal(number, lambda number, _: sys.exit(128 + number))
            print("".join(f"chronotask: warning: {warning}\n" for warning in warnings), end="", file=sys.stderr)
        if (options.backup or options.export) and not os.path.exists(settings.database_url):
            raise StartupError(f"there is no database {settings.database_url}")
        if options.backup is not None:
            run_backup(settings, options.backup)
            return 0
        if options.import_crontab is not None:
            print_crontab(options.import_crontab, options.system, settings.bash_user or pwd.getpwuid(os.geteuid()))
            return 0
        if options.apply is not None or options.export is not None:
            body = None if options.apply is None else parse(DefinitionFile, read_definitions(options.apply))
            return asyncio.run(use_definitions(settings, options, environ, body))
        set_up_logging(settings)
        if settings.bash_user is not None:
            check_bash_user(settings.bash_user)
        for warning in [*warnings, *(exposed_secrets(os.environ) if settings.bash_user is None else ())]:
            logger.warning("%s", warning)
        environ.open_files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Room for thousands of idle connections beside the runs: the usual soft limit is 1024.
        limit = max(environ.open_files, 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        sys.setswitchinterval(0.0002)  # sqlite3 retakes the GIL at every step, and a busy loop gives it up only then
        asyncio.run(serve(settings, options.mode, environ, systemd, options.config))
        return 0
    except ChronoTaskError as error:
        for line in [f"{field}: {message}" for field, message in error.errors] or [error.detail]:
            print(f"chronotask: {' '.join(line.split())}", file=sys.stderr)
        return 2 if isinstance(error, (InvalidInput, MalformedBody)) else getattr(error, "exit_status", 1)


if __name__ == "__main__":
    sys.exit(main())
