"""The sets: what is measured on a digit, where a scene's digits are, what the tables of attributes
hold.
"""

import csv

import numpy as np
import pytest
import torch

from projects.sscbm import data, morphology
from projects.sscbm.data import ATTRIBUTES, attribute_table
from shared.data import cache
from shared.errors import UserError
from shared.vision.classes import CLASSES
from shared.vision.images import LabelledImages


def drawing(*lines):
    """An image of 0 and 1 from text, with an empty edge of two pixels."""
    ink = np.array([[letter == "#" for letter in line] for line in lines], dtype=np.float32)
    return np.pad(ink, 2)


LINE = drawing(*["...###..."] * 12)
RING = drawing("..#######..", ".#########.", "###.....###", "##.......##", "##.......##",
               "###.....###", ".#########.", "..#######..")  # fmt: skip
CROSS = drawing(*["....##...."] * 4, *["##########"] * 2, *["....##...."] * 4)


@pytest.mark.parametrize(("image", "holes", "ends"), [(LINE, 0, 2), (RING, 1, 0), (CROSS, 0, 4)])
def test_holes_and_ends_are_counted(image, holes, ends):
    found = morphology.measures(image[None])
    assert found["holes"].tolist() == [holes]
    assert found["ends"].tolist() == [ends]


def test_a_thinned_stroke_is_one_pixel_wide_and_in_one_piece():
    from scipy import ndimage

    for image in (LINE, RING, CROSS):
        thin = morphology.thinned(image[None] > 0.5)[0]
        assert not thin[image < 0.5].any()
        assert ndimage.label(thin, np.ones((3, 3)))[1] == 1
        blocks = thin[1:, 1:] & thin[:-1, 1:] & thin[1:, :-1] & thin[:-1, :-1]
        assert blocks.sum() <= 1  # at most where strokes cross


def test_thickness_slant_and_proportions_have_their_meaning():
    thick = drawing(*[".#####."] * 12)
    wide = np.pad(LINE, ((0, 0), (10, 10)))
    leaning = np.stack([np.roll(row, -n // 2) for n, row in enumerate(wide)])  # lower rows leftward
    found = morphology.measures(LINE[None])
    other = morphology.measures(thick[None])
    assert other["thickness"][0] > found["thickness"][0] > 2
    assert morphology.measures(leaning[None])["slant"][0] > 0.3
    assert morphology.measures(leaning[None, :, ::-1])["slant"][0] < -0.3
    assert abs(found["slant"][0]) < 1e-9
    assert found["proportions"][0] == 3 / 12


def test_each_group_has_one_concept_and_cuts_are_terciles():
    draw = np.random.default_rng(0)
    measured = {
        "holes": np.array([0.0, 1, 2, 5, 0, 0]),
        "ends": np.array([0.0, 1, 2, 3, 9, 1]),
        **{
            name: draw.permutation(6.0 * np.arange(6))
            for name in ("thickness", "slant", "proportions")
        },
    }
    concepts = morphology.concepts(measured, morphology.cuts(measured))
    assert concepts.shape == (6, len(morphology.NAMES))
    start = 0
    for group, names in morphology.GROUPS.items():
        part = concepts[:, start : start + len(names)]
        assert (part.sum(1) == 1).all()
        if group not in ("holes", "ends"):
            assert part.sum(0).tolist() == [2, 2, 2]
            assert part[measured[group].argmax()].tolist() == [0, 0, 1]
        start += len(names)
    assert concepts[3, 2] == 1  # five holes count as two
    assert concepts[4, 6] == 1  # nine ends count as three


def digits(n=60):
    """Images of one brightness a class, so that it can be seen which digit is where."""
    labels = torch.arange(n) % 10
    pixels = torch.zeros(n, 1, 28, 28, dtype=torch.uint8)
    pixels[:, :, 4:24, 4:24] = (20 + 20 * labels).byte()[:, None, None, None]
    return LabelledImages(pixels, labels, CLASSES["mnist"])


def test_a_scene_has_two_digits_where_it_says():
    scenes, places = data.scenes(digits(), 40, seed=0)
    assert scenes.pixels.shape == (40, 1, 32, 32)
    assert (scenes.concepts.sum(1) == 2).all()
    assert torch.equal(scenes.concepts > 0, places >= 0)
    for row in range(40):
        present = (places[row] >= 0).nonzero().squeeze(1).tolist()
        assert scenes.classes[int(scenes.labels[row])] == CLASSES["mnist"][max(present)]
        for quadrant in range(4):
            top, left = 16 * (quadrant // 2), 16 * (quadrant % 2)
            seen = scenes.pixels[row, 0, top : top + 16, left : left + 16].unique().tolist()
            wanted = [20 + 20 * d for d in present if int(places[row, d]) == quadrant] or [0]
            assert seen == wanted


def test_scenes_without_some_digit_are_refused():
    with pytest.raises(UserError, match="not all ten digits"):
        data.scenes(digits(9), 4, seed=0)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_the_attributes_tell_the_classes_apart_and_doubts_have_reasons(name):
    names, classes, table = attribute_table(ATTRIBUTES / f"{name}.csv")
    assert set(classes) == set(CLASSES[name])
    assert table.shape == (10, len(names))
    assert len(set(names)) == len(names) >= 20
    assert (table.any(0) & ~table.all(0)).all()
    with open(ATTRIBUTES / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["note"]) for row in rows) >= 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attribute,a,b,note\nx,1,2,\n", "are 0 or 1"),
        ("attribute,a,b,note\nx,1,1,\n", "two classes have the same attributes"),
    ],
)
def test_a_wrong_table_of_attributes_is_refused(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        attribute_table(tmp_path / "table.csv")


def test_pixels_are_their_own_features_and_maps():
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 1, 3, 4)
    found = data.frozen(images, "pixels")
    assert torch.equal(found.maps, images / 255)
    assert torch.equal(found.features, found.maps.view(2, 12))


def test_the_frozen_network_sees_grey_as_three_equal_channels_and_in_any_batch():
    if not cache.is_complete("efficientnet-lite0"):
        pytest.skip("efficientnet-lite0 is not in the data cache")
    grey = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = data.frozen(grey, "efficientnet-lite0")
    assert found.features.shape == (3, 1280)
    assert found.maps.shape == (3, 112, 4, 4)
    colour = data.frozen(grey.expand(-1, 3, -1, -1), "efficientnet-lite0", batch=2)
    assert torch.allclose(found.features, colour.features, atol=1e-4)
    assert torch.allclose(found.maps, colour.maps, atol=1e-4)


@pytest.mark.parametrize("name", ["fashion", "cifar10", "strokes", "scenes"])
def test_a_set_is_the_same_at_every_call_and_its_parts_differ(name):
    for needed in {"fashion": ["fashion-mnist"], "cifar10": ["cifar10"]}.get(name, ["mnist"]):
        if not cache.is_complete(needed):
            pytest.skip(f"{needed} is not in the data cache")
    first, again = (data.load(name, 30, 20) for _ in range(2))
    assert torch.equal(first.pool.pixels, again.pool.pixels)
    assert torch.equal(first.test.concepts, again.test.concepts)
    assert (len(first.pool), len(first.test)) == (30, 20)
    assert not first.pool.concepts.isnan().any()
    columns = sorted(column for group in first.groups for column in group)
    assert columns == list(range(first.pool.concepts.shape[1]))
    shown = {one.numpy().tobytes() for one in first.pool.pixels}
    assert not shown & {one.numpy().tobytes() for one in first.test.pixels}
