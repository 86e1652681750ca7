"""The command: it trains, goes on after a kill to the same bits, and its model predicts, explains
and is intervened on.
"""

import csv
import json
import shutil

import pytest
import torch
from PIL import Image
from sscbm_problems import SMALL, make_folder, read_csv

from projects.sscbm import fitting
from projects.sscbm.bundle import intervene, load
from projects.sscbm.command import main
from shared.commands.signals import Stopped


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("bars"))
    assert train(folder, "model") == 0
    return folder


def train(folder, out, *options):
    arguments = ["train", "--images", folder / "images", "--annotations", folder / "concepts.csv"]
    return main([*map(str, arguments), "--out", str(folder / out), *SMALL, *options])


def weights(folder):
    return load(folder).model.state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_and_a_report_are_all_that_is_left(trained):
    names = {file.name for file in (trained / "model").iterdir()}
    assert names == {
        "model.safetensors",
        "model.json",
        "report.json",
        "log.jsonl",
        "run.json",
        ".lock",
    }
    report = json.loads((trained / "model" / "report.json").read_text())
    assert report["train"] + report["held_out_images"] == 40
    assert report["held_out_images"] == 8
    assert report["annotated"] == 10  # of 12, a fifth of each class is held out
    assert report["annotated_share"] == 10 / 32
    each = {"images": 16, "annotated": 5}
    assert report["classes"] == {"bar": each, "stripe": each}
    assert report["resized"] == 40
    assert set(report["held_out"]["by_concept"]) == {"upright", "lying", "thick"}
    assert report["held_out"]["class_accuracy_majority"] == 0.5


def test_a_killed_run_goes_on_to_the_same_bits(trained, monkeypatch):
    shutil.rmtree(trained / "again", ignore_errors=True)
    plain = fitting.save_checkpoint

    def and_stop(*arguments):
        plain(*arguments)
        if arguments[3]["epochs"] == 2:
            raise Stopped("killed", 15)

    monkeypatch.setattr(fitting, "save_checkpoint", and_stop)
    assert train(trained, "again") == 128 + 15
    monkeypatch.undo()
    assert (trained / "again" / "checkpoint.safetensors").exists()
    assert not (trained / "again" / "model.json").exists()
    assert train(trained, "again") == 0
    assert same(weights(trained / "model"), weights(trained / "again"))
    log = (trained / "again" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2, 3]


def test_a_finished_run_is_left_and_another_one_refused(trained, capsys):
    before = (trained / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(trained, "model") == 0
    assert "trained already" in capsys.readouterr().err.replace("\n", " ")
    assert (trained / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert train(trained, "model", "--lambda-2", "0.5") == 2
    assert "--lambda-2 0.1, not 0.5" in capsys.readouterr().err


def test_what_is_not_annotated_is_not_read(trained, tmp_path):
    """Blank cells stay blank: a model from a CSV in which hidden cells had once been filled in and
    blanked is the same as ever; and a filled-in one is another.
    """
    folder = shutil.copytree(trained, tmp_path / "copy")
    rows = read_csv(folder / "concepts.csv")
    rows[-1][2:] = ["1", "0", "1"]
    with open(folder / "concepts.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert train(folder, "other") == 0
    assert not same(weights(folder / "model"), weights(folder / "other"))


def test_predictions_are_the_models_and_one_line_an_image(trained):
    out = trained / "predictions.csv"
    arguments = ["predict", "--model", trained / "model", "--images", trained / "images"]
    assert main([*map(str, arguments), "--out", str(out)]) == 0
    header, *lines = read_csv(out)
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [row["file"] for row in rows] == [f"{number:02d}.png" for number in range(40)]
    bundle = load(trained / "model")
    found = bundle.predict(bundle.read(trained / "images" / "07.png").unsqueeze(0))
    assert float(rows[7]["thick"]) == pytest.approx(float(found.probabilities[0, 2]), abs=1e-4)
    assert rows[7]["class"] == bundle.settings.classes[int(found.logits.argmax())]


def test_explanations_are_overlays_and_a_sheet(trained):
    out = trained / "sheet"
    arguments = [
        "explain",
        "--model",
        trained / "model",
        "--images",
        trained / "images",
        "--out",
        out,
    ]
    assert main([*map(str, arguments), "--concept", "thick", "--concept", "upright"]) == 0
    page = (out / "index.html").read_text()
    assert page.count("<section>") == 40
    assert "thick" in page
    assert len(list(out.glob("*.png"))) == 3 * 40
    with Image.open(out / "0003-2.png") as overlay:
        assert overlay.mode == "RGB"
        assert min(overlay.size) >= 160
    assert main([*map(str, arguments), "--top", "1"]) == 0  # over a sheet of its own
    assert len(list(out.glob("*.png"))) == 2 * 40


def test_an_intervention_says_what_the_class_becomes(trained, capsys):
    image = trained / "images" / "05.png"
    arguments = ["intervene", "--model", trained / "model", "--image", image]
    capsys.readouterr()
    assert main([*map(str, arguments), "--set", "upright=0", "--set", "lying=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("upright: 0.")
    assert lines[0].endswith("set to 0")
    assert [line.split(": ")[0] for line in lines[2:]] == ["class before", "class after"]


def test_an_intervention_is_the_models_own_answer_with_concepts_given(trained):
    bundle = load(trained / "model")
    image = trained / "images" / "05.png"
    nothing = intervene(bundle, image, {})
    assert nothing.before == nothing.after
    changed = intervene(bundle, image, {"upright": 0, "lying": 1})
    assert changed.before == nothing.before
    given = torch.tensor([[0.0, 1.0, torch.nan]])
    logits = bundle.predict(bundle.read(image).unsqueeze(0), given).logits[0]
    assert list(changed.after.values()) == pytest.approx(logits.softmax(0).tolist())
    assert sum(changed.after.values()) == pytest.approx(1)


@pytest.mark.parametrize("method", ["cem-ssl", "cbm-ssl", "cem"])
def test_every_method_trains_and_is_loaded(trained, method, capsys):
    assert train(trained, method, "--method", method, "--epochs", "1", "--imbalance") == 0
    assert main(["explain", "--model", str(trained / method), "--images", str(trained / "images"),
                 "--out", str(trained / "none")]) == 2  # fmt: skip
    assert "no heat maps" in capsys.readouterr().err
    assert not (trained / "none").exists()


def test_a_backbone_may_start_from_weights(trained, tmp_path, capsys):
    from safetensors.torch import save_file

    backbone = load(trained / "model").model.encoder.backbone
    save_file(
        {**backbone.state_dict(), "fc.weight": torch.zeros(3)}, tmp_path / "weights.safetensors"
    )
    given = ["--weights", str(tmp_path / "weights.safetensors"), "--epochs", "1"]
    assert train(trained, "started", *given) == 0
    save_file({"0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "weights.safetensors")
    assert train(trained, "wrong", *given) == 2
    assert "'0.weight' [4, 1, 3, 3]" in capsys.readouterr().err
