"""Self-contained HTML pages from templates: every value is escaped, pictures lie within, nothing is half-written."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

import rfmedsam2
from rfmedsam2.store.atomic import write_text


def write_html(path: Path, template: Path, context: Mapping[str, Any], *, figure: Callable[..., str]) -> None:
    """Fill a template and write the page, atomically.

    Args:
        path: the HTML file.
        template: the Jinja template's file.
        context: what it names; when the page was made (`created`) and the code's `version` are added.
        figure: the template's filter of that name, which formats numbers.

    Raises:
        StoreError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,  # names of files, labels and sets are not ours
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    made = {
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "version": rfmedsam2.__version__,
    }
    write_text(path, environment.get_template(template.name).render({**made, **context}))


def png_uri(png: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
