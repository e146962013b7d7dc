"""Self-contained HTML pages from Jinja templates: values are escaped, images embedded, files written atomically."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from rfmedsam2.errors import UsageError
from rfmedsam2.system.atomic import write_text
from rfmedsam2.version import __version__

POLICY = b"default-src 'none'; img-src data:"
"""What the head of every template says of where a page may load from: nowhere."""


def write_html(
    path: Path, template: Path, context: Mapping[str, Any], *, figure: Callable[..., str] | None = None
) -> None:
    """Render a template and write the page atomically.

    Args:
        path: the HTML file.
        template: path of the Jinja template, which may extend page.html.j2 in this folder.
        context: variables of the template; `created` (date and time) and the code's `version` are added.
        figure: the template filter `figure`, which formats numbers; None: `figure_text`.

    Raises:
        StoreError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,  # names of files, labels and datasets are untrusted
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure or figure_text
    made = {
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
    }
    write_text(path, environment.get_template(template.name).render({**made, **context}))


def figure_text(value: float | None, digits: int) -> str:
    """Format a number with fixed digits; a dash if it is undefined."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def require_page(path: Path) -> None:
    """Check that a file is a page made by `write_html`.

    Raises:
        UsageError: it is anything else.
    """
    start = b""
    if path.is_file():
        with path.open("rb") as stream:
            start = stream.read(4096)
    if not (start.lstrip().startswith(b"<!DOCTYPE html>") and POLICY in start):
        raise UsageError("The file is not a report page", where=path)


def png_uri(png: bytes) -> str:
    """A PNG image as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
