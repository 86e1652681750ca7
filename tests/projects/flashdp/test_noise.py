"""What is released is the rounded sum of the gradients and a normal number, right to the last step
of the grid, and no bit of it tells how it was made.
"""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import nn

from projects.flashdp import FixedSampling, make_private, noise
from shared.errors import UserError

SECRET = bytes(range(noise.SECRET_BYTES))


def released(sums, deviation=1.0, divisor=1.0, secret=SECRET):
    found = sums.clone()
    stream = noise.CipherNoise(secret)
    stream.release(found, deviation, divisor)
    stream.finish()
    return found


def numbers(count, secret=SECRET):
    return released(torch.zeros(count), secret=secret)


def bits_by_hand(count, secret=SECRET):
    """The first 32 bits of each number, and the 128 that follow."""
    first = Cipher(algorithms.AES(secret[:32]), modes.CTR(secret[32:48])).encryptor()
    further = Cipher(algorithms.AES(secret[48:80]), modes.ECB()).encryptor()
    high = np.frombuffer(first.update(bytes(4 * count)), "<i4").astype(np.int64) + 2**31
    places = np.zeros((count, 2), "<u8")
    places[:, 0] = np.arange(count)
    return high, np.frombuffer(further.update(places.tobytes()), "<u8").reshape(-1, 2)


def by_hand(count, secret=SECRET):
    """Normal quantiles in float64, without looking at what is certain when."""
    high, low = bits_by_hand(count, secret)
    # the uniform number's mirror image above 1/2, where float64 has no digits left
    upper = high >= 2**31
    p = np.where(upper, 2**32 - 1 - high, high) + (low[:, 0].astype(float) + 0.5) / 2**64
    return np.where(upper, -1, 1) * scipy.special.ndtri(p / 2**32)


@pytest.mark.parametrize("deviation", [1.0, 1.9, 0.37, 40.0])
def test_every_number_is_the_rounded_quantile_of_the_ciphers_bits(deviation):
    count = 7 * noise.BLOCK + 77
    sums = torch.randn(count, generator=torch.Generator().manual_seed(1)) * 0.3
    step = noise.grid(deviation)
    wanted = (sums.double().numpy() + deviation * by_hand(count)) / step
    clear = np.abs(wanted - np.floor(wanted) - 0.5) > 1e-9  # by_hand has float64's errors
    assert clear.mean() > 0.999
    found = released(sums, deviation).double().numpy() / step
    assert np.array_equal(found[clear], np.rint(wanted)[clear])
    # and none of them was certain by luck: the errors of float32 reach a few hundredths of a step
    assert np.abs(wanted).max() > 4 * noise.STEPS


def test_the_float32_path_stays_far_within_its_margin():
    stream = noise.CipherNoise(SECRET)
    worst = 0.0
    for deviation in (1.0, 1.999):
        for _ in range(6):
            stream._draw()
            sums = torch.randn(noise.BLOCK) * 0.1
            unsure = stream._round(sums, slice(0, noise.BLOCK), deviation, 1 / noise.STEPS)
            certain = np.ones(noise.BLOCK, bool)
            certain[unsure] = False
            u = (stream._bits[: noise.BLOCK] + 0.5) / 2**31
            exact = sums.numpy() + deviation * math.sqrt(2) * scipy.special.erfinv(u)
            exact *= noise.STEPS
            shown = stream._values.numpy() + stream._steps.numpy() + noise.MARGIN - 0.5
            worst = max(worst, np.abs(shown - exact)[certain].max())
    assert 1e-5 < worst < 0.7 * noise.MARGIN


@pytest.mark.parametrize("large", [300.0, 2e4, 1e9])
def test_sums_far_above_the_noise_are_rounded_right_too(large):
    sums = torch.linspace(-large, large, 4001)
    step = noise.grid(1.0)
    wanted = np.rint(sums.double().numpy() / step + by_hand(4001) / step)
    assert np.array_equal(
        released(sums).numpy(), torch.from_numpy(wanted).float().mul_(step).numpy()
    )


def test_float64_sums_leave_as_float32_ones_do():
    sums = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    assert torch.equal(released(sums).double(), released(sums.double()))


def test_what_is_written_is_a_function_of_the_step_alone():
    """Sums with the same rounded value leave as the same bits, whichever path they take, and zero
    has one sign.
    """
    step = noise.grid(1.0)
    for sums in (torch.zeros(200_000), torch.full((200_000,), -1e-9), torch.full((200_000,), -0.0)):
        found = released(sums, 1.0, 7.0)
        m = torch.round(found.double() * 7 / step)
        assert torch.equal(found, m.float() * np.float32(step / 7))
        assert not torch.signbit(found[found == 0]).any()
        assert (found == 0).sum() > 100


@pytest.mark.parametrize("tail", [0, 1, 5])
@pytest.mark.parametrize("upper", [False, True])
def test_the_ends_of_the_bits_have_their_true_quantiles(tail, upper):
    """The last 32 bits of the tail are not its end: others follow."""
    stream = noise.CipherNoise(SECRET)
    places = np.arange(50)
    bits = np.full(50, 2**31 - 1 - tail if upper else tail - 2**31, np.int32)
    found = stream._exactly(np.zeros(50), bits, places, np.full(50, 200.0))
    _, low = bits_by_hand(50)
    for m, further in zip(found, low, strict=True):
        p = mpmath.mpf(tail) + (mpmath.mpf(int(further[0])) + 0.5) / 2**64
        with mpmath.workdps(60):
            quantile = -mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * p / 2**32)
            assert abs(m - (-1 if upper else 1) * 200 * quantile) < 0.5 + 1e-6
    if tail == 0:
        assert np.abs(found).max() > 200 * 6.3  # where 32 bits alone would end
        assert len(np.unique(found)) > 20


def test_a_value_on_the_border_is_decided_with_all_bits():
    """Sums chosen so that float64 cannot tell the side: 1e-16 of a step makes the difference."""
    stream = noise.CipherNoise(SECRET)
    high, low = bits_by_hand(8)
    decided = set()
    with mpmath.workdps(80):
        for i in range(8):
            upper = high[i] >= 2**31
            tail = int(2**32 - 1 - high[i] if upper else high[i])
            further = (int(low[i, 0]) << 64) + int(low[i, 1])
            p = (tail + (mpmath.mpf(further) + 0.5) / mpmath.mpf(2) ** 128) / 2**32
            exact = (-1 if upper else 1) * 200 * mpmath.sqrt(2) * mpmath.erfinv(2 * p - 1)
            border = mpmath.floor(exact) + 0.5 - exact  # so much more is half way
            for s in (np.nextafter(float(border), -1), np.nextafter(float(border), 2)):
                wanted = mpmath.floor(exact + mpmath.mpf(float(s)) + 0.5)
                bits = (high[i : i + 1] - 2**31).astype(np.int32)
                found = stream._exactly(np.array([s]), bits, np.array([i]), np.array([200.0]))
                assert found[0] == float(wanted)
                decided.add(float(wanted - mpmath.floor(exact)))
    assert decided == {0.0, 1.0}


def test_moments_and_tails_are_those_of_a_normal_distribution():
    x = numbers(4_000_000).double().numpy()
    assert abs(x.mean()) < 4 / len(x) ** 0.5
    assert abs(x.var() - 1) < 4 * (2 / len(x)) ** 0.5
    for far in (1, 2, 3, 3.3, 4, 4.5):
        step = noise.grid(1.0)
        border = (math.floor(far / step) + 0.5) * step  # below the first multiple beyond `far`
        expected = 2 * len(x) * scipy.stats.norm.sf(border)
        assert abs((np.abs(x) > far).sum() - expected) < 5 * expected**0.5


def test_pieces_go_on_in_the_stream_whatever_their_size():
    whole = numbers(2 * noise.BLOCK + 50)
    stream = noise.CipherNoise(SECRET)
    parts = []
    for size in (1, 16, noise.BLOCK - 20, noise.BLOCK + 3, 50):
        parts.append(torch.zeros(size))
        stream.release(parts[-1], 1.0, 1.0)
    stream.finish()
    assert torch.equal(torch.cat(parts), whole)


def test_release_adds_the_deviation_times_the_noise_and_divides():
    sums = torch.linspace(-3, 3, 1000)
    wanted = (sums + 2.5 * torch.from_numpy(by_hand(1000))) / 8
    assert (released(sums, 2.5, 8.0) - wanted).abs().max() <= noise.grid(2.5) / 8 * 0.5001
    without = sums.clone()
    noise.CipherNoise(SECRET).release(without, 0.0, 8.0)
    assert torch.equal(without, sums / 8)


def test_the_grid_is_a_power_of_two_between_16_and_32_steps_a_deviation():
    for deviation in (1e-6, 0.3, 0.5, 0.75, 1.0, 1.9999, 2.0, 3e4):
        step = noise.grid(deviation)
        assert Fraction(step).numerator == 1 or Fraction(step).denominator == 1
        assert math.frexp(step)[0] == 0.5
        assert 16 <= deviation / step < 32
    for deviation in (1e-40, 1e35, math.inf):
        with pytest.raises(UserError, match="beyond float32"):
            noise.grid(deviation)


def test_what_160_bits_cannot_make_is_counted_and_small():
    assert noise.delta_shortfall(1e9 * 1e6, 8.0) < 1e-20
    assert noise.delta_shortfall(2, 0.0) == 4 * noise.SHORTFALL
    # all borders between steps within the last quantile, and what lies beyond it
    last = math.sqrt(2 * 161 * math.log(2))
    assert 2 * last * 2 * noise.STEPS * 2.0**-160 + 2.0**-159 < noise.SHORTFALL


# ---- the distinguisher ---------------------------------------------------------------------------


def embedding_gradient(present, key):
    """One released step at sigma 1 of an embedding, whose only record has 40 rare tokens, or is not
    there.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1600, 512), nn.Linear(512, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    private = make_private(
        model,
        optimizer,
        FixedSampling(1, 1),
        noise_multiplier=1.0,
        key=bytes([key]) * 32,
        data=b"records",
    )
    if present:
        model(torch.arange(100, 140)[None]).square().sum().backward()
    optimizer.step()
    step = noise.grid(private.groups[0].noise)
    return model[0].weight.grad[100:140].flatten().double(), step


def off_the_old_grid(gradient):
    """How far values near zero are from the numbers that 32 bits and float32 can make: what told
    presence from absence when the noise was added as it was.
    """
    near = gradient[gradient.abs() < 1e-3]
    place = torch.special.erf(near / math.sqrt(2)) * 2**31
    return float((place - place.round()).abs().mean())


def test_a_records_presence_does_not_show_in_the_last_bits():
    with_record, (step, *_) = zip(*(embedding_gradient(True, k) for k in range(12)), strict=True)
    without, _ = zip(*(embedding_gradient(False, k) for k in range(100, 112)), strict=True)
    for gradient in (*with_record, *without):
        assert torch.equal(gradient, (gradient / step).round() * step)  # all on one grid
        assert off_the_old_grid(gradient) == off_the_old_grid(without[0])
    # nor in the distribution of what the last bits of m are
    last = [torch.cat(each).div(step).long().remainder(4).bincount(minlength=4).numpy()
            for each in (with_record, without)]  # fmt: skip
    assert scipy.stats.chi2_contingency(last).pvalue > 1e-4


def test_the_same_look_tells_noise_that_is_added_as_it_is():
    """The control: were the noise added in floating point, the distinguisher would see it."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (4_000_000,), generator=generator)
    bare = math.sqrt(2) * torch.special.erfinv(bits.double() / 2**31)
    moved = bare + 1e-3 * torch.randn(len(bare), generator=generator).double()
    assert off_the_old_grid(bare) < 1e-3
    assert off_the_old_grid(moved) > 0.2


# ---- streams -------------------------------------------------------------------------------------


def test_streams_differ_by_step_key_device_and_return():
    cpu = torch.device("cpu")

    def first(key=b"key", step=0, rewound=0):
        found = torch.zeros(1000)
        stream = noise.streams(key, step, {cpu}, rewound)[cpu]
        stream.release(found, 1.0, 1.0)
        stream.finish()
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


def test_another_devices_noise_is_normal_and_on_the_grid():
    found = torch.full((200_000,), 0.25)
    stream = noise.GeneratorNoise(SECRET, torch.device("cpu"))
    stream.release(found, 1.5, 4.0)
    m = found.double() * 4 / noise.grid(1.5)
    assert torch.equal(m, m.round())
    assert float(found.mean() * 4) == pytest.approx(0.25, abs=0.02)
    assert float(found.std() * 4) == pytest.approx(1.5, rel=0.01)
