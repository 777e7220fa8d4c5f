"""What a user installs: a wheel with the small pipeline, and kernels that stand alone."""

import ast
import gzip
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code, cwd):
    """Standard output of `code` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


def test_a_wheel_holds_the_pipelines_and_all_packages(tmp_path):
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    source = tmp_path / "source"  # built from a copy: a build leaves folders behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "out", "build", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for folder, package in (("sampler", ""), ("kernels", "kernels/"), ("bench", "bench/")):
        expected = {f"basinescape/{package}{path.relative_to(source / folder)}" for path in (source / folder).rglob("*.py")}
        assert expected <= names
    assert "basinescape/hosts/comfyui/example_workflows/delayed_guidance.json" in names
    for name, network in (("tiny", "unet"), ("flow", "transformer")):
        own = {f"basinescape/{path.relative_to(ROOT / 'sampler')}" for path in (ROOT / "sampler/assets" / name).rglob("*.*")}
        assert own <= names and f"basinescape/assets/{name}/{network}/diffusion_pytorch_model.safetensors" in own


@pytest.mark.parametrize("below, above", [("kernels", r"basinescape\.(?!kernels)"), ("sampler", r"basinescape\.bench")])
def test_imports_run_one_way(below, above):
    """bench -> sampler -> kernels: no module names one of a layer above it, whether on top or in a function."""
    package = "basinescape.kernels" if below == "kernels" else "basinescape"
    found = {}
    for path in (ROOT / below).rglob("*.py"):
        home = [package, *path.relative_to(ROOT / below).parent.parts]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name: path for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(".".join(home).split(".")[: 1 - node.level or None]) if node.level else ""
                start = ".".join(part for part in (base, node.module) if part)
                found |= {f"{start}.{alias.name}": path for alias in node.names}
    assert any(name.startswith("torch") for name in found) and any(name.startswith(package) for name in found)
    assert not {name: path for name, path in found.items() if re.match(above, name)}


def test_the_sampler_runs_without_bench(tmp_path):
    """The pipeline that ships lies in bench, and is found and sampled from without importing that."""
    modules = [path.relative_to(ROOT / "sampler").with_suffix("").parts for path in (ROOT / "sampler").rglob("*.py")]
    names = ["basinescape." + ".".join(parts) for parts in modules if parts[-1] != "__init__"]
    code = """
import sys
from basinescape import Sampler
sampler = Sampler.from_pretrained(Sampler.model_path("tiny"), device="cpu")
sampler("a picture of a cat", 0, 1, progress=False)
print([name for name in sys.modules if name.startswith("basinescape.bench")])
"""
    assert python(f"import {', '.join(names)}" + code, tmp_path).strip() == "[]"


@pytest.mark.parametrize("name", ["tiny", "flow"])
def test_the_pipelines_that_ship_are_small(name):
    assert sum(path.stat().st_size for path in (ROOT / "sampler/assets" / name).rglob("*") if path.is_file()) <= 15_000_000


@pytest.mark.parametrize("name", ["tiny", "flow"])
def test_the_pipelines_that_ship_do_not_say_where_they_were_made(name):
    files = (ROOT / "sampler/assets" / name).rglob("*.json")
    said = [value for path in files for value in json.loads(path.read_text()).values()]
    assert said and not [value for value in said if isinstance(value, str) and value.startswith(("/", "~"))]


def test_results_name_files_and_not_where_they_lay():
    written = sorted((ROOT / "bench" / "results").rglob("*.jsonl*"))
    lines = [line for path in written for line in (gzip.open if path.suffix == ".gz" else open)(path, "rt")]
    assert lines and not [line for line in lines if re.search(r'": "(/|~)', line)]


def test_the_kernels_need_torch_and_triton_alone(tmp_path):
    code = """
import sys
import basinescape.kernels, basinescape.kernels.step, basinescape.kernels.aot
print(sorted({"diffusers", "transformers", "numpy.testing", "matplotlib"} & set(sys.modules)))
"""
    assert python(code, tmp_path).strip() == "[]"


def test_the_package_imports_in_the_root():
    """In the repository's root the folder `kernels` must not pass for the package of that name."""
    code = "from basinescape import Sampler; print(Sampler.model_path('tiny').name)"
    assert python(code, ROOT).strip() == "tiny"
