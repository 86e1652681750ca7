"""What IDP is compared with on the same frozen features: nearest class mean, and easyfsl's methods.

easyfsl (MIT) takes one task at a time. Its methods get features centred by the source's mean and
of unit length, as SimpleShot has them.
"""

from typing import Any

import torch
from torch import Tensor

from shared.errors import UserError


def nearest_mean(support: Tensor, query: Tensor, ways: int) -> Tensor:
    """Minus the distance of pooled query features [tasks, q, d] from the mean of each class of the
    support [tasks, ways * shots, d], class after class: [tasks, q, ways].
    """
    means = support.unflatten(1, (ways, -1)).mean(2)
    return -torch.cdist(query, means)


def peers(centre: Tensor, steps: int, rate: float) -> dict[str, Any]:
    """easyfsl's classifiers by the name of their column.

    Args:
        centre: mean pooled feature of the source, [d].
        steps, rate: of Adam on the prototypes, for Finetune and TIM.

    Raises:
        UserError: easyfsl is not installed.
    """
    try:
        from easyfsl.methods import BDCSPN, TIM, Finetune, LaplacianShot, SimpleShot
    except ImportError:
        raise UserError(
            "easyfsl, whose methods IDP is compared with, is not installed: pip install --no-deps"
            " easyfsl==1.5.0"
        ) from None
    features: dict[str, Any] = {"feature_centering": centre, "feature_normalization": 2.0}
    tuned = {"fine_tuning_steps": steps, "fine_tuning_lr": rate, "temperature": 10.0}
    return {
        "simpleshot": SimpleShot(**features),
        "finetune": Finetune(**features, **tuned),
        "bdcspn": BDCSPN(**features),
        "tim": TIM(**features, **tuned),
        "laplacianshot": LaplacianShot(**features),
    }


def peer_scores(peer: Any, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Scores [q, ways] of one task by a classifier of `peers`, of pooled features."""
    peer.process_support_set(support, labels)
    with torch.no_grad():
        return peer(query)
