"""The pager with a store that writes down what it is asked, and can be held up."""

import itertools
import threading
import time

import pytest
import torch

from projects.zo2.lanes import Lane, Pager

CPU = torch.device("cpu")
NBYTES = 64


class Shelf:
    """Blocks of one number each. `events` is what was asked for; an open gate lets a call
    through.
    """

    def __init__(self, blocks):
        self.values = [float(b) for b in range(blocks)]
        self.events, self.gates, self.broken, self.closed = [], {}, set(), False
        self.reading = self.writing = 0

    def _hold(self, what, block):
        if (what, block) in self.gates:
            assert self.gates[what, block].wait(5)
        if (what, block) in self.broken:
            raise OSError(f"{what} {block}")

    def read(self, block, device):
        self._hold("read", block)
        time.sleep(0.001)
        device.view(torch.float32)[0] = self.values[block]
        self.events.append(("read", block))
        return 10

    def write(self, block, device, generator=None):
        self._hold("write", block)
        time.sleep(0.001)
        self.values[block] = device.view(torch.float32)[0].item()
        self.events.append(("write", block))
        return 7

    def close(self):
        self.closed = True


def _pager(shelf, slots=3, overlap=True, reuse=True):
    return Pager(shelf, len(shelf.values), NBYTES, CPU, slots, overlap, reuse, trace=True)


def _value(buffer):
    return buffer.view(torch.float32)[0]


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("reuse", [True, False])
def test_every_visit_finds_what_the_last_one_left(blocks, slots, overlap, reuse):
    shelf = Shelf(blocks)
    pager = _pager(shelf, slots, overlap, reuse)
    order = [*range(blocks)] * 4 + [*reversed(range(blocks))] + [0, 0, blocks - 1, 0, 0]
    wanted = [float(b) for b in range(blocks)]
    for block in order:
        buffer = pager.acquire(block)
        assert _value(buffer) == wanted[block]
        _value(buffer).add_(100)
        wanted[block] += 100
        pager.release(block, write=True)
    pager.settle()
    assert shelf.values == wanted
    assert sum(pager.traffic.offloads.values()) == len(order)
    assert pager.traffic.bytes_down == 7 * len(order)
    assert pager.traffic.bytes_up == 10 * sum(pager.traffic.uploads.values())
    if reuse:
        assert len(pager.pointers) == slots
    pager.close()
    assert shelf.closed


def test_the_next_block_is_uploaded_while_one_computes():
    shelf = Shelf(4)
    pager = _pager(shelf)
    pager.acquire(0)
    pager.settle()
    assert shelf.events == [("read", 0), ("read", 1)]
    pager.release(0, write=True)
    pager.close()


@pytest.mark.parametrize("blocks", [2, 4])
def test_the_first_block_is_uploaded_for_the_next_step_while_the_last_one_computes(blocks):
    shelf = Shelf(blocks)
    pager = _pager(shelf)
    for block in range(blocks):
        pager.acquire(block)
        if block < blocks - 1:
            pager.release(block, write=True)
    pager.settle()
    assert [block for what, block in shelf.events if what == "read"] == [*range(blocks), 0]
    pager.release(blocks - 1, write=True)
    pager.acquire(0)  # is there
    assert pager.traffic.uploads[0] == 2
    pager.release(0, write=False)
    pager.close()


def test_without_overlap_nothing_is_uploaded_ahead():
    shelf = Shelf(4)
    pager = _pager(shelf, overlap=False)
    for block in range(4):
        pager.acquire(block)
        pager.release(block, write=True)
    assert shelf.events == [(what, b) for b in range(4) for what in ("read", "write")]
    pager.close()


def test_a_block_is_not_uploaded_before_its_own_write_has_ended():
    shelf = Shelf(2)
    shelf.gates["write", 0] = threading.Event()
    pager = _pager(shelf, slots=3)
    buffer = pager.acquire(0)
    _value(buffer).fill_(42)
    pager.release(0, write=True)
    pager.acquire(1)  # asks for block 0 ahead of time, in another slot
    time.sleep(0.05)
    assert shelf.events == [("read", 0), ("read", 1)]
    shelf.gates["write", 0].set()
    pager.release(1, write=True)
    assert _value(pager.acquire(0)) == 42
    pager.release(0, write=False)
    pager.close()


def test_a_slot_is_not_filled_before_it_has_drained():
    shelf = Shelf(3)
    shelf.gates["write", 0] = threading.Event()
    pager = _pager(shelf, slots=1)
    _value(pager.acquire(0)).fill_(42)
    pager.release(0, write=True)
    time.sleep(0.05)
    assert shelf.events == [("read", 0)]
    shelf.gates["write", 0].set()
    assert _value(pager.acquire(1)) == 1
    pager.release(1, write=False)
    pager.close()
    assert shelf.values[0] == 42


def test_a_visit_without_a_write_leaves_the_store_alone():
    shelf = Shelf(3)
    pager = _pager(shelf)
    _value(pager.acquire(1)).fill_(42)
    pager.release(1, write=False)
    assert _value(pager.acquire(0)) == 0
    pager.release(0, write=False)
    pager.drop()
    assert _value(pager.acquire(1)) == 1
    pager.release(1, write=False)
    assert pager.traffic.bytes_down == 0
    pager.close()


def test_a_slot_in_use_is_never_given_away():
    shelf = Shelf(4)
    pager = _pager(shelf, slots=2)
    held = pager.acquire(0)
    for block in (2, 3):
        assert _value(pager.acquire(block)) == block
        pager.release(block, write=False)
    assert _value(held) == 0
    pager.release(0, write=False)
    pager.close()
    pager = _pager(Shelf(2), slots=1)
    pager.acquire(0)
    with pytest.raises(AssertionError, match="was not released before the next"):
        pager.acquire(1)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("what", ["read", "write"])
def test_a_failed_transfer_is_raised_and_never_taken_for_a_success(overlap, what):
    shelf = Shelf(2)
    pager = _pager(shelf, slots=1, overlap=overlap)
    shelf.broken.add((what, 1))

    def visit(block):
        buffer = pager.acquire(block)
        assert _value(buffer) == block
        pager.release(block, write=True)

    visit(0)
    if what == "write":
        visit(1)  # fails behind the caller's back
    for _ in range(3):
        with pytest.raises(OSError, match=f"{what} 1"):
            visit(1)
        with pytest.raises(OSError, match=f"{what} 1"):
            pager.settle()
    assert shelf.values == [0.0, 1.0]


def test_waiting_is_counted():
    shelf = Shelf(2)
    shelf.gates["read", 0] = threading.Event()
    pager = _pager(shelf)
    threading.Timer(0.1, shelf.gates["read", 0].set).start()
    pager.acquire(0)
    assert 0.05 < pager.traffic.waited < 2
    pager.release(0, write=False)
    pager.close()


def test_tasks_of_a_lane_run_one_after_the_other():
    lane, order = Lane("test", CPU, overlap=True), []
    futures = [
        lane.submit(lambda i=i: (time.sleep(0.01 * (3 - i)), order.append(i))) for i in range(3)
    ]
    assert [f.result() for f in futures] == [None] * 3
    assert order == [0, 1, 2]
    lane.close()


def test_spans_tell_what_a_lane_did():
    shelf = Shelf(2)
    pager = _pager(shelf)
    for block in (0, 1):
        pager.acquire(block)
        pager.release(block, write=True)
    pager.settle()
    assert {(s.lane, s.block) for s in pager.spans} >= {
        ("upload", 0),
        ("upload", 1),
        ("offload", 0),
        ("offload", 1),
    }
    for lane in ("upload", "offload"):
        spans = [s for s in pager.spans if s.lane == lane]
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    pager.close()
