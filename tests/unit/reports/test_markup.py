"""HTML: escaping, left-out sections, the policy of the page, and which files are replaced."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

import pytest

from cifar_dist.errors import UserError
from cifar_dist.reports.markup import MARKER, LeftOutError, element, page, save, section, sections, table, tiles


def test_all_text_is_escaped() -> None:
    evil = "<script>\"'&"
    text = element("p", evil, element("b", evil), title=evil, class_="a", data_label=None)
    assert text.startswith('<p title="&lt;script&gt;&quot;')
    assert "<script>" not in text + table((evil, evil), [(evil, evil)]) + tiles({evil: evil})
    assert page(evil, evil).count("<script>") == 1
    assert html.unescape(text).count(evil) == 3


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    text = table(("name", "value", "other"), [("a", "1.5", "x"), ("b", "-", "2")])
    assert '<th scope="col" class="number">value</th><th scope="col" class="text">other</th>' in text
    assert '<th scope="row">b</th><td class="number">-</td><td class="text">2</td>' in text


def test_sections_are_left_out_with_the_reason() -> None:
    def none() -> str:
        raise LeftOutError("there is <none>.")

    def broken() -> str:
        values: dict[str, str] = {}
        return values["key"]

    assert '<p class="note">Left out: there is &lt;none&gt;.</p>' in section("A", none)
    assert "a file is damaged (KeyError: &#x27;key&#x27;)" in section("B", broken)
    text = sections({"First part": lambda: "x", "Second": none})
    assert '<a href="#first-part">' in text
    assert '<section id="first-part">' in text


def test_the_policy_allows_this_style_and_script_only() -> None:
    text = page("title", "text")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        assert content
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert policy[1].startswith("default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; ")


def test_only_reports_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    save(path, page("a", "first"))
    save(path, page("a", "second \udcff"))
    assert "second ?" in path.read_text()
    path.write_text("<p>mine</p>")
    with pytest.raises(UserError, match="exists and is no report, so it is not replaced"):
        save(path, page("a", "third"))
    assert path.read_text() == "<p>mine</p>"
    with pytest.raises(UserError, match=r"nowhere/report.html cannot be written: No such file"):
        save(tmp_path / "nowhere/report.html", MARKER)
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        save(tmp_path, MARKER)
