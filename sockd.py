#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-2-Clause
"""sockd: a SOCKS 4, 4A and 5 server that runs Dante's sockd.conf.

The processes, and what each can do:

    mother            as started      binds, opens logs, forks, acts on signals; reads no client's byte
      |- warden       user.privileged    checks passwords, binds privileged ports, asks libwrap
      |- resolver     user.unprivileged  asks DNS, the group file, the interfaces
      '- worker (-N)  user.unprivileged, chroot   one thread for each client

There is a warden only where the configuration has something to ask of it.

A client's thread goes through Dante's three phases: negotiate (client-rules, SOCKS handshake,
password), request (socks-rules, connecting, binding) and io (relay).  What needs power or a file
system it asks of warden or resolver by one message from a closed list; nobody trusts a worker.

A reload (SIGHUP) never changes a configuration in place: new processes take up the new one and
the old ones finish their sessions.  So nothing here guards a configuration with a lock.

Contents.  Code names only what stands above it; up to 6 nothing touches the world:

    1. Terms             protocol numbers, words of the configuration, errors
    2. Records           the immutable facts that everything else passes round
    3. Scanner           configuration text to words with line and column
    4. Grammar           words to a Config, and all that can be wrong with it
    5. Rules             facts and rules to a decision
    6. Wire              bytes to messages and back
    7. Logging           the one writer of logs, in Dante's formats
    8. Operating system  what Python's library does not offer
    9. Sockets           waiting, listening, connecting; errno to SOCKS reply
    10. Privileges       fork, chroot, identity; asking who has the power
    11. Authentication   who is this: passwords, PAM, ident
    12. Shared counts    what all workers count together: sessions
    13. Relay            bytes and datagrams between two sides
    14. Upstreams        the way to a target through other proxies
    15. Session          one client, from accept to its request
    16. Requests         CONNECT, BIND and UDP ASSOCIATE
    17. HTTP             clients that speak HTTP on the same port
    18. Processes        worker, resolver, warden
    19. Mother           listeners, children, signals, reload
    20. Command line     options and exit status

Words: a *client* asks us for a *target*; *internal* is our side towards clients, *external* that
towards targets; a *rule* gives a *verdict*, pass or block; an *endpoint* is an address with a port.
Comments that begin with "As Dante:" mark a quirk that is copied, "Unlike Dante:" one that is not.
"""

from __future__ import annotations

import _operator  # for its _compare_digest: hmac, which calls it so that all may, loads all of OpenSSL
import _thread
import binascii
import bisect
import ctypes
import enum
import errno
import fcntl
import functools
import gc
import getopt
import grp
import importlib
import itertools
import math
import os
import pwd
import re
import resource
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

if sys.version_info < (3, 10):  # noqa: UP036
    # What stands below would end it in a traceback.
    raise SystemExit("sockd needs Python 3.10 or newer")

__version__ = "1.0.0"

T = TypeVar("T")
K = TypeVar("K")
# ============================== 1. Terms ==============================
# Every number and word of the protocols and of sockd.conf, the limits with their
# origins, and the errors.  Words of the configuration language are plain strings,
# spelled as in the file, so that a rule, a log line and a test read alike.

SOCKS4, SOCKS5 = 4, 5
HTTP1 = 1  # in the place of a SOCKS version
SOCKS4_REPLY_VERSION = 0  # "VN is the version of the reply code and should be 0" (SOCKS 4)
PASSWORD_VERSION = 1  # RFC 1929 section 2

COMMANDS = ("connect", "bind", "udpassociate", "bindreply", "udpreply")
COMMAND_OF_BYTE = {1: "connect", 2: "bind", 3: "udpassociate"}  # RFC 1928 section 4
REPLY_COMMANDS = frozenset({"bindreply", "udpreply"})
UDP_COMMANDS = frozenset({"udpassociate", "udpreply"})
TCP_COMMANDS = frozenset({"connect", "bind", "bindreply"})

METHODS = (
    "none", "gssapi", "username", "rfc931",
    "pam.any", "pam.address", "pam.username", "bsdauth", "ldapauth",
)  # fmt: skip
METHOD_OF_BYTE = {0: "none", 1: "gssapi", 2: "username"}  # RFC 1928 section 3
NO_ACCEPTABLE_METHOD = 0xFF
# RFC 1961 section 4.2; 0 is NEC's and Dante's.
PROTECTIONS = ("clear", "integrity", "confidentiality", "per-message")
# As Dante: in the clear only where the configuration says so, as RFC 1961 does not have it.
DEFAULT_PROTECTIONS = ("integrity", "confidentiality")
ANY_SERVICE = "GSS_C_NO_NAME"  # As Dante: a gssapi.servicename for every key of the key table
# What can be asked of a client before it has said a word (sockd.conf(5), clientmethod).
CLIENT_METHODS = frozenset({"none", "rfc931", "pam.address", "pam.any"})
# These tell who the client is; the others only that it may pass.
NAMING_METHODS = frozenset(
    {"username", "rfc931", "pam.username", "pam.address", "gssapi", "bsdauth", "ldapauth"}
)

PROXY_PROTOCOLS = ("socks_v4", "socks_v5", "http", "upnp")
PROXY_PROTOCOL_OF_VERSION = {SOCKS4: "socks_v4", SOCKS5: "socks_v5", HTTP1: "http"}
LOG_EVENTS = ("connect", "disconnect", "data", "error", "ioop", "tcpinfo")

USE_CLIENTS_PORT = 4  # a bit of RSV in draft-ietf-aft-socks-pro-v5-05, which RFC 1928 came before

ATYP_IPV4, ATYP_NAME, ATYP_IPV6 = 1, 3, 4  # RFC 1928 section 5


class Reply(enum.IntEnum):
    """The REP field (RFC 1928 section 6)."""

    SUCCEEDED = 0
    FAILURE = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    CONNECTION_REFUSED = 5
    TTL_EXPIRED = 6
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


class Reply4(enum.IntEnum):
    """The CD field of a SOCKS 4 reply."""

    GRANTED = 90
    REJECTED = 91
    NO_IDENT = 92  # the server cannot connect to the client's identd
    WRONG_IDENT = 93  # client and identd report different user ids


class SockdError(Exception):
    """Base of every error that sockd raises on purpose."""


class ConfigError(SockdError):
    """The configuration cannot be used; the text says where, what and how to mend it."""


class ProtocolError(SockdError):
    """The peer broke its protocol; `reply` is the SOCKS reply it is owed, or None for silence."""

    def __init__(self, text: str, reply: Reply | None = None) -> None:
        super().__init__(text)
        self.reply = reply


class HttpError(ProtocolError):
    """An HTTP message cannot be used; `status` is what the client is answered (RFC 9110 section 15)."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Refused(SockdError):
    """Policy or circumstance forbids a request; `reply` is what the client is told."""

    def __init__(self, text: str, reply: Reply = Reply.NOT_ALLOWED) -> None:
        super().__init__(text)
        self.reply = reply


class DeadlinePassed(SockdError):
    """A wait took longer than the configuration allows."""


class PeerGone(SockdError):
    """The peer closed its connection in the middle of a message."""


# ============================== 2. Records ==============================
# Immutable facts that the rest of the program passes round.  They are named tuples because those
# cost little at start and in memory; dataclasses would import half of the compiler.
# `str()` of an Endpoint is its spelling in Dante's log lines.


class Endpoint(NamedTuple):
    """An address and port; `family` is 4 or 6, or 0 when `host` is a name still unresolved.

    `host` is the canonical text of the address (socket.inet_ntop), with `%scope` where an
    IPv6 link-local address needs one.
    """

    host: str
    port: int
    family: int = 4

    def __str__(self) -> str:
        # As Dante: a dot stands before the port, also behind an IPv6 address.
        return f"{self.host}.{self.port}"


UNSPECIFIED = Endpoint("0.0.0.0", 0)


class Position(NamedTuple):
    """A place in a configuration file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Complaint(NamedTuple):
    """One thing that the parser or the checks have to say about a configuration."""

    level: str  # "error", "warning" or "notice"
    text: str  # what is wrong and what was expected
    position: Position | None = None  # None: it is about the file as a whole
    line_text: str = ""  # the line of the file, for the caret below it
    length: int = 1  # how many characters the caret underlines
    hint: str = ""  # the fix, e.g. 'did you mean "external"?'


class PortTest(NamedTuple):
    """The `port` clause of an address: an operator and its number or inclusive range."""

    operator: str = "any"  # any eq ne ge le gt lt range
    low: int = 0
    high: int = 65535

    def __str__(self) -> str:
        if self.operator == "any":
            return ""
        return (
            f" port {self.low}-{self.high}"
            if self.operator == "range"
            else f" port {self.operator} {self.low}"
        )


class RuleAddress(NamedTuple):
    """An address pattern of a rule, route or monitor.

    kind: "any" (0/0: every address of both families and every name), "ipv4", "ipv6",
    "host" (a host name), "domain" (text without its leading dot; "" for the lone dot, which
    matches every name) or "interface".  For ipv4 and ipv6, `network` is the address as an
    integer with the host bits cleared and `prefix` the length of the mask.
    """

    kind: str
    text: str
    network: int = 0
    prefix: int = 0
    port: PortTest = PortTest()


class Timeouts(NamedTuple):
    """All in seconds; 0 means never (sockd.conf(5), timeout.*)."""

    negotiate: int = 30
    connect: int = 30
    io_tcp: int = 0
    io_udp: int = 86400  # As Dante: what the program does; its manual says 0.
    tcp_fin_wait: int = 0


class SocketOption(NamedTuple):
    """One `internal.LEVEL.NAME: VALUE` line, as the kernel wants it.

    `level` and `number` are setsockopt(2)'s; `value` is the final integer (for a sub-field of
    ip_tos already shifted, with `mask` the bits that it replaces; mask 0 replaces the whole value).
    """

    side: str  # "internal" or "external"
    level_name: str  # ip socket tcp udp
    name: str  # so_keepalive, ip_tos.dscp, or a number as text
    level: int
    number: int
    value: int
    mask: int = 0


class ErrorLog(NamedTuple):
    """`internal.log.LEVEL.error: SYMBOLS`, or `.tcp.enabled` / `.tcp.disabled` in `event`."""

    side: str
    level: str  # emerg alert crit err warning notice info debug
    event: str  # "error", "tcp.enabled" or "tcp.disabled"
    symbols: tuple[str, ...]  # upper-case errno and EAI names, or no-route dns-any system-any; or tcp words


class SessionLimits(NamedTuple):
    """`session.*` of one rule; None where not set.  Throttles are (clients, seconds)."""

    max: int | None = None
    throttle: tuple[int, int] | None = None
    state_key: tuple[str, ...] = ()  # "from", "hostid"
    state_max: int | None = None
    state_throttle: tuple[int, int] | None = None
    inheritable: bool = True


class Redirect(NamedTuple):
    """`redirect from:` / `redirect to:` of a rule or route."""

    source: RuleAddress | None = None
    target: RuleAddress | None = None


class Gssapi(NamedTuple):
    """`gssapi.*` and `clientcompatibility` of a rule or route."""

    servicename: str = "rcmd"
    keytab: str = "FILE:/etc/sockd.keytab"  # in a route, "" is where Kerberos itself looks for tickets
    enctypes: tuple[str, ...] = ()
    nec: bool = False


class Rule(NamedTuple):
    """One client-, hostid- or socks-rule with everything that its defaults fill in.

    `commands`, `protocols`, `proxyprotocols`, `clientmethods` and `socksmethods` are final: what
    the file left out has been copied from the globals or derived, as Dante does at load.
    """

    kind: str  # "client", "hostid" or "socks"
    number: int  # from 1 in each kind, in the order of the file; 0: the built-in final block
    verdict: str  # "pass" or "block"
    source: RuleAddress
    target: RuleAddress
    position: Position | None = None
    commands: frozenset[str] = frozenset()
    protocols: frozenset[str] = frozenset({"tcp"})
    proxyprotocols: frozenset[str] = frozenset({"socks_v4", "socks_v5"})
    clientmethods: tuple[str, ...] = ("none",)
    socksmethods: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    log: frozenset[str] = frozenset()
    timeouts: Timeouts = Timeouts()
    pam_servicename: str = "sockd"
    bsdauth_stylename: str = ""
    udp_portrange: tuple[int, int] | None = None
    session: SessionLimits = SessionLimits()
    bandwidth: int | None = None
    redirect: Redirect | None = None
    bounce: Endpoint | None = None  # client-rules: family 0 for a name
    libwrap: str | None = None
    hostindex: int = 0
    gssapi: Gssapi = Gssapi()
    socket_options: tuple[SocketOption, ...] = ()  # the global ones first, then the rule's own
    error_logs: tuple[ErrorLog, ...] = ()


class Credentials(NamedTuple):
    """What we log in to an upstream with.  Its spelling shows neither part."""

    user: str
    password: bytes

    def __repr__(self) -> str:
        return "Credentials(...)"


class Hop(NamedTuple):
    """One `via` of a route: proxies of which any will do, and how they are spoken to."""

    upstreams: tuple[Endpoint, ...]
    proxyprotocols: tuple[str, ...] = ("socks_v4", "socks_v5")
    methods: tuple[str, ...] = ("none",)
    credentials_file: str = ""  # ours; "": the client's own name and password are passed on
    credentials: Credentials | None = None  # what that file holds, filled in after parsing


class Route(NamedTuple):
    """One `route` object.  `hops` are the proxies to go through, the nearest first; () is direct."""

    number: int  # 0: made up for connections to the proxies themselves
    source: RuleAddress
    target: RuleAddress
    hops: tuple[Hop, ...] = ()
    position: Position | None = None
    commands: frozenset[str] = frozenset({"connect"})
    protocols: frozenset[str] = frozenset({"tcp"})
    balance: str = "order"  # ours: order, random, roundrobin or fewest
    resolve: str = "both"  # ours: here, there or both
    redirect: Redirect | None = None
    gssapi: Gssapi = Gssapi()
    socket_options: tuple[SocketOption, ...] = ()


class UpstreamService(NamedTuple):
    """An upstream to GSS-API: what to call it, and the key table that says who we are."""

    name: str  # SERVICE@HOST, or a principal
    keytab: str


class Step(NamedTuple):
    """One upstream on a path, and how it is spoken to."""

    upstream: Endpoint
    protocol: str  # one of PROXY_PROTOCOLS
    hop: Hop


class Path(NamedTuple):
    """One way to a target that a route allows: the upstreams to pass through, the nearest first.

    No steps: direct.  `addresses` are those of the target's that the route is for; () where only the last
    upstream will resolve its name.
    """

    route: Route
    steps: tuple[Step, ...] = ()
    addresses: tuple[Endpoint, ...] = ()


class Alarm(NamedTuple):
    """One alarm of a monitor: `kind` "data", "disconnect" or "mtu-error"."""

    kind: str
    sides: tuple[str, ...]  # ("internal", "external") when written without a side
    directions: tuple[str, ...] = ()  # ("recv", "send") for data
    limit: int = 0  # bytes, or disconnects
    sessions: int = 0  # disconnect only: the N of COUNT/N
    seconds: int = 0


class Monitor(NamedTuple):
    """One `monitor` object."""

    number: int
    source: RuleAddress
    target: RuleAddress
    position: Position | None = None
    commands: frozenset[str] = frozenset(COMMANDS)
    protocols: frozenset[str] = frozenset({"tcp", "udp"})
    alarms: tuple[Alarm, ...] = ()


class External(NamedTuple):
    """One outgoing address: an IP address (`endpoint`, port 0) or an interface kept by name."""

    text: str
    endpoint: Endpoint | None = None  # None: an interface, resolved again whenever it is used
    position: Position | None = None


class Config(NamedTuple):
    """A whole sockd.conf, checked; nothing in it changes after parsing."""

    file: str
    internal: tuple[Endpoint, ...] = ()  # every address to listen on; port 0 takes a free one
    external: tuple[External, ...] = ()
    internal_protocols: frozenset[str] = frozenset({"ipv4", "ipv6"})
    external_protocols: frozenset[str] = frozenset({"ipv4", "ipv6"})
    external_rotation: str = "none"
    clientmethods: tuple[str, ...] = ()
    socksmethods: tuple[str, ...] = ()
    user_privileged: str = ""  # "" where the file says nothing
    user_unprivileged: str = ""
    user_libwrap: str = ""
    logoutput: tuple[str, ...] = ()  # "stdout", "stderr", "syslog", "syslog/FACILITY" or a file
    errorlog: tuple[str, ...] = ()
    debug: int = 0
    timeouts: Timeouts = Timeouts()
    udp_connectdst: bool = True
    compatibility: frozenset[str] = frozenset()  # "sameport", "draft-5.05"
    extension: frozenset[str] = frozenset()  # "bind"
    srchost: frozenset[str] = frozenset()
    resolveprotocol: str = "udp"
    route_maxfail: int = 1
    route_badexpire: int = 300
    libwrap_hosts_access: bool = False
    libwrap_allow: str = ""
    libwrap_deny: str = ""
    child_maxrequests: int = 0
    child_maxlifetime: int = 0
    cpu_schedules: tuple[tuple[str, str, int], ...] = ()  # (process, policy, priority)
    cpu_masks: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (process, CPUs); () means any
    socket_options: tuple[SocketOption, ...] = ()
    error_logs: tuple[ErrorLog, ...] = ()
    passwordfile: str = ""  # ours: sockd's own accounts for method username
    chroot: str = ""  # ours: the workers' root directory
    login_penalty: bool = True  # ours: wrong log-ins slow down their source
    client_rules: tuple[Rule, ...] = ()
    hostid_rules: tuple[Rule, ...] = ()
    socks_rules: tuple[Rule, ...] = ()
    routes: tuple[Route, ...] = ()
    monitors: tuple[Monitor, ...] = ()
    uses: tuple[tuple[str, Position], ...] = ()  # each keyword (canonical name) and where it stands


class Identity(NamedTuple):
    """Who a client is, as far as it has shown.

    `clientmethod` is what admitted it at the client-rule, `method` what it negotiated
    ("none" or "username": on the wire there is no difference between the password methods).
    """

    clientmethod: str = "none"
    method: str = "none"
    user: str = ""


class Request(NamedTuple):
    """What a client asks for; `version` is SOCKS5, SOCKS4 or HTTP1."""

    version: int
    command: str
    target: Endpoint
    user: str = ""  # SOCKS 4's USERID: never a proof of anything
    flags: int = 0  # RSV of SOCKS 5


class Facts(NamedTuple):
    """What the rules are asked about: one connection, request, reply or datagram."""

    command: str  # "accept" for client-rules, else one of COMMANDS
    protocol: str  # "tcp" or "udp"
    proxyprotocol: str  # one of PROXY_PROTOCOLS; "" for client-rules
    source: Endpoint
    target: Endpoint | None  # None: not known yet (UDP ASSOCIATE before the first datagram)
    addresses: tuple[Endpoint, ...] = ()  # what the name in target resolved to, once for the whole session
    families: frozenset[int] = frozenset({4, 6})  # those that we can leave by
    identity: Identity = Identity()


class Decision(NamedTuple):
    """The verdict on some Facts.

    `addresses` are those that the session may use (connect to) under this rule; `method` is what
    remains to be verified before a pass counts ("" for nothing); `reason` is for the log.
    """

    verdict: str
    rule: Rule
    reason: str = ""
    addresses: tuple[Endpoint, ...] = ()
    method: str = ""
    paths: tuple[Path, ...] = ()  # of a datagram, where there are routes; without addresses
    lasts: bool = True  # False: it may be another one the next time, though nothing has changed


# ============================== 3. Scanner ==============================
# Reads words out of the text of a configuration file and knows where each one stands.
# It owns blanks, comments, joined lines and line counting, and nothing else: what a word may
# look like depends on the keyword before it (an address holds colons, a file name holds almost
# anything), so the grammar passes the pattern of the word that it expects.

BLANKS = re.compile(r"(?:[ \t]+|\\\r?\n|\r(?=\n|\Z)|#[^\n]*)*")
SPACE = re.compile(r"(?:[ \t\n]+|\\\r?\n|\r(?=\n|\Z)|#[^\n]*)*")
COLON = re.compile(r":")
COMMA = re.compile(r",")
SLASH = re.compile(r"/")
DASH = re.compile(r"-")
OPEN_BRACE = re.compile(r"\{")
CLOSE_BRACE = re.compile(r"\}")
# Unlike Dante: a word has an end, so "port80" is no port and "connectbind" no list of commands.
KEYWORD_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
VALUE_WORD = re.compile(r"[^\x00-\x20\x7f\\{}:,#]+")
NUMBER_WORD = re.compile(r"-?[0-9][A-Za-z0-9_.]*")
ADDRESS_WORD = re.compile(r"[^\x00-\x20\x7f\\{},#/]+")
MASK_WORD = re.compile(r"[0-9A-Fa-fx.:]+")
USER_WORD = re.compile(r"(?:[^\x00-\x20\x7f\\{}:,]|\\(?!\r?\n))+")
FILE_WORD = re.compile(r"(?:[^\x00-\x20\x7f\\]|\\(?!\r?\n))+")
REST_OF_LINE = re.compile(r"[^\r\n]*")
# What cannot start a word is shown whole if it can be printed, else one character of it.
STRANGE_WORD = re.compile(r"[{}]|[^\x00-\x20\x7f{}]+|[^\n]")
END_OF_VALUES = re.compile(r"\}|(?=\n)|\Z")
UNREAD_LINE = re.compile(r"(?:[^\n{}#]+|#[^\n]*)*")
UNREAD_BLOCK = re.compile(r"\{(?:[^{}#]+|#[^\n]*)*\}?")
KEYWORD_WITH_COLON = re.compile(r"(?:(?:redirect|bounce)[ \t]+(?:to|from)|[A-Za-z][A-Za-z0-9_.-]*)[ \t]*:")
KEYWORD_IN_LINE = re.compile(r"(?<![^ \t{}])([A-Za-z][A-Za-z0-9_.-]*)(?: +to| +from)?[ \t]*:")
NUMBER = re.compile(r"0x[0-9A-Fa-f]+|0[0-7]*|[1-9][0-9]*")


def skip(pattern: re.Pattern[str], text: str, offset: int) -> int:
    """Find where the match of `pattern` at `offset` ends."""
    found = pattern.match(text, offset)
    return found.end() if found else offset


class Token(NamedTuple):
    """A word and its offset in the text."""

    text: str
    offset: int


class Mistake(ConfigError):
    """The parser cannot use `token`; `hint` says how to mend it."""

    def __init__(self, text: str, token: Token, hint: str = "") -> None:
        super().__init__(text)
        self.token = token
        self.hint = hint


class Scanner:
    """The text of one configuration file and how far it has been read."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text.removeprefix("\xef\xbb\xbf")  # UTF-8's mark, as some editors write it
        self.file = file
        self.offset = 0
        self._known_line = 1  # the line in which _known_offset lies, and where it starts
        self._known_start = 0
        self._known_offset = 0
        self._line = ""  # the last that was asked for, and its start
        self._line_start = -1

    def look(self, pattern: re.Pattern[str]) -> Token | None:
        """Find the next word of this line, without taking it."""
        self.offset = skip(BLANKS, self.text, self.offset)
        found = pattern.match(self.text, self.offset)
        return Token(found.group(), self.offset) if found else None

    def take(self, pattern: re.Pattern[str]) -> Token | None:
        """Take the next word of this line if it has the form of `pattern`."""
        token = self.look(pattern)
        if token:
            self.offset += len(token.text)
        return token

    def take_below(self, pattern: re.Pattern[str]) -> Token | None:
        """Take the next word, be it in this line or in one further down."""
        self.skip_space()
        return self.take(pattern)

    def take_further(self, pattern: re.Pattern[str]) -> Token | None:
        """take_below for what need not follow: where it does not, stay in this line."""
        start = self.offset
        token = self.take_below(pattern)
        if token is None:
            self.offset = start
        return token

    def skip_space(self) -> None:
        self.offset = skip(SPACE, self.text, self.offset)

    def next_token(self) -> Token:
        """Give whatever comes next, for complaints; the text is empty at the end of the line."""
        return self.look(STRANGE_WORD) or Token("", self.offset)

    def at_end(self) -> bool:
        return self.offset >= len(self.text)

    def values_end(self) -> bool:
        """Tell whether a list of values ends here: at the end of the line or of the rule."""
        return self.look(END_OF_VALUES) is not None

    def place(self, offset: int) -> Position:
        """Count line and column; quick when asked in the order of the file."""
        if offset < self._known_offset:
            self._known_line, self._known_start, self._known_offset = 1, 0, 0
        self._known_line += self.text.count("\n", self._known_offset, offset)
        line_end = self.text.rfind("\n", self._known_offset, offset)
        self._known_start = line_end + 1 if line_end >= 0 else self._known_start
        self._known_offset = offset
        return Position(self.file, self._known_line, offset - self._known_start + 1)

    def line_text(self, offset: int) -> str:
        """Give the whole line around `offset`, without its line end."""
        start = self.text.rfind("\n", 0, offset) + 1
        if start != self._line_start:
            # Kept, so that many complaints about one long line share one copy.
            end = self.text.find("\n", offset)
            line = self.text[start : end if end >= 0 else len(self.text)]
            self._line, self._line_start = line.removesuffix("\r"), start
        return self._line


# ============================== 4. Grammar ==============================
# Turns the words into a Config.  It owns every keyword of sockd.conf(5), what each may be
# given and where, the values that are filled in when the file is silent, and the checks of the
# whole.  Nothing is read from the machine but through Surroundings.  A mistake is noted and
# parsing goes on at the next keyword, line or closing brace, so that one run shows them all.

MAX_ERRORS = 50  # after so many the file is no configuration, or one repair will mend most
MAX_WARNINGS = 200
MAX_SECONDS = 2**32 - 1
MAX_NUMBER = 2**63 - 1
MAX_OPTION = 2**31 - 1  # setsockopt(2) takes a C int
MAX_NAME = 255  # As Dante: bytes in a host name; it is also what fits behind ATYP 3
SOCKS_PORT = 1080
HTTP_PORT = 80
SHOWN_COLUMNS = 120

# ---- what is not supported

WORKS = "works"
NEVER = "never here"

NEEDS_OPENBSD = "it needs BSD Authentication, which only OpenBSD has"
NEEDS_LDAP = "it needs an LDAP library"
NEEDS_HOSTID = "it needs a kernel that is patched for the TCP option of host ids"
NEEDS_UPNP = "it needs a UPnP library"

# Keywords and values that are parsed but cannot be acted upon, and what that would take.
# A value stands behind its keyword; a name that ends in a dot stands for all that begin so.
UNSUPPORTED = {
    "bsdauth.stylename": NEEDS_OPENBSD,
    "hostid": NEEDS_HOSTID,
    "hostid block": NEEDS_HOSTID,
    "hostid pass": NEEDS_HOSTID,
    "hostindex": NEEDS_HOSTID,
    "ldap.": NEEDS_LDAP,
    "proxyprotocol: upnp": NEEDS_UPNP,
    "session.state.key.hostindex": NEEDS_HOSTID,
    "session.state.key: hostid": NEEDS_HOSTID,
    "socksmethod: bsdauth": NEEDS_OPENBSD,
    "socksmethod: ldapauth": NEEDS_LDAP,
    "via: broadcast": NEEDS_UPNP,
}


def find_reason(name: str) -> str:
    """Find why a keyword or a "keyword: value" is not supported; "" when it is."""
    if name in UNSUPPORTED:
        return UNSUPPORTED[name]
    keyword = name.partition(":")[0]
    while "." in keyword:
        keyword = keyword.rpartition(".")[0]
        if keyword + "." in UNSUPPORTED:
            return UNSUPPORTED[keyword + "."]
    return ""


def find_status(name: str) -> str:
    """Tell the support status of a keyword or of a "keyword: value"."""
    return NEVER if find_reason(name) else WORKS


class Surroundings(Protocol):
    """What the grammar must know about the machine.  Addresses have port 0."""

    def user_exists(self, name: str) -> bool: ...

    def interface_addresses(self, name: str) -> tuple[Endpoint, ...] | None:
        """None: there is no such interface; (): it has no address."""
        ...

    def resolve(self, name: str) -> tuple[Endpoint, ...]:
        """Every address of a host name; () when it cannot be resolved."""
        ...

    def service(self, name: str, protocol: str) -> int | None: ...

    def cpus(self) -> frozenset[int]: ...


class TooManyErrors(ConfigError):
    """Parsing stops here."""


class Draft:
    """What the globals, or one rule, route or monitor, have said so far.

    `values` is keyed by the field of the record to be built, with a dot where the field lies
    in a record of its own ("timeouts.connect").
    """

    def __init__(self, context: str, head: Token, position: Position, verdict: str = "") -> None:
        self.context = context  # global client socks hostid route monitor
        self.head = head
        self.position = position
        self.verdict = verdict
        self.values: dict[str, Any] = {}
        self.places: dict[str, Token] = {}  # by canonical keyword
        # The keywords that had a mistake; "" for what could not even be read as a keyword.
        self.broken: set[str] = set()
        self.last = ""  # the keyword before this one

    def group(self, name: str) -> dict[str, Any]:
        """Select the values that belong to the record in field `name`."""
        start = name + "."
        return {key.removeprefix(start): value for key, value in self.values.items() if key.startswith(start)}

    def plain(self) -> dict[str, Any]:
        return {key: value for key, value in self.values.items() if "." not in key}


class Parser:
    """The state of one parse: what is left of the text, what was found, what was wrong."""

    def __init__(self, scanner: Scanner, surroundings: Surroundings, keywords: frozenset[str]) -> None:
        self.scanner = scanner
        self.surroundings = surroundings
        self.keywords = keywords
        self.settings = Draft("global", Token("", 0), Position(scanner.file, 1, 1))
        self.draft = self.settings  # the one that is being read
        self.objects: list[Draft] = []
        self.uses: list[tuple[str, Position]] = []
        self.complaints: list[Complaint] = []
        self.errors = 0
        self._deprecated: set[tuple[str, str]] = set()

    def complain(self, level: str, text: str, token: Token, hint: str = "") -> None:
        """Note a complaint about `token`; the length of its text is what the caret underlines."""
        if level != "error" and len(self.complaints) - self.errors >= MAX_WARNINGS:
            return
        place = self.scanner.place(token.offset)
        line = self.scanner.line_text(token.offset)
        length = max(1, len(token.text))
        self.complaints.append(Complaint(level, text, place, line, length, hint))
        if level == "error":
            self.errors += 1
            if self.errors >= MAX_ERRORS:
                raise TooManyErrors

    def complain_of_file(self, level: str, text: str, hint: str = "") -> None:
        self.complaints.append(Complaint(level, text, hint=hint))
        self.errors += level == "error"

    def error(self, text: str, token: Token, hint: str = "") -> None:
        self.complain("error", text, token, hint)

    def warn(self, text: str, token: Token, hint: str = "") -> None:
        self.complain("warning", text, token, hint)

    def warn_of_old(self, old: Token, new: str) -> None:
        """Warn once of each old spelling."""
        if (old.text, new) in self._deprecated:
            return
        self._deprecated.add((old.text, new))
        self.warn(f'keyword "{old.text}" is deprecated: use "{new}"', old)

    def use(self, name: str, token: Token) -> None:
        self.uses.append((name, self.scanner.place(token.offset)))

    def use_value(self, keyword: str, value: Token) -> None:
        """Remember a value that has a support status of its own."""
        name = f"{keyword}: {value.text}"
        if name in UNSUPPORTED:
            self.use(name, value)


# What stands behind a keyword's colon is read by a function of this form; the token is the
# keyword as it stands in the file.
Reader = Callable[[Parser, Token], Any]


# ---- words and numbers


def describe_words(words: Iterable[str]) -> str:
    """Join words for a sentence: "a", "a or b", "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def find_similar(word: str, known: Iterable[str]) -> str:
    """Suggest the known word that is most like `word`, as a hint; "" when none is."""
    # Imported here as only a faulty file needs it: it would slow down every start.
    import difflib

    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word[:80].lower(), by_lower, n=1, cutoff=0.7)
    return f'did you mean "{by_lower[close[0]]}"?' if close else ""


def describe_token(token: Token) -> str:
    if not token.text:
        return "the end of the line"
    return f'"{shorten(token.text)}"' if token.text.isprintable() else "an unprintable character"


def parse_number_text(token: Token) -> int:
    """Convert a number; as in C, 0x starts a hexadecimal and 0 an octal one."""
    if not NUMBER.fullmatch(token.text):
        hint = "write a whole number, e.g. 30"
        if re.fullmatch(r"0[0-9]+", token.text):
            hint = "a leading 0 makes the number octal: leave it out"
        raise Mistake(f'"{shorten(token.text)}" is not a number', token, hint)
    if len(token.text) > 25:
        return MAX_NUMBER + 1
    if token.text.startswith("0x"):
        return int(token.text, 16)
    return int(token.text, 8 if token.text.startswith("0") else 10)


def check_range(value: int, low: int, high: int, token: Token) -> int:
    if not low <= value <= high:
        text = f"{shorten(token.text)} is out of range: it must be from {low} to {high}"
        raise Mistake(text, token)
    return value


def parse_number(parser: Parser, low: int, high: int) -> int:
    token = parser.scanner.take_below(NUMBER_WORD)
    if token is None:
        found = parser.scanner.next_token()
        raise Mistake(f"expected a number, not {describe_token(found)}", found)
    return check_range(parse_number_text(token), low, high, token)


def parse_large_number(parser: Parser, low: int, high: int) -> int:
    """Read a number of which all above `high` means the same.  As Dante: it may have 63 bits."""
    return min(parse_number(parser, low, MAX_NUMBER), high)


def parse_word(parser: Parser, word: str) -> bool:
    """Take `word` if it comes next."""
    found = parser.scanner.look(VALUE_WORD)
    return found is not None and found.text == word and bool(parser.scanner.take(VALUE_WORD))


def parse_pair(parser: Parser, high: int) -> tuple[int, int]:
    """Read FIRST/SECOND, each at least 1."""
    first = parse_large_number(parser, 1, high)
    if not parser.scanner.take_further(SLASH):
        found = parser.scanner.next_token()
        raise Mistake(f'expected "/" and a second number, not {describe_token(found)}', found)
    return first, parse_large_number(parser, 1, high)


def setting_follows(parser: Parser, pattern: re.Pattern[str]) -> bool:
    """Tell whether the next word is a keyword with its colon, and so ends a list of values."""
    word = parser.scanner.look(KEYWORD_WITH_COLON)
    # A file name may hold a colon: there only a known keyword counts.
    return word is not None and (pattern is not FILE_WORD or word.text.rstrip(" \t:") in parser.keywords)


def warn_of_comma(parser: Parser, comma: Token) -> None:
    # Unlike Dante: it refuses commas, but older files and manuals have them.
    parser.warn("values are separated by blanks, not by commas", comma)


def take_values(parser: Parser, keyword: Token, pattern: re.Pattern[str]) -> Iterator[Token]:
    """Take the words of a list, up to the end of the line, "}" or the next keyword.

    Unlike Dante: its lists of values swallow the "}" and the comment behind a blank, too.
    """
    count = 0
    while not parser.scanner.values_end() and not setting_follows(parser, pattern):
        word = parser.scanner.take(pattern)
        if word is None:
            found = parser.scanner.next_token()
            raise Mistake(f'{describe_token(found)} is no value for "{keyword.text}"', found)
        count += 1
        yield word
        comma = parser.scanner.take(COMMA)
        if comma:
            warn_of_comma(parser, comma)
    if count == 0:
        raise Mistake(f'"{keyword.text}" needs a value, in the same line', keyword)


def complain_of_value(parser: Parser, keyword: Token, word: Token, known: Iterable[str]) -> None:
    parser.draft.broken.add(parser.draft.last)
    known = list(known)
    parser.error(
        f'"{shorten(word.text)}" is no value for "{keyword.text}": it must be {describe_words(known)}',
        word,
        find_similar(word.text, known),
    )


def some_of(*words: str, **aliases: str) -> Reader:
    """Make a reader of a list of the given words."""

    def read(parser: Parser, keyword: Token) -> tuple[str, ...]:
        values = []
        for word in take_values(parser, keyword, VALUE_WORD):
            value = aliases.get(word.text.replace(".", "_"), word.text)
            if value not in words:
                complain_of_value(parser, keyword, word, words)
                continue
            parser.use_value(parser.draft.last, Token(value, word.offset))
            values.append(value)
        return tuple(values)

    return read


def one_of(*words: str) -> Reader:
    """Make a reader of exactly one of the given words."""

    def read(parser: Parser, keyword: Token) -> str:
        word = parser.scanner.take_below(VALUE_WORD)
        found = word or parser.scanner.next_token()
        if word is None or word.text not in words:
            raise Mistake(
                f'expected {describe_words(words)} after "{keyword.text}", not {describe_token(found)}',
                found,
                find_similar(found.text, words),
            )
        parser.use_value(parser.draft.last, word)
        return word.text

    return read


def starts_line_with(parser: Parser, words: tuple[str, ...]) -> bool:
    parser.scanner.skip_space()
    word = parser.scanner.look(VALUE_WORD)
    return word is not None and word.text in words


def some_below(*words: str) -> Reader:
    """Make a reader of a list of the given words.  As Dante: one that goes on in the lines below."""
    read_line = some_of(*words)

    def read(parser: Parser, keyword: Token) -> tuple[str, ...]:
        parser.scanner.skip_space()
        values: tuple[str, ...] = read_line(parser, keyword)
        while starts_line_with(parser, words):
            values += read_line(parser, keyword)
        return values

    return read


def number(low: int, high: int) -> Reader:
    return lambda parser, keyword: parse_number(parser, low, high)


def large_number(low: int, high: int) -> Reader:
    return lambda parser, keyword: parse_large_number(parser, low, high)


def read_yes_or_no(parser: Parser, keyword: Token) -> bool:
    return one_of("yes", "no")(parser, keyword) == "yes"


def read_necgssapi(parser: Parser, keyword: Token) -> bool:
    return one_of("necgssapi")(parser, keyword) == "necgssapi"


def read_throttle(parser: Parser, keyword: Token) -> tuple[int, int]:
    return parse_pair(parser, MAX_OPTION)


def check_order(low: int, high: int, last: Token) -> None:
    if high < low:
        raise Mistake(f"the last port ({high}) is below the first ({low})", last, f"write {high}-{low}")


def read_port_range(parser: Parser, keyword: Token) -> tuple[int, int]:
    low = parse_number(parser, 0, 65535)
    if not parser.scanner.take_further(DASH):
        found = parser.scanner.next_token()
        raise Mistake(f'expected "-" and the last port, not {describe_token(found)}', found)
    last = parser.scanner.look(NUMBER_WORD) or parser.scanner.next_token()
    high = parse_number(parser, 0, 65535)
    check_order(low, high, last)
    return low, high


def read_rest(parser: Parser, keyword: Token) -> str:
    """Read the rest of the line as it stands, "#" and all."""
    start = parser.scanner.offset
    parser.scanner.offset = skip(REST_OF_LINE, parser.scanner.text, start)
    return parser.scanner.text[start : parser.scanner.offset]


# ---- names of users, files and services


def read_names(parser: Parser, keyword: Token) -> tuple[str, ...]:
    return tuple(word.text for word in take_values(parser, keyword, USER_WORD))


def read_user(parser: Parser, keyword: Token) -> str:
    """Read the name of a user whom the machine knows."""
    word = parser.scanner.take(USER_WORD)
    if word is None:
        raise Mistake(f'"{keyword.text}" needs the name of a user', keyword)
    if not parser.surroundings.user_exists(word.text):
        hint = "write the name of a user of this machine"
        if word.text.isdecimal():
            hint = "write the user's name, not the number"
        raise Mistake(f'there is no user "{shorten(word.text)}"', word, hint)
    return word.text


def read_service_name(parser: Parser, keyword: Token) -> str:
    word = parser.scanner.take(VALUE_WORD)
    if word is None:
        raise Mistake(f'"{keyword.text}" needs a name', keyword)
    if not word.text[0].isalpha():
        raise Mistake(f'"{shorten(word.text)}" does not begin with a letter', word)
    return word.text


def check_quotes(parser: Parser, word: Token) -> None:
    if word.text[0] in "\"'":
        parser.warn("quotes have no meaning here: they are part of the name", word)


def take_file(parser: Parser, keyword: Token) -> Token:
    word = parser.scanner.take(FILE_WORD)
    if word is None:
        raise Mistake(f'"{keyword.text}" needs a file name, in the same line', keyword)
    check_quotes(parser, word)
    return word


def read_file(parser: Parser, keyword: Token) -> str:
    return take_file(parser, keyword).text


def read_directory(parser: Parser, keyword: Token) -> str:
    word = take_file(parser, keyword)
    if not word.text.startswith("/"):
        raise Mistake(f'"{shorten(word.text)}" is no absolute path', word, 'begin it with "/"')
    return word.text


FACILITIES = frozenset({"auth", "authpriv", "daemon", "user", *(f"local{digit}" for digit in range(8))})


def check_log_output(parser: Parser, word: Token) -> bool:
    """Tell whether an output can be used; Dante, too, only warns of an unknown facility."""
    output, _, facility = word.text.partition("/")
    if output != "syslog" or not facility or facility in FACILITIES:
        check_quotes(parser, word)
        return True
    known = describe_words(sorted(FACILITIES))
    parser.warn(f'unknown syslog facility "{shorten(facility)}"', word, f"it must be {known}")
    return False


def read_log_outputs(parser: Parser, keyword: Token) -> tuple[str, ...]:
    """Read a list of stdout, stderr, syslog, syslog/FACILITY and files."""
    outputs = []
    for word in take_values(parser, keyword, FILE_WORD):
        name = word.text.rstrip(",")
        if name != word.text:
            warn_of_comma(parser, Token(",", word.offset + len(name)))
        if name and check_log_output(parser, Token(name, word.offset)):
            outputs.append(name)
    return tuple(outputs)


# ---- addresses and ports

OPERATORS = {
    "": "eq", ":": "eq", "=": "eq", "==": "eq", "eq": "eq",
    "!=": "ne", "ne": "ne", "neq": "ne",
    ">=": "ge", "ge": "ge", "<=": "le", "le": "le",
    ">": "gt", "gt": "gt", "<": "lt", "lt": "lt",
}  # fmt: skip
OPERATOR = re.compile(r"==|=|!=|>=|<=|>|<|:|(?:eq|neq|ne|ge|gt|le|lt)(?![A-Za-z_-])")
PORT_KEYWORD = re.compile(r"port(?![A-Za-z0-9_.-])")
PORT_NUMBER = re.compile(r"(?:0x[0-9A-Fa-f]+|[0-9]+)(?![A-Za-z0-9_.])")
SERVICE_WORD = re.compile(r"[^\x00-\x20\x7f\\{}:,#/]+")
HOST_NAME = re.compile(r"\.?[\w-]+(?:\.[\w-]+)*\.?")
LIKE_IPV4 = re.compile(r"[0-9.]*\.[0-9.]*")
URL = re.compile(r"(?:http|ftp)://[^ \t\r\n]*")

EVERY_ADDRESS = RuleAddress("any", "0/0")
BITS = {"ipv4": 32, "ipv6": 128}
FAMILY_NAMES = {4: "ipv4", 6: "ipv6"}


def find_literal(text: str) -> Endpoint | None:
    """Convert an IP address, with port 0; None for anything else."""
    host, percent, scope = text.partition("%")
    for family, constant in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        try:
            packed = socket.inet_pton(constant, host)
        except (OSError, ValueError):
            continue
        if percent and (family == 4 or not scope):
            return None
        return Endpoint(socket.inet_ntop(constant, packed) + percent + scope, 0, family)
    return None


def pack_address(endpoint: Endpoint) -> int:
    constant = socket.AF_INET6 if endpoint.family == 6 else socket.AF_INET
    return int.from_bytes(socket.inet_pton(constant, endpoint.host.partition("%")[0]), "big")


def check_literal(parser: Parser, endpoint: Endpoint, token: Token) -> Endpoint:
    if endpoint.host.startswith("::ffff:") and "." in endpoint.host:
        ipv4 = endpoint.host.removeprefix("::ffff:")
        raise Mistake(f"{token.text} is an IPv4-mapped address", token, f"write {ipv4}")
    scope = endpoint.host.partition("%")[2]
    if scope and parser.surroundings.interface_addresses(scope) is None:
        raise Mistake(f'there is no interface "{shorten(scope)}"', token)
    return endpoint


def take_address(parser: Parser, keyword: Token) -> Token:
    """Take the word of an address; it may follow the colon without a blank, unlike Dante's."""
    # Unlike Dante: where the address was forgotten, the keyword that follows is no host name.
    word = parser.scanner.look(ADDRESS_WORD)
    if word is None or word.text == "port" or setting_follows(parser, FILE_WORD):
        raise Mistake(f'"{keyword.text}" needs an address, in the same line', keyword)
    parser.scanner.take(ADDRESS_WORD)
    if len(word.text.encode("utf-8", "replace")) > MAX_NAME:
        raise Mistake(f"this name is longer than {MAX_NAME} bytes", word)
    return word


def check_name(parser: Parser, token: Token) -> None:
    """Refuse what cannot be a host name, and doubt what looks like a mistyped address."""
    every = "0.0.0.0 and :: stand" if parser.draft.context == "global" else "0/0 stands"
    hint = f"{every} for every address" if token.text in ("*", "0", "any", "all") else ""
    if len(token.text) < 2 or not HOST_NAME.fullmatch(token.text):
        if token.text.startswith("*."):
            hint = f"{token.text[1:]} stands for every name in that domain"
        raise Mistake(f"{describe_token(token)} is no address, host name, domain or interface", token, hint)
    if LIKE_IPV4.fullmatch(token.text) or hint:
        hint = hint or "an IPv4 address has four numbers, each from 0 to 255"
        parser.warn(f'"{token.text}" is no IP address: it is taken as a host name', token, hint)


def parse_pattern(parser: Parser, token: Token) -> RuleAddress:
    """Classify an address of a rule, in Dante's order; its mask and port come later."""
    literal = find_literal(token.text)
    if literal:
        literal = check_literal(parser, literal, token)
        kind = FAMILY_NAMES[literal.family]
        return RuleAddress(kind, literal.host, pack_address(literal), BITS[kind])
    if token.text == ".":
        return RuleAddress("domain", "")
    addresses = parser.surroundings.interface_addresses(token.text)
    if addresses is not None:
        if not addresses:
            parser.warn(f'interface "{token.text}" has no address at present', token)
        return RuleAddress("interface", token.text)
    check_name(parser, token)
    if token.text.startswith("."):
        return RuleAddress("domain", token.text[1:])
    return RuleAddress("host", token.text)


def parse_dotted_mask(token: Token) -> int:
    literal = find_literal(token.text)
    if literal is None:
        raise Mistake(f'"{shorten(token.text)}" is no mask', token, "write e.g. /24")
    bits = f"{pack_address(literal):032b}"
    if "01" in bits:
        raise Mistake(f"the mask {token.text} has a gap in its bits", token, "write e.g. /24")
    return bits.count("1")


def parse_mask(parser: Parser, kind: str, slash: Token) -> int:
    """Read what follows the slash, as the length of the mask."""
    token = parser.scanner.take_further(MASK_WORD)
    if token is None:
        raise Mistake(f"a mask must follow the slash: 0 to {BITS[kind]}", slash)
    if kind == "ipv4" and "." in token.text:
        # Unlike Dante: its manual has dotted masks, its program does not.
        return parse_dotted_mask(token)
    length = parse_number_text(token)
    if length > BITS[kind]:
        raise Mistake(
            f"the mask {shorten(token.text)} is out of range: it must be from 0 to {BITS[kind]}",
            token,
        )
    return length


def parse_every_address(parser: Parser, token: Token, slash: Token | None) -> RuleAddress:
    """Finish 0/0, the only pattern that covers both families."""
    length = parser.scanner.take_further(MASK_WORD) if slash else None
    if length is None or length.text not in ("0", "0.0.0.0"):
        wrong = length or token
        raise Mistake("the mask of 0 can only be 0", wrong, "0/0 stands for every address")
    return EVERY_ADDRESS


def parse_masked(parser: Parser, keyword: Token) -> RuleAddress:
    """Read the address of a rule with its mask."""
    token = take_address(parser, keyword)
    slash = parser.scanner.take_further(SLASH)
    if token.text == "0":
        return parse_every_address(parser, token, slash)
    pattern = parse_pattern(parser, token)
    if pattern.kind not in BITS:
        if slash:
            raise Mistake(f'"{shorten(token.text)}" is no IP address, so it takes no mask', slash)
        return pattern
    length = BITS[pattern.kind]
    if slash:
        length = parse_mask(parser, pattern.kind, slash)
    else:
        # Unlike Dante: it refuses this; one host is the narrowest that can be meant.
        text = f"{token.text} has no mask: it is taken as this one host"
        parser.warn(text, token, f"write {token.text}/{length}")
    if length == 0 and pattern.network:
        parser.warn(
            f"{token.text}/0 stands for every address, not only for {token.text}",
            token,
            f"write {token.text}/{BITS[pattern.kind]} for one host",
        )
    host_bits = BITS[pattern.kind] - length
    return pattern._replace(
        text=f"{pattern.text}/{length}",
        network=pattern.network >> host_bits << host_bits,
        prefix=length,
    )


def find_service(parser: Parser, token: Token) -> int:
    """Look a service up.  As Dante: each protocol that the rule has named before must have it."""
    named = parser.draft.values.get("protocols", frozenset())
    asked = [protocol for protocol in ("tcp", "udp") if protocol in named] or ["tcp", "udp"]
    found = {protocol: parser.surroundings.service(token.text, protocol) for protocol in asked}
    missing = [protocol for protocol, port in found.items() if port is None]
    ports = [port for port in found.values() if port is not None]
    if ports and not (named and missing):
        return ports[0]
    where = f" for {describe_words(missing)}" if named else ""
    raise Mistake(
        f'there is no service "{shorten(token.text)}"{where}',
        token,
        "write the number of the port",
    )


def parse_port_value(parser: Parser) -> int:
    token = parser.scanner.take_further(PORT_NUMBER)
    if token:
        return check_range(parse_number_text(token), 0, 65535, token)
    token = parser.scanner.take(SERVICE_WORD)
    if token is None:
        found = parser.scanner.next_token()
        raise Mistake(f"expected a port or a service, not {describe_token(found)}", found)
    return find_service(parser, token)


def parse_port(parser: Parser) -> PortTest:
    """Read the port clause behind an address, in the same line, if there is one.

    Unlike Dante: `port: 80` means what it says; there it is accepted and matches every port.
    """
    if not parser.scanner.take(PORT_KEYWORD):
        return PortTest()
    sign = parser.scanner.take_further(OPERATOR)
    low = parse_port_value(parser)
    dash = parser.scanner.take_further(DASH)
    if not dash:
        return PortTest(OPERATORS[sign.text if sign else ""], low, low)
    last = parser.scanner.look(SERVICE_WORD) or dash
    high = parse_port_value(parser)
    if sign:
        raise Mistake("a range of ports takes no operator", sign, f"write port {low}-{high}")
    check_order(low, high, last)
    return PortTest("range", low, high)


def read_pattern(parser: Parser, keyword: Token) -> RuleAddress:
    """Read an address with mask and port, for from, to, hostid and redirect from."""
    pattern = parse_masked(parser, keyword)
    port = parse_port(parser)
    return pattern._replace(port=port) if port.operator != "any" else pattern


def refuse_mask(parser: Parser, keyword: Token) -> None:
    slash = parser.scanner.look(SLASH)
    if slash:
        raise Mistake(f'"{keyword.text}" takes one address, without a mask', slash)


def parse_one_port(parser: Parser) -> int | None:
    """Read a port clause that can only mean one port; None when there is none."""
    start = parser.scanner.look(PORT_KEYWORD)
    port = parse_port(parser)
    if start and port.operator != "eq":
        # As Dante: any operator is accepted, and the first number taken.
        text = f"one port is needed here: {port.low} is taken"
        parser.warn(text, start, f"write port = {port.low}")
    return port.low if start else None


def read_endpoint(parser: Parser, keyword: Token) -> Endpoint:
    """Read an address or host name with an optional port, for redirect to and bounce to."""
    token = take_address(parser, keyword)
    refuse_mask(parser, keyword)
    port = parse_one_port(parser) or 0
    literal = find_literal(token.text)
    if literal:
        return check_literal(parser, literal, token)._replace(port=port)
    check_name(parser, token)
    return Endpoint(token.text, port, 0)


def check_usable(parser: Parser, keyword: Token, endpoint: Endpoint) -> None:
    if endpoint.host in ("0.0.0.0", "::"):
        raise Mistake(f'"{keyword.text}" takes the address of one host, not {endpoint.host}', keyword)


def read_bounce(parser: Parser, keyword: Token) -> Endpoint:
    """Read the address of bounce to, which needs a port."""
    endpoint = read_endpoint(parser, keyword)
    check_usable(parser, keyword, endpoint)
    if not endpoint.port:
        raise Mistake(f'"{keyword.text}" needs a port', keyword, "e.g. bounce to: 10.0.0.1 port = 80")
    return endpoint


def read_target(parser: Parser, keyword: Token) -> RuleAddress:
    """Read the address of redirect to: one host, as a pattern."""
    endpoint = read_endpoint(parser, keyword)
    check_usable(parser, keyword, endpoint)
    port = PortTest("eq", endpoint.port, endpoint.port) if endpoint.port else PortTest()
    if not endpoint.family:
        return RuleAddress("host", endpoint.host, port=port)
    kind = FAMILY_NAMES[endpoint.family]
    text = f"{endpoint.host}/{BITS[kind]}"
    return RuleAddress(kind, text, pack_address(endpoint), BITS[kind], port)


def parse_gateway(parser: Parser, keyword: Token) -> tuple[str, Endpoint | None]:
    """Read one proxy of a route: what the file says, and where it is (port 0: not said)."""
    word = parser.scanner.look(URL)
    if word:
        raise Mistake("a URL is only for UPnP: the gateway must be an address or a name", word)
    word = parser.scanner.look(ADDRESS_WORD)
    text = word.text if word else ""
    if text.lower() == "direct":
        parser.scanner.take(ADDRESS_WORD)
        return "direct", None
    if text == "broadcast":
        parser.use_value("via", parser.scanner.take(ADDRESS_WORD) or keyword)
        return "broadcast", None
    if word and parser.surroundings.interface_addresses(text) is not None:
        raise Mistake(f'"{shorten(text)}" is an interface: the gateway must be an address or a name', word)
    return text, read_endpoint(parser, keyword)


HOP_FIELDS = ("proxyprotocols", "methods", "credentials_file")  # of a Hop, each set by a keyword
MOST_HOPS = 8
MOST_UPSTREAMS = 16  # of one hop


def read_gateways(parser: Parser, keyword: Token) -> tuple[tuple[tuple[str, Endpoint | None], ...]]:
    """Read a `via`: one proxy, or with ours, "or", several of which any will do.

    What was set before belongs to the hops above, so it is put aside.
    """
    values = parser.draft.values
    settings = {field: values.pop(field) for field in HOP_FIELDS if field in values}
    values["sections"] = (*values.get("sections", ()), settings)
    if len(values["sections"]) > MOST_HOPS:
        raise Mistake(f"a route has at most {MOST_HOPS} hops", keyword)
    gateways = [parse_gateway(parser, keyword)]
    while parse_word(parser, "or"):
        gateways.append(parse_gateway(parser, keyword))
        if len(gateways) > MOST_UPSTREAMS:
            raise Mistake(f'a "via" names at most {MOST_UPSTREAMS} proxies', keyword)
    return (tuple(gateways),)


FIRST_FREE_PORT = 1024  # those below need privileges


def port_candidates(test: PortTest) -> Iterator[int]:
    """Yield the unprivileged ports that pass a `port` clause.

    >>> list(port_candidates(PortTest("range", 1000, 1026)))
    [1024, 1025, 1026]
    """
    low, high = {
        "any": (0, 65535),
        "eq": (test.low, test.low),
        "ne": (0, 65535),
        "ge": (test.low, 65535),
        "gt": (test.low + 1, 65535),
        "le": (0, test.low),
        "lt": (0, test.low - 1),
        "range": (test.low, test.high),
    }[test.operator]
    for port in range(max(low, FIRST_FREE_PORT), high + 1):
        if test.operator != "ne" or port != test.low:
            yield port


# ---- the server's own addresses


def find_addresses(parser: Parser, token: Token) -> tuple[Endpoint, ...]:
    """Find every address of an IP address, interface or host name; never none."""
    literal = find_literal(token.text)
    if literal:
        return (check_literal(parser, literal, token),)
    addresses = parser.surroundings.interface_addresses(token.text)
    if addresses:
        return addresses
    if addresses is not None:
        raise Mistake(f'interface "{token.text}" has no address', token)
    check_name(parser, token)
    addresses = parser.surroundings.resolve(token.text)
    if not addresses:
        raise Mistake(f'"{token.text}" is no address, no interface here, and no name that resolves', token)
    return addresses


def is_enabled(parser: Parser, side: str, endpoint: Endpoint) -> bool:
    enabled = parser.settings.values.get(f"{side}_protocols", FAMILY_NAMES.values())
    return FAMILY_NAMES[endpoint.family] in enabled


def read_internal(parser: Parser, keyword: Token) -> tuple[Endpoint, ...]:
    token = take_address(parser, keyword)
    refuse_mask(parser, keyword)
    addresses = find_addresses(parser, token)
    port = parse_one_port(parser)
    if port is None:
        port = parser.surroundings.service("socks", "tcp") or SOCKS_PORT
    known = parser.settings.values.get("internal", ())
    # Unlike Dante: port 0 is accepted; the kernel chooses and the log says which.
    endpoints = (address._replace(port=port) for address in addresses)
    return tuple(
        endpoint
        for endpoint in dict.fromkeys(endpoints)
        if endpoint not in known and is_enabled(parser, "internal", endpoint)
    )


def routes_choose(parser: Parser) -> bool:
    """Tell whether the kernel's routes choose the external address.

    Unlike Dante: a wildcard then stands for every address of the machine.
    """
    return bool(parser.settings.values.get("external_rotation") == "route")


def read_external(parser: Parser, keyword: Token) -> tuple[External, ...]:
    token = take_address(parser, keyword)
    refuse_mask(parser, keyword)
    port = parser.scanner.look(PORT_KEYWORD)
    if port:
        raise Mistake('"external" takes no port: the system chooses one', port)
    addresses = find_addresses(parser, token)
    position = parser.scanner.place(token.offset)
    if parser.surroundings.interface_addresses(token.text):
        return (External(token.text, None, position),)
    if addresses[0].host in ("0.0.0.0", "::") and not routes_choose(parser):
        raise Mistake(
            "the external address cannot be a wildcard",
            token,
            'name an address or an interface, or write "external.rotation: route" above this line',
        )
    return tuple(
        External(token.text, address, position)
        for address in addresses
        if is_enabled(parser, "external", address)
    )


def read_families(parser: Parser, keyword: Token) -> tuple[str, ...]:
    """Read internal.protocol or external.protocol, which must stand above its addresses."""
    side = keyword.text.partition(".")[0]
    families = some_of("ipv4", "ipv6")(parser, keyword)
    if side in parser.settings.places:
        raise Mistake(
            f'"{keyword.text}" must stand above the first "{side}", as it decides which of '
            "its addresses count",
            keyword,
        )
    return families


# ---- methods


def complain_of_method(parser: Parser, keyword: Token, word: Token, known: tuple[str, ...]) -> None:
    if word.text not in METHODS and word.text != "pam":
        return complain_of_value(parser, keyword, word, known)
    parser.draft.broken.add(parser.draft.last)
    hint = f"it must be {describe_words(known)}"
    if parser.draft.context in ("client", "hostid"):
        # As Dante: in a client-rule the old "method" means clientmethod.
        hint += f'; for what is asked of a SOCKS client write "socksmethod: {word.text}"'
    parser.error(f'method "{word.text}" cannot be used for "{keyword.text}"', word, hint)
    return None


def parse_methods(parser: Parser, keyword: Token, name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Read a list of methods in the order of preference."""
    methods: list[str] = []
    before = parser.draft.values.get(name + "s", ()) if parser.draft is not parser.settings else ()
    for word in take_values(parser, keyword, VALUE_WORD):
        method = word.text
        if method == "pam":
            method = "pam.username"
            parser.warn_of_old(word, method)
        if method not in known:
            complain_of_method(parser, keyword, word, known)
        elif method in methods or method in before:
            parser.warn(f'method "{method}" is in the list already', word)
        else:
            parser.use_value("method" if name == "method" else name, Token(method, word.offset))
            methods.append(method)
    return tuple(methods)


def read_methods(parser: Parser, keyword: Token) -> tuple[str, ...]:
    return parse_methods(parser, keyword, "socksmethod", METHODS)


def read_client_methods(parser: Parser, keyword: Token) -> tuple[str, ...]:
    known = tuple(method for method in METHODS if method in CLIENT_METHODS)
    return parse_methods(parser, keyword, "clientmethod", known)


def read_route_methods(parser: Parser, keyword: Token) -> tuple[str, ...]:
    return parse_methods(parser, keyword, "method", ("none", "username", "gssapi"))


# ---- libwrap, processors, logs of errors

# hosts_options(5): what may stand behind each option, as libwrap of Debian takes it.
LIBWRAP_OPTIONS = {
    "aclexec": r".+",
    "banners": r".+",
    "group": r".+",
    "keepalive": r"",
    "linger": r"[0-9]+",
    "nice": r"(?:[-+]?[0-9]+)?",
    "rfc931": r"(?:0*[1-9][0-9]*)?",
    "setenv": r".+",
    "severity": r"(?:(?:kern|user|mail|daemon|auth|lpr|news|uucp|cron|local[0-7])\.)?"
    r"(?:emerg|alert|crit|err|warning|notice|info|debug)",
    "spawn": r".+",
    "twist": r".+",
    "umask": r"0*[0-7]{1,3}",
    "user": r".+",
}

LIBWRAP_BLANKS = " \t\r\f\v="  # between an option and its value


def check_libwrap_option(option: str, token: Token) -> None:
    """Check one option and what stands behind it; `token` is its name."""
    name, value = token.text.lower(), option.partition(token.text)[2].strip(LIBWRAP_BLANKS)
    if name in ("allow", "deny"):
        raise Mistake(
            f'"{token.text}" is for hosts.allow and hosts.deny: the verdict is the rule\'s own', token
        )
    if name not in LIBWRAP_OPTIONS:
        text = f'"{shorten(token.text)}" is no option of hosts_options(5)'
        raise Mistake(text, token, find_similar(token.text, LIBWRAP_OPTIONS))
    if not re.fullmatch(LIBWRAP_OPTIONS[name], value, re.IGNORECASE):
        raise Mistake(f'"{shorten(value)}" cannot stand behind "{token.text}" (hosts_options(5))', token)


def read_libwrap(parser: Parser, keyword: Token) -> str:
    """Read the rest of the line and check its options (hosts_options(5))."""
    start = parser.scanner.offset
    line = read_rest(parser, keyword).strip()
    if not line:
        raise Mistake('"libwrap" needs options, in the same line', keyword)
    # A colon within an option is written "\:".
    for option in re.split(r"(?<!\\):", line):
        words = option.replace("=", " ").split()
        if words:
            check_libwrap_option(option, Token(words[0], parser.scanner.text.find(words[0], start)))
    return line


PROCESSES = ("mother", "monitor", "negotiate", "request", "io")
POLICIES = ("other", "fifo", "rr", "batch", "idle")


def find_process(parser: Parser, keyword: Token) -> str:
    process = keyword.text.rpartition(".")[2]
    if process not in PROCESSES:
        raise Mistake(
            f'there is no process "{process}": it must be {describe_words(PROCESSES)}',
            keyword,
            find_similar(process, PROCESSES),
        )
    return process


def read_schedule(parser: Parser, keyword: Token) -> tuple[tuple[str, str, int], ...]:
    """Read POLICY/PRIORITY; the policy may be spelled as in the manual, SCHED_FIFO."""
    process = find_process(parser, keyword)
    word = parser.scanner.take(ADDRESS_WORD)
    policy = word.text.removeprefix("SCHED_").lower() if word else ""
    if word is None or policy not in POLICIES:
        raise Mistake(
            f'"{keyword.text}" needs a scheduling policy: {describe_words(POLICIES)}',
            word or keyword,
        )
    slash = parser.scanner.take(SLASH)
    if not slash:
        raise Mistake(f'"{word.text}" needs a priority', word, f"write e.g. {word.text}/0")
    # As Dante: what the kernel does not take is a warning once the server runs.
    return ((process, policy, parse_large_number(parser, 0, MAX_OPTION)),)


def read_mask(parser: Parser, keyword: Token) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Read a list of CPU numbers, or "any"."""
    process = find_process(parser, keyword)
    parser.scanner.skip_space()
    words = [*take_values(parser, keyword, VALUE_WORD)]
    while word := parser.scanner.take_further(NUMBER_WORD):
        words.append(word)
    cpus = []
    for word in words:
        if word.text == "any":
            continue
        cpu = parse_number_text(word)
        if cpu not in parser.surroundings.cpus():
            raise Mistake(f"this machine has no CPU {shorten(word.text)}", word)
        cpus.append(cpu)
    return ((process, tuple(cpus)),)


LOG_LEVELS = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
TCP_FEATURES = ("ecn", "sack", "timestamps", "wscale")


def find_side_and_level(keyword: Token) -> tuple[str, str]:
    side, _, level = keyword.text.split(".")[:3]
    if level not in LOG_LEVELS:
        raise Mistake(
            f'unknown log level "{shorten(level)}": it must be {describe_words(LOG_LEVELS)}',
            keyword,
            find_similar(level, LOG_LEVELS),
        )
    return side, level


def is_error_symbol(symbol: str) -> bool:
    if symbol in ("no-route", "dns-any", "system-any"):
        return True
    return hasattr(errno, symbol) or (symbol.startswith("EAI_") and hasattr(socket, symbol))


def read_error_log(parser: Parser, keyword: Token) -> tuple[ErrorLog, ...]:
    side, level = find_side_and_level(keyword)
    symbols = []
    for word in take_values(parser, keyword, VALUE_WORD):
        if len(word.text) < 2 or not word.text[0].isalpha():
            raise Mistake(f'{describe_token(word)} is no value for "{keyword.text}"', word)
        symbol = word.text.lower() if "-" in word.text else word.text.upper()
        if is_error_symbol(symbol):
            symbols.append(symbol)
        else:
            parser.warn(f'unknown error "{shorten(word.text)}": it is ignored', word)
    return (ErrorLog(side, level, "error", tuple(symbols)),)


def read_tcp_log(parser: Parser, keyword: Token) -> tuple[ErrorLog, ...]:
    side, level = find_side_and_level(keyword)
    event = keyword.text.split(".", 3)[3]
    features = some_of(*TCP_FEATURES)(parser, keyword)
    return (ErrorLog(side, level, event, features),)


# ---- alarms


def find_sides(keyword: Token) -> tuple[str, ...]:
    side = keyword.text.partition(".")[0]
    return ("internal", "external") if side == "alarm" else (side,)


IN_WORD = re.compile(r"in(?![A-Za-z0-9_.-])")


def read_data_alarm(parser: Parser, keyword: Token) -> tuple[tuple[Alarm, Token], ...]:
    """Read BYTES in SECONDS."""
    limit = parse_number(parser, 0, MAX_NUMBER)
    if not parser.scanner.take_further(IN_WORD):
        found = parser.scanner.next_token()
        raise Mistake('expected "in" and a number of seconds', found, "write e.g. 100 in 60")
    seconds = parse_large_number(parser, 1, MAX_SECONDS)
    direction = keyword.text.rpartition(".")[2]
    directions = ("recv", "send") if direction == "data" else (direction,)
    alarm = Alarm("data", find_sides(keyword), directions, limit, 0, seconds)
    return ((alarm, keyword),)


def read_disconnect_alarm(parser: Parser, keyword: Token) -> tuple[tuple[Alarm, Token], ...]:
    """Read COUNT/SESSIONS [in SECONDS]."""
    count, sessions = parse_pair(parser, MAX_OPTION)
    if count > sessions:
        raise Mistake(
            f"there cannot be {count} disconnects among {sessions} sessions",
            keyword,
            f"write {sessions}/{count}",
        )
    # As Dante: 5 seconds unless told.
    seconds = parse_large_number(parser, 1, MAX_SECONDS) if parser.scanner.take_further(IN_WORD) else 5
    alarm = Alarm("disconnect", find_sides(keyword), (), count, sessions, seconds)
    return ((alarm, keyword),)


def read_mtu_alarm(parser: Parser, keyword: Token) -> tuple[tuple[Alarm, Token], ...]:
    return ((Alarm("mtu-error", find_sides(keyword)), keyword),)


# ---- socket options

LEVELS = {
    "ip": socket.IPPROTO_IP,
    "socket": socket.SOL_SOCKET,
    "tcp": socket.IPPROTO_TCP,
    "udp": socket.IPPROTO_UDP,
}


class Option(NamedTuple):
    """A socket option: where it may be named, and what the kernel calls it.

    `early` options must be set before the connection is made.  A sub-field of ip_tos lies
    `shift` bits up, under `mask`, and has names for its values.
    """

    level: int
    number: int
    levels: tuple[str, ...]
    early: bool = True
    shift: int = 0
    mask: int = 0
    symbols: dict[str, int] | None = None


def build_option(level_name: str, name: str, linux: int, early: bool = True) -> Option:
    # The module's constants are this machine's; where it lacks one, Linux's header is right.
    levels = ("socket", "tcp", "udp") if level_name == "socket" else (level_name,)
    return Option(LEVELS[level_name], getattr(socket, name.upper(), linux), levels, early)


def build_field(shift: int, mask: int, symbols: dict[str, int]) -> Option:
    """Describe a field of the type-of-service byte."""
    whole = build_option("ip", "ip_tos", 1, early=False)
    return whole._replace(shift=shift, mask=mask, symbols=symbols)


# RFC 2474, RFC 2597, RFC 3246
DSCP = {
    "af11": 10, "af12": 12, "af13": 14, "af21": 18, "af22": 20, "af23": 22,
    "af31": 26, "af32": 28, "af33": 30, "af41": 34, "af42": 36, "af43": 38, "ef": 46,
    "cs0": 0, "cs1": 8, "cs2": 16, "cs3": 24, "cs4": 32, "cs5": 40, "cs6": 48, "cs7": 56,
}  # fmt: skip
# RFC 791
PRECEDENCE = {
    "netcontrol": 7, "internetcontrol": 6, "critic_ecp": 5, "flashoverride": 4,
    "flash": 3, "immediate": 2, "priority": 1, "routine": 0,
}  # fmt: skip
# RFC 1349
TOS = {"lowdelay": 8, "throughput": 4, "reliability": 2}

OPTIONS = {
    # asm-generic/socket.h
    **{
        name: build_option("socket", name, linux, early=name != "so_debug")
        for name, linux in {
            "so_debug": 1, "so_dontroute": 5, "so_broadcast": 6, "so_sndbuf": 7,
            "so_rcvbuf": 8, "so_keepalive": 9, "so_oobinline": 10, "so_priority": 12,
            "so_linger": 13, "so_rcvlowat": 18, "so_sndlowat": 19, "so_rcvtimeo": 20,
            "so_sndtimeo": 21, "so_timestamp": 29, "so_sndbufforce": 32, "so_rcvbufforce": 33,
        }.items()
    },
    # linux/tcp.h
    **{
        name: build_option("tcp", name, linux)
        for name, linux in {
            "tcp_nodelay": 1, "tcp_maxseg": 2, "tcp_cork": 3, "tcp_keepidle": 4,
            "tcp_keepintvl": 5, "tcp_keepcnt": 6, "tcp_syncnt": 7, "tcp_linger2": 8,
            "tcp_window_clamp": 10, "tcp_md5sig": 14,
        }.items()
    },
    # linux/udp.h
    "udp_cork": build_option("udp", "udp_cork", 1),
    # linux/in.h
    "ip_ttl": build_option("ip", "ip_ttl", 2),
    "ip_mtu_discover": build_option("ip", "ip_mtu_discover", 10),
    "ip_freebind": build_option("ip", "ip_freebind", 15),
    "ip_minttl": build_option("ip", "ip_minttl", 21),
    "ip_tos": build_option("ip", "ip_tos", 1, early=False),
    "ip_tos.dscp": build_field(2, 0xFC, DSCP),
    "ip_tos.prec": build_field(5, 0xE0, PRECEDENCE),
    "ip_tos.tos": build_field(1, 0x1E, TOS),
}  # fmt: skip
# Known, but the server's own business or of no use here; ignored with a warning, as Dante.
IGNORED_OPTIONS = frozenset(
    [
        "so_error",
        "so_reuseaddr",
        "so_reuseport",
        "so_acceptconn",
        "so_type",
        "ip_add_membership",
        "ip_add_source_membership",
        "ip_drop_membership",
        "ip_drop_source_membership",
        "ip_block_source",
        "ip_unblock_source",
        "ip_hdrincl",
        "ip_multicast_if",
        "ip_multicast_loop",
        "ip_multicast_ttl",
        "ip_options",
        "ip_recvtos",
        "ip_recvttl",
    ]
)
# Linux takes no number for these.  As Dante: sessions go on without; unlike it, one warning is enough.
IMPOSSIBLE_OPTIONS = {
    "tcp_md5sig": "Linux wants a key for each peer, and no number can be one",
    "so_sndlowat": "in Linux it is always 1",
}
# What takes a capability if its value is above this one (socket(7)); as may an option that is a number.
UNPRIVILEGED_VALUES = {"so_debug": 0, "so_priority": 6, "so_rcvbufforce": -1, "so_sndbufforce": -1}


def needs_power(option: SocketOption) -> bool:
    """Tell whether an option may be one that only a process with CAP_NET_ADMIN can set."""
    return option.name.isdecimal() or option.value > UNPRIVILEGED_VALUES.get(option.name, MAX_OPTION)


def check_option_side(parser: Parser, keyword: Token) -> None:
    """Refuse an option for a connection that the rule will never see."""
    if keyword.text.startswith("internal."):
        return
    if parser.draft.context in ("client", "hostid"):
        raise Mistake("a client-rule has no external side yet", keyword, "set it in the socks-rule instead")
    if parser.draft.verdict == "block":
        raise Mistake("a rule that blocks never uses the external side", keyword, "leave it out")


def is_in_time(parser: Parser, keyword: Token, name: str) -> bool:
    """Warn of an option that comes too late in a rule for the client's connection; False to leave it out."""
    in_rule = parser.draft.context in ("client", "hostid", "socks")
    if not (in_rule and OPTIONS[name].early and keyword.text.startswith("internal.")):
        return True
    # As Dante, which leaves out all that come late: nobody would hear of what a client sends.
    in_time = name != "so_rcvlowat"
    parser.warn(
        "this option should be set before the client's connection exists, but the rule is "
        f"matched after that{'' if in_time else ': it is ignored'}",
        keyword,
        "set it above the rules, for every connection",
    )
    return in_time


def find_option_fault(keyword: Token, level_name: str, name: str) -> tuple[str, str]:
    """Return why an option is to be ignored and a hint, or "" twice."""
    levels = OPTIONS[name].levels
    if level_name not in levels:
        # Unlike Dante: it warns and sets whatever has this number at the other level.
        side = keyword.text.partition(".")[0]
        return f'is not of level "{level_name}": it is ignored', f'write "{side}.{levels[0]}.{name}"'
    if name in IMPOSSIBLE_OPTIONS:
        return f"is ignored: {IMPOSSIBLE_OPTIONS[name]}", "leave it out"
    return "", ""


def parse_option_value(parser: Parser, keyword: Token, option: Option) -> int:
    word = parser.scanner.look(VALUE_WORD)
    if word is None or parser.scanner.look(NUMBER_WORD):
        high = option.mask >> option.shift if option.mask else MAX_OPTION
        return parse_number(parser, 0, high)
    parser.scanner.take(VALUE_WORD)
    symbols = option.symbols or {}
    if word.text not in symbols:
        known = f"{describe_words(symbols)}, or a number" if symbols else "a number"
        raise Mistake(
            f'"{shorten(word.text)}" is no value for "{keyword.text}": it must be {known}',
            word,
            find_similar(word.text, symbols),
        )
    return symbols[word.text]


def read_option(parser: Parser, keyword: Token) -> tuple[SocketOption, ...]:
    """Read the value of SIDE.LEVEL.OPTION; () when the option is to be ignored."""
    side, level_name, name = keyword.text.split(".", 2)
    if name.isdecimal():
        check_option_side(parser, keyword)
        value = parse_number(parser, 0, MAX_OPTION)
        number = check_range(parse_number_text(Token(name, keyword.offset)), 0, MAX_OPTION, keyword)
        return (SocketOption(side, level_name, name, LEVELS[level_name], number, value),)
    if name in IGNORED_OPTIONS:
        parser.scanner.take_below(VALUE_WORD)
        parser.warn(f'socket option "{name}" is not for the user to set: it is ignored', keyword)
        return ()
    if name not in OPTIONS:
        raise Mistake(f'unknown socket option "{shorten(name)}"', keyword, find_similar(name, OPTIONS))
    option = OPTIONS[name]
    value = parse_option_value(parser, keyword, option) << option.shift
    fault, hint = find_option_fault(keyword, level_name, name)
    if fault:
        parser.warn(f'socket option "{name}" {fault}', keyword, hint)
        return ()
    check_option_side(parser, keyword)
    if not is_in_time(parser, keyword, name):
        return ()
    return (SocketOption(side, level_name, name, option.level, option.number, value, option.mask),)


# ---- the keywords


class Keyword(NamedTuple):
    """A keyword of sockd.conf: where it may stand, how its value is read and where it goes.

    A capital word in the name stands for any of its kind (OPTION, LEVEL, PROCESS).  `merge`
    tells what a second line does: "last" replaces, "list" and "set" add, "reset" adds within
    a rule and replaces among the globals.
    """

    name: str
    contexts: frozenset[str]
    help: str
    read: Reader | None = None  # None: the keyword opens a rule, route or monitor
    fields: tuple[str, ...] = ()  # of the record to be built; () where there is no use for it
    merge: str = "last"

    @property
    def status(self) -> str:
        """WORKS or NEVER."""
        return find_status(self.name)


IN_FILE = frozenset({"file"})
IN_GLOBAL = frozenset({"global"})
IN_SOCKS = frozenset({"socks"})
IN_CLIENT = frozenset({"client", "hostid"})
IN_RULES = IN_CLIENT | IN_SOCKS
IN_ROUTE = frozenset({"route"})
IN_MONITOR = frozenset({"monitor"})

read_seconds = large_number(0, MAX_SECONDS)
read_count = large_number(0, MAX_OPTION)
read_limit = large_number(1, MAX_OPTION)
read_positive = number(1, MAX_OPTION)

OBJECT_KEYWORDS = (
    Keyword("client pass", IN_FILE, "clients that may connect to the server"),
    Keyword("client block", IN_FILE, "clients that may not connect to the server"),
    Keyword("hostid pass", IN_FILE, "host ids that may connect to the server"),
    Keyword("hostid block", IN_FILE, "host ids that may not connect to the server"),
    Keyword("socks pass", IN_FILE, "requests that the server performs"),
    Keyword("socks block", IN_FILE, "requests that the server refuses"),
    Keyword("route", IN_FILE, "the proxy to go through to some targets"),
    Keyword("monitor", IN_FILE, "traffic to watch, and when to raise an alarm"),
)

GLOBAL_KEYWORDS = (
    Keyword("internal", IN_GLOBAL, "address to listen on", read_internal, ("internal",), "list"),
    Keyword("external", IN_GLOBAL, "address to connect from",
            read_external, ("external",), "list"),
    Keyword("internal.protocol", IN_GLOBAL, "address families to listen on",
            read_families, ("internal_protocols",), "set"),
    Keyword("external.protocol", IN_GLOBAL, "address families to connect from",
            read_families, ("external_protocols",), "set"),
    Keyword("external.rotation", IN_GLOBAL, "how to choose among several external addresses",
            one_of("none", "route", "same-same"), ("external_rotation",)),
    Keyword("user.privileged", IN_GLOBAL, "user for what needs privileges",
            read_user, ("user_privileged",)),
    Keyword("user.unprivileged", IN_GLOBAL, "user for everything else",
            read_user, ("user_unprivileged",)),
    Keyword("user.libwrap", IN_GLOBAL, "user for libwrap", read_user, ("user_libwrap",)),
    Keyword("logoutput", IN_GLOBAL, "where the log goes: stdout, stderr, syslog[/FACILITY], FILE",
            read_log_outputs, ("logoutput",), "list"),
    Keyword("errorlog", IN_GLOBAL, "where errors go besides",
            read_log_outputs, ("errorlog",), "list"),
    Keyword("debug", IN_GLOBAL, "above 0: every rule logs connect, disconnect, error, ioop",
            read_count, ("debug",)),
    Keyword("udp.connectdst", IN_GLOBAL, "take UDP replies only from the target",
            read_yes_or_no, ("udp_connectdst",)),
    Keyword("compatibility", IN_GLOBAL, "quirks for old clients",
            some_below("sameport", "draft-5.05"), ("compatibility",), "set"),
    Keyword("extension", IN_GLOBAL | IN_ROUTE, "Dante's extension of bind",
            some_below("bind"), ("extension",), "set"),
    Keyword("srchost", IN_GLOBAL, "checks of the client's DNS entries",
            some_of("nodnsmismatch", "nodnsunknown", "checkreplyauth"), ("srchost",), "set"),
    Keyword("resolveprotocol", IN_GLOBAL, "how rules resolve names; fake: not at all",
            one_of("udp", "tcp", "fake"), ("resolveprotocol",)),
    Keyword("route.maxfail", IN_GLOBAL, "failures before a route is avoided; 0: never",
            read_count, ("route_maxfail",)),
    Keyword("route.badexpire", IN_GLOBAL, "seconds to avoid a failed route; 0: for ever",
            read_seconds, ("route_badexpire",)),
    Keyword("libwrap.hosts_access", IN_GLOBAL, "ask hosts.allow and hosts.deny first",
            read_yes_or_no, ("libwrap_hosts_access",)),
    Keyword("libwrap.allow", IN_GLOBAL, "file to use as hosts.allow",
            read_file, ("libwrap_allow",)),
    Keyword("libwrap.deny", IN_GLOBAL, "file to use as hosts.deny", read_file, ("libwrap_deny",)),
    Keyword("child.maxrequests", IN_GLOBAL, "clients that a worker accepts; 0: any number",
            read_count, ("child_maxrequests",)),
    Keyword("child.maxlifetime", IN_GLOBAL, "seconds that a worker lives; 0: for ever",
            read_seconds, ("child_maxlifetime",)),
    Keyword("cpu.schedule.PROCESS", IN_GLOBAL, "scheduling policy and priority: fifo/20",
            read_schedule, ("cpu_schedules",), "list"),
    Keyword("cpu.mask.PROCESS", IN_GLOBAL, "CPUs to run on, or any",
            read_mask, ("cpu_masks",), "list"),
    Keyword("passwordfile", IN_GLOBAL, "the server's own accounts for method username",
            read_file, ("passwordfile",)),
    Keyword("chroot", IN_GLOBAL, "directory that the workers are locked in",
            read_directory, ("chroot",)),
    Keyword("login.penalty", IN_GLOBAL, "whether wrong log-ins slow down their source",
            read_yes_or_no, ("login_penalty",)),
)  # fmt: skip

TIMEOUT_KEYWORDS = (
    Keyword("timeout.negotiate", IN_GLOBAL | IN_RULES, "seconds to negotiate in; 0: for ever",
            read_seconds, ("timeouts.negotiate",)),
    Keyword("timeout.connect", IN_GLOBAL | IN_RULES, "seconds to connect in; 0: as the system",
            read_seconds, ("timeouts.connect",)),
    Keyword("timeout.io", IN_GLOBAL | IN_RULES, "seconds without traffic; 0: for ever",
            read_seconds, ("timeouts.io_tcp", "timeouts.io_udp")),
    Keyword("timeout.io.tcp", IN_GLOBAL | IN_RULES, "seconds without traffic on TCP; 0: for ever",
            read_seconds, ("timeouts.io_tcp",)),
    Keyword("timeout.io.udp", IN_GLOBAL | IN_RULES, "seconds without traffic on UDP; 0: for ever",
            read_seconds, ("timeouts.io_udp",)),
    Keyword("timeout.tcp_fin_wait", IN_GLOBAL | IN_RULES, "seconds half closed; 0: as timeout.io",
            read_seconds, ("timeouts.tcp_fin_wait",)),
)  # fmt: skip

RULE_KEYWORDS = (
    Keyword("from", IN_RULES | IN_ROUTE | IN_MONITOR, "where it comes from",
            read_pattern, ("source",)),
    Keyword("to", IN_RULES | IN_ROUTE | IN_MONITOR, "where it goes to", read_pattern, ("target",)),
    Keyword("via", IN_ROUTE, "the proxy, or direct", read_gateways, ("gateways",), "list"),
    Keyword("command", IN_SOCKS | IN_MONITOR | IN_ROUTE, "commands to match",
            some_of(*COMMANDS), ("commands",), "set"),
    Keyword("protocol", IN_SOCKS | IN_MONITOR | IN_ROUTE, "protocols to match",
            some_of("tcp", "udp"), ("protocols",), "set"),
    Keyword("proxyprotocol", IN_SOCKS | IN_ROUTE, "proxy protocols to match, or of the proxy",
            some_of(*PROXY_PROTOCOLS, http_v1_0="http"), ("proxyprotocols",), "set"),
    Keyword("clientmethod", IN_GLOBAL | IN_RULES, "how clients are told before they speak",
            read_client_methods, ("clientmethods",), "reset"),
    Keyword("socksmethod", IN_GLOBAL | IN_RULES, "how SOCKS clients authenticate",
            read_methods, ("socksmethods",), "reset"),
    Keyword("method", IN_ROUTE, "how to authenticate to the proxy",
            read_route_methods, ("methods",), "list"),
    Keyword("credentials", IN_ROUTE, "file with user:password to log in to the proxy with",
            read_file, ("credentials_file",)),
    Keyword("balance", IN_ROUTE, "which of several proxies comes first",
            one_of("order", "random", "roundrobin", "fewest"), ("balance",)),
    Keyword("resolve", IN_ROUTE, "who resolves the names of targets",
            one_of("here", "there", "both"), ("resolve",)),
    Keyword("user", IN_RULES, "users to match", read_names, ("users",), "list"),
    Keyword("group", IN_RULES, "groups of users to match", read_names, ("groups",), "list"),
    Keyword("log", IN_RULES, "what to log",
            some_of(*LOG_EVENTS, iooperation="ioop"), ("log",), "set"),
    Keyword("pam.servicename", IN_RULES, "service name for PAM",
            read_service_name, ("pam_servicename",)),
    Keyword("udp.portrange", IN_SOCKS, "ports for the client's UDP: 40000-45000",
            read_port_range, ("udp_portrange",)),
    Keyword("bsdauth.stylename", IN_SOCKS, "style for BSD Authentication",
            read_service_name, ("bsdauth_stylename",)),
    Keyword("libwrap", IN_RULES, "options of hosts_options(5)", read_libwrap, ("libwrap",)),
    Keyword("bandwidth", IN_RULES, "bytes per second for all its sessions together",
            read_positive, ("bandwidth",)),
    Keyword("redirect from", IN_RULES | IN_ROUTE, "address to connect from instead",
            read_pattern, ("redirect.source",)),
    Keyword("redirect to", IN_RULES, "address to connect to instead",
            read_target, ("redirect.target",)),
    Keyword("bounce to", IN_CLIENT, "address to pass the client on to",
            read_bounce, ("bounce",)),
    Keyword("hostid", IN_RULES | IN_MONITOR, "host id to match", read_pattern),
    Keyword("hostindex", IN_RULES | IN_MONITOR, "which host id to match",
            number(0, 255), ("hostindex",)),
    Keyword("session.max", IN_RULES, "sessions at a time", read_limit, ("session.max",)),
    Keyword("session.throttle", IN_RULES, "new sessions in a time: CLIENTS/SECONDS",
            read_throttle, ("session.throttle",)),
    Keyword("session.state.key", IN_RULES, "what the state limits count by",
            some_of("from", "hostid"), ("session.state_key",)),
    Keyword("session.state.key.hostindex", IN_RULES, "which host id to count by", number(0, 255)),
    Keyword("session.state.max", IN_RULES, "sessions at a time for each key",
            read_limit, ("session.state_max",)),
    Keyword("session.state.throttle", IN_RULES, "new sessions in a time for each key",
            read_throttle, ("session.state_throttle",)),
    Keyword("session.inheritable", IN_CLIENT, "whether the socks-rule takes the limits over",
            read_yes_or_no, ("session.inheritable",)),
    Keyword("gssapi.servicename", IN_RULES | IN_ROUTE, "service name for GSSAPI",
            read_service_name, ("gssapi.servicename",)),
    Keyword("gssapi.keytab", IN_RULES | IN_ROUTE, "key table for GSSAPI",
            read_file, ("gssapi.keytab",)),
    Keyword("gssapi.enctype", IN_RULES | IN_ROUTE, "protection of GSSAPI messages",
            some_of("clear", "integrity", "confidentiality", "per-message"),
            ("gssapi.enctypes",), "list"),
    Keyword("clientcompatibility", IN_RULES | IN_ROUTE, "quirks of GSSAPI clients",
            read_necgssapi, ("gssapi.nec",)),
)  # fmt: skip

# The authorisation and authentication keywords of Dante's LDAP support.
LDAP_NAMES = [
    "basedn",
    "basedn.hex",
    "basedn.hex.all",
    "port",
    "port.ssl",
    "url",
    "certfile",
    "certpath",
    "domain",
    "debug",
    "mdepth",
    "ssl",
    "auto.off",
    "certcheck",
    "keeprealm",
    "filter",
    "filter.ad",
    "filter.hex",
    "filter.ad.hex",
    "attribute",
    "attribute.ad",
    "attribute.hex",
    "attribute.ad.hex",
    "server",
    "group",
    "group.hex",
    "group.hex.all",
    "keytab",
    "auth.basedn",
    "auth.basedn.hex",
    "auth.basedn.hex.all",
    "auth.port",
    "auth.port.ssl",
    "auth.url",
    "auth.certfile",
    "auth.certpath",
    "auth.domain",
    "auth.debug",
    "auth.ssl",
    "auth.auto.off",
    "auth.certcheck",
    "auth.keeprealm",
    "auth.filter",
    "auth.server",
    "auth.keytab",
]
LDAP_KEYWORDS = tuple(
    Keyword(f"ldap.{name}", IN_SOCKS, "lookup of users in LDAP", read_rest) for name in LDAP_NAMES
)

SIDES = ("internal", "external")
SIDE_KEYWORDS = tuple(
    Keyword(f"{side}.{level}.OPTION", IN_GLOBAL | IN_RULES | IN_ROUTE,
            f"socket option of level {level}", read_option, ("socket_options",), "list")
    for side in SIDES
    for level in LEVELS
) + tuple(
    Keyword(f"{side}.log.LEVEL.{event}", IN_GLOBAL | IN_RULES, help, read, ("error_logs",), "list")
    for side in SIDES
    for event, help, read in (
        ("error", "errors to log at LEVEL", read_error_log),
        ("tcp.enabled", "TCP features to log when on", read_tcp_log),
        ("tcp.disabled", "TCP features to log when off", read_tcp_log),
    )
)  # fmt: skip

ALARM_KEYWORDS = tuple(
    Keyword(f"{side}alarm.{name}", IN_MONITOR, help, read, ("alarms",), "list")
    for side in ("", "internal.", "external.")
    for name, help, read in (
        ("data", "too little data: BYTES in SECONDS", read_data_alarm),
        ("data.recv", "too little data received: BYTES in SECONDS", read_data_alarm),
        ("data.send", "too little data sent: BYTES in SECONDS", read_data_alarm),
        ("disconnect", "too many disconnects: COUNT/SESSIONS [in SECONDS]", read_disconnect_alarm),
        ("mtu-error", "packets too large for the path", read_mtu_alarm),
    )
)

KEYWORDS = {
    keyword.name: keyword
    for keyword in (
        *OBJECT_KEYWORDS,
        *GLOBAL_KEYWORDS,
        *TIMEOUT_KEYWORDS,
        *RULE_KEYWORDS,
        *LDAP_KEYWORDS,
        *SIDE_KEYWORDS,
        *ALARM_KEYWORDS,
    )
}

# Old spellings, accepted with a warning.
LEGACY = {
    "block": "socks block",
    "connecttimeout": "timeout.connect",
    "iotimeout": "timeout.io",
    "method": "socksmethod",
    "pamservicename": "pam.servicename",
    "pass": "socks pass",
    "user.notprivileged": "user.unprivileged",
}
# As Dante: in a client-rule "method" is about the client's connection.
LEGACY_IN_CLIENT = {"method": "clientmethod"}
# Accepted and ignored with a warning, as in Dante, whatever their values.
GONE = (
    "localdomain",
    "child.maxidle",
    "child.maxidle.io",
    "child.maxidle.negotiate",
    "child.maxidle.request",
)
BUFFER_HINT = 'write e.g. "internal.socket.so_rcvbuf" or "external.socket.so_sndbuf"'
# Refused with a hint.
REMOVED = {
    "realm": "it belongs to another product: leave it out",
    "socket.recvbuf.tcp": BUFFER_HINT,
    "socket.recvbuf.udp": BUFFER_HINT,
    "socket.sendbuf.tcp": BUFFER_HINT,
    "socket.sendbuf.udp": BUFFER_HINT,
}
# What people write for lack of a better word.
CONFUSED = {"deny": "block", "reject": "block", "drop": "block", "allow": "pass", "permit": "pass"}

CONTEXT_NAMES = {
    "file": "outside of every rule",
    "global": "among the global settings",
    "client": "in a client-rule",
    "hostid": "in a hostid-rule",
    "socks": "in a socks-rule",
    "route": "in a route",
    "monitor": "in a monitor",
}


def find_keyword(text: str) -> Keyword | None:
    """Find a keyword as spelled in the file: internal.tcp.tcp_nodelay is internal.tcp.OPTION."""
    if text in KEYWORDS:
        return KEYWORDS[text]
    parts = text.split(".", 3)
    if len(parts) == 4 and parts[1] == "log":
        parts[2] = "LEVEL"
    elif len(parts) > 2 and parts[0] in SIDES:
        parts[2:] = ["OPTION"]
    elif len(parts) == 3 and parts[0] == "cpu":
        parts[2] = "PROCESS"
    return KEYWORDS.get(".".join(parts))


# ---- settings


def take_keyword(parser: Parser) -> Token:
    word = parser.scanner.take(KEYWORD_WORD)
    if word:
        return word
    parser.draft.broken.add("")
    found = parser.scanner.take(STRANGE_WORD) or parser.scanner.next_token()
    hint = 'comments begin with "#"' if found.text[:1] in (";", "/") else ""
    raise Mistake(f"expected a keyword, not {describe_token(found)}", found, hint)


def take_second_word(parser: Parser, word: Token) -> Token:
    """Complete redirect and bounce, the keywords of two words."""
    if word.text not in ("redirect", "bounce"):
        return word
    second = parser.scanner.take(KEYWORD_WORD)
    return Token(f"{word.text} {second.text}", word.offset) if second else word


def describe_unknown(word: Token, context: str) -> tuple[str, Token, str]:
    if word.text in REMOVED:
        return f'keyword "{word.text}" cannot be used', word, REMOVED[word.text]
    here = [name for name in KEYWORDS if context in KEYWORDS[name].contexts]
    hint = find_similar(word.text, here) or find_similar(word.text, KEYWORDS)
    return f'unknown keyword "{shorten(word.text)}"', word, hint


def describe_misplaced(word: Token, keyword: Keyword, context: str) -> tuple[str, Token, str]:
    text = f'"{word.text}" cannot stand {CONTEXT_NAMES[context]}'
    # Wherever a hostid-rule takes a keyword, so does a client-rule.
    places = [CONTEXT_NAMES[name] for name in CONTEXT_NAMES if name in keyword.contexts and name != "hostid"]
    return text, word, f"it must stand {describe_words(places)}"


def resolve_keyword(parser: Parser, word: Token) -> Keyword:
    """Find the keyword that `word` means in this context, be it an old spelling."""
    context = parser.draft.context
    keyword = find_keyword(word.text)
    if word.text in LEGACY and not (keyword and context in keyword.contexts):
        legacy = LEGACY_IN_CLIENT if context in IN_CLIENT else {}
        new = legacy.get(word.text, LEGACY[word.text])
        parser.warn_of_old(word, new)
        keyword = KEYWORDS[new]
    if keyword is None:
        parser.draft.broken.add("")
        raise Mistake(*describe_unknown(word, context))
    if context not in keyword.contexts:
        raise Mistake(*describe_misplaced(word, keyword, context))
    return keyword


def parse_colon(parser: Parser, word: Token) -> None:
    # The one keyword that has neither colon nor value.
    if word.text.endswith("alarm.mtu-error") or parser.scanner.take_further(COLON):
        return
    found = parser.scanner.next_token()
    raise Mistake(f'expected ":" after "{word.text}", not {describe_token(found)}', found)


def store(draft: Draft, keyword: Keyword, value: Any) -> None:
    """Merge a value with what the draft has of it already."""
    merge = keyword.merge
    if merge == "reset":
        merge = "last" if draft.context == "global" else "list"
    for field in keyword.fields:
        if merge == "set":
            draft.values[field] = draft.values.get(field, frozenset()).union(value)
        elif merge == "list":
            draft.values[field] = draft.values.get(field, ()) + value
        else:
            draft.values[field] = value


FOLLOWS = {"from": "to", "to": "via"}


def describe_object(draft: Draft) -> str:
    return draft.context if draft.context in ("route", "monitor") else f"{draft.context}-rule"


def check_address_order(parser: Parser, name: str, word: Token) -> None:
    """Insist on from, to and via, each once, in this order, with nothing between them."""
    draft = parser.draft
    if name in ("from", "to") and name in draft.places:
        raise Mistake(f'there are two "{name}" in this {describe_object(draft)}', word)
    wanted = FOLLOWS.get(draft.last, "")
    if wanted == "via" and draft.context != "route":
        wanted = ""
    if wanted and name != wanted and wanted not in draft.places:
        parser.error(f'"{wanted}" must follow directly upon "{draft.last}"', word)
        draft.broken.add(wanted)
    for first, second in FOLLOWS.items():
        if name == second and first not in draft.places:
            parser.error(f'"{first}" must stand before "{second}"', word)
            draft.broken.add(first)


def is_gone(word: Token) -> bool:
    # As Dante: whatever kind of process the second one names.
    return word.text in GONE or word.text.startswith("child.maxidle.")


def parse_setting(parser: Parser, word: Token) -> None:
    """Read one keyword and its value, and keep it in the draft."""
    if is_gone(word):
        parse_colon(parser, word)
        parser.warn(f'keyword "{word.text}" has no meaning any more', word, "leave it out")
        read_rest(parser, word)
        return
    word = take_second_word(parser, word)
    keyword = resolve_keyword(parser, word)
    parse_colon(parser, word)
    if parser.draft is not parser.settings:
        check_address_order(parser, keyword.name, word)
    draft = parser.draft
    draft.last = keyword.name
    parser.use(keyword.name, word)
    try:
        value = keyword.read(parser, word) if keyword.read else None
    except Mistake:
        draft.broken.add(keyword.name)
        raise
    finally:
        draft.places[keyword.name] = word
    store(draft, keyword, value)


# ---- rules, routes and monitors

OBJECT_HEAD = re.compile(r"(?:(?:client|socks|hostid)[ \t]+(?:pass|block)|pass|block|route|monitor)\s*\{")


def take_object_name(parser: Parser, word: Token) -> str:
    """Complete what opens a rule, route or monitor; "" when `word` is another keyword."""
    if parser.scanner.look(COLON):
        return ""
    if word.text in ("route", "monitor"):
        return word.text
    if word.text in ("pass", "block"):
        parser.warn_of_old(word, LEGACY[word.text])
        return LEGACY[word.text]
    if word.text not in ("client", "socks", "hostid"):
        return ""
    verdict = parser.scanner.take(KEYWORD_WORD) or parser.scanner.next_token()
    if verdict.text not in ("pass", "block"):
        better = CONFUSED.get(verdict.text)
        raise Mistake(
            f'expected pass or block after "{word.text}", not {describe_token(verdict)}',
            verdict,
            f'write "{word.text} {better}"' if better else "",
        )
    return f"{word.text} {verdict.text}"


def parse_open_brace(parser: Parser) -> None:
    if parser.scanner.take_below(OPEN_BRACE):
        return
    found = parser.scanner.next_token()
    item = parser.scanner.look(KEYWORD_WORD)
    keyword = find_keyword(item.text) if item else None
    complaint = f'expected "{{" and a {describe_object(parser.draft)}, not {describe_token(found)}'
    if keyword is None or parser.draft.context not in keyword.contexts:
        raise Mistake(complaint, found)
    parser.error(complaint, found)


def check_addresses(parser: Parser) -> None:
    """Complain of missing addresses, once."""
    draft = parser.draft
    wanted = ("from", "to", "via") if draft.context == "route" else ("from", "to")
    missing = [f'"{name}"' for name in wanted if name not in {*draft.places, *draft.broken}]
    if missing:
        draft.broken.add("")
        text = f"this {describe_object(draft)} has no {describe_words(missing)}"
        example = "from: 0/0 to: 0/0" + (" via: direct" if draft.context == "route" else "")
        parser.error(text, draft.head, f'e.g. "{example}"')


def recover(parser: Parser) -> None:
    """Skip what cannot be understood: to the next keyword, the end of the line or a brace."""
    scanner = parser.scanner
    end = skip(UNREAD_LINE, scanner.text, scanner.offset)
    comment = scanner.text.find("#", scanner.offset, end)
    code_end = end if comment < 0 else comment
    for found in KEYWORD_IN_LINE.finditer(scanner.text, scanner.offset, code_end):
        if found.group(1) in parser.keywords or find_keyword(found.group(1)):
            scanner.offset = found.start(1)
            return
    scanner.offset = end
    if parser.draft is parser.settings:
        scanner.skip_space()
    if scanner.text.startswith("{", scanner.offset):
        scanner.offset = skip(UNREAD_BLOCK, scanner.text, scanner.offset)


def parse_body(parser: Parser) -> None:
    """Read settings up to and with the closing brace, or to where it must be missing."""
    scanner = parser.scanner
    scanner.skip_space()
    while not scanner.take(CLOSE_BRACE):
        if scanner.at_end() or OBJECT_HEAD.match(scanner.text, scanner.offset):
            parser.draft.broken.add("}")
            parser.error(f'this {describe_object(parser.draft)} has no "}}"', parser.draft.head)
            return
        try:
            parse_setting(parser, take_keyword(parser))
        except Mistake as mistake:
            parser.error(str(mistake), mistake.token, mistake.hint)
            parser.draft.broken.add("")
            recover(parser)
        scanner.skip_space()
    check_addresses(parser)


def parse_object(parser: Parser, word: Token, name: str) -> None:
    """Read the braces of a rule, route or monitor and what is between them."""
    context, _, verdict = name.partition(" ")
    draft = Draft(context, word, parser.scanner.place(word.offset), verdict)
    parser.use(name, word)
    parser.draft = draft
    try:
        parse_open_brace(parser)
        parser.objects.append(draft)
        parse_body(parser)
    finally:
        parser.draft = parser.settings


def parse_statement(parser: Parser) -> None:
    """Read a global setting, a rule, a route or a monitor."""
    word = take_keyword(parser)
    name = take_object_name(parser, word)
    if name:
        return parse_object(parser, word, name)
    if parser.objects and (find_keyword(word.text) or word.text in LEGACY):
        text = f'the global setting "{word.text}" stands below a rule'
        parser.error(text, word, "move it above the first rule")
    return parse_setting(parser, word)


def parse_statements(parser: Parser) -> None:
    parser.scanner.skip_space()
    while not parser.scanner.at_end():
        try:
            parse_statement(parser)
        except Mistake as mistake:
            parser.error(str(mistake), mistake.token, mistake.hint)
            recover(parser)
        parser.scanner.skip_space()


# ---- what the file left out, and the checks of rules

# The methods that can be used on the peer of a bind, and on the sender of a datagram.
REPLY_METHODS = {
    "bindreply": frozenset({"none", "rfc931", "pam.any", "pam.address"}),
    "udpreply": frozenset({"none", "pam.any", "pam.address"}),
}
DEFAULT_PROXYPROTOCOLS = ("socks_v4", "socks_v5")


def fill_commands(values: dict[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Derive commands from protocols or the other way round, as Dante; both when silent."""
    commands: frozenset[str] | None = values.get("commands")
    protocols: frozenset[str] | None = values.get("protocols")
    if protocols is None:
        # As Dante: connect counts for both.
        uses = {"tcp": TCP_COMMANDS, "udp": UDP_COMMANDS | {"connect"}}
        named = frozenset(COMMANDS) if commands is None else commands
        protocols = frozenset(name for name, its_commands in uses.items() if named & its_commands)
    if commands is None:
        tcp = TCP_COMMANDS if "tcp" in protocols else frozenset[str]()
        commands = tcp | (UDP_COMMANDS if "udp" in protocols else frozenset[str]())
    return commands, protocols


def check_commands(parser: Parser, draft: Draft) -> None:
    """Warn of commands that the protocols of the rule rule out."""
    if not ("command" in draft.places and "protocol" in draft.places):
        return
    commands, protocols = fill_commands(draft.values)
    for protocol, its_commands in (("tcp", TCP_COMMANDS), ("udp", UDP_COMMANDS)):
        useless = sorted(commands & its_commands)
        if useless and protocol not in protocols:
            text = f"{describe_words(useless)} can never match without protocol {protocol}"
            parser.warn(text, draft.places["command"], f'add "{protocol}" to "protocol"')


def check_methods_are_global(
    parser: Parser, draft: Draft, keyword: str, methods: tuple[str, ...], known: tuple[str, ...]
) -> None:
    for method in methods:
        if method not in known:
            listed = " ".join(known) or "nothing"
            parser.error(
                f'method "{method}" is not among the global ones ("{keyword}: {listed}")',
                draft.places[keyword],
                f'add "{method}" to the "{keyword}" above the rules',
            )


def check_none_is_last(parser: Parser, keyword: str, token: Token, methods: tuple[str, ...]) -> None:
    after = methods[methods.index("none") + 1 :] if "none" in methods else ()
    if after:
        parser.warn(
            f'"{keyword}" will never come to {describe_words(after)}, as "none" suits everyone',
            token,
            'put "none" last, or leave it out',
        )


def needs_name(values: dict[str, Any]) -> bool:
    return bool(values.get("users") or values.get("groups"))


def fill_client_methods(parser: Parser, draft: Draft) -> tuple[str, ...]:
    known = parser.settings.values.get("clientmethods") or ("none",)
    methods = draft.values.get("clientmethods")
    if methods is None:
        return known
    check_methods_are_global(parser, draft, "clientmethod", methods, known)
    if draft.context != "socks":
        check_none_is_last(parser, "clientmethod", draft.places["clientmethod"], methods)
    return methods


def suits(method: str, values: dict[str, Any], commands: frozenset[str]) -> bool:
    """Tell whether a global method can be of use in a socks-rule that names none."""
    if needs_name(values) and method not in NAMING_METHODS:
        return False
    if commands <= REPLY_COMMANDS:
        return all(method in REPLY_METHODS[command] for command in commands)
    return True


def fill_socks_methods(parser: Parser, draft: Draft, commands: frozenset[str]) -> tuple[str, ...]:
    known = parser.settings.values.get("socksmethods", ())
    methods = draft.values.get("socksmethods")
    if methods is not None:
        check_methods_are_global(parser, draft, "socksmethod", methods, known)
        if draft.context != "socks":
            check_none_is_last(parser, "socksmethod", draft.places["socksmethod"], methods)
        return methods
    if draft.context != "socks":
        return known
    methods = tuple(method for method in known if suits(method, draft.values, commands))
    if known and not methods and not commands <= REPLY_COMMANDS:
        parser.warn(
            "no global method suits this rule, so it can never match",
            draft.head,
            'give it a "socksmethod" of its own',
        )
    return methods


def is_checked(parser: Parser, check: str) -> bool:
    return check in parser.settings.values.get("srchost", ())


def find_naming_lists(rule: Rule, checks_replies: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Return, with their keywords, the method lists of which each entry must tell a user."""
    socks = ("socksmethod", rule.socksmethods)
    client = ("clientmethod", rule.clientmethods)
    if rule.commands <= REPLY_COMMANDS:  # or it is a client-rule
        return [client]
    return [socks, client] if checks_replies and "bindreply" in rule.commands else [socks]


def check_names(parser: Parser, draft: Draft, rule: Rule) -> None:
    """Refuse a rule that asks for a user whom its methods cannot name."""
    if not needs_name(draft.values):
        return
    token = draft.places.get("user") or draft.places["group"]
    checks_replies = is_checked(parser, "checkreplyauth")
    if "udpreply" in rule.commands and rule.commands <= REPLY_COMMANDS:
        parser.error("a UDP reply comes from no user", token, 'leave "user" and "group" out')
        return
    if "udpreply" in rule.commands and checks_replies:
        parser.error(
            'with "srchost: checkreplyauth" a rule for UDP replies cannot ask for a user',
            token,
            "write a rule of its own for udpreply",
        )
        return
    for keyword, methods in find_naming_lists(rule, checks_replies):
        unnamed = [method for method in methods if method not in NAMING_METHODS]
        if unnamed:
            hint = f'leave "{unnamed[0]}" out of the "{keyword}" of this rule'
            if keyword == "clientmethod":
                hint = 'give it "clientmethod: rfc931", or ask for the user in a socks-rule without replies'
            text = f'this rule asks for a user, but {keyword} "{unnamed[0]}" does not tell one'
            parser.error(text, token, hint)
            return


def check_reply_methods(parser: Parser, draft: Draft, rule: Rule) -> None:
    """Refuse methods that no sender of a reply can perform, as Dante only with clientmethod."""
    given = "clientmethods" in draft.values and "socksmethods" in draft.values
    if not given or not rule.commands or not rule.commands <= REPLY_COMMANDS:
        return
    for method in rule.socksmethods:
        for command in sorted(rule.commands):
            if method not in REPLY_METHODS[command]:
                parser.error(f'method "{method}" cannot be used for {command}', draft.places["socksmethod"])
                return


def check_throttles(parser: Parser, limits: SessionLimits, places: dict[str, Token]) -> None:
    if not limits.throttle or not limits.state_throttle:
        return
    clients, seconds = limits.throttle
    clients_of_key, seconds_of_key = limits.state_throttle
    if clients_of_key > clients and seconds_of_key <= seconds:
        text = "the throttle for each key is wider than that for all"
        parser.error(text, places["session.state.throttle"])


def check_session(parser: Parser, draft: Draft) -> None:
    """Check that the limits of a rule fit together."""
    limits = SessionLimits(**draft.group("session"))
    places = draft.places
    limited = [name for name in ("session.state.max", "session.state.throttle") if name in places]
    if limits.state_key and not limited:
        parser.error(
            '"session.state.key" is set, but nothing to count by it',
            places["session.state.key"],
            'add "session.state.max" or "session.state.throttle"',
        )
    if limited and not limits.state_key:
        parser.error(
            f'"{limited[0]}" is set, but not what to count by',
            places[limited[0]],
            'add "session.state.key: from"',
        )
    if limits.max and limits.state_max and limits.state_max > limits.max:
        parser.error(
            f"the limit for each key ({limits.state_max}) is above that for all ({limits.max})",
            places["session.state.max"],
        )
    check_throttles(parser, limits, places)


def fill_timeouts(parser: Parser, draft: Draft) -> Timeouts:
    """Copy the global timeouts and put the rule's own in their place."""
    common = parser.settings.group("timeouts")
    timeouts = Timeouts(**{**common, **draft.group("timeouts")})
    if draft.context != "socks" or not 0 < timeouts.io_tcp < timeouts.tcp_fin_wait:
        return timeouts
    parser.warn(
        f"timeout.tcp_fin_wait ({timeouts.tcp_fin_wait}) is longer than timeout.io "
        f"({timeouts.io_tcp}), so it is reduced to that in this rule",
        draft.places.get("timeout.tcp_fin_wait", draft.head),
    )
    return timeouts._replace(tcp_fin_wait=timeouts.io_tcp)


def fill_options(parser: Parser, draft: Draft) -> tuple[SocketOption, ...]:
    common: tuple[SocketOption, ...] = parser.settings.values.get("socket_options", ())
    return common + draft.values.get("socket_options", ())


def finish_redirect(draft: Draft) -> Redirect | None:
    ends = draft.group("redirect")
    return Redirect(**ends) if ends else None


def is_one_address(pattern: RuleAddress) -> bool:
    return BITS.get(pattern.kind) == pattern.prefix


def check_redirect(parser: Parser, draft: Draft, rule: Rule) -> None:
    """Refuse what a redirection cannot do; warn of what has no effect."""
    redirect = rule.redirect or Redirect()
    for_replies = bool(rule.commands) and rule.commands <= REPLY_COMMANDS
    if redirect.source:
        token = draft.places["redirect from"]
        if redirect.source.kind == "domain":
            parser.error('"redirect from" cannot be a domain', token, "write an address or an interface")
        if not for_replies and not any(port_candidates(redirect.source.port)):
            # Only the process with privileges could take one of those, and nobody asks it to.
            parser.error('"redirect from" cannot take ports below 1024', token)
    if for_replies:
        for word, pattern in zip(("from", "to"), redirect, strict=True):
            if pattern and (not is_one_address(pattern) or pattern.port.operator not in ("any", "eq")):
                text = f'"redirect {word}" of replies must be one address, with one port or none'
                parser.error(text, draft.places[f"redirect {word}"])
    if redirect.target and rule.commands and rule.commands <= {"bind", "bindreply"}:
        parser.warn('"redirect to" has no effect on bind', draft.places["redirect to"])


def finish_rule(parser: Parser, draft: Draft, number: int) -> Rule:
    """Build a rule, fill in what it leaves out and check it."""
    values = draft.plain()
    commands: frozenset[str] = frozenset()
    if draft.context == "socks":
        commands, values["protocols"] = fill_commands(values)
        check_commands(parser, draft)
        if draft.verdict == "block":
            # What is forbidden is forbidden in every language; only a pass has to name http.
            values.setdefault("proxyprotocols", frozenset({"socks_v4", "socks_v5", "http"}))
    values |= {
        "commands": commands,
        "clientmethods": fill_client_methods(parser, draft),
        "socksmethods": fill_socks_methods(parser, draft, commands),
        "timeouts": fill_timeouts(parser, draft),
        "session": SessionLimits(**draft.group("session")),
        "redirect": finish_redirect(draft),
        "gssapi": Gssapi(**draft.group("gssapi")),
        "socket_options": fill_options(parser, draft),
    }
    rule = Rule(draft.context, number, draft.verdict, position=draft.position, **values)
    check_names(parser, draft, rule)
    check_reply_methods(parser, draft, rule)
    check_session(parser, draft)
    check_redirect(parser, draft, rule)
    return rule


def check_alarms(parser: Parser, draft: Draft, alarms: tuple[tuple[Alarm, Token], ...]) -> None:
    """Warn of a monitor without alarms; refuse an alarm below one that covers all of its kind."""
    if not alarms:
        parser.warn("this monitor has no alarm, so it does nothing", draft.head)
    covered: dict[str, Token] = {}
    for alarm, token in alarms:
        if alarm.kind in covered:
            parser.error(
                f'"{covered[alarm.kind].text}" covers all {alarm.kind} alarms: none can follow it',
                token,
            )
        if len(alarm.directions) == 2 or (alarm.kind == "disconnect" and len(alarm.sides) == 2):
            covered.setdefault(alarm.kind, token)


def finish_monitor(parser: Parser, draft: Draft, number: int) -> Monitor:
    values = draft.plain()
    alarms = values.pop("alarms", ())
    values.pop("hostindex", None)
    values["commands"], values["protocols"] = fill_commands(values)
    check_commands(parser, draft)
    check_alarms(parser, draft, alarms)
    values["alarms"] = tuple(alarm for alarm, _ in alarms)
    return Monitor(number, position=draft.position, **values)


# ---- routes

# What can be asked of a proxy (SOCKS 4; RFC 1928 section 4; RFC 9110 section 9.3.6).
COMMANDS_OF_PROXY = {
    "socks_v4": frozenset({"connect", "bind"}),
    "socks_v5": frozenset({"connect", "bind", "udpassociate"}),
    "http": frozenset({"connect"}),
    "upnp": frozenset({"connect"}),
}
MOST_PATHS = 64  # that one route can stand for


def check_route_addresses(parser: Parser, draft: Draft, is_direct: bool) -> None:
    if draft.values["source"].kind == "interface":
        parser.error("a route cannot be from an interface", draft.places["from"], "write its network")
    for name in ("proxyprotocol", "credentials", "balance", "resolve"):
        # Unlike Dante: with a proxyprotocol it takes "direct" for the name of a proxy.
        if is_direct and name in draft.places:
            parser.error(f"a direct route has no {name}", draft.places[name])


def check_forwarded_password(parser: Parser, draft: Draft, protocols: frozenset[str]) -> None:
    token = draft.places["method"]
    if "socks_v5" not in protocols:
        parser.error(
            'method "username" needs proxyprotocol socks_v5',
            token,
            'add "proxyprotocol: socks_v5", or leave the method out',
        )
        return
    if not NAMING_METHODS.intersection(parser.settings.values.get("socksmethods", ())):
        parser.error(
            "no client can give a user name to pass on to the proxy: no global method tells one",
            token,
            'add "username" to the global "socksmethod"',
        )
        return
    parser.complain("notice", "this route hands the user names and passwords of clients to the proxy", token)


def check_hop(parser: Parser, draft: Draft, hop: Hop) -> None:
    """Check that the proxies of a hop can be spoken to as the file says."""
    protocols = frozenset(hop.proxyprotocols)
    if protocols & {"socks_v4", "socks_v5"} and protocols & {"http", "upnp"}:
        parser.error(
            "socks and other proxyprotocols cannot be mixed",
            draft.places["proxyprotocol"],
            "write one route for each",
        )
    if ("upnp" in protocols) == bool(hop.upstreams):
        parser.error("upnp goes with a gateway found by broadcast, and with no other", draft.places["via"])
    if "username" in hop.methods and not hop.credentials_file:
        check_forwarded_password(parser, draft, protocols)


def check_route_commands(parser: Parser, draft: Draft, route: Route) -> None:
    """Check that the last hop can do what is asked of it, and each hop of a UDP path."""
    # Unlike Dante: it only ever asks a proxy to connect.
    able = frozenset().union(*(COMMANDS_OF_PROXY[name] for name in route.hops[-1].proxyprotocols))
    if any("socks_v5" not in hop.proxyprotocols for hop in route.hops):
        able -= {"udpassociate"}
    unable = sorted(route.commands - able - REPLY_COMMANDS)
    if unable:
        named = describe_words(route.hops[-1].proxyprotocols)
        hint = 'write a route "via: direct" for other commands'
        parser.error(f"this cannot be asked of {named}: {' '.join(unable)}", draft.places["command"], hint)
    if math.prod(len(hop.upstreams) * len(hop.proxyprotocols) for hop in route.hops) > MOST_PATHS:
        parser.error(f"this route stands for more than {MOST_PATHS} paths", draft.places["via"])


def finish_hop(gateways: tuple[tuple[str, Endpoint | None], ...], settings: dict[str, Any]) -> Hop:
    """Build a hop and fill in what the file leaves out."""
    # Whoever gives a password wants to be asked for it.
    methods = settings.pop("methods", ("username",) if "credentials_file" in settings else ("none",))
    if "username" not in methods:
        # Also where they stand above the first `via`: http and socks_v4 would send them unasked.
        settings.pop("credentials_file", "")
    default = ("socks_v5",) if "gssapi" in methods else DEFAULT_PROXYPROTOCOLS
    protocols = settings.pop("proxyprotocols", default)
    port = HTTP_PORT if protocols == {"http"} else SOCKS_PORT
    upstreams = tuple(e if e.port else e._replace(port=port) for _, e in gateways if e)
    ordered = tuple(name for name in PROXY_PROTOCOLS if name in protocols)
    return Hop(upstreams, ordered, methods, **settings)


KEYTAB_KINDS = frozenset({"FILE", "WRFILE"})


def find_keytab_file(keytab: str) -> str:
    """Return the file that a key table is, as krb5_kt_resolve(3) reads its name; "" if it is none.

    >>> find_keytab_file("/etc/a:b"), find_keytab_file("FILE:/etc/a:b"), find_keytab_file("MEMORY:a")
    ('/etc/a:b', '/etc/a:b', '')
    """
    kind, colon, path = keytab.partition(":")
    if not colon or keytab.startswith("/"):
        return keytab
    return path if kind in KEYTAB_KINDS else ""


def find_gssapi_faults_of(route: Route, hop: Hop) -> Iterator[tuple[str, str, str]]:
    """Yield (keyword, fault, hint) for what a route asks of GSS-API and cannot have."""
    settings = route.gssapi
    if hop.proxyprotocols != ("socks_v5",):
        yield "method", 'method "gssapi" needs proxyprotocol socks_v5, and no other beside it', ""
    if settings.servicename.upper() == ANY_SERVICE:
        yield "gssapi.servicename", "a proxy has to be asked for by name", ""
    elif "/" not in settings.servicename and any(upstream.family for upstream in hop.upstreams):
        # Unlike Dante, which believes DNS when it says what name an address has.
        hint = 'write "via" with its host name, or a gssapi.servicename like "rcmd/proxy.example.com"'
        yield "method", "Kerberos knows proxies by name, and this one has an address only", hint
    if "per-message" in settings.enctypes:
        yield "gssapi.enctype", "a route protects all messages alike, and not each as one likes it", ""
    if settings.keytab and not find_keytab_file(settings.keytab):
        yield "gssapi.keytab", "the key table of a route has to be a file", ""
    if len(route.hops) > 1 and "udpassociate" in route.commands:
        yield "method", "with several hops, datagrams cannot be protected by gssapi", ""


def check_gssapi(parser: Parser, draft: Draft, route: Route) -> None:
    """Check that the proxies of a route can be spoken to by GSS-API as the file says."""
    hops = [hop for hop in route.hops if "gssapi" in hop.methods]
    if not hops:
        for name in ("gssapi.servicename", "gssapi.keytab", "gssapi.enctype", "clientcompatibility"):
            if name in draft.places:
                parser.warn(f'"{name}" has no effect in a route without method gssapi', draft.places[name])
    if len(hops) > 1:
        parser.error("only one hop of a route can have method gssapi", draft.places["method"])
    for hop in hops:
        for keyword, fault, hint in find_gssapi_faults_of(route, hop):
            parser.error(fault, draft.places[keyword], hint)


def merge_settings(above: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    """Join what stands above the only `via` of a route with what stands below it."""
    both = {**above, **below}
    if "proxyprotocols" in both:
        both["proxyprotocols"] = above.get("proxyprotocols", frozenset()) | both["proxyprotocols"]
    if "methods" in above and "methods" in below:
        both["methods"] = above["methods"] + below["methods"]
    return both


def finish_hops(parser: Parser, draft: Draft, values: dict[str, Any]) -> tuple[Hop, ...]:
    """Build the hops of a route; what stands above the first `via` counts for each that says nothing."""
    gateways = values.pop("gateways")
    last = {field: values.pop(field) for field in HOP_FIELDS if field in values}
    sections: list[dict[str, Any]] = [*values.pop("sections"), last]
    common, settings = sections[0], sections[1:]
    names = [name for alternatives in gateways for name, _ in alternatives]
    if len(names) > 1 and not {"direct", "broadcast"}.isdisjoint(names):
        parser.error("direct or broadcast cannot stand beside another gateway", draft.places["via"])
        return ()
    if names == ["direct"]:
        return ()
    if len(gateways) == 1:
        return (finish_hop(gateways[0], merge_settings(common, settings[0])),)
    return tuple(
        finish_hop(alternatives, {**common, **own})
        for alternatives, own in zip(gateways, settings, strict=True)
    )


def finish_route(parser: Parser, draft: Draft, number: int) -> Route:
    """Build a route, fill in what it leaves out and check it."""
    values = draft.plain()
    hops = finish_hops(parser, draft, values)
    check_route_addresses(parser, draft, not hops)
    asks_udp = not hops or "udpassociate" in values.get("commands", ())
    values.setdefault("protocols", frozenset({"tcp", "udp"} if asks_udp else {"tcp"}))
    if values.pop("extension", ()):
        # As Dante: it is taken here, but only a client library could do something with it.
        parser.warn('"extension" has no effect in a route', draft.places["extension"])
    values["redirect"] = finish_redirect(draft)
    values["gssapi"] = Gssapi(**{"keytab": "", **draft.group("gssapi")})
    route = Route(number, hops=hops, position=draft.position, **values)
    for hop in hops:
        check_hop(parser, draft, hop)
    if hops:
        check_route_commands(parser, draft, route)
    if hops and "credentials" in draft.places and not any(hop.credentials_file for hop in hops):
        text = '"credentials" has no effect in a route without method username'
        parser.warn(text, draft.places["credentials"])
    check_gssapi(parser, draft, route)
    return route


# ---- the whole

FINISHERS: dict[str, Callable[[Parser, Draft, int], object]] = {
    "client": finish_rule,
    "hostid": finish_rule,
    "socks": finish_rule,
    "route": finish_route,
    "monitor": finish_monitor,
}
COLLECTIONS = {
    "client": "client_rules",
    "hostid": "hostid_rules",
    "socks": "socks_rules",
    "route": "routes",
    "monitor": "monitors",
}


def finish_objects(parser: Parser) -> dict[str, Any]:
    """Build the rules, routes and monitors in the order of the file, each kind counted from 1."""
    finished: dict[str, list[object]] = {kind: [] for kind in FINISHERS}
    methods_are_known = not parser.settings.broken & {"clientmethod", "socksmethod"}
    for draft in parser.objects:
        if methods_are_known and not draft.broken:
            number = len(finished[draft.context]) + 1
            finished[draft.context].append(FINISHERS[draft.context](parser, draft, number))
    return {COLLECTIONS[kind]: tuple(objects) for kind, objects in finished.items()}


def check_internal(parser: Parser) -> None:
    settings = parser.settings
    # What could not be read may have been what is missing.
    if settings.values.get("internal") or settings.broken & {"internal", ""}:
        return
    token = settings.places.get("internal")
    if token:
        parser.error("no internal address is left: internal.protocol drops them all", token)
        return
    parser.complain_of_file(
        "error",
        f'{parser.scanner.file} names no address to listen on: "internal" is missing',
        'e.g. "internal: 127.0.0.1 port = 1080"',
    )


def check_external(parser: Parser) -> None:
    settings = parser.settings
    externals = settings.values.get("external", ())
    token = settings.places.get("external")
    rotation = settings.values.get("external_rotation", "none")
    if settings.broken & {"external", ""}:
        return
    if not token:
        parser.complain_of_file(
            "error",
            f'{parser.scanner.file} names no address to connect from: "external" is missing',
            'e.g. "external: eth0"',
        )
    elif not externals:
        parser.error("no external address is left: external.protocol drops them all", token)
    elif len(externals) > 1 and rotation == "none":
        parser.warn(
            'only the first external address is used, as "external.rotation" is "none"',
            token,
            'set "external.rotation" to "route" or "same-same"',
        )
    elif len(externals) == 1 and rotation == "same-same":
        place = settings.places["external.rotation"]
        parser.warn('"same-same" has no effect with one external address', place)


def check_global_methods(parser: Parser) -> None:
    settings = parser.settings
    methods = settings.values.get("socksmethods", ())
    if settings.broken & {"socksmethod", ""}:
        return
    if methods:
        check_none_is_last(parser, "socksmethod", settings.places["socksmethod"], methods)
        return
    parser.complain_of_file(
        "warning",
        f'{parser.scanner.file} sets no "socksmethod": every SOCKS request will be refused',
        'e.g. "socksmethod: none", or "socksmethod: username"',
    )


def check_rules_exist(parser: Parser) -> None:
    """Warn of a server that refuses everything.  Unlike Dante, which keeps silent."""
    passing = {draft.context for draft in parser.objects if draft.verdict != "block"}
    for context, refused in (("client", "every client"), ("socks", "every request")):
        if context not in passing:
            parser.complain_of_file(
                "warning",
                f'{parser.scanner.file} has no "{context} pass" rule: {refused} will be refused',
                f'e.g. "{context} pass {{ from: 10.0.0.0/8 to: 0/0 }}"',
            )


def check_routes(parser: Parser) -> None:
    settings = parser.settings
    if settings.values.get("route_maxfail") == 0 and "route.badexpire" in settings.places:
        parser.warn(
            '"route.badexpire" has no effect when "route.maxfail" is 0',
            settings.places["route.badexpire"],
        )


def finish_config(parser: Parser) -> Config | None:
    """Build and check the whole; None when anything was wrong."""
    objects = finish_objects(parser)
    check_global_methods(parser)
    check_internal(parser)
    check_external(parser)
    check_routes(parser)
    if parser.errors:
        return None
    check_rules_exist(parser)
    values = parser.settings.plain()
    if objects["client_rules"] or objects["socks_rules"] or objects["hostid_rules"]:
        # As Dante: the first rule turns an empty list into this.
        values["clientmethods"] = values.get("clientmethods") or ("none",)
    return Config(
        parser.scanner.file,
        timeouts=Timeouts(**parser.settings.group("timeouts")),
        uses=tuple(parser.uses),
        **values,
        **objects,
    )


def order_of_file(complaint: Complaint) -> tuple[int, int]:
    if complaint.position is None:
        return sys.maxsize, 0
    return complaint.position.line, complaint.position.column


def parse_config(
    text: str, file: str, surroundings: Surroundings
) -> tuple[Config | None, tuple[Complaint, ...]]:
    """Turn the text of a configuration file into a Config, and say all that is wrong with it.

    The Config is None exactly when a complaint is an error.  `file` is only for complaints.
    """
    if not text:
        return None, (Complaint("error", f"{file} is empty"),)
    keywords = frozenset({*KEYWORDS, *LEGACY, *GONE})
    parser = Parser(Scanner(text, file), surroundings, keywords)
    try:
        parse_statements(parser)
        config = finish_config(parser)
    except TooManyErrors:
        config = None
        parser.complain_of_file("notice", f"too many errors: {file} was not read further")
    return config, tuple(sorted(parser.complaints, key=order_of_file))


def find_unsupported(config: Config) -> tuple[Complaint, ...]:
    """Complain of each use of a keyword or value that is parsed but not acted upon."""
    complaints = []
    for name, position in config.uses:
        reason = find_reason(name)
        if reason:
            text = f'"{name}" is not supported here: {reason}'
            complaints.append(Complaint("error", text, position, hint="leave it out"))
    return tuple(complaints)


def describe_line(line: str, start: int, length: int) -> list[str]:
    """Show a line and mark a part of it; of a long line, what is around that part."""
    first = max(0, start - SHOWN_COLUMNS // 2) if len(line) > SHOWN_COLUMNS else 0
    shown = line[first : first + SHOWN_COLUMNS]
    shown = "".join(char if char.isprintable() or char == "\t" else "?" for char in shown)
    # Tabs are kept in the margin below, so that the caret stands right whatever their width.
    margin = "".join("\t" if char == "\t" else " " for char in shown[: start - first])
    room = max(1, len(shown) - (start - first))
    return ["    " + shown, "    " + margin + "^" + "~" * (min(length, room) - 1)]


def read_utf8(text: str) -> str:
    """Return text of the file, each of whose bytes is a character to us, as its author reads it in UTF-8."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def describe_complaint(complaint: Complaint) -> str:
    """Write a complaint as a compiler does: place, text, the line, a caret and the hint."""
    where = f"{complaint.position}: " if complaint.position else ""
    lines = [f"{where}{complaint.level}: {read_utf8(complaint.text)}"]
    if complaint.position and complaint.line_text:
        start, line = complaint.position.column - 1, complaint.line_text
        end = start + complaint.length
        before, marked, rest = map(read_utf8, (line[:start], line[start:end], line[end:]))
        lines += describe_line(before + marked + rest, len(before), len(marked))
    if complaint.hint:
        lines.append(f"    hint: {read_utf8(complaint.hint)}")
    return "\n".join(lines)


# ============================== 5. Rules ==============================
# Facts and rules to a decision (sockd.conf(5), RULES).  First match wins; behind the last
# rule stands a built-in block, number 0.  All is pure: whatever must be asked of the outside
# (DNS, interfaces, groups, identd) is asked of the Lookup that is passed in.


class Lookup(Protocol):
    """Answers about the world; each gives an empty answer where there is none, and never raises."""

    def addresses(self, name: str) -> tuple[Endpoint, ...]: ...

    def names(self, address: Endpoint) -> tuple[str, ...]: ...

    def interface(self, name: str) -> tuple[Endpoint, ...]: ...

    def groups(self, user: str) -> frozenset[str]: ...

    def ident(self) -> str | None: ...


class NoLookup:
    """The Lookup that knows nothing."""

    def addresses(self, name: str) -> tuple[Endpoint, ...]:
        return ()

    def names(self, address: Endpoint) -> tuple[str, ...]:
        return ()

    def interface(self, name: str) -> tuple[Endpoint, ...]:
        return ()

    def groups(self, user: str) -> frozenset[str]:
        return frozenset()

    def ident(self) -> str | None:
        return None


class NamelessLookup(NoLookup):
    """A Lookup without DNS (sockd.conf(5), resolveprotocol: fake)."""

    def __init__(self, lookup: Lookup) -> None:
        # Whatever is no matter of names is still asked for.
        self.interface = lookup.interface  # type: ignore[method-assign]
        self.groups = lookup.groups  # type: ignore[method-assign]
        self.ident = lookup.ident  # type: ignore[method-assign]


EVERYWHERE = RuleAddress("any", "0/0")
NO_RULE_MATCHED = "no rules matched; using default block rule"
# Unlike Dante: what the built-in rule refuses is logged, for without a trace nobody finds out why.
FINAL_LOG = frozenset({"connect", "error"})
FINAL_CLIENT_BLOCK = Rule("client", 0, "block", EVERYWHERE, EVERYWHERE, log=FINAL_LOG)
FINAL_SOCKS_BLOCK = Rule("socks", 0, "block", EVERYWHERE, EVERYWHERE, log=FINAL_LOG)

# Which bytes of a SOCKS 5 greeting serve a method, best first (seen in danted).
METHOD_BYTES = {
    "none": (0,),
    "gssapi": (1,),
    "username": (2,),
    "rfc931": (0, 2),
    "pam.any": (2, 0),
    "pam.address": (2, 0),
    "pam.username": (2,),
    "bsdauth": (2,),
}
# What a client that negotiated one method may be checked by instead: a name with a password
# serves any password database, and no name at all serves those that look at the address only.
METHOD_UPGRADES = {
    "username": frozenset({"pam.username", "pam.address", "pam.any", "bsdauth"}),
    "none": frozenset({"pam.address", "pam.any"}),
}


def match_port(test: PortTest, port: int) -> bool:
    """Tell whether a port passes a rule's `port` clause.

    >>> match_port(PortTest("range", 80, 90), 90), match_port(PortTest("ne", 80), 80)
    (True, False)
    """
    operator = test.operator
    if operator == "any":
        return True
    if operator == "eq":
        return port == test.low
    if operator == "ne":
        return port != test.low
    if operator in ("lt", "le"):
        return port < test.low or (operator == "le" and port == test.low)
    if operator in ("gt", "ge"):
        return port > test.low or (operator == "ge" and port == test.low)
    return test.low <= port <= test.high


def address_number(endpoint: Endpoint) -> int:
    """Return an IP address as an integer."""
    if endpoint.family == 4:
        return int.from_bytes(socket.inet_aton(endpoint.host), "big")
    return int.from_bytes(socket.inet_pton(socket.AF_INET6, endpoint.host.partition("%")[0]), "big")


def match_network(pattern: RuleAddress, addresses: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return those of the addresses that lie in an ipv4 or ipv6 pattern's network."""
    family, bits = (4, 32) if pattern.kind == "ipv4" else (6, 128)
    if pattern.prefix == 0:
        return tuple([a for a in addresses if a.family == family])
    shift = bits - pattern.prefix
    network = pattern.network >> shift
    return tuple([a for a in addresses if a.family == family and address_number(a) >> shift == network])


def match_domain_text(domain: str, name: str) -> bool:
    """Tell whether a host name is, or ends in, a domain.

    Unlike Dante: only at a label border, so `.example.com` does not let `xexample.com` through.

    >>> match_domain_text("example.com", "WWW.Example.com."), match_domain_text("example.com", "xexample.com")
    (True, False)
    """
    name, domain = name.rstrip(".").lower(), domain.rstrip(".").lower()
    return not domain or name == domain or name.endswith("." + domain)


def bare_host(endpoint: Endpoint) -> str:
    """Return an address without the link that it is said to be at.

    The kernel says it of our own addresses where we ask for them, but endpoints of connections are without.
    """
    return endpoint.host.partition("%")[0]


def match_named(
    pattern: RuleAddress, endpoint: Endpoint, addresses: tuple[Endpoint, ...], lookup: Lookup
) -> tuple[Endpoint, ...] | None:
    """match_address for the patterns that are names: domain, host and interface."""
    if pattern.kind == "domain":
        names = (endpoint.host,) if endpoint.family == 0 else lookup.names(endpoint)
        return addresses if any(match_domain_text(pattern.text, name) for name in names) else None
    if pattern.kind == "host":
        if endpoint.family == 0 and endpoint.host.rstrip(".").lower() == pattern.text.rstrip(".").lower():
            return addresses
        known = {bare_host(a) for a in lookup.addresses(pattern.text)}
    else:
        known = {bare_host(a) for a in lookup.interface(pattern.text)}
    # As Dante: the same address at another link is the same.
    return tuple(a for a in addresses if bare_host(a) in known) or None


def match_address(
    pattern: RuleAddress, endpoint: Endpoint, resolved: tuple[Endpoint, ...], lookup: Lookup
) -> tuple[Endpoint, ...] | None:
    """Return those addresses of an endpoint that match a rule's address, or None for no match.

    `resolved` are the addresses of an endpoint that is a name.  A name matches a network as soon as one
    of its addresses does; a session then uses only those that did, so that what was judged is what
    is connected to.
    """
    if not match_port(pattern.port, endpoint.port):
        return None
    addresses = resolved if endpoint.family == 0 else (endpoint,)
    if pattern.kind == "any":
        return addresses
    if pattern.kind in ("ipv4", "ipv6"):
        return match_network(pattern, addresses) or None
    return match_named(pattern, endpoint, addresses, lookup)


def covers_every_target(pattern: RuleAddress, families: frozenset[int]) -> bool:
    """Tell whether a rule's `to` covers all that can be reached over the families that we can leave by."""
    if pattern.port.operator != "any":
        return False
    # As Dante: 0.0.0.0/0 does so where no external address is an IPv6 one, and ::/0 the other way round.
    alone = {pattern.kind} == {FAMILY_NAMES[family] for family in families}
    return pattern.kind == "any" or (alone and pattern.prefix == 0)


def match_target(rule: Rule, facts: Facts, lookup: Lookup) -> tuple[Endpoint, ...] | None:
    """match_address for the `to` of a rule, where the target may not be known yet."""
    if facts.target is not None:
        addresses = facts.addresses
        if rule.target.kind == "host":
            # As Dante: two names are the same by addresses that can be connected to, and by no other.
            addresses = tuple(a for a in addresses if a.family in facts.families)
        return match_address(rule.target, facts.target, addresses, lookup)
    # As Dante: before the first datagram any pass rule may come to match, but a block rule
    # counts only where it covers every target.
    return () if rule.verdict == "pass" or covers_every_target(rule.target, facts.families) else None


def choose_rule_method(methods: tuple[str, ...], identity: Identity, lookup: Lookup) -> str | None:
    """Return the method by which a client is to be checked under a rule, or None if none fits."""
    if identity.method in methods:
        return identity.method
    if identity.clientmethod != "none" and identity.clientmethod in methods:
        return identity.clientmethod
    upgrades = METHOD_UPGRADES.get(identity.method, frozenset())
    for method in methods:
        if method in upgrades or (method == "rfc931" and lookup.ident() is not None):
            return method
    return None


def needs_user(rule: Rule) -> bool:
    return bool(rule.users or rule.groups)


def match_user(rule: Rule, user: str, lookup: Lookup) -> bool:
    """Tell whether a user passes the `user` and `group` conditions of a rule."""
    if rule.users and user not in rule.users:
        return False
    return not rule.groups or bool(lookup.groups(user).intersection(rule.groups))


def match_identity(rule: Rule, facts: Facts, checks_replies: bool, lookup: Lookup) -> str | None:
    """Return the method to verify for a rule whose other conditions hold, or None to pass it over."""
    identity = facts.identity
    if facts.command in REPLY_COMMANDS:
        # As Dante: whoever answers cannot authenticate, so replies skip this unless checkreplyauth asks.
        allowed = not checks_replies or ("none" in rule.socksmethods and not needs_user(rule))
        return "none" if allowed else None
    if identity.clientmethod not in rule.clientmethods:
        return None
    method = choose_rule_method(rule.socksmethods, identity, lookup)
    if method is None:
        return None
    user = (lookup.ident() or "") if method == "rfc931" else identity.user
    return method if match_user(rule, user, lookup) else None


def choose_client_method(rule: Rule, lookup: Lookup) -> tuple[str, str] | None:
    """Return (clientmethod, user) by which a client-rule takes a client, or None where none fits."""
    for method in rule.clientmethods:
        user = (lookup.ident() or "") if method == "rfc931" else ""
        if (method != "rfc931" or user) and match_user(rule, user, lookup):
            return method, user
    return None


ANY_SHIFT = 128  # shifts every address away


def network_of(pattern: RuleAddress) -> tuple[int, int, int]:
    """Return (family, shift, network) of a pattern: `number >> shift == network` for what may match it.

    Family 0 is for names, which are to be looked at closely, and for what takes everything.
    """
    if pattern.kind not in ("ipv4", "ipv6"):
        return 0, ANY_SHIFT, 0
    family, bits = (4, 32) if pattern.kind == "ipv4" else (6, 128)
    return family, bits - pattern.prefix, pattern.network >> (bits - pattern.prefix)


Placed = tuple[int, Rule]  # a rule with its place among all


def merge_placed(first: Sequence[Placed], second: Sequence[Placed]) -> list[Placed]:
    """Return the rules of two lists by their places, of which no two are the same.

    Not by list.sort(), which takes a page more of the stack of each session's thread.
    """
    few, many = (first, second) if len(first) < len(second) else (second, first)
    merged = list(many)
    for placed in few:
        bisect.insort(merged, placed)
    return merged


class RuleIndex:
    """Rules, found by the networks that they are about.  Never changes.

    Rules whose networks are of the same family and size are a group, and one look into its table finds
    those for an address.  So a request costs what there are groups, and not what there are rules.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        # By family and shift of source and target, then by both networks.
        groups: dict[tuple[int, int, int, int], dict[tuple[int, int], list[Placed]]] = {}
        # By those of the source alone, for a target that is a name or not known yet.
        sources: dict[tuple[int, int], dict[int, list[Placed]]] = {}
        for placed in enumerate(rules):
            family, shift, network = network_of(placed[1].source)
            to_family, to_shift, to_network = network_of(placed[1].target)
            group = groups.setdefault((family, shift, to_family, to_shift), {})
            group.setdefault((network, to_network), []).append(placed)
            sources.setdefault((family, shift), {}).setdefault(network, []).append(placed)
        self.groups = [(*key, group) for key, group in groups.items()]
        self.sources = [(*key, group) for key, group in sources.items()]

    def find(self, source: Endpoint, target: Endpoint | None) -> Sequence[Placed]:
        """Return the rules that may match two endpoints, in their order."""
        found: Sequence[Placed] = ()
        near_family, near = source.family, address_number(source)
        if target is None or target.family == 0:
            for family, shift, by_source in self.sources:
                if not family or family == near_family:
                    part = by_source.get(near >> shift, ())
                    found = merge_placed(found, part) if found and part else found or part
            return found
        far_family, far = target.family, address_number(target)
        for family, shift, to_family, to_shift, group in self.groups:
            if (not to_family or to_family == far_family) and (not family or family == near_family):
                part = group.get((near >> shift, far >> to_shift), ())
                found = merge_placed(found, part) if found and part else found or part
        return found


# What can be known of a name that is not resolved here: nothing that these compare.
HIDDEN_KINDS = frozenset({"ipv4", "ipv6", "interface", "host"})


def is_unresolved(facts: Facts) -> bool:
    """Tell whether the target is a name that only an upstream will resolve."""
    return facts.target is not None and facts.target.family == 0 and not facts.addresses


def could_be_meant(rule: Rule, target: Endpoint) -> bool:
    """Tell whether a rule blocks addresses of which an unresolved name may have one."""
    return (
        rule.verdict == "block"
        and rule.target.kind in HIDDEN_KINDS
        and match_port(rule.target.port, target.port)
    )


DIRECT = Route(0, EVERYWHERE, EVERYWHERE, commands=frozenset(COMMANDS), protocols=frozenset({"tcp", "udp"}))
PATH_ORDER = {"socks_v4": 1, "socks_v5": 2, "http": 3, "upnp": 4}


def path_order(path: Path) -> int:
    """As Dante: direct routes come first, then those by socks_v4, socks_v5 and http."""
    return PATH_ORDER[path.steps[-1].protocol] if path.steps else 0


def expand_route(route: Route) -> list[Path]:
    """Return all paths that a route stands for, in the order in which they are to be tried."""
    choices = [
        [Step(upstream, protocol, hop) for protocol in hop.proxyprotocols for upstream in hop.upstreams]
        for hop in route.hops
    ]
    return [Path(route, steps) for steps in itertools.product(*choices)]


def route_to_upstream(upstream: Endpoint) -> Path:
    """Return the route that leads a client to a proxy itself.  As Dante: that is direct."""
    kind = FAMILY_NAMES[upstream.family]
    port = PortTest("eq", upstream.port, upstream.port)
    target = RuleAddress(kind, upstream.host, pack_address(upstream), BITS[kind], port)
    return Path(DIRECT._replace(target=target, commands=frozenset({"connect"})))


def expand_routes(routes: Iterable[Route]) -> tuple[Path, ...]:
    """Return the paths of a configuration; none where it has no route, which means direct."""
    paths = [path for route in routes for path in expand_route(route)]
    nearest = dict.fromkeys(path.steps[0].upstream for path in paths if path.steps)
    own = [route_to_upstream(upstream) for upstream in nearest if upstream.family]
    return tuple(sorted(own + paths, key=path_order))


def can_log_in(step: Step, identity: Identity) -> bool:
    """Tell whether a client of this identity can be announced to an upstream as its route wants it."""
    methods = step.hop.methods
    if "none" in methods or "gssapi" in methods or step.hop.credentials is not None:
        return True
    return "username" in methods and identity.method == "username"


def is_for_names(route: Route) -> bool:
    """Tell whether a route leads to one name or domain, and not to everything."""
    kind, text = route.target.kind, route.target.text
    return kind == "host" or (kind == "domain" and text.strip(".") != "")


def can_carry(path: Path, command: str, target: Endpoint | None) -> bool:
    """Tell whether the protocols of a path have a command, and can express a target."""
    if not path.steps:
        # A name that is not resolved has no direct route but by that name; one to 0/0 would have names
        # that are for a proxy asked of DNS.
        return target is None or target.family != 0 or bool(path.addresses) or is_for_names(path.route)
    if command == "udpassociate":
        return all(step.protocol == "socks_v5" for step in path.steps)
    if command not in COMMANDS_OF_PROXY[path.steps[-1].protocol]:
        return False
    hidden = target is not None and target.family == 0 and not path.addresses
    if hidden:
        return path.route.resolve != "here"
    speaks_ipv4 = path.steps[-1].protocol == "socks_v4"
    return not speaks_ipv4 or not path.addresses or any(a.family == 4 for a in path.addresses)


# By the kind of a rule's target.
FAMILIES_JUDGED = {"ipv4": frozenset({4}), "ipv6": frozenset({4, 6}), "interface": frozenset({4, 6})}


class Policy:
    """The rules of a configuration, ready to be asked.  Never changes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.client_rules = RuleIndex(config.client_rules)
        self.socks_rules = RuleIndex(config.socks_rules)
        self.speaks_http = any(
            rule.verdict == "pass" and "http" in rule.proxyprotocols for rule in config.socks_rules
        )
        self.fake = config.resolveprotocol == "fake"
        self.checks_replies = "checkreplyauth" in config.srchost
        self.paths = expand_routes(config.routes)
        self.judged_families = self._find_judged_families()

    def _find_judged_families(self) -> frozenset[int]:
        """Return the families that the rules compare of a name's addresses.

        As Dante: also where only the other family can be used.
        """
        kinds = {rule.target.kind for rule in self.config.socks_rules}.intersection(FAMILIES_JUDGED)
        if kinds and any(path.steps for path in self.paths):
            return frozenset({4, 6})  # which a proxy may connect to, when it is sent the name
        return frozenset().union(*(FAMILIES_JUDGED[kind] for kind in kinds))

    def client_decision(self, facts: Facts, lookup: Lookup) -> tuple[Decision, Identity]:
        """Judge a new connection by the client-rules; facts.target is the address it came in on.

        A pass is final only when the caller has verified the decision's `method`.
        """
        if self.fake:
            lookup = NamelessLookup(lookup)
        for _, rule in self.client_rules.find(facts.source, facts.target):
            if (
                match_address(rule.source, facts.source, (), lookup) is None
                or match_target(rule, facts, lookup) is None
            ):
                continue
            chosen = choose_client_method(rule, lookup)
            if chosen is not None:
                method, user = chosen
                return Decision(rule.verdict, rule, method=method), Identity(method, "none", user)
        return Decision("block", FINAL_CLIENT_BLOCK, NO_RULE_MATCHED), Identity()

    def socks_decision(self, facts: Facts, lookup: Lookup) -> Decision:
        """Judge a request, reply or datagram by the socks-rules.

        A pass is final only when the caller has verified `method` ("none" needs nothing).
        """
        judged = facts
        if self.fake:
            judged, lookup = facts._replace(addresses=()), NamelessLookup(lookup)
        for _, rule in self.socks_rules.find(facts.source, facts.target):
            addresses, reason = self._match_request(rule, judged, facts, lookup)
            if addresses is None:
                continue
            method = match_identity(rule, facts, self.checks_replies, lookup)
            if method is not None:
                used = facts.addresses if self.fake else addresses
                return Decision(rule.verdict, rule, reason, used, method)
        return Decision("block", FINAL_SOCKS_BLOCK, NO_RULE_MATCHED)

    def _match_target(
        self, rule: Rule, judged: Facts, facts: Facts, lookup: Lookup
    ) -> tuple[tuple[Endpoint, ...] | None, str]:
        """match_target, and why a rule matches that could not be compared.

        A name that we do not resolve could have any address, so a rule that blocks some blocks it too:
        what is let through by name has to stand above it, by name.
        """
        addresses = match_target(rule, judged, lookup)
        if addresses is None and self.paths and is_unresolved(facts):
            assert facts.target is not None
            if could_be_meant(rule, facts.target):
                return (), f"the name is not resolved here, and could be of {rule.target.text}"
        return addresses, ""

    def _match_request(
        self, rule: Rule, judged: Facts, facts: Facts, lookup: Lookup
    ) -> tuple[tuple[Endpoint, ...] | None, str]:
        """_match_target for a rule that fits in all but who the client is."""
        if (
            facts.command not in rule.commands
            or facts.protocol not in rule.protocols
            or facts.proxyprotocol not in rule.proxyprotocols
            or match_address(rule.source, facts.source, (), lookup) is None
        ):
            return None, ""
        return self._match_target(rule, judged, facts, lookup)

    def wants_password(self, facts: Facts, lookup: Lookup) -> bool:
        """Tell whether a client that is refused, and has given no password, might pass with one."""
        judged = facts
        if self.fake:
            judged, lookup = facts._replace(addresses=()), NamelessLookup(lookup)
        for _, rule in self.socks_rules.find(facts.source, facts.target):
            by_password = any(2 in METHOD_BYTES.get(method, ()) for method in rule.socksmethods)
            if not by_password or self._match_request(rule, judged, facts, lookup)[0] is None:
                continue
            if rule.verdict == "pass":
                return True
            if not needs_user(rule):
                return False
        return False

    def _match_route(self, route: Route, facts: Facts, lookup: Lookup) -> tuple[Endpoint, ...] | None:
        """Return those addresses of the target that a route leads to, or None where it does not match."""
        if facts.command not in route.commands or facts.protocol not in route.protocols:
            return None
        if match_address(route.source, facts.source, (), lookup) is None:
            return None
        if facts.target is None:
            return ()
        return match_address(route.target, facts.target, facts.addresses, lookup)

    def routes(self, facts: Facts, lookup: Lookup) -> tuple[Path, ...]:
        """Return the paths by which a request may go, in the order in which they are to be tried.

        Call it only where there are routes: without any, everything is direct.
        """
        found = []
        if self.fake:
            # As Dante: the target's name was resolved to connect to it, those of routes are not.
            lookup = NamelessLookup(lookup)
        for path in self.paths:
            addresses = self._match_route(path.route, facts, lookup)
            if addresses is None:
                continue
            path = path._replace(addresses=addresses)
            logs_in = all(can_log_in(step, facts.identity) for step in path.steps)
            if logs_in and can_carry(path, facts.command, facts.target):
                found.append(path)
        if facts.target is not None and not facts.target.family:
            # As Dante: socks_v4, which has no names, comes last for them.
            found.sort(key=lambda path: bool(path.steps) and path.steps[-1].protocol == "socks_v4")
        return tuple(found)


def find_monitor(monitors: Sequence[Monitor], facts: Facts, lookup: Lookup) -> Monitor | None:
    """Return the first monitor that a request belongs to.

    A UDP association, whose targets nobody knows yet, belongs to one that is about every target.
    """
    for monitor in monitors:
        if facts.command not in monitor.commands or facts.protocol not in monitor.protocols:
            continue
        if match_address(monitor.source, facts.source, (), lookup) is None:
            continue
        if facts.target is None:
            found = monitor.target.kind == "any" and monitor.target.port.operator == "any"
        else:
            found = match_address(monitor.target, facts.target, facts.addresses, lookup) is not None
        if found:
            return monitor
    return None


def choose_method(methods: tuple[str, ...], offered: Iterable[int]) -> int:
    """Return the byte that answers a SOCKS 5 greeting, in the order of the client-rule's list.

    A SOCKS 4 client counts as one that offers method 0 alone: so a rule that wants a password keeps
    it out (CVE-2024-54662 in Dante 1.4.0 to 1.4.3 was that it did not).

    >>> choose_method(("username", "none"), (0, 2)), choose_method(("username",), (0,))
    (2, 255)
    """
    offers = frozenset(offered)
    for method in methods:
        for byte in METHOD_BYTES.get(method, ()):
            if byte in offers:
                return byte
    return NO_ACCEPTABLE_METHOD


class Externals(NamedTuple):
    """The outgoing addresses, in the order of the file."""

    of_family: dict[int, tuple[Endpoint, ...]]
    families: frozenset[int]  # that the rules take connections to leave by


LINK_LOCAL_BITS, LINK_LOCAL = 10, 0xFE80 >> 6  # fe80::/10 (RFC 4291 section 2.5.6)


def is_link_local(endpoint: Endpoint) -> bool:
    return endpoint.family == 6 and address_number(endpoint) >> (128 - LINK_LOCAL_BITS) == LINK_LOCAL


def group_externals(endpoints: Iterable[Endpoint], protocols: frozenset[str], has_link: bool) -> Externals:
    """Return outgoing addresses by family, without those of families that are not to be used.

    `has_link` tells that there are link-local ones besides.
    """
    found: dict[int, tuple[Endpoint, ...]] = {4: (), 6: ()}
    for endpoint in endpoints:
        if FAMILY_NAMES[endpoint.family] in protocols:
            found[endpoint.family] += (endpoint,)
    families = {family for family in found if found[family]}
    # As Dante: an address that nothing leaves by makes its family count in the rules.
    families.update({6} if has_link and "ipv6" in protocols else ())
    return Externals(found, frozenset(families))


@functools.lru_cache(maxsize=8)
def fixed_externals(externals: tuple[External, ...], protocols: frozenset[str]) -> Externals | None:
    """Return the outgoing addresses of a file that names no interface, else None.

    Each request asks for them several times, so the answer is kept.
    """
    endpoints = [external.endpoint for external in externals if external.endpoint is not None]
    return group_externals(endpoints, protocols, False) if len(endpoints) == len(externals) else None


def leave_out_links(addresses: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Return those addresses of an interface that sessions may leave by.

    As Dante: none that leads no further than the link, where there is no target, and that would only tell
    clients of it.
    """
    return tuple(address for address in addresses if not is_link_local(address))


def find_externals(config: Config, lookup: Lookup) -> Externals:
    """Return the outgoing addresses as they are now: those of an interface may change."""
    fixed = fixed_externals(config.external, config.external_protocols)
    if fixed is not None:
        return fixed
    found: list[Endpoint] = []
    has_link = False
    for external in config.external:
        if external.endpoint is not None:
            found.append(external.endpoint)
        else:
            present = lookup.interface(external.text)
            leading = leave_out_links(present)
            found += leading
            has_link = has_link or len(leading) < len(present)
    return group_externals(found, config.external_protocols, has_link)


def external_endpoints(config: Config, family: int, lookup: Lookup) -> tuple[Endpoint, ...]:
    """Return the outgoing addresses of one family, in the order of the file."""
    return find_externals(config, lookup).of_family[family]


def external_families(config: Config, lookup: Lookup) -> frozenset[int]:
    """Return the address families that the rules take connections to leave by."""
    return find_externals(config, lookup).families


def can_leave_by(config: Config, family: int, lookup: Lookup) -> bool:
    """Tell whether there is an outgoing address of a family."""
    return bool(external_endpoints(config, family, lookup))


# The commands that a client-rule's redirection is inherited by: it is about where the client goes.
INHERITS_REDIRECT = frozenset({"connect", "udpassociate"})


def find_redirect(rule: Rule, client_rule: Rule, command: str) -> Redirect:
    """Return what a rule redirects of a command, empty where nothing.

    Unlike Dante's module, as its manual describes it: only a rule that is for replies alone redirects
    replies.  One for every command would send the answers anywhere but to the client.
    """
    redirect = rule.redirect
    if redirect is None and command in INHERITS_REDIRECT:
        redirect = client_rule.redirect
    if redirect is None or (command in REPLY_COMMANDS) != (
        bool(rule.commands) and rule.commands <= REPLY_COMMANDS
    ):
        return Redirect()
    return redirect


def redirected_endpoint(pattern: RuleAddress, port: int) -> Endpoint:
    """Return the one address that a redirection names; family 0 for a name.

    `port` is what stays where the configuration names none.
    """
    family = {"ipv4": 4, "ipv6": 6}.get(pattern.kind, 0)
    port = pattern.port.low if pattern.port.operator == "eq" else port
    return Endpoint(pattern.text.partition("/")[0], port, family)


def redirect_reply(rule: Rule, sender: Endpoint, client: Endpoint) -> tuple[Endpoint, Endpoint]:
    """Return what the client is told of a datagram's sender, and where the datagram goes."""
    redirect = find_redirect(rule, rule, "udpreply")
    told = redirected_endpoint(redirect.source, sender.port) if redirect.source else sender
    return told, redirected_endpoint(redirect.target, client.port) if redirect.target else client


def redirected_sources(
    pattern: RuleAddress, config: Config, family: int, lookup: Lookup
) -> tuple[Endpoint, ...]:
    """Return the addresses of one family that `redirect from` lets sessions leave by.

    A single address or an interface need not be `external`; a network stands for those that are.
    """
    if pattern.kind == "interface":
        found = leave_out_links(lookup.interface(pattern.text))
    elif pattern.kind == "host":
        found = lookup.addresses(pattern.text)
    elif pattern.kind in BITS and pattern.prefix == BITS[pattern.kind]:
        found = (redirected_endpoint(pattern, 0),)
    else:
        externals = external_endpoints(config, family, lookup)
        return externals if pattern.kind == "any" else match_network(pattern, externals)
    return tuple(e._replace(port=0) for e in found if e.family == family)


PASSWORD_METHODS = frozenset({"username", "pam.username", "bsdauth"})


def name_service(route: Route, upstream: Endpoint) -> UpstreamService:
    """Return what an upstream of a route is to GSS-API."""
    name = route.gssapi.servicename
    # As Dante: with a slash it is a principal, else a service on the upstream's host.
    return UpstreamService(name if "/" in name else f"{name}@{upstream.host}", route.gssapi.keytab)


def list_services(config: Config) -> frozenset[UpstreamService]:
    """Return all the upstreams that we log in to by GSS-API."""
    return frozenset(
        name_service(route, upstream)
        for route in config.routes
        for hop in route.hops
        for upstream in hop.upstreams
        if "gssapi" in hop.methods
    )


def needs_gssapi(config: Config) -> bool:
    accepts = any("gssapi" in rule.socksmethods for rule in config.client_rules)
    return accepts or bool(list_services(config))


def rule_methods(rule: Rule) -> tuple[str, ...]:
    """Return every method that a rule may use."""
    return (*rule.clientmethods, *rule.socksmethods)


def only_password_method(config: Config) -> str:
    """Return the one method by which any password would be checked, or "" if that depends on the rule.

    As Dante: only then is a wrong password answered at once; otherwise every password is let
    in, and judged when the request has found its rule.
    """
    methods = PASSWORD_METHODS.intersection(config.socksmethods)
    if len(methods) != 1:
        return ""
    (method,) = methods
    services = {r.pam_servicename for r in config.socks_rules if method in r.socksmethods}
    return "" if method == "pam.username" and len(services) > 1 else method


def libwrap_rules(config: Config) -> tuple[Rule, ...]:
    """Return the rules with a line for libwrap."""
    return tuple(rule for rule in (*config.client_rules, *config.socks_rules) if rule.libwrap is not None)


def needs_libwrap(config: Config) -> bool:
    return config.libwrap_hosts_access or bool(libwrap_rules(config))


# ============================== 6. Wire ==============================
# Bytes to messages and back: RFC 1928, RFC 1929, SOCKS 4 and 4A, and how bytes and names are
# spelled in a log line.  A decoder returns the message and how many bytes it took, or None when
# it needs more; it raises ProtocolError at the first byte that cannot be right.  A reply in
# that error means that the sender is owed a refusal in the form of the message it sent: that
# REP of SOCKS 5, code 91 of SOCKS 4, a failed status of RFC 1929.  None: close in silence.

Octets = bytes | bytearray | memoryview

# Names of hosts and users are bytes of no known encoding.  Latin-1 maps each byte to one
# character and back, so a refusal can echo any name and lengths count what is on the wire.
WIRE_TEXT = "latin-1"

COMMAND4_OF_BYTE = {1: "connect", 2: "bind"}  # SOCKS 4, CD
BYTE_OF_COMMAND = {command: byte for byte, command in COMMAND_OF_BYTE.items()}
REPLY_OF_BYTE = {int(reply): reply for reply in Reply}
REPLY4_BYTES = frozenset(int(reply) for reply in Reply4)
USERID_MAX = 1024  # bytes; SOCKS 4 sets no limit, Dante takes 1000
NAME_MAX = 255  # bytes; the length field of RFC 1928 section 5
LABEL_MAX = 63  # bytes; RFC 1035 section 2.3.4

IPV4_FIELDS = struct.Struct("!B4sH")  # ATYP | ADDR | PORT
IPV6_FIELDS = struct.Struct("!B16sH")
FIELDS4 = struct.Struct("!BBH4s")  # VN | CD | DSTPORT | DSTIP, of a SOCKS 4 request and reply
NAME_MARK = b"\0\0\0\1"  # a DSTIP of 0.0.0.x, x != 0: SOCKS 4A's sign that a name follows
MAPPED_PREFIX = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, RFC 4291 section 2.5.5.2

BYTE_ESCAPES = {byte: f"\\{byte:03o}" for byte in range(1, 256) if not 0x20 <= byte < 0x7F}
BYTE_ESCAPES |= {
    0x07: "\\a", 0x08: "\\b", 0x09: "\\t", 0x0A: "\\n", 0x0B: "\\v", 0x0C: "\\f", 0x0D: "\\r",
    0x5C: "\\\\",
}  # fmt: skip
PLAIN_BYTES = bytes(byte for byte in range(256) if byte not in BYTE_ESCAPES)
TEXT_OF_BYTE = [BYTE_ESCAPES.get(byte, chr(byte)) for byte in range(256)]
# In a record, names stand as METHOD%USER@ADDRESS between blanks, or between quotes.
TEXT_ESCAPES = BYTE_ESCAPES | {byte: f"\\{byte:03o}" for byte in b'\0 "%@'}
NUL_BEFORE_DIGIT = re.compile("\0(?=[0-7])")
BLANK_OR_CONTROL = re.compile("[\0-\x20\x7f]")


def escape_bytes(data: Octets) -> str:
    r"""Spell payload for a log line, as Dante does: C escapes, and octal for the rest.

    >>> print(escape_bytes(b"hi\tthere\r\n\xff\\"))
    hi\tthere\r\n\377\\
    """
    if bytes(data).translate(None, PLAIN_BYTES):
        text = "".join(map(TEXT_OF_BYTE.__getitem__, data))  # half the time that str.translate takes
    else:
        text = str(data, WIRE_TEXT)
    # As Dante: NUL is \0 unless that would swallow a digit of the payload.
    return NUL_BEFORE_DIGIT.sub(r"\\000", text).replace("\0", "\\0") if "\0" in text else text


def escape_text(text: str) -> str:
    r"""Spell a user's or host's name so that it cannot break, end or forge a log line.

    >>> print(escape_text("eve@x y\n"))
    eve\100x\040y\n
    """
    # Unlike Dante: its records carry such names raw.  Characters above 255, which never come
    # from the wire, become \uXXXX.
    return text.translate(TEXT_ESCAPES).encode("ascii", "backslashreplace").decode("ascii")


def find_name_fault(name: str) -> str:
    """Say why no resolver should be asked for a host name; "" when one may be."""
    if not name:
        return "the name is empty"
    if len(name) > NAME_MAX:
        return f"the name is longer than {NAME_MAX} bytes"
    if BLANK_OR_CONTROL.search(name):
        return "blanks and control characters are not allowed in a name"
    labels = name.removesuffix(".").split(".")
    if "" in labels:
        return "a label of the name is empty"
    if max(map(len, labels)) > LABEL_MAX:
        return f"a label of the name is longer than {LABEL_MAX} bytes"
    return ""


def check_host_name(name: str) -> None:
    """Raise Refused for a host name that no resolver should be asked for."""
    # Unlike Dante: it cuts a name at a NUL, so what its rules and logs see is not what was sent.
    fault = find_name_fault(name)
    if fault:
        text = f'could not resolve hostname "{escape_text(name)}": {fault}'
        raise Refused(text, Reply.HOST_UNREACHABLE)


def decode_ipv4(data: Octets) -> tuple[Endpoint, int] | None:
    """Decode an address whose ATYP, the fourth byte, says IPv4."""
    if len(data) < 10:
        return None
    _, address, port = IPV4_FIELDS.unpack_from(data, 3)
    return Endpoint(socket.inet_ntoa(address), port, 4), 10


def decode_ipv6(data: Octets) -> tuple[Endpoint, int] | None:
    """Decode an address whose ATYP, the fourth byte, says IPv6."""
    if len(data) < 22:
        return None
    _, address, port = IPV6_FIELDS.unpack_from(data, 3)
    # As Dante: an IPv4-mapped address is the IPv4 address.  Rules on the one would otherwise
    # not see the other.
    if address.startswith(MAPPED_PREFIX):
        return Endpoint(socket.inet_ntoa(address[12:]), port, 4), 22
    return Endpoint(socket.inet_ntop(socket.AF_INET6, address), port, 6), 22


def decode_name(data: Octets) -> tuple[Endpoint, int] | None:
    """Decode an address whose ATYP, the fourth byte, says name; any bytes, even none, are one."""
    if len(data) < 5:
        return None
    end = 5 + data[4]
    if len(data) < end + 2:
        return None
    return Endpoint(str(data[5:end], WIRE_TEXT), data[end] << 8 | data[end + 1], 0), end + 2


ADDRESS_DECODERS = {ATYP_IPV4: decode_ipv4, ATYP_NAME: decode_name, ATYP_IPV6: decode_ipv6}


def decode_address(data: Octets, owed: Reply | None = None) -> tuple[Endpoint, int] | None:
    """Decode the address after the first three bytes of a request, reply or UDP header.

    The int counts these three as well.  Raise ProtocolError, with `owed`, for an unknown ATYP.
    """
    if len(data) < 4:
        return None
    decoder = ADDRESS_DECODERS.get(data[3])
    if decoder is None:
        raise ProtocolError(f"unknown socks_v5 address type: {data[3]}", owed)
    return decoder(data)


def encode_address(endpoint: Endpoint) -> bytes:
    """Encode ATYP, ADDR and PORT (RFC 1928 section 5); the scope of an address is left out."""
    host, port, family = endpoint
    if family == 4:
        return IPV4_FIELDS.pack(ATYP_IPV4, socket.inet_aton(host), port)
    if family == 6:
        address = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        return IPV6_FIELDS.pack(ATYP_IPV6, address, port)
    name = host.encode(WIRE_TEXT)
    return bytes((ATYP_NAME, len(name))) + name + port.to_bytes(2, "big")


# VER | NMETHODS | METHODS   (RFC 1928 section 3)


def decode_greeting(data: Octets) -> tuple[tuple[int, ...], int] | None:
    r"""Decode the method bytes that a client offers, in its order.

    >>> decode_greeting(b"\x05\x02\x00\x02+")
    ((0, 2), 4)
    """
    if not data:
        return None
    if data[0] != SOCKS5:
        raise ProtocolError(f"unknown SOCKS version {data[0]} in client request")
    if len(data) < 2 or len(data) < 2 + data[1]:
        return None
    used = 2 + data[1]
    return tuple(data[2:used]), used


def encode_greeting(methods: Iterable[int]) -> bytes:
    """Encode the offer of these method bytes."""
    offered = bytes(methods)
    return bytes((SOCKS5, len(offered))) + offered


# VER | METHOD   (RFC 1928 section 3)


def decode_method(data: Octets) -> tuple[int, int] | None:
    """Decode the method byte that the next hop has selected."""
    if not data:
        return None
    if data[0] != SOCKS5:
        raise ProtocolError(f"unknown SOCKS version {data[0]} in method selection")
    return (data[1], 2) if len(data) > 1 else None


def encode_method(method: int) -> bytes:
    """Encode the selection of a method byte, or of NO_ACCEPTABLE_METHOD."""
    return bytes((SOCKS5, method))


# VER | ULEN | UNAME | PLEN | PASSWD   (RFC 1929 section 2)


def decode_password(data: Octets) -> tuple[tuple[str, bytes], int] | None:
    """Decode user name and password; either may be empty."""
    if not data:
        return None
    if data[0] != PASSWORD_VERSION:
        # The text is the one that Dante logs.
        text = "recv_unamever(): unknown socks_v5 version on username packet from client"
        raise ProtocolError(f"{text}: {data[0]}")
    if len(data) < 2 or len(data) < 3 + data[1]:
        return None
    user_end = 2 + data[1]
    end = user_end + 1 + data[user_end]
    if len(data) < end:
        return None
    user, password = bytes(data[2:user_end]), bytes(data[user_end + 1 : end])
    # Unlike Dante: what PAM and crypt(3) would read as the end of the text is refused here.
    if 0 in user or 0 in password:
        raise ProtocolError("NUL in username packet from client", Reply.NOT_ALLOWED)
    return (user.decode(WIRE_TEXT), password), end


def encode_password(user: str, password: bytes) -> bytes:
    """Encode user name and password, of at most 255 bytes each."""
    name = user.encode(WIRE_TEXT)
    head = bytes((PASSWORD_VERSION, len(name))) + name
    return head + bytes((len(password),)) + password


# VER | STATUS   (RFC 1929 section 2)


def decode_password_status(data: Octets) -> tuple[bool, int] | None:
    """Decode whether the next hop has accepted the password."""
    if not data:
        return None
    if data[0] != PASSWORD_VERSION:
        raise ProtocolError(f"unknown version {data[0]} in username reply")
    return (data[1] == 0, 2) if len(data) > 1 else None


def encode_password_status(ok: bool) -> bytes:
    """Encode whether the password was right."""
    return bytes((PASSWORD_VERSION, 0 if ok else 1))


# VER | MTYP | LEN | TOKEN   (RFC 1961 sections 3.4, 4.3 and 5)

GSSAPI_VERSION = 1
GSSAPI_TOKEN, GSSAPI_LEVEL, GSSAPI_DATA = 1, 2, 3  # MTYP
GSSAPI_ABORT = b"\x01\xff"  # RFC 1961 section 3.8: this message has no more
GSSAPI_HEAD = struct.Struct("!BBH")
GSSAPI_MAX = 65535  # bytes in a token


def decode_gssapi(data: Octets, kind: int, sender: str = "client") -> tuple[bytes, int] | None:
    """Decode the token of a message of RFC 1961 that has to be of this MTYP."""
    if data and data[0] != GSSAPI_VERSION:
        raise ProtocolError(f"unknown version on gssapi packet from {sender}: {data[0]}")
    if len(data) > 1 and data[1] == GSSAPI_ABORT[1]:
        raise ProtocolError(f"{sender} has aborted the gssapi exchange")
    if len(data) > 1 and data[1] != kind:
        raise ProtocolError(f"unexpected type on gssapi packet from {sender}: {data[1]}, not {kind}")
    if len(data) < GSSAPI_HEAD.size:
        return None
    end = GSSAPI_HEAD.size + (data[2] << 8 | data[3])
    return (bytes(data[GSSAPI_HEAD.size : end]), end) if len(data) >= end else None


def decode_gssapi_token(data: Octets) -> tuple[bytes, int] | None:
    return decode_gssapi(data, GSSAPI_TOKEN)


def decode_gssapi_level(data: Octets) -> tuple[bytes, int] | None:
    return decode_gssapi(data, GSSAPI_LEVEL)


def name_protection(level: bytes) -> str:
    """Return the word for the level that a token of RFC 1961 section 4.2 holds; "unknown" for any other."""
    return PROTECTIONS[level[0]] if len(level) == 1 and level[0] < len(PROTECTIONS) else "unknown"


def decode_upstream_token(data: Octets) -> tuple[bytes, int] | None:
    return decode_gssapi(data, GSSAPI_TOKEN, "proxy server")


def decode_upstream_level(data: Octets) -> tuple[bytes, int] | None:
    return decode_gssapi(data, GSSAPI_LEVEL, "proxy server")


def encode_gssapi(kind: int, token: bytes) -> bytes:
    """Encode a message of RFC 1961, with a token of at most GSSAPI_MAX bytes."""
    return GSSAPI_HEAD.pack(GSSAPI_VERSION, kind, len(token)) + token


# VN | CD | DSTPORT | DSTIP | USERID | NULL   (SOCKS 4)
# and behind it DOMAIN | NULL when DSTIP is 0.0.0.x with x != 0   (SOCKS 4A)


def decode_string(data: Octets, start: int, limit: int, what: str) -> tuple[str, int] | None:
    """Decode the text up to a NUL, of at most `limit` bytes; the int is where the next begins."""
    piece = bytes(data[start : start + limit + 1])
    length = piece.find(0)
    if length >= 0:
        return piece[:length].decode(WIRE_TEXT), start + length + 1
    if len(piece) > limit:
        text = f"{what} of more than {limit} bytes in socks_v4 request"
        raise ProtocolError(text, Reply.FAILURE)
    return None


def check_start4(data: Octets) -> None:
    """Raise ProtocolError for a VN or CD that no SOCKS 4 request has, as soon as it is there."""
    if data and data[0] != SOCKS4:
        raise ProtocolError(f"unknown SOCKS version {data[0]} in client request")
    if len(data) > 1 and data[1] not in COMMAND4_OF_BYTE:
        # Unlike Dante: the client gets its rejection, and command 3 is like any other.
        text = f"unknown socks_v4 command: {data[1]}"
        raise ProtocolError(text, Reply.COMMAND_NOT_SUPPORTED)


def is_name_mark(address: bytes) -> bool:
    """Tell whether a DSTIP announces a name (SOCKS 4A)."""
    return address[:3] == NAME_MARK[:3] and address[3] != 0


def decode_request4(data: Octets) -> tuple[Request, int] | None:
    """Decode a request of SOCKS 4 or 4A."""
    check_start4(data)
    if len(data) < FIELDS4.size:
        return None
    _, command, port, address = FIELDS4.unpack_from(data)
    found = decode_string(data, FIELDS4.size, USERID_MAX, "user id")
    if found is None:
        return None
    user, used = found
    target = Endpoint(socket.inet_ntoa(address), port, 4)
    # Unlike Dante: it takes 0.0.0.x for the address itself, and the name for payload.
    if is_name_mark(address):
        found = decode_string(data, used, NAME_MAX, "host name")
        if found is None:
            return None
        name, used = found
        target = Endpoint(name, port, 0)
    return Request(SOCKS4, COMMAND4_OF_BYTE[command], target, user), used


def encode_request4(request: Request) -> bytes:
    """Encode a request of SOCKS 4, or of 4A for a name; raise Refused if they cannot carry it."""
    host, port, family = request.target
    address = socket.inet_aton(host) if family == 4 else NAME_MARK
    texts = (request.user, host) if family == 0 else (request.user,)
    # The address 0.0.0.x would announce a name that does not follow, and a NUL would make the
    # rest of a user's text the name, and the rest of a name payload.
    if is_name_mark(address) != (family == 0) or "\0" in "".join(texts):
        text = f"socks_v4 cannot carry a request for {escape_text(str(request.target))}"
        raise Refused(text, Reply.ADDRESS_TYPE_NOT_SUPPORTED)
    head = FIELDS4.pack(SOCKS4, BYTE_OF_COMMAND[request.command], port, address)
    return head + b"".join(text.encode(WIRE_TEXT) + b"\0" for text in texts)


# VN | CD | DSTPORT | DSTIP   (SOCKS 4)


def decode_reply4(data: Octets) -> tuple[tuple[bool, Endpoint], int] | None:
    """Decode whether the next hop has granted a request of SOCKS 4, and its address."""
    if data and data[0] != SOCKS4_REPLY_VERSION:
        raise ProtocolError(f"unknown version {data[0]} in socks_v4 reply")
    if len(data) > 1 and data[1] not in REPLY4_BYTES:
        raise ProtocolError(f"unknown socks_v4 reply: {data[1]}")
    if len(data) < FIELDS4.size:
        return None
    _, code, port, address = FIELDS4.unpack_from(data)
    granted = code == Reply4.GRANTED
    return (granted, Endpoint(socket.inet_ntoa(address), port, 4)), FIELDS4.size


def encode_reply4(granted: bool, bound: Endpoint) -> bytes:
    """Encode the answer to a request of SOCKS 4; what is not IPv4 becomes 0.0.0.0."""
    # As Dante: every failure is 91, also where 92 and 93 would say more.
    code = Reply4.GRANTED if granted else Reply4.REJECTED
    host = bound.host if bound.family == 4 else UNSPECIFIED.host
    return FIELDS4.pack(SOCKS4_REPLY_VERSION, code, bound.port, socket.inet_aton(host))


# VER | CMD | RSV | ATYP | DST.ADDR | DST.PORT   (RFC 1928 section 4)


def decode_request(data: Octets) -> tuple[Request, int] | None:
    r"""Decode a request; its first byte decides between SOCKS 5 and 4.

    >>> decode_request(b"\5\1\0\3\1x\0P")[0].target
    Endpoint(host='x', port=80, family=0)
    """
    if not data:
        return None
    if data[0] == SOCKS4:
        # As Dante: also where the greeting was SOCKS 5.
        return decode_request4(data)
    if data[0] != SOCKS5:
        raise ProtocolError("local client protocol error")
    command = COMMAND_OF_BYTE.get(data[1]) if len(data) > 1 else ""
    if command is None:
        # Unlike Dante, which hangs up: RFC 1928 has a reply for it.
        text = f"unknown socks_v5 command: {data[1]}"
        raise ProtocolError(text, Reply.COMMAND_NOT_SUPPORTED)
    # Unlike Dante, which hangs up here too and logs the command byte.
    found = decode_address(data, Reply.ADDRESS_TYPE_NOT_SUPPORTED)
    if found is None:
        return None
    # As Dante: RSV may be anything.
    return Request(SOCKS5, command, found[0], "", data[2]), found[1]


def encode_request(request: Request) -> bytes:
    """Encode a request in the form of its version, SOCKS 5 or 4."""
    if request.version == SOCKS4:
        return encode_request4(request)
    head = bytes((SOCKS5, BYTE_OF_COMMAND[request.command], request.flags))
    return head + encode_address(request.target)


# VER | REP | RSV | ATYP | BND.ADDR | BND.PORT   (RFC 1928 section 6)


def decode_reply(data: Octets) -> tuple[tuple[Reply, Endpoint], int] | None:
    """Decode the next hop's reply and address; an unassigned REP is Reply.FAILURE."""
    if data and data[0] != SOCKS5:
        raise ProtocolError(f"unknown SOCKS version {data[0]} in socks_v5 reply")
    found = decode_address(data)
    if found is None:
        return None
    code = data[1]
    return (REPLY_OF_BYTE.get(code, Reply.FAILURE), found[0]), found[1]


def encode_reply(reply: Reply, bound: Endpoint, reserved: int = 0) -> bytes:
    """Encode a reply of SOCKS 5; refusals echo the target, also a name."""
    return bytes((SOCKS5, reply, reserved)) + encode_address(bound)


def encode_reply_for(version: int, reply: Reply, bound: Endpoint, reserved: int = 0) -> bytes:
    """Encode a reply in the form of the request's version, SOCKS 5 or 4."""
    if version == SOCKS4:
        return encode_reply4(reply == Reply.SUCCEEDED, bound)
    return encode_reply(reply, bound, reserved)


# RSV | FRAG | ATYP | DST.ADDR | DST.PORT | DATA   (RFC 1928 section 7)


def decode_udp(datagram: Octets) -> tuple[Endpoint, int]:
    """Decode a datagram's header to its target (from a next hop: source) and length in bytes.

    Raise ProtocolError, never with a reply, for a datagram that is to be dropped.
    """
    # As Dante: RSV may be anything.
    if len(datagram) > 2 and datagram[2] != 0:
        raise ProtocolError("fragmented socks udp packets are not supported")
    decoder = ADDRESS_DECODERS.get(datagram[3]) if len(datagram) > 3 else None
    found = decoder(datagram) if decoder else None
    if found is not None:
        return found
    raise ProtocolError(
        f"SOCKS protocol error in socks udp packet of length {len(datagram)}.  "
        "Could not extract valid address from SOCKS UDP header"
    )


def encode_udp_header(source: Endpoint) -> bytes:
    """Encode the header of a datagram that came from `source`, or to a next hop goes there."""
    return b"\0\0\0" + encode_address(source)


# CONNECT HOST:PORT HTTP/1.0   (RFC 9110 section 9.3.6; to an upstream)

HTTP_HEAD_MAX = 16384  # bytes of an answer up to its blank line
HTTP_HOST = re.compile(r"[A-Za-z0-9._-]+")
HTTP_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?:[ \t][^\r\n]*)?\r?\n")
HTTP_END = re.compile(rb"\r?\n\r?\n")


class HttpAnswer(NamedTuple):
    """What an upstream says to CONNECT: its status, and the line with it for the log."""

    status: int
    line: str


def encode_http_connect(target: Endpoint, credentials: Credentials | None) -> bytes:
    """Encode a request for a tunnel; Refused for a name that could end or forge a header."""
    host = f"[{target.host.partition('%')[0]}]" if target.family == 6 else target.host
    if not target.family and not HTTP_HOST.fullmatch(host):
        text = f"http cannot carry a request for {escape_text(str(target))}"
        raise Refused(text, Reply.ADDRESS_TYPE_NOT_SUPPORTED)
    lines = [f"CONNECT {host}:{target.port} HTTP/1.0", f"Host: {host}:{target.port}"]
    if credentials is not None:
        pair = credentials.user.encode(WIRE_TEXT) + b":" + credentials.password
        encoded = binascii.b2a_base64(pair, newline=False).decode("ascii")
        lines.append(f"Proxy-Authorization: Basic {encoded}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def decode_http_answer(data: Octets) -> tuple[HttpAnswer, int] | None:
    r"""Decode an upstream's answer up to its blank line; what follows belongs to the tunnel.

    >>> decode_http_answer(b"HTTP/1.0 200 OK\r\n\r\nhello")
    (HttpAnswer(status=200, line='HTTP/1.0 200 OK'), 19)
    """
    head = bytes(data[:HTTP_HEAD_MAX])
    start = b"HTTP/1."
    if not head.startswith(start[: len(head)]):
        raise ProtocolError("the answer is not one of HTTP/1")
    end = HTTP_END.search(head)
    if end is None:
        if len(head) == HTTP_HEAD_MAX:
            raise ProtocolError(f"the head of the answer is longer than {HTTP_HEAD_MAX} bytes")
        return None
    found = HTTP_STATUS.match(head)
    if found is None:
        raise ProtocolError("the answer has no status")
    return HttpAnswer(int(found[1]), escape_bytes(found[0].rstrip())[:NAME_MAX]), end.end()


# ---- HTTP between a client and a target (RFC 9110, RFC 9112)
# A message is taken apart and put together anew, never passed on as it came.  So target and client read what
# was understood here, and two readers of one message cannot disagree about where it ends (request smuggling).
# What RFC 9112 leaves to a recipient's leniency is refused.

HTTP_HEAD_BYTES = 65536  # as Squid; the largest that browsers meet, with cookies, are half of it
HTTP_CHUNK_LINE_BYTES = 1024  # a chunk's size and its extensions, or a line of the trailer
HTTP_DEFAULT_PORT = 80
CHUNKED, UNTIL_END = -1, -2  # in the place of a body's length
HTTP_FIRST_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")  # of a method
HTTP_NAME = "sockd"  # in Via and in error pages: the kind of this proxy, not which one it is

TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
TEXT = r"[^\x00-\x08\x0a-\x1f\x7f]*"  # no control character but the tab: no CR, LF or NUL above all
REQUEST_LINE = re.compile(rf"({TOKEN}) ([^\x00-\x20\x7f]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(rf"HTTP/1\.([0-9]) ([1-5][0-9]{{2}})(?: ({TEXT}))?")
FIELD_LINE = re.compile(rf"({TOKEN}):({TEXT})")
CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,15}})(?:[ \t]*;{TEXT})?")
LENGTH_VALUE = re.compile("[0-9]{1,18}")
BARE_LF = re.compile(rb"(?<!\r)\n")
HTTP_URI = re.compile(r"http://([^/?#]+)(/[^#]*|\?[^#]*)?", re.IGNORECASE)
OTHER_URI = re.compile("(?!http:)[A-Z][A-Z0-9+.-]*://", re.IGNORECASE)
# No userinfo (RFC 9110 section 4.2.4 calls it a trap), no zone, nothing percent-encoded.
AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([1-9][0-9]{0,4}))?")
BASIC_LOGIN = re.compile("(?i:basic) +([A-Za-z0-9+/]+={0,2})")

# What is between two neighbours only (RFC 9110 section 7.6.1), and what is made anew: Host and the length.
# HTTP2-Settings goes with Upgrade, and a trailer is never passed on (RFC 9110 section 6.5.1).
HOP_BY_HOP = frozenset({
    "connection", "content-length", "http2-settings", "keep-alive", "proxy-authenticate",
    "proxy-authentication-info", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
})  # fmt: skip

HTTP_REASONS = {
    400: "Bad Request",
    403: "Forbidden",
    407: "Proxy Authentication Required",
    408: "Request Timeout",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    502: "Bad Gateway",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}
# What a person is told, who knows nothing of this proxy.  No word of it comes from the request.
HTTP_PAGES = {
    400: "The proxy could not understand the request.",
    403: "The rules of this proxy do not allow the request.",
    407: "This proxy asks for a user name and a password.",
    408: "The request did not arrive in time.",
    417: "The proxy cannot do what the request expects.",
    431: "The head of the request is too large.",
    501: "This proxy cannot do what was asked for.",
    502: "The proxy could not reach the server, or could not understand its answer.",
    504: "The server did not answer in time.",
    505: "This proxy speaks HTTP/1.1.",
}
HTTP_STATUS_OF_REPLY = {
    Reply.NOT_ALLOWED: 403,
    Reply.TTL_EXPIRED: 504,
    Reply.COMMAND_NOT_SUPPORTED: 501,
}  # all others: 502

HttpFields = tuple[tuple[str, str], ...]


class HttpRequest(NamedTuple):
    """A request as it was understood; the fields are those to be passed on."""

    method: str
    target: Endpoint
    path: str  # with the query; "" for CONNECT
    minor: int  # of the client's version: 0 for HTTP/1.0
    fields: HttpFields
    length: int | None  # of the body, in bytes or CHUNKED; None: nothing was said, so there is none
    persists: bool  # the client means to send another request
    login: tuple[str, bytes] | None


class HttpResponse(NamedTuple):
    """A response as it was understood; the fields are those to be passed on."""

    status: int
    reason: str
    minor: int
    fields: HttpFields
    length: int  # of the body, in bytes, CHUNKED or UNTIL_END
    announced: int | None  # the Content-Length to be passed on; that of a HEAD has no body


def find_head_end(data: bytearray, start: int) -> int:
    """Return the length of the head of a message with its empty line, or 0 while more is needed.

    `start` bytes have been looked at before.
    """
    end = data.find(b"\r\n\r\n", max(0, start - 3)) + 4
    length = end if end > 3 else len(data)
    if BARE_LF.search(data, max(0, start - 1), length):
        raise HttpError("http: a line does not end with CR LF")
    if length > HTTP_HEAD_BYTES:
        raise HttpError(f"http: head of more than {HTTP_HEAD_BYTES} bytes", 431)
    return end if end > 3 else 0


def split_head(head: bytes) -> tuple[str, HttpFields]:
    """Split a head into its first line and its fields."""
    first, *lines = str(head, WIRE_TEXT).removesuffix("\r\n\r\n").split("\r\n")
    fields = []
    for number, line in enumerate(lines, 2):
        found = FIELD_LINE.fullmatch(line)
        if found is None:
            # The line itself is not logged: it may hold a password.
            raise HttpError(f"http: line {number} of the head is no field")
        fields.append((found[1], found[2].strip(" \t")))
    return first, tuple(fields)


def find_values(fields: HttpFields, name: str) -> list[str]:
    """Return the value of each field of a name, which is given in lower case."""
    return [value for field, value in fields if field.lower() == name]


def find_options(fields: HttpFields) -> frozenset[str]:
    """Return the options of all Connection fields, in lower case."""
    values = ",".join(find_values(fields, "connection"))
    return frozenset(option.strip(" \t").lower() for option in values.split(","))


def strip_fields(fields: HttpFields, *more: str) -> HttpFields:
    """Return the fields that go beyond the next neighbour."""
    dropped = HOP_BY_HOP.union(find_options(fields), more)
    return tuple(field for field in fields if field[0].lower() not in dropped)


def find_length(fields: HttpFields, minor: int) -> int | None:
    """Return the length of a body, in bytes or CHUNKED; None where no field says it.

    Whatever could be read in two ways is wrong (RFC 9112 section 6.3).
    """
    codings, lengths = find_values(fields, "transfer-encoding"), find_values(fields, "content-length")
    if codings and (lengths or minor == 0):
        raise HttpError("http: Transfer-Encoding beside Content-Length or in HTTP/1.0")
    if codings:
        if [coding.lower() for coding in codings] != ["chunked"]:
            raise HttpError("http: a transfer coding other than chunked", 501)
        return CHUNKED
    if not lengths:
        return None
    if len(lengths) > 1 or not LENGTH_VALUE.fullmatch(lengths[0]):
        raise HttpError("http: wrong Content-Length")
    return int(lengths[0])


def decode_authority(text: str, default_port: int) -> Endpoint:
    """Decode HOST:PORT; a default of 0 means that the port must be there.

    >>> decode_authority("[::ffff:192.0.2.1]:80", 0), decode_authority("www.example", 80).port
    (Endpoint(host='192.0.2.1', port=80, family=4), 80)
    """
    found = AUTHORITY.fullmatch(text)
    port = int((found and found[3]) or default_port)
    if found is None or not 0 < port < 65536:
        raise HttpError("http: no host and port that can be connected to")
    six, name = found[1], found[2]
    literal = find_literal(six or name)
    if literal is None and six is None:
        return Endpoint(name, port, 0)
    if literal is None or literal.family != (6 if six else 4):
        raise HttpError("http: wrong IPv6 address")
    if literal.host.startswith("::ffff:") and "." in literal.host:
        # An IPv4-mapped address is the IPv4 address, as in decode_ipv6.
        return Endpoint(literal.host.removeprefix("::ffff:"), port, 4)
    return literal._replace(port=port)


def encode_authority(target: Endpoint) -> str:
    """Spell a target as Host wants it."""
    host = f"[{target.host}]" if target.family == 6 else target.host
    return host if target.port == HTTP_DEFAULT_PORT else f"{host}:{target.port}"


def decode_uri(method: str, uri: str) -> tuple[Endpoint, str]:
    """Decode what a request asks for to the target and the path for it."""
    if method == "CONNECT":
        return decode_authority(uri, 0), ""
    found = HTTP_URI.fullmatch(uri)
    if found is None:
        raise HttpError("http: no URI of the form http://host/", 501 if OTHER_URI.match(uri) else 400)
    path = found[2] or ("*" if method == "OPTIONS" else "/")  # RFC 9112 section 3.2.4
    return decode_authority(found[1], HTTP_DEFAULT_PORT), path if path[0] != "?" else "/" + path


def decode_login(fields: HttpFields) -> tuple[str, bytes] | None:
    """Decode the user and password of the Basic scheme (RFC 7617); None where there are none."""
    values = find_values(fields, "proxy-authorization")
    if len(values) > 1:
        raise HttpError("http: two fields Proxy-Authorization")
    found = BASIC_LOGIN.fullmatch(values[0]) if values else None
    if found is None:
        return None
    try:
        user, colon, password = binascii.a2b_base64(found[1]).partition(b":")
    except binascii.Error:
        return None
    if not colon:
        return None
    # The bounds are those of RFC 1929, so that a next hop that speaks SOCKS can be told the same.
    if b"\0" in user + password or max(len(user), len(password)) > 255:
        raise HttpError("http: NUL or more than 255 bytes in user or password")
    return user.decode(WIRE_TEXT), password


def count_forwards(method: str, fields: HttpFields) -> HttpFields:
    """Return the fields of OPTIONS and TRACE with one forward less (RFC 9110 section 7.6.2)."""
    limits = find_values(fields, "max-forwards") if method in ("OPTIONS", "TRACE") else []
    if not limits:
        return fields
    if len(limits) > 1 or not LENGTH_VALUE.fullmatch(limits[0]):
        raise HttpError("http: wrong Max-Forwards")
    if int(limits[0]) == 0:
        raise HttpError("http: a request that asks the proxy itself", 501)
    others = tuple(field for field in fields if field[0].lower() != "max-forwards")
    return (*others, ("Max-Forwards", str(int(limits[0]) - 1)))


def check_expectation(fields: HttpFields) -> None:
    for value in find_values(fields, "expect"):
        if value.lower() != "100-continue":
            raise HttpError("http: an expectation other than 100-continue", 417)


def decode_http_request(head: bytes) -> HttpRequest:
    r"""Decode the head of a client's request.

    >>> decode_http_request(b"GET http://a.example/b HTTP/1.1\r\nHost: a.example\r\n\r\n").path
    '/b'
    """
    line, fields = split_head(head)
    found = REQUEST_LINE.fullmatch(line)
    if found is None:
        raise HttpError("http: wrong request line")
    method, uri, major, minor = found[1], found[2], int(found[3]), int(found[4])
    if major != 1:
        raise HttpError(f"http: version {major}.{minor}", 505)
    target, path = decode_uri(method, uri)
    hosts, length = len(find_values(fields, "host")), find_length(fields, minor)
    if hosts > 1 or (hosts == 0 and minor > 0 and method != "CONNECT"):
        raise HttpError(f"http: {hosts} fields Host")
    if method == "CONNECT" and length:
        raise HttpError("http: CONNECT with a body")
    check_expectation(fields)
    # HTTP/1.0 knows neither: what such a client says of them comes from a proxy that does not understand it.
    dropped = ("host",) if minor else ("host", "expect")
    return HttpRequest(
        method,
        target,
        path,
        minor,
        # Whatever Host says, the URI is what was judged (RFC 9112 section 3.2.2).
        (*strip_fields(count_forwards(method, fields), *dropped), ("Via", f"1.{minor} {HTTP_NAME}")),
        length,
        # RFC 9112 section 9.3: a proxy does not keep connections of HTTP/1.0.
        minor > 0 and "close" not in find_options(fields),
        decode_login(fields),
    )


def encode_fields(fields: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{name}: {value}" for name, value in fields]


def encode_length(length: int | None) -> list[str]:
    """Spell the length of a body."""
    if length == CHUNKED:
        return ["Transfer-Encoding: chunked"]
    return [] if length is None or length == UNTIL_END else [f"Content-Length: {length}"]


def encode_http_request(request: HttpRequest) -> bytes:
    """Encode the head of a request for its target."""
    first = f"{request.method} {request.path} HTTP/1.1"
    lines = [first, f"Host: {encode_authority(request.target)}", *encode_fields(request.fields)]
    # One request for each connection: an answer can never be taken for that to another one.
    lines += [*encode_length(request.length), "Connection: close", "", ""]
    return "\r\n".join(lines).encode(WIRE_TEXT)


def decode_http_response(head: bytes, method: str) -> HttpResponse:
    """Decode the head of a target's response to a method."""
    line, fields = split_head(head)
    found = STATUS_LINE.fullmatch(line)
    if found is None:
        raise HttpError("http: wrong status line")
    minor, status = int(found[1]), int(found[2])
    # Nobody asked for a change of protocols.  And only a proxy may ask for the proxy's password: from a
    # target it would be an attempt to get that.
    if status in (101, 407):
        raise HttpError(f"http: status {status} of a target")
    announced = find_length(fields, minor)
    length = UNTIL_END if announced is None else announced
    if status < 200 or status == 204:
        length, announced = 0, None
    elif status == 304 or method == "HEAD":
        length = 0
    passed = (*strip_fields(fields), ("Via", f"1.{minor} {HTTP_NAME}"))
    return HttpResponse(status, found[3] or "", minor, passed, length, announced)


def encode_http_response(response: HttpResponse, minor: int, persists: bool) -> bytes:
    """Encode the head of a response for a client of HTTP/1.MINOR."""
    lines = [f"HTTP/1.1 {response.status} {response.reason}", *encode_fields(response.fields)]
    if minor or response.announced != CHUNKED:
        lines += encode_length(response.announced)
    lines += [] if persists or response.status < 200 else ["Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode(WIRE_TEXT)


def encode_http_error(status: int, method: str, persists: bool) -> bytes:
    """Encode a response of the proxy's own to a method, with a short page."""
    text = f"{HTTP_NAME}: {status} {HTTP_REASONS[status]}\n\n{HTTP_PAGES[status]}\n"
    fields = [("Content-Type", "text/plain; charset=us-ascii"), ("Cache-Control", "no-store")]
    if status == 407:
        fields.append(("Proxy-Authenticate", f'Basic realm="{HTTP_NAME}"'))
    head = HttpResponse(status, HTTP_REASONS[status], 1, tuple(fields), len(text), len(text))
    return encode_http_response(head, 1, persists) + (b"" if method == "HEAD" else text.encode())


class HttpBody(Protocol):
    """Finds out where a body ends, however it comes in pieces."""

    finished: bool

    def take(self, data: bytearray) -> bytes:
        """Return the content at the start of the data, and remove from it what was understood."""
        ...


class LengthBody:
    """A body whose length is known.  Owned by its exchange."""

    def __init__(self, length: int) -> None:
        self.left = length
        self.finished = length == 0

    def take(self, data: bytearray) -> bytes:
        """Return the content at the start of the data; the rest stays."""
        content = bytes(data[: self.left])
        del data[: len(content)]
        self.left -= len(content)
        self.finished = self.left == 0
        return content


class EndlessBody:
    """A body that ends with its connection.  Owned by its exchange, which sets `finished` then."""

    def __init__(self) -> None:
        self.finished = False

    def take(self, data: bytearray) -> bytes:
        """Return all data."""
        content = bytes(data)
        data.clear()
        return content


class ChunkedBody:
    """A body in chunks (RFC 9112 section 7.1), without extensions and trailer.  Owned by its exchange."""

    def __init__(self) -> None:
        self.left = 0  # bytes of the chunk that is being read
        self.awaits = "size"  # what comes behind that: "end" of the chunk, "size" of the next, or "trailer"
        self.spare = HTTP_HEAD_BYTES  # that extensions and trailer may still take
        self.finished = False

    def take(self, data: bytearray) -> bytes:
        """Return the content at the start of the data; HttpError at the first byte that cannot be right."""
        pieces = []
        while not self.finished:
            if self.left:
                piece = bytes(data[: self.left])
                del data[: len(piece)]
                self.left -= len(piece)
                pieces.append(piece)
            if self.left or not self._take_line(data):
                break
        return b"".join(pieces)

    def _take_line(self, data: bytearray) -> bool:
        """Take what stands between two chunks; False while it is not all there."""
        end = data.find(b"\r\n", 0, HTTP_CHUNK_LINE_BYTES)
        if end < 0:
            # A chunk is as long as it says: what follows can only be the end of its line.
            wrong = self.awaits == "end" and data and data != b"\r"
            if wrong or b"\n" in data or len(data) >= HTTP_CHUNK_LINE_BYTES:
                raise HttpError("http: wrong chunk")
            return False
        line = str(data[:end], WIRE_TEXT)
        del data[: end + 2]
        if self.awaits == "size":
            self._take_size(line)
        elif self.awaits == "end":
            if line:
                raise HttpError("http: wrong chunk")
            self.awaits = "size"
        else:
            self._take_trailer(line)
        return True

    def _take_size(self, line: str) -> None:
        found = CHUNK_LINE.fullmatch(line)
        if found is None:
            raise HttpError("http: wrong size of a chunk")
        self._spend(len(line) - len(found[1]))
        self.left = int(found[1], 16)
        self.awaits = "end" if self.left else "trailer"

    def _take_trailer(self, line: str) -> None:
        if line and not FIELD_LINE.fullmatch(line):
            raise HttpError("http: wrong trailer")
        self._spend(len(line))
        self.finished = not line

    def _spend(self, count: int) -> None:
        self.spare -= count
        if self.spare < 0:
            raise HttpError("http: too many extensions of chunks, or too long a trailer")


def make_body(length: int) -> HttpBody:
    """Return the reader of a body of a length in bytes, CHUNKED or UNTIL_END."""
    if length == CHUNKED:
        return ChunkedBody()
    return EndlessBody() if length == UNTIL_END else LengthBody(length)


def encode_chunk(content: bytes, last: bool) -> bytes:
    """Encode content as a chunk; `last`: and the end of the body."""
    chunk = b"%x\r\n%b\r\n" % (len(content), content) if content else b""
    return chunk + b"0\r\n\r\n" if last else chunk


# ============================== 7. Logging ==============================
# The one writer of logs.  A record is one write(2), so lines of several processes never mix.
# The formats are Dante's, byte for byte, because log parsers and fail2ban read them.

LEVEL_WORDS = {
    "emergency": 0,
    "alert": 1,
    "critical": 2,
    "error": 3,
    "warning": 4,
    "notice": 5,
    "info": 6,
    "debug": 7,
}  # fmt: skip  (word in the line -> syslog severity, RFC 5424 section 6.2.1)
SYSLOG_FACILITIES = {
    "auth": 4,
    "authpriv": 10,
    "daemon": 3,
    "user": 1,
    "local0": 16,
    "local1": 17,
    "local2": 18,
    "local3": 19,
    "local4": 20,
    "local5": 21,
    "local6": 22,
    "local7": 23,
}  # fmt: skip  (those that danted knows; numbers from RFC 5424)
SYSLOG_SOCKET = "/dev/log"
SYSLOG_TIMEOUT_SECONDS = 1.0  # a stuck syslogd loses lines rather than sessions
SYSLOG_RETRY_SECONDS = 1.0  # between attempts to reach one that is gone, and to wait for one that is stuck
SYSLOG_IS_GONE = frozenset({errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE})
LOG_FILE_MODE = 0o640  # As Dante.
STANDARD_LOGS = {"stdout": 1, "stderr": 2}  # every process has its own
SELDOM_SECONDS = 1.0
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def connect_syslog(kind: socket.SocketKind) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(SYSLOG_TIMEOUT_SECONDS)
        connection.connect(SYSLOG_SOCKET)
    except OSError:
        connection.close()
        raise
    return connection


def open_syslog() -> socket.socket:
    """Return a socket connected to the local syslog daemon; OSError.

    As syslog(3) of glibc has it: a stream, of records that end with NUL, where no datagrams are taken.
    """
    try:
        return connect_syslog(socket.SOCK_DGRAM)
    except OSError as error:
        if error.errno != errno.EPROTOTYPE:
            raise
    return connect_syslog(socket.SOCK_STREAM)


class LogTarget:
    """One place that log records go to.  Owns its descriptor unless it is stdout or stderr."""

    def __init__(self, name: str) -> None:
        """Open the target called `name` in logoutput; OSError if it cannot be opened."""
        self._begin(name)
        if name in STANDARD_LOGS:
            self.descriptor = STANDARD_LOGS[name]
        elif self.facility >= 0:
            self._hold(open_syslog())
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
            # O_NONBLOCK for the open(2) only: that of a FIFO would wait until somebody reads there.
            self.descriptor = os.open(name.encode("latin-1"), flags | os.O_NONBLOCK, LOG_FILE_MODE)
            os.set_blocking(self.descriptor, True)

    @classmethod
    def adopted(cls, name: str, descriptor: int) -> LogTarget:
        """Return a target that another process has opened; the descriptor becomes its own."""
        target = cls.__new__(cls)
        target._begin(name)
        if target.facility >= 0:
            target._hold(socket.socket(fileno=descriptor))
        else:
            target.descriptor = descriptor
        return target

    @classmethod
    def awaited(cls, name: str) -> LogTarget:
        """Return a target of a syslog daemon that is not there yet; OSError."""
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        return cls.adopted(name, plain.detach())

    def _begin(self, name: str) -> None:
        kind, _, facility = name.partition("/")
        self.name = name
        self.facility = SYSLOG_FACILITIES[facility or "daemon"] if kind == "syslog" else -1
        self.syslog: socket.socket | None = None
        self.is_stream = False
        self.is_changed = False  # by `mend`, and others have not been given it
        self.mending = threading.Lock()  # for one thread at a time, where records are lost already
        self.next_attempt = 0.0
        self.stuck_until = 0.0

    def _hold(self, connection: socket.socket) -> None:
        self.syslog, self.descriptor = connection, connection.fileno()
        connection.setblocking(False)  # for Python, which else would wait before it sends
        # Not what Python knows of its type: that is of what came first under its number.
        self.is_stream = connection.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM

    def _exchange(self, descriptor: int) -> None:
        """Have another open file under our number, which a thread may be about to write to."""
        number = self.descriptor if self.syslog is None else self.syslog.fileno()
        if number > 2:
            os.dup2(descriptor, number, inheritable=False)
        if self.syslog is not None:
            self._hold(self.syslog)

    def renew(self, descriptor: int) -> None:
        """Go on with what another process has opened in the place of this."""
        with self.mending:
            self._exchange(descriptor)
        os.close(descriptor)

    def close(self) -> None:
        with self.mending:
            if self.syslog is not None:
                self.syslog.close()
            elif self.descriptor > 2:
                os.close(self.descriptor)

    def is_lost(self) -> bool:
        """Tell whether this leads to a syslog daemon that is known to be gone."""
        if self.syslog is None:
            return False
        try:
            self.syslog.getpeername()
        except OSError:
            return True
        poller = select.poll()
        poller.register(self.syslog.fileno(), 0)
        return bool(poller.poll(0))  # a stream that has ended; an end of datagrams is found by sending

    def mend(self) -> None:
        """Connect to the syslog daemon again, or try to; at most once a second."""
        with self.mending:
            now = time.monotonic()
            if now < self.next_attempt or self.syslog is None or self.syslog.fileno() < 0:
                return
            self.next_attempt = now + SYSLOG_RETRY_SECONDS
            try:
                with open_syslog() as connection:
                    self._exchange(connection.fileno())
                self.is_changed = True
            except OSError:
                pass

    def _send(self, text: str) -> None:
        """Send one record to the syslog daemon; OSError."""
        assert self.syslog is not None
        end = b"\0" if self.is_stream else b"\n"
        data = text.encode("utf-8", "backslashreplace") + end
        now = time.monotonic()
        deadline = now if now < self.stuck_until else now + SYSLOG_TIMEOUT_SECONDS
        while data:
            try:
                # Not by O_NONBLOCK, which all processes share: a worker that has gone wrong may take it away.
                data = data[self.syslog.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    if deadline > now:
                        self.stuck_until = time.monotonic() + SYSLOG_RETRY_SECONDS
                    raise
                poller = select.poll()
                poller.register(self.descriptor, select.POLLOUT)
                poller.poll(max(1.0, (deadline - time.monotonic()) * 1000))

    def write(self, stamp: str, source: str, severity: int, text: str) -> None:
        """Write one record; a target that fails loses it, as there is nobody left to tell."""
        try:
            if self.syslog is None:
                os.write(self.descriptor, f"{stamp}{source}: {text}\n".encode("utf-8", "backslashreplace"))
                return
            record = f"<{self.facility * 8 + severity}>{stamp.partition(' (')[0]} {source}: {text}"
            try:
                self._send(record)
            except OSError as error:
                if error.errno not in SYSLOG_IS_GONE:
                    raise
                self.mend()
                self._send(record)  # in any case: another thread may have been the one to mend it
        except OSError:
            pass


def is_passed_on(name: str) -> bool:
    """Tell whether a target of this name goes from process to process as a descriptor."""
    return bool(name) and name not in STANDARD_LOGS


LogTargets = tuple[tuple[LogTarget, ...], tuple[LogTarget, ...]]  # of logoutput, of errorlog


class Log:
    """Where records go: `logoutput` gets all of them, `errorlog` warnings and worse.

    Shared by all threads of a process; it holds no lock, as a record is one system call.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self.source = ""
        self.take_over()
        self.targets: tuple[LogTarget, ...] = ()
        self.error_targets: tuple[LogTarget, ...] = ()
        self._second = -1
        self._stamp = ""
        self._seldom: dict[str, float] = {}  # by kind: until when another record of it is left out

    def take_over(self) -> None:
        """Sign the records with the pid of this process: to be called in each child."""
        self.source = f"{self.program}[{os.getpid()}]"

    def open(self, logoutput: Iterable[str], errorlog: Iterable[str]) -> None:
        """Open the targets afresh; those that cannot be opened are reported to the others.

        As Dante: the server runs on without a log that cannot be opened.
        """
        old = self.targets + self.error_targets
        failures: list[str] = []
        self.targets = self._open_all(logoutput, failures)
        self.error_targets = self._open_all(errorlog, failures)
        for target in old:
            target.close()
        if failures and all(target.is_lost() for target in self.targets):
            opened, self.targets = self.targets, (LogTarget("stderr"),)  # for these lines only
            self._tell(failures)
            self.targets = opened
        else:
            self._tell(failures)

    def reopen(self, config: Config, running: Config) -> LogTargets:
        """Open the targets afresh, and return the former ones: for `keep` or, to go back, for `restore`.

        One that is open, and cannot be opened again, stays as it is.
        ConfigError, and then nothing has changed, where one that is new cannot be opened.
        """
        former = self.targets, self.error_targets
        present = {*self.targets, *self.error_targets}
        failures: list[str] = []
        targets = self._open_all(config.logoutput, failures, self.targets)
        error_targets = self._open_all(config.errorlog, failures, self.error_targets)
        missing = {*config.logoutput} - {*running.logoutput} - {target.name for target in targets}
        missing |= {*config.errorlog} - {*running.errorlog} - {target.name for target in error_targets}
        if missing:
            for target in {*targets, *error_targets} - present:
                target.close()
            raise ConfigError("; ".join(failures))
        self.targets, self.error_targets = targets, error_targets
        self._tell(failures)
        return former

    def list_replaced(self, former: LogTargets) -> list[LogTarget]:
        """Return those of the former targets that are in use no more."""
        present = {*self.targets, *self.error_targets}
        return [target for target in {*former[0], *former[1]} if target not in present]

    def keep(self, former: LogTargets) -> None:
        """Stay with the present targets: close the former ones."""
        for target in self.list_replaced(former):
            target.close()

    def restore(self, former: LogTargets) -> None:
        """Go back to the former targets, and close the present ones."""
        present = self.targets, self.error_targets
        self.targets, self.error_targets = former
        self.keep(present)

    def _tell(self, failures: Iterable[str]) -> None:
        for failure in failures:
            self.write("warning", failure)

    def _open_all(
        self, names: Iterable[str], failures: list[str], present: Iterable[LogTarget] = ()
    ) -> tuple[LogTarget, ...]:
        opened = []
        for name in names:
            try:
                opened.append(LogTarget(name))
            except OSError as error:
                failures.append(f'could not open logfile "{name}": {error.strerror}')
                former = [target for target in present if target.name == name]
                if not former and name.partition("/")[0] == "syslog":
                    former = [LogTarget.awaited(name)]
                opened += former[:1]
        return tuple(opened)

    def mend(self) -> bool:
        """Connect again to a syslog daemon that is gone; True if that was done since, here or by `write`."""
        is_changed = False
        for target in self.targets + self.error_targets:
            if target.is_lost():
                target.mend()
            is_changed = is_changed or target.is_changed
            target.is_changed = False
        return is_changed

    def has_syslog(self) -> bool:
        return any(target.syslog is not None for target in self.targets + self.error_targets)

    def export(self) -> tuple[list[bytes], list[int]]:
        """Return names and descriptors of the targets, for `adopt` in another process."""
        names = [*(t.name for t in self.targets), "", *(t.name for t in self.error_targets)]
        descriptors = [t.descriptor for t in self.targets + self.error_targets if is_passed_on(t.name)]
        return [name.encode("latin-1") for name in names], descriptors

    def adopt(self, names: list[bytes], descriptors: list[int]) -> None:
        """Go on with targets that another process has opened: in a jail there is no file to open.

        The same ones again take the descriptors of the old ones: a thread may be about to write there, and
        the number is not to be a client's connection by then.  The old ones stay where this process had no
        room for all of the new ones.
        """
        texts = [name.decode("latin-1") for name in names]
        if len(descriptors) < sum(map(is_passed_on, texts)):
            for descriptor in descriptors:
                os.close(descriptor)
            self.write("warning", "no descriptor is left for a log that was opened again: the old ones stay")
            return
        old = self.targets + self.error_targets
        left = iter(descriptors)
        if names == self.export()[0]:
            for target in old:
                if is_passed_on(target.name):
                    target.renew(next(left))
            return
        adopted: list[LogTarget | None] = []
        for text in texts:
            if is_passed_on(text):
                adopted.append(LogTarget.adopted(text, next(left)))
            else:
                adopted.append(LogTarget(text) if text else None)
        border = adopted.index(None)
        self.targets = tuple(t for t in adopted[:border] if t)
        self.error_targets = tuple(t for t in adopted[border:] if t)
        for target in old:
            target.close()

    def close(self) -> None:
        for target in self.targets + self.error_targets:
            target.close()
        self.targets = self.error_targets = ()

    def _now(self) -> str:
        now = time.time()
        second = int(now)
        if second != self._second:
            # The stamp is set before the second, so that another thread never pairs the two wrongly
            # for longer than it takes to write them.
            local = time.localtime(second)
            self._stamp = (
                f"{MONTHS[local.tm_mon - 1]} {local.tm_mday:2d} "
                f"{local.tm_hour:02d}:{local.tm_min:02d}:{local.tm_sec:02d}"
            )
            self._second = second
        return f"{self._stamp} ({second}.{int((now - second) * 1000000):06d}) "

    def write_seldom(self, level: str, kind: str, text: str) -> None:
        """Write one record, and for a second no other of its kind: for what any client can bring about."""
        now = time.monotonic()
        if now >= self._seldom.get(kind, 0.0):
            self._seldom[kind] = now + SELDOM_SECONDS
            self.write(level, text)

    def write(self, level: str, text: str) -> None:
        """Write one record at a level of LEVEL_WORDS."""
        severity = LEVEL_WORDS[level]
        stamp = self._now()
        for target in self.targets:
            target.write(stamp, self.source, severity, f"{level}: {text}")
        if severity <= LEVEL_WORDS["warning"]:
            for target in self.error_targets:
                target.write(stamp, self.source, severity, f"{level}: {text}")


def describe_client(endpoint: Endpoint, method: str = "none", user: str = "") -> str:
    """Return a client as Dante prints it: with method and user where it has named itself.

    Unlike Dante: what would forge or split a line is escaped in the user's name.
    """
    if method == "none" or not user:
        return str(endpoint)
    name = escape_text(user)
    if method.startswith("gssapi/"):
        name = name.replace("\\100", "@")  # every principal has one, and the KDC has vouched for it
    return f"{method}%{name}@{endpoint}"


def describe_endpoint(endpoint: Endpoint) -> str:
    """Return an endpoint for a log line; names come from clients, so they are escaped."""
    return str(endpoint) if endpoint.family else f"{escape_text(endpoint.host)}.{endpoint.port}"


def describe_count(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> describe_count(1, "byte"), describe_count(0, "second")
    ('1 byte', '0 seconds')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


LOGS_A_BLOCK = frozenset({"connect", "disconnect", "data", "ioop"})  # As Dante: not by `error` alone.
LOGS_AN_ERROR = frozenset({"error", "disconnect"})


# ============================== 8. Operating system ==============================
# What Python's library does not offer, through ctypes.  Each wrapper raises OSError as the os
# module does; structures and constants name the header that they come from.

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_KEEPCAPS = 8  # linux/prctl.h
CAP_DAC_READ_SEARCH, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN = 2, 10, 12  # linux/capability.h
CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h
RECVERR = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}  # linux/in.h
M_ARENA_MAX = -8  # malloc.h
MADV_DONTNEED = 4  # asm-generic/mman-common.h
SIOCATMARK = 0x8905  # asm-generic/sockios.h
FIONREAD = 0x541B  # asm-generic/ioctls.h
SIOCOUTQ = 0x5411  # linux/sockios.h
AF_INET_FAMILY = {socket.AF_INET: 4, socket.AF_INET6: 6}
FAMILY_OF = {4: socket.AF_INET, 6: socket.AF_INET6}


class IfAddrs(ctypes.Structure):
    """struct ifaddrs (ifaddrs.h), as far as the address."""


IfAddrs._fields_ = [
    ("ifa_next", ctypes.POINTER(IfAddrs)),
    ("ifa_name", ctypes.c_char_p),
    ("ifa_flags", ctypes.c_uint),
    ("ifa_addr", ctypes.c_void_p),
]


@functools.cache
def load_library(name: str) -> ctypes.CDLL:
    """Return a system library; OSError where it is missing.  "" is the C library itself.

    ctypes.util.find_library is of no use: on small systems it has no compiler or ldconfig to ask.
    """
    return ctypes.CDLL(name or None, use_errno=True)


def system_error(call: str) -> OSError:
    """Return the OSError of a C call that has just failed."""
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    if load_library("").prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise system_error("prctl")


LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # asm-generic/unistd.h
LANDLOCK_SCOPE_SIGNAL = 2  # linux/landlock.h


def forbid_signals() -> None:
    """Let this thread, and all that it starts, signal no other process from now on (landlock(7)).

    Else processes of one user can stop and kill one another.  Needs PR_SET_NO_NEW_PRIVS; before Linux 6.12
    there is no such thing, and all stays as it is.
    """
    call = load_library("").syscall
    ruleset = struct.pack("=QQQ", 0, 0, LANDLOCK_SCOPE_SIGNAL)  # struct landlock_ruleset_attr
    descriptor = call(LANDLOCK_CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0)
    if descriptor >= 0:
        call(LANDLOCK_RESTRICT_SELF, descriptor, 0)
        os.close(descriptor)


# What the boot process of the executable (packaging/build) leaves in the environment besides LD_LIBRARY_PATH.
BOOT_VARIABLES = (
    "_PYI_APPLICATION_HOME_DIR",
    "_PYI_ARCHIVE_FILE",
    "_PYI_LINUX_PROCESS_NAME",
    "_PYI_PARENT_PROCESS_LEVEL",
    "_SOCKD_BOOT_PID",
)


def is_executable() -> bool:
    """Tell whether this runs as the one executable, below a boot process, and not from the source."""
    return hasattr(sys, "_MEIPASS")


def leave_boot_process() -> None:
    """Put back what the executable's boot process has changed for its own needs; before anything else."""
    if not is_executable():
        return
    # Programs that PAM or the system run for us must not meet the libraries of our Python.
    os.environ.pop("LD_LIBRARY_PATH", None)
    if "LD_LIBRARY_PATH_ORIG" in os.environ:
        os.environ["LD_LIBRARY_PATH"] = os.environ.pop("LD_LIBRARY_PATH_ORIG")
    if "_SOCKD_TMPDIR" in os.environ:
        del os.environ["TMPDIR"], os.environ["_SOCKD_TMPDIR"]
    for variable in BOOT_VARIABLES:
        os.environ.pop(variable, None)
    # PyInstaller's own would say of a library that the system lacks that it was forgotten in the executable.
    vars(ctypes)["CDLL"] = ctypes.CDLL.__base__


def forget_unpacked_files() -> None:
    """Remove what the executable has unpacked, once all of it is in memory.

    So nothing that cleans /tmp can take it away, nor -D, whose boot process ends; and a server that is
    killed leaves nothing behind.  From here on only what is loaded can be imported.
    """
    root = getattr(sys, "_MEIPASS", "")
    if not os.path.basename(root).startswith("_MEI"):
        return  # not the one executable: these files are somebody's installation
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)
    # A module that is missing then is just that, and not a file that cannot be read.
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()


def set_capabilities(mask: int) -> None:
    """Set this process's permitted and effective capabilities, with none inheritable (capset(2))."""
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    if load_library("").capset(header, data) != 0:
        raise system_error("capset")


def held_capabilities() -> int:
    """Return the mask of the capabilities that this process is permitted (capget(2))."""
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    if load_library("").capget(header, data) != 0:
        raise system_error("capget")
    _, low, _, _, high, _ = struct.unpack("=6I", data.raw)
    return int(high) << 32 | int(low)


def release_memory() -> None:
    """Give the memory that is free inside this process back to the system (malloc_trim(3), glibc only).

    Compiling this file and parsing the configuration leave several megabytes, which every child
    would inherit.
    """
    trim = getattr(load_library(""), "malloc_trim", None)
    if trim is not None:
        trim(0)


def limit_arenas() -> None:
    """Let all threads share two heaps (mallopt(3), glibc only).

    By default each of the first dozens takes 64 MB of address space, which a 32-bit machine has not got.
    """
    mallopt = getattr(load_library(""), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 2)


def decode_sockaddr(address: int) -> Endpoint | None:
    """Return the IP address in a struct sockaddr in memory, or None for another family."""
    (family,) = struct.unpack("=H", ctypes.string_at(address, 2))
    if family == socket.AF_INET:
        return Endpoint(socket.inet_ntoa(ctypes.string_at(address + 4, 4)), 0, 4)
    if family != socket.AF_INET6:
        return None
    host = socket.inet_ntop(socket.AF_INET6, ctypes.string_at(address + 8, 16))
    (scope,) = struct.unpack("=I", ctypes.string_at(address + 24, 4))
    return Endpoint(f"{host}%{socket.if_indextoname(scope)}" if scope else host, 0, 6)


def interface_addresses() -> dict[str, tuple[Endpoint, ...]]:
    """Return every network interface with its current IP addresses (getifaddrs(3))."""
    found: dict[str, tuple[Endpoint, ...]] = {name: () for _, name in socket.if_nameindex()}
    libc = load_library("")
    head = ctypes.POINTER(IfAddrs)()
    if libc.getifaddrs(ctypes.byref(head)) != 0:
        raise system_error("getifaddrs")
    try:
        entry = head
        while entry:
            record = entry.contents
            endpoint = decode_sockaddr(record.ifa_addr) if record.ifa_addr else None
            if endpoint is not None:
                name = record.ifa_name.decode()
                found[name] = (*found.get(name, ()), endpoint)
            entry = record.ifa_next
    finally:
        libc.freeifaddrs(head)
    return found


def resolve_name(name: str, families: Iterable[int] = (4, 6)) -> tuple[Endpoint, ...]:
    """Return the addresses of a host name in the system's order, without duplicates; OSError if none.

    The name goes to the resolver as bytes: as text it would pass through the idna codec, which is
    imported late, takes as much memory as a tenth of this file, and refuses names that DNS allows.
    """
    wanted = frozenset(families)
    family = FAMILY_OF[min(wanted)] if len(wanted) == 1 else socket.AF_UNSPEC
    found: dict[Endpoint, None] = {}
    for answer in socket.getaddrinfo(name.encode("latin-1"), None, family, socket.SOCK_STREAM):
        host = str(answer[4][0])
        if host.startswith("::ffff:") and "." in host:
            found[Endpoint(host[7:], 0, 4)] = None
        elif answer[0] in AF_INET_FAMILY:
            found[Endpoint(host, 0, AF_INET_FAMILY[answer[0]])] = None
    return tuple(endpoint for endpoint in found if endpoint.family in wanted)


def reverse_names(address: Endpoint) -> tuple[str, ...]:
    """Return the name that an address maps back to; OSError if it has none.

    As Dante: one name, for what a rule lets through must not depend on whatever else a file or a zone
    gives for the address.  The address is passed as bytes for the reason that resolve_name has.
    """
    return (socket.gethostbyaddr(address.host.encode("ascii"))[0],)  # type: ignore[arg-type]


def group_numbers(user: bytes, primary: int) -> tuple[int, ...]:
    """Return the numbers of a user's groups (getgrouplist(3), for which os has only names in UTF-8)."""
    room = ctypes.c_int(64)
    while True:
        numbers = (ctypes.c_uint * room.value)()
        had = room.value
        if load_library("").getgrouplist(user, ctypes.c_uint(primary), numbers, ctypes.byref(room)) >= 0:
            return tuple(numbers[: room.value])
        room.value = max(room.value, had * 2)


def crypt_library() -> ctypes.CDLL:
    """Return the library with crypt(3): libcrypt, or the C library itself (musl)."""
    for name in ("libcrypt.so.1", "libcrypt.so.2", "libcrypt.so"):
        try:
            return load_library(name)
        except OSError:
            continue
    return load_library("")


def crypt(password: bytes, setting: bytes) -> bytes:
    """Return crypt(3)'s hash of a password under a setting; OSError where the system cannot.

    Only for processes with one thread: crypt(3) answers in static memory.
    """
    try:
        function = crypt_library().crypt
    except AttributeError:
        raise OSError(errno.ENOSYS, "crypt: not in this system's C library") from None
    function.restype = ctypes.c_char_p
    function.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    answer: bytes | None = function(password, setting)
    if answer is None or answer.startswith(b"*"):  # "*0" and "*1" are how libcrypt says no
        raise OSError(errno.EINVAL, "crypt: unknown kind of hash")
    return answer


GSSAPI_LIBRARY = "libgssapi_krb5.so.2"  # MIT's; what follows is its gssapi/gssapi.h and gssapi_ext.h


class GssBuffer(ctypes.Structure):
    """gss_buffer_desc."""

    _fields_ = (("length", ctypes.c_size_t), ("value", ctypes.c_void_p))


class GssOid(ctypes.Structure):
    """gss_OID_desc."""

    _fields_ = (("length", ctypes.c_uint32), ("elements", ctypes.c_char_p))


class GssOidSet(ctypes.Structure):
    """gss_OID_set_desc."""

    _fields_ = (("count", ctypes.c_size_t), ("elements", ctypes.POINTER(GssOid)))


class GssElement(ctypes.Structure):
    """gss_key_value_element_desc."""

    _fields_ = (("key", ctypes.c_char_p), ("value", ctypes.c_char_p))


class GssStore(ctypes.Structure):
    """gss_key_value_set_desc."""

    _fields_ = (("count", ctypes.c_uint32), ("elements", ctypes.POINTER(GssElement)))


GSS_BUFFER, GSS_HANDLE = ctypes.POINTER(GssBuffer), ctypes.POINTER(ctypes.c_void_p)
GSS_NUMBER, GSS_INT = ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_int)
# Arguments behind the first of each, the minor status.
GSS_CALLS: dict[str, tuple[Any, ...]] = {
    "gss_accept_sec_context": (
        GSS_HANDLE, ctypes.c_void_p, GSS_BUFFER, ctypes.c_void_p, GSS_HANDLE, ctypes.c_void_p, GSS_BUFFER,
        GSS_NUMBER, ctypes.c_void_p, ctypes.c_void_p,
    ),
    "gss_acquire_cred_from": (
        ctypes.c_void_p, ctypes.c_uint32, ctypes.POINTER(GssOidSet), ctypes.c_int, ctypes.POINTER(GssStore),
        GSS_HANDLE, ctypes.c_void_p, ctypes.c_void_p,
    ),
    "gss_delete_sec_context": (GSS_HANDLE, ctypes.c_void_p),
    "gss_display_name": (ctypes.c_void_p, GSS_BUFFER, ctypes.c_void_p),
    "gss_display_status": (ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p, GSS_NUMBER, GSS_BUFFER),
    "gss_export_sec_context": (GSS_HANDLE, GSS_BUFFER),
    "gss_import_name": (GSS_BUFFER, ctypes.c_void_p, GSS_HANDLE),
    "gss_import_sec_context": (GSS_BUFFER, GSS_HANDLE),
    "gss_indicate_mechs": (GSS_HANDLE,),
    "gss_init_sec_context": (
        ctypes.c_void_p, GSS_HANDLE, ctypes.c_void_p, ctypes.POINTER(GssOid), ctypes.c_uint32,
        ctypes.c_uint32, ctypes.c_void_p, GSS_BUFFER, ctypes.c_void_p, GSS_BUFFER, GSS_NUMBER,
        ctypes.c_void_p,
    ),
    "gss_release_buffer": (GSS_BUFFER,),
    "gss_release_cred": (GSS_HANDLE,),
    "gss_release_name": (GSS_HANDLE,),
    "gss_release_oid_set": (GSS_HANDLE,),
    "gss_unwrap": (ctypes.c_void_p, GSS_BUFFER, GSS_BUFFER, GSS_INT, ctypes.c_void_p),
    "gss_wrap": (
        ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, GSS_BUFFER, GSS_INT, GSS_BUFFER,
    ),
    "gss_wrap_size_limit": (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint32, GSS_NUMBER),
}  # fmt: skip
GSS_ERROR_BITS = 0xFFFF0000  # of a major status; the others are news of a success
GSS_DUPLICATE, GSS_OLD, GSS_UNSEQUENCED, GSS_GAP = 2, 4, 8, 16
GSS_CONTINUE_NEEDED = 1
GSS_GSS_CODE, GSS_MECH_CODE = 1, 2
GSS_INITIATE, GSS_ACCEPT = 1, 2
GSS_MUTUAL, GSS_REPLAY, GSS_SEQUENCE, GSS_CONFIDENTIAL, GSS_SIGNED = 2, 4, 8, 16, 32
# RFC 1961 section 3.1, and what makes confidentiality possible.  As Dante: no credential is delegated.
GSS_WISHES = GSS_MUTUAL | GSS_REPLAY | GSS_SEQUENCE | GSS_CONFIDENTIAL | GSS_SIGNED
GSS_INDEFINITE = 0xFFFFFFFF
KERBEROS = b"\x2a\x86\x48\x86\xf7\x12\x01\x02\x02"  # 1.2.840.113554.1.2.2, RFC 1964
PROFILE_MARK = b"\xaa\xca\x60\x12"  # PROF_MAGIC_PROFILE, prof_err.h
MOST_PROFILES = 64


class GssError(SockdError):
    """A call of GSS-API has failed; the text is its own."""


@functools.cache
def load_gssapi() -> ctypes.CDLL:
    """Return the GSS-API library; OSError where it is missing."""
    library = load_library(GSSAPI_LIBRARY)
    for name, arguments in GSS_CALLS.items():
        function = getattr(library, name)
        function.argtypes = (GSS_NUMBER, *arguments)
        function.restype = ctypes.c_uint32
    return library


def take_buffer(buffer: GssBuffer) -> bytes:
    """Return the bytes of a buffer that GSS-API has filled, and free it."""
    try:
        return ctypes.string_at(buffer.value, buffer.length) if buffer.value else b""
    finally:
        load_gssapi().gss_release_buffer(ctypes.c_uint32(), buffer)


def describe_gss(status: int, kind: int) -> str:
    """Return GSS-API's text for a status, spelled for the log; "" if it has none.

    MIT's library quotes what a KDC says, and who answers in a KDC's place says anything.
    """
    minor, more, text = ctypes.c_uint32(), ctypes.c_uint32(), GssBuffer()
    display = load_gssapi().gss_display_status
    if display(minor, status, kind, None, more, text) & GSS_ERROR_BITS:
        return ""
    return escape_bytes(take_buffer(text))


def call_gss(name: str, *arguments: object) -> int:
    """Call a function of GSS-API; return its major status, or raise GssError."""
    minor = ctypes.c_uint32()
    major: int = getattr(load_gssapi(), name)(minor, *arguments)
    if major & GSS_ERROR_BITS:
        texts = describe_gss(major, GSS_GSS_CODE), describe_gss(minor.value, GSS_MECH_CODE)
        raise GssError(f"{name}() failed: {'.  '.join(texts)}")
    return major


def give_buffer(data: bytes) -> GssBuffer:
    """Return a buffer for GSS-API to read; the bytes must outlive it."""
    return GssBuffer(len(data), ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p))


def preload_gssapi() -> None:
    """Have the library find its mechanisms, which are files, while there are any."""
    mechanisms = ctypes.c_void_p()
    call_gss("gss_indicate_mechs", mechanisms)
    call_gss("gss_release_oid_set", mechanisms)


class SecurityContext:
    """An established GSS-API context, taken over from the process that has established it.

    Used by one thread at a time.  Its owner closes it.
    """

    def __init__(self, exported: bytes) -> None:
        """Take over an exported context; GssError."""
        self.handle = ctypes.c_void_p()
        call_gss("gss_import_sec_context", give_buffer(exported), self.handle)

    def wrap(self, data: bytes, confidential: int) -> bytes:
        """Return data as a token, encrypted if `confidential` is 1 and signed if it is 0; GssError."""
        token = GssBuffer()
        encrypted = ctypes.c_int()
        call_gss("gss_wrap", self.handle, confidential, 0, give_buffer(data), encrypted, token)
        sealed = take_buffer(token)
        if encrypted.value < confidential:
            raise GssError("gss_wrap() cannot encrypt under this context")
        return sealed

    def unwrap(self, token: bytes) -> tuple[bytes, int, int]:
        """Return the data of a token, 1 if it was encrypted, and what there is to say of its order.

        GssError for what the peer has not sealed.
        """
        data, encrypted = GssBuffer(), ctypes.c_int()
        news = call_gss("gss_unwrap", self.handle, give_buffer(token), data, encrypted, None)
        return take_buffer(data), encrypted.value, news

    def find_room(self, confidential: int) -> int:
        """Return how many bytes fit into a token of RFC 1961; GssError."""
        room = ctypes.c_uint32()
        call_gss("gss_wrap_size_limit", self.handle, confidential, 0, GSSAPI_MAX, room)
        return room.value

    def close(self) -> None:
        if self.handle:
            call_gss("gss_delete_sec_context", self.handle, None)


def import_service(service: str) -> ctypes.c_void_p:
    """Return the name of a service for GSS-API, which the caller releases; none for ANY_SERVICE."""
    name = ctypes.c_void_p()
    if service.upper() != ANY_SERVICE:
        # As Dante: with a slash it is a principal, else a service on this host.
        symbol = "GSS_C_NT_HOSTBASED_SERVICE"
        kind = None if "/" in service else ctypes.c_void_p.in_dll(load_gssapi(), symbol)
        call_gss("gss_import_name", give_buffer(service.encode(WIRE_TEXT)), kind, name)
    return name


def acquire_credential(name: ctypes.c_void_p | None, use: int, **store: str) -> ctypes.c_void_p:
    """Return a credential of Kerberos from a store (krb5's gss_acquire_cred_from); GssError."""
    credential = ctypes.c_void_p()
    elements = [GssElement(key.encode("ascii"), value.encode(WIRE_TEXT)) for key, value in store.items()]
    mechanism = GssOid(len(KERBEROS), KERBEROS)
    call_gss(
        "gss_acquire_cred_from", name, GSS_INDEFINITE, GssOidSet(1, ctypes.pointer(mechanism)), use,
        GssStore(len(elements), (GssElement * len(elements))(*elements)), credential, None, None,
    )  # fmt: skip
    return credential


def strip_profile(exported: bytes) -> bytes:
    """Return an exported context without the names of the configuration files it was made under.

    MIT's library would open them again where the context is taken over, and fail in a jail; what is sealed
    there needs none of them.  They stand as count, length and name of each, between two marks
    (prof_init.c, profile_ser_externalize).
    """
    start = exported.find(PROFILE_MARK)
    while start >= 0:
        at = start + len(PROFILE_MARK)
        count = int.from_bytes(exported[at : at + 4], "big")
        at += 4
        for _ in range(min(count, MOST_PROFILES)):
            at += 4 + int.from_bytes(exported[at : at + 4], "big")
        if exported.startswith(PROFILE_MARK, at):
            return exported[: start + len(PROFILE_MARK)] + bytes(4) + exported[at:]
        start = exported.find(PROFILE_MARK, start + 1)  # a key that happens to have these four bytes
    return exported


def accept_context(service: str, keytab: str, token: bytes) -> tuple[bytes, bytes, bytes]:
    """Accept a client's token; return (our token, the client's principal, the context for export); GssError.

    What the calls leave allocated here ends with the process.
    """
    credential = acquire_credential(import_service(service), GSS_ACCEPT, keytab=keytab)
    context, source = ctypes.c_void_p(), ctypes.c_void_p()
    output, name, exported, flags = GssBuffer(), GssBuffer(), GssBuffer(), ctypes.c_uint32()
    major = call_gss(
        "gss_accept_sec_context", context, credential, give_buffer(token), None, source, None, output, flags,
        None, None,
    )  # fmt: skip
    if major & GSS_CONTINUE_NEEDED:
        raise GssError("the client wants to negotiate further, which Kerberos does not")
    call_gss("gss_display_name", source, name, None)
    call_gss("gss_export_sec_context", context, exported)
    return take_buffer(output), take_buffer(name), strip_profile(take_buffer(exported))


class Initiation:
    """A context with an upstream that is being established.

    What its calls leave allocated here ends with the process.
    """

    def __init__(self, service: UpstreamService) -> None:
        """Take up our credential: what the key table says, or what Kerberos has by default; GssError."""
        self.name = import_service(service.name)
        self.context = ctypes.c_void_p()
        self.credential = None
        if service.keytab:
            # In memory, for the default cache may hold another one's tickets.
            store = {"client_keytab": service.keytab, "ccache": "MEMORY:sockd"}
            self.credential = acquire_credential(None, GSS_INITIATE, **store)

    def step(self, token: bytes) -> tuple[int, bytes, int]:
        """Take the upstream's token, b"" at first; return (major status, our token, flags).  GssError."""
        output, flags = GssBuffer(), ctypes.c_uint32()
        mechanism = GssOid(len(KERBEROS), KERBEROS)
        major = call_gss(
            "gss_init_sec_context", self.credential, self.context, self.name, mechanism, GSS_WISHES, 0, None,
            give_buffer(token) if token else None, None, output, flags, None,
        )  # fmt: skip
        return major, take_buffer(output), flags.value

    def begin(self) -> bytes:
        """Return the token to begin with; GssError."""
        _, token, _ = self.step(b"")
        if not 0 < len(token) <= GSSAPI_MAX:
            raise GssError(f"our token has {describe_count(len(token), 'byte')}")
        return token

    def finish(self, token: bytes) -> bytes:
        """Return the context for export once an upstream has proved who it is; GssError."""
        major, _, flags = self.step(token)
        if major & GSS_CONTINUE_NEEDED or flags & GSS_WISHES != GSS_WISHES:
            raise GssError("the proxy server does not let us know who it is, or protect what we say")
        exported = GssBuffer()
        call_gss("gss_export_sec_context", self.context, exported)
        return strip_profile(take_buffer(exported))


LIBWRAP = "libwrap.so.0"
RQ_FILE, RQ_DAEMON = 1, 2  # tcpd.h
REQUEST_INFO_BYTES = 4096  # struct request_info (tcpd.h) has some 1,100, and libwrap alone looks inside
TWISTABLE = -2  # `resident` of libwrap, which hosts_access adds 1 to: below 1 a twist may exec(3)


def load_libwrap() -> ctypes.CDLL:
    """Return the library of tcp_wrappers; OSError where it is missing."""
    library = load_library(LIBWRAP)
    library.request_init.argtypes = (
        ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int,
    )  # fmt: skip
    library.request_init.restype = ctypes.c_void_p
    library.sock_host.argtypes = library.hosts_access.argtypes = (ctypes.c_void_p,)
    library.sock_host.restype = None
    return library


def hosts_access(daemon: bytes, connection: int, allow: bytes, deny: bytes) -> bool:
    """Tell whether tcp_wrappers let a connection pass (hosts_access(3)); -1 for no connection.

    The last two are files to use in the place of hosts.allow and hosts.deny; b"" keeps libwrap's own.
    Only for processes with one thread: libwrap works in static memory.
    """
    library = load_libwrap()
    files = {"hosts_allow_table": ctypes.c_char_p(allow), "hosts_deny_table": ctypes.c_char_p(deny)}
    own = {}
    for symbol, file in files.items():
        table = ctypes.c_void_p.in_dll(library, symbol)
        own[symbol] = table.value
        table.value = ctypes.cast(file, ctypes.c_void_p).value if file.value else table.value
    try:
        request = ctypes.create_string_buffer(REQUEST_INFO_BYTES)
        library.request_init(request, RQ_FILE, connection, RQ_DAEMON, daemon, 0)
        library.sock_host(request)
        return bool(library.hosts_access(request))
    finally:
        for symbol, value in own.items():
            ctypes.c_void_p.in_dll(library, symbol).value = value


def make_table(text: bytes) -> tuple[int, bytes]:
    """Return a file in memory with this text: its descriptor, and the name to open it by."""
    descriptor = os.memfd_create("libwrap")
    os.write(descriptor, text)
    return descriptor, f"/proc/self/fd/{descriptor}".encode("ascii")


def obey_libwrap(daemon: bytes, connection: int, line: bytes) -> bool:
    """Carry out a line of hosts_options(5) for a connection; False if it fails or denies.

    As a hosts.allow of this one line: for an error libwrap jumps (longjmp) into hosts_access, so nothing
    else can be called that would carry it out.  The hosts.deny catches whatever the line lets fall.
    """
    # As Dante: %h and %c are the client's name, where it has one; KNOWN makes libwrap look it up.
    clients = b"KNOWN ALL" if b"%" in line else b"ALL"
    options, options_file = make_table(b"ALL: %s: %s\n" % (clients, line))
    rest, rest_file = make_table(b"ALL: ALL\n")
    try:
        os.stat(rest_file)  # libwrap takes a file that it cannot open for an empty one
        return hosts_access(daemon, connection, options_file, rest_file)
    finally:
        os.close(options)
        os.close(rest)


def check_libwrap(line: bytes) -> bool:
    """Tell whether libwrap finds no mistake in a line of hosts_options(5).

    Nothing is carried out but `setenv` and `umask`, which libwrap does all the same: for a child.
    """
    dry_run = ctypes.c_int.in_dll(load_libwrap(), "dry_run")
    dry_run.value = 1
    try:
        return obey_libwrap(b"sockd", -1, line)
    finally:
        dry_run.value = 0


def allow_twist() -> None:
    """Let a line's `twist` replace this process by a command."""
    ctypes.c_int.in_dll(load_libwrap(), "resident").value = TWISTABLE


TCP_STATES = (
    "",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
)  # fmt: skip  (linux/tcp_states.h)
TCP_CA_STATES = ("Open", "Disorder", "CWR", "Recovery", "Loss")  # linux/tcp.h
TCP_OPTIONS = ((1, "TS"), (2, "SACK"), (4, "Wscale"), (8, "ECN"))
TCP_FEATURE_OF_OPTION = {"TS": "timestamps", "SACK": "sack", "Wscale": "wscale", "ECN": "ecn"}
TCP_INFO_FORMAT = struct.Struct("=8B24I")  # struct tcp_info of linux/tcp.h, up to tcpi_total_retrans
# The order in which Dante prints the members that follow the first eight bytes; "" is an empty line.
TCP_INFO_WORDS = (
    "rto", "ato", "snd_mss", "rcv_mss", "unacked", "sacked", "lost", "retrans", "fackets", "",
    "last_data_sent", "last_ack_sent", "last_data_recv", "last_ack_recv", "",
    "pmtu", "rcv_ssthresh", "rtt", "rttvar", "snd_ssthresh", "snd_cwnd", "advmss", "reordering",
    "rcv_rtt", "rcv_space", "", "total_retrans",
)  # fmt: skip


def read_tcp_info(connection: socket.socket) -> list[tuple[str, str]]:
    """Return (member, value) of a connection's TCP_INFO (tcp(7)).

    Spelled and ordered as Dante prints them.
    """
    data = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_FORMAT.size)
    state, ca_state, retransmits, probes, backoff, options, scales, _, *words = TCP_INFO_FORMAT.unpack(data)
    names = ", ".join(name for bit, name in TCP_OPTIONS if options & bit)
    info = [
        ("state", f"{state} ({TCP_STATES[state]})"),
        ("ca_state", f"{ca_state} (TCP_CA_{TCP_CA_STATES[ca_state]})"),
        ("retransmits", str(retransmits)),
        ("probes", str(probes)),
        ("backoff", str(backoff)),
        ("options", f"{options} ({names})"),
        ("snd_wscale", str(scales & 15)),
        ("rcv_wscale", str(scales >> 4)),
    ]
    values = iter(words)
    return info + [(name, str(next(values)) if name else "") for name in TCP_INFO_WORDS]


def read_tcp_features(connection: socket.socket) -> frozenset[str]:
    """Return which of TCP_FEATURES a connection uses; OSError."""
    data = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_FORMAT.size)
    options = TCP_INFO_FORMAT.unpack(data)[5]
    return frozenset(TCP_FEATURE_OF_OPTION[name] for bit, name in TCP_OPTIONS if options & bit)


@functools.cache
def error_symbols() -> dict[str, str]:
    """Return the symbol of each error of errno(3) and getaddrinfo(3), by the text that tells of it."""
    explain = load_library("").gai_strerror
    explain.restype = ctypes.c_char_p
    names = [name for name in dir(socket) if name.startswith("EAI_")]
    found = {explain(getattr(socket, name)).decode("ascii", "replace"): name for name in names}
    return found | {os.strerror(number): name for number, name in errno.errorcode.items()}


def describe_tcp_info(connections: Sequence[socket.socket]) -> str:
    """Return the lines that log: tcpinfo adds to a record, one column for each connection.

    "" if a connection is no longer one.
    """
    try:
        columns = [read_tcp_info(connection) for connection in connections]
    except OSError:
        return ""
    lines = ["", "TCP_INFO:"]
    for members in zip(*columns, strict=True):
        name, values = members[0][0], " <-> ".join(value for _, value in members)
        lines.append(f"tcpi_{name:<16}: {values}" if name else "")
    return "\n".join(lines)


def decode_path(text: str) -> str:
    """Return a path of the configuration, whose text is bytes (see WIRE_TEXT), as Python names files."""
    return os.fsdecode(text.encode(WIRE_TEXT))


class SystemSurroundings:
    """The grammar's view of this machine, asked while its databases are in reach."""

    @functools.cached_property
    def interfaces(self) -> dict[str, tuple[Endpoint, ...]]:
        """The interfaces' addresses, listed once: each name in a rule might be an interface."""
        return interface_addresses()

    def user_exists(self, name: str) -> bool:
        try:
            pwd.getpwnam(os.fsdecode(name.encode(WIRE_TEXT)))
        except KeyError:
            return False
        return True

    def interface_addresses(self, name: str) -> tuple[Endpoint, ...] | None:
        return self.interfaces.get(name)

    def resolve(self, name: str) -> tuple[Endpoint, ...]:
        try:
            return resolve_name(name)
        except OSError:
            return ()

    def service(self, name: str, protocol: str) -> int | None:
        try:
            return socket.getservbyname(name, protocol)
        except OSError:
            return None

    def cpus(self) -> frozenset[int]:
        return frozenset(range(os.cpu_count() or 1))


# ============================== 9. Sockets ==============================
# Waiting, reading whole messages, listening, connecting; and the one table from errno to
# SOCKS reply.  Every wait ends at a deadline, a point of time.monotonic().

NO_DEADLINE = float("inf")
READ_BYTES = 4096  # one handshake message; the longest is a SOCKS 4A request of 1,290 bytes
MAX_HANDSHAKE_BYTES = 65536  # handshake plus data sent early; more waits in the kernel (back-pressure)
LISTEN_BACKLOG = 4096  # the kernel's own default for net.core.somaxconn
HAPPY_EYEBALLS_SECONDS = 0.25  # RFC 8305 section 5: Connection Attempt Delay
ACCEPT_PAUSE_SECONDS = 0.1  # after the system ran out of descriptors, memory or threads
DOOR_SECONDS = 0.5  # no order waits longer for those who accept clients
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})  # which may pass
IP_ANY = frozenset({"0.0.0.0", "::"})

REPLY_OF_ERRNO = {
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Reply.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Reply.HOST_UNREACHABLE,
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.ECONNRESET: Reply.CONNECTION_REFUSED,
    errno.ETIMEDOUT: Reply.TTL_EXPIRED,
}


def reply_for(error: OSError) -> Reply:
    """Return what a client is told of a failure of the network."""
    return REPLY_OF_ERRNO.get(error.errno or 0, Reply.FAILURE)


def deadline_after(seconds: float) -> float:
    """Return the deadline so many seconds from now; 0 seconds mean never, as in sockd.conf."""
    return time.monotonic() + seconds if seconds else NO_DEADLINE


def poll_milliseconds(deadline: float) -> int | None:
    """Return the time to a deadline for poll(2), rounded up so that it has passed when poll returns."""
    if deadline == NO_DEADLINE:
        return None
    return max(0, min(int((deadline - time.monotonic()) * 1000) + 1, 0x7FFFFFFF))


def wait_for(descriptor: int, events: int, deadline: float) -> int:
    """Wait for poll events on one descriptor; DeadlinePassed if none comes."""
    poller = select.poll()
    poller.register(descriptor, events)
    while True:
        ready = poller.poll(poll_milliseconds(deadline))
        if ready:
            return ready[0][1]
        if time.monotonic() >= deadline:
            raise DeadlinePassed("deadline passed")


def endpoint_of(address: tuple) -> Endpoint:  # type: ignore[type-arg]  # what socket gives
    """Return a socket address of the socket module as an Endpoint; a mapped IPv4 address as IPv4."""
    host, port = address[0], address[1]
    if len(address) == 2:
        return Endpoint(host, port, 4)
    if host.startswith("::ffff:") and "." in host:
        return Endpoint(host[7:], port, 4)
    return Endpoint(host, port, 6)


def socket_address(endpoint: Endpoint) -> tuple:  # type: ignore[type-arg]
    """Return an Endpoint as the socket module wants it, with no name look-up to come.

    A name stays as it is: an upstream is to be asked for what the rules have judged, whatever is in it.
    """
    if endpoint.family != 6:
        return endpoint.host, endpoint.port
    host, _, scope = endpoint.host.partition("%")
    return host, endpoint.port, 0, socket.if_nametoindex(scope) if scope else 0


def with_link(endpoint: Endpoint, connection: socket.socket) -> Endpoint:
    """Return an end of a connection with the link that its address is at, for a socket of its own there.

    Both ends of a connection are at the same (RFC 4007).  OSError if that is gone.
    """
    if not is_link_local(endpoint):
        return endpoint
    link = connection.getsockname()[3]
    return endpoint._replace(host=f"{endpoint.host}%{socket.if_indextoname(link)}")


def send_all(connection: socket.socket, data: bytes, deadline: float) -> None:
    """Send data on a non-blocking socket before a deadline."""
    view = memoryview(data)
    while view:
        try:
            view = view[connection.send(view) :]
        except BlockingIOError:
            wait_for(connection.fileno(), select.POLLOUT, deadline)


class Stream:
    """A client's connection during the handshake: reads whole messages and keeps what is behind them.

    Owned by its session's thread.  `pending` holds bytes read and not yet used; `received` counts all.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pending = bytearray()
        self.received = 0

    def read_message(self, decode: Callable[[bytearray], tuple[T, int] | None], deadline: float) -> T:
        """Return the next message that `decode` recognizes, in however many pieces it comes.

        PeerGone at the end of the stream, DeadlinePassed, ProtocolError from `decode`, or OSError.
        """
        while True:
            found = decode(self.pending) if self.pending else None
            if found is not None:
                del self.pending[: found[1]]
                return found[0]
            self.read_more(deadline)

    def read_more(self, deadline: float) -> None:
        """Add what the client has sent to `pending`."""
        wait_for(self.connection.fileno(), select.POLLIN, deadline)
        data = self.connection.recv(READ_BYTES)
        if not data:
            raise PeerGone("eof from local client")
        self.received += len(data)
        self.pending += data

    def send(self, data: bytes, deadline: float) -> None:
        """Send all of a handshake message."""
        send_all(self.connection, data, deadline)


def option_value(connection: socket.socket, option: SocketOption) -> int | bytes:
    """Return what setsockopt(2) wants for an option: an integer, or one of its structures."""
    if option.level == socket.SOL_SOCKET and option.number == socket.SO_LINGER:
        # 0 is not to linger, as everywhere: with the kernel's other meaning each end would be a reset.
        return struct.pack("=ii", option.value > 0, option.value)
    if option.level == socket.SOL_SOCKET and option.number in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        return struct.pack("@ll", option.value, 0)
    if option.mask:
        return option.value | connection.getsockopt(option.level, option.number) & ~option.mask
    return option.value


# The sockets that the options of a level are for.
LEVEL_FITS: dict[str, Callable[[socket.socket], bool]] = {
    "socket": lambda connection: True,
    "tcp": lambda connection: connection.type == socket.SOCK_STREAM,
    "udp": lambda connection: connection.type == socket.SOCK_DGRAM,
    # As Dante: IPv4 only.
    "ip": lambda connection: connection.family == socket.AF_INET,
}


def set_option(connection: socket.socket, option: SocketOption) -> None:
    """Set one socket option; OSError."""
    connection.setsockopt(option.level, option.number, option_value(connection, option))


SO_BUF_LOCK = 72  # asm-generic/socket.h, since Linux 5.14: which buffers have a fixed size
MOST_WINDOW = 65535 << 14  # the largest there can be (RFC 7323 section 2.3)
BUFFER_SIZES = ((socket.SOL_SOCKET, socket.SO_RCVBUF), (socket.SOL_SOCKET, socket.SO_SNDBUF))
# so_sndbufforce and so_rcvbufforce (asm-generic/socket.h) cannot be asked for; these say what they set.
SIZE_OF_FORCED = {32: socket.SO_SNDBUF, 33: socket.SO_RCVBUF}


def option_key(option: SocketOption) -> tuple[int, int]:
    """Return level and number of the option that says what this one sets."""
    if option.level == socket.SOL_SOCKET:
        return option.level, SIZE_OF_FORCED.get(option.number, option.number)
    return option.level, option.number


def value_to_restore(listener: socket.socket, level: int, number: int) -> bytes:
    """Return what setsockopt(2) takes to bring an option back to what it is now; OSError."""
    value = listener.getsockopt(level, number, 16)
    if (level, number) in BUFFER_SIZES:
        return struct.pack("=i", struct.unpack("=i", value)[0] // 2)  # the kernel doubles what it is given
    if (level, number) == (socket.IPPROTO_TCP, socket.TCP_MAXSEG):
        return bytes(4)  # a listener without one says 536, which as a setting would be a limit
    if (level, number) == (socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP) and not any(value):
        return struct.pack("=i", MOST_WINDOW)  # a listener says 0 where there is none, and takes no 0
    return value


def set_options(
    connection: socket.socket, options: Iterable[SocketOption], side: str
) -> list[tuple[SocketOption, OSError]]:
    """Set the socket options of one side, as far as they are for such a socket; return the failures."""
    failures = []
    for option in options:
        if option.side != side or not LEVEL_FITS[option.level_name](connection):
            continue
        try:
            set_option(connection, option)
        except OSError as error:
            failures.append((option, error))
    return failures


def list_options(config: Config) -> tuple[SocketOption, ...]:
    """Return every socket option of a configuration, each once, in a fixed order."""
    rules = (*config.client_rules, *config.hostid_rules, *config.socks_rules)
    lists = [config.socket_options, *(rule.socket_options for rule in rules)]
    lists += [route.socket_options for route in config.routes]
    return tuple(dict.fromkeys(option for options in lists for option in options))


def describe_option_fault(option: SocketOption, fault: str) -> str:
    return f"could not set {option.side}.{option.level_name}.{option.name}: {fault}"


def prepare_listener(listener: socket.socket, keepalive: bool) -> None:
    """Set what accepted sockets inherit, which saves two calls for each connection; OSError."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(keepalive))
    listener.setblocking(False)


def listen_on(endpoint: Endpoint) -> socket.socket:
    """Return a listening socket; OSError if the address cannot be had."""
    listener = socket.socket(FAMILY_OF[endpoint.family], socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == 6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(socket_address(endpoint))
        listener.listen(LISTEN_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def check_bindable(endpoint: Endpoint) -> None:
    """OSError unless an address is one of this machine's; opens no port (IP_BIND_ADDRESS_NO_PORT)."""
    with socket.socket(FAMILY_OF[endpoint.family], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        probe.bind(socket_address(endpoint))


def is_own_listener(endpoint: Endpoint, listening: Container[Endpoint]) -> bool:
    """Tell whether who connects to an endpoint would come to one of these listeners."""
    if endpoint in listening:
        return True
    if Endpoint("0.0.0.0" if endpoint.family == 4 else "::", endpoint.port, endpoint.family) not in listening:
        return False
    try:
        check_bindable(endpoint._replace(port=0))
    except OSError:
        return False
    return True


def bind_external(outgoing: socket.socket, external: Endpoint, client: Endpoint) -> None:
    """Bind a socket to an outgoing address, on the client's unprivileged port if that can be had."""
    if client.port >= 1024 and client.host != external.host:
        try:
            outgoing.bind(socket_address(external._replace(port=client.port)))
            return
        except OSError:
            pass  # taken: any other port will do
    if outgoing.type == socket.SOCK_STREAM:
        # The port is then chosen at connect(2), by the whole four-tuple: many more fit.
        outgoing.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    outgoing.bind(socket_address(external._replace(port=0)))


def keep_errors(outgoing: socket.socket) -> None:
    """Have the kernel tell of what comes back for the datagrams that a socket sends (ip(7), IP_RECVERR)."""
    level, number = RECVERR[socket.AddressFamily(outgoing.family)]
    outgoing.setsockopt(level, number, 1)


def take_error(outgoing: socket.socket) -> tuple[Endpoint, int] | None:
    """Return where a datagram was sent, and the errno that came back for it; None if nothing did."""
    try:
        _, ancillary, _, address = outgoing.recvmsg(0, 512, socket.MSG_ERRQUEUE)
    except OSError:
        return None
    for level, number, data in ancillary:
        if (level, number) == RECVERR[socket.AddressFamily(outgoing.family)]:
            return endpoint_of(address), int(struct.unpack_from("=I", data)[0])
    return endpoint_of(address), 0


def open_external(
    external: Endpoint,
    client: Endpoint,
    kind: socket.SocketKind,
    bind_privileged: Callable[[Endpoint, str], socket.socket | None],
) -> socket.socket:
    """Return a non-blocking socket bound to an outgoing address, on the client's own port if that can be had.

    As Dante: a client's source port is kept where it is free, a privileged one only with
    compatibility: sameport, which is what `bind_privileged` asks for.
    """
    if 0 < client.port < 1024:
        bound = bind_privileged(
            external._replace(port=client.port), "tcp" if kind == socket.SOCK_STREAM else "udp"
        )
        if bound is not None:
            bound.setblocking(False)
            return bound
    outgoing = socket.socket(FAMILY_OF[external.family], kind | socket.SOCK_NONBLOCK)
    try:
        bind_external(outgoing, external, client)
        return outgoing
    except BaseException:
        outgoing.close()
        raise


PORT_ATTEMPTS = 512  # of a range that is larger, so many ports are tried


def bind_within(outgoing: socket.socket, external: Endpoint, test: PortTest) -> None:
    """Bind a socket to an address and a port that passes a `port` clause; OSError."""
    ports = list(port_candidates(test))
    start = int.from_bytes(os.urandom(4), "big") % len(ports)
    tried = (ports[start:] + ports[:start])[:PORT_ATTEMPTS]
    for reuse in (0, 1):
        # A port that an ended connection still keeps comes second, for it may go to the same target.
        outgoing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        for port in tried:
            try:
                outgoing.bind(socket_address(external._replace(port=port)))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        if outgoing.type != socket.SOCK_STREAM:
            break
    raise OSError(errno.EADDRINUSE, "no free port in the range of redirect from")


def open_redirected(external: Endpoint, kind: socket.SocketKind, test: PortTest) -> socket.socket:
    """Return a non-blocking socket on an address and port that `redirect from` demands; OSError."""
    outgoing = socket.socket(FAMILY_OF[external.family], kind)
    try:
        outgoing.setblocking(False)
        bind_within(outgoing, external, test)
        return outgoing
    except BaseException:
        outgoing.close()
        raise


def bind_first(external: Endpoint, ports: Sequence[int]) -> socket.socket:
    """Return a stream socket on the first of the ports that can be had; OSError from the last."""
    listener = socket.socket(FAMILY_OF[external.family], socket.SOCK_STREAM)
    try:
        for port in ports[:-1]:
            try:
                listener.bind(socket_address(external._replace(port=port)))
                return listener
            except OSError:
                continue  # taken
        listener.bind(socket_address(external._replace(port=ports[-1])))
        return listener
    except OSError:
        listener.close()
        raise


def route_source(target: Endpoint) -> Endpoint:
    """Return the source address that the kernel's routes choose for a target.

    Refused if there is no route.
    """
    try:
        with socket.socket(FAMILY_OF[target.family], socket.SOCK_DGRAM) as probe:
            probe.connect(socket_address(target._replace(port=target.port or 9)))
            return endpoint_of(probe.getsockname())._replace(port=0)
    except OSError as error:
        raise Refused(f"no route to {target}: {error.strerror}", reply_for(error)) from None


# Addresses for documentation (RFC 5737, RFC 3849): what leads to them is the default route.
ELSEWHERE = {4: Endpoint("192.0.2.1", 9, 4), 6: Endpoint("2001:db8::1", 9, 6)}


def has_wildcard(externals: Iterable[Endpoint]) -> bool:
    return any(external.host in IP_ANY for external in externals)


def choose_by_route(externals: tuple[Endpoint, ...], family: int, target: Endpoint) -> Endpoint | None:
    """Return the address that the kernel would leave by, or None where any of the external ones will do.

    For a target that is not known yet (BIND for anybody) that is so, but for a wildcard it is that of the
    default route.  Refused if there is no route.
    """
    known = target.family != 0 and target.host not in IP_ANY
    if not known and not has_wildcard(externals):
        return None
    return route_source(target if known else ELSEWHERE[family])


class NoExternal(Refused):
    """No outgoing address fits."""

    def __init__(self, config: Config, chosen: Endpoint | None, client: Endpoint, target: Endpoint) -> None:
        use = f"for forwarding from our local client {client} to target {describe_endpoint(target)}"
        if chosen is None:
            fault = f"none of the addresses configured on our external interface(s) can be used {use}"
        else:
            fault = (
                f"using external.rotation = {config.external_rotation}, local address {chosen.host} was "
                f"selected {use}, but that local address is not set on our external interface(s)"
            )
        super().__init__(f"{fault}.  Configuration error in {config.file}?", Reply.NETWORK_UNREACHABLE)


def choose_external(
    config: Config, family: int, session: tuple[Endpoint, Endpoint], target: Endpoint, lookup: Lookup
) -> Endpoint:
    """Return the outgoing address for a session (sockd.conf(5), external.rotation).

    `session` is its client, and the address that this came in on.  NoExternal where there is none that fits.
    """
    client, internal = session
    externals = external_endpoints(config, family, lookup)
    chosen = None
    if config.external_rotation == "same-same":
        chosen = internal
    elif config.external_rotation == "route":
        chosen = choose_by_route(externals, family, target)
        if chosen is not None and has_wildcard(externals):
            return chosen
    if chosen is not None:
        externals = tuple(e for e in externals if bare_host(e) == chosen.host)
    if not externals:
        raise NoExternal(config, chosen, client, target)
    return externals[0]


class ConnectFailed(SockdError):
    """A connection to a target could not be made.

    `at_once` tells a refusal by our own kernel from an answer of the network: Dante logs the
    two differently.  `source` is the address that we would have left by.
    """

    def __init__(self, error: OSError, source: Endpoint, target: Endpoint, at_once: bool) -> None:
        super().__init__(f"connect(2) to {target} from {source} failed: {error.strerror}")
        self.error = error
        self.source = source
        self.target = target
        self.at_once = at_once


class ConnectTimeout(DeadlinePassed):
    """No target answered within timeout.connect."""

    def __init__(self, source: Endpoint, target: Endpoint) -> None:
        super().__init__("connect timeout")
        self.source = source
        self.target = target


class Attempt(NamedTuple):
    """A connect(2) under way."""

    connection: socket.socket
    target: Endpoint


def start_connect(connection: socket.socket, target: Endpoint) -> int:
    """Begin to connect; return the errno of connect(2), EINPROGRESS as a rule.

    Not by connect(), whose exception for that would cost more than the call.
    """
    try:
        return connection.connect_ex(socket_address(target))
    except OSError as error:  # of the scope of an address, which names no interface
        return error.errno or errno.EINVAL


def start_attempt(target: Endpoint, open_for: Callable[[Endpoint], socket.socket]) -> Attempt:
    """Begin to connect; `open_for(target)` gives the bound socket.  ConnectFailed at once, or Refused."""
    connection = open_for(target)
    try:
        number = start_connect(connection, target)
        if number not in (0, errno.EINPROGRESS):
            source = endpoint_of(connection.getsockname())
            raise ConnectFailed(OSError(number, os.strerror(number)), source, target, at_once=True)
        return Attempt(connection, target)
    except BaseException:
        connection.close()
        raise


def finish_attempt(attempt: Attempt, events: int) -> None:
    """ConnectFailed unless the attempt, which poll says is over, has succeeded."""
    if events == select.POLLOUT:
        return  # what failed would have an error, too
    number = attempt.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        source = endpoint_of(attempt.connection.getsockname())
        raise ConnectFailed(OSError(number, os.strerror(number)), source, attempt.target, at_once=False)


class Race:
    """Connecting to one of several addresses of a target (RFC 8305, without its sorting).

    A new attempt starts when the last one has failed or has had its head start; the first to
    succeed wins and the others are closed.  Owned by its session's thread, which calls `run` once.
    """

    def __init__(
        self,
        targets: Sequence[Endpoint],
        open_for: Callable[[Endpoint], socket.socket],
        client: int,
        deadline: float,
    ) -> None:
        self.waiting = list(targets)
        self.open_for = open_for
        self.client = client  # descriptor: a reset by the client ends the race
        self.deadline = deadline
        self.attempts: dict[int, Attempt] = {}
        self.failure: SockdError | OSError | None = None
        self.poller = select.poll()

    def run(self) -> Attempt:
        """Return the attempt that has won; ConnectFailed, Refused, ConnectTimeout, PeerGone or OSError."""
        self.poller.register(self.client, 0)
        winner = None
        try:
            while winner is None:
                if self.waiting:
                    self._start_next()
                if self.attempts:
                    winner = self._wait()
                elif not self.waiting:
                    assert self.failure is not None
                    raise self.failure
            return winner
        finally:
            for attempt in self.attempts.values():
                if attempt is not winner:
                    attempt.connection.close()

    def _start_next(self) -> None:
        target = self.waiting.pop(0)
        try:
            attempt = start_attempt(target, self.open_for)
        except (ConnectFailed, Refused) as failure:
            self.failure = failure
            return
        except OSError as error:
            if error.errno in SHORTAGES:
                raise
            # An address of ours has gone, say: those of the other family may be there.  What the network
            # has answered elsewhere says more.
            self.failure = self.failure or error
            return
        self.attempts[attempt.connection.fileno()] = attempt
        self.poller.register(attempt.connection.fileno(), select.POLLOUT)

    def _wait(self) -> Attempt | None:
        """Wait until an attempt is over or the next may start; return the winner if there is one."""
        limit = (
            min(self.deadline, time.monotonic() + HAPPY_EYEBALLS_SECONDS) if self.waiting else self.deadline
        )
        events = self.poller.poll(poll_milliseconds(limit))
        if not events and time.monotonic() >= self.deadline:
            attempt = next(reversed(self.attempts.values()))
            source = endpoint_of(attempt.connection.getsockname())
            raise ConnectTimeout(source, attempt.target)
        for descriptor, mask in events:
            if descriptor == self.client:
                raise PeerGone("local client closed")
            attempt = self.attempts.pop(descriptor)
            self.poller.unregister(descriptor)
            try:
                finish_attempt(attempt, mask)
                return attempt
            except ConnectFailed as failure:
                self.failure = failure
                attempt.connection.close()
        return None


# ============================== 10. Privileges ==============================
# The only place that forks, changes root or identity; and the way in which a process without
# power asks one that has it.  The picture:
#
#   mother (as started) --fork--> warden    (user.privileged)    passwords, privileged ports
#                       --fork--> resolver  (user.unprivileged)  names, groups, interfaces
#                       --fork--> worker(s) (user.unprivileged, chroot, no signals)   the clients
#
# A worker asks by one message to an inbox that warden or resolver reads, with a fresh socket for
# the answer attached: nothing is shared between questions, a helper that dies is replaced without
# anybody noticing, and a question has a deadline.  The asker is not trusted: each message is bounded and
# typed, its sender named by the kernel, and who sends a malformed one is reported to the mother.

MAX_MESSAGE_BYTES = 4096  # the largest is a password check: two times 255 bytes and some words
MAX_TOKEN_MESSAGE_BYTES = GSSAPI_MAX + 4096  # but for those with a token of GSS-API
MAX_FIELD_BYTES = 65535
FOUND_BORDER = b"\0"  # between what a look-up has found: all of it is one field, which has room for more
VERIFY_SECONDS = 60  # a PAM module that takes longer is ended
MOST_GUESSED = 65536  # descriptors looked at where there is no /proc to list them
IMPATIENT_SECONDS = 0.1


class Favour(enum.IntEnum):
    """All that a worker can ask for."""

    RESOLVE = 1  # (name, families) -> addresses
    REVERSE = 2  # (address) -> names
    INTERFACE = 3  # (name) -> addresses
    GROUPS = 4  # (user) -> group names; no answer if there is no such user
    PASSWORD = 5  # (method, service, user, password, source, local) -> ("" or why not)
    BIND = 6  # (tcp or udp, address, port) -> a bound socket
    WRAP = 7  # (hosts_access, client or socks, number of the rule; a connection) -> ("" or why not)
    ACCEPT = 8  # (number of the client-rule, token) -> ("" or why not, token, principal, context)
    OPTION = 9  # (number in list_options; a socket) -> ("" or why it could not be set)
    INITIATE = 10  # (an UpstreamService) -> ("" or why not, token); (its token) -> ("" or why not, context)


class Account(NamedTuple):
    """A system account, looked up while its databases are still in reach."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


# user.privileged, user.unprivileged and user.libwrap; None where we stay who we are, or need none.
Accounts = tuple[Account | None, Account | None, Account | None]


def find_account(name: str) -> Account:
    """Return a system account; ConfigError if there is none of that name."""
    try:
        entry = pwd.getpwnam(os.fsdecode(name.encode(WIRE_TEXT)))
    except KeyError:
        raise ConfigError(f'there is no user "{name}" on this system') from None
    groups = group_numbers(name.encode(WIRE_TEXT), entry.pw_gid)
    return Account(name, entry.pw_uid, entry.pw_gid, groups)


# A terminal's or service manager's signal to the whole group is for the mother to act on.
INHERITED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1)


def check_powerless() -> None:
    """Prove that there is no way back to root."""
    attempts: tuple[Callable[[], None], ...] = (
        lambda: os.setresuid(0, 0, 0),
        lambda: os.setresgid(0, 0, 0),
        lambda: os.setgroups([0]),
    )
    for attempt in attempts:
        try:
            attempt()
        except PermissionError:
            continue
        raise PermissionError(errno.EPERM, "privileges came back after they were dropped")


def check_jail(root: str) -> None:
    """ConfigError unless we can make a directory our root."""
    if root and not os.path.isdir(root):
        raise ConfigError(f'cannot chroot to "{root}": there is no such directory')
    if root and os.geteuid() != 0:
        raise ConfigError(f'cannot chroot to "{root}": only root can (chroot, --chroot)')


def become_privileged(account: Account, powers: int) -> None:
    """Take the identity of user.privileged, keeping the capabilities of a mask as far as we have them."""
    if account.uid == 0:
        return
    prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups(list(account.groups))
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    set_capabilities(powers & held_capabilities())


def become_commander(account: Account | None) -> None:
    """Take the identity of user.libwrap for good, and the signals that a command expects.

    Unlike Dante, which changes the effective user only: its commands run as root.
    """
    for number in (*INHERITED_SIGNALS, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if account is not None and os.geteuid() == 0:
        os.setgroups(list(account.groups))
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
    elif os.geteuid() != 0:
        set_capabilities(0)


def drop_privileges(account: Account | None, root: str) -> None:
    """Give up root directory and identity for good; OSError or PermissionError if that fails.

    Each step needs the power that a later one takes away, so their order is the content.
    """
    if root:
        os.chroot(root)
        os.chdir("/")
    if account is not None and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
        if account.uid != 0:
            check_powerless()
    if os.geteuid() != 0 and held_capabilities():
        set_capabilities(0)  # ambient ones, lent to a user who is not root (systemd.exec(5))
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def become_reader(account: Account | None) -> None:
    """Give up identity and power in a child that goes on to read an enemy's bytes; OSError."""
    drop_privileges(account, "")
    set_capabilities(0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # again: a change of identity ends it


# What Python imports only when it is first needed, and who needs it.
LATE_IMPORTS = {
    "encodings.ascii": "a file of text",
    "encodings.latin_1": "names of users and hosts",
    "traceback": "an error that nobody catches in a thread",
    "linecache": "traceback",
}


def preload() -> None:
    """Import now what would be imported on first use, when there may be no file system left."""
    for module in LATE_IMPORTS:
        importlib.import_module(module)
    time.localtime()  # reads /etc/localtime
    os.strerror(errno.ECONNREFUSED)  # loads the message catalogue where there is one


def note_alarm(number: int, frame: object) -> None:
    """Do nothing: the signal has already ended what was waited for."""


class Impatience:
    """Has no close(2) of a descriptor that a worker has passed to us wait for longer than a moment.

    It would wait for as long as the worker has set by SO_LINGER, also in recvmsg(2) and for a socket that
    only lies in another one's queue.  A signal ends that.  Needs the handler note_alarm, and the main thread.
    """

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, IMPATIENT_SECONDS, IMPATIENT_SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def spawn(body: Callable[[socket.socket], int], keep: Iterable[int] = ()) -> tuple[int, socket.socket]:
    """Fork a child that runs body(its control socket) and exits; return its pid and our control socket.

    The caller has one thread.  The child starts with the default signal handlers; it ends by os._exit,
    so nothing that the parent has buffered or registered runs twice.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    status = 1
    try:
        ours.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, note_alarm)
        for number in INHERITED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        for descriptor in keep:
            os.close(descriptor)
        status = body(theirs)
    finally:
        os._exit(status)


def encode_message(kind: int, fields: Sequence[bytes]) -> bytes:
    """Return a message between our processes: kind, number of fields, and each with its length."""
    parts = [struct.pack("!BB", kind, len(fields))]
    parts += [struct.pack("!H", len(field)) + field for field in fields]
    return b"".join(parts)


def decode_message(data: bytes) -> tuple[int, list[bytes]]:
    """Return (kind, fields) of a message; ProtocolError if it is not exactly one message.

    >>> decode_message(encode_message(2, [b"127.0.0.1", b""]))
    (2, [b'127.0.0.1', b''])
    """
    if len(data) < 2:
        raise ProtocolError("message without a head")
    kind, count = data[0], data[1]
    fields, at = [], 2
    for _ in range(count):
        if at + 2 > len(data):
            raise ProtocolError("message ends within a length")
        end = at + 2 + (data[at] << 8 | data[at + 1])
        if end > len(data):
            raise ProtocolError("message ends within a field")
        fields.append(data[at + 2 : end])
        at = end
    if at != len(data):
        raise ProtocolError("message goes on behind its last field")
    return kind, fields


def encode_endpoints(endpoints: Iterable[Endpoint]) -> list[bytes]:
    return [f"{e.family} {e.host}".encode("latin-1") for e in endpoints]


def decode_endpoints(fields: Iterable[bytes]) -> tuple[Endpoint, ...]:
    found = []
    for field in fields:
        family, _, host = field.decode("latin-1").partition(" ")
        found.append(Endpoint(host, 0, int(family)))
    return tuple(found)


def check_text(field: bytes) -> None:
    """ProtocolError unless a field is a name or a password as they come from the wire."""
    if len(field) > 255 or 0 in field:
        raise ProtocolError("a text of more than 255 bytes, or with a NUL")


def check_token(field: bytes) -> None:
    """Accept every field: it is as long as a token of RFC 1961 may be, and has no form."""


def check_digits(field: bytes) -> None:
    """ProtocolError unless a field is a short row of digits, or empty."""
    if field and (not field.isdigit() or len(field) > 5):
        raise ProtocolError("not a small number")


def check_host(field: bytes) -> None:
    """ProtocolError unless a field is an IP address, with or without a scope."""
    check_text(field)
    host = field.decode(WIRE_TEXT).partition("%")[0]
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except (OSError, UnicodeError):
        raise ProtocolError("not an IP address") from None


def check_address(field: bytes) -> None:
    """ProtocolError unless a field is what encode_endpoints makes of an address."""
    family, _, host = field.partition(b" ")
    check_host(host)
    if family != (b"6" if b":" in host else b"4"):
        raise ProtocolError("not the family of the address")


# What each field of a question has to be.
FAVOUR_FIELDS: dict[Favour, tuple[Callable[[bytes], None], ...]] = {
    Favour.RESOLVE: (check_text, check_digits),
    Favour.REVERSE: (check_address,),
    Favour.INTERFACE: (check_text,),
    Favour.GROUPS: (check_text,),
    Favour.PASSWORD: (check_text, check_text, check_text, check_text, check_host, check_host),
    Favour.BIND: (check_text, check_address, check_digits),
    Favour.WRAP: (check_text, check_digits),
    Favour.ACCEPT: (check_digits, check_token),
    Favour.OPTION: (check_digits,),
    Favour.INITIATE: (check_token, check_token),
}
# How many descriptors come with a question, the socket for the answer among them, where it is not alone.
FAVOUR_DESCRIPTORS = {Favour.WRAP: 2, Favour.OPTION: 2}


class HelperFailed(SockdError):
    """A helper cannot be asked, or has died over the question."""


class HelperLate(DeadlinePassed):
    """A helper has not answered in time."""


NO_ANSWER = 1  # the kind of a message that says why there is none; an answer's is 0

CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid (linux/socket.h)


def read_ancillary(ancillary: Iterable[tuple[int, int, bytes]]) -> tuple[int, list[int]]:
    """Return the sender's pid, which the kernel vouches for, and the descriptors that it has sent."""
    pid = 0
    descriptors: list[int] = []
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = CREDENTIALS.unpack(value)[0]
        elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors += struct.unpack(f"={len(value) // 4}i", value[: len(value) // 4 * 4])
    return pid, descriptors


def receive_descriptors(connection: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """Receive a message and at most so many descriptors with it, which no program inherits; OSError.

    In place of socket.recv_fds, which takes flags and forgets them.
    """
    space = socket.CMSG_LEN(4 * most)
    data, ancillary, _, _ = connection.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    return data, read_ancillary(ancillary)[1]


def send_descriptors(connection: socket.socket, message: bytes, descriptors: Sequence[int]) -> None:
    """Send a message, with these descriptors if any, without waiting for room; OSError.

    In place of socket.send_fds, which takes flags and forgets them.
    """
    packed = struct.pack(f"={len(descriptors)}i", *descriptors)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if descriptors else []
    connection.sendmsg([message], rights, socket.MSG_DONTWAIT)


class Dialogue:
    """A question under way.  Its owner closes it."""

    def __init__(self, favour: Favour, ours: socket.socket) -> None:
        self.purpose = favour.name.lower()
        self.ours = ours

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()

    def hear(self, seconds: float) -> tuple[list[bytes], list[int]]:
        """Return an answer and the descriptors with it; DeadlinePassed, HelperFailed."""
        self.ours.settimeout(seconds)
        try:
            data, descriptors = receive_descriptors(self.ours, MAX_TOKEN_MESSAGE_BYTES, 1)
        except TimeoutError:
            raise HelperLate(f"no answer to {self.purpose} within {seconds:.0f} seconds") from None
        except OSError as error:
            raise HelperFailed(f"cannot ask to {self.purpose}: {error.strerror}") from None
        if not data:
            raise HelperFailed(f"the process asked to {self.purpose} has died")
        kind, fields = decode_message(data)
        if kind == NO_ANSWER:
            raise HelperFailed(b" ".join(fields).decode("utf-8", "replace"))
        return fields, descriptors

    def tell(self, *fields: bytes) -> None:
        """Add to a question what an answer has asked for; HelperFailed."""
        try:
            self.ours.send(encode_message(0, fields))
        except OSError as error:
            raise HelperFailed(f"cannot ask to {self.purpose}: {error.strerror}") from None


class Channel:
    """The asking side of an inbox.  Shared by all threads of a worker: a question holds no state here."""

    def __init__(self, inbox: socket.socket) -> None:
        self.inbox = inbox

    def ask(
        self, favour: Favour, fields: Sequence[bytes], seconds: float, *passed: int
    ) -> tuple[list[bytes], list[int]]:
        """Return the answer to a question and the descriptors that came with it, which the caller owns.

        `passed` are descriptors to show to the helper, which gets copies.  DeadlinePassed when it takes
        longer than `seconds`; HelperFailed when the helper died over it, or no descriptor is left.
        """
        with self.begin(favour, fields, seconds, *passed) as dialogue:
            return dialogue.hear(seconds)

    def begin(self, favour: Favour, fields: Sequence[bytes], seconds: float, *passed: int) -> Dialogue:
        """Ask, as `ask` does, and return where the answers will be heard."""
        for check, field in zip(FAVOUR_FIELDS[favour], fields, strict=True):
            check(field)  # here, so that no hostile name makes a helper take us for hijacked
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise HelperFailed(f"cannot ask to {favour.name.lower()}: {error.strerror}") from None
        try:
            with theirs:
                self._send(encode_message(favour, fields), (theirs.fileno(), *passed), seconds)
            return Dialogue(favour, ours)
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise HelperFailed(f"cannot ask to {favour.name.lower()}: {error.strerror}") from None
            if isinstance(error, DeadlinePassed):
                raise HelperLate(f"no room to ask to {favour.name.lower()}: {error}") from None
            raise

    def _send(self, message: bytes, descriptors: tuple[int, ...], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                send_descriptors(self.inbox, message, descriptors)
                return
            except BlockingIOError:
                wait_for(self.inbox.fileno(), select.POLLOUT, deadline)


class Question(NamedTuple):
    """A question as a helper reads it.  `answer` is closed by whoever answers, `passed` as well."""

    favour: Favour
    fields: list[bytes]
    answer: socket.socket
    passed: tuple[int, ...] = ()  # descriptors that the asker shows us

    def reply(self, fields: Sequence[bytes], descriptors: Sequence[int] = (), kind: int = 0) -> None:
        """Answer and close; an asker that has given up is no error."""
        with self.answer:
            try:
                # An asker that has filled its own socket is not waited for.
                send_descriptors(self.answer, encode_message(kind, fields), descriptors)
            except OSError:
                pass

    def fail(self, text: str) -> None:
        """Say why there is no answer, which is not the same as an answer that says no: HelperFailed."""
        self.reply([text.encode("utf-8", "replace")[:255]], kind=NO_ANSWER)

    def is_void(self) -> bool:
        """Tell whether nobody waits for the answer any more."""
        poller = select.poll()
        poller.register(self.answer.fileno(), 0)
        return bool(poller.poll(0))

    def consult(self, fields: Sequence[bytes]) -> bytes:
        """Answer, and return what the asker adds to its question; OSError, ProtocolError if it has gone."""
        send_descriptors(self.answer, encode_message(0, fields), ())
        _, added = decode_message(self.answer.recv(MAX_TOKEN_MESSAGE_BYTES))
        if len(added) != 1:
            raise ProtocolError("not one field more")
        return added[0]


class InboxEnded(SockdError):
    """A worker has shut down the inbox that all share: nobody can ask any more."""


class MalformedMessage(ProtocolError):
    """A worker sent what no worker of ours sends; `pid` is the kernel's word for who."""

    def __init__(self, text: str, pid: int) -> None:
        super().__init__(text)
        self.pid = pid


def check_room(flags: int, descriptors: Sequence[int]) -> None:
    """BlockingIOError where this process has no descriptor left to answer by: no fault of the asker's.

    The asker sees that there will be no answer.
    """
    if flags & socket.MSG_CTRUNC and len(descriptors) < max(FAVOUR_DESCRIPTORS.values()):
        for descriptor in descriptors:
            os.close(descriptor)
        raise BlockingIOError(errno.EMFILE, os.strerror(errno.EMFILE))


def receive_question(inbox: socket.socket, granted: frozenset[Favour]) -> Question:
    """Read one question from an inbox that has SO_PASSCRED set; MalformedMessage if it is none."""
    space = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(4 * max(FAVOUR_DESCRIPTORS.values()))
    # MSG_DONTWAIT: between poll and here another helper may have taken the question.
    how = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    most = MAX_TOKEN_MESSAGE_BYTES if Favour.ACCEPT in granted else MAX_MESSAGE_BYTES
    data, ancillary, flags, _ = inbox.recvmsg(most, space, how)
    if not data and not ancillary:  # an empty message would have its sender's credentials
        raise InboxEnded("the inbox was shut down")
    pid, descriptors = read_ancillary(ancillary)
    check_room(flags, descriptors)
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not descriptors:
            raise ProtocolError("message too long, or with too many descriptors or none")
        kind, fields = decode_message(data)
        if kind not in granted or len(fields) != len(FAVOUR_FIELDS[Favour(kind)]):
            raise ProtocolError(f"message of unknown kind {kind} with {len(fields)} fields")
        for check, field in zip(FAVOUR_FIELDS[Favour(kind)], fields, strict=True):
            check(field)
        if len(descriptors) != FAVOUR_DESCRIPTORS.get(Favour(kind), 1):
            raise ProtocolError(f"message of kind {kind} with {len(descriptors)} descriptors")
        answer = socket.socket(fileno=descriptors[0])
        del descriptors[0]
        if answer.family != socket.AF_UNIX:
            answer.close()
            raise ProtocolError("the answer is to go to a socket of the network")
        passed = tuple(descriptors)
        descriptors.clear()
        return Question(Favour(kind), fields, answer, passed)
    except (ProtocolError, OSError) as error:
        raise MalformedMessage(str(error), pid) from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def make_inbox() -> tuple[socket.socket, socket.socket]:
    """Return (the end that helpers read, the end that workers write)."""
    read_end, write_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read_end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return read_end, write_end


def close_inbox(inbox: tuple[socket.socket, socket.socket]) -> None:
    """Close both ends of an inbox, and what still lies in it."""
    with Impatience():
        for end in inbox:
            end.close()


def keep_only(kept: Container[int]) -> None:
    """Close every descriptor but the standard ones and these.

    Nobody is to hold what is none of his business, least of all who reads an enemy's bytes.
    """
    try:
        opened: Iterable[int] = map(int, os.listdir("/proc/self/fd"))
    except OSError:
        opened = range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], MOST_GUESSED))
    for descriptor in opened:
        if descriptor > 2 and descriptor not in kept:
            os.closerange(descriptor, descriptor + 1)  # the one that listed them has gone already


def is_traced(pid: int, status: int) -> bool:
    """Tell whether waitpid(2) gives a child that has not ended, and end that.

    Nobody here stops to be watched: it has made us its tracer (ptrace(2)) to lead us by the nose.
    """
    if not os.WIFSTOPPED(status):
        return False
    os.kill(pid, signal.SIGKILL)  # which a thread's number does for its process, too
    return True


SAID_NO = 1  # the exit status of a check that came to its end


def fork_verifier(body: Callable[[], bool]) -> int:
    """Fork a child that runs a check and ends, at the latest after VERIFY_SECONDS.

    Return its pid; its exit status will be 0 if the check said yes, and SAID_NO if it said no.
    """
    pid = os.fork()
    if pid:
        return pid
    status = SAID_NO + 1
    try:
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.alarm(VERIFY_SECONDS)
        status = 0 if body() else SAID_NO
    finally:
        os._exit(status)


def is_said_in_child(check: Callable[[], bool]) -> bool:
    """Tell what a check says, without what else it does to its process; OSError."""
    _, status = os.waitpid(fork_verifier(check), 0)
    return status == 0


# ============================== 11. Authentication ==============================
# Who is this?  The verifying half runs in the warden, which has the power to read the system's
# accounts; the asking half in a session.  A password lives only until it was checked: the
# warden verifies in a child process that then ends.

SHADOW_FILE = "/etc/shadow"
PASSWD_FILE = "/etc/passwd"
SECONDS_PER_DAY = 86400
MOST_KEYTAB_BYTES = 1 << 20  # some thousand keys
PAM_TTY, PAM_RHOST, PAM_RUSER, PAM_XDISPLAY = 3, 4, 8, 11  # security/_pam_types.h
# PAM_OPEN_ERR, _SYMBOL_ERR, _SERVICE_ERR, _SYSTEM_ERR, _BUF_ERR, _AUTHINFO_UNAVAIL, _ABORT, _MODULE_UNKNOWN
PAM_OWN_FAULTS = frozenset({1, 2, 3, 4, 5, 9, 26, 28})  # security/_pam_types.h
IDENT_PORT = 113  # RFC 1413
IDENT_SECONDS = 10.0  # As Dante.
IDENT_BYTES = 1000  # RFC 1413 section 4: a reply has at most 1000 characters
DUMMY_SETTING = b"$6$sockdsockdsockd."  # for users that do not exist: the work must be the same
FREE_FAILURES = 10  # wrong log-ins in a row that cost nothing: people mistype
FORGET_SECONDS = 60.0  # after so long without a wrong log-in a source starts afresh
PENALTY_SECONDS = 1.0  # from then on, between two log-ins of one source
MOST_WAIT_SECONDS = 10.0  # who would have to wait longer is refused at once
MOST_SOURCES = 4096  # remembered; the one that was quiet for longest is forgotten first


class Failures:
    """Wrong log-ins by source, bounded in number.  Owned by the warden; the clock is passed in.

    A source is an IPv4 address or an IPv6 /64, which is what one attacker has.
    """

    def __init__(self) -> None:
        # source -> (failures in a row, time of the last one, when the next log-in may be checked)
        self.sources: dict[str, tuple[int, float, float]] = {}

    @staticmethod
    def find_source(host: str) -> str:
        """Return the source that a client's address belongs to.

        >>> Failures.find_source("2001:db8::1"), Failures.find_source("192.0.2.1")
        ('2001:db8::/64', '192.0.2.1')
        """
        if ":" not in host:
            return host
        network = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8] + bytes(8)
        return f"{socket.inet_ntop(socket.AF_INET6, network)}/64"

    def note(self, host: str, now: float) -> bool:
        """Remember a wrong log-in; return whether its source is slowed down from now on."""
        source = self.find_source(host)
        failures, last, free = self.sources.pop(source, (0, now, now))
        failures = failures + 1 if now - last < FORGET_SECONDS else 1
        if len(self.sources) >= MOST_SOURCES:
            del self.sources[next(iter(self.sources))]
        self.sources[source] = failures, now, free
        return failures == FREE_FAILURES

    def claim(self, host: str, now: float) -> float:
        """Return how many seconds a log-in has to wait for its turn."""
        source = self.find_source(host)
        failures, last, free = self.sources.get(source, (0, now, now))
        if failures < FREE_FAILURES or now - last >= FORGET_SECONDS:
            return 0.0
        wait = max(0.0, free - now)
        if wait <= MOST_WAIT_SECONDS:
            self.sources[source] = failures, last, max(free, now) + PENALTY_SECONDS
        return wait


SALT_LETTERS = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def make_setting() -> bytes:
    """Return a fresh setting for crypt(3): the system's preferred one, or sha512's where it names none."""
    gensalt = getattr(crypt_library(), "crypt_gensalt", None)
    if gensalt is not None:
        gensalt.restype = ctypes.c_char_p
        setting: bytes | None = gensalt(None, 0, None, 0)
        if setting:
            return setting
    return b"$6$" + bytes(SALT_LETTERS[byte & 63] for byte in os.urandom(16))


def replace_file(path: str, data: bytes, state: os.stat_result | None) -> None:
    """Put data in the place of a file, whose owner and mode stay; OSError, and then all is as it was."""
    new = f"{path}.new.{os.getpid()}"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            if state is not None:
                os.fchown(descriptor, state.st_uid, state.st_gid)
                os.fchmod(descriptor, state.st_mode & 0o777)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(new, path)
    except BaseException as error:  # Ctrl-C as well
        os.unlink(new)
        if isinstance(error, OSError) and error.errno == errno.EBUSY:
            text = "it is mounted by itself, so it cannot be replaced: mount the directory that it is in"
            raise OSError(errno.EBUSY, text, path) from None
        raise


def add_account(path: str, user: bytes, password: bytes) -> None:
    """Write an account into a password file, in the place of one of the same name; OSError.

    The file is replaced as a whole, so a server never reads half of it.  A link to it stays.
    """
    path = os.path.realpath(path)
    line = user + b":" + crypt(password, make_setting())
    try:
        with open(path, "rb") as file:
            data, state = file.read().removesuffix(b"\n"), os.fstat(file.fileno())
    except FileNotFoundError:
        data, state = b"", None
    kept = [old for old in data.split(b"\n") if old.strip().partition(b":")[0] != user] if data else []
    replace_file(path, b"\n".join([*kept, line, b""]), state)


def find_account_fault(user: bytes) -> str:
    """Say why nobody could log in by a name, or "" if somebody can; see parse_account_lines."""
    if not 1 <= len(user) <= 255 or set(user) & set(b":\n\r\0#"):  # RFC 1929 section 2
        return 'a user name has 1 to 255 bytes, and no ":", "#" or line end'
    return "a user name neither begins nor ends with a blank" if user != user.strip() else ""


def find_password_fault(password: bytes) -> str:
    """Say why nobody could log in with a password, or "" if somebody can; see verify_username."""
    if not 1 <= len(password) <= 255:  # RFC 1929 section 2
        return "a password has 1 to 255 bytes"
    return "a password has no NUL" if 0 in password else ""


class AccountLine(NamedTuple):
    """One line of a password file: shadow(5), or `user:hash` with nothing behind."""

    hash: bytes
    expires_day: int | None = None  # days since 1970; the account's end
    unusable_day: int | None = None  # the day on which an unchanged password locks the account


def parse_account_fields(fields: list[bytes]) -> AccountLine:
    """Return what stands behind the name of a shadow(5) line."""
    if len(fields) != 8:
        return AccountLine(fields[0])
    changed, maximum, inactive, expires = (
        int(fields[i]) if fields[i].isdigit() else None for i in (1, 3, 5, 6)
    )
    unusable = None
    if changed is not None and maximum is not None and inactive is not None:
        unusable = changed + maximum + inactive
    return AccountLine(fields[0], expires, unusable)


def parse_account_lines(data: bytes) -> dict[bytes, AccountLine]:
    """Return the accounts of a password file: shadow(5), passwd(5) or htpasswd lines.

    The first of a name counts.
    """
    accounts: dict[bytes, AccountLine] = {}
    for line in data.split(b"\n"):
        user, colon, rest = line.strip().partition(b":")
        if colon and user and not user.startswith(b"#"):
            accounts.setdefault(user, parse_account_fields(rest.split(b":")))
    return accounts


def check_password(account: AccountLine | None, setting: bytes, password: bytes, today: int) -> bool:
    """Tell whether a password opens an account; an account that does not exist costs as much time.

    Unlike Dante: an account that shadow(5) says has expired is closed.
    """
    usable = account is not None and len(account.hash) > 1 and account.hash[:1] not in b"!*"
    wanted = account.hash if account is not None and usable else setting
    try:
        right = _operator._compare_digest(crypt(password, wanted), wanted)
    except OSError:
        return False
    if account is None or not usable or not right:
        return False
    limits = (account.expires_day, account.unusable_day)
    return all(limit is None or today < limit for limit in limits)


def read_accounts(passwordfile: str) -> dict[bytes, AccountLine]:
    """Return the accounts of sockd's own password file, or the system's where there is none; OSError."""
    if passwordfile:
        with open(passwordfile, "rb") as file:
            return parse_account_lines(file.read())
    with open(PASSWD_FILE, "rb") as file:
        accounts = parse_account_lines(file.read())
    with open(SHADOW_FILE, "rb") as file:
        accounts.update(parse_account_lines(file.read()))
    return accounts


class Unverified(SockdError):
    """A log-in could not be checked, for a reason that is none of the client's."""


def verify_username(passwordfile: str, user: bytes, password: bytes) -> str:
    """Return "" if a password is right, else Dante's words for why not (fail2ban reads them); Unverified."""
    name = escape_bytes(user)
    if b"\0" in user or b"\0" in password:
        return f'system password authentication failed for user "{name}"'
    try:
        accounts = read_accounts(passwordfile)
    except OSError as error:
        text = f'could not access user "{name}"\'s records in the system password file: {error.strerror}'
        raise Unverified(text) from None
    account = accounts.get(user)
    example = next((a.hash for a in accounts.values() if a.hash.startswith(b"$")), DUMMY_SETTING)
    if check_password(account, example, password, int(time.time() / SECONDS_PER_DAY)):
        return ""
    if account is None:
        return f'could not access user "{name}"\'s records in the system password file: no system error'
    return f'system password authentication failed for user "{name}"'


# What processes outside the jail import when they first need it, and for what.
LATE_IMPORTS_OF_HELPERS = {
    "difflib": "a configuration with a mistake",
    "mmap": "limits of sessions",
}
PAM_LIBRARIES = {"pam": "libpam.so.0", "pam_misc": "libpam_misc.so.0"}
PAM_USER_BY_ADDRESS = "rhostusr"  # As Dante: PAM_RUSER always, and PAM_USER where there is no name


def find_pam_library(name: str) -> str | None:
    """Return the file of a PAM library, or None where it is missing."""
    try:
        load_library(PAM_LIBRARIES[name])
    except OSError:
        return None
    return PAM_LIBRARIES[name]


def import_pam() -> ModuleType:
    """Return python-pam's inner module, set to use the system's libpam; ImportError."""
    # Its own search asks compilers and ldconfig, which small systems do not have.
    finder = ModuleType("ctypes.util")
    vars(finder)["find_library"] = find_pam_library
    present = sys.modules.get(finder.__name__)
    sys.modules[finder.__name__] = finder
    try:
        return importlib.import_module("pam.__internals")
    finally:
        del sys.modules[finder.__name__]
        if present is not None:
            sys.modules[finder.__name__] = present


def load_pam() -> ModuleType:
    """Return python-pam's inner module and have libpam ready; ImportError or OSError without them."""
    module = import_pam()
    load_library(PAM_LIBRARIES["pam"])
    return module


def preload_for_helpers() -> None:
    """Import now what helpers would import later, where there may be no files to import it from.

    The executable removes those that it has unpacked, and may itself be replaced by a newer one.
    """
    if not is_executable():
        return
    for module in LATE_IMPORTS_OF_HELPERS:
        importlib.import_module(module)
    import_pam()


def verify_pam(service: str, user: bytes, password: bytes, client: str) -> str:
    """Return "" if PAM lets a user in, authentication and account both, else Dante's words for why not.

    Unverified, with the same words, where PAM has a fault of its own.
    PAM_RHOST and PAM_RUSER are set as Dante sets them, which python-pam has no call for.
    """
    authenticator = load_pam().PamAuthenticator()
    start, check_account, failed_call = (
        authenticator.pam_authenticate,
        authenticator.pam_acct_mgmt,
        ["authenticate"],
    )

    def authenticate(handle: object, flags: int) -> int:
        for item, value in ((PAM_RHOST, client), (PAM_RUSER, PAM_USER_BY_ADDRESS)):
            authenticator.pam_set_item(handle, item, ctypes.c_char_p(value.encode()))
        for item in (PAM_TTY, PAM_XDISPLAY):  # python-pam has set our own, which is not the client's
            authenticator.pam_set_item(handle, item, None)
        return int(start(handle, flags))

    def manage_account(handle: object, flags: int) -> int:
        failed_call[0] = "account"
        return int(check_account(handle, flags))

    authenticator.pam_authenticate, authenticator.pam_acct_mgmt = authenticate, manage_account
    name = user or PAM_USER_BY_ADDRESS.encode()
    if authenticator.authenticate(name, password, service, encoding="latin-1", resetcreds=False):
        return ""
    if str(authenticator.reason).startswith("pam_start()"):
        # python-pam has the text as bytes, and shows them so.
        why = str(authenticator.reason).replace("b'", "", 1).removesuffix("'")
        raise Unverified(f'{why} (service "{service}": is it in /etc/pam.d?)')
    shown = escape_bytes(user) or "<no user specified>"
    fault = f'pam_authenticate() for user "{shown}" failed: {authenticator.reason}'
    if failed_call[0] == "account":
        fault = f"pam_acct_mgmt(): {authenticator.reason}"
    if authenticator.code in PAM_OWN_FAULTS:
        raise Unverified(fault)
    return fault


def copy_keytab(keytab: str) -> str:
    """Return a copy in memory of a key table, for a process that cannot read the file; GssError."""
    path = find_keytab_file(keytab)
    if not path:
        raise GssError(f'gssapi.keytab: key table "{keytab}" is no file')
    try:
        with open(path.encode(WIRE_TEXT), "rb") as file:
            _, name = make_table(file.read(MOST_KEYTAB_BYTES))
    except OSError as error:
        raise GssError(f"gssapi.keytab: {error.strerror}") from None
    return f"FILE:{name.decode('ascii')}"


class SealBroken(PeerGone):
    """What comes over a protected connection is not what the peer has sealed."""


class Seal:
    """The protection of one connection (RFC 1961 section 5).  Owned by its session's thread."""

    def __init__(self, context: SecurityContext, level: int, peer: str) -> None:
        """Protect by a context, which becomes its own, on a level of PROTECTIONS; GssError."""
        self.peer = peer  # "client" or "proxy server"
        self.context = context
        self.level = level
        # Where each message may be protected as one likes it is encrypted.
        self.confidential = int(level > 1)
        self.room = context.find_room(self.confidential)
        self.overhead = (
            GSSAPI_HEAD.size + GSSAPI_MAX - self.room
        )  # bytes that a message has more than its data
        self.partial = bytearray()  # the beginning of a message that has not yet come whole

    def close(self) -> None:
        self.context.close()

    def seal(self, data: bytes) -> bytes:
        """Return data as messages of RFC 1961; GssError."""
        wrap, room, confidential = self.context.wrap, self.room, self.confidential
        pieces = (data[start : start + room] for start in range(0, len(data), room))
        return b"".join(encode_gssapi(GSSAPI_DATA, wrap(piece, confidential)) for piece in pieces)

    def unwrap(self, token: bytes, accepted: int) -> bytes:
        """Return the data of a token whose news of its order are all among the accepted; SealBroken."""
        try:
            data, encrypted, news = self.context.unwrap(token)
        except GssError as error:
            raise SealBroken(str(error)) from None
        if news & ~accepted:
            raise SealBroken("a gssapi message was repeated, or is out of order")
        # Unlike Dante, which takes messages that are repeated, or not encrypted though that was agreed.
        if self.level == PROTECTIONS.index("confidentiality") and not encrypted:
            raise SealBroken("a gssapi message is not encrypted")
        return data

    def open(self, raw: bytes) -> bytes:
        """Return the data of the messages that have come whole with these bytes; SealBroken."""
        self.partial += raw
        opened = []
        try:
            while self.partial:
                found = decode_gssapi(self.partial, GSSAPI_DATA, self.peer)
                if found is None:
                    break
                del self.partial[: found[1]]
                opened.append(self.unwrap(found[0], 0))
        except ProtocolError as error:
            raise SealBroken(str(error)) from None
        return b"".join(opened)

    def open_datagram(self, datagram: bytes) -> bytes:
        """Return the data of a datagram, which is one message; some may be lost or late.  SealBroken."""
        try:
            found = decode_gssapi(datagram, GSSAPI_DATA, self.peer)
        except ProtocolError as error:
            raise SealBroken(str(error)) from None
        if found is None or found[1] != len(datagram):
            raise SealBroken("a gssapi datagram is not one message")
        return self.unwrap(found[0], GSS_UNSEQUENCED | GSS_GAP)


class SealedStream(Stream):
    """The Stream of a client whose messages are protected: `pending` is what was in them."""

    def __init__(self, stream: Stream, seal: Seal) -> None:
        """Go on where a stream stands; what is pending there is sealed already."""
        super().__init__(stream.connection)
        self.received = stream.received
        self.seal = seal
        self.pending += seal.open(bytes(stream.pending))

    def read_more(self, deadline: float) -> None:
        """Add what the client has sent, and what has come whole by it, to `pending`; SealBroken."""
        wait_for(self.connection.fileno(), select.POLLIN, deadline)
        data = self.connection.recv(READ_BYTES)
        if not data:
            raise PeerGone("eof from local client")
        self.received += len(data)
        self.pending += self.seal.open(data)

    def send(self, data: bytes, deadline: float) -> None:
        super().send(self.seal.seal(data), deadline)


def parse_ident(line: bytes, ports: tuple[int, int]) -> str | None:
    """Return the user in a reply of RFC 1413, or None for an error, other ports or garbage.

    >>> parse_ident(b"6193, 23 : USERID : UNIX : stjohns", (6193, 23))
    'stjohns'
    """
    parts = line.decode("latin-1").split(":", 3)
    if len(parts) != 4 or parts[1].strip() != "USERID":
        return None
    pair = parts[0].split(",")
    if len(pair) != 2 or [p.strip() for p in pair] != [str(ports[0]), str(ports[1])]:
        return None
    user = parts[3].strip()
    return user if 0 < len(user) <= NAME_MAX and user.isprintable() else None


def ask_ident(owned: socket.socket, client: Endpoint, local: Endpoint, deadline: float) -> str | None:
    """Return the user that the identd of a client's host names as the owner of its connection, or None."""
    try:
        with socket.socket(FAMILY_OF[client.family], socket.SOCK_STREAM) as connection:
            connection.bind(socket_address(with_link(local, owned)._replace(port=0)))
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect(socket_address(with_link(client, owned)._replace(port=IDENT_PORT)))
            connection.setblocking(False)
            send_all(connection, f"{client.port},{local.port}\r\n".encode("ascii"), deadline)
            answer = b""
            while b"\n" not in answer and len(answer) < IDENT_BYTES:
                wait_for(connection.fileno(), select.POLLIN, deadline)
                data = connection.recv(IDENT_BYTES - len(answer))
                if not data:
                    break
                answer += data
            line, end, _ = answer.partition(b"\n")
            # What was cut off may be the beginning of another user's name.
            return parse_ident(line, (client.port, local.port)) if end else None
    except (OSError, DeadlinePassed):
        return None


# ============================== 12. Shared counts ==============================
# What the workers of one generation count together: the sessions of a rule and of a source, and the bytes
# of a rule.  The mother maps the memory before she forks; its old generation drains with its own counts, as
# Dante's sessions keep their old rules.  Each worker has words of its own for what it holds, so that the
# mother can take back what a dead one held.  Whoever changes more than that holds the lock, which the
# kernel takes from a process that dies.
#
# A hijacked worker can write anything here and hold the lock for ever.  That spoils limits and nothing
# else: no word is used as an index, every value is checked when it is read, and nobody waits long.

LOCK_SECONDS = 1.0  # a holder needs microseconds; one that keeps the lock this long has gone wrong
LOCK_PAUSE_SECONDS = 0.0002
# Waiting longer than this uses patience up, or one who takes the lock again and again would be waited for.
LOCK_FORGIVEN_SECONDS = 0.01
MOST_COUNTED = 65536  # sources counted at a time under session.state.*, for all rules together
MOST_PROBES = 64  # entries that a source may be found in
MOST_COUNT = 1 << 62  # what is higher was not written by us
NANOSECONDS = 1_000_000_000
TURNS_PER_SECOND = 50  # of a rule's bandwidth: how much one session may take before the next
TURN_BYTES = 1460  # where the bandwidth is small a turn is larger, up to a packet on an Ethernet
LONGEST_TURN = 4  # ... and to this part of a second
CATCH_UP_NANOSECONDS = NANOSECONDS // 10  # bandwidth unused for so long may be used later
MOST_AHEAD_NANOSECONDS = 3600 * NANOSECONDS  # no queue of sessions is so long
# The words of a monitor's row: bytes by side and direction, sessions, and what has gone wrong.
INTERNAL_RECV, INTERNAL_SEND, EXTERNAL_RECV, EXTERNAL_SEND = range(4)
LIVE, CONNECTED = 4, 5  # sessions; of these, those that neither side has closed
DISCONNECTS = {"internal": 6, "external": 7}
TOO_LARGE = {"internal": 8, "external": 9}  # datagrams
METER_WORDS = 10
KEY_WORDS = 3  # rule and family, and the two halves of an IPv6 address


class SharedLock:
    """Mutual exclusion of all threads of all workers: a record lock of fcntl(2) and a lock of threads.

    Shared; nothing that waits is called under it.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("sockd-lock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # A worker could fill it, and the memory would not come back with its end.
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.threads = threading.Lock()
        self.patience = LOCK_SECONDS

    def __enter__(self) -> None:
        self.threads.acquire()
        waited, begun = 0.0, time.monotonic()
        while True:
            try:
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.patience = min(LOCK_SECONDS, self.patience - waited + LOCK_FORGIVEN_SECONDS)
                return
            except OSError:
                waited = time.monotonic() - begun
                if waited < self.patience:
                    time.sleep(LOCK_PAUSE_SECONDS)
                    continue
                # Go on without it: the counts of one who holds it so long are spoilt anyhow.
                self.patience = 0.0
                return

    def __exit__(self, *_: object) -> None:
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)
        finally:
            self.threads.release()

    def close(self) -> None:
        os.close(self.descriptor)


def limits_sessions(limits: SessionLimits) -> bool:
    """Tell whether a rule limits its sessions."""
    return bool(limits.max or limits.throttle or limits.state_key)


class Place(NamedTuple):
    """What a session holds of its rules' limits: the words to count down when it ends."""

    words: tuple[int, ...]


class Meter:
    """What one session adds to its monitor.  Owned by the session's thread."""

    def __init__(self, counts: Counts, row: int) -> None:
        self.counts = counts
        self.row = row
        self.moving = range(row, row + 4)
        self.moved = (0, 0, 0, 0)  # what has been counted of internal recv and send, external recv and send
        self.connected = True
        counts.add(((row + LIVE, 1), (row + CONNECTED, 1)))

    def count(self, moved: tuple[int, int, int, int]) -> None:
        """Count what the session has moved so far, in all."""
        before = self.moved
        if moved == before:
            return
        self.moved = moved
        words = self.counts.words
        with self.counts.lock.threads:  # this worker's own words, as in Counts.add
            for word, now, then in zip(self.moving, moved, before, strict=True):
                if now != then:
                    words[word] = min(words[word] + now - then, MOST_COUNT)

    def disconnect(self, side: str) -> None:
        """Count that a side was the first to close the session, or broke."""
        if self.connected:
            self.connected = False
            self.counts.add(((self.row + CONNECTED, -1), (self.row + DISCONNECTS[side], 1)))

    def refuse_size(self, side: str) -> None:
        """Count a datagram that is too large for the way that a side's would take."""
        self.counts.add(((self.row + TOO_LARGE[side], 1),))

    def close(self) -> None:
        """Count one session less."""
        self.counts.add(((self.row + LIVE, -1), (self.row + CONNECTED, -int(self.connected))))
        self.connected = False


class Counts:
    """The shared memory of one generation.  Made by the mother, shared by all threads of its workers.

    It is an array of 64-bit words.  A bandwidth is one of them: when the bytes promised so far will have been
    paid for, in ns.  A monitor has METER_WORDS for each worker: what its sessions have moved.  A gauge is
    START (of the throttle's time, in ns), TAKEN (sessions since), and for each worker the sessions that it
    holds.  Each rule with limits has one, and so has each entry of the table of sources, behind its key.
    """

    def __init__(
        self, limited: Sequence[Rule], shared: Sequence[Rule], monitors: Sequence[Monitor], workers: int
    ) -> None:
        """Map the memory for rules that limit sessions, those with a bandwidth, and monitors; OSError."""
        self.workers = workers
        self.number = 0  # of this worker, from 0
        self.gauge_words = 2 + workers
        self.entry_words = KEY_WORDS + self.gauge_words
        self.gauges = {(r.kind, r.number): n * self.gauge_words for n, r in enumerate(limited)}
        self.table = len(limited) * self.gauge_words
        self.entries = MOST_COUNTED if any(rule.session.state_key for rule in limited) else 0
        self.table_end = self.table + self.entries * self.entry_words
        self.bandwidths = {(r.kind, r.number): n for n, r in enumerate(shared, self.table_end)}
        first = self.table_end + len(shared)
        self.monitors = {m.number: first + n * workers * METER_WORDS for n, m in enumerate(monitors)}
        size = first + len(monitors) * workers * METER_WORDS
        mmap = importlib.import_module("mmap")
        # Anonymous memory, as nobody can truncate that under the others.  What of the table is never
        # used never becomes memory.
        self.words = memoryview(mmap.mmap(-1, size * 8)).cast("Q")
        self.lock = SharedLock()

    # --- the mother's side ---

    def forget(self, number: int) -> None:
        """Take back what a dead worker held.  Needs no lock: they are that worker's own words."""
        offset = 2 + number
        for start in self.monitors.values():
            for what in (LIVE, CONNECTED):
                self.words[start + number * METER_WORDS + what] = 0
        for start in self.gauges.values():
            self.words[start + offset] = 0
        for entry in range(self.table, self.table_end, self.entry_words):
            if self.words[entry]:
                self.words[entry + KEY_WORDS + offset] = 0

    def read_monitor(self, number: int) -> tuple[int, ...]:
        """Return the sums of a monitor's rows, over all workers."""
        start = self.monitors[number]
        end = start + self.workers * METER_WORDS
        return tuple(sum(self.words[start + what : end : METER_WORDS]) for what in range(METER_WORDS))

    # --- the workers' side ---

    def meter(self, monitor: Monitor) -> Meter:
        """Return what counts one more session under a monitor."""
        return Meter(self, self.monitors[monitor.number] + self.number * METER_WORDS)

    def add(self, changes: Iterable[tuple[int, int]]) -> None:
        """Change words of this worker's own: its threads' lock is enough."""
        with self.lock.threads:
            for word, change in changes:
                self._add(word, change)

    def take(self, rule: Rule, client: Endpoint, is_new: bool = True) -> Place:
        """Count one more session under a rule; Refused, in Dante's words, where that is one too many.

        As Dante: the rate is looked at before the number, and all clients before the one.
        A session that comes back to the rule is not new: rates have counted it when it came.
        """
        limits = rule.session
        throttle, state_throttle = (limits.throttle, limits.state_throttle) if is_new else (None, None)
        with self.lock:
            # Not before: who has waited would seem to come before the throttle's time, and begin it anew.
            now = time.monotonic_ns()
            gauges = [self.gauges[rule.kind, rule.number]]
            self._check(gauges[0], limits.max, throttle, "", now)
            if limits.state_key:
                gauges.append(self._find_source(gauges[0], client))
                self._check(gauges[1], limits.state_max, state_throttle, "per-key ", now)
            for gauge in gauges:
                self._add(gauge + 1, int(is_new))
                self._add(gauge + 2 + self.number, 1)
        return Place(tuple(gauge + 2 + self.number for gauge in gauges))

    def leave(self, place: Place) -> None:
        """Count one session less."""
        self.add((word, -1) for word in place.words)

    def _add(self, word: int, change: int) -> None:
        self.words[word] = min(max(self.words[word] + change, 0), MOST_COUNT)

    def _held(self, gauge: int) -> int:
        return sum(self.words[gauge + 2 : gauge + self.gauge_words])

    def _check(
        self, gauge: int, most: int | None, throttle: tuple[int, int] | None, key: str, now: int
    ) -> None:
        """Refused unless a gauge has room for one more; begin the throttle's next time when it has come."""
        held = self._held(gauge)
        if throttle:
            age = now - self.words[gauge]
            if not 0 <= age < throttle[1] * NANOSECONDS:
                self.words[gauge], self.words[gauge + 1], age = now, 0, 0
            taken = self.words[gauge + 1]
            if taken >= throttle[0]:
                raise Refused(
                    f"{key}session rate limit reached (already accepted "
                    f"{describe_count(taken, 'new client')} during the last {age // NANOSECONDS}s.  "
                    f"Current client count: {held})"
                )
        if most and held >= most:
            slots = "slot" if most == 1 else "slots"
            raise Refused(f"{key}session limit reached ({held}/{most} {slots} in use)")

    def _find_source(self, rule_gauge: int, client: Endpoint) -> int:
        """Return the gauge of a client's address under a rule; Refused when there is no room for it.

        An address that is new takes the entry of one without sessions, the longest unused.
        """
        number = address_number(client)
        key = [rule_gauge << 8 | client.family, number >> 64, number & (1 << 64) - 1]
        # Python's hash of bytes has a secret key, so nobody can choose addresses that collide.
        first = hash(struct.pack("=3Q", *key)) % self.entries
        oldest, found = MOST_COUNT, -1
        for probe in range(first, first + MOST_PROBES):
            entry = self.table + probe % self.entries * self.entry_words
            gauge = entry + KEY_WORDS
            if self.words[entry : entry + KEY_WORDS].tolist() == key:
                return gauge
            if self.words[gauge] < oldest and not self._held(gauge):
                oldest, found = self.words[gauge], entry
            if not self.words[entry]:
                break  # never used: so it was not passed over either
        if found < 0:
            raise Refused("no room to count the sessions of one more address")
        for offset in range(self.entry_words):
            self.words[found + offset] = key[offset] if offset < KEY_WORDS else 0
        self.words[found + KEY_WORDS] = time.monotonic_ns()
        return found + KEY_WORDS


def make_counts(config: Config, workers: int) -> Counts | None:
    """Return what the workers of a configuration share, or None where it counts nothing; OSError."""
    rules = (*config.client_rules, *config.socks_rules)
    limited = [rule for rule in rules if limits_sessions(rule.session)]
    shared = [rule for rule in rules if rule.bandwidth]
    monitors = [monitor for monitor in config.monitors if monitor.alarms]
    return Counts(limited, shared, monitors, workers) if limited or shared or monitors else None


MTU_SECONDS = 5  # how often alarm.mtu-error is looked at
ALARM_ORDER = ("disconnect", "data", "mtu-error")  # As Dante, within a monitor.


class Watch:
    """One alarm of one monitor.  Owned by the mother."""

    def __init__(self, monitor: Monitor, alarm: Alarm, counts: Counts) -> None:
        self.monitor = monitor
        self.alarm = alarm
        self.counts = counts
        self.seconds = alarm.seconds or MTU_SECONDS
        self.words: tuple[int, ...] = ()  # that the alarm is about
        about = [] if len(alarm.sides) == 2 else [alarm.sides[0]]
        if alarm.kind == "data":
            ways = {
                ("internal", "recv"): INTERNAL_RECV,
                ("internal", "send"): INTERNAL_SEND,
                ("external", "recv"): EXTERNAL_RECV,
                ("external", "send"): EXTERNAL_SEND,
            }
            self.words = tuple(ways[side, way] for side in alarm.sides for way in alarm.directions)
            about += alarm.directions if len(alarm.directions) == 1 else ()
        else:
            table = DISCONNECTS if alarm.kind == "disconnect" else TOO_LARGE
            self.words = tuple(table[side] for side in alarm.sides)
        source, target = monitor.source, monitor.target
        self.where = f"{source.text}{source.port} -> {target.text}{target.port}"
        if about:
            self.where += " " + ".".join(about)
        self.start(0.0)

    def start(self, now: float) -> None:
        """Begin anew: no alarm is raised, and the first time begins now."""
        self.due = now + self.seconds
        self.raised_at: float | None = None
        self.before = self.counts.read_monitor(self.monitor.number)

    def check(self, now: float) -> str:
        """Return the record of what the time that ends now has brought, or ""."""
        sums = self.counts.read_monitor(self.monitor.number)
        # Less than before is the work of a worker that has gone wrong.
        found = [max(0, new - old) for new, old in zip(sums, self.before, strict=True)]
        self.before = sums
        self.due += self.seconds
        if self.due <= now:
            self.due = now + self.seconds  # we were held up: a time of no length would be one without data
        amount = sum(found[word] for word in self.words)
        if self.alarm.kind == "data":
            return self._check_data(amount, sums[LIVE], now)
        if self.alarm.kind == "disconnect":
            total = sums[CONNECTED] + sum(found[word] for word in DISCONNECTS.values())
            return self._check_disconnects(amount, total, sums[CONNECTED])
        if not amount:
            return ""
        packets = describe_count(amount, "packet")
        return self._describe("mtu-error", "]", f"{packets} too large for the path", sums[LIVE])

    def _describe(self, kind: str, bracket: str, what: str, sessions: int) -> str:
        head = f"monitor({self.monitor.number}): alarm/{kind} {bracket}"
        return f"{head}: {self.where}: {what}.  Session count: {sessions}"

    def _check_data(self, amount: int, sessions: int, now: float) -> str:
        is_low = amount <= self.alarm.limit
        if is_low == (self.raised_at is not None):
            return ""
        what = f"{amount}/{self.alarm.limit} in {self.seconds}s"
        if self.raised_at is None:
            self.raised_at = now
            return self._describe("data", "[", what, sessions)
        duration = now - self.raised_at
        self.raised_at = None
        return f"{self._describe('data', ']', what, sessions)}.  Alarm duration: {duration:.0f}s"

    def _check_disconnects(self, amount: int, total: int, connected: int) -> str:
        # Unlike Dante, which divides in whole numbers: there the ratio is only looked at where it is 1.
        if amount < self.alarm.limit or amount * self.alarm.sessions < total * self.alarm.limit:
            return ""
        what = f"{amount}/{total} disconnects during last {self.seconds}s"
        return self._describe("disconnect", "]", what, connected)


def make_watches(config: Config, counts: Counts | None) -> list[Watch]:
    """Return the alarms of a configuration, in the order in which Dante looks at them."""
    if counts is None:
        return []
    return [
        Watch(monitor, alarm, counts)
        for monitor in config.monitors
        for alarm in sorted(
            monitor.alarms, key=lambda a: (ALARM_ORDER.index(a.kind), a.sides[0], a.directions)
        )
    ]


class Budget:
    """One session's part in the bandwidth of a rule.  Owned by the session's thread, but for `cancel`.

    The bytes of all sessions stand in one queue, in both directions: each that is promised moves the end of
    the queue on by the time that it takes.  A session asks for no more than a turn, and for the next one
    only when that is used up, so all that have something to move get the same.
    """

    def __init__(self, counts: Counts, rule: Rule) -> None:
        assert rule.bandwidth is not None
        self.counts = counts
        self.word = counts.bandwidths[rule.kind, rule.number]
        self.per_second = rule.bandwidth
        packet = min(TURN_BYTES, self.per_second // LONGEST_TURN)
        self.turn = max(1, packet, self.per_second // TURNS_PER_SECOND)
        self.promised = 0  # bytes that may be moved from `ready_at` on
        self.ready_at = 0.0  # of time.monotonic()
        self.cancelled = False

    def grant(self, wanted: int, most: int) -> int:
        """Return how many of the wanted bytes, at most `most`, may be moved now; 0: wait until `ready_at`.

        What is granted and not used is to be given back.
        """
        if self.cancelled:
            return wanted
        if not self.promised:
            amount = min(wanted, most)
            start, now = self._queue(amount)
            if start <= now:
                return amount
            self.promised, self.ready_at = amount, time.monotonic() + (start - now) / NANOSECONDS
        if time.monotonic() < self.ready_at:
            return 0
        granted, rest = min(self.promised, wanted), max(0, self.promised - wanted)
        self.promised = 0
        self.give_back(rest)
        return granted

    def give_back(self, amount: int) -> None:
        """Put back bytes that were not used; a negative amount pays for some that were not asked for."""
        if amount:
            with self.counts.lock:
                end = self.counts.words[self.word] - amount * NANOSECONDS // self.per_second
                self.counts.words[self.word] = min(max(end, 0), MOST_COUNT)

    def close(self) -> None:
        """Put back what was promised: the session has ended."""
        self.give_back(self.promised)
        self.promised = 0

    def cancel(self) -> None:
        """Let everything through from now on, as the server ends.  Called by the worker's main thread."""
        self.cancelled = True

    def _queue(self, amount: int) -> tuple[int, int]:
        """Return when the bytes have their turn, and the time now, both in ns."""
        words = self.counts.words
        with self.counts.lock:
            now = time.monotonic_ns()
            end = words[self.word]
            if end > now + MOST_AHEAD_NANOSECONDS:
                end = 0  # not of our writing
            start = max(end, now - CATCH_UP_NANOSECONDS)
            words[self.word] = start + amount * NANOSECONDS // self.per_second
        return start, now


# ============================== 13. Relay ==============================
# io: bytes move until both sides have finished.  Half-close is symmetric: a FIN from one side is passed on
# once everything before it has been, and the other direction goes on.  A reset is passed on as a reset.
# What one side does not take stays in the kernel of the other: no more than one read is ever held here.
# A direction that has filled a large read is bulk: it goes through a pipe by splice(2), which copies nothing,
# until it is a trickle again.

FIRST_READ_BYTES = 4096
BULK_BYTES = 65536  # a read that is filled up to here makes its direction bulk
MOST_READ_BYTES = (
    262144  # where there is no pipe; measured: a quarter of it costs twice the CPU for each byte
)
PIPE_BYTES = 1 << 20  # the kernel's fs.pipe-max-size: each slot holds no more than one packet's page
SPLICE_BYTES = 262144  # measured: more at a time falls out of the CPU's cache
TRICKLE_BYTES = 16384  # a splice of less than this ends the bulk: a copy costs less
MOST_RECORDED_BYTES = 65536  # As Dante: one I/O record in the log is at most this
DATAGRAM_BYTES = 65535
MOST_VERDICTS = 256  # per association: datagram verdicts remembered
LOGS_DATAGRAMS = frozenset({"ioop", "data"})
UDP_HEADER_BYTES = {ATYP_IPV4: 10, ATYP_IPV6: 22}  # those of one length (RFC 1928 section 7)
UDP_BATCH = 32  # datagrams read from one socket before the others have their turn
DELIVERY_MILLISECONDS = 50  # how often the kernel is asked whether a peer has all that was sent to it
UNHEARD_SECONDS = 0.25  # how often a session that waits for bandwidth and hears nothing looks up
UDP_ORPHAN_SECONDS = 5.0  # an association outlives its client's FIN as long as it sends this often

CLIENT_CLOSED, TARGET_CLOSED = "local client closed", "remote peer closed"
ENDED_BY_US = "administrative termination"


class Waiter(selectors.PollSelector):
    """selectors' poll(2), that also says when urgent data waits (POLLPRI), as telnet and ftp send it.

    `wait` gives poll's own pairs: building selectors' keys would cost as much as moving a small message.
    """

    def wait(self, deadline: float) -> list[tuple[int, int]]:
        """Return (descriptor, poll events) pairs; none when the deadline has passed."""
        milliseconds = poll_milliseconds(deadline)
        return self._selector.poll(milliseconds)  # type: ignore[attr-defined]

    def watch(self, descriptor: int, events: int) -> None:
        self._selector.register(descriptor, events)  # type: ignore[attr-defined]

    def forget(self, descriptor: int) -> None:
        """Hear no more of a descriptor, which must be watched, not even its errors."""
        self._selector.unregister(descriptor)  # type: ignore[attr-defined]


READABLE = select.POLLIN | select.POLLPRI
SPLICE_FLAGS = 3  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK (splice(2))
SPLICE_REFUSALS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM})  # of the kernel, or of a sandbox
FAILED = select.POLLERR | select.POLLHUP


class Pipe(NamedTuple):
    """The two descriptors of a pipe of PIPE_BYTES, both non-blocking."""

    reader: int
    writer: int

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


def open_pipe() -> Pipe | None:
    """Return a pipe for bulk; None where there is none to be had: the kernel grants each user a few."""
    if not hasattr(os, "splice"):
        return None
    try:
        pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return None
    try:
        fcntl.fcntl(pipe.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pipe.close()  # a small one moves so little at a time that copying is cheaper
        return None
    return pipe


class SideFailed(SockdError):
    """One side of a session broke; `side` is it."""

    def __init__(self, side: Side, error: OSError) -> None:
        super().__init__(f"{side.title} error ({error.strerror})")
        self.side = side
        self.number = error.errno


class Side:
    """One end of a session: its socket, and what has passed through it.  Owned by the session's thread."""

    __slots__ = (
        "backlog",
        "bulk",
        "connection",
        "finished",
        "kept",
        "may_splice",
        "most",
        "peer",
        "pipe",
        "piped",
        "reading",
        "received",
        "sent",
        "size",
        "title",
        "urgent",
    )

    def __init__(self, connection: socket.socket, title: str) -> None:
        self.connection = connection
        self.title = title  # "local client" or "remote peer", as in Dante's close reasons
        self.peer = self  # set when the pair is joined
        self.received = 0
        self.sent = 0
        self.size = FIRST_READ_BYTES  # of the next read: it grows with what comes
        self.most = MOST_READ_BYTES
        self.bulk = SPLICE_BYTES  # most to go into the pipe at a time
        self.may_splice = True  # nobody has to see the bytes
        self.pipe: Pipe | None = None  # while what it sends is bulk
        self.piped = 0  # bytes from it in the pipe
        self.finished = False  # its FIN has been read
        self.backlog = b""  # read from the peer, not yet taken by this side
        self.kept = b""  # read from the peer before the relay has begun
        self.urgent = False  # the backlog is a single urgent byte
        self.reading = READABLE  # what poll is asked for when the side is to be read

    def receive(self) -> bytes | None:
        """Return what the side has sent: b"" for its FIN, None if there is nothing after all; SideFailed."""
        try:
            data = self.connection.recv(self.size)
        except BlockingIOError:
            return None
        except OSError as error:
            raise SideFailed(self, error) from None
        length = len(data)
        self.received += length
        if length == self.size:
            self.grow()
        elif length < self.size >> 4:
            self.size = FIRST_READ_BYTES
        return data

    def grow(self) -> None:
        """Make the next read larger, or the direction bulk, as the last read was full."""
        if self.size == BULK_BYTES and self.may_splice:
            self.pipe = open_pipe()
        if self.pipe is None:
            self.size = min(self.size * 4, self.most)

    def fill_pipe(self) -> int:
        """Move what the side has sent into its pipe, which is empty, and return how much it was.

        0 for whatever is not bulk: nothing, a FIN, urgent data; a read will tell.  SideFailed.
        """
        assert self.pipe is not None
        try:
            self.piped = os.splice(self.connection.fileno(), self.pipe.writer, self.bulk, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in SPLICE_REFUSALS:
                raise SideFailed(self, error) from None  # a read would not be told of it again
            self.may_splice = False
            return 0
        self.received += self.piped
        return self.piped

    def drain_pipe(self) -> None:
        """Move what is in the pipe on to the peer, as much as its kernel takes; SideFailed of the peer."""
        assert self.pipe is not None
        peer = self.peer
        try:
            taken = os.splice(self.pipe.reader, peer.connection.fileno(), self.piped, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            raise SideFailed(peer, error) from None
        self.piped -= taken
        peer.sent += taken

    def leave_pipe(self) -> None:
        """Go back to copying."""
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
            self.size = FIRST_READ_BYTES

    def read_away(self) -> bool:
        """Read what nobody wants any more; tell whether that was the FIN.  SideFailed."""
        try:
            data = self.connection.recv(BULK_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            raise SideFailed(self, error) from None
        self.received += len(data)
        return not data

    def receive_urgent(self) -> bytes | None:
        """Return the urgent byte if the stream has come to it, else None."""
        mark = bytearray(4)
        try:
            fcntl.ioctl(self.connection.fileno(), SIOCATMARK, mark)
            if not any(mark):
                return None
            data = self.connection.recv(1, socket.MSG_OOB)
        except OSError:
            return None
        self.received += len(data)
        return data

    def keep(self, data: bytes) -> None:
        """Take data that is to be sent when the relay begins."""
        self.kept = data

    def begin(self) -> bytes:
        """Have what was kept sent before all else, and return it as the peer has sent it; OSError."""
        self.backlog, self.kept = self.kept, b""
        return self.backlog

    def send(self, data: bytes) -> None:
        """Send data; what the kernel does not take becomes the backlog.  SideFailed."""
        try:
            taken = self.connection.send(data, socket.MSG_OOB if self.urgent else 0)
        except BlockingIOError:
            taken = 0
        except OSError as error:
            raise SideFailed(self, error) from None
        self.sent += taken
        self.backlog = data[taken:]
        if not self.backlog:
            self.urgent = False

    def finish_sending(self) -> None:
        """Pass on a FIN."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise SideFailed(self, error) from None

    def reset(self) -> None:
        """Make the coming close a reset: the other side was reset, and this one is to know it."""
        try:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass


def part_sides(client: Side, target: Side) -> None:
    """Let two sides forget each other, at the end of a relay.

    What holds itself in a circle would keep its memory until the garbage collector comes by.
    """
    del client.peer, target.peer


def ask_for_count(connection: socket.socket, question: int) -> int:
    """Return what an ioctl(2) says of a socket's queue; 0 where it cannot be asked."""
    count = bytearray(4)
    try:
        fcntl.ioctl(connection.fileno(), question, count)
    except OSError:
        return 0
    return int.from_bytes(count, sys.byteorder)


def readable_bytes(connection: socket.socket) -> int:
    """Return how much waits to be read; of datagrams the length of the first."""
    return ask_for_count(connection, FIONREAD)


def unsent_bytes(connection: socket.socket) -> int:
    """Return how much the other end has not yet said to have; a FIN counts as one (tcp(7), SIOCOUTQ)."""
    return ask_for_count(connection, SIOCOUTQ)


class SealedSide(Side):
    """A side whose connection is protected.  As Dante: it counts what is sent, protection included."""

    __slots__ = ("seal",)

    def __init__(self, connection: socket.socket, title: str, seal: Seal) -> None:
        super().__init__(connection, title)
        self.seal = seal
        self.may_splice = False
        # A byte that is urgent to TCP is a part of a message like any other.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)

    def receive(self) -> bytes | None:
        """Return what is in the messages that have come whole, as Side.receive does."""
        raw = super().receive()
        if not raw:
            if raw is not None and self.seal.partial:
                raise SideFailed(self, OSError(errno.EBADMSG, "eof within a gssapi message"))
            return raw
        try:
            return self.seal.open(raw) or None
        except SealBroken as error:
            raise SideFailed(self, OSError(errno.EBADMSG, str(error))) from None

    def receive_urgent(self) -> bytes | None:
        return None

    def begin(self) -> bytes:
        """Seal what was kept, as Side.begin: not before the reply is sealed, which is sent first."""
        kept = super().begin()
        self.backlog = self._seal(kept)
        return kept

    def _seal(self, data: bytes) -> bytes:
        """Return data as messages; OSError."""
        try:
            return self.seal.seal(data)
        except GssError as error:
            raise OSError(errno.EBADMSG, str(error)) from None

    def send(self, data: bytes) -> None:
        """Seal data and send it; a backlog is sealed already."""
        self.urgent = False
        try:
            super().send(data if self.backlog else self._seal(data))
        except OSError as error:
            raise SideFailed(self, error) from None


class SealedSocket(socket.socket):
    """A socket whose datagrams are protected."""

    seal: Seal

    @classmethod
    def over(cls, plain: socket.socket, seal: Seal) -> SealedSocket:
        """Return the same socket, which it takes over, with a seal."""
        sealed = cls(plain.family, plain.type, plain.proto, plain.detach())
        sealed.setblocking(False)
        sealed.seal = seal
        return sealed

    def recvfrom(self, size: int, flags: int = 0) -> tuple[bytes, Any]:
        """Return a datagram's data and sender; OSError for one that the peer has not sealed."""
        data, sender = super().recvfrom(size, flags)
        try:
            return self.seal.open_datagram(data), sender
        except SealBroken as error:
            raise OSError(errno.EBADMSG, str(error)) from None

    def sendto(self, data: bytes, address: Any) -> int:  # type: ignore[override]
        """Seal data and send it; return its length."""
        if len(data) > self.seal.room:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        try:
            super().sendto(self.seal.seal(data), address)
        except GssError as error:
            raise OSError(errno.EBADMSG, str(error)) from None
        return len(data)


class TcpRelay:
    """A TCP session's two sides while data flows.  Owned by its session's thread."""

    def __init__(
        self, client: Side, target: Side, timeouts: Timeouts, observe: Callable[[Side, bytes], None] | None
    ) -> None:
        client.peer, target.peer = target, client
        self.sides = {client.connection.fileno(): client, target.connection.fileno(): target}
        self.client = client
        self.target = target
        self.timeouts = timeouts
        self.observe = observe  # called with the side that data came from, for log: data and ioop
        if observe is not None:
            client.most = target.most = MOST_RECORDED_BYTES
            client.may_splice = target.may_splice = False
        self.waiter = Waiter()
        self.meter: Meter | None = None  # where a monitor is about the session
        self.failed: Side | None = None
        self.budget: Budget | None = None  # where a rule has a bandwidth
        self.resume_at = 0.0  # while the budget is used up: when that is over
        self.unheard = False  # a side has closed both directions meanwhile
        self.served: Side | None = None  # last, of those that had to be paid for
        self.first_to_finish: Side | None = None
        self.finished_at = NO_DEADLINE
        self.masks = dict.fromkeys(self.sides, -1)

    def run(self) -> str:
        """Move data until the session ends; return the reason in Dante's words."""
        try:
            with self.waiter:
                return self._run_watched() if self.budget or self.meter else self._run()
        except SideFailed as failure:
            self.failed = failure.side
            if failure.side.finished or failure.number == errno.EPIPE:
                # Its FIN came first, be it read or not (tcp_reset in Linux): nobody reads there any more.
                return self._deliver(failure.side)
            failure.side.peer.reset()
            return str(failure)
        finally:
            self._count()
            self.client.leave_pipe()
            self.target.leave_pipe()
            part_sides(self.client, self.target)

    def _deliver(self, side: Side) -> str:
        """Let the peer have all that a side which has gone had sent before its FIN; return the reason.

        To close before the peer's system has it would lose it: what the peer may still send is for nobody,
        and the answer to that is a reset.  It is not waited for longer than for any half-closed session.
        """
        peer, idle = side.peer, self.timeouts.io_tcp or NO_DEADLINE
        finished_at = min(self.finished_at, deadline_after(self.timeouts.tcp_fin_wait))
        side.may_splice = False
        state, active = (-1, -1), 0.0
        try:
            while not self._is_delivered(side):
                if (peer.sent, unsent_bytes(peer.connection)) != state:
                    state = peer.sent, unsent_bytes(peer.connection)
                    active = time.monotonic()
                if time.monotonic() >= min(active + idle, finished_at):
                    peer.reset()  # what it has is not to look like the whole
                    break
                self._deliver_more(side)
        except SideFailed as failure:
            if failure.side is side:  # a broken seal, or an end within a message
                peer.reset()
                return str(failure)
            # The peer has gone, too.
        return CLIENT_CLOSED if side is self.client else TARGET_CLOSED

    def _is_delivered(self, side: Side) -> bool:
        """Tell whether the peer's system has it all, or will have it, as the peer sends nothing any more."""
        peer = side.peer
        if peer.backlog or side.piped or not side.finished:
            return False
        return peer.finished or not unsent_bytes(peer.connection)

    def _deliver_more(self, side: Side) -> None:
        """Send the peer more, or the FIN behind the last of it, and throw away what it sends itself."""
        peer = side.peer
        if not (peer.backlog or side.piped or side.finished):
            data = side.receive()
            side.finished = data == b""  # None: no message of GSS-API is whole yet
            if data:
                self._pass_on(side, data)
        if side.finished and not (peer.backlog or side.piped):
            peer.finish_sending()
        poller, descriptor = select.poll(), peer.connection.fileno()
        wanted = 0 if peer.finished else select.POLLIN
        poller.register(descriptor, wanted | (select.POLLOUT if peer.backlog or side.piped else 0))
        held = side.finished or peer.backlog or side.piped  # else there is more to be read at once
        mask = dict(poller.poll(DELIVERY_MILLISECONDS if held else 0)).get(descriptor, 0)
        if mask & (select.POLLIN | FAILED):
            peer.finished = peer.read_away() or peer.finished
        if mask & select.POLLOUT and peer.backlog:
            peer.send(peer.backlog)
        elif mask & select.POLLOUT:
            side.drain_pipe()

    def _pass_on(self, side: Side, data: bytes) -> None:
        """Send the peer what a side has sent, pay for it, and have it observed."""
        if self.observe is not None:
            self.observe(side, data)
        if self.budget is not None:
            self.budget.give_back(-len(data))
        side.peer.send(data)

    def _run(self) -> str:
        for side in (self.client, self.target):
            if side.backlog:
                side.send(side.backlog)
        self._watch()
        idle = self.timeouts.io_tcp or NO_DEADLINE
        wait, sides = self.waiter.wait, self.sides
        active = time.monotonic()
        while not (self.client.finished and self.target.finished and not self._backlog()):
            events = wait(min(active + idle, self.finished_at))
            if events:
                active = time.monotonic()
                for descriptor, mask in events:
                    self._serve(sides[descriptor], mask)
            elif time.monotonic() >= min(active + idle, self.finished_at):
                return self._describe_timeout(active + idle)
        return CLIENT_CLOSED if self.first_to_finish is self.client else TARGET_CLOSED

    def _backlog(self) -> bool:
        return any(side.backlog or side.piped for side in (self.client, self.target))

    def _describe_timeout(self, idle_deadline: float) -> str:
        if self.finished_at < idle_deadline:
            waits_for = "client" if self.first_to_finish is self.target else "remote peer"
            return f"tcp-fin-wait timeout (waiting for {waits_for} to close)"
        return "i/o timeout"

    def _watch(self) -> None:
        """Ask poll for what each side can do now: be written while it has a backlog.

        Be read while its peer has none.
        """
        for descriptor, side in self.sides.items():
            mask = select.POLLOUT if side.backlog or side.peer.piped else 0
            if not side.finished and not side.peer.backlog and not side.piped and not self.resume_at:
                mask |= side.reading
            if mask != self.masks[descriptor]:
                self.masks[descriptor] = mask
                self.waiter.watch(descriptor, mask)

    def _run_watched(self) -> str:
        """_run, for a session that shares a bandwidth or that a monitor is about."""
        for side in (self.client, self.target):
            if self.budget is not None:
                side.may_splice = side.may_splice and self.budget.turn >= BULK_BYTES
                self.budget.give_back(-len(side.backlog))
            if side.backlog:
                side.send(side.backlog)
        self._watch()
        idle = self.timeouts.io_tcp or NO_DEADLINE
        active = time.monotonic()
        while not (self.client.finished and self.target.finished and not self._backlog()):
            limit = min(active + idle, self.finished_at)
            events = self.waiter.wait(self._next_look(limit))
            now = time.monotonic()
            if events or self._resume(now):
                active = now
            elif now >= limit and not self.resume_at:
                return self._describe_timeout(active + idle)
            self._serve_in_turn(events)
            self._count()
        return CLIENT_CLOSED if self.first_to_finish is self.client else TARGET_CLOSED

    def _serve_in_turn(self, events: list[tuple[int, int]]) -> None:
        """_serve, but where there is a budget the side that was served last comes last.

        Or one direction would take it all.
        """
        if self.budget is None:
            for descriptor, mask in events:
                self._serve(self.sides[descriptor], mask)
            return
        self._resume(time.monotonic())
        found = [(self.sides[descriptor], mask) for descriptor, mask in events]
        for side, mask in sorted(found, key=lambda event: event[0] is self.served):
            self._serve_paced(self.budget, side, mask)

    def _resume(self, now: float) -> bool:
        """Go on if the budget has room again; tell whether it has just come to that."""
        if not self.resume_at or self.budget is None or not (now >= self.resume_at or self.budget.cancelled):
            return False
        self.resume_at, self.unheard = 0.0, False
        self._watch()
        return True

    def _count(self) -> None:
        """Let the monitor know how far the session is."""
        if self.meter is None:
            return
        client, target = self.client, self.target
        self.meter.count((client.received, client.sent, target.received, target.sent))
        gone = self.first_to_finish or self.failed
        if gone is not None:
            self.meter.disconnect("internal" if gone is client else "external")

    def _next_look(self, limit: float) -> float:
        """Return how long to wait for an event; to wait for the budget is not to be idle."""
        if not self.resume_at:
            return limit
        return min(self.resume_at, time.monotonic() + UNHEARD_SECONDS) if self.unheard else self.resume_at

    def _serve_paced(self, budget: Budget, side: Side, mask: int) -> None:
        """_serve, once the budget has room for what is to be read."""
        readable = mask & (READABLE | FAILED) and not side.finished
        if not readable or side.peer.backlog or side.piped:
            self._serve(side, mask)
            return
        if self.resume_at:
            self._serve(side, mask & select.POLLOUT)
            if mask & FAILED:
                self._check_failure(side)
            return
        waiting = readable_bytes(side.connection)
        granted = budget.grant(waiting, min(budget.turn, SPLICE_BYTES)) if waiting else 0
        if waiting and not granted:
            self.resume_at = budget.ready_at
            self._watch()
            return
        side.size = min(granted or FIRST_READ_BYTES, BULK_BYTES if side.may_splice else side.most)
        side.bulk = min(granted, SPLICE_BYTES)
        before = side.received
        self.served = side
        self._serve(side, mask)
        # A mere FIN costs nothing, but bytes may have come with it.
        budget.give_back(granted - (side.received - before))

    def _check_failure(self, side: Side) -> None:
        """SideFailed if a side is broken, not just closed in both directions with something left to read."""
        number = side.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise SideFailed(side, OSError(number, os.strerror(number)))
        # poll(2) would tell of this again and again.
        self.waiter.forget(side.connection.fileno())
        self.masks[side.connection.fileno()] = -1
        self.unheard = True

    def _serve(self, side: Side, mask: int) -> None:
        peer = side.peer
        if mask & select.POLLOUT and (side.backlog or peer.piped):
            if side.backlog:
                side.send(side.backlog)
            else:
                peer.drain_pipe()
            if not side.backlog and not peer.piped:
                if peer.finished:
                    side.finish_sending()
                self._watch()
        if mask & (READABLE | FAILED) and not side.finished and not peer.backlog and not side.piped:
            if side.pipe is None or not self._pump_bulk(side, mask):
                self._pump(side, mask)
        elif mask & FAILED:
            if side.backlog or peer.piped:  # there is something to send to it, and nobody to take it
                number = side.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET
                raise SideFailed(side, OSError(number, os.strerror(number)))
            self._check_failure(side)

    def _pump_bulk(self, side: Side, mask: int) -> bool:
        """Move what a side has sent through its pipe; False where that is at an end and it is to be read.

        As urgent data has to be: a splice would stop before it without a word.
        """
        moved = 0 if mask & select.POLLPRI else side.fill_pipe()
        if moved:
            side.drain_pipe()
        if side.piped:
            self._watch()
        elif moved < TRICKLE_BYTES:
            side.leave_pipe()
        return moved > 0

    def _pump(self, side: Side, mask: int) -> None:
        """Move what a side has sent to its peer."""
        peer = side.peer
        data = side.receive_urgent() if mask & select.POLLPRI else None
        if data:
            peer.urgent = True
        else:
            data = side.receive()
        if (data is not None) != (side.reading == READABLE):
            # The urgent byte may lie behind a gap that a hostile peer never fills: poll would report it
            # for ever.  So its news are listened to again when something has come.
            side.reading = select.POLLIN if data is None and mask & select.POLLPRI else READABLE
            self._watch()
        if data is None:
            return
        if self.observe is not None:
            self.observe(side, data)
        if data:
            peer.send(data)
            if peer.backlog:
                self._watch()
            return
        side.finished = True
        if self.first_to_finish is None:
            self.first_to_finish = side
            self.finished_at = deadline_after(self.timeouts.tcp_fin_wait)
        peer.finish_sending()
        self._watch()


class Packet(NamedTuple):
    """The four addresses of a datagram on its way, in the order of travel.

    External ones None while unknown.
    """

    command: str  # udpassociate or udpreply
    client: Endpoint
    relay: Endpoint
    external: Endpoint | None
    target: Endpoint | None


# What tells the external sockets of an association apart: a `redirect from`, or the upstreams to go through.
Outside = RuleAddress | tuple[Path, ...] | None


class UdpEvents(Protocol):
    """What a UDP association asks of its session: verdicts, addresses, and records."""

    def stopping(self) -> bool: ...

    def judge_datagram(self, client: Endpoint, target: Endpoint) -> Decision: ...

    def judge_reply(self, sender: Endpoint, client: Endpoint) -> Decision: ...

    def source_for(self, decision: Decision) -> Outside:
        """Return how a datagram leaves."""
        ...

    def open_external(self, source: Outside, target: Endpoint, client: Endpoint) -> socket.socket: ...

    def log_datagram(self, decision: Decision, packet: Packet, data: bytes) -> None: ...

    def log_dropped(self, packet: Packet, reason: str) -> None: ...

    def note_failure(self, target: Endpoint, fault: str) -> None:
        """Hear of a datagram that could not be sent."""
        ...

    def notice_control(self, data: bytes) -> None: ...


def fragment_target(datagram: bytes) -> Endpoint | None:
    """Return where a fragment, which is not relayed, was to go; None if not even that can be read."""
    try:
        return decode_udp(datagram[:2] + b"\0" + datagram[3:])[0]
    except ProtocolError:
        return None


def remember(table: dict[K, T], key: K, value: T) -> None:
    """Add to a table of at most MOST_VERDICTS; one that is full starts anew."""
    if len(table) >= MOST_VERDICTS:
        table.clear()
    table[key] = value


class UdpPath:
    """An association's external socket of one family, and what passed through it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.local = endpoint_of(connection.getsockname())
        self.keeps_errors = False
        self.targets: set[Endpoint] = set()
        self.sent_bytes = self.sent_packets = 0
        self.received_bytes = self.received_packets = 0
        self.client_sent_bytes = self.client_sent_packets = 0  # the client's side, headers included
        self.client_received_bytes = self.client_received_packets = 0

    def only_target(self) -> Endpoint:
        """Return the target if there was just one, as Dante's closing record wants it."""
        return next(iter(self.targets)) if len(self.targets) == 1 else UNSPECIFIED

    def expects(self, sender: Endpoint) -> bool:
        """Tell whether a socket connected to the only target, where there is just one, would take this.

        A name that an upstream has resolved could be anybody.
        """
        return len(self.targets) != 1 or sender in self.targets or not self.only_target().family


class UdpRelay:
    """A UDP association: one socket on the client's side, one for each family and Outside.

    Ends with the control connection (RFC 1928 section 7) or after timeout.io.udp.  A datagram that
    cannot be relayed is dropped, logged, and nothing more.  Owned by its session's thread.
    """

    def __init__(
        self,
        control: socket.socket,
        relay: socket.socket,
        client: Endpoint,
        events: UdpEvents,
        timeouts: Timeouts,
        connect_targets: bool,
    ) -> None:
        self.control = control
        self.relay = relay
        self.local = endpoint_of(relay.getsockname())
        self.client = client  # port 0: the first datagram from its host tells
        self.client_known = False
        self.events = events
        self.idle_seconds = timeouts.io_udp or NO_DEADLINE
        self.connect_targets = connect_targets
        self.paths: dict[tuple[int, Outside], UdpPath] = {}  # by family
        self.path_of: dict[int, UdpPath] = {}  # descriptor -> path
        self.verdicts: dict[tuple[str, Endpoint], Decision] = {}
        # What needs neither a verdict nor a record any more, by the bytes and addresses as they come:
        self.outward: dict[bytes, tuple[UdpPath, tuple]] = {}  # type: ignore[type-arg]  # header -> path, target
        self.inward: dict[tuple, tuple[bytes, tuple]] = {}  # type: ignore[type-arg]  # sender -> header, receiver
        self.meter: Meter | None = None  # where a monitor is about the association
        self.budget: Budget | None = None  # where a rule has a bandwidth
        self.resume_at = 0.0  # while it is used up: when that is over
        self.turn = 0  # which socket was the first to go on then
        self.client_address: tuple | None = None  # type: ignore[type-arg]  # of the known client
        self.waiter = Waiter()
        self.active = time.monotonic()
        self.orphaned_at = NO_DEADLINE

    def run(self) -> str:
        """Relay datagrams until the association ends; return the reason in Dante's words."""
        with self.waiter:
            self.waiter.watch(self.control.fileno(), select.POLLIN)
            self.waiter.watch(self.relay.fileno(), select.POLLIN)
            while True:
                deadline = min(self.active + self.idle_seconds, self.orphaned_at)
                events = self.waiter.wait(self.resume_at or deadline)
                if self.resume_at:
                    self._resume()
                elif not events and time.monotonic() >= deadline:
                    return CLIENT_CLOSED if self.orphaned_at <= deadline else "i/o timeout"
                for descriptor, mask in events:
                    ended = self._serve(descriptor, mask)
                    if ended:
                        return ended
                if self.meter is not None:
                    self._count(self.meter)
                is_orphan = self.orphaned_at != NO_DEADLINE and not self.resume_at
                if is_orphan and time.monotonic() >= self.orphaned_at:
                    return CLIENT_CLOSED  # also while targets still send

    def close(self) -> None:
        """Close the external sockets; control and relay belong to the session."""
        for path in self.paths.values():
            path.connection.close()
        if self.meter is not None:
            self._count(self.meter)

    def _serve(self, descriptor: int, mask: int) -> str:
        """Act on a readable socket; return a reason if that ends the association."""
        if descriptor == self.control.fileno():
            return self._from_control(mask)
        path = self.path_of.get(descriptor)
        connection = path.connection if path else self.relay
        if path is not None and mask & FAILED:
            self._hear_errors(path)
        for _ in range(UDP_BATCH):
            if self.budget is not None and not self._pay(self.budget, connection):
                break
            try:
                data, address = connection.recvfrom(DATAGRAM_BYTES)
            except BlockingIOError:
                break
            except OSError:
                continue  # for an earlier datagram: as Dante, the association goes on
            if path is None:
                if address != self.client_address or not self._pass_out(data):
                    self._from_client(data, endpoint_of(address))
            elif address in self.inward:
                self._pass_in(path, data, *self.inward[address])
            else:
                # Through an upstream of one family the other one is reached, too.
                self._from_target(path, data, endpoint_of(address))
        return ""

    def _hear_errors(self, path: UdpPath) -> None:
        """Log that nobody listens where datagrams were sent: the others' errors Dante never hears of."""
        for _ in range(UDP_BATCH):
            found = take_error(path.connection)
            if found is None:
                return
            target, number = found
            if number == errno.ECONNREFUSED:
                reason = f"{os.strerror(number)} (delayed error)"
                self.events.log_dropped(self._packet(target, path), reason)

    def _send_out(self, path: UdpPath, payload: bytes, address: Endpoint) -> None:
        """Send a datagram; OSError."""
        try:
            path.connection.sendto(payload, socket_address(address))
        except OSError:
            if not path.keeps_errors:
                raise
            self._hear_errors(path)  # one that came back for an earlier datagram stops the next one
            path.connection.sendto(payload, socket_address(address))

    def _count(self, meter: Meter) -> None:
        """Let the monitor know how far the association is."""
        paths = tuple(self.paths.values())
        meter.count(
            (
                sum(path.client_sent_bytes for path in paths),
                sum(path.client_received_bytes for path in paths),
                sum(path.received_bytes for path in paths),
                sum(path.sent_bytes for path in paths),
            )
        )

    def _note_size(self, error: Exception, side: str) -> None:
        """Let the monitor know of a datagram that was too large."""
        if self.meter is not None and isinstance(error, OSError) and error.errno == errno.EMSGSIZE:
            self.meter.refuse_size(side)

    def _pay(self, budget: Budget, connection: socket.socket) -> bool:
        """Pay for the next datagram of a socket; False where it has to wait, and all others with it."""
        if self.resume_at:
            return False
        waiting = readable_bytes(connection)
        granted = budget.grant(waiting, waiting) if waiting else 0
        if waiting and not granted:
            self.resume_at = budget.ready_at
            for descriptor in (self.relay.fileno(), *self.path_of):
                self.waiter.forget(descriptor)  # the control connection is listened to
            return False
        budget.give_back(granted - waiting)  # another datagram than the one that had to wait
        return True

    def _resume(self) -> None:
        """Go on when the budget has room again."""
        if time.monotonic() < self.resume_at:
            return
        self.resume_at = 0.0
        self.active = time.monotonic()
        # The socket that is watched first is reported first: each in its turn.
        descriptors = [*self.path_of, self.relay.fileno()]
        self.turn = (self.turn + 1) % len(descriptors)
        for descriptor in descriptors[self.turn :] + descriptors[: self.turn]:
            self.waiter.watch(descriptor, select.POLLIN)

    def _pass_out(self, data: bytes) -> bool:
        """Send a datagram on as an earlier one with just this header; False if it is to be judged."""
        length = UDP_HEADER_BYTES.get(data[3] if len(data) > 3 else 0, 0)
        path, target = self.outward.get(data[:length], (None, ()))
        if path is None:
            return False
        self._note_client()
        try:
            path.sent_bytes += path.connection.sendto(data[length:], target)
        except OSError:
            return False  # judged and tried again, it comes into the log
        path.sent_packets += 1
        path.client_sent_bytes += len(data)
        path.client_sent_packets += 1
        return True

    def _pass_in(self, path: UdpPath, data: bytes, header: bytes, receiver: tuple) -> None:  # type: ignore[type-arg]
        """Send the client, or who a redirection names instead, a target's datagram."""
        self.active = time.monotonic()
        path.received_bytes += len(data)
        path.received_packets += 1
        try:
            path.client_received_bytes += self.relay.sendto(header + data, receiver)
        except (OSError, TypeError) as error:  # TypeError: a redirection into the other family
            self._note_size(error, "internal")
            return  # too large with its header, or the client's port is gone: this datagram only
        path.client_received_packets += 1

    def _note_client(self) -> None:
        """Take note that the client is alive."""
        self.active = time.monotonic()
        if self.orphaned_at != NO_DEADLINE:
            self.orphaned_at = self.active + UDP_ORPHAN_SECONDS

    def _from_control(self, mask: int) -> str:
        """Read the control connection; return a reason if it is gone."""
        try:
            data = self.control.recv(READ_BYTES)
        except BlockingIOError:
            return ""
        except OSError as error:
            return f"local client error ({error.strerror})"
        if data:
            self.events.notice_control(data)
            return ""
        if self.events.stopping():
            return ENDED_BY_US
        if mask & FAILED:
            return CLIENT_CLOSED  # a reset behind a FIN: recv(2) does not tell of it
        # Unlike Dante: a FIN may be a mere shutdown(2) of a client that goes on sending datagrams.
        self.orphaned_at = time.monotonic() + UDP_ORPHAN_SECONDS
        self.waiter.watch(self.control.fileno(), 0)
        return ""

    def _packet(self, target: Endpoint | None, path: UdpPath | None = None) -> Packet:
        if path is None and target is not None:
            path = next((p for key, p in self.paths.items() if key[0] == target.family), None)
        return Packet("udpassociate", self.client, self.local, path.local if path else None, target)

    def _from_client(self, data: bytes, sender: Endpoint) -> None:
        """Relay, drop or refuse a datagram that came in on the client's side."""
        if not self._accept_sender(sender):
            return
        self._note_client()
        target = None
        try:
            target, header = decode_udp(data)
            self._relay_out(target, data, header)
        except ProtocolError as error:
            self.events.log_dropped(self._packet(fragment_target(data)), str(error))
        except Refused as error:
            self.events.log_dropped(self._packet(target), str(error))
        except OSError as error:
            self._note_size(error, "external")
            if target is not None:
                self.events.note_failure(target, error.strerror or str(error))
            length = len(data) - header
            self.events.log_dropped(
                self._packet(target), f"sendto of {length} bytes failed: {error.strerror}"
            )

    def _accept_sender(self, sender: Endpoint) -> bool:
        """Tell whether a datagram is this client's; the first one fixes its port.

        Unlike Dante: only the host of the control connection is ever taken for the client.
        """
        if self.client_known:
            return sender == self.client
        if sender.host == self.client.host and self.client.port in (0, sender.port):
            self.client = sender
            self.client_known = True
            self.client_address = socket_address(sender)
            return True
        packet = Packet("udpassociate", sender, self.local, None, UNSPECIFIED)
        self.events.log_dropped(
            packet, f"expected udp packet from clientaddress {self.client}, got it from {sender}"
        )
        return False

    def _relay_out(self, target: Endpoint, data: bytes, header: int) -> None:
        """Send a client's datagram on; Refused, or OSError from the send."""
        if target.port == 0:
            raise Refused("unbound port in udp packet")
        decision = self.verdicts.get(("out", target))
        if decision is None:
            decision = self.events.judge_datagram(self.client, target)
            if decision.lasts:
                remember(self.verdicts, ("out", target), decision)
        payload = data[header:]
        if decision.verdict == "block":
            seen = Packet("udpassociate", self.client, self.local, None, (*decision.addresses, target)[0])
            self.events.log_datagram(decision, seen, payload)
            return
        address = decision.addresses[0]
        path = self._path_for(address, self.events.source_for(decision))
        path.client_sent_bytes += len(data)
        path.client_sent_packets += 1
        self._send_out(path, payload, address)
        path.sent_bytes += len(payload)
        path.sent_packets += 1
        self.events.log_datagram(decision, self._packet(address, path), payload)
        if header == UDP_HEADER_BYTES.get(data[3]) and decision.rule.log.isdisjoint(LOGS_DATAGRAMS):
            remember(self.outward, data[:header], (path, socket_address(address)))

    def _path_for(self, target: Endpoint, source: Outside) -> UdpPath:
        """Return the path for a target, opened when the first of its kind is used."""
        path = self.paths.get((target.family, source))
        if path is None:
            path = UdpPath(self.events.open_external(source, target, self.client))
            if self.connect_targets and (source is None or isinstance(source, RuleAddress)):
                keep_errors(path.connection)
                path.keeps_errors = True
            self.paths[target.family, source] = self.path_of[path.connection.fileno()] = path
            self.waiter.watch(path.connection.fileno(), select.POLLIN)
        if len(path.targets) < MOST_VERDICTS:
            path.targets.add(target)
        return path

    def _from_target(self, path: UdpPath, data: bytes, sender: Endpoint) -> None:
        """Relay or drop a datagram that came in from outside."""
        if self.connect_targets and not path.expects(sender):
            return  # udp.connectdst: as if the socket were connected to its only target
        decision = self.verdicts.get(("in", sender))
        if decision is None:
            # Unlike Dante: each sender is judged, not only the first.
            decision = self.events.judge_reply(sender, self.client)
            if decision.lasts:
                remember(self.verdicts, ("in", sender), decision)
        if decision.verdict == "pass":
            told, receiver = sender, self.client
            if decision.rule.redirect is not None:
                told, receiver = redirect_reply(decision.rule, sender, self.client)
            known = encode_udp_header(told), socket_address(receiver)
            self._pass_in(path, data, *known)
            if decision.rule.log.isdisjoint(LOGS_DATAGRAMS):
                remember(self.inward, socket_address(sender), known)
        else:
            path.received_bytes += len(data)
            path.received_packets += 1
        packet = Packet("udpreply", self.client, self.local, path.local, sender)
        self.events.log_datagram(decision, packet, data)


# ============================== 14. Upstreams ==============================
# The way to a target through other proxies (sockd.conf(5), route): which of them to try, what is
# said to each, and who is to blame when it leads nowhere.  An upstream is trusted no more than a
# client: each of its messages is bounded, and each wait for one ends with timeout.connect.

UPSTREAM_SECONDS = 60.0  # when timeout.connect is 0: who accepts a connection may still say nothing
NO_ROUTE = "could not bind address to use on external side: no usable serverchain route to target found"
NO_UPSTREAM_COMMAND = "command {} is not supported by serverchaining and no direct route found"
LOGIN_BYTES = {"none": 0, "gssapi": 1, "username": 2}
HTTP_LOGIN_WANTED = 407  # RFC 9110 section 15.5.8

# As Dante: what a client is told of an upstream's reply, and what the log says.
UPSTREAM_REPLIES = {
    Reply.FAILURE: (Reply.CONNECTION_REFUSED, "generic failure at remote proxy server"),
    Reply.NOT_ALLOWED: (Reply.CONNECTION_REFUSED, "connection denied by proxy server"),
    Reply.NETWORK_UNREACHABLE: (Reply.NETWORK_UNREACHABLE, "net unreachable by proxy server"),
    Reply.HOST_UNREACHABLE: (Reply.HOST_UNREACHABLE, "target unreachable by proxy server"),
    Reply.CONNECTION_REFUSED: (Reply.CONNECTION_REFUSED, "target refused connection by proxy server"),
    Reply.TTL_EXPIRED: (Reply.TTL_EXPIRED, "connection to target from proxy server timed out"),
    Reply.COMMAND_NOT_SUPPORTED: (Reply.CONNECTION_REFUSED, "command not supported by proxy server"),
    Reply.ADDRESS_TYPE_NOT_SUPPORTED: (
        Reply.CONNECTION_REFUSED,
        "address format in the request we sent is not supported by the proxy server",
    ),
}


class UpstreamRefused(Refused):
    """An upstream has understood a request and says no."""


class LoginRefused(SockdError):
    """An upstream does not take us as who we say we are."""


class NoTicket(SockdError):
    """We cannot log in to an upstream, which is not its fault."""


class PathFailed(SockdError):
    """A path of upstreams does not lead to the target; `reply` is what the client is told.

    `blamed` is the upstream at fault, with the protocol if that may be the fault.  `final`: the
    last upstream has answered, so that another path would be told the same.
    """

    def __init__(
        self,
        text: str,
        reply: Reply = Reply.CONNECTION_REFUSED,
        blamed: tuple[Endpoint, str] | None = None,
        final: bool = False,
    ) -> None:
        super().__init__(text)
        self.reply = reply
        self.blamed = blamed
        self.final = final
        self.source = UNSPECIFIED  # our end of the connection to the first upstream

    def excludes(self, path: Path) -> bool:
        """Tell whether another path would meet the same fault."""
        if self.blamed is None:
            return False
        upstream, protocol = self.blamed
        return any(
            step.upstream == upstream and (not protocol or step.protocol == protocol) for step in path.steps
        )


class UpstreamStream(Stream):
    """A connection to an upstream, and through it to the next ones, until the last has answered."""

    seal: Seal | None = None  # where GSS-API protects it

    def __init__(self, connection: socket.socket, client: int) -> None:
        super().__init__(connection)
        self.client = client  # descriptor: a reset by the client ends all waiting
        self.poller = select.poll()
        self.poller.register(connection.fileno(), select.POLLIN)
        self.poller.register(client, 0)

    def read_more(self, deadline: float) -> None:
        """Add what the upstream has sent to `pending`; PeerGone if the client has gone."""
        events: list[tuple[int, int]] = []
        while not events:
            events = self.poller.poll(poll_milliseconds(deadline))
            if not events and time.monotonic() >= deadline:
                raise DeadlinePassed("no answer from proxy server in time")
        if any(descriptor == self.client for descriptor, _ in events):
            raise PeerGone("local client closed")
        data = self.connection.recv(READ_BYTES)
        if not data:
            raise ProtocolError("premature eof from proxy server while waiting for response")
        self.add(data)

    def add(self, data: bytes) -> None:
        """Add to `pending` what has been received; ProtocolError."""
        self.pending += data

    def unseal(self) -> None:
        """Free what protects the connection, when nothing more will be said."""
        if self.seal is not None:
            self.seal.close()

    def ask(self, message: bytes, decode: Callable[[bytearray], tuple[T, int] | None], deadline: float) -> T:
        """Send a message and return its answer."""
        self.send(message, deadline)
        return self.read_message(decode, deadline)


class SealedUpstreamStream(UpstreamStream):
    """An UpstreamStream from where on messages are protected: `pending` is what was in them."""

    def __init__(self, stream: UpstreamStream, seal: Seal) -> None:
        """Go on where a stream stands; what is pending there is sealed already.  ProtocolError."""
        super().__init__(stream.connection, stream.client)
        self.seal: Seal = seal
        self.add(bytes(stream.pending))

    def add(self, data: bytes) -> None:
        try:
            self.pending += self.seal.open(data)
        except SealBroken as error:
            raise ProtocolError(str(error)) from None

    def send(self, data: bytes, deadline: float) -> None:
        try:
            sealed = self.seal.seal(data)
        except GssError as error:
            raise ProtocolError(str(error)) from None
        super().send(sealed, deadline)


class Errand(NamedTuple):
    """What the last upstream of a path is asked for, and for whom."""

    command: str
    target: Endpoint
    addresses: tuple[Endpoint, ...] = ()  # all that the name in target resolved to
    login: Credentials | None = None  # the client's own, for routes that pass them on
    warden: Channel | None = None  # asked for tickets

    def target_by(self, path: Path) -> Endpoint:
        """Return the target as it is named to the last upstream.

        As Dante: by name where its protocol has names, though the rules have judged addresses.
        Unlike Dante: not where a rule or the route is for some of them only.
        """
        if self.target.family or not path.addresses:
            return self.target
        speaks_ipv4 = path.steps[-1].protocol == "socks_v4"
        if path.addresses == self.addresses and path.route.resolve != "here" and not speaks_ipv4:
            return self.target
        fitting = [a for a in path.addresses if a.family == 4 or not speaks_ipv4]
        return fitting[0]._replace(port=self.target.port)


class Way(NamedTuple):
    """An open path: the connection to the first upstream, and what the last one has said."""

    path: Path
    connection: socket.socket
    bound: Endpoint  # the upstream's address towards the target
    stream: UpstreamStream  # pending: what has come behind the reply already

    def side(self) -> Side:
        """Return the side of a relay that the path leads to."""
        seal, title = self.stream.seal, "remote peer"
        return SealedSide(self.connection, title, seal) if seal else Side(self.connection, title)

    def describe(self, target: Endpoint) -> str:
        """Return the far side for the log.  As Dante: LOCAL PROXY [BOUND] TARGET."""
        local = endpoint_of(self.connection.getsockname())
        proxies = " ".join(describe_endpoint(step.upstream) for step in self.path.steps)
        return f"{local} {proxies} [{describe_endpoint(self.bound)}] {describe_endpoint(target)}"


def log_in(stream: UpstreamStream, step: Step, login: Credentials | None, deadline: float) -> int:
    """Agree with an upstream on a method of SOCKS 5, and give the password if it asks for that.

    Return the method; LoginRefused.
    """
    credentials = step.hop.credentials or login
    usable = ("none", "gssapi", "username") if credentials else ("none", "gssapi")
    offered = [LOGIN_BYTES[method] for method in step.hop.methods if method in usable]
    method = stream.ask(encode_greeting(offered), decode_method, deadline)
    if method == NO_ACCEPTABLE_METHOD:
        raise LoginRefused("proxy server said we did not offer any acceptable authentication methods")
    if method not in offered:
        raise ProtocolError(f"proxy server selected method {method}, which we did not offer")
    if credentials is None or method != LOGIN_BYTES["username"]:
        return method
    message = encode_password(credentials.user, credentials.password)
    if not stream.ask(message, decode_password_status, deadline):
        raise LoginRefused("proxy server did not accept the user name and password")
    return method


def describe_fault(error: Exception) -> str:
    """Return what went wrong with an upstream."""
    if isinstance(error, OSError):
        return f"connection to proxy server failed: {error.strerror}"
    return str(error)


def hear_initiator(
    dialogue: Dialogue, stream: UpstreamStream, fault_kind: type[SockdError], deadline: float
) -> bytes:
    """Return what the warden's answer holds; `fault_kind` where it says why there is nothing.

    PeerGone if the client has gone meanwhile; HelperLate, HelperFailed.
    """
    poller = select.poll()
    poller.register(dialogue.ours, select.POLLIN)
    poller.register(stream.client, 0)
    if any(descriptor == stream.client for descriptor, _ in poller.poll(poll_milliseconds(deadline))):
        raise PeerGone("local client closed")
    (fault, *found), _ = dialogue.hear(max(0.001, deadline - time.monotonic()))
    if fault or len(found) != 1:
        raise fault_kind(fault.decode("utf-8", "replace"))
    return found[0]


def present_ticket(stream: UpstreamStream, token: bytes, began: float, deadline: float) -> bytes:
    """Return an upstream's answer to our token.

    NoTicket where it says nothing in what is left of the time since `began`, or nothing any more, and the
    ticket has taken the most of it: the upstream has waited for us.
    """
    came = time.monotonic()
    try:
        return stream.ask(encode_gssapi(GSSAPI_TOKEN, token), decode_upstream_token, deadline)
    except (DeadlinePassed, ProtocolError, OSError) as error:
        if came - began <= deadline - came:
            raise
        raise NoTicket(f"{describe_fault(error)}, after {came - began:.0f} seconds for a ticket") from None


def establish_context(
    stream: UpstreamStream, service: UpstreamService, warden: Channel, deadline: float
) -> SecurityContext:
    """Return the context that the warden and an upstream have established; NoTicket, LoginRefused.

    Tickets and keys stay with the warden: what comes from there is good for this one connection.
    """
    fields = [text.encode(WIRE_TEXT) for text in service]
    began = time.monotonic()
    try:
        with warden.begin(Favour.INITIATE, fields, max(0.001, deadline - began)) as dialogue:
            token = hear_initiator(dialogue, stream, NoTicket, deadline)
            dialogue.tell(present_ticket(stream, token, began, deadline))
            return SecurityContext(hear_initiator(dialogue, stream, LoginRefused, deadline))
    except (HelperFailed, HelperLate) as error:
        raise NoTicket(str(error)) from None


def agree_on_protection(
    stream: UpstreamStream, context: SecurityContext, settings: Gssapi, deadline: float
) -> int:
    """Return the level of PROTECTIONS that an upstream takes and the route allows; LoginRefused, GssError."""
    allowed = settings.enctypes or DEFAULT_PROTECTIONS
    # As Dante: the best that the route allows is asked for, and whatever it allows may be the answer.
    wish = bytes((max(map(PROTECTIONS.index, allowed)),))
    asked = encode_gssapi(GSSAPI_LEVEL, wish if settings.nec else context.wrap(wish, 0))
    token = stream.ask(asked, decode_upstream_level, deadline)
    answer = token if settings.nec else context.unwrap(token)[0]
    chosen = name_protection(answer)
    if chosen not in allowed:
        raise LoginRefused(f"gssapi protection of proxy server is {chosen}, and not {' or '.join(allowed)}")
    return answer[0]


def protect(
    stream: UpstreamStream, service: UpstreamService, settings: Gssapi, warden: Channel, deadline: float
) -> UpstreamStream:
    """Log in to an upstream by GSS-API (RFC 1961); return the stream from there on.  LoginRefused."""
    try:
        context = establish_context(stream, service, warden, deadline)
        try:
            level = agree_on_protection(stream, context, settings, deadline)
            if level:
                return SealedUpstreamStream(stream, Seal(context, level, "proxy server"))
        except BaseException:
            context.close()
            raise
        context.close()
        return stream
    except GssError as error:
        raise LoginRefused(str(error)) from None


def decode_upstream_reply(data: bytearray) -> tuple[tuple[Reply, Endpoint], int] | None:
    """decode_reply for an upstream: a name in the place of its address is not taken any further."""
    found = decode_reply(data)
    if found is None or found[0][1].family:
        return found
    (reply, bound), used = found
    return (reply, UNSPECIFIED._replace(port=bound.port)), used


def request_socks5(
    stream: UpstreamStream, step: Step, command: str, target: Endpoint, end: float
) -> Endpoint:
    """Ask an upstream by SOCKS 5; return the address that it uses for it.  UpstreamRefused."""
    request = Request(SOCKS5, command, target)
    reply, bound = stream.ask(encode_request(request), decode_upstream_reply, end)
    if reply != Reply.SUCCEEDED:
        told, text = UPSTREAM_REPLIES[reply]
        raise UpstreamRefused(text, told)
    return bound


def request_socks4(
    stream: UpstreamStream, step: Step, command: str, target: Endpoint, end: float
) -> Endpoint:
    """request_socks5 by SOCKS 4, or 4A for a name."""
    # As Dante: the user id is empty unless the route names one.
    user = step.hop.credentials.user if step.hop.credentials else ""
    request = Request(SOCKS4, command, target, user)
    granted, bound = stream.ask(encode_request4(request), decode_reply4, end)
    if not granted:
        raise UpstreamRefused("generic proxy server failure", Reply.CONNECTION_REFUSED)
    return bound


def request_http(stream: UpstreamStream, step: Step, command: str, target: Endpoint, end: float) -> Endpoint:
    """request_socks5 by HTTP CONNECT, whose answers name no address: ours stands for it."""
    answer = stream.ask(encode_http_connect(target, step.hop.credentials), decode_http_answer, end)
    # Unlike Dante, for which only 200 is a success: RFC 9110 section 9.3.6.
    if not 200 <= answer.status < 300:
        text = f'response code {answer.status} from http server indicates failure: "{answer.line}"'
        if answer.status == HTTP_LOGIN_WANTED:
            raise LoginRefused(text)
        raise UpstreamRefused(text, Reply.CONNECTION_REFUSED)
    return endpoint_of(stream.connection.getsockname())


UPSTREAM_REQUESTS = {"socks_v4": request_socks4, "socks_v5": request_socks5, "http": request_http}


class Walk:
    """One attempt to go a path, step by step.  Owned by its session's thread."""

    def __init__(self, path: Path, errand: Errand, stream: UpstreamStream, share: float, end: float) -> None:
        self.path = path
        self.errand = errand
        self.stream = stream
        self.share = share  # until then each upstream must have shown that it lives
        self.end = end  # until then the last one may take for the target

    def run(self, connection: socket.socket) -> Way:
        """Return the open path; PathFailed, PeerGone."""
        bound = UNSPECIFIED
        try:
            for number, step in enumerate(self.path.steps):
                self._log_in(step)
                bound = self._request(number, step)
        except BaseException:
            self.stream.unseal()
            raise
        return Way(self.path, connection, bound, self.stream)

    def _log_in(self, step: Step) -> None:
        blamed = (step.upstream, step.protocol)
        try:
            if step.protocol == "socks_v5":
                method = log_in(self.stream, step, self.errand.login, self.share)
                if METHOD_OF_BYTE[method] == "gssapi":
                    self._protect(step)
        except LoginRefused as refusal:
            raise PathFailed(str(refusal), blamed=self._blame_for_login(step)) from None
        except NoTicket as fault:
            raise PathFailed(str(fault), Reply.FAILURE) from None
        except (DeadlinePassed, ProtocolError, OSError) as error:
            raise PathFailed(describe_fault(error), blamed=blamed) from None

    def _protect(self, step: Step) -> None:
        route, warden = self.path.route, self.errand.warden
        assert warden is not None
        service = name_service(route, step.upstream)
        self.stream = protect(self.stream, service, route.gssapi, warden, self.share)

    def _blame_for_login(self, step: Step) -> tuple[Endpoint, str] | None:
        # A client with a wrong password must not close the route for everybody.
        depends_on_client = "username" in step.hop.methods and step.hop.credentials is None
        return None if depends_on_client else (step.upstream, step.protocol)

    def _request(self, number: int, step: Step) -> Endpoint:
        is_last = number == len(self.path.steps) - 1
        command, target = self.errand.command, self.errand.target_by(self.path)
        after = None  # the one to blame if this upstream does not get to it
        if not is_last:
            command, target = "connect", self.path.steps[number + 1].upstream
            after = (target, "")
        # By SOCKS 5 the upstream has shown that it lives: the time it takes is the target's.
        end = self.end if is_last and step.protocol == "socks_v5" else self.share
        try:
            return UPSTREAM_REQUESTS[step.protocol](self.stream, step, command, target, end)
        except UpstreamRefused as refusal:
            if is_last:
                raise PathFailed(str(refusal), refusal.reply, final=True) from None
            raise PathFailed(f"{step.upstream} to {target}: {refusal}", blamed=after) from None
        except LoginRefused as refusal:
            raise PathFailed(str(refusal), blamed=self._blame_for_login(step)) from None
        except Refused as refusal:
            raise PathFailed(str(refusal), refusal.reply) from None
        except DeadlinePassed as late:
            # Unlike Dante: a target that does not answer is not the last upstream's fault.
            raise PathFailed(str(late), Reply.TTL_EXPIRED, after) from None
        except (ProtocolError, OSError) as error:
            raise PathFailed(describe_fault(error), blamed=(step.upstream, step.protocol)) from None


def decode_second_reply(version: int) -> Callable[[bytearray], tuple[tuple[Reply, Endpoint], int] | None]:
    """Return the decoder of the reply that names the peer of a BIND."""
    if version == SOCKS5:
        return decode_upstream_reply

    def decode(data: bytearray) -> tuple[tuple[Reply, Endpoint], int] | None:
        found = decode_reply4(data)
        if found is None:
            return None
        (granted, peer), used = found
        return (Reply.SUCCEEDED if granted else Reply.FAILURE, peer), used

    return decode


class Upstreams:
    """What a worker knows of its upstreams: failures, sessions, whose turn it is.

    Shared by all threads; the lock is held over no call that waits.
    """

    def __init__(self, config: Config, log: Log) -> None:
        self.most_failures = config.route_maxfail
        self.bad_seconds = config.route_badexpire or NO_DEADLINE
        self.log = log
        self.lock = threading.Lock()
        self.failures: dict[tuple[int, Endpoint, str], tuple[int, float]] = {}  # how many, and the last
        self.sessions: dict[Endpoint, int] = {}
        self.turns: dict[int, int] = {}  # by route

    def arrange(self, paths: Sequence[Path]) -> list[Path]:
        """Return the paths that are not bad, each route's in the order of its `balance`."""
        arranged: list[Path] = []
        if not self.failures and all(path.route.balance == "order" for path in paths):
            return list(paths)
        with self.lock:
            # One turn for each route, though its paths by another protocol may stand behind other routes.
            for number in {path.route.number for path in paths}:
                self.turns[number] = self.turns.get(number, -1) + 1
            for route, group in itertools.groupby(paths, lambda path: path.route):
                arranged += self._balance(route, [path for path in group if not self._is_bad(path)])
        return arranged

    def _balance(self, route: Route, paths: list[Path]) -> list[Path]:
        if route.balance == "random":
            return sorted(paths, key=lambda _: os.urandom(4))
        if route.balance == "fewest":
            return sorted(paths, key=lambda path: sum(self.sessions.get(s.upstream, 0) for s in path.steps))
        if route.balance == "roundrobin" and paths:
            start = self.turns[route.number] % len(paths)
            return paths[start:] + paths[:start]
        return paths

    def _is_bad(self, path: Path) -> bool:
        return bool(self.failures) and any(
            self._has_failed((path.route.number, step.upstream, protocol))
            for step in path.steps
            for protocol in ("", step.protocol)
        )

    def _has_failed(self, key: tuple[int, Endpoint, str]) -> bool:
        """Tell whether an upstream is avoided; one whose time is over starts afresh."""
        count, last = self.failures.get(key, (0, 0.0))
        if not self.most_failures or count < self.most_failures:
            return False
        if time.monotonic() < last + self.bad_seconds:
            return True
        del self.failures[key]
        self.log.write("info", f"route #{key[0]} through {describe_endpoint(key[1])} is tried again")
        return False

    def note_failure(self, path: Path, failure: PathFailed) -> None:
        """Remember who is to blame for a failure, and log it."""
        if failure.blamed is None:
            return
        upstream, number = describe_endpoint(failure.blamed[0]), path.route.number
        self.log.write("warning", f"failed to connect route #{number} to {upstream}: {failure}")
        if not self.most_failures:
            return
        key = (number, *failure.blamed)
        with self.lock:
            count = self.failures.get(key, (0, 0.0))[0] + 1
            self.failures[key] = count, time.monotonic()
        if count == self.most_failures:
            text = f"blacklisting route #{number} through {upstream}.  Reason: {failure}"
            self.log.write("info", text)

    def enter(self, path: Path) -> None:
        """Count a session that goes by a path, whose upstreams have therefore not failed."""
        with self.lock:
            for step in path.steps:
                self.sessions[step.upstream] = self.sessions.get(step.upstream, 0) + 1
                for protocol in ("", step.protocol) if self.failures else ():
                    self.failures.pop((path.route.number, step.upstream, protocol), None)

    def leave(self, path: Path) -> None:
        """Count a session less."""
        with self.lock:
            for step in path.steps:
                self.sessions[step.upstream] -= 1


class Association(NamedTuple):
    """UDP associations at the upstreams of a path, each reached through those before it."""

    path: Path
    controls: tuple[socket.socket, ...]
    relays: tuple[Endpoint, ...]  # the first one is sent to, the others stand in headers
    seal: Seal | None  # where GSS-API protects datagrams
    leave: Callable[[], None]  # called once it is closed

    def is_over(self) -> bool:
        """Tell whether an upstream has ended its part, which it does by closing (RFC 1928 section 7)."""
        poller = select.poll()
        for control in self.controls:
            poller.register(control.fileno(), select.POLLIN)
        return bool(poller.poll(0))

    def close(self) -> None:
        for control in self.controls:
            control.close()
        self.leave()


def could_be_relay(sender: Endpoint, relay: Endpoint) -> bool:
    """Tell whether a datagram may have come from a relay.

    One that the route names by its name has an address that only the upstream before it knows.
    """
    return sender == relay or (not relay.family and bool(sender.family) and sender.port == relay.port)


class UpstreamUdp(socket.socket):
    """A UDP socket by which datagrams go through upstreams: sendto and recvfrom deal with the headers.

    When an upstream ends the association, the next datagram asks for another one.
    """

    def __init__(
        self, plain: socket.socket, association: Association, renew: Callable[[], Association]
    ) -> None:
        """Take over a bound socket and an association; `renew` may raise Refused or OSError."""
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self.association = association
        self.senders = association.relays[1:]  # a name becomes an address with the first answer
        self.renew = renew
        self.setblocking(False)
        self.connect(socket_address(association.relays[0]))

    def sendto(self, data: bytes, address: tuple) -> int:  # type: ignore[override, type-arg]
        """Send data to a target; return its length without the headers.  OSError."""
        if self.association.is_over():
            self._associate()
        host, port = address[0], address[1]
        literal = find_literal(host)
        target = literal._replace(port=port) if literal else Endpoint(host, port, 0)
        headers = b"".join(map(encode_udp_header, (*self.association.relays[1:], target)))
        self.send(self._seal(headers + data))
        return len(data)

    def _seal(self, datagram: bytes) -> bytes:
        """Return a datagram as the first upstream is to get it; OSError."""
        seal = self.association.seal
        if seal is None:
            return datagram
        if len(datagram) > seal.room:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        try:
            return seal.seal(datagram)
        except GssError as error:
            raise OSError(errno.EBADMSG, str(error)) from None

    def _associate(self) -> None:
        try:
            renewed = self.renew()
        except Refused as refusal:
            raise OSError(errno.ENETUNREACH, str(refusal)) from None
        if renewed.relays[0].family != self.association.relays[0].family:
            renewed.close()
            raise OSError(errno.EAFNOSUPPORT, "the next upstream is of another family")
        self.association.close()
        self.association, self.senders = renewed, renewed.relays[1:]
        self.connect(socket_address(renewed.relays[0]))

    def recvfrom(self, size: int, flags: int = 0) -> tuple[bytes, tuple]:  # type: ignore[type-arg]
        """Return a datagram and its sender; OSError also for one that is not as it should be."""
        data, seal = self.recv(size, flags), self.association.seal
        try:
            if seal is not None:
                data = seal.open_datagram(data)
            senders = []
            for relay in self.senders:
                sender, used = decode_udp(data)
                if not could_be_relay(sender, relay):
                    raise ProtocolError("not from the next upstream")
                senders.append(sender)
                data = data[used:]
            sender, used = decode_udp(data)
        except (ProtocolError, SealBroken) as error:
            raise OSError(errno.EPROTO, str(error)) from None
        if not sender.family:
            raise OSError(errno.EPROTO, "from a name")
        # Whoever knows the port is believed once at most: from then on the address counts as well.
        self.senders = tuple(senders)
        return data[used:], socket_address(sender)

    def close(self) -> None:
        """Close the socket and end the association."""
        self.association.close()
        super().close()


def describe_chain_failure(failure: PathFailed) -> str:
    """Return in Dante's words why a session has got no way through upstreams."""
    return str(failure) if str(failure) == NO_ROUTE else f"serverchain failed: {failure}"


# Connects to the first upstream of a path until a deadline; ConnectFailed, ConnectTimeout, Refused, OSError.
Dial = Callable[[Path, float], socket.socket]


def dial_upstream(path: Path, dial: Dial, deadline: float) -> socket.socket:
    """Return the connection to the first upstream of a path; PathFailed, PeerGone."""
    text = "could not connect to upstream proxyserver: "
    blamed = (path.steps[0].upstream, "")
    try:
        return dial(path, deadline)
    except (ConnectFailed, ConnectTimeout) as failure:
        reply = Reply.TTL_EXPIRED if isinstance(failure, ConnectTimeout) else Reply.CONNECTION_REFUSED
        path_failure = PathFailed(f"{text}{failure}", reply, blamed)
        path_failure.source = failure.source
        raise path_failure from None
    except Refused as refusal:
        raise PathFailed(f"{text}{refusal}", refusal.reply) from None
    except OSError as error:
        # No descriptor, no memory: not the upstream's fault.
        raise PathFailed(f"{text}{error.strerror}", Reply.FAILURE) from None


def go_path(path: Path, errand: Errand, dial: Dial, client: int, share: float, end: float) -> Way:
    """Return a path that has been opened; PathFailed, PeerGone."""
    connection = dial_upstream(path, dial, share)
    try:
        walk = Walk(path, errand, UpstreamStream(connection, client), share, end)
        return walk.run(connection)
    except BaseException as error:
        if isinstance(error, PathFailed):
            error.source = endpoint_of(connection.getsockname())
        connection.close()
        raise


def open_path(
    upstreams: Upstreams, paths: Sequence[Path], errand: Errand, dial: Dial, client: int, seconds: float
) -> Way:
    """Return the first path that opens within so many seconds; PathFailed, PeerGone.

    Each path gets an equal share of the time that is left, so that a dead upstream does not use up
    that of the next.  The caller owes `upstreams.leave(way.path)`.
    """
    end = time.monotonic() + (seconds or UPSTREAM_SECONDS)
    failure = PathFailed(NO_ROUTE, Reply.NETWORK_UNREACHABLE)
    left = upstreams.arrange(paths)
    while left and time.monotonic() < end:
        path, *left = left
        now = time.monotonic()
        ways = {tuple(step.upstream for step in other.steps) for other in (path, *left)}
        try:
            way = go_path(path, errand, dial, client, now + (end - now) / len(ways), end)
        except PathFailed as fault:
            failure = fault
            upstreams.note_failure(path, fault)
            if fault.final:
                break
            left = [other for other in left if not fault.excludes(other)]
        else:
            upstreams.enter(path)
            return way
    raise failure


# ============================== 15. Session ==============================
# One client from accept to its request, in a thread of its own.  SessionLog spells the records,
# SessionLookup asks the resolver, Session admits, negotiates and holds what the requests share.

ASKED_OF_DNS = frozenset({Favour.RESOLVE, Favour.REVERSE})
LOOKUP_SHARE = 64  # a quarter of the resolver's threads: for one source of clients, over all workers
RESOLVE_SECONDS = 60.0  # when timeout.connect is 0; a resolver with three servers gives up sooner
PASSWORD_SECONDS = 60.0  # a little more than what the warden grants a check
FAILURE_SECONDS = 5.0  # a name that could not be resolved may be, the next time a datagram names it
NAME_UNKNOWN = "Name or service not known"  # EAI_NONAME, as glibc and Dante say it
REQUEST_NOT_PERFORMED = "request was not performed due to error: "


class Shares:
    """How many look-ups of each source of clients may be under way; more wait for these.

    So a client whose names no server answers holds up nobody else.  Shared by all threads of a worker.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.lock = threading.Lock()  # guards `held`, and is never held over a call that waits
        # Source -> its share, and how many have or await a part of it.
        self.held: dict[str, tuple[threading.Semaphore, int]] = {}

    def take(self, source: str, seconds: float) -> None:
        """Take a part of a source's share, for `give_back`; HelperLate when there is none for so long."""
        with self.lock:
            share, users = self.held.get(source) or (threading.Semaphore(self.most), 0)
            self.held[source] = share, users + 1
        if not share.acquire(timeout=seconds):
            self._leave(source)
            raise HelperLate(f"{self.most} look-ups for {source} have taken more than {seconds:.0f} seconds")

    def give_back(self, source: str) -> None:
        with self.lock:  # who leaves takes it out for a moment
            share = self.held[source][0]
        share.release()
        self._leave(source)

    def _leave(self, source: str) -> None:
        with self.lock:
            share, users = self.held.pop(source)
            if users > 1:
                self.held[source] = share, users - 1


class Serving(NamedTuple):
    """What all sessions of a worker share; nothing in it changes."""

    config: Config
    policy: Policy
    log: Log
    resolver: Channel
    warden: Channel
    shares: Shares
    listening: frozenset[Endpoint] = frozenset()  # where clients are taken
    keepalive: bool = True
    counts: Counts | None = None  # None: no rule limits its sessions
    upstreams: Upstreams | None = None  # None: there is no route
    # Runs a part of the session of a client in a thread of its own; RuntimeError, MemoryError.
    start_thread: Callable[[Endpoint, Callable[[], None]], None] | None = None  # the worker's


# ---- what internal.log and external.log name (sockd.conf(5), LOGS OF ERRORS)

WORD_OF_LEVEL = {"emerg": "emergency", "crit": "critical", "err": "error"}  # the others are their own
NO_ROUTE_ERRORS = frozenset({"ENETUNREACH", "ENETDOWN", "EHOSTUNREACH", "EHOSTDOWN"})
FAILED_END = re.compile(r"(local client|remote peer) error \((.*)\)")
FAMILY_SUFFIX = re.compile(r" for IPv[46] address$")


def names_error(entry: ErrorLog, symbol: str) -> bool:
    """Tell whether a line of the configuration is about an error."""
    if symbol in {errno.errorcode.get(getattr(errno, name, -1), name) for name in entry.symbols}:
        return True
    kind = "dns-any" if symbol.startswith("EAI_") else "system-any"
    return kind in entry.symbols or ("no-route" in entry.symbols and symbol in NO_ROUTE_ERRORS)


def log_failure(log: Log, wanted: Iterable[ErrorLog], side: str, text: str) -> None:
    """Log `WHAT: WHY` again for each line of the configuration that names the error WHY of that side."""
    symbol = ""
    for entry in wanted:
        if entry.side != side or entry.event != "error":
            continue
        symbol = symbol or error_symbols().get(FAMILY_SUFFIX.sub("", text.rpartition(": ")[2]), "")
        if symbol and names_error(entry, symbol):
            log.write(WORD_OF_LEVEL.get(entry.level, entry.level), text)


def log_features(
    log: Log, wanted: Iterable[ErrorLog], side: str, peer: Endpoint, connection: socket.socket
) -> None:
    """Log which features of TCP a new connection uses, or not, where the configuration asks for it."""
    for entry in wanted:
        if entry.side == side and entry.event != "error":
            try:
                used = read_tcp_features(connection)
            except OSError:
                return  # it has gone already
            enabled = entry.event == "tcp.enabled"
            names = " ".join(name for name in entry.symbols if (name in used) is enabled)
            if names:
                state = "enabled" if enabled else "disabled"
                text = f"tcp {state} on connection to host {peer}: {names}"
                log.write(WORD_OF_LEVEL.get(entry.level, entry.level), text)


def describe_failure(failure: ConnectFailed) -> str:
    """Return a failure to connect as Dante's internal.log and external.log spell it."""
    if errno.errorcode.get(failure.error.errno or 0) in NO_ROUTE_ERRORS:
        return f"no route to {failure.target}: {failure.error.strerror}"
    return f"connect to host {failure.target} failed: {failure.error.strerror}"


class SessionLookup:
    """The Lookup of one session: asks the resolver, and remembers the answers for its lifetime.

    That it remembers pins DNS: what the rules judged is what is connected to.
    """

    def __init__(
        self, serving: Serving, connection: socket.socket, client: Endpoint, local: Endpoint
    ) -> None:
        self.serving = serving
        self.connection = connection
        self.client = client
        self.local = local
        # By question; with when it expires.
        self.answers: dict[tuple[Favour, str, tuple[bytes, ...]], tuple[list[bytes], float]] = {}
        self.ident_answer: str | None = None
        self.ident_asked = False
        # Why nobody answered what is being judged now, or "".  Without an answer a rule matches as little
        # as where the answer was no, so whoever judges looks here before anything passes.
        self.unanswered = ""

    def ask(self, favour: Favour, text: str, *more: bytes) -> list[bytes]:
        """Return the resolver's answer, first what went wrong ("" for nothing).

        At most MOST_VERDICTS are kept.
        """
        answer, expires = self.answers.get((favour, text, more), ([], 0.0))
        if answer and time.monotonic() < expires:
            return answer
        deadline = time.monotonic() + (self.serving.config.timeouts.connect or RESOLVE_SECONDS)
        try:
            fault, *found = self._ask_in_turn(favour, [text.encode("latin-1", "replace"), *more], deadline)
        except SockdError as error:
            self.unanswered = self.unanswered or str(error)
            return [str(error).encode()]
        answer = [fault, *(part for field in found for part in field.split(FOUND_BORDER) if part)]
        if len(self.answers) >= MOST_VERDICTS:
            self.answers.clear()
        lifetime = FAILURE_SECONDS if answer[0] else NO_DEADLINE
        self.answers[favour, text, more] = answer, time.monotonic() + lifetime
        return answer

    def _ask_in_turn(self, favour: Favour, question: list[bytes], deadline: float) -> list[bytes]:
        """Ask the resolver, once what the client has asked for before leaves room; SockdError."""
        if favour not in ASKED_OF_DNS:
            return self.serving.resolver.ask(favour, question, deadline - time.monotonic())[0]
        shares, source = self.serving.shares, Failures.find_source(self.client.host)
        shares.take(source, deadline - time.monotonic())
        try:
            return self.serving.resolver.ask(favour, question, max(0.0, deadline - time.monotonic()))[0]
        finally:
            shares.give_back(source)

    def hold_back(self, decision: Decision) -> Decision:
        """Return a verdict of the rules; block what passes where nobody answered a look-up for it.

        Unlike Dante: a rule is passed over only where the answer is no.  A client that keeps the resolver
        busy does not get past the rules that need it.
        """
        if decision.verdict == "block" or not self.unanswered:
            return decision
        reason = f"rules could not be compared: {self.unanswered}"
        return decision._replace(verdict="block", reason=reason, lasts=False)

    def resolve(self, name: str) -> tuple[tuple[Endpoint, ...], str]:
        """Return a name's addresses, or what went wrong if none is of a family that we can leave by.

        Those of the other family are given where the rules may ask about them.
        """
        families = external_families(self.serving.config, self)
        asked = families | self.serving.policy.judged_families
        answer = self.ask(Favour.RESOLVE, name, "".join(map(str, sorted(asked))).encode())
        # A name for "this host" is no target: connect(2) takes 0.0.0.0 for 127.0.0.1, past every
        # rule about that.
        found = tuple(e for e in decode_endpoints(answer[1:]) if e.host not in IP_ANY)
        usable = tuple(e for e in found if e.family in families)
        if usable:
            # These first: a proxy that is sent one address has hardly more families than we.
            return usable + tuple(e for e in found if e.family not in families), ""
        fault = answer[0].decode() or NAME_UNKNOWN
        if fault == NAME_UNKNOWN and len(families) == 1:
            fault = f"{fault} for IPv{min(families)} address"
        logs = self.serving.config.error_logs
        if logs:
            text = f'could not DNS-resolve "{escape_text(name)}": {fault}'
            log_failure(self.serving.log, logs, "external", text)
        return (), fault

    def prefer_usable(self, addresses: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        """Return those of the addresses that we can connect to, or all where there is no such one."""
        if len(addresses) == 1:
            return addresses
        of_family = find_externals(self.serving.config, self).of_family
        return tuple(e for e in addresses if of_family[e.family]) or addresses

    def addresses(self, name: str) -> tuple[Endpoint, ...]:
        answer = self.ask(Favour.RESOLVE, name, b"46")
        if answer[0]:
            text = f'could not resolve "{escape_text(name)}", which a rule names: {answer[0].decode()}'
            self.serving.log.write("warning", text)
        return decode_endpoints(answer[1:])

    def names(self, address: Endpoint) -> tuple[str, ...]:
        return tuple(
            n.decode("latin-1") for n in self.ask(Favour.REVERSE, f"{address.family} {address.host}")[1:]
        )

    def interface(self, name: str) -> tuple[Endpoint, ...]:
        return decode_endpoints(self.ask(Favour.INTERFACE, name)[1:])

    def groups(self, user: str) -> frozenset[str]:
        return frozenset(g.decode("latin-1") for g in self.ask(Favour.GROUPS, user)[1:])

    def user_exists(self, user: str) -> bool:
        return not self.ask(Favour.GROUPS, user)[0]

    def ident(self) -> str | None:
        if not self.ident_asked:
            self.ident_asked = True
            deadline = time.monotonic() + IDENT_SECONDS
            self.ident_answer = ask_ident(self.connection, self.client, self.local, deadline)
        return self.ident_answer


class SessionLog:
    """The records of one session, in Dante's spelling.  What a rule's `log` does not name is not written."""

    def __init__(self, log: Log, connection: socket.socket, client: Endpoint, local: Endpoint) -> None:
        self.log = log
        self.connections = [connection]  # the client's, and the target's once there is one: for tcpinfo
        self.client = client
        self.local = local
        self.client_rule = FINAL_CLIENT_BLOCK
        self.accept_side = f"{client} {local}"
        self.side = self.accept_side  # with method%user@ once a socks-rule took the client by one
        self.started = time.monotonic()
        self.before = (0, 0)  # bytes sent to the client and received in requests that are over
        self.ended = False  # the record of how it ended has been dealt with

    def seconds(self) -> int:
        """Return the session's age as Dante counts it: the difference of the whole seconds."""
        return int(time.monotonic()) - int(self.started)

    def identify(self, identity: Identity) -> None:
        """Name the client in the accept-level records."""
        self.accept_side = (
            f"{describe_client(self.client, identity.clientmethod, identity.user)} {self.local}"
        )
        self.side = self.accept_side

    def authenticate(self, method: str, user: str) -> None:
        """Name the client in the records of its request."""
        self.side = f"{describe_client(self.client, method, user)} {self.local}"

    def write(self, verdict: str, rule: Rule, event: str, bracket: str, rest: str) -> None:
        self.log.write("info", f"{verdict}({rule.number}): {event} {bracket}: {rest}")

    def tcp_info(self) -> str:
        """Return the TCP_INFO block of an accept-level record, or ""."""
        return describe_tcp_info(self.connections) if "tcpinfo" in self.client_rule.log else ""

    def accepted(self) -> None:
        if "connect" in self.client_rule.log:
            self.write("pass", self.client_rule, "tcp/accept", "[", self.accept_side + self.tcp_info())

    def blocked_at_accept(self, reason: str = "", wanted: frozenset[str] = frozenset()) -> None:
        """Record a block by the client-rule itself."""
        self.ended = True
        wanted = wanted or (LOGS_AN_ERROR if reason else LOGS_A_BLOCK)
        if not wanted.isdisjoint(self.client_rule.log):
            rest = f"{self.accept_side}: {reason}" if reason else self.accept_side
            self.write("block", self.client_rule, "tcp/accept", "]", rest + self.tcp_info())

    def negotiation_failed(self, received: int, reason: str) -> None:
        count, age = describe_count(received, "byte"), describe_count(self.seconds(), "second")
        self.blocked_at_accept(f"error after reading {count} in {age}: {reason}")

    def refused_above(
        self, reason: str, verdict: str = "block", wanted: frozenset[str] = LOGS_A_BLOCK
    ) -> None:
        """Record at accept level what became of a request at the socks level."""
        self.ended = True
        if not wanted.isdisjoint(self.client_rule.log):
            self.write(verdict, self.client_rule, "tcp/accept", "]", f"{self.accept_side}: {reason}")

    def request_failed(self, rule: Rule, event: str, path: str, reason: str) -> None:
        """Record a request that a rule let pass, or none has judged yet, and that could not be done."""
        if not LOGS_AN_ERROR.isdisjoint(rule.log):
            self.write("block", rule, event, "]", f"{self.side}{path}: {reason}")
        self.refused_above(REQUEST_NOT_PERFORMED + reason, wanted=LOGS_AN_ERROR)

    def request_blocked(self, rule: Rule, event: str, target: str, reason: str) -> None:
        """Record a request that the socks-rules forbid."""
        if not LOGS_A_BLOCK.isdisjoint(rule.log):
            rest = f"{self.side} -> {UNSPECIFIED} {target}"
            self.write("block", rule, event, "]", f"{rest}: {reason}" if reason else rest)
        why = f": {reason}" if reason else ""
        self.refused_above(f"blocked by higher-level socks-rule #{rule.number}{why}")

    def closing(self, rule: Rule, reason: str) -> str:
        """Return the end of a closing record, or "" where the rule does not log it."""
        wanted = "disconnect" in rule.log or ("error" in rule.log and not reason.endswith("closed"))
        return f": {reason}.  Session duration: {self.seconds()}s" if wanted else ""

    def closed(self, sent: int, received: int, reason: str) -> None:
        """Record the end of an established session at accept level; the counts are the client's."""
        self.ended = True
        end = self.closing(self.client_rule, reason)
        if end:
            sent, received = sent + self.before[0], received + self.before[1]
            rest = f"{sent} -> {self.accept_side} -> {received}{end}"
            self.write("pass", self.client_rule, "tcp/accept", "]", rest + self.tcp_info())


def pause(connection: socket.socket, seconds: float) -> None:
    """Let a client wait; PeerGone if it resets its connection meanwhile."""
    if not seconds:
        return
    try:
        wait_for(connection.fileno(), 0, time.monotonic() + min(seconds, MOST_WAIT_SECONDS))
    except DeadlinePassed:
        return
    raise PeerGone("eof from local client")


def count_until_wrong(decode: Callable[[bytearray], object], data: bytearray) -> int:
    """Return how many bytes a decoder needed to see that a message is wrong.  As Dante.

    Which reads no further.
    """
    for length in range(1, len(data)):
        try:
            decode(data[:length])
        except ProtocolError:
            return length
    return len(data)


def check_family(config: Config, target: Endpoint, lookup: Lookup) -> None:
    """Refused unless there is an external address of the target's family."""
    if not can_leave_by(config, target.family, lookup):
        raise Refused(
            f"connect to IPv{target.family} address requested, but no IPv{target.family} address configured "
            "for our usage on the external interface",
            Reply.ADDRESS_TYPE_NOT_SUPPORTED,
        )


class Session:
    """One client.  Runs in one thread, which owns everything here but `stopping`."""

    def __init__(
        self, serving: Serving, connection: socket.socket, client: Endpoint, local: Endpoint
    ) -> None:
        self.serving = serving
        self.config = serving.config
        self.connection = connection
        self.client = client
        self.local = local
        self.stream = Stream(connection)
        self.lookup = SessionLookup(serving, connection, client, local)
        self.record = SessionLog(serving.log, connection, client, local)
        self.identity = Identity()
        self.client_rule = FINAL_CLIENT_BLOCK
        self.password: bytes | None = None
        self.seal: Seal | None = None  # of a connection that GSS-API protects
        self.verified: dict[tuple[str, str], str] = {}  # (method, service) -> "" or why not
        self.used = 0  # bytes of the handshake that were understood
        self.request: Request | None = None
        self.answer: Callable[[Reply, Endpoint], None] | None = None  # HTTP's, in the place of SOCKS
        self.deadline = NO_DEADLINE  # for the handshake
        self.phase = "negotiating"
        self.only_relays = False  # from then on nothing is asked any more
        self.stopping = False  # set by the worker when the server ends
        self.describe_io: Callable[[], str] | None = None
        self.opened: list[socket.socket] = []  # closed, whatever happens, at the end
        self.request_rule = FINAL_SOCKS_BLOCK  # that let the request pass
        self.budget: Budget | None = None
        self.meter: Meter | None = None
        self.admitted: Place | None = None  # held of the client-rule's session limits
        self.places: list[Place] = []  # held of those of socks-rules
        self.ways: list[Way] = []  # through upstreams, under way

    # --- the phases ---

    def lose_client(self, error: Exception) -> None:
        """Record that the client went away while it was being answered."""
        if not self.record.ended:
            fault = error.strerror if isinstance(error, OSError) else str(error)
            self.record.closed(0, 0, ENDED_BY_US if self.stopping else f"local client error ({fault})")

    def close(self) -> None:
        """Close everything that was opened for the client."""
        self.describe_io = None  # it holds the session in a circle, see part_sides
        for opened in self.opened:
            opened.close()
        if self.seal is not None:
            self.seal.close()
        self.connection.close()
        self.leave_places()
        if self.budget is not None:
            self.budget.close()

    def abort(self) -> None:
        """Make the session end soon.  Called by the worker's main thread."""
        self.stopping = True
        budget = self.budget  # the session's thread may take it away
        if budget is not None:
            budget.cancel()
        for opened in (self.connection, *self.opened):
            try:
                opened.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def describe(self) -> str:
        """Return the session's state for SIGUSR1.  Called by the worker's main thread."""
        age = describe_count(self.record.seconds(), "second")
        describe_io = self.describe_io  # the session's thread may take it away
        if describe_io is not None:
            return f"{describe_io()}: age: {age}"
        what = f" {self.request.command}" if self.request is not None else ""
        return f"{self.client} {self.local}: {self.phase}{what} for {age}"

    def may_ask(self) -> bool:
        """Tell whether the session may still ask the warden, which a mere relay does not.

        Called by the worker's main thread.
        """
        return not self.only_relays

    def admit(self) -> bool:
        """Ask libwrap and the client-rules whether the client may talk to us at all."""
        if self.config.libwrap_hosts_access:
            reason = self.ask_libwrap("hosts_access", 0, self.connection)
            if reason:
                # Unlike Dante, which leaves no trace of it.
                self.record.blocked_at_accept(reason)
                return False
        facts = Facts("accept", "tcp", "", self.client, self.local)
        decision, identity = self.serving.policy.client_decision(facts, self.lookup)
        decision = self.lookup.hold_back(decision)
        self.client_rule = self.record.client_rule = decision.rule
        self.identity = identity
        self.record.identify(identity)
        passes = decision.verdict == "pass"
        reason = self.verify(decision.method, decision.rule) if passes else decision.reason
        if not reason:
            decision = self.wrap(decision, self.connection)
            reason = decision.reason
        if decision.verdict == "block" or reason:
            self.record.blocked_at_accept(reason)
            return False
        try:
            self.let_in(decision.rule)
        except Refused as refusal:
            self.record.blocked_at_accept(str(refusal), LOGS_A_BLOCK)
            return False
        self.record.accepted()
        self.set_own_options(decision.rule)
        self.note_features(decision.rule, "internal", self.connection)
        return True

    def error_logs(self, rule: Rule) -> tuple[ErrorLog, ...]:
        """Return the global lines of internal.log and external.log, and a rule's.

        Unlike Dante, which parses those of a rule and does nothing.
        """
        return self.config.error_logs + rule.error_logs

    def note_failure(self, rule: Rule, side: str, text: str) -> None:
        """Log a failure, WHAT: WHY, once more if the configuration names it."""
        logs = self.error_logs(rule)
        if logs:
            log_failure(self.serving.log, logs, side, text)

    def note_end(self, rule: Rule, reason: str) -> None:
        """Log once more how a session ended, if that was an error that the configuration names."""
        logs = self.error_logs(rule)
        failed = FAILED_END.fullmatch(reason) if logs else None
        if failed:
            side = "internal" if failed[1] == "local client" else "external"
            log_failure(
                self.serving.log, logs, side, f"i/o with {failed[1]} of {self.client} failed: {failed[2]}"
            )

    def note_features(self, rule: Rule, side: str, connection: socket.socket) -> None:
        """Log the features of TCP that a new connection uses, if the configuration asks for them."""
        logs = self.error_logs(rule)
        if logs:
            try:
                peer = endpoint_of(connection.getpeername())
            except OSError:
                return  # it has gone already
            log_features(self.serving.log, logs, side, peer, connection)

    def let_in(self, rule: Rule) -> None:
        """Check the client's DNS entry and count the session; Refused."""
        fault = self.find_srchost_fault(self.client)
        if fault:
            raise Refused(fault)
        self.take_place(rule)

    def find_srchost_fault(self, host: Endpoint) -> str:
        """Return what is wrong with the DNS entry of who connects (sockd.conf(5), srchost), or ""."""
        srchost = self.config.srchost
        if not srchost & {"nodnsunknown", "nodnsmismatch"}:
            return ""
        names = self.lookup.names(host)
        if self.lookup.unanswered:
            return f"no answer about srchost {host}: {self.lookup.unanswered}"
        if not names:
            return f"no dns entry found for srchost {host}" if "nodnsunknown" in srchost else ""
        # As Dante: with "resolveprotocol: fake" no name has an address.
        asked = () if self.serving.policy.fake else names
        hosts = {address.host for name in asked for address in self.lookup.addresses(name)}
        if "nodnsmismatch" in srchost and host.host not in hosts:
            return (
                f"DNS IP/hostname mismatch.  {host.host} does not match reversemapped addresses for "
                f'hostname "{escape_text(names[0])}"'
            )
        return ""

    def negotiate(self) -> bool:
        """Read the handshake as far as the request; False if the client failed at it."""
        seconds = self.client_rule.timeouts.negotiate
        self.deadline = deadline_after(seconds)
        try:
            self.request = self.read_handshake(self.deadline)
            return True
        except DeadlinePassed:
            # Its own form in Dante: no count of bytes.
            self.record.blocked_at_accept(f"negotiate timeout after {describe_count(seconds, 'second')}")
        except ProtocolError as error:
            self.record.negotiation_failed(self.used, str(error))
        except PeerGone as error:
            self.record.negotiation_failed(self.stream.received, str(error))
        except OSError as error:
            fault = error.strerror or str(error)
            self.note_failure(self.client_rule, "internal", f"read from host {self.client} failed: {fault}")
            self.record.negotiation_failed(self.stream.received, fault)
        return False

    def read(self, decode: Callable[[bytearray], tuple[T, int] | None], deadline: float) -> T:
        """Read one message and count its bytes; answer a wrong one as its form demands, and raise."""
        pending = self.stream.pending
        try:
            message = self.stream.read_message(decode, deadline)
        except ProtocolError as error:
            version = pending[0]
            self.used += count_until_wrong(decode, pending)
            if error.reply is not None and decode is decode_password:
                self.stream.send(encode_password_status(False), deadline)
            elif error.reply is not None:
                self.stream.send(encode_reply_for(version, error.reply, UNSPECIFIED), deadline)
            raise
        self.used = self.stream.received - len(pending)
        return message

    def read_handshake(self, deadline: float) -> Request:
        """Return the client's request after whatever has to come before it."""
        if not self.stream.pending:
            self.stream.read_more(deadline)
        first = self.stream.pending[0]
        if first == SOCKS4:
            return self.read_request4(deadline)
        if first != SOCKS5 and self.serving.policy.speaks_http and first in HTTP_FIRST_BYTES:
            # Unlike Dante: its rules can name http, but no client is ever served by it.
            return Request(HTTP1, "connect", UNSPECIFIED)
        offered = self.read(decode_greeting, deadline)
        method = choose_method(self.client_rule.socksmethods, offered)
        self.stream.send(encode_method(method), deadline)
        if method == NO_ACCEPTABLE_METHOD:
            raise ProtocolError("client offered no acceptable authentication method")
        if METHOD_OF_BYTE[method] == "username":
            self.read_password(deadline)
        elif METHOD_OF_BYTE[method] == "gssapi":
            self.read_gssapi(deadline)
        return self.read(decode_request, deadline)

    def read_request4(self, deadline: float) -> Request:
        """Return a SOCKS 4 request; its sender counts as one that offers no authentication."""
        request = self.read(decode_request4, deadline)
        if choose_method(self.client_rule.socksmethods, (0,)) == NO_ACCEPTABLE_METHOD:
            self.stream.send(encode_reply4(False, request.target), deadline)
            wanted = ", ".join(self.client_rule.socksmethods)
            raise ProtocolError(
                f"client-rule #{self.client_rule.number} requires SOCKS authentication to use for "
                f'matching clients to be "{wanted}", but connected client is using SOCKS v4, '
                "which does not support any authentication"
            )
        return request

    def identify(self, method: str, user: str) -> None:
        """Take the client for another user: what was verified at accept was not about that one."""
        self.identity = self.identity._replace(method=method, user=user)
        self.verified.clear()

    def read_password(self, deadline: float) -> None:
        """Read user and password, and check them now if it is clear against what."""
        user, self.password = self.read(decode_password, deadline)
        self.identify("username", user)
        method = only_password_method(self.config)
        fault = self.verify(method, self.password_rule(method)) if method else ""
        self.stream.send(encode_password_status(not fault), deadline)
        if fault:
            raise ProtocolError(fault)

    def read_gssapi(self, deadline: float) -> None:
        """Authenticate the client by GSS-API, and agree on what that protects from here on (RFC 1961)."""
        try:
            context = self.read_context(deadline)
            try:
                level = self.read_protection(context, deadline)
                self.seal = Seal(context, level, "client") if level else None
            finally:
                if self.seal is None:
                    context.close()
            if self.seal is not None:
                self.stream = SealedStream(self.stream, self.seal)
        except (ProtocolError, GssError) as error:
            # Unlike Dante, which just hangs up.
            send_all(self.connection, GSSAPI_ABORT, deadline)
            raise ProtocolError(str(error)) from None

    def read_context(self, deadline: float) -> SecurityContext:
        """Return the context that the client and the warden have established; ProtocolError, GssError.

        The key of the service never leaves the warden's side: what comes from there is good for this
        one connection.
        """
        fields = [str(self.client_rule.number).encode("ascii"), self.read(decode_gssapi_token, deadline)]
        seconds = max(0.001, min(PASSWORD_SECONDS, deadline - time.monotonic()))
        try:
            answer, _ = self.serving.warden.ask(Favour.ACCEPT, fields, seconds)
            fault, token, user, exported = (*answer, b"", b"", b"")[:4]
        except DeadlinePassed:
            raise
        except SockdError as error:
            raise ProtocolError(str(error)) from None
        if fault:
            raise ProtocolError(fault.decode("utf-8", "replace"))
        self.identify("gssapi", user.decode(WIRE_TEXT))
        self.stream.send(encode_gssapi(GSSAPI_TOKEN, token), deadline)
        return SecurityContext(exported)

    def read_protection(self, context: SecurityContext, deadline: float) -> int:
        """Return the level that the client asks for and the client-rule allows; ProtocolError, GssError."""
        settings = self.client_rule.gssapi
        token = self.read(decode_gssapi_level, deadline)
        # As Dante: NEC's clients say it in the clear.
        is_nec = settings.nec and len(token) == 1
        wish = token if is_nec else context.unwrap(token)[0]
        allowed = settings.enctypes or DEFAULT_PROTECTIONS
        asked = name_protection(wish)
        if asked not in allowed:
            offer = ", ".join(f"{word.replace('-', ' ')}/{int(word in allowed)}" for word in PROTECTIONS)
            raise ProtocolError(
                "the client requests different authentication from what we offer.  "
                f"Client requests {asked} (0x{wish[:1].hex().lstrip('0') or '0'}), but we offer: {offer}"
            )
        self.stream.send(encode_gssapi(GSSAPI_LEVEL, wish if is_nec else context.wrap(wish, 0)), deadline)
        return wish[0]

    def protection(self) -> str:
        """Return the word for what GSS-API protects of the client's connection."""
        return PROTECTIONS[self.seal.level if self.seal is not None else 0]

    def find_protection_fault(self, rule: Rule) -> str:
        """Return why the client's protection is not enough for a rule, or "".

        Unlike Dante, for which gssapi.enctype counts in client-rules only.
        """
        level = self.protection()
        if level in (rule.gssapi.enctypes or PROTECTIONS):
            return ""
        return f"gssapi protection is {level}, and not {' or '.join(rule.gssapi.enctypes)}"

    def client_side(self) -> Side:
        """Return the client's side of a relay."""
        title = "local client"
        return SealedSide(self.connection, title, self.seal) if self.seal else Side(self.connection, title)

    def password_rule(self, method: str) -> Rule:
        """Return a rule that says by which service a password is checked."""
        return next((r for r in self.config.socks_rules if method in r.socksmethods), self.client_rule)

    def verify(self, method: str, rule: Rule) -> str:
        """Return "" if the client is who it says it is, else why not.

        Asks the warden once for each method.
        """
        if method in ("none", ""):
            return ""
        if method == "gssapi":
            return self.find_protection_fault(rule)
        if method == "rfc931":
            user_name = self.lookup.ident_answer or ""
            known = self.lookup.user_exists(user_name)
            return "" if known else f'no user "{escape_text(user_name)}" found in system password file'
        key = (method, rule.pam_servicename if method.startswith("pam.") else "")
        if key not in self.verified:
            user = self.identity.user.encode("latin-1")
            fields = [method.encode(), key[1].encode(), user, self.password or b""]
            fields += [self.client.host.encode(), self.local.host.encode()]
            try:
                answer, _ = self.serving.warden.ask(Favour.PASSWORD, fields, PASSWORD_SECONDS)
                fault, wait = answer[0].decode(), float(answer[1])
                self.verified[key] = fault
                pause(self.connection, wait)
            except (SockdError, ValueError, IndexError) as error:
                self.verified[key] = f'could not check user "{escape_text(self.identity.user)}": {error}'
        return self.verified[key]

    # --- what the requests share ---

    def decide(self, facts: Facts, peer: socket.socket | None = None) -> Decision:
        """Judge by the socks-rules and verify what the matching rule wants verified.

        `peer` is the connection of who answers a BIND.
        """
        if peer is not None and self.config.libwrap_hosts_access:
            reason = self.ask_libwrap("hosts_access", 0, peer)
            if reason:
                return Decision("block", FINAL_SOCKS_BLOCK, reason)
        decision = self.judge(facts)
        fault = self.verify_facts(decision, facts)
        if fault:
            # As Dante: a wrong password ends the search; no later rule is tried.
            return decision._replace(verdict="block", reason=fault)
        return self.wrap(decision, peer or self.connection)

    def judge(self, facts: Facts) -> Decision:
        """Judge by the socks-rules alone."""
        return self.lookup.hold_back(self.serving.policy.socks_decision(facts, self.lookup))

    def verify_facts(self, decision: Decision, facts: Facts) -> str:
        """Return why a request or reply does not pass after all, or ""."""
        if facts.command not in REPLY_COMMANDS:
            return self.verify(decision.method, decision.rule)
        # As Dante: who connects to a BIND is checked as clients are, who sends a datagram is not.
        checked = facts.command == "bindreply" and decision.verdict == "pass"
        return self.find_srchost_fault(facts.source) if checked else ""

    def wrap(self, decision: Decision, connection: socket.socket) -> Decision:
        """Have the libwrap line of the rule carried out, if it has one; where that fails, block.

        As Dante: also under a rule that blocks, and for each datagram and answer that is judged.
        """
        rule = decision.rule
        if rule.libwrap is None:
            return decision
        fault = self.ask_libwrap(rule.kind, rule.number, connection)
        return decision._replace(verdict="block", reason=fault) if fault else decision

    def ask_libwrap(self, what: str, number: int, connection: socket.socket) -> str:
        """Return "" if libwrap lets a connection pass, else why not.

        `what` is hosts_access, or the kind of a rule whose libwrap line the warden is to look up.
        """
        fields = [what.encode("ascii"), str(number).encode("ascii")]
        try:
            answer, _ = self.serving.warden.ask(Favour.WRAP, fields, PASSWORD_SECONDS, connection.fileno())
            return answer[0].decode("utf-8", "replace")
        except (SockdError, IndexError) as error:
            return f"libwrap: {error}"

    def decide_request(self, facts: Facts) -> Decision:
        """Judge what the client has asked for, once, and count it where its rule limits the sessions."""
        decision = self.decide(facts)
        if decision.verdict == "pass":
            self.request_rule = decision.rule
            decision = self.count(decision)
        if decision.verdict == "pass":
            self.meter = self.open_meter(facts)
        return decision

    def open_meter(self, facts: Facts) -> Meter | None:
        """Return what adds a relay to the monitor that the facts belong to, if there is one."""
        if not self.config.monitors or self.serving.counts is None:
            return None
        monitor = find_monitor(self.config.monitors, facts, self.lookup)
        return self.serving.counts.meter(monitor) if monitor is not None and monitor.alarms else None

    def make_budget(self, rule: Rule) -> Budget | None:
        """Return the session's part in a bandwidth, which it owns."""
        self.budget = self.open_budget(rule)
        return self.budget

    def open_budget(self, rule: Rule) -> Budget | None:
        """Return a relay's part in a bandwidth: of the rule, of the request's, or of the client-rule."""
        counts = self.serving.counts
        if counts is None:
            return None
        limited = (rule, self.request_rule, self.client_rule)
        return next((Budget(counts, one) for one in limited if one.bandwidth), None)

    def count(self, decision: Decision) -> Decision:
        """Count a session under the rule that passed it, or block it."""
        try:
            self.take_place(decision.rule)
        except Refused as refusal:
            return decision._replace(verdict="block", reason=str(refusal))
        return decision

    def take_place(self, rule: Rule) -> None:
        """Take a place under a rule's session limits, if it has any; Refused.

        As Dante: a socks-rule with limits takes the session over from the client-rule, and one without
        them leaves it there, if it is inheritable.  Where an earlier request over HTTP has taken it over
        and is done with it, it goes back.
        """
        place = self.hold_place(rule)
        if rule.kind == "client":
            self.admitted = place
            return
        if place is not None or not self.client_rule.session.inheritable:
            self.leave_place(self.admitted)
            self.admitted = None
        elif self.admitted is None and not self.places:
            self.admitted = self.hold_place(self.client_rule, is_new=False)
        if place is not None:
            self.places.append(place)

    def hold_place(self, rule: Rule, is_new: bool = True) -> Place | None:
        """Return a place under a rule's session limits, to be left by the caller, if it has any; Refused."""
        counts = self.serving.counts
        if counts is None or not limits_sessions(rule.session):
            return None
        return counts.take(rule, self.client, is_new)

    def leave_place(self, place: Place | None) -> None:
        """Give back a place, if it is one."""
        if place is not None and self.serving.counts is not None:
            self.serving.counts.leave(place)

    def leave_places(self) -> None:
        """Give back what the session holds of the limits."""
        if self.admitted is not None:
            self.places.append(self.admitted)
            self.admitted = None
        self.leave_requests()

    def leave_requests(self) -> None:
        """Give back what requests that are over hold: of limits, in monitors, in the balance of upstreams."""
        if self.meter is not None:
            self.meter.close()
            self.meter = None
        held, self.places = self.places, []
        for place in held:
            self.leave_place(place)
        self.leave_paths(tuple(self.ways))

    def facts(self, command: str, target: Endpoint | None, addresses: tuple[Endpoint, ...] = ()) -> Facts:
        """Return the facts of this client's request, of which nothing has been asked yet."""
        assert self.request is not None
        self.lookup.unanswered = ""
        protocol = "udp" if command in UDP_COMMANDS else "tcp"
        language = PROXY_PROTOCOL_OF_VERSION[self.request.version]
        families = frozenset({4, 6})
        # Nobody knows what an upstream can reach; and where nothing is compared with them, they cost a look.
        if addresses or (target is None and not self.config.routes):
            families = external_families(self.config, self.lookup)
        return Facts(command, protocol, language, self.client, target, addresses, families, self.identity)

    def authenticated_by(self, method: str) -> None:
        """Let the records of the request name the client."""
        user = (self.lookup.ident_answer or "") if method == "rfc931" else self.identity.user
        name = method or self.identity.method  # no rule, no method: what it said
        self.record.authenticate(f"gssapi/{self.protection()}" if name == "gssapi" else name, user)

    def reply(self, reply: Reply, bound: Endpoint, reserved: int = 0) -> None:
        """Answer the request; what cannot be sent within timeout.negotiate ends the session."""
        assert self.request is not None
        if self.answer is not None:
            self.answer(reply, bound)
            return
        deadline = deadline_after(self.config.timeouts.negotiate)
        self.stream.send(encode_reply_for(self.request.version, reply, bound, reserved), deadline)

    def open_external(self, rule: Rule, target: Endpoint, route: Route = DIRECT) -> socket.socket:
        """Return a stream socket that is bound and ready to connect under a rule; Refused, OSError."""
        source = find_redirect(rule, self.client_rule, "connect").source
        if route.redirect is not None:
            source = route.redirect.source
        kept = self.client
        if self.request is not None and self.request.version == HTTP1:
            # One request after the other from the same port would meet what the last one left behind.
            kept = kept._replace(port=0)
        connection = self.open_from(source, target, socket.SOCK_STREAM, kept)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(self.serving.keepalive))
        self.set_options(connection, rule, "external")
        if route.socket_options:
            self.set_options(connection, route, "external")
        return connection

    def open_from(
        self, pattern: RuleAddress | None, target: Endpoint, kind: socket.SocketKind, client: Endpoint
    ) -> socket.socket:
        """Return a socket bound to what a `redirect from`, or else the configuration, has for a target.

        `client` is whose source port is kept where it can be.  Refused, OSError.
        """
        source = self.choose_source(pattern, target, client)
        if pattern is not None and pattern.port.operator != "any":
            return open_redirected(source, kind, pattern.port)
        return open_external(source, client, kind, self.bind_privileged)

    def choose_external(self, target: Endpoint, client: Endpoint) -> Endpoint:
        """Return the address to leave by for a target; Refused, and then there is a warning."""
        try:
            return choose_external(self.config, target.family, (client, self.local), target, self.lookup)
        except NoExternal as refusal:
            self.serving.log.write_seldom("warning", "external", str(refusal))
            raise

    def choose_source(self, pattern: RuleAddress | None, target: Endpoint, client: Endpoint) -> Endpoint:
        """Return the address to leave by for a target, as the configuration or `redirect from` has it.

        Refused where there is none.
        """
        if pattern is None or pattern.kind == "any":
            return self.choose_external(target, client)
        found = redirected_sources(pattern, self.config, target.family, self.lookup)
        if not found:
            reason = f"no IPv{target.family} address for {target} (redirect from: {pattern.text})"
            raise Refused(reason, Reply.NETWORK_UNREACHABLE)
        return found[0]

    def redirect(self, decision: Decision, command: str, port: int) -> Decision:
        """Return a decision with the addresses to use; Refused where `redirect to` names none that can be.

        The rules judge what the client asks for.  Where its rule redirects to is the administrator's own
        word: no other rule is asked about that, and no client can change it.
        """
        pattern = find_redirect(decision.rule, self.client_rule, command).target
        if pattern is None:
            return decision
        target = redirected_endpoint(pattern, port)
        return decision._replace(addresses=self.find_addresses(target))

    def find_addresses(self, target: Endpoint) -> tuple[Endpoint, ...]:
        """Return the addresses of an endpoint that the configuration names; Refused where there are none."""
        if target.family:
            check_family(self.config, target, self.lookup)
            return (target,)
        found, fault = self.lookup.resolve(target.host)
        if not found:
            raise Refused(f'could not resolve hostname "{target.host}": {fault}', Reply.HOST_UNREACHABLE)
        return tuple(address._replace(port=target.port) for address in self.lookup.prefer_usable(found))

    # --- routes ---

    def find_paths(
        self, command: str, target: Endpoint | None, addresses: tuple[Endpoint, ...] = ()
    ) -> tuple[Path, ...]:
        """Return the paths that the routes allow for a request; without any route there are none."""
        if self.serving.upstreams is None:
            return ()
        facts = self.facts(command, target, addresses)
        found = self.serving.policy.routes(facts, self.lookup)
        if self.lookup.unanswered:
            return ()  # the one that was passed over for want of an answer may be the way to go
        if target is None or not target.family or all(path.steps for path in found):
            return found
        # A route that leads nowhere for want of an address of the family is no route.
        if can_leave_by(self.config, target.family, self.lookup):
            return found
        return tuple(path for path in found if path.steps)

    def resolve(self, command: str, target: Endpoint) -> tuple[Endpoint, ...]:
        """Return the addresses of a named target, () where an upstream is to find them; Refused.

        Unlike Dante: a name that we cannot resolve is left to an upstream, too, if there is one for it.
        """
        check_host_name(target.host)
        paths = self.find_paths(command, target)
        if paths and paths[0].route.resolve == "there":
            return ()
        found, fault = self.lookup.resolve(target.host)
        if not found and not any(path.steps for path in paths):
            text = f'could not resolve hostname "{escape_text(target.host)}": {fault}'
            raise Refused(text, Reply.HOST_UNREACHABLE)
        return tuple(address._replace(port=target.port) for address in found)

    def dial(self, rule: Rule, path: Path, deadline: float) -> socket.socket:
        """Return a connection to the first upstream of a path; see Dial."""
        upstream = path.steps[0].upstream
        addresses: tuple[Endpoint, ...] = (upstream,)
        if not upstream.family:
            found, fault = self.lookup.resolve(upstream.host)
            if not found:
                raise Refused(f'could not resolve "{upstream.host}": {fault}', Reply.HOST_UNREACHABLE)
            usable = self.lookup.prefer_usable(found)
            addresses = tuple(address._replace(port=upstream.port) for address in usable)

        def open_for(address: Endpoint) -> socket.socket:
            return self.open_external(rule, address, path.route)

        return Race(addresses, open_for, self.connection.fileno(), deadline).run().connection

    def open_way(
        self,
        rule: Rule,
        paths: Iterable[Path],
        command: str,
        target: Endpoint,
        addresses: tuple[Endpoint, ...] = (),
    ) -> Way:
        """Return an open path, which is closed at the session's end; PathFailed, PeerGone."""
        assert self.serving.upstreams is not None
        login = None
        if self.identity.method == "username" and self.password is not None:
            login = Credentials(self.identity.user, self.password)
        way = open_path(
            self.serving.upstreams,
            [path for path in paths if path.steps],
            Errand(command, target, addresses, login, self.serving.warden),
            lambda path, deadline: self.dial(rule, path, deadline),
            self.connection.fileno(),
            rule.timeouts.connect,
        )
        self.ways.append(way)
        return way

    def leave_paths(self, ways: Iterable[Way]) -> None:
        """Give back the places in the balance of upstreams that open paths have held."""
        for way in ways:
            if self.serving.upstreams is not None and way in self.ways:
                self.ways.remove(way)
                way.stream.unseal()
                self.serving.upstreams.leave(way.path)

    def bind_privileged(self, source: Endpoint, kind: str) -> socket.socket | None:
        """Return a socket on a privileged port, or None where that is not configured or not to be had."""
        if "sameport" not in self.config.compatibility:
            return None
        fields = [kind.encode(), *encode_endpoints([source]), str(source.port).encode()]
        try:
            _, descriptors = self.serving.warden.ask(Favour.BIND, fields, PASSWORD_SECONDS)
        except SockdError:
            return None
        return socket.socket(fileno=descriptors[0]) if descriptors else None

    def set_own_options(self, rule: Rule) -> None:
        """Set the options of a rule, the global ones among them, on the client's connection.

        Those of the listener came with it, but for a few like SO_PRIORITY.
        """
        if rule.socket_options:
            self.set_options(self.connection, rule, "internal")

    def set_options(self, connection: socket.socket, rule: Rule | Route, side: str) -> None:
        """Set a rule's socket options; one that cannot be set is a warning."""
        for option, error in set_options(connection, rule.socket_options, side):
            fault = error.strerror or str(error)
            if error.errno in (errno.EPERM, errno.EACCES) and needs_power(option):
                fault = self.force_option(connection, option)
            if fault:
                self.serving.log.write("warning", describe_option_fault(option, fault))

    def force_option(self, connection: socket.socket, option: SocketOption) -> str:
        """Have the warden set an option that needs privileges; return "" or why it could not."""
        number = str(list_options(self.config).index(option)).encode()
        try:
            answer, _ = self.serving.warden.ask(
                Favour.OPTION, [number], PASSWORD_SECONDS, connection.fileno()
            )
            return answer[0].decode()
        except (SockdError, IndexError, UnicodeDecodeError) as error:
            return str(error)


# ============================== 16. Requests ==============================
# What a client can ask for: CONNECT, BIND and UDP ASSOCIATE, each a class with the steps that
# RFC 1928 gives it: judge, open, answer, relay, record the end.


class TcpRecords:
    """Records of one established TCP path: connect, or bindreply seen from the peer.

    Owned by its request.
    """

    def __init__(
        self, session: Session, rule: Rule, event: str, near: str, far: str, sides: tuple[Side, Side]
    ) -> None:
        self.session = session
        self.rule = rule
        self.event = event
        self.near = near  # both addresses of the first side, in the order of travel
        self.far = far
        self.sides = sides

    def write(self, bracket: str, rest: str) -> None:
        self.session.record.write("pass", self.rule, self.event, bracket, rest + self.tcp_info())

    def tcp_info(self) -> str:
        """Return the TCP_INFO block of log: tcpinfo, or ""."""
        if "tcpinfo" not in self.rule.log:
            return ""
        return describe_tcp_info([side.connection for side in self.sides])

    def opened(self) -> None:
        if "connect" in self.rule.log:
            self.write("[", f"{self.near} -> {self.far}")

    def observer(self) -> Callable[[Side, bytes], None] | None:
        """Return what records each read, or None where the rule does not log them."""
        return self.moved if self.rule.log & {"ioop", "data"} else None

    def moved(self, side: Side, data: bytes) -> None:
        if not data and side.peer.finished:
            return  # As Dante: only the first FIN has a record, the second one ends the session
        way = f"{self.near} -> {self.far}" if side is self.sides[0] else self.reverse()
        payload = f": {escape_bytes(data)}" if data and "data" in self.rule.log else ""
        self.write("-", f"{way} ({len(data)}){payload}")

    def reverse(self) -> str:
        """Return the path as the other side's data travels it."""
        return " -> ".join(" ".join(reversed(side.split(" "))) for side in (self.far, self.near))

    def closed(self, reason: str) -> None:
        end = self.session.record.closing(self.rule, reason)
        if end:
            first, second = self.sides
            near = f"{first.sent} -> {self.near} -> {first.received}"
            self.write("]", f"{near}, {second.sent} -> {self.far} -> {second.received}{end}")


def run_relay(session: Session, records: TcpRecords, client: Side, target: Side) -> str:
    """Relay between a client and a target that is connected, with the records of it.

    Return the reason for its end.
    """
    session.phase = "io"
    session.only_relays = True  # after a relay comes no other request
    records.opened()
    client.peer, target.peer = target, client
    # What has to be sealed for one side cannot be spliced from the other.
    client.may_splice = target.may_splice = client.may_splice and target.may_splice
    early = bytes(session.stream.pending)
    session.stream.pending.clear()
    observe = records.observer()
    if early:
        client.received = len(early)
        target.keep(early)
        target.begin()
        if observe is not None:
            observe(client, early)
    first = client.begin()
    if first:  # what came from the target behind the reply of an upstream
        target.received = len(first)
        if observe is not None:
            observe(target, first)
    session.describe_io = lambda: f"{records.near} <-> {records.far}: {client.received} <-> {target.received}"
    relay = TcpRelay(client, target, records.rule.timeouts, observe)
    relay.budget = session.make_budget(records.rule)
    relay.meter = session.meter
    reason = relay.run()
    if session.stopping:
        reason = ENDED_BY_US
    session.note_end(records.rule, reason)
    records.closed(reason)
    if records.event != "tcp/bindreply":
        session.record.closed(client.sent, target.sent, reason)
    return reason


# The beginning of Dante's words.  A session through ourselves would be one of our own host, to the rules as
# well as to their limits, and one client could have as many as there is room for.
CONNECT_TO_OURSELVES = "client is requesting a connection to the same address we listen to new clients on"


class ConnectRequest:
    """CONNECT (RFC 1928 section 4): judge, connect, answer, relay."""

    def __init__(self, session: Session, request: Request) -> None:
        self.session = session
        self.request = request
        self.target = request.target
        self.event = "tcp/connect"
        self.bound = UNSPECIFIED  # where the connection to the target begins
        self.peer = UNSPECIFIED  # and where it ends
        self.addresses: tuple[Endpoint, ...] = ()  # all of the target's
        self.way: Way | None = None  # None: direct

    def run(self) -> None:
        records = self.open()
        if records is not None:
            self.session.reply(Reply.SUCCEEDED, self.bound)
            run_relay(self.session, records, *records.sides)

    def open(self) -> TcpRecords | None:
        """Judge and connect: return the path, client first, or None when why not has been answered."""
        session = self.session
        try:
            self.addresses = self.find_addresses()
        except Refused as refusal:
            # As Dante: these come before any socks-rule and are recorded by the client-rule.
            self.fail(session.client_rule, "", str(refusal), refusal.reply, self.target)
            return None
        decision = session.decide_request(session.facts("connect", self.target, self.addresses))
        session.authenticated_by(decision.method)
        if decision.verdict == "block":
            session.record.request_blocked(
                decision.rule, self.event, describe_endpoint(self.target), decision.reason
            )
            session.reply(Reply.NOT_ALLOWED, self.target)
            return None
        try:
            decision = session.redirect(decision, "connect", self.target.port)
        except Refused as refusal:
            self.fail(decision.rule, "", str(refusal), refusal.reply, self.target)
            return None
        connection = self.connect(decision)
        if connection is None:
            return None
        try:
            return self.join(decision.rule, connection)
        except OSError as error:  # it has gone again already
            reason = f"remote peer error ({error.strerror})"
            self.fail(decision.rule, "", reason, Reply.CONNECTION_REFUSED, self.target)
            return None

    def find_addresses(self) -> tuple[Endpoint, ...]:
        """Return the addresses of the target, each of which the rules will see.

        Refused where there are none.
        """
        target, session = self.target, self.session
        if target.port == 0:
            raise Refused(
                f"unbound port ({describe_endpoint(target)}) in request", Reply.ADDRESS_TYPE_NOT_SUPPORTED
            )
        if not target.family:
            return session.resolve("connect", target)
        can_leave = can_leave_by(session.config, target.family, session.lookup)
        if not can_leave and not session.find_paths("connect", target, (target,)):
            check_family(session.config, target, session.lookup)
        if target.host in IP_ANY:
            raise Refused(f"unbound ipaddress ({target}) in request", Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        return (target,)

    def fail(self, rule: Rule, path: str, reason: str, reply: Reply, bound: Endpoint) -> None:
        """Record and answer a request that could not be done."""
        self.session.record.request_failed(rule, self.event, path, reason)
        self.session.reply(reply, bound)

    def connect(self, decision: Decision) -> socket.socket | None:
        """Return the connection to the target, or None after having answered why there is none."""
        session = self.session
        if session.serving.upstreams is None:
            return self.connect_directly(decision.rule, decision.addresses)
        target, addresses = self.target, self.addresses
        pattern = find_redirect(decision.rule, session.client_rule, "connect").target
        if pattern is not None:
            target, addresses = redirected_endpoint(pattern, target.port), decision.addresses
        paths = session.find_paths("connect", target, decision.addresses)
        if paths and not paths[0].steps and paths[0].addresses:
            return self.connect_directly(decision.rule, paths[0].addresses, paths[0].route)
        return self.connect_by_upstream(decision.rule, paths, target, addresses)

    def connect_by_upstream(
        self, rule: Rule, paths: tuple[Path, ...], target: Endpoint, addresses: tuple[Endpoint, ...]
    ) -> socket.socket | None:
        """Return the connection to an upstream that has connected to a target, or None as `connect`."""
        try:
            self.way = self.session.open_way(rule, paths, "connect", target, addresses)
            return self.way.connection
        except PathFailed as failure:
            path = f" -> {failure.source} {describe_endpoint(self.target)}"
            self.fail(rule, path, describe_chain_failure(failure), failure.reply, self.target)
        except PeerGone as gone:
            self.end_unconnected(rule, UNSPECIFIED, self.target, str(gone))
        return None

    def connect_directly(
        self, rule: Rule, addresses: tuple[Endpoint, ...], route: Route = DIRECT
    ) -> socket.socket | None:
        """Return the connection to one of the target's addresses, or None as `connect`."""
        session = self.session
        deadline = deadline_after(rule.timeouts.connect)
        addresses = session.lookup.prefer_usable(addresses)
        try:
            open_for = self.open_for(rule, route)
            race = Race(addresses, open_for, session.connection.fileno(), deadline)
            connection, self.peer = race.run()
            return connection
        except ConnectFailed as failure:
            session.note_failure(rule, "external", describe_failure(failure))
            if failure.at_once:
                # As Dante: the name, unless a rule has picked some of its addresses.
                picked = rule.target.kind not in ("any", "domain", "host")
                path = f" -> {failure.source} {describe_endpoint(failure.target if picked else self.target)}"
                self.fail(rule, path, str(failure), reply_for(failure.error), failure.source)
            else:
                reason = f"remote peer error ({failure.error.strerror})"
                self.end_unconnected(rule, failure.source, failure.target, reason)
                session.reply(reply_for(failure.error), failure.source)
        except ConnectTimeout as late:
            fault = os.strerror(errno.ETIMEDOUT)
            session.note_failure(rule, "external", f"connect to host {late.target} failed: {fault}")
            self.end_unconnected(rule, late.source, late.target, str(late))
            session.reply(Reply.TTL_EXPIRED, UNSPECIFIED)
        except Refused as refusal:
            if isinstance(refusal, NoExternal):
                rule = session.client_rule  # As Dante: which then has not asked the socks-rules yet
            path = f" -> {UNSPECIFIED} {describe_endpoint(self.target)}"
            reason = f"could not bind address to use on external side: {refusal}"
            self.fail(rule, path, reason, refusal.reply, self.target)
        except PeerGone as gone:
            self.end_unconnected(rule, UNSPECIFIED, addresses[0], str(gone))
        except OSError as error:
            # No descriptor, no memory, an address of ours that has gone: not the target's fault.
            self.fail(rule, "", f"could not connect: {error.strerror}", Reply.FAILURE, self.target)
        return None

    def open_for(self, rule: Rule, route: Route) -> Callable[[Endpoint], socket.socket]:
        """Return what opens the sockets of the race."""

        def open_checked(target: Endpoint) -> socket.socket:
            if is_own_listener(target, self.session.serving.listening):
                raise Refused(f"{CONNECT_TO_OURSELVES}: {target}")
            return self.session.open_external(rule, target, route)

        return open_checked

    def end_unconnected(self, rule: Rule, source: Endpoint, target: Endpoint, reason: str) -> None:
        """Record a connect that failed after it was under way.  As Dante: like the end of a session."""
        record = self.session.record
        if self.session.meter is not None:
            self.session.meter.disconnect("internal" if source is UNSPECIFIED else "external")
        end = record.closing(rule, reason)
        if end:
            path = f"0 -> {record.side} -> 0, 0 -> {source} {describe_endpoint(target)} -> 0{end}"
            info = describe_tcp_info(record.connections) if "tcpinfo" in rule.log else ""
            record.write("pass", rule, self.event, "]", path + info)
        record.closed(0, 0, reason)

    def join(self, rule: Rule, connection: socket.socket) -> TcpRecords:
        """Return the path from the client to a target that is connected; the session closes both ends."""
        session = self.session
        session.opened.append(connection)
        far_side = self.way.side() if self.way is not None else Side(connection, "remote peer")
        pair = (session.client_side(), far_side)
        if self.way is None:
            self.bound = endpoint_of(connection.getsockname())
            far = f"{self.bound} {self.peer}"
        else:
            # As Dante: the client is told the address that the upstream has told.
            self.bound, far = self.way.bound, self.way.describe(self.target)
            pair[0].keep(bytes(self.way.stream.pending))
        session.record.connections.append(connection)
        session.set_own_options(rule)
        session.note_features(rule, "external", connection)
        return TcpRecords(session, rule, self.event, session.record.side, far, pair)


BIND_EXTENSION = "255.255.255.255"  # a DST.ADDR that asks for several peers (sockd.conf(5), extension)


class BindRequest:
    """BIND (RFC 1928 section 4): listen for one peer on the client's behalf."""

    backlog = 1  # peers that may wait for us

    def __init__(self, session: Session, request: Request) -> None:
        self.session = session
        self.request = request
        self.target = request.target
        self.event = "tcp/bind"
        self.expected: frozenset[str] = frozenset()  # hosts; empty: any
        self.reason = ""  # why no peer was served
        self.verdict = "pass"  # of the closing records
        self.sides: tuple[Side, Side] | None = None  # client and peer, once they were joined
        self.end = ""  # how their relay ended
        self.above = ""  # what stands before the reason at accept level

    def run(self) -> None:
        session = self.session
        if self.target.host == BIND_EXTENSION:
            reason = "client requested disabled Dante extension: bind"
            session.record.request_blocked(FINAL_SOCKS_BLOCK, self.event, str(self.target), reason)
            session.reply(Reply.NOT_ALLOWED, self.target)
            return
        try:
            listener = self.listen()
        except NoExternal as refusal:
            reason = f"could not get address to use on external side: {refusal}"
            self.fail(session.client_rule, UNSPECIFIED, reason, refusal.reply)
            return
        except Refused as refusal:
            session.record.request_failed(session.client_rule, self.event, "", str(refusal))
            session.reply(refusal.reply, self.target)
            return
        session.opened.append(listener)
        bound = endpoint_of(listener.getsockname())
        decision = session.decide_request(session.facts("bind", bound))
        session.authenticated_by(decision.method)
        if decision.verdict == "block":
            target = describe_endpoint(self.target)
            session.record.request_blocked(decision.rule, self.event, target, decision.reason)
            session.reply(Reply.NOT_ALLOWED, self.target)
            return
        try:
            listener = self.rebind(decision.rule, listener)
        except (Refused, OSError) as fault:
            reply = fault.reply if isinstance(fault, Refused) else Reply.FAILURE
            session.record.request_failed(decision.rule, self.event, "", f"could not bind: {fault}")
            session.reply(reply, self.target)
            return
        bound = endpoint_of(listener.getsockname())
        session.set_options(listener, decision.rule, "external")
        listener.setblocking(False)
        listener.listen(self.backlog)
        path = f"{session.record.side} -> {bound} {describe_endpoint(self.target)}"
        self.announce(decision.rule, path, bound)
        self.serve_peer(decision.rule, listener, bound)
        self.finish(decision.rule, path)

    def fail(self, rule: Rule, source: Endpoint, reason: str, reply: Reply) -> None:
        """Record and answer a request that could not be done."""
        path = f" -> {source} {describe_endpoint(self.target)}"
        self.session.record.request_failed(rule, self.event, path, reason)
        self.session.reply(reply, self.target)

    def announce(self, rule: Rule, path: str, bound: Endpoint) -> None:
        """Record and answer where the client's peer may connect to."""
        if "connect" in rule.log:
            self.session.record.write("pass", rule, self.event, "[", path)
        self.session.reply(Reply.SUCCEEDED, bound)

    def listen(self) -> socket.socket:
        """Return a bound socket, not listening yet, as the rules are asked about its address; Refused."""
        session, target = self.session, self.target
        if target.family == 0:
            check_host_name(target.host)
            found, fault = session.lookup.resolve(target.host)
            if not found:
                text = f'could not resolve hostname "{escape_text(target.host)}": {fault}'
                raise Refused(text, Reply.HOST_UNREACHABLE)
            self.expected = frozenset(address.host for address in found)
            target = session.lookup.prefer_usable(found)[0]._replace(port=target.port)
        else:
            check_family(session.config, target, session.lookup)
            if target.host not in IP_ANY:
                self.expected = frozenset({target.host})
        return self.bind(session.choose_external(target, session.client))

    def bind(self, external: Endpoint) -> socket.socket:
        """Return a socket bound to an external address, on the wanted port where Dante would take it."""
        wanted = self.wanted_port()
        bound = None
        if 0 < wanted < 1024:
            bound = self.session.bind_privileged(external._replace(port=wanted), "tcp")
        try:
            return bound or bind_first(external, (wanted, 0) if wanted >= 1024 else (0,))
        except OSError as error:
            raise Refused(f"could not bind {external}: {error.strerror}", reply_for(error)) from None

    def wanted_port(self) -> int:
        """Return the port that the client would like; 0: any."""
        return self.target.port if self.target.host in IP_ANY else 0

    def rebind(self, rule: Rule, listener: socket.socket) -> socket.socket:
        """Return the socket to listen on: another one where the rule says `redirect from`; Refused, OSError.

        The rules have judged the address that the configuration gives; the other is the rule's own word.
        """
        pattern = find_redirect(rule, self.session.client_rule, "bind").source
        if pattern is None:
            return listener
        family = endpoint_of(listener.getsockname()).family
        source = self.session.choose_source(pattern, ELSEWHERE[family], self.session.client)
        listener.close()
        if pattern.port.operator == "any":
            listener = self.bind(source)
        else:
            listener = open_redirected(source, socket.SOCK_STREAM, pattern.port)
        self.session.opened.append(listener)
        return listener

    def finish(self, rule: Rule, path: str) -> None:
        """Record the end of what was announced."""
        if "disconnect" in rule.log:
            rest = f"{path}: {self.reason}" if self.reason else path
            self.session.record.write(self.verdict, rule, self.event, "]", rest)
        self.finish_above()

    def finish_above(self) -> None:
        """Record the end at accept level."""
        record = self.session.record
        if self.sides is not None:
            client, peer = self.sides
            record.closed(client.sent, peer.sent, self.end)
        else:
            record.refused_above(self.above + self.reason, self.verdict, LOGS_AN_ERROR)

    def serve_peer(self, rule: Rule, listener: socket.socket, bound: Endpoint) -> None:
        """Wait for the peer and relay; or leave why there was none in `reason`."""
        session = self.session
        deadline = deadline_after(rule.timeouts.io_tcp)
        try:
            while True:
                self.wait_for_peer(listener, deadline)
                if session.stopping:
                    raise PeerGone(ENDED_BY_US)
                try:
                    connection, address = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue  # it has gone already
                peer = endpoint_of(address)
                decision = self.judge_peer(rule, connection, peer, bound)
                if decision is not None:
                    break
                connection.close()
        except DeadlinePassed:
            session.reply(Reply.TTL_EXPIRED, UNSPECIFIED)
            self.reason = "i/o timeout"
            return
        except PeerGone:
            self.reason = ENDED_BY_US if session.stopping else "eof from client"
            return
        except OSError as error:
            self.verdict, self.above = "block", REQUEST_NOT_PERFORMED
            self.reason = f"receiving request from client failed ({error.strerror})"
            return
        session.opened.append(connection)
        listener.close()
        if decision.verdict == "pass":
            decision = session.count(decision)
        if decision.verdict == "block":
            session.reply(Reply.NOT_ALLOWED, peer)
            self.log_stranger(decision.rule, peer, bound, decision.reason if decision.rule.number else "")
            self.verdict = "block"
            self.reason = f"bind-reply from {peer} blocked by socks-rule #{decision.rule.number}"
            return
        self.relay(decision.rule, connection, bound, peer)

    def wait_for_peer(self, listener: socket.socket, deadline: float) -> None:
        """Wait until somebody connects; PeerGone if the client leaves.

        Unlike Dante: what the client sends meanwhile is kept for the peer.
        """
        poller = select.poll()
        poller.register(listener.fileno(), select.POLLIN)
        room = len(self.session.stream.pending) < MAX_HANDSHAKE_BYTES
        poller.register(self.session.connection.fileno(), select.POLLIN if room else 0)
        while True:
            events = dict(poller.poll(poll_milliseconds(deadline)))
            if listener.fileno() in events:
                return
            if events:
                self.session.stream.read_more(deadline)
                if len(self.session.stream.pending) >= MAX_HANDSHAKE_BYTES:
                    poller.modify(self.session.connection.fileno(), 0)
            elif time.monotonic() >= deadline:
                raise DeadlinePassed("i/o timeout")

    def judge_peer(
        self, rule: Rule, connection: socket.socket, peer: Endpoint, bound: Endpoint
    ) -> Decision | None:
        """Return the verdict on who has connected, or None for a stranger: the wait goes on.

        Unlike Dante: a stranger, for example a port scanner, does not end the BIND.
        """
        session = self.session
        if self.expected and peer.host not in self.expected:
            expected = describe_endpoint(self.target._replace(port=0))
            nobody = FINAL_SOCKS_BLOCK._replace(log=rule.log)
            self.log_stranger(
                nobody, peer, bound, f"expected bindreply from {expected}, but got it from {peer}"
            )
            return None
        facts = session.facts("bindreply", session.client)._replace(source=peer)
        decision = session.decide(facts, connection)
        hopeless = not any(
            "bindreply" in r.commands and r.verdict == "pass" for r in session.config.socks_rules
        )
        if decision.verdict == "block" and not self.expected and not hopeless:
            self.log_stranger(decision.rule, peer, bound, "")
            return None
        return decision

    def log_stranger(self, rule: Rule, peer: Endpoint, bound: Endpoint, reason: str) -> None:
        if not LOGS_A_BLOCK.isdisjoint(rule.log):
            near, local = self.session.record.side.split(" ")
            path = f"{peer} {bound} -> {local} {near}"
            rest = f"{path}: {reason}" if reason else path
            self.session.record.write("block", rule, "tcp/bindreply", "]", rest)

    def relay(self, rule: Rule, connection: socket.socket, bound: Endpoint, peer: Endpoint) -> None:
        """Tell the client who has come, and move data until the end."""
        session = self.session
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(session.serving.keepalive))
        session.set_own_options(rule)
        told = find_redirect(rule, session.client_rule, "bindreply").source
        session.reply(Reply.SUCCEEDED, redirected_endpoint(told, peer.port) if told else peer)
        client_side, peer_side = session.client_side(), Side(connection, "remote peer")
        near, local = session.record.side.split(" ")
        # As Dante: a bindreply is recorded from the peer's end.
        path = (f"{peer} {bound}", f"{local} {near}")
        records = TcpRecords(session, rule, "tcp/bindreply", *path, (peer_side, client_side))
        self.sides = client_side, peer_side
        self.end = run_relay(session, records, client_side, peer_side)


class Forwarding:
    """One peer of a BIND for several, relayed over a connection back to the client.

    Owned by its own thread from `run` on; only `cut` is for the session's.
    """

    def __init__(
        self,
        request: ExtendedBindRequest,
        rule: Rule,
        back: socket.socket,
        connection: socket.socket,
        peer: Endpoint,
        place: Place | None,
    ) -> None:
        self.request = request
        self.session = request.session
        self.rule = rule
        self.peer = peer
        self.source = endpoint_of(back.getsockname())  # what the client sees us call from
        self.client_side = Side(back, "local client")
        self.peer_side = Side(connection, "remote peer")
        self.place = place  # held of the session limits of the rule
        self.budget: Budget | None = None
        self.meter: Meter | None = None
        self.is_cut = False

    def run(self) -> None:
        """Call the client back and relay, until both are done or `cut`."""
        try:
            if self.call_back():
                self.relay()
        finally:
            self.request.release(self)

    def call_back(self) -> bool:
        """Connect to where the client's request came from; False after the record of a failure."""
        session, back = self.session, self.client_side.connection
        deadline = deadline_after(self.rule.timeouts.connect)
        try:
            client = with_link(session.client, session.connection)
            Race([client], lambda _: back, session.connection.fileno(), deadline).run()
        except (SockdError, OSError) as error:
            if not self.is_cut:
                self.request.record_failure(self.rule, self.peer, self.source, str(error))
            return False
        return not self.is_cut

    def relay(self) -> None:
        # As Dante: a bindreply is recorded from the peer's end.
        session = self.session
        path = (f"{self.peer} {self.request.bound}", f"{self.source} {session.client}")
        sides = (self.peer_side, self.client_side)
        records = TcpRecords(session, self.rule, "tcp/bindreply", *path, sides)
        records.opened()
        relay = TcpRelay(self.client_side, self.peer_side, self.rule.timeouts, records.observer())
        relay.budget, relay.meter = self.budget, self.meter
        reason = relay.run()
        if self.is_cut:
            reason = ENDED_BY_US if session.stopping else CLIENT_CLOSED
        session.note_end(self.rule, reason)
        records.closed(reason)

    def cut(self) -> None:
        """Make the relay end now."""
        self.is_cut = True
        if self.budget is not None:
            self.budget.cancel()
        for side in (self.client_side, self.peer_side):
            try:
                side.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already

    def close(self) -> None:
        """Give back everything; what others count first, as a close may take its time (so_linger)."""
        if self.budget is not None:
            self.budget.close()
        if self.meter is not None:
            self.meter.close()
        self.session.leave_place(self.place)
        self.client_side.connection.close()
        self.peer_side.connection.close()


MOST_FORWARDED = 32  # peers of one BIND at a time: as many sessions as one of Dante's processes relays
CUT_SECONDS = 5.0  # for threads that have been cut to end


class ExtendedBindRequest(BindRequest):
    """BIND for several peers: Dante's extension (sockd.conf(5), extension).

    The client's connection stays what it is.  For each peer there is a connection back to the address and
    port that it comes from, and the client, which listens there, may ask over it, by a BIND request with
    the address that such a connection comes from, who the peer is.
    """

    backlog = MOST_FORWARDED

    def __init__(self, session: Session, request: Request) -> None:
        super().__init__(session, request)
        families = external_families(session.config, session.lookup)
        only_ipv6 = 4 not in families and request.version == SOCKS5
        self.target = Endpoint("::", 0, 6) if only_ipv6 else UNSPECIFIED
        self.bound = UNSPECIFIED
        self.forwarded: set[Forwarding] = set()
        self.closing = 0  # peers that have left `forwarded` and are being closed, which may take so_linger
        self.gate = threading.Lock()  # guards these two and `ended`; nothing that waits is called under it
        self.ended = -1  # an eventfd: written when one has ended
        self.sent = 0  # bytes to the client, by those that have ended
        self.received = 0  # bytes to peers
        self.has_forwarded = False

    def wanted_port(self) -> int:
        # As Dante: the port of the request means nothing here.
        return self.session.client.port

    def listen(self) -> socket.socket:
        session = self.session
        if session.seal is not None:
            # Unlike Dante: what GSS-API protects does not go to the client in the clear.
            raise Refused("bind extension: GSS-API would not protect the connections", Reply.NOT_ALLOWED)
        if session.serving.upstreams is not None:
            paths = session.find_paths("bind", self.target, (self.target,))
            if not paths or paths[0].steps:
                text = NO_UPSTREAM_COMMAND.format("bind")
                raise Refused(
                    f"could not get address to use on external side: {text}", Reply.NETWORK_UNREACHABLE
                )
        return super().listen()

    def serve_peer(self, rule: Rule, listener: socket.socket, bound: Endpoint) -> None:
        """Forward whoever connects, until the client leaves; then leave why in `reason`.

        Unlike Dante 1.4, which closes the client's connection at the first peer and then relays nothing.
        """
        session = self.session
        if session.meter is not None:
            session.meter.close()  # each peer has its own
            session.meter = None
        self.bound = bound
        side = session.record.side
        session.describe_io = lambda: f"{side} -> {bound}: {len(self.forwarded)} peers forwarded"
        self.ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.answer_queries()
            while not session.stopping:
                self.work(rule, listener)
            self.reason = ENDED_BY_US
        except PeerGone:
            self.reason = ENDED_BY_US if session.stopping else "eof from client"
        except DeadlinePassed:
            self.reason = "i/o timeout"
        except (ProtocolError, OSError) as error:
            self.verdict, self.above = "block", REQUEST_NOT_PERFORMED
            fault = error.strerror if isinstance(error, OSError) else error
            self.reason = f"receiving request from client failed ({fault})"
        finally:
            listener.close()
            self.end_forwarding()

    def work(self, rule: Rule, listener: socket.socket) -> None:
        """Do what there is to do; PeerGone, DeadlinePassed, ProtocolError, OSError."""
        poller, session = select.poll(), self.session
        poller.register(session.connection.fileno(), select.POLLIN)
        poller.register(self.ended, select.POLLIN)
        if len(self.forwarded) + self.closing < MOST_FORWARDED:
            poller.register(listener.fileno(), select.POLLIN)
        idle = NO_DEADLINE if self.forwarded else deadline_after(rule.timeouts.io_tcp)
        ready = {descriptor for descriptor, _ in poller.poll(poll_milliseconds(idle))}
        if not ready and time.monotonic() >= idle:
            raise DeadlinePassed("i/o timeout")
        if self.ended in ready:
            os.eventfd_read(self.ended)
        if session.connection.fileno() in ready:
            session.stream.read_more(NO_DEADLINE)
            self.answer_queries()
        if listener.fileno() in ready:
            self.take_peer(rule, listener)

    def answer_queries(self) -> None:
        """Tell the client which peers the connections it asks about belong to; ProtocolError, OSError."""
        assert self.session.request is not None
        version, pending = self.session.request.version, self.session.stream.pending
        while pending:
            if pending[0] != version:
                raise ProtocolError(f"unknown version {pending[0]} in request")
            found = decode_request(pending)
            if found is None:
                return
            query, length = found
            del pending[:length]
            if query.command != "bind":
                raise ProtocolError(f"{query.command} request where only a question about a peer can be")
            self.session.reply(Reply.SUCCEEDED, self.find_peer(query.target))

    def find_peer(self, source: Endpoint) -> Endpoint:
        """Return whose data goes over a connection that the client sees come from `source`.

        As Dante: the unspecified address is the answer for one that is none of ours.
        """
        with self.gate:
            forwarding = next((one for one in self.forwarded if one.source == source), None)
        if forwarding is None:
            return UNSPECIFIED
        told = find_redirect(forwarding.rule, self.session.client_rule, "bindreply").source
        return redirected_endpoint(told, forwarding.peer.port) if told else forwarding.peer

    def take_peer(self, rule: Rule, listener: socket.socket) -> None:
        """Let the next peer in, if the rules do; PeerGone, OSError."""
        session = self.session
        try:
            connection, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it has gone already
        except OSError as error:
            if error.errno not in SHORTAGES:
                raise
            pause(session.connection, ACCEPT_PAUSE_SECONDS)  # the peer waits, and the others go on
            return
        peer = endpoint_of(address)
        decision = session.decide(
            session.facts("bindreply", session.client)._replace(source=peer), connection
        )
        place = None
        if decision.verdict == "pass":
            try:
                # The session itself stays where it is counted: it is still there when the peer has gone.
                place = session.hold_place(decision.rule)
            except Refused as refusal:
                decision = decision._replace(verdict="block", reason=str(refusal))
        if decision.verdict == "block":
            # Unlike Dante: who may not come in does not end the BIND.
            self.log_stranger(decision.rule, peer, self.bound, decision.reason)
            connection.close()
            return
        try:
            forwarding = Forwarding(self, decision.rule, self.open_back(), connection, peer, place)
        except (OSError, MemoryError) as error:
            session.leave_place(place)
            connection.close()
            why = error.strerror if isinstance(error, OSError) else "out of memory"
            fault = f"could not call the client back: {why}"
            self.record_failure(decision.rule, peer, session.local, fault)
            return
        self.start(forwarding)

    def open_back(self) -> socket.socket:
        """Return a socket for a call to the client, from where that has found us; OSError."""
        back = socket.socket(FAMILY_OF[self.session.client.family], socket.SOCK_STREAM)
        try:
            local = with_link(self.session.local, self.session.connection)
            back.bind(socket_address(local._replace(port=0)))
        except OSError:
            back.close()
            raise
        return back

    def start(self, forwarding: Forwarding) -> None:
        """Start the thread that calls the client back for a peer."""
        session, rule = self.session, forwarding.rule
        back, connection = forwarding.client_side.connection, forwarding.peer_side.connection
        with self.gate:
            self.forwarded.add(forwarding)  # from here on it is released, whatever happens
        self.has_forwarded = True
        for opened in (back, connection):
            opened.setblocking(False)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(session.serving.keepalive))
        session.set_options(back, rule, "internal")
        forwarding.budget = session.open_budget(rule)
        forwarding.meter = session.open_meter(session.facts("bind", self.bound))
        assert session.serving.start_thread is not None
        try:
            session.serving.start_thread(session.client, forwarding.run)
        except (RuntimeError, MemoryError) as error:
            fault = str(error) or "out of memory"
            self.record_failure(rule, forwarding.peer, forwarding.source, fault)
            self.release(forwarding)

    def record_failure(self, rule: Rule, peer: Endpoint, source: Endpoint, reason: str) -> None:
        """Record a peer whose data could not be brought to the client.

        Unlike Dante: that does not end the BIND.
        """
        if not LOGS_AN_ERROR.isdisjoint(rule.log):
            path = f"{peer} {self.bound} -> {source} {self.session.client}"
            self.session.record.write("block", rule, "tcp/bindreply", "]", f"{path}: {reason}")

    def release(self, forwarding: Forwarding) -> None:
        """Give back what a peer held, once.  Called by its thread as well as by the session's."""
        with self.gate:
            if forwarding not in self.forwarded:
                return
            self.closing += 1  # first: one of the two says that there is something to wait for
            self.forwarded.remove(forwarding)
            self.sent += forwarding.client_side.sent
            self.received += forwarding.peer_side.sent
        try:
            forwarding.close()
        finally:
            with self.gate:
                self.closing -= 1
                if self.ended >= 0:  # else the session has not waited for us
                    os.eventfd_write(self.ended, 1)

    def end_forwarding(self) -> None:
        """Cut what still goes on, and wait for its threads."""
        deadline = time.monotonic() + CUT_SECONDS
        with self.gate:
            left = tuple(self.forwarded)
        for forwarding in left:
            forwarding.cut()
        try:
            while self.forwarded or self.closing:
                wait_for(self.ended, select.POLLIN, deadline)
                os.eventfd_read(self.ended)
        except DeadlinePassed:
            pass  # a thread that died before its first step, for want of memory, or a long so_linger
        for forwarding in left:
            self.release(forwarding)
        with self.gate:
            os.close(self.ended)
            self.ended = -1

    def finish_above(self) -> None:
        if self.has_forwarded and self.verdict == "pass":
            self.session.record.closed(self.sent, self.received, self.reason)
        else:
            super().finish_above()


class RoutedBindRequest(BindRequest):
    """BIND where there are routes: here if the first that matches is direct, else at an upstream."""

    def run(self) -> None:
        session, target = self.session, self.target
        if target.host == BIND_EXTENSION:
            super().run()
            return
        try:
            addresses = (target,) if target.family else session.resolve("bind", target)
        except Refused as refusal:
            session.record.request_failed(session.client_rule, self.event, "", str(refusal))
            session.reply(refusal.reply, target)
            return
        paths = session.find_paths("bind", target, addresses)
        # As Dante: without a route, too, a family that is not there outside comes first.
        unusable = target.family and not can_leave_by(session.config, target.family, session.lookup)
        if paths and (paths[0].steps or not addresses):
            self.bind_there(paths, addresses)
        elif paths or unusable:
            super().run()
        else:
            text = "could not get address to use on external side: " + NO_UPSTREAM_COMMAND.format("bind")
            self.fail(session.client_rule, UNSPECIFIED, text, Reply.NETWORK_UNREACHABLE)

    def judge(self, decision: Decision) -> bool:
        """Tell whether the rules pass the request; answer it where they do not."""
        session = self.session
        session.authenticated_by(decision.method)
        if decision.verdict == "block":
            target = describe_endpoint(self.target)
            session.record.request_blocked(decision.rule, self.event, target, decision.reason)
            session.reply(Reply.NOT_ALLOWED, self.target)
        return decision.verdict == "pass"

    def bind_there(self, paths: tuple[Path, ...], addresses: tuple[Endpoint, ...]) -> None:
        """Let an upstream listen, and relay to the peer that it names.

        The rules are asked twice: before anything is sent, and about the address that is listened on.
        """
        session = self.session
        decision = session.decide_request(session.facts("bind", None))
        if not self.judge(decision):
            return
        try:
            way = session.open_way(decision.rule, paths, "bind", self.target, addresses)
        except PathFailed as failure:
            self.fail(decision.rule, failure.source, describe_chain_failure(failure), failure.reply)
            return
        except PeerGone as gone:
            self.reason = str(gone)
            self.finish_above()
            return
        session.opened.append(way.connection)
        try:
            bound = self.find_bound(way)
        except OSError as error:  # it has answered, and reset at once
            source = endpoint_of(way.connection.getsockname())
            self.fail(decision.rule, source, f"serverchain failed: {error.strerror}", Reply.FAILURE)
            return
        decision = session.decide(session.facts("bind", bound))
        if decision.verdict == "pass" and decision.rule is not session.request_rule:
            decision = session.count(decision)  # under the rule of the first decision it is counted already
        if not self.judge(decision):
            return
        path = f"{session.record.side} -> {way._replace(bound=bound).describe(self.target)}"
        self.announce(decision.rule, path, bound)
        self.serve_named_peer(decision.rule, way, bound)
        self.finish(decision.rule, path)

    def find_bound(self, way: Way) -> Endpoint:
        """Return where the upstream listens; OSError.  An unspecified address is its own (SOCKS 4)."""
        last = way.path.steps[-1].upstream
        if way.bound.host not in IP_ANY:
            return way.bound
        if len(way.path.steps) == 1:
            last = endpoint_of(way.connection.getpeername())
        return last._replace(port=way.bound.port)

    def serve_named_peer(self, rule: Rule, way: Way, bound: Endpoint) -> None:
        """Wait for the upstream to name the peer and relay; or leave why there was none in `reason`."""
        session = self.session
        try:
            reply, peer = self.read_second_reply(way, deadline_after(rule.timeouts.io_tcp))
        except DeadlinePassed:
            session.reply(Reply.TTL_EXPIRED, UNSPECIFIED)
            self.reason = "i/o timeout"
            return
        except PeerGone:
            self.reason = ENDED_BY_US if session.stopping else "eof from client"
            return
        except (ProtocolError, OSError) as error:
            self.end_badly(describe_fault(error), Reply.FAILURE, UNSPECIFIED)
            return
        if reply != Reply.SUCCEEDED:
            told, text = UPSTREAM_REPLIES[reply]
            self.end_badly(text, told, peer)
            return
        decision = session.decide(session.facts("bindreply", session.client)._replace(source=peer))
        if decision.verdict == "pass":
            decision = session.count(decision)
        if decision.verdict == "block":
            self.log_stranger(decision.rule, peer, bound, decision.reason if decision.rule.number else "")
            reason = (
                f"bind-reply from {describe_endpoint(peer)} blocked by socks-rule #{decision.rule.number}"
            )
            self.end_badly(reason, Reply.NOT_ALLOWED, peer)
            return
        self.relay_there(decision.rule, way, bound, peer)

    def end_badly(self, reason: str, reply: Reply, peer: Endpoint) -> None:
        self.session.reply(reply, peer)
        self.verdict, self.reason = "block", reason

    def read_second_reply(self, way: Way, deadline: float) -> tuple[Reply, Endpoint]:
        """Return what the upstream says of the peer; DeadlinePassed, PeerGone, ProtocolError, OSError."""
        version = SOCKS5 if way.path.steps[-1].protocol == "socks_v5" else SOCKS4
        decode, pending = decode_second_reply(version), way.stream.pending
        while True:
            found = decode(pending) if pending else None
            if found is not None:
                del pending[: found[1]]
                return found[0]
            self.wait_for_peer(way.connection, deadline)
            if self.session.stopping:
                raise PeerGone(ENDED_BY_US)
            way.stream.read_more(deadline)

    def relay_there(self, rule: Rule, way: Way, bound: Endpoint, peer: Endpoint) -> None:
        """Tell the client who has come to the upstream, and move data until the end."""
        session = self.session
        session.reply(Reply.SUCCEEDED, peer)
        client_side, peer_side = session.client_side(), way.side()
        client_side.keep(bytes(way.stream.pending))
        near, local = session.record.side.split(" ")
        far = way._replace(bound=bound).describe(peer).split(" ")
        path = (" ".join(reversed(far)), f"{local} {near}")
        records = TcpRecords(session, rule, "tcp/bindreply", *path, (peer_side, client_side))
        self.sides = client_side, peer_side
        self.end = run_relay(session, records, client_side, peer_side)


MOST_SHOWN_BYTES = 80  # of what a client says where it should be silent


def relay_ports(port_range: tuple[int, int] | None) -> Iterable[int]:
    """Return the ports to try for a UDP relay: a whole turn through udp.portrange, from a random start."""
    if port_range is None:
        return (0,)
    low, high = port_range
    start = low + int.from_bytes(os.urandom(4), "big") % (high - low + 1)
    return (*range(start, high + 1), *range(low, start))


class UdpRequest:
    """UDP ASSOCIATE (RFC 1928 section 7).  It is the UdpEvents of its relay."""

    def __init__(self, session: Session, request: Request) -> None:
        self.session = session
        self.request = request
        self.rule = FINAL_SOCKS_BLOCK
        self.event = "udp/udpassociate"
        self.final_block_logged = False

    def run(self) -> None:
        session, target = self.session, self.request.target
        decision = self.judge()
        session.authenticated_by(decision.method)
        if decision.verdict == "block":
            session.record.request_blocked(
                decision.rule, self.event, describe_endpoint(target), decision.reason
            )
            session.reply(Reply.NOT_ALLOWED, target)
            return
        self.rule = decision.rule
        try:
            relay = self.bind_relay()
        except OSError as error:
            session.record.request_failed(self.rule, self.event, "", error.strerror or str(error))
            session.reply(Reply.FAILURE, target)
            return
        session.opened.append(relay)
        session.set_options(relay, self.rule, "internal")
        local = endpoint_of(relay.getsockname())
        if "connect" in self.rule.log:
            session.record.write("pass", self.rule, self.event, "[", f"{describe_endpoint(target)} {local}")
        session.reply(Reply.SUCCEEDED, local, USE_CLIENTS_PORT if self.keeps_port() else 0)
        self.relay(relay)

    def judge(self) -> Decision:
        """Judge the association.  As Dante: by the port as well that the client says it will send from."""
        session = self.session
        facts = session.facts("udpassociate", None)
        port = self.request.target.port
        if not port or not self.names_client():
            return session.decide_request(facts)
        named = facts._replace(source=session.client._replace(port=port))
        # By the policy alone first: what libwrap does for a rule that passes is done once.
        decision = session.judge(named)
        return session.decide(named) if decision.verdict == "block" else session.decide_request(facts)

    def names_client(self) -> bool:
        """Tell whether the address in the request is the client's own; it may be spelled as a name."""
        target = self.request.target
        return (find_literal(target.host) or target).host == self.session.client.host

    def keeps_port(self) -> bool:
        """Tell whether to grant that datagrams leave by the client's port (compatibility: draft-5.05)."""
        session, port = self.session, self.request.target.port
        if not self.request.flags & USE_CLIENTS_PORT or "draft-5.05" not in session.config.compatibility:
            return False
        if port == 0:
            return True  # As Dante: whichever it will turn out to be is tried.
        try:
            family, lookup = session.client.family, session.lookup
            ends = session.client, session.local
            external = choose_external(session.config, family, ends, UNSPECIFIED, lookup)
            with socket.socket(FAMILY_OF[family], socket.SOCK_DGRAM) as probe:
                probe.bind(socket_address(external._replace(port=port)))
            return True
        except (OSError, Refused):
            return False

    def bind_relay(self) -> socket.socket:
        """Return the client-side socket, on the address that the client's connection came in on; OSError."""
        local = with_link(self.session.local, self.session.connection)
        relay = socket.socket(FAMILY_OF[local.family], socket.SOCK_DGRAM)
        relay.setblocking(False)
        for port in relay_ports(self.rule.udp_portrange):
            try:
                relay.bind(socket_address(local._replace(port=port)))
                return SealedSocket.over(relay, self.session.seal) if self.session.seal else relay
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    relay.close()
                    raise
        relay.close()
        raise OSError(errno.EADDRINUSE, "no free ports in range to bind")

    def expected_client(self) -> Endpoint:
        """Return who may use the association: the client's host, and the port if the request names it.

        The address in the request is often nonsense (behind NAT, or the target's), and never resolved: only
        that can be the client's makes its port count.
        """
        host, port, _ = self.request.target
        own = host in IP_ANY or host in ("", "0") or self.names_client()
        return self.session.client._replace(port=port if own else 0)

    def relay(self, relay: socket.socket) -> None:
        """Relay datagrams and record the end."""
        session = self.session
        session.phase = "io"
        udp = UdpRelay(
            session.connection,
            relay,
            self.expected_client(),
            self,
            self.rule.timeouts,
            session.config.udp_connectdst,
        )
        udp.budget = session.make_budget(self.rule)
        udp.meter = session.meter
        session.describe_io = lambda: f"udp: {udp.client} {udp.local}: {len(udp.paths)} families"
        try:
            reason = udp.run()
        finally:
            udp.close()
        if session.meter is not None and reason == CLIENT_CLOSED:
            session.meter.disconnect("internal")
        self.log_end(udp, ENDED_BY_US if session.stopping else reason)

    def log_end(self, udp: UdpRelay, reason: str) -> None:
        self.session.note_end(self.rule, reason)
        overhead = self.session.seal.overhead if self.session.seal is not None else 0
        for path in udp.paths.values() if overhead else ():
            # As Dante: the client's side is counted as it is sent, protection included.
            path.client_sent_bytes += overhead * path.client_sent_packets
            path.client_received_bytes += overhead * path.client_received_packets
        record, end = self.session.record, self.session.record.closing(self.rule, reason)
        client = (
            self.describe_user(udp.client) if udp.client_known else describe_endpoint(self.request.target)
        )
        near = f"{client} {udp.local}"
        if end and not udp.paths:
            record.write("pass", self.rule, self.event, "]", f"0/0 -> {near} -> 0/0{end}")
        for path in udp.paths.values() if end else ():
            inside = (
                f"{path.client_received_bytes}/{path.client_received_packets} -> {near} -> "
                f"{path.client_sent_bytes}/{path.client_sent_packets}"
            )
            outside = (
                f"{path.sent_bytes}/{path.sent_packets} -> {path.local} {path.only_target()} -> "
                f"{path.received_bytes}/{path.received_packets}"
            )
            record.write("pass", self.rule, self.event, "]", f"{inside}, {outside}{end}")
        to_client = sum(path.client_received_bytes for path in udp.paths.values())
        to_targets = sum(path.sent_bytes for path in udp.paths.values())
        record.closed(to_client, to_targets, reason)

    def describe_user(self, client: Endpoint) -> str:
        return self.session.record.side.split(" ")[0].replace(str(self.session.client), str(client))

    # --- UdpEvents ---

    def stopping(self) -> bool:
        return self.session.stopping

    def judge_datagram(self, client: Endpoint, target: Endpoint) -> Decision:
        session = self.session
        if target.host in IP_ANY and target.family:
            raise Refused(f"could not resolve target address {target}.  Non-DNS error: no system error ")
        addresses = self.find_addresses(target)
        decision = session.decide(session.facts("udpassociate", target, addresses)._replace(source=client))
        if decision.verdict == "block":
            return decision
        decision = session.redirect(decision, "udpassociate", target.port)
        return self.route(decision, target, addresses)

    def find_addresses(self, target: Endpoint) -> tuple[Endpoint, ...]:
        """Return the addresses of a target, each of which the rules will see; Refused."""
        session = self.session
        if target.family == 0:
            check_host_name(target.host)
            found, fault = session.lookup.resolve(target.host)
            if not found:
                raise Refused(f"could not resolve target address {describe_endpoint(target)}: {fault} ")
            return tuple(address._replace(port=target.port) for address in found)
        if target.family not in external_families(session.config, session.lookup):
            raise Refused(
                f"packet for IPv{target.family} address target, but no IPv{target.family} address configured "
                "for our usage on the external interface "
            )
        return (target,)

    def route(self, decision: Decision, target: Endpoint, addresses: tuple[Endpoint, ...]) -> Decision:
        """Return a decision with the way that a datagram takes."""
        return decision._replace(addresses=self.session.lookup.prefer_usable(decision.addresses))

    def judge_reply(self, sender: Endpoint, client: Endpoint) -> Decision:
        return self.session.decide(self.session.facts("udpreply", client)._replace(source=sender))

    def source_for(self, decision: Decision) -> Outside:
        return find_redirect(decision.rule, self.session.client_rule, "udpassociate").source

    def open_external(self, source: Outside, target: Endpoint, client: Endpoint) -> socket.socket:
        assert source is None or isinstance(source, RuleAddress)
        connection = self.session.open_from(source, target, socket.SOCK_DGRAM, client)
        self.session.set_options(connection, self.rule, "external")
        return connection

    def log_datagram(self, decision: Decision, packet: Packet, data: bytes) -> None:
        rule = decision.rule
        event = f"udp/{packet.command}"
        if decision.verdict == "block":
            # The built-in rule, whose log nobody can switch off, speaks once: a stranger's flood is not
            # to fill it.
            if not LOGS_A_BLOCK.isdisjoint(rule.log) and (rule.number or not self.final_block_logged):
                self.final_block_logged = self.final_block_logged or not rule.number
                self.session.record.write("block", rule, event, "-", self.describe_packet(packet))
        elif not rule.log.isdisjoint(LOGS_DATAGRAMS):
            payload = f": {escape_bytes(data)}" if data and "data" in rule.log else ""
            rest = f"{self.describe_packet(packet)} ({len(data)}){payload}"
            self.session.record.write("pass", rule, event, "-", rest)

    def log_dropped(self, packet: Packet, reason: str) -> None:
        if not LOGS_AN_ERROR.isdisjoint(self.rule.log):
            rest = f"{self.describe_packet(packet)}: {reason}"
            self.session.record.write("block", self.rule, f"udp/{packet.command}", "-", rest)

    def note_failure(self, target: Endpoint, fault: str) -> None:
        text = f"send to host {describe_endpoint(target)} failed: {fault}"
        self.session.note_failure(self.rule, "external", text)

    def describe_packet(self, packet: Packet) -> str:
        """Return a datagram's addresses in the order of its travel."""
        inside = (self.describe_user(packet.client), str(packet.relay))
        target = describe_endpoint(packet.target or UNSPECIFIED)
        outside = (str(packet.external or UNSPECIFIED), target)
        if packet.command == "udpreply":
            return f"{outside[1]} {outside[0]} -> {inside[1]} {inside[0]}"
        return f"{inside[0]} {inside[1]} -> {outside[0]} {outside[1]}"

    def notice_control(self, data: bytes) -> None:
        client, count = self.session.client, describe_count(len(data), "unexpected byte")
        text = (
            f"{count} over control connection from client {client}: {escape_bytes(data[:MOST_SHOWN_BYTES])}"
        )
        self.session.serving.log.write("notice", text)


class Bounce:
    """`bounce to` of a client-rule: the client is passed on to one address, without a word of SOCKS."""

    def __init__(self, session: Session, target: Endpoint) -> None:
        self.session = session
        self.target = target

    def run(self) -> None:
        session, rule = self.session, self.session.client_rule
        deadline = deadline_after(rule.timeouts.connect)
        try:
            addresses = session.find_addresses(self.target)
            connection, target = Race(addresses, self.open, session.connection.fileno(), deadline).run()
        except (Refused, ConnectFailed, ConnectTimeout, PeerGone) as fault:
            session.record.blocked_at_accept(f"could not bounce to {self.target}: {fault}")
            return
        except OSError as error:
            # No descriptor, no memory, an address of ours that has gone: not the client's fault.
            session.record.blocked_at_accept(f"could not bounce to {self.target}: {error.strerror}")
            return
        session.opened.append(connection)
        session.record.connections.append(connection)
        source = endpoint_of(connection.getsockname())
        pair = (Side(session.connection, "local client"), Side(connection, "remote peer"))
        far = f"{source} {target}"
        records = TcpRecords(session, rule, "tcp/bounce-to", session.record.side, far, pair)
        run_relay(session, records, *pair)

    def open(self, target: Endpoint) -> socket.socket:
        return self.session.open_external(self.session.client_rule, target)


class RoutedUdpRequest(UdpRequest):
    """UDP ASSOCIATE where there are routes: each target has its own."""

    def run(self) -> None:
        session, target = self.session, self.request.target
        # By the policy alone: super().run() asks once more, and what libwrap does is done once.
        decision = session.judge(session.facts("udpassociate", None))
        if decision.verdict == "block" or session.find_paths("udpassociate", None):
            super().run()
            return
        decision = session.decide(session.facts("udpassociate", None))
        if decision.verdict == "block":
            super().run()
            return
        session.authenticated_by(decision.method)
        text = "serverchain failed: " + NO_UPSTREAM_COMMAND.format("udpassociate")
        if not LOGS_AN_ERROR.isdisjoint(decision.rule.log):
            rest = f"{describe_endpoint(target)} {UNSPECIFIED}: {text}"
            session.record.write("block", decision.rule, self.event, "]", rest)
        session.record.refused_above(REQUEST_NOT_PERFORMED + text, wanted=LOGS_AN_ERROR)
        session.reply(Reply.NETWORK_UNREACHABLE, target)

    def find_addresses(self, target: Endpoint) -> tuple[Endpoint, ...]:
        if not target.family:
            return self.session.resolve("udpassociate", target)
        if self.session.find_paths("udpassociate", target, (target,)):
            return (target,)
        return super().find_addresses(target)

    def route(self, decision: Decision, target: Endpoint, addresses: tuple[Endpoint, ...]) -> Decision:
        session = self.session
        pattern = find_redirect(decision.rule, session.client_rule, "udpassociate").target
        if pattern is not None:
            target, addresses = redirected_endpoint(pattern, target.port), decision.addresses
        paths = session.find_paths("udpassociate", target, decision.addresses)
        if paths and not paths[0].steps and paths[0].addresses:
            usable = session.lookup.prefer_usable(paths[0].addresses)
            return decision._replace(addresses=usable, paths=paths[:1])
        upward = tuple(path for path in paths if path.steps)
        if not upward:
            raise Refused(NO_ROUTE)
        named = Errand("udpassociate", target, addresses).target_by(upward[0])
        stripped = tuple(path._replace(addresses=()) for path in upward)
        return decision._replace(addresses=(named,), paths=stripped)

    def source_for(self, decision: Decision) -> Outside:
        route = decision.paths[0].route
        if decision.paths[0].steps:
            return decision.paths
        return route.redirect.source if route.redirect is not None else super().source_for(decision)

    def open_external(self, source: Outside, target: Endpoint, client: Endpoint) -> socket.socket:
        if source is None or isinstance(source, RuleAddress):
            return super().open_external(source, target, client)
        association = self.associate(source)
        route = association.path.route
        pattern = route.redirect.source if route.redirect is not None else None
        try:
            plain = super().open_external(pattern, association.relays[0], client)
            self.session.set_options(plain, route, "external")
            return UpstreamUdp(plain, association, lambda: self.associate(source))
        except BaseException:
            association.close()
            raise

    def associate(self, paths: tuple[Path, ...]) -> Association:
        """Return an association at the upstreams of one of the paths; Refused."""
        ways: list[Way] = []
        try:
            ways.append(self.session.open_way(self.rule, paths, "udpassociate", UNSPECIFIED))
            last = ways[0]
            for count in range(len(last.path.steps) - 1, 0, -1):
                part = last.path._replace(steps=last.path.steps[:count])
                ways.insert(0, self.session.open_way(self.rule, (part,), "udpassociate", UNSPECIFIED))
            relays = tuple(self.find_relay(way) for way in ways)
        except (PathFailed, PeerGone, OSError) as failure:
            for way in ways:
                way.connection.close()
            self.session.leave_paths(ways)
            if isinstance(failure, PathFailed):
                raise Refused(describe_chain_failure(failure)) from None
            raise Refused(
                str(failure) if isinstance(failure, PeerGone) else describe_fault(failure)
            ) from None
        if "connect" in self.rule.log:
            rest = f"{self.session.record.side} -> {last.describe(UNSPECIFIED)}"
            self.session.record.write("pass", self.rule, self.event, "-", rest)
        controls = tuple(way.connection for way in ways)
        seal = last.stream.seal
        return Association(last.path, controls, relays, seal, lambda: self.session.leave_paths(ways))

    def find_relay(self, way: Way) -> Endpoint:
        """Return where an upstream takes datagrams: at its own address.

        The one in its reply would let it choose whom we send to.
        """
        host = way.path.steps[-1].upstream
        if len(way.path.steps) == 1:
            host = endpoint_of(way.connection.getpeername())
        return host._replace(port=way.bound.port)


REQUESTS: dict[str, type[ConnectRequest | BindRequest | UdpRequest]] = {
    "connect": ConnectRequest,
    "bind": BindRequest,
    "udpassociate": UdpRequest,
}
ROUTED_REQUESTS = REQUESTS | {"bind": RoutedBindRequest, "udpassociate": RoutedUdpRequest}


def choose_request(
    session: Session, request: Request
) -> type[ConnectRequest | BindRequest | UdpRequest | ExtendedBindRequest]:
    """Return the class that serves a request."""
    if (
        request.command == "bind"
        and request.target.host == BIND_EXTENSION
        and "bind" in session.config.extension
    ):
        return ExtendedBindRequest
    requests = REQUESTS if session.serving.upstreams is None else ROUTED_REQUESTS
    return requests[request.command]


# ============================== 17. HTTP ==============================
# A client that speaks HTTP on the port for SOCKS (proxyprotocol: http): CONNECT, and requests with the
# whole URI, one after the other.  Each is judged, connected and recorded as the same CONNECT in SOCKS would
# be, and has its connection to the target for itself.

INTERIM_RESPONSES = 32  # 1xx before the real one: more is an attack
LINGER_SECONDS = 2.0  # for a client that is still sending to read why it should not
LINGER_BYTES = 1 << 20


def linger(connection: socket.socket) -> None:
    """Let a client read its answer before the close: what it sent in vain would turn that into a reset."""
    deadline, left = time.monotonic() + LINGER_SECONDS, LINGER_BYTES
    try:
        connection.shutdown(socket.SHUT_WR)
        while left > 0:
            wait_for(connection.fileno(), select.POLLIN, deadline)
            data = connection.recv(MOST_RECORDED_BYTES)
            left = left - len(data) if data else 0
    except (OSError, DeadlinePassed):
        pass


class HttpExchange:
    """One request and its response, between a client and a target.  Owned by the session's thread.

    No more than one read waits here in each direction.
    """

    def __init__(self, session: Session, request: HttpRequest, records: TcpRecords) -> None:
        self.request = request
        self.budget = session.make_budget(records.rule)  # where a rule has a bandwidth
        self.meter = session.meter  # where a monitor is about the request
        self.resume_at = 0.0  # while the budget is used up: when that is over
        self.client, self.target = records.sides
        self.client.peer, self.target.peer = self.target, self.client
        self.client.may_splice = self.target.may_splice = False  # every byte is looked at
        self.idle = records.rule.timeouts.io_tcp or NO_DEADLINE
        self.observe = records.observer()
        self.pending = session.stream.pending  # read from the client and not yet understood
        self.upload = make_body(request.length or 0)
        self.answer = bytearray(self.client.begin())  # read from the target and not yet understood
        self.target.received, self.client.backlog = len(self.answer), b""
        self.looked_at = 0  # bytes of the answer
        self.response: HttpResponse | None = None
        self.download: HttpBody = EndlessBody()
        self.interims = 0
        self.persists = request.persists
        self.answered = False  # the client has a part of the response
        self.refuses = False  # the target takes no more of the request: its answer may still come

    def run(self) -> None:
        """Pass the request on and the response back.

        HttpError where there is no whole response: `answered` tells whether the client has a part of it.
        PeerGone or SideFailed if the client has gone.
        """
        self._send(self.target, encode_http_request(self.request))
        self._pass_request()
        self._pass_response()
        active = time.monotonic()
        while not self.download.finished or self.client.backlog:
            events = self._wait(self.resume_at or active + self.idle)
            now = time.monotonic()
            if not events and not self.resume_at and now >= active + self.idle:
                raise HttpError("i/o timeout", 504)
            if self.resume_at <= now:
                self.resume_at = 0.0
            active = now if events or self.resume_at else active
            for descriptor, mask in events:
                if descriptor == self.client.connection.fileno():
                    self._serve_client(mask)
                else:
                    self._serve_target(mask)
            self.count()

    def count(self) -> None:
        """Let the monitor know how far the exchange is."""
        if self.meter is not None:
            client, target = self.client, self.target
            self.meter.count((client.received, client.sent, target.received, target.sent))

    def _wait(self, deadline: float) -> list[tuple[int, int]]:
        """Return (descriptor, poll events) pairs; none when the deadline has passed."""
        poller = select.poll()
        poller.register(self.client.connection.fileno(), self._find_mask(self.client))
        mask = self._find_mask(self.target)
        if mask:
            # Not for nothing: a target that has gone would be reported for as long as the client is slow.
            poller.register(self.target.connection.fileno(), mask)
        return poller.poll(poll_milliseconds(deadline))

    def _find_mask(self, side: Side) -> int:
        """Return what of a side there is to wait for."""
        mask = select.POLLOUT if side.backlog else 0
        if side.peer.backlog or self.resume_at:
            return mask
        if side is self.target:
            return mask | (0 if self.download.finished else select.POLLIN)
        if not self.upload.finished and not self.refuses:
            return mask | select.POLLIN
        return mask | (0 if side.finished else select.POLLRDHUP)

    def _serve_client(self, mask: int) -> None:
        client = self.client
        if mask & select.POLLOUT and client.backlog:
            client.send(client.backlog)
        if mask & select.POLLIN:
            data = self._receive(client)
            if data == b"":
                raise PeerGone(CLIENT_CLOSED)
            self.pending += data or b""
            self._pass_request()
        elif mask & FAILED:
            raise PeerGone(CLIENT_CLOSED)
        elif mask & select.POLLRDHUP:
            # Passed on, as in the relay: whether its answer is still wanted, the target decides.
            client.finished = True
            self._finish_target()

    def _receive(self, side: Side) -> bytes | None:
        """Side.receive, once the budget has room for it; None until then."""
        budget = self.budget
        if budget is None:
            return side.receive()
        waiting = readable_bytes(side.connection)
        granted = budget.grant(waiting, min(budget.turn, side.most)) if waiting else 0
        if waiting and not granted:
            self.resume_at = budget.ready_at
            return None
        side.size = granted or FIRST_READ_BYTES
        data = side.receive()
        budget.give_back(granted - len(data or b""))
        return data

    def _finish_target(self) -> None:
        if not self.target.backlog and not self.refuses:
            try:
                self.target.finish_sending()
            except SideFailed:
                self.refuses = True

    def _serve_target(self, mask: int) -> None:
        target = self.target
        if mask & select.POLLOUT and target.backlog:
            self._write(target, target.backlog)
            if not target.backlog:
                self._pass_request()
                if self.client.finished:
                    self._finish_target()
        if mask & (select.POLLIN | FAILED) and not self.client.backlog and not self.download.finished:
            self._read_target()

    def _read_target(self) -> None:
        try:
            data = self._receive(self.target)
        except SideFailed as failure:
            raise HttpError(str(failure), 502) from None
        if data == b"":
            if self.response is None or not isinstance(self.download, EndlessBody):
                raise HttpError("remote peer closed in the middle of its response", 502)
            self.download.finished = True
        self.answer += data or b""
        self._pass_response()

    def _send(self, side: Side, data: bytes) -> None:
        """Send data that a rule may want recorded."""
        if self.observe is not None:
            self.observe(side.peer, data)
        self._write(side, data)

    def _write(self, side: Side, data: bytes) -> None:
        """Send data; a target that does not take it may still have answered."""
        try:
            side.send(data)
        except SideFailed:
            if side is self.client:
                raise
            side.backlog = b""
            self.refuses = True

    def _pass_request(self) -> None:
        """Pass on what is there of the request's body."""
        if self.upload.finished or self.target.backlog:
            return
        content = self.upload.take(self.pending)
        if self.request.length == CHUNKED:
            content = encode_chunk(content, self.upload.finished)
        if content and not self.refuses:
            self._send(self.target, content)

    def _pass_response(self) -> None:
        """Pass on what is there of the response."""
        output = []
        while self.response is None:
            end = self._find_head()
            if not end:
                break
            head = bytes(self.answer[:end])
            del self.answer[:end]
            output.append(self._take_head(head))
        if self.response is not None:
            content = self._take_content()
            if self.response.length == CHUNKED and self.request.minor:
                content = encode_chunk(content, self.download.finished)
            output.append(content)
        data = b"".join(output)
        if data:
            self.answered = self.response is not None
            self._send(self.client, data)

    def _find_head(self) -> int:
        end = self._understand(lambda: find_head_end(self.answer, self.looked_at))
        self.looked_at = 0 if end else len(self.answer)
        return end

    def _take_content(self) -> bytes:
        return self._understand(lambda: self.download.take(self.answer))

    def _understand(self, read: Callable[[], T]) -> T:
        """Read something of the answer: whatever is wrong with it, is the target's fault."""
        try:
            return read()
        except HttpError as error:
            raise HttpError(f"remote peer error ({error})", 502) from None

    def _take_head(self, head: bytes) -> bytes:
        """Take the head of a response, interim or final, and return what of it the client gets."""
        response = self._understand(lambda: decode_http_response(head, self.request.method))
        if response.status < 200:
            self.interims += 1
            if self.interims > INTERIM_RESPONSES:
                raise HttpError("remote peer error (http: too many interim responses)", 502)
            return encode_http_response(response, 1, True) if self.request.minor else b""
        self.response, self.download = response, make_body(response.length)
        self.persists = self.persists and response.length != UNTIL_END and self.upload.finished
        return encode_http_response(response, self.request.minor, self.persists)


class HttpConversation:
    """An HTTP client's connection, with one request after the other.  Owned by the session's thread."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.record = session.record
        self.stream = session.stream
        self.admitted = session.identity  # who the client is before it names itself
        self.login: tuple[str, bytes] | None = None
        self.method = ""  # of the request that is being served
        self.deadline = session.deadline
        self.began = session.record.started
        self.served = 0  # requests that came to a target
        self.end = "eof from local client"  # what it means if the client closes now
        self.lingers = False  # an answer may not have been read yet
        session.answer = self.reply

    def run(self) -> None:
        """Serve the client until either side has had enough."""
        while self.serve_request():
            self.deadline = deadline_after(self.session.client_rule.timeouts.negotiate)
            self.session.phase = "idle after"
        if self.lingers:
            linger(self.session.connection)
        self.session.answer = None

    def serve_request(self) -> bool:
        """Serve the next request; return whether another one may follow."""
        self.method = ""
        try:
            head = self.read_head()
            request = decode_http_request(head)
        except HttpError as error:
            self.refuse(error.status)
            self.finish(str(error))
        except DeadlinePassed:
            self.time_out()
        except PeerGone:
            self.finish(self.end)
        except OSError as error:
            self.finish(f"local client error ({error.strerror})")
        else:
            self.method = request.method
            return self.serve(request, len(head)) if self.identify(request) else self.challenge(request)
        return False

    def read_head(self) -> bytes:
        """Return the head of the next request, when all of it is there."""
        pending, looked_at = self.stream.pending, 0
        while True:
            while pending.startswith(b"\r\n"):
                del pending[:2]  # RFC 9112 section 2.2: some clients end a body so
            end = find_head_end(pending, looked_at)
            if end:
                head = bytes(pending[:end])
                del pending[:end]
                return head
            looked_at = len(pending)
            self.stream.read_more(self.deadline)

    # --- who it is ---

    def identify(self, request: HttpRequest) -> bool:
        """Find out who the client says it is, now: proxies before us may share a connection among users."""
        session = self.session
        if request.login != self.login:
            session.verified.clear()
        self.login = request.login
        methods = session.client_rule.socksmethods
        if request.login is not None and choose_method(methods, (2,)) == 2:
            user, session.password = request.login
            session.identity = self.admitted._replace(method="username", user=user)
            return True
        session.identity, session.password = self.admitted, None
        return choose_method(methods, (0,)) == 0

    def challenge(self, request: HttpRequest) -> bool:
        """Ask for a password; return whether the client may give it on the same connection."""
        takes_passwords = choose_method(self.session.client_rule.socksmethods, (2,)) == 2
        persists = takes_passwords and request.persists and not request.length and not self.stream.pending
        self.end = "client offered no acceptable authentication method"
        self.refuse(407 if takes_passwords else 403, persists)
        if not persists:
            self.finish(self.end)
        return persists

    def find_login_fault(self) -> str:
        """Return what is wrong with the password if that can be told before the request is judged, or ""."""
        session = self.session
        method = only_password_method(session.config) if session.identity.method == "username" else ""
        return session.verify(method, session.password_rule(method)) if method else ""

    # --- what it wants ---

    def serve(self, request: HttpRequest, head_bytes: int) -> bool:
        """Judge a request and perform it; return whether another one may follow."""
        session = self.session
        fault = self.find_login_fault()
        if fault:
            self.refuse(407)
            self.record.negotiation_failed(self.stream.received, fault)
            return False
        session.request = Request(HTTP1, "connect", request.target)
        session.phase, self.lingers = "request", False
        session.lookup.answers.clear()  # each request has names resolved anew, and pinned for itself
        if self.served:
            session.leave_requests()
        connect = ConnectRequest(session, session.request)
        if request.method == "CONNECT":
            connect.run()
            return False
        records = connect.open()
        return records is not None and self.exchange(request, records, head_bytes)

    def exchange(self, request: HttpRequest, records: TcpRecords, head_bytes: int) -> bool:
        """Pass a request and its response; return whether another request may follow."""
        session, (client, target) = self.session, records.sides
        if self.served:
            self.record.started = time.monotonic()  # the first one counts from the accept, as in SOCKS
        self.served += 1
        self.end = CLIENT_CLOSED
        session.phase = "io"
        client.received = head_bytes + len(self.stream.pending)
        session.describe_io = lambda: (
            f"{records.near} <-> {records.far}: {client.received} <-> {target.received}"
        )
        records.opened()
        exchange = HttpExchange(session, request, records)
        if exchange.budget is not None:
            exchange.budget.give_back(-client.received)  # read without having asked for it
        reason = self.run_exchange(exchange)
        client.received -= len(self.stream.pending)
        self.settle(exchange, "internal" if reason.startswith("local client") else "external")
        part_sides(client, target)
        session.describe_io = None
        sent, received = self.record.before
        self.record.before = sent + client.sent, received + client.received
        records.closed(reason)
        self.record.started = self.began
        del self.record.connections[1:]
        session.opened.remove(target.connection)
        target.connection.close()
        if exchange.persists:
            return True
        self.finish(reason)
        return False

    def settle(self, exchange: HttpExchange, first_to_close: str) -> None:
        """Give back what an exchange held of bandwidth and monitor; the next one has its own."""
        if exchange.budget is not None:
            exchange.budget.close()
        if exchange.meter is not None:
            exchange.count()
            exchange.meter.disconnect(first_to_close)
            exchange.meter.close()
        self.session.budget = self.session.meter = None

    def run_exchange(self, exchange: HttpExchange) -> str:
        """Return the reason for the end of an exchange, in Dante's words where it has some."""
        reason, self.lingers = TARGET_CLOSED, True
        try:
            exchange.run()
        except HttpError as error:
            reason, exchange.persists = str(error), False
            # Neither side may take its part for the whole.
            exchange.target.reset()
            if not exchange.answered and not exchange.client.backlog:
                exchange.client.sent += self.refuse(error.status)
            else:
                exchange.client.reset()
                self.lingers = False
        except (PeerGone, SideFailed, OSError) as error:
            reason, exchange.persists = str(error), False
            exchange.target.reset()
            self.lingers = False
        return ENDED_BY_US if self.session.stopping else reason

    # --- answers and ends ---

    def reply(self, reply: Reply, bound: Endpoint) -> None:
        """Answer a request as session.reply does in SOCKS."""
        if reply == Reply.SUCCEEDED:
            line = b"HTTP/1.1 200 Connection established\r\n\r\n"
            self.stream.send(line, deadline_after(self.session.config.timeouts.negotiate))
            return
        status = HTTP_STATUS_OF_REPLY.get(reply, 502)
        self.refuse(407 if status == 403 and self.would_pass_with_password() else status)

    def would_pass_with_password(self) -> bool:
        """Tell whether a request was refused for want of a password, or for a wrong one."""
        session = self.session
        if self.login is not None or choose_method(session.client_rule.socksmethods, (2,)) != 2:
            return any(session.verified.values())
        assert session.request is not None
        try:
            addresses = ConnectRequest(session, session.request).find_addresses()
        except Refused:
            return False
        facts = session.facts("connect", session.request.target, addresses)
        return session.serving.policy.wants_password(facts, session.lookup)

    def refuse(self, status: int, persists: bool = False) -> int:
        """Answer with an error; return how many bytes that took."""
        self.lingers = not persists
        data = encode_http_error(status, self.method, persists)
        try:
            self.stream.send(data, deadline_after(self.session.config.timeouts.negotiate))
        except (OSError, DeadlinePassed):
            return 0
        return len(data)

    def time_out(self) -> None:
        """End a connection on which no request came in time."""
        if self.stream.pending:
            self.refuse(408)
        if self.served:
            self.finish("idle connection closed")
        else:
            seconds = self.session.client_rule.timeouts.negotiate
            self.record.blocked_at_accept(f"negotiate timeout after {describe_count(seconds, 'second')}")

    def finish(self, reason: str) -> None:
        """Record the end of the connection, where no request has done so."""
        if self.record.ended:
            return
        reason = ENDED_BY_US if self.session.stopping else reason
        if self.served:
            self.record.closed(0, 0, reason)
        else:
            self.record.negotiation_failed(self.stream.received, reason)


def serve_client(session: Session) -> None:
    """Serve one client from accept to close: the life of a session."""
    try:
        if not session.admit():
            return
        if session.client_rule.bounce is not None:
            Bounce(session, session.client_rule.bounce).run()
        elif session.negotiate():
            assert session.request is not None
            session.phase = "request"
            if session.request.version == HTTP1:
                HttpConversation(session).run()
            else:
                choose_request(session, session.request)(session, session.request).run()
    except (OSError, DeadlinePassed) as error:
        session.lose_client(error)
    finally:
        session.close()


# ============================== 18. Processes ==============================
# The bodies of the three kinds of children: worker (clients), resolver (names) and warden
# (passwords, privileged ports).  Each obeys the mother through its control socket and ends when that closes,
# so no child outlives the mother.

THREAD_STACK_BYTES = (
    256 * 1024
)  # getaddrinfo and regular expressions need far less; 32-bit hosts have little room
IDLE_THREAD_SECONDS = 5.0  # a thread without a client waits this long for the next
WAKES_ONE = select.EPOLLIN | select.EPOLLEXCLUSIVE
GATES = 2  # threads of a worker that wait for clients at the same time
STOP_SECONDS = 0.6  # from the order to stop until a worker's sessions have ended and written their records
CUSHION_BYTES = 4 << 20  # address space only: nothing is ever written there
SHORTAGE_SECONDS = 2.0  # how long new clients are turned away once memory has run out
WATCH_MILLISECONDS = 2000  # how often the main thread looks whether anybody waits for clients
DRAIN_MILLISECONDS = 200  # how often a worker without listeners looks whether its sessions have ended
RESOLVER_THREADS = 256  # questions answered at once; more wait in the inbox
# Log-ins to upstreams at once.  Each lasts as long as the KDC and a round trip to the upstream take, and at
# the latest until timeout.connect once there is a ticket; while the KDC is silent, up to VERIFY_SECONDS.
INITIATORS = 64
WAITING_INITIATIONS = 256  # more than that are refused
WAITING_MILLISECONDS = 10  # how often those that wait have a chance
VERIFIERS = 64  # password checks at once; a PAM module may sleep 2 seconds over each


# All that a worker tells the mother.
TIRED = encode_message(0, [b"tired"])  # it has served child.maxrequests clients
DRAINED = encode_message(0, [b"drained"])  # it has let go of the listeners: it takes nobody who comes now
SETTLED = encode_message(0, [b"settled"])  # ... and none of its sessions will ask the warden any more
DEAF = encode_message(0, [b"deaf"])  # a listener does not listen any more
WORKER_WORDS = frozenset({TIRED, DRAINED, SETTLED, DEAF})
MOST_LOG_TARGETS = 253  # descriptors that Linux passes in one message (SCM_MAX_FD)


class Order(enum.IntEnum):
    """All that the mother tells a child."""

    STOP = 1  # end the sessions and exit
    DRAIN = 2  # accept no more and exit when the last session has ended
    REPORT = 3  # log the state of each session
    LOGS = 4  # (names of logoutput, "", names of errorlog), with a descriptor for each that is not standard


def receive_order(control: socket.socket) -> tuple[int, list[bytes], list[int]] | None:
    """Read the mother's next order; None when she is gone."""
    try:
        data, descriptors = receive_descriptors(control, MAX_MESSAGE_BYTES, MOST_LOG_TARGETS)
    except OSError:
        return None
    if not data:
        return None
    kind, fields = decode_message(data)
    return kind, fields, descriptors


def describe_age(seconds: float) -> str:
    """Return an age as Dante's SIGUSR1 records spell it.

    >>> describe_age(90061)
    '1 day, 1:01:01'
    """
    days, rest = divmod(int(seconds), SECONDS_PER_DAY)
    return f"{describe_count(days, 'day')}, {rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def describe_bug(error: BaseException) -> str:
    """Return an unexpected error with where it was raised, in one line and without any value.

    Not a traceback module's text: that would open source files, and values may be secrets.
    """
    places, frame = [], error.__traceback__
    while frame is not None:
        places.append(f"{frame.tb_frame.f_code.co_name}:{frame.tb_lineno}")
        frame = frame.tb_next
    return f"{type(error).__name__} at {' > '.join(places)}"


class Gate(NamedTuple):
    """Where a worker's threads wait for clients, one at a time: an epoll, as only that wakes exclusively."""

    lock: threading.Lock
    epoll: select.epoll
    unheard: set[int]  # listeners that the system had no room to register again


def go_to_the_end(gate: Gate, descriptor: int) -> None:
    """Put a gate behind all others of a listener, so that all workers have their turn.

    The kernel asks them in the order of their registration, and lets none with EPOLLEXCLUSIVE be modified.
    """
    try:
        gate.unheard.add(descriptor)
        try:
            gate.epoll.unregister(descriptor)
        except FileNotFoundError:
            pass  # it is tried again
        gate.epoll.register(descriptor, WAKES_ONE)
        gate.unheard.remove(descriptor)
    except (OSError, MemoryError):
        pass  # who waits there next tries again; the client that has come is served


class Worker:
    """Accepts clients and serves each in a thread.

    A thread that has a gate waits there for a client and serves it itself, so no client waits for a change
    of threads; another is called to the gates only where nobody waits at one any more.  The kernel wakes
    one gate of all workers for each client (EPOLLEXCLUSIVE).  The main thread only obeys the mother.
    """

    def __init__(self, serving: Serving, listeners: Sequence[socket.socket], control: socket.socket) -> None:
        self.serving = serving._replace(start_thread=self.start_beside)
        self.log = serving.log
        self.listeners = {listener.fileno(): listener for listener in listeners}
        self.control = control
        self.sessions: set[Session] = set()  # changed by the sessions' threads; each operation is atomic
        self.crowd = threading.Lock()  # guards the next three, and is never held over a call that waits
        self.door = threading.Lock()  # held for an accept(2), and for whatever gives the reserve up
        self.attending = 0  # threads that wait for a client, each at a gate
        self.spare = 0  # threads that wait until they are called to a gate
        self.called = False  # one of these has been, and has not come yet
        self.call = threading.Lock()  # held, but for the moment of a call
        self.call.acquire()
        self.gates = [Gate(threading.Lock(), select.epoll(), set()) for _ in range(GATES)]
        self.alarm = os.pipe2(os.O_CLOEXEC)  # wakes all idle threads when `draining` has been set
        self.reserve = os.dup(control.fileno())  # given up for a moment when descriptors run out
        self.cushion: bytes | None = bytes(CUSHION_BYTES)  # given up when memory runs out
        self.short_until = 0.0  # until then new clients are turned away, so that the others have room
        self.draining = False
        self.drained = False  # and the mother has been told
        self.settled = False  # as well
        self.deaf = False
        self.complained = False
        self.accepted = 0
        self.trimmed_after = 0  # clients: when memory was last given back to the system
        self.started = time.monotonic()

    # --- the main thread ---

    def run(self) -> int:
        """Serve until ordered otherwise; return the exit status."""
        threading.stack_size(THREAD_STACK_BYTES)
        for gate in self.gates:
            gate.epoll.register(self.alarm[0], select.EPOLLIN)
            for descriptor in self.listeners:
                gate.epoll.register(descriptor, WAKES_ONE)
        self.start_thread()
        poller = select.poll()
        poller.register(self.control.fileno(), select.POLLIN)
        unattended = 0  # how often in a row nobody was found to wait for clients
        while not (self.draining and not self.sessions):
            hurries = self.draining or unattended
            events = poller.poll(DRAIN_MILLISECONDS if hurries else WATCH_MILLISECONDS)
            if events and not self.obey():
                return self.stop()
            if self.draining:
                self.settle()
            if not events and not self.sessions and self.trimmed_after < self.accepted:
                self.trimmed_after = self.accepted
                release_memory()
            if not events and not self.draining:
                unattended = 0 if self.is_attended() else unattended + 1
                if unattended > 1:
                    self.run_short("out of memory")  # so that the next one finds some
                    self.turn_all_away()
                if unattended:
                    self.call_successor()  # the thread that was to wait has died young
        return 0

    def obey(self) -> bool:
        """Carry out one order of the mother; False for the order to stop, also when she is gone."""
        message = self.hear_mother()
        if message is None or message[0] == Order.STOP:
            return False
        order = message[0]
        if order == Order.REPORT:
            self.report()
        elif order == Order.DRAIN and not self.draining:
            self.close_listeners()
        return True

    def hear_mother(self) -> tuple[int, list[bytes], list[int]] | None:
        """Read an order, and take the logs that come with one; a full worker takes them by its reserve."""
        is_at_door = self.door.acquire(timeout=DOOR_SECONDS)  # or a client would come in the reserve's place
        if is_at_door:
            self.give_reserve_up()
        try:
            message = receive_order(self.control)
            if message is not None and message[0] == Order.LOGS:
                self.log.adopt(message[1], message[2])
            return message
        finally:
            if is_at_door:
                self.keep_reserve()
                self.door.release()

    def settle(self) -> None:
        """Tell the mother that the listeners are let go of, and when no session will ask the warden any more.

        What the system had no room to send is told the next time.
        """
        self.drained = self.drained or self.tell_mother(DRAINED)
        if not self.settled and not any(session.may_ask() for session in tuple(self.sessions)):
            self.settled = self.tell_mother(SETTLED)

    def close_listeners(self) -> None:
        """Accept no more clients."""
        self.draining = True
        os.write(self.alarm[1], b".")
        deadline = time.monotonic() + STOP_SECONDS
        # A thread that has just been woken may still use a listener.  One that comes to a gate, or is called
        # to it, from now on leaves without: it looks at `draining` when it has been counted.
        while self.attending and time.monotonic() < deadline:
            time.sleep(0.001)
        for listener in self.listeners.values():
            listener.close()
        self.listeners = {}

    def stop(self) -> int:
        """End every session, give each the time to write its records, and return the exit status."""
        self.close_listeners()
        deadline = time.monotonic() + STOP_SECONDS
        while self.sessions and time.monotonic() < deadline:
            for session in tuple(self.sessions):
                session.abort()
            time.sleep(0.01)
        return 0

    def report(self) -> None:
        """Log the state of this process and of its sessions (SIGUSR1)."""
        sessions = tuple(self.sessions)
        age = describe_age(time.monotonic() - self.started)
        self.log.write("info", f"worker up {age}, a: {self.accepted}, c: {len(sessions)}")
        for session in sessions:
            self.log.write("info", session.describe())

    # --- the threads of the sessions ---

    def start_thread(self) -> None:
        """Start a thread that waits for a client; RuntimeError or MemoryError where the system has none left.

        Not by threading.Thread, whose start() would wait for ever for a thread that dies of a lack
        of memory in its first steps.
        """
        _thread.start_new_thread(self.serve_sessions, ())

    def start_beside(self, client: Endpoint, work: Callable[[], None]) -> None:
        """Start a thread for a part of a client's session; RuntimeError or MemoryError as for a client."""
        _thread.start_new_thread(self.run_session, (client, work))

    def serve_sessions(self) -> None:
        """Wait for a client, serve it, and so on: the life of a thread.  It ends when it is not needed."""
        while True:
            session = self.find_client()
            if session is None and not self.is_attended() and not self.draining:
                continue  # the last one that waited has just got a client
            if session is None:
                return
            if not self.attending and not self.draining and not self.call_successor():
                session.connection.close()
                self.sessions.discard(session)
                time.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            try:
                self.run_session(session.client, functools.partial(serve_client, session))
            finally:
                self.sessions.discard(session)

    def is_attended(self) -> bool:
        """Tell whether a thread waits for clients, or for a call."""
        return self.attending + self.spare > 0

    def call_successor(self) -> bool:
        """Call or start the thread that will wait while this one serves; False if there can be none."""
        if self.call_spare():
            return True
        try:
            self.start_thread()
        except (RuntimeError, MemoryError) as error:
            self.run_short(str(error) or "out of memory")
            return False
        return True

    def call_spare(self) -> bool:
        """Call one of the spare threads to a gate; False if there is none."""
        with self.crowd:
            if self.spare and not self.called:
                self.called = True
                self.call.release()
            return self.called

    def find_client(self) -> Session | None:
        """Return the session of the next client; None when this thread is not needed to wait any more."""
        gate = self.take_gate()
        while gate is None and self.await_call():
            gate = self.take_gate()
        if gate is None:
            return None
        try:
            return self.wait_at(gate)
        finally:
            with self.crowd:
                self.attending -= 1
            gate.lock.release()

    def take_gate(self) -> Gate | None:
        """Return a gate for this thread alone; None if others wait at all of them."""
        for gate in self.gates:
            if gate.lock.acquire(blocking=False):
                with self.crowd:
                    self.attending += 1
                return gate
        return None

    def await_call(self) -> bool:
        """Wait to be called to a gate; False if that does not happen for long."""
        with self.crowd:
            self.spare += 1
        self.call.acquire(timeout=0 if self.draining else IDLE_THREAD_SECONDS)
        with self.crowd:
            self.spare -= 1
            was_called = self.called  # by now, if not before the time was up
            if was_called:
                self.called = False
                self.call.acquire(blocking=False)
        return was_called

    def wait_at(self, gate: Gate) -> Session | None:
        """Wait until there is a client, and return its session; None when no more are to be taken."""
        session = None
        while session is None and not self.draining:
            try:
                for descriptor in tuple(gate.unheard):
                    go_to_the_end(gate, descriptor)
                for descriptor, _ in gate.epoll.poll(ACCEPT_PAUSE_SECONDS if gate.unheard else None, 1):
                    listener = self.listeners.get(descriptor)
                    with self.door:
                        session = self.accept(listener) if listener is not None else None
                    if session is not None:
                        go_to_the_end(gate, descriptor)
            except MemoryError:
                self.run_short("out of memory")  # this thread stays: it may be the last to wait
        return session

    def accept(self, listener: socket.socket) -> Session | None:
        """Take one connection off a listener; None if there is none after all."""
        if self.reserve < 0:
            self.keep_reserve()
        if self.cushion is None and not self.find_cushion():
            self.turn_away(listener)
            return None
        try:
            connection, address = listener.accept()
        except BlockingIOError:
            return None  # another worker was quicker
        except MemoryError:
            self.run_short("out of memory")
            return None
        except OSError as error:
            self.survive_shortage(listener, error)
            return None
        self.accepted += 1
        if self.accepted == self.serving.config.child_maxrequests:
            self.tell_mother(TIRED)  # for a successor; this worker serves on until there is one
        if self.cushion is not None and self.reserve >= 0:
            self.complained = False
        try:
            return self.make_session(connection, address)
        except MemoryError:
            self.run_short("out of memory")
        except OSError:
            pass  # the client has gone already
        connection.close()
        return None

    def tell_mother(self, message: bytes) -> bool:
        """Send the mother a word; False if there is no room for it now."""
        try:
            self.control.send(message, socket.MSG_DONTWAIT)
        except OSError:
            return False  # or she is gone, and the main thread will notice
        return True

    def make_session(self, connection: socket.socket, address: tuple) -> Session:  # type: ignore[type-arg]
        """Return the session of a connection that has just been accepted; OSError, MemoryError."""
        connection.setblocking(False)
        local = endpoint_of(connection.getsockname())
        session = Session(self.serving, connection, endpoint_of(address), local)
        self.sessions.add(session)
        return session

    def survive_shortage(self, listener: socket.socket, error: OSError) -> None:
        """Refuse one client cleanly where the system has nothing left for it, and rest a moment."""
        if error.errno == errno.EINVAL and not self.draining:
            self.find_deaf()
        if error.errno not in SHORTAGES:
            return  # the client has gone before it was accepted
        self.complain(f"accept: {error.strerror}")
        if error.errno == errno.EMFILE and self.reserve >= 0:
            self.give_reserve_up()
            self.turn_away(listener)
        self.keep_reserve()
        time.sleep(ACCEPT_PAUSE_SECONDS)

    def find_deaf(self) -> None:
        """Tell the mother of a listener that another worker, which has gone wrong, has shut down."""
        if not self.deaf:
            self.deaf = True
            self.tell_mother(DEAF)
        time.sleep(ACCEPT_PAUSE_SECONDS)

    def turn_all_away(self) -> None:
        """Let nobody wait for threads that there is no memory for.  Called by the main thread."""
        with self.door:
            for listener in self.listeners.values():
                for _ in range(LISTEN_BACKLOG):
                    if not self.turn_away(listener):
                        break

    def turn_away(self, listener: socket.socket) -> bool:
        """Close a connection without serving it; False if there is none."""
        try:
            descriptor = listener.accept()[0].detach()
        except (OSError, MemoryError):
            return False  # it has gone, or a session has been quicker to take the free descriptor
        if self.reserve < 0:
            # Closes the connection, and nobody can come between that and the reserve.
            self.reserve = os.dup2(self.control.fileno(), descriptor, inheritable=False)
        else:
            os.close(descriptor)
        return True

    def run_short(self, text: str) -> None:
        """Give up the cushion: what memory there is now belongs to the sessions that live."""
        self.cushion = None
        self.short_until = time.monotonic() + SHORTAGE_SECONDS
        self.complain(text)

    def find_cushion(self) -> bool:
        """Tell whether the shortage of memory is over."""
        if time.monotonic() < self.short_until:
            return False
        try:
            self.cushion = bytes(CUSHION_BYTES)
        except MemoryError:
            self.short_until = time.monotonic() + SHORTAGE_SECONDS
            return False
        self.complained = False
        return True

    def give_reserve_up(self) -> None:
        """Make room for one descriptor."""
        if self.reserve >= 0:
            os.close(self.reserve)
            self.reserve = -1

    def keep_reserve(self) -> None:
        """Take a descriptor to be given up when none is left, if there is one to take."""
        try:
            self.reserve = os.dup(self.control.fileno()) if self.reserve < 0 else self.reserve
        except OSError:
            pass

    def complain(self, text: str) -> None:
        """Log a shortage once, until a client could be served again."""
        if not self.complained:
            self.complained = True
            self.log.write("warning", f"{text}; refusing new clients until there is room again")

    def run_session(self, client: Endpoint, work: Callable[[], None]) -> None:
        """Run one session, or a part of it; an error of ours ends that and nothing else."""
        try:
            work()
            self.short_until = 0.0  # what it had is free, and so is its thread
        except MemoryError:
            self.run_short("out of memory")
        except Exception as error:  # the one place for what nobody expected
            text = f"internal error in the session of {client}: {describe_bug(error)}"
            self.log.write("error", text)


class StuckHelper(SockdError):
    """A helper cannot answer any more, and ends."""


NOBODY = b"0"  # in the place of a pid, where a helper cannot tell which worker went wrong


class Helper(Protocol):
    """What run_helper drives: Resolver and Warden."""

    granted: frozenset[Favour]

    def grant(self, question: Question) -> None: ...

    def drain(self) -> None:
        """Wait until the questions under way are answered."""
        ...

    def tidy(self) -> int | None:
        """Clear up behind answered questions; return the milliseconds until that is needed again."""
        ...


def answer_question(inbox: socket.socket, control: socket.socket, helper: Helper) -> bool:
    """Answer the next question; False where there will be none any more."""
    try:
        question = receive_question(inbox, helper.granted)
    except BlockingIOError:
        return True  # another helper was quicker
    except MalformedMessage as error:
        control.send(encode_message(0, [str(error.pid).encode(), str(error).encode()]))
        return True
    except InboxEnded as error:
        control.send(encode_message(0, [NOBODY, str(error).encode()]))
        return False
    helper.grant(question)
    return True


def run_helper(log: Log, inbox: socket.socket, control: socket.socket, helper: Helper) -> int:
    """Answer questions until the mother says stop: the life of resolver and warden."""
    poller = select.poll()
    poller.register(inbox.fileno(), select.POLLIN)
    poller.register(control.fileno(), select.POLLIN)
    while True:
        for descriptor, _ in poller.poll(helper.tidy()):
            if descriptor != control.fileno():
                try:
                    with Impatience():
                        is_open = answer_question(inbox, control, helper)
                except StuckHelper as fault:
                    log.write("error", str(fault))
                    return 1
                if not is_open:
                    poller.unregister(inbox.fileno())
                continue
            message = receive_order(control)
            if message is None or message[0] == Order.STOP:
                return 0
            if message[0] == Order.DRAIN:
                helper.drain()
                return 0
            if message[0] == Order.LOGS:
                log.adopt(message[1], message[2])


def grant_resolve(fields: list[bytes]) -> list[bytes]:
    families = [int(digit) for digit in fields[1].decode("ascii") if digit in "46"]
    return encode_endpoints(resolve_name(fields[0].decode("latin-1"), families)) if families else []


def grant_reverse(fields: list[bytes]) -> list[bytes]:
    (address,) = decode_endpoints(fields)
    return [name.encode("latin-1", "replace")[:255] for name in reverse_names(address)[:8]]


def grant_interface(fields: list[bytes]) -> list[bytes]:
    return encode_endpoints(interface_addresses().get(fields[0].decode("latin-1"), ()))


def grant_groups(fields: list[bytes]) -> list[bytes]:
    """Return the names of a user's groups; KeyError if there is no such user."""
    names = []
    for number in group_numbers(fields[0], pwd.getpwnam(os.fsdecode(fields[0])).pw_gid):
        try:
            names.append(os.fsencode(grp.getgrgid(number).gr_name))
        except KeyError:
            continue
    return names


RESOLVER_FAVOURS = {
    Favour.RESOLVE: grant_resolve,
    Favour.REVERSE: grant_reverse,
    Favour.INTERFACE: grant_interface,
    Favour.GROUPS: grant_groups,
}


NETDB_INTERNAL = -1  # netdb.h: h_errno for what went wrong in this process


def is_own_fault(error: Exception) -> bool:
    """Tell whether a look-up failed for want of something here, and not because the system said no."""
    if isinstance(error, socket.gaierror):
        return error.errno in (socket.EAI_SYSTEM, socket.EAI_MEMORY)
    if isinstance(error, socket.herror):
        return error.errno == NETDB_INTERNAL
    return isinstance(error, OSError)


class Resolver:
    """Asks the system for names: getaddrinfo blocks and has no time-out, so a few threads take turns."""

    granted = frozenset({Favour.RESOLVE, Favour.REVERSE, Favour.INTERFACE, Favour.GROUPS})

    def __init__(self) -> None:
        self.free = threading.Semaphore(RESOLVER_THREADS)

    def grant(self, question: Question) -> None:
        """Answer a question in a thread of its own; waits while all are busy.

        StuckHelper where none of them gets through: the process is to be replaced.
        """
        if not self.free.acquire(blocking=False):
            if not self.free.acquire(timeout=RESOLVE_SECONDS):
                text = f"no look-up of {RESOLVER_THREADS} has ended in {RESOLVE_SECONDS:.0f} seconds"
                raise StuckHelper(text)
            if question.is_void():
                question.answer.close()
                self.free.release()
                return
        try:
            _thread.start_new_thread(self.answer, (question,))
        except (RuntimeError, MemoryError):
            self.free.release()
            question.fail("no thread is left to ask the resolver")

    def tidy(self) -> int | None:
        return None

    def drain(self) -> None:
        deadline = time.monotonic() + RESOLVE_SECONDS
        for _ in range(RESOLVER_THREADS):
            self.free.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def answer(self, question: Question) -> None:
        try:
            found = FOUND_BORDER.join(RESOLVER_FAVOURS[question.favour](question.fields))
            if len(found) > MAX_FIELD_BYTES:
                # A part of it would be a wrong answer: a rule could miss the rest.
                question.fail(f"the answer has more than {MAX_FIELD_BYTES} bytes")
            else:
                question.reply([b"", found])
        except (OSError, KeyError, ValueError, TypeError) as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            if is_own_fault(error):
                question.fail(text)
            else:
                question.reply([text.encode("utf-8", "replace")[:255]])
        finally:
            self.free.release()


def has_room(service: tuple[bytes, ...], held: Sequence[tuple[bytes, ...]], most: int) -> bool:
    """Tell whether one more log-in to an upstream has a place; none has more than half of them.

    >>> has_room((b"a",), [(b"a",), (b"b",)], 4), has_room((b"a",), [(b"a",), (b"a",)], 4)
    (True, False)
    """
    return len(held) < most and held.count(service) < most // 2


class Warden:
    """Checks passwords and Kerberos tickets, binds ports, sets socket options and asks libwrap.

    Each check runs in a child: what a PAM module does there, sleeping, crashing or keeping
    the password, ends with the child.
    """

    granted = frozenset(
        {Favour.PASSWORD, Favour.BIND, Favour.WRAP, Favour.ACCEPT, Favour.OPTION, Favour.INITIATE}
    )

    def __init__(
        self, config: Config, log: Log, accounts: Accounts = (None, None, None), daemon: str = "sockd"
    ) -> None:
        self.config = config
        self.log = log
        _, self.reader, self.commander = accounts  # as whom tokens are read, and libwrap runs
        self.daemon = daemon  # the name that hosts.allow and hosts.deny have for us
        self.options = list_options(config)
        rules = (*config.client_rules, *config.socks_rules)
        self.methods = {method.encode() for rule in rules for method in rule_methods(rule)}
        self.services = {rule.pam_servicename.encode("latin-1") for rule in rules}
        self.upstreams = list_services(config)
        self.children: dict[int, str] = {}  # pid -> the client's address; "" if it checks no password
        # Those of them that wait for what an upstream says, and which; and who waits for a place among them.
        self.initiators: dict[int, tuple[bytes, ...]] = {}
        self.waiting: list[Question] = []
        self.failures = Failures()

    def grant(self, question: Question) -> None:
        if question.favour == Favour.BIND:
            self.bind(question)
            return
        if question.favour == Favour.OPTION:
            self.set_option(question)
            return
        if question.favour == Favour.INITIATE:
            self.begin_initiation(question)
            return
        self.reap(must_wait=False)
        while len(self.children) - len(self.initiators) >= VERIFIERS:
            self.reap(must_wait=True)  # which a log-in to an upstream may be that ends
        if question.favour == Favour.ACCEPT:
            self.check(question, lambda: self.accept(question), "")
            return
        if question.favour == Favour.WRAP:
            self.check(question, lambda: self.wrap(question), "")
            return
        host = question.fields[4].decode("latin-1")
        wait = self.find_wait(host)
        if wait > MOST_WAIT_SECONDS:
            question.reply([f"too many wrong log-ins from {Failures.find_source(host)}".encode(), b"0"])
            return
        self.check(question, lambda: self.answer(question, wait), host)

    def begin_initiation(self, question: Question) -> None:
        """Answer in a child that lasts as long as its upstream: those that are slow hold up no password."""
        if UpstreamService(*(field.decode(WIRE_TEXT) for field in question.fields)) not in self.upstreams:
            question.reply([b"this proxy server is not in the configuration"])
            return
        self.reap(must_wait=False)
        services = [tuple(other.fields) for other in self.waiting]
        if has_room(tuple(question.fields), services, WAITING_INITIATIONS):
            self.waiting.append(question)
        else:
            question.reply([b"too many log-ins to proxy servers at a time"])
        self.serve_waiting()

    def serve_waiting(self) -> None:
        """Begin the log-ins to upstreams that there is room for; under Impatience."""
        waiting, self.waiting = self.waiting, []
        for question in waiting:
            service = tuple(question.fields)
            if question.is_void():
                question.answer.close()
            elif not has_room(service, tuple(self.initiators.values()), INITIATORS):
                self.waiting.append(question)
            else:
                pid = self.check(question, functools.partial(self.initiate, question), "")
                if pid:
                    self.initiators[pid] = service

    def check(self, question: Question, body: Callable[[], bool], host: str) -> int:
        """Answer a question in a child; `host` is the client's address if it is about a password.

        Return the child's pid, or 0 if there is none.  It holds the way of the answer and what it was shown,
        and nothing else: all of them may read an enemy's bytes, and passwords come by our inbox.
        """

        def answer_alone() -> bool:
            keep_only({question.answer.fileno(), *question.passed})
            return body()

        try:
            pid = fork_verifier(answer_alone)
            self.children[pid] = host
            return pid
        except OSError as error:
            question.reply([f"cannot be checked now: {error.strerror}".encode(), b"0"])
            return 0
        finally:
            question.answer.close()
            for descriptor in question.passed:
                os.close(descriptor)

    def find_wait(self, host: str) -> float:
        """Return how long a log-in from an address has to wait; a nonsense address waits too long."""
        try:
            return self.failures.claim(host, time.monotonic()) if self.config.login_penalty else 0.0
        except OSError:
            return NO_DEADLINE

    def answer(self, question: Question, wait: float) -> bool:
        """Check a password and say how long the client has to wait for the answer; in the child.

        Return whether it is not the client's fault if it was refused.
        """
        is_wrong = False
        try:
            fault = self.verify(question.fields)
            is_wrong = bool(fault)
        except Unverified as error:
            fault = str(error)
        question.reply([fault.encode(), f"{wait:.3f}".encode()])
        return not is_wrong

    def tidy(self) -> int | None:
        self.reap(must_wait=False)
        if self.waiting:
            with Impatience():
                self.serve_waiting()
            return WAITING_MILLISECONDS
        return 100 if self.children else None

    def drain(self) -> None:
        while self.children:
            self.reap(must_wait=True)
            with Impatience():
                self.serve_waiting()

    def reap(self, must_wait: bool) -> None:
        """Forget the checks that have ended; wait for one if there is no room for another."""
        while self.children:
            pid, status = os.waitpid(-1, 0 if must_wait else os.WNOHANG)
            if pid == 0:
                return
            if is_traced(pid, status):
                continue
            host = self.children.pop(pid, "")
            self.initiators.pop(pid, None)
            failed = bool(host) and os.waitstatus_to_exitcode(status) == SAID_NO
            if failed and self.failures.note(host, time.monotonic()) and self.config.login_penalty:
                source = Failures.find_source(host)
                self.log.write("warning", f"{FREE_FAILURES} wrong log-ins from {source}: slowing it down")
            must_wait = False

    def verify(self, fields: list[bytes]) -> str:
        """Return "" if the credentials are right, else why not; Unverified."""
        method, service, user, password, client = fields[:5]
        if method not in self.methods or (method != b"username" and service not in self.services):
            return f"method {escape_bytes(method)} is not in the configuration"
        if method == b"username":
            return verify_username(self.config.passwordfile, user, password)
        if method not in (b"pam.username", b"pam.address", b"pam.any"):
            return f"method {escape_bytes(method)} cannot be verified on this system"
        try:
            return verify_pam(service.decode("latin-1"), user, password, client.decode("latin-1"))
        except (ImportError, OSError, ValueError) as error:
            raise Unverified(f"PAM cannot be asked: {error}") from None

    def accept(self, question: Question) -> bool:
        """Accept a token of GSS-API; in a child, which first takes the key table and gives its power up."""
        number, token = question.fields
        try:
            settings = {str(rule.number).encode(): rule.gssapi for rule in self.config.client_rules}[number]
            keytab = copy_keytab(settings.keytab)
            become_reader(self.reader)
            found = accept_context(settings.servicename, keytab, token)
            if not 0 < len(found[1]) <= NAME_MAX:
                raise GssError(f"the client's name has {describe_count(len(found[1]), 'byte')}")
            question.reply([b"", *found])
        except (KeyError, OSError, GssError) as error:
            question.reply([str(error).encode("utf-8", "replace")[:255]])
        return True

    def begin_context(self, service: UpstreamService) -> tuple[Initiation, bytes]:
        """Begin a context, and give all power up; return it and the token for the upstream.

        GssError, OSError.  What the KDC says is read with power where the route names no key table, and
        only there: the cache with our tickets is in reach of user.privileged alone.
        """
        if not service.keytab:
            initiation = Initiation(service)
            token = initiation.begin()
            become_reader(self.reader)
            return initiation, token
        keytab = copy_keytab(service.keytab)
        become_reader(self.reader)
        initiation = Initiation(service._replace(keytab=keytab))
        return initiation, initiation.begin()

    def initiate(self, question: Question) -> bool:
        """Establish a context of GSS-API with an upstream; in a child."""
        try:
            service = UpstreamService(*(field.decode(WIRE_TEXT) for field in question.fields))
            initiation, token = self.begin_context(service)
            question.reply([b"", initiation.finish(question.consult([b"", token]))])
        except (SockdError, OSError) as error:
            question.reply([str(error).encode("utf-8", "replace")[:255]])
        return True

    def wrap(self, question: Question) -> bool:
        """Say whether libwrap lets a connection pass; in a child, as user.libwrap, and for good.

        The line of a rule is looked up here: no worker can have a command of its own run.
        """
        try:
            with socket.socket(fileno=question.passed[0]) as connection:
                if connection.family not in AF_INET_FAMILY:
                    raise OSError(errno.EINVAL, "not a connection of the network")
                become_commander(self.commander)
                allow_twist()
                question.reply([self.find_libwrap_fault(question.fields, connection.fileno())])
        except (OSError, KeyError) as error:
            question.reply([f"libwrap cannot be asked: {error}".encode("utf-8", "replace")[:255]])
        return True

    def find_libwrap_fault(self, fields: list[bytes], connection: int) -> bytes:
        """Return b"" if libwrap lets a connection pass, else why not; KeyError, OSError."""
        config, daemon = self.config, self.daemon.encode(WIRE_TEXT, "replace")
        if fields == [b"hosts_access", b"0"] and config.libwrap_hosts_access:
            allow, deny = config.libwrap_allow.encode(WIRE_TEXT), config.libwrap_deny.encode(WIRE_TEXT)
            return b"" if hosts_access(daemon, connection, allow, deny) else b"denied by hosts_access(3)"
        lines = {f"{rule.kind} {rule.number}".encode(): rule.libwrap or "" for rule in libwrap_rules(config)}
        line = lines[b" ".join(fields)].encode(WIRE_TEXT)
        return b"" if obey_libwrap(daemon, connection, line) else b"failed libwrap line: " + line[:200]

    def set_option(self, question: Question) -> None:
        """Set a socket option of the configuration, and no other, on a worker's socket."""
        try:
            connection = socket.socket(fileno=question.passed[0])
        except OSError:
            os.close(question.passed[0])
            question.reply([b"not a socket"])
            return
        try:
            with connection:
                option = self.options[int(question.fields[0] or b"0")]
                if connection.family not in AF_INET_FAMILY or not LEVEL_FITS[option.level_name](connection):
                    raise OSError(errno.EINVAL, "not a socket that the option is for")
                set_option(connection, option)
            question.reply([b""])
        except OSError as error:
            question.reply([(error.strerror or str(error)).encode("utf-8", "replace")[:255]])
        except IndexError:
            question.reply([b"no such option"])

    def bind(self, question: Question) -> None:
        """Answer with a socket on an external address and a privileged port (compatibility: sameport)."""
        kinds = {b"tcp": socket.SOCK_STREAM, b"udp": socket.SOCK_DGRAM}
        try:
            kind, address, port = question.fields
            (endpoint,) = decode_endpoints([address])
            self.check_may_bind(endpoint)
            with socket.socket(FAMILY_OF[endpoint.family], kinds[kind]) as bound:
                bound.bind(socket_address(endpoint._replace(port=int(port))))
                question.reply([b""], [bound.fileno()])
        except (SockdError, OSError, KeyError, ValueError, OverflowError) as error:
            question.reply([str(error).encode("utf-8", "replace")[:255]])

    def check_may_bind(self, endpoint: Endpoint) -> None:
        """Refused unless the configuration lets sessions leave by this address on privileged ports."""
        hosts = {external.endpoint.host for external in self.config.external if external.endpoint is not None}
        for external in self.config.external:
            if external.endpoint is None:
                hosts.update(e.host for e in interface_addresses().get(external.text, ()))
        allowed = endpoint.host in hosts or not hosts.isdisjoint(IP_ANY)
        if "sameport" not in self.config.compatibility or not allowed:
            raise Refused("not an external address, or compatibility: sameport is not set")


# ============================== 19. Mother ==============================
# The process with the power: binds, opens logs, forks the others, acts on signals.  It has one
# thread and never reads a byte of a client.

DEFAULT_CONFIG, DEFAULT_PIDFILE = "/etc/sockd.conf", "/var/run/sockd.pid"
# As Debian's danted: so started, by a link of that name, we take its place in scripts that give no option.
DANTED_CONFIG, DANTED_PIDFILE = "/etc/danted.conf", "/var/run/danted.pid"
DEBUG_EVENTS = frozenset({"connect", "disconnect", "error", "ioop"})
PIDFILE_MODE = 0o644  # As Dante.
MOST_CONFIG_BYTES = 64 << 20
CONFIG_SECONDS = 10.0  # for who writes a configuration into a pipe
FALLBACK_USER = "nobody"  # where root starts us and user.unprivileged is not set
RESPAWN_SECONDS = 1.0  # at least this long between two forks of a child that keeps dying
CHILDREN_STOP_SECONDS = 0.9  # for children that do not end by themselves
REAP_PAUSE_SECONDS = 0.001
KILLED_SECONDS = 1.0  # no longer is a killed child waited for: the kernel may have a reason to keep it
HANDOVER_SECONDS = 5.0  # a worker that has not let go of the listeners by then obeys nobody


class Options(NamedTuple):
    """The command line."""

    config_file: str = DEFAULT_CONFIG
    pidfile: str = ""  # "": the default, and no complaint if it cannot be written
    daemon: bool = False
    servers: int = 0  # -N; 0: not given
    debug: int | None = None
    keepalive: bool = True
    chroot: str = ""
    add_user: str = ""
    program: str = "sockd"


def default_files(program: str) -> tuple[str, str]:
    """Return the configuration file and the pid file that go with the name that we were started by."""
    return (DANTED_CONFIG, DANTED_PIDFILE) if program == "danted" else (DEFAULT_CONFIG, DEFAULT_PIDFILE)


def find_log_faults(config: Config) -> tuple[Complaint, ...]:
    """Return the complaint that there are more log targets than the mother can pass on in a reload."""
    names = [*config.logoutput, *config.errorlog]
    # Order.LOGS has them behind a head of two bytes, each with its length, and an empty one in between.
    excess = 4 + sum(2 + len(name) for name in names) - MAX_MESSAGE_BYTES
    if len(names) > MOST_LOG_TARGETS:
        text = f"logoutput and errorlog name {len(names)} targets: at most {MOST_LOG_TARGETS} can be had"
    elif excess > 0:
        text = f"the names in logoutput and errorlog are {excess} bytes too long"
    else:
        return ()
    return (Complaint("error", text),)


def find_unusable_externals(config: Config) -> tuple[Complaint, ...]:
    """Complain of each external address that is not one of this machine's."""
    complaints = []
    for external in config.external:
        try:
            # A wildcard is usable where its family is missing, too: there is then no route for it.
            if external.endpoint is not None and external.endpoint.host not in IP_ANY:
                check_bindable(external.endpoint)
        except OSError as error:
            text = f'cannot use external address "{external.text}": {error.strerror}'
            complaints.append(
                Complaint("error", text, external.position, hint="it must be an address of this machine")
            )
    return tuple(complaints)


def find_place(config: Config, keyword: str) -> Position | None:
    """Return where the only statement of a keyword stands, or None."""
    places = [position for name, position in config.uses if name == keyword]
    return places[0] if len(places) == 1 else None


def find_missing(options: Options, config: Config) -> tuple[Complaint, ...]:
    """Warn of what a start needs that is not here yet: addresses to listen on, folders, the password file.

    Unlike Dante: its -V keeps silent.  No error, as the file may be meant for another machine or time.
    """
    faults = []
    for endpoint in config.internal:
        try:
            if endpoint.host not in IP_ANY:
                check_bindable(endpoint._replace(port=0))
        except OSError as error:
            faults.append(("internal", f"cannot listen on {endpoint}: {error.strerror}"))
    root = options.chroot or config.chroot
    if root and not os.path.isdir(root):
        faults.append(
            ("" if options.chroot else "chroot", f'cannot chroot to "{root}": there is no such directory')
        )
    if config.passwordfile and not os.path.exists(config.passwordfile):
        faults.append(("passwordfile", f'there is no password file "{config.passwordfile}" yet'))
    for keyword, names in (("logoutput", config.logoutput), ("errorlog", config.errorlog)):
        for name in names:
            folder = os.path.dirname(name) if name.startswith("/") else ""
            if folder and not os.path.isdir(decode_path(folder)):
                faults.append((keyword, f'cannot open logfile "{name}": there is no directory {folder}'))
    return tuple(Complaint("warning", text, find_place(config, keyword)) for keyword, text in faults)


def needs_warden(config: Config) -> bool:
    """Tell whether workers may have to ask for power: there is no process with privileges without need."""
    rules = (*config.client_rules, *config.socks_rules)
    methods = {method for rule in rules for method in rule_methods(rule)}
    return (
        not methods <= {"none", "rfc931"}
        or "sameport" in config.compatibility
        or config.libwrap_hosts_access
        or any(rule.libwrap is not None for rule in rules)
        or any(needs_power(option) for option in list_options(config))
        or bool(list_services(config))
    )


def find_powers(config: Config) -> int:
    """Return the capabilities of a warden that is not root.

    They are to read the shadow file and PAM's, to bind privileged ports, and where it is asked for to set
    socket options.
    """
    powers = 1 << CAP_DAC_READ_SEARCH | 1 << CAP_NET_BIND_SERVICE
    if any(needs_power(option) for option in list_options(config)):
        powers |= 1 << CAP_NET_ADMIN
    return powers


def find_missing_libraries(config: Config) -> tuple[Complaint, ...]:
    """Complain of each method that needs what this system does not have."""
    methods = {
        method for rule in (*config.client_rules, *config.socks_rules) for method in rule_methods(rule)
    }
    if not any(method.startswith("pam.") for method in methods):
        return ()
    try:
        load_pam()
    except (ImportError, OSError) as error:
        text = f"the pam methods need the system's libpam and the Python package python-pam: {error}"
        return (Complaint("error", text),)
    return ()


def find_gssapi_faults(config: Config) -> tuple[Complaint, ...]:
    """Complain of a GSS-API library that is missing."""
    try:
        if needs_gssapi(config):
            load_gssapi()
    except (OSError, AttributeError) as error:
        text = f"method gssapi needs MIT Kerberos's {GSSAPI_LIBRARY}: {error}"
        return (Complaint("error", text),)
    return ()


def find_libwrap_faults(config: Config) -> tuple[Complaint, ...]:
    """Complain of a libwrap that is missing, or of each line that it cannot carry out."""
    if not needs_libwrap(config):
        return ()
    try:
        load_libwrap()
        lines = {str(rule.libwrap).encode(WIRE_TEXT) for rule in libwrap_rules(config)}
        good = {line for line in lines if is_said_in_child(functools.partial(check_libwrap, line))}
        bad = [rule for rule in libwrap_rules(config) if str(rule.libwrap).encode(WIRE_TEXT) not in good]
    except OSError as error:
        text = f"the libwrap keywords need the system's libwrap ({LIBWRAP}) and /proc: {error}"
        return (Complaint("error", text),)
    return tuple(
        Complaint(
            "error", f'libwrap cannot carry out "{rule.libwrap}"', rule.position, hint="see hosts_options(5)"
        )
        for rule in bad
    )


def read_credentials(path: str) -> Credentials:
    """Return the "user:password" in the first line of a file; ConfigError if it cannot be used.

    A file that others may read or write is refused: it holds a password in the clear.
    """
    try:
        descriptor = os.open(path.encode(WIRE_TEXT), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
                raise ConfigError("it must be a file that only its owner can read: chmod 600")
            if status.st_uid not in (0, os.geteuid()):
                raise ConfigError("it must belong to root, or to the user who starts the server")
            line = file.read(MAX_MESSAGE_BYTES).partition(b"\n")[0].removesuffix(b"\r")
    except OSError as error:
        raise ConfigError(error.strerror) from None
    user, colon, password = line.partition(b":")
    if not (colon and user) or max(len(user), len(password)) > NAME_MAX or 0 in line:
        raise ConfigError(f"its first line must be user:password, each of at most {NAME_MAX} bytes")
    return Credentials(user.decode(WIRE_TEXT), password)


def load_credentials(route: Route) -> Route:
    """Return a route with what its credentials files hold; ConfigError."""
    hops = []
    for hop in route.hops:
        if hop.credentials_file:
            try:
                hop = hop._replace(credentials=read_credentials(hop.credentials_file))
            except ConfigError as error:
                raise ConfigError(
                    f'cannot use the credentials in "{hop.credentials_file}": {error}'
                ) from None
        hops.append(hop)
    return route._replace(hops=tuple(hops))


def load_all_credentials(config: Config) -> tuple[Config, tuple[Complaint, ...]]:
    """Return a configuration with the credentials of its routes, and what was wrong with them."""
    routes, complaints = [], []
    for route in config.routes:
        try:
            routes.append(load_credentials(route))
        except ConfigError as error:
            complaints.append(Complaint("error", str(error), route.position))
    return config._replace(routes=tuple(routes)), tuple(complaints)


def log_everything(config: Config) -> Config:
    """Return a configuration whose rules all log.  As Dante: that is what a debug level above 0 does."""
    return config._replace(
        client_rules=tuple(rule._replace(log=rule.log | DEBUG_EVENTS) for rule in config.client_rules),
        socks_rules=tuple(rule._replace(log=rule.log | DEBUG_EVENTS) for rule in config.socks_rules),
    )


def wait_for_writer(descriptor: int, deadline: float) -> None:
    """Wait until there is more to read from a pipe; OSError if that takes too long."""
    try:
        wait_for(descriptor, select.POLLIN, deadline)
    except DeadlinePassed:
        text = f"its end has not come within {CONFIG_SECONDS:.0f} seconds"
        raise OSError(errno.ETIMEDOUT, text) from None


def read_config_file(path: str) -> bytes:
    """Return what is in a configuration file, or comes through a pipe in time; OSError.

    A server that reads it again must not hang, nor fill its memory, whatever there is by that name.
    """
    data = bytearray()
    deadline = time.monotonic() + CONFIG_SECONDS
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(descriptor, "rb", buffering=0) as file:
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            raise OSError(errno.EINVAL, "it is a device")
        while len(data) <= MOST_CONFIG_BYTES:
            piece = file.read(READ_BYTES)
            if piece is None:
                wait_for_writer(descriptor, deadline)
                continue
            data += piece
            if not piece:
                return bytes(data)
    raise OSError(errno.EFBIG, f"it has more than {MOST_CONFIG_BYTES} bytes")


def read_config(options: Options) -> tuple[Config | None, tuple[Complaint, ...]]:
    """Parse the configuration file and check what needs this machine; opens no port."""
    path = options.config_file
    try:
        # Names of users and hosts are bytes of no known encoding: latin-1 keeps them (see WIRE_TEXT).
        text = read_config_file(path).decode("latin-1")
    except OSError as error:
        return None, (Complaint("error", f"could not open config file {path}: {error.strerror}"),)
    config, complaints = parse_config(text, path, SystemSurroundings())
    if config is None:
        return None, complaints
    config = config._replace(chroot=decode_path(config.chroot), passwordfile=decode_path(config.passwordfile))
    if config.debug if options.debug is None else options.debug:
        config = log_everything(config)
    config, faults = load_all_credentials(config)
    more = (*faults, *find_unsupported(config), *find_unusable_externals(config), *find_log_faults(config))
    more += (*find_missing_libraries(config), *find_libwrap_faults(config), *find_gssapi_faults(config))
    return (None if more else config), (*complaints, *more)


def has_ended(pid: str) -> bool:
    """Tell whether there is no process of that number; False where it is none."""
    try:
        os.kill(int(pid), 0)  # not by /proc, which may hide those of others (hidepid)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        pass
    return False


class Pidfile:
    """The pid file: locked while the server runs, emptied at its end as danted does.

    And removed if it can be.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = -1

    def acquire(self) -> None:
        """Open and lock the file; OSError if that cannot be done, ConfigError if another server holds it."""
        how = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self.path, how, PIDFILE_MODE)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")  # /dev/null would be removed in the end
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)  # an older server's pid is not to be taken for that of who starts now
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            if not has_ended(pid):
                raise ConfigError(f"already running as process {pid} (pid file {self.path})") from None
            os.unlink(self.path)  # whoever may read a file can lock it: it is no server that does
            self.acquire()
            return
        except OSError:
            os.close(descriptor)
            raise
        self.descriptor = descriptor

    def write(self) -> None:
        """Write our pid."""
        if self.descriptor >= 0:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, f"{os.getpid()}\n".encode("ascii"), 0)

    def release(self) -> None:
        """Empty the file, and remove it if it still is at its place."""
        if self.descriptor < 0:
            return
        try:
            os.ftruncate(self.descriptor, 0)
            if os.path.samestat(os.lstat(self.path), os.fstat(self.descriptor)):
                os.unlink(self.path)
        except OSError:
            pass  # the directory is not ours to write in
        os.close(self.descriptor)
        self.descriptor = -1


class Generation:
    """A configuration at work, with what those who obey it share.  Owned by the mother.

    Workers ask the warden of their own generation, so that the number of a rule or an option means to both
    the same.  A reload adds a generation; the warden of an older one ends with the last session that
    may ask it.  The resolver's answers do not depend on the configuration: there is one for all.
    """

    def __init__(self, number: int, config: Config, accounts: Accounts, places: int) -> None:
        """Make what is shared by as many workers; OSError."""
        self.number = number  # counts reloads
        self.config = config
        self.accounts = accounts
        self.counts = make_counts(config, places)
        try:
            self.warden_inbox = make_inbox()
        except OSError:
            self.close_lock()
            raise

    def close_lock(self) -> None:
        """Close what only its workers need, who have theirs."""
        if self.counts is not None:
            self.counts.lock.close()

    def close_inbox(self) -> None:
        """Close both ends of what its workers ask by."""
        close_inbox(self.warden_inbox)


class Child(NamedTuple):
    """A child as the mother knows it."""

    kind: str  # worker, resolver or warden
    control: socket.socket
    number: int  # workers: 1 to their count
    generation: Generation
    born: float = 0.0
    is_relieved: bool = False  # a worker whose successor has been forked (sockd.conf(5), child)
    said: frozenset[bytes] = frozenset()  # by a worker


class Handover(NamedTuple):
    """A reload under way: it ends when all old workers have let go of the listeners."""

    waiting: set[int]  # their pids
    deadline: float


def ignore_signal(number: int, frame: object) -> None:
    """Do nothing: the wake-up descriptor has already told the loop."""


def interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt, but once: the executable has Ctrl-C from the terminal and from its parent."""
    signal.signal(number, ignore_signal)
    raise KeyboardInterrupt


def ignore_interrupts() -> None:
    """Let no second one end us on our way out, when Python's own handlers have gone already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def expect_interrupt() -> None:
    """Let Ctrl-C interrupt what comes before the server runs, unless the caller has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def describe_status(status: int) -> str:
    """Return how a child ended, behind "exited unexpectedly"."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {known.value: known.name for known in signal.Signals}  # but for most real-time signals
        return f" on signal {names.get(number, number)}"
    return f" with status {os.waitstatus_to_exitcode(status)}"


def list_ended() -> Iterator[tuple[int, int]]:
    """Yield pid and status of each child that has ended since the last time (waitpid(2))."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if not is_traced(pid, status):
            yield pid, status


def has_no_new_privileges(pid: int) -> bool:
    """Tell whether a process can gain no privileges any more (proc(5)); OSError if it is gone."""
    with open(f"/proc/{pid}/status", "rb") as file:
        return b"\nNoNewPrivs:\t1\n" in file.read()


def list_children() -> list[int]:
    """Return the processes whose parent this one is, zombies as well; OSError without proc(5)."""
    pid = os.getpid()
    with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
        return [int(child) for child in file.read().split()]


def find_strays(known: Container[int]) -> list[int]:
    """Return our children that we have not forked and that a worker has: no worker of ours does.

    The commands of libwrap come to us in the same way (PR_SET_CHILD_SUBREAPER), but may gain privileges yet.
    Where that is forbidden to all of us, whoever has done so sees to strays: a service manager, a container.
    """
    try:
        if has_no_new_privileges(os.getpid()):
            return []
        return [pid for pid in list_children() if pid not in known and has_no_new_privileges(pid)]
    except OSError:
        return []


def raise_descriptor_limit(log: Log) -> None:
    """Raise the soft limit of open files to the hard one, as Dante does.

    Nothing here ever walks over all possible descriptors, so a limit of a billion (containers) costs nothing.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.write("warning", f"could not raise the limit of {soft} open files: {error}")


def prefer_throughput() -> None:
    """Ask the scheduler not to interrupt a running thread for each one that wakes up (SCHED_BATCH).

    With many busy sessions that is worth as much as a second CPU; a single one is as quick as before.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        pass  # a container may forbid it: the server is then only slower


# The processes that do the work of Dante's (sockd.conf(5), cpu).  What its monitor process does is the
# mother's work, and what its negotiate, request and io processes do for a client is a worker's: so there
# "negotiate" and "request" are about those who help with it.
KIND_OF_PROCESS = {"mother": "mother", "negotiate": "warden", "request": "resolver", "io": "worker"}
POLICY_NUMBERS = {
    "other": os.SCHED_OTHER,
    "fifo": os.SCHED_FIFO,
    "rr": os.SCHED_RR,
    "batch": os.SCHED_BATCH,
    "idle": os.SCHED_IDLE,
}


def keep_to_one_cpu(turn: int) -> None:
    """Let this process run on one of the CPUs that it may run on, the one whose turn it is.

    The threads of a worker take turns anyway, as the interpreter has one lock.  On several CPUs each that
    wakes up disturbs the one that runs: measured with 64 busy sessions, 1.5 futex(2) calls a message against
    none, and half the round trips or less.
    """
    cpus = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, {cpus[turn % len(cpus)]})
    except OSError:
        pass  # a sandbox may forbid it: the server is then only slower


def find_mask(config: Config, kind: str) -> tuple[int, ...] | None:
    """Return the CPUs that a kind of process is to run on; () for any, None where nothing is said."""
    masks = [cpus for process, cpus in config.cpu_masks if KIND_OF_PROCESS.get(process) == kind]
    return masks[-1] if masks else None


class CpuUse(NamedTuple):
    """Where and how a process runs."""

    cpus: frozenset[int]
    policy: int
    priority: int


def read_cpu_use() -> CpuUse:
    """Return where and how this process runs."""
    cpus = frozenset(os.sched_getaffinity(0))
    try:
        return CpuUse(cpus, os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)
    except OSError:
        return CpuUse(cpus, os.SCHED_OTHER, 0)  # musl has no more than the names of these calls


def find_cpu_use(config: Config, kind: str, at_start: CpuUse) -> CpuUse:
    """Return where and how a kind of process is to run."""
    found = [
        (POLICY_NUMBERS[policy], priority)
        for process, policy, priority in config.cpu_schedules
        if KIND_OF_PROCESS.get(process) == kind
    ]
    usual = (os.SCHED_BATCH, 0) if kind == "worker" else (at_start.policy, at_start.priority)
    cpus = frozenset(find_mask(config, kind) or at_start.cpus)
    return CpuUse(cpus, *(found[-1] if found else usual))


def obey_cpu_settings(config: Config, kind: str, at_start: CpuUse, log: Log) -> None:
    """Put this process on its CPUs and under its policy (sockd.conf(5), cpu); a fault is a warning.

    Whatever is not configured is set too: a child begins with what the mother has, and the mother with what
    an older configuration has given her.
    """
    if kind == "worker" and not (config.cpu_masks or config.cpu_schedules):
        return  # a machine may refuse what is usual for workers, see prefer_throughput
    wanted, present = find_cpu_use(config, kind, at_start), read_cpu_use()
    try:
        if wanted.cpus != present.cpus:
            os.sched_setaffinity(0, wanted.cpus)
        if wanted[1:] != present[1:]:
            os.sched_setscheduler(0, wanted.policy, os.sched_param(wanted.priority))
    except OSError as error:
        log.write("warning", f"could not set cpu.schedule or cpu.mask of the {kind}: {error.strerror}")


def forget_annotations() -> None:
    """Let go of what typing has made of the fields of records, 160 KB that nobody asks for."""
    for record in globals().values():
        if isinstance(record, type) and hasattr(record, "_fields"):
            record.__annotations__.clear()


def forget_start_pages() -> None:
    """Let go of the pages of programs and libraries that the start has read; what is used again comes back.

    They are a tenth of what the server holds, and all in the mother, who does not need them again.
    """
    madvise = getattr(load_library(""), "madvise", None)
    if madvise is None:
        return
    first = end = 0
    try:
        with open("/proc/self/smaps", "rb") as file:
            for line in file:
                words = line.split()
                if b"-" in words[0]:
                    # Only files that cannot be written, or code would go that the linker has completed.
                    is_file = len(words) > 5 and words[1] in (b"r-xp", b"r--p") and words[5].startswith(b"/")
                    first, end = (int(number, 16) for number in words[0].split(b"-")) if is_file else (0, 0)
                elif words[:2] == [b"Anonymous:", b"0"] and first:
                    madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_DONTNEED)
    except OSError:
        pass  # a jail without /proc


def daemonize() -> int:
    """Go on in a child without a terminal; return the descriptor on which the caller waits for one byte.

    As Dante: one fork, no change of directory, umask 022, standard descriptors on /dev/null.
    Unlike Dante: the caller's shell goes on when clients are served and the pid file is written.
    """
    waiting, ready = os.pipe()
    if os.fork():
        os.close(ready)
        os._exit(0 if os.read(waiting, 1) else 1)
    os.close(waiting)
    os.setsid()
    os.umask(0o022)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    return ready


# ---- what systemd, or another that speaks as it does, gives to a service and wants to hear of it

FIRST_PASSED_DESCRIPTOR = 3  # sd_listen_fds(3)
NOTIFY_SECONDS = 1.0  # a manager that does not read is told nothing
MOST_PASSED = 1024


def read_number(environment: MutableMapping[str, str], name: str) -> int:
    """Return the number in a variable; 0 where it is missing or is none."""
    text = environment.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 20 else 0


class Manager:
    """Tells the service manager how the server is (sd_notify(3)); silent where there is none.

    Takes its variables out of the environment, so that no other program takes them for its own.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self.address = environment.pop("NOTIFY_SOCKET", "")
        period = read_number(environment, "WATCHDOG_USEC") / 1e6
        watched = read_number(environment, "WATCHDOG_PID")
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)
        # The manager of the executable knows the boot process.
        pids = (0, os.getpid(), os.getppid() if is_executable() else 0)
        self.watchdog_seconds = period / 2 if self.address and watched in pids else 0.0
        self.next_sign = time.monotonic() if self.watchdog_seconds else NO_DEADLINE

    def tell(self, *lines: str) -> None:
        """Send one message; nothing depends on whether it arrives."""
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            # A socket of its own for each: no child inherits one that speaks for the mother.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
                notifier.settimeout(NOTIFY_SECONDS)
                notifier.sendto("\n".join(lines).encode("utf-8", "replace"), os.fsencode(address))
        except OSError:
            pass

    def sign_of_life(self) -> None:
        """Tell the watchdog, in time, that the mother's loop turns."""
        now = time.monotonic()
        if now >= self.next_sign:
            self.next_sign = now + self.watchdog_seconds
            self.tell("WATCHDOG=1")


def describe_unfit(passed: socket.socket, endpoint: Endpoint | None) -> str:
    """Return why a socket cannot be a listener of ours; "" if it can."""
    if endpoint is None or passed.type != socket.SOCK_STREAM:
        return "not a TCP socket"
    if not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "not listening"
    if endpoint.family == 6 and not passed.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return "it takes IPv4 as well (BindIPv6Only=ipv6-only prevents that)"
    return ""


def find_configured(endpoint: Endpoint, internal: Iterable[Endpoint]) -> Endpoint | None:
    """Return the internal address that a passed socket is for, or None: port 0 there fits any port."""
    for port in (endpoint.port, 0):
        if endpoint._replace(port=port) in internal:
            return endpoint._replace(port=port)
    return None


def count_passed(environment: MutableMapping[str, str]) -> int:
    """Return how many descriptors the service manager has passed to us (sd_listen_fds(3))."""
    if read_number(environment, "LISTEN_PID") != os.getpid():
        return 0
    return min(read_number(environment, "LISTEN_FDS"), MOST_PASSED)


def open_passed_sockets(
    environment: MutableMapping[str, str], log: Log
) -> Iterator[tuple[str, socket.socket]]:
    """Yield (name, socket) for each that the service manager has passed to us (sd_listen_fds(3))."""
    count = count_passed(environment)
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    for name in ("LISTEN_FDS", "LISTEN_PID"):
        environment.pop(name, None)
    for index in range(count):
        descriptor = FIRST_PASSED_DESCRIPTOR + index
        try:
            passed = socket.socket(fileno=descriptor)
        except OSError as error:
            log.write("warning", f"passed descriptor {descriptor} is not used: {error.strerror}")
            continue
        passed.set_inheritable(False)
        yield (names[index] if index < len(names) else ""), passed


def take_passed_sockets(
    environment: MutableMapping[str, str], config: Config, log: Log
) -> dict[Endpoint, socket.socket]:
    """Return passed sockets that fit internal addresses, by these; warn of the others and close them."""
    taken: dict[Endpoint, socket.socket] = {}
    for name, passed in open_passed_sockets(environment, log):
        is_network = passed.family in AF_INET_FAMILY
        endpoint = endpoint_of(passed.getsockname()) if is_network else None
        fault = describe_unfit(passed, endpoint)
        key = find_configured(endpoint, config.internal) if endpoint is not None else None
        if not fault and key is not None and key not in taken:
            taken[key] = passed
            continue
        who = " ".join(filter(None, [escape_text(name), str(endpoint) if endpoint is not None else ""]))
        log.write("warning", f"passed socket {who} is not used: {fault or 'no internal address fits it'}")
        passed.close()
    return taken


# ---- the mother


Listeners = dict[Endpoint, socket.socket]


def find_others(listeners: Listeners, kept: Listeners) -> list[socket.socket]:
    """Return the listeners that are not among others."""
    return [listener for endpoint, listener in listeners.items() if kept.get(endpoint) is not listener]


def close_others(listeners: Listeners, kept: Listeners) -> None:
    """Close the listeners that are not among others."""
    for listener in find_others(listeners, kept):
        listener.close()


class Mother:
    """Owns listeners, children, pid file and signals; lives in the main thread of the first process."""

    def __init__(self, options: Options, config: Config) -> None:
        self.options = options
        self.config = config
        self.log = Log(options.program)
        self.listeners: dict[Endpoint, socket.socket] = {}  # by the address as configured
        # What the listeners had before an option was set: (listener, level, number) of setsockopt(2).
        self.usual: dict[tuple[socket.socket, int, int], bytes] = {}
        self.children: dict[int, Child] = {}
        self.generations: list[Generation] = []  # whose workers may ask a warden, and the newest at the end
        self.handover: Handover | None = None
        self.has_hup_waited = False  # SIGHUP has come again before the last one was through
        self.watches: list[Watch] = []  # the alarms of the newest generation
        self.pidfile = Pidfile(options.pidfile or default_files(options.program)[1])
        self.resolver_inbox = (socket.socket(), socket.socket())
        self.wakeup = (-1, -1)
        self.caller = -1  # where -D's caller waits until clients are served
        self.manager = Manager(os.environ)
        self.ending = False
        self.last_spawn = 0.0
        # (when, generation, kind, number): children to fork again
        self.due: list[tuple[float, Generation, str, int]] = []
        self.next_log_check = 0.0
        self.leaving: list[int] = []  # in a reload: descriptors of the old generation that no child may have
        self.suspects: set[int] = set()  # older workers that were there when a listener was shut down
        self.tired: set[int] = set()  # workers to be replaced (sockd.conf(5), child)
        self.cpu_at_start = read_cpu_use()
        # Where the first worker runs: several servers with a worker each are not to meet on one CPU.
        self.first_cpu = os.urandom(1)[0]

    # --- start ---

    def start(self) -> None:
        """Bind, open, fork: all that can fail does so before -D lets the caller go; ConfigError, OSError."""
        self.log.open(self.config.logoutput, self.config.errorlog)
        accounts = self.find_accounts(self.config)
        raise_descriptor_limit(self.log)
        self.resolver_inbox = make_inbox()
        self.generations = [Generation(0, self.config, accounts, self.count_places(self.config))]
        self.listeners = self.bind_listeners(
            self.config, take_passed_sockets(os.environ, self.config, self.log)
        )
        self.take_pidfile()
        preload()
        preload_for_helpers()
        forget_unpacked_files()
        self.warn_of_lost_log()
        self.caller = daemonize() if self.options.daemon else -1
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # for end_strays
        self.log.take_over()
        self.write_pid()
        self.catch_signals()
        self.announce_listeners(self.listeners)
        self.spawn_children()
        if self.due:
            raise ConfigError("cannot start the processes that serve (see the log)")
        self.tell_ready()
        self.release_caller()

    def warn_of_lost_log(self) -> None:
        """Tell who starts a daemon that its log goes nowhere.  Unlike Dante, which says nothing."""
        names = {*self.config.logoutput}
        if self.options.daemon and names and names <= {"stdout", "stderr"}:
            text = f"-D: logoutput names only {' and '.join(sorted(names))}, which goes nowhere from now on"
            self.log.write("warning", f"{text}: name syslog or a file")

    def release_caller(self) -> None:
        """Let the caller of -D go on."""
        if self.caller >= 0:
            os.write(self.caller, b".")
            os.close(self.caller)
            self.caller = -1

    def tell_ready(self) -> None:
        """Tell the service manager that clients are served."""
        # The boot process of the executable stays the main one: the manager is its parent, not ours.
        ourselves = [f"MAINPID={os.getpid()}"] if self.options.daemon else []
        listeners = describe_count(len(self.listeners), "listener")
        workers = describe_count(self.count_workers(self.config), "worker")
        self.manager.tell("READY=1", *ourselves, f"STATUS=serving: {listeners}, {workers}")

    def find_accounts(self, config: Config) -> Accounts:
        """Return the accounts to run as; ConfigError where one of them or the jail cannot be had."""
        check_jail(self.options.chroot or config.chroot)
        if os.geteuid() != 0:
            return None, None, None
        privileged = find_account(config.user_privileged) if config.user_privileged else None
        if config.user_unprivileged:
            unprivileged = find_account(config.user_unprivileged)
            if unprivileged.uid == 0:
                self.log.write(
                    "warning", "setting the unprivileged uid to 0 is not recommended for security reasons"
                )
        else:
            # Unlike Dante, which then serves its clients as root.
            unprivileged = find_account(FALLBACK_USER)
            self.log.write(
                "warning", f'user.unprivileged is not set: serving clients as user "{FALLBACK_USER}"'
            )
        return privileged, unprivileged, self.find_commander(config, privileged, unprivileged)

    def find_commander(
        self, config: Config, privileged: Account | None, unprivileged: Account
    ) -> Account | None:
        """Return the account that libwrap runs as; ConfigError if user.privileged cannot become it."""
        if not needs_libwrap(config):
            return None
        commander = find_account(config.user_libwrap) if config.user_libwrap else unprivileged
        if privileged is not None and privileged.uid not in (0, commander.uid):
            raise ConfigError(f'user.privileged must be root, to run libwrap as user "{commander.name}"')
        if commander.uid == 0:
            self.log.write("warning", "setting the libwrap uid to 0 is not recommended for security reasons")
        return commander

    def bind_listeners(
        self, config: Config, present: dict[Endpoint, socket.socket]
    ) -> dict[Endpoint, socket.socket]:
        """Return the listening sockets of a configuration; ConfigError if one cannot be had.

        A socket that is in both keeps its descriptor and its queue of waiting clients.
        """
        bound: dict[Endpoint, socket.socket] = {}
        try:
            for endpoint in config.internal:
                bound[endpoint] = present.get(endpoint) or listen_on(endpoint)
                prepare_listener(bound[endpoint], self.options.keepalive)
        except OSError as error:
            close_others(bound, present)
            raise ConfigError(
                f"cannot listen on {endpoint}: {error.strerror}"
                + (" (is another server running there?)" if error.errno == errno.EADDRINUSE else "")
            ) from None
        return bound

    def set_listener_options(self) -> None:
        """Set what of internal.* the accepted sockets inherit; a fault is a warning."""
        self.restore_listener_options()
        for listener in self.listeners.values():
            self.remember_options(listener)
            for option, error in set_options(listener, self.config.socket_options, "internal"):
                self.log.write("warning", describe_option_fault(option, str(error.strerror)))

    def remember_options(self, listener: socket.socket) -> None:
        """Keep what a listener has before an option is set on it for the first time."""
        for option in self.config.socket_options:
            if option.side != "internal" or not LEVEL_FITS[option.level_name](listener):
                continue
            level, number = option_key(option)
            numbers = [number]
            if (level, number) in BUFFER_SIZES:
                numbers.insert(0, SO_BUF_LOCK)  # a buffer that has had a size does not grow any more
            for part in numbers:
                try:
                    usual = value_to_restore(listener, level, part)
                except OSError:
                    continue  # it cannot be asked for
                self.usual.setdefault((listener, level, part), usual)

    def restore_listener_options(self) -> None:
        """Take back what an older configuration has set and this one does not; a fault is a warning."""
        self.usual = {key: value for key, value in self.usual.items() if key[0].fileno() >= 0}
        kept = {option_key(o) for o in self.config.socket_options if o.side == "internal" and not o.mask}
        # The last one first: some change others.
        for (listener, level, number), usual in reversed(self.usual.items()):
            if (level, number) in kept:
                continue
            try:
                listener.setsockopt(level, number, usual)
            except OSError as error:
                where = endpoint_of(listener.getsockname())
                self.log.write(
                    "warning",
                    f"could not take back socket option {level}.{number} of {where}: {error.strerror}",
                )

    def take_pidfile(self) -> None:
        try:
            self.pidfile.acquire()
        except OSError as error:
            # As Dante: the server runs on without it.
            if self.options.pidfile or os.geteuid() == 0:
                self.log.write(
                    "warning", f"could not open pidfile {self.pidfile.path} for writing: {error.strerror}"
                )

    def write_pid(self) -> None:
        try:
            self.pidfile.write()
        except OSError as error:
            self.log.write("warning", f"could not write pidfile {self.pidfile.path}: {error.strerror}")

    def announce_listeners(self, listeners: Iterable[Endpoint]) -> None:
        """Log the ports that the system has chosen (internal: ... port = 0)."""
        for endpoint in listeners:
            if endpoint.port == 0:
                listener = self.listeners[endpoint]
                self.log.write("info", f"listening on {endpoint_of(listener.getsockname())}")

    def catch_signals(self) -> None:
        """Let signals wake the loop; that is all that a handler ever does."""
        self.wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wakeup[1], warn_on_full_buffer=False)
        for number in (*self.handlers, signal.SIGCHLD):
            signal.signal(number, ignore_signal)
        signal.signal(signal.SIGALRM, note_alarm)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    # --- children ---

    @property
    def newest(self) -> Generation:
        """The generation that takes clients."""
        return self.generations[-1]

    def count_workers(self, config: Config) -> int:
        """Return the -N of the command line; unlike danted's its default is one for each usable CPU."""
        return self.options.servers or len(find_mask(config, "worker") or self.cpu_at_start.cpus)

    def count_places(self, config: Config) -> int:
        """Return how many workers there may be at a time: with child.*, each has one that relieves it."""
        replaces = config.child_maxrequests or config.child_maxlifetime
        return self.count_workers(config) * (2 if replaces else 1)

    def spawn_children(self) -> None:
        """Fork the children of the newest generation."""
        self.prepare_to_serve()
        gc.collect()
        release_memory()
        forget_start_pages()
        gc.freeze()  # the collector then leaves the pages that all processes share alone
        self.spawn_child(self.newest, "resolver", 0)
        if needs_warden(self.config):
            self.spawn_child(self.newest, "warden", 0)
        for number in range(1, self.count_workers(self.config) + 1):
            self.spawn_child(self.newest, "worker", number)

    def prepare_to_serve(self) -> None:
        """Set what the mother has of the newest configuration herself."""
        self.set_listener_options()
        self.watches = make_watches(self.config, self.newest.counts)
        self.start_watches()
        obey_cpu_settings(self.config, "mother", self.cpu_at_start, self.log)

    def start_watches(self) -> None:
        """Forget the alarms that are raised.  As Dante: without a record, and at each SIGHUP."""
        for watch in self.watches:
            watch.start(time.monotonic())

    def check_alarms(self) -> None:
        """Log which alarms are raised now, and which no longer."""
        for watch in self.watches:
            now = time.monotonic()
            text = watch.check(now) if now >= watch.due else ""
            if text:
                self.log.write("warning", text)

    def mend_logs(self) -> None:
        """Look once a second whether the syslog daemon is gone, and pass a new one on.

        Others find that out as well when they write, but from a jail nobody can reach the new one.
        """
        now = time.monotonic()
        if now < self.next_log_check:
            return
        self.next_log_check = now + SYSLOG_RETRY_SECONDS
        if self.log.mend():
            for child in self.children.values():
                self.order(child, Order.LOGS)

    def spawn_child(self, generation: Generation, kind: str, number: int) -> None:
        """Fork a child of a kind, now or, where the machine has no room for it, later."""
        if not self.fork_child(generation, kind, number):
            self.due.append((self.last_spawn + RESPAWN_SECONDS, generation, kind, number))

    def fork_child(self, generation: Generation, kind: str, number: int) -> bool:
        """Fork a child of a kind, with its generation's configuration; False if that cannot be done now."""
        inherited = [child.control.fileno() for child in self.children.values()]
        inherited += [*self.wakeup, *self.leaving, self.caller, self.pidfile.descriptor]
        inherited += [end.fileno() for g in self.generations if g is not generation for end in g.warden_inbox]
        body = {"worker": self.be_worker, "resolver": self.be_resolver, "warden": self.be_warden}[kind]
        self.last_spawn = time.monotonic()
        try:
            pid, control = spawn(
                lambda control: self.be_child(lambda: body(generation, control, number)),
                [descriptor for descriptor in inherited if descriptor >= 0],
            )
        except OSError as error:
            self.log.write("error", f"cannot start a {kind}: {error.strerror}")
            return False
        self.children[pid] = Child(kind, control, number, generation, self.last_spawn)
        return True

    def be_child(self, body: Callable[[], int]) -> int:
        """Run the body of a child; what it cannot recover from is logged and ends it."""
        self.log.take_over()
        try:
            return body()
        except Exception as error:
            self.log.write("error", f"internal error: {describe_bug(error)}: {error}")
            return 1

    def serving(self, generation: Generation) -> Serving:
        config, counts = generation.config, generation.counts
        resolver, warden = Channel(self.resolver_inbox[1]), Channel(generation.warden_inbox[1])
        upstreams = Upstreams(config, self.log) if config.routes else None
        policy, keepalive = Policy(config), self.options.keepalive
        shares = Shares(max(1, LOOKUP_SHARE // self.count_workers(config)))
        listening = frozenset(endpoint_of(listener.getsockname()) for listener in self.listeners.values())
        return Serving(
            config, policy, self.log, resolver, warden, shares, listening, keepalive, counts, upstreams
        )

    def be_worker(self, generation: Generation, control: socket.socket, number: int) -> int:
        """The life of a worker, in its process."""
        config = generation.config
        self.resolver_inbox[0].close()
        generation.warden_inbox[0].close()
        if generation.counts is not None:
            generation.counts.number = number - 1
        worker = Worker(self.serving(generation), tuple(self.listeners.values()), control)
        if needs_gssapi(config):
            preload_gssapi()
        prefer_throughput()
        obey_cpu_settings(config, "worker", self.cpu_at_start, self.log)
        if find_mask(config, "worker") != ():
            keep_to_one_cpu(self.first_cpu + (number - 1) % self.count_workers(config))
        limit_arenas()
        drop_privileges(generation.accounts[1], self.options.chroot or config.chroot)
        forbid_signals()
        count = self.count_workers(config)
        self.log.write("info", f"sockd/server[{(number - 1) % count + 1}/{count}] v{__version__} running")
        return worker.run()

    def be_resolver(self, generation: Generation, control: socket.socket, _: int) -> int:
        """The life of the resolver, in its process."""
        generation.close_inbox()  # who may read there sees passwords
        for listener in self.listeners.values():
            listener.close()
        threading.stack_size(THREAD_STACK_BYTES)
        obey_cpu_settings(generation.config, "resolver", self.cpu_at_start, self.log)
        drop_privileges(generation.accounts[1], "")
        return run_helper(self.log, self.resolver_inbox[0], control, Resolver())

    def be_warden(self, generation: Generation, control: socket.socket, _: int) -> int:
        """The life of the warden, in its process."""
        config, accounts = generation.config, generation.accounts
        self.resolver_inbox[0].close()
        for listener in self.listeners.values():
            listener.close()
        obey_cpu_settings(config, "warden", self.cpu_at_start, self.log)
        if accounts[0] is not None:
            become_privileged(accounts[0], find_powers(config))
        warden = Warden(config, self.log, accounts, self.log.program)
        return run_helper(self.log, generation.warden_inbox[0], control, warden)

    def order(self, child: Child, order: Order) -> None:
        """Tell a child what to do; one that is gone will be reaped, and so will one that reads no orders."""
        fields, descriptors = self.log.export() if order == Order.LOGS else ([], [])
        try:
            send_descriptors(child.control, encode_message(order, fields), descriptors)
        except BlockingIOError:
            child.control.shutdown(socket.SHUT_RDWR)  # which hear_child will see
        except OSError:
            pass

    # --- the loop ---

    def run(self) -> int:
        """Act on signals and children until the server ends; return the exit status."""
        while not self.ending:
            poller = select.poll()
            poller.register(self.wakeup[0], select.POLLIN)
            by_descriptor = self.list_controls()
            for descriptor in by_descriptor:
                poller.register(descriptor, select.POLLIN)
            self.manager.sign_of_life()
            times = [when for when, _, _, _ in self.due] + [watch.due for watch in self.watches]
            times += [self.next_retirement(), self.handover.deadline if self.handover else NO_DEADLINE]
            times.append(self.next_log_check if self.log.has_syslog() else NO_DEADLINE)
            timeout = min([self.manager.next_sign, *times])
            for descriptor, _ in poller.poll(poll_milliseconds(timeout)):
                if descriptor == self.wakeup[0]:
                    self.act_on_signals()
                else:
                    self.hear_child(by_descriptor[descriptor])
            self.respawn()
            self.relieve_workers()
            self.check_alarms()
            self.retire_generations()
            self.finish_reload()
            self.mend_logs()
        return self.end()

    def list_controls(self) -> dict[int, int]:
        """Return by its descriptor whose each control socket is; one that has been ended has none."""
        controls = {child.control.fileno(): pid for pid, child in self.children.items()}
        controls.pop(-1, None)
        return controls

    def act_on_signals(self) -> None:
        """Do once what each signal that has come asks for, however often it came."""
        numbers = set(os.read(self.wakeup[0], 4096))
        self.reap()
        for number, handler in self.handlers.items():
            if number in numbers:
                handler(self, number)

    def on_end(self, number: int) -> None:
        self.log.write("info", f"sigterm(): exiting on signal {number}")
        self.manager.tell("STOPPING=1", f"STATUS=ending on signal {number}")
        self.ending = True

    def on_hup(self, _: int) -> None:
        """Reload; on any fault keep what is running.  Unlike Dante, which a broken file ends."""
        if self.handover is not None:
            self.has_hup_waited = True
            return
        self.log.write("info", "SIGHUP [: reloading config")
        self.manager.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        complaints: tuple[Complaint, ...] = ()
        try:
            config, complaints = read_config(self.options)
            if config is None:
                raise ConfigError("the running configuration is kept")
            self.handover = self.reload(config)
        except (ConfigError, OSError) as error:
            self.refuse_reload(complaints, (getattr(error, "strerror", "") or str(error)))
        except Exception as error:  # as where an upgrade has taken away what Python imports late
            self.refuse_reload(complaints, f"internal error: {describe_bug(error)}: {error}")
        else:
            self.log_complaints(complaints)

    def refuse_reload(self, complaints: Iterable[Complaint], text: str) -> None:
        """Say why everything stays as it was."""
        self.log_complaints(complaints)
        self.log.write("error", f"SIGHUP ]: config not reloaded: {text}")
        self.manager.tell("READY=1", f"STATUS=config not reloaded: {text}")

    def reload(self, config: Config) -> Handover:
        """Take up a configuration, and return what is to be waited for; ConfigError, OSError.

        As Dante: the sessions of an older configuration do not count under a newer one.
        Unlike Dante: a reload of an unchanged file, say after log rotation, is no new generation.
        """
        accounts = self.find_accounts(config)
        if (config, accounts) == (self.config, self.newest.accounts):
            self.log.keep(self.log.reopen(config, self.config))
            self.start_watches()
            for child in self.children.values():
                self.order(child, Order.LOGS)
            return Handover(set(), 0.0)
        listeners = self.bind_listeners(config, self.listeners)
        try:
            places = self.count_places(config)
            generation = Generation(self.newest.number + 1, config, accounts, places)
            try:
                return self.switch(generation, listeners)
            except BaseException:
                generation.close_lock()
                generation.close_inbox()
                raise
        except BaseException:
            close_others(listeners, self.listeners)
            raise

    def log_complaints(self, complaints: Iterable[Complaint]) -> None:
        """Log what the parser says, one record for each complaint."""
        for complaint in complaints:
            where = f"{complaint.position}: " if complaint.position else ""
            hint = f" ({complaint.hint})" if complaint.hint else ""
            self.log.write(complaint.level, where + complaint.text + hint)

    def switch(self, generation: Generation, listeners: Listeners) -> Handover:
        """Go over to a new generation: its children take the clients, the old ones finish their sessions.

        ConfigError, and then the old ones go on, where its children cannot be had.
        """
        outgoing, old_children, old_listeners = self.newest, dict(self.children), self.listeners
        former = self.log.reopen(generation.config, self.config)
        self.leaving = [listener.fileno() for listener in find_others(old_listeners, listeners)]
        self.leaving += [t.descriptor for t in self.log.list_replaced(former) if t.descriptor > 2]
        if outgoing.counts is not None:
            self.leaving.append(outgoing.counts.lock.descriptor)
        self.generations.append(generation)
        try:
            self.take_up(generation.config, listeners)
        except BaseException:
            self.take_back(generation, old_listeners)
            self.log.restore(former)
            raise
        finally:
            self.leaving = []
        self.log.keep(former)
        outgoing.close_lock()  # its workers have theirs, and none of them is replaced
        close_others(old_listeners, listeners)
        self.announce_listeners(e for e in listeners if e not in old_listeners)
        return self.drain(old_children, outgoing)

    def take_up(self, config: Config, listeners: Listeners) -> None:
        """Fork the children of the newest generation, for these; ConfigError if not all can be had."""
        self.listeners, self.config = listeners, config
        self.spawn_children()
        if any(generation is self.newest for _, generation, _, _ in self.due):
            raise ConfigError("cannot start the processes that serve")

    def take_back(self, generation: Generation, listeners: Listeners) -> None:
        """End what there is of a generation that cannot be had, and go on with the one before.

        Clients that its workers have taken meanwhile are lost.
        """
        self.generations.remove(generation)
        self.due = [due for due in self.due if due[1] is not generation]
        for pid, child in tuple(self.children.items()):
            if child.generation is not generation:
                continue
            if child.kind == "resolver":
                self.order(child, Order.DRAIN)  # it may have a question of an old worker
            else:
                self.end_child(pid)
        self.listeners, self.config = listeners, self.newest.config
        self.prepare_to_serve()

    def drain(self, children: dict[int, Child], outgoing: Generation) -> Handover:
        """Have the children of older generations finish; return what is to be waited for."""
        waiting = set()
        for pid, child in children.items():
            self.order(child, Order.LOGS)
            if child.kind == "worker" and child.generation is outgoing and DRAINED not in child.said:
                waiting.add(pid)
            if child.kind != "warden":  # see retire_generations
                self.order(child, Order.DRAIN)
        return Handover(waiting, time.monotonic() + HANDOVER_SECONDS)

    def finish_reload(self) -> None:
        """End a reload when no old worker can take a client any more; act on a SIGHUP that came meanwhile."""
        if self.handover is None:
            return
        waiting = self.handover.waiting & self.children.keys()
        if waiting and time.monotonic() < self.handover.deadline:
            return
        for pid in waiting:
            self.log.write("error", f"worker {pid} goes on taking clients: ending it")
            self.end_child(pid)
        self.handover = None
        self.log.write("info", "SIGHUP ]: config reloaded.  Broadcasting to children to do the same")
        self.tell_ready()
        if self.has_hup_waited:
            self.has_hup_waited = False
            self.on_hup(signal.SIGHUP)

    def retire_generations(self) -> None:
        """Let the warden go of each older generation that has no session any more that may ask it."""
        asking = [
            c.generation for c in self.children.values() if c.kind == "worker" and SETTLED not in c.said
        ]
        for generation in self.generations[:-1]:
            if generation in asking:
                continue
            self.generations.remove(generation)
            generation.close_inbox()
            for child in self.children.values():
                if child.kind == "warden" and child.generation is generation:
                    self.order(child, Order.DRAIN)

    def on_usr1(self, _: int) -> None:
        """Log the state of the server."""
        kinds = [child.kind for child in self.children.values()]
        counts = ", ".join(f"{kind}s: {kinds.count(kind)}" for kind in ("worker", "resolver", "warden"))
        self.log.write("info", f"sockd v{__version__} {counts}, configuration #{self.newest.number + 1}")
        for child in self.children.values():
            if child.kind == "worker":
                self.order(child, Order.REPORT)

    def reap(self) -> None:
        """Bury the children that have ended, and see to what they have left."""
        count = len(self.children)
        self.bury_ended()
        if len(self.children) < count:
            self.end_strays()

    def bury_ended(self) -> None:
        """Bury the children that have ended, and plan new ones for those that should not have."""
        for pid, status in list_ended():
            child = self.children.pop(pid, None)
            if child is None:
                continue  # a thread, see is_traced; or a stray
            was_ended_by_us = child.control.fileno() < 0  # see end_child
            self.bury(child)
            if (status and not was_ended_by_us) or self.is_needed(child):
                self.log.write("warning", f"{child.kind} {pid} exited unexpectedly{describe_status(status)}")
            self.plan_successor(child)

    def is_kept(self, generation: Generation, kind: str) -> bool:
        """Tell whether a generation is to have children of a kind."""
        return generation is self.newest or (kind == "warden" and generation in self.generations)

    def is_needed(self, child: Child) -> bool:
        """Tell whether another one has to take a child's place when it dies."""
        return self.is_kept(child.generation, child.kind) and not child.is_relieved

    def plan_successor(self, child: Child) -> None:
        """Have another one take the place of a child that has died, if it is needed."""
        if self.is_needed(child):
            when = max(time.monotonic(), self.last_spawn + RESPAWN_SECONDS)
            self.due.append((when, child.generation, child.kind, child.number))

    def bury(self, child: Child) -> None:
        """Take back what a dead child held, before another one can follow it."""
        with Impatience():
            child.control.close()
        if child.kind == "worker" and child.generation.counts is not None:
            child.generation.counts.forget(child.number - 1)

    def respawn(self) -> None:
        """Fork again the children whose time has come."""
        now = time.monotonic()
        due, self.due = [d for d in self.due if d[0] <= now], [d for d in self.due if d[0] > now]
        for _, generation, kind, number in due:
            if self.is_kept(generation, kind):
                self.spawn_child(generation, kind, number)

    def next_retirement(self) -> float:
        """Return when the oldest worker has lived for child.maxlifetime."""
        lifetime = self.config.child_maxlifetime
        births = [c.born for pid, c in self.children.items() if self.serves(c) and pid not in self.tired]
        return min(births) + lifetime if lifetime and births else NO_DEADLINE

    def serves(self, child: Child) -> bool:
        """Tell whether a child is a worker that takes clients."""
        return child.kind == "worker" and self.is_needed(child)

    def relieve_workers(self) -> None:
        """Replace each worker that has served or lived long enough; it finishes its sessions.

        A place is free again when the worker that had it has ended: until then the next one serves on.
        """
        if self.next_retirement() <= time.monotonic():
            oldest = time.monotonic() - self.config.child_maxlifetime
            self.tired |= {pid for pid, c in self.children.items() if self.serves(c) and c.born <= oldest}
        self.tired &= set(self.children)
        taken = {c.number for c in self.children.values() if c.generation is self.newest}
        for pid in tuple(self.tired):
            child, count = self.children[pid], self.count_workers(self.config)
            place = child.number + count if child.number <= count else child.number - count
            if self.serves(child) and place in taken:
                continue
            if self.serves(child):
                if not self.fork_child(self.newest, "worker", place):
                    return  # it serves on, and is looked at again the next time
                self.children[pid] = child._replace(is_relieved=True)
                self.order(child, Order.DRAIN)
            self.tired.discard(pid)

    def hear_child(self, pid: int) -> None:
        """Read what a child has to say."""
        child = self.children.get(pid)
        if child is None:
            return
        try:
            with Impatience():
                data = child.control.recv(MAX_MESSAGE_BYTES)
        except OSError:
            data = b""
        if not data:
            self.end_child(pid)
        elif child.kind == "worker":
            self.hear_worker(pid, child, data)
        else:
            self.hear_helper(child, data)

    def hear_worker(self, pid: int, child: Child, data: bytes) -> None:
        """Act on what a worker says: each word once.  One that says anything else is not ours any more."""
        if data not in WORKER_WORDS or data in child.said:
            self.end_culprit(pid)
            return
        self.children[pid] = child._replace(said=child.said | {data})
        if data == TIRED and self.serves(child) and self.config.child_maxrequests:
            self.tired.add(pid)
        elif data == DRAINED and self.handover is not None:
            self.handover.waiting.discard(pid)
        elif data == DEAF:
            self.revive_listeners()

    def revive_listeners(self) -> None:
        """Listen again where a worker has shut a listener down; end all that have it: nobody knows which.

        Workers of older generations have said that they let go of it: they are ended the second time.
        """
        dead = [
            listener
            for listener in self.listeners.values()
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ]
        if not dead:
            return
        self.log.write("error", "a worker has shut down what all workers listen on: ending them all")
        workers = {pid for pid, child in self.children.items() if child.kind == "worker"}
        newest = {pid for pid in workers if self.children[pid].generation is self.newest}
        for pid in newest | (self.suspects & workers):
            os.kill(pid, signal.SIGKILL)
        self.suspects = workers - newest
        for listener in dead:
            try:
                listener.listen(LISTEN_BACKLOG)
            except OSError as error:
                self.log.write("error", f"cannot listen again: {error.strerror}")

    def hear_helper(self, helper: Child, data: bytes) -> None:
        """Act on a helper's report of a worker that has gone wrong."""
        try:
            culprit = int(decode_message(data)[1][0])
        except (ProtocolError, ValueError, IndexError):
            return
        if culprit == int(NOBODY):
            self.lose_inbox(helper)
        elif culprit in self.children and self.children[culprit].kind == "worker":
            self.end_culprit(culprit)

    def end_culprit(self, pid: int) -> None:
        """End a worker that has gone wrong."""
        self.log.write("error", f"worker {pid} sent a malformed message: ending it")
        self.end_child(pid)

    def lose_inbox(self, helper: Child) -> None:
        """End all workers that ask a helper: one of them has shut down its inbox, and nobody knows which."""
        if not self.is_needed(helper):
            return  # its inbox is none that anybody asks by
        self.log.write("error", "a worker has shut down what all workers ask by: ending them all")
        culprits = [helper.generation]
        if helper.generation is self.newest:
            if not self.start_over():
                self.order(helper, Order.STOP)  # the next one will find the same
                return
            culprits = self.generations[:-1]
        for pid, child in self.children.items():
            if child.kind == "worker" and child.generation in culprits:
                os.kill(pid, signal.SIGKILL)

    def start_over(self) -> bool:
        """Take new inboxes and new children for the same configuration; False if that cannot be done."""
        outgoing = self.newest
        try:
            inbox, places = make_inbox(), self.count_places(self.config)
            generation = Generation(outgoing.number + 1, self.config, outgoing.accounts, places)
        except OSError as error:
            self.log.write("error", f"cannot make another inbox: {error.strerror}")
            return False
        close_inbox(self.resolver_inbox)
        self.resolver_inbox = inbox
        self.generations.append(generation)
        outgoing.close_lock()
        for child in self.children.values():
            if child.kind == "resolver":
                self.order(child, Order.STOP)
        self.spawn_children()
        return True

    def end_child(self, pid: int) -> None:
        """End a child that has closed its control socket: it is ending, or no longer to be trusted.

        Its end is waited for, but not for ever: one that we trace lives until its threads have been reaped.
        """
        if pid not in self.children:
            return  # it has ended while another's end was waited for
        os.kill(pid, signal.SIGKILL)
        with Impatience():
            self.children[pid].control.close()
        deadline = time.monotonic() + KILLED_SECONDS
        self.reap()
        while pid in self.children and time.monotonic() < deadline:
            time.sleep(REAP_PAUSE_SECONDS)
            self.reap()

    def end_strays(self) -> None:
        """End what a worker that was not ours any more has left behind: it would serve clients on."""
        deadline = time.monotonic() + KILLED_SECONDS
        strays, ended = find_strays(self.children), set[int]()
        while strays and time.monotonic() < deadline:
            for pid in strays:
                os.kill(pid, signal.SIGKILL)
            for pid in set(strays) - ended:
                self.log.write("error", f"process {pid}, of a worker that has gone, is ended")
            ended.update(strays)
            time.sleep(REAP_PAUSE_SECONDS)
            self.bury_ended()
            strays = find_strays(self.children)  # these may have left some themselves

    # --- the end ---

    def end(self) -> int:
        """Close the listeners, end the children, and leave nothing behind; return the exit status."""
        for number in self.handlers:
            signal.signal(number, signal.SIG_IGN)  # impatient callers repeat theirs; the end is on its way
        for listener in self.listeners.values():
            listener.close()
        for child in self.children.values():
            self.order(child, Order.STOP)
        self.wait_for_children(time.monotonic() + CHILDREN_STOP_SECONDS)
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        self.wait_for_children(time.monotonic() + KILLED_SECONDS)
        self.end_strays()
        self.pidfile.release()
        self.log.write("alert", "mother[1/1]: shutting down")
        self.log.close()
        return 0

    def wait_for_children(self, deadline: float) -> None:
        """Wait for the ends of the children, of which SIGCHLD tells."""
        poller = select.poll()
        poller.register(self.wakeup[0], select.POLLIN)
        while True:
            for pid, _ in list_ended():
                child = self.children.pop(pid, None)
                if child is not None:
                    self.bury(child)
            if not self.children or time.monotonic() >= deadline:
                return
            if poller.poll(poll_milliseconds(deadline)):
                os.read(self.wakeup[0], 4096)

    handlers = {
        signal.SIGTERM: on_end,
        signal.SIGINT: on_end,
        signal.SIGQUIT: on_end,
        signal.SIGHUP: on_hup,
        signal.SIGUSR1: on_usr1,
    }


# ============================== 20. Command line ==============================
# danted's options and exit statuses.  The only section that prints, and that ends the program.

COPYRIGHT = f"sockd v{__version__}.  Copyright (c) 2026 the sockd authors"
USAGE = """\
usage: {program} [-DLVhnv] [-N number] [-d number] [-f file] [-p file] [--chroot directory]
   -D             : run in daemon mode
   -L             : shows the license for this program
   -N <number>    : run <number> worker processes [one for each CPU]
   -V             : verify configuration and exit
   -d <number>    : set degree of debugging
   -f <filename>  : use <filename> as configuration file [{config}]
   -h             : print this information
   -n             : disable TCP keep-alive
   -p <filename>  : write pid to <filename> [{pidfile}]
   -v             : print version info
   --chroot <dir> : serve clients from within <dir>, which may be empty
   --add-user <name> : ask for a password, write both to the password file given
                    by passwordfile in the configuration, and exit
"""
LICENSE_TEXT = """\
BSD 2-Clause License

Copyright (c) 2026, the sockd authors

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:

1. Redistributions of source code must retain the above copyright notice, this
   list of conditions and the following disclaimer.

2. Redistributions in binary form must reproduce the above copyright notice,
   this list of conditions and the following disclaimer in the documentation
   and/or other materials provided with the distribution.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"
AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE
FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL
DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER
CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY,
OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""


MOST_WORKERS = 1024
MOST_DEBUG = 999_999_999


def parse_number_option(letter: str, text: str, low: int, high: int) -> int:
    """Return the number given to an option; ConfigError if it is none."""
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_DEBUG))
    if not is_number or not low <= int(text) <= high:
        least = {0: "zero", 1: "one"}[low]
        raise ConfigError(
            f"illegal value for -{letter} option: {shorten(text)}.  "
            f"Must be a number and greater or equal to {least}, and at most {high}"
        )
    return int(text)


def parse_text_option(name: str, text: str) -> str:
    """Return the text given to an option; ConfigError if it is empty, as a script's unset variable is."""
    # Unlike Dante, which runs on without the pid file.
    if not text:
        raise ConfigError(f"illegal value for {name} option: it is empty")
    return text


SHORT_OPTIONS, LONG_OPTIONS = "DLN:Vd:f:hnp:v", ("chroot=", "add-user=")
OPTION_VALUES: dict[str, Callable[[str], dict[str, object]]] = {
    "-D": lambda _: {"daemon": True},
    "-L": lambda _: {},
    "-N": lambda text: {"servers": parse_number_option("N", text, 1, MOST_WORKERS)},
    "-V": lambda _: {},
    "-d": lambda text: {"debug": parse_number_option("d", text, 0, MOST_DEBUG)},
    "-f": lambda text: {"config_file": parse_text_option("-f", text)},
    "-h": lambda _: {},
    "-n": lambda _: {"keepalive": False},
    "-p": lambda text: {"pidfile": parse_text_option("-p", text)},
    "-v": lambda _: {},
    "--add-user": lambda text: {"add_user": parse_text_option("--add-user", text)},
    "--chroot": lambda text: {"chroot": parse_text_option("--chroot", text)},
}


def parse_options(program: str, arguments: Sequence[str]) -> tuple[Options, frozenset[str]]:
    """Return the options and which of -V and -v are among them; getopt.GetoptError, ConfigError."""
    pairs, rest = getopt.getopt(list(arguments), SHORT_OPTIONS, LONG_OPTIONS)
    values: dict[str, object] = {"program": program, "config_file": default_files(program)[0]}
    modes = set()
    for name, value in pairs:
        if name in ("-V", "-v"):
            modes.add(name)
        values |= OPTION_VALUES[name](value)
    if rest:
        raise ConfigError(f"unknown argument {rest[0]}")
    return Options(**values), frozenset(modes)  # type: ignore[arg-type]


def find_text_option(arguments: Sequence[str]) -> str:
    """Return -L or -h if one stands before the first mistake: as danted's, they act when they are met."""
    for end in range(len(arguments), 0, -1):
        try:
            names = [name for name, _ in getopt.getopt(list(arguments[:end]), SHORT_OPTIONS, LONG_OPTIONS)[0]]
        except getopt.GetoptError:
            continue  # the mistake is further in front
        return next((name for name in names if name in ("-L", "-h")), "")
    return ""


def describe_usage(program: str) -> str:
    config, pidfile = default_files(program)
    return USAGE.format(program=program, config=config, pidfile=pidfile)


def write_out(descriptor: int, text: str) -> None:
    """Write to standard output or standard error; OSError.

    Not by way of sys.stdout: that is None where the caller has closed it, and says once more at the exit
    what could not be written.
    """
    data = text.encode(sys.getfilesystemencoding(), "backslashreplace")
    while data:
        data = data[os.write(descriptor, data) :]


def tell(text: str) -> None:
    """Write a line to standard error, where somebody reads there."""
    try:
        write_out(2, text + "\n")
    except OSError:
        pass  # there is nobody left to tell


def print_complaints(complaints: Iterable[Complaint]) -> None:
    """Show on stderr what is wrong with the configuration."""
    for complaint in complaints:
        tell(describe_complaint(complaint))


def fail(program: str, text: str) -> int:
    """Say on stderr why there is no start; return the exit status."""
    tell(f"{program}: error: {text}")
    return 1


def show(program: str, text: str) -> int:
    """Write to standard output what was asked for; return the exit status."""
    try:
        if sys.stdout is None:  # and /dev/null is in its place since
            raise OSError(errno.EBADF, "it is closed")
        write_out(1, text)
    except OSError as error:
        return fail(program, f"cannot write to standard output: {error.strerror}")
    return 0


def serve(options: Options, config: Config) -> int:
    """Run the server until it is told to end; return the exit status."""
    keep_only(range(FIRST_PASSED_DESCRIPTOR + count_passed(os.environ)))
    mother = Mother(options, config)
    try:
        mother.start()
    except (ConfigError, OSError) as error:
        text = str(error)
        mother.pidfile.release()
        mother.log.write("error", text)
        mother.log.write("alert", "mother[1/1]: shutting down")
        return 1 if "stderr" in config.logoutput else fail(options.program, text)
    try:
        return mother.run()
    except Exception as error:  # her children end with her
        mother.pidfile.release()
        mother.log.write("error", f"internal error: {describe_bug(error)}: {error}")
        return 1


def read_new_password() -> bytes:
    """Return a password typed twice at the terminal, or the first line of standard input; ConfigError."""
    if not os.isatty(0):
        line = sys.stdin.buffer.readline(MAX_MESSAGE_BYTES) if sys.stdin else b""
        if not line:
            raise ConfigError("standard input has no password")
        return line.rstrip(b"\r\n")
    getpass = importlib.import_module("getpass").getpass  # here: no server needs it
    try:
        first = getpass("New password: ")
        if getpass("The same again: ") != first:
            raise ConfigError("the two passwords are not the same")
    except EOFError:
        tell("")  # the terminal is still in the line of the question
        raise ConfigError("no password was typed") from None
    return os.fsencode(first)


def add_user(options: Options, config: Config) -> int:
    """Add an account to sockd's own password file; return the exit status."""
    user = os.fsencode(options.add_user)
    if not config.passwordfile:
        return fail(options.program, f'{options.config_file} names no "passwordfile" to add a user to')
    try:
        fault = find_account_fault(user)
        password = b"" if fault else read_new_password()
        fault = fault or find_password_fault(password)
        if fault:
            return fail(options.program, fault)
        add_account(config.passwordfile, user, password)
    except (ConfigError, OSError, ValueError) as error:  # ValueError: a terminal's bytes that are no text
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return fail(options.program, f"user not added: {where}{getattr(error, 'strerror', '') or error}")
    show(options.program, f"user {options.add_user} written to {config.passwordfile}\n")
    return 0  # the account is there, whoever has heard of it


def open_standard_descriptors() -> None:
    """Put /dev/null where the caller has closed a standard descriptor.

    Nothing of ours may take its number.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def run_command_line(program: str) -> int:
    """Do what the command line wants; return the exit status."""
    text_option = find_text_option(sys.argv[1:])
    if text_option:
        text = LICENSE_TEXT if text_option == "-L" else describe_usage(program)
        return show(program, f"{COPYRIGHT}\n{text}")
    try:
        options, modes = parse_options(program, sys.argv[1:])
    except getopt.GetoptError as error:
        tell(f"{program}: {error}\n{COPYRIGHT}\n{describe_usage(program)}".rstrip("\n"))
        return 1
    except ConfigError as error:
        return fail(program, str(error))
    if "-v" in modes:
        return show(program, f"{COPYRIGHT}\n")
    config, complaints = read_config(options)
    print_complaints(complaints)
    if config is None:
        return 1
    if options.add_user:
        return add_user(options, config)
    if "-V" in modes:
        print_complaints(find_missing(options, config))
        return 0
    return serve(options, config)


def main() -> int:
    """Run the program; return the exit status."""
    forget_annotations()
    program = os.path.basename(sys.argv[0]).removesuffix(".py") or "sockd"
    leave_boot_process()
    open_standard_descriptors()
    expect_interrupt()
    try:
        return run_command_line(program)
    except KeyboardInterrupt:  # while it is asked for a password, or at a slow start
        ignore_interrupts()
        return fail(program, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
