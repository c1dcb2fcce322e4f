"""What a person sees while a run goes."""

import io

from framework.terminal import Terminal, duration


def test_durations_read_as_clocks() -> None:
    assert [duration(s) for s in (0, 61.4, 3600, 36_001)] == ["0:00", "1:01", "1:00:00", "10:00:01"]


def test_a_line_says_how_far_and_how_long_still() -> None:
    out = io.StringIO()
    terminal = Terminal(every_s=0.0, out=out)
    terminal.stage(2, 6, "planning and training", rest_s=125)
    terminal.show({"stage": "training", "step": 40, "resumed": True})
    for step in (50, 60):
        terminal.show({"step": step, "steps": 100, "loss": 0.5, "speed/tokens_per_s": 1234.0})
    first, resumed, *_, last = [line for line in out.getvalue().splitlines() if line]
    assert first == "[2/6] planning and training   (0:00 so far, about 2:05 to go)"
    assert resumed == "  resuming at step 40 …"
    assert "60/100" in last
    assert "1,234 tokens/s" in last
    assert last.endswith("to go")


def test_no_text_of_a_line_moves_the_cursor() -> None:
    out = io.StringIO()
    terminal = Terminal(out=out)
    terminal.say("one\n\x1b[2Jtwo\x9b\r\u202e")
    terminal.show({"text": "clip \x1b]0;title\x07 " + "x" * 1_000_000})
    shown = out.getvalue()
    assert shown.startswith("one\n\\x1b[2Jtwo\\x9b\\r\\u202e\n")
    assert len(shown) < 101_000
    assert not set(shown) & set("\x1b\x9b\r\x07\u202e")
