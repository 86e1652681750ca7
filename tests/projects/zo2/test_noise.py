"""Noise drawn in pieces is the noise drawn at once, and the arithmetic keeps MeZO's rounding."""

import pytest
import torch

from projects.zo2.noise import Noise, Scratch, pieces

CPU = torch.device("cpu")
SHAPES = [
    (1,),
    (3,),
    (15,),
    (16,),
    (17,),
    (31,),
    (7, 5),
    (50,),
    (63,),
    (64,),
    (65,),
    (79,),
    (80,),
    (81,),
    (129,),
    (5, 41),
    (),
]


def _noise(piece=64, longest=1000, seed=3):
    scratch = Scratch(CPU, longest)
    scratch.piece = piece
    scratch._size = piece + 15
    noise = Noise(scratch)
    noise.seed(seed)
    return noise


def _at_once(shape, generator, dtype=torch.float32):
    return torch.normal(0.0, 1.0, shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("numel", [*range(200), 1000])
@pytest.mark.parametrize("piece", [16, 64])
def test_pieces_are_cut_at_multiples_of_16_with_16_on_both_sides(numel, piece):
    cut = list(pieces(numel, piece))
    assert [i for s in cut for i in range(s.start, s.stop)] == list(range(numel))
    assert all(s.start % 16 == 0 for s in cut)
    if len(cut) > 1:
        assert all(s.stop - s.start >= 16 for s in cut)
    assert all(s.stop - s.start <= piece + 15 for s in cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cached", [True, False])
def test_a_stream_in_pieces_is_the_stream_at_once(dtype, cached):
    noise, generator = _noise(), torch.Generator().manual_seed(3)
    for shape in SHAPES:
        z = _at_once(shape, generator, dtype)
        got = torch.empty(shape, dtype=dtype)
        if cached:
            noise.draw(got, 1.0)
        else:
            noise.add([(got, torch.zeros(shape, dtype=dtype), 1.0)], 1.0)
        assert torch.equal(got, z)


def test_skipping_is_drawing():
    noise, generator = _noise(), torch.Generator().manual_seed(3)
    for shape in SHAPES:
        skipped = _at_once(shape, generator)
        noise.skip(skipped)
        noise.skip(torch.zeros(()).expand(shape))  # what stands for a block that is away
        _at_once(shape, generator)
    got = torch.zeros(40)
    noise.add([(got, got, 1.0)], 1.0)
    assert torch.equal(got, _at_once((40,), generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, -1.0, -2.0])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_perturbation_rounds_as_mezo_does(dtype, scale, contiguous):
    theta = torch.linspace(-0.05, 0.05, 7 * 211).to(dtype).view(7, 211)
    theta = theta if contiguous else theta.t()
    z = _at_once(theta.shape, torch.Generator().manual_seed(3), dtype)
    wanted = theta + int(scale) * z * 1e-3
    before = theta.clone()
    target = torch.empty(theta.shape, dtype=dtype)  # contiguous, where the source may not be
    _noise(longest=2000).add([(target, theta, scale)], 1e-3)
    assert torch.equal(target, wanted)
    _noise(longest=2000).add([(theta, theta, scale)], 1e-3)
    assert torch.equal(theta, wanted)
    assert not torch.equal(theta, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_twins_come_from_one_draw(dtype):
    home = torch.linspace(-1, 1, 217).to(dtype)
    noise = _noise()
    z = _at_once((217,), torch.Generator().manual_seed(3), dtype)
    plus, minus = torch.empty_like(home), home.clone()
    noise.add([(plus, minus, 1.0), (minus, plus, -2.0)], 1e-3)
    assert torch.equal(plus, home + 1 * z * 1e-3)
    assert torch.equal(minus, plus + -2 * z * 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("contiguous", [True, False])
def test_an_update_rounds_as_mezo_does(dtype, decay, contiguous):
    theta = torch.linspace(-1, 1, 7 * 31).to(dtype).view(7, 31)
    theta = theta if contiguous else theta.t()
    z = _at_once(theta.shape, torch.Generator().manual_seed(3), dtype)
    lr, g = 3e-3, -1.7
    wanted = theta - lr * (g * z + decay * theta)
    _noise().update(theta, lr, g, decay)
    assert torch.equal(theta, wanted)


def test_a_stream_can_be_taken_up_again():
    noise = _noise()
    noise.skip(torch.empty(33))
    state = noise.state()
    first, second = torch.zeros(70), torch.zeros(70)
    noise.add([(first, first, 1.0)], 1.0)
    noise.restore(state)
    noise.add([(second, second, 1.0)], 1.0)
    assert torch.equal(first, second)


def test_two_streams_share_memory_and_nothing_else():
    scratch = Scratch(CPU, 100)
    a, b = Noise(scratch), Noise(scratch)
    a.seed(0)
    b.seed(0)
    got = [torch.zeros(20) for _ in range(4)]
    for noise, target in zip((a, b, a, b), got, strict=True):
        noise.add([(target, target, 1.0)], 1.0)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[2], got[3])
    assert not torch.equal(got[0], got[2])


def test_long_tensors_take_no_more_scratch_than_a_piece():
    scratch = Scratch(CPU, 10_000_000)
    assert scratch.row(torch.float32).numel() == scratch.piece + 15
    assert scratch.row(torch.float32).data_ptr() == scratch.row(torch.float32).data_ptr()
    assert scratch.row(torch.float32, 1).data_ptr() != scratch.row(torch.float32).data_ptr()
    noise, long = Noise(scratch), torch.zeros(3 * scratch.piece + 15)
    noise.seed(1)
    noise.add([(long, long, 1.0)], 1.0)
    assert torch.equal(long, _at_once(long.shape, torch.Generator().manual_seed(1)))


def test_seed_zero_is_a_seed():
    drawn = []
    for seed in (0, 1, 0):
        z = torch.zeros(5)
        _noise(seed=seed).add([(z, z, 1.0)], 1.0)
        drawn.append(z)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], _at_once((5,), torch.Generator().manual_seed(0)))
