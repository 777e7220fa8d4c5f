"""Rows of prompts that ask for pictures of their own kind and number."""

import json

import pytest
from basinescape.data.prompts import Job, Kind, Prompts


def test_a_prompt_may_have_steps_and_a_scale_of_its_own(tmp_path):
    rows = '{"prompt": "a"}\n{"prompt": "b", "steps": 3}\n{"prompt": "c", "steps": 3, "scale": 2}\n'
    (tmp_path / "p.jsonl").write_text(rows)
    (tmp_path / "p.csv").write_text("prompt,steps,scale\na,,\nb,3,\nc,3,2\n")
    for name, place in (("p.jsonl", "line 3"), ("p.csv", "line 4")):
        found = Prompts(tmp_path / name)
        assert [job.kind for _, job in found] == [Kind(), Kind(3), Kind(3, 2.0)]

        def fits(kind):
            if kind.scale == 2.0:
                raise ValueError("too little")

        with pytest.raises(ValueError, match=f"{name}', {place}: too little"):
            found.check(fits)
    for wrong in ({"steps": 0}, {"steps": 2.5}, {"steps": "x"}, {"scale": "x"}, {"scale": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Job("a", "a", 0, **wrong)
    with pytest.raises(ValueError, match="more than 1000 different settings"):
        Prompts([Job(f"{i}", "a", 0, scale=i) for i in range(1001)])


def test_a_row_may_ask_for_several_images_of_its_own_size_and_guidance(tmp_path):
    """The first has the row's id and seed: with a higher count the others come behind it, and those of other rows stay."""
    text = "prompt,id,count,height,width,guidance\na,x,3,64,32,cfg\nb,,,,,\nc,,2,,,\n"
    (tmp_path / "p.csv").write_text(text)
    wide = {"height": 64, "width": 32, "guidance": "cfg"}
    expected = [Job("x", "a", 10, **wide), Job("x-1", "a", 11, **wide), Job("x-2", "a", 12, **wide)]
    expected += [Job("0001", "b", 11), Job("0002", "c", 12), Job("0002-1", "c", 13)]
    found = Prompts(tmp_path / "p.csv", 10)
    assert list(found) == list(enumerate(expected)) and len(found) == 6
    assert [job.id for _, job in Prompts(tmp_path / "p.csv", count=2)] == [
        "x",
        "x-1",
        "x-2",
        "0001",
        "0001-1",
        "0002",
        "0002-1",
    ]
    (tmp_path / "p.csv").write_text(text.replace("x,3", "x,1"))
    assert {job for _, job in Prompts(tmp_path / "p.csv", 10)} < set(expected)


def test_jobs_that_do_not_fit_are_left_out_one_by_one_on_request(tmp_path, caplog):
    lines = [{"prompt": "a"}, {"prompt": "b", "height": 63}, {"prompt": "c", "steps": 2}, {"prompt": "d", "height": 63}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = Prompts(tmp_path / "p.jsonl", on_error="skip")
    before = found.sha256

    def fits(kind):
        if kind.height:
            raise ValueError("height must be even")

    found.check(fits)
    assert [position for position, _ in found] == [0, 2] and (len(found), found.skipped) == (2, 2)
    said = [record.getMessage() for record in caplog.records]
    assert [f"line {line}: height must be even: skipped" in text for line, text in zip((2, 4), said, strict=True)] == [True] * 2
    (tmp_path / "right.jsonl").write_text("\n".join(map(json.dumps, [lines[0], lines[2]])))
    assert found.sha256 not in (before, Prompts(tmp_path / "right.jsonl").sha256)  # a row keeps its place beside wrong ones


@pytest.mark.parametrize("wrong", ['"a dog,2', '"a" dog,2', "a dog,2,3", ",2", "a dog,x"])
def test_a_line_of_csv_that_is_wrong_costs_itself_alone(tmp_path, wrong):
    """An open quote would swallow all that follow."""
    rows = ["prompt,seed", "a cat,1", wrong, "a bird,3", '"a ""fish"" and\nmore",4', "a cow,5"]
    (tmp_path / "p.csv").write_text("\n".join(rows))
    found = Prompts(tmp_path / "p.csv", on_error="skip")
    assert [job.prompt for _, job in found] == ["a cat", "a bird", 'a "fish" and\nmore', "a cow"] and found.skipped == 1
    assert [position for position, _ in found] == [0, 2, 3, 4]


def test_images_that_are_asked_for_twice_are_said(tmp_path, caplog):
    rows = [{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1, "steps": 3}, {"prompt": "a", "seed": 1}, {"prompt": "a"}]
    rows += [{"prompt": "b", "seed": 1, "count": 2}, {"prompt": "b", "seed": 2, "id": "again"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(Prompts(tmp_path / "p.jsonl")) == 7
    (said,) = [record.getMessage() for record in caplog.records]
    assert "2 of 7 images are asked for twice" in said and "(0002 as 0000, again as 0004-1)" in said


def test_ids_do_not_depend_on_how_many_there_are(tmp_path):
    """A set that grows keeps its own."""
    (tmp_path / "p.txt").write_text("a\n" * 10_001)
    ids = [job.id for _, job in Prompts(tmp_path / "p.txt")]
    assert (ids[0], ids[9_999], ids[10_000]) == ("0000", "9999", "10000")
