"""Settings in YAML: every value means what its text and the type of its setting say, or is refused with its line."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from cifar_dist.cli import from_yaml, load_config, parse, read_yaml, settings_of
from cifar_dist.config import Config, to_plain, to_yaml
from cifar_dist.errors import UserError
from cifar_dist.yaml_file import read_entries

HINTS = {
    f"{section}.{key}": hint for section, kind in get_type_hints(Config).items()
    for key, hint in get_type_hints(kind).items()
}  # fmt: skip
# What YAML 1.1 or 1.2, Python or a shell read as something else than text, and random pieces of it.
ODD = [
    "yes", "no", "on", "off", "true", "False", "007", "1e3", "0x10", "0o17", "1_000", "12:30:00", "2026-01-01", "None",
    "none", "NONE", "null", "Null", "~", "", ".inf", ".nan", "=", "<<", "!x", "&a", "*a", "%x", "@x", "`x", "#x",
    "a #b", "a: b", "- a", "?", "|", ">", "'", '"', "'a'", '"a"', "a\\b", "[a]", "{a: b}", ",", " a", "a ", "a\tb",
    "a\nb", "\n", "\r", "--x", "-1", "größer", "日本", "\x85", "\u2028", "\ufeff", "\u200b", "🙂", "\x1b[0m", "a" * 300,
    "b c " * 60, "\udc80",
]  # fmt: skip
PIECES = "\"'\\ \t\n\r:#-[]{}&*!|>%@`,?~$=aAñ0eE._/\x85\u2028\xa0🙂"
ODD += ["".join(random.Random(seed).choices(PIECES, k=8)) for seed in range(100)]


def read(text: str | bytes) -> dict[str, Any]:
    return settings_of(from_yaml(text, "my.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 1}\noptim:\ntrain: {threads: 2}\n", "train is given twice, in lines 1 and 3"),
        ("train:\n  epochs: 1\n  threads: 1\n  epochs: 2\n", "epochs is given twice, in lines 2 and 4"),
        ("optim: {lr: 1, lr: 1}", "lr is given twice, in lines 1 and 1"),
        ("run:\n  name: a\n  'name': b\n", "name is given twice, in lines 2 and 3"),
        ("run: {seed: 1}\n---\nrun: {seed: 2}\n", "is not readable as YAML: expected a single document"),
        ("? [a]\n: 1\n", "line 1: a key must be a word"),
        ("run: {? {a: b} : 1}", "line 1: a key must be a word"),
        ("run:\n\tname: a\n", r"found character '\t' that cannot start any token"),
        ("- a\n", "the file must hold keys and values, not a list"),
        ("a word", "the file must hold keys and values, not 'a word'"),
        ("run: [a]", "line 1: run must hold keys and values, not a list"),
        ("run: on", "line 1: run must hold keys and values, not 'on'"),
        ("run:\n\n  seed: [1]\n", "line 3: run.seed must be a single value, not a list"),
        ("run: {name: !!python/name:os.system }", "has the tag !!python/name:os.system"),
        ("run: !mine {seed: 1}", "has the tag !mine"),
        ("run: {name: !!binary YQ==}", "has the tag !!binary"),
        ("[" * 400, "is not readable as YAML"),
        ("#" * 200_000, "has more than 100,000 bytes"),
        ("run: {name: 'a\0b'}", "is not readable as YAML"),
        ('run: {name: "a\\0b"}', r"holds the character \0"),
        ("train: {<<: 5}", "<< needs a mapping"),
        ("run: {<<: [{seed: 1}, 5]}", "<< needs a mapping"),
        ("train: {epochs:}", "train.epochs has no value"),
        ("data: {dir: ~}", "data.dir has no value"),
        ("track: {project: null}", "track.project has no value"),
        ("optim: {schedule: Null}", "optim.schedule has no value"),
        ("nothing: 1\n", "line 1: unknown key nothing"),
        ("\nrun:\n  yes: 1\n", "line 3: unknown key run.yes"),
        ("~: {a: 1}", "unknown key ~"),
        ("1: {lr: 1}", "unknown key 1"),
    ],
)
def test_what_no_configuration_is(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(text)
    assert "my.yaml" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_aliases_do_not_expand() -> None:
    """A list of lists that would have 10^30 elements, merges that would be read 2^60 times, and circles."""
    lists = "\n".join(f"  k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10)}]" for n in range(1, 30))
    merges = "\n".join(f"  m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 60))
    for text in (f"run:\n  k0: &k0 [a]\n{lists}\n", f"run:\n  m0: &m0 {{a: 1}}\n{merges}\n", "run: &a {b: *a}"):
        with pytest.raises(UserError, match="unknown key run") as caught:
            read(text)
        assert len(str(caught.value)) < 1000
    assert read("run: &a {seed: 3, <<: *a}")["run.seed"] == 3


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        *((f"run: {{name: {text}}}", "run.name", text) for text in ("yes", "Off", "007", "1e3", "0x1F", "1_0", "=",
                                                                    "2026-01-01", "12:30:00", ".5", ".inf", "true")),
        ("run: {name: 'null'}", "run.name", "null"),
        ('run: {name: "None"}', "run.name", "None"),
        ("run: {name: '~'}", "run.name", "~"),
        ("run: {name: !!str null}", "run.name", "null"),
        ("track: {project: none}", "track.project", "none"),
        ("data: {source: no}", "data.source", Path("no")),
        ("data: {source: npm}", "data.source", "npm"),
        ("run: {dir: 'none'}", "run.dir", Path("none")),
        ("data: {dir: 010}", "data.dir", Path("010")),
        ("data: {stage_dir: on}", "data.stage_dir", Path("on")),
        *((f"train: {{tf32: {text}}}", "train.tf32", False) for text in ("no", "Off", "FALSE", "false", "'off'")),
        *((f"train: {{compile: {text}}}", "train.compile", "on") for text in ("on", "On", "yes", "true", "'on'")),
        ("train: {exact_sum: No}", "train.exact_sum", "off"),
        ("augment: {flip: none}", "augment.flip", "none"),
        ("run: {seed: 010}", "run.seed", 10),  # eight in YAML 1.1
        ("run: {seed: 0o10}", "run.seed", 8),
        ("run: {seed: 0x10}", "run.seed", 16),
        ("run: {seed: 1_000}", "run.seed", 1000),
        ("run: {seed: '5'}", "run.seed", 5),
        ("optim: {lr: 1e-3}", "optim.lr", 1e-3),
        ("optim: {lr: 0x10}", "optim.lr", 16.0),
        ("optim: {lr: .5}", "optim.lr", 0.5),
        ("optim: {lr: .Inf}", "optim.lr", float("inf")),
        ("optim: {lr: !!float 1}", "optim.lr", 1.0),
        ("\ufeffrun: {seed: 4}", "run.seed", 4),
        ("%YAML 1.2\n---\nrun: {seed: 4}\n...\n", "run.seed", 4),
        ("run: {seed: &s 4}\neval: {every_epochs: *s}", "eval.every_epochs", 4),
        ("eval: &e {batch_size: 7}\ntrain: {<<: *e, epochs: 2}", "train.batch_size", 7),
        ("eval: &e {batch_size: 7}\ntrain: {batch_size: 8, <<: *e}", "train.batch_size", 8),
        ("eval: &e {batch_size: 7}\ntrain: {<<: [{batch_size: 9}, *e]}", "train.batch_size", 9),
        ("<<: {run: {seed: 5}}", "run.seed", 5),
    ],
)  # fmt: skip
def test_text_means_what_the_type_of_its_setting_says(text: str, name: str, value: Any) -> None:
    found = read(text)[name]
    assert (found, type(found)) == (value, type(value))


def test_bytes_in_utf_16_and_with_windows_line_ends() -> None:
    assert read("run: {name: größer}\r\n".encode("utf-16"))["run.name"] == "größer"
    assert read("\ufeffrun:\r\n  seed: 4\r\n".encode())["run.seed"] == 4


@pytest.mark.parametrize("word", ["None", "none", "null", "NULL", "~", ""])
def test_every_setting_that_help_offers_none_for_takes_it(word: str) -> None:
    names = [name for name, hint in HINTS.items() if type(None) in get_args(hint)]
    assert {"run.name", "run.dir", "data.stage_dir", "optim.grad_clip", "eval.test_subset"} <= set(names)
    for section in {name.partition(".")[0] for name in names}:
        own = [name.partition(".")[2] for name in names if name.startswith(section)]
        found = read(f"{section}:\n" + "".join(f"  {key}: {word}\n" for key in own))
        assert [found[f"{section}.{key}"] for key in own] == [None] * len(own)
    if word in ("None", "none", "null", "NULL"):
        config = parse(Config, [part for name in names for part in (f"--{name}", word)], "train")
        assert [settings_of(config)[name] for name in names] == [None] * len(names)


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_every_choice_that_help_offers_is_taken(quote: str) -> None:
    choices = {name: [choice for part in get_args(hint) for choice in get_args(part) or [part] if choice is not Path]
               for name, hint in HINTS.items() if "Literal" in str(hint)}  # fmt: skip
    assert len(choices) >= 15
    for k in range(max(map(len, choices.values()))):
        wanted = {name: words[k % len(words)] for name, words in choices.items()}
        tree = dict[str, str]()
        for name, word in wanted.items():
            section, _, key = name.partition(".")
            tree[section] = tree.get(section, "") + f"  {key}: {quote}{word}{quote}\n"
        found = read("".join(f"{section}:\n{keys}" for section, keys in tree.items()))
        assert {name: found[name] for name in wanted} == wanted


def test_odd_texts_come_back_from_config_yaml() -> None:
    """As a name, which may be None, and as a project, which may not."""
    for text in ODD:
        config = Config()
        config = replace(config, run=replace(config.run, name=text), track=replace(config.track, project=text))
        entries = read_entries(to_yaml(config).encode(), "config.yaml")
        name, project = (entries[section].value for section in ("run", "track"))
        assert isinstance(name, dict)
        assert isinstance(project, dict)
        assert (name["name"].value, project["project"].value) == (text, text)
    for text in ("None", "none", "null", "~", "", "--x", "a=b", "007", "no", " a\n", "\x85", "'\"", "1e3"):
        config = Config()
        config = replace(config, run=replace(config.run, name=text), track=replace(config.track, project=text))
        assert from_yaml(to_yaml(config), "config.yaml") == config, text
        assert to_plain(config)["run"]["name"] == text


def test_reading_a_file_stops_at_the_limit() -> None:
    with pytest.raises(UserError, match="/dev/zero has more than 100,000 bytes"):
        read_yaml(Path("/dev/zero"))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with c.yaml over sub/b.yaml over a.yaml over quickstart.yaml."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("base: quickstart\noptim:\n  lr: 0.3\n  momentum: 0.8\ntrain: {epochs: 5}\n")
    (tmp_path / "sub/b.yaml").write_text("base: ${PLACE}/a.yaml\n\noptim: {lr: 0.4}\neval:\n")
    (tmp_path / "c.yaml").write_text("train: {epochs: 6}\noptim:\nbase: sub/b.yaml\neval: {tta: none}\n")
    monkeypatch.setenv("PLACE", "..")  # from sub/b.yaml
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_settings_come_over_those_of_the_base(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = settings_of(read_yaml("quickstart")) | {
        "optim.lr": 0.4, "optim.momentum": 0.8, "train.epochs": 6, "eval.tta": "none",
    }  # fmt: skip
    assert settings_of(read_yaml(files / "c.yaml")) == expected
    (files / "$c.yaml").symlink_to("c.yaml")
    assert settings_of(read_yaml(files / "$c.yaml")) == expected  # a Path is not expanded
    with pytest.raises(SystemExit):
        load_config(["--config", "c.yaml", "--optim.lr", "0.5", "--print-config"])
    printed = capsys.readouterr().out
    assert "base" not in printed
    assert settings_of(from_yaml(printed, "printed")) == expected | {"optim.lr": 0.5}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("c.yaml", "c.yaml, which builds on sub/b.yaml, which builds on sub/../a.yaml, which builds on "
                   "sub/../c.yaml: a circle."),
        ("../FOLDER/a.yaml", "a circle."),
        ("none.yaml", "a.yaml, line 2: base sub/../none.yaml: No such file or directory. The conf"),
        ("quikstart", "a.yaml, line 2: base quikstart is no configuration of this project. Did you mean quickstart?"),
        ("[googlenet]", "a.yaml, line 2: base must name a configuration"),
        ("~", "a.yaml, line 2: base must name a configuration"),
        ("{run: 1}", "a.yaml, line 2: base must name a configuration"),
        ("$NOT_SET/a.yaml", "there is no environment variable NOT_SET"),
    ],
)  # fmt: skip
def test_a_base_that_there_is_not(base: str, message: str, files: Path) -> None:
    (files / "a.yaml").write_text(f"\nbase: {base}\n".replace("FOLDER", files.name))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_yaml("c.yaml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 0.1\n", "a.yaml, line 2: unknown key optim.lrr. Did you mean optim.lr?"),
        ("optim: 5\n", "a.yaml, line 1: optim must hold keys and values, not '5'"),
        ("train: [5]\n", "a.yaml, line 1: train must hold keys and values, not a list"),
        ("\n\ntrain: {threads: [1]}\n", "a.yaml, line 3: train.threads must be a single value"),
        ("optim:\n  momentum: fast\n", "the value above comes from sub/../a.yaml, line 2."),
        ("data: {dir: $NOT_SET/x}\n", "a.yaml, line 1: data.dir: there is no environment variable NOT_SET"),
        ("train:\n  threads: 0\n", "train.threads is 0; valid: 1 or more.\ntrain.threads: sub/../a.yaml, line 2"),
        ("train:\n  batch_size: 100\n  epochs: 0\n  micro_batch_size: 64\n",
         "train.batch_size: sub/../a.yaml, line 2\ntrain.micro_batch_size: sub/../a.yaml, line 4"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_base_is_named_with_its_file_and_line(text: str, message: str, files: Path) -> None:
    (files / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(["--config", "c.yaml"])


def test_what_the_command_line_sets_comes_from_no_file(files: Path) -> None:
    (files / "a.yaml").write_text("train: {threads: 2}")
    with pytest.raises(UserError) as caught:
        load_config(["--config", "a.yaml", "--train.threads=0"])
    assert str(caught.value) == "train.threads is 0; valid: 1 or more."


def test_a_word_is_a_configuration_of_the_project_and_a_path_is_a_file(files: Path) -> None:
    (files / "debug").write_text("run: {seed: 5}")
    (files / "debug.yaml").write_text("run: {seed: 6}")
    assert load_config(["--config", "debug"]).data.subset == 512
    assert load_config(["--config", "./debug"]).run.seed == 5
    assert load_config(["--config", "debug.yaml"]).run.seed == 6
    with pytest.raises(UserError, match=r"debgu is no configuration of this project\. Did you mean debug\?") as caught:
        load_config(["--config", "debgu"])
    assert "Valid: cpu-84, debug, googlenet" in str(caught.value)
