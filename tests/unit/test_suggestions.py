"""A wrong option or key: the message names the one that was meant, by spelling or by what other programs call it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cifar_dist import cli, compare, evaluate, plan, prepare, seeds, sweep
from cifar_dist.benchmarks.settings import BenchConfig, CompareConfig
from cifar_dist.config import Config
from cifar_dist.errors import UserError
from cifar_dist.offline import bundle
from cifar_dist.suggestions import SYNONYMS, closest
from tests.support import runs

NAMES = list(cli.settings_of(Config()))


MEANT = {
    "optim.lr": "--optim.lrr --optim.learning_rate --optim.learningrate --lr --learning-rate -lr --train.lr "
    "--optimizer.lr --lr0 --optim.learning_rat",
    "optim.muon_lr": "--optim.muon.lr",
    "optim.weight_decay": "--wd --optim.wd --weight-decay --optim.l2",
    "optim.name": "--opt --optimizer --optim.optimizer",
    "optim.schedule": "--lr-scheduler",
    "optim.warmup_share": "--warmup_ratio",
    "optim.label_smoothing": "--smoothing",
    "optim.grad_clip": "--max_grad_norm",
    "optim.ema_decay": "--model-ema",
    "train.batch_size": "--bs -b --batch --batch-size --train.batchsize",
    "eval.batch_size": "--eval.bs --val_batch_size",
    "train.micro_batch_size": "--per_device_train_batch_size --gradient_accumulation_steps",
    "train.epochs": "--epochs --num_train_epochs --trainer.max_epochs --train.epoch --TRAIN.EPOCHS",
    "train.max_steps": "--max_iters",
    "train.precision": "--amp --fp16 --mixed_precision --half",
    "train.compile": "--torchcompile",
    "data.num_workers": "--workers -j --num-workers",
    "train.device": "--device --accelerator",
    "model.name": "--model --arch --model.arch",
    "model.dropout": "--drop",
    "run.seed": "--seed",
    "run.name": "--name",
    "run.dir": "--output_dir --output-dir",
    "run.resume": "--resume --ckpt --resume_from_checkpoint",
    "data.dir": "--data-path --data_dir --data",
    "train.log_every_steps": "--print-freq",
    "train.keep_checkpoints": "--save_total_limit",
    "optim.momentum": "--momentom",
    "augment.cutout": "--augment.cut_out",
    "track.wandb": "--wandb",
    "config": "--conf",
    "print_config": "--print-confg",
}


@pytest.mark.parametrize(
    ("option", "meant"), [(option, meant) for meant, options in MEANT.items() for option in options.split()]
)
def test_the_option_that_was_meant(option: str, meant: str) -> None:
    for words in ([option, "1"], [f"{option}=1"]):
        with pytest.raises(UserError) as caught:
            cli.load_config(words)
        first, last = str(caught.value).splitlines()
        assert first == f"there is no option {option}. Did you mean --{meant}?"
        assert last == "`python -m cifar_dist.train --help` lists all options."


@pytest.mark.parametrize("option", ["--foo", "--zzz=1", "-q", "--xyzzy.plugh"])
def test_without_a_likely_one_none_is_named(option: str) -> None:
    with pytest.raises(UserError, match=rf"^there is no option {option.partition('=')[0]}\.\n"):
        cli.load_config([option])


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (["train.epochs=3"], "--train.epochs 3"),
        (["epochs=3"], "--train.epochs 3"),
        (["lr=1e-3"], "--optim.lr 1e-3"),
        (["+optimizer.lr=1"], "--optim.lr 1"),
        (["--run.seed", "1", "optim.learning_rate=0.1"], "--optim.lr 0.1"),
        (["model.name=inception_v2"], "--model.name inception_v2"),
        (["train.epochs", "3"], "--train.epochs VALUE"),
    ],
)
def test_words_without_dashes(words: list[str], right: str) -> None:
    with pytest.raises(UserError) as caught:
        cli.load_config(words)
    assert str(caught.value).endswith(f" lacks the dashes of an option. Write {right}")


def test_values_are_no_options() -> None:
    words = ["--run.name", "train.epochs=3", "--track.project", "lr=1", "--optim.lr", "1e-3", "--run.dir=epochs=3"]
    config = cli.load_config(words)
    assert (config.run.name, config.track.project, str(config.run.dir)) == ("train.epochs=3", "lr=1", "epochs=3")
    assert cli.parse(seeds.SeedsArguments, ["runs/a.b=c", "--", "--lr=1"], "seeds").runs[1:]
    with pytest.raises(UserError, match=r"optim\.lr is -inf"):
        cli.load_config(["--optim.lr", "-inf"])


@pytest.mark.parametrize(
    ("cls", "words", "hint"),
    [
        (evaluate.EvaluateArguments, ["--ckpt", "x"], "Did you mean --checkpoint?"),
        (evaluate.EvaluateArguments, ["--data.dir=x"], "Did you mean --data_dir?"),
        (evaluate.EvaluateArguments, ["--out", "x"], "Did you mean --json?"),
        (prepare.PrepareConfig, ["--data_path", "x"], "Did you mean --data.dir?"),
        (prepare.PrepareConfig, ["--output", "x"], "Valid: --data.dir, --data.source, --rebuild."),
        (BenchConfig, ["step", "--bs", "x"], "Did you mean --batch_size?"),
        (BenchConfig, ["step", "--amp", "x"], "Did you mean --precision?"),
        (BenchConfig, ["step", "--output", "x"], "Did you mean --json?"),
        (BenchConfig, ["--part", "step"], "Give PART without --part."),
        (plan.PlanArguments, ["c.yaml", "--learning_rate", "x"], "Did you mean --optim.lr?"),
        (plan.PlanArguments, ["c.yaml", "--num_gpus", "8"], "Did you mean --gpus?"),
        (plan.PlanArguments, ["--config", "c.yaml"], "Give CONFIG without --config."),
        (seeds.SeedsArguments, ["a", "--output", "x"], "Did you mean --json?"),
        (seeds.SeedsArguments, ["a", "--foo", "x"], "Valid: --json."),
        (bundle.BundleConfig, ["--output", "x"], "Did you mean --out?"),
        (bundle.BundleConfig, ["--wheel", "x"], "Did you mean --ffcv_wheel?"),
        (compare.CompareArguments, ["a", "b", "--json", "x"], "there is no option --json."),
        (CompareConfig, ["a", "b", "--old", "x"], "Give OLD without --old."),
    ],
)
def test_every_command(cls: type, words: list[str], hint: str) -> None:
    with pytest.raises(UserError) as caught:
        cli.parse(cls, words, "this")
    assert hint in str(caught.value)
    assert str(caught.value).endswith("`python -m cifar_dist.this --help` lists all options.")


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("optim: {learning_rate: 0.1}", "optim.learning_rate", "optim.lr"),
        ("train: {bs: 1}", "train.bs", "train.batch_size"),
        ("eval: {bs: 1}", "eval.bs", "eval.batch_size"),
        ("train: {lr: 1}", "train.lr", "optim.lr"),
        ("learning_rate: 1", "learning_rate", "optim.lr"),
        ("optimizer: {lr: 1}", "optimizer", "optim"),
        ("trainer: {max_epochs: 1}", "trainer", "train"),
        ("dataset: {dir: x}", "dataset", "data"),
        ("dataset: x", "dataset", "data.dir"),
    ],
)
def test_keys_in_yaml(text: str, key: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        cli.from_yaml(text, "my.yaml")
    assert f"my.yaml, line 1: unknown key {key}. Did you mean {meant}? Valid here: " in str(caught.value)


def test_synonyms_are_of_options_that_there_are() -> None:
    others = {"gpus", "nodes", "checkpoint", "data_dir", "json", "out"}
    sections = {name.partition(".")[0] for name in NAMES}
    assert set(SYNONYMS) - others - sections <= set(NAMES)
    assert all(closest(name, NAMES) == name for name in NAMES)


@pytest.mark.parametrize("module", ["prepare", "models", "offline.lean"])
def test_one_screen_and_exit_code_2(module: str) -> None:
    command = [sys.executable, "-m", f"cifar_dist.{module}", "--learning_rate", "1"]
    result = subprocess.run(command, cwd=runs.REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no option --learning_rate.")
    assert (len(result.stderr.splitlines()), result.stdout) == (2, "")


def test_words_of_an_option_of_many_values_need_no_dashes() -> None:
    words = ["quickstart", "--grid", "optim.lr=0.1,0.2", "train.epochs=2", "--optim.momentum", "0.8"]
    arguments = cli.parse(sweep.SweepArguments, words, "sweep")
    assert arguments.grid == (("optim.lr=0.1,0.2", "train.epochs=2"),)
    with pytest.raises(UserError, match="epochs=2 lacks the dashes of an option"):
        cli.parse(sweep.SweepArguments, [*words, "epochs=2"], "sweep")
