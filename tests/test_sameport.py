"""`compatibility: sameport`: privileged ports are had through the warden, as the worker has no power."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient, request5
from conftest import Factory
from servers import Server

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]

CONFIG = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.5
user.unprivileged: nobody
socksmethod: none
{setting}
client pass {{ from: 0/0 to: 0/0 }}
socks pass {{ from: 0/0 to: 0/0 }}
"""
SAMEPORT = "compatibility: sameport"


@contextlib.contextmanager
def privileged_client(server: Server) -> Iterator[Client]:
    """Connect from a port below 1024 that nobody else has."""
    for port in range(1023, 600, -1):
        try:
            client = Client(server.addresses[0], source=("127.0.0.1", port))
        except OSError:
            continue
        with client:
            yield client
        return
    pytest.fail("no privileged port is free")


def source_port_at_target(server: Server) -> tuple[int, int]:
    """Return the client's own port, and the one that the target sees."""
    with socket.create_server(("127.0.0.1", 0)) as target, privileged_client(server) as client:
        target.settimeout(10)
        assert client.open5(CONNECT, "127.0.0.1", target.getsockname()[1]).code == 0
        connection, (host, port) = target.accept()
        connection.close()
        assert host == "127.0.0.5"
        return client.address[1], port


def test_privileged_source_port_is_kept(sockd: Factory) -> None:
    own, seen = source_port_at_target(sockd(CONFIG.format(setting=SAMEPORT)))
    assert seen == own


def test_privileged_source_port_is_not_kept_without_the_word(sockd: Factory) -> None:
    own, seen = source_port_at_target(sockd(CONFIG.format(setting="")))
    assert seen != own and seen >= 1024


def find_free_privileged_port() -> int:
    for port in range(1023, 600, -1):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.5", port))
            except OSError:
                continue
            return port
    pytest.fail("no privileged port is free")


@pytest.mark.parametrize("setting", [SAMEPORT, ""], ids=["sameport", "plain"])
def test_bind_gets_a_privileged_port_only_with_the_word(
    sockd: Factory, setting: str, peer: Callable[..., Any]
) -> None:
    server = sockd(CONFIG.format(setting=setting))
    wanted = find_free_privileged_port()
    with Client(server.addresses[0]) as client:
        reply = client.open5(BIND, "0.0.0.0", wanted)
        assert reply.code == 0
        assert (reply.port == wanted) is (setting == SAMEPORT)
        with socket.create_connection((reply.host, reply.port), 10) as visitor:
            assert client.read_reply5().code == 0
            visitor.sendall(b"hello")
            assert client.receive(5) == b"hello"


# ------------------------------ draft-5.05 ------------------------------

DRAFT = "compatibility: draft-5.05"
USE_CLIENTS_PORT = 4


def ask_for_port(client: Client, host: str, port: int, flags: int) -> tuple[int, tuple[str, int]]:
    """Send a UDP ASSOCIATE with flags in its RSV, and give those of the reply, and the relay."""
    assert client.greet() == 0
    client.has_association = True
    client.send(request5(UDP_ASSOCIATE, host, port, reserved=flags))
    version, code, reserved, _, *address = client.receive(10)
    assert (version, code) == (5, 0)
    return reserved, (".".join(map(str, address[:4])), address[4] << 8 | address[5])


@pytest.mark.parametrize("kind", ["sockd", pytest.param("danted", marks=pytest.mark.dante)])
@pytest.mark.parametrize(
    ("setting", "flags", "granted"),
    [(DRAFT, 4, 4), (DRAFT, 0, 0), ("", 4, 0)],
    ids=["asked", "unasked", "plain"],
)
def test_use_of_the_clients_port_is_granted_only_with_the_word(
    request: pytest.FixtureRequest, kind: str, setting: str, flags: int, granted: int
) -> None:
    server = request.getfixturevalue(kind)(CONFIG.format(setting=setting))
    with Client(server.addresses[0]) as client:
        assert ask_for_port(client, "0.0.0.0", 0, flags)[0] == granted


def test_the_port_that_the_request_names_is_used(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG.format(setting=DRAFT))
    target = peer("udp-echo")
    with Client(server.addresses[0]) as client, UdpClient() as udp:
        granted, relay = ask_for_port(client, *udp.address, USE_CLIENTS_PORT)
        assert granted == USE_CLIENTS_PORT
        udp.send(relay, *target.address, b"ping")
        assert udp.receive(relay).data == b"ping"
        assert [remote[1] for _, remote in target.seen] == [udp.address[1]]


def test_a_port_that_is_taken_is_not_granted(sockd: Factory) -> None:
    server = sockd(CONFIG.format(setting=DRAFT))
    with UdpClient() as udp, UdpClient(("127.0.0.5", udp.address[1])), Client(server.addresses[0]) as client:
        assert ask_for_port(client, *udp.address, USE_CLIENTS_PORT)[0] == 0
