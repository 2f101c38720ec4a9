"""Clients that mean no good, and machines that have too little: the server serves the others."""

from __future__ import annotations

import contextlib
import random
import resource
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client import (
    BIND,
    CONNECT,
    NO_METHOD,
    PASSWORD_METHOD,
    REJECTED,
    UDP_ASSOCIATE,
    Client,
    UdpClient,
    greeting,
    password_message,
    request4,
    request5,
)
from more_peers import (
    CLIENT_PASS,
    EVERYTHING,
    HEAD,
    LimitedWorld,
    hash_with,
    highest_descriptor,
    inject_urgent_byte_behind_a_gap,
    measure_idleness,
    read_memory_bytes,
    rule,
    wait_for_line,
)
from peers import RESET
from servers import RECORD, Server, Sockd, World, count_descriptors, eventually

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]


ALICE = greeting([PASSWORD_METHOD]) + password_message(b"alice", b"wonderland")


def write_config(password_file: Any) -> str:
    """Write a configuration that takes clients with and without a password, for CONNECT only."""
    head = HEAD.replace("socksmethod: none", "socksmethod: username none")
    only = rule("socks pass", "from: 0/0 to: 0/0", "command: connect", "log: connect disconnect error")
    return f"{head}login.penalty: no\npasswordfile: {password_file}\n" + CLIENT_PASS + only


@pytest.fixture(scope="module")
def running(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that need nothing special."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "passwords").write_text(f"alice:{hash_with('-5', 'wonderland')}\n")
    server = Sockd(write_config(folder / "passwords"), folder, world=private_world)
    yield server
    server.close()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The shared server, which must give back after the test all that it took, and have no bug to tell of."""
    yield running
    running.check_resources()
    running.check_text()


def check_good_client(server: Server, peer: StartPeer) -> None:
    """Check that a client with good manners is served."""
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", target.port).code == 0
        assert client.exchange(b"served") == b"served"


# ------------------------------ slow, silent, many ------------------------------


def drip_greeting(client: Client) -> bytes:
    return greeting(range(200))


def drip_password(client: Client) -> bytes:
    client.greet([PASSWORD_METHOD])
    return password_message(b"u" * 100, b"p" * 100)


def drip_request(client: Client) -> bytes:
    client.greet([NO_METHOD])
    return request5(CONNECT, b"n" * 200, 80)


def drip_user(client: Client) -> bytes:
    return request4(CONNECT, "127.0.0.1", 80, b"u" * 200)


def drip_name(client: Client) -> bytes:
    return request4(CONNECT, b"n" * 200, 80)


def test_client_that_sends_a_byte_at_a_time_is_cut_off_at_the_total_time(
    sockd: Any, private_world: World, running: Server
) -> None:
    config = running.config_path.read_text()
    server = sockd("timeout.negotiate: 1\n" + config.replace("logoutput: stderr\n", ""), world=private_world)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.addresses[0])) for _ in range(6)]
        drips = (drip_greeting, drip_password, drip_request, drip_user, drip_name)
        left = {client.sock: iter(drip(client)) for client, drip in zip(clients, drips, strict=False)}
        left[clients[-1].sock] = iter(b"")  # says nothing at all
        for _ in range(30):
            for connection, message in left.items():
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    connection.sendall(bytes([byte for byte in [next(message, None)] if byte is not None]))
            ended = select.select(list(left), [], [], 0.1)[0]
            left = {connection: message for connection, message in left.items() if connection not in ended}
            if not left:
                break
        assert not left
        for client in clients:
            wait_for_line(server, client.address, "tcp/accept ]:", "negotiate timeout after 1 second")
            name = f"{client.address[0]}.{client.address[1]} "
            start, end = (record.time for record in server.log if name in record.message)
            assert 1.0 <= end - start < 1.8


def test_a_thousand_silent_clients_leave_room_for_a_good_one(
    private_world: World, tmp_path: Any, peer: StartPeer
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    # Not the fixture's: its check would wait until a thousand idle threads have ended.
    server = Sockd(
        EVERYTHING.replace("log: connect disconnect error", "log: error"), tmp_path, world=private_world
    )
    try:
        memory = read_memory_bytes(server.processes())
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(Client(server.addresses[0])) for _ in range(1100)]
            eventually(lambda: highest_descriptor(server) > 1100)
            check_good_client(server, peer)
            assert highest_descriptor(server) > 1024
            assert (read_memory_bytes(server.processes()) - memory) / len(silent) < 100_000
            assert measure_idleness(server, 0.3) < 0.1
            for client in silent[::100]:
                assert client.greet() == NO_METHOD
        eventually(lambda: highest_descriptor(server) < 100)
        check_good_client(server, peer)
        assert server.stop() == 0
        server.check_text()
    finally:
        server.kill()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def fill(server: Server, stack: contextlib.ExitStack) -> list[Client]:
    """Connect silent clients until the server turns one away; give those that it has."""
    clients: list[Client] = []
    while len(clients) < 3000:
        client = stack.enter_context(Client(server.addresses[0]))
        try:
            client.greet()
        except (AssertionError, ConnectionResetError, BrokenPipeError):
            return clients
        clients.append(client)
    raise AssertionError("there is always room for another")


def wait_until_full(server: Server, limit: int) -> None:
    """Wait until a process has all the descriptors that it may have, its reserve included."""
    eventually(lambda: limit in [count_descriptors(process.pid) for process in server.processes()])


def test_server_without_descriptors_turns_clients_away_and_recovers(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    server = sockd(EVERYTHING, world=LimitedWorld(private_world.files, ("--nofile=64:64",)))
    target = peer("echo")
    with contextlib.ExitStack() as stack:
        clients = fill(server, stack)
        assert 20 < len(clients) < 64
        wait_until_full(server, 64)
        for _ in range(3):
            with Client(server.addresses[0]) as client:
                client.expect_end_or_reset()
        assert measure_idleness(server) < 0.2
        wait_until_full(server, 64)
        assert sum("refusing new clients" in message for message in server.messages) == 1
        assert clients[0].request5(CONNECT, "127.0.0.1", target.port).code == 1
        clients[0].expect_end()
        assert clients[1].request5(CONNECT, "127.0.0.1", target.port).code == 0
        assert clients[1].exchange(b"room again") == b"room again"
    eventually(lambda: not server.find_excess())
    check_good_client(server, peer)
    check_good_client(server, peer)


@pytest.mark.parametrize(
    ("command", "host"),
    [
        pytest.param(CONNECT, "127.0.0.1", id="ipv4"),
        pytest.param(CONNECT, "::1", id="ipv6"),
        pytest.param(CONNECT, "echo.test", id="name"),
        pytest.param(BIND, "0.0.0.0", id="bind"),
        pytest.param(BIND, "two.test", id="bind-name"),
        pytest.param(UDP_ASSOCIATE, "0.0.0.0", id="udp"),
    ],
)
def test_request_is_answered_when_descriptors_have_run_out(
    sockd: Any, private_world: World, command: int, host: str
) -> None:
    server = sockd(EVERYTHING, world=LimitedWorld(private_world.files, ("--nofile=40:40",)))
    with contextlib.ExitStack() as stack:
        client = fill(server, stack)[0]
        wait_until_full(server, 40)
        address = client.address
        assert client.request5(command, host, 80).code in (1, 4)
        client.expect_end()
        wait_for_line(server, address, "tcp/accept ]:", "request was not performed due to error: ")


def test_reserve_descriptor_that_somebody_else_takes_is_no_loss(
    sockd: Any, private_world: World, peer: StartPeer
) -> None:
    server = sockd(EVERYTHING, world=LimitedWorld(private_world.files, ("--nofile=40:40",)))
    with contextlib.ExitStack() as stack:
        for client in fill(server, stack)[:10]:
            fill(server, stack)
            # One was turned away just now: this one may get the descriptor before it is back in reserve.
            assert client.request5(BIND, "0.0.0.0", 0).code in (0, 1)
    check_good_client(server, peer)
    check_good_client(server, peer)


def is_served(server: Server) -> bool:
    """Tell whether a new client is answered and not turned away."""
    with Client(server.addresses[0]) as client:
        try:
            return client.greet() == NO_METHOD
        except (AssertionError, ConnectionResetError, BrokenPipeError):
            return False


@pytest.mark.parametrize("megabytes", [348, 372, 400])  # memory ends at different steps of a new thread
def test_server_without_memory_for_threads_turns_clients_away_and_recovers(
    sockd: Any, private_world: World, peer: StartPeer, megabytes: int
) -> None:
    server = sockd(EVERYTHING, world=LimitedWorld(private_world.files, (f"--as={megabytes}000000",)))
    target = peer("echo")
    with contextlib.ExitStack() as stack:
        clients = fill(server, stack)
        assert measure_idleness(server) < 0.2
        assert any("refusing new clients" in message for message in server.messages)
        assert clients[0].request5(CONNECT, "127.0.0.1", target.port).code == 0
        assert clients[0].exchange(b"not forgotten") == b"not forgotten"
    eventually(lambda: is_served(server))  # as soon as it has seen that clients have left
    check_good_client(server, peer)
    server.take_baseline()  # the idle threads end only after a while


def test_probes_that_connect_and_leave_cost_nothing(server: Server, peer: StartPeer) -> None:
    for leave in (Client.close, Client.reset):
        for _ in range(100):
            with Client(server.addresses[0]) as client:
                leave(client)
    server.check_resources()
    check_good_client(server, peer)


# ------------------------------ nonsense ------------------------------


def test_handshake_cut_anywhere_leads_nowhere(server: Server, peer: StartPeer) -> None:
    canary = peer("discard", "::")
    messages = [
        greeting() + request5(CONNECT, "127.0.0.1", canary.port),
        greeting() + request5(CONNECT, "echo.test", canary.port),
        greeting() + request5(CONNECT, "::1", canary.port),
        ALICE + request5(CONNECT, "127.0.0.1", canary.port),
        request4(CONNECT, "127.0.0.1", canary.port, b"user"),
        request4(CONNECT, "echo.test", canary.port, b"user"),
    ]  # fmt: skip
    for message in messages:
        for length in range(1, len(message)):
            for leave in (Client.finish_sending, Client.reset):
                with Client(server.addresses[0]) as client:
                    client.send(message[:length])
                    leave(client)
                    with contextlib.suppress(OSError):
                        client.receive_all()
    server.check_resources()
    assert not canary.seen
    check_good_client(server, peer)


def test_random_bytes_and_spoiled_handshakes_hurt_nobody(server: Server, peer: StartPeer) -> None:
    chance = random.Random(1080)
    target = peer("echo")
    originals = [
        greeting() + request5(CONNECT, "127.0.0.1", target.port) + b"data",
        ALICE + request5(CONNECT, "echo.test", target.port),
        request4(CONNECT, "echo.test", target.port, b"user") + b"data",
    ]  # fmt: skip
    for number in range(400):
        message = bytearray(
            chance.choice(originals) if number % 2 else chance.randbytes(chance.randint(1, 600))
        )
        for _ in range(chance.randint(1, 3)):
            message[chance.randrange(len(message))] = chance.choice((0, 1, 3, 4, 5, 127, 128, 255))
        with Client(server.addresses[0]) as client, contextlib.suppress(OSError):
            client.send(bytes(message))
            client.finish_sending()
            client.receive_all()
    check_good_client(server, peer)


@pytest.mark.parametrize(
    "start", [b"\4\1\0\x50\x7f\0\0\1", b"\4\1\0\x50\0\0\0\1user\0"], ids=["user", "name"]
)
def test_endless_text_of_socks4_is_cut_short(server: Server, start: bytes) -> None:
    memory = read_memory_bytes(server.processes())
    with Client(server.addresses[0]) as client:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            client.send(start)
            for _ in range(200):
                client.send(b"x" * 65536)
        with contextlib.suppress(ConnectionResetError):
            assert client.read_reply4().code == REJECTED
        wait_for_line(server, client.address, "tcp/accept ]:", "error after reading")
    assert read_memory_bytes(server.processes()) - memory < 4 << 20


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"SSH-2.0-x\r\n", b"\0", b"\x06", b"\xff"]
)
def test_other_protocols_get_silence(server: Server, first: bytes) -> None:
    with Client(server.addresses[0]) as client:
        client.send(first)
        client.expect_end_or_reset()
        wait_for_line(server, client.address, f"unknown SOCKS version {first[0]} in client request")


def test_random_datagrams_hurt_nobody(sockd: Any, private_world: World, peer: StartPeer) -> None:
    quiet = rule("socks pass", "from: 0/0 to: 0/0", "log: disconnect")
    server, chance = sockd(HEAD + CLIENT_PASS + quiet, world=private_world), random.Random(1928)
    target = peer("udp-echo")
    with Client(server.addresses[0]) as client, UdpClient() as udp:
        reply = client.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        relay = reply.host, reply.port
        for _ in range(30):
            for _ in range(10):
                head = bytes([0, 0, chance.choice((0, 0, 0, 1, 255)), chance.choice((1, 3, 4, 4, 0, 99))])
                udp.send_raw(relay, head[: chance.randint(0, 4)] + chance.randbytes(chance.randint(0, 40)))
            udp.send(relay, *target.address, b"still alive")
            assert udp.receive(relay) == (*target.address, b"still alive")
        client.reset()


@pytest.mark.parametrize(
    "name",
    [
        b"x\nNov 20 21:23:36 (1795209816.822730) sockd[1]: info: forged", b"x\rforged", b"x\x1b[2J", b"%s%n",
        b"x\0forged", b"\xe2\x80\xaeforged", b"x\x85forged", b'" forged', b"1.2.3.4.80 -> 5.6.7.8",
    ],
)  # fmt: skip
def test_host_name_cannot_forge_a_record(server: Server, name: bytes) -> None:
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, name, 80).code in (2, 4)
        address = client.address
    wait_for_line(server, address, "tcp/accept ]:")
    raw = server.log_path.read_bytes().decode("ascii").splitlines()
    lines = [line for line in raw if f".{address[1]} " in line or "forged" in line]
    assert len(lines) >= 3
    assert all(RECORD.fullmatch(line) and line.isprintable() for line in lines)
    assert not any(record.message.startswith("forged") for record in server.log)


# ------------------------------ tricks with TCP ------------------------------


def test_urgent_byte_behind_a_gap_costs_no_time(server: Server, peer: StartPeer) -> None:
    target = peer("discard")
    with Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        client.send(b"before")
        eventually(lambda: target.seen and len(target.seen[0].data) == 6)
        inject_urgent_byte_behind_a_gap(client.sock)
        assert measure_idleness(server) < 0.2
        client.reset()


def test_urgent_byte_in_a_handshake_does_not_spoil_the_server(server: Server, peer: StartPeer) -> None:
    for message in (greeting(), greeting() + request5(CONNECT, "127.0.0.1", peer("echo").port)):
        with Client(server.addresses[0]) as client:
            client.send(message)
            client.sock.send(b"!", socket.MSG_OOB)
            assert client.read_method() == NO_METHOD
            assert measure_idleness(server, 0.2) < 0.2
            client.reset()
    check_good_client(server, peer)


def test_client_that_resets_while_it_is_answered_is_no_trouble(server: Server, peer: StartPeer) -> None:
    target = peer("endless")
    for _ in range(50):
        with Client(server.addresses[0]) as client:
            client.send(greeting() + request5(CONNECT, "127.0.0.1", target.port))
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    server.check_resources()
    check_good_client(server, peer)
