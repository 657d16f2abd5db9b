"""What the packages offer: a sorted, complete __all__ and the tree that errors.py draws."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest

import anchorpatch
from anchorpatch import errors

# Elsewhere a leading underscore says what is not for others.
MODULES = ["anchorpatch", "anchorpatch.errors", "anchorpatch.lsp"] + [
    module.name
    for module in pkgutil.iter_modules(anchorpatch.__path__, "anchorpatch.")
    if module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_true(name: str) -> None:
    module = importlib.import_module(name)
    names = list(getattr(module, "__all__", []))
    constants = [n for n in names if n.isupper()]
    classes = [n for n in names if n[0].isupper() and not n.isupper()]
    others = [n for n in names if n[0].islower() or n[0] == "_"]
    assert names == sorted(constants) + sorted(classes) + sorted(others)
    for exported in names:
        assert hasattr(module, exported)
    assert set(names) <= set(dir(module))


def test_the_error_tree_is_the_one_drawn() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    names = [name for name in errors.__all__ if name[0].isupper()]
    assert ["AnchorpatchError", *sorted(drawn)] == sorted(["AnchorpatchError", *drawn]) == names
    for name in names:
        cls = getattr(errors, name)
        assert issubclass(cls, errors.AnchorpatchError)
        assert inspect.getdoc(cls)
