"""Networks and weights from files: the scored network of a checkpoint, and the weights that a run starts from."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cifar_dist.config import Config, ModelConfig
from cifar_dist.distributed import World, broadcast_bytes, broadcast_from_main, run_and_sync_errors
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.models.architectures import create_model
from cifar_dist.models.network import main_weights, without_auxiliary
from cifar_dist.training import checkpoint
from cifar_dist.training.run_directory import config_of, find_checkpoint

# Settings model.* that decide which network weights belong to, and with which torchvision's and Cadene's fit.
DECISIVE = ("name", "stem", "width", "norm", "branch5x5", "variant")
METADATA = "cifar_dist"  # in files of safetensors: the values of DECISIVE, and which of VARIANTS they are
VARIANTS = ("fold_batch_norm", "merge_1x1")
ADVICE = "Give a run directory, a checkpoint, or a file of weights (.pt, .pth, .safetensors)."
_TORCHVISION = {"name": "inception_v1", "stem": "imagenet", "branch5x5": "3x3", "variant": "torchvision"}
_CADENE = {"name": "inception_v2", "stem": "imagenet", "variant": "cadene"}


class StartWeights(NamedTuple):
    """A state dict by the names of this package; what `ModelConfig` it needs, so far as known; digest of the file."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    sha256: str


def scored_network(state: Mapping[str, Any], config: Config, origin: str) -> nn.Module:
    """The network of a checkpoint as it is scored: the moving average if there is one, without auxiliary heads.

    On the CPU, in the dtype of the checkpoint. Torch's random numbers stay as they were.

    Raises:
        UserError: its own network cannot be imported, or the weights are of another one.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            network = without_auxiliary(create_model(replace(config.model, auxiliary=False)))
        except UserError as error:
            raise UserError(f"{origin} needs its network: {error}") from None
    tensors = [value for value in state["model"].values() if isinstance(value, Tensor)]  # not those of get_extra_state
    network.to(next(tensor.dtype for tensor in tensors if tensor.is_floating_point()))
    checkpoint.load_weights(network, _scored_weights(state, config), origin)
    return network


def _scored_weights(state: Mapping[str, Any], config: Config) -> dict[str, Tensor]:
    if config.optim.ema_decay is None:
        return main_weights(state["model"])
    return {name.removeprefix("module."): tensor for name, tensor in state["ema"].items() if name != "n_averaged"}


def load_start_weights(model: nn.Module, config: ModelConfig, world: World) -> tuple[str, str]:
    """Copy the weights that `config.weights` names into `model`, on every rank; rank 0 reads the file.

    Classifiers for another number of classes, and auxiliary classifiers that the file lacks, keep their random weights.

    Returns:
        a line for the log, and the SHA-256 of the file.

    Raises:
        UserError: on every rank; the file cannot be read, or is of another network.
    """
    assert config.weights is not None
    wanted = config.weights
    path = Path(broadcast_from_main(world, lambda: str(find_checkpoint(wanted))))
    data = run_and_sync_errors(world, lambda: _read(path), only_if=world.is_main)
    data = broadcast_bytes(data or b"", world)
    weights = run_and_sync_errors(world, lambda: decode(data, path))
    new = run_and_sync_errors(world, lambda: copy_weights(model, weights, config, path))
    heads = f"; random: {', '.join(new)}" if new else ""
    return f"starting from the weights in {path} (SHA-256 {weights.sha256[:16]}){heads}", weights.sha256


def _read(path: Path) -> bytes:
    if checkpoint.digest_path(path).exists():
        return checkpoint.read_verified(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"model.weights {path} cannot be read: {error.strerror}. {ADVICE}") from None


def decode(data: bytes, path: Path) -> StartWeights:
    """The weights in a file of this package, of torchvision's googlenet or of Cadene's bninception.

    Raises:
        UserError: it is none of these.
    """
    from cifar_dist.models.published import convert

    sha256 = hashlib.sha256(data).hexdigest()
    state = _tensors(data, path)
    if {"format", "model", "config"} <= state.keys():
        saved = checkpoint.decode(data, str(path))
        config = config_of(saved["config"], str(path))
        tensors = saved["model"] if config.optim.ema_decay is None else _scored_weights(saved, config)
        return StartWeights(tensors, decisive(config.model), sha256)
    for key in ("state_dict", "model"):  # as torchvision's references and timm save
        if isinstance(state.get(key), dict):
            state = state[key]
    named = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    tensors = convert.unwrapped(named)
    try:
        if "conv1.conv.weight" in tensors:
            return StartWeights(convert.from_torchvision(tensors).state_dict(), _TORCHVISION, sha256)
        if "conv1_7x7_s2.weight" in tensors:
            own = convert.from_cadene(tensors).state_dict()
            own["stem.0.0.weight"] = own["stem.0.0.weight"].flip(1)  # its channels are blue, green, red
            return StartWeights(own, _CADENE, sha256)
    except ValueError as error:
        raise UserError(f"model.weights {path}: {error}") from None
    if not tensors:
        raise UserError(f"model.weights {path} holds no weights; it has {', '.join(map(str, state)) or 'nothing'}.")
    return StartWeights(tensors, _metadata(data, path) if path.suffix == ".safetensors" else {}, sha256)


def decisive(config: ModelConfig) -> dict[str, Any]:
    """The settings that decide which network weights belong to: names and shapes alone may be equal."""
    return {key: getattr(config, key) for key in DECISIVE}


def _metadata(data: bytes, path: Path) -> dict[str, Any]:
    """`decisive` of the network whose export a valid file of safetensors is; empty if it is of another program.

    Raises:
        UserError: it is one of `VARIANTS`.
    """
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        found = json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
    except ValueError:
        return {}
    found = found if isinstance(found, dict) else {}
    if options := " and ".join(f"--{name}" for name in VARIANTS if found.get(name)):
        raise UserError(f"model.weights {path} was exported with {options}. Export it without, or give the run.")
    return {key: value for key, value in found.items() if key in DECISIVE}


def _tensors(data: bytes, path: Path) -> dict[str, Any]:
    errors: tuple[type[Exception], ...] = checkpoint.NOT_LOADABLE
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load

            errors = (SafetensorError,)
            return dict(load(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"model.weights {path} needs a package: pip install 'cifar_dist[export]'") from None
    except errors as error:
        why = "is damaged" if path.suffix == ".safetensors" else checkpoint.why_not_loadable(data, error)
        raise UserError(f"model.weights {path} {why}. {ADVICE}") from None
    if not isinstance(state, dict):
        raise UserError(f"model.weights {path} holds a {type(state).__name__}, not the weights of a network by name.")
    return state


@torch.no_grad()
def copy_weights(model: nn.Module, weights: StartWeights, config: ModelConfig, path: Path) -> list[str]:
    """Copy `weights` into `model`; returns the names of its tensors that stay random.

    Raises:
        CheckpointError: they are of another network.
    """
    other = {key: value for key, value in weights.settings.items() if getattr(config, key) != value}
    if other:
        needed = " ".join(f"--model.{key} {value}" for key, value in other.items())
        raise CheckpointError(f"the weights in {path} are of another network. They need {needed}")
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = {name: value for name, value in weights.tensors.items() if isinstance(value, Tensor)}
    if not any(name.startswith("auxiliary.") for name in own):
        given = main_weights(given)
    new = [name for name in own if _is_head(name) and (name not in given or given[name].shape != own[name].shape)]
    kept = [name for name in own if name not in new]
    wrong = [name for name in kept if name not in given or given[name].shape != own[name].shape]
    wrong += [name for name in given if name not in own]
    if wrong:
        shown = "; ".join(_difference(name, own, given) for name in wrong[:4])
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(f"the weights in {path} are of another network (settings model.*): {shown}{more}")
    for name in kept:
        own[name].copy_(given[name])
    return new


def _is_head(name: str) -> bool:
    return name.startswith(("classifier.", "auxiliary."))


def _difference(name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    here, there = (tuple(state[name].shape) if name in state else "missing" for state in (own, given))
    return f"{name} is {there} in the file and {here} in the network"
