"""launch/measure: parts that fail, interruption and resumption, wrong arguments."""

from __future__ import annotations

import hashlib
import os
import re
import signal
from pathlib import Path

import pytest

from tests.support import runs

pytestmark = pytest.mark.run
MEASURE = str(runs.REPOSITORY / "launch/measure")
CONFIG = str(runs.REPOSITORY / "configs/quickstart.yaml")


def words(data_dir: Path, *arguments: str) -> list[str]:
    return [MEASURE, *arguments, *runs.SHORT[2:], "--data.dir", str(data_dir)]


@pytest.mark.slow
@pytest.mark.data
def test_an_interrupted_run_is_resumed_although_other_parts_fail(
    data_dir: Path, tmp_path: Path, short_run: Path
) -> None:
    """Ctrl-C reaches the script only; no process is left, and the result is that of an uninterrupted run."""
    broken, results = tmp_path / "broken.yaml", tmp_path / "my results"
    broken.write_text("train: {epochs: -1}\n")
    command = words(data_dir, "--bench", "loader --repeats 0", "--configs", str(broken), CONFIG, "--out", str(results))
    command = [*runs.ON_ONE_CPU, "env", "NPROC_PER_NODE=1", *command]
    process = runs.start_command(command, tmp_path)
    key = hashlib.sha256(f"{results.resolve()}\n".encode()).hexdigest()[:6]
    run = tmp_path / f"runs/my results-{key}-quickstart"
    runs.wait_until(lambda: len(runs.logged_steps(run)) >= 2, process)
    os.kill(process.pid, signal.SIGINT)
    output = runs.finish(process, expected=130)
    assert output.splitlines()[-1] == "measure: stopped; the same command resumes from here"
    assert runs.children_with(str(tmp_path)) == []
    assert not (results / "table.txt").exists()

    output = runs.finish(runs.start_command(command, tmp_path), expected=2)
    runs.assert_same(run, short_run)
    assert runs.summary(results / "quickstart") == runs.summary(run)
    rows = output[output.rindex("\nwhat  ") :].splitlines()
    assert rows[2].startswith(f"bench loader --repeats 0     FAILED with exit code 2, see {results}/bench.log")
    assert rows[3].startswith(f"broken                       FAILED with exit code 2, see {results}/broken/output.log")
    assert rows[4].startswith("quickstart                   test ")
    assert "repeats is 0" in (results / "bench.log").read_text()
    assert "train.epochs" in (results / "broken/output.log").read_text()
    assert "torch" in (results / "machine.txt").read_text()
    assert sorted(path.name for path in results.iterdir()) == [
        ".arguments", "bench.log", "broken", "machine.txt", "quickstart", "results.json", "table.txt"
    ]  # fmt: skip
    again = runs.finish(runs.start_command(command, tmp_path), expected=2)
    assert re.search(r"^quickstart +test .* s of training +before$", again, flags=re.M)
    other = runs.finish(runs.start_command([*command, "--run.seed", "1"], tmp_path), expected=2)
    assert f"error: {results} has results of broken with other arguments: " in other.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.data
def test_a_stopped_benchmark_leaves_no_process(data_dir: Path, tmp_path: Path) -> None:
    command = words(data_dir, "--bench", "loader --seconds 597.25", "--configs", "none")
    process = runs.start_command(command, tmp_path)
    runs.wait_until(lambda: runs.children_with("597.25") != [process.pid], process)
    runs.wait_until((tmp_path / "results/bench.log").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    runs.finish(process, expected=143)
    assert runs.children_with("597.25") == []
    assert not (tmp_path / "results/bench.json").exists()


@pytest.mark.slow
@pytest.mark.data
def test_the_speed_presets_need_a_gpu(data_dir: Path, tmp_path: Path) -> None:
    command = [MEASURE, "--bench", "none", "--data.dir", str(data_dir)]
    output = runs.finish(runs.start_command(command, tmp_path))
    for name in ("speed-94", "speed-96"):
        assert f"\n{name}                     skipped: no GPU, would take days; --configs names others" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.data
def test_a_part_that_takes_too_long_is_repeated(data_dir: Path, tmp_path: Path) -> None:
    """The run that was going on is stopped by its own signal, so it has saved; what came before is kept."""
    command = ["env", "NPROC_PER_NODE=1", MEASURE, "--part", "2", "--short", "--data.dir", str(data_dir)]
    command = [*runs.ON_ONE_CPU, *command]
    output = runs.finish(runs.start_command([*command, "--seconds", "30"], tmp_path), expected=75)
    assert re.search(r"^[\w-]+ +not (finished|begun) in 30 s: repeat the command", output, flags=re.M)
    done = set(re.findall(r"^([\w-]+) +test ", output, flags=re.M))
    assert "FAILED" not in output
    output = runs.finish(runs.start_command(command, tmp_path), expected=0)
    before = set(re.findall(r"^([\w-]+) +test .* before$", output, flags=re.M))
    assert before == done
    assert (tmp_path / "results-short/table-2.txt").read_text() in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--benchmark", "all"), "launch/measure has no argument --benchmark"),
        (("--bench",), "--bench needs a value"),
        (("--configs",), "--configs needs one file or more, or none"),
        (("--configs", "configs/nowhere.yaml"), "there is no configuration configs/nowhere.yaml"),
        (("--configs=nowhere.yaml", "--bench=none"), "there is no configuration nowhere.yaml"),
        (("--configs", CONFIG, CONFIG), "two configurations are named quickstart.yaml; their results would be, too."),
        (("--out", "/dev/null/x"), "cannot write into /dev/null/x"),
        (("--out", "."), "--out is .; valid: a folder with a name."),
        (("--run.name", "mine"), "--run.name is set by launch/measure"),
        (("--train.epochs",), "--train.epochs needs a value"),
        (("--part", "5"), "--part is 5; valid: 1, 2, 3 or 4."),
        (("--short",), "--lean, --short and --seconds need --part."),
        (("--part", "1", "--seconds", "9m"), "--seconds is 9m; valid: whole seconds, 1 or more."),
        (("--part", "1", "--bench", "all"), "--part decides what is measured"),
        (("--part=2", "--model.width", "0.5"), "--part decides what is measured"),
        (("--part", "2", "--lean", "nowhere", "--out", "/tmp"), "there is no folder nowhere; ./launch/bundle --lean"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    output = runs.finish(runs.start_command([MEASURE, *arguments], tmp_path), expected=2)
    assert message in output
    assert len(output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help() -> None:
    assert "--configs FILE..." in runs.finish(runs.start_command([MEASURE, "--help"]))
