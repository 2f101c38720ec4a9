"""HTTP in section 6, Wire: what a request or response means, and everything that is refused."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable

import pytest

import sockd
from sockd import CHUNKED, UNTIL_END, Endpoint, HttpError

FUZZ_INPUTS = 5_000


def make_head(first: str, *fields: str) -> bytes:
    """Put a head together."""
    return "\r\n".join([first, *fields, "", ""]).encode("latin-1")


def get(uri: str = "http://a.example/", *fields: str, host: str = "Host: a.example") -> bytes:
    """Make a GET with a Host."""
    return make_head(f"GET {uri} HTTP/1.1", host, *fields)


def passed_on(head: bytes) -> list[str]:
    """Give the lines that a target gets for a request."""
    return sockd.encode_http_request(sockd.decode_http_request(head)).decode("latin-1").split("\r\n")


# ------------------------------ what a request asks for ------------------------------

URIS = [
    ("http://a.example/", Endpoint("a.example", 80, 0), "/"),
    ("http://a.example", Endpoint("a.example", 80, 0), "/"),
    ("HTTP://A.Example/b?c=d&e", Endpoint("A.Example", 80, 0), "/b?c=d&e"),
    ("http://a.example?c", Endpoint("a.example", 80, 0), "/?c"),
    ("http://a.example:8080/b//c/../d", Endpoint("a.example", 8080, 0), "/b//c/../d"),
    ("http://a_b.example./%00", Endpoint("a_b.example.", 80, 0), "/%00"),
    ("http://192.0.2.1:65535/", Endpoint("192.0.2.1", 65535, 4), "/"),
    ("http://[2001:DB8::1]/", Endpoint("2001:db8::1", 80, 6), "/"),
    ("http://[2001:db8:0:0:0:0:0:1]:1/", Endpoint("2001:db8::1", 1, 6), "/"),
    ("http://[::ffff:127.0.0.1]/", Endpoint("127.0.0.1", 80, 4), "/"),
    ("http://[::ffff:7f00:1]/", Endpoint("127.0.0.1", 80, 4), "/"),
    ("http://[::127.0.0.1]/", Endpoint("::127.0.0.1", 80, 6), "/"),
    ("http://127.1/", Endpoint("127.1", 80, 0), "/"),  # judged by what it resolves to
    ("http://a.example/\xe4", Endpoint("a.example", 80, 0), "/\xe4"),
]


@pytest.mark.parametrize(("uri", "target", "path"), URIS)
def test_http_uri_is_taken_apart(uri: str, target: Endpoint, path: str) -> None:
    request = sockd.decode_http_request(get(uri))
    assert (request.target, request.path) == (target, path)


AUTHORITIES = [
    ("a.example:443", Endpoint("a.example", 443, 0)),
    ("192.0.2.1:22", Endpoint("192.0.2.1", 22, 4)),
    ("[2001:db8::1]:443", Endpoint("2001:db8::1", 443, 6)),
    ("[::FFFF:192.0.2.1]:443", Endpoint("192.0.2.1", 443, 4)),
]


@pytest.mark.parametrize(("authority", "target"), AUTHORITIES)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_http_connect_is_taken_apart(authority: str, target: Endpoint, version: str) -> None:
    request = sockd.decode_http_request(make_head(f"CONNECT {authority} HTTP/{version}"))
    assert (request.method, request.target, request.path) == ("CONNECT", target, "")


def test_http_options_without_a_path_asks_the_whole_server() -> None:
    assert passed_on(make_head("OPTIONS http://a.example HTTP/1.1", "Host: x"))[0] == "OPTIONS * HTTP/1.1"
    assert passed_on(make_head("OPTIONS http://a.example/ HTTP/1.1", "Host: x"))[0] == "OPTIONS / HTTP/1.1"


# ------------------------------ what is refused ------------------------------

TE = "Transfer-Encoding: chunked"
REFUSED: dict[str, tuple[bytes, int]] = {
    # the request line
    "no uri": (make_head("GET HTTP/1.1", "Host: a"), 400),
    "two blanks": (make_head("GET  http://a/ HTTP/1.1", "Host: a"), 400),
    "tab": (make_head("GET\thttp://a/ HTTP/1.1", "Host: a"), 400),
    "blank in uri": (make_head("GET http://a/ b HTTP/1.1", "Host: a"), 400),
    "blank behind": (make_head("GET http://a/ HTTP/1.1 ", "Host: a"), 400),
    "no version": (make_head("GET http://a/", "Host: a"), 400),
    "lower-case version": (make_head("GET http://a/ http/1.1", "Host: a"), 400),
    "wrong version": (make_head("GET http://a/ HTTP/1.11", "Host: a"), 400),
    "version 0.9": (make_head("GET http://a/ HTTP/0.9", "Host: a"), 505),
    "version 2": (make_head("PRI * HTTP/2.0"), 505),
    "no token": (make_head("G(T http://a/ HTTP/1.1", "Host: a"), 400),
    "control in uri": (make_head("GET http://a/\x01 HTTP/1.1", "Host: a"), 400),
    # the target
    "origin form": (get("/index.html"), 400),
    "asterisk": (make_head("OPTIONS * HTTP/1.1", "Host: a"), 400),
    "authority in GET": (get("a.example:80"), 400),
    "https": (get("https://a.example/"), 501),
    "ftp": (get("ftp://a.example/"), 501),
    "no host": (get("http:///"), 400),
    "port alone": (get("http://:80/"), 400),
    "fragment": (get("http://a.example/b#c"), 400),
    "userinfo": (get("http://user:pass@a.example/"), 400),
    "empty userinfo": (get("http://@a.example/"), 400),
    "userinfo in CONNECT": (make_head("CONNECT u@a.example:443 HTTP/1.1"), 400),
    "backslash": (get("http://a.example\\@b.example/"), 400),
    "percent in host": (get("http://a%2eexample/"), 400),
    "letter of no ASCII in host": (get("http://\xe4.example/"), 400),
    "comma": (get("http://a.example,b.example/"), 400),
    "port 0": (get("http://a.example:0/"), 400),
    "port empty": (get("http://a.example:/"), 400),
    "port too high": (get("http://a.example:65536/"), 400),
    "port long": (get("http://a.example:000080/"), 400),
    "port signed": (get("http://a.example:+80/"), 400),
    "port negative": (get("http://a.example:-80/"), 400),
    "port twice": (get("http://a.example:80:80/"), 400),
    "port hexadecimal": (get("http://a.example:0x50/"), 400),
    "zone": (get("http://[fe80::1%25lo]/"), 400),
    "bracket open": (get("http://[::1/"), 400),
    "IPv6 bare": (get("http://::1/"), 400),
    "IPv6 wrong": (get("http://[::1::]/"), 400),
    "IPv4 in brackets": (get("http://[127.0.0.1]/"), 400),
    "future address": (get("http://[v1.a]/"), 400),
    "CONNECT without port": (make_head("CONNECT a.example HTTP/1.1"), 400),
    "CONNECT port 0": (make_head("CONNECT a.example:0 HTTP/1.1"), 400),
    "CONNECT with uri": (make_head("CONNECT http://a.example:80/ HTTP/1.1"), 400),
    "CONNECT with path": (make_head("CONNECT a.example:80/ HTTP/1.1"), 400),
    "CONNECT with a body": (make_head("CONNECT a.example:80 HTTP/1.1", "Content-Length: 5"), 400),
    "CONNECT with chunks": (make_head("CONNECT a.example:80 HTTP/1.1", TE), 400),
    # Host
    "no Host": (make_head("GET http://a/ HTTP/1.1"), 400),
    "two Hosts": (get("http://a.example/", "Host: a.example"), 400),
    # fields
    "folded": (get("http://a/", "X: a", " b"), 400),
    "folded by a tab": (get("http://a/", "X: a", "\tb"), 400),
    "folded first": (make_head("GET http://a/ HTTP/1.1", " X: a", "Host: a"), 400),
    "blank before the colon": (get("http://a/", "Content-Length : 5"), 400),
    "tab before the colon": (get("http://a/", "Transfer-Encoding\t: chunked"), 400),
    "no colon": (get("http://a/", "Hello"), 400),
    "no name": (get("http://a/", ": a"), 400),
    "NUL in name": (get("http://a/", "X\0: a"), 400),
    "NUL in value": (get("http://a/", "X: a\0b"), 400),
    "bare CR": (get("http://a/", "X: a\rContent-Length: 5"), 400),
    "DEL": (get("http://a/", "X: \x7f"), 400),
    "letter of no ASCII in name": (get("http://a/", "\xe4: a"), 400),
    # the length of the body
    "both lengths": (get("http://a/", "Content-Length: 5", TE), 400),
    "both lengths, other order": (get("http://a/", TE, "Content-Length: 5"), 400),
    "two lengths": (get("http://a/", "Content-Length: 5", "Content-Length: 6"), 400),
    "two equal lengths": (get("http://a/", "Content-Length: 5", "content-length: 5"), 400),
    "list of lengths": (get("http://a/", "Content-Length: 5, 5"), 400),
    "length signed": (get("http://a/", "Content-Length: +5"), 400),
    "length negative": (get("http://a/", "Content-Length: -5"), 400),
    "length hexadecimal": (get("http://a/", "Content-Length: 0x5"), 400),
    "length with underscore": (get("http://a/", "Content-Length: 1_0"), 400),
    "length of other digits": (get("http://a/", "Content-Length: \xb2"), 400),
    "length empty": (get("http://a/", "Content-Length:"), 400),
    "length with blank": (get("http://a/", "Content-Length: 1 0"), 400),
    "length huge": (get("http://a/", "Content-Length: " + "9" * 30), 400),
    "chunked twice": (get("http://a/", TE, TE), 501),
    "chunked list": (get("http://a/", "Transfer-Encoding: chunked, chunked"), 501),
    "gzip": (get("http://a/", "Transfer-Encoding: gzip, chunked"), 501),
    "identity": (get("http://a/", "Transfer-Encoding: identity"), 501),
    "xchunked": (get("http://a/", "Transfer-Encoding: xchunked"), 501),
    "quoted chunked": (get("http://a/", 'Transfer-Encoding: "chunked"'), 501),
    "chunked with VT": (get("http://a/", "Transfer-Encoding: \x0bchunked"), 400),
    "empty coding": (get("http://a/", "Transfer-Encoding:"), 501),
    "chunked in 1.0": (make_head("POST http://a/ HTTP/1.0", TE), 400),
    # others
    "expectation": (get("http://a/", "Expect: 200-ok"), 417),
    "two log-ins": (get("http://a/", *["Proxy-Authorization: Basic YTpi"] * 2), 400),
    "NUL in password": (
        get("http://a/", "Proxy-Authorization: Basic " + base64.b64encode(b"a:b\0c").decode()), 400,
    ),
    "long user": (
        get("http://a/", "Proxy-Authorization: Basic " + base64.b64encode(b"a" * 256 + b":b").decode()), 400,
    ),
    "TRACE to the proxy": (make_head("TRACE http://a/ HTTP/1.1", "Host: a", "Max-Forwards: 0"), 501),
    "wrong forwards": (make_head("OPTIONS http://a/ HTTP/1.1", "Host: a", "Max-Forwards: x"), 400),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_http_request_is_refused(name: str) -> None:
    head, status = REFUSED[name]
    with pytest.raises(HttpError) as caught:
        sockd.decode_http_request(head)
    assert caught.value.status == status
    assert status in sockd.HTTP_PAGES


def test_http_errors_do_not_repeat_what_was_sent() -> None:
    for head, _ in REFUSED.values():
        with pytest.raises(HttpError) as caught:
            sockd.decode_http_request(head.replace(b"X", b"Sesame"))
        assert "esame" not in str(caught.value)


# ------------------------------ what the target gets ------------------------------


def test_http_target_gets_the_host_of_the_uri() -> None:
    lines = passed_on(get("http://b.example:81/c", host="Host: a.example"))
    assert lines[:2] == ["GET /c HTTP/1.1", "Host: b.example:81"]
    assert not any("a.example" in line for line in lines)


def test_http_target_gets_nothing_that_was_meant_for_the_proxy() -> None:
    dropped = [
        "Proxy-Authorization: Basic YTpi", "Proxy-Connection: keep-alive", "Keep-Alive: 5", "TE: trailers",
        "Trailer: X", "Upgrade: websocket", "HTTP2-Settings: abc", "Connection: x-mine, Keep-Alive",
        "connection: X-Yours", "X-Mine: 1", "x-yours: 2",
    ]  # fmt: skip
    kept = ["Authorization: Basic YTpi", "Cookie: a=b", "Cookie: c=d", "X: \xe4\t(", "Expect: 100-continue"]
    lines = passed_on(get("http://a.example/", *dropped, *kept))
    assert lines == [
        "GET / HTTP/1.1", "Host: a.example", *kept, "Via: 1.1 sockd", "Connection: close", "", "",
    ]  # fmt: skip


def test_http_connection_field_cannot_take_host_and_length_away() -> None:
    lines = passed_on(get("http://a.example/", "Connection: Host, Content-Length, Via", "Content-Length: 5"))
    assert lines[1:-2] == ["Host: a.example", "Via: 1.1 sockd", "Content-Length: 5", "Connection: close"]


@pytest.mark.parametrize(
    ("field", "length", "sent"),
    [
        ("Content-Length: 007", 7, "Content-Length: 7"),
        ("Content-Length: 0", 0, "Content-Length: 0"),
        ("Transfer-Encoding: Chunked", CHUNKED, "Transfer-Encoding: chunked"),
    ],
)
def test_http_length_is_spelled_anew(field: str, length: int, sent: str) -> None:
    assert sockd.decode_http_request(get("http://a/", field)).length == length
    assert sent in passed_on(get("http://a/", field))


def test_http_1_0_is_passed_on_as_1_1_without_its_expectations() -> None:
    lines = passed_on(make_head("GET http://a.example/ HTTP/1.0", "Expect: 100-continue"))
    assert lines == ["GET / HTTP/1.1", "Host: a.example", "Via: 1.0 sockd", "Connection: close", "", ""]


def test_http_forwards_are_counted_down() -> None:
    head = make_head("TRACE http://a.example/ HTTP/1.1", "Host: a.example", "Max-Forwards: 10")
    assert "Max-Forwards: 9" in passed_on(head)
    assert "Max-Forwards: 10" in passed_on(get("http://a.example/", "Max-Forwards: 10"))


@pytest.mark.parametrize(
    ("head", "persists"),
    [
        (get(), True),
        (get("http://a/", "Connection: close"), False),
        (get("http://a/", "Connection: x", "connection: y,CLOSE"), False),
        (make_head("GET http://a/ HTTP/1.0", "Connection: keep-alive"), False),
        (make_head("GET http://a/ HTTP/1.2", "Host: a"), True),
    ],
)
def test_http_connection_persists(head: bytes, persists: bool) -> None:
    assert sockd.decode_http_request(head).persists is persists


@pytest.mark.parametrize(
    ("value", "login"),
    [
        ("Basic YWxpY2U6d29uZGVyOmxhbmQ=", ("alice", b"wonder:land")),
        ("bAsIc  YTo=", ("a", b"")),
        ("Basic w6Q6w7Y=", ("\xc3\xa4", b"\xc3\xb6")),
        ("Basic YWxpY2U=", None),  # no colon
        ("Basic ?", None),
        ("Basic YTpi YTpi", None),
        ("Basic YTp", None),
        ("Bearer YTpi", None),
        ("Basic", None),
    ],
)
def test_http_login(value: str, login: tuple[str, bytes] | None) -> None:
    assert sockd.decode_http_request(get("http://a/", f"Proxy-Authorization: {value}")).login == login


# ------------------------------ where a head ends ------------------------------


def test_http_head_ends_where_it_ends_however_it_comes() -> None:
    head = get("http://a.example/", "X: " + "y" * 300)
    data, looked_at = bytearray(), 0
    for byte in head + b"rest":
        data.append(byte)
        end = sockd.find_head_end(data, looked_at)
        assert end == (len(head) if len(data) >= len(head) else 0)
        looked_at = 0 if end else len(data)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\n\n", b"A\r\nB: c\nD: e\r\n\r\n", b"\n", b"A\r\r\n\n"])
@pytest.mark.parametrize("step", [1, 1000])
def test_http_line_that_ends_with_lf_alone_is_refused(data: bytes, step: int) -> None:
    with pytest.raises(HttpError, match="CR LF"):
        for end in range(step, len(data) + step, step):
            assert sockd.find_head_end(bytearray(data[:end]), end - step) == 0


def test_http_head_has_a_bound() -> None:
    head = get("http://a/", "X: " + "y" * sockd.HTTP_HEAD_BYTES)
    for data in (head, head[: sockd.HTTP_HEAD_BYTES + 1]):
        with pytest.raises(HttpError) as caught:
            sockd.find_head_end(bytearray(data), 0)
        assert caught.value.status == 431
    assert sockd.find_head_end(bytearray(head[: sockd.HTTP_HEAD_BYTES]), 0) == 0


# ------------------------------ responses ------------------------------


def answered(head: bytes, method: str = "GET", minor: int = 1, persists: bool = True) -> list[str]:
    """Give the lines that a client gets for a response."""
    response = sockd.decode_http_response(head, method)
    return sockd.encode_http_response(response, minor, persists).decode("latin-1").split("\r\n")


@pytest.mark.parametrize(
    ("first", "fields", "method", "length", "told"),
    [
        ("HTTP/1.1 200 OK", ["Content-Length: 5"], "GET", 5, ["Content-Length: 5"]),
        ("HTTP/1.1 200 OK", [TE], "GET", CHUNKED, ["Transfer-Encoding: chunked"]),
        ("HTTP/1.1 200", [], "GET", UNTIL_END, []),
        ("HTTP/1.0 200 ", [], "GET", UNTIL_END, []),
        ("HTTP/1.1 200 OK", ["Content-Length: 5"], "HEAD", 0, ["Content-Length: 5"]),
        ("HTTP/1.1 200 OK", [], "HEAD", 0, []),
        ("HTTP/1.1 304 Not Modified", ["Content-Length: 5"], "GET", 0, ["Content-Length: 5"]),
        ("HTTP/1.1 204 No Content", ["Content-Length: 5"], "GET", 0, []),
        ("HTTP/1.1 100 Continue", [], "POST", 0, []),
    ],
)
def test_http_response_has_its_length(
    first: str, fields: list[str], method: str, length: int, told: list[str]
) -> None:
    head = make_head(first, *fields)
    assert sockd.decode_http_response(head, method).length == length
    lines = answered(head, method)
    assert [line for line in lines if line.startswith(("Content-Length", "Transfer-Encoding"))] == told
    assert lines[0].split(" ")[:2] == ["HTTP/1.1", first.split(" ")[1]]


def test_http_client_gets_nothing_that_was_meant_for_the_proxy() -> None:
    dropped = [
        "Connection: close, X-Mine", "X-Mine: 1", "Keep-Alive: 5", "Proxy-Authenticate: Basic realm=x",
        "Upgrade: h2c", "Trailer: X", "Proxy-Connection: close",
    ]  # fmt: skip
    kept = ["Set-Cookie: a=b", "Set-Cookie: c=d", "Server: x", "WWW-Authenticate: Basic realm=x"]
    lines = answered(make_head("HTTP/1.0 401 No", *dropped, *kept, "Content-Length: 0"), persists=False)
    assert lines[1:-2] == [*kept, "Via: 1.0 sockd", "Content-Length: 0", "Connection: close"]


WRONG_RESPONSES = {
    "version 2": "HTTP/2 200 OK",
    "no version": "200 OK",
    "status of two digits": "HTTP/1.1 20 OK",
    "status 000": "HTTP/1.1 000 OK",
    "status 600": "HTTP/1.1 600 OK",
    "change of protocols": "HTTP/1.1 101 Switching Protocols",
    "asks for the proxy's password": "HTTP/1.1 407 Give it to me",
    "control in reason": "HTTP/1.1 200 \x1b[2J",
    "both lengths": f"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n{TE}",
    "two lengths": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6",
    "chunked in 1.0": f"HTTP/1.0 200 OK\r\n{TE}",
    "gzip": "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip",
    "folded": "HTTP/1.1 200 OK\r\nX: a\r\n b",
    "blank before the colon": "HTTP/1.1 200 OK\r\nContent-Length : 5",
    "NUL": "HTTP/1.1 200 OK\r\nX: \0",
}


@pytest.mark.parametrize("name", WRONG_RESPONSES)
def test_http_response_is_refused(name: str) -> None:
    with pytest.raises(HttpError):
        sockd.decode_http_response(make_head(WRONG_RESPONSES[name]), "GET")


@pytest.mark.parametrize("status", sockd.HTTP_PAGES)
def test_http_error_is_a_response_that_stands_for_itself(status: int) -> None:
    data = sockd.encode_http_error(status, "GET", False)
    head, _, page = data.partition(b"\r\n\r\n")
    response = sockd.decode_http_response(head.replace(b" 407 ", b" 403 ") + b"\r\n\r\n", "GET")
    assert response.length == len(page)
    assert b"Connection: close" in head
    assert (b"Proxy-Authenticate: Basic" in head) == (status == 407)
    assert sockd.encode_http_error(status, "HEAD", False) == head + b"\r\n\r\n"


# ------------------------------ bodies ------------------------------


def take_all(data: bytes, length: int, step: int) -> tuple[bytes, bytes, bool]:
    """Feed a body in pieces; give its content, what is behind it, and whether it has ended."""
    body, pending, content = sockd.make_body(length), bytearray(), b""
    for start in range(0, len(data), step):
        pending += data[start : start + step]
        if not body.finished:
            content += body.take(pending)
    return content, bytes(pending), body.finished


CHUNKS = b"5\r\nhello\r\n00A;name=value\r\n, world!\r\n\r\n0;x\r\nTrailer: y\r\nZ: z\r\n\r\n"
BODIES = [
    (b"hello", 5, b"hello", True),
    (b"hello", 0, b"", True),
    (b"hell", 5, b"hell", False),
    (CHUNKS, CHUNKED, b"hello, world!\r\n", True),
    (CHUNKS[:-2], CHUNKED, b"hello, world!\r\n", False),
    (b"0\r\n\r\n", CHUNKED, b"", True),
    (b"hello", UNTIL_END, b"hello", False),
]


@pytest.mark.parametrize(("data", "length", "content", "finished"), BODIES)
@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_http_body_ends_where_it_ends(
    data: bytes, length: int, content: bytes, finished: bool, step: int
) -> None:
    behind = b"GET next" if finished else b""
    got, rest, ended = take_all(data + behind, length, step)
    if finished:
        assert (got, ended) == (content, True)
        assert rest == (data + behind)[-len(rest) :] if length == 0 else rest == b"GET next"
    else:
        assert (got, ended) == (content, False)


WRONG_CHUNKS = {
    "no size": b"\r\n",
    "no digit": b"g\r\n",
    "signed": b"+5\r\nhello\r\n",
    "negative": b"-5\r\nhello\r\n",
    "hexadecimal mark": b"0x5\r\nhello\r\n",
    "blank before": b" 5\r\nhello\r\n",
    "blank behind": b"5 \r\nhello\r\n",
    "underscore": b"1_0\r\n",
    "huge": b"f" * 16 + b"\r\n",
    "wrap-around": b"1" + b"0" * 16 + b"5\r\nhello\r\n",
    "LF alone": b"5\nhello\r\n",
    "CR alone": b"5\rhello\r\n",
    "shorter than it is": b"5\r\nhello!\r\n",
    "longer than it is": b"5\r\nhell\r\n0\r\n\r\n",
    "LF behind": b"5\r\nhello\n0\r\n\r\n",
    "NUL in extension": b"5;\0\r\nhello\r\n",
    "LF in extension": b"5;a\n0\r\n\r\nhello\r\n",
    "long extension": b"5;" + b"a" * 2000 + b"\r\nhello\r\n",
    "endless extension": b"5;" + b"a" * 2000,
    "many extensions": (b"1;" + b"a" * 900 + b"\r\nx\r\n") * 80,
    "folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "wrong trailer": b"0\r\nhello\r\n\r\n",
    "LF in trailer": b"0\r\n\n",
    "long trailer": b"0\r\n" + (b"A: " + b"b" * 900 + b"\r\n") * 80,
    "endless trailer": b"0\r\nA: " + b"b" * 2000,
}


@pytest.mark.parametrize("name", WRONG_CHUNKS)
@pytest.mark.parametrize("step", [1, 100_000])
def test_http_chunk_is_refused(name: str, step: int) -> None:
    with pytest.raises(HttpError):
        take_all(WRONG_CHUNKS[name], CHUNKED, step)


def test_http_chunks_are_made_that_can_be_read() -> None:
    data = sockd.encode_chunk(b"hello", False) + sockd.encode_chunk(b"", False)
    data += sockd.encode_chunk(b"x" * 20, True)
    assert take_all(data, CHUNKED, 3) == (b"hello" + b"x" * 20, b"", True)
    assert sockd.encode_chunk(b"", True) == b"0\r\n\r\n"


# ------------------------------ at random ------------------------------


def mutate(chance: random.Random, data: bytes) -> bytes:
    """Change, drop, double or put in a few bytes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(changed) or 1)
        piece = chance.choice([b"\r", b"\n", b"\r\n", b" ", b":", b"\0", b"\t", b",", b";", b"0", b"\xff"])
        changed[place : place + chance.randint(0, 3)] = chance.choice([b"", piece, piece + piece])
    return bytes(changed)


READERS: list[tuple[bytes, Callable[[bytes], object]]] = [
    (get("http://a.example:8/b", "Content-Length: 5", "Connection: x"), sockd.decode_http_request),
    (make_head("CONNECT [::1]:443 HTTP/1.1", "Host: x"), sockd.decode_http_request),
    (make_head("HTTP/1.1 200 OK", TE), lambda head: sockd.decode_http_response(head, "GET")),
    (CHUNKS, lambda data: take_all(data, CHUNKED, 1000)),
]


@pytest.mark.parametrize(("sample", "read"), READERS)
def test_http_of_any_bytes_is_understood_or_refused(sample: bytes, read: Callable[[bytes], object]) -> None:
    chance, refused = random.Random(9112), 0
    for _ in range(FUZZ_INPUTS):
        try:
            read(mutate(chance, sample))
        except HttpError:
            refused += 1
    assert 0 < refused < FUZZ_INPUTS


def test_http_request_that_is_passed_on_is_read_as_one_by_others() -> None:
    """Whatever is put in, what comes out has one line end for each line, and one length."""
    chance = random.Random(9110)
    sample = get("http://a.example/b", "Content-Length: 5", "X: y")
    for _ in range(FUZZ_INPUTS):
        try:
            request = sockd.decode_http_request(mutate(chance, sample))
        except HttpError:
            continue
        data = sockd.encode_http_request(request)
        assert data.count(b"\r\n\r\n") == 1
        assert data.endswith(b"\r\n\r\n")
        lines = data[:-4].split(b"\r\n")
        assert not any(b"\r" in line or b"\n" in line or b"\0" in line for line in lines)
        names = [line.partition(b":")[0].lower() for line in lines[1:]]
        assert names.count(b"host") == 1
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
