"""Own networks: what a function of the user returns, checked and made fit for any number of devices."""

from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_dist import extension
from cifar_dist.config import ModelConfig
from cifar_dist.errors import UserError
from cifar_dist.models.layers import WithoutAverages
from cifar_dist.models.network import Logits, without_auxiliary


class Network(Protocol):
    """What `model.name` names: a function, or a class derived from nn.Module."""

    def __call__(self, config: ModelConfig, num_classes: int) -> nn.Module:
        """The network on the CPU, in float32, with random weights from torch's global generator, which is seeded.

        Shapes: normalised images (N, 3, S, S) to logits (N, num_classes). S is 32, in training also 20, 24 and 28 with
        `augment.low_resolution_share`. The settings in `config` may be used or not. In training it may return `Logits`
        whose auxiliary ones come from its submodule `auxiliary`, an nn.ModuleDict that is emptied for evaluation.
        """


def own_network(config: ModelConfig, num_classes: int) -> nn.Module:
    """The network that `config.name` refers to.

    Raises:
        UserError: it cannot be created, its outputs are of a wrong shape, or would depend on the number of devices.
    """
    given = f"model.name is {config.name}"
    model: nn.Module = extension.create("model.name", config.name, nn.Module, config, num_classes)
    trial = extension.explained(f"{given}, but a forward pass of images (2, 3, 32, 32)")
    with torch.no_grad(), torch.random.fork_rng(devices=[]), trial:
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        _check_logits(without_auxiliary(model).eval()(images), num_classes, f"{given}: in evaluation mode")
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                _stop_averages(module, given)
        torch.default_generator.manual_seed(1)
        second: nn.Module = extension.create("model.name", config.name, nn.Module, config, num_classes)
        second.load_state_dict(model.state_dict())
        _check_training(model.train(), second.train(), images, num_classes, given)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # dense, for `training.flat_network`
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{given}, whose network has no parameter to train.")
    return model


def _stop_averages(norm: _BatchNorm, given: str) -> None:
    """Keep the running statistics as they are in training (see `WithoutAverages`)."""
    if isinstance(norm, nn.SyncBatchNorm) or norm.running_mean is None:
        kind = "nn.SyncBatchNorm" if isinstance(norm, nn.SyncBatchNorm) else "a batch norm without running statistics"
        raise UserError(
            f"{given}, which has {kind}, so results would depend on the number of devices or on eval.batch_size. "
            f"Use nn.BatchNorm2d."
        )
    norm.momentum = 0.0
    if type(norm).forward is _BatchNorm.forward:
        norm.__class__ = _without_averages(cast(Any, type(norm)))


@cache
def _without_averages(kind: Any) -> type[_BatchNorm]:
    return type(kind.__name__, (WithoutAverages, kind), {})


def _check_training(model: nn.Module, second: nn.Module, images: Tensor, num_classes: int, given: str) -> None:
    """Refuse buffers that change, and other outputs in a second pass with the same seed, or of its copy `second`."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = []
    for network in (model, model, second):
        torch.default_generator.manual_seed(0)
        outputs = network(images)
        logits, auxiliary = outputs if isinstance(outputs, Logits) else (outputs, ())
        for output in (logits, *auxiliary):
            _check_logits(output, num_classes, f"{given}: in training mode")
        found.append(logits)
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    if changed:
        raise UserError(
            f"{given}, whose buffer {changed[0]} changes in a forward pass in training mode, so results would depend "
            f"on the number of devices. Compute it from the parameters, or leave it as it is."
        )
    first, again, copied = (logits.nan_to_num() for logits in found)
    if not torch.equal(first, again):
        raise UserError(
            f"{given}, which gives other logits in a second pass with the same seed, so results would depend on the "
            f"number of devices. Draw random numbers by torch, from its global generator."
        )
    if not torch.allclose(first, copied, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"{given}, which has random tensors that its state dict lacks, so a checkpoint would be of another "
            f"network. Register them as buffers, without persistent=False."
        )


def _check_logits(outputs: object, num_classes: int, where: str) -> None:
    if not isinstance(outputs, Tensor) or outputs.shape != (2, num_classes):
        got = f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise UserError(f"{where} 2 images give {got}, not logits (2, {num_classes}).")
