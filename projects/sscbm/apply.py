"""`predict`, `explain`, `intervene`: a trained model on images."""

import argparse
import csv
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from projects.sscbm.bundle import Bundle, intervene, load, picture
from projects.sscbm.saliency import overlay, upsampled, visible
from shared.commands.folder import check_out
from shared.commands.options import device_of
from shared.errors import UserError
from shared.files import atomic_folder, atomic_write
from shared.vision.images import SUFFIXES

BLOCK = 64  # images that are in memory at once
SHOWN = 160  # pixels of an overlay's edge, at least


def predict_command(options: argparse.Namespace) -> int:
    """Write a line per image: its class, and the probability of each concept."""
    check_out(options.out, ".csv", what="predictions")
    bundle = load(options.model, device_of(options.device))
    files = images_below(options.images)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "class_probability", *bundle.settings.concepts])
    for some in blocks(files):
        found = bundle.predict(stacked(bundle, options.images, some))
        for file, p, logits in zip(some, found.probabilities, found.logits, strict=True):
            share, label = logits.softmax(0).max(0)
            cells = [f"{value:.4f}" for value in p.tolist()]
            writer.writerow([file, bundle.settings.classes[int(label)], f"{share:.4f}", *cells])
    atomic_write(options.out, text.getvalue().encode())
    Console(stderr=True).print(f"{options.out}: {len(files)} images", markup=False, soft_wrap=True)
    return 0


def explain_command(options: argparse.Namespace) -> int:
    """Write overlays of heat maps as PNG, and a sheet of them all."""
    bundle = load(options.model, device_of(options.device))
    files = images_below(options.images)
    chosen = [bundle.column(name) for name in options.concept]
    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not is_sheet(out):
        raise UserError(f"--out {out} is there and holds no sheet; name a new folder")
    bundle.heat_maps(torch.zeros(1, *bundle.settings.shape))  # or it is refused here
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        rows: list[str] = []
        for some in blocks(files):
            images = stacked(bundle, options.images, some)
            found, maps = bundle.predict(images), bundle.heat_maps(images)
            large = visible(upsampled(maps, *images.shape[2:]))
            for number, file in enumerate(some):
                p = found.probabilities[number]
                columns = chosen or p.argsort(descending=True)[: options.top].tolist()
                label = bundle.settings.classes[int(found.logits[number].argmax())]
                place = f"{len(rows):04d}"
                cells = drawn(bundle, images[number], large[number], p, columns, folder, place)
                rows.append(row_of(file, label, cells))
        (folder / "index.html").write_text(sheet(rows), encoding="utf-8")
    Console(stderr=True).print(
        f"{out / 'index.html'}: {len(files)} images", markup=False, soft_wrap=True
    )
    return 0


def intervene_command(options: argparse.Namespace) -> int:
    """Print what the class is, and what it becomes."""
    bundle = load(options.model)
    values = dict(setting(text) for text in options.set)
    answer = intervene(bundle, options.image, values)
    for name, value in values.items():
        print(f"{name}: {answer.concepts[name]:.3f} by the model, set to {value}")
    before, after = (max(one, key=one.__getitem__) for one in (answer.before, answer.after))
    print(f"class before: {before} ({answer.before[before]:.3f})")
    print(f"class after:  {after} ({answer.after[after]:.3f}; before {answer.before[after]:.3f})")
    return 0


def setting(text: str) -> tuple[str, int]:
    """'wings=1' -> ('wings', 1). Raises UserError."""
    name, equals, value = text.rpartition("=")
    if not equals or value.strip() not in ("0", "1"):
        raise UserError(f"--set {text}: write CONCEPT=1 or CONCEPT=0")
    return name.strip(), int(value)


def images_below(folder: Path) -> list[str]:
    """Paths of image files below a folder, sorted. Raises UserError: there are none."""
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder")
    found = sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.is_file() and file.name[0] != "."
    )
    if not found:
        raise UserError(f"--images {folder} holds no images ({', '.join(SUFFIXES)})")
    return found


def blocks(files: Sequence[str]) -> list[Sequence[str]]:
    return [files[start : start + BLOCK] for start in range(0, len(files), BLOCK)]


def stacked(bundle: Bundle, folder: Path, files: Sequence[str]) -> Tensor:
    """Images [n, channels, edge, edge], as float where one of them has 16 bits."""
    pixels = [bundle.read(folder / file) for file in files]
    if len({one.dtype for one in pixels}) > 1:
        pixels = [one / 255 if one.dtype == torch.uint8 else one for one in pixels]
    return torch.stack(pixels)


def is_sheet(folder: Path) -> bool:
    return (folder / "index.html").is_file() and all(
        file.suffix == ".png" or file.name == "index.html" for file in folder.iterdir()
    )


def drawn(
    bundle: Bundle,
    pixels: Tensor,
    maps: Tensor,
    p: Tensor,
    columns: Sequence[int],
    folder: Path,
    place: str,
) -> list[tuple[str, str]]:
    """Save the image and an overlay for each concept; names of the files with their captions."""
    times = max(1, -(-SHOWN // pixels.shape[1]))
    plain = picture(pixels)
    cells = [(f"{place}.png", "image")]
    plain.resize((times * plain.width, times * plain.height)).save(folder / cells[0][0])
    for column in columns:
        name = f"{place}-{column}.png"
        laid = overlay(np.asarray(plain), maps[column].numpy())
        laid.resize((times * laid.width, times * laid.height)).save(folder / name)
        cells.append((name, f"{bundle.settings.concepts[column]} {float(p[column]):.2f}"))
    return cells


def row_of(file: str, label: str, cells: Sequence[tuple[str, str]]) -> str:
    figures = "".join(
        f'<figure><img src="{name}" alt="{escape(text)}"><figcaption>{escape(text)}</figcaption>'
        "</figure>"
        for name, text in cells
    )
    return f"<section><h2>{escape(file)}: {escape(label)}</h2>{figures}</section>"


def sheet(rows: Sequence[str]) -> str:
    """One page with all overlays."""
    style = (
        "body{font-family:sans-serif;margin:1rem;color:#222}h2{font-size:1rem;margin:.8rem 0 .2rem}"
        "figure{display:inline-block;margin:0 .6rem .4rem 0;vertical-align:top}"
        "img{width:160px;display:block}figcaption{font-size:.85rem;max-width:160px}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>What concepts looked at</title>'
        f"<style>{style}</style><h1>What concepts looked at</h1>"
        "<p>Each picture shows where the heat map of a concept is high (red), relative to its own"
        " maximum; the number is the concept's probability.</p>" + "\n".join(rows) + "</html>\n"
    )
