"""Damages to what a command is given, by kind of input; `tests/fuzz.py` tries them.

A generator `of_<kind>(draw)` yields (how, what to do to the path, whether no result can survive
it). Positions and values come from `draw`.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class Inapplicable(Exception):
    """There is nothing in the file that can be damaged so."""


Damages = Iterator[tuple[str, Callable[[Path], Any], bool]]


# ---- bytes ---------------------------------------------------------------------------------------


def of_bytes(draw: random.Random) -> Damages:
    """Of any file: how, what to do, whether no result can survive it."""

    def cut(path: Path, share: float) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    def flip(path: Path, place: float) -> None:
        content = bytearray(path.read_bytes())
        content[int(len(content) * place)] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    share = draw.uniform(0.02, 0.98)
    place = draw.random()
    yield "absent", lambda path: path.unlink(), True
    yield "empty", lambda path: path.write_bytes(b""), True
    yield "a folder", lambda path: (path.unlink(), path.mkdir())[1], True
    yield f"cut to {share:.2f}", lambda path: cut(path, share), False
    yield f"a bit flipped at {place:.3f}", lambda path: flip(path, place), False
    yield "random bytes", lambda path: path.write_bytes(draw.randbytes(400)), True
    yield "neither a file nor a folder", _a_socket, True


def _a_socket(path: Path) -> None:
    """A socket: a fifo would wait for a writer."""
    import socket

    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may be 108 letters long
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


# ---- text ----------------------------------------------------------------------------------------

LINES = {  # a line more, behind good ones: what it is, and whether it must be refused
    "null": ("null", True),
    "a list": ("[1, 2]", True),
    "a number": ("7", True),
    "an object without keys": ("{}", True),
    "keys that nobody knows": ('{"txt": "a"}', True),
    "text that is a number": ('{"text": 3, "prompt": 3}', True),
    "text that is null": ('{"text": null, "prompt": null}', True),
    "an empty text": ('{"text": "", "prompt": ""}', False),
    "half an object": ('{"text": "abc", "prompt": "ab', True),
    "NaN": ('{"text": NaN, "prompt": NaN}', True),
    "a lone surrogate": ('{"text": "\\ud800", "prompt": "\\ud800"}', True),
    "deep nesting": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", True),
    "messages that are text": ('{"messages": "hello"}', True),
    "messages without roles": ('{"messages": [{"content": "a"}]}', True),
    "messages of no content": ('{"messages": []}', True),
    "a role that the template refuses": (
        '{"messages": [{"role": "system", "content": "a"}]}', True
    ),
    "a prompt and a text": ('{"text": "a", "prompt": "b", "completion": "c"}', False),
    "a completion without a prompt": ('{"completion": "c"}', True),
    "a long line": (json.dumps({"text": "word " * 50_000, "prompt": "word " * 9}), False),
    "a line separator within": ('{"text": "a\u2028b", "prompt": "a\u2028b"}', False),
    "a form feed within": ('{"text": "a b", "prompt": "a b"}\x0c', False),
    "a NUL": ('{"text": "a\x00b", "prompt": "a\x00b"}', True),
}  # fmt: skip


def of_text(draw: random.Random) -> Damages:
    """Of a .jsonl file."""
    yield from of_bytes(draw)

    def add(path: Path, line: str) -> None:
        path.write_bytes(path.read_bytes() + line.encode() + b"\n")

    for how, (line, fatal) in LINES.items():
        yield how, lambda path, line=line: add(path, line), fatal
    yield "a byte order mark", lambda path: _rewrite(path, lambda b: b"\xef\xbb\xbf" + b), False
    yield "UTF-16", lambda path: _rewrite(path, lambda b: b.decode().encode("utf-16")), True
    yield (
        "Latin-1",
        lambda path: _rewrite(path, lambda b: b + '{"text": "é"}\n'.encode("latin-1")),
        True,
    )
    yield (
        "carriage returns",
        lambda path: _rewrite(path, lambda b: b.replace(b"\n", b"\r\n")),
        False,
    )
    yield "blank lines alone", lambda path: path.write_text("\n \n\n"), True
    yield "one record", lambda path: _rewrite(path, lambda b: b.splitlines(True)[0]), False


def of_log(draw: random.Random) -> Damages:
    """Of a log of steps. Its last line may be torn, as after a power cut."""
    yield from of_bytes(draw)
    lines = {"a number": b"7\n", "a list": b"[]\n", "another object": b'{"a": 1}\n'}
    for how, line in lines.items():
        yield f"{how} at the end", lambda path, line=line: _rewrite(path, lambda b: b + line), False
        yield f"{how} within", lambda path, line=line: _rewrite(path, lambda b: line + b), True
    yield "a line twice", lambda path: _rewrite(path, lambda b: b + b.splitlines(True)[-1]), False


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


# ---- arrays and weights --------------------------------------------------------------------------


def of_arrays(draw: random.Random) -> Damages:
    """Of an .npz file."""
    yield from of_bytes(draw)

    def change(path: Path, what: Callable[[dict[str, np.ndarray]], Any]) -> None:
        with np.load(path) as saved:
            arrays = {name: saved[name] for name in saved.files}
        what(arrays)
        np.savez(path, **arrays)

    def one(path: Path, how: Callable[[np.ndarray], np.ndarray], kind: str) -> None:
        def apply(arrays: dict[str, np.ndarray]) -> None:
            names = [n for n, a in arrays.items() if a.dtype.kind in kind]
            if not names:
                raise Inapplicable
            name = draw.choice(names)
            arrays[name] = how(arrays[name])

        change(path, apply)

    def put(value: float) -> Callable[[np.ndarray], np.ndarray]:
        def apply(array: np.ndarray) -> np.ndarray:
            array = array.copy()
            array.flat[draw.randrange(array.size)] = value
            return array

        return apply

    numbers: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, bool]] = {
        "NaN": (put(np.nan), "f", True),
        "infinity": (put(np.inf), "f", True),
        "no rows": (lambda a: a[:0], "fiu", True),
        "a row less": (lambda a: a[:-1], "fiu", True),
        "a dimension more": (lambda a: a[..., None], "fiu", False),
        "a single number": (lambda a: a.flat[0], "fiu", True),
        "complex numbers": (lambda a: a.astype(complex), "f", True),
        "text for numbers": (lambda a: a.astype(str), "fiu", True),
        "objects": (lambda a: a.astype(object), "fiu", True),
        "true and false": (lambda a: a > 0, "fiu", False),
        "dates": (lambda a: a.astype("int64").astype("datetime64[s]"), "fiu", True),
        "half precision": (lambda a: a.astype("float16"), "f", False),
        "other byte order": (lambda a: a.astype(a.dtype.newbyteorder())[:], "fiu", False),
        "labels below 0": (put(-1), "iu", True),
        "labels beyond 2^40": (put(1 << 40), "iu", True),
        "labels with a half": (lambda a: a + 0.5, "iu", True),
        "all zeros": (lambda a: a * 0, "fiu", False),
    }
    for how, (what, kind, fatal) in numbers.items():
        yield how, lambda path, w=what, k=kind: one(path, w, k), fatal
    yield "an array less", lambda path: change(path, lambda a: a.pop(draw.choice(list(a)))), False
    yield "an array more", lambda path: change(path, lambda a: a.update(more=np.ones(2))), False
    yield "an .npy", lambda path: _an_npy(path), True


def _an_npy(path: Path) -> None:
    with open(path, "wb") as stream:
        np.save(stream, np.ones((3, 2)))


def of_weights(draw: random.Random) -> Damages:
    """Of a .safetensors file."""
    for how, what, fatal in of_bytes(draw):
        yield how, what, fatal or how.startswith("cut")

    def change(path: Path, what: Callable[[dict[str, Any]], Any]) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(path, "pt") as saved:
            metadata = saved.metadata()
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        what(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)

    def put(value: float) -> Callable[[dict[str, Any]], None]:
        def apply(tensors: dict[str, Any]) -> None:
            tensor = tensors[draw.choice(list(tensors))]
            tensor.view(-1)[draw.randrange(tensor.numel())] = value

        return apply

    def other(how: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
        def apply(tensors: dict[str, Any]) -> None:
            name = draw.choice(list(tensors))
            tensors[name] = how(tensors[name])

        return apply

    def header(path: Path, length: int) -> None:
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    yield "NaN", lambda path: change(path, put(float("nan"))), True
    yield "infinity", lambda path: change(path, put(float("inf"))), True
    yield "a tensor less", lambda path: change(path, lambda t: t.pop(draw.choice(list(t)))), True
    yield (
        "a tensor more",
        lambda path: change(path, lambda t: t.update(x=next(iter(t.values())).clone())),
        False,
    )
    yield "a tensor of another shape", lambda path: change(path, other(lambda t: t[:-1])), True
    yield "a tensor flat", lambda path: change(path, other(lambda t: t.reshape(-1, 1))), True
    yield "whole numbers", lambda path: change(path, other(lambda t: t.int())), False
    yield "a header without an end", lambda path: header(path, 2**63), True
    yield "a header that ends early", lambda path: header(path, 9), True


# ---- models --------------------------------------------------------------------------------------


def of_config(draw: random.Random) -> Damages:
    """Of a model's folder of which the configuration alone is read."""

    def config(path: Path, **changes: Any) -> None:
        file = path / "config.json"
        values = json.loads(file.read_text())
        values.update(changes)
        file.write_text(json.dumps({k: v for k, v in values.items() if v != "away"}))

    changes: dict[str, tuple[dict[str, Any], bool]] = {
        "an unknown kind": ({"model_type": "nonesuch"}, True),
        "no kind": ({"model_type": "away"}, True),
        "a kind that is a number": ({"model_type": 3}, True),
        "code of its own": ({"auto_map": {"AutoModelForCausalLM": "model.Own"}}, True),
        "quantised": ({"quantization_config": {"quant_method": "fp8"}}, True),
        "a wider model": ({"hidden_size": 48}, False),
        "a deeper model": ({"num_hidden_layers": 4}, False),
        "a shallower model": ({"num_hidden_layers": 0}, True),
        "heads that do not divide it": ({"num_attention_heads": 3}, False),
        "no heads": ({"num_attention_heads": 0}, True),
        "a smaller vocabulary": ({"vocab_size": 100}, False),
        "a negative vocabulary": ({"vocab_size": -5}, True),
        "a vocabulary in words": ({"vocab_size": "many"}, True),
        "an activation that nobody knows": ({"hidden_act": "nonesuch"}, False),
        "few positions": ({"max_position_embeddings": 4}, False),
        "no positions": ({"max_position_embeddings": 0}, False),
        "end tokens beyond the vocabulary": ({"eos_token_id": 999_999}, False),
        "a dtype that nobody knows": ({"dtype": "float7"}, False),
        "rotary of an unknown kind": ({"rope_parameters": {"rope_type": "nonesuch"}}, False),
        "another class": ({"architectures": ["LlamaForSequenceClassification"]}, False),
    }
    for how, (values, fatal) in changes.items():
        yield f"config: {how}", lambda path, v=values: config(path, **v), fatal
    yield "config: a list", lambda path: (path / "config.json").write_text("[]"), True
    yield "config: not finite", lambda path: config(path, rms_norm_eps=float("nan")), False


UNFIT = {  # to the weights, or to be run
    "config: a wider model",
    "config: a deeper model",
    "config: heads that do not divide it",
    "config: a smaller vocabulary",
    "config: not finite",
    "config: a dtype that nobody knows",
    "config: rotary of an unknown kind",
    "config: an activation that nobody knows",
}


def of_model(draw: random.Random) -> Damages:
    """Of a folder that `save_pretrained` wrote."""
    yield "absent", lambda path: shutil.rmtree(path), True
    yield "an empty folder", lambda path: (shutil.rmtree(path), path.mkdir())[1], True
    yield "a file", lambda path: (shutil.rmtree(path), path.write_text("x"))[0], True
    for how, what, fatal in of_weights(draw):
        yield f"weights: {how}", lambda path, w=what: w(path / "model.safetensors"), fatal
    for file in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        for how, what, fatal in of_bytes(draw):
            sure = fatal and file in ("config.json", "tokenizer.json")
            yield f"{file}: {how}", lambda path, w=what, f=file: _if_there(path / f, w), sure

    for how, what, fatal in of_config(draw):
        yield how, what, fatal or how in UNFIT
    yield "a pickle for weights", _a_pickle, True
    yield (
        "an index of shards that are not there",
        lambda path: _an_index(path, "model-2.safetensors"),
        True,
    )
    yield (
        "an index that points out of the folder",
        lambda path: _an_index(path, "../../x.safetensors"),
        True,
    )
    yield (
        "a tokenizer with code",
        lambda path: _tokenizer_says(path, auto_map={"AutoTokenizer": ["own.T", None]}),
        True,
    )
    yield (
        "a chat template that is no template",
        lambda path: (path / "chat_template.jinja").write_text("{% for %}"),
        False,
    )


def of_stored(draw: random.Random) -> Damages:
    """Of a model's folder whose tokenizer is not read."""
    yield from (damage for damage in of_model(draw) if "token" not in damage[0])


def _if_there(path: Path, what: Callable[[Path], None]) -> None:
    if not path.is_file():
        raise Inapplicable
    what(path)


def _a_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _an_index(path: Path, shard: str) -> None:
    (path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _tokenizer_says(path: Path, **values: Any) -> None:
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---- code of the user's --------------------------------------------------------------------------

MODULES = {
    "a syntax error": "def f(:\n",
    "an import that is not there": "import nonesuch\n",
    "it ends the program": "raise SystemExit(0)\n",
    "it raises": "raise ValueError('no')\n",
    "nothing in it": "",
    "NUL bytes": "a\x00b",
}


def of_module(draw: random.Random) -> Damages:
    """Of a Python file with a function."""
    yield from of_bytes(draw)
    for how, text in MODULES.items():
        yield how, lambda path, t=text: path.write_text(t), True


# ---- tables and images ---------------------------------------------------------------------------


def of_table(draw: random.Random) -> Damages:
    """Of a .csv file."""
    yield from of_bytes(draw)

    def lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    yield "a heading alone", lambda path: lines(path, lambda rows: rows[:1]), True
    yield "no heading", lambda path: lines(path, lambda rows: rows[1:]), True
    yield "a heading twice", lambda path: lines(path, lambda rows: [rows[0], *rows]), False
    yield (
        "a column twice",
        lambda path: lines(path, lambda rows: [r + "," + r.split(",")[0] for r in rows]),
        True,
    )
    yield (
        "a column less",
        lambda path: lines(path, lambda rows: [r.rpartition(",")[0] for r in rows]),
        False,
    )
    yield (
        "a row of another length",
        lambda path: lines(path, lambda rows: [*rows, rows[-1] + ",1,2,3"]),
        True,
    )
    yield "a row twice", lambda path: lines(path, lambda rows: [*rows, rows[-1]]), False
    yield "an open quote", lambda path: lines(path, lambda rows: [*rows, '"' + rows[-1]]), True
    yield (
        "words for numbers",
        lambda path: lines(
            path,
            lambda rows: [
                *rows[:-1],
                ",".join([rows[-1].split(",")[0], *["nonesuch"] * rows[-1].count(",")]),
            ],
        ),
        False,
    )
    yield "a byte order mark", lambda path: _rewrite(path, lambda b: b"\xef\xbb\xbf" + b), False
    yield "Latin-1", lambda path: _rewrite(path, lambda b: b + "é,1\n".encode("latin-1")), True


def of_images(draw: random.Random) -> Damages:
    """Of a folder of images, perhaps in a folder a class."""
    from PIL import Image

    def some(path: Path) -> Path:
        return draw.choice(sorted(p for p in path.rglob("*") if p.suffix in (".png", ".jpg")))

    def made(mode: str) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            file = some(path)
            size = Image.open(file).size
            if mode == "I;16":
                Image.fromarray(np.full(size[::-1], 4000, np.uint16)).save(file.with_suffix(".png"))
            else:
                suffix = ".tif" if mode in ("CMYK", "F") else ".png"
                Image.new(mode, size).save(file.with_suffix(suffix))
                if suffix == ".tif":
                    file.unlink()

        return apply

    yield "absent", lambda path: shutil.rmtree(path), True
    yield "a file", lambda path: (shutil.rmtree(path), path.write_text("x"))[0], True
    yield "an empty folder", lambda path: (shutil.rmtree(path), path.mkdir())[1], True
    for how, what, _ in of_bytes(draw):
        yield f"an image: {how}", lambda path, w=what: w(some(path)), False
    for mode in ("1", "L", "P", "LA", "RGBA", "I;16", "CMYK", "F"):
        yield f"an image of mode {mode}", made(mode), False
    yield "an image of one pixel", lambda path: Image.new("RGB", (1, 1)).save(some(path)), False
    yield "a text among images", lambda path: (path / "readme.txt").write_text("x"), False
    yield "a text called .png", lambda path: (path / "x.png").write_text("x"), False
    yield "an empty class", lambda path: (path / "zz empty").mkdir(), False


KINDS = {
    "arrays": of_arrays,
    "config": of_config,
    "images": of_images,
    "log": of_log,
    "model": of_model,
    "module": of_module,
    "stored": of_stored,
    "table": of_table,
    "text": of_text,
    "weights": of_weights,
}
