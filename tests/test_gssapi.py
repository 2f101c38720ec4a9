"""GSS-API (RFC 1961): a Kerberos realm on loopback, curl, a client of our own, and enemies.

Debian's danted is built without GSS-API: there is nobody to compare with.
"""

from __future__ import annotations

import contextlib
import pwd
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from client import (
    BIND,
    CONNECT,
    UDP_ASSOCIATE,
    Client,
    UdpClient,
    bytewise,
    random_splits,
    request5,
    unwrap,
    wrap,
)
from conftest import Factory
from kerberos import (
    CLEAR,
    CONFIDENTIALITY,
    DATA,
    INTEGRITY,
    LEVEL,
    PER_MESSAGE,
    REALM,
    TOKEN,
    GssClient,
    Initiator,
    Realm,
    message,
    running_realm,
)
from more_peers import rule, target_that
from peers import Seen
from servers import DidNotStart, Server, eventually, need
from test_relay import CLOSE_WAIT, is_held, list_states, say_to_nobody

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]
StartPeer = Callable[..., Any]
ABORT = b"\x01\xff"
LEVELS = {"integrity": INTEGRITY, "confidentiality": CONFIDENTIALITY}
HEAD = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
user.privileged: root
user.unprivileged: nobody
timeout.negotiate: 20
clientmethod: none
socksmethod: gssapi
"""
SMALL = 3000  # bytes whose message is no full read
LOG = "log: connect disconnect error"


@pytest.fixture(scope="module")
def realm(as_root: None) -> Iterator[Realm]:
    """Give a realm, with tickets for alice and bob."""
    with running_realm() as started:
        yield started


def config(realm: Realm, *client_items: str, socks: tuple[str, ...] = (), head: str = HEAD) -> str:
    """Write a configuration with these items in its rules."""
    keytab = f"gssapi.keytab: FILE:{realm.keytab}"
    passing = ("from: 0/0 to: 0/0", LOG)
    return head + rule("client pass", *passing, keytab, *client_items) + rule("socks pass", *passing, *socks)


@pytest.fixture
def server(sockd: Factory, realm: Realm, tmp_path: Path) -> Server:
    """Start a server whose workers are locked in an empty directory."""
    (tmp_path / "jail").mkdir()
    return sockd(config(realm), "--chroot", str(tmp_path / "jail"))


def find_reason(server: Server) -> str:
    """Wait for the record of a client that failed to negotiate, and give the reason in it."""

    def look() -> str:
        lines = [m for m in server.messages if "tcp/accept ]:" in m and "error after reading" in m]
        return lines[-1].split(" seconds: ")[-1].split(" second: ")[-1] if lines else ""

    return eventually(look)


# ------------------------------ what works ------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_connect_is_protected(server: Server, realm: Realm, peer: StartPeer, level: str) -> None:
    data = bytes(range(256)) * 2000
    with GssClient(server.addresses[0], realm, "alice", LEVELS[level]) as client:
        client.log_in()
        assert client.request5(CONNECT, *peer("echo").address).code == 0
        assert client.exchange(b"hello") == b"hello"
        client.send(data)
        assert client.receive(len(data)) == data
        client.finish_sending()
        assert client.sock.recv(1) == b""
    side = f"gssapi/{level}%alice@{REALM}@127.0.0.1."
    eventually(lambda: [m for m in server.messages if "tcp/accept ]:" in m])
    assert any(f"tcp/connect [: {side}" in m for m in server.messages)
    (end,) = [m for m in server.messages if "tcp/connect ]:" in m]
    found = re.search(r"\]: (\d+) -> gssapi\S+ \S+ -> (\d+), (\d+) -> \S+ \S+ -> (\d+): ", end)
    assert found
    raw_out, raw_in, plain_out, plain_in = map(int, found.groups())
    assert plain_out == plain_in == len(data) + 5  # the client's side counts what is sealed, as danted
    assert raw_out > plain_in
    assert raw_in > plain_out


@pytest.mark.parametrize("feed", [bytewise, random_splits(1)], ids=["bytewise", "splits"])
def test_messages_may_come_in_any_pieces(
    server: Server, realm: Realm, peer: StartPeer, feed: Callable[[bytes], Any]
) -> None:
    with GssClient(server.addresses[0], realm) as client:
        client.feed = feed
        client.log_in()
        assert client.request5(CONNECT, *peer("echo").address).code == 0
        client.send(b"hello" * 40)
        assert client.receive(200) == b"hello" * 40


def test_request_and_data_may_come_at_once(server: Server, realm: Realm, peer: StartPeer) -> None:
    """In one message, in the next one, and in one that has only begun."""
    target = peer("echo").address
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        first = client.seal(request5(CONNECT, *target) + b"one ")
        second, third = client.seal(b"two "), client.seal(b"three")
        client.send_raw(first + second + third[:30])
        assert client.read_reply5().code == 0
        assert client.receive(8) == b"one two "
        client.send_raw(third[30:])
        assert client.receive(5) == b"three"


def test_message_without_data_is_no_end(server: Server, realm: Realm, peer: StartPeer) -> None:
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        assert client.request5(CONNECT, *peer("echo").address).code == 0
        client.send(b"")
        assert client.exchange(b"still there") == b"still there"


def test_largest_message_passes(server: Server, realm: Realm, peer: StartPeer) -> None:
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        assert client.request5(CONNECT, *peer("echo").address).code == 0
        sealed = client.seal(bytes(65_475), 65_475)
        assert len(sealed) == 4 + 65_535
        client.send_raw(sealed)
        assert client.receive(65_475) == bytes(65_475)


def test_refusal_is_protected(server: Server, realm: Realm) -> None:
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        assert client.request5(CONNECT, "127.0.0.1", 0).code == 8


def test_urgent_byte_is_part_of_its_message(server: Server, realm: Realm, peer: StartPeer) -> None:
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        assert client.request5(CONNECT, *peer("echo").address).code == 0
        client.sock.send(client.seal(b"urgent"), socket.MSG_OOB)
        assert client.receive(6) == b"urgent"


def test_bind_is_protected(server: Server, realm: Realm) -> None:
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        bound = client.request5(BIND, "0.0.0.0", 0)
        client.send(b"early ")
        with socket.create_connection((bound.host, bound.port), 10) as visitor:
            assert client.read_reply5().code == 0
            client.send(b"and late")
            data = b""
            while len(data) < 14:
                data += visitor.recv(100)
            assert data == b"early and late"
            visitor.sendall(b"answer")
            assert client.receive(6) == b"answer"


@pytest.mark.parametrize("level", LEVELS)
def test_datagrams_are_protected(server: Server, realm: Realm, peer: StartPeer, level: str) -> None:
    target = peer("udp-echo").address
    with GssClient(server.addresses[0], realm, "alice", LEVELS[level]) as client, UdpClient() as udp:
        client.log_in()
        bound = client.request5(UDP_ASSOCIATE, "0.0.0.0", 0)
        relay = (bound.host, bound.port)
        sealed = [client.seal(wrap(*target, b"%d" % n)) for n in range(4)]
        plain = wrap(*target, b"plain")
        bent = sealed[0][:-1] + bytes([sealed[0][-1] ^ 1])
        # A repeated one is dropped, and one out of order is not; nor does anything else get through.
        for datagram in (
            plain,
            sealed[0][:20],
            sealed[0] + b"x",
            bent,
            b"",
            sealed[0],
            sealed[0],
            sealed[3],
            sealed[2],
        ):
            udp.send_raw(relay, datagram)
        answers = []
        for _ in range(3):
            datagram, _ = udp.sock.recvfrom(65536)
            assert datagram[:2] == b"\x01\x03"
            data, encrypted = client.initiator.unwrap(datagram[4:])
            assert encrypted == (level == "confidentiality")
            answers.append(unwrap(data).data)
        assert answers == [b"0", b"3", b"2"]
        size = len(sealed[0])
        client.reset()  # a mere FIN would leave the association a while for more datagrams
    eventually(lambda: [m for m in server.messages if "udp/udpassociate ]:" in m])
    (end,) = [m for m in server.messages if "udp/udpassociate ]:" in m]
    assert f"]: {3 * size}/3 -> gssapi/{level}%alice@{REALM}@" in end  # as danted counts
    assert f" -> {3 * size}/3, 3/3 -> " in end


def test_clear_and_nec_are_what_the_rule_says(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    target = peer("echo").address
    server = sockd(config(realm, "gssapi.enctype: clear integrity", "clientcompatibility: necgssapi"))
    for level in (CLEAR, INTEGRITY):
        for is_nec in (True, False):
            with GssClient(server.addresses[0], realm, "alice", level) as client:
                client.log_in(is_nec)
                assert client.request5(CONNECT, *target).code == 0
                assert client.exchange(b"hello") == b"hello"


def test_per_message_protection_encrypts(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    server = sockd(config(realm, "gssapi.enctype: per-message"))
    with GssClient(server.addresses[0], realm, "alice", PER_MESSAGE) as client:
        client.log_in()
        assert client.request5(CONNECT, *peer("echo").address).code == 0
        client.send_raw(message(DATA, client.initiator.wrap(b"signed")))
        assert client.receive(6) == b"signed"


# Debian 12's curl forgets that it has offered GSS-API when it has to wait for the answer: so it waits first.
PATIENTLY = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", "inject=recvfrom:delay_enter=100000"]


@pytest.mark.parametrize("nec", [[], ["--socks5-gssapi-nec"]], ids=["rfc1961", "nec"])
def test_curl_negotiates(sockd: Factory, realm: Realm, peer: StartPeer, nec: list[str]) -> None:
    """And after that Debian 12's curl, 7.88, loses its way in its own states; later ones go on."""
    features = subprocess.run(["curl", "-V"], capture_output=True, text=True, check=False).stdout
    need("GSS-API" in features, "this curl has no GSS-API")
    need(shutil.which("strace"), "strace is missing")
    items = ["gssapi.enctype: clear"] + ["clientcompatibility: necgssapi"] * bool(nec)
    server = sockd(config(realm, *items))
    host, port = peer("origin").address
    command = [*PATIENTLY, "curl", "-v", "--socks5", f"localhost:{server.port}", "--socks5-gssapi"]
    command += ["--socks5-gssapi-service", "rcmd", *nec, f"http://{host}:{port}/"]
    env = {**realm.env, "KRB5CCNAME": str(realm.folder / "cache-bob")}
    found = subprocess.run(command, capture_output=True, text=True, env=env, timeout=30, check=False)
    assert f"SOCKS5 server authenticated user bob@{REALM} with GSS-API." in found.stderr
    assert "SOCKS5 access without GSS-API data protection granted." in found.stderr
    if "Undocumented SOCKS5 mode" not in found.stderr:
        assert found.returncode == 0
        assert found.stdout
        assert any("[: gssapi/clear%bob" in m for m in server.messages)


# ------------------------------ who, and by what key ------------------------------


def test_user_is_the_principal(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    server = sockd(config(realm, socks=(f"user: bob@{REALM}",)))
    target = peer("echo").address
    codes = {}
    for user in ("alice", "bob"):
        with GssClient(server.addresses[0], realm, user) as client:
            client.log_in()
            codes[user] = client.request5(CONNECT, *target).code
    assert codes == {"alice": 2, "bob": 0}


@pytest.mark.parametrize(
    ("service", "works"),
    [("rcmd", True), ("rcmd/localhost", True), ("GSS_C_NO_NAME", True), ("host", False), ("other", False)],
)
def test_service_name_chooses_the_key(
    sockd: Factory, realm: Realm, tmp_path: Path, service: str, works: bool
) -> None:
    keytab = tmp_path / "keytab"
    shutil.copy(realm.keytab, keytab)
    realm.add_service(f"host/{service.lower().replace('/', '.')}", keytab)
    text = config(realm, f"gssapi.servicename: {service}").replace(str(realm.keytab), str(keytab))
    server = sockd(text)
    with GssClient(server.addresses[0], realm) as client:
        assert client.greet([1]) == 1
        client.send_raw(message(TOKEN, client.initiator.step()))
        assert client.receive(2) == (b"\x01\x01" if works else ABORT)


def test_missing_key_table_is_told_to_the_log(sockd: Factory, realm: Realm) -> None:
    server = sockd(config(realm).replace(str(realm.keytab), "/nonexistent/keytab"))
    with GssClient(server.addresses[0], realm) as client:
        assert client.greet([1]) == 1
        client.send_raw(message(TOKEN, client.initiator.step()))
        assert client.receive(2) == ABORT
    assert find_reason(server) == "gssapi.keytab: No such file or directory"


def test_key_stays_out_of_the_workers(server: Server, realm: Realm, peer: StartPeer) -> None:
    """Neither the service's key is in a worker's memory, nor is any file opened for a session."""
    target = peer("echo").address
    worker = next(int(p.pid) for p in server.processes() if is_jailed(p.pid))
    before = mapped_files(worker)
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        assert client.request5(CONNECT, *target).code == 0
        assert mapped_files(worker) == before
        assert any("libgssapi_krb5" in name for name in before)
        assert not holds(worker, read_key(realm.keytab))


def is_jailed(pid: int) -> bool:
    return Path(f"/proc/{pid}/root").readlink().name == "jail"


def mapped_files(pid: int) -> set[str]:
    """Give the files that are mapped into a process."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "/" in line}


def read_key(keytab: Path) -> bytes:
    """Give the last 32 bytes of the first entry of a key table, less its version number: the AES key."""
    data = keytab.read_bytes()
    (size,) = struct.unpack("!i", data[2:6])
    entry = data[6 : 6 + size]
    at = entry.index(struct.pack("!HH", 18, 32)) + 4  # aes256-cts-hmac-sha1-96, 32 bytes
    return entry[at : at + 32]


def holds(pid: int, secret: bytes) -> bool:
    """Tell whether a process has these bytes anywhere in its own memory."""
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split()
            if "r" not in fields[1] or (len(fields) > 5 and fields[5] in ("[vvar]", "[vsyscall]")):
                continue
            start, end = (int(text, 16) for text in fields[0].split("-"))
            with contextlib.suppress(OSError):  # of pages that are not there
                memory.seek(start)
                if secret in memory.read(end - start):
                    return True
    return False


def test_rule_of_the_request_may_want_more(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    server = sockd(config(realm, socks=("gssapi.enctype: confidentiality",)))
    target = peer("echo").address
    for level, code in ((INTEGRITY, 2), (CONFIDENTIALITY, 0)):
        with GssClient(server.addresses[0], realm, "alice", level) as client:
            client.log_in()
            assert client.request5(CONNECT, *target).code == code


# ------------------------------ enemies ------------------------------


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\x02\x01\x00\x01x", "unknown version on gssapi packet from client: 2"),
        (b"\x01\x03\x00\x01x", "unexpected type on gssapi packet from client: 3, not 1"),
        (b"\x01\x02\x00\x01\x01", "unexpected type on gssapi packet from client: 2, not 1"),
        (b"\x01\xff", "client has aborted the gssapi exchange"),
        (b"\x01\x01\x00\x00", "gss_accept_sec_context() failed: "),
        (b"\x01\x01\x00\x04junk", "gss_accept_sec_context() failed: "),
        (message(TOKEN, b"\x60" + bytes(65_534)), "gss_accept_sec_context() failed: "),
        (
            message(TOKEN, b"\x60\x84\xff\xff\xff\xff\x06\x09" + b"\x2a\x86\x48\x86\xf7\x12\x01\x02\x02"),
            "gss_accept",
        ),
    ],
    ids=["version", "data", "level", "abort", "empty", "junk", "largest", "length"],
)
def test_wrong_token_is_answered_by_an_abort(server: Server, realm: Realm, raw: bytes, reason: str) -> None:
    with Client(server.addresses[0]) as client:
        assert client.greet([1]) == 1
        client.send(raw)
        assert client.receive(2) == ABORT
        client.expect_end()
    assert find_reason(server).startswith(reason)


def test_stolen_token_is_refused(server: Server, realm: Realm) -> None:
    with Initiator(realm, "alice") as initiator:
        token = message(TOKEN, initiator.step())
    answers = []
    for _ in range(2):
        with Client(server.addresses[0]) as client:
            assert client.greet([1]) == 1
            client.send(token)
            answers.append(client.receive(2))
    assert answers == [b"\x01\x01", ABORT]
    eventually(lambda: [m for m in server.messages if "Request is a replay" in m])


@pytest.mark.parametrize(
    "sent", [b"", b"\x01\x01\xff\xffnever more", b"\x01"], ids=["nothing", "part", "byte"]
)
def test_endless_token_ends_with_the_time_to_negotiate(sockd: Factory, realm: Realm, sent: bytes) -> None:
    server = sockd(config(realm).replace("negotiate: 20", "negotiate: 1"))
    with Client(server.addresses[0]) as client:
        assert client.greet([1]) == 1
        client.send(sent)
        client.expect_end()
    eventually(lambda: [m for m in server.messages if "negotiate timeout after 1 second" in m])


@pytest.mark.parametrize(
    "make",
    [
        lambda i: message(LEVEL, b"\x01"),
        lambda i: message(LEVEL, i.wrap(b"\x00")),
        lambda i: message(LEVEL, i.wrap(b"\x03")),
        lambda i: message(LEVEL, i.wrap(b"\x04")),
        lambda i: message(LEVEL, i.wrap(b"")),
        lambda i: message(LEVEL, i.wrap(b"\x01\x01")),
        lambda i: message(LEVEL, i.wrap(b"\x01")[:-1] + b"x"),
        lambda i: message(LEVEL, b""),
        lambda i: message(DATA, i.wrap(b"\x01")),
        lambda i: ABORT,
    ],
    ids=["nec", "clear", "per-message", "unknown", "empty", "two", "bent", "nothing", "data", "abort"],
)
def test_wrong_level_is_answered_by_an_abort(
    server: Server, realm: Realm, make: Callable[[Initiator], bytes]
) -> None:
    with GssClient(server.addresses[0], realm) as client:
        client.authenticate_by_ticket()
        client.send_raw(make(client.initiator))
        assert client.receive(2) == ABORT
        client.expect_end()


@pytest.mark.parametrize(
    "make",
    [
        lambda c, request: request,
        lambda c, request: message(DATA, request),
        lambda c, request: message(DATA, c.initiator.wrap(request)),
        lambda c, request: message(LEVEL, c.initiator.wrap(request, True)),
        lambda c, request: c.seal(request)[:-1] + b"x",
        lambda c, request: ABORT,
    ],
    ids=["plain", "unsealed", "unencrypted", "level", "bent", "abort"],
)
def test_request_that_is_not_sealed_is_not_heard(
    server: Server, realm: Realm, make: Callable[[GssClient, bytes], bytes], peer: StartPeer
) -> None:
    target = peer("echo")
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        client.send_raw(make(client, request5(CONNECT, *target.address)))
        client.expect_end_or_reset()
    find_reason(server)
    assert target.seen == []


@pytest.mark.parametrize("kind", ["repeated", "bent", "plain", "unencrypted", "cut"])
def test_data_that_is_not_sealed_ends_the_session(
    server: Server, realm: Realm, peer: StartPeer, kind: str
) -> None:
    target = peer("echo")
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        assert client.request5(CONNECT, *target.address).code == 0
        sealed = client.seal(b"once")
        client.send_raw(sealed)
        assert client.receive(4) == b"once"
        other = client.seal(b"evil")
        client.send_raw(
            {
                "repeated": sealed,
                "bent": other[:-1] + bytes([other[-1] ^ 1]),
                "plain": b"GET / HTTP/1.0\r\n\r\n",
                "unencrypted": message(DATA, client.initiator.wrap(b"evil")),
                "cut": other[:-1],
            }[kind]
        )
        if kind == "cut":
            client.finish_sending()
        client.expect_end_or_reset()
    eventually(lambda: [m for m in server.messages if "tcp/accept ]:" in m and "local client error (" in m])
    eventually(lambda: target.seen and target.seen[0].end)
    assert bytes(target.seen[0].data) == b"once"


@pytest.mark.parametrize("kind", ["whole", "cut"])
def test_upload_of_a_closed_client_arrives_or_is_seen_to_be_cut(
    sockd: Factory, realm: Realm, kind: str
) -> None:
    """Though the target has said something to nobody, before it has read."""
    server = sockd(config(realm, head=f"{HEAD}external.socket.so_sndbuf: 4096\n"))
    port, resume = Queue[int](), threading.Event()

    def take(connection: socket.socket, seen: Seen) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        say_to_nobody(connection, port.get())
        resume.wait()
        try:
            while data := connection.recv(1 << 20):
                seen.data += data
            seen.end = "FIN"
        except ConnectionResetError:
            seen.end = "reset"

    piece, count = bytes(range(256)) * 200, 0
    with target_that(take) as target:
        with GssClient(server.addresses[0], realm) as client:
            client.log_in()
            assert client.request5(CONNECT, *target.address).code == 0
            far_port = client.address[1]
            # Messages that are read at once, until one is held up: so the next is more than one read.
            while not count or not is_held(far_port):
                client.send(piece[:SMALL])
                count += 1
            client.send_raw(client.seal(piece, len(piece))[: -1 if kind == "cut" else None])
        port.put(far_port)
        eventually(lambda: CLOSE_WAIT not in list_states(far_port))
        resume.set()
        end = eventually(lambda: target.seen and target.seen[0].end)
        data = bytes(target.seen[0].data)
    if kind == "whole":
        assert (end, data == piece[:SMALL] * count + piece) == ("FIN", True)
    else:
        assert end == "reset"
        eventually(lambda: [m for m in server.messages if "local client error (eof within" in m])


def test_client_without_gssapi_is_refused(server: Server) -> None:
    with Client(server.addresses[0]) as client:
        assert client.greet([0, 2]) == 255
    with Client(server.addresses[0]) as client:
        assert client.request4(CONNECT, "127.0.0.1", 9).code == 91


@pytest.mark.parametrize("method", ["rfc931", "pam.any", "pam.address"])
def test_other_methods_never_select_gssapi(sockd: Factory, realm: Realm, method: str) -> None:
    server = sockd(
        HEAD.replace("gssapi", method)
        + rule("client pass", "from: 0/0 to: 0/0")
        + rule("socks pass", "from: 0/0 to: 0/0")
    )
    with Client(server.addresses[0]) as client:
        assert client.greet([1]) == 255


# ------------------------------ the process ------------------------------


def test_many_sessions_leave_nothing(server: Server, realm: Realm, peer: StartPeer) -> None:
    target = peer("echo").address

    def visit(user: str) -> None:
        with GssClient(server.addresses[0], realm, user) as client:
            client.log_in()
            assert client.request5(CONNECT, *target).code == 0
            assert client.exchange(b"hello" * 1000) == b"hello" * 1000

    for _ in range(50):
        visit("alice")
    eventually(lambda: len(server.processes()) == 4)
    before = memory_kilobytes(server)
    for _ in range(200):
        visit("bob")
    eventually(lambda: len(server.processes()) == 4)
    # 200 contexts of some 5 kB that nobody frees would be a megabyte.
    assert memory_kilobytes(server) - before < 800


def memory_kilobytes(server: Server) -> int:
    """Give what the processes of a server have of their own."""
    total = 0
    for process in server.processes():
        with contextlib.suppress(OSError):  # one that read a token, and has ended
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                total += int(line.split()[1]) if line.startswith("Private_Dirty:") else 0
    return total


def test_token_is_read_without_power(sockd: Factory, realm: Realm) -> None:
    """The replay cache belongs to who read the token: user.unprivileged, not root."""
    cache = realm.folder / "replays" / "cache"
    server = sockd(config(realm))
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
    assert cache.stat().st_uid == pwd.getpwnam("nobody").pw_uid


def test_warden_that_is_not_root_reads_the_key_table(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    """It has kept the power to read any file, and the process that reads the token has not."""
    text = config(realm).replace("user.privileged: root", "user.privileged: daemon")
    server = sockd(text)
    (realm.folder / "replays" / "cache").unlink(missing_ok=True)
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        assert client.request5(CONNECT, *peer("echo").address).code == 0
    (realm.folder / "replays" / "cache").unlink()


def test_reload_takes_gssapi_up(sockd: Factory, realm: Realm, peer: StartPeer) -> None:
    server = sockd(config(realm, head=HEAD.replace("gssapi", "none")))
    with Client(server.addresses[0]) as client:
        assert client.greet([1]) == 255
    server.reload(config(realm))
    server.take_baseline()
    with GssClient(server.addresses[0], realm) as client:
        client.log_in()
        assert client.request5(CONNECT, *peer("echo").address).code == 0


def test_missing_library_is_one_line_at_the_start(
    sockd: Factory, realm: Realm, private_world: Any, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    library = next(Path("/usr/lib").glob("**/libgssapi_krb5.so.2")).resolve()
    world = type(private_world)({**private_world.files, str(library): empty})
    with pytest.raises(DidNotStart) as failure:
        sockd(config(realm), world=world)
    assert str(failure.value).count("error:") == 1
    assert "method gssapi needs MIT Kerberos's libgssapi_krb5.so.2" in str(failure.value)


def test_library_is_loaded_only_where_it_is_needed(sockd: Factory, realm: Realm) -> None:
    for text, wanted in ((config(realm), True), (config(realm, head=HEAD.replace("gssapi", "none")), False)):
        server = sockd(text)
        maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in server.processes()]
        assert {"libgssapi" in text for text in maps} == {wanted}
