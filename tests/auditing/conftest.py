"""What the tests of audits share: training images, and a cache of each test's own."""

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
