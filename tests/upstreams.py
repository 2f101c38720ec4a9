"""Upstreams for the tests of routes: scripted ones, real ones, and configurations that lead to them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from client import Client
from more_peers import rule
from peers import Seen, TcpPeer, discard, echo, receive, reset
from servers import Server, World, eventually, find_free_port, need, read_process

LOG = "log: connect disconnect error"
HEAD = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
user.privileged: root
user.unprivileged: nobody
clientmethod: none
socksmethod: none
"""
PASS = rule("client pass", "from: 0/0 to: 0/0", LOG) + rule("socks pass", "from: 0/0 to: 0/0", LOG)

METHOD_NONE = b"\x05\x00"
BOUND5 = b"\x01\x0a\x01\x02\x03\x12\x34"  # 10.1.2.3 port 4660
REPLY5 = b"\x05\x00\x00" + BOUND5
REPLY4 = b"\x00\x5a\x12\x34\x0a\x01\x02\x03"
HTTP_OK = b"HTTP/1.0 200 OK\r\n\r\n"
# What a friendly upstream says to a CONNECT.
FRIENDLY = {"socks_v5": [METHOD_NONE, REPLY5], "socks_v4": [REPLY4], "http": [HTTP_OK]}


def route(*vias: tuple[str, int], **items: str) -> str:
    """Write a route for everything, through the upstreams at these addresses one after the other."""
    lines = ["from: 0/0 to: 0/0", *(f"via: {host} port = {port}" for host, port in vias)]
    to = items.pop("to", "")
    if to:
        lines[0] = f"from: 0/0 to: {to}"
    return rule("route", *lines, *(f"{name}: {value}" for name, value in items.items()))


def direct(to: str = "0/0", command: str = "connect bind udpassociate") -> str:
    """Write a route that leads directly to some targets."""
    return rule("route", f"from: 0/0 to: {to} via: direct", f"command: {command}")


Behaviour = Callable[[socket.socket, Seen], None]
# What answers a message: bytes, or a behaviour to the end, or the one and then the other.
Action = bytes | Behaviour | tuple[bytes, Behaviour]


def scripted(*actions: Action) -> Behaviour:
    """Make a behaviour that answers message after message, and returns what comes after the last."""

    def behave(connection: socket.socket, seen: Seen) -> None:
        for action in actions:
            if not receive(connection, seen):
                return
            data, then = action if isinstance(action, tuple) else (action, None)
            if not isinstance(data, bytes):
                data, then = b"", data
            connection.sendall(data)
            if then:
                then(connection, seen)
                return
        echo(connection, seen)

    return behave


def close(connection: socket.socket, seen: Seen) -> None:
    """Hang up."""


def hang_up_hard(connection: socket.socket, seen: Seen) -> None:
    """Reset the connection."""
    reset(connection)


def say_nothing(connection: socket.socket, seen: Seen) -> None:
    """Keep the connection and be silent."""
    discard(connection, seen)


def repeat(data: bytes) -> Behaviour:
    """Make an action that sends something for ever."""

    def behave(connection: socket.socket, seen: Seen) -> None:
        while True:
            connection.sendall(data)

    return behave


def drip(data: bytes, pause: float = 0.05) -> Behaviour:
    """Make an action that sends something for ever, a byte at a time."""

    def behave(connection: socket.socket, seen: Seen) -> None:
        while True:
            for offset in range(len(data)):
                connection.sendall(data[offset : offset + 1])
                time.sleep(pause)

    return behave


@contextlib.contextmanager
def upstream(*actions: Action) -> Iterator[TcpPeer]:
    """Run a scripted upstream."""
    with contextlib.closing(TcpPeer(scripted(*actions))) as peer:
        yield peer


def fetch(server: Server, host: str | bytes, port: int, data: bytes = b"ping") -> int:
    """Ask by SOCKS 5 for a target that echoes; return the code of the reply, and check the echo."""
    with Client(server.addresses[0]) as client:
        code = client.open5(1, host, port).code
        if code == 0:
            assert client.exchange(data) == data
        return code


class Theatre:
    """Scripted upstreams, each for a target address of its own, and one server that asks them all."""

    def __init__(self, scripts: dict[str, tuple[str, list[Action]]]) -> None:
        self.peers: dict[str, TcpPeer] = {}
        self.targets: dict[str, tuple[str, int]] = {}
        self.routes = ""
        for number, (name, (protocol, script)) in enumerate(scripts.items(), 1):
            peer = self.peers[name] = TcpPeer(scripted(*script))
            host = f"192.0.2.{number}"
            self.targets[name] = host, 80
            self.routes += route(peer.address, to=f"{host}/32", proxyprotocol=protocol)

    def close(self) -> None:
        """End the upstreams."""
        for peer in self.peers.values():
            peer.close()


# ------------------------------ proxies that others wrote ------------------------------


@contextlib.contextmanager
def running(command: list[str], ready: Callable[[], bool], folder: Path, name: str) -> Iterator[None]:
    """Run a program until the block ends; its output is kept in a file."""
    with (folder / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        eventually(lambda: ready() or process.poll() is not None)
        assert process.poll() is None, (folder / f"{name}.out").read_text()
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        eventually(lambda: read_process(process.pid) is None)


def answers(port: int) -> bool:
    """Tell whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def microsocks(folder: Path, *options: str) -> Iterator[int]:
    """Run microsocks and give its port."""
    program = shutil.which("microsocks")
    need(program, "microsocks is missing (Debian package microsocks)")
    port = find_free_port()
    command = [str(program), "-i", "127.0.0.1", "-p", str(port), *options]
    with running(command, lambda: answers(port), folder, "microsocks"):
        yield port


TINYPROXY = """\
Port {port}
Listen 127.0.0.1
Timeout 30
MaxClients 100
Allow 127.0.0.1
LogLevel Error
{more}
"""


@contextlib.contextmanager
def tinyproxy(folder: Path, world: World, more: str = "") -> Iterator[int]:
    """Run tinyproxy and give its port."""
    program = shutil.which("tinyproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    need(program, "tinyproxy is missing (Debian package tinyproxy-bin)")
    port = find_free_port()
    config = folder / "tinyproxy.conf"
    config.write_text(TINYPROXY.format(port=port, more=more))
    command = world.wrap([str(program), "-d", "-c", str(config)])
    with running(command, lambda: answers(port), folder, "tinyproxy"):
        yield port
