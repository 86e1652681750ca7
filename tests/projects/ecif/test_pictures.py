"""Picture sets: torchvision's own layout, what is wrong with a folder in one line, splits."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from projects.ecif import pictures
from projects.ecif.pictures import TORCHVISION, load
from shared.errors import UserError
from shared.vision.images import LabelledImages


@pytest.mark.parametrize("source", TORCHVISION)
def test_a_set_that_is_not_there_is_one_line(source, tmp_path):
    below, kind = TORCHVISION[source].below, TORCHVISION[source].kind
    with pytest.raises(
        UserError,
        match=(
            rf"there is no {tmp_path / below}: set `folder` to one that holds {below}/ as"
            rf" torchvision's {kind}"
        ),
    ):
        load(source, str(tmp_path), 4, 2, 2, 8, 0)
    if source != "cifar10":  # which is the catalogue's without a folder
        with pytest.raises(UserError, match=f"there is no {below}: set `folder`"):
            load(source, None, 4, 2, 2, 8, 0)
    (tmp_path / below).mkdir()
    with pytest.raises(UserError, match="is not as torchvision's") as error:
        load(source, str(tmp_path), 4, 2, 2, 8, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", TORCHVISION)
def test_torchvision_has_the_set_under_that_folder_and_with_those_parts(source):
    layout = TORCHVISION[source]
    kind = getattr(datasets, layout.kind)
    assert layout.below in inspect.getsource(kind)
    known = inspect.signature(kind).parameters
    for part in (*layout.train, layout.test):
        assert part.keys() <= known.keys()
        assert layout.test not in layout.train


@pytest.fixture
def imagenette(tmp_path):
    """Two classes of three sizes in torchvision's layout; the red channel tells the picture, the
    green one the part.
    """
    for part, green in (("train", 50), ("val", 200)):
        for label, wnid in enumerate(("n01440764", "n03028079")):
            folder = tmp_path / "imagenette2" / part / wnid
            folder.mkdir(parents=True)
            for number, shape in enumerate(((10, 10), (31, 10), (12, 25))):
                Image.fromarray(
                    np.full((*shape, 3), (40 * number + 120 * label, green, 0), np.uint8)
                ).save(folder / f"{number}.png")
                (folder / f"{number}.png").rename(folder / f"{number}.JPEG")
    return str(tmp_path)


def test_a_set_of_torchvision_keeps_its_own_test_part(imagenette):
    found = load("imagenette", imagenette, None, 2, None, 8, 0)
    assert found.classes == ("tench", "church")
    assert [len(part) for part in (found.train, found.validation, found.test)] == [4, 2, 6]
    for part, green in ((found.train, 50), (found.validation, 50), (found.test, 200)):
        assert part.pixels.shape[1:] == (3, 8, 8)
        assert (part.pixels[:, 1] == green).all()
        assert torch.equal(part.pixels[:, 0, 0, 0] >= 120, part.labels == 1)
    reds = torch.cat([found.train.pixels, found.validation.pixels])[:, 0, 0, 0]
    assert sorted(reds.tolist()) == [0, 40, 80, 120, 160, 200]
    again = load("imagenette", imagenette, 3, 2, 4, 8, 0)
    assert torch.equal(again.train.pixels, found.train.pixels[:3])
    assert len(again.test) == 4
    assert (
        len(
            {
                tuple(
                    load("imagenette", imagenette, None, 2, None, 8, seed)
                    .validation.pixels[:, 0, 0, 0]
                    .tolist()
                )
                for seed in range(5)
            }
        )
        > 1
    )


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ((5, 2, 2), "5 were asked for"),
        ((1, 7, 2), "validation pictures"),
        ((4, 2, 7), "6 test pictures"),
    ],
)
def test_a_set_that_is_too_small_is_refused(imagenette, wanted, part):
    with pytest.raises(UserError, match=part):
        load("imagenette", imagenette, *wanted, 8, 0)


def test_a_picture_is_prepared_as_clips_are(imagenette, tmp_path):
    """By torchvision's own steps, of a picture that is not square, in grey."""
    file = tmp_path / "imagenette2" / "train" / "n01440764" / "0.JPEG"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 9), dtype=np.uint8)).save(
        file, "PNG"
    )
    steps = transforms.Compose(
        [
            transforms.Resize(8, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(8),
            transforms.PILToTensor(),
        ]
    )
    found = load("imagenette", imagenette, None, 1, None, 8, 0)
    wanted = steps(Image.open(file).convert("RGB"))
    pixels = torch.cat([found.train.pixels, found.validation.pixels])
    assert (pixels == wanted).flatten(1).all(1).sum() == 1


def test_a_set_without_a_test_part_is_split():
    found = load("synthetic", None, 30, 10, 20, 8, 0)
    rows = torch.cat(
        [part.pixels.flatten(1) for part in (found.train, found.validation, found.test)]
    )
    assert len(rows.unique(dim=0)) == 60  # noise tells pictures apart
    assert found.train.labels.unique().numel() == 8
    with pytest.raises(UserError, match="set `test` to a number"):
        load("synthetic", None, 30, 10, None, 8, 0)
    with pytest.raises(UserError, match="asked for"):
        load("synthetic", None, 4096, 10, 20, 8, 0)


def test_pictures_of_a_class_are_alike():
    found = load("synthetic", None, 200, 10, 20, 8, 0).train
    flat = found.pixels.flatten(1).double()
    means = torch.stack([flat[found.labels == label].mean(0) for label in range(8)])
    assert float((torch.cdist(flat, means).argmin(1) == found.labels).double().mean()) > 0.95


def test_emoji_are_of_their_sub_category(monkeypatch):
    whole = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 4, 4)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    emoji = LabelledImages(whole.contiguous(), labels, ("cat-face", "plant"))
    monkeypatch.setattr(pictures.vision, "load", lambda name, split: emoji)
    found = load("emoji", None, 2, 2, 2, 4, 0)
    assert found.classes == ("cat face", "plant")
    for part in (found.train, found.validation, found.test):
        assert [int(labels[int(image.max())]) for image in part.pixels] == part.labels.tolist()


def test_drawings_held_out_are_of_other_classes(monkeypatch):
    names = [f"class {number:02d}" for number in range(30)]
    monkeypatch.setattr(pictures.vision, "quickdraw_classes", lambda: names)
    held, rest = pictures.quickdraw_classes()
    assert (len(held), len(rest)) == (20, 10)
    assert sorted(held + rest) == names

    def drawn(name, split, classes):
        return LabelledImages(
            torch.full((3 * len(classes), 1, 28, 28), 0.5),
            torch.arange(len(classes)).repeat_interleave(3),
            tuple(classes),
        )

    monkeypatch.setattr(pictures.vision, "load", drawn)
    found = load("quickdraw", None, 40, 10, 10, 28, 0)
    assert found.classes == tuple(held)
    assert found.train.pixels.unique().tolist() == [128]
