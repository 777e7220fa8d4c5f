"""Files of prompts: the same jobs from every format, and the line that is wrong."""

import gzip
import io
import json
import os
import sys
import threading
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from basinescape.data.prompts import Job, Prompts, read_prompts

ROWS = [
    {"prompt": 'a "cat", and\nmore'},
    {"prompt": "ein Frosch, größer", "id": "frog", "seed": 7, "negative_prompt": "blurry"},
    {"prompt": "a dog", "seed": 0, "negative_prompt": None},
]
JOBS = [
    Job("0000", 'a "cat", and\nmore', 5),
    Job("frog", "ein Frosch, größer", 7, "blurry"),
    Job("0002", "a dog", 0),
]
LINES = "\n\n".join(json.dumps(row) for row in ROWS)
CSV = 'prompt,id,seed,negative_prompt\r\n"a ""cat"", and\nmore",,,\r\n\r\n"ein Frosch, größer",frog,7,blurry\r\na dog,,0\r\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", LINES.encode()),
        ("without a suffix", LINES.encode()),
        ("p.JSONL", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
        ("p.tsv", CSV.replace(",", "\t").replace("\t and", ", and").replace("\t größer", ", größer").encode()),
        ("p.csv", CSV.replace(",", ";").replace("; and", ", and").replace("; größer", ", größer").encode()),
        ("p.json", json.dumps(ROWS, indent=1).encode()),
        ("p.json", LINES.encode()),
        ("p.jsonl.gz", gzip.compress(LINES.encode())),
        ("P.CSV.GZ", gzip.compress(CSV.encode())),
        ("p.csv", CSV.encode()),
        ("P.CSV", b"\xef\xbb\xbf" + CSV.encode()),
        ("p.csv", b"\xef\xbb\xbf\xef\xbb\xbf" + CSV.encode()),
    ],
)
def test_every_format_gives_the_same_jobs(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name, seed=5) == JOBS


def test_parquet_gives_the_same_jobs(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS, pyarrow.schema(
        [("prompt", "string"), ("id", "large_string"), ("seed", "int32"), ("negative_prompt", "string")]
    )), tmp_path / "p.parquet")  # fmt: skip
    assert read_prompts(tmp_path / "p.parquet", seed=5) == JOBS
    parquet.write_table(pyarrow.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet', row 2: prompt must be"):
        read_prompts(tmp_path / "p.parquet")
    (tmp_path / "p.parquet").write_text("PAR1")
    with pytest.raises(ValueError, match="no Parquet file"):
        read_prompts(tmp_path / "p.parquet")


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="needs the package pyarrow"):
        read_prompts(tmp_path / "p.parquet")


def test_standard_input_and_pipes_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES.encode()), encoding="ascii"))
    assert read_prompts("-", seed=5) == JOBS
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n{')))
    with pytest.raises(ValueError, match="standard input, line 2: not JSON"):
        read_prompts("-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n a cat\n{a brace\n")))
    assert [job.prompt for job in read_prompts("-")] == ["a cat", "{a brace"]
    if not hasattr(os, "mkfifo"):
        return
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(LINES.encode(),))
    writer.start()
    assert read_prompts(tmp_path / "pipe", seed=5) == JOBS
    writer.join()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"prompt": "b", "negative": "c"}',
            "line 2: unknown column 'negative': call it 'negative_prompt'",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n\n{"prompt": "b", "negative_prompt": 3}',
            "line 3: negative_prompt must be a string, got 3",
        ),
        ("p.jsonl", b'{"prompt": null}', "line 1: prompt must be a non-empty string, got None"),
        ("p.jsonl", b'{"prompt": "a", "seed": 1.5}', "line 1: seed must be a whole number"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', "line 1: seed must be a whole number"),
        ("p.jsonl", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("p.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", b'"a cat"', "line 1: must be an object"),
        ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
        ("p.jsonl", b"\n \n", "holds no prompts"),
        ("p.csv", b"", "holds no prompts"),
        ("p.csv", b"prompt,seed\n", "holds no prompts"),
        ("p.csv", b"a cat\na dog\n", "line 1: must name prompt, caption or text, and each column once; got a cat"),
        ("p.csv", b"prompt,id,id\na,b,c\n", "line 1: must name each column once; 'id' comes twice"),
        ("p.csv", b"prompt,id\na cat\na, dog, small\n", "line 3: more cells than columns"),
        ("p.csv", b"prompt,seed\na cat,1.5\n", "line 2: seed must be a whole number from 0 to 2..63 - 1, got 1.5"),
        ("p.csv", b"promt,id\na cat,b\n", "line 1: unknown column 'promt': call it 'prompt' if that is meant"),
        ("p.jsonl", b'{"prompt": "a", "Guidance Scale": 3}', "line 1: unknown column 'Guidance Scale': call it 'scale'"),
        ("p.jsonl", b'{"prompt": "a", "sede": 3}', "line 1: unknown column 'sede': call it 'seed'"),
        ("p.jsonl", b'{"prompt": "a", "height": "tall"}', "line 1: height must be a whole number of at least 1, got 'tall'"),
        ("p.jsonl", b'{"prompt": "a", "count": 0}', "line 1: count must be a whole number of at least 1, got 0"),
        (
            "p.jsonl",
            b'{"prompt": "a", "guidance": 7.5}',
            "line 1: guidance must be one of cfg, .*, got 7.5; its scale is called",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a", "id": "x-1"}\n{"prompt": "b", "id": "x", "count": 2}',
            "line 2: id 'x-1' is already used in",
        ),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: not JSON: the key 'prompt' comes twice"),
        ("p.jsonl", b'{"prompt": "a", "Prompt": "b"}', "line 1: must name each column once; 'prompt' comes twice"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a \\ud83d"}', "line 2: holds half a surrogate pair"),
        ("p.jsonl", b'{"prompt": "a", "more": ["\\udc00"]}', "line 1: holds half a surrogate pair"),
        ("p.txt", b"a cat\n\na d\xf6g\n", "line 3: not UTF-8 text"),
        ("p.txt", "a cat\n".encode("utf-16"), "line 1: not UTF-8 text"),
        ("p.txt", "a cat\n".encode("utf-16-le"), "line 1: not UTF-8 text"),
        ("p.txt", b"Prompt,seed\na cat,3\n", r"line 1: names columns \(Prompt,seed\), and a .txt file has a prompt a line"),
        ("p.txt", b"text\tID\na cat\tx\n", "line 1: names columns .* let its name end in .csv or .tsv"),
        ("p.csv", "prompt,seed\na cat,3\n".encode("utf-16"), "line 1: not UTF-8 text"),
        ("p.csv", b"prompt,\na cat,\na cat,asleep\n", "line 3: text stands in a column without a name, as if a prompt"),
        ("p.txt", b'{"prompt": "a"}', "line 1: is a JSON object, and a .txt file has a prompt a line"),
        ("p.csv", b"prompt,url\na dog,u\na cat, asleep\n", "line 3: url starts with a space, as if a prompt went on"),
        ("p.csv", b"prompt;id\na cat;b;c\n", "line 2: more cells than columns"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 50, mtime=0)[:-9], "which is no whole .gz file"),
        ("p.csv.gz", b"prompt\na\n", "which is no whole .gz file"),
        ("p.json", b'[{"prompt": "a"}, 3]', "entry 2: must be an object"),
        ("p.json", b'[{"prompt": "a"}', "not JSON"),
        ("p.xlsx", b"PK", "must end in .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, and perhaps .gz"),
        ("p.csv", b'prompt,seed\na cat,1\n"a dog,2\na bird,3\n', "line 3: not CSV"),
        ("p.csv", b"prompt,id\na cat,x\na dog,X\n", "line 3: id 'X' is already used in line 2"),
    ],
)
def test_the_line_that_is_wrong_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_prompts(tmp_path / name)
    assert str(error.value).startswith(f"prompts file {str(tmp_path / name)!r}")


def test_all_rows_that_are_wrong_are_named_at_once_and_each_once(tmp_path):
    """Also those that share an id, and of very many the first ones; a row is left out with all its images or not at all."""
    rows = [{"prompt": ""}, {"prompt": "a"}, {"prompt": "b", "seed": 2**63 - 2, "count": 9}, {"prompt": "c", "id": "0001"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "d", "steps": 0}])))
    with pytest.raises(ValueError, match=r"p\.jsonl': 4 rows are wrong: line 1: .*; line 3: .*; line 5: .*; line 4: ") as error:
        Prompts(tmp_path / "p.jsonl")
    assert str(error.value).count("line 3: ") == 1
    found = Prompts(tmp_path / "p.jsonl", on_error="skip")
    assert ([job.prompt for _, job in found], found.skipped) == (["a"], 4)
    (tmp_path / "p.jsonl").write_text('{"prompt": ""}\n' * 99)
    with pytest.raises(ValueError, match=r"99 rows are wrong: line 1: .*; line 20: .*got ''; and 79 more$"):
        Prompts(tmp_path / "p.jsonl")


def test_captions_of_training_images_are_prompts_too(tmp_path):
    """An empty cell says nothing, and of several texts the first counts."""
    rows = [{"caption": "a cat", "image": "1.png", "concept": "cat"}, {"caption": "no", "prompt": "a dog", "seed": 9}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "a bird", "file_name": "b.png"}])))
    expected = [Job("0000", "a cat", 5), Job("0001", "a dog", 9), Job("0002", "a bird", 7)]
    assert [replace(job, more=None) for job in read_prompts(tmp_path / "p.jsonl", 5)] == expected
    (tmp_path / "p.csv").write_text("prompt,text,seed,image\n,a cat,,1.png\na dog,no,9,\n,a bird,,\n")
    assert [replace(job, more=None) for job in read_prompts(tmp_path / "p.csv", 5)] == expected


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.* is a folder that the package datasets did not save: give a file"):
        read_prompts(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompts file '.*p\.jsonl' does not exist"):
        read_prompts(tmp_path / "p.jsonl")


def test_a_job_of_ones_own_keeps_the_same_rules():
    assert Job("a", "a cat", np.int64(3)) == Job("a", "a cat", 3) and type(Job("a", "a cat", np.int64(3)).seed) is int
    for wrong in ({"id": "../x"}, {"id": 3}, {"prompt": " "}, {"seed": -1}, {"seed": 3.0}, {"negative_prompt": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            Job(**{"id": "a", "prompt": "a cat", "seed": 0} | wrong)


def test_rows_that_are_wrong_are_skipped_on_request(tmp_path, caplog):
    """Each with its line; those that are right keep the places that they have beside them."""
    lines = [
        '{"prompt": "a"}',
        "{",
        '{"prompt": "b", "id": "A"}',
        '{"prompt": "c", "id": "a"}',
        '{"prompt": " "}',
        '{"prompt": "d"}',
    ]
    (tmp_path / "p.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}')
    found = Prompts(tmp_path / "p.jsonl", 10, on_error="skip")
    right = [(0, Job("0000", "a", 10)), (2, Job("A", "b", 12)), (5, Job("0005", "d", 15))]
    assert list(found) == right and list(found) == right and (len(found), found.skipped) == (3, 4)
    said = [record.getMessage() for record in caplog.records]
    for line, why in ((2, "not JSON"), (4, "id 'a' is already used in line 3"), (5, "non-empty"), (7, "not UTF-8")):
        assert sum(f"line {line}: " in text and why in text for text in said) == 1
    (tmp_path / "p.csv").write_text('prompt,seed\na cat,1\na dog,2,3\n"a" bird,4\na fish,5\n')
    assert [job.prompt for _, job in Prompts(tmp_path / "p.csv", on_error="skip")] == ["a cat", "a fish"]
    with pytest.raises(ValueError, match="on_error must be one of stop, skip"):
        Prompts(tmp_path / "p.jsonl", on_error="ignore")


def test_a_dataset_gives_its_prompts(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [{"prompt": "a cat", "id": None, "likes": 3}, {"prompt": "a dog", "id": "dog", "likes": 4}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    more = {"likes": 3}, {"likes": 4}
    assert read_prompts(tmp_path / "set", 3) == [Job("0000", "a cat", 3, more=more[0]), Job("dog", "a dog", 4, more=more[1])]
    datasets.Dataset.from_list([{"words": "a"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="must have prompt, caption or text; got words"):
        read_prompts(tmp_path / "other")


def test_a_dataset_gives_its_plain_columns_alone(tmp_path, monkeypatch):
    """Pictures would be decoded one by one. A double of the library, for where that is not installed."""

    class Value:
        pass

    class Picture:
        pass

    class Data(list):
        column_names, features = ["TEXT", "url", "jpg"], {"TEXT": Value(), "url": Value(), "jpg": Picture()}

        def select_columns(self, names):
            return [{name: row[name] for name in names} for row in self]

    rows = Data([{"TEXT": "a cat", "url": "u", "jpg": b""}, {"TEXT": "a dog", "url": None, "jpg": b""}])
    double = SimpleNamespace(load_dataset=lambda name, split, streaming: rows)
    monkeypatch.setitem(sys.modules, "datasets", double)
    assert read_prompts("hf:some/prompts") == [Job("0000", "a cat", 0, more={"url": "u"}), Job("0001", "a dog", 1)]
    rows.column_names = ["promt", "url"]
    with pytest.raises(ValueError, match="dataset 'hf:some/prompts', unknown column 'promt': call it 'prompt'"):
        read_prompts("hf:some/prompts")
    rows.column_names = ["label"]
    with pytest.raises(ValueError, match="must have prompt, caption or text; got label"):
        read_prompts("hf:some/prompts")


def test_a_dataset_without_its_library_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    for source in ("hf:some/prompts", str(tmp_path)):
        with pytest.raises(ImportError, match="needs the package datasets: pip install datasets"):
            Prompts(source)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_source_is_not_held_in_memory(tmp_path, suffix):
    path, text = tmp_path / f"p.{suffix}", "a cat " * 2_000

    def most(count):
        if suffix == "jsonl":
            path.write_text("".join(f'{{"prompt": "{text}{i}"}}\n' for i in range(count)))
        elif suffix == "csv":
            path.write_text("prompt,id\n" + "".join(f"{text}{i},p{i}\n" for i in range(count)))
        else:
            pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
            parquet.write_table(pyarrow.table({"prompt": [f"{text}{i}" for i in range(count)]}), path, row_group_size=16)
        tracemalloc.start()
        jobs = Prompts(path)
        assert sum(1 for _ in jobs) == len(jobs) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(1)
    assert most(600) - most(100) < 50 * len(text)


def test_a_list_of_prompts_is_a_file_of_them(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    assert list(Prompts(["a cat", "a dog"], seed=3)) == list(Prompts(tmp_path / "p.txt", seed=3))
