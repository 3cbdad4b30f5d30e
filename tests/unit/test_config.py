"""Every setting, and every way to get one wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar_dist import cli
from cifar_dist.cli import accumulation_steps, validate
from cifar_dist.config import Config, to_yaml
from cifar_dist.errors import UserError

REPOSITORY = Path(__file__).parents[2]

# Whoever adds, renames or removes a setting, or changes a default, changes this on purpose.
DEFAULTS: dict[str, dict[str, Any]] = {
    "run": {
        "name": None, "dir": None, "seed": 0, "resume": "never", "deterministic": False, "stall_timeout_s": 300,
        "hooks": None,
    },
    "data": {
        "dir": Path("data"), "source": "auto", "stage_dir": None, "subset": None, "train_on": "train", "num_workers": 1,
    },
    "model": {
        "name": "inception_v1", "stem": "cifar", "width": 1.0, "norm": "batch", "branch5x5": "paper",
        "auxiliary": False, "dropout": 0.0, "merge_1x1": "auto", "variant": "default", "weights": None,
    },
    "train": {
        "device": "auto", "epochs": 100, "max_steps": None, "batch_size": 1024, "micro_batch_size": 128,
        "precision": "auto", "compile": "auto", "cuda_graphs": "off", "channels_last": True, "threads": 1,
        "exact_sum": "on", "tf32": True,
        "checkpoint_every_steps": 500, "keep_checkpoints": 2, "check_ranks_every_steps": 100, "log_every_steps": 20,
    },
    "optim": {
        "name": "muon", "lr": 0.05, "muon_lr": 0.1, "muon_momentum": 0.8, "momentum": 0.9, "bias_lr_factor": 1.0,
        "norm_scales": "trained", "weight_decay": 5e-4,
        "schedule": "linear", "warmup_share": 0.2, "label_smoothing": 0.1, "grad_clip": None,
        "ema_decay": None,
    },
    "augment": {"flip": "alternating", "translate": 4, "cutout": 8, "low_resolution_share": 0.0, "extra": None},
    "eval": {"every_epochs": 5, "batch_size": 500, "bn_samples": 5_000, "test_subset": None, "tta": "six"},
    "track": {
        "wandb": "auto", "project": "cifar_dist", "entity": None, "group": None, "job_type": None, "tags": None,
        "notes": None, "artifact": False, "tensorboard": False,
    },
    "debug": {"inspect": False, "anomaly": False, "overfit_steps": 0, "profile": 0},
}  # fmt: skip

# Another value for every key, all valid together.
OTHERS: dict[str, dict[str, Any]] = {
    "run": {
        "name": "on", "dir": Path("/tmp/a b"), "seed": 2**63 - 1, "resume": "auto", "deterministic": True,
        "stall_timeout_s": 0, "hooks": "my_module:MyHooks",
    },
    "data": {
        "dir": Path("/d"), "source": "npm", "stage_dir": Path("/s"), "subset": 1000, "train_on": "all",
        "num_workers": 3,
    },
    "model": {
        "name": "inception_v2", "stem": "pooled", "width": 0.25, "norm": "batch", "branch5x5": "paper",
        "auxiliary": True, "dropout": 0.4, "merge_1x1": "on", "variant": "cadene", "weights": Path("w.pt"),
    },
    "train": {
        "device": "cpu", "epochs": 3, "max_steps": 7, "batch_size": 96, "micro_batch_size": 32, "precision": "fp64",
        "compile": "on", "cuda_graphs": "on", "channels_last": False, "threads": 3, "exact_sum": "off", "tf32": False,
        "checkpoint_every_steps": 0, "keep_checkpoints": 9,
        "check_ranks_every_steps": 0, "log_every_steps": 1,
    },
    "optim": {
        "name": "sgd", "lr": 1e-05, "muon_lr": 0.02, "muon_momentum": 0.0, "momentum": 0.5, "bias_lr_factor": 8.0,
        "norm_scales": "fixed", "weight_decay": 0.0,
        "schedule": "cosine", "warmup_share": 1.0, "label_smoothing": 0.0, "grad_clip": 1.5,
        "ema_decay": 0.999,
    },
    "augment": {"flip": "none", "translate": 0, "cutout": 5, "low_resolution_share": 0.0, "extra": "my_module:Mine"},
    "eval": {"every_epochs": 0, "batch_size": 2, "bn_samples": 2, "test_subset": 500, "tta": "none"},
    "track": {
        "wandb": "offline", "project": "größer", "entity": "us", "group": "g", "job_type": "j", "tags": "a, b",
        "notes": "two words", "artifact": True, "tensorboard": True,
    },
    "debug": {"inspect": True, "anomaly": True, "overfit_steps": 5, "profile": 3},
}  # fmt: skip


def arguments(tree: dict[str, dict[str, Any]]) -> list[str]:
    return [part for section, keys in tree.items() for key, value in keys.items()
            for part in (f"--{section}.{key}", str(value))]  # fmt: skip


def written(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def run_train(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cifar_dist.train", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY)


def test_every_key_and_default() -> None:
    assert asdict(Config()) == DEFAULTS
    validate(Config())


def test_every_key_from_the_command_line() -> None:
    config = cli.load_config(arguments(OTHERS))
    assert asdict(config) == OTHERS
    changed = [(s, k) for s in DEFAULTS for k in DEFAULTS[s] if DEFAULTS[s][k] == OTHERS[s][k]]
    # Inception V2 has but one of the first two, and auxiliary heads go with one resolution.
    assert changed == [("model", "norm"), ("model", "branch5x5"), ("augment", "low_resolution_share")]


@pytest.mark.parametrize("tree", [DEFAULTS, OTHERS])
def test_yaml_round_trip(tmp_path: Path, tree: dict[str, dict[str, Any]]) -> None:
    config = cli.load_config(arguments(tree))
    text = to_yaml(config)
    assert set(yaml.safe_load(text)) == set(DEFAULTS)
    assert cli.load_config(written(tmp_path, text)) == config


def test_precedence(tmp_path: Path) -> None:
    file = written(tmp_path, "optim: {lr: 0.5, momentum: 0.8}\ntrain: {epochs: 2}\n")
    config = cli.load_config(["--optim.lr", "0.25", *file, "--train.epochs", "3"])
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (0.25, 0.8, 5e-4)
    assert config.train.epochs == 3
    assert cli.load_config([f"--config={file[1]}"]).train.epochs == 2


def test_empty_files_and_sections(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "optim:\nrun: {}\n"):
        assert cli.load_config(written(tmp_path, text)) == Config()


def test_yaml_on_and_off(tmp_path: Path) -> None:
    """YAML 1.1 reads a bare on, off, yes or no as a boolean."""
    text = "train: {compile: on, tf32: off, channels_last: no}\ndebug: {inspect: on}\nrun: {deterministic: yes}\n"
    config = cli.load_config(written(tmp_path, text))
    assert (config.train.compile, config.train.tf32, config.train.channels_last) == ("on", False, False)
    assert (config.debug.inspect, config.run.deterministic) == (True, True)
    assert cli.load_config(written(tmp_path, "train: {compile: off}")).train.compile == "off"
    assert cli.load_config(written(tmp_path, "optim: {weight_decay: 5e-4}")).optim.weight_decay == 5e-4


@pytest.mark.parametrize(
    ("text", "unknown", "closest"),
    [
        ("optim: {lrr: 0.1}", "optim.lrr", "optim.lr"),
        ("train: {batchsize: 3}", "train.batchsize", "train.batch_size"),
        ("optm: {lr: 0.1}", "optm", "optim"),
        ("momentum: 0.1", "momentum", "optim.momentum"),
        ("1: {lr: 0.1}", "1", None),
    ],
)
def test_unknown_key_in_a_file(tmp_path: Path, text: str, unknown: str, closest: str | None) -> None:
    with pytest.raises(UserError, match=rf"unknown key {re.escape(unknown)}\.") as caught:
        cli.load_config(written(tmp_path, text))
    message = str(caught.value)
    assert "config.yaml" in message
    assert "Valid here: " in message
    if closest:
        assert f"Did you mean {closest}?" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "the file must hold keys and values"),
        ("optim: 3\n", "optim must hold keys and values"),
        ("optim: {lr: [1, 2]}\n", r"optim\.lr must be a single value"),
        ("optim: {lr: {a: 1}}\n", r"optim\.lr must be a single value"),
        ("optim: {lr: 1\n", "is not readable as YAML"),
        ("a: b: c\n", "is not readable as YAML"),
        ("!!python/object/apply:os.system ['false']\n", "is not readable as YAML"),
    ],
)
def test_unusable_content(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.load_config(written(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for name, message in (("none.yaml", "No such file"), (".", "Is a directory"), ("binary.yaml", "not readable")):
        with pytest.raises(UserError, match=message):
            cli.load_config(["--config", str(tmp_path / name)])


@pytest.mark.parametrize("value", ["optim: {lr: fast}", "model: {stem: mine}", "train: {epochs: 1.5}"])
def test_value_of_a_wrong_type_names_the_file(tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"the value above comes from .*config\.yaml, line 1\."):
        cli.load_config(written(tmp_path, value))
    assert value.split()[-1].rstrip("}") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--optim.lrr", "0.1"], "Did you mean --optim.lr?"),
        (["--optim.lr", "fast"], "--optim.lr"),
        (["--model.stem", "mine"], "pooled"),
        (["stray"], "stray"),
        (["--optim.lr"], "--optim.lr"),
    ],
)
def test_mistakes_on_the_command_line(args: list[str], expected: str) -> None:
    result = run_train(*args)
    assert result.returncode == 2
    assert expected in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_mistakes_in_a_file_and_in_values(tmp_path: Path) -> None:
    for args, expected in (
        (written(tmp_path, "optim: {lrr: 0.1}"), f"error: {tmp_path}"),
        (["--config", str(tmp_path / "none.yaml")], "No such file"),
        (["--train.epochs", "0"], "error: train.epochs is 0; valid: 1 or more."),
    ):
        result = run_train(*args)
        assert result.returncode == 2
        assert expected in result.stderr
        assert "Traceback" not in result.stderr


def test_help_imports_nothing_slow() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "cifar_dist.train", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=REPOSITORY)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert {"cifar_dist", "tyro"} <= imported
    assert not imported & {"torch", "torchvision", "ffcv", "numba", "matplotlib", "wandb", "scipy", "cv2"}
    assert all(f"--{section}.{key} " in result.stdout for section, keys in DEFAULTS.items() for key in keys)
    assert "--config FILE" in result.stdout


def test_configuration_imports_no_torch() -> None:
    code = "import sys; from cifar_dist import cli, train; cli.load_config([]); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout == "False\n"


def test_print_config_is_read_back(tmp_path: Path) -> None:
    result = run_train(*arguments(OTHERS), "--print-config")
    assert result.returncode == 0
    assert asdict(cli.load_config(written(tmp_path, result.stdout))) == OTHERS


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configs_load(path: Path) -> None:
    config = asdict(cli.load_config(["--config", str(path)]))
    assert config == asdict(cli.load_config(["--config", path.stem]))
    sections = yaml.safe_load(path.read_text())
    sections.pop("base", None)
    assert {name: {key: config[name][key] for key in keys} for name, keys in sections.items()} == sections
    assert path.name != "googlenet.yaml" or config == asdict(Config())  # it states the defaults


# Per key: values just inside the valid range, then values outside.
LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "run.seed": ([0, 2**63 - 1], [-1, 2**63]),
    "run.resume": (["never"], [""]),
    "run.stall_timeout_s": ([0, 500], [-1, 501]),
    "data.num_workers": ([1], [0]),
    "model.width": ([0.01, 16], [0, -1, 16.1, "nan", "inf"]),
    "model.dropout": ([0, 0.99], [-0.1, 1, "nan"]),
    "train.epochs": ([1], [0]),
    "train.max_steps": ([1, None], [0]),
    "train.batch_size": ([128], [0, -128]),
    "train.micro_batch_size": ([2], [0, 1, -4]),
    "train.threads": ([1], [0]),
    "train.checkpoint_every_steps": ([0], [-1]),
    "train.keep_checkpoints": ([1], [0]),
    "train.check_ranks_every_steps": ([0], [-1]),
    "train.log_every_steps": ([1], [0]),
    "optim.lr": ([1e-9], [0, -0.1, 1e6, "nan", "inf"]),
    "optim.muon_lr": ([1e-9], [0, -0.1, 1e3, "nan"]),
    "optim.muon_momentum": ([0, 0.99], [-0.1, 1, "nan"]),
    "optim.momentum": ([0.01, 0.99], [0, 1, "nan"]),
    "optim.bias_lr_factor": ([0.1, 64], [0, -1, 1e3, "nan"]),
    "optim.weight_decay": ([0], [-1e-9, 1e3, "nan"]),
    "optim.warmup_share": ([0, 1], [-0.01, 1.01, "nan"]),
    "optim.label_smoothing": ([0, 0.99], [-0.01, 1, "nan"]),
    "optim.grad_clip": ([0.1, None], [0, "inf", "nan"]),
    "optim.ema_decay": ([0.5, None], [0, 1, "nan"]),
    "augment.translate": ([0, 15], [-1, 16]),
    "augment.cutout": ([0, 32], [-1, 33]),
    "augment.low_resolution_share": ([0, 0.5, 1], [-0.1, 1.1, "nan"]),
    "eval.every_epochs": ([0], [-1]),
    "eval.batch_size": ([2, 10_000], [0, 1, 10_001]),
    "eval.bn_samples": ([2, 50_000], [1, 50_001]),
    "eval.test_subset": ([1, 10_000, None], [0, 10_001]),
    "debug.overfit_steps": ([0], [-1]),
    "debug.profile": ([0], [-1]),
}


@pytest.mark.parametrize("key", LIMITS)
def test_limits(key: str) -> None:
    inside, outside = LIMITS[key]
    for value in inside:
        cli.load_config([f"--{key}", str(value)])
    for value in outside:
        with pytest.raises(UserError, match=rf"^{re.escape(key)} is .*valid: "):
            cli.load_config([f"--{key}", str(value)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--run.resume auto", "run.resume is auto, which needs the name"),
        ("--data.subset 45001", "data.subset is 45001; with data.train_on train valid: 1 to 45000"),
        ("--data.subset 0", "data.subset is 0"),
        ("--data.train_on all --data.subset 50001", "data.train_on all valid: 1 to 50000"),
        ("--data.subset 1000", "train.batch_size is 1024, but there are only 1000 training samples"),
        ("--train.batch_size 45056", "there are only 45000 training samples"),
        ("--model.name inception_v2 --model.norm none", "model.norm is none, but Inception V2 is built on batch norm"),
        (
            "--model.name inception_v2_slim --model.branch5x5 3x3",
            "model.branch5x5 is 3x3, but Inception V2 has two 3x3",
        ),
        (
            "--augment.low_resolution_share 0.5 --model.auxiliary True",
            "augment.low_resolution_share is above 0, but aux",
        ),
        (
            "--augment.low_resolution_share 0.5 --model.variant cadene --model.name inception_v2",
            "augment.low_resolution_share is above 0, but model.variant cadene needs images of 32x32 here",
        ),
        (
            "--augment.low_resolution_share 0.5 --model.variant torchvision --model.stem imagenet",
            "augment.low_resolution_share is above 0, but model.variant torchvision needs",
        ),
        ("--model.stem imagenet --model.auxiliary True", "model.auxiliary is True, but model.stem imagenet leaves"),
        ("--model.norm none --optim.name muon", "optim.name is muon, which needs model.norm batch"),
        ("--train.batch_size 1000", "train.batch_size 1000 is no multiple of train.micro_batch_size 128"),
    ],
)
def test_contradictions(args: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        cli.load_config(args.split())


@pytest.mark.parametrize(
    "args",
    [
        "--run.resume auto --run.name a",
        "--run.resume auto --run.dir /tmp/a",
        "--data.subset 1024",
        "--data.train_on all --data.subset 50000",
        "--train.batch_size 44928",
        "--data.train_on all --train.batch_size 49920",
    ],
)
def test_compatible_settings_are_accepted(args: str) -> None:
    assert cli.load_config(args.split()) != Config()


def test_accumulation() -> None:
    assert [accumulation_steps(1024, 128, world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    for batch_size, micro_batch_size, world_size in ((1000, 128, 1), (1024, 128, 3), (1024, 128, 16), (96, 128, 1),
                                                     (7, 128, 2), (1024, 100, 6), (45_000, 128, 7)):  # fmt: skip
        with pytest.raises(UserError) as caught:
            accumulation_steps(batch_size, micro_batch_size, world_size)
        message = str(caught.value)
        assert f"train.batch_size {batch_size} is no multiple of train.micro_batch_size {micro_batch_size}" in message
        choices = message.split("Nearest valid choices: ")[1].rstrip(".").split("; or ")
        assert choices
        for choice in choices:
            for number in map(int, re.findall(r"\d+", choice)):
                batch, micro, world = batch_size, micro_batch_size, world_size
                if choice.startswith("train.batch_size"):
                    batch = number
                elif choice.startswith("train.micro_batch_size"):
                    micro = number
                else:
                    world = number
                assert accumulation_steps(batch, micro, world) >= 1
                assert micro >= 2


def test_nearest_choices_are_the_nearest() -> None:
    with pytest.raises(UserError, match=re.escape(
        "Nearest valid choices: train.batch_size 768 or 1152; or 2 or 4 processes."
    )):  # fmt: skip
        accumulation_steps(1024, 128, 3)
    with pytest.raises(UserError, match=re.escape(
        "Nearest valid choices: train.batch_size 896 or 1024; or train.micro_batch_size 100 or 125."
    )):  # fmt: skip
        accumulation_steps(1000, 128, 1)
