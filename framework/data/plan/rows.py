"""A row of a plan: one clip of a pack, where its bytes lie, and what is made of them.

`ClipPlan` is the one list of a row's columns: the schema of the window files is read off its types.
Its `view` takes the columns of `View`; its `grid` takes none, since it follows from the view.
"""

import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

import pyarrow as pa

from framework.data.plan.recipe import Recipe
from framework.data.plan.views import Geometry, View

COPIED = "as it is in the manifest"

_Int32 = Annotated[int, pa.int32()]
_Int64 = Annotated[int, pa.int64()]
_Float32 = Annotated[float, pa.float32()]
_String = Annotated[str, pa.string()]
_Bool = Annotated[bool, pa.bool_()]


@dataclass(frozen=True)
class ClipPlan:
    """One clip of a pack."""

    clip_id: Annotated[_Int64, COPIED]  # -1 for a dummy
    epoch: _Int32  # of its own source, how often it came before; all draws of it hang on this
    shard: Annotated[_String, COPIED]
    key: Annotated[_String, COPIED]
    offset: Annotated[_Int64, COPIED]
    size_bytes: Annotated[_Int64, COPIED]
    checksum: Annotated[_Int64, COPIED]  # of its first `checked_bytes`
    checked_bytes: Annotated[_Int64, COPIED]
    view: View
    grid: tuple[int, int, int]  # tokens in time, height, width
    fps: _Float32  # frames a second that the model sees
    caption: _String  # of this epoch; "" where it is dropped
    tokens: _Int32  # those that are kept
    text_tokens: _Int32
    source: Annotated[_String, COPIED]
    source_id: _Int32  # its place in `Plan.sources`; -1 for a dummy
    weight: _Float32
    dummy: _Bool  # no storage is read: its frames are black

    def to_row(self) -> dict[str, Any]:
        """Its columns."""
        row = asdict(self)
        del row["grid"]
        return row | row.pop("view")

    @classmethod
    def from_row(cls, row: Mapping[str, Any], geometry: Geometry) -> "ClipPlan":
        """The clip of a row, which may have more columns."""
        view = View(**{f.name: row[f.name] for f in fields(View)})
        grid = geometry.token_grid(view.num_frames, view.height, view.width)
        names = (f.name for f in fields(cls) if f.name not in ("view", "grid"))
        return cls(view=view, grid=grid, **{name: row[name] for name in names})


@dataclass(frozen=True)
class PackPlan:
    """One pack of a step; `index` is its place in the step."""

    clips: tuple[ClipPlan, ...]
    index: int
    dummy: bool = False


def unread_clip(recipe: Recipe, view: View, text_tokens: int, **others: Any) -> ClipPlan:
    """A clip of which no storage is read: a dummy, but for `others`, which are fields."""
    dummy = ClipPlan(
        clip_id=-1,
        epoch=0,
        shard="",
        key="",
        offset=0,
        size_bytes=0,
        checksum=0,
        checked_bytes=0,
        view=view,
        grid=recipe.geometry.token_grid(view.num_frames, view.height, view.width),
        fps=recipe.views.fps or 1.0,
        caption="",
        tokens=recipe.geometry.num_tokens(view.num_frames, view.height, view.width),
        text_tokens=text_tokens,
        source="",
        source_id=-1,
        weight=0.0,
        dummy=True,
    )
    return replace(dummy, **others)


def dummy_clip(recipe: Recipe, null_text_tokens: int) -> ClipPlan:
    """One black clip of weight zero, of the smallest view allowed, with the empty caption."""
    if not 1 <= null_text_tokens <= recipe.max_text_tokens:
        raise ValueError(
            f"max_text_tokens={recipe.max_text_tokens} must hold the empty caption's "
            f"{null_text_tokens} tokens, and that must be 1 or more"
        )
    return unread_clip(recipe, recipe.views.smallest_view(recipe.geometry), null_text_tokens)


def _columns() -> dict[str, tuple[pa.DataType, bool]]:
    """Name -> type, and whether it is the manifest's, in the order of the fields."""
    hints = typing.get_type_hints(ClipPlan, include_extras=True)
    columns: dict[str, tuple[pa.DataType, bool]] = {}
    for name, hint in hints.items():
        if hint is View:
            of_view = {int: pa.int32(), bool: pa.bool_()}
            views = typing.get_type_hints(View).items()
            columns |= {n: (of_view[kind], False) for n, kind in views}
        elif typing.get_origin(hint) is Annotated:
            columns[name] = (hint.__metadata__[0], COPIED in hint.__metadata__)
        else:
            assert name == "grid", name
    return columns


_COLUMNS = _columns()
# Columns that are the same in the manifest.
FROM_MANIFEST = tuple(name for name, (_, copied) in _COLUMNS.items() if copied)
# What is known of a clip before its place in a step is.
UNPLACED = pa.schema([(name, kind) for name, (kind, _) in _COLUMNS.items()])
_PLACE = pa.schema(
    [
        ("step", pa.int32()),  # within the epoch
        ("pack", pa.int32()),  # within the step, 0 to G - 1
        ("position", pa.int32()),  # within the pack
    ]
)
ROWS = pa.schema([*_PLACE, *UNPLACED])
