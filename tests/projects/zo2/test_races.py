"""What the lanes promise on a GPU, held against all timings on a fake one (`tests/fake_cuda.py`):
nobody reads or writes bytes that another stream may still be writing, and no copy that is to run
beside computation comes from pageable memory, where it could not.
"""

import itertools

import pytest
import torch

from projects.zo2 import lanes, storage
from projects.zo2.lanes import Pager
from projects.zo2.storage import Codec, DiskStore, Field, Layout, RamStore, safetensors_writer
from tests.fake_cuda import FakeCuda

GPU = torch.device("cuda")
BLOCKS = 5


@pytest.fixture
def gpu(monkeypatch):
    return FakeCuda(monkeypatch, lanes, storage)


def fields(block):
    return [
        Field(f"{block}.weight", (64, 3), torch.float32, True),
        Field(f"{block}.frozen", (5,), torch.float32, False),
    ]


def stores(tmp_path, tier, cast):
    layouts = [Layout(fields(block)) for block in range(BLOCKS)]
    stored = torch.bfloat16 if cast else None
    codecs = [Codec(layout, layout.stored_as(stored), stochastic=False) for layout in layouts]
    tensors = [
        {f.name: torch.full(f.shape, float(block)) for f in fields(block)}
        for block in range(BLOCKS)
    ]
    if tier == "ram":
        store = RamStore(codecs, pinned=True)
        for block in range(BLOCKS):
            store.fill(block, tensors[block])
        return store
    every = [f for codec in codecs for f in codec.stored.fields]
    path = tmp_path / "weights.safetensors"
    with safetensors_writer(path, every) as writer:
        for f in every:
            writer.write(tensors[int(f.name[0])][f.name])
    return DiskStore(path, codecs, GPU)


def walk(gpu, pager, visits):
    """What an engine does with the blocks: a kernel changes the weights of most, none of some."""
    for number, block in enumerate(visits):
        buffer = pager.acquire(block)
        writes = number % 4 != 3
        gpu.launch(reads=[buffer], writes=[buffer] if writes else [])
        del buffer  # as parameters let it go: the slot has it alone
        pager.release(block, write=writes)


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize(("overlap", "reuse"), list(itertools.product([True, False], repeat=2)))
def test_no_stream_touches_what_another_may_be_writing(
    gpu, tmp_path, tier, cast, slots, overlap, reuse
):
    store = stores(tmp_path, tier, cast)
    nbytes = max(codec.layout.nbytes for codec in store.codecs)
    pager = Pager(store, BLOCKS, nbytes, GPU, slots, overlap, reuse, trace=False)
    walk(gpu, pager, [*range(BLOCKS)] * 2 + [*reversed(range(BLOCKS))] + [0, 0, 3, 0, 3])
    pager.settle()
    pager.drop()
    walk(gpu, pager, range(BLOCKS))
    pager.close()
    assert gpu.races == []
    assert gpu.pageable == []


def test_what_an_engine_reads_after_settling_is_there(gpu, tmp_path):
    """The host reads the store itself: a save, an evaluation elsewhere."""
    store = stores(tmp_path, "ram", cast=False)
    pager = Pager(store, BLOCKS, store.codecs[0].layout.nbytes, GPU, 3, True, True, trace=False)
    walk(gpu, pager, range(BLOCKS))
    pager.settle()
    gpu.on_host(reads=store._blocks, what="save")
    pager.close()
    assert gpu.races == []
