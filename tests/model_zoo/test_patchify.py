import pytest
import torch
import torch.nn.functional as F

from model_zoo.patchify import patch_std, patchify, unpatchify


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 3)])
@pytest.mark.parametrize("shape", [(4, 6, 6), (1, 1, 1), (5, 3, 7)])
def test_there_and_back(shape, patch):
    latents = torch.randn(3, *shape)
    grid = tuple(-(-side // step) for side, step in zip(shape, patch, strict=True))
    tokens = patchify(latents, patch)
    assert tokens.shape == (grid[0] * grid[1] * grid[2], 3 * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(tokens, grid, patch, 3, shape), latents)


def test_order_of_tokens_and_values():
    latents = torch.arange(2 * 2 * 2 * 4).reshape(2, 2, 2, 4)  # (C, F, H, W)
    tokens = patchify(latents, (1, 2, 2))
    # Frame 1, columns 2 and 3: rows first, channels fastest.
    assert tokens[3].tolist() == [
        latents[c, 1, h, w].item() for h in (0, 1) for w in (2, 3) for c in (0, 1)
    ]


def test_padding_repeats_the_edge():
    tokens = patchify(torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1), (2, 1, 1))
    assert tokens.tolist() == [[1.0, 2.0], [3.0, 3.0]]


def test_std_follows_the_order_of_values():
    std = (1.0, 10.0)
    latents = torch.randn(2, 64, 16, 16) * torch.tensor(std).reshape(2, 1, 1, 1)
    measured = patchify(latents, (2, 2, 2)).std(0)
    torch.testing.assert_close(measured, patch_std(std, (2, 2, 2)), rtol=0.1, atol=0)  # 2,048 draws


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="want \\(8, 12\\)"):
        unpatchify(torch.zeros(7, 12), (2, 2, 2), (1, 2, 2), 3, (2, 4, 4))


def test_a_patch_of_several_frames_is_a_tubelet():
    """ViViT's tubelet embedding (Arnab et al. 2021, sec. 3.2): a convolution of stride its size."""
    patch, latents = (2, 3, 2), torch.randn(5, 4, 6, 8)
    kernel, bias = torch.randn(7, 5, *patch), torch.randn(7)
    tubelets = F.conv3d(latents, kernel, bias, stride=patch)  # (D, f, h, w)
    weight = kernel.permute(0, 2, 3, 4, 1).flatten(1)  # (D, P)
    tokens = F.linear(patchify(latents, patch), weight, bias)  # (n, D)
    torch.testing.assert_close(tokens, tubelets.flatten(1).T, atol=1e-4, rtol=1e-4)
