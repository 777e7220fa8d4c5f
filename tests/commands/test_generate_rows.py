"""Options of generate in its help, and rows that ask for settings of their own."""

import json
import re
import sys

import pytest
from basinescape import At, Guidance
from basinescape.bench import cli
from bulkruns import run, sound
from PIL import Image


def test_every_option_of_generate_stands_in_its_group(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["basinescape", "generate", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    sections = re.split(r"^([\w ]+):\n", capsys.readouterr().out, flags=re.MULTILINE)
    groups = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(groups) == ["Most used", "Guidance", "Pictures", "Output", "Copies", "Speed", "Other", "Example"]
    homes = {"--prompts": "Most used", "--count": "Most used", "--until": "Guidance", "--clip-skip": "Pictures"}
    homes |= {"--shard": "Output", "--training-images": "Copies"}
    for option, home in {**homes, "--batch-size": "Speed", "--help": "Other"}.items():
        assert [group for group, text in groups.items() if f"\n  {option} " in "\n" + text] == [home]
    assert "basinescape generate --model" in groups["Example"]


@pytest.mark.slow
def test_rows_ask_for_their_own_number_size_and_guidance(tmp_path, monkeypatch, capsys, mine):
    rows = [
        {"prompt": "a", "height": 32, "guidance": "opposite"},
        {"prompt": "b", "guidance": "cfg", "count": 1},
        {"prompt": "c"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("--prompts", tmp_path / "p.jsonl", "--model", mine, "--device", "cpu", "--steps", 2, "--out", tmp_path / "out")
    assert run(monkeypatch, capsys, *asked, "--count", 2, "--seed", 5, "--until", 600) == (0, "")
    lines = {line["id"]: line for line in sound(tmp_path / "out")}
    assert {id: line["seed"] for id, line in lines.items()} == {"0000": 5, "0000-1": 6, "0001": 6, "0002": 7, "0002-1": 8}
    for id, line in lines.items():
        with Image.open(tmp_path / "out" / line["file"]) as image:
            assert image.size == ((64, 32) if id.startswith("0000") else (64, 64))
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    named = {name: Guidance.from_dict(one) for name, one in stored["named"].items()}
    assert named == {"cfg": Guidance.cfg(7.5), "opposite": Guidance.opposite(2.0, 7.5, At(600))}
    assert Guidance.from_dict(stored["guidance"]) == Guidance.delayed(7.5, until=At(600))
