"""The versions of Python that the source runs on: 3.10 to 3.14."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import CONNECT, Client
from servers import IS_EXECUTABLE, SOCKD, Server, Sockd

CONFIG = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
clientmethod: none
socksmethod: none
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
"""
TREE = ast.parse(SOCKD.read_text())
MINORS = range(10, 15)
# Docs of Python, "What's New", sections "Removed" of 3.11 to 3.14, and what was new there.
REMOVED_NAMES = """
aifc asynchat asyncore audioop binhex cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib
nis nntplib ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib
"""
REMOVED = frozenset(REMOVED_NAMES.split())
NEWER = frozenset(("annotationlib", "compression", "tomllib"))


def imported_modules() -> Iterator[str]:
    """Yield each module that sockd.py imports."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def find_interpreter(minor: int) -> str | None:
    """Give an interpreter of a version, on the PATH or of pyenv, if there is one."""
    named = shutil.which(f"python3.{minor}")
    found = [named] if named else []
    found += map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"))
    for path in found:
        # A name of pyenv's may stand for no interpreter.
        if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    return None


@pytest.mark.parametrize("minor", [8, 9])
def test_older_version_says_what_is_needed(minor: int) -> None:
    python = find_interpreter(minor)
    if not python:
        pytest.skip(f"there is no Python 3.{minor}")
    result = subprocess.run([python, str(SOCKD), "-v"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "sockd needs Python 3.10 or newer\n"


def test_syntax_is_that_of_the_oldest_version() -> None:
    ast.parse(SOCKD.read_text(), feature_version=(3, MINORS[0]))


def test_modules_are_in_every_version() -> None:
    tops = {name.partition(".")[0] for name in imported_modules()}
    assert tops.isdisjoint(REMOVED | NEWER)
    assert tops <= sys.stdlib_module_names


@pytest.mark.parametrize("minor", MINORS, ids=lambda minor: f"3.{minor}")
def test_server_runs_without_a_warning(
    minor: int,
    lone_sockd: Callable[..., Server],
    peer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpreter = find_interpreter(minor)
    if interpreter is None or IS_EXECUTABLE:
        return  # where there is none, the two tests above have to do
    strict = ["-W", "error::DeprecationWarning", "-W", "error::SyntaxWarning"]
    monkeypatch.setattr(Sockd, "command", lambda _: [interpreter, *strict, str(SOCKD)])
    server = lone_sockd(CONFIG)
    target = peer("echo")
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, "localhost", target.port).code == 0
        client.send(b"ping")
        assert client.receive(4) == b"ping"
    assert server.stop() == 0
    assert "Warning" not in server.text
