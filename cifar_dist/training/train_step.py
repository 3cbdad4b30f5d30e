"""One optimizer step: augment, forward and backward of each micro-batch, average over ranks, update the weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.config import Config
from cifar_dist.data import augment
from cifar_dist.data.loader import Batch
from cifar_dist.distributed import World, data_parallel
from cifar_dist.errors import CheckpointError, NonFiniteError
from cifar_dist.hashing import derive
from cifar_dist.models.architectures import create_model
from cifar_dist.models.network import AUXILIARY_WEIGHT, Logits, without_auxiliary
from cifar_dist.phase import SLOW_S, Phase, set_phase
from cifar_dist.training import checkpoint, optim
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import Precision
from cifar_dist.training.schedule import LOW_RESOLUTION, Step

_BUILD = Phase("building and compiling the network", limit_s=SLOW_S)
_READ, _READ_FIRST = Phase("reading data"), Phase("reading the first data", limit_s=SLOW_S)  # FFCV compiles
_COMPUTE = Phase("a forward or backward pass")
_EXCHANGE = Phase("the gradient exchange", waits=True)  # with the last backward pass, during which DDP exchanges
_UPDATE = Phase("the update of the weights")


class TrainStep:
    """Model, optimizer, gradient scaler and moving average: everything that an optimizer step changes.

    `model` owns the weights. `_parallel_model` is the same model, compiled and wrapped in DDP; only `run` calls it.
    """

    def __init__(self, config: Config, world: World, precision: Precision) -> None:
        set_phase(_BUILD)
        self.config, self.world, self.precision = config, world, precision
        # An integer: cli.load_config has checked it.
        self.accumulation = config.train.batch_size // (config.train.micro_batch_size * world.size)
        torch.manual_seed(derive(config.run.seed, "init"))
        self.model = create_model(config.model, world.device.type).to(world.device, precision.parameters)
        if config.train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if config.optim.norm_scales == "fixed":
            optim.freeze_bn_scales(self.model)
        self.optimizer = optim.build_optimizer(self.model, config.optim, config.train.batch_size, precision.muon)
        self.scaler = precision.grad_scaler()
        self._without_auxiliary = without_auxiliary(self.model)
        self.ema = (
            None if config.optim.ema_decay is None else optim.Ema(self._without_auxiliary, config.optim.ema_decay)
        )
        on_gpu = world.device.type == "cuda"
        self._compiled = config.train.compile == "on" or (config.train.compile == "auto" and on_gpu)
        self._augment = torch.compile(augment.apply, dynamic=False) if self._compiled else augment.apply
        self._read_phase = _READ_FIRST
        self._parallel_model = self._wrap()

    def _wrap(self) -> nn.Module:
        """The model compiled and in DDP, as configured, after one forward and backward pass of zeros per image size."""
        self.model.train()
        wrapped: nn.Module = self.model
        if self._compiled:
            # Not model.compile(): evaluation uses the uncompiled model, and state-dict keys stay as they are.
            wrapped = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        if self.world.size > 1:
            wrapped = data_parallel(wrapped)
        elif not self._compiled:
            return wrapped
        # The passes of zeros compile before training time is measured. They also make DDP rebuild its buckets, as it
        # does after the first backward pass: with 3 or more ranks the rounding of a sum depends on the buckets, so
        # otherwise the first step after a resume would round differently.
        num, fraction = self.config.train.micro_batch_size, self.config.augment.low_resolution_share
        images = torch.zeros(num, 32, 32, 3, dtype=torch.uint8, device=self.world.device).permute(0, 3, 1, 2)
        params = augment.sample_params(torch.arange(num, device=self.world.device), 0, 0, self.config.augment)
        for image_size in (*([LOW_RESOLUTION] if fraction > 0 else []), *([None] if fraction < 1 else [])):
            inputs = self._inputs(images, params, image_size)
            with self.precision.autocast():
                logits, auxiliary = _outputs(wrapped(inputs))
                torch.autograd.backward(sum((output.sum() for output in auxiliary), logits.sum()) * 0)
        self.optimizer.zero_grad()
        return wrapped

    @property
    def scored_model(self) -> nn.Module:
        """The model to evaluate, without auxiliary heads: the moving average if there is one."""
        return self._without_auxiliary if self.ema is None else self.ema.module

    def run(self, step: Step, batches: Iterator[tuple[int, Batch]], metrics: Metrics) -> None:
        """Do one optimizer step. Takes `accumulation` pairs (epoch, micro-batch) from `batches`."""
        for group in self.optimizer.param_groups:
            group["lr"] = step.lr_fraction * group["peak_lr"]
        for k in range(self.accumulation):
            set_phase(self._read_phase)
            epoch, batch = next(batches)
            self._read_phase = _READ
            set_phase(_COMPUTE)
            self._forward_backward(step, k, epoch, batch, metrics)
        set_phase(_UPDATE)
        if self.config.optim.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self._without_auxiliary)

    def _forward_backward(self, step: Step, k: int, epoch: int, batch: Batch, metrics: Metrics) -> None:
        """Forward and backward of micro-batch `k` of this step; the last one exchanges the gradients."""
        config, last = self.config, k == self.accumulation - 1
        params = augment.sample_params(batch.indices, config.run.seed, epoch, config.augment)
        images = self._inputs(batch.images, params, step.image_size)
        if config.model.dropout or config.model.auxiliary:
            # By the position in the global batch, so equal for any number of ranks. Auxiliary heads have dropout, too.
            position = self.world.rank * self.accumulation + k
            torch.manual_seed(derive(config.run.seed, "dropout", step.number, position))
        model = self._parallel_model
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
            with self.precision.autocast():
                logits, auxiliary = _outputs(model(images))
            loss = self._loss(logits, batch.labels)
            total = loss + AUXILIARY_WEIGHT * sum(self._loss(output, batch.labels) for output in auxiliary)
            if last and self.world.size > 1:
                set_phase(_EXCHANGE)
            # Micro-batches have one size, so with DDP's mean over ranks this is the mean over the global batch.
            self._backward(step.number, total / self.accumulation)
        with torch.no_grad():
            finite = torch.isfinite(total)
            metrics.add(step.number, loss, finite, logits, batch.labels, augment.receipt_words(batch.indices, params))

    def _inputs(self, images: Tensor, params: augment.AugmentParams, image_size: int | None) -> Tensor:
        """Augment (N, 3, H, W) uint8 `images` into the network's dtype and memory format."""
        augmented = self._augment(images, params, self.config.augment.cutout, self.precision.inputs, image_size)
        return augmented if self.config.train.channels_last else augmented.contiguous()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.optim.label_smoothing
        return F.cross_entropy(logits.to(self.precision.parameters), labels, label_smoothing=smoothing)

    def _backward(self, step: int, loss: Tensor) -> None:
        try:
            torch.autograd.backward(self.scaler.scale(loss))
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            # From anomaly detection, which has printed the forward operation in a warning.
            where = f"in step {step + 1} on rank {self.world.rank}"
            raise NonFiniteError(f"{where}: {str(error).splitlines()[0]}") from error

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that belongs to this class; equal on all ranks."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": self.precision.name,
        }

    def restore(self, state: dict[str, Any], origin: str) -> None:
        """Load what `state()` returned.

        Raises:
            CheckpointError: it belongs to another model, optimizer or precision.
        """
        if state["precision"] != self.precision.name:
            raise CheckpointError(
                f"{origin} was trained in {state['precision']}, this run is in {self.precision.name}. "
                f"Give --train.precision {state['precision']} to resume, or start another run."
            )
        checkpoint.load_weights(self.model, state["model"], origin)
        if self.ema is not None:
            checkpoint.load_weights(self.ema, state["ema"], origin)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{origin} holds the state of another optimizer: {error}.") from None
        self.scaler.load_state_dict(state["scaler"])


def _outputs(outputs: Tensor | Logits) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The logits of the main classifier, and those of the auxiliary classifiers."""
    return outputs if isinstance(outputs, Logits) else (outputs, ())
