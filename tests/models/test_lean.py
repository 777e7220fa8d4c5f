"""The UNet that computes nothing twice is the UNet."""

import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler
from basinescape.models import adapt
from basinescape.models.lean import LeanUNet, fuse
from rounding import assert_same_but_for_rounding
from smallguards import guarded

METHODS = [
    Guidance.cfg(7.5),
    Guidance.delayed(7.5, until=At(500)),
    Guidance.opposite(2.0, scale=7.5, until=FirstMinimum()),
    guarded(Guidance.delayed(7.5, until=At(500))),
]
PROMPTS = ["a picture of a cat", "a picture of a frog signed by arno"]


def leaned(pipe):
    sampler = Sampler.from_pipeline(pipe, "dpmsolver++")
    sampler.model = adapt(pipe, lean=True)
    return sampler


def lean_of(sampler):
    """What the sampler's network was made into, None where nothing was."""
    return sampler.model._networks._now(sampler.pipe.unet).lean


def latents(sampler, guidance, **options):
    return sampler(PROMPTS, 3, 6, guidance, output="latent", progress=False, **options).latents


def assert_plain(found, pipe, guidance):
    """found: latents, which must be those of the pipeline's own network."""

    def sample():
        return latents(Sampler.from_pipeline(pipe, "dpmsolver++"), guidance)

    assert_same_but_for_rounding(found, sample(), pipe, sample)


@pytest.mark.parametrize("guidance", METHODS, ids=repr)
@pytest.mark.parametrize("kind", ["tiny", "sd", "sdxl"])
def test_it_samples_the_same(pipe, random_pipeline, kind, guidance):
    used = pipe if kind == "tiny" else random_pipeline(kind, 8, "epsilon")
    assert_plain(latents(leaned(used), guidance), used, guidance)


@pytest.mark.parametrize(("kind", "shared"), [("tiny", True), ("sd", True), ("sdxl", False)])
def test_layers_before_the_text_run_for_one_half(pipe, random_pipeline, kind, shared):
    """Not where the text also changes what the network is told of the time, as in SDXL."""
    used = pipe if kind == "tiny" else random_pipeline(kind, 8, "epsilon")
    sampler, seen = leaned(used), set()
    both = lean_of(sampler).both
    attention = both.down_blocks[1].attentions[0].transformer_blocks[0]
    for name, module in (("first", both.down_blocks[0].resnets[0]), ("own", attention.attn1), ("text", attention.attn2)):
        convolution = module.conv1 if name == "first" else module.to_q
        convolution.register_forward_pre_hook(lambda _, given, name=name: seen.add((name, len(given[0]))))
    latents(sampler, METHODS[0])
    assert seen == {("first", 2 if shared else 4), ("own", 2 if shared else 4), ("text", 4)}


def test_the_pipeline_keeps_its_network_and_lends_its_weights(pipe):
    names = [name for name, _ in pipe.unet.named_modules()]
    lean = LeanUNet(pipe.unet)
    own = {parameter.data_ptr() for parameter in pipe.unet.parameters()}
    assert {parameter.data_ptr() for twin in (lean.one, lean.both) for parameter in twin.parameters()} <= own
    assert [name for name, _ in pipe.unet.named_modules()] == names
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_the_products_of_self_attention_fused_are_the_same(pipe):
    sampler = leaned(pipe)
    for twin in (lean_of(sampler).one, lean_of(sampler).both):
        assert fuse(twin) and any(hasattr(module, "to_qkv") for module in twin.modules())
    assert_plain(latents(sampler, METHODS[0]), pipe, METHODS[0])


def test_products_fused_on_a_gpu_are_those_of_the_weights_as_they_are(random_pipeline, device):
    used = random_pipeline("sd", 8, "epsilon").to("cuda")
    lean = LeanUNet(used.unet)
    fused = [module for module in lean.one.modules() if hasattr(module, "to_qkv")]

    def current():
        parts = [torch.cat([part.weight for part in (module.to_q, module.to_k, module.to_v)]) for module in fused]
        return [torch.equal(module.to_qkv.weight.cpu(), joined.cpu()) for module, joined in zip(fused, parts, strict=True)]

    assert fused and all(current())
    for module in used.unet.modules():
        if hasattr(module, "to_v"):
            module.to_v.weight.data.mul_(2)
    assert not any(current())
    lean.refresh()
    assert all(current())


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
    assert not fuse(lean_of(sampler).both)
    assert not any(hasattr(module, "to_qkv") for module in lean_of(sampler).both.modules())
    assert_plain(latents(sampler, METHODS[0]), used, METHODS[0])


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


@pytest.mark.parametrize(
    ("change", "lean"), [(lambda unet: unet.fuse_qkv_projections(), True), (custom_processor, False), (own_forward, False)]
)
def test_a_network_that_reads_the_text_in_its_own_way_keeps_it(random_pipeline, change, lean):
    used = random_pipeline("sd", 8, "epsilon")
    change(used.unet)
    sampler = leaned(used)
    assert (lean_of(sampler) is not None) == lean
    assert_plain(latents(sampler, METHODS[1]), used, METHODS[1])


def test_a_method_that_changes_the_text_gets_the_text(pipe):
    widths = []

    def wrap(network):
        widths.append(network.inputs["both"]["encoder_hidden_states"].shape[-1])
        return network

    found = latents(leaned(pipe).wrapped(wrap), METHODS[0])
    assert widths == [pipe.unet.config.cross_attention_dim]
    assert_plain(found, pipe, METHODS[0])


def test_the_compiler_takes_it_whole_and_keeps_halves_and_batches_apart(pipe, monkeypatch):
    """Two prompts' halves together are as many samples as four prompts with one prediction each."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, options, dynamic: compile(unet, fullgraph=True, backend="eager"))
    plain = Sampler.from_pipeline(pipe, "dpmsolver++")
    compiled = Sampler.from_pipeline(pipe, "dpmsolver++", compile=True)
    settings = {"steps": 4, "guidance": METHODS[1], "output": "latent", "progress": False}
    try:
        for prompts in (PROMPTS, PROMPTS + PROMPTS[::-1], PROMPTS):

            def sample(prompts=prompts):
                return plain(prompts, 3, **settings).latents

            assert_same_but_for_rounding(compiled(prompts, 3, **settings).latents, sample(), pipe, sample)
    finally:
        pipe.unet.to(memory_format=torch.contiguous_format)
