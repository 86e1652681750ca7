"""`score`: rank the user's image-text pairs by what each does to the loss of a validation set or of
one pair.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from projects.ecif.command import Scoring, Work
from projects.ecif.fit import check_trained, fit, solver
from projects.ecif.influence import Contrastive, relative
from projects.ecif.loss import pair_losses
from projects.ecif.pairs import Pairs
from projects.ecif.towers import Clip, Heads, TwoTower
from shared import models
from shared.commands.inputs import Array, user_arrays
from shared.commands.key import model_digest
from shared.commands.options import device_of
from shared.commands.pieces import Pieces
from shared.errors import UserError
from shared.influence.baselines import Metric, Solve, metric_gradient
from shared.influence.scoring import (
    check_ids,
    check_queries,
    check_scores_out,
    score_in_chunks,
    write_scores,
)
from shared.seeding import step_seed
from shared.vision.reading import read_image, to_picture

ARRAYS = {
    "text": Array("fiu", ("pairs", "features of a text")),
    "image": Array("fiu", ("pairs", "features of an image")),
    "ids": Array("USiu", ("pairs",), required=False),
}
BATCHES = 16  # batches that a chunk of the file of scores holds


@dataclass(frozen=True, eq=False)
class Inputs:
    """Pairs as tensors, and what to call them."""

    tensors: tuple[Tensor, ...]
    ids: list[str] | None = None
    captions: list[str] | None = None


# ---- the command ---------------------------------------------------------------------------------


def score(options: argparse.Namespace) -> int:
    """Rank the pairs of --data for --query and write --out. Returns the exit status."""
    recipe, work = Scoring.from_options(options), Work.from_options(options)
    check_scores_out(options.out)
    device = device_of(work.device)
    if work.threads:
        torch.set_num_threads(work.threads)
    console = Console(stderr=True, highlight=False)
    heads = options.model == "heads"
    if heads:
        data, query = (read_embeddings(file) for file in (options.data, options.query))
        sizes = (part.shape[-1] for part in data.tensors)
        model: Any = Heads(*sizes, recipe.size, recipe.seed).to(device)
    else:
        model, tokenizer, processor = load_clip(Path(options.model), options.adapter)
        data, query = (
            read_images(file, tokenizer, processor) for file in (options.data, options.query)
        )
        model.to(device)
    check_queries([part[:1] for part in data.tensors], query.tensors)
    if data.ids is not None:
        check_ids(data.ids, len(data.tensors[0]))
    tensors, queries = (tuple(part.to(device) for part in side.tensors) for side in (data, query))
    towers: TwoTower | Clip = (
        TwoTower(model)
        if heads
        else Clip(model, select=("*lora_*",), dtype=getattr(torch, recipe.dtype))
    )
    start = towers.parameters.flat()
    trained_here = heads or recipe.fit
    if recipe.partitions > 1 and not trained_here:
        raise UserError(
            "the adapters are at a minimum of one partition into batches: add --fit, or leave"
            " --partitions"
        )
    runs = []
    for number in range(recipe.partitions):
        seed = step_seed(recipe.seed, "partition", number) if number else recipe.seed
        pairs = Pairs.of(tensors, recipe.batch, seed)
        check_company(pairs)
        centre = start if heads else torch.zeros_like(start)
        problem = Contrastive(towers, pairs, recipe.delta or pairs.n / 6, centre, work.chunk)
        w = fit(problem, start, tol=work.gradient_tol, hessian=False).w if trained_here else start
        norm = check_trained(problem, w, work.gradient_tol)
        runs.append(Partition(problem, w, query_metric(problem, queries, recipe.batch), recipe))
        console.print(
            f"{pairs.n} pairs in {pairs.batches} batches, {w.numel()} parameters, gradient's norm"
            f" {norm:.1e}"
        )
        if data.captions and (share := pairs.repeated_share(data.captions)) > 0:
            console.print(
                f"{share:.1%} of the pairs share their caption with another of their batch, which"
                " the loss takes for a negative"
            )
    inputs = {
        "recipe": recipe,
        "model": _digest(model, tensors),
        "w": torch.stack([one.w for one in runs]),
        "data": tensors,
        "queries": queries,
    }
    batches = runs[0].problem.pairs.batches
    with Pieces(options.out, inputs) as pieces:
        if recipe.score == "influence":
            for number, one in enumerate(runs):
                one.take(pieces.array(f"direction-{number}", partial(one.direction, console)))

        def places(rows: slice) -> Tensor:
            """Scores of the places of some batches, counted over all partitions."""
            found = []
            for number, one in enumerate(runs):
                low, high = (
                    min(max(end - number * batches, 0), batches) for end in (rows.start, rows.stop)
                )
                if low < high:
                    found.append(one.scores(slice(low, high)))
            return torch.cat(found)

        by_place = score_in_chunks(places, len(runs) * batches, BATCHES, pieces, console)
    of_runs = torch.from_numpy(by_place).to(device).split(batches)
    scores = torch.stack(
        [one.problem.pairs.by_pair(part) for one, part in zip(runs, of_runs, strict=True)]
    )
    columns: dict[str, Sequence[object]] = {
        name: value
        for name, value in (("id", data.ids), ("caption", data.captions))
        if value is not None
    }
    if len(runs) > 1:
        columns["spread"] = scores.std(0).tolist()
    write_scores(options.out, scores.mean(0).cpu().numpy(), columns)
    console.print(
        f"{options.out}: rank 1 is the most harmful pair"
        if recipe.score != "span"
        else f"{options.out}: a high score traces back"
    )
    return 0


@dataclass(eq=False)
class Partition:
    """One partition into batches, trained, and how its pairs are scored."""

    problem: Contrastive
    w: Tensor
    metric: Metric
    recipe: Scoring
    s: Tensor | None = None

    @cached_property
    def solve(self) -> Solve:
        recipe = self.recipe
        return solver(
            self.problem,
            self.w,
            recipe.solver,
            recipe.damping,
            recipe.rank,
            recipe.seed,
            recipe.tol,
            recipe.basis,
        )

    def direction(self, console: Console) -> Tensor:
        """H^-1 grad metric, [p]."""
        s, info = self.solve(metric_gradient(self.metric, self.w))
        console.print(
            f"{info.solver}: residual {info.relative_residual:.1e}, {info.products} products"
            " with the curvature"
        )
        return s

    def take(self, s: np.ndarray) -> None:
        """Score along a direction that is at hand."""
        self.s = torch.from_numpy(s).to(self.w)

    def scores(self, batches: slice) -> Tensor:
        """Of the places of some batches, [b, B]."""
        recipe = self.recipe
        if self.s is not None:
            return self.problem.scores_along(self.w, self.s, recipe.mode, recipe.parts, batches)
        return _by_gradients(self.problem, self.w, self.metric, self.solve, recipe, batches)


def _by_gradients(
    problem: Contrastive,
    w: Tensor,
    metric: Metric,
    solve: Solve,
    recipe: Scoring,
    batches: slice,
) -> Tensor:
    """Scores that need every pair's gradient: relative influence and self-influence, [b, B]."""

    def effects(parts: str) -> tuple[Tensor, Tensor]:
        rows = problem.place_gradients(w, recipe.mode, parts, batches).flatten(0, 1)
        return rows, solve(rows.T)[0].T

    shape = problem.pairs.present[batches].shape
    if recipe.score == "self":
        rows, moved = effects("both")
        return -(rows * moved).sum(1).view(shape)
    both = relative(effects("positive")[1], effects("negative")[1], metric_gradient(metric, w))
    return (both.signed if recipe.score == "relative" else both.span).view(shape)


def _digest(model: Any, tensors: tuple[Tensor, ...]) -> str:
    """Of the model as it came, and of its outputs for the first pairs."""
    first = [part[:2] for part in tensors]
    if isinstance(model, Heads):
        return model_digest(model, *(part.float() for part in first))
    named = dict(zip(("input_ids", "attention_mask", "pixel_values"), first, strict=True))
    return model_digest(model, **named)


def check_company(pairs: Pairs) -> None:
    """UserError where a pair is alone in its batch: it has no negatives, so that its loss is 0
    whatever the model, and its score too.
    """
    alone = int((pairs.present.sum(-1) == 1).sum())
    if alone:
        size = pairs.present.shape[1]
        raise UserError(
            f"{pairs.n} pairs in batches of {size} leave {alone} of them alone in a batch, without"
            " negatives and with a loss of 0 whatever the model is; "
            + ("give more pairs" if pairs.n == 1 else "choose another --batch")
        )


def query_metric(problem: Contrastive, queries: tuple[Tensor, ...], batch: int) -> Metric:
    """The mean contrastive loss of the query pairs, in batches of their own; of a single pair, its
    loss among the first training pairs.
    """
    count = len(queries[0])
    if count > 1:
        held_out = Contrastive(
            problem.towers, Pairs.of(queries, min(batch, count), 0), 0.0, chunk=problem.chunk
        )
        return held_out.mean_loss
    among = tuple(
        torch.cat([one, part[0][problem.pairs.present[0]]])
        for one, part in zip(queries, problem.pairs.inputs, strict=True)
    )
    present = torch.ones(len(among[0]), dtype=torch.bool, device=among[0].device)
    return lambda w: pair_losses(problem.towers.logits(w, among), present)[0]


# ---- inputs --------------------------------------------------------------------------------------


def read_embeddings(file: Path) -> Inputs:
    """An .npz with `text` [n, t] and `image` [n, v], and if they have any `ids` [n]."""
    arrays = user_arrays(file, ARRAYS)
    tensors = tuple(
        torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in ("text", "image")
    )
    return Inputs(
        tensors, [str(one) for one in arrays["ids"].tolist()] if "ids" in arrays else None
    )


def read_images(file: Path, tokenizer: Any, processor: Any) -> Inputs:
    """A CSV with the columns image (a path, from the file's folder) and caption, and if it has one
    id.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            lines = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no CSV file: {error}") from None
    if not lines:
        raise UserError(f"{file} holds no pairs")
    for name in ("image", "caption"):
        if lines[0].get(name) is None:
            raise UserError(f"{file} has no column '{name}'; it needs image and caption")
    pictures = []
    for number, line in enumerate(lines, 2):
        try:
            values = read_image(file.parent / line["image"], "RGB")
        except UserError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
        if values.is_floating_point():  # grey of 16 bits
            values = (255 * values).round().to(torch.uint8)
        pictures.append(to_picture(values))
    captions = [line["caption"] or "" for line in lines]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    length = tokenizer.model_max_length if tokenizer.model_max_length < 10_000 else 77
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ids = [line["id"] for line in lines] if "id" in lines[0] else None
    return Inputs((tokens["input_ids"], tokens["attention_mask"], pixels), ids, captions)


def load_clip(folder: Path, adapter: Path | None) -> tuple[Any, Any, Any]:
    """A CLIP folder as save_pretrained writes it with the adapters of a PEFT folder, its tokenizer
    and its image processor.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {folder}: neither 'heads' nor a folder with a CLIP model (config.json)"
        )
    if adapter is None or not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter {adapter}: name the folder of the LoRA adapters (adapter_config.json) that"
            " were trained on these pairs"
        )
    model, tokenizer = models.load_clip(folder)
    return models.load_lora(model, adapter), tokenizer, models.load_clip_processor(folder)
