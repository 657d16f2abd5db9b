"""Scenes, whose objects are known: how well the patches fit them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from anchorpatch.demo.score import SceneScore, score_scenes
from anchorpatch.errors import AnchorpatchError, ImageError
from anchorpatch.figures.files import FigureFile
from anchorpatch.images.decode import decode_picture
from anchorpatch.report.cells import Cell, Table, decimal, named, share, text
from anchorpatch.report.collect import Contents, LeftOut
from anchorpatch.text import counted

__all__ = ["BOXES", "PICTURE", "Scenes", "fit_table", "read_scenes", "size_table"]

#: Where ``anchorpatch demo`` leaves the true boxes and a picture, below its folder.
BOXES: Final = Path("scenes", "boxes.csv")
PICTURE: Final = "patches.png"


@dataclass(frozen=True, eq=False)
class Scenes:
    """What is known of drawn pictures.

    Attributes:
        score: of the patches against the true boxes.
        picture: that ``anchorpatch demo`` wrote; None without one.
    """

    score: SceneScore
    picture: FigureFile | None


def read_scenes(contents: Contents) -> tuple[Scenes | None, tuple[LeftOut, ...]]:
    """Compare the first split with the true boxes, where the folder has boxes.

    Returns:
        What is known, or None; and what could not be read.
    """
    boxes = contents.folder / BOXES
    splits = sorted(contents.splits, key=lambda split: split.facts.split == "train")
    if not boxes.is_file() or not splits or not splits[0].facts.images:
        return None, ()
    picture = contents.folder / PICTURE
    try:
        score = score_scenes(splits[0].folder, boxes)
        drawn = _picture(picture) if picture.is_file() else None
    except ImageError as error:
        return Scenes(score, None), (LeftOut(str(picture), error.reason),)
    except AnchorpatchError as error:
        return None, (LeftOut(str(boxes), str(error).removeprefix(f"{boxes}: ")),)
    return Scenes(score, drawn), ()


def _picture(path: Path) -> FigureFile:
    encoded = path.read_bytes()
    return FigureFile(
        source=str(path),
        name="scenes",
        number=0,
        title="Scenes with their patches and the true boxes",
        caption="Bold: the strongest patch. Thin: the others. Dashed: the true box.",
        picture=decode_picture(encoded).image.convert("RGB"),
        encoded=encoded,
    )


def fit_table(score: SceneScore) -> Table:
    """Return how often patches hit the object, beside what chance gives."""
    rows = tuple(
        (text(name), share(fit.hit, 1), share(fit.covered, 1))
        for name, fit in (
            ("strongest", score.strongest),
            ("random, same scale", score.random),
            ("middle, same scale", score.centre),
        )
    )
    columns = named("patch", "centre in the object's box", "box covered")
    return Table("Patches against the true boxes", columns, rows)


def size_table(score: SceneScore) -> Table:
    """Return the chosen scales by the size of the object."""
    scales = list(next(iter(score.counts.values())))
    most = max(max(row.values()) for row in score.counts.values())
    rows = tuple(
        (
            Cell(size, i),
            *(Cell(f"{n:,}", n, n / most if n else None) for n in row.values()),
            decimal(score.mean_scale[size], 1),
        )
        for i, (size, row) in enumerate(score.counts.items())
    )
    columns = named("object", *(f"{scale} px" for scale in scales), "mean scale, px")
    notes = (f"{counted(score.images, 'image')}.",)
    return Table("Chosen scale by the object's size", columns, rows, notes=notes)
