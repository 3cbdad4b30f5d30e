"""Print what a run will do, and refuse a run that cannot work: `python -m cifar_dist.plan CONFIG --nodes 2 --gpus 8`.

The exit code is 2 for a refusal, so that no allocation is spent on it.
"""

from __future__ import annotations

import os
import sys

from cifar_dist import cli, errors, files
from cifar_dist.config import accumulation_steps
from cifar_dist.errors import UserError
from cifar_dist.planning.arguments import parse, time_limit_seconds


def main() -> None:
    """Plan the run that the command line describes."""
    with errors.exit_on_error():
        arguments = parse(sys.argv[1:])
        config = arguments.settings
        limit = None if arguments.time_limit is None else time_limit_seconds(arguments.time_limit)
        cli.validate(config)
        sizes = config.train.batch_size, config.train.micro_batch_size
        accumulation_steps(*sizes, arguments.nodes * arguments.gpus)
        if config.train.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Here, not at the top: importing torch takes seconds, and --help and wrong arguments do not need it.
        from cifar_dist.planning import duration, plan, report

        planned = plan.make_plan(config, arguments.nodes, arguments.gpus)
        step_time = duration.step_time(planned, arguments.images_per_second, arguments.like, arguments.measure)
        findings = plan.check(planned)
        if limit is not None:
            duration.check_time_limit(planned, step_time, limit, findings)
        print(report.page(planned, step_time, findings), flush=True)
        if arguments.json is not None:
            try:
                files.write_json(arguments.json, report.figures(planned, step_time, findings))
            except OSError as error:
                raise UserError(f"--json {arguments.json} cannot be written: {error.strerror}.") from None
        if findings.refusals:
            raise UserError("\nerror: ".join(findings.refusals))


if __name__ == "__main__":
    main()
