"""The pages: each diff of docs/ applies to the package, and the code beneath it runs; docstrings become lists."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("add-a-*.md"))
DIFFS = [page for page in PAGES if page.with_suffix(".diff").is_file()]


@pytest.fixture
def package(tmp_path):
    """A copy of the package's source, and the folder that Python finds it in."""
    ignored = shutil.ignore_patterns("__pycache__", "assets", "results")
    for folder in ("sampler", "kernels", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    (tmp_path / "sampler/assets").symlink_to(ROOT / "sampler/assets")
    (tmp_path / "path").mkdir()
    (tmp_path / "path/basinescape").symlink_to(tmp_path / "sampler")
    for folder in ("kernels", "bench"):
        (tmp_path / "sampler" / folder).symlink_to(tmp_path / folder)
    return tmp_path


@pytest.mark.process
@pytest.mark.parametrize("page", DIFFS, ids=lambda page: page.stem)
def test_a_diff_of_the_pages_works(package, page):
    subprocess.run(["git", "apply", str(page.with_suffix(".diff"))], cwd=package, check=True)
    *_, code = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(package / "path"), "TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", code], cwd=package, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_every_diff_has_its_page():
    assert {path.stem for path in (ROOT / "docs").glob("*.diff")} == {page.stem for page in DIFFS} != set()


def test_columns_of_a_docstring_become_a_list():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs/tools/docstrings.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    found = module.listed("A sum.\n\nx, y:  numbers,\n       of any kind\nscale: a factor\n\nRaises ValueError: none.")
    assert found == "A sum.\n\n- `x`, `y`: numbers,\n  of any kind\n- `scale`: a factor\n\nRaises ValueError: none."
