"""meta-IF: influence functions through the two levels of meta-learning (arXiv 2501.15963)."""

from projects.meta_if.estimators import (
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
from projects.meta_if.problems import Anil, Imaml, MamlUnrolled, MetaProblem, Tasks
from projects.meta_if.total import at
from projects.meta_if.training import fit, retrain

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
