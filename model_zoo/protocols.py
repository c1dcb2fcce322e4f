"""What the rest of Longtake may expect of a network.

Shapes: B segments (clips) in a pack, L video tokens, K text tokens, P values in one patch, D text
width, C latent channels, T frames, F H W latent grid.
"""

from typing import Protocol

from torch import Tensor

from model_zoo.checkpointing import CheckpointPolicy, PackedModel
from model_zoo.flops import Work


class Layout(Protocol):
    """How the clips lie in a pack; `framework.batch.PackedBatch` is one."""

    @property
    def grid(self) -> Tensor:
        """(B, 3) int32: token rows in time, height and width of each segment."""

    @property
    def cu_seqlens(self) -> Tensor:
        """(B+1,) int32: where each segment's video tokens start; the last entry is L."""

    @property
    def cu_text(self) -> Tensor:
        """(B+1,) int32: where each segment's text tokens start; the last entry is K."""

    @property
    def fps(self) -> Tensor:
        """(B,) float32: frames a second."""

    @property
    def given_mask(self) -> Tensor:
        """(L,) bool: tokens that are clean context, modulated with t = 0."""

    @property
    def segment_ids(self) -> Tensor:
        """(L,) int64: the segment of each token."""

    @property
    def token_index(self) -> Tensor:
        """(L,) int64: which token of its clip's grid, row-major in (time, height, width)."""


class Network(Protocol):
    """A network that reads noisy tokens; attention never crosses segments.

    The segments cover L and K exactly. Segments may be empty; one with video tokens may have no
    text tokens (the padding segment), and then its cross-attention is zero.
    """

    def __call__(self, tokens: Tensor, t: Tensor, layout: Layout, text: Tensor) -> Tensor:
        """tokens (L, P), t (B,) in [0, 1] with 0 = data and 1 = noise, text (K,) ids or (K, D).

        Returns (L, P); what it means (velocity, noise, data) is the objective's affair.
        """
        ...


class ModelConfig(Protocol):
    """What the rest of Longtake may ask of the config of a model of any kind."""

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent positions in time, height and width that make one token."""

    @property
    def text_max_length(self) -> int | None:
        """The most text tokens of a clip; None where the model learns no position for them."""

    @property
    def drops_tokens(self) -> bool:
        """Whether it can do with some of a clip's tokens, as masked training wants."""

    def build(self, token_size: int, text_vocab: int | None, text_dim: int | None) -> PackedModel:
        """The model, a `Network`, on torch's default device, for tokens of `token_size` values.

        `text_vocab`: where text comes as ids (K,); `text_dim`: as embeddings (K, text_dim).
        """

    def work(self, token_size: int, text_dim: int | None) -> Work:
        """What a forward pass of the model takes; `text_dim` as for `build`."""

    def activation_bytes(
        self, value_bytes: int, tokens: int, policy: CheckpointPolicy
    ) -> int | None:
        """What autograd keeps of a pack of `tokens` video tokens; None where it is not known.

        `value_bytes`: of a value that the model computes in, 2 for bf16 and 4 for fp32.
        """


class CodecConfig(Protocol):
    """The facts of a video codec of any kind, known without building it.

    Latents are normalised already: `latent_mean` and `latent_std` are what is left of their
    statistics. The facts are no fields of the dataclass: fields are what a user chooses, and part
    of a run's identity. The dataclass is hashable: a process builds one codec for each config.
    """

    @property
    def temporal_stride(self) -> int:
        """Frames to one latent frame."""

    @property
    def spatial_stride(self) -> int:
        """Pixels to one latent position, in height and in width."""

    @property
    def causal(self) -> bool:
        """True: T = 1 + k * stride frames give 1 + k latent frames. False: ceil(T / stride)."""

    @property
    def channels(self) -> int:
        """C."""

    @property
    def latent_mean(self) -> tuple[float, ...]:
        """(C,) mean of the latents over clips."""

    @property
    def latent_std(self) -> tuple[float, ...]:
        """(C,) standard deviation of the latents over clips, for preconditioning."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same frames would give other latents."""

    def build(self) -> "VideoCodec":
        """The codec; an nn.Module where it has weights, on the CPU."""


class TextConfig(Protocol):
    """The facts of a text encoder of any kind, known without building it.

    Exactly one of `vocab_size` and `dim` is None. No fact is a field, as in `CodecConfig`, but for
    what a user chooses.
    """

    @property
    def max_tokens(self) -> int:
        """Of the longest encoded caption."""

    @property
    def vocab_size(self) -> int | None:
        """Where text comes as ids: they are below it."""

    @property
    def dim(self) -> int | None:
        """Where text comes as embeddings: their width D."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same caption would give other tokens."""

    def num_tokens(self, caption: str) -> int:
        """Length of what the encoder makes of a caption, at least 1; it may load a tokenizer."""

    def build(self) -> "TextEncoder":
        """The encoder; an nn.Module where it has weights, on the CPU."""


class VideoCodec(Protocol):
    """Frames to latents and back; `CodecConfig` has the facts."""

    def encode(self, frames: Tensor) -> Tensor:
        """(T, 3, H, W) float in [-1, 1] -> (C, F, h, w); H and W divisible by spatial_stride."""
        ...

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """(C, F, h, w) -> (num_frames, 3, H, W) in about [-1, 1]."""
        ...


class TextEncoder(Protocol):
    """Captions to text tokens, each clip by itself; `TextConfig` has the facts."""

    def encode(self, caption: str) -> Tensor:
        """(k,) int64 ids, or (k, D) embeddings. The empty caption is the null condition."""
        ...
