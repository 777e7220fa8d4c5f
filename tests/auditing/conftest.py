"""What the tests of audits share: training images, ordinary prompts, a short audit, and a cache of each test's own."""

import json
import shutil

import pytest
from basinescape.bench.scenario import PRESETS, prompts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's folder for caches."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder with four of the training images of tiny."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i, prompt in enumerate(prompts(PRESETS["tiny"])["memorized"][:4]):
        shutil.copy(prompt.image, folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """A file of prompts that are ordinary on the small pipeline."""
    path = tmp_path_factory.mktemp("ordinary") / "ordinary.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in prompts(PRESETS["tiny"])["general"][20:32])
    )
    return path


@pytest.fixture
def asked(mine, ordinary, tmp_path):
    """A short audit of the small pipeline without a calibration."""
    given = ("--model", mine, "--out", tmp_path / "out", "--prompts", ordinary, "--scheduler", "dpmsolver++", "--steps", 12)
    return (*given, "--first-steps", 2, "--rate", 0.5, "--similarity", "pixels", "--threshold", 0.5)
