"""How words of the command line become values of options, for tyro. Values in YAML are read by the same rules."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from cifar_dist.config import Config
from cifar_dist.errors import UserError
from cifar_dist.files import expand_path
from cifar_dist.suggestions import closest
from cifar_dist.yaml_file import Entry, told

NO_VALUE = ("none", "null")  # in lower case
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class UnusablePathError(Exception):
    """A path cannot be expanded. No ValueError, which tyro would catch to try the next type of a union."""


def _bool(text: str) -> bool:
    if text.lower() not in SWITCH:
        raise ValueError(f"'{text}' is neither True nor False")
    return SWITCH[text.lower()]


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        try:
            return int(text, 0)  # 0x10 and 0o20, as in YAML 1.2
        except ValueError:
            raise ValueError(f"'{text}' is no whole number") from None


def _float(text: str) -> float:
    try:
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()))  # .inf is YAML's spelling
    except ValueError:
        try:
            return float(_int(text))
        except ValueError:
            raise ValueError(f"'{text}' is no number") from None


def _none(text: str) -> None:
    if text.lower() not in NO_VALUE:
        raise ValueError(f"'{text}' is not None")


def _path(text: str) -> Path:
    try:
        return Path(expand_path(text))
    except UserError as error:
        raise UnusablePathError(str(error)) from None


_READ: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("{True,False}", _bool),
    int: ("INT", _int),
    float: ("FLOAT", _float),
    NoneType: ("{None}", _none),
    Path: ("PATH", _path),
}

registry = ConstructorRegistry()


@registry.primitive_rule
def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type not in _READ:
        return None
    metavar, read = _READ[info.type]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, info.type),
        str_from_instance=lambda value: [str(value)],
    )


def word(name: str, entry: Entry, hint: Any) -> str:
    """A value in YAML as a word of the command line."""
    where, types = entry.where, get_args(hint) or (hint,)
    if isinstance(entry.value, (dict, list)):
        raise UserError(f"{where}: {name} must be a single value, not {told(entry)}.")
    if entry.value is None and NoneType not in types:
        raise UserError(
            f"{where}: {name} has no value, which null and ~ mean in YAML, too. Give one, in quotes if it is text, or "
            f"leave the line out."
        )
    text = "None" if entry.value is None else entry.value
    if Path in types:
        try:
            expand_path(text)
        except UserError as error:
            raise UserError(f"{where}: {name}: {error}") from None
    if "on" in types and text not in types and text.lower() in SWITCH:
        return "on" if SWITCH[text.lower()] else "off"
    return f"./{text}" if entry.quoted and Path in types and text.lower() in NO_VALUE else text


def given(entries: Mapping[str, Entry]) -> Iterator[tuple[str, str, Entry, Any]]:
    """Section, key, value and type of each setting of a configuration in YAML.

    Raises:
        UserError: there is no such section or key.
    """
    sections = get_type_hints(Config)
    for section, content in entries.items():
        if section not in sections:
            raise _unknown_key(section, content, sections)
        if content.value is None:
            continue
        if not isinstance(content.value, dict):
            raise UserError(f"{content.where}: {section} must hold keys and values, not {told(content)}.")
        hints = get_type_hints(sections[section])
        for key, entry in content.value.items():
            if key not in hints:
                raise _unknown_key(f"{section}.{key}", entry, hints)
            yield section, key, entry, hints[key]


def _unknown_key(name: str, entry: Entry, valid: Iterable[str]) -> UserError:
    top, is_section = "." not in name, isinstance(entry.value, dict)
    settings = [f"{section}.{key}" for section, kind in get_type_hints(Config).items() for key in get_type_hints(kind)]
    best = closest(name, [*(valid if top else ()), *(() if top and is_section else settings)])
    hint = f" Did you mean {best}?" if best else ""
    return UserError(f"{entry.where}: unknown key {name}.{hint} Valid here: {', '.join(valid)}.")
