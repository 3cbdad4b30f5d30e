"""The option --json of the commands. tests/unit/test_config.py tests the rest of cli."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_dist.cli import json_writer
from cifar_dist.errors import UserError


def test_json_of_a_command(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    write = json_writer(folder / "a.json")
    write({"a": [1, None]})
    assert (folder / "a.json").read_text() == '{\n  "a": [1, null]\n}\n'
    json_writer(None)({"a": 1})
    (folder / "a.json").unlink()
    folder.rmdir()
    with pytest.raises(UserError, match=r"--json .*/new/a\.json cannot be written: No such file or directory\."):
        write({})


def test_json_paths_that_cannot_be_used_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "nowhere" / "a.json", "No such file or directory"),
        (tmp_path / "file" / "a.json", "Not a directory"),
        (tmp_path, "it is a folder, link, device or pipe"),
        (Path("/dev/null"), "it is a folder, link, device or pipe"),
        (Path("/dev/stdout"), "it is a folder, link, device or pipe"),
    ):
        with pytest.raises(UserError) as error:
            json_writer(path)
        assert str(error.value) == f"--json {path} cannot be written: {reason}."
