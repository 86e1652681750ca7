"""torchvision beside a CPU torch: imports in processes of their own."""

import subprocess
import sys

import pytest
import torch

import shared
from shared import torchvision_cpu


def _python(code, *, extra_path="", cwd=None):
    import os

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if extra_path:
        environment["PYTHONPATH"] = str(extra_path)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=cwd,
        check=False,
    )


def test_everything_that_needs_torchvision_imports():
    done = _python(
        "import shared, torchvision, timm, transformers, peft; from torchvision import transforms;"
        " transforms.Resize(3)"
    )
    assert done.returncode == 0, done.stderr


def test_the_pure_parts_of_torchvision_work():
    code = """
import shared, torch
from torchvision import transforms
from torchvision.transforms import v2
from transformers import ViTImageProcessor
image = transforms.ToPILImage()(torch.rand(3, 8, 8))
assert transforms.ToTensor()(image).shape == (3, 8, 8)
assert v2.Resize(4)(torch.rand(3, 8, 8)).shape == (3, 4, 4)
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="torchvision's own library loads beside a CUDA torch"
)
def test_without_the_hook_the_import_fails():
    """When this test fails, `shared/torchvision_cpu.py` is no longer needed: remove it."""
    done = _python("import torchvision")
    assert done.returncode != 0, "torchvision imports without help"
    assert "torchvision::nms" in done.stderr


def test_importing_shared_does_not_import_torch():
    done = _python(
        "import shared, sys; assert 'torch' not in sys.modules and 'torchvision' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_a_torchvision_with_its_operators_is_left_untouched(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "mine = torch.library.Library('torchvision', 'DEF')\n"
        "mine.define('something_else(Tensor x) -> Tensor')\n"
        "whole = hasattr(torch.ops.torchvision, 'nms')\n"
    )
    code = """
import sys, torch
# what a library that loads would have registered
own = torch.library.Library("torchvision", "FRAGMENT")
own.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import shared
from shared import torchvision_cpu
import torchvision
assert torchvision.whole
assert torchvision_cpu._keep_alive == []
assert not any(type(f).__name__ == "_BeforeTorchvision" for f in sys.meta_path)
"""
    done = _python(code, extra_path=tmp_path)
    assert done.returncode == 0, done.stderr


def test_missing_operators_are_defined_once(tmp_path):
    code = f"""
import torch
from shared.torchvision_cpu import define_missing_operators
assert define_missing_operators({str(tmp_path)!r})
assert hasattr(torch.ops.torchvision, "nms") and hasattr(torch.ops.torchvision, "qnms")
assert not define_missing_operators({str(tmp_path)!r})
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_a_library_that_cannot_be_loaded_is_taken_for_none(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    done = _python(
        "from shared.torchvision_cpu import define_missing_operators as d; assert"
        f" d({str(tmp_path)!r})"
    )
    assert done.returncode == 0, done.stderr


def test_without_torchvision_its_absence_is_reported_as_ever():
    code = """
import sys, shared, importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = (
    lambda name, *rest: None if name == "torchvision" else find(name, *rest)
)
try:
    import torchvision
except ModuleNotFoundError as error:
    assert error.name == "torchvision"
else:
    raise AssertionError
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_the_hook_is_registered_once():
    hooks = sum(type(f).__name__ == "_BeforeTorchvision" for f in sys.meta_path)
    shared.torchvision_cpu.install()
    torchvision_cpu.install()
    assert sum(type(f).__name__ == "_BeforeTorchvision" for f in sys.meta_path) == (
        hooks if "torchvision" in sys.modules else 1
    )
