"""From a name in the configuration to a network."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cifar_dist.config import ModelConfig
from cifar_dist.models.inception_v1 import InceptionV1

MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "inception_v1": lambda config: InceptionV1(config.stem, config.width, config.dropout),
}


def create_model(config: ModelConfig) -> nn.Module:
    """Build the network that `config` names, with random weights from torch's global generator, on the CPU."""
    return MODELS[config.name](config)
