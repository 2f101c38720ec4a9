"""Configurations with a slip of the pen: sockd starts with one exactly where danted does.

Random configurations of the whole language, each with one random mutation: a letter, word or line too
many, too few or elsewhere, another number.  SOCKD_MUTATED_CONFIGS is how many are tried, and
SOCKD_RANDOM_SEED what they grow from.

What differs on purpose is recognized.  Where danted alone starts, by sockd's complaint (STRICTER).
Where sockd alone starts, the configuration is spelled out as danted insists on (`spell_out` does
what README's "Friendlier in the configuration" says), and then danted must start with it, too.
"""

from __future__ import annotations

import difflib
import os
import random
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import need_danted

import sockd
from sockd import Complaint, SystemSurroundings, find_literal, parse_config

pytestmark = [pytest.mark.root, pytest.mark.dante]

COUNT = int(os.environ.get("SOCKD_MUTATED_CONFIGS", "1000"))
SEED = int(os.environ.get("SOCKD_RANDOM_SEED", "1"))
FIRST = int(os.environ.get("SOCKD_RANDOM_FIRST", "0"))
PATIENCE = 5.0  # seconds for danted, which needs hundredths where it does not hang


# ------------------------------ the generator ------------------------------

INTERNAL = ("127.0.0.1", "127.0.0.1 port = 1080", "lo port = 1080", "::1 port = 1081", "localhost")
EXTERNAL = ("127.0.0.1", "127.0.0.1", "lo", "::1", "localhost")
METHODS = (
    "none",
    "username",
    "username none",
    "rfc931 none",
    "pam.username none",
    "pam.any",
    "none username",
)
SETTINGS = (
    "debug: 0", "timeout.io: 5", "timeout.io.tcp: 60", "timeout.connect: 4", "timeout.negotiate: 30",
    "timeout.tcp_fin_wait: 9", "connecttimeout: 3", "iotimeout: 5", "udp.connectdst: no",
    "compatibility: sameport", "compatibility: draft-5.05", "srchost: nodnsunknown nodnsmismatch",
    "srchost: checkreplyauth", "resolveprotocol: tcp", "resolveprotocol: fake", "route.maxfail: 2",
    "route.badexpire: 60", "libwrap.hosts_access: no", "child.maxrequests: 10", "cpu.mask.io: 0",
    "cpu.schedule.io: other/0", "external.rotation: route", "external.rotation: none",
    "external.rotation: same-same", "clientmethod: none", "clientmethod: rfc931 none",
    "internal.log.warning.error: econnrefused EAI_AGAIN", "external.socket.so_keepalive: 1",
    "internal.ip.ip_tos: 16", "external.tcp.tcp_nodelay: 1", "external.ip.ip_tos.dscp: af11",
    "user.libwrap: nobody", "localdomain: example.com", "user.privileged: root",
    "user.notprivileged: nobody", "extension: bind",
)  # fmt: skip
IN_RULES = (
    "log: connect disconnect error", "log: tcpinfo data ioop", "libwrap: severity auth.info",
    "session.max: 10", "session.throttle: 5/10", "session.state.key: from", "session.state.max: 3",
    "session.state.throttle: 2/3", "timeout.io: 10", "timeout.negotiate: 5", "socksmethod: none",
    "socksmethod: username", "clientmethod: none", "user: alice bob", "group: readers",
    "pam.servicename: sockd", "method: none", "internal.ip.ip_tos: 8",
    "internal.log.info.error: econnreset",
)  # fmt: skip
OPTIONS = {
    "client": (*IN_RULES, "session.inheritable: no"),
    "socks": (
        *IN_RULES, "timeout.connect: 3", "socksmethod: username none", "command: connect bind",
        "command: udpassociate udpreply", "command: bindreply", "protocol: tcp", "protocol: tcp udp",
        "proxyprotocol: socks_v5", "proxyprotocol: socks_v4 socks_v5", "proxyprotocol: http",
        "udp.portrange: 40000-40100", "external.tcp.tcp_nodelay: 1",
    ),
    "route": (
        "command: connect", "protocol: tcp", "proxyprotocol: socks_v5", "proxyprotocol: http",
        "proxyprotocol: socks_v4 socks_v5", "method: none", "extension: bind",
    ),
    "monitor": (
        "command: connect", "protocol: tcp", "alarm.data: 1000 in 10",
        "internal.alarm.data.recv: 10 in 5", "alarm.disconnect: 5/10",
        "external.alarm.disconnect: 2/3 in 9",
    ),
}  # fmt: skip
HEADS = (
    "client pass", "client block", "socks pass", "socks block", "socks pass", "route", "monitor",
    "pass", "block",
)  # fmt: skip
ADDRESSES = (
    "0/0", "127.0.0.0/8", "127.0.0.1/32", "::/0", "::1/128", "fd00::/16", "lo", "example.com",
    ".example.com", ".", "localhost", "0.0.0.0/0", "10.0.0.0/8",
)  # fmt: skip
PORTS = (
    "", "", "", "", " port = 80", " port eq http", " port 80-90", " port ne 22", " port >= 1024",
    " port lt 1024", " port gt 5", " port le 5", " port != 53",
)  # fmt: skip
GATEWAYS = ("127.0.0.1", "direct", "127.0.0.1 port = 1090", "localhost port = 1080", "::1 port = 9")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.:/-_={}#\\ \t\n,;%!<>ABCZ\"'*@"
NUMBERS = ("0", "1", "65535", "65536", "99999999999", "033", "0x10", "-1", "1.5", "128", "33")


class Generator:
    """Makes configurations, and slips in them."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def options(self, pool: tuple[str, ...], most: int) -> list[str]:
        return self.random.sample(pool, self.random.randint(0, min(most, len(pool))))

    def address(self, pool: tuple[str, ...] = ADDRESSES) -> str:
        return self.random.choice(pool) + self.random.choice(PORTS)

    def block(self) -> list[str]:
        """Give the lines of a rule, route or monitor."""
        head = self.random.choice(HEADS)
        addresses = f"from: {self.address()} to: {self.address()}"
        if head == "route":
            # danted hangs at a route to an interface.
            beyond = tuple(address for address in ADDRESSES if address != "lo")
            addresses = f"from: {self.address()} to: {self.address(beyond)}"
            addresses += f" via: {self.random.choice(GATEWAYS)}"
        lines = self.options(OPTIONS.get(head.split()[0], OPTIONS["socks"]), 5)
        lines.insert(self.random.randint(0, len(lines)), addresses)
        return [f"{head} {{", *("  " + line for line in lines), "}"]

    def config(self) -> str:
        lines = [
            f"internal: {self.random.choice(INTERNAL)}",
            f"external: {self.random.choice(EXTERNAL)}",
            f"socksmethod: {self.random.choice(METHODS)}",
            *self.options(SETTINGS, 6),
        ]
        for _ in range(self.random.randint(1, 5)):
            lines += self.block()
        return "\n".join(lines) + "\n"

    def mutate(self, text: str) -> str:
        """Make one slip: in a character, a word, a line or a number."""
        mutate = self.random.choice([self.slip_letter, self.slip_word, self.slip_line, self.slip_number])
        return mutate(text)

    def slip_letter(self, text: str) -> str:
        at = self.random.randrange(len(text))
        new = self.random.choice(CHARACTERS)
        before, here, after = text[:at], text[at], text[at + 1 :]
        slips = [before + after, before + new + here + after, before + new + after]
        slips.append(before + after[:1] + here + after[1:])
        return self.random.choice(slips)

    def slip_word(self, text: str) -> str:
        words = list(re.finditer(r"\S+", text))
        word, other = self.random.choice(words), self.random.choice(words)
        before, after = text[: word.start()], text[word.end() :]
        slips = ["", f"{word[0]} {word[0]}", other[0], "\n" + word[0]]
        return before + self.random.choice(slips) + after

    def slip_line(self, text: str) -> str:
        lines = text.split("\n")
        at, to = self.random.randrange(len(lines)), self.random.randrange(len(lines))
        slips = [
            lines[:at] + lines[at + 1 :],
            [*lines[:to], lines[at], *lines[to:]],
            [*lines[:at], " ".join(lines[at : at + 2]), *lines[at + 2 :]],
        ]
        return "\n".join(self.random.choice(slips))

    def slip_number(self, text: str) -> str:
        number = self.random.choice(list(re.finditer(r"\d+", text)))
        return text[: number.start()] + self.random.choice(NUMBERS) + text[number.end() :]


# ------------------------------ differences on purpose ------------------------------


def dotted(words: set[str]) -> str:
    """Give a pattern of words as danted has them: it takes any character for a dot."""
    return "|".join(re.escape(word).replace(r"\.", ".") for word in sorted(words, key=len, reverse=True))


WORDS = {
    word.strip()
    for line in (*SETTINGS, *(option for options in OPTIONS.values() for option in options), *METHODS)
    for word in re.split(r"[:\s]+", line)
    if word[:1].isalpha()
} | {"internal", "external", "from", "to", "via", "port", "client", "socks", "route", "monitor"}
# A word that danted finds inside another, or a number in front of one.
GLUED = re.compile(rf"(?:{dotted(WORDS)}|eq|ne|[gl][et])|\d+")
STRICTER = {
    "Words for addresses": "needs an address, in the same line",
    "Host names": "is no address, host name, domain or interface",
    "direct": "a direct route has no",
}


def find_strictness(complaint: Complaint) -> str:
    """Name the reason for which sockd refuses what danted takes; "" when there is none."""
    for reason, text in STRICTER.items():
        if text in complaint.text:
            return reason
    column = complaint.position.column - 1 if complaint.position else 0
    # What cannot be part of a word ends the word here, but not in danted.
    refused = re.search(r"keyword, not|is no value", complaint.text)
    if refused and complaint.line_text[max(0, column - 1) : column].strip():
        return "Host names"
    return "Word borders" if GLUED.match(complaint.line_text, column) else ""


# danted refuses these for what is not in the grammar, or hangs.
START_ONLY = ("cannot bind external address", "does not specify a portnumber")
ROUTE_TO_INTERFACE = re.compile(r"route\s*\{[^}]*to\s*:\s*lo\b")
SETTING = re.compile(r"[ \t]+(?!(?:to|via|port|in)[ \t]*:)([a-z][A-Za-z0-9_.-]*[ \t]*:)(?!:)")
SPELLINGS = (
    (r"(?m)(?:^|(?<=\s))#.*", ""),  # a comment ends a list of values
    (r",(?=\s)", " "),
    (r"\s*\n\s*:", ":"),
    (r"\b(resolveprotocol:)\s*\n", r"\1 "),
    (r"[ \t]+:", ":"),
    (r"\b(from|to|via|internal|external):[ \t]*", r"\1: "),
    (r"\b0[ \t]*/[ \t]*0\b", "0/0"),
    (r"\bport[ \t]*:?[ \t]*(0x[0-9a-fA-F]+|\d+)\b(?!\s*-)", r"port = \1"),
    (r"\bport[ \t]*:?[ \t]+(?!(?:eq|neq?|[gl][et])\b)([a-z][\w-]*)(?=\s)", r"port = \1"),
    (r"\bneq\b", "ne"),
    (r"\b(client|socks)[ \t]+(pass|block)\b", r"\n\1 \2"),
    (r"\b(route|monitor|pass|block)[ \t]*(?=\{)", r"\n\1 "),
    (r"\b(client|socks)\s+(?=pass|block)", r"\1 "),
    (r"\}", "\n}\n"),
    (r"\{", "{\n"),
)


def add_mask(address: re.Match[str]) -> str:
    literal = find_literal(address[2])
    return address[0] + (f"/{ {4: 32, 6: 128}[literal.family] }" if literal else "")


def number_of_service(gateway: re.Match[str]) -> str:
    return f"{gateway[1]}{SystemSurroundings().service(gateway[2], 'tcp') or gateway[2]}"


def spell_out(text: str) -> str:
    """Write a configuration as danted insists on."""
    for pattern, new in SPELLINGS:
        text = re.sub(pattern, new, text)
    text = re.sub(r"\b(from|to): ([0-9A-Fa-f.:]+)(?=\s)", add_mask, text)
    text = re.sub(r"\b(via: \S+ port\s*\S+\s+)([a-z][\w-]*)", number_of_service, text)
    return SETTING.sub(r"\n\1", text)


# ------------------------------ the test ------------------------------


def ask_danted(text: str, folder: Path) -> tuple[bool, str]:
    """Tell whether danted takes a configuration, and what it says."""
    path = folder / "danted.conf"
    path.write_text(text)
    command = ["danted", "-V", "-f", str(path)]
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return False, "it hangs"
    return ran.returncode == 0, (ran.stdout + ran.stderr).decode("utf-8", "replace")


def ask_sockd(text: str) -> tuple[bool, list[Complaint]]:
    """Tell whether sockd takes a configuration, and what it complains of."""
    config, complaints = parse_config(text, "danted.conf", SystemSurroundings())
    if config is not None:
        complaints = sockd.find_unsupported(config)
    errors = [complaint for complaint in complaints if complaint.level == "error"]
    return not errors, errors


def try_config(text: str, folder: Path) -> str:
    """Tell how the two differ; "" when they do not, or when it is on purpose."""
    theirs, said = ask_danted(text, folder)
    ours, errors = ask_sockd(text)
    if theirs == ours:
        return ""
    if theirs:
        on_purpose = bool(find_strictness(errors[0]))
    else:
        hangs = said == "it hangs" and ROUTE_TO_INTERFACE.search(text)
        starts = hangs or any(reason in said for reason in START_ONLY)
        on_purpose = bool(starts) or ask_danted(spell_out(text), folder)[0]
    complaints = "\n".join(map(sockd.describe_complaint, errors))
    return "" if on_purpose else f"danted: {said or 'starts'}\nsockd: {complaints or 'starts'}"


def try_slip(number: int, folder: Path) -> str:
    """Try one configuration with a slip; tell the difference."""
    generator = Generator(f"{SEED}/{number}")
    written = generator.config()
    text = generator.mutate(written)
    folder.mkdir()
    difference = try_config(text, folder)
    slip = "\n".join(difflib.unified_diff(written.split("\n"), text.split("\n"), lineterm="", n=2))
    return f"slip {number} of seed {SEED}\n{slip}\n{difference}\n" if difference else ""


def test_mutated_configurations_start_as_with_danted(tmp_path: Path) -> None:
    need_danted()
    with ThreadPoolExecutor(2) as pool:
        tried = pool.map(lambda number: try_slip(number, tmp_path / str(number)), range(FIRST, FIRST + COUNT))
        differences = [difference for difference in tried if difference]
    assert not differences, f"{len(differences)} configurations:\n" + "\n".join(differences)
