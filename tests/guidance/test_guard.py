"""The guard: who begins again, who is left alone, and what it says of them."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from basinescape import At, Calibration, FirstMinimum, Guard, Guidance, Sampler
from basinescape.guidance.early import EarlyLook
from basinescape.guidance.guard import LATER, LATER_RATE, THRESHOLD, Attempt
from rounding import assert_same_but_for_rounding
from smallguards import EVERY, NONE, guard

STEPS, SCALE = 8, 7.5
PROMPTS = [
    "a picture of a cat signed by arno",
    "a picture of a frog",
    "a picture of a fish signed by dirk",
    "a picture of a dog",
]
SEEDS = [3, 1, 2, 4]
PLAIN = Guidance.cfg(SCALE)
LATER_ONES = [
    Guidance.delayed(SCALE, until=At(700)),
    Guidance.opposite(1.0, scale=SCALE, until=FirstMinimum(latest=4)),
    Guidance.delayed(SCALE, until=At(log_snr=-1.0), restart=(300, 500, 1)),
]


@pytest.fixture(scope="module")
def pipe(small):
    return small


def sample(pipe, guidance, prompts=PROMPTS, seeds=SEEDS, scheduler="dpmsolver++", **options):
    sampler = Sampler.from_pipeline(pipe, scheduler)
    return sampler(prompts, seeds, STEPS, guidance, output="latent", progress=False, **options)


def judged(pipe, out, scheduler="dpmsolver++", probes=1):
    return Sampler.from_pipeline(pipe, scheduler).judge(out.latents, PROMPTS, SEEDS, probes=probes).score


def between(values, k):
    """A threshold that the k largest pass."""
    ordered = values.sort(descending=True).values
    return ordered[k - 1 : k + 1].mean().item()


def second(seed):
    """The second noise of a sample."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((1, 4, 16, 16), generator=generator) for _ in range(2)][1]


@pytest.mark.parametrize(("scheduler", "flagged"), [("euler", 1), ("dpmsolver++", 2), ("ddim", 3), ("unipc", 2)])
@pytest.mark.slow
def test_the_suspect_begin_again_and_the_others_keep_their_bits(pipe, scheduler, flagged):
    """The attempt is that of the next noise of the sample's own, under the next guidance; unipc takes steps of its own."""
    plain = sample(pipe, PLAIN, scheduler=scheduler)
    score = judged(pipe, plain, scheduler)
    threshold = between(score, flagged)
    out = sample(pipe, guard((PLAIN, threshold), (LATER_ONES[0], NONE)), scheduler=scheduler)
    again = score > threshold
    assert again.sum() == flagged
    assert torch.equal(out.attempts, 1 + again.long()) and not out.suspect.any()
    assert torch.equal(out.latents[~again], plain.latents[~again])
    assert torch.equal(out.noise_gap[~again], plain.noise_gap[~again])
    assert torch.allclose(out.score[~again], score[~again], atol=1e-5)
    where = again.nonzero()[:, 0].tolist()
    prompts, noise = [PROMPTS[i] for i in where], torch.cat([second(SEEDS[i]) for i in where])

    def expected(prompts=prompts, noise=noise):
        return sample(pipe, LATER_ONES[0], prompts, [0] * len(prompts), scheduler, latents=noise).latents

    assert_same_but_for_rounding(out.latents[where], expected(), pipe, expected)


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler"])
def test_the_score_is_that_of_judge(pipe, scheduler):
    """Of the picture that is returned, with as many noises as its attempt asks for; Euler scales the network's input."""
    made = guard((PLAIN, EVERY), (LATER_ONES[0], EVERY), (LATER_ONES[1], EVERY), probes=3)
    out = sample(pipe, made, scheduler=scheduler)
    assert out.attempts.tolist() == [3] * 4 and out.suspect.all()
    assert torch.allclose(out.score, judged(pipe, out, scheduler, probes=3), atol=1e-5)


def test_who_never_passes_comes_to_the_end_and_is_suspect(pipe):
    out = sample(pipe, guard((PLAIN, EVERY), *((one, EVERY) for one in LATER_ONES)))
    assert out.attempts.tolist() == [4] * 4 and out.suspect.all()
    assert out.latents.isfinite().all() and (out.transition_step > 0).all()


def test_an_attempt_may_be_given_up_by_its_first_gaps(pipe):
    """Then it is neither finished nor judged; the last attempt never is given up."""
    gaps = sample(pipe, PLAIN).noise_gap
    levels = Sampler.from_pipeline(pipe, "dpmsolver++").solver(STEPS).levels
    usual = gaps.median(dim=0).values
    means = (gaps / usual)[:, :2].mean(dim=1)
    early = EarlyLook(tuple(usual.tolist()), tuple(levels), 2, between(means, 2))
    made = guard((PLAIN, NONE), (LATER_ONES[0], NONE))
    out = sample(pipe, replace(made, early=early))
    assert torch.equal(out.attempts, 1 + (means > early.limit).long()) and not out.suspect.any()
    alone = sample(pipe, Guard(made.attempts[:1], replace(early, limit=0.0)))
    assert alone.attempts.tolist() == [1] * 4 and torch.equal(alone.latents, sample(pipe, PLAIN).latents)


def test_the_first_gaps_are_hopeless_above_the_limit_of_their_mean():
    early = EarlyLook((1.0, 2.0, 4.0), (900.0, 500.0, 100.0), 2, 3.0)
    for gaps, hopeless in (((4.0, 4.0, 99.0), False), ((4.0, 4.5, 0.0), True), ((4.0, math.nan, 0.0), True)):
        assert early.hopeless(torch.tensor(gaps)) is hopeless


def test_an_early_look_suits_the_steps_that_it_was_measured_at():
    early = EarlyLook((1.0, 2.0), (900.0, 100.0), 1, 1.5)
    assert early.suits([900.0, 100.0]) and early.suits([899.0, 101.0])
    for other in ([900.0, 102.0], [898.0, 100.0], [900.0], [900.0, 100.0, 0.0], [math.nan, 100.0]):
        assert not early.suits(other)


def test_nobody_suspect_is_plain_guidance(pipe):
    out = sample(pipe, guard((PLAIN, NONE), *((one, NONE) for one in LATER_ONES)), scheduler="ddim")
    assert out.attempts.tolist() == [1] * 4 and torch.equal(out.latents, sample(pipe, PLAIN, scheduler="ddim").latents)


@pytest.fixture(scope="module")
def mixed(pipe):
    """A guard under which the samples end with attempts of their own."""
    score = judged(pipe, sample(pipe, PLAIN))
    then = sample(pipe, guard((PLAIN, EVERY), (LATER_ONES[0], NONE))).score
    return guard((PLAIN, between(score, 3)), (LATER_ONES[0], between(then, 2)), (LATER_ONES[1], EVERY), (LATER_ONES[2], EVERY))


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "unipc"])
@pytest.mark.slow
def test_a_sample_is_the_same_alone_in_a_batch_and_in_another_order(pipe, mixed, scheduler):
    if scheduler == "unipc":  # whose steps cannot go back
        mixed = Guard(mixed.attempts[:3])
    together = sample(pipe, mixed, scheduler=scheduler)
    assert len(set(together.attempts.tolist())) > 1

    def turned():
        out = sample(pipe, mixed, PROMPTS[::-1], SEEDS[::-1], scheduler)
        assert torch.equal(out.attempts.flip(0), together.attempts) and torch.equal(out.suspect.flip(0), together.suspect)
        assert torch.equal(out.noise_gap.flip(0).isnan(), together.noise_gap.isnan())
        return out.latents.flip(0)

    def alone():
        outs = [sample(pipe, mixed, [p], [s], scheduler) for p, s in zip(PROMPTS, SEEDS, strict=True)]
        assert torch.equal(torch.cat([out.attempts for out in outs]), together.attempts)
        assert torch.allclose(torch.cat([out.score for out in outs]), together.score, atol=1e-4)
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
    assert plain.latents.device.type == "cuda" and device.waits - before <= usual + 8 * 2 * out.attempts[0].item()


def test_it_survives_serialisation_and_its_repr(mixed):
    looked = replace(mixed, early=EarlyLook((1.0, 2.0), (900.0, 100.0), 1, 1.5))
    for one in (mixed, looked, Guidance.guard(SCALE), Guidance.guard(3.0, rule="rescale", phi=0.5)):
        assert Guidance.from_dict(json.loads(json.dumps(one.to_dict()))) == one
        assert eval(repr(one), {**globals(), "Attempt": Attempt}) == one
    assert Guard(list(mixed.attempts)) == mixed and hash(Guard(list(mixed.attempts))) == hash(mixed)


def test_the_model_of_its_calibration_is_written_and_read(mixed):
    """What was written without it, as by earlier versions, is read."""
    known = replace(mixed, model={"unet": {"form": "a", "sample": [1.0], "dtype": "float32"}})
    written = json.loads(json.dumps(known.to_dict()))
    assert Guidance.from_dict(written).model == known.model and "model" not in mixed.to_dict()
    del written["model"]
    assert Guidance.from_dict(written) == known and Guidance.from_dict(written).model is None
    with pytest.raises(ValueError, match="model must be a fingerprint"):
        Guidance.from_dict({**written, "model": "tiny"})


def test_without_a_calibration_it_has_the_defaults():
    made = Guidance.guard(SCALE)
    first, *later = made.attempts
    assert first == Attempt(PLAIN, THRESHOLD) and made.early is None
    assert len(later) > 2 and {one.threshold for one in later} == {LATER}
    delays = [one.guidance.until.log_snr for one in later]
    assert delays == sorted(delays)  # each as careful as the one before, or more
    own = Guidance.guard(SCALE, threshold=0.5, later=0.4, attempts=LATER_ONES[:1])
    assert own.attempts == (Attempt(PLAIN, 0.5), Attempt(LATER_ONES[0], 0.4))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda pipe: Guard(()), "attempts must be one or more"),
        (lambda pipe: Guard((Attempt(LATER_ONES[0], 0.3),)), "must be plain guidance"),
        (lambda pipe: Attempt(PLAIN, math.nan), "threshold must be a finite number"),
        (lambda pipe: Attempt(PLAIN, 0.3, 0), "probes must be a whole number"),
        (lambda pipe: Attempt(Guidance.guard(2.0), 0.3), "guidance must be a Guidance"),
        (lambda pipe: guard((PLAIN, 0.3), (Guidance.cfg(SCALE, rule="apg"), 0.3)), "must have one rule"),
        (lambda pipe: Guidance.guard(SCALE, rate=0.0), "rate must be between 0 and 1"),
        (lambda pipe: Guidance.guard(SCALE, rate=0.05), "rate is 0.05, which needs a calibration"),
        (lambda pipe: Guidance.guard(SCALE, later="x"), "later must be a finite number"),
        (lambda pipe: Guidance.guard(SCALE, attempts=5), "attempts must be a list of guidances"),
        (lambda pipe: Guidance.guard(SCALE, attempts=[3]), "guidance must be a Guidance"),
        (lambda pipe: Guidance.guard(SCALE, attempts=PLAIN), "attempts must be a list of guidances"),
        (lambda pipe: Guidance.cfg(SCALE, interval=5), "interval must be two timesteps"),
        (lambda pipe: Guidance.cfg(SCALE, interval=(700, 300)), "interval must be two timesteps .low, high."),
        (lambda pipe: Guidance.opposite(0.0, scale=SCALE, until=At(500)), "opposite_scale must be above 0"),
        (lambda pipe: Guidance.cfg(SCALE, restart=5), "restart must be .low, high, times."),
        (lambda pipe: Guidance.cfg(SCALE, shape=5), "shape must be one of .* or a factor for each step"),
        (lambda pipe: Guidance.from_dict("cfg"), "not a guidance: 'cfg'"),
        (lambda pipe: Guidance.from_dict({"scale": 1, "until": {"rule": "Mine"}}), "rule 'Mine', and there are At, "),
        (lambda pipe: EarlyLook((1.0, 0.0), (900.0, 100.0), 1, 1.0), "gap must be above 0"),
        (lambda pipe: EarlyLook((1.0,), (900.0,), 1, math.nan), "limit must be a finite number"),
        (
            lambda pipe: sample(pipe, replace(guard((PLAIN, NONE)), early=EarlyLook((1.0,) * 5, (900.0,) * 5, 1, 1.0))),
            r"calibrated for 5 steps .* give calibration\.fitted\(sampler, steps\) to the guard",
        ),
        (lambda pipe: sample(pipe, guard((PLAIN, NONE)), callback_on_step_end=lambda *_: {}), "callback_on_step_end"),
        (lambda pipe: sample(pipe, guard((PLAIN, NONE)), stop_after=2), "stop_after"),
        (lambda pipe: sample(pipe, guard((PLAIN, NONE)), denoising_end=0.8), "denoising_end"),
        (
            lambda pipe: sample(
                pipe, replace(guard((replace(PLAIN, scale=1.0), NONE)), early=EarlyLook((1.0,) * STEPS, LEVELS, 1, 1.0))
            ),
            "needs a noise gap",
        ),
    ],
)
def test_a_guard_that_cannot_be_is_refused(pipe, make, says):
    with pytest.raises(ValueError, match=says):
        make(pipe)


LEVELS = (999.0, 874.0, 749.0, 625.0, 500.0, 375.0, 250.0, 125.0)


@pytest.mark.parametrize("scale", [SCALE, 3.0])
def test_a_calibrated_guard_has_the_calibrations_numbers(scale):
    """Split conformal: of n ordinary scores the one whose rank is ceil((n + 1)(1 - rate))."""
    scores = tuple(i / 100 for i in range(1, 200))
    looks = tuple((i / 10, 1.0) for i in range(1, 200))
    calibration = Calibration({}, STEPS, SCALE, LEVELS, (1.0,) * STEPS, scores, looks)
    if scale != SCALE:
        with pytest.raises(ValueError, match="but the calibration was made at"):
            Guidance.guard(scale, calibration)
        return
    made = Guidance.guard(scale, calibration, rate=0.1)
    assert made.attempts[0].threshold == pytest.approx(1.90)  # 200 * 0.95
    assert made.attempts[1].threshold == pytest.approx(2.00 - 2 * LATER_RATE)
    assert made.early.steps == 1 and made.early.limit == pytest.approx(19.0)
    with pytest.raises(ValueError, match="199 ordinary pictures cannot tell: calibrate with 999 or more"):
        Guidance.guard(scale, calibration, rate=0.002)
    for rate in (1.5, -0.5):
        with pytest.raises(ValueError, match="rate must be"):
            calibration.threshold(rate)
