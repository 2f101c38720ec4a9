"""Scripted conversations with a SOCKS server, and a transcript of what came of each.

A script is a tuple of steps (a step may itself be a tuple).  A transcript is a list of lines in
which every address stands as the part that it plays: CLIENT, SERVER, `127.0.0.1.echo` for the
port of the peer `echo`, REQUESTED for the address that the client asked for, `127.0.0.1.*` for a
port that the server was free to choose.  So the transcripts of two servers can be compared.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

from client import (
    GRANTED,
    NO_ACCEPTABLE_METHOD,
    greeting,
    pack_address,
    password_message,
    request4,
    request5,
    wrap,
)
from peers import RESET, Company, Peer, TcpPeer, UdpPeer
from servers import WITHIN, Record, Server, eventually

Address = tuple[str, int]
Step = Callable[["Talk"], None]
Part = bytes | Callable[["Talk"], bytes]

COMMANDS = {"connect": 1, "bind": 2, "udpassociate": 3}
ADDRESS_IN_LOG = re.compile(
    r"(?<![\w.:-])([0-9a-fA-F:.]*[0-9a-fA-F:]|[\w-]+(?:\.[\w-]+)*\.test)\.(\d{1,5})(?!\w|\.\w)"
)
VARYING = (
    (re.compile(r"Session duration: \d+s"), "Session duration: _s"),
    (re.compile(r"in \d+ seconds?(?=:)"), "in _ seconds"),
    (re.compile(r"timeout after \d+ seconds?"), "timeout after _ seconds"),
)


class Gone(Exception):
    """The server closed the connection, so that the rest of a script makes no sense."""


class Talk:
    """One client's conversation with a server."""

    def __init__(self, server: Server, source: str, company: Company) -> None:
        self.server = server
        self.source = source
        self.lines: list[str] = []
        self.roles: dict[Address, str] = {address: "SERVER" for address in server.addresses}
        self.requested: bytes = b""
        self.bytewise = False
        self.was_refused = False
        self.sockets: dict[str, socket.socket] = {}
        self.relay: Address = ("", 0)
        self.peers: dict[str, Peer] = {}
        self._company = company

    # -- addresses

    def peer(self, name: str) -> Peer:
        """Give this conversation's own peer of a name; `kind@host` is one on another address."""
        if name not in self.peers:
            kind, _, host = name.partition("@")
            self.peers[name] = self._company.start(kind.partition("#")[0], host or "127.0.0.1")
        return self.peers[name]

    def resolve(self, target: str) -> Address:
        """Give the address that a script means: `peer`, `host/peer` or `host/number`."""
        host, slash, port = target.rpartition("/")
        if port in ("client", "udp-client"):
            return host, self.sockets[port.removesuffix("-client")].getsockname()[1]
        if port.isdigit():
            return host, int(port)
        peer = self.peer(port)
        return (host if slash else peer.address[0]), peer.port

    def describe(self, address: Address) -> str:
        """Give the part that an address plays."""
        host, port = address
        if address in self.roles:
            return self.roles[address]
        for name, peer in self.peers.items():
            if peer.port == port:
                return f"{host}.{name.partition('@')[0]}"
        return f"{host}.{port}" if port == 0 or port < 1024 else f"{host}.*"

    # -- the client's connection

    @property
    def client(self) -> socket.socket:
        """The connection to the server, opened at its first use."""
        if "client" not in self.sockets:
            connection = self.server.connect(self.source)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sockets["client"] = connection
            self.roles[connection.getsockname()[:2]] = "CLIENT"
        return self.sockets["client"]

    def note(self, line: str) -> None:
        """Add a line to the transcript."""
        self.lines.append(line)

    def send(self, data: bytes, who: str = "client") -> None:
        """Send bytes; a server that is already gone shows when something is read."""
        connection = self.client if who == "client" else self.sockets[who]
        pieces = [data[n : n + 1] for n in range(len(data))] if self.bytewise else [data]
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for piece in pieces:
                connection.sendall(piece)

    def read(self, count: int, what: str, who: str = "client") -> bytes:
        """Read exactly `count` bytes, or note how the connection ended and give up."""
        connection = self.client if who == "client" else self.sockets[who]
        data = b""
        while len(data) < count:
            piece, end = receive(connection, count - len(data))
            if end:
                self.note(f"{what}: {data.hex(' ')} {end}".replace("  ", " "))
                raise Gone
            data += piece
        return data

    def read_address(self, atyp: int, what: str) -> tuple[bytes, Address]:
        """Read the address of a SOCKS 5 reply and give it as sent and decoded."""
        length = b""
        if atyp == 3:
            length = self.read(1, what)
        size = {1: 4, 4: 16}.get(atyp, length[0] if length else 0)
        host, port = self.read(size, what), self.read(2, what)
        return length + host + port, (text_of_host(atyp, host), struct.unpack("!H", port)[0])

    def read_reply(self, what: str) -> Address:
        """Read a SOCKS 5 reply, note it, and give its address."""
        head = self.read(4, what)
        raw, address = self.read_address(head[3], what)
        same = bytes([head[3]]) + raw == self.requested and any(raw[-2:])
        part = "REQUESTED" if same else self.describe(address)
        self.note(f"{what}: {head.hex(' ')} {part}")
        self.was_refused = head[1] != 0
        return address

    def read_reply4(self, what: str) -> Address:
        """Read a SOCKS 4 reply, note it, and give its address."""
        data = self.read(8, what)
        address = socket.inet_ntoa(data[4:]), int.from_bytes(data[2:4], "big")
        same = data[2:] == self.requested
        self.note(f"{what}: {data[:2].hex(' ')} {'REQUESTED' if same else self.describe(address)}")
        self.was_refused = data[1] != GRANTED
        return address

    # -- the end

    def run(self, script: Iterable[Any]) -> None:
        """Follow a script, then close everything; what goes wrong is part of the transcript."""
        try:
            for step in flatten(script):
                step(self)
        except Gone:
            pass
        except (OSError, AssertionError) as error:
            self.note(f"!! {type(error).__name__}: {error}")
        self.finish()

    def finish(self) -> None:
        """Close all sockets, the client's last, and only after the server has closed its side."""
        client = self.sockets.pop("client", None)
        for connection in self.sockets.values():
            connection.close()
        if client and client.fileno() >= 0:
            self._drain(client)
            client.close()

    def _drain(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        try:
            while connection.recv(65536):
                pass
        except TimeoutError:
            self.note("!! the server left the connection open")
        except OSError:
            pass

    def mask(self, record: Record) -> str:
        """Give a log record with its addresses as parts and its times blotted out."""

        def part(found: re.Match[str]) -> str:
            return self.describe((found[1], int(found[2])))

        text = str(record).replace(str(self.server.config_path), "CONFIG")
        text = ADDRESS_IN_LOG.sub(part, text)
        for pattern, blot in VARYING:
            text = pattern.sub(blot, text)
        return text

    def is_about(self, record: Record) -> bool:
        """Tell whether a log record names this client."""
        client = [f"{host}.{port}" for (host, port), role in self.roles.items() if "CLIENT" in role]
        return any(re.search(rf"(?<![\d.:]){re.escape(name)}(?!\d)", record.message) for name in client)

    def is_about_relay(self, record: Record) -> bool:
        """Tell whether a log record names this client's UDP relay."""
        host, port = self.relay
        return bool(port) and re.search(rf" {re.escape(host)}\.{port}(?!\d)", record.message) is not None


def receive(connection: socket.socket, count: int) -> tuple[bytes, str]:
    """Give the next bytes, or how the connection ended."""
    try:
        data = connection.recv(count)
    except ConnectionResetError:
        return b"", "reset"
    except TimeoutError:
        return b"", "nothing came"
    return data, "" if data else "fin"


def text_of_host(atyp: int, host: bytes) -> str:
    """Give the text of an address as it stands in a SOCKS 5 message."""
    if atyp == 3:
        return host.decode("latin-1")
    return socket.inet_ntop(socket.AF_INET6 if atyp == 4 else socket.AF_INET, host)


def flatten(script: Iterable[Any]) -> Iterable[Step]:
    """Give the steps of a script one by one."""
    for step in script:
        if isinstance(step, tuple):
            yield from flatten(step)
        else:
            yield step


# ------------------------------ messages ------------------------------


def host_in_message(target: str, host: str) -> str | bytes:
    """Give the host as a message has it: behind `=` in a script anything goes as a name."""
    return host.encode("latin-1") if target.startswith("=") else host


def hello(*methods: int) -> bytes:
    """Give a SOCKS 5 greeting."""
    return greeting(methods)


def password(user: str, secret: str, version: int = 1) -> bytes:
    """Give a username/password request (RFC 1929)."""
    return password_message(user.encode("latin-1"), secret.encode("latin-1"), version)


def v5(command: str | int, target: str, version: int = 5, reserved: int = 0) -> Part:
    """Give a SOCKS 5 request; a target that begins with `=` goes as a name whatever it is."""

    def make(talk: Talk) -> bytes:
        host, port = talk.resolve(target.removeprefix("="))
        number = COMMANDS[command] if isinstance(command, str) else command
        spelled = host_in_message(target, host)
        talk.requested = pack_address(spelled, port)
        return request5(number, spelled, port, version=version, reserved=reserved)

    return make


def v4(command: str | int, target: str, user: bytes = b"") -> Part:
    """Give a SOCKS 4 request, or one of 4A when the target is a name."""

    def make(talk: Talk) -> bytes:
        host, port = talk.resolve(target)
        number = COMMANDS[command] if isinstance(command, str) else command
        request = request4(number, host, port, user)
        talk.requested = request[2:8]
        return request

    return make


def cut(part: Part, count: int) -> Part:
    """Give the first `count` bytes of a message."""
    return lambda talk: make_bytes(part, talk)[:count]


def make_bytes(part: Part, talk: Talk) -> bytes:
    """Give the bytes of a message in this conversation."""
    return part if isinstance(part, bytes) else part(talk)


# ------------------------------ steps ------------------------------


def send(*parts: Part, who: str = "client") -> Step:
    """Send messages in one segment."""
    return lambda talk: talk.send(b"".join(make_bytes(part, talk) for part in parts), who)


def open_connection(talk: Talk) -> None:
    """Connect to the server and send nothing yet."""
    talk.client.getsockname()


def invite(name: str) -> Step:
    """Start a peer that takes its time before the client connects."""

    def step(talk: Talk) -> None:
        talk.peer(name)

    return step


def bytewise(talk: Talk) -> None:
    """From here on send every byte by itself."""
    talk.bytewise = True


def hear(count: int, what: str = "heard", who: str = "client") -> Step:
    """Read `count` bytes and note them."""

    def step(talk: Talk) -> None:
        data = talk.read(count, what, who)
        talk.note(f"{what}: {data!r}" if count <= 64 else f"{what}: {len(data)} bytes")

    return step


def status(what: str, refusal: Callable[[int], bool]) -> Step:
    """Read a version and a status and note them."""

    def step(talk: Talk) -> None:
        data = talk.read(2, what)
        talk.note(f"{what}: {data.hex(' ')}")
        talk.was_refused = refusal(data[1])

    return step


method = status("method", lambda number: number == NO_ACCEPTABLE_METHOD)
password_status = status("password status", bool)


def go_on(talk: Talk) -> None:
    """End the script here if the last answer was a refusal."""
    if talk.was_refused:
        raise Gone


def reply(talk: Talk) -> None:
    """Read a SOCKS 5 reply."""
    talk.read_reply("reply")


def reply4(talk: Talk) -> None:
    """Read a SOCKS 4 reply."""
    talk.read_reply4("reply")


def fin(talk: Talk) -> None:
    """Close the client's direction."""
    talk.client.shutdown(socket.SHUT_WR)


def reset(talk: Talk) -> None:
    """Reset the client's connection."""
    talk.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    talk.client.close()


def end(talk: Talk) -> None:
    """Read to the end, and note how it came."""
    note_end(talk, "client", {})


def over(talk: Talk) -> None:
    """Read to the end, however it comes: by what was unread it is a fin or a reset."""
    note_end(talk, "client", {"fin": "closed", "reset": "closed"})


def note_end(talk: Talk, who: str, names: dict[str, str]) -> None:
    """Note the bytes up to the end of a connection and how it ended."""
    connection = talk.client if who == "client" else talk.sockets[who]
    data = b""
    while True:
        piece, ending = receive(connection, 65536)
        if ending:
            break
        data += piece
    extra = f" after {data!r}" if data else ""
    talk.note(f"{who} end: {names.get(ending, ending)}{extra}")


def saw(name: str) -> Step:
    """Note what a peer saw of its first connection, once that is over."""

    def step(talk: Talk) -> None:
        peer = talk.peer(name)
        assert isinstance(peer, TcpPeer)
        eventually(lambda: peer.seen and peer.seen[0].end)
        talk.note(f"{name} saw: {peer.seen[0]}")

    return step


def same_port(name: str) -> Step:
    """Note whether the server used the client's port towards a peer."""

    def step(talk: Talk) -> None:
        peer = talk.peer(name)
        assert isinstance(peer, TcpPeer)
        port = eventually(lambda: peer.seen and peer.seen[0].remote[1])
        talk.note(f"same port: {port == talk.client.getsockname()[1]}")

    return step


greet = (send(hello(0)), method)


def connect(target: str) -> tuple[Any, ...]:
    """Connect through SOCKS 5 without a password."""
    return (greet, send(v5("connect", target)), reply)


def connect4(target: str) -> tuple[Any, ...]:
    """Connect through SOCKS 4."""
    return (send(v4("connect", target)), reply4)


def log_in(user: str, secret: str) -> tuple[Any, ...]:
    """Negotiate a password."""
    return (send(hello(2)), method, go_on, send(password(user, secret)), password_status, go_on)


def ping(text: bytes = b"ping") -> tuple[Any, ...]:
    """Send a few bytes and hear them again, where the server has agreed."""
    return (go_on, send(text), hear(len(text)))


# -- BIND


def bind(target: str) -> tuple[Any, ...]:
    """Ask for a port that `target` may connect to."""
    return (greet, send(v5("bind", target)), first_reply)


def first_reply(talk: Talk) -> None:
    """Read the reply that tells where the server listens."""
    address = talk.read_reply("first reply")
    if not talk.was_refused:
        talk.roles[address] = "BOUND"


def first_reply4(talk: Talk) -> None:
    """Read the SOCKS 4 reply that tells where the server listens."""
    address = talk.read_reply4("first reply")
    if not talk.was_refused:
        talk.roles[address] = "BOUND"


def visit(source: str, who: str = "visitor") -> Step:
    """Connect from `source` to where the server listens."""

    def step(talk: Talk) -> None:
        bound = next(address for address, role in talk.roles.items() if role == "BOUND")
        try:
            visitor = socket.create_connection(bound, timeout=WITHIN, source_address=(source, 0))
        except ConnectionRefusedError:
            talk.note(f"{who}: refused")
            return
        talk.sockets[who] = visitor
        talk.roles[visitor.getsockname()[:2]] = who.upper()

    return step


def no_more_visitors(talk: Talk) -> None:
    """Wait until the server has stopped listening for peers."""
    bound = next(address for address, role in talk.roles.items() if role == "BOUND")

    def is_refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(bound) == errno.ECONNREFUSED

    eventually(is_refused)
    talk.note("no more visitors")


def second_reply(talk: Talk) -> None:
    """Read the reply that tells who connected."""
    talk.read_reply("second reply")


def second_reply4(talk: Talk) -> None:
    """Read the SOCKS 4 reply that tells who connected."""
    talk.read_reply4("second reply")


def end_of(who: str) -> Step:
    """Read a visitor's connection to its end."""
    return lambda talk: note_end(talk, who, {})


def over_of(who: str) -> Step:
    """Read a visitor's connection to its end, however that comes."""
    return lambda talk: note_end(talk, who, {"fin": "closed", "reset": "closed"})


def close_visitor(talk: Talk) -> None:
    """Close the visitor's connection, if there is one."""
    if "visitor" in talk.sockets:
        talk.sockets["visitor"].close()


def fin_of(who: str) -> Step:
    """Close a visitor's direction."""
    return lambda talk: talk.sockets[who].shutdown(socket.SHUT_WR)


# -- UDP


def associate(target: str = "0.0.0.0/0") -> tuple[Any, ...]:
    """Ask for a UDP relay; `HOST/udp` names this client's own UDP socket."""
    return (open_udp("udp"), greet, send(v5("udpassociate", target)), relay_reply)


def relay_reply(talk: Talk) -> None:
    """Read the reply that tells where the relay is."""
    address = talk.read_reply("reply")
    if not talk.was_refused:
        talk.relay = address
        talk.roles[address] = "RELAY"


def open_udp(who: str, source: str = "") -> Step:
    """Open a UDP socket of the client."""

    def step(talk: Talk) -> None:
        host = source or talk.source
        udp = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        udp.settimeout(WITHIN)
        udp.bind((host, 0))
        talk.sockets[who] = udp
        talk.roles[udp.getsockname()[:2]] = f"{who.upper()}-CLIENT"

    return step


def datagram(target: str, data: bytes, fragment: int = 0, reserved: int = 0, who: str = "udp") -> Step:
    """Send a datagram for `target` to the relay."""

    def step(talk: Talk) -> None:
        host, port = talk.resolve(target.removeprefix("="))
        spelled = host_in_message(target, host)
        packet = wrap(spelled, port, data, fragment, reserved.to_bytes(2, "big"))
        talk.sockets[who].sendto(packet, talk.relay)

    return step


def raw_datagram(packet: bytes, who: str = "udp") -> Step:
    """Send any bytes to the relay."""

    def step(talk: Talk) -> None:
        talk.sockets[who].sendto(packet, talk.relay)

    return step


def answer(who: str = "udp") -> Step:
    """Read a datagram from the relay and note its header and data."""

    def step(talk: Talk) -> None:
        try:
            packet, relay = talk.sockets[who].recvfrom(65536)
        except TimeoutError:
            talk.note("answer: nothing came")
            raise Gone from None
        size = {1: 4, 4: 16}[packet[3]]
        host = text_of_host(packet[3], packet[4 : 4 + size])
        port = int.from_bytes(packet[4 + size : 6 + size], "big")
        data = packet[6 + size :]
        shown = repr(data) if len(data) <= 64 else f"{len(data)} bytes"
        line = f"{packet[:4].hex(' ')} {talk.describe((host, port))} {shown}"
        talk.note(f"answer from {talk.describe(relay[:2])}: {line}")

    return step


def unasked(name: str, data: bytes, of: str = "udp-echo") -> Step:
    """Have a peer send to where the server's datagrams to peer `of` came from."""

    def step(talk: Talk) -> None:
        target, other = talk.peer(of), talk.peer(name)
        assert isinstance(target, UdpPeer)
        assert isinstance(other, UdpPeer)
        eventually(lambda: target.seen)
        other.send(data, target.seen[-1][1])

    return step


def first_seen(name: str) -> Step:
    """Note the first datagram that a peer saw."""

    def step(talk: Talk) -> None:
        peer = talk.peer(name)
        assert isinstance(peer, UdpPeer)
        talk.note(f"{name} saw first: {eventually(lambda: peer.seen and peer.seen[0][0])!r}")

    return step


def logged(text: str) -> Step:
    """Wait until the server has logged a line about this client that contains a text."""

    def step(talk: Talk) -> None:
        eventually(lambda: any(talk.is_about(r) and text in talk.mask(r) for r in talk.server.log))

    return step


def answered(name: str) -> Step:
    """Wait until a peer has answered its first datagram."""

    def step(talk: Talk) -> None:
        peer = talk.peer(name)
        assert isinstance(peer, UdpPeer)
        eventually(lambda: peer.answered)

    return step
