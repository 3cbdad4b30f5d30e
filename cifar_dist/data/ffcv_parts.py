"""The parts of FFCV that are used, with three changes.

- Importing FFCV compiles a typed dictionary for a table of two constants (3 s). Only Python code reads that table, so a
  plain dictionary takes its place.
- Importing it sets torch to one thread, which is undone.
- Each `Loader` compiles the same function that finds a sample's bytes (0.25 s). It is compiled once here, and numba
  keeps the machine code on disk where it can.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numba
import numba.typed
import numpy as np
import torch

_threads, _typed_dictionary = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
try:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.reader import Reader
    from ffcv.transforms import ToDevice, ToTensor, ToTorchImage
finally:
    numba.typed.Dict = _typed_dictionary
    torch.set_num_threads(_threads)

__all__ = [
    "EpochIterator", "IntDecoder", "Loader", "OSCacheManager", "Reader", "SimpleRGBImageDecoder", "ToDevice",
    "ToTensor", "ToTorchImage",
]  # fmt: skip


def _find_bytes(address: Any, file: Any) -> Any:
    """The bytes that were allocated at `address`; file: its bytes, the addresses in order, their sizes."""
    size = file[2][np.searchsorted(file[1], address)]
    return file[0][address : address + size]


@cache
def _compiled() -> Any:
    signature = numba.uint8[::1](numba.uint64, OSCacheManager.state_type.fget(None))
    options = {"fastmath": True, "nogil": True, "error_model": "numpy"}  # as ffcv.pipeline.compiler
    try:
        processor = repr(numba.core.registry.cpu_target.target_context.codegen().magic_tuple())
        # Part of the file's name: machines of two kinds that share a folder never read each other's code.
        _find_bytes.__qualname__ = f"find_bytes_{hashlib.sha256(processor.encode()).hexdigest()[:12]}"
        return numba.njit(signature, cache=True, **options)(_find_bytes)
    except Exception:  # noqa: BLE001 - without a usable cache it is compiled in each process
        return numba.njit(signature, **options)(_find_bytes)


OSCacheManager.compile_reader = lambda _: _compiled()
