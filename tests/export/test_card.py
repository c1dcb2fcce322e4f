"""The model card: whatever names a run brings, they stay where they are written."""

import re
from dataclasses import replace

from framework.export.card import Facts, card
from model_zoo.folder import Network, folder_format
from model_zoo.models.dit import DiTConfig

EVIL = "a\x1b[2J\n\n# b\n```\n<script>x</script> | [c](http://d) `e` \u202e"
FACTS = Facts("small", 8, "ema", 9, {}, "5ec0", "abc1", "0.1", {"eval/loss": 0.5}, "of", "CC")


def card_of(facts: Facts) -> str:
    model = DiTConfig(hidden_size=24, ffn=40, num_heads=2, depth=1)
    return card(facts, folder_format(Network(model, 3, None, 10)))


def test_names_break_out_of_nothing() -> None:
    config = {
        "run.name": EVIL,
        f"data.sources.{EVIL}": 1.0,
        "data.where": EVIL,
        "model.kind": EVIL,
        "choices.model": EVIL,
        "train.````": "````",
    }
    facts = replace(
        FACTS,
        run=EVIL,
        config=config,
        plan_digest=EVIL,
        manifest_fingerprint=EVIL,
        code_version=EVIL,
        licence=EVIL,
        metrics={EVIL: 1.0},
    )
    text = card_of(facts)
    assert not set(text) & set("\x1b\r\u202e")
    lines, fence = text.splitlines(), "`````"  # longer than what the config has
    start, end = lines.index(f"{fence}yaml"), lines.index(fence)
    assert len(lines[start + 1 : end]) == len(config) - 1  # all but the choices
    outside = [*lines[:start], *lines[end + 1 :]]
    heads = [line for line in card_of(FACTS).splitlines() if line.startswith("#")]
    assert [line for line in outside if line.startswith("#")][1:] == heads[1:]
    rows = [line.replace(r"\|", "") for line in outside if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3}
    # As code between marks that are longer than any in it, or without a mark of HTML.
    for line in outside:
        assert "<script>" not in re.sub(r"(?<!`)`` .*? ``(?!`)|(?<!`)```` .*? ````(?!`)", "", line)
        assert "[c](" not in re.sub(r"(?<!`)```` .*? ````(?!`)", "", line)


def test_ordinary_names_stay_as_they_are() -> None:
    text = card_of(replace(FACTS, config={"model.hidden_size": 32, "choices.model": "dit_s"}))
    assert text.startswith("# small, step 8\n")
    assert "| eval/loss | 0.5000 |" in text
    assert "\n```yaml\nmodel.hidden_size: 32\n```\n" in text
    assert "`dit_s`" in text
