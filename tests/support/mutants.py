"""Faults that were once put into the product by hand, one at a time, and the tests that notice each of them.

    python -m tests.support.mutants [NAME...]     all, or those; all take eight minutes

Run by hand, from the repository. Each mutant is applied to a copy of the checkout, in which the named tests must fail;
they are about the very line that is changed. Without a mutant they must pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
COPIED = ("cifar_dist", "tests", "configs", "pyproject.toml")
TIMEOUT_S = 300


class Mutant(NamedTuple):
    """`old` occurs once in the file `path` below cifar_dist, and becomes `new`; each of `tests` then fails."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


IN_PLACE = (
    '    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")\n'
    "    try:\n"
    '        with temporary.open("xb") as file:\n',
    '    temporary = path\n    try:\n        with temporary.open("wb") as file:\n',
)
GROUP_LEFT = (
    "    yield world\n    # After an error this process ends without it: NCCL would wait for its last kernels, and "
    "those for a lost rank.\n    if size > 1:\n        dist.destroy_process_group()\n",
    "    try:\n        yield world\n    finally:\n        if size > 1:\n            dist.destroy_process_group()\n",
)
RETAINED = "[] if progress.best_step is None else [progress.best_step]"

MUTANTS = (
    # The code that inductor generates for GPUs.
    Mutant("results of batch norm written to memory", "training/precision.py", '"realize_reads_threshold": 8',
           '"realize_reads_threshold": 4', ("test_cuda_code.py::test_each_kind_of_module",)),
    Mutant("gradient of max-pool by atomic additions", "training/precision.py", "decompositions.pop(",
           "decompositions.get(", ("test_cuda_code.py::test_each_kind_of_module",)),
    Mutant("concatenated in NCHW order", "models/inception.py", "return torch.compiler.is_compiling() and ",
           "return False and ", ("test_cuda_code.py::test_each_kind_of_module",)),
    # Gradients and the loss.
    Mutant("no division by the accumulation steps", "training/flat_network.py",
           "objective / self.num_added,", "objective,",
           ("test_train_step.py::test_small_micro_batches_step_like_one_large",)),
    Mutant("label smoothing ignored", "training/flat_network.py",
           "label_smoothing=label_smoothing)", "label_smoothing=0.0)",
           ("test_train_step.py::test_label_smoothing_by_hand[0.2]",)),
    Mutant("loss logged with label smoothing", "training/flat_network.py", "if self.label_smoothing > 0:", "if False:",
           ("test_train_step.py::test_label_smoothing_by_hand[0.2]",)),
    Mutant("gradient norm with the scale of fp16", "training/train_step.py", "return norm / scale", "return norm",
           ("test_train_step.py::test_the_gradient_norm_of_a_logged_step[fp16]",)),
    Mutant("answers of another order", "training/evaluation.py", "(batch.labels, predicted, units_of_it)",
           "(predicted, batch.labels, units_of_it)", ("test_evaluation.py::test_score_counts_each_sample_once",)),
    Mutant("gradient not clipped", "training/train_step.py", "self.config.optim.grad_clip)", "1e9)",
           ("test_train_step.py::test_gradient_is_clipped",)),
    Mutant("first micro-batch of a step forgotten", "training/exact_sum.py",
           "[:-1] += units.to(torch.int64)", "[:-1] = units",
           ("test_exact_sum.py::test_the_sum_is_that_of_the_rounded_terms[fp32]",)),
    Mutant("gradients truncated", "training/exact_sum.py", ".round_()", ".trunc_()",
           ("test_exact_sum.py::test_the_sum_is_that_of_the_rounded_terms[fp64]",)),
    Mutant("only NaN noticed", "training/exact_sum.py",
           "< self._limit", "< 1e38",
           ("test_exact_sum.py::test_an_unusable_element_spoils_the_step_and_not_the_next[0-1e+30]",
            "test_exact_sum.py::test_an_unusable_element_spoils_the_step_and_not_the_next[2--131072.0]")),
    Mutant("every bad gradient left to the scaler", "training/train_step.py", "dtype=torch.float32)) > 1",
           "dtype=torch.float32)) > 0", ("test_train_step.py::test_a_scale_that_does_not_help",)),
    Mutant("weight decay on norm scales", "training/optim.py",
           '{"params": scales, "weight_decay": 0.0,', '{"params": scales, "weight_decay": config.weight_decay,',
           ("test_optim.py::test_groups_of_parameters",)),
    Mutant("learning rate one step late", "training/trainer.py",
           "schedule.step(progress.step)", "schedule.step(max(0, progress.step - 1))",
           ("test_trainer.py::test_each_step_has_its_own_learning_rate",)),
    Mutant("momentum not restored", "training/train_step.py",
           'self.optimizer.load_state_dict(state["optimizer"])', "pass",
           ("test_train_step.py::test_a_restored_step_goes_on_with_the_momentum",)),
    # Which samples, in which order.
    Mutant("permutation of the next epoch", "data/order.py", '"order", epoch)', '"order", epoch + 1)',
           ("test_order.py::test_first_indices_are_pinned",)),
    Mutant("slice of the neighbour", "data/order.py", "batches[first:, rank]",
           "batches[first:, (rank + 1) % world_size]", ("test_order.py::test_ranks_together_read_the_global_batch",)),
    Mutant("first step after a resume skipped", "data/order.py", "batches[first:, rank]",
           "batches[first + (first > 0) :, rank]", ("test_order.py::test_rest_of_epoch_is_its_tail",)),
    Mutant("one test image twice, one never", "training/evaluation.py", "loader.read(np.concatenate(chunks), ",
           "loader.read(np.concatenate([chunks[0][:1], *chunks])[:-1], ",
           ("test_evaluation.py::test_score_counts_each_sample_once",)),
    Mutant("another data set taken for CIFAR-10", "data/prepare/install.py",
           "if found != right.sha256:", "if not found:",
           ("test_install.py::test_damage_is_refused[flipped pixel]",
            "test_install.py::test_damage_is_refused[swapped labels]")),
    # Augmentation.
    Mutant("flip upside down", "data/augment.py", "images.flip(3).permute", "images.flip(2).permute",
           ("test_augment.py::test_every_pixel_equals_plain_numpy",)),
    Mutant("alternating flip does not alternate", "data/augment.py", ">> 31 != keys[4]", ">> 31 != 1",
           ("test_augment.py::test_alternating_flip_alternates",)),
    Mutant("mean of channels exchanged", "data/augment.py", "in cifar10.MEAN)", "in cifar10.MEAN[::-1])",
           ("test_augment.py::test_normalize_centres_the_training_set",)),
    Mutant("standard deviation 1 % too large", "data/augment.py", "STD = tuple(255 *", "STD = tuple(1.01 * 255 *",
           ("test_augment.py::test_normalize_centres_the_training_set",)),
    # Scoring.
    Mutant("scored in training mode", "training/evaluation.py", "        self.model.eval()\n", "",
           ("test_evaluation.py::test_scoring_is_in_evaluation_mode[in training]",)),
    Mutant("no recalibration", "training/trainer.py",
           "self.evaluator.recalibrate(self.loader, bn_samples(self.split, self.config.eval))", "pass",
           ("test_trainer.py::test_what_is_validated_and_saved_has_the_statistics_of_its_weights",)),
    Mutant("no statistics in checkpoints between validations", "training/trainer.py", "if validate or save or ",
           "if validate or ", ("test_trainer.py::test_every_checkpoint_has_the_statistics_of_its_weights",)),
    Mutant("saved after its statistics when stopped", "training/trainer.py",
           "        if not self.evaluator.norms:\n            self._recalibrate()\n        self.save()\n",
           "        self._recalibrate()\n        self.save()\n",
           ("test_trainer.py::test_a_stopped_run_is_saved_before_its_statistics[error1]",)),
    # Files.
    Mutant("no fsync of the file", "files.py", "            os.fsync(file.fileno())\n", "",
           ("test_files.py::test_all_bytes_are_on_the_disk_before_the_rename_and_the_rename_at_the_end",)),
    Mutant("no fsync of the folder", "files.py", "    sync_directory(path.parent)\n", "",
           ("test_files.py::test_all_bytes_are_on_the_disk_before_the_rename_and_the_rename_at_the_end",)),
    Mutant("written in place", "files.py", *IN_PLACE,
           ("test_files.py::test_failed_write_keeps_the_old_file_and_leaves_nothing",)),
    Mutant("best checkpoint not kept", "training/trainer.py", RETAINED, "[]",
           ("test_trainer.py::test_the_newest_checkpoint_and_the_best_stay",
            "test_trainer.py::test_the_best_checkpoint_is_kept_over_a_restart")),
    Mutant("worst checkpoint kept for the best", "training/trainer.py",
           "result.accuracy > progress.best_accuracy", "result.accuracy < progress.best_accuracy",
           ("test_trainer.py::test_the_newest_checkpoint_and_the_best_stay",)),
    Mutant("files removed where no run was", "training/run_directory.py",
           'if config.run.resume == "replace" and _is_replaceable(directory):', 'if config.run.resume == "replace":',
           ("test_run_directory.py::test_replace_removes_nothing_where_no_run_is",)),
    Mutant("results lost by a late signal", "training/run.py", "run_and_sync_errors(world, begin_shutdown)", "pass",
           ("test_stopping.py::test_a_signal_after_the_results_changes_nothing[1]",)),
    # Errors and lost ranks.
    Mutant("process group left after an error", "distributed.py", *GROUP_LEFT,
           ("test_distributed.py::test_the_group_is_left_at_the_end_and_not_after_an_error[fails-False-1]",)),
    Mutant("errors printed after the loader is closed", "train.py", ", report_errors():", ":",
           ("test_running_faults.py::test_error_of_a_rank_whose_loader_never_closes",)),
    Mutant("waiting without end after an error", "errors.py", "        _exit_within(_EXIT_S, code)\n", "        pass\n",
           ("test_running_faults.py::test_error_of_a_rank_whose_loader_never_closes",)),
    Mutant("lost ranks known by their heartbeats only", "fault_tolerance/heartbeat.py",
           "if heartbeat.has_ended()]:", "if False]:",
           ("test_stall_report.py::test_a_process_that_has_ended_is_lost_at_once",)),
    Mutant("a rank that has left is lost", "fault_tolerance/heartbeat.py", "not self.finished and ", "",
           ("test_stall_report.py::test_ranks_whose_process_has_ended",)),
    Mutant("no rank prints that another is lost", "fault_tolerance/watchdog.py",
           "0 if error.printed_elsewhere else self.world.rank", "-1 if error.printed_elsewhere else self.world.rank",
           ("test_stall_report.py::test_one_rank_of_a_node_prints_that_another_is_lost[False-2]",)),
    Mutant("compiled in an exchange of gradients", "training/train_step.py",
           "if self._compiled:\n            # Without", "if False:\n            # Without",
           ("test_compiled_graphs.py::test_no_gradients_are_exchanged_before_all_is_compiled",)),
    Mutant("the launcher that holds the GIL", "training/precision.py",
           'options["use_static_cuda_launcher"] = static_launcher', "pass",
           ("test_cuda_code.py::test_launches_leave_the_gil_to_the_watchdog",)),
    # Signals and W&B.
    Mutant("SIGUSR1 not handled", "process.py", "STOP_SIGNALS = (signal.SIGUSR1, ", "STOP_SIGNALS = (",
           ("test_trainer.py::test_a_signal_in_the_training_loop_is_deferred[SIGUSR1]",)),
    Mutant("id of the W&B run not kept", "tracking/wandb_run.py",
           "if not path.exists():", "if True:", ("test_tracker.py::test_wandb_offline",)),
)  # fmt: skip


def copy_of_checkout(folder: Path) -> Path:
    """A copy without what was compiled from the original."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """In which `folder` comes before the installed package, which is this checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "CIFAR_DIST_TEST_SESSION"}
    data = os.environ.get("CIFAR_DIST_TEST_DATA", str(REPOSITORY / "data"))
    ours = {"PYTHONPATH": str(folder), "CIFAR_DIST_TEST_DATA": data, "OMP_NUM_THREADS": "1"}
    return kept | ours | {"PYTHONDONTWRITEBYTECODE": "1"}


def path_of(test: str) -> str:
    """With the folder of the file that `test` names."""
    file, _, name = test.partition("::")
    (path,) = (REPOSITORY / "tests").rglob(file)
    return f"{path.relative_to(REPOSITORY)}::{name}"


def failed_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, set[str], str]:
    """Run `tests` in the copy: pytest's exit code, the ids of the tests that failed, and its output."""
    words = [sys.executable, "-m", "pytest", "-m", "", "-q", "--tb=short", "-rf", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*words, *(str(path_of(test)) for test in tests)], cwd=folder, env=environment(folder), capture_output=True,
        text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    lines = [line.split(" - ")[0] for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    return result.returncode, {line.rpartition("/")[2] for line in lines}, result.stdout + result.stderr


def changed(mutant: Mutant) -> str:
    """The file of `mutant`, with the one place changed."""
    text = (REPOSITORY / "cifar_dist" / mutant.path).read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"error: {mutant.name}: {mutant.path} has its text {text.count(mutant.old)} times, not once")
    return text.replace(mutant.old, mutant.new)


def lived(mutant: Mutant) -> bool:
    """Apply it, say which tests noticed it, and tell if one of those that should did not."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy_of_checkout(Path(scratch))
        (folder / "cifar_dist" / mutant.path).write_text(changed(mutant))
        code, failed, output = failed_tests(folder, mutant.tests)
    # A test without brackets stands for all its parametrisations, of which one is enough.
    missed = [test for test in mutant.tests if not any(name == test or name.startswith(f"{test}[") for name in failed)]
    if code != 1 or missed:
        print(f"{mutant.name}: LIVED, not noticed by {', '.join(missed)}\n{output[-2000:]}", flush=True)
        return True
    print(f"{mutant.name}: caught by {', '.join(mutant.tests)}", flush=True)
    return False


def check_unchanged(mutants: list[Mutant]) -> None:
    """Each mutant applies, the copy is the code that is imported, and without a mutant all tests pass."""
    for mutant in mutants:
        changed(mutant)
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy_of_checkout(Path(scratch))
        where = [sys.executable, "-c", "import cifar_dist; print(cifar_dist.__file__)"]
        imported = subprocess.check_output(where, cwd=folder, env=environment(folder), text=True).strip()
        if imported != str(folder / "cifar_dist" / "__init__.py"):
            raise SystemExit(f"error: {imported} would be tested, not the copy in {folder}")
        tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        code, _, output = failed_tests(folder, tests)
    if code != 0:
        raise SystemExit(f"error: without a mutant these tests must pass:\n{output}")
    print(f"without a mutant: {output.strip().splitlines()[-1]}", flush=True)


def main(names: list[str]) -> int:
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        known = "\n".join(f"  {mutant.name}" for mutant in MUTANTS)
        raise SystemExit(f"error: no mutant is called {', '.join(sorted(unknown))}; there are:\n{known}")
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    check_unchanged(mutants)
    with ThreadPoolExecutor(max_workers=2) as pool:
        num_lived = sum(pool.map(lived, mutants))
    print(f"{len(mutants) - num_lived} of {len(mutants)} mutants caught")
    return int(num_lived > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
