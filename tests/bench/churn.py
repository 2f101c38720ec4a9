# SPDX-License-Identifier: BSD-2-Clause
"""A long run of sessions that end in every way, and what of it the server keeps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import load
from processes import Snapshot, take_snapshot
from servers import BenchError, Running, Server
from work import Context

SESSIONS_AT_ONCE = 64
SESSIONS_PER_SECOND = 250  # leaves half of the ports out of TIME_WAIT; see README.md
SLICE_SECONDS = 10.0
UDP_SECONDS = 1.0  # of each slice
UDP_ASSOCIATIONS, UDP_WINDOW = 16, 4
SETTLED_SECONDS = 5.0  # so long nothing may change before a server counts as settled
SETTLE_LIMIT = 90.0
LOG_LIMIT_BYTES = 100_000_000

Say = Callable[[str], None]


def counts(snapshot: Snapshot) -> tuple[int, int, int, int]:
    """Return what is counted exactly; memory never stands quite still."""
    held = snapshot
    return held.processes, held.threads, held.descriptors, held.close_wait


def settle(leader: int) -> Snapshot:
    """Wait until the counts have stood still for a while; return what is held then."""
    snapshot = take_snapshot(leader)
    begin = changed = time.monotonic()
    while time.monotonic() < min(changed + SETTLED_SECONDS, begin + SETTLE_LIMIT):
        time.sleep(0.5)
        later = take_snapshot(leader)
        if counts(later) != counts(snapshot):
            changed = time.monotonic()
        snapshot = later
    return snapshot


def bound_log(running: Running) -> None:
    """Empty a log that has become large; servers append, so they go on at its start."""
    for name in ("log", "output"):
        path = running.folder / name
        if path.exists() and path.stat().st_size > LOG_LIMIT_BYTES:
            path.write_bytes(b"")


def churn_slice(context: Context, running: Running, seconds: float) -> dict[str, int]:
    """Let sessions come and go for so long, then UDP associations; return the counts."""
    totals = load.run_churn(context.folder, running.port, SESSIONS_AT_ONCE, seconds, SESSIONS_PER_SECOND)
    if running.server.has_config:
        udp = load.run_udp(context.folder, running.port, UDP_ASSOCIATIONS, UDP_WINDOW, UDP_SECONDS)
        totals |= {"echoes": udp["done"], "datagrams lost": udp["lost"]}
    bound_log(running)
    return totals


def run_churn(context: Context, server: Server, seconds: float, say: Say) -> dict[str, Any]:
    """Churn for `seconds`; return what was held at the start, after a first slice, at the end.

    A server grows to its working size in the first slice; what it holds after that slice is
    what the end is to be compared with.
    """
    totals: dict[str, int] = {}
    during = []
    with Running(server, context.setup, context.folder) as running:
        start = settle(running.pid)
        churn_slice(context, running, min(SLICE_SECONDS, seconds))
        warm = settle(running.pid)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            result = churn_slice(context, running, min(SLICE_SECONDS, left))
            totals = {key: totals.get(key, 0) + value for key, value in result.items()}
            during.append(take_snapshot(running.pid))
            say(f"churn {server.name}: {left:.0f} s left, {during[-1]}")
        if running.process is None or running.process.poll() is not None:
            raise BenchError(f"{server.name} ended during the churn run")
        final = settle(running.pid)
    moments = {"start": start, "after the first slice": warm, "end": final}
    return {
        "seconds": seconds,
        "totals": totals,
        "moments": {name: dataclasses.asdict(moment) for name, moment in moments.items()},
        "during": [dataclasses.asdict(moment) for moment in during],
    }
