"""What the documents say is what the program does: README, manual pages, examples, changelog.

The tables of README are made by `keyword_table` and `value_table`; a test that fails prints the
table as it should be.  DIFFERENCES ties each place where sockd differs from Dante on purpose to
its item in README: the item's bold words.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import test_against_dante
import test_grammar
from comparison import Unlike
from conftest import Factory
from servers import SOCKD, WITHIN, Sockd, check_file, need, private_network

import sockd as program

ROOT = SOCKD.parent
README = (ROOT / "README.md").read_text()
MANUAL = (ROOT / "packaging/man/sockd.conf.5").read_text()
PAGES = sorted((ROOT / "packaging/man").glob("*.[58]"))
# Those of the company are checked by test_company.py, where its addresses are.
EXAMPLES = sorted(
    path for path in (ROOT / "packaging/examples").glob("*.conf") if not path.name.startswith("company-")
)

# What Dante's manual does not know.
OURS = {"passwordfile", "login.penalty", "chroot", "credentials", "balance", "resolve"}

CONTEXTS = {
    "file": "file",
    "global": "global",
    "client": "client-rule",
    "hostid": "client-rule",
    "socks": "socks-rule",
    "route": "route",
    "monitor": "monitor",
}


# ------------------------------ README: keywords ------------------------------


def find_family(name: str) -> str:
    """Give the row that a keyword belongs to: those that differ in one word share one."""
    if name.startswith("ldap."):
        return "ldap.*"
    if name.startswith("alarm."):
        return f"[SIDE.]{name}"
    side, _, rest = name.partition(".")
    if side in program.SIDES and rest.partition(".")[2]:
        return f"[SIDE.]{rest}" if rest.startswith("alarm.") else f"SIDE.{rest}"
    return name


def describe_where(keyword: program.Keyword) -> str:
    names = dict.fromkeys(CONTEXTS[name] for name in CONTEXTS if name in keyword.contexts)
    return ", ".join(names)


def keyword_rows() -> dict[str, tuple[str, str, str]]:
    """Give status, places and help of each row; a family must agree on all three."""
    rows: dict[str, set[tuple[str, str, str]]] = {}
    for name, keyword in program.KEYWORDS.items():
        row = keyword.status, describe_where(keyword), keyword.help
        rows.setdefault(find_family(name), set()).add(row)
    assert {name: len(row) for name, row in rows.items() if len(row) > 1} == {}
    return {name: row.pop() for name, row in rows.items()}


def keyword_table() -> str:
    """Give README's table of keywords."""
    lines = ["| Dante keyword | status | where | what it is |", "|---|---|---|---|"]
    for name, (status, where, text) in keyword_rows().items():
        shown = f"`{name}` (ours)" if name in OURS else f"`{name}`"
        lines.append(f"| {shown} | {status} | {where} | {text} |")
    return "\n".join(lines)


def value_table() -> str:
    """Give README's table of the values that are not supported."""
    lines = ["| value | status |", "|---|---|"]
    for name in sorted(program.UNSUPPORTED):
        keyword = name.partition(": ")[0]
        if keyword != name and program.find_status(keyword) == program.WORKS:
            lines.append(f"| `{name}` | {program.find_status(name)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("table", [keyword_table(), value_table()], ids=["keywords", "values"])
def test_readme_has_the_table_of_the_program(table: str) -> None:
    assert table in README, f"README should have:\n{table}"


# ------------------------------ README: differences ------------------------------

# Function or constant with an "Unlike Dante", FRIENDLY's file, or the name of an Unlike's reason
# -> the bold words in README's differences.
DIFFERENCES = {
    # sockd.py
    "KEYWORD_WORD": "Word borders",
    "warn_of_comma": "Commas",
    "take_values": "Lists",
    "error_logs": "Errors of a rule",
    "take_address": "Words for addresses",
    "check_route_addresses": "direct",
    "parse_mask": "Masks",
    "parse_masked": "Masks",
    "parse_port": "port: N",
    "read_internal": "Port 0",
    "routes_choose": "Wildcard",
    "find_option_fault": "Option levels",
    "check_rules_exist": "Nothing passes",
    "find_missing": "Not there yet",
    "FINAL_LOG": "Built-in rule",
    "match_domain_text": "Label border",
    "escape_text": "Escapes",
    "check_host_name": "NUL in names",
    "decode_password": "NUL in names",
    "check_start4": "Refusals",
    "decode_request4": "SOCKS 4A",
    "decode_request": "Refusals",
    "read_handshake": "HTTP",
    "describe_client": "Escapes",
    "check_password": "Expired accounts",
    "_from_control": "UDP control connection",
    "_accept_sender": "UDP client",
    "check_route_commands": "Commands of a route",
    "target_by": "Names on the way",
    "resolve": "Unresolved names",
    "request_http": "HTTP proxies",
    "_request": "Blame",
    "_from_target": "UDP answers",
    "wait_for_peer": "BIND",
    "judge_peer": "BIND",
    "listen": "BIND for several",
    "serve_peer": "BIND for several",
    "take_peer": "BIND for several",
    "record_failure": "BIND for several",
    "daemonize": "Background",
    "warn_of_lost_log": "Background",
    "parse_text_option": "Empty options",
    "find_accounts": "Not as root",
    "hold_back": "Look-ups without an answer",
    "admit": "libwrap",
    "become_commander": "libwrap",
    "find_protection_fault": "GSS-API",
    "find_gssapi_faults_of": "GSS-API",
    "read_gssapi": "GSS-API",
    "unwrap": "GSS-API",
    "on_hup": "SIGHUP",
    "find_redirect": "Redirected replies",
    "_check_disconnects": "Disconnect ratio",
    "reload": "Counts and reloads",
    # test_grammar.FRIENDLY
    "addr-dotted-mask": "Masks",
    "addr-no-mask": "Masks",
    "addr-ipv6-nomask": "Masks",
    "child-maxlifetime-is-1.4.3": "Newer keywords",
    "comment-glued-username": "Lists",
    "cpu-schedule-manpage-style": "Spellings of the manual",
    "crlf": "Blanks",
    "from-no-space": "Blanks",
    "internal-port-0": "Port 0",
    "port-bare": "Ports",
    "port-neq-word": "Ports",
    "port-service-colon": "Ports",
    "route-port-colon": "Ports",
    "rule-tab-between-words": "Blanks",
    "socks-log-space-colon": "Blanks",
    "sticky-command-then-keyword": "Lists",
    "sticky-user-eats-brace": "Lists",
    "two-rules-one-line": "Rules on a line",
    # test_against_dante
    "UNKNOWN_COMMAND": "Refusals",
    "UNKNOWN_TYPE": "Refusals",
    "REJECTED4": "Refusals",
    "SOCKS4A": "SOCKS 4A",
    "NUL_IN_NAME": "NUL in names",
    "NO_NAME": "Host names",
    "EVERY_ADDRESS": "Every address",
    "RELAY_ADDRESS": "UDP relay address",
    "LONG_REASON": "Long reasons",
    "FINAL_RULE": "Built-in rule",
    "CONNECTED": "Addresses",
    "UNSENT": "Counters",
    "NO_FUNCTION": "Notices",
    "NOTHING_RESOLVED": "Addresses",
    "PIPELINED": "Counters",
    "LABELS": "Label border",
    "COLON": "port: N",
    "STRANGERS": "BIND",
    "EARLY": "BIND",
    "SIDES": "Sides of a BIND",
    "VERSION4": "SOCKS 4 and passwords",
    "ONE_CLIENT": "UDP client",
    "EACH_SENDER": "UDP answers",
    "BOTH_FAMILIES": "Counters",
}


def find_owner(tree: ast.Module, line: int) -> str:
    """Name the innermost function around a line; outside of all, the constant that follows."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    around = [n for n in functions if n.lineno <= line <= (n.end_lineno or 0)]
    if around:
        return max(around, key=lambda n: n.lineno).name
    below = [n for n in tree.body if isinstance(n, ast.Assign) and n.lineno > line]
    target = below[0].targets[0]
    assert isinstance(target, ast.Name)
    return target.id


def differences_in_comments() -> set[str]:
    """Name the places of sockd.py that say "Unlike Dante"; its docstring only explains the words."""
    text = SOCKD.read_text()
    tree = ast.parse(text)
    start = tree.body[0].end_lineno or 0
    lines = enumerate(text.splitlines()[start:], start + 1)
    return {find_owner(tree, number) for number, line in lines if "Unlike Dante" in line}


def differences_in_comparison() -> set[str]:
    """Name the constants that are reasons of an Unlike."""
    found: set[str] = set()
    reasons = {
        unlike.reason
        for group in test_against_dante.GROUPS
        for case in group.cases
        for unlike in case.unlike
        if isinstance(unlike, Unlike)
    }
    for name, value in vars(test_against_dante).items():
        if isinstance(value, str) and value in reasons:
            found.add(name)
            reasons.remove(value)
    return found | reasons  # a reason without a name stands for itself


def items_in_readme() -> list[str]:
    section = README.split("\n## Differences from Dante\n")[1].split("\n## ")[0]
    return re.findall(r"^- \*\*(.+?)\.\*\* ", section, re.MULTILINE)


def test_every_difference_on_purpose_is_tied_to_readme() -> None:
    differences = differences_in_comments() | differences_in_comparison()
    assert differences | set(test_grammar.FRIENDLY) == set(DIFFERENCES)


def test_readme_has_every_difference_once() -> None:
    items = items_in_readme()
    assert sorted(set(items)) == sorted(items)
    assert set(DIFFERENCES.values()) <= set(items)


# ------------------------------ manual pages ------------------------------


def items_in_manual() -> dict[str, str]:
    """Give what the page says about each keyword, behind its name."""
    text = MANUAL.split("\n.Sh OLD SPELLINGS\n")[0]
    found = {}
    for item in re.split(r"^\.It Ic ", text, flags=re.MULTILINE)[1:]:
        head, _, body = item.partition("\n")
        names = re.split(r" (?:: |No \{)|$", head)[0]
        for name in names.split(" , "):
            assert name not in found, name
            found[name] = " ".join(body.split(".El\n.S")[0].split())
    return found


def describe_status(name: str) -> str:
    """Give the end of a keyword's item."""
    reason = program.find_reason(name)
    return f" Status: never here: {reason}." if reason else ""


def test_manual_documents_exactly_the_keywords() -> None:
    assert sorted(items_in_manual()) == sorted(program.KEYWORDS)


@pytest.mark.parametrize("name", program.KEYWORDS)
def test_manual_says_where_a_keyword_stands_and_whether_it_works(name: str) -> None:
    item = items_in_manual()[name]
    keyword = program.KEYWORDS[name]
    assert f"Where: {describe_where(keyword)}." in item
    found = re.search(r"( Status: .*?\.)?( \.El.*)?$", item)
    assert found
    assert (found[1] or "") == describe_status(name)
    assert (name in OURS) == item.startswith("Ours.")


def test_manual_has_every_old_spelling_and_nothing_else() -> None:
    section = MANUAL.split("\n.Sh OLD SPELLINGS\n")[1].split("\n.Sh ")[0]
    names = re.findall(r"^(?:\.It )?\.?Ic (\S+)", section, re.MULTILINE)
    assert sorted(names) == sorted([*program.LEGACY, *program.GONE, *program.REMOVED])
    for old, new in program.LEGACY.items():
        assert re.search(rf"^\.It Ic {re.escape(old)} Ta {re.escape(new)}", section, re.MULTILINE)


def test_manual_names_every_option_of_the_command_line() -> None:
    page = (ROOT / "packaging/man/sockd.8").read_text()
    names = re.findall(r"^\.It Fl (\S+)", page, re.MULTILINE)
    assert sorted(f"-{name}" for name in names) == sorted(program.OPTION_VALUES)


def test_manual_names_every_signal() -> None:
    page = (ROOT / "packaging/man/sockd.8").read_text()
    section = page.split("\n.Sh SIGNALS\n")[1].split("\n.Sh ")[0]
    names = re.findall(r"SIG[A-Z0-9]+", "".join(re.findall(r"^\.It .*", section, re.MULTILINE)))
    assert sorted(names) == sorted(number.name for number in program.Mother.handlers)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_manual_page_has_no_fault_of_form(page: Path) -> None:
    need(shutil.which("mandoc"), "Debian package mandoc is missing")
    command = ["mandoc", "-T", "lint", "-W", "warning", str(page)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_manual_page_is_set_without_a_warning(page: Path) -> None:
    need(shutil.which("man") and shutil.which("groff"), "Debian packages man-db and groff-base are missing")
    command = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(page)]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stderr) == (0, "")


# ------------------------------ version and licence ------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_manual_page_has_the_version(page: Path) -> None:
    assert f'.Os "sockd {program.__version__}"' in page.read_text().splitlines()


def test_changelog_begins_with_the_version() -> None:
    lines = (ROOT / "packaging/CHANGELOG.md").read_text().splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0].split()[1] == program.__version__


def test_licence_is_what_the_program_prints() -> None:
    printed = subprocess.run([*program_command(), "-L"], capture_output=True, text=True, check=True)
    assert printed.stdout.split("\n", 1)[1] == (ROOT / "LICENSE").read_text()


# ------------------------------ configurations ------------------------------


def program_command() -> list[str]:
    return Sockd.command(Sockd.__new__(Sockd))


def has_pam() -> bool:
    try:
        program.load_pam()
    except (ImportError, OSError):
        return False
    return True


@pytest.mark.parametrize("path", [ROOT / "sockd.conf", *EXAMPLES], ids=lambda path: path.name)
def test_configuration_passes_without_a_warning(path: Path) -> None:
    status, said = check_file(path)
    if path.name == "pam.conf" and not has_pam():
        assert "python-pam" in said
        assert "\n" not in said
        return
    assert (status, said) == (0, "")


def test_examples_of_the_manual_pass_without_a_warning(tmp_path: Path) -> None:
    blocks = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", MANUAL, re.MULTILINE | re.DOTALL)
    files = [block for block in blocks if "internal:" in block]
    assert len(files) == 2
    for text in files:
        path = tmp_path / "sockd.conf"
        path.write_text(re.sub(r"\beth\d", "lo", text))
        assert check_file(path) == (0, ""), text


def test_shipped_configuration_listens_on_loopback_only() -> None:
    config, _ = program.parse_config(
        (ROOT / "sockd.conf").read_text(), "sockd.conf", program.SystemSurroundings()
    )
    assert config
    assert [str(endpoint) for endpoint in config.internal] == ["127.0.0.1.1080"]
    assert config.logoutput == ("stderr",)


FORBIDDEN = [
    ("127.0.0.1", 4), ("127.255.255.254", 4), ("0.0.0.0", 4), ("0.1.2.3", 4),
    ("169.254.169.254", 4), ("169.254.1.1", 4), ("100.100.100.200", 4), ("168.63.129.16", 4),
    ("::1", 6), ("::", 6), ("fe80::1", 6), ("febf::1", 6), ("fd00:ec2::254", 6),
]  # fmt: skip
ALLOWED = [("192.0.2.1", 4), ("128.0.0.1", 4), ("2001:db8::1", 6), ("fd00:ec2::253", 6)]


@pytest.mark.parametrize("command", ["connect", "udpassociate"])
@pytest.mark.parametrize(
    ("host", "family", "verdict"),
    [(*target, "block") for target in FORBIDDEN] + [(*target, "pass") for target in ALLOWED],
)
def test_shipped_configuration_protects(host: str, family: int, verdict: str, command: str) -> None:
    config, _ = program.parse_config(
        (ROOT / "sockd.conf").read_text(), "sockd.conf", program.SystemSurroundings()
    )
    assert config
    client, target = program.Endpoint("127.0.0.1", 40000), program.Endpoint(host, 80, family)
    protocol = "tcp" if command == "connect" else "udp"
    facts = program.Facts(command, protocol, "socks_v5", client, target, (target,))
    decision = program.Policy(config).socks_decision(facts, program.NoLookup())
    assert decision.verdict == verdict


# ------------------------------ packaging ------------------------------


def test_packaging_says_where_each_file_goes() -> None:
    folder = ROOT / "packaging"
    table = re.findall(r"^\| `([^`]+)` \|", (folder / "README.md").read_text(), re.MULTILINE)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"README.md"}
    assert {name for name in table if not name.startswith("../")} == files
    assert all((folder / name).exists() for name in table)


# ------------------------------ README's commands ------------------------------


class Greeting(BaseHTTPRequestHandler):
    """Answers every GET with the address that the request came from."""

    def do_GET(self) -> None:
        body = f"hello {self.client_address[0]}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def origin() -> Iterator[Callable[[str], str]]:
    """`origin(host)` starts a web server there and gives its URL."""
    started: list[tuple[HTTPServer, threading.Thread]] = []

    def start(host: str) -> str:
        server = HTTPServer((host, 0), Greeting)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        started.append((server, thread))
        return f"http://{host}:{server.server_port}/"

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


def find_command(start: str) -> list[str]:
    """Give the first indented line of README that begins so, in words."""
    found = re.search(rf"^    ({re.escape(start)}.*)$", README, re.MULTILINE)
    assert found
    return found[1].split()


def test_readme_begins_with_the_command_that_runs_it() -> None:
    first, second = re.findall(r"^    (.*)$", README, re.MULTILINE)[:2]
    assert first == "python3 sockd.py -f sockd.conf"
    assert second == "sh tests/run"
    assert (ROOT / "tests/run").exists()


def fetch(url: str, *changes: tuple[str, str]) -> str:
    """Run README's curl with another URL, and with words of it changed."""
    need(shutil.which("curl"), "curl is missing")
    *command, _ = find_command("curl")
    for old, new in changes:
        command = [word.replace(old, new) for word in command]
    result = subprocess.run(
        [*command, "-sS", "--max-time", f"{WITHIN:g}", url],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout + result.stderr


def test_first_command_serves_as_shipped_but_for_its_port_and_one_block(
    sockd: Factory, origin: Callable[[str], str]
) -> None:
    """The origin is on loopback, so the block of 127.0.0.0/8 makes room for one of 127.0.0.2."""
    shipped = (ROOT / "sockd.conf").read_text()
    changed = shipped.replace("port = 1080", "port = 0").replace(
        "from: 0/0 to: 127.0.0.0/8\n    command: connect", "from: 0/0 to: 127.0.0.2/32\n    command: connect"
    )
    server = sockd(changed)
    port = ("1080", str(server.port))
    assert fetch(origin("127.0.0.1"), port) == "hello 127.0.0.1\n"
    assert "curl: (97)" in fetch(origin("127.0.0.2"), port)


@pytest.fixture
def outside(as_root: None) -> Iterator[str]:
    """Move to a network of our own and give an address there that is not loopback."""
    need(shutil.which("ip"), "ip is missing")
    with private_network():
        command = "ip address add 192.0.2.2/32 dev lo"
        subprocess.run(command.split(), check=True)
        yield "192.0.2.2"


@pytest.mark.root
def test_first_command_serves_as_shipped(outside: str, origin: Callable[[str], str], tmp_path: Path) -> None:
    command = find_command("python3 sockd.py")
    # For the test alone: not the machine's pid file.
    command = [*program_command(), *command[2:], "-p", str(tmp_path / "pid")]
    url, forbidden = origin(outside), origin("127.0.0.1")
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            assert any(line.endswith(" running\n") for line in process.stderr)
            assert fetch(url) == f"hello {outside}\n"
            assert "curl: (97)" in fetch(forbidden)
        finally:
            process.terminate()
            log = process.stderr.read()
        assert process.wait(WITHIN) == 0
    assert f"{outside}." in log
    assert "block(1): tcp/connect ]" in log
