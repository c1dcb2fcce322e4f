"""A trained model from a committed checkpoint: what sampling and evaluation begin with."""

import torch

from framework.assembly import Assembly
from framework.run.checkpoint import Checkpoint, find_checkpoint, load_weights
from framework.run.identity import Identity
from framework.storage import Store
from model_zoo.checkpointing import PackedModel


def load_trained(
    assembly: Assembly, run: Store, checkpoint: str, weights: str
) -> tuple[PackedModel, int]:
    """The model in eval mode, on the GPU where there is one, and its step.

    run: the run's folder. checkpoint: "latest", "init" (before training), a step, or the URL of a
    checkpoint. weights: "ema" or "weights". ValueError where there is no such committed checkpoint,
    or where it was trained with another model, codec, text encoder or objective.
    """
    model, step = assembly.build_model().eval(), 0
    if checkpoint != "init":
        found = find_checkpoint(run.child("checkpoints"), checkpoint)
        _check_meant_for(found, assembly.network())
        load_weights(found, model, weights)
        step = found.step
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), step


def _check_meant_for(checkpoint: Checkpoint, network: Identity) -> None:
    """Shapes alone would let other heads, frequencies or text lengths pass, and give noise."""
    trained = Identity(checkpoint.meta.get("config", {})).part(
        "model", "codec", "text", "objective"
    )
    differing = network.differences(trained.values)
    if trained.values and differing:
        raise ValueError(
            f"{checkpoint.store.url} was trained with another config:\n  "
            + "\n  ".join(differing)
            + "\ngive experiment=… or the same overrides as in training"
        )
