"""One optimizer step: augment, forward and backward of each micro-batch, sum over ranks, update the weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.config import NETWORKS, OPTIMIZERS, Config
from cifar_dist.data import augment
from cifar_dist.data.loader import Batch
from cifar_dist.distributed import World, data_parallel, run_and_sync_errors
from cifar_dist.errors import CheckpointError, NonFiniteError
from cifar_dist.hashing import derive
from cifar_dist.models.architectures import create_model
from cifar_dist.models.network import without_auxiliary
from cifar_dist.phase import SLOW_S, VERY_SLOW_S, Phase, current, set_phase
from cifar_dist.training import checkpoint, optim
from cifar_dist.training.exact_sum import ExactSum
from cifar_dist.training.flat_network import FlatNetwork
from cifar_dist.training.metrics import Metrics
from cifar_dist.training.optim import learning_rates
from cifar_dist.training.precision import Precision, compile_for_training, is_compiled
from cifar_dist.training.schedule import LOW_RESOLUTIONS, Step

_BUILD = Phase("building and compiling the network", limit_s=SLOW_S)
_COMPILE = _BUILD._replace(limit_s=VERY_SLOW_S)
_READ, _READ_FIRST = Phase("reading data"), Phase("reading the first data", limit_s=SLOW_S)  # FFCV compiles
_COMPUTE = Phase("a forward or backward pass")
_EXCHANGE = Phase("the gradient exchange", waits=True)  # with exact_sum off it includes the last backward pass
_UPDATE = Phase("the update of the weights")


class TrainStep:
    """Model, optimizer, gradient scaler and moving average: everything that an optimizer step changes.

    `model` owns the weights. `prepare` compiles it and wraps it in DDP, also for a single process, so that any number
    of processes computes the same. Only `run` calls the wrapped model.
    """

    def __init__(self, config: Config, world: World, precision: Precision) -> None:
        set_phase(_BUILD)
        self.config, self.world, self.precision = config, world, precision
        self.num_micro_batches = config.train.batch_size // config.train.micro_batch_size
        self.accumulation = self.num_micro_batches // world.size  # an integer: cli.load_config has checked it
        torch.manual_seed(derive(config.run.seed, "init"))
        self.model = create_model(config.model).to(world.device, precision.parameters)
        if config.train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if config.optim.norm_scales == "fixed":
            optim.freeze_bn_scales(self.model)
        # The exact sum adds over all ranks; DDP's own exchange divides by their number.
        num_added = self.num_micro_batches if config.train.exact_sum == "on" else self.accumulation
        self._network = FlatNetwork(self.model, config.optim.label_smoothing, num_added)
        self.optimizer = optim.build_optimizer(self.model, config.optim, config.train.batch_size, precision.muon)
        self.scaler = precision.grad_scaler()
        self._without_auxiliary = without_auxiliary(self.model)
        self.ema = (
            None if config.optim.ema_decay is None else optim.Ema(self._without_auxiliary, config.optim.ema_decay)
        )
        self._compiled = is_compiled(config.train.compile, world.device.type)
        self._extra = augment.own_augmentation(config.augment.extra)
        # Whether a forward pass, or own code, may draw random numbers of torch. Auxiliary heads have dropout.
        own = config.model.name not in NETWORKS or self._extra is not None
        self._draws = own or config.model.dropout > 0 or config.model.auxiliary
        self._augment = augment.augment_batch
        if self._compiled:
            self._augment = compile_for_training(augment.augment_batch)
        self._keys: tuple[int, Tensor] | None = None  # an epoch, and what augment.epoch_keys gives for it
        self._read_phase = _READ_FIRST
        self._parallel_network: DistributedDataParallel
        self._exact_sum: ExactSum | None = None
        self._gradient_norm = torch.zeros(())  # of the newest logged step, before clipping; () on the device
        self.prepared = False

    def prepare(self) -> None:
        """Compile the model and wrap it in DDP, and pass zeros. A second call does nothing.

        The passes compile before training time is measured. DDP makes its bucket anew before the second one, and the
        bucket may not change while `ExactSum` adds.
        """
        if self.prepared:
            return
        self.prepared = True
        set_phase(_BUILD)
        self.model.train()
        network: Any = self._network
        if self._compiled:
            # Evaluation uses the uncompiled model.
            network = compile_for_training(network, cuda_graphs=self.config.train.cuda_graphs == "on")
        self._parallel_network = data_parallel(network)
        if self._compiled:
            # Without an exchange of gradients, in which a rank would wait for one that compiles for longer.
            set_phase(_COMPILE)
            with self._parallel_network.no_sync():
                run_and_sync_errors(self.world, self._pass_zeros, timeout_s=int(VERY_SLOW_S))
            self._network.flat.grad = None
            set_phase(_BUILD)
        self._pass_zeros()
        self._network.share_gradient()
        self._zero_gradient()
        if self.config.train.exact_sum == "on":
            self._exact_sum = ExactSum(
                self._parallel_network, self.precision.name, self.num_micro_batches, several_ranks=self.world.size > 1
            )

    def _pass_zeros(self) -> None:
        """A forward and backward pass of zeros per image size, two at least."""
        num, share = self.config.train.micro_batch_size, self.config.augment.low_resolution_share
        images = torch.zeros(num, 32, 32, 3, dtype=torch.uint8, device=self.world.device).permute(0, 3, 1, 2)
        batch = Batch(images, *torch.zeros(2, num, dtype=torch.int64, device=self.world.device))
        sizes = (*LOW_RESOLUTIONS, *([None] if share < 1 else [])) if share > 0 else (None, None)
        for image_size in sizes:
            loss, _ = self._forward(self._inputs(batch, 0, image_size)[0], batch.labels)
            torch.autograd.backward(loss * 0)

    @property
    def scored_model(self) -> nn.Module:
        """The model to evaluate, without auxiliary heads: the moving average if there is one."""
        return self._without_auxiliary if self.ema is None else self.ema.module

    def run(self, step: Step, batches: Iterator[tuple[int, Batch]], metrics: Metrics) -> None:
        """Do one optimizer step, after `prepare`. Takes `accumulation` pairs (epoch, micro-batch) from `batches`."""
        for group in self.optimizer.param_groups:
            group["lr"] = step.lr_fraction * group["peak_lr"]
        for k in range(self.accumulation):
            set_phase(self._read_phase)
            epoch, batch = next(batches)
            self._read_phase = _READ
            set_phase(_COMPUTE)
            self._forward_backward(step, k, epoch, batch, metrics)
        if self._exact_sum is not None:
            set_phase(_EXCHANGE)
            usable = self._exact_sum.finish()
            if self.scaler.is_enabled():  # it skips such a step and halves its scale; at 1 that cannot help
                usable |= self.scaler.scale(torch.ones_like(usable, dtype=torch.float32)) > 1
            metrics.add_gradient(step.number, usable)
        set_phase(_UPDATE)
        if step.logged:
            self._gradient_norm = self._norm()
        if self.config.optim.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip)
        if self.config.optim.name not in OPTIMIZERS:  # an own one may draw random numbers, the same on all ranks
            torch.manual_seed(derive(self.config.run.seed, "optimizer", step.number))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._zero_gradient()
        if self.ema is not None:
            self.ema.update_parameters(self._without_auxiliary)

    def _norm(self) -> Tensor:
        """Euclidean norm of the gradient of all parameters, (); does not wait for the device."""
        norm: Tensor = torch.linalg.vector_norm(self._network.flat.grad)
        scale: Tensor = self.scaler.scale(torch.ones_like(norm))
        return norm / scale

    def _zero_gradient(self) -> None:
        """Zero the gradients of all parameters, which stay parts of DDP's bucket."""
        assert self._network.flat.grad is not None
        self._network.flat.grad.zero_()

    def _forward_backward(self, step: Step, k: int, epoch: int, batch: Batch, metrics: Metrics) -> None:
        """Forward and backward of micro-batch `k` of this step; the last one exchanges the gradients."""
        config, last = self.config, k == self.accumulation - 1
        if self._draws:
            # By the position in the global batch, so equal for any number of ranks.
            position = self.world.rank * self.accumulation + k
            torch.manual_seed(derive(config.run.seed, "dropout", step.number, position))
        images, receipt = self._inputs(batch, epoch, step.image_size)
        exact_sum = self._exact_sum
        if exact_sum is not None:
            exact_sum.last = last
        with self._parallel_network.no_sync() if exact_sum is None and not last else contextlib.nullcontext():
            loss, counts = self._forward(images, batch.labels)
            if last and exact_sum is None and self.world.size > 1:
                set_phase(_EXCHANGE)
            self._backward(step.number, loss)
        metrics.add(step.number, counts, receipt)

    def _inputs(self, batch: Batch, epoch: int, image_size: int | None) -> tuple[Tensor, Tensor]:
        """The network's input images (N, 3, S, S), augmented, and the micro-batch's part of the data receipt."""
        if self._keys is None or self._keys[0] != epoch:
            self._keys = epoch, augment.epoch_keys(self.config.run.seed, epoch, self.world.device)
        images, receipt = self._augment(
            batch.images,
            batch.indices,
            self._keys[1],
            self.config.augment,
            self.precision.inputs,
            image_size,
            self._extra,
        )
        return images if self.config.train.channels_last else images.contiguous(), receipt

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `FlatNetwork`."""
        with self.precision.autocast():
            loss, counts = self._parallel_network(images, labels)
        return loss, counts

    def _backward(self, step: int, loss: Tensor) -> None:
        try:
            torch.autograd.backward(self.scaler.scale(loss))
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            # From anomaly detection, which has printed the forward operation in a warning.
            where = f"in step {step + 1} on rank {self.world.rank}"
            raise NonFiniteError(f"{where}: {str(error).splitlines()[0]}") from error

    def figures(self, seconds: float) -> dict[str, float]:
        """Metrics of a logged step; waits for the device. `seconds`: training time since the last call."""
        figures = learning_rates(self.optimizer, self.config.optim)
        figures["gradient_norm"] = self._gradient_norm.item()
        figures["data_wait"] = min(1.0, current.seconds.pop(_READ.name, 0.0) / seconds)
        if self.world.device.type == "cuda":
            figures["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(self.world.device)
        return figures

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
