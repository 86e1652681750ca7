"""Bringing the head under test: what is brought, how often, and in what order on a GPU (a fake one,
`tests/fake_cuda.py`, which finds the races of all timings).
"""

import itertools

import pytest
import torch

from projects.pahq import scheduler
from projects.pahq.engine import Engine
from projects.pahq.families import decoder_of
from projects.pahq.metrics import Kl
from projects.pahq.policy import Policy
from projects.pahq.scheduler import PLACEMENTS, Resident, Uploaded, masters
from projects.pahq.search import high_heads, search
from tests.fake_cuda import FakeCuda
from tests.projects.pahq.conftest import configuration, prompts, shaken

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def decoder(request):
    return decoder_of(shaken(configuration(request.param)))


def visits(graph):
    """Heads as a search visits them, each with the one that comes after it."""
    order = [h for receiver in graph.search_order() for h in high_heads(graph, receiver)[:1]]
    return list(itertools.zip_longest(order, order[1:]))


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("outputs", [True, False])
def test_slices_are_those_of_the_model(decoder, prefetch, outputs):
    graph, resident = decoder.graph, Resident(decoder)
    brought = Uploaded(decoder, CPU, prefetch, outputs)
    for head, after in visits(graph):
        brought.use(head, after)
        layer, number = head
        first = graph.first_reader(layer)
        receivers = [r - first for r in graph.inputs_of(graph.head(layer, number))]
        assert torch.equal(brought.qkv(layer, receivers), resident.qkv(layer, receivers))
        if outputs:
            assert torch.equal(brought.out(layer, number), resident.out(layer, number))


def test_a_key_value_head_is_brought_once_and_all_but_the_first_ahead(decoder):
    graph = decoder.graph
    for prefetch in (True, False):
        brought = Uploaded(decoder, CPU, prefetch, False)
        for head, after in visits(graph):
            brought.use(head, after)
        assert brought.uploads == graph.layers * graph.kv_heads
        assert brought.waits == (1 if prefetch else brought.uploads)
        assert brought.uploaded_bytes == sum(4 * layer.qkv.numel() for layer in decoder.layers)
        assert brought.room_bytes * brought.uploads == brought.uploaded_bytes * (1 + prefetch)


@pytest.mark.parametrize("scope", ["qkv", "linear"])
def test_the_circuit_does_not_depend_on_where_the_masters_are(decoder, scope):
    data = prompts()
    metric = Kl(Engine(decoder, *data).logits())
    policy, found = Policy("pahq-receiver", "int8", scope), []
    for placement in PLACEMENTS:
        brought = masters(decoder, placement, CPU, scope != "qkv")
        engine = Engine(decoder, *data, policy, masters=brought)
        found.append(search(engine, metric, 0.01))
        assert (found[0].mask == found[-1].mask).all()
        assert found[0].steps == found[-1].steps


def test_a_head_that_was_not_brought_is_not_used(decoder):
    brought = Uploaded(decoder, CPU, True, False)
    brought.use((0, 0), (0, 3))
    with pytest.raises(AssertionError, match="not brought"):
        brought.qkv(1, [0])


@pytest.mark.parametrize("prefetch", [True, False])
def test_no_stream_touches_what_another_may_be_writing(monkeypatch, decoder, prefetch):
    gpu = FakeCuda(monkeypatch, scheduler)
    brought = Uploaded(decoder, torch.device("cuda"), prefetch, True)
    for head, after in visits(decoder.graph) * 2:
        brought.use(head, after)
        for _ in range(3):  # evaluations, which read the slices
            gpu.launch(reads=[brought._rooms[brought._current]])
    assert gpu.races == []
    assert gpu.pageable == []
