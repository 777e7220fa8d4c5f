"""Guidance rules: kernels, eager twins and lockstep against the definition in float64."""

import math
from dataclasses import replace

import pytest
import torch
from basinescape import At, Guidance
from basinescape.kernels import definition, guide, step
from basinescape.kernels.dispatch import INTERPRETED
from basinescape.kernels.lockstep import Lockstep
from basinescape.kernels.rules import RULES, columns_of, options_of
from basinescape.kernels.state import State
from basinescape.kernels.table import Column
from basinescape.kernels.tiles import Tiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interleaving import SMALL, interleaved
from test_step import TOLERANCE, contents, table_of

COMBINING = [name for name, rule in RULES.items() if rule is not None]
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


def exact(uncond, cond, weight, rule):
    options = columns_of(options_of(rule, {}))
    together = zip(uncond, cond, weight.tolist(), strict=True)
    return torch.stack([definition.guided(u, c, w, rule, options) for u, c, w in together])


def check(found, uncond, cond, weight, rule):
    expected, room = exact(uncond, cond, weight, rule), 5 * TOLERANCE[uncond.dtype]
    torch.testing.assert_close(found.double(), expected, atol=room, rtol=room)


@pytest.fixture(params=["kernel", "eager"])
def way(request):
    if request.param == "eager":
        request.getfixturevalue("eager")


@pytest.mark.parametrize("rule", COMBINING)
@settings(max_examples=10, **QUIET)
@given(cases(), st.booleans())
def test_guide_is_the_definition(way, rule, case, tiled):
    """In one program a sample and in two launches over tiles; the gap is that of plain guidance."""
    uncond, cond, weight = case
    with pytest.MonkeyPatch.context() as patches:
        if tiled:
            patches.setattr(Tiles, "of", SMALL.of)
        guided, gap = guide(uncond, cond, weight, rule=rule)
        assert torch.equal(gap, guide(uncond, cond, weight)[1])
        check(guided, uncond, cond, weight, rule)


def test_rules_are_diffusers_own(way):
    """At the scale w, `rescale_noise_cfg` on plain guidance and the guider CFG-Zero*, each with its own rounding."""
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    uncond, noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    cond, weight = uncond + 0.3 * noise, torch.tensor([7.5, 3.0, -2.0])
    w = weight.view(-1, 1, 1, 1)
    guided, _ = guide(uncond, cond, weight, rule="rescale", phi=0.4)
    expected = rescale_noise_cfg(uncond + w * (cond - uncond), cond, guidance_rescale=0.4)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)
    guided, _ = guide(uncond, cond, weight, rule="cfg-zero")
    scaled = uncond * cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(guided, scaled + w * (cond - scaled), atol=1e-4, rtol=1e-4)


def started(batch, dtype=torch.float32):
    rng = torch.Generator().manual_seed(batch)
    table = table_of(rng, steps=4, multistep=True)
    table[:, [Column.BEFORE, Column.AFTER]] = torch.tensor([[-2.0, 7.5], [1.0, 3.0], [0.0, 7.5], [3.0, 0.0]])
    state = State.empty((batch, 4, 8, 8), 4, dtype, "cpu", True)
    return state.start(torch.randn((batch, 4, 8, 8), generator=rng).to(dtype), table), table


def with_options(table, rule):
    table[:, Column.FIRST_OPTION :] = torch.tensor(columns_of(options_of(rule, {})))


def follow(rule, finds, seed=0):
    """A run of three samples, step after step, against the definition."""
    (state, table), rng = started(3), torch.Generator().manual_seed(seed)
    with_options(table, rule)
    samples = [definition.Sample(x.clone(), (math.nan,) * 4, 0, 3) for x in state.latents.x]
    if not finds:
        table[:, Column.KEEP], table[:, Column.LIMIT] = -math.inf, torch.tensor([-math.inf, -math.inf, math.inf, math.inf])
    for _ in range(4):
        uncond, noise = torch.randn((2, 3, 4, 8, 8), generator=rng)
        cond = uncond + (torch.rand((3, 1, 1, 1), generator=rng) + 0.1) * noise
        step(uncond, cond, table, state, finds, rule)
        samples = [definition.step(s, u, c, table, rule) for s, u, c in zip(samples, uncond, cond, strict=True)]
        for i, sample in enumerate(samples):
            x = state.latents.x[i]
            torch.testing.assert_close(x.double(), sample.latents.double(), atol=1e-4, rtol=1e-4)
            samples[i] = replace(sample, latents=x.clone())
        assert state.transition.at.tolist() == [sample.transition for sample in samples]
    return state


@pytest.mark.parametrize("rule", COMBINING)
@pytest.mark.parametrize("finds", [True, False])
def test_the_step_is_the_definition(way, rule, finds):
    follow(rule, finds)


@pytest.mark.skipif(not INTERPRETED, reason="programs are interleaved in the interpreter")
@pytest.mark.parametrize("rule", COMBINING)
@pytest.mark.parametrize("finds", [True, False])
def test_tiles_combine_whether_or_not_they_meet(monkeypatch, rule, finds):
    monkeypatch.setattr(Tiles, "of", SMALL.of)
    after = []
    for resident in (0, 1000):
        monkeypatch.setattr(Tiles, "resident", lambda tiles, device, count=resident: count)
        with interleaved(1):
            after.append(contents(follow(rule, finds)))
    assert all(map(torch.equal, *after))


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
