"""Distributed training of GoogLeNet on CIFAR-10. `cifar_dist.load` is the way to a trained model."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from cifar_dist.inference.classifier import load as load


def __getattr__(name: str) -> Any:
    """`load`, imported when it is used: it needs torch, which takes seconds."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cifar_dist.inference.classifier import load

    return load
