"""The trail of a start-up: where its seconds went."""

from __future__ import annotations

import time

import pytest

from cifar_dist import phase
from cifar_dist.phase import Phase, in_phase, seconds_by_phase, set_phase


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> phase.Current:
    fresh = phase.Current(Phase("starting"))
    monkeypatch.setattr(phase, "current", fresh)
    return fresh


def test_seconds_at_each_place(current: phase.Current) -> None:
    set_phase(Phase("data"))
    time.sleep(0.05)
    with in_phase(Phase("waiting")):
        time.sleep(0.1)
    time.sleep(0.05)
    set_phase(Phase("step"))
    time.sleep(0.02)
    spent = seconds_by_phase(age_s=10.22)
    assert list(spent) == ["python and imports", "data", "waiting", "step"]
    assert spent["data"] == pytest.approx(0.1, abs=0.04)  # before and after the wait
    assert spent["waiting"] == pytest.approx(0.1, abs=0.04)
    assert spent["step"] == pytest.approx(0.02, abs=0.03)
    assert sum(spent.values()) == pytest.approx(10.22)
    assert current.phase.name == "step"
