"""How slices of blocks go between ranks on GPUs, on a fake one (`tests/fake_cuda.py`)."""

from types import SimpleNamespace

import pytest
import torch

from projects.distzo2 import slices
from projects.distzo2.slices import own_gpus, slice_transfers
from projects.zo2 import lanes, storage
from projects.zo2.lanes import Pager
from projects.zo2.storage import Codec, DiskStore, Field, Layout, safetensors_writer
from tests.fake_cuda import FakeCuda

GPU = torch.device("cuda")
BLOCKS, WORLD = 4, 2


class Ranks:
    """Rank 0 of two; the other says the same, but for its GPU."""

    rank, world = 0, WORLD

    def __init__(self, other_gpu):
        self.other_gpu = other_gpu

    def gather(self, own):
        assert own.device.type == "cpu"
        other = own if own.dim() else torch.tensor(self.other_gpu)
        return [own, other]


def numbered(monkeypatch, uuid):
    properties = SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(
    ("device", "other", "wanted"),
    [("cuda", "b", True), ("cuda", "a", False), ("cuda", None, False), ("cpu", "b", False)],
)
def test_ranks_have_gpus_of_their_own_where_all_have_one_and_no_two_the_same(
    device, other, wanted, monkeypatch
):
    """Each may see one GPU alone, number 0."""
    numbered(monkeypatch, "a")
    number = slices._number(other) if other else 0
    assert own_gpus(torch.device(device), Ranks(number)) is wanted


def engine(tmp_path):
    layout = [Layout([Field(f"{b}", (32,), torch.float32, True)]) for b in range(BLOCKS)]
    path = tmp_path / "weights.safetensors"
    with safetensors_writer(path, [f for each in layout for f in each.fields]) as writer:
        for block in range(BLOCKS):
            writer.write(torch.full((32,), float(block)))
    store = DiskStore(path, [Codec(each, each, stochastic=False) for each in layout], GPU)
    pager = Pager(store, BLOCKS, layout[0].nbytes, GPU, 3, True, True, trace=False)

    def exchange_slices(place, count, complete):
        store.part = (place, count)
        pager.exchange_through(complete, count * store.slice_nbytes(0))

    return SimpleNamespace(store=store, device=GPU, exchange_slices=exchange_slices), pager


@pytest.mark.parametrize("direct", [True, False])
def test_no_two_groups_of_nccl_are_under_way_at_once_and_no_stream_races(
    direct, tmp_path, monkeypatch
):
    """Another group's collective, begun in another order on another rank, could wait for good."""
    numbered(monkeypatch, "a")
    gpu = FakeCuda(monkeypatch, lanes, storage, slices)
    backends = {}

    def gathered(whole, own, group):
        if backends[group] == "nccl":
            gpu.collective(group, [own], [whole])
        else:
            assert not own.is_cuda
            gpu.on_host([own], [whole])

    def new_group(members, backend):
        backends["slices"] = backend
        return "slices"

    fake = SimpleNamespace(new_group=new_group, all_gather_into_tensor=gathered)
    monkeypatch.setattr(slices, "dist", fake)
    made, pager = engine(tmp_path)
    slice_transfers(made, Ranks(slices._number("b" if direct else "a")))
    assert backends == {"slices": "nccl" if direct else "gloo"}
    for block in [*range(BLOCKS)] * 3:
        buffer = pager.acquire(block)
        gpu.launch(reads=[buffer], writes=[buffer])
        del buffer
        pager.release(block, write=True)
    pager.close()
    assert gpu.races == []
    assert gpu.overlapping == []
