"""W&B, Slurm, and the environment variables that change training."""

import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from cifar_dist.diagnosis.checks import Finding, Folders, Status
from cifar_dist.errors import one_line
from cifar_dist.tracking.wandb_run import ENVIRONMENT_MODES, reason_of, stored_mode, unset_empty_variables

_SERVER_S, _SINFO_S = 10, 15
# Their values are harmless. Of the other variables of W&B only the names are printed.
_SHOWN = re.compile(
    r"CUDA_\w+|NVIDIA_VISIBLE_DEVICES|OMP_\w+|MKL_\w+|NUMBA_\w+|(PY)?TORCH\w*|TRITON_\w+|NCCL_\w+|GLOO_\w+|"
    r"PYTHONPATH|NPROC_PER_NODE|NNODES|NODE_RANK|MASTER_ADDR|MASTER_PORT|MAX_RESTARTS|NUMA_BINDING|CIFAR_DIST_PYTHON|WANDB_MODE"
)
_NAMED = re.compile(r"WANDB_\w+|\w+_proxy", re.IGNORECASE)
_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "the host waits for each GPU kernel",
    "NCCL_P2P_DISABLE": "GPUs exchange through the host",
    "NCCL_IB_DISABLE": "nodes exchange without InfiniBand",
    "TORCHDYNAMO_DISABLE": "torch.compile is off",
    "TORCH_COMPILE_DISABLE": "torch.compile is off",
}


def wandb(_: Folders) -> Iterator[Finding]:
    """The mode that a run takes, and whether the server answers if that is online."""
    unset_empty_variables()
    asked = os.environ.get("WANDB_MODE")
    if asked is not None and asked not in ENVIRONMENT_MODES:
        yield Finding("problem", f"WANDB_MODE is {asked!r}", f"unset it; valid: {', '.join(ENVIRONMENT_MODES)}")
        return
    os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    import wandb

    try:
        url, mode = str(wandb.setup().settings.base_url), asked or stored_mode()
    except Exception as error:  # noqa: BLE001 - W&B's settings may be wrong in many ways
        yield Finding("problem", f"W&B cannot start: {reason_of(error)}", "Look at the variables WANDB_*")
        return
    finally:
        wandb.teardown()
    if mode not in ("online", "run"):
        why = "WANDB_MODE" if asked else "there is no login, or W&B was switched off"
        yield Finding("ok", f"{mode} ({why}); `wandb login` or WANDB_MODE=online changes it")
        return
    place = urlsplit(url)
    host = place.netloc.rpartition("@")[2]  # without a password
    try:
        with urllib.request.urlopen(f"{place.scheme}://{host}", timeout=_SERVER_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "reason", error))
        status: Status = "problem" if asked else "warning"
        end = "a run that asks for it fails" if asked else "a run goes offline after 20 s"
        found = f"{host} cannot be reached: {reason}; {end}"
        yield Finding(status, found, "WANDB_MODE=offline, and later `wandb sync`; behind a proxy set https_proxy")
        return
    yield Finding("ok", f"{mode}; {host} answers")


def slurm(_: Folders) -> Iterator[Finding]:
    """Needed only for the scripts in slurm/."""
    job = os.environ.get("SLURM_JOB_ID")
    absent = [name for name in ("sbatch", "srun", "scontrol", "sinfo") if shutil.which(name) is None]
    status: Status = "problem" if job else "warning"
    if absent and (job or len(absent) < 4):
        advice = "Load the site's module of Slurm; see docs/slurm.md, section Sites"
        yield Finding(status, f"{', '.join(absent)} are not in PATH", advice)
    elif absent:
        yield Finding("ok", "not on this machine; only slurm/ needs it")
    else:
        command = ["sinfo", "--noheader", "--format=%P %a, %D nodes"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SINFO_S, check=False)
            failure = one_line(done.stderr, 120) if done.returncode else ""
        except subprocess.TimeoutExpired:
            failure = f"sinfo: no answer within {_SINFO_S} s"
        if failure:
            yield Finding(status, failure, "Is slurmctld running, and reachable from this machine?")
            return
        gpus = os.environ.get("SLURM_GPUS_ON_NODE") or 0
        inside = f"job {job} with {gpus} GPU(s) on this node; " if job else "not in a job; "
        yield Finding("ok", f"{inside}partitions: {'; '.join(done.stdout.splitlines()[:5])}")


def variables(_: Folders) -> Iterator[Finding]:
    """Those that are set, without secrets."""
    shown = []
    for name, value in sorted(os.environ.items()):
        if _SHOWN.fullmatch(name) and not _SECRET.search(name):
            shown.append(f"{name}={value}")
        elif _NAMED.fullmatch(name):
            shown.append(name)
        if name in _SLOW and value not in ("", "0"):
            yield Finding("warning", f"{name}={value}: {_SLOW[name]}, which is slow", f"unset {name}")
    yield Finding("ok", ", ".join(shown) or "none that changes training")
