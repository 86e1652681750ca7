"""The three commands on folders of images: what they write, that they go on where they stopped, and
what they refuse in one line.
"""

import csv
import shutil

import numpy as np
import pytest
import torch
from idp_problems import uniform
from PIL import Image

from projects.idp.align import Alignment, align
from projects.idp.classify import embed, ridge_head
from projects.idp.codebook import build
from projects.idp.command import main
from projects.idp.source import Source
from shared.commands.inputs import user_weights
from shared.files import atomic_save
from shared.vision.images import folder, synthetic


def write(path, images, each, first=0, flat=False, mode="RGB"):
    """A folder for each class, or all into one, of `each` images from the `first`."""
    for label, name in enumerate(images.classes):
        rows = [r for r in range(len(images)) if images.labels[r] == label][first : first + each]
        place = path if flat else path / name.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        for row in rows:
            picture = Image.fromarray(images.pixels[row].movedim(0, -1).numpy())
            picture.convert(mode).save(place / f"{label}-{row}.png")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("idp")
    base = synthetic(200, classes=4, size=16, seed=0)
    novel = synthetic(200, classes=3, size=16, seed=1)
    write(root / "base", base, 12)
    write(root / "support", novel, 2)
    write(root / "query", novel, 3, first=2)
    write(root / "new", novel, 3, first=2, flat=True)
    write(root / "target", novel, 8)
    assert (
        main(
            [
                "pretrain",
                "--images",
                str(root / "base"),
                "--out",
                str(root / "source"),
                "--size",
                "16",
                "--epochs",
                "2",
                "--batch",
                "16",
            ]
        )
        == 0
    )
    return root


def arguments(folders, command, **options):
    given = {
        "adapt": {"support": folders / "support", "query": folders / "new"},
        "evaluate": {"target": folders / "target", "ways": 3, "shots": 2, "queries": 3, "tasks": 4},
    }[command]
    given = {"source": folders / "source", "steps": 2, "pseudo": 2, **given, **options}
    found = [command]
    for name, value in given.items():
        found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def refused(capsys, given, *words):
    """Exit status 2 and one line with these words."""
    assert main(given) == 2
    said = capsys.readouterr().err.strip().splitlines()
    for word in words:
        assert word in said[-1], said[-1]
    assert "Traceback" not in "\n".join(said)


# ---- what they make ------------------------------------------------------------------------------


def test_pretrain_writes_a_source_and_is_done_when_called_again(folders, capsys):
    tensors, about = user_weights(folders / "source" / "source.safetensors")
    source = Source.of_tensors(tensors)
    assert about["size"] == "16"
    assert source.means.shape == (4, 4, 64)
    assert not (folders / "source" / "checkpoint.safetensors").exists()
    again = ["pretrain", "--images", str(folders / "base"), "--out", str(folders / "source")]
    assert main([*again, "--size", "16", "--epochs", "2", "--batch", "16"]) == 0
    assert "is finished" in capsys.readouterr().err
    refused(capsys, [*again, "--size", "16", "--epochs", "3", "--batch", "16"], "--epochs 2, not 3")


def test_a_stopped_pretraining_goes_on_to_the_same_weights(folders, tmp_path, monkeypatch):
    from projects.idp import source

    given = [
        "pretrain",
        "--images",
        str(folders / "base"),
        "--out",
        str(tmp_path / "out"),
        "--size",
        "16",
        "--epochs",
        "2",
        "--batch",
        "16",
    ]
    epoch = source.Training.epoch

    def stopping(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number)

    monkeypatch.setattr(source.Training, "epoch", stopping)
    assert main(given) == 130
    monkeypatch.setattr(source.Training, "epoch", epoch)
    assert main(given) == 0
    whole, _ = user_weights(folders / "source" / "source.safetensors")
    resumed, _ = user_weights(tmp_path / "out" / "source.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_adapt_writes_what_the_library_computes(folders, tmp_path, capsys):
    out = tmp_path / "p.csv"
    assert main(arguments(folders, "adapt", query=folders / "query", out=out)) == 0
    said = capsys.readouterr().err
    lines = list(csv.reader(out.open()))
    source = Source.of_tensors(user_weights(folders / "source" / "source.safetensors")[0])
    support, query = (folder(folders / name, size=16) for name in ("support", "query"))
    book = build("clustered", 4, source.means, source.means, 0)
    how = Alignment(steps=2, pseudo=2)
    images = support.images()[None]
    network = align(source.network, images, 3, book, source.scale, how, [0])
    scores = ridge_head(*embed(network, images, query.images()[None], "inductive"), 3)[0]
    assert lines[0] == ["file", "class", *support.classes]
    assert [line[0] for line in lines[1:]] == list(query.ids)
    assert np.allclose([[float(x) for x in line[2:]] for line in lines[1:]], scores, rtol=1e-3)
    best = scores.argmax(1)
    assert [line[1] for line in lines[1:]] == [support.classes[n] for n in best]
    assert f"accuracy {float((best == query.labels).float().mean()):.1%}" in said


def test_adapt_of_unlabelled_images_says_no_accuracy(folders, tmp_path, capsys):
    out = tmp_path / "p.csv"
    given = arguments(folders, "adapt", out=out, inference="transductive", propagate=True)
    assert main(given) == 0
    said = capsys.readouterr().err
    assert "9 predictions, transductive" in said
    assert "accuracy" not in said
    assert len(out.read_text().splitlines()) == 10


def test_evaluate_compares_on_the_same_tasks_and_goes_on_where_it_was(
    folders, tmp_path, monkeypatch
):
    from projects.idp import evaluate

    out, other = tmp_path / "a.csv", tmp_path / "b.csv"
    assert main(arguments(folders, "evaluate", out=out, group=2)) == 0
    lines = list(csv.DictReader(out.open()))
    assert [line["method"] for line in lines][-1] == "IDP"
    assert all(0 <= float(line["accuracy"]) <= 1 for line in lines)
    idp, ridge = (float(lines[n]["accuracy"]) for n in (3, 1))
    assert float(lines[1]["idp_less_it"]) == pytest.approx(idp - ridge, abs=1e-4)
    assert float(lines[3]["idp_less_it"]) == 0
    calls = []
    count = evaluate.count

    def stopping(*given):
        calls.append(given[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return count(*given)

    monkeypatch.setattr(evaluate, "count", stopping)
    assert main(arguments(folders, "evaluate", out=other, group=2)) == 130
    assert not other.exists()
    assert main(arguments(folders, "evaluate", out=other, group=2)) == 0
    assert [part.start for part in calls] == [0, 2, 2]  # the first group was kept
    assert other.read_text() == out.read_text()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_evaluate_names_each_method_by_what_it_does(folders, tmp_path, monkeypatch):
    from projects.idp import evaluate

    calls = []

    def recording(*given):
        calls.append(given[5])
        return align(*given)

    monkeypatch.setattr(evaluate, "align", recording)
    assert main(arguments(folders, "evaluate", out=tmp_path / "a.csv", tasks=2)) == 0
    assert evaluate.COLUMNS[1:] == ("ridge", "fine_tuning", "idp")
    assert [(how.steps, tuple(how.losses)) for how in calls] == [
        (0, (1, 1, 1)),
        (2, (1, 0, 0)),
        (2, (1, 1, 1)),
    ]


def test_without_steps_all_adapted_rows_are_the_ridge_head(folders, tmp_path):
    out = tmp_path / "a.csv"
    assert main(arguments(folders, "evaluate", out=out, steps=0)) == 0
    lines = list(csv.DictReader(out.open()))
    assert len({line["accuracy"] for line in lines[1:]}) == 1


MODULE = """
import torch
from torch import nn

class Body(nn.Sequential):
    def spatial_map(self, images):
        return self(images)

def grey():
    torch.manual_seed(0)
    return Body(nn.Conv2d(1, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU())

def plain():
    return Body(nn.Conv2d(3, 6, 3, stride=4))

def five():
    return Body(nn.Conv2d(5, 6, 3, stride=4), nn.BatchNorm2d(6))

def pooled():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))

def broken():
    body = grey()
    nn.init.constant_(body[0].weight, float("nan"))
    return body
"""


@pytest.fixture
def module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MODULE)
    return file


def test_the_users_own_network_with_its_own_codebook(folders, module, tmp_path):
    book, out = tmp_path / "book.npz", tmp_path / "p.csv"
    np.savez(book, codebook=np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    given = arguments(folders, "adapt", source=f"{module}:grey", size=16, out=out, codebook=book)
    assert main(given) == 0
    assert len(out.read_text().splitlines()) == 10


def test_without_proxies_no_codebook_is_needed(folders, module, tmp_path):
    given = arguments(
        folders,
        "adapt",
        source=f"{module}:grey",
        size=16,
        out=tmp_path / "p.csv",
        proxy_weight=0,
        agreement_weight=0,
    )
    assert main(given) == 0


def test_a_backbone_of_timm_with_weights_and_source_images(folders, tmp_path):
    import timm

    from shared.vision.backbones import backbone

    assert timm.is_model("resnet10t")
    body = backbone("timm:resnet10t", (3, 32, 32), seed=1)
    atomic_save(body.model.state_dict(), tmp_path / "w.safetensors", {"format": "pt"})
    given = arguments(
        folders,
        "adapt",
        source="timm:resnet10t",
        weights=tmp_path / "w.safetensors",
        size=32,
        source_images=folders / "base",
        out=tmp_path / "p.csv",
        steps=1,
    )
    assert main(given) == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 10


# ---- what they refuse ----------------------------------------------------------------------------


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of the folders that a test may spoil."""
    for name in ("support", "query", "target", "new"):
        shutil.copytree(folders / name, tmp_path / name)
    shutil.copytree(folders / "source", tmp_path / "source")
    return tmp_path


def test_fewer_images_than_a_task_needs(copied, capsys):
    out = copied / "a.csv"
    refused(capsys, arguments(copied, "evaluate", out=out, shots=6), "3 classes with 6 + 3 samples")
    refused(capsys, arguments(copied, "evaluate", out=out, ways=4), "tasks of 4 classes")
    assert not list(copied.glob("a.csv*"))
    assert main(arguments(copied, "evaluate", out=out, tasks=2)) == 0


def test_an_empty_class_and_an_image_without_one(copied, capsys):
    (copied / "support" / "nothing").mkdir()
    refused(capsys, arguments(copied, "adapt", out=copied / "p.csv"), "the class nothing has no")
    (copied / "support" / "nothing").rmdir()
    shutil.copy(next((copied / "new").iterdir()), copied / "support" / "stray.png")
    refused(capsys, arguments(copied, "adapt", out=copied / "p.csv"), "stray.png is in no class")


def test_classes_of_unequal_numbers(copied, capsys):
    next((copied / "support" / "pattern-1").iterdir()).unlink()
    refused(capsys, arguments(copied, "adapt", out=copied / "p.csv"), "have 1 to 2 images")


def test_queries_of_no_class_of_the_support(copied, capsys):
    (copied / "query" / "pattern-1").rename(copied / "query" / "other")
    given = arguments(copied, "adapt", query=copied / "query", out=copied / "p.csv")
    refused(capsys, given, "other is no class of --support")
    (copied / "query" / "other").rename(copied / "query" / "pattern-1")
    shutil.copy(next((copied / "new").iterdir()), copied / "query" / "stray.png")
    refused(capsys, given, "images beside folders")
    given = arguments(copied, "adapt", query=copied / "source", out=copied / "p.csv")
    refused(capsys, given, "holds no images")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("plain", "has no BatchNorm2d layer"),
        ("five", "images of 5 channels"),
        ("pooled", "no spatial_map"),
        ("broken", "not finite"),
    ],
)
def test_networks_that_cannot_be_adapted(folders, module, tmp_path, capsys, function, words):
    given = arguments(
        folders,
        "adapt",
        source=f"{module}:{function}",
        size=16,
        out=tmp_path / "p.csv",
        proxy_weight=0,
        agreement_weight=0,
    )
    refused(capsys, given, words)
    assert not (tmp_path / "p.csv").exists()


def test_a_codebook_of_another_width_or_none(folders, module, tmp_path, capsys):
    book = tmp_path / "book.npz"
    np.savez(book, codebook=np.ones((4, 9), np.float32))
    given = arguments(folders, "adapt", codebook=book, out=tmp_path / "p.csv")
    refused(capsys, given, "64 channels and the codebook is of width 9")
    np.savez(book, codebook=np.full((4, 64), np.nan, np.float32))
    refused(capsys, given, "is nan at")
    given = arguments(folders, "adapt", source=f"{module}:grey", size=16, out=tmp_path / "p.csv")
    refused(capsys, given, "has no codebook for proxies")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "nothing"}, "neither a folder that pretrain made"),
        ({"source": "timm:resnet10t"}, "has random weights"),
        ({"propagate": True}, "--propagate needs --inference transductive"),
        ({"support": "nowhere"}, "there is no such folder"),
        ({"rate": 0}, "above 0"),
        ({"out": "p.txt"}, "written as .csv"),
        ({"device": "tpu"}, "use cpu or cuda"),
    ],
)
def test_wrong_options(folders, tmp_path, capsys, options, words):
    refused(capsys, arguments(folders, "adapt", **{"out": tmp_path / "p.csv", **options}), words)


def test_a_damaged_source(copied, capsys):
    file = copied / "source" / "source.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    refused(capsys, arguments(copied, "adapt", out=copied / "p.csv"), "damaged")
    atomic_save({"x": torch.ones(2)}, file)
    refused(capsys, arguments(copied, "adapt", out=copied / "p.csv"), "no source of IDP")
    tensors = Source.of_tensors(user_weights_of(whole, copied)).tensors()
    atomic_save({**tensors, "network.stem.0.weight": uniform(2, 3, 3, 3)}, file, {"size": "16"})
    refused(capsys, arguments(copied, "adapt", out=copied / "p.csv"), "not those of a source")


def user_weights_of(content, place):
    file = place / "whole.safetensors"
    file.write_bytes(content)
    return user_weights(file)[0]


def test_images_that_are_too_small_for_the_network(folders, tmp_path, capsys):
    given = [
        "pretrain",
        "--images",
        str(folders / "base"),
        "--out",
        str(tmp_path / "out"),
        "--network",
        "resnet10",
        "--size",
        "16",
    ]
    refused(capsys, given, "at least 32")
    assert not (tmp_path / "out").exists()
