"""The container, the sets of the catalogue by their one name, and folders of the reader's."""

from itertools import chain

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from shared.data import loaders
from shared.errors import UserError
from shared.vision import images
from shared.vision.images import LabelledImages, folder, load, synthetic


def told_apart(n: int = 12, classes: int = 3) -> LabelledImages:
    """Image i is of value i everywhere, of class i mod classes, its only concept i / 10."""
    rows = torch.arange(n)
    return LabelledImages(
        rows.to(torch.uint8)[:, None, None, None].expand(n, 3, 2, 2).contiguous(),
        rows % classes,
        tuple("abcdef"[:classes]),
        (rows / 10).unsqueeze(1),
        ("size",),
        tuple(map(str, range(n))),
    )


def numbers(data: LabelledImages) -> list[int]:
    """Which images of `told_apart` they are; all columns agree about it."""
    rows = data.pixels[:, 0, 0, 0].tolist()
    assert data.ids == tuple(map(str, rows))
    assert data.concepts[:, 0].tolist() == pytest.approx([row / 10 for row in rows])
    return rows


# ---- the container -------------------------------------------------------------------------------


def test_every_column_goes_with_its_image():
    data = told_apart()
    for rows in ([5, 0, 7], torch.tensor([5, 0, 7]), np.array([5, 0, 7])):
        assert numbers(data.pick(rows)) == [5, 0, 7]
        assert data.pick(rows).labels.tolist() == [2, 0, 1]
    assert numbers(data.pick(slice(2, 4))) == [2, 3]
    assert len(data.pick([])) == 0


def test_images_go_from_0_to_1_and_are_exact():
    data = told_apart(256, 2)
    assert data.images().dtype == torch.float32
    assert torch.equal(data.images(torch.float64)[:, 0, 0, 0], torch.arange(256).double() / 255)
    deep = LabelledImages(torch.full((1, 1, 2, 2), 0.25), torch.tensor([0]), ("a",))
    assert torch.equal(deep.images(), deep.pixels)


def test_pictures_have_their_channels_last():
    data = LabelledImages(
        torch.arange(24, dtype=torch.uint8).view(1, 3, 2, 4), torch.tensor([0]), ("a",)
    )
    assert data.pictures()[0, 1, 2].tolist() == data.pixels[0, :, 1, 2].tolist() == [6, 14, 22]
    grey = LabelledImages(data.pixels[:, :1], data.labels, data.classes)
    assert torch.equal(grey.pictures()[0], grey.pixels[0, 0])


def test_parts_are_disjoint_and_of_the_seed():
    parts = told_apart().split(5, 4, 3, seed=1)
    assert [len(part) for part in parts] == [5, 4, 3]
    assert sorted(chain(*map(numbers, parts))) == list(range(12))
    assert [numbers(part) for part in told_apart().split(5, 4, 3, seed=1)] == [*map(numbers, parts)]
    assert numbers(told_apart().split(5, seed=2)[0]) != numbers(parts[0])
    with pytest.raises(UserError, match="13 images were asked for; there are 12"):
        told_apart().split(12, 1, seed=0)


def test_as_many_of_each_class():
    assert numbers(told_apart().per_class(2)) == [0, 3, 1, 4, 2, 5]
    drawn = told_apart().per_class(2, seed=3)
    assert drawn.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert numbers(drawn) == numbers(told_apart().per_class(2, seed=3)) != [0, 3, 1, 4, 2, 5]
    assert len(told_apart().per_class(9)) == 12


def test_some_classes_are_numbered_anew():
    some = told_apart().of_classes(["c", "a"])
    assert some.classes == ("c", "a")
    assert numbers(some) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert some.labels.tolist() == [1, 0] * 4
    with pytest.raises(UserError, match="no class 'z' among a, b, c"):
        told_apart().of_classes(["z"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"pixels": torch.zeros(2, 3, 3)}, "n, channels, height, width"),
        ({"pixels": torch.zeros(2, 1, 3, 3, dtype=torch.float64)}, "uint8 or float32"),
        ({"labels": torch.tensor([0, 2])}, "labels from 0 to 2"),
        ({"labels": torch.tensor([0])}, "2 images and 1 labels"),
        ({"ids": ("x",)}, "2 images and 1 ids"),
        ({"concepts": torch.zeros(2, 3), "concept_names": ("one",)}, "1 concept names"),
    ],
)
def test_columns_that_do_not_fit_are_refused(change, line):
    whole = {
        "pixels": torch.zeros(2, 1, 3, 3),
        "labels": torch.tensor([0, 1]),
        "classes": ("a", "b"),
    }
    LabelledImages(**whole)
    with pytest.raises(UserError, match=line):
        LabelledImages(**{**whole, **change})


def test_resizing_keeps_the_middle():
    data = told_apart()
    assert data.resized(2) is data
    assert data.resized(6).pixels.shape == (12, 3, 6, 6)
    assert numbers(data.resized(6)) == list(range(12))
    wide = torch.zeros(1, 1, 4, 8)
    wide[..., 2:6] = 1
    deep = LabelledImages(wide, torch.tensor([0]), ("a",)).resized(4)
    assert deep.pixels.shape == (1, 1, 4, 4)
    assert (deep.pixels == 1).all()


# ---- the catalogue -------------------------------------------------------------------------------


@pytest.fixture
def sets(monkeypatch, tmp_path):
    """Every loader of arrays, with small sets whose values tell the images apart."""
    grey = np.arange(40, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(6, 2)
    labels = np.arange(40) % 10
    both = loaders.Labelled(grey, labels, grey + 100, labels)
    colour = np.stack([grey, grey + 1, grey + 2], -1)
    for name in ("mnist", "fashion_mnist"):
        monkeypatch.setattr(loaders, name, lambda: both)
    monkeypatch.setattr(
        loaders, "cifar10", lambda: loaders.Labelled(colour, labels, colour, labels)
    )
    monkeypatch.setattr(loaders, "digits", lambda: ((grey % 17)[:, :, :4], labels))
    names = ["bee", "cat", "dog"]
    monkeypatch.setattr(
        loaders,
        "quickdraw",
        lambda classes: (
            np.array([names.index(name) / 4 for name in classes or names], np.float32)[
                :, None, None, None
            ]
            .repeat(5, 1)
            .repeat(4, 2)
            .repeat(4, 3),
            list(classes or names),
        ),
    )
    rgba = np.zeros((4, 4, 4, 4), np.uint8)
    rgba[..., 3] = np.array([255, 255, 255, 0])[:, None, None]
    table = pd.DataFrame(
        {
            "name": ["cat", "flag", "hair", "fir"],
            "category": ["Animals", "Flags", "Component", "Plants"],
            "subcategory": ["mammal", "country", "hair", "tree"],
        }
    )
    monkeypatch.setattr(loaders, "emoji", lambda vendor: (rgba, table))
    # of its own, so that what `_parts` keeps is of this test
    monkeypatch.setattr(images, "cached", lambda name: tmp_path / name)


@pytest.mark.parametrize("name", sorted(images._READERS))
def test_every_set_is_pixels_labels_and_names(sets, name):
    data = load(name, split="train" if name in images._OFFICIAL else "all")
    assert data.pixels.shape[:2] == (
        len(data),
        3 if name in ("cifar10", "synthetic") or name.startswith("emoji") else 1,
    )
    assert 0 <= float(data.images().min()) <= float(data.images().max()) <= 1
    assert set(data.labels.tolist()) == set(range(len(data.classes)))
    with pytest.raises(UserError, match=f"{name} has no part 'valid'; it has"):
        load(name, split="valid")


def test_the_test_part_is_another(sets):
    assert load("mnist").pixels[0].unique().tolist() == [0]
    assert load("mnist", split="test").pixels[0].unique().tolist() == [100]


def test_colour_is_channel_by_channel(sets):
    assert load("cifar10").pixels[7, :, 0, 0].tolist() == [7, 8, 9]


def test_the_seed_draws_and_no_seed_takes_the_first(sets):
    def rows(**options):
        return load("mnist", **options).pixels[:, 0, 0, 0].tolist()

    assert rows(n=5) == [0, 1, 2, 3, 4]
    assert rows() == list(range(40))
    assert sorted(rows(seed=1)) == list(range(40)) != rows(seed=1)
    assert rows(n=5, seed=1) == rows(seed=1)[:5] != rows(n=5, seed=2)
    with pytest.raises(UserError, match="mnist has 40 images in 'train'; 41 were asked for"):
        load("mnist", 41)


def test_some_classes_and_another_size(sets):
    some = load("mnist", classes=["nine", "two"], size=8)
    assert some.classes == ("nine", "two")
    assert some.pixels.shape == (8, 1, 8, 8)
    assert some.pixels[:, 0, 0, 0].tolist() == [2, 9, 12, 19, 22, 29, 32, 39]
    drawn = load("quickdraw", split="all", classes=["dog", "bee"])
    assert drawn.pixels[:, 0, 0, 0].tolist() == [0.5] * 5 + [0.0] * 5
    assert drawn.labels.tolist() == [0] * 5 + [1] * 5


def test_digits_fill_their_range(sets):
    assert torch.equal(load("digits", split="all").pixels[:17, 0, 0, 0], torch.arange(17) / 16)


def test_emoji_lie_on_white_without_flags(sets):
    data = load("emoji", split="all")
    assert data.ids == ("cat", "fir")
    assert [data.classes[label] for label in data.labels] == ["mammal", "tree"]
    assert data.pixels[:, :, 0, 0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_a_name_that_is_none():
    with pytest.raises(
        UserError, match="no images 'fashion_mnist'; there are mnist, fashion-mnist"
    ):
        load("fashion_mnist")


def test_synthetic_images_are_of_their_seed_and_class():
    data = synthetic(200, 4, size=8, seed=1)
    assert torch.equal(data.pixels, synthetic(200, 4, size=8, seed=1).pixels)
    assert not torch.equal(data.pixels, synthetic(200, 4, size=8, seed=2).pixels)
    flat = data.images().flatten(1)
    means = torch.stack([flat[data.labels == label].mean(0) for label in range(4)])
    assert float((torch.cdist(flat, means).argmin(1) == data.labels).float().mean()) > 0.95


# ---- folders -------------------------------------------------------------------------------------


@pytest.fixture
def classes(tmp_path):
    for name, value in (("cat", 50), ("bird", 100)):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("L", (4, 3), value + number).save(tmp_path / name / f"{number}.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_a_folder_a_class(classes):
    data = folder(classes)
    assert data.classes == ("bird", "cat")
    assert data.ids == ("bird/0.png", "bird/1.png", "cat/0.png", "cat/1.png")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.pixels[:, 0, 0, 0].tolist() == [100, 101, 50, 51]
    assert data.pixels.shape == (4, 1, 3, 4)
    assert folder(classes, mode="RGB", size=6).pixels.shape == (4, 3, 6, 6)


def test_a_folder_with_the_labels_of_another(classes):
    data = folder(classes, classes=("dog", "cat", "bird"))
    assert data.labels.tolist() == [2, 2, 1, 1]
    with pytest.raises(UserError, match="no class 'bird' among cat"):
        folder(classes, classes=("cat",))


def test_images_that_differ_are_refused(classes):
    Image.new("L", (5, 3)).save(classes / "cat" / "2.png")
    with pytest.raises(UserError, match=r"2\.png is of shape \[1, 3, 5\]"):
        folder(classes)
    assert len(folder(classes, size=4)) == 5
    (classes / "cat" / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2\.png is no image"):
        folder(classes)


def test_sixteen_bits_beside_eight(classes):
    Image.fromarray(np.full((3, 4), 65535, np.uint16)).save(classes / "cat" / "2.png")
    found = folder(classes).pixels[:, 0, 0, 0]
    assert found.tolist() == pytest.approx([100 / 255, 101 / 255, 50 / 255, 51 / 255, 1])


def test_a_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        folder(tmp_path)
