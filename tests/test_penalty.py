"""Who guesses passwords is slowed down, by source, and nobody else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import login_peers
import pytest
from client import CONNECT, Client
from conftest import Factory
from servers import Server, World, eventually, hash_password

import sockd as program

CONFIG = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
passwordfile: {accounts}
socksmethod: username
login.penalty: {penalty}
client pass {{ from: 0/0 to: 0/0 }}
socks pass {{ from: 0/0 to: 0/0 }}
"""
FREE = program.FREE_FAILURES


def fail(failures: program.Failures, host: str, times: int, now: float = 0.0) -> list[bool]:
    return [failures.note(host, now) for _ in range(times)]


def test_first_failures_are_free() -> None:
    failures = program.Failures()
    assert not any(fail(failures, "192.0.2.1", FREE - 1))
    assert failures.claim("192.0.2.1", 0.0) == 0.0


def test_each_later_login_waits_its_turn() -> None:
    failures = program.Failures()
    assert fail(failures, "192.0.2.1", FREE)[-1]
    waits = [failures.claim("192.0.2.1", 0.0) for _ in range(4)]
    assert waits == [n * program.PENALTY_SECONDS for n in range(4)]


def test_who_would_wait_too_long_takes_no_turn() -> None:
    failures = program.Failures()
    fail(failures, "192.0.2.1", FREE)
    waits = [failures.claim("192.0.2.1", 0.0) for _ in range(100)]
    assert max(waits) <= program.MOST_WAIT_SECONDS + program.PENALTY_SECONDS
    assert failures.claim("192.0.2.1", 50.0) == 0.0


def test_failures_are_forgotten_after_a_quiet_time() -> None:
    failures = program.Failures()
    fail(failures, "192.0.2.1", FREE)
    assert failures.claim("192.0.2.1", program.FORGET_SECONDS) == 0.0
    assert fail(failures, "192.0.2.1", 1, program.FORGET_SECONDS) == [False]


def test_other_sources_do_not_wait() -> None:
    failures = program.Failures()
    fail(failures, "192.0.2.1", FREE)
    failures.claim("192.0.2.1", 0.0)
    assert failures.claim("192.0.2.1", 0.0) > 0
    assert failures.claim("192.0.2.2", 0.0) == 0.0


def test_addresses_of_one_ipv6_network_are_one_source() -> None:
    failures = program.Failures()
    for number in range(FREE):
        failures.note(f"2001:db8::{number + 1:x}", 0.0)
    failures.claim("2001:db8::1", 0.0)
    assert failures.claim("2001:db8::ffff", 0.0) > 0
    assert failures.claim("2001:db8:0:1::1", 0.0) == 0.0


def test_table_of_sources_is_bounded() -> None:
    failures = program.Failures()
    for number in range(program.MOST_SOURCES * 2):
        failures.note(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
    assert len(failures.sources) == program.MOST_SOURCES


def log_in(server: Server, source: str, password: bytes, port: int) -> bool:
    with Client(server.addresses[0], source=(source, 0)) as client:
        try:
            return client.open5(CONNECT, "127.0.0.1", port, (b"ann", password)).code == 0
        except AssertionError:
            return False


def slowing_line(source: str) -> str:
    return f"warning: {FREE} wrong log-ins from {source}: slowing it down"


def fail_until_slowed(server: Server, source: str) -> None:
    """Guess as often as is free, and wait until that has been counted, as all before it has been."""
    for _ in range(FREE):
        assert not log_in(server, source, b"wrong", 1)
    eventually(lambda: slowing_line(source) in server.messages)


def test_log_in_that_cannot_be_checked_is_not_a_guess(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    accounts, away = tmp_path / "accounts", tmp_path / "away"
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    server = sockd(CONFIG.format(accounts=accounts, penalty="yes"))
    accounts.rename(away)
    for _ in range(FREE):
        assert not log_in(server, "127.0.0.9", b"sesame", 1)
    away.rename(accounts)
    fail_until_slowed(server, "127.0.0.8")
    assert slowing_line("127.0.0.9") not in server.messages
    assert log_in(server, "127.0.0.9", b"sesame", peer("echo").port)
    fail_until_slowed(server, "127.0.0.9")


@pytest.mark.root
@pytest.mark.parametrize(
    ("module", "is_guess"),
    [
        ("pam_debug.so auth=service_err", False),
        ("pam_debug.so auth=authinfo_unavail", False),
        ("pam_no_such_module.so", False),
        ("pam_debug.so auth=auth_err", True),
        ("pam_debug.so auth=user_unknown", True),
    ],
    ids=lambda value: str(value).rpartition("=")[2],
)
def test_fault_of_pams_own_is_not_a_guess(
    sockd: Factory, private_world: World, tmp_path: Path, module: str, is_guess: bool
) -> None:
    login_peers.need_pam()
    world = login_peers.write_pam_services(private_world, tmp_path / "pam")
    for service, auth in (("sockd", module), ("wrong", "pam_deny.so")):
        lines = f"auth required {auth}\naccount required pam_permit.so\n"
        (tmp_path / "pam" / "pam.d" / service).write_text(lines)
    config = CONFIG.format(accounts="none", penalty="yes").replace("passwordfile: none\n", "")
    config = config.replace("socksmethod: username", "socksmethod: pam.username\nuser.privileged: root")
    by_source = "socks pass { from: 127.0.0.8/32 to: 0/0 pam.servicename: wrong }\nsocks pass"
    server = sockd(config.replace("socks pass", by_source), world=world)
    for _ in range(FREE):
        assert not log_in(server, "127.0.0.9", b"sesame", 1)
    fail_until_slowed(server, "127.0.0.8")
    assert (slowing_line("127.0.0.9") in server.messages) is is_guess


@pytest.mark.parametrize("penalty", ["yes", "no"])
def test_guesser_is_named_in_the_log_and_others_are_served(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path, penalty: str
) -> None:
    accounts = tmp_path / "accounts"
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    server = sockd(CONFIG.format(accounts=accounts, penalty=penalty))
    port = peer("echo").port
    for _ in range(FREE):
        assert not log_in(server, "127.0.0.9", b"wrong", port)
    assert log_in(server, "127.0.0.8", b"sesame", port)
    line = slowing_line("127.0.0.9")
    if penalty == "yes":
        eventually(lambda: line in server.messages)
    assert log_in(server, "127.0.0.9", b"sesame", port)
    assert (line in server.messages) is (penalty == "yes")
