"""What else a transformer pipeline must do in our sampler: options, outputs, guards, files, devices, refusals."""

import copy
import json
from dataclasses import replace
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
from basinescape import At, Calibration, FirstMinimum, Guidance, Sampler
from basinescape.data.prompts import Job
from basinescape.models import adapt
from basinescape.models.fingerprint import differing, fingerprint
from basinescape.runs.jsonl_journal import read_lines
from bulkruns import make
from families import CASES
from PIL import Image
from rounding import assert_same_but_for_rounding
from safetensors.torch import load_file
from smallguards import guarded

PROMPTS, SEEDS, STEPS = ["a picture of a cat", "a frog"], [5, 6], 4
LATE = Guidance.delayed(4.0, until=FirstMinimum(latest=2))


def call(name, sampler, guidance=LATE, prompts=PROMPTS, seeds=SEEDS, **options):
    given = {"steps": STEPS, "output": "latent", "progress": False, **CASES[name].options, **options}
    return sampler(prompts, seeds, guidance=guidance, **given)


@pytest.mark.parametrize("name", CASES)
def test_a_samplers_own_options_hold_for_every_call_that_gives_no_others(pipes, name):
    plain, options = Sampler.from_pipeline(pipes(name)), CASES[name].options
    sampler = plain.using(**options)
    given = {"steps": STEPS, "guidance": LATE, "output": "latent", "progress": False}
    found = sampler(PROMPTS, SEEDS, **given).latents
    assert torch.equal(found, plain(PROMPTS, SEEDS, **given, **options).latents)
    assert sampler.solver(STEPS).timesteps.tolist() == plain.solver(STEPS, **options).timesteps.tolist()
    smaller = {"height": 16, "width": 16}
    if name != "pixart-binned":  # whose sizes are others
        assert torch.equal(
            sampler(PROMPTS, SEEDS, **given, **smaller).latents, plain(PROMPTS, SEEDS, **given, **options | smaller).latents
        )
    with pytest.raises(ValueError, match="nonsense: no option of"):
        plain.using(nonsense=1)
    with pytest.raises(ValueError, match=r"say seeds in place of seed$"):
        plain.using(seed=1)
    with pytest.raises(ValueError, match="height must be a"):
        plain.using(height=-1, width=16)


@pytest.mark.parametrize("name", CASES)
def test_a_fingerprint_knows_the_network_of_every_family(pipes, name):
    pipe = pipes(name)
    own = fingerprint(pipe)
    with torch.no_grad():
        for weight in Sampler.from_pipeline(pipe).model.net.parameters():
            weight.mul_(1 + 1e-3)
    assert differing(own, fingerprint(pipe)) == ["transformer"]


@pytest.mark.parametrize("name", ["sd3", "pixart", "flux", "qwen", "wan"])
def test_embeddings_stand_for_prompts_and_images_are_counted(pipes, name):
    pipe = pipes(name)
    sampler = Sampler.from_pipeline(pipe)

    def counted():
        return call(name, sampler, seeds=[1, 2, 3, 4], num_images_per_prompt=2, negative_prompt="fog").latents

    kept = {option: value for option, value in CASES[name].options.items() if option == "max_sequence_length"}
    if name in ("sd3", "pixart"):
        extra = {"prompt_2": None, "prompt_3": None} if name == "sd3" else {}
        cond, second, uncond, fourth = pipe.encode_prompt(PROMPTS, negative_prompt=["fog", "fog"], **extra, **kept)
        if name == "sd3":
            uncond, second = second, uncond
        other = "pooled_prompt_embeds" if name == "sd3" else "prompt_attention_mask"
        embeds = {other: second, f"negative_{other}": fourth}
    elif name == "wan":
        cond, uncond = pipe.encode_prompt(PROMPTS, ["fog"] * 2, **kept)
        embeds = {}
    else:
        (cond, second, *_), (uncond, fourth, *_) = (pipe.encode_prompt(text, **kept) for text in (PROMPTS, ["fog"] * 2))
        other = "pooled_prompt_embeds" if name == "flux" else "prompt_embeds_mask"
        embeds = {other: second, f"negative_{other}": fourth}
    embeds |= {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
    found = call(name, sampler, prompts=None, seeds=[1, 2, 3, 4], num_images_per_prompt=2, **embeds)
    assert len(found.latents) == 4
    assert_same_but_for_rounding(found.latents, counted(), pipe, counted)


@pytest.mark.parametrize("name", CASES)
def test_a_prompts_text_in_a_run_has_the_same_bits_beside_any_others(pipes, name):
    sampler = Sampler.from_pipeline(pipes(name)).using(**CASES[name].options)
    size, options = dict(zip(("height", "width"), sampler.size(), strict=True)), sampler.options

    def text(other):
        return sampler.model.encode_each(["a frog", other], **size, negative_prompt=[None, "fog"], **options).select([0]).inputs

    one, another = text("a cat"), text("an old clock tower by night")
    assert one.keys() == another.keys() and all(torch.equal(one[key], another[key]) for key in one)


def test_a_run_of_qwen_image_joins_texts_of_any_lengths(pipes, tmp_path):
    sampler = Sampler.from_pipeline(pipes("qwen")).using(**CASES["qwen"].options)
    prompts = ["a cat", "a red boat", "an old clock tower", "fog"]
    jobs = [Job(f"{i}", prompts[i // 3], i) for i in range(12)]  # the second 8 are of texts that are known and of new ones
    assert make(sampler, jobs, tmp_path, Guidance.cfg(4.0), format="latents", batch_size=3).counts["ok"] == 12

    def alone():
        made = [call("qwen", sampler, Guidance.cfg(4.0), [job.prompt], [job.seed], steps=2) for job in jobs]
        return torch.cat([one.latents for one in made])

    made = torch.stack([load_file(tmp_path / "images" / f"{job.id}.safetensors")["latents"] for job in jobs])
    assert_same_but_for_rounding(made, alone(), sampler.pipe, alone)


@pytest.mark.parametrize(("name", "shape"), [("flux", (16, 24)), ("wan", (5, 16, 32))])
def test_pictures_come_in_every_form(pipes, name, shape):
    sampler = Sampler.from_pipeline(pipes(name))
    made = {output: call(name, sampler, output=output) for output in ("pil", "np", "pt", "latent")}
    assert made["np"].images.shape == (2, *shape, 3)
    assert made["pt"].images.shape == (2, *shape[:-2], 3, *shape[-2:])
    assert torch.equal(made["latent"].images, made["np"].latents)
    for drawn, array in zip(made["pil"].images, made["np"].images, strict=True):
        assert isinstance(drawn, list) == (name == "wan")
        assert (
            np.abs(np.array([np.asarray(x) for x in drawn] if name == "wan" else drawn) / 255 - array).max() <= 0.5 / 255 + 1e-6
        )


@pytest.mark.parametrize(
    ("name", "options"), [("flux", {"sigmas": [1.0, 0.8, 0.3]}), ("sd3-shifted", {"mu": 0.9}), ("sd3", {"sigmas": [0.9, 0.2]})]
)
def test_sigmas_and_mu_reach_the_scheduler_as_in_the_stock_pipeline(pipes, name, options):
    pipe = pipes(name)
    steps = len(options.get("sigmas", range(STEPS)))

    def stock():
        return CASES[name].stock(pipe, PROMPTS, SEEDS, steps, 4.0, ["", ""], output="latent", **options)

    found = call(name, Sampler.from_pipeline(pipe), Guidance.cfg(4.0), **options)
    assert_same_but_for_rounding(found.latents, stock(), pipe, stock)
    plain = call(name, Sampler.from_pipeline(pipe), Guidance.cfg(4.0), steps=steps)
    assert (found.timesteps - plain.timesteps).abs().max() > 1


@pytest.mark.parametrize("name", ["sd3-shifted", "flux", "qwen"])
def test_a_larger_picture_has_other_noise_levels(pipes, name):
    sampler = Sampler.from_pipeline(pipes(name))
    small, large = sampler.solver(STEPS, 16, 16).levels, sampler.solver(STEPS, 64, 64).levels
    assert all(a < b for a, b in zip(small[1:-1], large[1:-1], strict=True))
    limit = (small[1] + large[1]) / 2  # between the two: the transition is one step later for the larger picture
    guidance = Guidance.delayed(4.0, until=At(limit))
    found = [call(name, sampler, guidance, height=side, width=side).transition_step.tolist() for side in (16, 64)]
    assert found == [[1, 1], [2, 2]]


@pytest.mark.parametrize("name", ["flux", "qwen", "wan"])
def test_restarts_rules_and_guards(pipes, name):
    sampler = Sampler.from_pipeline(pipes(name), "flow-euler" if name == "wan" else None)
    if name == "wan":  # the shift goes along
        assert sampler.scheduler.shift == 3.0
    levels = sampler.solver(STEPS, CASES[name].options["height"], CASES[name].options["width"]).levels
    plain = call(name, sampler).latents
    for changed in (
        replace(LATE, restart=(levels[2], levels[1], 1)),
        replace(LATE, rule="apg", options={"eta": 0.5, "norm_threshold": 0.1}),
    ):
        assert (call(name, sampler, changed).latents - plain).abs().max() > 1e-3
    guard = guarded(LATE)
    out = call(name, sampler, guard)
    assert out.attempts.tolist() == [2, 2] and out.finite.all()
    alone = call(name, sampler, guard, PROMPTS[1:], SEEDS[1:])
    again = lambda: call(name, sampler, guard).latents[1:]  # noqa: E731
    assert_same_but_for_rounding(alone.latents, out.latents[1:], sampler.pipe, again)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_saved_pipeline_is_loaded_calibrated_and_makes_files(pipes, name, tmp_path):
    pipe = pipes(name)
    if name == "sd3":
        pipe.text_encoder_3 = pipe.tokenizer_3 = None
    pipe.save_pretrained(tmp_path / "model")
    sampler = Sampler.from_pretrained(tmp_path / "model", device="cpu")
    assert torch.equal(call(name, sampler).latents, call(name, Sampler.from_pipeline(pipe)).latents)
    if name == "wan":
        sampler.model.frames = 5
    guidance = Guidance.cfg(3.0)
    if name == "sd3":
        calibration = Calibration.measure(sampler, PROMPTS, steps=STEPS, scale=3.0, progress=False)
        guidance = Guidance.guard(3.0, calibration, threshold=0.1, later=0.1, rate=0.8)
    jobs = [Job("a", "a cat", 1), Job("b", "a frog", 2, "fog")]
    make(sampler, jobs, tmp_path / "out", guidance, steps=STEPS, height=16, width=32)
    lines = list(read_lines(tmp_path / "out" / "manifest.jsonl"))
    assert [line["status"] for line in lines] == ["ok", "ok"] and all(("score" in line) == (name == "sd3") for line in lines)
    with Image.open(tmp_path / "out" / "images" / "a.png") as image:
        assert image.size == (32, 16) and getattr(image, "n_frames", 1) == (5 if name == "wan" else 1)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["scheduler"]["class"] == type(pipe.scheduler).__name__


@pytest.mark.parametrize(("name", "layers"), [("pixart", 2), ("wan", 2), ("flux", None), ("qwen", None)])
def test_the_text_is_read_once_a_run_where_it_stays_the_same(pipes, name, layers):
    pipe = pipes(name)
    sampler = Sampler.from_pipeline(pipe)
    for guidance in (LATE, Guidance.cfg(3.0)):

        def plain(guidance=guidance):
            return call(name, Sampler.from_pipeline(pipe), guidance).latents

        sampler.model = adapt(pipe, lean=True)
        assert_same_but_for_rounding(call(name, sampler, guidance).latents, plain(), pipe, plain)
    made = sampler.model._networks._made
    assert (made.lean is not None) == (layers is not None)
    if layers:
        width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
        encoded = sampler.model.encode(PROMPTS, 16, 32)
        assert sampler.model.network(encoded).inputs["cond"]["encoder_hidden_states"].shape[-1] == layers * 2 * width
    call(name, sampler)
    assert sampler.model._networks._made is made  # and not made again


def test_the_compiler_takes_a_network_of_videos_whole_and_once(pipes, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, options, dynamic: compile(net, fullgraph=True, backend="eager"))
    pipe = pipes("wan")
    sampler = Sampler.from_pipeline(pipe, compile=True)

    def plain():
        return call("wan", Sampler.from_pipeline(pipe), Guidance.cfg(4.0)).latents

    assert_same_but_for_rounding(call("wan", sampler, Guidance.cfg(4.0)).latents, plain(), pipe, plain)
    made = sampler.model._networks._made
    call("wan", sampler, Guidance.cfg(4.0))
    assert sampler.model._networks._made is made


def test_a_pipeline_offloaded_part_by_part_runs_on_its_execution_device(pipes, device):
    pipe = pipes("qwen")
    plain = copy.deepcopy(pipe)

    def expected():
        with patch("basinescape.kernels.dispatch.INTERPRETED", False):
            return call("qwen", Sampler.from_pipeline(plain), steps=2, output="pt").images

    pipe.enable_model_cpu_offload(device="cuda")
    found = call("qwen", Sampler.from_pipeline(pipe), steps=2, output="pt")
    assert found.latents.device.type == "cuda" and pipe.transformer.device.type == "cpu"
    assert_same_but_for_rounding(found.images.cpu(), expected(), plain, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["pixart", "qwen", "wan"])
def test_captured_on_a_device_the_samples_are_the_same(pipes, name, device):
    pipe = pipes(name)
    plain, there = Sampler.from_pipeline(pipe), copy.deepcopy(pipe).to("cuda")
    scheduler = "flow-euler" if name == "wan" else None
    plain.scheduler = scheduler
    sampler = Sampler.from_pipeline(there, scheduler, capture=True)

    def expected():
        with patch("basinescape.kernels.dispatch.INTERPRETED", False):
            return call(name, plain, prompts=prompts).latents

    for prompts in (PROMPTS, PROMPTS[::-1]):
        found = call(name, sampler, prompts=prompts).latents
        assert_same_but_for_rounding(found.cpu(), expected(), pipe, expected)
    sessions = sampler.graphs._sessions.values()
    assert sampler.graphs.failure is None and [list(session.graphs) for session in sessions] == [["uncond", "both"]]


def test_a_network_in_half_precision_keeps_the_latents_of_a_video_in_float32(pipes):
    pipe = pipes("wan").to(torch.bfloat16)
    sampler = Sampler.from_pipeline(pipe)
    out = call("wan", sampler)
    assert out.latents.dtype == torch.float32 and out.finite.all() and sampler.model.half
    with sampler.in_float32():
        full = call("wan", sampler).latents
    assert 0 < (full - out.latents).abs().max() < 0.2 * full.std()


def test_lora_is_scaled_as_in_the_stock_pipeline(pipes):
    peft = pytest.importorskip("peft")
    pipe = pipes("flux")
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k"])
    pipe.transformer.add_adapter(config, "x")
    options = {"joint_attention_kwargs": {"scale": 0.5}}

    def stock():
        return CASES["flux"].stock(pipe, PROMPTS, SEEDS, STEPS, 4.0, ["", ""], output="latent", **options)

    found = call("flux", Sampler.from_pipeline(pipe), Guidance.cfg(4.0), **options).latents
    assert_same_but_for_rounding(found, stock(), pipe, stock)
    assert (call("flux", Sampler.from_pipeline(pipe), Guidance.cfg(4.0)).latents - found).abs().max() > 1e-4


def test_what_a_prompt_loses_is_what_the_larger_text_encoder_does_not_read(pipes):
    long = "a " * 60
    for name, limit in (("sd3", 30), ("flux", 30), ("qwen", 60)):
        sampler = Sampler.from_pipeline(pipes(name))
        cut = call(name, sampler, Guidance.cfg(4.0), [long, "a cat"], max_sequence_length=limit, steps=2).truncated
        assert cut[1] == "" and set(cut[0]) <= {"a", " "} and 10 < len(cut[0]) < 120


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("sd3", {"height": 18}, "height must be a multiple of 4"),
        ("sd3", {"width": 80}, "width must be at most 64"),
        ("sd3", {"skip_guidance_layers": [1]}, "skip_guidance_layers"),
        ("sd3", {"mu": 0.5}, "mu is 0.5"),
        ("sd3", {"prompt_3": ["a"]}, "prompt_3 has 1 entries"),
        ("sd3", {"clip_skip": 5}, "clip_skip must be"),
        ("pixart", {"height": 18}, "height must be a multiple of 4"),
        ("pixart", {"use_resolution_binning": True}, "use_resolution_binning"),
        ("flux", {"true_cfg_scale": 3.0}, "true_cfg_scale"),
        ("flux", {"guidance_scale": "x"}, "guidance_scale must be"),
        ("flux", {"latents": torch.zeros(2, 4, 8, 12)}, "latents must have the shape"),
        ("flux", {"latents": [0.0]}, "latents must have the shape .*, got a list, no tensor"),
        ("qwen", {"max_sequence_length": 2000}, "max_sequence_length"),
        ("qwen", {"max_sequence_length": -1}, "max_sequence_length must be a whole number of at least 1"),
        ("wan", {"max_sequence_length": "40"}, "max_sequence_length must be a whole number of at least 1"),
        ("wan", {"callback_on_step_end": 3}, "callback_on_step_end must be a function"),
        ("wan", {"guidance": Guidance.cfg(4.0).to_dict()}, r"guidance must be a Guidance, such as .*from_dict\(...\); got \{"),
        ("qwen", {"negative_prompt_embeds": torch.zeros(2, 3, 8)}, "must be alike"),
        ("wan", {"num_frames": 4}, "num_frames must be 1 more than a multiple of 2"),
        ("wan", {"clip_skip": 1}, "clip_skip: no option of WanPipeline"),
    ],
)
def test_bad_options_are_refused_before_any_work(pipes, name, options, says):
    pipe = pipes(name)
    pipe.transformer.forward = None  # not to be called
    with pytest.raises(ValueError, match=says) as error:
        call(name, Sampler.from_pipeline(pipe), **{"guidance": LATE} | options)
    assert "\n" not in str(error.value)


def test_pipelines_that_cannot_be_sampled_from_are_refused(pipes):
    wan = pipes("wan")
    wan.register_to_config(boundary_ratio=0.9)
    cached = pipes("flux")
    cached.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    inpainting = pipes("sd3")
    inpainting.transformer.register_to_config(in_channels=9)
    other = diffusers.DDPMPipeline(unet=torch.nn.Identity(), scheduler=diffusers.DDPMScheduler())
    cases = (wan, "Wan 2.2"), (cached, "disable_cache"), (inpainting, "text-to-image"), (other, "QwenImagePipeline")
    for pipe, says in cases:
        with pytest.raises(ValueError, match=says):
            Sampler.from_pipeline(pipe)
