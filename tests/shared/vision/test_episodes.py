"""Few-shot episodes hold what they say and no class of another split."""

from itertools import chain

import numpy as np
import pytest
import torch

from shared.errors import UserError
from shared.vision.episodes import class_split, sample_episodes

LABELS = np.repeat([3, 1, 4, 8, 5, 9], 9)


def test_an_episode_has_its_classes_in_order_and_no_sample_twice():
    found = sample_episodes(LABELS, 5, ways=4, shots=2, queries=3, seed=1)
    assert [tuple(part.shape) for part in found] == [(5, 8), (5, 8), (5, 12), (5, 12)]
    for support, y_support, query, y_query in zip(*found, strict=True):
        assert len(torch.cat([support, query]).unique()) == 20
        classes = [set(LABELS[support[y_support == way]]) for way in range(4)]
        assert [len(one) for one in classes] == [1] * 4
        assert len(set.union(*classes)) == 4
        assert [set(LABELS[query[y_query == way]]) for way in range(4)] == classes


def test_an_episode_depends_on_seed_and_number_alone():
    few, many, other = (
        sample_episodes(torch.from_numpy(LABELS), n, 3, 1, 1, seed)
        for n, seed in ((2, 1), (5, 1), (5, 2))
    )
    assert torch.equal(few.support, many.support[:2])
    assert not torch.equal(many.support, other.support)
    assert len(many.support.unique(dim=0)) == 5


def test_too_few_classes_or_samples_are_refused():
    with pytest.raises(UserError, match="7 classes"):
        sample_episodes(LABELS, 1, ways=7, shots=1, queries=1, seed=0)
    with pytest.raises(UserError, match="at least 9"):
        sample_episodes(LABELS, 1, ways=2, shots=5, queries=5, seed=0)
    with pytest.raises(UserError, match="0 classes"):
        sample_episodes(LABELS[:0], 1, ways=2, shots=5, queries=5, seed=0)


def test_splits_share_no_class():
    names = [f"class {number}" for number in range(30)]
    parts = class_split(names, (16, 4, 10), 0, "sketches")
    assert [len(part) for part in parts] == [16, 4, 10]
    assert sorted(chain(*parts)) == sorted(names)
    assert parts == class_split(names, (16, 4, 10), 0, "sketches")
    assert class_split(names, (16,), 0, "sketches") == parts[:1]
    assert parts != class_split(names, (16, 4, 10), 1, "sketches")
    assert parts != class_split(names, (16, 4, 10), 0, "others")
    with pytest.raises(UserError, match="31 classes were asked for; there are 30"):
        class_split(names, (20, 11), 0)
