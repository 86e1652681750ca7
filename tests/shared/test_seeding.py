"""Seeds: independent of one another and of the order in which they are asked for."""

import numpy as np
import torch

from shared.seeding import generator, step_seed


def test_the_values_are_the_same_on_every_machine():
    assert [step_seed(0), step_seed(0, "noise", 3), step_seed(2**70, "é")] == [
        6337105172096484814,
        1958075765024164654,
        6675637758714498845,
    ]


def test_keys_of_any_kind_give_different_seeds():
    keys = [(), (0,), (0, 0), (1,), ("1",), ("a",), ("a", "b"), ("ab",), (2**32,), (0, 1), (-1,)]
    seeds = {step_seed(seed, *key) for seed in (0, 1, 2**32) for key in keys}
    assert len(seeds) == 3 * len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numpy_integers_are_integers():
    assert step_seed(np.int64(3), np.int32(4)) == step_seed(3, 4)


def test_seeds_look_uniform():
    bits = np.array([[step_seed(0, step) >> bit & 1 for bit in range(63)] for step in range(2000)])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.06
    assert np.abs(np.corrcoef(bits.T) - np.eye(63)).max() < 0.12


def test_a_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first, again, other = (torch.randn(4, generator=generator(1, key)) for key in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
