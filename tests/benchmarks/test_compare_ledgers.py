"""Two ledgers compared: handmade run folders, and the command's exit status."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import compare_ledgers
from benchmarks.compare_ledgers import Step, compare, read_ledger

LOSSES = [0.7, 0.6, 0.5, 0.4]


def row(step: int, clips: list[int], loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "clips": clips, "loss": loss, **more}


def segment(
    run: Path, step: int, ranks: list[list[dict[str, Any]]], committed: bool = True
) -> None:
    """The rows of each rank under the checkpoint of `step`."""
    folder = run / f"ledger/step-{step:08d}"
    folder.mkdir(parents=True)
    for rank, rows in enumerate(ranks):
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (folder / f"rank-{rank:05d}.jsonl").write_text(text)
    checkpoint = run / f"checkpoints/step-{step:08d}"
    checkpoint.mkdir(parents=True)
    if committed:
        (checkpoint / "COMMITTED").write_text("{}")


def two_segments(run: Path, losses: list[float] = LOSSES) -> Path:
    """Four steps of two ranks; step n has the clips 2 n and 2 n + 1."""
    for end in (2, 4):
        ranks = [[row(n, [2 * n + r], losses[n]) for n in (end - 2, end - 1)] for r in (0, 1)]
        segment(run, end, ranks)
    return run


def command(*arguments: str | Path) -> tuple[int, str]:
    """By its path, where nothing of the project can be imported."""
    done = subprocess.run(
        [sys.executable, "-I", compare_ledgers.__file__, *arguments], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_equal_runs_are_equal_to_the_bit(tmp_path: Path) -> None:
    a, b = two_segments(tmp_path / "a"), two_segments(tmp_path / "b")
    assert read_ledger(a) == {n: Step([2 * n, 2 * n + 1], LOSSES[n]) for n in range(4)}
    status, text = command(a, b, "--steps", "4")
    assert status == 0, text
    assert "steps: 4 in A, 4 in B, 4 in common" in text


def test_other_ranks_may_have_the_same_clips(tmp_path: Path) -> None:
    segment(tmp_path / "a", 1, [[row(0, [1, 4], 0.5)], [row(0, [2, 3], 0.5)]])
    segment(tmp_path / "b", 1, [[row(0, [4, 3, 2, 1], 0.5)]])
    assert compare(read_ledger(tmp_path / "a"), read_ledger(tmp_path / "b")).equal


def test_the_loss_is_the_one_that_the_first_rank_tells(tmp_path: Path) -> None:
    segment(tmp_path, 1, [[row(0, [1], 0.5)], [row(0, [2], 0.25)], [row(0, [3], 0.125)]])
    assert read_ledger(tmp_path) == {0: Step([1, 2, 3], 0.5)}


def test_a_last_digit_is_told(tmp_path: Path) -> None:
    near = math.nextafter(0.5, 1)
    a = two_segments(tmp_path / "a")
    b = two_segments(tmp_path / "b", [0.7, 0.6, near, 0.4])
    status, text = command(a, b)
    assert status == 1
    assert "clips: equal in all 4 steps" in text
    assert "losses, to the bit: 1 of 4 steps differ" in text
    assert "first at step 2: 0.5 in A, 0.5000000000000001 in B" in text
    assert "largest relative difference: 2.22e-16, at step 2" in text


def test_the_newest_segment_tells_a_step_that_was_done_again(tmp_path: Path) -> None:
    a, b = two_segments(tmp_path / "a"), tmp_path / "b"
    first = [row(n, [2 * n, 2 * n + 1], LOSSES[n]) for n in (0, 1)]
    # Its checkpoint was refused; the run went on from step 0, by one rank more, with another end.
    segment(b, 2, [[first[0]], [row(1, [90], 9.0)]], committed=False)
    again = [row(n, [2 * n], LOSSES[n]) for n in (1, 2, 3)]
    segment(b, 4, [again, [row(n, [2 * n + 1], LOSSES[n]) for n in (1, 2, 3)], []])
    assert read_ledger(a) == read_ledger(b)
    assert command(a, b, "--steps", "4")[0] == 0


def test_a_segment_after_the_last_committed_checkpoint_does_not_count(tmp_path: Path) -> None:
    a, b = two_segments(tmp_path / "a"), two_segments(tmp_path / "b")
    segment(b, 6, [[row(3, [99], 9.0), row(4, [98], 9.0)]], committed=False)
    (b / "ledger/step-00000004/rank-00002.jsonl.0123abcd.tmp").write_text("torn")
    assert read_ledger(b) == read_ledger(a)
    (b / "checkpoints/step-00000006/COMMITTED").write_text("{}")
    assert read_ledger(b)[3] == Step([99], 9.0)
    assert command(a, b)[0] == 1


def test_different_clips_are_named(tmp_path: Path) -> None:
    segment(tmp_path / "a", 2, [[row(0, [1, 2], 0.5), row(1, [3, 4], 0.4)]])
    segment(tmp_path / "b", 2, [[row(0, [1, 2], 0.5), row(1, [3, 5], 0.4)]])
    status, text = command(tmp_path / "a", tmp_path / "b")
    assert status == 1
    assert "clips: 1 of 2 steps differ" in text
    assert "first at step 1: 2 in A, 2 in B\n  only in A: 4\n  only in B: 5" in text
    assert "losses, to the bit: equal in all 2 steps" in text


def test_a_loss_that_is_no_number_equals_only_its_like(tmp_path: Path) -> None:
    lost = {0: Step([1], None)}
    assert compare(lost, lost).equal
    assert compare(lost, {0: Step([1], 0.5)}).largest == (math.inf, 0)
    segment(tmp_path / "a", 1, [[row(0, [1], None, skipped="loss", failed=["x"])]])
    assert read_ledger(tmp_path / "a") == lost


def test_too_few_steps_are_not_equal(tmp_path: Path) -> None:
    a, b = two_segments(tmp_path / "a"), tmp_path / "b"
    segment(b, 2, [[row(n, [2 * n, 2 * n + 1], LOSSES[n]) for n in (0, 1)]])
    assert command(a, b, "--steps", "2")[0] == 0  # of those in common
    status, text = command(a, b, "--steps", "4")
    assert status == 1
    assert "B lacks 2 of the first 4 steps: 2, 3" in text


def test_nothing_in_common_is_not_equal(tmp_path: Path) -> None:
    a = two_segments(tmp_path / "a")
    segment(tmp_path / "b", 2, [[row(0, [0, 1], 0.7)]], committed=False)
    status, text = command(a, tmp_path / "b")
    assert status == 1
    assert "4 in A, 0 in B, 0 in common" in text
    status, text = command(a, tmp_path / "c")
    assert status == 1
    assert "c has no folder ledger" in text
