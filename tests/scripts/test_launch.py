"""The scripts that a person types, as they are typed, and every command of the README."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cifar_dist.cli import load_config
from cifar_dist.tracking.wandb_files import read_history
from tests.support import runs
from tests.support.runs import free_port
from tests.support.wandb_server import serve

pytestmark = pytest.mark.run
LAUNCH = runs.REPOSITORY / "launch"
TINY = ("--config", str(runs.REPOSITORY / "configs/quickstart.yaml"), "--model.width", "0.0625", "--data.subset", "256",
        "--train.max_steps", "2", "--eval.tta", "none", "--eval.bn_samples", "250",
        "--track.wandb", "disabled")  # fmt: skip


def start(script: str, *arguments: str | Path, cpu: str = "", **environment: str) -> subprocess.Popen[str]:
    """Start a script; `cpu` binds it to one processor, because real nodes do not share processors."""
    pinned = ["taskset", "-c", cpu] if cpu else []
    return subprocess.Popen(
        [*pinned, str(LAUNCH / script), *map(str, arguments)],
        cwd=runs.REPOSITORY,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.xdist_group("clock")
def test_setup_with_nothing_to_do_is_quick() -> None:
    runs.finish(start("setup"))
    started = time.monotonic()
    output = runs.finish(start("setup"))
    assert time.monotonic() - started < 2
    assert output == ""


def test_setup_names_what_is_missing(tmp_path: Path) -> None:
    """On a machine without compiler, headers, apt and root: a copy of the script, with almost nothing on PATH."""
    for name in ("launch/setup", "launch/lib/args.sh", "launch/lib/installing.sh", "pyproject.toml", "uv.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((runs.REPOSITORY / name).read_bytes())
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname", "readlink", "sha256sum", "cut", "id", "env"):
        (tools / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    result = subprocess.run(
        ["bash", str(tmp_path / "launch/setup")], env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    for part in ("C++ compiler", "OpenCV 4", "TurboJPEG", "apt-get install", "conda install", "--ffcv-wheel"):
        assert part in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_test_explains_its_arguments() -> None:
    """Before it installs or runs anything."""
    help_text = runs.finish(start("test", "--help"))
    for line in ("launch/test ", "launch/test --all ", "launch/test [--all] -- ARGS "):
        assert f"\n  {line}" in help_text
    mistaken = runs.finish(start("test", "--everything", "tests/unit/data/test_order.py"), expected=2)
    assert mistaken == "error: launch/test knows no argument --everything; valid: --all, -- ARGS OF PYTEST, --help.\n"
    assert "knows no argument tests/unit/data/test_order.py" in runs.finish(
        start("test", "--all", "tests/unit/data/test_order.py"), 2
    )


@pytest.mark.data
def test_quickstart_trains_and_resumes(data_dir: Path, tmp_path: Path) -> None:
    arguments = (*TINY[2:], "--data.dir", data_dir, "--run.dir", tmp_path / "my run")
    output = runs.finish(start("quickstart", *arguments))
    assert re.search(r"test accuracy [\d.]+% on 10,000 images", output)
    figures = runs.summary(tmp_path / "my run")
    assert figures["world_size"] == min(2, os.cpu_count() or 1)
    assert (figures["steps"], figures["train_n"]) == (2, 256)
    assert "this run is complete" in runs.finish(start("quickstart", *arguments))


def test_quickstart_explains_itself_before_it_installs_anything() -> None:
    output = runs.finish(start("quickstart", "--help"))
    assert output.startswith("From nothing to a trained GoogLeNet")


def test_quickstart_takes_a_copy_of_the_dataset(tmp_path: Path) -> None:
    """The dataset is prepared from it, which here says what the copy lacks."""
    (tmp_path / "my copy").mkdir()
    places = ("--data.dir", tmp_path / "data", f"--data.source={tmp_path}/my copy")
    output = runs.finish(start("quickstart", *places), expected=3)
    assert f"{tmp_path}/my copy" in output
    assert not (runs.REPOSITORY / "runs/quickstart/config.yaml").exists()


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_nodes_rendezvous(rendezvous: str) -> None:
    """Two launchers on this machine stand for two nodes; only rank 0 prints."""
    common = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NPROC_PER_NODE": "2"}
    places = [{"NODE_RANK": rank} if rendezvous == "static" else {} for rank in ("0", "1")]
    sizes = ("--train.batch_size", "64", "--train.micro_batch_size", "16", "--print-config")
    nodes = [start("multinode", *sizes, **common, **place) for place in places]
    outputs = [runs.finish(node) for node in nodes]
    assert sum("micro_batch_size: 16" in output for output in outputs) == 1


@pytest.mark.data
def test_two_machines_train(data_dir: Path, tmp_path: Path) -> None:
    """W&B has a run, and one for the system metrics of the second node."""
    common = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NPROC_PER_NODE": "1"}
    arguments = (*TINY, "--eval.test_subset", "500", "--track.wandb", "offline", "--data.dir", data_dir, "--run.dir",
                 tmp_path / "run")  # fmt: skip
    cpus = [str(cpu) for cpu in sorted(os.sched_getaffinity(0))]
    nodes = [
        start("multinode", *arguments, cpu=cpus[rank % len(cpus)], **common, NODE_RANK=str(rank)) for rank in (0, 1)
    ]
    for node in nodes:
        runs.finish(node)
    assert runs.summary(tmp_path / "run")["world_size"] == 2
    assert runs.children_with(str(tmp_path)) == []
    main_id = (tmp_path / "run/wandb_id.txt").read_text().strip()
    main, second = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"), key=lambda path: len(path.name))
    assert (main.name, second.name) == (f"run-{main_id}.wandb", f"run-{main_id}-node-1.wandb")
    assert len(list(read_history(main))) == len(runs.records(tmp_path / "run"))
    assert list(read_history(second)) == []
    for part in (b"proc.cpu.threads", b"run-node-1"):
        assert part in second.read_bytes()
    for file in (main, second):
        with serve() as server:
            sync = {**os.environ, **server.login, "WANDB_DIR": str(tmp_path)}
            subprocess.run(
                [sys.executable, "-m", "wandb", "sync", str(file)], env=sync, check=True, capture_output=True
            )
        (uploaded,) = server.runs.values()
        assert uploaded.settings["groupName"] == "run"
        assert uploaded.num_system_rows > 0


def test_machines_without_an_address() -> None:
    output = runs.finish(start("multinode", NNODES="2", MASTER_ADDR=""), expected=2)
    assert "MASTER_ADDR" in output


@pytest.mark.parametrize("value", ["abc", "-1", "0", "08", "99999999999999999999", "1 2"])
def test_number_of_processes_that_is_none(value: str) -> None:
    output = runs.finish(start("node", *TINY, NPROC_PER_NODE=value), expected=2)
    assert output == f"error: NPROC_PER_NODE is {value}; valid: 1 to 9999.\n"


@pytest.mark.parametrize("value", ["abc", "-1", "2", "01"])
def test_rank_of_a_node_that_is_none(value: str) -> None:
    """Without waiting for a node that does not exist."""
    places = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NPROC_PER_NODE": "1", "NODE_RANK": value}
    output = runs.finish(start("multinode", *TINY, **places), expected=2)
    assert output == f"error: NODE_RANK is {value}; valid: 0 to 1, as NNODES is 2.\n"


@pytest.mark.parametrize("script", ["node", "multinode", "seeds", "rehearse"])
def test_a_link_to_a_script(script: str, tmp_path: Path) -> None:
    """Also with CDPATH, with which cd prints where it goes."""
    (tmp_path / script).symlink_to(LAUNCH / script)
    for variables in ({}, {"CDPATH": ".:/tmp"}):
        process = subprocess.run(
            [tmp_path / script, "--help"], env=os.environ | variables, capture_output=True, text=True, check=False
        )
        assert (process.returncode, process.stderr) == (0, "")
        assert "--" in process.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("seeds", ("debug", "2", "--run.dir=~/x"), "{home}/x holds a run."),
        ("seeds", ("debug", "2", "--run.dir", "${MY_PLACE}/$$/../x"), "x holds a run."),
        ("sweep", ("debug", "--grid", "$NOT_SET/x"), "there is no environment variable NOT_SET"),
        ("seeds", ("c.yaml", "2", "--run.dir", "$NOT_SET/x"), "there is no environment variable NOT_SET"),
        ("rehearse", ("c.yaml", "--world-size", "2", "--run.dir=~nobody-such/x"), "there is no user nobody-such"),
        ("measure", ("--configs", "~/no $MY_NAME.yaml"), "there is no configuration {home}/no a b.yaml"),
        ("measure", ("--out=~/x/config.yaml/y",), "cannot write into {home}/x/config.yaml/y"),
        ("measure", ("--lean", "$NOT_SET", "--part", "1"), "there is no environment variable NOT_SET"),
        ("build-ffcv-wheel", ("--out=~/x/config.yaml",), "cannot write into {home}/x/config.yaml"),
        ("bundle", ("--ffcv-wheel", "$NOT_SET"), "there is no environment variable NOT_SET"),
    ],
)
def test_scripts_expand_paths(script: str, arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "$").mkdir()
    (tmp_path / "x/config.yaml").touch()
    environment = {"HOME": str(tmp_path), "MY_PLACE": str(tmp_path), "MY_NAME": "a b"}
    output = runs.finish(start(script, *arguments, **environment), expected=2)
    assert output.startswith("error: ")
    assert message.format(home=tmp_path) in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("binding", ["node", "socket", "exclusive", "core-complex", ""])
@pytest.mark.parametrize("script", ["node", "multinode"])
def test_binding_to_processors_is_passed_on(script: str, binding: str, tmp_path: Path) -> None:
    """To torchrun's options, which stand before the module; with a program for Python that writes its arguments."""
    python, written = tmp_path / "python", tmp_path / "arguments"
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>"{written}"\n')
    python.chmod(0o755)
    ours = {"CIFAR_DIST_PYTHON": str(python), "NUMA_BINDING": binding, "NPROC_PER_NODE": "2"}
    runs.finish(start(script, *TINY, **ours))
    checked, launched = written.read_text().splitlines()
    assert "--print-config" in checked
    assert "numa" not in checked
    options, _, arguments = launched.partition(" -m cifar_dist.train ")
    assert options.startswith("-m cifar_dist.cluster.launcher ")
    assert re.findall(r" --numa-binding (\S*)", options) == ([binding] if binding else [])
    assert "numa" not in arguments


@pytest.mark.parametrize("closed", ["| true", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full"])
def test_output_that_nobody_reads_does_not_end_a_script(closed: str, tmp_path: Path) -> None:
    """A script of several runs, such as launch/seeds, continues."""
    script = (
        f'set -euo pipefail; . launch/lib/args.sh; sleep 0.2; echo a; echo b >&2; echo "$(echo c)" >{tmp_path}/file'
    )
    command = f"bash -c '{script}' {runs.REPOSITORY}/launch/seeds {closed}"
    subprocess.run(["bash", "-c", command], cwd=runs.REPOSITORY, check=False)
    assert (tmp_path / "file").read_text() == "c\n"


def readme_commands(*names: str) -> list[str]:
    """All indented command lines of the README and the pages in docs/, or of the pages of these `names`."""
    pages = [runs.REPOSITORY / "README.md", *sorted((runs.REPOSITORY / "docs").glob("*.md"))]
    pages = [page for page in pages if not names or page.name in names]
    lines = [line for page in pages for line in re.findall(r"^    (.+)$", page.read_text(), flags=re.M)]
    return [
        line.split("#")[0].strip()
        for line in lines
        if re.match(r"\./|\.venv/|python |torchrun |sbatch |[A-Z_]+=|git |source |pip |cifar-dist ", line)
    ]


# The README's commands, and the test that runs each as it stands or with smaller numbers.
TESTED = {
    "git clone <this repository> && cd cifar_dist": "CI runs in a fresh clone",
    "source .venv/bin/activate": "runs.command uses the same environment",
    "./launch/quickstart": "test_quickstart_trains_and_resumes",
    "./launch/build-ffcv-wheel": "test_wheel.py: test_built_again_it_has_the_same_bytes",
    "./launch/setup --ffcv-wheel PATH": "test_wheel.py: test_setup_from_the_wheel_on_a_bare_machine",
    "./launch/test": "CI",
    "./launch/node --config configs/googlenet.yaml": "test_elastic.py and test_stopping.py, with smaller numbers",
    "./launch/test --all": "by hand",
    "./launch/test --all -- -m 'not long'": "CI",
    "./launch/test -- tests/unit/data/test_order.py -k tail": "test_launch_test_explains_itself; the rest is CI",
    ".venv/bin/python -m pytest tests/unit/data/test_order.py": "launch/test itself",
    ".venv/bin/python -m pytest -m '' tests/scripts/test_wheel.py -k container": "launch/test itself",
    ".venv/bin/python -m tests.support.mutants": "by hand",
    "torchrun --nproc_per_node=8 -m cifar_dist.train --config configs/googlenet.yaml": "test_eight_ranks_start",
    "NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a ./launch/multinode --config configs/googlenet.yaml": "test_two_machines_*",
    "MAX_RESTARTS=2 ./launch/node --config configs/googlenet.yaml --run.name mine --run.resume auto": "test_elastic.py",
    "./launch/debug": "test_debug.py",
    "python -m cifar_dist.prepare --data.source ~/Downloads/cifar10.tgz": "test_copies.py: test_forms",
    "python -m tests.support.real_gpu equal cuda": "test_exact_sum.py; on a CPU where there is no GPU",
    "python -m cifar_dist.report runs/mine": "test_report_page.py: pages",
    "python -m cifar_dist.report runs/exp --out exp.html": "test_report_page.py: pages",
    "python -m cifar_dist.report ~/other/wandb/offline-run-20261130_154325-abc12345 --out other.html":
        "test_wandb_folder.py: test_the_command",
    "python -m cifar_dist.compare runs/mine runs/other": "test_compare.py",
    "python -m cifar_dist.doctor": "test_doctor.py: test_a_machine_that_works",
    "python -m cifar_dist.doctor --json doctor.json": "test_doctor.py: test_a_machine_that_works",
    "python -m cifar_dist.doctor --only data disk --data.dir /scratch/data --run.dir /scratch/runs":
        "test_doctor.py: test_nothing_is_left_behind",
    "python -m cifar_dist.compare runs/mine runs/other --plot curves.png": "test_compare.py: test_plot",
    "python -m cifar_dist.runs": "test_run_table.py: test_table",
    "python -m cifar_dist.runs runs/exp --sort accuracy --descending True": "test_run_table.py: test_table",
    "python -m cifar_dist.runs --state running killed --format jsonl":
        "test_run_table.py: test_a_real_run_while_it_runs_and_after_it_was_killed, test_formats",
    "python -m cifar_dist.train --config configs/quickstart.yaml --run.name mine --run.resume auto": "test_resume.py",
    "python -m cifar_dist.predict runs/mine cat.jpg": "test_inference.py: test_predict_a_folder",
    "python -m cifar_dist.predict runs/mine folder --top_k 1 --tta flip --format jsonl":
        "test_inference.py: test_predict_a_folder, test_small_batches_and_views",
    "python -m cifar_dist.export runs/mine --format all": "test_inference.py: exported",
    "python -m cifar_dist.export runs/mine --format onnx --fold_batch_norm True --merge_1x1 True --uint8_input True":
        "test_formats.py: test_files_compute_what_the_network_computes",
    "python -m cifar_dist.evaluate runs/mine --which best": "test_evaluate.py and test_run_directory.py",
    "python -m cifar_dist.train --config configs/quickstart.yaml --model.weights runs/mine": "test_weights.py",
    "python -m cifar_dist.train --model.weights googlenet.pth --model.stem imagenet --model.branch5x5 3x3 "
    "--model.variant torchvision": "test_weights.py",
    "./launch/seeds configs/quickstart.yaml 3 --run.name exp": "test_seeds.py: test_stopped_and_gone_on",
    "./launch/sweep quickstart 3 --grid optim.lr=0.1,0.2 train.epochs=2,3 --data.train_on train":
        "test_sweep.py: test_every_combination_and_one_table",
    "./launch/sweep quickstart --grid grid.txt --data.train_on train": "test_grid.py: test_a_line_of_a_file_each",
    "pip install .": "test_package.py, with uv, and with the dependencies of the environment at work",
    "cifar-dist --help": "test_commands.py: test_overview",
    "cifar-dist train --config quickstart --run.name mine": "test_package.py, with --config debug",
    "cifar-dist evaluate runs/mine": "test_package.py",
    "cifar-dist --completion bash >~/.local/share/bash-completion/completions/cifar-dist":
        "test_commands.py: test_completion_in_bash",
    "python -m cifar_dist.seeds runs/exp --json exp.json": "test_seeds.py: test_table_and_json",
    "python -m cifar_dist.bench all --json bench.json": "test_bench.py: test_all",
    "python -m cifar_dist.bench compare old.json new.json": "test_bench.py: test_step",
    "./launch/setup": "test_setup_with_nothing_to_do_is_quick",
    "sbatch slurm/train.sh --config configs/googlenet.yaml": "test_slurm.py: test_bounded_requeues",
    "sbatch --nodes=2 --gpus-per-node=4 slurm/train.sh --config configs/googlenet.yaml":
        "test_slurm.py: test_two_nodes_read_the_samples_of_one_process; without GPUs",
    "sbatch --oversubscribe --gpus-per-node=1 --cpus-per-task=8 --mem=32G slurm/train.sh "
    "--config configs/googlenet.yaml":
        "test_slurm.py: test_two_jobs_share_the_nodes; without GPUs",
    "sbatch --array=0-2 slurm/sweep.sh --config configs/quickstart.yaml":
        "test_slurm.py: test_array_of_seeds_ends_with_one_table",
    "sbatch --array=0-5 slurm/sweep.sh --grid grid.txt --config configs/quickstart.yaml":
        "test_slurm.py: test_array_over_a_grid",
    "sbatch slurm/evaluate.sh runs/job-17 --json score.json":
        "test_slurm.py: test_evaluate",
    "sbatch --nodes=2 --gpus-per-node=4 slurm/container.sh --config configs/googlenet.yaml":
        "test_slurm.py: test_container; without GPUs",
    "sbatch --output=logs/%x-%j.out slurm/train.sh --config configs/googlenet.yaml":
        "test_slurm.py: test_output_in_another_folder",
    "./launch/rehearse --world-size 8 configs/googlenet.yaml --steps 20": "test_rehearse.py",
    "python -m cifar_dist.train --config quickstart --run.name mine --track.tags baseline,v1":
        "test_wandb_run.py: test_results",
    "./launch/wandb-sync": "test_wandb_sync.py: test_dry_run",
    "./launch/wandb-sync runs/mine --dry-run": "test_wandb_sync.py: test_dry_run",
    "python -m cifar_dist.train --config quickstart --run.name mine --track.tensorboard True":
        "test_tracking.py: test_tensorboard_equals_metrics",
    "./launch/bundle": "test_bundle.py, without torch; whole by hand",
    "./launch/bundle --system-torch": "test_bundle.py",
    "./launch/bundle --lean": "test_versions.py: test_measuring_from_a_lean_bundle",
    "./launch/measure --lean dist/cifar_dist-lean --part 1": "test_versions.py: test_measuring_from_a_lean_bundle",
    **dict.fromkeys(
        (f"./launch/measure --part {part}" for part in range(1, 5)), "test_versions.py, from a lean bundle on a CPU"
    ),
    **dict.fromkeys(readme_commands("extending.md"), "test_extending_page.py, as printed"),
    "./launch/measure": "test_bundle.py: test_measures_without_network; test_measure.py",
    "./launch/measure --bench none --configs configs/cpu-84.yaml": "test_measure.py",
}  # fmt: skip
QUICK = ("--help", "--print-config", "cifar_dist.prepare", "cifar_dist.models", "cifar_dist.plan")


def test_readme_commands_are_all_known() -> None:
    commands = readme_commands()
    assert len(commands) >= 10
    quick = (*QUICK, "CHANGE")  # of the latter see test_recipe_commands_are_valid
    unknown = [line for line in commands if line not in TESTED and not any(part in line for part in quick)]
    assert unknown == []
    assert [line for line in TESTED if line not in commands] == []


@pytest.mark.data
@pytest.mark.usefixtures("data_dir")
@pytest.mark.parametrize("line", [line for line in readme_commands() if any(part in line for part in QUICK)])
def test_quick_readme_commands(line: str) -> None:
    program, *words = shlex.split(line)
    assert program in ("python", "cifar-dist")
    assert runs.finish(runs.start_command([str(runs.BIN / program), *words]))


def test_recipe_commands_are_valid() -> None:
    """Each change that docs/recipe.md lists, with the command above its table, gives a configuration."""
    text = (runs.REPOSITORY / "docs/recipe.md").read_text(encoding="utf-8")
    sections = [part for part in text.split("\n## ") if "CHANGE" in part]
    tried = 0
    for section in sections:
        command = re.findall(r"^    python -m cifar_dist.train (.+) CHANGE$", section, flags=re.M)
        assert len(command) == 1
        for change in re.findall(r"^\|[^|]*`(--[^`]+)`", section, flags=re.M):
            load_config(shlex.split(f"{command[0]} {change}"))
            tried += 1
    assert tried >= 15


def test_eight_ranks_start() -> None:
    """The README's torchrun line, up to where eight devices would be needed."""
    output = runs.run(8, "--config", "configs/googlenet.yaml", "--print-config")
    assert yaml.safe_load(output[output.index("run:") :])["train"]["batch_size"] == 1024
