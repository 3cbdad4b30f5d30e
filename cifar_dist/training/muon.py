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

Tensors = tuple[Tensor, ...] | list[Tensor]

# Coefficients a, b, c of the polynomials a x + b x^3 + c x^5, one for each iteration. Each is the best approximation of
# 1 on the interval to which the one before it maps [0.01, 1] (Amsel et al. 2025, arXiv 2505.16932). Together they bring
# singular values of at least 0.01 to between 0.71 and 1.27.
_POLYNOMIALS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
_SAFETY = 1.01  # singular values are divided by it, as rounding may bring them above 1, where the first one is steep
_MIN_ROWS_BF16 = 128  # on CPUs products of smaller matrices are faster in float32
_MAX_STACKS = 6


class MuonSGD(torch.optim.SGD):
    """Fused SGD whose group with `muon_momentum` set is stepped by Muon instead.

    Muon replaces the gradient of a filter bank (O, I, H, W), flattened to (O, I * H * W) and averaged with Nesterov
    momentum, by the nearest matrix with orthonormal rows or columns. Before each update a filter bank is scaled to the
    norm sqrt(O). The batch norm behind it cancels its scale, so the learning rate is the relative change per step.

    Args:
        dtype: number format of Muon's iterations, on CPUs of those for large filter banks.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        self._dtype = dtype
        filters = self._muon_group["params"]
        on_gpu = filters[0].device.type == "cuda"
        self.layout: StackPerShape | PaddedStacks = PaddedStacks(filters) if on_gpu else StackPerShape(filters)
        norms = [len(p) ** 0.5 for p in filters]
        self._filter_norms = torch.tensor(norms, dtype=filters[0].dtype, device=filters[0].device)
        # What brings an orthogonal (O, I * H * W) matrix to the norm sqrt(O).
        self._update_scales = [max(1.0, len(p) / p[0].numel()) ** 0.5 for p in filters]
        # Makes GradScaler unscale and check the gradients before `step`, so that infinities do not reach the momentum.
        # In fp16 it therefore waits for the device at every step.
        self._step_supports_amp_scaling = False

    @property
    def _muon_group(self) -> dict[str, Any]:
        return next(group for group in self.param_groups if "muon_momentum" in group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self._orthogonalize(self._muon_group)
        return super().step(closure)

    def _orthogonalize(self, group: dict[str, Any]) -> None:
        """Write Muon's updates into the gradients, and bring the filters to their norm."""
        filters, momentum = group["params"], group["muon_momentum"]
        gradients = [p.grad for p in filters]
        buffers = [self.state[p]["momentum_buffer"] for p in filters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        averages = torch._foreach_mul(buffers, momentum)
        torch._foreach_add_(averages, gradients)
        # The largest singular value of a matrix of norm 1 is at most 1.
        self.layout.orthogonalize(averages, _norms(averages).clamp_min_(1e-7), self._dtype, gradients)
        torch._foreach_mul_(gradients, self._update_scales)
        norms = _norms(filters).clamp_min_(1e-7)  # filters that are all zeros stay so until the update
        self.layout.scale(filters, self._filter_norms / norms)


class StackPerShape:
    """Orthogonalizes filter banks (O, I, H, W) as matrices (O, I * H * W), those of one shape together: for CPUs."""

    def __init__(self, filters: Sequence[Tensor]) -> None:
        self._members = defaultdict[torch.Size, list[int]](list)  # the numbers of filter banks
        for k, bank in enumerate(filters):
            self._members[_wide(bank).shape].append(k)

    def orthogonalize(self, banks: Tensors, norms: Tensor, dtype: torch.dtype, results: Tensors) -> None:
        """Write the orthogonalized matrices of `banks` into `results`, iterating in `dtype` if they are large.

        norms: of each bank, (F,).
        """
        units = torch._foreach_div(banks, list(norms.unbind()))
        for (rows, _), numbers in self._members.items():
            stack = torch.stack([_wide(units[k]) for k in numbers])
            large = rows >= _MIN_ROWS_BF16
            for k, matrix in zip(numbers, orthogonalized(stack.to(dtype) if large else stack), strict=True):
                _wide(units[k]).copy_(matrix)  # not into results, whose order of memory may be another
        torch._foreach_copy_(results, units)

    def scale(self, banks: Tensors, factors: Tensor) -> None:
        """Multiply each bank by its factor, (F,), in place."""
        torch._foreach_mul_(banks, list(factors.unbind()))


class PaddedStacks:
    """The same in few operations: for GPUs, on which starting an operation takes longer than computing it.

    Matrices of similar size are in one stack, padded with zeros, which change no norm and stay zeros in an
    orthogonalization. Elements are moved by gathering from a flat tensor, (E,), of all banks, one after the other.
    """

    def __init__(self, filters: Sequence[Tensor], most_stacks: int = _MAX_STACKS) -> None:
        shapes = [torch.Size((len(p), p[0].numel())) for p in filters]
        sizes = torch.tensor([shape.numel() for shape in shapes])
        num_elements = int(sizes.sum())
        most_rows = max(min(shape) for shape in shapes)
        members = defaultdict[int, list[Tensor]](list)
        for numbers in parts(torch.arange(num_elements), [Format(shape, False) for shape in shapes]):
            wide = _wide(numbers)
            members[math.ceil(most_stacks * len(wide) / most_rows)].append(wide)
        stacks = [_padded(matrices, num_elements) for matrices in members.values()]
        into = flatten(stacks)
        out = torch.empty(num_elements + 1, dtype=torch.int64).scatter_(0, into, torch.arange(len(into)))[:-1]
        owners = torch.arange(len(filters)).repeat_interleave(sizes)
        self._formats = [Format.of(stack) for stack in stacks]
        # For each element of the stacks its place in the flat tensor; the inverse; the number of its filter bank.
        self._into, self._out, self._owners = (x.to(filters[0].device, torch.int32) for x in (into, out, owners))

    def orthogonalize(self, banks: Tensors, norms: Tensor, dtype: torch.dtype, results: Tensors) -> None:
        units = (flatten(banks) / norms.index_select(0, self._owners)).to(dtype)
        stacks = parts(F.pad(units, (0, 1)).index_select(0, self._into), self._formats)
        updates = flatten([orthogonalized(stack) for stack in stacks]).index_select(0, self._out)
        torch._foreach_copy_(results, parts(updates.to(norms.dtype), [Format.of(bank) for bank in banks]))

    def scale(self, banks: Tensors, factors: Tensor) -> None:
        scaled = flatten(banks) * factors.index_select(0, self._owners)
        torch._foreach_copy_(banks, parts(scaled, [Format.of(bank) for bank in banks]))


def _wide(bank: Tensor) -> Tensor:
    """A view of a dense `bank` as a matrix with no more rows than columns, in the order of memory."""
    matrix = bank.as_strided((len(bank), bank[0].numel()), (bank[0].numel(), 1))
    return matrix.T if len(matrix) > matrix.shape[1] else matrix


def _padded(matrices: Sequence[Tensor], value: int) -> Tensor:
    """`matrices` (r, c) of any size in one tensor (N, R, C), filled up with `value`."""
    rows, columns = (max(matrix.shape[dim] for matrix in matrices) for dim in (0, 1))
    return torch.stack([
        F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]), value=value) for matrix in matrices
    ])  # fmt: skip


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values of 0.01 and more come out near 1.

    Computed by Newton-Schulz iterations, fastest with no more rows than columns. In bfloat16 the result differs by some
    4 % from that in float64.

    Args:
        matrices: (N, R, C), with singular values of at most 1.
    """
    _, rows, columns = matrices.shape
    gram = torch.bmm(matrices, matrices.mT)
    # All iterations multiply by polynomials of the same (R, R) matrix, so these can be multiplied first. In bfloat16
    # small singular values, whose squares it holds, would be lost.
    by_gram = columns > 1.5 * rows and matrices.dtype != torch.bfloat16
    product: Tensor | None = None
    for k, (a, b, c) in enumerate(_POLYNOMIALS):
        identity = _scaled_identity(a / _SAFETY, rows, matrices.dtype, matrices.device)
        last = k == len(_POLYNOMIALS) - 1
        polynomial = torch.add(identity, gram, alpha=b / _SAFETY**3).baddbmm_(gram, gram, alpha=c / _SAFETY**5)
        if by_gram:
            product = polynomial if product is None else torch.bmm(polynomial, product)
            gram = gram if last else torch.bmm(torch.bmm(polynomial, gram), polynomial)
        else:
            matrices = torch.bmm(polynomial, matrices)
            gram = gram if last else torch.bmm(matrices, matrices.mT)
    return matrices if product is None else torch.bmm(product, matrices)


@cache
def _scaled_identity(scale: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return scale * torch.eye(size, dtype=dtype, device=device)


def _norms(tensors: Tensors) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))
