"""How good concepts and classes are, over a whole data set: the batches do not matter."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from projects.sscbm.model import ConceptModel


class Predictions(NamedTuple):
    """Of images: probabilities of concepts [n, k] and logits of classes [n, l]."""

    probabilities: Tensor
    logits: Tensor


class Scores(NamedTuple):
    """Over the cells that are annotated; `auc` is the mean over concepts that have both values."""

    concepts: float
    auc: float
    task: float


@torch.no_grad()
def predict(
    model: ConceptModel, images: Tensor, given: Tensor | None = None, batch: int = 256
) -> Predictions:
    """Of a model in eval mode, some images at a time; `given` [n, k] as of `model`."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        told = None if given is None else given[rows].to(device)
        out = model(images[rows].to(device), told)
        parts.append((out.probabilities.cpu(), out.logits.cpu()))
    return Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def scores(found: Predictions, labels: Tensor, concepts: Tensor) -> Scores:
    """Accuracy of the concepts at 0.5 and of the classes. Concepts that are NaN do not count."""
    task = float((found.logits.argmax(1) == labels).double().mean())
    return Scores(
        concept_accuracy(found.probabilities, concepts), auc(found.probabilities, concepts), task
    )


def concept_accuracy(probabilities: Tensor, concepts: Tensor) -> float:
    known = ~concepts.isnan()
    right = (probabilities > 0.5) == (concepts > 0.5)
    return float(right[known].double().mean())


def auc(probabilities: Tensor, concepts: Tensor) -> float:
    """Mean area under the ROC curve of the concepts that are present in some images and absent in
    others; 0.5 where there is none.
    """
    from sklearn.metrics import roc_auc_score

    areas = []
    for p, c in zip(probabilities.T.numpy(), concepts.T.numpy(), strict=True):
        known = ~np.isnan(c)
        if len(np.unique(c[known])) == 2:
            areas.append(roc_auc_score(c[known], p[known]))
    return float(np.mean(areas)) if areas else 0.5
