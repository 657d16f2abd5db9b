from __future__ import annotations

import pytest

from anchorpatch.images.source import ImageSource, open_source
from tests.oddities import encoded, picture


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    data = tmp_path_factory.mktemp("small")
    for label in ("a", "b"):
        (data / "val" / label).mkdir(parents=True)
        for i in range(10):
            file = data / "val" / label / f"{i}.jpg"
            file.write_bytes(encoded(picture(60 + i, 50, i), "JPEG"))
    (data / "val" / "a" / "bad.jpg").write_bytes(b"no")
    return open_source(data, "val")
