"""The sections of a report about the test: classes, confusion matrix, calibration, mistakes; and the first filters."""

import io

from cifar_dist.data.cifar10 import CLASSES
from cifar_dist.reports import scores
from cifar_dist.reports.charts import Chart, Series, draw
from cifar_dist.reports.intervals import wilson
from cifar_dist.reports.markup import (
    Html,
    LeftOutError,
    data_address,
    details,
    element,
    joined,
    percent,
    scrolling,
    table,
)
from cifar_dist.reports.run_data import RunData

MAX_PICTURE_BYTES = 120_000
CELL, COLUMNS = 32, 6  # pixels of an image in mistakes.png, and images in a row


def _confusion(run: RunData) -> list[list[int]]:
    matrix = run.summary.get("test_confusion")
    if matrix is None:
        raise LeftOutError("the run has no test results yet.")
    return [[int(count) for count in row] for row in matrix]


def classes(run: RunData) -> Html:
    """Accuracy of each class with its interval, as a table with bars."""
    rows = []
    for name, score in zip(CLASSES, scores.class_scores(_confusion(run)), strict=True):
        if score.n == 0:  # of a trial with eval.test_subset
            rows.append((name, "-", Html(), "-", "0", "-"))
            continue
        accuracy = score.correct / score.n
        low, high = wilson(accuracy, score.n)
        bar = element(
            "svg",
            element("rect", width=f"{accuracy:.2%}", height="100%", class_="bar"),
            element("line", x1=f"{low:.2%}", x2=f"{high:.2%}", y1="50%", y2="50%", class_="whisker"),
            class_="bars",
            aria_hidden="true",
        )
        confused = f"{CLASSES[score.most_confused]} ({score.num_most_confused})" if score.num_most_confused else "-"
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append((name, f"{100 * accuracy:.1f}", bar, interval, f"{score.n:,}", element("span", confused)))
    head = ("class", "accuracy (%)", "from 0 to 100 %", "95 % interval (%)", "n", "most often taken for (images)")
    return table(head, rows, "classes")


def confusion_matrix(run: RunData) -> Html:
    """A row per true class, a column per predicted one; the colour is the share of the row."""
    matrix = _confusion(run)
    rows = []
    for label, row in enumerate(matrix):
        total = max(1, sum(row))
        cells = []
        for predicted, count in enumerate(row):
            # The root, because mistakes are few; in steps, because the page's policy forbids styles of single cells.
            heat = round(9 * (count / total) ** 0.5)
            kind = "right" if predicted == label else "wrong"
            told = (
                f"{CLASSES[label]} predicted as {CLASSES[predicted]}: {count} of {total} ({percent(count / total, 1)})"
            )
            cells.append(element("td", count, class_=f"number {kind} heat{heat}", title=told))
        rows.append(element("tr", element("th", CLASSES[label], scope="row"), *cells))
    names = (element("th", element("span", name), scope="col") for name in CLASSES)
    head = element("tr", element("th", "true ↓  predicted →", scope="col"), *names)
    content = element("table", element("thead", head), element("tbody", *rows), class_="confusion")
    return joined(
        [
            scrolling(content, "confusion matrix"),
            element("p", "Images of the test set. Colour: share of the true class.", class_="note"),
        ]
    )


def _predictions(run: RunData) -> list[scores.Prediction]:
    path = run.directory / "predictions.csv"
    if not path.exists():
        raise LeftOutError("the run has no predictions.csv.")
    try:
        found = scores.read_predictions(path)
    except ValueError as error:
        raise LeftOutError(f"{error}.") from None
    accuracy, n = run.figure("test_accuracy"), run.figure("test_n")
    right = sum(each.label == each.predicted for each in found)
    if n is not None and accuracy is not None and (len(found) != n or right != round(accuracy * n)):
        raise LeftOutError(f"predictions.csv has {right} of {len(found)} right, which is not the result of this run.")
    return found


def calibration(run: RunData) -> Html:
    """Reliability diagram, expected calibration error, and the bins as a table."""
    bins, error = scores.calibration(_predictions(run))
    points = [(100 * each.confidence, 100 * each.accuracy) for each in bins]
    limits = [(100 * each.confidence, 100 * each.interval[0], 100 * each.interval[1]) for each in bins]
    chart = Chart(
        "Reliability",
        "accuracy (%)",
        [
            Series("perfectly calibrated", [(0, 0), (100, 100)], "reference", colour=5),
            Series("predictions in bins of 10 %, with 95 % intervals", points, "points", limits, colour=0),
        ],
        x_name="probability of the predicted class (%)",
        ranges=((0, 100), (0, 100)),
    )
    rows = [
        (f"{100 * each.confidence:.1f}", f"{100 * each.accuracy:.1f}",
         f"{100 * each.interval[0]:.1f} to {100 * each.interval[1]:.1f}", f"{each.n:,}")
        for each in bins
    ]  # fmt: skip
    head = ("mean probability (%)", "accuracy (%)", "95 % interval (%)", "n")
    text = f"Expected calibration error: {100 * error:.2f} percentage points ({scores.BINS} bins, one view per image)."
    return joined(
        [element("p", text), element("div", draw(chart), class_="charts"), details("Values", table(head, rows))]
    )


def _picture(run: RunData, name: str) -> tuple[bytes, tuple[int, int]]:
    """A PNG of the run and its width and height."""
    from PIL import Image

    path = run.directory / name
    if not path.exists():
        raise LeftOutError(f"the run has no {name}.")
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            size = image.size
    except (OSError, SyntaxError, ValueError):
        raise LeftOutError(f"{name} is damaged.") from None
    if len(content) > MAX_PICTURE_BYTES:
        raise LeftOutError(f"{name} has more than {MAX_PICTURE_BYTES // 1000} kB.")
    return content, size


def mistakes(run: RunData) -> Html:
    """The cells of mistakes.png with their classes and probabilities."""
    content, (width, height) = _picture(run, "mistakes.png")
    wrong = scores.mistakes(_predictions(run))
    if not wrong:
        raise LeftOutError("there are none.")
    if width != COLUMNS * CELL or height % CELL:
        raise LeftOutError("mistakes.png has another size.")
    cells = []
    for k, each in enumerate(wrong[: COLUMNS * (height // CELL)]):
        view = f"{k % COLUMNS * CELL} {k // COLUMNS * CELL} {CELL} {CELL}"
        true, predicted = CLASSES[each.label], CLASSES[each.predicted]
        picture = element("use", href="#mistakes")
        label = f"test image {each.image}: {true}, predicted {predicted} with {percent(each.probability, 1)}"
        caption = (element("b", true), f" taken for {predicted}, {percent(each.probability, 1)}")
        image = element("svg", picture, viewBox=view, role="img", aria_label=label, class_="pixels")
        cells.append(element("figure", image, element("figcaption", *caption)))
    address = data_address(content, "image/png")
    image = element("image", id="mistakes", href=address, width=width, height=height)
    hidden = element("svg", element("defs", image), width=0, height=0, aria_hidden="true", class_="hidden")
    text = f"{len(cells)} of {len(wrong):,} wrong predictions of the test set, one view per image."
    return joined([element("p", text), hidden, element("div", *cells, class_="mistakes")])


def filters(run: RunData) -> Html:
    content, (width, height) = _picture(run, "filters.png")
    address = data_address(content, "image/png")
    text = "Weights of each filter as a picture, scaled to its own range."
    alt = "filters of the first convolution"
    image = Html(f'<img src="{address}" alt="{alt}" width="{6 * width}" height="{6 * height}" class="pixels filters">')
    return joined([element("p", text), image])
