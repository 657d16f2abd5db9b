from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from anchorpatch.figures import canvas
from anchorpatch.figures.canvas import BLACK, PAPER, Font, encoded, fallbacks, fitted, written

BOX = "\N{WHITE SQUARE}"


def write_font(path: Path, characters: str, family: str = "Test Sans") -> Path:
    """Write a font whose every character is a black block of 2 by 1 em."""
    pen = TTGlyphPen(None)
    for i, corner in enumerate([(0, 0), (0, 1000), (2000, 1000), (2000, 0)]):
        (pen.lineTo if i else pen.moveTo)(corner)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "block"])
    builder.setupCharacterMap(dict.fromkeys(map(ord, characters), "block"))
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "block": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (2000, 0), "block": (2000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths of the system's fonts, of which there are none at first."""
    paths: list[str] = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    caches = (canvas._system_fonts, fallbacks)
    for cached in caches:
        cached.cache_clear()
    yield paths
    for cached in caches:
        cached.cache_clear()


def test_other_scripts_are_boxes_where_no_font_has_them(system: list[str]) -> None:
    assert fallbacks("中文") == ()
    assert Font().width("a中文") == Font().width(f"a{BOX}{BOX}")
    assert np.array_equal(written("中文", None), written(BOX * 2, None))


def test_other_scripts_come_from_a_font_of_the_system(system: list[str], tmp_path: Path) -> None:
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    system.append(str(tmp_path / "damaged.ttf"))
    system.append(str(write_font(tmp_path / "a.ttf", "中", "Test Of One")))
    system.append(str(write_font(tmp_path / "b.ttf", "中文한", "Test Of Three")))
    # The one that has all of a text comes before those that have a part of it.
    assert [entry.name for entry in fallbacks("ä 中文")] == ["Test Of Three"]
    assert [entry.name for entry in fallbacks("中")] == ["Test Of One"]
    assert fallbacks("Übergröße кошка") == ()
    face = Font(20)
    assert face.width("a中文b") == pytest.approx(face.width("a") + 2 * 40 + face.width("b"))
    pixels = np.asarray(written("中", 40, size=20).convert("L"))
    # On the line of DejaVu Sans, and one em high.
    base = face.face.getmetrics()[0]
    assert (pixels[base - 18 : base - 1, 1:-1] == 0).all()
    assert (pixels[base + 1 :] == 255).all()


def test_matplotlib_takes_the_same_fonts_and_warns_of_none(
    system: list[str], tmp_path: Path
) -> None:
    """Warnings are errors here."""

    def drawn() -> bytes:
        figure = Figure(figsize=(2, 1))
        figure.text(0.1, 0.5, "Größe 中 ☃", fontweight="bold")
        return encoded(figure, "PNG")

    without = drawn()
    system.append(str(write_font(tmp_path / "block.ttf", "中", "Test Block")))
    canvas._system_fonts.cache_clear()
    fallbacks.cache_clear()
    assert drawn() != without


@pytest.mark.parametrize(
    "text", ["a\nb\tc", "caf\udce9", "\x00\x1b[31m", "", "e\u0301", "👍🏽\u200d"]
)
def test_any_name_can_be_drawn_in_one_line(text: str) -> None:
    face = Font()
    picture = written(text, None)
    assert picture.height == written("a", None).height
    face.draw(ImageDraw.Draw(Image.new("RGB", (50, 20), PAPER)), 0, 0, text, BLACK)
    assert not set("\n\t\x00\x1b\udce9") & set(fitted(text, 1000, face))


def test_accents_are_composed() -> None:
    assert np.array_equal(written("u\u0308ber", None), written("über", None))


@settings(deadline=None, max_examples=60)
@given(
    st.text(max_size=40),
    st.sampled_from(["", "predicted as "]),
    st.sampled_from(["", ", 87%"]),
    st.integers(0, 300),
)
def test_shortened_names_fit_and_keep_what_stands_around_them(
    name: str, start: str, end: str, width: int
) -> None:
    face = Font(12)
    line = fitted(name, width, face, start=start, end=end)
    assert line.startswith(start)
    assert line.endswith(end)
    assert face.width(line) <= width or line == f"{start}…{end}"
    whole = fitted(name, 10_000, face, start=start, end=end)
    if face.width(whole) <= width:
        assert line == whole
    elif "…" not in name and face.width(line) <= width:
        kept = line[len(start) : len(line) - len(end)].split("…")
        assert whole.startswith(start + kept[0])
        assert whole.endswith(kept[-1] + end)
