"""Addresses of one link (RFC 4007), which are to be said with the interface that they are at."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from client import CONNECT, Address, Client
from conftest import Factory
from more_peers import rule, wait_for_record
from servers import Server, World

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

NEAR, FAR = "fe80::a:1", "fe80::a:2"  # of the two ends of a pair of interfaces, all in one network
NEAR_THERE = f"{NEAR}%near"
OWN, OWN_IPV4 = "fd00:a::1", "10.77.0.1"  # further addresses of the near end
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
NOT_ALLOWED = 2
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
