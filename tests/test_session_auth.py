"""Methods and passwords with the real program: who gets in, who does not, and what the log says of it."""

from __future__ import annotations

import contextlib
import re
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import (
    CONNECT,
    GRANTED,
    NO_ACCEPTABLE_METHOD,
    NO_METHOD,
    PASSWORD_METHOD,
    UDP_ASSOCIATE,
    Client,
    Feed,
    bytewise,
    greeting,
    password_message,
    random_splits,
    request4,
    request5,
    whole,
)
from more_peers import (
    CLIENT_PASS,
    HEAD,
    SOCKS_PASS,
    hash_with,
    lines_about,
    rule,
    wait_for_line,
    wait_for_record,
)
from servers import RECORD, Server, Sockd, World, eventually

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

ALICE, BOB = (b"alice", b"wonderland"), (b"bob", b"builder")
NO_FAULT = 0


@pytest.fixture(scope="module")
def password_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's own accounts: every kind of line that a password file may have."""
    long_password = "p" * 200
    lines = [
        "# accounts",
        "",
        f"alice:{hash_with('-6', 'wonderland')}",
        f"bob:{hash_with('-5', 'builder')}",
        f"carol:!{hash_with('-6', 'singer')}",
        "dave:*",
        "empty:",
        f"expired:{hash_with('-6', 'late')}:19000:0:99999:7::19001:",
        f"inactive:{hash_with('-6', 'late')}:10000:0:30:7:5::",
        f"current:{hash_with('-6', 'early')}:19000:0:99999:7:::",
        f"alice:{hash_with('-6', 'looking-glass')}",
        f"{'u' * 255}:{hash_with('-6', long_password)}",
        "slow:" + hash_with("-6", "slow", "rounds=900000$slow"),
        "no colon here",
    ]
    path = tmp_path_factory.mktemp("accounts") / "passwords"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_config(
    password_file: Path, methods: str = "username none", rules: str = "", client_rules: str = ""
) -> str:
    """Write a configuration with accounts of its own."""
    head = HEAD.replace("socksmethod: none", f"socksmethod: {methods}")
    return (
        f"{head}login.penalty: no\npasswordfile: {password_file}\n"
        + (client_rules or CLIENT_PASS)
        + (rules or SOCKS_PASS)
    )


@pytest.fixture(scope="module")
def start(
    private_world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Server]]:
    """`start(config)` gives a server that lives as long as the module: the same one for the same text."""
    started: dict[str, Server] = {}

    def start_once(config: str) -> Server:
        if config not in started:
            started[config] = Sockd(config, tmp_path_factory.mktemp("sockd"), world=private_world)
        return started[config]

    yield start_once
    for server in started.values():
        server.close()


@pytest.fixture
def server(start: Callable[[str], Server], password_file: Path) -> Iterator[Server]:
    """A server that wants a password of everybody, and must give back what it took."""
    running = start(write_config(password_file, "username"))
    yield running
    running.check_resources()


# ------------------------------ who gets in (CVE-2024-54662) ------------------------------


def offer_nothing(client: Client, port: int) -> bool:
    return client.greet([NO_METHOD]) == NO_METHOD and client.request5(CONNECT, "127.0.0.1", port).code == 0


def offer_password(client: Client, port: int, secret: bytes = ALICE[1]) -> bool:
    if (
        client.greet([PASSWORD_METHOD]) != PASSWORD_METHOD
        or client.authenticate(ALICE[0], secret) != NO_FAULT
    ):
        return False
    return client.request5(CONNECT, "127.0.0.1", port).code == 0


def offer_wrong_password(client: Client, port: int) -> bool:
    return offer_password(client, port, b"mirror")


def ask_with_socks4(client: Client, port: int) -> bool:
    return client.request4(CONNECT, "127.0.0.1", port, b"alice").code == GRANTED


def ask_with_socks4a(client: Client, port: int) -> bool:
    return client.request4(CONNECT, "echo.test", port, b"alice").code == GRANTED


def greet_and_ask_with_socks4(client: Client, port: int) -> bool:
    return client.greet([NO_METHOD]) == NO_METHOD and ask_with_socks4(client, port)


def greet_wrongly_and_ask_with_socks4(client: Client, port: int) -> bool:
    """Send the greeting that asks for a password, and instead of one a SOCKS 4 request."""
    if client.greet([PASSWORD_METHOD]) != PASSWORD_METHOD:
        return False
    client.send(request4(CONNECT, "127.0.0.1", port))
    with contextlib.suppress(AssertionError, ConnectionResetError):
        return client.read_reply4().code == GRANTED
    return False


CLIENTS = {
    "socks4": ask_with_socks4,
    "socks4a": ask_with_socks4a,
    "socks5-none": offer_nothing,
    "socks5-user": offer_password,
    "socks5-wrong": offer_wrong_password,
    "v4-after-v5-none": greet_and_ask_with_socks4,
    "v4-after-v5-user": greet_wrongly_and_ask_with_socks4,
}
ANONYMOUS = {"socks4", "socks4a", "socks5-none", "v4-after-v5-none"}
ALLOWED = {
    "username": {"socks5-user"},
    "none": ANONYMOUS,
    "username none": ANONYMOUS | {"socks5-user"},
    "none username": ANONYMOUS | {"socks5-user"},
}


def write_at_level(password_file: Path, level: str, methods: str) -> str:
    """Write a configuration that demands methods globally, in the client-rule or in the socks-rule."""
    item = f"socksmethod: {methods}"
    if level == "global":
        return write_config(password_file, methods)
    if level == "client-rule":
        return write_config(
            password_file, client_rules=rule("client pass", "from: 0/0 to: 0/0", "log: error", item)
        )
    return write_config(password_file, rules=rule("socks pass", "from: 0/0 to: 0/0", "log: error", item))


@pytest.mark.parametrize("methods", ALLOWED)
@pytest.mark.parametrize("level", ["global", "client-rule", "socks-rule"])
def test_only_who_satisfies_the_method_gets_in(
    start: Callable[[str], Server], password_file: Path, peer: StartPeer, level: str, methods: str
) -> None:
    server, target = start(write_at_level(password_file, level, methods)), peer("echo")
    entered = set()
    for name, attempt in CLIENTS.items():
        with Client(server.addresses[0]) as client:
            if attempt(client, target.port):
                assert client.exchange(name.encode()) == name.encode()
                entered.add(name)
    assert entered == ALLOWED[methods]
    assert len(target.seen) == len(entered)


@pytest.mark.parametrize(
    ("methods", "offered", "chosen"),
    [
        ("username none", b"\0\2", 2), ("username none", b"\2\0", 2), ("username none", b"\0", 0),
        ("none username", b"\2\0", 0), ("none username", b"\2", 2), ("username", b"\0", 255),
        ("none", b"\2", 255), ("username", b"\1\3\x80\xff\2", 2), ("username none", b"", 255),
        ("username", bytes(range(255)), 2),
    ],
)  # fmt: skip
def test_method_is_the_first_of_the_servers_list_that_is_offered(
    start: Callable[[str], Server], password_file: Path, methods: str, offered: bytes, chosen: int
) -> None:
    server = start(write_config(password_file, methods))
    with Client(server.addresses[0]) as client:
        assert client.greet(offered) == chosen
        if chosen == NO_ACCEPTABLE_METHOD:
            client.expect_end()


def test_client_rule_may_spare_some_clients_the_password(
    sockd: Any, private_world: World, password_file: Path, peer: StartPeer
) -> None:
    spared = rule("client pass", "from: 127.0.0.9/32 to: 0/0", "socksmethod: none")
    others = rule("client pass", "from: 0/0 to: 0/0", "socksmethod: username")
    server = sockd(write_config(password_file, client_rules=spared + others), world=private_world)
    target = peer("echo")
    with Client(server.addresses[0], source=("127.0.0.9", 0)) as client:
        assert offer_nothing(client, target.port)
    with Client(server.addresses[0]) as client:
        assert not offer_nothing(client, target.port)
    with Client(server.addresses[0]) as client:
        assert offer_password(client, target.port)


# ------------------------------ the password file ------------------------------

ACCOUNTS = [
    pytest.param(b"alice", b"wonderland", True, id="sha512"),
    pytest.param(b"bob", b"builder", True, id="sha256"),
    pytest.param(b"current", b"early", True, id="shadow-line"),
    pytest.param(b"u" * 255, b"p" * 200, True, id="long"),
    pytest.param(b"alice", b"looking-glass", False, id="second-line-of-a-user"),
    pytest.param(b"alice", b"Wonderland", False, id="case"),
    pytest.param(b"alice", b"wonderlan", False, id="prefix"),
    pytest.param(b"alice", b"wonderland\0", False, id="nul-behind"),
    pytest.param(b"alice\0x", b"wonderland", False, id="nul-in-user"),
    pytest.param(b"alice", b"", False, id="empty-password"),
    pytest.param(b"", b"wonderland", False, id="empty-user"),
    pytest.param(b"", b"", False, id="both-empty"),
    pytest.param(b"Alice", b"wonderland", False, id="case-of-user"),
    pytest.param(b"alice ", b"wonderland", False, id="blank-behind-user"),
    pytest.param(b"nobody-here", b"x", False, id="unknown-user"),
    pytest.param(b"root", b"", False, id="system-account"),
    pytest.param(b"# accounts", b"", False, id="comment"),
    pytest.param(b"no colon here", b"", False, id="line-without-hash"),
    pytest.param(b"carol", b"singer", False, id="locked"),
    pytest.param(b"dave", b"*", False, id="star"),
    pytest.param(b"dave", b"", False, id="star-empty"),
    pytest.param(b"empty", b"", False, id="empty-hash"),
    pytest.param(b"expired", b"late", False, id="expired"),
    pytest.param(b"inactive", b"late", False, id="password-too-old"),
    pytest.param(b"x" * 255, b"y" * 255, False, id="longest"),
]


@pytest.mark.parametrize(("user", "secret", "right"), ACCOUNTS)
def test_password_opens_its_own_account_only(
    server: Server, peer: StartPeer, user: bytes, secret: bytes, right: bool
) -> None:
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
        assert (client.authenticate(user, secret) == NO_FAULT) == right
        if right:
            assert client.request5(CONNECT, "127.0.0.1", target.port).code == 0
            assert client.exchange(b"in") == b"in"
        else:
            client.expect_end()
    assert len(target.seen) == right


def test_changed_password_file_counts_after_a_reload(
    sockd: Any, private_world: World, tmp_path: Path, peer: StartPeer
) -> None:
    path, target = tmp_path / "passwords", peer("echo")
    path.write_text(f"alice:{hash_with('-6', 'old')}\n")
    server = sockd(write_config(path, "username"), world=private_world)
    with Client(server.addresses[0]) as client:
        assert offer_password(client, target.port, b"old")
        path.write_text(f"alice:{hash_with('-6', 'wonderland')}\n")
        server.reload()
        assert client.exchange(b"still in") == b"still in"
    with Client(server.addresses[0]) as client:
        assert offer_password(client, target.port)
    with Client(server.addresses[0]) as client:
        assert not offer_password(client, target.port, b"old")


def test_password_file_that_vanishes_lets_nobody_in(
    sockd: Any, private_world: World, tmp_path: Path, peer: StartPeer
) -> None:
    path, target = tmp_path / "passwords", peer("echo")
    path.write_text(f"alice:{hash_with('-6', 'wonderland')}\n")
    server = sockd(write_config(path, "username"), world=private_world)
    path.unlink()
    with Client(server.addresses[0]) as client:
        assert not offer_password(client, target.port)
        wait_for_line(server, client.address, 'could not access user "alice"\'s records')
    assert not target.seen


# ------------------------------ RFC 1929 ------------------------------


def opening(port: int, secret: bytes = ALICE[1]) -> bytes:
    """Give all that a client says before its data."""
    return (
        greeting([PASSWORD_METHOD])
        + password_message(b"alice", secret)
        + request5(CONNECT, "127.0.0.1", port)
    )


def expect_open(client: Client) -> None:
    assert client.read_method() == PASSWORD_METHOD
    assert client.read_status() == NO_FAULT
    assert client.read_reply5().code == 0


@pytest.mark.parametrize("feed", [whole, bytewise, random_splits(1929), random_splits(1928)])
def test_handshake_may_come_in_any_pieces_with_data_behind(
    server: Server, peer: StartPeer, feed: Feed
) -> None:
    target = peer("echo")
    with Client(server.addresses[0], feed) as client:
        client.send(opening(target.port) + b"early")
        expect_open(client)
        assert client.receive(5) == b"early"


def test_handshake_may_be_cut_in_two_anywhere(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    message = opening(target.port) + b"x"
    for cut in range(1, len(message)):
        with Client(server.addresses[0]) as client:
            client.send(message[:cut])
            if cut >= 3:
                assert client.read_method() == PASSWORD_METHOD  # so the rest comes by itself
            client.send(message[cut:])
            if cut < 3:
                assert client.read_method() == PASSWORD_METHOD
            assert client.read_status() == NO_FAULT
            assert client.read_reply5().code == 0
            assert client.receive(1) == b"x"


INSTEAD_OF_A_PASSWORD = {
    "request": lambda port: request5(CONNECT, "127.0.0.1", port),
    "socks4-request": lambda port: request4(CONNECT, "127.0.0.1", port),
    "greeting": lambda port: greeting([NO_METHOD]) + request5(CONNECT, "127.0.0.1", port),
    "version-0": lambda port: password_message(*ALICE, version=0) + request5(CONNECT, "127.0.0.1", port),
    "version-2": lambda port: password_message(*ALICE, version=2) + request5(CONNECT, "127.0.0.1", port),
    "version-5": lambda port: password_message(*ALICE, version=5) + request5(CONNECT, "127.0.0.1", port),
    "version-255": lambda port: password_message(*ALICE, version=255) + request5(CONNECT, "127.0.0.1", port),
    "wrong-password-and-request": lambda port: (
        password_message(b"alice", b"no") + request5(CONNECT, "127.0.0.1", port)
    ),
    "wrong-then-right": lambda port: (
        password_message(b"alice", b"no") + password_message(*ALICE) + request5(CONNECT, "127.0.0.1", port)
    ),
    "no-password-length": lambda port: b"\1\5alice",
    "longer-than-sent": lambda port: b"\1\5alice\xff" + request5(CONNECT, "127.0.0.1", port),
}


@pytest.mark.parametrize("message", INSTEAD_OF_A_PASSWORD.values(), ids=INSTEAD_OF_A_PASSWORD)
@pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "in-turn"])
def test_nothing_but_the_right_password_leads_to_a_request(
    server: Server, peer: StartPeer, message: Callable[[int], bytes], pipelined: bool
) -> None:
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        if pipelined:
            client.send(greeting([PASSWORD_METHOD]) + message(target.port))
            assert client.read_method() == PASSWORD_METHOD
        else:
            assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
            client.send(message(target.port))
        client.finish_sending()
        with contextlib.suppress(ConnectionResetError):
            assert client.receive_all() in (b"", b"\1\1")
        wait_for_line(server, client.address, "block(1): tcp/accept ]:", "error after reading ")
    assert not target.seen


def test_second_password_is_no_request(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        client.greet([PASSWORD_METHOD])
        assert client.authenticate(*ALICE) == NO_FAULT
        client.send(password_message(*ALICE) + request5(CONNECT, "127.0.0.1", target.port))
        client.expect_end_or_reset()
    assert not target.seen


# ------------------------------ rules about users ------------------------------


@pytest.mark.parametrize(
    ("item", "allowed"),
    [
        ("user: alice", {"alice"}), ("user: bob", {"bob"}), ("user: alice bob", {"alice", "bob"}),
        ("user: nobody", set()), ("group: readers", {"alice"}), ("group: bob", {"bob"}),
    ],
)  # fmt: skip
def test_rule_may_be_for_some_users(
    sockd: Any, private_world: World, password_file: Path, peer: StartPeer, item: str, allowed: set[str]
) -> None:
    only = rule("socks pass", "from: 0/0 to: 0/0", "socksmethod: username", item, "log: connect")
    server, target = sockd(write_config(password_file, "username", only), world=private_world), peer("echo")
    entered = set()
    for user, secret in (ALICE, BOB):
        with Client(server.addresses[0]) as client:
            if client.open5(CONNECT, "127.0.0.1", target.port, (user, secret)).code == 0:
                entered.add(user.decode())
    assert entered == allowed


def test_rule_for_another_user_is_passed_over(
    sockd: Any, private_world: World, password_file: Path, peer: StartPeer
) -> None:
    rules = rule("socks block", "from: 0/0 to: 0/0", "user: bob", "log: connect") + SOCKS_PASS
    server, target = sockd(write_config(password_file, "username", rules), world=private_world), peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", target.port, ALICE).code == 0
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", target.port, BOB).code == 2


def test_password_guards_udp_as_well(sockd: Any, private_world: World, password_file: Path) -> None:
    only = rule("socks pass", "from: 0/0 to: 0/0", "socksmethod: username")
    server = sockd(write_config(password_file, rules=only), world=private_world)
    with Client(server.addresses[0]) as client:
        assert client.open5(UDP_ASSOCIATE, "0.0.0.0", 0).code == 2
    with Client(server.addresses[0]) as client:
        assert client.open5(UDP_ASSOCIATE, "0.0.0.0", 0, ALICE).code == 0
        client.reset()


# ------------------------------ the log ------------------------------

# The expression of fail2ban's own filter.d/dante.conf, with its HOST as it stands there for IPv4.
FAIL2BAN = re.compile(
    r"info: block\(1\): tcp/accept \]: (?P<host>[\d.]+)\.\d+ [\d.]+: "
    r"error after reading \d+ bytes in \d+ seconds: "
    r"(?:could not access user \"[^\"]*\"'s records"
    r"|system password authentication failed for user \"[^\"]*\")"
)


@pytest.mark.parametrize("user", [b"alice", b"nobody-here"])
def test_failed_login_is_logged_as_fail2ban_expects(server: Server, user: bytes) -> None:
    with Client(server.addresses[0], source=("127.0.0.77", 0)) as client:
        client.greet([PASSWORD_METHOD])
        assert client.authenticate(user, b"guess") != NO_FAULT
        client.expect_end()
        line = wait_for_line(server, client.address, "tcp/accept ]:")
    found = FAIL2BAN.match(line)
    assert found
    assert found["host"] == "127.0.0.77"
    assert f": error after reading {3 + 3 + len(user) + 5} bytes in " in line


def test_successful_login_is_not_taken_for_a_failure(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    before = len(server.messages)  # the server is shared: an earlier client may have had the same port
    with Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port, ALICE)
        address = client.address
    wait_for_line(server, address, "tcp/accept ]:")
    eventually(lambda: any("tcp/accept ]:" in message for message in server.messages[before:]))
    ours = lines_about(server, address)
    assert not any(FAIL2BAN.match(line) for line in server.messages[before:] if line in ours)


def test_user_stands_in_the_records_of_the_request_only(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        client.open5(CONNECT, "127.0.0.1", target.port, ALICE)
        address = client.address
    wait_for_line(server, address, "tcp/accept ]:")
    named = [line.split(": ")[2] for line in lines_about(server, address) if "username%alice@" in line]
    assert named == ["tcp/connect [", "tcp/connect ]"]


FORGERIES = {
    "newline": b"eve\nNov 20 21:23:36 (1795209816.822730) sockd[1]: info: forged",
    "return": b"eve\rforged",
    "escape": b"eve\x1b[2Jforged",
    "percent": b"%s%n%x",
    "at-and-blank": b"alice@10.0.0.1.80 x -> y",
    "quote": b'alice" failed: error after reading 9 bytes',
    "backslash": b"eve\\n",
    "not-utf8": b"\xff\xfe\x80",
    "255-bytes": b"\xff" * 255,
    "bidi": "\u202eforged".encode(),
    "c1-control": b"\x9b2J",
    "line-separator": "\u2028forged\u0085".encode(),
}


@pytest.mark.parametrize("user", FORGERIES.values(), ids=FORGERIES)
def test_user_name_cannot_forge_a_record(server: Server, user: bytes) -> None:
    with Client(server.addresses[0]) as client:
        assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
        assert client.authenticate(user, b"x") != NO_FAULT
        client.expect_end()
        wait_for_line(server, client.address, "tcp/accept ]:", "could not access user ")
    check_lines_of_log(server)


@pytest.mark.parametrize(
    "user", [b"alice@10.0.0.1.80", b"e v e", b"%s%n", b"\x1b[2Jeve", b"\xff\xfe", b"\xc2\x85eve"]
)
def test_name_of_a_user_who_is_let_in_cannot_forge_a_record(
    sockd: Any, private_world: World, tmp_path: Path, peer: StartPeer, user: bytes
) -> None:
    path, target = tmp_path / "passwords", peer("echo")
    path.write_bytes(user + b":" + hash_with("-5", "odd").encode() + b"\n")
    server = sockd(write_config(path, "username"), world=private_world)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", target.port, (user, b"odd")).code == 0
        client.reset()
    line = wait_for_record(server, "tcp/connect ]:")
    assert re.search(r" -> username%[^ %@]+@127\.0\.0\.1\.\d+ 127\.0\.0\.1\.\d+ -> ", line)
    check_lines_of_log(server)


def check_lines_of_log(server: Server) -> None:
    """Check that each line of the log is one whole record of ours, with nothing unprintable."""
    lines = server.log_path.read_bytes().decode("ascii").splitlines()
    records = lines[next(n for n, line in enumerate(lines) if RECORD.fullmatch(line)) :]
    assert all(RECORD.fullmatch(line) and line.isprintable() for line in records)
    assert not any(record.message.startswith("forged") for record in server.log)


def test_no_password_is_ever_written(
    sockd: Any, private_world: World, password_file: Path, peer: StartPeer, tmp_path: Path
) -> None:
    secrets = [f"sEcReT{n}".encode() for n in range(7)]
    accounts = tmp_path / "accounts"
    accounts.write_text(f"alice:{hash_with('-6', secrets[0].decode())}\n")
    everything = "log: connect disconnect error data ioop"
    rules = rule("socks pass", "from: 0/0 to: 0/0", everything)
    config = write_config(accounts, "username", rules, rule("client pass", "from: 0/0 to: 0/0", everything))
    server, target = sockd(config, "-d", "2", world=private_world), peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "127.0.0.1", target.port, (b"alice", secrets[0])).code == 0
        client.exchange(b"payload that is logged")
        server.signal(signal.SIGUSR1)
        messages = [
            password_message(b"alice", secrets[1]),
            password_message(b"nobody-here", secrets[2]),
            password_message(b"alice", secrets[3], version=9),
            password_message(b"alice", secrets[4] + b"\0"),
            password_message(b"alice", secrets[5])[:-1],
        ]
        for message in messages:
            with Client(server.addresses[0]) as wrong:
                wrong.send(greeting([PASSWORD_METHOD]) + message)
                wrong.finish_sending()
                with contextlib.suppress(ConnectionResetError):
                    wrong.receive_all()
                wait_for_line(server, wrong.address, "tcp/accept ]:")
        with Client(server.addresses[0]) as waiting:
            waiting.greet([PASSWORD_METHOD])
            waiting.send(password_message(b"alice", secrets[6] + b"x")[:-1])
            server.signal(signal.SIGUSR1)
            server.signal(signal.SIGTERM)
            with contextlib.suppress(ConnectionResetError):
                waiting.receive_all()
    eventually(lambda: "shutting down" in server.text)
    assert "payload that is logged" in server.text
    assert "sEcReT" not in server.text


# ------------------------------ many at once ------------------------------


def test_slow_check_holds_up_nobody_else(server: Server, peer: StartPeer) -> None:
    target = peer("echo")
    with Client(server.addresses[0]) as slow, Client(server.addresses[0]) as quick:
        slow.greet([PASSWORD_METHOD])
        slow.send(password_message(b"slow", b"slow"))
        assert quick.open5(CONNECT, "127.0.0.1", target.port, BOB).code == 0
        assert quick.exchange(b"quick") == b"quick"
        assert not select.select([slow.sock], [], [], 0)[0]
        assert slow.read_status() == NO_FAULT


def test_client_that_leaves_during_its_check_is_no_trouble(server: Server) -> None:
    for leave in (Client.reset, Client.close):
        with Client(server.addresses[0]) as client:
            client.greet([PASSWORD_METHOD])
            client.send(password_message(b"slow", b"slow"))
            leave(client)
    server.check_resources()


def test_many_failures_leave_nothing_behind(server: Server) -> None:
    clients = [Client(server.addresses[0]) for _ in range(20)]
    for client in clients:
        client.greet([PASSWORD_METHOD])
        client.send(password_message(b"alice", b"guess"))
    for client in clients:
        assert client.read_status() != NO_FAULT
        client.close()
    server.check_resources()
    assert wait_for_record(server, "system password authentication failed")
