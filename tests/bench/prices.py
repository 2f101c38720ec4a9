# SPDX-License-Identifier: BSD-2-Clause
"""The price of what a configuration may ask for: the same work by sockd with it and without it.

What counts is the CPU time of all the server's processes for each session, byte or round trip: on a
machine that has other work as well it changes far less than a rate does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import load
import processes
from servers import SERVERS, BenchError, Running, Setup
from work import Context

ROUNDS = 2
SECONDS_MAX = 1.0  # of one measurement: the whole takes less than four minutes
AT_A_TIME = 32
IDENT_PORT = 113
IDENT_SECONDS = 2.0
USER = "bench"  # socksload's name and password

Changes = dict[str, Any]  # fields of Setup


@dataclass(frozen=True)
class Done:
    """What one run of a load generator has come to."""

    count: float
    seconds: float
    errors: float = 0


@dataclass(frozen=True)
class Work:
    """A kind of load; the CPU time of one unit of it is shown in microseconds."""

    unit: str
    run: Callable[[Context, int], Done]


@dataclass(frozen=True)
class Price:
    """A feature: the work that it is measured with, and how sockd is set up with it and without it.

    `around` gives what else the feature needs, for the length of a `with` block: the changes that it
    makes to both setups, and those to the one with the feature.
    """

    name: str
    work: Work
    changes: Changes = dataclasses.field(default_factory=dict)
    around: Callable[[Context], AbstractContextManager[tuple[Changes, Changes]]] | None = None
    plain_work: Work | None = None  # what is measured without the feature, if that is another work


@dataclass(frozen=True)
class Paid:
    """One round of one price: units a second, and microseconds of CPU time for each."""

    feature: str
    unit: str
    rate_without: float
    rate: float
    cpu_without: float
    cpu: float
    errors: float


# ---- the work ----


def tcp_work(mode: str, unit: str, sessions: int, key: str = "done") -> Work:
    def run(context: Context, port: int) -> Done:
        result = load.run_tcp(context.folder, mode, port, sessions, context.seconds)
        scale = 1e6 if key == "bytes" else 1.0
        return Done(result[key] / scale, context.seconds, result["errors"])

    return Work(unit, run)


def run_udp(context: Context, port: int) -> Done:
    result = load.run_udp(context.folder, port, 64, 4, context.seconds)
    return Done(result["done"], context.seconds)


SESSIONS = tcp_work("rate", "session", AT_A_TIME)
LOGINS = tcp_work("login", "session", AT_A_TIME)
HTTP = tcp_work("http", "session", AT_A_TIME)
BULK = tcp_work("bulk", "MB", 8, key="bytes")
PING = tcp_work("ping", "round trip", 64)
UDP = Work("echo", run_udp)


# ---- what features need besides a configuration ----


def start_sockd(setup: Setup, folder: Path) -> Running:
    """Return a sockd to use in a `with` block; unlike danted it need not wait for TIME_WAIT to be over."""
    return Running(SERVERS["sockd"], setup, folder, is_ready=responds, wait=lambda: None)


def responds(port: int) -> bool:
    """Return whether a SOCKS server answers on the port, if only that it wants a log-in."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
            client.sendall(b"\x05\x01\x00")
            return len(client.recv(2)) == 2
    except OSError:
        return False


def answer_ident(listener: socket.socket) -> None:
    """Say of each connection that it is root's (RFC 1413), until the listener is shut down."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(IDENT_SECONDS)
            ports = connection.recv(100).strip()
            connection.sendall(ports + b" : USERID : UNIX : root\r\n")
            connection.recv(1)
            # Who closes first keeps TIME_WAIT, unless the other one resets.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@contextlib.contextmanager
def identd(_: Context) -> Iterator[tuple[Changes, Changes]]:
    """Run an ident server on 127.0.0.1."""
    try:
        listener = socket.create_server(("127.0.0.1", IDENT_PORT), backlog=1024)
    except OSError as error:
        raise BenchError(f"no ident server on port {IDENT_PORT}: {error.strerror}") from None
    with listener:
        thread = threading.Thread(target=answer_ident, args=(listener,))
        thread.start()
        try:
            yield {}, {"clientmethod": "rfc931"}
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextlib.contextmanager
def accounts(context: Context) -> Iterator[tuple[Changes, Changes]]:
    """Write a password file with one user, hashed with SHA-512 crypt: most of the price is that."""
    command = ["openssl", "passwd", "-6", USER]
    try:
        hashed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"no hash of a password: {error}") from None
    path = context.folder / "accounts"
    path.write_text(f"{USER}:{hashed}\n", encoding="ascii")
    yield {}, {"head": (f"passwordfile: {path}",), "socksmethod": "username"}


@contextlib.contextmanager
def upstream(context: Context) -> Iterator[tuple[Changes, Changes]]:
    """Run another sockd, which the route leads through; its CPU time is not counted."""
    with start_sockd(context.setup, context.folder / "upstream") as running:
        via = f" from: 0/0 to: 0/0 via: 127.0.0.1 port = {running.port}"
        yield {}, {"objects": ("route {", via, " proxyprotocol: socks_v5", "}")}


class GssLoad:
    """gssload.py, for the length of a `with` block; it needs pytest and MIT's KDC."""

    def __enter__(self) -> GssLoad:
        program = Path(__file__).resolve().with_name("gssload.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self.told = self.read()
        except BenchError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(load.SPARE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError("no Kerberos realm (pytest, Debian's krb5-kdc, krb5-admin-server, krb5-user)")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, work: str, port: int, seconds: float, level: str) -> Done:
        stdin: IO[str] | None = self.process.stdin
        assert stdin is not None
        print(work, port, seconds, level, file=stdin, flush=True)
        count = self.read()["done"]
        return Done(count / 1e6 if work == "bulk" else count, seconds)

    def work(self, kind: str, level: str) -> Work:
        unit = "MB" if kind == "bulk" else "session"
        return Work(unit, lambda context, port: self.run(kind, port, context.seconds, level))

    def prices(self) -> list[Price]:
        """Return what log-in by a ticket costs, and each level of protection."""
        environment = tuple(self.told["environment"].items())
        keytab = f" gssapi.keytab: FILE:{self.told['keytab']}"
        items = (keytab, " gssapi.enctype: clear integrity confidentiality")
        changes = {"socksmethod": "gssapi", "client_items": items, "environment": environment}
        levels = {"clear": "0", "integrity": "1", "confidentiality": "2"}
        found = []
        for kind, chosen in (("sessions", ("clear",)), ("bulk", tuple(levels))):
            for name in chosen:
                title = "gssapi, one at a time" if kind == "sessions" else f"gssapi {name}"
                work = self.work(kind, levels[name])
                found.append(Price(title, work, changes, plain_work=self.work(kind, "plain")))
        return found


# ---- the features ----

STATE = (" session.state.key: from", " session.state.max: 100000")
BANDWIDTH = (" bandwidth: 2000000000",)  # far above what can be had
MONITOR = (
    "monitor { from: 0.0.0.0/0 to: 0.0.0.0/0",
    " protocol: tcp",
    " alarm.data: 1 in 3600",
    " alarm.disconnect: 1/1 in 3600",
    "}",
)
OPTIONS = ("internal.tcp.tcp_keepidle: 60", "external.tcp.tcp_keepidle: 60", "external.ip.ip_tos: 8")

PRICES = (
    Price("session.max", SESSIONS, {"items": (" session.max: 100000",)}),
    Price("session.throttle", SESSIONS, {"items": (" session.throttle: 2000000000/1",)}),
    Price("session.state.max", SESSIONS, {"items": STATE}),
    Price("bandwidth", SESSIONS, {"items": BANDWIDTH}),
    Price("bandwidth", BULK, {"items": BANDWIDTH}),
    Price("bandwidth", PING, {"items": BANDWIDTH}),
    Price("redirect", SESSIONS, {"items": (" redirect from: 127.0.0.1",)}),
    Price("monitor", SESSIONS, {"objects": MONITOR}),
    Price("monitor", BULK, {"objects": MONITOR}),
    Price("monitor", PING, {"objects": MONITOR}),
    Price("libwrap", SESSIONS, {"items": (" libwrap: nice 0",)}),
    Price("libwrap.hosts_access", SESSIONS, {"head": ("libwrap.hosts_access: yes",)}),
    Price("3 socket options", SESSIONS, {"head": OPTIONS}),
    Price("so_sndbufforce", SESSIONS, {"head": ("external.tcp.so_sndbufforce: 300000",)}),
    Price("log: data", BULK, {"items": (" log: data",)}),
    Price("log: data", PING, {"items": (" log: data",)}),
    Price("log: disconnect", SESSIONS, {"items": (" log: disconnect",)}),
    Price("log: disconnect tcpinfo", SESSIONS, {"items": (" log: disconnect tcpinfo",)}),
    Price("udp.connectdst: no", UDP, {"head": ("udp.connectdst: no",)}),
    Price("method rfc931", SESSIONS, around=identd),
    Price("method username", LOGINS, around=accounts, plain_work=SESSIONS),
    Price("route, socks_v5", SESSIONS, around=upstream),
    Price("HTTP CONNECT", HTTP, {"items": (" proxyprotocol: socks_v5 http",)}, plain_work=SESSIONS),
)


# ---- measuring ----


def measure(context: Context, setup: Setup, work: Work) -> tuple[Done, float]:
    """Return what a fresh server has done, and its CPU seconds."""
    with start_sockd(setup, context.folder) as running:
        before = processes.cpu_seconds(running.pid)
        done = work.run(context, running.port)
        return done, processes.cpu_seconds(running.pid) - before


def pay(context: Context, price: Price, number: int) -> Paid:
    """Measure one feature once, with it and without it; in every other round the other way round."""
    around = price.around(context) if price.around else contextlib.nullcontext(({}, {}))
    with around as (common, own):
        plain = dataclasses.replace(context.setup, **common)
        setup = dataclasses.replace(plain, **price.changes, **own)
        turns = [(plain, price.plain_work or price.work), (setup, price.work)]
        results = [measure(context, *turn) for turn in (turns if number % 2 else turns[::-1])]
    (before, cpu_before), (after, cpu_after) = results if number % 2 else results[::-1]
    if not before.count or not after.count:
        raise BenchError("nothing was done")
    return Paid(
        feature=price.name,
        unit=price.work.unit,
        rate_without=before.count / before.seconds,
        rate=after.count / after.seconds,
        cpu_without=cpu_before / before.count * 1e6,
        cpu=cpu_after / after.count * 1e6,
        errors=before.errors + after.errors,
    )


def pay_all(context: Context, only: str, notes: list[str], say: Callable[[str], None]) -> Iterator[Paid]:
    """Measure what every feature costs whose name matches; note which could not be measured."""
    context = dataclasses.replace(context, seconds=min(context.seconds, SECONDS_MAX))
    with contextlib.ExitStack() as stack:
        prices = list(PRICES)
        if re.search(only, "gssapi"):
            try:
                prices += stack.enter_context(GssLoad()).prices()
            except (BenchError, OSError) as error:
                notes.append(f"price of gssapi: {error}")
        for number in range(1, ROUNDS + 1):
            for price in (one for one in prices if re.search(only, one.name)):
                try:
                    paid = pay(context, price, number)
                except (BenchError, OSError) as error:
                    notes.append(f"price of {price.name}: {error}")
                    continue
                say(f"price {number} {paid.feature}: {paid.cpu_without:.1f}, {paid.cpu:.1f} us/{paid.unit}")
                yield paid
