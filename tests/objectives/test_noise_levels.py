import torch

from framework.objectives.noise_levels import NAMES, loss_by_noise_level
from framework.objectives.rectified_flow import RectifiedFlowConfig


def test_sums_land_in_the_bin_of_their_noise_level(make_pack):
    lengths = {1: 3, 2: 5, 3: 4, 4: 2}
    batch = make_pack([1, 2, 3, 4], lengths=lengths, weights=[1.0, 1.0, 0.0, 1.0], given=[0])
    t = torch.tensor([0.05, 0.41, 0.42, 1.0, 0.0])  # the third failed, the last is padding
    by_clip = torch.tensor([4.0, 10.0, 0.0, 3.0, 0.0])
    sums = {name: s.tolist() for name, s in loss_by_noise_level(batch, t, by_clip).items()}
    assert tuple(sums) == NAMES
    assert NAMES[0] == "loss/t_0.0-0.1"
    assert NAMES[9] == "loss/t_0.9-1.0"
    met = {name: s for name, s in sums.items() if s != [0.0, 0.0]}
    assert met == {
        "loss/t_0.0-0.1": [4.0, 2.0],  # one of its tokens is given
        "loss/t_0.4-0.5": [10.0, 5.0],
        "loss/t_0.9-1.0": [3.0, 2.0],
    }


def test_the_objective_reports_them_of_its_own_loss(make_pack):
    objective = RectifiedFlowConfig().build(torch.ones(6))
    batch = make_pack([1, 2, 3], weights=[1.0, 0.5, 1.0])
    weight = torch.nn.Parameter(torch.tensor(0.1))
    draw = objective.draw(batch, seed=0, step=0)
    losses = objective.loss(lambda x, *_: weight * x, batch, draw)
    assert losses.by_clip.requires_grad
    total = sum(losses.sums.values())
    assert total.dtype == torch.float64
    assert not total.requires_grad
    expected = [losses.by_clip.detach().double().sum(), batch.loss_mask.double().sum()]
    torch.testing.assert_close(total, torch.stack(expected), atol=0, rtol=1e-12)
