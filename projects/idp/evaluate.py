"""`evaluate`: accuracy on tasks drawn from the user's labelled images, against the baselines."""

import argparse
import csv
import io
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console

from projects.idp.align import FINE_TUNING, align
from projects.idp.baselines import nearest_mean
from projects.idp.classify import embed, ridge_head
from projects.idp.command import Evaluation
from projects.idp.inputs import Given, alignment, class_folders, load_source
from projects.idp.labels import METHODS
from shared.commands.folder import check_out
from shared.commands.pieces import Pieces, remove_pieces
from shared.commands.progress import Progress
from shared.files import atomic_write
from shared.seeding import step_seed
from shared.vision.episodes import Episodes, sample_episodes

COLUMNS = ("nearest_mean", "ridge", "fine_tuning", "idp")


def evaluate(options: argparse.Namespace) -> int:
    """Draw tasks from --target and write --out. Returns the exit status."""
    recipe = Evaluation.from_options(options)
    check_out(options.out, ".csv", what="accuracies")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    given = load_source(options, recipe)
    pool = class_folders(options.target, "--target", given.size, given.mode)
    tasks = sample_episodes(
        pool.labels, recipe.tasks, recipe.ways, recipe.shots, recipe.queries, recipe.seed
    )
    images = pool.images().to(given.device)
    inputs = {
        "recipe": recipe,
        "network": given.source.network,
        "codebook": given.codebook,
        "scale": given.source.scale,
        "images": pool.pixels,
        "labels": pool.labels,
    }
    starts = range(0, recipe.tasks, recipe.group)
    with Pieces(options.out, inputs) as pieces:
        found = []
        with Progress(console, 0, len(starts)) as progress:
            for number, start in enumerate(starts):
                part = slice(start, min(start + recipe.group, recipe.tasks))
                found.append(
                    pieces.array(
                        f"tasks-{start}",
                        lambda part=part: count(given, images, tasks, part, recipe),
                    )
                )
                progress.step(number + 1, 0, None)
        write(options, np.concatenate(found) / (recipe.ways * recipe.queries), console)
    remove_pieces(options.out)
    return 0


def count(
    given: Given, images: torch.Tensor, tasks: Episodes, part: slice, recipe: Evaluation
) -> np.ndarray:
    """Right answers of some tasks, [tasks, methods]."""
    support, query = images[tasks.support[part]], images[tasks.query[part]]
    seeds = [step_seed(recipe.seed, "adapt", n) for n in range(part.start, part.stop)]
    source, y = given.source, tasks.y_query[part].to(given.device)
    columns = []
    plans = {
        "ridge": replace(alignment(recipe), steps=0),
        "fine_tuning": alignment(recipe, FINE_TUNING),
        "idp": alignment(recipe),
    }
    for method, how in plans.items():
        network = align(
            source.network, support, recipe.ways, given.codebook, source.scale, how, seeds
        )
        s, q = embed(network, support, query, "inductive")
        if method == "ridge":
            means = nearest_mean(s.mean(2), q.mean(2), recipe.ways)
            columns.append((means.argmax(-1) == y).sum(1))
        columns.append((ridge_head(s, q, recipe.ways).argmax(-1) == y).sum(1))
    return torch.stack(columns, 1).cpu().numpy()


def write(options: argparse.Namespace, accuracy: np.ndarray, console: Console) -> None:
    """The table of means and of IDP's paired differences, with intervals over tasks."""
    half = 1.96 / np.sqrt(len(accuracy))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "accuracy", "half_interval", "idp_less_it", "its_half_interval"])
    for column, key in enumerate(COLUMNS):
        own, gap = accuracy[:, column], accuracy[:, -1] - accuracy[:, column]
        numbers = [own.mean(), half * own.std(ddof=1), gap.mean(), half * gap.std(ddof=1)]
        writer.writerow([METHODS[key].name, *(f"{value:.5f}" for value in numbers)])
        told = f"{METHODS[key].name:32} {numbers[0]:6.1%} ± {numbers[1]:.1%}"
        if key != "idp":
            told += f"   IDP less it {100 * numbers[2]:+.1f} ± {100 * numbers[3]:.1f} points"
        console.print(told, markup=False)
    atomic_write(options.out, buffer.getvalue().encode())
