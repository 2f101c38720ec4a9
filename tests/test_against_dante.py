"""sockd and Debian's danted get the same configuration and the same clients, and must do the same.

Compared are every byte of every reply (a free port aside), how each connection ended, what the
targets saw, and every line of the log with its addresses as the parts that they play.  Where sockd
differs on purpose the case says so with `Unlike`, and gives both sides.
"""

from __future__ import annotations

import difflib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from comparison import (
    CLIENT_PASS,
    SOCKS_PASS,
    Case,
    Group,
    Outcome,
    Unlike,
    case,
    conf,
    expect,
    rule,
    run_group,
)  # fmt: skip
from conversation import (
    answer,
    answered,
    associate,
    bind,
    bytewise,
    close_visitor,
    connect,
    connect4,
    cut,
    datagram,
    end,
    end_of,
    fin,
    fin_of,
    first_reply,
    first_reply4,
    first_seen,
    go_on,
    greet,
    hear,
    hello,
    invite,
    log_in,
    logged,
    method,
    no_more_visitors,
    open_connection,
    open_udp,
    over,
    over_of,
    password,
    password_status,
    ping,
    raw_datagram,
    reply,
    reply4,
    reset,
    same_port,
    saw,
    second_reply,
    second_reply4,
    send,
    unasked,
    v4,
    v5,
    visit,
)  # fmt: skip
from servers import Danted, Sockd, World, need_danted

pytestmark = [pytest.mark.root, pytest.mark.dante]


# ------------------------------ the table ------------------------------

GROUPS: list[Group] = []

UNKNOWN_COMMAND = "RFC 1928 has a reply for an unknown command; danted hangs up"
UNKNOWN_TYPE = "RFC 1928 has a reply for an unknown address type; danted hangs up and logs the command"
REJECTED4 = "a SOCKS 4 client is owed its rejection, and command 3 is like any other"
SOCKS4A = "danted has no SOCKS 4A: it takes 0.0.0.x for the address and the name for payload"
NUL_IN_NAME = "danted cuts a name at a NUL, so that rules and logs see another name than was sent"
NO_NAME = "what cannot be a host name is refused before a resolver sees it, and escaped in the log"
EVERY_ADDRESS = "every address of a name is tried, in both families; danted keeps to the family of the first"
RELAY_ADDRESS = "the relay is where the client's connection came in, whatever the address type of the request"
LONG_REASON = "danted cuts a long reason"
FINAL_RULE = "a block by the built-in final rule is logged; danted leaves no trace of it"
CONNECTED = "the log shows the address that was connected, never the name it came from"
UNSENT = "what could not be sent is not counted as sent, and never connected to"
NO_FUNCTION = "no C function in front of a notice"
NOTHING_RESOLVED = "a name is shown as it was asked for where nothing needed to be resolved"
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

ACCEPTED = "log: …tcp/accept [: CLIENT SERVER"
NO_RULES_MATCHED = "no rules matched; using default block rule"
WRONG_COMMAND4 = "error after reading 2 bytes in _ seconds: unknown socks_v4 command: {}"
BLOCKED_AT_ACCEPT = "log: info: block(1): tcp/accept ]: CLIENT SERVER: "
CLOSED_AT_ACCEPT = "log: info: pass(1): tcp/accept ]: 0 -> CLIENT SERVER -> 0: {}.  Session duration: _s"
CLIENT_CLOSED_BIND = tuple(
    Unlike(
        SIDES,
        f"log: …{event} ]: …: remote peer closed.…",
        (f"log: {{0}}{event} ]: {{1}}: local client closed.{{2}}",),
    )
    for event in ("tcp/bindreply", "tcp/accept")
)
PEER_CLOSED_BIND = tuple(
    Unlike(
        SIDES,
        f"log: …{event} ]: …: local client closed.…",
        (f"log: {{0}}{event} ]: {{1}}: remote peer closed.{{2}}",),
    )
    for event in ("tcp/bindreply", "tcp/accept")
)
ALL_PIPELINED = Unlike(
    PIPELINED,
    "log: …tcp/connect ]: … -> …CLIENT SERVER -> …, … -> …",
    ("log: {0}tcp/connect ]: {1} -> {2}CLIENT SERVER -> {4}, {4} -> {5}",),
)


def echo_session(count: int, rule: int = 1) -> tuple[str, ...]:
    """Give the log lines of a session in which `count` bytes went to the echo and came back."""
    there, back = (
        "CLIENT SERVER -> 127.0.0.1.* 127.0.0.1.echo",
        "127.0.0.1.echo 127.0.0.1.* -> SERVER CLIENT",
    )
    moved = (
        (f"{rule}): tcp/connect -: {there} ({count})", f"{rule}): tcp/connect -: {back} ({count})")
        if count
        else ()
    )
    ends = "local client closed.  Session duration: _s"
    lines = (
        f"{rule}): tcp/connect [: {there}",
        *moved,
        f"{rule}): tcp/connect -: {there} (0)",
        f"{rule}): tcp/connect ]: {count} -> CLIENT SERVER -> {count}, "
        f"{count} -> 127.0.0.1.* 127.0.0.1.echo -> {count}: {ends}",
        f"1): tcp/accept ]: {count} -> CLIENT SERVER -> {count}: {ends}",
    )
    return tuple(f"log: info: pass({line}" for line in lines)


def final_rule(text: str, after: str) -> tuple[Unlike, ...]:
    """Give the line that sockd logs for its final rule, after a line that both have."""
    line = f"log: info: block(0): {text}"
    same = "".join(f"{{{n}}}{text}" for n, text in enumerate(after.split("…"), -1))
    return (Unlike(FINAL_RULE, after, (same.removeprefix("{-1}"), line)),)


def no_socks_rule(event: str, target: str, who: str = "CLIENT", after: str = ACCEPTED) -> tuple[Unlike, ...]:
    """Give the line that sockd logs where no socks-rule matches."""
    text = f"{event} ]: {who} SERVER -> 0.0.0.0.0 {target}: {NO_RULES_MATCHED}"
    return final_rule(text, after)


def no_client_rule(how: str) -> tuple[Unlike, ...]:
    """Give the line that sockd logs where no client-rule matches."""
    return final_rule(f"tcp/accept ]: CLIENT SERVER: {NO_RULES_MATCHED}", f"client end: {how}")


def refused_name(name: str, fault: str, reason: str) -> tuple[Unlike, ...]:
    """Give the difference for a name that no resolver is asked for."""
    text = f'could not resolve hostname "{name}": {fault}'.replace("{", "{{").replace("}", "}}")
    performed = "request was not performed due to error: "
    return (
        Unlike(
            reason,
            "log: …tcp/connect ]…",
            (f"log: info: block(1): tcp/connect ]: CLIENT SERVER: {text}",),
        ),
        Unlike(
            reason,
            "log: …tcp/accept ]…",
            (f"log: info: block(1): tcp/accept ]: CLIENT SERVER: {performed}{text}",),
        ),
    )


def unresolved(name: str) -> tuple[str, ...]:
    """Give the log lines for a name that nobody knows."""
    text = f'could not resolve hostname "{name}": Name or service not known for IPv4 address'
    return (
        f"log: info: block(1): tcp/connect ]: CLIENT SERVER: {text}",
        f"{BLOCKED_AT_ACCEPT}request was not performed due to error: {text}",
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
        Unlike(
            STRANGERS,
            "log: …tcp/bind ]…",
            tuple(line.replace("{0}", str(rule)) for line in after),
        ),
        Unlike(STRANGERS, "log: …tcp/accept ]…", (CLOSED_AT_ACCEPT.format("remote peer closed"),)),
    )


def refused_v4(wanted: str) -> Unlike:
    """Give how sockd records a SOCKS 4 client where a client-rule wants authentication."""
    text = (
        "client-rule #1 requires SOCKS authentication to use for matching clients to be "
        f'"{wanted}", but connected client is using SOCKS v4, which does not support any '
        "authentication"
    )
    failed = f"{BLOCKED_AT_ACCEPT}error after reading 9 bytes in _ seconds: {text}"
    return Unlike(VERSION4, "log: …tcp/accept ]…", (failed,))


REFUSED_V4 = (refused_v4("username"),)
REFUSED_V4_THAT_PASSED = (
    *REFUSED_V4,
    Unlike(VERSION4, "reply: 00 5a …", ("reply: 00 5b REQUESTED",)),
    Unlike(VERSION4, "log: …tcp/connect…"),
)


# fmt: off
OPEN = Group(
    "open",
    conf(CLIENT_PASS, SOCKS_PASS),
    (
        case("v5 connect by address", connect("echo"), ping(), fin, end, saw("echo")),
        case("v5 connect by name", connect("echo.test/echo"), ping(), fin, end),
        case(
            "v5 connect to a name that is an address",
            connect("=127.0.0.1/echo"), ping(), fin, end,
        ),
        case(
            "v5 connect to a name that is a number",
            connect("=2130706433/echo"), ping(), fin, end,
        ),
        case("v5 connect to a mapped address", connect("::ffff:127.0.0.1/echo"), ping(), fin, end),
        case(
            "v5 connect by a name of two addresses",
            connect("multi.test/echo"), ping(), fin, end,
            unlike=(
                Unlike(CONNECTED, "log: …multi.test.echo", ("log: {0}127.0.0.1.echo",)),
            ),
        ),
        case(
            "v5 connect by a name with a NUL",
            connect("=echo.test\0x/echo"), fin, end,
            unlike=(
                Unlike(NUL_IN_NAME, "reply: 05 00 …", ("reply: 05 04 00 03 REQUESTED",)),
                Unlike(NUL_IN_NAME, "log: …tcp/connect […"),
                Unlike(NUL_IN_NAME, "log: …tcp/connect -…"),
                *refused_name(
                    "echo.test\\000x",
                    "blanks and control characters are not allowed in a name",
                    NUL_IN_NAME,
                ),
            ),
        ),
        case("v5 connect takes the client's port outside", connect("echo"), same_port("echo")),
        case("v4 connect", connect4("echo"), ping(), fin, end, saw("echo")),
        case(
            "v4 user-id of 255 bytes",
            send(v4("connect", "echo", b"u" * 255)), reply4, ping(), fin, end,
        ),
        case(
            "v4 user-id of 1000 bytes",
            send(v4("connect", "echo", b"u" * 1000)), reply4, ping(), fin, end,
        ),
        case(
            "v4a connect by name",
            send(v4("connect", "echo.test/echo", b"u")), reply4, fin, end,
            unlike=(
                Unlike(SOCKS4A, "reply: 00 5b …", ("reply: 00 5a 127.0.0.1.*",)),
                Unlike(SOCKS4A, "log: …tcp/connect ]…", echo_session(0)[:-1]),
                Unlike(SOCKS4A, "log: …tcp/accept ]…", echo_session(0)[-1:]),
            ),
        ),
        case(
            "v4a unknown name",
            send(v4("connect", "nowhere.test/echo", b"u")), reply4, fin, end,
            unlike=(
                Unlike(SOCKS4A, "reply: 00 5b …", ("reply: 00 5b 0.0.0.0.echo",)),
                Unlike(SOCKS4A, "log: …tcp/connect ]…", unresolved("nowhere.test")[:1]),
                Unlike(SOCKS4A, "log: …tcp/accept ]…", unresolved("nowhere.test")[1:]),
            ),
        ),
        case("v5 refused", connect("refuser"), over),
        case("v4 refused", connect4("refuser"), over),
        case("v5 refused by name", connect("two.test/echo"), over),
        case("v5 network unreachable", connect("203.0.113.1/80"), end),
        case("v4 network unreachable", connect4("203.0.113.1/80"), end),
        case("v5 host unreachable", connect("198.51.100.1/80"), end),
        case("v5 host unreachable by name", connect("far.test/80"), end),
        case("v4 host unreachable", connect4("198.51.100.1/80"), end),
        case("v5 prohibited", connect("198.51.100.2/80"), end),
        case("v5 invalid route", connect("198.51.100.3/80"), end),
        case("v5 multicast", connect("224.0.0.1/80"), end),
        case("v5 broadcast", connect("255.255.255.255/80"), end),
        case("v5 unknown name", connect("nowhere.test/80"), end),
        case(
            "v5 name of 255 bytes",
            connect("=" + "n" * 255 + "/80"), end,
            unlike=refused_name("n" * 255, "a label of the name is longer than 63 bytes", NO_NAME),
        ),
        case(
            "v5 empty name",
            connect("=/80"), end, unlike=refused_name("", "the name is empty", NO_NAME),
        ),
        case(
            "v5 name with odd bytes",
            connect('=a b\n\xff"/80'), end,
            unlike=refused_name(
                r"a\040b\n\377\042",
                "blanks and control characters are not allowed in a name",
                NO_NAME,
            ),
        ),
        case("v5 port 0", connect("127.0.0.1/0"), end),
        case("v4 port 0", connect4("127.0.0.1/0"), end),
        case(
            "v5 name with port 0",
            connect("echo.test/0"), end,
            unlike=(
                Unlike(NOTHING_RESOLVED, "log: …(127.0.0.1.0)…", ("log: {0}(echo.test.0){1}",)),
            ),
        ),
        case("v5 address 0.0.0.0", connect("0.0.0.0/echo"), end),
        case("v4 address 0.0.0.0", connect4("0.0.0.0/echo"), end),
        case("v5 address ::", connect("::/echo"), end),
        case("v5 IPv6 address without IPv6 outside", connect("::1/echo"), end),
        case("v5 name of an IPv6 address without IPv6 outside", connect("six.test/echo"), end),
        case(
            "v5 name of both families without IPv6 outside",
            connect("both.test/echo"), ping(), fin, end,
        ),
    ),
)
GARBAGE = Group(
    "garbage",
    conf(CLIENT_PASS, SOCKS_PASS),
    (
        *(
            case(f"first byte {byte:#04x}", send(bytes([byte])), end)
            for byte in (0, 1, 3, 6, 0x47, 0x80, 0xFF)
        ),
        case("HTTP GET", send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), over),
        case("HTTP CONNECT", send(b"CONNECT echo.test:80 HTTP/1.1\r\n\r\n"), over),
        case("TLS", send(bytes.fromhex("16030100c8010000c40303")), over),
        case("no methods", send(hello()), method, end),
        case("method unknown", send(hello(0x80)), method, end),
        case("method 255", send(hello(255)), method, end),
        case("password only", send(hello(2)), method, end),
        case(
            "all 255 methods",
            send(hello(*range(255))), method, send(v5("connect", "echo")), reply, ping(),
        ),
        case(
            "same method twice",
            send(hello(0, 0)), method, send(v5("connect", "echo")), reply, ping(),
        ),
        case(
            "reserved byte set",
            greet, send(v5("connect", "echo", reserved=0x77)), reply, ping(),
        ),
        case("v4 request after v5 greeting", greet, send(v4("connect", "echo")), reply4, ping()),
        *(
            case(
                f"v5 command {number}",
                greet, send(v5(number, "echo")), reply, end,
                unlike=(
                    Unlike(
                        UNKNOWN_COMMAND, "reply: fin",
                        ("reply: 05 07 00 01 0.0.0.0.0", "client end: fin"),
                    ),
                ),
            )
            for number in (0, 4, 9, 0xF0)
        ),
        *(
            case(
                f"v5 address type {atyp}",
                greet, send(bytes([5, 1, 0, atyp, 127, 0, 0, 1, 0, 80])), reply, end,
                unlike=(
                    Unlike(
                        UNKNOWN_TYPE, "reply: fin",
                        ("reply: 05 08 00 01 0.0.0.0.0", "client end: fin"),
                    ),
                    Unlike(UNKNOWN_TYPE, "log: …command: 1", (f"log: {{0}}address type: {atyp}",)),
                ),
            )
            for atyp in (0, 2, 5, 0xFF)
        ),
        *(
            case(f"v5 request of version {version}", greet, send(v5(1, "echo", version)), over)
            for version in (0, 1, 6)
        ),
        case(
            "v4 command 3",
            send(v4(3, "echo")), reply4, end,
            unlike=(
                Unlike(REJECTED4, "reply: …", ("reply: 00 5b 0.0.0.0.0",)),
                Unlike(REJECTED4, "log: …udp/unknown…"),
                Unlike(
                    REJECTED4, "log: …tcp/accept ]…: request was not performed …",
                    ("log: {0}tcp/accept ]{1}: " + WRONG_COMMAND4.format(3),),
                ),
            ),
        ),
        *(
            case(
                f"v4 command {number}",
                send(v4(number, "echo")), reply4, end,
                unlike=(
                    Unlike(REJECTED4, "reply: fin", ("reply: 00 5b 0.0.0.0.0", "client end: fin")),
                ),
            )
            for number in (0, 9)
        ),
        case("end before a byte", open_connection, fin, end),
        case("end after version", send(b"\5"), fin, end),
        case("end in methods", send(b"\5\2\0"), fin, end),
        case("end after greeting", greet, fin, end),
        *(
            case(
                f"end after {count} bytes of request",
                greet, send(cut(v5(1, "echo"), count)), fin, end,
            )
            for count in (1, 2, 3, 4, 5, 8, 9)
        ),
        case("end in name", greet, send(cut(v5(1, "echo.test/echo"), 8)), fin, end),
        *(
            case(
                f"end after {count} bytes of v4 request",
                send(cut(v4(1, "echo", b"user"), count)), fin, end,
            )
            for count in (1, 2, 4, 8, 10)
        ),
        case("reset before a byte", open_connection, reset),
        case("reset after greeting", greet, reset),
    ),
)
RELAY = Group(
    "relay",
    conf(CLIENT_PASS, rule("socks pass", "from: 0/0 to: 0/0")),
    (
        case("v5 bytewise", bytewise, connect("echo.test/echo"), ping(), fin, end),
        case("v4 bytewise", bytewise, send(v4(1, "echo", b"user")), reply4, ping(), fin, end),
        case(
            "v5 in one segment with payload",
            send(hello(0), v5(1, "echo"), b"ping"), method, reply, hear(4), fin, end,
            unlike=(ALL_PIPELINED,),
        ),
        case(
            "v4 in one segment with payload",
            send(v4(1, "echo"), b"ping"), reply4, hear(4), fin, end, unlike=(ALL_PIPELINED,),
        ),
        case(
            "40000 bytes behind the request",
            send(hello(0), v5(1, "echo"), b"x" * 40000), method, reply, hear(40000), fin, end,
            unlike=(ALL_PIPELINED,),
        ),
        case(
            "end right behind the request",
            send(hello(0), v5(1, "farewell"), b"ping"), fin, method, reply, hear(8), end,
            saw("farewell"), unlike=(ALL_PIPELINED,),
        ),
        case(
            "payload behind a refused request",
            send(hello(0), v5(1, "refuser"), b"ping"), method, reply, over,
        ),
        case(
            "client ends first",
            connect("farewell"), send(b"ping"), fin, hear(8), end, saw("farewell"),
        ),
        case(
            "target ends first",
            connect("half-closer"), hear(5), end, send(b"ping"), fin, saw("half-closer"),
        ),
        case("target closes after data", connect("greeter"), hear(5), end),
        case("target closes at once", connect("closer"), end),
        case("target sends a megabyte", connect("sender"), hear(1_000_000), end),
        case(
            "client sends a megabyte",
            connect("discard"), send(b"x" * 1_000_000), fin, end, saw("discard"),
        ),
        case("client resets", connect("echo"), ping(), reset, saw("echo")),
        case("target resets", connect("resetter"), send(b"ping"), end),
        case("client resets while the target waits", connect("discard"), reset, saw("discard")),
    ),
)
GROUPS += [OPEN, GARBAGE, RELAY]


LOG_CASES = (
    case("session", connect("echo"), ping(b'a\tb\n\0\x80\\"c'), fin, end),
    case("refused", connect("refuser"), over),
    case("unreachable", connect("203.0.113.1/80"), end),
    case("blocked", connect("127.0.0.2/80"), end),
    case("client blocked", open_connection, end, source="127.66."),
    case("garbage", send(b"\6"), end),
    case("end in greeting", send(b"\5"), fin, end),
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
    after = ACCEPTED if words.startswith("connect") else "client end: fin"
    no_rule = case(
        "blocked by no rule",
        connect("127.0.0.3/80"), end,
        unlike=no_socks_rule("tcp/connect", "127.0.0.3.80", after=after),
    )
    return Group(f"log {words or 'nothing'}", conf(*rules), (*LOG_CASES, no_rule))


LOGS = [
    logging_group(words)
    for words in (
        "",
        "connect",
        "disconnect",
        "error",
        "ioop",
        "data",
        "connect disconnect error data ioop",
    )
]
RULES = Group(
    "rules",
    conf(
        rule("client block", "from: 127.66.0.0/16 to: 0/0", log="connect error"),
        rule("client pass", "from: 127.67.0.0/16 to: 127.0.0.1/32", log="connect error"),
        rule("client block", "from: 127.68.0.0/16 port 1-65535 to: 0/0", log="error"),
        rule("client pass", "from: client.example.test to: 0/0", log="connect error"),
        rule("client pass", "from: 127.77.0.0/16 to: 0/0"),
        rule("socks block", "from: 0/0 to: 127.0.0.2/32", log="connect error"),  # 1
        rule("socks block", "from: 0/0 to: 0/0 port = 79", log="connect error"),
        rule("socks block", "from: 0/0 to: 0/0 port < 10", log="connect error"),
        rule("socks block", "from: 0/0 to: 0/0 port 81-90", log="connect error"),
        rule("socks block", "from: 0/0 to: 0/0 port <= 11", log="connect error"),
        rule("socks block", "from: 0/0 to: 203.0.113.0/24", log="connect error"),  # 6
        rule("socks block", "from: 0/0 to: echo.test port = 91", log="connect error"),
        rule("socks block", "from: 0/0 to: .example.test port = 92", log="connect error"),
        rule("socks block", "from: 0/0 to: . port = 93", log="connect error"),
        rule("socks block", "from: 0/0 to: ::/0 port = 94", log="connect error"),
        rule("socks block", "from: 0/0 to: 0.0.0.0/0 port = 95", log="connect error"),  # 11
        rule("socks block", "from: 127.67.0.0/16 to: 0/0 port = 96", log="connect error"),
        rule(
            "socks block", "from: 0/0 to: 0/0 port = 97", "proxyprotocol: socks_v4",
            log="connect error",
        ),
        rule(
            "socks block", "from: 0/0 to: 0/0 port = 98", "command: bind udpassociate",
            log="connect error",
        ),
        rule(
            "socks block", "from: 0/0 to: 0/0 port = 98", "command: connect", log="connect error",
        ),
        rule(
            "socks block", "from: 0/0 to: 0/0 port = 99", "protocol: udp", log="connect error",
        ),  # 16
        rule("socks block", "from: 0/0 to: lo port = 100", log="connect error"),
        rule("socks block", "from: 0/0 to: two.test port = 101", log="connect error"),
        rule("socks block", "from: 0/0 to: nowhere.test port = 102", log="connect error"),
        rule("socks block", "from: 0/0 to: 0/0 port > 65534", log="connect error"),
        rule("socks block", "from: 0/0 to: 0/0 port 90-111", log="connect error"),  # 21
        rule("socks pass", "from: 0/0 to: 127.0.0.1/32", log="connect error"),
        rule("socks pass", "from: 0/0 to: .example.test", log="connect error"),
    ),
    (
        case("client-rule blocks", open_connection, end, source="127.66."),
        case("client-rule blocks one who has spoken", send(hello(0)), over, source="127.66."),
        case("client-rule passes one network", connect("echo"), ping(), source="127.67."),
        case("client-rule blocks by source port", open_connection, end, source="127.68."),
        case("client-rule passes a host name", connect("echo"), ping(), source="127.0.0.5"),
        case(
            "no client-rule",
            open_connection, end,
            source="127.69.", unlike=no_client_rule("fin"),
        ),
        case("socks block by address", connect("127.0.0.2/80"), end),
        case("socks block by address of a name", connect("two.test/80"), end),
        case("socks block by one address of a name", connect("multi.test/80"), end),
        case("v4 blocked", connect4("127.0.0.2/80"), end),
        case("port equal", connect("127.0.0.1/79"), end),
        case("port less", connect("127.0.0.1/9"), end),
        case("port not less, but less or equal", connect("127.0.0.1/10"), end),
        case("port less or equal", connect("127.0.0.1/11"), end),
        case("port above less or equal", connect("127.0.0.1/12"), over),
        case("port range low", connect("127.0.0.1/81"), end),
        case("port range high", connect("127.0.0.1/90"), end),
        case("port below range", connect("127.0.0.1/80"), over),
        case("port greater", connect("127.0.0.1/65535"), end),
        case("network", connect("203.0.113.77/80"), end),
        case(
            "outside every pass rule",
            connect("127.0.0.9/80"), end,
            unlike=no_socks_rule("tcp/connect", "127.0.0.9.80"),
        ),
        case("host name by the same name", connect("echo.test/91"), end),
        case("host name in other case", connect("ECHO.Test/91"), end),
        case("host name by its address", connect("127.0.0.1/91"), end),
        case("host name by another name of its address", connect("example.test/91"), end),
        case("domain by a name in it", connect("www.example.test/92"), end),
        case("domain by itself", connect("example.test/92"), end),
        case("domain in other case", connect("WWW.EXAMPLE.TEST/92"), end),
        case("domain by an address in it", connect("127.0.0.5/92"), end),
        case("domain by another name", connect("echo.test/92"), end),
        case(
            "domain by a name with the same tail",
            connect("xexample.test/92"), end,
            unlike=(
                Unlike(LABELS, "log: …block(8): …", ("log: {0}block(21): {1}",)),
                Unlike(LABELS, "log: …socks-rule #8", ("log: {0}socks-rule #21",)),
            ),
        ),
        case("lone dot by a name", connect("echo.test/93"), end),
        case("lone dot by an address with a name", connect("127.0.0.1/93"), end),
        case("lone dot by an address without a name", connect("127.0.0.88/93"), end),
        case("IPv6 network by an IPv4 address", connect("127.0.0.1/94"), end),
        case("IPv4 network by a name", connect("echo.test/95"), end),
        case("from a client's network", connect("127.0.0.1/96"), end, source="127.67."),
        case("from another network", connect("127.0.0.1/96"), end),
        case("proxyprotocol v4 by v5", connect("127.0.0.1/97"), end),
        case("proxyprotocol v4 by v4", connect4("127.0.0.1/97"), end),
        case("command list", connect("127.0.0.1/98"), end),
        case("protocol udp", connect("127.0.0.1/99"), end),
        case("interface by its address", connect("127.0.0.1/100"), end),
        case("interface by an address of its network", connect("127.0.0.3/100"), end),
        case("host name of another address", connect("127.0.0.1/101"), end),
        case("rule of an unknown name", connect("127.0.0.1/102"), end),
        case("pass by domain", connect("www.example.test/echo"), ping()),
        case("unknown name before any rule", connect("nowhere.test/79"), end),
    ),
)
PORT_COLON = Group(
    "port with a colon",
    conf(
        CLIENT_PASS,
        rule("socks block", "from: 0/0 to: 127.0.0.1/32 port: 79", log="connect error"),
        SOCKS_PASS,
    ),
    (
        case("that port", connect("127.0.0.1/79"), end),
        case(
            "another port",
            connect("127.0.0.1/80"), over,
            unlike=(
                Unlike(COLON, "reply: …", ("reply: 05 05 00 01 127.0.0.1.*",)),
                Unlike(
                    COLON, "log: …tcp/connect ]…",
                    (
                        "log: info: pass(2): tcp/connect ]: 0 -> CLIENT SERVER -> 0, "
                        "0 -> 127.0.0.1.* 127.0.0.1.80 -> 0: "
                        "remote peer error (Connection refused).  Session duration: _s",
                    ),
                ),
                Unlike(
                    COLON, "log: …tcp/accept ]…",
                    (CLOSED_AT_ACCEPT.format("remote peer error (Connection refused)"),),
                ),
            ),
        ),
    ),
)
NO_CLIENT_RULE = Group(
    "no client-rule",
    conf(SOCKS_PASS),
    (
        case("silent client", open_connection, end, unlike=no_client_rule("fin")),
        case("talking client", send(hello(0)), over, unlike=no_client_rule("closed")),
    ),
)
NO_SOCKS_RULE = Group(
    "no socks-rule",
    conf(CLIENT_PASS),
    (
        case(
            "v5",
            connect("127.0.0.1/80"), end,
            unlike=no_socks_rule("tcp/connect", "127.0.0.1.80"),
        ),
        case(
            "v5 by name",
            connect("echo.test/80"), end,
            unlike=no_socks_rule("tcp/connect", "echo.test.80"),
        ),
        case(
            "v4",
            connect4("127.0.0.1/80"), end,
            unlike=no_socks_rule("tcp/connect", "127.0.0.1.80"),
        ),
        case("bind", bind("127.0.0.1/80"), end, unlike=no_socks_rule("tcp/bind", "127.0.0.1.80")),
        case(
            "udpassociate",
            greet, send(v5("udpassociate", "0.0.0.0/0")), reply, end,
            unlike=no_socks_rule("udp/udpassociate", "0.0.0.0.0"),
        ),
    ),
)
COMMANDS_BY_RULE = Group(
    "commands",
    conf(
        CLIENT_PASS,
        rule(
            "socks pass", "from: 0/0 to: 0/0", "command: connect", "proxyprotocol: socks_v5",
            log="connect error",
        ),
        rule(
            "socks pass", "from: 0/0 to: 0/0", "command: bind", "proxyprotocol: socks_v4",
            log="connect error",
        ),
    ),
    (
        case("connect v5", connect("echo"), ping()),
        case(
            "connect v4",
            connect4("echo"), end,
            unlike=no_socks_rule("tcp/connect", "127.0.0.1.echo"),
        ),
        case(
            "bind v5",
            bind("127.0.0.1/80"), end,
            unlike=no_socks_rule("tcp/bind", "127.0.0.1.80"),
        ),
        case("bind v4", send(v4("bind", "127.0.0.1/80")), first_reply4),
        case(
            "udpassociate",
            greet, send(v5("udpassociate", "0.0.0.0/0")), reply, end,
            unlike=no_socks_rule("udp/udpassociate", "0.0.0.0.0"),
        ),
    ),
)


def methods_group(name: str, methods: str, client: str = "", v4: tuple[Unlike, ...] = ()) -> Group:
    """Give a group about which method is chosen, under a global list and a client-rule's list."""
    client_rule = f"client pass {{ from: 0/0 to: 0/0{client}\n log: connect disconnect error }}\n"
    offers = {
        "none": (0,),
        "password": (2,),
        "both": (0, 2),
        "both turned": (2, 0),
        "other": (1, 3),
    }
    cases = [
        case(f"offer {offer}", send(hello(*codes)), method, fin, end)
        for offer, codes in offers.items()
    ]
    cases.append(case("v4", connect4("echo"), fin, over, unlike=v4))
    cases.append(case("v5 without password", greet, go_on, send(v5(1, "echo")), reply, ping()))
    cases.append(
        case("v5 with password", log_in("alice", "wonderland"), send(v5(1, "echo")), reply, ping())
    )
    config = conf(client_rule, SOCKS_PASS, methods=methods)
    return Group(f"methods {name}", config, tuple(cases))


METHODS = [
    methods_group("none", "none"),
    methods_group("username", "username", v4=REFUSED_V4),
    methods_group("username none", "username none"),
    methods_group("none username", "none username"),
    methods_group(
        "username none, client-rule username",
        "username none",
        "\n socksmethod: username",
        REFUSED_V4_THAT_PASSED,
    ),
    methods_group(
        "username none, client-rule none username",
        "username none",
        "\n socksmethod: none username",
    ),
]


def users_group(
    name: str,
    *rules: str,
    methods: str = "username",
    bind_differences: tuple[Unlike, ...] = PEER_CLOSED_BIND,
    bob_differences: tuple[Unlike, ...] = (),
) -> Group:
    """Give a group about who may do what."""

    def ask(user: str, secret: str) -> tuple[Any, ...]:
        return (log_in(user, secret), send(v5(1, "echo")), reply, go_on, ping())

    cases = (
        case("alice", *ask("alice", "wonderland")),
        case("bob", *ask("bob", "builder"), unlike=bob_differences),
        case("wrong password", *ask("alice", "builder")),
        case("locked account", *ask("carol", "x")),
        case("unknown user", *ask("nobody-here", "x")),
        case("empty user", *ask("", "x")),
        case("empty password", *ask("alice", "")),
        case("name in other case", *ask("Alice", "wonderland")),
        case(
            "long name and password",
            *ask("a" * 255, "b" * 255),
            unlike=(
                Unlike(
                    LONG_REASON, 'log: …: could not access user "aaa…',
                    (
                        'log: {0}: could not access user "'
                        + "a" * 255
                        + "\"'s records in the system password file: no system error",
                    ),
                ),
            ),
        ),
        case("name with a newline", *ask('a\nb\tc%@"\xff', "x")),
        case("without password", greet, go_on, send(v5(1, "echo")), reply, ping()),
        case("v4", connect4("echo"), fin, over, unlike=() if "none" in methods else REFUSED_V4),
        case(
            "version 5 of the password",
            send(hello(2)), method, send(password("alice", "x", 5)), password_status, end,
        ),
        case(
            "all in one segment",
            send(hello(2), password("alice", "wonderland"), v5(1, "echo"), b"ping"), method,
            password_status, reply, go_on, hear(4), unlike=(ALL_PIPELINED,),
        ),
        case(
            "end in password",
            send(hello(2)), method, send(cut(password("alice", "x"), 4)), fin, end,
        ),
        case("bytewise", bytewise, ask("alice", "wonderland")),
        case(
            "bind",
            log_in("alice", "wonderland"), send(v5("bind", "127.0.0.1/0")), first_reply,
            visit("127.0.0.1"), second_reply, close_visitor, end, unlike=bind_differences,
        ),
    )
    return Group(f"users {name}", conf(CLIENT_PASS, *rules, methods=methods), cases)


BOB_SHUT_OUT = no_socks_rule("tcp/connect", "127.0.0.1.echo", "username%bob@CLIENT")
USERS = [
    users_group("any", rule("socks pass", "from: 0/0 to: 0/0")),
    users_group(
        "alice",
        rule("socks pass", "from: 0/0 to: 0/0", "user: alice"),
        bob_differences=BOB_SHUT_OUT,
    ),
    users_group(
        "group",
        rule("socks pass", "from: 0/0 to: 0/0", "group: readers"),
        bob_differences=BOB_SHUT_OUT,
    ),
    users_group(
        "blocked by name",
        rule("socks block", "from: 0/0 to: 0/0", "user: bob", "socksmethod: username"),
        rule("socks pass", "from: 0/0 to: 0/0", "socksmethod: none"),
        rule("socks pass", "from: 0/0 to: 0/0", "user: alice", "socksmethod: username"),
        methods="username none",
        bind_differences=(),
    ),
]
TIMEOUTS = Group(
    "timeouts",
    conf(
        CLIENT_PASS,
        rule("socks pass", "from: 0/0 to: 0/0", "timeout.connect: 1", "timeout.io: 1"),
        more="timeout.negotiate: 1\ntimeout.connect: 1\ntimeout.io: 1",
    ),
    (
        case("silent client", open_connection, end),
        case("client stops in greeting", send(b"\5\1"), end),
        case("client stops after greeting", greet, end),
        case("client stops in request", greet, send(cut(v5(1, "echo"), 6)), end),
        case("client stops in v4 request", send(cut(v4(1, "echo"), 6)), end),
        case("client trickles", bytewise, send(b"\4\1\0"), end),
        case("connect v5", invite("blackhole"), connect("blackhole"), end),
        case("connect v4", invite("blackhole"), connect4("blackhole"), end),
        case("idle session", connect("discard"), end, saw("discard")),
        case("idle after data", connect("echo"), ping(), end),
        case("idle half-closed session", connect("half-closer"), hear(5), end),
        case("idle udp", associate(), end),
        case("idle udp after data", associate(), datagram("udp-echo", b"one"), answer(), end),
    ),
    at_once=16,
)
FIN_WAIT = Group(
    "fin-wait",
    conf(CLIENT_PASS, rule("socks pass", "from: 0/0 to: 0/0"), more="timeout.tcp_fin_wait: 1"),
    (
        case("client ended", connect("holder"), send(b"x"), fin, end),
        case("target ended", connect("half-closer"), hear(5), end),
    ),
    at_once=8,
)
BIND = Group(
    "bind",
    conf(CLIENT_PASS, SOCKS_PASS),
    (
        case(
            "any peer",
            bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, send(b"ping"),
            hear(4, "visitor heard", "visitor"), send(b"pong", who="visitor"), hear(4), fin,
            end_of("visitor"), close_visitor, end, unlike=CLIENT_CLOSED_BIND,
        ),
        case(
            "v4",
            send(v4("bind", "0.0.0.0/0")), first_reply4, visit("127.0.0.3"), second_reply4,
            send(b"ping"), hear(4, "visitor heard", "visitor"), close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
        case(
            "peer named",
            bind("127.0.0.3/80"), visit("127.0.0.3"), second_reply, close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
        case(
            "peer by name",
            bind("two.test/80"), visit("127.0.0.2"), second_reply, close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
        case(
            "peer by name of two addresses",
            bind("multi.test/80"), visit("127.0.0.1"), second_reply, close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
        case("peer by unknown name", bind("nowhere.test/80"), end),
        case(
            "wrong peer",
            bind("127.0.0.3/80"), visit("127.0.0.4", "wrong"), over_of("wrong"),
            visit("127.0.0.3"), second_reply, close_visitor, end,
            unlike=stranger_goes("127.0.0.3.80", 1, ioop=True),
        ),
        case(
            "second peer",
            bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, no_more_visitors, close_visitor,
            end, unlike=PEER_CLOSED_BIND,
        ),
        case("client gives up", bind("0.0.0.0/0"), fin, end),
        case("client resets", bind("0.0.0.0/0"), reset),
        case(
            "client speaks while it waits",
            bind("0.0.0.0/0"), send(b"x"), fin, over,
            unlike=(
                Unlike(
                    EARLY, "log: …tcp/bind ]…",
                    (
                        "log: info: pass(1): tcp/bind ]: "
                        "CLIENT SERVER -> BOUND 0.0.0.0.0: eof from client",
                    ),
                ),
                Unlike(
                    EARLY, "log: …tcp/accept ]…",
                    ("log: info: pass(1): tcp/accept ]: CLIENT SERVER: eof from client",),
                ),
            ),
        ),
        case(
            "peer ends first",
            bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, fin_of("visitor"), end, fin,
            end_of("visitor"), unlike=PEER_CLOSED_BIND,
        ),
        case(
            "wanted port",
            bind("0.0.0.0/client"), visit("127.0.0.3"), second_reply, close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
        case("IPv6 without IPv6 outside", bind("::1/80"), end),
        case("all of IPv6 without IPv6 outside", bind("::/80"), end),
        case(
            "extension that is off",
            bind("255.255.255.255/80"), end,
            unlike=final_rule(
                "tcp/bind ]: CLIENT SERVER -> 0.0.0.0.0 255.255.255.255.80: "
                "client requested disabled Dante extension: bind",
                ACCEPTED,
            ),
        ),
        case(
            "bytewise",
            bytewise, bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
    ),
)
BIND_RULES = Group(
    "bind rules",
    conf(
        CLIENT_PASS,
        rule("socks pass", "from: 0/0 to: 127.0.0.1/32", "command: bind"),
        rule("socks block", "from: 127.0.0.4/32 to: 0/0", "command: bindreply"),
        rule("socks pass", "from: 127.0.0.3/32 to: 127.77.0.0/16", "command: bindreply"),
    ),
    (
        case(
            "reply passes",
            bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
        case(
            "reply blocked by rule",
            bind("0.0.0.0/0"), visit("127.0.0.4", "wrong"), over_of("wrong"), visit("127.0.0.3"),
            second_reply, close_visitor, end, unlike=stranger_goes("0.0.0.0.0", 3),
        ),
        case(
            "reply blocked by no rule",
            bind("0.0.0.0/0"), visit("127.0.0.5", "wrong"), over_of("wrong"), visit("127.0.0.3"),
            second_reply, close_visitor, end,
            unlike=(
                *stranger_goes("0.0.0.0.0", 3),
                *final_rule("tcp/bindreply ]: WRONG BOUND -> SERVER CLIENT", "log: …tcp/bind […"),
            ),
        ),
    ),
)
UDP = Group(
    "udp",
    conf(CLIENT_PASS, SOCKS_PASS),
    (
        case(
            "echo",
            associate(), datagram("udp-echo", b"one"), answer(), datagram("udp-echo", b"three"),
            answer(), fin, end,
        ),
        case("no datagram", associate(), fin, end),
        case("client resets", associate(), datagram("udp-echo", b"one"), answer(), reset),
        case(
            "nobody listens",
            associate(), datagram("127.0.0.1/9", b"one"), logged("Connection refused"), fin, end,
        ),
        case(
            "target by name",
            associate(), datagram("echo.test/udp-echo", b"one"), answer(), fin, end,
        ),
        case(
            "unknown name",
            associate(), datagram("nowhere.test/udp-echo", b"one"), datagram("udp-echo", b"two"),
            answer(), fin, end,
        ),
        case(
            "port wanted",
            open_udp("udp"), associate("0.0.0.0/udp-client"), datagram("udp-echo", b"one"),
            answer(), fin, end,
        ),
        case("request by name", associate("echo.test/0"), fin, end),
        case(
            "v6 request",
            associate("::/0"), fin, end,
            unlike=(
                Unlike(RELAY_ADDRESS, "reply: …", ("reply: 05 00 00 01 127.0.0.1.*",)),
                Unlike(
                    RELAY_ADDRESS, "log: …tcp/accept ]…",
                    (
                        "log: info: pass(1): udp/udpassociate [: ::.0 RELAY",
                        "log: info: pass(1): udp/udpassociate ]: 0/0 -> ::.0 RELAY -> 0/0: "
                        "local client closed.  Session duration: _s",
                        CLOSED_AT_ACCEPT.format("local client closed"),
                    ),
                ),
            ),
        ),
        case(
            "fragment",
            associate(), datagram("udp-echo", b"one", fragment=1), datagram("udp-echo", b"two"),
            answer(), fin, end,
        ),
        case(
            "reserved bytes",
            associate(), datagram("udp-echo", b"one", reserved=0x1234), answer(), fin, end,
        ),
        case(
            "short headers",
            associate(), *(raw_datagram(bytes(10)[:n]) for n in (1, 3, 4, 9)),
            datagram("udp-echo", b"two"), answer(), fin, end,
        ),
        case(
            "bad address type",
            associate(), raw_datagram(bytes([0, 0, 0, 2, 127, 0, 0, 1, 0, 80, 1])),
            datagram("udp-echo", b"two"), answer(), fin, end,
        ),
        case("empty datagram", associate(), datagram("udp-echo", b""), answer(), fin, end),
        case(
            "large datagram",
            associate(), datagram("udp-echo", b"x" * 65497), answer(), fin, end,
        ),
        case(
            "target 0.0.0.0",
            associate(), datagram("0.0.0.0/udp-echo", b"one"), datagram("udp-echo", b"two"),
            answer(), fin, end,
        ),
        case(
            "target of IPv6",
            associate(), datagram("::1/udp-echo", b"one"), datagram("udp-echo", b"two"), answer(),
            fin, end,
        ),
        case(
            "unreachable target",
            associate(), datagram("203.0.113.1/80", b"one"), datagram("udp-echo", b"two"),
            answer(), fin, end,
            unlike=(
                Unlike(
                    UNSENT, "log: …: connect(2) to 203… failed: Network is unreachable",
                    ("log: {0}: sendto of 3 bytes failed: Network is unreachable",),
                ),
            ),
        ),
        case(
            "two targets",
            associate(), datagram("udp-echo", b"one"), answer(), datagram("udp-echo#2", b"two"),
            answer(), datagram("udp-echo", b"three"), answer(), fin, end,
        ),
        case(
            "data payload with odd bytes",
            associate(), datagram("udp-echo", b"\0\n\xff"), answer(), fin, end,
        ),
        case(
            "answers in twos",
            associate(), datagram("udp-twice", b"one"), answer(), answer(), fin, end,
        ),
        case(
            "stranger before the target is known to be one",
            associate(), datagram("udp-echo", b"one"), answer(), unasked("udp-sink", b"spam"),
            datagram("udp-echo", b"two"), answer(), fin, end,
        ),
        case(
            "junk on the control connection",
            associate(), send(b"junk"), datagram("udp-echo", b"one"), answer(), fin, end,
            unlike=(Unlike(NO_FUNCTION, "log: notice: run_io(): …", ("log: notice: {0}",)),),
        ),
        case("bytewise", bytewise, associate(), datagram("udp-echo", b"one"), answer(), fin, end),
    ),
    at_once=24,
)
# Without a log: what danted records of the datagrams that it does not take depends on chance.
UDP_SOURCES = Group(
    "udp sources",
    conf(
        rule("client pass", "from: 0/0 to: 0/0", log=""),
        rule("socks pass", "from: 0/0 to: 0/0", log=""),
    ),
    (
        case(
            "stranger first",
            associate(), open_udp("stranger", "127.0.0.44"),
            datagram("udp-sink", b"stranger", who="stranger"), datagram("udp-sink", b"client"),
            first_seen("udp-sink"), fin, end,
            unlike=(
                Unlike(
                    ONE_CLIENT, "udp-sink saw first: b'stranger'",
                    ("udp-sink saw first: b'client'",),
                ),
            ),
        ),
        case(
            "other port of the client",
            associate(), datagram("udp-echo", b"one"), answer(), open_udp("second"),
            datagram("udp-echo", b"two", who="second"), datagram("udp-echo", b"three"), answer(),
            fin, end,
        ),
    ),
    at_once=24,
)
UDP_RULES = Group(
    "udp rules",
    conf(
        CLIENT_PASS,
        rule(
            "socks block", "from: 0/0 to: 127.0.0.2/32", "command: udpassociate",
            log="connect disconnect error ioop",
        ),
        rule(
            "socks block", "from: 0/0 to: 0/0 port = 53", "command: udpassociate",
            log="connect disconnect error ioop",
        ),
        rule(
            "socks pass", "from: 0/0 to: 127.0.0.0/8", "command: udpassociate",
            log="connect disconnect error ioop",
        ),
        rule(
            "socks block", "from: 127.0.0.6/32 to: 0/0", "command: udpreply",
            log="connect disconnect error ioop",
        ),
        rule(
            "socks pass", "from: 127.0.0.0/29 to: 0/0", "command: udpreply",
            log="connect disconnect error ioop",
        ),
    ),
    (
        case("pass", associate(), datagram("udp-echo", b"one"), answer(), fin, end),
        case(
            "address blocked",
            associate(), datagram("127.0.0.2/udp-echo", b"one"), datagram("udp-echo", b"two"),
            answer(), fin, end,
        ),
        case(
            "port blocked",
            associate(), datagram("127.0.0.1/53", b"one"), datagram("udp-echo", b"two"), answer(),
            fin, end,
        ),
        case(
            "name blocked by its address",
            associate(), datagram("two.test/udp-echo", b"one"), datagram("udp-echo", b"two"),
            answer(), fin, end,
        ),
        case(
            "no rule for the target",
            associate(), datagram("203.0.113.1/80", b"one"), datagram("udp-echo", b"two"),
            answer(), fin, end,
            unlike=final_rule(
                "udp/udpassociate -: UDP-CLIENT RELAY -> 0.0.0.0.0 203.0.113.1.80",
                "log: …udp/udpassociate […",
            ),
        ),
        case(
            "answer blocked",
            associate(), datagram("udp-echo@127.0.0.6", b"one"), logged("block(4)"),
            datagram("udp-echo", b"two"), answer(), fin, end,
        ),
        case(
            "answer without a rule",
            associate(), datagram("udp-echo@127.0.0.9", b"one"), answered("udp-echo@127.0.0.9"),
            datagram("udp-echo", b"two"), answer(), fin, end,
            unlike=final_rule(
                "udp/udpreply -: 127.0.0.9.udp-echo 127.0.0.1.* -> RELAY UDP-CLIENT",
                "log: …127.0.0.9.udp-echo (3)",
            ),
            # The answer may be read before or after the next datagram.
            in_order=False,
        ),
        case(
            "answer blocked after one passed",
            associate(), datagram("udp-echo", b"one"), answer(),
            datagram("udp-echo@127.0.0.6", b"two"), logged("127.0.0.6.udp-echo 127"), fin, end,
            unlike=(
                Unlike(
                    EACH_SENDER, "log: info: pass(5): …127.0.0.6.udp-echo … (3)",
                    ("log: info: block(4): {0}127.0.0.6.udp-echo {1}",),
                ),
                Unlike(
                    EACH_SENDER, "log: …udp/udpassociate ]: 26/2…",
                    ("log: {0}udp/udpassociate ]: 13/1{1}",),
                ),
                Unlike(EACH_SENDER, "log: …tcp/accept ]: 26 …", ("log: {0}tcp/accept ]: 13 {1}",)),
            ),
        ),
    ),
    at_once=24,
)
IPV6 = Group(
    "ipv6",
    conf(CLIENT_PASS, SOCKS_PASS, more="internal: ::1 port = 0\nexternal: fd00::6"),
    (
        case("v5 to IPv6", connect("echo@fd00::6"), ping(), fin, end),
        case("v5 to the loopback address of IPv6", connect("echo@::1"), ping(), fin, end),
        case("v5 to IPv4", connect("echo"), ping(), fin, end),
        case("v4", connect4("echo"), ping(), fin, end),
        case("name of IPv6", connect("six.test/echo@fd00::6"), ping(), fin, end),
        case(
            "name of both, IPv4 there",
            connect("both.test/echo"), ping(), fin, end,
            unlike=(
                Unlike(
                    EVERY_ADDRESS, "reply: …",
                    ("reply: 05 00 00 01 127.0.0.1.*", "heard: b'ping'", "client end: fin"),
                ),
                Unlike(EVERY_ADDRESS, "log: …tcp/connect ]…", echo_session(4)[:-1]),
                Unlike(EVERY_ADDRESS, "log: …tcp/accept ]…", echo_session(4)[-1:]),
            ),
        ),
        case("name of both, IPv6 there", connect("both.test/echo@fd00::6"), ping(), fin, end),
        case("refused", connect("refuser@fd00::6"), over),
        case("unreachable", connect("2001:db8::1/80"), end),
        case("address ::", connect("::/echo"), end),
        case("mapped", connect("::ffff:127.0.0.1/echo"), ping(), fin, end),
        case("name that is an address", connect("=fd00::6/echo@fd00::6"), ping(), fin, end),
        case(
            "bind",
            bind("fd00::6/80"), visit("fd00::6"), second_reply, close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
        case(
            "bind to all of IPv6",
            bind("::/80"), visit("fd00::6"), second_reply, close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
        case(
            "bind to all of IPv4",
            bind("0.0.0.0/0"), visit("127.0.0.3"), second_reply, close_visitor, end,
            unlike=PEER_CLOSED_BIND,
        ),
        case(
            "udp to where nobody listens",
            associate(), datagram("fd00::6/9", b"one"), logged("Connection refused"), fin, end,
        ),
        case("udp to IPv6", associate(), datagram("udp-echo@fd00::6", b"one"), answer(), fin, end),
        case(
            "udp to both",
            associate(), datagram("udp-echo@fd00::6", b"one"), answer(),
            datagram("udp-echo", b"two"), answer(), fin, end,
            unlike=(
                Unlike(
                    BOTH_FAMILIES, "log: …tcp/accept ]: 13 -> CLIENT SERVER -> 3:…",
                    ("log: {0}tcp/accept ]: 38 -> CLIENT SERVER -> 6:{1}",),
                ),
            ),
        ),
    ),
    at_once=24,
)
GROUPS += [
    *LOGS, RULES, PORT_COLON, NO_CLIENT_RULE, NO_SOCKS_RULE, COMMANDS_BY_RULE, *METHODS, *USERS,
    TIMEOUTS, FIN_WAIT, BIND, BIND_RULES, UDP, UDP_SOURCES, UDP_RULES, IPV6,
]  # fmt: skip
# fmt: on


# ------------------------------ the tests ------------------------------


class Outcomes:
    """The outcomes of the groups, each run with both servers when it is first asked for."""

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
    if not case.in_order:
        expected, found = sorted(expected), sorted(found)
    # What the two have in common is shown as well: it is the story that the difference is in.
    assert found == expected, "\n".join(difflib.ndiff(expected, found))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_sockd_logs_nothing_of_its_own_about_no_client(group: Group, outcomes: Outcomes) -> None:
    danted, sockd = outcomes.of(group)
    complaints_of_the_parser = {line for line in sockd.unattributed if "warning: " in line}
    assert set(sockd.unattributed) - complaints_of_the_parser <= set(danted.unattributed)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_sockd_ends_well_after_these_clients(group: Group, outcomes: Outcomes) -> None:
    _, sockd = outcomes.of(group)
    assert not sockd.trouble, sockd.trouble


def test_table_names_every_case_once() -> None:
    names = [(group.name, case.name) for group in GROUPS for case in group.cases]
    assert len(set(names)) == len(names)
