import pytest
import torch
from torch import nn

from framework.train.engine.ema import ema_decay_at, update_ema
from framework.train.engine.optimizer import AdamWConfig, ParameterGroup, set_lr


def rates(config: AdamWConfig, steps: list[int], num_steps: int = 100) -> list[float]:
    return [config.lr_at(step, num_steps) for step in steps]


def test_constant_schedule() -> None:
    config = AdamWConfig(lr=2.0, schedule="constant", warmup_steps=4)
    assert rates(config, [0, 1, 2, 3, 4, 99, 500]) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert AdamWConfig(lr=2.0, warmup_steps=0).lr_at(0, 100) == 2.0


def test_cosine_schedule() -> None:
    config = AdamWConfig(lr=1.0, schedule="cosine", warmup_steps=20, final=0.2)
    # From step 20 to 100: at half of it the mean of both ends, at a third (1 + cos 60°) / 2 = 3/4.
    assert rates(config, [9, 19, 20, 60, 100, 200]) == pytest.approx([0.5, 1, 1, 0.6, 0.2, 0.2])
    assert config.lr_at(20 + 80 / 3, 100) == pytest.approx(0.2 + 0.8 * 0.75)


def test_trapezoid_schedule() -> None:
    config = AdamWConfig(lr=1.0, schedule="trapezoid", warmup_steps=10, hold=0.6, final=0.1)
    assert rates(config, [4, 9, 10, 60, 80, 100]) == pytest.approx([0.5, 1, 1, 1, 0.55, 0.1])
    short = AdamWConfig(lr=1.0, schedule="trapezoid", warmup_steps=10, hold=0.0, final=0.0)
    assert rates(short, [9, 10, 55, 100]) == pytest.approx([1, 1, 0.5, 0])
    all_warmup = AdamWConfig(lr=1.0, schedule="trapezoid", warmup_steps=200)
    assert all_warmup.lr_at(99, 100) == pytest.approx(0.5)


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, spared = AdamWConfig(weight_decay=0.1).build(model.named_parameters()).param_groups
    assert decayed["weight_decay"] == 0.1
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) == 3


def test_groups_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    groups = (
        ParameterGroup("0.*", lr_scale=0.5),
        ParameterGroup("*.bias", lr_scale=2.0, weight_decay=0.3),  # 0.bias is in the first
    )
    optimizer = AdamWConfig(weight_decay=0.1, groups=groups).build(model.named_parameters())
    set_lr(optimizer, 8.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[p]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        "0.weight": (4, 0.1),
        "0.bias": (4, 0),
        "1.weight": (8, 0),
        "1.bias": (16, 0.3),
        "2.weight": (8, 0.1),
        "2.bias": (16, 0.3),
    }


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    config = AdamWConfig(groups=(ParameterGroup("weigth"),))
    with pytest.raises(ValueError, match=r"'weigth' matches no parameter; .* name is weight"):
        config.build(nn.Linear(3, 4).named_parameters())
    with pytest.raises(ValueError, match="lr_scale=-1 must be"):
        ParameterGroup("*", lr_scale=-1)
    with pytest.raises(ValueError, match="weight_decay=-1 must be"):
        ParameterGroup("*", weight_decay=-1)


def test_a_frozen_parameter_is_refused() -> None:
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="bias is frozen"):
        AdamWConfig().build(model.named_parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "linear"),
        ("lr", 0.0),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("max_grad_norm", -1.0),
        ("warmup_steps", -1),
        ("hold", 1.5),
        ("final", -0.1),
    ],
)
def test_nonsense_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        AdamWConfig(**{field: value})


def test_ema_decay_ramps_up() -> None:
    assert [ema_decay_at(0.9, n) for n in (0, 1, 8, 80, 81, 1000)] == pytest.approx(
        [0.1, 2 / 11, 0.5, 0.9, 0.9, 0.9]
    )


def test_ema_update_by_hand() -> None:
    ema, weights = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]
    update_ema(ema, weights, decay=0.5, num_updates=100)
    assert ema[0].tolist() == [2.0, 1.0]
    update_ema(ema, weights, decay=0.5, num_updates=0)  # the ramp's 0.1
    torch.testing.assert_close(ema[0], torch.tensor([2.9, 0.1]))
