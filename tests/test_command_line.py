"""The command line: values of options, accounts that are added, and files that are no configuration."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from servers import WITHIN, sockd_command

import sockd

CONFIG = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
clientmethod: none
socksmethod: none
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
"""


def run_options(
    *options: str | bytes, text: bytes = b"", **more: object
) -> subprocess.CompletedProcess[bytes]:
    """Run sockd with these options and this on its standard input, to its end."""
    command = [*sockd_command(), *options]
    more = {"input": text, "capture_output": True, **more}
    return subprocess.run(command, timeout=WITHIN, check=False, **more)  # type: ignore[call-overload]


def check_one_line(result: subprocess.CompletedProcess[bytes], *expected: str) -> None:
    """Check that a run has failed with one line, in which all of this stands."""
    assert (result.returncode, result.stdout or b"") == (1, b"")
    (line,) = result.stderr.decode().splitlines()
    for text in expected:
        assert text in line


# ------------------------------ values of options ------------------------------


@pytest.mark.parametrize("option", ["-f", "-p", "--chroot", "--add-user"])
def test_empty_value_is_refused(option: str, tmp_path: Path) -> None:
    path = tmp_path / "sockd.conf"
    path.write_text(CONFIG)
    result = run_options("-f", str(path), "-V", option, "")
    check_one_line(result, f"illegal value for {option} option: it is empty")


# ------------------------------ paths of the configuration ------------------------------


@pytest.mark.root
@pytest.mark.parametrize("how", ["keyword", "option"])
@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "POSIX"])
def test_paths_may_have_any_letters(how: str, locale: str, as_root: None, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + "/gefängnis-".encode() + b"\xff"
    os.mkdir(folder)
    accounts, path = os.fsencode(tmp_path) + "/kennwörter".encode(), tmp_path / "sockd.conf"
    by_keyword = b"chroot: " + folder + b"\n" if how == "keyword" else b""
    path.write_bytes(by_keyword + b"passwordfile: " + accounts + b"\n" + CONFIG.encode())
    by_option = ["--chroot", folder] if how == "option" else []
    environment = {**os.environ, "LC_ALL": locale}
    added = run_options("-f", str(path), *by_option, "--add-user", "alice", text=b"secret\n", env=environment)
    assert (added.returncode, added.stderr) == (0, b"")
    with open(accounts, "rb") as file:
        assert file.read().startswith(b"alice:$")
    assert sorted(os.listdir(os.fsencode(tmp_path))) == sorted(
        map(os.path.basename, (folder, accounts, b"sockd.conf"))
    )


# ------------------------------ accounts ------------------------------


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """A configuration with a password file, that is not there yet, in a folder of its own."""
    (tmp_path / "accounts").mkdir()
    path = tmp_path / "sockd.conf"
    path.write_text(f"passwordfile: {tmp_path}/accounts/users\n{CONFIG}")
    return path


def list_accounts(config_path: Path) -> list[str]:
    """Name what is in the folder of the password file."""
    return sorted(os.listdir(config_path.parent / "accounts"))


def add_user(config_path: Path, name: str | bytes, text: bytes = b"secret\n", **more: object) -> object:
    return run_options("-f", str(config_path), "--add-user", name, text=text, **more)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        (" alice", b"secret\n", "neither begins nor ends with a blank"),
        ("alice ", b"secret\n", "neither begins nor ends with a blank"),
        ("\talice", b"secret\n", "neither begins nor ends with a blank"),
        ("a:b", b"secret\n", "a user name has"),
        ("alice", b"sec\0ret\n", "a password has no NUL"),
        ("alice", b"", "standard input has no password"),
        ("alice", b"\n", "a password has 1 to 255 bytes"),
        ("alice", b"x" * 256, "a password has 1 to 255 bytes"),
    ],
    ids=repr,
)
def test_account_that_nobody_could_use_is_refused(
    config_path: Path, name: str, text: bytes, expected: str
) -> None:
    check_one_line(add_user(config_path, name, text), expected)
    assert list_accounts(config_path) == []


def test_account_is_added_behind_a_link_and_leaves_the_others(config_path: Path) -> None:
    real, link = config_path.parent / "real", config_path.parent / "accounts" / "users"
    real.write_bytes(b"alice :$old\r\n alice:$old\n#alice:no\nbob:$bob")
    real.chmod(0o640)
    link.symlink_to("../real")
    result = add_user(config_path, "alice")
    assert (result.returncode, result.stderr) == (0, b"")
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    *kept, last = real.read_bytes().splitlines(keepends=True)
    assert kept == [b"alice :$old\r\n", b"#alice:no\n", b"bob:$bob\n"]
    assert sockd.check_password(sockd.parse_account_lines(last)[b"alice"], b"", b"secret", 0)


@pytest.mark.parametrize("call", ["fchmod", "fchown", "fsync", "replace"])
def test_account_that_cannot_be_written_leaves_nothing_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "users"
    path.write_text("bob:$bob\n")

    def fail(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(sockd.os, call, fail)
    with pytest.raises(OSError, match="mount the directory"):
        sockd.add_account(str(path), b"alice", b"secret")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["users"]
    assert path.read_text() == "bob:$bob\n"


@pytest.mark.root
def test_password_file_that_is_mounted_is_explained(config_path: Path, as_root: None) -> None:
    users = config_path.parent / "accounts" / "users"
    users.touch()
    script = f'mount --bind {users} {users} && exec "$@"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *sockd_command()]
    result = subprocess.run(
        [*command, "-f", str(config_path), "--add-user", "alice"],
        input=b"secret\n",
        capture_output=True,
        check=False,
    )
    check_one_line(result, str(users), "mount the directory")
    assert list_accounts(config_path) == ["users"]


def test_account_has_a_name_that_cannot_be_shown(config_path: Path) -> None:
    result = add_user(config_path, b"al\xefce", env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"user al\\udcefce written" in result.stdout


def test_account_is_there_where_its_success_cannot_be_shown(config_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        result = add_user(config_path, "alice", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (result.returncode, len(result.stderr.splitlines())) == (0, 1)
    assert list_accounts(config_path) == ["users"]


def test_password_cannot_be_asked_for_where_standard_input_is_closed(config_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *sockd_command()]
    result = subprocess.run(
        [*command, "-f", str(config_path), "--add-user", "alice"], capture_output=True, check=False
    )
    check_one_line(result, "standard input has no password")


def type_password(config_path: Path, keys: list[bytes]) -> tuple[int, bytes]:
    """Answer each question at a terminal with these keys; give exit status and what is on the screen."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs have it ignored
        command = [*sockd_command(), "-f", str(config_path), "--add-user", "alice"]
        os.execvp(command[0], command)
    screen = b""
    while True:
        if not select.select([terminal], [], [], WITHIN)[0]:
            os.kill(pid, signal.SIGKILL)
        try:
            piece = os.read(terminal, 1024)
        except OSError:
            break
        screen += piece
        if keys and screen.endswith(b": "):
            time.sleep(0.2)  # getpass(3) drops what was typed before it has turned off the echo
            os.write(terminal, keys.pop(0))
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), screen


@pytest.mark.parametrize(
    "keys, status, expected",
    [
        ([b"secret\n", b"secret\n"], 0, b"user alice written"),
        ([b"secret\n", b"other\n"], 1, b"the two passwords are not the same"),
        ([b"\x03"], 1, b"error: interrupted"),
        ([b"secret\n", b"\x03"], 1, b"error: interrupted"),
        ([b"\x04"], 1, b"user not added: no password was typed"),
    ],
    ids=["right", "other", "Ctrl-C", "Ctrl-C later", "Ctrl-D"],
)
def test_password_is_typed_twice(config_path: Path, keys: list[bytes], status: int, expected: bytes) -> None:
    found, screen = type_password(config_path, list(keys))
    assert (found, b"Traceback" in screen) == (status, False), screen
    assert screen.count(expected) == 1
    assert list_accounts(config_path) == (["users"] if status == 0 else [])


# ------------------------------ output that nobody can read ------------------------------


@pytest.mark.parametrize("option", ["-L", "-h", "-v"])
@pytest.mark.parametrize("where", [">/dev/full", ">&-", "| true"], ids=["full", "closed", "gone"])
def test_output_that_cannot_be_written_is_one_line(option: str, where: str) -> None:
    # The pipe is to be gone when it is written to.
    script = f'(sleep 0.3; exec "$@" {option}) {where}' if "|" in where else f'exec "$@" {option} {where}'
    command = ["bash", "-o", "pipefail", "-c", script, "sh", *sockd_command()]
    check_one_line(
        subprocess.run(command, capture_output=True, check=False), "cannot write to standard output"
    )


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full"])
def test_complaint_that_cannot_be_written_is_no_traceback(where: str, tmp_path: Path) -> None:
    path = tmp_path / "sockd.conf"
    path.write_text(CONFIG.replace("from: 0/0", "from: 192.0.2.1"))  # a warning: no mask
    command = ["sh", "-c", f'exec "$@" {where}', "sh", *sockd_command()]
    for options, status in (("-V", "-f", str(path)), 0), (("-Z",), 1), (("-f", "/nonexistent"), 1):
        result = subprocess.run([*command, *options], capture_output=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (status, b"", b"")


# ------------------------------ what is not there yet ------------------------------


def find_warnings(path: Path, *options: str) -> list[str]:
    """Run -V over a good file and give the first lines of what it warns of."""
    result = run_options("-V", "-f", str(path), *options)
    assert (result.returncode, result.stdout) == (0, b"")
    return [line for line in result.stderr.decode().splitlines() if not line.startswith(" ")]


def test_check_warns_of_what_a_start_would_miss(tmp_path: Path) -> None:
    path, jail = tmp_path / "sockd.conf", tmp_path / "jail"
    path.write_text(
        f"chroot: {jail}\npasswordfile: {tmp_path}/users\n"
        f"logoutput: stderr {tmp_path}/lögs/all\nerrorlog: {tmp_path}/lögs/errors\n"
        + CONFIG.replace("127.0.0.1 port", "192.0.2.7 port")
    )
    where = {line.split(":")[0]: number for number, line in enumerate(path.read_text().splitlines(), 1)}
    unable = "Cannot assign requested address"
    assert find_warnings(path) == [
        f"{path}:{where[keyword]}:1: warning: {text}"
        for keyword, text in (
            ("internal", f"cannot listen on 192.0.2.7.0: {unable}"),
            ("chroot", f'cannot chroot to "{jail}": there is no such directory'),
            ("passwordfile", f'there is no password file "{tmp_path}/users" yet'),
            (
                "logoutput",
                f'cannot open logfile "{tmp_path}/lögs/all": there is no directory {tmp_path}/lögs',
            ),
            (
                "errorlog",
                f'cannot open logfile "{tmp_path}/lögs/errors": there is no directory {tmp_path}/lögs',
            ),
        )
    ]
    jail.mkdir()
    (tmp_path / "lögs").mkdir()
    (tmp_path / "users").touch()
    path.write_text(path.read_text().replace("192.0.2.7", "127.0.0.1"))
    assert find_warnings(path) == []
    assert find_warnings(path, "--chroot", f"{jail}/x") == [
        f'warning: cannot chroot to "{jail}/x": there is no such directory'
    ]


# ------------------------------ files that are no configuration ------------------------------


def check_file(path: Path | str, **more: object) -> subprocess.CompletedProcess[bytes]:
    return run_options("-V", "-f", str(path), **more)


def test_configuration_may_come_through_a_pipe() -> None:
    assert check_file("/dev/stdin", text=CONFIG.encode()).returncode == 0


@pytest.mark.parametrize("name", ["zero", "null", "urandom"])
def test_device_is_no_configuration(name: str) -> None:
    check_one_line(check_file(f"/dev/{name}"), f"could not open config file /dev/{name}: it is a device")


def test_file_of_any_size_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "sockd.conf"
    path.touch()
    os.truncate(path, 3 << 30)
    check_one_line(check_file(path), f"could not open config file {path}: it has more than")


def test_pipe_that_nobody_writes_to_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "sockd.conf"
    os.mkfifo(path)
    check_one_line(check_file(path), "is empty")


def test_pipe_whose_writer_says_nothing_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sockd.conf"
    os.mkfifo(path)
    monkeypatch.setattr(sockd, "CONFIG_SECONDS", 0.01)
    silent = os.open(path, os.O_RDWR)
    try:
        config, (complaint,) = sockd.read_config(sockd.Options(config_file=str(path)))
    finally:
        os.close(silent)
    assert config is None
    assert "its end has not come within" in complaint.text


def test_mark_of_utf8_at_the_beginning_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sockd.conf"
    path.write_text("\ufeff" + CONFIG, encoding="utf-8")
    assert check_file(path).returncode == 0
    path.write_text("\ufeffnonsense: 1\n" + CONFIG, encoding="utf-8")
    assert f"{path}:1:1: error: ".encode() in check_file(path).stderr


def test_daemon_whose_log_goes_nowhere_is_warned_of() -> None:
    text = "-D: logoutput names only stderr and stdout, which goes nowhere from now on"
    options = sockd.Options(daemon=True)
    for names, is_lost in (
        (("stderr", "stdout"), True), (("stderr", "syslog"), False), ((), False), (("/dev/null",), False)
    ):  # fmt: skip
        said: list[str] = []
        mother = sockd.Mother(options, sockd.Config("", logoutput=names))
        mother.log.write = lambda _, text, said=said: said.append(text)  # type: ignore[method-assign,misc]
        mother.warn_of_lost_log()
        assert any(text in line for line in said) == is_lost
