import pytest
import torch

from model_zoo.attention import Run, Segments, choose_backend, dense_attention, packed_attention


def cu(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def qkv(num_q: int, num_k: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 2, 8, generator=generator, requires_grad=True) for n in (num_q, num_k, num_k)
    ]


LENGTHS = {
    "rectangular": ((4, 4, 4), (3, 3, 3)),
    "runs": ((7, 5, 5, 2, 2, 2, 1), (3, 3, 3, 3, 4, 4, 4)),
    "one token": ((1,), (1,)),
    "empty segments": ((0, 5, 0, 0, 3, 0), (2, 4, 0, 3, 1, 0)),
    "queries without keys": ((4, 6, 2), (3, 0, 0)),
    "no keys at all": ((4, 6), (0, 0)),
    "no queries at all": ((0, 0), (2, 3)),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_cross_attention_equals_the_dense_oracle(name):
    q_lengths, k_lengths = LENGTHS[name]
    inputs = qkv(sum(q_lengths), sum(k_lengths))
    upstream = torch.randn_like(inputs[0])
    segments = Segments.of(cu(*q_lengths), cu(*k_lengths), "sdpa")
    out = packed_attention(*inputs, segments)
    oracle = dense_attention(*inputs, segments.cu_q, segments.cu_k)
    torch.testing.assert_close(out, oracle, atol=1e-5, rtol=1e-5)  # float32 sums in another order
    if not out.requires_grad:
        return  # nothing attends to anything
    grads = torch.autograd.grad(out, inputs, upstream, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(oracle, inputs, upstream)
    torch.testing.assert_close(grads, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LENGTHS)
def test_self_attention_equals_the_dense_oracle(name):
    lengths = LENGTHS[name][0]
    inputs = qkv(sum(lengths), sum(lengths))
    segments = Segments.of(cu(*lengths), cu(*lengths), "sdpa")
    out = packed_attention(*inputs, segments)
    oracle = dense_attention(*inputs, segments.cu_q, segments.cu_k)
    torch.testing.assert_close(out, oracle, atol=1e-5, rtol=1e-5)


def test_queries_without_keys_give_zeros():
    q, k, v = qkv(6, 3)
    segments = Segments.of(cu(2, 4), cu(3, 0), "sdpa")
    assert torch.equal(packed_attention(q, k, v, segments)[2:], torch.zeros(4, 2, 8))


def test_a_rectangular_pack_is_one_run():
    segments = Segments.of(cu(4, 4, 4), cu(3, 3, 3), "sdpa")
    assert segments.runs == (Run(3, 4, 3),)
    assert segments.lengths.tolist() == [[4, 4, 4], [3, 3, 3]]


def test_runs_break_where_either_length_changes():
    segments = Segments.of(cu(4, 4, 4, 0, 2), cu(3, 3, 1, 0, 0), "sdpa")
    assert segments.runs == (Run(2, 4, 3), Run(1, 4, 1), Run(1, 2, 0))


def test_a_nan_stays_in_its_segment():
    q, k, v = (x.detach() for x in qkv(9, 9))
    for x in (q, k, v):
        x[3:5] = float("nan")
    out = packed_attention(q, k, v, Segments.of(cu(3, 2, 4), cu(3, 2, 4), "sdpa"))
    assert out[3:5].isnan().all()
    assert out[:3].isfinite().all()
    assert out[5:].isfinite().all()


def test_unequal_numbers_of_segments_are_refused():
    with pytest.raises(ValueError, match="2 segments and cu_k 3"):
        Segments.of(cu(1, 2), cu(1, 2, 3), "sdpa")


def test_backends():
    assert choose_backend("auto", "cpu") == "sdpa"
    assert choose_backend("dense", "cpu") == "dense"
    assert choose_backend("auto", "cuda", torch.float32) == "sdpa"
    assert choose_backend("auto", "cuda", torch.bfloat16) == "varlen"
    for name, module in (("fa4", "flash_attn.cute"), ("fa3", "flash_attn_interface")):
        with pytest.raises(ValueError, match=f"needs the module {module}"):
            choose_backend(name, "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="runs on CUDA"):
        choose_backend("varlen", "cpu")
    with pytest.raises(ValueError, match="not on cuda in"):
        choose_backend("flash_attn", "cuda", torch.float32)
    with pytest.raises(ValueError, match="use one of auto"):
        choose_backend("flash", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", LENGTHS)
def test_varlen_on_cuda_equals_the_dense_oracle(name):
    q_lengths, k_lengths = LENGTHS[name]
    inputs = [
        x.detach().to("cuda", torch.bfloat16).requires_grad_()
        for x in qkv(sum(q_lengths), sum(k_lengths))
    ]
    segments = Segments.of(
        cu(*q_lengths).cuda(), cu(*k_lengths).cuda(), choose_backend("auto", "cuda")
    )
    out = packed_attention(*inputs, segments)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    oracle = dense_attention(*exact, segments.cu_q, segments.cu_k)
    torch.testing.assert_close(out.float(), oracle, atol=2e-2, rtol=2e-2)  # bf16 has 8 bits
    if out.requires_grad:
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
        expected = torch.autograd.grad(oracle.square().sum(), exact)
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad.float(), other, atol=6e-2, rtol=6e-2)
