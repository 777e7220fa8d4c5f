"""Guidance rules: kernels, eager twins and lockstep against the definition in float64."""

import pytest
import torch
from basinescape import At, Guidance, Sampler
from basinescape.kernels import definition, guide, step
from basinescape.kernels.dispatch import jit, tl
from basinescape.kernels.lockstep import Lockstep
from basinescape.kernels.rules import RULES, GuidanceRule, columns_of, options_of
from basinescape.kernels.tiles import Tiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernelruns import TOLERANCE
from rounding import assert_same_but_for_rounding
from ruleruns import COMBINING, check, follow, started, with_options
from smallguards import EVERY, NONE, guarded
from tiled import SMALL

pytestmark = pytest.mark.interpreter

QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@st.composite
def cases(draw):
    """uncond and cond (B, ...), near each other or not, perhaps far from zero on average; a weight each."""
    batch, shape = draw(st.integers(1, 3)), draw(st.sampled_from([(4, 8, 8), (3, 5, 7), (4, 12, 12)]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    uncond, noise = torch.randn((2, batch, *shape), generator=rng)
    uncond = uncond + draw(st.sampled_from([0.0, 0.5]))
    cond = uncond + draw(st.sampled_from([0.01, 0.3, 2.0])) * noise
    weight = draw(st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0, 7.5]), min_size=batch, max_size=batch))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    return uncond.to(dtype), cond.to(dtype), torch.tensor(weight)


@pytest.fixture(params=["kernel", "eager"])
def way(request):
    if request.param == "eager":
        request.getfixturevalue("eager")


@settings(max_examples=24, **QUIET)
@given(st.sampled_from(COMBINING), cases(), st.booleans())
def test_guide_is_the_definition(way, rule, case, tiled):
    """In one program a sample and in two launches over tiles; the gap is that of plain guidance."""
    uncond, cond, weight = case
    with pytest.MonkeyPatch.context() as patches:
        if tiled:
            patches.setattr(Tiles, "of", SMALL.of)
        guided, gap = guide(uncond, cond, weight, rule=rule)
        assert torch.equal(gap, guide(uncond, cond, weight)[1])
        check(guided, uncond, cond, weight, rule)


def diffusers_own(u, c, w):
    """rule -> (its options, what diffusers makes of one sample)."""
    from diffusers.guiders import adaptive_projected_guidance, magnitude_aware_guidance, tangential_classifier_free_guidance
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    flat = c.flatten(1), u.flatten(1)  # diffusers' MAMBO-G takes no images
    zero = cfg_zero_star_scale(*flat).view(-1, 1, 1, 1) * u
    return {
        "rescale": ({"phi": 0.4}, rescale_noise_cfg(u + w * (c - u), c, guidance_rescale=0.4)),
        "cfg-zero": ({}, zero + w * (c - zero)),
        "apg": ({"eta": 0.3, "norm_threshold": 4.0}, adaptive_projected_guidance.normalized_guidance(c, u, w, None, 0.3, 4.0)),
        "tcfg": ({}, tangential_classifier_free_guidance.normalized_guidance(c, u, w)),
        "mambo-g": ({"alpha": 2.0}, magnitude_aware_guidance.mambo_guidance(*flat, w, 2.0).view(u.shape)),
    }


@pytest.mark.parametrize("rule", [name for name in COMBINING if name != "norm-cap"])
@pytest.mark.parametrize("weight", [7.5, 3.0, -2.0])
def test_rules_are_diffusers_own(way, rule, weight):
    """Within twice the rounding that diffusers' own float32 has beside float64, and that of the sums."""
    uncond, noise = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    cond = uncond + 0.3 * noise
    options, exact = diffusers_own(uncond.double(), cond.double(), weight)[rule]
    rounding = (diffusers_own(uncond, cond, weight)[rule][1] - exact).abs().max() + 1e-6 * exact.abs().max()
    guided, _ = guide(uncond, cond, weight, rule=rule, **options)
    assert (guided - exact).abs().max() <= 4 * rounding


@pytest.mark.parametrize("rule", COMBINING)
def test_the_step_is_the_definition(way, rule):
    follow(rule, finds=rule != "tcfg")


@pytest.mark.parametrize(("rule", "finds"), [("apg", True), ("rescale", False)])
def test_tiles_are_the_definition(monkeypatch, rule, finds):
    monkeypatch.setattr(Tiles, "of", SMALL.of)
    follow(rule, finds, (4, 8, 9))


@pytest.mark.parametrize("rule", COMBINING)
def test_lockstep_has_the_bits_of_the_eager_step_and_a_sample_those_of_any_batch(eager, rule):
    for dtype in TOLERANCE:
        (state, table), (other, _), (lone, _) = started(3, dtype), started(3, dtype), started(1, dtype)
        with_options(table, rule)
        lone.start(state.latents.x[1:2], table)
        move, rng = Lockstep(other, table, rule=rule), torch.Generator().manual_seed(0)
        for _ in range(4):
            uncond, cond = torch.randn((2, 3, 4, 8, 8), generator=rng).to(dtype)
            step(uncond, cond, table, state, rule=rule)
            move(uncond, cond)
            step(uncond[1:2], cond[1:2], table, lone, rule=rule)
        assert torch.equal(state.latents.x, other.latents.x) and torch.equal(state.latents.x[1:2], lone.latents.x)


@pytest.mark.parametrize("rule", COMBINING)
def test_guidance_carries_its_rule(rule):
    guidance = Guidance.opposite(2.0, scale=7.5, until=At(650), rule=rule)
    assert guidance.rule == rule and dict(guidance.options) == options_of(rule, {})
    assert Guidance.from_dict(guidance.to_dict()) == guidance == eval(repr(guidance))


@pytest.mark.parametrize(("given", "says"), [({"rule": "other"}, "rule must be one of cfg"), ({"phi": 0.5}, "no option 'phi'")])
def test_a_rule_or_option_that_is_not_known_is_named(given, says):
    for make in (lambda: Guidance.cfg(7.5, **given), lambda: guide(torch.zeros(1, 4), torch.zeros(1, 4), 7.5, **given)):
        with pytest.raises(ValueError, match=says):
            make()


HALF = tl.constexpr(0.5) if tl else 0.5


@jit
def root(x, share=0.5):
    return share * tl.sqrt_rn(x)


@jit
def rooted(weight, u, d, uu, ud, dd, size, unused, other):
    return root(weight), weight + HALF


def test_a_rule_may_call_functions_and_read_constants_of_its_file(way, monkeypatch):
    monkeypatch.setitem(RULES, "rooted", GuidanceRule(rooted))
    uncond, cond = torch.randn((2, 2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    guided, _ = guide(uncond, cond, 16.0, rule="rooted")
    torch.testing.assert_close(guided, 2 * uncond + 16.5 * (cond - uncond))


SEEDS, PROMPTS = [3, 4], ["a frog", "a red cat"]


def sample(pipe, guidance, scheduler=None, **options):
    sampler = Sampler.from_pipeline(pipe, scheduler)
    return sampler(PROMPTS, SEEDS, 6, guidance, output="latent", progress=False, **options)


@pytest.mark.parametrize(
    ("rule", "scheduler"), [(rule, ("dpmsolver++", "euler-ancestral")[i % 2]) for i, rule in enumerate(COMBINING)]
)
def test_a_run_under_a_rule_is_its_definition_step_by_step(eager, pipe, scheduler, rule):
    """Composed with a delay: the same transitions and latents as a loop that guides by `definition` in place of the step."""
    guidance = Guidance.delayed(4.0, until=At(600), before=-1.0, rule=rule)
    found = sample(pipe, guidance, scheduler)
    before = found.transition_step.tolist()
    assert before[0] > 0 and before[0] == before[1]

    def stepwise():
        calls, columns = iter(range(6)), columns_of(options_of(rule, {}))

        def wrap(network):
            def predict(latents, timesteps, branch):
                assert branch == "both"
                uncond, cond = network(latents, timesteps, branch).chunk(2)
                weight = 4.0 if next(calls) >= before[0] else -1.0
                each = [definition.guided(u, c, weight, rule, columns) for u, c in zip(uncond, cond, strict=True)]
                return torch.cat([torch.stack(each).to(uncond)] * 2)

            return predict

        sampler = Sampler.from_pipeline(pipe, scheduler).wrapped(wrap)
        return sampler(PROMPTS, SEEDS, 6, Guidance.cfg(2.0), output="latent", progress=False).latents

    assert_same_but_for_rounding(found.latents, stepwise(), pipe, stepwise)


def test_rescale_is_the_option_guidance_rescale(eager, pipe):
    found = sample(pipe, Guidance.cfg(7.5, rule="rescale", phi=0.7))
    assert torch.equal(found.latents, sample(pipe, Guidance.cfg(7.5), guidance_rescale=0.7).latents)
    assert torch.equal(found.noise_gap[:, 0], sample(pipe, Guidance.cfg(7.5)).noise_gap[:, 0])
    with pytest.raises(ValueError, match="guidance_rescale is the rule 'rescale', and the guidance has the rule 'apg'"):
        sample(pipe, Guidance.cfg(7.5, rule="apg"), guidance_rescale=0.7)


@pytest.mark.parametrize("rule", ["rescale", "apg"])
def test_a_guard_keeps_the_rule(eager, pipe, rule):
    """Nobody flagged: the bits of plain guidance under the rule; all flagged: those of the cautious guidance."""
    plain, cautious = Guidance.cfg(7.5, rule=rule), Guidance.delayed(7.5, until=At(600), rule=rule)
    for threshold, expected in ((NONE, plain), (EVERY, cautious)):
        found = sample(pipe, guarded(cautious, threshold))
        again = torch.equal(found.attempts, torch.tensor([2, 2]))
        assert again == (threshold == EVERY)
        noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        drawn = [[torch.randn((1, 4, 16, 16), generator=rng) for _ in range(2)][again] for rng in noise]
        right = lambda expected=expected, noise=torch.cat(drawn): sample(pipe, expected, latents=noise).latents  # noqa: E731
        assert_same_but_for_rounding(found.latents, right(), pipe, right)


@pytest.mark.parametrize("rule", COMBINING)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_at_0_and_1_every_rule_is_one_prediction(way, rule, weight):
    uncond, cond = torch.randn((2, 2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    guided, _ = guide(uncond, cond, weight, rule=rule)
    expected, _ = guide(uncond, cond, weight)
    assert torch.equal(guided, expected)


ZEROS, ONES = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
DEGENERATE = {
    "both 0": (ZEROS, ZEROS),
    "cond 0": (ONES * 0.3, ZEROS),
    "uncond 0": (ZEROS, ONES * 0.3),
    "alike": (ONES * 0.3, ONES * 0.3),
    "constant": (ONES * 0.3, ONES * -1.7),
    "opposed": (ONES * 0.5, ONES * -0.5),
}


@pytest.mark.parametrize("rule", COMBINING)
@pytest.mark.parametrize("case", DEGENERATE)
def test_constant_predictions_are_guided_and_not_divided_by_nothing(way, rule, case):
    uncond, cond = DEGENERATE[case]
    weight = torch.tensor([7.5, -2.0])
    guided, _ = guide(uncond, cond, weight, rule=rule)
    assert guided.isfinite().all()
    check(guided, uncond, cond, weight, rule)
