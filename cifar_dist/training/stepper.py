"""One optimizer step: micro-batches forward and backward, gradients summed over ranks, the weights moved."""

from __future__ import annotations

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
from cifar_dist.limits import accumulation_steps
from cifar_dist.models.auxiliary import AUXILIARY_WEIGHT, Logits, without_auxiliary
from cifar_dist.models.registry import create_model
from cifar_dist.place import SLOW_S, Place, go
from cifar_dist.training import checkpoint, optim
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.precision import NumberFormat
from cifar_dist.training.schedule import LOW_RESOLUTION, Step

_BUILDS = Place("building and compiling the network", limit_s=SLOW_S)
_READS, _READS_FIRST = Place("reading data"), Place("reading the first data", limit_s=SLOW_S)  # FFCV compiles
_COMPUTES = Place("a forward or backward pass")
_EXCHANGES = Place("the gradient exchange", waits=True)
_UPDATES = Place("the update of the weights")


class Stepper:
    """All that a step changes. The raw `model` owns the weights; `_stepped`, the same one compiled and wrapped in
    DDP, only steps."""

    def __init__(self, config: Config, world: World, number_format: NumberFormat) -> None:
        go(_BUILDS)
        self.config, self.world, self.number_format = config, world, number_format
        self.accumulation = accumulation_steps(config.train.batch_size, config.train.micro_batch_size, world.size)
        torch.manual_seed(derive(config.run.seed, "init"))
        self.model = create_model(config.model, world.device.type).to(world.device, number_format.parameters)
        if config.train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if config.optim.norm_scales == "fixed":
            optim.fix_norm_scales(self.model)
        muon_dtype = number_format.muon
        self.optimizer = optim.build_optimizer(self.model, config.optim, config.train.batch_size, muon_dtype)
        self.scaler = number_format.grad_scaler()
        self._main = without_auxiliary(self.model)
        self.ema = optim.build_ema(self._main, config.optim)
        on_gpu = world.device.type == "cuda"
        self._compiled = config.train.compile == "on" or (config.train.compile == "auto" and on_gpu)
        self._augment = torch.compile(augment.apply, dynamic=False) if self._compiled else augment.apply
        self._reads = _READS_FIRST
        self._stepped = self._wrap()

    def _wrap(self) -> nn.Module:
        self.model.train()
        stepped: nn.Module = self.model
        if self._compiled:
            # A wrapper of its own: the raw model stays uncompiled for evaluation, and its state-dict keys clean.
            stepped = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        if self.world.size > 1:
            stepped = data_parallel(stepped)
        elif not self._compiled:
            return stepped
        # One pass of zeros per size compiles before the clock runs. And DDP regroups its buckets after the first
        # backward pass, while sums over three or more ranks round by bucket: so a resumed run adds up like one that
        # never stopped.
        num, share = self.config.train.micro_batch_size, self.config.augment.low_resolution_share
        images = torch.zeros(num, 32, 32, 3, dtype=torch.uint8, device=self.world.device).permute(0, 3, 1, 2)
        draws = augment.draw(torch.arange(num, device=self.world.device), 0, 0, self.config.augment)
        for side in (*([LOW_RESOLUTION] if share > 0 else []), *([None] if share < 1 else [])):
            inputs = self._inputs(images, draws, side)
            with self.number_format.autocast():
                logits, auxiliary = _outputs(stepped(inputs))
                torch.autograd.backward(sum((output.sum() for output in auxiliary), logits.sum()) * 0)
        self.optimizer.zero_grad()
        return stepped

    @property
    def scored_model(self) -> nn.Module:
        """What is evaluated: the moving average where there is one; without auxiliary heads."""
        return self._main if self.ema is None else self.ema.module

    def step(self, step: Step, batches: Iterator[tuple[int, Batch]], metrics: Metrics) -> None:
        """Do one optimizer step; takes `accumulation` (epoch, micro-batch)s."""
        for group in self.optimizer.param_groups:
            group["lr"] = step.lr_share * group["peak_lr"]
        for part in range(self.accumulation):
            go(self._reads)
            epoch, batch = next(batches)
            self._reads = _READS
            go(_COMPUTES)
            self._forward_backward(step, part, epoch, batch, metrics)
        go(_UPDATES)
        if self.config.optim.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self._main)

    def _forward_backward(self, step: Step, part: int, epoch: int, batch: Batch, metrics: Metrics) -> None:
        config = self.config
        draws = augment.draw(batch.indices, config.run.seed, epoch, config.augment)
        images = self._inputs(batch.images, draws, step.side)
        if config.model.dropout or config.model.auxiliary:
            # By place in the global batch, not by rank, so that dropout too is the same at any world size.
            place = self.world.rank * self.accumulation + part
            torch.manual_seed(derive(config.run.seed, "dropout", step.number, place))
        with self._no_sync() if part < self.accumulation - 1 else contextlib.nullcontext():
            with self.number_format.autocast():
                logits, auxiliary = _outputs(self._stepped(images))
            loss = self._loss(logits, batch.labels)
            total = loss + AUXILIARY_WEIGHT * sum(self._loss(output, batch.labels) for output in auxiliary)
            if part == self.accumulation - 1 and self.world.size > 1:
                go(_EXCHANGES)
            self._backward(step.number, total / self.accumulation)
        with torch.no_grad():
            finite = torch.isfinite(total)
            metrics.add(step.number, loss, finite, logits, batch.labels, augment.receipt_words(batch.indices, draws))

    def _inputs(self, images: Tensor, draws: augment.Draws, side: int | None) -> Tensor:
        """What the network is fed: (N, 3, H, W) uint8, augmented, in its number format and memory order."""
        augmented = self._augment(images, draws, self.config.augment.cutout, self.number_format.inputs, side)
        return augmented if self.config.train.channels_last else augmented.contiguous()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.optim.label_smoothing
        return F.cross_entropy(logits.to(self.number_format.parameters), labels, label_smoothing=smoothing)

    def _backward(self, step: int, loss: Tensor) -> None:
        try:
            torch.autograd.backward(self.scaler.scale(loss))
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            # What anomaly detection says; the forward operation is in the warning that it prints before.
            where = f"in step {step + 1} on rank {self.world.rank}"
            raise NonFiniteError(f"{where}: {str(error).splitlines()[0]}") from error

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        wrapped = isinstance(self._stepped, DistributedDataParallel)
        return self._stepped.no_sync() if wrapped else contextlib.nullcontext()  # type: ignore[operator]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this, the same on every rank."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": self.number_format.name,
        }

    def restore(self, state: dict[str, Any], origin: str) -> None:
        """Go back to a state from `state()`.

        Raises:
            CheckpointError: it is of another model, or was computed in another number format.
        """
        if state["precision"] != self.number_format.name:
            raise CheckpointError(
                f"{origin} was computed in {state['precision']}, this run is in {self.number_format.name}. "
                f"Give --train.precision {state['precision']} to go on as before, or start another run."
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
    """The logits of the main classifier and those of the auxiliary ones."""
    return outputs if isinstance(outputs, Logits) else (outputs, ())
