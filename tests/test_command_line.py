"""The command line: values of options, accounts that are added, and files that are no configuration."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from servers import WITHIN, sockd_command

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
