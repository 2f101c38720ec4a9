"""BIND with the real program: both replies, who may connect, and what becomes of everybody else."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client import (
    BIND,
    CONNECT,
    GRANTED,
    NO_METHOD,
    REJECTED,
    TIMEOUT_SECONDS,
    Address,
    Client,
    Feed,
    bytewise,
    greeting,
    random_splits,
    request4,
    request5,
    whole,
)
from more_peers import (
    CLIENT_PASS,
    HEAD,
    IPV4_HEAD,
    SOCKS_PASS,
    lines_about,
    pattern,
    rule,
    wait_for_line,
    wait_for_record,
)
from servers import Server, Sockd, World, eventually, find_free_port

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

ANYBODY = "0.0.0.0"


@pytest.fixture(scope="module")
def running(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that need nothing special."""
    config = HEAD + CLIENT_PASS + SOCKS_PASS
    server = Sockd(config, tmp_path_factory.mktemp("shared"), world=private_world)
    yield server
    server.close()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The shared server, which must give back after the test all that it took."""
    yield running
    running.check_resources()


def visit(bound: Address, source: str = "127.0.0.1") -> Client:
    """Connect to where the server listens."""
    return Client(bound, source=(source, 0))


def bind(client: Client, host: str | bytes = ANYBODY, port: int = 0) -> Address:
    """Ask for a port that `host` may connect to, and give the first reply's address."""
    reply = client.open5(BIND, host, port)
    assert reply.code == 0
    return reply.host, reply.port


def read_peer(client: Client) -> Address:
    """Read the second reply and give its address."""
    reply = client.read_reply5()
    assert reply.code == 0
    return reply.host, reply.port


def expect_refused(address: Address) -> None:
    """Wait until nobody listens at an address."""

    def is_refused() -> bool:
        with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as probe:
            return probe.connect_ex(address) != 0

    eventually(is_refused)


# ------------------------------ both replies ------------------------------

FEEDS = {"whole": whole, "bytewise": bytewise, "split": random_splits(1928)}
by_feed = pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)


@by_feed
@pytest.mark.parametrize(
    ("expected", "source"),
    [
        pytest.param(ANYBODY, "127.0.0.1", id="anybody"),
        pytest.param(ANYBODY, "127.0.0.3", id="anybody-else"),
        pytest.param("127.0.0.2", "127.0.0.2", id="address"),
        pytest.param("two.test", "127.0.0.2", id="name"),
        pytest.param(b"127.0.0.2", "127.0.0.2", id="address-as-name"),
    ],
)
def test_both_replies_name_their_ends_and_data_flows(
    server: Server, feed: Feed, expected: str | bytes, source: str
) -> None:
    with Client(server.addresses[0], feed) as client:
        client.send(greeting() + request5(BIND, expected, 0))
        assert client.read_method() == NO_METHOD
        bound = client.read_reply5()
        assert (bound.code, bound.host) == (0, "127.0.0.1")
        with visit((bound.host, bound.port), source) as visitor:
            assert read_peer(client) == visitor.address
            assert visitor.sock.getpeername() == (bound.host, bound.port)
            client.send(b"from client")
            assert visitor.receive(11) == b"from client"
            visitor.send(b"from visitor")
            assert client.receive(12) == b"from visitor"


@by_feed
@pytest.mark.parametrize(
    ("expected", "source"), [(ANYBODY, "127.0.0.3"), ("127.0.0.2", "127.0.0.2"), ("two.test", "127.0.0.2")]
)
def test_socks4_has_both_replies_too(server: Server, feed: Feed, expected: str, source: str) -> None:
    with Client(server.addresses[0], feed) as client:
        first = client.request4(BIND, expected, 0, b"user")
        assert (first.code, first.host) == (GRANTED, "127.0.0.1")
        with visit((first.host, first.port), source) as visitor:
            second = client.read_reply4()
            assert (second.code, second.host, second.port) == (GRANTED, *visitor.address)
            assert client.exchange(b"") == b""
            visitor.send(b"hello")
            assert client.receive(5) == b"hello"


@pytest.mark.parametrize("expected", ["::", "::1", b"::1"])
def test_visitor_may_come_by_ipv6(server: Server, expected: str | bytes) -> None:
    with Client(server.addresses[0]) as client:
        bound = bind(client, expected)
        assert bound[0] in ("::1", "fd00::6")
        with visit(bound, "::1") as visitor:
            assert read_peer(client) == visitor.address
            visitor.send(b"six")
            assert client.receive(3) == b"six"


def test_port_of_the_request_is_honoured_where_anybody_may_come(server: Server) -> None:
    port = find_free_port()
    with Client(server.addresses[0]) as client:
        assert bind(client, ANYBODY, port) == ("127.0.0.1", port)


def test_port_that_is_taken_is_replaced(server: Server, peer: StartPeer) -> None:
    taken = peer("echo").port
    with Client(server.addresses[0]) as client:
        bound = bind(client, ANYBODY, taken)
        assert bound[1] not in (0, taken)
        with visit(bound) as visitor:
            assert read_peer(client) == visitor.address


def test_privileged_port_is_replaced(server: Server) -> None:
    with Client(server.addresses[0]) as client:
        assert bind(client, ANYBODY, 80)[1] >= 1024


def test_only_one_visitor_is_let_in(server: Server) -> None:
    with Client(server.addresses[0]) as client:
        bound = bind(client)
        with visit(bound) as visitor:
            read_peer(client)
            expect_refused(bound)
            client.send(b"still here")
            assert visitor.receive(10) == b"still here"


# ------------------------------ the wait ------------------------------


def test_data_that_the_client_sends_while_it_waits_reaches_the_visitor(server: Server) -> None:
    with Client(server.addresses[0]) as client:
        client.send(greeting() + request5(BIND, ANYBODY, 0) + b"behind the request, ")
        client.read_method()
        reply = client.read_reply5()
        client.send(b"while waiting")
        with visit((reply.host, reply.port)) as visitor:
            assert read_peer(client) == visitor.address
            assert visitor.receive(33) == b"behind the request, while waiting"
            address, bound = client.address, reply.port
        client.expect_end()
    line = wait_for_record(server, "tcp/bindreply ]:", f" 127.0.0.1.{bound} ")
    assert f": 33 -> 127.0.0.1.{visitor_port(line)} 127.0.0.1.{bound} -> 0, 0 -> " in line
    assert f"127.0.0.1.{address[1]} -> 33: remote peer closed." in line


def visitor_port(line: str) -> str:
    """Give the port of the first address in a closing record."""
    return line.split(" -> ")[1].split(" ")[0].rpartition(".")[2]


def test_much_data_waits_outside_the_server(server: Server) -> None:
    data = pattern(3 << 20)
    with Client(server.addresses[0]) as client:
        bound = bind(client)
        client.sock.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < len(data):
                sent += client.sock.send(data[sent : sent + 65536])
        client.sock.settimeout(TIMEOUT_SECONDS)
        with visit(bound) as visitor:
            read_peer(client)
            client.finish_sending()
            assert visitor.receive_all() == data[:sent]


@pytest.mark.parametrize("expected", ["127.0.0.2", "two.test"])
def test_strangers_are_turned_away_and_the_wait_goes_on(server: Server, expected: str) -> None:
    with Client(server.addresses[0]) as client:
        bound = bind(client, expected)
        for source in ("127.0.0.1", "127.0.0.3", "127.0.0.1"):
            with visit(bound, source) as stranger:
                stranger.expect_end_or_reset()
                wait_for_line(
                    server, stranger.address, "block(0): tcp/bindreply ]:", "expected bindreply from"
                )
        with visit(bound, "127.0.0.2") as visitor:
            assert read_peer(client) == visitor.address
            visitor.send(b"me")
            assert client.receive(2) == b"me"


def test_visitor_that_resets_at_once_ends_the_session_cleanly(server: Server) -> None:
    with Client(server.addresses[0]) as client:
        bound = bind(client)
        visit(bound).reset()
        with contextlib.suppress(ConnectionResetError):
            client.receive_all()
        wait_for_line(server, client.address, "tcp/accept ]:")


@pytest.mark.parametrize("leave", [Client.close, Client.reset], ids=["close", "reset"])
def test_client_that_leaves_ends_the_wait(server: Server, leave: Callable[[Client], None]) -> None:
    with Client(server.addresses[0]) as client:
        address, bound = client.address, bind(client)
        leave(client)
    wait_for_line(server, address, "tcp/bind ]:")
    wait_for_line(server, address, "tcp/accept ]:")
    expect_refused(bound)


def test_wait_ends_with_the_timeout(sockd: Any, private_world: World) -> None:
    server = sockd(HEAD + "timeout.io.tcp: 1\n" + CLIENT_PASS + SOCKS_PASS, world=private_world)
    with Client(server.addresses[0]) as client:
        bound = bind(client)
        assert client.read_reply5().code == 6
        client.expect_end()
        wait_for_line(server, client.address, "tcp/bind ]:", "i/o timeout")
        expect_refused(bound)


def test_waiting_takes_no_process(server: Server) -> None:
    before = len(server.processes())
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.addresses[0])) for _ in range(40)]
        ports = {bind(client)[1] for client in clients}
        assert len(ports) == 40
        assert len(server.processes()) == before
        with Client(server.addresses[0]) as another:
            assert another.open5(CONNECT, "127.0.0.1", 1).code == 5


# ------------------------------ rules ------------------------------


def test_bind_that_no_rule_passes_is_refused(sockd: Any, private_world: World) -> None:
    server = sockd(
        HEAD + CLIENT_PASS + rule("socks pass", "from: 0/0 to: 0/0", "command: connect"), world=private_world
    )
    with Client(server.addresses[0]) as client:
        assert client.open5(BIND, ANYBODY, 0).code == 2
        client.expect_end()
    with Client(server.addresses[0]) as client:
        assert client.request4(BIND, ANYBODY, 0).code == REJECTED
        client.expect_end()


def test_rule_about_visitors_keeps_the_others_out(sockd: Any, private_world: World) -> None:
    rules = rule("socks pass", "from: 0/0 to: 0/0", "command: bind", "log: connect disconnect")
    rules += rule("socks pass", "from: 127.0.0.2/32 to: 0/0", "command: bindreply", "log: connect disconnect")
    rules += rule("socks block", "from: 0/0 to: 0/0", "log: connect")
    server = sockd(HEAD + CLIENT_PASS + rules, world=private_world)
    with Client(server.addresses[0]) as client:
        bound = bind(client)
        with visit(bound, "127.0.0.3") as stranger:
            stranger.expect_end_or_reset()
            wait_for_line(server, stranger.address, "block(3): tcp/bindreply ]:")
        with visit(bound, "127.0.0.2") as visitor:
            assert read_peer(client) == visitor.address
            wait_for_line(server, visitor.address, "pass(2): tcp/bindreply [:")


def test_visitor_that_was_expected_but_is_blocked_ends_the_bind(sockd: Any, private_world: World) -> None:
    rules = rule("socks pass", "from: 0/0 to: 0/0", "command: bind", "log: connect disconnect")
    server = sockd(HEAD + CLIENT_PASS + rules, world=private_world)
    with Client(server.addresses[0]) as client:
        bound = bind(client, "127.0.0.2")
        with visit(bound, "127.0.0.2") as visitor:
            reply = client.read_reply5()
            assert (reply.code, reply.host, reply.port) == (2, *visitor.address)
            visitor.expect_end_or_reset()
        client.expect_end()


@pytest.mark.parametrize(
    ("host", "code"), [("nowhere.test", 4), (b"", 4), (b"a..b", 4), ("255.255.255.255", 2)]
)
def test_expected_visitor_that_cannot_be_is_refused(server: Server, host: str | bytes, code: int) -> None:
    with Client(server.addresses[0]) as client:
        assert client.open5(BIND, host, 0).code == code
        client.expect_end()
        wait_for_line(server, client.address, "tcp/bind ]:")


def test_visitor_of_a_family_without_external_is_refused(sockd: Any, private_world: World) -> None:
    server = sockd(IPV4_HEAD + CLIENT_PASS + SOCKS_PASS, world=private_world)
    for host in ("::1", "::"):
        with Client(server.addresses[0]) as client:
            assert client.open5(BIND, host, 0).code == 8
            client.expect_end()


# ------------------------------ the end ------------------------------


def test_client_may_finish_first(server: Server) -> None:
    with Client(server.addresses[0]) as client:
        bound = bind(client)
        with visit(bound) as visitor:
            read_peer(client)
            client.send(b"the end")
            client.finish_sending()
            assert visitor.receive_all() == b"the end"
            visitor.send(b"not yet")
            visitor.finish_sending()
            assert client.receive_all() == b"not yet"


def test_visitor_may_finish_first(server: Server) -> None:
    with Client(server.addresses[0]) as client:
        bound = bind(client)
        with visit(bound) as visitor:
            read_peer(client)
            visitor.finish_sending()
            client.expect_end()
            client.send(pattern(1 << 20))
            client.finish_sending()
            assert visitor.receive_all() == pattern(1 << 20)


def client_closes(client: Client, visitor: Client) -> None:
    client.close()
    visitor.receive_all()


def visitor_closes(client: Client, visitor: Client) -> None:
    visitor.close()
    client.receive_all()


def client_resets(client: Client, visitor: Client) -> None:
    client.reset()
    with pytest.raises(ConnectionResetError):
        visitor.receive(1)


def visitor_resets(client: Client, visitor: Client) -> None:
    visitor.reset()
    with pytest.raises(ConnectionResetError):
        client.receive(1)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (client_closes, "local client closed"),
        (visitor_closes, "remote peer closed"),
        (client_resets, "local client error (Connection reset by peer)"),
        (visitor_resets, "remote peer error (Connection reset by peer)"),
    ],
)
def test_record_tells_which_end_closed_and_what_each_got(
    server: Server, end: Callable[[Client, Client], None], reason: str
) -> None:
    with Client(server.addresses[0]) as client:
        bound, here = bind(client), f"127.0.0.1.{server.port} 127.0.0.1.{client.address[1]}"
        address = client.address
        with visit(bound) as visitor:
            there = f"127.0.0.1.{visitor.address[1]} 127.0.0.1.{bound[1]}"
            read_peer(client)
            client.send(b"abc")
            visitor.receive(3)
            visitor.send(b"12345")
            client.receive(5)
            assert wait_for_line(server, address, "tcp/bindreply [:").endswith(f": {there} -> {here}")
            end(client, visitor)
    line = wait_for_line(server, address, "pass(1): tcp/bindreply ]:")
    assert f": 3 -> {there} -> 5, 5 -> {here} -> 3: {reason}.  Session duration: " in line
    line = wait_for_line(server, address, "pass(1): tcp/accept ]:")
    assert (
        f": 5 -> 127.0.0.1.{address[1]} 127.0.0.1.{server.port} -> 3: {reason}.  Session duration: " in line
    )
    kinds = [line.split(": ")[2] for line in lines_about(server, address)]
    assert kinds[:3] == ["tcp/accept [", "tcp/bind [", "tcp/bindreply ["]
    assert set(kinds[3:]) == {"tcp/bindreply ]", "tcp/bind ]", "tcp/accept ]"}


def test_socks4_request_for_a_wrong_bind_is_91(server: Server) -> None:
    with Client(server.addresses[0], bytewise) as client:
        client.send(request4(BIND, "nowhere.test", 0))
        assert client.read_reply4().code == REJECTED
        client.expect_end()
