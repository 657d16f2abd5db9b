"""Networks by name: ours, torchvision's classifiers, timm's if it is installed, and one's own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, Final

import torch
import torchvision
from torch import nn

from anchorpatch.errors import MissingDependency, SettingsError, reason_of
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.bagnet import bagnet33, bagnet77
from anchorpatch.models.hcgnet import hcgnet_b, hcgnet_c
from anchorpatch.models.saccader import saccader
from anchorpatch.text import nearest

#: What the name of a network of timm begins with.
TIMM: Final = "timm:"

#: torchvision's networks that have further outputs in training, or that expect another
#: normalization: built without the former, and with the one that their weights were trained with.
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    name: {"aux_logits": False, "transform_input": True, "init_weights": True}
    for name in ("googlenet", "inception_v3")
}


def _from_torchvision(name: str, classes: int) -> nn.Module:
    options = _OPTIONS.get(name, {})
    module: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=classes, **options
    )
    return module


#: AnchorNet, the networks of Tables 3 and 4, and AnchorNet's peers; each takes the number of
#: classes.
NETWORKS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "anchornet": AnchorNet,
    "resnet50": partial(_from_torchvision, "resnet50"),
    "resnext50": partial(_from_torchvision, "resnext50_32x4d"),
    "densenet169": partial(_from_torchvision, "densenet169"),
    "hcgnet_b": hcgnet_b,
    "hcgnet_c": hcgnet_c,
    "bagnet33": bagnet33,
    "bagnet77": bagnet77,
    "saccader": saccader,
}

#: What torchvision calls a network of `NETWORKS` that it has by another name.
_IN_TORCHVISION: Final = {"resnext50": "resnext50_32x4d"}


@lru_cache
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's classifiers.

    Example:
        >>> "resnet18" in torchvision_names()
        True
    """
    return tuple(torchvision.models.list_models(module=torchvision.models))


def torchvision_name(name: str) -> str | None:
    """Return what torchvision calls a network, or None where it has none of that name.

    Example:
        >>> torchvision_name("resnext50"), torchvision_name("hcgnet_b")
        ('resnext50_32x4d', None)
    """
    name = _IN_TORCHVISION.get(name, name)
    return name if name in torchvision_names() else None


def timm_module() -> Any:
    """Return the package timm.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingDependency(
            f"names that begin with {TIMM!r} need the package timm, which is not installed: "
            "run pip install 'anchorpatch[timm]'"
        ) from error
    return timm


def is_own(name: str) -> bool:
    """Tell whether a name is ``module:function``, code of the user that builds a network.

    Example:
        >>> is_own("networks:tiny"), is_own("timm:resnet18"), is_own("resnet18")
        (True, False, False)
    """
    return ":" in name and not name.startswith(TIMM)


@lru_cache
def own_builder(name: str) -> Callable[[int], nn.Module]:
    """Import what ``module:function`` names, from the current directory or installed.

    The function, or the class, is given the number of classes: as ``num_classes`` if it has a
    parameter of that name, else as the first argument.

    Raises:
        SettingsError: there is no such module or function, or importing it fails.
    """
    module_name, _, path = name.partition(":")
    # As with `python -m`: the installed program does not look into the current directory.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
        if not callable(found):
            raise TypeError(f"{path} is not callable")
        parameters = inspect.signature(found).parameters
    except Exception as error:  # whatever the user's module does
        raise SettingsError(
            f"{name}: expected a module in {here} or installed, and a function in it that returns "
            f"a network, found: {type(error).__name__}: {reason_of(error)}"
        ) from error
    by_name = "num_classes" in parameters

    def builder(classes: int) -> nn.Module:
        try:
            module = found(num_classes=classes) if by_name else found(classes)
        except Exception as error:
            on_meta = torch.get_default_device().type == "meta"
            if on_meta and isinstance(error, (NotImplementedError, RuntimeError)):
                raise  # `build_on_meta` knows another way
            given = f"num_classes={classes}" if by_name else classes
            raise SettingsError(
                f"{name}: {path}({given}) failed: {type(error).__name__}: {reason_of(error)}"
            ) from error
        if not isinstance(module, nn.Module):
            raise SettingsError(
                f"{name}: expected {path} to return a torch.nn.Module, got {type(module).__name__}"
            )
        return module

    return builder


def check_name(name: str) -> None:
    """Do nothing where `build` knows the name.

    Raises:
        SettingsError: no network has that name; names the nearest.
        MissingDependency: it is one of timm's, which is not installed.
    """
    if name in NETWORKS or name in torchvision_names():
        return
    if is_own(name):
        own_builder(name)
        return
    if name.startswith(TIMM):
        timm = timm_module()
        if timm.is_model(name.removeprefix(TIMM)):
            return
        known: Iterable[str] = (TIMM + other for other in timm.list_models())
    else:
        known = (*NETWORKS, *torchvision_names())
    near = nearest(name, known)
    hint = f"did you mean {near!r}? " if near else ""
    raise SettingsError(
        f"unknown network {name!r}: {hint}`anchorpatch models` lists those of the paper; any "
        f"classifier of torchvision works by its name, timm's as {TIMM}NAME, and your own as "
        "MODULE:FUNCTION"
    )


def build(name: str, classes: int = 1000) -> nn.Module:
    """Build a network by its name, with random weights.

    Args:
        name: of `NETWORKS`, of torchvision's classifiers, "timm:NAME", or ``module:function`` as
            `own_builder` takes it.
        classes: number of outputs.

    Raises:
        SettingsError: no network has that name.
        MissingDependency: it is one of timm's, which is not installed.

    Example:
        >>> build("resnet18", classes=10).fc.out_features
        10
    """
    check_name(name)
    if name in NETWORKS:
        return NETWORKS[name](classes)
    if is_own(name):
        return own_builder(name)(classes)
    if name.startswith(TIMM):
        module: nn.Module = timm_module().create_model(
            name.removeprefix(TIMM), pretrained=False, num_classes=classes
        )
        return module
    return _from_torchvision(name, classes)


def build_on_meta(name: str, classes: int = 1000) -> nn.Module:
    """Build a network without memory for its weights, to count and to try sizes.

    A network whose construction computes with tensors, such as a RegNet, is first built as by
    `build`.
    """
    try:
        with torch.device("meta"):
            return build(name, classes)
    except (NotImplementedError, RuntimeError):
        return build(name, classes).to("meta")
