"""A network as a function of one tensor: the same gradients, and parameters that everything else uses as before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar_dist.config import ModelConfig
from cifar_dist.models.architectures import create_model
from cifar_dist.models.network import Logits
from cifar_dist.training import optim
from cifar_dist.training.flat_network import FlatNetwork, Format, flatten, parts
from cifar_dist.training.metrics import mean_loss


def network_of(**values: Any) -> nn.Module:
    """With filters that are no parameters, and with frozen scales."""
    torch.manual_seed(0)
    network = create_model(replace(ModelConfig(stem="whiten", width=0.125), **values))
    optim.freeze_bn_scales(network)
    return network.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(8)


def loss_by_hand(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    outputs = network(images)
    main, auxiliary = outputs if isinstance(outputs, Logits) else (outputs, ())
    first, *others = [nn.functional.cross_entropy(each, labels, label_smoothing=0.1) for each in (main, *auxiliary)]
    for loss in others:
        first = first + 0.3 * loss
    return first


@pytest.mark.parametrize("values", [{}, {"name": "inception_v2", "merge_1x1": "on"}, {"auxiliary": True}])
def test_gradients_are_those_of_the_network(values: dict[str, Any], batch: tuple[Tensor, Tensor]) -> None:
    """To the bit, with the memory format of the parameter; of a third of the loss."""
    plain, network = network_of(**values).train(), network_of(**values).train()
    flat_network = FlatNetwork(network, label_smoothing=0.1, num_added=3)
    torch.manual_seed(2)
    expected = loss_by_hand(plain, *batch)
    torch.autograd.backward(expected / 3)
    torch.manual_seed(2)
    loss, counts = flat_network(*batch)
    torch.autograd.backward(loss)
    flat_network.share_gradient()
    assert loss.item() == (expected / 3).item()
    assert counts[2:4].tolist() == [8, 0]
    assert mean_loss(int(counts[4]), 8) == pytest.approx(expected.item(), abs=1e-6)
    for (name, p), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, other), name
        assert (p.grad is None) == (other.grad is None) == (not p.requires_grad), name
        if p.grad is not None and other.grad is not None:
            assert torch.equal(p.grad, other.grad), name
            assert p.grad.is_contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)


def test_parameters_are_parts_of_one_tensor() -> None:
    """Also after a state is loaded. Those of a multiple of four elements begin at a multiple of 16 bytes."""
    network = network_of()
    flat_network = FlatNetwork(network, label_smoothing=0.0, num_added=1)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == flat_network.flat.numel()
    assert [name for name, _ in flat_network.named_parameters()] == ["flat"]
    state = {name: torch.full_like(value, 3) for name, value in network.state_dict().items()}
    network.load_state_dict(state)
    assert bool((flat_network.flat == 3).all())
    assert all(p.data_ptr() % 16 == 0 for p in trained if p.numel() % 4 == 0)


def test_parts_are_the_inverse_of_flatten() -> None:
    conv = torch.randn(4, 3, 2, 2)
    tensors = [torch.randn(3, 5), conv, conv.contiguous(memory_format=torch.channels_last), torch.randn(7)]
    flat = flatten(tensors)
    again = parts(flat, [Format.of(tensor) for tensor in tensors])
    for part, tensor in zip(again, tensors, strict=True):
        assert torch.equal(part, tensor)
        assert part.stride() == tensor.stride()
        assert part.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
