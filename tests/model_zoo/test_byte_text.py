import pytest

from model_zoo.text.byte import BEGIN, FIRST_BYTE, PAD, ByteText, ByteTextConfig


def decode(ids: list[int]) -> str:
    return bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE).decode()


@pytest.mark.parametrize("caption", ["", "a red circle", "ein grüner Kreis", "赤い丸", "x" * 46])
def test_there_and_back(caption):
    ids = ByteTextConfig().build().encode(caption).tolist()
    assert ids[0] == BEGIN
    assert decode(ids) == caption
    assert ids[1 + len(caption.encode()) :] == [PAD] * (47 - len(caption.encode()))


@pytest.mark.parametrize("caption", ["", "a", "x" * 15, "x" * 16, "é" * 40, "🎈" * 40, "x" * 999])
@pytest.mark.parametrize(("max_tokens", "multiple_of"), [(48, 48), (64, 16), (50, 1), (1, 1)])
def test_lengths(caption, max_tokens, multiple_of):
    text = ByteTextConfig(max_tokens, multiple_of)
    ids = text.build().encode(caption)
    assert len(ids) == text.num_tokens(caption)
    assert 1 <= len(ids) <= max_tokens
    assert len(ids) % multiple_of == 0
    assert 0 <= ids.min() <= ids.max() < text.vocab_size
    assert caption.startswith(decode(ids.tolist()))  # cut between characters, never within one


def test_the_longest_caption_fills_all_tokens():
    ids = ByteTextConfig(8, 8).build().encode("abcdefghij").tolist()
    assert decode(ids) == "abcdefg"


def test_half_a_surrogate_pair_does_not_stop_a_run():
    assert decode(ByteText(ByteTextConfig()).encode("a\ud83db").tolist()) == "a?b"


def test_fingerprint_names_what_matters():
    prints = {ByteTextConfig(*c).fingerprint for c in ((48, 48), (96, 48), (48, 24))}
    assert len(prints) == 3


@pytest.mark.parametrize(("max_tokens", "multiple_of"), [(50, 48), (0, 1), (48, 0), (24, 48)])
def test_impossible_lengths_are_refused(max_tokens, multiple_of):
    with pytest.raises(ValueError, match="must be"):
        ByteTextConfig(max_tokens, multiple_of)
