"""Command lines from dataclasses: defaults < YAML file < `--section.key value`.

tyro does the parsing and the help. This module adds the YAML file: its entries are handed
to tyro as if they had been typed, so that one set of types and messages serves both.
"""

import argparse
import io
import re
import shlex
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from cifar_dist import environment, extension, options
from cifar_dist.config import NUM_TRAIN, NUM_VALIDATION, Config, Range, to_yaml
from cifar_dist.errors import UserError, explain_os_error, is_main_process, wait_for_main_process
from cifar_dist.files import escape_path, write_json
from cifar_dist.suggestions import refuse_unknown_options
from cifar_dist.yaml_file import Entry, read_config, read_entries

T = TypeVar("T")
OWN = ("config", "print_config")  # options that load_config answers itself


def parse(cls: type[T], args: Sequence[str], command: str, default: T | None = None, description: str = "") -> T:
    """Parse `args` into the dataclass `cls`; paths are expanded (see `files.expand_path`).

    Raises:
        UserError: an option is unknown, or a path cannot be expanded.
        SystemExit: with 2 after other mistakes, which tyro has printed.
    """
    refuse_unknown_options(cls, args, OWN if cls is Config else (), command)
    try:
        return tyro.cli(  # type: ignore[return-value]  # a default of None stands for no default
            cls,
            args=list(args),
            prog=f"python -m cifar_dist.{command}",
            description=description,
            default=default,
            use_underscores=True,
            registry=options.registry,
            console_outputs=is_main_process(),
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        )
    except options.UnusablePathError as error:
        raise UserError(str(error)) from None
    except SystemExit as end:
        if end.code and not is_main_process():
            wait_for_main_process(3)
        raise


def load_config(args: Sequence[str], command: str = "train", description: str = "") -> Config:
    """The validated configuration that `args` ask for; answers `--help` and `--print-config` itself.

    Raises:
        UserError: the file cannot be used, or values contradict each other.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config")
    own.add_argument("--print-config", "--print_config", action="store_true")
    known, rest = own.parse_known_args(args)
    entries = {} if known.config is None else read_config(known.config)
    text = (
        f"{description} --config FILE reads a YAML file first, or one of this project by its name; --print-config "
        f"prints the result and exits. Example: python -m cifar_dist.{command} --config quickstart --run.name mine"
    )
    config = parse(Config, rest, command, _configuration(entries, command), text)
    try:
        validate(config)
        world_size = environment.number("WORLD_SIZE", 1, least=1)
        accumulation_steps(config.train.batch_size, config.train.micro_batch_size, world_size)
    except UserError as error:
        typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in rest}
        sources = [f"\n{name}: {where}" for name, where in _sources(str(error), entries).items() if name not in typed]
        raise UserError(f"{error}{''.join(sources)}") from None
    if environment.number("TORCHELASTIC_MAX_RESTARTS", 0) and config.run.resume != "auto":
        raise UserError(
            f"run.resume is {config.run.resume}, but restarted processes resume from the last checkpoint. "
            f"Give --run.resume auto, or MAX_RESTARTS=0 (of torchrun: --max-restarts 0)."
        )
    if known.print_config:
        if is_main_process():
            print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def read_yaml(name: str | Path, command: str = "train") -> Config:
    """The configuration of `name` (see `yaml_file.locate`; a Path is not expanded), over its base, over the defaults.

    Raises:
        UserError: also if a file cannot be read.
    """
    return _configuration(read_config(name if isinstance(name, str) else escape_path(str(name))), command)


def from_yaml(text: str | bytes, origin: str, command: str = "train") -> Config:
    """The defaults with the sections and keys that YAML in UTF-8 gives; `origin` says where from, for messages.

    Values are those of YAML 1.2, and the type of a setting decides what they mean: a name may be yes, 007 or 1e3.

    Raises:
        UserError: it is no YAML, or has a key or a value that no configuration has.
    """
    return _configuration(read_entries(text, origin), command)


def _configuration(entries: Mapping[str, Entry], command: str) -> Config:
    words, texts, message = list[str](), dict[tuple[str, str], str](), io.StringIO()
    for section, key, entry, hint in options.given(entries):
        word = options.word(f"{section}.{key}", entry, hint)
        if entry.quoted and word.lower() in options.NO_VALUE and str in get_args(hint):
            texts[section, key] = word  # which on a command line would mean None
        else:
            words.append(f"--{section}.{key}={word}")
    try:
        with redirect_stderr(message):
            config = parse(Config, words, command)
    except SystemExit:
        print(message.getvalue(), end="", file=sys.stderr)
        sources = ", ".join(_sources(message.getvalue(), entries).values()) or "the file"
        raise UserError(f"the value above comes from {sources}.") from None
    for (section, key), word in texts.items():
        config = replace(config, **{section: replace(getattr(config, section), **{key: word})})
    return config


def _sources(message: str, entries: Mapping[str, Entry]) -> dict[str, str]:
    """File and line of each setting of a file that `message` names."""
    given = {f"{section}.{key}": entry.where for section, key, entry, _ in options.given(entries)}
    return {name: given[name] for name in re.findall(r"[a-z]+\.[a-z0-9_]+", message) if name in given}


def settings_of(config: Config) -> dict[str, Any]:
    """All settings by their full names, such as optim.lr."""
    sections = asdict(config).items()
    return {f"{section}.{key}": value for section, values in sections for key, value in values.items()}


def validate(config: Config) -> None:
    """Refuse settings that no run can use.

    Raises:
        UserError: names the setting, its value and what is valid.
    """
    c, model = config, config.model
    validate_ranges(c)
    extension.check_names(c)
    if c.data.source == Path():
        raise UserError("data.source is empty; valid: auto, official, npm or the path of a copy.")
    if c.run.resume == Path():
        raise UserError("run.resume is empty or this folder; valid: never, auto, replace or the path of a checkpoint.")
    if model.weights == Path():
        raise UserError("model.weights is empty or this folder; valid: the path of a run or of a file of weights.")
    if c.run.name is not None and (Path(c.run.name).name != c.run.name or c.run.name in ("", "..")):
        raise UserError(f"run.name is {c.run.name}; valid: a name without /.")
    if c.run.resume == "auto" and c.run.name is None and c.run.dir is None:
        raise UserError("run.resume is auto, which needs the name of the run: give --run.name NAME or --run.dir PATH.")
    if c.train.cuda_graphs == "on" and c.train.compile == "off":
        raise UserError("train.cuda_graphs is on, which needs compiled code. Use train.compile on, or cuda_graphs off.")
    if c.augment.low_resolution_share and model.auxiliary:
        raise UserError(
            "augment.low_resolution_share is above 0, but auxiliary classifiers need images of one size. Use "
            "augment.low_resolution_share 0, or model.auxiliary False."
        )
    v2 = model.name in ("inception_v2", "inception_v2_slim")
    if c.augment.low_resolution_share and model.variant != "default" and (v2 or model.stem == "imagenet"):
        other = f"model.variant {model.variant} needs images of 32x32 here"
        raise UserError(f"augment.low_resolution_share is above 0, but {other}. Use 0, or model.variant default.")
    if v2:
        if model.norm == "none":
            raise UserError("model.norm is none, but Inception V2 is built on batch norm; use batch, or inception_v1.")
        if model.branch5x5 != "paper":
            other = f"model.branch5x5 is {model.branch5x5}"
            raise UserError(f"{other}, but Inception V2 has two 3x3 there; use paper, or inception_v1.")
    if model.stem == "imagenet" and model.auxiliary:
        raise UserError(
            "model.auxiliary is True, but model.stem imagenet leaves 2x2 of a 32x32 image at 4a, too few for the "
            "auxiliary classifiers' 5x5 pool. Use another model.stem, or model.auxiliary False."
        )
    if model.norm == "none" and c.optim.name == "muon":
        raise UserError(
            "optim.name is muon, which needs model.norm batch: it keeps the filters at one length. Use optim.name sgd."
        )
    available = NUM_TRAIN if c.data.train_on == "all" else NUM_TRAIN - NUM_VALIDATION
    num_samples = available if c.data.subset is None else c.data.subset
    if not 1 <= num_samples <= available:
        raise UserError(f"data.subset is {num_samples}; with data.train_on {c.data.train_on} valid: 1 to {available}.")
    if c.train.batch_size > num_samples:
        raise UserError(
            f"train.batch_size is {c.train.batch_size}, but there are only {num_samples} training samples, so not "
            f"one step fits into an epoch. Lower train.batch_size or raise data.subset."
        )


def validate_ranges(settings: Any, prefix: str = "") -> None:
    """Refuse a number outside the `Range` of its field in the dataclass `settings` or in one that it holds.

    Raises:
        UserError: names the setting, its value and what is valid.
    """
    for key, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, key)
        if is_dataclass(value):
            validate_ranges(value, f"{prefix}{key}.")
        notes = [note for part in (hint, *get_args(hint)) for note in getattr(part, "__metadata__", ())]
        for valid in (note for note in notes if isinstance(note, Range)):
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number not in valid:
                    raise UserError(f"{prefix}{key} is {number}; valid: {valid}.")


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per rank and optimizer step: batch_size / (micro_batch_size x world_size).

    Raises:
        UserError: that is not an integer; the message has the nearest valid choices.
    """
    unit = micro_batch_size * world_size
    if batch_size % unit == 0:
        return batch_size // unit

    def nearest(valid: Iterable[int], value: int) -> str:
        return " or ".join(map(str, sorted(sorted(valid, key=lambda number: abs(number - value))[:2])))

    numbers, below = range(1, batch_size + 1), batch_size // unit * unit
    micro = nearest((m for m in numbers if m > 1 and batch_size % (m * world_size) == 0), micro_batch_size)
    worlds = nearest((w for w in numbers if batch_size % (micro_batch_size * w) == 0), world_size)
    choices = [f"train.batch_size {nearest(filter(None, (below, below + unit)), batch_size)}"]
    choices += [f"train.micro_batch_size {micro}"] * bool(micro)
    choices += [f"{worlds} processes"] * bool(worlds and world_size > 1)
    raise UserError(
        f"train.batch_size {batch_size} is no multiple of train.micro_batch_size {micro_batch_size} x "
        f"{world_size} process{'es' if world_size > 1 else ''} = {unit}.\n"
        f"Nearest valid choices: {'; or '.join(choices)}."
    )


def validate_for_table(config: Config) -> None:
    """Refuse settings whose score does not belong in a table of results.

    Raises:
        UserError: only a part of the test set would be scored.
    """
    if config.eval.test_subset is not None:
        raise UserError("eval.test_subset is for trials; a table of results needs scores of the whole test set.")


def command_line() -> str:
    """The command that started this process, for the record in a file of results."""
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


def aligned(rows: Sequence[Sequence[str]], gap: str = "   ") -> list[str]:
    """The lines of a table, its first column left-aligned, the others right-aligned; rows may be short."""
    widths = [max(map(display_width, column)) for column in zip_longest(*rows, fillvalue="")]

    def padded(k: int, cell: str) -> str:
        blanks = " " * (widths[k] - display_width(cell))
        return blanks + cell if k else cell + blanks

    return [gap.join(padded(k, cell) for k, cell in enumerate(row)).rstrip() for row in rows]


def display_width(text: str) -> int:
    """Columns of a terminal that `text` takes: two for a wide character such as a Chinese one, none for an accent."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def json_writer(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """A function that writes a command's result to `path`, the value of its option --json; None: it does nothing.

    Raises:
        UserError: here, before the work starts, if the folder cannot be used; in the function, if writing fails.
    """
    if path is None:
        return lambda _: None
    unwritable = f"--json {path} cannot be written"
    with explain_os_error(unwritable):
        if path.is_symlink() or (path.exists() and not path.is_file()):  # which would be replaced by a file
            raise UserError(f"{unwritable}: it is a folder, link, device or pipe.")
        tempfile.TemporaryFile(dir=path.parent).close()

    def write(values: dict[str, Any]) -> None:
        with explain_os_error(unwritable):
            write_json(path, values)

    return write
