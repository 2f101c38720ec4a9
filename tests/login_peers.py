"""What tests of log-ins need: accounts with every kind of hash, PAM services, and an ident server."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from client import whole_address
from peers import RESET
from servers import World, need

# ------------------------------ accounts ------------------------------

LONG_USER, LONG_PASSWORD = "u" * 255, "p" * 255
SETTINGS = {
    "yescrypt": "$y$j9T$sockdtestsockdte",
    "sha512": "$6$rounds=1000$sockdtest",
    "sha256": "$5$rounds=1000$sockdtest",
    "bcrypt": "$2b$04$sockdtestsockdtestsockdu",
    "md5": "$1$sockdtst",
    "des": "so",
}
AGEING = "19000:0:99999:7:::"


def crypt(password: str, setting: str) -> str:
    """Give the hash of a password that the system's libcrypt makes."""
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    made: bytes = library.crypt(password.encode("latin-1"), setting.encode())
    assert made and made[:1] != b"*", f"libcrypt does not know {setting}"
    return made.decode()


def shadow_lines() -> list[str]:
    """Give the shadow file's lines of the users that tests log in as; `NAME-pw` is NAME's password."""
    sha = SETTINGS["sha512"]
    lines = [f"{kind}:{crypt(f'{kind}-pw', setting)}:{AGEING}" for kind, setting in SETTINGS.items()]
    return [
        *lines,
        f"locked:!{crypt('locked-pw', sha)}:{AGEING}",
        f"starred:*{crypt('starred-pw', sha)}:{AGEING}",
        f"star:*:{AGEING}",
        f"empty::{AGEING}",
        f"broken:$6$:{AGEING}",
        f"alien:$zz$alien$alien:{AGEING}",
        f"expired:{crypt('expired-pw', sha)}:19000:0:99999:7::19001:",
        f"inactive:{crypt('inactive-pw', sha)}:10000:0:30:7:5::",
        f"mustchange:{crypt('mustchange-pw', sha)}:0:0:99999:7:::",
        f"twice:{crypt('twice-pw', sha)}:{AGEING}",
        f"twice:{crypt('second-pw', sha)}:{AGEING}",
        f"shadowonly:{crypt('shadowonly-pw', sha)}:{AGEING}",
        f"with space:{crypt('with space-pw', sha)}:{AGEING}",
        f"umläut:{crypt('umläut-pw', sha)}:{AGEING}",
        f"{LONG_USER}:{crypt(LONG_PASSWORD, sha)}:{AGEING}",
    ]


def add_accounts(world: World, folder: Path) -> World:
    """Give a world with those users.  `passwdonly` has its hash in /etc/passwd and no shadow line."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    shadow = shadow_lines()
    names = list(dict.fromkeys(line.partition(":")[0] for line in shadow))
    names.remove("shadowonly")
    passwd = [f"{name}:x:{4200 + n}:4200::/nonexistent:/bin/false" for n, name in enumerate(names)]
    hashed = crypt("passwdonly-pw", SETTINGS["sha512"])
    passwd.append(f"passwdonly:{hashed}:4300:4300::/nonexistent:/bin/false")
    files = dict(world.files)
    for etc, lines in (("/etc/passwd", passwd), ("/etc/shadow", shadow)):
        ours = folder / Path(etc).name
        text = world.files[etc].read_bytes() + "".join(f"{line}\n" for line in lines).encode("latin-1")
        ours.write_bytes(text)
        files[etc] = ours
    return dataclasses.replace(world, files=files)


# ------------------------------ PAM ------------------------------


def find_module(name: str) -> bool:
    """Tell whether the system has a PAM module."""
    places = ("lib/security", "lib/*/security", "lib64/security", "usr/lib/security", "usr/lib/*/security")
    return any(any(Path("/").glob(f"{place}/{name}")) for place in places)


def need_pam() -> None:
    """Skip where the modules, or the package by which the server asks PAM, are missing."""
    need(find_module("pam_succeed_if.so"), "libpam-modules is missing")
    need(find_module("pam_pwdfile.so"), "libpam-pwdfile is missing")
    need(importlib.util.find_spec("pam"), "python-pam is missing")


TOLD_HOST = "127.3.2.1"
TOLD = f"rhost = {TOLD_HOST} ruser = rhostusr tty !~ ?*"


def write_pam_services(world: World, folder: Path, by_host: str = "") -> World:
    """Give a world with these services in /etc/pam.d; `by_host` is pam_access's table.

    pam_pwdfile knows paula, and nobody else does.  `told` lets in whom it was told of as Dante does:
    TOLD_HOST, as remote user rhostusr and without a terminal; `told-no-user`, as user rhostusr, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    services, table = folder / "pam.d", folder / "access.conf"
    services.mkdir()
    table.write_text(by_host)
    (folder / "pwdfile").write_text(f"paula:{crypt('paula-pw', SETTINGS['sha512'])}\n")
    permit = "account required pam_permit.so"
    texts = {
        "sockd": ["auth required pam_unix.so nodelay", "account required pam_unix.so"],
        "slow": [
            "auth optional pam_faildelay.so delay=4000000",
            "auth required pam_unix.so",
            "account required pam_unix.so",
        ],
        "other": ["auth required pam_deny.so", "account required pam_deny.so"],
        "permit": ["auth required pam_permit.so", permit],
        "deny": ["auth required pam_deny.so", permit],
        "noaccount": ["auth required pam_permit.so", "account required pam_deny.so"],
        "pwdfile": [f"auth required pam_pwdfile.so pwdfile={folder}/pwdfile nodelay", permit],
        "byhost": [
            "auth required pam_permit.so",
            f"account required pam_access.so nodefgroup accessfile={table}",
        ],
        "byruser": ["auth required pam_succeed_if.so quiet ruser = rhostusr", permit],
        "told": [f"{kind} required pam_succeed_if.so quiet {TOLD}" for kind in ("auth", "account")],
        "told-no-user": [
            f"{kind} required pam_succeed_if.so quiet {TOLD} user = rhostusr" for kind in ("auth", "account")
        ],
        "seen": [f"auth required pam_exec.so quiet {folder}/see", permit],
        "broken": ["auth required pam_no_such_module.so", permit],
    }
    for service, lines in texts.items():
        (services / service).write_text("".join(f"{line}\n" for line in lines))
    return dataclasses.replace(world, files={**world.files, "/etc/pam.d": services})


# ------------------------------ ident ------------------------------

Answer = Callable[[socket.socket, bytes], None]
IDENT_PORT = 113


def say(text: str) -> Answer:
    """Answer with a text in which {0} is the query, {1} and {2} its ports, and close."""

    def answer(connection: socket.socket, query: bytes) -> None:
        ports = query.decode().strip().split(",")
        connection.sendall(text.format(query.decode().strip(), *ports).encode("latin-1"))

    return answer


def user(name: str) -> Answer:
    """Answer as RFC 1413 has it."""
    return say(f"{{0}} : USERID : UNIX : {name}\r\n")


def hang_up(connection: socket.socket, query: bytes) -> None:
    """Close without an answer."""


def reset_connection(connection: socket.socket, query: bytes) -> None:
    """Reset instead of an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def never_end(connection: socket.socket, query: bytes) -> None:
    """Answer with a line without an end."""
    connection.sendall(query.strip() + b" : USERID : UNIX : ")
    while True:
        connection.sendall(b"a" * 4096)


def drip(connection: socket.socket, query: bytes) -> None:
    """Answer with a byte at a time, for ever, too slowly to be a user and too fast for a time-out."""
    while True:
        connection.sendall(b" ")
        time.sleep(0.5)


def say_nothing(connection: socket.socket, query: bytes) -> None:
    """Keep the connection and say nothing until the other end leaves."""
    gone = select.poll()
    gone.register(connection, select.POLLIN | select.POLLRDHUP)
    gone.poll()


def in_pieces(name: str) -> Answer:
    """Answer as RFC 1413 has it, in a segment for each byte."""

    def answer(connection: socket.socket, query: bytes) -> None:
        for byte in query.strip() + f" : USERID : UNIX : {name}\r\n".encode():
            connection.sendall(bytes([byte]))

    return answer


class Identd:
    """Ident servers, on an address for each behaviour; needs root, for port 113, and a private network."""

    def __init__(self, behaviours: dict[str, Answer]) -> None:
        self.asked: Counter[str] = Counter()
        self.queries: list[tuple[str, bytes]] = []  # (address of the one who asked, the query)
        self._behaviours = {host.partition("%")[0]: behaviour for host, behaviour in behaviours.items()}
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listeners = [self._listen(host) for host in behaviours]
        for listener in self._listeners:
            self._start(self._accept, listener)

    def _listen(self, host: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server(whole_address(host, IDENT_PORT), family=family)

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, remote = listener.accept()
            except OSError:  # close() shut the listener down
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.append(connection)
            self._start(self._serve, connection, remote[0])

    def _serve(self, connection: socket.socket, remote: str) -> None:
        host = connection.getsockname()[0]
        with connection, contextlib.suppress(OSError):
            query = b""
            while not query.endswith(b"\n"):
                piece = connection.recv(100)
                if not piece:
                    return
                query += piece
            self.asked[host] += 1
            self.queries.append((remote, query))
            self._behaviours[host](connection, query)

    def close(self) -> None:
        """Close everything and wait for the threads."""
        for opened in (*self._listeners, *self._sockets):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for listener in self._listeners:
            listener.close()
