"""Listing 1 of the article, with its own words, in an empty directory: it serves, and it has no power."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import BIND, CONNECT, NO_ACCEPTABLE_METHOD, UDP_ASSOCIATE, Client, UdpClient
from more_peers import wait_for_record
from servers import Process, Server, Sockd, World, eventually

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

LISTING = Path(__file__).parent / "config" / "old" / "article-listing.conf"
# Addresses and the log's place: there is neither eth0 nor a syslog daemon here, and the article's /0
# makes each of its addresses mean every address, so that its rules would let nobody pass.
ADAPTED = {
    "logoutput: syslog": "logoutput: stderr",
    "internal: eth0 port = 1080": "internal: 127.0.0.1 port = 0\ninternal: ::1 port = 0",
    "external: eth1": "external: lo",
    "to: 10.0.0.11/0": "to: 127.0.0.99/32",
    "10.0.0.3/0 port 1-65535": "0/0 port 1-65535",
    "from: 10.0.0.3/0": "from: 0/0",
    "to: 10.0.0.10/0": "to: 0/0",
    "0.0.0.0/0": "0/0",
}
LOGIN = (b"alice", b"wonderland")
FAMILIES = {"ipv4": ("127.0.0.1", "echo.test"), "ipv6": ("fd00::6", "six.test")}
CAP_DAC_READ_SEARCH, CAP_NET_BIND_SERVICE = 2, 10


def adapt_listing() -> str:
    """Give the listing with other addresses."""
    text = LISTING.read_text()
    for old, new in ADAPTED.items():
        assert old in text, f"{old} is not in the listing"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def jail() -> Iterator[Path]:
    """Make an empty directory, and check that it stays empty."""
    folder = Path(tempfile.mkdtemp(prefix="sockd-listing-"))
    folder.chmod(0o755)
    yield folder
    found = list(folder.iterdir())
    shutil.rmtree(folder)
    assert not found


@pytest.fixture(scope="module")
def server(private_world: World, jail: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Listing 1 in its jail, for all tests."""
    folder = tmp_path_factory.mktemp("listing1")
    running = Sockd(adapt_listing(), folder, ("--chroot", str(jail), "-N", "2"), private_world)
    yield running
    running.close()


@pytest.fixture(params=list(FAMILIES.values()), ids=list(FAMILIES))
def way(server: Server, request: Any) -> tuple[tuple[str, int], str, str]:
    """The server's address, a target's and a name of that, in one family."""
    host, name = request.param
    return server.addresses[":" in host], host, name


# ------------------------------ what it does ------------------------------


def test_connect_by_name(way: tuple[tuple[str, int], str, str], peer: StartPeer) -> None:
    address, host, name = way
    target = peer("echo", host)
    with Client(address) as client:
        assert client.open5(CONNECT, name, target.port, LOGIN).code == 0
        assert client.exchange(b"connect") == b"connect"


def test_bind(way: tuple[tuple[str, int], str, str]) -> None:
    address, host, _ = way
    with Client(address) as client:
        reply = client.open5(BIND, host, 0, LOGIN)
        assert reply.code == 0
        with socket.create_connection((reply.host, reply.port), 10, (host, 0)) as visitor:
            second = client.read_reply5()
            assert (second.code, second.host, second.port) == (0, host, visitor.getsockname()[1])
            visitor.sendall(b"bind")
            assert client.exchange(b"") + client.receive(4) == b"bind"


def test_udp_by_name(way: tuple[tuple[str, int], str, str], peer: StartPeer) -> None:
    address, host, name = way
    target = peer("udp-echo", host)
    with Client(address) as control, UdpClient((address[0], 0)) as client:
        reply = control.open5(UDP_ASSOCIATE, *client.address, LOGIN)
        assert reply.code == 0
        for spelled in (name, host):
            client.send((reply.host, reply.port), spelled, target.port, b"udp")
            assert client.receive((reply.host, reply.port)) == (host, target.port, b"udp")
        control.reset()


@pytest.mark.parametrize("number", [0, 1], ids=["ipv4", "ipv6"])
def test_nobody_passes_without_the_password(server: Server, number: int) -> None:
    with Client(server.addresses[number]) as client:
        assert client.greet([0]) == NO_ACCEPTABLE_METHOD
    for user, password in ((b"alice", b"builder"), (b"carol", b"!"), (b"nobody-here", b""), (b"root", b"")):
        with Client(server.addresses[number]) as client:
            assert client.greet([2]) == 2
            assert client.authenticate(user, password) != 0
            client.expect_end()


def test_rules_hold(server: Server, peer: StartPeer) -> None:
    target = peer("echo", "127.0.0.99")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.99", target.port, LOGIN).code == 2
    assert not target.seen


# ------------------------------ who it is ------------------------------


WORDS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs")


def describe_threads(pid: int) -> list[str]:
    """Describe what the threads of a process may do and where they live: a line for each different one."""
    lines: set[str] = set()
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except FileNotFoundError:  # it has just ended
        return []
    for task in tasks:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            words = {word: " ".join(dict.fromkeys(status[word].split())) for word in WORDS}
            words |= {word: f"{int(words[word], 16):x}" for word in WORDS if word.startswith("Cap")}
            places = f"root={os.readlink(task / 'root')} cwd={os.readlink(task / 'cwd')}"
            lines.add(" ".join([*(f"{word}={value}" for word, value in words.items()), places]))
    return sorted(lines)


def identity(user: str, groups: str, capabilities: int, no_new: int, root: str, cwd: str) -> list[str]:
    """Give the same for a process that is nobody but this user."""
    entry, power = pwd.getpwnam(user), f"{capabilities:x}"
    ids = f"Uid={entry.pw_uid} Gid={entry.pw_gid} Groups={groups}"
    powers = f"CapInh=0 CapPrm={power} CapEff={power} CapAmb=0 NoNewPrivs={no_new}"
    return [f"{ids} {powers} root={root} cwd={cwd}"]


def groups_of(user: str) -> str:
    """Give the groups of a user of the system."""
    entry = pwd.getpwnam(user)
    numbers = {entry.pw_gid, *(group.gr_gid for group in grp.getgrall() if user in group.gr_mem)}
    return " ".join(map(str, sorted(numbers)))


def find_children(server: Server) -> list[Process]:
    """List the mother's children."""
    return [p for p in server.processes() if p.parent == server.pid and p.state != "Z"]


def describe_children(server: Server) -> list[list[str]]:
    """Describe each child of the mother."""
    return sorted(describe_threads(process.pid) for process in find_children(server))


def check_everybody(server: Server, jail: Path) -> None:
    """Check who every thread of every child is: two workers, a resolver, a warden."""
    kept = 1 << CAP_DAC_READ_SEARCH | 1 << CAP_NET_BIND_SERVICE
    cwd = os.getcwd()
    expected = [
        *[identity("nobody", "", 0, 1, str(jail), str(jail))] * 2,
        identity("nobody", "", 0, 1, "/", cwd),
        identity("proxy", groups_of("proxy"), kept, 0, "/", cwd),
    ]
    with contextlib.suppress(AssertionError):  # a child that was forked just now is not there yet
        eventually(lambda: describe_children(server) == sorted(expected))
    assert describe_children(server) == sorted(expected)
    assert all(line.startswith("Uid=0 Gid=0 ") for line in describe_threads(server.pid))


@contextlib.contextmanager
def crowd(server: Server, peer: StartPeer) -> Iterator[list[Client]]:
    """Give clients with open sessions, so that there are threads."""
    target = peer("echo")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.addresses[0])) for _ in range(12)]
        for client in clients:
            assert client.open5(CONNECT, "echo.test", target.port, LOGIN).code == 0
        yield clients


def find_workers(server: Server) -> list[int]:
    """Give the pids of the workers, the newest last."""
    alive = {process.pid for process in find_children(server)}
    return [r.pid for r in server.log if r.message.endswith(" running") and r.pid in alive]


def test_every_thread_is_powerless_also_after_a_reload_and_a_death(
    private_world: World, jail: Path, tmp_path: Path, peer: StartPeer
) -> None:
    listing = adapt_listing()
    server = Sockd(listing, tmp_path, ("--chroot", str(jail), "-N", "2"), private_world)
    try:
        check_everybody(server, jail)
        with crowd(server, peer) as clients:
            threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in find_workers(server))
            assert threads >= len(clients)
            check_everybody(server, jail)
            server.reload(f"timeout.negotiate: 77\n{listing}")
            assert all(client.exchange(b"still here") == b"still here" for client in clients)
            eventually(lambda: len(find_workers(server)) >= 3)  # the old ones, which still serve, as well
            eventually(lambda: "Uid=0" not in str(describe_children(server)))
        check_everybody(server, jail)
        victims = find_workers(server)
        for victim in (victims[0], *find_helpers(server, victims)):
            os.kill(victim, signal.SIGKILL)
            wait_for_record(server, "warning: ", f" {victim} exited unexpectedly on signal SIGKILL")
            check_everybody(server, jail)
            with crowd(server, peer):
                check_everybody(server, jail)
        server.take_baseline()
    finally:
        server.close()


def find_helpers(server: Server, workers: list[int]) -> list[int]:
    """Give the pids of resolver and warden."""
    return [process.pid for process in find_children(server) if process.pid not in workers]
