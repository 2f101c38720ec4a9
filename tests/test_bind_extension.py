"""`extension: bind`: one BIND for several peers, each of which reaches the client over a call back.

Debian's danted makes the calls, but closes the client's connection at the first one and relays
nothing, and Dante's own client library ends by a failed assertion: so only the first reply and
the call itself are compared.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from client import (
    BIND,
    CONNECT,
    GRANTED,
    TIMEOUT_SECONDS,
    Address,
    Client,
    Feed,
    bytewise,
    request5,
    whole,
    whole_address,
)
from conftest import Factory
from kerberos import GssClient, running_realm
from more_peers import CLIENT_PASS, IPV4_HEAD, SOCKS_PASS, rule, wait_for_line, wait_for_record
from servers import Server, eventually
from test_gssapi import config as kerberos_config

import sockd as program

ANYBODY = "from: 0/0 to: 0/0"
SEVERAL = "255.255.255.255"
UNKNOWN = ("0.0.0.0", 0)
EXTENSION = "extension: bind\n"
LOG = "log: connect disconnect error"
BOTH = pytest.mark.parametrize(
    "factory", ["sockd", pytest.param("danted", marks=[pytest.mark.dante, pytest.mark.root])], indirect=True
)


class Caller(Client):
    """A client that listens on the port from which it has connected, if it wants to."""

    def __init__(self, server: Address, source: str = "127.0.0.1", feed: Feed = whole) -> None:
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        self.feed = feed
        self.sock = self._open(family, whole_address(source, 0))
        self.sock.connect(whole_address(*server))
        self.listener = self._open(family, self.sock.getsockname())

    def _open(self, family: int, address: tuple[Any, ...]) -> socket.socket:
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.settimeout(TIMEOUT_SECONDS)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(address)
        return opened

    def close(self) -> None:
        self.listener.close()
        super().close()

    def listen(self) -> None:
        self.listener.listen(64)

    def accept(self) -> Called:
        return Called(*self.listener.accept())

    def open_several(self, port: int = 0) -> Address:
        """Ask for a port for several peers, listen, and give its address."""
        self.listen()
        reply = self.open5(BIND, SEVERAL, port)
        assert reply.code == 0
        return reply.host, reply.port

    def ask(self, source: Address) -> Address:
        """Ask whose data comes over a connection from `source`."""
        reply = self.request5(BIND, *source)
        assert reply.code == 0
        return reply.host, reply.port


class Called(Client):
    """A connection that the server has made to a client."""

    def __init__(self, connection: socket.socket, source: tuple[str, int]) -> None:
        self.feed = whole
        self.sock = connection
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.source = source[:2]

    def exchange_with(self, visitor: Client, data: bytes) -> bool:
        """Tell whether data comes through both ways."""
        self.send(data)
        visitor.send(visitor.receive(len(data)))
        return self.receive(len(data)) == data

    def receive_to_the_end(self) -> None:
        """Receive until the server closes or resets."""
        with contextlib.suppress(ConnectionResetError):
            self.receive_all()


@pytest.fixture
def server(sockd: Factory) -> Server:
    return sockd(EXTENSION + IPV4_HEAD + CLIENT_PASS + SOCKS_PASS)


@pytest.fixture
def caller(server: Server) -> Iterator[Caller]:
    with Caller(server.addresses[0]) as client:
        yield client


def visit(bound: Address, source: str = "127.0.0.1") -> Client:
    return Client(bound, source=(source, 0))


# ------------------------------ as danted does it ------------------------------


@BOTH
@pytest.mark.parametrize("port", [0, 2222])
def test_client_is_called_back_on_the_port_it_comes_from(
    factory: Factory, stack: contextlib.ExitStack, port: int
) -> None:
    """The port to listen on is the client's as well, where it is free; the port of the request is nothing."""
    started = factory(EXTENSION + IPV4_HEAD.replace("external: 127.0.0.1", "external: 127.0.0.3")
                      + CLIENT_PASS + SOCKS_PASS)  # fmt: skip
    client = stack.enter_context(Caller(started.addresses[0], "127.0.0.2"))
    bound = client.open_several(port)
    assert bound == ("127.0.0.3", client.address[1])
    stack.enter_context(visit(bound, "127.0.0.5"))
    called = stack.enter_context(client.accept())
    assert called.source[0] == "127.0.0.1"
    wait_for_line(started, client.address, "tcp/bind [: ", f" -> 127.0.0.3.{bound[1]} 0.0.0.0.")


@BOTH
def test_extension_is_off_by_default(factory: Factory, stack: contextlib.ExitStack) -> None:
    started = factory(IPV4_HEAD + CLIENT_PASS + SOCKS_PASS)
    client = stack.enter_context(Client(started.addresses[0]))
    assert client.open5(BIND, SEVERAL, 0).code == 2
    wait_for_line(started, client.address, "client requested disabled Dante extension: bind")


# ------------------------------ peers ------------------------------


def test_peers_come_side_by_side_and_are_named(server: Server, caller: Caller) -> None:
    bound = caller.open_several()
    with contextlib.ExitStack() as stack:
        pairs = []
        for host in ("127.0.0.5", "127.0.0.6", "127.0.0.7"):
            visitor = stack.enter_context(visit(bound, host))
            pairs.append((visitor, stack.enter_context(caller.accept())))
        for visitor, called in pairs:
            assert caller.ask(called.source) == visitor.address
            visitor.send(b"from " + visitor.address[0].encode())
        for visitor, called in reversed(pairs):
            assert called.receive(14) == b"from " + visitor.address[0].encode()
            assert called.exchange_with(visitor, b"answer")
        wait_for_line(server, pairs[0][0].address, "pass(1): tcp/bindreply [: ", f".{caller.address[1]}")
        assert caller.ask(("127.0.0.1", 9)) == UNKNOWN


def test_socks4_client_has_peers_and_questions_too(server: Server, caller: Caller) -> None:
    caller.listen()
    reply = caller.request4(BIND, SEVERAL, 0)
    assert reply.code == GRANTED
    with visit((reply.host, reply.port)) as visitor, caller.accept() as called:
        answer = caller.request4(BIND, *called.source)
        assert (answer.code, answer.host, answer.port) == (GRANTED, *visitor.address)
        assert called.exchange_with(visitor, b"hello")
        assert caller.request4(BIND, "192.0.2.1", 9)[1:] == UNKNOWN


def test_questions_may_come_in_any_pieces_and_at_once(server: Server) -> None:
    with Caller(server.addresses[0], feed=bytewise) as client:
        bound = client.open_several()
        with visit(bound) as visitor, client.accept() as called:
            client.send(request5(BIND, *called.source) * 3)
            assert [client.read_reply5()[2:] for _ in range(3)] == [visitor.address] * 3


def test_peer_that_has_gone_has_no_name_any_more(server: Server, caller: Caller) -> None:
    bound = caller.open_several()
    with visit(bound) as visitor:
        called = caller.accept()
        assert caller.ask(called.source) == visitor.address
    called.expect_end()
    called.close()
    eventually(lambda: caller.ask(called.source) == UNKNOWN)


def test_nobody_waits_for_a_connection_that_lingers(sockd: Factory) -> None:
    linger = "internal.socket.so_linger: 60\n"
    server = sockd(EXTENSION + linger + IPV4_HEAD + CLIENT_PASS + SOCKS_PASS)
    with Caller(server.addresses[0]) as client:
        client.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bound = client.open_several()
        with visit(bound) as visitor, client.accept() as called:
            visitor.send(bytes(50_000))
            visitor.finish_sending()
            called.finish_sending()
            eventually(lambda: client.ask(called.source) == UNKNOWN)
            with visit(bound) as another, client.accept() as its_call:
                assert its_call.exchange_with(another, b"meanwhile")
            assert called.receive_all() == bytes(50_000)


def test_each_half_closes_for_itself(server: Server, caller: Caller) -> None:
    bound = caller.open_several()
    with visit(bound) as visitor, caller.accept() as called:
        visitor.send(b"last")
        visitor.finish_sending()
        assert called.receive_all() == b"last"
        called.send(b"answer")
        called.close()
        assert visitor.receive_all() == b"answer"
        line = wait_for_line(server, visitor.address, "tcp/bindreply ]: ")
        assert line.split("]: ")[1].startswith("6 -> ")
    with visit(bound) as another, caller.accept() as called:
        assert called.exchange_with(another, b"the wait goes on")


@pytest.mark.parametrize("families", [("127.0.0.1", "::1"), ("::1", "127.0.0.1"), ("::1", "::1")])
def test_client_and_peers_may_be_of_either_family(sockd: Factory, families: tuple[str, str]) -> None:
    internal, external = families
    head = f"internal: {internal} port = 0\nexternal: {external}\nclientmethod: none\nsocksmethod: none\n"
    server = sockd(EXTENSION + head + CLIENT_PASS + SOCKS_PASS)
    with Caller(server.addresses[0], internal) as client:
        bound = client.open_several()
        assert bound[0] == external
        with visit(bound, external) as visitor, client.accept() as called:
            assert client.ask(called.source) == visitor.address
            assert called.exchange_with(visitor, b"hello")


# ------------------------------ ends ------------------------------


@pytest.mark.parametrize(
    "leave", [Client.close, Client.reset, Client.finish_sending], ids=lambda leave: leave.__name__
)
def test_everything_ends_with_the_clients_connection(server: Server, leave: object) -> None:
    with Caller(server.addresses[0]) as client:
        bound = client.open_several()
        with visit(bound) as visitor, client.accept() as called:
            assert called.exchange_with(visitor, b"hello")
            leave(client)  # type: ignore[operator]
            called.expect_end_or_reset()
            visitor.expect_end_or_reset()
            wait_for_line(server, visitor.address, "tcp/bindreply ]: ")
    eventually(lambda: not is_listening(bound))
    wait_for_record(server, "tcp/accept ]: ")


def is_listening(address: Address) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


@pytest.mark.parametrize(
    "message", [request5(CONNECT, "127.0.0.1", 80), b"\x04", b"GET / HTTP/1.0\r\n\r\n", b"\x05\x02\x00\x09"]
)
def test_anything_but_a_question_ends_the_bind(server: Server, caller: Caller, message: bytes) -> None:
    bound = caller.open_several()
    with visit(bound) as visitor, caller.accept() as called:
        caller.send(message)
        caller.expect_end_or_reset()
        called.expect_end_or_reset()
        visitor.expect_end_or_reset()
    wait_for_line(server, caller.address, "block(1): tcp/bind ]: ", "receiving request from client failed")


def test_wait_ends_with_the_timeout_but_not_while_there_are_peers(sockd: Factory) -> None:
    log = rule("socks pass", ANYBODY, "command: bind", LOG, "timeout.io.tcp: 1")
    log += rule("socks pass", ANYBODY, "command: bindreply", LOG)
    server = sockd(EXTENSION + IPV4_HEAD + CLIENT_PASS + log)
    with Caller(server.addresses[0]) as client, Caller(server.addresses[0]) as other:
        bound = client.open_several()
        with visit(bound) as visitor, client.accept() as called:
            other.open_several()
            other.expect_end()  # which takes longer than the time-out
            assert called.exchange_with(visitor, b"still here")
        client.expect_end()
        wait_for_line(server, client.address, "tcp/bind ]: ", "i/o timeout")


def test_server_that_ends_cuts_everything(server: Server, caller: Caller) -> None:
    bound = caller.open_several()
    with visit(bound) as visitor, caller.accept() as called:
        assert called.exchange_with(visitor, b"hello")
        server.stop()
        called.expect_end_or_reset()
        visitor.expect_end_or_reset()
    ends = [message for message in server.messages if " ]: " in message]
    assert len([end for end in ends if "administrative termination" in end]) == 3


def test_peer_that_waits_for_bandwidth_is_cut_at_once(sockd: Factory) -> None:
    socks = rule("socks pass", ANYBODY, LOG, "bandwidth: 1000")
    server = sockd(EXTENSION + IPV4_HEAD + CLIENT_PASS + socks)
    with Caller(server.addresses[0]) as client:
        bound = client.open_several()
        with visit(bound) as visitor, client.accept() as called:
            visitor.send(bytes(100_000))
            called.receive(1)
            client.close()
            called.receive_to_the_end()


# ------------------------------ rules and limits ------------------------------


def test_who_may_not_come_does_not_end_the_bind(sockd: Factory) -> None:
    rules = rule("socks block", "from: 127.0.0.9/32 to: 0/0", "command: bindreply", LOG) + SOCKS_PASS
    server = sockd(EXTENSION + IPV4_HEAD + CLIENT_PASS + rules)
    with Caller(server.addresses[0]) as client:
        bound = client.open_several()
        with visit(bound, "127.0.0.9") as stranger:
            stranger.expect_end_or_reset()
            wait_for_line(server, stranger.address, "block(1): tcp/bindreply ]: ")
        with visit(bound) as visitor, client.accept() as called:
            assert client.ask(called.source) == visitor.address


def test_client_that_is_not_there_loses_a_peer_and_no_more(server: Server, caller: Caller) -> None:
    bound = caller.open5(BIND, SEVERAL, 0)[2:]
    with visit(bound) as visitor:
        visitor.expect_end_or_reset()
        line = wait_for_line(server, visitor.address, "block(1): tcp/bindreply ]: ")
    assert f"connect(2) to 127.0.0.1.{caller.address[1]} from " in line
    assert line.endswith("Connection refused")
    caller.listen()
    with visit(bound) as visitor, caller.accept() as called:
        assert called.exchange_with(visitor, b"now I am")


@contextlib.contextmanager
def descriptors_left(server: Server, count: int) -> Iterator[None]:
    """Let the only worker open so many files more."""
    pid = next(record.pid for record in server.log if record.message.endswith(" running"))
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = sorted(set(range(max(taken) + 3)) - taken)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def own_server(sockd: Factory) -> Server:
    """Start a server whose worker is of the user who runs the tests, who may so set its limits."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    return sockd(EXTENSION + f"user.unprivileged: {user}\n" + IPV4_HEAD + CLIENT_PASS + SOCKS_PASS)


def test_peers_go_on_where_there_is_no_descriptor_for_another(own_server: Server) -> None:
    with Caller(own_server.addresses[0]) as client:
        bound = client.open_several()
        with visit(bound) as first, client.accept() as called:
            assert called.exchange_with(first, b"hello")
            with descriptors_left(own_server, 0):
                second = visit(bound)
                for _ in range(2):  # the server has tried before it answers for the second time
                    assert client.ask(called.source) == first.address
                assert called.exchange_with(first, b"still here")
            with second, client.accept() as late:
                assert late.exchange_with(second, b"it has waited")


def test_peers_go_on_where_there_is_no_descriptor_for_a_call_back(own_server: Server) -> None:
    with Caller(own_server.addresses[0]) as client:
        bound = client.open_several()
        with visit(bound) as first, client.accept() as called:
            assert called.exchange_with(first, b"hello")
            with descriptors_left(own_server, 1), visit(bound) as second:
                second.expect_end_or_reset()
                text = "could not call the client back: Too many open files"
                wait_for_line(own_server, second.address, "block(1): tcp/bindreply ]: ", text)
            assert called.exchange_with(first, b"still here")
            with visit(bound) as third, client.accept() as another:
                assert another.exchange_with(third, b"hello")


def test_no_more_peers_at_a_time_than_there_may_be(server: Server, caller: Caller) -> None:
    bound = caller.open_several()
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(program.MOST_FORWARDED):
            visitor = stack.enter_context(visit(bound))
            pairs.append((visitor, stack.enter_context(caller.accept())))
        late = stack.enter_context(visit(bound))
        assert caller.ask(pairs[-1][1].source) == pairs[-1][0].address  # a turn of the server's loop
        caller.listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            caller.accept()
        caller.listener.settimeout(TIMEOUT_SECONDS)
        for end in pairs[0]:
            end.close()
        called = stack.enter_context(caller.accept())
        assert caller.ask(called.source) == late.address


def test_session_limits_of_the_bindreply_rule_count_each_peer(sockd: Factory) -> None:
    rules = rule("socks pass", ANYBODY, "command: bind", LOG)
    rules += rule("socks pass", ANYBODY, "command: bindreply", LOG, "session.max: 1")
    server = sockd(EXTENSION + IPV4_HEAD + CLIENT_PASS + rules)
    with Caller(server.addresses[0]) as client:
        bound = client.open_several()
        with visit(bound), client.accept() as called, visit(bound) as second:
            second.expect_end_or_reset()
            wait_for_line(server, second.address, "block(2): tcp/bindreply ]: ", "session limit")
        eventually(lambda: client.ask(called.source) == UNKNOWN)
        with visit(bound) as third, client.accept() as called:
            assert client.ask(called.source) == third.address


def test_client_stays_counted_when_its_peers_have_gone(sockd: Factory) -> None:
    clients = rule("client pass", ANYBODY, LOG, "session.max: 1")
    rules = rule("socks pass", ANYBODY, "command: bind", LOG)
    rules += rule("socks pass", ANYBODY, "command: bindreply", LOG, "session.max: 100")
    server = sockd(EXTENSION + IPV4_HEAD + clients + rules)
    with Caller(server.addresses[0]) as client:
        bound = client.open_several()
        with visit(bound) as visitor:
            called = client.accept()
            assert called.exchange_with(visitor, b"hello")
        called.close()
        eventually(lambda: client.ask(called.source) == UNKNOWN)
        with Client(server.addresses[0]) as second:
            second.expect_end_or_reset()
            wait_for_line(server, second.address, "block(1): tcp/accept ]: ", "session limit")


@pytest.mark.parametrize(("first", "code"), [("direct", 0), ("127.0.0.1 port = 9", 3)])
def test_extension_is_served_here_and_not_by_an_upstream(sockd: Factory, first: str, code: int) -> None:
    route = [f"from: 0/0 to: 0/0 via: {first}", "command: bind connect", "extension: bind"]
    if first != "direct":
        route.append("proxyprotocol: socks_v5")
    server = sockd(EXTENSION + IPV4_HEAD + CLIENT_PASS + SOCKS_PASS + rule("route", *route))
    with Caller(server.addresses[0]) as client:
        client.listen()
        reply = client.open5(BIND, SEVERAL, 0)
        assert reply.code == code
        if not code:
            with visit(reply[2:]) as visitor, client.accept() as called:
                assert called.exchange_with(visitor, b"hello")


@pytest.mark.root
def test_protected_client_is_not_called_in_the_clear(sockd: Factory, as_root: None) -> None:
    with running_realm() as realm:
        server = sockd(EXTENSION + kerberos_config(realm))
        with GssClient(server.addresses[0], realm) as client:
            client.log_in()
            assert client.request5(BIND, SEVERAL, 0).code == 2
        wait_for_record(server, "tcp/bind ]: ", "GSS-API would not protect")
