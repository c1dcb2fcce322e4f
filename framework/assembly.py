"""From the configs of a line to its live parts: codec, text, model, objective, reader, recipe.

The one place where data meets networks: the planner's geometry follows from codec and patch, the
reader's tokens from codec and patchify, the objective's scale from the codec's statistics.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from framework.checkpoint import find_checkpoint, load_weights
from framework.data.collate import ClipReader
from framework.data.config import DataConfig
from framework.data.cost import CostModel
from framework.data.manifest import read_manifest
from framework.data.plan import Plan, make_epoch
from framework.data.recipe import Recipe
from framework.data.views import Geometry
from framework.diffusion.objective import Objective
from framework.storage import Store
from model_zoo.flops import cost_coefficients
from model_zoo.patchify import patch_std, patchify
from model_zoo.protocols import TextEncoder, VideoCodec


@functools.lru_cache(maxsize=4)
def _built(config: Any) -> Any:
    """One live codec or text encoder for each config in a process; both keep no state."""
    return config.build()


@dataclass(frozen=True)
class Tokenizer:
    """uint8 frames (T, H, W, 3) -> float32 tokens (n, P); picklable."""

    codec: Any
    patch: tuple[int, int, int]

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Encode and patchify one clip."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        latents = _built(self.codec).encode(pixels.float() / 127.5 - 1.0)
        return patchify(latents, self.patch).numpy()


@dataclass(frozen=True)
class CaptionEncoder:
    """Caption -> (k,) ids or (k, D) embeddings as arrays; picklable."""

    text: Any

    def __call__(self, caption: str) -> np.ndarray:
        """Encode one caption."""
        return _built(self.text).encode(caption).numpy()

    def num_tokens(self, caption: str) -> int:
        """Length of the encoded caption."""
        return _built(self.text).num_tokens(caption)


@dataclass(frozen=True)
class Assembly:
    """Configs of one line; every method builds a live part of it."""

    model: Any
    codec: Any
    text: Any
    objective: Any
    data: DataConfig
    seed: int

    @classmethod
    def of(cls, config: Any) -> "Assembly":
        """The line of a run config."""
        return cls(
            config.model, config.codec, config.text, config.objective, config.data, config.run.seed
        )

    def build_codec(self) -> VideoCodec:
        """The video codec; one instance in a process."""
        return _built(self.codec)

    def build_text(self) -> TextEncoder:
        """The text encoder; one instance in a process."""
        return _built(self.text)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents (time, height, width) in one token."""
        return self.model.patch

    @property
    def geometry(self) -> Geometry:
        """How frames become tokens; planner and reader share it."""
        codec = self.build_codec()
        return Geometry(codec.temporal_stride, codec.spatial_stride, codec.causal, self.patch)

    @property
    def token_size(self) -> int:
        """P: values in one token."""
        return self.build_codec().channels * int(np.prod(self.patch))

    def recipe(self) -> Recipe:
        """The plan's recipe, complete with the geometry and the run's seed."""
        text_tokens = self.data.max_text_tokens // self.data.max_clips
        linear, quadratic = cost_coefficients(self.model, self.token_size, text_tokens)
        return self.data.recipe(self.geometry, CostModel(linear, quadratic), self.seed)

    def make_plan(self, run: Store, steps: int, say: Callable[[str], None]) -> Plan:
        """Make epochs of the plan until `steps` steps are planned; what is committed is kept."""
        manifest = read_manifest(self.data.manifest)
        recipe, text = self.recipe(), self.build_text()
        planned, epoch = 0, 0
        while planned < steps:
            plan = make_epoch(manifest, recipe, run, epoch, text.num_tokens, text.fingerprint)
            if epoch == 0:
                say(str(plan.summary(0)))
            planned += plan.num_steps(epoch)
            epoch += 1
        say(f"{steps:,} steps are {steps / plan.num_steps(0):.1f} epochs")
        return plan

    def build_model(self) -> nn.Module:
        """The denoiser on the CPU (or where the caller's context puts it), same for one seed."""
        text = self.build_text()
        longest, positions = getattr(text, "max_tokens", 0), self.model.text_max_length
        if longest > positions:
            raise ValueError(
                f"text.max_tokens={longest} is more than model.text_max_length={positions}; "
                "raise the latter"
            )
        torch.manual_seed(self.seed)
        return self.model.build(
            token_size=self.token_size,
            text_vocab=getattr(text, "vocab_size", None),
            text_dim=getattr(text, "dim", None),
        )

    def load_model(self, run: Store, checkpoint: str, weights: str) -> tuple[nn.Module, int]:
        """The model in eval mode and its step; `run` is the run's folder.

        checkpoint: "latest", "init" (before training), a step, or the URL of a checkpoint. weights:
        "ema" or "weights". ValueError where there is no such committed checkpoint.
        """
        model = self.build_model().eval()
        if checkpoint == "init":
            return model, 0
        found = find_checkpoint(run.child("checkpoints"), checkpoint)
        load_weights(found, model, weights)
        return model, found.step

    def build_objective(self) -> Objective:
        """The objective, scaled by the codec's statistics."""
        return self.objective.build(patch_std(self.build_codec().latent_std, self.patch))

    def reader(self, shards_url: str) -> ClipReader:
        """Reads clips of a plan as tokens."""
        return ClipReader(
            shards=Store(shards_url),
            tokenize=Tokenizer(self.codec, self.patch),
            encode_text=CaptionEncoder(self.text),
            token_size=self.token_size,
        )
