"""The other ends: targets and visitors that behave well or badly, each in threads of its own.

Every peer owns its sockets, takes a port that the kernel chooses, notes what it saw and gives
everything back in `close()`.  `Company` starts peers by name and closes them together.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

BUFFER_BYTES = 65536
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() resets
MOST_CONNECTIONS = 1000  # of one peer at a time; a server that loops must not exhaust the machine


class Seen:
    """What one connection brought: the bytes, and how they ended ("", "fin" or "reset")."""

    def __init__(self, remote: tuple[str, int]) -> None:
        self.remote = remote
        self.data = bytearray()
        self.end = ""

    def __str__(self) -> str:
        return f"{len(self.data)} bytes, {self.end or 'open'}"


class Peer:
    """A socket on an address of this machine; `address` is (host, port)."""

    kind = socket.SOCK_STREAM

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, self.kind)
        self.socket.bind((host, 0))
        self.address: tuple[str, int] = self.socket.getsockname()[:2]

    @property
    def port(self) -> int:
        """The port that the kernel chose."""
        return self.address[1]

    def close(self) -> None:
        """Give everything back."""
        self.socket.close()


class Refuser(Peer):
    """A port that is taken, so that nobody else gets it, and closed: connections are refused."""


class Blackhole(Peer):
    """A listener whose queue is full: to connect to it takes for ever."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.socket.listen(0)
        self._fillers: list[socket.socket] = []
        while self._fill():
            pass

    def _fill(self) -> bool:
        filler = socket.socket(self.socket.family)
        self._fillers.append(filler)
        filler.settimeout(0.2)
        try:
            filler.connect(self.address)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Give everything back."""
        for filler in self._fillers:
            filler.close()
        super().close()


Behaviour = Callable[[socket.socket, Seen], None]


class TcpPeer(Peer):
    """A listener that treats every connection with one behaviour, in a thread each."""

    def __init__(self, behaviour: Behaviour, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.seen: list[Seen] = []
        self._behaviour = behaviour
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self.socket.listen(128)
        self._start(self._accept)

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, remote = self.socket.accept()
            except OSError:  # close() shut the listener down
                return
            seen = Seen(remote[:2])
            with self._lock:
                # Who connects to the listener may believe to be served a moment before this.
                if self._closing or len(self._open) >= MOST_CONNECTIONS:
                    connection.close()
                    continue
                self._open.add(connection)
                self.seen.append(seen)
            self._start(self._serve, connection, seen)

    def _serve(self, connection: socket.socket, seen: Seen) -> None:
        # A behaviour that returns is through with its client; one that fails was left by it.
        with contextlib.suppress(OSError):
            self._behaviour(connection, seen)
        with self._lock:
            self._open.discard(connection)
            connection.close()

    def close(self) -> None:
        """Close the listener and every connection, and wait for the threads."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._closing = True
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        super().close()


def receive(connection: socket.socket, seen: Seen) -> bytes:
    """Give the next bytes, b"" at the end, and note them."""
    try:
        data = connection.recv(BUFFER_BYTES)
    except ConnectionResetError:
        seen.end = "reset"
        return b""
    seen.data += data
    if not data:
        seen.end = "fin"
    return data


def reset(connection: socket.socket) -> None:
    """Close a connection with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def echo(connection: socket.socket, seen: Seen) -> None:
    """Return every byte, and close when the other end does."""
    while data := receive(connection, seen):
        connection.sendall(data)


def discard(connection: socket.socket, seen: Seen) -> None:
    """Read to the end and say nothing."""
    while receive(connection, seen):
        pass


def hold(connection: socket.socket, seen: Seen) -> None:
    """Read to the end and then keep the connection, until both directions are closed."""
    discard(connection, seen)
    both_closed = select.poll()
    both_closed.register(connection, 0)
    both_closed.poll()


def farewell(connection: socket.socket, seen: Seen) -> None:
    """Read to the end, and only then answer: needs a half-closed connection."""
    discard(connection, seen)
    connection.sendall(b"farewell")


def greet_and_half_close(connection: socket.socket, seen: Seen) -> None:
    """Send 5 bytes, close this direction, then read to the end."""
    connection.sendall(b"hello")
    connection.shutdown(socket.SHUT_WR)
    discard(connection, seen)


def greet_and_close(connection: socket.socket, seen: Seen) -> None:
    """Send 5 bytes and close."""
    connection.sendall(b"hello")


def close_at_once(connection: socket.socket, seen: Seen) -> None:
    """Close without a byte."""


def reset_after_data(connection: socket.socket, seen: Seen) -> None:
    """Wait for some bytes, then reset."""
    receive(connection, seen)
    reset(connection)


def send_much(connection: socket.socket, seen: Seen) -> None:
    """Send 1 MB and close."""
    connection.sendall(bytes(1_000_000))


def send_for_ever(connection: socket.socket, seen: Seen) -> None:
    """Send until the other end is gone."""
    while True:
        connection.sendall(bytes(BUFFER_BYTES))


def read_slowly(connection: socket.socket, seen: Seen) -> None:
    """Read a little at a time."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    while data := connection.recv(1024):
        seen.data += data
        time.sleep(0.001)
    seen.end = "fin"


def answer_http(connection: socket.socket, seen: Seen) -> None:
    """Answer one HTTP request with a page that says `origin`."""
    while b"\r\n\r\n" not in seen.data:
        if not receive(connection, seen):
            return
    head = (
        "HTTP/1.1 200 OK",
        "Content-Type: text/plain",
        "Content-Length: 7",
        "Connection: close",
    )
    connection.sendall("\r\n".join([*head, "", "origin\n"]).encode())


class UdpPeer(Peer):
    """A UDP socket that hands every datagram to one behaviour."""

    kind = socket.SOCK_DGRAM

    def __init__(self, answers: int = 1, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.seen: list[tuple[bytes, tuple[str, int]]] = []
        self.answered = 0
        self._answers = answers
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, remote = self.socket.recvfrom(BUFFER_BYTES)
            if self._closing:
                return
            self.seen.append((data, remote[:2]))
            for _ in range(self._answers):
                with contextlib.suppress(OSError):
                    self.socket.sendto(data, remote)
            self.answered += 1

    def send(self, data: bytes, remote: tuple[str, int]) -> None:
        """Send a datagram that nobody asked for."""
        self.socket.sendto(data, remote)

    def close(self) -> None:
        """Stop the thread and close the socket."""
        self._closing = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes recvfrom, though UDP is not connected
        self._thread.join()
        super().close()


BEHAVIOURS: dict[str, Behaviour] = {
    "echo": echo,
    "discard": discard,
    "holder": hold,
    "farewell": farewell,
    "half-closer": greet_and_half_close,
    "greeter": greet_and_close,
    "closer": close_at_once,
    "resetter": reset_after_data,
    "sender": send_much,
    "endless": send_for_ever,
    "slow": read_slowly,
    "origin": answer_http,
}


def make_peer(kind: str, host: str = "127.0.0.1") -> Peer:
    """Start a peer by the name of what it does."""
    if kind == "refuser":
        return Refuser(host)
    if kind == "blackhole":
        return Blackhole(host)
    if kind.startswith("udp-"):
        return UdpPeer({"udp-echo": 1, "udp-sink": 0, "udp-twice": 2}[kind], host)
    return TcpPeer(BEHAVIOURS[kind], host)


class Company:
    """Peers that are closed together."""

    def __init__(self) -> None:
        self._peers: list[Peer] = []

    def start(self, kind: str, host: str = "127.0.0.1") -> Peer:
        """Start a peer by the name of what it does."""
        peer = make_peer(kind, host)
        self._peers.append(peer)
        return peer

    def __enter__(self) -> Company:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in reversed(self._peers):
            peer.close()
