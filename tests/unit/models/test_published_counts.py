"""The networks against published numbers: parameters and multiply-adds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cifar_dist.models import __main__ as command
from cifar_dist.models.__main__ import PUBLISHED, costs, multiply_adds
from cifar_dist.models.architectures import inception_v1
from cifar_dist.models.layers import num_parameters

# Once more than in the ledger, so that a mistake has to be made twice.
PARAMETERS = [
    6_998_552, 13_378_280, 6_624_904, 13_004_888, 7_005_832, 5_871_914, 6_158_346, 6_166_250,
    11_295_240, 11_285_224, 10_151_306, 10_061_066,
]  # fmt: skip
MULTIPLY_ADDS = {  # in millions, of V1 and V2
    "cifar": (1447, 2035), "pooled": (392, 539), "strided": (362, 509), "whiten": (366, 513), "imagenet": (1582, 2032)
}  # fmt: skip


@pytest.fixture(scope="module")
def table() -> dict[str, list[int]]:
    return costs()


def test_parameters() -> None:
    assert [published for _, published, _ in PUBLISHED] == PARAMETERS
    with torch.device("meta"):
        assert [num_parameters(build()) for _, _, build in PUBLISHED] == PARAMETERS


def test_multiply_adds(table: dict[str, list[int]]) -> None:
    assert {stem: (round(v1 / 1e6), round(v2 / 1e6)) for stem, (v1, v2, _) in table.items()} == MULTIPLY_ADDS


def test_differences_of_multiply_adds_by_hand(table: dict[str, list[int]]) -> None:
    # Whitening and its 1x1 stand in place of one 3x3 of stride 2; both write a grid of 16 x 16.
    difference = 16 * 16 * (48 * 96 + 96 * 192 - 27 * 192)
    (v1, v2, v2_slim), whiten = table["strided"], table["whiten"]
    assert whiten[0] - v1 == whiten[1] - v2 == difference
    # V2 slim projects to 32 channels less in 4c and 4d, so 4d and 4e read 32 less, and 4e writes 32 less to 5a.
    grid = 8 * 8
    in_4c, in_4d, in_4e = 32 * 576, 608 * (96 + 128 + 160 + 128) - 576 * (96 + 128 + 160 + 96), 32 * (128 + 192)
    in_5a = 4 * 4 * 32 * (352 + 192 + 160 + 128)
    assert v2 - v2_slim == grid * (in_4c + in_4d + in_4e) + in_5a


def test_multiply_adds_of_two_layers() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert multiply_adds(model, 8) == 4 * 4 * 8 * 27 + 128 * 5
    assert model.training
    assert not any(layer._forward_hooks for layer in model)


def test_a_mismatch_is_marked_and_fails(
    table: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "costs", lambda: table)
    wrong, right = ("V1", 5_871_915, inception_v1), ("V1", 5_871_914, inception_v1)
    assert command.main([wrong, right]) == 1
    printed = capsys.readouterr().out
    assert [line.endswith("MISMATCH") for line in printed.splitlines()[1:3]] == [True, False]
    assert "5,871,915" in printed
    assert "\nwhiten " in printed
    assert "1,447.2 M" in printed
    assert command.main([right]) == 0


def test_the_command_needs_no_other_library() -> None:
    code = "import sys, cifar_dist.models.__main__; print({'ffcv', 'cv2', 'numba', 'torchvision'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    assert result.stdout == "set()\n"
