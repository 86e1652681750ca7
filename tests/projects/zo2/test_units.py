"""Taking a model apart."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from projects.zo2.units import find_blocks, partition
from shared.errors import UserError


def _mlp(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.frozen_token = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.embed = nn.Embedding(7, 4)
        self.small = _mlp(2, 2)
        self.empty = nn.ModuleList([nn.ReLU()])
        self.body = nn.ModuleDict(
            {"layers": nn.ModuleList(_mlp(4, 5, 4) for _ in range(3)), "norm": nn.LayerNorm(4)}
        )
        self.extra = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.head = nn.Linear(4, 7)


def _names(units):
    return [u.name for u in units]


def test_the_largest_container_is_taken():
    assert list(find_blocks(Model())) == ["body.layers.0", "body.layers.1", "body.layers.2"]


def test_containers_may_be_named():
    assert list(find_blocks(Model(), ["small"])) == ["small.0"]
    assert list(find_blocks(Model(), ["small", "body.layers"])) == [
        "small.0",
        *(f"body.layers.{i}" for i in range(3)),
    ]
    assert list(find_blocks(Model(), ["body.layers.1"])) == ["body.layers.1.0", "body.layers.1.1"]


@pytest.mark.parametrize(
    "model", [_mlp(2, 3, 3, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])]
)
def test_a_model_that_is_a_container(model):
    assert list(find_blocks(model)) == [n for n, _ in model.named_children()]


def test_layers_without_parameters_are_no_blocks():
    assert list(find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))) == [
        "0",
        "2",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nope"], "no module 'nope'; its containers are: small, body.layers, extra"),
        (["head"], "nothing in there"),
    ],
)
def test_names_that_hold_no_blocks_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        find_blocks(Model(), names)


def test_a_model_without_a_container_is_refused():
    with pytest.raises(UserError, match="no ModuleList or Sequential that holds parameters"):
        find_blocks(nn.Linear(2, 2))


def test_every_trainable_parameter_has_one_place():
    model = Model()
    parts = partition(model)
    assert _names(parts.blocks) == ["body.layers.0", "body.layers.1", "body.layers.2"]
    assert [b.block for b in parts.blocks] == [0, 1, 2]
    assert list(parts.root) == ["token"]
    assert _names(parts.resident) == ["embed", "small", "body.norm", "extra.0", "head"]
    assert all(u.block is None for u in parts.resident)
    assert parts.shared == {model.token}
    placed = [*parts.root, *(n for u in (*parts.blocks, *parts.resident) for n in u.parameters)]
    assert sorted(placed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_parameters_are_in_registration_order():
    assert list(partition(Model()).blocks[1].parameters) == [
        f"body.layers.1.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")
    ]


def test_tied_weights_are_shared():
    model = Model()
    model.head.weight = model.embed.weight
    parts = partition(model)
    assert parts.shared == {model.token, model.embed.weight}


def test_a_module_registered_twice_is_shared():
    model = Model()
    model.again = model.small
    parts = partition(model)
    assert _names(parts.resident).count("small") == 1
    assert parts.shared == {model.token, *model.small.parameters()}


def test_a_module_may_be_declared_shared():
    model = Model()
    assert partition(model, shared=["head"]).shared == {model.token, *model.head.parameters()}
    with pytest.raises(
        UserError,
        match=r"shared=\['body.layers.0'\]: not a resident module; those are embed, small",
    ):
        partition(model, shared=["body.layers.0"])


def test_blocks_may_not_share_with_anything():
    model = Model()
    model.body["layers"][2][0].weight = model.body["layers"][0][0].weight
    with pytest.raises(
        UserError, match=r"block 'body.layers.2' shares a parameter with 'body.layers.0'"
    ):
        partition(model)
    model = Model()
    model.body["layers"][1][1].bias = model.body["norm"].bias
    with pytest.raises(
        UserError, match=r"block 'body.layers.1' shares a parameter with 'body.norm'"
    ):
        partition(model)


def test_a_frozen_parameter_shared_with_a_block_is_refused_as_well():
    model = Model()
    model.body["layers"][0][1].weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    model.frozen.weight = model.body["layers"][0][1].weight
    with pytest.raises(UserError, match="shares a parameter with 'frozen'"):
        partition(model)
