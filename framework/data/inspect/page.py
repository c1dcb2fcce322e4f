"""A look at what a plan will do, before any GPU is taken: one page, as HTML and as PNG.

    python -m framework.data.inspect experiment=demo

Makes the first epoch of the plan that a run of this config would have, without taking the run's
name, and writes `<run.name>.inspect/report.html` below `run.root`: figures of the plan (histograms
of what the model will see, fill, predicted cost by step and by rank), the share of the data that is
used, and contact sheets of some packs.
"""

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framework.contact_sheet import contact_sheet
from framework.data.manifest.table import Manifest
from framework.data.plan.rows import ClipPlan, PackPlan
from framework.data.plan.store import Plan
from framework.data.stream.collate import ClipReader
from framework.printable import printable, printable_page
from framework.storage import Store
from framework.video import VideoError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_STEPS = 256  # of an epoch that are looked at closely; costs and fill are of all
SHOWN_PACKS = 2
SHOWN_CLIPS = 8  # of a pack
_INK, _FAINT, _BLUE, _ORANGE = "#202124", "#80868b", "#3b6fb6", "#d97a34"


@dataclass(frozen=True)
class Seen:
    """What training will see of the clips of some steps, as columns, (n,) each."""

    clips: list[ClipPlan]
    frames_share: np.ndarray  # of a clip's frames, those that the view spans
    pixels_share: np.ndarray  # of a frame's pixels, those that the crop keeps

    @property
    def seconds(self) -> np.ndarray:
        """Duration of each view."""
        return np.array([c.view.num_frames / c.fps for c in self.clips])


def inspect(
    plan: Plan, manifest: Manifest, reader: ClipReader, num_ranks: int, out: Store
) -> dict[str, str]:
    """Write the page to `out`; gives the facts of its table, by name."""
    packs = [
        pack
        for step in _spread(plan.num_steps(0), MAX_STEPS)
        for pack in plan.packs(0, step, 0, 1)
        if not pack.dummy
    ]
    seen = _seen([clip for pack in packs for clip in pack.clips], manifest)
    costs = _costs(plan, packs)
    facts = _facts(plan, seen, num_ranks, costs)
    chart = _figure(plan, seen, packs, num_ranks, costs)
    sheets = [_sheet(pack, reader) for pack in _spread_of(packs, SHOWN_PACKS)]
    out.write("report.png", chart)
    for i, sheet in enumerate(sheets):
        out.write(f"pack-{i}.png", sheet)
    out.write("report.html", _page(plan, facts, [chart, *sheets]).encode())
    return facts


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` numbers, evenly spread."""
    return sorted(set(np.linspace(0, count - 1, min(count, limit)).astype(int).tolist()))


def _spread_of(packs: Sequence[PackPlan], limit: int) -> list[PackPlan]:
    """Packs of different kinds: those of the fewest and of the most clips, and between."""
    ordered = sorted(packs, key=lambda pack: len(pack.clips))
    return [ordered[i] for i in _spread(len(ordered), limit)]


def _seen(clips: list[ClipPlan], manifest: Manifest) -> Seen:
    ids = pa.array([clip.clip_id for clip in clips], pa.int64())
    columns = ["clip_id", "num_frames", "height", "width"]
    found = pa.concat_tables(
        part.filter(pc.is_in(part["clip_id"], ids)).select(columns)
        for part in map(manifest.part, range(manifest.num_parts))
    )
    rows = {row["clip_id"]: row for row in found.to_pylist()}
    frames, pixels = [], []
    for clip in clips:
        row, view = rows[clip.clip_id], clip.view
        frames.append(((view.num_frames - 1) * view.stride + 1) / row["num_frames"])
        shape = (view.width * row["height"]) / (view.height * row["width"])
        pixels.append(min(shape, 1 / shape))
    return Seen(clips, np.array(frames), np.array(pixels))


def _costs(plan: Plan, packs: Sequence[PackPlan]) -> np.ndarray:
    """(n,) predicted cost of each pack."""
    cost = plan.recipe.cost
    return np.array([cost.clip_costs(np.array([c.tokens for c in p.clips])).sum() for p in packs])


def _facts(plan: Plan, seen: Seen, num_ranks: int, costs: np.ndarray) -> dict[str, str]:
    summary = plan.summary(0)
    sources = Counter(clip.source for clip in seen.clips).most_common()
    empty = sum(not clip.caption for clip in seen.clips) / len(seen.clips)
    facts = {
        "plan": f"{summary.digest}, epoch 0, split {plan.split}",
        "steps of an epoch": f"{summary.steps:,} of {summary.global_batch_packs} packs",
        "clips used": f"{summary.clips:,} of {summary.offered:,} "
        f"({summary.clips / summary.offered:.1%})",
        "refused": ", ".join(f"{n:,} {cause}" for cause, n in sorted(summary.refused.items()))
        or "none",
        "frames used": f"{seen.frames_share.mean():.1%} of a clip's, on the average",
        "pixels used": f"{seen.pixels_share.mean():.1%} of a frame's, after cropping",
        "tokens": f"{summary.tokens:,} an epoch, {summary.tokens / summary.steps:,.0f} a step",
        "fill": f"{summary.fill:.3f} of the packs' tokens, {summary.text_fill:.3f} of their text",
        "imbalance": f"{summary.imbalance:.3f}: the dearest pack over the mean pack of a step",
        "clips in a pack": f"{len(seen.clips) / len(costs):.1f} on the average",
        "captions": f"{1 - empty:.1%} shown, the others dropped or absent",
        "sources": ", ".join(
            f"{printable(name, 60)} {n / len(seen.clips):.1%}" for name, n in sources[:8]
        ),
        "ranks": f"{num_ranks}; packs of each in a step: "
        f"{-(-summary.global_batch_packs // num_ranks)}",
    }
    if summary.filtered:
        facts["left out by data.where"] = f"{summary.filtered:,}"
    return facts


def _figure(
    plan: Plan, seen: Seen, packs: Sequence[PackPlan], num_ranks: int, costs: np.ndarray
) -> bytes:
    """Six charts, PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    recipe = plan.recipe
    _histogram(axes[0, 0], seen.seconds, "duration seen, seconds", "clips")
    tokens = np.array([clip.tokens for clip in seen.clips])
    _histogram(axes[0, 1], tokens, "tokens of a clip", "clips")
    sizes = Counter(f"{c.view.width}x{c.view.height}" for c in seen.clips).most_common(12)
    names, counts = zip(*reversed(sizes), strict=True)
    axes[0, 2].barh(names, counts, color=_BLUE)
    _dress(axes[0, 2], "size seen, width x height", "")
    fills = np.array([sum(c.tokens for c in p.clips) for p in packs]) / recipe.max_tokens
    _histogram(axes[1, 0], fills, "fill of a pack", "packs")

    index = range(plan.num_steps(0))
    totals = [plan.totals(0, step) for step in _spread(len(index), 512)]
    mean = np.array([t.cost / recipe.global_batch_packs for t in totals])
    dearest = np.array([t.max_cost for t in totals])
    unit = mean.mean()
    steps = np.linspace(0, len(index) - 1, len(totals))
    axes[1, 1].plot(steps, dearest / unit, color=_ORANGE, lw=1, label="dearest pack")
    axes[1, 1].plot(steps, mean / unit, color=_BLUE, lw=1, label="mean pack")
    axes[1, 1].legend(frameon=False, fontsize=8)
    axes[1, 1].set_ylim(0, 1.15 * dearest.max() / unit)
    axes[1, 1].xaxis.get_major_locator().set_params(integer=True)
    _dress(axes[1, 1], "predicted cost by step; 1 is the mean", "")

    by_rank = np.zeros(num_ranks)
    for pack, cost in zip(packs, costs, strict=True):
        by_rank[pack.index % num_ranks] += cost
    axes[1, 2].bar(np.arange(num_ranks), by_rank / by_rank.mean(), color=_BLUE)
    _dress(axes[1, 2], "predicted cost by rank; 1 is the mean", "")
    axes[1, 2].xaxis.get_major_locator().set_params(integer=True)

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _histogram(axes: "Axes", values: np.ndarray, title: str, of: str) -> None:
    axes.hist(values, bins=min(40, max(5, len(np.unique(values)))), color=_BLUE)
    _dress(axes, title, of)


def _dress(axes: "Axes", title: str, of: str) -> None:
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.set_ylabel(of, fontsize=8, color=_FAINT)
    axes.tick_params(labelsize=8, colors=_FAINT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _sheet(pack: PackPlan, reader: ClipReader) -> bytes:
    """Some clips of a pack as training will see them."""
    clips = [pack.clips[i] for i in _spread(len(pack.clips), SHOWN_CLIPS)]
    videos, captions = [], []
    for clip in clips:
        try:
            frames = reader.frames(clip)
        except (VideoError, EOFError, OSError) as error:
            frames = np.full((1, clip.view.height, clip.view.width, 3), 200, np.uint8)
            captions.append(printable(f"cannot be read: {error}"))
        else:
            captions.append(printable_page(clip.caption, 400) or "(no caption)")
        videos.append(frames)
    tokens = sum(clip.tokens for clip in pack.clips)
    title = f"a pack of {len(pack.clips)} clips, {tokens:,} tokens; {len(clips)} shown"
    return contact_sheet(videos, captions, title=title)


def _page(plan: Plan, facts: dict[str, str], images: Sequence[bytes]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    pictures = "".join(
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        for image in images
    )
    style = (
        f"body{{font:15px/1.5 system-ui,sans-serif;color:{_INK};max-width:1240px;"
        "margin:2rem auto;padding:0 1rem}h1{font-size:1.3rem}"
        f"th{{text-align:left;font-weight:400;color:{_FAINT};padding-right:2rem;"
        "vertical-align:top;white-space:nowrap}img{max-width:100%;display:block;margin:1.5rem 0}"
    )
    title = html.escape(f"Plan {plan.digest}: what training will see")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style><h1>{title}</h1><table>{rows}</table>{pictures}</html>"
    )
