"""Closures in lockstep: who runs when, what is kept apart, how they end."""

import contextvars

import pytest
import torch

from projects.zo2.streams import Lockstep
from shared.errors import UserError


def test_closures_take_turns_from_pause_to_pause():
    lockstep, events = Lockstep(), []

    def closure(index):
        for label in "ab":
            events.append((label, index, lockstep.active))
            lockstep.pause(label)
        return index * 10

    assert lockstep.run([lambda i=i: closure(i) for i in range(3)]) == [0, 10, 20]
    assert events == [(label, i, i) for label in "ab" for i in range(3)]
    assert lockstep.active == 0


def test_closures_without_a_pause_just_run():
    assert Lockstep().run([lambda: 1, lambda: 2]) == [1, 2]


@pytest.mark.parametrize("labels", [("a", "b"), ("ab", "a"), ("a", "ab"), ("", "a")])
def test_different_pauses_are_refused(labels):
    lockstep, unwound = Lockstep(), []

    def closure(mine):
        try:
            for label in mine:
                lockstep.pause(label)
        finally:
            unwound.append(mine)

    with pytest.raises(UserError, match="took different paths"):
        lockstep.run([lambda m=m: closure(m) for m in labels])
    assert sorted(unwound) == sorted(labels)


@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_unwinds_all_and_comes_out(culprit, error):
    lockstep, begun, unwound = Lockstep(), [], []

    def closure(index):
        begun.append(index)
        try:
            lockstep.pause("a")
            if index == culprit:
                raise error("mine")
            lockstep.pause("b")
        finally:
            unwound.append((index, lockstep.active))

    with pytest.raises(error, match="mine"):
        lockstep.run([lambda i=i: closure(i) for i in range(3)])
    assert sorted(unwound) == [(i, i) for i in begun]
    assert lockstep.active == 0
    assert lockstep.run([lambda: 5]) == [5]


def _context():
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


def test_what_torch_keeps_per_thread_is_kept_per_closure():
    lockstep, seen = Lockstep(), {}

    def casting():
        with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
            lockstep.pause("a")
            seen["casting"] = _context()[:3]
        lockstep.pause("b")
        seen["after"] = _context()

    def plain():
        lockstep.pause("a")
        seen["plain"] = _context()
        lockstep.pause("b")

    before = _context()
    lockstep.run([casting, plain, casting])
    assert seen["casting"] == (False, True, torch.float16)
    assert seen["plain"] == seen["after"] == before == _context()


def test_the_threads_state_is_as_before_after_an_exception():
    lockstep = Lockstep()

    def closure():
        with torch.autocast("cpu"), torch.set_grad_enabled(False):
            torch.set_autocast_cache_enabled(False)
            lockstep.pause("a")
            raise LookupError

    before = _context()
    with pytest.raises(LookupError):
        lockstep.run([closure, closure])
    assert _context() == before


def test_context_variables_come_along_and_stay_apart():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(1)
    lockstep, seen = Lockstep(), []

    def closure(index):
        seen.append(variable.get())
        variable.set(10 + index)
        lockstep.pause("a")
        seen.append(variable.get())

    lockstep.run([lambda: closure(0), lambda: closure(1)])
    assert seen == [1, 1, 10, 11]
    assert variable.get() == 1


def test_inference_mode_is_refused_inside_and_allowed_around():
    lockstep = Lockstep()

    def closure():
        with torch.inference_mode():
            lockstep.pause("a")
        return 1

    with pytest.raises(UserError, match=r"must not enter torch.inference_mode"):
        lockstep.run([closure, closure])
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        assert lockstep.run([closure, closure]) == [1, 1]
