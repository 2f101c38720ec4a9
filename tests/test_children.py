"""`child.*` and `cpu.*`: workers that are replaced in time, and where and how processes run."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from client import CONNECT, Client
from conftest import Factory
from servers import Process, Server, eventually

import sockd as program

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]

CONFIG = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
user.privileged: root
user.unprivileged: nobody
socksmethod: none
{settings}
client pass {{ from: 0/0 to: 0/0 }}
socks pass {{
from: 0/0 to: 0/0
{rule}
log: connect
}}
"""


def configure(settings: str, rule: str = "") -> str:
    return CONFIG.format(settings=settings, rule=rule)


@pytest.fixture(params=["sockd", pytest.param("danted", marks=pytest.mark.dante)])
def start(request: pytest.FixtureRequest) -> Factory:
    """Start one of the two servers."""
    factory: Factory = request.getfixturevalue(request.param)
    return factory


def list_servers_of(server: Server) -> set[int]:
    """Give the processes that have connected clients to targets, as the log names them."""
    return {record.pid for record in server.log if "tcp/connect [" in record.message}


def serve_one(server: Server, target: tuple[str, int]) -> None:
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target).code == 0
        assert client.exchange(b"ping") == b"ping"


def test_a_worker_that_has_served_enough_is_replaced(start: Factory, peer: Callable[..., Any]) -> None:
    server = start(configure("child.maxrequests: 2"))
    target = peer("echo").address
    for _ in range(9):
        serve_one(server, target)
        time.sleep(0.05)  # the new worker needs a moment; until it is there the old one goes on
    assert len(list_servers_of(server)) > 1
    server.take_baseline()


def test_without_child_maxrequests_the_worker_stays(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(configure(""))
    target = peer("echo").address
    for _ in range(9):
        serve_one(server, target)
    assert len(list_servers_of(server)) == 1


@pytest.mark.parametrize(
    "settings", ["child.maxrequests: 1", "child.maxlifetime: 1"], ids=["requests", "lifetime"]
)
def test_sessions_outlive_the_end_of_their_worker(
    sockd: Factory, peer: Callable[..., Any], settings: str
) -> None:
    # With counts of sessions, which both workers share.
    server = sockd(configure(settings, "session.max: 2"))
    target = peer("echo").address
    with Client(server.addresses[0]) as first:
        assert first.open5(CONNECT, *target).code == 0
        eventually(lambda: len(find_workers(server)) > 1)
        eventually(lambda: count_listening(server) == 1)
        with Client(server.addresses[0]) as second, Client(server.addresses[0]) as third:
            assert second.open5(CONNECT, *target).code == 0
            assert first.exchange(b"ping") == b"ping"
            assert second.exchange(b"pong") == b"pong"
            assert third.open5(CONNECT, *target).code == 2
    assert len(list_servers_of(server)) == 2
    # Resolver and worker are left.
    eventually(lambda: len([p for p in server.processes() if p.pid != server.pid]) == 2)
    server.take_baseline()


def count_listening(server: Server) -> int:
    """Count the workers that hold the listener."""
    listener = f":{server.port:04X} "
    with open("/proc/net/tcp") as file:
        inodes = {line.split()[9] for line in file if listener in line and " 0A " in line}
    links = {f"socket:[{inode}]" for inode in inodes}
    return sum(bool(links & set(list_links(process))) for process in server.processes()) - 1  # the mother


def list_links(process: Process) -> list[str]:
    folder = f"/proc/{process.pid}/fd"
    try:
        return [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]
    except FileNotFoundError:
        return []


def test_a_worker_is_not_replaced_while_its_predecessor_is_still_busy(
    sockd: Factory, peer: Callable[..., Any]
) -> None:
    server = sockd(configure("child.maxrequests: 1"))
    target = peer("echo").address
    with Client(server.addresses[0]) as long_one:
        assert long_one.open5(CONNECT, *target).code == 0
        eventually(lambda: count_listening(server) == 1)
        for _ in range(5):
            serve_one(server, target)
        assert len(find_workers(server)) == 2
    eventually(lambda: len(find_workers(server)) > 2)
    server.take_baseline()


def test_a_worker_that_lies_about_being_tired_is_replaced_once(sockd: Factory) -> None:
    """Only the word of a worker that serves counts: the process count stays bounded."""
    server = sockd(configure("child.maxrequests: 1"))
    for _ in range(30):
        with socket.create_connection(server.addresses[0], 10):
            pass
    eventually(lambda: len(server.processes()) <= 5)
    server.take_baseline()


# ------------------------------ cpu ------------------------------


def find_workers(server: Server) -> list[int]:
    """Give the workers that have ever started, the oldest first."""
    return [record.pid for record in server.log if record.message.endswith(" running")]


def find_kinds(server: Server) -> dict[str, list[int]]:
    """Give sockd's processes by kind: the worker says who it is, the helpers start before it."""
    worker = find_workers(server)[0]
    others = sorted(p.pid for p in server.processes() if p.pid not in (server.pid, worker))
    return {"mother": [server.pid], "resolver": others[:1], "warden": others[1:], "worker": [worker]}


@pytest.mark.parametrize(
    ("process", "kind"),
    [("mother", "mother"), ("request", "resolver"), ("negotiate", "warden"), ("io", "worker")],
)
def test_a_policy_is_for_one_kind_of_process(sockd: Factory, process: str, kind: str) -> None:
    server = sockd(configure(f"cpu.schedule.{process}: idle/0\ncpu.mask.{process}: 0"))
    with Client(server.addresses[0]) as client:  # whom the resolver answers, which so is past its start
        client.open5(CONNECT, "localhost", 9)
    for name, pids in find_kinds(server).items():
        for pid in pids:
            policy = os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK
            assert (policy == os.SCHED_IDLE) is (name == kind), name
            allowed = {0} if name == kind else os.sched_getaffinity(0)
            found = os.sched_getaffinity(pid)
            assert len(found) == 1 and found <= allowed if name == "worker" else found == allowed, name


def test_a_policy_and_a_mask_apply_to_those_who_relay(start: Factory, peer: Callable[..., Any]) -> None:
    server = start(configure("cpu.schedule.io: idle/0\ncpu.mask.io: 0"))
    serve_one(server, peer("echo").address)
    (pid,) = list_servers_of(server)
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    assert os.sched_getaffinity(pid) == {0}


def test_a_priority_is_set(start: Factory, peer: Callable[..., Any]) -> None:
    settings = "cpu.schedule.io: rr/7"
    server = start(configure(settings))
    serve_one(server, peer("echo").address)
    (pid,) = list_servers_of(server)
    if re.search("could not set cpu.schedule|sched_setscheduler", server.text):
        pytest.skip("this machine grants nobody a real-time priority")
    assert os.sched_getscheduler(pid) == os.SCHED_RR
    assert os.sched_getparam(pid).sched_priority == 7


def test_library_without_scheduling_serves_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """As musl, which has the calls but answers ENOSYS."""

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    at_start = program.read_cpu_use()
    for name in ("sched_getscheduler", "sched_getparam", "sched_setscheduler"):
        monkeypatch.setattr(os, name, fail)
    assert program.read_cpu_use() == program.CpuUse(at_start.cpus, os.SCHED_OTHER, 0)
    written: list[str] = []
    log = SimpleNamespace(write=lambda level, text: written.append(f"{level}: {text}"))
    config, complaints = program.parse_config(configure(""), "sockd.conf", program.SystemSurroundings())
    assert config is not None, complaints
    program.obey_cpu_settings(config, "mother", program.read_cpu_use(), log)
    assert written == []


def test_any_cpu_is_any(start: Factory, peer: Callable[..., Any]) -> None:
    server = start(configure("cpu.mask.io: any\ncpu.mask.mother: 0"))
    serve_one(server, peer("echo").address)
    (pid,) = list_servers_of(server)
    assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)
    assert os.sched_getaffinity(server.pid) == {0}


@pytest.mark.parametrize("mask", ["", "all"])
def test_each_worker_keeps_to_one_cpu(sockd: Factory, mask: str) -> None:
    usable = sorted(os.sched_getaffinity(0))
    settings = f"cpu.mask.io: {' '.join(map(str, usable))}\n" if mask else ""
    server = sockd(settings + configure(""), "-N", str(len(usable)))
    workers = eventually(lambda: len(w := find_workers(server)) == len(usable) and w)
    found = [cpu for pid in workers for cpu in os.sched_getaffinity(pid)]
    assert sorted(found) == usable


def test_the_cpu_is_kept_by_whoever_replaces_a_worker(sockd: Factory) -> None:
    server = sockd(configure(""), "-N", "1")
    (worker,) = find_workers(server)
    before = os.sched_getaffinity(worker)
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: len(find_workers(server)) > 1)
    assert os.sched_getaffinity(find_workers(server)[1]) == before


# ------------------------------ a worker alone, where the system runs short ------------------------------


class Control(socket.socket):
    """A worker's end of the connection to the mother; it has no room for the first of its words."""

    faults = 0

    def send(self, *arguments: Any) -> int:
        if self.faults:
            self.faults -= 1
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return super().send(*arguments)


class ShortEpoll:
    """An epoll that fails to register what it is told next, `faults` times."""

    def __init__(self, fault: Exception) -> None:
        self.epoll, self.fault, self.faults = select.epoll(), fault, 0

    def register(self, descriptor: int, events: int) -> None:
        if self.faults:
            self.faults -= 1
            raise self.fault
        self.epoll.register(descriptor, events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.epoll, name)


@pytest.fixture
def alone() -> Iterator[tuple[program.Worker, socket.socket]]:
    """A worker with one listener, that does not run; and the mother's end."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(10)
    serving: Any = SimpleNamespace(log=None)
    serving._replace = lambda **_: serving
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    with theirs, Control(fileno=ours.detach()) as control, listener:
        worker = program.Worker(serving, [listener], control)
        yield worker, theirs
        for gate in worker.gates:
            gate.epoll.close()
        for descriptor in (*worker.alarm, worker.reserve):
            os.close(descriptor)


def test_worker_tells_that_it_is_drained_until_there_is_room_for_it(
    alone: tuple[program.Worker, Any],
) -> None:
    worker, mother = alone
    stack_bytes = threading.stack_size()
    worker.control.faults = 3  # type: ignore[attr-defined]
    session: Any = type("Relay", (), {"may_ask": lambda _: False})()
    worker.sessions.add(session)
    running = threading.Thread(target=worker.run)
    running.start()
    try:
        mother.send(program.encode_message(program.Order.DRAIN, []))
        assert {mother.recv(100), mother.recv(100)} == {program.DRAINED, program.SETTLED}
    finally:
        worker.sessions.clear()
        running.join(10)
        threading.stack_size(stack_bytes)
    assert not running.is_alive()


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), MemoryError()], ids=repr)
def test_client_is_served_where_its_listener_cannot_be_registered_again(
    alone: tuple[program.Worker, Any], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    worker, _ = alone
    (listener,) = worker.listeners.values()
    epoll: Any = ShortEpoll(fault)
    worker.gates = [worker.gates[0]._replace(epoll=epoll), worker.gates[1]]
    epoll.register(listener.fileno(), program.WAKES_ONE)
    monkeypatch.setattr(program.Worker, "accept", lambda _, listener: listener.accept()[0])
    for _ in range(3):
        with socket.create_connection(listener.getsockname()) as client:
            epoll.faults = 1
            found: Any = worker.find_client()
            with found:
                assert found.getpeername() == client.getsockname()
    epoll.close()


def test_threads_that_wait_for_a_call_do_not_hold_up_a_drain(alone: tuple[program.Worker, Any]) -> None:
    worker, _ = alone
    (listener,) = worker.listeners.values()
    worker.spare = 100
    worker.close_listeners()
    assert not worker.called
    assert listener.fileno() < 0
    assert worker.find_client() is None  # a thread that comes now
