"""`repro`: the library by hand. Snakemake's rules call the same functions.

Nothing heavy is imported before a subcommand needs it, so that `repro --help` is instant.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared import manifest, paths
from shared.commands.main import main as commands_main
from shared.commands.options import Parser
from shared.errors import UserError
from shared.processes import die_with_parent

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 240  # columns of a table that goes into a file or a pipe, where 80 would cut names in two
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: that of `shared.commands.main`, or 1 (a
    difference or a failure was found).
    """
    return commands_main("repro", _parser, arguments)


def _parser() -> Parser:
    parser = Parser(
        prog="repro",
        description="Run experiments of the papers and make tables, figures, claims, the report.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, summary: str, example: str, function: object) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: {example}",
        )
        added.set_defaults(function=function)
        return added

    def common(added: argparse.ArgumentParser) -> None:
        added.add_argument("--scale", default="cpu", help="smoke, cpu (default), gpu or paper")
        added.add_argument(
            "--results",
            type=Path,
            default=paths.results_dir(),
            metavar="DIR",
            help="folder of the results",
        )

    added = command(
        "list",
        "papers, experiments, scales, and which rows exist; an experiment's settings",
        "repro list zo2",
        _list,
    )
    added.add_argument(
        "target", nargs="?", metavar="PAPER[/EXPERIMENT]", help="one paper, or one's settings"
    )
    added.add_argument(
        "--results",
        type=Path,
        default=paths.results_dir(),
        metavar="DIR",
        help="folder of the results",
    )

    added = command(
        "run",
        "run one experiment and write its rows",
        "repro run zo2/memory --scale cpu --set steps=3",
        _run,
    )
    added.add_argument("experiment", metavar="PAPER/EXPERIMENT")
    added.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the scale's entry (YAML); may be repeated",
    )
    common(added)

    for name, what in (("table", "tables"), ("figure", "figures")):
        added = command(
            name,
            f"make {what} from rows: all of a paper, or one",
            f"repro {name} zo2/memory --scale cpu",
            _make,
        )
        added.add_argument("target", metavar="PAPER[/NAME]")
        added.set_defaults(kind=what)
        common(added)

    added = command(
        "claims", "judge a paper's claims from rows", "repro claims zo2 --scale cpu", _claims
    )
    added.add_argument("paper")
    common(added)

    added = command(
        "report", "make the report page from what exists", "repro report --scale cpu", _report
    )
    common(added)

    added = command(
        "readme",
        "fill the numbers of a paper's README from rows; without a paper, the main one's table",
        "repro readme ecif --check",
        _readme,
    )
    added.add_argument("paper", nargs="?")
    added.add_argument("--check", action="store_true", help="only say what differs, exit status 1")
    common(added)
    added.set_defaults(results=paths.REFERENCE)

    added = command(
        "keep",
        "make a finished run of a paper the reference, which the repository keeps",
        "repro keep ecif --scale cpu",
        _keep,
    )
    added.add_argument("paper")
    common(added)

    added = command(
        "new",
        "write the skeleton of a paper: its folder, and its tests",
        "repro new pi --display Pi --arxiv 0000.00000",
        _new,
    )
    added.add_argument("paper", help="the folder's name, also that of a Python package")
    added.add_argument("--display", metavar="NAME", help="as tables call it (the folder's name)")
    added.add_argument("--arxiv", required=True, metavar="NUMBER", help="e.g. 2503.12668")

    added = command(
        "check",
        "what a paper lacks that the others have; exit status 1 when it lacks something",
        "repro check zo2",
        _check,
    )
    added.add_argument("paper")

    added = command(
        "compare",
        "compare two folders of results: exact, but for timings and other machines",
        "repro compare results/cpu results/reference/cpu",
        _compare,
    )
    added.description = (
        "Compare two folders of results. Timings are told by the tolerance and never fail; all else"
        " must be equal.\nWhere the CPU's model or the version of torch differs, floats may be 0.1"
        " % apart and digests are not compared,\nwhich is said in a line."
    )
    added.add_argument("measured", type=Path)
    added.add_argument("reference", type=Path)
    added.add_argument(
        "--tolerance",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="relative difference of timings worth showing (default 0.25)",
    )

    command(
        "doctor",
        "check Python, packages, torch, disk, memory and the data cache",
        "repro doctor",
        _doctor,
    )

    from shared.data import cli as data

    data.add_parser(commands)
    return parser


def _list(options: argparse.Namespace) -> int:
    from rich.table import Table

    from shared import rows

    if options.target and "/" in options.target:
        return _list_settings(*_split(options.target, "PAPER/EXPERIMENT"))
    names = [options.target] if options.target else list(manifest.manifests())
    table = Table(
        "experiment",
        "what",
        *paths.SCALES,
        caption="● rows exist   ○ runs at this scale",
        box=None,
        header_style="bold",
    )
    for paper in names:
        known = manifest.manifest(paper)
        configs = {scale: manifest.scale_config(paper, scale) for scale in paths.SCALES}
        table.add_row(f"[bold]{paper}[/bold]", f"[bold]{known.display}[/bold]")
        for name, experiment in known.experiments.items():
            marks = []
            for scale in paths.SCALES:
                exists = rows.rows_path(options.results, scale, paper, name).exists()
                marks.append("●" if exists else "○" if name in configs[scale] else "")
            table.add_row(f"{paper}/{name}", experiment.title, *marks)
    _print(table)
    return 0


def _list_settings(paper: str, name: str) -> int:
    from rich.table import Table
    from rich.text import Text

    from shared import experiment

    scales = [scale for scale in paths.SCALES if name in manifest.scale_config(paper, scale)]
    title = manifest.check_experiment(paper, name).title
    table = Table("setting", "type", *scales, "what", title=title, header_style="bold")
    for setting in experiment.settings(paper, name):
        values = [setting.values[scale] for scale in scales]
        table.add_row(*map(Text, (setting.name, setting.type, *values, setting.description)))
    _print(table)
    return 0


def _run(options: argparse.Namespace) -> int:
    paper, name = _split(options.experiment, "PAPER/EXPERIMENT")
    overrides = {}
    for setting in options.set:
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise UserError(f"--set takes KEY=VALUE, not '{setting}'")
        overrides[key] = _value(setting, value)
    if parent := os.environ.get("REPRO_DIE_WITH_PARENT"):
        die_with_parent(int(parent) if parent.isdigit() else None)
    needs = manifest.needs(paper, name, options.scale)
    for variable in THREAD_VARIABLES:  # before numpy and torch are imported, which read them once
        os.environ.setdefault(variable, str(needs.threads))
    from shared import experiment

    if needs.processes > 1 and "RANK" not in os.environ:
        # a mistake is one line here, and a page of torchrun's below
        experiment.load(paper, name, options.scale, overrides)
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={needs.processes}",
            "-m",
            "shared.cli",
        ]
        settings = [f"--set={setting}" for setting in options.set]
        done = subprocess.run(
            [
                *torchrun,
                "run",
                options.experiment,
                f"--scale={options.scale}",
                f"--results={options.results}",
                *settings,
            ],
            # the ranks end with torchrun, and torchrun with this process
            env={**os.environ, "REPRO_DIE_WITH_PARENT": "whichever"},
            preexec_fn=die_with_parent,
            check=False,
        )
        return 1 if done.returncode else 0
    path = experiment.run_experiment(paper, name, options.scale, overrides, options.results)
    if overrides:
        print(
            f"repro: {path} holds a run with --set; `repro run {options.experiment}` or snakemake"
            " puts the scale's own back",
            file=sys.stderr,
        )
    if int(os.environ.get("RANK", "0")) == 0:
        print(path)
    return 0


def _make(options: argparse.Namespace) -> int:
    from shared import figures, tables

    paper, _, name = options.target.partition("/")
    manifest.manifest(paper)
    manifest.check_scale(options.scale)
    if not name:
        module = tables if options.kind == "tables" else figures
        print(*module.build(paper, options.scale, options.results), sep="\n")
    elif options.kind == "tables":
        print(tables.make(paper, name, options.scale, options.results).to_markdown())
    else:
        figure = figures.make(paper, name, options.scale, options.results)
        for path in figures.save(
            figure, options.results / options.scale / paper / "figures" / name
        ):
            print(path)
    return 0


def _claims(options: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from shared import claims

    manifest.manifest(options.paper)
    manifest.check_scale(options.scale)
    table = Table("claim", "verdict", "measured", "bound", "paper", header_style="bold")
    for entry in claims.evaluate(options.paper, options.scale, options.results):
        table.add_row(
            *(Text(entry[key] or "–") for key in ("id", "verdict", "measured", "bound", "paper"))
        )
    _print(table)
    return 0


def _report(options: argparse.Namespace) -> int:
    from shared import report

    manifest.check_scale(options.scale)
    print(report.build(options.scale, options.results))
    return 0


def _readme(options: argparse.Namespace) -> int:
    from shared import readme

    manifest.check_scale(options.scale)
    write = not options.check
    differences = readme.update(options.paper, options.scale, options.results, write)
    print(*differences, sep="\n", end="\n" if differences else "")
    return 1 if options.check and differences else 0


def _keep(options: argparse.Namespace) -> int:
    from shared import reference

    manifest.check_scale(options.scale)
    print(reference.keep(options.paper, options.scale, options.results))
    return 0


def _new(options: argparse.Namespace) -> int:
    from shared import skeleton

    files = skeleton.create(options.paper, options.display or options.paper, options.arxiv)
    print(*files, sep="\n")
    print(f"next: docs/adding-a-paper.md; repro check {options.paper}", file=sys.stderr)
    return 0


def _check(options: argparse.Namespace) -> int:
    from shared import papers

    lacking = papers.lacking(options.paper)
    print(*(f"{options.paper}: {line}" for line in lacking), sep="\n", end="\n" if lacking else "")
    return 1 if lacking else 0


def _compare(options: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from shared import compare

    found = compare.differences(options.measured, options.reference, options.tolerance)
    if reason := compare.elsewhere(options.measured, options.reference):
        print(reason)
    if found:
        table = Table("", "file", "what", "measured", "reference", header_style="bold")
        for one in sorted(found, key=lambda one: not one.drift):
            table.add_row(
                "drift" if one.drift else "told",
                *(Text(text) for text in (one.where, one.what, one.measured, one.reference)),
            )
        _print(table)
    drifted = sum(one.drift for one in found)
    print(
        f"{drifted} differ where they must not; {len(found) - drifted} differences of timings, or"
        " new files, are only told"
    )
    return 1 if drifted else 0


def _doctor(options: argparse.Namespace) -> int:
    from shared import doctor

    return doctor.check()


def _print(table: "Table") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def _split(target: str, form: str) -> tuple[str, str]:
    paper, slash, name = target.partition("/")
    if not slash or not paper or not name:
        raise UserError(f"'{target}' must be {form}, e.g. zo2/memory")
    return paper, name


def _value(setting: str, text: str) -> object:
    import yaml

    try:
        return manifest.parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"--set {setting}: the value is not valid YAML") from None


if __name__ == "__main__":
    sys.exit(main())
