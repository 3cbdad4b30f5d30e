"""Integer hashing: every random number of a run is a function of the seed and of its purpose.

`mix64` is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
2014). With a stateful generator, the numbers of a sample would depend on earlier draws and on the rank.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix64(x: Any) -> Any:
    """Bijective mix of 64-bit numbers: a Python int, or an array of uint64 element by element."""
    x = (x ^ (x >> 30)) * _M1 & MASK64
    x = (x ^ (x >> 27)) * _M2 & MASK64
    return x ^ (x >> 31)


def derive(seed: int, *parts: int | str) -> int:
    """A 64-bit number for one purpose, e.g. `derive(seed, "order", epoch)`. Unlike sums of seed and epoch, numbers for
    different purposes do not coincide."""
    value = mix64((seed + _GOLDEN) & MASK64)
    for part in parts:
        for number in _words(part) if isinstance(part, str) else [part]:
            value = mix64((value ^ mix64((number + _GOLDEN) & MASK64)) + _GOLDEN & MASK64)
    return int(value)


def _words(text: str) -> list[int]:
    data = text.encode()
    return [int.from_bytes(data[start : start + 8], "little") for start in range(0, len(data), 8)]


def hash_indices(indices: npt.NDArray[np.int64], key: int) -> npt.NDArray[np.uint64]:
    """One 64-bit hash per index, shape (N,), for the purpose behind `key` (from `derive`)."""
    keyed = indices.astype(np.uint64) * np.uint64(_GOLDEN) ^ np.uint64(key)
    hashed: npt.NDArray[np.uint64] = mix64(keyed)
    return hashed
