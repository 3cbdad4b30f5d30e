"""From a name in the configuration to a network."""

from __future__ import annotations

from cifar_dist.config import ModelConfig
from cifar_dist.models.inception_v1 import inception_v1
from cifar_dist.models.inception_v2 import inception_v2, inception_v2_slim
from cifar_dist.models.layers import Dialect
from cifar_dist.models.network import InceptionNetwork

MODELS = {"inception_v1": inception_v1, "inception_v2": inception_v2, "inception_v2_slim": inception_v2_slim}
# What merge_1x1 auto means. Forward and backward at width 0.25, strided stem, 64 images, bf16, one core of a Xeon with
# AMX: V1 takes 167 ms merged and 179 plain, V2 192 and 233 (medians of 60, interleaved). Not measured on a GPU yet.
MERGES = {"cpu": True, "cuda": False}


def create_model(config: ModelConfig, device_type: str = "cpu") -> InceptionNetwork:
    """Build the network that `config` names, with random weights from torch's global generator, on the CPU.

    Args:
        config: the section `model`.
        device_type: where the network is going to train, cpu or cuda; decides what `merge_1x1: auto` means.
    """
    merge = MERGES[device_type] if config.merge_1x1 == "auto" else config.merge_1x1 == "on"
    return MODELS[config.name](
        config.branch5x5,
        stem=config.stem,
        width=config.width,
        dropout=config.dropout,
        auxiliary=config.auxiliary,
        merge_1x1=merge,
        dialect=Dialect(norm=config.norm),
    )
