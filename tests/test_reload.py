"""Reloads: whose configuration a session has, when the new one takes effect, and what cannot be taken up."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import BIND, CONNECT, Client
from conftest import Factory
from servers import (
    IS_EXECUTABLE,
    Server,
    Sockd,
    World,
    check_configuration,
    eventually,
    find_children,
    find_free_port,
    hash_password,
    need,
    read_process,
)
from test_socket_options import (
    FORCED,
    KEEPIDLE,
    MAXSEG,
    TCP_SETTINGS,
    Setting,
    list_sockets,
    peer_of,
    read_settings,
    spell,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]
StartPeer = Callable[..., Any]

HEAD = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
user.privileged: root
user.unprivileged: nobody
"""
PASS = """\
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0
%s}
"""
BLOCK = PASS.replace("socks pass", "socks block")
PLAIN = f"{HEAD}socksmethod: none\n{PASS % ''}"
LOGIN = (b"ann", b"sesame")
BUF_LOCK = Setting("lock", "", socket.SOL_SOCKET, 72, 0)  # SO_BUF_LOCK, asm-generic/socket.h


@pytest.fixture
def enter() -> Iterator[Callable[[Server], Client]]:
    """`enter(server)` connects a client that leaves before the server is closed."""
    with contextlib.ExitStack() as opened:
        yield lambda server: opened.enter_context(Client(server.addresses[0]))


def with_passwords(path: Path, password: str = "sesame") -> str:
    """Give a configuration that checks passwords by a file, which is written."""
    path.write_text(f"ann:{hash_password(password)}\n")
    return f"{HEAD}passwordfile: {path}\nsocksmethod: username\n{PASS % ''}"


def report(server: Server) -> str:
    """Give the line that counts the processes."""
    before = len(server.messages)
    server.signal(signal.SIGUSR1)
    return eventually(lambda: next((m for m in server.messages[before:] if "wardens: " in m), ""))


def count_wardens(server: Server) -> int:
    return int(report(server).partition("wardens: ")[2].partition(",")[0])


def find_workers(server: Server) -> list[int]:
    """Give the pids of all workers that there have been, the oldest first."""
    return [record.pid for record in server.log if record.message.endswith(" running")]


def is_served(client: Client, peer: StartPeer) -> bool:
    """Tell whether a client that has logged in gets through."""
    return (
        client.request5(CONNECT, "127.0.0.1", peer("echo").port).code == 0 and client.exchange(b"a") == b"a"
    )


def is_let_in(client: Client, *password: bytes) -> bool:
    return client.authenticate(LOGIN[0], *(password or LOGIN[1:])) == 0


def ends_of_reloads(server: Server) -> list[str]:
    return [m for m in server.messages if m.startswith(("info: SIGHUP", "error: SIGHUP"))]


# ------------------------------ whose configuration ------------------------------


@pytest.mark.parametrize("new", ["no passwords", "other passwords"])
def test_password_is_checked_as_at_the_beginning_of_its_session(
    sockd: Factory, peer: StartPeer, tmp_path: Path, enter: Callable[[Server], Client], new: str
) -> None:
    server = sockd(with_passwords(tmp_path / "old"))
    first, second = enter(server), enter(server)
    assert (first.greet([2]), second.greet([2])) == (2, 2)
    server.reload(PLAIN if new == "no passwords" else with_passwords(tmp_path / "new", "mellon"))
    assert is_let_in(first) and is_served(first, peer)
    assert not is_let_in(second, b"mellon")
    if new == "other passwords":
        third = enter(server)
        assert third.greet([2]) == 2
        assert is_let_in(third, b"mellon") and is_served(third, peer)


def test_number_of_a_rule_means_what_it_meant(
    sockd: Factory, peer: StartPeer, private_world: World, enter: Callable[[Server], Client], tmp_path: Path
) -> None:
    def configure(name: str) -> str:
        line = f"libwrap: spawn echo {name} >> {out}\n"
        return f"{HEAD}user.libwrap: root\nsocksmethod: none\n{PASS % line}"

    out = tmp_path / "out"
    server = sockd(configure("old"), world=private_world)
    client = enter(server)
    assert client.greet() == 0
    server.reload(configure("new"))
    assert is_served(client, peer)
    newer = enter(server)
    assert newer.greet() == 0 and is_served(newer, peer)
    assert out.read_text() == "old\nnew\n"


def test_number_of_an_option_means_what_it_meant(sockd: Factory, enter: Callable[[Server], Client]) -> None:
    def configure(priority: str) -> str:
        return f"{HEAD}socksmethod: none\n{PASS % f'external.socket.so_priority: {priority}{chr(10)}'}"

    setting = Setting("socket.so_priority", "7", socket.SOL_SOCKET, socket.SO_PRIORITY, 7)
    server = sockd(configure("7"))
    client = enter(server)
    assert client.greet() == 0
    server.reload(configure("8"))
    with socket.create_server(("127.0.0.1", 0)) as target:
        address = target.getsockname()
        assert client.request5(CONNECT, *address).code == 0
        found = read_settings(server, lambda connection: peer_of(connection) == address, (setting,))
    assert found == {setting.name: 7}


def test_warden_stays_until_nobody_can_ask_it_any_more(
    sockd: Factory, peer: StartPeer, tmp_path: Path, enter: Callable[[Server], Client]
) -> None:
    server = sockd(with_passwords(tmp_path / "passwords"))
    relayed, asking = enter(server), enter(server)
    assert (relayed.greet([2]), asking.greet([2])) == (2, 2)
    assert is_let_in(relayed) and is_served(relayed, peer)
    assert count_wardens(server) == 1
    server.reload(PLAIN)
    assert count_wardens(server) == 1
    assert is_let_in(asking)
    assert count_wardens(server) == 1
    assert is_served(asking, peer)
    # A connection that is only relayed needs no power.
    eventually(lambda: len(find_children(server.pid)) == 3)
    assert count_wardens(server) == 0
    assert relayed.exchange(b"still") == asking.exchange(b"still") == b"still"
    relayed.close()
    asking.close()
    eventually(lambda: len(find_children(server.pid)) == 2)
    assert not [m for m in server.messages if "unexpectedly" in m]
    server.reload(with_passwords(tmp_path / "passwords"))
    assert count_wardens(server) == 1
    server.take_baseline()


def open_bind(server: Server, target: Any) -> tuple[Client, Client]:
    """Bind, and let a visitor come: the client's end and the visitor's."""
    client = Client(server.addresses[0])
    reply = client.open5(BIND, "0.0.0.0", 0)
    visitor = Client((reply.host, reply.port))
    assert (reply.code, client.read_reply5().code) == (0, 0)
    return client, visitor


def open_tunnel(server: Server, target: Any) -> tuple[Client, ...]:
    client = Client(server.addresses[0])
    client.send(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n" % target.port)
    assert client.receive(39) == b"HTTP/1.1 200 Connection established\r\n\r\n"
    return (client,)


def open_bounce(server: Server, target: Any) -> tuple[Client, ...]:
    client = Client(server.addresses[0], source=("127.0.0.9", 0))
    assert client.exchange(b"passed on") == b"passed on"
    return (client,)


@pytest.mark.parametrize("connect", [open_bind, open_tunnel, open_bounce])
def test_warden_does_not_stay_for_what_is_only_relayed(
    sockd: Factory, peer: StartPeer, tmp_path: Path, connect: Callable[..., tuple[Client, ...]]
) -> None:
    target = peer("echo")
    bounce = f"client pass {{ from: 127.0.0.9/32 to: 0/0 bounce to: 127.0.0.1 port = {target.port} }}\n"
    config = with_passwords(tmp_path / "passwords").replace(
        "socksmethod: username", "socksmethod: none username"
    )
    config = config.replace("client pass", f"{bounce}client pass", 1)
    server = sockd(config.replace("socks pass {", "socks pass { proxyprotocol: http socks_v5"))
    with contextlib.ExitStack() as opened:
        near, *far = [opened.enter_context(end) for end in connect(server, target)]
        assert count_wardens(server) == 1
        server.reload(PLAIN)
        eventually(lambda: count_wardens(server) == 0)
        near.send(b"still")
        assert (far[0] if far else near).receive(5) == b"still"


def test_warden_of_an_older_configuration_is_replaced_by_its_like(
    sockd: Factory, peer: StartPeer, tmp_path: Path, enter: Callable[[Server], Client]
) -> None:
    server = sockd(with_passwords(tmp_path / "old"))
    worker = find_workers(server)
    _, warden = sorted(set(find_children(server.pid)) - set(worker))
    client = enter(server)
    assert client.greet([2]) == 2
    server.reload(with_passwords(tmp_path / "new", "mellon"))
    os.kill(warden, signal.SIGKILL)
    eventually(lambda: any(f"warden {warden} exited unexpectedly" in m for m in server.messages))
    assert is_let_in(client) and is_served(client, peer)
    client.close()
    eventually(lambda: len(find_children(server.pid)) == 3)
    server.take_baseline()


def test_each_of_many_configurations_lives_as_long_as_its_sessions(
    sockd: Factory, peer: StartPeer, tmp_path: Path
) -> None:
    server = sockd(with_passwords(tmp_path / "0", "0"))
    clients = []
    for number in range(8):
        client = Client(server.addresses[0])
        assert client.greet([2]) == 2
        clients.append(client)
        server.reload(with_passwords(tmp_path / f"{number + 1}", f"{number + 1}"))
    assert count_wardens(server) == 9
    for number, client in enumerate(clients):
        assert is_let_in(client, b"%d" % number) and is_served(client, peer)
    for client in clients:
        client.close()
    # Mother, resolver, warden and worker; and the mother has no more descriptors than at the start.
    eventually(lambda: len(server.processes()) == 4)
    assert count_wardens(server) == 1


def test_processes_hold_nothing_of_other_configurations(
    sockd: Factory, tmp_path: Path, enter: Callable[[Server], Client]
) -> None:
    """A worker who could read the inbox of a warden would see passwords."""
    server = sockd(with_passwords(tmp_path / "0"))
    at_start = {pid: count_sockets(pid) for pid in find_children(server.pid)}
    kept = [enter(server)]
    assert kept[0].greet([2]) == 2
    for number in range(3):
        old = set(find_children(server.pid))
        server.reload(with_passwords(tmp_path / f"{number + 1}"))
        kept.append(enter(server))
        assert kept[-1].greet([2]) == 2
        eventually(lambda old=old: len(set(find_children(server.pid)) - old) == 3)  # type: ignore[misc]
        new = sorted(set(find_children(server.pid)) - old)
        # One client more, at the worker.
        eventually(
            lambda new=new: sum(map(count_sockets, new)) == sum(at_start.values()) + 1  # type: ignore[misc]
        )
    for client in kept:
        client.close()
    eventually(lambda: len(server.processes()) == 4)


def count_sockets(pid: int) -> int:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        return sum(os.readlink(f"{folder}/{name}").startswith("socket:") for name in os.listdir(folder))
    return 0


# ------------------------------ when it takes effect ------------------------------


def test_new_rules_hold_from_the_end_of_the_reload_on(sockd: Factory) -> None:
    server = sockd(PLAIN, "-N", "2")
    blocking = f"{HEAD}socksmethod: none\n{BLOCK % ''}"
    with socket.create_server(("127.0.0.1", 0), backlog=100) as target:
        for _ in range(15):
            for config, code in ((blocking, 2), (PLAIN, 0)):
                server.reload(config)
                with Client(server.addresses[0]) as client:
                    assert client.open5(CONNECT, *target.getsockname()).code == code
    eventually(lambda: len(server.processes()) == 4)
    server.take_baseline()


def reload_past_stopped_worker(server: Server) -> int:
    """Begin a reload that the old worker, which is stopped, keeps from ending; give its pid."""
    (worker,) = find_workers(server)
    os.kill(worker, signal.SIGSTOP)
    server.config_path.write_text(f"timeout.negotiate: 77\n{server.config_path.read_text()}")
    server.signal(signal.SIGHUP)
    eventually(lambda: len(find_workers(server)) == 2)
    return worker


def test_reload_ends_when_the_old_worker_takes_no_more_clients(sockd: Factory, peer: StartPeer) -> None:
    server = sockd(PLAIN)
    worker = reload_past_stopped_worker(server)
    server.signal(signal.SIGHUP)
    assert "workers: 2" in report(server)  # the mother goes on with her other duties
    assert len(ends_of_reloads(server)) == 1
    os.kill(worker, signal.SIGCONT)
    eventually(lambda: len(ends_of_reloads(server)) == 4)
    assert [m[:14] for m in ends_of_reloads(server)] == ["info: SIGHUP [", "info: SIGHUP ]"] * 2
    eventually(lambda: read_process(worker) is None)
    with Client(server.addresses[0]) as client:
        assert client.greet() == 0 and is_served(client, peer)
    server.take_baseline()


def test_worker_that_does_not_let_go_of_the_listeners_is_ended(sockd: Factory, peer: StartPeer) -> None:
    server = sockd(PLAIN)
    (worker,) = find_workers(server)
    os.kill(worker, signal.SIGSTOP)
    server.reload(f"timeout.negotiate: 77\n{PLAIN}")
    assert f"error: worker {worker} goes on taking clients: ending it" in server.messages
    assert read_process(worker) is None
    with Client(server.addresses[0]) as client:
        assert client.greet() == 0 and is_served(client, peer)
    server.take_baseline()


def test_worker_that_dies_in_a_reload_is_not_waited_for(sockd: Factory) -> None:
    server = sockd(PLAIN)
    os.kill(reload_past_stopped_worker(server), signal.SIGKILL)
    eventually(lambda: len(ends_of_reloads(server)) == 2)
    assert not [m for m in server.messages if "goes on taking clients" in m]
    server.take_baseline()


def test_server_ends_in_the_middle_of_a_reload(lone_sockd: Callable[..., Server]) -> None:
    server = lone_sockd(PLAIN)
    os.kill(find_workers(server)[0], signal.SIGSTOP)
    server.config_path.write_text(f"timeout.negotiate: 77\n{server.config_path.read_text()}")
    server.signal(signal.SIGHUP)
    eventually(lambda: len(find_workers(server)) == 2)
    assert server.stop() == 0
    eventually(lambda: not server.processes())


def test_older_worker_that_shuts_down_listeners_is_ended_the_second_time(
    sockd: Factory, peer: StartPeer, enter: Callable[[Server], Client]
) -> None:
    port = find_free_port()  # 0 would be another one after each time
    config = PLAIN.replace("port = 0", f"port = {port}")
    server = sockd(config)
    server.addresses = [("127.0.0.1", port)]
    old = find_workers(server)[0]
    client = enter(server)
    assert client.greet() == 0 and is_served(client, peer)
    server.reload(f"timeout.negotiate: 77\n{config}")
    deaf = "error: a worker has shut down what all workers listen on: ending them all"
    for number in range(2):
        eventually(lambda number=number: len(find_workers(server)) == 2 + number)  # type: ignore[misc]
        assert client.exchange(b"still") == b"still"
        shut_down_listener(server)
        with contextlib.suppress(OSError), Client(server.addresses[0]):
            pass  # who is not served, but may be what makes a worker look
        eventually(lambda number=number: server.messages.count(deaf) == number + 1)  # type: ignore[misc]
    eventually(lambda: old not in find_children(server.pid))
    eventually(lambda: len(find_workers(server)) == 4)
    with Client(server.addresses[0]) as newer:
        assert newer.greet() == 0 and is_served(newer, peer)
    server.take_baseline()


def shut_down_listener(server: Server) -> None:
    """Do to the listener what any process can that has it."""
    for found in list_sockets(server):
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found.shutdown(socket.SHUT_RDWR)
            return  # the others are the same one, which may live again by now


# ------------------------------ what is taken back ------------------------------


def test_processor_settings_that_a_reload_removes_are_undone(sockd: Factory) -> None:
    before = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        server = sockd(f"cpu.schedule.mother: idle/0\ncpu.mask.mother: 0\n{PLAIN}")
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))
    assert os.sched_getscheduler(server.pid) == os.SCHED_IDLE
    assert os.sched_getaffinity(server.pid) == {0}
    server.reload(PLAIN)
    eventually(lambda: len(find_workers(server)) > 1)
    eventually(lambda: all(is_undone(pid) for pid in find_children(server.pid)))
    used: dict[bool, set[int]] = {}  # by whether it is a worker
    for pid in (server.pid, *find_children(server.pid)):
        with contextlib.suppress(ProcessLookupError):  # an old one, in the meantime
            assert os.sched_getscheduler(pid) == os.SCHED_BATCH
            used.setdefault(pid in find_workers(server), set()).update(os.sched_getaffinity(pid))
    assert used[False] == os.sched_getaffinity(0)
    assert len(used[True]) == 1  # a worker keeps to one, whichever it is
    server.take_baseline()


def is_undone(pid: int) -> bool:
    """Tell whether a process has the policy of the test's that started the server; one that is gone has."""
    with contextlib.suppress(ProcessLookupError):
        return os.sched_getscheduler(pid) == os.SCHED_BATCH
    return True


REMOVED = {
    "TCP": ("tcp_nodelay", "tcp_keepidle", "tcp_linger2", "tcp_window_clamp", "tcp_maxseg"),
    "other": ("so_priority", "so_rcvbuf", "so_sndbuf", "ip_ttl"),
    "forced": ("so_rcvbufforce", "so_sndbufforce"),
}


@pytest.mark.parametrize("kind", REMOVED)
def test_socket_options_that_a_reload_removes_are_undone(sockd: Factory, kind: str) -> None:
    settings = tuple(s for s in (*TCP_SETTINGS, *MAXSEG, *FORCED) if s.name.endswith(REMOVED[kind]))
    assert len(settings) == len(REMOVED[kind])

    def look() -> dict[str, int | bytes]:
        with Client(server.addresses[0]) as client:
            assert client.greet() == 0
            return {
                **read_settings(server, lambda connection: peer_of(connection) == client.address, settings),
                "lock": read_settings(server, lambda c: peer_of(c) == client.address, (BUF_LOCK,))["lock"],
                "segment": client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG),
            }

    server = sockd(PLAIN)
    before = look()
    for _ in range(2):
        server.reload(f"{spell('internal', settings)}{PLAIN}")
        changed = look()
        assert all(changed[setting.name] != before[setting.name] for setting in settings)
        server.reload(PLAIN)
        assert look() == before
    assert not [m for m in server.messages if "could not" in m]


def test_warden_of_an_older_configuration_has_its_processor_settings(
    sockd: Factory, tmp_path: Path, enter: Callable[[Server], Client]
) -> None:
    server = sockd(with_passwords(tmp_path / "old"))
    _, warden = sorted(set(find_children(server.pid)) - set(find_workers(server)))
    client = enter(server)
    assert client.greet([2]) == 2
    server.reload(f"cpu.schedule.mother: idle/0\n{PLAIN}")
    others = set(find_children(server.pid))
    os.kill(warden, signal.SIGKILL)
    (newer,) = eventually(lambda: set(find_children(server.pid)) - others)
    eventually(lambda: os.sched_getscheduler(newer) == os.sched_getscheduler(0))
    assert is_let_in(client)


# ------------------------------ what cannot be taken up ------------------------------


def leave_one_descriptor(server: Server) -> None:
    """Let the mother open one file at a time and no more."""
    most = max(int(name) for name in os.listdir(f"/proc/{server.pid}/fd"))
    free = set(range(most)) - {int(name) for name in os.listdir(f"/proc/{server.pid}/fd")}
    limit = sorted(free)[0] + 1 if free else most + 2
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, hard))


def leave_little_memory(server: Server) -> None:
    """Let the mother map two megabytes and no more."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (2 << 20)
    resource.prlimit(server.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def leave_enough(server: Server) -> None:
    for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS):
        _, hard = resource.prlimit(server.pid, what)
        resource.prlimit(server.pid, what, (hard, hard))


def change_nothing(server: Server) -> None:
    pass


COUNTED = BLOCK.replace("socks block", "socks pass") % "session.state.max: 3\nsession.state.key: from\n"
UNUSABLE = {
    "memory": (leave_little_memory, f"{HEAD}socksmethod: none\n{COUNTED}", "Cannot allocate memory"),
    "descriptors": (leave_one_descriptor, f"{HEAD}socksmethod: none\n{BLOCK % ''}", "Too many open files"),
    "log": (
        change_nothing,
        f"logoutput: stderr /nonexistent/log\n{HEAD}socksmethod: none\n{BLOCK % ''}",
        'could not open logfile "/nonexistent/log": No such file or directory',
    ),
    "errorlog": (
        change_nothing,
        f"logoutput: stderr\nerrorlog: /nonexistent/log\n{HEAD}socksmethod: none\n{BLOCK % ''}",
        'could not open logfile "/nonexistent/log": No such file or directory',
    ),
    "user": (
        change_nothing,
        f"{HEAD.replace('nobody', 'no-such-user')}socksmethod: none\n{BLOCK % ''}",
        "the running configuration is kept",
    ),
    "listener": (
        change_nothing,
        f"{HEAD}internal: 192.0.2.77 port = 0\nsocksmethod: none\n{spell('internal', KEEPIDLE)}{BLOCK % ''}",
        "cannot listen on 192.0.2.77.0: Cannot assign requested address",
    ),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_what_cannot_be_had_leaves_all_as_it_was(sockd: Factory, peer: StartPeer, fault: str) -> None:
    spoil, config, text = UNUSABLE[fault]
    workers = 8 if fault == "memory" else 1
    server = sockd(PLAIN, "-N", f"{workers}")
    eventually(lambda: len(find_workers(server)) == workers)
    server.take_baseline()
    children = set(find_children(server.pid))
    spoil(server)
    try:
        server.reload(config)
        errors = [record.message for record in server.log if record.level == "error"]
        assert errors[-1] == f"SIGHUP ]: config not reloaded: {text}"
        assert len(errors) == (
            2 if fault == "user" else 1
        )  # what is wrong with the file has a line of its own
    finally:
        leave_enough(server)
    assert set(find_children(server.pid)) == children
    server.check_resources()
    with Client(server.addresses[0]) as client:
        assert client.greet() == 0 and is_served(client, peer)
        found = read_settings(server, lambda connection: peer_of(connection) == client.address, KEEPIDLE)
        assert found != {KEEPIDLE[0].name: KEEPIDLE[0].expected}
    server.reload(f"{HEAD}socksmethod: none\n{BLOCK % ''}")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 2
    server.take_baseline()


def leave_descriptors(server: Server, count: int) -> None:
    """Let the mother open so many more descriptors and no more."""
    used = {int(name) for name in os.listdir(f"/proc/{server.pid}/fd")}
    free = [number for number in range(max(used) + count + 2) if number not in used]
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (free[count], hard))


@pytest.mark.parametrize("started", [0, 1, 2])
def test_old_workers_serve_on_where_new_ones_cannot_be_forked(
    sockd: Factory, peer: StartPeer, tmp_path: Path, started: int
) -> None:
    path = tmp_path / "records"
    server = sockd(PLAIN, "-N", "2")
    eventually(lambda: len(find_workers(server)) == 2)
    server.take_baseline()
    children = set(find_children(server.pid))
    # The log file, a listener, an inbox; then one for each child, and the other end while it is forked.
    leave_descriptors(server, 4 + started + 1)
    try:
        server.reload(
            f"{HEAD}internal: 127.0.0.2 port = 0\nsocksmethod: none\n"
            f"{spell('internal', KEEPIDLE)}{BLOCK % ''}".replace(
                "internal", f"logoutput: stderr {path}\ninternal", 1
            )
        )
        assert server.messages[-1] == (
            "error: SIGHUP ]: config not reloaded: cannot start the processes that serve"
        )
    finally:
        leave_enough(server)
    eventually(lambda: set(find_children(server.pid)) == children)
    server.check_resources()
    with Client(server.addresses[0]) as client:
        assert client.greet() == 0 and is_served(client, peer)
    assert "cannot start a worker" in path.read_text() and "SIGHUP ]" not in path.read_text()
    server.reload(f"{HEAD}socksmethod: none\n{BLOCK % ''}")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 2
    assert not [m for m in server.messages if "unexpectedly" in m]
    server.take_baseline()


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_file_that_has_become_something_else_is_not_waited_for(
    sockd: Factory, enter: Callable[[Server], Client], peer: StartPeer, kind: str
) -> None:
    server, target = sockd(PLAIN), peer("echo").address
    server.config_path.unlink()
    if kind == "fifo":
        os.mkfifo(server.config_path)
    else:
        server.config_path.symlink_to("/dev/zero")
    server.reload()
    assert any("config not reloaded" in message for message in server.messages)
    assert enter(server).open5(CONNECT, *target).code == 0


def test_log_that_was_missing_at_the_start_hinders_no_reload(sockd: Factory, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "log"
    logs = f"logoutput: stderr\nerrorlog: {path}\n"
    server = sockd(f"{logs}{PLAIN}")
    warning = f'warning: could not open logfile "{path}": No such file or directory'
    assert server.messages.count(warning) == 1
    server.reload()
    server.reload(f"timeout.negotiate: 77\n{logs}{PLAIN}")
    assert server.messages.count(warning) == 3
    assert len(ends_of_reloads(server)) == 4 and not [m for m in server.messages if "not reloaded" in m]
    path.parent.mkdir()
    server.reload()
    assert path.exists() and server.messages.count(warning) == 3
    server.take_baseline()


def test_sessions_outlive_the_reopening_of_many_logs(
    sockd: Factory, peer: StartPeer, tmp_path: Path, enter: Callable[[Server], Client]
) -> None:
    paths = [tmp_path / f"records{number}" for number in range(20)]
    server = sockd(
        f"logoutput: stderr {' '.join(map(str, paths[:10]))}\n"
        f"errorlog: {' '.join(map(str, paths[10:]))}\n{PLAIN}"
    )
    client = enter(server)
    assert client.greet() == 0 and is_served(client, peer)
    children = set(find_children(server.pid))
    server.reload()
    newer = enter(server)
    assert newer.greet() == 0 and is_served(newer, peer)
    assert client.exchange(b"still") == b"still"
    assert set(find_children(server.pid)) == children
    assert all("SIGHUP ]" in path.read_text() for path in paths[:10])


TOO_MANY = {
    "targets": (253, 1, "logoutput and errorlog name 254 targets: at most 253 can be had"),
    "bytes": (40, 120, "the names in logoutput and errorlog are "),
    "a name": (1, 70000, "the names in logoutput and errorlog are "),
}


@pytest.mark.parametrize("kind", TOO_MANY)
def test_more_logs_than_can_be_passed_on_are_refused(tmp_path: Path, kind: str) -> None:
    count, length, text = TOO_MANY[kind]
    names = [f"/tmp/{'x' * length}{number}" for number in range(count)]
    lines = f"logoutput: {' '.join(['stderr', *names[2:]])}\nerrorlog: {' '.join(names[:2])}"
    done = check_configuration(f"{lines}\n{PLAIN}", tmp_path)
    assert done.returncode == 1
    assert text in done.stdout + done.stderr


def test_log_that_cannot_be_opened_again_is_kept(sockd: Factory, tmp_path: Path, peer: StartPeer) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    server = sockd(f"logoutput: stderr {folder}/log\n{PLAIN}")
    (folder / "log").rename(tmp_path / "moved")
    folder.rmdir()
    server.signal(signal.SIGHUP)
    moved = tmp_path / "moved"
    eventually(lambda: "SIGHUP ]: config reloaded" in moved.read_text())
    assert f'warning: could not open logfile "{folder}/log": No such file' in moved.read_text()
    with Client(server.addresses[0]) as client:
        assert client.greet() == 0 and is_served(client, peer)
    folder.mkdir()
    server.signal(signal.SIGHUP)
    eventually(lambda: (folder / "log").exists() and "SIGHUP ]" in (folder / "log").read_text())
    server.take_baseline()


@pytest.mark.parametrize(
    ("right", "changed"),
    [("socksmethod: none", "sockmethod: none"), ("client pass {", "client pass { session.max: 5")],
    ids=["typo", "limit"],
)
def test_reload_without_the_library_of_python_is_refused(
    peer: StartPeer, tmp_path: Path, right: str, changed: str
) -> None:
    """As where an upgrade has taken away what is imported only when it is needed."""
    if IS_EXECUTABLE:
        return  # which has all in memory
    need(shutil.which("nsenter"), "nsenter is missing")
    server = Sockd(PLAIN, tmp_path / "sockd", world=World({}))
    empty = tmp_path / "empty"
    empty.mkdir()
    try:
        enter = ["nsenter", f"--mount=/proc/{server.pid}/ns/mnt", "mount", "--bind"]
        subprocess.run([*enter, str(empty), sysconfig.get_path("stdlib")], check=True)
        server.reload(PLAIN.replace(right, changed))
        (line,) = [message for message in server.messages if message.startswith("error: ")]
        assert line.startswith("error: SIGHUP ]: config not reloaded: internal error: ModuleNotFoundError ")
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *peer("echo").address).code == 0
        assert server.stop() == 0
        assert "Traceback" not in server.text
    finally:
        server.kill()
