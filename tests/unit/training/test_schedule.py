"""When things happen in a run, and the learning rate of each step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cifar_dist.config import AugmentConfig, Config, OptimConfig, TrainConfig
from cifar_dist.training.schedule import Schedule, lr_fraction


def test_learning_rate_rises_then_falls_to_zero() -> None:
    config = OptimConfig(warmup_share=0.2)
    shares = [lr_fraction(step, 100, config) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 20)
    assert shares[19] == shares[20] == max(shares) == 1
    assert shares[60] == pytest.approx(0.5)
    assert shares[100] == 0
    cosine = replace(config, schedule="cosine")
    assert lr_fraction(60, 100, cosine) == pytest.approx(0.5)
    assert lr_fraction(40, 100, cosine) == pytest.approx((1 + 2**-0.5) / 2)
    assert lr_fraction(0, 1, replace(config, warmup_share=0)) == 1


def test_schedule_counts_in_steps() -> None:
    config = Config(train=TrainConfig(epochs=3, checkpoint_every_steps=4, log_every_steps=3))
    schedule = Schedule(config, steps_per_epoch=5)
    assert schedule.total_steps == 15
    assert [s for s in range(1, 16) if schedule.should_save(s)] == [4, 8, 12, 15]
    assert [s for s in range(1, 16) if schedule.should_log(s)] == [3, 6, 9, 12, 15]
    assert [s for s in range(1, 16) if schedule.should_read_metrics(s)] == [3, 4, 5, 6, 8, 9, 10, 12, 15]
    assert {schedule.step(done).image_size for done in range(15)} == {None}
    assert Schedule(replace(config, train=TrainConfig(max_steps=7)), 5).total_steps == 7
    small = Schedule(replace(config, augment=AugmentConfig(low_resolution_share=0.4)), 5)
    assert [small.step(done).image_size for done in range(15)] == [20, 20, 24, 24, 28, 28] + [None] * 9
