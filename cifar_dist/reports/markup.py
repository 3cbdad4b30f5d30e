"""HTML of a report: escaped text, tables and sections, and the page with its styles, its script and no network."""

import base64
import hashlib
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from cifar_dist.errors import UserError, explain_os_error, one_line
from cifar_dist.files import write_bytes_atomic

MARKER = '<meta name="generator" content="cifar_dist report">'  # what `save` may replace


class Html(str):
    """Text that is HTML already; `escaped` turns everything else into it."""

    __slots__ = ()


class LeftOutError(Exception):
    """A section cannot be shown; the text is the reason."""


def escaped(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """An element with escaped content and attributes; `_` in a name stands for -, and at its end for nothing.

    An attribute that is None is left out.
    """
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    opening = "".join(f' {name}="{escaped(str(value))}"' for name, value in names.items())
    return Html(f"<{tag}{opening}>{''.join(map(escaped, content))}</{tag}>")


def joined(parts: Iterable[object]) -> Html:
    return Html("".join(map(escaped, parts)))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], class_: str | None = None) -> Html:
    """A table in a box that scrolls sideways; the first cell of each row is its header.

    A column of text that begins with digits, or is "-", is aligned to the right.
    """
    found = [list(row) for row in rows]
    kinds = ["number" if all(map(_is_number, column)) else None for column in zip(*found, strict=True)]
    kinds = ["text", *(kind or "text" for kind in kinds[1:])] if found else ["text"] * len(head)
    titles = (element("th", title, scope="col", class_=kind) for title, kind in zip(head, kinds, strict=False))
    body = []
    for first, *others in found:
        cells = (element("td", cell, class_=kind) for cell, kind in zip(others, kinds[1:], strict=True))
        body.append(element("tr", element("th", first, scope="row"), *cells))
    parts = ([element("thead", element("tr", *titles))] if head else []) + [element("tbody", *body)]
    return scrolling(element("table", *parts, class_=class_), " ".join(map(str, head)) or "values")


def scrolling(content: Html, name: str) -> Html:
    """A box that scrolls sideways, also by the keyboard; `name` is read aloud."""
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=name)


def _is_number(cell: object) -> bool:
    text = str(cell)
    return text == "-" or (not isinstance(cell, Html) and text.lstrip("-")[:1].isdigit())


def tiles(facts: Mapping[str, object]) -> Html:
    """Names and values side by side; an empty value and None are left out."""
    found = (element("div", element("dt", k), element("dd", v)) for k, v in facts.items() if v not in ("", None))
    return element("dl", *found, class_="tiles")


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def sections(makers: Mapping[str, Callable[[], object]]) -> Html:
    """Links to all sections, and the sections, by their titles; see `section`."""
    links = (element("a", title, href=f"#{_anchor(title)}") for title in makers)
    return joined([element("nav", *links, aria_label="sections"), *(section(k, make) for k, make in makers.items())])


def _anchor(title: str) -> str:
    return "-".join(title.lower().split())


def section(title: str, make: Callable[[], object]) -> Html:
    """A section with the content that `make` returns, or with one line that says why it is left out."""
    try:
        content = make()
    except LeftOutError as error:
        content = element("p", f"Left out: {error}", class_="note")
    except Exception as error:  # noqa: BLE001 - a damaged file must not cost the other sections
        reason = f"a file is damaged ({type(error).__name__}: {one_line(error, 150)})"
        content = element("p", f"Left out: {reason}.", class_="note")
    return element("section", element("h2", title), content, id=_anchor(title))


def details(title: str, content: object) -> Html:
    return element("details", element("summary", title), content)


def data_address(content: bytes, kind: str) -> str:
    """The address of an embedded file, such as an image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def page(title: str, *content: object) -> str:
    """The complete page. Its policy allows the embedded style, script and pictures, and nothing from elsewhere."""
    folder = Path(__file__).parent
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    sources = {"img-src": "data:", "style-src": _source(style), "script-src": _source(script)}
    policy = "; ".join(["default-src 'none'", "base-uri 'none'", "form-action 'none'", *map(" ".join, sources.items())])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARKER}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n{joined(content)}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def save(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        UserError: `path` is a file that is not one of these pages, or it cannot be written.
    """
    with explain_os_error(f"{path} cannot be written", "Choose another file by --out."):
        if path.exists():
            with path.open("rb") as file:
                if MARKER.encode() not in file.read(1000):
                    raise UserError(f"{path} exists and is no report, so it is not replaced. Choose another --out.")
        write_bytes_atomic(path, text.encode(errors="replace"))
