"""References to own code: their form, what goes wrong at their import, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cifar_dist import cli, extension
from cifar_dist.config import Config, ModelConfig, to_yaml
from cifar_dist.errors import UserError

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module of that name to an importable folder; its path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.name inception_v3", "model.name is inception_v3. Did you mean inception_v2? Valid: inception_v1, "
         "inception_v2, inception_v2_slim; or MODULE:NAME, which is NAME in your own MODULE.py"),
        ("--optim.name adam", "optim.name is adam. Valid: muon, sgd; or MODULE:NAME"),
        ("--optim.name muno", "optim.name is muno. Did you mean muon?"),
        ("--model.name nets/own.py:Net", "model.name is nets/own.py:Net. Did you mean nets.own:Net?"),
        ("--model.name own.py:Net", "Did you mean own:Net?"),
        ("--model.name own:", "model.name is own:. Valid:"),
        ("--augment.extra mixup", "augment.extra is mixup. Valid: None; or MODULE:NAME"),
        ("--run.hooks my.mod:", "run.hooks is my.mod:. Valid: None; or"),
        ("--run.hooks=", "run.hooks is . Valid: None; or"),
        ("--model.name :net", "model.name is :net. Valid:"),
        ("--optim.name /", "optim.name is /. Valid:"),
    ],
)  # fmt: skip
def test_neither_built_in_nor_a_reference(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        cli.load_config(words.split())
    assert message in str(caught.value)


def test_references_are_read_back(tmp_path: Path) -> None:
    """And a module is not imported to validate or print a configuration."""
    names = {"model.name": "not.there:Net", "optim.name": "no:f", "augment.extra": "a:B", "run.hooks": "c:D"}
    config = cli.load_config([f"--{setting}={name}" for setting, name in names.items()])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert cli.load_config(["--config", str(path)]) == config
    assert {setting: name for setting, name, _ in extension.names(config)} == names
    assert config.model.title == "not.there:Net"
    assert ModelConfig(width=0.5).title == "inception_v1, cifar stem, width 0.5"


def test_no_such_module_or_name(write: Write) -> None:
    path = write("own_names", "import math\ndef my_network(config, num_classes): ...\nlimit = 3\n")
    for reference, message in (
        ("own_nams:f", f"model.name is own_nams:f, but there is no module own_nams in {Path.cwd()} or on PYTHONPATH. "
         "Start in the folder of own_nams.py, or add that to PYTHONPATH."),
        ("own_names.deeper:f", "there is no module own_names.deeper in"),
        ("own_names:my_netwrok", f"{path} has no my_netwrok. Did you mean own_names:my_network?"),
        ("own_names:limit", "model.name is own_names:limit, which is of type int, not a function or class."),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            extension.resolve("model.name", reference)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [
        ("import math\n\nvalue = math.sqrt(-1)\n", "ValueError: ", "line 3: value = math.sqrt(-1)"),
        ("def f(:\n", "SyntaxError: invalid syntax", "line 1: def f(:"),
        ("import not_installed_here\n", "ModuleNotFoundError: No module named 'not_installed_here'", "line 1: import"),
        ("raise SystemExit(0)\n", "SystemExit: 0", "line 1: raise"),
        ("import json\njson.loads('x')\n", "JSONDecodeError: ", "line 2: json.loads"),
    ],
)  # fmt: skip
def test_an_error_of_the_import_has_its_line(text: str, error: str, line: str, write: Write) -> None:
    name = f"own_{abs(hash(text))}"
    path = write(name, text)
    with pytest.raises(UserError) as caught:
        extension.resolve("run.hooks", f"{name}:F")
    message = str(caught.value)
    assert message.startswith(f"run.hooks is {name}:F, but importing {name} failed: {error}")
    assert f"\n  {path}, {line}" in message
    assert len(message.splitlines()) == 2


def test_what_it_returns(write: Write) -> None:
    path = write("own_results", "def number():\n    return 3\n\n\ndef fails(x):\n    return x + ''\n")
    assert extension.create("optim.name", "own_results:number", int) == 3
    with pytest.raises(
        UserError, match="own_results:number, which returned an object of type int instead of one of type Path"
    ):
        extension.create("optim.name", "own_results:number", Path)
    with pytest.raises(UserError, match=r"but calling it failed: TypeError: number\(\) takes 0 positional"):
        extension.create("optim.name", "own_results:number", int, 1)
    with pytest.raises(UserError) as caught:
        extension.create("optim.name", "own_results:fails", int, 1)
    assert f"{path}, line 6: return x + ''" in str(caught.value)


def test_only_own_code_is_imported() -> None:
    extension.import_all(Config())
    with pytest.raises(UserError, match="there is no module not_there"):
        extension.import_all(replace(Config(), model=ModelConfig(name="not_there:f")))
