"""`redirect from`, `redirect to` and `bounce to`.  Debian's danted lacks the module."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from more_peers import IPV4_HEAD, change_address, rule, wait_for_record
from servers import Server, World, check_configuration, eventually, find_free_port

import sockd as program

StartPeer = Callable[..., Any]

ANYBODY = "from: 0/0 to: 0/0"
LOG = "log: connect disconnect error"
CLIENT_PASS = rule("client pass", ANYBODY, LOG)
SOCKS_PASS = rule("socks pass", ANYBODY, LOG)
REPLIES = rule("socks pass", ANYBODY, "command: bindreply udpreply")
ELSEWHERE = "127.0.0.9"  # where nobody listens


def start(sockd: Factory, *items: str, more: str = REPLIES) -> Server:
    """Start a server with one rule for everything that is asked for."""
    return sockd(IPV4_HEAD + CLIENT_PASS + rule("socks pass", ANYBODY, LOG, *items) + more)


def source_at_target(server: Server) -> tuple[str, int]:
    """Connect to a target through the server, and give the source that it sees."""
    with socket.create_server(("127.0.0.1", 0)) as target, Client(server.addresses[0]) as client:
        target.settimeout(10)
        reply = client.open5(CONNECT, "127.0.0.1", target.getsockname()[1])
        assert reply.code == 0
        connection, seen = target.accept()
        connection.close()
        assert (reply.host, reply.port) == seen
        return seen


# ------------------------------ CONNECT ------------------------------


def test_redirect_to_sends_the_client_elsewhere(sockd: Factory, peer: StartPeer) -> None:
    target = peer("echo")
    server = start(sockd, f"redirect to: 127.0.0.1 port = {target.port}")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, ELSEWHERE, 80).code == 0
        assert client.exchange(b"where am I") == b"where am I"
        assert target.seen[0].data == b"where am I"
    assert wait_for_record(server, "tcp/connect [: ").endswith(f" 127.0.0.1.{target.port}")


def test_redirect_to_keeps_the_port_where_it_names_none(sockd: Factory, peer: StartPeer) -> None:
    target = peer("echo")
    server = start(sockd, "redirect to: localhost")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, ELSEWHERE, target.port).code == 0
        assert client.exchange(b"hello") == b"hello"


def test_redirect_to_of_a_client_rule_is_inherited_unless_the_socks_rule_has_its_own(
    sockd: Factory, peer: StartPeer
) -> None:
    first, second = peer("echo"), peer("echo")
    config = (
        IPV4_HEAD
        + rule("client pass", ANYBODY, f"redirect to: 127.0.0.1 port = {first.port}")
        + rule("socks pass", "from: 0/0 to: 0/0 port = 81", f"redirect to: 127.0.0.1 port = {second.port}")
        + SOCKS_PASS
    )
    server = sockd(config)
    for port in (80, 81):
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, ELSEWHERE, port).code == 0
            client.exchange(b"%d" % port)
    assert [peer.seen[0].data for peer in (first, second)] == [b"80", b"81"]


def test_redirect_to_does_not_save_what_the_rules_forbid(sockd: Factory, peer: StartPeer) -> None:
    """The rules judge what was asked for; the way that a redirection takes is open to nobody else."""
    target = peer("echo")
    config = (
        IPV4_HEAD
        + CLIENT_PASS
        + rule("socks block", f"from: 0/0 to: {ELSEWHERE}/32", LOG)
        + rule("socks pass", "from: 0/0 to: 127.0.0.8/32", f"redirect to: 127.0.0.1 port = {target.port}")
    )
    server = sockd(config)
    outcomes = []
    for host, port in ((ELSEWHERE, 80), ("127.0.0.1", target.port), ("127.0.0.8", 80)):
        with Client(server.addresses[0]) as client:
            outcomes.append(client.open5(CONNECT, host, port).code)
    assert outcomes == [2, 2, 0]
    eventually(lambda: len(target.seen) == 1)


def test_redirect_to_a_name_without_an_address_is_answered(sockd: Factory) -> None:
    server = start(sockd, "redirect to: nowhere.invalid")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", 80).code == 4
    wait_for_record(server, "block(1): tcp/connect ]: ", 'could not resolve hostname "nowhere.invalid"')


def test_redirect_from_an_address_that_is_not_external(sockd: Factory) -> None:
    host, _ = source_at_target(start(sockd, "redirect from: 127.0.0.7/32"))
    assert host == "127.0.0.7"


def test_redirect_from_a_network_is_an_external_address_in_it(sockd: Factory) -> None:
    config = IPV4_HEAD.replace("external: 127.0.0.1", "external: 127.0.0.1\nexternal: 127.0.1.5")
    config += CLIENT_PASS + rule("socks pass", ANYBODY, "redirect from: 127.0.1.0/24")
    assert source_at_target(sockd(config))[0] == "127.0.1.5"


def test_redirect_from_an_interface_and_ports_above_a_number(sockd: Factory) -> None:
    server = start(sockd, "redirect from: lo port > 60000")
    for _ in range(5):
        host, port = source_at_target(server)
        assert host == "127.0.0.1" and port > 60000


def test_redirect_from_keeps_to_a_small_range_of_ports(sockd: Factory, peer: StartPeer) -> None:
    low = find_free_port()
    # On an address where nobody else takes ports.
    server = start(sockd, f"redirect from: 127.0.0.77/32 port {low}-{low + 1}")
    target = peer("echo")
    ports = []
    clients = [Client(server.addresses[0]) for _ in range(2)]
    for client in clients:
        reply = client.open5(CONNECT, "127.0.0.1", target.port)
        ports.append(reply.port)
        assert reply.code == 0
    assert sorted(ports) == [low, low + 1]
    for client in clients:
        client.close()


def test_redirect_from_an_address_of_another_machine_is_answered(sockd: Factory) -> None:
    server = start(sockd, "redirect from: 192.0.2.1/32")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", 80).code == 1
    wait_for_record(server, "block(1): tcp/connect ]: ", "Cannot assign requested address")


# ------------------------------ BIND ------------------------------


def test_redirect_from_is_where_bind_listens(sockd: Factory) -> None:
    server = start(sockd, "redirect from: 127.0.0.7/32")
    with Client(server.addresses[0]) as client:
        bound = client.open5(BIND, "0.0.0.0", 0)
        assert (bound.code, bound.host) == (0, "127.0.0.7")
        with Client((bound.host, bound.port)) as visitor:
            assert client.read_reply5().port == visitor.address[1]
            visitor.send(b"hello")
            assert client.receive(5) == b"hello"
        assert wait_for_record(server, "tcp/bind [: ").endswith(f" -> 127.0.0.7.{bound.port} 0.0.0.0.0")


def test_redirect_from_restricts_the_ports_of_bind(sockd: Factory) -> None:
    port = find_free_port()
    server = start(sockd, f"redirect from: 0/0 port = {port}")
    with Client(server.addresses[0]) as client:
        bound = client.open5(BIND, "0.0.0.0", 0)
        assert (bound.code, bound.host, bound.port) == (0, "127.0.0.1", port)


def test_redirect_from_of_replies_is_what_the_client_is_told_of_its_peer(sockd: Factory) -> None:
    replies = rule("socks pass", ANYBODY, "command: bindreply", "redirect from: 192.0.2.7/32 port = 20")
    server = start(sockd, "command: bind", more=replies)
    with Client(server.addresses[0]) as client:
        bound = client.open5(BIND, "0.0.0.0", 0)
        with Client((bound.host, bound.port)):
            reply = client.read_reply5()
            assert (reply.code, reply.host, reply.port) == (0, "192.0.2.7", 20)


# ------------------------------ UDP ------------------------------


def exchange_datagram(server: Server, host: str, port: int) -> tuple[str, int, bytes]:
    """Send a datagram through the server and give what comes back."""
    with Client(server.addresses[0]) as control, UdpClient() as udp:
        reply = control.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        assert reply.code == 0
        relay = (reply.host, reply.port)
        udp.send(relay, host, port, b"datagram")
        answer = udp.receive(relay)
        control.reset()
        return answer.host, answer.port, answer.data


def test_redirect_to_sends_datagrams_elsewhere(sockd: Factory, peer: StartPeer) -> None:
    target = peer("udp-echo")
    server = start(sockd, f"redirect to: 127.0.0.1 port = {target.port}")
    assert exchange_datagram(server, ELSEWHERE, 53) == ("127.0.0.1", target.port, b"datagram")


def test_redirect_from_is_where_datagrams_leave_by_each_rule_for_itself(
    sockd: Factory, peer: StartPeer
) -> None:
    first, second = peer("udp-echo"), peer("udp-echo")
    config = (
        IPV4_HEAD
        + CLIENT_PASS
        + rule("socks pass", f"from: 0/0 to: 0/0 port = {first.port}", "redirect from: 127.0.0.7/32")
        + rule("socks pass", f"from: 0/0 to: 0/0 port = {second.port}", "redirect from: 127.0.0.8/32")
        + REPLIES
    )
    server = sockd(config)
    with Client(server.addresses[0]) as control, UdpClient() as udp:
        reply = control.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        relay = (reply.host, reply.port)
        for target in (first, second, first):
            udp.send(relay, "127.0.0.1", target.port, b"x")
            assert udp.receive(relay).port == target.port
        control.reset()
    assert {host for _, (host, _) in first.seen} == {"127.0.0.7"}
    assert {host for _, (host, _) in second.seen} == {"127.0.0.8"}


def test_redirect_of_replies_hides_where_a_datagram_comes_from(sockd: Factory, peer: StartPeer) -> None:
    target = peer("udp-echo")
    replies = rule("socks pass", ANYBODY, "command: udpreply", f"redirect from: {ELSEWHERE}/32 port = 53")
    server = start(sockd, f"command: udpassociate\nredirect to: 127.0.0.1 port = {target.port}", more=replies)
    assert exchange_datagram(server, ELSEWHERE, 53) == (ELSEWHERE, 53, b"datagram")


def test_redirect_to_of_replies_sends_them_to_another_address(sockd: Factory, peer: StartPeer) -> None:
    target, other = peer("udp-echo"), peer("udp-sink")
    replies = rule("socks pass", ANYBODY, "command: udpreply", f"redirect to: 127.0.0.1 port = {other.port}")
    server = start(sockd, "command: udpassociate", more=replies)
    with Client(server.addresses[0]) as control, UdpClient() as udp:
        reply = control.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        udp.send((reply.host, reply.port), "127.0.0.1", target.port, b"datagram")
        eventually(lambda: other.seen)
        control.reset()
    data, sender = other.seen[0]
    assert data.endswith(b"datagram") and sender == (reply.host, reply.port)


# ------------------------------ bounce ------------------------------


def bounce(port: int) -> str:
    return rule("client pass", ANYBODY, LOG, f"bounce to: 127.0.0.1 port = {port}")


def test_bounce_passes_the_client_on_without_socks(sockd: Factory, peer: StartPeer) -> None:
    target = peer("echo")
    server = sockd(IPV4_HEAD + bounce(target.port))
    with Client(server.addresses[0]) as client:
        assert client.exchange(b"GET / HTTP/1.0\r\n\r\n") == b"GET / HTTP/1.0\r\n\r\n"
    assert wait_for_record(server, "pass(1): tcp/bounce-to [: ").endswith(f" 127.0.0.1.{target.port}")
    wait_for_record(server, "pass(1): tcp/bounce-to ]: 18 -> ", ": local client closed.")
    wait_for_record(server, "pass(1): tcp/accept ]: 18 -> ", " -> 18: local client closed.")


def test_bounce_closes_the_client_when_the_target_refuses(sockd: Factory, peer: StartPeer) -> None:
    server = sockd(IPV4_HEAD + bounce(peer("refuser").port))
    with Client(server.addresses[0]) as client:
        client.expect_end_or_reset()
    wait_for_record(server, "block(1): tcp/accept ]: ", "could not bounce to", "Connection refused")


def test_bounce_tells_of_an_outgoing_address_that_has_gone(sockd: Factory, private_world: World) -> None:
    """The client has done nothing wrong."""
    change_address("add", "192.0.2.9")
    head = IPV4_HEAD.replace("external: 127.0.0.1", "external: 192.0.2.9")
    server = sockd(head + bounce(9), world=private_world)
    change_address("del", "192.0.2.9")
    with Client(server.addresses[0]) as client:
        client.expect_end_or_reset()
    wait_for_record(
        server, "block(1): tcp/accept ]: ", "could not bounce to 127.0.0.1.9: Cannot assign requested"
    )


# ------------------------------ the configuration ------------------------------


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("redirect from: .example.com", "cannot be a domain"),
        ("redirect from: 0/0 port = 80", "cannot take ports below 1024"),
        ("redirect to: 0.0.0.0", "takes the address of one host"),
        ("command: udpreply\nredirect from: 127.0.0.0/8", "of replies must be one address"),
        ("command: udpreply\nredirect to: localhost", "of replies must be one address"),
        ("command: bindreply\nredirect from: 127.0.0.1/32 port > 5", "of replies must be one address"),
    ],
)
def test_redirect_that_cannot_work_is_refused_at_the_start(tmp_path: Path, body: str, complaint: str) -> None:
    config = IPV4_HEAD + CLIENT_PASS + rule("socks pass", ANYBODY, body)
    result = check_configuration(config, tmp_path)
    assert result.returncode == 1
    assert complaint in result.stdout + result.stderr


def test_redirect_to_has_no_effect_on_bind_and_says_so(tmp_path: Path) -> None:
    config = IPV4_HEAD + CLIENT_PASS + rule("socks pass", ANYBODY, "command: bind\nredirect to: 127.0.0.1")
    result = check_configuration(config, tmp_path)
    assert result.returncode == 0
    assert "has no effect on bind" in result.stdout + result.stderr


def test_bounce_needs_a_port(tmp_path: Path) -> None:
    config = IPV4_HEAD + rule("client pass", ANYBODY, "bounce to: 127.0.0.1")
    assert '"bounce to" needs a port' in check_configuration(config, tmp_path).stderr


@pytest.mark.parametrize(
    ("clause", "expected"),
    [("port = 5000", [5000]), ("port > 65533", [65534, 65535]), ("port < 1026", [1024, 1025])],
)
def test_redirect_ports(clause: str, expected: list[int]) -> None:
    text = IPV4_HEAD + CLIENT_PASS + rule("socks pass", ANYBODY, f"redirect from: 0/0 {clause}")
    config, _ = program.parse_config(text, "x", program.SystemSurroundings())
    assert config and config.socks_rules[0].redirect and config.socks_rules[0].redirect.source
    assert list(program.port_candidates(config.socks_rules[0].redirect.source.port)) == expected
