"""A thousand damaged shards; twenty thousand by hand: `python -m benchmarks.fuzz 20000 1`."""

import pytest

from benchmarks.fuzz import run


@pytest.mark.slow
def test_no_damage_crashes_hangs_or_loses_a_clip_silently() -> None:
    ends = run(1000, seed=0)
    assert ends.total() == 1000
    assert min(ends["all clips"], ends["some clips"], ends["nothing left"]) > 0, ends
