"""sockd and Debian's danted get the same configuration and the same clients, and must do the same.

Compared are every byte of every reply (a free port aside), how each connection ended, what the
targets saw, and every line of the log with its addresses as the parts that they play.  Where sockd
differs on purpose the case says so with `Unlike`, and gives both sides.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import servers
from conftest import need_danted
from conversation import (
    Talk, answer, answered, associate, bind, bytewise, close_visitor, connect, connect4, cut, datagram, end,
    end_of, fin, fin_of, first_reply, first_seen, first_reply4, go_on, hear, hello, log_in, logged, method, no_more_visitors, open_connection,
    open_udp, over, over_of, password, password_status, ping, raw_datagram, reply, reply4, reset,
    same_port, saw, second_reply, second_reply4, send, unasked, v4, v5, visit,
)  # fmt: skip
from peers import Company
from servers import Danted, Server, Sockd, World, eventually

pytestmark = [pytest.mark.root, pytest.mark.dante]


@dataclass(frozen=True)
class Unlike:
    """A difference on purpose: lines of danted's transcript, and what sockd has for each.

    In `danted` an ellipsis stands for any text; in `sockd` {0} is what the first one stood for.
    """

    reason: str
    danted: str
    sockd: tuple[str, ...] = ()

    def match(self, line: str) -> re.Match[str] | None:
        """Match a line of danted's transcript."""
        return re.fullmatch("(.*?)".join(map(re.escape, self.danted.split("…"))), line)


@dataclass(frozen=True)
class Case:
    """A script, the address that its client comes from (a network: any there), and differences."""

    name: str
    script: tuple[Any, ...] = field(repr=False)
    source: str = field(default="127.77.", repr=False)
    unlike: tuple[Unlike, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Group:
    """Cases that share a configuration, and so one start of each server."""

    name: str
    config: str = field(repr=False)
    cases: tuple[Case, ...] = field(repr=False)
    at_once: int = field(default=1, repr=False)  # how many cases run side by side, where they mostly wait


@dataclass
class Outcome:
    """What came of a group with one server: a transcript a case, and how the server ended."""

    transcripts: dict[str, list[str]] = field(default_factory=dict)
    unattributed: list[str] = field(default_factory=list)
    trouble: str = ""


# ------------------------------ running ------------------------------


def run_group(group: Group, kind: type[Server], folder: Path, world: World) -> Outcome:
    """Start a server, run every case of the group, stop it, and give what came of it."""
    outcome = Outcome()
    server = kind(group.config, folder, (), world)
    try:
        with ThreadPoolExecutor(group.at_once) as pool:
            talks = list(pool.map(lambda case: run_case(case, server), numbered(group.cases)))
        if logs_both_ends_of_sessions(group.config):
            eventually_balanced(server)
    finally:
        try:
            server.close()
        except AssertionError as error:
            outcome.trouble = f"{error}\n{server.text}"
    outcome.transcripts = {case.name: talk.lines for case, talk in zip(group.cases, talks)}
    add_log_lines(outcome, list(zip((case.name for case in group.cases), talks)), server)
    return outcome


def numbered(cases: tuple[Case, ...]) -> Iterator[tuple[int, Case]]:
    """Number the cases, for an address each."""
    return enumerate(cases, 1)


def run_case(numbered_case: tuple[int, Case], server: Server) -> Talk:
    """Run one case from an address of its own, so that its log lines can be told from others."""
    number, case = numbered_case
    source = f"{case.source}{number // 250}.{number % 250 + 1}" if case.source.endswith(".") else case.source
    with Company() as company:
        talk = Talk(server, source, company)
        talk.run(case.script)
    return talk


def logs_both_ends_of_sessions(config: str) -> bool:
    """Tell whether each session that the log shows beginning will be shown ending."""
    return CLIENT_PASS in config


def eventually_balanced(server: Server) -> None:
    """Wait until every session of the log has ended."""

    def is_balanced() -> bool:
        messages = [record.message for record in server.log]
        begun = sum("tcp/accept [" in message for message in messages)
        ended = sum("tcp/accept ]" in message for message in messages)
        return ended >= begun

    try:
        eventually(is_balanced)
    except AssertionError:
        return  # the comparison shows which line is missing


def add_log_lines(outcome: Outcome, talks: list[tuple[str, Talk]], server: Server) -> None:
    """Add each log record to the transcript of the conversation that it is about."""
    for record in server.log:
        owners = [name_talk for name_talk in talks if name_talk[1].is_about(record)]
        # A relay that nothing was sent to is logged without its client.
        owners = owners or [name_talk for name_talk in talks if name_talk[1].is_about_relay(record)]
        for name, talk in owners:
            outcome.transcripts[name].append(f"log: {talk.mask(record)}")
        if not owners:
            outcome.unattributed.append(str(record))


def expect(danted: list[str], differences: tuple[Unlike, ...]) -> list[str]:
    """Give danted's transcript with the differences on purpose made."""
    lines = list(danted)
    for difference in differences:
        found = [difference.match(line) for line in lines]
        assert any(found), f"danted does not do this: {difference.danted}"
        changed: list[str] = []
        for line, match in zip(lines, found):
            changed += [new.format(*match.groups()) for new in difference.sockd] if match else [line]
        lines = changed
    return lines


GLOBALS = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
clientmethod: none
socksmethod: {methods}
user.privileged: root
user.unprivileged: nobody
{more}
"""
CLIENT_PASS = "client pass { from: 0/0 to: 0/0\n log: connect disconnect error }\n"
SOCKS_PASS = "socks pass { from: 0/0 to: 0/0\n log: connect disconnect error ioop }\n"


def conf(*rules: str, methods: str = "none", more: str = "") -> str:
    """Give a configuration with the usual globals."""
    return GLOBALS.format(methods=methods, more=more) + "".join(rules)


# ------------------------------ the table ------------------------------

GROUPS: list[Group] = []

UNKNOWN_COMMAND = "RFC 1928 has a reply for an unknown command; danted hangs up"
UNKNOWN_TYPE = "RFC 1928 has a reply for an unknown address type; danted hangs up and logs the command"
REJECTED4 = "a SOCKS 4 client is owed its rejection, and command 3 is like any other"
SOCKS4A = "danted has no SOCKS 4A: it takes 0.0.0.x for the address and the name for payload"
NUL_IN_NAME = "danted cuts a name at a NUL, so that rules and logs see another name than was sent"
PIPELINED = "danted does not count what came behind the request"
LABELS = "danted lets .example.test match xexample.test"
COLON = "danted reads `port: N` and then matches every port"
STRANGERS = "a stranger does not end the BIND, or any port scanner could"
EARLY = "what the client sends before its peer has come is kept for the peer"
SIDES = "danted swaps the sides in the close reason of a BIND"
VERSION4 = "CVE-2024-54662: SOCKS 4 has no authentication, so a client-rule that wants some refuses it"
ONE_CLIENT = "datagrams are taken from the host of the TCP connection only"
EACH_SENDER = "each sender of a reply is judged, not only the first"
BOTH_FAMILIES = "danted counts only the last family at accept level"

SESSION_LOG = (
    "log: info: pass({rule}): tcp/connect [: CLIENT SERVER -> 127.0.0.1.* 127.0.0.1.echo",
    "log: info: pass({rule}): tcp/connect -: CLIENT SERVER -> 127.0.0.1.* 127.0.0.1.echo (0)",
    "log: info: pass({rule}): tcp/connect ]: 0 -> CLIENT SERVER -> 0, 0 -> 127.0.0.1.* 127.0.0.1.echo -> 0: "
    "local client closed.  Session duration: _s",
)
CLOSED_AT_ACCEPT = "log: info: pass(1): tcp/accept ]: 0 -> CLIENT SERVER -> 0: {}.  Session duration: _s"
CLIENT_CLOSED_BIND = tuple(
    Unlike(SIDES, f"log: …{event} ]: …: remote peer closed.…", (f"log: {{0}}{event} ]: {{1}}: local client closed.{{2}}",))
    for event in ("tcp/bindreply", "tcp/accept")
)
PEER_CLOSED_BIND = tuple(
    Unlike(SIDES, f"log: …{event} ]: …: local client closed.…", (f"log: {{0}}{event} ]: {{1}}: remote peer closed.{{2}}",))
    for event in ("tcp/bindreply", "tcp/accept")
)
ALL_PIPELINED = Unlike(PIPELINED, "log: …tcp/connect ]: … -> …CLIENT SERVER -> …, … -> …", ("log: {0}tcp/connect ]: {1} -> {2}CLIENT SERVER -> {4}, {4} -> {5}",))


def unresolved(name: str) -> tuple[str, ...]:
    """Give the log lines for a name that nobody knows."""
    text = f'could not resolve hostname "{name}": Name or service not known for IPv4 address'
    return (
        f"log: info: block(1): tcp/connect ]: CLIENT SERVER: {text}",
        f"log: info: block(1): tcp/accept ]: CLIENT SERVER: request was not performed due to error: {text}",
    )


def stranger_goes(target: str, rule: int, ioop: bool = False) -> tuple[Unlike, ...]:
    """Give the difference for a BIND that goes on after somebody else has connected."""
    read = ("log: info: pass({0}): tcp/bindreply -: VISITOR BOUND -> SERVER CLIENT (0)",) if ioop else ()
    after = (
        "log: info: pass({0}): tcp/bindreply [: VISITOR BOUND -> SERVER CLIENT",
        *read,
        "log: info: pass({0}): tcp/bindreply ]: 0 -> VISITOR BOUND -> 0, 0 -> SERVER CLIENT -> 0: "
        "remote peer closed.  Session duration: _s",
        f"log: info: pass(1): tcp/bind ]: CLIENT SERVER -> BOUND {target}",
    )
    return (
        Unlike(STRANGERS, "visitor: refused"),
        Unlike(STRANGERS, "second reply: …", ("second reply: 05 00 00 01 VISITOR",)),
        Unlike(STRANGERS, "log: …tcp/bind ]…", tuple(line.replace("{0}", str(rule)) for line in after)),
        Unlike(STRANGERS, "log: …tcp/accept ]…", (CLOSED_AT_ACCEPT.format("remote peer closed"),)),
    )


def refused_v4(wanted: str) -> Unlike:
    """Give how sockd records a SOCKS 4 client where a client-rule wants authentication."""
    text = f'client-rule #1 requires SOCKS authentication to be "{wanted}", but SOCKS v4 has none'
    line = f"log: info: block(1): tcp/accept ]: CLIENT SERVER: error after reading 9 bytes in _ seconds: {text}"
    return Unlike(VERSION4, "log: …tcp/accept ]…", (line,))


REFUSED_V4 = (refused_v4("username"),)
REFUSED_V4_THAT_PASSED = (
    *REFUSED_V4,
    Unlike(VERSION4, "reply: 00 5a …", ("reply: 00 5b REQUESTED",)),
    Unlike(VERSION4, "log: …tcp/connect…"),
)


OPEN = Group(
    "open",
    conf(CLIENT_PASS, SOCKS_PASS),
    (
        Case("v5 connect by address", (connect("echo"), ping(), fin, end, saw("echo"))),
        Case("v5 connect by name", (connect("echo.test/echo"), ping(), fin, end)),
        Case("v5 connect to a name that is an address", (connect("=127.0.0.1/echo"), ping(), fin, end)),
        Case("v5 connect to a name that is a number", (connect("=2130706433/echo"), ping(), fin, end)),
        Case("v5 connect to a mapped address", (connect("::ffff:127.0.0.1/echo"), ping(), fin, end)),
        Case("v5 connect by a name of two addresses", (connect("multi.test/echo"), ping(), fin, end)),
        Case("v5 connect by a name with a NUL", (connect("=echo.test\0x/echo"), fin, end), unlike=(
            Unlike(NUL_IN_NAME, "reply: 05 00 …", ("reply: 05 04 00 03 REQUESTED",)),
            Unlike(NUL_IN_NAME, "log: …tcp/connect ]…", ('log: info: block(1): tcp/connect ]: CLIENT SERVER: could not resolve hostname "echo.test\\0x": the name has a NUL',)),
            Unlike(NUL_IN_NAME, "log: …tcp/connect […"),
            Unlike(NUL_IN_NAME, "log: …tcp/connect -…"),
            Unlike(NUL_IN_NAME, "log: …tcp/accept ]…", ('log: info: block(1): tcp/accept ]: CLIENT SERVER: request was not performed due to error: could not resolve hostname "echo.test\\0x": the name has a NUL',)),
        )),
        Case("v5 connect takes the client's port outside", (connect("echo"), same_port("echo"))),
        Case("v4 connect", (connect4("echo"), ping(), fin, end, saw("echo"))),
        Case("v4 user-id of 255 bytes", (send(v4("connect", "echo", b"u" * 255)), reply4, ping(), fin, end)),
        Case("v4 user-id of 1000 bytes", (send(v4("connect", "echo", b"u" * 1000)), reply4, ping(), fin, end)),
        Case("v4a connect by name", (send(v4("connect", "echo.test/echo", b"u")), reply4, fin, end), unlike=(
            Unlike(SOCKS4A, "reply: 00 5b …", ("reply: 00 5a 127.0.0.1.*",)),
            Unlike(SOCKS4A, "log: …tcp/connect ]…", tuple(line.replace("{rule}", "1") for line in SESSION_LOG)),
            Unlike(SOCKS4A, "log: …tcp/accept ]…", (CLOSED_AT_ACCEPT.format("local client closed"),)),
        )),
        Case("v4a unknown name", (send(v4("connect", "nowhere.test/echo", b"u")), reply4, fin, end), unlike=(
            Unlike(SOCKS4A, "reply: 00 5b …", ("reply: 00 5b 0.0.0.0.0",)),
            Unlike(SOCKS4A, "log: …tcp/connect ]…", unresolved("nowhere.test")[:1]),
            Unlike(SOCKS4A, "log: …tcp/accept ]…", unresolved("nowhere.test")[1:]),
        )),
        Case("v5 refused", (connect("refuser"), over)),
        Case("v4 refused", (connect4("refuser"), over)),
        Case("v5 refused by name", (connect("two.test/echo"), over)),
        Case("v5 network unreachable", (connect("203.0.113.1/80"), end)),
        Case("v4 network unreachable", (connect4("203.0.113.1/80"), end)),
        Case("v5 host unreachable", (connect("198.51.100.1/80"), end)),
        Case("v5 host unreachable by name", (connect("far.test/80"), end)),
        Case("v4 host unreachable", (connect4("198.51.100.1/80"), end)),
        Case("v5 prohibited", (connect("198.51.100.2/80"), end)),
        Case("v5 invalid route", (connect("198.51.100.3/80"), end)),
        Case("v5 multicast", (connect("224.0.0.1/80"), end)),
        Case("v5 broadcast", (connect("255.255.255.255/80"), end)),
        Case("v5 unknown name", (connect("nowhere.test/80"), end)),
        Case("v5 name of 255 bytes", (connect("=" + "n" * 255 + "/80"), end)),
        Case("v5 empty name", (connect("=/80"), end)),
        Case("v5 name with odd bytes", (connect("=a b\n\xff\"/80"), end)),
        Case("v5 port 0", (connect("127.0.0.1/0"), end)),
        Case("v4 port 0", (connect4("127.0.0.1/0"), end)),
        Case("v5 name with port 0", (connect("echo.test/0"), end)),
        Case("v5 address 0.0.0.0", (connect("0.0.0.0/echo"), end)),
        Case("v4 address 0.0.0.0", (connect4("0.0.0.0/echo"), end)),
        Case("v5 address ::", (connect("::/echo"), end)),
        Case("v5 IPv6 address without IPv6 outside", (connect("::1/echo"), end)),
        Case("v5 name of an IPv6 address without IPv6 outside", (connect("six.test/echo"), end)),
        Case("v5 name of both families without IPv6 outside", (connect("both.test/echo"), ping(), fin, end)),
    ),
)
GARBAGE = Group(
    "garbage",
    conf(CLIENT_PASS, SOCKS_PASS),
    (
        *(
            Case(f"first byte {byte:#04x}", (send(bytes([byte])), end))
            for byte in (0, 1, 3, 6, 0x47, 0x80, 0xFF)
        ),
        Case("HTTP GET", (send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), over)),
        Case("HTTP CONNECT", (send(b"CONNECT echo.test:80 HTTP/1.1\r\n\r\n"), over)),
        Case("TLS", (send(bytes.fromhex("16030100c8010000c40303")), over)),
        Case("no methods", (send(hello()), method, end)),
        Case("method unknown", (send(hello(0x80)), method, end)),
        Case("method 255", (send(hello(255)), method, end)),
        Case("password only", (send(hello(2)), method, end)),
        Case("all 255 methods", (send(hello(*range(255))), method, send(v5("connect", "echo")), reply, ping())),
        Case("same method twice", (send(hello(0, 0)), method, send(v5("connect", "echo")), reply, ping())),
        Case("reserved byte set", (send(hello(0)), method, send(v5("connect", "echo", reserved=0x77)), reply, ping())),
        Case("v4 request after v5 greeting", (send(hello(0)), method, send(v4("connect", "echo")), reply4, ping())),
        *(
            Case(
                f"v5 command {number}",
                (send(hello(0)), method, send(v5(number, "echo")), reply, end),
                unlike=(Unlike(UNKNOWN_COMMAND, "reply: fin", ("reply: 05 07 00 01 0.0.0.0.0", "client end: fin")),),
            )
            for number in (0, 4, 9, 0xF0)
        ),
        *(
            Case(
                f"v5 address type {atyp}",
                (send(hello(0)), method, send(bytes([5, 1, 0, atyp, 127, 0, 0, 1, 0, 80])), reply, end),
                unlike=(
                    Unlike(UNKNOWN_TYPE, "reply: fin", ("reply: 05 08 00 01 0.0.0.0.0", "client end: fin")),
                    Unlike(UNKNOWN_TYPE, "log: …command: 1", (f"log: {{0}}address type: {atyp}",)),
                ),
            )
            for atyp in (0, 2, 5, 0xFF)
        ),
        *(
            Case(f"v5 request of version {version}", (send(hello(0)), method, send(v5(1, "echo", version)), over))
            for version in (0, 1, 6)
        ),
        Case(
            "v4 command 3",
            (send(v4(3, "echo")), reply4, end),
            unlike=(
                Unlike(REJECTED4, "reply: …", ("reply: 00 5b 0.0.0.0.0",)),
                Unlike(REJECTED4, "log: …udp/unknown…"),
                Unlike(REJECTED4, "log: …tcp/accept ]…", ("log: info: block(1): tcp/accept ]: CLIENT SERVER: error after reading 2 bytes in _ seconds: unknown socks_v4 command: 3",)),
            ),
        ),
        *(
            Case(
                f"v4 command {number}",
                (send(v4(number, "echo")), reply4, end),
                unlike=(Unlike(REJECTED4, "reply: fin", ("reply: 00 5b 0.0.0.0.0", "client end: fin")),),
            )
            for number in (0, 9)
        ),
        Case("end before a byte", (open_connection, fin, end)),
        Case("end after version", (send(b"\5"), fin, end)),
        Case("end in methods", (send(b"\5\2\0"), fin, end)),
        Case("end after greeting", (send(hello(0)), method, fin, end)),
        *(
            Case(f"end after {count} bytes of request", (send(hello(0)), method, send(cut(v5(1, "echo"), count)), fin, end))
            for count in (1, 2, 3, 4, 5, 8, 9)
        ),
        Case("end in name", (send(hello(0)), method, send(cut(v5(1, "echo.test/echo"), 8)), fin, end)),
        *(
            Case(f"end after {count} bytes of v4 request", (send(cut(v4(1, "echo", b"user"), count)), fin, end))
            for count in (1, 2, 4, 8, 10)
        ),
        Case("reset before a byte", (open_connection, reset)),
        Case("reset after greeting", (send(hello(0)), method, reset)),
    ),
)
RELAY = Group(
    "relay",
    conf(CLIENT_PASS, "socks pass { from: 0/0 to: 0/0\n log: connect disconnect error }\n"),
    (
        Case("v5 bytewise", (bytewise, connect("echo.test/echo"), ping(), fin, end)),
        Case("v4 bytewise", (bytewise, send(v4(1, "echo", b"user")), reply4, ping(), fin, end)),
        Case("v5 in one segment with payload", (send(hello(0), v5(1, "echo"), b"ping"), method, reply, hear(4), fin, end), unlike=(ALL_PIPELINED,)),
        Case("v4 in one segment with payload", (send(v4(1, "echo"), b"ping"), reply4, hear(4), fin, end), unlike=(ALL_PIPELINED,)),
        Case("40000 bytes behind the request", (send(hello(0), v5(1, "echo"), b"x" * 40000), method, reply, hear(40000), fin, end), unlike=(ALL_PIPELINED,)),
        Case("end right behind the request", (send(hello(0), v5(1, "farewell"), b"ping"), fin, method, reply, hear(8), end, saw("farewell")), unlike=(ALL_PIPELINED,)),
        Case("payload behind a refused request", (send(hello(0), v5(1, "refuser"), b"ping"), method, reply, over)),
        Case("client ends first", (connect("farewell"), send(b"ping"), fin, hear(8), end, saw("farewell"))),
        Case("target ends first", (connect("half-closer"), hear(5), end, send(b"ping"), fin, saw("half-closer"))),
        Case("target closes after data", (connect("greeter"), hear(5), end)),
        Case("target closes at once", (connect("closer"), end)),
        Case("target sends a megabyte", (connect("sender"), hear(1_000_000), end)),
        Case("client sends a megabyte", (connect("discard"), send(b"x" * 1_000_000), fin, end, saw("discard"))),
        Case("client resets", (connect("echo"), ping(), reset, saw("echo"))),
        Case("target resets", (connect("resetter"), send(b"ping"), end)),
        Case("client resets while the target waits", (connect("discard"), reset, saw("discard"))),
    ),
)
GROUPS += [OPEN, GARBAGE, RELAY]


LOG_CASES = (
    Case("session", (connect("echo"), ping(b"a\tb\n\0\x80\\\"c"), fin, end)),
    Case("refused", (connect("refuser"), over)),
    Case("unreachable", (connect("203.0.113.1/80"), end)),
    Case("blocked", (connect("127.0.0.2/80"), end)),
    Case("blocked by no rule", (connect("127.0.0.3/80"), end)),
    Case("client blocked", (open_connection, end), source="127.66."),
    Case("garbage", (send(b"\6"), end)),
    Case("end in greeting", (send(b"\5"), fin, end)),
)


def logging_group(words: str) -> Group:
    """Give a group whose rules all log the same."""
    log = f"\n log: {words}" if words else ""
    rules = (
        f"client block {{ from: 127.66.0.0/16 to: 0/0{log} }}\n",
        f"client pass {{ from: 0/0 to: 0/0{log} }}\n",
        f"socks block {{ from: 0/0 to: 127.0.0.2/32{log} }}\n",
        f"socks pass {{ from: 0/0 to: 127.0.0.1/32{log} }}\n",
        f"socks pass {{ from: 0/0 to: 203.0.113.0/24{log} }}\n",
    )
    return Group(f"log {words or 'nothing'}", conf(*rules), LOG_CASES)


LOGS = [
    logging_group(words)
    for words in ("", "connect", "disconnect", "error", "ioop", "data", "connect disconnect error data ioop")
]
RULES = Group(
    "rules",
    conf(
        "client block { from: 127.66.0.0/16 to: 0/0\n log: connect error }\n",
        "client pass { from: 127.67.0.0/16 to: 127.0.0.1/32\n log: connect error }\n",
        "client block { from: 127.68.0.0/16 port 1-65535 to: 0/0\n log: error }\n",
        "client pass { from: client.example.test to: 0/0\n log: connect error }\n",
        "client pass { from: 127.77.0.0/16 to: 0/0\n log: connect disconnect error }\n",
        "socks block { from: 0/0 to: 127.0.0.2/32\n log: connect error }\n",  # 1
        "socks block { from: 0/0 to: 0/0 port = 79\n log: connect error }\n",
        "socks block { from: 0/0 to: 0/0 port < 10\n log: connect error }\n",
        "socks block { from: 0/0 to: 0/0 port 81-90\n log: connect error }\n",
        "socks block { from: 0/0 to: 0/0 port <= 11\n log: connect error }\n",
        "socks block { from: 0/0 to: 203.0.113.0/24\n log: connect error }\n",  # 6
        "socks block { from: 0/0 to: echo.test port = 91\n log: connect error }\n",
        "socks block { from: 0/0 to: .example.test port = 92\n log: connect error }\n",
        "socks block { from: 0/0 to: . port = 93\n log: connect error }\n",
        "socks block { from: 0/0 to: ::/0 port = 94\n log: connect error }\n",
        "socks block { from: 0/0 to: 0.0.0.0/0 port = 95\n log: connect error }\n",  # 11
        "socks block { from: 127.67.0.0/16 to: 0/0 port = 96\n log: connect error }\n",
        "socks block { from: 0/0 to: 0/0 port = 97\n proxyprotocol: socks_v4\n log: connect error }\n",
        "socks block { from: 0/0 to: 0/0 port = 98\n command: bind udpassociate\n log: connect error }\n",
        "socks block { from: 0/0 to: 0/0 port = 98\n command: connect\n log: connect error }\n",
        "socks block { from: 0/0 to: 0/0 port = 99\n protocol: udp\n log: connect error }\n",  # 16
        "socks block { from: 0/0 to: lo port = 100\n log: connect error }\n",
        "socks block { from: 0/0 to: two.test port = 101\n log: connect error }\n",
        "socks block { from: 0/0 to: nowhere.test port = 102\n log: connect error }\n",
        "socks block { from: 0/0 to: 0/0 port > 65534\n log: connect error }\n",
        "socks block { from: 0/0 to: 0/0 port 90-111\n log: connect error }\n",  # 21
        "socks pass { from: 0/0 to: 127.0.0.1/32\n log: connect error }\n",
        "socks pass { from: 0/0 to: .example.test\n log: connect error }\n",
    ),
    (
        Case("client-rule blocks", (open_connection, end), source="127.66."),
        Case("client-rule blocks one who has spoken", (send(hello(0)), over), source="127.66."),
        Case("client-rule passes one network", (connect("echo"), ping()), source="127.67."),
        Case("client-rule blocks by source port", (open_connection, end), source="127.68."),
        Case("client-rule passes a host name", (connect("echo"), ping()), source="127.0.0.5"),
        Case("no client-rule", (open_connection, end), source="127.69."),
        Case("socks block by address", (connect("127.0.0.2/80"), end)),
        Case("socks block by address of a name", (connect("two.test/80"), end)),
        Case("socks block by one address of a name", (connect("multi.test/80"), end)),
        Case("v4 blocked", (connect4("127.0.0.2/80"), end)),
        Case("port equal", (connect("127.0.0.1/79"), end)),
        Case("port less", (connect("127.0.0.1/9"), end)),
        Case("port not less, but less or equal", (connect("127.0.0.1/10"), end)),
        Case("port less or equal", (connect("127.0.0.1/11"), end)),
        Case("port above less or equal", (connect("127.0.0.1/12"), over)),
        Case("port range low", (connect("127.0.0.1/81"), end)),
        Case("port range high", (connect("127.0.0.1/90"), end)),
        Case("port below range", (connect("127.0.0.1/80"), over)),
        Case("port greater", (connect("127.0.0.1/65535"), end)),
        Case("network", (connect("203.0.113.77/80"), end)),
        Case("outside every pass rule", (connect("127.0.0.9/80"), end)),
        Case("host name by the same name", (connect("echo.test/91"), end)),
        Case("host name in other case", (connect("ECHO.Test/91"), end)),
        Case("host name by its address", (connect("127.0.0.1/91"), end)),
        Case("host name by another name of its address", (connect("example.test/91"), end)),
        Case("domain by a name in it", (connect("www.example.test/92"), end)),
        Case("domain by itself", (connect("example.test/92"), end)),
        Case("domain in other case", (connect("WWW.EXAMPLE.TEST/92"), end)),
        Case("domain by an address in it", (connect("127.0.0.5/92"), end)),
        Case("domain by another name", (connect("echo.test/92"), end)),
        Case("domain by a name with the same tail", (connect("xexample.test/92"), end), unlike=(
            Unlike(LABELS, "log: …block(8): …", ("log: {0}block(21): {1}",)),
            Unlike(LABELS, "log: …socks-rule #8", ("log: {0}socks-rule #21",)),
        )),
        Case("lone dot by a name", (connect("echo.test/93"), end)),
        Case("lone dot by an address with a name", (connect("127.0.0.1/93"), end)),
        Case("lone dot by an address without a name", (connect("127.0.0.88/93"), end)),
        Case("IPv6 network by an IPv4 address", (connect("127.0.0.1/94"), end)),
        Case("IPv4 network by a name", (connect("echo.test/95"), end)),
        Case("from a client's network", (connect("127.0.0.1/96"), end), source="127.67."),
        Case("from another network", (connect("127.0.0.1/96"), end)),
        Case("proxyprotocol v4 by v5", (connect("127.0.0.1/97"), end)),
        Case("proxyprotocol v4 by v4", (connect4("127.0.0.1/97"), end)),
        Case("command list", (connect("127.0.0.1/98"), end)),
        Case("protocol udp", (connect("127.0.0.1/99"), end)),
        Case("interface by its address", (connect("127.0.0.1/100"), end)),
        Case("interface by an address of its network", (connect("127.0.0.3/100"), end)),
        Case("host name of another address", (connect("127.0.0.1/101"), end)),
        Case("rule of an unknown name", (connect("127.0.0.1/102"), end)),
        Case("pass by domain", (connect("www.example.test/echo"), ping())),
        Case("unknown name before any rule", (connect("nowhere.test/79"), end)),
    ),
)
PORT_COLON = Group(
    "port with a colon",
    conf(CLIENT_PASS, "socks block { from: 0/0 to: 127.0.0.1/32 port: 79\n log: connect error }\n", SOCKS_PASS),
    (
        Case("that port", (connect("127.0.0.1/79"), end)),
        Case("another port", (connect("127.0.0.1/80"), over), unlike=(
            Unlike(COLON, "reply: …", ("reply: 05 05 00 01 127.0.0.1.*",)),
            Unlike(COLON, "log: …tcp/connect ]…", ("log: info: pass(2): tcp/connect ]: 0 -> CLIENT SERVER -> 0, 0 -> 127.0.0.1.* 127.0.0.1.80 -> 0: remote peer error (Connection refused).  Session duration: _s",)),
            Unlike(COLON, "log: …tcp/accept ]…", (CLOSED_AT_ACCEPT.format("remote peer error (Connection refused)"),)),
        )),
    ),
)
NO_CLIENT_RULE = Group(
    "no client-rule",
    conf(SOCKS_PASS),
    (
        Case("silent client", (open_connection, end)),
        Case("talking client", (send(hello(0)), over)),
    ),
)
NO_SOCKS_RULE = Group(
    "no socks-rule",
    conf(CLIENT_PASS),
    (
        Case("v5", (connect("127.0.0.1/80"), end)),
        Case("v5 by name", (connect("echo.test/80"), end)),
        Case("v4", (connect4("127.0.0.1/80"), end)),
        Case("bind", (bind("127.0.0.1/80"), end)),
        Case("udpassociate", (send(hello(0)), method, send(v5("udpassociate", "0.0.0.0/0")), reply, end)),
    ),
)
COMMANDS_BY_RULE = Group(
    "commands",
    conf(
        CLIENT_PASS,
        "socks pass { from: 0/0 to: 0/0\n command: connect\n proxyprotocol: socks_v5\n log: connect error }\n",
        "socks pass { from: 0/0 to: 0/0\n command: bind\n proxyprotocol: socks_v4\n log: connect error }\n",
    ),
    (
        Case("connect v5", (connect("echo"), ping())),
        Case("connect v4", (connect4("echo"), end)),
        Case("bind v5", (bind("127.0.0.1/80"), end)),
        Case("bind v4", (send(v4("bind", "127.0.0.1/80")), first_reply4)),
        Case("udpassociate", (send(hello(0)), method, send(v5("udpassociate", "0.0.0.0/0")), reply, end)),
    ),
)


def methods_group(name: str, methods: str, client: str = "", v4: tuple[Unlike, ...] = ()) -> Group:
    """Give a group about which method is chosen, under a global list and a client-rule's list."""
    client_rule = f"client pass {{ from: 0/0 to: 0/0{client}\n log: connect disconnect error }}\n"
    offers = {"none": (0,), "password": (2,), "both": (0, 2), "both turned": (2, 0), "other": (1, 3)}
    cases = [Case(f"offer {offer}", (send(hello(*codes)), method, fin, end)) for offer, codes in offers.items()]
    cases.append(Case("v4", (connect4("echo"), fin, over), unlike=v4))
    cases.append(Case("v5 without password", (send(hello(0)), method, go_on, send(v5(1, "echo")), reply, ping())))
    cases.append(Case("v5 with password", (log_in("alice", "wonderland"), send(v5(1, "echo")), reply, ping())))
    config = conf(client_rule, SOCKS_PASS, methods=methods)
    return Group(f"methods {name}", config, tuple(cases))


METHODS = [
    methods_group("none", "none"),
    methods_group("username", "username", v4=REFUSED_V4),
    methods_group("username none", "username none"),
    methods_group("none username", "none username"),
    methods_group("username none, client-rule username", "username none", "\n socksmethod: username", REFUSED_V4_THAT_PASSED),
    methods_group("username none, client-rule none username", "username none", "\n socksmethod: none username"),
]


def users_group(
    name: str, *rules: str, methods: str = "username", bind_unlike: tuple[Unlike, ...] = PEER_CLOSED_BIND
) -> Group:
    """Give a group about who may do what."""

    def ask(user: str, secret: str) -> tuple[Any, ...]:
        return (log_in(user, secret), send(v5(1, "echo")), reply, go_on, ping())

    cases = (
        Case("alice", ask("alice", "wonderland")),
        Case("bob", ask("bob", "builder")),
        Case("wrong password", ask("alice", "builder")),
        Case("locked account", ask("carol", "x")),
        Case("unknown user", ask("nobody-here", "x")),
        Case("empty user", ask("", "x")),
        Case("empty password", ask("alice", "")),
        Case("name in other case", ask("Alice", "wonderland")),
        Case("long name and password", ask("a" * 255, "b" * 255)),
        Case("name with a newline", ask("a\nb\tc%@\"\xff", "x")),
        Case("without password", (send(hello(0)), method, go_on, send(v5(1, "echo")), reply, ping())),
        Case("v4", (connect4("echo"), fin, over), unlike=() if "none" in methods else REFUSED_V4),
        Case("version 5 of the password", (send(hello(2)), method, send(password("alice", "x", 5)), password_status, end)),
        Case("all in one segment", (send(hello(2), password("alice", "wonderland"), v5(1, "echo"), b"ping"), method, password_status, reply, go_on, hear(4)), unlike=(ALL_PIPELINED,)),
        Case("end in password", (send(hello(2)), method, send(cut(password("alice", "x"), 4)), fin, end)),
        Case("bytewise", (bytewise, ask("alice", "wonderland"))),
        Case("bind", (log_in("alice", "wonderland"), send(v5("bind", "127.0.0.1/0")), first_reply, visit("127.0.0.1"), second_reply, close_visitor, end), unlike=bind_unlike),
    )
    return Group(f"users {name}", conf(CLIENT_PASS, *rules, methods=methods), cases)


LOG_ALL = "\n log: connect disconnect error }\n"
USERS = [
    users_group("any", "socks pass { from: 0/0 to: 0/0" + LOG_ALL),
    users_group("alice", "socks pass { from: 0/0 to: 0/0\n user: alice" + LOG_ALL),
    users_group("group", "socks pass { from: 0/0 to: 0/0\n group: readers" + LOG_ALL),
    users_group(
        "blocked by name",
        "socks block { from: 0/0 to: 0/0\n user: bob\n socksmethod: username" + LOG_ALL,
        "socks pass { from: 0/0 to: 0/0\n socksmethod: none" + LOG_ALL,
        "socks pass { from: 0/0 to: 0/0\n user: alice\n socksmethod: username" + LOG_ALL,
        methods="username none",
        bind_unlike=(),
    ),
]
TIMEOUTS = Group(
    "timeouts",
    conf(
        CLIENT_PASS,
        "socks pass { from: 0/0 to: 0/0\n timeout.connect: 1\n timeout.io: 1\n log: connect disconnect error }\n",
        more="timeout.negotiate: 1\ntimeout.connect: 1\ntimeout.io: 1",
    ),
    (
        Case("silent client", (open_connection, end)),
        Case("client stops in greeting", (send(b"\5\1"), end)),
        Case("client stops after greeting", (send(hello(0)), method, end)),
        Case("client stops in request", (send(hello(0)), method, send(cut(v5(1, "echo"), 6)), end)),
        Case("client stops in v4 request", (send(cut(v4(1, "echo"), 6)), end)),
        Case("client trickles", (bytewise, send(b"\4\1\0"), end)),
        Case("connect v5", (connect("blackhole"), end)),
        Case("connect v4", (connect4("blackhole"), end)),
        Case("idle session", (connect("discard"), end, saw("discard"))),
        Case("idle after data", (connect("echo"), ping(), end)),
        Case("idle half-closed session", (connect("half-closer"), hear(5), end)),
        Case("idle udp", (associate("0.0.0.0/0"), end)),
        Case("idle udp after data", (associate("0.0.0.0/0"), datagram("udp-echo", b"one"), answer(), end)),
    ),
    at_once=16,
)
FIN_WAIT = Group(
    "fin-wait",
    conf(CLIENT_PASS, "socks pass { from: 0/0 to: 0/0\n log: connect disconnect error }\n", more="timeout.tcp_fin_wait: 1"),
    (
        Case("client ended", (connect("holder"), send(b"x"), fin, end)),
        Case("target ended", (connect("half-closer"), hear(5), end)),
    ),
    at_once=8,
)
BIND = Group(
    "bind",
    conf(CLIENT_PASS, SOCKS_PASS),
    (
        Case("any peer", (bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, send(b"ping"), hear(4, "visitor heard", "visitor"), send(b"pong", who="visitor"), hear(4), fin, end_of("visitor"), close_visitor, end), unlike=CLIENT_CLOSED_BIND),
        Case("v4", (send(v4("bind", "0.0.0.0/0")), first_reply4, visit("127.0.0.3"), second_reply4, send(b"ping"), hear(4, "visitor heard", "visitor"), close_visitor, end), unlike=PEER_CLOSED_BIND),
        Case("peer named", (bind("127.0.0.3/80"), visit("127.0.0.3"), second_reply, close_visitor, end), unlike=PEER_CLOSED_BIND),
        Case("peer by name", (bind("two.test/80"), visit("127.0.0.2"), second_reply, close_visitor, end), unlike=PEER_CLOSED_BIND),
        Case("peer by name of two addresses", (bind("multi.test/80"), visit("127.0.0.1"), second_reply, close_visitor, end), unlike=PEER_CLOSED_BIND),
        Case("peer by unknown name", (bind("nowhere.test/80"), end)),
        Case("wrong peer", (bind("127.0.0.3/80"), visit("127.0.0.4", "wrong"), over_of("wrong"), visit("127.0.0.3"), second_reply, close_visitor, end), unlike=stranger_goes("127.0.0.3.80", 1, ioop=True)),
        Case("second peer", (bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, no_more_visitors, close_visitor, end), unlike=PEER_CLOSED_BIND),
        Case("client gives up", (bind("0.0.0.0/0"), fin, end)),
        Case("client resets", (bind("0.0.0.0/0"), reset)),
        Case("client speaks while it waits", (bind("0.0.0.0/0"), send(b"x"), fin, over), unlike=(
            Unlike(EARLY, "log: …tcp/bind ]…", ("log: info: pass(1): tcp/bind ]: CLIENT SERVER -> BOUND 0.0.0.0.0: eof from client",)),
            Unlike(EARLY, "log: …tcp/accept ]…", ("log: info: pass(1): tcp/accept ]: CLIENT SERVER: eof from client",)),
        )),
        Case("peer ends first", (bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, fin_of("visitor"), end, fin, end_of("visitor")), unlike=PEER_CLOSED_BIND),
        Case("wanted port", (bind("0.0.0.0/client"), visit("127.0.0.3"), second_reply, close_visitor, end), unlike=PEER_CLOSED_BIND),
        Case("IPv6 without IPv6 outside", (bind("::1/80"), end)),
        Case("all of IPv6 without IPv6 outside", (bind("::/80"), end)),
        Case("extension that is off", (bind("255.255.255.255/80"), end)),
        Case("bytewise", (bytewise, bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, close_visitor, end), unlike=PEER_CLOSED_BIND),
    ),
)
BIND_RULES = Group(
    "bind rules",
    conf(
        CLIENT_PASS,
        "socks pass { from: 0/0 to: 127.0.0.1/32\n command: bind\n log: connect disconnect error }\n",
        "socks block { from: 127.0.0.4/32 to: 0/0\n command: bindreply\n log: connect disconnect error }\n",
        "socks pass { from: 127.0.0.3/32 to: 127.77.0.0/16\n command: bindreply\n log: connect disconnect error }\n",
    ),
    (
        Case("reply passes", (bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, close_visitor, end), unlike=PEER_CLOSED_BIND),
        Case("reply blocked by rule", (bind("0.0.0.0/0"), visit("127.0.0.4", "wrong"), over_of("wrong"), visit("127.0.0.3"), second_reply, close_visitor, end), unlike=stranger_goes("0.0.0.0.0", 3)),
        Case("reply blocked by no rule", (bind("0.0.0.0/0"), visit("127.0.0.5", "wrong"), over_of("wrong"), visit("127.0.0.3"), second_reply, close_visitor, end), unlike=stranger_goes("0.0.0.0.0", 3)),
    ),
)
UDP = Group(
    "udp",
    conf(CLIENT_PASS, SOCKS_PASS),
    (
        Case("echo", (associate("0.0.0.0/0"), datagram("udp-echo", b"one"), answer(), datagram("udp-echo", b"three"), answer(), fin, end)),
        Case("no datagram", (associate("0.0.0.0/0"), fin, end)),
        Case("client resets", (associate("0.0.0.0/0"), datagram("udp-echo", b"one"), answer(), reset)),
        Case("target by name", (associate("0.0.0.0/0"), datagram("echo.test/udp-echo", b"one"), answer(), fin, end)),
        Case("unknown name", (associate("0.0.0.0/0"), datagram("nowhere.test/udp-echo", b"one"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("port wanted", (open_udp("udp"), associate("0.0.0.0/udp-client"), datagram("udp-echo", b"one"), answer(), fin, end)),
        Case("request by name", (associate("echo.test/0"), fin, end)),
        Case("v6 request", (associate("::/0"), end)),
        Case("fragment", (associate("0.0.0.0/0"), datagram("udp-echo", b"one", fragment=1), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("reserved bytes", (associate("0.0.0.0/0"), datagram("udp-echo", b"one", reserved=0x1234), answer(), fin, end)),
        Case("short headers", (associate("0.0.0.0/0"), *(raw_datagram(bytes(10)[:n]) for n in (1, 3, 4, 9)), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("bad address type", (associate("0.0.0.0/0"), raw_datagram(bytes([0, 0, 0, 2, 127, 0, 0, 1, 0, 80, 1])), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("empty datagram", (associate("0.0.0.0/0"), datagram("udp-echo", b""), answer(), fin, end)),
        Case("large datagram", (associate("0.0.0.0/0"), datagram("udp-echo", b"x" * 65497), answer(), fin, end)),
        Case("target 0.0.0.0", (associate("0.0.0.0/0"), datagram("0.0.0.0/udp-echo", b"one"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("target of IPv6", (associate("0.0.0.0/0"), datagram("::1/udp-echo", b"one"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("unreachable target", (associate("0.0.0.0/0"), datagram("203.0.113.1/80", b"one"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("two targets", (associate("0.0.0.0/0"), datagram("udp-echo", b"one"), answer(), datagram("udp-echo#2", b"two"), answer(), datagram("udp-echo", b"three"), answer(), fin, end)),
        Case("data payload with odd bytes", (associate("0.0.0.0/0"), datagram("udp-echo", b"\0\n\xff"), answer(), fin, end)),
        Case("answers in twos", (associate("0.0.0.0/0"), datagram("udp-twice", b"one"), answer(), answer(), fin, end)),
        Case("stranger before the target is known to be one", (associate("0.0.0.0/0"), datagram("udp-echo", b"one"), answer(), unasked("udp-sink", b"spam"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("junk on the control connection", (associate("0.0.0.0/0"), send(b"junk"), datagram("udp-echo", b"one"), answer(), fin, end)),
        Case("bytewise", (bytewise, associate("0.0.0.0/0"), datagram("udp-echo", b"one"), answer(), fin, end)),
    ),
)
# Without a log: what danted records of the datagrams that it does not take depends on chance.
UDP_SOURCES = Group(
    "udp sources",
    conf("client pass { from: 0/0 to: 0/0 }\n", "socks pass { from: 0/0 to: 0/0 }\n"),
    (
        Case("stranger first", (associate("0.0.0.0/0"), open_udp("stranger", "127.0.0.44"), datagram("udp-sink", b"stranger", who="stranger"), datagram("udp-sink", b"client"), first_seen("udp-sink"), fin, end), unlike=(
            Unlike(ONE_CLIENT, "udp-sink saw first: b'stranger'", ("udp-sink saw first: b'client'",)),
        )),
        Case("other port of the client", (associate("0.0.0.0/0"), datagram("udp-echo", b"one"), answer(), open_udp("second"), datagram("udp-echo", b"two", who="second"), datagram("udp-echo", b"three"), answer(), fin, end)),
    ),
)
UDP_RULES = Group(
    "udp rules",
    conf(
        CLIENT_PASS,
        "socks block { from: 0/0 to: 127.0.0.2/32\n command: udpassociate\n log: connect disconnect error ioop }\n",
        "socks block { from: 0/0 to: 0/0 port = 53\n command: udpassociate\n log: connect disconnect error ioop }\n",
        "socks pass { from: 0/0 to: 127.0.0.0/8\n command: udpassociate\n log: connect disconnect error ioop }\n",
        "socks block { from: 127.0.0.6/32 to: 0/0\n command: udpreply\n log: connect disconnect error ioop }\n",
        "socks pass { from: 127.0.0.0/29 to: 0/0\n command: udpreply\n log: connect disconnect error ioop }\n",
    ),
    (
        Case("pass", (associate("0.0.0.0/0"), datagram("udp-echo", b"one"), answer(), fin, end)),
        Case("address blocked", (associate("0.0.0.0/0"), datagram("127.0.0.2/udp-echo", b"one"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("port blocked", (associate("0.0.0.0/0"), datagram("127.0.0.1/53", b"one"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("name blocked by its address", (associate("0.0.0.0/0"), datagram("two.test/udp-echo", b"one"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("no rule for the target", (associate("0.0.0.0/0"), datagram("203.0.113.1/80", b"one"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("answer blocked", (associate("0.0.0.0/0"), datagram("udp-echo@127.0.0.6", b"one"), logged("block(4)"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("answer without a rule", (associate("0.0.0.0/0"), datagram("udp-echo@127.0.0.9", b"one"), answered("udp-echo@127.0.0.9"), datagram("udp-echo", b"two"), answer(), fin, end)),
        Case("answer blocked after one passed", (associate("0.0.0.0/0"), datagram("udp-echo", b"one"), answer(), datagram("udp-echo@127.0.0.6", b"two"), logged("127.0.0.6.udp-echo 127"), fin, end)),
    ),
)
IPV6 = Group(
    "ipv6",
    conf(
        CLIENT_PASS, SOCKS_PASS, more="internal: ::1 port = 0\nexternal: ::1",
    ),
    (
        Case("v5 to IPv6", (connect("echo@::1"), ping(), fin, end)),
        Case("v5 to IPv4", (connect("echo"), ping(), fin, end)),
        Case("v4", (connect4("echo"), ping(), fin, end)),
        Case("name of IPv6", (connect("six.test/echo@fd00::6"), ping(), fin, end)),
        Case("name of both, IPv4 there", (connect("both.test/echo"), ping(), fin, end)),
        Case("name of both, IPv6 there", (connect("both.test/echo@fd00::6"), ping(), fin, end)),
        Case("refused", (connect("refuser@::1"), over)),
        Case("unreachable", (connect("2001:db8::1/80"), end)),
        Case("address ::", (connect("::/echo"), end)),
        Case("mapped", (connect("::ffff:127.0.0.1/echo"), ping(), fin, end)),
        Case("name that is an address", (connect("=::1/echo@::1"), ping(), fin, end)),
        Case("bind", (bind("::1/80"), visit("::1"), second_reply, close_visitor, end), unlike=PEER_CLOSED_BIND),
        Case("bind to all of IPv6", (bind("::/80"), end)),
        Case("bind to all of IPv4", (bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, close_visitor, end), unlike=PEER_CLOSED_BIND),
        Case("udp to IPv6", (associate("0.0.0.0/0"), datagram("udp-echo@::1", b"one"), answer(), fin, end)),
        Case("udp to both", (associate("0.0.0.0/0"), datagram("udp-echo@::1", b"one"), answer(), datagram("udp-echo", b"two"), answer(), fin, end), unlike=(Unlike(BOTH_FAMILIES, "log: …tcp/accept ]: 13 -> CLIENT SERVER -> 3:…", ("log: {0}tcp/accept ]: 38 -> CLIENT SERVER -> 6:{1}",)),)),
    ),
)
GROUPS += [
    *LOGS, RULES, PORT_COLON, NO_CLIENT_RULE, NO_SOCKS_RULE, COMMANDS_BY_RULE, *METHODS, *USERS,
    TIMEOUTS, FIN_WAIT, BIND, BIND_RULES, UDP, UDP_SOURCES, UDP_RULES, IPV6,
]  # fmt: skip


# ------------------------------ the tests ------------------------------


class Outcomes:
    """The outcomes of the groups, each run when it is first asked for, with both servers at once."""

    def __init__(self, folder: Path, world: World) -> None:
        self._folder = folder
        self._world = world
        self._done: dict[str, tuple[Outcome, Outcome]] = {}

    def of(self, group: Group) -> tuple[Outcome, Outcome]:
        """Give the outcome with danted and with sockd."""
        if group.name not in self._done:
            with ThreadPoolExecutor(2) as pool:
                runs = [
                    pool.submit(run_group, group, kind, self._folder / group.name, self._world)
                    for kind in (Danted, Sockd)
                ]
            self._done[group.name] = (runs[0].result(), runs[1].result())
        return self._done[group.name]


@pytest.fixture(scope="module")
def outcomes(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Give the outcomes of the groups, run as they are needed."""
    need_danted()
    folder = tmp_path_factory.mktemp("against-dante")
    return Outcomes(folder, private_world)


CASES = [
    pytest.param(group, case, id=f"{group.name}: {case.name}") for group in GROUPS for case in group.cases
]


@pytest.mark.parametrize(("group", "case"), CASES)
def test_sockd_does_what_danted_does(group: Group, case: Case, outcomes: Outcomes) -> None:
    danted, sockd = outcomes.of(group)
    expected = expect(danted.transcripts[case.name], case.unlike)
    found = sockd.transcripts[case.name]
    # What the two have in common is shown as well: it is the story that the difference is in.
    assert found == expected, "\n".join(difflib.ndiff(expected, found))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_sockd_ends_well_after_these_clients(group: Group, outcomes: Outcomes) -> None:
    _, sockd = outcomes.of(group)
    assert not sockd.trouble, sockd.trouble


def test_table_names_every_case_once() -> None:
    names = [(group.name, case.name) for group in GROUPS for case in group.cases]
    assert len(set(names)) == len(names)
