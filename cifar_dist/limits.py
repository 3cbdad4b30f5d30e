"""Which settings no run can work with, said before anything is started."""

from __future__ import annotations

from pathlib import Path

from cifar_dist.config import NUM_TEST, NUM_TRAIN, NUM_VALIDATION, Config, ModelConfig
from cifar_dist.errors import UserError


def validate(config: Config) -> None:
    """Refuse values that no run can work with.

    Raises:
        UserError: names the field, the value and what would be valid.
    """
    c = config
    rules = [
        ("run.seed", c.run.seed, 0 <= c.run.seed < 2**63, "0 to 2**63 - 1"),
        ("run.resume", c.run.resume, c.run.resume != "", "never, auto or the path of a checkpoint"),
        ("run.name", c.run.name, c.run.name is None or Path(c.run.name).name == c.run.name != "..", "a name without /"),
        ("run.stall_timeout_s", c.run.stall_timeout_s, 0 <= c.run.stall_timeout_s <= 500, "1 to 500, or 0 for never"),
        ("data.num_workers", c.data.num_workers, c.data.num_workers >= 1, "1 or more"),
        ("model.width", c.model.width, 0 < c.model.width <= 16, "above 0, at most 16"),
        ("model.dropout", c.model.dropout, 0 <= c.model.dropout < 1, "0 or more, below 1"),
        ("train.epochs", c.train.epochs, c.train.epochs >= 1, "1 or more"),
        ("train.batch_size", c.train.batch_size, c.train.batch_size >= 1, "1 or more"),
        ("train.micro_batch_size", c.train.micro_batch_size, c.train.micro_batch_size >= 1, "1 or more"),
        ("train.checkpoint_every_steps", every := c.train.checkpoint_every_steps, every >= 0, "0 or more"),
        ("train.check_ranks_every_steps", c.train.check_ranks_every_steps, c.train.check_ranks_every_steps >= 0,
         "0 or more"),
        ("train.keep_checkpoints", c.train.keep_checkpoints, c.train.keep_checkpoints >= 1, "1 or more"),
        ("train.log_every_steps", c.train.log_every_steps, c.train.log_every_steps >= 1, "1 or more"),
        ("optim.lr", c.optim.lr, 0 < c.optim.lr < 1e6, "above 0"),
        ("optim.muon_lr", c.optim.muon_lr, 0 < c.optim.muon_lr < 1e3, "above 0"),
        ("optim.muon_momentum", c.optim.muon_momentum, 0 <= c.optim.muon_momentum < 1, "0 or more, below 1"),
        ("optim.momentum", c.optim.momentum, 0 < c.optim.momentum < 1, "above 0, below 1 (Nesterov needs it)"),
        ("optim.bias_lr_factor", c.optim.bias_lr_factor, 0 < c.optim.bias_lr_factor < 1e3, "above 0"),
        ("optim.weight_decay", c.optim.weight_decay, 0 <= c.optim.weight_decay < 1e3, "0 or more"),
        ("optim.warmup_share", c.optim.warmup_share, 0 <= c.optim.warmup_share <= 1, "0 to 1"),
        ("optim.warmup_min_steps", c.optim.warmup_min_steps, c.optim.warmup_min_steps >= 0, "0 or more"),
        ("optim.label_smoothing", c.optim.label_smoothing, 0 <= c.optim.label_smoothing < 1, "0 or more, below 1"),
        ("augment.translate", c.augment.translate, 0 <= c.augment.translate <= 15, "0 to 15"),
        ("augment.low_resolution_share", small := c.augment.low_resolution_share, 0 <= small <= 1, "0 to 1"),
        ("augment.cutout", c.augment.cutout, 0 <= c.augment.cutout <= 32, "0 to 32"),
        ("eval.every_epochs", c.eval.every_epochs, c.eval.every_epochs >= 0, "0 or more"),
        ("eval.batch_size", c.eval.batch_size, 1 <= c.eval.batch_size <= NUM_TEST, f"1 to {NUM_TEST}"),
        ("eval.bn_samples", c.eval.bn_samples, 2 <= c.eval.bn_samples <= NUM_TRAIN, f"2 to {NUM_TRAIN}"),
        ("debug.overfit_steps", c.debug.overfit_steps, c.debug.overfit_steps >= 0, "0 or more"),
    ]  # fmt: skip
    if c.eval.test_subset is not None:
        rules.append(("eval.test_subset", c.eval.test_subset, 1 <= c.eval.test_subset <= NUM_TEST, f"1 to {NUM_TEST}"))
    if c.train.max_steps is not None:
        rules.append(("train.max_steps", c.train.max_steps, c.train.max_steps >= 1, "1 or more"))
    if c.optim.grad_clip is not None:
        rules.append(("optim.grad_clip", c.optim.grad_clip, 0 < c.optim.grad_clip < 1e9, "above 0"))
    if c.optim.ema_decay is not None:
        rules.append(("optim.ema_decay", c.optim.ema_decay, 0 < c.optim.ema_decay < 1, "above 0, below 1"))
    for name, value, valid, expected in rules:
        if not valid:
            raise UserError(f"{name} is {value}; valid: {expected}.")
    if c.run.resume == "auto" and c.run.name is None and c.run.dir is None:
        raise UserError("run.resume auto needs to know which run: give --run.name NAME or --run.dir PATH.")
    _validate_model(c.model, c.optim.name)
    if c.augment.low_resolution_share and c.model.auxiliary:
        raise UserError(
            "augment.low_resolution_share is above 0, but auxiliary heads are made for one size of image. Use "
            "augment.low_resolution_share 0, or model.auxiliary False."
        )
    _validate_sizes(c)


def _validate_model(model: ModelConfig, optimizer: str) -> None:
    if model.name != "inception_v1":
        if model.norm == "none":
            raise UserError("model.norm is none, but Inception V2 is built on batch norm; use batch, or inception_v1.")
        if model.branch5x5 != "paper":
            other = f"model.branch5x5 is {model.branch5x5}"
            raise UserError(f"{other}, but Inception V2 has two 3x3 there; use paper, or inception_v1.")
    if model.stem == "imagenet" and model.auxiliary:
        raise UserError(
            "model.auxiliary is True, but model.stem imagenet leaves 2x2 of a 32x32 image at 4a, too few for the "
            "heads' 5x5 pool. Use another model.stem, or model.auxiliary False."
        )
    if model.norm == "none" and optimizer == "muon":
        raise UserError(
            "optim.name is muon, which needs model.norm batch: it keeps the filters at one length. Use optim.name sgd."
        )


def _validate_sizes(c: Config) -> None:
    available = NUM_TRAIN if c.data.train_on == "all" else NUM_TRAIN - NUM_VALIDATION
    num_samples = available if c.data.subset is None else c.data.subset
    if not 1 <= num_samples <= available:
        raise UserError(f"data.subset is {num_samples}; with data.train_on {c.data.train_on} valid: 1 to {available}.")
    if c.train.batch_size > num_samples:
        raise UserError(
            f"train.batch_size is {c.train.batch_size}, but there are only {num_samples} training samples, so not "
            f"one step fits into an epoch. Lower train.batch_size or raise data.subset."
        )
    if c.train.micro_batch_size == 1:
        raise UserError("train.micro_batch_size is 1, over which batch norm has no variance; valid: 2 or more.")


def validate_for_table(config: Config) -> None:
    """Refuse what no table of results takes.

    Raises:
        UserError: only a part of the test set is going to be scored.
    """
    if config.eval.test_subset is not None:
        raise UserError("eval.test_subset is for trials; a table of results takes scores of the whole test set only.")


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes per rank and optimizer step: batch_size / (micro_batch_size x world_size).

    Raises:
        UserError: it is no whole number; the message has the nearest valid choices.
    """
    unit = micro_batch_size * world_size
    if batch_size % unit == 0:
        return batch_size // unit
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    sizes = " or ".join(str(size) for size in (below, above) if size)
    choices = [f"train.batch_size {sizes}"]
    if batch_size % world_size == 0:
        share = batch_size // world_size
        divisors = [m for m in range(2, share + 1) if share % m == 0]
        nearest = sorted(divisors, key=lambda m: abs(m - micro_batch_size))[:2]
        if nearest:
            choices.append(f"train.micro_batch_size {' or '.join(map(str, sorted(nearest)))}")
    worlds = [w for w in range(1, batch_size + 1) if batch_size % (micro_batch_size * w) == 0]
    if worlds and world_size > 1:
        nearest = sorted(sorted(worlds, key=lambda w: abs(w - world_size))[:2])
        choices.append(f"{' or '.join(map(str, nearest))} processes")
    raise UserError(
        f"train.batch_size {batch_size} is no multiple of train.micro_batch_size {micro_batch_size} x "
        f"{world_size} process{'es' if world_size > 1 else ''} = {unit}.\n"
        f"Nearest valid choices: {'; or '.join(choices)}."
    )
