"""What stands in the JSON file beside a figure's picture."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from anchorpatch.jobs.examples import Choice
from anchorpatch.lsp import LspSettings

__all__ = ["record", "settings_text"]


def settings_text(lsp: LspSettings) -> str:
    """Write the settings of Algorithm 1 for people.

    Example:
        >>> settings_text(LspSettings((5, 3, 2), 0.3, (0.05, 0.04, 0.03)))
        'K 5/3/2, T 0.3, P 0.05/0.04/0.03'
    """
    k, p = "/".join(map(str, lsp.max_patches)), "/".join(map(str, lsp.coverage))
    return f"K {k}, T {lsp.iou_threshold}, P {p}"


def record(
    name: str,
    number: int,
    title: str,
    caption: str,
    weights_sha256: str,
    source: str,
    choice: Choice,
    settings: dict[str, Any],
    **facts: Any,
) -> dict[str, Any]:
    """Return what stands beside a figure's picture, and what the report reads.

    Args:
        name: of the command.
        number: of the figure in the paper.
        title: a few words.
        caption: one or two sentences.
        weights_sha256: of AnchorNet's weights.
        source: where the images come from.
        choice: of the images.
        settings: further ones.
        facts: what the figure shows.
    """
    return {
        "figure": name,
        "number": number,
        "title": title,
        "caption": caption,
        "weights_sha256": weights_sha256,
        "source": source,
        "settings": {**asdict(choice), **settings},
        **facts,
    }
