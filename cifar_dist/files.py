"""Paths as users write them, atomic writes (a file is complete or absent, also after a power failure), and SHA-256."""

import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from cifar_dist.errors import UserError
from cifar_dist.filesystem import replace, sync_directory

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
"""Names of the files that `write_bytes_atomic` writes before they are renamed."""


def expand_path(text: str) -> str:
    """`text` with the values of ~, ~user, $NAME and ${NAME}; $$ stands for $.

    Raises:
        UserError: names the user or the variable that there is not.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name and not os.environ.get(name):
            raise UserError(f"there is no environment variable {name}, or it is empty: {text} (a literal $ is $$)")
        return os.environ[name] if name else "$"

    user, slash, rest = text.partition("/") if text.startswith("~") else ("", "", text)
    try:
        home = user and str(Path(user).expanduser())
    except RuntimeError:
        raise UserError(f"there is no user {user[1:]} with a home directory: {text} (a file: ./{text})") from None
    return home + slash + re.sub(r"\$(?:\$|([A-Za-z_]\w*)|\{(\w+)\})", value, rest, flags=re.ASCII)


def escape_path(text: str) -> str:
    """`text` as `expand_path` gives it back."""
    return ("./" if text.startswith("~") else "") + text.replace("$", "$$")


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: write a temporary file beside it, fsync, rename, fsync the folder.

    The folder must exist. The file gets the permissions that the umask gives new files.

    Raises:
        OSError: the write failed; the old file is unchanged and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:  # including KeyboardInterrupt
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # for messages; the system names no file when a disk is full
        raise
    sync_directory(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Like `write_bytes_atomic`, in UTF-8."""
    write_bytes_atomic(path, text.encode())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `to_json(values)` like `write_bytes_atomic`."""
    write_text_atomic(path, to_json(values))


def to_json(values: dict[str, Any]) -> str:
    """Strict JSON (no NaN), one key per line, nested values on one line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in values.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, damaged or holds something else."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
