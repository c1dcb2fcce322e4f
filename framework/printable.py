"""Text from data, such as keys, sources and captions, as a terminal, a log or an error may show it.

Escape sequences move a terminal's cursor, line breaks make up lines of a log, bidirectional
controls show a text in another order than it has, and megabytes hide what stands beside them.
Manifests and lists of quarantine keep the true text.
"""

import re

MAX_CHARS = 200  # of a name among other words; chosen by hand
MAX_PAGE_CHARS = 100_000  # of a report or an error, stacks of many ranks included; chosen by hand

# C0, DEL, C1; bidirectional marks, embeddings and isolates; line and paragraph separators; halves
# of surrogate pairs, which cannot be written; the byte order mark and tags, which nobody sees.
_CONTROLS = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff"
    r"\U000e0000-\U000e007f"
)
_IN_A_LINE = re.compile(rf"[\t\n{_CONTROLS}]")
_IN_A_PAGE = re.compile(rf"[{_CONTROLS}]")


def printable(text: object, max_chars: int = MAX_CHARS) -> str:
    """Any text in one line: control characters as Python writes them, what is too long cut."""
    return _shown(str(text), max_chars, _IN_A_LINE)


def printable_page(text: object, max_chars: int = MAX_PAGE_CHARS) -> str:
    """Words of our own, of several lines: as `printable`, but their line breaks and tabs stay."""
    return _shown(str(text), max_chars, _IN_A_PAGE)


def _shown(text: str, max_chars: int, controls: re.Pattern[str]) -> str:
    shown = controls.sub(lambda found: found[0].encode("unicode_escape").decode(), text[:max_chars])
    if len(text) > max_chars or len(shown) > max_chars:
        return f"{shown[:max_chars]}… ({len(text):,} characters)"
    return shown
