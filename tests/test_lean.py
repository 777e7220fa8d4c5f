"""The UNet that computes nothing twice is the UNet."""

import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler
from basinescape.lean import Lean, fuse
from basinescape.models import Networks

METHODS = [
    Guidance.cfg(7.5),
    Guidance.delayed(7.5, until=At(500)),
    Guidance.opposite(2.0, scale=7.5, until=FirstMinimum()),
    Guidance.guard(Guidance.delayed(7.5, until=At(500)), 0.0, 2),
]
PROMPTS = ["a picture of a cat", "a picture of a frog signed by arno"]


def leaned(pipe):
    sampler = Sampler.from_pipeline(pipe, "dpmsolver++")
    sampler._networks = Networks(pipe.unet, compile=False, lean=True)
    return sampler


def latents(sampler, guidance, **options):
    return sampler(PROMPTS, 3, 6, guidance, output="latent", progress=False, **options).latents


@pytest.mark.parametrize("guidance", METHODS, ids=repr)
@pytest.mark.parametrize("kind", ["tiny", "sd", "sdxl"])
def test_it_samples_the_same(pipe, random_pipeline, kind, guidance):
    used = pipe if kind == "tiny" else random_pipeline(kind, 8, "epsilon")
    expected = latents(Sampler.from_pipeline(used, "dpmsolver++"), guidance)
    torch.testing.assert_close(latents(leaned(used), guidance), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "shared"), [("tiny", True), ("sd", True), ("sdxl", False)])
def test_layers_before_the_text_run_for_one_half(pipe, random_pipeline, kind, shared):
    """Not where the text also changes what the network is told of the time, as in SDXL."""
    used = pipe if kind == "tiny" else random_pipeline(kind, 8, "epsilon")
    sampler, seen = leaned(used), set()
    both = sampler._networks._lean.both
    attention = both.down_blocks[1].attentions[0].transformer_blocks[0]
    for name, module in (("first", both.down_blocks[0].resnets[0]), ("own", attention.attn1), ("text", attention.attn2)):
        convolution = module.conv1 if name == "first" else module.to_q
        convolution.register_forward_pre_hook(lambda _, given, name=name: seen.add((name, len(given[0]))))
    latents(sampler, METHODS[0])
    assert seen == {("first", 2 if shared else 4), ("own", 2 if shared else 4), ("text", 4)}


def test_the_pipeline_keeps_its_network_and_lends_its_weights(pipe):
    names = [name for name, _ in pipe.unet.named_modules()]
    lean = Lean(pipe.unet)
    own = {parameter.data_ptr() for parameter in pipe.unet.parameters()}
    assert {parameter.data_ptr() for twin in (lean.one, lean.both) for parameter in twin.parameters()} <= own
    assert [name for name, _ in pipe.unet.named_modules()] == names
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_the_products_of_self_attention_fused_are_the_same(pipe):
    sampler = leaned(pipe)
    expected = latents(sampler, METHODS[0])
    for twin in (sampler._networks._lean.one, sampler._networks._lean.both):
        fuse(twin)
        assert any(hasattr(module, "to_qkv") for module in twin.modules())
    torch.testing.assert_close(latents(sampler, METHODS[0]), expected, atol=1e-4, rtol=1e-4)


class Adapter(torch.nn.Module):
    """A layer that adds to another's result, as LoRA does."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.out_features = base, base.weight, base.out_features

    def forward(self, x):
        return self.base(x) + 0.5 * x.mean(dim=-1, keepdim=True)


def test_an_adapter_is_neither_fused_nor_lost(random_pipeline):
    used = random_pipeline("sd", 8, "epsilon")
    for name, module in list(used.unet.named_modules()):
        if name.endswith(("attn1", "attn2")):
            module.to_v = Adapter(module.to_v)
    sampler = leaned(used)
    fuse(sampler._networks._lean.both)
    assert not any(hasattr(module, "to_qkv") for module in sampler._networks._lean.both.modules())
    expected = latents(Sampler.from_pipeline(used, "dpmsolver++"), METHODS[0])
    torch.testing.assert_close(latents(sampler, METHODS[0]), expected, atol=1e-4, rtol=1e-4)


def custom_processor(unet):
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    width = unet.config.cross_attention_dim
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            hidden = module.to_q.in_features
            module.set_processor(CustomDiffusionAttnProcessor2_0(hidden_size=hidden, cross_attention_dim=width))


def own_forward(unet):
    forward = unet.forward
    unet.forward = lambda *arguments, **keywords: forward(*arguments, **keywords)


@pytest.mark.parametrize("change", [lambda unet: unet.fuse_qkv_projections(), custom_processor, own_forward])
def test_a_network_that_reads_the_text_in_its_own_way_keeps_it(random_pipeline, change):
    used = random_pipeline("sd", 8, "epsilon")
    change(used.unet)
    expected = latents(Sampler.from_pipeline(used, "dpmsolver++"), METHODS[1])
    torch.testing.assert_close(latents(leaned(used), METHODS[1]), expected, atol=1e-4, rtol=1e-4)


def test_a_method_that_changes_the_text_gets_the_text(pipe):
    widths = []

    def wrap(network):
        widths.append(network.inputs["both"]["encoder_hidden_states"].shape[-1])
        return network

    found = latents(leaned(pipe), METHODS[0], wrap=wrap)
    assert widths == [pipe.unet.config.cross_attention_dim]
    torch.testing.assert_close(found, latents(Sampler.from_pipeline(pipe, "dpmsolver++"), METHODS[0]), atol=1e-4, rtol=1e-4)


def test_the_compiler_takes_it_whole_and_keeps_halves_and_batches_apart(pipe, monkeypatch):
    """Two prompts' halves together are as many samples as four prompts with one prediction each."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, options, dynamic: compile(unet, fullgraph=True, backend="eager"))
    plain = Sampler.from_pipeline(pipe, "dpmsolver++")
    compiled = Sampler.from_pipeline(pipe, "dpmsolver++", compile=True)
    try:
        for prompts in (PROMPTS, PROMPTS + PROMPTS[::-1], PROMPTS):
            settings = {"steps": 4, "guidance": METHODS[1], "output": "latent", "progress": False}
            found, expected = compiled(prompts, 3, **settings), plain(prompts, 3, **settings)
            torch.testing.assert_close(found.latents, expected.latents, atol=1e-4, rtol=1e-4)
    finally:
        pipe.unet.to(memory_format=torch.contiguous_format)
