"""The list of networks, as a user asks for it."""

from __future__ import annotations

import json

import pytest

from anchorpatch.demo.scenes import CLASSES
from tests.conftest import Program


def test_a_table_of_networks(program: Program) -> None:
    result = program("models", "anchornet", "resnet50", "hcgnet_b")
    assert result.returncode == 0, result.stderr  # which tells progress on a slow machine
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        *("network", "parameters", "GMACs", "at", "224", "px"),
        *("111", "px", "95", "px", "63", "px"),
    ]
    rows = {line[:22].strip(): line[22:].split() for line in lines[1:5]}
    assert rows == {
        "anchornet": ["1,550,313", "0.4853", "-", "-", "-"],
        "anchornet (localizing)": ["1,259,313", "0.3939", "-", "-", "-"],
        "resnet50": ["25,557,032", "4.0892", "1.0779", "0.7527", "0.3357"],
        "hcgnet_b": ["12,845,501", "2.0028", "0.5261", "0.3700", "0.1659"],
    }
    assert lines[5:] == [
        "receptive fields of anchornet: 63, 95, 111 px",
        "pretrained input of resnet50: mean 0.485, 0.456, 0.406; std 0.229, 0.224, 0.225; "
        "bilinear, 224 px, crop_pct 0.966",
        f"bundled weights of anchornet: demo ({', '.join(CLASSES)})",
        "bundled weights of anchornet: photos (tench, English springer, cassette player, "
        "chain saw, church, French horn, garbage truck, gas pump, golf ball, parachute)",
    ]
    assert "\x1b" not in result.stdout


def test_the_peers_of_anchornet(program: Program) -> None:
    result = program("models", "bagnet33", "bagnet77", "saccader")
    assert result.returncode == 0, result.stderr  # which tells progress on a slow machine
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines[1:4]] == [
        ["bagnet33", "18,310,184", "17.1817", "3.5483", "2.4431", "0.8625"],
        ["bagnet77", "20,573,736", "14.1092", "2.2514", "1.4271", "-"],
        ["saccader", "35,523,112", "19.5035", "2.6250", "1.5616", "-"],
    ]
    assert lines[4:] == [
        "receptive field of bagnet33: 33 px",
        "receptive field of bagnet77: 77 px",
        "receptive field of saccader: 77 px",
    ]


def test_named_networks_for_other_classes_and_sizes(program: Program) -> None:
    result = program("models", "vit_b_32", "resnet18", "--classes", 10, "--size", 160, "--json")
    assert result.returncode == 0, result.stderr  # which tells progress on a slow machine
    report = json.loads(result.stdout)
    vit, resnet = report["networks"]
    assert (report["classes"], report["size"]) == (10, 160)
    assert resnet["parameters"] == 11_689_512 - 990 * 513
    assert list(resnet["gmacs_by_side"]) == ["160", "111", "95", "63"]
    assert resnet["gmacs"] == resnet["gmacs_by_side"]["160"] == pytest.approx(0.92529, abs=1e-5)
    assert vit["gmacs_by_side"] == {"160": None, "111": None, "95": None, "63": None}


def test_the_input_of_a_network_of_timm(program: Program) -> None:
    pytest.importorskip("timm")
    result = program("models", "timm:tf_efficientnet_lite0", "--json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["networks"]
    half = [0.5, 0.5, 0.5]
    assert row["preprocessing"] == {
        **{"mean": half, "std": half, "interpolation": "bicubic"},
        **{"size": 224, "crop_pct": 0.875},
    }


def test_table_3_is_within_the_papers_rounding(program: Program) -> None:
    result = program("models", "--table3", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["images"] == {"63": 15050, "95": 18047, "111": 16903}
    printed = {
        "resnet50": (4.1, 1.9, 2.2, 2.2, 2.1),
        "resnext50": (4.3, 2.0, 2.3, 2.4, 2.2),
        "densenet169": (3.4, 1.6, 1.8, 1.8, 1.7),
        "hcgnet_c": (7.1, 3.3, 3.8, 3.9, 3.7),
    }
    cells = {(cell["network"], cell["scale"]): cell for cell in report["cells"]}
    assert len(cells) == 20
    for network, figures in printed.items():
        values = []
        for scale, figure in zip(("224", "63", "95", "111", "all"), figures, strict=True):
            cell = cells[network, scale]
            assert cell["printed"] == figure
            assert cell["deviation"] == pytest.approx(cell["gmacs"] / figure - 1)
            assert abs(cell["deviation"]) < (0.03 if scale == "all" else 0.06)
            values.append(cell["gmacs"])
        overall = (values[1] * 15050 + values[2] * 18047 + values[3] * 16903) / 50000
        assert values[4] == pytest.approx(overall)


def test_names_are_one_a_line(program: Program) -> None:
    names = program("models", "--names").stdout.splitlines()
    assert names[:3] == ["anchornet", "resnet50", "resnext50"]
    assert len(names) == len(set(names)) > 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5O"], "unknown network 'resnet5O': did you mean 'resnet50'?"),
        (["--table3", "resnet50"], "--table3 cannot be combined"),
        (["--size", "8"], "8 is not in the range x>=32"),
    ],
)
def test_wrong_usage(program: Program, arguments: list[str], message: str) -> None:
    result = program("models", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
