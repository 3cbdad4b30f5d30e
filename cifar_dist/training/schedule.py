"""When things happen in a run, counted in optimizer steps, and the learning rate of each step."""

import math
from dataclasses import dataclass

from cifar_dist.config import Config, OptimConfig

LOW_RESOLUTIONS = (20, 24, 28)  # image sizes in pixels, one after the other, each for as many steps


@dataclass(frozen=True)
class Step:
    """What differs from one optimizer step to the next.

    Args:
        number: counts from 0.
        lr_fraction: learning rate divided by its peak.
        image_size: images are resized to this many pixels on a side; None: not resized.
        logged: whether metrics are logged after it.
    """

    number: int
    lr_fraction: float
    image_size: int | None = None
    logged: bool = False


@dataclass(frozen=True)
class Schedule:
    """The intervals of a run. In the methods `done` is the number of finished steps."""

    config: Config
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        train = self.config.train
        return train.epochs * self.steps_per_epoch if train.max_steps is None else train.max_steps

    @property
    def low_resolution_steps(self) -> int:
        return round(self.config.augment.low_resolution_share * self.total_steps)

    def step(self, number: int) -> Step:
        low = self.low_resolution_steps
        image_size = LOW_RESOLUTIONS[number * len(LOW_RESOLUTIONS) // low] if number < low else None
        rate = lr_fraction(number, self.total_steps, self.config.optim)
        return Step(number, rate, image_size, logged=self.should_log(number + 1))

    def ends_epoch(self, done: int) -> bool:
        return done % self.steps_per_epoch == 0

    def should_save(self, done: int) -> bool:
        return self._is_due(done, self.config.train.checkpoint_every_steps)

    def should_validate(self, done: int) -> bool:
        return self._is_due(done, self.config.eval.every_epochs * self.steps_per_epoch)

    def should_log(self, done: int) -> bool:
        return self._is_due(done, self.config.train.log_every_steps)

    def should_read_metrics(self, done: int) -> bool:
        """Whether to wait for the device and copy the metrics to the host.

        Needed for logging, for the data receipt at the end of an epoch, and before saving, when all losses must be
        known to be finite.
        """
        due = self.ends_epoch(done) or self.should_save(done) or self.should_validate(done)
        return due or self.should_log(done)

    def _is_due(self, done: int, every: int) -> bool:
        return done == self.total_steps or (every > 0 and done % every == 0)


def lr_fraction(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of `step` (from 0) divided by its peak: linear warm-up, then linear or cosine decay to zero.

    The warm-up ends after `warmup_share` of all steps.
    """
    warmup = round(config.warmup_share * total_steps)
    rise = (step + 1) / max(1, warmup)
    progress = max(0.0, (step - warmup) / max(1, total_steps - warmup))
    fall = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return min(1.0, rise, fall)
