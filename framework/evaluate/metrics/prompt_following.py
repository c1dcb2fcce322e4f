"""How often videos made from captions of moving shapes show what the caption asks for."""

from collections.abc import Sequence

from framework.demo.reader import score
from framework.evaluate.metrics.metric import Sample


def prompt_following(samples: Sequence[Sample]) -> dict[str, float]:
    """Shares of the synthetic samples, each with its 95 % interval; none without such samples."""
    read = [(sample.made, sample.spec) for sample in samples if sample.spec is not None]
    if not read:
        return {}
    scores = score([made for made, _ in read], [spec for _, spec in read])
    rates = {
        "colour": scores.colour,
        "shape": scores.shape,
        "direction": scores.direction,
        "all_three": scores.all_three,
    }
    return {
        f"prompt_{name}{end}": value
        for name, rate in rates.items()
        for end, value in (("", rate.value), ("_low", rate.low), ("_high", rate.high))
    }
