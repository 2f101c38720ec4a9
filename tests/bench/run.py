#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-2-Clause
"""Measure sockd beside danted and microsocks on this machine; see README.md in this folder."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import load
import report
from chart import make_chart
from churn import run_churn
from linear import SERIES
from prices import pay_all
from servers import SERVERS, BenchError, Server, is_installed, sockd_program
from work import (
    IDLE_STEPS,
    QUICK_IDLE_STEPS,
    Context,
    Row,
    Task,
    Values,
    applies,
    make_tasks,
    orderly_tasks,
)

DESCRIPTORS_WANTED = 65536


def say(text: str) -> None:
    """Tell how far the bench is."""
    print(text, file=sys.stderr, flush=True)


# ---- options ----


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    parser.add_argument("--rounds", type=int, help="rounds of every row (5; --quick: 1)")
    parser.add_argument("--seconds", type=float, help="length of one measurement (3; --quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small and short, for a first look")
    parser.add_argument("--servers", help=f"comma-separated, of {', '.join(SERVERS)}")
    parser.add_argument("--only", default="", metavar="REGEX", help="only rows whose key matches")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    parser.add_argument("--sockd-args", default="", metavar="ARGS", help='say "-N 4"')
    parser.add_argument("--apart", action="store_true", help="each server is a group to the scheduler")
    parser.add_argument("--orderly", action="store_true", help="also rows with TIME_WAIT, slow")
    parser.add_argument("--prices", nargs="?", const=".", default="", metavar="REGEX")
    parser.add_argument("--linear", nargs="?", const=",".join(SERIES), default="", metavar="SERIES")
    parser.add_argument("--churn", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--no-table", action="store_true", help="only --linear, --churn and --prices")
    parser.add_argument("--out", type=Path, help="folder for the results (a new one in /tmp)")
    return check_options(parser, parser.parse_args(arguments))


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """Return the options with what was left open filled in; exit when one cannot be."""
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (1.0 if options.quick else 3.0)
    for name in filter(None, options.linear.split(",")):
        if name not in SERIES:
            parser.error(f'no series "{name}" to --linear')
    return options


def choose_servers(wanted: str | None, notes: list[str]) -> list[Server]:
    """Return the servers to measure; raise when one asked for by name is missing."""
    names = wanted.split(",") if wanted else list(SERVERS)
    chosen = []
    for name in names:
        if name not in SERVERS:
            raise BenchError(f'no server "{name}"; there are {", ".join(SERVERS)}')
        if is_installed(name):
            chosen.append(SERVERS[name])
        elif wanted:
            raise BenchError(f"{name} is not installed")
        else:
            notes.append(f"{name} is not installed")
    return chosen


def choose_tasks(tasks: list[Task], only: str) -> tuple[list[Task], list[Row]]:
    """Return the tasks and the rows that the filter leaves; BenchError if that is none."""
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise BenchError(f"--only {only}: {error}") from None
    rows = [row for task in tasks for row in task.rows if pattern.search(row.key)]
    if not rows:
        raise BenchError(f"--only {only}: no row has such a key (--list lists them)")
    return [task for task in tasks if any(row in rows for row in task.rows)], rows


# ---- surroundings ----


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as we may have; servers and load generators inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(hard, DESCRIPTORS_WANTED), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return
        except (ValueError, OSError):
            continue


def end_on_signal(number: int, _frame: object) -> NoReturn:
    """Leave by way of every `with` block, so that all children are ended."""
    sys.exit(128 + number)


def cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return match[1] if match else platform.machine()


def first_line(*command: str) -> str:
    """Return the first line a command prints, "" when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter((done.stdout + done.stderr).splitlines()), "")


def describe_machine(options: argparse.Namespace) -> dict[str, str]:
    """Return what a reader must know to judge the figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "machine": f"{len(os.sched_getaffinity(0))} CPUs, {cpu_model()}, {memory:.0f} GB",
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "danted": first_line("danted", "-v"),
        "sockd": " ".join([*sockd_program(), options.sockd_args]).strip(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "measured": f"{options.rounds} round(s), each measurement {options.seconds:g} s",
    }


# ---- measuring ----


def attempt(task: Task, context: Context, server: Server, notes: list[str]) -> Values:
    """Run a task; when it fails, note why and return no values."""
    try:
        values = task.run(context, server)
    except (BenchError, OSError) as error:
        notes.append(f"{task.rows[0].title}: {server.name}: {error}")
        return {}
    for key, count in values.items():
        if key.endswith(".errors") and count:
            notes.append(f"{task.rows[0].title}: {server.name}: {count:.0f} errors")
    return values


def describe(values: Values) -> str:
    """Return the values of a task in a line, without errors that did not happen."""
    shown = {key: value for key, value in values.items() if value or not key.endswith(".errors")}
    return ", ".join(f"{key} {report.show(value)}" for key, value in shown.items()) or "failed"


def run_round(
    number: int, tasks: list[Task], servers: list[Server], context: Context, notes: list[str]
) -> dict[str, Values]:
    """Return one round: each task for each server in turn, every other round backwards."""
    measured: dict[str, Values] = {server.name: {} for server in servers}
    ordered = servers if number % 2 else servers[::-1]
    for task in tasks:
        for server in (server for server in ordered if applies(task, server)):
            values = attempt(task, context, server, notes)
            measured[server.name] |= values
            say(f"round {number} {server.name}: {describe(values)}")
    return measured


def measure_round(
    results: report.Results, tasks: list[Task], servers: list[Server], context: Context
) -> None:
    """Fill in one more round of the table."""
    number = len(results.rounds) + 1
    results.rounds.append(run_round(number, tasks, servers, context, results.notes))


def measure_linear(
    results: report.Results, names: list[str], servers: list[Server], context: Context
) -> None:
    """Fill in how cost grows; of the servers that can be configured."""
    for name in names:
        results.linear[name] = {}
        for server in (one for one in servers if one.has_config and not one.sessions_only):
            say(f"linear {name}: {server.name}")
            try:
                results.linear[name][server.name] = SERIES[name](context, server)
            except (BenchError, OSError) as error:
                results.notes.append(f"cost by {name}: {server.name}: {error}")


def measure_churn(results: report.Results, seconds: float, servers: list[Server], context: Context) -> None:
    """Fill in the churn runs."""
    for server in (one for one in servers if not one.sessions_only):
        try:
            results.churn[server.name] = run_churn(context, server, seconds, say)
        except (BenchError, OSError) as error:
            results.notes.append(f"churn: {server.name}: {error}")


def measure(options: argparse.Namespace, folder: Path) -> report.Results:
    """Return everything the options ask for."""
    notes: list[str] = []
    servers = choose_servers(options.servers, notes)
    steps = QUICK_IDLE_STEPS if options.quick else IDLE_STEPS
    extra = orderly_tasks() if options.orderly else []
    tasks, rows = choose_tasks(make_tasks(steps) + extra, options.only)
    names = [server.name for server in servers]
    results = report.Results(describe_machine(options), rows, names, notes=notes)
    sockd_args = tuple(shlex.split(options.sockd_args))
    context = Context(folder, options.seconds, sockd_args, steps, options.apart)
    load.build(folder)
    for _ in range(0 if options.no_table else options.rounds):
        measure_round(results, tasks, servers, context)
    measure_linear(results, list(filter(None, options.linear.split(","))), servers, context)
    if options.prices:
        results.prices += pay_all(context, options.prices, notes, say)
    if options.churn:
        measure_churn(results, options.churn, servers, context)
    return results


# ---- results ----


def write_results(results: report.Results, folder: Path) -> None:
    """Write the report as Markdown, JSON and SVG; print it and where it lies."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown = report.make_markdown(results)
    document: dict[str, Any] = report.make_json(results)
    (folder / "bench.md").write_text(markdown, encoding="utf-8")
    (folder / "bench.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    chart = make_chart(results)
    if chart:
        (folder / "bench.svg").write_text(chart, encoding="utf-8")
    print(markdown)
    print(f"written to {folder}")


def list_rows() -> None:
    for task in [*make_tasks(IDLE_STEPS), *orderly_tasks()]:
        for row in task.rows:
            print(f"{row.key:14} {row.title}")


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    if options.list:
        list_rows()
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_on_signal)
    raise_descriptor_limit()
    try:
        with tempfile.TemporaryDirectory(prefix="sockd-bench-") as folder:
            os.chmod(folder, 0o755)  # servers that have become nobody look into it
            results = measure(options, Path(folder))
    except (BenchError, subprocess.CalledProcessError) as error:
        say(f"run.py: {error}")
        return 1
    except KeyboardInterrupt:
        say("run.py: interrupted")
        return 130
    write_results(results, options.out or Path(tempfile.mkdtemp(prefix="sockd-bench-results-")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
