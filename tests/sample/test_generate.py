from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from framework.data.plan.views import Geometry
from framework.diffusion.denoiser import Denoiser
from framework.diffusion.samplers import EulerConfig, HeunConfig
from framework.encoders import Encoders
from framework.objectives.rectified_flow import RectifiedFlowConfig
from framework.sample.generate import Prompt, generate
from model_zoo.codecs.haar import HaarConfig
from model_zoo.codecs.identity import IdentityConfig
from model_zoo.patchify import patch_std, patchify
from model_zoo.text.byte import ByteTextConfig

PATCH = (2, 4, 4)
CODEC = IdentityConfig()
GEOMETRY = Geometry(CODEC.temporal_stride, CODEC.spatial_stride, CODEC.causal, PATCH)
TEXT = ByteTextConfig(max_tokens=16, multiple_of=1)
TOKEN_SIZE = CODEC.channels * 32
PROMPTS = [
    Prompt("a red circle", 4, 8, 8, seed=1),
    Prompt("a blue square", 6, 8, 12, seed=2),
    Prompt("a red circle", 4, 8, 8, seed=3),
    Prompt("green", 1, 8, 8, seed=1),
    Prompt("a yellow one", 4, 8, 8, fps=16.0, seed=1),
]


class Mixer(nn.Module):
    """A small denoiser whose tokens see their clip's mean, text, t and fps, and no other clip."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.own = nn.Parameter(torch.randn(TOKEN_SIZE, TOKEN_SIZE, generator=generator) * 0.05)
        self.mean = nn.Parameter(torch.randn(TOKEN_SIZE, TOKEN_SIZE, generator=generator) * 0.05)
        self.text = nn.Parameter(torch.randn(258, TOKEN_SIZE, generator=generator) * 0.3)
        self.max_tokens = 0
        self.num_calls = 0

    def forward(self, tokens: Tensor, t: Tensor, layout, text: Tensor) -> Tensor:
        self.max_tokens = max(self.max_tokens, tokens.shape[0])
        self.num_calls += 1
        assert not self.training
        rows = []
        video, words = layout.cu_seqlens.tolist(), layout.cu_text.tolist()
        for b in range(layout.num_segments):
            own = tokens[video[b] : video[b + 1]]
            meaning = self.text[text[words[b] : words[b + 1]]].mean(0) * (t[b] + layout.fps[b] / 8)
            rows.append(torch.tanh(own @ self.own + own.mean(0) @ self.mean + meaning))
        return torch.cat(rows)


SAMPLERS = {"euler": EulerConfig, "heun": HeunConfig}


def run(
    prompts,
    model=None,
    codec=CODEC,
    geometry=GEOMETRY,
    precondition=True,
    max_tokens=64,
    name="euler",
    **sampler,
):
    std = patch_std(codec.latent_std, geometry.patch_size)
    objective = RectifiedFlowConfig(precondition=precondition).build(std)
    config = SAMPLERS[name](**{"num_steps": 4, **sampler})
    denoiser = Denoiser(Mixer() if model is None else model, objective)
    return generate(denoiser, Encoders(codec, TEXT), geometry, prompts, config, max_tokens)


def assert_alike(a: np.ndarray, b: np.ndarray) -> None:
    """Sums in another order round otherwise, and then a pixel may round to the next integer."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_shapes_and_order_are_those_of_the_prompts():
    videos = run(PROMPTS)
    assert [v.shape for v in videos] == [(p.num_frames, p.height, p.width, 3) for p in PROMPTS]
    assert all(v.dtype == np.uint8 for v in videos)
    assert all(v.std() > 5 for v in videos)


def test_a_video_depends_on_its_prompt_alone():
    together = run(PROMPTS)
    for prompt, video in zip(PROMPTS, together, strict=True):
        assert_alike(run([prompt])[0], video)
    for video, other in zip(together, run(PROMPTS[::-1], max_tokens=24)[::-1], strict=True):
        assert_alike(other, video)


def test_seed_text_and_rate_matter():
    base = Prompt("a red circle", 4, 8, 8, seed=1)
    videos = run(
        [
            base,
            base,
            Prompt("a red circle", 4, 8, 8, seed=2),
            Prompt("a blue circle", 4, 8, 8, seed=1),
            Prompt("a red circle", 4, 8, 8, fps=24.0, seed=1),
        ]
    )
    assert_alike(videos[0], videos[1])
    for other in videos[2:]:
        assert np.abs(videos[0].astype(int) - other.astype(int)).max() > 10


def test_budget_bounds_a_forward_with_both_halves_of_guidance():
    model = Mixer()
    run(PROMPTS, model, max_tokens=36)
    assert model.max_tokens <= 36
    lavish = Mixer()
    run(PROMPTS, lavish, max_tokens=1000)
    assert lavish.num_calls == 4  # one pack, one forward a step
    assert lavish.max_tokens == 2 * (8 + 18 + 8 + 4 + 8)
    plain = Mixer()
    run(PROMPTS, plain, max_tokens=1000, guidance_scale=1.0)
    assert plain.max_tokens == lavish.max_tokens // 2
    tight = Mixer()
    run(PROMPTS, tight, max_tokens=1)  # larger than the budget: each by itself
    assert tight.num_calls == 4 * len(PROMPTS)


def test_the_model_is_left_in_its_mode():
    model = Mixer().train()
    run(PROMPTS[:1], model)
    assert model.training
    assert model.own.grad is None


class Knows(nn.Module):
    """Predicts the velocity toward the tokens given for each prompt: sampling must land on them."""

    def __init__(self, targets: list[Tensor]) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.targets = targets

    def forward(self, tokens: Tensor, t: Tensor, layout, text: Tensor) -> Tensor:
        target = torch.cat([self.targets[i] for i in layout.clip_ids.tolist()])
        return (tokens - target) / t[layout.segment_ids][:, None]


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize(
    ("codec", "patch", "whole", "asked"),
    [
        (IdentityConfig(), (2, 4, 4), (6, 12, 8), (5, 10, 7)),
        (HaarConfig(), (1, 1, 1), (12, 32, 48), (10, 28, 42)),
        (HaarConfig(), (2, 2, 1), (16, 32, 48), (10, 20, 42)),
    ],
)
def test_any_size_is_the_next_grid_cropped(
    name: str, codec, patch: tuple[int, int, int], whole, asked, encoded: Callable
):
    live = codec.build()
    geometry = Geometry(codec.temporal_stride, codec.spatial_stride, codec.causal, patch)
    kept = encoded(live, *whole)  # frames that the codec does not change
    small = encoded(live, *[s * p for s, p in zip((4, 8, 8), patch, strict=True)], seed=1)
    targets = [patchify(live.encode(frames), patch) for frames in (kept, small)]
    prompts = [Prompt("x", *asked), Prompt("y", small.shape[0], *small.shape[2:])]
    for_asked, for_small = run(
        prompts, Knows(targets), codec, geometry, False, name=name, num_steps=3
    )
    top, left = (whole[1] - asked[1]) // 2, (whole[2] - asked[2]) // 2
    expected = kept[: asked[0], :, top : top + asked[1], left : left + asked[2]]
    assert_alike(for_asked, to_uint8(expected))
    assert_alike(for_small, to_uint8(small))


def to_uint8(frames: Tensor) -> np.ndarray:
    return ((frames + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture
def encoded() -> Callable:
    """Random frames (T, 3, H, W) that have been through a codec once."""

    def make(codec, num_frames: int, height: int, width: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        frames = torch.rand(num_frames, 3, height, width, generator=generator) - 0.5
        return codec.decode(codec.encode(frames), num_frames)

    return make


def test_no_prompts_no_videos():
    assert run([]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "num_frames=0"),
        ({"width": -8}, "width=-8"),
        ({"fps": 0.0}, r"fps=0\.0"),
    ],
)
def test_bad_prompts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Prompt(**{"text": "x", "num_frames": 4, "height": 8, "width": 8, **changes})
