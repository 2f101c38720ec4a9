"""Socket options: what the kernel says of the servers' own sockets, in sockd and in danted.

A test takes a copy of a server's socket out of its process (pidfd_getfd(2)) and asks getsockopt(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from servers import Server, eventually

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]

PIDFD_GETFD = 438  # asm-generic/unistd.h
IP_MTU_DISCOVER, IP_FREEBIND, IP_MINTTL = 10, 15, 21  # linux/in.h
TCP_SYNCNT, TCP_LINGER2, TCP_WINDOW_CLAMP, UDP_CORK = 7, 8, 10, 1  # linux/tcp.h, linux/udp.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h

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
    Setting("ip.ip_ttl", "44", socket.IPPROTO_IP, socket.IP_TTL, 44),
    Setting("ip.ip_minttl", "2", socket.IPPROTO_IP, IP_MINTTL, 2),
    Setting("ip.ip_mtu_discover", "0", socket.IPPROTO_IP, IP_MTU_DISCOVER, 0),
    Setting("ip.ip_freebind", "1", socket.IPPROTO_IP, IP_FREEBIND, 1),
)
UDP_SETTINGS = (
    Setting("socket.so_broadcast", "1", socket.SOL_SOCKET, socket.SO_BROADCAST, 1),
    Setting("socket.so_timestamp", "1", socket.SOL_SOCKET, 29, 1),
    Setting("socket.so_priority", "4", socket.SOL_SOCKET, socket.SO_PRIORITY, 4),
    Setting("udp.so_rcvbuf", "30000", socket.SOL_SOCKET, socket.SO_RCVBUF, 60000),
    Setting("udp.so_sndbuf", "40000", socket.SOL_SOCKET, socket.SO_SNDBUF, 80000),
    Setting("ip.ip_ttl", "45", socket.IPPROTO_IP, socket.IP_TTL, 45),
    Setting("udp.udp_cork", "0", socket.IPPROTO_UDP, UDP_CORK, 0),
)
KEEPIDLE = tuple(setting for setting in TCP_SETTINGS if setting.name == "tcp.tcp_keepidle")
# What only a new connection can be given, or the kernel forgets once there is one.
EARLY = (
    "socket.so_priority",
    "tcp.so_rcvbuf",
    "tcp.tcp_syncnt",
    "tcp.tcp_window_clamp",
    "ip.ip_freebind",
    "ip.ip_mtu_discover",
)


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
    settings = tuple(setting for setting in TCP_SETTINGS if setting.name not in EARLY)
    server = start(configure("global", spell("internal", settings)))
    assert read_of_connect(server, "internal", settings) == expected(settings)


def test_priority_is_set_on_the_way_to_a_client(sockd: Factory) -> None:
    """Unlike danted: the kernel does not hand it on from the listener."""
    settings = tuple(setting for setting in TCP_SETTINGS if setting.name == "socket.so_priority")
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


def test_linger_is_set_with_its_seconds(sockd: Factory) -> None:
    """Unlike danted, which gives the kernel a number in the place of its structure."""
    settings = (Setting("socket.so_linger", "7", socket.SOL_SOCKET, socket.SO_LINGER, integers(1, 7)),)
    server = sockd(configure("rule", spell("external", settings)))
    assert read_of_connect(server, "external", settings) == expected(settings)


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


def test_options_that_need_privileges_are_set(start: Factory) -> None:
    settings = (
        Setting("tcp.so_rcvbufforce", "9000000", socket.SOL_SOCKET, socket.SO_RCVBUF, 18000000),
        Setting("socket.so_debug", "1", socket.SOL_SOCKET, socket.SO_DEBUG, 1),
    )
    server = start(configure("rule", spell("external", settings)))
    assert read_of_connect(server, "external", settings) == expected(settings)


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
    assert "could not set" not in server.text
