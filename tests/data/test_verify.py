"""A run's folder beside what its run.json promises: all that is wrong with it is named, and made again by the same command."""

import errno
import json
import shutil
import sys
from pathlib import Path

import bulkruns
import pytest
from basinescape import Guidance
from basinescape.bench import cli
from basinescape.bench.evaluation.sheet import sheet
from basinescape.bench.speed.standin import StandIn, stand_in
from basinescape.data.merge import merge
from basinescape.data.prompts import Job, Prompts
from basinescape.data.verify import NOT_YET, verify
from basinescape.runs.jsonl_journal import read_lines

JOBS = [Job(f"p{i}", f"cat {i}", i) for i in range(7)]
LIBRARIES = {"parquet": "pyarrow", "webdataset": "webdataset"}
FORMATS = ["png", "latents", *LIBRARIES]


@pytest.fixture
def sampler(pipe, monkeypatch):
    monkeypatch.setattr("basinescape.data.writers.SHARD", 3)
    return stand_in(pipe)


@pytest.fixture(params=FORMATS)
def format(request):
    pytest.importorskip(LIBRARIES.get(request.param, "PIL"))
    return request.param


def make(sampler, out, jobs=JOBS, **options):
    return bulkruns.make(sampler, jobs, out, Guidance.cfg(2.0), **{"steps": 1, "batch_size": 3} | options)


def contents(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def command(monkeypatch, capsys, *arguments):
    """Exit code, standard output and error of `basinescape`."""
    monkeypatch.setattr(sys, "argv", ["basinescape", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, *capsys.readouterr()


def without(name):
    def change(lines):
        return [{key: value for key, value in line.items() if key != name or i != 2} for i, line in enumerate(lines)]

    return change


MANIFESTS = {  # what becomes of a sound manifest -> what is said of it
    "gone": (None, ["manifest.jsonl is missing", *(f"images/p{i}.png has no line in manifest.jsonl" for i in range(7))]),
    "empty": (lambda lines: [], [f"images/p{i}.png has no line in manifest.jsonl" for i in range(7)]),
    "cut": (lambda lines: lines[:5], [f"images/p{i}.png has no line in manifest.jsonl" for i in (5, 6)]),
    "without a status": (without("status"), ["manifest.jsonl, line 3 lacks status"]),
    "without an id": (without("id"), ["manifest.jsonl, line 3 lacks id", "images/p2.png has no line in manifest.jsonl"]),
    "without a digest": (without("sha256"), ["manifest.jsonl, line 3 lacks sha256"]),
    "without a file": (without("file"), ["manifest.jsonl, line 3 lacks file"]),
    "no object": (lambda lines: [*lines, 3], ["manifest.jsonl, line 8 is no JSON object"]),
    "twice": (lambda lines: [*lines, lines[0]], ["manifest.jsonl has 1 lines about images that others are about too"]),
    "another": (
        lambda lines: [*lines, lines[0] | {"id": "q"}],
        ["manifest.jsonl, line 8 is about image q, which is not of this run"],
    ),
    "outside": (
        lambda lines: [line | {"file": "../evil.png"} if line["id"] == "p2" else line for line in lines],
        ["image p2 is said to be in '../evil.png', which is no file of this run"],
    ),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_is_not_whole_is_named_and_made_again(sampler, tmp_path, monkeypatch, capsys, kind):
    out, (change, expected) = tmp_path / "out", MANIFESTS[kind]
    make(sampler, out)
    before = contents(out)
    if change is None:
        (out / "manifest.jsonl").unlink()
    else:
        lines = change(list(read_lines(out / "manifest.jsonl")))
        (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said, _ = command(monkeypatch, capsys, "verify", out)
    assert (code, said.splitlines()) == (1, expected)
    make(sampler, out)
    code, said, _ = command(monkeypatch, capsys, "verify", out)
    after = contents(out)
    assert (code, said) == (0, f"all images of {out} are there as they were made\n")
    assert sorted(before.pop("manifest.jsonl").splitlines()) == sorted(after.pop("manifest.jsonl").splitlines())
    assert before == after


def test_failed_and_foreign_ones_are_named(sampler, tmp_path, monkeypatch):
    decode = StandIn.decode

    def failing(self, latents, output, generators=None, **size):
        if generators[0].initial_seed() == 1:
            raise RuntimeError("out of memory")
        return decode(self, latents, output, generators, **size)

    monkeypatch.setattr(StandIn, "decode", failing)
    out = tmp_path / "out"
    make(sampler, out)
    (out / "images" / "holiday.png").write_bytes(b"mine")
    (out / "images" / "deep").mkdir()
    (out / "images" / "deep" / "p1.png").write_bytes(b"mine")
    for harmless in ("images/.DS_Store", "images/p1.png.part", "sheet.html"):  # of a desktop, of a kill, beside the images
        (out / harmless).write_bytes(b"")
    assert list(verify(out)) == [
        ("image p1", "failed: out of memory"),
        ("images/holiday.png", "is no file of this run"),
        ("images/deep/p1.png", "is no file of this run"),
    ]


def test_a_run_that_was_stopped_tells_what_is_lost_from_what_is_not_made_yet(sampler, tmp_path, format):
    out = tmp_path / "out"
    make(sampler, out, JOBS[:4], format=format)  # a set that grows is one that was stopped
    make(sampler, tmp_path / "whole", format=format)
    for name in ("run.json", "jobs.jsonl"):
        shutil.copyfile(tmp_path / "whole" / name, out / name)
    unmade = [where for where, what in verify(out) if what == NOT_YET]
    assert len(unmade) == 3 and all(f"p{i}" in where for i, where in zip((4, 5, 6), unmade, strict=True))
    (first, *_) = (line["file"] for line in read_lines(out / "manifest.jsonl"))
    (out / first).unlink()
    lost = [where for where, what in verify(out) if what == "is missing"]
    assert lost == [first] and [where for where, what in verify(out) if what == NOT_YET] == unmade
    make(sampler, out, format=format)
    assert list(verify(out)) == []


def test_a_shard_of_a_run_has_what_is_its_own(sampler, tmp_path):
    make(sampler, tmp_path, shard=(1, 2))
    assert list(verify(tmp_path / "shard-1-of-2")) == []


@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_the_list_of_jobs_is_missed_and_written_again(sampler, tmp_path, damage):
    out = tmp_path / "out"
    make(sampler, out)
    jobs, whole = out / "jobs.jsonl", (out / "jobs.jsonl").read_bytes()
    if damage == "gone":
        jobs.unlink()
        expected = ("jobs.jsonl", "is missing")
    else:
        jobs.write_bytes(whole[:100] if damage == "cut" else b"")
        expected = ("jobs.jsonl", f"names {len(jobs.read_text().splitlines()[:-1])} of 7 jobs")
    assert expected in list(verify(out))
    make(sampler, out)
    assert jobs.read_bytes() == whole and list(verify(out)) == []


def swapped(data):
    """As many bytes, one in an image another one."""
    place = data.find(b"IHDR") + 7 if b"IHDR" in data else len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "changed, of the same size": swapped,
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "something else": lambda data: b"x" * len(data),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_verify_finds_generate_makes_again(sampler, tmp_path, format, damage):
    out = tmp_path / "out"
    make(sampler, out, format=format)
    before = contents(out)
    images = sorted(name for name in before if name.count("/") and not name.endswith("metadata.jsonl"))
    first, last = images[0], images[-1]
    (out / first).write_bytes(DAMAGE[damage](before[first]))
    found = list(verify(out))
    assert found and all(where.startswith(first) for where, _ in found)
    assert make(sampler, out, format=format).counts["ok"] in (1, 3)
    (out / last).unlink()
    assert make(sampler, out, format=format).counts["ok"] == 1
    after = contents(out)
    assert list(verify(out)) == [] and make(sampler, out, format=format).counts["ok"] == 0
    assert before.pop("manifest.jsonl") and after.pop("manifest.jsonl") and after == before


@pytest.mark.parametrize("format", LIBRARIES)
def test_a_shard_that_cannot_be_read_for_a_while_loses_nothing(sampler, tmp_path, monkeypatch, format):
    """An error of the disk or of the network is no damage: what the shard holds stays."""
    pytest.importorskip(LIBRARIES[format])
    out = tmp_path / "out"
    make(sampler, out, format=format)
    before = contents(out)
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join(lines[1:]))
    (shard,) = (out / name for name in before if "000000" in name)
    read, reads = Path.read_bytes, []

    def failing(path):
        reads.append(path)
        if reads.count(shard) > 1:  # after it was found sound
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(OSError, match="Input/output error"):
            make(sampler, out, format=format)
    assert shard.read_bytes() == before[shard.relative_to(out).as_posix()]
    assert make(sampler, out, format=format).counts["ok"] == 1 and list(verify(out)) == []


def test_a_manifest_that_is_deleted_under_a_run_is_no_success(sampler, tmp_path):
    out = tmp_path / "out"

    class Deleting(Prompts):
        def __iter__(self):
            for position, job in super().__iter__():
                yield position, job
                if position == 5:
                    (out / "manifest.jsonl").unlink(missing_ok=True)

    with pytest.raises(FileNotFoundError, match="was removed or replaced while the run went on; the same command"):
        make(sampler, out, Deleting(JOBS), batch_size=1)
    make(sampler, out, batch_size=None)
    assert list(verify(out)) == []


def test_jobs_are_shared_out_one_by_one_in_every_format(sampler, tmp_path, format):
    make(sampler, tmp_path / "whole", format=format)
    counts = [make(sampler, tmp_path / "parts", format=format, shard=(i, 3)).counts["ok"] for i in range(3)]
    assert counts == [3, 2, 2]
    assert merge(tmp_path / "parts", tmp_path / "one") == (7, 7) and list(verify(tmp_path / "one")) == []
    whole, one = contents(tmp_path / "whole"), contents(tmp_path / "one")
    assert sorted(whole.pop("manifest.jsonl").splitlines()) == sorted(one.pop("manifest.jsonl").splitlines()) and whole == one


@pytest.fixture
def parts(sampler, tmp_path):
    for i in range(2):
        make(sampler, tmp_path / "parts", shard=(i, 2))
    return tmp_path / "parts"


def test_shards_of_different_numbers_are_not_one_run(sampler, parts, tmp_path):
    shutil.copytree(parts / "shard-0-of-2", parts / "shard-2-of-2")
    with pytest.raises(ValueError, match=r"shard-2-of-2 holds shard \[0, 2\]"):
        merge(parts, tmp_path / "one")
    shutil.rmtree(parts / "shard-2-of-2")
    make(sampler, parts, shard=(1, 3))
    with pytest.raises(ValueError, match="holds shards of 2 and of 3: keep those of one run"):
        merge(parts, tmp_path / "one")
    shutil.rmtree(parts / "shard-1-of-2")
    (parts / "shard-1-of-3").rename(parts / "shard-1-of-2")
    with pytest.raises(ValueError, match=r"shard-1-of-2 holds shard \[1, 3\]"):
        merge(parts, tmp_path / "one")
    shutil.rmtree(parts / "shard-1-of-2")
    shutil.copytree(parts / "shard-0-of-2", parts / "shard-1-of-2")
    with pytest.raises(ValueError, match=r"shard-1-of-2 holds shard \[0, 2\]"):
        merge(parts, tmp_path / "one")
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("name", ["shard-x-of-y", "shard-0-of-", "shard-\u0660-of-\u0662", "shard-0-of-2-copy"])
def test_a_folder_that_is_called_like_a_shard_is_named(parts, tmp_path, monkeypatch, capsys, name):
    (parts / name).mkdir()
    code, _, error = command(monkeypatch, capsys, "merge", parts, "--out", tmp_path / "one")
    assert code == 2 and f"{name}' is no shard: its name must be shard-i-of-n" in error
    assert not (tmp_path / "one").exists()


def test_a_shard_without_settings_is_named(parts, tmp_path):
    (parts / "shard-1-of-2" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"shard-1-of-2' has no run\.json"):
        merge(parts, tmp_path / "one")
    (parts / "shard-1-of-2" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"shard-1-of-2 holds shard None, by its run\.json"):
        merge(parts, tmp_path / "one")


@pytest.mark.parametrize("file", ["../evil.png", "../../evil.png", "images/../../evil.png", "/evil.png", "images/p1.txt"])
def test_names_that_lead_out_of_a_folder_are_left_out_and_named(parts, tmp_path, monkeypatch, capsys, caplog, file):
    for place in (parts, parts / "shard-1-of-2"):
        (place / "evil.png").write_bytes(b"evil")
    manifest = parts / "shard-1-of-2" / "manifest.jsonl"
    first, *others = read_lines(manifest)
    manifest.write_text("".join(json.dumps(line) + "\n" for line in [first | {"file": file}, *others]))
    before = {path for path in tmp_path.rglob("*") if "one" not in path.parts}
    code, said, _ = command(monkeypatch, capsys, "merge", parts, "--out", tmp_path / "one")
    assert (code, said) == (1, f"6 of 7 images in {tmp_path / 'one'}\n")
    assert f"shard-1-of-2: image p1 is said to be in '{file}', which is no file of this run: left out" in caplog.text
    assert {path for path in tmp_path.rglob("*") if "one" not in path.parts} == before and not Path("/evil.png").exists()
    assert list(verify(tmp_path / "one")) == [("images/p1.png", NOT_YET)]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_an_image_that_a_shard_has_lost_is_left_out_and_made_again(sampler, parts, tmp_path, caplog, damage):
    image = parts / "shard-1-of-2" / "images" / "p3.png"
    whole = image.read_bytes()
    image.unlink()
    if damage == "changed":
        image.write_bytes(swapped(whole))
    assert merge(parts, tmp_path / "one") == (6, 7)
    assert f"shard-1-of-2: images/p3.png is {damage}: left out" in caplog.text
    assert list(verify(tmp_path / "one")) == [("images/p3.png", NOT_YET)]
    assert make(sampler, tmp_path / "one").counts["ok"] == 1 and list(verify(tmp_path / "one")) == []
    assert (tmp_path / "one" / "images" / "p3.png").read_bytes() == whole


def test_a_merge_of_what_is_half_done_says_so(sampler, parts, tmp_path, monkeypatch, capsys):
    manifest = parts / "shard-0-of-2" / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:2]))
    code, said, _ = command(monkeypatch, capsys, "merge", parts, "--out", tmp_path / "one")
    assert (code, said) == (1, f"5 of 7 images in {tmp_path / 'one'}\n")
    assert list(verify(tmp_path / "one")) == [("images/p4.png", NOT_YET), ("images/p6.png", NOT_YET)]
    make(sampler, tmp_path / "one")
    assert merge(parts, tmp_path / "one") == (7, 7) and list(verify(tmp_path / "one")) == []


@pytest.mark.parametrize("name", ["id", "status", "prompt", "file"])
def test_lines_without_a_key_cost_no_command_its_others(parts, tmp_path, name):
    manifest = parts / "shard-1-of-2" / "manifest.jsonl"
    first, *others = read_lines(manifest)
    del first[name]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in [first, *others]))
    assert merge(parts, tmp_path / "one") == (6, 7)
    assert sheet(parts / "shard-1-of-2", tmp_path / "page.html") == 2
