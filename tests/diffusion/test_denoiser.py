import pytest
import torch

from framework.diffusion.denoiser import Denoiser, token_t
from framework.objectives.rectified_flow import RectifiedFlowConfig

OBJECTIVE = RectifiedFlowConfig().build(torch.ones(6))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, tokens, t, layout, text):
        return self.scale * tokens + t[layout.segment_ids][:, None]


def test_given_tokens_are_at_t_zero(make_pack):
    batch = make_pack([4, 5], given=[1], padding=2)
    t = token_t(torch.tensor([0.2, 0.7, 0.0]), batch)
    assert t.flatten().tolist() == pytest.approx([0.2, 0.0, 0.7, 0.7, 0.7, 0.0, 0.0])


def test_it_is_the_network_as_the_objective_reads_it(make_pack):
    batch, net = make_pack([4, 5], given=[0]), Net()
    denoiser = Denoiser(net, OBJECTIVE)
    x_t = torch.randn(batch.tokens.shape)
    by_clip = torch.full((3,), 0.6)
    expected = OBJECTIVE.denoised(
        net(x_t, by_clip, batch, batch.text), x_t, token_t(by_clip, batch)
    )
    assert torch.equal(denoiser.denoised(batch, x_t, 0.6), expected)
    assert denoiser.path is OBJECTIVE.path
    assert denoiser.device == net.scale.device


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_whatever_happens(training):
    net, seen = Net().train(training), []

    def fail():
        with Denoiser(net, OBJECTIVE).evaluating():
            seen.append((net.training, torch.is_grad_enabled()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [(False, False)]
    assert net.training == training
    assert torch.is_grad_enabled()
