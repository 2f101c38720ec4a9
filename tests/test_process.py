"""The program as a process: command line, pid file, signals, and children that die."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import BIND, CONNECT, UDP_ASSOCIATE, Client, UdpClient
from conftest import Factory
from servers import (
    IS_EXECUTABLE,
    SOCKD,
    WITHIN,
    Server,
    Sockd,
    check_configuration,
    eventually,
    find_free_port,
    hash_password,
    need,
    parse_log,
    read_links,
    read_process,
    run_sockd,
    sockd_command,
)  # fmt: skip

import sockd as program

CONFIG = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
user.unprivileged: nobody
clientmethod: none
socksmethod: none
client pass {
    from: 0.0.0.0/0 to: 0.0.0.0/0
    log: connect disconnect error
}
socks pass {
    from: 0.0.0.0/0 to: 0.0.0.0/0
    log: connect disconnect error
}
"""
# `sockd -V` says nothing to this one.
AS_ANYBODY = CONFIG.replace("user.unprivileged: nobody\n", "")
PASS_ALL = CONFIG[CONFIG.index("socks pass") :]
REAL_TIME_SIGNAL = 40
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def run_options(*options: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run sockd with these options and nothing else, to its end."""
    command = [*sockd_command(), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, check=False, **more)


def as_nobody(command: list[str]) -> list[str]:
    """Give the command that runs `command` as an ordinary user."""
    need(os.geteuid() == 0 and shutil.which("setpriv"), "needs root and setpriv")
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", *command]


@pytest.fixture
def open_client() -> Iterator[Callable[..., Client]]:
    """`open_client(server)` connects a SOCKS client that is closed after the test."""
    with contextlib.ExitStack() as opened:
        yield lambda server: opened.enter_context(Client(server.addresses[0]))


def check_service(server: Server, peer: Callable[..., Any], index: int = 0) -> None:
    """Check that a new client is served, by name."""
    with Client(server.addresses[index]) as client:
        assert client.open5(CONNECT, "localhost", peer("echo").port).code == 0
        assert client.exchange(b"service") == b"service"


def settle(server: Server, peer: Callable[..., Any]) -> None:
    """Wait until new children have taken the place of the old ones, and take them as the baseline."""
    # Mother, resolver and worker.
    eventually(lambda: len(server.processes()) == 3)
    check_service(server, peer)
    server.take_baseline()


def count(server: Server, text: str) -> int:
    """Count the records that hold a text."""
    return sum(text in message for message in server.messages)


# ------------------------------ options ------------------------------


@pytest.mark.parametrize("options", [("-v",), ("-vv",), ("-v", "-f", "/nonexistent"), ("-vV",)], ids=" ".join)
def test_version_is_one_line_on_stdout(options: tuple[str, ...]) -> None:
    result = run_options(*options)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.match(r"sockd v\d+\.\d+\S*\.  Copyright .*\n", result.stdout)


@pytest.mark.parametrize("options", [("-h",), ("-hv",), ("-h", "-Z"), ("-vh", "extra")], ids=" ".join)
def test_help_lists_every_option_and_acts_at_once(options: tuple[str, ...]) -> None:
    result = run_options(*options)
    assert (result.returncode, result.stderr) == (0, "")
    for option in "DLNVdfhnpv":
        assert re.search(rf"^ +-{option}\b.* : ", result.stdout, re.MULTILINE), f"-{option}"
    assert "--chroot" in result.stdout


@pytest.mark.parametrize("name", ["sockd", "danted", "dante"])
def test_name_decides_which_files_are_the_default(name: str, tmp_path: Path) -> None:
    link = tmp_path / name
    link.symlink_to(os.environ.get("SOCKD") or SOCKD)
    command = [str(link)] if os.environ.get("SOCKD") else [sys.executable, str(link)]
    shown = subprocess.run([*command, "-h"], capture_output=True, text=True, check=True).stdout
    base = "danted" if name == "danted" else "sockd"
    assert f"[/etc/{base}.conf]" in shown
    assert f"[/var/run/{base}.pid]" in shown
    used = subprocess.run([*command, "-V"], capture_output=True, text=True, check=False)
    assert used.returncode == 0 or f"/etc/{base}.conf" in used.stderr


@pytest.mark.parametrize("options", [("-L",), ("-L", "-Z"), ("-Lh",)], ids=" ".join)
def test_licence_is_printed_at_once(options: tuple[str, ...]) -> None:
    result = run_options(*options)
    assert (result.returncode, result.stderr) == (0, "")
    assert (SOCKD.parent / "LICENSE").read_text().strip() in result.stdout


@pytest.mark.parametrize(
    "options, expected",
    [
        (("-Z",), "-Z"),
        (("-vZ",), "-Z"),
        (("-f",), "-f"),
        (("-V", "-p"), "-p"),
        (("--halp",), "halp"),
        (("--chroot",), "chroot"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_option_shows_the_usage_on_stderr(options: tuple[str, ...], expected: str) -> None:
    result = run_options(*options)
    assert (result.returncode, result.stdout) == (1, "")
    assert expected in result.stderr.splitlines()[0]
    assert "usage: " in result.stderr


@pytest.mark.parametrize(
    "options, expected",
    [
        (("-N", "0"), "illegal value for -N option: 0"),
        (("-N", "-1"), "illegal value for -N option: -1"),
        (("-N", "two"), "illegal value for -N option: two"),
        (("-d", "abc"), "illegal value for -d option: abc"),
        (("-d", "-1"), "illegal value for -d option: -1"),
        (("-N", "1025"), "illegal value for -N option: 1025"),
        (("-N", "\u0664"), "illegal value for -N option: "),
        (("-N", "\u00b2"), "illegal value for -N option: "),
        (("-d", "1" * 5000), "illegal value for -d option: 11111"),
        (("-d", "1000000000"), "illegal value for -d option: 1000000000"),
        (("extra",), "unknown argument extra"),
        (("-V", "--", "-f"), "unknown argument -f"),
        (("-f", "/nonexistent.conf"), "could not open config file /nonexistent.conf"),
        (("-Vf", "/nonexistent.conf"), "could not open config file /nonexistent.conf"),
        (("-f", "/"), "could not open config file /"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_value_is_refused_in_one_line(options: tuple[str, ...], expected: str) -> None:
    result = run_options(*options)
    assert (result.returncode, result.stdout) == (1, "")
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_last_config_file_wins(tmp_path: Path) -> None:
    assert check_configuration(AS_ANYBODY, tmp_path, "-f", "/nonexistent.conf").returncode == 1
    path = tmp_path / "sockd.conf"
    assert run_options("-f", "/nonexistent.conf", "-Vf", str(path)).returncode == 0


# ------------------------------ -V ------------------------------


@pytest.mark.root
def test_check_is_silent_for_an_ordinary_user(tmp_path: Path, as_root: None) -> None:
    program, path = tmp_path / "sockd.py", tmp_path / "sockd.conf"
    shutil.copy(SOCKD, program)
    path.write_text(AS_ANYBODY)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    for options in (("-V",), ("-V", "-p", "/nonexistent/pid")):
        command = as_nobody([python, "-B", str(program), *options, "-f", str(path)])
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_check_shows_every_error_with_its_place(tmp_path: Path) -> None:
    wrong = AS_ANYBODY.replace("clientmethod: none", "clientmethod: nonsense").replace(
        "external:", "extrenal:"
    )
    result = check_configuration(wrong, tmp_path)
    path = tmp_path / "sockd.conf"
    assert (result.returncode, result.stdout) == (1, "")
    assert re.search(rf"^{path}:2:1: error: ", result.stderr, re.MULTILINE)
    assert re.search(rf"^{path}:3:15: error: .*nonsense", result.stderr, re.MULTILINE)
    assert "did you mean" in result.stderr.lower()
    assert re.search(r"^ +\^", result.stderr, re.MULTILINE)


def test_check_opens_no_port_and_writes_no_pid_file(tmp_path: Path) -> None:
    need(shutil.which("strace"), "strace is missing")
    path, pid_path, trace = tmp_path / "sockd.conf", tmp_path / "pid", tmp_path / "trace"
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        path.write_text(AS_ANYBODY.replace("port = 0", f"port = {port}"))
        watch = ["strace", "-f", "-o", str(trace), "-e", "trace=network,fork,vfork,clone"]
        command = [*watch, *sockd_command(), "-V", "-f", str(path), "-p", str(pid_path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    calls = trace.read_text()
    assert "exited with 0" in calls
    assert "listen(" not in calls
    assert f"htons({port})" not in calls
    # The executable's boot process forks the server.
    assert len(re.findall(r"^\d+ +(?:v?fork|clone)", calls, re.MULTILINE)) == int(IS_EXECUTABLE)
    assert not pid_path.exists()


# ------------------------------ refused starts ------------------------------


@pytest.mark.parametrize("options", [(), ("-D",)], ids=["foreground", "daemon"])
@pytest.mark.parametrize(
    "logoutput", ["logoutput: stderr\n", "logoutput: {folder}/log\n", ""], ids=["stderr", "file", "none"]
)
def test_busy_port_is_refused_in_one_line(options: tuple[str, ...], logoutput: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        config = logoutput.format(folder=tmp_path) + CONFIG.replace("port = 0", f"port = {port}")
        result = run_sockd(config, tmp_path, "-p", str(tmp_path / "pid"), *options)
    (told,) = [line for line in result.stderr.splitlines() if ": alert: " not in line]
    assert (result.returncode, result.stdout) == (1, "")
    assert f"127.0.0.1.{port}" in told
    assert "Address already in use" in told


@pytest.mark.parametrize(
    "right, wrong, expected",
    [
        ("internal: 127.0.0.1", "internal: 192.0.2.77", "192.0.2.77"),
        ("internal: 127.0.0.1", "internal: nosuchif7", "nosuchif7"),
        ("external: 127.0.0.1", "external: 192.0.2.77", "192.0.2.77"),
        ("user.unprivileged: nobody", "user.unprivileged: nosuchuser", "nosuchuser"),
    ],
    ids=["internal", "internal-interface", "external", "user"],
)
def test_start_is_refused_when_this_machine_lacks_something(
    right: str, wrong: str, expected: str, tmp_path: Path
) -> None:
    pid_path = tmp_path / "pid"
    result = run_sockd("logoutput: stderr\n" + CONFIG.replace(right, wrong), tmp_path, "-p", str(pid_path))
    errors = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert (result.returncode, len(errors)) == (1, 1), result.stderr
    assert expected in errors[0]
    assert not pid_path.exists() or pid_path.read_text() == ""


# ------------------------------ pid file ------------------------------


def test_pid_file_holds_the_pid_and_is_removed(sockd: Factory) -> None:
    server = sockd(CONFIG)
    assert server.pid_path.read_text() == f"{server.pid}\n"
    assert server.pid_path.stat().st_mode & 0o777 == 0o644
    server.stop()
    assert not server.pid_path.exists()


def test_pid_file_is_truncated_when_it_was_longer(sockd: Factory, tmp_path: Path) -> None:
    path = tmp_path / "old.pid"
    path.write_text("1234567890\nAND MORE\n")
    server = sockd(CONFIG, "-p", str(path))
    assert path.read_text() == f"{server.pid}\n"


def test_pid_file_that_cannot_be_written_is_a_warning(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG, "-p", "/nonexistent/folder/pid")
    (warning,) = [record for record in server.log if record.level == "warning" and "pid" in record.message]
    assert "/nonexistent/folder/pid" in warning.message
    check_service(server, peer)


@pytest.mark.root
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFIFO], ids=["device", "fifo"])
def test_pid_file_that_is_none_is_a_warning_and_stays(
    kind: int, sockd: Factory, tmp_path: Path, as_root: None
) -> None:
    path = tmp_path / "pid"
    os.mknod(path, kind | 0o666, os.stat(os.devnull).st_rdev)
    server = sockd(CONFIG, "-p", str(path))
    warning = f"warning: could not open pidfile {path} for writing: not a regular file"
    assert warning in server.messages
    assert server.stop() == 0
    assert stat.S_IFMT(path.stat().st_mode) == kind


def test_pid_file_of_a_later_server_stays(sockd: Factory) -> None:
    first = sockd(CONFIG)
    first.pid_path.unlink()
    second = sockd(CONFIG, "-p", str(first.pid_path))
    assert first.stop() == 0
    assert first.pid_path.read_text() == f"{second.pid}\n"


def test_start_that_fails_late_leaves_no_pid_file(tmp_path: Path) -> None:
    pid_path, conf = tmp_path / "pid", tmp_path / "sockd.conf"
    conf.write_text(f"logoutput: stderr\n{CONFIG}")
    options = ["-f", str(conf), "-p", str(pid_path), "-N", "20"]  # more than there are descriptors for
    command = ["prlimit", "--nofile=24:24", *sockd_command(), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, check=False)
    assert result.returncode == 1
    assert "cannot start the processes that serve" in result.stderr
    assert not pid_path.exists()


def test_second_instance_is_refused_in_one_line(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    server = sockd(CONFIG)
    (tmp_path / "second").mkdir()
    result = run_sockd(CONFIG, tmp_path / "second", "-p", str(server.pid_path))
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert str(server.pid) in line
    assert server.pid_path.read_text() == f"{server.pid}\n"
    check_service(server, peer)


def test_pid_file_that_no_server_locks_is_made_anew(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    """Anybody who may read it can lock what a server that was killed has left."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    path = tmp_path / "left.pid"
    path.write_text(f"{ended.pid}\n")
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        server = sockd(CONFIG, "-p", str(path))
        assert path.read_text() == f"{server.pid}\n"
        check_service(server, peer)


def test_pid_file_stays_locked_after_reload(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG)
    server.reload(changed(CONFIG))
    with server.pid_path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    settle(server, peer)


# ------------------------------ -D ------------------------------


def test_daemon_leaves_the_terminal_but_not_the_directory(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    server = sockd(f"logoutput: {tmp_path}/log\n{CONFIG}", "-D")
    process = read_process(server.pid)
    assert process is not None
    assert process.session == server.pid
    for descriptor in (0, 1, 2):
        assert os.readlink(f"/proc/{server.pid}/fd/{descriptor}") == os.devnull
    assert os.readlink(f"/proc/{server.pid}/cwd") == str(Path.cwd())
    assert re.search(r"^Umask:\s+0022$", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
    check_service(server, peer)


@pytest.mark.root
def test_daemon_alone_holds_what_its_caller_waits_for(sockd: Factory, tmp_path: Path, as_root: None) -> None:
    server = sockd(f"logoutput: {tmp_path}/log\n{CONFIG}", "-D")

    def count_pipes() -> list[int]:
        every = [read_links(process.pid) for process in server.processes()]
        return sorted(sum(link.startswith("pipe:") for link in links) for links in every)

    # The resolver has none, and the others one each, which wakes them.
    eventually(lambda: count_pipes() == [0, 1, 1])


@pytest.mark.root
@pytest.mark.parametrize("options", [(), ("-D",)], ids=["foreground", "daemon"])
def test_what_the_caller_left_open_is_in_no_process(
    options: tuple[str, ...],
    sockd: Factory,
    peer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_root: None,
) -> None:
    """And the configuration may come from there."""
    secret = tmp_path / "secret"
    secret.write_text("of the caller")
    config = f"logoutput: {tmp_path}/log\n{CONFIG}"
    script = (
        f"exec \"$@\" -f /dev/fd/8 9<{secret} 8<<'END'\n{config}END\n"  # a pipe, or a file without a name
    )
    launcher = ["sh", "-c", script, "sh", *sockd_command()]
    monkeypatch.setattr(Sockd, "command", lambda _: launcher)
    server = sockd(config, *options)
    held = [read_links(process.pid) for process in server.processes()]
    assert len(held) == 3 and all(held)
    assert not [links for links in held if str(secret) in links]
    check_service(server, peer)
    server.reload()  # what it came from is gone
    assert count(server, "config not reloaded") == 1
    check_service(server, peer)


@pytest.mark.parametrize("is_slow", [False, True], ids=["quick", "slow"])
def test_daemon_detaches_only_when_it_serves(is_slow: bool, tmp_path: Path) -> None:
    pid_path, log_path, conf = tmp_path / "pid", tmp_path / "log", tmp_path / "sockd.conf"
    port = find_free_port()
    conf.write_text(f"logoutput: {log_path}\n" + CONFIG.replace("port = 0", f"port = {port}"))
    command = [*sockd_command(), "-D", "-f", str(conf), "-p", str(pid_path)]
    if is_slow:
        need(shutil.which("strace"), "strace is missing")
        delay = ["-e", "trace=setsid", "-e", "inject=setsid:delay_enter=300000"]  # microseconds
        command = ["strace", "-D", "-f", "-qq", "-o", str(tmp_path / "trace"), *delay, *command]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=WITHIN, check=False).returncode == 0
    # No waiting from here on: what init scripts do next must work.
    written = pid_path.read_text()
    try:
        with Client(("127.0.0.1", port)) as client:
            assert client.greet() == 0
    finally:
        pid = int(written or eventually(pid_path.read_text))
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: has_ended(pid))
    assert written == f"{pid}\n"
    assert parse_log(log_path.read_text())[-1].message == "mother[1/1]: shutting down"


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-"], ids=str)
@pytest.mark.parametrize("options", [(), ("-D",)], ids=["foreground", "daemon"])
def test_standard_descriptors_may_be_closed_at_the_start(
    closed: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    pid_path, log_path, conf = tmp_path / "pid", tmp_path / "log", tmp_path / "sockd.conf"
    conf.write_text(f"logoutput: {log_path}\n{CONFIG}")
    command = [*sockd_command(), "-f", str(conf), "-p", str(pid_path), *options]
    with subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *command], start_new_session=True):
        eventually(lambda: log_path.exists() and " running\n" in log_path.read_text())
        pid = int(eventually(pid_path.read_text))
        try:
            found = re.search(r"listening on 127.0.0.1.(\d+)", log_path.read_text())
            assert found
            with Client(("127.0.0.1", int(found[1]))) as client:
                assert client.greet() == 0
        finally:
            os.kill(pid, signal.SIGTERM)
            eventually(lambda: has_ended(pid))
    assert "Traceback" not in log_path.read_text()


def has_ended(pid: int) -> bool:
    """Tell whether a process is gone, or waits only to be buried."""
    process = read_process(pid)
    return process is None or process.state == "Z"


# ------------------------------ other options at work ------------------------------


def keepalive_timers(server: Server) -> list[bool]:
    """Tell of each established connection from the server's port whether a keep-alive timer runs."""
    lines = Path(f"/proc/{server.pid}/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    established = [row for row in rows if row[3] == "01" and row[1].endswith(f":{server.port:04X}")]
    return [row[5].startswith("02:") for row in established]


@pytest.mark.parametrize("options, kept_alive", [((), True), (("-n",), False)], ids=["default", "-n"])
def test_n_turns_keepalive_off(
    options: tuple[str, ...],
    kept_alive: bool,
    sockd: Factory,
    peer: Callable[..., Any],
    open_client: Callable[..., Client],
) -> None:
    server = sockd(CONFIG, *options)
    client = open_client(server)
    assert client.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 0
    eventually(lambda: keepalive_timers(server) == [kept_alive])


def test_n_servers_run_side_by_side(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG, "-N", "3")
    eventually(lambda: count(server, " running") == 3)
    assert all(count(server, f"server[{number}/3]") == 1 for number in (1, 2, 3))
    assert len({record.pid for record in server.log if record.message.endswith(" running")}) == 3
    server.take_baseline()
    for _ in range(6):
        check_service(server, peer)


def test_start_does_not_walk_over_all_possible_descriptors(
    lone_sockd: Callable[..., Server],
    peer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need(shutil.which("strace"), "strace is missing")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    need(before[1] >= 8192, "the limit of open files is too low to tell")
    calls = []
    for most in (512, before[1]):
        trace = tmp_path / f"trace{most}"
        limited = ["prlimit", f"--nofile={most}:{most}", "strace", "-f", "-qq", "-o", str(trace)]
        traced = [*limited, "-e", "trace=close,close_range,fcntl,dup2", *sockd_command()]
        monkeypatch.setattr(Sockd, "command", lambda _, traced=traced: traced)
        server = lone_sockd(CONFIG)
        check_service(server, peer)
        server.signal(signal.SIGTERM)
        server.kill()
        calls.append(len(trace.read_text().splitlines()))
    assert calls[0] > 0
    assert abs(calls[0] - calls[1]) < 512


def test_descriptor_limit_is_raised_as_far_as_allowed(
    lone_sockd: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = ["prlimit", "--nofile=300:700", *sockd_command()]
    monkeypatch.setattr(Sockd, "command", lambda _: limited)
    server = lone_sockd(CONFIG)
    for process in server.processes():
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"^Max open files +700 +700 ", limits, re.MULTILINE)


# ------------------------------ the end ------------------------------


class Crowd:
    """A server's clients in every phase: negotiating, connected, waiting for a peer, and UDP."""

    def __init__(self, server: Server, peer: Callable[..., Any], opened: contextlib.ExitStack) -> None:
        self.negotiating = opened.enter_context(Client(server.addresses[0]))
        assert self.negotiating.greet() == 0
        self.connected = opened.enter_context(Client(server.addresses[0]))
        assert self.connected.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 0
        assert self.connected.exchange(b"12345") == b"12345"
        self.waiting = opened.enter_context(Client(server.addresses[0]))
        assert self.waiting.open5(BIND, "127.0.0.1", 0).code == 0
        self.associated = opened.enter_context(Client(server.addresses[0]))
        relay = self.associated.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
        address = (relay.host, relay.port)
        udp = opened.enter_context(UdpClient())
        udp.send(address, "127.0.0.1", peer("udp-echo").port, b"123")
        assert udp.receive(address).data == b"123"

    def expect_ends(self) -> None:
        """Check that every client is told that it is over."""
        for client in (self.negotiating, self.connected, self.waiting, self.associated):
            client.expect_end_or_reset()


def check_end(server: Server, crowd: Crowd, number: int) -> None:
    """Check how a server ends that a signal has told to end while it has a crowd of clients."""
    status = eventually(lambda: server._popen.poll() is not None and [server._popen.returncode])
    assert status == [0]
    crowd.expect_ends()
    messages = [record.message for record in server.log]
    assert f"sigterm(): exiting on signal {number}" in messages
    assert messages[-1] == "mother[1/1]: shutting down"
    for event in ("tcp/connect", "tcp/bind", "udp/udpassociate"):
        assert sum(f"{event} [" in m for m in messages) == sum(f"{event} ]" in m for m in messages) == 1, (
            event
        )
    assert sum("tcp/accept ]" in m for m in messages) == 4
    assert any(": 5 -> " in m and "tcp/connect ]" in m for m in messages)
    assert not [m for m in messages if "unexpectedly" in m]
    assert not server.processes()


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_signal_ends_everything_and_logs_it(
    number: signal.Signals, lone_sockd: Callable[..., Server], peer: Callable[..., Any]
) -> None:
    server = lone_sockd(CONFIG)
    with contextlib.ExitStack() as opened:
        crowd = Crowd(server, peer, opened)
        server.signal(number)
        check_end(server, crowd, number)
    with pytest.raises(ConnectionRefusedError):
        server.connect()


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_signal_to_the_process_group_ends_sessions_with_their_records(
    number: signal.Signals, lone_sockd: Callable[..., Server], peer: Callable[..., Any]
) -> None:
    server = lone_sockd(CONFIG)
    with contextlib.ExitStack() as opened:
        crowd = Crowd(server, peer, opened)
        os.killpg(os.getpgid(server.pid), number)
        check_end(server, crowd, number)


def test_port_can_be_bound_again_at_once(
    lone_sockd: Callable[..., Server], sockd: Factory, peer: Callable[..., Any]
) -> None:
    first = lone_sockd(CONFIG)
    with contextlib.ExitStack() as opened:
        Crowd(first, peer, opened)
        first.signal(signal.SIGTERM)
        eventually(lambda: first._popen.poll() is not None)
        second = sockd(CONFIG.replace("port = 0", f"port = {first.port}"))
        second.addresses = first.addresses
        check_service(second, peer)


# ------------------------------ reload ------------------------------


def changed(config: str, seconds: int = 77) -> str:
    """Give a configuration that differs, so that a reload replaces the workers."""
    return f"timeout.negotiate: {seconds}\n{config}"


def test_reload_leaves_a_live_session_its_rule_and_log_flags(
    sockd: Factory, peer: Callable[..., Any], open_client: Callable[..., Client]
) -> None:
    server = sockd(CONFIG)
    echo = peer("echo")
    old = open_client(server)
    assert old.open5(CONNECT, "127.0.0.1", echo.port).code == 0
    silent = PASS_ALL.replace("    log: connect disconnect error\n", "")
    block = f"socks block {{\n    from: 0.0.0.0/0 to: 127.0.0.1/32 port = {echo.port}\n    log: connect\n}}\n"
    server.reload(CONFIG.replace(PASS_ALL, block + silent))
    server.addresses = server.addresses[:1]

    refused = open_client(server)
    assert refused.open5(CONNECT, "127.0.0.1", echo.port).code == 2
    eventually(lambda: count(server, "block(1): tcp/connect ]") == 1)
    unlogged = open_client(server)
    assert unlogged.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 0
    assert unlogged.exchange(b"new") == b"new"
    unlogged.finish_sending()
    unlogged.expect_end()

    assert old.exchange(b"still") == b"still"
    old.finish_sending()
    old.expect_end()
    eventually(lambda: count(server, "pass(1): tcp/connect ]: 5 -> ") == 1)
    assert count(server, "tcp/connect [") == 1
    assert count(server, "pass(2)") == 0


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda text: text.replace("external:", "extrenal:"), r"{path}:3:1: .*extrenal"),
        (lambda text: text.replace("socks pass {", "socks pass"), r"{path}:1[23]:\d+: "),
        (lambda text: text.replace("127.0.0.1 port = 0", "127.0.0.1 port = x y"), r"{path}:2:\d+: "),
        (
            lambda text: text.replace("external: 127.0.0.1", "external: 192.0.2.77"),
            r"{path}:3:\d+: .*192\.0\.2\.77",
        ),
        (lambda text: text.replace("internal: 127.0.0.1", "internal: 192.0.2.77"), r"192\.0\.2\.77"),
        (lambda text: "", r"{path} is empty"),
        (None, r"{path}: No such file or directory"),
    ],
    ids=["word", "syntax", "value", "external", "unbindable", "empty", "missing"],
)  # fmt: skip
def test_reload_keeps_the_rules_when_the_file_is_broken(
    change: Callable[[str], str] | None, expected: str,
    sockd: Factory, peer: Callable[..., Any], open_client: Callable[..., Client],
) -> None:  # fmt: skip
    server = sockd(CONFIG)
    old = open_client(server)
    assert old.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 0
    good = server.config_path.read_text()
    server.config_path.unlink()
    if change is not None:
        server.config_path.write_text(change(good))
    server.reload()
    errors = [str(record) for record in server.log if record.level == "error"]
    pattern = expected.format(path=re.escape(str(server.config_path)))
    assert any(re.search(pattern, error) for error in errors), errors
    assert count(server, "config reloaded.  ") == 0
    check_service(server, peer)
    assert old.exchange(b"still") == b"still"

    server.config_path.write_text(changed(good))
    server.reload()
    assert count(server, "config reloaded.  ") == 1
    check_service(server, peer)
    assert old.exchange(b"still") == b"still"


def test_reload_of_the_same_configuration_costs_nothing(
    sockd: Factory, peer: Callable[..., Any], open_client: Callable[..., Client]
) -> None:
    server = sockd(CONFIG)
    client = open_client(server)
    assert client.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 0
    server.reload()
    client.close()
    eventually(lambda: count(server, "tcp/accept ]") == 1)
    server.take_baseline()
    for _ in range(5):
        server.reload()
        check_service(server, peer)


def listener_inode(port: int) -> str:
    """Give the inode of the socket that listens on a port of 127.0.0.1; "" if none does."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return next((row[9] for row in rows if row[3] == "0A" and row[1] == f"0100007F:{port:04X}"), "")


def test_reload_adds_keeps_and_removes_listeners(
    sockd: Factory, peer: Callable[..., Any], open_client: Callable[..., Client]
) -> None:
    server = sockd(CONFIG)
    kept = server.addresses[0]
    inode = listener_inode(kept[1])
    assert inode
    more = CONFIG.replace("port = 0\n", "port = 0\ninternal: 127.0.0.2 port = 0\n", 1)
    server.reload(more)
    (added,) = server.addresses
    assert added[0] == "127.0.0.2"
    assert listener_inode(kept[1]) == inode
    server.addresses = [kept, added]
    for index in (0, 1):
        check_service(server, peer, index)
    old = Client(added)
    assert old.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 0

    server.reload(CONFIG)
    server.addresses = [kept]
    assert listener_inode(kept[1]) == inode

    def is_refused() -> bool:
        try:
            socket.create_connection(added).close()
        except ConnectionRefusedError:
            return True
        return False

    eventually(is_refused)
    check_service(server, peer)
    assert old.exchange(b"still") == b"still"
    old.close()


def test_reload_that_removes_every_used_address_works(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG)
    server.reload(CONFIG.replace("internal: 127.0.0.1", "internal: 127.0.0.3"))
    assert server.addresses[0][0] == "127.0.0.3"
    check_service(server, peer)


def test_reload_storm_loses_no_client(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG)
    echo = peer("echo")
    storm_over = threading.Event()
    served: list[int] = []
    failures: list[str] = []

    def use() -> None:
        while not storm_over.is_set():
            try:
                with Client(server.addresses[0]) as client:
                    assert client.open5(CONNECT, "127.0.0.1", echo.port).code == 0
                    assert client.exchange(b"storm") == b"storm"
                served.append(1)
            except (AssertionError, OSError) as error:
                failures.append(repr(error))
                return

    clients = [threading.Thread(target=use) for _ in range(3)]
    for thread in clients:
        thread.start()
    for number in range(50):
        write_whole(server.config_path, changed(f"logoutput: stderr\n{CONFIG}", 60 + number // 2))
        server.signal(signal.SIGHUP)
        if number % 2:
            least = len(served) + 1
            eventually(lambda least=least: len(served) >= least or failures)  # type: ignore[misc]
    eventually(lambda: count(server, "SIGHUP [") == count(server, "SIGHUP ]"))
    storm_over.set()
    for thread in clients:
        thread.join()
    assert not failures
    assert len(served) >= 25
    assert read_process(server.pid)
    settle(server, peer)


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that nobody reads half of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def test_old_worker_ends_with_its_last_session(
    sockd: Factory, peer: Callable[..., Any], open_client: Callable[..., Client]
) -> None:
    server = sockd(CONFIG)
    old_worker = next(record.pid for record in server.log if record.message.endswith(" running"))
    client = open_client(server)
    assert client.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 0
    server.reload(changed(CONFIG))
    check_service(server, peer)
    assert read_process(old_worker)
    assert client.exchange(b"x") == b"x"
    client.close()
    eventually(lambda: read_process(old_worker) is None)
    assert count(server, "unexpectedly") == 0


def test_sessions_of_an_old_worker_end_with_their_records_at_sigterm(
    lone_sockd: Callable[..., Server], peer: Callable[..., Any]
) -> None:
    server = lone_sockd(CONFIG)
    with contextlib.ExitStack() as opened:
        crowd = Crowd(server, peer, opened)
        server.reload(changed(CONFIG))
        server.signal(signal.SIGTERM)
        check_end(server, crowd, signal.SIGTERM)


# ------------------------------ report ------------------------------


def test_usr1_reports_processes_and_sessions(
    sockd: Factory, peer: Callable[..., Any], open_client: Callable[..., Client]
) -> None:
    server = sockd(CONFIG)
    echo = peer("echo")
    connected, negotiating = open_client(server), open_client(server)
    assert connected.open5(CONNECT, "127.0.0.1", echo.port).code == 0
    assert connected.exchange(b"abc") == b"abc"
    assert negotiating.greet() == 0
    server.signal(signal.SIGUSR1)
    host, port = connected.address
    target = f"127.0.0.1.{echo.port}"
    eventually(lambda: any(f"{host}.{port} " in m and target in m for m in since_report(server)))
    host, port = negotiating.address
    eventually(lambda: any(f"{host}.{port} " in m and "negotiating" in m for m in since_report(server)))
    report = since_report(server)
    assert re.search(r"\bup \d+ days?, \d+:\d\d", "\n".join(report))
    assert re.search(r"worker up .*, a: \d+, .*c: 2\b", "\n".join(report))
    assert connected.exchange(b"abc") == b"abc"


def since_report(server: Server) -> list[str]:
    """Give the records from the report on."""
    messages = server.messages
    starts = [n for n, message in enumerate(messages) if "workers: " in message or " up " in message]
    return messages[starts[0] :] if starts else []


# ------------------------------ children that die ------------------------------


def find_children(server: Server) -> list[int]:
    """Give the pids of the mother's children, the oldest first."""
    return sorted(p.pid for p in server.processes() if p.parent == server.pid)


def find_worker(server: Server) -> int:
    """Give the pid of the newest worker."""
    return [record.pid for record in server.log if record.message.endswith(" running")][-1]


def test_killed_worker_is_replaced(
    sockd: Factory, peer: Callable[..., Any], open_client: Callable[..., Client]
) -> None:
    server = sockd(CONFIG)
    client = open_client(server)
    assert client.open5(CONNECT, "127.0.0.1", peer("echo").port).code == 0
    worker = find_worker(server)
    os.kill(worker, signal.SIGKILL)
    client.expect_end_or_reset()
    check_service(server, peer)
    eventually(lambda: count(server, f"warning: worker {worker} exited unexpectedly on signal SIGKILL") == 1)
    assert find_worker(server) != worker
    eventually(lambda: len(server.processes()) == 3 and count(server, " running") == 2)
    server.take_baseline()


def test_killed_helpers_are_replaced(sockd: Factory, peer: Callable[..., Any], tmp_path: Path) -> None:
    accounts = tmp_path / "accounts"
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    config = CONFIG.replace("socksmethod: none", f"passwordfile: {accounts}\nsocksmethod: username")
    server = sockd(config)
    helpers = [pid for pid in find_children(server) if pid != find_worker(server)]
    assert len(helpers) == 2
    for pid in helpers:
        os.kill(pid, signal.SIGKILL)
    echo = peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "localhost", echo.port, (b"ann", b"sesame")).code == 0
        assert client.exchange(b"x") == b"x"
    for kind in ("resolver", "warden"):
        pattern = rf"warning: {kind} (\d+) exited unexpectedly on signal SIGKILL"
        assert any(re.fullmatch(pattern, message) for message in server.messages), kind
    assert read_process(find_worker(server))
    assert len(find_children(server)) == 3
    server.take_baseline()


def test_children_that_a_signal_without_a_name_kills_are_replaced(
    sockd: Factory, peer: Callable[..., Any], tmp_path: Path
) -> None:
    accounts = tmp_path / "accounts"
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    server = sockd(CONFIG.replace("socksmethod: none", f"passwordfile: {accounts}\nsocksmethod: username"))
    children = find_children(server)
    for pid in children:
        os.kill(pid, REAL_TIME_SIGNAL)
    assert len(children) == 3
    eventually(lambda: count(server, f"exited unexpectedly on signal {REAL_TIME_SIGNAL}") == 3)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "localhost", peer("echo").port, (b"ann", b"sesame")).code == 0
    for kind in ("worker", "resolver", "warden"):
        assert count(server, f"warning: {kind} ") == 1
    server.take_baseline()


def test_one_of_three_workers_is_replaced(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG, "-N", "3")
    eventually(lambda: count(server, " running") == 3)
    first = find_worker(server)
    os.kill(first, signal.SIGKILL)
    check_service(server, peer)
    eventually(lambda: count(server, " running") == 4)
    numbers = re.findall(r"server\[(\d)/3\]", "\n".join(server.messages))
    assert sorted(numbers[:3]) == ["1", "2", "3"]
    server.take_baseline()


def test_no_process_outlives_the_mother(lone_sockd: Callable[..., Server], peer: Callable[..., Any]) -> None:
    server = lone_sockd(CONFIG)
    with contextlib.ExitStack() as opened:
        crowd = Crowd(server, peer, opened)
        server.signal(signal.SIGKILL)
        eventually(lambda: not server.processes())
        crowd.expect_ends()
    second = lone_sockd(CONFIG.replace("port = 0", f"port = {server.port}"), "-p", str(server.pid_path))
    assert server.pid_path.read_text() == f"{second.pid}\n"


def test_no_zombie_is_left_by_anything(sockd: Factory, peer: Callable[..., Any], tmp_path: Path) -> None:
    accounts = tmp_path / "accounts"
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    server = sockd(CONFIG.replace("socksmethod: none", f"passwordfile: {accounts}\nsocksmethod: username"))
    echo = peer("echo")
    for password in (b"sesame", b"wrong", b"sesame"):
        with Client(server.addresses[0]) as client:
            assert client.greet([2]) == 2
            assert (client.authenticate(b"ann", password) == 0) == (password == b"sesame")
            if password == b"sesame":
                assert client.request5(CONNECT, "localhost", echo.port).code == 0
    eventually(lambda: not [p for p in server.processes() if p.state == "Z"])
    server.reload(changed(server.config_path.read_text()))
    eventually(lambda: not [p for p in server.processes() if p.state == "Z"])
    eventually(lambda: len(server.processes()) == 4 and count(server, " running") == 2)
    server.take_baseline()


def test_error_in_the_mothers_loop_is_logged_and_leaves_no_pid_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: program.Mother) -> int:
        raise RuntimeError("a bug")

    said: list[str] = []
    monkeypatch.setattr(program, "keep_only", lambda _: None, raising=False)
    monkeypatch.setattr(program.Mother, "start", program.Mother.take_pidfile)
    monkeypatch.setattr(program.Mother, "run", fail)
    monkeypatch.setattr(program.Log, "write", lambda _, level, text: said.append(f"{level}: {text}"))
    path = tmp_path / "pid"
    assert program.serve(program.Options(pidfile=str(path)), program.Config("")) == 1
    assert re.fullmatch(r"error: internal error: RuntimeError at .*: a bug", "".join(said))
    assert not path.exists()
