"""Classifies files in batches and writes the results as a table or as JSON lines: the work of `predict`."""

import itertools
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import torch

from cifar_dist.inference.classifier import Classifier, Prediction
from cifar_dist.inference.images import ImageError, to_uint8

_WIDEST = 60  # of the column of file names; longer names shift their own line only
Result = tuple[str, list[Prediction]]


def predict_files(
    model: Classifier, files: Sequence[str], top_k: int, tta: str, batch_size: int, report: Callable[[str], None]
) -> Iterator[Result]:
    """The results of the readable ones of `files`, in their order; `report` gets a line for each of the others."""
    for start in range(0, len(files), batch_size):
        names, images = [], []
        for name in files[start : start + batch_size]:
            try:
                images.append(to_uint8(name))
                names.append(name)
            except ImageError as error:
                report(printable(str(error)))
        if names:
            yield from zip(names, model.predict(torch.cat(images), top_k, tta, batch_size), strict=True)


def table(results: Iterator[Result], files: Sequence[str], classes: Sequence[str]) -> Iterator[str]:
    """A line for each result: file, then class and probability, the most probable first."""
    names, width = max((_width(printable(name)) for name in files), default=0), max(map(len, classes))
    names = min(names, _WIDEST)
    for name, predictions in results:
        cells = [f"{found.name:<{width}} {found.probability:7.2%}" for found in predictions]
        shown = printable(name)
        yield "   ".join([shown + " " * (names - _width(shown)), *cells])


def json_lines(results: Iterator[Result]) -> Iterator[str]:
    """A JSON object for each result: file, and predictions with class and probability, the most probable first."""
    for name, predictions in results:
        found = [{"class": found.name, "probability": found.probability} for found in predictions]
        yield json.dumps({"file": name, "predictions": found})


def printable(text: str) -> str:
    """`text` on one line: line breaks, control characters and bytes that are no UTF-8 as in Python's literals."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def some(names: Sequence[str], limit: int = 10) -> str:
    """The first `limit` of `names`, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(map(printable, itertools.islice(names, limit))) + more


def _width(text: str) -> int:
    """Columns of a terminal that `text` takes: two for East Asian characters and emoji, none for combining marks."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)
