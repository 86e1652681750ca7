"""The user's text as rows of tokens: what a row holds, where the loss is, which rows a step
takes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.corpus import IGNORED, Corpus, prompt_tokens
from shared.errors import UserError

Rows = Callable[..., list[tuple[str, str]]]


def write(file: Path, lines: list[Any] | str) -> Path:
    file.write_text(
        lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    )
    return file


@pytest.fixture
def rows(tmp_path: Path, save_tokenizer: Callable[[Path], Any]) -> Rows:
    """A function: (tokens, tokens with a loss) of each row of a corpus as text; "|" ends a text."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer")

    def text(ids: torch.Tensor) -> str:
        return tokenizer.decode(ids.tolist()).replace("<end>", "|")

    def built(
        lines: list[Any] | str, length: int, suffix: str = ".jsonl", **options: Any
    ) -> list[tuple[str, str]]:
        corpus = Corpus.build(
            write(tmp_path / f"data{suffix}", lines),
            tokenizer,
            length,
            tmp_path / "corpus",
            **options,
        )
        batches = [corpus.batch([row]) for row in range(corpus.rows)]
        lengths = [batch["input_ids"].numel() for batch in batches]
        assert corpus.tokens == sum(lengths)
        assert corpus.lengths(np.arange(corpus.rows)[::-1]).tolist() == lengths[::-1]
        return [
            (text(batch["input_ids"][0]), text(batch["labels"][batch["labels"] != IGNORED]))
            for batch in batches
        ]

    return built


TEXTS = [{"text": "abcd"}, {"text": "efgh"}, {"text": "ij"}]
PROMPTS = [
    {"prompt": "abc", "completion": "de"},
    {"prompt": "abcdefgh", "completion": "xy"},
    {"prompt": "a", "completion": "uvwxyz"},
]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_texts_are_packed(rows: Rows) -> None:
    assert rows(TEXTS, 6) == [("abcd|e", "bcd|e"), ("fgh|ij", "gh|ij")]
    assert rows([{"text": "ab"}], 6) == [("ab|", "b|")]
    assert rows("one\ntwo\n\n\nthree\n", 20, ".txt") == [
        ("one\ntwo\n\n|\nthree\n|", "ne\ntwo\n\n|\nthree\n|")
    ]


@pytest.mark.parametrize("pack", [True, False])
def test_the_loss_is_on_the_completion(rows: Rows, pack: bool) -> None:
    assert rows(PROMPTS, 6, pack=pack) == [
        ("abcde|", "de|"),
        ("fghxy|", "xy|"),
        ("auvwxy", "uvwxy"),
    ]
    whole = "<user>q|<assistant>a|"
    assert rows([{"messages": CHAT}, {"messages": CHAT[:1]}], 64, pack=pack) == [
        (whole, "a|"),
        ("<user>q|", "user>q|"),
    ]


def test_unpacked_each_record_is_a_row_of_its_own_in_the_order_of_the_file(rows: Rows) -> None:
    # 5 tokens with the end, 4 (which just fit with it), 7 and 8 (which lose their ends), 2
    lines = [{"text": text} for text in ("abcd", "efg", "hijklm", "nopqrst", "u")]
    assert rows(lines, 5, pack=False) == [
        ("abcd|", "bcd|"),
        ("efg|", "fg|"),
        ("hijkl", "ijkl"),
        ("nopqr", "opqr"),
        ("u|", "|"),
    ]
    mixed = [
        {"text": "ab"},
        {"prompt": "p", "completion": "cd"},
        {"text": "ef"},
        {"messages": CHAT[:1]},
        {"text": "gh"},
    ]
    assert [row for row, _ in rows(mixed, 64, pack=False)] == [
        "ab|",
        "pcd|",
        "ef|",
        "<user>q|",
        "gh|",
    ]
    assert [row for row, _ in rows("one\ntwo\n\n\nthree\n", 20, ".txt", pack=False)] == [
        "one\ntwo\n\n|",
        "\nthree\n|",
    ]


def test_unpacked_a_row_depends_on_its_record_alone(rows: Rows) -> None:
    """More records than the tokenizer gets at a time; taking one away takes its row away and leaves
    the others as they are.
    """
    lines = [{"text": f"record {i} " + "x" * (i % 7)} for i in range(600)]
    every = rows(lines, 12, pack=False)
    assert [row for row, _ in every] == [f"{line['text']}|"[:12] for line in lines]
    assert rows(lines[:300] + lines[301:], 12, pack=False) == every[:300] + every[301:]


def test_unpacked_a_text_with_nothing_to_predict_is_left_out(
    tmp_path: Path, save_tokenizer: Callable[[Path], Any]
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    tokenizer.eos_token = None  # "b" is then a single token
    file = write(tmp_path / "data.jsonl", [{"text": "aa"}, {"text": "b"}, {"text": "cc"}])
    corpus = Corpus.build(file, tokenizer, 8, tmp_path / "corpus", pack=False)
    assert [
        tokenizer.decode(corpus.batch([row])["input_ids"][0].tolist()) for row in range(corpus.rows)
    ] == ["aa", "cc"]
    with pytest.raises(UserError, match="holds no text"):
        Corpus.build(
            write(tmp_path / "data.jsonl", [{"text": "b"}]),
            tokenizer,
            8,
            tmp_path / "corpus",
            pack=False,
        )


def test_a_folder_is_opened_again_only_if_it_was_made_in_the_same_way(
    tmp_path: Path, save_tokenizer: Callable[[Path], Any]
) -> None:
    tokenizer, file, folder = (
        save_tokenizer(tmp_path / "tokenizer"),
        write(tmp_path / "data.jsonl", TEXTS),
        tmp_path / "corpus",
    )

    def made(length: int = 6, pack: bool = True) -> tuple[int, int]:
        corpus = Corpus.build(file, tokenizer, length, folder, pack=pack)
        return corpus.rows, (folder / "about.json").stat().st_ino

    first = made()
    assert made() == first
    unpacked = made(pack=False)
    assert unpacked[0] == 3 != first[0]
    assert made(pack=False) == unpacked
    assert made()[0] == first[0]
    assert made(length=3)[0] == 4
    write(file, TEXTS[:1])
    assert made()[0] == 1
    assert [f.name for f in tmp_path.iterdir() if f.name.endswith(".part")] == []


def test_rows_are_padded_and_every_pass_takes_each_once(
    tmp_path: Path, save_tokenizer: Callable[[Path], Any]
) -> None:
    file = write(
        tmp_path / "data.jsonl",
        [{"prompt": "p", "completion": "x" * (1 + i % 3)} for i in range(10)],
    )
    built = Corpus.build(file, save_tokenizer(tmp_path / "tokenizer"), 8, tmp_path / "corpus")
    batch = built.batch([0, 2])
    assert batch["input_ids"].shape == (2, 5)
    assert (batch["labels"][0, 3:] == IGNORED).all()

    taken: list[int] = []
    built.batch = lambda rows: taken.extend(int(row) for row in rows)  # type: ignore[method-assign, assignment, return-value]
    for step in range(5):
        built.step_batches(7, step, 2, 2)
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    again, taken[:] = list(taken), []
    built.step_batches(7, 3, 2, 2)
    assert taken == again[12:16]
    assert np.unique(again).size == 10


LINES = {
    "not JSON": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "neither": (b'{"text": "a"}\n\n{"txt": "b"}\n', "line 3: needs a"),
    "empty": (b'{"text": ""}\n', "line 1: needs a"),
    "a number": (b'{"prompt": 3, "completion": "x"}\n', "line 1: needs a"),
    "no content": (b'{"messages": [{"role": "user"}]}\n', "line 1: needs a"),
    "refused by the template": (
        b'{"messages": [{"role": "system", "content": "x"}]}\n',
        "line 1: the tokenizer's chat template refuses it: no system role",
    ),
    "two kinds": (b'{"text": "a", "prompt": "b"}\n', 'line 1: both "text" and "prompt"'),
    "tools": (
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}\n',
        'line 1: "tools" are not put',
    ),
    "not UTF-8": (b'{"text": "\xff"}\n', "not UTF-8"),
    "nothing": (b"\n", "holds no text"),
}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_is_named(
    tmp_path: Path, save_tokenizer: Callable[[Path], Any], case: str, pack: bool
) -> None:
    content, message = LINES[case]
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError) as caught:
        Corpus.build(
            tmp_path / "bad.jsonl",
            save_tokenizer(tmp_path / "tokenizer"),
            8,
            tmp_path / "corpus",
            pack=pack,
        )
    assert str(caught.value).startswith(str(tmp_path / "bad.jsonl"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {f.name for f in tmp_path.iterdir()} == {"bad.jsonl", "tokenizer"}


def test_an_answer_that_does_not_follow_the_generation_prompt_is_refused(
    tmp_path: Path, save_tokenizer: Callable[[Path], Any]
) -> None:
    """Else the loss would be on the question too."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    built = Corpus.build(tmp_path / "a.jsonl", tokenizer, 60, tmp_path / "whole")
    labels = built.batch(range(1))["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORED]) == "b<end>"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<assistant>", "{% if add_generation_prompt %}<think>"
    )
    with pytest.raises(UserError, match=r"line 1: the chat template writes the conversation other"):
        Corpus.build(tmp_path / "a.jsonl", tokenizer, 60, tmp_path / "other")


def test_no_end_of_text_stands_between_a_prompt_and_its_completion(
    tmp_path: Path, save_tokenizer: Callable[[Path], Any]
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n')
    plain = Corpus.build(tmp_path / "a.jsonl", tokenizer, 60, tmp_path / "plain").batch(range(1))
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    assert tokenizer("ab")["input_ids"][-1] == end[1]
    ending = Corpus.build(tmp_path / "a.jsonl", tokenizer, 60, tmp_path / "end").batch(range(1))
    assert ending["input_ids"].tolist() == plain["input_ids"].tolist()
    for prompt in ("ab", "ab<end>", "<end>", ""):
        plain_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert prompt_tokens(tokenizer, prompt) == plain_ids
