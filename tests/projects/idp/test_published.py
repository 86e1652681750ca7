"""The paper's data sets in their published layouts, on tiny fabricated folders."""

import csv

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from projects.idp import data
from projects.idp.published import CHEST, LAYOUTS, index, mini_imagenet
from shared.errors import UserError


def image(file, value=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((9, 12, 3), value, np.uint8)).save(file)


def table(file, lines):
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def folders(place, classes, each=2):
    for name in classes:
        for n in range(each):
            image(place / name / f"{n}.jpg", 30 * n)


NAMES = [f"c{n:02d}" for n in range(9)]


@pytest.mark.parametrize(
    ("name", "below", "wanted"),
    [
        ("cub", "images", ["c03", "c07"]),
        ("places", "train", ["c03", "c07"]),
        ("eurosat", "2750", NAMES),
        ("cropdiseases", "train", NAMES),
    ],
)
def test_folders_of_classes(tmp_path, name, below, wanted):
    folders(tmp_path / name / below, NAMES)
    found = index(name, str(tmp_path))
    assert list(found.files) == wanted
    assert all(len(files) == 2 for files in found.files.values())


def test_plantae_takes_every_fourth_of_the_largest_species(tmp_path):
    folders(tmp_path / "plantae", [f"s{n:03d}" for n in range(198)], each=2)
    folders(tmp_path / "plantae", ["a", "b", "z1", "z2"], each=1)
    found = index("plantae", str(tmp_path))
    assert len(found.files) == 50
    assert "z2" not in found.files  # the last of the species with one image


def test_cars_by_their_annotations(tmp_path):
    place = tmp_path / "cars"
    entries = []
    for n in range(8):
        image(place / "car_ims" / f"{n:06d}.jpg")
        entries.append({"relative_im_path": f"car_ims/{n:06d}.jpg", "class": n + 1})
    savemat(place / "cars_annos.mat", {"annotations": entries})
    found = index("cars", str(tmp_path))
    assert {name: [f.name for f in files] for name, files in found.files.items()} == {
        "004": ["000003.jpg"],
        "008": ["000007.jpg"],
    }


def test_chest_images_with_one_finding_of_seven(tmp_path):
    place = tmp_path / "chestx"
    place.mkdir()
    findings = [CHEST[0], CHEST[3], f"{CHEST[0]}|{CHEST[3]}", "No Finding", CHEST[0]]
    table(
        place / "Data_Entry_2017.csv",
        [{"Image Index": f"{n}.png", "Finding Labels": one} for n, one in enumerate(findings)],
    )
    found = index("chestx", str(tmp_path)).files
    assert {name: [f.name for f in files] for name, files in found.items()} == {
        CHEST[0]: ["0.png", "4.png"],
        CHEST[3]: ["1.png"],
    }


def test_isic_by_its_columns(tmp_path):
    place = tmp_path / "isic"
    place.mkdir()
    table(
        place / "ISIC2018_Task3_Training_GroundTruth.csv",
        [
            {"image": "ISIC_1", "MEL": "0.0", "NV": "1.0"},
            {"image": "ISIC_2", "MEL": "1.0", "NV": "0.0"},
        ],
    )
    found = index("isic", str(tmp_path)).files
    assert list(found) == ["MEL", "NV"]
    assert found["NV"][0].name == "ISIC_1.jpg"


@pytest.mark.parametrize("layout", ["folders", "tables"])
def test_mini_imagenet_by_role_in_either_layout(tmp_path, layout):
    place = tmp_path / "mini-imagenet"
    for split, name in (("train", "n01"), ("val", "n02"), ("test", "n03")):
        if layout == "folders":
            folders(place / split, [name])
        else:
            image(place / "images" / f"{name}.jpg")
            table(place / f"{split}.csv", [{"filename": f"{name}.jpg", "label": name}])
    for role, name in (("base", "n01"), ("validation", "n02"), ("novel", "n03")):
        assert list(mini_imagenet(role, str(tmp_path)).files) == [name]


def test_a_target_is_read_at_its_size_and_capped(tmp_path):
    folders(tmp_path / "eurosat" / "2750", ["a", "b"], each=4)
    pool = data.target("eurosat", 3, 8, 0, [], str(tmp_path))
    assert pool.pixels.shape == (6, 3, 8, 8)
    assert pool.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_missing_is_one_line(tmp_path, name):
    with pytest.raises(UserError, match=r"--set root=FOLDER"):
        index(name, None)
    with pytest.raises(UserError, match="there is no folder"):
        index(name, str(tmp_path))
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"laid out as|holds no images"):
        index(name, str(tmp_path))
