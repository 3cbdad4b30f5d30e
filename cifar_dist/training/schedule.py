"""When things happen, counted in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from cifar_dist.config import Config

LOW_RESOLUTION = 24  # pixels on a side


@dataclass(frozen=True)
class Step:
    """What an optimizer step does not share with all others."""

    number: int  # from 0
    lr_share: float  # of the peak learning rates
    side: int | None = None  # of its images, in pixels; None: as they are


@dataclass(frozen=True)
class Schedule:
    """Durations in steps; `done` is the number of steps done."""

    steps_per_epoch: int
    total_steps: int
    log_every: int
    checkpoint_every: int
    validate_every: int  # 0: at the end only
    low_resolution_steps: int

    def side(self, done: int) -> int | None:
        """The side of the next step's images in pixels, None: as they are."""
        return LOW_RESOLUTION if done < self.low_resolution_steps else None

    def ends_epoch(self, done: int) -> bool:
        return done % self.steps_per_epoch == 0

    def should_save(self, done: int) -> bool:
        return done == self.total_steps or bool(self.checkpoint_every and done % self.checkpoint_every == 0)

    def should_validate(self, done: int) -> bool:
        return done == self.total_steps or bool(self.validate_every and done % self.validate_every == 0)

    def should_log(self, done: int) -> bool:
        return done == self.total_steps or done % self.log_every == 0

    def should_read(self, done: int) -> bool:
        """Whether to wait for the device and read the metrics: to log, where an epoch ends, to close its receipt, and
        before saving, to know that all losses were finite."""
        due = self.ends_epoch(done) or self.should_save(done) or self.should_validate(done)
        return due or self.should_log(done)


def schedule_of(config: Config, steps_per_epoch: int) -> Schedule:
    train = config.train
    total = train.max_steps if train.max_steps is not None else train.epochs * steps_per_epoch
    every = config.eval.every_epochs * steps_per_epoch
    small = round(config.augment.low_resolution_share * total)
    return Schedule(steps_per_epoch, total, train.log_every_steps, train.checkpoint_every_steps, every, small)
