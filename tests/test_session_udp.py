"""UDP ASSOCIATE with the real program: who may send, where to, who may answer, and when it ends."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from client import CONNECT, REJECTED, UDP_ASSOCIATE, Address, Client, Datagram, UdpClient, bytewise, wrap
from more_peers import (
    CLIENT_PASS,
    HEAD,
    IPV4_HEAD,
    SOCKS_PASS,
    NameServer,
    lines_about,
    rule,
    wait_for_line,
    wait_for_record,
    world_that_asks,
)
from peers import Peer
from servers import Server, Sockd, World, eventually

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

BLOCKED_TARGET, BLOCKED_SENDER = "127.0.0.66", "127.0.0.6"
UDP_RULES = (
    rule("socks block", f"from: 0/0 to: {BLOCKED_TARGET}/32", "command: udpassociate", "log: connect")
    + rule("socks block", "from: 0/0 to: .two.test", "command: udpassociate", "log: connect")
    + rule("socks block", f"from: {BLOCKED_SENDER}/32 to: 0/0", "command: udpreply", "log: connect")
    + SOCKS_PASS
)


@pytest.fixture(scope="module")
def running(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that need nothing special."""
    server = Sockd(HEAD + CLIENT_PASS + UDP_RULES, tmp_path_factory.mktemp("shared"), world=private_world)
    yield server
    server.close()


@pytest.fixture(scope="module")
def running_open(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with `udp.connectdst: no`."""
    config = HEAD + "udp.connectdst: no\n" + CLIENT_PASS + UDP_RULES
    server = Sockd(config, tmp_path_factory.mktemp("open"), world=private_world)
    yield server
    server.close()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The shared server, which must give back after the test all that it took."""
    yield running
    running.check_resources()


@pytest.fixture
def open_server(running_open: Server) -> Iterator[Server]:
    """The shared server with `udp.connectdst: no`, which must give back what it took."""
    yield running_open
    running_open.check_resources()


@dataclass
class Association:
    """A client's two ends of a UDP association, and the relay between."""

    client: Client
    udp: UdpClient
    relay: Address

    def send(self, host: str | bytes, port: int, data: bytes) -> None:
        """Send data to a target."""
        self.udp.send(self.relay, host, port, data)

    def exchange(self, peer: Peer, data: bytes, host: str | bytes | None = None) -> Datagram:
        """Send data to a peer that answers, and check that the answer is its."""
        self.send(peer.address[0] if host is None else host, peer.port, data)
        answer = self.udp.receive(self.relay)
        assert answer == (*peer.address, data)
        return answer


@contextlib.contextmanager
def associate(
    server: Server,
    host: str | bytes = "0.0.0.0",
    port: int = 0,
    listener: int = 0,
    udp: UdpClient | None = None,
) -> Iterator[Association]:
    """Open an association; it ends with a reset, as a FIN would leave it time for more datagrams."""
    address = server.addresses[listener]
    with Client(address) as client, udp or UdpClient((address[0], 0)) as own:
        reply = client.open5(UDP_ASSOCIATE, host, port)
        assert reply.code == 0
        yield Association(client, own, (reply.host, reply.port))
        if client.sock.fileno() >= 0:
            client.reset()


# ------------------------------ addresses ------------------------------

TARGETS = {
    "ipv4": ("127.0.0.1", "127.0.0.1"),
    "ipv6": ("::1", "::1"),
    "mapped": ("::ffff:127.0.0.1", "127.0.0.1"),
    "name": ("echo.test", "127.0.0.1"),
    "name-of-ipv6": ("six.test", "fd00::6"),
    "ipv4-as-name": (b"127.0.0.1", "127.0.0.1"),
    "number-as-name": (b"2130706433", "127.0.0.1"),
    "ipv6-as-name": (b"::1", "::1"),
}


@pytest.mark.parametrize(("spelled", "at"), TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("listener", [0, 1], ids=["ipv4-client", "ipv6-client"])
def test_datagram_goes_to_every_form_of_target_and_the_answer_names_the_sender(
    server: Server, peer: StartPeer, spelled: str | bytes, at: str, listener: int
) -> None:
    target = peer("udp-echo", at)
    with associate(server, listener=listener) as association:
        association.exchange(target, b"ping", spelled)
        assert target.seen[0][0] == b"ping"


@pytest.mark.parametrize("listener", [0, 1], ids=["ipv4-client", "ipv6-client"])
@pytest.mark.parametrize("dst", ["0.0.0.0", "::"])
def test_relay_is_on_the_address_that_the_client_came_to(
    server: Server, peer: StartPeer, listener: int, dst: str
) -> None:
    target = peer("udp-echo")
    with associate(server, dst, listener=listener) as association:
        assert association.relay[0] == server.addresses[listener][0]
        association.exchange(target, b"ping")


def test_handshake_may_come_bytewise(server: Server, peer: StartPeer) -> None:
    target = peer("udp-echo")
    with Client(server.addresses[0], bytewise) as client, UdpClient() as udp:
        reply = client.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        Association(client, udp, (reply.host, reply.port)).exchange(target, b"ping")
        client.reset()


def test_associations_have_relays_of_their_own(server: Server, peer: StartPeer) -> None:
    target = peer("udp-echo")
    with associate(server) as first, associate(server) as second:
        assert first.relay != second.relay
        first.exchange(target, b"first")
        second.exchange(target, b"second")
        assert len({remote for _, remote in target.seen}) == 2


def test_both_families_are_served_in_one_association(server: Server, peer: StartPeer) -> None:
    four, six = peer("udp-echo"), peer("udp-echo", "::1")
    with associate(server) as association:
        address = association.client.address
        for _ in range(2):
            association.exchange(four, b"four")
            association.exchange(six, b"sixth")
    line = wait_for_line(server, address, "tcp/accept ]:")
    to_client = 2 * (10 + 4) + 2 * (22 + 5)
    assert f": {to_client} -> 127.0.0.1.{address[1]} 127.0.0.1.{server.port} -> 18: " in line
    ends = [
        m
        for m in server.messages
        if "udp/udpassociate ]:" in m and f" 127.0.0.1.{association.relay[1]} " in m
    ]
    assert len(ends) == 2
    assert (
        sum("-> 28/2, 8/2 -> 127.0.0.1." in m and f" 127.0.0.1.{four.port} -> 8/2: " in m for m in ends) == 1
    )
    assert sum("-> 54/2, 10/2 -> ::1." in m and f" ::1.{six.port} -> 10/2: " in m for m in ends) == 1


def test_every_datagram_is_counted_with_its_header_on_the_client_side(
    server: Server, peer: StartPeer
) -> None:
    echo, sink = peer("udp-echo"), peer("udp-sink")
    with associate(server) as association:
        address, udp_port, relay_port = (
            association.client.address,
            association.udp.address[1],
            association.relay[1],
        )
        association.send(*sink.address, b"lost")
        association.exchange(echo, b"12345")
        association.exchange(echo, b"")
    line = wait_for_record(server, "udp/udpassociate ]:", f" 127.0.0.1.{relay_port} ")
    assert f": 25/2 -> 127.0.0.1.{udp_port} 127.0.0.1.{relay_port} -> 39/3, 9/3 -> 127.0.0.1." in line
    assert re.search(
        r" 0\.0\.0\.0\.0 -> 5/2: local client error \(Connection reset by peer\)\.  Session duration: ", line
    )
    assert f": 25 -> 127.0.0.1.{address[1]} " in wait_for_line(server, address, "tcp/accept ]:")


def test_association_that_was_never_used_is_logged(server: Server) -> None:
    with associate(server) as association:
        relay = association.relay
        start = wait_for_record(server, "udp/udpassociate [:", f" 127.0.0.1.{relay[1]}")
        assert start.endswith(f"udp/udpassociate [: 0.0.0.0.0 127.0.0.1.{relay[1]}")
    line = wait_for_record(server, "udp/udpassociate ]:", f" 127.0.0.1.{relay[1]} ")
    assert f": 0/0 -> 0.0.0.0.0 127.0.0.1.{relay[1]} -> 0/0: local client error" in line


def test_socks4_has_no_udp(server: Server) -> None:
    with Client(server.addresses[0]) as client:
        assert client.request4(UDP_ASSOCIATE, "127.0.0.1", 53).code == REJECTED
        client.expect_end_or_reset()


def test_target_of_a_family_without_external_is_dropped_alone(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    server = sockd(IPV4_HEAD + CLIENT_PASS + SOCKS_PASS, world=private_world)
    six, four = peer("udp-echo", "::1"), peer("udp-echo")
    with associate(server) as association:
        association.send("::1", six.port, b"no way")
        association.exchange(four, b"ping")
        wait_for_record(server, "udp/udpassociate -:", "no IPv6 address configured")
    assert not six.seen


# ------------------------------ who may send ------------------------------


def test_only_the_host_of_the_tcp_client_may_use_the_relay(server: Server, peer: StartPeer) -> None:
    target = peer("udp-echo")
    with associate(server) as association, UdpClient(("127.0.0.2", 0)) as stranger:
        stranger.send(association.relay, "127.0.0.1", target.port, b"mine now")
        association.exchange(target, b"ping")
        stranger.send(association.relay, "127.0.0.1", target.port, b"mine now")
        association.exchange(target, b"pong")
        name = f"127.0.0.2.{stranger.address[1]}"
        wait_for_record(
            server, "udp/udpassociate -:", "expected udp packet from clientaddress", f"got it from {name}"
        )
    assert [data for data, _ in target.seen] == [b"ping", b"pong"]


def test_first_datagram_fixes_the_port_of_the_client(server: Server, peer: StartPeer) -> None:
    target = peer("udp-echo")
    with associate(server) as association, UdpClient() as other:
        association.exchange(target, b"ping")
        other.send(association.relay, *target.address, b"from another port")
        association.exchange(target, b"pong")
    assert [data for data, _ in target.seen] == [b"ping", b"pong"]


@pytest.mark.parametrize("dst", ["0.0.0.0", "127.0.0.1", b"127.0.0.1"])
def test_port_in_the_request_is_the_only_one_that_may_send(
    server: Server, peer: StartPeer, dst: str | bytes
) -> None:
    target, udp = peer("udp-echo"), UdpClient()
    with associate(server, dst, udp.address[1], udp=udp) as association, UdpClient() as other:
        other.send(association.relay, *target.address, b"from another port")
        association.exchange(target, b"ping")
    assert [data for data, _ in target.seen] == [b"ping"]


@pytest.mark.parametrize("port", [0, 53])
@pytest.mark.parametrize(
    "dst", [b"0.0.0.0", b"0", b"", b"nobody.test", b"\xff\n", b"n" * 255, "198.51.100.1", "fd00::1"]
)
def test_odd_address_in_the_request_is_neither_resolved_nor_held_against_the_client(
    server: Server, peer: StartPeer, dst: str | bytes, port: int
) -> None:
    target = peer("udp-echo")
    with associate(server, dst, port if dst not in (b"0.0.0.0", b"0", b"") else 0) as association:
        association.exchange(target, b"ping")
        wait_for_record(server, "udp/udpassociate [:", f" 127.0.0.1.{association.relay[1]}")


@pytest.mark.parametrize(
    ("dst", "blocked"),
    [
        ("::1", True),
        (b"::1", True),
        (b"0:0:0:0:0:0:0:1", True),
        ("127.0.0.1", True),
        (b"127.0.0.1", True),
        ("::", False),
        (b"", False),
        ("fd00::1", False),
    ],
)
def test_request_is_judged_by_the_port_beside_the_clients_own_address(
    sockd: Any, private_world: World, dst: str | bytes, blocked: bool
) -> None:
    ports = "".join(
        rule("socks block", f"from: {own} port = 7777 to: 0/0") for own in ("::1/128", "127.0.0.1/32")
    )
    server = sockd(HEAD + CLIENT_PASS + ports + SOCKS_PASS, world=private_world)
    address = server.addresses[0 if "." in str(dst) else 1]
    with Client(address) as client, Client(address) as other:
        assert client.open5(UDP_ASSOCIATE, dst, 7777).code == (2 if blocked else 0)
        assert other.open5(UDP_ASSOCIATE, dst, 7776).code == 0


def test_name_in_the_request_is_never_looked_up(
    private_world: World, tmp_path: Any, sockd: Any, peer: StartPeer
) -> None:
    with contextlib.closing(NameServer({"slow.test": None})) as names:
        server = sockd(HEAD + CLIENT_PASS + SOCKS_PASS, world=world_that_asks(names, private_world, tmp_path))
        target = peer("udp-echo")
        with associate(server, "slow.test", 53) as association:
            association.exchange(target, b"ping")
        assert not names.asked


# ------------------------------ headers ------------------------------

BAD_DATAGRAMS = {
    "empty": b"",
    "one-byte": b"\0",
    "no-type": b"\0\0\0",
    "only-type": b"\0\0\0\1",
    "short-ipv4": b"\0\0\0\1\x7f\0\0\1\0",
    "short-ipv6": b"\0\0\0\4" + bytes(17),
    "name-without-length": b"\0\0\0\3",
    "name-longer-than-datagram": b"\0\0\0\3\xffecho.test\0\x35",
    "name-without-port": b"\0\0\0\3\4echo",
    "type-0": b"\0\0\0\0\x7f\0\0\1\0\x35data",
    "type-2": b"\0\0\0\2\x7f\0\0\1\0\x35data",
    "type-5": b"\0\0\0\5\x7f\0\0\1\0\x35data",
    "type-255": b"\0\0\0\xff\x7f\0\0\1\0\x35data",
    "fragment-1": wrap("127.0.0.1", 9, b"data", 1),
    "fragment-127": wrap("127.0.0.1", 9, b"data", 127),
    "fragment-128": wrap("127.0.0.1", 9, b"data", 128),
    "fragment-255": wrap("127.0.0.1", 9, b"data", 255),
    "port-0": wrap("127.0.0.1", 0, b"data"),
    "port-0-name": wrap("echo.test", 0, b"data"),
    "port-0-ipv6": wrap("::1", 0, b"data"),
    "any-address": wrap("0.0.0.0", 9, b"data"),
    "any-address-ipv6": wrap("::", 9, b"data"),
    "empty-name": wrap(b"", 9, b"data"),
    "unknown-name": wrap(b"nowhere.test", 9, b"data"),
    "name-with-nul": wrap(b"echo.test\0", 9, b"data"),
    "name-with-newline": wrap(b"echo.test\nforged", 9, b"data"),
    "long-label": wrap(b"l" * 64, 9, b"data"),
    "not-utf8": wrap(b"\xff\xfe", 9, b"data"),
    "network-unreachable": wrap("203.0.113.1", 9, b"data"),
    "host-unreachable": wrap("198.51.100.1", 9, b"data"),
    "prohibited": wrap("198.51.100.2", 9, b"data"),
    "broadcast": wrap("255.255.255.255", 9, b"data"),
}


@pytest.mark.parametrize("bad", BAD_DATAGRAMS.values(), ids=BAD_DATAGRAMS)
@pytest.mark.parametrize("when", ["first", "later"])
def test_bad_datagram_is_dropped_and_hurts_no_other(
    server: Server, peer: StartPeer, bad: bytes, when: str
) -> None:
    target = peer("udp-echo")
    with associate(server) as association:
        if when == "later":
            association.exchange(target, b"before")
        association.udp.send_raw(association.relay, bad)
        association.exchange(target, b"ping")
        association.exchange(target, b"pong")
        line = wait_for_record(
            server, "block(", f" 127.0.0.1.{association.relay[1]} -> ", "udp/udpassociate -:"
        )
        assert line.isprintable()


def test_reserved_bytes_of_the_header_are_not_checked(server: Server, peer: StartPeer) -> None:
    target = peer("udp-echo")
    with associate(server) as association:
        association.udp.send_raw(association.relay, wrap(*target.address, b"ping", reserved=b"\x12\x34"))
        assert association.udp.receive(association.relay).data == b"ping"


@pytest.mark.parametrize("size", [0, 1, 1472, 9000, 65_000, 65_507 - 10])
def test_payload_of_any_size_goes_there_and_back(server: Server, peer: StartPeer, size: int) -> None:
    target = peer("udp-echo")
    with associate(server) as association:
        association.exchange(target, b"x" * size)
        assert [len(data) for data, _ in target.seen] == [size]


def test_answer_too_large_for_its_header_is_dropped_alone(server: Server, peer: StartPeer) -> None:
    target = peer("udp-echo")
    with associate(server) as association:
        association.exchange(target, b"ping")
        external = target.seen[0][1]
        target.send(b"x" * 65_507, external)
        association.exchange(target, b"pong")


def test_port_that_nobody_listens_on_ends_nothing(server: Server, peer: StartPeer) -> None:
    target, closed = peer("udp-echo"), peer("udp-sink")
    closed.close()
    with associate(server) as association:
        for _ in range(3):
            association.send(*closed.address, b"anybody there?")
            association.exchange(target, b"ping")


# ------------------------------ rules ------------------------------


def test_each_datagram_is_judged_by_its_target(server: Server, peer: StartPeer) -> None:
    blocked, named, target = peer("udp-echo", BLOCKED_TARGET), peer("udp-echo", "127.0.0.2"), peer("udp-echo")
    with associate(server) as association:
        for _ in range(2):
            association.send(BLOCKED_TARGET, blocked.port, b"no")
            association.send(b"127.0.0.66", blocked.port, b"no")
            association.send(b"0x7f000042", blocked.port, b"no")
            association.send("::ffff:127.0.0.66", blocked.port, b"no")
            association.send("two.test", named.port, b"no")
            association.exchange(target, b"yes")
        wait_for_record(server, "block(1): udp/udpassociate -:", f" {BLOCKED_TARGET}.{blocked.port}")
        wait_for_record(server, "block(2): udp/udpassociate -:", f" 127.0.0.2.{named.port}")
    assert not blocked.seen
    assert not named.seen


@pytest.mark.parametrize("blocked_comes_first", [True, False])
def test_each_sender_of_an_answer_is_judged(
    open_server: Server, peer: StartPeer, blocked_comes_first: bool
) -> None:
    target, blocked, other = peer("udp-echo"), peer("udp-sink", BLOCKED_SENDER), peer("udp-sink", "127.0.0.7")
    with associate(open_server) as association:
        if blocked_comes_first:
            association.send(*blocked.address, b"hello")
            external = eventually(lambda: blocked.seen and blocked.seen[0][1])
        else:
            association.exchange(target, b"ping")
            external = target.seen[0][1]
        for _ in range(2):
            blocked.send(b"forged", external)
            other.send(b"fine", external)
            assert association.udp.receive(association.relay) == (*other.address, b"fine")
        association.exchange(target, b"pong")
        wait_for_record(open_server, "block(3): udp/udpreply -:", f" {BLOCKED_SENDER}.{blocked.port} ")


def test_answers_need_a_rule_of_their_own(sockd: Any, private_world: World, peer: StartPeer) -> None:
    only = rule("socks pass", "from: 0/0 to: 0/0", "command: udpassociate", "log: connect disconnect")
    server = sockd(HEAD + CLIENT_PASS + only, world=private_world)
    target = peer("udp-echo")
    with associate(server) as association:
        relay = association.relay
        association.send(*target.address, b"ping")
        eventually(lambda: target.seen)
        association.send(*target.address, b"pong")
        eventually(lambda: len(target.seen) == 2)
        wait_for_record(server, "block(0): udp/udpreply -:", f" 127.0.0.1.{target.port} ")
    assert ": 0/0 -> " in wait_for_record(server, "udp/udpassociate ]:", f" 127.0.0.1.{relay[1]} ")


def test_with_connectdst_an_answer_comes_from_the_only_target(server: Server, peer: StartPeer) -> None:
    target, forger, sibling = peer("udp-echo"), peer("udp-sink", "127.0.0.7"), peer("udp-sink")
    with associate(server) as association:
        association.exchange(target, b"ping")
        external = target.seen[0][1]
        forger.send(b"forged", external)
        sibling.send(b"another port", external)
        association.exchange(target, b"pong")


def test_with_connectdst_any_target_may_answer_once_there_are_two(server: Server, peer: StartPeer) -> None:
    first, second = peer("udp-echo"), peer("udp-sink")
    with associate(server) as association:
        association.exchange(first, b"ping")
        association.send(*second.address, b"hello")
        second.send(b"unasked", eventually(lambda: second.seen and second.seen[0][1]))
        assert association.udp.receive(association.relay) == (*second.address, b"unasked")
        association.exchange(first, b"pong")


def test_without_connectdst_anybody_may_answer(open_server: Server, peer: StartPeer) -> None:
    target, other = peer("udp-echo"), peer("udp-sink", "127.0.0.7")
    with associate(open_server) as association:
        association.exchange(target, b"ping")
        other.send(b"unasked", target.seen[0][1])
        assert association.udp.receive(association.relay) == (*other.address, b"unasked")


def test_command_that_no_rule_passes_is_refused(sockd: Any, private_world: World) -> None:
    server = sockd(
        HEAD + CLIENT_PASS + rule("socks pass", "from: 0/0 to: 0/0", "command: connect"), world=private_world
    )
    with Client(server.addresses[0]) as client:
        reply = client.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        assert reply.code == 2
        client.expect_end()


def test_port_range_is_kept_and_its_exhaustion_refused(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    limited = rule(
        "socks pass", "from: 0/0 to: 0/0", "udp.portrange: 20000-20001", "log: connect disconnect error"
    )
    server = sockd(HEAD + CLIENT_PASS + limited, world=private_world)
    target = peer("udp-echo")
    with associate(server) as first:
        with associate(server) as second:
            assert {first.relay[1], second.relay[1]} == {20000, 20001}
            second.exchange(target, b"ping")
            with Client(server.addresses[0]) as client:
                assert client.open5(UDP_ASSOCIATE, "0.0.0.0", 0).code == 1
                client.expect_end()
                wait_for_line(server, client.address, "no free ports in range to bind")
            freed, gone = second.relay, second.client.address
        wait_for_line(server, gone, "tcp/accept ]:")
        with associate(server) as third:
            assert third.relay == freed
            third.exchange(target, b"ping")


# ------------------------------ names ------------------------------


def test_slow_name_delays_nobody_else(
    private_world: World, tmp_path: Any, sockd: Any, peer: StartPeer
) -> None:
    with contextlib.closing(NameServer({"slow.test": None, "good.test": [["127.0.0.1"]]})) as names:
        server = sockd(HEAD + CLIENT_PASS + SOCKS_PASS, world=world_that_asks(names, private_world, tmp_path))
        target, tcp_target = peer("udp-echo"), peer("echo")
        with associate(server) as slow, associate(server) as quick, Client(server.addresses[0]) as client:
            slow.send("slow.test", target.port, b"to nowhere")
            eventually(lambda: names.asked["slow.test"])
            quick.exchange(target, b"ping")
            quick.exchange(target, b"by name", "good.test")
            assert client.open5(CONNECT, "good.test", tcp_target.port).code == 0
            assert client.exchange(b"tcp") == b"tcp"
            assert not any("could not resolve target address slow.test" in m for m in server.messages)
            slow.exchange(target, b"after all")
            wait_for_record(server, "udp/udpassociate -:", "could not resolve target address slow.test")


def test_name_that_rebinds_stays_with_the_address_that_was_judged(
    private_world: World, tmp_path: Any, sockd: Any, peer: StartPeer
) -> None:
    block = rule("socks block", "from: 0/0 to: 127.0.0.2/32", "log: connect")
    with contextlib.closing(NameServer({"rebind.test": [["127.0.0.1"], ["127.0.0.2"]]})) as names:
        server = sockd(
            HEAD + CLIENT_PASS + block + SOCKS_PASS, world=world_that_asks(names, private_world, tmp_path)
        )
        target = peer("udp-echo", "0.0.0.0")
        with associate(server) as association:
            for _ in range(3):
                association.send("rebind.test", target.port, b"ping")
                assert association.udp.receive(association.relay) == ("127.0.0.1", target.port, b"ping")
        with associate(server) as association:
            association.send("rebind.test", target.port, b"secret")
            association.send("127.0.0.1", target.port, b"done")
            assert association.udp.receive(association.relay).data == b"done"
    assert b"secret" not in [data for data, _ in target.seen]


# ------------------------------ the end ------------------------------


def test_association_lives_on_half_closed_while_datagrams_flow_and_ends_after(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    server = sockd(HEAD + CLIENT_PASS + SOCKS_PASS, world=private_world)
    target = peer("udp-echo")
    with associate(server) as association:
        address = association.client.address
        association.exchange(target, b"before")
        association.client.finish_sending()
        until = time.monotonic() + 6  # longer than the grace that an idle one has
        while time.monotonic() < until:
            association.exchange(target, b"still here")
            time.sleep(0.5)
        assert not any("tcp/accept ]:" in line for line in lines_about(server, address))
        association.client.expect_end()
        assert ": local client closed." in wait_for_line(server, address, "tcp/accept ]:")


def test_association_ends_at_once_when_the_client_resets(server: Server, peer: StartPeer) -> None:
    target = peer("udp-echo")
    with associate(server) as association:
        address = association.client.address
        association.exchange(target, b"ping")
        assert server.find_excess()
        association.client.reset()
        wait_for_line(server, address, "tcp/accept ]:", "local client error (Connection reset by peer)")
        server.check_resources()


def test_idle_association_is_closed(sockd: Any, private_world: World, peer: StartPeer) -> None:
    server = sockd(HEAD + "timeout.io.udp: 1\n" + CLIENT_PASS + SOCKS_PASS, world=private_world)
    target = peer("udp-echo")
    with associate(server) as used, associate(server) as unused:
        used.exchange(target, b"ping")
        for association in (used, unused):
            association.client.expect_end()
            assert ": i/o timeout." in wait_for_line(server, association.client.address, "tcp/accept ]:")
        server.check_resources()


def test_timeout_of_tcp_does_not_end_an_association(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    server = sockd(HEAD + "timeout.io.tcp: 1\n" + CLIENT_PASS + SOCKS_PASS, world=private_world)
    target, tcp_target = peer("udp-echo"), peer("discard")
    with associate(server) as association, Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", tcp_target.port)
        client.expect_end()  # an idle TCP session, begun later, has timed out by now
        association.exchange(target, b"still here")


def test_bytes_on_the_control_connection_are_noticed_and_ignored(server: Server, peer: StartPeer) -> None:
    target = peer("udp-echo")
    with associate(server) as association:
        association.client.send(b"junk")
        wait_for_line(
            server, association.client.address, "notice: ", "4 unexpected bytes over control connection"
        )
        association.exchange(target, b"ping")


def test_live_association_is_ended_and_logged_when_the_server_stops(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    server = sockd(HEAD + CLIENT_PASS + SOCKS_PASS, world=private_world)
    target = peer("udp-echo")
    with associate(server) as association:
        association.exchange(target, b"ping")
        server.signal(signal.SIGTERM)
        association.client.expect_end_or_reset()
        line = wait_for_record(server, "udp/udpassociate ]:", f" 127.0.0.1.{association.relay[1]} ")
        assert ": administrative termination.  Session duration: " in line


def test_nobody_at_one_target_costs_the_others_no_datagram(server: Server, peer: StartPeer) -> None:
    echo = peer("udp-echo")
    with associate(server) as association:
        for number in range(20):
            association.send("127.0.0.1", 9, b"lost")
            association.exchange(echo, b"%d" % number)


def test_errors_of_targets_are_not_told_where_any_may_answer(open_server: Server, peer: StartPeer) -> None:
    echo = peer("udp-echo")
    with associate(open_server) as association:
        association.send("127.0.0.1", 9, b"lost")
        association.exchange(echo, b"comes")
        assert not [line for line in lines_about(open_server, association.udp.address) if "refused" in line]
