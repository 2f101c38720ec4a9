"""A worker that an attacker has taken over, and clients that send anything: nobody else notices."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bad_worker
import login_peers
import pytest
from client import (
    BIND,
    CONNECT,
    UDP_ASSOCIATE,
    Client,
    greeting,
    password_message,
    request4,
    request5,
)
from more_peers import CLIENT_PASS, HEAD, hash_with, measure_idleness, rule, wait_for_record, wait_for_workers
from peers import TcpPeer, UdpPeer
from servers import Server, Sockd, World, eventually, find_free_port, read_process

import sockd as program

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]
MESSAGES = HANDSHAKES = 10_000
BATCHES = 4
LOGIN = (b"alice", b"wonderland")


@pytest.fixture(scope="module")
def pam_world(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Give a world with PAM services that answer at once."""
    return login_peers.write_pam_services(private_world, tmp_path_factory.mktemp("pam") / "pam")


# ------------------------------ random messages ------------------------------

HELPER_CONFIG = """\
logoutput: stderr
internal: 127.0.0.1 port = 0
external: 127.0.0.1
compatibility: sameport
user.privileged: root
user.unprivileged: nobody
clientmethod: none
socksmethod: none
libwrap.hosts_access: yes
client pass { from: 0/0 to: 0/0
    libwrap: spawn true
}
socks pass { from: 0/0 to: 0/0 }
"""


@pytest.mark.parametrize("penalty", ["yes", "no"])
@pytest.mark.parametrize("helper", ["resolver", "warden"])
def test_helper_answers_or_reports_each_of_many_random_messages(
    helper: str, penalty: str, pam_world: World, tmp_path: Path
) -> None:
    config = tmp_path / "sockd.conf"
    config.write_text(f"login.penalty: {penalty}\n{HELPER_CONFIG}")
    count, seed = str(MESSAGES // BATCHES), f"{len(penalty)}"
    command = pam_world.wrap([sys.executable, bad_worker.__file__, helper, str(config), count, seed])
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in result.stderr, result.stderr
    assert "internal error" not in result.stderr, result.stderr
    found = json.loads(result.stdout)
    outcomes = found["outcomes"]
    assert "helper gone" not in outcomes, f"by {found['last']}"
    assert outcomes["answered"] + outcomes["reported"] == int(count)
    assert min(outcomes.values()) > int(count) // 5
    assert found["leaked"] <= 0
    assert found["status"] == 0
    assert found["named"]  # every report names the process that sent the message


# ------------------------------ a worker that goes bad ------------------------------


class BadSockd(Sockd):
    """The program, with workers that its clients can turn."""

    def command(self) -> list[str]:
        """Give the command that runs it."""
        return [sys.executable, bad_worker.__file__]


BAD_CONFIG = (
    HEAD.replace("socksmethod: none", "socksmethod: username").replace("internal: ::1 port = 0\n", "")
    + "user.privileged: root\nuser.unprivileged: nobody\ncompatibility: sameport\n"
    + CLIENT_PASS
    + rule("socks pass", "from: 0/0 to: 0/0", "log: connect error")
)


@pytest.fixture(scope="module")
def bad_server(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all attacks."""
    server = BadSockd(BAD_CONFIG, tmp_path_factory.mktemp("bad"), ("-N", "2"), private_world)
    yield server
    server.check_text()
    server.close()


def find_children(server: Server) -> set[int]:
    """Give the pids of a server's children."""
    return {p.pid for p in server.processes() if p.parent == server.pid and p.state != "Z"}


@contextlib.contextmanager
def attack(server: Server, name: str) -> Iterator[None]:
    """Have a worker do its worst; its client stays, and reads no more than the first bytes."""
    with Client(server.addresses[0], source=(bad_worker.address_of(name), 0)) as client:
        with contextlib.suppress(ConnectionResetError, AssertionError):
            client.receive(8)
        yield


def check_others_are_served(server: Server, peer: StartPeer) -> None:
    """Check that names are resolved and passwords checked for others, by each worker in turn."""
    target = peer("echo")
    for _ in range(4):
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "echo.test", target.port, LOGIN).code == 0
            assert client.exchange(b"served") == b"served"


def is_calm(server: Server) -> bool:
    """Tell whether nothing in a server spins."""
    with contextlib.suppress(FileNotFoundError):  # a child has just ended
        return measure_idleness(server, 0.2) < 0.3
    return False


@pytest.mark.parametrize("name", bad_worker.ATTACKS)
def test_worker_that_breaks_the_rules_is_ended_and_replaced(
    bad_server: Server, peer: StartPeer, name: str
) -> None:
    server, before = bad_server, find_children(bad_server)
    with attack(server, name):
        gone = eventually(lambda: before - find_children(server))
        check_others_are_served(server, peer)
    eventually(lambda: len(find_children(server)) == len(before))
    assert len(gone) == 1
    (culprit,) = gone
    workers = {record.pid for record in server.log if record.message.endswith(" running")}
    assert culprit in workers
    assert any(f"worker {culprit} " in m for m in server.messages if m.startswith(("error: ", "warning: ")))
    eventually(lambda: is_calm(server))
    server.check_text()


def start_bad_server(world: World, folder: Path, config: str = BAD_CONFIG, workers: int = 2) -> Server:
    """Start a server for one attack, with resolver and warden besides its workers."""
    port = find_free_port()  # one that the kernel has chosen goes with the listening
    server = BadSockd(config.replace("port = 0", f"port = {port}"), folder, ("-N", str(workers)), world)
    server.addresses = [("127.0.0.1", port)]
    wait_for_workers(server, workers)  # or one is ended before it has said that it runs
    assert len(find_children(server)) == workers + 2
    return server


@pytest.mark.parametrize("name", bad_worker.QUIET_ATTACKS)
def test_worker_that_spoils_the_channel_holds_up_nobody(
    private_world: World, tmp_path: Path, peer: StartPeer, name: str
) -> None:
    server = start_bad_server(private_world, tmp_path)
    try:
        with attack(server, name):
            pass
        if name.startswith("ends the"):
            # All workers share it, and nobody can tell who has ended it: all are replaced.
            eventually(lambda: sum(m.endswith(" running") for m in server.messages) == 4)
        check_others_are_served(server, peer)
        eventually(lambda: is_calm(server))
        assert server.stop() == 0
        server.check_text()
    finally:
        server.kill()


def list_ended_strays(server: Server) -> list[str]:
    return [m for m in server.messages if m.endswith(", of a worker that has gone, is ended")]


@pytest.mark.parametrize(("name", "count"), [("leaves a child", 1), ("leaves a child that has children", 3)])
def test_what_a_worker_leaves_behind_takes_no_clients(
    private_world: World, tmp_path: Path, peer: StartPeer, name: str, count: int
) -> None:
    server = start_bad_server(private_world, tmp_path)
    try:
        with attack(server, name):
            eventually(lambda: len(list_ended_strays(server)) == count)
        check_others_are_served(server, peer)
        eventually(lambda: len(server.processes()) == 5)
        assert len(set(list_ended_strays(server))) == len(list_ended_strays(server)) == count
        check_end(server)
    finally:
        server.kill()


def test_mother_does_not_wait_for_what_a_worker_leaves_in_her_queue(
    private_world: World, tmp_path: Path, peer: StartPeer
) -> None:
    server = start_bad_server(private_world, tmp_path)
    try:
        server.signal(signal.SIGSTOP)  # so that she learns of all of it at once
        with attack(server, "buries the mother"):
            eventually(lambda: len(find_children(server)) == 3)
            server.signal(signal.SIGCONT)
            check_others_are_served(server, peer)
            eventually(lambda: len(find_children(server)) == 4)
            check_end(server)
    finally:
        server.kill()


@pytest.mark.parametrize("name", [name for name in bad_worker.LAST_ATTACKS if name.endswith(" at the end")])
def test_worker_that_turns_at_the_end_does_not_outlive_the_server(
    private_world: World, tmp_path: Path, name: str
) -> None:
    server = start_bad_server(private_world, tmp_path)
    try:
        with attack(server, name):
            check_end(server)
    finally:
        server.kill()


def test_worker_that_reads_no_orders_does_not_hold_up_the_mother(
    private_world: World, tmp_path: Path
) -> None:
    """Each SIGHUP is an order with the log's descriptor, and there is room for some hundreds of them."""
    config = f"logoutput: {tmp_path}/log\n{BAD_CONFIG}"
    server = start_bad_server(private_world, tmp_path, config, workers=1)
    try:
        (culprit,) = (record.pid for record in server.log if record.message.endswith(" running"))
        with attack(server, "reads no orders"):
            pass
        deadline = time.monotonic() + 10
        while read_process(culprit) and time.monotonic() < deadline:
            server.signal(signal.SIGHUP)
        check_end(server)
        assert f"worker {culprit} " in (tmp_path / "log").read_text()
    finally:
        server.kill()


def check_end(server: Server) -> None:
    """Check that a server ends when it is told to, and that another one can take its place at once."""
    assert server.stop() == 0
    assert not server.processes()
    socket.create_server(server.addresses[0]).close()
    server.check_text()


def test_worker_that_ends_in_peace_gives_its_places_back(private_world: World, tmp_path: Path) -> None:
    config = BAD_CONFIG.replace("client pass {", "client pass { session.max: 1")
    server = start_bad_server(private_world, tmp_path, config, workers=1)
    try:
        with attack(server, "leaves with a place"):
            wait_for_record(server, "exited unexpectedly with status 0")
        with Client(server.addresses[0]) as client:
            assert client.greet([2]) == 2
        check_end(server)
    finally:
        server.kill()


def test_mother_does_not_wait_for_what_a_child_shows_her(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel closes what she does not take, and that would wait for as long as the child likes."""
    monkeypatch.setattr(bad_worker, "SLOW_SECONDS", 30)
    before = signal.signal(signal.SIGALRM, program.note_alarm)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mother = program.Mother(program.Options(), program.Config(""))
    generation = program.Generation(0, program.Config(""), (None, None, None), 1)
    mother.generations.append(generation)
    mother.children[0] = program.Child("worker", ours, 1, generation)
    began = time.monotonic()
    with ours, theirs:
        for slow in (bad_worker.slow_to_close(), bad_worker.wrapped(bad_worker.slow_to_close())):
            word = program.SETTLED if slow.family == socket.AF_UNIX else program.DRAINED
            socket.send_fds(theirs, [word], [slow.fileno()])
            slow.close()
            mother.hear_child(0)
    signal.signal(signal.SIGALRM, before)
    generation.close_inbox()
    assert mother.children[0].said == {program.SETTLED, program.DRAINED}
    assert time.monotonic() - began < bad_worker.SLOW_SECONDS


@pytest.mark.parametrize("way", ["retire_generations", "start_over"])
def test_mother_does_not_wait_for_what_lies_in_an_inbox(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(bad_worker, "SLOW_SECONDS", 30)
    before = signal.signal(signal.SIGALRM, program.note_alarm)
    mother = program.Mother(program.Options(), program.Config(""))
    mother.generations = [program.Generation(n, program.Config(""), (None, None, None), 1) for n in range(2)]
    mother.resolver_inbox = program.make_inbox()
    monkeypatch.setattr(mother, "spawn_children", lambda: None)
    inbox = mother.resolver_inbox if way == "start_over" else mother.generations[0].warden_inbox
    for slow in (bad_worker.slow_to_close(), bad_worker.wrapped(bad_worker.slow_to_close())):
        with slow:
            socket.send_fds(inbox[1], [b"x"], [slow.fileno()])
    began = time.monotonic()
    getattr(mother, way)()
    signal.signal(signal.SIGALRM, before)
    assert {end.fileno() for end in inbox} == {-1}
    for left in (mother.resolver_inbox, *(generation.warden_inbox for generation in mother.generations)):
        program.close_inbox(left)
    assert time.monotonic() - began < bad_worker.SLOW_SECONDS


def test_worker_that_ends_while_another_is_waited_for_is_not_ended_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its number may be somebody else's by then."""
    mother = program.Mother(program.Options(), program.Config(""))
    generation = program.Generation(0, program.Config(""), (None, None, None), 1)
    mother.generations = [generation]
    control, _ = socket.socketpair()
    mother.children = {pid: program.Child("worker", control, pid, generation) for pid in (1, 2)}
    mother.handover = program.Handover({1, 2}, 0.0)
    killed: list[int] = []
    monkeypatch.setattr(program.os, "kill", lambda pid, _: killed.append(pid))
    monkeypatch.setattr(program, "list_ended", lambda: [(pid, 0) for pid in tuple(mother.children)])
    monkeypatch.setattr(program, "find_strays", lambda _: [])
    mother.finish_reload()
    generation.close_inbox()
    assert len(killed) == 1
    assert not mother.children


@pytest.mark.parametrize("way", ["tidy", "drain"])
def test_warden_does_not_wait_for_a_log_in_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(bad_worker, "SLOW_SECONDS", 30)
    before = signal.signal(signal.SIGALRM, program.note_alarm)
    warden = program.Warden(program.Config(""), program.Log("sockd"))
    # Its asker has gone, and the kernel closes what lies in its queue.
    answer = bad_worker.wrapped(bad_worker.slow_to_close())
    warden.waiting = [program.Question(program.Favour.INITIATE, [b"", b""], answer)]
    monkeypatch.setattr(warden, "children", {1: ""} if way == "drain" else {})
    monkeypatch.setattr(warden, "reap", lambda must_wait: warden.children.clear())
    began = time.monotonic()
    getattr(warden, way)()
    signal.signal(signal.SIGALRM, before)
    assert not warden.waiting
    assert time.monotonic() - began < bad_worker.SLOW_SECONDS


def test_log_in_to_an_upstream_that_ends_makes_no_room_for_a_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The warden waits for whichever child ends first."""
    monkeypatch.setattr(program, "VERIFIERS", 2)
    ended = [0, 1, 0, 2, 0]  # 1 is the log-in, and 0 says that no other has ended
    monkeypatch.setattr(program.os, "waitpid", lambda *_: (ended.pop(0), 0))
    warden = program.Warden(program.Config(""), program.Log("sockd"))
    warden.children, warden.initiators = {1: "", 2: "", 3: ""}, {1: (b"", b"")}
    monkeypatch.setattr(program, "fork_verifier", lambda body: 4)
    answer, asker = socket.socketpair()
    with asker:
        warden.grant(program.Question(program.Favour.ACCEPT, [b"1", b""], answer))
    assert set(warden.children) == {3, 4}


def test_resolver_whose_threads_are_all_stuck_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "RESOLVE_SECONDS", 0.01)
    resolver = program.Resolver()
    while resolver.free.acquire(blocking=False):
        pass
    read_end, write_end = program.make_inbox()
    answer, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with read_end, write_end, answer:
        socket.send_fds(write_end, [bad_worker.RESOLVE], [answer.fileno()])
        control, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        monkeypatch.setattr(program.signal, "setitimer", lambda *_: None)
        with control:
            assert program.run_helper(program.Log("sockd"), read_end, control, resolver) == 1
    resolver.drain()  # does not wait for what does not end


@pytest.mark.parametrize(
    ("fault", "is_answer"),
    [
        (socket.gaierror(socket.EAI_NONAME, "no such name"), True),
        (socket.herror(1, "no such host"), True),
        (KeyError("no such user"), True),
        (socket.gaierror(socket.EAI_SYSTEM, "system error"), False),
        (OSError(errno.EMFILE, "too many open files"), False),
    ],
)
def test_what_the_resolver_lacks_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, is_answer: bool
) -> None:
    def fail(_: list[bytes]) -> list[bytes]:
        raise fault

    monkeypatch.setitem(program.RESOLVER_FAVOURS, program.Favour.RESOLVE, fail)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program.Resolver().answer(program.Question(program.Favour.RESOLVE, [b"a.test", b"4"], theirs))
    with program.Dialogue(program.Favour.RESOLVE, ours) as dialogue:
        if is_answer:
            assert "no such" in dialogue.hear(1.0)[0][0].decode()
        else:
            with pytest.raises(program.HelperFailed, match=r"system error|too many open files"):
                dialogue.hear(1.0)


@pytest.mark.parametrize(("count", "fits"), [(1, True), (400, True), (40_000, False)])
def test_answer_of_the_resolver_is_whole_or_none(
    monkeypatch: pytest.MonkeyPatch, count: int, fits: bool
) -> None:
    names = [b"%d" % number for number in range(count)]
    monkeypatch.setitem(program.RESOLVER_FAVOURS, program.Favour.GROUPS, lambda _: names)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program.Resolver().answer(program.Question(program.Favour.GROUPS, [b"alice"], theirs))
    with program.Dialogue(program.Favour.GROUPS, ours) as dialogue:
        if fits:
            assert dialogue.hear(1.0)[0] == [b"", b"\0".join(names)]
        else:
            with pytest.raises(program.HelperFailed, match="more than 65535 bytes"):
                dialogue.hear(1.0)


def test_helper_without_a_free_descriptor_accuses_nobody() -> None:
    read_end, write_end = program.make_inbox()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with read_end, write_end, ours:
        with theirs:
            socket.send_fds(write_end, [bad_worker.RESOLVE], [theirs.fileno()])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(BlockingIOError):
                program.receive_question(read_end, program.Resolver.granted)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert ours.recv(1) == b""  # the asker is not left waiting


def test_inbox_that_stays_full_is_the_helpers_fault() -> None:
    """Not that of the upstream, or the target, that the question was about."""
    read_end, write_end = program.make_inbox()
    with read_end, write_end:
        write_end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                write_end.send(b"x" * 10_000)
        with pytest.raises(program.HelperLate):
            program.Channel(write_end).begin(program.Favour.RESOLVE, [b"a.test", b"4"], 0.01)


class Ticketing:
    """A log-in by ticket to an upstream, with the test in the places of warden, upstream and client."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        pairs = [socket.socketpair(), socket.socketpair(), program.make_inbox()]
        for end in (end for pair in pairs for end in pair):
            stack.enter_context(end)
        (connection, self.upstream), (client, self.client), (self.inbox, inbox) = pairs
        connection.setblocking(False)
        self.stream = program.UpstreamStream(connection, client.fileno())
        self.warden = program.Channel(inbox)

    def give_ticket(self, pause: float) -> None:
        """Answer as the warden, after a pause."""
        select.select([self.inbox], [], [])
        question = program.receive_question(self.inbox, program.Warden.granted)
        time.sleep(pause)
        question.reply([b"", b"token"])

    def run(self, seconds: float) -> None:
        service = program.UpstreamService("rcmd@proxy.test", "")
        program.establish_context(self.stream, service, self.warden, time.monotonic() + seconds)


@pytest.mark.parametrize("is_silent", [True, False])
@pytest.mark.parametrize("is_slow", [True, False])
def test_upstream_is_not_blamed_for_a_slow_ticket(is_slow: bool, is_silent: bool) -> None:
    """It may be tired of waiting by then, or have no time left to answer."""
    seconds = 1.0 if is_slow else 4.0
    blamed = program.DeadlinePassed if is_silent else program.ProtocolError
    with contextlib.ExitStack() as stack:
        ticketing = Ticketing(stack)
        if not is_silent:
            ticketing.upstream.shutdown(socket.SHUT_WR)
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor())
        pool.submit(ticketing.give_ticket, 0.6 if is_slow else 0.0)
        with pytest.raises(program.NoTicket if is_slow else blamed):
            ticketing.run(seconds)


def test_client_that_leaves_while_a_ticket_is_awaited_is_noticed() -> None:
    with contextlib.ExitStack() as stack:
        ticketing = Ticketing(stack)
        ticketing.client.close()
        with pytest.raises(program.PeerGone):
            ticketing.run(5.0)


def test_kdc_writes_no_line_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's text for an error has in it what the KDC has said."""
    said = program.give_buffer(b"no\n info: a line of its own\x1b[2J")

    class Library:
        @staticmethod
        def gss_display_status(*arguments: Any) -> int:
            arguments[-1].length, arguments[-1].value = said.length, said.value
            return 0

        @staticmethod
        def gss_release_buffer(*_: object) -> int:
            return 0

    monkeypatch.setattr(program, "load_gssapi", Library)
    text = program.describe_gss(1, program.GSS_MECH_CODE)
    assert text == r"no\n info: a line of its own\033[2J"


# ------------------------------ random handshakes ------------------------------


class Canary:
    """Listeners that no rule allows anybody to reach."""

    def __init__(self, peer: StartPeer) -> None:
        self.tcp: list[TcpPeer] = [peer("discard"), peer("discard", "::1"), peer("discard", "127.0.0.2")]
        self.udp: UdpPeer = peer("udp-sink")

    def check(self) -> None:
        """Check that nobody came."""
        assert not [seen.remote for listener in self.tcp for seen in listener.seen]
        assert not self.udp.seen


def originals(allowed: int, canary: Canary) -> list[bytes]:
    """Give handshakes that are right, to a target that is allowed and to some that are not."""
    four, six, other = (listener.port for listener in canary.tcp)
    targets = [
        (CONNECT, "127.0.0.1", allowed), (CONNECT, "127.0.0.1", four), (CONNECT, "::1", six),
        (CONNECT, "echo.test", four), (CONNECT, "two.test", other), (CONNECT, "127.0.0.2", other),
        (CONNECT, "::ffff:127.0.0.1", four), (BIND, "127.0.0.1", four), (UDP_ASSOCIATE, "0.0.0.0", 0),
        (UDP_ASSOCIATE, "127.0.0.1", canary.udp.port),
    ]  # fmt: skip
    requests = [greeting([0]) + request5(*target) for target in targets]
    requests += [greeting([0, 2]) + password_message(*LOGIN) + request5(*target) for target in targets[:4]]
    requests += [request4(CONNECT, host, port, b"user") for _, host, port in targets[:1] + targets[3:6]]
    return [request + b"data behind" for request in requests]


INTERESTING = (0, 1, 2, 3, 4, 5, 8, 16, 90, 127, 128, 254, 255)


def mutate(message: bytes, chance: random.Random) -> bytes:
    """Spoil a handshake in one to four places."""
    spoiled = bytearray(message)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(spoiled))
        how = chance.randrange(5)
        if how == 0:
            spoiled[at] = chance.randrange(256)
        elif how == 1:
            spoiled[at] = chance.choice(INTERESTING)
        elif how == 2:
            spoiled[at:at] = chance.randbytes(chance.choice((1, 2, 255)))
        elif how == 3 and len(spoiled) > 3:
            del spoiled[at : at + chance.randint(1, 3)]
        else:
            spoiled += spoiled[at:]
    return bytes(spoiled) or b"\0"


def make_handshake(seed: int, good: list[bytes]) -> tuple[bytes, random.Random]:
    """Make a handshake: one of five is random bytes, the others are spoiled."""
    chance = random.Random(seed)
    if chance.random() < 0.2:
        first = chance.choice((b"\4", b"\5", b""))
        return first + chance.randbytes(chance.randint(1, 300)), chance
    return mutate(chance.choice(good), chance), chance


def shake_hands(server: Server, message: bytes, chance: random.Random) -> None:
    """Send a handshake, in one piece or two, read what comes first, and leave."""
    cut = chance.randrange(len(message)) if chance.random() < 0.3 else 0
    with Client(server.addresses[chance.randrange(2)]) as client, contextlib.suppress(OSError):
        for piece in filter(None, (message[:cut], message[cut:])):
            client.send(piece)
        if chance.random() < 0.9:
            client.finish_sending()
            client.sock.recv(4096)
        client.reset()  # a UDP association outlives a mere end for a few seconds


def test_many_spoiled_handshakes_reach_nothing_that_no_rule_allows(
    private_world: World, tmp_path: Path, peer: StartPeer
) -> None:
    allowed, canary = peer("echo"), Canary(peer)
    (tmp_path / "passwords").write_text(f"alice:{hash_with('-1', 'wonderland')}\n")
    only = f"from: 0/0 to: 127.0.0.1/32 port = {allowed.port}"
    config = (
        HEAD.replace("socksmethod: none", "socksmethod: username none")
        + f"passwordfile: {tmp_path}/passwords\nlogin.penalty: no\n"
        + rule("client pass", "from: 0/0 to: 0/0")
        + rule("socks pass", only)
        + rule("socks pass", "from: 0/0 to: 0/0", "command: udpassociate")
    )
    server = Sockd(config, tmp_path, world=private_world)
    try:
        before = find_children(server)
        good = originals(allowed.port, canary)

        def run(first: int) -> None:
            for seed in range(first, HANDSHAKES, BATCHES):
                shake_hands(server, *make_handshake(seed, good))

        with concurrent.futures.ThreadPoolExecutor(BATCHES) as pool:
            list(pool.map(run, range(BATCHES)))
        canary.check()
        assert len(allowed.seen) > 100  # some handshakes were not spoiled where it matters
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "127.0.0.1", allowed.port, LOGIN).code == 0
            assert client.exchange(b"served") == b"served"
        assert find_children(server) == before
        assert all(read_process(pid) for pid in before)
        server.check_text()
    finally:
        server.close()


def test_association_whose_client_resets_after_its_end_is_closed(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    server = sockd(HEAD + CLIENT_PASS + rule("socks pass", "from: 0/0 to: 0/0"), world=private_world)
    with Client(server.addresses[0]) as client:
        assert client.open5(UDP_ASSOCIATE, "0.0.0.0", 0).code == 0
        client.finish_sending()
        eventually(lambda: "udp: " in wait_for_report(server))
        client.reset()
    eventually(lambda: is_calm(server))
    server.check_resources()


def wait_for_report(server: Server) -> str:
    """Have the server log its sessions, and give the line about the only one."""
    before = len(server.messages)
    server.signal(signal.SIGUSR1)
    return eventually(
        lambda: next((m for m in server.messages[before:] if ": age: " in m or " for " in m), "")
    )
