"""Mutations of shared/commands and shared/files.py, each of which must turn the tests red.

    python tests/shared/commands/mutations.py          # all; some minutes on two cores
    python tests/shared/commands/mutations.py key      # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

MAIN, OPTIONS, RECIPE, INPUTS, KEY, FOLDER, LOG, CHECKPOINT, PIECES, SIGNALS, PROGRESS = (
    f"shared/commands/{name}.py"
    for name in (
        "main",
        "options",
        "recipe",
        "inputs",
        "key",
        "folder",
        "log",
        "checkpoint",
        "pieces",
        "signals",
        "progress",
    )
)
FILES = "shared/files.py"

MUTATIONS = [
    # ---- files ----
    Mutation(
        FILES,
        "    check_trained(tensors.items())\n",
        "",
        "a model that has come apart is saved",
        ("files",),
    ),
    Mutation(
        FILES,
        '    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")\n    temporary.unlink(',
        "    temporary = path\n    temporary.unlink(",
        "atomic write: without a rename",
        ("files",),
    ),
    Mutation(
        FILES,
        "        sync(temporary)\n        os.replace(temporary, path)",
        "        os.replace(temporary, path)",
        "atomic write: renamed before the content is on the disk",
        ("files",),
    ),
    Mutation(
        FILES,
        "    finally:\n        temporary.unlink(missing_ok=True)",
        "    finally:\n        pass",
        "atomic write: an error leaves the half file",
        ("files",),
    ),
    Mutation(
        FILES,
        "value, indent=2, allow_nan=False",
        "value, indent=2",
        "atomic write: JSON with NaN",
        ("files",),
    ),
    Mutation(
        FILES,
        "        temporary.chmod(mode)",
        "        pass",
        "atomic write: weights that only their maker can read",
        ("files",),
    ),
    Mutation(
        FILES,
        "key=lambda file: (str(file) == last, file)",
        "key=lambda file: file",
        "atomic write: the file that says all are there comes too early",
        ("files",),
    ),
    # ---- main ----
    Mutation(
        MAIN,
        "return _said(program, _explained(error, debug), 2)",
        "return _said(program, _explained(error, debug), 0)",
        "main: the net's exit status is success",
        ("main",),
    ),
    Mutation(
        MAIN,
        "128 + stopped.signal",
        "128",
        "main: a signal's number is not in the status",
        ("main",),
    ),
    Mutation(
        MAIN,
        "    print(f\"{program}: {' '.join(text.splitlines())}\", file=sys.stderr)",
        '    print(f"{program}: {text}", file=sys.stderr)',
        "main: an error of several lines is several lines",
        ("main",),
    ),
    Mutation(
        MAIN,
        "        sys.stdout.flush()",
        "        pass",
        "main: a broken pipe shows at the end of the process",
        ("main",),
    ),
    Mutation(
        MAIN,
        'if agreed and os.environ.get("RANK", "0") != "0":',
        'if os.environ.get("RANK", "0") != "0":',
        "main: an error of one rank alone is silent",
        ("main",),
    ),
    Mutation(
        OPTIONS,
        "default=argparse.SUPPRESS,",
        "default=False,",
        "main: --debug before the command is forgotten",
        ("main",),
    ),
    # ---- options ----
    Mutation(
        OPTIONS,
        "or (kind is float and not math.isfinite(value))",
        "or value == math.inf",
        "options: minus infinity is a number",
        ("options", "recipe"),
    ),
    Mutation(
        RECIPE,
        "bounds.update(most=part.lt, below=True)",
        "bounds.update(most=part.lt)",
        "recipe: an exclusive bound is inclusive",
        ("recipe",),
    ),
    Mutation(
        RECIPE,
        "cls.model_validate({**given, **values})",
        "cls.model_validate({**values, **given})",
        "recipe: an option goes before the value computed from it",
        ("recipe",),
    ),
    Mutation(
        RECIPE,
        '.replace("%", "%%")',
        "",
        "recipe: a per cent sign breaks the help",
        ("recipe",),
    ),
    # ---- inputs ----
    Mutation(
        INPUTS,
        "    except BaseException as error:",
        "    except Exception as error:",
        "inputs: an odd error of the user's code ends the command",
        ("inputs",),
    ),
    Mutation(
        INPUTS,
        "np.load(path, allow_pickle=False)",
        "np.load(path, allow_pickle=True)",
        "inputs: a pickle is loaded",
        ("inputs",),
    ),
    Mutation(
        INPUTS,
        "if first[0] != count:",
        "if first[0] < count:",
        "inputs: too few labels pass",
        ("inputs",),
    ),
    Mutation(
        INPUTS,
        "if os.fspath(folder) in sys.path:",
        "if False:",
        "inputs: the user's folder stays on the path",
        ("inputs",),
    ),
    Mutation(
        INPUTS,
        "if key not in own or key not in tensors or own[key].shape != tensors[key].shape:",
        "if key not in own or key not in tensors:",
        "inputs: weights of another shape pass",
        ("inputs",),
    ),
    # ---- key ----
    Mutation(
        KEY,
        'inputs["outputs"] = _tensors(model(*batch, **named))',
        "_tensors(model(*batch, **named))",
        "key: forgets the model's outputs",
        ("key",),
    ),
    Mutation(
        KEY,
        'inputs["code"] = loaded_code()',
        "pass",
        "key: forgets the user's code that the outputs on the batch do not show",
        ("key",),
    ),
    Mutation(
        KEY,
        'return digest({"source": source, "code": sorted(set(loaded_code().values()))})',
        "return source",
        "key: forgets what a user's function imports",
        ("key",),
    ),
    Mutation(
        KEY,
        "and others.isdisjoint(file.parents)",
        "",
        "key: takes torch and this repository for the user's code",
        ("key",),
    ),
    Mutation(
        KEY,
        'inputs[f"buffer {name}"] = buffer',
        "pass",
        "key: forgets the buffers",
        ("key",),
    ),
    Mutation(
        KEY,
        "model.named_buffers(remove_duplicate=False)",
        "((n, b) for n, b in model.state_dict().items())",
        "key: forgets the buffers that no checkpoint keeps",
        ("key",),
    ),
    Mutation(
        KEY,
        'yield f"tensor {data.dtype} {tuple(data.shape)}".encode()',
        'yield b"tensor"',
        "key: forgets dtype and shape",
        ("key",),
    ),
    Mutation(
        KEY,
        'total.update(struct.pack("<q", len(part)))',
        "pass",
        "key: a name and a value run together",
        ("key",),
    ),
    Mutation(
        KEY,
        'yield f"file {name} {sha256(file)}".encode()',
        'yield f"file {name} {file.stat().st_size}".encode()',
        "key: a file counts by its size",
        ("key",),
    ),
    Mutation(
        KEY,
        "                part.training = modes[name]",
        "                pass",
        "key: the model is left in evaluation mode",
        ("key",),
    ),
    Mutation(
        KEY,
        "        yield np.ascontiguousarray(value).tobytes()",
        "",
        "key: other data go on with old results",
        ("key",),
    ),
    # ---- folder ----
    Mutation(
        FOLDER,
        "            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            pass",
        "folder: the lock is not taken",
        ("folder",),
    ),
    Mutation(
        FOLDER,
        "if made and not begun(out / log, lines):",
        "if made and not (out / log).exists():",
        "folder: left behind after an error before the first step",
        ("folder",),
    ),
    Mutation(
        FOLDER,
        "if made and not begun(out / log, lines):",
        "if made:",
        "folder: a run is removed with an error",
        ("folder",),
    ),
    Mutation(
        FOLDER,
        "    known = read_json(path) if begun else None",
        "    known = read_json(path)",
        "folder: a corrected command is refused",
        ("folder",),
    ),
    Mutation(
        FOLDER,
        "    known = read_json(path) if begun else None",
        "    known = None",
        "folder: another run goes on",
        ("folder",),
    ),
    Mutation(
        FOLDER,
        'trial.write_bytes(b"x")',
        'trial.write_bytes(b"")',
        "folder: a full disk is known after hours of work",
        ("folder",),
    ),
    Mutation(
        FOLDER,
        '            remove(*place.glob(".*.part"))',
        "            pass",
        "folder: what a crash left is not swept away",
        ("folder",),
    ),
    # ---- log ----
    Mutation(
        LOG,
        'json.loads(line) if line.endswith(b"\\n") else None',
        "json.loads(line)",
        "log: a cut line is kept",
        ("log",),
    ),
    Mutation(
        LOG,
        "        self._file.truncate(end)",
        "        pass",
        "log: a new line is joined to a cut one",
        ("log",),
    ),
    Mutation(
        LOG,
        "        os.fsync(self._file.fileno())",
        "        pass",
        "log: a line is not on the disk",
        ("log",),
    ),
    Mutation(
        LOG,
        "            if not keep(record):\n                break",
        "            if not keep(record):\n                pass",
        "log: steps after the checkpoint stay",
        ("log",),
    ),
    # ---- checkpoint, pieces, signals, progress ----
    Mutation(
        CHECKPOINT,
        "if stored.shape != parameter.shape:",
        "if False:",
        "checkpoint: another model's weights are broadcast",
        ("checkpoint",),
    ),
    Mutation(
        CHECKPOINT,
        'tensors[f"optimizer.{key}.{name}"] = value',
        "pass",
        "checkpoint: forgets the optimizer",
        ("checkpoint",),
    ),
    Mutation(
        PIECES,
        "{digest(inputs)[:16]}",
        "{digest({})[:16]}",
        "pieces: those of other inputs are taken",
        ("checkpoint",),
    ),
    Mutation(
        PIECES,
        "self._lock.enter_context(alone(self.folder))",
        "pass",
        "pieces: two processes make the same",
        ("checkpoint",),
    ),
    Mutation(
        SIGNALS,
        "        if received:\n            raise KeyboardInterrupt",
        "        if received:\n            return",
        "signals: a second Ctrl-C is not heard",
        ("signals",),
    ),
    Mutation(
        PROGRESS,
        "(done - self._first) *",
        "done *",
        "progress: the time left counts steps of before",
        ("progress",),
    ),
]

if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "commands", sys.argv[1:], "shared"))
