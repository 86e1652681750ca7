"""What the commands of the papers, which work for hours on a user's own input, have in common.

| module | what |
| --- | --- |
| `main` | `main(program, parser, arguments)`: exit statuses, one line for every error, `--debug` |
| `options` | `Parser`, `number`, `device_of`: options refused in one line |
| `recipe` | `Recipe`, `add_options`: options taken from the fields of a pydantic model |
| `inputs` | `user_module`, `user_model`, `user_arrays`, `user_weights`: what a user hands over |
| `key` | `digest`, `model_digest`, `source_digest`: everything that a result depends on |
| `folder` | `locked`, `begin`, `same_run`, `begun`; `check_out` for a single file |
| `log` | `Log`, `read_lines`: a JSON object a line |
| `checkpoint` | `save_checkpoint`, `load_checkpoint`: weights and optimizer as one file |
| `pieces` | `Pieces`: finished parts of a file that is written at the end |
| `signals` | `stop_signals`, `Stopped` |
| `progress` | `Progress` |

Files are written with `shared.files`. None of these imports torch until it is needed, so that
`--help` and a wrong option are instant.

A paper's `command.py`, which its `__main__.py` only calls:

    from pydantic import Field
    from shared.commands.main import main as run_command
    from shared.commands.options import Parser
    from shared.commands.recipe import Recipe as Base, add_options

    class Recipe(Base):
        steps: int = Field(1000, ge=1)
        '''steps in all'''
        seed: int = Field(0, ge=0)
        '''of the order of records'''

    def parser() -> Parser:
        parser = Parser(prog="python -m projects.paper", description=__doc__)
        commands = parser.add_subparsers(required=True, metavar="COMMAND")
        train = commands.add_parser("train", help="train on your text")
        train.set_defaults(function="projects.paper.train:train")      # imported when it is called
        train.add_argument("--data", required=True, type=Path, metavar="FILE", help="to train on")
        train.add_argument("--out", required=True, type=Path, metavar="DIR", help="for the model")
        add_options(train.add_argument_group("training"), Recipe)
        return parser

    def main(arguments: Sequence[str] | None = None) -> int:
        return run_command("paper", parser, arguments)

and its `train.py`, which may import torch:

    def train(options: argparse.Namespace) -> int:
        recipe = Recipe.from_options(options)
        out, path = options.out, options.out / "log.jsonl"
        with locked(out, "log.jsonl", early=("run.json", "checkpoint.safetensors")):
            records = read(options.data)                               # refuses wrong input first
            model, optimizer = build(recipe)
            parameters = dict(model.named_parameters())
            about = {"data": sha256(options.data), **recipe.record()}
            begin(out / "run.json", about, begun(path))                # the same run, or refused
            done = (load_checkpoint(checkpoint, parameters, optimizer) or {"steps": 0})["steps"]
            with (
                Log(path, keep=lambda line: line["step"] <= done) as log,
                stop_signals() as stop,
                Progress(console, done, recipe.steps) as progress,
            ):
                while done < recipe.steps:
                    if stop:
                        raise Stopped(f"stopped after step {done}", stop[0])
                    loss = step(done)
                    done += 1
                    log.write({"step": done, "loss": loss})
                    save_checkpoint(checkpoint, parameters, optimizer, {"steps": done})
                    progress.step(done, 0, loss)
            atomic_save(model.state_dict(), out / "model.safetensors", {"format": "pt"})
            remove(checkpoint)                                         # nothing is left but results
        return 0
"""
