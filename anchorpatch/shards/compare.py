"""Saying how the inputs of a run differ from those of the shards that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from anchorpatch.errors import ShardError
from anchorpatch.shards.layout import (
    ShardHeader,
    decode_text,
    find_dataset,
    find_group,
    open_shard,
)

__all__ = ["extract_options", "first_changed_path", "header_differences"]

#: Settings that a preset decides.
_OF_A_PRESET: Final = ("max_patches", "iou_threshold", "coverage")


def extract_options(header: ShardHeader) -> list[str]:
    """Return the options of ``anchorpatch extract`` that a split was made with.

    What is as by default is left out, and so are the data and the weights, whose place a header
    does not know.

    Example:
        >>> from anchorpatch.shards.layout import ShardSettings
        >>> settings = ShardSettings((6, 3, 2), 0.3, (0.3, 0.3, 0.3), codec="jpeg", preset=None)
        >>> " ".join(extract_options(ShardHeader("val", (), (), settings, "")))
        '--split val --max-patches 6,3,2 --iou-threshold 0.3 --coverage 0.3,0.3,0.3 --codec jpeg'
    """
    settings = header.settings
    values = settings.to_json()
    if settings.preset is not None:
        values = {k: v for k, v in values.items() if k not in _OF_A_PRESET}
    if settings.codec == "image":
        del values["store_images"]  # implied
    defaults = {field.name: field.default for field in fields(settings)}
    words = ["--split", header.split]
    for name, value in values.items():
        if value == defaults[name] or name == "crop_mode":
            continue
        if name == "precision":
            words.append("--amp")
        elif value is True:
            words.append(_option(name))
        else:
            words += [_option(name), _shown(value)]
    return words


#: Settings that no option of the same name decides.
_NOT_OPTIONS = {"precision": "precision (--amp)", "crop_mode": "crop mode (of the weights)"}


def header_differences(old: ShardHeader, new: ShardHeader) -> list[str]:
    """Say what differs in two headers, one phrase each; the version of anchorpatch may.

    Example:
        >>> from dataclasses import replace
        >>> from anchorpatch.shards.layout import ShardSettings
        >>> settings = ShardSettings((1, 1, 1), 0.3, (0.1, 0.1, 0.1))
        >>> old = ShardHeader("val", ("cat",), ("cat",), settings, weights_sha256="0" * 64)
        >>> header_differences(old, replace(old, settings=replace(settings, iou_threshold=0.8)))
        ['--iou-threshold was 0.3, now 0.8']
    """
    found = []
    then, now = old.settings.to_json(), new.settings.to_json()
    if then["device"] is None and now["device"] == "cpu":
        # Not recorded by older versions, whose bytes on a CPU are the same. On a GPU they are not:
        # convolutions were rounded to TF32.
        then["device"] = "cpu"
    if then["device"] != now["device"]:
        then["device"] = then["device"] or "not recorded"
        then["batch_size"] = now["batch_size"]  # goes with the device
    for name, before in then.items():
        if before != now[name]:
            option = _NOT_OPTIONS.get(name) or _option(name)
            found.append(f"{option} was {_shown(before)}, now {_shown(now[name])}")
    if old.split != new.split:
        found.append(f"--split was {old.split}, now {new.split}")
    if old.weights_sha256 != new.weights_sha256:
        was, is_now = old.weights_sha256[:12], new.weights_sha256[:12]
        found.append(f"--weights had SHA-256 {was}..., now {is_now}...")
    for what, was_list, now_list in (
        ("classes of the folder", old.classes, new.classes),
        ("classes of the weights", old.network_classes, new.network_classes),
    ):
        if was_list != now_list:
            counts = f"{what} were {len(was_list)}, now {len(now_list)}"
            found.append(f"{counts} ({_first_difference(was_list, now_list)})")
    return found


def first_changed_path(shard: Path, paths: Sequence[str]) -> str:
    """Say the first file in which a shard and the present file list differ.

    Args:
        shard: the shard that is there.
        paths: what its part of the file list is now, in order.

    Returns:
        A phrase; empty when the shard cannot be read.
    """
    try:
        stored = _stored_paths(shard)
    except ShardError:
        return ""
    # Images and skipped ones were one list, sorted by bytes.
    was = [decode_text(path) for path in sorted(stored)]
    if sorted(was) == sorted(paths):
        return f"{shard.name} has the same names, but a file's size or label changed"
    return f"first in {shard.name}: {_first_difference(was, paths)}"


def _stored_paths(path: Path) -> list[bytes]:
    """Return the paths in a shard that may not be what the manifest says, the skipped ones too.

    Raises:
        ShardError: they cannot be read.
    """
    with open_shard(path) as file:
        size = path.stat().st_size
        groups = [find_group(file, name) for name in ("images", "skipped")]
        found = [find_dataset(group, f"{group.name}/path", "S", (None,), size) for group in groups]
        return [stored for dataset in found for stored in dataset[:].tolist()]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _first_difference(was: Sequence[str], now: Sequence[str]) -> str:
    """Say the first of each list that the other one lacks."""
    known, present = set(was), set(now)
    gone = next((x for x in was if x not in present), None)
    come = next((x for x in now if x not in known), None)
    parts = [f"{gone} removed"] if gone is not None else []
    parts += [f"{come} added"] if come is not None else []
    return ", ".join(parts) or "in another order"
