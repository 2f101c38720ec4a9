"""Log-ins that take long, go wrong, or are watched: PAM, ident and the process that checks passwords."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import login_peers
import pytest
from client import CONNECT, PASSWORD_METHOD, Client, password_message
from conftest import Factory
from login_peers import TOLD_HOST, Identd
from more_peers import CLIENT_PASS, IPV4_HEAD, SOCKS_PASS, rule, wait_for_line, wait_for_record
from servers import WITHIN, Server, World, eventually, find_library, read_process, sockd_command

pytestmark = pytest.mark.root
StartPeer = Callable[..., Any]

SECRET = "sEcReT-login"  # not that of other tests, which run at the same time
REFUSED = 1


@pytest.fixture(scope="module")
def login_world(private_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Give a world with accounts; `sha512` has the password `sha512-pw`."""
    login_peers.need_pam()
    return login_peers.add_accounts(private_world, tmp_path_factory.mktemp("accounts") / "etc")


def write_config(methods: str, *items: str, more: str = "") -> str:
    """Write a configuration with one socks-rule."""
    head = IPV4_HEAD.replace("socksmethod: none", f"socksmethod: {methods}")
    privileges = "user.privileged: root\nuser.unprivileged: nobody\n"
    only = rule("socks pass", "from: 0/0 to: 0/0", *items, "log: connect disconnect error")
    return head + privileges + more + CLIENT_PASS + only


def send_password(client: Client, user: str, password: str) -> None:
    """Send user and password and do not wait for the verdict."""
    assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
    client.send(password_message(user.encode(), password.encode()))


def use(server: Server, target: Any, user: str = "sha512", source: str = "127.0.0.1") -> None:
    """Log in and exchange a few bytes with an echo server."""
    login = user.encode(), f"{user}-pw".encode()
    with Client(server.addresses[0], source=(source, 0)) as client:
        assert client.open5(CONNECT, "127.0.0.1", target.port, login).code == 0
        assert client.exchange(b"served") == b"served"


# ------------------------------ what PAM is told ------------------------------


METHODS = {
    "pam.username": write_config("pam.username", "pam.servicename: told"),
    "pam.address at request": write_config("pam.address", "pam.servicename: told"),
    "pam.any at request": write_config("pam.any", "pam.servicename: told"),
    **{
        f"{method} at accept": IPV4_HEAD.replace("clientmethod: none", f"clientmethod: {method}")
        + "user.privileged: root\nuser.unprivileged: nobody\n"
        + rule("client pass", "from: 0/0 to: 0/0", "pam.servicename: told-no-user")
        + SOCKS_PASS
        for method in ("pam.address", "pam.any")
    },
}


@pytest.mark.dante
@pytest.mark.parametrize("kind", ["danted", "sockd"])
@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_pam_is_told_what_dante_tells_it(
    config: str,
    kind: str,
    request: pytest.FixtureRequest,
    login_world: World,
    tmp_path: Path,
    peer: StartPeer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DISPLAY", ":7")  # the terminal of whoever started the server is no client's
    world = login_peers.write_pam_services(login_world, tmp_path / "pam")
    server, target = request.getfixturevalue(kind)(config, world=world), peer("echo")
    for source, right in ((TOLD_HOST, True), ("127.3.2.2", False)):
        with Client(server.addresses[0], source=(source, 0)) as client:
            assert log_in_somehow(client, target.port) == right


def test_who_checks_a_password_holds_nothing_but_the_way_of_the_answer(
    login_world: World, sockd: Factory, tmp_path: Path, peer: StartPeer
) -> None:
    """A module of PAM may read a hostile server's bytes, and the warden's inbox has others' passwords."""
    world = login_peers.write_pam_services(login_world, tmp_path / "pam")
    held, see = tmp_path / "held", tmp_path / "pam" / "see"
    see.write_text(f"#!/bin/sh\nfor f in /proc/$PPID/fd/*; do readlink $f; done >{held}\n")
    see.chmod(0o755)
    server = sockd(write_config("pam.username", "pam.servicename: seen"), world=world)
    use(server, peer("echo"))
    beyond = held.read_text().split()[3:]
    assert [link.partition(":")[0] for link in beyond] == ["socket"]


def test_what_pam_said_at_accept_is_not_said_of_another_user(
    sockd: Factory, login_world: World, tmp_path: Path, peer: StartPeer
) -> None:
    config = write_config("pam.address", "pam.servicename: told-no-user", "user: sha512")
    config = config.replace("clientmethod: none", "clientmethod: pam.address")
    config = config.replace(
        CLIENT_PASS, rule("client pass", "from: 0/0 to: 0/0", "pam.servicename: told-no-user")
    )
    world = login_peers.write_pam_services(login_world, tmp_path / "pam")
    server, target = sockd(config, world=world), peer("echo")
    with Client(server.addresses[0], source=(TOLD_HOST, 0)) as client:
        assert not log_in_somehow(client, target.port)
        wait_for_line(server, client.address, 'user "sha512" failed')
    assert not target.seen


def log_in_somehow(client: Client, port: int) -> bool:
    """Connect, with a password if that is wanted; tell whether the server lets it."""
    with contextlib.suppress(AssertionError, ConnectionResetError, BrokenPipeError):
        if client.greet([0, PASSWORD_METHOD]) == PASSWORD_METHOD:
            client.authenticate(b"sha512", b"anything")
        return client.request5(CONNECT, "127.0.0.1", port).code == 0
    return False


def test_pam_without_its_library_is_one_line(tmp_path: Path, as_root: None) -> None:
    config, world = tmp_path / "sockd.conf", World({find_library("libpam.so.0"): Path("/dev/null")})
    config.write_text("logoutput: stderr\n" + METHODS["pam.username"])
    command = [*sockd_command(), "-f", str(config), "-p", str(tmp_path / "pid")]
    result = subprocess.run(world.wrap(command), capture_output=True, text=True, timeout=WITHIN, check=False)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert "libpam" in lines[0]
    assert "Traceback" not in result.stderr


def test_username_needs_no_pam(
    sockd: Factory, login_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: StartPeer
) -> None:
    package = tmp_path / "python" / "pam"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemError('imported')")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    use(sockd(write_config("username"), world=login_world), peer("echo"))


# ------------------------------ what an ident server is asked ------------------------------


@pytest.fixture
def identd(private_world: World) -> Iterator[Identd]:
    """Start ident servers: one that knows, one that does not."""
    server = Identd({"127.3.0.1": login_peers.user("sha512"), "127.3.0.2": login_peers.hang_up})
    yield server
    server.close()


@pytest.mark.parametrize("clientmethod", ["rfc931", "none"])
def test_ident_is_asked_once_from_where_the_client_came_in(
    sockd: Factory, login_world: World, identd: Identd, peer: StartPeer, clientmethod: str
) -> None:
    config = write_config("rfc931", "user: sha512").replace("internal: 127.0.0.1", "internal: 127.0.0.9")
    config = config.replace("clientmethod: none", f"clientmethod: {clientmethod}")
    if clientmethod == "none":
        config = config.replace("socksmethod: rfc931", "socksmethod: rfc931 none")
    server, target = sockd(config, world=login_world), peer("echo")
    with Client(server.addresses[0], source=("127.3.0.1", 0)) as client:
        assert client.open5(CONNECT, "127.0.0.1", target.port).code == 0
        query = f"{client.address[1]},{server.port}\r\n".encode()
    assert identd.queries == [("127.0.0.9", query)]


def test_socks4_user_is_no_proof(sockd: Factory, login_world: World, identd: Identd, peer: StartPeer) -> None:
    config = write_config("rfc931", "user: sha512").replace("socksmethod: rfc931", "socksmethod: rfc931 none")
    server, target = sockd(config, world=login_world), peer("echo")
    with Client(server.addresses[0], source=("127.3.0.2", 0)) as client:
        assert client.request4(CONNECT, "127.0.0.1", target.port, b"sha512").code != 90
    assert not target.seen


# ------------------------------ checks that take long, or end badly ------------------------------


def find_warden(server: Server) -> int | None:
    """Give the pid of the process that checks passwords: the mother's child that is root."""
    for process in server.processes():
        if process.parent == server.pid and process.state != "Z":
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{process.pid}").st_uid == 0:
                    return process.pid
    return None


def find_checks(server: Server) -> list[int]:
    """Give the pids of the password checks that are under way."""
    warden = find_warden(server)
    return [p.pid for p in server.processes() if p.parent == warden and p.state != "Z"]


@pytest.fixture
def slow_server(sockd: Factory, login_world: World, tmp_path: Path) -> Server:
    """A server whose PAM waits 2 seconds after a wrong password."""
    world = login_peers.write_pam_services(login_world, tmp_path / "pam")
    config = write_config("pam.username", "pam.servicename: slow", more="login.penalty: no\n")
    return sockd(config, world=world)


def test_fifty_wrong_logins_do_not_hold_up_a_good_one(slow_server: Server, peer: StartPeer) -> None:
    server, target = slow_server, peer("echo")
    use(server, target)
    with contextlib.ExitStack() as stack:
        sources = [(f"127.4.0.{number}", 0) for number in range(1, 51)]
        wrong = [stack.enter_context(Client(server.addresses[0], source=source)) for source in sources]
        for client in wrong:
            send_password(client, "sha512", f"{SECRET}-{client.address[0]}")
        use(server, target)
        answered = select.select([client.sock for client in wrong], [], [], 0)[0]
        assert not answered, f"{len(answered)} wrong log-ins were answered before the good one"
        assert all(client.read_status() == REFUSED for client in wrong)
    wait_for_record(server, 'pam_authenticate() for user "sha512" failed')
    eventually(lambda: not find_checks(server))
    assert SECRET not in server.text


def check_secret_is_nowhere(server: Server) -> None:
    """Check that nobody who looks at processes or logs sees a password."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        for file in ("cmdline", "comm"):
            with contextlib.suppress(OSError):
                assert SECRET.encode() not in Path("/proc", name, file).read_bytes(), f"/proc/{name}/{file}"
    for process in server.processes():
        with contextlib.suppress(OSError):
            assert SECRET.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert SECRET not in server.text


def report(server: Server) -> None:
    """Have the server log its state, and wait until it has."""
    before = sum("worker up" in message for message in server.messages)
    server.signal(signal.SIGUSR1)
    eventually(lambda: sum("worker up" in message for message in server.messages) > before)


@pytest.mark.parametrize("victim", ["warden", "check"])
def test_client_whose_check_is_killed_is_refused_and_the_next_is_served(
    slow_server: Server, peer: StartPeer, victim: str
) -> None:
    server, target = slow_server, peer("echo")
    with Client(server.addresses[0]) as client:
        send_password(client, "sha512", SECRET)
        checks = eventually(lambda: find_checks(server))
        warden = find_warden(server)
        assert warden
        report(server)
        check_secret_is_nowhere(server)
        os.kill(warden if victim == "warden" else checks[0], signal.SIGKILL)
        assert client.read_status() == REFUSED
        client.expect_end()
        wait_for_line(server, client.address, "tcp/accept ]:", 'could not check user "sha512"')
    use(server, target)
    eventually(lambda: not any(read_process(pid) for pid in checks))
    if victim == "warden":
        wait_for_record(server, "warning: ", f"warden {warden} exited unexpectedly")
    check_secret_is_nowhere(server)
    server.take_baseline()


def test_client_that_leaves_during_a_slow_check_is_no_trouble(slow_server: Server, peer: StartPeer) -> None:
    for leave in (Client.close, Client.reset):
        client = Client(slow_server.addresses[0])
        send_password(client, "sha512", SECRET)
        eventually(lambda: find_checks(slow_server))
        leave(client)
    use(slow_server, peer("echo"))
    eventually(lambda: not find_checks(slow_server))
    assert SECRET not in slow_server.text


def test_stopping_server_does_not_wait_for_a_slow_check(slow_server: Server) -> None:
    with Client(slow_server.addresses[0]) as client:
        send_password(client, "sha512", SECRET)
        eventually(lambda: find_checks(slow_server))
        slow_server.signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionResetError):
            assert client.receive_all() in (b"", b"\1\1")
    assert slow_server.stop() == 0
    eventually(lambda: not slow_server.processes())
    assert SECRET not in slow_server.text


def test_reload_during_a_slow_check_does_not_lose_it(slow_server: Server, peer: StartPeer) -> None:
    config = slow_server.config_path.read_text()
    with Client(slow_server.addresses[0]) as client:
        send_password(client, "sha512", SECRET)
        eventually(lambda: find_checks(slow_server))
        slow_server.reload("timeout.negotiate: 77\n" + config)
        assert client.read_status() == REFUSED
        wait_for_line(slow_server, client.address, 'pam_authenticate() for user "sha512" failed')
    use(slow_server, peer("echo"))
    eventually(lambda: len(slow_server.processes()) == 4)
    slow_server.take_baseline()
