"""A committed checkpoint to safetensors in diffusers' layout, with a model card.

python -m framework.export run.name=mine [checkpoint=latest] [weights=ema] [export.to=s3://…]

The checkpoint itself says which model it is of: the overrides of training are not needed.
"""

import json
import math
from collections.abc import Sequence

from framework.config import RunConfig, entry, group_from_flat
from framework.evaluate.evaluate import evaluation_file
from framework.export.card import Facts
from framework.export.folder import export
from framework.run.checkpoint import Checkpoint, find_checkpoint
from framework.run.identity import run_store
from framework.run.ledger import segment_loss
from framework.storage import Store
from framework.terminal import Terminal
from model_zoo.folder import Network, folder_format
from model_zoo.protocols import CodecConfig, ModelConfig, TextConfig


def main(config: RunConfig) -> None:
    """Export and say where it lies, and who can load it."""
    chosen, terminal = config.export, Terminal()
    found = find_checkpoint(run_store(config.run).child("checkpoints"), chosen.checkpoint)
    network, run = network_of(found, config.packages), _run_of(found)
    ending = "-weights" if chosen.weights == "weights" else ""
    if chosen.to is not None:
        to = Store(chosen.to)
    elif run is not None:
        to = run.child("export", f"step-{found.step:08d}{ending}")
    else:
        raise ValueError(f"{found.store.url} lies apart from its run; give export.to=FOLDER")
    facts = _facts(found, run, network, chosen.weights, chosen.licence)
    layout = folder_format(network)
    terminal.say(f"exporting {chosen.weights} of {found.store.url}")
    loads = "as diffusers loads it" if layout.wan else f"in our own layout ({layout.why_not_wan})"
    terminal.say(f"  {loads}")
    max_bytes = math.ceil(chosen.max_shard_gb * 1e9)
    export(found, network, facts, to, max_bytes, lambda text: terminal.say(f"  {text}"))
    terminal.say(f"exported: {to.url}")


def network_of(checkpoint: Checkpoint, packages: Sequence[str] = ()) -> Network:
    """The model that a checkpoint was trained with; ValueError where it does not say, or where its
    config is of another version of the code."""
    flat = checkpoint.meta.get("config")
    if not flat:
        raise ValueError(f"{checkpoint.store.url}: its meta.json has no config of a run")
    model: ModelConfig = group_from_flat(flat, "model", packages)
    codec: CodecConfig = group_from_flat(flat, "codec", packages)
    text: TextConfig = group_from_flat(flat, "text", packages)
    return Network(model, codec.channels, text.vocab_size, text.dim)


def _run_of(checkpoint: Checkpoint) -> Store | None:
    """The run's folder, where the checkpoint still lies in it."""
    run, _, rest = checkpoint.store.url.rpartition("/checkpoints/")
    return Store(run) if run and "/" not in rest else None


def _facts(
    checkpoint: Checkpoint, run: Store | None, network: Network, weights: str, licence: str
) -> Facts:
    meta, step = checkpoint.meta, checkpoint.step
    fingerprint = None
    metrics: dict[str, float] = {}
    metrics_of = ""
    if run is not None:
        if run.exists("manifest.json"):
            fingerprint = json.loads(run.read("manifest.json"))["fingerprint"]
        if run.exists(file := evaluation_file(step, weights)):
            metrics = json.loads(run.read(file))["metrics"]
            metrics_of = f"On held-out clips, as `{file}` in the run's folder has it:"
        elif segment := segment_loss(run, step):
            metrics = {"train/loss": segment[1]}
            metrics_of = f"Not evaluated; mean over the last {segment[0]} steps of training:"
    return Facts(
        run=str(meta["config"].get("run.name")),
        step=step,
        weights=weights,
        num_parameters=network.num_parameters(),
        config=meta["config"],
        plan_digest=meta.get("plan_digest"),
        manifest_fingerprint=fingerprint,
        code_version=meta.get("code_version"),
        metrics=metrics,
        metrics_of=metrics_of,
        licence=licence,
    )


if __name__ == "__main__":
    entry(main, section="export")
