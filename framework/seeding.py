"""Every random number of a run, as a pure function of (seed, epoch, clip, purpose).

Randomness belongs to the clip, not to the process that happens to draw it: neither the rank, nor
the device, nor the order of work, nor a library version moves a draw. Bits come from Philox4x64-10,
a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose
raw stream numpy guarantees; uniforms and normals are made from those bits here, since numpy does
not guarantee its distributions across versions.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

_MASK = (1 << 64) - 1
# Constants of splitmix64 (Steele, Lea and Flood 2014).
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * _MIX1 & _MASK
    x = (x ^ (x >> 27)) * _MIX2 & _MASK
    return x ^ (x >> 31)


def _as_int(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
    return int(part) & _MASK


def hash64(*parts: int | str) -> int:
    """Hash a sequence of integers and strings to one unsigned 64-bit integer; stable for ever."""
    state = 0
    for part in parts:
        state = _mix((state + _GAMMA + _as_int(part)) & _MASK)
    return state


def hash64_array(key: int, ids: np.ndarray) -> np.ndarray:
    """`hash64(key, id)` chained from state `key` for every id; (n,) integers -> (n,) uint64.

    Used as a sort key: `np.argsort(hash64_array(hash64(seed, "order", epoch), ids), kind="stable")`
    is a shuffle that depends on nothing but its arguments.
    """
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) + np.uint64((key + _GAMMA) & _MASK)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
        return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one purpose; each call starts the stream anew, so calls commute."""

    key: int

    def _raw(self, count: int) -> np.ndarray:
        # A key of two words: the second keeps our streams apart from other users of Philox.
        bits = np.random.Philox(key=np.array([self.key, _GAMMA], dtype=np.uint64))
        return bits.random_raw(count)

    def uniform(self, count: int) -> np.ndarray:
        """(count,) float64 in [0, 1) with 53 random bits each."""
        return (self._raw(count) >> np.uint64(11)) * 2.0**-53

    def integer(self, low: int, high: int) -> int:
        """One integer in [low, high)."""
        if high <= low:
            raise ValueError(f"low={low} must be below high={high}")
        return low + int(self._raw(1)[0]) % (high - low)

    def normal(self, count: int) -> np.ndarray:
        """(count,) float32 standard normals by Box-Muller, two from each 64-bit word."""
        raw = self._raw((count + 1) // 2)
        # Both halves are offset by one half, so that the logarithm's argument is never zero.
        u1 = ((raw >> np.uint64(32)).astype(np.float32) + 0.5) * np.float32(2.0**-32)
        u2 = ((raw & np.uint64(0xFFFFFFFF)).astype(np.float32) + 0.5) * np.float32(2.0**-32)
        # float32 rounds the largest halves up to 1, where the radius would still be a number (0).
        radius = np.sqrt(-2.0 * np.log(np.minimum(u1, np.float32(1.0))))
        angle = np.float32(2.0 * np.pi) * u2
        both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return both.reshape(-1)[:count].astype(np.float32, copy=False)


def draws(seed: int, epoch: int, clip_id: int, purpose: str) -> Draws:
    """The random numbers of `purpose` ("noise", "timestep", …) for one clip of one epoch."""
    return Draws(hash64(seed, epoch, clip_id, purpose))
