"""The names of methods, in the order of the tables, with their inference and colours."""

from typing import NamedTuple


class Method(NamedTuple):
    """A column of counts in the rows.

    Attributes:
        name: in tables and figures.
        inference: "inductive": a query is classified on its own; "transductive": with the others.
    """

    name: str
    inference: str


RIDGE, FINE_TUNING, IDP = "ridge", "fine_tuning", "idp"
RIDGE_BATCH, IDP_BATCH = "ridge_batch", "idp_batch"
RIDGE_PROPAGATED, IDP_PROPAGATED = "ridge_propagated", "idp_propagated"
NEAREST_MEAN = "nearest_mean"

METHODS = {
    NEAREST_MEAN: Method("nearest class mean", "inductive"),
    "simpleshot": Method("SimpleShot (easyfsl)", "inductive"),
    "finetune": Method("Finetune (easyfsl)", "inductive"),
    RIDGE: Method("ridge head, no adaptation", "inductive"),
    FINE_TUNING: Method("ridge, BatchNorm fine-tuned", "inductive"),
    IDP: Method("IDP", "inductive"),
    RIDGE_BATCH: Method("ridge, batch statistics", "transductive"),
    IDP_BATCH: Method("IDP, batch statistics", "transductive"),
    RIDGE_PROPAGATED: Method("ridge, batch statistics, propagation", "transductive"),
    IDP_PROPAGATED: Method("IDP, batch statistics, propagation", "transductive"),
    "bdcspn": Method("BD-CSPN (easyfsl)", "transductive"),
    "tim": Method("TIM (easyfsl)", "transductive"),
    "laplacianshot": Method("LaplacianShot (easyfsl)", "transductive"),
}

# targets, from the same sensor to no common structure, as tables name them
DISPLAY = {
    "quickdraw": "Quick, Draw! novel",
    "mnist": "MNIST",
    "digits": "optdigits",
    "letters": "letters (rendered)",
    "fashion-mnist": "Fashion-MNIST",
    "emoji": "emoji",
    "cifar10": "CIFAR-10",
    "photos": "photo tiles",
    "synthetic": "synthetic",
}
NEAR, GREY, FAR = (
    ("quickdraw",),
    ("mnist", "digits", "letters"),
    ("fashion-mnist", "emoji", "cifar10", "photos"),
)

CHANCE = 0.2  # of five ways
# of what IDP is compared with in the figure of differences
COLOURS = {FINE_TUNING: "blue", RIDGE: "black"}
