"""`repro new`: what it refuses, and that it writes nothing then. What it writes is followed to the
end in tests/workflows/test_adding_a_paper.py.
"""

import pytest

from shared import cli, paths

ARXIV = ("--arxiv", "0000.00000")


@pytest.fixture
def projects(tmp_path, monkeypatch):
    """An empty folder for papers, which is the one there is."""
    monkeypatch.setattr(paths, "PROJECTS", tmp_path / "projects")
    (tmp_path / "projects").mkdir()
    return tmp_path / "projects"


def test_the_names_stand_in_every_file_and_no_token_is_left(projects, capsys):
    assert cli.main(["new", "my_paper", "--display", "My-Paper", *ARXIV]) == 0
    files = [file for file in projects.parent.rglob("*") if file.is_file()]
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, files))
    texts = {file: file.read_text() for file in files}
    assert 'name: my_paper\ndisplay: "My-Paper"' in texts[projects / "my_paper" / "paper.yaml"]
    for file, text in texts.items():
        assert not any(token in text for token in ("PAPER", "DISPLAY", "ARXIV")), file
    assert {file.parts[len(projects.parent.parts)] for file in files} == {"projects", "tests"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["My-Paper"], "cannot name a paper"),
        (["../x"], "cannot name a paper"),
        (["class"], "cannot name a paper"),
        (["2fast"], "cannot name a paper"),
        (["tables"], "a target of make or snakemake"),
        (["x", "--display", 'a"b'], "plain text"),
        (["x", "--display", " "], "plain text"),
        (["x", "--arxiv", "25.1"], "2503.12668"),
    ],
)
def test_a_bad_name_is_refused_and_nothing_is_written(projects, refused, arguments, reason):
    extra = () if "--arxiv" in arguments else ARXIV
    assert reason in refused("new", *arguments, *extra)
    assert list(projects.parent.rglob("*")) == [projects]


@pytest.mark.parametrize("folder", ["projects/x", "tests/projects/x"])
def test_a_folder_that_is_there_is_left_as_it_is(projects, refused, folder):
    (projects.parent / folder).mkdir(parents=True)
    before = sorted(projects.parent.rglob("*"))
    assert "is there already" in refused("new", "x", *ARXIV)
    assert sorted(projects.parent.rglob("*")) == before
