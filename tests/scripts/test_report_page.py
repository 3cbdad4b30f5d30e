"""Reports in Chromium: no errors, no requests, right numbers, readable in light and dark, on a phone, by keyboard.

Without Chromium these tests are skipped, unless CIFAR_DIST_REQUIRE_PROGRAMS is set.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.support import runs
from tests.support.report_files import write_predictions

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

pytestmark = [pytest.mark.data, pytest.mark.run]
RECORD = """
import wandb
run = wandb.init(project="theirs", id="abc", mode="offline", dir=".", config={"lr": 0.1})
for k in range(50):
    run.log({"loss": float("nan") if k == 7 else 1 / (k + 1), "train": {"accuracy": k / 50}})
run.finish()
"""
# Pairs of texts and contrasts below 4.5:1, by WCAG's formula, with backgrounds laid over each other.
LOW_CONTRAST = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, below) => [0, 1, 2].map((k) => top[k] * top[3] + below[k] * (1 - top[3])).concat(1);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, k) => {
    const v = c[k] / 255; return sum + weight * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
  const back = (e) => {
    const own = parse(getComputedStyle(e).backgroundColor);
    return own[3] === 1 || !e.parentElement ? own : over(own, back(e.parentElement));
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.data.trim() || !e.getClientRects().length || e.closest("script")) continue;
    const ink = parse(e instanceof SVGElement ? style.fill : style.color), behind = back(e.closest(":not(svg *)"));
    const [a, b] = [light(over(ink, behind)), light(behind)].sort((x, y) => y - x);
    texts += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`${node.data} ${(a + 0.05) / (b + 0.05)}`);
  }
  return {texts, found};
}"""


@pytest.fixture(scope="module")
def pages(
    short_run: Path, two_ranks: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Reports that the command wrote: of one run, of three seeds, and of a folder of another program's W&B."""
    base = tmp_path_factory.mktemp("reports")
    whole = shutil.copytree(short_run, base / "run", ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    write_predictions(whole, data_dir)
    seeds = []
    for seed in range(3):
        seeds.append(shutil.copytree(whole, base / f"seed-{seed}"))
        config = (whole / "config.yaml").read_text().replace("seed: 0", f"seed: {seed}", 1)
        (seeds[-1] / "config.yaml").write_text(config)
    runs.finish(runs.start_command([sys.executable, "-c", RECORD], cwd=base))
    sources: dict[str, list[Path]] = {
        "one": [whole],
        "seeds": seeds,
        "wandb": [base / "wandb"],
        "two": [whole, two_ranks],
    }
    for name, paths in sources.items():
        words = [sys.executable, "-m", "cifar_dist.report", *map(str, paths), "--out", str(base / f"{name}.html")]
        assert f"{name}.html (" in runs.finish(runs.start_command(words))
    return {name: base / f"{name}.html" for name in sources}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        text = "no Chromium; launch/test installs it as root on Debian"
        assert "CIFAR_DIST_REQUIRE_PROGRAMS" not in os.environ, text
        pytest.skip(text)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Browser, pages: dict[str, Path]) -> Iterator[Callable[..., Page]]:
    """Call with the name of a page, a width and a colour scheme; fails at the end for errors and requests."""
    problems, contexts = list[str](), []

    def open_page(name: str, width: int = 1280, scheme: Any = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        address = pages[name].as_uri()

        def note_request(request: Request) -> None:
            if request.url != address and not request.url.startswith("data:"):
                problems.append(request.url)

        page.on("request", note_request)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


ALL = pytest.mark.parametrize("name", ["one", "seeds", "wandb", "two"])


def test_numbers_are_those_of_the_summary(show: Callable[..., Page], short_run: Path, pages: dict[str, Path]) -> None:
    page, figures = show("one"), runs.summary(short_run)
    assert page.locator("#test-accuracy").inner_text() == f"{100 * figures['test_accuracy']:.2f}\N{NO-BREAK SPACE}%"
    assert f"n = {figures['test_n']:,} images" in page.locator("header").inner_text()
    rows = page.locator(".confusion tbody tr")
    counts = [[int(cell) for cell in rows.nth(k).locator("td").all_inner_texts()] for k in range(rows.count())]
    assert counts == figures["test_confusion"]
    assert page.locator(".mistakes figure").count() == 24
    assert page.locator(".copy").inner_text() == figures["command"]
    with Image.open(pages["one"].with_name("run") / "mistakes.png") as sheet:
        expected = np.asarray(sheet.crop((64, 32, 96, 64)), "f4")  # the third cell of the second row
    with Image.open(io.BytesIO(page.locator(".mistakes svg").nth(8).screenshot())) as shown:
        drawn = np.asarray(shown.convert("RGB").resize((32, 32)), "f4")
    assert np.abs(drawn - expected).mean() < 10 < expected.std()


@ALL
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(show: Callable[..., Page], name: str, scheme: str) -> None:
    page = show(name, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    result = page.evaluate(LOW_CONTRAST)
    assert result["found"] == []
    assert result["texts"] > 50
    ink = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ink == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


@ALL
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_page(show: Callable[..., Page], name: str, width: int) -> None:
    page = show(name, width)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_axes_have_names(show: Callable[..., Page]) -> None:
    for name in ("one", "seeds", "wandb"):
        charts = show(name).locator(".chart")
        assert charts.count() >= 2
        for k in range(charts.count()):
            assert all(charts.nth(k).locator(f".{axis}-name").inner_text() for axis in "xy")
            assert charts.nth(k).locator("[role=img]").get_attribute("aria-label")


def test_values_by_keyboard(show: Callable[..., Page], short_run: Path) -> None:
    page = show("one")
    chart = page.locator(".chart").nth(1)
    plot = chart.locator("[role=slider]")
    plot.focus()
    last = [record for record in runs.records(short_run) if "train/accuracy" in record][-2:]

    def told(record: dict[str, Any]) -> str:
        return f"step {record['step']} (epoch {record['epoch']:.2f}); training {100 * record['train/accuracy']:.5g}"

    for key, record in (("End", last[1]), ("ArrowLeft", last[0])):
        page.keyboard.press(key)
        assert (plot.get_attribute("aria-valuetext") or "").startswith(told(record))
        assert chart.locator(".readout").inner_text().startswith(told(record))
    assert chart.locator(".cursor.on").count() == 1
    page.keyboard.press("Home")
    first = next(record for record in runs.records(short_run) if "train/accuracy" in record)
    assert told(first) in chart.locator(".readout").inner_text()
    page.keyboard.press("Tab")
    assert page.locator(".cursor.on").count() == 1  # of the next chart
    assert chart.locator(".readout").inner_text() == ""


def test_values_by_pointer(show: Callable[..., Page]) -> None:
    chart = show("wandb").locator(".chart").first
    box = chart.locator(".plot").bounding_box()
    assert box is not None
    chart.page.mouse.move(box["x"] + box["width"] * 7 / 49, box["y"] + 50)
    assert chart.locator(".readout").inner_text() == "W&B step 7; loss nan"
    chart.page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 50)
    assert chart.locator(".readout").inner_text() == "W&B step 49; loss 0.02"


def test_copying_the_command(show: Callable[..., Page], short_run: Path) -> None:
    page = show("one")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == runs.summary(short_run)["command"]


def test_the_command_is_quick_and_refuses(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "run/report.html").write_text("mine")
    command = [sys.executable, "-X", "importtime", "-m", "cifar_dist.report"]
    result = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert " torch\n" not in result.stderr
    assert result.stderr.endswith("exists and is no report, so it is not replaced. Choose another --out.\n")
    assert (tmp_path / "run/report.html").read_text() == "mine"
