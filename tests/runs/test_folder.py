"""A run's folder: whom it admits, what its journal is after a kill, and files that are whole or not there."""

import errno
import json
import math
import os
from pathlib import Path
from threading import Barrier, Thread
from unittest.mock import patch

import pytest
import torch
from basinescape.data.prompts import Job
from basinescape.runs import atomic
from basinescape.runs import jsonl_journal as journals
from basinescape.runs.atomic import atomic_write, files_sha256, save_bytes
from basinescape.runs.jsonl_journal import Journal, Keys, read_lines
from basinescape.runs.measurement_cache import MeasurementCache
from basinescape.runs.run_folder import SAFE_ID, SHORT, differences, locked, open_folder, read_settings
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

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
    with pytest.raises(ValueError, match=r"output folder '.*' cannot be made: Not a directory"):
        open_folder(tmp_path / "file" / "out", RUN)
    open_folder(tmp_path / "shards" / "shard-0-of-2", RUN)
    with pytest.raises(ValueError, match=r"merge .*shards --out"):
        open_folder(tmp_path / "shards", RUN)


def test_values_are_shown_where_they_differ_and_not_all_of_many():
    long = ["the same beginning, which is longer than a message"] * 3
    said = differences({"rule": [*long, "cfg"]}, {"rule": [*long, "apg"]})
    assert "there" in differences({"rule": long}, {"rule": tuple(long)})  # the same text
    assert 'cfg"] there' in said and 'apg"] now' in said and said.count("the same") <= 2
    said = differences({}, {f"name{i}": i for i in range(20)})
    assert "and 14 more" in said and said.count(" now") == 6


def test_short_values_are_shown_whole_and_settings_of_one_side_alone_too():
    long = "x" * (SHORT - 4)  # with its quotes and the letter that differs, as long as may be
    assert differences({"a": long + "1."}, {"a": long + "2."}) == f'its a differ: a "{long}1." there, "{long}2." now'
    assert differences({"a": 1, "b": 2}, {"a": 1}) == "its b differ: b 2 there, null now"
    there, now = {"rule": {"x": 1, "y": 2}}, {"rule": {"y": 2, "z": 3}}
    assert differences(there, now) == "its rule differ: rule.x 1 there, null now; rule.z null there, 3 now"


def measured(path, run, made):
    """The squares of 0 to 4, two at a time, by a cache; `made` gets what was computed."""

    def squares(rows):
        made.extend(rows)
        return torch.tensor(rows)[:, None] ** 2

    with MeasurementCache(path, run) as cache, tqdm(total=5, disable=True) as bar, patch.object(bar, "update") as update:
        found = cache("squares", 5, 2, squares, bar)
    assert found.dtype == torch.float32 and found.tolist() == [[0.0], [1.0], [4.0], [9.0], [16.0]]
    assert [call.args for call in update.call_args_list] == [(2,), (2,), (1,)]
    return cache


def test_measurements_that_a_file_holds_are_not_made_again(tmp_path, caplog):
    path, made = tmp_path / "cache.jsonl", []
    closed = measured(path, {"a": 1, "b": 2}, made)
    with path.open("r+") as file:
        lines = file.readlines()
        file.seek(0)
        file.truncate()
        cut = json.loads(lines[0])
        del cut["values"]
        file.writelines([json.dumps(cut) + "\n", *lines[1:], "{}\n"])
    measured(path, {"b": 2, "a": 1}, made)
    assert made == [0, 1, 2, 3, 4, 0, 1] and not caplog.messages and len(closed) == 0  # as it was opened
    measured(path, {"a": 1, "b": 3}, made)
    assert made[7:] == [0, 1, 2, 3, 4] and "holds measurements of other settings or prompts" in caplog.text
    measured(None, {}, made)
    assert len(made) == 17


def test_a_model_is_known_by_its_weights():
    here, there = {"model": "a", "weights": "0"}, {"model": "/b/a", "weights": "0"}
    assert not differences(here, there)
    assert "model" in differences(here, there | {"weights": "1"}) and differences({"model": "a"}, {"model": "b"})


def test_nothing_is_written_where_another_process_is_at_work(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process is at work"):
        open_folder(tmp_path, RUN)
    assert not list(tmp_path.iterdir())
    open_folder(tmp_path, RUN)
    with Journal(tmp_path / "manifest.jsonl", by_id), pytest.raises(ValueError, match="another process is at work"):
        open_folder(tmp_path, RUN)


def test_of_two_runs_that_begin_at_once_one_is_refused_and_the_other_has_its_settings(tmp_path):
    """The one that is let in may write its images: nobody else's settings lie beside them."""
    for trial in range(30):
        out, begun, admitted = tmp_path / str(trial), Barrier(2), []

        def begin(steps, out=out, begun=begun, admitted=admitted):
            begun.wait()
            try:
                open_folder(out, RUN | {"steps": steps})
            except ValueError:
                return
            admitted.append(steps)

        threads = [Thread(target=begin, args=(steps,)) for steps in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert admitted == [read_settings(out)["steps"]]


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


@given(st.lists(st.integers(0, 5), max_size=12))
def test_a_key_is_found_at_its_last_place(keys):
    found = Keys(map(Keys.digest, keys))
    for key in range(7):
        places = [place for place, one in enumerate(keys) if one == key]
        assert found.find(key) == (places[-1] if places else None) and (key in found) is bool(places)
    assert len(found) == len(set(keys))


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
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.png") as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_write(tmp_path / "a.png") as part:
        part.write_bytes(b"all of it")
        assert not (tmp_path / "a.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("target", ["a file", "a new file", "a folder"])
def test_a_link_in_the_way_of_a_file_is_not_followed(tmp_path, target):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    out.mkdir()
    if target == "a file":
        theirs.write_bytes(b"precious")
    elif target == "a folder":
        theirs.mkdir()
    (out / "a.png.part").symlink_to(theirs)
    save_bytes(b"mine", out / "a.png")
    assert [path.name for path in out.iterdir()] == ["a.png"] and (out / "a.png").read_bytes() == b"mine"
    assert not (out / "a.png").is_symlink()
    if target == "a file":
        assert theirs.read_bytes() == b"precious"
    else:
        assert theirs.exists() == (target == "a folder")


def test_a_link_where_a_file_is_to_be_is_replaced(tmp_path):
    (tmp_path / "theirs").write_bytes(b"precious")
    (tmp_path / "a.png").symlink_to(tmp_path / "theirs")
    save_bytes(b"mine", tmp_path / "a.png")
    assert (tmp_path / "theirs").read_bytes() == b"precious" and (tmp_path / "a.png").read_bytes() == b"mine"


class Full:
    """`os` on a disk without room for one kind of call."""

    def __init__(self, name, number):
        self.name, self.number = name, number

    def __getattr__(self, name):
        return self._fail if name == self.name else getattr(os, name)

    def _fail(self, *given):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "write"])
def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch, call, number):
    with Journal(tmp_path / "manifest.jsonl", by_id) as journal:
        for module in (atomic, journals):
            monkeypatch.setattr(module, "os", Full(call, number))
        with pytest.raises(OSError, match="make room, then the same command goes on where it was") as stop:
            if call != "write":
                save_bytes(b"data", tmp_path / "a.png")
            journal.append({"id": "a", "status": "ok"})
        for module in (atomic, journals):
            monkeypatch.setattr(module, "os", os)
    assert stop.value.errno == number
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.jsonl"}


def test_other_errors_keep_their_words(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*gone"):
        save_bytes(b"data", tmp_path / "gone" / "a.png")


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.with_name("new").replace(path)])
def test_a_journal_that_is_removed_or_replaced_is_missed(tmp_path, change):
    path = tmp_path / "manifest.jsonl"
    with Journal(path, by_id) as journal:
        journal.append({"id": "a", "status": "ok"})
        (tmp_path / "new").write_text("")
        change(path)
        with pytest.raises(FileNotFoundError, match="was removed or replaced while the run went on; the same command"):
            journal.append({"id": "b", "status": "ok"})


@pytest.mark.parametrize("line", ["{}", '{"id": "a"}', '{"file": 3, "id": "a"}', '{"file": null, "id": "a"}'])
def test_a_line_that_lacks_what_is_looked_for_does_not_count(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(line + '\n{"id": "b", "file": "b.png"}\n')
    with Journal(path, lambda line: (line["id"], line["file"] + "")) as journal:
        assert len(journal) == 1 and ("b", "b.png") in journal
    assert path.read_text() == '{"id": "b", "file": "b.png"}\n'


def test_files_are_told_by_their_names_and_contents(tmp_path):
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    digest = files_sha256([tmp_path / "b", tmp_path / "a"])
    assert digest == files_sha256(path for path in tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    for name in "ab":
        (tmp_path / "there" / name).write_bytes((tmp_path / name).read_bytes())
    assert files_sha256((tmp_path / "there").iterdir()) == digest  # wherever they lie
    (tmp_path / "b").write_text("3")
    changed = files_sha256([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b").rename(tmp_path / "c")
    renamed = files_sha256([tmp_path / "a", tmp_path / "c"])
    assert len({digest, changed, renamed, files_sha256([tmp_path / "a"]), files_sha256([])}) == 5


@pytest.mark.parametrize("id", ["con", "nul", "NUL", "Con.png", "aux.tar.gz", "com1", "LPT9.x", "prn", "con.", "", ".a", "-a"])
def test_ids_that_can_name_no_file_are_refused(id):
    assert not SAFE_ID.fullmatch(id)
    with pytest.raises(ValueError, match="id must be 1 to 128 letters"):
        Job(id, "a cat", 0)


@pytest.mark.parametrize("id", ["cons", "icon", "con-1", "com", "com10", "_nul", "console.log", "A.b-c_9", "a" * 128])
def test_ids_that_only_look_like_devices_are_taken(id):
    assert Job(id, "a cat", 0).id == id
