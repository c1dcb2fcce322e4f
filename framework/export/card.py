"""The model card of an export: README.md, what a reader of the weights wants to know of them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from framework.printable import printable
from model_zoo.folder import FolderFormat

# What the run is; where it ran and who watched is nobody else's business.
_SECTIONS = ("run", "model", "codec", "text", "objective", "optimizer", "engine", "data", "train")
_NOT_KNOWN = "not known: the checkpoint lies apart from its run"


@dataclass(frozen=True)
class Facts:
    """Where weights come from; None where it is not known."""

    run: str
    step: int
    weights: str  # "ema" or "weights"
    num_parameters: int
    config: Mapping[str, Any]  # flat
    plan_digest: str | None
    manifest_fingerprint: str | None
    code_version: str | None
    metrics: Mapping[str, float]  # of this very checkpoint
    metrics_of: str  # what they were measured on
    licence: str


def card(facts: Facts, layout: FolderFormat) -> str:
    """The card in Markdown."""
    kind = layout.config["_class_name"]
    averaged = "moving average (EMA) of the weights" if facts.weights == "ema" else "weights"
    rows = {
        "Model": f"{kind}, {facts.num_parameters:,} parameters, float32",
        "Network": f"{_code(facts.config.get('choices.model'))}, "
        f"of the kind {_code(facts.config.get('model.kind'))}",
        "Weights": f"{averaged} after {facts.step:,} steps",
        "Data": f"manifest {_code(facts.manifest_fingerprint or _NOT_KNOWN)}, "
        f"plan {_code(facts.plan_digest or _NOT_KNOWN)}",
        "Code": f"Longtake {_words(facts.code_version or _NOT_KNOWN)}",
        "Licence": _words(facts.licence),
    }
    parts = [
        f"# {_words(facts.run)}, step {facts.step:,}",
        "A video diffusion transformer, trained with Longtake.",
        _table(("", ""), rows),
        f"## Metrics\n\n{_metrics(facts)}",
        f"## How to load it\n\n{_how_to_load(layout)}",
        f"## Config of the run\n\n<details>\n\n{_fenced(_yaml(facts.config))}\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


def _metrics(facts: Facts) -> str:
    if not facts.metrics:
        return "None: it was not evaluated, and the ledger of its training is not at hand."
    rows = {_words(name): f"{value:.4f}" for name, value in sorted(facts.metrics.items())}
    return f"{facts.metrics_of}\n\n{_table(('metric', 'value'), rows)}"


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _words(text: object) -> str:
    """Any text as words in one line: no mark of Markdown or HTML in it counts."""
    plain = re.sub(r"([\\`*\[\]~!#])", r"\\\1", printable(text))
    return plain.replace("&", "&amp;").replace("<", "&lt;")


def _code(text: object) -> str:
    """Any text as code in one line; no text may end the code within it."""
    plain = printable(text)
    marks = "`" * (_longest_run(plain) + 1)
    space = " " if "`" in plain else ""
    return f"{marks}{space}{plain}{space}{marks}"


def _fenced(yaml: str) -> str:
    """A block of code that none of its lines ends."""
    fence = "`" * max(3, _longest_run(yaml) + 1)
    return f"{fence}yaml\n{yaml}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _how_to_load(layout: FolderFormat) -> str:
    if layout.wan is not None:
        return (
            "```python\n"
            "from diffusers import WanTransformer3DModel\n\n"
            'model = WanTransformer3DModel.from_pretrained("this/folder")\n'
            "```\n\n"
            "It wants the packages diffusers and accelerate. `timestep` is 1000 t, where t = 0 is "
            "data and t = 1 is noise; text comes without padding. Latents and text embeddings are "
            "those of `codec` and `text` below."
        )
    return (
        "```python\n"
        "from pathlib import Path\n\n"
        "from model_zoo.folder import load_model\n\n"
        f"{_load_call(layout)}\n"
        "```\n\n"
        f"diffusers does not load it ({layout.why_not_wan}). Latents and text are those of `codec` "
        "and `text` below; t = 0 is data and t = 1 is noise."
    )


def _load_call(layout: FolderFormat) -> str:
    if layout.is_of_the_zoo:
        return 'model = load_model(Path("this/folder"))'
    name = layout.config["_class_name"]
    return (
        f"# {name}Config comes from the package that the model was trained with.\n"
        f'model = load_model(Path("this/folder"), {{"{name}": {name}Config}})'
    )


def _yaml(config: Mapping[str, Any]) -> str:
    """A line a key, as an override has it; JSON is YAML."""
    kept = {key: value for key, value in config.items() if key.split(".")[0] in _SECTIONS}
    return "\n".join(f"{_key(key)}: {json.dumps(kept[key])}" for key in sorted(kept))


def _key(key: str) -> str:
    """Quoted where it is more than names and dots, such as a pattern or a source's name."""
    return key if re.fullmatch(r"[\w.\-]+", key, re.ASCII) else json.dumps(key)
