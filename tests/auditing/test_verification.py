"""What is shown beside a caption: where it pushed its pictures, and what the model has in mind."""

import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.auditing.heat import TOP, Heat, in_grey, overlaid
from basinescape.auditing.verification import Verification, predictions, still
from basinescape.bench.scenario import PRESETS, prompts
from basinescape.calibration.cost_bar import PlainRuns
from basinescape.data.pictures import opened, pixels
from basinescape.detection import basin_score
from families import CASES
from PIL import Image

TINY = prompts(PRESETS["tiny"])


@pytest.fixture(scope="module", params=["flux", "qwen", "wan", "sd3", "pixart"])
def family(request, tiny):
    case = CASES[request.param]
    options = {name: value for name, value in case.options.items() if name in ("height", "width", "num_frames")}
    return Sampler.from_pipeline(case.make(tiny.tokenizer)).using(**options)


def watched(sampler, steps=3, calls=2):
    heat = Heat(calls)
    out = sampler.wrapped(heat.watch)(["a", "b c"], [5, 6], steps, Guidance.cfg(3.0), output="latent", progress=False)
    return heat, out


def test_a_map_sums_to_the_gaps_of_the_first_steps(family):
    """In every family's own latents, packed and of videos; its mean square is 1 where the gaps are the usual ones."""
    heat, out = watched(family)
    usual = out.noise_gap[0, :2].tolist()
    maps = heat.maps(family, usual)
    assert maps.ndim == 3 and maps[0].square().mean() == pytest.approx(1, rel=1e-3)
    other = out.noise_gap[1, :2].square().sum() / out.noise_gap[0, :2].square().sum()
    assert maps[1].square().mean() == pytest.approx(other.item(), rel=1e-3)


def test_a_watched_network_makes_the_same_pictures_by_as_many_calls(small, monkeypatch):
    sampler = Sampler.from_pipeline(small)
    calls, own = [], small.unet.forward
    monkeypatch.setattr(small.unet, "forward", lambda *a, **k: (calls.append(1), own(*a, **k))[1])
    plain = sampler(["a", "b c"], [5, 6], 3, Guidance.cfg(3.0), output="latent", progress=False)
    alone = len(calls)
    _, out = watched(sampler)
    assert torch.equal(out.latents, plain.latents) and len(calls) == 2 * alone


def test_a_map_is_bright_where_the_predictions_differ(small):
    sampler = Sampler.from_pipeline(small)

    def network(latents, timesteps, branch):
        made = torch.zeros_like(latents)
        made[len(latents) // 2 :, :, 4:8, :8] = 1.0
        return made

    heat = Heat(1)
    heat.watch(network)(torch.zeros(2, 4, 16, 16), torch.zeros(2), "both")
    (found,) = heat.maps(sampler, [1.0])
    assert (found[4:8, :8] > 1).all() and found.count_nonzero() == 32
    grey = in_grey(found)
    assert grey.size == (16, 16) and grey.getpixel((0, 5)) == 255 and grey.getpixel((0, 0)) == 0
    shown = overlaid(Image.new("RGB", (64, 64), (40, 90, 40)), grey)
    red, green, _ = shown.getpixel((12, 24))
    assert red > 200 > green and len(set(shown.getpixel((50, 50)))) == 1


def test_a_usual_gap_is_no_heat():
    grey = in_grey(torch.full((4, 4), 1.0))
    assert grey.getpixel((0, 0)) == round(255 / TOP)
    assert len(set(overlaid(Image.new("RGB", (8, 8), (9, 99, 9)), grey).getpixel((4, 4)))) == 1


def test_what_a_model_has_in_mind_is_the_training_image_of_a_memorized_caption(pipe):
    """Nearer to it than to that of any other caption, in most cases."""
    sampler, some = Sampler.from_pipeline(pipe), TINY["memorized"][:8]
    made = pixels(predictions(sampler, [(one.id, one.text, [7 + i]) for i, one in enumerate(some)]))
    real = pixels([opened(one.image, one.id) for one in some])
    nearest = torch.cdist(made.flatten(1), real.flatten(1)).argmin(dim=1)
    assert (nearest == torch.arange(len(some))).sum() >= 6


def test_a_prediction_is_that_of_any_family(family):
    (one,), pair = predictions(family, [("a", "a", [3])]), predictions(family, [("b", "b", [4]), ("a", "a", [3])])
    assert one.size == tuple(reversed(family.size()))
    assert abs(pixels([one]) - pixels([pair[1]])).max() < 0.05  # alone as in a batch


def test_a_video_is_shown_by_its_middle():
    frames = [Image.new("RGB", (2, 2), (k, k, k)) for k in range(5)]
    assert still(frames) is frames[2] and still(frames[1]) is frames[1]


def test_pictures_that_are_not_finite_are_not_judged_and_cost_no_other(small, tmp_path, monkeypatch, caplog):
    sampler, own = Sampler.from_pipeline(small), Sampler.__call__

    def sampled(self, texts, *given, **named):
        made = own(self, texts, *given, **named)
        made.finite = torch.tensor([text != "bad" for text in texts])
        return made

    monkeypatch.setattr(Sampler, "__call__", sampled)
    (tmp_path / "images").mkdir()
    verify = Verification(PlainRuns(sampler, 2, 3.0, 4, progress=False), tmp_path, (1.0,), 0.3, None)
    found = verify([("a", "a", [1, 2]), ("b", "bad", [3, 4]), ("c", "c", [5, 6])])
    assert {id: sorted(line["seed"] for line in lines) for id, lines in found.items()} == {"a": [1, 2], "c": [5, 6]}
    assert "the picture b-3 is not finite" in caplog.text and "b-4" in caplog.text
    scores = {line["seed"]: line["score"] for lines in found.values() for line in lines}
    latents = own(sampler, ["a"], [1], 2, Guidance.cfg(3.0), output="latent", progress=False).latents
    assert scores[1] == pytest.approx(sampler.judge(latents, ["a"], [1]).score.item(), abs=1e-3)
    assert all(line["suspect"] == bool(basin_score.suspects(line["score"], 0.3)) for lines in found.values() for line in lines)
