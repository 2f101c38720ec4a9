"""Routes with method gssapi (RFC 1961): sockd as the client of upstreams that take Kerberos tickets.

Debian's danted is built without GSS-API: there is nobody to compare with.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient, request5, wrap
from conftest import Factory
from kerberos import (
    CONFIDENTIALITY,
    DATA,
    INTEGRITY,
    LEVEL,
    REALM,
    SERVICE,
    TOKEN,
    Acceptor,
    GssClient,
    Realm,
    message,
    running_realm,
)
from more_peers import pattern, rule, wait_for_line, wait_for_record
from peers import Seen, TcpPeer, discard, receive
from servers import DidNotStart, Server, eventually, read_process
from test_gssapi import holds, is_jailed, memory_kilobytes, read_key
from upstreams import HEAD, LOG, PASS, REPLY5, route

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]
StartPeer = Callable[..., Any]
LEVELS = ("clear", "integrity", "confidentiality")
METHOD_GSSAPI = b"\x05\x01"
FAILURE, REFUSED = 1, 5
WE = f"proxy/we.test@{REALM}"


@pytest.fixture(scope="module")
def realm(as_root: None) -> Iterator[Realm]:
    """Give a realm with a principal for the server in the middle, and its key table `client`."""
    with running_realm() as started:
        started.add_service("proxy/we.test", started.folder / "client")
        started.add_service("proxy/other.test", started.folder / "other")
        (started.folder / "client").chmod(0o600)
        yield started


@pytest.fixture(autouse=True)
def own_credentials(realm: Realm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have servers find the client key table where Kerberos looks for it, and a cache of their own."""
    monkeypatch.setenv("KRB5_CLIENT_KTNAME", str(realm.folder / "client"))
    monkeypatch.setenv("KRB5CCNAME", f"FILE:{tmp_path}/cache")


def accepting(realm: Realm, *items: str) -> str:
    """Write the configuration of a server whose clients need tickets, with these items in its client-rule."""
    passing = ("from: 0/0 to: 0/0", LOG)
    keytab = f"gssapi.keytab: FILE:{realm.keytab}"
    head = HEAD.replace("socksmethod: none", "socksmethod: gssapi")
    return head + rule("client pass", *passing, keytab, *items) + rule("socks pass", *passing)


def by_ticket(port: int, **items: str) -> str:
    """Write a configuration that goes through an upstream on this port by method gssapi."""
    items = {name.replace("_", "."): value for name, value in items.items()}
    return HEAD + PASS + route(("localhost", port), method="gssapi", **items)


def tap(far: tuple[str, int]) -> Callable[[socket.socket, Seen], None]:
    """Make a behaviour that passes everything on, and notes what goes by in both directions."""

    def behave(connection: socket.socket, seen: Seen) -> None:
        with socket.create_connection(far) as other:
            ways = {connection: other, other: connection}
            while ways:
                for source in select.select(list(ways), [], [])[0]:
                    data = receive(source, seen)
                    if data:
                        ways[source].sendall(data)
                    else:
                        ways.pop(source).shutdown(socket.SHUT_WR)

    return behave


@contextlib.contextmanager
def chain(
    sockd: Factory, realm: Realm, level: str, *options: str, command: str = "connect"
) -> Iterator[tuple[Server, Server, TcpPeer]]:
    """Give a server, its upstream, and the wire between them."""
    far = sockd(accepting(realm, f"gssapi.enctype: {level}"))
    with contextlib.closing(TcpPeer(tap(far.addresses[0]))) as wire:
        text = by_ticket(wire.port, gssapi_enctype=level, command=command)
        yield sockd(text, *options), far, wire


# ------------------------------ what works ------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_connect_goes_by_ticket(
    sockd: Factory, realm: Realm, tmp_path: Path, peer: StartPeer, level: str
) -> None:
    """Workers are locked in an empty directory, and still protect what they relay."""
    (tmp_path / "jail").mkdir()
    target = peer("echo").address
    with chain(sockd, realm, level, "--chroot", str(tmp_path / "jail")) as (server, far, wire):
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *target).code == 0
            for data in (b"visible" * 9, pattern(300_000), b"visible" * 9):
                assert client.exchange(data) == data
            client.finish_sending()
            client.expect_end()
        assert wait_for_record(far, "tcp/connect [", f"gssapi/{level}%{WE}@127.0.0.1")
        eventually(lambda: wire.seen and wire.seen[0].end)
        data = wire.seen[0].data
        at = data.find(b"visible")
        assert (at >= 0) == (level != "confidentiality")
        if at >= 0:  # 4 bytes of RFC 1961 and 16 of RFC 4121 before what is signed
            assert (data[at - 20 : at - 18] == b"\x01\x03") == (level == "integrity")


def test_bulk_goes_both_ways_at_once(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    """So much that it would be spliced, if it had not to be sealed."""
    data = pattern(6_000_000)
    target = peer("echo").address
    with chain(sockd, realm, "confidentiality") as (server, _, _), Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target).code == 0
        client.sock.setblocking(False)
        sent, received = 0, b""
        while len(received) < len(data):
            wanted = [client.sock] if sent < len(data) else []
            readable, writable, _ = select.select([client.sock], wanted, [], 20)
            assert readable or writable
            if readable:
                received += client.sock.recv(1 << 20)
            if writable:
                sent += client.sock.send(data[sent : sent + (1 << 20)])
        assert received == data


def test_what_comes_with_request_and_reply_is_passed_on(
    sockd: Factory, realm: Realm, peer: StartPeer
) -> None:
    """The client's first data, and a target's that speaks first."""
    with chain(sockd, realm, "integrity") as (server, _, _), Client(server.addresses[0]) as client:
        client.send(b"\5\1\0" + request5(CONNECT, *peer("echo").address) + b"early")
        assert client.receive(2) == b"\5\0"
        assert client.read_reply5().code == 0
        assert client.receive(5) == b"early"
        with Client(server.addresses[0]) as other:
            assert other.open5(CONNECT, *peer("greeter").address).code == 0
            assert other.receive(5) == b"hello"


def test_what_comes_behind_a_reply_is_recorded_as_it_came(sockd: Factory, realm: Realm) -> None:
    """And not as it is sealed for the client, who gets it in the order that it is sealed in."""

    def behave(connection: socket.socket, seen: Seen) -> None:
        receive(connection, seen)
        connection.sendall(b"\5\0")
        receive(connection, seen)
        connection.sendall(REPLY5 + b"early")
        discard(connection, seen)

    with contextlib.closing(TcpPeer(behave)) as proxy:
        text = accepting(realm) + route(("localhost", proxy.port), proxyprotocol="socks_v5")
        server = sockd(text.replace(LOG, f"{LOG} data"))
        with GssClient(server.addresses[0], realm) as client:
            client.log_in()
            assert client.request5(CONNECT, "192.0.2.80", 80).code == 0
            assert client.receive(5) == b"early"
        assert wait_for_record(server, "tcp/connect -", "(5): early")
        assert wait_for_record(server, "tcp/connect ]", "192.0.2.80.80 -> 5: ")


def test_http_client_goes_by_ticket(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    host, port = peer("origin").address
    far = sockd(accepting(realm))
    passing = rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http socks_v5", LOG)
    text = by_ticket(far.port).replace(rule("socks pass", "from: 0/0 to: 0/0", LOG), passing)
    server = sockd(text)
    with Client(server.addresses[0]) as client:
        client.send(
            f"GET http://{host}:{port}/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        )
        assert client.receive_all().endswith(b"origin\n")
    assert wait_for_record(far, "tcp/connect [", f"gssapi/confidentiality%{WE}@")


@pytest.mark.parametrize("level", LEVELS)
def test_bind_goes_by_ticket(sockd: Factory, realm: Realm, level: str) -> None:
    with chain(sockd, realm, level, command="bind") as (server, _, _), Client(server.addresses[0]) as client:
        bound = client.open5(BIND, "127.0.0.1", 0)
        assert bound.code == 0
        with Client((bound.host, bound.port)) as visitor:
            assert client.read_reply5().code == 0
            client.send(b"world")
            assert visitor.receive(5) == b"world"
            visitor.send(b"answer")
            assert client.receive(6) == b"answer"


@pytest.mark.parametrize("level", LEVELS[1:])
def test_datagrams_go_by_ticket(sockd: Factory, realm: Realm, peer: StartPeer, level: str) -> None:
    target = peer("udp-echo")
    with (
        chain(sockd, realm, level, command="udpassociate") as (server, _, wire),
        Client(server.addresses[0]) as client,
        UdpClient() as udp,
    ):
        bound = client.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        relay = (bound.host, bound.port)
        for data in (b"one", b"two", b"x" * 9000, b"four"):
            udp.send(relay, *target.address, data)
            answer = udp.receive(relay)
            assert (answer.host, answer.port, answer.data) == (*target.address, data)
        assert wait_for_record(server, "udp/udpassociate -: ", f" localhost.{wire.port} [127.0.0.1.")


@pytest.mark.parametrize("protected", [0, 1])
def test_one_hop_of_a_chain_goes_by_ticket(
    sockd: Factory, realm: Realm, peer: StartPeer, protected: int
) -> None:
    plain, far = sockd(HEAD + PASS), sockd(accepting(realm))
    hops = [f"via: localhost port = {plain.port}\nmethod: none\nproxyprotocol: socks_v5"]
    hops.insert(protected, f"via: localhost port = {far.port}\nmethod: gssapi")
    server = sockd(HEAD + PASS + rule("route", "from: 0/0 to: 0/0", *hops))
    target = peer("echo").address
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target).code == 0
        assert client.exchange(b"through both" * 999) == b"through both" * 999
    assert wait_for_record(far, "tcp/connect [", f"gssapi/confidentiality%{WE}@")


# ------------------------------ who we are, and who they are ------------------------------


@pytest.mark.parametrize("name", ["rcmd", "rcmd/localhost", f"rcmd/localhost@{REALM}"])
def test_service_name_says_who_the_upstream_is(
    sockd: Factory, realm: Realm, peer: StartPeer, name: str
) -> None:
    far = sockd(accepting(realm))
    server = sockd(by_ticket(far.port, gssapi_servicename=name))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("echo").address).code == 0


def test_address_will_do_with_a_principal(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    far = sockd(accepting(realm))
    items = {"method": "gssapi", "gssapi.servicename": SERVICE}
    server = sockd(HEAD + PASS + route(far.addresses[0], **items))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("echo").address).code == 0


def test_key_table_of_the_route_says_who_we_are(
    sockd: Factory, realm: Realm, peer: StartPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever's tickets are in the cache, and each route for itself."""
    monkeypatch.setenv("KRB5CCNAME", str(realm.folder / "cache-alice"))
    far, one, two = sockd(accepting(realm)), peer("echo"), peer("echo", "127.0.0.2")
    where = ("localhost", far.port)
    tables = [f"FILE:{realm.folder}/other", f"{realm.folder}/client"]
    server = sockd(
        HEAD + PASS
        + route(where, to="127.0.0.1/32", method="gssapi", **{"gssapi.keytab": tables[0]})
        + route(where, to="127.0.0.2/32", method="gssapi", **{"gssapi.keytab": tables[1]})
    )  # fmt: skip
    for target in (one, two):
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *target.address).code == 0
    assert wait_for_record(far, "tcp/connect [", f"%proxy/other.test@{REALM}@")
    assert wait_for_record(far, "tcp/connect [", f"%{WE}@")


def test_ticket_cache_of_who_starts_the_server_will_do(
    sockd: Factory, realm: Realm, peer: StartPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KRB5_CLIENT_KTNAME", "/nonexistent/keytab")
    monkeypatch.setenv("KRB5CCNAME", str(realm.folder / "cache-bob"))
    far = sockd(accepting(realm))
    server = sockd(by_ticket(far.port))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("echo").address).code == 0
    assert wait_for_record(far, "tcp/connect [", f"%bob@{REALM}@")


def test_nec_says_the_level_in_the_clear(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    far = sockd(accepting(realm, "clientcompatibility: necgssapi"))
    with contextlib.closing(TcpPeer(tap(far.addresses[0]))) as wire:
        server = sockd(by_ticket(wire.port, clientcompatibility="necgssapi"))
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *peer("echo").address).code == 0
            assert client.exchange(b"hello") == b"hello"
        assert wire.seen[0].data.count(message(LEVEL, b"\x02")) == 2


def test_keys_and_tickets_stay_out_of_the_workers(
    sockd: Factory, realm: Realm, tmp_path: Path, peer: StartPeer
) -> None:
    (tmp_path / "jail").mkdir()
    jail = ("--chroot", str(tmp_path / "jail"))
    with chain(sockd, realm, "integrity", *jail) as (server, _, _), Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("echo").address).code == 0
        eventually(lambda: len(server.processes()) == 4)
        workers = [int(p.pid) for p in server.processes() if is_jailed(p.pid)]
        assert workers
        assert not any(holds(worker, read_key(realm.folder / "client")) for worker in workers)


# ------------------------------ what fails ------------------------------


def expect_failure(server: Server, reason: str, code: int = REFUSED) -> None:
    """Expect that a client is refused, and that the log says why."""
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "192.0.2.80", 80).code == code
        client.expect_end()
        line = wait_for_line(server, client.address, "tcp/connect", "serverchain failed: ")
    assert reason in line


HELPLESS: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "no-key-table": ({"KRB5_CLIENT_KTNAME": "/nonexistent/keytab"}, {}, "gss_init_sec_context() failed: "),
    "no-table-of-route": ({}, {"gssapi_keytab": "FILE:/nonexistent/k"}, "gssapi.keytab: No such file"),
    "unknown-service": ({}, {"gssapi_servicename": "other"}, "Server other/localhost@"),
}


@pytest.mark.parametrize("name", HELPLESS)
def test_without_a_ticket_a_path_fails(
    sockd: Factory, realm: Realm, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Which is no fault of the upstream's: it is not avoided for it."""
    environment, items, reason = HELPLESS[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    server = sockd(by_ticket(sockd(accepting(realm)).port, **items))
    for _ in range(2):
        expect_failure(server, reason, FAILURE)


def test_kdc_that_is_down_fails_the_path(
    sockd: Factory, realm: Realm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(realm.env["KRB5_CONFIG"]).read_text().replace(f":{realm.port}", ":9")
    (tmp_path / "krb5.conf").write_text(text)
    far = sockd(accepting(realm))
    monkeypatch.setenv("KRB5_CONFIG", str(tmp_path / "krb5.conf"))
    expect_failure(sockd(by_ticket(far.port)), "Cannot contact any KDC", FAILURE)


@pytest.mark.parametrize(
    "items", [{"gssapi_servicename": "proxy/other.test"}, {"gssapi_enctype": "confidentiality"}]
)
def test_upstream_with_another_name_or_level_refuses(
    sockd: Factory, realm: Realm, items: dict[str, str]
) -> None:
    far = sockd(accepting(realm, "gssapi.enctype: integrity"))
    expect_failure(sockd(by_ticket(far.port, **items)), "proxy server has aborted the gssapi exchange")


class Upstream:
    """A scripted upstream with a real acceptor: answers with what `answer` makes of its state."""

    def __init__(self, realm: Realm, act: Callable[[Acceptor, socket.socket], None]) -> None:
        self.realm = realm
        self.act = act

    def behave(self, connection: socket.socket, seen: Seen) -> None:
        """Establish a context, and then act."""
        receive(connection, seen)
        connection.sendall(METHOD_GSSAPI)
        token = read_message(connection)
        with Acceptor(self.realm) as acceptor:
            connection.sendall(message(TOKEN, acceptor.accept(token)))
            assert acceptor.unwrap(read_message(connection))[0] == bytes([CONFIDENTIALITY])
            self.act(acceptor, connection)
            discard(connection, seen)


def read_message(connection: socket.socket) -> bytes:
    """Give the token of the next message."""
    head = connection.recv(4, socket.MSG_WAITALL)
    return connection.recv(int.from_bytes(head[2:], "big"), socket.MSG_WAITALL)


def level(wish: bytes) -> Callable[[Acceptor, socket.socket], None]:
    """Make an upstream answer with this level."""
    return lambda acceptor, connection: connection.sendall(message(LEVEL, acceptor.wrap(wish)))


def raw(data: bytes) -> Callable[[Acceptor, socket.socket], None]:
    """Make an upstream answer with these bytes."""
    return lambda _, connection: connection.sendall(data)


def agreed(reply: Callable[[Acceptor], bytes]) -> Callable[[Acceptor, socket.socket], None]:
    """Make an upstream agree on confidentiality, and answer the request with what is built."""

    def act(acceptor: Acceptor, connection: socket.socket) -> None:
        level(bytes([CONFIDENTIALITY]))(acceptor, connection)
        assert acceptor.unwrap(read_message(connection)) == (b"\5\1\0\1\xc0\0\2\x50\0\x50", True)
        connection.sendall(reply(acceptor))

    return act


Act = Callable[[Acceptor, socket.socket], None]
WRONG_LEVEL = "gssapi protection of proxy server is "
HOSTILE: dict[str, tuple[Act, str]] = {
    "lesser": (level(bytes([INTEGRITY])), WRONG_LEVEL + "integrity, and not confidentiality"),
    "clear": (level(b"\0"), WRONG_LEVEL + "clear"),
    "per-message": (level(b"\3"), WRONG_LEVEL + "per-message"),
    "unknown": (level(b"\4"), WRONG_LEVEL + "unknown"),
    "two": (level(b"\2\2"), WRONG_LEVEL + "unknown"),
    "none": (level(b""), WRONG_LEVEL + "unknown"),
    "unsealed": (raw(message(LEVEL, b"\2")), "gss_unwrap() failed: "),
    "not-a-level": (raw(message(TOKEN, b"\2")), "unexpected type on gssapi packet from proxy server: 1"),
    "abort": (raw(b"\1\xff"), "proxy server has aborted the gssapi exchange"),
    "version": (raw(b"\5\1"), "unknown version on gssapi packet from proxy server: 5"),
    "plain-reply": (agreed(lambda a: REPLY5), "unknown version on gssapi packet from proxy server: 5"),
    "signed-reply": (agreed(lambda a: message(DATA, a.wrap(REPLY5))), "a gssapi message is not encrypted"),
    "bent-reply": (agreed(lambda a: message(DATA, a.wrap(REPLY5, True)[:-1] + b"x")), "gss_unwrap() failed"),
    "cut-reply": (agreed(lambda a: message(DATA, a.wrap(REPLY5, True))[:-1]), "no answer from proxy server"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_upstream_is_refused(sockd: Factory, realm: Realm, name: str) -> None:
    act, reason = HOSTILE[name]
    with contextlib.closing(TcpPeer(Upstream(realm, act).behave)) as proxy:
        text = by_ticket(proxy.port, gssapi_enctype="confidentiality")
        if name == "cut-reply":
            text = text.replace("clientmethod", "timeout.connect: 2\nclientmethod")
        server = sockd(text)
        if name == "cut-reply":
            with Client(server.addresses[0]) as client:
                assert client.open5(CONNECT, "192.0.2.80", 80).code != 0
            assert wait_for_record(server, reason)
            return
        expect_failure(server, reason)


def answer_token(answer: bytes) -> Callable[[socket.socket, Seen], None]:
    """Make an upstream answer our token with these bytes, and wait."""

    def behave(connection: socket.socket, seen: Seen) -> None:
        receive(connection, seen)
        connection.sendall(METHOD_GSSAPI)
        read_message(connection)
        connection.sendall(answer)
        discard(connection, seen)

    return behave


NO_PROOF = "gss_init_sec_context() failed: "
TOKENS = {
    "empty": (message(TOKEN, b""), ""),
    "garbage": (message(TOKEN, b"junk"), NO_PROOF),
    "largest": (message(TOKEN, b"\x60" + bytes(65_534)), NO_PROOF),
    "silence": (b"", "no answer from proxy server in time"),
    "half": (message(TOKEN, bytes(300))[:200], "no answer from proxy server in time"),
    "password": (b"\1\0", "unexpected type on gssapi packet from proxy server: 0, not 1"),
}


@pytest.mark.parametrize("name", TOKENS)
def test_upstream_that_cannot_prove_who_it_is_is_refused(sockd: Factory, realm: Realm, name: str) -> None:
    answer, reason = TOKENS[name]
    with contextlib.closing(TcpPeer(answer_token(answer))) as proxy:
        text = by_ticket(proxy.port)
        if reason.endswith("in time"):
            text = text.replace("clientmethod", "timeout.connect: 2\nclientmethod")
        server = sockd(text)
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, "192.0.2.80", 80).code != 0
        wait_for_record(server, "failed to connect route #1 to localhost.", reason)
        eventually(lambda: len(server.processes()) == 4)  # nobody waits for it any more


def test_answer_to_another_token_is_refused(sockd: Factory, realm: Realm) -> None:
    """A thief of an upstream's earlier answer is not that upstream."""
    answers: list[bytes] = []

    def replay(connection: socket.socket, seen: Seen) -> None:
        receive(connection, seen)
        connection.sendall(METHOD_GSSAPI)
        token = read_message(connection)
        if not answers:
            with Acceptor(realm) as acceptor:
                answers.append(acceptor.accept(token))
            return
        connection.sendall(message(TOKEN, answers[0]))
        discard(connection, seen)

    with contextlib.closing(TcpPeer(replay)) as proxy:
        server = sockd(by_ticket(proxy.port).replace("clientmethod", "route.maxfail: 0\nclientmethod"))
        for _ in range(2):
            with Client(server.addresses[0]) as client:
                assert client.open5(CONNECT, "192.0.2.80", 80).code == REFUSED
        assert wait_for_record(server, NO_PROOF, "Mutual authentication failed")


def test_upstream_that_is_silent_holds_up_no_other(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    """There may be 32 log-ins to one at a time, and 128 that wait; who comes later is refused at once."""
    far = sockd(accepting(realm))
    one, two = peer("echo"), peer("echo", "127.0.0.2")
    with contextlib.closing(TcpPeer(answer_token(b""))) as silent, contextlib.ExitStack() as stack:
        routes = by_ticket(silent.port, to="127.0.0.1/32", gssapi_servicename=SERVICE)
        routes += route(("localhost", far.port), to="127.0.0.2/32", method="gssapi")
        server = sockd(routes)
        clients = [stack.enter_context(Client(server.addresses[0])) for _ in range(170)]
        for client in clients:
            client.send(b"\5\1\0" + request5(CONNECT, *one.address))
        wait_for_record(server, "too many log-ins to proxy servers at a time")
        assert len(server.processes()) <= 4 + 32
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *two.address).code == 0
        for client in clients:
            client.reset()
        eventually(lambda: len(server.processes()) == 4)


def test_datagrams_that_are_not_sealed_are_dropped(sockd: Factory, realm: Realm) -> None:
    """So are those that were changed on the way, and those that come twice."""
    results: list[bytes] = []

    def relay_datagrams(acceptor: Acceptor, connection: socket.socket) -> None:
        level(bytes([CONFIDENTIALITY]))(acceptor, connection)
        assert acceptor.unwrap(read_message(connection))[0][:2] == b"\5\3"
        with UdpClient() as relay:
            bound = b"\5\0\0\1\x7f\0\0\1" + relay.address[1].to_bytes(2, "big")
            connection.sendall(message(DATA, acceptor.wrap(bound, True)))
            datagram, sender = relay.sock.recvfrom(65536)
            data, encrypted = acceptor.unwrap(datagram[4:])
            results.append(data)
            assert encrypted
            good = [message(DATA, acceptor.wrap(data + b"%d" % n, True)) for n in range(2)]
            signed = message(DATA, acceptor.wrap(data + b"signed"))
            for bad in (data + b"plain", signed, good[0][:-1] + b"x", b"", good[0], good[0], good[1]):
                relay.sock.sendto(bad, sender)

    with contextlib.closing(TcpPeer(Upstream(realm, relay_datagrams).behave)) as proxy:
        server = sockd(by_ticket(proxy.port, command="udpassociate"))
        with Client(server.addresses[0]) as client, UdpClient() as udp:
            bound = client.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
            relay = (bound.host, bound.port)
            udp.send(relay, "192.0.2.80", 80, b"one")
            assert [udp.receive(relay).data for _ in range(2)] == [b"one0", b"one1"]
            client.reset()
    assert results == [wrap("192.0.2.80", 80, b"one")]


def test_association_that_an_upstream_ends_is_renewed_by_ticket(sockd: Factory, realm: Realm) -> None:
    """The next datagram goes under the protection of another context."""

    def relay_one(acceptor: Acceptor, connection: socket.socket) -> None:
        level(bytes([CONFIDENTIALITY]))(acceptor, connection)
        read = acceptor.unwrap(read_message(connection))
        assert read[0][:2] == b"\5\3"
        with UdpClient() as relay:
            bound = b"\5\0\0\1\x7f\0\0\1" + relay.address[1].to_bytes(2, "big")
            connection.sendall(message(DATA, acceptor.wrap(bound, True)))
            datagram, sender = relay.sock.recvfrom(65536)
            data, _ = acceptor.unwrap(datagram[4:])
            relay.sock.sendto(message(DATA, acceptor.wrap(data, True)), sender)
            connection.shutdown(socket.SHUT_RDWR)

    with contextlib.closing(TcpPeer(Upstream(realm, relay_one).behave)) as proxy:
        server = sockd(by_ticket(proxy.port, command="udpassociate"))
        with Client(server.addresses[0]) as client, UdpClient() as udp:
            bound = client.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
            relay = (bound.host, bound.port)
            for count in range(1, 4):
                udp.send(relay, "192.0.2.80", 80, b"%d" % count)
                assert udp.receive(relay).data == b"%d" % count
                eventually(lambda count=count: len([s for s in proxy.seen if s.end]) == count)
            client.reset()


# ------------------------------ the process ------------------------------


def test_many_sessions_at_once_wait_for_their_tickets(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    target = peer("echo").address
    server = sockd(by_ticket(sockd(accepting(realm)).port))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.addresses[0])) for _ in range(80)]
        for client in clients:
            client.send(b"\5\1\0" + request5(CONNECT, *target))
        for client in clients:
            assert client.receive(2) == b"\5\0"
            assert client.read_reply5().code == 0


def test_many_sessions_leave_nothing(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    target = peer("echo").address
    far = sockd(accepting(realm))
    server = sockd(by_ticket(far.port))

    def visit() -> None:
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *target).code == 0
            assert client.exchange(b"hello" * 1000) == b"hello" * 1000

    for _ in range(50):
        visit()
    eventually(lambda: len(server.processes()) == 4)
    before = memory_kilobytes(server)
    for _ in range(200):
        visit()
    eventually(lambda: len(server.processes()) == 4)
    # 200 contexts of some 5 kB that nobody frees would be a megabyte.
    assert memory_kilobytes(server) - before < 800


@pytest.mark.parametrize("table", ["", "route"])
def test_warden_that_is_not_root_gets_tickets(
    sockd: Factory, realm: Realm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: StartPeer, table: str
) -> None:
    """It has kept the power to read any key table; the cache is its own."""
    tmp_path.chmod(0o777)
    monkeypatch.setenv("KRB5CCNAME", f"FILE:/tmp/{tmp_path.name}-{table}")
    items = {"gssapi_keytab": str(realm.folder / "other")} if table else {}
    far = sockd(accepting(realm))
    text = by_ticket(far.port, **items).replace("user.privileged: root", "user.privileged: daemon")
    server = sockd(text)
    try:
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, *peer("echo").address).code == 0
        cache = Path(f"/tmp/{tmp_path.name}-{table}")
        assert cache.exists() == (not table)
        assert table or cache.stat().st_uid == pwd.getpwnam("daemon").pw_uid
    finally:
        Path(f"/tmp/{tmp_path.name}-{table}").unlink(missing_ok=True)


def test_reload_takes_tickets_up(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    target = peer("echo").address
    far = sockd(accepting(realm))
    server = sockd(by_ticket(far.port).replace("gssapi", "none"))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target).code == REFUSED
    server.reload(by_ticket(far.port))
    server.take_baseline()
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target).code == 0


def find_initiator(server: Server) -> int:
    """Give the child of the warden, or 0."""
    processes = server.processes()
    children = {p.pid for p in processes if p.parent == server.pid}
    return next((p.pid for p in processes if p.parent in children), 0)


def is_powerless(pid: int) -> bool:
    """Tell whether a process is nobody, without a capability."""
    status = Path(f"/proc/{pid}/status").read_text()
    uid = pwd.getpwnam("nobody").pw_uid
    return f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in status and "CapPrm:\t0000000000000000\n" in status


@pytest.mark.parametrize("silent", ["kdc", "upstream"])
def test_who_reads_for_the_warden_has_no_power_and_ends_with_it(
    sockd: Factory, realm: Realm, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    """The upstream's words, and with a key table of the route the KDC's too."""
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(contextlib.closing(TcpPeer(answer_token(b""))))
        items = {}
        if silent == "kdc":
            kdc = stack.enter_context(UdpClient())
            text = Path(realm.env["KRB5_CONFIG"]).read_text()
            settings = realm.folder / "silent.conf"
            settings.write_text(text.replace(f":{realm.port}", f":{kdc.address[1]}"))
            monkeypatch.setenv("KRB5_CONFIG", str(settings))
            items = {"gssapi_keytab": f"FILE:{realm.folder}/other"}
        server = sockd(by_ticket(proxy.port, **items))
        client = stack.enter_context(Client(server.addresses[0]))
        client.send(b"\5\1\0" + request5(CONNECT, "192.0.2.80", 80))
        pid = eventually(lambda: find_initiator(server))
        eventually(lambda: is_powerless(pid))
        process = read_process(pid)
        assert process
        os.kill(process.parent, signal.SIGKILL)
        eventually(lambda: (process := read_process(pid)) is None or process.state == "Z")


# ------------------------------ at the start ------------------------------

BAD = {
    "via: 10.0.0.1\nmethod: gssapi": "Kerberos knows proxies by name",
    "via: proxy.test\nmethod: gssapi\nproxyprotocol: socks_v4 socks_v5": "needs proxyprotocol socks_v5",
    "via: proxy.test\nmethod: gssapi\ngssapi.servicename: gss_c_no_name": "asked for by name",
    "via: proxy.test\nmethod: gssapi\ngssapi.enctype: per-message": "protects all messages alike",
    "via: proxy.test\nmethod: gssapi\ngssapi.keytab: MEMORY:x": "has to be a file",
    "via: a.test\nmethod: gssapi\nvia: b.test\nmethod: gssapi": "only one hop of a route",
    "via: a.test\nmethod: gssapi\nvia: b.test\nproxyprotocol: socks_v5\ncommand: udpassociate": "datagrams",
}


@pytest.mark.parametrize("lines", BAD)
def test_what_cannot_be_had_stops_the_start(sockd: Factory, lines: str) -> None:
    text = HEAD + PASS + rule("route", "from: 0/0 to: 0/0", *lines.split("\n"))
    with pytest.raises(DidNotStart) as failure:
        sockd(text)
    assert re.search(rf"sockd.conf:\d+:\d+: error: .*{re.escape(BAD[lines])}", str(failure.value))


def test_library_is_loaded_for_routes_alone(sockd: Factory, realm: Realm) -> None:
    for text, wanted in ((by_ticket(9), True), (by_ticket(9).replace("gssapi", "none"), False)):
        server = sockd(text)
        maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in server.processes()]
        assert {"libgssapi" in text for text in maps} == {wanted}
