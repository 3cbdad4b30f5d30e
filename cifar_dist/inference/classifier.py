"""A trained network that is ready to classify pictures: the work of `cifar_dist.load`."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cifar_dist.config import NUM_CLASSES, NUM_TRAIN, NUM_VALIDATION, Config, Device
from cifar_dist.data.augment import normalize
from cifar_dist.data.cifar10 import CLASSES
from cifar_dist.errors import CheckpointError, UserError
from cifar_dist.files import read_json
from cifar_dist.inference.images import Picture, to_uint8
from cifar_dist.models.architectures import create_model
from cifar_dist.training import checkpoint
from cifar_dist.training.evaluation import further_views
from cifar_dist.training.precision import Precision, choose_precision, reproducible
from cifar_dist.training.run_directory import config_of, find_checkpoint
from cifar_dist.training.schedule import Schedule
from cifar_dist.training.summary import sha256_of_parameters
from cifar_dist.training.weights import scored_network

TTA = {"none": 1, "flip": 2, "six": 4}  # sum of the weights of the views
KEPT = ("step", "precision", "weights_sha256", "last_validation", "validation_due")  # of a checkpoint, by `Origin`
# In fp32 oneDNN rounds otherwise in small batches than in large ones. With torch 2.15 on a Xeon with AVX-512 and AMX,
# logits of inception_v1 and inception_v2 in batches of 1 to 15 differ from those in one of 64 (at width 0.0625 in
# batches of 1 and 2), those in 16 to 63 do not. Another CPU, or another torch, may differ by rounding all the same.
_EXACT_BATCH = 16


class Prediction(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


class Classifier(nn.Module):
    """A trained network in eval mode, in the precision of its run.

    Shapes: normalised images (N, 3, 32, 32), as `preprocess` returns them, to logits (N, 10), the same bits as in
    `python -m cifar_dist.evaluate`.
    """

    def __init__(self, network: nn.Module, origin: "Origin", precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.network = network.to(device, precision.parameters)
        if origin.config.train.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.origin, self.precision = origin, precision
        self.classes, self.config, self.scores = CLASSES, origin.config, origin.scores()
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, so of images and logits, too."""
        return next(self.network.parameters()).dtype

    def preprocess(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """Normalised images (N, 3, 32, 32) on the device, of one picture or a list; docs/models.md has the rules.

        Raises:
            ImageError: a picture cannot be used.
        """
        return normalize(to_uint8(pictures).to(self.device), self.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of normalised images (N, 3, 32, 32)."""
        n, device, dtype = len(images), self.device, self.dtype
        if not n:
            return torch.zeros(0, len(self.classes), dtype=dtype, device=device)
        # After double() or half() nothing is cast: that is another precision than the run's.
        inputs = self.precision.inputs if dtype == self.precision.parameters else dtype
        images = images.to(device, inputs)
        if device.type == "cpu" and inputs == dtype:
            images = torch.cat((images, images.new_zeros(-n % _EXACT_BATCH, *images.shape[1:])))
        images = images.contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast(device.type, inputs, enabled=inputs != dtype)
        with reproducible(device), _tf32(self.config.train.tf32), autocast:
            logits: Tensor = self.network(images)
        return logits[:n].to(dtype)

    @torch.inference_mode()
    def predict(
        self, pictures: Picture | Sequence[Picture], top_k: int = 3, tta: str = "none", batch_size: int = 128
    ) -> list[list[Prediction]]:
        """The `top_k` most probable classes of each picture, the most probable first. `tta` as in eval.tta.

        Raises:
            ImageError: a picture cannot be used.
        """
        if tta not in TTA or not 1 <= top_k <= NUM_CLASSES or batch_size < 1:
            raise UserError(
                f"tta is {tta!r}, top_k {top_k}, batch_size {batch_size}; valid: {', '.join(TTA)}; 1 to {NUM_CLASSES}; "
                f"1 or more."
            )
        found = []
        for images in torch.split(to_uint8(pictures), batch_size):
            logits = self._views(self.preprocess(images), tta)
            values, classes = logits.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
            for row in zip(values[:, :top_k].tolist(), classes[:, :top_k].tolist(), strict=True):
                found.append([Prediction(self.classes[k], p) for p, k in zip(*row, strict=True)])
        return found

    def _views(self, images: Tensor, tta: str) -> Tensor:
        """Mean logits over the views of `eval.tta`, as `Evaluator` adds them."""
        total: Tensor = self(images)
        for view, weight in further_views(images, tta):
            total = total + weight * self(view)
        return total / TTA[tta]


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a model was loaded from, without its tensors."""

    path: Path
    state: dict[str, Any]
    """The entries `KEPT`."""
    config: Config
    model_sha256: str
    """Of the trained parameters, as in summary.json."""

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def directory(self) -> Path:
        """The run directory, or the folder of a checkpoint that lies in none."""
        folder = self.path.absolute().parent
        return folder.parent if folder.name == "checkpoints" else folder

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json of the run, if the checkpoint is its final one; else empty."""
        found = read_json(self.directory / "summary.json")
        same = found.get("steps") == self.step and found.get("model_sha256") == self.model_sha256
        return found if same else {}

    def scores(self) -> dict[str, float]:
        """What this model scored, and on how many images: in the validation of its step, and in the final test.

        Empty if it was neither validated nor tested.
        """
        data, validation = self.config.data, self.state.get("last_validation")
        num_samples = (NUM_TRAIN - NUM_VALIDATION) if data.subset is None else data.subset
        schedule = Schedule(self.config, num_samples // self.config.train.batch_size)
        due = data.train_on == "train" and schedule.should_validate(self.step) and not self.state["validation_due"]
        scores = dict(validation) if due and validation else {}
        keys = ("test_accuracy", "test_accuracy_tta", "test_n", "test_loss")
        found = self.summary
        tested = {key.replace("_", "/", 1): found[key] for key in keys if found.get(key) is not None}
        return scores | tested


def load(run_or_checkpoint: str | Path, which: str | int = "last", device: Device = "auto") -> Classifier:
    """The trained model of a run directory or of a step-*.pt file, ready to classify.

    A checkpoint that names an own network (module:name) imports that module, which runs its code. If it comes from
    others, look at model.name in its config.yaml first.

    Args:
        which: of a run directory: last, best (by validation accuracy) or a step.
        device: auto takes the GPU where there is one.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it has no batch-norm statistics.
    """
    path = find_checkpoint(Path(run_or_checkpoint), which)
    state = checkpoint.decode(checkpoint.read_verified(path, need_digest=False), str(path))
    if not state["statistics"]:
        raise CheckpointError(
            f"{path} has no batch-norm statistics, so its model cannot be used yet. Write it again with them:\n"
            f"  python -m cifar_dist.evaluate {shlex.quote(str(path))} --write_statistics True"
        )
    config = config_of(state["config"], str(path))
    network = scored_network(state, config, str(path))
    target = _device(device)
    origin = Origin(path, {key: state[key] for key in KEPT}, config, _model_sha256(path, state, config))
    precision = choose_precision(config.train.precision, target, state["precision"])
    return Classifier(network, origin, precision, target)


def _model_sha256(path: Path, state: dict[str, Any], config: Config) -> str:
    with torch.random.fork_rng(devices=[]):
        model = create_model(config.model).to(Precision(state["precision"], "cpu").parameters)
    checkpoint.load_weights(model, state["model"], str(path))
    return sha256_of_parameters(model)


def _device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {wanted!r}; valid: auto, cpu, cuda")
    if wanted == "cuda" and not available:
        raise UserError("device is cuda, but torch finds no GPU here. Use auto or cpu.")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


@contextmanager
def _tf32(enabled: bool) -> Iterator[None]:
    """Inside, TF32 on GPUs as in the run; afterwards as before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
