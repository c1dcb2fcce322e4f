"""Whatever text comes, what is shown is text: no control of a terminal, one line, not too long."""

import sys
import unicodedata

import pytest

from framework.printable import MAX_CHARS, printable, printable_page

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_ordinary_text_stays_as_it_is() -> None:
    for text in (
        "",
        "web",
        "a/b-0001.v1",
        "Žlutý kůň 🐎",
        "家族 👩‍👩‍👧",
        "नमस्ते",
        "שלום",
        "a 'b' \\x1b",
    ):
        assert printable(text) == text
        assert printable_page(text) == text


def test_every_control_is_escaped() -> None:
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs") or char in BIDI:
            assert printable(char) == ascii(char)[1:-1]
            assert printable_page(char) == (char if char in "\t\n" else ascii(char)[1:-1])


@pytest.mark.parametrize("char", ["a", "\x1b", "\n", "\u202e", "🐎"])
def test_megabytes_are_cut_and_counted(char: str) -> None:
    shown = printable(char * 1_000_000)
    assert len(shown) < MAX_CHARS + 30
    assert shown.endswith("… (1,000,000 characters)")
    assert shown.startswith(ascii(char)[1:-1] if char in "\x1b\n\u202e" else char)
    assert len(printable_page(char * 1_000_000)) < 100_100


def test_anything_is_shown() -> None:
    assert printable(ValueError("no\r\x9b2J")) == r"no\r\x9b2J"
    assert printable(7, 3) == "7"
    assert printable("abcd", 3) == "abc… (4 characters)"
