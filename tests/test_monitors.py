"""Monitors and their alarms: raised and cleared with danted's records, over all workers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from more_peers import rule, wait_for_record, wait_for_workers
from servers import Server, eventually, read_process

import sockd as program

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

HEAD = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
"""
ANYBODY = "from: 0/0 to: 0/0"
# Raised when the first time is over: what a test does then is all in the next one.
CLOCK = "internal.alarm.data.recv: 1000000 in 2"
RULES = rule("client pass", ANYBODY) + rule("socks pass", ANYBODY, "log: connect disconnect")

each_server = pytest.mark.parametrize("factory", ["sockd", "danted"], indirect=True)


def monitored(*items: str, addresses: str = ANYBODY, protocol: str = "protocol: tcp") -> str:
    return HEAD + RULES + rule("monitor", addresses, protocol, *items)


def alarms(server: Server) -> list[str]:
    """Give the records of alarms so far."""
    return [message for message in server.messages if "alarm/" in message]


def connect(server: Server, target: Any, stack: contextlib.ExitStack, source: str = "127.0.0.1") -> Client:
    client = stack.enter_context(Client(server.addresses[0], source=(source, 0)))
    assert client.open5(CONNECT, *target.address).code == 0
    return client


# ------------------------------ alarm.data ------------------------------


@each_server
def test_monitor_tells_of_too_little_data_and_when_that_is_over(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    server = factory(monitored("internal.alarm.data.recv: 10 in 1"))
    start = "warning: monitor(1): alarm/data"
    record = wait_for_record(server, "alarm/data [")
    assert record == f"{start} [: 0/0 -> 0/0 internal.recv: 0/10 in 1s.  Session count: 0"
    client = connect(server, peer("echo"), stack)

    def is_over() -> str | None:
        client.exchange(bytes(20))
        return next((message for message in server.messages if "alarm/data ]" in message), None)

    record = eventually(is_over) or ""
    assert re.fullmatch(
        re.escape(f"{start} ]: 0/0 -> 0/0 internal.recv: ")
        + r"\d+/10 in 1s\.  Session count: 1\.  Alarm duration: \d+s",
        record,
    )
    eventually(lambda: len([m for m in alarms(server) if "alarm/data [" in m]) == 2)


@each_server
@pytest.mark.parametrize(
    ("kind", "heard"),
    [
        ("discard", {"internal.recv", "external.send"}),
        ("endless", {"external.recv", "internal.send"}),
    ],
)
def test_monitor_hears_each_side_and_direction(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack, kind: str, heard: set[str]
) -> None:
    """There is traffic in one direction only."""
    ways = ("internal.recv", "internal.send", "external.recv", "external.send")
    server = factory(monitored(*(f"{way.replace('.', '.alarm.data.')}: 100 in 1" for way in ways)))
    for way in ways:
        wait_for_record(server, f"alarm/data [: 0/0 -> 0/0 {way}: 0/100 in 1s.  Session count: 0")
    client = connect(server, peer(kind), stack)
    client.send(bytes(1000) if kind == "discard" else b"")
    for way in heard:
        wait_for_record(server, f"alarm/data ]: 0/0 -> 0/0 {way}: ")
    over = [message for message in alarms(server) if "alarm/data ]" in message]
    assert {message.split()[7].rstrip(":") for message in over} == heard


@each_server
def test_monitor_adds_up_sides_and_directions(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    """Where an alarm names no direction it is about both, and where it names no side, too."""
    names = {
        "alarm.data": "",
        "alarm.data.recv": " recv",
        "alarm.data.send": " send",
        "internal.alarm.data": " internal",
        "external.alarm.data": " external",
    }
    sources = {name: f"127.0.0.{number}" for number, name in enumerate(names, 2)}
    config = HEAD + RULES
    for name, source in sources.items():
        config += rule("monitor", f"from: {source}/32 to: 0/0", "protocol: tcp", f"{name}: 100 in 1")
    server = factory(config)
    target = peer("echo")
    for name, where in names.items():
        way = f"{sources[name]}/32 -> 0/0{where}: "
        wait_for_record(server, f"alarm/data [: {way}0/100 in 1s.  Session count: 0")
    for name, where in names.items():
        client = connect(server, target, stack, sources[name])
        end = f"alarm/data ]: {sources[name]}/32 -> 0/0{where}: "

        def is_over(client: Client = client, end: str = end) -> bool:
            client.exchange(bytes(60))  # in two directions on each side
            return any(end in message for message in server.messages)

        assert eventually(is_over)


def test_monitor_counts_over_all_workers(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    server = wait_for_workers(factory(monitored("internal.alarm.data.recv: 79999 in 1"), "-N", "4"), 4)
    wait_for_record(server, "alarm/data [")
    target = peer("discard")
    clients = [connect(server, target, stack) for _ in range(16)]

    def is_over() -> bool:
        for client in clients:
            client.send(bytes(5000))
        return any("alarm/data ]" in message for message in server.messages)

    assert eventually(is_over)
    assert "Session count: 16." in wait_for_record(server, "alarm/data ]")


def test_monitor_sees_bulk_that_is_spliced(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    server = factory(monitored("external.alarm.data.recv: 30000000 in 1"))
    wait_for_record(server, "alarm/data [")
    client = connect(server, peer("endless"), stack)
    moved = 0
    while not any("alarm/data ]" in message for message in server.messages):
        for _ in range(2000):
            moved += len(client.sock.recv(1 << 20))
        assert moved < 60_000_000_000


def test_monitor_is_the_first_that_matches(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    target = peer("echo")
    config = HEAD + RULES
    for addresses in (
        "from: 127.0.0.2/32 to: 0/0",
        f"from: 0/0 to: 127.0.0.0/8 port = {target.port}",
        ANYBODY,
    ):
        config += rule("monitor", addresses, "protocol: tcp", "internal.alarm.disconnect: 1/1 in 1")
    server = factory(config)
    for source in ("127.0.0.2", "127.0.0.1"):
        connect(server, target, stack, source).close()
    eventually(lambda: len(alarms(server)) == 2)
    assert sorted(alarms(server)) == [
        "warning: monitor(1): alarm/disconnect ]: 127.0.0.2/32 -> 0/0 internal: "
        "1/1 disconnects during last 1s.  Session count: 0",
        f"warning: monitor(2): alarm/disconnect ]: 0/0 -> 127.0.0.0/8 port eq {target.port} internal: "
        "1/1 disconnects during last 1s.  Session count: 0",
    ]


# ------------------------------ alarm.disconnect ------------------------------


@each_server
@pytest.mark.parametrize("side", ["internal", "external"])
def test_monitor_tells_of_many_disconnects_on_one_side(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack, side: str
) -> None:
    disconnects = ("internal.alarm.disconnect: 3/4 in 2", "external.alarm.disconnect: 3/4 in 2")
    server = factory(monitored(*disconnects, CLOCK))
    wait_for_record(server, "alarm/data [")
    target = peer("echo" if side == "internal" else "resetter")
    clients = [connect(server, target, stack) for _ in range(4)]
    for client in clients[:3]:
        if side == "external":
            client.send(b"go")
            with pytest.raises(ConnectionResetError):
                client.receive(10)
        client.close()
    record = wait_for_record(server, "alarm/disconnect")
    assert record == (
        f"warning: monitor(1): alarm/disconnect ]: 0/0 -> 0/0 {side}: "
        "3/4 disconnects during last 2s.  Session count: 1"
    )
    assert len([message for message in alarms(server) if "disconnect" in message]) == 1


def test_monitor_tells_of_many_disconnects_on_whatever_side(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    """In danted such an alarm is never raised, be it one side that closes or both."""
    server = factory(monitored("alarm.disconnect: 2/2 in 2", CLOCK))
    wait_for_record(server, "alarm/data [")
    clients = [connect(server, peer(kind), stack) for kind in ("echo", "resetter")]
    clients[1].send(b"go")
    with pytest.raises(ConnectionResetError):
        clients[1].receive(10)
    clients[0].close()
    record = wait_for_record(server, "alarm/disconnect")
    assert record == (
        "warning: monitor(1): alarm/disconnect ]: 0/0 -> 0/0: "
        "2/2 disconnects during last 2s.  Session count: 0"
    )


def test_monitor_of_disconnects_looks_at_their_ratio(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    config = HEAD + RULES
    for source, ratio in (("127.0.0.2", "2/4"), ("127.0.0.3", "2/4")):
        alarm = f"internal.alarm.disconnect: {ratio} in 2"
        config += rule("monitor", f"from: {source}/32 to: 0/0", alarm, CLOCK)
    server = wait_for_workers(factory(config, "-N", "2"), 2)
    wait_for_record(server, "monitor(2): alarm/data [")
    target = peer("echo")
    few = [connect(server, target, stack, "127.0.0.2") for _ in range(5)]
    many = [connect(server, target, stack, "127.0.0.3") for _ in range(4)]
    for client in (*few[:2], *many[:2]):
        client.close()
    record = wait_for_record(server, "alarm/disconnect")
    assert record == (
        "warning: monitor(2): alarm/disconnect ]: 127.0.0.3/32 -> 0/0 internal: "
        "2/4 disconnects during last 2s.  Session count: 2"
    )
    assert len([message for message in alarms(server) if "disconnect" in message]) == 1


@each_server
def test_monitor_counts_a_refused_connection_as_a_disconnect_outside(
    factory: Factory, peer: StartPeer
) -> None:
    server = factory(monitored("external.alarm.disconnect: 1/1 in 1"))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("refuser").address).code == 5
    wait_for_record(server, "alarm/disconnect ]: 0/0 -> 0/0 external: 1/1 disconnects during last 1s.")


def test_monitor_forgets_the_sessions_of_a_killed_worker(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    server = factory(monitored("internal.alarm.data.recv: 10 in 1"))
    target = peer("echo")
    for _ in range(3):
        connect(server, target, stack)
    (pid,) = {r.pid for r in server.log if r.message.endswith(" running")}
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: read_process(pid) is None)
    eventually(lambda: len([m for m in server.messages if m.endswith(" running")]) == 2)
    server.take_baseline()
    client = connect(server, target, stack)

    def is_over() -> bool:
        client.exchange(bytes(20))
        return any("alarm/data ]" in message for message in server.messages)

    assert eventually(is_over)
    assert "Session count: 1." in wait_for_record(server, "alarm/data ]")


# ------------------------------ the other commands, reload ------------------------------


def test_monitor_counts_what_bind_moves(factory: Factory, stack: contextlib.ExitStack) -> None:
    server = factory(monitored("command: bind bindreply", "external.alarm.data.recv: 10 in 1", protocol=""))
    wait_for_record(server, "alarm/data [")
    client = stack.enter_context(Client(server.addresses[0]))
    bound = client.open5(BIND, "0.0.0.0", 0)
    visitor = stack.enter_context(Client((bound.host, bound.port)))
    assert client.read_reply5().code == 0

    def is_over() -> bool:
        visitor.send(bytes(20))
        client.receive(20)
        return any("alarm/data ]" in message for message in server.messages)

    assert eventually(is_over)


def test_monitor_counts_datagrams_and_those_too_large(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    items = ("internal.alarm.data.recv: 10 in 1", "internal.alarm.mtu-error")
    server = factory(monitored(*items, protocol="protocol: udp"))
    wait_for_record(server, "alarm/data [")
    target = peer("udp-echo")
    control = stack.enter_context(Client(server.addresses[0]))
    reply = control.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
    relay = (reply.host, reply.port)
    udp = stack.enter_context(UdpClient())

    def is_over() -> bool:
        udp.send(relay, *target.address, bytes(20))
        assert len(udp.receive(relay).data) == 20
        return any("alarm/data ]" in message for message in server.messages)

    assert eventually(is_over)
    # With its header it would be longer than a datagram can be.
    target.send(bytes(65507), target.seen[0][1])
    wait_for_record(
        server,
        "monitor(1): alarm/mtu-error ]: 0/0 -> 0/0 internal: 1 packet too large for the path.  ",
    )
    control.reset()


@pytest.mark.parametrize(("alarm", "where"), [("external.alarm", " external"), ("alarm", "")])
def test_monitor_counts_datagrams_too_large_for_the_target(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack, alarm: str, where: str
) -> None:
    """By IPv6 the client can send more than IPv4 takes."""
    config = monitored(f"{alarm}.mtu-error", protocol="protocol: udp")
    server = factory(config.replace("internal: 127.0.0.1", "internal: ::1"))
    control = stack.enter_context(Client(server.addresses[0]))
    reply = control.open5(UDP_ASSOCIATE, "::", 0)
    udp = stack.enter_context(UdpClient(("::1", 0)))
    udp.send((reply.host, reply.port), *peer("udp-echo").address, bytes(65510))
    wait_for_record(
        server,
        f"monitor(1): alarm/mtu-error ]: 0/0 -> 0/0{where}: 1 packet too large for the path.  ",
    )
    control.reset()


def test_monitor_counts_http_requests_one_at_a_time(
    factory: Factory, peer: StartPeer, stack: contextlib.ExitStack
) -> None:
    config = monitored("internal.alarm.data.recv: 10 in 1", "external.alarm.data.recv: 10 in 1")
    server = factory(config.replace("socks pass {", "socks pass {\n    proxyprotocol: http"))
    wait_for_record(server, "alarm/data [: 0/0 -> 0/0 internal.recv")
    target = peer("origin")
    client = stack.enter_context(Client(server.addresses[0]))

    def is_over() -> bool:
        client.send(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: origin\r\n\r\n" % target.port)
        answer = b""
        while not answer.endswith(b"origin\n"):
            answer += client.receive(1)
        return sum("alarm/data ]" in message for message in server.messages) == 2

    assert eventually(is_over)
    for side in ("internal", "external"):
        record = wait_for_record(server, f"alarm/data ]: 0/0 -> 0/0 {side}.recv")
        assert re.search(r"Session count: [01]\.", record)  # of a request that is over none is left


@each_server
def test_monitor_forgets_its_alarms_at_sighup_without_a_word(factory: Factory) -> None:
    server = factory(monitored("internal.alarm.data.recv: 10 in 1"))
    wait_for_record(server, "alarm/data [")
    server.signal(signal.SIGHUP)
    eventually(lambda: len(alarms(server)) == 2)
    assert all("alarm/data [" in message for message in alarms(server))


def test_monitor_begins_anew_with_a_new_configuration(factory: Factory) -> None:
    server = factory(monitored("internal.alarm.data.recv: 10 in 1"))
    wait_for_record(server, "alarm/data [")
    server.reload(monitored("external.alarm.data.send: 20 in 1"))
    wait_for_record(server, "alarm/data [: 0/0 -> 0/0 external.send: 0/20 in 1s.  Session count: 0")
    server.take_baseline()


# ------------------------------ the counting itself ------------------------------


def make_watches(*items: str) -> tuple[program.Counts, list[program.Watch]]:
    config, complaints = program.parse_config(monitored(*items), "x", program.SystemSurroundings())
    assert config, complaints
    counts = program.make_counts(config, 2)
    assert counts
    return counts, program.make_watches(config, counts)


def test_monitor_looks_at_alarms_in_dantes_order() -> None:
    _, watches = make_watches(
        "internal.alarm.data.send: 1 in 1",
        "internal.alarm.data.recv: 1 in 1",
        "external.alarm.data: 1 in 1",
        "internal.alarm.disconnect: 1/1",
    )
    assert [watch.where for watch in watches] == [
        "0/0 -> 0/0 internal",
        "0/0 -> 0/0 external",
        "0/0 -> 0/0 internal.recv",
        "0/0 -> 0/0 internal.send",
    ]


@pytest.mark.parametrize(
    ("alarm", "where", "amount"),
    [
        ("alarm.data: 5 in 1", "", 15),
        ("internal.alarm.data: 5 in 1", " internal", 3),
        ("external.alarm.data: 5 in 1", " external", 12),
        ("alarm.data.send: 5 in 1", " send", 10),
    ],
)
def test_monitor_adds_up_what_an_alarm_is_about(alarm: str, where: str, amount: int) -> None:
    counts, (watch,) = make_watches(alarm)
    meter = counts.meter(program.Monitor(1, program.EVERYWHERE, program.EVERYWHERE))
    watch.start(0.0)
    assert watch.check(1.0) == (f"monitor(1): alarm/data [: 0/0 -> 0/0{where}: 0/5 in 1s.  Session count: 1")
    meter.count((1, 2, 4, 8))
    expected = f"monitor(1): alarm/data ]: 0/0 -> 0/0{where}: {amount}/5 in 1s.  Session count: 1.  "
    assert watch.check(3.0) == (expected + "Alarm duration: 2s" if amount > 5 else "")


def test_monitor_that_was_held_up_takes_no_time_of_no_length_for_silence() -> None:
    counts, (watch,) = make_watches("alarm.data: 5 in 1")
    meter = counts.meter(program.Monitor(1, program.EVERYWHERE, program.EVERYWHERE))
    watch.start(0.0)
    meter.count((100, 0, 0, 0))
    assert watch.check(10.0) == ""
    assert watch.due == 11.0


@pytest.mark.parametrize("junk", [b"\xff", b"\x7f", b"\x00"])
def test_monitor_bears_memory_that_a_hijacked_worker_wrote(junk: bytes) -> None:
    counts, watches = make_watches("alarm.data: 5 in 1", "alarm.disconnect: 1/1", "internal.alarm.mtu-error")
    meter = counts.meter(program.Monitor(1, program.EVERYWHERE, program.EVERYWHERE))
    for now in (1.0, 2.0):
        counts.words.cast("B")[:] = junk * (len(counts.words) * 8)
        meter.count((int(now), 2, 3, 4))
        for watch in watches:
            watch.check(now)
    meter.disconnect("internal")
    meter.close()
    counts.forget(0)


def test_monitor_costs_nothing_where_there_is_none() -> None:
    config, _ = program.parse_config(HEAD + RULES, "x", program.SystemSurroundings())
    assert config and program.make_watches(config, program.make_counts(config, 1)) == []
