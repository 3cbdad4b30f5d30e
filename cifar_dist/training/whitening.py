"""Fits the filters of a whitening stem to training images, equally on every rank."""

import torch
from torch import Tensor, nn

from cifar_dist.data.augment import normalize
from cifar_dist.data.loader import BetonLoader
from cifar_dist.data.order import Indices
from cifar_dist.distributed import World, broadcast_from_main
from cifar_dist.models.stems import WhiteningConv, whitening_filters
from cifar_dist.phase import SLOW_S, Phase, set_phase
from cifar_dist.training.precision import reproducible

_FIT = Phase("the filters of the stem", limit_s=SLOW_S, memory_setting="eval.bn_samples")


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
    filters = broadcast_from_main(world, lambda: _filters(loader, samples, stems[0].kernel_size).tolist())
    for stem in stems:
        stem.weight.copy_(torch.tensor(filters, dtype=torch.float64))


def _filters(loader: BetonLoader, samples: Indices, kernel_size: int) -> Tensor:
    cpu = torch.device("cpu")
    with reproducible(cpu):
        images = [normalize(batch.images.to(cpu), torch.float64) for batch in loader.read(samples, len(samples))]
        return whitening_filters(torch.cat(images), kernel_size)
