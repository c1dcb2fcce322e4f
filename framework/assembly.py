"""From the configs of a line to its live parts: codec, text, model, objective, reader, recipe.

The one place where data meets networks: the planner's geometry follows from codec and patch, the
reader's tokens from codec and patchify, the objective's scale from the codec's statistics.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from framework.data.config import DataConfig, split_shards_url
from framework.data.encode.latents import load_text
from framework.data.manifest.table import Manifest, read_clip_ids, read_manifest
from framework.data.plan.cost import CostModel
from framework.data.plan.recipe import Recipe
from framework.data.plan.run_planner import RunPlanner
from framework.data.plan.views import Geometry
from framework.data.stream.collate import ClipReader, LatentReader, VideoReader
from framework.diffusion.denoiser import Denoiser
from framework.encoders import CaptionEncoder, Encoders, Patchifier, Tokenizer
from framework.mapping import differences
from framework.objectives.objective import DiffusionObjective, Objective, ObjectiveConfig
from framework.run.identity import Identity, RunSection
from framework.storage import COMMAND, RetryPolicy, Store
from model_zoo.checkpointing import PackedModel
from model_zoo.flops import Work, cost_coefficients
from model_zoo.patchify import patch_std
from model_zoo.protocols import CodecConfig, ModelConfig, TextConfig


class LineConfig(Protocol):
    """What a line is made from; a run config is one."""

    @property
    def run(self) -> RunSection:
        """Of the run's own settings, its seed."""

    @property
    def model(self) -> ModelConfig:
        """Of the denoiser."""

    @property
    def codec(self) -> CodecConfig:
        """Of the video codec."""

    @property
    def text(self) -> TextConfig:
        """Of the text encoder."""

    @property
    def objective(self) -> ObjectiveConfig:
        """What the model is trained to do."""

    @property
    def data(self) -> DataConfig:
        """Where clips come from, and what becomes of them."""

    @property
    def identity(self) -> Identity:
        """The config as runs keep and compare it."""


@dataclass(frozen=True)
class Assembly:
    """Configs of one line; every method builds a live part of it."""

    model: ModelConfig
    codec: CodecConfig
    text: TextConfig
    objective: ObjectiveConfig
    data: DataConfig
    seed: int
    identity: Identity  # of the run
    retry: RetryPolicy = COMMAND  # of the stores that it opens

    @classmethod
    def of(cls, config: LineConfig) -> "Assembly":
        """The line of a run config."""
        return cls(
            config.model,
            config.codec,
            config.text,
            config.objective,
            config.data,
            config.run.seed,
            config.identity,
        )

    def with_retry(self, retry: RetryPolicy) -> "Assembly":
        """The same line, whose stores are tried by another policy."""
        return replace(self, retry=retry)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latents (time, height, width) in one token."""
        return self.model.patch_size

    @property
    def geometry(self) -> Geometry:
        """How frames become tokens; planner and reader share it."""
        codec = self.codec
        return Geometry(codec.temporal_stride, codec.spatial_stride, codec.causal, self.patch_size)

    @property
    def token_size(self) -> int:
        """P: values in one token."""
        return self.codec.channels * int(np.prod(self.patch_size))

    def recipe(self) -> Recipe:
        """The plan's recipe, complete with the geometry and the run's seed."""
        text_tokens = self.data.max_text_tokens // self.data.max_clips
        linear, quadratic = cost_coefficients(self.work(), text_tokens)
        return self.data.recipe(self.geometry, CostModel(linear, quadratic), self.seed)

    def check(self) -> None:
        """ValueError where the parts do not fit together; builds the model without memory."""
        keep = self.recipe().keep
        if min(rate for _, rate in keep) < 1 and not self.model.drops_tokens:
            raise ValueError(f"data.keep={keep}: this model wants all tokens of a clip")
        self.num_parameters()
        self.build_objective()

    def check_data(self) -> None:
        """ValueError where there is no manifest, or it lacks what the recipe asks for, or where
        the list of clips to take out cannot be read."""
        self.planner().check()
        self._excluded()

    def planner(self) -> RunPlanner:
        """What makes the plans of this line's runs."""
        text = self.text
        return RunPlanner(self.open_manifest, self.recipe(), text.num_tokens, text.fingerprint)

    def work(self) -> Work:
        """What a forward pass of the model takes."""
        return self.model.work(self.token_size, self.text.dim)

    def num_parameters(self) -> int:
        """Of the denoiser, counted without memory for it."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build_model().parameters())

    def open_manifest(self, fingerprint: str | None = None) -> Manifest:
        """Of what training reads: videos, or latents. ValueError where they are of another line."""
        url = self.data.latents or self.data.manifest
        manifest = read_manifest(
            Store(url, self.retry),
            fingerprint,
            shards=split_shards_url(self.data.shards)[0],
            anywhere=self.data.index.anywhere,
        )
        if manifest.encoding and not self.data.latents:
            raise ValueError(f"data.manifest={url!r} is of latents; set data.latents to it")
        if self.data.latents:
            differing = differences(manifest.encoding, self.encoding())
            if differing:
                raise ValueError(
                    f"data.latents={url!r} was encoded otherwise:\n  "
                    + "\n  ".join(differing)
                    + "\nencode again into another folder, or use the config of then"
                )
        return manifest

    def on_videos(self) -> "Assembly":
        """The same line, with videos that are encoded in the stream."""
        return replace(self, data=replace(self.data, latents=""))

    def build_model(self) -> PackedModel:
        """The denoiser on the CPU (or where the caller's context puts it), same for one seed."""
        longest, positions = self.text.max_tokens, self.model.text_max_length
        if positions is not None and longest > positions:
            raise ValueError(
                f"text.max_tokens={longest} is more than model.text_max_length={positions}; "
                "raise the latter"
            )
        torch.manual_seed(self.seed)
        model = self.model.build(
            token_size=self.token_size,
            text_vocab=self.text.vocab_size,
            text_dim=self.text.dim,
        )
        if not isinstance(model, PackedModel):
            raise ValueError(
                f"model: {type(self.model).__name__}.build gives a {type(model).__name__}, and no "
                "model_zoo.checkpointing.PackedModel"
            )
        return model

    def network(self) -> Identity:
        """What weights mean something with."""
        return self.identity.part("model", "codec", "text", "objective")

    def build_objective(self) -> Objective:
        """The objective, scaled by the codec's statistics."""
        return self.objective.build(patch_std(self.codec.latent_std, self.patch_size))

    def denoiser(self, model: PackedModel) -> Denoiser[DiffusionObjective]:
        """The model with its objective; ValueError where the latter is none of diffusion."""
        objective = self.build_objective()
        if not isinstance(objective, DiffusionObjective):
            raise ValueError(
                f"objective={type(objective).__name__} is none of diffusion: there is no path from "
                "noise to data to sample along"
            )
        return Denoiser(model, objective)

    def reader(self, shards_url: str) -> ClipReader:
        """Reads clips of a plan as tokens."""
        # A plan names shards, too, and may come from elsewhere as a manifest may.
        shards = Store(shards_url, self.retry, self.data.index.anywhere)
        exclude = self._excluded()
        patchifier = Patchifier(self.patch_size)
        if self.data.latents:
            return LatentReader(
                shards=shards,
                token_size=self.token_size,
                exclude=exclude,
                patch_size=self.patch_size,
                patchify=patchifier,
                vocab_size=self.text.vocab_size,
                decode=self.encoders().latents_to_frames,
                null_text=load_text(shards.read("null_text.safetensors")).numpy(),
            )
        return VideoReader(
            shards=shards,
            token_size=self.token_size,
            exclude=exclude,
            tokenize=Tokenizer(self.encoders(), patchifier),
            encode_text=CaptionEncoder(self.encoders()),
        )

    def encoders(self) -> Encoders:
        """The frozen networks; they are built where they are first used."""
        return Encoders(self.codec, self.text)

    def encoding(self) -> dict[str, Any]:
        """All that latents depend on beside the clips, in plain JSON."""
        made_with = {
            "codec": self.codec.fingerprint,
            "text": self.text.fingerprint,
            "dtype": self.data.encode.dtype,
            "views": asdict(self.data.views),
            "geometry": asdict(self.geometry),
            "max_tokens": self.data.max_tokens,
            "seed": self.seed,
        }
        return json.loads(json.dumps(made_with))

    def _excluded(self) -> frozenset[int]:
        return read_clip_ids(self.data.exclude, self.retry) if self.data.exclude else frozenset()
