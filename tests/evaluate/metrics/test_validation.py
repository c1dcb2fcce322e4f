import pytest
import torch
from torch import Tensor, nn

from framework.batch import Clip, PackedBatch
from framework.diffusion.denoiser import Denoiser
from framework.evaluate.metrics.validation import validation_loss
from framework.objectives.rectified_flow import RectifiedFlowConfig

STD = torch.tensor([0.5, 1.0, 2.0, 1.5])
OBJECTIVE = RectifiedFlowConfig().build(STD)


class Zero(nn.Module):
    """Leaves the preconditioning to itself: optimal for Gaussian data."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.modes: list[bool] = []

    def forward(self, tokens: Tensor, t: Tensor, layout, text: Tensor) -> Tensor:
        self.modes.append(self.training)
        assert not torch.is_grad_enabled()
        return self.scale * tokens


def pack(
    clips: dict[int, int], padding: int = 2, weights: list[float] | None = None
) -> PackedBatch:
    """Clips given as {id: number of tokens}, each with its own Gaussian tokens, then padding."""
    tokens = [
        STD * torch.randn(n, 4, generator=torch.Generator().manual_seed(i))
        for i, n in clips.items()
    ]
    return PackedBatch.from_clips(
        [
            Clip(rows, (len(rows), 1, 1), torch.zeros(1, dtype=torch.int64), i, 8.0, weight=weight)
            for i, rows, weight in zip(clips, tokens, weights or [1.0] * len(clips), strict=True)
        ],
        num_segments=len(clips) + 1,
        max_tokens=sum(clips.values()) + padding,
    )


def test_gaussian_data_has_the_analytic_loss_at_every_level():
    losses = validation_loss(
        Denoiser(Zero(), OBJECTIVE), [pack({1: 9000}), pack({2: 9000})], (0.2, 0.8)
    )
    for level in (0.2, 0.8):
        expected = (STD**2 / (level**2 + (1 - level) ** 2 * STD**2)).mean()
        # 18,000 tokens of 4 values: about 1 % standard error.
        assert losses[f"loss_t{level}"] == pytest.approx(float(expected), rel=0.04)
    assert losses["loss"] == pytest.approx((losses["loss_t0.2"] + losses["loss_t0.8"]) / 2)


def test_loss_does_not_depend_on_packing_and_repeats_exactly():
    clips = {5: 30, 6: 7, 7: 12}
    together = validation_loss(Denoiser(Zero(), OBJECTIVE), [pack(clips)])
    assert validation_loss(Denoiser(Zero(), OBJECTIVE), [pack(clips)]) == together
    apart = validation_loss(
        Denoiser(Zero(), OBJECTIVE), [pack({i: n}, padding=0) for i, n in clips.items()]
    )
    assert apart == pytest.approx(together, rel=1e-5)  # float32 sums in another order
    assert validation_loss(Denoiser(Zero(), OBJECTIVE), [pack(clips)], seed=1) != together


def test_failed_clips_do_not_count():
    some = validation_loss(Denoiser(Zero(), OBJECTIVE), [pack({5: 30, 6: 7}, weights=[1.0, 0.0])])
    assert some == pytest.approx(
        validation_loss(Denoiser(Zero(), OBJECTIVE), [pack({5: 30})]), rel=1e-6
    )


def test_the_model_is_read_in_eval_mode_and_left_in_its_own():
    model = Zero().train()
    validation_loss(Denoiser(model, OBJECTIVE), iter([pack({1: 4})]), levels=(0.5,))
    assert model.modes == [False]
    assert model.training


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="no loss-bearing token"):
        validation_loss(Denoiser(Zero(), OBJECTIVE), [pack({1: 4}, weights=[0.0])])
    with pytest.raises(ValueError, match="levels"):
        validation_loss(Denoiser(Zero(), OBJECTIVE), [pack({1: 4})], levels=())
