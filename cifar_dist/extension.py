"""Own code of a user, which a setting names by a reference MODULE:NAME, as in `model.name my_module:my_network`.

docs/extending.md has an example of each kind. This module does not import torch.
"""

import difflib
import importlib
import re
import sys
import sysconfig
import traceback
from bdb import BdbQuit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from cifar_dist.config import NETWORKS, OPTIMIZERS, Config
from cifar_dist.errors import UserError, one_line

T = TypeVar("T")
_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_OTHERS = ("<frozen ", "site-packages", sysconfig.get_path("stdlib"), str(Path(__file__).parent))


def names(config: Config) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Each setting that may hold a reference: its own name, its value, and the built-in names that it may hold."""
    yield "model.name", config.model.name, NETWORKS
    yield "optim.name", config.optim.name, OPTIMIZERS
    if config.augment.extra is not None:
        yield "augment.extra", config.augment.extra, ()
    if config.run.hooks is not None:
        yield "run.hooks", config.run.hooks, ()


def check_names(config: Config) -> None:
    """Refuse what is neither a built-in name nor of the form MODULE:NAME. Imports nothing.

    Raises:
        UserError: names the closest valid name.
    """
    for setting, name, built_in in names(config):
        module, colon, function = name.partition(":")
        if name in built_in or (_REFERENCE.fullmatch(name) and not module.endswith(".py")):
            continue
        path = module.removesuffix(".py").replace("/", ".") + f":{function}"
        best = path if colon and _REFERENCE.fullmatch(path) else next(iter(_closest(name, built_in)), None)
        hint = f" Did you mean {best}?" if best else ""
        valid = ", ".join(built_in or ("None",))
        raise UserError(
            f"{setting} is {name}.{hint} Valid: {valid}; or MODULE:NAME, which is NAME in your own MODULE.py "
            f"(docs/extending.md)."
        )


def import_all(config: Config) -> None:
    """Import all own code that `config` names, so that mistakes end a run before it has a directory.

    Raises:
        UserError: see `resolve`.
    """
    for setting, name, built_in in names(config):
        if name not in built_in:
            resolve(setting, name)


def resolve(setting: str, reference: str) -> Any:
    """The function or class that `setting` names by `reference`, imported from the working directory or PYTHONPATH.

    Raises:
        UserError: there is no such module or name in it, importing it fails, or it cannot be called.
    """
    module_name, _, name = reference.partition(":")
    given = f"{setting} is {reference}"
    if "" not in sys.path:
        sys.path.append("")  # the working directory, which is missing if a console script was started
    with explained(f"{given}, but importing {module_name}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise  # it is a module that this one imports
            raise UserError(
                f"{given}, but there is no module {module_name} in {Path.cwd()} or on PYTHONPATH. "
                f"Start in the folder of {module_name.replace('.', '/')}.py, or add that to PYTHONPATH."
            ) from None
    if not hasattr(module, name):
        close = _closest(name, [other for other in vars(module) if not other.startswith("_")])
        hint = f" Did you mean {module_name}:{close[0]}?" if close else ""
        raise UserError(f"{given}, but {getattr(module, '__file__', module_name)} has no {name}.{hint}")
    found = getattr(module, name)
    if not callable(found):
        raise UserError(f"{given}, which is of type {type(found).__name__}, not a function or class.")
    return found


def create(setting: str, reference: str, kind: type[T], *arguments: Any) -> T:
    """What the function or class `reference` returns for `arguments`.

    Raises:
        UserError: it cannot be imported (see `resolve`), fails, or returns something else than a `kind`.
    """
    function = resolve(setting, reference)
    with explained(f"{setting} is {reference}, but calling it"):
        made = function(*arguments)
    if not isinstance(made, kind):
        raise UserError(
            f"{setting} is {reference}, which returned an object of type {type(made).__name__} instead of one of type "
            f"{kind.__name__} (docs/extending.md)."
        )
    return made


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Convert an error of own code inside to a `UserError`: `what` failed, the error, and its line in own code."""
    try:
        yield
    except (UserError, BdbQuit):  # the latter: q in pdb
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001
        raise UserError(f"{what} failed: {type(error).__name__}: {one_line(error)}{_place(error)}") from None


def _place(error: BaseException) -> str:
    """The innermost line of own code on the way to `error`; empty if none is known."""
    if isinstance(error, SyntaxError):
        return f"\n  {error.filename}, line {error.lineno}: {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in _OTHERS)]
    return f"\n  {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else ""


def _closest(name: str, valid: list[str] | tuple[str, ...]) -> list[str]:
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
