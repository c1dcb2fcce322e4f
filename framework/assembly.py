"""From the configs of a line to its live parts: codec, text, model, objective, reader, recipe.

The one place where data meets networks: the planner's geometry follows from codec and patch, the
reader's tokens from codec and patchify, the objective's scale from the codec's statistics.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from framework.data.config import DataConfig
from framework.data.encode.latents import Encoders, load_text
from framework.data.manifest.table import Manifest, read_clip_ids, read_manifest
from framework.data.plan.cost import CostModel
from framework.data.plan.planner import check_choice, make_epoch
from framework.data.plan.recipe import Recipe
from framework.data.plan.store import Plan
from framework.data.plan.views import Geometry
from framework.data.stream.collate import ClipReader, LatentReader, VideoReader
from framework.encoders import (
    CaptionEncoder,
    FrameEncoder,
    LatentDecoder,
    Patchifier,
    TextEmbedder,
    Tokenizer,
    built,
)
from framework.mapping import differences
from framework.objectives.objective import Objective
from framework.run.checkpoint import Checkpoint
from framework.run.identity import Identity
from framework.storage import Store
from model_zoo.flops import Work, cost_coefficients
from model_zoo.patchify import patch_std
from model_zoo.protocols import TextEncoder, VideoCodec


@dataclass(frozen=True)
class Assembly:
    """Configs of one line; every method builds a live part of it."""

    model: Any
    codec: Any
    text: Any
    objective: Any
    data: DataConfig
    seed: int
    identity: Identity  # of the run

    @classmethod
    def of(cls, config: Any) -> "Assembly":
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

    def build_codec(self) -> VideoCodec:
        """The video codec; one instance in a process."""
        return built(self.codec)

    def build_text(self) -> TextEncoder:
        """The text encoder; one instance in a process."""
        return built(self.text)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latents (time, height, width) in one token."""
        return self.model.patch_size

    @property
    def geometry(self) -> Geometry:
        """How frames become tokens; planner and reader share it."""
        codec = self.build_codec()
        return Geometry(codec.temporal_stride, codec.spatial_stride, codec.causal, self.patch_size)

    @property
    def token_size(self) -> int:
        """P: values in one token."""
        return self.build_codec().channels * int(np.prod(self.patch_size))

    def recipe(self) -> Recipe:
        """The plan's recipe, complete with the geometry and the run's seed."""
        text_tokens = self.data.max_text_tokens // self.data.max_clips
        linear, quadratic = cost_coefficients(self.work(), text_tokens)
        return self.data.recipe(self.geometry, CostModel(linear, quadratic), self.seed)

    def check(self) -> None:
        """ValueError where the parts do not fit together; builds the model without memory."""
        keep = self.recipe().keep
        if min(rate for _, rate in keep) < 1 and not getattr(self.model, "drops_tokens", True):
            raise ValueError(f"data.keep={keep}: this model wants all tokens of a clip")
        self.num_parameters()
        self.build_objective()

    def check_data(self) -> None:
        """ValueError where there is no manifest, or it lacks what the recipe asks for, or where
        the list of clips to take out cannot be read."""
        check_choice(self._open_manifest(), self.recipe())
        self._excluded()

    def work(self) -> Work:
        """What a forward pass of the model takes."""
        text_dim = getattr(self.build_text(), "dim", None)
        return self.model.work(self.token_size, text_dim)

    def num_parameters(self) -> int:
        """Of the denoiser, counted without memory for it."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build_model().parameters())

    def pinned_manifest(self, run: Store) -> Manifest:
        """The snapshot that the run at `run` began with: data that grew is for other runs."""
        pin = "manifest.json"
        if run.exists(pin):
            return self._open_manifest(json.loads(run.read(pin))["fingerprint"])
        manifest = self._open_manifest()
        run.write(pin, json.dumps({"fingerprint": manifest.fingerprint}).encode())
        return manifest

    def _open_manifest(self, fingerprint: str | None = None) -> Manifest:
        """Of what training reads: videos, or latents. ValueError where they are of another line."""
        url = self.data.latents or self.data.manifest
        manifest = read_manifest(url, fingerprint)
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

    def make_plan(self, run: Store, steps: int, say: Callable[[str], None]) -> Plan:
        """Make epochs of the plan until `steps` steps are planned; what is committed is kept."""
        manifest = self.pinned_manifest(run)
        recipe, text = self.recipe(), self.build_text()
        planned, epoch = 0, 0
        while planned < steps:
            plan = make_epoch(manifest, recipe, run, epoch, text.num_tokens, text.fingerprint)
            if epoch == 0:
                say(str(plan.summary(0)))
            planned += plan.num_steps(epoch)
            epoch += 1
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
        """The model in eval mode, on the GPU where there is one, and its step.

        run: the run's folder. checkpoint: "latest", "init" (before training), a step, or the URL of
        a checkpoint. weights: "ema" or "weights". ValueError where there is no such committed
        checkpoint, or where it was trained with another model, codec, text encoder or objective.
        """
        from framework.run.checkpoint import find_checkpoint, load_weights

        model, step = self.build_model().eval(), 0
        if checkpoint != "init":
            found = find_checkpoint(run.child("checkpoints"), checkpoint)
            self._check_meant_for(found)
            load_weights(found, model, weights)
            step = found.step
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), step

    def network(self) -> Identity:
        """What weights mean something with."""
        return self.identity.part("model", "codec", "text", "objective")

    def _check_meant_for(self, checkpoint: Checkpoint) -> None:
        """Shapes alone would let other heads, frequencies or text lengths pass, and give noise."""
        there = Identity(checkpoint.meta.get("config", {})).part(
            "model", "codec", "text", "objective"
        )
        differing = self.network().differences(there.values)
        if there.values and differing:
            raise ValueError(
                f"{checkpoint.store.url} was trained with another config:\n  "
                + "\n  ".join(differing)
                + "\ngive experiment=… or the same overrides as in training"
            )

    def build_objective(self) -> Objective:
        """The objective, scaled by the codec's statistics."""
        return self.objective.build(patch_std(self.build_codec().latent_std, self.patch_size))

    def reader(self, shards_url: str) -> ClipReader:
        """Reads clips of a plan as tokens."""
        shards, exclude = Store(shards_url), self._excluded()
        patchifier = Patchifier(self.patch_size)
        if self.data.latents:
            return LatentReader(
                shards=shards,
                token_size=self.token_size,
                exclude=exclude,
                patchify=patchifier,
                decode=LatentDecoder(self.codec),
                null_text=load_text(shards.read("null_text.safetensors")).numpy(),
            )
        return VideoReader(
            shards=shards,
            token_size=self.token_size,
            exclude=exclude,
            tokenize=Tokenizer(FrameEncoder(self.codec), patchifier),
            encode_text=CaptionEncoder(TextEmbedder(self.text)),
        )

    def encoders(self) -> Encoders:
        """The networks that `framework.data.encode` runs."""
        return Encoders(FrameEncoder(self.codec), TextEmbedder(self.text))

    def encoding(self) -> dict[str, Any]:
        """All that latents depend on beside the clips, in plain JSON."""
        made_with = {
            "codec": self.build_codec().fingerprint,
            "text": self.build_text().fingerprint,
            "dtype": self.data.encode.dtype,
            "views": asdict(self.data.views),
            "geometry": asdict(self.geometry),
            "max_tokens": self.data.max_tokens,
            "seed": self.seed,
        }
        return json.loads(json.dumps(made_with))

    def _excluded(self) -> frozenset[int]:
        return read_clip_ids(self.data.exclude) if self.data.exclude else frozenset()
