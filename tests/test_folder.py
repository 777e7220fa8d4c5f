"""A run's folder: whom it admits, what its journal is after a kill, and files that are whole or not there."""

import json
import math

import pytest
from basinescape.folder import Journal, intact, open_folder, read_lines, read_settings, sha256, whole
from hypothesis import example, given, settings
from hypothesis import strategies as st

RUN = {"steps": 3, "size": (64, 64)}


@pytest.mark.parametrize("content", [b"", b'{"steps": 3, "si', b"[]", b"\xff\xfe{", b"\0\0\0\0"])
def test_a_run_json_that_is_not_whole_says_what_to_do(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    for read in (lambda: open_folder(tmp_path, RUN), lambda: read_settings(tmp_path)):
        with pytest.raises(ValueError, match=r"run\.json that is empty or cut off.*delete the folder or choose another"):
            read()
    assert (tmp_path / "run.json").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "left", ["images/", ".DS_Store", "Thumbs.db", "images/Thumbs.db", "run.json.part", "images/a.png.part"]
)
def test_what_a_kill_or_a_desktop_leaves_is_no_other_run(tmp_path, left):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    if left.endswith("/"):
        (tmp_path / left).mkdir()
    else:
        (tmp_path / left).write_bytes(b"{")
    open_folder(tmp_path, RUN)
    open_folder(tmp_path, RUN)  # gone on with: a tuple is read back as a list
    assert read_settings(tmp_path) == {"steps": 3, "size": [64, 64]} and (tmp_path / "images").is_dir()


@pytest.mark.parametrize("left", ["thesis.txt", "images/a.png", ".git/config", "manifest.jsonl"])
def test_anything_else_is_refused_and_left_alone(tmp_path, left):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        open_folder(tmp_path, RUN)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / left]


def test_another_run_and_a_file_are_refused(tmp_path):
    open_folder(tmp_path / "out", RUN)
    with pytest.raises(ValueError, match=r"another run .its steps, scale differ"):
        open_folder(tmp_path / "out", {"steps": 4, "size": (64, 64), "scale": 1.0})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        open_folder(tmp_path / "file", RUN)


def by_id(line):
    return line.get("id") if line.get("status") == "ok" else None


def test_a_journal_is_repaired_when_it_is_opened(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(
        b'{"id": "a", "status": "ok", "n": 1}\n\n'
        b'{"id": "b", "status": "failed: x"}\n3\n'
        b'{"id": "c", "status": "ok", "gap": [NaN, -Infinity, 0.1]}\n\xff\xfe\0\n'
        b'{"id": "a", "status": "ok", "n": 2}\n{"id": "d", "sta'
    )
    with Journal(path, by_id) as journal:
        assert len(journal) == 2 and "a" in journal and "c" in journal and "b" not in journal
        journal.append({"id": "d", "status": "ok", "gap": [math.nan, math.inf, 0.1]})
    strict = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().split("\n")[:-1]]
    assert strict == [
        {"id": "c", "status": "ok", "gap": [None, None, 0.1]},
        {"id": "a", "status": "ok", "n": 2},
        {"id": "d", "status": "ok", "gap": [None, None, 0.1]},
    ]
    assert path.read_bytes().endswith(b"\n")
    before = path.stat().st_ino
    Journal(path, by_id).__exit__()
    assert path.stat().st_ino == before  # one that is sound is not written again


LINES = b'{"id": "a", "status": "ok"}\n{"id": "b", "status": "ok", "prompt": "\\ud83d"}\n'


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.integers(0, len(LINES)).map(lambda cut: LINES[:cut])))
@example(b"[" * 100_000)
@example(b'{"id": "a", "status": "ok", "n": ' + b"1" * 5000 + b"}\n")
def test_whatever_a_journal_holds_each_line_is_an_object_afterwards(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("journal") / "manifest.jsonl"
    path.write_bytes(content)
    counting = [line for line in read_lines(path) if by_id(line) is not None]
    with Journal(path, by_id) as journal:
        journal.append({"id": "z", "status": "ok"})
    *lines, last = path.read_bytes().split(b"\n")
    ids = [json.loads(line)["id"] for line in lines]
    assert last == b"" and ids[-1] == "z" and sorted(map(repr, ids[:-1])) == sorted({repr(line["id"]) for line in counting})
    assert len(journal) == len(ids) - 1 and all(id in journal for id in ids[:-1])
    assert list(read_lines(path)) == [json.loads(line) for line in lines]


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    with (
        Journal(tmp_path / "manifest.jsonl", by_id),
        pytest.raises(ValueError, match="another process is at work"),
    ):
        Journal(tmp_path / "manifest.jsonl", by_id)
    Journal(tmp_path / "manifest.jsonl", by_id).__exit__()


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), whole(tmp_path / "a.png") as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with whole(tmp_path / "a.png") as part:
        part.write_bytes(b"all of it")
        assert not (tmp_path / "a.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    digest = sha256(tmp_path / "a.png")
    assert intact(tmp_path / "a.png", digest)
    (tmp_path / "a.png").write_bytes(b"all of iT")
    assert not intact(tmp_path / "a.png", digest) and not intact(tmp_path / "b.png", None)
