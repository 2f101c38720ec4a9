"""The same log-ins at sockd and at Debian's danted: the same verdict, the same bytes, the same records.

As in test_against_dante.py, whose machinery this uses; here the systems that know who a client is are
real: accounts with every kind of hash, PAM with Linux-PAM's modules, an ident server.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import login_peers
import pytest
from comparison import CLIENT_PASS, Case, Group, Outcome, case, conf, rule, run_group
from conversation import (
    Talk,
    bytewise,
    connect4,
    end,
    go_on,
    hello,
    log_in,
    method,
    over,
    ping,
    reply,
    send,
    v4,
    v5,
)  # fmt: skip
from login_peers import LONG_PASSWORD, LONG_USER, Identd
from servers import Danted, Sockd, World, need_danted

pytestmark = [pytest.mark.root, pytest.mark.dante]


def ask(user: str, secret: str, target: str = "echo") -> tuple[Any, ...]:
    """Log in, connect, and use the connection: as far as the server lets the client."""
    return (patience, log_in(user, secret), send(v5(1, target)), reply, go_on, ping(), hang_up, end)


def connect(target: str = "echo", *offer: int) -> tuple[Any, ...]:
    """Connect without a password, having offered these methods (none, if none is given)."""
    greeted = (patience, send(hello(*(offer or (0,)))), method, go_on)
    return (greeted, send(v5(1, target)), reply, go_on, ping(), hang_up, end)


def patience(talk: Talk) -> None:
    """Wait longer than any server does for somebody else."""
    talk.client.settimeout(60)


def hang_up(talk: Talk) -> None:
    """Close the client's direction."""
    talk.client.shutdown(1)


QUIET_PASS = rule("socks pass", "from: 0/0 to: 0/0")

# ------------------------------ the system's accounts ------------------------------


def own_password(user: str) -> Case:
    """Give the case of a user who knows the password."""
    return case(user, *ask(user, f"{user}-pw"))


ACCOUNTS = [
    *(own_password(kind) for kind in login_peers.SETTINGS),
    *(case(f"{kind} wrong", *ask(kind, "wrong")) for kind in login_peers.SETTINGS),
    *(own_password(user) for user in ("locked", "starred", "star", "empty", "broken", "alien", "twice")),
    *(case(f"{user} empty", *ask(user, "")) for user in ("locked", "star", "empty", "broken", "sha512")),
    case("locked, its line as the password", *ask("locked", "!")),
    case("star, its line as the password", *ask("star", "*")),
    case("second line of a user", *ask("twice", "second-pw")),
    own_password("expired"),
    own_password("inactive"),
    own_password("mustchange"),
    own_password("shadowonly"),
    own_password("passwdonly"),
    own_password("with space"),
    own_password("umläut"),
    case("umläut as UTF-8", *ask("umläut".encode().decode("latin-1"), "umläut-pw")),
    case("long", *ask(LONG_USER, LONG_PASSWORD)),
    case("long, password a byte short", *ask(LONG_USER, LONG_PASSWORD[:-1])),
    case("unknown user", *ask("nobody-here", "x")),
    case("unknown user, empty password", *ask("nobody-here", "")),
    case("user in other case", *ask("SHA512", "sha512-pw")),
    case("password in other case", *ask("sha512", "SHA512-pw")),
    case("blank behind the password", *ask("sha512", "sha512-pw ")),
    case("empty user", *ask("", "sha512-pw")),
    case("colon", *ask("sha512:x", "sha512-pw")),
    case("NUL behind the user", *ask("sha512\0x", "sha512-pw")),
    case("NUL behind the password", *ask("sha512", "sha512-pw\0")),
    case("all bytewise", bytewise, *ask("yescrypt", "yescrypt-pw")),
    case("without password", *connect()),
    case("root", *ask("root", "")),
    case("nologin shell", *ask("sha512", "sha512-pw")),
]
USERNAME = [
    Group("username", conf(CLIENT_PASS, QUIET_PASS, methods="username"), tuple(ACCOUNTS)),
    Group(
        "username judged by rules",
        conf(
            CLIENT_PASS,
            rule("socks pass", "from: 0/0 to: 127.0.0.11/32", "socksmethod: username", "user: sha512"),
            rule("socks pass", "from: 0/0 to: 127.0.0.12/32", "socksmethod: pam.username",
                 "pam.servicename: permit"),
            rule("socks pass", "from: 0/0 to: 127.0.0.13/32", "socksmethod: username pam.username",
                 "pam.servicename: deny"),
            rule("socks pass", "from: 0/0 to: 127.0.0.14/32", "socksmethod: pam.username username",
                 "pam.servicename: deny"),
            rule("socks block", "from: 0/0 to: 127.0.0.15/32", "socksmethod: username", "user: sha512"),
            rule("socks pass", "from: 0/0 to: 127.0.0.15/32", "socksmethod: username none"),
            methods="username pam.username none",
        ),
        tuple(
            case(f"{user} {secret} {host}", *ask(user, secret, f"{host}/echo@{host}"))
            for host in (f"127.0.0.{n}" for n in range(11, 16))
            for user, secret in (
                ("sha512", "sha512-pw"), ("sha512", "wrong"), ("md5", "md5-pw"), ("nobody-here", "x"),
            )
        ),
    ),
]  # fmt: skip

# ------------------------------ PAM ------------------------------

PAM_LOGINS = [
    case("right", *ask("sha512", "sha512-pw")),
    case("wrong", *ask("sha512", "wrong")),
    case("yescrypt", *ask("yescrypt", "yescrypt-pw")),
    case("locked", *ask("locked", "locked-pw")),
    case("empty hash", *ask("empty", "")),
    case("empty hash, any password", *ask("empty", "x")),
    case("expired", *ask("expired", "expired-pw")),
    case("inactive", *ask("inactive", "inactive-pw")),
    case("must change", *ask("mustchange", "mustchange-pw")),
    case("unknown", *ask("nobody-here", "x")),
    case("only PAM knows", *ask("paula", "paula-pw")),
    case("only PAM knows, wrong", *ask("paula", "wrong")),
    case("empty user", *ask("", "x")),
    case("empty password", *ask("sha512", "")),
    case("both empty", *ask("", "")),
    case("umläut", *ask("umläut", "umläut-pw")),
    case("NUL behind the user", *ask("sha512\0x", "sha512-pw")),
    case("NUL behind the password", *ask("sha512", "sha512-pw\0")),
    case("without password", *connect()),
    case("v4", connect4("echo"), over),
]


def write_pam_config(service: str) -> str:
    """Write a configuration whose only socks-rule names a service, if it is not the default one."""
    named = [] if service == "sockd" else [f"pam.servicename: {service}"]
    return conf(CLIENT_PASS, rule("socks pass", "from: 0/0 to: 0/0", *named), methods="pam.username")


def pam_group(service: str) -> Group:
    """Give a group for one service."""
    return Group(f"pam.username {service}", write_pam_config(service), tuple(PAM_LOGINS))


SERVICES = ("sockd", "pwdfile", "permit", "deny", "noaccount", "byruser", "missing", "broken")


HERE, THERE = "127.76.0.7", "127.75.0.7"
BY_HOST = f"+ : ALL : {HERE}\n+ : sha512 : 127.75.0.\n- : ALL : ALL\n"
PAM = [
    *map(pam_group, SERVICES),
    Group(
        "pam.username slow",
        write_pam_config("slow"),
        (case("right", *ask("sha512", "sha512-pw")), case("wrong", *ask("sha512", "wrong"))),
    ),
    Group(
        "pam.username by host",
        write_pam_config("byhost"),
        (
            case("anybody from here", *ask("md5", "x"), source=HERE),
            case("one from there", *ask("sha512", "x"), source=THERE),
            case("another from there", *ask("md5", "x"), source=THERE),
            case("from elsewhere", *ask("sha512", "x"), source="127.74.0.7"),
        ),
    ),
    Group(
        "pam.username service of each rule",
        conf(
            CLIENT_PASS,
            rule("socks pass", "from: 0/0 to: 127.0.0.11/32", "pam.servicename: permit"),
            rule("socks pass", "from: 0/0 to: 127.0.0.12/32", "pam.servicename: deny"),
            rule("socks pass", "from: 0/0 to: 127.0.0.12/32", "pam.servicename: permit"),
            rule("socks pass", "from: 0/0 to: 127.0.0.13/32", "pam.servicename: pwdfile", "user: paula"),
            rule("socks pass", "from: 0/0 to: 127.0.0.13/32"),
            rule("socks block", "from: 0/0 to: 127.0.0.14/32", "pam.servicename: permit", "user: md5"),
            rule("socks pass", "from: 0/0 to: 127.0.0.14/32", "pam.servicename: permit"),
            methods="pam.username",
        ),
        tuple(
            case(f"{user} {secret} {host}", *ask(user, secret, f"{host}/echo@{host}"))
            for host in (f"127.0.0.{n}" for n in range(11, 15))
            for user, secret in (
                ("sha512", "sha512-pw"), ("md5", "wrong"), ("paula", "paula-pw"), ("paula", "wrong"),
            )
        ),
    ),
]  # fmt: skip
FIRST, SECOND, THIRD, FOURTH = (f"127.78.{n}." for n in range(1, 5))  # networks


def ways_in(source: str) -> list[Case]:
    """Give each way in which a client may introduce itself, from one network.

    Each has an address of its own, by which its records are known.
    """
    return [
        case(f"{source}0 nothing", *connect(), source=f"{source}1"),
        case(f"{source}0 password", *ask("sha512", "sha512-pw"), source=f"{source}2"),
        case(f"{source}0 wrong password", *ask("sha512", "wrong"), source=f"{source}3"),
        case(f"{source}0 both offered", patience, send(hello(0, 2)), method, source=f"{source}4"),
        case(f"{source}0 v4", patience, connect4("echo"), ping(), hang_up, over, source=f"{source}5"),
    ]


def by_address_group(name: str, clientmethod: str, socksmethod: str, methods: str) -> Group:
    """Give a group whose client-rules let PAM judge by address: permit, deny, by host, or nothing."""
    config = conf(
        *(
            rule("client pass", f"from: {source}0/24 to: 0/0", f"clientmethod: {clientmethod}",
                 f"pam.servicename: {service}")
            for source, service in ((FIRST, "permit"), (SECOND, "deny"), (THIRD, "byhost"))
        ),
        rule("client pass", "from: 0/0 to: 0/0", "clientmethod: none"),
        rule("socks pass", "from: 0/0 to: 0/0", f"socksmethod: {socksmethod}", "pam.servicename: permit"),
        methods=methods,
        more=f"clientmethod: {clientmethod} none",
    )  # fmt: skip
    sources = (FIRST, SECOND, THIRD, FOURTH)
    cases = tuple(case for source in sources for case in ways_in(source))
    return Group(name, config.replace("clientmethod: none\n", "", 1), cases)


def at_request_group(name: str, socksmethod: str, methods: str) -> Group:
    """Give a group whose socks-rules let PAM judge: permit, deny, by host, pam_unix."""
    services = {FIRST: "permit", SECOND: "deny", THIRD: "byhost", FOURTH: "sockd"}
    config = conf(
        CLIENT_PASS,
        *(
            rule("socks pass", f"from: {source}0/24 to: 0/0", f"socksmethod: {socksmethod}",
                 f"pam.servicename: {service}")
            for source, service in services.items()
        ),
        methods=methods,
    )  # fmt: skip
    return Group(name, config, tuple(case for source in services for case in ways_in(source)))


BY_HOST += f"+ : ALL : {THIRD}\n"
BY_HOST = "".join(sorted(BY_HOST.splitlines(keepends=True)))  # the refusal comes last
PAM += [
    by_address_group("pam.address at accept", "pam.address", "none pam.address", "none pam.address"),
    by_address_group("pam.any at accept", "pam.any", "none pam.any", "none pam.any"),
    by_address_group(
        "pam.address at accept and a password", "pam.address", "pam.address username", "pam.address username",
    ),
    at_request_group("pam.address at request", "pam.address", "pam.address"),
    at_request_group("pam.address and none at request", "pam.address", "none pam.address"),
    at_request_group("pam.any at request", "pam.any", "pam.any"),
    at_request_group("pam.any and username at request", "pam.any", "pam.any username"),
    at_request_group("pam.any and pam.username at request", "pam.any pam.username", "pam.any pam.username"),
]  # fmt: skip

# ------------------------------ ident ------------------------------

IDENTS = {
    "right user": login_peers.user("sha512"),
    "other user": login_peers.user("md5"),
    "unknown user": login_peers.user("nobody-here"),
    "in pieces": login_peers.in_pieces("sha512"),
    "without return": login_peers.say("{0} : USERID : UNIX : sha512\n"),
    "without end of line": login_peers.say("{0} : USERID : UNIX : sha512"),
    "blanks everywhere": login_peers.say("{1} , {2} : USERID : UNIX :  sha512\r\n"),
    "no blanks": login_peers.say("{1},{2}:USERID:UNIX:sha512\r\n"),
    "other system": login_peers.say("{0} : USERID : OTHER : sha512\r\n"),
    "character set": login_peers.say("{0} : USERID : UNIX , US-ASCII : sha512\r\n"),
    "small letters": login_peers.say("{0} : userid : unix : sha512\r\n"),
    "error": login_peers.say("{0} : ERROR : NO-USER\r\n"),
    "error hidden": login_peers.say("{0} : ERROR : HIDDEN-USER\r\n"),
    "wrong ports": login_peers.say("1 , 2 : USERID : UNIX : sha512\r\n"),
    "ports turned round": login_peers.say("{2} , {1} : USERID : UNIX : sha512\r\n"),
    "no ports": login_peers.say("USERID : UNIX : sha512\r\n"),
    "garbage": login_peers.say("\x00\xff\x80 what\r\n"),
    "empty line": login_peers.say("\r\n"),
    "closes": login_peers.hang_up,
    "resets": login_peers.reset_connection,
    "empty user": login_peers.user(""),
    "blank behind the user": login_peers.user("sha512 "),
    "user with a blank": login_peers.user("sha512 x"),
    "user with a colon": login_peers.user("sha512:x"),
    "high bytes": login_peers.user("umläut"),
    "control bytes": login_peers.user("sha512\x1b[2J"),
    "255 bytes": login_peers.user("v" * 255),
    "256 bytes": login_peers.user("v" * 256),
    "2000 bytes": login_peers.user("v" * 2000),
    "second line": login_peers.say("\r\n{0} : USERID : UNIX : sha512\r\n"),
    "more lines": login_peers.say("{0} : USERID : UNIX : sha512\r\n{0} : USERID : UNIX : md5\r\n"),
    "endless line": login_peers.never_end,
}
SLOW_IDENTS = {"silent": login_peers.say_nothing, "drips": login_peers.drip}
IDENT_HOSTS = {name: n for n, name in enumerate(["no identd", *IDENTS, *SLOW_IDENTS], 1)}
IDENT_CASES = 4  # each from an address of its own, by which its records are known


def ident_cases(name: str) -> list[Case]:
    """Give what clients from one host do: at rules for its users, for sha512 only, and for anybody."""
    sources = [ident_address(name, number) for number in range(IDENT_CASES)]
    any_user = "127.0.0.11/echo@127.0.0.11"
    return [
        case(f"{name}, any user", *connect(any_user), source=sources[0]),
        case(f"{name}, one user", *connect("127.0.0.12/echo@127.0.0.12"), source=sources[1]),
        case(f"{name}, anybody", *connect("127.0.0.13/echo@127.0.0.13"), source=sources[2]),
        case(f"{name}, v4", patience, send(v4(1, any_user)), login_reply4, source=sources[3]),
    ]


def ident_address(name: str, number: int) -> str:
    """Give the address that has an ident server of this behaviour."""
    return f"127.79.{number}.{IDENT_HOSTS[name]}"


def login_reply4(talk: Talk) -> None:
    """Read a SOCKS 4 reply."""
    talk.read_reply4("reply")


IDENT_RULES = (
    rule("socks pass", "from: 0/0 to: 127.0.0.11/32", "socksmethod: rfc931"),
    rule("socks pass", "from: 0/0 to: 127.0.0.12/32", "socksmethod: rfc931", "user: sha512"),
    rule("socks pass", "from: 0/0 to: 127.0.0.13/32", "socksmethod: none"),
)


def ident_group(name: str, clientmethod: str, hosts: list[str], at_once: int = 1) -> Group:
    """Give a group in which the client-rules may ask for a user, and the socks-rules do."""
    config = conf(CLIENT_PASS, *IDENT_RULES, methods="rfc931 none")
    config = config.replace("clientmethod: none", f"clientmethod: {clientmethod}")
    cases = [case for host in hosts for case in ident_cases(host)]
    return Group(f"rfc931 {name}", config, tuple(cases), at_once)


IDENT = [
    ident_group("at accept if possible", "rfc931 none", [*IDENTS, "no identd"]),
    ident_group("at accept", "rfc931", [*IDENTS, "no identd"]),
    ident_group("at request", "none", [*IDENTS, "no identd"]),
    *(
        Group(
            f"rfc931 {name}, {clientmethod}",
            conf(CLIENT_PASS, *IDENT_RULES, methods="rfc931 none").replace(
                "clientmethod: none", f"clientmethod: {clientmethod}"
            ),
            tuple(ident_cases(name)[:1]),
        )
        for name in SLOW_IDENTS
        for clientmethod in ("rfc931", "rfc931 none", "none")
    ),
]
GROUPS = [*USERNAME, *PAM, *IDENT]


# ------------------------------ differences ------------------------------

NUL = "danted cuts user and password at a NUL, so that records and PAM see another than was sent"
EXPIRED = "an account that shadow(5) says has expired is closed"
IN_PASSWD = "a hash may stand in /etc/passwd, as it may for every other program"
VERSION4 = "the record says why a SOCKS 4 client cannot pass"
FIRST_WORD = "a user is all of the answer, not only its first word"
NO_USER_ID = "what no user can be called is no user, and a line longer than RFC 1413 allows is no answer"


@dataclass(frozen=True)
class Instead:
    """What sockd does where danted does something else: all of the transcript."""

    reason: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class As:
    """A case of the same group in which danted does what sockd does here, with another user."""

    reason: str
    case: str
    users: tuple[str, str] = ("", "")


def refused(reason: str, count: int, why: str) -> Instead:
    """Give a log-in that is refused during negotiation after so many bytes."""
    accepted = "log: info: pass(1): tcp/accept [: CLIENT SERVER"
    failed = f"error after reading {count} bytes in _ seconds: {why}"
    blocked = f"log: info: block(1): tcp/accept ]: CLIENT SERVER: {failed}"
    return Instead(reason, ("method: 05 02", "password status: 01 01", accepted, blocked))


def granted(reason: str, name: str) -> Instead:
    """Give a log-in that is granted."""
    path, target = f"{name}@CLIENT SERVER", "127.0.0.1.* 127.0.0.1.echo"
    end = "local client closed.  Session duration: _s"
    return Instead(
        reason,
        (
            "method: 05 02",
            "password status: 01 00",
            "reply: 05 00 00 01 127.0.0.1.*",
            "heard: b'ping'",
            "client end: closed",
            "log: info: pass(1): tcp/accept [: CLIENT SERVER",
            f"log: info: pass(1): tcp/connect [: {path} -> {target}",
            f"log: info: pass(1): tcp/connect ]: 4 -> {path} -> 4, 4 -> {target} -> 4: {end}",
            f"log: info: pass(1): tcp/accept ]: 4 -> CLIENT SERVER -> 4: {end}",
        ),
    )


def refused4(methods: str) -> Instead:
    """Give a SOCKS 4 client that is refused because of these methods."""
    why = (
        "error after reading 9 bytes in _ seconds: client-rule #1 requires SOCKS authentication to use for "
        f'matching clients to be "{methods}", but connected client is using SOCKS v4, which does not support '
        "any authentication"
    )
    accepted = "log: info: pass(1): tcp/accept [: CLIENT SERVER"
    blocked = f"log: info: block(1): tcp/accept ]: CLIENT SERVER: {why}"
    return Instead(VERSION4, ("reply: 00 5b REQUESTED", "client end: closed", accepted, blocked))


FAILED = "system password authentication failed for user"
NUL_REFUSED = "NUL in username packet from client"
# Regular expression for "group: case" -> the difference; the first counts.
DIFFERENCES: tuple[tuple[str, Instead | As], ...] = (
    ("username: expired", refused(EXPIRED, 23, f'{FAILED} "expired"')),
    ("username: inactive", refused(EXPIRED, 25, f'{FAILED} "inactive"')),
    ("username: passwdonly", granted(IN_PASSWD, "username%passwdonly")),
    (".*: NUL behind the user", refused(NUL, 23, NUL_REFUSED)),
    (".*: NUL behind the password", refused(NUL, 22, NUL_REFUSED)),
    (r"pam\.username .*: v4", refused4("pam.username")),
    *(
        (f"rfc931 .*: {name}, {who}", As(reason, f"{like}, {who}", users))
        for who in ("any user", "one user", "anybody", "v4")
        for name, reason, like, users in (
            ("user with a blank", FIRST_WORD, "unknown user", ("nobody-here", r"sha512\040x")),
            ("control bytes", NO_USER_ID, "error", ("", "")),
            ("256 bytes", NO_USER_ID, "error", ("", "")),
            ("2000 bytes", NO_USER_ID, "error", ("", "")),
            ("endless line", NO_USER_ID, "error", ("", "")),
        )
    ),
)  # fmt: skip


def find_difference(group: Group, case: Case) -> Instead | As | None:
    """Give the difference that is meant for a case."""
    name = f"{group.name}: {case.name}"
    return next((found for pattern, found in DIFFERENCES if re.fullmatch(pattern, name)), None)


def simplify(lines: list[str]) -> list[str]:
    """Leave out of a transcript what other tests are about.

    Those are the records of the built-in rule, which danted does not write; whether a connection was
    closed or reset; blanks and foreign bytes in a name, which danted does not escape; and how much of a
    very long name is kept.
    """
    found = []
    for line in lines:
        if line.startswith("log: info: block(0)"):
            continue
        if not line.startswith("log:"):
            line = re.sub(r": (client end: )?(fin|reset|closed)$", ": closed", line)
        line = re.sub(r"%([^%]*?)@(?=CLIENT)", lambda name: f"%{escape(name[1])}@", line)
        line = re.sub(r'"(.)\1{99,}.*', r'"\1...', line)
        found.append(re.sub(r"(.)\1{99,}", r"\1...", line))
    return found


def escape(name: str) -> str:
    """Give a name as sockd spells it in a record."""
    return "".join(char if "!" <= char <= "~" else f"\\{ord(char):03o}" for char in decode_log(name))


def decode_log(name: str) -> str:
    """Undo what the log's reader does to foreign bytes."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda byte: chr(int(byte[1], 16)), name)


# ------------------------------ the tests ------------------------------


@pytest.fixture(scope="module")
def login_world(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Give a world with accounts and PAM services."""
    login_peers.need_pam()
    folder = tmp_path_factory.mktemp("logins")
    folder.chmod(0o755)
    world = login_peers.add_accounts(private_world, folder / "etc")
    return login_peers.write_pam_services(world, folder / "pam", BY_HOST)


@pytest.fixture(scope="module")
def identd(private_world: World) -> Iterator[Identd]:
    """Start the ident servers."""
    behaviours = {**IDENTS, **SLOW_IDENTS}.items()
    numbers = range(IDENT_CASES)
    server = Identd({ident_address(name, n): answer for name, answer in behaviours for n in numbers})
    yield server
    server.close()


Runs = dict[str, tuple[Future[Outcome], Future[Outcome]]]


@pytest.fixture(scope="module")
def outcomes(
    login_world: World,
    identd: Identd,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Runs]:
    """Give the outcomes of the groups that are wanted, with danted and with sockd.

    They run side by side, those first that take long, because they mostly wait.
    """
    need_danted()
    folder = tmp_path_factory.mktemp("logins-against-dante")
    wanted = {item.callspec.params["group"].name for item in request.session.items
              if getattr(item, "module", None) is request.module and hasattr(item, "callspec")}  # fmt: skip
    with ThreadPoolExecutor(len(GROUPS)) as waiting, ThreadPoolExecutor(4) as working:
        runs: Runs = {}
        for group in GROUPS:
            if group.name in wanted:
                pool = waiting if len(group.cases) <= 2 else working
                runs[group.name] = tuple(  # type: ignore[assignment]
                    pool.submit(run_group, group, kind, folder / group.name.replace(" ", "-"), login_world)
                    for kind in (Danted, Sockd)
                )
        yield runs


CASES = [
    pytest.param(group, case, id=f"{group.name}: {case.name}") for group in GROUPS for case in group.cases
]


@pytest.mark.parametrize(("group", "case"), CASES)
def test_sockd_judges_a_login_as_danted_does(group: Group, case: Case, outcomes: Runs) -> None:
    danted, sockd = (run.result() for run in outcomes[group.name])
    expected = simplify(danted.transcripts[case.name])
    difference = find_difference(group, case)
    if isinstance(difference, Instead):
        assert list(difference.lines) != expected, "no difference any more"
        expected = list(difference.lines)
    elif difference is not None:
        like = simplify(danted.transcripts[difference.case])
        expected = [line.replace(*difference.users) for line in like] if difference.users[0] else like
    found = simplify(sockd.transcripts[case.name])
    assert found == expected, "\n".join(difflib.ndiff(expected, found))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_sockd_ends_well_after_these_logins(group: Group, outcomes: Runs) -> None:
    trouble = outcomes[group.name][1].result().trouble
    assert not trouble, trouble


def test_each_difference_is_about_a_case() -> None:
    names = [f"{group.name}: {case.name}" for group in GROUPS for case in group.cases]
    assert len(set(names)) == len(names)
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern, _ in DIFFERENCES)
