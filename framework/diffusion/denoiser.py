"""A network together with how its output is read: one thing for guidance, sampling and validation.

(A lesson of k-diffusion's `Denoiser`: loss and sampling read the output by the same code.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from framework.batch import PackedBatch
from framework.diffusion.path import Path

# A `model_zoo.protocols.Network`: (tokens (L, P), t (B,), layout, text) -> (L, P).
Network = Callable[[Tensor, Tensor, PackedBatch, Tensor], Tensor]


class Parametrization(Protocol):
    """What a network's output means; a diffusion objective is one."""

    @property
    def path(self) -> Path:
        """Between data and noise."""

    def denoised(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(L, P) float32 estimate of the data; t is (L, 1), each token's own."""
        ...


P_co = TypeVar("P_co", bound=Parametrization, covariant=True)


@dataclass(frozen=True)
class Denoiser(Generic[P_co]):
    """Estimates the data behind noisy tokens."""

    model: nn.Module
    parametrization: P_co

    @property
    def path(self) -> Path:
        """Between data and noise."""
        return self.parametrization.path

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.model.parameters()).device

    def denoised(self, batch: PackedBatch, x_t: Tensor, t: float) -> Tensor:
        """(L, P) float32 estimate of the data behind x_t (L, P), all clips at noise level t.

        Tokens of `batch.given_mask` are clean. `batch.tokens` is not read.
        """
        by_clip = torch.full((batch.num_segments,), t, dtype=torch.float32, device=x_t.device)
        output = self.model(x_t, by_clip, batch, batch.text)
        return self.parametrization.denoised(output, x_t, token_t(by_clip, batch))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients; the model is left in the mode that it came in."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)


def token_t(t: Tensor, batch: PackedBatch) -> Tensor:
    """t by clip (B,) -> t by token (L, 1): given tokens are clean, so theirs is 0."""
    return (t[batch.segment_ids] * ~batch.given_mask)[:, None]
