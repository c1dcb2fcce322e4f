"""Whether two runs trained alike: compares their ledgers and says where they part.

    python -m benchmarks.compare_ledgers RUN_A RUN_B [--steps N]

RUN_A and RUN_B are run folders on this machine. The exit status is 0 where each step that both runs
have has the same clips and the same loss, to the bit, and there is at least one such step; else 1.
`--steps N` also demands that both have the steps from 0 to N - 1.

It imports nothing of Longtake, for it compares runs of different commits. It reads a ledger as the
trainer does: segments count up to the newest committed checkpoint, and where several segments tell
a step the newest counts.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """What the ledger says of one step."""

    clips: list[int]  # sorted, of all ranks
    loss: float | None  # None where it was no number


@dataclass(frozen=True)
class Comparison:
    """How two ledgers differ; the lists have steps in ascending order."""

    common: list[int]  # steps that both have
    clips_part: list[int]  # those of them with different clips
    losses_part: list[int]  # those of them whose losses differ in a bit
    largest: tuple[float, int]  # relative difference of two losses, and its step

    @property
    def equal(self) -> bool:
        """Whether there is something to compare, and it is the same in both."""
        return bool(self.common) and not self.clips_part and not self.losses_part


def read_ledger(run: Path) -> dict[int, Step]:
    """step -> what the run in folder `run` did, up to its newest committed checkpoint."""
    markers = (run / "checkpoints").glob("step-*/COMMITTED")
    newest = max((_number(marker.parent) for marker in markers), default=-1)
    steps: dict[int, Step] = {}
    told_by: dict[int, int] = {}  # step -> the segment that tells it
    for path in sorted((run / "ledger").glob("step-*/rank-*.jsonl")):  # older segments come first
        segment = _number(path.parent)
        if segment > newest:
            continue
        for line in path.read_text().splitlines():
            row = json.loads(line)
            number, clips, loss = row["step"], row["clips"], row["loss"]
            if told_by.get(number) == segment:  # by an earlier rank; the first one's loss stays
                clips, loss = steps[number].clips + clips, steps[number].loss
            steps[number] = Step(sorted(clips), loss)
            told_by[number] = segment
    return steps


def compare(a: dict[int, Step], b: dict[int, Step]) -> Comparison:
    """Compare the steps that both ledgers have."""
    common = sorted(a.keys() & b.keys())
    return Comparison(
        common=common,
        clips_part=[n for n in common if a[n].clips != b[n].clips],
        # repr tells 0.0 from -0.0, and gives two floats one text only where their bits are equal.
        losses_part=[n for n in common if repr(a[n].loss) != repr(b[n].loss)],
        largest=max(
            ((_relative(a[n].loss, b[n].loss), n) for n in common),
            key=lambda pair: pair[0],
            default=(0.0, 0),
        ),
    )


def report(a: dict[int, Step], b: dict[int, Step]) -> str:
    """The comparison in words."""
    found = compare(a, b)
    lines = [f"steps: {len(a)} in A, {len(b)} in B, {len(found.common)} in common"]
    if not found.common:
        return lines[0]
    count = len(found.common)
    lines.append(f"clips: {_verdict(found.clips_part, count)}")
    if found.clips_part:
        first = found.clips_part[0]
        only_a = sorted(set(a[first].clips) - set(b[first].clips))
        only_b = sorted(set(b[first].clips) - set(a[first].clips))
        lines += [
            f"  first at step {first}: {len(a[first].clips)} in A, {len(b[first].clips)} in B",
            f"  only in A: {_few(only_a)}",
            f"  only in B: {_few(only_b)}",
        ]
    lines.append(f"losses, to the bit: {_verdict(found.losses_part, count)}")
    if found.losses_part:
        first = found.losses_part[0]
        size, step = found.largest
        lines += [
            f"  first at step {first}: {a[first].loss!r} in A, {b[first].loss!r} in B",
            f"  largest relative difference: {size:.3g}, at step {step}",
        ]
    else:
        lines.append("  largest relative difference: 0")
    return "\n".join(lines)


def missing(steps: dict[int, Step], num_steps: int) -> list[int]:
    """Steps from 0 to `num_steps` - 1 that a ledger lacks."""
    return [n for n in range(num_steps) if n not in steps]


def main() -> int:
    """Compare two run folders; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="both must have that many, from 0")
    args = parser.parse_args()
    for run in (args.run_a, args.run_b):
        if not (run / "ledger").is_dir():
            print(f"{run} has no folder ledger: is it the folder of a run?")
            return 1
    a, b = read_ledger(args.run_a), read_ledger(args.run_b)
    print(f"A: {args.run_a}\nB: {args.run_b}\n{report(a, b)}")
    status = 0 if compare(a, b).equal else 1
    for name, steps in (("A", a), ("B", b)):
        if lacks := missing(steps, args.steps):
            print(f"{name} lacks {len(lacks)} of the first {args.steps} steps: {_few(lacks)}")
            status = 1
    print("equal" if status == 0 else "NOT equal")
    return status


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _relative(a: float | None, b: float | None) -> float:
    """Difference over the larger magnitude; infinite where one of the two is no number."""
    if a == b:
        return 0.0
    if a is None or b is None:
        return float("inf")
    return abs(a - b) / max(abs(a), abs(b))


def _verdict(parted: list[int], count: int) -> str:
    return f"{len(parted)} of {count} steps differ" if parted else f"equal in all {count} steps"


def _few(numbers: list[int], most: int = 8) -> str:
    text = ", ".join(map(str, numbers[:most])) or "none"
    return text + (", …" if len(numbers) > most else "")


if __name__ == "__main__":
    sys.exit(main())
