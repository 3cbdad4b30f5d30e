"""The option or key that a mistaken name most likely means, by spelling and by what other programs call it."""

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tyro

from cifar_dist.errors import UserError

# Names in the reference scripts of torchvision, timm, Lightning, Ultralytics and Hugging Face. Of an option's name in
# several commands the first that a command has counts.
SYNONYMS = {
    "optim.lr": "learning_rate base_lr peak_lr init_lr initial_lr max_lr lr0 blr eta",
    "optim.weight_decay": "wd l2 decay weight_decay_rate",
    "optim.name": "optimizer opt optim algorithm",
    "optim.schedule": "scheduler sched lr_scheduler lr_schedule lr_scheduler_type cos_lr decay_type",
    "optim.warmup_share": "warmup warmup_ratio warmup_epochs warmup_steps lr_warmup_epochs num_warmup_steps",
    "optim.label_smoothing": "smoothing label_smoothing_factor",
    "optim.grad_clip": "clip clip_grad clip_grad_norm max_grad_norm gradient_clip_val gradient_clip grad_norm",
    "optim.ema_decay": "ema model_ema model_ema_decay ema_rate",
    "train.batch_size": "batch bs b batchsize global_batch_size total_batch_size train_batch_size",
    "train.micro_batch_size": "per_device_train_batch_size per_device_batch_size mbs accumulate grad_accum "
    "grad_accum_steps gradient_accumulation_steps accumulate_grad_batches accumulation_steps",
    "train.epochs": "num_epochs max_epochs n_epochs nepochs num_train_epochs epoch ep",
    "train.max_steps": "steps num_steps iterations max_iters num_iterations total_steps max_train_steps",
    "train.precision": "amp fp16 bf16 half mixed_precision dtype autocast apex use_amp",
    "train.compile": "torch_compile torchcompile jit torchscript",
    "train.checkpoint_every_steps": "save_steps save_every save_period save_freq save_interval checkpoint_every",
    "train.keep_checkpoints": "save_total_limit save_top_k checkpoint_hist",
    "train.log_every_steps": "log_interval print_freq logging_steps log_every_n_steps log_every log_freq",
    "train.threads": "num_threads cpu_threads omp_num_threads",
    "train.device": "accelerator cuda gpu cpu no_cuda use_cpu",
    "gpus": "devices num_gpus ngpus nproc_per_node num_processes gpus_per_node",
    "nodes": "num_nodes nnodes",
    "run.seed": "random_seed manual_seed seed_everything rng_seed torch_seed",
    "run.resume": "resume_from resume_from_checkpoint ckpt_path checkpoint ckpt resume_path restart start_from",
    "run.dir": "output_dir output save_dir log_dir logdir out_dir outdir default_root_dir exp_dir workdir run_dir out",
    "run.name": "exp_name experiment experiment_name run_name exp tag",
    "checkpoint": "ckpt ckpt_path checkpoint_path weights model path pretrained model_path",
    "data_dir": "data dataset data_path dataset_path root dataroot data_root datadir dir",
    "data.dir": "data dataset data_path data_dir dataset_path dataset_dir root dataroot data_root datadir",
    "data.num_workers": "workers j num_threads_per_worker dataloader_num_workers",
    "data.source": "download url",
    "model.name": "model arch architecture network net backbone model_name",
    "model.dropout": "drop drop_rate drop_prob dropout_rate p",
    "model.width": "width_mult width_multiplier",
    "run.deterministic": "use_deterministic_algorithms reproducible determinism",
    "augment.cutout": "random_erase random_erasing reprob cutout_size",
    "augment.flip": "hflip fliplr horizontal_flip random_flip",
    "augment.translate": "shift crop random_crop padding",
    "eval.batch_size": "val_batch_size eval_batch_size test_batch_size per_device_eval_batch_size",
    "eval.every_epochs": "eval_every val_interval check_val_every_n_epoch eval_interval val_every eval_freq",
    "track.wandb": "use_wandb report_to log_wandb wandb_mode logger",
    "track.project": "wandb_project project_name",
    "debug.anomaly": "detect_anomaly",
    "debug.profile": "profiler torch_profiler profile_steps",
    "run.hooks": "callbacks callback hook",
    "data": "dataset datamodule",
    "model": "network arch architecture",
    "train": "trainer training",
    "optim": "optimizer optimiser optimization solver",
    "augment": "augmentation augmentations aug transform transforms",
    "eval": "evaluation val validation test",
    "track": "tracking logging logger log wandb",
    "json": "output out out_file output_file save",
    "out": "output output_dir out_dir",
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)


def closest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` most likely means; both may have a section, as in optim.lr."""
    names = list(names)
    section, _, leaf = name.lower().rpartition(".")
    known: dict[str, str] = {}
    for place in names:
        known.setdefault(_letters(place), place)
    for place in names:
        known.setdefault(_letters(place.rpartition(".")[2]), place)
    for full, synonyms in SYNONYMS.items():
        place = full if full in names else full.rpartition(".")[2]  # bench has options without sections
        for word in synonyms.split() if place in names else ():
            known.setdefault(_letters(word), place)
    tried = (_letters(name), _letters(leaf))
    found = [word for word in tried if word in known]
    for word in () if found else tried:
        found += difflib.get_close_matches(word, known, n=1, cutoff=0.7 if len(word) > 3 else 0.8)
    if not found:
        return None
    place = known[found[0]]
    same = f"{section}.{place.rpartition('.')[2]}"
    return same if same in names else place


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def refuse_unknown_options(cls: type, args: Sequence[str], more: Sequence[str], command: str) -> None:
    """Refuse words of a command line that name no option of `cls` nor of `more`: --lrr, -lr, and lr=0.1 without dashes.

    Raises:
        UserError: names the closest option.
    """
    found = [*_options(cls), *((name, False, False) for name in more)]
    options = {name: positional for name, positional, _ in found}
    names = [name for name, positional in options.items() if not positional]
    many = {name for name, _, takes_many in found if takes_many}
    values_left = 0.0  # of the last option
    for word in itertools.takewhile(lambda word: word != "--", args):
        option, equals, value = word.partition("=")
        name = option.lstrip("-+")
        if word.startswith("-") and name[:1].isalpha() and name not in ("h", "help", "inf", "nan"):
            values_left = math.inf if name in many else not equals
            if name.replace("-", "_") not in names and not name.startswith("tyro-"):
                raise UserError(_unknown(option, options, names, command))
            continue
        is_option = equals or ("." in name and name in names)
        if values_left <= 0 and is_option and _WORD.fullmatch(name) and not Path(word).exists():
            best = closest(name, names)
            if best and ("." in name or _letters(name) in map(_letters, _words_for(best))):
                raise UserError(f"{word} lacks the dashes of an option. Write --{best} {value or 'VALUE'}")
        values_left -= 1


def _unknown(option: str, options: Mapping[str, bool], names: Sequence[str], command: str) -> str:
    name = option.lstrip("-")
    if options.get(name.replace("-", "_")):
        hint = f" Give {name.upper()} without {option}."
    else:
        best = closest(name, names)
        some = f" Valid: --{', --'.join(names)}." if 0 < len(names) < 20 else ""
        hint = f" Did you mean --{best}?" if best else some
    return f"there is no option {option}.{hint}\n`python -m cifar_dist.{command} --help` lists all options."


def _words_for(option: str) -> list[str]:
    return [option, option.rpartition(".")[2], *SYNONYMS.get(option, "").split()]


def _options(cls: type, prefix: str = "") -> Iterator[tuple[str, bool, bool]]:
    """The options that tyro makes of a dataclass: name without dashes, whether positional, whether of many values."""
    for key, hint in get_type_hints(cls, include_extras=True).items():
        notes: tuple[Any, ...] = getattr(hint, "__metadata__", ())
        given = [note.name for note in notes if getattr(note, "name", None) is not None]
        name = given[0] if given else key
        kind = getattr(hint, "__origin__", hint)
        if is_dataclass(kind):
            yield from _options(kind, f"{prefix}{name}." if name else prefix)  # type: ignore[arg-type]
        else:
            yield prefix + name, tyro.conf.Positional in notes, Ellipsis in get_args(kind if notes else hint)
