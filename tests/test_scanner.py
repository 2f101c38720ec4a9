"""The scanner: blanks, comments, joined lines, and where a word stands."""

from __future__ import annotations

import pytest

import sockd


def words(text: str) -> list[str]:
    """Take every word of `text`, whatever its line."""
    scanner = sockd.Scanner(text, "sockd.conf")
    found = []
    while True:
        scanner.skip_space()
        token = scanner.take(sockd.STRANGE_WORD)
        if token is None:
            return found
        found.append(token.text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", [], id="nothing"),
        pytest.param(" \t a \t b ", ["a", "b"], id="blanks and tabs"),
        pytest.param("a\nb\n\n c", ["a", "b", "c"], id="lines"),
        pytest.param("a\r\nb\r\n", ["a", "b"], id="CRLF"),
        pytest.param("a\r", ["a"], id="CR at the end of the file"),
        pytest.param("a # b\nc", ["a", "c"], id="comment"),
        pytest.param("# a\n#b\n", [], id="only comments"),
        pytest.param("a#b", ["a#b"], id="hash within a word"),
        pytest.param("a \\\n b", ["a", "b"], id="joined lines"),
        pytest.param("a \\\r\n b", ["a", "b"], id="joined lines with CRLF"),
        pytest.param("a # b \\\nc", ["a", "c"], id="comments are not joined"),
        pytest.param("a{b}c", ["a", "{", "b", "}", "c"], id="braces need no blanks"),
        pytest.param("\xef\xbb\xbfa", ["a"], id="byte order mark"),
        pytest.param("a\0b", ["a", "\0", "b"], id="NUL"),
        pytest.param("a\fb", ["a", "\f", "b"], id="form feed"),
    ],
)
def test_scanner_takes_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_scanner_keeps_a_word_that_it_only_looks_at() -> None:
    scanner = sockd.Scanner("one two", "sockd.conf")
    assert scanner.look(sockd.KEYWORD_WORD) == ("one", 0)
    assert scanner.take(sockd.KEYWORD_WORD) == ("one", 0)
    assert scanner.take(sockd.KEYWORD_WORD) == ("two", 4)
    assert scanner.take(sockd.KEYWORD_WORD) is None
    assert scanner.at_end()


def test_scanner_stays_in_its_line_unless_told() -> None:
    scanner = sockd.Scanner("a\nb", "sockd.conf")
    scanner.take(sockd.KEYWORD_WORD)
    assert scanner.take(sockd.KEYWORD_WORD) is None
    assert scanner.take_below(sockd.KEYWORD_WORD) == ("b", 2)


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("", True),
        ("  \n b", True),
        (" # b", True),
        (" }", True),
        (" b", False),
        (" \\\n b", False),
    ],
)
def test_scanner_knows_where_a_list_of_values_ends(rest: str, expected: bool) -> None:
    scanner = sockd.Scanner("a" + rest, "sockd.conf")
    scanner.take(sockd.KEYWORD_WORD)
    assert scanner.values_end() is expected


@pytest.mark.parametrize(
    ("offset", "place"),
    [(0, (1, 1)), (2, (1, 3)), (3, (1, 4)), (4, (2, 1)), (5, (3, 1)), (7, (3, 3))],
)
def test_scanner_counts_lines_and_columns_from_1(offset: int, place: tuple[int, int]) -> None:
    position = sockd.Scanner("abc\n\n\tde\n", "sockd.conf").place(offset)
    assert (position.file, position.line, position.column) == ("sockd.conf", *place)


def test_scanner_counts_right_in_any_order() -> None:
    text = "one\ntwo\n\nfour"
    scanner = sockd.Scanner(text, "sockd.conf")
    offsets = [9, 0, 4, 12, 5, 8]
    assert [scanner.place(offset).line for offset in offsets] == [4, 1, 2, 4, 2, 3]


def test_scanner_counts_joined_lines_as_they_stand_in_the_file() -> None:
    scanner = sockd.Scanner("a \\\n  b", "sockd.conf")
    scanner.take(sockd.KEYWORD_WORD)
    token = scanner.take(sockd.KEYWORD_WORD)
    assert token is not None
    assert str(scanner.place(token.offset)) == "sockd.conf:2:3"


def test_scanner_gives_the_line_without_its_end() -> None:
    scanner = sockd.Scanner("one\r\ntwo\nthree", "sockd.conf")
    lines = [scanner.line_text(offset) for offset in (0, 6, 12, 1)]
    assert lines == ["one", "two", "three", "one"]
