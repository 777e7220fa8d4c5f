"""What mkdocs does beside its own: it writes the tables of the page "What is supported", and checks what pages name.

Both come from the tests. A cell says in how many collected cases a test shows a feature for a model. The build fails where a
page names a test or a file that is not there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests/doubles")]
from features import HOSTS, MODELS  # noqa: E402
from hosts_tested import HOSTS as TRIED  # noqa: E402

TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
ELSEWHERE = re.compile(r"<(?:script|img|iframe)[^>]+src=\"https?:|<link[^>]+rel=\"(?:stylesheet|preload)\"[^>]+href=\"https?:")
FILE = re.compile(r"`((?:bench|kernels|sampler|examples|docs)/[\w./-]+)`")


@cache
def collected() -> Counter[tuple[str, str]]:
    """(test, model) -> the number of its cases. The model is what the case's id begins with, "" for another id or none."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"the tests cannot be collected:\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
    names = adapters()
    cases: Counter[tuple[str, str]] = Counter()
    for line in found.stdout.splitlines():
        test, _, case = line.partition("[")
        words = re.split(r"[-\]]", case)
        known = next((names.get(word, word) for word in words if word in names or word.endswith("Pipeline")), "")
        cases[test, known] += 1
    return cases


@cache
def adapters() -> dict[str, str]:
    """The short name of each model of the sampler, its adapter's file -> its pipeline."""
    from basinescape.models import ADAPTERS

    return {adapter.__module__.rpartition(".")[2]: pipeline for pipeline, adapter in ADAPTERS.items()}


def count(tests: tuple[str, ...], pipeline: str | None = None) -> int:
    """The collected cases of these tests, of one pipeline or of all. Raises LookupError for a test that there is not."""
    missing = [test for test in tests if not any(name == test for name, _ in collected())]
    if missing:
        raise LookupError(f"docs/tools/features.py names tests that there are not: {', '.join(missing)}")
    return sum(cases for (name, known), cases in collected().items() if name in tests and pipeline in (None, known))


def cell(cases: int) -> str:
    return str(cases) if cases else "—"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def models_table() -> str:
    """A row a pipeline, a column a host and feature."""
    own = list(adapters().values())
    others = sorted({known for _, known in collected() if known.endswith("Pipeline")} - set(own))
    columns = [(host, feature, tests) for host, features in MODELS.items() for feature, tests in features.items()]
    counts = [[name, *(count(tests, name) for *_, tests in columns)] for name in (*own, *others)]
    rows = [[f"`{name}`", *map(cell, cells)] for name, *cells in counts if any(cells)]
    return table(["pipeline", *(f"{host}: {feature}" for host, feature, _ in columns)], rows)


def hosts_table() -> str:
    """A row a host, a column a feature."""
    features = list(dict.fromkeys(feature for known in HOSTS.values() for feature in known))
    rows = [[host, *(cell(count(known[f])) if f in known else "—" for f in features)] for host, known in HOSTS.items()]
    return table(["host", *features], rows)


def tried_table() -> str:
    """A row a host: the version it was tried with, how, and the cases of its tests."""

    def cases(file: str) -> int:
        return sum(n for (name, _), n in collected().items() if name.startswith(f"tests/hosts/{file}::"))

    rows = [[one.name, f"{one.package} {one.version}", one.date, one.how, str(cases(one.file))] for one in TRIED]
    return table(["host", "tried with", "when", "how", "cases"], rows)


def check(markdown: str, page: str) -> None:
    """Raise LookupError where a page names a test or a file that there is not."""
    for file, test in TEST.findall(markdown):
        if not (ROOT / file).is_file() or (test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")):
            raise LookupError(f"{page} names {file}{'::' * bool(test)}{test}, which there is not")
    for file in FILE.findall(markdown):
        if not (ROOT / file).exists():
            raise LookupError(f"{page} names {file}, which there is not")


def additions() -> dict[str, str]:
    """The pages on how to add something, file -> title."""
    pages = sorted((ROOT / "docs").glob("add-a-*.md"))
    return {page.name: page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for page in pages}


def additions_list() -> str:
    return "\n".join(f"- [{title}]({name})" for name, title in additions().items())


MADE = {"<!-- models -->": models_table, "<!-- hosts -->": hosts_table, "<!-- tried -->": tried_table}
MADE["<!-- extend -->"] = additions_list


def on_config(config: Any, **_: Any) -> Any:
    (pages,) = (entry["Extend it"] for entry in config.nav if "Extend it" in entry)
    pages += [name for name in additions() if name not in pages]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    check(markdown, page.file.src_uri)
    for mark, make in (
        ("<!-- models -->", models_table),
        ("<!-- hosts -->", hosts_table),
        ("<!-- tried -->", tried_table),
        ("<!-- extend -->", additions_list),
    ):
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    if ELSEWHERE.search(output):
        raise ValueError(f"{page.file.src_uri} loads something from elsewhere: {ELSEWHERE.search(output)[0]}")
    return output
