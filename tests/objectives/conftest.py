"""The packs of the diffusion tests."""

from tests.diffusion.conftest import make_pack

__all__ = ["make_pack"]
