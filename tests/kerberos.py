"""A Kerberos realm of the tests' own: MIT's KDC on loopback, key tables, and both ends of a context.

Initiator and acceptor use MIT's library through ctypes.  They share no code with sockd.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from client import Address, Client
from servers import WITHIN, eventually, find_free_port, need

REALM = "SOCKD.TEST"
SERVICE = "rcmd/localhost"
TOKEN, LEVEL, DATA = 1, 2, 3
CLEAR, INTEGRITY, CONFIDENTIALITY, PER_MESSAGE = 0, 1, 2, 3
PASSWORDS = {"alice": "wonderland", "bob": "builder"}

KRB5_CONF = """\
[libdefaults]
    default_realm = {realm}
    dns_lookup_kdc = false
    dns_lookup_realm = false
    rdns = false
    dns_canonicalize_hostname = false
    qualify_shortname = ""
[realms]
    {realm} = {{
        kdc = 127.0.0.1:{port}
    }}
"""
KDC_CONF = """\
[kdcdefaults]
    kdc_listen = 127.0.0.1:{port}
    kdc_tcp_listen = 127.0.0.1:{port}
[realms]
    {realm} = {{
        database_name = {folder}/principal
        key_stash_file = {folder}/stash
        acl_file = {folder}/acl
        supported_enctypes = aes256-cts-hmac-sha1-96:normal
    }}
[logging]
    kdc = FILE:{folder}/kdc.log
"""


class Realm:
    """A running KDC with its users and a service."""

    def __init__(self, folder: Path) -> None:
        for tool in ("krb5kdc", "kdb5_util", "kadmin.local", "kinit"):
            need(self.find(tool), f"{tool} is missing (Debian: krb5-kdc, krb5-admin-server, krb5-user)")
        folder.chmod(0o755)
        self.folder = folder
        self.keytab = folder / "keytab"
        self.port = find_free_port()
        (folder / "replays").mkdir(mode=0o777)
        (folder / "replays").chmod(0o777)
        self.env = {
            **os.environ,
            "KRB5_CONFIG": f"{folder}/krb5.conf",
            "KRB5_KDC_PROFILE": f"{folder}/kdc.conf",
            "KRB5RCACHENAME": f"file2:{folder}/replays/cache",
        }
        values = {"realm": REALM, "port": self.port, "folder": folder}
        (folder / "krb5.conf").write_text(KRB5_CONF.format(**values))
        (folder / "kdc.conf").write_text(KDC_CONF.format(**values))
        self.run("kdb5_util", "create", "-s", "-r", REALM, "-P", "master")
        for user, password in PASSWORDS.items():
            self.admin(f"addprinc -pw {password} {user}")
        self.add_service(SERVICE, self.keytab)
        self.keytab.chmod(0o600)
        self.kdc = subprocess.Popen([self.find("krb5kdc"), "-n"], env=self.env, stderr=subprocess.DEVNULL)
        try:
            eventually(self.answers)
        except AssertionError:
            self.close()
            raise

    @staticmethod
    def find(tool: str) -> str:
        return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""

    def run(self, tool: str, *arguments: str, text: str = "") -> str:
        """Run a tool of Kerberos in this realm and give its output."""
        command = [self.find(tool), *arguments]
        done = subprocess.run(command, env=self.env, input=text, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def admin(self, query: str) -> None:
        self.run("kadmin.local", "-r", REALM, "-q", query)

    def add_service(self, name: str, keytab: Path) -> None:
        """Make a principal for a service and put its key into a table."""
        self.admin(f"addprinc -randkey {name}")
        self.admin(f"ktadd -k {keytab} {name}")

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), WITHIN).close()
            return True
        return False

    def log_in(self, user: str) -> Path:
        """Get a ticket for a user, and for the service; give the cache that both are in."""
        cache = self.folder / f"cache-{user}"
        self.run("kinit", "-c", str(cache), user, text=PASSWORDS[user] + "\n")
        return cache

    def close(self) -> None:
        """End the KDC."""
        self.kdc.terminate()
        self.kdc.wait(WITHIN)


# ------------------------------ the initiator ------------------------------


class Buffer(ctypes.Structure):
    """gss_buffer_desc."""

    _fields_ = (("length", ctypes.c_size_t), ("value", ctypes.c_void_p))


class Oid(ctypes.Structure):
    """gss_OID_desc."""

    _fields_ = (("length", ctypes.c_uint32), ("elements", ctypes.c_char_p))


KERBEROS = Oid(9, b"\x2a\x86\x48\x86\xf7\x12\x01\x02\x02")
MUTUAL, REPLAY, SEQUENCE, CONFIDENTIAL, SIGNED = 2, 4, 8, 16, 32
P, U32, INT = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int


def library() -> ctypes.CDLL:
    """Load MIT's library."""
    loaded = ctypes.CDLL("libgssapi_krb5.so.2")
    for name, arguments in {
        "gss_import_name": (P, P, P, P),
        "gss_init_sec_context": (P, P, P, P, P, U32, U32, P, P, P, P, P, P),
        "gss_accept_sec_context": (P, P, P, P, P, P, P, P, P, P, P),
        "gss_wrap": (P, P, INT, U32, P, P, P),
        "gss_unwrap": (P, P, P, P, P, P),
        "gss_release_buffer": (P, P),
        "gss_delete_sec_context": (P, P, P),
        "gss_release_name": (P, P),
    }.items():
        getattr(loaded, name).argtypes = arguments
        getattr(loaded, name).restype = U32
    return loaded


class Initiator:
    """The client's half of a GSS-API context; a context manager that frees it."""

    def __init__(
        self, realm: Realm, user: str, flags: int = MUTUAL | REPLAY | SEQUENCE | CONFIDENTIAL | SIGNED
    ) -> None:
        # The library reads these from the C environment, which Python's os.environ writes.
        os.environ["KRB5_CONFIG"] = realm.env["KRB5_CONFIG"]
        os.environ["KRB5CCNAME"] = str(realm.folder / f"cache-{user}")
        self.gss = library()
        self.minor = U32()
        self.context, self.name = P(), P()
        self.flags = flags
        principal = f"{SERVICE}@{REALM}".encode()
        self.check(
            self.gss.gss_import_name(self.at(self.minor), self.give(principal), None, self.at(self.name))
        )

    def __enter__(self) -> Initiator:
        return self

    def __exit__(self, *_: object) -> None:
        self.gss.gss_delete_sec_context(self.at(self.minor), self.at(self.context), None)
        self.gss.gss_release_name(self.at(self.minor), self.at(self.name))

    @staticmethod
    def at(thing: ctypes._CData) -> object:
        return ctypes.cast(ctypes.pointer(thing), P)

    def give(self, data: bytes) -> object:
        self.kept = ctypes.create_string_buffer(data, len(data))
        self.buffer = Buffer(len(data), ctypes.cast(self.kept, P))
        return self.at(self.buffer)

    def check(self, major: int) -> int:
        assert not major & 0xFFFF0000, f"GSS-API: {major:#x}, {self.minor.value}"
        return major

    def take(self, buffer: Buffer) -> bytes:
        data = ctypes.string_at(buffer.value, buffer.length) if buffer.value else b""
        self.gss.gss_release_buffer(self.at(self.minor), self.at(buffer))
        return data

    def step(self, token: bytes = b"") -> bytes:
        """Take the server's token, none at first, and give the next of ours."""
        output = Buffer()
        major = self.gss.gss_init_sec_context(
            self.at(self.minor), None, self.at(self.context), self.name, self.at(KERBEROS), self.flags, 0,
            None, self.give(token) if token else None, None, self.at(output), None, None,
        )  # fmt: skip
        self.check(major)
        return self.take(output)

    def wrap(self, data: bytes, confidential: bool = False) -> bytes:
        output, state = Buffer(), INT()
        self.check(
            self.gss.gss_wrap(
                self.at(self.minor),
                self.context,
                int(confidential),
                0,
                self.give(data),
                self.at(state),
                self.at(output),
            )
        )
        return self.take(output)

    def unwrap(self, token: bytes) -> tuple[bytes, bool]:
        """Give the data of a token, and whether it was encrypted; its order has to be right."""
        output, state = Buffer(), INT()
        news = self.check(
            self.gss.gss_unwrap(
                self.at(self.minor), self.context, self.give(token), self.at(output), self.at(state), None
            )
        )
        assert news & ~16 == 0, f"order: {news:#x}"  # a gap is what datagrams leave
        return self.take(output), bool(state.value)


class Acceptor(Initiator):
    """The server's half of a GSS-API context, by the key of SERVICE."""

    def __init__(self, realm: Realm) -> None:
        super().__init__(realm, "nobody")
        os.environ["KRB5_KTNAME"] = str(realm.keytab)

    def accept(self, token: bytes) -> bytes:
        """Take the client's token and give ours; the servers' replay cache is left alone, as we are root."""
        output = Buffer()
        before = os.environ["KRB5RCACHENAME"]
        os.environ["KRB5RCACHENAME"] = "none:"
        try:
            major = self.gss.gss_accept_sec_context(
                self.at(self.minor), self.at(self.context), None, self.give(token), None, None, None,
                self.at(output), None, None, None,
            )  # fmt: skip
        finally:
            os.environ["KRB5RCACHENAME"] = before
        self.check(major)
        return self.take(output)


def message(kind: int, token: bytes) -> bytes:
    """Build a message of RFC 1961."""
    return struct.pack("!BBH", 1, kind, len(token)) + token


class GssClient(Client):
    """A SOCKS client whose messages are protected, once `log_in` has returned."""

    def __init__(
        self, server: Address, realm: Realm, user: str = "alice", level: int = CONFIDENTIALITY
    ) -> None:
        super().__init__(server)
        self.initiator = Initiator(realm, user)
        self.level = 0
        self.wish = level
        self.opened = b""

    def close(self) -> None:
        """Close the connection and free the context."""
        super().close()
        self.initiator.__exit__()

    def send_raw(self, data: bytes) -> None:
        """Send what the protection is not to touch."""
        for piece in self.feed(data):
            self.sock.sendall(piece)

    def send(self, data: bytes) -> None:
        """Send, protected."""
        if self.level:
            self.send_raw(self.seal(data))
        else:
            self.send_raw(data)

    def seal(self, data: bytes, size: int = 16384) -> bytes:
        """Put data into messages."""
        pieces = [data[n : n + size] for n in range(0, len(data), size)] or [b""]
        return b"".join(message(DATA, self.initiator.wrap(piece, self.level > 1)) for piece in pieces)

    def receive_raw(self, count: int) -> bytes:
        return super().receive(count)

    def read_message(self, kind: int) -> bytes:
        """Read one message of this kind and give its token."""
        version, found, length = struct.unpack("!BBH", self.receive_raw(4))
        assert (version, found) == (1, kind)
        return self.receive_raw(length)

    def receive(self, count: int) -> bytes:
        """Receive exactly this many bytes; what is behind them in their message is kept."""
        if not self.level:
            return self.receive_raw(count)
        while len(self.opened) < count:
            data, encrypted = self.initiator.unwrap(self.read_message(DATA))
            assert encrypted == (self.level > 1)
            self.opened += data
        data, self.opened = self.opened[:count], self.opened[count:]
        return data

    def authenticate_by_ticket(self) -> None:
        """Offer GSS-API alone, and establish the context."""
        assert self.greet([1]) == 1
        self.send_raw(message(TOKEN, self.initiator.step()))
        assert self.initiator.step(self.read_message(TOKEN)) == b""

    def log_in(self, is_nec: bool = False) -> None:
        """Do all that comes before the request."""
        self.authenticate_by_ticket()
        wish = bytes([self.wish])
        self.send_raw(message(LEVEL, wish if is_nec else self.initiator.wrap(wish)))
        answer = self.read_message(LEVEL)
        assert (answer if is_nec else self.initiator.unwrap(answer)[0]) == wish
        self.level = self.wish


@contextlib.contextmanager
def running_realm() -> Iterator[Realm]:
    """Give a realm whose users have tickets.

    Not in pytest's folder: user nobody reads its configuration.
    """
    folder = Path(tempfile.mkdtemp(prefix="sockd-realm-"))
    names = ("KRB5_CONFIG", "KRB5RCACHENAME", "KRB5CCNAME", "KRB5_KTNAME")
    before = {name: os.environ.get(name) for name in names}
    realm = None
    try:
        realm = Realm(folder)
        for user in PASSWORDS:
            realm.log_in(user)
        os.environ.update({name: realm.env[name] for name in names[:2]})  # for the servers
        yield realm
    finally:
        if realm is not None:
            realm.close()
        shutil.rmtree(folder)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
