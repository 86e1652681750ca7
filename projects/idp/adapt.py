"""`adapt`: one task of the user's, from a few labelled images to predictions for others."""

import argparse
import csv
import io

from rich.console import Console

from projects.idp.align import align
from projects.idp.classify import embed, propagate, ridge_head
from projects.idp.command import Prediction
from projects.idp.inputs import alignment, class_folders, load_source, pictures
from shared.commands.folder import check_out
from shared.errors import UserError
from shared.files import atomic_write


def adapt(options: argparse.Namespace) -> int:
    """Adapt to --support, classify --query, write --out. Returns the exit status."""
    recipe = Prediction.from_options(options)
    check_out(options.out, ".csv", what="predictions")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    given = load_source(options, recipe)
    few = class_folders(options.support, "--support", given.size, given.mode)
    counts = few.labels.bincount().tolist()
    if len(set(counts)) > 1:
        raise UserError(
            f"--support {options.support}: classes have {min(counts)} to {max(counts)} images; give"
            " each as many"
        )
    names, query, labels = pictures(options.query, given.size, given.mode, few.classes)
    ways = len(few.classes)
    support = few.images().to(given.device).unsqueeze(0)
    query = query.to(given.device).unsqueeze(0)
    source = given.source
    console.print(
        f"{ways} classes of {counts[0]}, {len(names)} queries, {recipe.steps} steps", markup=False
    )
    network = align(
        source.network,
        support,
        ways,
        given.codebook,
        source.scale,
        alignment(recipe),
        [recipe.seed],
    )
    s, q = embed(network, support, query, recipe.inference)
    scores = ridge_head(s, q, ways)
    if recipe.propagate:
        scores = propagate(scores, q.mean(2), recipe.inference)
    best = scores[0].argmax(1).tolist()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["file", "class", *few.classes])
    for name, label, row in zip(names, best, scores[0].tolist(), strict=True):
        writer.writerow([name, few.classes[label], *(f"{value:.6g}" for value in row)])
    atomic_write(options.out, buffer.getvalue().encode())
    said = ""
    if labels is not None:
        right = sum(a == b for a, b in zip(best, labels.tolist(), strict=True))
        said = f", accuracy {right / len(best):.1%}"
    console.print(f"{options.out}: {len(best)} predictions, {recipe.inference}{said}", markup=False)
    return 0
