"""What a folder that launch/bundle made says of itself, in which there is no git."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUMS, COMMIT = "SHA256SUMS", "COMMIT"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by name, of all files that the bundle in `folder` brought.

    Raises:
        OSError: there is no SHA256SUMS, or it cannot be read.
    """
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def commit(folder: Path) -> str | None:
    """The commit that the bundle in `folder` was made of, with -dirty after changes to its code; None: no bundle."""
    try:
        made_of = (folder / COMMIT).read_text(encoding="utf-8").strip()
        code = {name: digest for name, digest in read_sums(folder).items() if name.startswith("cifar_dist/")}
    except OSError:
        return None
    same = all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in code.items())
    return made_of if same or made_of.endswith("-dirty") else f"{made_of}-dirty"
