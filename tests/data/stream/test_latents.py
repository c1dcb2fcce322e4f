"""Latents from elsewhere: what is not what the plan says is a named hole, whatever the checksum."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from framework.data.encode.latents import dump_clip, dump_text, load_text
from framework.data.plan.rows import ClipPlan
from framework.data.plan.views import View
from framework.data.stream.collate import LatentReader
from framework.storage import Store

CLIP = ClipPlan(
    clip_id=7,
    epoch=0,
    shard="shard-000000.tar",
    key="shard-000000/clip-7",
    offset=0,
    size_bytes=0,
    checksum=0,
    checked_bytes=0,
    view=View(0, 1, 2, 8, 8),
    grid=(2, 1, 3),
    fps=8.0,
    caption="a square",
    tokens=6,
    text_tokens=3,
    source="",
    source_id=0,
    weight=1.0,
    dummy=False,
)
LATENTS, IDS = torch.ones(5, 4, 1, 3), torch.tensor([1, 2, 9])


def reader(store: Store, null_text: Tensor, vocab_size: int | None) -> LatentReader:
    return LatentReader(
        shards=store,
        token_size=10,  # 5 channels, 2 latent frames
        exclude=frozenset(),
        patch_size=(2, 1, 1),
        patchify=lambda latents: np.ones((6, 10), np.float32),
        decode=lambda latents, num_frames: latents.numpy(),
        null_text=null_text.numpy(),
        vocab_size=vocab_size,
    )


def cause(folder: Path, latents: Tensor, text: Tensor, null_text: Tensor, vocab: int | None) -> str:
    """Why a clip of these latents and this text cannot be read."""
    data = dump_clip(latents, {CLIP.caption: text}, torch.float32)
    store = Store(folder)
    store.write(CLIP.shard, data)
    clip = replace(CLIP, size_bytes=len(data), checksum=zlib.crc32(data))
    (read,) = reader(store, null_text, vocab).read([clip])
    assert read.tokens.shape == (6, 10)
    assert len(read.text) == 3
    assert bool(read.cause) == (not read.tokens.any())
    return read.cause


def test_what_the_plan_says_is_read(tmp_path: Path) -> None:
    assert cause(tmp_path, LATENTS, IDS, torch.tensor([0]), 10) == ""
    assert cause(tmp_path, LATENTS, torch.ones(3, 4), torch.ones(2, 4), None) == ""


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (torch.ones(5, 4, 3, 1), r"its latents are (5, 4, 3, 1); the plan has (5, 4, 1, 3)"),
        (torch.ones(5, 2, 1, 3), "the plan has"),
        (torch.ones(6, 4, 1, 3), "the plan has"),
        (torch.ones(60), "the plan has"),
        (torch.ones(0, 4, 1, 3), "the plan has"),
        (torch.ones(1, 5, 4, 1, 3), "the plan has"),
        (LATENTS.clone().index_fill_(1, torch.tensor(2), torch.nan), "not all finite"),
        (LATENTS * torch.inf, "not all finite"),
    ],
)
def test_other_latents_are_a_hole(tmp_path: Path, latents: Tensor, words: str) -> None:
    assert words in cause(tmp_path, latents, IDS, torch.tensor([0]), 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (torch.tensor([1, 2, 10**9]), "ids that are not in 0 to 9"),
        (torch.tensor([1, 2, -1]), "ids that are not in 0 to 9"),
        (torch.tensor([1, 2]), "its text is torch.int64 (2,); the plan has torch.int64 (3,)"),
        (torch.arange(4000), "the plan has"),
        (torch.ones(3, 4), "the plan has"),
        (torch.ones(3), "the plan has"),
    ],
)
def test_other_ids_are_a_hole(tmp_path: Path, text: Tensor, words: str) -> None:
    assert words in cause(tmp_path, LATENTS, text, torch.tensor([0]), 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (torch.ones(3, 5), "the plan has"),
        (torch.ones(4, 4), "the plan has"),
        (torch.tensor([1, 2, 3]), "the plan has"),
        (torch.full((3, 4), torch.nan), "not all finite"),
    ],
)
def test_other_embeddings_are_a_hole(tmp_path: Path, text: Tensor, words: str) -> None:
    assert words in cause(tmp_path, LATENTS, text, torch.ones(2, 4), None)


def test_an_empty_caption_of_elsewhere_is_a_sentence(tmp_path: Path) -> None:
    for text in (torch.zeros(0, dtype=torch.int64), torch.tensor([11])):
        with pytest.raises(ValueError, match=r"no text token|ids that are not in 0 to 9"):
            reader(Store(tmp_path), load_text(dump_text(text)), 10)
    with pytest.raises(ValueError, match="not the text tokens of the empty caption"):
        load_text(b"noise" * 10)
