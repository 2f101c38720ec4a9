"""`bandwidth`: bytes per second that all sessions of a rule share.  Debian's danted lacks the module."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from more_peers import IPV4_HEAD, measure_idleness, rule, wait_for_line, wait_for_record, wait_for_workers
from peers import Seen, TcpPeer
from servers import Server, eventually, read_process

import sockd as program

StartPeer = Callable[..., Any]

ANYBODY = "from: 0/0 to: 0/0"
LOG = "log: connect disconnect error"
CLIENT_PASS = rule("client pass", ANYBODY, LOG)
SOCKS_PASS = rule("socks pass", ANYBODY, LOG)
PIECE = bytes(65536)
# What a rule may give beyond its rate: what it has not given in the last tenth of a second, and a turn
# that was under way.
SLACK_SECONDS = 0.25


def limited(rate: int, *items: str) -> str:
    return IPV4_HEAD + CLIENT_PASS + rule("socks pass", ANYBODY, LOG, f"bandwidth: {rate}", *items)


class Traffic:
    """Sessions through a server that move as much as they can, and how much each has moved.

    Each has a client who counts what it gets, and a target that does.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.moved: dict[tuple[str, int], int] = {}
        self.stopped = threading.Event()
        self.threads: list[threading.Thread] = []
        self.clients: list[Client] = []
        self.target = TcpPeer(self._serve)
        self.directions: dict[int, str] = {}
        self.began = time.monotonic()

    def _serve(self, connection: socket.socket, seen: Seen) -> None:
        number, direction = connection.recv(1)[0], ""
        connection.sendall(b"!")
        direction = self.directions[number]
        if direction == "down":
            self._fill(connection)
        else:
            self._count(connection, ("up", number))

    def _fill(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self.stopped.is_set():
                connection.sendall(PIECE)

    def _count(self, connection: socket.socket, key: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(65536):
                if not self.stopped.is_set():
                    self.moved[key] = self.moved.get(key, 0) + len(data)

    def add(self, direction: str) -> None:
        """Open one more session that moves bytes "up" to the target, or "down" from it."""
        number = len(self.clients)
        client = Client(self.server.addresses[0])
        self.clients.append(client)
        self.directions[number] = direction
        assert client.open5(CONNECT, *self.target.address).code == 0
        assert client.exchange(bytes([number])) == b"!"
        work = (self._count, (client.sock, ("down", number))) if direction == "down" else None
        function, arguments = work or (self._fill, (client.sock,))
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def measure(self, seconds: float) -> tuple[int, float]:
        """Let it run, and give how many bytes were moved, and in which time, from the start on."""
        time.sleep(seconds)
        self.stopped.set()
        return sum(self.moved.values()), time.monotonic() - self.began

    def close(self) -> None:
        self.stopped.set()
        for client in self.clients:
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_RDWR)
        self.target.close()
        for thread in self.threads:
            thread.join()
        for client in self.clients:
            client.close()


@pytest.fixture
def traffic(sockd: Factory) -> Iterator[Callable[..., Traffic]]:
    """`traffic(config, *options)` starts a server and gives what runs through it."""
    started: list[Traffic] = []

    def start(config: str, *options: str) -> Traffic:
        server = sockd(config, *options)
        if options:
            wait_for_workers(server, int(options[1]))
        started.append(Traffic(server))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.mark.parametrize("workers", ["1", "4"])
@pytest.mark.parametrize(
    ("rate", "directions"),
    [
        (300_000, ["down"]),
        (300_000, ["up", "down"] * 4),
        (40_000_000, ["up", "down"]),
    ],
    ids=["slow", "shared", "fast"],
)
def test_bandwidth_is_shared_by_all_sessions_in_both_directions(
    traffic: Callable[..., Traffic], workers: str, rate: int, directions: list[str]
) -> None:
    running = traffic(limited(rate), "-N", workers)
    for direction in directions:
        running.add(direction)
    time.sleep(1.2)
    # The kernel may hold the last of it, and this machine may have had other things to do: a stall is made
    # up for by and by.
    eventually(lambda: sum(running.moved.values()) >= rate * (time.monotonic() - running.began) * 0.5)
    moved, seconds = running.measure(0)
    assert moved <= rate * (seconds + SLACK_SECONDS)


def test_bandwidth_is_the_same_for_each_session(traffic: Callable[..., Traffic]) -> None:
    running = traffic(limited(400_000), "-N", "4")
    for direction in ["up", "down"] * 3:
        running.add(direction)
    running.moved.clear()  # those who came first were alone for a while
    running.measure(2.0)
    shares = list(running.moved.values())
    assert len(shares) == 6
    assert max(shares) < 3 * min(shares)


def test_bandwidth_is_fair_between_the_directions_of_one_session(sockd: Factory) -> None:
    """Both send without a pause, and neither may starve the other."""
    server = sockd(limited(400_000))
    stop = threading.Event()
    counts = {"up": 0, "down": 0}

    def both(connection: socket.socket, way: str) -> list[threading.Thread]:
        def fill() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    connection.sendall(PIECE)

        def count() -> None:
            with contextlib.suppress(OSError):
                while data := connection.recv(65536):
                    counts[way] += len(data)

        threads = [threading.Thread(target=work, daemon=True) for work in (fill, count)]
        for thread in threads:
            thread.start()
        return threads

    with socket.create_server(("127.0.0.1", 0)) as listener, Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *listener.getsockname()).code == 0
        target, _ = listener.accept()
        with target:
            threads = both(client.sock, "down") + both(target, "up")
            eventually(lambda: sum(counts.values()) > 600_000)
            stop.set()
            for one in (client.sock, target):
                one.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
    assert max(counts.values()) < 3 * min(counts.values())


def test_bandwidth_delays_but_loses_nothing(sockd: Factory, peer: StartPeer) -> None:
    """Half-closed from the client, the rest still comes, and the end is passed on behind it."""
    target = peer("discard")
    server = sockd(limited(2_000_000))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target.address).code == 0
        client.send(bytes(700_000))
        client.finish_sending()
        client.expect_end()
        line = wait_for_line(server, client.address, "tcp/connect ]: ", "-> 700000, 700000 ->")
    assert len(target.seen[0].data) == 700_000
    assert line.endswith("s")


def test_bandwidth_of_a_side_that_is_closed_both_ways_is_kept_without_spinning(
    sockd: Factory, peer: StartPeer
) -> None:
    """What poll(2) then reports without a pause must not become work without a pause."""
    server = sockd(limited(40_000))
    with socket.create_server(("127.0.0.1", 0)) as listener, Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *listener.getsockname()).code == 0
        client.finish_sending()
        target, _ = listener.accept()
        with target:
            assert target.recv(1) == b""
            began = time.monotonic()
            target.sendall(bytes(100_000))
        client.receive(4000)
        assert measure_idleness(server) < 0.3
        assert len(client.receive_all()) == 96_000
        assert time.monotonic() - began > 1.5


def test_bandwidth_does_not_delay_the_end_of_a_session(sockd: Factory) -> None:
    """A session whose turn is far away notices at once that its target is gone."""
    server = sockd(limited(10))
    with socket.create_server(("127.0.0.1", 0)) as listener, Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *listener.getsockname()).code == 0
        target, _ = listener.accept()
        client.send(bytes(1000))
        assert target.recv(1) == b"\0"
        target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        target.close()
        with pytest.raises(ConnectionResetError):
            client.receive_all()


def test_bandwidth_does_not_delay_the_end_of_the_server(sockd: Factory, peer: StartPeer) -> None:
    server = sockd(limited(10))
    target = peer("discard")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target.address).code == 0
        client.send(bytes(10_000))
        eventually(lambda: target.seen and target.seen[0].data)
        assert server.stop() == 0
    assert any("administrative termination" in message for message in server.messages)


def test_bandwidth_that_is_waited_for_is_no_idleness(sockd: Factory, peer: StartPeer) -> None:
    target = peer("discard")
    server = sockd(limited(4, "timeout.io: 1"))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target.address).code == 0
        client.send(bytes(12))
        eventually(lambda: target.seen and len(target.seen[0].data) == 12)
    assert not any("timeout" in message for message in server.messages)


@pytest.mark.parametrize("own", ["", "bandwidth: 100000000"], ids=["inherited", "own"])
def test_bandwidth_of_a_client_rule_is_inherited_unless_the_socks_rule_has_its_own(
    traffic: Callable[..., Traffic], own: str
) -> None:
    config = (
        IPV4_HEAD
        + rule("client pass", ANYBODY, "bandwidth: 200000")
        + rule("socks pass", ANYBODY, *filter(None, [own]))
    )
    running = traffic(config)
    running.add("down")
    moved, seconds = running.measure(1.0)
    assert (moved < 200_000 * (seconds + SLACK_SECONDS)) == (not own)


def test_bandwidth_of_bind_is_that_of_the_reply(sockd: Factory) -> None:
    config = (
        IPV4_HEAD
        + CLIENT_PASS
        + rule("socks pass", ANYBODY, "command: bind")
        + rule("socks pass", ANYBODY, "command: bindreply", "bandwidth: 50000")
    )
    server = sockd(config)
    with Client(server.addresses[0]) as client:
        bound = client.open5(BIND, "0.0.0.0", 0)
        with Client((bound.host, bound.port)) as visitor:
            assert client.read_reply5().code == 0
            began = time.monotonic()
            visitor.send(bytes(50_000))
            client.receive(50_000)
            assert time.monotonic() - began > 0.5


def test_bandwidth_holds_for_datagrams_both_ways(sockd: Factory, peer: StartPeer) -> None:
    target = peer("udp-echo")
    server = sockd(limited(100_000))
    with Client(server.addresses[0]) as control, UdpClient() as udp:
        reply = control.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        relay = (reply.host, reply.port)
        began = time.monotonic()
        for _ in range(40):
            udp.send(relay, *target.address, bytes(1000))
        for _ in range(40):
            assert len(udp.receive(relay).data) == 1000
        # 80,000 bytes, of which 10,000 may be had at once.
        assert time.monotonic() - began > 0.5
        control.reset()
    wait_for_record(server, "udp/udpassociate ]: ", "40000/40 -> ")


def test_bandwidth_that_datagrams_wait_for_does_not_delay_the_end(sockd: Factory, peer: StartPeer) -> None:
    server = sockd(limited(10))
    target = peer("udp-sink")
    with Client(server.addresses[0]) as control, UdpClient() as udp:
        reply = control.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        for _ in range(3):
            udp.send((reply.host, reply.port), *target.address, bytes(1000))
        eventually(lambda: target.seen)
        control.reset()
        wait_for_record(server, "udp/udpassociate ]: ")


def test_bandwidth_goes_on_when_a_worker_is_killed(traffic: Callable[..., Traffic]) -> None:
    rate = 300_000
    running = traffic(limited(rate), "-N", "4")
    server = running.server
    for _ in range(4):
        running.add("down")
    pids = [record.pid for record in server.log if record.message.endswith(" running")]
    victims = {r.pid for r in server.log if "tcp/connect [" in r.message}
    eventually(lambda: len(running.moved) == 4)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    eventually(
        lambda: len([m for m in server.messages if m.endswith(" running")]) >= len(pids) + len(victims)
    )
    eventually(lambda: not any(read_process(pid) for pid in victims))
    server.take_baseline()
    before = sum(running.moved.values())
    began = time.monotonic()
    running.add("down")
    eventually(lambda: sum(running.moved.values()) - before > rate)
    assert time.monotonic() - began > 0.7


# ------------------------------ the queue itself ------------------------------


def make_budgets(rate: int, count: int) -> list[program.Budget]:
    config, complaints = program.parse_config(limited(rate), "test.conf", program.SystemSurroundings())
    assert config, complaints
    counts = program.make_counts(config, 1)
    assert counts
    return [program.Budget(counts, config.socks_rules[0]) for _ in range(count)]


def test_bandwidth_is_within_5_percent_over_10_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of the test's own, and sessions that come back late by up to 30 ms."""
    now = [1_000.0]
    monkeypatch.setattr(program.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(program.time, "monotonic_ns", lambda: int(now[0] * 1e9))
    rate = 1_000_000
    budgets = make_budgets(rate, 7)
    wakes = dict.fromkeys(range(7), now[0])
    moved = dict.fromkeys(range(7), 0)
    while now[0] < 1_010.0:
        number = min(wakes, key=lambda n: wakes[n])
        now[0] = max(now[0], wakes[number])
        granted = budgets[number].grant(65536, budgets[number].turn)
        moved[number] += granted
        wakes[number] = now[0] + 0.0001 if granted else budgets[number].ready_at + 0.004 * number
    assert abs(sum(moved.values()) / rate - 10) < 0.5
    assert max(moved.values()) < 1.1 * min(moved.values())


def test_bandwidth_that_is_given_back_is_in_the_queue_no_more() -> None:
    first, second = make_budgets(1000, 2)
    assert first.grant(300, 300) == 300
    before = first.counts.words[first.word]
    assert second.grant(500, 500) == 0
    assert first.counts.words[first.word] == before + 500_000_000
    second.close()
    assert first.counts.words[first.word] == before


@pytest.mark.parametrize("junk", [2**64 - 1, 2**63, 1 << 62, 1])
def test_bandwidth_bears_memory_that_a_hijacked_worker_wrote(junk: int) -> None:
    (budget,) = make_budgets(1000, 1)
    budget.counts.words[budget.word] = junk
    assert budget.grant(10, 10) == 10
    budget.counts.words[budget.word] = junk
    budget.give_back(-10)


def test_bandwidth_costs_nothing_where_no_rule_has_one() -> None:
    config, _ = program.parse_config(IPV4_HEAD + CLIENT_PASS + SOCKS_PASS, "x", program.SystemSurroundings())
    assert config and program.make_counts(config, 1) is None
