"""NaN and infinity are found wherever they are."""

import pytest
import torch

from shared.errors import UserError
from shared.finite import check_finite, is_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_wherever_it_is(dtype, wrong):
    tensor = torch.randn(3, 4).to(dtype)
    assert is_finite(tensor)
    for place in range(12):
        broken = tensor.clone()
        broken.view(-1)[place] = wrong
        assert not is_finite(broken)


def test_whole_numbers_and_tensors_without_numbers_are_finite():
    largest = torch.tensor([torch.finfo(torch.float32).max])
    eight = torch.ones(2).to(torch.float8_e4m3fn)
    whole, none, away = torch.arange(3), torch.empty(0), torch.empty(2, device="meta")
    for tensor in (whole, none, away, eight, largest):
        assert is_finite(tensor)


def test_a_model_that_is_not_finite_is_named_with_the_tensor():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    check_finite(model, "it")
    model[1].running_mean[1] = float("nan")
    with pytest.raises(UserError, match=r"^the trained model: '1.running_mean' holds NaN"):
        check_finite(model, "the trained model")
    with pytest.raises(UserError, match=r"^it: 'b' holds NaN"):
        check_finite([("a", torch.ones(1)), ("b", torch.tensor([float("inf")]))], "it")
