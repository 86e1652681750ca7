"""Streams of random numbers, and tokens drawn with them."""

import torch

from projects.infinite_sampling.streams import draw, occurrences, stream


def test_a_stream_is_its_own():
    numbers = stream(1, [2, 3], 4, 50)
    assert (numbers[:20] == stream(1, [2, 3], 4, 20)).all()
    assert (
        len(
            {
                float(stream(s, p, i, 1)[0])
                for s, p, i in ((1, [2, 3], 4), (2, [2, 3], 4), (1, [2, 4], 4), (1, [2, 3], 5))
            }
        )
        == 4
    )


def test_a_prompt_that_stands_twice_has_a_stream_of_its_own_each_time():
    assert occurrences([[1], [2], [1], [1, 2], [1]]) == [0, 0, 1, 0, 2]
    numbers = [float(stream(1, [1], i, 1, again)[0]) for i in range(3) for again in range(3)]
    assert len(set(numbers)) == 9
    assert numbers[0] == float(stream(1, [1], 0, 1)[0])


def test_tokens_are_drawn_from_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]]).double()
    numbers = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (1.0, 0.7):
        tokens, logprobs = draw(logits.expand(len(numbers), -1), numbers, temperature)
        chances = torch.softmax(logits[0] / temperature, -1)
        counts = torch.bincount(tokens, minlength=4)
        chi = float(((counts - len(numbers) * chances) ** 2 / (len(numbers) * chances)).sum())
        assert chi < 16.3  # p = 0.001 with 3 degrees of freedom
        assert torch.allclose(logprobs, chances.log()[tokens])
    impossible = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).double()
    for u in (0.0, 1 - 2**-53):
        assert draw(impossible, torch.tensor([u], dtype=torch.float64), 1.0)[0].item() == 1
