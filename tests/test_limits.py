"""`session.*`: how many sessions a rule and a source may have, over all workers; beside danted."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client
from conftest import Factory
from more_peers import rule, wait_for_record, wait_for_workers
from servers import Server, eventually, read_process

import sockd as program

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

HEAD = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
"""
LOG = "log: connect disconnect error"
ANYBODY = "from: 0/0 to: 0/0"
CLIENT_PASS = rule("client pass", ANYBODY, LOG)
SOCKS_PASS = rule("socks pass", ANYBODY, LOG)
IN, REFUSED, CLOSED = "in", "refused", "closed"

each_server = pytest.mark.parametrize("factory", ["sockd", "danted"], indirect=True)
each_count = pytest.mark.parametrize("workers", ["1", "4"])


def client_rule(*items: str) -> str:
    return HEAD + rule("client pass", ANYBODY, LOG, *items) + SOCKS_PASS


def socks_rule(*items: str) -> str:
    return HEAD + CLIENT_PASS + rule("socks pass", ANYBODY, LOG, *items)


class Crowd:
    """Clients of one server that stay connected until they are sent away."""

    def __init__(self, server: Server, port: int, stack: contextlib.ExitStack) -> None:
        self.server = server
        self.port = port
        self.stack = stack
        self.inside: list[Client] = []

    def come(self, source: str = "127.0.0.1", command: int = CONNECT) -> str:
        """Let one more client ask for a session, and tell what became of it."""
        client = self.stack.enter_context(Client(self.server.addresses[0], source=(source, 0)))
        try:
            host, port = ("127.0.0.1", self.port) if command == CONNECT else ("0.0.0.0", 0)
            reply = client.open5(command, host, port)
        except (AssertionError, ConnectionError):
            client.close()
            return CLOSED
        if reply.code != 0:
            assert reply.code == 2
            client.close()
            return REFUSED
        self.inside.append(client)
        return IN

    def go(self, leave: Callable[[Client], None] = Client.close) -> None:
        """Send the first client away."""
        leave(self.inside.pop(0))


@pytest.fixture
def gather(factory: Factory, peer: StartPeer, stack: contextlib.ExitStack) -> Callable[..., Crowd]:
    """`gather(config, *options)` starts a server and gives its crowd."""

    def start(config: str, *options: str) -> Crowd:
        server = factory(config, *options)
        if options:
            wait_for_workers(server, int(options[1]))
        return Crowd(server, peer("echo").port, stack)

    return start


Gather = Callable[..., Crowd]


@each_server
def test_limits_of_a_client_rule_hold_until_a_session_ends(gather: Gather) -> None:
    crowd = gather(client_rule("session.max: 2"))
    assert [crowd.come() for _ in range(4)] == [IN, IN, CLOSED, CLOSED]
    assert wait_for_record(crowd.server, "block(1): tcp/accept ]: ", "limit reached").endswith(
        ": session limit reached (2/2 slots in use)"
    )
    crowd.go()
    assert eventually(lambda: crowd.come() == IN)
    assert crowd.come() == CLOSED


@each_server
def test_limits_of_a_socks_rule_are_answered_and_logged_at_both_levels(gather: Gather) -> None:
    crowd = gather(socks_rule("session.max: 1"))
    assert [crowd.come() for _ in range(2)] == [IN, REFUSED]
    reason = "session limit reached (1/1 slot in use)"
    record = wait_for_record(crowd.server, "block(1): tcp/connect ]: ")
    assert record.endswith(f" -> 0.0.0.0.0 127.0.0.1.{crowd.port}: {reason}")
    record = wait_for_record(crowd.server, "block(1): tcp/accept ]: ")
    assert record.endswith(f": blocked by higher-level socks-rule #1: {reason}")
    crowd.go()
    assert eventually(lambda: crowd.come() == IN)


@each_server
@pytest.mark.parametrize(("log", "is_logged"), [("error", False), ("connect", True), ("disconnect", True)])
def test_limits_are_logged_as_blocks_are(gather: Gather, log: str, is_logged: bool) -> None:
    config = HEAD + rule("client pass", ANYBODY, f"log: {log}", "session.max: 1") + SOCKS_PASS
    crowd = gather(config)
    assert [crowd.come(), crowd.come()] == [IN, CLOSED]
    crowd.go()
    wait_for_record(crowd.server, "tcp/connect ]: ", "local client closed")
    assert any("limit reached" in message for message in crowd.server.messages) == is_logged


@each_server
def test_limits_of_rate_come_before_those_of_number(gather: Gather) -> None:
    crowd = gather(client_rule("session.throttle: 2/1000", "session.max: 2"))
    assert [crowd.come() for _ in range(3)] == [IN, IN, CLOSED]
    record = wait_for_record(crowd.server, "limit reached")
    assert re.search(
        r": session rate limit reached \(already accepted 2 new clients during the last \d+s\.  "
        r"Current client count: 2\)$",
        record,
    )


@each_server
def test_limits_of_rate_begin_anew_when_their_time_is_over(gather: Gather) -> None:
    crowd = gather(socks_rule("session.throttle: 1/1"))
    assert crowd.come() == IN
    assert eventually(lambda: crowd.come() == IN)


@each_server
def test_limits_of_a_source_leave_other_sources_alone(gather: Gather) -> None:
    crowd = gather(
        client_rule("session.max: 3", "session.state.key: from", "session.state.max: 1"),
    )
    sources = ["127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"]
    assert [crowd.come(source) for source in sources] == [IN, CLOSED, IN, IN, CLOSED]
    assert wait_for_record(crowd.server, "per-key").endswith(
        ": per-key session limit reached (1/1 slot in use)"
    )
    wait_for_record(crowd.server, "127.0.0.5.", ": session limit reached (3/3 slots in use)")
    crowd.go()
    assert eventually(lambda: crowd.come("127.0.0.2") == IN)


@each_server
def test_limits_of_a_sources_rate(gather: Gather) -> None:
    crowd = gather(socks_rule("session.state.key: from", "session.state.throttle: 2/1000"))
    sources = ["127.0.0.2"] * 3 + ["127.0.0.3"]
    assert [crowd.come(source) for source in sources] == [IN, IN, REFUSED, IN]
    wait_for_record(crowd.server, "per-key session rate limit reached (already accepted 2 new clients")


@each_server
def test_limits_of_a_socks_rule_take_the_session_over(gather: Gather) -> None:
    """The client-rule counts only who has not made a request yet."""
    config = client_rule("session.max: 1").replace(SOCKS_PASS, "") + rule(
        "socks pass", ANYBODY, LOG, "session.max: 2"
    )
    crowd = gather(config)
    outcomes = [eventually(lambda: (r := crowd.come()) != CLOSED and r) for _ in range(3)]
    assert outcomes == [IN, IN, REFUSED]


@each_server
def test_limits_that_are_not_inheritable_end_with_the_request(gather: Gather) -> None:
    crowd = gather(client_rule("session.max: 1", "session.inheritable: no"))
    silent = crowd.stack.enter_context(Client(crowd.server.addresses[0]))
    wait_for_record(crowd.server, "tcp/accept [: ")
    assert crowd.come() == CLOSED
    assert silent.open5(CONNECT, "127.0.0.1", crowd.port).code == 0
    assert eventually(lambda: crowd.come() == IN)


@each_server
@pytest.mark.parametrize("command", [BIND, UDP_ASSOCIATE], ids=["bind", "udpassociate"])
def test_limits_hold_for_every_command(gather: Gather, command: int) -> None:
    crowd = gather(socks_rule("session.max: 1"))
    assert [crowd.come(command=command) for _ in range(2)] == [IN, REFUSED]
    crowd.go(Client.reset)
    assert eventually(lambda: crowd.come(command=command) == IN)
    crowd.go(Client.reset)


@each_server
def test_limits_of_a_bindreply_rule_refuse_the_peer(gather: Gather, stack: contextlib.ExitStack) -> None:
    config = (
        HEAD
        + CLIENT_PASS
        + rule("socks pass", "from: 0/0 to: 0/0 command: bind")
        + rule("socks pass", ANYBODY, LOG, "command: bindreply", "session.max: 1")
    )
    crowd = gather(config)
    codes = []
    for _ in range(2):
        client = stack.enter_context(Client(crowd.server.addresses[0]))
        bound = client.open5(BIND, "0.0.0.0", 0)
        stack.enter_context(Client((bound.host, bound.port)))
        codes.append(client.read_reply5().code)
    assert codes == [0, 2]
    record = wait_for_record(crowd.server, "block(2): tcp/bindreply ]: ")
    assert record.endswith(": session limit reached (1/1 slot in use)")


def test_limits_count_an_http_client_once_however_many_requests_it_makes(
    gather: Gather, peer: StartPeer
) -> None:
    crowd = gather(socks_rule("session.max: 1", "proxyprotocol: http socks_v5"))
    target = peer("origin")
    client = crowd.stack.enter_context(Client(crowd.server.addresses[0]))
    for _ in range(3):
        client.send(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: origin\r\n\r\n" % target.port)
        answer = b""
        while not answer.endswith(b"origin\n"):
            answer += client.receive(1)
        assert b" 200 " in answer
    assert crowd.come() == REFUSED
    client.close()
    assert eventually(lambda: crowd.come() == IN)


def send_http(client: Client, request: str, end: bytes) -> bytes:
    """Send a request and give the answer up to its end."""
    client.send(f"{request} HTTP/1.1\r\nHost: origin\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(end):
        answer += client.receive(1)
    return answer


def test_limits_of_the_client_rule_hold_again_for_a_request_whose_rule_has_none(
    gather: Gather, peer: StartPeer
) -> None:
    """The first request was taken over by its socks-rule; rates do not count who comes back once more."""
    target = peer("origin")
    config = (
        client_rule("session.max: 1", "session.throttle: 3/1000").replace(SOCKS_PASS, "")
        + rule(
            "socks pass",
            f"from: 0/0 to: 0/0 port = {target.port}",
            LOG,
            "session.max: 9",
            "proxyprotocol: http",
        )
        + rule("socks pass", ANYBODY, LOG, "proxyprotocol: http socks_v5")
    )
    crowd = gather(config)
    get = f"GET http://127.0.0.1:{target.port}/"
    connect = f"CONNECT 127.0.0.1:{crowd.port}"
    first = crowd.stack.enter_context(Client(crowd.server.addresses[0]))
    assert b" 200 " in send_http(first, get, b"origin\n")
    second = crowd.stack.enter_context(Client(crowd.server.addresses[0]))
    assert b" 200 " in send_http(second, get, b"origin\n")
    assert b" 200 " in send_http(first, connect, b"\r\n\r\n")
    assert crowd.come() == CLOSED
    assert b" 403 " in send_http(second, connect, b"\r\n\r\n")
    wait_for_record(crowd.server, "block(2): tcp/connect ]: ", "session limit reached (1/1 slot in use)")
    first.close()
    assert eventually(lambda: crowd.come() == IN)


# ------------------------------ many clients, several workers ------------------------------


def come_together(crowd: Crowd, count: int, source: str = "127.0.0.1") -> list[str]:
    """Let clients come at the same moment."""
    outcomes: list[str] = []
    barrier = threading.Barrier(count)

    def come() -> None:
        barrier.wait()
        outcomes.append(crowd.come(source))

    threads = [threading.Thread(target=come) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@each_count
@pytest.mark.parametrize("make", [client_rule, socks_rule])
def test_limits_are_exact_when_a_hundred_clients_come_at_once(
    gather: Gather, workers: str, make: Callable[..., str]
) -> None:
    crowd = gather(make("session.max: 10"), "-N", workers)
    for _ in range(2):
        outcomes = come_together(crowd, 100)
        assert outcomes.count(IN) == 10
        while crowd.inside:
            crowd.go()
        eventually(lambda: sum("tcp/accept ]" in m for m in crowd.server.messages) % 100 == 0)


@each_count
def test_limits_of_a_source_and_of_rates_are_exact_over_all_workers(gather: Gather, workers: str) -> None:
    items = ("session.throttle: 30/1000", "session.state.key: from", "session.state.max: 5")
    crowd = gather(client_rule(*items), "-N", workers)
    assert come_together(crowd, 40, "127.0.0.2").count(IN) == 5
    assert come_together(crowd, 40, "127.0.0.3").count(IN) == 5
    for n in range(4, 10):
        come_together(crowd, 8, f"127.0.0.{n}")
    assert len(crowd.inside) == 30


def worker_pids(server: Server) -> list[int]:
    """Give the processes that said that they serve."""
    running = [record.pid for record in server.log if record.message.endswith(" running")]
    return [pid for pid in running if read_process(pid)]


def test_limits_forget_what_a_killed_worker_held(gather: Gather) -> None:
    items = ("session.max: 8", "session.state.key: from", "session.state.max: 8")
    crowd = gather(socks_rule(*items), "-N", "4")
    assert come_together(crowd, 12).count(IN) == 8
    holders = [record.pid for record in crowd.server.log if "tcp/connect [" in record.message]
    victims = sorted(worker_pids(crowd.server), key=holders.count, reverse=True)
    for pid in victims[:2]:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(set(worker_pids(crowd.server)) - set(victims)) == 2)
    crowd.server.take_baseline()
    alive = 0
    for client in crowd.inside:
        with contextlib.suppress(AssertionError, ConnectionError):
            alive += client.exchange(b"alive?") == b"alive?"
    assert alive < 8 or len(victims) == 2
    assert [crowd.come() for _ in range(12)].count(IN) == 8 - alive


def test_limits_survive_a_worker_that_is_killed_under_load(gather: Gather) -> None:
    """The lock may have been held by whom SIGKILL met: the others go on, and no count stays behind."""
    crowd = gather(socks_rule("session.max: 3"), "-N", "4")
    stop = threading.Event()

    def hurry() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError, AssertionError), Client(crowd.server.addresses[0]) as client:
                client.open5(CONNECT, "127.0.0.1", crowd.port)

    threads = [threading.Thread(target=hurry) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        victims = worker_pids(crowd.server)
        os.kill(victims[0], signal.SIGKILL)
        eventually(lambda before=victims: set(worker_pids(crowd.server)) - set(before))
    stop.set()
    for thread in threads:
        thread.join()
    crowd.server.take_baseline()
    assert eventually(lambda: crowd.come() == IN)
    assert eventually(lambda: crowd.come() == IN)
    assert eventually(lambda: crowd.come() == IN)
    assert crowd.come() == REFUSED


# ------------------------------ reload ------------------------------


def test_limits_of_a_new_configuration_do_not_count_older_sessions(gather: Gather) -> None:
    config = socks_rule("session.max: 1")
    crowd = gather(config, "-N", "2")
    assert [crowd.come(), crowd.come()] == [IN, REFUSED]
    crowd.server.reload(config.replace("session.max: 1", "session.max: 2"))
    assert [eventually(lambda: crowd.come() == IN), crowd.come(), crowd.come()] == [True, IN, REFUSED]
    assert crowd.inside[0].exchange(b"old") == b"old"
    while crowd.inside:
        crowd.go()
    eventually(lambda: len(worker_pids(crowd.server)) == 2)
    crowd.server.take_baseline()


def test_limits_go_on_over_a_reload_of_the_same_file(gather: Gather) -> None:
    crowd = gather(socks_rule("session.max: 1"), "-N", "2")
    assert crowd.come() == IN
    crowd.server.reload()
    assert [crowd.come(), crowd.come()] == [REFUSED, REFUSED]
    crowd.go()
    assert eventually(lambda: crowd.come() == IN)


# ------------------------------ the shared memory itself ------------------------------


def make_counts(*items: str) -> tuple[program.Counts, program.Rule]:
    text = socks_rule(*items)
    config, complaints = program.parse_config(text, "test.conf", program.SystemSurroundings())
    assert config, complaints
    counts = program.make_counts(config, 4)
    assert counts
    return counts, config.socks_rules[0]


def test_limits_need_no_memory_where_no_rule_has_any(tmp_path: Path) -> None:
    config, _ = program.parse_config(HEAD + CLIENT_PASS + SOCKS_PASS, "x", program.SystemSurroundings())
    assert config and program.make_counts(config, 4) is None


def test_limits_of_sources_are_bounded_and_fail_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "MOST_COUNTED", 64)
    counts, limited = make_counts("session.state.key: from", "session.state.max: 1")
    clients = [program.Endpoint(f"fd00::{n:x}", 1, 6) for n in range(65)]
    places = [counts.take(limited, client) for client in clients[:64]]
    with pytest.raises(program.Refused, match="no room to count the sessions of one more address"):
        counts.take(limited, clients[64])
    with pytest.raises(program.Refused, match="per-key session limit"):
        counts.take(limited, clients[0])
    counts.leave(places[0])
    counts.take(limited, clients[64])


def test_limits_tell_the_families_apart() -> None:
    counts, limited = make_counts("session.state.key: from", "session.state.max: 1")
    counts.take(limited, program.Endpoint("0.0.0.1", 1, 4))
    counts.take(limited, program.Endpoint("::1", 1, 6))
    with pytest.raises(program.Refused):
        counts.take(limited, program.Endpoint("::1", 2, 6))


def test_limits_of_a_rate_are_not_begun_anew_by_who_waits_for_the_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another worker lets the last client in that the rate allows, after this one has come."""
    counts, limited = make_counts("session.throttle: 2/1000")
    counts.take(limited, program.Endpoint("127.0.0.1", 1, 4))

    class Contended(program.SharedLock):
        def __enter__(self) -> None:
            counts.words[0], counts.words[1] = time.monotonic_ns(), 2
            super().__enter__()

    monkeypatch.setattr(counts, "lock", Contended())
    with pytest.raises(program.Refused, match="session rate limit"):
        counts.take(limited, program.Endpoint("127.0.0.1", 2, 4))


@pytest.mark.parametrize("junk", [b"\xff", b"\x7f", b"\x80", b"\x01"])
def test_limits_bear_memory_that_a_hijacked_worker_wrote(junk: bytes) -> None:
    counts, limited = make_counts(
        "session.max: 9", "session.throttle: 9/9", "session.state.key: from", "session.state.max: 9"
    )
    client = program.Endpoint("127.0.0.1", 1, 4)
    place = counts.take(limited, client)
    counts.words.cast("B")[:] = junk * (len(counts.words) * 8)
    with contextlib.suppress(program.Refused):
        counts.leave(counts.take(limited, client))
    counts.leave(place)
    counts.forget(0)


def test_limits_lose_patience_with_a_lock_that_is_held_again_and_again() -> None:
    counts, limited = make_counts("session.max: 99")
    ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        while True:
            with counts.lock:
                os.write(ready[1], b".")
                time.sleep(0.3)
            time.sleep(0.002)
    try:
        for _ in range(8):
            os.read(ready[0], 1)  # it holds the lock
            counts.take(limited, program.Endpoint("127.0.0.1", 1, 4))
        assert counts.lock.patience < program.LOCK_SECONDS / 4
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for descriptor in ready:
            os.close(descriptor)


def test_file_that_is_locked_holds_nothing() -> None:
    counts, _ = make_counts("session.max: 1")
    with pytest.raises(PermissionError):
        os.write(counts.lock.descriptor, b"memory that would outlive the worker")


def test_limits_do_not_wait_for_a_lock_that_is_never_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "LOCK_SECONDS", 0.01)
    counts, limited = make_counts("session.max: 1")
    ready, gone = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        counts.lock.__enter__()
        os.write(ready[1], b".")
        os.read(gone[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        counts.take(limited, program.Endpoint("127.0.0.1", 1, 4))
        with pytest.raises(program.Refused):
            counts.take(limited, program.Endpoint("127.0.0.1", 1, 4))
    finally:
        os.write(gone[1], b".")
        os.waitpid(pid, 0)
        for descriptor in (*ready, *gone):
            os.close(descriptor)
