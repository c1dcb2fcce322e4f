import pytest
import torch

from framework.diffusion.denoiser import token_t
from framework.diffusion.path import StraightPath, interpolate
from framework.objectives.noise import NoiseDraw
from framework.objectives.objective import DiffusionObjective
from framework.objectives.rectified_flow import RectifiedFlow, RectifiedFlowConfig

STD = torch.tensor([0.3, 0.6, 1.0, 1.4, 2.0, 3.0])
EVERY_CONFIG = pytest.mark.parametrize("precondition", [True, False])


class PerfectVelocity:
    """Knows data and noise; returns what the objective reads as v = noise - data."""

    def __init__(self, objective, batch, draw):
        t = token_t(draw.t, batch)
        x_t = interpolate(StraightPath(), batch.tokens, draw.noise, t)
        velocity = draw.noise - batch.tokens
        if not objective.config.precondition:
            self.output = velocity
            return
        # v is affine in the output: read both coefficients off the objective itself.
        skip = objective._velocity(torch.zeros_like(x_t), x_t, t)
        scale = objective._velocity(torch.ones_like(x_t), x_t, t) - skip
        self.output = (velocity - skip) / scale

    def __call__(self, tokens, t, layout, text):
        return self.output


class Zero(torch.nn.Module):
    def forward(self, tokens, t, layout, text):
        return torch.zeros_like(tokens)


class Tiny(torch.nn.Module):
    """A network that sees each token, its t and its clip's first text id."""

    def __init__(self, num_values=6):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(num_values + 2, num_values)

    def forward(self, tokens, t, layout, text):
        segments = layout.segment_ids
        extra = torch.stack([t[segments], segments * 0.1], dim=1)
        return self.layer(torch.cat([tokens, extra], dim=1))


@EVERY_CONFIG
def test_loss_is_zero_at_the_perfect_prediction_and_denoised_gives_the_data(
    make_pack, precondition
):
    objective = RectifiedFlowConfig(precondition=precondition).build(STD)
    batch = make_pack([4, 7, 2], std=STD, given=[0, 5])
    draw = objective.draw(batch, seed=1, step=0)
    perfect = PerfectVelocity(objective, batch, draw)
    # The inversion of the preconditioning divides by sqrt(s^2 / D): some 1e-6 of float32 noise.
    assert objective.loss(perfect, batch, draw).by_clip.abs().max() < 1e-9
    t = token_t(draw.t, batch)
    x_t = interpolate(StraightPath(), batch.tokens, draw.noise, t)
    torch.testing.assert_close(
        objective.denoised(perfect.output, x_t, t), batch.tokens, atol=2e-5, rtol=1e-5
    )


@EVERY_CONFIG
def test_loss_is_the_plain_squared_error_of_the_velocity(make_pack, precondition):
    objective = RectifiedFlowConfig(precondition=precondition).build(STD)
    batch = make_pack([4, 7, 2], std=STD, weights=[1.0, 0.0, 1.0], given=[1])
    draw = objective.draw(batch, seed=1, step=0)
    model = Tiny()
    losses = objective.loss(model, batch, draw).by_clip.detach()
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32

    t = token_t(draw.t, batch)
    x_t = interpolate(StraightPath(), batch.tokens, draw.noise, t)
    data = objective.denoised(model(x_t, draw.t, batch, batch.text), x_t, t).detach()
    by_token = (((x_t - data) / t.clamp(min=1e-9)) - (draw.noise - batch.tokens)).square().mean(1)
    bounds = batch.cu_seqlens.tolist()
    counted = [i for i in range(bounds[1]) if i != 1]
    assert losses[0] == pytest.approx(float(by_token[counted].sum()), rel=1e-4)
    assert losses[1] == 0  # weight 0
    assert losses[2] == pytest.approx(float(by_token[bounds[2] : bounds[3]].sum()), rel=1e-4)
    assert losses[3] == 0  # padding


def test_preconditioning_is_the_best_linear_guess_for_gaussian_data(make_pack):
    """With output 0 the loss is the analytic residual s^2 / D, and no linear term lowers it."""
    objective = RectifiedFlowConfig().build(STD)
    batch = make_pack([5], std=STD, lengths={5: 40_000}, padding=0)
    for t in (0.05, 0.3, 0.7, 0.95):
        draw = objective.fixed_draw(batch, t, seed=3)
        total = t**2 + (1 - t) ** 2 * STD**2
        expected = (STD**2 / total).mean()
        loss = objective.loss(Zero(), batch, draw).by_clip[0] / 40_000
        # 40,000 x 6 squared normals of unequal variance: about 1 % standard error at worst.
        assert loss == pytest.approx(float(expected), rel=0.03)
        x_t = interpolate(StraightPath(), batch.tokens, draw.noise, token_t(draw.t, batch))
        guess = objective._velocity(torch.zeros_like(x_t), x_t, token_t(draw.t, batch))
        target = (draw.noise - batch.tokens - guess) / (STD**2 / total).sqrt()
        assert (target.std(dim=0) - 1).abs().max() < 0.02  # the network's target: unit variance
        correlation = (target * x_t).mean(dim=0) / x_t.std(dim=0)
        assert correlation.abs().max() < 0.02  # and nothing linear is left


def test_without_preconditioning_the_output_is_the_velocity(make_pack):
    objective = RectifiedFlowConfig(precondition=False).build(STD)
    x_t, output = torch.randn(5, 6), torch.randn(5, 6)
    t = torch.full((5, 1), 0.25)
    torch.testing.assert_close(objective.denoised(output, x_t, t), x_t - 0.25 * output)


def test_given_tokens_reach_the_network_clean_and_bear_no_loss(make_pack):
    seen = {}

    class Spy(Zero):
        def forward(self, tokens, t, layout, text):
            seen["tokens"] = tokens
            return super().forward(tokens, t, layout, text)

    objective = RectifiedFlowConfig().build(STD)
    batch = make_pack([3], std=STD, given=[0, 1])
    draw = objective.draw(batch, seed=0, step=0)
    all_given = make_pack([3], std=STD, given=range(5))
    assert objective.loss(Zero(), all_given, draw).by_clip.sum() == 0
    objective.loss(Spy(), batch, draw)
    assert torch.equal(seen["tokens"][:2], batch.tokens[:2])
    assert not torch.isclose(seen["tokens"][2:5], batch.tokens[2:5]).any()


def test_draws_belong_to_the_clip_not_to_its_pack(make_pack):
    objective = RectifiedFlowConfig().build(STD)
    together = objective.draw(make_pack([10, 11, 12, 13]), seed=5, step=0)
    lengths = [2 + i % 4 for i in (10, 11, 12, 13)]
    rows = dict(zip((10, 11, 12, 13), together.noise.split([*lengths, 3]), strict=False))
    times = dict(zip((10, 11, 12, 13), together.t.tolist(), strict=False))
    # The same clips as two ranks would hold them, in another order and with other padding.
    for ids in ([13, 10], [12, 11]):
        draw = objective.draw(make_pack(ids, padding=0), seed=5, step=0)
        assert torch.equal(draw.noise, torch.cat([rows[i] for i in ids]))
        assert draw.t.tolist() == [*(times[i] for i in ids), 0.0]
    assert not torch.equal(together.noise, objective.draw(make_pack([10, 11, 12, 13]), 6, 0).noise)
    other_epoch = objective.draw(make_pack([10, 11, 12, 13], epoch=1), 5, 0)
    assert not torch.equal(together.noise, other_epoch.noise)
    assert not torch.equal(together.t, other_epoch.t)


def test_segments_without_a_clip_draw_nothing(make_pack):
    objective = RectifiedFlowConfig().build(STD)
    draw = objective.draw(make_pack([1], padding=4), seed=0, step=0)
    assert torch.equal(draw.noise[-4:], torch.zeros(4, 6))
    assert draw.t[-1] == 0
    assert draw.to("cpu").t is draw.t


def test_fixed_draw_knows_neither_epoch_nor_level(make_pack):
    objective = RectifiedFlowConfig().build(STD)
    first = objective.fixed_draw(make_pack([1, 2], epoch=0), 0.2, seed=9)
    later = objective.fixed_draw(make_pack([1, 2], epoch=4), 0.8, seed=9)
    assert torch.equal(first.noise, later.noise)
    assert first.t.tolist() == pytest.approx([0.2, 0.2, 0.0])
    with pytest.raises(ValueError, match=r"t=1\.5"):
        objective.fixed_draw(make_pack([1]), 1.5, seed=9)


def test_timesteps_follow_the_density(make_pack):
    batch = make_pack(list(range(2000)), lengths=dict.fromkeys(range(2000), 0), padding=0)
    t = RectifiedFlowConfig(logit_mean=0.0, logit_std=1.2, shift=3.0).build(STD).draw(batch, 0, 0).t
    # The median maps to 3 * 0.5 / (1 + 2 * 0.5); standard error of the share: 0.011.
    assert (t[:2000] < 0.75).float().mean() == pytest.approx(0.5, abs=0.04)
    t = RectifiedFlowConfig(density="uniform", shift=1.0).build(STD).draw(batch, 0, 0).t
    assert t[:2000].mean() == pytest.approx(0.5, abs=0.03)


def test_loss_is_float32_whatever_the_network_computes_in(make_pack):
    class Half(Zero):
        def forward(self, tokens, t, layout, text):
            return tokens.bfloat16()

    objective = RectifiedFlowConfig().build(STD)
    batch = make_pack([1, 2])
    losses = objective.loss(Half(), batch, objective.draw(batch, 0, 0))
    assert losses.by_clip.dtype == torch.float32


def test_gradient_reaches_the_network(make_pack):
    objective = RectifiedFlowConfig().build(STD)
    model, batch = Tiny(), make_pack([1, 2, 3], std=STD)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    draw = objective.draw(batch, 0, 0)
    losses = []
    for _ in range(40):
        loss = objective.loss(model, batch, draw).by_clip.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": "beta"}, "density='beta'"),
        ({"logit_std": -1.0}, r"logit_std=-1\.0"),
        ({"shift": 0.0}, r"shift=0\.0"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlowConfig(**changes)


def test_constant_channels_are_refused():
    with pytest.raises(ValueError, match="token_std"):
        RectifiedFlow(RectifiedFlowConfig(), torch.tensor([1.0, 0.0]))


def test_draw_moves_whole():
    draw = NoiseDraw(torch.zeros(2), torch.zeros(3, 4)).to("meta")
    assert draw.t.is_meta
    assert draw.noise.is_meta


def test_the_draw_is_the_same_at_every_step(make_pack):
    objective, batch = RectifiedFlowConfig().build(STD), make_pack([1, 2])
    first, later = objective.draw(batch, 3, step=0), objective.draw(batch, 3, step=1000)
    assert torch.equal(first.t, later.t)
    assert torch.equal(first.noise, later.noise)


@EVERY_CONFIG
def test_the_network_gives_the_velocity_of_its_own_path(make_pack, precondition):
    """Loss and sampler read one output alike: what denoised() implies is what the loss compares."""
    objective = RectifiedFlowConfig(precondition=precondition).build(STD)
    assert isinstance(objective, DiffusionObjective)
    x_t, output = torch.randn(5, 6), torch.randn(5, 6)
    t = torch.linspace(0.1, 1, 5)[:, None]
    implied = objective.path.velocity(x_t, objective.denoised(output, x_t, t), t)
    expected = objective._velocity(output, x_t, t)
    torch.testing.assert_close(implied, expected, atol=1e-5, rtol=1e-4)  # x_t cancels, float32
    assert objective.averaged_over == "video_tokens"
