# SPDX-License-Identifier: BSD-2-Clause
"""The rows of the table and the tasks that fill them.

A task runs against one fresh server and fills one row or several; so a server never carries
what an earlier task left behind.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import load
import processes
from servers import Running, Server, Setup, listens

IDLE_STEPS = (60, 100, 1000, 3000)
QUICK_IDLE_STEPS = (60, 100, 1000)
STARTS = 3  # per round; the row takes their median
SETTLE_SECONDS = 0.3  # until a server has done what it does after the last event
FORK_SECONDS = 0.5  # from the open port to the last forked worker
ORDERLY_SECONDS = 20.0  # enough for danted to meet the end of the port range

Values = dict[str, float]


@dataclass(frozen=True)
class Goal:
    """What sockd is to reach: a ratio to danted, to danted-batch as well, or a value."""

    ratio: float | None = None
    batch_ratio: float | None = None
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    key: str
    title: str
    unit: str
    less_is_better: bool = False
    has_ratio: bool = True
    goal: Goal = Goal()


@dataclass(frozen=True)
class Context:
    """What every task needs to know."""

    folder: Path
    seconds: float
    sockd_args: tuple[str, ...]
    idle_steps: tuple[int, ...]
    is_apart: bool

    @property
    def setup(self) -> Setup:
        return Setup(sockd_args=self.sockd_args, is_apart=self.is_apart)


@dataclass(frozen=True)
class Task:
    """A measurement; `run` gives a value for each of `rows`."""

    rows: tuple[Row, ...]
    run: Callable[[Context, Server], Values]
    sessions: bool = False  # run it for servers that are measured in the session rows only
    udp: bool = False


# ---- the tasks ----


def session_task(sessions: int, goal: float) -> Task:
    """Return the task that counts new sessions, so many at a time."""
    key = f"sessions.{sessions}"

    def run(context: Context, server: Server) -> Values:
        with Running(server, context.setup, context.folder) as running:
            result = load.run_tcp(context.folder, "rate", running.port, sessions, context.seconds)
        return {key: result["per_second"], f"{key}.errors": result["errors"]}

    title = f"new sessions/s, {sessions} at a time"
    row = Row(key, title, "/s", goal=Goal(ratio=goal, batch_ratio=1.3))
    return Task((row,), run, sessions=True)


def measure_sessions(context: Context, sessions: int, port: int, servers: list[Running]) -> tuple[float, ...]:
    """Return new sessions a second, the CPU seconds that servers take for each, and errors."""
    before = [processes.cpu_seconds(server.pid) for server in servers]
    result = load.run_tcp(context.folder, "rate", port, sessions, context.seconds)
    spent = sum(map(processes.cpu_seconds, (server.pid for server in servers))) - sum(before)
    count = max(result["per_second"] * context.seconds, 1.0)
    return result["per_second"], spent / count, result["errors"]


def hops_task(sessions: int, goal: float) -> Task:
    """Return the task that tells how much more sessions through two servers cost than through one."""
    key, cpu_key = f"hops.{sessions}", f"hops.cpu.{sessions}"

    def run(context: Context, server: Server) -> Values:
        if not server.has_config:
            return {}
        with Running(server, context.setup, context.folder / "last") as last:
            one, one_cpu, errors = measure_sessions(context, sessions, last.port, [last])
            via = f" from: 0/0 to: 0/0 via: 127.0.0.1 port = {last.port}"
            setup = dataclasses.replace(
                context.setup, objects=("route {", via, " proxyprotocol: socks_v5", "}")
            )
            with Running(server, setup, context.folder / "first") as first:
                two, two_cpu, more = measure_sessions(context, sessions, first.port, [first, last])
        return {key: one / max(two, 1.0), cpu_key: two_cpu / one_cpu, f"{key}.errors": errors + more}

    title = f"two hops, in those of one, {sessions} at a time"
    rows = (
        Row(key, f"time of sessions through {title}", "x", True, goal=Goal(value=goal)),
        Row(cpu_key, f"CPU of sessions through {title}", "x", True),
    )
    return Task(rows, run)


def orderly_task(sessions: int, goal: float) -> Task:
    """Return the task that counts new sessions when targets close in order, as real ones do."""
    key = f"orderly.{sessions}"

    def run(context: Context, server: Server) -> Values:
        seconds = max(ORDERLY_SECONDS, context.seconds)
        with Running(server, context.setup, context.folder) as running:
            result = load.run_tcp(context.folder, "orderly", running.port, sessions, seconds)
        return {key: result["per_second"], f"{key}.errors": result["errors"]}

    title = f"new sessions/s, {sessions} at a time, TIME_WAIT left, {ORDERLY_SECONDS:g} s"
    return Task((Row(key, title, "/s", goal=Goal(ratio=goal, batch_ratio=1.3)),), run, sessions=True)


def orderly_tasks() -> list[Task]:
    """Return the rows of --orderly: the goals were set by figures that were taken like this."""
    return [orderly_task(1, goal=1.6), orderly_task(32, goal=5.0), orderly_task(256, goal=8.0)]


def bulk_task(streams: int) -> Task:
    """Return the task that measures bulk and what CPU time the server takes for it."""
    key, cpu_key = f"bulk.{streams}", f"cpu.{streams}"

    def run(context: Context, server: Server) -> Values:
        with Running(server, context.setup, context.folder) as running:
            before = processes.cpu_seconds(running.pid)
            result = load.run_tcp(context.folder, "bulk", running.port, streams, context.seconds)
            spent = processes.cpu_seconds(running.pid) - before
        values = {key: result["mb_per_second"], f"{key}.errors": result["errors"]}
        if result["bytes"]:
            values[cpu_key] = spent / (result["bytes"] / 1e9)
        return values

    plural = "stream" if streams == 1 else "streams"
    rows = (
        Row(key, f"bulk, {streams} {plural}", "MB/s", goal=Goal(ratio=1.6)),
        Row(cpu_key, f"CPU per GB in bulk, {streams} {plural}", "s", True, goal=Goal(ratio=0.6)),
    )
    return Task(rows, run)


def ping_task(sessions: int) -> Task:
    """Return the task that counts 64-byte round trips."""
    key = f"ping.{sessions}"

    def run(context: Context, server: Server) -> Values:
        with Running(server, context.setup, context.folder) as running:
            result = load.run_tcp(context.folder, "ping", running.port, sessions, context.seconds)
        return {key: result["per_second"], f"{key}.errors": result["errors"]}

    title = f"64-byte round trips/s, {sessions} session{'s' if sessions > 1 else ''}"
    return Task((Row(key, title, "/s", goal=Goal(ratio=1.0)),), run)


def udp_task(associations: int, window: int) -> Task:
    """Return the task that counts UDP echoes and the datagrams lost."""
    key = f"udp.{associations}"

    def run(context: Context, server: Server) -> Values:
        with Running(server, context.setup, context.folder) as running:
            result = load.run_udp(context.folder, running.port, associations, window, context.seconds)
        return {key: result["per_second"], f"{key}.loss": result["loss_percent"]}

    title = f"{associations} association{'s' if associations > 1 else ''}, {window} in flight"
    rows = (
        Row(key, f"UDP echoes/s, {title}", "/s", goal=Goal(ratio=1.0)),
        Row(f"{key}.loss", f"UDP loss, {title}", "%", True, has_ratio=False),
    )
    return Task(rows, run, udp=True)


def settled_pss_mb(running: Running) -> float:
    time.sleep(SETTLE_SECONDS)
    return processes.pss_bytes(running.pid) / 1e6


def measure_first_pss(context: Context, server: Server) -> Values:
    """Measure the memory after start, before any client; of sockd with one worker."""
    setup = dataclasses.replace(context.setup, sockd_args=(*context.sockd_args, "-N", "1"))
    with Running(server, setup, context.folder, is_ready=listens) as running:
        time.sleep(FORK_SECONDS)
        return {"pss.start": settled_pss_mb(running)}


def measure_idle_pss(context: Context, server: Server) -> Values:
    """Measure the memory with more and more idle sessions."""
    values = {}
    with Running(server, context.setup, context.folder) as running:
        most = max(context.idle_steps)
        with load.IdleSessions(context.folder, running.port, most) as idle:
            for count in context.idle_steps:
                idle.open_until(count)
                values[f"pss.{count}"] = settled_pss_mb(running)
    return values


def measure_start(context: Context, server: Server) -> Values:
    """Measure the time from the start of the program to its first answer."""
    times = []
    for _ in range(STARTS):
        with Running(server, context.setup, context.folder) as running:
            times.append(running.start_seconds * 1e3)
    return {"start": statistics.median(times)}


# ---- the table ----

PSS_GOALS = {60: Goal(ratio=1.0), 3000: Goal(ratio=0.11)}
START_PSS_ROW = Row("pss.start", "PSS at start (sockd: -N 1)", "MB", True, goal=Goal(value=18))
START_ROW = Row("start", "start to first answer", "ms", True, goal=Goal(value=120))


def idle_row(count: int) -> Row:
    goal = PSS_GOALS.get(count, Goal())
    return Row(f"pss.{count}", f"PSS with {count:,} idle sessions", "MB", True, goal=goal)


def make_tasks(idle_steps: tuple[int, ...]) -> list[Task]:
    """Return all the tasks of the table, in its order."""
    return [
        session_task(1, goal=1.6),
        session_task(32, goal=5.0),
        session_task(256, goal=8.0),
        hops_task(32, goal=2.2),
        bulk_task(1),
        bulk_task(8),
        ping_task(1),
        ping_task(64),
        udp_task(1, 32),
        udp_task(64, 4),
        Task((START_PSS_ROW,), measure_first_pss),
        Task(tuple(idle_row(count) for count in idle_steps), measure_idle_pss),
        Task((START_ROW,), measure_start),
    ]


def applies(task: Task, server: Server) -> bool:
    """Return whether the server takes part in the task."""
    if server.sessions_only:
        return task.sessions
    return server.has_config or not task.udp  # microsocks knows no UDP
