"""`score`: rank the user's image-text pairs by what each does to the loss of a validation set or of
one pair.
"""

import argparse
import csv
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from projects.ecif.fit import check_trained, fit, solver
from projects.ecif.influence import Contrastive, relative
from projects.ecif.loss import pair_losses
from projects.ecif.pairs import Pairs
from projects.ecif.towers import Clip, Heads, TwoTower
from shared import models
from shared.commands.options import device_of
from shared.commands.pieces import Pieces
from shared.commands.signals import Stopped
from shared.errors import UserError
from shared.influence.baselines import Metric, metric_gradient
from shared.influence.scoring import (
    check_ids,
    check_queries,
    check_scores_out,
    score_in_chunks,
    write_scores,
)

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
    check_scores_out(options.out)
    device = device_of(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True, highlight=False)
    dtype = torch.float64 if options.dtype == "float64" else torch.float32
    if options.model == "heads":
        data, query = (read_embeddings(file) for file in (options.data, options.query))
        towers: TwoTower | Clip = TwoTower(
            Heads(
                data.tensors[0].shape[-1], data.tensors[1].shape[-1], options.size, options.seed
            ).to(device),
            dtype=torch.float64,
        )
        centre = towers.parameters.flat()
    else:
        model, tokenizer, processor = load_clip(Path(options.model), options.adapter)
        data, query = (
            read_images(file, tokenizer, processor) for file in (options.data, options.query)
        )
        towers = Clip(model.to(device), select=("*lora_*",), dtype=dtype)
        centre = torch.zeros_like(towers.parameters.flat())
    check_queries([one[:1] for one in data.tensors], query.tensors)
    if data.ids is not None:
        check_ids(data.ids, len(data.tensors[0]))
    tensors, queries = (tuple(one.to(device) for one in part.tensors) for part in (data, query))
    pairs = Pairs.of(tensors, options.batch, options.seed)
    if data.captions and (share := pairs.repeated_share(data.captions)) > 0:
        console.print(
            f"{share:.1%} of the pairs share their caption with another of their batch, which the"
            " loss takes for a negative"
        )
    options.delta = options.delta or pairs.n / 6
    problem = Contrastive(towers, pairs, options.delta, centre, options.chunk)

    w = towers.parameters.flat()
    if options.model == "heads" or options.fit:
        fitted = fit(problem, w, tol=options.gradient_tol, hessian=False)
        w = fitted.w
    norm = check_trained(problem, w, options.gradient_tol)
    console.print(
        f"{pairs.n} pairs in {pairs.batches} batches, {w.numel()} parameters, gradient's norm"
        f" {norm:.1e}"
    )

    known = ("score", "mode", "parts", "solver", "damping", "rank", "seed", "batch", "delta", "tol")
    inputs = {
        **{name: getattr(options, name) for name in known},
        "w": w,
        "centre": centre,
        "model": _digest(options.model, options.adapter),
    }
    inputs |= {
        f"{kind} {i}": one
        for kind, part in (("data", tensors), ("query", queries))
        for i, one in enumerate(part)
    }
    solve = solver(
        problem, w, options.solver, options.damping, options.rank, options.seed, options.tol
    )
    metric = query_metric(problem, queries, options.batch)

    def direction() -> Tensor:
        found, info = solve(metric_gradient(metric, w))
        console.print(
            f"{info.solver}: residual {info.relative_residual:.1e}, {info.products} products"
            " with the curvature"
        )
        return found

    try:
        with Pieces(options.out, inputs) as pieces:
            if options.score == "influence":
                s = torch.from_numpy(pieces.array("direction", direction)).to(w)

                def places(batches: slice) -> Tensor:
                    return problem.scores_along(w, s, options.mode, options.parts, batches)

            else:

                def places(batches: slice) -> Tensor:
                    return _by_gradients(problem, w, metric, solve, options, batches)

            found = score_in_chunks(places, pairs.batches, BATCHES, pieces, console)
    except Stopped as stopped:
        print(f"ecif: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    scores = pairs.by_pair(torch.from_numpy(found).to(device)).cpu().numpy()
    columns = {
        name: value
        for name, value in (("id", data.ids), ("caption", data.captions))
        if value is not None
    }
    write_scores(options.out, scores, columns)
    console.print(
        f"{options.out}: rank 1 is the most harmful pair"
        if options.score != "span"
        else f"{options.out}: a high score traces back"
    )
    return 0


def _by_gradients(
    problem: Contrastive,
    w: Tensor,
    metric: Metric,
    solve: Any,
    options: argparse.Namespace,
    batches: slice,
) -> Tensor:
    """Scores that need every pair's gradient: relative influence and self-influence, [b, B]."""

    def effects(parts: str) -> tuple[Tensor, Tensor]:
        rows = problem.place_gradients(w, options.mode, parts, batches).flatten(0, 1)
        return rows, solve(rows.T)[0].T

    shape = problem.pairs.present[batches].shape
    if options.score == "self":
        rows, moved = effects("both")
        return -(rows * moved).sum(1).view(shape)
    found = relative(effects("positive")[1], effects("negative")[1], metric_gradient(metric, w))
    return (found.signed if options.score == "relative" else found.span).view(shape)


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
    try:
        with np.load(file, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (OSError, ValueError, AttributeError, EOFError, ImportError):
        raise UserError(
            f"{file} is no .npz of plain arrays (text, image); save it with numpy.savez"
        ) from None
    except Exception as error:  # zipfile has errors of its own
        raise UserError(f"{file} cannot be read: {error}") from None
    for name in ("text", "image"):
        if name not in arrays:
            raise UserError(f"{file} has no array '{name}'; it has {', '.join(arrays) or 'none'}")
        if arrays[name].ndim != 2 or arrays[name].dtype.kind not in "fiu":
            raise UserError(
                f"{file}: '{name}' must be numbers of shape [pairs, features], not"
                f" {arrays[name].dtype} {arrays[name].shape}"
            )
        if not np.isfinite(arrays[name]).all():
            row = int(np.argwhere(~np.isfinite(arrays[name]))[0][0])
            raise UserError(f"{file}: '{name}' of pair {row} is not finite")
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
    from PIL import Image, UnidentifiedImageError

    try:
        with open(file, encoding="utf-8", newline="") as stream:
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
            with Image.open(file.parent / line["image"]) as image:
                pictures.append(image.convert("RGB"))
        except (OSError, UnidentifiedImageError):
            raise UserError(
                f"{file}, line {number}: {line['image']} is no image that can be read"
            ) from None
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


def _digest(model: str, adapter: Path | None) -> str:
    """Tells models apart; the trained parameters themselves are hashed besides."""
    digest = hashlib.sha256(model.encode())
    for folder in [] if model == "heads" else [Path(model), adapter]:
        for file in sorted(folder.glob("*")) if folder else []:
            if file.is_file():
                digest.update(
                    f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode()
                )
    return digest.hexdigest()
