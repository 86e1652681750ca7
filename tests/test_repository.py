"""What the repository says of itself is true: pins, environments, the README's commands and
examples, links, rules of safety.
"""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shared import cli, data, manifest, paths
from shared.commands.options import Parser

PAPERS = sorted(manifest.manifests())
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "data/README.md",
    *(f"projects/{paper}/README.md" for paper in PAPERS),
]
REFERENCE = paths.ROOT / "results" / "reference" / "cpu"
# all that files here may name
HOSTS = {"arxiv.org", "json-schema.org", "keepachangelog.com", "www.apache.org"}


def text_of(name: str) -> str:
    return (paths.ROOT / name).read_text(encoding="utf-8")


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=paths.ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [paths.ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and (not suffixes or file.suffix in suffixes)]


# ---- what is installed ---------------------------------------------------------------------------

PROJECT = tomllib.loads(text_of("pyproject.toml"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [
    Requirement(line)
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
]


def by_name(requirements: list[Requirement]) -> dict[str, str]:
    return {canonicalize_name(one.name): str(one.specifier) for one in requirements}


def test_every_dependency_has_its_reason():
    lines = [
        line
        for line in text_of("pyproject.toml").splitlines()
        if re.match(r'    "[\w-]+[<>=]', line)
    ]
    assert len(lines) == len(WANTED)
    assert [line for line in lines if not re.search(r"# \w+", line)] == []


def test_the_pins_cover_all_dependencies_and_satisfy_them():
    lines = [line for line in text_of("constraints.txt").splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    # they must do for every build of torch and every Python
    assert [line for line in lines if "+" in line or ";" in line] == []
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in WANTED:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), (
            requirement
        )


def test_conda_users_get_the_same():
    conda = yaml.safe_load(text_of("environment.yml"))
    assert conda["name"] == PROJECT["name"]
    (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    assert pip[:2] == ["-c constraints.txt", "-e ."]
    assert by_name([Requirement(line) for line in pip[2:]]) == by_name(WANTED)
    (python,) = [entry for entry in conda["dependencies"] if str(entry).startswith("python>")]
    assert (
        Requirement(python).specifier
        == Requirement(f"python{PROJECT['requires-python']}").specifier
    )


# ---- what the pages say --------------------------------------------------------------------------


def shell_lines(page: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    blocks = [text for language, text in fenced if language in ("sh", "")]
    return [
        line.split("  #")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.strip()
    ]


def commands() -> list[str]:
    in_text = [span for page in PAGES for span in re.findall(r"`([^`\n]+)`", text_of(page))]
    starts = ("make ", "repro ", "snakemake ", "bash ")
    found = [line for page in PAGES for line in shell_lines(page)] + [
        span for span in in_text if span.startswith(starts)
    ]
    return list(dict.fromkeys(found))


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_every_command_on_a_page_exists(command, monkeypatch):
    program, *arguments = shlex.split(command)
    if program == "torchrun":  # with options of its own, then a module
        program, arguments = "python", arguments[arguments.index("-m") :]

    def refuse(self, message):
        raise AssertionError(f"{command}: {message}")

    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    if program == "make":
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        run("make", "-n", *arguments)
    elif program == "repro":
        check_repro(cli._parser().parse_args(arguments))
    elif program == "python":
        assert arguments[0] == "-m"
        assert arguments[1] in [f"projects.{paper}" for paper in PAPERS]
        monkeypatch.setattr(Parser, "error", refuse)
        importlib.import_module(f"{arguments[1]}.command").parser().parse_args(arguments[2:])
    elif program == "snakemake":
        run(sys.executable, "-m", "snakemake", "-n", *arguments)
    elif program == "bash":
        assert (paths.ROOT / arguments[0]).is_file()
    elif program == "printf":
        assert arguments[-2] == ">"
    elif program == "pre-commit":
        assert arguments == ["install"]
    else:
        assert command == ". .venv/bin/activate"


def check_repro(options: argparse.Namespace) -> None:
    """The names after a subcommand exist as well."""
    function = options.function.__name__
    if function == "_run":
        manifest.check_experiment(*options.experiment.split("/"))
    elif function == "_make":
        paper, _, name = options.target.partition("/")
        assert not name or name in getattr(manifest.manifest(paper), options.kind)
    elif function == "_list" and "/" in (options.target or ""):
        manifest.check_experiment(*options.target.split("/"))
    elif function == "_list" and options.target:
        manifest.manifest(options.target)
    elif function in ("_claims", "_readme", "_keep", "_check") and options.paper:
        manifest.manifest(options.paper)
    elif getattr(options, "names", []) and options.names != ["NAME"]:
        from shared.data import catalogue

        assert set(options.names) <= set(catalogue.catalogue())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_what_it_can_do_and_can_do_it():
    targets = re.findall(r"^make (\S+) ", run("make"), re.MULTILINE)
    assert {"reproduce", "test", "lint", "bench", "report", "compare"} <= set(targets)
    for target in {*targets, *manifest.manifests()}:
        run("make", "-n", target)
    assert "snakemake reproduce_all --cores all" in run("make", "-n", "reproduce")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_reproduce_goes_on_where_a_dataset_cannot_be_fetched(tmp_path):
    """In a folder with a `.venv` whose programs only say that they were called; fetching fails."""
    shutil.copy(paths.ROOT / "Makefile", tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, status in (("repro", 1), ("snakemake", 3)):
        (programs / name).write_text(f"#!/bin/sh\necho called {name} $*\nexit {status}\n")
        (programs / name).chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", ".venv/installed"):
        (tmp_path / name).touch()
    done = subprocess.run(
        ["make", "reproduce", "SCALE=smoke"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("called")] == [
        "called repro data fetch --for all --scale smoke",
        "called snakemake reproduce_all --cores all --config scale=smoke",
    ]
    assert done.returncode != 0, "what failed in Snakemake is a failure of make"


def test_the_bench_is_of_timed_experiments():
    (names,) = re.findall(r"^BENCH := (.*)$", text_of("Makefile"), re.MULTILINE)
    for paper, name in (entry.split("/") for entry in names.split()):
        assert manifest.manifest(paper).experiments[name].timed
        assert name in manifest.manifest(paper).tables
        for scale in ("smoke", "cpu"):
            assert name in manifest.scale_config(paper, scale)


def test_the_smoke_scale_needs_no_download():
    assert manifest.data_needed(None, "smoke") == []


def run_examples(page: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT), "HF_HUB_OFFLINE": "1"}
    examples = re.findall(r"^```python\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    assert examples
    for code in examples:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture
def standin(tmp_path):
    """A small model in a folder named after the entry of the catalogue, which goes before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "good", "bad", "coffee", "tea"]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "smollm2-135m"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>"
    ).save_pretrained(folder)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape, tie_word_embeddings=True))
    model.save_pretrained(folder)
    return model


def test_the_library_example_of_the_readme_runs(tmp_path, standin):
    from transformers import AutoModelForCausalLM

    run_examples("README.md", tmp_path)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model-tuned", local_files_only=True)
    changed = [
        name
        for name, tensor in after.state_dict().items()
        if not tensor.equal(standin.state_dict()[name])
    ]
    assert any("layers.0" in name for name in changed)


def test_the_data_of_the_command_example_are_what_the_command_reads(tmp_path):
    (line,) = [line for line in shell_lines("README.md") if line.startswith("printf ")]
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    rows = [json.loads(row) for row in (tmp_path / "reviews.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(row.keys() == {"text"} and row["text"] for row in rows)
    (command,) = [
        line for line in shell_lines("README.md") if line.startswith("python -m projects.zo2")
    ]
    assert "--data reviews.jsonl" in command


def test_the_readme_and_the_doctor_say_what_memory_the_manifests_ask_for(capsys, monkeypatch):
    from shared import doctor

    needs = [
        manifest.needs(paper, name, "cpu")
        for paper in manifest.manifests()
        for name in manifest.scale_config(paper, "cpu")
    ]
    most = max(one.memory_gb for one in needs)
    assert f"{most:g} GB of memory" in " ".join(text_of("README.md").split())
    for total, fine in ((most * 0.96e9, True), (most * 0.9e9, False)):
        monkeypatch.setattr(
            doctor.psutil,
            "virtual_memory",
            lambda total=total: argparse.Namespace(total=total, available=total),
        )
        (memory,) = [(good, said) for good, what, said in doctor._machine() if what == "memory"]
        assert memory[0] is fine
        assert f"({most:g} GB in all are needed)" in memory[1]


def test_the_readme_and_the_doctor_say_that_linux_is_needed(monkeypatch):
    from shared import doctor

    assert "They need Linux" in text_of("README.md")
    for platform, fine in (("linux", True), ("darwin", False)):
        monkeypatch.setattr(doctor.sys, "platform", platform)
        assert doctor._system()[0] is fine


@pytest.mark.parametrize("paper", PAPERS)
def test_the_library_examples_of_a_paper_run(paper, tmp_path, standin):
    run_examples(f"projects/{paper}/README.md", tmp_path)


def test_the_tests_that_a_page_names_exist():
    """A table of faults says which test holds each."""
    for page in PAGES:
        named = set(re.findall(r"`(test_\w+)`", text_of(page)))
        folder = paths.ROOT / "tests" / Path(page).parent
        there = {
            name
            for file in folder.glob("test_*.py")
            for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
        }
        assert named <= there, sorted(named - there)


def test_every_link_leads_somewhere():
    for page in [
        *PAGES,
        "CHANGELOG.md",
        *(f"docs/{file.name}" for file in (paths.ROOT / "docs").glob("*.md")),
    ]:
        for link in re.findall(r"\]\(([^)#\s]+)", text_of(page)):
            # a reference run makes them
            late = link == "docs/ledger.png" or link.startswith("results/reference/cpu")
            if "://" not in link and (REFERENCE.is_dir() or not late):
                assert (paths.ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


# ---- the papers ----------------------------------------------------------------------------------

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in text_of("README.md").splitlines()
    if line.count("arxiv.org")
]


def test_the_readme_lists_every_paper_once_and_links_its_arxiv_number():
    """What is said of a paper that is here, `repro readme` writes (tests/test_reference.py)."""
    names = [row[0].strip("[").partition("]")[0] for row in ROWS]
    assert len(set(names)) == len(names) >= len(PAPERS)
    for row in ROWS:
        number, link = re.findall(r"\d{4}\.\d{5}", row[2])
        assert number == link
        assert (row[3] == "planned") is ("projects/" not in row[0])


# Runs the experiments of a paper, those first whose rows others use, as their jobs would. Importing
# torch once for each experiment would take most of the time.
ALL_OF_A_PAPER = """
import sys
from shared import cli, manifest, rows, paths
paper, todo = sys.argv[1], list(manifest.scale_config(sys.argv[1], "smoke"))
while todo:
    name = next(n for n in todo if not set(manifest.needs(paper, n, "smoke").uses) & set(todo))
    todo.remove(name)
    if cli.main(["run", f"{paper}/{name}", "--scale", "smoke"]):
        sys.exit(f"{paper}/{name} failed")
    path = rows.rows_path(paths.results_dir(), "smoke", paper, name)
    path.with_name(f".{name}.current").touch()
"""
BY_JOBS = "ecif"  # the paper whose experiments are jobs of Snakemake


@pytest.mark.workflow
def test_the_whole_workflow_runs_at_scale_smoke(tmp_path):
    """In a copy, whose path has a space in it: every experiment, table, figure and claim of every
    paper, and the page.
    """
    absent = [name for name in manifest.data_needed(None, "smoke") if not data.stamp(name).exists()]
    if absent:
        pytest.skip(f"not in the cache: repro data fetch {' '.join(absent)}")
    copy = tmp_path / "a copy"
    for name in ("shared", "projects", "workflows", "profiles", "data"):
        shutil.copytree(
            paths.ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "cache")
        )
    shutil.copy(paths.ROOT / "Snakefile", copy)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("REPRO_", "SNAKEMAKE_"))
    }
    environment = {**kept, "REPRO_CACHE": str(paths.cache_dir())}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=copy, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    papers = [paper for paper in manifest.manifests() if paper != BY_JOBS]
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(lambda paper: run("-c", ALL_OF_A_PAPER, paper), papers))
    snakemake = ["-m", "snakemake", "reproduce_all", "--cores", "2", "--config", "scale=smoke"]
    planned = set(re.findall(r"^(\w+) +\d+$", run(*snakemake, "-n"), re.MULTILINE))
    experiments = {
        f"{paper}_{name}"
        for paper in manifest.manifests()
        for name in manifest.scale_config(paper, "smoke")
    }
    assert {name.split("_")[0] for name in planned & experiments} == {BY_JOBS}
    run(*snakemake)
    results = copy / "results" / "smoke"
    page = (results / "report.html").read_text(encoding="utf-8")
    for name, known in manifest.manifests().items():
        assert known.display in page
        for experiment in manifest.scale_config(name, "smoke"):
            assert (results / name / "rows" / f"{experiment}.json").is_file()
        for kind in ("tables", "figures"):
            made = {file.stem for file in (results / name / kind).glob("*.*")}
            assert made == set(manifest.ready(name, "smoke", kind))
        assert json.loads((results / name / "claims.json").read_text(encoding="utf-8"))
    assert "Nothing to be done" in run(*snakemake)


# ---- rules ---------------------------------------------------------------------------------------


def test_no_file_names_a_registry_or_a_path_of_somebodys_machine():
    hosts = re.compile(r"https?://([\w.-]+)")
    homes = re.compile(r"(?<![\w.])/(?:work|root|home|opt|Users)/\w")
    for file in tracked():
        if (
            file.suffix in (".png", ".svg", ".npz", ".safetensors")
            or REFERENCE.parent in file.parents
        ):
            continue
        text = file.read_text(encoding="utf-8")
        assert set(hosts.findall(text)) <= HOSTS, file
        assert homes.findall(text) == [], file


def test_results_in_the_repository_name_no_path_of_a_machine():
    for file in tracked(".json", ".csv", ".md", ".tex"):
        if REFERENCE.parent in file.parents:
            assert (
                re.findall(
                    r'(?<![\w.])/(?:work|root|home|opt|tmp|Users)/[^"\s]*',
                    file.read_text(encoding="utf-8"),
                )
                == []
            ), file


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_nothing_runs_code_that_comes_with_data():
    assert issubclass(manifest._Loader, yaml.SafeLoader)
    for file in tracked(".py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            at = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                assert not {name.split(".")[0] for name in names} & {
                    "pickle",
                    "cPickle",
                    "marshal",
                    "shelve",
                    "dill",
                    "joblib",
                }, at
            if isinstance(node, ast.Call):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called(node) not in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec"), (
                    at
                )
                assert called(node) != "yaml.load" or given.get("Loader") == "_Loader", at
                assert called(node) != "torch.load" or given.get("weights_only") == "True", at
                assert (
                    not called(node).endswith((".extractall", ".extract")) or "filter" in given
                ), at
                assert given.get("allow_pickle") in (None, "False"), at
                assert given.get("shell") in (None, "False"), at
                assert given.get("trust_remote_code") in (None, "False"), at


def test_models_enter_by_shared_models_alone_and_nothing_in_their_folders_runs():
    makers = ("from_pretrained", "from_config")
    # these take no `trust_remote_code`: they read JSON, or adapters for a model that is there
    without = {"CLIPImageProcessor.from_pretrained"} | {
        f"{name}.from_pretrained" for name in ("PeftConfig", "PeftModel")
    }
    seen = 0
    for file in tracked(".py"):
        if file.relative_to(paths.ROOT).parts[0] not in ("projects", "shared"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not called(node).endswith(makers):
                continue
            at = f"{file}:{node.lineno}"
            assert file.parent == paths.ROOT / "shared" / "models", at
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called(node) not in without and not called(node).endswith("._from_config"):
                assert given.get("trust_remote_code") == "False", at
                seen += 1
    assert seen


@pytest.mark.parametrize(
    ("what", "where"),
    [("file_digest(", "shared/files.py"), ("/proc/self/status", "shared/meters.py")],
)
def test_what_is_shared_is_written_once(what, where):
    files = [
        file for folder in ("shared", "projects") for file in (paths.ROOT / folder).rglob("*.py")
    ]
    using = {
        str(file.relative_to(paths.ROOT))
        for file in files
        if f'("{what}' in file.read_text() or f".{what}" in file.read_text()
    }
    assert using == {where}


def test_git_keeps_what_is_made_out():
    for name in (
        ".venv/",
        ".snakemake/",
        "data/cache/",
        "results/cpu/",
        "results/smoke/report.html",
    ):
        done = subprocess.run(["git", "check-ignore", "-q", name], cwd=paths.ROOT, check=False)
        if done.returncode > 1:
            pytest.skip("not a git checkout")
        assert done.returncode == 0, name
    assert [file for file in tracked() if file.stat().st_size > 2_000_000] == []
