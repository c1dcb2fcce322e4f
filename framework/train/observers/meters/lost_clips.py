"""Clips that could not be read, by their share of the tokens; too many of them end the run."""

from collections.abc import Sequence
from dataclasses import dataclass

from framework.train.loop import StepOutput
from framework.train.observers.meters.meter import Meter


@dataclass(frozen=True)
class Share:
    """One rank's part of a window."""

    lost_tokens: int
    failed: list[str]  # the clips, with the cause


class LostClips(Meter[Share]):
    """data/lost_share of the planned tokens, and data/failed_clips of a window."""

    def __init__(self, max_lost_share: float) -> None:
        """`max_lost_share`: of a window; above it `check` ends the run."""
        self._max_lost_share = max_lost_share
        self._lost_tokens = self._tokens = 0
        self._steps: list[int] = []
        self._failed: list[str] = []
        self._too_many = ""

    def step(self, output: StepOutput) -> None:
        """Count what is lost."""
        inputs = output.inputs
        self._steps.append(inputs.step)
        self._tokens += inputs.tokens
        for batch, _ in inputs.packs:
            is_lost = (batch.clip_ids >= 0) & (batch.clip_weights == 0)
            self._lost_tokens += int(batch.cu_seqlens.diff()[is_lost].sum())
            self._failed += batch.failed

    def measure(self) -> Share:
        """Of this rank."""
        share = Share(self._lost_tokens, self._failed)
        self._lost_tokens, self._failed = 0, []
        return share

    def figures(self, by_rank: Sequence[Share]) -> dict[str, float]:
        """Of all ranks."""
        lost_share = sum(share.lost_tokens for share in by_rank) / self._tokens
        failed = [name for share in by_rank for name in share.failed]
        if lost_share > self._max_lost_share:
            self._too_many = (
                f"{lost_share:.0%} of the tokens of steps {self._steps[0]} to {self._steps[-1]} "
                f"are of clips that could not be read (train.max_lost_share="
                f"{self._max_lost_share}), such as {'; '.join(failed[:3])}"
            )
        self._tokens, self._steps = 0, []
        return {"data/lost_share": lost_share, "data/failed_clips": float(len(failed))}

    def check(self) -> None:
        """ValueError where more is lost than may be."""
        if self._too_many:
            raise ValueError(self._too_many)
