"""Transition rules: the registry they are found in, and rules with a statistic of their own against a plain loop."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from basinescape import At, Escape, Fallen, FirstMinimum, Guard, Guidance, Sampler, Settled
from basinescape.bench.speed.standin import stand_in
from basinescape.guidance.guard import Attempt
from basinescape.guidance.transitions import RULES, Statistic, Transition, named, register, rule_named
from basinescape.guidance.transitions.base import MEASURED
from basinescape.hosts.guidance_widgets import UNTIL
from basinescape.sampling.attempt_table import AttemptTable
from basinescape.sampling.engine import Engine
from basinescape.sampling.samples import Sample
from mean_fallen import MeanFallen

FILE = Path(inspect.getfile(MeanFallen))
STEPS = 12
SHARE = 0.98
PROMPTS = [f"a picture of a {name}" for name in ("cat", "frog", "dog", "fish", "boat")]
OTHERS = [
    Guidance.cfg(7.5),
    Guidance.delayed(7.5, until=At(600)),
    Guidance.opposite(2.0, scale=7.5, until=FirstMinimum(latest=6)),
    Guidance.delayed(7.5, until=Fallen(0.9, latest=8)),
]
OWN = Guidance.delayed(7.5, until=MeanFallen(SHARE), before=1.5)


def mean_fallen(gaps, share):
    """The transition in a curve of gaps, from the definition, in float64; -1 for none."""
    for k in range(1, len(gaps)):
        if gaps[k] < share * sum(gaps[:k]) / k:
            return k
    return -1


def sampled(sampler, guidance, prompts=PROMPTS, seeds=range(5), steps=STEPS):
    return sampler(prompts, list(seeds), steps, guidance, output="latent", progress=False)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The rule is registered as it is imported here, also after a test that runs its file again."""
    monkeypatch.setitem(RULES, "MeanFallen", MeanFallen)


@pytest.fixture(scope="module")
def sampler(pipe):
    return Sampler.from_pipeline(pipe, "dpmsolver++")


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "unipc", "heun"])
def test_a_statistic_of_ones_own_is_that_of_a_plain_loop(pipe, scheduler):
    """Also by the scheduler's own step, and where only the first call of a step counts."""
    out = sampled(Sampler.from_pipeline(pipe, scheduler), OWN)
    curves = [gaps[~gaps.isnan()].double().tolist() for gaps in out.noise_gap]
    assert out.transition_step.tolist() == [mean_fallen(gaps, SHARE) for gaps in curves]
    assert (out.transition_step > 0).any()


def test_the_step_of_the_transition_has_the_weight_after_it(pipe):
    """A table of weights that changes where the rule left gives the same latents."""
    sampler = Sampler.from_pipeline(pipe, "euler")
    out = sampled(sampler, OWN)
    for i, at in enumerate(out.transition_step.tolist()):
        weights = tuple(7.5 if 0 <= at <= k else 1.5 for k in range(STEPS))
        plain = sampled(sampler, Guidance.cfg(1.0, shape=weights), PROMPTS[i : i + 1], [i])
        torch.testing.assert_close(out.latents[i : i + 1], plain.latents, rtol=1e-3, atol=1e-3)


def test_a_sample_is_what_it_is_alone(pipe):
    """Beside other guidance, other rules of one's own and other numbers of steps, in one batch of an engine."""
    sampler = stand_in(pipe, "dpmsolver++")
    kinds = [*((STEPS, one) for one in OTHERS), (STEPS, OWN), (9, OWN)]
    kinds += [(STEPS, Guidance.delayed(3.0, until=MeanFallen(0.99), before=1.5)), (7, Guidance.cfg(3.0))]
    device = torch.device("cpu")
    encoded = sampler.model.encode([f"cat {i}" for i in range(len(kinds))], 64, 64)
    network, shape = sampler.model.network(encoded), sampler.model.shape(64, 64)
    attempt_tables = [AttemptTable.make(sampler.solver(steps), guidance, device) for steps, guidance in kinds]
    for slots in (1, 3, len(kinds)):
        work = [Sample(i, one, shape, network, i, seed=i) for i, one in enumerate(attempt_tables)]
        with torch.inference_mode():
            found = {made.sample.key: made for made in Engine(sampler.runner.open_batch, slots, fixed=True).run(work)}
        for i, (steps, guidance) in enumerate(kinds):
            alone = sampled(sampler, guidance, [f"cat {i}"], [i], steps)
            assert torch.equal(found[i].latents, alone.latents[0]), guidance
            assert torch.equal(found[i].gaps.nan_to_num(-1), alone.noise_gap[0].nan_to_num(-1))
            assert found[i].transition == alone.transition_step[0]


@pytest.mark.parametrize("captured", [False, True])
def test_samples_of_different_statistics_share_a_batch_unless_its_steps_are_captured(sampler, captured):
    """A step that was captured computes the statistics of the rules that were there."""
    network = sampler.model.network(sampler.model.encode(["a cat"], 64, 64))
    single = SimpleNamespace(version=object() if captured else None, row_form=network.row_form)
    solver, others = sampler.solver(STEPS), (OWN, Guidance.delayed(7.5, until=MeanFallen(0.5)))
    tables = [AttemptTable.make(solver, one, torch.device("cpu")) for one in (*others, *OTHERS[:2])]
    own, other, plain, delayed = (Sample(0, table, (4, 16, 16), single, 0).form for table in tables)
    assert plain == delayed and (len({own, other, plain}) == 1) is not captured


def test_escape_and_the_sampler_leave_at_the_same_step(pipe):
    """Samples of one batch with rules of several kinds; the rule sees the gaps of each sample's own steps."""
    curves = torch.tensor([[5.0, 5.2, 5.1, 4.9, 3.0, 2.0], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    each = [OWN, Guidance.delayed(7.5, until=Fallen(0.5)), OWN]
    state = Escape(each, [float(t) for t in range(900, 300, -100)], batch=3)
    uncond = torch.zeros(3, 4, 2, 2)
    for k in range(6):
        cond = (curves[:, k] / 4)[:, None, None, None].expand_as(uncond)
        guided = state(uncond, cond.contiguous())
        expected = [mean_fallen(curves[0, : k + 1].tolist(), SHARE), 5 if k == 5 else -1, -1]
        assert state.transition_step.tolist() == expected
        weights = [7.5 if at >= 0 else one.before for at, one in zip(expected, each, strict=True)]
        torch.testing.assert_close(guided, cond * torch.tensor(weights)[:, None, None, None])


def test_an_attempt_of_a_guard_may_have_one(sampler):
    guard = Guard((Attempt(Guidance.cfg(7.5), -1e9, 1), Attempt(OWN, 1e9, 1)))
    out = sampled(sampler, guard)
    assert out.attempts.tolist() == [2] * 5
    assert out.transition_step.tolist() == [mean_fallen(gaps.double().tolist(), SHARE) for gaps in out.noise_gap]


def test_guidance_with_it_goes_through_json():
    data = json.loads(json.dumps(OWN.to_dict()))
    assert data["until"] == {"rule": "MeanFallen", "share": SHARE} and Guidance.from_dict(data) == OWN


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("680", {}, At(680)),
        ("auto", {"earliest": 3, "latest": None}, FirstMinimum(earliest=3)),
        ("FirstMinimum", {}, FirstMinimum()),
        ("fallen", {"latest": 4}, Fallen(latest=4)),
        ("mean-fallen", {"share": 0.5}, MeanFallen(0.5)),
    ],
)
def test_a_rule_is_found_by_its_name(text, given, expected):
    assert named(text, **given) == expected


def test_a_rule_is_found_in_a_file():
    found = rule_named(f"{FILE}:MeanFallen")
    assert found(0.5).to_dict() == MeanFallen(0.5).to_dict() and RULES["MeanFallen"] is found


@pytest.mark.parametrize(
    ("text", "given", "wrong"),
    [
        ("never", {}, "until must be a timestep, 'auto', 'fallen', 'settled'.* or FILE.py:NAME, got 'never'"),
        ("680", {"latest": 3}, "takes timestep, log_snr, not latest"),
        ("fallen", {"earliest": 3}, "until 'fallen' takes share, latest, not earliest"),
        ("settled", {}, "until 'settled' needs a calibration"),
        (f"{FILE}:Nothing", {}, "has no transition rule 'Nothing'"),
    ],
)
def test_what_is_no_rule_is_named(text, given, wrong):
    with pytest.raises(ValueError, match=wrong):
        named(text, **given)


def test_every_rule_of_the_registry_is_in_the_menu_or_says_that_it_is_not():
    """The node's menu is the registry's, as it was when the node was loaded."""
    offered = {rule for rule in RULES.values() if rule.label} - {MeanFallen, RULES["MeanFallen"]}
    assert offered == {At, FirstMinimum, Fallen} <= set(UNTIL.values()) and Settled.label is None


def test_a_rule_must_be_registered():
    class Never(Transition):
        pass

    with pytest.raises(ValueError, match=r"`transitions\.register` it first"):
        Guidance.delayed(7.5, until=Never())

    class Again(Transition):
        word = "auto"

    with pytest.raises(ValueError, match="Again has the name, word or label of FirstMinimum"):
        register(Again)


def test_what_a_rule_says_wrongly_is_named(sampler, monkeypatch):
    monkeypatch.setattr(MeanFallen, "leaves", lambda self, gaps, step: gaps)
    with pytest.raises(ValueError, match=r"MeanFallen.*must say of each of 5 samples whether it leaves, as bool"):
        sampled(sampler, OWN)
    monkeypatch.setattr(MeanFallen, "criteria", lambda self, levels: [MEASURED])
    with pytest.raises(ValueError, match=r"MeanFallen.* has 1 criteria for \d+ steps"):
        sampled(sampler, OWN)
    assert issubclass(MeanFallen, Statistic)
