import math

import pytest
import torch

from model_zoo.rope import axis_pairs, pack_rotations, rotate, rotations, token_positions

GRIDS = [(2, 3, 4), (1, 1, 1), (3, 1, 2)]


def test_positions_equal_a_naive_loop(make_pack):
    pack = make_pack(GRIDS, [1, 1, 1], token_size=2, padding=(5, 0))
    naive = [(f, h, w) for F, H, W in GRIDS for f in range(F) for h in range(H) for w in range(W)]
    naive += [(i, 0, 0) for i in range(5)]  # padding counts upwards in time
    positions = token_positions(pack)
    assert positions.tolist() == [list(position) for position in naive]


@pytest.mark.parametrize("head_dim", [6, 32, 64, 128])
def test_rotation_equals_a_naive_loop(make_pack, head_dim):
    pack = make_pack(GRIDS, [1, 1, 1], token_size=2)
    theta, pairs = 100.0, axis_pairs(head_dim)
    assert sum(pairs) == head_dim // 2
    positions = token_positions(pack).tolist()
    x = torch.randn(len(positions), 2, head_dim)
    expected = x.clone()
    for token, position in enumerate(positions):
        for head in range(2):
            channel = 0
            for axis in range(3):
                for j in range(pairs[axis]):
                    angle = position[axis] * theta ** (-j / pairs[axis])
                    a, b = x[token, head, channel].item(), x[token, head, channel + 1].item()
                    expected[token, head, channel] = a * math.cos(angle) - b * math.sin(angle)
                    expected[token, head, channel + 1] = a * math.sin(angle) + b * math.cos(angle)
                    channel += 2
    turned = rotate(x, pack_rotations(pack, head_dim, theta))
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)  # float32 against float64


def test_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 32)
    here, there = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 0, 5]])
    scores = []
    for offset in (0, 7):
        left = rotate(q, rotations(here + offset, 32, 100.0))
        right = rotate(k, rotations(there + offset, 32, 100.0))
        scores.append((left * right).sum())
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)  # float32 angles


def test_type_is_kept():
    x = torch.randn(2, 1, 8, dtype=torch.bfloat16)
    assert rotate(x, rotations(torch.zeros(2, 3), 8, 100.0)).equal(x)


@pytest.mark.parametrize("head_dim", [4, 9])
def test_heads_too_small_for_three_axes_are_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim={head_dim}"):
        axis_pairs(head_dim)
