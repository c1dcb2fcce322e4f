"""Checks that the configs of networks share; each is a ValueError that names the field."""

from typing import Any, get_args

# Chosen by hand, far above any model: a config of a stranger must not fill the memory of whoever
# builds it, not even on the meta device.
MAX_DEPTH = 1000
MAX_SIZE = 1 << 24


def check_choice(name: str, value: str, choices: Any) -> None:
    """ValueError unless `value` is one of a Literal's; `name` is the field's."""
    if value not in get_args(choices):
        raise ValueError(
            f"{name}={value!r} is not known; use one of {', '.join(get_args(choices))}"
        )


def check_positive(config: Any, *names: str) -> None:
    """ValueError where one of these fields of a config is below 1, or above any model's."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
        check_limit(name, getattr(config, name))


def check_limit(name: str, value: int) -> None:
    """ValueError where a size, or the depth that a `name` ends with, is above any model's."""
    limit = MAX_DEPTH if name.endswith("depth") else MAX_SIZE
    if value > limit:
        raise ValueError(f"{name}={value:.4g} must be at most {limit}")


def head_dim(hidden_size: int, num_heads: int) -> int:
    """Channels of one attention head; ValueError where the heads do not divide the width."""
    if hidden_size % num_heads:
        fitting = next(n for n in range(num_heads, 0, -1) if hidden_size % n == 0)
        raise ValueError(
            f"hidden_size={hidden_size} must be divisible by num_heads={num_heads}; try {fitting}"
        )
    return hidden_size // num_heads
