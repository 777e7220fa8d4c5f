"""The plugin of vLLM-Omni on files of the server, and on a stand-in of their contract: flow, and a small network."""

import logging

import oracle
import pytest
import torch
import vllm_omni_server
from basinescape import At, FirstMinimum, Guidance
from diffusers import FlowMatchEulerDiscreteScheduler
from hosts_tested import VLLM_OMNI
from rounding import close
from vllm_omni_server import SamplingParams, SimpleNamespace, StepRequestState

STEPS, SCALE, SHAPE = 9, 4.0, (3, 20, 8)
DELAYED = Guidance.delayed(SCALE, until=At(timestep=800))
OPPOSITE = Guidance.opposite(1.5, scale=3.0, until=At(timestep=400), rule="rescale")
MINIMUM = Guidance.delayed(2.0, until=FirstMinimum(), before=1.0)
MODES = ["request", "step"]


@pytest.fixture(params=["stand-in", VLLM_OMNI.version], ids=["stand-in", str(VLLM_OMNI)])
def server(request, monkeypatch):
    with vllm_omni_server.installed(request.param, monkeypatch) as found:
        yield found


def network(x, t, prompt):
    """A gap between its predictions that falls, and rises again, sample by sample elsewhere."""
    share = (t.to(x) / 1000).view(-1, 1, 1)
    pull = 0.2 + (share - 0.55 - 0.3 * (9 * prompt.mean(dim=(1, 2), keepdim=True)).tanh()).abs()
    return 0.4 * x - 0.1 * torch.sin(x + prompt) - pull * prompt


def scheduler_of(steps=STEPS):
    made = FlowMatchEulerDiscreteScheduler(shift=2.0)
    made.set_timesteps(steps)
    return made


def given(rows=slice(None)):
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))[rows] for seed in (0, 7)]


def named(guidance, **more):
    return {} if guidance is None else {"basinescape": {"guidance": guidance.to_dict(), **more}}


def pipeline_of(server, net=network):
    class Pipeline(server.mixin):
        """As the server's own models: a loop over all steps, or one step for a batch of whoever is there."""

        def __init__(self):
            self.calls, self.scheduler = [], None

        def transformer(self, x, t, prompt):
            self.calls.append(prompt)
            return (net(x, t, prompt),)

        def predicted(self, x, t, prompt, do_true_cfg, scale, normalize):
            branches = ({"x": x, "t": t, "prompt": one} for one in (prompt, 0 * prompt))
            return self.predict_noise_maybe_with_cfg(do_true_cfg, scale, *branches, normalize)

        def forward(self, reqs):
            self.scheduler, sampling = scheduler_of(), reqs[0].sampling_params
            x, prompt = (torch.cat([getattr(one, name) for one in reqs]) for name in ("latents", "prompt"))
            for t in self.scheduler.timesteps:
                made = self.predicted(x, t, prompt, reqs[0].do_true_cfg, sampling.true_cfg_scale, sampling.cfg_normalize)
                x = self.scheduler.step(made, t, x, return_dict=False)[0]
            return x

        def denoise_step(self, batch, states=()):
            scale = batch.do_true_cfg, batch.true_cfg_scale, batch.cfg_normalize
            return self.predicted(batch.latents, batch.timesteps, batch.prompt_embeds, *scale)

    return Pipeline()


def denoise(server, mode, guidance, rows=slice(None), do_true_cfg=True, sampling=None, late=0, net=network, cache="none"):
    """(latents, calls of the network) of one request a sample, by its guidance; late: steps after which the last comes in."""
    (x, prompt), pipeline = given(rows), pipeline_of(server, net)
    params = [SamplingParams(extra_args=named(one), **(sampling or {})) for one in guidance]
    runner = server.runner(pipeline, cache)
    parts = [slice(i, i + 1) for i in range(len(x))]
    if mode == "request":
        reqs = [
            SimpleNamespace(
                request_id=str(i), sampling_params=one, latents=x[part], prompt=prompt[part], do_true_cfg=do_true_cfg
            )
            for i, (one, part) in enumerate(zip(params, parts, strict=True))
        ]
        return runner._execute_request_list(reqs), pipeline.calls
    states = [
        StepRequestState(str(i), one, prompt[part], x[part], made := scheduler_of(), made.timesteps, do_true_cfg=do_true_cfg)
        for i, (one, part) in enumerate(zip(params, parts, strict=True))
    ]
    for k in range(STEPS + late):
        here = [one for one in (states if k >= late else states[:-1]) if one.step_index < STEPS]
        runner.execute_stepwise(here)
    return torch.cat([one.latents for one in states]), pipeline.calls


def expected(guidance, rows=slice(None)):
    scheduler, (x, prompt) = scheduler_of(), given(rows)
    sigmas = scheduler.sigmas.double()

    def predict(x, k, i):
        return tuple(network(x, scheduler.timesteps[k], one) for one in (0 * prompt[i : i + 1], prompt[i : i + 1]))

    def step(x, guided, k):
        return x + (sigmas[k + 1] - sigmas[k]) * guided

    return oracle.samples(predict, step, x, (1000 * sigmas[:-1]).tolist(), guidance)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_constant_guidance_is_the_servers_own(server, mode, normalize):
    options = {"cfg_normalize": normalize}
    stock, _ = denoise(server, mode, [None] * 3, sampling=options)
    assert close(denoise(server, mode, [Guidance.cfg(SCALE)] * 3, sampling=options)[0], stock)
    mixed, _ = denoise(server, mode, [None, Guidance.cfg(SCALE), DELAYED], sampling=options)
    assert close(mixed[:2], stock[:2]) and not close(mixed[2], stock[2])


@pytest.mark.parametrize("mode", MODES)
def test_each_request_is_what_the_definition_says(server, mode, caplog):
    caplog.set_level(logging.INFO)
    guidance = [DELAYED, OPPOSITE, MINIMUM]
    found, _ = denoise(server, mode, guidance)
    latents, transitions, _ = expected(guidance)
    assert close(found.double(), latents) and len(set(transitions.tolist())) == 3
    lines = [record.getMessage() for record in caplog.records if record.name == "basinescape.hosts.vllm_omni"]
    assert lines == [
        f"basinescape: request {i}: guided from step [{step}] on; -1: never" for i, step in enumerate(transitions.tolist())
    ]
    for i, one in enumerate(guidance):
        assert torch.equal(denoise(server, mode, [one], slice(i, i + 1))[0][0], found[i])


@pytest.mark.parametrize("mode", MODES)
def test_a_transition_that_never_came_is_said(server, mode, caplog):
    denoise(server, mode, [Guidance.delayed(SCALE, until=FirstMinimum(drop=0.99)), DELAYED, None])
    assert [line for line in caplog.messages if "request 0: 1 of 1 samples had no transition" in line]
    assert "request 1" not in caplog.text


def test_first_minima_are_each_samples_own(server):
    latents, transitions, _ = expected([MINIMUM] * 3)
    assert len(set(transitions.tolist())) > 1
    for mode in MODES:
        assert close(denoise(server, mode, [MINIMUM] * 3)[0].double(), latents)


def test_a_request_that_comes_later_is_at_its_own_step(server):
    guidance = [DELAYED, OPPOSITE, MINIMUM]
    together, _ = denoise(server, "step", guidance)
    assert torch.equal(denoise(server, "step", guidance, late=3)[0], together)


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_that_no_request_needs_is_not_made(server, mode):
    _, transitions, _ = expected([DELAYED] * 3)
    _, calls = denoise(server, mode, [DELAYED] * 3)
    alone = int(transitions[0]) - (mode == "request")  # the first step of all tells how many rows there are
    assert len(calls) == 2 * STEPS - alone
    assert len(denoise(server, mode, [DELAYED, DELAYED, Guidance.cfg(2.0)])[1]) == 2 * STEPS


def test_a_cache_that_counts_the_networks_calls_gets_both(server):
    """Cache-DiT and TeaCache take every second call for the unconditional one."""
    found, calls = denoise(server, "request", [DELAYED] * 3, cache="cache_dit")
    assert len(calls) == 2 * STEPS and close(found, denoise(server, "request", [DELAYED] * 3)[0])
    assert len(denoise(server, "request", [DELAYED] * 3)[1]) < 2 * STEPS


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_batch_leaves_nothing_behind(server, mode):
    stock, _ = denoise(server, mode, [None] * 3)
    with pytest.raises(ZeroDivisionError):
        denoise(server, mode, [MINIMUM] * 3, net=lambda *given: 1 / 0)
    assert torch.equal(denoise(server, mode, [None] * 3)[0], stock)
    first, _ = denoise(server, mode, [MINIMUM] * 3)
    assert torch.equal(denoise(server, mode, [MINIMUM] * 3)[0], first)


def test_what_stands_in_the_way_of_scales_of_the_servers_own(server):
    """Its batch has one: two are refused by the server. The guidances' own scales may differ."""
    (x, prompt), runner = given(), server.runner(pipeline_of(server))
    states = [
        StepRequestState(
            str(i), SamplingParams(true_cfg_scale=scale), prompt[:1], x[:1], made := scheduler_of(), made.timesteps
        )
        for i, scale in enumerate((4.0, 5.0))
    ]
    with pytest.raises(ValueError, match="Mixed CFG settings in one diffusion batch are not supported"):
        runner.execute_stepwise(states)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("guidance", "more", "told"),
    [
        (DELAYED, {"do_true_cfg": False}, "give a negative_prompt"),
        (DELAYED, {"sampling": {"guidance_scale_2": 3.0}}, "guidance_scale_2 is not followed"),
        (Guidance.guard(4.0), {}, "begins samples again, which this loop cannot"),
        (Guidance.cfg(2.0, restart=(100, 500, 2)), {}, "goes back in the steps"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_work(server, mode, guidance, more, told):
    def work(*given):
        raise AssertionError

    with pytest.raises(ValueError, match=told):
        denoise(server, mode, [guidance] * 3, net=work, **more)


def test_a_request_that_cannot_be_followed_does_not_come_into_a_batch(server):
    """Else it would take those down that share the batch."""
    scheduler = server.scheduler()
    for i, extra in enumerate(({}, named(DELAYED), {"basinescape": {"guidance": {}}}, named(Guidance.guard(4.0)))):
        request = SimpleNamespace(request_id=str(i), sampling_params=SamplingParams(extra_args=extra))
        if i < 2:
            assert scheduler.add_request(request) == str(i)
        else:
            with pytest.raises(ValueError, match="guidance"):
                scheduler.add_request(request)
    assert list(scheduler._waiting) == ["0", "1"] == list(scheduler._request_states)


def test_models_that_combine_by_themselves_and_unknown_names_are_refused(server):
    class Own(server.mixin):
        def combine_cfg_noise(self, *given):
            raise AssertionError

    around, request = server.mixin.combine_cfg_noise, SamplingParams(extra_args=named(DELAYED, judge=True))
    assert around.__wrapped__
    req = SimpleNamespace(request_id="0", sampling_params=SamplingParams(extra_args=named(DELAYED)))
    pipeline = SimpleNamespace(forward=lambda reqs: Own().predict_noise_maybe_with_cfg(True, 4.0, {}, {}))
    with pytest.raises(ValueError, match="combines predictions by a function of its own"):
        server.runner(pipeline)._execute_request_list([req])
    req.sampling_params = request
    with pytest.raises(ValueError, match="use basinescape judge"):
        server.runner(pipeline)._execute_request_list([req])


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_combines_elsewhere_is_told_of(server, mode, caplog, monkeypatch):
    monkeypatch.setattr(server.mixin, "predict_noise_maybe_with_cfg", lambda self, cfg, scale, cond, *_: network(**cond))
    found, _ = denoise(server, mode, [None, DELAYED, None])
    lines = [record.getMessage() for record in caplog.records if record.name == "basinescape.hosts.vllm_omni"]
    assert len(lines) == 1 and "request 1 named guidance, and nothing was guided by it" in lines[0] and found.isfinite().all()
