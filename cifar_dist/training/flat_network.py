"""A network with one parameter and with its loss: what DDP wraps and torch.compile compiles.

On a GPU one operation on many tensors together takes less time than one on each of them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cifar_dist.models.network import AUXILIARY_WEIGHT, Logits
from cifar_dist.training.metrics import batch_counts


class Format(NamedTuple):
    """How a dense tensor lies in memory."""

    shape: torch.Size
    channels_last: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Format":
        return cls(tensor.shape, channels_last=not tensor.is_contiguous())


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all elements, (E,), in the order in which each of the dense `tensors` has them in memory."""
    return torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors])


def parts(flat: Tensor, formats: Sequence[Format]) -> list[Tensor]:
    """The inverse of `flatten`: views of `flat` (E,). In a backward pass their gradients are concatenated once."""
    found = []
    sizes = [shape.numel() for shape, _ in formats]
    for part, (shape, channels_last) in zip(torch.split(flat, sizes), formats, strict=True):
        if channels_last:
            o, i, h, w = shape
            found.append(part.view(o, h, w, i).permute(0, 3, 1, 2))
        else:
            found.append(part.view(shape))
    return found


class FlatNetwork(nn.Module):
    """`network` and the loss of its outputs, as a function of one tensor that holds all trained parameters.

    The parameters of `network` become parts of `flat`, so everything else uses them as before. Hooks on them have no
    effect, as only `flat` has a gradient of its own.

    Args:
        network: on its device, in its memory format, with frozen parameters marked.
        label_smoothing: of the loss.
        num_added: number of micro-batches whose gradients are added.

    Shapes: images (N, 3, S, S) and labels (N,) to the loss to minimise, divided by `num_added`, (), and
    `metrics.batch_counts`, (5,).
    """

    def __init__(self, network: nn.Module, label_smoothing: float, num_added: int) -> None:
        super().__init__()
        self.label_smoothing, self.num_added = label_smoothing, num_added
        self._network = (network,)  # not registered as a submodule, whose parameters DDP would find
        trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        # Those of odd sizes last, so that the others begin at multiples of 16 bytes, which GPUs read faster.
        trained.sort(key=lambda item: item[1].numel() % 4 > 0)
        self._names = [name for name, _ in trained]
        every = list(network.named_parameters(remove_duplicate=False))
        self._ties = len(every) > len(list(network.named_parameters()))  # looking for ties in each pass takes time
        self._parameters_of_network = tuple(p for _, p in trained)
        self._formats = [Format.of(p) for _, p in trained]
        self.flat = nn.Parameter(flatten(p.detach() for _, p in trained))
        for (_, p), part in zip(trained, parts(self.flat.detach(), self._formats), strict=True):
            p.data = part

    def share_gradient(self) -> None:
        """Make the gradient of each parameter of the network a part of the gradient of `flat`, which must exist."""
        assert self.flat.grad is not None
        for p, part in zip(self._parameters_of_network, parts(self.flat.grad, self._formats), strict=True):
            p.grad = part

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(zip(self._names, parts(self.flat, self._formats), strict=True))
        outputs = functional_call(self._network[0], parameters, (images,), tie_weights=self._ties)
        logits, auxiliary = outputs if isinstance(outputs, Logits) else (outputs, ())
        loss = objective = self._loss(logits, labels, self.label_smoothing)
        for output in auxiliary:
            objective = objective + AUXILIARY_WEIGHT * self._loss(output, labels, self.label_smoothing)
        with torch.no_grad():
            if self.label_smoothing > 0:
                loss = self._loss(logits, labels)
            counts = batch_counts(loss, objective, logits, labels)
        return objective / self.num_added, counts

    def _loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(logits.to(self.flat.dtype), labels, label_smoothing=label_smoothing)
