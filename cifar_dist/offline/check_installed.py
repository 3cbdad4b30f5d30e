"""Check the environment of a bundle against pyproject.toml: `python -m cifar_dist.offline.check_installed`.

launch/setup runs it, because no resolver has seen the bundle's wheels and the machine's own packages together. Only the
direct requirements are checked: the bounds that other packages set are often too narrow.
"""

import importlib.metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from cifar_dist import errors
from cifar_dist.process import run_and_exit

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def main() -> None:
    """Exit with code 2 and the reasons if a direct requirement is not met."""
    with errors.exit_on_error():
        unmet = [f"  {text}" for item in requirements() if (text := problem(item))]
        if unmet:
            advice = "Install these on the machine, or make a bundle that brings them (./launch/bundle --help)."
            raise errors.UserError("\n".join(["requirements are not met:", *unmet, advice]))


def requirements() -> list[Requirement]:
    """The direct requirements: those of pyproject.toml, or of the installed package."""
    if PYPROJECT.exists():
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        return [Requirement(text) for text in project["dependencies"]]
    found = [Requirement(text) for text in importlib.metadata.requires("cifar_dist") or ()]
    return [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]


def problem(requirement: Requirement) -> str:
    """Why the requirement is not met, or nothing. A build like 2.11.0a0+git counts as 2.11.0."""
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement} is not installed"
    if any(requirement.specifier.contains(text, prereleases=True) for text in (found, Version(found).base_version)):
        return ""
    return f"{requirement} is required, and {found} is installed"


if __name__ == "__main__":
    run_and_exit(main)
