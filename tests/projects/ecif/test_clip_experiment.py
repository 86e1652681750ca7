"""The experiment on a CLIP, at its smallest: what its rows hold, and that a user's mistakes are one
line.
"""

import pandas as pd
import pytest
import torch

from projects.ecif import claims, labels, tables
from projects.ecif.experiments import clip
from projects.ecif.finetune import base_model
from projects.ecif.pictures import load
from shared import experiment
from shared.cli import main
from shared.influence.evaluate import most_harmful
from shared.influence.solvers import cg, spectral_radius


@pytest.fixture(scope="module")
def config():
    return experiment.load("ecif", "clip", "smoke")[1]


@pytest.fixture(scope="module")
def rows(config):
    run = experiment.Run(quiet=True)
    clip.run(config, run)
    return pd.DataFrame(run.rows)


@pytest.fixture(scope="module")
def case(config):
    base = base_model(config.model)
    pictures = load(
        config.dataset, None, config.train, config.validation, config.test, base.size, 0
    )
    return clip.build(config, base, pictures, 0, 0.2)


def test_both_tables_have_all_their_rows(rows):
    removal = rows[rows["part"] == "removal"]
    assert set(zip(removal["kind"], removal["method"], strict=True)) == {
        (kind, method)
        for kind in ("random", "valuable", "harmful")
        for method in ("retrain", *labels.EDITS)
    }
    harmful = rows[rows["part"] == "harmful"]
    methods = [
        "no removal",
        "ECIF",
        "IF-EKFAC",
        "TRAK",
        "TracIn",
        "CLIP-score",
        "pair loss",
        "random",
    ]
    for share, own in harmful.groupby("shuffled_share"):
        assert own["method"].tolist() == methods
        assert own["detection_auc"].notna().tolist() == [
            share > 0 and method != "no removal" for method in methods
        ]
    assert (removal["shuffled_share"] == 0).all()
    edits = removal[removal["method"] != "retrain"]
    assert (edits["products"] == 5).all()
    assert edits["residual_ratio"].between(0, 1).all()
    assert (rows["work_seconds"].dropna() > 0).all()


def test_what_removal_retrained_is_what_harmful_did(rows):
    """The most harmful tenth on clean captions stands in both tables."""
    retrained = rows[
        (rows["part"] == "removal") & (rows["kind"] == "harmful") & (rows["method"] == "retrain")
    ].iloc[0]
    ecif = rows[
        (rows["part"] == "harmful") & (rows["method"] == "ECIF") & (rows["shuffled_share"] == 0)
    ].iloc[0]
    assert (retrained["validation_loss"], retrained["test_accuracy"]) == (
        ecif["validation_loss"],
        ecif["test_accuracy"],
    )


def test_fine_tuning_lowers_the_loss_and_retraining_without_nothing_is_the_same(rows, case):
    fit = rows[(rows["part"] == "fit") & (rows["shuffled_share"] == 0)].set_index("method")
    assert (fit["moved_norm"] > 0).tolist() == [False, True]
    assert torch.equal(case.retrain([]).w, case.w)
    assert float(case.problem.mean_loss(case.w)) < float(case.problem.mean_loss(case.start))
    assert not torch.equal(case.retrain([3]).w, case.w)


def test_a_set_of_pairs_is_retrained_without_once(case, monkeypatch):
    first = case.retrain([5, 2])
    monkeypatch.setattr(clip, "train", lambda *_: pytest.fail("retrained a second time"))
    assert case.retrain([2, 5]) is first
    assert first.seconds > 0
    assert first.judged == case.judged(first.w)


def test_exchanged_captions_are_of_training_pairs_only(config, case):
    base = base_model(config.model)
    pictures = load(
        config.dataset, None, config.train, config.validation, config.test, base.size, 0
    )
    ids, _ = base.tokens([config.prompt.format(name) for name in pictures.classes])
    found = case.problem.pairs.by_pair(case.problem.pairs.inputs[0])
    assert torch.equal((found != ids[pictures.train.labels]).any(1), case.corrupted)
    assert int(case.corrupted.sum()) == round(0.2 * 40)
    assert torch.equal(
        case.validation.pairs.by_pair(case.validation.pairs.inputs[0]),
        ids[pictures.validation.labels],
    )
    captions = [tuple(one) for one in found.tolist()]
    assert case.repeated_share == case.problem.pairs.repeated_share(captions)


def test_the_most_harmful_pairs_are_those_whose_removal_lowers_the_clean_loss(case, monkeypatch):
    seen = []
    same = clip.Retrained(case.w, 0.0, case.judged(case.w))
    monkeypatch.setattr(clip.Case, "retrain", lambda _, removed: seen.append(removed) or same)
    run = experiment.Run(quiet=True)
    scores = clip.harmful(case, case.curvature(), 0.0, run, {"seed": 0})
    g = torch.func.grad(case.validation.mean_loss)(case.w)
    matrix = case.problem.objective().ggn(case.w)
    effects = case.problem.removal_effect(
        case.w, [[pair] for pair in range(40)], lambda b: clip_solve(matrix, b, case)
    )
    assert float(torch.corrcoef(torch.stack([scores, g @ effects]))[0, 1]) > 0.99
    assert seen[0] == most_harmful(-scores)[:4].tolist()


def clip_solve(matrix, b, case):
    """The same system, of all right-hand sides at once, to the end."""
    damping = case.config.damping * spectral_radius(matrix, case.w, iterations=10)
    return cg(matrix, b, damping=damping, tol=None, iterations=case.config.iterations)


def test_tables_say_that_random_weights_tell_nothing_of_accuracy(rows):
    for table in (tables.clip_removal(rows), tables.clip_harmful(rows)):
        assert "tiny (random weights: time and memory only) on 40 pairs" in table.caption
        assert len(table.to_markdown()) > 1000
    for check in (claims.clip_retrain, claims.clip_harmful):
        assert check(rows).verdict == "not tested here"


def test_the_table_has_areas_where_captions_were_exchanged_alone(rows):
    """With clean captions only, the rows need not even have the column."""
    both = tables.clip_harmful(rows)
    assert "AUROC" in both.to_markdown()
    assert both.frame.set_index("method").loc["no removal", "auc"] == "–"
    clean = rows[rows["shuffled_share"] == 0].drop(columns=["detection_auc", "removed_precision"])
    table = tables.clip_harmful(clean)
    assert "AUROC" not in table.to_markdown()
    assert "exchanged" not in table.to_markdown()
    assert list(table.frame["method"]) == list(both.frame["method"])


def test_a_missing_folder_or_model_is_one_line(tmp_path, capsys):
    for change, message in (
        (
            ["dataset=food101", f"folder={tmp_path}"],
            f"there is no {tmp_path}/food-101: set `folder`",
        ),
        ([f"model={tmp_path}"], "holds no config.json"),
        (["prompt=a photo"], "prompt"),
    ):
        options = [word for one in change for word in ("--set", one)]
        assert main(["run", "ecif/clip", "--scale", "smoke", *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1]
