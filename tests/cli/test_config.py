from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from anchorpatch.cli.main import cli, load_config, unknown_variables
from tests.conftest import Program


def load(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "anchorpatch.toml"
    file.write_text(text)
    return load_config(click.Context(cli), str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[extract]\nshard_size = 1.9", "[extract] shard_size: '1.9' is not a valid integer"),
        ("[extract]\nshard-size = true", "[extract] shard-size: expected a whole number, found"),
        ("[extract]\nshard_size = 0", "[extract] shard_size: 0 is not in the range x>=1"),
        ("[extract]\njson = 1", "[extract] json: expected true or false, found 1"),
        ("[extract]\njson = 'yes'", "[extract] json: expected true or false, found yes"),
        ("[extract]\ncodec = 3", "[extract] codec: '3' is not one of 'raw', 'jpeg', 'image'"),
        ("[extract]\ncodec = ['raw']", "[extract] codec: expected one of raw, jpeg, image, found"),
        ("[extract]\nout = {a = 1}", "[extract] out: expected text, found a table"),
        ("[extract]\ncoverage = [0.1, 0.2]", "expected 3 numbers such as X,X,X"),
        ("[extract]\nmax_patches = [1, 2, 2.5]", "expected 3 whole numbers such as N,N,N"),
        ("[extract]\nmax_patches = [1, 2, [3]]", "expected N,N,N, found a list"),
        ("[extract]\nmax_bad = 1.01", "expected a share such as 0.01 or 1%"),
        ("[extract]\nstore-images = true\nstore_images = true", "are the same option"),
        ("[extract]\nas_json = true", "no such option: 'as-json'"),
        (
            "[train]\nepochs = 2026-01-01",
            "[train] epochs: expected a whole number, found 2026-01-01",
        ),
        ("[train]\nlr = 07:00:00", "[train] lr: expected a number, found 07:00:00"),
        ("[figure.errors]\nscale = [63, 64]", "[figure.errors] scale: '64' is not one of"),
        ("[shards]\nshow = 3", "expected a table [shards.show], found 3"),
        ("[figure]\npatches = 5", "expected a table [figure.patches], found 5"),
        ("[shards.nope]", "expected a table for a command (inspect, verify, merge, show, export)"),
        ("[shards.verify]\njobs = 1.5", "[shards.verify] jobs: '1.5' is not a valid integer"),
        ("[figure.coverage]\nlimits = 3", "no such option: 'limits'. Did you mean 'limit'?"),
        ("extract = 3", "extract is a command: expected a table [extract], found 3"),
        ("defaults = 3", "defaults: expected a table, found 3"),
        ("[defaults]\ndta = 'a'", "found 'dta'. Did you mean 'data'?"),
        ("[defaults]\nweights = 'a'", "expected some of class-names, data, device, "),
        ("[defaults]\ndevice = 'gpu'", "[defaults] device: 'gpu' is not one of"),
    ],
)
def test_what_the_command_line_would_not_take_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(click.UsageError) as error:
        load(tmp_path, text)
    assert f"settings file {tmp_path / 'anchorpatch.toml'}" in error.value.message
    assert message in error.value.message
    assert "\n" not in error.value.message


def test_options_have_the_names_of_the_command_line(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        """
        [extract]
        json = true
        compile = true
        store-images = false
        shard_size = 12
        max-patches = [6, 3, 2]
        coverage = 0.25
        max-bad = "2%"
        [shards.verify]
        jobs = 3
        [figure.coverage]
        areas = [0.1, 0.2]
        localizers = ["sobel", "center"]
        peer = "a.safetensors"
        [figure.errors]
        scale = [63]
        images = ["a,b.jpg"]
        [evaluate]
        speed = false
        """,
    )
    command = cli.get_command(click.Context(cli), "extract")
    assert command is not None
    context = command.make_context("extract", [], default_map=found["extract"])
    assert {
        "as_json": True,
        "compile": True,
        "store_images": False,
        "shard_size": 12,
        "max_patches": (6, 3, 2),
        "coverage": (0.25, 0.25, 0.25),
        "max_bad": 0.02,
    }.items() <= context.params.items()
    assert found["shards"]["verify"] == {"jobs": "3"}
    assert found["figure"]["coverage"]["peers"] == ["a.safetensors"]
    assert found["figure"]["errors"] == {"scales": ["63"], "images": ["a,b.jpg"]}
    assert found["evaluate"] == {"speed": False}


def test_defaults_hold_for_all_commands(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "[defaults]\ndata = 'photos'\nshards = 'made'\nworkers = 1\n[train]\ndata = 'others'",
    )
    assert found["extract"] == {"data": "photos", "out": "made", "workers": "1"}
    assert found["train"] == {"data": "others", "workers": "1"}
    assert found["figure"]["coverage"] == {"data": "photos", "workers": "1"}
    assert found["models"] == {}


def test_variables_have_the_names_of_the_command_line(program: Program) -> None:
    shown = program("models", "anchornet", env={"ANCHORPATCH_MODELS_JSON": "1"})
    assert json.loads(shown.stdout)["classes"] == 1000
    for name, value, message in (
        ("ANCHORPATCH_EXTRACT_JSON", "perhaps", "'--json' (from $ANCHORPATCH_EXTRACT_JSON)"),
        ("ANCHORPATCH_EXTRACT_SHARD_SIZE", "1.9", "(from $ANCHORPATCH_EXTRACT_SHARD_SIZE): '1.9'"),
        ("ANCHORPATCH_DEVICE", "gpu", "'--device' (from $ANCHORPATCH_DEVICE): 'gpu'"),
        ("RANK", "abc", "$RANK: expected a whole number"),
        ("WORLD_SIZE", "2.0", "$WORLD_SIZE: expected a whole number"),
        ("SLURM_ARRAY_TASK_ID", "x", "$SLURM_ARRAY_TASK_ID: expected a whole number"),
    ):
        result = program("extract", "--weights", "demo", env={name: value})
        assert (result.returncode, result.stdout) == (2, ""), name
        assert message in result.stderr


def test_misspelt_variables_are_named(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXTRACT_AS_JSON", "EXTRACT_JSON", "CONFIG", "DEBUG", "DATA", "TEST_PHOTOS"):
        monkeypatch.setenv(f"ANCHORPATCH_{name}", "")
    monkeypatch.setenv("ANCHORPATCH_FIGURE_ERRORS_PER_SCALE", "2")
    lines = unknown_variables(click.Context(cli))
    assert lines == [
        "ANCHORPATCH_EXTRACT_AS_JSON is set, but no option has this name; it is ignored. "
        "Did you mean 'ANCHORPATCH_EXTRACT_JSON'?"
    ]
    result = program("shards", "inspect", ".", env={"ANCHORPATCH_EXTRACT_WORKRES": "1"})
    assert "Did you mean 'ANCHORPATCH_EXTRACT_WORKERS'?" in result.stderr
