"""The noise is normal out to its tails, is what a cipher gives, and never comes twice."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from projects.flashdp import noise

SECRET = bytes(range(48))


def numbers(count, secret=SECRET):
    found = torch.zeros(count)
    noise.CipherNoise(secret).release(found, 1.0, 1.0)
    return found


def by_hand(count, secret=SECRET):
    """In float64, the quantiles of the cipher's stream, asked for in one piece."""
    stream = (
        Cipher(algorithms.AES(secret[:32]), modes.CTR(secret[32:]))
        .encryptor()
        .update(bytes(4 * count))
    )
    return scipy.special.ndtri((np.frombuffer(stream, "<i4").astype(float) + 0.5) / 2**32 + 0.5)


def test_numbers_are_the_normal_quantiles_of_the_ciphers_bits():
    count = 3 * noise.BLOCK + 77
    wanted = by_hand(count)
    assert np.abs(wanted).max() > 4.5
    # float32 has 2^-25 of a probability, which the density divides; beyond 3.3 float64 takes over
    tolerance = 4e-7 + 2**-25 / scipy.stats.norm.pdf(np.minimum(np.abs(wanted), 3.3))
    assert np.all(np.abs(numbers(count).numpy() - wanted) <= tolerance)


@pytest.mark.parametrize(
    "k",
    [
        -(2**31),
        2**31 - 1,
        -(2**31) + 1,
        2**31 - 2**21,
        2**31 - 2**21 - 1,
        -(2**31) + 2**21 - 1,
        -(2**31) + 2**21,
        0,
        1,
    ],
)
def test_the_ends_of_the_bits_are_finite_and_exact(k, monkeypatch):
    class Fixed:
        def update_into(self, zeros, room):
            np.frombuffer(room, np.int32)[: noise.BLOCK] = k

    stream = noise.CipherNoise(SECRET)
    stream._cipher = Fixed()
    found = torch.zeros(3)
    stream.release(found, 1.0, 1.0)
    wanted = scipy.special.ndtri((k + 0.5) / 2**32 + 0.5)
    assert torch.isfinite(found).all()
    assert found.numpy() == pytest.approx(wanted, abs=2e-5)


def test_moments_and_tails_are_those_of_a_normal_distribution():
    x = numbers(8_000_000).double().numpy()
    assert abs(x.mean()) < 4 / len(x) ** 0.5
    assert abs(x.var() - 1) < 4 * (2 / len(x)) ** 0.5
    assert scipy.stats.kstest(x[:1_000_000], "norm").pvalue > 1e-4
    for far in (1, 2, 3, 3.3, 4, 4.5):
        expected = 2 * len(x) * scipy.stats.norm.sf(far)
        assert abs((np.abs(x) > far).sum() - expected) < 5 * expected**0.5


def test_pieces_go_on_in_the_stream_whatever_their_size():
    whole = numbers(2 * noise.BLOCK + 50)
    stream = noise.CipherNoise(SECRET)
    parts = []
    for size in (1, 16, noise.BLOCK - 20, noise.BLOCK + 3, 50):
        parts.append(torch.zeros(size))
        stream.release(parts[-1], 1.0, 1.0)
    assert torch.equal(torch.cat(parts), whole)


def test_release_adds_the_deviation_times_the_noise_and_divides():
    sums = torch.linspace(-3, 3, 1000, dtype=torch.float64)
    found = sums.clone()
    noise.CipherNoise(SECRET).release(found, 2.5, 8.0)
    assert torch.allclose(found, (sums + 2.5 * numbers(1000).double()) / 8, rtol=1e-6)
    without = sums.clone()
    noise.CipherNoise(SECRET).release(without, 0.0, 8.0)
    assert torch.equal(without, sums / 8)


def test_streams_differ_by_step_key_device_and_return():
    cpu = torch.device("cpu")

    def first(key=b"key", step=0, rewound=0):
        found = torch.zeros(1000)
        noise.streams(key, step, {cpu}, rewound)[cpu].release(found, 1.0, 1.0)
        return found

    assert torch.equal(first(), first())
    assert not any(
        torch.equal(first(), other)
        for other in (first(key=b"kez"), first(step=1), first(rewound=1))
    )


def test_two_devices_of_one_model_have_different_noise(monkeypatch):
    seeds = []

    class Recorded:
        def __init__(self, device):
            pass

        def manual_seed(self, seed):
            seeds.append(seed)

    monkeypatch.setattr(torch, "Generator", Recorded)
    noise.streams(b"key", 0, {torch.device("cuda", 0), torch.device("cuda", 1)})
    assert len(set(seeds)) == 2
