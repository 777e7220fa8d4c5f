"""`EscapeDenoiser` under k-diffusion's own samplers: against plain guidance, our sampler and the definition."""

import math

import numpy as np
import pytest
import torch
from basinescape import At, Fallen, FirstMinimum, Guidance, Sampler, Settled
from basinescape.detection.basin_score import LOG_SNR, noises
from basinescape.hosts.kdiffusion import EscapeDenoiser
from basinescape.kernels import definition
from basinescape.schedulers.schedule import make_scheduler
from kd_package import package

STEPS, BATCH = 8, 2
PROMPTS = ["a picture of a cat signed by arno", "a picture of a frog"]
MINIMUM = Guidance.opposite(1.0, scale=4.0, until=FirstMinimum(latest=5))


@pytest.fixture(scope="module")
def kd():
    return package()


class Toy(torch.nn.Module):
    """A network whose predictions depend on all that it is given."""

    alphas_cumprod = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, cond):
        self.calls.append((len(x), cond.clone()))
        return 0.3 * x + 0.1 * torch.sin(x + cond) + 0.3 * torch.cos(t / 100)[:, None] * cond

    apply_model = forward


def given(seed=0, shape=(BATCH, 12)):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for _ in range(3)]


class Plain:
    """Classifier-free guidance, as everybody writes it around k-diffusion; keeps what the network predicted."""

    def __init__(self, model, scale):
        self.model, self.scale, self.raw = model, scale, []

    def __call__(self, x, sigma, cond, uncond):
        both = self.model(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([uncond, cond])).chunk(2)
        return both[0] + self.scale * (both[1] - both[0])


SAMPLERS = {
    "euler": 1,
    "euler_ancestral": 1,
    "heun": 2,
    "dpm_2": 2,
    "lms": 1,
    "dpmpp_2s_ancestral": 2,
    "dpmpp_sde": 2,
    "dpmpp_2m": 1,
    "dpmpp_2m_sde": 1,
    "dpmpp_3m_sde": 1,
}


def sampled(kd, name, model, wrapped, seed=0):
    sigmas = kd[0].get_sigmas_karras(STEPS, 0.1, 10.0)
    x, uncond, cond = given()
    torch.manual_seed(seed)
    more = {}
    if "sde" in name:
        rng = torch.Generator().manual_seed(seed)
        more["noise_sampler"] = lambda *_: torch.randn(x.shape, generator=rng)
    extra = {"cond": cond, "uncond": uncond}
    return getattr(kd[0], f"sample_{name}")(wrapped, 10 * x, sigmas, extra_args=extra, disable=True, **more)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_plain_guidance_as_it_is(kd, name):
    model = kd[1].CompVisDenoiser(Toy())
    denoiser = EscapeDenoiser(model, Guidance.cfg(4.0), order=SAMPLERS[name])
    found, expected = (sampled(kd, name, model, wrapped) for wrapped in (denoiser, Plain(model, 4.0)))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert denoiser.noise_gap.shape == (BATCH, STEPS) and denoiser.noise_gap.isfinite().all()
    assert denoiser.transition_step.tolist() == [0, 0]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("wrapper", ["CompVisDenoiser", "VDenoiser"])
def test_the_first_call_of_a_step_decides(kd, name, wrapper):
    """Gaps are those of the network's own predictions; the weight of a step's other calls is the first one's."""
    model, weights = getattr(kd[1], wrapper)(Toy()), []
    denoiser = EscapeDenoiser(model, MINIMUM, order=SAMPLERS[name])

    def watched(x, sigma, cond, uncond):
        denoised = denoiser(x, sigma, cond=cond, uncond=uncond)
        both = [model(x, sigma, cond=one) for one in (uncond, cond)]
        scalings = model.get_scalings(sigma)
        out = scalings[-2][:, None]
        share = (denoised - both[0]).flatten(1).norm(dim=1) / (both[1] - both[0]).flatten(1).norm(dim=1)
        weights.append((((both[1] - both[0]) / out).norm(dim=1), share))
        return denoised

    sampled(kd, name, model, watched)
    gaps = torch.stack([gap for gap, _ in weights[:: denoiser.order]], dim=1)
    assert torch.allclose(denoiser.noise_gap, gaps, rtol=1e-3)
    rules = [(1.0 if k >= 2 else -torch.inf, torch.inf if k >= 5 else -torch.inf, 0.0, 0.0) for k in range(STEPS)]
    for i in range(BATCH):
        transition = definition.transition(denoiser.noise_gap[i].tolist(), rules)
        assert denoiser.transition_step[i] == transition
        for call, (_, share) in enumerate(weights):
            wanted = 4.0 if call // denoiser.order >= transition else 1.0
            assert abs(share[i] - wanted) < 1e-2


@pytest.mark.parametrize(
    ("name", "guidance"), [("euler", Guidance.delayed(7.5, until=At(650))), ("heun", MINIMUM), ("lms", MINIMUM)], ids=str
)
def test_it_gives_the_samplers_images(kd, pipe, name, guidance):
    out = Sampler.from_pipeline(pipe, name)(PROMPTS, [3, 1], STEPS, guidance, output="np", progress=False)
    own = make_scheduler(name, pipe.scheduler)
    own.set_timesteps(STEPS)
    sigmas = torch.cat([own.sigmas[:-1].unique(sorted=True).flip(0), own.sigmas[-1:]]).float()
    noise = torch.cat([torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed)) for seed in (3, 1)])
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True)

    class Network(torch.nn.Module):
        alphas_cumprod = pipe.scheduler.alphas_cumprod

        def apply_model(self, x, t, cond):
            return pipe.unet(x, t, cond).sample

    denoiser = EscapeDenoiser(kd[1].CompVisDenoiser(Network()), guidance, order=SAMPLERS[name])
    extra = {"cond": cond, "uncond": uncond}
    with torch.no_grad():
        x = getattr(kd[0], f"sample_{name}")(denoiser, noise * own.init_noise_sigma, sigmas, extra_args=extra, disable=True)
        images = pipe.image_processor.postprocess(pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample, "np")
    assert torch.equal(denoiser.transition_step, out.transition_step)
    assert np.abs(images - out.images).max() <= 1 / 255


def test_it_judges_as_the_sampler(kd, pipe):
    """Whichever the network predicts: what is compared is the denoised picture."""
    sampler = Sampler.from_pipeline(pipe, "euler")
    latents = sampler(PROMPTS, [3, 1], STEPS, Guidance.cfg(7.5), output="latent", progress=False).latents
    expected = sampler.judge(latents, PROMPTS, [3, 1])
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True)

    class Network(torch.nn.Module):
        alphas_cumprod = pipe.scheduler.alphas_cumprod

        def apply_model(self, x, t, cond):
            return pipe.unet(x, t, cond).sample

    denoiser = EscapeDenoiser(kd[1].CompVisDenoiser(Network()), Guidance.cfg(7.5))
    found = denoiser.judge(latents, cond=cond, uncond=uncond, seeds=[3, 1])
    assert torch.allclose(found.score, expected.score, atol=0.02) and torch.equal(found.suspect, expected.suspect)
    alone = denoiser.judge(latents[1:], cond=cond[1:], uncond=uncond[1:], seeds=1)
    assert torch.allclose(alone.score, found.score[1:], atol=1e-5)


@pytest.mark.parametrize("flow", [False, True])
def test_a_denoiser_that_knows_the_picture_scores_as_the_formula_says(flow):
    """Under both mixtures of data and noise, whatever the model returns for a step."""
    x0, seeds, given = torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(0)), [4, 5], []

    def model(x, sigma, cond):
        given.append((x[:BATCH], sigma))
        return x0.repeat(2, 1) + cond[0]

    near, far = torch.full((BATCH, 12), 0.1), torch.full((BATCH, 12), -0.4)
    near[1] = far[1] = 0.2
    verdict = EscapeDenoiser(model, Guidance.cfg(4.0)).judge(x0, cond=[near], uncond=[far], seeds=seeds, flow=flow)
    assert torch.allclose(verdict.score, torch.tensor([4.0, 1.0]).log(), atol=1e-4) and verdict.suspect.tolist() == [
        True,
        False,
    ]
    x, sigma = given[0]
    share = float(sigma[0])
    noise = (x - (1 - share if flow else 1.0) * x0) / share
    drawn = torch.stack([next(noises(seed, (12,))) for seed in seeds])
    assert torch.allclose(noise, drawn, atol=1e-4)
    assert math.isclose(2 * math.log((1 - share if flow else 1.0) / share), LOG_SNR, rel_tol=1e-5)


def test_a_transition_may_be_a_log_snr(kd):
    """The first step whose noise is at most so many times the data."""
    model = kd[1].CompVisDenoiser(Toy())
    sigmas = kd[0].get_sigmas_karras(STEPS, 0.1, 10.0)[:-1]
    denoiser = EscapeDenoiser(model, Guidance.delayed(4.0, until=At(log_snr=-2.0)))
    sampled(kd, "euler", model, denoiser)
    assert denoiser.transition_step.tolist() == [int((sigmas <= math.e).nonzero()[0])] * BATCH


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_samplers_of_uneven_steps_are_refused_before_work(kd, name):
    network = Toy()
    denoiser = EscapeDenoiser(kd[1].CompVisDenoiser(network), MINIMUM)
    x, uncond, cond = given()
    steps = {"n": STEPS} if name == "dpm_fast" else {}
    with pytest.raises(ValueError, match=f"sample_{name} differs in its calls from step to step"):
        extra = {"cond": cond, "uncond": uncond}
        getattr(kd[0], f"sample_{name}")(denoiser, 10 * x, 0.1, 10.0, extra_args=extra, disable=True, **steps)
    assert not network.calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_of_another_order_is_refused_before_work(kd, name):
    network, order = Toy(), SAMPLERS[name]
    model = kd[1].CompVisDenoiser(network)
    with pytest.raises(ValueError, match=f"sample_{name} calls the model {order} times a step: give order={order}"):
        sampled(kd, name, model, EscapeDenoiser(model, MINIMUM, order=3 - order))
    assert not network.calls


def test_a_run_of_one_step_is_followed_by_another(kd):
    """Though sigma is the same again."""
    model, (x, uncond, cond) = kd[1].CompVisDenoiser(Toy()), given()
    denoiser = EscapeDenoiser(model, Guidance.delayed(4.0, until=At(900), before=1.0))
    for _ in range(2):
        kd[0].sample_euler(denoiser, x, torch.tensor([9.0, 0.0]), extra_args={"cond": cond, "uncond": uncond}, disable=True)
        assert denoiser.run.calls == 1


def test_samples_of_a_batch_go_their_own_ways(kd):
    guidance = [Guidance.delayed(4.0, until=At(700)), Guidance.opposite(2.0, scale=3.0, until=At(400))]
    model = kd[1].CompVisDenoiser(Toy())
    together = EscapeDenoiser(model, guidance)
    found = sampled(kd, "dpmpp_2m", model, together)
    assert len(set(together.transition_step.tolist())) == 2
    sigmas, (x, uncond, cond) = kd[0].get_sigmas_karras(STEPS, 0.1, 10.0), given()
    for i, one in enumerate(guidance):
        alone = EscapeDenoiser(model, one)
        extra = {"cond": cond[i : i + 1], "uncond": uncond[i : i + 1]}
        expected = kd[0].sample_dpmpp_2m(alone, 10 * x[i : i + 1], sigmas, extra_args=extra, disable=True)
        assert torch.allclose(found[i], expected[0], rtol=1e-4, atol=1e-4)
        assert alone.transition_step[0] == together.transition_step[i]


def test_a_prediction_that_nobody_needs_is_not_made(kd):
    network = Toy()
    denoiser = EscapeDenoiser(kd[1].CompVisDenoiser(network), Guidance.delayed(4.0, until=At(500)))
    sampled(kd, "euler", None, denoiser)
    k = int(denoiser.transition_step[0])
    assert [rows for rows, _ in network.calls] == [BATCH] * k + [2 * BATCH] * (STEPS - k) and 0 < k < STEPS
    assert torch.equal(network.calls[0][1], given()[1])


def test_prompts_may_be_of_different_lengths_and_more_be_passed():
    """A call each then; and a model of which nothing is known predicts noise."""
    asked = []

    def model(x, sigma, cond, extra=0):
        asked.append((len(x), extra))
        return x - sigma[:, None] * (cond["text"].mean(dim=1) + x)

    x, sigma = torch.ones(BATCH, 3), torch.full((BATCH,), 2.0)
    cond, uncond = {"text": torch.ones(BATCH, 5, 3)}, {"text": torch.zeros(BATCH, 2, 3)}
    denoiser = EscapeDenoiser(model, Guidance.cfg(3.0))
    assert torch.allclose(denoiser(x, sigma, cond=cond, uncond=uncond), x - 2 * (3 + x)) and asked == [(BATCH, 0)] * 2
    assert torch.allclose(denoiser.noise_gap, torch.tensor(3.0).sqrt().expand(BATCH, 1))
    denoiser(x, sigma / 2, cond=cond, uncond=cond, extra=7)
    assert asked[2:] == [(BATCH, 7)] * 2
    flow = EscapeDenoiser(model, Guidance.cfg(3.0), scalings=lambda sigma: (1.0 + 0 * sigma, -2 * sigma))
    flow(x, sigma, cond=cond, uncond=uncond)
    assert torch.allclose(flow.noise_gap, torch.tensor(3.0).sqrt().expand(BATCH, 1) / 2)


def test_a_run_begins_where_sigma_rises(kd):
    model = kd[1].CompVisDenoiser(Toy())
    denoiser = EscapeDenoiser(model, MINIMUM, steps=STEPS)
    first = sampled(kd, "euler", model, denoiser)
    run = denoiser.run
    assert torch.equal(sampled(kd, "euler", model, denoiser), first) and denoiser.run is not run


@pytest.mark.parametrize(
    "told", [{"mask": None}, {"mask": "left"}, {"mask": torch.ones(3)}, {"mask": torch.ones(1, 3)}], ids=str
)
def test_what_is_not_of_the_samples_is_not_joined(told):
    """Without it the model would get a mask of twice the length, or none at all."""
    asked = []

    def model(x, sigma, cond):
        asked.append(cond["mask"])
        return x - sigma[:, None] * (cond["text"] + x)

    x, text = torch.ones(BATCH, 3), torch.ones(BATCH, 3)
    denoised = EscapeDenoiser(model, Guidance.cfg(3.0))(
        x, torch.full((BATCH,), 2.0), {"text": text} | told, {"text": 0 * text} | told
    )
    assert torch.allclose(denoised, x - 2 * (3 + x))
    assert len(asked) == 2 and all(one is told["mask"] for one in asked)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
@pytest.mark.parametrize("guidance", [MINIMUM, Guidance.delayed(4.0, until=At(log_snr=-1.0))], ids=["first minimum", "at"])
def test_noise_that_a_sampler_adds_in_the_middle_begins_no_run(kd, name, guidance):
    """s_churn raises sigma where it begins: at s_tmax, here from one step to the next."""
    model, sigmas = kd[1].CompVisDenoiser(Toy()), kd[0].get_sigmas_karras(4 * STEPS, 0.1, 10.0)
    x, uncond, cond = given()
    denoiser, seen = EscapeDenoiser(model, guidance, order=SAMPLERS[name]), []

    def watched(x, sigma, **conditions):
        seen.append(sigma[0].item())
        return denoiser(x, sigma, **conditions)

    how = {"extra_args": {"cond": cond, "uncond": uncond}, "disable": True, "s_churn": 40.0, "s_tmax": 5.0}
    for _ in range(2):
        getattr(kd[0], f"sample_{name}")(watched, 10 * x, sigmas, **how)
        firsts = seen[:: SAMPLERS[name]]
        assert firsts != sorted(firsts, reverse=True)
        assert denoiser.run.calls == len(seen) and denoiser.noise_gap.shape == (BATCH, 4 * STEPS)
        seen.clear()


def test_what_it_cannot_do_is_one_line(kd):
    model, x = kd[1].CompVisDenoiser(Toy()), given()[0]
    for guidance in (Guidance.cfg(4.0, shape=(1.0,) * STEPS), Guidance.delayed(4.0, until=Settled((1.0,) * STEPS))):
        with pytest.raises(ValueError, match="counts the steps of a run: give steps"):
            EscapeDenoiser(model, guidance)
        sampled(kd, "euler", model, EscapeDenoiser(model, guidance, steps=STEPS))
    with pytest.raises(ValueError, match="transition_step is known when the denoiser has been called"):
        EscapeDenoiser(model, MINIMUM).transition_step  # noqa: B018
    with pytest.raises(ValueError, match=r"cond_scale is 7\.5, and the guidance has its own scale: leave it out"):
        EscapeDenoiser(model, MINIMUM)(x, torch.ones(BATCH), cond=x, uncond=x, cond_scale=7.5)
    with pytest.raises(ValueError, match="order must be a whole number"):
        EscapeDenoiser(model, Guidance.cfg(4.0), order=0)
    with pytest.raises(ValueError, match="needs a loop that can: use Sampler"):
        EscapeDenoiser(model, Guidance.cfg(4.0, restart=(300, 500, 1)))
    with pytest.raises(ValueError, match="sigma must be the same for all samples, got 1 to 2"):
        EscapeDenoiser(model, Guidance.delayed(4.0, until=Fallen()))(x, torch.tensor([1.0, 2.0]), cond=x, uncond=x)
