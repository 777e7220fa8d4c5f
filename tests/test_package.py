"""What a user installs: a wheel with the small pipeline, and kernels that stand alone."""

import ast
import gzip
import json
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import basinescape
import pytest

ROOT = Path(__file__).parent.parent
CHECKOUT = tuple(f"basinescape/bench/{name}/" for name in ("speed", "gpu", "testbed"))  # these run in a checkout alone


def python(code, cwd):
    """Standard output of `code` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.process
def test_a_wheel_holds_the_pipelines_and_all_packages(tmp_path):
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    source = tmp_path / "source"  # built from a copy: a build leaves folders behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "out", "build", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for folder, package in (("sampler", ""), ("kernels", "kernels/"), ("bench", "bench/")):
        expected = {f"basinescape/{package}{path.relative_to(source / folder)}" for path in (source / folder).rglob("*.py")}
        assert {name for name in expected if not name.startswith(CHECKOUT)} <= names
    assert not [name for name in names if name.startswith(CHECKOUT)]
    own = ("hosts/comfyui/example_workflows/delayed_guidance.json", "hosts/comfyui/pyproject.toml")
    assert {f"basinescape/{name}" for name in ("py.typed", *own)} <= names
    for name, network in (("tiny", "unet"), ("flow", "transformer")):
        own = {f"basinescape/{path.relative_to(ROOT / 'sampler')}" for path in (ROOT / "sampler/assets" / name).rglob("*.*")}
        assert own <= names and f"basinescape/assets/{name}/{network}/diffusion_pytorch_model.safetensors" in own


def test_type_checkers_see_every_public_name_where_it_is_loaded_from():
    tree = ast.parse((ROOT / "sampler/__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    declared = {alias.name: node.module for node in block.body for alias in node.names}
    assert declared == basinescape._MODULES and sorted(declared) == basinescape.__all__


def test_the_changelog_names_modules_that_are_there():
    table = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Moved")[2]
    now = [name for line in table.splitlines()[4:] for name in re.findall(r"`basinescape\.([\w.]+)`", line.split(" | ")[-1])]
    missing = [name for name in now if not list((ROOT / "sampler").glob(f"{name.replace('.', '/')}*"))]
    assert len(now) > 30 and not missing


def imported(path):
    """All that a module of ours imports, on top, in a function or for its types alone, by full names."""
    package = ("basinescape", *({"sampler": ()}.get(path.relative_to(ROOT).parts[0], path.relative_to(ROOT).parts[:1])))
    home = [*package, *path.relative_to(ROOT).parts[1:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(home[: len(home) + 1 - node.level]) if node.level else ""
            start = ".".join(part for part in (base, node.module) if part)
            yield from (f"{start}.{alias.name}" for alias in node.names)


def rooms():
    """Room -> the rooms that its modules import. A module on top of the package is a room of its own."""
    found = {}
    for path in (path for top in ("kernels", "sampler", "bench") for path in sorted((ROOT / top).rglob("*.py"))):
        top, *inner = path.relative_to(ROOT).parts
        own = top if top != "sampler" else inner[0].removesuffix(".py")
        names = [name.split(".") for name in imported(path) if name.startswith("basinescape.")]
        others = {parts[1] for parts in names if (ROOT / "sampler" / parts[1]).exists() or parts[1] in ("kernels", "bench")}
        others |= {parts[1] for parts in names if (ROOT / "sampler" / f"{parts[1]}.py").exists()}
        found.setdefault(own, set()).update(others - {own})
    return found


def test_imports_between_rooms_run_one_way():
    """Types included: there is an order of the rooms in which each imports only what stands before it."""
    found = rooms()
    order = list(TopologicalSorter(found).static_order())  # raises CycleError, which names the circle
    assert {"guidance", "detection", "sampling", "sampler", "bulk", "auditing", "commands"} <= set(found)
    assert not found["kernels"] and order.index("sampler") < order.index("commands") < order.index("bench")


@pytest.mark.process
def test_the_sampler_runs_without_bench(tmp_path):
    """Nothing of bench is imported by any module of the sampler, nor by a run."""
    sources = [path for path in (ROOT / "sampler").rglob("*.py") if (path.parent / "__init__.py").is_file()]
    modules = [path.relative_to(ROOT / "sampler").with_suffix("").parts for path in sources]
    names = ["basinescape." + ".".join(parts) for parts in modules if parts[-1] != "__init__"]
    code = f"""
import sys
from importlib import import_module
for name in {names}:
    try:
        import_module(name)
    except ModuleNotFoundError as error:  # a host's own package
        assert not error.name.startswith("basinescape"), error
from basinescape import Sampler
sampler = Sampler.from_pretrained(Sampler.model_path("tiny"), device="cpu")
sampler("a picture of a cat", 0, 1, progress=False)
print([name for name in sys.modules if name.startswith("basinescape.bench")])
"""
    assert python(code, tmp_path).strip() == "[]"


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


@pytest.mark.process
def test_the_kernels_need_torch_and_triton_alone(tmp_path):
    code = """
import sys
import basinescape.kernels, basinescape.kernels.step, basinescape.kernels.aot
print(sorted({"diffusers", "transformers", "numpy.testing", "matplotlib"} & set(sys.modules)))
"""
    assert python(code, tmp_path).strip() == "[]"


@pytest.mark.process
def test_the_package_imports_in_the_root():
    """In the repository's root the folder `kernels` must not pass for the package of that name."""
    code = "from basinescape import Sampler; print(Sampler.model_path('tiny').name)"
    assert python(code, ROOT).strip() == "tiny"
