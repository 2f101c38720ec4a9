"""`timeout.*` in rules, `internal.protocol` and `external.protocol`: their effect in sockd and danted."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from client import CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from servers import Server, World

pytestmark = [pytest.mark.root]

# Long enough that nothing ends by them.
GLOBALS = "timeout.negotiate: 600\ntimeout.connect: 600\ntimeout.io: 600\ntimeout.tcp_fin_wait: 600\n"


def configure(client: str = "", socks: str = "", more: str = "") -> str:
    return (
        f"internal: 127.0.0.1 port = 0\nexternal: 127.0.0.1\nsocksmethod: none\n{GLOBALS}{more}"
        "user.privileged: root\nuser.unprivileged: nobody\n"
        f"client pass {{\nfrom: 0/0 to: 0/0\n{client}\n}}\nsocks pass {{\nfrom: 0/0 to: 0/0\n{socks}\n}}\n"
    )


@pytest.fixture(params=["sockd", pytest.param("danted", marks=pytest.mark.dante)])
def start(request: pytest.FixtureRequest, private_world: World) -> Callable[[str], Server]:
    """Start one of the two servers in the private world."""
    factory: Factory = request.getfixturevalue(request.param)
    return lambda config: factory(config, world=private_world)


def test_negotiation_ends_with_the_time_of_its_client_rule(start: Callable[[str], Server]) -> None:
    server = start(configure(client="timeout.negotiate: 1"))
    with Client(server.addresses[0]) as client:
        client.send(b"\5\1")
        client.expect_end_or_reset()


def test_connecting_ends_with_the_time_of_its_rule(
    start: Callable[[str], Server], peer: Callable[..., Any]
) -> None:
    server = start(configure(socks="timeout.connect: 1"))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("blackhole").address).code == 6


@pytest.mark.parametrize("keyword", ["timeout.io", "timeout.io.tcp"])
def test_idle_connection_ends_with_the_time_of_its_rule(
    start: Callable[[str], Server], peer: Callable[..., Any], keyword: str
) -> None:
    server = start(configure(socks=f"{keyword}: 1"))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("discard").address).code == 0
        client.expect_end_or_reset()


@pytest.mark.parametrize("keyword", ["timeout.io", "timeout.io.udp"])
def test_idle_association_ends_with_the_time_of_its_rule(
    start: Callable[[str], Server], keyword: str
) -> None:
    server = start(configure(socks=f"{keyword}: 1"))
    with Client(server.addresses[0]) as client, UdpClient() as udp:
        assert client.open5(UDP_ASSOCIATE, *udp.address).code == 0
        client.expect_end_or_reset()


def test_half_closed_connection_ends_with_the_time_of_its_rule(
    start: Callable[[str], Server], peer: Callable[..., Any]
) -> None:
    server = start(configure(socks="timeout.tcp_fin_wait: 1"))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("holder").address).code == 0
        client.finish_sending()  # the target never does the same
        client.expect_end_or_reset()


def is_open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 10).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("families", "hosts"),
    [("ipv4", ["127.0.0.1"]), ("ipv6", ["fd00::6"]), ("ipv4 ipv6", ["127.0.0.1", "fd00::6"])],
)
def test_internal_protocol_picks_the_addresses_of_an_interface(
    start: Callable[[str], Server], families: str, hosts: list[str]
) -> None:
    config = configure().replace("internal: 127.0.0.1", f"internal.protocol: {families}\ninternal: lo")
    server = start(config)
    ports = dict(server.addresses)
    port = ports.get("lo")  # danted says nowhere where it listens
    found = [host for host in ("127.0.0.1", "fd00::6") if is_open(host, ports.get(host) or port or 1)]
    assert found == hosts


@pytest.mark.parametrize(("families", "replies"), [("ipv4", (0, 8)), ("ipv6", (8, 0)), ("ipv4 ipv6", (0, 0))])
def test_external_protocol_picks_the_addresses_of_an_interface(
    start: Callable[[str], Server], peer: Callable[..., Any], families: str, replies: tuple[int, int]
) -> None:
    config = configure().replace("external: 127.0.0.1", f"external.protocol: {families}\nexternal: lo")
    server = start(config)
    found = []
    for host in ("127.0.0.1", "fd00::6"):
        with Client(server.addresses[0]) as client:
            found.append(client.open5(CONNECT, *peer("echo", host).address).code)
    assert tuple(found) == replies
