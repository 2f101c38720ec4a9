# SPDX-License-Identifier: BSD-2-Clause
"""The measurements as statistics, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from linear import Record
from prices import Paid
from work import Goal, Row, Values

BASE = "danted"
BATCH = "danted-batch"


class Spread(NamedTuple):
    """A median with the least and the greatest."""

    least: float
    median: float
    most: float


@dataclass
class Results:
    """Everything measured: `rounds[n][server][row key]`, and the extra sections."""

    machine: dict[str, str]
    rows: list[Row]
    servers: list[str]
    rounds: list[dict[str, Values]] = field(default_factory=list)
    linear: dict[str, dict[str, list[Record]]] = field(default_factory=dict)
    churn: dict[str, dict[str, Any]] = field(default_factory=dict)
    prices: list[Paid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# ---- statistics ----


def spread(values: list[float]) -> Spread | None:
    """Return the spread of the values, None when there are none."""
    return Spread(min(values), statistics.median(values), max(values)) if values else None


def value_spread(results: Results, server: str, key: str) -> Spread | None:
    """Return the spread of one row over all rounds."""
    found = [one[server][key] for one in results.rounds if key in one.get(server, {})]
    return spread(found)


def ratio_spread(results: Results, server: str, base: str, key: str) -> Spread | None:
    """Return the spread of the ratios to `base`, each taken within one round."""
    ratios = []
    for one in results.rounds:
        value, divisor = one.get(server, {}).get(key), one.get(base, {}).get(key)
        if value is not None and divisor:
            ratios.append(value / divisor)
    return spread(ratios)


# ---- numbers as text ----


def show(value: float) -> str:
    """Return a number with three significant digits or so.

    >>> [show(n) for n in (0.0, 3.0, 0.0421, 1.5, 17.26, 1234.5)]
    ['0', '3', '0.042', '1.50', '17.3', '1,234']
    """
    if float(value).is_integer():
        return f"{value:,.0f}"
    for limit, digits in ((0.1, 3), (10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def show_spread(found: Spread | None) -> str:
    """Return "median (leasttomost)", or a dash."""
    if found is None:
        return "–"
    return f"{show(found.median)} ({show(found.least)}–{show(found.most)})"


def show_table(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table whose columns but the first are flush right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) + "\n"


# ---- goals ----


def judge(row: Row, found: Spread | None, limit: float, unit: str) -> str:
    """Return the goal with a word on whether the median reaches it."""
    sign = "≤" if row.less_is_better else "≥"
    text = f"{sign} {limit:g}{unit}"
    if found is None:
        return text
    met = found.median <= limit if row.less_is_better else found.median >= limit
    return f"{text}: {'met' if met else '**missed**'}"


def show_goal(results: Results, row: Row) -> str:
    """Return what sockd is to reach in this row, and whether it does."""
    goal: Goal = row.goal
    if goal.value is not None:
        return judge(row, value_spread(results, "sockd", row.key), goal.value, f" {row.unit}")
    if goal.ratio is not None:
        return judge(row, ratio_spread(results, "sockd", BASE, row.key), goal.ratio, "")
    return ""


# ---- Markdown ----


def row_cells(results: Results, row: Row) -> list[str]:
    """Return one line of the main table."""
    title = row.title if row.unit == "/s" else f"{row.title}, {row.unit}"
    cells = [title]
    for server in results.servers:
        found = value_spread(results, server, row.key)
        cells.append(show(found.median) if found else "–")
    for server in compared(results):
        ratio = ratio_spread(results, server, BASE, row.key) if row.has_ratio else None
        cells.append(show_spread(ratio))
    return cells + ([show_goal(results, row)] if "sockd" in results.servers else [])


def compared(results: Results) -> list[str]:
    """Return the servers whose ratio to danted is shown."""
    return [name for name in results.servers if name != BASE and BASE in results.servers]


def main_table(results: Results) -> str:
    header = ["work", *results.servers, *(f"{name} / {BASE}" for name in compared(results))]
    if "sockd" in results.servers:
        header.append("goal")
    return show_table(header, [row_cells(results, row) for row in results.rows])


def batch_table(results: Results) -> str:
    """Return sockd's ratios to danted under SCHED_BATCH, "" when they were not measured."""
    lines = []
    for row in results.rows:
        ratio = ratio_spread(results, "sockd", BATCH, row.key)
        limit = row.goal.batch_ratio
        if ratio and limit:
            lines.append([row.title, show_spread(ratio), judge(row, ratio, limit, "")])
    if not lines:
        return ""
    return show_table(["work", f"sockd / {BATCH}", "goal"], lines)


def linear_section(name: str, servers: dict[str, list[Record]]) -> str:
    """Return one series of growing cost, a line for each server and step."""
    columns = list(next(iter(servers.values()))[0])
    lines = []
    for server, records in servers.items():
        lines += [[server, *(show(record[column]) for column in columns)] for record in records]
    return f"### Cost by {name}\n\n" + show_table(["server", *columns], lines)


def churn_section(server: str, churn: dict[str, Any]) -> str:
    """Return what a server held at the start, in between and at the end of a churn run."""
    header = ["moment", *next(iter(churn["moments"].values()))]
    lines = [[name, *(show(value) for value in moment.values())] for name, moment in churn["moments"].items()]
    totals = ", ".join(f"{value:,} {key}" for key, value in churn["totals"].items())
    title = f"### Churn of {churn['seconds']:g} s: {server}\n\n"
    return title + show_table(header, lines) + f"\nIn all: {totals}.\n"


def price_cells(paid: list[Paid]) -> list[str]:
    """Return one line of the table of prices, from all the rounds of a feature."""
    without, own = statistics.median(p.cpu_without for p in paid), statistics.median(p.cpu for p in paid)
    cpu = spread([p.cpu / p.cpu_without for p in paid if p.cpu_without])
    rate = spread([p.rate / p.rate_without for p in paid])
    first = paid[0]
    return [first.feature, first.unit, show(without), show(own), show_spread(cpu), show_spread(rate)]


def price_section(prices: list[Paid]) -> str:
    """Return what each feature costs sockd: with it, in what it is without."""
    if not prices:
        return ""
    header = ["feature", "work", "CPU µs without", "with", "CPU ratio", "rate ratio"]
    keys = dict.fromkeys((paid.feature, paid.unit) for paid in prices)
    lines = [price_cells([p for p in prices if (p.feature, p.unit) == key]) for key in keys]
    return "### Price of features: sockd with them and without\n\n" + show_table(header, lines)


def explanation() -> str:
    return (
        "Medians over all rounds.  A ratio is taken within one round and "
        "shown as median (least–most).  MB and kB are powers of ten; memory is PSS over all "
        "processes and does not include the kernel's socket buffers.\n"
    )


def make_markdown(results: Results) -> str:
    """Return the whole report."""
    parts = ["# Bench\n", "\n".join(f"- {k}: {v}" for k, v in results.machine.items()) + "\n"]
    if results.rows and results.rounds:
        parts += [explanation(), main_table(results), batch_table(results)]
    parts += [linear_section(name, servers) for name, servers in results.linear.items() if servers]
    parts += [churn_section(server, churn) for server, churn in results.churn.items()]
    parts.append(price_section(results.prices))
    if results.notes:
        parts.append("Notes:\n\n" + "\n".join(f"- {note}" for note in results.notes) + "\n")
    return "\n".join(part for part in parts if part)


# ---- JSON ----


def make_json(results: Results) -> dict[str, Any]:
    """Return every single measurement, and the ratios over the rounds."""
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for server in compared(results):
        found = {row.key: ratio_spread(results, server, BASE, row.key) for row in results.rows}
        ratios[server] = {key: one._asdict() for key, one in found.items() if one}
    return dataclasses.asdict(results) | {"ratios_to_danted": ratios}
