"""What a user gives a command besides options: a function of a module, a model, arrays, weights.

Whatever is wrong with it, even an error that the user's own code raises, is one line.
"""

import importlib
import importlib.util
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

_KINDS = {
    "fiub": "numbers",
    "fiu": "numbers",
    "iu": "integers",
    "US": "text",
    "USiu": "text or integers",
    "b": "true or false",
}


# ---- the user's code -----------------------------------------------------------------------------


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Around a call of the user's code: what it raises, a call of `sys.exit` too, becomes a
    UserError that begins with `what` and names the line.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise UserError(f"{what}: it ends the program (SystemExit {error.code})") from None
    except BaseException as error:  # whatever the user's code likes to raise
        raise UserError(f"{what}: {_explained(error)}") from None


def _explained(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    text = textwrap.shorten(str(error), 200, placeholder=" ...")
    place = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith("<") or Path(frame.filename) == Path(__file__):
            continue
        place = f" ({frame.filename}, line {frame.lineno})"
        break
    return f"{type(error).__name__}: {text}{place}"


def user_module(text: str, option: str, callable_only: bool = True) -> Any:
    """The function that `text` names: "file.py:function", or "package.module:function" looked up
    from the current folder. The module is imported, and may import what lies beside it.

    Args:
        text: as the user wrote it.
        option: the option it was given to, for messages ("--reward").
        callable_only: refuse what cannot be called.

    Raises:
        UserError: there is no such file, module or function, it cannot be called, or importing it
            fails, in whatever way.
    """
    what = f"{option} {text}"
    module_name, _, name = text.rpartition(":")
    if not module_name or not name:
        raise UserError(
            f"{what}: write file.py:function, or package.module:function of what can be imported"
            " from here"
        )
    module = (
        _of_file(Path(module_name), what)
        if module_name.endswith(".py")
        else _by_name(module_name, what)
    )
    with user_code(what):  # a module may compute its attributes
        found = getattr(module, name, None)
    if found is None:
        there = ", ".join(n for n in vars(module) if not n.startswith("_")) or "nothing"
        raise UserError(f"{what}: {module_name} has no {name}; it has {_short(there)}")
    if callable_only and not callable(found):
        raise UserError(f"{what}: {name} is a {type(found).__name__}, not a function")
    return found


def _of_file(file: Path, what: str) -> ModuleType:
    if not file.is_file():
        raise UserError(f"{what}: there is no file {file}")
    specification = importlib.util.spec_from_file_location(f"user_{file.stem}", file.resolve())
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses and the like look their module up
    try:
        with user_code(what), _importable(file.resolve().parent):
            specification.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(specification.name, None)
        raise
    return module


def _by_name(name: str, what: str) -> ModuleType:
    with user_code(what), _importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # of something that the module itself imports
            raise UserError(f"{what}: there is no module {error.name} here") from None


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, os.fspath(folder))
    try:
        yield
    finally:
        if os.fspath(folder) in sys.path:  # the user's code may have changed it
            sys.path.remove(os.fspath(folder))


def user_model(text: str, option: str = "--model") -> "nn.Module":
    """The torch module that `text` names as of `user_module`: a module, or a function or class that
    makes one when it is called without arguments. As the user's code leaves it; call `.eval()`.

    Raises UserError as `user_module` does, and when it is, or makes, something else.
    """
    from torch import nn

    found = user_module(text, option, callable_only=False)
    if isinstance(found, nn.Module):
        return found
    name = text.rpartition(":")[2]
    if not callable(found):
        raise UserError(
            f"{option} {text}: {name} is a {type(found).__name__}; give a torch.nn.Module, or a"
            " function that returns one"
        )
    with user_code(f"{option} {text}"):
        made = found()
    if not isinstance(made, nn.Module):
        raise UserError(
            f"{option} {text}: {name}() returns a {type(made).__name__}, not a torch.nn.Module"
        )
    return made


# ---- files ---------------------------------------------------------------------------------------


MOST_LABEL = 2**20  # of classes that count from 0: a layer for more is a mistake in the labels


@dataclass(frozen=True)
class Array:
    """What an array of a user's file must be.

    Args:
        kinds: of its dtype: "fiu" numbers, "iu" integers, "US" text.
        shape: a name for a size that arrays share ("samples"), a number for one that is fixed, and
            at the end perhaps `...` for any more. A size with a name must not be 0.
        least: no value may be below.
        most: no value may be above.
        required: whether the file must have it.

    Numbers must be finite.
    """

    kinds: str
    shape: tuple[str | int | EllipsisType, ...]
    least: float | None = None
    most: float | None = None
    required: bool = True

    def described(self) -> str:
        sizes = ", ".join("..." if size is ... else str(size) for size in self.shape)
        return f"{_KINDS.get(self.kinds, self.kinds)} of shape [{sizes}]"

    def fits(self, values: np.ndarray) -> bool:
        open_ended = self.shape[-1:] == (...,)
        sizes = self.shape[: -1 if open_ended else None]
        return (
            values.dtype.kind in self.kinds
            and (values.ndim >= len(sizes) if open_ended else values.ndim == len(sizes))
            and all(
                size == there
                for size, there in zip(sizes, values.shape, strict=False)
                if isinstance(size, int)
            )
        )


def user_arrays(path: Path, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, without pickle; those that are not required may be absent, and
    what the file has besides is not read.

        user_arrays(path, {
            "x": Array("fiu", ("samples", ...)),
            "y": Array("iu", ("samples",), least=0),
            "id": Array("USiu", ("samples",), required=False),
        })

    Raises:
        UserError: there is no such file; it is damaged, or no .npz of plain arrays; an array is
            missing, or not as `arrays` says; sizes with one name differ, or are 0; a value is not
            finite.
    """
    values = _read(path, arrays)
    sizes: dict[str, tuple[int, str]] = {}
    for name, there in values.items():
        wanted = arrays[name]
        if not wanted.fits(there):
            raise UserError(
                f"{path}: '{name}' must be {wanted.described()}, not {there.dtype} of shape"
                f" {list(there.shape)}"
            )
        for size, count in zip(wanted.shape, there.shape, strict=False):
            if not isinstance(size, str):
                continue
            if count == 0:
                raise UserError(f"{path}: '{name}' holds no {size}")
            first = sizes.setdefault(size, (count, name))
            if first[0] != count:
                raise UserError(
                    f"{path}: there are {first[0]} {size} in '{first[1]}' and {count} in '{name}';"
                    " there must be as many"
                )
        if there.dtype.kind == "f" and not np.isfinite(there).all():
            place = np.argwhere(~np.isfinite(there))[0].tolist()
            raise UserError(f"{path}: '{name}' is {there[tuple(place)]} at {place}")
        if wanted.least is not None and there.min() < wanted.least:
            raise UserError(
                f"{path}: '{name}' holds {there.min()}; values count from {wanted.least:g}"
            )
        if wanted.most is not None and there.max() > wanted.most:
            raise UserError(
                f"{path}: '{name}' holds {there.max()}; values go up to {wanted.most:g}"
            )
    return values


def _read(path: Path, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not an .npz' if path.is_dir() else 'no such'} file")
    needed = [name for name, array in arrays.items() if array.required]
    try:
        with np.load(path, allow_pickle=False) as saved:
            there = list(saved.files)
            # in this machine's byte order, the only one that torch takes
            values = {
                name: saved[name].astype(saved[name].dtype.newbyteorder("="), copy=False)
                for name in arrays
                if name in there
            }
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise UserError(
            f"{path} is damaged, or no .npz file of plain arrays; save it with numpy.savez(path,"
            f" {', '.join(f'{name}=...' for name in needed)}) ({_short(_named(error))})"
        ) from None
    for name in needed:
        if name not in values:
            raise UserError(
                f"{path} has no array '{name}'; it has {_short(', '.join(there)) or 'none'}"
            )
    return values


def user_weights(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """The tensors of a .safetensors file by name, and its metadata.

    Raises UserError: there is no such file, it is damaged, or a weight is not finite.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as saved:
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            metadata = dict(saved.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged, or no .safetensors file ({_short(_named(error))})"
        ) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite")
    return tensors, metadata


def load_weights(model: "nn.Module", tensors: "Mapping[str, Tensor]", where: str) -> None:
    """Put all of a model's weights in place.

    Args:
        where: the file they are from, for the message.

    Raises:
        UserError: a name or a shape differs.
    """
    own = model.state_dict()
    for key in [*own, *tensors]:
        if key not in own or key not in tensors or own[key].shape != tensors[key].shape:
            there, here = (
                str(list(side[key].shape)) if key in side else "absent" for side in (tensors, own)
            )
            raise UserError(
                f"{where} does not fit the model: {key} is {here} in the model and {there} in the"
                " file"
            )
    model.load_state_dict(dict(tensors))


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _short(text: str) -> str:
    return textwrap.shorten(text, 120, placeholder=" ...")
