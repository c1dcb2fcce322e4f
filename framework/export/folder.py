"""An export as a whole: which folder it may take, what is written, and when it counts.

    UNFINISHED                                  as long as it is written
    README.md                                   the model card
    diffusion_pytorch_model.safetensors         or -00001-of-00003 and so on, with an index
    config.json                                 last: a folder without it is no model

Invariant: nobody's files are overwritten but those of an export that was not finished.
"""

import json
from collections.abc import Callable

from framework.export.card import Facts, card
from framework.export.weights import write_weights
from framework.run.checkpoint import Checkpoint, check_weights
from framework.storage import Store
from model_zoo.convert import WEIGHTS
from model_zoo.folder import Network, folder_format

CARD = "README.md"
CONFIG = "config.json"
UNFINISHED = "UNFINISHED"


def check_free(to: Store) -> None:
    """ValueError where the folder holds anything but the beginning of an export."""
    if not to.exists(UNFINISHED) and (there := to.list()):
        if to.exists(CONFIG):
            raise ValueError(
                f"{to.url} holds a whole export already; delete it, or choose another folder by "
                "export.to"
            )
        raise ValueError(
            f"{to.url} is not empty, it holds {there[0]}"
            + (f" and {len(there) - 1} more" if len(there) > 1 else "")
            + "; choose another folder by export.to, or delete it"
        )


def export(
    checkpoint: Checkpoint,
    network: Network,
    facts: Facts,
    to: Store,
    max_bytes: int,
    say: Callable[[str], None],
) -> None:
    """Write the model of a checkpoint to `to`; a beginning of it that is there is done again.

    facts: for the card; `facts.weights` are written. max_bytes: of one file. ValueError where the
    folder holds something else, or network and checkpoint differ, or the checkpoint was altered.
    """
    check_free(to)
    check_weights(checkpoint, facts.weights)
    layout = folder_format(network)
    to.write(UNFINISHED, b"an export that has not come to its end; run it again\n")
    ours = (CONFIG, CARD, WEIGHTS.partition(".")[0])
    for name in sorted(to.list(), key=lambda name: name != CONFIG):  # config.json first
        if name.startswith(ours):
            to.delete(name)
    write_weights(checkpoint, network, layout, facts.weights, to, max_bytes, say)
    to.write(CARD, card(facts, layout).encode())
    to.write(CONFIG, (json.dumps(layout.config, indent=2) + "\n").encode())
    to.delete(UNFINISHED)
