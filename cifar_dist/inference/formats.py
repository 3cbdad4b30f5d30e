"""The files of each format: how they are written, and how they are read back to be checked."""

import ast
import importlib.util
import json
import runpy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist.errors import UserError
from cifar_dist.files import to_json
from cifar_dist.inference import standalone, variants
from cifar_dist.models import inception, layers, network, stems
from cifar_dist.training.weights import METADATA, VARIANTS

Settings = dict[str, Any]
FILES = {
    "safetensors": ("model.safetensors", "config.json", "model.py"),
    "onnx": ("model.onnx", "config.json"),
    "torch_export": ("model.pt2", "config.json"),
}
_PACKAGES = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript", "onnxruntime"), "torch_export": ()}
_PARTS = (layers, inception, stems, network, variants, standalone)  # of model.py, in this order


def require_packages(formats: Sequence[str]) -> None:
    """Refuse formats whose packages are not installed.

    Raises:
        UserError: names the packages and the command that installs them.
    """
    names = [name for format_ in formats for name in _PACKAGES[format_] if importlib.util.find_spec(name) is None]
    if names:
        raise UserError(f"{', '.join(names)} is not installed. Run: pip install 'cifar_dist[export]'")


def write(format_: str, folder: Path, model: nn.Module, settings: Settings) -> None:
    """Write the files of one format into `folder`.

    Args:
        model: as exported, in eval mode on the CPU; its input is uint8 if `settings` say so.
        settings: content of config.json; "rows" only for networks of this package.
    """
    (folder / "config.json").write_text(to_json(settings), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn of their own internals
        _WRITERS[format_](folder, model, settings)


def _write_safetensors(folder: Path, model: nn.Module, settings: Settings) -> None:
    from safetensors.torch import save_file

    inner = model.network if isinstance(model, variants.FromUint8) else model
    # Copies, as safetensors refuses tensors that share memory.
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in inner.state_dict().items()}
    about = settings["model"] | {name: settings[name] for name in VARIANTS}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", METADATA: json.dumps(about)})
    if "rows" in settings:
        (folder / "model.py").write_text(source(), encoding="utf-8")


def _export(model: nn.Module, settings: Settings) -> torch.export.ExportedProgram:
    dtype = torch.uint8 if settings["uint8_input"] else torch.float32
    example = torch.zeros(2, 3, 32, 32, dtype=dtype)  # a batch of 1 would count as constant
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _write_torch_export(folder: Path, model: nn.Module, settings: Settings) -> None:
    torch.export.save(_export(model, settings), folder / "model.pt2")


def _write_onnx(folder: Path, model: nn.Module, settings: Settings) -> None:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(_export(model, settings), (), dynamo=True, verbose=False, **names)
    assert program is not None
    program.save(folder / "model.onnx", external_data=False)


_WRITERS: dict[str, Callable[[Path, nn.Module, Settings], None]] = {
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "torch_export": _write_torch_export,
}


def outputs(format_: str, folder: Path, images: Tensor, plain: Callable[[], nn.Module]) -> Tensor:
    """Logits (N, 10) that the written files of one format compute for `images`, in batches.

    Args:
        plain: makes the network, without what makes uint8 its input, for weights without model.py.
    """
    compute = _READERS[format_](folder, plain)
    with torch.inference_mode():
        return torch.cat([compute(batch) for batch in torch.split(images, 200)])


def _read_safetensors(folder: Path, plain: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    if (folder / "model.py").exists():
        module: nn.Module = runpy.run_path(str(folder / "model.py"))["load"](path)
        return module
    settings, module = json.loads((folder / "config.json").read_text(encoding="utf-8")), plain()
    module.load_state_dict(load_file(path))
    return variants.FromUint8(module, settings["mean"], settings["std"]) if settings["uint8_input"] else module


def _read_torch_export(folder: Path, _: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    return torch.export.load(folder / "model.pt2").module()


def _read_onnx(folder: Path, _: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


_READERS: dict[str, Callable[[Path, Callable[[], nn.Module]], Callable[[Tensor], Tensor]]] = {
    "safetensors": _read_safetensors,
    "onnx": _read_onnx,
    "torch_export": _read_torch_export,
}


def source() -> str:
    """The text of model.py: the modules in `_PARTS` one after the other, without their imports of each other.

    Raises:
        AssertionError: two modules define the same name.
    """
    imports, bodies, defined = set[str](), list[str](), list[str]()
    for module in _PARTS:
        assert module.__file__ is not None
        text = Path(module.__file__).read_text(encoding="utf-8")
        lines, end = text.splitlines(), 0
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                origin = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                found = {f"{origin}import {ast.unparse(alias)}" for alias in node.names}
                imports |= {line for line in found if "cifar_dist" not in line}
            elif not isinstance(node, ast.Expr) or end > 0:  # not the docstring of the module
                bodies.append("\n".join(lines[end : node.end_lineno]))
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                defined.append(node.name)
            end = node.end_lineno or 0
    assert len(defined) == len(set(defined)), "two modules define the same name"
    head = '"""The network of model.safetensors: `load("model.safetensors")`. Needs torch and safetensors only."""'
    return "\n".join([head, "", *sorted(imports), *bodies, ""])
