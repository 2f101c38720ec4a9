# SPDX-License-Identifier: BSD-2-Clause
"""The load generators: built from C into a folder, run for a bounded time, read as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from servers import BenchError

SOURCES = Path(__file__).resolve().parent
GENERATORS = ("socksload", "udpload")
SPARE_SECONDS = 30.0  # beyond the run itself: opening, draining
STEP_SECONDS = 120.0  # for opening the idle sessions of one step

Result = dict[str, Any]


def build(folder: Path) -> None:
    """Compile the load generators into `folder`."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BenchError("no C compiler (cc)")
    for name in GENERATORS:
        source, program = SOURCES / f"{name}.c", folder / name
        command = [compiler, "-O2", "-Wall", "-Wno-unused", "-o", str(program), str(source)]
        subprocess.run(command, check=True)


def run(folder: Path, generator: str, seconds: float, arguments: list[str]) -> Result:
    """Return what one run of a generator prints; it is killed when it takes far too long."""
    command = [str(folder / generator), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + SPARE_SECONDS)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{generator} {' '.join(arguments)}: no end") from None
    if done.returncode != 0:
        raise BenchError(f"{generator} {' '.join(arguments)}: {done.stderr.strip()}")
    result: Result = json.loads(done.stdout)
    return result


def run_tcp(folder: Path, mode: str, port: int, sessions: int, seconds: float) -> Result:
    """Run socksload in one of its modes rate, orderly, ping and bulk."""
    return run(folder, "socksload", seconds, [mode, str(port), str(sessions), str(seconds)])


def run_churn(folder: Path, port: int, sessions: int, seconds: float, rate: float) -> Result:
    """Run socksload with sessions that end in all sorts of ways, `rate` of them a second."""
    arguments = ["churn", str(port), str(sessions), str(seconds), str(rate)]
    return run(folder, "socksload", seconds, arguments)


def run_udp(folder: Path, port: int, associations: int, window: int, seconds: float) -> Result:
    """Run udpload."""
    arguments = [str(port), str(associations), str(window), str(seconds)]
    return run(folder, "udpload", seconds, arguments)


class IdleSessions:
    """Sessions that are open and silent for the length of a `with` block."""

    def __init__(self, folder: Path, port: int, sessions_max: int) -> None:
        arguments = ["idle", str(port), str(sessions_max), str(STEP_SECONDS)]
        self.process = subprocess.Popen(
            [str(folder / "socksload"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> IdleSessions:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def open_until(self, count: int) -> Result:
        """Open sessions until so many are open; raise when not all could be established."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        result: Result = json.loads(line or '{"established": 0}')
        if result["established"] != count:
            raise BenchError(f"only {result['established']} of {count} idle sessions opened")
        return result
