"""The filter: what it lets through, and what it answers to a mistake."""

import pyarrow as pa
import pytest

from framework.data.manifest.where import parse_where

TABLE = pa.table(
    {
        "key": ["a", "b", "c", "d"],
        "num_frames": pa.array([10, 20, 30, 40], pa.int32()),
        "fps": pa.array([10.0, 10.0, 15.0, 8.0], pa.float32()),
        "source": ["web", "film", "web", "own"],
        "motion": [0.1, 0.3, None, 0.9],
        "aesthetic": [5.0, 4.0, 6.0, None],
    }
)


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ("motion > 0.2", "bd"),
        ("motion > 0.2 and aesthetic > 3", "b"),
        ("motion > 0.2 or aesthetic > 3", "abcd"),
        ("not motion > 0.2", "a"),  # a clip without the score passes neither way
        ("0.2 < motion <= 0.9", "bd"),
        ("source == 'web'", "ac"),
        ('source in ["web", "own"] and num_frames >= 20', "cd"),
        ("source not in ('web',)", "bd"),
        ("num_frames / fps > 1.5", "bcd"),
        ("num_frames / 7 > 2.8", "bcd"),  # 20 / 7 is 2.86, not 2
        ("motion - 0.2 > -0.05 and not (source == 'own' or source == 'x')", "b"),
        ("  aesthetic != 4  ", "ac"),
        ("motion * 10 + aesthetic > 6.5", "b"),
        ("2 > 1", "abcd"),
    ],
)
def test_what_passes(where: str, keys: str) -> None:
    found = TABLE.filter(parse_where(where, ("motion", "aesthetic")))
    assert "".join(found["key"].to_pylist()) == keys


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("motoin > 1", "no column 'motoin'; did you mean motion?"),
        ("captions > 1", "no column 'captions'"),
        ("motion", "compares nothing"),
        ("motion >", "cannot be read"),
        ("", "cannot be read"),
        ("motion > True", "True.* is not a comparison"),
        ("motion > None", "None"),
        ("motion is 1", "is not a comparison"),
        ("motion > __import__('os').system('true')", "is not a comparison"),
        ("motion.real > 1", r"motion\.real"),
        ("[motion > i for i in (1, 2)]", "compares nothing"),
        ("motion > 1 and aesthetic", "aesthetic.* is not a comparison"),
        ("motion ** 2 > 1", r"motion \*\* 2"),
        ("height > 123456789012345678901234567890", "no whole number of 64 bits; .* such as 1e30"),
        ("height in (1, -123456789012345678901234567890)", "no whole number of 64 bits"),
        ("height > " + "9" * 5000, "cannot be read"),
        ("height > 1" + " or height > 1" * 100_000, "more than 10000 characters; make it shorter"),
        ("source > 5", "cannot be reckoned"),
        ("height in (1, 'a')", "cannot be reckoned"),
        ("'a' + height > 1", "cannot be reckoned"),
        ("(" * 500 + "motion" + ")" * 500 + " > 1", "cannot be read"),
    ],
)
def test_a_mistake_is_named(where: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_where(where, ("motion", "aesthetic"))
