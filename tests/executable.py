"""The server as one executable and in byte code, made once for each state of what they are made of.

Run as a program it prints the path of the executable.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import py_compile
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sockd-tests"
WEEK_SECONDS = 7 * 86400
PARTS = ("sockd.py", "packaging/build", "packaging/boot.c", "packaging/contents", "packaging/sockd.spec")


class NotBuilt(Exception):
    """packaging/build has failed; the text is what it said."""


def build(folder: Path) -> str:
    """Run packaging/build for a folder and give what it prints; NotBuilt."""
    environment = {**os.environ, "SOCKD_DIST": str(folder)}
    command = [str(ROOT / "packaging" / "build")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotBuilt(f"packaging/build: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def remove_old() -> None:
    """Remove what was made of trees that nobody has tested for a week."""
    for folder in (*CACHE.glob("executable-*"), *CACHE.glob("compiled-*")):
        if time.time() - folder.stat().st_mtime > WEEK_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def make_folder(kind: str, parts: tuple[str, ...]) -> Path:
    """Make the folder for what this Python makes of the parts of this tree, and give it."""
    key = hashlib.sha256(sys.version.encode())
    for part in parts:
        key.update((ROOT / part).read_bytes())
    folder = CACHE / f"{kind}-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    return folder


@functools.cache
def find_compiled() -> Path:
    """Give sockd.py in byte code; Python takes that by the same name as well, and need not compile it.

    It keeps the code of what is imported, but not of what is run, and thousands of servers are run.
    """
    path = make_folder("compiled", ("sockd.py",)) / "sockd.py"
    if not path.exists():
        new = path.with_name(f"{os.getpid()}.new")
        py_compile.compile(str(ROOT / "sockd.py"), str(new), doraise=True)
        new.rename(path)
        remove_old()
    return path


def find_executable() -> Path:
    """Give the executable of this tree, building it if it is not there; NotBuilt."""
    folder = make_folder("executable", PARTS)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "contents").exists():
            text = build(folder)
            (folder / "contents").write_text(text)
            remove_old()
    return folder / "sockd"


if __name__ == "__main__":
    try:
        print(find_executable())
    except NotBuilt as error:
        sys.exit(str(error))
