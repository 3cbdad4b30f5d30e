"""`python -m cifar_dist.models`: the networks in numbers; exits with 1 where one is not as published."""

from __future__ import annotations

import sys

from cifar_dist.models.published.counts import costs, parameter_counts, report


def main() -> int:
    counts = parameter_counts()
    print(report(counts, costs()))
    return 0 if all(count.agrees for count in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
