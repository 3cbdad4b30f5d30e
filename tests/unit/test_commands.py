"""`cifar-dist COMMAND`, here as `python -m cifar_dist COMMAND`: the same as `python -m cifar_dist.COMMAND`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar_dist import __version__
from cifar_dist.__main__ import COMMANDS
from tests.support import runs

LONG = "train"  # lists all settings of a run


def answer(*words: str, code: int = 0) -> str:
    """stdout and stderr of `python -X importtime -m ...`, without what importtime prints."""
    command = [sys.executable, "-X", "importtime", "-m", *words]
    result = subprocess.run(command, cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines(keepends=True)
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert "torch" not in imported or "models" in " ".join(words)
    return result.stdout + "".join(line for line in lines if not line.startswith("import time:"))


def test_every_module_that_is_a_program_is_a_command() -> None:
    modules = (runs.REPOSITORY / "cifar_dist").glob("*.py")
    programs = {path.stem for path in modules if "\nif __name__ ==" in path.read_text()}
    assert COMMANDS.keys() == programs - {"__main__"} | {"models"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    """The same as of the module, with an example, and on one screen unless it lists the settings of a run."""
    text = answer("cifar_dist", name, "--help")
    assert text == answer(f"cifar_dist.{name}", "--help")
    words = " ".join(text.split())
    assert f"Example: python -m cifar_dist.{name}" in words
    assert len(text.splitlines()) <= 50 or name == LONG


@pytest.mark.parametrize("words", [("train", "--optim.lrr", "1"), ("compare", "x"), ("plan", "debugg"), ("seeds",)])
def test_exit_codes_and_messages_are_those_of_the_module(words: tuple[str, ...]) -> None:
    text = answer("cifar_dist", *words, code=2)
    assert text.startswith("error: ")
    assert text == answer(f"cifar_dist.{words[0]}", *words[1:], code=2)


def test_overview() -> None:
    text = answer("cifar_dist", "--help")
    assert text == answer("cifar_dist", "-h")
    assert text in answer("cifar_dist", code=2)
    assert len(text.splitlines()) <= 24
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", text, flags=re.M)
    assert answer("cifar_dist", "--version") == f"cifar-dist {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "there is no command trian. Did you mean train? Valid: train, evaluate"),
        (("xyz", "--help"), "there is no command xyz. Valid: train"),
        (("--verison",), "there is no command --verison"),
        (("--completion",), "--completion needs the name of a shell; valid: bash, zsh."),
        (("--completion", "cmd"), "valid: bash, zsh."),
    ],
)
def test_what_is_no_command(words: tuple[str, ...], message: str) -> None:
    text = answer("cifar_dist", *words, code=2)
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """What bash offers in place of the last of some words, with the script of --completion."""
    script = tmp_path_factory.mktemp("completion") / "cifar-dist.sh"
    script.write_text(runs.finish(runs.start_command([sys.executable, "-m", "cifar_dist", "--completion", "bash"])))
    call = (
        '. "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; '
        "$(complete -p cifar-dist | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
        'for word in "${COMPREPLY[@]}"; do echo "$word"; done'
    )

    def offered(*words: str) -> list[str]:
        return subprocess.check_output(["bash", "-uc", call, str(script), "cifar-dist", *words], text=True).splitlines()

    return offered


def test_completion_in_bash(complete: Callable[..., list[str]], tmp_path: Path) -> None:
    assert complete("tr") == ["train"]
    assert {*complete("")} >= COMMANDS.keys()
    assert complete("train", "--optim.mo") == ["--optim.momentum"]
    assert complete("train", "--con") == ["--config"]
    assert complete("train", "--optim.schedule", "") == ["linear", "cosine"]
    assert all(word.startswith("--") for word in complete("plan", "--"))
    (tmp_path / "one-file").touch()
    assert complete("evaluate", "--checkpoint", f"{tmp_path}/one") == [f"{tmp_path}/one-file"]


def test_a_rank_without_others_prints_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK may be left in the environment by an earlier job."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert "bogus" in answer("cifar_dist.bench", "bogus", code=2)
