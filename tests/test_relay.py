"""Bulk: a direction that has filled a large read goes through a pipe, and nobody can tell but by the speed.

What holds for every relay is in test_session_connect.py.  Here it holds in the middle of bulk, and
on a machine whose kernel refuses splice(2).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import count_garbage
import pytest
from client import CONNECT, Address, Client
from more_peers import (
    EVERYTHING,
    measure_idleness,
    never_read,
    pattern,
    read_with_mark,
    receive_much,
    rule,
    send_with_mark,
    target_that,
    wait_for_line,
)
from peers import Behaviour, Seen, echo
from servers import Server, Sockd, World, eventually

BULK_BYTES = 16 << 20  # much more than all buffers on the way
LOGGED = "127.0.0.14"  # a target whose bytes a rule wants in the log


def count_pipes(server: Server) -> int:
    """Count the pipe ends that the server's processes have open."""
    count = 0
    for process in server.processes():
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(OSError):
                    count += os.readlink(entry.path).startswith("pipe:")
    return count


@pytest.fixture
def server(sockd: Any, private_world: World) -> Server:
    logged = rule("socks pass", f"from: 0/0 to: {LOGGED}", "log: connect disconnect ioop")
    return sockd(EVERYTHING.replace("socks pass", logged + "socks pass", 1), world=private_world)


@contextlib.contextmanager
def bulk_under_way(
    server: Server, behaviour: Behaviour, host: str = "127.0.0.1"
) -> Iterator[tuple[Any, Client]]:
    """Give target and client of a session; at the end nothing of it is left in the server."""
    quiet = count_pipes(server)
    with target_that(behaviour, host) as target:
        with Client(server.addresses[0]) as client:
            assert client.open5(CONNECT, host, target.port).code == 0
            yield target, client
        eventually(lambda: count_pipes(server) == quiet)


def send_in_background(connection: socket.socket, data: bytes) -> threading.Thread:
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    return sender


def in_bulk(server: Server) -> Callable[[], bool]:
    """Give what tells whether more pipes are open than now."""
    quiet = count_pipes(server)
    return lambda: count_pipes(server) > quiet


def read_until(spliced: Callable[[], bool], client: Client) -> bytes:
    """Read until the session is bulk, and give that: where nobody reads, all may stand still before."""
    data = b""
    while not spliced():
        data += client.sock.recv(1 << 16)
    return data


# ------------------------------ every byte ------------------------------


def test_bulk_trickle_and_bulk_again_keep_every_byte(server: Server) -> None:
    chance = random.Random(4)
    pieces = [BULK_BYTES, *(chance.choice((1, 100, 1460, 70_000)) for _ in range(200)), BULK_BYTES, 1]
    data = chance.randbytes(sum(pieces))

    def give(connection: socket.socket, seen: Seen) -> None:
        start = 0
        for length in pieces:
            connection.sendall(data[start : start + length])
            start += length
            if length != BULK_BYTES:
                connection.recv(1)  # the client has it: a trickle, and not by chance bulk

    with bulk_under_way(server, give) as (_, client):
        received = bytearray()
        for length in pieces:
            received += receive_much(client, length)
            if length != BULK_BYTES:
                client.send(b".")
        address = client.address
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
    line, dots = wait_for_line(server, address, "tcp/connect ]:"), sum(n != BULK_BYTES for n in pieces)
    assert f" ]: {len(data)} -> " in line
    assert f" -> {dots}, {dots} -> " in line
    assert f" -> {len(data)}: " in line


def test_bulk_both_ways_at_once_keeps_every_byte(server: Server) -> None:
    up, down = random.Random(1).randbytes(BULK_BYTES), random.Random(2).randbytes(BULK_BYTES)

    def behaviour(connection: socket.socket, seen: Seen) -> None:
        sender = send_in_background(connection, down)
        while data := connection.recv(1 << 20):
            seen.data += data
        sender.join()

    with bulk_under_way(server, behaviour) as (target, client):
        sender = send_in_background(client.sock, up)
        assert receive_much(client, len(down)) == down
        sender.join()
        client.finish_sending()
        client.expect_end()
        assert target.seen[0].data == up


def test_logged_session_is_never_spliced(server: Server) -> None:
    def give(connection: socket.socket, seen: Seen) -> None:
        connection.sendall(pattern(BULK_BYTES))

    with bulk_under_way(server, give, LOGGED) as (_, client):
        spliced = in_bulk(server)
        eventually(lambda: measure_idleness(server, 0.1) == 0)
        assert not spliced()
        assert receive_much(client, BULK_BYTES) == pattern(BULK_BYTES)


# ------------------------------ in the middle of bulk ------------------------------


def test_slow_reader_of_bulk_holds_the_sender_and_costs_no_time(server: Server) -> None:
    spliced = in_bulk(server)

    def give(connection: socket.socket, seen: Seen) -> None:
        connection.sendall(pattern(BULK_BYTES))

    with bulk_under_way(server, give) as (_, client):
        head = read_until(spliced, client)
        eventually(lambda: measure_idleness(server, 0.1) == 0)
        assert measure_idleness(server) < 0.05
        assert head + receive_much(client, BULK_BYTES - len(head)) == pattern(BULK_BYTES)


def test_slow_writer_after_bulk_costs_no_time(server: Server) -> None:
    resume = threading.Event()

    def give(connection: socket.socket, seen: Seen) -> None:
        connection.sendall(pattern(BULK_BYTES))
        resume.wait()
        connection.sendall(b"end")

    with bulk_under_way(server, give) as (_, client):
        assert receive_much(client, BULK_BYTES) == pattern(BULK_BYTES)
        eventually(lambda: measure_idleness(server, 0.1) == 0)
        assert measure_idleness(server) < 0.05
        resume.set()
        assert client.receive(3) == b"end"


def test_half_close_in_bulk_passes_what_the_other_side_still_sends(server: Server) -> None:
    spliced = in_bulk(server)
    finish = threading.Event()

    def give(connection: socket.socket, seen: Seen) -> None:
        connection.sendall(pattern(BULK_BYTES))
        connection.shutdown(socket.SHUT_WR)
        finish.set()
        while data := connection.recv(1 << 16):
            seen.data += data
        seen.end = "fin"

    with bulk_under_way(server, give) as (target, client):
        head = read_until(spliced, client)
        assert head + client.receive_all() == pattern(BULK_BYTES)
        assert finish.wait(10)
        eventually(lambda: measure_idleness(server, 0.1) == 0)
        assert measure_idleness(server) < 0.05  # half-closed, and nobody says anything
        client.send(b"last words")
        client.finish_sending()
        eventually(lambda: target.seen and target.seen[0].end)
        assert target.seen[0].data == b"last words"


@pytest.mark.parametrize("host", ["127.0.0.1", LOGGED], ids=["spliced", "copied"])
def test_client_that_has_half_closed_and_reads_late_gets_all(server: Server, host: str) -> None:
    """By then both directions of the target's connection are closed, which poll(2) tells as a hang-up."""
    closed = threading.Event()

    def give(connection: socket.socket, seen: Seen) -> None:
        while connection.recv(1 << 16):
            pass
        connection.sendall(pattern(BULK_BYTES))
        connection.close()
        closed.set()

    with bulk_under_way(server, give, host) as (_, client):
        address = client.address
        client.finish_sending()
        taken = receive_much(client, BULK_BYTES - (4 << 20))
        assert closed.wait(10)
        eventually(lambda: measure_idleness(server, 0.1) == 0)
        assert taken + client.receive_all() == pattern(BULK_BYTES)
    assert ": local client closed." in wait_for_line(server, address, "tcp/connect ]:")


def test_urgent_byte_behind_bulk_keeps_its_mark(server: Server) -> None:
    spliced = in_bulk(server)
    before, behind = pattern(BULK_BYTES), b"behind"

    def give(connection: socket.socket, seen: Seen) -> None:
        send_with_mark(connection, before, b"!", behind)
        connection.recv(1)

    with bulk_under_way(server, give) as (_, client):
        left = before[len(read_until(spliced, client)) :]
        assert read_with_mark(client.sock, len(left) + 1 + len(behind)) == (left, b"!", behind)


@pytest.mark.parametrize("who", ["client", "target"])
def test_reset_in_bulk_ends_the_session(server: Server, who: str) -> None:
    spliced = in_bulk(server)
    resume = threading.Event()

    def give(connection: socket.socket, seen: Seen) -> None:
        connection.settimeout(0.5)
        with contextlib.suppress(OSError):  # the client does not read: it waits for room
            connection.sendall(pattern(BULK_BYTES))
        resume.wait()
        if who == "target":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
        else:
            with contextlib.suppress(OSError):
                connection.settimeout(10)
                connection.sendall(pattern(BULK_BYTES))

    with bulk_under_way(server, give) as (_, client):
        read_until(spliced, client)
        address = client.address
        resume.set()
        if who == "client":
            client.reset()
        else:
            with pytest.raises(ConnectionResetError):
                while client.sock.recv(1 << 20):
                    pass
        wait_for_line(server, address, "tcp/connect ]:", "error (Connection reset by peer)")


def test_target_that_never_reads_bulk_does_not_outlive_its_client(server: Server) -> None:
    with bulk_under_way(server, never_read) as (target, client):
        client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.sock.send(bytes(1 << 20))
        client.reset()
        eventually(lambda: target.seen and target.seen[0].end)


def test_live_bulk_ends_with_the_server(server: Server) -> None:
    spliced = in_bulk(server)

    def give(connection: socket.socket, seen: Seen) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(bytes(1 << 16))

    with target_that(give) as target, Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port)
        read_until(spliced, client)
        server.signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionResetError):
            while client.sock.recv(1 << 20):
                pass
        wait_for_line(server, client.address, "tcp/connect ]:", "administrative termination")


# ------------------------------ a kernel without ------------------------------


@pytest.mark.root
@pytest.mark.parametrize("call", ["splice:error=EINVAL", "pipe2:error=EMFILE", "fcntl:error=EPERM"])
def test_relay_copies_where_the_kernel_refuses(server: Server, call: str, tmp_path: Path) -> None:
    """strace lets the worker's system calls fail."""
    tracer = shutil.which("strace")
    assert tracer is not None
    worker = next(record for record in server.log if record.message.endswith(" running"))
    condition = f"--inject={call}"
    name = call.partition(":")[0]
    trace = tmp_path / "trace"
    strace = subprocess.Popen(
        [tracer, "-f", "-o", str(trace), "-p", str(worker.pid), "-e", f"trace={name}", condition],
        stderr=subprocess.PIPE,
    )
    try:
        assert strace.stderr is not None
        assert b"attached" in strace.stderr.readline()

        def give(connection: socket.socket, seen: Seen) -> None:
            connection.sendall(pattern(BULK_BYTES))

        with bulk_under_way(server, give) as (_, client):
            assert client.receive_all() == pattern(BULK_BYTES)
        eventually(lambda: "INJECTED" in trace.read_text())
    finally:
        strace.send_signal(signal.SIGINT)
        strace.communicate()


# ------------------------------ memory ------------------------------


class CountingSockd(Sockd):
    """The program, whose workers count what the garbage collector finds."""

    def command(self) -> list[str]:
        """Give the command that runs it."""
        return [sys.executable, count_garbage.__file__]


def open_tunnel(client: Client, target: Address) -> None:
    """Have an HTTP proxy connect to a target."""
    client.send(f"CONNECT {target[0]}:{target[1]} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert client.receive(12) == b"HTTP/1.1 200"
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.receive(1)


def ask_for_garbage(server: Server) -> list[tuple[int, int]]:
    """Have the worker count; give all its counts so far, each of garbage and of sessions."""
    line = r"info: (\d+) objects of garbage, (\d+) sessions"

    def find() -> list[tuple[int, int]]:
        found = (re.fullmatch(line, message) for message in server.messages)
        return [(int(match[1]), int(match[2])) for match in found if match]

    before = len(find())
    server.signal(signal.SIGUSR1)
    return eventually(lambda: found if len(found := find()) > before else [])


@pytest.mark.parametrize("language", ["socks", "http"])
def test_a_session_leaves_nothing_to_the_garbage_collector(
    private_world: World, tmp_path: Path, language: str
) -> None:
    """Or its memory would come back later, and the next session would have to take other."""
    config = EVERYTHING + rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http")
    running = CountingSockd(config, tmp_path, (), private_world)
    with contextlib.closing(running) as server, target_that(echo) as target:
        ask_for_garbage(server)  # what the start has left
        for _ in range(3):
            with Client(server.addresses[0]) as client:
                if language == "http":
                    open_tunnel(client, target.address)
                else:
                    assert client.open5(CONNECT, *target.address).code == 0
                client.send(b"x" * 100)
                assert client.receive(100) == b"x" * 100
            eventually(lambda: ask_for_garbage(server)[-1][1] == 0)
        assert sum(garbage for garbage, _ in ask_for_garbage(server)[1:]) == 0


# ------------------------------ a side that has finished and gone ------------------------------


CLOSE_WAIT = "08"  # the other end's FIN has come (include/net/tcp_states.h)


def list_states(port: int) -> list[str]:
    """List the states of the connections of this network to a port, from the side that has made them."""
    with open("/proc/thread-self/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    return [row[3] for row in rows if int(row[2].split(":")[1], 16) == port]


def say_to_nobody(connection: socket.socket, far_port: int) -> None:
    """Send what the other end, who has closed, answers with a reset; and once more behind that."""
    eventually(lambda: CLOSE_WAIT in list_states(far_port))
    connection.sendall(b"more")
    eventually(lambda: CLOSE_WAIT not in list_states(far_port))
    connection.sendall(b"and more")


@pytest.mark.parametrize("host", ["127.0.0.1", LOGGED], ids=["spliced", "copied"])
@pytest.mark.parametrize("size", [200_000, 1_500_000, BULK_BYTES])
def test_all_that_a_target_sent_before_it_closed_arrives(server: Server, host: str, size: int) -> None:
    """Whatever the client still says: a close_notify of TLS, say."""

    def give(connection: socket.socket, seen: Seen) -> None:
        connection.recv(1)
        connection.sendall(pattern(size))
        connection.close()
        seen.end = "closed"

    with bulk_under_way(server, give, host) as (target, client):
        address = client.address
        client.send(b".")
        taken = receive_much(client, max(0, size - (4 << 20)))
        eventually(lambda: target.seen and target.seen[0].end)
        say_to_nobody(client.sock, target.port)
        assert taken + client.receive_all() == pattern(size)
    line = wait_for_line(server, address, "tcp/connect ]:")
    assert f" ]: {size} -> " in line
    assert ": remote peer closed." in line


def test_all_that_a_client_sent_before_it_closed_arrives(server: Server) -> None:
    size, port = 1_500_000, Queue[int]()

    def take(connection: socket.socket, seen: Seen) -> None:
        say_to_nobody(connection, port.get())
        while data := connection.recv(1 << 20):
            seen.data += data
        seen.end = "FIN"

    with bulk_under_way(server, take) as (target, client):
        address = client.address
        client.sock.sendall(pattern(size))
        client.close()
        port.put(address[1])
        eventually(lambda: target.seen and target.seen[0].end)
        assert target.seen[0].data == pattern(size)
    line = wait_for_line(server, address, "tcp/connect ]:")
    assert f" -> {size}, {size} -> " in line
    assert ": local client closed." in line


def count_unread(port: int) -> int:
    """Count the bytes that have come from a port of this network and that nobody has read."""
    with open("/proc/thread-self/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    return sum(int(row[4].split(":")[1], 16) for row in rows if int(row[2].split(":")[1], 16) == port)


def is_held(port: int) -> bool:
    """Tell whether what has come from a port stays unread, as whom it is for takes no more."""
    try:
        return not eventually(lambda: not count_unread(port), 0.3)
    except AssertionError:
        return True


def send_until_held(client: Client) -> int:
    """Send until some of it is held; give how much it was."""
    count = 0
    while not count or not is_held(client.address[1]):
        client.sock.sendall(pattern(1 << 16))
        count += 1 << 16
    return count


@pytest.mark.parametrize("host", ["127.0.0.1", LOGGED], ids=["spliced", "copied"])
def test_target_that_does_not_read_what_a_closed_client_sent_costs_no_time(server: Server, host: str) -> None:
    port, resume = Queue[int](), threading.Event()

    def take(connection: socket.socket, seen: Seen) -> None:
        say_to_nobody(connection, port.get())
        resume.wait()
        while data := connection.recv(1 << 20):
            seen.data += data
        seen.end = "FIN"

    with bulk_under_way(server, take, host) as (target, client):
        client_port, size = client.address[1], send_until_held(client)
        client.close()
        port.put(client_port)
        eventually(lambda: CLOSE_WAIT not in list_states(client_port))
        used = measure_idleness(server, 1.0)
        resume.set()
        assert used < 0.1
        eventually(lambda: target.seen and target.seen[0].end)
        assert target.seen[0].data == pattern(1 << 16) * (size >> 16)


def test_client_that_never_reads_what_a_closed_target_sent_is_not_waited_for(
    sockd: Any, private_world: World
) -> None:
    limited = EVERYTHING.replace("socks pass {", "socks pass {\n    timeout.tcp_fin_wait: 1", 1)
    server, size = sockd(limited, world=private_world), 3_000_000

    def give(connection: socket.socket, seen: Seen) -> None:
        connection.recv(1)
        connection.sendall(pattern(size))
        connection.close()
        seen.end = "closed"

    with target_that(give) as target, Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", target.port).code == 0
        address = client.address
        client.send(b".")
        eventually(lambda: target.seen and target.seen[0].end)
        say_to_nobody(client.sock, target.port)
        wait_for_line(server, address, "tcp/connect ]:")
        with pytest.raises(ConnectionResetError):  # not to be taken for the whole
            client.receive_all()


def test_what_a_closed_client_sent_waits_as_long_as_a_half_closed_session(
    sockd: Any, private_world: World
) -> None:
    server = sockd(f"timeout.tcp_fin_wait: 1\n{EVERYTHING}", world=private_world)
    port, resume = Queue[int](), threading.Event()

    def take(connection: socket.socket, seen: Seen) -> None:
        say_to_nobody(connection, port.get())
        resume.wait()
        try:
            while connection.recv(1 << 20):
                pass
        except ConnectionResetError:
            seen.end = "RST"

    with bulk_under_way(server, take) as (target, client):
        client_port = client.address[1]
        send_until_held(client)
        client.close()
        port.put(client_port)
        try:
            eventually(lambda: any("local client closed" in message for message in server.messages))
        finally:
            resume.set()
        eventually(lambda: target.seen and target.seen[0].end == "RST")
