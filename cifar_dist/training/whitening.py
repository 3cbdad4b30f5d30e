"""Fits the filters of a whitening stem to training images, equally on every rank."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar_dist.data.augment import normalize
from cifar_dist.data.loader import BetonLoader
from cifar_dist.data.order import Indices
from cifar_dist.distributed import World, run_and_sync_errors
from cifar_dist.models.stems import WhiteningConv, whitening_filters
from cifar_dist.phase import SLOW_S, Phase, set_phase
from cifar_dist.training.precision import reproducible

_FIT = Phase("the filters of the stem", limit_s=SLOW_S, memory="eval.bn_samples")


@torch.no_grad()
def fit_whitening(models: list[nn.Module], loader: BetonLoader, samples: Indices, world: World) -> None:
    """Set the filters of the whitening convolutions in `models` so that they whiten the patches of `samples` (N,).

    Rank 0 computes them on its CPU with one thread, so the filters depend on neither device nor thread count. Models
    without a whitening convolution stay as they are.

    Raises:
        DataError: on every rank; rank 0 cannot read the samples.
    """
    stems = [module for model in models for module in model.modules() if isinstance(module, WhiteningConv)]
    if not stems:
        return
    set_phase(_FIT)
    fit = partial(_filters, loader, samples, stems[0].kernel_size)
    computed = run_and_sync_errors(world, fit, only_if=world.is_main)
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
