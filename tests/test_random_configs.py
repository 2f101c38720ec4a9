"""Random configurations: danted and sockd give every client the same verdict, by the same rule.

SOCKD_RANDOM_CONFIGS is how many configurations are tried (150, and in CI 500), SOCKD_RANDOM_SEED
what they grow from: configuration N of a seed is always the same one; SOCKD_RANDOM_FIRST is the first N.
A client that fares differently is tried again by itself, with more patience, before it counts.

What differs on purpose is in DIFFERENCES, each with its reason.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from client import greeting, password_message, request4, request5, unpack_address, wrap
from servers import Danted, DidNotStart, Server, Sockd, World, eventually, need_danted

from sockd import SystemSurroundings, parse_config

pytestmark = [pytest.mark.root, pytest.mark.dante]

COUNT = int(os.environ.get("SOCKD_RANDOM_CONFIGS", "500" if os.environ.get("CI") == "true" else "150"))
SEED = int(os.environ.get("SOCKD_RANDOM_SEED", "1"))
FIRST = int(os.environ.get("SOCKD_RANDOM_FIRST", "0"))
CLIENTS = 20  # of each configuration
PIPELINES = 2  # configurations at a time, each with servers of its own
SOON, LATE = 0.3, 3.0  # seconds that a datagram may take: at first, and when in doubt
PATIENCE = 10.0  # seconds for everything that always comes

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() resets, so that a port is free at once
# The targets' ports.  The network is the tests' own, and the kernel chooses none below 32768: so what it
# does choose compares with these in the same way for both servers.
PORTS = (7001, 7002, 7003)


# ------------------------------ the generator ------------------------------


class Attempt(NamedTuple):
    """One client: where it comes from, how it introduces itself and what it asks for."""

    server: int  # 0: the IPv4 listener, 1: the IPv6 one
    source: str
    source_port: int  # 0: any
    version: str  # "4", "4a", "5" or "http"
    methods: tuple[int, ...]
    user: tuple[bytes, bytes]
    command: str
    target: str
    port: int
    peer: str  # who connects to what BIND has opened
    names_itself: bool  # the request names the client's UDP port, or BIND's peer


class Case(NamedTuple):
    """A configuration with its clients."""

    number: int
    config: str
    attempts: tuple[Attempt, ...]


SOURCES = (
    "0/0", "0/0", "0/0", "0/0", "127.0.0.0/8", "127.0.0.1/32", "127.0.0.5/32", "127.0.0.5/30",
    "127.0.0.9/29", "fd00::6/128", "fd00::/16", "::/0", "0.0.0.0/0", "client.example.test",
    ".example.test", ".", "both.test", "nowhere.test", "lo", "::1/128",
)  # fmt: skip
TARGETS = (
    "0/0", "0/0", "0/0", "127.0.0.1/32", "127.0.0.2/32", "127.0.0.2/31", "127.0.0.0/8",
    "fd00::6/128", "fd00::/8", "::/0", "0.0.0.0/0", "203.0.113.0/24", "echo.test", "ECHO.test",
    "multi.test", "two.test", "six.test", "both.test", "mixed.test", "nowhere.test", ".test", ".example.test",
    ".", "lo", "client.example.test", "127.0.0.5/32",
)  # fmt: skip
SERVERS = ("0/0", "0/0", "0/0", "127.0.0.1/32", "fd00::6/128", "0.0.0.0/0", "::/0", "lo", "six.test")
CLIENT_HOSTS = (("127.0.0.1", "127.0.0.5", "127.0.0.9"), ("fd00::6", "::1"))
TARGET_HOSTS = (
    "127.0.0.1", "127.0.0.2", "127.0.0.5", "fd00::6", "echo.test", "multi.test", "two.test",
    "six.test", "both.test", "mixed.test", "www.example.test", "Example.Test", "nowhere.test",
)  # fmt: skip
OPERATORS = ("=", "eq", "!=", "ne", ">", "gt", ">=", "ge", "<", "lt", "<=", "le")
METHODS = ("none", "none", "username", "username none", "none username", "rfc931 none", "username rfc931")
COMMANDS = ("connect", "bind", "udpassociate", "bindreply", "udpreply")
# Settings that may change what becomes of a client, each with how often of a hundred it is there.
SETTINGS = {
    "resolveprotocol: fake": 8,
    "resolveprotocol: tcp": 3,
    "srchost: checkreplyauth": 8,
    "srchost: nodnsunknown": 4,
    "srchost: nodnsmismatch": 4,
    "udp.connectdst: no": 8,
    "compatibility: sameport": 5,
    "external.rotation: route": 6,
    "external.rotation: same-same": 6,
    "timeout.negotiate: 60": 4,
    "external.socket.so_keepalive: 1": 4,
    "route.maxfail: 3": 4,
    "child.maxrequests: 100": 3,
}
# And some of a rule that must change nothing.
HARMLESS = (
    "timeout.connect: 40", "timeout.io: 50", "session.max: 1000", "session.throttle: 1000/1",
    "internal.ip.ip_tos: 8", "clientmethod: none", "internal.log.info.error: econnreset",
)  # fmt: skip
USERS = ((b"alice", b"wonderland"), (b"bob", b"builder"), (b"alice", b"wrong"), (b"nobody", b""))
NAMING = {"username", "rfc931"}


class Generator:
    """Makes a case from a seed; its ports are still placeholders."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.methods: list[str] = []
        self.clientmethods = ["none"]
        self.versions = ["4", "4a", "5", "5", "5", "5"]

    def make(self, number: int) -> Case:
        """Give the case of a number."""
        config = self.config()
        if "proxyprotocol" in config:
            # danted has no SOCKS 4A: what it would say to the name is asked by SOCKS 5.
            self.versions.remove("4a")
        return Case(number, config, tuple(self.attempt(index) for index in range(CLIENTS)))

    def often(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def some(self, words: tuple[str, ...] | list[str], most: int = 9) -> list[str]:
        """Give some of the words, in any order, at least one."""
        count = self.random.randint(1, min(most, len(words)))
        return self.random.sample(list(words), count)

    def config(self) -> str:
        chosen = self.random.choice(METHODS)
        self.methods = chosen.split()
        self.clientmethods = ["none"]
        if self.often(10):
            self.clientmethods = self.random.choice([["none", "rfc931"], ["rfc931", "none"], ["rfc931"]])
        lines = [
            "internal: 127.0.0.1 port = 0",
            "internal: fd00::6 port = 0",
            *self.externals(),
            f"{'method' if self.often(5) else 'socksmethod'}: {chosen}",
            f"clientmethod: {' '.join(self.clientmethods)}",
            "user.privileged: root",
            "user.unprivileged: nobody",
            *(setting for setting, percent in SETTINGS.items() if self.often(percent)),
        ]
        rules = [self.client_rule() for _ in range(self.random.randint(0, 3))]
        if not rules or self.often(75):
            rules.append(rule("client pass", "0/0", "0/0", []))
        rules += [self.socks_rule() for _ in range(self.random.randint(1, 7))]
        if self.often(40):
            rules.append(rule("socks pass", "0/0", "0/0", []))
        if self.often(12):
            rules += [self.route() for _ in range(self.random.randint(1, 3))]
        if self.often(6):
            rules.append(self.monitor())
        return "\n".join([*lines, *rules]) + "\n"

    def externals(self) -> list[str]:
        """Give the addresses to connect from, and sometimes the families of which they may be."""
        lines = ["external: 127.0.0.1"]
        if self.often(80):
            lines.append("external: fd00::6")
        if self.often(10):
            lines.insert(self.random.randint(0, len(lines)), "external: 127.0.0.2")
        if self.often(8):
            lines.insert(0, f"external.protocol: {self.random.choice(['ipv4', 'ipv6', 'ipv6 ipv4'])}")
        return lines

    def route(self) -> str:
        """Give a direct route, for some requests or for all."""
        target = self.random.choice([name for name in TARGETS if name != "lo"])  # danted hangs there
        source = self.random.choice([name for name in SOURCES if name != "lo"])  # which both refuse
        options = []
        if self.often(70):
            options.append(f"command: {' '.join(self.some(COMMANDS[:3]))}")
        lines = ["route {", f"from: {source} to: {target} via: direct", *options, "}"]
        return "\n".join(lines)

    def monitor(self) -> str:
        source, target = self.random.choice(SOURCES), self.random.choice(TARGETS)
        lines = ["monitor {", f"from: {source} to: {target}", "alarm.data: 1 in 60", "}"]
        return "\n".join(lines)

    def verdict(self) -> str:
        return "block" if self.often(35) else "pass"

    def port_clause(self, ports: tuple[int, ...]) -> str:
        if self.often(25):
            low, high = sorted((self.random.randrange(len(ports)), self.random.randrange(len(ports))))
            return f" port {ports[low]}-{ports[high]}"
        return f" port {self.random.choice(OPERATORS)} {self.random.choice(ports)}"

    def source(self) -> str:
        port = self.port_clause((600, 1024, 65535)) if self.often(15) else ""
        return self.random.choice(SOURCES) + port

    def client_rule(self) -> str:
        port = self.random.choice((" port ge 1024", " port lt 1024", " port != 1")) if self.often(10) else ""
        options = []
        if self.often(25):
            options.append(f"socksmethod: {' '.join(self.some(self.methods))}")
        if self.often(15):
            options.append(f"clientmethod: {' '.join(self.some(self.clientmethods))}")
        if self.often(8):
            options.append(self.random.choice(HARMLESS))
        return rule(f"client {self.verdict()}", self.source(), self.random.choice(SERVERS) + port, options)

    def socks_rule(self) -> str:
        target = self.random.choice(TARGETS)
        if self.often(30):
            target += self.port_clause(PORTS)
        options = []
        if self.often(35):
            options.append(f"command: {' '.join(self.some(COMMANDS))}")
        if self.often(12):
            options.append(f"protocol: {' '.join(self.some(['tcp', 'udp']))}")
        if self.often(12):
            options.append(f"proxyprotocol: {self.random.choice(['socks_v4', 'socks_v5'])}")
        if self.often(6):
            options.append(f"clientmethod: {' '.join(self.some(self.clientmethods))}")
        if self.often(6):
            options.append("udp.portrange: 20000-29999")
        if self.often(8):
            options.append(self.random.choice(HARMLESS))
        kind = self.verdict() if self.often(8) else f"socks {self.verdict()}"
        return rule(kind, self.source(), target, options + self.identity())

    def identity(self) -> list[str]:
        """Give what a rule asks of the client's identity."""
        methods = self.some(self.methods) if self.often(30) else []
        naming = [method for method in methods or self.methods if method in NAMING]
        options = []
        if naming and self.often(30):
            methods = naming if methods else []
            options.append(
                self.random.choice(["user: alice", "user: alice bob", "group: readers", "user: bob"])
            )
        return options + ([f"socksmethod: {' '.join(methods)}"] if methods else [])

    def attempt(self, index: int) -> Attempt:
        server = int(self.often(30))
        version = "http" if self.often(3) else self.random.choice(self.versions)
        command = self.random.choice(["connect"] * 4 + ["bind", "udpassociate"])
        target = self.random.choice(TARGET_HOSTS)
        if version in ("4", "4a"):
            command = "bind" if command == "bind" else "connect"
            target = target if is_ipv4(target) or (version == "4a" and not is_ipv6(target)) else "127.0.0.1"
            version = "4" if is_ipv4(target) or command == "bind" else "4a"
        offer = self.random.choice([(0,), (0, 2), (2, 0), (2,)]) if self.often(60) else (0, 2)
        family = self.random.randrange(2) if version == "5" else 0
        return Attempt(
            server,
            self.random.choice(CLIENT_HOSTS[server]),
            self.random.randrange(600 + index, 1024, CLIENTS) if self.often(10) else 0,  # nobody else's
            version,
            offer if version == "5" else (0,),
            USERS[self.random.choice([0, 0, 0, 1, 1, 2, 3])],
            command,
            target,
            self.random.choice([*PORTS, *PORTS, *PORTS, 9]),
            self.random.choice(CLIENT_HOSTS[family]),
            self.often(50),
        )


def is_ipv4(host: str) -> bool:
    return host[0].isdigit()


def is_ipv6(host: str) -> bool:
    return ":" in host


def rule(kind: str, source: str, target: str, options: list[str]) -> str:
    """Give the text of a rule that logs what it judges."""
    return "\n".join([f"{kind} {{", f"from: {source} to: {target}", *options, "log: connect ioop", "}"])


# ------------------------------ the targets ------------------------------


class Targets:
    """On three ports of every address: TCP that says "!", and UDP that sends everything back."""

    HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.5", "fd00::6")

    def __init__(self) -> None:
        self.streams = [self._listen(port) for port in PORTS]
        self.datagrams = [self._open(host, port) for host in self.HOSTS for port in PORTS]
        self.seen: set[bytes] = set()  # every payload that came by UDP
        self.reading, self.writing = os.pipe()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    @staticmethod
    def _listen(port: int) -> socket.socket:
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)

    @staticmethod
    def _open(host: str, port: int) -> socket.socket:
        opened = socket.socket(socket.AF_INET6 if is_ipv6(host) else socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind((host, port))
        return opened

    def _run(self) -> None:
        poller = select.epoll()
        sockets = {opened.fileno(): opened for opened in (*self.streams, *self.datagrams)}
        for descriptor in (*sockets, self.reading):
            poller.register(descriptor, select.EPOLLIN)
        while True:
            for descriptor, _ in poller.poll():
                if descriptor == self.reading:
                    poller.close()
                    return
                self._serve(sockets[descriptor])

    def _serve(self, opened: socket.socket) -> None:
        if opened.type == socket.SOCK_STREAM:
            connection, _ = opened.accept()
            with connection, contextlib.suppress(OSError):
                connection.send(b"!")
            return
        data, sender = opened.recvfrom(2048)
        self.seen.add(data)
        with contextlib.suppress(OSError):
            opened.sendto(data, sender)

    def close(self) -> None:
        """Give everything back."""
        os.write(self.writing, b".")
        self.thread.join()
        for opened in (*self.streams, *self.datagrams):
            opened.close()
        os.close(self.reading)
        os.close(self.writing)


# ------------------------------ one client ------------------------------


class Hung(Exception):
    """The server closed the connection where an answer was due."""


class Outcome(NamedTuple):
    """How a client fared: what it saw, and the rules that the log names."""

    seen: str
    rules: tuple[str, ...]


class Visit:
    """One client at one server."""

    def __init__(self, attempt: Attempt, address: tuple[str, int], targets: Targets, patience: float) -> None:
        self.attempt = attempt
        self.address = address
        self.targets = targets
        self.patience = patience
        self.seen: list[str] = []
        self.names: set[str] = set()  # of its sockets and those opened for it, as the log spells them
        self.opened: list[socket.socket] = []

    def open(self, kind: int, host: str, port: int = 0) -> socket.socket:
        """Give a socket bound to an address of this client's."""
        opened = socket.socket(socket.AF_INET6 if is_ipv6(host) else socket.AF_INET, kind)
        self.opened.append(opened)
        opened.settimeout(PATIENCE)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if kind == socket.SOCK_STREAM:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        opened.bind((host, port))
        return opened

    def name(self, address: tuple[str, int]) -> None:
        self.names.add(f"{address[0]}.{address[1]}")

    def run(self) -> None:
        """Go through the whole conversation; what came of it is in `seen` and `names`."""
        try:
            self.client = self.open(socket.SOCK_STREAM, self.attempt.source, self.attempt.source_port)
            self.client.connect(self.address)
            self.name(self.client.getsockname()[:2])
            self.talk()
        except ConnectionRefusedError:
            self.seen.append("nobody listens")
        except (Hung, ConnectionError):
            self.seen.append("closed")
        except TimeoutError:
            self.seen.append("no answer")
        finally:
            for opened in self.opened:
                opened.close()

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.client.recv(count - len(data))
            if not piece:
                raise Hung
            data += piece
        return data

    def talk(self) -> None:
        attempt = self.attempt
        if attempt.version == "http":
            self.client.sendall(f"CONNECT {attempt.target}:{attempt.port} HTTP/1.1\r\n\r\n".encode())
            self.seen.append(f"hears {self.read(1)!r}")
            return
        if attempt.version == "5" and not self.greet():
            return
        if attempt.command == "udpassociate":
            self.associate()
        elif attempt.command == "bind":
            self.bind()
        elif self.ask(attempt.target, attempt.port):
            self.seen.append(f"target says {self.client.recv(1)!r}")

    def greet(self) -> bool:
        """Negotiate a method and log in."""
        self.client.sendall(greeting(self.attempt.methods))
        method = self.read(2)[1]
        self.seen.append(f"method {method}")
        if method == 2:
            self.client.sendall(password_message(*self.attempt.user))
            status = self.read(2)[1]
            self.seen.append(f"status {bool(status)}")
            return status == 0
        return method == 0

    def ask(self, host: str, port: int) -> bool:
        """Send the request and read the reply; its address is kept in `bound`."""
        command = {"connect": 1, "bind": 2, "udpassociate": 3}[self.attempt.command]
        if self.attempt.version == "5":
            self.client.sendall(request5(command, host, port))
        else:
            self.client.sendall(request4(command, host, port, b"user"))
        return self.read_reply()

    def read_reply(self) -> bool:
        if self.attempt.version != "5":
            reply = self.read(8)
            self.bound = socket.inet_ntoa(reply[4:]), int.from_bytes(reply[2:4], "big")
            self.seen.append(f"reply {reply[1] == 90}")
            return reply[1] == 90
        head = self.read(4)
        rest = self.read(1) if head[3] == 3 else b""
        rest += self.read({1: 4, 4: 16}.get(head[3], rest[0] if rest else 0) + 2)
        _, host, port, _ = unpack_address(head[3:] + rest)
        self.bound = host, port
        self.seen.append(f"reply {head[1]}")
        return head[1] == 0

    def bind(self) -> None:
        peer = self.attempt.peer
        anybody = "::" if is_ipv6(peer) else "0.0.0.0"
        if not self.ask(peer if self.attempt.names_itself else anybody, 0):
            return
        self.name(self.bound)
        visitor = self.open(socket.SOCK_STREAM, peer)
        visitor.connect(self.bound)
        ready, _, _ = select.select([self.client, visitor], [], [], PATIENCE)
        # As in DIFFERENCES: danted ends a BIND whose peer no rule lets in, sockd only the peer.
        if self.client not in ready:
            self.seen.append("peer refused")
            return
        if not self.read_reply():
            self.seen[-1] = "peer refused"
            return
        visitor.send(b"!")
        self.seen.append(f"peer says {self.client.recv(1)!r}")

    def associate(self) -> None:
        udp = self.open(socket.SOCK_DGRAM, self.attempt.source)
        self.name(udp.getsockname()[:2])
        anybody = ("::" if is_ipv6(self.attempt.source) else "0.0.0.0", 0)
        if not self.ask(*(udp.getsockname()[:2] if self.attempt.names_itself else anybody)):
            return
        self.name(self.bound)
        payload = f"{self.address[1]} {udp.getsockname()[:2]} {os.urandom(4).hex()}".encode()
        udp.sendto(wrap(self.attempt.target, self.attempt.port, payload), self.bound)
        udp.settimeout(self.patience)
        try:
            answer = udp.recv(2048)
            self.seen.append("answered" if answer.endswith(payload) else "wrong answer")
        except TimeoutError:
            self.seen.append("reached" if payload in self.targets.seen else "lost")


# ------------------------------ one configuration ------------------------------

LINE = re.compile(r"(pass|block)\((\d+)\): (tcp|udp)/(\w+) ([\[\]-]): (.*)")


def find_rules(visit: Visit, messages: list[str]) -> tuple[str, ...]:
    """Give the rules that were used for a client, as the log names them.

    The built-in last rule is left out, as danted does not log it, and so is what follows at accept
    level from a verdict on the request.
    """
    found = set()
    for message in messages:
        line = LINE.match(message)
        if not line or line[2] == "0" or not visit.names.intersection(line[6].replace("@", " ").split()):
            continue
        verdict, number, _, event, bracket, rest = line.groups()
        above = re.search(r"blocked by higher-level socks-rule #([1-9]\d*)", rest)
        if above:
            # danted names no client in the record of an association that it refuses.
            found.add(f"block({above[1]}): {visit.attempt.command}")
        if event == "accept" and visit.seen != ["closed"]:
            verdict = "pass"  # the record of the end tells the verdict on the request
        if event == "accept" or bracket != "]" or verdict == "block":
            found.add(f"{verdict}({number}): {event}")
    # What became of the peer is in the record of the bind's end as well.
    ends = {entry.replace("pass", "block") for entry in found if entry.startswith("pass")}
    return tuple(sorted(found - ends))


def visit_all(
    attempts: tuple[Attempt, ...], server: Server, targets: Targets, patience: float
) -> list[Visit]:
    """Send the clients to a server, side by side."""
    hosts = {0: "127.0.0.1", 1: "fd00::6"}
    addresses = dict(server.addresses)
    visits = [
        Visit(attempt, (hosts[attempt.server], addresses[hosts[attempt.server]]), targets, patience)
        for attempt in attempts
    ]
    with ThreadPoolExecutor(len(visits)) as pool:
        list(pool.map(Visit.run, visits))
    return visits


class Pipeline:
    """Tries one case after the other: a new danted for each, and one sockd that is reloaded."""

    def __init__(self, folder: Path, world: World, targets: Targets) -> None:
        self.folder = folder
        self.world = world
        self.targets = targets
        self.sockd: Sockd | None = None
        self.config = ""  # that of sockd

    def try_case(self, case: Case) -> list[str]:
        """Give the differences between the two servers."""
        config, complaints = parse_config(case.config, "sockd.conf", SystemSurroundings())
        try:
            if config is not None:
                return self.try_attempts(case)
            Danted(case.config, self.folder / f"refused{case.number}", (), self.world).stop()
        except DidNotStart as failure:
            # Both refuse it, which is a verdict, too.
            return [] if config is None else [f"case {case.number}\n{case.config}danted only: {failure}"]
        return [f"case {case.number}\n{case.config}sockd only: {complaints}"]

    def try_attempts(self, case: Case) -> list[str]:
        differences = self.compare(case, case.attempts, SOON)
        if not differences:
            return []
        again = self.compare(case, tuple(attempt for attempt, _ in differences), LATE)
        return [text for _, text in again]

    def compare(
        self, case: Case, attempts: tuple[Attempt, ...], patience: float
    ) -> list[tuple[Attempt, str]]:
        theirs = self.ask_danted(case, attempts, patience)
        ours = self.ask_sockd(case, attempts, theirs, patience)
        return [
            (attempt, describe(case, attempt, one, other))
            for attempt, one, other in zip(attempts, theirs, ours, strict=True)
            if one != other and not is_on_purpose(case, attempt, one, other)
        ]

    def ask_danted(self, case: Case, attempts: tuple[Attempt, ...], patience: float) -> list[Outcome]:
        asked = tuple(a._replace(version="5") if a.version == "4a" else a for a in attempts)
        folder = self.folder / f"danted{case.number}-{patience}"
        server = Danted(case.config, folder, (), self.world)
        try:
            visits = visit_all(asked, server, self.targets, patience)
        finally:
            server.stop()
        outcomes = find_outcomes(visits, server)
        return [tell_in_4(o) if a.version == "4a" else o for a, o in zip(attempts, outcomes, strict=True)]

    def ask_sockd(
        self, case: Case, attempts: tuple[Attempt, ...], theirs: list[Outcome], patience: float
    ) -> list[Outcome]:
        server = self.reload("login.penalty: no\n" + case.config)
        visits = visit_all(attempts, server, self.targets, patience)
        # A session may write a record after the client has had its answer.
        with contextlib.suppress(AssertionError):
            eventually(lambda: find_outcomes(visits, server) == theirs, patience)
        return find_outcomes(visits, server)

    def reload(self, config: str) -> Sockd:
        """Give a server with this configuration and an empty log."""
        if self.sockd is None:
            self.config = config
            self.sockd = Sockd(config, self.folder / "sockd", (), self.world)
            return self.sockd
        os.truncate(self.sockd.log_path, 0)
        if config == self.config:
            return self.sockd
        self.config = config
        old = self.children(self.sockd)
        self.sockd.reload(config)
        # Until the old worker has gone it may take a client.
        eventually(lambda: not old & self.children(self.sockd))
        return self.sockd

    @staticmethod
    def children(server: Sockd) -> set[str]:
        return set(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split())

    def close(self) -> None:
        if self.sockd is not None:
            self.sockd.take_baseline()  # after hundreds of reloads, each rightly with sockets of its own
            self.sockd.close()


def find_outcomes(visits: list[Visit], server: Server) -> list[Outcome]:
    messages = [record.message for record in server.log]
    return [Outcome(", ".join(visit.seen), find_rules(visit, messages)) for visit in visits]


def tell_in_4(outcome: Outcome) -> Outcome:
    """Give how a client that offered no authentication in SOCKS 5 would have fared in SOCKS 4A."""
    seen = outcome.seen.removeprefix("method 0, ")
    seen = re.sub(r"method 255.*|reply [1-9]", "reply False", seen.replace("reply 0", "reply True"))
    return outcome._replace(seen=seen)


# ------------------------------ differences on purpose ------------------------------


def find_client_methods(case: Case, outcome: Outcome) -> str:
    """Give the socksmethod list of the client-rule that took a client."""
    numbers = [re.match(r"pass\((\d+)\): accept", entry) for entry in outcome.rules]
    number = next(int(found[1]) for found in numbers if found)
    rules = re.findall(r"client (?:pass|block) \{\n(.*?)\n\}", case.config, re.DOTALL)
    listed = re.search(r"socksmethod: (.*)", rules[number - 1]) or re.search(
        r"socksmethod: (.*)", case.config
    )
    return listed[1] if listed else ""


def needs_authentication(case: Case, attempt: Attempt, theirs: Outcome, ours: Outcome) -> bool:
    """CVE-2024-54662: SOCKS 4 has no authentication, so a client-rule that wants some refuses it."""
    refused = attempt.version == "4" and ours.seen == "reply False"
    return refused and not {"none", "rfc931"}.intersection(find_client_methods(case, ours).split())


def has_both_families(case: Case, attempt: Attempt, theirs: Outcome, ours: Outcome) -> bool:
    """Where a rule picks the second family of a name, danted binds the wrong one and sends no datagram."""
    is_it = attempt.command == "udpassociate" and attempt.target in ("both.test", "mixed.test")
    return is_it and theirs.seen.endswith("lost") and set(theirs.rules) <= set(ours.rules)


def tries_every_address(case: Case, attempt: Attempt, theirs: Outcome, ours: Outcome) -> bool:
    """danted has no external address for the first family of a name, and does not try the other.

    Where the first family has one, what the client hears is what became of the last address.
    """
    is_it = attempt.target in ("both.test", "mixed.test") and attempt.command == "connect"
    last = "same-same" in case.config and ours.seen.endswith(("reply 3", "reply False"))
    return is_it and (last or theirs.seen.endswith(("reply 3", "reply False")))


def judges_the_name(case: Case, attempt: Attempt, theirs: Outcome, ours: Outcome) -> bool:
    """A route is asked about the name that was sent; danted's, once a rule has compared it, an address."""
    is_it = "\nroute {" in case.config and not is_ipv4(attempt.target) and not is_ipv6(attempt.target)
    return is_it and theirs.seen.endswith(("reply 3", "reply False"))


def keeps_to_the_route(case: Case, attempt: Attempt, theirs: Outcome, ours: Outcome) -> bool:
    """A route for one family of a name leads to that family; danted's leads to the other as well."""
    is_it = "\nroute {" in case.config and attempt.target in ("both.test", "mixed.test")
    return is_it and ours.seen.endswith(("reply 3", "reply False"))


def may_find_a_route(case: Case, attempt: Attempt, theirs: Outcome, ours: Outcome) -> bool:
    """Each datagram looks for its route; danted wants one for every target, once, when UDP is asked for."""
    is_it = "\nroute {" in case.config and attempt.command == "udpassociate"
    return is_it and (theirs.seen.endswith("reply 3") or ours.seen.endswith("reply 0, lost"))


DIFFERENCES = (
    needs_authentication,
    has_both_families,
    tries_every_address,
    judges_the_name,
    keeps_to_the_route,
    may_find_a_route,
)


def is_on_purpose(case: Case, attempt: Attempt, theirs: Outcome, ours: Outcome) -> bool:
    return any(difference(case, attempt, theirs, ours) for difference in DIFFERENCES)


def describe(case: Case, attempt: Attempt, theirs: Outcome, ours: Outcome) -> str:
    rules = case.config.replace("\nlog: connect ioop\n", " ").replace("{\n", "{ ")
    return f"case {case.number} of seed {SEED}\n{rules}{attempt}\ndanted {theirs}\nsockd  {ours}\n"


@pytest.fixture(scope="module")
def pipelines(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Pipeline]]:
    """Give the pipelines, ready to try cases."""
    need_danted()
    targets = Targets()
    lines = [Pipeline(tmp_path_factory.mktemp("pipeline"), private_world, targets) for _ in range(PIPELINES)]
    yield lines
    for line in lines:
        line.close()
    targets.close()


def connect(source: str) -> Attempt:
    """Give a client that connects to a target of its own address."""
    return Attempt(0, source, 0, "5", (0,), USERS[0], "connect", "127.0.0.1", PORTS[0], source, False)


def associate(source: str, port: int, **more: Any) -> Attempt:
    """Give a client that asks for an association and says from which UDP port it will send."""
    usual = Attempt(0, source, port, "5", (0,), USERS[0], "udpassociate", "127.0.0.1", PORTS[0], source, True)
    return usual._replace(**more)


IPV4_ONLY = """\
internal: 127.0.0.1 port = 0
internal: fd00::6 port = 0
external: 127.0.0.1
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0
log: connect
}
"""
BOTH = IPV4_ONLY.replace("socksmethod", "external: fd00::6\nsocksmethod")
BLOCK_IPV4 = rule("socks block", "0/0", "0.0.0.0/0", []) + "\n"
BLOCK_IPV6 = rule("socks block", "0/0", "::/0", []) + "\n"
PASS_LOW_PORTS = rule("socks pass", "0/0 port lt 1024", "0/0", []) + "\n"
PASS_ALL = rule("socks pass", "0/0", "0/0", []) + "\n"
# What random configurations have found, reduced.
FOUND = {
    "all of the only family is every target": (IPV4_ONLY + BLOCK_IPV4 + PASS_ALL, associate("127.0.0.5", 0)),
    "the other family is not every target": (IPV4_ONLY + BLOCK_IPV6 + PASS_ALL, associate("127.0.0.5", 0)),
    "one of two families is not every target": (BOTH + BLOCK_IPV4 + PASS_ALL, associate("127.0.0.5", 0)),
    "the UDP port that a client names is judged": (IPV4_ONLY + PASS_LOW_PORTS, associate("127.0.0.5", 700)),
    "a route to a name where names have no addresses": (
        "resolveprotocol: fake\n" + IPV4_ONLY + PASS_ALL + "route { from: 0/0 to: echo.test via: direct }\n",
        connect("127.0.0.5"),
    ),
    "a route to addresses where names have no addresses": (
        "resolveprotocol: fake\n" + IPV4_ONLY + PASS_ALL + "route { from: 0/0 to: 0.0.0.0/0 via: direct }\n",
        connect("127.0.0.5")._replace(target="echo.test"),
    ),
    "a route to a name": (
        IPV4_ONLY + PASS_ALL + "route { from: 0/0 to: echo.test via: direct }\n",
        connect("127.0.0.5"),
    ),
    "a client without a name": (IPV4_ONLY + PASS_ALL, connect("127.0.0.9")),
    "a client without a name where all need one": (
        "srchost: nodnsunknown\n" + IPV4_ONLY + PASS_ALL,
        connect("127.0.0.9"),
    ),
    "a BIND's peer without a name where all need one": (
        "srchost: nodnsunknown\n" + IPV4_ONLY + PASS_ALL,
        connect("127.0.0.5")._replace(command="bind", peer="127.0.0.9"),
    ),
    "a client with a name where names have no addresses": (
        "srchost: nodnsmismatch\nresolveprotocol: fake\n" + IPV4_ONLY + PASS_ALL,
        connect("127.0.0.5"),
    ),
    "the TCP port is judged without it": (
        IPV4_ONLY + PASS_LOW_PORTS,
        associate("127.0.0.5", 700, names_itself=False),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_configuration_found_gives_the_same_verdict(name: str, pipelines: list[Pipeline]) -> None:
    config, attempt = FOUND[name]
    number = -1 - list(FOUND).index(name)
    assert pipelines[0].try_case(Case(number, config, (attempt,))) == []


def test_random_configurations_give_the_same_verdicts(pipelines: list[Pipeline]) -> None:
    cases = iter([Generator(f"{SEED}/{number}").make(number) for number in range(FIRST, FIRST + COUNT)])
    lock = threading.Lock()
    differences: list[str] = []

    def work(line: Pipeline) -> None:
        while True:
            with lock:
                case = next(cases, None)
            if case is None:
                return
            differences.extend(line.try_case(case))

    with ThreadPoolExecutor(PIPELINES) as pool:
        for done in [pool.submit(work, line) for line in pipelines]:
            done.result()
    assert not differences, f"{len(differences)} clients fared differently:\n" + "\n".join(differences)
