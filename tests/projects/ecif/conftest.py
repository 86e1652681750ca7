"""A trained problem for all tests; what makes it is in `ecif_problems`, which tests import
(pytest's importlib mode knows no siblings).
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ecif_problems import make, normal, train

from projects.ecif import Contrastive, Pairs


@pytest.fixture(scope="session")
def trained() -> tuple[Contrastive, torch.Tensor]:
    problem = make()
    return problem, train(problem)


@pytest.fixture(scope="session")
def validation(trained) -> Contrastive:
    return Contrastive(
        trained[0].towers, Pairs.of((normal(9, 5, seed=8), normal(9, 7, seed=9)), 5), 0.0
    )
