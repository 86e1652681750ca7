"""What is wrong with a user's input is one line and exit status 2, or handled and counted."""

import csv
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sscbm_problems import SMALL, make_folder, read_csv

from projects.sscbm.annotations import read_annotations, read_images, split
from projects.sscbm.command import main
from shared.errors import UserError
from shared.paths import ROOT
from shared.vision.images import LabelledImages


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "bars", n=16, annotated=8)


def rows_of(folder):
    return read_csv(folder / "concepts.csv")


def write(folder, rows):
    with open(folder / "concepts.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def train(folder, *options):
    arguments = ["train", "--images", folder / "images", "--annotations", folder / "concepts.csv"]
    return main([*map(str, arguments), "--out", str(folder / "model"), *SMALL, *options])


def refused(capsys, status):
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("sscbm: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def no_such_image(rows):
    rows[3][0] = "absent.png"


def outside(rows):
    rows[3][0] = "../concepts.csv"


def another_value(rows):
    rows[4][3] = "yes"


def half(rows):
    rows[4][4] = "0.5"


def short_line(rows):
    del rows[2][-1]


def no_class(rows):
    rows[2][1] = " "


def one_class(rows):
    for row in rows[1:]:
        row[1] = "bar"


def nothing_annotated(rows):
    for row in rows[1:]:
        row[2:] = ["", "", ""]


def a_concept_without(rows):
    for row in rows[1:]:
        row[4] = ""


def wrong_header(rows):
    rows[0][0] = "path"


def no_concept(rows):
    for row in rows:
        del row[2:]


def two_columns(rows):
    rows[0][4] = "way:lying"


def contradiction(rows):
    rows.append([*rows[1][:4], "1" if rows[1][4] == "0" else "0"])


def empty(rows):
    rows.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_such_image, "there is no image 'absent.png' in"),
        (outside, "lies outside"),
        (another_value, "line 5: 'way:lying' is 'yes'; write 1, 0, or nothing"),
        (half, "line 5: 'thick' is '0.5'"),
        (short_line, "line 3: 4 cells; the header has 5"),
        (no_class, "line 3: file or class is empty"),
        (one_class, "has 1 class; a model that tells classes apart needs two"),
        (nothing_annotated, "no image has a concept annotated"),
        (a_concept_without, "'thick' is annotated for no image"),
        (wrong_header, "the first line must be file,class,CONCEPT"),
        (no_concept, "names no concept"),
        (two_columns, "the concept 'lying' has two columns"),
        (contradiction, "'00.png' stands in line 2 with other values"),
        (empty, "the first line must be file,class"),
    ],
)
def test_a_wrong_csv_is_refused_with_its_line(folder, capsys, change, message):
    rows = rows_of(folder)
    right = [list(row) for row in rows]
    change(rows)
    write(folder, rows)
    assert message in refused(capsys, train(folder))
    assert not (folder / "model").exists()
    write(folder, right)  # the corrected command works in the same folder
    assert train(folder, "--epochs", "1") == 0


@pytest.mark.parametrize("cut", [0, 30])
def test_a_corrupt_image_is_named(folder, capsys, cut):
    image = folder / "images" / "03.png"
    image.write_bytes(image.read_bytes()[:cut])
    assert "03.png is no image that can be read" in refused(capsys, train(folder))


def test_folders_and_files_that_are_not_there_are_named(folder, tmp_path, capsys):
    arguments = ["train", "--images", tmp_path / "none", "--annotations", folder / "concepts.csv"]
    assert "none is no folder" in refused(
        capsys, main([*map(str, arguments), "--out", str(tmp_path / "out"), *SMALL])
    )
    (folder / "concepts.csv").unlink()
    assert "No such file" in refused(capsys, train(folder))


def test_images_of_all_modes_and_sizes_are_brought_to_one_and_counted(folder):
    draw = np.random.default_rng(0)
    files = [folder / "images" / f"{number:02d}.png" for number in range(6)]
    colour = Image.fromarray(draw.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    colour.convert("RGBA").save(files[0])
    colour.convert("P").save(files[1])
    colour.convert("CMYK").save(files[2].with_suffix(".jpg"))
    files[2].unlink()
    files[2].with_suffix(".jpg").rename(files[2])  # the content counts, not the name
    Image.fromarray(draw.integers(0, 65536, (16, 16)).astype(np.uint16)).save(files[3])
    colour.convert("1").save(files[4])
    annotations = read_annotations(folder / "concepts.csv")
    for mode, channels in (("RGB", 3), ("L", 1)):
        images, reading = read_images(folder / "images", annotations, mode, 16)
        assert images.pixels.shape == (16, channels, 16, 16)
        assert images.pixels.dtype == torch.float32  # for the one of 16 bits
        assert 0 <= float(images.pixels.min()) <= float(images.pixels.max()) <= 1
        assert reading.modes == {"RGBA": 1, "P": 1, "CMYK": 1, "I;16": 1, "1": 1, "L": 11}
        assert reading.cropped == 4
        assert reading.resized == 15


def test_repeated_lines_are_counted_and_a_byte_order_mark_is_no_matter(folder, capsys):
    rows = rows_of(folder)
    write(folder, [*rows, rows[1], [], rows[2]])
    text = (folder / "concepts.csv").read_text()
    (folder / "concepts.csv").write_text(text, encoding="utf-8-sig")
    found = read_annotations(folder / "concepts.csv")
    assert found.repeated == 2
    assert len(found.files) == 16
    assert found.groups == ((0, 1), (2,))
    assert found.names == ("upright", "lying", "thick")
    assert train(folder, "--epochs", "1") == 0
    assert "2 lines of the CSV said something again" in capsys.readouterr().err.replace("\n", " ")


def test_a_class_without_an_annotated_image_is_told(folder, capsys):
    rows = rows_of(folder)
    for row in rows[1:]:
        if row[1] == "stripe":
            row[2:] = ["", "", ""]
    rows[1][2] = "1"  # or the concept upright would be absent from all
    write(folder, rows)
    assert train(folder, "--epochs", "1") == 0
    told = capsys.readouterr().err.replace("\n", " ")
    assert "no annotated image of stripe" in told
    assert "stripe 0/" in told


def test_partly_annotated_images_are_used_as_far_as_they_are(folder):
    rows = rows_of(folder)
    rows[1][2] = rows[2][3] = rows[3][4] = ""
    write(folder, rows)
    assert train(folder, "--epochs", "1") == 0


def images_of(counts):
    """Images of classes with (all, annotated) of each."""
    labels = torch.cat([torch.full((n,), label) for label, (n, _) in enumerate(counts)])
    concepts = torch.full((len(labels), 2), torch.nan)
    start = 0
    for n, annotated in counts:
        concepts[start : start + annotated] = 1.0
        start += n
    names = tuple(f"class {label}" for label in range(len(counts)))
    pixels = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    return LabelledImages(pixels, labels, names, concepts, ("a", "b"))


def test_the_split_has_the_same_share_of_annotated_and_other_images_of_each_class():
    images = images_of([(50, 10), (30, 20), (1, 1), (2, 0)])
    train_rows, held = split(images, 0.2, seed=0)
    assert sorted([*train_rows.tolist(), *held.tolist()]) == list(range(83))
    annotated = ~images.concepts[held].isnan().all(1)
    assert images.labels[held].bincount(minlength=4).tolist() == [10, 6, 0, 0]
    assert images.labels[held][annotated].bincount(minlength=4).tolist() == [2, 4, 0, 0]
    assert not torch.equal(held, split(images, 0.2, seed=1)[1])
    with pytest.raises(UserError, match="none can be held out"):
        split(images_of([(2, 1), (2, 1)]), 0.2, seed=0)


# ---- models and images ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = make_folder(tmp_path_factory.mktemp("refusals") / "bars", n=16, annotated=8)
    assert train(made, "--epochs", "1") == 0
    return made


def test_wrong_models_images_and_concepts_are_refused(trained, tmp_path, capsys):
    model, images = str(trained / "model"), str(trained / "images")
    image = str(trained / "images" / "00.png")
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "model.json").write_bytes((trained / "model" / "model.json").read_bytes())
    (damaged / "model.safetensors").write_bytes(b"no weights")
    out = ["--out", str(tmp_path / "x.csv")]
    for arguments, message in (
        (["predict", "--model", str(tmp_path), "--images", images, *out], "holds no trained model"),
        (["predict", "--model", str(damaged), "--images", images, *out], "is damaged"),
        (["predict", "--model", model, "--images", str(tmp_path / "empty"), *out], "no images"),
        (["predict", "--model", model, "--images", images, "--out", f"{tmp_path}/x.txt"], ".csv"),
        (["explain", "--model", model, "--images", images, "--out", f"{trained}"], "no sheet"),
        (["explain", "--model", model, "--images", images, "--out", f"{tmp_path}/s",
          "--concept", "fur"], "there is no concept 'fur'; there are upright, lying, thick"),
        (["intervene", "--model", model, "--image", image, "--set", "fur=1"], "no concept 'fur'"),
        (["intervene", "--model", model, "--image", image, "--set", "thick=2"], "CONCEPT=1"),
        (["intervene", "--model", model, "--image", str(tmp_path / "no.png"), "--set", "thick=1"],
         "no such file"),
    ):  # fmt: skip
        assert message in refused(capsys, main(arguments))
    assert not (tmp_path / "x.csv").exists()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lambda-2", "-1"], "--lambda-2"),
        (["--edge", "8"], "--edge"),
        (["--backbone", "vgg"], "there is no backbone 'vgg'"),
        (["--backbone", "mlp-4"], "no spatial map"),
        (["--validation", "1"], "--validation"),
        (["--device", "tpu"], "use cpu or cuda"),
        (["--neighbours", "0"], "--neighbours"),
    ],
)
def test_wrong_options_are_refused(trained, capsys, options, message):
    assert message in refused(capsys, train(trained, *options))


def test_help_and_wrong_options_wait_for_no_torch():
    code = (
        "import sys; from projects.sscbm.command import main\n"
        "status = main(['train', '--epochs', '0'])\n"
        "assert status == 2 and 'torch' not in sys.modules, status"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 5
