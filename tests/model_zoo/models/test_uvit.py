"""U-ViT against its paper's formula, written out for one clip."""

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from model_zoo.layers import sinusoidal_embedding
from model_zoo.models.uvit import UViT, UViTConfig
from model_zoo.sincos import pack_sincos
from model_zoo.text.byte import ByteTextConfig
from tests.conftest import relative_l2

P, TEXT_DIM = 6, 10


def attention(layer: nn.Module, x: Tensor, heads: int) -> Tensor:
    q, k, v = layer.qkv(x).chunk(3, dim=-1)  # 3 x (J, D)
    outputs = []
    for n in range(heads):
        d = q.shape[1] // heads
        of_head = slice(n * d, (n + 1) * d)
        weights = (q[:, of_head] @ k[:, of_head].T / d**0.5).softmax(-1)
        outputs.append(weights @ v[:, of_head])
    return layer.out(torch.cat(outputs, dim=-1))


def formula(model: UViT, time: Tensor, text: Tensor, video: Tensor) -> Tensor:
    """Bao et al. 2023, sec. 3 and fig. 1: long skips are concatenated, then go through a linear."""
    x = torch.cat([time, text, video])
    n, kept = model.config.depth // 2, []
    for i, block in enumerate(model.blocks):
        if i > n:
            x = block.skip(torch.cat([x, kept[2 * n - i]], dim=-1))
        x = x + attention(block.attention, block.norm1(x), model.config.num_heads)
        x = x + block.ffn.down(F.gelu(block.ffn.up(block.norm2(x))))
        kept.append(x)
    return model.out(model.norm(x[-video.shape[0] :]))


def test_a_clip_is_what_the_formula_says(make_pack):
    torch.manual_seed(0)
    config = UViTConfig(hidden_size=24, ffn=40, num_heads=2, depth=5)
    model = config.build(P, None, TEXT_DIM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    pack = make_pack([(1, 2, 2), (3, 2, 4), (2, 1, 1)], [2, 5, 1], P, text_dim=TEXT_DIM)
    pack.given_mask[5:9] = True
    t = torch.linspace(0.1, 0.9, pack.num_segments)
    out = model(pack.tokens, t, pack, pack.text)

    clip, words = slice(4, 28), slice(2, 7)
    video = model.embed(pack.tokens[clip]) + pack_sincos(pack, config.hidden_size)[clip]
    video = video + pack.given_mask[clip, None] * model.given
    stem = model.text_stem.mlp
    text = stem.down(F.gelu(stem.up(pack.text[words]), approximate="tanh"))
    time = sinusoidal_embedding(1000 * t[1:2], config.hidden_size)
    expected = formula(model, time, text, video)
    assert relative_l2(out[clip], expected) < 1e-5


def test_each_skip_reaches_its_mirror_alone(make_pack):
    """Without blocks but skips that pass on the shallow half, the output is the embedding's."""
    config = UViTConfig(hidden_size=24, ffn=40, num_heads=2, depth=5)
    model = config.build(P, None, TEXT_DIM)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            for layer in (block.attention.out, block.ffn.down):
                nn.init.zeros_(layer.weight)
                layer.bias.fill_(float(2**i))  # tells which block was passed
            if block.skip is not None:
                block.skip.weight.copy_(torch.cat([torch.zeros(24, 24), torch.eye(24)], dim=1))
    seen = []
    model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pack = make_pack([(1, 2, 2)], [2], P, text_dim=TEXT_DIM)
    model(pack.tokens, torch.rand(pack.num_segments), pack, pack.text)
    start = model.embed(pack.tokens) + pack_sincos(pack, 24)
    # The last block takes the output of the first: only these two have been passed, twice each.
    torch.testing.assert_close(seen[0], start + 2 * (2**0 + 2**4))


def published_size(depth: int, width: int, heads: int, token_size: int, classes: int) -> int:
    """Parameters of github.com/baofff/U-ViT, libs/uvit.py, without its 3 x 3 convolution.

    From ours: its queries, keys and values have no bias, its positions (256 of the image, one each
    of time and class) and its classes are tables.
    """
    config = UViTConfig(hidden_size=width, ffn=4 * width, num_heads=heads, depth=depth)
    with torch.device("meta"):
        model = config.build(token_size, None, TEXT_DIM)
    parts = [model.embed, model.blocks, model.norm, model.out]
    count = sum(p.numel() for part in parts for p in part.parameters())
    count -= sum(block.attention.qkv.bias.numel() for block in model.blocks)
    return count + (256 + 1 + (classes > 0) + classes) * width


@pytest.mark.parametrize(
    ("depth", "width", "heads", "token_size", "classes", "millions"),
    [
        (13, 512, 8, 2 * 2 * 3, 0, 44),  # Small, for CIFAR-10
        (17, 512, 8, 2 * 2 * 3, 0, 58),  # Small (Deep)
        (17, 768, 12, 4 * 4 * 3, 1000, 131),  # Mid, for ImageNet 64 x 64
        (21, 1024, 16, 2 * 2 * 4, 1001, 287),  # Large, for latents of ImageNet 256 x 256
        (29, 1152, 16, 2 * 2 * 4, 1001, 501),  # Huge
    ],
)
def test_real_sizes_are_uvits(depth, width, heads, token_size, classes, millions):
    """Bao et al. 2023, table 1, in millions; patches and classes as in the authors' configs/."""
    assert round(published_size(depth, width, heads, token_size, classes) / 1e6) == millions


def test_the_largest_is_uvits_to_the_last_parameter():
    """U-ViT-H/2, configs/imagenet256_uvit_huge.py (which has conv=False): 500,832,016 where others
    list the sizes of ImageNet generators, beside DiT-XL/2's 675,129,632."""
    assert published_size(29, 1152, 16, 2 * 2 * 4, 1001) == 500_832_016


def test_the_small_size(pytestconfig) -> None:
    options = yaml.safe_load((pytestconfig.rootpath / "conf/model/uvit_xs.yaml").read_text())
    assert options.pop("defaults") == ["uvit"]
    with torch.device("meta"):
        model = UViTConfig(**options).build(144, ByteTextConfig.vocab_size, None)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.96e6, abs=5e3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 5}, "hidden_size=24 must be divisible by num_heads=5"),
        ({"hidden_size": 18}, "hidden_size=18 must be divisible by 4"),
        ({"depth": 4}, "depth=4 must be odd; try 5"),
        ({"depth": -1}, "depth=-1 must be at least 1"),
        ({"patch_size": (1, 0, 2)}, "must be at least 1 in time"),
        ({"text_depth": -1}, "text_depth=-1"),
        ({"gelu": "relu"}, "gelu='relu' is not known"),
        ({"attention": "xformers"}, "attention='xformers' is not known"),
    ],
)
def test_impossible_models_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        UViTConfig(**{"hidden_size": 24, "ffn": 40, "num_heads": 2, "depth": 3, **options})
