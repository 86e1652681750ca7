"""Manifests and scales: read strictly, and wrong ones told in one line."""

import subprocess
import sys

import pytest

from shared import manifest, paths
from shared.errors import UserError

GOOD = (
    "name: one\ndisplay: One\ntitle: T\nexperiments:\n  first: {title: A, minutes: 1, memory_gb: 1,"
    " data: [b, a]}\n"
)


def refuse(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_toy_is_read(toy):
    (name, paper), *rest = manifest.manifests().items()
    assert (name, rest) == ("toy", [])
    assert paper.experiments["clock"].timed
    assert not paper.experiments["squares"].timed
    assert paper.tables["both"] == ["squares", "slow"]
    assert manifest.scale_config("toy", "cpu")["clock"] == {}
    assert manifest.scale_config("toy", "cpu")["squares"]["factor_scale"] == 0.1


def test_a_scale_without_a_file_runs_nothing(toy):
    assert manifest.scale_config("toy", "paper") == {}


@pytest.mark.parametrize(
    ("call", "arguments", "said"),
    [
        (manifest.manifest, ("toi",), "unknown paper 'toi'; did you mean toy?"),
        (manifest.manifest, ("zzz",), "unknown paper 'zzz'; there are: toy"),
        (manifest.scale_config, ("toy", "cpuu"), "unknown scale 'cpuu'; did you mean cpu?"),
        (
            manifest.check_experiment,
            ("toy", "sqares"),
            "unknown experiment of toy 'sqares'; did you mean squares?",
        ),
        (
            manifest.bound_function,
            ("toy", "tables", "bth"),
            "unknown table of toy 'bth'; did you mean both?",
        ),
    ],
)
def test_an_unknown_name_is_told_with_near_ones(toy, call, arguments, said):
    assert refuse(call, *arguments) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace("title: T", "titel: T"), "unknown key 'titel'; did you mean title?"),
        (GOOD.replace("minutes: 1", "minutes: -1"), "'experiments.first.minutes' = -1"),
        (GOOD.replace("minutes: 1", "minutes: soon"), "'experiments.first.minutes' = 'soon'"),
        (GOOD.replace(", minutes: 1", ""), "'experiments.first.minutes' is missing"),
        (GOOD.replace("name: one", "name: two"), "the folder is 'one'"),
        (GOOD + "tables: {t: [second]}", "table 't' takes rows of 'second'"),
        (GOOD.replace("first:", "not-a-name:"), "must be a Python identifier"),
        (GOOD + "experiments: [", "not valid YAML"),
        ("- a list", "must map names to values"),
    ],
)
def test_a_wrong_manifest_is_one_line_that_names_the_file(write_paper, text, said):
    write_paper("one", {"paper.yaml": text})
    message = refuse(manifest.manifest, "one")
    assert said in message
    assert "paper.yaml" in message


@pytest.mark.parametrize(
    ("entry", "said"),
    [("frist: {}", "did you mean first?"), ("first: 3", "must map keys to values")],
)
def test_a_wrong_scale_file_is_one_line(write_paper, entry, said):
    write_paper("one", {"paper.yaml": GOOD, "scales/cpu.yaml": entry})
    assert said in refuse(manifest.scale_config, "one", "cpu")


def test_data_needed_is_what_the_experiments_of_the_scale_need(write_paper):
    write_paper("one", {"paper.yaml": GOOD, "scales/cpu.yaml": "first:"})
    write_paper(
        "two",
        {
            "paper.yaml": GOOD.replace("name: one", "name: two").replace("[b, a]", "[c]"),
            "scales/cpu.yaml": "first:",
        },
    )
    assert manifest.data_needed("one", "cpu") == ["a", "b"]
    assert manifest.data_needed(None, "cpu") == ["a", "b", "c"]
    assert manifest.data_needed(None, "gpu") == []


def test_a_scale_is_laid_over_what_all_scales_share(write_paper):
    write_paper(
        "one",
        {
            "paper.yaml": GOOD,
            "scales/_base.yaml": "first: {steps: 3, sizes: [1, 2]}",
            "scales/smoke.yaml": "first: {sizes: [1]}",
            "scales/cpu.yaml": "{}",
        },
    )
    assert manifest.scale_config("one", "smoke") == {"first": {"steps": 3, "sizes": [1]}}
    assert manifest.scale_config("one", "cpu") == {}, "what runs is the scale's to say"
    assert manifest.scale_config("one", "gpu") == {}


def test_what_all_scales_share_is_checked_too(write_paper):
    files = {"paper.yaml": GOOD, "scales/cpu.yaml": "first:"}
    write_paper("one", {**files, "scales/_base.yaml": "frist: {steps: 3}"})
    assert "_base.yaml: unknown experiment 'frist'" in refuse(manifest.scale_config, "one", "cpu")


USES = GOOD.replace("data: [b, a]", "uses: [second]")
USES += "  second: {title: B, minutes: 1, memory_gb: 1}\n"


def test_an_experiment_that_is_used_must_exist_run_and_not_use_its_user(write_paper):
    files = {"paper.yaml": USES, "scales/smoke.yaml": "{first: , second: }"}
    write_paper("one", {**files, "scales/cpu.yaml": "first:"})
    assert manifest.needs("one", "first", "smoke").uses == ["second"]
    assert set(manifest.scale_config("one", "smoke")) == {"first", "second"}
    assert "lists first, which uses second: list that too" in refuse(
        manifest.scale_config, "one", "cpu"
    )
    write_paper("one", {"paper.yaml": USES.replace("[second]", "[third]")})
    assert "'first' uses 'third', which is not an experiment" in refuse(manifest.manifest, "one")
    write_paper("one", {"paper.yaml": USES.replace("[second]", "[first]")})
    assert "'first' uses itself" in refuse(manifest.manifest, "one")


AT = GOOD.replace("[b, a]}", "[b, a], at: {gpu: {gpu: true, memory_gb: 64, threads: 3, data: []}}}")


def test_what_an_experiment_needs_depends_on_the_scale(write_paper):
    write_paper("one", {"paper.yaml": AT, "scales/cpu.yaml": "first:", "scales/gpu.yaml": "first:"})
    here, there = manifest.needs("one", "first", "cpu"), manifest.needs("one", "first", "gpu")
    assert (here.gpu, here.memory_gb, here.threads, here.data) == (False, 1, 1, ["b", "a"])
    assert (there.gpu, there.memory_gb, there.threads, there.data) == (True, 64, 3, [])
    assert (there.title, there.minutes) == ("A", 1)
    assert manifest.data_needed("one", "cpu") == ["a", "b"]
    assert manifest.data_needed("one", "gpu") == []
    assert (
        refuse(manifest.needs, "one", "first", "gpuu") == "unknown scale 'gpuu'; did you mean gpu?"
    )
    assert "did you mean first?" in refuse(manifest.needs, "one", "frist", "gpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AT.replace("at: {gpu", "at: {gpuu"), "unknown scale 'gpuu'; did you mean gpu?"),
        (
            AT.replace("memory_gb: 64", "memory: 64"),
            "at gpu: unknown key 'memory'; did you mean memory_gb?",
        ),
        (AT.replace("memory_gb: 64", "title: B"), "at gpu: unknown key 'title'"),
        (AT.replace("memory_gb: 64", "memory_gb: -1"), "at gpu: 'memory_gb' = -1"),
    ],
)
def test_a_wrong_need_of_a_scale_is_one_line(write_paper, text, said):
    write_paper("one", {"paper.yaml": text})
    assert said in refuse(manifest.manifest, "one")


def test_zo2_asks_for_a_gpu_where_its_scales_say_cuda():
    for scale in paths.SCALES:
        for name, entry in manifest.scale_config("zo2", scale).items():
            assert manifest.needs("zo2", name, scale).gpu == (entry.get("device") == "cuda"), (
                name,
                scale,
            )
    assert {
        name
        for name in manifest.scale_config("zo2", "gpu")
        if manifest.needs("zo2", name, "gpu").gpu
    } >= {"memory", "throughput"}
    assert manifest.data_needed("zo2", "gpu") == []
    assert manifest.data_needed(None, "gpu") == []


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ("def t(): pass", "must take ['first']"),
        ("def t(first, second): pass", "t(first, second) must take ['first']"),
        ("def other(first): pass", "has no function 't'"),
    ],
)
def test_a_function_takes_the_experiments_of_its_manifest(write_paper, tables, said):
    write_paper("one", {"paper.yaml": GOOD + "tables: {t: [first]}", "tables.py": tables})
    assert said in refuse(manifest.bound_function, "one", "tables", "t")


def test_ready_are_the_tables_whose_experiments_all_run(toy):
    assert set(manifest.ready("toy", "cpu", "tables")) == {"squares", "both"}
    assert set(manifest.ready("toy", "gpu", "tables")) == {"squares"}


def test_exponents_are_numbers():
    assert manifest.parse_yaml("[1e-3, -2E5, 1.5e-2, 12, e3, 1e]") == [
        0.001,
        -200000.0,
        0.015,
        12,
        "e3",
        "1e",
    ]


def test_nothing_heavy_is_imported():
    code = (
        "import sys, shared.manifest, shared.dependencies, shared.cli; print({'torch', 'pandas',"
        " 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )
