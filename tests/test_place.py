"""The trail of a start-up: where its seconds went."""

from __future__ import annotations

import time

import pytest

from cifar_dist import place
from cifar_dist.place import Place, at, end_trail, go


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> place.Here:
    fresh = place.Here(Place("starting"), trail=[])
    monkeypatch.setattr(place, "here", fresh)
    return fresh


def test_seconds_at_each_place(here: place.Here) -> None:
    go(Place("data"))
    time.sleep(0.05)
    with at(Place("waiting")):
        time.sleep(0.1)
    time.sleep(0.05)
    go(Place("step"))
    time.sleep(0.02)
    spent = end_trail(age_s=10.22)
    assert list(spent) == ["python and imports", "data", "waiting", "step"]
    assert spent["data"] == pytest.approx(0.1, abs=0.04)  # before and after the wait
    assert spent["waiting"] == pytest.approx(0.1, abs=0.04)
    assert spent["step"] == pytest.approx(0.02, abs=0.03)
    assert sum(spent.values()) == pytest.approx(10.22)
    assert here.trail is None


def test_only_the_first_step_ends_it(here: place.Here) -> None:
    go(Place("data"))
    end_trail(1.0)
    go(Place("step"))
    assert here.trail is None
    assert end_trail(2.0) == {}
    assert here.moves == 2
