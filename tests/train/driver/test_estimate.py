"""What a run would take, against numbers worked out by hand."""

import pytest

from framework.config import compose
from framework.train.driver.estimate import Estimate, estimate
from framework.train.job import Job

BIG = [
    "experiment=footage",
    "run.name=big",
    "data.shards=/none",
    "data.manifest=/none",
    "codec=identity",
    "model=dit_1b",
    "engine.dtype=bf16",
    "cluster.num_workers=8",
    "data.global_batch_packs=16",
    "data.max_tokens=32768",
    "train.steps=1000",
]


def of(*overrides: str) -> Estimate:
    config = compose([*BIG, *overrides])
    return estimate(Job.of(config), config.hardware)


def test_time_and_money_follow_from_flops() -> None:
    found = of("hardware.dollars_per_hour=2", "hardware.mfu=0.5", "hardware.peak_tflops=1000")
    assert found.tokens_per_step == 16 * 32768
    per_gpu = 1000e12 * 0.5
    assert found.step_s == pytest.approx(found.flops_per_step / (8 * per_gpu))
    assert found.gpu_days == pytest.approx(found.flops_per_step * 1000 / per_gpu / 86400)
    assert f"${found.gpu_days * 48:,.0f}" in str(found)
    assert "is no manifest yet" in str(found)
    # 6 N and the attention of clips as long as the recipe's views allow.
    assert found.flops_per_step > 6 * 1.2e9 * found.tokens_per_step


def test_what_does_not_fit_says_what_would() -> None:
    plain = of()
    assert not plain.fits
    assert "DOES NOT FIT" in str(plain)
    assert plain.cures
    for cure in plain.cures:
        config = compose([*BIG, *cure.split()])
        Job.of(config).check()  # what it says is a run as it stands
        cured = estimate(Job.of(config), config.hardware)
        assert cured.fits, cure
        assert not cured.cures
    hopeless = of("hardware.memory_gib=7")
    assert hopeless.cures == ("nothing that was tried; a smaller model, or GPUs with more memory",)


def test_more_ranks_hold_less_each_and_checkpointing_keeps_less() -> None:
    one, many = (of(f"cluster.num_workers={n}").memory for n in (2, 16))
    assert many.optimizer == pytest.approx(one.optimizer / 8, rel=1e-6)
    assert many.activations == one.activations
    full = of("train.activation_checkpointing.mode=full").memory
    assert full.activations < one.activations / 5


def test_of_any_model_it_knows_what_the_states_take() -> None:
    small = of("model=mmdit_xs")
    assert small.fits
    assert small.memory.activations == 0
    assert "and activations, not known of this model" in str(small)
    assert "without activations it fits" in str(small)
    large = of("model=mmdit_13b", "cluster.num_workers=2")
    assert "DOES NOT FIT" in str(large)
    assert large.cures[0].startswith("cluster.num_workers=")


def test_the_mixture_is_the_manifests(small_data: list[str], small_line: list[str]) -> None:
    config = compose([*small_line, *small_data])
    found = estimate(Job.of(config), config.hardware)
    assert "tokens on the average, as in" in found.mixture
    assert found.fits


@pytest.mark.parametrize("override", ["hardware.mfu=0", "hardware.memory_gib=-1"])
def test_impossible_hardware_is_refused(override: str) -> None:
    with pytest.raises(ValueError, match="hardware"):
        compose([*BIG, override])
