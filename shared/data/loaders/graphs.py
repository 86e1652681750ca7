"""Graphs whose nodes carry text or features: citations, word senses, software packages."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shared.data.cache import path

CORA_CLASSES = (
    "Neural_Networks",
    "Rule_Learning",
    "Reinforcement_Learning",
    "Probabilistic_Methods",
    "Theory",
    "Genetic_Algorithms",
    "Case_Based",
)


class Cora(NamedTuple):
    """Cora's papers and citations."""

    features: NDArray[np.uint8]  # [2708, 1433]; whether the word occurs
    labels: NDArray[np.int64]  # [2708]; names in CORA_CLASSES
    edges: NDArray[np.int64]  # [5429, 2]; rows of `features`: cited, citing


def cora() -> Cora:
    """2,708 machine-learning papers, 7 subjects, 5,429 citations. No titles, no abstracts."""
    folder = path("cora")
    nodes = pd.read_parquet(folder / "cora_nodes.parquet.gzip")
    citations = pd.read_parquet(folder / "cora_rels.parquet.gzip")
    row = pd.Series(range(len(nodes)), index=nodes["nodeId"])
    edges = np.stack(
        [row[citations[column]] for column in ("sourceNodeId", "targetNodeId")], axis=1
    ).astype(np.int64)
    return Cora(
        np.array(nodes["features"].tolist(), np.uint8), nodes["subject"].to_numpy(np.int64), edges
    )


# lexnames(5WN): the lexicographer files by number.
_NOUN_FILES = (
    "Tops",
    "act",
    "animal",
    "artifact",
    "attribute",
    "body",
    "cognition",
    "communication",
    "event",
    "feeling",
    "food",
    "group",
    "location",
    "motive",
    "object",
    "person",
    "phenomenon",
    "plant",
    "possession",
    "process",
    "quantity",
    "relation",
    "shape",
    "state",
    "substance",
    "time",
)
_VERB_FILES = (
    "body",
    "change",
    "cognition",
    "communication",
    "competition",
    "consumption",
    "contact",
    "creation",
    "emotion",
    "motion",
    "perception",
    "possession",
    "social",
    "stative",
    "weather",
)
_LEXICOGRAPHER_FILES = [
    *("adj.all", "adj.pert", "adv.all"),
    *(f"noun.{name}" for name in _NOUN_FILES),
    *(f"verb.{name}" for name in _VERB_FILES),
    "adj.ppl",
]


def wordnet(
    part: Literal["noun", "verb", "adj", "adv"] = "noun", release: Literal["3.0", "3.1"] = "3.0"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """WordNet's synsets of one part of speech and the pointers that leave them. Release 3.0 has
    82,115 nouns, 3.1 has 82,192.

    Synsets have the columns `id` (part-of-speech letter and offset, "n00001740"), `file` (the
    lexicographer file, 26 of nouns), `words` (list of str), `gloss` (str: definition and examples).
    Pointers have `source`, `target` (ids; a target may be of another part of speech) and `symbol`
    (`@` hypernym, `~` hyponym, `!` antonym, `#p` part holonym, ...: wninput(5WN)).
    """
    file = path("wordnet" if release == "3.0" else "wordnet31") / f"data.{part}"
    synsets: list[tuple[str, str, list[str], str]] = []
    pointers: list[tuple[str, str, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        identifier = _synset_id(fields[2], fields[0])
        words = int(fields[3], 16)
        synsets.append(
            (
                identifier,
                _LEXICOGRAPHER_FILES[int(fields[1])],
                fields[4 : 4 + 2 * words : 2],
                gloss.strip(),
            )
        )
        start = 5 + 2 * words
        for at in range(start, start + 4 * int(fields[start - 1]), 4):
            pointers.append((identifier, fields[at], _synset_id(fields[at + 2], fields[at + 1])))
    return (
        pd.DataFrame(synsets, columns=["id", "file", "words", "gloss"]),
        pd.DataFrame(pointers, columns=["source", "symbol", "target"]),
    )


def _synset_id(kind: str, offset: str) -> str:
    """Adjective satellites (s) lie in the adjectives' file, and pointers call them a."""
    return kind.replace("s", "a") + offset


_RELATIONS = ("Depends", "Recommends", "Suggests", "Enhances")


def debian_packages() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Debian's packages and what they name as related, as the fetching machine's own release had
    them (about 64,000 in Debian 12).

    Packages have the columns, all str: `package`, `source` (the source package), `section`,
    `synopsis`, `description` (long; may be empty). Relations have `package`, `relation` (Depends,
    Recommends, Suggests, Enhances) and `other` (a package's name, which may be virtual or absent
    from `packages`; alternatives each have a row).
    """
    folder = path("debian-packages")
    long = {
        item["Description-md5"]: item.get("Description-en", "")
        for item in _stanzas(folder / "Translation-en")
        if "Description-md5" in item
    }
    packages: list[tuple[str, str, str, str, str]] = []
    relations: list[tuple[str, str, str]] = []
    for item in _stanzas(folder / "Packages"):
        name = item["Package"]
        text = long.get(item.get("Description-md5", ""), "")
        section = item.get("Section", "").rsplit("/", 1)[-1]
        source = item.get("Source", name).split(" ", 1)[0]
        packages.append(
            (name, source, section, item.get("Description", "").split("\n", 1)[0], _prose(text))
        )
        for relation in _RELATIONS:
            others = re.findall(r"(?:^|[,|])\s*([a-z0-9][a-z0-9+.-]+)", item.get(relation, ""))
            relations += [(name, relation, other) for other in dict.fromkeys(others)]
    return (
        pd.DataFrame(packages, columns=["package", "source", "section", "synopsis", "description"]),
        pd.DataFrame(relations, columns=["package", "relation", "other"]),
    )


def _stanzas(file: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a Debian control file, as {field: value}; continuation lines keep their
    line breaks.
    """
    for stanza in re.split(r"\n\n+", file.read_text(encoding="utf-8").strip("\n")):
        fields = re.split(r"\n(?=\S)", stanza)
        yield {key: value.strip() for key, _, value in (field.partition(":") for field in fields)}


def _prose(description: str) -> str:
    """A long description without its first line (the synopsis) and without the marks of the control
    format.
    """
    lines = [line.strip() for line in description.split("\n")[1:]]
    return "\n".join("" if line == "." else line for line in lines)
