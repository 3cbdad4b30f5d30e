"""The table of parameters of the debug mode."""

from __future__ import annotations

import pytest
import torch

from cifar_dist.config import ModelConfig
from cifar_dist.models.architectures import create_model
from cifar_dist.training.debug import grouped, table


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
