from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anchorpatch.errors import DataError, SettingsError
from anchorpatch.figures.errors import (
    RIGHT,
    WRONG,
    BranchErrors,
    ErrorsConfig,
    errors_figure,
    find_errors,
)
from anchorpatch.jobs.crops import CropSource
from anchorpatch.jobs.localizer import load_anchornet
from anchorpatch.networks import Normalization
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.settings import SCALES


@pytest.fixture(scope="module")
def source(image_folder: Path) -> CropSource:
    return CropSource.of_folder(image_folder, "val")


@pytest.fixture(scope="module")
def loaded(weights: Path) -> Weights:
    return load_weights(weights)


@pytest.fixture(scope="module")
def full(source: CropSource, loaded: Weights) -> tuple[list[torch.Tensor], np.ndarray]:
    """The whole F of each branch of every image, the slow way, and the labels."""
    (crops,) = source.batches(range(len(source)), len(source))
    with torch.inference_mode():
        f = load_anchornet(loaded).full(
            Normalization(loaded.meta, torch.device("cpu"))(crops.pixels)
        )
    return list(f), crops.labels


@pytest.fixture(scope="module")
def result(source: CropSource, loaded: Weights) -> BranchErrors:
    return find_errors(source, loaded, ErrorsConfig(scales=SCALES, per_scale=2, device="cpu"))


def test_errors_and_evidence_are_those_of_the_whole_f(
    source: CropSource, result: BranchErrors, full: tuple[list[torch.Tensor], np.ndarray]
):
    maps, labels = full
    logits = torch.stack([f.mean((2, 3)) for f in maps], 1)  # (n, 3, C)
    predicted = logits.argmax(-1).numpy()
    probabilities = logits.softmax(-1)
    paths = {source.path(i): i for i in range(len(source))}
    assert sum(len(errors) for errors in result.errors.values()) > 0
    for j, scale in enumerate(SCALES):
        right = predicted == labels[:, None]
        wrong = [i for i in range(len(labels)) if not right[i, j] and right[i].any()]
        assert result.found[scale] == len(wrong)
        for error in result.errors[scale]:
            i = paths[error.path]
            assert i in wrong
            assert error.true.name == source.classes[labels[i]]
            assert error.mistaken.name == source.classes[predicted[i, j]]
            assert error.right == tuple(s for k, s in enumerate(SCALES) if right[i, k])
            for evidence in (error.true, error.mistaken):
                c = source.classes.index(evidence.name)
                heatmap = maps[j][i, c]
                h, w = divmod(int(heatmap.argmax()), heatmap.shape[1])
                assert evidence.corner == (8 * h, 8 * w)
                assert evidence.score == pytest.approx(heatmap.max().item(), rel=1e-3)
                assert evidence.probability == pytest.approx(
                    probabilities[i, j, c].item(), abs=1e-4
                )
            of_class = [k for k in range(len(labels)) if labels[k] == predicted[i, j]]
            right_ones = [k for k in of_class if right[k, j]]
            if not right_ones:
                assert error.typical is None
                continue
            assert error.typical is not None
            c = int(predicted[i, j])
            best = max(probabilities[k, j, c].item() for k in right_ones)
            k = paths[error.typical.path]
            assert k in right_ones
            assert probabilities[k, j, c].item() == pytest.approx(best, abs=1e-4)
            y, x = error.typical.corners[0] // 8
            assert maps[j][k, c, y, x].item() == pytest.approx(maps[j][k, c].max().item(), rel=1e-3)


def test_the_picture_has_the_patches_with_their_margins(result: BranchErrors):
    picture = np.asarray(errors_figure(result))
    for color in (WRONG, RIGHT):
        assert (picture == color).all(-1).any()
    for scale, errors in result.errors.items():
        for error in errors[:1]:
            for evidence, color in ((error.mistaken, WRONG), (error.true, RIGHT)):
                y, x = evidence.corner
                patch = error.pixels[y : y + scale, x : x + scale]
                # Its place is where its first row of pixels stands in the picture.
                first = patch[0].tobytes()
                # Both may be one patch: the mistaken class's stands on the left.
                found = [
                    (
                        py,
                        row.tobytes().find(first) if color == WRONG else row.tobytes().rfind(first),
                    )
                    for py, row in enumerate(picture)
                ]
                assert any(
                    at >= 0
                    and np.array_equal(picture[py : py + scale, at // 3 : at // 3 + scale], patch)
                    and (picture[py - 1, at // 3 - 1 : at // 3 + scale + 1] == color).all()
                    for py, at in found
                )


def test_json_names_what_is_shown(result: BranchErrors):
    facts = result.to_json()
    assert (facts["figure"], facts["number"], facts["looked_at"]) == ("errors", 4, 40)
    assert facts["found"] == {str(scale): n for scale, n in result.found.items()}


def test_nothing_to_show_and_wrong_settings(
    source: CropSource, loaded: Weights, full: tuple[list[torch.Tensor], np.ndarray]
):
    with pytest.raises(SettingsError, match="scales: expected some of"):
        ErrorsConfig(scales=(64,))
    with pytest.raises(SettingsError, match="per_scale"):
        ErrorsConfig(per_scale=0)
    (right,) = [source.path(i) for i in range(len(source)) if i not in wrong_somewhere(full)][:1]
    config = ErrorsConfig(images=(right,), scales=(63,), device="cpu")
    with pytest.raises(DataError, match="raise --limit"):
        find_errors(source, loaded, config)


def wrong_somewhere(full: tuple[list[torch.Tensor], np.ndarray]) -> set[int]:
    """Images about which some branch is wrong and another right."""
    maps, labels = full
    predicted = torch.stack([f.mean((2, 3)) for f in maps], 1).argmax(-1).numpy()
    right = predicted == labels[:, None]
    return set(np.flatnonzero(right.any(1) & ~right.all(1)).tolist())


def test_the_command(program, image_folder: Path, weights: Path, tmp_path: Path):
    options = ("--data", image_folder, "--weights", weights, "--workers", 0, "--device", "cpu")
    scales = ("--scale", 63, "--scale", 95, "--scale", 111)
    done = program("figure", "errors", *options, *scales, "--limit", 20)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "figures" / "errors.png") as picture:
        assert picture.width > 600
    assert (tmp_path / "figures" / "errors.json").is_file()
    assert "taken for" in done.stdout.splitlines()[0]


def test_a_class_hardly_looked_at_is_searched_for_its_typical_image(
    source: CropSource, loaded: Weights, result: BranchErrors
):
    """Naming one image leaves no other of those looked at to stand for the mistaken class."""
    errors = [(s, e) for s, of_scale in result.errors.items() for e in of_scale if e.typical]
    assert errors
    for scale, error in errors[:2]:
        config = ErrorsConfig(images=(error.path,), scales=(scale,), device="cpu")
        alone = find_errors(source, loaded, config)
        assert (len(alone.survey), alone.found) == (1, {scale: 1})
        (again,) = alone.errors[scale]
        assert (again.mistaken, again.true) == (error.mistaken, error.true)
        assert again.typical is not None
        assert again.typical.path.startswith(f"{error.mistaken.name}/")
        # 16 of the class's 20 images are looked at.
        assert again.typical.probability <= error.typical.probability
