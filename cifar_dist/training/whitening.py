"""The filters of a whitening stem, from training images, the same on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar_dist.data.augment import normalize
from cifar_dist.data.loader import BetonLoader
from cifar_dist.data.order import Indices
from cifar_dist.distributed import World, together
from cifar_dist.models.stems import WhiteningConv, whitening_filters
from cifar_dist.place import SLOW_S, Place, go
from cifar_dist.training.precision import reproducible

_FILTERS = Place("the filters of the stem", limit_s=SLOW_S, memory="eval.bn_samples")


@torch.no_grad()
def fit_whitening(models: list[nn.Module], loader: BetonLoader, samples: Indices, world: World) -> None:
    """Give the whitening convolutions in `models` the filters that whiten the patches of `samples` (N,).

    Rank 0 computes them, on its CPU and one thread, so that neither devices nor thread counts show in the filters.
    Models without such a convolution are left alone.

    Raises:
        DataError: on every rank, when rank 0 cannot read the samples.
    """
    stems = [module for model in models for module in model.modules() if isinstance(module, WhiteningConv)]
    if not stems:
        return
    go(_FILTERS)
    computed = together(world, lambda: _filters(loader, samples, stems[0].kernel_size), at_work=world.rank == 0)
    filters = torch.empty(stems[0].weight.shape, dtype=torch.float64) if computed is None else computed
    filters = filters.to(world.device)
    if world.size > 1:
        dist.broadcast(filters, src=0)
    for stem in stems:
        stem.weight.copy_(filters)


def _filters(loader: BetonLoader, samples: Indices, kernel_size: int) -> Tensor:
    cpu = torch.device("cpu")
    with reproducible(cpu):
        images = [normalize(batch.images.to(cpu), torch.float64) for batch in loader.read(samples, len(samples))]
        return whitening_filters(torch.cat(images), kernel_size).contiguous()
