"""What the watchdog says at the start; stalled and lost ranks are in tests/runs/test_running_faults.py."""

from __future__ import annotations

import time

import pytest
import torch

from cifar_dist.distributed import World
from cifar_dist.fault_tolerance.watchdog import Watchdog
from cifar_dist.phase import Phase, current, set_phase

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def test_long_phases_before_the_first_step_are_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[str] = []
    monkeypatch.setattr(current, "step", 0)
    with Watchdog(ALONE, 0, announce=announced.append):
        for name, seconds in (("reading", 6.5), ("short", 0.5), ("compiling", 5.0)):
            set_phase(Phase(name))
            time.sleep(seconds)
        current.step = 1
        set_phase(Phase("a step"))
        time.sleep(5.0)
    assert announced == ["reading", "compiling"]
