"""Muon for convolution filters (Keller Jordan, kellerjordan.github.io/posts/muon, 2024; arXiv 2502.16982), with SGD.

torch.optim.Muon is not used. It iterates in bfloat16, accepts matrices only, and does not keep the filters at one norm.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

# Of the quintic polynomial that drives singular values towards 1 fastest (Jordan, 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS = 5


class MuonSGD(torch.optim.SGD):
    """Fused SGD whose groups with `muon_momentum` set are stepped by Muon instead.

    Muon replaces the gradient of a filter bank (O, I, H, W), flattened to (O, I * H * W) and averaged with Nesterov
    momentum, by the nearest matrix with orthonormal rows or columns. Before each update a filter bank is scaled to the
    norm sqrt(O). The batch norm behind it cancels its scale, so the learning rate is the relative change per step.

    Args:
        dtype: number format of Muon's iterations.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        self._dtype = dtype
        # Makes GradScaler unscale and check the gradients before `step`, so that infinities do not reach the momentum.
        # In fp16 it therefore waits for the device at every step.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if "muon_momentum" in group:
                self._orthogonalize(group)
        return super().step(closure)

    def _orthogonalize(self, group: dict[str, Any]) -> None:
        filters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in filters]
        buffers = [self.state[p]["momentum_buffer"] for p in filters]
        torch._foreach_mul_(buffers, group["muon_momentum"])
        torch._foreach_add_(buffers, gradients)
        torch._foreach_add_(gradients, buffers, alpha=group["muon_momentum"])
        same_shape = defaultdict(list)
        for gradient in gradients:
            same_shape[len(gradient), gradient[0].numel()].append(gradient)
        for (rows, columns), members in same_shape.items():
            matrices = torch.stack([gradient.reshape(rows, columns) for gradient in members])
            updates = orthogonalized(matrices.to(self._dtype)).to(matrices.dtype)
            # Of norm sqrt(rows), like the filters.
            updates *= max(1.0, rows / columns) ** 0.5
            for gradient, update in zip(members, updates, strict=True):
                gradient.copy_(update.view(gradient.shape))
        scales = torch._foreach_reciprocal(torch._foreach_norm(filters))
        torch._foreach_mul_(scales, [len(p) ** 0.5 for p in filters])
        torch._foreach_mul_(filters, scales)


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values come out between 0.7 and 1.2.

    Shapes: (N, R, C) to the same, in the same format. Computed by Newton-Schulz iterations.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)  # the largest singular value is then at most 1
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
