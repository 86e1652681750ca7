"""What the experiments say of a machine and of their data; most of them run in the smoke run of the
whole workflow.
"""

import pytest
import torch

from projects.flashdp.data import Glosses, glosses
from projects.flashdp.experiments import utility
from projects.flashdp.losses import IGNORED
from shared.data import path
from shared.errors import UserError
from shared.experiment import Run, load


def toy(*_) -> Glosses:
    generator = torch.Generator().manual_seed(0)
    records = [torch.randint(0, 40, (3 + i % 9,), generator=generator).tolist() for i in range(300)]
    return Glosses(records[50:], records[:50], 40)


def small(**changes: object) -> utility.Config:
    """The configuration of scale cpu with changes."""
    return load("flashdp", "utility", "cpu", changes)[1]


def test_explicit_clipping_has_flashdps_batches_and_noise_and_so_its_losses(monkeypatch):
    monkeypatch.setattr(utility, "glosses", toy)
    run = Run(quiet=True)
    config = small(
        epsilons=[3.0],
        seeds=2,
        steps=6,
        batch_size=20,
        tokens=8,
        hidden=16,
        layers=1,
        delta=1e-3,
        accountant="rdp",
    )
    utility.run(config, run)
    losses = {
        (method, seed): [
            row["train_loss"]
            for row in run.rows
            if (row["kind"], row["method"], row["seed"]) == ("step", method, seed)
        ]
        for method in ("FlashDP", "explicit", "non-private", "flat (BK)")
        for seed in (0, 1)
    }
    assert losses["FlashDP", 0] == pytest.approx(losses["explicit", 0], rel=1e-5)
    assert len(losses["FlashDP", 0]) == 6
    assert losses["FlashDP", 0] != losses["FlashDP", 1]
    assert losses["FlashDP", 0][1:] != pytest.approx(losses["non-private", 0][1:], rel=1e-5)
    assert not losses["explicit", 1]
    (end,) = [
        row
        for row in run.rows
        if (row["kind"], row["method"], row["seed"]) == ("end", "FlashDP", 0)
    ]
    assert 2.9 < end["spent_epsilon"] <= 3.0


def test_a_delta_too_large_for_the_records_is_refused(monkeypatch):
    monkeypatch.setattr(utility, "glosses", toy)
    with pytest.raises(UserError, match="1/250"):
        utility.run(small(delta=0.01, steps=2), Run(quiet=True))


def test_padding_has_no_loss_and_a_record_is_cut_at_its_end():
    ids, labels = Glosses.batch([[5, 6, 7, 8], [9, 4]], tokens=3)
    assert ids.tolist() == [[5, 6, 7], [9, 4, 0]]
    assert labels.tolist() == [[5, 6, 7], [9, 4, IGNORED]]


@pytest.mark.data
def test_the_private_glosses_are_not_what_the_tokenizer_was_trained_on():
    try:
        path("wordnet")
    except UserError as error:
        pytest.skip(str(error))
    found = glosses(512, records=500, held_out=100)
    assert (len(found.train), len(found.held_out), found.vocabulary) == (400, 100, 512)
    # the end token, on both sides
    assert all(record[0] == record[-1] == 0 for record in found.train)
    assert found.pieces(3, 50).shape == (3, 50)
    assert not {tuple(record) for record in found.train} & {
        tuple(record) for record in found.held_out
    }
