"""Own networks: what is refused, and that a usable one stays as it is but for its batch norms."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cifar_dist.config import ModelConfig
from cifar_dist.errors import UserError
from cifar_dist.models.architectures import create_model
from cifar_dist.models.network import Logits, without_auxiliary

HERE = f"{__name__}:"


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), *layers, nn.Flatten(), nn.LazyLinear(10))


def plain(config: ModelConfig, _: int) -> nn.Module:
    return network(nn.Dropout(config.dropout), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU())


class Norm(nn.BatchNorm2d):
    pass


def of_all_kinds(*_: object) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 8), nn.BatchNorm1d(8, momentum=None), nn.Unflatten(1, (8, 1, 1)),
        Norm(8, affine=False), nn.Flatten(), nn.LazyBatchNorm1d(), nn.Linear(8, 10),
    )  # fmt: skip


class Heads(nn.Module):
    def __init__(self, config: ModelConfig, _: int) -> None:
        super().__init__()
        self.main = network()
        self.auxiliary = nn.ModuleDict({"a": network()} if config.auxiliary else {})

    def forward(self, x: Tensor) -> Tensor | Logits:
        return Logits(self.main(x), (self.auxiliary["a"](x),)) if self.training and self.auxiliary else self.main(x)


class Counts(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return x


class Shaky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class Unsaved(nn.Module):
    noise: Tensor

    def __init__(self, config: ModelConfig, _: int) -> None:
        super().__init__()
        self.layers = network()
        noise = torch.rand(3, 1, 1)
        if config.auxiliary:
            self.noise = noise
        else:
            self.register_buffer("noise", noise, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x + self.noise)
        return logits


def seven_classes(*_: object) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))


def frozen(*_: object) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).requires_grad_(False)


def counting(*_: object) -> nn.Module:
    return network(Counts())


def shaky(*_: object) -> nn.Module:
    return network(Shaky())


def synchronized(*_: object) -> nn.Module:
    return network(nn.SyncBatchNorm(8))


def without_statistics(*_: object) -> nn.Module:
    return network(nn.BatchNorm2d(8, track_running_stats=False))


def wrong_size(*_: object) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 10))


def no_module(*_: object) -> object:
    return 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seven_classes", r"in evaluation mode 2 images give a tensor \(2, 7\), not logits \(2, 10\)"),
        ("frozen", "whose network has no parameter to train"),
        ("counting", "whose buffer 1.seen changes in a forward pass in training mode"),
        ("shaky", "which gives other logits in a second pass with the same seed"),
        ("synchronized", "which has nn.SyncBatchNorm"),
        ("without_statistics", "which has a batch norm without running statistics"),
        ("wrong_size", r"a forward pass of images \(2, 3, 32, 32\) failed: RuntimeError: .*mat1 and mat2"),
        ("no_module", "which returned an object of type int instead of one of type Module"),
        ("plian", r"has no plian. Did you mean .*:plain\?"),
    ],
)
def test_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(ModelConfig(name=HERE + name))


@pytest.mark.parametrize("auxiliary", [True, False])
def test_random_tensors_that_a_checkpoint_lacks(auxiliary: bool) -> None:
    """As an attribute, or as a buffer that is not saved."""
    with pytest.raises(UserError, match=r"has random tensors that its state dict lacks.* Register them as buffers"):
        create_model(ModelConfig(name=HERE + "Unsaved", auxiliary=auxiliary))


def norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    return (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


def test_weights_are_those_of_the_seed() -> None:
    """As the function makes them; the trial changes nothing, not even the next random number."""
    torch.manual_seed(5)
    model = create_model(ModelConfig(name=HERE + "plain", dropout=0.5))
    after = torch.rand(1)
    torch.manual_seed(5)
    original = plain(ModelConfig(dropout=0.5), 10)
    assert torch.equal(model[0].weight, original[0].weight)  # type: ignore[index]
    assert torch.equal(after, torch.rand(1))
    assert model.training


@pytest.mark.parametrize("name", ["plain", "of_all_kinds"])
def test_batch_norms_keep_their_statistics_until_they_are_computed(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(ModelConfig(name=HERE + name, dropout=0.0)).double()
    images = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = copy.deepcopy(model).train()
    trained(images)
    assert all(map(torch.equal, before.values(), trained.state_dict().values()))
    update_bn([images], model)
    assert all(norm.num_batches_tracked == 1 and norm.momentum == 0.0 for norm in norms(model))
    first = next(norms(model))
    inputs = model[:2](images)  # type: ignore[index]
    assert torch.allclose(first.running_mean, inputs.transpose(0, 1).flatten(1).mean(dim=1))  # type: ignore[arg-type]
    # In training it normalises as torch's batch norm.
    expected = F.batch_norm(inputs, None, None, first.weight, first.bias, training=True)
    assert torch.equal(first(inputs), expected)


def test_auxiliary_heads_are_left_out_of_scores() -> None:
    model = create_model(ModelConfig(name=HERE + "Heads", auxiliary=True))
    assert isinstance(model(torch.randn(2, 3, 32, 32)), Logits)
    bare = without_auxiliary(model)
    assert len(list(bare.parameters())) == 4 < len(list(model.parameters()))
    assert len(list(create_model(ModelConfig(name=HERE + "Heads")).parameters())) == 4
