"""One list of a row's columns: as they lie on disk, and back again."""

from dataclasses import replace

import pyarrow as pa
import pytest

from framework.data.manifest.table import SCHEMA
from framework.data.plan.cost import CostModel
from framework.data.plan.recipe import Recipe
from framework.data.plan.rows import (
    FROM_MANIFEST,
    ROWS,
    UNPLACED,
    ClipPlan,
    dummy_clip,
    unread_clip,
)
from framework.data.plan.views import Geometry, View, ViewConfig

RECIPE = Recipe(
    views=ViewConfig(frames=(4, 8), sizes=((16, 16), (16, 32)), fps=8.0),
    geometry=Geometry(4, 8, False, (1, 1, 1)),
    cost=CostModel(1),
    max_tokens=100,
    max_text_tokens=10,
    max_clips=4,
    global_batch_packs=2,
)


def test_columns_of_window_files() -> None:
    """Whoever changes these must raise recipe.FORMAT."""
    assert [(field.name, str(field.type)) for field in ROWS] == [
        ("step", "int32"),
        ("pack", "int32"),
        ("position", "int32"),
        ("clip_id", "int64"),
        ("epoch", "int32"),
        ("shard", "string"),
        ("key", "string"),
        ("offset", "int64"),
        ("size_bytes", "int64"),
        ("checksum", "int64"),
        ("checked_bytes", "int64"),
        ("first_frame", "int32"),
        ("stride", "int32"),
        ("num_frames", "int32"),
        ("height", "int32"),
        ("width", "int32"),
        ("flip", "bool"),
        ("fps", "float"),
        ("caption", "string"),
        ("tokens", "int32"),
        ("text_tokens", "int32"),
        ("source", "string"),
        ("source_id", "int32"),
        ("weight", "float"),
        ("dummy", "bool"),
    ]
    assert UNPLACED.names == ROWS.names[3:]


def test_copied_columns_are_the_manifests() -> None:
    for name in FROM_MANIFEST:
        assert SCHEMA.field(name).type == UNPLACED.field(name).type


def test_a_clip_comes_back_from_its_row() -> None:
    clip = unread_clip(
        RECIPE,
        View(3, 2, 8, 16, 32, True),
        7,
        **{"clip_id": 1 << 60, "epoch": 2, "shard": "a.tar", "key": "a/b", "caption": "a sea"},
        **{"offset": 1 << 40, "size_bytes": 5, "checksum": 6, "checked_bytes": 4, "tokens": 3},
        **{"source": "web", "source_id": 1, "weight": 0.5, "dummy": False},
    )
    assert clip.grid == (2, 2, 4)
    row = clip.to_row()
    assert list(row.keys() - set(UNPLACED.names)) == []
    (read,) = pa.Table.from_pylist([row], UNPLACED).to_pylist()
    assert ClipPlan.from_row(read | {"step": 3}, RECIPE.geometry) == clip


def test_a_clip_that_is_not_read() -> None:
    dummy = dummy_clip(RECIPE, 2)
    assert (dummy.clip_id, dummy.source_id, dummy.weight, dummy.dummy) == (-1, -1, 0.0, True)
    assert (dummy.grid, dummy.tokens, dummy.text_tokens, dummy.fps) == ((1, 2, 2), 4, 2, 8.0)
    assert dummy.view == View(0, 1, 1, 16, 16)
    assert unread_clip(RECIPE, dummy.view, 2, key="k") == replace(dummy, key="k")
    for num_text in (0, 11):
        with pytest.raises(ValueError, match="max_text_tokens=10 must hold the empty caption's"):
            dummy_clip(RECIPE, num_text)
