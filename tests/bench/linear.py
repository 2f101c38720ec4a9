# SPDX-License-Identifier: BSD-2-Clause
"""How cost grows with sessions, rules and listeners: it is to grow no faster than they do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import load
import processes
from servers import Running, Server
from work import Context, settled_pss_mb

SESSION_STEPS = (100, 1000, 5000)
RULE_STEPS = (10, 100, 1000)
LISTENER_STEPS = (1, 20, 200)
AT_A_TIME = 32  # sessions, where a rate is measured

# Column title -> value; every record of one series has the same columns.
Record = dict[str, float]


def session_rate(context: Context, running: Running) -> Record:
    """Return the rate of new sessions and the server's CPU time for each."""
    before = processes.cpu_seconds(running.pid)
    result = load.run_tcp(context.folder, "rate", running.port, AT_A_TIME, context.seconds)
    spent = processes.cpu_seconds(running.pid) - before
    return {
        "new sessions/s": result["per_second"],
        "CPU µs per session": spent / max(result["done"], 1) * 1e6,
    }


def grow_sessions(context: Context, server: Server) -> list[Record]:
    """Measure with more and more idle sessions beside the new ones."""
    records = []
    with Running(server, context.setup, context.folder) as running:
        empty = settled_pss_mb(running)
        with load.IdleSessions(context.folder, running.port, max(SESSION_STEPS)) as idle:
            for count in SESSION_STEPS:
                seconds = idle.open_until(count)["seconds"]
                pss = settled_pss_mb(running)
                record = {"idle sessions": float(count), "last step opened in s": seconds}
                record |= {"PSS MB": pss, "kB per session": (pss - empty) * 1e3 / count}
                records.append(record | session_rate(context, running))
    return records


def grow_rules(context: Context, server: Server) -> list[Record]:
    """Measure with more and more rules, of which only the last matches."""
    records: list[Record] = []
    for count in RULE_STEPS:
        setup = dataclasses.replace(context.setup, rules=count)
        with Running(server, setup, context.folder) as running:
            record = {"rules": float(count), "start ms": running.start_seconds * 1e3}
            records.append(record | session_rate(context, running))
    return add_rule_costs(records)


def add_rule_costs(records: list[Record]) -> list[Record]:
    """Add what each rule beyond the first record's costs a session."""
    first = records[0]
    for record in records:
        rules = record["rules"] - first["rules"]
        more = record["CPU µs per session"] - first["CPU µs per session"]
        record["CPU µs per rule"] = more / rules if rules else 0.0
    return records


def grow_listeners(context: Context, server: Server) -> list[Record]:
    """Measure with more and more listeners, of which one is used."""
    records = []
    for count in LISTENER_STEPS:
        with Running(server, context.setup, context.folder, listeners=count) as running:
            record = {"listeners": float(count), "start ms": running.start_seconds * 1e3}
            record["PSS MB"] = settled_pss_mb(running)
            records.append(record | session_rate(context, running) | idle_cpu(running))
    return records


def idle_cpu(running: Running) -> Record:
    """Return the CPU time that the server takes while nothing happens."""
    before = processes.cpu_seconds(running.pid)
    time.sleep(1)
    return {"idle CPU ms/s": (processes.cpu_seconds(running.pid) - before) * 1e3}


SERIES: dict[str, Callable[[Context, Server], list[Record]]] = {
    "sessions": grow_sessions,
    "rules": grow_rules,
    "listeners": grow_listeners,
}
