"""The server as one executable: what is in it, and all that unpacking and two processes could spoil."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import executable as builder
import pytest
from client import CONNECT, PASSWORD_METHOD, Client, password_message
from conftest import Factory
from servers import (
    SOCKD,
    WITHIN,
    Server,
    eventually,
    find_children,
    find_library,
    hash_password,
    need,
    read_process,
    run_sockd,
)

import sockd as program

CONFIG = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
clientmethod: none
socksmethod: none
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
"""
LARGEST = 4_500_000
FEW_CALLS = 300


@pytest.fixture(autouse=True)
def executable(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the executable, and have every server of the test be one."""
    if "SOCKD" in os.environ:
        return Path(os.environ["SOCKD"])
    try:
        path = builder.find_executable()
    except builder.NotBuilt as error:
        need(False, str(error))
    monkeypatch.setenv("SOCKD", str(path))
    return path


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the directory that executables are unpacked in."""
    folder = tmp_path / "unpacked"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def connect(server: Server, peer: Callable[..., Any], host: str = "localhost") -> None:
    """Connect to an echo server by name, and be sure that it is one."""
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, host, target.port).code == 0
        client.send(b"ping")
        assert client.receive(4) == b"ping"


# ------------------------------ what is in it ------------------------------


def test_executable_is_small_and_stripped(executable: Path) -> None:
    data = executable.read_bytes()
    assert len(data) <= LARGEST
    assert b".symtab" not in data and b".debug_info" not in data


def test_build_says_what_is_in_the_executable() -> None:
    made = builder.find_executable()
    printed = made.with_name("contents").read_text()
    assert f"{hashlib.sha256(made.read_bytes()).hexdigest()}  sockd" in printed
    assert "pam.__internals" in printed
    # Those of the system where it runs are used: what PAM's modules and accounts need is there.
    assert not re.search(r"lib(pam|crypt|nss|audit|cap|c|dl|pthread)[-_.]", printed)


def test_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    tree = tmp_path / "elsewhere"
    shutil.copytree(SOCKD.parent / "packaging", tree / "packaging")
    shutil.copy(SOCKD, tree)
    environment = {**os.environ, "SOCKD_DIST": str(tmp_path), "LC_ALL": "C.UTF-8"}
    subprocess.run([str(tree / "packaging" / "build")], env=environment, capture_output=True, check=True)
    assert (tmp_path / "sockd").read_bytes() == builder.find_executable().read_bytes()


def test_modules_imported_late_are_known() -> None:
    """The executable loads what is imported late before its files go: no import may be forgotten."""
    named = {*program.LATE_IMPORTS, *program.LATE_IMPORTS_OF_HELPERS, "pam.__internals"}
    before_serving = {"getpass"}
    tree = ast.parse(SOCKD.read_text())
    late = {
        alias.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    late |= {
        call.args[0].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "importlib.import_module"
        and isinstance(call.args[0], ast.Constant)
    }
    assert late - named <= before_serving


def test_needs_nothing_of_any_python(sockd: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    server = sockd(CONFIG)
    maps = Path(f"/proc/{server.pid}/maps").read_text()
    pythons = [line for line in maps.splitlines() if "python" in line]
    assert pythons and all("/_MEI" in line for line in pythons)


# ------------------------------ unpacked files ------------------------------


@pytest.mark.parametrize("options", [(), ("-D",)], ids=["foreground", "daemon"])
def test_nothing_unpacked_is_left_or_missed(
    unpacked: Path, sockd: Factory, peer: Callable[..., Any], tmp_path: Path, options: tuple[str, ...]
) -> None:
    accounts = tmp_path / "accounts"
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    config = f"logoutput: {tmp_path}/log\n" + CONFIG.replace(
        "socksmethod: none", f"passwordfile: {accounts}\nsocksmethod: username none"
    )
    server = sockd(config, *options)
    assert list(unpacked.iterdir()) == []
    connect(server, peer)
    with Client(server.addresses[0]) as client:
        assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
        client.send(password_message(b"ann", b"sesame"))
        assert client.receive(2)[1] == 0
    server.reload(config.replace("socks pass", "soks pass"))
    assert any("soks" in record.message for record in server.log)
    server.reload(f"{config}# again\n")
    connect(server, peer)


def test_killed_executable_leaves_no_files(unpacked: Path, lone_sockd: Callable[..., Server]) -> None:
    server = lone_sockd(CONFIG)
    server.kill()
    assert list(unpacked.iterdir()) == []


def test_end_of_a_check_removes_the_unpacked_files(unpacked: Path, tmp_path: Path) -> None:
    result = run_sockd(CONFIG, tmp_path, "-V")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(unpacked.iterdir()) == []


def run_in_mounts(mounts: str, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command where a script has mounted what it likes."""
    need(os.geteuid() == 0 and shutil.which("unshare"), "needs root and unshare")
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"} | variables
    script = f'set -e; {mounts} exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


NOEXEC, TINY = "mount -t tmpfs -o noexec,size=64m none", "mount -t tmpfs -o size=3m none"
WAY_OUT = "Set TMPDIR to a directory with 12 MB free where programs may run"


@pytest.mark.root
@pytest.mark.parametrize(
    ("mount", "reason"), [(NOEXEC, "is mounted noexec"), (TINY, "has 3 MB free")], ids=["noexec", "tiny"]
)
def test_unfit_directory_is_one_line_with_the_way_out(
    executable: Path, tmp_path: Path, mount: str, reason: str
) -> None:
    unfit = tmp_path / "unfit"
    unfit.mkdir()
    result = run_in_mounts(f"{mount} {unfit};", [str(executable), "-v"], TMPDIR=str(unfit))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"sockd: error: cannot unpack: {unfit} {reason}.  {WAY_OUT}\n"


@pytest.mark.root
def test_another_directory_is_taken_where_tmp_is_unfit(executable: Path, tmp_path: Path) -> None:
    copy = f"mount -t tmpfs none /mnt; cp {executable} /mnt/sockd;"
    result = run_in_mounts(f"{copy} {NOEXEC} /tmp; {TINY} /var/tmp;", ["/mnt/sockd", "-v"])
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.root
def test_chosen_directory_and_our_libraries_are_not_passed_on(
    executable: Path, sockd: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that is loaded first writes down the environment at each fork."""
    need(shutil.which("cc"), "a C compiler is missing")
    source, spy, report = tmp_path / "spy.c", tmp_path / "spy.so", tmp_path / "report"
    source.write_text(SPY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(spy), str(source)], check=True)
    report.touch()
    monkeypatch.delenv("TMPDIR", raising=False)
    for name, value in {"LD_PRELOAD": spy, "SPY_REPORT": report, "LD_LIBRARY_PATH": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    server = sockd(CONFIG)
    lines = (line.partition(" ") for line in report.read_text().splitlines())
    environment = dict(rest.split("=", 1) for pid, _, rest in lines if pid == str(server.pid))
    assert environment["LD_LIBRARY_PATH"] == str(tmp_path)
    assert "TMPDIR" not in environment
    assert not [name for name in environment if name.startswith(("_PYI", "_SOCKD", "LD_LIBRARY_PATH_"))]


SPY = """\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
extern char **environ;
pid_t fork(void)
{
    FILE *report = fopen(getenv("SPY_REPORT"), "ae");
    for (char **entry = environ; report && *entry; entry++)
        fprintf(report, "%d %s\\n", getpid(), *entry);
    if (report)
        fclose(report);
    return ((pid_t (*)(void))dlsym(RTLD_NEXT, "fork"))();
}
"""


# ------------------------------ two processes ------------------------------


def test_nobody_serves_when_the_boot_process_was_killed(
    lone_sockd: Callable[..., Server], peer: Callable[..., Any]
) -> None:
    server = lone_sockd(CONFIG)
    connect(server, peer)
    os.kill(server._popen.pid, signal.SIGKILL)
    eventually(lambda: not server.processes())
    with pytest.raises(ConnectionRefusedError):
        server.connect()
    assert server.log[-1].message == "mother[1/1]: shutting down"
    assert not server.pid_path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], ids=lambda n: n.name)
def test_boot_process_passes_the_end_on(lone_sockd: Callable[..., Server], number: signal.Signals) -> None:
    server = lone_sockd(CONFIG)
    os.kill(server._popen.pid, number)
    assert server._popen.wait(WITHIN) == 0
    assert any(f"exiting on signal {number.value}" in record.message for record in server.log)


def test_boot_process_passes_reloads_and_reports_on(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG)
    server.config_path.write_text(f"logoutput: stderr\n{CONFIG}# again\n")
    os.kill(server._popen.pid, signal.SIGHUP)
    eventually(lambda: any(record.message.startswith("SIGHUP ]: config rel") for record in server.log))
    os.kill(server._popen.pid, signal.SIGUSR1)
    eventually(lambda: any("configuration #" in record.message for record in server.log))
    connect(server, peer)


def test_boot_process_ends_with_the_status_of_the_server(tmp_path: Path) -> None:
    assert run_sockd("nonsense\n", tmp_path, "-V").returncode == 1
    assert run_sockd(CONFIG, tmp_path, "-V").returncode == 0


def test_daemon_has_no_boot_process(sockd: Factory, tmp_path: Path, peer: Callable[..., Any]) -> None:
    server = sockd(f"logoutput: {tmp_path}/log\n{CONFIG}", "-D")
    assert read_process(server._popen.pid) is None
    mother = read_process(server.pid)
    assert mother and mother.session == server.pid
    connect(server, peer)


def test_dead_worker_is_replaced(sockd: Factory, peer: Callable[..., Any]) -> None:
    server = sockd(CONFIG)
    worker = next(record.pid for record in server.log if record.message.endswith(" running"))
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: len([r for r in server.log if r.message.endswith(" running")]) == 2)
    connect(server, peer)
    eventually(lambda: len(server.processes()) == 3)
    server.take_baseline()


# ------------------------------ containers and jails ------------------------------


@contextlib.contextmanager
def container(executable: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """Run the executable as process 1 of a process namespace; give unshare, that process and the log."""
    need(os.geteuid() == 0 and shutil.which("unshare"), "needs root and unshare")
    config, log = tmp_path / "sockd.conf", tmp_path / "log"
    config.write_text(f"logoutput: {log}\n{CONFIG}")
    command = [str(executable), "-N", "1", "-f", str(config), "-p", str(tmp_path / "pid")]
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command]
    with subprocess.Popen(unshare) as running:
        try:
            eventually(lambda: log.exists() and " running" in log.read_text())
            yield running, find_children(running.pid)[0], log
        finally:
            running.kill()


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_process_1_of_a_container_ends_at_once(
    executable: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with container(executable, tmp_path) as (running, pid, log):
        os.kill(pid, number)
        before = time.monotonic()
        assert running.wait(WITHIN) == 0
        # Docker waits for ten seconds; a second is ours, the rest is for a busy machine.
        assert time.monotonic() - before < 5
        assert log.read_text().endswith("mother[1/1]: shutting down\n")


@pytest.mark.root
def test_empty_jail_is_enough(sockd: Factory, peer: Callable[..., Any], tmp_path: Path) -> None:
    jail, accounts = tmp_path / "jail", tmp_path / "accounts"
    jail.mkdir()
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    accounts.write_text(f"ann:{hash_password('sesame')}\n")
    users = f"chroot: {jail}\npasswordfile: {accounts}\nsocksmethod: username none"
    server = sockd(CONFIG.replace("socksmethod: none", users))
    (worker,) = [record.pid for record in server.log if record.message.endswith(" running")]
    assert os.readlink(f"/proc/{worker}/root") == str(jail)
    connect(server, peer)
    with Client(server.addresses[0]) as client:
        assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
        client.send(password_message("ännchen".encode(), b"wrong"))
        assert client.receive(2)[1] != 0
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "xn--bcher-kva.invalid", 80).code != 0
    server.signal(signal.SIGUSR1)
    eventually(lambda: any("configuration #" in record.message for record in server.log))


@pytest.mark.root
def test_limit_of_open_files_costs_nothing(executable: Path, tmp_path: Path) -> None:
    """Containers have been seen to set it to a billion; here it is the most that the machine allows."""
    need(shutil.which("strace") and shutil.which("prlimit"), "strace or prlimit is missing")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert most > 10 * FEW_CALLS
    config, log, pid_path, trace = (tmp_path / name for name in ("sockd.conf", "log", "pid", "trace"))
    config.write_text(f"logoutput: {log}\n{CONFIG}")
    wrapper = ["prlimit", f"--nofile={most}:{most}", "strace", "-f", "-o", str(trace), "-e", "trace=close"]
    with subprocess.Popen([*wrapper, str(executable), "-N", "1", "-f", config, "-p", pid_path]) as running:
        try:
            eventually(lambda: log.exists() and " running" in log.read_text())
            os.kill(int(pid_path.read_text()), signal.SIGTERM)
            assert running.wait(WITHIN) == 0
        finally:
            running.kill()
    assert len(re.findall(r"\bclose\(", trace.read_text())) < FEW_CALLS


@pytest.mark.root
def test_pam_is_the_systems_own(executable: Path, tmp_path: Path) -> None:
    """Where the system has no libpam, a configuration that needs it says so in one line."""
    config = tmp_path / "sockd.conf"
    config.write_text(CONFIG.replace("socksmethod: none", "socksmethod: pam.username"))
    hidden = f"mount --bind /dev/null {find_library('libpam.so.0')};"
    result = run_in_mounts(hidden, [str(executable), "-V", "-f", str(config)])
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "the pam methods need the system's libpam" in line
    assert run_in_mounts("", [str(executable), "-V", "-f", str(config)]).returncode == 0
