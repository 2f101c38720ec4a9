# SPDX-License-Identifier: BSD-2-Clause
"""The servers under test: how each is configured, started, found ready and ended."""

from __future__ import annotations

import dataclasses
import os
import pwd
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import processes

SOCKD = Path(__file__).resolve().parents[2] / "sockd.py"
START_TRIES = 5
START_SECONDS = 20.0
END_SECONDS = 5.0
# A connection in TIME_WAIT holds a port that a server cannot bind, for a minute.
TIME_WAIT_LIMIT = 2000
TIME_WAIT_SECONDS = 75.0
# Below the kernel's range for outgoing connections (32768 on), so that none of those takes it.
PORTS = range(12000, 30000)


class BenchError(Exception):
    """A server or a load generator did not do what a measurement needs."""


@dataclass(frozen=True)
class Setup:
    """What a server is to be started with."""

    ports: tuple[int, ...] = ()
    rules: int = 1
    head: tuple[str, ...] = ()  # lines above the rules
    clientmethod: str = "none"
    socksmethod: str = "none"
    client_items: tuple[str, ...] = ()  # lines in the client-rule
    items: tuple[str, ...] = ()  # lines in the rule that all sessions match
    objects: tuple[str, ...] = ()  # lines behind the rules
    sockd_args: tuple[str, ...] = ()
    is_apart: bool = False  # a session of its own, and so a group of its own to the scheduler
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Server:
    """A kind of server; `command` gives its argument list for a setup and a folder of its own."""

    name: str
    command: Callable[[Setup, Path], list[str]]
    has_config: bool = True
    sessions_only: bool = False


# ---- configuration ----


def unprivileged_user() -> str:
    """Return who the server becomes: nobody, or ourselves when we cannot change that."""
    return "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name


def blocking_rule(number: int) -> str:
    """Return a rule that no session of the bench matches, each with another target."""
    network = f"10.{number >> 8 & 255}.{number & 255}.0/24"
    return f"socks block {{ from: 127.0.0.0/8 to: {network} port = 80 }}"


def make_config(setup: Setup, folder: Path) -> str:
    """Return a configuration that logs each connect and has `setup.rules` socks-rules.

    One statement stands on each line, as Dante wants it.
    """
    lines = [f"logoutput: {folder}/log"]
    lines += [f"internal: 127.0.0.1 port = {port}" for port in setup.ports]
    lines += ["external: 127.0.0.1", f"socksmethod: {setup.socksmethod}"]
    lines += [f"clientmethod: {setup.clientmethod}", *setup.head]
    if os.geteuid() == 0:
        lines.append("user.privileged: root")
    lines.append(f"user.unprivileged: {unprivileged_user()}")
    lines += ["client pass { from: 127.0.0.0/8 to: 127.0.0.0/8", " log: connect", *setup.client_items, "}"]
    lines += [blocking_rule(number) for number in range(setup.rules - 1)]
    lines += ["socks pass { from: 127.0.0.0/8 to: 0.0.0.0/0", " log: connect", *setup.items, "}"]
    lines += setup.objects
    return "\n".join(lines) + "\n"


def config_arguments(setup: Setup, folder: Path) -> list[str]:
    """Write the configuration; return the arguments that name it."""
    path = folder / "conf"
    path.write_text(make_config(setup, folder), encoding="ascii")
    return ["-f", str(path), "-p", str(folder / "pid")]


# ---- the kinds ----


def sockd_program() -> list[str]:
    """Return how sockd is called: what $SOCKD says, or the sockd.py of this tree."""
    words = shlex.split(os.environ.get("SOCKD", "")) or [str(SOCKD)]
    return [sys.executable, *words] if words[0].endswith(".py") else words


def danted_command(setup: Setup, folder: Path) -> list[str]:
    return ["danted", *config_arguments(setup, folder)]


def danted_batch_command(setup: Setup, folder: Path) -> list[str]:
    return ["chrt", "-b", "0", *danted_command(setup, folder)]


def microsocks_command(setup: Setup, folder: Path) -> list[str]:
    return ["microsocks", "-i", "127.0.0.1", "-p", str(setup.ports[0])]


def sockd_command(setup: Setup, folder: Path) -> list[str]:
    return [*sockd_program(), *config_arguments(setup, folder), *setup.sockd_args]


SERVERS = {
    server.name: server
    for server in (
        Server("danted", danted_command),
        Server("danted-batch", danted_batch_command, sessions_only=True),
        Server("microsocks", microsocks_command, has_config=False),
        Server("sockd", sockd_command),
    )
}


def is_installed(name: str) -> bool:
    """Return whether the server's program is here."""
    if name == "sockd":
        return shutil.which(sockd_program()[0]) is not None and Path(sockd_program()[-1]).exists()
    programs = {"danted-batch": ("danted", "chrt")}.get(name, (name,))
    return all(shutil.which(program) for program in programs)


# ---- starting and ending ----


def is_free(port: int) -> bool:
    """Return whether nothing is bound to the port of 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def choose_ports(count: int) -> tuple[int, ...]:
    """Return so many ports that are free now; danted cannot be told to take any."""
    candidates = random.sample(PORTS, min(len(PORTS), count * 4 + 20))
    free = [port for port in candidates if is_free(port)]
    if len(free) < count:
        raise BenchError(f"no {count} free ports on 127.0.0.1")
    return tuple(free[:count])


def await_quiet_ports() -> None:
    """Wait until little is left of earlier connections, so that every server starts alike."""
    deadline = time.monotonic() + TIME_WAIT_SECONDS
    while processes.count_time_wait() > TIME_WAIT_LIMIT and time.monotonic() < deadline:
        time.sleep(0.5)


def listens(port: int) -> bool:
    """Return whether the port of 127.0.0.1 is open, without connecting to it."""
    return f" 0100007F:{port:04X} 00000000:0000 0A " in processes.read_text("/proc/net/tcp")


def greets(port: int) -> bool:
    """Return whether a SOCKS server answers on the port: it has accepted and chosen a method."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
            client.sendall(b"\x05\x01\x00")
            return client.recv(2) == b"\x05\x00"
    except OSError:
        return False


class Running:
    """A server that runs for the length of a `with` block; every process of it is ended then."""

    def __init__(
        self,
        server: Server,
        setup: Setup,
        folder: Path,
        listeners: int = 1,
        is_ready: Callable[[int], bool] = greets,
        wait: Callable[[], None] = await_quiet_ports,
    ) -> None:
        self.server = server
        self.setup = setup
        self.folder = folder / server.name
        self.listeners = listeners
        self.is_ready = is_ready
        self.wait = wait  # before it is started
        self.port = 0
        self.start_seconds = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> Running:
        self.wait()
        for _ in range(START_TRIES):
            try:
                if self.started():
                    return self
            except BaseException:
                self.end()
                raise
            self.end()
        raise BenchError(f"{self.server.name} does not start: {self.last_words()}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def started(self) -> bool:
        """Start on fresh ports and wait until it is ready; False when it has ended instead."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        setup = dataclasses.replace(self.setup, ports=choose_ports(self.listeners))
        self.port = setup.ports[0]
        command = self.server.command(setup, self.folder)
        with open(self.folder / "output", "wb") as output:
            begin = time.monotonic()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **dict(setup.environment)},
                preexec_fn=os.setsid if setup.is_apart else os.setpgrp,
            )
        return self.ready_since(begin)

    def ready_since(self, begin: float) -> bool:
        """Wait until it is ready, note how long it took; False when it has ended instead."""
        assert self.process is not None
        while time.monotonic() < begin + START_SECONDS:
            if self.process.poll() is not None:
                return False
            if self.is_ready(self.port):
                self.start_seconds = time.monotonic() - begin
                return self.process.poll() is None
            time.sleep(0.001)
        return False

    def last_words(self) -> str:
        """Return the end of what the server has printed and logged."""
        texts = [
            path.read_text(encoding="utf-8", errors="replace")
            for path in (self.folder / "output", self.folder / "log")
            if path.exists()
        ]
        lines = [line for line in "\n".join(texts).splitlines() if line.strip()]
        return " / ".join(lines[-3:]) or "it says nothing"

    def end(self) -> None:
        """Ask the server to end; kill by pid what is left of its group after a while."""
        if self.process is None:
            return
        process, self.process = self.process, None
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()  # nothing, when it has been waited for
            process.wait()
            end_members(process.pid)


def end_members(leader: int) -> None:
    """Give a group's other processes a moment to end with their leader, then kill them."""
    deadline = time.monotonic() + 1
    while processes.find_members(leader) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in processes.find_members(leader):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
