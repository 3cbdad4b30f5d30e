"""Stems: the layers between the image and the first Inception module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.models.layers import DEFAULT, ConvNormAct, Variant, halving_pool, scaled

STEM_CHANNELS = 192  # input channels of the first module, for both networks
GRIDS = {"cifar": 32, "pooled": 16, "strided": 16, "whiten": 16, "imagenet": 28}  # output size of each stem


class Stem(nn.Sequential):
    """The first layers; `kind` is a key of `GRIDS`.

    Shapes: (N, 3, 32, 32), for `imagenet` (N, 3, 224, 224), to (N, `out_channels`, `grid`, `grid`).
    """

    def __init__(self, kind: str, width: float = 1.0, variant: Variant = DEFAULT) -> None:
        out_channels = scaled(STEM_CHANNELS, width)
        super().__init__(*_layers(kind, scaled(64, width), out_channels, variant))
        self.out_channels = out_channels
        self.grid = GRIDS[kind]


def _layers(kind: str, hidden: int, out_channels: int, variant: Variant) -> list[nn.Module]:
    """`hidden`: channels before the last convolution, where there are several."""
    if kind == "cifar":
        return [ConvNormAct(3, out_channels, 3, variant=variant)]
    if kind == "strided":
        return [ConvNormAct(3, out_channels, 3, stride=2, variant=variant)]
    if kind == "whiten":
        whitening = WhiteningConv()
        pointwise = ConvNormAct(whitening.out_channels, out_channels, 1, variant=variant)
        return [whitening, nn.ReLU(inplace=True), pointwise]
    if kind not in ("pooled", "imagenet"):
        raise ValueError(f"stem is {kind!r}; valid: {', '.join(GRIDS)}")
    pointwise = ConvNormAct(hidden, hidden, 1, variant=variant)
    conv3x3 = ConvNormAct(hidden, out_channels, 3, variant=variant)
    if kind == "pooled":
        return [ConvNormAct(3, hidden, 3, variant=variant), halving_pool(variant), pointwise, conv3x3]
    first = ConvNormAct(3, hidden, 7, stride=2, variant=variant)
    if variant.norm == "none":
        # As in Caffe's bvlc_googlenet; the paper gives no parameters.
        lrns = [nn.LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=1.0) for _ in range(2)]
        return [first, halving_pool(variant), lrns[0], pointwise, conv3x3, lrns[1], halving_pool(variant)]
    return [first, halving_pool(variant), pointwise, conv3x3, halving_pool(variant)]


class WhiteningConv(nn.Module):
    """Fixed filters that whiten patches, and a trained bias (Keller Jordan, arXiv 2404.00498).

    The filters are the eigenvectors of the patches' covariance, scaled to unit variance, and their negatives, so that
    the following ReLU loses no information. They are a buffer that `whitening_filters` computes from the data; until
    then each filter selects one pixel.

    Shapes: (N, 3, H, W) to (N, `out_channels`, H / 2, W / 2).
    """

    weight: Tensor

    def __init__(self, kernel_size: int = 4, stride: int = 2, padding: int = 1) -> None:
        super().__init__()
        patch = 3 * kernel_size**2
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.out_channels = 2 * patch
        pixels = torch.eye(patch).reshape(patch, 3, kernel_size, kernel_size)
        self.register_buffer("weight", torch.cat((pixels, -pixels)))
        self.bias = nn.Parameter(torch.zeros(self.out_channels))

    def forward(self, images: Tensor) -> Tensor:
        # Added here, as autograd computes the gradient of a convolution's bias together with that of its filters.
        output = F.conv2d(images, self.weight, None, self.stride, self.padding)
        return output.add_(self.bias.to(output.dtype)[:, None, None])


@torch.no_grad()
def whitening_filters(images: Tensor, kernel_size: int, eps: float = 5e-4) -> Tensor:
    """Filters whose outputs on the patches of `images` have unit covariance (up to `eps`), and their negatives.

    Args:
        images: (N, 3, H, W) float64; in float32 the small eigenvalues would be rounding errors.
        kernel_size: size k of a patch; patches at all positions inside an image count.
        eps: added to the variances, so that noise is not amplified.

    Returns:
        (6 k^2, 3, k, k), by decreasing variance; the largest component of each filter of the first half is positive.
    """
    if images.dtype != torch.float64:
        raise ValueError(f"images are {images.dtype}; give them as float64")
    patch = images.shape[1] * kernel_size**2
    total, products, count = images.new_zeros(patch), images.new_zeros(patch, patch), 0
    for start in range(0, len(images), 256):  # all patches at once would take gigabytes
        chunk = images[start : start + 256]
        patches = F.unfold(chunk, kernel_size).transpose(1, 2).reshape(-1, patch)
        total += patches.sum(dim=0)
        products += patches.T @ patches
        count += len(patches)
    mean = total / count
    variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    filters = (directions / torch.sqrt(variances.clamp(min=0) + eps)).T.flip(0)
    # An eigenvector's sign is arbitrary. A mirror-symmetric one has several components of nearly the largest size; the
    # first of them decides the sign, so that rounding does not.
    sizes = filters.abs()
    leading = (sizes >= (1 - 1e-6) * sizes.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    filters = filters * filters.gather(1, leading).sign()
    return torch.cat((filters, -filters)).reshape(2 * patch, images.shape[1], kernel_size, kernel_size)
