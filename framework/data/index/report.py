"""What an index run found, for people."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framework.data.shards.tar import EXTENSIONS, ShardProblem
from framework.printable import printable
from framework.storage import join_url

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass
class Tally:
    """Counts of the clips seen so far."""

    num_clips: int = 0
    num_train: int = 0
    num_stills: int = 0
    num_uncaptioned: int = 0
    duration_s: float = 0.0
    resolutions: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    # Videos by duration, to a hundredth of a second.
    durations: Counter[float] = field(default_factory=Counter)

    def add(self, table: pa.Table) -> None:
        """Count the rows of a manifest."""
        num_frames = table["num_frames"].to_numpy()
        is_video = num_frames > 1
        seconds = (num_frames / table["fps"].to_numpy())[is_video]
        first = pc.list_element(table["captions"], 0) if table.num_rows else pa.array([], "string")
        self.num_clips += table.num_rows
        self.num_train += pc.sum(pc.equal(table["split"], "train")).as_py() or 0
        self.num_stills += int((~is_video).sum())
        self.num_uncaptioned += pc.sum(pc.equal(first, "")).as_py() or 0
        self.duration_s += float(seconds.sum())
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
        self.resolutions.update(f"{width}x{height}" for width, height in sizes)
        self.sources.update(table["source"].to_pylist())
        self.durations.update(np.round(seconds, 2).tolist())

    def quantiles(self) -> dict[str, float]:
        """Durations of videos in seconds, by the share of videos that are no longer."""
        if not self.durations:
            return {}
        values, counts = (np.array(x) for x in zip(*sorted(self.durations.items()), strict=True))
        ranks = np.searchsorted(np.cumsum(counts), np.array(QUANTILES) * counts.sum())
        found = values[np.minimum(ranks, len(values) - 1)].tolist()
        return {f"{share:.0%}": value for share, value in zip(QUANTILES, found, strict=True)}


@dataclass(frozen=True)
class IndexReport:
    """What an index run found; `str()` is one screen."""

    manifest_url: str
    fingerprint: str
    num_shards: int
    num_clips: int
    num_train: int
    num_heldout: int
    num_stills: int
    num_uncaptioned: int
    num_ignored: int
    duration_s: float  # of all videos together
    durations: dict[str, float]  # in seconds, by the share of videos that are no longer
    resolutions: dict[str, int]  # "640x360" (width x height) -> clips, most frequent first
    sources: dict[str, int]
    problems: tuple[ShardProblem, ...]

    @property
    def failures(self) -> dict[str, int]:
        """How many things were left out, by cause, most frequent first."""
        return ranked(Counter(problem.cause for problem in self.problems))

    def to_json(self) -> bytes:
        """All but the problems, which `quarantine.json` holds."""
        facts = {key: value for key, value in asdict(self).items() if key != "problems"}
        return (json.dumps(facts | {"failures": self.failures}, indent=2) + "\n").encode()

    def __str__(self) -> str:
        lines = [
            f"{self.num_clips} clips of {self.num_shards} shards, {_duration(self.duration_s)}: "
            f"{self.num_train} train, {self.num_heldout} held out",
            f"  stills           {self.num_stills}",
            f"  without caption  {self.num_uncaptioned}",
            f"  durations        {_durations(self.durations)}",
            f"  resolutions      {_first(self.resolutions)}",
            f"  sources          {_first(self.sources)}",
        ]
        if self.num_ignored:
            lines.append(f"  ignored files    {self.num_ignored} (not {', '.join(EXTENSIONS)})")
        for cause, count in self.failures.items():
            lines.append(f"  left out         {count} x {cause}")
            some = [problem for problem in self.problems if problem.cause == cause][:3]
            for problem in some:
                lines.append(f"    {problem.shown(120)}")
        if self.problems:
            lines.append(f"  all of them in   {join_url(self.manifest_url, 'quarantine.json')}")
        if not self.num_heldout:
            lines.append(
                "  note: nothing is held out; raise data.index.heldout_fraction to evaluate"
            )
        lines.append(f"  manifest         {self.manifest_url} {self.fingerprint}")
        return "\n".join(lines)


def ranked(counts: Counter[str]) -> dict[str, int]:
    """Most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _durations(quantiles: dict[str, float]) -> str:
    if not quantiles:
        return "no video"
    least, low, median, high, most = (f"{seconds:g}" for seconds in quantiles.values())
    return f"{least} to {most} s; the median is {median} s, nine in ten last {low} to {high} s"


def _first(counts: dict[str, int], limit: int = 6) -> str:
    shown = [f"{printable(name, 60)} {count}" for name, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (f", … {len(counts) - limit} more" if len(counts) > limit else "")
