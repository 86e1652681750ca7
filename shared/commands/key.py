"""What a result depends on, as a digest: whoever goes on with a run under the same key ends with
the same result.

Put everything into it: each option that changes a number, the content of each file, the trained
weights. `model_digest` and `source_digest` add the user's code, which may change while the weights
do not: all of it that is loaded, since a module of a model may be written in any file. What the
code reads besides, a file of settings say, is seen in the model's outputs on one batch alone.
"""

import hashlib
import inspect
import json
import site
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from shared import paths
from shared.dependencies import PACKAGES
from shared.errors import UserError
from shared.files import sha256

if TYPE_CHECKING:
    from torch import nn


def digest(inputs: Mapping[str, Any]) -> str:
    """64 hexadecimal digits of everything in `inputs`; the order of the names does not matter.

    Args:
        inputs: by name. Tensors and arrays count by dtype, shape and content; a `Path` by the
            content of the file, or of all files of the folder; a module of torch by
            `model_digest` without a batch; a recipe by its fields; lists, tuples and mappings by
            what they hold; the rest as JSON.

    Raises:
        UserError: a file cannot be read.
        TypeError, ValueError: a value is none of these, or a number that is not finite.
    """
    total = hashlib.sha256()
    for name in sorted(inputs):
        for part in (name.encode(), *_parts(inputs[name])):
            total.update(struct.pack("<q", len(part)))  # so that no two inputs read alike
            total.update(part)
    return total.hexdigest()


def _parts(value: Any) -> Iterable[bytes | memoryview]:
    torch = sys.modules.get("torch")  # without it there are no tensors
    if torch is not None and isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        yield f"tensor {data.dtype} {tuple(data.shape)}".encode()
        yield memoryview(data.reshape(-1).view(torch.uint8).numpy())
    elif torch is not None and isinstance(value, torch.nn.Module):
        yield f"module {model_digest(value)}".encode()
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of objects has no content to digest")
        yield f"array {value.dtype.str} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Path):
        files = sorted(f for f in value.rglob("*") if f.is_file()) if value.is_dir() else [value]
        for file in files:
            name = file.relative_to(value) if file != value else ""
            yield f"file {name} {sha256(file)}".encode()
    elif isinstance(value, BaseModel):
        yield from _parts(value.model_dump(mode="json"))
    elif isinstance(value, Mapping):
        yield f"mapping {digest({str(key): part for key, part in value.items()})}".encode()
    elif isinstance(value, list | tuple):
        yield f"list {digest({f'{i:012}': part for i, part in enumerate(value)})}".encode()
    else:
        yield b"json " + json.dumps(value, sort_keys=True, allow_nan=False).encode()


def model_digest(model: "nn.Module", *batch: Any, **named: Any) -> str:
    """64 hexadecimal digits of a model: its architecture, parameters, buffers (those that no
    checkpoint keeps as well), which parts are in training mode, the source of its class, the
    user's code (`loaded_code`), and its outputs on one batch.

    Args:
        model: left as it is.
        batch, named: what the model is called with, in evaluation mode and without gradients; none
            leaves the outputs out. They depend on the machine and the number of threads in the last
            bits, and so does the digest.
    """
    import torch

    inputs: dict[str, Any] = {"architecture": str(model), "source": _source(type(model))}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inputs[f"parameter {name}"] = parameter
    for name, buffer in model.named_buffers(remove_duplicate=False):
        inputs[f"buffer {name}"] = buffer
    modes = {name: part.training for name, part in model.named_modules()}
    inputs["training"] = modes
    if batch or named:
        try:
            model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                inputs["outputs"] = _tensors(model(*batch, **named))
        finally:
            for name, part in model.named_modules():
                part.training = modes[name]
    inputs["code"] = loaded_code()  # after the call, which may import more
    return digest(inputs)


def _tensors(output: Any) -> Any:
    """The tensors of what a model returns, and nothing else of it."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        return {str(key): _tensors(part) for key, part in output.items()}
    if isinstance(output, list | tuple):
        return [_tensors(part) for part in output]
    return None


def source_digest(made: Callable[..., Any] | ModuleType) -> str:
    """64 hexadecimal digits of the file in which a user's function, class or module is written, and
    of the rest of the user's code (`loaded_code`).

    Raises UserError where there is no such file: what is built in or made elsewhere.
    """
    source = _source(made)
    if source is None:
        raise UserError(f"{made!r} is written in no file; give a function of a module of yours")
    # by content: a file has one name as FILE.py:function and another as package.module:function
    return digest({"source": source, "code": sorted(set(loaded_code().values()))})


def loaded_code() -> dict[str, str]:
    """The user's code: the sha256 of the file of each loaded module, by its name, that belongs
    neither to Python, nor to an installed package, nor to this repository's packages.
    """
    places = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [*site.getsitepackages(), site.getusersitepackages()]
    others = {Path(place).resolve() for place in places}
    others |= {paths.ROOT / package for package in PACKAGES}
    code = {}
    for name, module in list(sys.modules.items()):
        source = getattr(module, "__dict__", {}).get("__file__")
        file = Path(source).resolve() if isinstance(source, str) else None
        if file and file.is_file() and others.isdisjoint(file.parents):
            code[name] = sha256(file)
    return code


def _source(made: Any) -> str | None:
    try:
        file = inspect.getsourcefile(made)
    except TypeError:
        file = None
    return sha256(Path(file)) if file and Path(file).is_file() else None
