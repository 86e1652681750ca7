"""The paper's data sets, from tiny folders of their published layout; what is missing is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from projects.sscbm.folders import DERM7PT_COLUMNS, LOADERS, WBCATT_COLUMNS
from shared.errors import UserError


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((9, 7, 3), shade, dtype=np.uint8)).save(path)


@pytest.fixture
def cub(tmp_path):
    """Four images of two classes; three attributes, of which the second holds for no class."""
    root = tmp_path / "CUB_200_2011"
    files = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auklet/c.jpg", "002.Auklet/d.jpg"]
    for number, file in enumerate(files):
        picture(root / "images" / file, 10 * number)
    ids = range(1, 5)
    texts = {
        "images.txt": [f"{i} {file}" for i, file in zip(ids, files, strict=True)],
        "image_class_labels.txt": ["1 1", "2 1", "3 2", "4 2"],
        "train_test_split.txt": ["1 1", "2 0", "3 1", "4 0"],
        "classes.txt": ["1 001.Albatross", "2 002.Auklet"],
        "attributes.txt": ["1 bill::hooked", "2 bill::curved (up)", "3 wing::grey"],
    }
    present = {1: "100", 2: "001", 3: "001", 4: "100"}
    (root / "attributes").mkdir()
    (root / "attributes" / "image_attribute_labels.txt").write_text(
        "\n".join(f"{i} {a + 1} {present[i][a]} 3 1.0" for i in ids for a in range(3))
    )
    for name, lines in texts.items():
        (root / name).write_text("\n".join(lines))
    return root


def test_cub_by_class_is_what_most_training_images_of_the_class_have(cub):
    train, test, groups = LOADERS["cub"](cub, 8)
    assert train.concept_names == ("bill:hooked", "wing:grey")  # held by no class: left out
    assert groups == ((0,), (1,))
    assert train.concepts.tolist() == [[1, 0], [0, 1]]
    assert test.concepts.tolist() == [[1, 0], [0, 1]]  # of their classes
    assert test.labels.tolist() == [0, 1]
    assert test.pixels.shape == (2, 3, 8, 8)
    assert [int(one.float().mean().round()) for one in test.pixels] == [10, 30]


def test_cub_by_image_is_what_is_annotated_on_it(cub):
    _, test, _ = LOADERS["cub-images"](cub, 8)
    assert test.concepts.tolist() == [[0, 1], [1, 0]]


@pytest.fixture
def awa2(tmp_path):
    for name, shade in (("antelope", 10), ("bear", 200)):
        for number in range(5):
            picture(tmp_path / "JPEGImages" / name / f"{name}_{number}.jpg", shade)
    (tmp_path / "classes.txt").write_text(" 1\tantelope\n 2\tbear\n")
    (tmp_path / "predicates.txt").write_text(" 1\tblack\n 2\thooves\n 3\tfierce\n")
    (tmp_path / "predicate-matrix-binary.txt").write_text("0 1 0\n1 0 1\n")
    return tmp_path


def test_awa2_has_its_classes_predicates_and_a_tenth_for_the_test(awa2):
    train, test, groups = LOADERS["awa2"](awa2, 8)
    assert (len(train), len(test)) == (8, 1)
    table = torch.tensor([[0.0, 1, 0], [1, 0, 1]])
    assert torch.equal(train.concepts, table[train.labels])
    bright = train.pixels.float().mean((1, 2, 3)) > 100
    assert torch.equal(bright, train.labels == 1)
    assert not set(train.ids) & set(test.ids)
    assert len(groups) == 3


@pytest.fixture
def derm7pt(tmp_path):
    rows = [
        ("clark nevus", "a.jpg", "absent"),
        ("melanoma (in situ)", "b.jpg", "typical"),
        ("lentigo", "c.jpg", "absent"),
    ]
    lines = [",".join(["diagnosis", "derm", *DERM7PT_COLUMNS])]
    for diagnosis, file, answer in rows:
        picture(tmp_path / "images" / file, 50)
        lines.append(",".join([diagnosis, file, answer, *["absent"] * 6]))
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "meta.csv").write_text("\n".join(lines))
    (tmp_path / "meta" / "train_indexes.csv").write_text("indexes\n0\n1\n")
    (tmp_path / "meta" / "test_indexes.csv").write_text("indexes\n2\n")
    return tmp_path


def test_derm7pt_has_a_concept_for_each_answer_and_five_classes(derm7pt):
    train, test, groups = LOADERS["derm7pt"](derm7pt, 8)
    assert [train.classes[label] for label in [*train.labels, *test.labels]] == [
        "NEV",
        "MEL",
        "MISC",
    ]
    assert train.concept_names[:2] == ("pigment_network:absent", "pigment_network:typical")
    assert train.concepts[:, :2].tolist() == [[1, 0], [0, 1]]
    assert len(groups) == 7
    assert groups[0] == (0, 1)


@pytest.fixture
def wbcatt(tmp_path):
    for part, names in (("train", ["x.jpg", "y.jpg"]), ("test", ["z.jpg"])):
        lines = [",".join(["img_name", "label", *WBCATT_COLUMNS])]
        for number, name in enumerate(names):
            picture(tmp_path / "PBC" / "deep" / name, 99)
            size = ("big", "small")[number]
            lines.append(",".join([name, f"cell {number}", size, *["round"] * 10]))
        (tmp_path / f"pbc_attr_v1_{part}.csv").write_text("\n".join(lines))
    return tmp_path


def test_wbcatt_finds_its_images_wherever_they_lie(wbcatt):
    train, test, groups = LOADERS["wbcatt"](wbcatt, 8)
    assert train.classes == ("cell 0", "cell 1")
    assert train.concept_names[:2] == ("cell_size:big", "cell_size:small")
    assert train.concepts[:, :2].tolist() == [[1, 0], [0, 1]]
    assert test.concepts[:, :2].tolist() == [[1, 0]]
    assert len(groups) == 11


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cub", "images.txt"),
        ("cub", "attributes/image_attribute_labels.txt"),
        ("cub", "images/002.Auklet/c.jpg"),
        ("awa2", "predicates.txt"),
        ("derm7pt", "meta/test_indexes.csv"),
        ("derm7pt", "images/b.jpg"),
        ("wbcatt", "pbc_attr_v1_test.csv"),
        ("wbcatt", "PBC/deep/y.jpg"),
    ],
)
def test_what_is_missing_is_named(name, file, request):
    root = request.getfixturevalue(name)
    (root / file).unlink()
    with pytest.raises(UserError, match=file.split("/")[-1]):
        LOADERS[name](root, 8)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("cub", "image_class_labels.txt", "1 1\n9 1\n", "line 2: no image '9'"),
        ("cub", "train_test_split.txt", "1 1\n", "says nothing of image 2"),
        ("cub", "attributes/image_attribute_labels.txt", "1 one 1\n", "line 1: not 'IMAGE"),
        ("awa2", "predicate-matrix-binary.txt", "0 1\n1 0\n", r"\[2, 2\] numbers for 2 classes"),
        ("awa2", "predicate-matrix-binary.txt", "0 x 1\n", "not a matrix"),
        ("derm7pt", "meta/test_indexes.csv", "indexes\n7\n", "an index that is none"),
        ("derm7pt", "meta/meta.csv", "diagnosis\nx\n", "has no column 'derm'"),
    ],
)  # fmt: skip
def test_what_is_not_as_published_is_refused(name, file, text, message, request):
    root = request.getfixturevalue(name)
    (root / file).write_text(text)
    with pytest.raises(UserError, match=message):
        LOADERS[name](root, 8)
