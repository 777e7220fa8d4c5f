"""What a pipeline turns into after a sampler was made of it is what is sampled."""

import copy

import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.models import adapt
from basinescape.models.module_snapshot import Snapshot
from diffusers import EulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor
from rounding import assert_same_but_for_rounding

PROMPTS = ["a picture of a cat", "a picture of a frog signed by arno"]


def latents(sampler, **options):
    return sampler(PROMPTS, 3, 3, Guidance.cfg(4.0), output="latent", progress=False, **options).latents


def freeu(pipe):
    pipe.enable_freeu(s1=0.5, s2=0.2, b1=1.6, b2=1.8)


def hook(pipe):
    pipe.unet.mid_block.register_forward_hook(lambda module, given, result: 1.5 * result)


def pre_hook(pipe):
    pipe.unet.mid_block.register_forward_pre_hook(lambda module, given: (0.5 * given[0], *given[1:]))


def hook_on_a_half(pipe):
    """The batch has both halves wherever a hook looks."""

    def doubled(module, given, result):
        assert len(result) == 2 * len(PROMPTS)
        return torch.cat([result[: len(PROMPTS)], 2 * result[len(PROMPTS) :]])

    pipe.unet.conv_in.register_forward_hook(doubled)


class Louder(AttnProcessor):
    def __call__(self, *given, **named):
        return 3 * super().__call__(*given, **named)


def processor(pipe):
    pipe.unet.set_attn_processor(Louder())


def weights_in_place(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)


def weights_replaced(pipe):
    for parameter in pipe.unet.mid_block.parameters():
        parameter.data = 1.5 * parameter.data


def module_replaced(pipe):
    pipe.unet.conv_out = copy.deepcopy(pipe.unet.conv_out).requires_grad_(False)
    pipe.unet.conv_out.weight.mul_(1.5)


def text_weights(pipe):
    """Keys and values are computed before the first step."""
    for module in pipe.unet.modules():
        if hasattr(module, "to_v"):
            module.to_v.weight.data.mul_(2)


def network_replaced(pipe):
    pipe.unet = copy.deepcopy(pipe.unet)
    weights_in_place(pipe)


def scheduler_replaced(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")


def scheduler_configured(pipe):
    pipe.scheduler.register_to_config(prediction_type="v_prediction")


CHANGES = [
    freeu,
    hook,
    pre_hook,
    hook_on_a_half,
    processor,
    weights_in_place,
    weights_replaced,
    module_replaced,
    text_weights,
    network_replaced,
    scheduler_replaced,
    scheduler_configured,
]
WITHOUT_COPIES = [network_replaced, scheduler_replaced, scheduler_configured]


def assert_seen(sampler, pipe, change):
    """The sampler gives what a fresh one gives of the changed pipeline."""
    before = latents(sampler)
    change(pipe)
    fresh = latents(Sampler.from_pipeline(pipe))
    assert (fresh - before).abs().max() > 0.01  # the change is one
    assert_same_but_for_rounding(latents(sampler), fresh, pipe, lambda: latents(Sampler.from_pipeline(pipe)))
    return fresh


@pytest.mark.parametrize(
    ("change", "lean"),
    [(change, True) for change in CHANGES] + [(change, False) for change in WITHOUT_COPIES],
    ids=lambda value: getattr(value, "__name__", "lean" if value else "plain"),
)
def test_a_change_of_the_pipeline_is_seen(random_pipeline, change, lean):
    pipe = random_pipeline("sd", 8, "epsilon")
    sampler = Sampler.from_pipeline(pipe)
    sampler.model = adapt(pipe, lean=lean)
    assert_seen(sampler, pipe, change)


def test_weights_cast_layer_by_layer_are_cast_in_each_call(random_pipeline, caplog):
    pipe = random_pipeline("sd", 8, "epsilon")
    sampler = Sampler.from_pipeline(pipe)
    sampler.model = adapt(pipe, lean=True)
    before = latents(sampler)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    fresh = latents(Sampler.from_pipeline(pipe))
    assert not torch.equal(fresh, before)
    assert torch.equal(latents(sampler), fresh) and torch.equal(latents(sampler), fresh)
    assert ["come and go" in record.message for record in caplog.records] == [True]


@pytest.mark.slow
def test_an_adapter_is_seen_at_every_turn(random_pipeline):
    """LoRA loaded, scaled, switched off and on, merged and taken out again."""
    peft = pytest.importorskip("peft")
    pipe = random_pipeline("sd", 8, "epsilon")
    sampler = Sampler.from_pipeline(pipe)
    sampler.model = adapt(pipe, lean=True)
    plain = latents(sampler)
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    turns = [
        lambda pipe: pipe.unet.add_adapter(config, "x"),
        lambda pipe: pipe.set_adapters(["x"], [0.25]),
        lambda pipe: pipe.unet.disable_adapters(),
        lambda pipe: pipe.unet.enable_adapters(),
        lambda pipe: pipe.fuse_lora(["unet"], lora_scale=2.0),
        lambda pipe: (pipe.unfuse_lora(["unet"]), pipe.set_adapters(["x"], [0.25])),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    for turn in turns:
        last = assert_seen(sampler, pipe, turn)
    assert_same_but_for_rounding(last, plain, pipe, lambda: latents(Sampler.from_pipeline(pipe)))


@pytest.mark.parametrize("change", [freeu, module_replaced, text_weights, network_replaced], ids=lambda change: change.__name__)
def test_a_change_reaches_the_captured_step(random_pipeline, device, change):
    pipe = random_pipeline("sd", 8, "epsilon")
    there = copy.deepcopy(pipe).to("cuda")
    sampler = Sampler.from_pipeline(there, capture=True)
    latents(sampler)
    recorded = {id(session) for session in sampler.graphs._sessions.values()}
    for changed in (pipe, there):
        change(changed)
    expected = latents(Sampler.from_pipeline(pipe))
    assert_same_but_for_rounding(latents(sampler).cpu(), expected, pipe, lambda: latents(Sampler.from_pipeline(pipe)))
    assert all(session.graphs for session in sampler.graphs._sessions.values()) and sampler.graphs.failure is None
    again = {id(session) for session in sampler.graphs._sessions.values()}
    latents(sampler)
    assert again == {id(session) for session in sampler.graphs._sessions.values()}  # recorded once
    assert (recorded == again) == (change is text_weights)


def test_weights_packed_by_the_compiler_are_packed_again(random_pipeline, monkeypatch):
    """A network whose compiled form holds copies of the weights."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: copy.deepcopy(network))
    pipe = random_pipeline("sd", 8, "epsilon")
    sampler = Sampler.from_pipeline(pipe, compile=True)
    made = [latents(sampler), latents(sampler)]
    assert torch.equal(*made)
    assert_seen(sampler, pipe, weights_in_place)
    made = sampler.model._networks._made
    latents(sampler)
    assert sampler.model._networks._made is made


def test_a_scheduler_assigned_later_is_the_one_that_is_sampled_with(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    sampler = Sampler.from_pipeline(pipe)
    latents(sampler)
    sampler.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(latents(sampler), latents(Sampler.from_pipeline(pipe, "euler")))
    sampler.scheduler = "dpmsolver++"
    assert torch.equal(latents(sampler), latents(Sampler.from_pipeline(pipe, "dpmsolver++")))
    pipe.scheduler.register_to_config(prediction_type="v_prediction")  # whose configuration the chosen one has
    assert torch.equal(latents(sampler), latents(Sampler.from_pipeline(pipe, "dpmsolver++")))
    with pytest.raises(ValueError, match="scheduler"):
        sampler.scheduler = "nope"


def test_a_snapshot_sees_a_value_deep_in_a_module():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module[0].settings = {"x": [1, {"y"}]}
    snapshot = Snapshot(module)
    assert snapshot.holds()
    module[0].settings["x"][1].add("z")
    assert not snapshot.holds()
