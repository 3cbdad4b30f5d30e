"""Python functions as machine code, by numba, and numbers of bfloat16 in them, which numba does not know."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.extending import overload


def compiled(function: Callable[..., Any], signature: Any, fastmath: bool = False) -> Any:
    """`function` for arguments of the types in `signature`; kept on disk where numba can write there.

    A division by zero gives infinity, as in numpy.
    """
    options = {"fastmath": fastmath, "nogil": True, "error_model": "numpy"}
    try:
        # Part of the cached files' names. The processor, so that different machines with one shared folder do not read
        # each other's; the types, as numba may lose one of two that are compiled at once; all the code, as it looks at
        # the function's own file alone.
        processor = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()
        sources = [Path(path).read_bytes() for path in (__file__, inspect.getfile(function))]
        digest = hashlib.sha256(repr((processor, signature, sources)).encode()).hexdigest()
        function.__qualname__ = f"{function.__name__.strip('_')}_{digest[:12]}"
        return numba.njit(signature, cache=True, **options)(function)
    except Exception:  # noqa: BLE001 - whatever is wrong with the cache
        return numba.njit(signature, **options)(function)


def to_float(bits: Any) -> Any:
    """In compiled code: the number with these bits, int16 of bfloat16 or int32 of float32, as float32."""


def to_bits(value: Any, like: Any) -> Any:
    """In compiled code: the bits of the float32 `value`, rounded if the array `like` holds those of bfloat16.

    To the nearest, on a tie to the even one.
    """


@overload(to_float, inline="always")  # type: ignore[untyped-decorator]
def _implement_to_float(bits: Any) -> Any:
    def of_float32(bits: Any) -> Any:
        return np.int32(bits).view(np.float32)

    def of_bfloat16(bits: Any) -> Any:
        return np.int32(np.int32(bits) << np.int32(16)).view(np.float32)

    return of_float32 if bits.bitwidth == 32 else of_bfloat16


@overload(to_bits, inline="always")  # type: ignore[untyped-decorator]
def _implement_to_bits(value: Any, like: Any) -> Any:  # noqa: ARG001
    def of_float32(value: Any, like: Any) -> Any:  # noqa: ARG001
        return np.float32(value).view(np.int32)

    def of_bfloat16(value: Any, like: Any) -> Any:  # noqa: ARG001
        bits = np.float32(value).view(np.int32)
        rounded = np.int32(bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
        return rounded if value == value else np.int32(0x7FC0)  # rounding may make NaN a number

    return of_float32 if like.dtype.bitwidth == 32 else of_bfloat16
