"""`internal.log.*` and `external.log.*`: errors that are logged once more, at a level of their own."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from client import CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from servers import Server, World, eventually

pytestmark = [pytest.mark.root]

RESET = struct.pack("ii", 1, 0)


def configure(lines: str, rule: str = "") -> str:
    return (
        "internal: 127.0.0.1 port = 0\nexternal: 127.0.0.1\nsocksmethod: none\n"
        f"user.privileged: root\nuser.unprivileged: nobody\n{lines}\n"
        f"client pass {{ from: 0/0 to: 0/0 }}\nsocks pass {{\nfrom: 0/0 to: 0/0\n{rule}\n}}\n"
    )


@pytest.fixture(params=["sockd", pytest.param("danted", marks=pytest.mark.dante)])
def start(request: pytest.FixtureRequest, private_world: World) -> Callable[..., Server]:
    """Start one of the two servers in the private world."""
    factory: Factory = request.getfixturevalue(request.param)
    return lambda lines: factory(configure(lines), world=private_world)


def expect_line(server: Server, line: str) -> None:
    eventually(lambda: line in server.messages)


def ask(server: Server, host: str, port: int) -> int:
    with Client(server.addresses[0]) as client:
        return client.open5(CONNECT, host, port).code


@pytest.mark.parametrize("symbol", ["econnrefused", "ECONNREFUSED", "system-any"])
def test_refused_connection_is_logged_at_the_level_named(
    start: Callable[..., Server], peer: Callable[..., Any], symbol: str
) -> None:
    server = start(f"external.log.warning.error: {symbol}")
    host, port = peer("refuser").address
    assert ask(server, host, port) == 5
    expect_line(server, f"warning: connect to host {host}.{port} failed: Connection refused")


@pytest.mark.parametrize(
    "lines", ["external.log.warning.error: ENETUNREACH", "internal.log.warning.error: ECONNREFUSED"]
)
def test_other_errors_and_the_other_side_are_not_logged(
    start: Callable[..., Server], peer: Callable[..., Any], lines: str
) -> None:
    server = start(lines)
    host, port = peer("refuser").address
    assert ask(server, host, port) == 5
    assert not any(f"connect to host {host}.{port} failed" in message for message in server.messages)


@pytest.mark.parametrize("symbol", ["no-route", "EHOSTUNREACH", "ENETUNREACH EHOSTUNREACH"])
def test_missing_route_is_logged(start: Callable[..., Server], symbol: str) -> None:
    server = start(f"external.log.notice.error: {symbol}")
    assert ask(server, "198.51.100.1", 80) == 4
    expect_line(server, "notice: no route to 198.51.100.1.80: No route to host")


@pytest.mark.parametrize("symbol", ["dns-any", "EAI_NONAME"])
def test_unknown_name_is_logged(start: Callable[..., Server], symbol: str) -> None:
    server = start(f"external.log.warning.error: {symbol}")
    assert ask(server, "nowhere.test", 80) == 4
    text = 'could not DNS-resolve "nowhere.test": Name or service not known for IPv4 address'
    expect_line(server, f"warning: {text}")


def test_system_errors_are_not_those_of_names(start: Callable[..., Server]) -> None:
    server = start("external.log.warning.error: system-any")
    assert ask(server, "nowhere.test", 80) == 4
    assert not any("could not DNS-resolve" in message for message in server.messages)


def test_each_level_has_its_word(sockd: Factory, private_world: World, peer: Callable[..., Any]) -> None:
    levels = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
    lines = "".join(f"external.log.{level}.error: ECONNREFUSED\n" for level in levels)
    server = sockd(configure(lines), world=private_world)
    host, port = peer("refuser").address
    assert ask(server, host, port) == 5
    words = [record.level for record in server.log if record.message.startswith("connect to host")]
    assert words == ["emergency", "alert", "critical", "error", "warning", "notice", "info", "debug"]


def test_a_rule_has_lines_of_its_own(sockd: Factory, private_world: World, peer: Callable[..., Any]) -> None:
    """Unlike danted, which parses them and logs nothing."""
    server = sockd(configure("", "external.log.notice.error: ECONNREFUSED"), world=private_world)
    host, port = peer("refuser").address
    assert ask(server, host, port) == 5
    expect_line(server, f"notice: connect to host {host}.{port} failed: Connection refused")


def test_reset_by_a_client_is_an_error_of_the_internal_side(
    sockd: Factory, private_world: World, peer: Callable[..., Any]
) -> None:
    lines = "internal.log.notice.error: ECONNRESET\nexternal.log.warning.error: ECONNRESET"
    server = sockd(configure(lines), world=private_world)
    with Client(server.addresses[0]) as client:
        name = "{}.{}".format(*client.address)
        assert client.open5(CONNECT, *peer("echo").address).code == 0
        client.reset()
    expect_line(server, f"notice: i/o with local client of {name} failed: Connection reset by peer")
    assert not any(record.level == "warning" for record in server.log)


def test_reset_by_a_target_is_an_error_of_the_external_side(
    sockd: Factory, private_world: World, peer: Callable[..., Any]
) -> None:
    server = sockd(configure("external.log.notice.error: ECONNRESET"), world=private_world)
    with Client(server.addresses[0]) as client, socket.create_server(("127.0.0.1", 0)) as target:
        name = "{}.{}".format(*client.address)
        assert client.open5(CONNECT, *target.getsockname()).code == 0
        connection, _ = target.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.close()
        expect_line(server, f"notice: i/o with remote peer of {name} failed: Connection reset by peer")


def test_datagram_that_cannot_be_sent_is_logged(sockd: Factory, private_world: World) -> None:
    server = sockd(configure("external.log.notice.error: EHOSTUNREACH"), world=private_world)
    with Client(server.addresses[0]) as client, UdpClient() as udp:
        reply = client.open5(UDP_ASSOCIATE, *udp.address)
        udp.send((reply.host, reply.port), "198.51.100.1", 80, b"ping")
        expect_line(server, "notice: send to host 198.51.100.1.80 failed: No route to host")


def test_features_of_tcp_are_logged(sockd: Factory, private_world: World, peer: Callable[..., Any]) -> None:
    lines = (
        "external.log.info.tcp.enabled: sack timestamps wscale ecn\n"
        "external.log.notice.tcp.disabled: ecn\ninternal.log.info.tcp.enabled: timestamps\n"
        "internal.log.debug.tcp.disabled: ecn"
    )
    server = sockd(configure(lines), world=private_world)
    target = peer("echo").address
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target).code == 0
        client_name, target_name = "{}.{}".format(*client.address), "{}.{}".format(*target)
        expect_line(server, f"info: tcp enabled on connection to host {client_name}: timestamps")
        expect_line(server, f"debug: tcp disabled on connection to host {client_name}: ecn")
        expect_line(server, f"info: tcp enabled on connection to host {target_name}: sack timestamps wscale")
        expect_line(server, f"notice: tcp disabled on connection to host {target_name}: ecn")


def test_an_error_is_not_logged_twice_without_the_keyword(
    sockd: Factory, private_world: World, peer: Callable[..., Any]
) -> None:
    server = sockd(configure(""), world=private_world)
    assert ask(server, *peer("refuser").address) == 5
    assert not any("failed" in message for message in server.messages)
