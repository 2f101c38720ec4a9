"""Peers that real client programs talk to: DNS and FTP servers, and a way for dig to speak SOCKS."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

from client import UDP_ASSOCIATE, Client, UdpClient
from peers import Seen, TcpPeer, UdpPeer, receive

ANSWER = "192.0.2.7"  # what the DNS server gives for every name
PAGE = b"origin\n"  # what the FTP server gives for every file
MUCH = bytes(range(256)) * 4000


def answer_much(connection: socket.socket, seen: Seen) -> None:
    """Answer one HTTP/0.9 request with MUCH."""
    while b"\r\n\r\n" not in seen.data and receive(connection, seen):
        pass
    connection.sendall(MUCH)


class DnsPeer(UdpPeer):
    """A DNS server (RFC 1035) for which every name has the address ANSWER."""

    def _serve(self) -> None:
        while True:
            query, remote = self.socket.recvfrom(4096)
            if self._closing:
                return
            self.seen.append((query, remote[:2]))
            self.socket.sendto(answer_query(query), remote)


def answer_query(query: bytes) -> bytes:
    """Answer a query's first question with one A record, and leave out what else it holds."""
    end = 12
    while query[end]:
        end += query[end] + 1
    end += 5
    head = query[:2] + struct.pack("!HHHHH", 0x8580, 1, 1, 0, 0)
    record = struct.pack("!HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(ANSWER)
    return head + query[12:end] + record


class UdpForwarder(UdpPeer):
    """Takes datagrams as a plain UDP server and passes them on through a SOCKS server.

    dig's own calls go past the wrapping of socksify, with danted as well.
    """

    def __init__(self, server: tuple[str, int], target: tuple[str, int]) -> None:
        self._target = target
        self._control = Client(server)
        self._outside = UdpClient()
        reply = self._control.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        assert reply.code == 0, f"the association was refused with {reply.code}"
        self._relay = (reply.host, reply.port)
        super().__init__()

    def _serve(self) -> None:
        while True:
            data, remote = self.socket.recvfrom(4096)
            if self._closing:
                return
            self._outside.send(self._relay, *self._target, data)
            answer = self._outside.receive(self._relay)
            self.seen.append((answer.data, (answer.host, answer.port)))
            self.socket.sendto(answer.data, remote)

    def close(self) -> None:
        """Stop the thread and end the association."""
        super().close()
        self._outside.close()
        self._control.reset()


class FtpPeer(TcpPeer):
    """An FTP server (RFC 959, 2428) in which every file holds PAGE; notes which modes were used."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.modes: list[str] = []
        super().__init__(self._talk, host)

    def _talk(self, control: socket.socket, seen: Seen) -> None:
        data: DataConnection | None = None
        with contextlib.ExitStack() as opened:
            control.sendall(b"220 ready\r\n")
            for word, argument in read_commands(control, seen):
                if word in ("PASV", "EPSV", "PORT", "EPRT"):
                    self.modes.append("passive" if word.endswith("SV") else "active")
                    data = opened.enter_context(DataConnection(word, argument))
                    control.sendall(data.answer)
                elif word == "RETR" and data is not None:
                    control.sendall(b"150 here it comes\r\n")
                    data.send(PAGE)
                    control.sendall(b"226 done\r\n")
                else:
                    control.sendall(FTP_ANSWERS.get(word, b"502 not here\r\n"))
                if word == "QUIT":
                    return


FTP_ANSWERS = {
    "USER": b"331 password?\r\n",
    "PASS": b"230 welcome\r\n",
    "PWD": b'257 "/"\r\n',
    "TYPE": b"200 any\r\n",
    "SIZE": b"213 %d\r\n" % len(PAGE),
    "QUIT": b"221 bye\r\n",
}


def read_commands(control: socket.socket, seen: Seen) -> Iterator[tuple[str, str]]:
    """Give each command of an FTP client with its argument."""
    pending = b""
    while data := receive(control, seen):
        *lines, pending = (pending + data).split(b"\r\n")
        for line in lines:
            word, _, argument = line.decode("latin-1").partition(" ")
            yield word.upper(), argument


class DataConnection:
    """Where an FTP client wants its data: at a port of ours (passive) or of its own (active)."""

    def __init__(self, word: str, argument: str) -> None:
        self._listener: socket.socket | None = None
        self._client = ("", 0)
        if word in ("PORT", "EPRT"):
            self._client = parse_port(argument) if word == "PORT" else parse_eprt(argument)
            self.answer = b"200 I shall call\r\n"
            return
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.answer = f"227 (127,0,0,1,{port >> 8},{port & 255})\r\n".encode()
        if word == "EPSV":
            self.answer = f"229 (|||{port}|)\r\n".encode()

    def send(self, data: bytes) -> None:
        """Open the data connection, send everything and close it."""
        if self._listener is None:
            connection = socket.create_connection(self._client)
        else:
            connection, _ = self._listener.accept()
        with connection:
            connection.sendall(data)

    def __enter__(self) -> DataConnection:
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener is not None:
            self._listener.close()


def parse_port(argument: str) -> tuple[str, int]:
    """Give the address in the argument of PORT: h1,h2,h3,h4,p1,p2."""
    numbers = argument.split(",")
    return ".".join(numbers[:4]), int(numbers[4]) * 256 + int(numbers[5])


def parse_eprt(argument: str) -> tuple[str, int]:
    """Give the address in the argument of EPRT: |1|host|port|."""
    _, _, host, port, _ = argument.split(argument[0])
    return host, int(port)
