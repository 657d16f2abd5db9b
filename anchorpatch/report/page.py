"""The page: one HTML file without a request to any network.

What comes from files goes through Jinja's escaping; only the charts, which matplotlib drew, and
the style and script of this package go in as they are. The page's own security policy lets no
script run but that one, and no request leave.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

import anchorpatch
from anchorpatch.errors import SettingsError
from anchorpatch.report.collect import LeftOut
from anchorpatch.report.key_figures import Key
from anchorpatch.report.sections import Section
from anchorpatch.text import clean

__all__ = ["page_date", "render"]


def page_date() -> datetime:
    """Return the date of the page: now, or that of SOURCE_DATE_EPOCH, in UTC.

    Raises:
        SettingsError: SOURCE_DATE_EPOCH is no number of seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return datetime.now(timezone.utc)
    try:
        return datetime.fromtimestamp(int(text), timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise SettingsError(
            f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {text!r}"
        ) from None


def render(
    folder: Path,
    keys: Sequence[Key],
    sections: Sequence[Section],
    left_out: Sequence[LeftOut],
    date: datetime,
) -> bytes:
    """Return the page as UTF-8.

    Args:
        folder: that it is about.
        keys: figures at the head of the page.
        sections: in order.
        left_out: what could not be read.
        date: of the page.
    """
    script = _file("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=clean,
    )
    environment.filters["commands"] = _commands
    page = environment.from_string(_file("page.html")).render(
        name=folder.resolve().name or str(folder),
        folder=str(folder),
        keys=keys,
        sections=sections,
        left_out=left_out,
        date=date,
        version=anchorpatch.__version__,
        style=Markup(_file("style.css")),
        script=Markup(script),
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    )
    return page.lstrip().encode()


def _commands(text: str) -> Markup:
    """Escape a text and set what stands between backticks as code."""
    parts = str(escape(text)).split("`")
    return Markup("".join(_code(part) if i % 2 else part for i, part in enumerate(parts)))


def _code(escaped: str) -> str:
    """Return a command that a line may break between its words, not at their hyphens."""
    words = [f"<span>{word}</span>" if len(word) < 30 else word for word in escaped.split(" ")]
    return f"<code>{' '.join(words)}</code>"


def _file(name: str) -> str:
    return resources.files("anchorpatch.report").joinpath(name).read_text(encoding="utf-8")
