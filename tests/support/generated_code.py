"""What generated CUDA code costs: its kernels, the bytes that they move, and the buffers that they allocate."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, NamedTuple

BATCH = 512  # of the inputs, by which activations are told from parameters


class Cost(NamedTuple):
    kernels: int
    """Of Triton."""
    library_calls: int
    """Of cuDNN and cuBLAS; the backward pass of a convolution is one."""
    mb_per_image: float
    """Read and written, 1e6 bytes: each buffer once per kernel, or the part of it that the kernel reads."""
    planes: list[str]
    """Activations in memory that are not in channels-last order: their shape and strides."""
    atomic_additions: int
    """In Triton's kernels; their order, and so their rounding, may differ from run to run."""
    cubins: int
    """Different kernels that Triton compiled for compute capability 9.0."""
    large_float32: int
    """Activations in memory, in float32, of 16 MB or more."""


def cost_of(scheduler: Any, text: str, cubins: int) -> Cost:
    counts: Counter[str] = Counter()
    total = 0
    for node in scheduler.nodes:
        accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        library = "Extern" in type(node).__name__
        if not library:
            # Inductor's count has the whole of each buffer, also where a kernel reads some of its channels.
            parts: Counter[str] = Counter()
            for dependency in (*node.read_writes.reads, *node.read_writes.writes):
                parts[dependency.name] += dependency.numbytes_hint()
            accesses = {name: min(size, parts[name] or size) for name, size in accesses.items()}
        total += sum(accesses.values())
        counts["library" if library else "kernels"] += bool(accesses)
    megabytes, atomic = round(total / BATCH / 1e6, 3), text.count("tl.atomic_add(")
    return Cost(counts["kernels"], counts["library"], megabytes, planes(text), atomic, cubins, large_float32(text))


def planes(text: str) -> list[str]:
    """Shapes and strides of the activations, (N, C, H, W) or (N, H, W, C), whose channels are not innermost.

    Where C, H and W are equal it is not known which of them is innermost. Such a buffer counts, too.

    Raises:
        AssertionError: `text` has activations in another form than is looked for.
    """
    allocated = re.findall(rf"empty_strided_cuda\(\(({BATCH}, \d+, \d+, \d+)\), \((\d+, \d+, \d+, \d+)\)", text)
    assert allocated or "convolution" not in text
    found = []
    for shape, stride in allocated:
        (_, a, b, c), (_, first, _, last) = (tuple(map(int, words.split(", "))) for words in (shape, stride))
        is_nhwc = a == b != c and last == 1
        if min(a, b, c) > 1 and first != 1 and not is_nhwc:
            found.append(f"{shape}: {stride}")
    return found


def large_float32(text: str) -> int:
    allocated = re.findall(rf"empty_strided_cuda\(\(({BATCH}(?:, \d+)+)\), \([^)]*\), torch\.float32\)", text)
    return sum(4 * math.prod(map(int, shape.split(", "))) >= 16e6 for shape in allocated)
