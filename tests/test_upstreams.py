"""Routes with the real program: upstreams of every protocol, dead ones, hostile ones, and ones of others."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_gssapi_upstreams
from client import BIND, CONNECT, GRANTED, NO_METHOD, PASSWORD_METHOD, Client, UdpClient, wrap
from conftest import Factory
from more_peers import NameServer, rule, run_all, wait_for_line, wait_for_record, world_that_asks
from peers import Seen, TcpPeer
from servers import Server, Sockd, World, check_configuration, eventually, need_danted
from test_clients import (
    SSH_USER,
    sshd,  # noqa: F401 (a fixture)
)
from upstreams import (
    FRIENDLY,
    HEAD,
    LOG,
    METHOD_NONE,
    PASS,
    REPLY4,
    REPLY5,
    Action,
    Theatre,
    answers,
    close,
    direct,
    drip,
    fetch,
    hang_up_hard,
    microsocks,
    repeat,
    route,
    running,
    say_nothing,
    tinyproxy,
    upstream,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("private_world")]
StartPeer = Callable[..., Any]

REFUSED, UNREACHABLE, NO_ROUTE, LATE, FORBIDDEN = 5, 4, 3, 6, 2
TARGET = ("192.0.2.80", 80)  # for upstreams that only pretend


@pytest.fixture(params=["sockd", "danted"])
def chaining(request: pytest.FixtureRequest) -> Factory:
    """The server that chains: each test with it holds for both."""
    if request.param == "danted":
        request.applymarker(pytest.mark.dante)
    factory: Factory = request.getfixturevalue(request.param)
    return factory


# ------------------------------ what both servers do ------------------------------


@pytest.mark.parametrize(
    ("protocol", "version", "host", "sent"),
    [
        ("socks_v5", 5, "192.0.2.80", [b"\5\1\0", b"\5\1\0\1\xc0\0\2\x50\0\x50"]),
        ("socks_v5", 4, "192.0.2.80", [b"\5\1\0", b"\5\1\0\1\xc0\0\2\x50\0\x50"]),
        ("socks_v5", 5, "echo.test", [b"\5\1\0", b"\5\1\0\3\x09echo.test\0\x50"]),
        ("socks_v4", 5, "192.0.2.80", [b"\4\1\0\x50\xc0\0\2\x50\0"]),
        ("socks_v4", 4, "192.0.2.80", [b"\4\1\0\x50\xc0\0\2\x50\0"]),
        ("socks_v4", 5, "echo.test", [b"\4\1\0\x50\x7f\0\0\1\0"]),
        ("", 5, "192.0.2.80", [b"\4\1\0\x50\xc0\0\2\x50\0"]),
        ("", 5, "echo.test", [b"\5\1\0", b"\5\1\0\3\x09echo.test\0\x50"]),
        ("http", 5, "192.0.2.80", [b"CONNECT 192.0.2.80:80 HTTP/1.0\r\n"]),
        ("http", 5, "echo.test", [b"CONNECT echo.test:80 HTTP/1.0\r\n"]),
    ],
)
def test_upstream_is_asked_in_its_protocol(
    chaining: Factory, private_world: World, protocol: str, version: int, host: str, sent: list[bytes]
) -> None:
    spoken = protocol or ("socks_v5" if len(sent) == 2 else "socks_v4")
    named = {"http": "http_v1.0"}.get(protocol, protocol)
    items = {"proxyprotocol": named} if protocol else {}
    with upstream(*FRIENDLY[spoken]) as proxy:
        server = chaining(HEAD + PASS + route(proxy.address, **items), world=private_world)
        with Client(server.addresses[0]) as client:
            bound = ("10.1.2.3", 4660)
            if version == 4:
                reply: Any = client.request4(CONNECT, host, 80)
                assert reply.code == GRANTED
            else:
                reply = client.open5(CONNECT, host, 80)
                assert reply.code == 0
            if protocol == "http":
                bound = proxy.seen[0].remote
            assert (reply.host, reply.port) == bound
            assert client.exchange(b"ping") == b"ping"
            path = f"127.0.0.1.{proxy.port} [{bound[0]}.{bound[1]}] {host}.80"
            assert f"-> 127.0.0.1.{proxy.seen[0].remote[1]} {path}" in wait_for_line(
                server, client.address, "tcp/connect [: "
            )
        assert b"".join(sent) == bytes(proxy.seen[0].data)[: len(b"".join(sent))]


def reply5(code: int) -> list[Action]:
    """Give the script of an upstream that answers a request with this code."""
    return [METHOD_NONE, bytes([5, code]) + REPLY5[2:]]


Refusal = tuple[str, list[Action], int, str]
REFUSALS: dict[str, Refusal] = {
    "failure": ("socks_v5", reply5(1), REFUSED, "generic failure at remote proxy server"),
    "forbidden": ("socks_v5", reply5(2), REFUSED, "connection denied by proxy server"),
    "network": ("socks_v5", reply5(3), NO_ROUTE, "net unreachable by proxy server"),
    "host": ("socks_v5", reply5(4), UNREACHABLE, "target unreachable by proxy server"),
    "refused": ("socks_v5", reply5(5), REFUSED, "target refused connection by proxy server"),
    "late": ("socks_v5", reply5(6), LATE, "connection to target from proxy server timed out"),
    "command": ("socks_v5", reply5(7), REFUSED, "command not supported by proxy server"),
    "address": ("socks_v5", reply5(8), REFUSED,
                "address format in the request we sent is not supported by the proxy server"),
    "method": ("socks_v5", [b"\5\xff"], REFUSED,
               "proxy server said we did not offer any acceptable authentication methods"),
    "eof": ("socks_v5", [METHOD_NONE, close], REFUSED,
            "premature eof from proxy server while waiting for response"),
    "rejected": ("socks_v4", [b"\0\x5b" + REPLY4[2:]], REFUSED, "generic proxy server failure"),
    "http-403": ("http_v1.0", [b"HTTP/1.0 403 Forbidden\r\n\r\n"], REFUSED,
                 'response code 403 from http server indicates failure: "HTTP/1.0 403 Forbidden"'),
    "http-502": ("http_v1.0", [b"HTTP/1.1 502 Bad Gateway\r\nA: b\r\n\r\npage"], REFUSED,
                 'response code 502 from http server indicates failure: "HTTP/1.1 502 Bad Gateway"'),
}  # fmt: skip


def test_upstream_that_refuses_is_passed_on(chaining: Factory) -> None:
    scripts = {name: (protocol, script) for name, (protocol, script, _, _) in REFUSALS.items()}
    with contextlib.closing(Theatre(scripts)) as theatre:
        server = chaining(HEAD + PASS + theatre.routes)
        for name, (_, _, code, text) in REFUSALS.items():
            with Client(server.addresses[0]) as client:
                target = theatre.targets[name]
                reply = client.open5(CONNECT, *target)
                assert (name, reply.code, reply.host, reply.port) == (name, code, *target)
                source = theatre.peers[name].seen[0].remote[1]
                end = f"-> 127.0.0.1.{source} {target[0]}.80: serverchain failed: {text}"
                assert wait_for_line(server, client.address, "block(1): tcp/connect ]").endswith(end)


def test_dead_upstream_is_avoided_until_its_time_is_over(chaining: Factory, peer: StartPeer) -> None:
    dead = peer("refuser")
    server = chaining(
        HEAD + "route.badexpire: 5\n" + PASS + route(dead.address, proxyprotocol="socks_v5"), "-N", "1"
    )
    assert fetch(server, *TARGET) == REFUSED
    assert wait_for_record(server, "blacklisting route #1", "connect(2) to")
    if server.name == "danted":
        return  # another of its processes may serve the next client, and knows nothing of it
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *TARGET).code == NO_ROUTE
        text = "0.0.0.0.0 192.0.2.80.80: could not bind address to use on external side: "
        assert wait_for_line(server, client.address, f"{text}no usable serverchain route to target found")
    eventually(lambda: fetch(server, *TARGET) == REFUSED)
    assert wait_for_record(server, "info: route #1", "is tried again")


@pytest.mark.parametrize("command", [BIND, 3])
def test_what_no_route_is_for_is_refused(chaining: Factory, peer: StartPeer, command: int) -> None:
    proxy = peer("echo")
    server = chaining(HEAD + PASS + route(proxy.address, proxyprotocol="socks_v5"))
    with Client(server.addresses[0]) as client:
        assert client.open5(command, "0.0.0.0", 0).code == NO_ROUTE
        word = {BIND: "bind", 3: "udpassociate"}[command]
        text = f"command {word} is not supported by serverchaining and no direct route found"
        assert wait_for_record(server, text)
    assert proxy.seen == []


def test_direct_routes_come_first_and_the_proxy_itself_is_reached_directly(
    chaining: Factory, peer: StartPeer
) -> None:
    target = peer("echo")
    with upstream(*FRIENDLY["socks_v5"]) as proxy, upstream(b"1", b"2") as other:
        config = HEAD + PASS + route(proxy.address, proxyprotocol="socks_v5") + direct("127.0.0.1/32")
        server = chaining(config)
        assert fetch(server, *target.address) == 0
        assert proxy.seen == []
        assert fetch(server, *TARGET) == 0
        assert len(proxy.seen) == 1
        only = chaining(HEAD + PASS + route(other.address, proxyprotocol="socks_v5"))
        with Client(only.addresses[0]) as client:
            reply = client.open5(CONNECT, *other.address)
            assert reply.code == 0
            client.send(b"x")
            assert client.receive(1) == b"1"


def test_rules_come_before_routes(chaining: Factory) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        block = rule("socks block", "from: 0/0 to: 192.0.2.0/24", LOG)
        config = HEAD + block + PASS + route(proxy.address, proxyprotocol="socks_v5")
        server = chaining(config)
        assert fetch(server, *TARGET) == FORBIDDEN
        assert fetch(server, "198.51.100.80", 80) == 0
        assert len(proxy.seen) == 1


# ------------------------------ hostile upstreams ------------------------------

LONG_HEAD = b"HTTP/1.0 200 OK\r\n" + b"A: b\r\n" * 4000
HOSTILE: dict[str, tuple[str, list[Action]]] = {
    "v5-method-close": ("socks_v5", [close]),
    "v5-method-reset": ("socks_v5", [hang_up_hard]),
    "v5-method-silent": ("socks_v5", [say_nothing]),
    "v5-method-short": ("socks_v5", [(b"\x05", close)]),
    "v5-method-half": ("socks_v5", [(b"\x05", say_nothing)]),
    "v5-method-version": ("socks_v5", [b"\x04\x00"]),
    "v5-method-not-offered": ("socks_v5", [b"\x05\x01"]),
    "v5-method-password-not-offered": ("socks_v5", [b"\x05\x02"]),
    "v5-method-http": ("socks_v5", [b"HTTP/1.0 400 Bad Request\r\n\r\n"]),
    "v5-method-endless": ("socks_v5", [repeat(b"\x04" * 65536)]),
    "v5-reply-close": ("socks_v5", [METHOD_NONE, close]),
    "v5-reply-reset": ("socks_v5", [METHOD_NONE, hang_up_hard]),
    "v5-reply-silent": ("socks_v5", [METHOD_NONE, say_nothing]),
    "v5-reply-version": ("socks_v5", [METHOD_NONE, b"\x04" + REPLY5[1:]]),
    "v5-reply-address-type": ("socks_v5", [METHOD_NONE, b"\x05\0\0\x02\1\2\3\4\5\6"]),
    "v5-reply-unassigned": ("socks_v5", [METHOD_NONE, b"\x05\x63" + REPLY5[2:]]),
    "v5-reply-name-cut": ("socks_v5", [METHOD_NONE, (b"\x05\0\0\x03\xff" + b"x" * 20, close)]),
    "v5-reply-name-half": ("socks_v5", [METHOD_NONE, drip(b"\x05\0\0\x03\xff" + b"x" * 999)]),
    "v5-reply-endless": ("socks_v5", [METHOD_NONE, repeat(b"\x05\x01" + b"\xff" * 65536)]),
    **{f"v5-reply-{n}": ("socks_v5", [METHOD_NONE, (REPLY5[:n], close)]) for n in (1, 3, 4, 9)},
    "v4-close": ("socks_v4", [close]),
    "v4-reset": ("socks_v4", [hang_up_hard]),
    "v4-silent": ("socks_v4", [say_nothing]),
    "v4-version": ("socks_v4", [b"\x04" + REPLY4[1:]]),
    "v4-code": ("socks_v4", [b"\x00\x01" + REPLY4[2:]]),
    "v4-dripping": ("socks_v4", [drip(REPLY4[:2] + b"\0", 0.4)]),
    "v4-endless": ("socks_v4", [repeat(b"\x05" * 65536)]),
    **{f"v4-reply-{n}": ("socks_v4", [(REPLY4[:n], close)]) for n in (1, 2, 7)},
    "http-close": ("http", [close]),
    "http-reset": ("http", [hang_up_hard]),
    "http-silent": ("http", [say_nothing]),
    "http-other-protocol": ("http", [b"SSH-2.0-OpenSSH_9.2\r\n"]),
    "http-no-status": ("http", [b"HTTP/1.0 \r\n\r\n"]),
    "http-long-status": ("http", [b"HTTP/1.0 2000 OK\r\n\r\n"]),
    "http-newer": ("http", [b"HTTP/2 200\r\n\r\n"]),
    "http-long-head": ("http", [LONG_HEAD + b"\r\n"]),
    "http-endless-head": ("http", [repeat(b"A: b\r\n" * 9999)]),
    "http-endless-line": ("http", [repeat(b"HTTP/1.0 200 " + b"x" * 65536)]),
    "http-dripping": ("http", [drip(b"HTTP/1.0 200 OK\r\nA: b")]),
    "http-cut": ("http", [(b"HTTP/1.0 200 OK\r\nA: b\r\n", close)]),
    "http-forging-log": ("http", [b"HTTP/1.0 500 \r\ninfo: pass(1)\r\n\r\n"]),
}


BEHIND = {f"behind-{name}": script for name, script in HOSTILE.items() if script[0] == "socks_v5"}


@pytest.fixture(scope="module")
def hostile(
    private_world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Theatre]]:
    """One server for all hostile upstreams; those behind another are what a friendly one leads to."""
    scripts = HOSTILE | {
        name: (kind, [METHOD_NONE, REPLY5, *script]) for name, (kind, script) in BEHIND.items()
    }
    with contextlib.closing(Theatre(scripts)) as theatre:
        second = "via: 192.0.2.250 port = 1080\n    proxyprotocol: socks_v5"
        head, behind = theatre.routes.split(f"192.0.2.{len(HOSTILE) + 1}/32")
        behind = behind.replace("proxyprotocol: socks_v5", f"proxyprotocol: socks_v5\n    {second}")
        routes = f"{head}192.0.2.{len(HOSTILE) + 1}/32{behind}"
        settings = "timeout.connect: 1\nroute.maxfail: 0\n"
        server = Sockd(HEAD + settings + PASS + routes, tmp_path_factory.mktemp("hostile"))
        try:
            yield server, theatre
        finally:
            server.close()


@pytest.mark.parametrize("name", [*HOSTILE, *BEHIND])
def test_hostile_upstream_ends_in_an_error_reply(hostile: tuple[Server, Theatre], name: str) -> None:
    server, theatre = hostile
    with Client(server.addresses[0]) as client:
        reply = client.open5(CONNECT, *theatre.targets[name])
        assert reply.code in (REFUSED, LATE)
        assert (reply.host, reply.port) == theatre.targets[name]
        client.expect_end()
        wait_for_line(server, client.address, "block(1): tcp/connect ]", "serverchain failed: ")
    server.check_resources()


def test_client_that_leaves_ends_the_wait_for_an_upstream(sockd: Factory) -> None:
    with upstream(say_nothing) as proxy:
        server = sockd(HEAD + PASS + route(proxy.address, proxyprotocol="socks_v5"))
        client = Client(server.addresses[0])
        client.greet()
        client.send(b"\5\1\0\1\xc0\0\2\x50\0\x50")
        eventually(lambda: proxy.seen and proxy.seen[0].data)
        client.reset()
        eventually(lambda: proxy.seen and proxy.seen[0].end)


def test_name_from_an_upstream_is_not_believed(sockd: Factory) -> None:
    name = b"evil\ninfo: pass(1): tcp/connect [: forged"
    reply = b"\5\0\0\3" + bytes([len(name)]) + name + b"\x12\x34"
    with upstream(METHOD_NONE, reply) as proxy:
        server = sockd(HEAD + PASS + route(proxy.address, proxyprotocol="socks_v5"))
        with Client(server.addresses[0]) as client:
            found = client.open5(CONNECT, *TARGET)
            assert (found.code, found.host, found.port) == (0, "0.0.0.0", 4660)
            wait_for_line(server, client.address, "[0.0.0.0.4660]")
    assert "forged" not in server.text


@pytest.mark.parametrize("protocol", FRIENDLY)
def test_target_that_speaks_first_is_heard(sockd: Factory, protocol: str) -> None:
    *before, last = FRIENDLY[protocol]
    with upstream(*before, last + b"banner") as proxy:
        server = sockd(HEAD + PASS + route(proxy.address, proxyprotocol=protocol))
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *TARGET).code == 0
            assert client.receive(6) == b"banner"
            assert client.exchange(b"ping") == b"ping"
            address = client.address
        wait_for_line(server, address, "tcp/connect ]: 10 -> ", " -> 10: ")


# ------------------------------ failover and balance ------------------------------


@pytest.fixture
def two(private_world: World) -> Iterator[list[TcpPeer]]:
    """Two friendly upstreams."""
    with upstream(*FRIENDLY["socks_v5"]) as first, upstream(*FRIENDLY["socks_v5"]) as second:
        yield [first, second]


def either(*peers: Any, **items: str) -> str:
    """Write a route that names several upstreams, of which any will do."""
    gateways = " or ".join(f"127.0.0.1 port = {peer.port}" for peer in peers)
    lines = [f"from: 0/0 to: 0/0 via: {gateways}", "proxyprotocol: socks_v5"]
    return rule("route", *lines, *(f"{name}: {value}" for name, value in items.items()))


@pytest.mark.parametrize("dead", ["refuser", "blackhole", "holder", "closer", "resetter"])
@pytest.mark.parametrize("form", ["alternatives", "routes"])
def test_session_that_meets_a_dead_upstream_succeeds(
    sockd: Factory, peer: StartPeer, dead: str, form: str
) -> None:
    bad = peer(dead)
    with upstream(*FRIENDLY["socks_v5"]) as good:
        routes = {
            "alternatives": either(bad, good),
            "routes": "".join(route(p.address, proxyprotocol="socks_v5") for p in (bad, good)),
        }
        server = sockd(HEAD + "timeout.connect: 2\n" + PASS + routes[form])
        for number in range(3):
            with Client(server.addresses[0]) as client:
                assert client.open5(CONNECT, *TARGET).code == 0
                assert client.exchange(b"ping") == b"ping"
                wait_for_line(server, client.address, "tcp/connect [", f" 127.0.0.1.{good.port} [")
            assert len(good.seen) == number + 1
        assert wait_for_record(server, f"warning: failed to connect route #1 to 127.0.0.1.{bad.port}: ")
        assert wait_for_record(server, "blacklisting route #1")
        assert sum("failed to connect route" in message for message in server.messages) == 1


def test_answer_about_the_target_is_final_and_blames_nobody(sockd: Factory, two: list[TcpPeer]) -> None:
    with upstream(METHOD_NONE, b"\5\1" + REPLY5[2:]) as honest:
        server = sockd(HEAD + PASS + either(honest, two[0]))
        assert [fetch(server, *TARGET) for _ in range(3)] == [REFUSED] * 3
        assert two[0].seen == []
        assert "blacklisting" not in server.text


def test_target_that_does_not_answer_blames_nobody(sockd: Factory) -> None:
    with upstream(METHOD_NONE, say_nothing) as slow:
        server = sockd(HEAD + "timeout.connect: 1\n" + PASS + route(slow.address, proxyprotocol="socks_v5"))
        assert [fetch(server, *TARGET) for _ in range(2)] == [LATE] * 2
        assert "blacklisting" not in server.text


@pytest.mark.parametrize(("most", "tries"), [(1, 1), (3, 3), (0, 5)])
def test_maxfail_counts_failures(
    sockd: Factory, two: list[TcpPeer], peer: StartPeer, most: int, tries: int
) -> None:
    with contextlib.closing(TcpPeer(close)) as bad:
        server = sockd(HEAD + f"route.maxfail: {most}\n" + PASS + either(bad, two[0]))
        assert [fetch(server, *TARGET) for _ in range(5)] == [0] * 5
        assert len(bad.seen) == tries


def test_upstream_comes_back_when_its_time_is_over(sockd: Factory, two: list[TcpPeer]) -> None:
    calls: list[int] = []

    def recover(connection: socket.socket, seen: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            for message in FRIENDLY["socks_v5"]:
                connection.recv(999)
                connection.sendall(message)
            connection.sendall(connection.recv(999))

    with contextlib.closing(TcpPeer(recover)) as first:
        server = sockd(HEAD + "route.badexpire: 1\n" + PASS + either(first, two[0]))
        assert fetch(server, *TARGET) == 0
        assert len(two[0].seen) == 1
        eventually(lambda: fetch(server, *TARGET) == 0 and len(calls) > 1)
        assert wait_for_record(server, f"route #1 through 127.0.0.1.{first.port} is tried again")


def test_balance_roundrobin_takes_turns(sockd: Factory, two: list[TcpPeer]) -> None:
    server = sockd(HEAD + PASS + either(*two, balance="roundrobin"))
    for count in range(1, 7):
        assert fetch(server, *TARGET) == 0
        assert [len(proxy.seen) for proxy in two] == [(count + 1) // 2, count // 2]


def test_balance_roundrobin_takes_one_turn_where_routes_mix_protocols(sockd: Factory) -> None:
    """By the order of protocols, the paths of either route are not side by side."""
    script = FRIENDLY["socks_v4"]
    with upstream(*script) as first, upstream(*script) as second:
        mixed = either(first, second, balance="roundrobin").replace("socks_v5", "socks_v4 socks_v5")
        server = sockd(HEAD + PASS + mixed + mixed)
        for _ in range(4):
            assert fetch(server, *TARGET) == 0
        assert [len(proxy.seen) for proxy in (first, second)] == [2, 2]


def test_balance_random_takes_both(sockd: Factory, two: list[TcpPeer]) -> None:
    server = sockd(HEAD + PASS + either(*two, balance="random"))
    for _ in range(64):
        assert fetch(server, *TARGET) == 0
    assert min(len(proxy.seen) for proxy in two) > 0


def test_balance_fewest_takes_the_idle_one(sockd: Factory, two: list[TcpPeer]) -> None:
    server = sockd(HEAD + PASS + either(*two, balance="fewest"))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.addresses[0])) for _ in range(6)]
        for client in clients:
            assert client.open5(CONNECT, *TARGET).code == 0
        assert [len(proxy.seen) for proxy in two] == [3, 3]
        clients[3].close()
        # The session counts until it is wholly over, a moment after its upstream has seen the end.
        eventually(lambda: fetch(server, *TARGET) == 0 and len(two[1].seen) > 3)


# ------------------------------ names ------------------------------

RESOLVE_THERE = {"proxyprotocol": "socks_v5", "resolve": "there"}


@pytest.mark.parametrize(
    ("resolve", "host", "sent"),
    [
        ("both", "echo.test", b"\3\x09echo.test"),
        ("here", "echo.test", b"\1\x7f\0\0\1"),
        ("there", "echo.test", b"\3\x09echo.test"),
        ("there", "private.invalid", b"\3\x0fprivate.invalid"),
        ("both", "private.invalid", b"\3\x0fprivate.invalid"),
        ("there", "192.0.2.80", b"\1\xc0\0\2\x50"),
    ],
)
def test_resolve_says_who_resolves(
    sockd: Factory, private_world: World, resolve: str, host: str, sent: bytes
) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        items = {"proxyprotocol": "socks_v5", "resolve": resolve}
        server = sockd(HEAD + PASS + route(proxy.address, **items), world=private_world)
        assert fetch(server, host, 80) == 0
        assert b"\5\1\0" + sent + b"\0\x50" in bytes(proxy.seen[0].data)


@pytest.mark.parametrize(("to", "is_direct"), [(".test", True), ("echo.test", True), ("0/0", False)])
def test_direct_routes_to_names_come_before_those_that_resolve_there(
    sockd: Factory, private_world: World, peer: StartPeer, to: str, is_direct: bool
) -> None:
    target, datagrams = peer("echo"), peer("udp-echo")
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        by_proxy = route(proxy.address, **RESOLVE_THERE, command="connect udpassociate")
        server = sockd(HEAD + PASS + by_proxy + direct(to), world=private_world)
        assert fetch(server, "echo.test", target.port) == 0
        assert len(proxy.seen) == (not is_direct)
        if is_direct:
            with associated(server) as (_, udp, relay):
                udp.send(relay, "echo.test", datagrams.port, b"ping")
                assert udp.receive(relay).port == datagrams.port
        assert fetch(server, "private.invalid", 80) == 0
        assert b"\3\x0fprivate.invalid" in bytes(proxy.seen[-1].data)


def test_name_of_a_direct_route_that_is_not_found_is_left_to_an_upstream(
    sockd: Factory, private_world: World
) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        by_proxy = route(proxy.address, **RESOLVE_THERE, command="connect bind")
        server = sockd(HEAD + PASS + direct(".invalid") + by_proxy, world=private_world)
        for command in (CONNECT, BIND):
            with Client(server.addresses[0]) as client:
                assert client.open5(command, "private.invalid", 80).code == 0
            assert b"\3\x0fprivate.invalid" in bytes(proxy.seen[-1].data)


def test_proxy_is_not_sent_a_name_of_which_a_rule_passes_one_family(
    sockd: Factory, private_world: World, tmp_path: Path
) -> None:
    only = rule("client pass", "from: 0/0 to: 0/0") + rule("socks pass", "from: 0/0 to: 192.0.2.0/24")
    names = {"dual.test": [["192.0.2.80", "2001:db8::80"]], "four.test": [["192.0.2.80"]]}
    with contextlib.closing(NameServer(names)) as server, upstream(*FRIENDLY["socks_v5"]) as proxy:
        world = world_that_asks(server, private_world, tmp_path)
        chain = sockd(HEAD + only + route(proxy.address, proxyprotocol="socks_v5"), world=world)
        for name in names:
            assert fetch(chain, name, 80) == 0
        sent = [bytes(seen.data) for seen in proxy.seen]
        assert b"\5\1\0\1\xc0\0\2\x50\0\x50" in sent[0]
        assert b"\5\1\0\3\x09four.test\0\x50" in sent[1]


def test_route_whose_name_nobody_answers_is_not_passed_over(
    sockd: Factory, private_world: World, tmp_path: Path, peer: StartPeer
) -> None:
    target = peer("echo")
    with (
        contextlib.closing(NameServer({"slow.test": None})) as names,
        upstream(*FRIENDLY["socks_v5"]) as proxy,
    ):
        routes = route(proxy.address, to="slow.test", proxyprotocol="socks_v5") + direct()
        world = world_that_asks(names, private_world, tmp_path)
        server = sockd(HEAD + "timeout.connect: 1\n" + PASS + routes, world=world)
        assert fetch(server, *target.address) == NO_ROUTE
        assert not target.seen


def test_name_that_nobody_resolves_here_goes_by_socks_4a(sockd: Factory, private_world: World) -> None:
    with upstream(*FRIENDLY["socks_v4"]) as proxy:
        server = sockd(HEAD + PASS + route(proxy.address, proxyprotocol="socks_v4"), world=private_world)
        assert fetch(server, "private.invalid", 80) == 0
        assert b"\4\1\0\x50\0\0\0\1\0private.invalid\0" in bytes(proxy.seen[0].data)


@pytest.mark.parametrize("routes", ["resolve: here", "via direct"])
def test_name_that_must_be_resolved_here_is_refused(
    sockd: Factory, private_world: World, routes: str
) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        by_proxy = route(proxy.address, proxyprotocol="socks_v5", resolve="here")
        server = sockd(HEAD + PASS + (direct() if "direct" in routes else by_proxy), world=private_world)
        assert fetch(server, "private.invalid", 80) == UNREACHABLE
        assert proxy.seen == []


@pytest.mark.parametrize("resolve", ["both", "there"])
def test_name_that_is_not_resolved_here_passes_no_block_by_address(
    sockd: Factory, private_world: World, resolve: str
) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        rules = rule("client pass", "from: 0/0 to: 0/0", LOG)
        for verdict, to in (("pass", ".good.invalid"), ("block", "192.0.2.0/24"), ("pass", "0/0")):
            rules += rule(f"socks {verdict}", f"from: 0/0 to: {to}", LOG)
        by_proxy = route(proxy.address, proxyprotocol="socks_v5", resolve=resolve)
        server = sockd(HEAD + rules + by_proxy, world=private_world)
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "private.invalid", 80).code == FORBIDDEN
            text = "the name is not resolved here, and could be of 192.0.2.0/24"
            assert text in wait_for_line(server, client.address, "block(2): tcp/connect ]")
        assert proxy.seen == []
        assert fetch(server, "private.good.invalid", 80) == 0


def test_address_is_sent_where_a_rule_is_for_some_of_them(sockd: Factory, private_world: World) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        socks = rule("socks pass", "from: 0/0 to: 127.0.0.2/32", LOG)
        client_pass = rule("client pass", "from: 0/0 to: 0/0", LOG)
        by_proxy = route(proxy.address, proxyprotocol="socks_v5")
        server = sockd(HEAD + client_pass + socks + by_proxy, world=private_world)
        assert fetch(server, "multi.test", 80) == 0
        assert b"\5\1\0\1\x7f\0\0\2\0\x50" in bytes(proxy.seen[0].data)


# ------------------------------ who we are to an upstream ------------------------------

PASSWORDS = HEAD.replace("socksmethod: none", "socksmethod: username none")


def greet_with_password(user: bytes, password: bytes) -> list[Action]:
    """Give the script of an upstream that wants RFC 1929, and tells by its status what it thinks."""
    wanted = bytes([1, len(user)]) + user + bytes([len(password)]) + password

    def check(connection: socket.socket, seen: Any) -> None:
        ok = bytes(seen.data).endswith(wanted)
        connection.sendall(b"\1\0" if ok else b"\1\1")
        connection.recv(999)
        connection.sendall(REPLY5)
        connection.sendall(connection.recv(999))

    return [b"\5\2", check]


def write_credentials(folder: Path, text: str = "eve:s3cret\n", mode: int = 0o600) -> Path:
    path = folder / "credentials"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_credentials_of_the_route_are_used_and_never_logged(sockd: Factory, tmp_path: Path) -> None:
    path = write_credentials(tmp_path)
    with upstream(*greet_with_password(b"eve", b"s3cret")) as proxy:
        by_proxy = route(proxy.address, proxyprotocol="socks_v5", credentials=str(path))
        server = sockd("debug: 2\n" + HEAD + PASS + by_proxy)
        assert fetch(server, *TARGET) == 0
        assert proxy.seen[0].data.startswith(b"\5\1\2\1\3eve\6s3cret")
        write_credentials(tmp_path, "eve:newer\n")
        server.reload()
        server.take_baseline()
        eventually(lambda: fetch(server, *TARGET) == REFUSED)
        assert "s3cret" not in server.text
        assert "newer" not in server.text


def test_credentials_go_to_http_and_the_user_id_to_socks_4(sockd: Factory, tmp_path: Path) -> None:
    path = write_credentials(tmp_path)
    for protocol, sent in (
        ("http", b"Proxy-Authorization: Basic ZXZlOnMzY3JldA==\r\n"),
        ("socks_v4", b"\4\1\0\x50\xc0\0\2\x50eve\0"),
    ):
        with upstream(*FRIENDLY[protocol]) as proxy:
            by_proxy = route(proxy.address, proxyprotocol=protocol, credentials=str(path))
            assert fetch(sockd(HEAD + PASS + by_proxy), *TARGET) == 0
            assert sent in bytes(proxy.seen[0].data)


@pytest.mark.parametrize("protocol", ["http", "socks_v4"])
def test_credentials_do_not_go_to_a_hop_with_method_none(
    sockd: Factory, tmp_path: Path, protocol: str
) -> None:
    answer = FRIENDLY[protocol]
    with upstream(*answer, *answer) as proxy:
        host, port = proxy.address
        lines = [f"credentials: {write_credentials(tmp_path)}", "from: 0/0 to: 0/0"]
        lines += [f"via: {host} port = {port}"]
        lines += [f"proxyprotocol: {protocol}", "method: none"]
        lines += ["via: 192.0.2.1 port = 1080", f"proxyprotocol: {protocol}"]
        server = sockd(HEAD + PASS + rule("route", *lines))
        assert fetch(server, *TARGET) == 0
        first, second = {
            "http": (
                b"CONNECT 192.0.2.1:1080 HTTP/1.0\r\nHost: 192.0.2.1:1080\r\n\r\n",
                b"Basic ZXZlOnMzY3JldA==\r\n",
            ),
            "socks_v4": (b"\4\1\4\x38\xc0\0\2\1\0", b"\4\1\0\x50\xc0\0\2\x50eve\0"),
        }[protocol]
        assert bytes(proxy.seen[0].data).startswith(first)
        assert second in bytes(proxy.seen[0].data)


def test_credentials_that_nobody_gets_are_warned_of(tmp_path: Path) -> None:
    path = write_credentials(tmp_path)
    by_proxy = route(("127.0.0.1", 9), proxyprotocol="http", credentials=str(path), method="none")
    found = check_configuration(HEAD.replace("= 0", "= 1080") + PASS + by_proxy, tmp_path)
    assert found.returncode == 0
    assert '"credentials" has no effect in a route without method username' in found.stdout + found.stderr


@pytest.mark.parametrize(
    ("text", "mode", "fault"),
    [
        ("eve:x\n", 0o640, "only its owner can read"),
        ("eve:x\n", 0o604, "only its owner can read"),
        ("eve\n", 0o600, "user:password"),
        (":x\n", 0o600, "user:password"),
        ("eve:" + "x" * 256, 0o600, "user:password"),
        ("e\0e:x", 0o600, "user:password"),
    ],
)
def test_credentials_that_cannot_be_used_stop_the_start(
    tmp_path: Path, text: str, mode: int, fault: str
) -> None:
    path = write_credentials(tmp_path, text, mode)
    by_proxy = route(("127.0.0.1", 9), proxyprotocol="socks_v5", credentials=str(path))
    found = check_configuration(
        "logoutput: stderr\n" + HEAD.replace("= 0", "= 1080") + PASS + by_proxy, tmp_path
    )
    assert found.returncode == 1
    assert fault in found.stdout + found.stderr
    assert "x" * 200 not in found.stdout + found.stderr


def test_missing_credentials_stop_the_start(tmp_path: Path) -> None:
    by_proxy = route(("127.0.0.1", 9), credentials=str(tmp_path / "none"))
    found = check_configuration(HEAD + PASS + by_proxy, tmp_path)
    assert found.returncode == 1
    assert "No such file" in found.stdout + found.stderr


def test_password_of_the_client_is_passed_on_where_the_route_says_so(
    sockd: Factory, private_world: World
) -> None:
    with upstream(*greet_with_password(b"alice", b"wonderland")) as proxy:
        by_proxy = route(proxy.address, proxyprotocol="socks_v5", method="username")
        server = sockd(PASSWORDS + PASS + by_proxy, world=private_world)
        with Client(server.addresses[0]) as client:
            assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
            assert client.authenticate(b"alice", b"wonderland") == 0
            assert client.request5(CONNECT, *TARGET).code == 0
            assert client.exchange(b"ping") == b"ping"
        assert proxy.seen[0].data.startswith(b"\5\1\2\1\5alice")
        with Client(server.addresses[0]) as client:
            assert client.greet([NO_METHOD]) == NO_METHOD
            assert client.request5(CONNECT, *TARGET).code == NO_ROUTE
        assert "wonderland" not in server.text


def test_password_that_an_upstream_does_not_take_blames_nobody(sockd: Factory, private_world: World) -> None:
    with upstream(*greet_with_password(b"other", b"other")) as proxy:
        by_proxy = route(proxy.address, proxyprotocol="socks_v5", method="username")
        server = sockd(PASSWORDS + PASS + by_proxy, world=private_world)
        for _ in range(2):
            with Client(server.addresses[0]) as client:
                assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
                assert client.authenticate(b"alice", b"wonderland") == 0
                assert client.request5(CONNECT, *TARGET).code == REFUSED
        assert len(proxy.seen) == 2
        assert "blacklisting" not in server.text


# ------------------------------ chains ------------------------------


def test_chain_of_several_servers(sockd: Factory, peer: StartPeer) -> None:
    target = peer("echo")
    last = sockd(HEAD + PASS)
    middle = sockd(HEAD + PASS + route(last.addresses[0], proxyprotocol="socks_v5"))
    first = sockd(HEAD + PASS + route(middle.addresses[0], proxyprotocol="socks_v4"))
    assert fetch(first, *target.address, b"x" * 50000) == 0
    for server in (first, middle, last):
        assert wait_for_record(server, "pass(1): tcp/connect ]: ", f"127.0.0.1.{target.port} -> 50000")


@pytest.mark.parametrize("inner", ["socks_v5", "socks_v4", "http"])
@pytest.mark.parametrize("outer", ["socks_v5", "socks_v4", "http"])
def test_several_hops_in_one_route_each_have_their_protocol(sockd: Factory, outer: str, inner: str) -> None:
    with upstream(*FRIENDLY[outer], *FRIENDLY[inner]) as proxy:
        hops = rule(
            "route",
            f"from: 0/0 to: 0/0 via: 127.0.0.1 port = {proxy.port}",
            f"proxyprotocol: {outer}",
            "via: 192.0.2.2 port = 3128",
            f"proxyprotocol: {inner}",
        )
        server = sockd(HEAD + PASS + hops)
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *TARGET).code == 0
            assert client.exchange(b"ping") == b"ping"
            wait_for_line(
                server, client.address, f" 127.0.0.1.{proxy.port} 192.0.2.2.3128 [", "] 192.0.2.80.80"
            )
        second = {
            "socks_v5": b"\5\1\0\1\xc0\0\2\2\x0c\x38",
            "socks_v4": b"\4\1\x0c\x38\xc0\0\2\2\0",
            "http": b"CONNECT 192.0.2.2:3128 HTTP/1.0",
        }[outer]
        assert second in bytes(proxy.seen[0].data)


def test_hops_in_one_route_go_through_real_servers(sockd: Factory, peer: StartPeer) -> None:
    target = peer("echo")
    servers = [sockd(HEAD + PASS) for _ in range(3)]
    hops = route(*(server.addresses[0] for server in servers), proxyprotocol="socks_v5")
    assert fetch(sockd(HEAD + PASS + hops), *target.address) == 0
    for server, following in zip(servers, [*servers[1:], target], strict=True):
        assert wait_for_record(server, "pass(1): tcp/connect ]: ", f" 127.0.0.1.{following.port} -> ")


def test_dead_second_hop_is_passed_over(sockd: Factory, peer: StartPeer) -> None:
    target, dead = peer("echo"), peer("refuser")
    first, living = sockd(HEAD + PASS), sockd(HEAD + PASS)
    hops = rule(
        "route",
        f"from: 0/0 to: 0/0 via: 127.0.0.1 port = {first.port}",
        f"via: 127.0.0.1 port = {dead.port} or 127.0.0.1 port = {living.port}",
        "proxyprotocol: socks_v5",
    ).replace(
        "via: 127.0.0.1 port = " + str(first.port),
        f"via: 127.0.0.1 port = {first.port}\n proxyprotocol: socks_v5",
    )
    server = sockd(HEAD + PASS + hops)
    assert fetch(server, *target.address) == 0
    assert wait_for_record(server, f"warning: failed to connect route #1 to 127.0.0.1.{dead.port}: ")
    assert fetch(server, *target.address) == 0
    assert sum("failed to connect" in message for message in server.messages) == 1


def test_thousand_sessions_through_two_hops(sockd: Factory, peer: StartPeer) -> None:
    target = peer("echo")
    second = sockd(HEAD + PASS)
    first = sockd(HEAD + PASS + route(second.addresses[0], proxyprotocol="socks_v5"))
    failures: list[object] = []

    def run_sessions() -> None:
        for _ in range(1000 // 32 + 1):
            code = fetch(first, *target.address)
            if code:
                failures.append(code)

    run_all([run_sessions] * 32)
    assert failures == []


# ------------------------------ proxies that others wrote ------------------------------


def test_danted_is_an_upstream(sockd: Factory, danted: Factory, peer: StartPeer) -> None:
    target = peer("echo")
    other = danted(HEAD + PASS)
    for protocol in ("socks_v5", "socks_v4"):
        server = sockd(HEAD + PASS + route(other.addresses[0], proxyprotocol=protocol))
        assert fetch(server, *target.address) == 0
        assert fetch(server, "127.0.0.1", 1) == REFUSED


def test_microsocks_is_an_upstream(sockd: Factory, peer: StartPeer, tmp_path: Path) -> None:
    target = peer("echo")
    path = write_credentials(tmp_path)
    with microsocks(tmp_path) as port:
        server = sockd(HEAD + PASS + route(("127.0.0.1", port), proxyprotocol="socks_v5"))
        assert fetch(server, *target.address) == 0
        assert fetch(server, "127.0.0.1", 1) == REFUSED
    with microsocks(tmp_path, "-u", "eve", "-P", "s3cret") as port:
        by_proxy = route(("127.0.0.1", port), proxyprotocol="socks_v5", credentials=str(path))
        assert fetch(sockd(HEAD + PASS + by_proxy), *target.address) == 0


def test_tinyproxy_is_an_upstream(
    sockd: Factory, peer: StartPeer, private_world: World, tmp_path: Path
) -> None:
    target = peer("echo")
    path = write_credentials(tmp_path)
    with tinyproxy(tmp_path, private_world) as port:
        server = sockd(HEAD + PASS + route(("127.0.0.1", port), proxyprotocol="http"), world=private_world)
        assert fetch(server, *target.address) == 0
        assert fetch(server, "echo.test", target.port) == 0
        assert fetch(server, "127.0.0.1", 1) == REFUSED
    with tinyproxy(tmp_path, private_world, "BasicAuth eve s3cret") as port:
        by_proxy = route(("127.0.0.1", port), proxyprotocol="http", credentials=str(path))
        assert fetch(sockd(HEAD + PASS + by_proxy), *target.address) == 0
        bare = sockd(HEAD + PASS + route(("127.0.0.1", port), proxyprotocol="http"))
        assert fetch(bare, *target.address) == REFUSED
        assert wait_for_record(bare, "serverchain failed: response code 407")


def test_ssh_is_an_upstream(
    sockd: Factory,
    peer: StartPeer,
    private_world: World,
    tmp_path: Path,
    sshd: tuple[Path, int],  # noqa: F811
) -> None:
    target = peer("echo")
    folder, port = sshd
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        socks_port = probe.getsockname()[1]
    command = ["ssh", "-N", "-D", f"127.0.0.1:{socks_port}", "-p", str(port), "-i", str(folder / "key")]
    for option in (
        "IdentitiesOnly=yes",
        "BatchMode=yes",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
    ):
        command += ["-o", option]
    command += ["-F", "none", f"{SSH_USER}@127.0.0.1"]
    with running(private_world.wrap(command), lambda: answers(socks_port), tmp_path, "ssh"):
        for protocol in ("socks_v5", "socks_v4"):
            server = sockd(HEAD + PASS + route(("127.0.0.1", socks_port), proxyprotocol=protocol))
            assert fetch(server, *target.address) == 0


# ------------------------------ BIND ------------------------------


@pytest.mark.parametrize("protocol", ["socks_v5", "socks_v4"])
@pytest.mark.parametrize("kind", ["sockd", "danted"])
def test_bind_listens_at_the_upstream(
    sockd: Factory, protocol: str, kind: str, request: pytest.FixtureRequest
) -> None:
    other: Server = request.getfixturevalue(kind)(HEAD + PASS)
    by_proxy = route(other.addresses[0], proxyprotocol=protocol, command="connect bind")
    server = sockd(HEAD + PASS + by_proxy)
    with Client(server.addresses[0]) as client:
        bound = client.open5(BIND, "127.0.0.1", 0)
        assert bound.code == 0
        with Client((bound.host, bound.port)) as visitor:
            peer_reply = client.read_reply5()
            assert (peer_reply.code, peer_reply.host, peer_reply.port) == (0, *visitor.address)
            visitor.send(b"hello")
            assert client.receive(5) == b"hello"
            client.send(b"world")
            assert visitor.receive(5) == b"world"
        client.expect_end()
        wait_for_line(
            server, client.address, "pass(1): tcp/bindreply [", f"127.0.0.1.{other.port} 127.0.0.1."
        )
        address = client.address
    wait_for_line(server, address, "tcp/accept ]: 5 -> ", " -> 5: remote peer closed")


def test_bind_through_a_chain(sockd: Factory) -> None:
    servers = [sockd(HEAD + PASS) for _ in range(2)]
    hops = route(*(s.addresses[0] for s in servers), proxyprotocol="socks_v5", command="bind")
    server = sockd(HEAD + PASS + hops)
    with Client(server.addresses[0]) as client:
        bound = client.open5(BIND, "127.0.0.1", 0)
        assert bound.code == 0
        with Client((bound.host, bound.port)) as visitor:
            assert client.read_reply5().code == 0
            client.send(b"world")
            assert visitor.receive(5) == b"world"


BIND_HOSTILE: dict[str, list[Action]] = {
    "close": [close],
    "reset": [hang_up_hard],
    "refused": [b"\5\5" + REPLY5[2:]],
    "second-wrong": [REPLY5 + b"\4" + REPLY5[1:]],
    "second-refused": [REPLY5 + b"\5\1" + REPLY5[2:]],
    "second-cut": [REPLY5 + b"\5\0\0\1"],
    "second-close": [REPLY5],
}


@pytest.mark.parametrize("name", BIND_HOSTILE)
def test_bind_at_a_hostile_upstream_ends_in_an_error_reply(sockd: Factory, name: str) -> None:
    script = [METHOD_NONE, *BIND_HOSTILE[name]]

    def behave(connection: socket.socket, seen: Any) -> None:
        for action in script:
            connection.recv(999)
            if not isinstance(action, bytes):
                return action(connection, seen)
            connection.sendall(action)
        return None

    with contextlib.closing(TcpPeer(behave)) as proxy:
        by_proxy = route(proxy.address, proxyprotocol="socks_v5", command="bind")
        server = sockd(HEAD + PASS + by_proxy)
        with Client(server.addresses[0]) as client:
            reply = client.open5(BIND, "0.0.0.0", 0)
            if name.startswith("second"):
                assert reply.code == 0
                reply = client.read_reply5()
            assert reply.code in (1, REFUSED)
            client.expect_end()


def test_bind_at_an_upstream_that_resets_behind_its_answer_is_answered(sockd: Factory) -> None:
    """Its own address, which the answer leaves to us to fill in, may be gone by then."""

    def behave(connection: socket.socket, seen: Any) -> None:
        for answer in (METHOD_NONE, b"\5\0\0\1\0\0\0\0\0\x50"):
            connection.recv(999)
            connection.sendall(answer)
        hang_up_hard(connection, seen)

    with contextlib.closing(TcpPeer(behave)) as proxy:
        by_proxy = route(proxy.address, proxyprotocol="socks_v5", command="bind")
        server = sockd(HEAD + PASS + by_proxy)
        for _ in range(50):
            with Client(server.addresses[0]) as client:
                reply = client.open5(BIND, "0.0.0.0", 0)
                if reply.code == 0:
                    reply = client.read_reply5()
                assert reply.code == 1
                client.expect_end()
                wait_for_line(server, client.address, "tcp/accept ]:")
    assert not [m for m in server.messages if "local client error" in m]


def test_bind_is_judged_before_an_upstream_is_asked(sockd: Factory) -> None:
    rules = rule("client pass", "from: 0/0 to: 0/0", LOG)
    rules += rule("socks pass", "from: 0/0 to: 0/0", "command: connect", LOG)
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        server = sockd(HEAD + rules + route(proxy.address, proxyprotocol="socks_v5", command="bind"))
        with Client(server.addresses[0]) as client:
            assert client.open5(BIND, "0.0.0.0", 0).code == FORBIDDEN
        assert proxy.seen == []


def test_peer_of_a_bind_there_is_judged(sockd: Factory) -> None:
    rules = rule("client pass", "from: 0/0 to: 0/0", LOG)
    rules += rule("socks pass", "from: 0/0 to: 0/0", "command: bind", LOG)
    rules += rule("socks block", "from: 10.1.2.3/32 to: 0/0", "command: bindreply", LOG)
    with upstream(METHOD_NONE, REPLY5 + REPLY5) as proxy:
        server = sockd(HEAD + rules + route(proxy.address, proxyprotocol="socks_v5", command="bind"))
        with Client(server.addresses[0]) as client:
            assert client.open5(BIND, "0.0.0.0", 0).code == 0
            assert client.read_reply5().code == FORBIDDEN
            wait_for_line(server, client.address, "block(2): tcp/bindreply ]")


def test_peer_of_a_bind_there_is_counted(sockd: Factory) -> None:
    rules = rule("client pass", "from: 0/0 to: 0/0", LOG)
    rules += rule("socks pass", "from: 0/0 to: 0/0", "command: bind", LOG)
    rules += rule("socks pass", "from: 0/0 to: 0/0", "command: bindreply", "session.max: 1", LOG)
    with upstream(METHOD_NONE, REPLY5 + REPLY5) as proxy:
        server = sockd(HEAD + rules + route(proxy.address, proxyprotocol="socks_v5", command="bind"))
        with Client(server.addresses[0]) as first, Client(server.addresses[0]) as second:
            for client, code in ((first, 0), (second, FORBIDDEN)):
                assert client.open5(BIND, "0.0.0.0", 0).code == 0
                assert client.read_reply5().code == code
            reason = "session limit reached (1/1 slot in use)"
            wait_for_line(server, second.address, "block(2): tcp/bindreply ]", reason)


@pytest.mark.parametrize("before", ["", rule("socks pass", "from: 0/0 to: 192.0.2.1/32", "command: bind")])
def test_bind_there_counts_once_under_the_rule_of_its_address(sockd: Factory, before: str) -> None:
    """The first decision, which knows no address, matches the same rule, or one that is before it."""
    rules = rule("client pass", "from: 0/0 to: 0/0", LOG) + before
    rules += rule("socks pass", "from: 0/0 to: 0/0", "command: bind", "session.max: 1", LOG)
    with upstream(METHOD_NONE, REPLY5) as proxy:
        server = sockd(HEAD + rules + route(proxy.address, proxyprotocol="socks_v5", command="bind"))
        with Client(server.addresses[0]) as one, Client(server.addresses[0]) as other:
            assert one.open5(BIND, "0.0.0.0", 0).code == 0
            assert other.open5(BIND, "0.0.0.0", 0).code == FORBIDDEN


# ------------------------------ UDP ------------------------------

UDP_ROUTE = {"proxyprotocol": "socks_v5", "command": "connect udpassociate"}
PASS_AND_LOG_ALL = PASS.replace(LOG, f"{LOG} ioop")


@pytest.fixture(scope="module")
def others(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Three upstreams for all: each keeps an association for some seconds behind its client's FIN."""
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []
        for number in range(3):
            server = Sockd(HEAD + PASS_AND_LOG_ALL, tmp_path_factory.mktemp(f"other{number}"))
            stack.callback(server.close)
            servers.append(server)
        yield servers


@contextlib.contextmanager
def associated(server: Server) -> Iterator[tuple[Client, UdpClient, tuple[str, int]]]:
    """Give a client with an association: its connection, its UDP socket, and the relay."""
    with Client(server.addresses[0]) as client, UdpClient() as udp:
        reply = client.open5(3, "0.0.0.0", 0)
        assert reply.code == 0
        yield client, udp, (reply.host, reply.port)
        client.reset()  # a FIN alone would not end it at once


@pytest.mark.parametrize("kind", ["sockd", "danted"])
def test_datagrams_go_through_an_upstream(
    sockd: Factory, others: list[Server], kind: str, peer: StartPeer, request: pytest.FixtureRequest
) -> None:
    target = peer("udp-echo")
    other = others[0]
    if kind == "danted":
        other = request.getfixturevalue("danted")(HEAD + PASS_AND_LOG_ALL)
    server = sockd(HEAD + PASS + route(other.addresses[0], **UDP_ROUTE))
    with associated(server) as (client, udp, relay):
        for data in (b"one", b"two", b"x" * 9000):
            udp.send(relay, *target.address, data)
            answer = udp.receive(relay)
            assert (answer.host, answer.port, answer.data) == (*target.address, data)
        assert wait_for_line(server, client.address, "udp/udpassociate -: ", f" 127.0.0.1.{other.port} [")
    assert wait_for_record(other, "udp/udpassociate -: ", f" 127.0.0.1.{target.port} (9000)")


def test_datagrams_go_through_a_chain(sockd: Factory, others: list[Server], peer: StartPeer) -> None:
    targets = [peer("udp-echo") for _ in range(2)]
    hops = route(*(other.addresses[0] for other in others), **UDP_ROUTE)
    with associated(sockd(HEAD + PASS + hops)) as (_, udp, relay):
        for target in targets:
            udp.send(relay, *target.address, b"nine byte")
            answer = udp.receive(relay)
            assert (answer.port, answer.data) == (target.port, b"nine byte")
    for server, count in zip(others, (29, 19, 9), strict=True):
        assert wait_for_record(server, "udp/udpassociate -: ", f" ({count})")


def test_datagrams_go_through_a_hop_that_has_a_name(
    sockd: Factory, others: list[Server], peer: StartPeer
) -> None:
    target = peer("udp-echo")
    hops = route(others[0].addresses[0], ("localhost", others[1].port), **UDP_ROUTE)
    with associated(sockd(HEAD + PASS + hops)) as (_, udp, relay):
        for data in (b"one", b"two"):
            udp.send(relay, *target.address, data)
            answer = udp.receive(relay)
            assert (answer.host, answer.port, answer.data) == (*target.address, data)


def test_address_of_a_hop_that_has_a_name_is_that_of_its_first_answer(sockd: Factory) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay_there:
        relay_there.bind(("127.0.0.1", 0))
        relay_there.settimeout(10)
        port = relay_there.getsockname()[1]
        bound = b"\x05\0\0\1\0\0\0\0" + struct.pack("!H", port)
        with upstream(METHOD_NONE, bound, METHOD_NONE, bound) as proxy:
            hops = route(proxy.address, ("proxy2.example", 1080), **UDP_ROUTE)
            with associated(sockd(HEAD + PASS + hops)) as (_, udp, relay):
                udp.send(relay, *TARGET, b"ping")
                data, sender = relay_there.recvfrom(999)
                assert data == wrap("proxy2.example", port, wrap(*TARGET, b"ping"))
                for address, said in (
                    (("192.0.2.2", port ^ 1), b"of another port"),
                    (("other.example", port), b"of another name"),
                    (("192.0.2.2", port), b"first"),
                    (("192.0.2.3", port), b"of another address"),
                    (("192.0.2.2", port), b"second"),
                ):
                    relay_there.sendto(wrap(*address, wrap(*TARGET, said)), sender)
                assert [udp.receive(relay).data for _ in range(2)] == [b"first", b"second"]


def test_names_in_datagrams_are_resolved_at_the_upstream(
    sockd: Factory, private_world: World, peer: StartPeer
) -> None:
    target = peer("udp-echo")
    other = sockd(HEAD + PASS, world=private_world)
    rules = rule("client pass", "from: 0/0 to: 0/0", LOG)
    asked = "command: udpassociate"
    for verdict, to in (("pass", ".test"), ("block", "127.0.0.0/8"), ("pass", "0/0")):
        rules += rule(f"socks {verdict}", f"from: 0/0 to: {to}", asked, LOG)
    rules += rule("socks pass", "from: 0/0 to: 0/0", "command: udpreply", LOG)
    by_proxy = route(other.addresses[0], **UDP_ROUTE, resolve="there")
    server = sockd(HEAD + rules + by_proxy)  # which knows no echo.test
    with associated(server) as (_, udp, relay):
        udp.send(relay, "echo.test", target.port, b"ping")
        answer = udp.receive(relay)
        assert (answer.host, answer.port, answer.data) == (*target.address, b"ping")
        udp.send(relay, "localhost", target.port, b"blocked")
        wait_for_record(server, "block(2): udp/udpassociate -", "localhost")
        assert len(target.seen) == 1


def test_upstream_is_asked_for_the_name_that_was_judged(sockd: Factory) -> None:
    """What follows a "%" in a name is no scope: else a rule that blocks the name would not block it so."""
    rules = rule("socks block", "from: 0/0 to: .secret.corp", LOG) + PASS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay_there:
        relay_there.bind(("127.0.0.1", 0))
        relay_there.settimeout(10)
        bound = b"\x05\0\0\1\x7f\0\0\1" + struct.pack("!H", relay_there.getsockname()[1])
        with upstream(METHOD_NONE, bound) as proxy:
            server = sockd(HEAD + rules + route(proxy.address, **UDP_ROUTE, resolve="there"))
            with associated(server) as (_, udp, relay):
                udp.send(relay, "a.secret.corp", 9, b"ping")
                wait_for_record(server, "block(1): udp/udpassociate -", "a.secret.corp")
                udp.send(relay, "a.secret.corp%lo", 9, b"ping")
                assert relay_there.recv(999) == wrap("a.secret.corp%lo", 9, b"ping")


def test_datagrams_take_the_route_of_their_target(
    sockd: Factory, others: list[Server], peer: StartPeer
) -> None:
    near, far = peer("udp-echo"), peer("udp-echo", "127.0.0.2")
    other = others[0]
    server = sockd(
        HEAD + PASS + direct("127.0.0.1/32") + route(other.addresses[0], to="127.0.0.2/32", **UDP_ROUTE)
    )
    with associated(server) as (_, udp, relay):
        for target in (near, far, near, far):
            udp.send(relay, *target.address, b"ping")
            assert udp.receive(relay).port == target.port
        udp.send(relay, "127.0.0.3", 9, b"nowhere")
        wait_for_record(server, "127.0.0.3.9: ", "no usable serverchain route to target found")
        assert near.seen[0][1][1] != far.seen[0][1][1]
    assert wait_for_record(other, "udp/udpassociate -: ", f" 127.0.0.2.{far.port} (4)")


def test_association_outlives_its_upstream(sockd: Factory, others: list[Server], peer: StartPeer) -> None:
    target = peer("udp-echo")
    first, second = sockd(HEAD + PASS), others[0]
    server = sockd(HEAD + PASS + either(first, second, command="udpassociate"))
    with associated(server) as (_, udp, relay):
        udp.send(relay, *target.address, b"one")
        assert udp.receive(relay).data == b"one"
        first.stop()
        udp.send(relay, *target.address, b"two")
        assert udp.receive(relay).data == b"two"
    assert wait_for_record(second, "udp/udpassociate -: ", f" 127.0.0.1.{target.port} (3)")


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\0\0",
        b"\0\0\1\1\x7f\0\0\1\0\x09late",
        b"\0\0\0\x05x",
        b"\0\0\0\3\4evil\0\x50name",
        b"\0\0\0\1\x7f\0",
    ],
    ids=["empty", "short", "fragment", "address-type", "name", "cut"],
)
def test_hostile_datagrams_of_an_upstream_are_dropped(sockd: Factory, datagram: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay_there:
        relay_there.bind(("127.0.0.1", 0))
        relay_there.settimeout(10)
        # A host of its own choice in the reply is not believed.
        bound = b"\x05\0\0\1\xc0\0\2\1" + struct.pack("!H", relay_there.getsockname()[1])
        with upstream(METHOD_NONE, bound) as proxy:
            server = sockd(HEAD + PASS + route(proxy.address, **UDP_ROUTE))
            with associated(server) as (_, udp, relay):
                udp.send(relay, *TARGET, b"ping")
                data, sender = relay_there.recvfrom(999)
                assert data == wrap(*TARGET, b"ping")
                relay_there.sendto(datagram, sender)
                relay_there.sendto(wrap(*TARGET, b"pong"), sender)
                assert udp.receive(relay).data == b"pong"


def test_datagrams_without_an_upstream_are_dropped(sockd: Factory, peer: StartPeer) -> None:
    dead = peer("refuser")
    server = sockd(HEAD + "route.maxfail: 0\n" + PASS + route(dead.address, **UDP_ROUTE))
    with associated(server) as (client, udp, relay):
        for _ in range(2):
            udp.send(relay, *TARGET, b"ping")
        text = "serverchain failed: could not connect to upstream proxyserver"
        eventually(lambda: sum(text in message for message in server.messages) >= 2)
        assert client.sock.getpeername()


# ------------------------------ what README says ------------------------------

# Row of README's table -> what it says of danted and of sockd, and the tests that show the latter.
CHAINS = {
    "CONNECT by SOCKS 5": ("yes", "yes", "test_upstream_is_asked_in_its_protocol"),
    "CONNECT by SOCKS 4": ("yes", "yes", "test_upstream_is_asked_in_its_protocol"),
    "CONNECT by HTTP": ("yes", "yes", "test_tinyproxy_is_an_upstream"),
    "BIND": ("no", "by SOCKS 4 and 5", "test_bind_listens_at_the_upstream"),
    "UDP ASSOCIATE": ("no", "by SOCKS 5", "test_datagrams_go_through_an_upstream"),
    "a chain of several servers": ("CONNECT", "each command", "test_chain_of_several_servers"),
    "several hops in one route": ("no", "up to 8", "test_several_hops_in_one_route_each_have_their_protocol"),
    "a proxy that is dead": (
        "fails the request", "the next one is tried", "test_session_that_meets_a_dead_upstream_succeeds"),
    "balance of several proxies": (
        "no", "at random, in turns, by fewest sessions", "test_balance_fewest_takes_the_idle_one"),
    "names resolved by the proxy alone": ("no", "`resolve: there`", "test_resolve_says_who_resolves"),
    "names that cannot be resolved here": ("refused", "left to the proxy", "test_resolve_says_who_resolves"),
    "names by SOCKS 4A": ("no", "yes", "test_name_that_nobody_resolves_here_goes_by_socks_4a"),
    "log-in with the client's password": (
        "accepted, does not work", "yes, by SOCKS 5",
        "test_password_of_the_client_is_passed_on_where_the_route_says_so"),
    "log-in with a password from a file": (
        "no", "`credentials`", "test_credentials_of_the_route_are_used_and_never_logged"),
    "log-in with a Kerberos ticket": (
        "Debian's is built without", "`method: gssapi`, with protection", "test_connect_goes_by_ticket"),
}  # fmt: skip
README = Path(__file__).parent.parent / "README.md"


def test_readme_has_the_table_of_what_is_chained() -> None:
    lines = ["| through another proxy | danted 1.4.2 | sockd |", "|---|---|---|"]
    lines += [f"| {row} | {theirs} | {ours} |" for row, (theirs, ours, _) in CHAINS.items()]
    table = "\n".join(lines)
    assert table in README.read_text(), f"README should have:\n{table}"
    assert {test for _, _, test in CHAINS.values()} <= {*globals(), *vars(test_gssapi_upstreams)}


@pytest.mark.dante
@pytest.mark.parametrize(
    "lines",
    ["command: bind", "command: udpassociate", "via: 127.0.0.1 port = 1081", "balance: random",
     "resolve: there", "credentials: /dev/null", "method: gssapi"],
)  # fmt: skip
def test_danted_has_no_such_route(lines: str, tmp_path: Path) -> None:
    need_danted()
    path = tmp_path / "danted.conf"
    by_proxy = rule("route", "from: 0/0 to: 0/0 via: 127.0.0.1 port = 1080", "proxyprotocol: socks_v5", lines)
    path.write_text("logoutput: stderr\n" + HEAD.replace("= 0", "= 1080") + PASS + by_proxy)
    program = shutil.which("danted", path="/usr/sbin:/usr/local/sbin")
    found = subprocess.run([str(program), "-V", "-f", path], capture_output=True, check=False, timeout=10)
    assert found.returncode != 0


@pytest.mark.dante
def test_danted_refuses_what_the_table_says(danted: Factory, private_world: World, peer: StartPeer) -> None:
    dead = peer("refuser")
    with upstream(*FRIENDLY["socks_v5"]) as good, upstream(*FRIENDLY["socks_v4"]) as old:
        config = HEAD + PASS + route(dead.address, to="192.0.2.1/32", proxyprotocol="socks_v5")
        config += route(good.address, proxyprotocol="socks_v5") + route(old.address, to=".invalid")
        server = danted(config, world=private_world)
        assert fetch(server, "192.0.2.1", 80) == REFUSED
        assert fetch(server, "private.invalid", 80) == UNREACHABLE
        assert good.seen == []
        assert old.seen == []
    with upstream(*greet_with_password(b"alice", b"wonderland")) as proxy:
        by_proxy = route(proxy.address, proxyprotocol="socks_v5", method="username")
        server = danted(PASSWORDS + PASS + by_proxy, world=private_world)
        with Client(server.addresses[0]) as client:
            assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
            assert client.authenticate(b"alice", b"wonderland") == 0
            assert client.request5(CONNECT, *TARGET).code != 0


# ------------------------------ the way to the upstream itself ------------------------------


@pytest.mark.parametrize(
    ("rotation", "source"), [("none", "127.0.0.5"), ("route", "127.0.0.1"), ("same-same", "127.0.0.1")]
)
def test_connection_to_an_upstream_leaves_by_the_external_address(
    sockd: Factory, rotation: str, source: str
) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        head = HEAD.replace(
            "external: 127.0.0.1", f"external.rotation: {rotation}\nexternal: 127.0.0.5\nexternal: 127.0.0.1"
        )
        assert fetch(sockd(head + PASS + route(proxy.address, proxyprotocol="socks_v5")), *TARGET) == 0
        assert proxy.seen[0].remote[0] == source


def test_redirect_from_of_a_route_is_where_the_connection_to_the_upstream_begins(sockd: Factory) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        items = ("from: 0/0 to: 0/0", f"via: 127.0.0.1 port = {proxy.port}", "proxyprotocol: socks_v5")
        by_proxy = rule("route", *items, "redirect from: 127.0.0.9/32")
        assert fetch(sockd(HEAD + PASS + by_proxy), *TARGET) == 0
        assert proxy.seen[0].remote[0] == "127.0.0.9"


def test_redirect_to_of_a_rule_is_what_an_upstream_is_asked_for(sockd: Factory) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        rules = rule("client pass", "from: 0/0 to: 0/0", LOG)
        rules += rule("socks pass", "from: 0/0 to: 0/0", "redirect to: 192.0.2.99 port = 99", LOG)
        server = sockd(HEAD + rules + route(proxy.address, proxyprotocol="socks_v5"))
        assert fetch(server, *TARGET) == 0
        assert b"\5\1\0\1\xc0\0\2\x63\0\x63" in bytes(proxy.seen[0].data)


def test_socket_options_of_a_route_are_set_on_the_way_to_the_upstream(sockd: Factory) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        items = ("from: 0/0 to: 0/0", f"via: 127.0.0.1 port = {proxy.port}", "proxyprotocol: socks_v5")
        server = sockd(HEAD + PASS + rule("route", *items, "external.tcp.tcp_maxseg: 700"))
        assert fetch(server, *TARGET, b"x" * 3000) == 0
        bad = sockd(HEAD + PASS + rule("route", *items, "external.socket.9999: 1"))
        assert fetch(bad, *TARGET) == 0
        assert wait_for_record(bad, "warning: could not set external.socket.9999")


def test_upstream_with_a_name_is_found(sockd: Factory, private_world: World) -> None:
    with upstream(*FRIENDLY["socks_v5"]) as proxy:
        named = ("echo.test", proxy.port)
        server = sockd(HEAD + PASS + route(named, proxyprotocol="socks_v5"), world=private_world)
        assert fetch(server, *TARGET) == 0
        lost = sockd(HEAD + PASS + route(("none.invalid", 1), proxyprotocol="socks_v5"), world=private_world)
        assert fetch(lost, *TARGET) == UNREACHABLE


def test_http_client_is_led_through_an_upstream(sockd: Factory, peer: StartPeer) -> None:
    origin = peer("origin")
    other = sockd(HEAD + PASS)
    rules = rule("client pass", "from: 0/0 to: 0/0", LOG)
    rules += rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http socks_v5", LOG)
    server = sockd(HEAD + rules + route(other.addresses[0], proxyprotocol="socks_v5", balance="fewest"))
    with Client(server.addresses[0]) as client:
        for _ in range(2):
            client.send(f"GET http://127.0.0.1:{origin.port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = b""
            while not answer.endswith(b"origin\n"):
                piece = client.sock.recv(9999)
                assert piece, answer
                answer += piece
    assert len(origin.seen) == 2
    assert wait_for_record(other, "pass(1): tcp/connect ]: ", f" 127.0.0.1.{origin.port} -> ")


def test_readme_shows_a_route_that_is_right(tmp_path: Path) -> None:
    lines = README.read_text().splitlines()
    start = lines.index("    route {")
    shown = "\n".join(lines[start : lines.index("    }", start) + 1])
    shown = shown.replace("/etc/proxy.password", str(write_credentials(tmp_path)))
    found = check_configuration(HEAD.replace("= 0", "= 1080") + PASS + shown, tmp_path)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_targets_of_a_family_that_only_the_upstream_has(
    sockd: Factory, private_world: World, peer: StartPeer
) -> None:
    head = HEAD.replace(
        "external: 127.0.0.1", "external: 127.0.0.1\nexternal: fd00::6\nexternal.rotation: route"
    )
    other = sockd(head + PASS)
    server = sockd(HEAD + PASS + route(other.addresses[0], **UDP_ROUTE))
    target, datagrams = peer("echo", "fd00::6"), peer("udp-echo", "fd00::6")
    assert fetch(server, *target.address) == 0
    with associated(server) as (_, udp, relay):
        for _ in range(2):
            udp.send(relay, *datagrams.address, b"ping")
            answer = udp.receive(relay)
            assert (answer.host, answer.port, answer.data) == (*datagrams.address, b"ping")
    without = sockd(HEAD + PASS)
    assert fetch(without, *target.address) == 8


def test_upstream_that_ends_each_association_is_asked_again(sockd: Factory) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as relay_there:
        relay_there.bind(("127.0.0.1", 0))
        relay_there.settimeout(10)
        bound = b"\x05\0\0\1\0\0\0\0" + struct.pack("!H", relay_there.getsockname()[1])
        with contextlib.closing(TcpPeer(scripted_once(METHOD_NONE, bound))) as proxy:
            server = sockd(HEAD + PASS + route(proxy.address, **UDP_ROUTE, balance="fewest"))
            with associated(server) as (_, udp, relay):
                for number in range(1, 6):
                    udp.send(relay, *TARGET, b"ping")
                    assert relay_there.recv(999) == wrap(*TARGET, b"ping")
                    assert len(proxy.seen) >= number
                    eventually(lambda: proxy.seen[-1].end)


def scripted_once(*answers: bytes) -> Callable[[socket.socket, Seen], None]:
    """Make a behaviour that answers so many messages, closes its half and waits for the other's end."""

    def behave(connection: socket.socket, seen: Seen) -> None:
        for answer in answers:
            connection.recv(999)
            connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        seen.end = "fin"

    return behave
