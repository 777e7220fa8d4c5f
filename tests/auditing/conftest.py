"""Training images that the tests of audits share."""

import shutil

import pytest
from basinescape.bench.scenario import PRESETS, prompts


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for i, prompt in enumerate(prompts(PRESETS["tiny"])["memorized"][:4]):
        shutil.copy(prompt.image, folder / f"{i}.png")
    return folder
