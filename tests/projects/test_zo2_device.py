"""The device that a command runs on has a number: torch sets a budget on nothing else."""

import pytest
import torch

from projects.zo2 import budget
from shared.commands.options import device_of
from shared.errors import UserError


@pytest.fixture
def cards(monkeypatch):
    """Two GPUs that are not there, the second the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(("given", "number"), [("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_a_number(cards, given, number):
    assert device_of(given) == torch.device("cuda", number)


def test_the_cpu_has_none():
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="use cpu or cuda"):
        device_of("abacus")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_budget_can_be_set_on_it():
    with budget.limit(10**9, device_of("cuda")):
        pass


def test_the_memory_of_the_process_is_what_the_meters_say():
    held = torch.ones(2**26, dtype=torch.uint8)
    assert budget.memory("VmHWM") >= held.nbytes
    assert budget.memory("VmData") >= held.nbytes
