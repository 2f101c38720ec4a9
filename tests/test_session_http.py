"""HTTP with the real program: requests one after the other, bodies, log-ins, records; and enemies."""

from __future__ import annotations

import base64
import contextlib
import functools
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import login_peers
import pytest
from client import CONNECT, Client, Feed, bytewise, random_splits, whole
from more_peers import (
    CLIENT_PASS,
    HEAD,
    IPV4_HEAD,
    hash_with,
    lines_about,
    pattern,
    read_memory_bytes,
    rule,
    run_all,
    target_that,
    wait_for_line,
    wait_for_record,
)
from peers import Behaviour, Seen, receive, reset
from servers import Server, Sockd, World, eventually
from upstreams import route

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

LOG = "log: connect disconnect error"
BLOCKED_HOST, IDLE_HOST = "127.0.0.66", "127.0.0.11"
CONFIG = (
    HEAD
    + "timeout.connect: 1\ntimeout.negotiate: 5\n"
    + CLIENT_PASS
    + rule("socks block", f"from: 0/0 to: {BLOCKED_HOST}/32", LOG)
    + rule("socks pass", f"from: 0/0 to: {IDLE_HOST}/32", "proxyprotocol: http", "timeout.io: 1", LOG)
    + rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http socks_v5", "command: connect", LOG)
)
MUCH = 3_000_000
FEEDS = {"whole": whole, "bytewise": bytewise, "split": random_splits(9112)}
by_feed = pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)


@pytest.fixture(scope="module")
def running(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that need nothing special."""
    server = Sockd(CONFIG, tmp_path_factory.mktemp("shared"), world=private_world)
    yield server
    server.close()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The shared server, which must give back after the test all that it took, and have no bug to tell of."""
    yield running
    running.check_resources()
    running.check_text()


# ------------------------------ both ends ------------------------------


class Message(NamedTuple):
    """A message as one end received it; `fields` in lower case, the first of a name."""

    first: str
    fields: dict[str, str]
    body: bytes

    @property
    def status(self) -> int:
        """The status of a response."""
        return int(self.first.split(" ")[1])


class Reader:
    """Reads messages from a connection, and nothing beyond them."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pending = b""

    def fill(self) -> None:
        """Read some more."""
        data = self.connection.recv(65536)
        if not data:
            raise ConnectionError(f"closed after {self.pending!r}")
        self.pending += data

    def take(self, count: int) -> bytes:
        """Read so many bytes."""
        while len(self.pending) < count:
            self.fill()
        data, self.pending = self.pending[:count], self.pending[count:]
        return data

    def take_until(self, end: bytes) -> bytes:
        """Read up to a mark, and leave that out."""
        while end not in self.pending:
            self.fill()
        data, _, self.pending = self.pending.partition(end)
        return data

    def read_head(self) -> Message:
        """Read a message's head."""
        first, *lines = self.take_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        fields: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(": ")
            assert colon, line
            fields.setdefault(name.lower(), value)
        return Message(first, fields, b"")

    def read_chunks(self) -> bytes:
        """Read a body in chunks."""
        content = b""
        while size := int(self.take_until(b"\r\n"), 16):
            content += self.take(size)
            assert self.take(2) == b"\r\n"
        assert self.take(2) == b"\r\n"
        return content

    def read(self, has_body: bool = True) -> Message:
        """Read a message, to the end of the connection where it does not say how long it is."""
        head = self.read_head()
        if not has_body or re.match(r"HTTP/1.1 (1..|204|304)", head.first):
            return head
        if "transfer-encoding" in head.fields:
            return head._replace(body=self.read_chunks())
        if "content-length" in head.fields:
            return head._replace(body=self.take(int(head.fields["content-length"])))
        if head.first.startswith("HTTP/"):
            with contextlib.suppress(ConnectionError):
                while True:
                    self.fill()
            return head._replace(body=self.pending)
        return head


def respond(*pieces: bytes) -> Behaviour:
    """Make a behaviour that reads one request and sends a response."""

    def behaviour(connection: socket.socket, seen: Seen) -> None:
        seen.data += repr(Reader(connection).read()).encode()
        for piece in pieces:
            connection.sendall(piece)

    return behaviour


def mirror(connection: socket.socket, seen: Seen) -> None:
    """Answer one request with what came: its first line, and its body."""
    message = Reader(connection).read()
    seen.data += "\n".join([message.first, *(f"{n}: {v}" for n, v in message.fields.items())]).encode()
    body = message.first.encode() + b"\n" + message.body
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


class HttpClient:
    """A client of a server; a context manager that closes it."""

    def __init__(self, server: Server, feed: Feed = whole) -> None:
        self.client = Client(server.addresses[0], feed)
        self.reader = Reader(self.client.sock)

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.client.send(data)

    def ask(self, request: bytes, has_body: bool = True) -> Message:
        """Send a request and read the response."""
        self.send(request)
        return self.reader.read(has_body)

    def expect_end(self) -> None:
        """Assert that the server closes without another byte."""
        assert self.reader.pending == b""
        self.client.expect_end()


def make_request(
    target: Any, path: str = "/", *fields: str, method: str = "GET", body: bytes = b"", version: str = "1.1"
) -> bytes:
    """Make a request for a peer, or for any HOST:PORT."""
    host = target if isinstance(target, str) else name_of(target)
    lines = [f"{method} http://{host}{path} HTTP/{version}", f"Host: {host}", *fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def name_of(peer: Any) -> str:
    host, port = peer.address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def make_connect(target: Any, *fields: str, version: str = "1.1") -> bytes:
    """Make a CONNECT to a peer."""
    return "\r\n".join([f"CONNECT {name_of(target)} HTTP/{version}", *fields, "", ""]).encode()


def basic(user: str, password: str) -> str:
    return "Proxy-Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# ------------------------------ CONNECT ------------------------------


@by_feed
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_http_connect_opens_a_tunnel(
    server: Server, peer: StartPeer, feed: Feed, host: str, version: str
) -> None:
    with HttpClient(server, feed) as client:
        answer = client.ask(make_connect(peer("echo", host), version=version), has_body=False)
        assert (answer.status, answer.fields) == (200, {})
        assert client.client.exchange(pattern(1000)) == pattern(1000)


def test_http_connect_to_a_name_and_what_was_sent_early(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    with HttpClient(server) as client:
        client.send(f"CONNECT echo.test:{target.port} HTTP/1.1\r\n\r\nearly".encode())
        assert client.reader.read(has_body=False).status == 200
        assert client.reader.take(5) == b"early"
        client.client.finish_sending()
        client.expect_end()


def test_http_connect_has_the_records_of_connect(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    with HttpClient(server) as client:
        client.ask(make_connect(target), has_body=False)
        assert client.client.exchange(b"hello") == b"hello"
        address = client.client.address
        client.client.finish_sending()
        client.expect_end()
    wait_for_line(server, address, "tcp/accept ]")
    opened, began, ended, closed = lines_about(server, address)
    assert "pass(1): tcp/accept [:" in opened
    assert re.search(rf"pass\(3\): tcp/connect \[: \S+ \S+ -> \S+ 127\.0\.0\.1\.{target.port}$", began)
    assert re.search(r"pass\(3\): tcp/connect \]: 5 -> .* -> 5, 5 -> .* -> 5: local client closed\. ", ended)
    assert "pass(1): tcp/accept ]:" in closed


# ------------------------------ requests with the whole URI ------------------------------


@by_feed
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_http_request_is_passed_on(server: Server, feed: Feed, host: str) -> None:
    with target_that(mirror, host) as target, HttpClient(server, feed) as client:
        body = pattern(500)
        answer = client.ask(make_request(target, "/a?b", "X: y", method="POST", body=body))
        assert answer.status == 200
        assert answer.body == b"POST /a?b HTTP/1.1\n" + body
        assert answer.fields["via"] == "1.1 sockd"
        seen = target.seen[0].data.decode().split("\n")
        assert seen == [
            "POST /a?b HTTP/1.1", f"host: {name_of(target)}", "x: y", "via: 1.1 sockd",
            "content-length: 500", "connection: close",
        ]  # fmt: skip


def test_http_client_asks_several_targets_on_one_connection(server: Server) -> None:
    with target_that(mirror) as first, target_that(mirror, "::1") as second, HttpClient(server) as client:
        for number in range(6):
            target = (first, second)[number % 2]
            answer = client.ask(make_request(target, f"/{number}"))
            assert answer.body == f"GET /{number} HTTP/1.1\n".encode()
            assert "connection" not in answer.fields
        address = client.client.address
        client.client.finish_sending()
        client.expect_end()
        assert (len(first.seen), len(second.seen)) == (3, 3)
    closed = wait_for_line(server, address, "tcp/accept ]")
    lines = lines_about(server, address)
    assert len([line for line in lines if "pass(3): tcp/connect [:" in line]) == 6
    ended = [line for line in lines if "pass(3): tcp/connect ]:" in line]
    assert len(ended) == 6
    assert closed == lines[-1]
    sent = [int(re.search(r"]: (\d+) -> ", line)[1]) for line in ended]  # type: ignore[index]
    received = [int(re.search(r" -> (\d+), ", line)[1]) for line in ended]  # type: ignore[index]
    assert f"]: {sum(sent)} -> " in closed
    assert f" -> {sum(received)}: local client closed" in closed


def test_http_tunnel_may_come_behind_other_requests(server: Server, peer: StartPeer) -> None:
    """It is the last, and what came before it is counted for the connection."""
    with target_that(mirror) as target, HttpClient(server) as client:
        assert client.ask(make_request(target)).status == 200
        assert client.ask(make_connect(peer("echo")), has_body=False).status == 200
        assert client.client.exchange(b"hello") == b"hello"
        address = client.client.address
        client.client.finish_sending()
        client.expect_end()
    wait_for_line(server, address, "tcp/accept ]")
    first, tunnel, both = (line for line in lines_about(server, address) if " ]: " in line)
    counts = [
        [int(n) for n in re.findall(r"(?:\]: | -> )(\d+)(?= -> |[,:])", line)[:2]]
        for line in (first, tunnel, both)
    ]
    assert [a + b for a, b in zip(*counts[:2], strict=True)] == counts[2]


@by_feed
def test_http_requests_may_come_before_they_are_due(server: Server, feed: Feed) -> None:
    with target_that(mirror) as first, target_that(mirror) as second, HttpClient(server, feed) as client:
        requests = [
            make_request(first, "/1", method="POST", body=b"x" * 300),
            make_request(second, "/2"),
            b"\r\n" + make_request(first, "/3", "Transfer-Encoding: chunked", method="PUT"),
            b"3\r\nabc\r\n0\r\n\r\n",
            make_request(second, "/4", "Connection: close"),
            make_request(second, "/5"),
        ]
        client.send(b"".join(requests))
        firsts = [client.reader.read().body.partition(b" HTTP/1.1\n") for _ in range(4)]
        assert [(first, body) for first, _, body in firsts] == [
            (b"POST /1", b"x" * 300), (b"GET /2", b""), (b"PUT /3", b"abc"), (b"GET /4", b"")
        ]  # fmt: skip
        client.expect_end()
        assert (len(first.seen), len(second.seen)) == (2, 2)


def test_http_1_0_client_gets_one_answer_and_the_end(server: Server) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    behaviour = respond(b"HTTP/1.1 100 Continue\r\n\r\n", chunked)
    with target_that(behaviour) as target, HttpClient(server) as client:
        answer = client.ask(make_request(target, "/", "Connection: keep-alive", version="1.0"))
        assert (answer.status, answer.body) == (200, b"hello")
        assert answer.fields == {"via": "1.1 sockd", "connection": "close"}


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LENGTH_5 = b"Content-Length: 5\r\n"
RESPONSES = {
    "length": (OK + LENGTH_5 + b"\r\nhello", True),
    "chunks": (OK + CHUNKED + b"\r\n5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n", True),
    "end": (OK + b"\r\nhello", False),
    "end of 1.0": (b"HTTP/1.0 200 OK\r\n\r\nhello", False),
    "interim": (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + LENGTH_5 + b"\r\nhello", True),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_http_response_of_every_form(server: Server, name: str) -> None:
    data, persists = RESPONSES[name]
    behaviour = respond(*(data[n : n + 1] for n in range(len(data))))
    with target_that(behaviour) as target, HttpClient(server) as client:
        for _ in range(2 if persists else 1):
            answer = client.ask(make_request(target))
            if name == "interim":
                assert (answer.status, answer.fields["link"]) == (103, "x")
                answer = client.reader.read()
            assert (answer.status, answer.body) == (200, b"hello")
            assert ("connection" not in answer.fields) == persists


@pytest.mark.parametrize(
    ("method", "response"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n"),
        ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ],
)
def test_http_response_without_a_body_leaves_the_connection_open(
    server: Server, method: str, response: bytes
) -> None:
    with target_that(respond(response)) as target, HttpClient(server) as client:
        for _ in range(2):
            assert client.ask(make_request(target, method=method), has_body=False).status in (200, 204, 304)


def test_http_body_waits_for_the_target_to_ask_for_it(server: Server) -> None:
    def behaviour(connection: socket.socket, seen: Seen) -> None:
        reader = Reader(connection)
        assert reader.read_head().fields["expect"] == "100-continue"
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = reader.take(5)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + body)

    with target_that(behaviour) as target, HttpClient(server) as client:
        fields = ("Expect: 100-continue", "Content-Length: 5")
        assert client.ask(make_request(target, "/", *fields, method="PUT"), has_body=False).status == 100
        assert client.ask(b"hello").body == b"hello"
        assert client.ask(make_request(target, "/", *fields, method="PUT"), has_body=False).status == 100


def test_http_target_that_does_not_want_the_body_is_heard(server: Server) -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nlarge"

    def behaviour(connection: socket.socket, seen: Seen) -> None:
        Reader(connection).read_head()
        connection.sendall(refusal)

    with target_that(behaviour) as target, HttpClient(server) as client:
        client.send(make_request(target, "/", f"Content-Length: {MUCH}", method="PUT") + b"x" * 1000)
        answer = client.reader.read()
        assert (answer.status, answer.body, answer.fields["connection"]) == (413, b"large", "close")
        client.client.expect_end_or_reset()


@pytest.mark.parametrize("chunked", [False, True])
def test_http_bodies_are_streamed_whole(server: Server, chunked: bool) -> None:
    data = pattern(MUCH)

    def behaviour(connection: socket.socket, seen: Seen) -> None:
        reader = Reader(connection)
        message = reader.read()
        size = b"%x\r\n" % len(message.body)
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(message.body)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
        connection.sendall(size + message.body + b"\r\n0\r\n\r\n" if chunked else message.body)

    with target_that(behaviour) as target, HttpClient(server) as client:
        if chunked:
            client.send(make_request(target, "/", "Transfer-Encoding: chunked", method="PUT"))
            pieces = [data[start : start + 70_001] for start in range(0, MUCH, 70_001)]
            client.send(b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")
        else:
            client.send(make_request(target, method="PUT", body=data))
        assert client.reader.read().body == data
        assert client.ask(make_request(target)).body == b""


def test_http_slow_client_holds_the_target_up_and_not_the_memory(server: Server) -> None:
    sent = []

    def behaviour(connection: socket.socket, seen: Seen) -> None:
        Reader(connection).read()
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        connection.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                sent.append(connection.send(bytes(1 << 20)))
                assert sum(sent) < 1 << 28, "everything is taken off the target"

    before = read_memory_bytes(server.processes())
    with target_that(behaviour) as target, HttpClient(server) as client:
        client.send(make_request(target))
        assert client.reader.read_head().status == 200
        eventually(lambda: target.seen and target.seen[0].end == "" and len(sent) > 0)
        grown = read_memory_bytes(server.processes()) - before
        assert grown < 8 << 20


def test_http_client_that_closes_its_half_gets_its_answer(server: Server) -> None:
    def behaviour(connection: socket.socket, seen: Seen) -> None:
        Reader(connection).read()
        while receive(connection, seen):
            pass
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + seen.end.encode())

    with target_that(behaviour) as target, HttpClient(server) as client:
        client.send(make_request(target))
        client.client.finish_sending()
        assert client.reader.read().body == b"fin"
        client.expect_end()


# ------------------------------ what is refused ------------------------------


def test_http_is_judged_by_the_rules_for_each_request(server: Server, peer: StartPeer) -> None:
    origin = peer("origin")
    with target_that(mirror) as target, HttpClient(server) as client:
        assert client.ask(make_request(target)).status == 200
        answer = client.ask(make_request(f"{BLOCKED_HOST}:{origin.port}"))
        assert (answer.status, answer.fields["connection"]) == (403, "close")
        assert b"do not allow" in answer.body
        client.expect_end()
        address = client.client.address
    wait_for_line(server, address, "block(1): tcp/connect ]", f"{BLOCKED_HOST}.{origin.port}")
    assert origin.seen == []


REACHES = {
    "forbidden": (BLOCKED_HOST, "origin", 403),
    "refused": ("127.0.0.1", "refuser", 502),
    "silent": ("127.0.0.1", "blackhole", 504),
    "unknown name": ("no.such.test", "origin", 502),
    "closes at once": ("127.0.0.1", "closer", 502),
    "resets": ("127.0.0.1", "resetter", 502),
    "speaks another language": ("127.0.0.1", "greeter", 502),
    "says nothing": (IDLE_HOST, "holder", 504),
}


@pytest.mark.parametrize("name", REACHES)
def test_http_request_that_fails_has_a_page(server: Server, peer: StartPeer, name: str) -> None:
    host, kind, status = REACHES[name]
    target = peer(kind, IDLE_HOST if host == IDLE_HOST else "127.0.0.1")
    with HttpClient(server) as client:
        answer = client.ask(make_request(f"{host}:{target.port}"))
        assert (answer.status, answer.fields["connection"]) == (status, "close")
        assert answer.fields["content-type"].startswith("text/plain")
        assert f"sockd: {status} ".encode() in answer.body
        client.client.expect_end_or_reset()


@pytest.mark.parametrize("name", ["forbidden", "refused", "silent", "unknown name"])
def test_http_connect_that_fails_has_a_page(server: Server, peer: StartPeer, name: str) -> None:
    host, kind, status = REACHES[name]
    target = peer(kind)
    with HttpClient(server) as client:
        smuggled = make_request(f"127.0.0.1:{target.port}")
        answer = client.ask(f"CONNECT {host}:{target.port} HTTP/1.1\r\n\r\n".encode() + smuggled)
        assert (answer.status, answer.fields["connection"]) == (status, "close")
        client.client.expect_end_or_reset()


BROKEN_RESPONSES = {
    "no length and reset": (OK + b"\r\nhello", None),
    "short": (OK + b"Content-Length: 50\r\n\r\nhello", b""),
    "short of chunks": (OK + CHUNKED + b"\r\n5\r\nhello\r\n", b""),
    "wrong chunk": (OK + CHUNKED + b"\r\n5\r\nhello\r\n", b"5\r\nhello!\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("name", BROKEN_RESPONSES)
def test_http_client_is_told_of_a_response_that_breaks_off(server: Server, name: str) -> None:
    begin, end = BROKEN_RESPONSES[name]

    def behaviour(connection: socket.socket, seen: Seen) -> None:
        Reader(connection).read()
        connection.sendall(begin)
        receive(connection, seen)  # the end of what the client says, once it has read so far
        if end is None:
            reset(connection)
        else:
            connection.sendall(end)

    with target_that(behaviour) as target, HttpClient(server) as client:
        client.send(make_request(target))
        while b"hello" not in client.reader.pending:
            client.reader.fill()
        client.client.finish_sending()
        with pytest.raises(ConnectionResetError):
            client.client.receive_all()
        address = client.client.address
    wait_for_line(server, address, "tcp/connect ]", "remote peer")


WRONG_RESPONSES = {
    "wrong chunk": OK + CHUNKED + b"\r\n5\r\nhello!\r\n0\r\n\r\n",
    "two lengths": OK + LENGTH_5 + b"Content-Length: 6\r\n\r\nhello",
    "both lengths": OK + LENGTH_5 + CHUNKED + b"\r\nhello",
    "asks for the password": b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\n\r\n",
    "switches": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "LF": b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    "endless head": OK + b"X: y\r\n" * 20_000,
    "endless line": OK + b"X: " + b"y" * 200_000,
    "endless interims": b"HTTP/1.1 102 Processing\r\n\r\n" * 100,
}


@pytest.mark.parametrize("name", WRONG_RESPONSES)
def test_http_response_that_is_wrong_is_not_passed_on(server: Server, name: str) -> None:
    with target_that(respond(WRONG_RESPONSES[name])) as target, HttpClient(server) as client:
        answer = client.ask(make_request(target))
        while answer.status == 102:
            answer = client.reader.read()
        assert answer.status == 502
        client.client.expect_end_or_reset()


def test_http_request_cannot_be_hidden_in_another(server: Server, peer: StartPeer) -> None:
    """Attempts at smuggling: nothing but whole requests that were judged reaches a target."""
    hidden = b"GET http://%b:9/hidden HTTP/1.1\r\nHost: a\r\n\r\n" % BLOCKED_HOST.encode()
    chunked = "Transfer-Encoding: chunked"
    tail = b"0\r\n\r\n" + hidden
    doubts = [
        ("Content-Length: 3", chunked),
        (f"Content-Length: {len(tail)}", "Content-Length: 0"),
        (chunked, "Transfer-Encoding: x"),
        ("Transfer-Encoding : chunked",),
        ("X: y\r\n Transfer-Encoding: chunked",),
        ("X: y\rTransfer-Encoding: chunked",),
        ("X: y\nTransfer-Encoding: chunked",),
    ]
    with target_that(mirror) as target:
        attempts = [make_request(target, "/", *fields, method="POST") + tail for fields in doubts]
        for attempt in attempts:
            with HttpClient(server) as client:
                client.send(attempt)
                assert client.reader.read().status in (400, 501)
                client.client.expect_end_or_reset()
        assert target.seen == []
        with HttpClient(server) as client:
            request = make_request(target, "/", chunked, method="POST")
            client.send(request + b"5\r\nhello\r\n0\r\n\r\n" + hidden)
            assert client.reader.read().body.endswith(b"\nhello")
            assert client.reader.read().status == 403
        assert len(target.seen) == 1


def test_http_chunks_that_are_wrong_end_the_request_at_the_target(server: Server) -> None:
    with target_that(mirror) as target, HttpClient(server) as client:
        request = make_request(target, "/", "Transfer-Encoding: chunked", method="POST")
        client.send(request + b"5\r\nhello\r\n")
        eventually(lambda: target.seen)
        client.send(b"-1\r\n")
        assert client.reader.read().status == 400
        address = client.client.address
    wait_for_line(server, address, "tcp/connect ]", "wrong size of a chunk")
    assert target.seen[0].data == b""


GARBAGE = {
    "no http": (b"HELLO\r\n\r\n", 400),
    "lower-case": (b"get http://a/ HTTP/1.1\r\n\r\n", None),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", None),
    "LF": (b"GET http://a/ HTTP/1.1\nHost: a\n\n", 400),
    "huge field": (b"GET http://a/ HTTP/1.1\r\nX: " + b"y" * 100_000, 431),
    "huge uri": (b"GET http://a/" + b"y" * 100_000, 431),
    "many fields": (b"GET http://a/ HTTP/1.1\r\n" + b"X: y\r\n" * 30_000, 431),
    "http 2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "local": (b"GET /etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_http_garbage_is_answered_or_left(server: Server, name: str) -> None:
    data, status = GARBAGE[name]
    with HttpClient(server) as client:
        with contextlib.suppress(ConnectionError):
            client.send(data)
        if status is None:
            client.client.expect_end_or_reset()
        else:
            assert client.reader.read().status == status
        address = client.client.address
    wait_for_line(server, address, "block(1): tcp/accept ]", "error after reading")


def test_http_head_that_comes_too_slowly_is_cut_off(sockd: Any, private_world: World) -> None:
    config = CONFIG.replace("timeout.negotiate: 5", "timeout.negotiate: 1")
    server = sockd(config, world=private_world)
    with target_that(mirror) as target, HttpClient(server) as begun, HttpClient(server) as idle:
        begun.send(b"GET http://a/ HT")
        assert idle.ask(make_request(target)).status == 200
        assert begun.reader.read().status == 408
        idle.expect_end()
        addresses = begun.client.address, idle.client.address
    wait_for_line(server, addresses[0], "block(1): tcp/accept ]", "negotiate timeout after 1 second")
    wait_for_line(server, addresses[1], "pass(1): tcp/accept ]", "idle connection closed")


# ------------------------------ who may ------------------------------


def test_http_is_not_spoken_unless_a_rule_names_it(sockd: Any, private_world: World, peer: StartPeer) -> None:
    """As in danted, where rules cannot turn it on either."""
    named = rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http socks_v5", LOG)
    origin = peer("origin")
    for server in (
        sockd(IPV4_HEAD + CLIENT_PASS + rule("socks pass", "from: 0/0 to: 0/0", LOG), world=private_world),
        sockd(
            IPV4_HEAD + CLIENT_PASS + rule("socks block", "from: 0/0 to: 0/0", "proxyprotocol: http")
            + named.replace("http ", ""),
            world=private_world,
        ),
    ):  # fmt: skip
        with HttpClient(server) as client:
            client.send(make_request(origin))
            client.client.expect_end_or_reset()
            address = client.client.address
        wait_for_line(server, address, "unknown SOCKS version 71 in client request")
    assert origin.seen == []


@pytest.mark.dante
def test_http_is_never_spoken_by_danted(danted: Any, private_world: World, peer: StartPeer) -> None:
    named = rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http socks_v5", LOG)
    users = "user.privileged: root\nuser.unprivileged: nobody\n"
    server = danted(IPV4_HEAD + users + CLIENT_PASS + named, world=private_world)
    with HttpClient(server) as client:
        client.send(make_request(peer("origin")))
        client.client.expect_end_or_reset()


def test_http_and_socks_are_told_apart_by_the_rules(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    origin, echo = peer("origin"), peer("echo")
    config = (
        IPV4_HEAD + CLIENT_PASS
        + rule("socks pass", f"from: 0/0 to: 0/0 port = {origin.port}", "proxyprotocol: http", LOG)
        + rule("socks pass", f"from: 0/0 to: 0/0 port = {echo.port}", "proxyprotocol: socks_v5", LOG)
    )  # fmt: skip
    server = sockd(config, world=private_world)
    with HttpClient(server) as client:
        assert client.ask(make_request(origin)).body == b"origin\n"
    with HttpClient(server) as client:
        assert client.ask(make_connect(echo)).status == 403
    for port, code in ((echo.port, 0), (origin.port, 2)):
        with Client(server.addresses[0]) as socks:
            assert socks.open5(CONNECT, "127.0.0.1", port).code == code


@pytest.fixture(scope="module")
def guarded(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants a password for whatever is not at FREE_HOST."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "passwords").write_text(
        f"alice:{hash_with('-5', 'wonderland')}\nbob:{hash_with('-5', 'builder')}\n"
    )
    http = "proxyprotocol: http"
    config = (
        HEAD.replace("socksmethod: none", "socksmethod: username none")
        + f"login.penalty: no\npasswordfile: {folder / 'passwords'}\n"
        + rule("client pass", f"from: {STRICT_CLIENT}/32 to: 0/0", "socksmethod: username", LOG)
        + CLIENT_PASS
        + rule("socks block", f"from: 0/0 to: {BLOCKED_HOST}/32", LOG)
        + rule("socks pass", f"from: 0/0 to: {FREE_HOST}/32", http, "socksmethod: username none", LOG)
        + rule(
            "socks pass",
            "from: 0/0 to: 0/0",
            http,
            "socksmethod: username",
            "user: alice",
            LOG + " data",
        )
    )
    server = Sockd(config, folder, world=private_world)
    yield server
    server.close()


STRICT_CLIENT, FREE_HOST = "127.0.0.5", "127.0.0.12"


def ask_from(server: Server, source: str, request: bytes) -> Message:
    """Send one request from an address and read the response."""
    with contextlib.closing(server.connect(source)) as connection:
        connection.sendall(request)
        return Reader(connection).read()


def test_http_password_is_asked_for_and_checked(guarded: Server) -> None:
    with target_that(mirror) as target, HttpClient(guarded) as client:
        challenge = client.ask(make_request(target))
        assert challenge.status == 407
        assert challenge.fields["proxy-authenticate"] == 'Basic realm="sockd"'
        assert challenge.fields["connection"] == "close"
    with target_that(mirror) as target, HttpClient(guarded) as client:
        for _ in range(2):
            answer = client.ask(make_request(target, "/", basic("alice", "wonderland")))
            assert answer.status == 200
        assert "authorization" not in target.seen[0].data.decode()
        address = client.client.address
    assert "username%alice@" in wait_for_line(guarded, address, "tcp/connect ]")
    assert "wonderland" not in guarded.text
    assert basic("alice", "wonderland").split()[-1] not in guarded.text


def test_http_strict_client_rule_asks_before_anything_is_judged(guarded: Server) -> None:
    """And on the same connection the answer may be given."""
    with target_that(mirror) as target:
        with contextlib.closing(guarded.connect(STRICT_CLIENT)) as connection:
            reader = Reader(connection)
            for number in range(2):
                connection.sendall(make_request(target, "/", method="HEAD" if number else "GET"))
                challenge = reader.read(has_body=number == 0)
                assert (challenge.status, challenge.fields.get("connection")) == (407, None)
            connection.sendall(make_request(target, "/", basic("alice", "wonderland")))
            assert reader.read().status == 200
        assert len(target.seen) == 1
        with contextlib.closing(guarded.connect(STRICT_CLIENT)) as connection:
            address = connection.getsockname()
            connection.sendall(make_request(target, "/", method="PUT", body=b"hello"))
            assert Reader(connection).read().fields["connection"] == "close"
        wait_for_line(guarded, address, "block(1): tcp/accept ]", "no acceptable authentication method")


WRONG_LOGINS = {
    "password": basic("alice", "wrong-sesame"),
    "user": basic("eve", "wrong-sesame"),
    "nobody": basic("", ""),
    "scheme": "Proxy-Authorization: Bearer wrong-sesame",
    "no base64": "Proxy-Authorization: Basic wrong-sesame:",
}


@pytest.mark.parametrize("name", WRONG_LOGINS)
@pytest.mark.parametrize("source", ["127.0.0.1", STRICT_CLIENT])
def test_http_wrong_password_gets_nowhere(guarded: Server, peer: StartPeer, name: str, source: str) -> None:
    origin = peer("origin")
    assert ask_from(guarded, source, make_request(origin, "/", WRONG_LOGINS[name])).status == 407
    assert origin.seen == []
    assert "wrong-sesame" not in guarded.text


@pytest.mark.parametrize(
    ("login", "host", "status"),
    [
        (basic("alice", "wonderland"), "127.0.0.1", 200),
        (basic("bob", "builder"), "127.0.0.1", 403),  # known, but not meant by the rule
        (basic("bob", "builder"), FREE_HOST, 200),
        (basic("bob", "wrong"), FREE_HOST, 407),
        ("X: y", FREE_HOST, 200),
        ("X: y", BLOCKED_HOST, 403),  # a password would not help
        (basic("alice", "wonderland"), BLOCKED_HOST, 403),
    ],
)
def test_http_rules_tell_users_apart(guarded: Server, login: str, host: str, status: int) -> None:
    with target_that(mirror, host) as target, HttpClient(guarded) as client:
        assert client.ask(make_request(target, "/", login)).status == status
        assert bool(target.seen) == (status == 200)


def test_http_each_request_is_its_users_own(guarded: Server) -> None:
    """A proxy before this one may send requests of several users on one connection."""
    with target_that(mirror) as target, HttpClient(guarded) as client:
        assert client.ask(make_request(target, "/", basic("alice", "wonderland"))).status == 200
        assert client.ask(make_request(target, "/", basic("bob", "builder"))).status == 403
    with target_that(mirror) as target, HttpClient(guarded) as client:
        assert client.ask(make_request(target, "/", basic("alice", "wonderland"))).status == 200
        assert client.ask(make_request(target)).status == 407
        assert len(target.seen) == 1


def test_http_password_may_be_one_that_pam_knows(sockd: Any, private_world: World, tmp_path: Path) -> None:
    login_peers.need_pam()
    world = login_peers.write_pam_services(private_world, tmp_path / "pam")
    head = IPV4_HEAD.replace("socksmethod: none", "socksmethod: pam.username")
    head += "login.penalty: no\nuser.privileged: root\nuser.unprivileged: nobody\n"
    passed = rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http", "pam.servicename: pwdfile", LOG)
    server = sockd(head + CLIENT_PASS + passed, world=world)
    with target_that(mirror) as target, HttpClient(server) as client:
        assert client.ask(make_request(target)).status == 407
        assert client.ask(make_request(target, "/", basic("paula", "paula-pw"))).status == 200
        assert client.ask(make_request(target, "/", basic("paula", "wrong-pw"))).status == 407
        client.expect_end()
        address = client.client.address
        assert len(target.seen) == 1
    assert "pam.username%paula@" in wait_for_line(server, address, "tcp/connect ]")
    assert "-pw" not in server.text


def test_http_wrong_passwords_slow_down_their_source(
    sockd: Any, private_world: World, peer: StartPeer, tmp_path: Path
) -> None:
    (tmp_path / "passwords").write_text(f"alice:{hash_with('-5', 'wonderland')}\n")
    config = (
        HEAD.replace("socksmethod: none", "socksmethod: username")
        + f"passwordfile: {tmp_path / 'passwords'}\n" + CLIENT_PASS
        + rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http", LOG)
    )  # fmt: skip
    server, origin = sockd(config, world=private_world), peer("origin")
    for _ in range(11):
        request = make_request(origin, "/", basic("alice", "wrong"))
        assert ask_from(server, "127.0.0.1", request).status == 407
    wait_for_record(server, "wrong log-ins from 127.0.0.1: slowing it down")
    assert origin.seen == []


# ------------------------------ through other proxies ------------------------------

EVERY_LANGUAGE = "proxyprotocol: socks_v4 socks_v5 http"


@pytest.mark.parametrize("protocol", ["socks_v5", "socks_v4", "http"])
def test_http_goes_through_upstreams(
    sockd: Any, private_world: World, peer: StartPeer, protocol: str
) -> None:
    """Both kinds of requests, to addresses and to names."""
    passed = rule("socks pass", "from: 0/0 to: 0/0", EVERY_LANGUAGE, "command: connect", LOG)
    last = sockd(IPV4_HEAD + CLIENT_PASS + passed, world=private_world)
    way = route(last.addresses[0], proxyprotocol=protocol)
    first = sockd(IPV4_HEAD + CLIENT_PASS + passed + way, world=private_world)
    echo = peer("echo")
    with target_that(mirror) as target, HttpClient(first) as client:
        for host in ("127.0.0.1", "echo.test"):
            answer = client.ask(make_request(f"{host}:{target.port}", "/a", method="PUT", body=b"hello"))
            assert answer.body == b"PUT /a HTTP/1.1\nhello"
        assert client.ask(make_connect(echo), has_body=False).status == 200
        assert client.client.exchange(b"through") == b"through"
        address = client.client.address
    assert f" 127.0.0.1.{last.port} [" in wait_for_line(first, address, "tcp/connect [")
    assert len([m for m in last.messages if "tcp/connect [" in m]) == 3


def test_http_upstream_that_is_dead_has_a_page(sockd: Any, private_world: World, peer: StartPeer) -> None:
    passed = rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http", "command: connect", LOG)
    way = route(peer("refuser").address, proxyprotocol="socks_v5")
    server = sockd(IPV4_HEAD + CLIENT_PASS + passed + way, world=private_world)
    for request in (make_request("192.0.2.80:80"), b"CONNECT 192.0.2.80:80 HTTP/1.1\r\n\r\n"):
        with HttpClient(server) as client:
            assert client.ask(request).status == 502
            client.expect_end()


def test_http_login_is_handed_on_to_the_upstream(sockd: Any, private_world: World, tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text(f"alice:{hash_with('-5', 'wonderland')}\n")
    head = IPV4_HEAD.replace("socksmethod: none", "socksmethod: username")
    head += f"passwordfile: {tmp_path / 'passwords'}\n"
    passed = rule("socks pass", "from: 0/0 to: 0/0", EVERY_LANGUAGE, "command: connect", LOG)
    last = sockd(head + CLIENT_PASS + passed, world=private_world)
    way = route(last.addresses[0], proxyprotocol="socks_v5", method="username")
    first = sockd(head + CLIENT_PASS + passed + way, world=private_world)
    with target_that(mirror) as target, HttpClient(first) as client:
        assert client.ask(make_request(target, "/", basic("alice", "wonderland"))).status == 200
    wait_for_record(last, "tcp/connect ]", "username%alice@")
    assert "wonderland" not in first.text + last.text


# ------------------------------ many ------------------------------


def test_http_requests_are_sessions_for_a_monitor(sockd: Any, private_world: World) -> None:
    """Each counts while it lasts: a connection that waits for the next request is none."""
    monitor = rule("monitor", "from: 0/0 to: 0/0", "protocol: tcp", "internal.alarm.data.recv: 10 in 1")
    passed = rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http", LOG)
    config = IPV4_HEAD + CLIENT_PASS + passed + monitor
    server = sockd(config, world=private_world)
    wait_for_record(server, "alarm/data [")
    with target_that(mirror) as target, HttpClient(server) as client:

        def is_over() -> bool:
            assert client.ask(make_request(target)).status == 200
            return any("alarm/data ]" in message for message in server.messages)

        eventually(is_over)
        eventually(lambda: [m for m in server.messages if "alarm/data [" in m][1:])
    assert "Session count: 0" in [m for m in server.messages if "alarm/data [" in m][1]


def test_http_sessions_count_under_the_limits_of_their_rule(sockd: Any, private_world: World) -> None:
    config = IPV4_HEAD + CLIENT_PASS + rule(
        "socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http", "session.max: 1", LOG
    )  # fmt: skip
    server = sockd(config, world=private_world)
    with target_that(mirror) as target, HttpClient(server) as first, HttpClient(server) as second:
        for _ in range(3):
            assert first.ask(make_request(target)).status == 200
        assert second.ask(make_request(target)).status == 403
        first.client.close()

        def passes() -> bool:
            with HttpClient(server) as third:
                return third.ask(make_request(target)).status == 200

        eventually(passes)


def test_http_bodies_share_the_bandwidth_of_their_rule(sockd: Any, private_world: World) -> None:
    """What a rule gives beyond its rate is a tenth of a second's, and a turn."""
    config = IPV4_HEAD + CLIENT_PASS + rule(
        "socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http", "bandwidth: 400000", "timeout.io: 1", LOG
    )  # fmt: skip
    server, data = sockd(config, world=private_world), pattern(200_000)
    with target_that(mirror) as target, HttpClient(server) as client:
        began = time.monotonic()
        for _ in range(2):
            body = client.ask(make_request(target, method="PUT", body=data)).body
            assert body.endswith(data)
        assert time.monotonic() - began > 1.6
        assert client.ask(make_request(target)).status == 200


def test_http_many_clients_at_a_time(server: Server) -> None:
    with target_that(mirror) as target:

        def use(number: int) -> None:
            with HttpClient(server) as client:
                for turn in range(10):
                    body = pattern(1000 * number + turn)
                    answer = client.ask(make_request(target, f"/{turn}", method="PUT", body=body))
                    assert answer.body == f"PUT /{turn} HTTP/1.1\n".encode() + body

        run_all([functools.partial(use, number) for number in range(1, 21)])


def test_http_sessions_end_when_the_server_stops(sockd: Any, private_world: World) -> None:
    server = sockd(CONFIG, world=private_world)

    def behaviour(connection: socket.socket, seen: Seen) -> None:
        Reader(connection).read()
        receive(connection, seen)

    with target_that(behaviour) as target, HttpClient(server) as busy, HttpClient(server) as idle:
        busy.send(make_request(target))
        with target_that(mirror) as quick:
            assert idle.ask(make_request(quick)).status == 200
        eventually(lambda: target.seen)
        addresses = busy.client.address, idle.client.address
        assert server.stop() == 0
    for address in addresses:
        assert "administrative termination" in wait_for_line(server, address, "tcp/accept ]")


# ------------------------------ anything at all ------------------------------


def test_http_conversation_of_any_bytes_ends(server: Server, peer: StartPeer) -> None:
    """Requests that were changed at random, in pieces cut at random; the server serves the next client."""
    chance = random.Random(9112)
    noise = [b"\r\n", b"\n", b"\0", b" ", b":", b"Content-Length: 7\r\n", b"0\r\n\r\n", CHUNKED]
    with target_that(mirror) as target:
        chunked = make_request(target, "/b", "Transfer-Encoding: chunked", method="POST")
        samples = [
            make_request(target, "/a", method="PUT", body=b"hello"),
            chunked + b"5\r\nhello\r\n0\r\n\r\n",
            make_request(target, "/c", "Connection: close"),
            make_connect(peer("discard")) + b"data",
        ]
        for number in range(150):
            data = bytearray(b"".join(chance.choices(samples, k=3)))
            for _ in range(chance.randint(1, 3)):
                place = chance.randrange(len(data))
                data[place : place + chance.randint(0, 2)] = chance.choice(noise)
            with Client(server.addresses[0], random_splits(number)) as client, contextlib.suppress(OSError):
                client.send(bytes(data))
                client.finish_sending()
                client.receive_all()
        with HttpClient(server) as good:
            assert good.ask(make_request(target)).status == 200
