"""How words of the command line become values of options, for tyro. Values in YAML are read by the same rules."""

import re
from collections.abc import Callable
from types import NoneType
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

NO_VALUE = ("none", "null")  # in lower case
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


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


_READ: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("{True,False}", _bool),
    int: ("INT", _int),
    float: ("FLOAT", _float),
    NoneType: ("{None}", _none),
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
