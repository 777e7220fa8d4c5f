"""The index of training images: the nearest one of a picture, by the measure that speaks clearest."""

import pytest
import torch
import torch.nn.functional as F
from basinescape.auditing import measures
from basinescape.auditing.training_images import TrainingImages
from basinescape.data.pictures import pixels
from PIL import Image, ImageChops


def test_the_nearest_is_found_anywhere_in_the_set_and_shifted(images):
    paths = sorted(images.glob("*.png"))
    opened = [Image.open(path).convert("RGB") for path in paths]
    noise = Image.fromarray(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy())
    asked = [ImageChops.offset(opened[2], 2, -2), opened[0].resize((256, 256)), noise]
    found = TrainingImages(paths, ["pixels"])(asked)
    assert [one["nearest"] for one in found[:2]] == [paths[2], paths[0]]
    assert [one["copy"] for one in found] == [True, True, False]
    halves = F.avg_pool2d(pixels([image.resize((64, 64), Image.Resampling.BOX) for image in asked]), 2)
    middles = F.avg_pool2d(pixels(opened), 2)[..., 2:-2, 2:-2].flatten(1)
    for one, half in zip(found, halves, strict=True):
        windows = half.unfold(1, 28, 1).unfold(2, 28, 1).permute(1, 2, 0, 3, 4).reshape(25, -1)
        correlations = torch.corrcoef(torch.cat([windows, middles]))[:25, 25:]
        assert one["similarity"] == pytest.approx(correlations.max().item(), abs=1e-4)


def test_each_measure_has_its_own_threshold_and_the_clearest_speaks(images, monkeypatch):
    """An embedding that takes everything for one thing has the last word only where it is surer."""
    monkeypatch.setitem(measures.EMBEDDINGS, "sscd", lambda: lambda found: torch.ones(len(found), 3).numpy())
    paths = sorted(images.glob("*.png"))
    (one,) = TrainingImages(paths, ["pixels", "sscd"])([Image.new("RGB", (8, 8))])
    assert (one["measure"], one["copy"]) == ("sscd", True)
    assert TrainingImages(paths, ["pixels", "sscd"]).thresholds == {"pixels": 0.81, "sscd": 0.5}
    (one,) = TrainingImages(paths, ["pixels"], threshold=0.999)([Image.open(paths[0]).resize((70, 70))])
    assert not one["copy"]
