"""The second small pipeline that ships: Stable Diffusion 3's kind, and its scenario."""

import pytest
import torch
from basinescape import Calibration, Guidance, Sampler
from basinescape.bench.evaluation.measure import Measure
from basinescape.bench.methods import chosen, suitable, update
from basinescape.bench.scenario import PRESETS, prompts
from rounding import assert_same_but_for_rounding

pytestmark = pytest.mark.shipped
FLOW = PRESETS["flow"]


@pytest.fixture(scope="module")
def sampler():
    return Sampler.from_pretrained("flow", "cpu", "float32").using(**FLOW.options)


def test_its_scenario_has_captions_training_images_and_a_calibration_of_its_own(sampler, caplog):
    groups = prompts(FLOW)
    memorized, general = groups["memorized"], groups["general"]
    assert len(memorized) == 36 and len(general) == 100
    assert all(prompt.image.is_file() and prompt.concept in prompt.text for prompt in memorized)
    assert len(list(FLOW.folder.glob("*.png"))) == 32  # some of them share a caption
    assert not {prompt.text for prompt in memorized} & {prompt.text for prompt in general}
    calibration = Calibration.load("flow")
    assert calibration.fitted(sampler, FLOW.steps) is calibration and not caplog.messages
    assert calibration.scale == FLOW.scale


def test_its_images_are_the_stock_pipelines(sampler):
    texts, seeds = [prompt.text for prompt in prompts(FLOW)["general"][:2]], [3, 4]

    def stock():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"num_inference_steps": 4, "guidance_scale": FLOW.scale, "generator": generators, "output_type": "latent"}
        return sampler.pipe(texts, **settings, **FLOW.options).images

    found = sampler(texts, seeds, 4, Guidance.cfg(FLOW.scale), output="latent", progress=False).latents
    assert_same_but_for_rounding(found, stock(), sampler.pipe, stock)


def test_it_copies_under_plain_guidance_and_the_guard_lets_no_copy_through_unmarked(sampler):
    groups = prompts(FLOW)
    measure = Measure(FLOW, groups)
    found = groups["memorized"][6:8]  # of scenes that lay 600 and 1,000 times in the training set
    texts, seeds = [prompt.text for prompt in found], [11, 12]

    def made(guidance):
        out = sampler(texts, seeds, FLOW.steps, guidance, progress=False)
        return out, [row["memorized"] for row in measure(out.images, found)]

    assert made(Guidance.cfg(FLOW.scale))[1] == [True, True]
    out, copies = made(Guidance.guard(FLOW.scale, Calibration.load("flow")))
    assert not any(copy and not suspect for copy, suspect in zip(copies, out.suspect, strict=True))
    assert (out.attempts > 1).all()


def test_methods_that_do_not_suit_are_left_out_or_refused_by_name_before_any_work(sampler, caplog):
    found = suitable(chosen(FLOW, ["all"]), sampler, FLOW.how[0], ["all"])
    assert {"cfg", "guard", "embedding", "guard-calibrated"} < found.keys() and not {"padding", "attention"} & found.keys()
    assert caplog.messages == [
        f"left out is the method {name}: it masks the cross-attention of a UNet, and a StableDiffusion3Pipeline has none"
        for name in ("attention", "padding")
    ]
    with pytest.raises(ValueError, match="method 'padding': it masks the cross-attention of a UNet"):
        suitable(chosen(FLOW, ["cfg", "padding"]), sampler, FLOW.how[0], ["cfg", "padding"])


def test_a_method_for_noise_predictions_is_refused(sampler):
    with pytest.raises(ValueError, match="update-norm needs a network that predicts epsilon or v_prediction, got 'a flow'"):
        update.alphas(sampler, 4)
