"""`replay`: rebuild what a run trained from its log and the base model, without data."""

import argparse
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from projects.zo2.command import Recipe
from projects.zo2.runs import LOG, WORKING, build_engine, empty_model, save_model, show
from projects.zo2.steplog import read_log
from projects.zo2.steplog import replay as replay_log
from shared.commands.folder import locked
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.errors import UserError
from shared.files import remove
from shared.models import fingerprint, local_model


def replay(options: argparse.Namespace) -> int:
    """Rebuild as the options of `command.parser` say. Returns the exit status."""
    transformers_logging.set_verbosity_error()
    if not options.log.is_file():
        raise UserError(f"{options.log} does not exist")
    records = read_log(options.log)
    if records is None or not records.steps:
        raise UserError(f"{options.log} holds no steps")
    recipe = Recipe.from_record(records.header.get("settings", {}), f"{options.log}, line 1")
    device = device_of(recipe.device)
    folder = local_model(options.model)
    if fingerprint(folder) != records.header.get("model"):
        raise UserError(
            f"{options.model} is not the model that this run began with"
            f" ({records.header.get('name')})"
        )
    out: Path = options.out
    console = Console(highlight=False, soft_wrap=True)
    with locked(out, LOG, early=(WORKING,)):
        if (out / recipe.weights_file).exists() or (out / LOG).exists():
            raise UserError(f"{out} holds a model already; name another --out")
        model, stored = empty_model(folder, recipe, str(options.model))
        working = out / WORKING
        engine = build_engine(model, stored, recipe, None, options.storage, working, device, None)
        try:
            with Progress(console, 0, len(records.steps)) as progress:
                replay_log(engine, records, lambda done: show(progress, records.steps[done - 1], 0))
            save_model(engine, recipe, folder, out)
        finally:
            engine.close()
            remove(working)
    console.print(
        f"the {'model' if recipe.lora_rank is None else 'adapter'} after {len(records.steps)} steps"
        f" is in {out}",
        markup=False,
    )
    return 0
