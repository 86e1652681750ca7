"""The workflow: what it plans, what a change reruns, what a fault loses."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from shared import paths
from tests.conftest import Repository, make_empty_repository, make_toy_repository

pytestmark = pytest.mark.workflow

EXPERIMENTS = {"toy_squares", "toy_slow", "toy_clock", "toy_pair"}
AFTER = {"toy_tables", "toy_figures", "toy_claims", "page"}


def append(file, text):
    file.write_text(file.read_text() + text)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The toy, reproduced at scale smoke; not to be changed."""
    repository = make_toy_repository(tmp_path_factory.mktemp("reproduced"))
    run = repository.snakemake("--cores", "2", "--config", "scale=smoke")
    assert run.returncode == 0, run.stderr
    return repository


@pytest.fixture
def done(reproduced, tmp_path):
    """A copy of it, to be changed. Snakemake knows files by their path in the repository, so it
    takes the copy for its own.
    """
    return Repository(shutil.copytree(reproduced.root, tmp_path / "repository"))


def planned(repo, *arguments):
    return repo.planned(*arguments, "--config", "scale=smoke")


def test_every_target_takes_what_it_needs(toy_repo):
    assert toy_repo.planned() == EXPERIMENTS | AFTER
    assert toy_repo.planned("reproduce_all") == EXPERIMENTS | AFTER
    assert toy_repo.planned("report") == EXPERIMENTS | AFTER
    assert toy_repo.planned("toy") == EXPERIMENTS | AFTER - {"page"}
    assert toy_repo.planned("figures") == {"toy_squares", "toy_figures"}
    assert toy_repo.planned("tables") == {"toy_squares", "toy_slow", "toy_tables"}
    assert toy_repo.planned("--config", "scale=gpu") == {
        "toy_squares",
        "toy_clock",
        "toy_card",
        *AFTER,
    }
    assert toy_repo.planned("--config", "scale=paper") == {"page"}


def test_a_dry_run_is_quick(toy_repo):
    def cpu_seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = cpu_seconds()
    toy_repo.planned()
    assert cpu_seconds() - start < 3  # of the processor's time, as the machine may be busy


@pytest.mark.parametrize("setting", ["scale=big", "scael=cpu", "scale=3"])
def test_a_wrong_configuration_is_refused(toy_repo, setting):
    run = toy_repo.snakemake("-n", "--config", setting)
    assert run.returncode
    assert setting.split("=")[1 if setting.startswith("scale") else 0] in run.stdout + run.stderr


def test_everything_is_made_and_a_second_call_does_nothing(done):
    results = done.root / "results" / "smoke"
    assert (results / "report.html").is_file()
    assert {file.name for file in (results / "toy" / "rows").glob("*.json")} == {
        "squares.json",
        "slow.json",
    }
    assert {file.name for file in (results / "toy" / "figures").iterdir()} == {
        "squares.svg",
        "squares.png",
    }
    assert [
        entry["verdict"] for entry in json.loads((results / "toy" / "claims.json").read_text())
    ] == ["holds"] + 2 * ["not tested here"]
    assert planned(done) == set()


def test_a_changed_source_reruns_what_imports_it_and_nothing_else(done):
    toy = done.root / "projects" / "toy"
    append(toy / "method.py", "\n# changed\n")
    assert planned(done) == {"toy_squares", *AFTER}
    assert done.snakemake("--cores", "2", "--config", "scale=smoke").returncode == 0
    assert planned(done) == set()
    append(toy / "tables.py", "\n# changed\n")
    assert planned(done) == {"toy_tables", "page"}
    append(toy / "claims.py", "\n# changed\n")
    assert planned(done) == {"toy_tables", "toy_claims", "page"}


def test_a_failed_job_is_not_forgotten_when_a_source_changed(done):
    append(done.root / "projects" / "toy" / "experiments" / "slow.py", "\n# changed\n")
    (done.root / "fail").touch()
    assert done.snakemake("--cores", "1", "--config", "scale=smoke").returncode == 1
    for target in ("reproduce_all", "report", "toy", "tables", "claims"):
        assert "toy_slow" in planned(done, target), target


def test_rows_of_a_run_with_set_are_not_taken_for_the_scales(done):
    assert done.repro("run", "toy/slow", "--scale", "smoke").returncode == 0
    assert "toy_slow" not in planned(done)
    assert (
        done.repro("run", "toy/slow", "--scale", "smoke", "--set", "seconds=0.001").returncode == 0
    )
    assert "toy_slow" in planned(done)


def test_a_touched_source_with_the_same_content_reruns_nothing(done):
    os.utime(done.root / "projects" / "toy" / "method.py")
    assert planned(done) == set()


def test_a_changed_scale_entry_reruns_its_experiment_alone(done):
    file = done.root / "projects" / "toy" / "scales" / "smoke.yaml"
    file.write_text(file.read_text().replace("seconds: 0", "seconds: 0.001"))
    assert planned(done) == {"toy_slow", "toy_tables", "toy_claims", "page"}


def test_the_papers_numbers_belong_to_all_that_is_made_of_rows(done):
    append(done.root / "projects" / "toy" / "paper" / "squares.csv", "11,121,table 1\n")
    assert planned(done) == AFTER


def test_a_file_that_a_module_reads_is_an_input_of_what_imports_the_module(done):
    toy = done.root / "projects" / "toy"
    (toy / "sizes.csv").write_text("1\n")
    append(toy / "method.py", '\nSIZES = "sizes.csv"\n')
    assert done.snakemake("--cores", "2", "--config", "scale=smoke").returncode == 0
    append(toy / "sizes.csv", "2\n")
    assert planned(done) == {"toy_squares", *AFTER}


def test_a_failed_experiment_loses_only_itself_and_the_next_call_resumes(done):
    rows = done.root / "results" / "smoke" / "toy" / "rows"
    before = {file.name: file.read_bytes() for file in rows.glob("*.json")}
    (done.root / "fail").touch()
    scale = done.root / "projects" / "toy" / "scales" / "smoke.yaml"
    scale.write_text(
        scale.read_text().replace("seconds: 0", "seconds: 0.001").replace("[1, 2, 3]", "[1, 2]")
    )
    # the failure comes first
    run = done.snakemake("--cores", "1", "--prioritize", "toy_slow", "--config", "scale=smoke")
    assert run.returncode == 1
    assert "this experiment fails" in run.stderr
    assert "The same command resumes" in run.stderr + run.stdout
    assert (rows / "slow.json").read_bytes() == before["slow.json"]
    assert (rows / "squares.json").read_bytes() != before["squares.json"]
    (done.root / "fail").unlink()
    assert planned(done) == {"toy_slow", "toy_tables", "toy_claims", "page"}
    assert done.snakemake("--cores", "1", "--config", "scale=smoke").returncode == 0
    assert planned(done) == set()


def test_a_killed_run_resumes_with_the_same_command(done):
    rows = done.root / "results" / "smoke" / "toy" / "rows" / "slow.json"
    before = rows.read_bytes()
    scale = done.root / "projects" / "toy" / "scales" / "smoke.yaml"
    scale.write_text(scale.read_text().replace("seconds: 0", "seconds: 60"))
    running = done.start("snakemake", "--cores", "2", "--config", "scale=smoke")
    for line in running.stderr:  # Snakemake's own lines first
        if line == "slow has begun\n":
            break
    another = done.snakemake("--cores", "1", "--config", "scale=smoke")
    assert another.returncode == 1
    assert "another snakemake is running in this folder" in another.stderr
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    running.stderr.close()
    assert rows.read_bytes() == before
    scale.write_text(scale.read_text().replace("seconds: 60", "seconds: 0.002"))
    assert planned(done) == {"toy_slow", "toy_tables", "toy_claims", "page"}
    run = done.snakemake("--cores", "2", "--config", "scale=smoke")
    assert run.returncode == 0, run.stderr
    assert json.loads(rows.read_text())["rows"] == [{"slept_seconds": 0.002}]


def test_a_job_ends_with_its_killed_snakemake_and_a_dry_run_works_beside_it(done):
    scale = done.root / "projects" / "toy" / "scales" / "smoke.yaml"
    scale.write_text(scale.read_text().replace("seconds: 0", "seconds: 60"))
    running = done.start("snakemake", "--cores", "2", "--config", "scale=smoke")
    for line in running.stderr:
        if line == "slow has begun\n":
            break
    (job,) = (
        one
        for one in psutil.Process(running.pid).children(recursive=True)
        if "toy/slow" in one.cmdline()
    )
    assert "toy_slow" in planned(done)
    os.kill(running.pid, signal.SIGKILL)  # Snakemake alone, not its process group
    running.wait()
    running.stderr.close()
    psutil.wait_procs([job], timeout=10)
    assert not job.is_running() or job.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("damage", ["cut", "of another experiment", "without its array"])
def test_rows_that_are_not_those_of_their_path_are_made_again(done, damage):
    rows = done.root / "results" / "smoke" / "toy" / "rows"
    if damage == "cut":
        (rows / "squares.json").write_bytes((rows / "squares.json").read_bytes()[:-20])
    elif damage == "of another experiment":
        shutil.copy(rows / "slow.json", rows / "squares.json")
    else:
        for file in rows.glob("squares.*.npy"):
            file.unlink()
    assert "toy_squares" in planned(done)
    assert done.snakemake("--cores", "2", "--config", "scale=smoke").returncode == 0
    assert planned(done) == set()


def test_snakemakes_own_report(done):
    run = done.snakemake("--report", "own.html", "--config", "scale=smoke")
    assert run.returncode == 0, run.stderr
    assert "squares.svg" in (done.root / "own.html").read_text()


def described(repo, *arguments):
    """The whole dry run, as text by job."""
    run = repo.snakemake("-n", "--printshellcmds", *arguments)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


PROBE = """
for one in workflow.rules:
    if one.name.startswith(("toy_", "zo2_")) and "gpu" in one.resources:
        values = [one.resources[key].value for key in ("_cores", "mem_mb", "runtime", "gpu")]
        print("PROBE", one.name, *values, file=sys.stderr)
"""


def resources(repo, *arguments):
    append(repo.root / "Snakefile", PROBE)
    lines = [
        line.split()
        for line in described(repo, *arguments).splitlines()
        if line.startswith("PROBE")
    ]
    return {name: tuple(map(int, rest)) for _, name, *rest in lines}


def test_timed_and_gpu_experiments_take_every_core(toy_repo):
    assert resources(toy_repo, "--cores", "7") == {
        "toy_squares": (1, 100, 13, 0),
        "toy_slow": (1, 100, 13, 0),
        "toy_clock": (7, 500, 16, 0),
        "toy_pair": (2, 1000, 13, 0),
    }


TIMES = """
import time

from shared import experiment


class Config(experiment.Config):
    pass


def run(config: Config, run: experiment.Run) -> None:
    began = time.monotonic()
    time.sleep(1)
    run.row(began_seconds=began, ended_seconds=time.monotonic())
"""


def test_timed_experiments_that_allow_it_run_beside_others_but_never_beside_each_other(toy_repo):
    paper = toy_repo.root / "projects" / "toy"
    manifest, scale = paper / "paper.yaml", paper / "scales" / "smoke.yaml"
    shorter = "  {name}: {{title: T, {how}minutes: 0.1, memory_gb: 0.1}}\n"
    manifest.write_text(
        "name: toy\ndisplay: Toy\ntitle: T\nexperiments:\n"
        + "".join(shorter.format(name=name, how="timed: true, beside: true, ") for name in "ab")
        + shorter.format(name="other", how="")
    )
    scale.write_text("a: {}\nb: {}\nother: {}\n")
    for name in ("a", "b", "other"):
        (paper / "experiments" / f"{name}.py").write_text(TIMES)
    smoke = ("--config", "scale=smoke")
    assert resources(toy_repo, "--cores", "7", *smoke)["toy_a"][0] == 1
    run = toy_repo.snakemake("--cores", "3", "toy_a", "toy_b", "toy_other", *smoke)
    assert run.returncode == 0, run.stderr
    spans = {}
    for name in ("a", "b", "other"):
        file = toy_repo.root / "results" / "smoke" / "toy" / "rows" / f"{name}.json"
        (row,) = json.loads(file.read_bytes())["rows"]
        spans[name] = (row["began_seconds"], row["ended_seconds"])

    def together(one, other):
        return spans[one][0] < spans[other][1] and spans[other][0] < spans[one][1]

    assert not together("a", "b")
    assert together("a", "other") or together("b", "other")


def test_a_gpu_experiment_asks_for_one(toy_repo):
    assert resources(toy_repo, "--cores", "7", "--config", "scale=gpu")["toy_card"] == (
        7,
        64000,
        100,
        1,
    )


def test_threads_inside_a_job_are_the_manifests(toy_repo):
    text = described(toy_repo, "--cores", "7")
    (command,) = [line for line in text.splitlines() if "run toy/clock" in line]
    assert "OMP_NUM_THREADS=1 " in command
    assert "MKL_NUM_THREADS=1 " in command


def test_data_is_fetched_before_the_experiment_that_needs_it(toy_repo):
    manifest = toy_repo.root / "projects" / "toy" / "paper.yaml"
    manifest.write_text(
        manifest.read_text().replace(
            'title: "Squares of numbers",', 'title: "Squares of numbers", data: [digits],'
        )
    )
    assert toy_repo.planned("figures") == {"fetch_digits", "toy_squares", "toy_figures"}
    stamp = toy_repo.root / "cache" / "digits" / ".complete.json"
    stamp.parent.mkdir(parents=True)
    stamp.write_text("{}")
    assert toy_repo.planned("figures") == {"toy_squares", "toy_figures"}
    manifest.write_text(manifest.read_text().replace("[digits]", "[no-such-data]"))
    run = toy_repo.snakemake("-n")
    assert run.returncode
    assert "no-such-data" in run.stdout + run.stderr


def test_the_slurm_profile_plans_with_its_executor(toy_repo):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    assert toy_repo.planned("--profile", "workflows/profiles/slurm", "--config", "scale=gpu") == {
        "toy_squares",
        "toy_clock",
        "toy_card",
        *AFTER,
    }
    assert resources(
        toy_repo, "--profile", "workflows/profiles/slurm", "--config", "scale=gpu"
    ) == {
        "toy_squares": (1, 100, 13, 0),
        "toy_clock": (1, 500, 16, 0),
        "toy_card": (1, 64000, 100, 1),
    }


def test_zo2_at_scale_gpu_asks_slurm_for_a_gpu_and_for_no_data(tmp_path):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    repo = make_empty_repository(tmp_path)
    shutil.copytree(
        paths.PROJECTS,
        repo.root / "projects",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    arguments = ("--profile", "workflows/profiles/slurm", "--config", "scale=gpu")
    assert not [name for name in repo.planned(*arguments) if name.startswith("fetch_")]
    asked = resources(repo, *arguments)
    assert asked["zo2_memory"] == asked["zo2_throughput"] == (1, 140000, 70, 1)
    assert asked["zo2_equality"][-1] == 0


def test_the_results_may_lie_elsewhere(toy_repo, tmp_path):
    environment = {**toy_repo._environment(), "REPRO_RESULTS": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "scale=smoke"]
    run = subprocess.run(
        command, cwd=toy_repo.root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "elsewhere" / "smoke" / "report.html").is_file()
    assert not (toy_repo.root / "results").exists()


def test_this_repository_plans(tmp_path):
    """Every manifest and scale of the real papers makes a plan."""
    for scale in paths.SCALES:
        environment = {**os.environ, "REPRO_RESULTS": str(tmp_path)}
        command = [sys.executable, "-m", "snakemake", "-n", "--config", f"scale={scale}"]
        run = subprocess.run(
            command, cwd=paths.ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
