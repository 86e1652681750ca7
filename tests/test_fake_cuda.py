"""The fake GPU finds races that are there, and none that are not."""

from types import ModuleType

import pytest
import torch

from tests.fake_cuda import FakeCuda


@pytest.fixture
def gpu(monkeypatch):
    return FakeCuda(monkeypatch, ModuleType("nobody"))


def buffer(gpu, nbytes=8):
    return gpu.torch.empty(nbytes, dtype=torch.uint8, device="cuda")


def test_two_streams_that_nobody_orders_race(gpu):
    memory, other = buffer(gpu), gpu.torch.cuda.Stream()
    gpu.launch(writes=[memory], what="first")
    with gpu.torch.cuda.stream(other):
        gpu.launch(reads=[memory], what="second")
    (race,) = gpu.races
    assert "first and second" in race


@pytest.mark.parametrize("how", ["event", "stream", "host", "host's event"])
def test_a_wait_orders_them(gpu, how):
    memory, other = buffer(gpu), gpu.torch.cuda.Stream()
    gpu.launch(writes=[memory])
    first = gpu.torch.cuda.current_stream()
    if how == "event":
        other.wait_event(first.record_event())
    elif how == "stream":
        other.wait_stream(first)
    elif how == "host":
        first.synchronize()
    else:
        first.record_event().synchronize()
    with gpu.torch.cuda.stream(other):
        gpu.launch(writes=[memory])
    assert gpu.races == []


def test_an_event_orders_only_what_was_queued_before_it(gpu):
    memory, other = buffer(gpu), gpu.torch.cuda.Stream()
    event = gpu.torch.cuda.current_stream().record_event()
    gpu.launch(writes=[memory])
    other.wait_event(event)
    with gpu.torch.cuda.stream(other):
        gpu.launch(writes=[memory])
    assert len(gpu.races) == 1


def test_reads_of_the_same_and_writes_of_different_bytes_do_not_race(gpu):
    read, memory = buffer(gpu), buffer(gpu)
    for part in (memory[:4], memory[4:]):
        with gpu.torch.cuda.stream(gpu.torch.cuda.Stream()):
            gpu.launch(reads=[read], writes=[part])
    assert gpu.races == []


def test_the_host_races_with_a_copy_that_it_does_not_wait_for(gpu):
    host = gpu.torch.empty(8, pin_memory=True)
    device = buffer(gpu)
    host.copy_(device, non_blocking=True)
    gpu.on_host(reads=[host])
    assert len(gpu.races) == 1
    host.copy_(device)
    gpu.on_host(reads=[host])
    assert len(gpu.races) == 1


def test_memory_that_is_freed_while_another_stream_uses_it_races(gpu):
    """Its own stream may: what that gets to do with it next is queued behind."""
    memory = buffer(gpu)
    gpu.launch(writes=[memory])
    del memory
    assert gpu.races == []
    memory = buffer(gpu)
    with gpu.torch.cuda.stream(gpu.torch.cuda.Stream()):
        gpu.launch(reads=[memory], what="kernel")
    del memory
    (race,) = gpu.races
    assert "kernel and freed" in race


def test_a_task_in_a_thread_is_after_what_was_before_its_submission_and_before_its_result(gpu):
    memory, pool = torch.zeros(4), gpu.executor(1)
    gpu.on_host(writes=[memory])
    done = pool.submit(lambda: gpu.on_host(writes=[memory]))
    done.result()
    gpu.on_host(writes=[memory])
    assert gpu.races == []
    pool.submit(lambda: gpu.on_host(writes=[memory])).done()
    pool.shutdown()
    gpu.on_host(reads=[memory])
    assert len(gpu.races) == 1


def test_copies_beside_computation_need_page_locked_memory(gpu):
    pageable, device = gpu.torch.empty(8), buffer(gpu)
    device.copy_(pageable, non_blocking=True)
    assert len(gpu.pageable) == 1
    device.copy_(pageable)
    device.copy_(gpu.torch.empty(8, pin_memory=True), non_blocking=True)
    assert len(gpu.pageable) == 1


def test_collectives_of_two_groups_that_may_be_under_way_together_are_told(gpu):
    memory = buffer(gpu)
    gpu.collective("world", [memory], [])
    gpu.torch.cuda.current_stream().synchronize()
    with gpu.torch.cuda.stream(gpu.torch.cuda.Stream()):
        gpu.collective("slices", [memory], [])
    assert gpu.overlapping == []
    gpu.collective("world", [memory], [])
    assert gpu.overlapping == ["slices and world"]
