"""The sets are those of the catalogue, by its names."""

import pytest

from shared.data import catalogue
from shared.errors import UserError
from shared.vision import images
from shared.vision.classes import CLASSES


def test_every_set_is_in_the_catalogue_by_that_name():
    assert set(images._READERS) - set(catalogue.catalogue()) == {"synthetic"}
    assert set(CLASSES) <= set(images._READERS)


@pytest.mark.parametrize("name", sorted(set(images._READERS) - {"synthetic"}))
def test_a_set_that_is_not_there_says_what_to_fetch(monkeypatch, tmp_path, name):
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"repro data fetch {name}"):
        images.load(name, split="train" if name in images._OFFICIAL else "all")
