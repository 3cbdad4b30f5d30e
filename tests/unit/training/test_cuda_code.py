"""The code that inductor generates for an NVIDIA GPU: launches, bytes, memory order; and that Triton compiles it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.cuda_code import options_of_the_product
from tests.support.generated_code import Cost
from tests.support.runs import REPOSITORY

# Ceilings on kernels, library calls and MB per image: some percent above what torch 2.15 gives. Much less is noticed,
# too, since then something is not counted.
AUGMENTATION = (6, 0, 0.011)
SMALL = (208, 31, 12.8)
WHOLE = {
    ("inception_v1", "pooled"): (550, 83, 26.5),
    ("inception_v1", "whiten"): (530, 81, 24.5),
    ("inception_v1", "cifar"): (540, 79, 94.0),
    ("inception_v2", "cifar"): (680, 89, 106.0),
}


def costs(*words: str) -> list[Cost]:
    command = [sys.executable, "-m", "tests.support.cuda_code", *words]
    output = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    return [Cost(**cost) for cost in json.loads(output)]


def check(found: list[Cost], ceilings: tuple[float, ...], large_float32: int) -> None:
    assert [(cost.planes, cost.atomic_additions) for cost in found] == [([], 0) for _ in found]
    assert sum(cost.large_float32 for cost in found) == large_float32
    sums = tuple(sum(column) for column in list(zip(*found, strict=True))[:3])
    assert all(0.9 * b <= a <= b for a, b in zip(sums, ceilings, strict=True)), sums


def test_launches_leave_the_gil_to_the_watchdog() -> None:
    assert options_of_the_product()["use_static_cuda_launcher"] is False


def test_augmentation() -> None:
    """Its kernels are also compiled for an H100, and are not launched by the launcher that holds the GIL."""
    (cost,) = costs("augment", "--cubins")
    check([cost], AUGMENTATION, 0)
    assert cost.cubins == cost.kernels > 1


def test_each_kind_of_module() -> None:
    """In a small V2: average and maximum pools, of stride 1 and 2."""
    check(costs("inception_v2", "cifar", "0.25", "3a", "3c", "5b"), SMALL, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "stem"),
    [("inception_v1", "pooled"), *(pytest.param(*key, marks=pytest.mark.long) for key in list(WHOLE)[1:])],
)
def test_whole_networks(name: str, stem: str) -> None:
    """Every kernel is compiled for an H100, too."""
    found = costs(name, stem, "1", "--cubins")
    check(found, WHOLE[name, stem], 2 if name == "inception_v2" else 0)
    assert all(cost.cubins > 100 for cost in found)
