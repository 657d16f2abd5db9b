"""Use from Python: what the package offers, and images in memory."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import anchorpatch
from anchorpatch import LocalizedPatches, ShardReader, localize
from anchorpatch.errors import DataError, SettingsError, WeightsError
from anchorpatch.settings import LspSettings
from tests.conftest import draw_photo
from tests.program import PROCESSES, run_program


@pytest.fixture(scope="module")
def reader(
    image_folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> ShardReader:
    """The shards of the photos, of which some are compared."""
    out = tmp_path_factory.mktemp("shards")
    words = ("--data", image_folder, "--weights", weights, "--out", out)
    done = run_program("extract", "--split", "val", *words, "--limit", 10, cwd=out)
    assert done.returncode == 0, done.stderr
    return ShardReader(out / "val")


def check(found: list[LocalizedPatches], reader: ShardReader) -> None:
    assert len(found) == len(reader)
    for i, patches in enumerate(found):
        expected = reader.image_patches(i)
        first = int(reader.first[i])
        rows = range(first, first + len(patches))
        assert patches.scale == expected.scale
        assert np.array_equal(patches.pixels, expected.pixels)
        assert np.array_equal(patches.corners, expected.corners)
        assert np.array_equal(patches.scores, expected.scores)
        assert np.array_equal(patches.boxes, reader.source_box(expected.scale, rows))
        assert patches.predicted == reader.network_classes[reader.predicted[i]]
        assert patches.probability == reader.branch_prob[i, (63, 95, 111).index(patches.scale)]
        assert patches.size == tuple(reader.size[i])


def test_localize_finds_what_extract_finds(
    reader: ShardReader, image_folder: Path, weights: Path
) -> None:
    files = [image_folder / "val" / path.decode() for path in reader.path.tolist()]
    check(localize(files, weights), reader)
    check(localize(map(Image.open, files), weights=weights), reader)
    arrays = [np.asarray(Image.open(file)) for file in files]
    assert len({array.shape for array in arrays}) > 5
    check(localize(arrays, str(weights)), reader)
    one = localize(arrays[3], weights)
    assert np.array_equal(one.pixels, reader.image_patches(3).pixels)
    assert repr(one) == (
        f"LocalizedPatches({len(one)} of {one.scale} px, {one.predicted!r} {one.probability:.1%})"
    )
    four = localize(np.stack([arrays[3]] * 2), weights)
    assert [np.array_equal(patches.pixels, one.pixels) for patches in four] == [True, True]
    assert localize([], weights) == []


def test_pictures_of_any_mode_are_upright_and_opaque(weights: Path) -> None:
    photo = draw_photo(5, (260, 300))
    plain = localize(photo, weights)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    turned.info["exif"] = exif.tobytes()
    assert np.array_equal(localize(turned, weights).pixels, plain.pixels)
    assert turned.size == (300, 260)
    clear = photo.convert("RGBA")
    assert np.array_equal(localize(np.asarray(clear), weights).pixels, plain.pixels)
    clear.putalpha(0)
    white = Image.new("RGB", photo.size, "white")
    assert np.array_equal(localize(clear, weights).crop, localize(white, weights).crop)
    gray = photo.convert("L")
    for same in (gray, np.asarray(gray), gray.convert("RGB"), gray.convert("LA")):
        assert np.array_equal(localize(same, weights).crop, localize(gray, weights).crop)
    long = localize(photo.resize((1200, 100)), weights)
    assert long.size == (100, 1200)


def test_settings_of_algorithm_1(weights: Path) -> None:
    photo = draw_photo(5, (260, 300))
    assert len(localize(photo, weights, lsp=LspSettings((1, 1, 1), 0.3, (0.3,) * 3))) == 1
    many, few = localize(photo, weights, lsp="finetune"), localize(photo, weights, lsp="figure")
    assert len(many) > len(few)
    with pytest.raises(
        SettingsError, match="lsp: expected one of figure, finetune, evaluate, dense"
    ):
        localize(photo, weights, lsp="finest")


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (
            np.zeros((9, 9, 3)),
            r"image 0: expected pixels uint8 \(H, W\).*found float64 \(9, 9, 3\)",
        ),
        (np.zeros((9, 9, 2), np.uint8), r"image 0: expected pixels .* found uint8 \(9, 9, 2\)"),
        ([Image.new("L", (9, 9)), None], r"image 1: expected a picture of Pillow.*found NoneType"),
        (Image.new("F", (9, 9)), "image 0: 32-bit pixels"),
        ("nope.jpg", "nope.jpg: missing"),
    ],
)
def test_what_is_no_image_is_named(image: object, said: str, weights: Path) -> None:
    with pytest.raises(DataError, match=said):
        localize(image, weights)  # type: ignore[call-overload]


def test_a_cut_off_file_that_pillow_has_opened(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    draw_photo(1, (300, 300)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with (
        Image.open(path) as image,
        pytest.raises(DataError, match="image 0: cannot be loaded: "),
    ):
        localize(image, weights)


def test_the_demo_weights_are_not_taken_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photo = draw_photo(5, (224, 224))
    with pytest.raises(WeightsError, match=r'best.safetensors does not exist.*weights="demo"'):
        localize(photo)
    with pytest.raises(WeightsError, match=r"nope.safetensors"):
        localize(photo, "nope.safetensors")
    assert len(localize(photo, weights="demo")) > 0


@pytest.mark.photos
def test_the_bundled_weights_know_ten_classes_of_photographs(photos: Path) -> None:
    folders = sorted((photos / "imagenette224" / "val").iterdir())
    files = [path for folder in folders for path in sorted(folder.iterdir())[::20]]
    found = localize(files, weights="photos")
    assert len(found) == len(files) == 50
    right = sum(p.predicted == file.parent.name for p, file in zip(found, files, strict=True))
    assert right / len(files) > 0.7


def _in_a_fork(weights: Path) -> None:
    import os

    photo = draw_photo(5, (224, 224))
    first = localize(photo, weights, engine="torch")
    child = os.fork()
    if child == 0:
        again = localize(photo, weights, engine="torch")
        os._exit(int(not np.array_equal(first.scores, again.scores)))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_has_threads_of_its_own(weights: Path) -> None:
    process = PROCESSES.Process(target=_in_a_fork, args=(weights,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, anchorpatch\n"
        "assert not {'torch', 'numpy', 'PIL', 'h5py'} & sys.modules.keys()\n"
        "assert set(anchorpatch.__all__) <= set(dir(anchorpatch))\n"
        "anchorpatch.ShardReader\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'anchorpatch' has no attribute 'localise'"):
        anchorpatch.localise  # noqa: B018


@pytest.mark.parametrize("package", ["anchorpatch", "anchorpatch.shards"])
def test_type_checkers_see_every_public_name(package: str) -> None:
    module = __import__(package, fromlist=["__all__"])
    tree = ast.parse(Path(module.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name)
    assert block.test.id == "TYPE_CHECKING"
    imported = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported.keys() == set(module.__all__) - {"__version__"}
    for name, home in imported.items():
        assert getattr(module, name).__module__ == home
    assert resources.files("anchorpatch").joinpath("py.typed").is_file()
