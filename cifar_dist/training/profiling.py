"""The profile of some steps by torch.profiler: a trace for chrome://tracing or ui.perfetto.dev, and a table."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from cifar_dist.distributed import World
from cifar_dist.errors import one_line
from cifar_dist.phase import SLOW_S, Phase, in_phase

_WRITE = Phase("writing the profile", limit_s=SLOW_S)
_NUM_WARM_UP = 3  # steps that are not recorded
_NUM_ROWS = 40


@contextmanager
def profiler(
    num_steps: int, steps_left: int, folder: Path, world: World, log: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Record `num_steps` of the `steps_left` of this process, after some others, if there are enough.

    Gives the function to call after each step. `folder` gets rank-N.json.gz, the trace, and rank-N.txt, the table of
    the operations that take longest. A failure is a warning and does not end the run.
    """
    if not num_steps or not steps_left:
        yield lambda: None
        return
    skipped = min(_NUM_WARM_UP, steps_left - 1)
    recorded = min(num_steps, steps_left - skipped)

    def write(found: profile) -> None:
        with in_phase(_WRITE):
            folder.mkdir(exist_ok=True)
            table, trace = (folder / f"rank-{world.rank}.{end}" for end in ("txt", "json.gz"))
            device = "cuda" if world.device.type == "cuda" else "cpu"
            rows = found.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=_NUM_ROWS)
            table.write_text(f"{found.step_num - skipped} steps of rank {world.rank}\n{rows}\n")
            found.export_chrome_trace(str(trace))
            log(f"profile of {found.step_num - skipped} steps: {table} and {trace.name}")

    works = True

    def attempt(action: Callable[[], None]) -> None:
        nonlocal works
        try:
            if works:
                action()
        except Exception as error:  # noqa: BLE001 - a measurement never decides whether a run ends well
            works = False
            log(f"warning: no profile: {type(error).__name__}: {one_line(error)}")

    with warnings.catch_warnings(action="ignore"):  # of a run of one step, without a warm-up
        steps = schedule(wait=max(skipped - 1, 0), warmup=min(skipped, 1), active=recorded, repeat=1)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (world.device.type == "cuda")]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # without messages of torch's profiling library
    found = profile(activities=activities, schedule=steps, on_trace_ready=write)
    attempt(found.start)
    try:
        yield lambda: attempt(found.step)
    finally:
        attempt(found.stop)  # writes what is recorded of a run that ends earlier
