"""Every example runs as it stands, and says where guidance began."""

import re
import runpy
import sys
from pathlib import Path

import kd_package
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("small", "bulk"))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.slow
def test_an_example_runs(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    if name == "kdiffusion":
        kd_package.package()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    (steps,) = re.findall(r"guided from step \[([-\d, ]+)\] on", capsys.readouterr().out)
    assert all(0 < int(step) < 20 for step in steps.split(","))
    assert len(Image.open(tmp_path / f"{name}.png").getcolors(1 << 16)) > 1


@pytest.mark.slow
def test_the_large_run_makes_its_files(monkeypatch, tmp_path, capsys):
    lines = '{"prompt": "a picture of a cat", "id": "cat"}', "not JSON", '{"prompt": "a picture of a dog"}'
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    argv = ["bulk.py", tmp_path / "p.jsonl", tmp_path / "out", "--steps", 50, "--batch-size", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    runpy.run_path(str(EXAMPLES / "bulk.py"), run_name="__main__")
    assert "2 of 2 images" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out" / "images").glob("*.png")} == {"cat.png", "0002.png"}


def test_the_table_names_every_example():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.py)" in table for name in SCRIPTS)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", table) if not link.startswith("http")]
    assert all((EXAMPLES / link).exists() for link in links)
