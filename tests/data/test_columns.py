"""Columns and lines of prompts: known however they are spelled, carried where they are not, and whole."""

import json

import pytest
from basinescape.data.names import KNOWN, columns
from basinescape.data.prompts import Job, Prompts, read_prompts
from hypothesis import given
from hypothesis import strategies as st


def test_other_columns_go_into_the_manifest(tmp_path, caplog):
    """As they are where a column is of one kind, else as text; what a line says of its own image is not passed for it."""
    rows = [
        {
            "index": 3,
            "caption": "a cat",
            "url": "http://x/1.jpg",
            "scenes": ["s0"],
            "mixed": 1,
            "idx": True,
            "score": 5.5,
            "deep": {},
            "words": "x",
        },
        {
            "index": 4.5,
            "caption": "a dog",
            "url": None,
            "scenes": [],
            "mixed": "b",
            "prompt2": "c",
            "Test": "d",
            "big": 2**70,
            "words": [],
        },
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = (job.asked() for _, job in Prompts(tmp_path / "p.jsonl"))
    own = {"id": "0000", "prompt": "a cat", "seed": 0}
    more = {"index": 3, "url": "http://x/1.jpg", "scenes": ["s0"], "mixed": "1", "idx": True, "deep": "{}", "words": "x"}
    assert first == own | more
    own = {"id": "0001", "prompt": "a dog", "seed": 1}
    more = {"index": 4.5, "scenes": [], "mixed": "b", "prompt2": "c", "Test": "d", "big": str(2**70), "words": "[]"}
    assert second == own | more
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("not carried into the manifest, which says this of its own images: score")
    digest = Prompts(tmp_path / "p.jsonl").sha256
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)).replace("http", "ftp"))
    assert Prompts(tmp_path / "p.jsonl").sha256 != digest
    (tmp_path / "p.csv").write_text("index,Caption,url,colour\n3,a cat,u,\n4,a dog,,red\n")
    assert [job.more for job in read_prompts(tmp_path / "p.csv")] == [
        {"index": "3", "url": "u"},
        {"index": "4", "colour": "red"},
    ]


def test_columns_of_pictures_are_left_in_their_parquet_file(tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    pictures = [{"bytes": b"x", "path": "a.png"}]
    columns = {"TEXT": ["a cat"], "picture": pictures, "jpg": [b"y"], "day": pyarrow.array([0], pyarrow.date32()), "n": [1]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == [Job("0000", "a cat", 0, more={"day": "1970-01-01", "n": 1})]


@pytest.mark.parametrize("name", ["tiny", "flow"])
def test_the_captions_that_ship_are_prompts(name):
    from basinescape import models

    rows = [json.loads(line) for line in (models.shipped()[name] / "memorized.jsonl").open()]
    found = read_prompts(models.shipped()[name] / "memorized.jsonl")
    assert [(job.id, job.prompt) for job in found] == [(row["id"], row["prompt"]) for row in rows]
    assert all(job.more["duplication"] == row["duplication"] for job, row in zip(found, rows, strict=True))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_what_looks_like_the_end_of_a_line_is_none(tmp_path, separator):
    text = f"a cat{separator}asleep"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + '\n{"prompt": "b"}')
    (tmp_path / "p.txt").write_text(f"{text}\r\nb\n", newline="")
    (tmp_path / "p.csv").write_text(f"prompt\n{text}\nb\n")
    for name in ("p.jsonl", "p.txt", "p.csv"):
        assert [job.prompt for job in read_prompts(tmp_path / name)] == [text, "b"]


def test_spaces_behind_every_comma_and_in_other_columns_are_no_halves_of_prompts(tmp_path):
    for text in (
        ",prompt\n0,a cat\n",
        "prompt, url\na cat, u\n",
        'prompt,url\n"a cat",u\n',
        "note,prompt,url,by\n x,a cat,u, y\n",
    ):
        (tmp_path / "p.csv").write_text(text)
        assert [job.prompt for job in read_prompts(tmp_path / "p.csv")] == ["a cat"]


def test_commas_separate_nothing_between_tabs(tmp_path):
    (tmp_path / "p.tsv").write_text("prompt\na cat, asleep\n")
    assert [job.prompt for job in read_prompts(tmp_path / "p.tsv")] == ["a cat, asleep"]


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufefftext, in gold letters\n\n  größer {a|b}\nprompt\n".encode())
    assert [(job.id, job.prompt) for job in read_prompts(tmp_path / "p.txt")] == [
        ("0000", "text, in gold letters"),
        ("0001", "größer {a|b}"),
        ("0002", "prompt"),
    ]


SLIPS = {  # of a letter that is not the first
    "one too few": lambda name, k, letter: name[:k] + name[k + 1 :],
    "one too many": lambda name, k, letter: name[:k] + letter + name[k:],
    "another": lambda name, k, letter: name[:k] + letter + name[k + 1 :],
    "two exchanged": lambda name, k, letter: name[:k] + name[k : k + 2][::-1] + name[k + 2 :],
}


@given(st.sampled_from([name for name in KNOWN if len(name) > 4]), st.sampled_from([*SLIPS]), st.integers(1, 15), st.data())
def test_a_slip_in_the_name_of_a_column_is_refused(name, slip, k, data):
    k = min(k, len(name) - 1)
    wrong = SLIPS[slip](name, k, data.draw(st.sampled_from("qxz")))
    if wrong == name or wrong.replace("_", "") == name.replace("_", ""):
        assert columns((wrong,)) == {wrong: name}
    else:
        with pytest.raises(ValueError, match=f"unknown column '{wrong}': call it"):
            columns((wrong,))


def test_other_columns_are_no_slips():
    others = ("prompt2", "idx", "test", "fine", "scaling factor", "weight", "hat", "capital")
    assert columns(others) == {name: name for name in others}


@pytest.mark.parametrize("name", ["Caption", "TEXT", " prompt ", "Prompt"])
def test_columns_are_known_however_they_are_spelled(tmp_path, name):
    (tmp_path / "p.jsonl").write_text(json.dumps({name: "a", "Negative Prompt": "b", "Seed": 4, "ID": "x"}))
    (tmp_path / "p.csv").write_text(f"{name},negativePrompt,SEED,Id,\na,b,4,x,\n")
    for file in ("p.jsonl", "p.csv"):
        assert read_prompts(tmp_path / file) == [Job("x", "a", 4, "b")]
