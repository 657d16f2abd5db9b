"""Tables of shards."""

from __future__ import annotations

from anchorpatch.report.cells import Cell, Column, Table, count, decimal, named, share, text
from anchorpatch.report.collect import Split

__all__ = ["histogram_table", "scale_table", "skipped_table"]


def scale_table(split: Split) -> Table:
    """Return images and patches of a split by scale."""
    facts = split.facts
    columns = named("scale", "images", "share", "patches", "patches per image")
    most = max((found.images for found in facts.scales.values()), default=0)
    rows = tuple(
        (
            Cell(f"{scale} px", scale),
            Cell(f"{found.images:,}", found.images, found.images / most if most else None),
            share(found.images / facts.images if facts.images else None, 1),
            count(found.patches),
            decimal(found.mean_patches),
        )
        for scale, found in facts.scales.items()
    )
    patches = sum(found.patches for found in facts.scales.values())
    total = (
        text("all"),
        count(facts.images),
        share(1.0 if facts.images else None, 1),
        count(patches),
        decimal(patches / facts.images if facts.images else None),
    )
    return Table("Images and patches by chosen scale", columns, rows, (total,))


def histogram_table(split: Split) -> Table:
    """Return how many images have how many patches, a column for each scale."""
    longest = max(map(len, split.histogram.values()))
    width = -(-(longest - 1) // 24)  # at most 24 lines
    rows = []
    bins = {
        scale: [sum(n[start : start + width]) for start in range(1, longest, width)]
        for scale, n in split.histogram.items()
    }
    most = max((max(n, default=0) for n in bins.values()), default=0)
    for i, start in enumerate(range(1, longest, width)):
        stop = start + width - 1
        name = f"{start}" if width == 1 else f"{start} to {stop}"
        cells = [
            Cell(f"{n[i]:,}", n[i], n[i] / most if most and n[i] else None) for n in bins.values()
        ]
        rows.append((Cell(name, start), *cells))
    columns = named("patches", *(f"{scale} px" for scale in bins), first_numeric=True)
    caption = "Images by number of patches and chosen scale"
    return Table(caption, columns, tuple(rows), folded=len(rows) > 8)


def skipped_table(split: Split) -> Table:
    """Return the images that could not be read, or the first of them."""
    total = sum(split.facts.skipped.values())
    notes = (
        (f"The first {len(split.skipped):,} of {total:,}.",) if total > len(split.skipped) else ()
    )
    columns = (Column("image", numeric=False), Column("reason", numeric=False))
    rows = tuple((text(path), text(reason)) for path, reason in split.skipped)
    return Table("Skipped images", columns, rows, notes=notes, folded=len(rows) > 8)
