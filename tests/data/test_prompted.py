"""Pictures with the prompts that they were made from: each with its own, from wherever they are kept, one at a time."""

import json
import tracemalloc

import numpy as np
import pytest
from basinescape.data.names import SAFE_ID
from basinescape.data.prompted import about, prompted
from basinescape.data.prompts import Prompts
from bulkruns import make
from captionedsets import (
    PROMPTS,
    SOURCES,
    encoded,
    graph,
    in_parquet,
    in_tar_files,
    in_text_files,
    picture,
    pictures,
    tar,
    with_text,
)
from PIL import Image


@pytest.mark.parametrize("keep", SOURCES)
def test_each_picture_has_the_prompt_that_it_was_made_from(tmp_path, keep):
    found = list(prompted(keep(tmp_path / "set")))
    assert [(one.prompt, one.reason) for one in found] == [(prompt, "") for prompt in PROMPTS]
    assert len({one.id for one in found}) == 3 and all(SAFE_ID.fullmatch(one.id) for one in found)
    for i, one in enumerate(found):
        image = one.open()
        assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - np.asarray(picture(i))).max() < 4
        assert "set" in one.where


@pytest.mark.parametrize("keep", SOURCES)
def test_a_bar_has_the_number_of_pictures_where_it_is_known(tmp_path, keep):
    assert about(keep(tmp_path / "set")) == (None if keep in (in_tar_files, in_parquet) else 3)
    if keep is in_text_files:
        assert about(tmp_path / "set" / "deep" / "*.png") == 3


@pytest.mark.parametrize("format", ["png", "parquet", "webdataset"])
def test_a_run_of_generate_is_read_back(tmp_path, monkeypatch, drawn, format):
    from basinescape import Sampler

    if format in ("parquet", "webdataset"):
        pytest.importorskip("pyarrow" if format == "parquet" else "webdataset")
    rows = [{"prompt": f"a cat {i}", "id": f"p{i}", "colour": ["red", 3, None][i], "file_name": f"u{i}"} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn.faults["a cat 2"] = RuntimeError("lost")
    sampler = Sampler.from_pretrained("tiny", "cpu", scheduler="ddim")
    make(sampler, Prompts(tmp_path / "p.jsonl"), tmp_path / "out", format=format)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").open()]
    assert [(line["file_name"], line.get("colour")) for line in lines] == [("u0", "red"), ("u1", "3"), ("u2", None)]
    found = list(prompted(tmp_path / "out"))
    assert [(one.id, one.prompt) for one in found] == [("p0", "a cat 0"), ("p1", "a cat 1")]
    assert [one.open().getpixel((0, 0))[0] for one in found] == [0, 1]


def test_a_picture_without_a_prompt_says_why(tmp_path):
    pictures(tmp_path)
    (tmp_path / "1.txt").write_bytes(b"\xff")
    picture(2).save(tmp_path / "2.png", pnginfo=with_text(prompt=graph("one", "two")))
    picture(2).save(tmp_path / "3.png", pnginfo=with_text(prompt="{"))
    picture(2).save(tmp_path / "4.png", pnginfo=with_text(parameters="\nNegative prompt: bad\nSteps: 3"))
    picture(2).save(tmp_path / "5.jpg")
    found = {one.where.rpartition("/")[2].rstrip("'"): one for one in prompted(tmp_path)}
    assert all(one.prompt is None for one in found.values())
    assert {name: one.reason.partition("'")[0] for name, one in found.items() if name != "1.png"} == {
        "0.png": "no text beside it, and none in it",
        "2.png": "no text beside it, and its workflow has 2 prompts",
        "3.png": "no text beside it, and its workflow has no prompts",
        "4.png": "no text beside it, and none in it",
        "5.jpg": "no text beside it, and none in it",
    }
    assert "1.txt': not UTF-8 text" in found["1.png"].reason


@pytest.mark.parametrize(
    ("name", "cut"), [("list.jsonl", 0), ("a.tar", 2100), ("a.tar", 2600), ("a.tar", 540), ("a.parquet", 0), ("a.png", 0)]
)
def test_what_is_broken_is_named_and_costs_no_other(tmp_path, name, cut, caplog):
    pictures(tmp_path / "set")
    path = tmp_path / "set" / name
    if name == "list.jsonl":
        path.write_text('{"image": "0.png", "text": "a"}\n{"image": "gone.png", "text": "b"}\n{"image": "1.png", "text": "c"}')
    elif name == "a.tar":
        whole = tar(path, [("0.png", encoded(picture(0))), ("0.txt", b"a"), ("1.png", encoded(picture(1))), ("1.txt", b"c")])
        path.write_bytes(whole.read_bytes()[:cut])
    else:
        path.write_bytes(b"PAR1")
    if name == "a.png":
        one = next(prompted(path))
        assert one.prompt is None and "it cannot be read" in one.reason
        with pytest.raises(ValueError, match=r"image '.*a\.png' cannot be read"):
            one.open()
        return
    with pytest.raises(ValueError, match=rf"{name}"):
        list(prompted(path))
    found = [one.prompt for one in prompted(path, on_error="skip")]
    assert found == {"list.jsonl": ["a", "c"], "a.tar": ["a"] if cut > 2048 else [], "a.parquet": []}[name]
    assert name in caplog.text and "skipped" in caplog.text


def test_nothing_at_all_is_refused_at_once(tmp_path):
    for source in (tmp_path / "none", tmp_path / "*.tar"):
        with pytest.raises(FileNotFoundError, match="do not exist; give a folder"):
            prompted(source)


@pytest.mark.parametrize("keep", ["tar", "parquet", "folder"])
def test_pictures_are_not_held_in_memory(tmp_path, keep):
    noise = [
        encoded(Image.fromarray(np.random.default_rng(i).integers(0, 256, (100, 100, 3), dtype=np.uint8))) for i in range(4)
    ]

    def most(count):
        data = [noise[i % 4] for i in range(count)]
        if keep == "tar":
            path = tar(tmp_path / f"{count}.tar", [(f"{i}.png", one) for i, one in enumerate(data)])
        elif keep == "parquet":
            pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
            rows = {"image": data, "text": ["a"] * count}
            parquet.write_table(pyarrow.table(rows), path := tmp_path / f"{count}.parquet", row_group_size=16)
        else:
            (path := tmp_path / f"{count}").mkdir()
            for i, one in enumerate(data):
                (path / f"{i}.png").write_bytes(one)
        tracemalloc.start()
        assert sum(one.open().size == (100, 100) for one in prompted(path)) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(2)
    assert most(160) - most(40) < 30 * len(noise[0])


def test_rows_without_a_picture_are_named_and_cost_no_other(tmp_path, caplog):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    pictures(tmp_path)
    rows = [{"bytes": encoded(picture(0)), "path": None}, {"bytes": None, "path": None}, {"bytes": None, "path": "2.png"}]
    parquet.write_table(pyarrow.table({"image": rows, "text": ["a", "b", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^row 2 of '.*a\.parquet': needs a column of pictures' bytes"):
        list(prompted(tmp_path / "a.parquet"))
    found = list(prompted(tmp_path / "a.parquet", on_error="skip"))
    reasons = ["", "it needs prompt, caption or text, and none in it"]
    assert [one.prompt for one in found] == ["a", None] and [one.reason for one in found] == reasons
    assert [one.open().getpixel((0, 0))[0] for one in found] == [0, 80]


def test_one_file_of_several_that_is_broken_costs_no_other(tmp_path, caplog):
    in_tar_files(tmp_path / "set")
    (tmp_path / "set" / "0a.tar").write_bytes(b"no archive")
    found = [one.prompt for one in prompted(tmp_path / "set" / "*.tar*", on_error="skip")]
    assert found == PROMPTS and "0a.tar' is no whole .tar file" in caplog.text


def test_members_that_a_webdataset_has_under_other_names_are_told(tmp_path, caplog):
    members = [("0.png", encoded(picture(0))), ("0.txt", b"a"), ("0.mask.png", encoded(picture(1))), ("1.5.png", b"")]
    assert [one.prompt for one in prompted(tar(tmp_path / "a.tar", members))] == ["a"]
    said = [record.getMessage().partition(" of ")[0] for record in caplog.records]
    assert said == ["member '0.mask.png'", "member '1.5.png'"] and "a name ends at its first dot" in caplog.text
