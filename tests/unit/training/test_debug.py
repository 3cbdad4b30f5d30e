"""The table of parameters of the debug mode, and own code that is refused before training."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifar_dist.config import AugmentConfig, Config, ModelConfig, OptimConfig, TrainConfig
from cifar_dist.distributed import World
from cifar_dist.errors import UserError
from cifar_dist.models.architectures import create_model
from cifar_dist.training import checkpoint
from cifar_dist.training.debug import grouped, table, try_own_code
from cifar_dist.training.precision import Precision
from cifar_dist.training.train_step import TrainStep


@pytest.mark.parametrize("name", ["inception_v1", "inception_v2"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_a_line_per_inception_block(name: str, auxiliary: bool) -> None:
    model = create_model(ModelConfig(name=name, width=0.0625, auxiliary=auxiliary))
    parameters = dict(model.named_parameters())
    groups = grouped(parameters, 30)
    lines = table(groups).splitlines()
    assert {"blocks.3a", "blocks.5b", "classifier.weight"} <= groups.keys()
    assert len(lines) == len(groups) <= 30
    assert sum(map(len, groups.values())) == len(parameters)
    assert max(map(len, lines)) <= 110


def test_many_modules() -> None:
    """The first ones, and one line for the others."""
    tensors = {f"layer{k}.weight": torch.full((2, 3), float(k)) for k in range(100)} | {"layer7.bias": torch.ones(1)}
    groups = grouped(tensors, 30)
    assert list(groups) == [*(f"layer{k}" for k in range(29)), "71 others"]
    assert table(groups).splitlines()[-1].split() == [
        "71",
        "others",
        "71",
        "tensors",
        "float32",
        "426",
        "cpu",
        "from",
        "29",
        "to",
        "99",
    ]


def test_few_tensors() -> None:
    """As they are."""
    groups = grouped({"a.b.c": torch.zeros(2), "a.b.d": torch.tensor([True, False])}, 30)
    assert list(groups) == ["a.b.c", "a.b.d"]
    assert "(2,)               bool              2  cpu  from 0 to 1" in table(groups)


class For32(nn.Module):
    """A network, and an augmentation, that take images of 32 pixels only."""

    num_words = 0

    def __init__(self, *arguments: object) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)) if arguments else None

    def forward(self, images: Tensor, words: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return images.view(2, 3, 32, 32) if self.layers is None else self.layers(images)


class Locked(nn.Linear):
    def __init__(self, *_: object) -> None:
        super().__init__(3072, 10)

    def get_extra_state(self) -> object:
        return threading.Lock()

    def set_extra_state(self, state: object) -> None:
        pass

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.flatten(1))


def betas_of_numpy(model: nn.Module, *_: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), betas=(np.float64(0.9), 0.99))


OWN = Config(
    model=ModelConfig(stem="strided", width=0.0625), optim=OptimConfig(name="sgd"),
    augment=AugmentConfig(low_resolution_share=0.2), train=TrainConfig(batch_size=4, micro_batch_size=2),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ModelConfig(name=f"{__name__}:For32")},
            r"images \(2, 3, 20, 20\), which augment\.low_resolution_share",
        ),
        ({"augment": replace(OWN.augment, extra=f"{__name__}:For32")}, r"images \(2, 3, 20, 20\).*shape.*is invalid"),
        ({"optim": OptimConfig(name=f"{__name__}:betas_of_numpy")}, r"holds .*numpy\S*\.scalar.*, so no checkpoint"),
        ({"model": ModelConfig(name=f"{__name__}:Locked")}, r"a checkpoint .* failed: TypeError: cannot pickle"),
    ],
)
def test_own_code_that_would_fail_later(changes: dict[str, Any], message: str) -> None:
    config = replace(OWN, **changes)
    with pytest.raises(UserError, match=message):
        try_own_code(config, TrainStep(config, World(0, 1, 0, 1, torch.device("cpu")), Precision("fp32", "cpu")))


def test_usable_own_code_is_left_as_it_is() -> None:
    """A network for 32 pixels only, in a run without low resolution."""
    config = replace(OWN, model=ModelConfig(name=f"{__name__}:For32"), augment=AugmentConfig())
    train_step = TrainStep(config, World(0, 1, 0, 1, torch.device("cpu")), Precision("fp32", "cpu"))
    before = checkpoint.encode(0, train_step.state())
    try_own_code(config, train_step)
    assert checkpoint.encode(0, train_step.state()) == before
