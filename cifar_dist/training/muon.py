"""Muon for convolution filters (Keller Jordan, kellerjordan.github.io/posts/muon, 2024; arXiv 2502.16982), with SGD.

torch.optim.Muon is not used. It iterates in bfloat16, accepts matrices only, and does not keep the filters at one norm.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_dist.training.flat_network import Format, flatten, parts

# Of the quintic polynomial that drives singular values towards 1 fastest (Jordan, 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS = 5


def stack_limit(device_type: str) -> int | None:
    """How many stacks of matrices there are at most. None: one for each shape, as on a CPU.

    On a GPU starting an operation takes longer than computing it.
    """
    return 6 if device_type == "cuda" else None


class MuonSGD(torch.optim.SGD):
    """Fused SGD whose group with `muon_momentum` set is stepped by Muon instead.

    Muon replaces the gradient of a filter bank (O, I, H, W), flattened to (O, I * H * W) and averaged with Nesterov
    momentum, by the nearest matrix with orthonormal rows or columns. Before each update a filter bank is scaled to the
    norm sqrt(O). The batch norm behind it cancels its scale, so the learning rate is the relative change per step.

    Args:
        dtype: number format of Muon's iterations.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        self._dtype = dtype
        filters = self._muon_group["params"]
        self.layout = Layout(filters, stack_limit(filters[0].device.type))
        # Makes GradScaler unscale and check the gradients before `step`, so that infinities do not reach the momentum.
        # In fp16 it therefore waits for the device at every step.
        self._step_supports_amp_scaling = False

    @property
    def _muon_group(self) -> dict[str, Any]:
        return next(group for group in self.param_groups if "muon_momentum" in group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self._orthogonalize(self._muon_group, self.layout)
        return super().step(closure)

    def _orthogonalize(self, group: dict[str, Any], layout: "Layout") -> None:
        """Write Muon's updates into the gradients, and bring the filters to their norm."""
        filters, momentum = group["params"], group["muon_momentum"]
        gradients = [p.grad for p in filters]
        buffers = [self.state[p]["momentum_buffer"] for p in filters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        averages = torch._foreach_mul(buffers, momentum)
        torch._foreach_add_(averages, gradients)
        # The largest singular value of a matrix of norm 1 is at most 1.
        units = flatten(averages) / _norms(averages).clamp_min_(1e-7).index_select(0, layout.owners)
        matrices = layout.stacked(units.to(self._dtype))
        updates = layout.unstacked([orthogonalized(stack) for stack in matrices]).to(units.dtype)
        torch._foreach_copy_(gradients, parts(updates, [Format.of(average) for average in averages]))
        torch._foreach_mul_(gradients, layout.update_scales)
        scaled = flatten(filters) * (layout.filter_norms / _norms(filters)).index_select(0, layout.owners)
        torch._foreach_copy_(filters, parts(scaled, [Format.of(p) for p in filters]))


class Layout:
    """Where the elements of filter banks are: in a flat tensor, one bank after the other, and in stacks of matrices.

    In a stack matrices have no more rows than columns, and are padded with zeros to one size. Zeros change no norm and
    stay zeros in an orthogonalization. All tensors of indices have elements of int32.

    Attributes:
        owners: number of the filter bank of each element, (E,).
        filter_norms: sqrt(O) of each filter bank, (F,).
        update_scales: what brings an orthogonalized (O, I * H * W) matrix to the norm sqrt(O), for each filter bank.
    """

    def __init__(self, filters: Sequence[Tensor], most_stacks: int | None = None) -> None:
        shapes = [torch.Size((len(p), p[0].numel())) for p in filters]
        sizes = torch.tensor([shape.numel() for shape in shapes])
        num_elements = int(sizes.sum())
        most_rows = max(min(shape) for shape in shapes)
        members = defaultdict[Any, list[Tensor]](list)
        for matrix in parts(torch.arange(num_elements), [Format(shape, False) for shape in shapes]):
            wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
            stack = wide.shape if most_stacks is None else math.ceil(most_stacks * len(wide) / most_rows)
            members[stack].append(wide)
        stacks = [_padded(matrices, num_elements) for matrices in members.values()]
        into = flatten(stacks)
        out = torch.empty(num_elements + 1, dtype=torch.int64).scatter_(0, into, torch.arange(len(into)))[:-1]
        owners = torch.arange(len(filters)).repeat_interleave(sizes)
        device = filters[0].device
        self._formats = [Format.of(stack) for stack in stacks]
        self._into, self._out, self.owners = (x.to(device, torch.int32) for x in (into, out, owners))
        self.filter_norms = torch.tensor([rows**0.5 for rows, _ in shapes], dtype=filters[0].dtype, device=device)
        self.update_scales = [max(1.0, rows / columns) ** 0.5 for rows, columns in shapes]

    def stacked(self, flat: Tensor) -> list[Tensor]:
        """The elements `flat` (E,) as stacks of matrices."""
        return parts(F.pad(flat, (0, 1)).index_select(0, self._into), self._formats)

    def unstacked(self, stacks: Sequence[Tensor]) -> Tensor:
        """The elements of stacks, (E,)."""
        return flatten(stacks).index_select(0, self._out)


def _padded(matrices: Sequence[Tensor], value: int) -> Tensor:
    """`matrices` (r, c) of any size in one tensor (N, R, C), filled up with `value`."""
    rows, columns = (max(matrix.shape[dim] for matrix in matrices) for dim in (0, 1))
    return torch.stack([
        F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]), value=value) for matrix in matrices
    ])  # fmt: skip


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values come out between 0.7 and 1.2.

    Computed by Newton-Schulz iterations, fastest with no more rows than columns. In bfloat16 the result differs by some
    4 % from that in float64.

    Args:
        matrices: (N, R, C), with singular values of at most 1.
    """
    identity = _scaled_identity(matrices.shape[1], matrices.dtype, matrices.device)
    for _ in range(_NUM_ITERATIONS):
        gram = torch.bmm(matrices, matrices.mT)
        polynomial = torch.add(identity, gram, alpha=_B).baddbmm_(gram, gram, alpha=_C)
        matrices = torch.bmm(polynomial, matrices)
    return matrices


@cache
def _scaled_identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _A * torch.eye(size, dtype=dtype, device=device)


def _norms(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))
