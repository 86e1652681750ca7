"""Table "limit": SmolLM2-135M on real text under a limit of the process's memory (RLIMIT_DATA),
with MeZO and with ZO2 from disk.

Each run is a process of its own: MeZO without a limit, to show what it takes, and under it; ZO2's
own arithmetic with every block on the device, which is a leaner MeZO; and ZO2 from disk.
"""

import argparse
import json
import shutil
import tempfile
import textwrap
from pathlib import Path

from pydantic import Field

from shared import experiment, meters


class Config(experiment.Config):
    model: str
    """a pretrained language model of the catalogue"""
    limit_megabytes: int = Field(ge=1)
    """private writable memory that a process may have"""
    tokens: int = Field(ge=2)
    """of the one sequence of a step"""
    steps: int = Field(ge=2)
    """of training; the second shows the update of the first"""


def run(config: Config, run: experiment.Run) -> None:
    from shared.models import local_model

    source = local_model(config.model)
    limit = config.limit_megabytes * 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        for method, bound in run.progress(
            [("mezo", None), ("mezo", limit), ("zo2-resident", limit), ("zo2", limit)], "processes"
        ):
            working = Path(folder) / "model.safetensors"
            shutil.copyfile(source / "model.safetensors", working)
            arguments = [
                method,
                str(source),
                str(working),
                str(config.tokens),
                str(config.steps),
                str(config.seed),
            ]
            done = meters.run_limited(__name__, arguments, bound)
            found = json.loads(done.output.splitlines()[-1]) if done.status == 0 else {}
            run.row(
                model=config.model,
                method=method,
                limit_bytes=bound,
                finished=done.status == 0,
                out_of_memory="allocate memory" in done.error or "MemoryError" in done.error,
                outcome="trained" if done.status == 0 else textwrap.shorten(done.error, 100),
                tokens=config.tokens,
                steps=config.steps,
                peak_rss_bytes=found.get("peak_rss_bytes"),
                vmdata_bytes=found.get("vmdata_bytes"),
                first_loss=found.get("losses", [None])[0],
                last_loss=found.get("losses", [None])[-1],
            )


def train(
    method: str, source: Path, working: Path, tokens: int, steps: int, seed: int
) -> dict[str, object]:
    """What the limited process does: SmolLM2's registration order is its execution order, so that
    both draw the same noise.
    """
    import torch

    from projects.zo2 import ZO2, MeZO
    from projects.zo2.data import text_tokens
    from shared.data.loaders import wiki100
    from shared.models import empty_causal_lm, load_tokenizer

    torch.set_num_threads(1)
    batches = text_tokens(load_tokenizer(source), list(wiki100().values()), 1, tokens, steps)
    highest = meters.data_bytes()
    losses = []
    if method == "mezo":
        # Read tensor by tensor, as leanly as ZO2 does, so that what the limit ends is the training
        # and not the loading.
        trainer = MeZO(ZO2(empty_causal_lm(source), storage=working).unwrap())
        for number, batch in enumerate(batches):
            losses.append(trainer.step(batch, seed + number)[0])
            highest = max(highest, meters.data_bytes())
    else:
        engine = ZO2(empty_causal_lm(source), storage=working)
        if method == "zo2-resident":
            engine = ZO2(engine.unwrap(), storage=None)
        for number, batch in enumerate(batches):
            losses.append(engine.step(batch, seed=seed + number).loss)
            highest = max(highest, meters.data_bytes())
        engine.close()
    return {"losses": losses, "peak_rss_bytes": meters.peak_rss_bytes(), "vmdata_bytes": highest}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in (
        ("method", str),
        ("source", Path),
        ("working", Path),
        ("tokens", int),
        ("steps", int),
        ("seed", int),
    ):
        parser.add_argument(name, type=kind)
    print(json.dumps(train(**vars(parser.parse_args()))))
