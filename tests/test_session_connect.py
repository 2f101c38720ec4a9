"""CONNECT with the real program: every form of the request, every way to fail and to end."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from client import (
    BIND,
    CONNECT,
    GRANTED,
    NO_METHOD,
    REJECTED,
    Address,
    Client,
    Feed,
    bytewise,
    greeting,
    random_splits,
    request4,
    request5,
    whole,
)
from conftest import Factory
from more_peers import (
    CLIENT_PASS,
    EVERYTHING,
    HEAD,
    IPV4_HEAD,
    SILENT_HOST,
    SOCKS_PASS,
    NameServer,
    add_silent_network,
    answer_with_digest,
    change_address,
    count_keepalive_timers,
    greet_and_reset,
    highest_descriptor,
    lines_about,
    measure_idleness,
    never_read,
    pattern,
    read_memory_bytes,
    read_with_mark,
    receive_much,
    rule,
    run_all,
    send_with_mark,
    target_that,
    wait_for_line,
    world_that_asks,
)
from peers import Seen, echo
from servers import Server, Sockd, World, eventually

import sockd as program

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

BLOCKED_HOST = "127.0.0.66"
IDLE_HOST, FIN_WAIT_HOST = "127.0.0.11", "127.0.0.12"
SHARED_CONFIG = (
    HEAD
    + "timeout.connect: 1\n"
    + CLIENT_PASS
    + rule("socks block", f"from: 0/0 to: {BLOCKED_HOST}/32", "log: connect disconnect error")
    + rule(
        "socks pass", f"from: 0/0 to: {IDLE_HOST}/32", "timeout.io.tcp: 1", "log: connect disconnect error"
    )
    + rule(
        "socks pass",
        f"from: 0/0 to: {FIN_WAIT_HOST}/32",
        "timeout.tcp_fin_wait: 1",
        "log: connect disconnect error",
    )
    + rule("socks pass", "from: 0/0 to: 0/0", "command: connect", "log: connect disconnect error")
)


@pytest.fixture(scope="module")
def running(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that need nothing special."""
    add_silent_network()
    server = Sockd(SHARED_CONFIG, tmp_path_factory.mktemp("shared"), world=private_world)
    yield server
    server.close()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The shared server, which must give back after the test all that it took."""
    yield running
    running.check_resources()


# ------------------------------ forms of the request ------------------------------


@dataclass(frozen=True)
class Form:
    """One way to ask for a host."""

    version: int
    host: str | bytes
    at: str = "127.0.0.1"  # where the target listens

    def opening(self, port: int) -> bytes:
        """Give all that a client says before its data."""
        if self.version == 4:
            return request4(CONNECT, self.host, port, b"user")
        return greeting() + request5(CONNECT, self.host, port)

    def read_granted(self, client: Client) -> Address:
        """Read all that the server says before the target's data; give BND."""
        if self.version == 4:
            code, host, port = client.read_reply4()
            assert code == GRANTED
            return host, port
        assert client.read_method() == NO_METHOD
        reply = client.read_reply5()
        assert reply.code == 0
        return reply.host, reply.port


FORMS = {
    "v5-ipv4": Form(5, "127.0.0.1"),
    "v5-ipv6": Form(5, "::1", "::1"),
    "v5-mapped": Form(5, "::ffff:127.0.0.1"),
    "v5-name": Form(5, "echo.test"),
    "v5-name-of-ipv6": Form(5, "six.test", "fd00::6"),
    "v5-ipv4-as-name": Form(5, b"127.0.0.1"),
    "v5-ipv6-as-name": Form(5, b"::1", "::1"),
    "v4": Form(4, "127.0.0.1"),
    "v4a": Form(4, "echo.test"),
}
FEEDS = {"whole": whole, "bytewise": bytewise, "split": random_splits(1928)}
by_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
by_feed = pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)


@by_form
@by_feed
def test_connect_relays_both_ways_and_names_its_own_address(
    server: Server, peer: StartPeer, form: Form, feed: Feed
) -> None:
    target = peer("echo", form.at)
    with Client(server.addresses[0], feed) as client:
        client.send(form.opening(target.port))
        bound = form.read_granted(client)
        assert client.exchange(b"there and back") == b"there and back"
        assert bound == (target.seen[0].remote if form.version == 5 or form.at != "::1" else ("0.0.0.0", 0))


def test_connect_works_step_by_step_over_an_ipv6_listener(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    with Client(server.addresses[1]) as client:
        reply = client.open5(CONNECT, "127.0.0.1", target.port)
        assert (reply.code, reply.host) == (0, "127.0.0.1")
        assert client.exchange(b"six to four") == b"six to four"


def test_request_may_be_socks4_after_a_socks5_greeting(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.greet() == NO_METHOD
        assert client.request4(CONNECT, "127.0.0.1", target.port).code == GRANTED
        assert client.exchange(b"four") == b"four"


@by_form
@by_feed
def test_bytes_behind_the_request_reach_the_target_before_the_client_reads(
    server: Server, peer: StartPeer, form: Form, feed: Feed
) -> None:
    target = peer("echo", form.at)
    with Client(server.addresses[0], feed) as client:
        client.send(form.opening(target.port) + b"optimistic data")
        eventually(lambda: target.seen and bytes(target.seen[0].data) == b"optimistic data")
        form.read_granted(client)
        assert client.receive(15) == b"optimistic data"


@pytest.mark.parametrize("size", [1, 5, 4096, 40_000, 400_000])
@pytest.mark.parametrize("version", [4, 5])
def test_bytes_behind_the_request_are_counted(
    server: Server, peer: StartPeer, version: int, size: int
) -> None:
    target, form = peer("discard"), Form(version, "127.0.0.1")
    with Client(server.addresses[0]) as client:
        client.send(form.opening(target.port) + pattern(size))
        client.finish_sending()
        bound = form.read_granted(client)
        client.expect_end()
        here, at = f"127.0.0.1.{client.address[1]}", f"127.0.0.1.{server.port}"
        line = wait_for_line(server, client.address, "tcp/connect ]:")
        assert (
            f": 0 -> {here} {at} -> {size}, {size} -> {bound[0]}.{bound[1]} 127.0.0.1.{target.port} -> 0: "
            in line
        )
        line = wait_for_line(server, client.address, "tcp/accept ]:")
        assert f": 0 -> {here} {at} -> {size}: local client closed." in line
    assert bytes(target.seen[0].data) == pattern(size)


def test_each_direction_is_counted_by_itself(server: Server, peer: StartPeer) -> None:
    target = peer("farewell")
    with Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        client.send(b"abc")
        client.finish_sending()
        assert client.receive_all() == b"farewell"
        line = wait_for_line(server, client.address, "tcp/connect ]:")
        here = f"127.0.0.1.{client.address[1]} 127.0.0.1.{server.port}"
        assert f": 8 -> {here} -> 3, 3 -> " in line
        assert f" 127.0.0.1.{target.port} -> 8: local client closed." in line
        assert f": 8 -> {here} -> 3: local client closed." in wait_for_line(
            server, client.address, "tcp/accept ]:"
        )


# ------------------------------ ways to fail ------------------------------

FAILURES = [
    pytest.param("127.0.0.1", None, 5, "remote peer error (Connection refused)", id="refused"),
    pytest.param("::1", None, 5, "remote peer error (Connection refused)", id="refused-ipv6"),
    pytest.param("two.test", None, 5, "remote peer error (Connection refused)", id="refused-name"),
    pytest.param("203.0.113.1", 80, 3, "Network is unreachable", id="network-unreachable"),
    pytest.param("2001:db8::1", 80, 3, "Network is unreachable", id="network-unreachable-ipv6"),
    pytest.param("198.51.100.1", 80, 4, "No route to host", id="host-unreachable"),
    pytest.param("far.test", 80, 4, "No route to host", id="host-unreachable-name"),
    pytest.param("198.51.100.2", 80, 1, "Permission denied", id="prohibited"),
    pytest.param("198.51.100.3", 80, 1, "Invalid argument", id="invalid"),
    pytest.param(SILENT_HOST, 80, 6, "connect timeout", id="timeout"),
    pytest.param("nowhere.test", 80, 4, 'could not resolve hostname "nowhere.test": ', id="unknown-name"),
    pytest.param("127.0.0.1", 0, 8, "unbound port (127.0.0.1.0) in request", id="port-0"),
    pytest.param("echo.test", 0, 8, "unbound port (echo.test.0) in request", id="port-0-name"),
    pytest.param("0.0.0.0", 80, 8, "unbound ipaddress (0.0.0.0.80) in request", id="any-address"),
    pytest.param("::", 80, 8, "unbound ipaddress (::.80) in request", id="any-address-ipv6"),
    pytest.param(BLOCKED_HOST, 80, 2, "blocked by higher-level socks-rule #1", id="blocked"),
]
by_failure = pytest.mark.parametrize(("host", "port", "code", "reason"), FAILURES)


@by_failure
def test_failure_has_its_reply_its_reason_and_a_clean_end(
    server: Server, peer: StartPeer, host: str, port: int | None, code: int, reason: str
) -> None:
    number = peer("refuser", "::1" if ":" in host else "127.0.0.1").port if port is None else port
    with Client(server.addresses[0]) as client:
        reply = client.open5(CONNECT, host, number)
        assert reply.code == code
        client.expect_end()
        wait_for_line(server, client.address, "tcp/accept ]:", reason)
        assert not any("tcp/connect [" in line for line in lines_about(server, client.address))


@by_failure
def test_failure_is_91_in_socks4(
    server: Server, peer: StartPeer, host: str, port: int | None, code: int, reason: str
) -> None:
    spelled = host.encode() if ":" in host else host  # an IPv6 address goes as a name of SOCKS 4A
    number = peer("refuser", "::1" if ":" in host else "127.0.0.1").port if port is None else port
    with Client(server.addresses[0]) as client:
        assert client.request4(CONNECT, spelled, number).code == REJECTED
        client.expect_end()
        wait_for_line(server, client.address, "tcp/accept ]:")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "echo.test"])
def test_refusal_by_a_rule_echoes_the_request(sockd: Any, private_world: World, host: str) -> None:
    server = sockd(
        HEAD + CLIENT_PASS + rule("socks block", "from: 0/0 to: 0/0", "log: connect"), world=private_world
    )
    with Client(server.addresses[0]) as client:
        reply = client.open5(CONNECT, host, 4711)
        assert (reply.code, reply.host, reply.port) == (2, host, 4711)
        client.expect_end()


def test_refusal_to_an_address_of_a_family_without_external_is_8(sockd: Any, private_world: World) -> None:
    server = sockd(IPV4_HEAD + CLIENT_PASS + SOCKS_PASS, world=private_world)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "::1", 80).code == 8
        client.expect_end()
        wait_for_line(server, client.address, "no IPv6 address configured")


def test_early_data_of_a_refused_request_does_not_cost_the_reply(server: Server, peer: StartPeer) -> None:
    form = Form(5, "127.0.0.1")
    with Client(server.addresses[0]) as client:
        client.send(form.opening(peer("refuser").port) + pattern(100_000))
        wait_for_line(server, client.address, "tcp/accept ]:", "Connection refused")
        assert client.read_method() == NO_METHOD
        assert client.read_reply5().code == 5


@pytest.mark.parametrize("command", [0, 4, 9, 255])
def test_unknown_command_of_socks5_is_answered_with_7(server: Server, command: int) -> None:
    with Client(server.addresses[0]) as client:
        assert client.open5(command, "127.0.0.1", 80).code == 7
        client.expect_end_or_reset()
        wait_for_line(server, client.address, f"unknown socks_v5 command: {command}")


@pytest.mark.parametrize("kind", [0, 2, 5, 255])
def test_unknown_address_type_is_answered_with_8(server: Server, kind: int) -> None:
    with Client(server.addresses[0]) as client:
        client.greet()
        client.send(bytes([5, CONNECT, 0, kind, 127, 0, 0, 1, 0, 80]))
        assert client.read_reply5().code == 8
        client.expect_end_or_reset()
        wait_for_line(server, client.address, f"address type: {kind}")


@pytest.mark.parametrize("command", [0, 3, 9, 255])
def test_unknown_command_of_socks4_is_answered_with_91(server: Server, command: int) -> None:
    with Client(server.addresses[0]) as client:
        assert client.request4(command, "127.0.0.1", 80).code == REJECTED
        client.expect_end_or_reset()


@pytest.mark.parametrize("version", [0, 1, 3, 6])
def test_wrong_version_in_a_request_gets_silence(server: Server, peer: StartPeer, version: int) -> None:
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        client.greet()
        client.send(request5(CONNECT, "127.0.0.1", target.port, version=version))
        client.expect_end_or_reset()
        wait_for_line(server, client.address, "tcp/accept ]:", "error after reading")
    assert not target.seen


@pytest.mark.parametrize("methods", [b"", b"\x01", b"\x02", b"\xff", b"\x80\x02"])
def test_greeting_without_an_acceptable_method_gets_255(server: Server, methods: bytes) -> None:
    with Client(server.addresses[0]) as client:
        assert client.greet(methods) == 255
        client.expect_end()
        wait_for_line(server, client.address, "client offered no acceptable authentication method")


def test_blocked_client_gets_no_byte_and_one_line(sockd: Any, private_world: World) -> None:
    block = rule("client block", "from: 127.0.0.9 to: 0/0", "log: connect")
    server = sockd(HEAD + block + CLIENT_PASS + SOCKS_PASS, world=private_world)
    with Client(server.addresses[0], source=("127.0.0.9", 0)) as client:
        client.expect_end()
        line = wait_for_line(server, client.address, "block(1): tcp/accept ]:")
        assert line.endswith(f" 127.0.0.9.{client.address[1]} 127.0.0.1.{server.port}")
    with Client(server.addresses[0]) as client:
        assert client.greet() == NO_METHOD


def test_client_that_no_rule_matches_leaves_a_line(sockd: Any, private_world: World) -> None:
    server = sockd(HEAD + rule("client pass", "from: 127.0.0.9 to: 0/0") + SOCKS_PASS, world=private_world)
    with Client(server.addresses[0]) as client:
        client.expect_end()
        wait_for_line(server, client.address, "block(0): tcp/accept ]:")


def test_request_that_no_rule_matches_leaves_a_line(sockd: Any, private_world: World) -> None:
    client_rule = rule("client pass", "from: 0/0 to: 0/0")
    server = sockd(HEAD + client_rule + rule("socks pass", "from: 127.0.0.9 to: 0/0"), world=private_world)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", 80).code == 2
        wait_for_line(server, client.address, "block(0): tcp/connect ]:")


def test_client_that_resets_ends_the_connect_it_waits_for(sockd: Any, private_world: World) -> None:
    server = sockd(EVERYTHING, world=private_world)
    add_silent_network()
    with Client(server.addresses[0]) as client:
        address = client.address
        client.greet()
        client.send(request5(CONNECT, SILENT_HOST, 80))
        eventually(lambda: server.find_excess())
        eventually(lambda: SILENT_HOST in list_connecting())
        client.reset()
    wait_for_line(server, address, "tcp/connect ]:", "local client closed")
    eventually(lambda: SILENT_HOST not in list_connecting())


def list_connecting() -> set[str]:
    """List the IPv4 hosts that somebody in this network is connecting to."""
    with open("/proc/thread-self/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    waiting = [row[2].split(":")[0] for row in rows if row[3] == "02"]
    return {socket.inet_ntoa(bytes.fromhex(text)[::-1]) for text in waiting}


# ------------------------------ the server's own listeners ------------------------------

OURSELVES = "client is requesting a connection to the same address we listen to new clients on"


@pytest.mark.parametrize("host", ["127.0.0.1", "::ffff:127.0.0.1", b"localhost", b"127.1"])
@pytest.mark.parametrize("factory", ["sockd", "danted"], indirect=True)
def test_nobody_is_connected_to_the_server_itself(
    factory: Factory, private_world: World, host: str | bytes
) -> None:
    """Through itself a client would be one of the server's own host, and as many as it likes."""
    server = factory(IPV4_HEAD + CLIENT_PASS + SOCKS_PASS, world=private_world)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, host, server.port).code == 2
        address = client.address
    assert OURSELVES in wait_for_line(server, address, "block(1): tcp/connect ]:")


def test_nobody_is_connected_to_another_listener_of_the_server(server: Server) -> None:
    for here, there in (server.addresses[:2], server.addresses[1::-1]):
        with Client(here) as client:
            assert client.open5(CONNECT, *there).code == 2
    with Client(server.addresses[0]) as client:
        assert client.request4(CONNECT, *server.addresses[0]).code == REJECTED


def test_wildcard_listens_at_every_address_of_the_machine(sockd: Factory, peer: StartPeer) -> None:
    config = (IPV4_HEAD + CLIENT_PASS + SOCKS_PASS).replace("internal: 127.0.0.1", "internal: 0.0.0.0")
    server = sockd(config)
    at = ("127.0.0.1", server.port)
    for host in ("127.0.0.1", "127.0.0.77"):
        with Client(at) as client:
            assert client.open5(CONNECT, host, server.port).code == 2
    with Client(at) as client:
        assert client.open5(CONNECT, "127.0.0.77", peer("echo", "127.0.0.77").port).code == 0


# ------------------------------ names ------------------------------

BAD_NAMES = [
    pytest.param(b"", id="empty"),
    pytest.param(b"a..b", id="empty-label"),
    pytest.param(b".echo.test", id="leading-dot"),
    pytest.param(b"l" * 64 + b".test", id="long-label"),
    pytest.param(b"n" * 255, id="255-bytes"),
    pytest.param(b".".join([b"n" * 50] * 5), id="254-bytes"),
    pytest.param(b"\xff\xfe\x80", id="not-utf8"),
    pytest.param("b\u00fccher.test".encode(), id="raw-idn"),
    pytest.param(b"echo.test\0.example.org", id="nul"),
    pytest.param(b"\0", id="only-nul"),
    pytest.param(b"[::1]", id="bracketed"),
    pytest.param(b"127.0.0.1 ", id="trailing-blank"),
    pytest.param(b" 127.0.0.1", id="leading-blank"),
    pytest.param(b"127.0.0.1\n", id="newline"),
    pytest.param(b"127.0.0.1\n127.0.0.1", id="newline-inside"),
    pytest.param(b"%s%n%d", id="percent"),
    pytest.param(b"../../etc/passwd", id="path"),
    pytest.param(b"-h", id="option"),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_cannot_be_one_is_host_unreachable(server: Server, peer: StartPeer, name: bytes) -> None:
    target = peer("discard", "::")
    with Client(server.addresses[0]) as client:
        reply = client.open5(CONNECT, name, target.port)
        assert reply.code == 4
        assert reply.host.encode("latin-1") == name
        client.expect_end()
        line = wait_for_line(server, client.address, "tcp/connect ]:", "could not resolve hostname")
        assert line.isprintable()
    assert not target.seen


def test_name_of_253_bytes_reaches_the_name_server(
    private_world: World, tmp_path: Any, sockd: Any, peer: StartPeer
) -> None:
    name = ".".join(["n" * 49] * 5 + ["xyz"])
    with contextlib.closing(NameServer({name: [["127.0.0.1"]]})) as names:
        server = sockd(EVERYTHING, world=world_that_asks(names, private_world, tmp_path))
        target = peer("echo")
        for spelled in (name, name.upper(), name + "."):
            with Client(server.addresses[0]) as client:
                assert client.open5(CONNECT, spelled, target.port).code == 0, spelled
                assert client.exchange(b"long") == b"long"


@pytest.mark.parametrize("at", ["127.0.0.1", "127.0.0.2"])
def test_all_addresses_of_a_name_are_tried(server: Server, peer: StartPeer, at: str) -> None:
    target = peer("echo", at)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "multi.test", target.port).code == 0
        assert client.exchange(b"found") == b"found"


@pytest.mark.parametrize("at", ["127.0.0.1", "fd00::6"])
def test_addresses_of_both_families_of_a_name_are_tried(server: Server, peer: StartPeer, at: str) -> None:
    target = peer("echo", at)
    with Client(server.addresses[0]) as client:
        reply = client.open5(CONNECT, "both.test", target.port)
        assert (reply.code, reply.host) == (0, at)
        assert client.exchange(b"found") == b"found"


@pytest.mark.parametrize("first", ["192.0.2.1", "198.51.100.1", "203.0.113.1", "198.51.100.2"])
def test_address_that_fails_does_not_hide_the_next(
    private_world: World, tmp_path: Any, sockd: Any, peer: StartPeer, first: str
) -> None:
    add_silent_network()
    with contextlib.closing(NameServer({"some.test": [[first, "127.0.0.1"]]})) as names:
        server = sockd(EVERYTHING, world=world_that_asks(names, private_world, tmp_path))
        target = peer("echo")
        for _ in range(3):
            with Client(server.addresses[0]) as client:
                assert client.open5(CONNECT, "some.test", target.port).code == 0
                assert client.exchange(b"found") == b"found"


@pytest.mark.parametrize(("gone", "kept"), [("192.0.2.9", "fd00::6"), ("fd00::9", "127.0.0.1")])
def test_outgoing_address_that_has_gone_does_not_hide_the_other_family(
    sockd: Any, private_world: World, peer: StartPeer, gone: str, kept: str
) -> None:
    head = IPV4_HEAD.replace("external: 127.0.0.1", f"external: {gone}\nexternal: {kept}")
    change_address("add", gone)
    server, target = sockd(head + CLIENT_PASS + SOCKS_PASS, world=private_world), peer("echo", kept)
    change_address("del", gone)
    with Client(server.addresses[0]) as client:
        reply = client.open5(CONNECT, "both.test", target.port)
        assert (reply.code, reply.host) == (0, kept)
        assert client.exchange(b"found") == b"found"
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "fd00::6" if ":" in gone else "127.0.0.1", target.port).code == 1
        wait_for_line(server, client.address, "tcp/connect ]:", "could not connect: Cannot assign requested")


def test_shortage_ends_a_race_at_once() -> None:
    """It is the same for all targets."""
    asked = []

    def open_for(target: program.Endpoint) -> socket.socket:
        asked.append(target)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    targets = [program.Endpoint(host, 9, 4) for host in ("127.0.0.1", "127.0.0.2")]
    with socket.socket() as client:
        race = program.Race(targets, open_for, client.fileno(), time.monotonic() + 10)
        with pytest.raises(OSError, match="Too many open files"):
            race.run()
    assert asked == targets[:1]


def test_name_that_rebinds_stays_with_the_address_that_was_judged(
    private_world: World, tmp_path: Any, sockd: Any, peer: StartPeer
) -> None:
    config = HEAD + CLIENT_PASS + rule("socks block", "from: 0/0 to: 127.0.0.2", "log: connect") + SOCKS_PASS
    answers = [["127.0.0.9"], ["127.0.0.2"]]
    with contextlib.closing(NameServer({"rebind.test": answers})) as names:
        server = sockd(config, world=world_that_asks(names, private_world, tmp_path))
        target, secret = peer("echo", "127.0.0.9"), peer("discard", "127.0.0.2")
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "rebind.test", target.port).code == 0
            assert client.exchange(b"first") == b"first"
            assert names.asked["rebind.test"] <= 2  # one question a family
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "rebind.test", secret.port).code == 2
        assert not secret.seen


@pytest.mark.parametrize(
    "answer", [["127.0.0.9", "127.0.0.2"], ["127.0.0.2", "127.0.0.9"], ["127.0.0.9", "::1"]]
)
def test_name_with_one_blocked_address_is_blocked(
    private_world: World, tmp_path: Any, sockd: Any, peer: StartPeer, answer: list[str]
) -> None:
    blocks = [rule("socks block", f"from: 0/0 to: {to}", "log: connect") for to in ("127.0.0.2", "::1")]
    with contextlib.closing(NameServer({"mixed.test": [answer]})) as names:
        world = world_that_asks(names, private_world, tmp_path)
        server = sockd(HEAD + CLIENT_PASS + "".join(blocks) + SOCKS_PASS, world=world)
        target = peer("discard", "::")
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "mixed.test", target.port).code == 2
        assert not target.seen


def test_name_is_blocked_by_an_address_of_the_family_that_nothing_leaves_by(
    private_world: World, tmp_path: Any, sockd: Any, peer: StartPeer
) -> None:
    head = HEAD.replace("external: 127.0.0.1\n", "")
    block = rule("socks block", "from: 0/0 to: 127.0.0.0/8", "log: connect")
    answers = {"dual.test": [["127.0.0.9", "::1"]], "sole.test": [["::1"]]}
    with contextlib.closing(NameServer(answers)) as names:
        world = world_that_asks(names, private_world, tmp_path)
        server = sockd(head + CLIENT_PASS + block + SOCKS_PASS, world=world)
        target = peer("echo", "::1")
        for name, code in (("dual.test", 2), ("sole.test", 0)):
            with Client(server.addresses[0]) as client:
                assert client.open5(CONNECT, name, target.port).code == code


@pytest.mark.parametrize(("to", "questions"), [("127.0.0.9", 1), ("::1", 2)])
def test_name_is_asked_for_no_family_that_nothing_needs(
    private_world: World, tmp_path: Any, sockd: Any, peer: StartPeer, to: str, questions: int
) -> None:
    block = rule("socks block", f"from: 0/0 to: {to}", "log: connect")
    with contextlib.closing(NameServer({"four.test": [["127.0.0.1"]]})) as names:
        world = world_that_asks(names, private_world, tmp_path)
        server = sockd(IPV4_HEAD + CLIENT_PASS + block + SOCKS_PASS, world=world)
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "four.test", peer("echo").port).code == 0
        assert names.asked["four.test"] == questions


def change_addresses(verb: str, hosts: list[str]) -> None:
    """Add addresses to the loopback interface of this thread's network, or delete them."""
    lines = "".join(f"address {verb} {host}/32 dev lo\n" for host in hosts)
    subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)


def test_every_address_of_an_interface_is_blocked_however_many(
    private_world: World, sockd: Any, peer: StartPeer
) -> None:
    block = rule("socks block", "from: 0/0 to: lo", "log: connect")
    hosts = [f"127.9.{number // 100}.{number % 100}" for number in range(300)]
    change_addresses("add", hosts)
    try:
        server = sockd(IPV4_HEAD + CLIENT_PASS + block + SOCKS_PASS, world=private_world)
        target = peer("discard", hosts[-1])
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, hosts[-1], target.port).code == 2
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "127.9.9.9", target.port).code == 5
    finally:
        change_addresses("del", hosts)


def test_name_with_one_passed_address_uses_only_that(
    server: Server, sockd: Any, private_world: World, peer: StartPeer
) -> None:
    only = rule("socks pass", "from: 0/0 to: 127.0.0.1", "log: connect")
    strict = sockd(HEAD + CLIENT_PASS + only, world=private_world)
    target = peer("echo", "127.0.0.2")  # multi.test is 127.0.0.2, too
    with Client(strict.addresses[0]) as client:
        assert client.open5(CONNECT, "multi.test", target.port).code == 5
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "multi.test", target.port).code == 0


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("example.test", 2),
        ("www.example.test", 2),
        ("WWW.Example.Test", 2),
        ("xexample.test", 0),
        ("echo.test", 0),
    ],
)
def test_domain_in_a_rule_matches_at_the_border_of_a_label(
    sockd: Any, private_world: World, peer: StartPeer, host: str, code: int
) -> None:
    block = rule("socks block", "from: 0/0 to: .example.test", "log: connect")
    server = sockd(HEAD + CLIENT_PASS + block + SOCKS_PASS, world=private_world)
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, host, target.port).code == code
        if code == 0:
            assert client.exchange(b"in") == b"in"
    assert len(target.seen) == (code == 0)


# ------------------------------ SSRF ------------------------------

INNER_NETWORKS = (
    "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "10.0.0.0/8", "::/128", "::1/128", "::/96",
    "64:ff9b::/96", "fc00::/7", "fe80::/10",
)  # fmt: skip
ALLOWED_HOST = "127.9.9.9"
SAFE_CONFIG = (
    HEAD
    + CLIENT_PASS
    + rule("socks pass", f"from: 0/0 to: {ALLOWED_HOST}/32", "log: connect")
    + "".join(rule("socks block", f"from: 0/0 to: {network}", "log: connect") for network in INNER_NETWORKS)
    + SOCKS_PASS
)
INNER_ADDRESSES = (
    "127.0.0.1", "127.0.0.2", "127.255.255.254", "0.0.0.0", "0.0.0.1", "169.254.169.254", "10.0.0.1",
    "::1", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0", "::ffff:169.254.169.254", "::127.0.0.1", "::7f00:1",
    "64:ff9b::7f00:1", "fd00:ec2::254", "fe80::1", "fc00::1",
)  # fmt: skip
INNER_NAMES = (
    "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0x7f000001", "2130706433", "017700000001", "0177.0.0.1",
    "0", "0.0", "0x0", "00", "0.0.0.0", "169.254.43518", "2852039166", "0xa9fea9fe", "127.0.0.1.", "127.1.",
    "localhost", "LOCALHOST", "localhost.", "two.test", "multi.test", "six.test", "both.test", "::", "::1",
    "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:0:0", "::1%lo", "::1%1", "fe80::1%lo",
    "::%lo", "[::1]", "127.0.0.1%lo", "127.0.0.1 x", "127.0.0.1\0.example.org", "example.org\x00127.0.0.1",
    "%31%32%37.0.0.1", "127。0。0。1", "①②⑦.0.0.1", "127.0.0.1/8", "127.0.0.1:80", "lo", "", ".",
)  # fmt: skip


@pytest.fixture(scope="module")
def safe(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that lets nobody to the inside, but to one address."""
    server = Sockd(SAFE_CONFIG, tmp_path_factory.mktemp("safe"), world=private_world)
    yield server
    server.close()


@pytest.mark.parametrize("version", [4, 5])
def test_no_spelling_of_an_inner_address_gets_round_a_block(
    safe: Server, peer: StartPeer, version: int
) -> None:
    canary = peer("discard", "::")  # hears every address of this machine, of both families
    spellings: list[str | bytes] = [*INNER_ADDRESSES, *(name.encode() for name in INNER_NAMES)]
    got_through = []
    for spelling in spellings:
        form = Form(version, spelling if version == 5 or type(spelling) is bytes else str(spelling).encode())
        with Client(safe.addresses[0]) as client:
            client.send(form.opening(canary.port))
            code = client.read_reply4().code if version == 4 else read_code5(client)
            if code in (0, GRANTED):
                got_through.append(spelling)
            assert code in (REJECTED, 2, 4, 8), spelling
    assert not got_through
    assert not canary.seen
    with Client(safe.addresses[0]) as client:  # it is not merely deaf
        client.send(Form(version, ALLOWED_HOST).opening(canary.port))
        eventually(lambda: canary.seen)


def read_code5(client: Client) -> int:
    """Read method and reply, and give the code."""
    assert client.read_method() == NO_METHOD
    return client.read_reply5().code


@pytest.mark.parametrize("block", ["localhost", "127.0.0.1/32", "lo", "."])
def test_block_by_any_kind_of_address_holds_for_the_numeric_forms(
    sockd: Any, private_world: World, peer: StartPeer, block: str
) -> None:
    rules = rule("socks block", f"from: 0/0 to: {block}", "log: connect") + SOCKS_PASS
    server = sockd(HEAD + CLIENT_PASS + rules, world=private_world)
    canary = peer("discard", "127.0.0.1")
    for host in ("127.0.0.1", b"127.0.0.1", b"127.1", b"0x7f000001", b"2130706433", b"localhost"):
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, host, canary.port).code == 2, host
    for host in ("0.0.0.0", b"0.0.0.0", b"0", b"0x0"):  # connect(2) takes them for 127.0.0.1
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, host, canary.port).code in (2, 4, 8), host
    assert not canary.seen


# ------------------------------ ways to end ------------------------------


def finish(server: Server, client: Client) -> None:
    client.finish_sending()
    client.expect_end()


def read_to_the_end_and_close(server: Server, client: Client) -> None:
    client.receive_all()
    client.close()


def reset_client(server: Server, client: Client) -> None:
    client.reset()


def expect_a_reset(server: Server, client: Client) -> None:
    client.send(b"ping")
    with pytest.raises(ConnectionResetError):
        client.receive_all()


def wait(server: Server, client: Client) -> None:
    client.receive_all()


def read_and_leave_open(server: Server, client: Client) -> None:
    assert client.receive_all() == b"hello"
    wait_for_line(server, client.address, "tcp/connect ]:")


LOCAL_RESET = "local client error (Connection reset by peer)"
REMOTE_RESET = "remote peer error (Connection reset by peer)"
ENDINGS = [
    pytest.param("127.0.0.1", "echo", finish, "local client closed", id="client-first"),
    pytest.param("127.0.0.1", "greeter", read_to_the_end_and_close, "remote peer closed", id="target-first"),
    pytest.param("127.0.0.1", "closer", read_to_the_end_and_close, "remote peer closed", id="target-at-once"),
    pytest.param("127.0.0.1", "discard", reset_client, LOCAL_RESET, id="client-resets"),
    pytest.param("127.0.0.1", "resetter", expect_a_reset, REMOTE_RESET, id="target-resets"),
    pytest.param(IDLE_HOST, "discard", wait, "i/o timeout", id="idle"),
    pytest.param(
        FIN_WAIT_HOST, "holder", finish,
        "tcp-fin-wait timeout (waiting for remote peer to close)", id="target-never-closes",
    ),
    pytest.param(
        FIN_WAIT_HOST, "half-closer", read_and_leave_open,
        "tcp-fin-wait timeout (waiting for client to close)", id="client-never-closes",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("host", "kind", "end", "reason"), ENDINGS)
def test_session_is_logged_with_the_reason_for_its_end(
    server: Server, peer: StartPeer, host: str, kind: str, end: Callable[[Server, Client], None], reason: str
) -> None:
    target = peer(kind, host)
    with Client(server.addresses[0]) as client:
        address = client.address
        assert client.open5(CONNECT, host, target.port).code == 0
        wait_for_line(server, address, "tcp/connect [:", f" {host}.{target.port}")
        end(server, client)
        assert f": {reason}.  Session duration: " in wait_for_line(server, address, "pass(", "tcp/connect ]:")
        assert f": {reason}.  Session duration: " in wait_for_line(server, address, "pass(1): tcp/accept ]:")
    kinds = [line.split(": ")[2] for line in lines_about(server, address)]
    assert kinds == ["tcp/accept [", "tcp/connect [", "tcp/connect ]", "tcp/accept ]"]


def test_timeout_is_not_a_second_late(server: Server, peer: StartPeer) -> None:
    target = peer("discard", IDLE_HOST)
    with Client(server.addresses[0]) as client:
        client.open5(CONNECT, IDLE_HOST, target.port)
        client.expect_end()
        wait_for_line(server, client.address, "tcp/connect ]:", "i/o timeout")
        name = f"{client.address[0]}.{client.address[1]} "
        times = [r.time for r in server.log if name in r.message and "tcp/connect" in r.message]
    assert 1.0 <= times[-1] - times[-2] < 1.8


def test_live_session_is_ended_and_logged_when_the_server_stops(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    server = sockd(EVERYTHING, world=private_world)
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        client.exchange(b"alive")
        server.signal(signal.SIGTERM)
        client.expect_end_or_reset()
        for event in ("tcp/connect ]:", "tcp/accept ]:"):
            line = wait_for_line(server, client.address, event)
            assert ": administrative termination.  Session duration: " in line
            assert ": 5 -> " in line


# ------------------------------ half-close, reset, urgent data ------------------------------


def test_client_may_finish_first_and_still_receive_much(server: Server) -> None:
    upload, download_bytes = random.Random(1).randbytes(8 << 20), 1 << 20
    with target_that(answer_with_digest(download_bytes)) as target, Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        client.send(upload)
        client.finish_sending()
        answer = client.receive_all()
    assert answer[:32] == hashlib.sha256(upload).digest()
    assert answer[32:] == pattern(download_bytes)


def test_target_may_finish_first_and_still_receive_much(server: Server, peer: StartPeer) -> None:
    target, upload = peer("half-closer"), pattern(3 << 20)
    with Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        assert client.receive_all() == b"hello"
        client.send(upload)
        client.finish_sending()
        eventually(lambda: target.seen and target.seen[0].end)
    assert target.seen[0].end == "fin"
    assert target.seen[0].data == upload


@by_form
def test_client_may_finish_right_behind_its_request(server: Server, peer: StartPeer, form: Form) -> None:
    target = peer("farewell", form.at)
    with Client(server.addresses[0]) as client:
        client.send(form.opening(target.port) + b"all I have")
        client.finish_sending()
        form.read_granted(client)
        assert client.receive_all() == b"farewell"
    assert bytes(target.seen[0].data) == b"all I have"


def test_reset_by_the_client_reaches_the_target_as_a_reset(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        client.exchange(b"before")
        client.reset()
    eventually(lambda: target.seen and target.seen[0].end)
    assert str(target.seen[0]) == "6 bytes, reset"


def test_reset_by_the_target_reaches_the_client_as_a_reset(server: Server) -> None:
    with target_that(greet_and_reset) as target, Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        assert client.receive(5) == b"hello"
        client.send(b"!")
        with pytest.raises(ConnectionResetError):
            client.receive(1)


URGENT = [
    pytest.param(b"ab", b"cd", id="between"),
    pytest.param(b"", b"cd", id="first"),
    pytest.param(b"ab", b"", id="last"),
    pytest.param(b"", b"", id="alone"),
    pytest.param(b"x" * 100_000, b"y" * 100_000, id="in-much"),
]


@pytest.mark.parametrize(("before", "behind"), URGENT)
def test_urgent_byte_of_the_client_keeps_its_mark(server: Server, before: bytes, behind: bytes) -> None:
    found: list[tuple[bytes, bytes, bytes]] = []

    def behaviour(connection: socket.socket, seen: Seen) -> None:
        found.append(read_with_mark(connection, len(before) + 1 + len(behind)))
        connection.sendall(b"ok")

    with target_that(behaviour) as target, Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        send_with_mark(client.sock, before, b"!", behind)
        assert client.receive(2) == b"ok"
    assert found == [(before, b"!", behind)]


@pytest.mark.parametrize(("before", "behind"), URGENT)
def test_urgent_byte_of_the_target_keeps_its_mark(server: Server, before: bytes, behind: bytes) -> None:
    def behaviour(connection: socket.socket, seen: Seen) -> None:
        send_with_mark(connection, before, b"!", behind)
        connection.recv(1)

    with target_that(behaviour) as target, Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        assert read_with_mark(client.sock, len(before) + 1 + len(behind)) == (before, b"!", behind)
        address = client.address
    size = len(before) + 1 + len(behind)
    assert f": {size} -> " in wait_for_line(server, address, "tcp/connect ]:")


# ------------------------------ much data ------------------------------


@pytest.mark.parametrize("direction", ["down", "up"])
def test_slow_reader_costs_neither_memory_nor_time(
    sockd: Any, private_world: World, peer: StartPeer, direction: str
) -> None:
    server = sockd(EVERYTHING, world=private_world)
    memory = read_memory_bytes(server.processes())
    size = 16 << 20
    taken = threading.Event()

    def give(connection: socket.socket, seen: Seen) -> None:
        connection.sendall(pattern(size))

    def take(connection: socket.socket, seen: Seen) -> None:
        taken.wait()
        while data := connection.recv(1 << 20):
            seen.data += data

    with target_that(give if direction == "down" else take) as target, Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        sender = threading.Thread(
            target=client.sock.sendall, args=(pattern(size) if direction == "up" else b"",)
        )
        sender.start()
        eventually(lambda: measure_idleness(server, 0.1) == 0)
        assert measure_idleness(server) < 0.05
        assert read_memory_bytes(server.processes()) - memory < 4 << 20
        taken.set()
        received = receive_much(client, size) if direction == "down" else b""
        sender.join()
        client.finish_sending()
        if direction == "up":
            client.expect_end()
            received = bytes(target.seen[0].data)
    assert received == pattern(size)


def test_target_that_never_reads_does_not_keep_a_client_that_resets(server: Server) -> None:
    with target_that(never_read) as target, Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.sock.send(bytes(1 << 20))
        client.reset()
        eventually(lambda: target.seen and target.seen[0].end)


def test_transfers_side_by_side_keep_every_byte(server: Server, peer: StartPeer) -> None:
    target = peer("echo")

    def transfer(seed: int) -> None:
        chance = random.Random(seed)
        data = chance.randbytes(1 << 20)
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "127.0.0.1", target.port).code == 0

            def send() -> None:
                start = 0
                while start < len(data):
                    end = start + chance.choice((1, 100, 1460, 4096, 65536, 100_000))
                    client.sock.sendall(data[start:end])
                    start = end
                client.finish_sending()

            sender = threading.Thread(target=send)
            sender.start()
            digest = hashlib.sha256(client.receive_all()).digest()
            sender.join()
            assert digest == hashlib.sha256(data).digest()

    run_all([lambda seed=seed: transfer(seed) for seed in range(20)])


# ------------------------------ numbers and options ------------------------------


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Let this process have as many descriptors as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_descriptors_above_1024_serve_as_well(sockd: Any, private_world: World, peer: StartPeer) -> None:
    server = sockd(EVERYTHING, world=private_world)
    target = peer("echo")
    with contextlib.ExitStack() as crowd:
        for _ in range(1100):
            crowd.enter_context(Client(server.addresses[0]))
        eventually(lambda: highest_descriptor(server) > 1100)
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "echo.test", target.port).code == 0
            assert client.exchange(b"high") == b"high"


@pytest.mark.parametrize(("options", "timers"), [((), 2), (("-n",), 0)], ids=["default", "-n"])
def test_option_n_turns_keepalive_off(
    sockd: Any, private_world: World, peer: StartPeer, options: tuple[str, ...], timers: int
) -> None:
    server = sockd(EVERYTHING, *options, world=private_world)
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        reply = client.open5(CONNECT, "127.0.0.1", target.port)
        client.exchange(b"x")
        # One towards the client, one towards the target.
        assert count_keepalive_timers(server.port, reply.port) == timers


def test_bind_is_refused_where_only_connect_is_passed(server: Server) -> None:
    with Client(server.addresses[0]) as client:
        assert client.open5(BIND, "0.0.0.0", 0).code == 2
        wait_for_line(server, client.address, "blocked by higher-level socks-rule #0")


def test_session_ends_leave_the_next_one_its_descriptors(server: Server) -> None:
    with target_that(echo) as target:
        for _ in range(100):
            with Client(server.addresses[0]) as client:
                client.send(Form(5, "127.0.0.1").opening(target.port) + b"x")
                assert client.read_method() == NO_METHOD
                client.read_reply5()
                assert client.receive(1) == b"x"
        server.check_resources()
