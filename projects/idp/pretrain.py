"""`pretrain`: train a source network on the user's images."""

import argparse

import torch
from rich.console import Console

from projects.idp.command import Pretraining
from projects.idp.inputs import class_folders
from projects.idp.network import ResidualNet
from projects.idp.source import Training
from shared.commands.checkpoint import load_checkpoint, save_checkpoint
from shared.commands.folder import begin, begun, locked
from shared.commands.key import digest
from shared.commands.log import Log
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import Stopped, stop_signals
from shared.errors import UserError
from shared.files import atomic_save, remove
from shared.seeding import step_seed

SHAPES: dict[str, tuple[int, int, list[int]]] = {  # filters and edge of the stem, widths
    "small": (16, 3, [16, 64]),
    "resnet10": (64, 7, [64, 128, 256, 512]),
}


def pretrain(options: argparse.Namespace) -> int:
    """Train on --images and write --out. Returns the exit status."""
    recipe = Pretraining.from_options(options)
    device = device_of(recipe.device)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    out = options.out
    checkpoint, path = out / "checkpoint.safetensors", out / "log.jsonl"
    stem, kernel, widths = SHAPES[recipe.network]
    if recipe.size < 2 ** (len(widths) + 1):
        raise UserError(
            f"--size {recipe.size}: {recipe.network} halves an image {len(widths) + 1} times; give"
            f" at least {2 ** (len(widths) + 1)}"
        )
    with locked(out, "log.jsonl", early=("run.json", "checkpoint.safetensors")):
        data = class_folders(options.images, "--images", recipe.size, "RGB")
        images = data.images()
        mean, spread = images.mean((0, 2, 3)), images.std((0, 2, 3)).clamp_min(1e-3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step_seed(recipe.seed, "source network"))
            network = ResidualNet(3, stem, kernel, widths, mean.tolist(), spread.tolist())
        training = Training(
            network.to(device),
            images.to(device),
            data.labels.to(device),
            len(data.classes),
            rows=recipe.rows,
            epochs=recipe.epochs,
            batch=recipe.batch,
            rate=recipe.rate,
            weight_decay=recipe.weight_decay,
            seed=recipe.seed,
        )
        about = {
            "images": digest({"pixels": data.pixels, "labels": data.labels}),
            **recipe.record(),
        }
        begin(out / "run.json", about, begun(path))
        state = training.state()
        found = load_checkpoint(checkpoint, state, training.optimiser)  # type: ignore[arg-type]
        done = (found or {"epochs": 0})["epochs"]
        if found is None and (out / "source.safetensors").exists():
            console.print(f"{out} is finished")
            return 0
        console.print(
            f"{len(images)} images of {len(data.classes)} classes, {recipe.epochs} epochs",
            markup=False,
        )
        with (
            Log(path, keep=lambda line: line["epoch"] <= done) as log,
            stop_signals() as stop,
            Progress(console, done, recipe.epochs) as progress,
        ):
            while done < recipe.epochs:
                if stop:
                    raise Stopped(f"stopped after epoch {done}", stop[0])
                loss, accuracy = training.epoch(done + 1)
                done += 1
                log.write({"epoch": done, "loss": loss, "accuracy": accuracy})
                save_checkpoint(checkpoint, state, training.optimiser, {"epochs": done})  # type: ignore[arg-type]
                progress.step(done, 0, loss, f"accuracy {accuracy:.3f}")
        tensors = {name: value.cpu() for name, value in training.source().tensors().items()}
        atomic_save(tensors, out / "source.safetensors", {"format": "pt", "size": str(recipe.size)})
        remove(checkpoint)
    console.print(f"{out / 'source.safetensors'}: give the folder as --source", markup=False)
    return 0
