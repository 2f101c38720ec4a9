"""What the session tests share beyond peers.py: configurations, a name server, behaviours, gauges."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import select
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from client import TIMEOUT_SECONDS, Address, Client
from peers import Behaviour, Seen, TcpPeer, receive
from servers import Process, Server, World, eventually

# ------------------------------ configurations ------------------------------

HEAD = """\
internal: 127.0.0.1 port = 0
internal: ::1 port = 0
external: 127.0.0.1
external: ::1
external: fd00::6
external.rotation: route
clientmethod: none
socksmethod: none
"""
IPV4_HEAD = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
clientmethod: none
socksmethod: none
"""
CLIENT_PASS = "client pass { from: 0/0 to: 0/0\n log: connect disconnect error\n}\n"
SOCKS_PASS = "socks pass { from: 0/0 to: 0/0\n log: connect disconnect error\n}\n"
EVERYTHING = HEAD + CLIENT_PASS + SOCKS_PASS


def rule(head: str, *items: str) -> str:
    """Write a rule, with each item on a line of its own."""
    return "\n".join([f"{head} {{", *(f"    {item}" for item in items), "}", ""])


# ------------------------------ the log ------------------------------


def lines_about(server: Server, client: Address) -> list[str]:
    """Give the records that name a client's connection, without those of an older one from its port."""
    name = re.compile(rf"(?<![\d.:]){re.escape(client[0])}\.{client[1]}(?!\d)")
    lines = [message for message in server.messages if name.search(message)]
    accepts = [n for n, line in enumerate(lines) if re.search(rf"tcp/accept \[: {name.pattern} ", line)]
    return lines[accepts[-1] :] if accepts else lines


def wait_for_line(server: Server, client: Address, *parts: str) -> str:
    """Wait for a record about a client that holds all the parts, and give it."""

    def find() -> str | None:
        lines = lines_about(server, client)
        return next((line for line in lines if all(part in line for part in parts)), None)

    return eventually(find) or ""


def wait_for_record(server: Server, *parts: str) -> str:
    """Wait for a record that holds all the parts, and give it."""

    def find() -> str | None:
        return next((m for m in server.messages if all(part in m for part in parts)), None)

    return eventually(find) or ""


def wait_for_workers(server: Server, count: int) -> Server:
    """Wait until so many workers run, and take what the server then holds for its baseline."""
    eventually(lambda: sum(message.endswith(" running") for message in server.messages) >= count)
    server.take_baseline()
    return server


# ------------------------------ gauges ------------------------------


def read_cpu_seconds(processes: list[Process]) -> float:
    """Give the processor time that processes have used so far."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def read_memory_bytes(processes: list[Process]) -> int:
    """Give the memory that processes hold."""
    pages = sum(int(Path(f"/proc/{p.pid}/statm").read_text().split()[1]) for p in processes)
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_idleness(server: Server, seconds: float = 0.5) -> float:
    """Give the share of one processor that a server uses while this much time passes."""
    processes = server.processes()
    before = read_cpu_seconds(processes)
    time.sleep(seconds)
    return (read_cpu_seconds(processes) - before) / seconds


def highest_descriptor(server: Server) -> int:
    """Give the highest descriptor number that any process of a server has open."""
    numbers = []
    for process in server.processes():
        with contextlib.suppress(OSError):
            numbers += [int(name) for name in os.listdir(f"/proc/{process.pid}/fd")]
    return max(numbers)


def count_keepalive_timers(*ports: int) -> int:
    """Count the established IPv4 connections from these ports with a keep-alive timer, once all is read."""

    def read_timers() -> list[str]:
        rows = [line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]]
        ours = [row for row in rows if row[3] == "01" and int(row[1].rpartition(":")[2], 16) in ports]
        return [row[5].split(":")[0] for row in ours]

    retransmission = "01"
    timers = eventually(lambda: (found := read_timers()) and retransmission not in found and found)
    return timers.count("02") if timers else 0


# ------------------------------ behaviours ------------------------------

SIOCATMARK = 0x8905


def is_at_mark(connection: socket.socket) -> bool:
    """Tell whether the next byte to read is the urgent one."""
    return any(fcntl.ioctl(connection, SIOCATMARK, bytes(4)))


def read_with_mark(connection: socket.socket, count: int) -> tuple[bytes, bytes, bytes]:
    """Read so many bytes of which one is urgent; give those before it, itself, and those behind."""
    before, urgent, behind = b"", b"", b""
    connection.setblocking(False)  # with a time-out, Python would wait for data that is not urgent
    waiting = select.poll()
    waiting.register(connection, select.POLLIN | select.POLLPRI)
    while len(before) + len(urgent) + len(behind) < count:
        events = waiting.poll(TIMEOUT_SECONDS * 1000)
        assert events, f"only {before!r} {urgent!r} {behind!r} came"
        if events[0][1] & select.POLLPRI and is_at_mark(connection):
            urgent += connection.recv(1, socket.MSG_OOB)
            continue
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            continue  # the urgent byte is announced a moment before what stands before it
        assert data, f"closed after {before!r} {urgent!r} {behind!r}"
        before, behind = (before, behind + data) if urgent else (before + data, behind)
    return before, urgent, behind


def send_with_mark(connection: socket.socket, before: bytes, urgent: bytes, behind: bytes) -> None:
    """Send one urgent byte between others."""
    if before:
        connection.sendall(before)
    connection.send(urgent, socket.MSG_OOB)
    if behind:
        connection.sendall(behind)


def answer_with_digest(size: int) -> Behaviour:
    """Make a behaviour: read to the end, then send the digest of it and `size` bytes, and close."""

    def behaviour(connection: socket.socket, seen: Seen) -> None:
        while receive(connection, seen):
            pass
        connection.sendall(hashlib.sha256(seen.data).digest() + pattern(size))

    return behaviour


def pattern(size: int) -> bytes:
    """Give bytes in which every stretch tells its place."""
    return array.array("I", range(size // 4 + 1)).tobytes()[:size]


def never_read(connection: socket.socket, seen: Seen) -> None:
    """Take nothing, until the other end is gone."""
    gone = select.poll()
    gone.register(connection, 0)
    gone.poll()
    seen.end = "gone"


@contextlib.contextmanager
def target_that(
    behaviour: Callable[[socket.socket, Seen], None], host: str = "127.0.0.1"
) -> Iterator[TcpPeer]:
    """Run a peer with a behaviour that peers.py does not name."""
    with contextlib.closing(TcpPeer(behaviour, host)) as target:
        yield target


def receive_much(client: Client, count: int) -> bytes:
    """Receive exactly so many bytes, of which there are too many for Client.receive."""
    pieces, left = [], count
    while left:
        pieces.append(client.sock.recv(min(left, 1 << 20)))
        assert pieces[-1]
        left -= len(pieces[-1])
    return b"".join(pieces)


def greet_and_reset(connection: socket.socket, seen: Seen) -> None:
    """Send 5 bytes, wait until one comes back, then reset."""
    connection.sendall(b"hello")
    receive(connection, seen)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# ------------------------------ names ------------------------------

A, AAAA = 1, 28


class NameServer:
    """A DNS server that knows a few names; needs root, for port 53, and a network of its own.

    `names` maps a name to the addresses of its first answer, its second and so on (the last one
    stays), or to None: questions about it are noted and never answered.
    """

    def __init__(self, names: dict[str, list[list[str]] | None], host: str = "127.0.0.53") -> None:
        self.host = host
        self.asked: Counter[str] = Counter()  # name -> questions of any type
        self._names = names
        self._answered: Counter[tuple[str, int]] = Counter()
        self._closing = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 53))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            question, sender = self._socket.recvfrom(4096)
            if self._closing:
                return
            answer = self._answer(question)
            if answer:
                self._socket.sendto(answer, sender)

    def _answer(self, question: bytes) -> bytes:
        name, end = decode_name(question, 12)
        kind = int.from_bytes(question[end : end + 2], "big")
        self.asked[name] += 1
        known = self._names.get(name, [])
        if known is None:
            return b""
        addresses = known[min(self._answered[name, kind], len(known) - 1)] if known else []
        self._answered[name, kind] += 1
        return encode_answer(question[: end + 4], kind, addresses, exists=bool(known))

    def close(self) -> None:
        """Stop answering."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


def decode_name(message: bytes, start: int) -> tuple[str, int]:
    """Give the name at an offset of a DNS message, in lower case, and the offset behind it."""
    labels = []
    while message[start]:
        labels.append(message[start + 1 : start + 1 + message[start]].decode("latin-1"))
        start += 1 + message[start]
    return ".".join(labels).lower(), start + 1


def encode_answer(question: bytes, kind: int, addresses: list[str], exists: bool) -> bytes:
    """Answer a DNS question with those of the addresses that are of its type."""
    family = {A: socket.AF_INET, AAAA: socket.AF_INET6}.get(kind)
    packed = [socket.inet_pton(family, a) for a in addresses if family and (":" in a) == (kind == AAAA)]
    flags = 0x8580 if exists else 0x8583  # an authoritative answer; 3: no such name
    head = question[:2] + struct.pack("!HHHHH", flags, 1, len(packed), 0, 0)
    records = b"".join(struct.pack("!HHHIH", 0xC00C, kind, 1, 0, len(data)) + data for data in packed)
    return head + question[12:] + records


def world_that_asks(server: NameServer, world: World, folder: Path) -> World:
    """Give a world that asks this name server for what its hosts file does not know, for 2 seconds."""
    texts = {
        "/etc/resolv.conf": f"nameserver {server.host}\noptions attempts:1 timeout:2\n",
        "/etc/nsswitch.conf": "hosts: files dns\n",
    }
    files = dict(world.files)
    for etc, text in texts.items():
        files[etc] = folder / Path(etc).name
        files[etc].write_text(text)
    return dataclasses.replace(world, files=files)


SILENT_NETWORK = "192.0.2.0/24"
SILENT_HOST = "192.0.2.1"  # packets to it get no answer


def add_silent_network() -> None:
    """Add a route into nowhere to this thread's network, which must be a private one."""
    subprocess.run(["ip", "route", "replace", SILENT_NETWORK, "dev", "lo", "src", "127.0.0.1"], check=True)


def change_address(how: str, address: str) -> None:
    """Add an address to this thread's network, which must be a private one, or delete it ("add", "del")."""
    length, nodad = ("/128", ["nodad"] * (how == "add")) if ":" in address else ("/32", [])
    subprocess.run(["ip", "address", how, address + length, "dev", "lo", *nodad], check=True)


# ------------------------------ other worlds ------------------------------


@dataclasses.dataclass(frozen=True)
class LimitedWorld(World):
    """A world whose servers get resource limits; `limits` are options of prlimit(1)."""

    limits: tuple[str, ...] = ()

    def wrap(self, command: list[str]) -> list[str]:
        """Give the command that runs `command` in this world, in the same process."""
        limited = ["prlimit", *self.limits, *command]
        return super().wrap(limited) if self.files else limited


def run_all(functions: list[Callable[[], None]]) -> None:
    """Run functions side by side; fail if one of them does."""
    errors: list[BaseException] = []

    def guard(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # it is raised again below
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def hash_with(kind: str, password: str, salt: str = "sockdtest") -> str:
    """Give the crypt(3) hash of a password: "-6" for SHA-512, "-5" for SHA-256."""
    command = ["openssl", "passwd", kind, "-salt", salt, password]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# ------------------------------ forged segments ------------------------------

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
REPAIR_ON, REPAIR_OFF = 1, -1
RECEIVE_QUEUE, SEND_QUEUE = 1, 2
TCP_URG_PSH_ACK = 0x38


def inject_urgent_byte_behind_a_gap(connection: socket.socket) -> None:
    """Send the other end of an IPv4 connection an urgent byte before which a byte is missing, for ever."""
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)
    numbers = []
    for queue in (SEND_QUEUE, RECEIVE_QUEUE):
        connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        numbers.append(connection.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF)
    here, there = connection.getsockname(), connection.getpeername()
    segment = tcp_segment(here, there, numbers[0] + 1, numbers[1], b"!")
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.bind((here[0], 0))
        raw.sendto(segment, (there[0], 0))


def tcp_segment(source: Address, target: Address, number: int, acknowledged: int, data: bytes) -> bytes:
    """Build a TCP segment whose first byte is urgent."""
    fields = source[1], target[1], number, acknowledged, 5 << 4, TCP_URG_PSH_ACK, 1000
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    bare = struct.pack("!HHIIBBH", *fields) + struct.pack("!HH", 0, 1) + data
    covered = addresses + struct.pack("!HH", socket.IPPROTO_TCP, len(bare)) + bare + bytes(len(bare) % 2)
    total = sum(struct.unpack(f"!{len(covered) // 2}H", covered))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return bare[:16] + struct.pack("!H", ~total & 0xFFFF) + bare[18:]
