"""A small strict SOCKS 4, 4A and 5 client, written from the specifications.

It shares no code with sockd.py, so that a mistake there is not repeated here.  Every field of
every answer is asserted.  Every wait ends after 10 seconds, times SOCKD_TEST_TIMEOUT
where that is set.
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

TIMEOUT_SECONDS = 10 * float(os.environ.get("SOCKD_TEST_TIMEOUT", "1"))

CONNECT, BIND, UDP_ASSOCIATE = 1, 2, 3
IPV4, NAME, IPV6 = 1, 3, 4
NO_METHOD, PASSWORD_METHOD, NO_ACCEPTABLE_METHOD = 0, 2, 0xFF
GRANTED, REJECTED = 90, 91

Address = tuple[str, int]
Feed = Callable[[bytes], Iterable[bytes]]


# ---- How a message is cut up on its way out. ----


def whole(data: bytes) -> Iterator[bytes]:
    """Give the message in one piece."""
    yield data


def bytewise(data: bytes) -> Iterator[bytes]:
    """Give the message one byte at a time."""
    for offset in range(len(data)):
        yield data[offset : offset + 1]


def random_splits(seed: int) -> Feed:
    """Make a feed that cuts at random places, the same for the same seed."""
    chance = random.Random(seed)

    def split(data: bytes) -> Iterator[bytes]:
        start = 0
        while start < len(data):
            end = chance.randint(start + 1, len(data))
            yield data[start:end]
            start = end

    return split


def stop_after(count: int, feed: Feed = bytewise) -> Feed:
    """Make a feed that gives only the first `count` bytes of all that passes through it."""
    left = count

    def limited(data: bytes) -> Iterator[bytes]:
        nonlocal left
        start, left = data[:left], left - min(left, len(data))
        yield from feed(start)

    return limited


# ---- Messages, as RFC 1928, RFC 1929, SOCKS 4 and 4A draw them. ----


class Reply5(NamedTuple):
    """A SOCKS 5 reply, already checked for form."""

    code: int
    address_type: int
    host: str
    port: int


class Reply4(NamedTuple):
    """A SOCKS 4 reply, already checked for form."""

    code: int
    host: str
    port: int


class Datagram(NamedTuple):
    """A UDP datagram without its SOCKS header."""

    host: str
    port: int
    data: bytes


def whole_address(host: str, port: int) -> tuple[Any, ...]:
    """Give an address as the socket module wants it, also one of a link: `fe80::1%eth0`."""
    return socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)[0][4]


def type_of(host: str | bytes) -> int:
    """Tell the ATYP of a host: bytes are always a name, text is one unless it is an address."""
    if isinstance(host, bytes):
        return NAME
    try:
        return IPV4 if ipaddress.ip_address(host).version == 4 else IPV6
    except ValueError:
        return NAME


def pack_address(host: str | bytes, port: int, address_type: int | None = None) -> bytes:
    """Build ATYP, ADDR and PORT; `address_type` overrides what the host looks like."""
    kind = type_of(host) if address_type is None else address_type
    if kind in (IPV4, IPV6):
        body = ipaddress.ip_address(host).packed
    else:
        name = host if isinstance(host, bytes) else host.encode("ascii")
        body = bytes([len(name)]) + name
    return bytes([kind]) + body + struct.pack("!H", port)


def unpack_address(data: bytes) -> tuple[int, str, int, bytes]:
    """Take ATYP, ADDR and PORT apart; the bytes are what follows them."""
    kind = data[0]
    assert kind in (IPV4, NAME, IPV6), f"address type {kind} in {data.hex(' ')}"
    start = 2 if kind == NAME else 1
    end = start + {IPV4: 4, IPV6: 16}.get(kind, data[1])
    assert len(data) >= end + 2, f"address cut short: {data.hex(' ')}"
    body = data[start:end]
    host = body.decode("latin-1") if kind == NAME else str(ipaddress.ip_address(body))
    return kind, host, struct.unpack("!H", data[end : end + 2])[0], data[end + 2 :]


def greeting(methods: Iterable[int] = (NO_METHOD,)) -> bytes:
    """Build the offer of methods."""
    offered = bytes(methods)
    return bytes([5, len(offered)]) + offered


def password_message(user: bytes, password: bytes, version: int = 1) -> bytes:
    """Build the message of RFC 1929."""
    name = bytes([version, len(user)]) + user
    return name + bytes([len(password)]) + password


def request5(
    command: int,
    host: str | bytes,
    port: int,
    address_type: int | None = None,
    version: int = 5,
    reserved: int = 0,
) -> bytes:
    """Build a SOCKS 5 request; the last three arguments are for wrong ones."""
    return bytes([version, command, reserved]) + pack_address(host, port, address_type)


def request4(command: int, host: str | bytes, port: int, user: bytes = b"") -> bytes:
    """Build a SOCKS 4 request, or one of 4A when the host is a name."""
    if type_of(host) == NAME:
        name = host if isinstance(host, bytes) else host.encode("ascii")
        address, tail = b"\x00\x00\x00\x01", name + b"\x00"
    else:
        address, tail = ipaddress.IPv4Address(host).packed, b""
    return struct.pack("!BBH", 4, command, port) + address + user + b"\x00" + tail


def wrap(
    host: str | bytes, port: int, data: bytes, fragment: int = 0, reserved: bytes = b"\x00\x00"
) -> bytes:
    """Put the UDP header for this destination before the data."""
    return reserved + bytes([fragment]) + pack_address(host, port) + data


def unwrap(datagram: bytes) -> Datagram:
    """Take off the UDP header that the server has put before a reply."""
    assert len(datagram) >= 10, f"no room for a header: {datagram.hex(' ')}"
    assert datagram[:2] == b"\x00\x00", f"RSV is {datagram[:2].hex(' ')}"
    assert datagram[2] == 0, f"FRAG is {datagram[2]}"
    kind, host, port, data = unpack_address(datagram[3:])
    assert kind != NAME, "a reply comes from an address, not from a name"
    return Datagram(host, port, data)


# ---- The two ends that tests hold. ----


class Client:
    """One TCP connection to a SOCKS server; a context manager that closes it."""

    has_association = False  # which would outlive a FIN by some seconds, as datagrams may come

    def __init__(
        self,
        server: Address,
        feed: Feed = whole,
        source: Address | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self.feed = feed
        self.sock = socket.create_connection(server, timeout, source)
        # Without it the kernel would join the pieces of a feed again.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        if self.has_association and self.sock.fileno() >= 0:
            self.reset()
        self.close()

    @property
    def address(self) -> Address:
        """This end of the connection."""
        return self.sock.getsockname()[:2]

    def send(self, data: bytes) -> None:
        """Send through the feed of this client."""
        for piece in self.feed(data):
            self.sock.sendall(piece)

    def receive(self, count: int) -> bytes:
        """Receive exactly this many bytes and not one more."""
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            assert piece, f"closed after {data.hex(' ') or 'nothing'}; {count} bytes were due"
            data += piece
        return data

    def receive_all(self) -> bytes:
        """Receive until the server closes."""
        return b"".join(iter(lambda: self.sock.recv(65536), b""))

    def expect_end(self) -> None:
        """Assert that the server closes without another byte."""
        rest = self.sock.recv(4096)
        assert rest == b"", f"unexpected {rest.hex(' ')}"

    def expect_end_or_reset(self) -> None:
        """Assert the same where the server may have left our bytes unread."""
        try:
            self.expect_end()
        except ConnectionResetError:
            pass

    def finish_sending(self) -> None:
        """Close the sending half."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End the connection with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        """Close both halves."""
        self.sock.close()

    def read_method(self) -> int:
        """Read the method selection."""
        version, method = self.receive(2)
        assert version == 5, f"version {version} in the method selection"
        return method

    def greet(self, methods: Iterable[int] = (NO_METHOD,)) -> int:
        """Offer methods and return the one that the server selects."""
        self.send(greeting(methods))
        return self.read_method()

    def read_status(self) -> int:
        """Read the answer to user name and password; 0 is success."""
        version, status = self.receive(2)
        assert version == 1, f"version {version} in the password status"
        return status

    def authenticate(self, user: bytes, password: bytes) -> int:
        """Send user name and password and return the status; 0 is success."""
        self.send(password_message(user, password))
        return self.read_status()

    def read_reply5(self) -> Reply5:
        """Read one SOCKS 5 reply."""
        version, code, reserved, kind = head = self.receive(4)
        assert version == 5, f"version {version} in {head.hex(' ')}"
        assert code <= 8, f"REP {code} is unassigned"
        assert reserved == 0, f"RSV is {reserved}"
        assert kind in (IPV4, NAME, IPV6), f"address type {kind} in {head.hex(' ')}"
        rest = self.receive(1) if kind == NAME else b""
        rest += self.receive({IPV4: 4, IPV6: 16}.get(kind, rest[0] if rest else 0) + 2)
        _, host, port, _ = unpack_address(bytes([kind]) + rest)
        return Reply5(code, kind, host, port)

    def read_reply4(self) -> Reply4:
        """Read one SOCKS 4 reply."""
        version, code, port, address = struct.unpack("!BBH4s", self.receive(8))
        assert version == 0, f"version {version} in a SOCKS 4 reply"
        assert code in (90, 91, 92, 93), f"code {code} in a SOCKS 4 reply"
        return Reply4(code, str(ipaddress.IPv4Address(address)), port)

    def request5(self, command: int, host: str | bytes, port: int, address_type: int | None = None) -> Reply5:
        """Send a SOCKS 5 request and return its (first) reply."""
        self.has_association = command == UDP_ASSOCIATE
        self.send(request5(command, host, port, address_type))
        return self.read_reply5()

    def request4(self, command: int, host: str | bytes, port: int, user: bytes = b"") -> Reply4:
        """Send a SOCKS 4 or 4A request and return its (first) reply."""
        self.send(request4(command, host, port, user))
        return self.read_reply4()

    def open5(
        self,
        command: int,
        host: str | bytes,
        port: int,
        credentials: tuple[bytes, bytes] | None = None,
    ) -> Reply5:
        """Greet, authenticate if there are credentials, send the request, return its reply."""
        method = NO_METHOD if credentials is None else PASSWORD_METHOD
        selected = self.greet([method])
        assert selected == method, f"method {selected} selected, only {method} was offered"
        if credentials is not None:
            status = self.authenticate(*credentials)
            assert status == 0, f"password refused with status {status}"
        return self.request5(command, host, port)

    def exchange(self, data: bytes) -> bytes:
        """Send data through an open session and return as many bytes from the other side."""
        self.send(data)
        return self.receive(len(data))


class UdpClient:
    """The UDP socket beside a UDP ASSOCIATE; a context manager that closes it."""

    def __init__(self, local: Address = ("127.0.0.1", 0), timeout: float = TIMEOUT_SECONDS) -> None:
        family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.settimeout(timeout)
        self.sock.bind(local)

    def __enter__(self) -> UdpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> Address:
        """Where this socket is bound."""
        return self.sock.getsockname()[:2]

    def send(self, relay: Address, host: str | bytes, port: int, data: bytes) -> None:
        """Send data to the destination by way of the relay."""
        self.send_raw(relay, wrap(host, port, data))

    def send_raw(self, relay: Address, datagram: bytes) -> None:
        """Send a datagram as it is, header or not."""
        self.sock.sendto(datagram, relay)

    def receive(self, relay: Address) -> Datagram:
        """Receive one datagram, which must come from the relay, and take off its header."""
        datagram, sender = self.sock.recvfrom(65536)
        assert sender[:2] == tuple(relay), f"datagram from {sender}, not from the relay {relay}"
        return unwrap(datagram)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()
