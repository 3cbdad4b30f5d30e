"""YAML with the line and the own text of every value, so that a setting's type decides what the text means.

`yaml.safe_load` would drop the first of two equal keys, and read text by YAML 1.1: yes as a boolean, 010 as 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml import MappingNode, Node, ScalarNode

from cifar_dist.errors import UserError, explain_os_error

MAX_BYTES = 100_000  # a complete configuration has 3,000
_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}


@dataclass(frozen=True)
class Entry:
    """A key's line and value: text, None for YAML's null, a mapping, or an empty list in place of any list.

    `quoted`: the value is text, even if it reads null or none.
    """

    line: int
    value: str | dict[str, Entry] | list[str] | None
    quoted: bool = False


def read_file(path: Path) -> bytes:
    """The bytes of a configuration file.

    Raises:
        UserError: it cannot be read.
    """
    with explain_os_error(str(path), "The configurations of this project are in configs/."), path.open("rb") as file:
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
    top = Entry(1, None) if root is None else _entry(root, root, origin, {})
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
        return Entry(line, None if node.tag == f"{_TAG}null" else node.value, is_text)
    return Entry(line, _mapping(node, origin, seen) if isinstance(node, MappingNode) else [])


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
