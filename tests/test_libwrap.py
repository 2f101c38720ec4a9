"""tcp_wrappers: hosts.allow and hosts.deny, and `libwrap` lines in rules, beside danted's."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from more_peers import IPV4_HEAD, rule, wait_for_record
from servers import DidNotStart, Server, World, eventually, read_process, run_sockd

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]
StartPeer = Callable[..., Any]
HEAD = "user.privileged: root\nuser.unprivileged: nobody\n" + IPV4_HEAD
ACCESS = "libwrap.hosts_access: yes\n"
LIBRARY = "libwrap.so.0"
LOG = "log: connect disconnect error"


@pytest.fixture(params=["sockd", pytest.param("danted", marks=pytest.mark.dante)])
def either(request: pytest.FixtureRequest) -> Factory:
    """Start sockd, and then danted for the same."""
    factory: Factory = request.getfixturevalue(request.param)
    return factory


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Give a folder where every user can write."""
    folder = Path(tempfile.mkdtemp(prefix="sockd-libwrap-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def with_hosts(world: World, folder: Path, allow: str = "", deny: str = "") -> World:
    """Give the world these hosts.allow and hosts.deny."""
    folder.mkdir(exist_ok=True)
    files = {}
    for name, text in (("hosts.allow", allow), ("hosts.deny", deny)):
        files[f"/etc/{name}"] = folder / name
        files[f"/etc/{name}"].write_text(text)
    return dataclasses.replace(world, files={**world.files, **files})


def config(client_item: str = "", socks_item: str = "", head: str = "") -> str:
    """Write a configuration with one more item in each rule."""
    passing = ("from: 0/0 to: 0/0", LOG)
    rules = rule("client pass", *passing, client_item) + rule("socks pass", *passing, socks_item)
    return head + HEAD + rules


def is_served(server: Server, target: tuple[str, int], source: str = "127.0.0.1") -> bool:
    """Tell whether a client gets through to a target."""
    with (
        contextlib.suppress(ConnectionResetError, AssertionError),
        Client(server.addresses[0], source=(source, 0)) as client,
    ):
        return client.open5(CONNECT, *target).code == 0 and client.exchange(b"hello") == b"hello"
    return False


# ------------------------------ hosts.allow and hosts.deny ------------------------------


@pytest.mark.parametrize(
    ("allow", "deny", "served"),
    [
        ("", "", {"127.0.0.1": True, "127.0.0.5": True}),
        ("", "ALL: ALL\n", {"127.0.0.1": False}),
        ("ALL: 127.0.0.1\n", "ALL: ALL\n", {"127.0.0.1": True, "127.0.0.5": False}),
        ("", "ALL: 127.0.0.4/255.255.255.252\n", {"127.0.0.1": True, "127.0.0.5": False}),
        ("{daemon}: 127.0.0.5\nALL: ALL: DENY\n", "", {"127.0.0.1": False, "127.0.0.5": True}),
        ("other: ALL\n", "{daemon}: ALL\n", {"127.0.0.1": False}),
        ("ALL: .example.test\n", "ALL: ALL\n", {"127.0.0.1": False, "127.0.0.5": True}),
        ("ALL: ALL: nonsense\n", "", {"127.0.0.1": False}),
        ("ALL: ALL: aclexec false\n", "ALL: ALL\n", {"127.0.0.5": False}),
    ],
    ids=["none", "deny-all", "allow-one", "network", "options", "daemon", "name", "mistake", "aclexec"],
)
def test_hosts_access_decides_before_the_rules(
    either: Factory,
    peer: StartPeer,
    private_world: World,
    tmp_path: Path,
    allow: str,
    deny: str,
    served: dict[str, bool],
) -> None:
    daemon = either._kind.name
    texts = (text.format(daemon=daemon) for text in (allow, deny))
    server = either(config(head=ACCESS), world=with_hosts(private_world, tmp_path / "etc", *texts))
    target = peer("echo").address
    assert {source: is_served(server, target, source) for source in served} == served


def test_hosts_files_may_have_other_names(
    either: Factory, peer: StartPeer, private_world: World, open_folder: Path
) -> None:
    (open_folder / "yes").write_text("ALL: 127.0.0.5\n")
    (open_folder / "no").write_text("ALL: ALL\n")
    head = f"{ACCESS}libwrap.allow: {open_folder}/yes\nlibwrap.deny: {open_folder}/no\n"
    world = with_hosts(private_world, open_folder / "etc", "ALL: 127.0.0.1\nALL: ALL: DENY\n")
    server = either(config(head=head), world=world)
    target = peer("echo").address
    assert [is_served(server, target, s) for s in ("127.0.0.1", "127.0.0.5")] == [False, True]


def test_hosts_access_refuses_the_peer_of_a_bind(
    either: Factory, private_world: World, tmp_path: Path
) -> None:
    server = either(
        config(head=ACCESS), world=with_hosts(private_world, tmp_path / "etc", "", "ALL: 127.0.0.2\n")
    )
    with Client(server.addresses[0]) as client:
        bound = client.open5(BIND, "127.0.0.2", 0)
        visit = socket.create_connection((bound.host, bound.port), 10, ("127.0.0.2", 0))
        with visit:
            assert client.read_reply5().code == 2


def test_refusal_of_hosts_access_is_logged(sockd: Factory, private_world: World, tmp_path: Path) -> None:
    server = sockd(config(head=ACCESS), world=with_hosts(private_world, tmp_path / "etc", "", "ALL: ALL\n"))
    assert not is_served(server, ("127.0.0.1", 9))
    eventually(lambda: any(m.endswith(": denied by hosts_access(3)") for m in server.messages))
    assert [m for m in server.messages if "block(0): tcp/accept ]:" in m]


# ------------------------------ lines in rules ------------------------------


def test_rule_lines_are_carried_out(
    either: Factory, peer: StartPeer, private_world: World, open_folder: Path
) -> None:
    out = open_folder / "out"
    lines = [f"libwrap: nice 5: spawn echo {word} %a %h %d >> {out}" for word in ("client", "socks")]
    server = either(config(*lines), world=private_world)
    assert is_served(server, peer("echo").address, "127.0.0.5")
    name = either._kind.name
    wanted = [f"{word} 127.0.0.5 client.example.test {name}" for word in ("client", "socks")]
    assert out.read_text().splitlines() == wanted


@pytest.mark.parametrize("kind", ["client", "socks"])
def test_rule_line_is_carried_out_under_a_block(
    either: Factory, private_world: World, open_folder: Path, kind: str
) -> None:
    out = open_folder / "out"
    text = config().replace(f"{kind} pass {{", f"{kind} block {{\n    libwrap: spawn echo %a >> {out}", 1)
    assert not is_served(either(text, world=private_world), ("127.0.0.1", 9))
    assert out.read_text() == "127.0.0.1\n"


def test_rule_line_is_carried_out_for_each_path_of_an_association(
    either: Factory, peer: StartPeer, private_world: World, open_folder: Path
) -> None:
    """Once for the request, once for the target, once for its answers."""
    out = open_folder / "out"
    server = either(config("", f"libwrap: spawn echo %a >> {out}"), world=private_world)
    target = peer("udp-echo").address
    with Client(server.addresses[0]) as client, UdpClient() as udp:
        bound = client.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        for number in range(3):
            udp.send((bound.host, bound.port), *target, b"%d" % number)
            assert udp.receive((bound.host, bound.port)).data == b"%d" % number
    assert out.read_text() == "127.0.0.1\n" * 3


def test_peer_of_a_bind_is_what_its_line_sees(
    either: Factory, private_world: World, open_folder: Path
) -> None:
    out = open_folder / "out"
    server = either(config("", f"libwrap: spawn echo %a >> {out}"), world=private_world)
    with Client(server.addresses[0]) as client:
        bound = client.open5(BIND, "127.0.0.2", 0)
        with socket.create_connection((bound.host, bound.port), 10, ("127.0.0.2", 0)):
            assert client.read_reply5().code == 0
    assert out.read_text() == "127.0.0.1\n127.0.0.2\n"


@pytest.mark.parametrize(
    ("user", "number"), [("", "65534"), ("user.libwrap: games\n", "5")], ids=["", "games"]
)
def test_command_runs_as_user_libwrap_and_nobody_else(
    sockd: Factory, private_world: World, open_folder: Path, user: str, number: str, peer: StartPeer
) -> None:
    out = open_folder / "out"
    line = (
        f"libwrap: spawn (grep -E '^(Uid|CapEff|SigIgn|Groups)' /proc/self/status; ls /proc/self/fd) > {out}"
    )
    server = sockd(config(line, head=user), world=private_world)
    assert is_served(server, peer("echo").address)
    lines = [text.split() for text in out.read_text().splitlines()]
    assert lines[0][1:] == [number] * 4
    assert (int(lines[2][1], 16), int(lines[3][1], 16)) == (1, 0)  # libwrap itself ignores SIGHUP
    assert [text[0] for text in lines[4:]] == ["0", "1", "2", "3"]  # 3 is the folder that ls lists


def test_process_that_asks_libwrap_holds_the_connection_and_the_answer_alone(
    sockd: Factory, private_world: World, open_folder: Path, peer: StartPeer
) -> None:
    """It reads what any name server says of a client; passwords come by the warden's inbox."""
    out, gate = open_folder / "out", open_folder / "gate"
    os.mkfifo(gate)
    gate.chmod(0o666)
    log = f"logoutput: stderr {open_folder}/log\n"
    server = sockd(
        log + config(f"libwrap: spawn (echo $PPID > {out}; read line < {gate})"), world=private_world
    )
    with concurrent.futures.ThreadPoolExecutor() as pool, gate.open("r+b", buffering=0) as opened:
        served = pool.submit(is_served, server, peer("echo").address)
        try:
            asker = int(eventually(lambda: out.exists() and out.read_text()))
            links = [os.readlink(path) for path in Path(f"/proc/{asker}/fd").iterdir() if int(path.name) > 2]
        finally:
            opened.write(b"go on\n")
        assert served.result()
    # The other two are what libwrap reads its rules from.
    assert sorted(link.partition(":")[0] for link in links) == ["/memfd", "/memfd", "socket", "socket"]


def test_command_outlives_a_worker(
    sockd: Factory, private_world: World, open_folder: Path, peer: StartPeer
) -> None:
    """What goes on in the background falls to the mother, and so does what a hijacked worker leaves."""
    out = open_folder / "pid"
    server = sockd(config(f"libwrap: spawn (sleep 600 & echo $! >> {out})"), world=private_world)
    target = peer("echo").address
    assert is_served(server, target)
    command = int(out.read_text())
    try:
        worker = [record.pid for record in server.log if record.message.endswith(" running")][-1]
        os.kill(worker, signal.SIGKILL)
        wait_for_record(server, f"worker {worker} exited unexpectedly")
        eventually(lambda: (process := read_process(command)) and process.parent == server.pid)
        assert is_served(server, target)
        assert read_process(command).state == "S"  # type: ignore[union-attr]
    finally:
        for line in out.read_text().splitlines():
            os.kill(int(line), signal.SIGKILL)
    eventually(lambda: len(server.processes()) == 4)
    server.take_baseline()


def test_checking_a_line_does_nothing(
    sockd: Factory, private_world: World, open_folder: Path, peer: StartPeer
) -> None:
    """libwrap sets variables and the umask even where it is only to check."""
    out = open_folder / "out"
    text = config("", f"libwrap: spawn (umask; env) > {out}")
    never = "".join(
        rule("client pass", "from: 127.9.0.1/32 to: 0/0", f"libwrap: {line}")
        for line in ("setenv OF_ANOTHER_RULE yes", "umask 0")
    )
    server = sockd(text.replace("client pass", f"{never}client pass", 1), world=private_world)
    server.reload()
    assert "Umask:\t0022\n" in Path(f"/proc/{server.pid}/status").read_text()
    assert is_served(server, peer("echo").address)
    lines = out.read_text().splitlines()
    assert lines[0] == "0022"
    assert not [line for line in lines if line.startswith("OF_ANOTHER_RULE")]


@pytest.mark.parametrize("target", ["stderr {folder}/{name}", "{folder}/{name}"])
def test_command_has_no_log_that_a_reload_has_opened(
    sockd: Factory, private_world: World, open_folder: Path, peer: StartPeer, target: str
) -> None:
    """The warden of an older configuration is given it, as the sessions are that may still ask."""
    out = open_folder / "out"
    text = config("", f"libwrap: spawn ls -l /proc/self/fd > {out}")
    first, second = (target.format(folder=open_folder, name=name) for name in ("one", "two"))
    server = sockd(f"logoutput: {first}\n{text}", world=private_world)
    with Client(server.addresses[0]) as client:
        client.greet()
        server.config_path.write_text(f"logoutput: {second}\n{text}")
        server.signal(signal.SIGHUP)
        log = open_folder / "two"
        eventually(lambda: log.exists() and "config reloaded" in log.read_text())
        assert client.request5(CONNECT, *peer("echo").address).code == 0
    assert "pipe" not in out.read_text()
    assert not [line for line in out.read_text().splitlines() if line.endswith(("/one", "/two"))]
    eventually(lambda: len(server.processes()) == 4)
    server.take_baseline()


def test_aclexec_blocks_when_its_command_fails(sockd: Factory, private_world: World, peer: StartPeer) -> None:
    target = peer("echo").address
    for command, served in (("true", True), ("false", False)):
        server = sockd(config("", f"libwrap: aclexec {command}"), world=private_world)
        assert is_served(server, target) is served


def test_banner_is_shown(either: Factory, private_world: World, open_folder: Path) -> None:
    (open_folder / either._kind.name).write_text("Hello %a\n")
    server = either(config(f"libwrap: banners {open_folder}"), world=private_world)
    with Client(server.addresses[0]) as client:
        assert client.receive(17) == b"Hello 127.0.0.1\r\n"
        assert client.greet() == 0


def test_twist_takes_the_connection_over(sockd: Factory, private_world: World) -> None:
    server = sockd(config("libwrap: twist read line; echo got %a $line"), world=private_world)
    with Client(server.addresses[0]) as client:
        client.send(b"this\n")
        assert client.receive_all() == b"got 127.0.0.1 this\n"


# ------------------------------ the start ------------------------------


@pytest.mark.parametrize(
    "line", ["nice five", "severity no.such", "spawn", "umask 9", "user nobody-of-that-name", "twist a: nice"]
)
def test_line_that_libwrap_does_not_take_stops_the_start(
    danted: Factory, private_world: World, tmp_path: Path, line: str
) -> None:
    text = config(f"libwrap: {line}")
    found = run_sockd(text, tmp_path, "-V")
    assert found.returncode == 1
    assert found.stderr.count("error:") == 1 and line in found.stderr
    with pytest.raises(DidNotStart, match="bad libwrap line"):
        danted(text, world=private_world)


def test_missing_library_is_one_line_at_the_start(
    sockd: Factory, private_world: World, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    library = next(Path("/usr/lib").glob(f"**/{LIBRARY}")).resolve()
    world = dataclasses.replace(private_world, files={**private_world.files, str(library): empty})
    with pytest.raises(DidNotStart) as failure:
        sockd(config(head=ACCESS), world=world)
    assert str(failure.value).count("error:") == 1
    assert "the libwrap keywords need the system's libwrap (libwrap.so.0)" in str(failure.value)
    sockd(config(), world=world)  # and nobody asks for it who does not need it


@pytest.mark.parametrize("head", ["", ACCESS])
def test_library_is_loaded_only_where_it_is_needed(sockd: Factory, head: str) -> None:
    server = sockd(config(head=head))
    maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in server.processes()]
    assert {"libwrap" in text for text in maps} == {bool(head)}


def test_user_libwrap_must_be_in_reach(sockd: Factory) -> None:
    head = f"{ACCESS}user.libwrap: games\n"
    with pytest.raises(DidNotStart, match="must be root, to run libwrap"):
        sockd(config(head=head).replace("user.privileged: root", "user.privileged: daemon"))


def test_many_clients_leave_nothing(sockd: Factory, peer: StartPeer, private_world: World) -> None:
    server = sockd(config("libwrap: spawn true", head=ACCESS), world=private_world)
    target = peer("echo").address
    assert all(is_served(server, target) for _ in range(60))
    eventually(lambda: len(server.processes()) == 4)
    assert os.getpid() not in {process.pid for process in server.processes()}
