"""The guard on the pipeline that ships: who begins again, who is left alone, and what it says of them."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from basinescape import At, Calibration, FirstMinimum, Guidance, Rung, Sampler
from rounding import assert_same_but_for_rounding

STEPS, SCALE = 8, 7.5
PROMPTS = [
    "a picture of a cat signed by arno",
    "a picture of a frog",
    "a picture of a fish signed by dirk",
    "a picture of a dog",
]
SEEDS = [3, 1, 2, 4]
PLAIN = Guidance.cfg(SCALE)
RUNGS = [
    Guidance.delayed(SCALE, until=At(700)),
    Guidance.opposite(1.0, scale=SCALE, until=FirstMinimum(latest=4)),
    Guidance.delayed(SCALE, until=At(500), restart=(300, 500, 1)),
]
NEVER = -math.inf  # a verdict that no attempt passes: scores are above 0


@pytest.fixture(scope="module")
def pipe(small):
    return small


def sample(pipe, guidance, prompts=PROMPTS, seeds=SEEDS, scheduler="dpmsolver++", **options):
    sampler = Sampler.from_pipeline(pipe, scheduler)
    return sampler(prompts, seeds, STEPS, guidance, output="latent", progress=False, **options)


@pytest.fixture(scope="module")
def computed(pipe):
    """Which steps of a guidance have a noise gap."""
    return {g: sample(pipe, g, PROMPTS[:1], SEEDS[:1]).noise_gap[0].isfinite().tolist() for g in (PLAIN, *RUNGS)}


@pytest.fixture
def ladder(computed):
    """A guard whose attempts pass their first look up to `early`, and their last up to `verdicts`, in raw gaps."""

    def make(early, verdicts, rungs=RUNGS, steps=2):
        gaps = [tuple(map(float, computed[guidance])) for guidance in (PLAIN, *rungs)]
        together = zip((PLAIN, *rungs), gaps, early, verdicts, strict=True)
        return Guidance.ladder([Rung(guidance, gap, steps, e, steps, 1, v) for guidance, gap, e, v in together])

    return make


def first(gaps):
    """The mean of the first two gaps of each sample; their geometric mean, over the third gap, times the last."""
    known = [gap[gap.isfinite()] for gap in gaps]
    means = torch.stack([gap[:2].mean() for gap in known])
    return means, torch.stack([(gap[0] * gap[1]).sqrt() / gap[2] * gap[-1] for gap in known])


def between(values, k):
    """A threshold that the k largest pass."""
    ordered = values.sort(descending=True).values
    return ordered[k - 1 : k + 1].mean().item()


@pytest.mark.parametrize(("scheduler", "flagged"), [("euler", 1), ("dpmsolver++", 2), ("ddim", 4)])
def test_the_flagged_begin_again_and_the_others_keep_their_bits(pipe, ladder, scheduler, flagged):
    """By their first gaps or at the end; the attempt is that of the next noise of the sample's own, under the next rung."""
    plain = sample(pipe, PLAIN, scheduler=scheduler)
    means, score = first(plain.noise_gap)
    for early, verdict in ((between(means, flagged) if flagged < 4 else 0.0, math.inf), (math.inf, between(score, 1))):
        guard = ladder((early, math.inf), (verdict, math.inf), RUNGS[:1])
        out = sample(pipe, guard, scheduler=scheduler)
        again = means > early if early < math.inf else score > verdict
        assert torch.equal(out.attempts, 1 + again.long()) and not out.suspect.any()
        assert torch.equal(out.latents[~again], plain.latents[~again])
        assert torch.equal(out.noise_gap[~again], plain.noise_gap[~again])
        where = again.nonzero()[:, 0].tolist()
        prompts, noise = [PROMPTS[i] for i in where], torch.cat([second(SEEDS[i]) for i in where])

        def expected(prompts=prompts, noise=noise):
            return sample(pipe, RUNGS[0], prompts, [0] * len(prompts), scheduler, latents=noise).latents

        assert_same_but_for_rounding(out.latents[where], expected(), pipe, expected)


def second(seed):
    """The second noise of a sample."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((1, 4, 16, 16), generator=generator) for _ in range(2)][1]


def test_who_never_passes_climbs_to_the_end_and_is_suspect(pipe, ladder):
    out = sample(pipe, ladder((math.inf,) * 4, (NEVER,) * 4))
    assert out.attempts.tolist() == [4] * 4 and out.suspect.all()
    last = ladder((0.0,) * 3 + (math.inf,), (math.inf,) * 4)  # each attempt but the last is given up at its first look
    given_up = sample(pipe, last)
    assert given_up.attempts.tolist() == [4] * 4 and not given_up.suspect.any()
    _, score = first(out.noise_gap)
    assert torch.allclose(out.score, score, rtol=1e-4)
    assert out.latents.isfinite().all() and (out.transition_step > 0).all()


def test_nobody_flagged_is_plain_guidance(pipe, ladder):
    out = sample(pipe, ladder((math.inf,) * 4, (math.inf,) * 4), scheduler="ddim")
    assert out.attempts.tolist() == [1] * 4 and torch.equal(out.latents, sample(pipe, PLAIN, scheduler="ddim").latents)


@pytest.fixture
def mixed(pipe, ladder):
    """A guard under which the samples end on rungs of their own."""
    means, _ = first(sample(pipe, PLAIN).noise_gap)
    one = sample(pipe, ladder((0.0, math.inf), (math.inf, math.inf), RUNGS[:1]))
    _, second_score = first(one.noise_gap)
    return ladder((between(means, 3),) + (math.inf,) * 3, (math.inf, between(second_score, 2), NEVER, NEVER))


def test_a_sample_is_the_same_alone_in_a_batch_and_in_another_order(pipe, mixed):
    together = sample(pipe, mixed)
    assert len(set(together.attempts.tolist())) > 2

    def turned():
        out = sample(pipe, mixed, PROMPTS[::-1], SEEDS[::-1])
        assert torch.equal(out.attempts.flip(0), together.attempts) and torch.equal(out.suspect.flip(0), together.suspect)
        assert torch.equal(out.noise_gap.flip(0).isnan(), together.noise_gap.isnan())
        return out.latents.flip(0)

    def alone():
        outs = [sample(pipe, mixed, [p], [s]) for p, s in zip(PROMPTS, SEEDS, strict=True)]
        assert torch.equal(torch.cat([out.attempts for out in outs]), together.attempts)
        assert torch.equal(torch.cat([out.noise_gap for out in outs]).isnan(), together.noise_gap.isnan())
        return torch.cat([out.latents for out in outs])

    for other in (turned, alone):
        assert_same_but_for_rounding(together.latents, other(), pipe, other)


def test_the_host_reads_between_attempts_alone(pipe, device, mixed):
    on_device = Sampler.from_pipeline(copy.deepcopy(pipe).to("cuda"), "dpmsolver++")
    plain = on_device(PROMPTS[:1], SEEDS[:1], STEPS, PLAIN, output="latent", progress=False)
    before = device.waits
    on_device(PROMPTS[:1], SEEDS[:1], STEPS, PLAIN, output="latent", progress=False)
    usual = device.waits - before
    before = device.waits
    out = on_device(PROMPTS[:1], SEEDS[:1], STEPS, mixed, output="latent", progress=False)
    ends = 2 * out.attempts[0].item()  # at most: an attempt's first look and its end
    assert plain.latents.device.type == "cuda" and device.waits - before <= usual + 8 * ends


def test_it_survives_serialisation_and_its_repr(mixed):
    assert Guidance.from_dict(json.loads(json.dumps(mixed.to_dict()).replace("Infinity", "1e999"))) == mixed
    assert eval(repr(mixed), {**globals(), "inf": math.inf}) == mixed


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda pipe, ladder: sample(pipe, ladder((0.0,) * 4, (0.0,) * 4), scheduler="unipc"), "needs a linear scheduler"),
        (lambda pipe, ladder: Guidance.ladder([]), "rungs must be"),
        (lambda pipe, ladder: Guidance.ladder([Rung(RUNGS[0], (1.0,), 1, 1.0, 1, 0, 1.0)]), "the first of plain guidance"),
        (
            lambda pipe, ladder: sample(pipe, Guidance.ladder([Rung(PLAIN, (1.0,) * 5, 1, 1.0, 1, 0, 1.0)])),
            "calibrated for 5 steps",
        ),
        (lambda pipe, ladder: Rung(PLAIN, (1.0, 0.0), 1, 1.0, 1, 0, 1.0), "gap must be above 0"),
        (
            lambda pipe, ladder: sample(
                pipe, Guidance.ladder([Rung(replace(PLAIN, scale=1.0), (1.0,) * STEPS, 1, 1.0, 1, 0, 1.0)])
            ),
            "needs a noise gap",
        ),
        (
            lambda pipe, ladder: sample(pipe, ladder((0.0,) * 4, (0.0,) * 4), callback_on_step_end=lambda *_: {}),
            "callback_on_step_end",
        ),
    ],
)
def test_a_guard_that_cannot_be_is_refused(pipe, ladder, make, says):
    with pytest.raises(ValueError, match=says):
        make(pipe, ladder)


ORDINARY = [f"a picture of a {name}" for name in ("frog", "dog", "fish", "crab")] * 2


@pytest.fixture(scope="module")
def calibration(pipe):
    sampler = Sampler.from_pipeline(pipe, "dpmsolver++")
    return Calibration.measure(sampler, ORDINARY, 7, STEPS, SCALE, RUNGS, rate=0.5, strict=0.5, batch_size=5, progress=False)


def test_a_calibration_is_measured_saved_and_loaded(pipe, calibration, tmp_path):
    sampler = Sampler.from_pipeline(pipe, "dpmsolver++")
    plain = sampler(ORDINARY, 7, STEPS, PLAIN, output="latent", progress=False)
    assert torch.allclose(torch.tensor(calibration.rungs[0].gap), plain.noise_gap.nanmedian(dim=0).values, rtol=1e-3)
    guard = Guidance.guard(SCALE, calibration)
    assert [rung.guidance for rung in guard.rungs] == [PLAIN, *RUNGS]
    assert Guidance.guard(SCALE, calibration, rungs=RUNGS[1:2]).rungs == (calibration.rungs[0], calibration.rungs[2])
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    assert 1 <= sample(pipe, guard).attempts.max() <= 4


class Drawn(Sampler):
    """A sampler whose noise gaps are drawn: lognormal, and wider on the low side than on the high one."""

    def __init__(self, pipe):
        self.__dict__ = Sampler.from_pipeline(pipe, "dpmsolver++").__dict__
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, prompts, seeds, steps, guidance, **options):
        wide, own = (torch.randn(len(prompts), n, generator=self.random, dtype=torch.float64) for n in (1, steps))
        side = torch.where(wide < 0, 0.6, 0.2)
        return SimpleNamespace(noise_gap=(side * wide + 0.01 * own).exp().float() * torch.arange(1.0, steps + 1))


def test_so_many_ordinary_samples_pass_each_threshold_as_were_asked_for(pipe):
    count, rate, strict, lost = 20_000, 0.04, 0.2, 0.1
    drawn = Drawn(pipe)
    prompts = [PROMPTS[0]] * count
    found = Calibration.measure(
        drawn, prompts, 0, STEPS, SCALE, RUNGS[:1], rate, strict, lost, batch_size=count, progress=False
    )
    gaps = drawn(prompts, [], STEPS, PLAIN).noise_gap
    for rung, above, peak, below in zip(found.rungs, (rate, strict), (rate / 4, 0.0), (0.0, lost), strict=True):
        peaks = (rung.largest(gaps) > rung.peak) & (rung.peak > 0)
        shares = rung.look(gaps) > rung.early, peaks, rung.score(gaps) > rung.verdict, rung.score(gaps) < rung.lost
        for share, asked in zip(shares, (above / 4, peak, above * 3 / 4 - peak, below), strict=True):
            assert share.double().mean().item() == pytest.approx(asked, abs=5 * math.sqrt(asked / count), rel=0.1)


def test_a_peak_of_the_gaps_is_begun_again_whatever_the_score(pipe, ladder):
    plain = sample(pipe, PLAIN)
    peaks = plain.noise_gap.max(dim=1).values
    watched = ladder((math.inf,) * 2, (math.inf,) * 2, RUNGS[:1]).rungs
    for flagged in (1, 3):
        guard = Guidance.ladder([replace(watched[0], peak=between(peaks, flagged)), watched[1]])
        out = sample(pipe, guard)
        again = peaks > between(peaks, flagged)
        assert torch.equal(out.attempts, 1 + again.long()) and again.sum() == flagged and not out.suspect.any()
        assert torch.equal(out.latents[~again], plain.latents[~again])
    assert torch.equal(watched[0].suspect(plain.noise_gap), torch.zeros(4, dtype=torch.bool))


def test_a_later_attempt_that_says_too_little_is_made_again(pipe, ladder):
    """But neither a plain one nor the last: the first keeps its bits, and after the last there is none."""
    silent = [
        replace(rung, lost=math.inf) if i else rung
        for i, rung in enumerate(ladder((0.0, *[math.inf] * 3), (math.inf,) * 4).rungs)
    ]
    out = sample(pipe, Guidance.ladder(silent))
    assert out.attempts.tolist() == [4] * 4 and not out.suspect.any()
    calm = sample(pipe, Guidance.ladder([replace(silent[0], early=math.inf), *silent[1:]]))
    assert calm.attempts.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda c, path: Guidance.guard(3.0, c), ValueError, "scale is 3.0, but the calibration was made at 7.5"),
        (lambda c, path: Guidance.guard(SCALE, c, rungs=[Guidance.cfg(2.0)]), ValueError, "rungs must be among"),
        (lambda c, path: Calibration.load(path / "none.json"), FileNotFoundError, "none.json"),
        (lambda c, path: Calibration.load(path / "other.json"), ValueError, "is not one"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(calibration, tmp_path, make, error, says):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(error, match=says):
        make(calibration, tmp_path)
