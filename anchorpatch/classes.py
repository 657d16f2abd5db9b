"""Names of classes: WordNet ids and what people call them, and which output is which class.

Folders of ImageNet are called by WordNet ids, such as n02102040; people say English springer.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import runpy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Final

from anchorpatch.errors import DataError, reason_of
from anchorpatch.text import counted, few

#: A WordNet id, and what may stand between it and a name in a file.
_ID: Final = re.compile(r"n\d{8}")
_ID_AND_NAME: Final = re.compile(r"(n\d{8})[ ,;:]\s*(.*)")

#: What two classes of ImageNet are called: a bird and a machine, a dog and a garment. torchvision
#: tells them apart, "crane bird" and "crane", in some versions.
_SHARED: Final = {
    "cardigan": ("n02113186", "n02963159"),
    "crane": ("n02012849", "n03126707"),
    "maillot": ("n03710637", "n03710721"),
}


@lru_cache
def imagenet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet-1k, in the order of the outputs of its classifiers.

    Example:
        >>> len(imagenet_ids()), imagenet_ids()[217]
        (1000, 'n02102040')
    """
    file = resources.files("anchorpatch").joinpath("imagenet_wnids.txt")
    return tuple(file.read_text(encoding="ascii").split())


@lru_cache
def imagenet_names() -> Mapping[str, str]:
    """Return torchvision's names of the classes of ImageNet-1k by their WordNet ids.

    Depending on the version of torchvision, two classes may share a name (crane, maillot).

    Example:
        >>> imagenet_names()["n02102040"]
        'English springer'
    """
    # Importing torchvision takes seconds, as it imports torch; this file of it is plain lists.
    found = importlib.util.find_spec("torchvision")
    file = Path(found.origin).parent / "models" / "_meta.py" if found and found.origin else Path()
    try:
        names = runpy.run_path(str(file))["_IMAGENET_CATEGORIES"]
    except (OSError, KeyError):
        from torchvision.models import get_weight

        names = get_weight("ResNet50_Weights.IMAGENET1K_V1").meta["categories"]
    return dict(zip(imagenet_ids(), names, strict=True))


@dataclass(frozen=True)
class ClassNames:
    """What people call classes: those of a file, else ImageNet's by their WordNet ids.

    Attributes:
        given: names by class.
        lines: names of a file without classes, with the numbers of their lines; see `of`.
        source: the file, for messages.

    Example:
        >>> ClassNames().shown("n02102040"), ClassNames().shown("cat")
        ('English springer (n02102040)', 'cat')
        >>> ClassNames({"cat": "Felis catus"}).shown("cat")
        'Felis catus (cat)'
    """

    given: Mapping[str, str] = field(default_factory=dict)
    lines: tuple[tuple[int, str], ...] = ()
    source: str = ""

    @classmethod
    def read(cls, path: Path | None) -> ClassNames:
        r"""Read a file of names.

        Either each line has a class and its name, separated by a tab, comma or semicolon (behind a
        WordNet id also by a space, as in ImageNet's LOC_synset_mapping.txt), or each line has a
        name, in the order of the classes. Empty lines are ignored.

        Args:
            path: of the file; None for ImageNet's names alone.

        Raises:
            DataError: the file cannot be read, a line has no name, or a class has two.
        """
        if path is None:
            return cls()
        lines = _read_lines(path)
        texts = [line for _, line in lines]
        if any("\t" in line for line in texts):
            pairs = [line.split("\t", 1) for line in texts]
        elif all(_ID_AND_NAME.match(line) for line in texts):
            pairs = [list(_ID_AND_NAME.findall(line)[0]) for line in texts]
        elif found := [sep for sep in ",;" if all(sep in line for line in texts)]:
            # Line by line: a quotation mark without another must not join lines.
            fields = (
                next(csv.reader([line], delimiter=found[0], skipinitialspace=True))
                for line in texts
            )
            pairs = [[first, f"{found[0]} ".join(rest)] for first, *rest in fields]
        else:
            return cls({}, tuple(lines), str(path))
        given: dict[str, str] = {}
        for (number, line), pair in zip(lines, pairs, strict=True):
            key, name = (pair[0].strip(), pair[1].strip()) if len(pair) == 2 else ("", "")
            if not key or not name:
                raise DataError(
                    f"{path}:{number}: expected a class, a tab or a comma, and its name, found "
                    f"{line!r}"
                )
            if key in given:
                raise DataError(f"{path}:{number}: {key} has a name already, {given[key]!r}")
            given[key] = name
        return cls(given, (), str(path))

    def of(self, classes: Sequence[str], *others: Sequence[str]) -> ClassNames:
        """Return the names with the classes that they are for.

        Args:
            classes: in the order of the names, where the file has names alone.
            others: further classes that the file may name.

        Raises:
            DataError: the file names another number of classes, or none of these.
        """
        if self.lines:
            # A list of names whose commas follow classes is one that lacks commas elsewhere.
            pairs = {line.partition(",")[0].strip() for _, line in self.lines if "," in line}
            lacking = next(((n, line) for n, line in self.lines if "," not in line), None)
            if lacking and pairs.intersection(classes):
                raise DataError(
                    f"{self.source}:{lacking[0]}: expected a class, a tab or a comma, and its "
                    f"name, found {lacking[1]!r}"
                )
            if len(self.lines) != len(classes):
                raise DataError(
                    f"{self.source}: expected a name for each of the "
                    f"{counted(len(classes), 'class')}, one per line in their order "
                    f"({few(classes)}), found {len(self.lines):,}; or write a class, a tab and its "
                    "name into each line"
                )
            names = (line for _, line in self.lines)
            return ClassNames(dict(zip(classes, names, strict=True)), (), self.source)
        if self.given and self.given.keys().isdisjoint({*classes, *(c for o in others for c in o)}):
            raise DataError(
                f"{self.source}: expected names of classes such as {few(classes)}, found only "
                f"{few(list(self.given))}"
            )
        return self

    def name(self, of: str) -> str | None:
        """Return the name of a class; None where nothing says it."""
        if (given := self.given.get(of)) is not None:
            return given
        return imagenet_names().get(of) if _ID.fullmatch(of) else None

    def parts(self, of: str) -> tuple[str, str]:
        """Return what may be shortened where a class is shown in a narrow line, and what follows.

        Example:
            >>> ClassNames().parts("n02102040"), ClassNames().parts("cat")
            (('English springer', ' (n02102040)'), ('cat', ''))
        """
        name = self.name(of)
        return (of, "") if name is None or name == of else (name, f" ({of})")

    def shown(self, of: str) -> str:
        """Return a class as people read it: its name, where it has one, with the class."""
        return "".join(self.parts(of))


#: The names that torchvision knows.
IMAGENET_NAMES: Final = ClassNames()


# --- which output is which class ----------------------------------------------------------------


@dataclass(frozen=True)
class Matching:
    """How the outputs of a network are matched with the classes of images.

    Attributes:
        class_map: names of the outputs, in their order; None for those that the weights name.
        source: the file that names them, for messages.
        all_classes: keep the logits of outputs that are none of the classes; otherwise they are
            left out, so that each prediction is one of the classes.
    """

    class_map: tuple[str, ...] | None = None
    source: str = ""
    all_classes: bool = False

    @classmethod
    def read(cls, path: Path | None, *, all_classes: bool = False) -> Matching:
        """Read a class map: a class per line, whose number is that of the output.

        What follows a WordNet id, as in ImageNet's LOC_synset_mapping.txt, is left out.

        Raises:
            DataError: the file cannot be read, or names a class twice.
        """
        if path is None:
            return cls(all_classes=all_classes)
        seen: dict[str, int] = {}
        for number, line in _read_lines(path):
            wordnet = _ID_AND_NAME.match(line)
            name = wordnet[1] if wordnet else line
            if name in seen:
                raise DataError(
                    f"{path}:{number}: expected class names, one per line and each once, found "
                    f"{name!r} also in line {seen[name]}"
                )
            seen[name] = number
        return cls(tuple(seen), str(path), all_classes)


#: The outputs that the weights name, and of those the classes alone.
AS_NAMED: Final = Matching()


def match_classes(wanted: Sequence[str], outputs: Sequence[str]) -> list[int | None]:
    """Return the output of each class; None where there is none, or more than one may be meant.

    Classes are matched by what they are called, and where only one side has WordNet ids by
    ImageNet's names, unless two classes share the name.

    Args:
        wanted: the classes, each once.
        outputs: names of the outputs, each once.

    Example:
        >>> match_classes(("n02102040", "n00000001"), imagenet_ids())
        [217, None]
        >>> match_classes(("english_springer", "n01440764"), imagenet_ids())
        [217, 0]
    """
    index = {name: i for i, name in enumerate(outputs)}
    matched = [index.get(name) for name in wanted]
    if None in matched:
        of_wanted, of_outputs = _wordnet_ids(wanted), _wordnet_ids(outputs)
        taken, asked, counts = set(matched), Counter(of_wanted), Counter(of_outputs)
        by_id = {wordnet: i for i, wordnet in enumerate(of_outputs)}
        for k, wordnet in enumerate(of_wanted):
            found = by_id.get(wordnet)
            once = wordnet is not None and asked[wordnet] == counts[wordnet] == 1
            if matched[k] is None and once and found not in taken:
                matched[k] = found
    return matched


def _wordnet_ids(classes: Sequence[str]) -> list[str | None]:
    """Return classes of ImageNet by their ids, or by their names where these mean one class.

    A name that two classes share means one of them where the other is there by its own name.
    """
    plain = [name.replace("_", " ") for name in classes]
    of: dict[str, str | None] = dict(_ids_by_name())
    for shared, pair in _SHARED.items():
        own = {imagenet_names()[wordnet]: wordnet for wordnet in pair}
        of[shared] = None
        if len(own) == 2 and own.keys() <= set(plain):
            of |= own
    return [
        name if _ID.fullmatch(name) else of.get(text, of.get(text.casefold()))
        for name, text in zip(classes, plain, strict=True)
    ]


@lru_cache
def _ids_by_name() -> Mapping[str, str]:
    names = {of: name.casefold() for of, name in imagenet_names().items()}
    counts = Counter(names.values())
    return {name: of for of, name in names.items() if counts[name] == 1}


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a file of names that are not empty, with their numbers from 1.

    Raises:
        DataError: the file cannot be read, or has none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected a text file of class names, found: {reason_of(error)}"
        ) from error
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: expected class names, one per line, found none")
    return lines
