"""Text: articles, reviews, maths word problems, quotations, a dictionary."""

import gzip
import tomllib
from typing import Literal

import pandas as pd

from shared.data.cache import path
from shared.data.loaders import r


def wiki100() -> dict[str, str]:
    """101 Wikipedia articles on broad subjects as {title: text}, by title; 4.8 million characters
    in all.

    The text is plain but for section headings, which stand before their paragraph as "*: Heading -
    ".
    """
    return {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted(path("wiki100").glob("*.txt"))
    }


def fine_food_reviews() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Amazon fine-food reviews: (train, test) with 4,000 and 1,000 rows.

    Columns: `text` (str), `label` (int64; 1 for a score of "great", 0 for "other").
    """
    train, test = (
        r.lazy_load(path("fine-food") / "Rdata", name) for name in ("training_data", "testing_data")
    )
    return _reviews(train), _reviews(test)


def _reviews(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {"text": table["review"].astype(str), "label": (table["score"] == "great").astype("int64")}
    ).reset_index(drop=True)


def imdb() -> pd.DataFrame:
    """The 50,000 IMDB film reviews of Maas et al. (2011), 25,000 of each label; 418 rows repeat
    another. The official split is not marked.

    Columns: `text` (str, with `<br />` for line breaks), `label` (int64; 1: positive).
    """
    table = pd.read_csv(path("imdb") / "a1_IMDB_Dataset.csv")
    return pd.DataFrame(
        {"text": table["review"], "label": (table["sentiment"] == "positive").astype("int64")}
    )


VaderPart = Literal["tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets"]


def vader_ground_truth(part: VaderPart) -> pd.DataFrame:
    """Short texts with the mean of about 20 human ratings (Hutto and Gilbert, 2014).

    4,200 tweets, 3,708 Amazon, 10,605 film-review and 5,190 newspaper snippets.

    Columns: `id` (str), `valence` (float64, -4 most negative to 4 most positive), `text` (str).
    """
    rows = []
    for line in (
        (path("vader-gt") / f"{part}_GroundTruth.txt")
        .read_text(encoding="utf-8", errors="replace")
        .splitlines()
    ):
        identifier, valence, text = line.split("\t", 2)
        rows.append((identifier, float(valence), text))
    return pd.DataFrame(rows, columns=["id", "valence", "text"])


def gsm_symbolic() -> pd.DataFrame:
    """100 test questions of GSM8K, each with the symbolic template that GSM-Symbolic made of it.

    Columns, all str but the first: `id_orig` (int64, its number in GSM8K's test set), `question`,
    `solution` (worked, ends in "#### 140"), `answer` (what follows "####"), `question_template`,
    `solution_template`.
    """
    rows = []
    for file in sorted(path("gsm-symbolic").glob("*.toml")):
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
        rows.append(
            {
                "id_orig": fields["id_orig"],
                "question": fields["question"].strip(),
                "solution": fields["answer"].strip(),
                "answer": fields["answer"].rsplit("####", 1)[1].strip(),
                "question_template": fields["question_annotated"].strip(),
                "solution_template": fields["answer_annotated"].strip(),
            }
        )
    return pd.DataFrame(rows)


def fortunes() -> pd.DataFrame:
    """About 15,000 quotations of the fortune program. Columns: `subject` (str, the file's name),
    `text` (str).
    """
    rows = []
    for file in sorted(path("fortunes").iterdir()):
        if not file.name.startswith("."):
            quotations = file.read_text(encoding="utf-8", errors="replace").split("\n%\n")
            rows += [(file.name, text.strip("\n")) for text in quotations if text.strip("%\n ")]
    return pd.DataFrame(rows, columns=["subject", "text"])


_BASE64 = {
    letter: value
    for value, letter in enumerate(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    )
}


def gcide() -> pd.DataFrame:
    """The GNU Collaborative International Dictionary of English: one row for each entry, in the
    order of the text.

    Columns: `headword` (str, the alphabetically first of those that lead to the entry), `text`
    (str).
    """
    folder = path("gcide")
    # dictzip is gzip with an index of its own in a header field
    with gzip.open(folder / "gcide.dict.dz") as stream:
        data = stream.read()
    headwords: dict[tuple[int, int], str] = {}
    for line in (folder / "gcide.index").read_text(encoding="utf-8").splitlines():
        headword, start, length = line.split("\t")
        if not headword.startswith("00-database"):
            headwords.setdefault((_number(start), _number(length)), headword)
    spans = sorted(headwords)
    texts = [data[start : start + length].decode("utf-8", "replace") for start, length in spans]
    return pd.DataFrame({"headword": [headwords[span] for span in spans], "text": texts})


def _number(digits: str) -> int:
    """A number of a dictd index: base 64, most significant digit first."""
    value = 0
    for digit in digits:
        value = value * 64 + _BASE64[digit]
    return value
