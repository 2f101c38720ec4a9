"""The processes that talk to clients have no power: no identity, no files, no way back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from servers import SOCKD, Server, Sockd, eventually, hash_password, need, read_process, run_sockd

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]

NOBODY = 65534
LOGIN = (b"ann", b"sesame")
CONFIG = """\
internal: 127.0.0.1 port = 0
internal: ::1 port = 0
external: 127.0.0.1
external: ::1
external.rotation: same-same
user.privileged: root
user.unprivileged: nobody
passwordfile: {accounts}
clientmethod: none
socksmethod: username
client pass {{
    from: 0/0 to: 0/0
    log: connect disconnect error
}}
socks pass {{
    from: 0/0 to: 0/0
    command: connect bind udpassociate bindreply udpreply
    log: connect disconnect error
}}
"""
LIBC = ctypes.CDLL(None, use_errno=True)
SYS_PIDFD_GETFD = 438  # the same on every architecture


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Give a configuration with a password file that root alone can read."""
    accounts = tmp_path / "accounts"
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    accounts.chmod(0o600)
    return CONFIG.format(accounts=accounts)


@pytest.fixture
def jail() -> Iterator[Path]:
    """Make an empty directory that only root may write to, and check that it stays empty."""
    folder = Path(tempfile.mkdtemp(prefix="sockd-jail-"))
    folder.chmod(0o755)
    yield folder
    found = list(folder.iterdir())
    shutil.rmtree(folder)
    assert not found


# ------------------------------ everything that a client can ask for ------------------------------


def use_connect(server: tuple[str, int], peer: Callable[..., Any], name: str, host: str) -> None:
    """Connect to an echo server by name."""
    echo = peer("echo", host)
    with Client(server) as client:
        assert client.open5(CONNECT, name, echo.port, LOGIN).code == 0
        assert client.exchange(b"connect") == b"connect"


def use_bind(server: tuple[str, int], host: str) -> None:
    """Have a visitor come in by way of the server."""
    with Client(server) as client:
        reply = client.open5(BIND, host, 0, LOGIN)
        assert reply.code == 0
        with socket.create_connection((reply.host, reply.port), timeout=10) as visitor:
            assert client.read_reply5().code == 0
            visitor.sendall(b"bind")
            assert client.receive(4) == b"bind"


def use_udp(server: tuple[str, int], peer: Callable[..., Any], name: str, host: str) -> None:
    """Exchange a datagram with an echo server, named by name."""
    echo = peer("udp-echo", host)
    with Client(server) as control, UdpClient((host, 0)) as client:
        reply = control.open5(UDP_ASSOCIATE, "0.0.0.0" if "." in host else "::", 0, LOGIN)
        assert reply.code == 0
        relay = (reply.host, reply.port)
        client.send(relay, name, echo.port, b"udp")
        assert client.receive(relay).data == b"udp"
        control.reset()


def use_everything(server: Server, peer: Callable[..., Any]) -> None:
    """Do over IPv4 and IPv6 what a client can do, and some things that fail."""
    four, six = server.addresses
    for address, name, host in ((four, "localhost", "127.0.0.1"), (six, "::1", "::1")):
        use_connect(address, peer, name, host)
        use_bind(address, host)
        use_udp(address, peer, name, host)
        for data in (
            b"\x06",
            b"\x05\x01\x00",
            b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00",
            b"\x05\x01\x02\x01\x03ann\x05wrong",
        ):
            with Client(address) as client, contextlib.suppress(ConnectionResetError):
                client.send(data)
                client.receive_all()
        with Client(address) as client:
            assert client.open5(CONNECT, host, peer("refuser", host).port, LOGIN).code == 5
        with Client(address) as client:
            assert client.open5(CONNECT, b"no\xffsuch.invalid", 80, LOGIN).code == 4


# ------------------------------ identity ------------------------------


def threads_of(pid: int) -> list[dict[str, str]]:
    """Give the status of each thread of a process, as a table."""
    tables = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = (task / "status").read_text().splitlines()
            tables.append({key: value.strip() for key, _, value in (line.partition(":") for line in lines)})
    return tables


def children_of(server: Server) -> dict[str, list[int]]:
    """Give the pids of a server's children by what they are: the powerless ones and the warden."""
    kinds: dict[str, list[int]] = {"powerless": [], "warden": []}
    for process in server.processes():
        if process.parent == server.pid:
            is_root = threads_of(process.pid)[0]["Uid"].split()[0] == "0"
            kinds["warden" if is_root else "powerless"].append(process.pid)
    return kinds


def check_powerless(pid: int) -> None:
    """Check that no thread of a process has any power left."""
    tables = threads_of(pid)
    assert tables
    for table in tables:
        assert table["Uid"].split() == [str(NOBODY)] * 4
        assert table["Gid"].split() == [str(NOBODY)] * 4
        assert table["Groups"] == ""
        for word in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(table[word], 16) == 0, word
        assert table["NoNewPrivs"] == "1"


def check_children(server: Server, jail: Path) -> None:
    """Check worker and resolver: who they are, and where they live."""
    # A helper that was forked just now is still root.
    children = eventually(lambda: len((c := children_of(server))["powerless"]) == 2 and c)
    assert len(children["warden"]) == 1
    roots = sorted(os.readlink(f"/proc/{pid}/root") for pid in children["powerless"])
    assert roots == sorted(["/", str(jail)])
    for pid in children["powerless"]:
        check_powerless(pid)
        if os.readlink(f"/proc/{pid}/root") != "/":
            assert os.readlink(f"/proc/{pid}/cwd") == str(jail)


def test_processes_that_meet_clients_have_no_power(
    sockd: Factory, peer: Callable[..., Any], config: str, jail: Path
) -> None:
    server = sockd(config, "--chroot", str(jail))
    check_children(server, jail)
    with contextlib.ExitStack() as opened:
        echo = peer("echo")
        for _ in range(8):
            client = opened.enter_context(Client(server.addresses[0]))
            assert client.open5(CONNECT, "localhost", echo.port, LOGIN).code == 0
        worker = find_worker(server)
        assert len(threads_of(worker)) > 8
        check_powerless(worker)

        server.reload("timeout.negotiate: 77\n" + config)
        assert client.exchange(b"x") == b"x"
        check_powerless(worker)
    eventually(lambda: len(server.processes()) == 4)
    check_children(server, jail)

    os.kill(find_worker(server), signal.SIGKILL)
    use_connect(server.addresses[0], peer, "localhost", "127.0.0.1")
    check_children(server, jail)
    server.take_baseline()


def find_worker(server: Server) -> int:
    """Give the pid of the newest worker."""
    return [record.pid for record in server.log if record.message.endswith(" running")][-1]


def test_power_is_dropped_without_a_jail_too(sockd: Factory, config: str) -> None:
    server = sockd(config)
    for pid in children_of(server)["powerless"]:
        check_powerless(pid)


def test_user_without_a_line_is_not_root(sockd: Factory, config: str) -> None:
    server = sockd(config.replace("user.unprivileged: nobody\n", ""))
    for pid in children_of(server)["powerless"]:
        check_powerless(pid)
    assert any(record.level == "warning" and "user.unprivileged" in record.message for record in server.log)


class ConfinedSockd(Sockd):
    """sockd in a container that grants less than root has elsewhere."""

    def command(self) -> list[str]:
        return ["setpriv", "--bounding-set=-dac_read_search,-net_admin", *super().command()]


@pytest.fixture
def confined_sockd(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Factory]:
    """Start servers that have little to keep when they give up root's identity."""
    need(shutil.which("setpriv"), "setpriv is missing")
    factory = Factory(ConfinedSockd, tmp_path, request.node)
    yield factory
    factory.close()


def test_warden_that_is_not_root_does_without_what_it_cannot_keep(
    confined_sockd: Factory, peer: Callable[..., Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        accounts = Path(folder, "accounts")
        accounts.write_text(f"ann:{hash_password('sesame')}\n")
        shutil.chown(accounts, "daemon")
        head = "external.tcp.so_rcvbufforce: 100000\nuser.privileged: daemon"
        config = CONFIG.format(accounts=accounts).replace("user.privileged: root", head)
        server = confined_sockd(config)
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *peer("echo").address, LOGIN).code == 0
    assert "could not set external.tcp.so_rcvbufforce: Operation not permitted" in server.text


def test_worker_holds_no_file_but_its_log(
    sockd: Factory, peer: Callable[..., Any], config: str, jail: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    server = sockd(f"logoutput: {log}\n{config}", "--chroot", str(jail))
    use_everything(server, peer)
    server.check_resources()  # the last session has closed its sockets
    worker = find_worker(server)
    held = {os.readlink(entry) for entry in Path(f"/proc/{worker}/fd").iterdir()}
    harmless = {"/dev/null", str(log), str(server.output_path), str(server.error_path)}
    assert {name for name in held if not re.match(r"(socket|pipe|anon_inode):", name)} <= harmless


# ------------------------------ the jail ------------------------------


@pytest.mark.parametrize("how", ["keyword", "option"])
def test_everything_works_from_an_empty_directory(
    how: str, sockd: Factory, peer: Callable[..., Any], config: str, jail: Path
) -> None:
    by_keyword = f"chroot: {jail}\n" if how == "keyword" else ""
    by_option = ("--chroot", str(jail)) if how == "option" else ()
    server = sockd(by_keyword + config, *by_option)
    assert os.readlink(f"/proc/{find_worker(server)}/root") == str(jail)
    use_everything(server, peer)


def test_jail_survives_reload_and_log_rotation(
    sockd: Factory, peer: Callable[..., Any], config: str, jail: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    config = f"logoutput: {log}\nchroot: {jail}\n{config}"
    server = sockd(config)
    blocked = config.replace(
        "socks pass {", "socks block {\n    from: 0/0 to: 127.0.0.0/8\n    log: connect\n}\nsocks pass {"
    )
    for number, text in enumerate((config, blocked)):
        log.rename(tmp_path / f"log.{number}")
        server.config_path.write_text(text)
        server.signal(signal.SIGHUP)
        eventually(lambda: log.exists() and "SIGHUP ]" in log.read_text())
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "localhost", peer("echo").port, LOGIN).code == 2
    eventually(lambda: "block(1): tcp/connect ]" in log.read_text())
    assert os.readlink(f"/proc/{find_worker(server)}/root") == str(jail)
    server.take_baseline()


@pytest.mark.parametrize("how", ["keyword", "option"])
def test_missing_jail_refuses_the_start(how: str, config: str, tmp_path: Path) -> None:
    options = ["--chroot", "/nonexistent/jail"] if how == "option" else []
    text = "logoutput: stderr\n" + ("" if options else "chroot: /nonexistent/jail\n") + config
    result = run_sockd(text, tmp_path, "-p", str(tmp_path / "pid"), *options)
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode == 1
    assert len(errors) == 1
    assert "/nonexistent/jail" in errors[0]


def test_missing_jail_at_reload_keeps_the_rules(
    sockd: Factory, peer: Callable[..., Any], config: str, jail: Path
) -> None:
    server = sockd(f"chroot: {jail}\n{config}")
    worker = find_worker(server)
    server.reload(f"chroot: /nonexistent/jail\n{config}")
    assert any(record.level == "error" and "/nonexistent/jail" in record.message for record in server.log)
    use_everything(server, peer)
    assert find_worker(server) == worker
    assert os.readlink(f"/proc/{worker}/root") == str(jail)


def test_worker_opens_nothing_once_it_serves(
    sockd: Factory, peer: Callable[..., Any], config: str, jail: Path, tmp_path: Path
) -> None:
    need(shutil.which("strace"), "strace is missing")
    server = sockd(config, "--chroot", str(jail))
    worker = find_worker(server)
    (resolver,) = eventually(lambda: [pid for pid in children_of(server)["powerless"] if pid != worker])
    with trace_calls(worker, tmp_path / "worker"), trace_calls(resolver, tmp_path / "resolver"):
        use_everything(server, peer)
        server.signal(signal.SIGUSR1)
        eventually(lambda: any("worker up" in message for message in server.messages))
        server.reload()
        use_everything(server, peer)
        server.signal(signal.SIGTERM)
        eventually(lambda: server._popen.poll() is not None)
    calls = read_calls(tmp_path / "worker")
    assert sum(call.startswith("accept") for call in calls) >= 2 * 2 * 9
    assert [call for call in calls if not call.startswith(("accept", "+++", "---", "<... accept"))] == []
    # The resolver does open files for it, and so shows that the trace would have told.
    assert any(call.startswith("open") for call in read_calls(tmp_path / "resolver"))


WATCHED = (
    "accept,accept4,open,openat,openat2,creat,execve,execveat,stat,newfstatat,statx,readlink,access,chdir"
)


@contextlib.contextmanager
def trace_calls(pid: int, path: Path) -> Iterator[None]:
    """Write down the system calls of a process that have to do with files, until it ends."""
    command = ["strace", "-f", "-qq", "-p", str(pid), "-o", str(path), "-e", f"trace={WATCHED}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as strace:
        eventually(lambda: threads_of(pid)[0]["TracerPid"] == str(strace.pid))
        yield


def read_calls(path: Path) -> list[str]:
    """Give the calls of a trace, without who made them."""
    return [line.split(maxsplit=1)[1] for line in path.read_text().splitlines()]


# ------------------------------ an ordinary user ------------------------------


@pytest.fixture
def ordinary_sockd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """`ordinary_sockd(config)` starts the program as an ordinary user, in a folder of its own."""
    need(shutil.which("setpriv"), "setpriv is missing")
    folder = Path(tempfile.mkdtemp(prefix="sockd-ordinary-"))
    started: list[Server] = []
    try:
        program = folder / "sockd.py"
        shutil.copy(SOCKD, program)
        os.chown(folder, NOBODY, NOBODY)
        python = next(filter(os.path.exists, ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable)))
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
        monkeypatch.setattr(Sockd, "command", lambda _: [*drop, python, "-B", str(program)])

        def start(config: str, *options: str) -> Server:
            (folder / "accounts").write_text(f"ann:{hash_password('sesame')}\n")
            server = Sockd(config.format(accounts=folder / "accounts"), folder, options)
            started.append(server)
            return server

        yield start
        for server in started:
            server.close()
    finally:
        for server in started:
            server.kill()
        shutil.rmtree(folder)


def test_ordinary_user_can_run_it(ordinary_sockd: Callable[..., Server], peer: Callable[..., Any]) -> None:
    server = ordinary_sockd(CONFIG)
    use_everything(server, peer)
    assert server.pid_path.read_text() == f"{server.pid}\n"
    for process in server.processes():
        assert threads_of(process.pid)[0]["Uid"].split() == [str(NOBODY)] * 4
    workers = [p.pid for p in server.processes() if p.parent == server.pid]
    assert any(threads_of(pid)[0]["NoNewPrivs"] == "1" for pid in workers)


def test_capabilities_lent_to_an_ordinary_user_stay_with_the_mother_and_the_warden(
    ordinary_sockd: Callable[..., Server], peer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by AmbientCapabilities= in a unit of systemd."""
    lent = "+net_bind_service,+dac_read_search"
    command = Sockd.command(Sockd.__new__(Sockd))
    command[1:1] = [f"--inh-caps={lent}", f"--ambient-caps={lent}"]
    monkeypatch.setattr(Sockd, "command", lambda _: command)
    server = ordinary_sockd(CONFIG)
    use_connect(server.addresses[0], peer, "localhost", "127.0.0.1")
    children = [p.pid for p in server.processes() if p.parent == server.pid]
    wardens = [pid for pid in children if threads_of(pid)[0]["NoNewPrivs"] == "0"]
    assert (len(children), len(wardens)) == (3, 1)
    for pid in (server.pid, *wardens):
        assert int(threads_of(pid)[0]["CapAmb"], 16) == 1 << 10 | 1 << 2
    for pid in set(children) - set(wardens):
        check_powerless(pid)


def test_ordinary_user_cannot_have_a_jail(ordinary_sockd: Callable[..., Server], jail: Path) -> None:
    with pytest.raises(AssertionError, match="exit status 1") as refused:
        ordinary_sockd(CONFIG, "--chroot", str(jail))
    assert str(jail) in str(refused.value)


# ------------------------------ a worker that has gone bad ------------------------------


def take_inboxes(worker: int) -> list[socket.socket]:
    """Give copies of the worker's ends of the two sockets by which it asks for favours.

    They are made before any fork; the worker's third socket, which leads to the mother, comes later.
    """
    handle = os.pidfd_open(worker)
    found = []
    try:
        for name in sorted(os.listdir(f"/proc/{worker}/fd"), key=int):
            copy = LIBC.syscall(SYS_PIDFD_GETFD, handle, int(name), 0)
            need(copy >= 0 or ctypes.get_errno() != 1, "pidfd_getfd is not permitted here")
            if copy < 0:
                continue
            if not os.readlink(f"/proc/self/fd/{copy}").startswith("socket:"):
                os.close(copy)
                continue
            candidate = socket.socket(fileno=copy)
            if candidate.family == socket.AF_UNIX and candidate.type == socket.SOCK_SEQPACKET:
                found.append(candidate)
            else:
                candidate.close()
    finally:
        os.close(handle)
    for other in found[2:]:
        other.close()
    return found[:2]


def mutate(chance: random.Random) -> bytes:
    """Make a message that is random, or nearly one that a worker might send."""
    if chance.random() < 0.3:
        return chance.randbytes(chance.randint(1, 5000))
    fields = [chance.randbytes(chance.choice((0, 1, 4, 9, 255))) for _ in range(chance.randint(0, 8))]
    message = bytearray([chance.randint(0, 9), len(fields)])
    for field in fields:
        message += struct.pack("!H", len(field)) + field
    for _ in range(chance.randint(0, 3)):
        message[chance.randrange(len(message))] = chance.randrange(256)
    return bytes(message)


def test_helpers_survive_random_messages(
    sockd: Factory, peer: Callable[..., Any], config: str, jail: Path
) -> None:
    server = sockd(config, "--chroot", str(jail))
    use_connect(server.addresses[0], peer, "localhost", "127.0.0.1")
    before = children_of(server)
    chance = random.Random(20241)
    inboxes = take_inboxes(find_worker(server))
    assert len(inboxes) == 2
    try:
        for _ in range(2000):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours, theirs:
                descriptors = [theirs.fileno()] * chance.choice((0, 1, 1, 1, 2, 7))
                inbox = chance.choice(inboxes)
                inbox.settimeout(10)
                with contextlib.suppress(OSError):
                    socket.send_fds(inbox, [mutate(chance)], descriptors)
    finally:
        for inbox in inboxes:
            inbox.close()
    use_connect(server.addresses[0], peer, "localhost", "127.0.0.1")
    assert children_of(server) == before


def test_worker_that_sends_nonsense_is_replaced(
    sockd: Factory, peer: Callable[..., Any], config: str
) -> None:
    server = sockd(config)
    worker = find_worker(server)
    inboxes = take_inboxes(worker)
    credentials = struct.pack("=iII", worker, NOBODY, NOBODY)
    try:
        for inbox in inboxes:
            with contextlib.suppress(OSError):
                inbox.sendmsg([b"\xff nonsense"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
    finally:
        for inbox in inboxes:
            inbox.close()
    eventually(lambda: read_process(worker) is None)
    assert any(record.level == "error" and f"worker {worker} " in record.message for record in server.log)
    use_connect(server.addresses[0], peer, "localhost", "127.0.0.1")
    assert find_worker(server) != worker
    eventually(lambda: len(server.processes()) == 4)
    server.take_baseline()
