"""Every setting of a training run, typed and frozen.

This module imports no torch, so that `--help` answers at once. The defaults are those of
`configs/googlenet.yaml`. A function elsewhere receives its section or plain values, never the whole `Config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
    stall_timeout_s: int = 300
    """Seconds without progress after which a run says which rank holds it up, and ends. 0: it waits."""


@dataclass(frozen=True)
class DataConfig:
    dir: Path = Path("data")
    """Holds train.beton, test.beton and manifest.json; prepared when missing."""
    source: str = "auto"
    """Where to prepare from: auto, official, npm, or a folder or archive of your own."""
    stage_dir: Path | None = None
    """A folder on each machine's own disk, to which the dataset is copied once and then read from, if there is room."""
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
    check_ranks_every_steps: int = 100
    """Steps after which all ranks compare checksums of their weights, at the next log step. 0: only before a
    checkpoint is saved, as always."""
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
    low_resolution_share: float = 0.0
    """Share of all steps, the first ones, whose images are reduced from 32x32 to 24x24 pixels (progressive resizing, as
    in arXiv 2104.00298), at little more than half the cost."""


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: int = 5
    """Epochs between validations (data.train_on train only); the last epoch is always validated. 0: last only."""
    batch_size: int = 500
    """Samples per forward pass of an evaluation, and of each part whose batch-norm statistics are averaged."""
    bn_samples: int = 5_000
    """Training samples for the batch-norm statistics before scoring, and for the filters of a whitening stem."""
    test_subset: int | None = None
    """Score only that many test images at the end of a run, to try things out quickly; the counts of the classes differ
    by one at most. Tables of results refuse such a run. `evaluate` scores its checkpoints on all 10,000 images."""
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
