"""The plans of a run: of the snapshot of clips that it began with, and of held-out clips.

Takes what opens manifests and counts text tokens as functions: where clips lie and what encodes
captions is left to the caller.

Invariant: a run's plan is of the snapshot that the run pinned, however the data grows.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from framework.data.manifest.table import Manifest
from framework.data.plan.planner import check_choice, make_epoch
from framework.data.plan.recipe import Recipe
from framework.data.plan.store import Plan
from framework.storage import Store

_PIN = "manifest.json"  # in the run's folder


@dataclass(frozen=True)
class RunPlanner:
    """Makes plans by one recipe."""

    open_manifest: Callable[[str | None], Manifest]  # by fingerprint; None: the one of now
    recipe: Recipe
    num_text_tokens: Callable[[str], int]  # of a caption, as `make_epoch` wants it
    text_fingerprint: str

    def check(self) -> None:
        """ValueError where there is no manifest, or it lacks what the recipe asks for."""
        check_choice(self.open_manifest(None), self.recipe)

    def pinned_manifest(self, run: Store) -> Manifest:
        """The snapshot that the run in folder `run` began with: data that grew is for others."""
        if run.exists(_PIN):
            return self.open_manifest(_pinned(run))
        manifest = self.open_manifest(None)
        run.write(_PIN, json.dumps({"fingerprint": manifest.fingerprint}).encode())
        return manifest

    def make(self, run: Store, steps: int, say: Callable[[str], None]) -> Plan:
        """Make epochs of the plan until `steps` steps, 1 or more, are planned.

        What is committed is kept. Says what the first epoch is like.
        """
        assert steps > 0, steps
        manifest = self.pinned_manifest(run)
        plan = self._epoch(manifest, self.recipe, run, 0)
        say(str(plan.summary(0)))
        planned, epoch = plan.num_steps(0), 1
        while planned < steps:
            planned += self._epoch(manifest, self.recipe, run, epoch).num_steps(epoch)
            epoch += 1
        return plan

    def heldout(self, store: Store) -> Plan:
        """One epoch of the held-out clips of now: no caption and no token is dropped."""
        recipe = replace(self.recipe, drop_caption=0.0, keep=((0, 1.0),))
        return self._epoch(self.open_manifest(None), recipe, store, 0, "heldout")

    def _epoch(
        self, manifest: Manifest, recipe: Recipe, store: Store, epoch: int, split: str = "train"
    ) -> Plan:
        return make_epoch(
            manifest, recipe, store, epoch, self.num_text_tokens, self.text_fingerprint, split
        )


def _pinned(run: Store) -> str:
    try:
        return str(json.loads(run.read(_PIN))["fingerprint"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{run.url}/{_PIN} names no fingerprint of a manifest") from error
