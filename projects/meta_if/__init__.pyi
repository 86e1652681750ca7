from .estimators import (
    adjoint,
    meta_test_loss,
    metric_gradient,
    task_removal,
    task_scores,
    train_removal,
    train_scores,
    val_removal,
    val_scores,
)
from .problems import Anil, Imaml, MamlUnrolled, MetaProblem, Tasks
from .total import at
from .training import fit, retrain

__all__ = [
    "Anil",
    "Imaml",
    "MamlUnrolled",
    "MetaProblem",
    "Tasks",
    "adjoint",
    "at",
    "fit",
    "meta_test_loss",
    "metric_gradient",
    "retrain",
    "task_removal",
    "task_scores",
    "train_removal",
    "train_scores",
    "val_removal",
    "val_scores",
]
