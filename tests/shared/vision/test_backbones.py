"""Backbones by name: features are the mean of the spatial map; weights are of the seed; nothing is
downloaded.
"""

import socket

import pytest
import torch
from torch import nn

from shared.data import cache
from shared.errors import UserError
from shared.vision.backbones import backbone, conv4, initialised, mlp

SHAPE = (3, 64, 64)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)


def images(n: int = 2, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "width", "edge"),
    [
        ("conv4-16", 16, 4),
        ("residual-8-16-32", 32, 8),
        ("quarter-4-8-12", 12, 16),
        ("resnet10", 512, 2),
        ("resnet18", 512, 2),
        ("resnet34", 512, 2),
        ("timm:mobilenetv3_small_050", 288, 2),
    ],
)
def test_features_are_the_mean_of_the_map(name, width, edge):
    model = backbone(name, SHAPE, seed=0)
    with torch.no_grad():
        found, features = model.spatial_map(images()), model(images())
    assert found.shape == (2, width, edge, edge)
    assert features.shape == (2, model.width)
    if not name.startswith("timm:mobilenet"):  # whose head has a layer of its own
        assert model.width == width
        assert torch.allclose(found.mean((2, 3)), features, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "edge"),
    [("conv4-4", 64), ("residual-4-8", 64), ("quarter-8-8-8", 64), ("resnet10", 256)],
)
def test_the_map_shows_where_something_is(name, edge):
    """A bright spot in the upper right corner moves the upper right of the map most."""
    model = backbone(name, SHAPE, seed=1)
    plain, spot = torch.zeros(2, 1, 3, edge, edge)
    spot[:, :, edge // 16 : edge // 5, -edge // 5 : -edge // 16] = 5
    with torch.no_grad():
        change = (model.spatial_map(spot) - model.spatial_map(plain)).abs().sum(1)[0]
    row, column = divmod(int(change.argmax()), len(change))
    assert row < len(change) / 2 <= column


def test_a_map_with_channels_last_is_turned():
    model = backbone("timm:swinv2_tiny_window8_256", (3, 256, 256), seed=0)
    with torch.no_grad():
        found = model.spatial_map(images(1, (3, 256, 256)))
    assert found.shape == (1, 768, 8, 8)


def test_grey_images_go_in_too():
    for name in ("conv4-4", "residual-4", "resnet10"):
        assert len(backbone(name, (1, 32, 32))(images(2, (1, 32, 32)))) == 2


def test_three_blocks_make_28_pixels_3():
    assert backbone("residual-16-32-64", (3, 28, 28)).spatial_map(images(2, (3, 28, 28))).shape == (
        2,
        64,
        3,
        3,
    )


def test_an_mlp_takes_any_shape_and_has_no_map():
    model = backbone("mlp-5-4", (2, 3))
    assert model(torch.zeros(7, 2, 3)).shape == (7, model.width) == (7, 4)
    assert isinstance(model[-1], nn.Tanh)
    assert isinstance(backbone("mlp-5-4", (2, 3), logits=True)[-1], nn.Linear)
    with pytest.raises(UserError, match="no spatial map"):
        model.spatial_map(torch.zeros(7, 2, 3))


def test_no_third_derivative_is_in_the_way_of_a_norm():
    """meta-IF differentiates conv4 three times."""
    kinds = {type(layer) for layer in conv4(3, 4)}
    assert kinds == {nn.Conv2d, nn.Softplus, nn.AdaptiveAvgPool2d, nn.Flatten}


@pytest.mark.parametrize("name", ["mlp-4", "conv4-4", "residual-4", "resnet10"])
def test_weights_are_of_the_seed_and_the_generator_stays(name):
    before = torch.random.get_rng_state()
    a, b, c = (backbone(name, (3, 16, 16), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_drawn_again_is_drawn_from_the_seed():
    wanted = backbone("mlp-4-3", (5,), seed=3).state_dict()
    found = initialised(mlp((5, 4, 3)), 3).state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("conv4", "there is no backbone 'conv4'"),
        ("conv4-0", "there is no backbone"),
        ("conv4-4-4", "there is no backbone"),
        ("mlp", "use mlp-WIDTH"),
        ("resnet99", "there is no backbone"),
        ("timm:resnet99", "timm has no model 'resnet99'"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "timm has no model"),
    ],
)
def test_what_there_is_not_is_one_line(name, line):
    with pytest.raises(UserError, match=line):
        backbone(name, SHAPE)


@pytest.mark.parametrize("name", ["conv4-4", "resnet18", "timm:resnet18"])
def test_images_have_three_axes(name):
    with pytest.raises(UserError, match="takes images"):
        backbone(name, (12,))


def test_tokens_are_no_map():
    model = backbone("timm:vit_tiny_patch16_224", (3, 224, 224))
    with pytest.raises(UserError, match="no spatial map"), torch.no_grad():
        model.spatial_map(images(1, (3, 224, 224)))


@pytest.mark.data
def test_the_pretrained_one_is_of_the_catalogue():
    if not cache.is_complete("efficientnet-lite0"):
        pytest.skip("efficientnet-lite0 is not in the cache")
    model = backbone("efficientnet-lite0", SHAPE)
    with torch.no_grad():
        found, features = model.spatial_map(images()), model(images())
    assert found.shape == (2, 1280, 2, 2)
    assert torch.allclose(found.mean((2, 3)), features, atol=1e-5)
    with pytest.raises(UserError, match="RGB"):
        backbone("efficientnet-lite0", (1, 64, 64))
