"""Check the environment of a bundle against pyproject.toml: `python -m cifar_dist.offline.check_installed`.

launch/setup runs it, because no resolver has seen the bundle's wheels and the machine's own packages together. A direct
requirement that is not met is an error. What other packages require is a note only: their bounds are often too narrow.
"""

import importlib.metadata
import sys
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cifar_dist import errors

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def main() -> None:
    """Print the notes; exit with code 2 if a direct requirement is not met."""
    tree = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    direct = [Requirement(text) for text in tree["project"]["dependencies"]]
    replaced = {canonicalize_name(Requirement(text).name) for text in tree["tool"]["uv"]["override-dependencies"]}
    with errors.exit_on_error():
        unmet = [f"  {text}" for item in direct if (text := problem(item))]
        if unmet:
            advice = "Install these on the machine, or make a bundle that brings them (./launch/bundle --help)."
            raise errors.UserError("\n".join(["requirements are not met:", *unmet, advice]))
        for note in notes(direct, replaced):
            print(f"note: {note}", file=sys.stderr)


def problem(requirement: Requirement) -> str:
    """Why the requirement is not met, or nothing. A build like 2.11.0a0+git counts as 2.11.0."""
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement} is not installed"
    if any(requirement.specifier.contains(text, prereleases=True) for text in (found, Version(found).base_version)):
        return ""
    return f"{requirement} is required, and {found} is installed"


def notes(direct: Collection[Requirement], replaced: Collection[str]) -> Iterator[str]:
    """Unmet requirements of all packages below `direct`, except on packages that pyproject.toml replaces."""
    todo, seen = [item.name for item in direct], set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen or not any(importlib.metadata.distributions(name=name)):
            continue
        seen.add(name)
        for item in map(Requirement, importlib.metadata.requires(name) or []):
            if canonicalize_name(item.name) in replaced or (item.marker and not item.marker.evaluate({"extra": ""})):
                continue
            if text := problem(item):
                yield f"{name}: {text}"
            todo.append(item.name)


if __name__ == "__main__":
    main()
