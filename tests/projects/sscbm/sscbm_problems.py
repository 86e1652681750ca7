"""Small models and data of the tests: odd shapes, no two sizes alike."""

import torch

from projects.sscbm.model import build
from projects.sscbm.training import Data, Losses, train
from shared.vision.backbones import backbone

SHAPE = (2, 12, 20)  # channels, height, width
CONCEPTS, CLASSES, SIZE = 5, 3, 4
SSCBM_LOSSES = Losses()
SSCBM_LOSSES = Losses()


def model(method="sscbm", seed=0, shape=SHAPE, dtype=torch.float32, **more):
    return build(
        method, lambda: backbone("quarter-3-6", shape), shape, CONCEPTS, CLASSES, size=SIZE,
        seed=seed, **more,
    ).to(dtype)  # fmt: skip


def images(n=11, seed=0, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def data(n=11, labelled=4, seed=0):
    """The first `labelled` images are annotated."""
    draw = torch.Generator().manual_seed(seed)
    truth = (torch.rand(n, CONCEPTS, generator=draw) > 0.5).float()
    concepts = truth.clone()
    concepts[labelled:] = torch.nan
    labels = torch.randint(0, CLASSES, (n,), generator=draw)
    pseudo = torch.rand(n, CONCEPTS, generator=draw)
    return Data(images(n, seed), labels, concepts, pseudo), truth


def state(one):
    return {name: value.clone() for name, value in one.state_dict().items()}


def trained(method, given, losses=SSCBM_LOSSES, seed=0, epochs=2, **more):
    found = model(method, seed, **more)
    train(found, given, losses, epochs=epochs, batch=4, rate=0.01, seed=seed)
    return found
