"""The worst packs are packs like all others, none is worse, and memory that runs out is named."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from framework.assembly import Assembly
from framework.batch import PackedBatch
from framework.config import compose
from framework.data.plan.cost import CostModel
from framework.data.plan.packing import Packer
from framework.data.plan.recipe import Recipe
from framework.data.plan.rows import ClipPlan, PackPlan
from framework.data.plan.views import Geometry, View, ViewConfig
from framework.data.stream.collate import LatentReader, VideoReader, assemble
from framework.storage import Store
from framework.train.engine.optimizer import AdamWConfig
from framework.train.engine.plain import PlainConfig
from framework.train.rank.largest_packs import (
    describe,
    largest_packs,
    try_longest_view,
    try_packs,
)

CPU = torch.device("cpu")
RECIPE = Recipe(
    views=ViewConfig(frames=(2, 5, 9), sizes=((16, 16), (16, 32), (32, 32)), stills=False),
    geometry=Geometry(1, 8, False, (1, 1, 1)),
    cost=CostModel(10),
    max_tokens=200,
    max_text_tokens=60,
    max_clips=12,
    global_batch_packs=2,
)
REAL_CLIP = ClipPlan(
    clip_id=7,
    epoch=0,
    shard="shard-000000.tar",
    key="shard-000000/clip-7",
    offset=4,
    size_bytes=8,
    checksum=1,
    checked_bytes=8,
    view=View(0, 1, 2, 16, 16),
    grid=(2, 2, 2),
    fps=8.0,
    caption="a square",
    tokens=8,
    text_tokens=3,
    source="",
    source_id=0,
    weight=1.0,
    dummy=False,
)
EXPERIMENTS = ["experiment=demo", "model.hidden_size=32", "model.num_heads=2", "model.ffn=64"]


def reader(folder: Path, null_text: np.ndarray | None = None) -> VideoReader:
    text = np.zeros(3, np.int64) if null_text is None else null_text
    return VideoReader(
        shards=Store(folder),
        token_size=4,
        exclude=frozenset({0}),
        tokenize=lambda frames: np.zeros((RECIPE.geometry.num_tokens(*frames.shape[:3]), 4), "f4"),
        encode_text=lambda caption: text,
    )


def lengths(pack: PackedBatch) -> list[int]:
    return pack.cu_seqlens.diff()[pack.clip_ids >= 0].tolist()


def texts(pack: PackedBatch) -> list[int]:
    return pack.cu_text.diff()[pack.clip_ids >= 0].tolist()


@pytest.mark.parametrize("static_shapes", [True, False])
def test_they_are_at_the_limits(tmp_path: Path, static_shapes: bool) -> None:
    long, many = largest_packs(RECIPE, reader(tmp_path), 20, static_shapes)
    # Of 8, 16, 20, 32, 36, 40, 72, 80 and 144 tokens; the longest first, then what still fits.
    assert lengths(long) == [144, 40, 16]
    assert texts(long) == [20, 20, 20]
    assert lengths(many) == [80, 40, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]
    assert texts(many) == [20, 10, *[3] * 10]  # an empty caption has three
    for pack in (long, many):
        assert len(pack.tokens) == RECIPE.max_tokens
        assert len(pack.text) == (RECIPE.max_text_tokens if static_shapes else sum(texts(pack)))
        assert pack.loss_mask.sum() == sum(lengths(pack))


@pytest.mark.parametrize("static_shapes", [True, False])
def test_they_look_like_real_packs(tmp_path: Path, static_shapes: bool) -> None:
    embedded = reader(tmp_path, np.zeros((3, 5), np.float32))
    pack = PackPlan((REAL_CLIP, replace(REAL_CLIP, clip_id=8)), 0)
    excluded = replace(embedded, exclude=frozenset({7, 8}))  # a hole has the shapes of a clip
    real = assemble(pack, excluded, RECIPE, static_shapes)
    for worst in largest_packs(RECIPE, embedded, None, static_shapes):
        for field in fields(real):
            ours, theirs = getattr(worst, field.name), getattr(real, field.name)
            assert type(ours) is type(theirs)
            if isinstance(ours, Tensor):
                assert ours.dtype == theirs.dtype, field.name
                start = 0 if static_shapes else 1
                assert ours.shape[start:] == theirs.shape[start:], field.name


@pytest.mark.parametrize("policy", ["mixed", "bucketed"])
def test_no_pack_of_the_planner_is_worse(tmp_path: Path, policy: str) -> None:
    recipe = replace(RECIPE, policy=policy)
    long, many = largest_packs(recipe, reader(tmp_path), 20)
    generator = np.random.default_rng(0)
    sizes = np.array([8, 16, 20, 32, 36, 40, 72, 80, 144])
    tokens = generator.choice(sizes, 3000).tolist()
    text = generator.integers(3, 21, 3000).tolist()
    packer = Packer(recipe.limits, 500, key=1)
    buckets = tokens if policy == "bucketed" else None
    packs = [*packer.add(0, tokens, text, buckets), *packer.finish()]
    assert max(len(pack) for pack in packs) <= len(lengths(many))
    assert max(tokens[i] for pack in packs for i in pack) <= max(lengths(long))
    most = max(sum(tokens[i] for i in pack) for pack in packs)
    assert policy == "bucketed" or most <= max(sum(lengths(long)), sum(lengths(many)))
    if policy == "bucketed":
        assert (lengths(long), lengths(many)) == ([144], [8] * 12)


def test_masked_training_admits_longer_clips_and_more_of_them(tmp_path: Path) -> None:
    recipe = replace(RECIPE, max_tokens=80, keep=((0, 0.5), (3, 1.0)))
    long, many = largest_packs(recipe, reader(tmp_path), 5)
    assert max(lengths(long)) == 80  # the whole of a clip beats half of 144
    assert len(lengths(many)) == 12  # at four tokens each, where ten whole ones would fit
    assert many.grid[:12].prod(dim=1).max() > max(lengths(many))


def assembly() -> Assembly:
    return Assembly.of(compose(EXPERIMENTS))


def test_a_real_line_takes_them_and_its_longest_view(tmp_path: Path) -> None:
    line = assembly()
    recipe, videos = line.recipe(), line.reader(str(tmp_path))
    packs = largest_packs(recipe, videos, line.text.max_tokens)
    assert all(len(pack.tokens) == recipe.max_tokens for pack in packs)
    engine = PlainConfig().build(line.build_model, AdamWConfig(), 10, CPU)
    before = {name: p.detach().clone() for name, p in engine.params.items()}
    try_packs(engine, line.build_objective(), packs, CPU, packs_per_step=4)
    assert engine.progress.steps == engine.progress.updates == len(packs)
    assert any(not torch.equal(before[name], p) for name, p in engine.params.items())
    assert isinstance(videos, VideoReader)
    try_longest_view(recipe, videos)


def test_latents_give_the_empty_caption_of_their_own(tmp_path: Path) -> None:
    latents = LatentReader(
        shards=Store(tmp_path),
        token_size=4,
        exclude=frozenset(),
        patch_size=(1, 1, 1),
        patchify=lambda latents: latents.numpy(),
        decode=lambda latents, num_frames: latents.numpy(),
        vocab_size=None,
        null_text=np.arange(6, dtype=np.float32).reshape(3, 2),
    )
    pack = largest_packs(RECIPE, latents, 20)[0]
    assert pack.text[:6].tolist() == [[0, 1], [2, 3], [4, 5]] * 2


class Greedy(nn.Module):
    """Wants a PiB for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, *_: object) -> Tensor:
        return tokens * self.weight * torch.empty(1 << 48, len(tokens)).sum()


class Broken(Greedy):
    def forward(self, tokens: Tensor, *_: object) -> Tensor:
        return tokens @ tokens


def test_memory_that_runs_out_is_named_with_its_cures(tmp_path: Path) -> None:
    objective = assembly().objective.build(torch.ones(4))
    packs = largest_packs(RECIPE, reader(tmp_path), 20)
    engine = PlainConfig().build(Greedy, AdamWConfig(), 10, CPU)
    with pytest.raises(ValueError, match=r"3 clip.*144 video.*200 video and 60 text.*GiB") as error:
        try_packs(engine, objective, packs, CPU)
    for cure in ("data.max_tokens", "mode=full", "engine.offload", "cluster.num_workers"):
        assert cure in str(error.value)
    assert describe(packs[0]) in str(error.value)


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    objective = assembly().objective.build(torch.ones(4))
    packs = largest_packs(RECIPE, reader(tmp_path), 20)
    engine = PlainConfig().build(Broken, AdamWConfig(), 10, CPU)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        try_packs(engine, objective, packs, CPU)


def test_a_codec_without_memory_is_named(tmp_path: Path) -> None:
    greedy = replace(reader(tmp_path), tokenize=lambda frames: np.zeros((1 << 48, len(frames))))
    with pytest.raises(ValueError, match=r"9 frames of 32x32.*data\.views\.frames"):
        try_longest_view(RECIPE, greedy)
