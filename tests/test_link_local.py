"""Addresses of one link (RFC 4007), which are to be said with the interface that they are at."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from typing import Any

import login_peers
import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Address, Client, UdpClient, whole_address
from conftest import Factory
from login_peers import Identd
from more_peers import rule, wait_for_record
from servers import Server, World
from test_bind_extension import Caller

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

NEAR, FAR = "fe80::a:1", "fe80::a:2"  # of the two ends of a pair of interfaces, all in one network
NEAR_THERE = f"{NEAR}%near"
OWN, OWN_IPV4 = "fd00:a::1", "10.77.0.1"  # further addresses of the near end
THIN, THIN_IPV4 = "fe80::b:1", "10.78.0.1"  # of an interface without further IPv6 addresses
SETUP = f"""\
link add near type veth peer name far
link set near addrgenmode none
link set far addrgenmode none
link set near up
link set far up
address add {NEAR}/64 dev near nodad
address add {FAR}/64 dev far nodad
address add {OWN}/64 dev near nodad
address add {OWN_IPV4}/24 dev near
link add thin type veth peer name thick
link set thin addrgenmode none
link set thick addrgenmode none
link set thin up
link set thick up
address add {THIN}/64 dev thin nodad
address add {THIN_IPV4}/24 dev thin
"""
HEAD = """\
internal: near port = 0
external: {external}
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
"""
ANYBODY = "from: 0/0 to: 0/0"
NOT_ALLOWED, NO_NETWORK, NOT_SUPPORTED = 2, 3, 8
LOG = "log: connect disconnect error"
CLIENT_PASS = rule("client pass", ANYBODY, LOG)
SOCKS_PASS = rule("socks pass", ANYBODY, LOG)
both_servers = pytest.mark.parametrize("factory", ["sockd", "danted"], indirect=True)


@pytest.fixture(scope="module")
def link(private_world: World) -> World:
    """Give a world whose network has the pair of interfaces."""
    for line in SETUP.splitlines():
        subprocess.run(["ip", *line.split()], check=True)
    return private_world


def listener_of(server: Server, host: str) -> Address:
    """Give an address of the server with the port there, which danted has at all of its addresses."""
    ports = dict(server.addresses)
    return host, ports.get(host.partition("%")[0], server.port)


def greet(server: Server, host: str) -> Client | None:
    """Connect to the server at an address; None where it hangs up on the greeting."""
    client = Client(listener_of(server, host))
    with contextlib.suppress(AssertionError, OSError):
        if client.greet() == 0:
            return client
    client.close()
    return None


def is_served(server: Server, host: str) -> bool:
    """Tell whether the client-rules pass a client that connects to an address."""
    client = greet(server, host)
    if client:
        client.close()
    return client is not None


# ------------------------------ rules ------------------------------


@both_servers
@pytest.mark.parametrize(
    ("rules", "passes"),
    [
        (rule("client block", "from: 0/0 to: near") + CLIENT_PASS, False),
        (rule("client block", "from: near to: 0/0") + CLIENT_PASS, False),
        (rule("client pass", "from: near to: near"), True),
        (rule("client pass", "from: far to: 0/0"), False),
        (rule("client pass", "from: 0/0 to: far"), False),
        (rule("client pass", f"from: {NEAR}%far/128 to: {NEAR}%far/128"), True),
    ],
    ids=["block to", "block from", "pass", "pass from another", "pass to another", "address at another link"],
)
def test_client_rules_know_the_addresses_of_an_interface(
    factory: Factory, link: World, rules: str, passes: bool
) -> None:
    server = factory(HEAD.format(external="near") + rules + SOCKS_PASS, world=link)
    assert is_served(server, NEAR_THERE) is passes


@both_servers
@pytest.mark.parametrize("target", [NEAR, f"{NEAR}%near", f"{NEAR}%far"])
def test_socks_rules_know_the_addresses_of_an_interface(factory: Factory, link: World, target: str) -> None:
    block = rule("socks block", "from: 0/0 to: near", "log: connect")
    server = factory(HEAD.format(external=OWN) + CLIENT_PASS + block + SOCKS_PASS, world=link)
    with Client(listener_of(server, OWN_IPV4)) as client:
        name = target.encode() if "%" in target else target
        assert client.open5(CONNECT, name, 80).code == NOT_ALLOWED
    wait_for_record(server, "block(1): tcp/connect ]: ")


# ------------------------------ addresses to leave by ------------------------------

THIN_HEAD = HEAD.replace("near", "127.0.0.1").format(external="thin")
NO_IPV6 = "connect to IPv6 address requested, but no IPv6 address configured for our usage on the external"


@both_servers
@pytest.mark.parametrize("command", [CONNECT, BIND])
@pytest.mark.parametrize("target", ["fd00::6", THIN])
def test_link_local_address_of_an_external_interface_is_not_left_by(
    factory: Factory, link: World, command: int, target: str
) -> None:
    server = factory(THIN_HEAD + CLIENT_PASS + SOCKS_PASS, world=link)
    with Client(server.addresses[0]) as client:
        assert client.open5(command, target, 80) == (NOT_SUPPORTED, 4, target, 80)
    wait_for_record(server, "block(1): tcp/", NO_IPV6)


@both_servers
@pytest.mark.parametrize(("command", "code"), [(CONNECT, NO_NETWORK), (BIND, NO_NETWORK)])
def test_name_that_leads_only_where_no_address_leaves_for(
    factory: Factory, link: World, command: int, code: int
) -> None:
    server = factory(THIN_HEAD + CLIENT_PASS + SOCKS_PASS, world=link)
    with Client(server.addresses[0]) as client:
        assert client.open5(command, b"six.test", 80) == (code, 3, "six.test", 80)


def test_name_with_an_ipv4_address_is_reached_by_that(sockd: Factory, link: World, peer: StartPeer) -> None:
    target = peer("echo")
    server = sockd(THIN_HEAD + CLIENT_PASS + SOCKS_PASS, world=link)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, b"both.test", target.port)[:3] == (0, 1, THIN_IPV4)
    with Client(server.addresses[0]) as client:
        assert client.open5(BIND, b"both.test", 80)[:3] == (0, 1, THIN_IPV4)


@both_servers
def test_datagram_for_which_no_address_leaves_is_dropped(
    factory: Factory, link: World, peer: StartPeer
) -> None:
    echo = peer("udp-echo")
    server = factory(THIN_HEAD + CLIENT_PASS + SOCKS_PASS, world=link)
    with Client(server.addresses[0]) as client, UdpClient() as udp:
        reply = client.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        udp.send((reply.host, reply.port), "fd00::6", 80, b"lost")
        udp.send((reply.host, reply.port), "127.0.0.1", echo.port, b"comes")
        assert udp.receive((reply.host, reply.port)).data == b"comes"
        wait_for_record(server, "block(1): udp/udpassociate -: ", " -> 0.0.0.0.0 fd00::6.80: ")


@both_servers
@pytest.mark.parametrize(("network", "code"), [("0.0.0.0/0", 0), ("0/0", NOT_ALLOWED)])
def test_link_local_address_of_an_external_interface_counts_as_a_family(
    factory: Factory, link: World, network: str, code: int
) -> None:
    """For a target that is not known yet a block only counts where it covers every family."""
    block = rule("socks block", f"from: 0/0 to: {network}", "command: udpassociate")
    server = factory(THIN_HEAD + CLIENT_PASS + block + SOCKS_PASS, world=link)
    with Client(server.addresses[0]) as client:
        assert client.open5(UDP_ASSOCIATE, "0.0.0.0", 0).code == code


def test_link_local_address_that_is_written_out_is_left_by(sockd: Factory, link: World) -> None:
    head = HEAD.replace("near", "127.0.0.1").format(external=NEAR_THERE)
    server = sockd(head + CLIENT_PASS + SOCKS_PASS, world=link)
    with Client(server.addresses[0]) as client:
        assert client.open5(BIND, "::", 0)[:3] == (0, 4, NEAR)


# ------------------------------ sockets beside a client's connection ------------------------------


@both_servers
def test_ident_is_asked_over_the_link_of_the_client(factory: Factory, link: World) -> None:
    head = HEAD.format(external=OWN_IPV4).replace("clientmethod: none", "clientmethod: rfc931")
    with contextlib.closing(Identd({NEAR_THERE: login_peers.user("root")})) as identd:
        server = factory(head + CLIENT_PASS + SOCKS_PASS, world=link)
        with Client(listener_of(server, NEAR_THERE)) as client:
            client.greet()
            wait_for_record(server, f"tcp/accept [: rfc931%root@{NEAR}.{client.address[1]} {NEAR}.")
    assert {host for host, _ in identd.queries} == {NEAR}


def test_relay_is_at_the_link_of_the_client(sockd: Factory, link: World, peer: StartPeer) -> None:
    echo = peer("udp-echo")
    server = sockd(HEAD.format(external=OWN_IPV4) + CLIENT_PASS + SOCKS_PASS, world=link)
    with Client(listener_of(server, NEAR_THERE)) as client, UdpClient(whole_address(NEAR_THERE, 0)) as udp:
        reply = client.open5(UDP_ASSOCIATE, "::", 0)
        assert (reply.code, reply.host) == (0, NEAR)
        udp.send(whole_address(NEAR_THERE, reply.port), "127.0.0.1", echo.port, b"comes")
        assert udp.receive((NEAR, reply.port)).data == b"comes"


def test_client_is_called_back_over_its_link(sockd: Factory, link: World) -> None:
    head = "extension: bind\n" + HEAD.format(external=OWN_IPV4)
    server = sockd(head + CLIENT_PASS + SOCKS_PASS, world=link)
    with Caller(listener_of(server, NEAR_THERE), NEAR_THERE) as client:
        bound = client.open_several()
        with Client(bound) as visitor, client.accept() as called:
            assert called.source[0] == NEAR
            assert called.exchange_with(visitor, b"comes")
