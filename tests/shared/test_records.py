"""Lines of a user's file, and the objects on them."""

import pytest

from shared.errors import UserError
from shared.records import is_jsonl, lines, objects


@pytest.mark.parametrize(
    ("name", "answer"), [("a.txt", False), ("a.JSONL", True), ("b.Txt", False)]
)
def test_the_suffix_decides_in_either_case(tmp_path, name, answer):
    assert is_jsonl(tmp_path / name) is answer
    with pytest.raises(UserError, match=r"name a \.jsonl or a \.txt file"):
        is_jsonl(tmp_path / "a.csv")


def test_a_line_ends_where_files_say_and_nowhere_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffa\u2028b\x0cc\x85d\re\r\nf\n\ng".encode())
    assert list(lines(file)) == [(1, "a\u2028b\x0cc\x85d\re"), (2, "f"), (3, ""), (4, "g")]


def test_blank_lines_are_counted_and_passed_over(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n  \n{"b": "\\u00e9\\ud83d\\ude00"}')
    assert list(objects(file)) == [(1, {"a": 1}), (3, {"b": "\u00e9\U0001f600"})]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}\n{"a":', "line 2: not JSON"),
        (b"[1]", r"line 1: a JSON object is wanted, not \[1\]"),
        (b'{"a": NaN}', "line 1: not JSON \\(NaN is no number"),
        (b'{"a": -Infinity}', "line 1: not JSON"),
        (b'{"a": "\\ud800"}', "line 1: half of a surrogate pair"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: not JSON"),
        (b'{"a": "\xff"}', "near line 1: not UTF-8"),
    ],
)
def test_what_is_no_object_is_named_by_its_line(tmp_path, content, said):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(objects(file))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(UserError, match=r"No such file|Is a directory"):
            list(lines(path))
