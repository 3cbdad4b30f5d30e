"""The commit in summary.json: that of this project, or none. With real git repositories."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_dist.training.summary import GitState, git_state

OWN = "cifar_dist/training/summary.py"  # the file that must be tracked
NONE = GitState(None, None)


@pytest.fixture(autouse=True)
def _git_without_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@a")
    yield
    git_state.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "protocol.file.allow=always", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def state(root: Path) -> GitState:
    git_state.cache_clear()
    return git_state(root)


def digest(*lines: str) -> str:
    return hashlib.sha256("".join(f"{each}\n" for each in lines).encode()).hexdigest()


def line(name: str, content: str) -> str:
    return f"{hashlib.sha256(content.encode()).hexdigest()}  {name}"


def unpack(root: Path) -> Path:
    """The code without git."""
    for name in (OWN, "cifar_dist/cli.py", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
    (root / ".gitignore").write_text("__pycache__/\n")
    return root


def checkout(root: Path) -> tuple[Path, str]:
    """A checkout of this project, and its commit."""
    unpack(root)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root, git(root, "rev-parse", "HEAD")


def test_clean_checkout(tmp_path: Path) -> None:
    root, commit = checkout(tmp_path / "größer a")
    assert state(root) == GitState(commit, None)
    (root / "cifar_dist/__pycache__").mkdir()
    (root / "cifar_dist/__pycache__/cli.pyc").touch()  # ignored
    (root / "notes.txt").touch()  # not tracked, and not in the package
    (root / "cifar_dist/cli.py").touch()
    assert state(root) == GitState(commit, None)
    git(root, "checkout", "-q", "--detach")
    assert state(root) == GitState(commit, None)


def test_uncommitted_changes_are_marked_and_told_apart(tmp_path: Path) -> None:
    root, commit = checkout(tmp_path / "a")
    dirty = f"{commit}-dirty"
    (root / "README.md").write_text("changed\n")
    assert state(root) == GitState(dirty, None)  # outside of the package
    (root / "cifar_dist/cli.py").write_text("one\n")
    cli = line("cifar_dist/cli.py", "one\n")
    assert state(root) == GitState(dirty, digest(cli))
    git(root, "add", "-A")
    assert state(root) == GitState(dirty, digest(cli))
    (root / "cifar_dist/größer.py").write_text("x\n")
    (root / OWN).unlink()
    new = line("cifar_dist/größer.py", "x\n")
    assert state(root) == GitState(dirty, digest(cli, new, f"-  {OWN}"))
    git(root, "config", "diff.noprefix", "true")
    git(root, "config", "status.showUntrackedFiles", "no")
    git(root, "config", "diff.external", "false")
    assert state(root) == GitState(dirty, digest(cli, new, f"-  {OWN}"))
    git(root, "reset", "-q", "--hard")
    assert state(root) == GitState(dirty, digest(new))
    git(root, "mv", "cifar_dist/cli.py", "cifar_dist/cli2.py")
    (root / "cifar_dist/größer.py").unlink()
    moved = line("cifar_dist/cli2.py", "cifar_dist/cli.py\n")
    assert state(root) == GitState(dirty, digest("-  cifar_dist/cli.py", moved))


def test_code_inside_another_repository(tmp_path: Path) -> None:
    """Unpacked in a folder of it, committed there or not, or in its top folder."""
    outer, _ = checkout(tmp_path / "outer")
    assert state(unpack(outer / "vendor/cifar_dist")) == NONE
    git(outer, "add", "-A")
    git(outer, "commit", "-qm", "vendored")
    assert state(outer / "vendor/cifar_dist") == NONE
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-qm", "empty", "--allow-empty")
    assert state(unpack(other)) == NONE
    assert state(unpack(other / ".venv/lib/site-packages")) == NONE


def test_worktrees_submodules_and_links_are_this_project(tmp_path: Path) -> None:
    root, commit = checkout(tmp_path / "a")
    git(root, "worktree", "add", "-q", str(tmp_path / "b"))
    assert state(tmp_path / "b") == GitState(commit, None)
    (tmp_path / "b/cifar_dist/cli.py").write_text("x")
    assert state(tmp_path / "b").commit == f"{commit}-dirty"
    assert state(root) == GitState(commit, None)
    outer, _ = checkout(tmp_path / "outer")
    git(outer, "submodule", "--quiet", "add", str(root), "sub")
    assert state(outer / "sub") == GitState(commit, None)
    (tmp_path / "link").symlink_to(root)
    assert state(tmp_path / "link") == GitState(commit, None)


def test_variables_of_hooks_do_not_mislead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, commit = checkout(tmp_path / "a")
    other, _ = checkout(tmp_path / "b")
    git(other, "commit", "-qm", "more", "--allow-empty")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(root))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "nothing"))
    monkeypatch.setenv("GIT_PREFIX", "cifar_dist/")
    assert state(root) == GitState(commit, None)
    assert state(unpack(tmp_path / "bare")) == NONE


def test_what_git_cannot_tell_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert state(unpack(tmp_path / "plain")) == NONE
    git(unpack(tmp_path / "unborn"), "init", "-q")
    assert state(tmp_path / "unborn") == NONE  # no commit yet
    root, _ = checkout(tmp_path / "damaged")
    (root / ".git/HEAD").write_text("nonsense")
    assert state(root) == NONE
    root, _ = checkout(tmp_path / "a")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state(root) == NONE  # no git
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: giving files to another user needs root")
def test_a_checkout_of_another_user_is_none_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root, commit = checkout(tmp_path / "a")
    for path in (root, root / ".git"):
        os.chown(path, 1234, 1234)
    assert state(root) == NONE
    assert capfd.readouterr() == ("", "")
    for name, value in (("COUNT", "1"), ("KEY_0", "safe.directory"), ("VALUE_0", str(root))):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    assert state(root) in (GitState(commit, None), NONE)  # by the version of git


def test_the_state_is_that_of_the_first_call(tmp_path: Path) -> None:
    root, commit = checkout(tmp_path / "a")
    assert git_state(root) == GitState(commit, None)
    (root / "cifar_dist/cli.py").write_text("x")
    git(root, "commit", "-qam", "while the run takes its time")
    assert git_state(root) == GitState(commit, None)
