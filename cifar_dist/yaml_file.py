"""YAML with the line and the own text of every value, so that a setting's type decides what the text means.

`yaml.safe_load` would drop the first of two equal keys, and read text by YAML 1.1: yes as a boolean, 010 as 8.
A configuration file may build on another, which its key `base` names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from yaml import MappingNode, Node, ScalarNode

from cifar_dist.errors import UserError, explain_os_error
from cifar_dist.files import expand_path

_INSTALLED = Path(__file__).with_name("configs")
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"
"""The configurations of this project: in an installed package, or in a checkout."""
MAX_BYTES = 100_000  # a complete configuration has 3,000
_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}


@dataclass(frozen=True)
class Entry:
    """A key's place and value: text, None for YAML's null, a mapping, or an empty list in place of any list.

    `quoted`: the value is text, even if it reads null or none.
    """

    origin: str
    line: int
    value: str | dict[str, Entry] | list[str] | None
    quoted: bool = False

    @property
    def where(self) -> str:
        return f"{self.origin}, line {self.line}"


def read_config(name: str) -> dict[str, Entry]:
    """The sections of a configuration over those of its base, of the base of that, and so on.

    Args:
        name: as in `locate`.

    Raises:
        UserError: a file cannot be read, or files build on each other in a circle.
    """
    path, named_by, files, found = locate(name), "", list[Path](), dict[str, Entry]()
    while True:
        files.append(path)
        if path.resolve() in [file.resolve() for file in files[:-1]]:
            circle = ", which builds on ".join(map(str, files))
            raise UserError(f"{circle}: a circle. Remove the line with base from one of these files.")
        entries = read_entries(_read_file(path, named_by), str(path))
        base = entries.pop("base", None)
        found = _over(found, entries)
        if base is None:
            return found
        if not isinstance(base.value, str):
            raise UserError(f"{base.where}: base must name a configuration, as in base: googlenet.yaml.")
        named_by = f"{base.where}: base "
        path = locate(base.value, path.parent, named_by)


def locate(name: str, folder: Path = Path(), named_by: str = "") -> Path:
    """The file of a configuration: a bare word is one of this project, such as debug; all else is a path.

    Args:
        folder: to which a path is relative.
        named_by: the beginning of a message.
    """
    if not re.fullmatch(r"[\w-]+", name):
        return folder / expand_path(name)
    path = CONFIGS / f"{name}.yaml"
    if not path.exists():
        names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
        best = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {best[0]}? " if best else ""
        raise UserError(
            f"{named_by}{name} is no configuration of this project. {hint}Valid: {', '.join(names)}; or the path of a "
            f"file, with a / or a suffix: ./{name} or {name}.yaml."
        )
    return path


def _over(upper: Mapping[str, Entry], lower: Mapping[str, Entry]) -> dict[str, Entry]:
    """The keys of both, by section; those of `upper` count where both have one."""
    merged = {**lower, **upper}
    for section in upper.keys() & lower.keys():
        both = [lower[section], upper[section]]
        wrong = [entry for entry in both if not isinstance(entry.value, dict | None)]  # the reader refuses it
        keys = [entry.value for entry in both if isinstance(entry.value, dict)] or [{}]
        merged[section] = wrong[0] if wrong else replace(upper[section], value={**keys[0], **keys[-1]})
    return merged


def _read_file(path: Path, named_by: str) -> bytes:
    advice = f"The configurations of this project are in {CONFIGS}; their names are enough, such as googlenet."
    with explain_os_error(f"{named_by}{path}", advice), path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def read_entries(text: str | bytes, origin: str) -> dict[str, Entry]:
    """The keys at the top level of YAML; merge keys (<<) are resolved. `origin` says where from, for messages.

    Raises:
        UserError: it is no YAML, has no keys at the top level, or the same key twice.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{origin} has more than {MAX_BYTES:,} bytes, so it is no configuration.")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # which resolves no alias, so none can expand without end
    except (yaml.YAMLError, RecursionError) as error:
        reason = "too many brackets" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{origin} is not readable as YAML: {reason}") from None
    top = Entry(origin, 1, None) if root is None else _entry(root, root, origin, {})
    if top.value is None:
        return {}
    if not isinstance(top.value, dict):
        raise UserError(f"{origin}: the file must hold keys and values, not {told(top)}.")
    return top.value


def told(entry: Entry) -> str:
    """A value as messages show it."""
    if isinstance(entry.value, (dict, list)):
        return "keys and values" if isinstance(entry.value, dict) else "a list"
    return repr(entry.value)


def _entry(key: Node, node: Node, origin: str, seen: dict[int, dict[str, Entry]]) -> Entry:
    line = key.start_mark.line + 1
    if node.tag not in (*_SCALARS, f"{_TAG}map", f"{_TAG}seq"):
        tag = node.tag.replace(_TAG, "!!")
        raise UserError(f"{origin} is not readable as YAML: line {line} has the tag {tag}, which no setting has.")
    if isinstance(node, ScalarNode):
        if "\0" in node.value:
            raise UserError(f"{origin}, line {line}: a value holds the character \\0, which no name or path can have.")
        is_text = node.style is not None or (node.tag == f"{_TAG}str" and node.value.lower() == "null")  # !!str null
        return Entry(origin, line, None if node.tag == f"{_TAG}null" else node.value, is_text)
    return Entry(origin, line, _mapping(node, origin, seen) if isinstance(node, MappingNode) else [])


def _mapping(node: MappingNode, origin: str, seen: dict[int, dict[str, Entry]]) -> dict[str, Entry]:
    """The entries of a mapping; `seen` has those of all mappings so far, as aliases may name them again."""
    if id(node) in seen:
        return seen[id(node)]
    own, merged = dict[str, Entry](), dict[str, Entry]()
    seen[id(node)] = own  # for an alias inside its own mapping
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise UserError(f"{origin}, line {line}: a key must be a word, not a list or a mapping.")
        if key.tag == f"{_TAG}merge":
            for part in [value] if isinstance(value, MappingNode) else value.value:
                if not isinstance(part, MappingNode):
                    raise UserError(f"{origin}, line {line}: << needs a mapping, or a list of mappings.")
                merged = _mapping(part, origin, seen) | merged
        elif key.value in own:
            first = own[key.value].line
            raise UserError(f"{origin}: {key.value} is given twice, in lines {first} and {line}. Keep one of them.")
        else:
            own[key.value] = _entry(key, value, origin, seen)
    seen[id(node)] = merged | own
    return seen[id(node)]
