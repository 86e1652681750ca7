"""`sample`: completions of the user's prompts, into `completions.jsonl` of a folder.

A completion is on the disk as soon as it ends, and depends on no other, so that after a crash only
those are sampled that are not there.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.predictor import Online
from projects.infinite_sampling.prompts import (
    Prompts,
    about,
    check_room,
    engine_of,
    load,
    schedule_of,
)
from projects.infinite_sampling.recipe import SampleRecipe
from projects.infinite_sampling.rollout import Completion, Schedule, Stats
from shared.commands.folder import begin, begun, locked
from shared.commands.log import Log
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import Stopped, stop_signals
from shared.models import local_model
from shared.tables import human_bytes


def sample(options: argparse.Namespace) -> int:
    """`python -m projects.infinite_sampling sample`. Returns the exit status."""
    device = device_of(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = SampleRecipe.resolved(options)
    folder = local_model(options.model)
    path: Path = options.out / "completions.jsonl"
    with locked(options.out, path.name, early=("run.json",)):
        model, tokenizer = load(folder, recipe.dtype, device)
        prompts = Prompts.read(options.prompts, tokenizer)
        check_room(recipe, prompts, model)
        schedule, online = schedule_of(recipe, len(tokenizer), model)
        engine = engine_of(recipe, model, tokenizer, recipe.seed)
        engine.check(prompts.tokens)
        known = about(recipe, folder, model, tokenizer, prompts)
        begin(options.out / "run.json", known, begun(path))
        _Sampling(recipe, path, prompts, engine, schedule, online, tokenizer).go()
    return 0


class _Sampling:
    def __init__(
        self,
        recipe: SampleRecipe,
        path: Path,
        prompts: Prompts,
        engine: Engine,
        schedule: Schedule,
        online: Online | None,
        tokenizer: Any,
    ) -> None:
        self.recipe, self.path, self.prompts, self.engine = recipe, path, prompts, engine
        self.schedule, self.online, self.tokenizer = schedule, online, tokenizer
        self.console = Console(highlight=False, soft_wrap=True)

    def go(self) -> None:
        recipe, total = self.recipe, len(self.prompts.tokens) * self.recipe.group
        batches = range(0, len(self.prompts.tokens), recipe.prompts_at_once)
        steps = busy = rows = peak = tokens = 0
        with Log(self.path) as log, stop_signals() as stop:
            done = {(line["prompt_index"], line["index"]) for line in log.lines}
            log.lines.clear()  # tokens and texts of a long run are on the disk, not in memory
            if done:
                self._say(f"going on: {len(done)} of {total} completions are there")

            def ended(one: Completion) -> None:
                log.write(self._line(one), sync=False)
                log.lines.clear()
                done.add((one.prompt, one.index))

            def stepped(stats: Stats) -> None:
                if len(done):
                    bar.step(
                        len(done),
                        0,
                        None,
                        f"slots {stats.occupancy:.0%} busy, step {steps + stats.steps}",
                    )
                if stop:
                    log.sync()
                    raise Stopped(
                        f"stopped with {len(done)} of {total} completions; the same command goes"
                        " on",
                        stop[0],
                    )

            with Progress(self.console, len(done), total) as bar:
                for first in batches:
                    chosen = range(
                        first, min(first + recipe.prompts_at_once, len(self.prompts.tokens))
                    )
                    jobs = [
                        (p, i) for p in chosen for i in range(recipe.group) if (p, i) not in done
                    ]
                    made = self.engine.run(self.prompts.tokens, jobs, self.schedule, ended, stepped)
                    log.sync()
                    if self.online is not None:
                        self.online.observe(self.prompts.tokens, made.completions)
                    stats = made.stats
                    steps, busy, rows, tokens = (
                        steps + stats.steps,
                        busy + stats.busy,
                        rows + stats.rows,
                        tokens + stats.tokens,
                    )
                    peak = max(peak, stats.kv_bytes)
        self._say(
            f"{len(done)} completions in {self.path}; {tokens} tokens in {steps} steps, slots"
            f" {busy / rows if rows else 1:.0%} busy, {human_bytes(peak)} of keys and values at the"
            " most"
        )

    def _line(self, one: Completion) -> dict[str, Any]:
        return {
            "prompt_index": one.prompt,
            "index": one.index,
            "prompt": self.prompts.texts[one.prompt],
            "completion": self.tokenizer.decode(one.tokens, skip_special_tokens=True),
            "finish": one.finish,
            "tokens": one.tokens,
            "logprobs": one.logprobs,
        }

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)
