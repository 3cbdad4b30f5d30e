"""The parts of FFCV that are used, imported without two things that importing it does.

It sets torch to one thread. And numba compiles a typed dictionary for a table of two constants, which takes 3 s in
every process; only Python code reads that table, so a plain dictionary serves.
"""

from __future__ import annotations

import numba.typed
import torch

_threads, _typed_dictionary = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
try:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.transforms import ToDevice, ToTensor, ToTorchImage
finally:
    numba.typed.Dict = _typed_dictionary
    torch.set_num_threads(_threads)

__all__ = ["EpochIterator", "IntDecoder", "Loader", "SimpleRGBImageDecoder", "ToDevice", "ToTensor", "ToTorchImage"]
