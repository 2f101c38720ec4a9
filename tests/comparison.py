"""The same clients for two servers with the same configuration, and what came of it with each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversation import Talk
from peers import Company
from servers import Record, Server, World, eventually


@dataclass(frozen=True)
class Unlike:
    """A difference on purpose: lines of danted's transcript, and what sockd has for each.

    In `danted` an ellipsis stands for any text; in `sockd` {0} is what the first one stood for.
    """

    reason: str
    danted: str
    sockd: tuple[str, ...] = ()

    def match(self, line: str) -> re.Match[str] | None:
        """Match a line of danted's transcript."""
        return re.fullmatch("(.*?)".join(map(re.escape, self.danted.split("…"))), line)


@dataclass(frozen=True)
class Case:
    """A script, the address that its client comes from (a network: any there), and differences."""

    name: str
    script: tuple[Any, ...] = field(repr=False)
    source: str = field(default="127.77.", repr=False)
    unlike: tuple[Unlike, ...] = field(default=(), repr=False)
    in_order: bool = field(default=True, repr=False)


@dataclass(frozen=True)
class Group:
    """Cases that share a configuration, and so one start of each server."""

    name: str
    config: str = field(repr=False)
    cases: tuple[Case, ...] = field(repr=False)
    # How many cases run side by side, where they mostly wait.
    at_once: int = field(default=1, repr=False)


def case(
    name: str,
    *script: Any,
    source: str = "127.77.",
    unlike: tuple[Unlike, ...] = (),
    in_order: bool = True,
) -> Case:
    """Give a case with its script as arguments."""
    return Case(name, script, source, unlike, in_order)


@dataclass
class Outcome:
    """What came of a group with one server: a transcript a case, and how the server ended."""

    transcripts: dict[str, list[str]] = field(default_factory=dict)
    unattributed: list[str] = field(default_factory=list)
    trouble: str = ""


# ------------------------------ running ------------------------------


def run_group(group: Group, kind: type[Server], folder: Path, world: World) -> Outcome:
    """Start a server, run every case of the group, stop it, and give what came of it."""
    outcome = Outcome()
    server = kind(group.config, folder, (), world)
    try:
        with ThreadPoolExecutor(group.at_once) as pool:
            talks = list(pool.map(lambda case: run_case(case, server), numbered(group.cases)))
        if logs_both_ends_of_sessions(group.config):
            eventually_balanced(server)
    finally:
        try:
            server.close()
        except AssertionError as error:
            outcome.trouble = f"{error}\n{server.text}"
    outcome.transcripts = {case.name: talk.lines for case, talk in zip(group.cases, talks, strict=True)}
    add_log_lines(outcome, list(zip((case.name for case in group.cases), talks, strict=True)), server)
    return outcome


def numbered(cases: tuple[Case, ...]) -> Iterator[tuple[int, Case]]:
    """Number the cases, for an address each."""
    return enumerate(cases, 1)


def run_case(numbered_case: tuple[int, Case], server: Server) -> Talk:
    """Run one case from an address of its own, so that its log lines can be told from others."""
    number, case = numbered_case
    source = f"{case.source}{number // 250}.{number % 250 + 1}" if case.source.endswith(".") else case.source
    with Company() as company:
        talk = Talk(server, source, company)
        talk.run(case.script)
    return talk


def logs_both_ends_of_sessions(config: str) -> bool:
    """Tell whether each session that the log shows beginning will be shown ending."""
    return CLIENT_PASS in config


def eventually_balanced(server: Server) -> None:
    """Wait until every session of the log has ended."""

    def is_balanced() -> bool:
        messages = [record.message for record in server.log]
        begun = sum("tcp/accept [" in message for message in messages)
        ended = sum("tcp/accept ]" in message for message in messages)
        return ended >= begun

    try:
        eventually(is_balanced)
    except AssertionError:
        return  # the comparison shows which line is missing


def add_log_lines(outcome: Outcome, talks: list[tuple[str, Talk]], server: Server) -> None:
    """Add each log record to the transcript of the conversation that it is about."""
    for record in server.log:
        owners = [name_talk for name_talk in talks if name_talk[1].is_about(record)]
        # A relay that nothing was sent to is logged without its client.
        owners = owners or [name_talk for name_talk in talks if name_talk[1].is_about_relay(record)]
        for name, talk in owners:
            outcome.transcripts[name].append(f"log: {talk.mask(record)}")
        if not owners and is_about_service(record):
            outcome.unattributed.append(str(record))


def is_about_service(record: Record) -> bool:
    """Tell whether a record that names no client came while clients were served."""
    return not re.search(r" running$|^listening on |exiting on signal|shutting down", record.message)


def expect(danted: list[str], differences: tuple[Unlike, ...]) -> list[str]:
    """Give danted's transcript with the differences on purpose made."""
    lines = list(danted)
    for difference in differences:
        found = [difference.match(line) for line in lines]
        assert any(found), f"danted does not do this: {difference.danted}"
        changed: list[str] = []
        for line, match in zip(lines, found, strict=True):
            changed += [new.format(*match.groups()) for new in difference.sockd] if match else [line]
        lines = changed
    return lines


# ------------------------------ configurations ------------------------------

GLOBALS = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
clientmethod: none
socksmethod: {methods}
user.privileged: root
user.unprivileged: nobody
{more}
"""


def rule(kind: str, addresses: str, *statements: str, log: str = "connect disconnect error") -> str:
    """Give the text of a rule: `kind` is like "socks pass", an empty `log` leaves it out."""
    lines = [f"{kind} {{", addresses, *statements, *([f"log: {log}"] if log else []), "}"]
    return "\n".join(lines) + "\n"


CLIENT_PASS = rule("client pass", "from: 0/0 to: 0/0")
SOCKS_PASS = rule("socks pass", "from: 0/0 to: 0/0", log="connect disconnect error ioop")


def conf(*rules: str, methods: str = "none", more: str = "") -> str:
    """Give a configuration with the usual globals."""
    return GLOBALS.format(methods=methods, more=more) + "".join(rules)
