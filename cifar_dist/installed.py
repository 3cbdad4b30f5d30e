"""Whether what is installed is what pyproject.toml asks for: `python -m cifar_dist.installed`.

For an environment that was put together of locked wheels and of packages that the machine brings itself, with no
resolver over both. Direct requirements must be met; what other packages say of each other is told as a note, as such
bounds are often narrower than what works.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cifar_dist import errors

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def main() -> None:
    """Print the notes; end with exit code 2 when a direct requirement is not met."""
    with errors.reported():
        tree = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
        direct = [Requirement(text) for text in tree["project"]["dependencies"]]
        missed = [complaint for item in direct if (complaint := unmet(item))]
        if missed:
            advice = "Give the machine what is asked for, or make a bundle that brings it (./launch/bundle --help)."
            raise errors.UserError("\n".join(["what is installed does not do:", *missed, advice]))
        replaced = {canonicalize_name(Requirement(text).name) for text in tree["tool"]["uv"]["override-dependencies"]}
        for note in notes(direct, replaced):
            print(f"note: {note}", file=sys.stderr)


def unmet(requirement: Requirement) -> str:
    """What is wrong, or nothing. A build like 2.11.0a0+git counts as the release that it leads to."""
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"  {requirement} is not installed"
    version = Version(found)
    fits = requirement.specifier.contains(version, prereleases=True)
    if fits or requirement.specifier.contains(version.base_version):
        return ""
    return f"  {requirement} is asked for, and {found} is installed"


def notes(direct: list[Requirement], replaced: Collection[str]) -> Iterator[str]:
    """What packages ask of each other and do not find, those apart that pyproject.toml replaces by others."""
    todo, seen = [item.name for item in direct], set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # whoever asked for it has said so
        for requirement in map(Requirement, lines):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if canonicalize_name(requirement.name) in replaced:
                continue
            complaint = unmet(requirement).strip()
            if complaint:
                yield f"{name}: {complaint}"
            todo.append(requirement.name)


if __name__ == "__main__":
    main()
