"""The shape of sockd.py: sections in order, names used below their definition, powers in their place."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "sockd.py"
TEXT = SOURCE.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# =+ (\d+)\. (.+?) =+$", re.MULTILINE)
LONGEST_FUNCTION = 60

# What may be called where: section numbers.  Adding to this table is a decision, not a formality.
POWERS = {
    "os.fork": {10, 19},
    "os.chroot": {10},
    "os.setresuid": {10},
    "os.setresgid": {10},
    "os.setgroups": {10},
    "signal.signal": {10, 19},
    "os.kill": {10, 19},
    "_thread.start_new_thread": {18},
    "threading.Thread": set(),
    "ctypes.CDLL": {8},
    "print": {20},
    "sys.exit": {20},
    "sys.stdout.write": {20},
    "sys.stderr.write": {20},
    "open": {11, 19},
    "os.open": {7, 11, 19, 20},
    "os.execv": set(),
    "eval": set(),
    "exec": set(),
    "pickle.loads": set(),
    "subprocess.run": set(),
    "os.system": set(),
}
PURE_SECTIONS = range(1, 7)
WORLD = re.compile(
    r"^(os\.(?!path\b)|time\.|threading\.|open$|print$|socket\.(?!inet_|AF_|SOL_|IPPROTO_|IP_|SO_|TCP_))"
)


@functools.cache
def sections() -> list[tuple[int, int, str]]:
    """Return (first line, number, name) of each banner."""
    return [
        (TEXT.count("\n", 0, match.start()) + 1, int(match[1]), match[2]) for match in BANNER.finditer(TEXT)
    ]


def section_of(line: int) -> int:
    return max((number for first, number, _ in sections() if first <= line), default=0)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def definitions() -> dict[str, int]:
    """Return the line of every top-level name."""
    found = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, node.lineno)
    return found


def used_names(node: ast.AST) -> Iterator[ast.Name]:
    """Yield the names that code below a node uses when it runs: annotations are not run."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
                yield child
            if isinstance(child, ast.AST):
                yield from used_names(child)


def functions() -> Iterator[ast.FunctionDef]:
    for node in ast.walk(TREE):
        if isinstance(node, ast.FunctionDef):
            yield node


def calls() -> Iterator[tuple[str, int]]:
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node.lineno


def test_sections_are_numbered_in_order() -> None:
    numbers = [number for _, number, _ in sections()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_contents_in_the_header_are_the_banners() -> None:
    header = ast.get_docstring(TREE) or ""
    listed = re.findall(r"^ +(\d+)\. +([A-Z][a-z A-Z]+?)  ", header, re.MULTILINE)
    assert [(int(number), name) for number, name in listed] == [(n, name) for _, n, name in sections()]


def test_top_level_names_are_unique() -> None:
    names = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in TREE.body:
        # A table may be added to (|=), but not be given another meaning.
        targets = node.targets if isinstance(node, ast.Assign) else ()
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    assert sorted(names) == sorted(set(names))


def test_code_names_only_what_stands_above_it() -> None:
    lines = definitions()
    upward = []
    for node in TREE.body:
        end = node.end_lineno or node.lineno
        for name in used_names(node):
            if lines.get(name.id, 0) > end:
                upward.append(f"line {name.lineno}: {name.id} is defined at {lines[name.id]}")
    assert upward == []


@pytest.mark.parametrize("power", sorted(POWERS))
def test_power_stays_in_its_section(power: str) -> None:
    places = {section_of(line) for name, line in calls() if name == power}
    assert places <= POWERS[power]


def test_pure_sections_touch_nothing() -> None:
    touched = [
        f"line {line}: {name}"
        for name, line in calls()
        if section_of(line) in PURE_SECTIONS and WORLD.match(name)
    ]
    assert touched == []


def test_functions_are_short() -> None:
    long = {
        function.name: (function.end_lineno or 0) - function.lineno + 1
        for function in functions()
        if (function.end_lineno or 0) - function.lineno + 1 > LONGEST_FUNCTION
    }
    assert long == {}


def test_only_who_is_the_last_to_see_an_error_catches_everything() -> None:
    """A broad `except` hides bugs: there are few places for it, each the last line of defence."""
    broad = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.ExceptHandler) and (node.type is None or dotted(node.type) == "Exception")
    ]
    owners = [
        function.name
        for function in functions()
        for line in broad
        if function.lineno <= line <= (function.end_lineno or 0)
    ]
    assert sorted(owners) == ["be_child", "on_hup", "run_session", "serve"]


def test_words_for_later_are_not_left_in_the_file() -> None:
    assert re.findall(r"\b(TODO|FIXME|XXX|HACK)\b", TEXT) == []
