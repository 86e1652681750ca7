"""Numbers in a README come from rows: marks in its text say which, and `fill` writes them in.

A mark is a pair of comments that GitHub does not show, with the number between them:

    the error is <!--=ablation[Hessian; exact; one pair].error-->0.122<!--/-->

After `=` stands the address of the text:

| address | text |
| --- | --- |
| `table[key; key].column` | the cell of the row that has each key among its cells, without ± |
| `table.caption`, `table.notes` | the text over a table, the notes under it |
| `claims[name].measured` | a field of the verdict `paper.name` |
| `paper/file[key; key].column` | the paper's own number, from `paper/file.csv` |
| `ADDRESS after WORDS` | of a longer text, the number that follows these words |
| `ADDRESS before WORDS` | likewise, the number that they follow |
| `setting` | as it stands: what was chosen, and not measured |
| `once` | as it stands: measured by hand, and in no rows |

A column goes by its heading, or by its name where two have one heading. The number of a mark is
not the first thing of a line, where Markdown would take the comment for HTML and show the rest of
the line as it is.
"""

import csv
import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from shared import claims, manifest, paths, tables
from shared.errors import UserError
from shared.files import atomic_write

MARK = re.compile(r"<!--=(?P<address>[^>\n]*?)-->(?P<shown>[^\n]*?)<!--/-->")
BY_HAND = ("setting", "once")  # marks whose text nobody fills in

_ADDRESS = re.compile(
    r"(?P<source>[^\W\d]\w*|paper/\w+)(?:\[(?P<keys>.*)\])?\.(?P<column>[^\[\]]+)"
)
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?x?"
# A number with decimals or with a unit is taken for a measured one, wherever it stands.
_UNITS = "%|x|×|times|points|bytes|[kMGT]i?B|h|min|ns|µs|ms|s|seconds|minutes|hours"
_MEASURED = re.compile(
    rf"(?<![\w.])[-+]?\d[\d,]*(?:(?:\.\d+)?\s?(?:{_UNITS})(?!\w)|\.\d+(?:e[-+]?\d+)?(?!\w|\.\d))"
)
# Where a number is no measurement: code, links, headings, OPT-175B, theorem 5.3.
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_EXEMPT = re.compile(
    r"`[^`\n]*`|\[[^\]\n]*\]\([^)\n]*\)|^#.*$|\b[A-Z]\w*-\d[\d.]*[BM]\b"
    r"|\b(?:[Pp]roposition|[Tt]heorem|[Ll]emma|[Ss]ection|[Tt]able|[Ff]igure|[Ee]quation) [\d.]+",
    re.MULTILINE,
)


def fill(text: str, lookup: Callable[[str], str]) -> str:
    """`text` with every mark filled with what `lookup` returns for its address.

    Raises:
        UserError: a mark that is not closed on its line, that opens one, or whose address leads
            nowhere; with the number of the line.
    """
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        marks = MARK.findall(line)
        if not len(marks) == line.count("<!--=") == line.count("<!--/-->"):
            raise UserError(f"line {number}: a mark is <!--=ADDRESS-->TEXT<!--/-->, on one line")
        if line.lstrip(" -*>").startswith("<!--="):
            raise UserError(f"line {number}: a mark may not open a line: put a word before it")
        try:
            lines.append(MARK.sub(lambda mark: _filled(mark, lookup), line))
        except UserError as error:
            raise UserError(f"line {number}: {error}") from None
    return "\n".join(lines)


def _filled(mark: re.Match[str], lookup: Callable[[str], str]) -> str:
    address = mark["address"]
    shown = mark["shown"] if address in BY_HAND else lookup(address)
    return f"<!--={address}-->{shown}<!--/-->"


def unmarked(text: str) -> list[str]:
    """The numbers with decimals or a unit that stand outside marks, code, links and headings, each
    as 'line 12: 0.54'.
    """

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    for pattern in (_FENCE, MARK, _EXEMPT):
        text = pattern.sub(blank, text)
    return [
        f"line {number}: {found[0]}"
        for number, line in enumerate(text.split("\n"), 1)
        for found in _MEASURED.finditer(line)
    ]


class Source:
    """What the marks of a paper's README may name, at one scale.

    Args:
        results: the folder of the results; the rows lie in `<results>/<scale>/<paper>/rows`.
    """

    def __init__(self, paper: str, scale: str, results: Path) -> None:
        self.paper, self.scale, self.results = paper, scale, results
        self._tables: dict[str, tables.Table] = {}
        self._verdicts: list[dict[str, str | None]] | None = None

    def lookup(self, address: str) -> str:
        """The text at an address. UserError where it leads nowhere, or to several places."""
        place, side, words = [*re.split(" (after|before) ", address, maxsplit=1), "", ""][:3]
        match = _ADDRESS.fullmatch(place)
        if match is None:
            raise UserError(f"'{address}' is no address, e.g. table[key; key].column")
        keys = [key.strip() for key in (match["keys"] or "").split(";") if key.strip()]
        source, column = match["source"], match["column"]
        if source == "claims":
            text = self._claim(keys, column)
        elif source.startswith("paper/"):
            text = self._paper(source.removeprefix("paper/"), keys, column)
        else:
            text = self._table(source, keys, column)
        if side:
            return _number_beside(text, side, words)
        return text.split(" ± ")[0]

    def _claim(self, keys: Sequence[str], field: str) -> str:
        if self._verdicts is None:
            self._verdicts = claims.judge(self.paper, self.scale, self.results)
        verdicts = {(entry["id"] or "").partition(".")[2]: entry for entry in self._verdicts}
        if len(keys) != 1 or keys[0] not in verdicts:
            raise UserError(manifest.unknown("claim", "; ".join(keys), verdicts))
        text = verdicts[keys[0]].get(field)
        if not text:
            raise UserError(manifest.unknown(f"field of {keys[0]}", field, verdicts[keys[0]]))
        return text

    def _paper(self, name: str, keys: Sequence[str], column: str) -> str:
        file = paths.PROJECTS / self.paper / "paper" / f"{name}.csv"
        try:
            with file.open(encoding="utf-8", newline="") as stream:
                headings, *lines = csv.reader(stream, skipinitialspace=True)
        except OSError:
            raise UserError(f"{file} cannot be read") from None
        return _cell(f"paper/{name}.csv", [headings], lines, keys, column)

    def _table(self, name: str, keys: Sequence[str], column: str) -> str:
        if name not in self._tables:
            self._tables[name] = tables.make(self.paper, name, self.scale, self.results)
        table = self._tables[name]
        if not keys and column in ("caption", "notes"):
            return table.caption if column == "caption" else " ".join(table.notes)
        headings, lines, _ = table.shown(table.frame)
        names = list(table.columns or table.frame.columns)
        return _cell(f"table {name}", [headings, names], lines, keys, column)


def _cell(
    where: str,
    headings: Sequence[Sequence[str]],
    lines: Sequence[Sequence[str]],
    keys: Sequence[str],
    column: str,
) -> str:
    """The one cell in `column`, of the line that has all keys among its cells.

    Args:
        headings: what the columns are called, in one or more ways; what two are called is no name.
    """
    columns: dict[str, int] = {}
    for names in headings:
        columns |= {name: names.index(name) for name in names if list(names).count(name) == 1}
    if column not in columns:
        raise UserError(f"{where}: {manifest.unknown('column', column, columns)}")
    matching = [line for line in lines if not Counter(keys) - Counter(line)]
    if len(matching) != 1:
        raise UserError(f"{where}: {len(matching)} rows have '{'; '.join(keys)}'; one must")
    return matching[0][columns[column]]


def _number_beside(text: str, side: str, words: str) -> str:
    """The one number of `text` that stands after or before (`side`) some words."""
    around = re.escape(words)
    pattern = (
        rf"{around}:?\s*(?<![\d.])({_NUMBER})" if side == "after" else rf"({_NUMBER})\s*{around}"
    )
    numbers = re.findall(rf"(?<![\w.]){pattern}", text)
    if len(numbers) != 1:
        raise UserError(f"{len(numbers)} numbers stand {side} '{words}' in '{text}'; one must")
    return str(numbers[0])


def readme(paper: str) -> Path:
    """The README of a paper."""
    return paths.PROJECTS / paper / "README.md"


def filled(paper: str, scale: str, results: Path) -> str:
    """The text of a paper's README with its numbers as the rows at `scale` have them. UserError
    where it has none, or a mark is wrong.
    """
    manifest.manifest(paper)
    file = readme(paper)
    if not file.is_file():
        raise UserError(f"{file} is missing")
    try:
        return fill(file.read_text(encoding="utf-8"), Source(paper, scale, results).lookup)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


# ---- the table of papers in the main README ------------------------------------------------------

_HEADING = re.compile(r"^\| paper \| title \| arXiv \| status \|\n\|.*\|\n", re.MULTILINE)


def filled_main(scale: str, results: Path) -> str:
    """The text of the main README with a row for each paper in its table: link, title, arXiv, and
    the counts of the verdicts in `claims.json` below `results`. Rows of planned papers stay.
    """
    file = paths.ROOT / "README.md"
    text = file.read_text(encoding="utf-8")
    start = _HEADING.search(text)
    if start is None:
        raise UserError(f"{file} has no table: | paper | title | arXiv | status |")
    stop = text.index("\n\n", start.end())
    lines = text[start.end() : stop].split("\n")
    for known in manifest.manifests().values():
        places = [i for i, line in enumerate(lines) if _first_cell(line) in _names(known)]
        if not places:
            lines.append("")
        lines[places[0] if places else -1] = _row(known, scale, results)
    return text[: start.end()] + "\n".join(lines) + text[stop:]


def _first_cell(line: str) -> str:
    return line.split("|")[1].strip() if line.count("|") > 1 else ""


def _names(known: manifest.Manifest) -> tuple[str, str]:
    """How the first cell of a paper's row reads before and after it is here."""
    return known.display, f"[{known.display}](projects/{known.name}/README.md)"


def _row(known: manifest.Manifest, scale: str, results: Path) -> str:
    title = known.title.removeprefix(f"{known.display}: ")
    arxiv = f"[{known.arxiv}](https://arxiv.org/abs/{known.arxiv})" if known.arxiv else "–"
    ledger = results / scale / known.name / "claims.json"
    status = (
        f"works: [{verdict_counts(ledger)}]({_relative(ledger)})" if ledger.is_file() else "new"
    )
    return f"| {_names(known)[1]} | {title} | {arxiv} | {status} |"


def _relative(file: Path) -> Path:
    return file.relative_to(paths.ROOT) if file.is_relative_to(paths.ROOT) else file


def verdict_counts(ledger: Path) -> str:
    """'10 holds, 2 partly': how often each verdict stands in a `claims.json`."""
    count = Counter(entry["verdict"] for entry in claims.read_ledger(ledger))
    return ", ".join(f"{count[verdict]} {verdict}" for verdict in claims.VERDICTS if count[verdict])


# ---- both ----------------------------------------------------------------------------------------


def update(paper: str | None, scale: str, results: Path, write: bool) -> list[str]:
    """Fill the README of a paper, or the table of the main one where `paper` is None.

    Args:
        write: write the file; otherwise only look.

    Returns:
        A line for each line of the file that differs (`file:12: 0.54 -> 0.55`).
    """
    file = paths.ROOT / "README.md" if paper is None else readme(paper)
    new = filled_main(scale, results) if paper is None else filled(paper, scale, results)
    old = file.read_text(encoding="utf-8")
    if write and new != old:
        atomic_write(file, new.encode())
    return [f"{_relative(file)}:{said}" for said in _differences(old, new)]


def _differences(old: str, new: str) -> list[str]:
    before, after = old.split("\n"), new.split("\n")
    said = []
    for _, i, j, k, stop in difflib.SequenceMatcher(None, before, after, False).get_opcodes():
        for number, line in enumerate(after[k:stop], k):
            was = before[i + number - k] if i + number - k < j else ""
            pairs = zip(MARK.finditer(was), MARK.finditer(line), strict=False)
            changed = [
                f"{a['shown']} -> {b['shown']}" for a, b in pairs if a["shown"] != b["shown"]
            ]
            if was != line:
                said.append(f"{number + 1}: {'; '.join(changed) or line}")
    return said
