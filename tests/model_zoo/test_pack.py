import torch

from model_zoo.pack import join_pack, text_segment_ids

GRIDS, TEXT = [(2, 1, 3), (0, 0, 0), (1, 2, 2), (1, 1, 1)], [2, 3, 0, 4]


def test_the_joint_sequence_equals_a_naive_loop(make_pack) -> None:
    pack = make_pack(GRIDS, TEXT, 1, text_dim=1, padding=(2, 1))
    text_ids = text_segment_ids(pack, pack.text.shape[0])
    joint, (_, text_segments) = join_pack(
        (pack.cu_seqlens, pack.cu_text), (pack.segment_ids, text_ids), "sdpa"
    )
    pieces, lengths = [], [0]
    for b in range(pack.num_segments):
        pieces.append(pack.tokens[pack.cu_seqlens[b] : pack.cu_seqlens[b + 1]])
        pieces.append(pack.text[pack.cu_text[b] : pack.cu_text[b + 1]])
        lengths.append(len(pieces[-2]) + len(pieces[-1]))
    assert torch.equal(joint.join(pack.tokens, pack.text), torch.cat(pieces))
    ends = torch.tensor(lengths).cumsum(0)
    assert torch.equal(joint.segments.cu_q.long(), ends)
    assert torch.equal(joint.segments.cu_k.long(), ends)
    assert torch.equal(text_segments.cu_q, pack.cu_text)
    video, text = joint.split(torch.cat(pieces))
    assert torch.equal(video, pack.tokens)
    assert torch.equal(text, pack.text)
