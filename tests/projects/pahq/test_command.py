"""The command on a user's own model and prompts: results, going on after a kill, refusals."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from projects.pahq import discover as discovering
from projects.pahq.circuit import load
from projects.pahq.command import main
from projects.pahq.engine import Engine
from projects.pahq.graph import Graph
from projects.pahq.metrics import Kl
from projects.pahq.picture import draw
from projects.pahq.search import search
from projects.pahq.tasks import TEXT, encode, examples, repeated
from tests.projects.pahq.conftest import configuration, shaken

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


def save_model(folder, family="llama", seed=0):
    """A model folder with a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[EOS]": 1} | {word: n for n, word in enumerate(WORDS, 2)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    shaken(configuration(family), seed).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "m")


GOOD = [
    {"clean": "a b c d", "corrupted": "e b c d", "answer": "a", "wrong": "e"},
    {"clean": "c b a d", "corrupted": "f b a d", "answer": ["c", "g"], "wrong": ["f"]},
]


@pytest.fixture
def task(tmp_path):
    def write(records=GOOD):
        path = tmp_path / "task.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def arguments(model, task, out, *more):
    return [
        "discover", "--model", str(model), "--task", str(task), "--out", str(out),
        "--threshold", "0.05", *more,
    ]  # fmt: skip


def test_a_circuit_is_what_the_search_finds(model, task, tmp_path, capsys):
    out = tmp_path / "circuit"
    assert main(arguments(model, task(), out)) == 0
    circuit = load(out)
    decoder, found = discovering.load(str(model), str(task()), 1, 0, torch.device("cpu"))
    data = (found.clean, found.corrupted, found.positions)
    policy = discovering.Policy("pahq-receiver", "int8")
    metric = Kl(Engine(decoder, *data).logits())
    expected = search(Engine(decoder, *data, policy), metric, 0.05, fresh=True)
    assert (circuit.mask == expected.mask).all()
    assert np.allclose(circuit.effects, expected.effects, equal_nan=True)
    assert 0 < circuit.mask.sum() < decoder.graph.edges
    kept = json.loads((out / "edges.json").read_text())
    assert len(kept) == circuit.mask.sum() == circuit.about["kept_edges"]
    assert pd.read_parquet(out / "edges.parquet")["kept"].sum() == len(kept)
    assert (out / "circuit.svg").read_text().lstrip().startswith("<?xml")
    assert circuit.about["threshold"] == 0.05
    assert not circuit.about["threshold_below_floor"]


@pytest.mark.parametrize("more", [(), ("--start", "40"), ("--policy", "fp32")])
def test_a_run_that_was_stopped_ends_as_if_it_had_not(model, task, tmp_path, monkeypatch, more):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    path = task()
    assert main(arguments(model, path, whole, *more)) == 0
    watch = discovering._Watch.__call__
    seen = []

    def killed(self, step):
        watch(self, step)
        seen.append(step)
        if len(seen) in (4, 9):
            raise KeyboardInterrupt

    monkeypatch.setattr(discovering._Watch, "__call__", killed)
    for _ in range(2):
        assert main(arguments(model, path, cut, *more)) == 130
        assert not (cut / "circuit.json").exists()
    assert main(arguments(model, path, cut, *more)) == 0
    for file in ("edges.parquet", "edges.json", "log.jsonl", "circuit.svg"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes(), file


def test_another_recipe_in_the_same_folder_is_refused(model, task, tmp_path, capsys):
    out = tmp_path / "circuit"
    assert main(arguments(model, task(), out)) == 0
    assert main(arguments(model, task(), out, "--format", "bf16")) == 2
    assert "--format" in capsys.readouterr().err


def test_a_threshold_below_the_floor_is_said_and_recorded(model, task, tmp_path, capsys):
    out = tmp_path / "circuit"
    low = ("--format", "int4", "--scope", "linear", "--threshold", "1e-7")
    assert main([*arguments(model, task(), out), *low]) == 0
    assert "below" in capsys.readouterr().err
    assert load(out).about["threshold_below_floor"]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([GOOD[0], GOOD[1] | {"clean": "a b c d e"}], "prompt 2: the clean one has 5 tokens"),
        ([GOOD[0] | {"corrupted": "e b c"}], "the corrupted one has 3 tokens"),
        ([GOOD[0] | {"answer": "a b"}], "is 2 tokens of this model"),
        ([GOOD[0] | {"corrupted": "a b c d"}], "are the same"),
        ([GOOD[0] | {"corrupted": "a  b c d"}], "same tokens"),
        ([GOOD[0] | {"wrong": "a"}], "right and wrong at once"),
        ([GOOD[0] | {"wrong": []}], "'wrong' must be"),
        ([GOOD[0] | {"label": 1}], "unknown field 'label'"),
        ([{"clean": "a"}], "'corrupted' must be a text"),
        ([], "holds no prompts"),
    ],
)
def test_wrong_prompts_are_refused_in_a_line(model, task, tmp_path, capsys, records, said):
    out = tmp_path / "circuit"
    assert main(arguments(model, task(records), out)) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert not out.exists()
    assert main(arguments(model, task(), out)) == 0  # the corrected command, in the same folder


def test_what_is_not_there_is_refused(model, task, tmp_path, capsys):
    out = tmp_path / "circuit"
    for given, said in (
        (arguments(model, "nowhere.jsonl", out), "no file, and not one of ioi"),
        (arguments("nowhere", task(), out), "no model 'nowhere'"),
        (arguments(model, task(), out, "--masters", "prefetched", "--policy", "rtn"), "--masters"),
        (arguments(model, "ioi", out), "suits this model's tokenizer"),
    ):
        assert main(given) == 2
        assert said in capsys.readouterr().err


def test_a_family_without_adapter_is_refused_with_those_that_have_one(tmp_path, task, capsys):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    folder = save_model(tmp_path / "m")
    config = GPTNeoConfig(
        hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
        vocab_size=37, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained(folder)
    assert main(arguments(folder, task(), tmp_path / "c")) == 2
    error = capsys.readouterr().err
    assert "gpt_neo" in error
    assert "llama, mistral, qwen2" in error


def test_a_model_that_the_adapter_gets_wrong_is_refused(model, task, tmp_path, capsys, monkeypatch):
    from projects.pahq import families

    def wrong(network, family):
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight * 1.01)
        decoder = families._llama(network, family)
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight / 1.01)
        return decoder

    monkeypatch.setitem(families.FAMILIES, "llama", wrong)
    assert main(arguments(model, task(), tmp_path / "c")) == 2
    assert "does not give this model's own logits" in capsys.readouterr().err


def test_evaluate_and_compare(model, task, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(model, task(), first)) == 0
    assert main(arguments(model, task(), second, "--policy", "fp32")) == 0
    capsys.readouterr()
    given = ["evaluate", str(first), "--model", str(model), "--task", str(task())]
    assert main(given) == 0
    lines = {line[:36].strip(): line[36:].split() for line in capsys.readouterr().out.splitlines()}
    graph = load(first).graph
    assert lines["all edges"][:2] == [str(graph.edges), "0.0000"]
    assert int(lines["the circuit (faithfulness)"][0]) == load(first).mask.sum()
    rest = graph.edges - load(first).mask.sum()
    assert int(lines["all but the circuit (completeness)"][0]) == rest
    assert float(lines["the circuit (faithfulness)"][1]) < float(lines["no edges"][1])
    assert main(["compare", str(first), str(first)]) == 0
    same = capsys.readouterr().out
    assert "1.000" in same
    assert "AUC by the effects    1.000" in same
    assert main(["compare", str(first), str(second)]) == 0


def test_circuits_of_other_models_are_refused(model, task, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    other = save_model(tmp_path / "other", seed=1)
    assert main(arguments(model, task(), first)) == 0
    assert main(arguments(other, task(), second)) == 0
    assert main(["compare", str(first), str(second)]) == 2
    assert "different models" in capsys.readouterr().err
    given = ["evaluate", str(first), "--model", str(other), "--task", str(task())]
    assert main(given) == 2
    assert "of another model" in capsys.readouterr().err
    assert main(["compare", str(first), str(tmp_path)]) == 2
    assert "holds no circuit" in capsys.readouterr().err
    (first / "edges.parquet").write_bytes(b"cut")
    assert main(["compare", str(first), str(first)]) == 2
    assert "damaged" in capsys.readouterr().err


# ---- tasks and the picture -----------------------------------------------------------------------


def test_built_in_prompts_differ_where_they_should():
    for name in TEXT:
        made, _ = examples(name, 30, 0)
        assert made == examples(name, 30, 0)[0] != examples(name, 30, 1)[0]
        for one in made:
            assert one.clean != one.corrupted
            assert not set(one.right) & set(one.wrong)
    for one in examples("ioi", 30, 0)[0]:
        name, subject = one.right[0].strip(), one.wrong[0].strip()
        assert one.clean.count(name) == 1
        assert one.clean.count(subject) == 2
        assert one.corrupted.count(name) == one.corrupted.count(subject) == 0


def test_repeated_tokens_are_answered_by_the_first_half():
    task = repeated(50, 4, 0, half=5)
    assert (task.clean[:, :5] == task.clean[:, 5:]).all()
    assert (task.corrupted[:, 5:] == task.clean[:, 5:]).all()
    answers = task.right.float().argmax(-1)
    assert (answers == task.clean.gather(1, task.positions + 1)).all()
    assert not (task.right & task.wrong).any()


def test_prompts_are_scored_at_their_last_token(model):
    from projects.pahq.tasks import Example
    from shared.models import load_tokenizer

    found = encode(
        load_tokenizer(model), [Example("a b c", "d b c", ("a",), ("d",))], "difference", 37
    )
    assert found.positions.tolist() == [[2]]
    assert found.right[0, 0].nonzero().flatten().tolist() == [2 + WORDS.index("a")]


@pytest.mark.parametrize("edges", [0, 1, 100, 400])
def test_a_picture_of_any_size(edges, tmp_path):
    from projects.pahq.circuit import Circuit

    graph = Graph(6, 4, 2)
    places = np.argwhere(graph.full())
    chosen = places[np.random.default_rng(0).choice(len(places), edges, replace=False)]
    mask = np.zeros((graph.receivers, graph.senders), dtype=bool)
    effects = np.full(mask.shape, np.nan)
    for receiver, sender in chosen:
        mask[receiver, sender], effects[receiver, sender] = True, 0.1
    draw(Circuit(graph, mask, effects, {}), tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    assert f"{edges} of {graph.edges:,} edges" in text or "<svg" in text
