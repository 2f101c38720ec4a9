"""The service manager's view: what it is told of the server, and the sockets that it passes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import CONNECT, Client
from conftest import Factory
from servers import (
    IS_EXECUTABLE,
    WITHIN,
    Server,
    Sockd,
    eventually,
    find_free_port,
    read_links,
    sockd_command,
)

import sockd as program

CONFIG = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
clientmethod: none
socksmethod: none
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
"""
PASS_SOCKETS = Path(__file__).with_name("pass_sockets.py")


class FakeManager:
    """Receives what a service tells its manager (sd_notify(3))."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(WITHIN)

    def receive(self) -> dict[str, str]:
        """Wait for one message and give its variables."""
        lines = self.socket.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def wait_for(self, name: str) -> dict[str, str]:
        """Wait for a message with a variable."""
        while True:
            message = self.receive()
            if name in message:
                return message


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeManager]:
    """Give a manager at a path or an abstract address, and tell servers of it."""
    address = str(tmp_path / "notify") if request.param == "file" else f"@sockd-test-{os.getpid()}-{tmp_path}"
    made = FakeManager(address[:100])
    with pytest.MonkeyPatch.context() as patch, made.socket:
        patch.setenv("NOTIFY_SOCKET", made.address)
        yield made


def test_manager_hears_of_readiness_reload_and_end(
    manager: FakeManager, lone_sockd: Callable[..., Server]
) -> None:
    port = find_free_port()
    server = lone_sockd(CONFIG.replace("port = 0", f"port = {port}"))
    ready = manager.receive()
    assert ready == {"READY": "1", "STATUS": "serving: 1 listener, 1 worker"}
    before = time.monotonic_ns() // 1000
    server.reload()
    reloading = manager.receive()
    assert reloading["RELOADING"] == "1"
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert manager.receive()["READY"] == "1"
    server.reload("nonsense\n")
    assert manager.receive()["RELOADING"] == "1"
    failed = manager.receive()
    assert failed["READY"] == "1" and failed["STATUS"].startswith("config not reloaded")
    assert server.stop() == 0
    assert manager.receive() == {"STOPPING": "1", "STATUS": "ending on signal 15"}


def test_ready_is_told_when_clients_can_connect(manager: FakeManager, tmp_path: Path) -> None:
    """The message is awaited before anything else, as systemd does; then nobody may be refused."""
    port = find_free_port()
    starting = StartingSockd(CONFIG.replace("port = 0", f"port = {port}"), tmp_path / "server")
    try:
        manager.wait_for("READY")
        with Client(("127.0.0.1", port)) as client:
            assert client.greet([0]) == 0
    finally:
        starting.kill()


class StartingSockd(Sockd):
    """A server that nobody has waited for."""

    def _wait_until_ready(self, is_daemon: bool) -> None:
        pass

    def take_baseline(self) -> None:
        pass


def test_server_that_does_not_start_is_never_ready(manager: FakeManager, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        config = CONFIG.replace("port = 0", f"port = {busy.getsockname()[1]}")
        starting = StartingSockd(config, tmp_path / "server")
        try:
            assert starting._popen.wait(WITHIN) == 1
        finally:
            starting.kill()
    manager.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.receive()


def test_daemon_names_its_main_process(
    manager: FakeManager, sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    server = sockd(f"logoutput: {tmp_path}/log\n{CONFIG}", "-D")
    assert manager.receive()["MAINPID"] == str(server.pid)


def test_watchdog_gets_its_signs_in_time(
    manager: FakeManager, sockd: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    sockd(CONFIG)
    for _ in range(4):
        assert manager.wait_for("WATCHDOG") == {"WATCHDOG": "1"}


def test_watchdog_gets_no_more_signs_than_it_needs(manager: FakeManager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "3600000000"}
    told = program.Manager(environment)
    told.sign_of_life()
    told.sign_of_life()
    told.tell("READY=1")
    assert [manager.receive(), manager.receive()] == [{"WATCHDOG": "1"}, {"READY": "1"}]


def test_watchdog_of_another_process_gets_none(
    manager: FakeManager, sockd: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    server = sockd(CONFIG)
    assert server.stop() == 0
    told = [manager.receive(), manager.receive()]
    assert ["READY" in told[0], "STOPPING" in told[1]] == [True, True]


def test_manager_that_does_not_listen_is_no_harm(
    sockd: Factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    server = sockd(CONFIG)
    server.reload()


def test_variables_are_taken_out_of_the_environment() -> None:
    environment = {
        "NOTIFY_SOCKET": "@nobody",
        "WATCHDOG_USEC": "1000000",
        "WATCHDOG_PID": str(os.getpid()),
        "LISTEN_FDS": "1",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "socks",
        "HOME": "/",
    }
    manager = program.Manager(environment)
    assert (manager.address, manager.watchdog_seconds) == ("@nobody", 0.5)
    assert list(program.open_passed_sockets(environment, program.Log("sockd"))) == []  # another's
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize("text", ["", "-1", "1.5", "x", "9" * 30])
def test_nonsense_in_a_variable_is_nothing(text: str) -> None:
    environment = {"WATCHDOG_USEC": text, "NOTIFY_SOCKET": "@nobody", "LISTEN_FDS": text}
    assert program.Manager(environment).watchdog_seconds == 0
    assert list(program.open_passed_sockets(environment, program.Log("sockd"))) == []


# ------------------------------ passed sockets ------------------------------


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch, sockd: Factory) -> Callable[..., Server]:
    """`activated("127.0.0.1/0", "name", config, *options)` starts sockd with listening sockets."""
    command = sockd_command()

    def start(addresses: str, names: str, config: str, *options: str) -> Server:
        launcher = [sys.executable, str(PASS_SOCKETS), addresses, names, *command]
        monkeypatch.setattr(Sockd, "command", lambda _: launcher)
        return sockd(config, *options)

    return start


def warnings_of(server: Server) -> list[str]:
    return [record.message for record in server.log if record.message.startswith("passed ")]


def check_service(server: Server, port: int, peer: Callable[..., Any]) -> None:
    """Check that a client at a port is served."""
    with Client(("127.0.0.1", port)) as client:
        target = peer("echo")
        assert client.open5(CONNECT, "127.0.0.1", target.port).code == 0


@pytest.mark.parametrize("options", [(), ("-D",)], ids=["foreground", "daemon"])
def test_passed_socket_is_served(
    activated: Callable[..., Server], peer: Callable[..., Any], tmp_path: Path, options: tuple[str, ...]
) -> None:
    port = find_free_port()
    # Nobody can bind it twice: the port is served only if the socket was taken.
    config = f"logoutput: {tmp_path}/log\n" + CONFIG.replace("port = 0", f"port = {port}")
    server = activated(f"127.0.0.1/{port}", "socks", config, *options)
    assert warnings_of(server) == []
    check_service(server, port, peer)
    server.reload(f"{config}# again\n")
    check_service(server, port, peer)


def test_nothing_but_the_passed_sockets_is_kept(
    activated: Callable[..., Server],
    peer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    secret, port = tmp_path / "secret", find_free_port()
    secret.write_text("of the caller")
    leaving = ["sh", "-c", f'exec "$@" 9<{secret}', "sh"]
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: start([*leaving, *command], **more))
    server = activated(f"127.0.0.1/{port}", "socks", CONFIG.replace("port = 0", f"port = {port}"))
    check_service(server, port, peer)
    assert not [p.pid for p in server.processes() if str(secret) in read_links(p.pid)]


def test_passed_sockets_find_their_addresses(
    activated: Callable[..., Server], peer: Callable[..., Any]
) -> None:
    first, second = find_free_port(), find_free_port()
    config = CONFIG.replace("port = 0", f"port = {first}\ninternal: 127.0.0.2 port = 0")
    server = activated(f"127.0.0.2/0,127.0.0.1/{first},127.0.0.1/{second}", "two::odd", config)
    assert warnings_of(server) == [
        f"passed socket odd 127.0.0.1.{second} is not used: no internal address fits it"
    ]
    assert [host for host, _ in server.addresses] == ["127.0.0.2"]
    check_service(server, first, peer)
    with Client(server.addresses[0]) as client:
        assert client.greet([0]) == 0


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("udp", r"127\.0\.0\.1\.\d+ is not used: not a TCP socket"),
        ("dual", r"::\.\d+ is not used: it takes IPv4 as well \(BindIPv6Only=ipv6-only prevents that\)"),
        ("127.0.0.3/0", r"127\.0\.0\.3\.\d+ is not used: no internal address fits it"),
        ("127.0.0.1/0,127.0.0.1/0", r"127\.0\.0\.1\.\d+ is not used: no internal address fits it"),
    ],
)
def test_passed_socket_that_does_not_fit_is_refused_in_one_line(
    activated: Callable[..., Server], peer: Callable[..., Any], address: str, reason: str
) -> None:
    config = CONFIG.replace("external", "internal: :: port = 0\nexternal", 1)
    server = activated(address, "", config)
    (line,) = warnings_of(server)
    assert re.fullmatch(f"passed socket {reason}", line)
    check_service(server, server.addresses[0][1], peer)


def test_descriptor_that_is_no_socket_is_refused_in_one_line(
    sockd: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'exec env LISTEN_PID=$$ LISTEN_FDS=1 "$@" 3</dev/null'
    launcher = ["sh", "-c", script, "sh", *sockd_command()]
    monkeypatch.setattr(Sockd, "command", lambda _: launcher)
    server = sockd(CONFIG)
    assert warnings_of(server) == ["passed descriptor 3 is not used: Socket operation on non-socket"]


def test_sockets_for_another_process_are_not_taken(sockd: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    if IS_EXECUTABLE:
        return  # PyInstaller's boot process claims them for the server without looking
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    server = sockd(CONFIG)
    assert warnings_of(server) == []


def test_signal_reaches_the_end_while_the_manager_is_told(
    manager: FakeManager, lone_sockd: Callable[..., Server]
) -> None:
    server = lone_sockd(CONFIG)
    server.signal(signal.SIGTERM)
    manager.wait_for("STOPPING")
    eventually(lambda: server._popen.poll() is not None)
