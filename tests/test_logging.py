"""What is logged, where, and in which form: people's log parsers and fail2ban read it."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from client import CONNECT, Client, greeting, password_message
from conftest import Factory
from peers import Company
from servers import (
    RECORD,
    SOCKD,
    Server,
    Sockd,
    World,
    eventually,
    find_free_port,
    hash_password,
    need,
    parse_log,
)

import sockd as program

HEAD = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
user.privileged: {privileged}
user.unprivileged: nobody
clientmethod: none
socksmethod: none
"""
HEAD = HEAD.format(privileged="root" if os.geteuid() == 0 else "nobody")
CONFIG = f"""\
{HEAD}
client pass {{
    from: 0.0.0.0/0 to: 0.0.0.0/0
    log: connect disconnect error
}}
socks pass {{
    from: 0.0.0.0/0 to: 0.0.0.0/0
    log: connect disconnect error data
}}
"""
LEVELS = {
    "emergency": 0,
    "alert": 1,
    "critical": 2,
    "error": 3,
    "warning": 4,
    "notice": 5,
    "info": 6,
    "debug": 7,
}


def visit(server: Server, peer: Callable[..., Any], data: bytes = b"hello") -> int:
    """Have one session from its beginning to its end, and give its target's port."""
    echo = peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", echo.port).code == 0
        assert client.exchange(data) == data
        client.finish_sending()
        client.expect_end()
    port: int = echo.port
    return port


def read(path: Path) -> str:
    """Read a log as it is."""
    return path.read_text(errors="backslashreplace")


def wait_for(path: Path, text: str) -> None:
    """Wait until a log exists and holds a text."""
    eventually(lambda: path.exists() and text in read(path))


# ------------------------------ places ------------------------------


def test_every_target_gets_every_record(sockd: Factory, peer: Callable[..., Any], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    server = sockd(f"logoutput: {one} stdout stderr {two}\n{CONFIG}")
    visit(server, peer)
    eventually(lambda: "tcp/accept ]" in read(server.output_path))
    server.stop()
    texts = [read(path) for path in (one, two, server.error_path, server.output_path)]
    assert len(set(texts)) == 1
    assert len(parse_log(texts[0])) == len(texts[0].splitlines()) >= 9
    for path in (one, two):
        assert path.stat().st_mode & 0o777 == 0o640
        assert path.stat().st_uid == os.geteuid()


def test_log_file_is_appended_to(sockd: Factory, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("older\n")
    sockd(f"logoutput: {log}\n{CONFIG}").stop()
    assert read(log).startswith("older\n")
    assert len(read(log).splitlines()) > 3


def test_records_have_the_form_of_dante(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG)
    visit(server, peer, bytes(range(256)))
    eventually(lambda: "tcp/accept ]" in server.text)
    server.stop()
    lines = read(server.error_path).splitlines()
    found = [RECORD.fullmatch(line) for line in lines]
    assert all(found), lines
    assert {match["program"] for match in found if match} == {"sockd"}
    pids = {int(match["pid"]) for match in found if match}
    assert server.pid in pids and len(pids) == 2
    assert {match["level"] for match in found if match} <= LEVELS.keys()
    times = [float(match["time"]) for match in found if match]
    assert times == sorted(times)
    for match in found:
        assert match
        clock = subprocess.run(
            ["date", "-d", f"@{match['time']}", "+%b %e %H:%M:%S"],
            capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"},
        ).stdout.strip()  # fmt: skip
        assert match["date"] == clock


def test_errorlog_gets_warnings_and_worse(sockd: Factory, peer: Callable[..., Any], tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    server = sockd(f"logoutput: stderr\nerrorlog: {errors}\n{CONFIG}", "-p", "/nonexistent/pid")
    visit(server, peer)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", peer("refuser").port).code == 5
    eventually(lambda: server.text.count("tcp/accept ]") == 2)
    server.stop()
    severe = [record for record in server.log if LEVELS[record.level] <= LEVELS["warning"]]
    assert parse_log(read(errors)) == severe
    assert [record.level for record in severe] == ["warning", "alert"]


def test_log_that_cannot_be_opened_is_a_warning(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    server = sockd(f"logoutput: {tmp_path}/log /nonexistent/folder/log\n{CONFIG}")
    (warning,) = [record for record in server.log if record.level == "warning"]
    assert "/nonexistent/folder/log" in warning.message
    assert "No such file or directory" in warning.message
    visit(server, peer)


def test_log_that_nobody_reads_holds_nothing_up(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    """Opening a FIFO waits for who reads there."""
    for name in ("first", "second"):
        os.mkfifo(tmp_path / name)
    server = sockd(f"logoutput: {tmp_path}/log {tmp_path}/first\n{CONFIG}")
    server.reload(f"logoutput: {tmp_path}/log {tmp_path}/second\n{CONFIG}")
    for name, begin in (("first", "warning: "), ("second", "error: SIGHUP ]: config not reloaded: ")):
        line = f'{begin}could not open logfile "{tmp_path}/{name}": No such device or address'
        assert line in server.messages
    visit(server, peer)


def test_only_log_that_cannot_be_opened_is_told_on_stderr(tmp_path: Path) -> None:
    port, errors = find_free_port(), tmp_path / "err"
    config = tmp_path / "sockd.conf"
    config.write_text("logoutput: /nonexistent/log\n" + CONFIG.replace("port = 0", f"port = {port}"))
    command = [*Sockd.command(Sockd.__new__(Sockd)), "-f", str(config), "-p", str(tmp_path / "pid")]
    with errors.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            eventually(lambda: is_served(port))
        finally:
            process.terminate()
    assert process.returncode == 0
    assert "/nonexistent/log" in read(errors)


def is_served(port: int) -> bool:
    """Tell whether a SOCKS server answers on a port."""
    try:
        with Client(("127.0.0.1", port)) as client:
            return client.greet() == 0
    except ConnectionRefusedError:
        return False


def test_nothing_is_logged_without_logoutput(tmp_path: Path) -> None:
    port, errors = find_free_port(), tmp_path / "err"
    config = tmp_path / "sockd.conf"
    config.write_text(CONFIG.replace("port = 0", f"port = {port}"))
    command = [*Sockd.command(Sockd.__new__(Sockd)), "-f", str(config), "-p", str(tmp_path / "pid")]
    with errors.open("wb") as stderr, subprocess.Popen(command, stderr=stderr, stdout=stderr) as process:
        try:
            eventually(lambda: is_served(port))
        finally:
            process.terminate()
    assert (process.returncode, read(errors)) == (0, "")


def is_logged_in(log: Path, moved: Path, port: int) -> bool:
    """Wait for the record of a client's end; tell whether it is in the new file."""
    line = f" 127.0.0.1.{port} -> 5: local client closed"
    eventually(lambda: line in read(log) or line in read(moved))
    return line in read(log)


def says_in(log: Path, moved: Path, client: Client, text: str, port: int) -> bool:
    """Send the echo some text and wait for the record; tell whether it is in the new file."""
    line = f" 127.0.0.1.{port} (1): {text}\n"
    before = read(log).count(line) + read(moved).count(line)
    assert client.exchange(text.encode()) == text.encode()
    eventually(lambda: read(log).count(line) + read(moved).count(line) > before)
    return line in read(log)


@pytest.mark.parametrize(
    "change", ["", "    timeout.negotiate: 7{number}\n"], ids=["same-rules", "new-rules"]
)
def test_log_file_is_opened_again_at_reload(
    change: str, sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    config = f"logoutput: {log}\n{CONFIG}"
    server = sockd(config)
    old = Client(server.addresses[0])
    echo = peer("echo")
    assert old.open5(CONNECT, "127.0.0.1", echo.port).code == 0
    for number in (1, 2):
        moved = tmp_path / f"log.{number}"
        log.rename(moved)
        size = moved.stat().st_size
        server.config_path.write_text(
            config.replace("client pass {\n", "client pass {\n" + change.format(number=number))
        )
        server.signal(signal.SIGHUP)
        wait_for(log, "SIGHUP ]")
        # In the first moment a client may still meet a worker that has not got the new file yet.
        eventually(lambda moved=moved: is_logged_in(log, moved, visit(server, peer)))
        eventually(lambda moved=moved, text=str(number): says_in(log, moved, old, text, echo.port))
        assert moved.stat().st_size >= size
        assert log.stat().st_mode & 0o777 == 0o640
    old.close()
    eventually(lambda: "tcp/accept ]" in read(log).splitlines()[-1])
    server.take_baseline()


def fill_worker(server: Server) -> None:
    """Let the only worker open no file more."""
    pid = next(record.pid for record in server.log if record.message.endswith(" running"))
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min({*range(len(taken) + 1)} - taken), hard))


@pytest.mark.parametrize("errorlog", ["", "errorlog: {folder}/errors\n"], ids=["one-log", "two-logs"])
def test_worker_without_a_free_descriptor_outlives_a_reload(
    errorlog: str, sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    """One log that is opened again has the place that it keeps for the worst; for two it has none."""
    log, moved, echo = tmp_path / "log", tmp_path / "log.1", peer("echo")
    ours = f"user.unprivileged: {pwd.getpwuid(os.geteuid()).pw_name}\n"  # who may set the worker's limits
    config = CONFIG.replace("user.unprivileged: nobody\n", ours)
    server = sockd(f"logoutput: stderr {log}\n{errorlog.format(folder=tmp_path)}{config}")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", echo.port).code == 0
        assert client.exchange(b"before") == b"before"
        fill_worker(server)
        log.rename(moved)
        server.signal(signal.SIGHUP)
        wait_for(log, "SIGHUP ]")
        if errorlog:
            wait_for(moved, "warning: no descriptor is left for a log that was opened again")
        eventually(lambda: says_in(log, moved, client, "3", echo.port) or errorlog)
        assert ("(1): 3\n" in read(log)) is not bool(errorlog)
        with Client(server.addresses[0]) as late:
            late.expect_end_or_reset()  # and no descriptor was found by giving a place up for good
        assert client.exchange(b"still there") == b"still there"


def test_log_file_that_is_gone_for_good_keeps_the_server_alive(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    server = sockd(f"logoutput: {tmp_path}/main {folder}/log\n{CONFIG}")
    shutil.rmtree(folder)
    server.reload()
    assert any(record.level == "warning" and f"{folder}/log" in record.message for record in server.log)
    visit(server, peer)
    folder.mkdir()
    server.reload()
    # In the first moment a client may still meet a worker that has not got the new file yet.
    eventually(lambda: visit(server, peer) and "tcp/accept ]" in read(folder / "log"))
    server.take_baseline()


# ------------------------------ syslog ------------------------------


@dataclass(frozen=True)
class SyslogWorld(World):
    """A mount namespace whose /dev/log is a socket of the test's."""

    folder: Path = Path()

    def wrap(self, command: list[str]) -> list[str]:
        """Give the command that runs `command` with a /dev of its own, in the same process."""
        dev = self.folder / "dev"
        nodes = [
            f"touch {dev}/{n} && mount --bind /dev/{n} {dev}/{n} &&"
            for n in ("null", "zero", "urandom", "random")
        ]
        steps = [f"mkdir {dev} && mount -t tmpfs none {dev} &&", *nodes]
        # Not by its path, which is closed to those without privileges.
        steps += [
            f"mkdir {dev}/there && mount --bind {self.folder} {dev}/there && ln -s there/log {dev}/log &&"
        ]
        steps += [f"mount --rbind {dev} /dev &&"]
        script = " ".join([*steps, 'exec "$@"'])
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]


def bind_unix(kind: socket.SocketKind, path: Path) -> socket.socket:
    """Give a socket that anybody may write to, also who has no privileges."""
    bound = socket.socket(socket.AF_UNIX, kind)
    bound.bind(str(path))
    path.chmod(0o666)
    return bound


class Syslog:
    """The receiving end of /dev/log.  The kernel keeps only ten datagrams for one that does not read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log"
        self.path.unlink(missing_ok=True)
        self.socket = bind_unix(socket.SOCK_DGRAM, self.path)
        self.messages: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := self.socket.recv(65536):
            self.messages.append(data.decode())

    def close(self) -> None:
        """Take what has come so far, and leave: syslogd is gone now."""
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as waker:
            waker.sendto(b"", str(self.path))
        self._thread.join()
        self.socket.close()
        self.path.unlink()


@pytest.fixture
def syslog(as_root: None, tmp_path: Path) -> Iterator[Syslog]:
    """Listen where the program believes syslogd to be."""
    need(shutil.which("unshare"), "unshare is missing")
    folder = tmp_path / "syslog"
    folder.mkdir()
    receiver = Syslog(folder)
    yield receiver
    if receiver.path.exists():
        receiver.close()


SYSLOG = re.compile(r"<(\d+)>(\w{3} [ \d]\d \d\d:\d\d:\d\d) sockd\[(\d+)\]: (\w+): (.*)\n", re.DOTALL)


@pytest.mark.root
@pytest.mark.parametrize(
    "target, facility",
    [
        ("syslog", 3),
        ("syslog/daemon", 3),
        ("syslog/auth", 4),
        ("syslog/authpriv", 10),
        ("syslog/user", 1),
        ("syslog/local0", 16),
        ("syslog/local7", 23),
    ],
    ids=str,
)
def test_syslog_gets_what_a_file_gets(
    target: str, facility: int, sockd: Factory, peer: Callable[..., Any], syslog: Syslog, tmp_path: Path
) -> None:
    world = SyslogWorld({}, syslog.path.parent)
    server = sockd(f"logoutput: {tmp_path}/log {target}\n{CONFIG}", "-p", "/nonexistent/pid", world=world)
    visit(server, peer)
    eventually(lambda: server.text.count("tcp/accept ]") == 1)
    server.stop()
    syslog.close()
    found = [SYSLOG.fullmatch(message) for message in syslog.messages]
    assert all(found), syslog.messages
    for match in found:
        assert match
        assert int(match[1]) == facility * 8 + LEVELS[match[4]]
    assert sorted(f"{m[4]}: {m[5]}" for m in found if m) == sorted(server.messages)
    assert {m[4] for m in found if m} >= {"info", "warning", "alert"}


@pytest.mark.root
def test_errorlog_may_be_another_facility(sockd: Factory, peer: Callable[..., Any], syslog: Syslog) -> None:
    world = SyslogWorld({}, syslog.path.parent)
    server = sockd(
        f"logoutput: stderr\nerrorlog: syslog/local3\n{CONFIG}", "-p", "/nonexistent/pid", world=world
    )
    visit(server, peer)
    server.stop()
    syslog.close()
    heads = [message.split(">")[0] for message in syslog.messages]
    assert heads == [f"<{19 * 8 + LEVELS['warning']}", f"<{19 * 8 + LEVELS['alert']}"]


@pytest.mark.root
def test_syslog_that_was_restarted_is_found_at_reload(
    sockd: Factory, peer: Callable[..., Any], syslog: Syslog
) -> None:
    world = SyslogWorld({}, syslog.path.parent)
    server = sockd(f"logoutput: stderr syslog\n{CONFIG}", world=world)
    syslog.close()
    visit(server, peer)
    with contextlib.closing(Syslog(syslog.path.parent)) as new:
        server.reload()
        eventually(lambda: visit(server, peer) and any("tcp/connect ]" in m for m in new.messages))
    server.take_baseline()


def is_logged(server: Server, peer: Callable[..., Any], syslog: Syslog) -> bool:
    """Tell whether a session that begins now is logged."""
    before = len(syslog.messages)
    visit(server, peer)
    with contextlib.suppress(AssertionError):
        eventually(lambda: any("tcp/connect ]" in m for m in syslog.messages[before:]), within=0.5)
        return True
    return False


@pytest.mark.root
@pytest.mark.parametrize("factory", ["sockd", "danted"], indirect=True)
def test_syslog_that_was_restarted_loses_no_record(
    factory: Factory, peer: Callable[..., Any], syslog: Syslog
) -> None:
    server = factory(f"logoutput: stderr syslog\n{CONFIG}", world=SyslogWorld({}, syslog.path.parent))
    assert is_logged(server, peer, syslog)
    syslog.close()
    with contextlib.closing(Syslog(syslog.path.parent)) as new:
        assert is_logged(server, peer, new)
        assert is_logged(server, peer, new)


@pytest.mark.root
@pytest.mark.parametrize("factory", ["sockd", "danted"], indirect=True)
def test_syslog_that_starts_late_is_found(factory: Factory, peer: Callable[..., Any], syslog: Syslog) -> None:
    syslog.close()
    server = factory(f"logoutput: stderr syslog\n{CONFIG}", world=SyslogWorld({}, syslog.path.parent))
    visit(server, peer)
    with contextlib.closing(Syslog(syslog.path.parent)) as new:
        eventually(lambda: is_logged(server, peer, new))
        assert is_logged(server, peer, new)


@pytest.mark.root
@pytest.mark.parametrize("starts_late", [False, True], ids=["restarted", "late"])
def test_syslog_is_found_again_from_a_jail(
    sockd: Factory, peer: Callable[..., Any], syslog: Syslog, tmp_path: Path, starts_late: bool
) -> None:
    (tmp_path / "jail").mkdir()
    if starts_late:
        syslog.close()
    config = f"logoutput: stderr syslog\nchroot: {tmp_path}/jail\n{CONFIG}"
    server = sockd(config, world=SyslogWorld({}, syslog.path.parent))
    if not starts_late:
        assert is_logged(server, peer, syslog)
        syslog.close()
    with contextlib.closing(Syslog(syslog.path.parent)) as new:
        eventually(lambda: is_logged(server, peer, new))
        assert is_logged(server, peer, new)


class StreamSyslog:
    """A syslog daemon that takes connections."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log"
        self.listener = bind_unix(socket.SOCK_STREAM, self.path)
        self.listener.listen(20)
        self.listener.setblocking(False)
        self.came: dict[socket.socket, bytes] = {}

    @property
    def messages(self) -> list[str]:
        """The whole records that have come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self.listener.accept()
                connection.setblocking(False)
                self.came[connection] = b""
        for connection in self.came:
            with contextlib.suppress(BlockingIOError):
                while data := connection.recv(65536):
                    self.came[connection] += data
        return [record.decode() for came in self.came.values() for record in came.split(b"\0")[:-1]]

    def close(self) -> None:
        """Be gone."""
        for connection in (self.listener, *self.came):
            connection.close()
        self.path.unlink()


@pytest.mark.root
@pytest.mark.parametrize("jailed", [False, True], ids=["open", "jail"])
def test_syslog_may_be_a_stream(
    sockd: Factory, peer: Callable[..., Any], syslog: Syslog, tmp_path: Path, jailed: bool
) -> None:
    (tmp_path / "jail").mkdir()
    jail = f"chroot: {tmp_path}/jail\n" if jailed else ""
    syslog.close()
    with contextlib.closing(StreamSyslog(syslog.path.parent)) as first:
        world = SyslogWorld({}, syslog.path.parent)
        server = sockd(f"logoutput: stderr syslog\n{jail}{CONFIG}", world=world)
        assert is_logged(server, peer, first)
        assert all(SYSLOG.fullmatch(message + "\n") for message in first.messages)
    with contextlib.closing(StreamSyslog(syslog.path.parent)) as second:
        eventually(lambda: is_logged(server, peer, second))
    with contextlib.closing(Syslog(syslog.path.parent)) as third:
        eventually(lambda: is_logged(server, peer, third))


@pytest.mark.root
def test_syslog_that_reads_nothing_holds_no_session_up(
    sockd: Factory, peer: Callable[..., Any], syslog: Syslog
) -> None:
    syslog.close()
    with bind_unix(socket.SOCK_STREAM, syslog.path) as listener:
        listener.listen(20)
        server = sockd(f"logoutput: stderr syslog\n{CONFIG}", world=SyslogWorld({}, syslog.path.parent))
        begun, waited = time.monotonic(), 0.0
        while waited < 0.5 and time.monotonic() < begun + 60:
            now = time.monotonic()
            visit(server, peer)
            waited = time.monotonic() - now
        assert 0.5 < waited < 3  # there is no room any more, and records are lost
        now = time.monotonic()
        for _ in range(10):
            visit(server, peer)
        assert time.monotonic() - now < 9
    syslog.path.unlink()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_syslog_that_reads_nothing_holds_nobody_up_whose_socket_is_made_to_wait(
    kind: socket.SocketKind,
) -> None:
    """Whether a socket waits is said for all processes that share it, and a worker may have gone wrong."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(1000))
    target = program.LogTarget.adopted("syslog", ours.detach())

    def write(count: int) -> None:
        os.set_blocking(target.descriptor, True)
        for _ in range(count):
            target.write("now", "sockd", 6, "lost, or not")

    writer = threading.Thread(target=write, args=(20,), daemon=True)
    writer.start()
    writer.join(5)
    assert not writer.is_alive()
    with theirs, contextlib.closing(target):
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while b"lost" not in theirs.recv(1000):
                pass
        write(1)
        assert b"lost, or not" in theirs.recv(1000)


@pytest.mark.root
def test_missing_syslog_is_a_warning(sockd: Factory, peer: Callable[..., Any], syslog: Syslog) -> None:
    syslog.close()
    server = sockd(f"logoutput: stderr syslog\n{CONFIG}", world=SyslogWorld({}, syslog.path.parent))
    (warning,) = [record for record in server.log if record.level == "warning"]
    assert "syslog" in warning.message
    visit(server, peer)


# ------------------------------ want of an address to leave by ------------------------------


@pytest.mark.root
@pytest.mark.parametrize("factory", ["sockd", "danted"], indirect=True)
@pytest.mark.parametrize("rotation", ["same-same", "route"])
def test_external_address_that_does_not_fit_is_a_warning_and_named_with_the_target(
    factory: Factory, tmp_path: Path, rotation: str
) -> None:
    head = HEAD.replace("external: 127.0.0.1", f"external.rotation: {rotation}\nexternal: 127.0.0.5")
    server = factory(f"errorlog: {tmp_path}/errors\n{CONFIG.replace(HEAD, head)}")
    with Client(server.addresses[0]) as client:
        source = "{}.{}".format(*client.address)
        assert client.open5(CONNECT, "127.0.0.1", 80) == (3, 1, "127.0.0.1", 80)
    server_side = f"127.0.0.1.{server.port}"
    reason = (
        f"using external.rotation = {rotation}, local address 127.0.0.1 was selected for forwarding from our "
        f"local client {source} to target 127.0.0.1.80, but that local address is not set on our external "
        f"interface(s).  Configuration error in {server.config_path}?"
    )
    path = f"{source} {server_side} -> 0.0.0.0.0 127.0.0.1.80"
    line = f"info: block(1): tcp/connect ]: {path}: could not bind address to use on external side: {reason}"
    # danted cuts what is long.
    eventually(lambda: any(line.startswith(message) and path in message for message in server.messages))
    warnings = [r for r in parse_log(read(tmp_path / "errors")) if "external.rotation" in r.message]
    assert [record.level for record in warnings] == ["warning"]
    assert warnings[0].message.removeprefix("getoutaddr(): ") == reason


def test_want_of_an_external_address_is_a_warning_once_a_second(sockd: Factory) -> None:
    head = HEAD.replace("external: 127.0.0.1", "external.rotation: same-same\nexternal: 127.0.0.5")
    server = sockd(CONFIG.replace(HEAD, head))
    begun = time.monotonic()
    for _ in range(10):
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "127.0.0.1", 80).code == 3
    took = time.monotonic() - begun
    warnings = [m for m in server.messages if m.startswith("warning: using external.rotation")]
    assert 1 <= len(warnings) <= 1 + took


# ------------------------------ which word gives which record ------------------------------

WORDS = ("connect", "disconnect", "data", "error", "ioop", "tcpinfo")
SUBSETS = [tuple(itertools.compress(WORDS, bits)) for bits in itertools.product((0, 1), repeat=len(WORDS))]
SHOWS_BLOCK = {"connect", "disconnect", "data", "ioop"}
DATA = b"12\n45"


def rules_with_every_subset(blocked_port: int) -> str:
    """Give rules for clients from 127.0.1.N and 127.0.2.N that log by the Nth subset of words."""
    lines = []
    for number, words in enumerate(SUBSETS, 1):
        log = f"    log: {' '.join(words)}\n" if words else ""
        lines += [
            f"client pass {{\n    from: 127.0.1.{number}/32 to: 0.0.0.0/0\n{log}}}",
            f"client block {{\n    from: 127.0.2.{number}/32 to: 0.0.0.0/0\n{log}}}",
            f"socks block {{\n    from: 127.0.1.{number}/32 to: 0.0.0.0/0 port = {blocked_port}\n{log}}}",
            f"socks pass {{\n    from: 127.0.1.{number}/32 to: 0.0.0.0/0\n{log}}}",
        ]
    return "\n".join(sorted(lines, key=lambda rule: rule.startswith("socks"))) + "\n"


def expected_records(kind: str, number: int, words: tuple[str, ...]) -> list[str]:
    """Give the shapes of the records of one session, as danted has them."""
    info = "+info" if "tcpinfo" in words else ""
    blocked = not SHOWS_BLOCK.isdisjoint(words)
    if kind == "client-blocked":
        return [f"block({2 * number}): tcp/accept ]{info}"] if blocked else []
    accept, connect = f"pass({2 * number - 1}): tcp/accept", f"pass({2 * number}): tcp/connect"
    shapes = [f"{accept} [{info}"] if "connect" in words else []
    if kind == "blocked":
        above = [f"block({2 * number - 1}): tcp/connect ]", f"block({2 * number - 1}): tcp/accept ]"]
        return shapes + (above if blocked else [])
    ends = {"normal": {"disconnect"}, "refused": {"disconnect", "error"}}[kind]
    if kind == "normal" and "connect" in words:
        shapes += [f"{connect} [{info}"]
    if kind == "normal" and not {"data", "ioop"}.isdisjoint(words):
        chunk = "(5): 12\\n45" if "data" in words else "(5)"
        shapes += [f"{connect} - {text}{info}" for text in (chunk, chunk, "(0)")]
    if not ends.isdisjoint(words):
        shapes += [f"{connect} ]{info}", f"{accept} ]{info}"]
    return shapes


def shape_of(message: str) -> str:
    """Reduce a record to verdict, rule, event and bracket, and what a `-` record says of the data."""
    first = message.split("\n")[0]
    head = re.match(r"\w+\(\d+\): \S+ [][-]", first)
    assert head, message
    data = re.search(r" \(\d+\)(: \S*)?$", first) if head[0].endswith("-") else None
    return head[0] + (data[0] if data else "") + ("+info" if "\nTCP_INFO:\n" in message else "")


@pytest.mark.root
@pytest.mark.parametrize("kind", ["sockd", "danted"])
def test_log_words_give_exactly_their_records(
    kind: str, as_root: None, request: pytest.FixtureRequest
) -> None:
    with Company() as company:
        targets = {
            name: company.start(peer)
            for name, peer in (("normal", "echo"), ("refused", "refuser"), ("blocked", "echo"))
        }
        server = request.getfixturevalue(kind)(HEAD + rules_with_every_subset(targets["blocked"].port))
        clients = {}
        for session in ("normal", "refused", "blocked", "client-blocked"):
            for number in range(1, len(SUBSETS) + 1):
                source = (f"127.0.{2 if session == 'client-blocked' else 1}.{number}", 0)
                with Client(server.addresses[0], source=source) as client:
                    clients[".".join(map(str, client.address))] = (session, number)
                    talk(client, targets.get(session))
    expected = {client: expected_records(*who, SUBSETS[who[1] - 1]) for client, who in clients.items()}

    def differences() -> list[str]:
        shapes: dict[str, list[str]] = {client: [] for client in clients}
        for record in server.log:
            for client in re.findall(r"127\.0\.[12]\.\d+\.\d+", record.message):
                if client in shapes:
                    shapes[client].append(shape_of(record.message))
        return [
            f"{clients[c]} {SUBSETS[clients[c][1] - 1]}: {shapes[c]}, not {expected[c]}"
            for c in clients
            if shapes[c] != expected[c]
        ]

    with contextlib.suppress(AssertionError):
        eventually(lambda: not differences())
    assert not differences()


def talk(client: Client, target: Any) -> None:
    """Have a session with a target, or see that even the greeting gets no answer."""
    if target is None:
        client.expect_end_or_reset()
        return
    assert client.greet() == 0
    if client.request5(CONNECT, "127.0.0.1", target.port).code == 0:
        assert client.exchange(DATA) == DATA
        client.finish_sending()
    client.expect_end_or_reset()


TCP_INFO_WORDS = re.findall(
    r"\w+",
    """
    state ca_state retransmits probes backoff options snd_wscale rcv_wscale rto ato snd_mss rcv_mss unacked
    sacked lost retrans fackets last_data_sent last_ack_sent last_data_recv last_ack_recv pmtu rcv_ssthresh
    rtt rttvar snd_ssthresh snd_cwnd advmss reordering rcv_rtt rcv_space total_retrans
    """,
)


@pytest.mark.parametrize("kind", ["sockd", "danted"])
def test_tcp_info_has_a_line_for_each_word_and_a_column_for_each_side(
    kind: str, as_root: None, request: pytest.FixtureRequest, peer: Callable[..., Any]
) -> None:
    server = request.getfixturevalue(kind)(CONFIG.replace("log: connect", "log: tcpinfo connect"))
    visit(server, peer)
    eventually(lambda: server.text.count("tcp/accept ]") == 1)
    for event, sides in (("tcp/accept [", 1), ("tcp/connect [", 2)):
        (message,) = [record.message for record in server.log if event in record.message]
        _, title, *lines = message.splitlines()
        assert title == "TCP_INFO:"
        rows = [re.fullmatch(r"tcpi_(\w+) *: (\S.*)", line) for line in lines]
        assert all(rows), lines
        assert [row[1] for row in rows if row] == TCP_INFO_WORDS
        assert {len(row[2].split(" <-> ")) for row in rows if row} == {sides}
        assert rows[0] and rows[0][2].split(" <-> ") == ["1 (ESTABLISHED)"] * sides


# ------------------------------ what clients put into the log ------------------------------

HOSTILE = [
    b"a\nNov 20 10:00:00 (1.000000) sockd[1]: alert: forged",
    b"a\r\nb",
    b"\x1b[2Jcleared",
    b"nul\x00byte",
    b"\xff\xfe\x80",
    "\u202eright-to-left \u2028separator".encode(),
    b'quote " and \\ and % and @',
    b"\x85next\x0bline\x0c",
    b"x" * 255,
]


@pytest.mark.parametrize("text", HOSTILE, ids=[f"{t[:12]!r}" for t in HOSTILE])
def test_hostile_text_stays_within_one_record(text: bytes, sockd: Factory, tmp_path: Path) -> None:
    accounts = tmp_path / "accounts"
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    config = CONFIG.replace("socksmethod: none", f"passwordfile: {accounts}\nsocksmethod: username none")
    server = sockd(config)
    with Client(server.addresses[0]) as client:
        assert client.greet([2]) == 2
        assert client.authenticate(text, b"Correct-Horse-Battery") == 1
        client.expect_end_or_reset()
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, text, 80).code != 0
    eventually(lambda: server.text.count("tcp/accept ]") == 2)
    server.stop()
    raw = server.error_path.read_bytes()
    assert raw.isascii()
    assert all(byte >= 0x20 or byte == 0x0A for byte in raw)
    for line in raw.decode().split("\n")[:-1]:
        assert RECORD.fullmatch(line), line
    assert [r.level for r in server.log if r.level != "info"] == ["alert"]
    assert b"Horse" not in raw


# ------------------------------ fail2ban ------------------------------

# Versions of fail2ban before 1.1.0 have no filter for Dante: there ours stands in for it.
STOCK_FILTER = Path("/etc/fail2ban/filter.d/dante.conf")
WRONG = r'system password authentication failed for user "\w+"'
UNKNOWN = r'could not access user "\w+"\'s records in the system password file: no system error'
OUR_FILTER = rf"""
[Definition]
line = ^\s*(?:\S+\s+)?danted\[\d+\]: info: block\(1\): tcp/accept \]: <HOST>\.\d+ [\d.]+: error after reading
count = \d+ bytes in \d+ seconds
failregex = %(line)s %(count)s: (?:{WRONG}|{UNKNOWN})$
"""


def test_fail2ban_finds_failed_log_ins_and_nothing_else(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = shutil.which("fail2ban-regex")
    need(program, "Debian package fail2ban is missing")
    link, log, accounts, filter_ = (tmp_path / name for name in ("danted", "log", "accounts", "dante.conf"))
    link.symlink_to(SOCKD)
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    filter_.write_text(OUR_FILTER)
    monkeypatch.setattr(Sockd, "command", lambda _: [sys.executable, str(link)])
    users = f"logoutput: {log}\npasswordfile: {accounts}\n"
    server = sockd(users + CONFIG.replace("socksmethod: none", "socksmethod: username"))
    guilty = guess_until_counted(server)
    behave_badly_otherwise(server, peer)
    eventually(lambda: read(log).count("127.0.0.99.") >= 6)
    server.stop()
    assert {record.program for record in server.log} == {"danted"}
    rules = STOCK_FILTER if STOCK_FILTER.exists() else filter_
    command = [str(program), "-o", "ip", str(log), str(rules)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sorted(result.stdout.split()) == sorted(guilty)


def guess_until_counted(server: Server) -> list[str]:
    """Log in wrongly, from an address each, and give the addresses that fail2ban's filter can see.

    It does not know `1 second`, which Dante writes when the clock passes a second's border.
    """
    for host, user in (("127.0.0.11", b"ann"), ("127.0.0.12", b"nobody_here"), ("127.0.0.13", b"ann")):
        with Client(server.addresses[0], source=(host, 0)) as client:
            assert client.greet([2]) == 2
            assert client.authenticate(user, b"wrong") == 1
    eventually(lambda: read(server.log_path).count("error after reading") == 3)
    lines = [line for line in read(server.log_path).splitlines() if " in 0 seconds: " in line]
    assert lines
    return [
        found[1] for line in lines if (found := re.search(r"tcp/accept \]: (127\.0\.0\.1[123])\.\d+ ", line))
    ]


def behave_badly_otherwise(server: Server, peer: Callable[..., Any]) -> None:
    """Do, from 127.0.0.99, what fails or looks bad and yet is no wrong password."""
    forged = (
        b'x" \ninfo: block(1): tcp/accept ]: 127.0.0.77.1 127.0.0.1.1: error after reading 9 bytes '
        b'in 0 seconds: system password authentication failed for user "y'
    )
    first = [
        b"\x06",
        b"GET / HTTP/1.0\r\n\r\n",
        greeting([0]),
        greeting([2]) + password_message(b"ann", b"x", version=5),
    ]
    first += [greeting([2]) + password_message(forged, b"x")]
    for data in first:
        with Client(server.addresses[0], source=("127.0.0.99", 0)) as client:
            client.send(data)
            with contextlib.suppress(ConnectionResetError):
                client.receive_all()
    for target in (peer("echo"), peer("refuser")):
        with Client(server.addresses[0], source=("127.0.0.99", 0)) as client:
            client.open5(CONNECT, "127.0.0.1", target.port, (b"ann", b"sesame"))
