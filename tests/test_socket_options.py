"""Socket options: what the kernel says of the servers' own sockets, in sockd and in danted.

A test takes a copy of a server's socket out of its process (pidfd_getfd(2)) and asks getsockopt(2).
What is there before a connection is seen in its first packet, which Linux keeps for the listener.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import socket
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from servers import Server, eventually

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]

PIDFD_GETFD = 438  # asm-generic/unistd.h
IP_MTU_DISCOVER, IP_FREEBIND, IP_MINTTL = 10, 15, 21  # linux/in.h
TCP_SYNCNT, TCP_LINGER2, TCP_WINDOW_CLAMP, TCP_USER_TIMEOUT = 7, 8, 10, 18  # linux/tcp.h
TCP_SAVE_SYN, TCP_SAVED_SYN = 27, 28
UDP_CORK, UDP_NO_CHECK6_TX = 1, 101  # linux/udp.h
SO_TIMESTAMP, SO_SNDLOWAT, SO_MARK = 29, 19, 36  # asm-generic/socket.h
CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, CAP_DAC_READ_SEARCH = 12, 10, 2  # linux/capability.h

HEAD = """\
internal: 127.0.0.1 port = 0
internal: ::1 port = 0
external: 127.0.0.1
external: ::1
socksmethod: none
user.privileged: root
user.unprivileged: nobody
"""


class Setting(NamedTuple):
    """An option as the configuration has it, and what getsockopt(2) then says."""

    name: str  # LEVEL.OPTION
    value: str
    level: int
    number: int
    expected: int | bytes


def integers(*expected: int) -> bytes:
    return struct.pack(f"={len(expected)}i", *expected)


TCP_SETTINGS = (
    Setting("socket.so_keepalive", "0", socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0),
    Setting("socket.so_oobinline", "1", socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),
    Setting("socket.so_priority", "5", socket.SOL_SOCKET, socket.SO_PRIORITY, 5),
    Setting("tcp.so_rcvbuf", "30000", socket.SOL_SOCKET, socket.SO_RCVBUF, 60000),  # the kernel doubles it
    Setting("tcp.so_sndbuf", "40000", socket.SOL_SOCKET, socket.SO_SNDBUF, 80000),
    Setting("socket.so_dontroute", "1", socket.SOL_SOCKET, socket.SO_DONTROUTE, 1),
    Setting("tcp.tcp_keepidle", "77", socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
    Setting("tcp.tcp_keepintvl", "33", socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 33),
    Setting("tcp.tcp_keepcnt", "5", socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
    Setting("tcp.tcp_nodelay", "0", socket.IPPROTO_TCP, socket.TCP_NODELAY, 0),
    Setting("tcp.tcp_linger2", "20", socket.IPPROTO_TCP, TCP_LINGER2, 20),
    Setting("tcp.tcp_syncnt", "4", socket.IPPROTO_TCP, TCP_SYNCNT, 4),
    Setting("tcp.tcp_window_clamp", "20000", socket.IPPROTO_TCP, TCP_WINDOW_CLAMP, 20000),
    Setting("tcp.tcp_cork", "1", socket.IPPROTO_TCP, socket.TCP_CORK, 1),
    Setting("tcp.18", "12345", socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 12345),  # by its number
    Setting("ip.ip_ttl", "44", socket.IPPROTO_IP, socket.IP_TTL, 44),
    Setting("ip.ip_minttl", "2", socket.IPPROTO_IP, IP_MINTTL, 2),
    Setting("ip.ip_mtu_discover", "0", socket.IPPROTO_IP, IP_MTU_DISCOVER, 0),
    Setting("ip.ip_freebind", "1", socket.IPPROTO_IP, IP_FREEBIND, 1),
)
UDP_SETTINGS = (
    Setting("socket.so_broadcast", "1", socket.SOL_SOCKET, socket.SO_BROADCAST, 1),
    Setting("socket.so_timestamp", "1", socket.SOL_SOCKET, SO_TIMESTAMP, 1),
    Setting("socket.so_priority", "4", socket.SOL_SOCKET, socket.SO_PRIORITY, 4),
    Setting("udp.so_rcvbuf", "30000", socket.SOL_SOCKET, socket.SO_RCVBUF, 60000),
    Setting("udp.so_sndbuf", "40000", socket.SOL_SOCKET, socket.SO_SNDBUF, 80000),
    Setting("ip.ip_ttl", "45", socket.IPPROTO_IP, socket.IP_TTL, 45),
    Setting("udp.101", "1", socket.IPPROTO_UDP, UDP_NO_CHECK6_TX, 1),
)
# The most that is put into a segment, less the room that time stamps take there.
MAXSEG = (Setting("tcp.tcp_maxseg", "700", socket.IPPROTO_TCP, socket.TCP_MAXSEG, 688),)
# Unlike danted, which gives the kernel a number in the place of its structures.
STRUCTURES = (
    Setting("socket.so_linger", "7", socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@2i", 1, 7)),
    Setting("socket.so_rcvtimeo", "3", socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@2l", 3, 0)),
    Setting("socket.so_sndtimeo", "4", socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@2l", 4, 0)),
)
FORCED = (
    Setting("tcp.so_rcvbufforce", "9000000", socket.SOL_SOCKET, socket.SO_RCVBUF, 18000000),
    Setting("tcp.so_sndbufforce", "8000000", socket.SOL_SOCKET, socket.SO_SNDBUF, 16000000),
    Setting("socket.so_debug", "1", socket.SOL_SOCKET, socket.SO_DEBUG, 1),
)
KEEPIDLE = tuple(setting for setting in TCP_SETTINGS if setting.name == "tcp.tcp_keepidle")
PRIORITY = "socket.so_priority"  # which an accepted connection does not have from its listener


def spell(side: str, settings: tuple[Setting, ...]) -> str:
    return "".join(f"{side}.{setting.name}: {setting.value}\n" for setting in settings)


def configure(where: str, options: str) -> str:
    """Put options among the globals, or into the socks-rule."""
    common, own = (options, "") if where == "global" else ("", options)
    return (
        f"{HEAD}{common}client pass {{ from: 0/0 to: 0/0 }}\n"
        f"socks pass {{\nfrom: 0/0 to: 0/0\nlog: connect error\n{own}}}\n"
    )


# ------------------------------ the server's sockets ------------------------------


def copy_socket(pid: int, descriptor: int) -> socket.socket | None:
    """Give a copy of another process's socket, or None if it is something else or has gone."""
    try:
        link = os.readlink(f"/proc/{pid}/fd/{descriptor}")
        process = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        if not link.startswith("socket:"):
            return None
        copied = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, descriptor, 0)
        return socket.socket(fileno=copied) if copied >= 0 else None
    finally:
        os.close(process)


def list_sockets(server: Server) -> Iterator[socket.socket]:
    """Give a copy of each socket of the network that a server has; closed when the next one is asked for."""
    for process in server.processes():
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(f"/proc/{process.pid}/fd"):
                copied = copy_socket(process.pid, int(name))
                if copied is None:
                    continue
                with copied:
                    if copied.family in (socket.AF_INET, socket.AF_INET6):
                        yield copied


def peer_of(connection: socket.socket) -> tuple[str, int] | None:
    try:
        return connection.getpeername()[:2]
    except OSError:
        return None


def read_setting(connection: socket.socket, setting: Setting) -> int | bytes:
    if isinstance(setting.expected, bytes):
        return connection.getsockopt(setting.level, setting.number, len(setting.expected))
    return connection.getsockopt(setting.level, setting.number)


def read_settings(
    server: Server, is_it: Callable[[socket.socket], bool], settings: tuple[Setting, ...]
) -> dict[str, int | bytes]:
    """Give what the kernel says of the socket that `is_it` tells."""

    def look() -> dict[str, int | bytes]:
        for connection in list_sockets(server):
            if is_it(connection):
                return {setting.name: read_setting(connection, setting) for setting in settings}
        return {}

    return eventually(look)


def expected(settings: tuple[Setting, ...]) -> dict[str, int | bytes]:
    return {setting.name: setting.expected for setting in settings}


@pytest.fixture(params=["sockd", pytest.param("danted", marks=pytest.mark.dante)])
def start(request: pytest.FixtureRequest) -> Factory:
    """Start one of the two servers."""
    factory: Factory = request.getfixturevalue(request.param)
    return factory


# ------------------------------ TCP ------------------------------


def read_of_connect(
    server: Server, side: str, settings: tuple[Setting, ...], host: str = "127.0.0.1"
) -> dict[str, int | bytes]:
    """Connect through a server, and give the options of its connection to the client or to the target."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as target, Client(server.addresses[0]) as client:
        address = target.getsockname()[:2]
        assert client.open5(CONNECT, *address).code == 0
        peer = client.address if side == "internal" else address
        return read_settings(server, lambda connection: peer_of(connection) == peer, settings)


@pytest.mark.parametrize("where", ["global", "rule"])
def test_options_are_set_on_the_way_to_a_target(start: Factory, where: str) -> None:
    server = start(configure(where, spell("external", TCP_SETTINGS)))
    assert read_of_connect(server, "external", TCP_SETTINGS) == expected(TCP_SETTINGS)


def test_global_options_are_set_on_the_way_to_a_client(start: Factory) -> None:
    settings = tuple(setting for setting in (*TCP_SETTINGS, *MAXSEG) if setting.name != PRIORITY)
    server = start(configure("global", spell("internal", settings)))
    assert read_of_connect(server, "internal", settings) == expected(settings)


def test_priority_is_set_on_the_way_to_a_client(sockd: Factory) -> None:
    """Unlike danted: the kernel does not hand it on from the listener."""
    settings = tuple(setting for setting in TCP_SETTINGS if setting.name == PRIORITY)
    server = sockd(configure("global", spell("internal", settings)))
    assert read_of_connect(server, "internal", settings) == expected(settings)


def test_options_of_a_rule_that_may_come_late_are_set_on_the_way_to_a_client(start: Factory) -> None:
    settings = (Setting("ip.ip_tos.prec", "flash", socket.IPPROTO_IP, socket.IP_TOS, 3 << 5),)
    server = start(configure("rule", spell("internal", settings)))
    assert read_of_connect(server, "internal", settings) == expected(settings)


def test_the_rule_overrides_the_global_option(start: Factory) -> None:
    own = KEEPIDLE
    config = configure("rule", spell("external", own)).replace(
        "client pass", "external.tcp.tcp_keepidle: 99\nclient pass", 1
    )
    assert read_of_connect(start(config), "external", own) == expected(own)


@pytest.mark.parametrize("kind", ["client", "socks"])
def test_options_of_a_rule_are_set_late_on_the_way_to_a_client(sockd: Factory, kind: str) -> None:
    """Unlike danted, which leaves out all but so_debug and ip_tos."""
    config = configure("rule", "").replace(
        f"{kind} pass {{", f"{kind} pass {{\n{spell('internal', TCP_SETTINGS)}", 1
    )
    assert read_of_connect(sockd(config), "internal", TCP_SETTINGS) == expected(TCP_SETTINGS)


@pytest.mark.parametrize("where", ["global", "rule"])
@pytest.mark.parametrize("side", ["internal", "external"])
def test_options_that_are_structures_are_set(sockd: Factory, side: str, where: str) -> None:
    server = sockd(configure(where, spell(side, STRUCTURES)))
    assert read_of_connect(server, side, STRUCTURES) == expected(STRUCTURES)
    assert "could not set" not in server.text


@pytest.mark.parametrize("where", ["global", "rule"])
@pytest.mark.parametrize("side", ["internal", "external"])
def test_options_that_nobody_can_set_change_nothing(start: Factory, side: str, where: str) -> None:
    """For tcp_md5sig Linux wants a key; a connection that had one would not come about."""
    server = start(configure(where, f"{side}.tcp.tcp_md5sig: 1\n{side}.socket.so_sndlowat: 7\n"))
    usual = (Setting("socket.so_sndlowat", "", socket.SOL_SOCKET, SO_SNDLOWAT, 1),)
    assert read_of_connect(server, side, usual) == expected(usual)


def test_options_that_nobody_can_set_are_warned_of_once(sockd: Factory) -> None:
    server = sockd(configure("global", "internal.tcp.tcp_md5sig: 1\nexternal.socket.so_sndlowat: 7\n"))
    read_of_connect(server, "external", KEEPIDLE)
    for text in (
        '"tcp_md5sig" is ignored: Linux wants a key for each peer',
        '"so_sndlowat" is ignored: in Linux it is always 1',
    ):
        assert server.text.count(text) == 1
    assert "could not set" not in server.text


def parse_syn(packet: bytes) -> dict[str, int]:
    """Give what the options are about in the first packet of a connection: IPv4 and TCP header."""
    tcp = packet[(packet[0] & 15) * 4 :]
    found = {"tos": packet[1], "ttl": packet[8], "fragments": 1 - (packet[6] >> 6 & 1)}
    options = tcp[20 : (tcp[12] >> 4) * 4]
    while options and options[0]:
        length = 1 if options[0] == 1 else options[1]
        if options[0] == 2:
            found["maxseg"] = int.from_bytes(options[2:4], "big")
        options = options[length:]
    return found


@pytest.mark.parametrize("where", ["global", "rule"])
def test_options_are_set_before_the_connection_to_a_target(start: Factory, where: str) -> None:
    lines = ("ip.ip_ttl: 44", "ip.ip_tos: 24", "ip.ip_mtu_discover: 0", "tcp.tcp_maxseg: 700")
    server = start(configure(where, "".join(f"external.{line}\n" for line in lines)))
    with socket.create_server(("127.0.0.1", 0)) as target, Client(server.addresses[0]) as client:
        target.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)
        assert client.open5(CONNECT, *target.getsockname()).code == 0
        accepted, _ = target.accept()
        with accepted:
            syn = accepted.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, 256)
    assert parse_syn(syn) == {"tos": 24, "ttl": 44, "fragments": 1, "maxseg": 700}


def test_options_are_set_before_a_client_connects(start: Factory) -> None:
    """A client is told of the largest segment in the answer to its first packet."""
    server = start(configure("global", spell("internal", MAXSEG)))
    with Client(server.addresses[0]) as client:
        assert client.greet() == 0
        assert client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) == 688


def test_a_route_has_options_of_its_own(sockd: Factory) -> None:
    """Unlike danted, which parses them and does nothing."""
    upstream = sockd(configure("global", ""))
    settings = TCP_SETTINGS
    host, port = upstream.addresses[0]
    route = f"route {{\nfrom: 0/0 to: 0/0 via: {host} port = {port}\nproxyprotocol: socks_v5\n"
    server = sockd(configure("global", "") + route + spell("external", settings) + "}\n")
    with socket.create_server(("127.0.0.1", 0)) as target, Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target.getsockname()).code == 0
        found = read_settings(server, lambda connection: peer_of(connection) == (host, port), settings)
    assert found == expected(settings)


# ------------------------------ options that hold data back ------------------------------

LOW_WATER = (Setting("socket.so_rcvlowat", "1000", socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1000),)


def waiting_bytes(server: Server, address: tuple[str, int]) -> int:
    """Give how much of what a peer has sent the server has not read."""
    for connection in list_sockets(server):
        if peer_of(connection) == address:
            return int.from_bytes(ioctl(connection, termios.FIONREAD, bytes(4)), "little")
    return 0


@pytest.mark.parametrize("where", ["global", "rule"])
def test_low_water_mark_holds_back_until_it_is_reached(start: Factory, where: str) -> None:
    server = start(configure(where, spell("external", LOW_WATER)))
    with socket.create_server(("127.0.0.1", 0)) as target, Client(server.addresses[0]) as client:
        address = target.getsockname()
        assert client.open5(CONNECT, *address).code == 0
        accepted, _ = target.accept()
        with accepted:
            client.send(b"prompt")
            assert accepted.recv(100) == b"prompt"
            accepted.sendall(bytes(999))
            assert eventually(lambda: waiting_bytes(server, address)) == 999
            accepted.sendall(b"x")
            assert client.receive(1000) == bytes(999) + b"x"
            accepted.sendall(b"rest")
        assert client.receive_all() == b"rest"


@pytest.mark.parametrize("kind", ["client", "socks"])
def test_low_water_mark_of_a_rule_does_not_hold_clients_back(
    start: Factory, kind: str, peer: Callable[..., Any]
) -> None:
    config = configure("rule", "").replace(
        f"{kind} pass {{", f"{kind} pass {{\n{spell('internal', LOW_WATER)}", 1
    )
    server = start(config)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("echo").address).code == 0
        assert client.exchange(b"small") == b"small"


@pytest.mark.parametrize(
    ("sides", "option"),
    [
        (("external",), "socket.so_rcvlowat: 1000000"),
        (("internal", "external"), "tcp.tcp_cork: 1"),
        (("internal", "external"), "tcp.tcp_maxseg: 88"),
        (("internal", "external"), "tcp.tcp_window_clamp: 1"),
        (("internal", "external"), "socket.so_rcvtimeo: 1"),
        (("internal", "external"), "socket.so_rcvbuf: 1"),
        (("internal", "external"), "socket.so_sndbuf: 1"),
        (("external",), "socket.so_linger: 0"),
    ],
)
def test_no_option_loses_what_is_sent(start: Factory, sides: tuple[str, ...], option: str) -> None:
    """Both ways at once, and then each direction ends by itself."""
    server = start(configure("global", "".join(f"{side}.{option}\n" for side in sides)))
    data = bytes(range(256)) * 6000
    with socket.create_server(("127.0.0.1", 0)) as target, Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target.getsockname()).code == 0
        accepted, _ = target.accept()
        with accepted:
            accepted.settimeout(client.sock.gettimeout())
            received = exchange_much(data, client.sock, accepted)
    assert [part == data for part in received] == [True, True]


def exchange_much(data: bytes, *ends: socket.socket) -> list[bytes]:
    """Send data into both ends at once; give what comes out of each."""

    def send(end: socket.socket) -> None:
        with contextlib.suppress(OSError):  # what is missing is seen at the other end
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)

    received = [bytearray() for _ in ends]

    def receive(end: socket.socket, into: bytearray) -> None:
        with contextlib.suppress(OSError):
            for piece in iter(lambda: end.recv(65536), b""):
                into += piece

    threads = [threading.Thread(target=send, args=(end,)) for end in ends]
    threads += [threading.Thread(target=receive, args=pair) for pair in zip(ends, received, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [bytes(part) for part in received]


# ------------------------------ fields and families ------------------------------


@pytest.mark.parametrize(
    ("option", "value", "tos"),
    [
        ("ip_tos", "8", 8),
        ("ip_tos.dscp", "af41", 34 << 2),
        ("ip_tos.dscp", "cs1", 8 << 2),
        ("ip_tos.dscp", "12", 12 << 2),
        ("ip_tos.prec", "internetcontrol", 6 << 5),
        ("ip_tos.tos", "lowdelay", 8 << 1),
        ("ip_tos.tos", "4", 4 << 1),
        ("1", "24", 24),  # IP_TOS by its number
    ],
)
def test_type_of_service_by_field(start: Factory, option: str, value: str, tos: int) -> None:
    settings = (Setting(f"ip.{option}", value, socket.IPPROTO_IP, socket.IP_TOS, tos),)
    server = start(configure("rule", spell("external", settings)))
    assert read_of_connect(server, "external", settings) == expected(settings)


def test_fields_of_the_type_of_service_add_up(sockd: Factory) -> None:
    """Unlike danted, where the last one clears the others."""
    lines = "external.ip.ip_tos.prec: flash\nexternal.ip.ip_tos.tos: lowdelay\n"
    whole = (Setting("ip.ip_tos", "", socket.IPPROTO_IP, socket.IP_TOS, 3 << 5 | 8 << 1),)
    assert read_of_connect(sockd(configure("rule", lines)), "external", whole) == expected(whole)


def test_options_of_ip_are_for_ipv4_only(start: Factory) -> None:
    settings = KEEPIDLE
    server = start(configure("global", spell("external", settings) + "external.ip.ip_ttl: 44\n"))
    assert read_of_connect(server, "external", settings, "::1") == expected(settings)
    assert "ip_ttl" not in server.text


# ------------------------------ options that need privileges ------------------------------


@pytest.mark.parametrize("where", ["global", "rule"])
def test_options_that_need_privileges_are_set(start: Factory, where: str) -> None:
    server = start(configure(where, spell("external", FORCED)))
    assert read_of_connect(server, "external", FORCED) == expected(FORCED)


def test_options_that_need_privileges_are_set_on_the_way_to_a_client(start: Factory) -> None:
    server = start(configure("global", spell("internal", FORCED)))
    assert read_of_connect(server, "internal", FORCED) == expected(FORCED)


def find_warden(server: Server) -> dict[str, str]:
    """Give the status (proc(5)) of the process of user daemon; {} if there is none."""
    daemon = pwd.getpwnam("daemon").pw_uid
    for process in server.processes():
        text = Path(f"/proc/{process.pid}/status").read_text()
        status = dict(line.split(":\t", 1) for line in text.splitlines())
        if int(status["Uid"].split()[0]) == daemon:
            return status
    return {}


@pytest.mark.parametrize("where", ["global", "rule"])
@pytest.mark.parametrize("side", ["internal", "external"])
def test_options_that_need_privileges_are_set_by_a_user_who_is_not_root(
    sockd: Factory, side: str, where: str
) -> None:
    """In danted the user must be root."""
    settings = (
        *FORCED,
        Setting("socket.so_priority", "7", socket.SOL_SOCKET, socket.SO_PRIORITY, 7),
        Setting("socket.36", "5", socket.SOL_SOCKET, SO_MARK, 5),
    )
    config = configure(where, spell(side, settings))
    server = sockd(config.replace("user.privileged: root", "user.privileged: daemon"))
    assert read_of_connect(server, side, settings) == expected(settings)
    powers = 1 << CAP_NET_ADMIN | 1 << CAP_NET_BIND_SERVICE | 1 << CAP_DAC_READ_SEARCH
    assert int(find_warden(server)["CapPrm"], 16) == powers
    assert "could not set" not in server.text


def test_no_process_has_privileges_for_options_that_need_none(sockd: Factory) -> None:
    settings = tuple(setting for setting in TCP_SETTINGS if not setting.name.rpartition(".")[2].isdecimal())
    config = configure("global", spell("external", settings))
    server = sockd(config.replace("user.privileged: root", "user.privileged: daemon"))
    assert read_of_connect(server, "external", settings) == expected(settings)
    assert not find_warden(server)


# ------------------------------ options that fail, and of BIND ------------------------------


def test_an_option_that_cannot_be_set_is_a_warning_and_no_more(sockd: Factory) -> None:
    server = sockd(configure("rule", "external.tcp.4: 99\nexternal.tcp.9999: 1\n"))
    assert read_of_connect(server, "external", KEEPIDLE) == {"tcp.tcp_keepidle": 99}
    assert any(
        record.level == "warning"
        and "could not set external.tcp.9999: Protocol not available" in record.message
        for record in server.log
    )


def test_the_peer_of_a_bind_has_the_options_of_the_external_side(start: Factory) -> None:
    settings = KEEPIDLE
    server = start(configure("rule", spell("external", settings)))
    with Client(server.addresses[0]) as client:
        reply = client.open5(BIND, "0.0.0.0", 0)
        assert reply.code == 0
        with socket.create_connection((reply.host, reply.port), 10) as visitor:
            assert client.read_reply5().code == 0
            peer = visitor.getsockname()
            found = read_settings(server, lambda connection: peer_of(connection) == peer, settings)
    assert found == expected(settings)


# ------------------------------ UDP ------------------------------


@pytest.mark.parametrize("where", ["global", "rule"])
@pytest.mark.parametrize("side", ["internal", "external"])
def test_options_are_set_on_both_sides_of_an_association(
    start: Factory, side: str, where: str, peer: Callable[..., Any]
) -> None:
    # An option of TCP is not for these sockets, and none for which there would be a warning.
    lines = spell(side, UDP_SETTINGS) + f"{side}.tcp.tcp_keepidle: 77\n{side}.tcp.so_rcvbuf: 50000\n"
    server = start(configure(where, lines))
    echo = peer("udp-echo")
    with Client(server.addresses[0]) as client, UdpClient() as udp:
        reply = client.open5(UDP_ASSOCIATE, *udp.address)
        relay = (reply.host, reply.port)
        udp.send(relay, *echo.address, b"ping")
        assert udp.receive(relay).data == b"ping"

        def is_it(opened: socket.socket) -> bool:
            port = opened.getsockname()[1]
            is_on_side = port == relay[1] if side == "internal" else port not in (0, relay[1])
            return opened.type == socket.SOCK_DGRAM and is_on_side

        assert read_settings(server, is_it, UDP_SETTINGS) == expected(UDP_SETTINGS)
        client.reset()
    assert "could not set" not in server.text


@pytest.mark.parametrize("side", ["internal", "external"])
def test_corked_datagrams_are_not_sent(start: Factory, side: str) -> None:
    server = start(configure("global", f"{side}.udp.udp_cork: 1\n"))
    cork = (Setting("udp.udp_cork", "1", socket.IPPROTO_UDP, UDP_CORK, 1),)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target,
        Client(server.addresses[0]) as client,
        UdpClient() as udp,
    ):
        target.bind(("127.0.0.1", 0))
        target.settimeout(10)
        reply = client.open5(UDP_ASSOCIATE, *udp.address)
        relay = (reply.host, reply.port)
        udp.send(relay, *target.getsockname(), b"ping")
        if side == "internal":
            data, sender = target.recvfrom(100)
            assert data == b"ping"
            target.sendto(b"pong", sender)

        def is_corked(opened: socket.socket) -> bool:
            is_relay = opened.getsockname()[1] == relay[1]
            return opened.type == socket.SOCK_DGRAM and is_relay == (side == "internal") and is_bound(opened)

        assert read_settings(server, is_corked, cork) == expected(cork)
        unheard = target if side == "external" else udp.sock
        unheard.setblocking(False)
        with pytest.raises(BlockingIOError):
            unheard.recv(100)
        client.reset()


def is_bound(opened: socket.socket) -> bool:
    return bool(opened.getsockname()[1])
