"""Controls that train nothing: the majority, the neighbours themselves, a class's concepts copied.

The trained ones (CBM, CEM, with pseudo labels as targets, FixMatch) are settings of `training`.
"""

from torch import Tensor
from torch.nn.functional import one_hot

from projects.sscbm.metrics import Predictions
from projects.sscbm.pseudo import nearest, weights_of


def majority(concepts: Tensor, labels: Tensor, images: int, classes: int) -> Predictions:
    """What most annotated images have, for so many test images.

    Args:
        concepts, labels: [annotated, k] and [annotated], of the annotated images.
    """
    commonest = labels.bincount(minlength=classes)
    return Predictions(concepts.mean(0).expand(images, -1), commonest.double().expand(images, -1))


def knn(
    concepts: Tensor, labels: Tensor, known: Tensor, features: Tensor, k: int, classes: int
) -> Predictions:
    """The pseudo labels of test images themselves, and the neighbours' weighted vote for the class.

    Args:
        concepts, labels, known: of the annotated images: [a, k], [a] and features [a, d].
        features: [n, d], of the test images.
    """
    distances, rows = nearest(features, known, k)
    w = weights_of(distances).float().unsqueeze(2)
    votes = (w * one_hot(labels[rows], classes)).sum(1)
    return Predictions((w * concepts[rows]).sum(1).clamp(0, 1), votes)


def propagated(labels: Tensor, concepts: Tensor) -> Tensor:
    """The concepts of each image's class, [n, k], from its first annotated image.

    Args:
        labels: [n]; every class has an annotated image.
        concepts: [n, k], NaN where not annotated.
    """
    found = concepts.clone()
    for label in labels.unique().tolist():
        of_class = labels == label
        annotated = (of_class & ~concepts.isnan().any(1)).nonzero()[0]
        found[of_class] = concepts[annotated]
    return found
