"""The plugin of SGLang-Diffusion on the server's own code, and on a stand-in of its contract: flow, and a small network."""

import logging

import oracle
import pytest
import sglang_code
import sglang_server
import torch
from basinescape import At, FirstMinimum, Guidance
from basinescape.detection.basin_score import Probe
from basinescape.guidance.guard import PROBES
from basinescape.hosts.own_loop import judge
from diffusers import FlowMatchEulerDiscreteScheduler
from hosts_tested import SGLANG
from rounding import close
from sglang_server import Req, SamplingParams, SimpleNamespace

STEPS, SCALE, SHAPE = 9, 4.0, (3, 20, 8)
DELAYED = Guidance.delayed(SCALE, until=At(timestep=700))
OPPOSITE = Guidance.opposite(1.5, scale=3.0, until=At(timestep=600))
MINIMUM = Guidance.delayed(SCALE, until=FirstMinimum(), before=1.0)


@pytest.fixture(params=["stand-in", SGLANG.version], ids=["stand-in", str(SGLANG)])
def server(request, monkeypatch):
    with sglang_code.installed(request.param, monkeypatch) as found:
        yield found


def network(x, t, prompt):
    """A gap between its predictions that falls, and rises again, sample by sample elsewhere."""
    share = t.to(x) / 1000
    pull = 0.2 + (share - 0.55 - 0.3 * (9 * prompt.mean(dim=(1, 2), keepdim=True)).tanh()).abs()
    return 0.4 * x - 0.1 * torch.sin(x + prompt) - pull * prompt


def scheduler_of(steps=STEPS):
    made = FlowMatchEulerDiscreteScheduler(shift=2.0)
    made.scale_model_input = lambda sample, timestep: sample  # SGLang's own copy of this scheduler has it
    made.set_timesteps(steps)
    return made


def prompts():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))


def batch_of(rows=slice(None), **given):
    """A batch of requests as the loop gets it."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))[rows]
    scheduler, seeds = scheduler_of(), list(range(len(noise)))
    own = {"latents": noise, "prompts": prompts()[rows], "scheduler": scheduler, "timesteps": scheduler.timesteps}
    own |= {"generator": [torch.Generator().manual_seed(10 + i) for i in seeds], "seeds": seeds, "extra": {}, "usage": None}
    own |= {"guidance_scale": SCALE, "guidance_scale_2": SCALE, "guidance_rescale": 0.0, "cfg_normalization": 0.0}
    own |= {"do_classifier_free_guidance": True, "is_warmup": False, "image_latent": None, "cfg_gate_step": None}
    own |= {"return_trajectory_latents": False, "is_cfg_negative": False, "metrics": None, "perf_dump_path": None}
    own |= {"request_id": "7"}
    return Req(**own | given)


def named(guidance, **more):
    return {"diffusers_kwargs": {"basinescape": {"guidance": guidance.to_dict(), **more}}}


def config(post=lambda batch, noise_pred, noise_pred_cond: noise_pred):
    return SimpleNamespace(
        get_classifier_free_guidance_scale=lambda batch, scale: scale,
        slice_noise_pred=lambda noise, latents: noise,
        postprocess_cfg_noise=post,
    )


def arguments(parallel=False, **given):
    return SimpleNamespace(
        pipeline_config=config(**given), enable_cfg_parallel=parallel, comfyui_mode=False, disable_autocast=True
    )


def denoise(server, extra, rows=slice(None), args=None, **given):
    """(latents, the entries of the response, the calls of the network)."""
    stage, batch = server.stage(network), batch_of(rows, extra=extra, **given)
    stage.forward(batch, args or arguments(), server.policy.CFGPolicy())
    return batch.latents, (batch.usage or {}).get("basinescape"), stage.calls


def test_constant_guidance_is_the_servers_own(server):
    stock, told, _ = denoise(server, {})
    found, facts, _ = denoise(server, named(Guidance.cfg(SCALE)))
    assert told is None and close(found, stock)
    assert [one["transition_step"] for one in facts] == [0, 0, 0] and all(len(one["noise_gap"]) == STEPS for one in facts)
    assert torch.equal(denoise(server, named(Guidance.cfg(SCALE)), is_warmup=True)[0], stock)
    rescaled, _, _ = denoise(server, {}, guidance_rescale=0.7)
    assert close(denoise(server, named(Guidance.cfg(SCALE)), guidance_rescale=0.7)[0], rescaled)
    assert not close(rescaled, stock)


@pytest.mark.parametrize("guidance", [DELAYED, OPPOSITE, MINIMUM, Guidance.delayed(SCALE, until=At(700), rule="apg")], ids=repr)
def test_it_is_what_the_definition_says(server, guidance):
    found, facts, _ = denoise(server, named(guidance))
    check(found, facts, [guidance] * 3)


def test_what_has_a_default_may_be_left_out(server):
    short = {"scale": SCALE, "until": {"rule": "At", "timestep": 700}}
    found, _, _ = denoise(server, {"diffusers_kwargs": {"basinescape": {"guidance": short}}})
    assert torch.equal(found, denoise(server, named(DELAYED))[0])


def check(found, facts, guidance, rows=slice(None)):
    scheduler, x, prompt = scheduler_of(), batch_of(rows).latents, prompts()[rows].double()
    sigmas = scheduler.sigmas.double()

    def predict(x, k, i):
        return tuple(network(x, scheduler.timesteps[k], one) for one in (0 * prompt[i : i + 1], prompt[i : i + 1]))

    def step(x, guided, k):
        return x + (sigmas[k + 1] - sigmas[k]) * guided

    latents, transitions, gaps = oracle.samples(predict, step, x, (1000 * sigmas[:-1]).tolist(), guidance)
    assert [one["transition_step"] for one in facts] == transitions.tolist()
    assert len(set(transitions.tolist())) > 1 or guidance[0].until != MINIMUM.until
    assert close(found.double(), latents)
    seen = torch.tensor([[float("nan") if gap is None else gap for gap in one["noise_gap"]] for one in facts])
    assert close(*oracle.known(seen, gaps))


def test_a_branch_without_weight_is_not_made(server):
    _, facts, calls = denoise(server, named(DELAYED))
    alone = facts[0]["transition_step"]
    assert 0 < alone < STEPS and len(calls) == 2 * STEPS - alone
    assert [gap is None for gap in facts[0]["noise_gap"]] == [k < alone for k in range(STEPS)]
    assert len(denoise(server, named(OPPOSITE))[2]) == 2 * STEPS


def test_requests_of_one_batch_go_their_own_ways(server):
    each = [DELAYED, MINIMUM, Guidance.cfg(2.0)]
    whole = [named(one)["diffusers_kwargs"]["basinescape"] for one in each]
    together, facts, _ = denoise(server, {"basinescape": whole})
    check(together, facts, each)
    for i, one in enumerate(each):
        alone, told, _ = denoise(server, named(one), slice(i, i + 1))
        assert torch.equal(alone[0], together[i]) and told[0]["transition_step"] == facts[i]["transition_step"]


@pytest.mark.parametrize("guidance", [DELAYED, MINIMUM], ids=repr)
def test_two_ranks_agree_with_one(server, guidance):
    alone, facts, _ = denoise(server, named(guidance, judge=True))
    made = sglang_server.on_two_ranks(lambda rank: denoise(server, named(guidance, judge=True), args=arguments(parallel=True)))
    for found, told, calls in made:
        assert torch.equal(found, alone) and told == facts
        assert len(calls) == STEPS + PROBES  # one of the branches in each, or the same one on both


def test_a_models_own_renormalisation_is_for_weights_above_one(server):
    def post(batch, noise_pred, noise_pred_cond):
        return noise_pred * (noise_pred_cond.norm(dim=-1, keepdim=True) / noise_pred.norm(dim=-1, keepdim=True))

    stock, _, _ = denoise(server, {}, args=arguments(post=post))
    assert close(denoise(server, named(Guidance.cfg(SCALE)), args=arguments(post=post))[0], stock)
    below = Guidance.cfg(-1.0)
    assert torch.equal(denoise(server, named(below), args=arguments(post=post))[0], denoise(server, named(below))[0])


def test_pictures_are_judged_and_a_guards_begun_again(server):
    latents, facts, _ = denoise(server, named(Guidance.cfg(SCALE), judge=True))
    prompt = prompts()

    def predict(x, timesteps):
        return network(x, timesteps[0], 0 * prompt), network(x, timesteps[0], prompt)

    expected = judge(predict, Probe.of(scheduler_of()), latents, [0, 1, 2]).score
    scores = torch.tensor([one["score"] for one in facts])
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-6) and len(set(scores.tolist())) == 3
    line = float(scores.sort().values[1])  # the lowest two pass at once
    guard = Guidance.guard(SCALE, threshold=line, later=100.0, attempts=[DELAYED, OPPOSITE])
    made, told, _ = denoise(server, named(guard))
    worst = int(scores.argmax())
    assert [one["attempts"] for one in told] == [1 + (i == worst) for i in range(3)]
    assert not any(one["suspect"] for one in told)
    kept = [i for i in range(3) if i != worst]
    assert torch.equal(made[kept], latents[kept]) and not torch.equal(made[worst], latents[worst])
    hopeless = Guidance.guard(SCALE, threshold=-100.0, later=-100.0, attempts=[DELAYED])
    _, told, _ = denoise(server, named(hopeless))
    assert all(one["suspect"] and one["attempts"] == 2 for one in told)


def test_a_run_begins_anew(server):
    stage, args, policy = server.stage(network), arguments(), server.policy.CFGPolicy()
    first = stage.forward(batch_of(extra=named(MINIMUM)), args, policy)
    fails = server.stage(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fails.forward(batch_of(extra=named(MINIMUM)), args, policy)
    again = stage.forward(batch_of(extra=named(MINIMUM)), args, policy)
    assert torch.equal(first.latents, again.latents) and first.usage == again.usage


def test_requests_share_a_batch_under_one_rule(server):
    def request(guidance, seed):
        extra = {} if guidance is None else named(guidance)
        return Req(
            sampling_params=SamplingParams(f"prompt {seed}", seed, **extra),
            extra=dict(extra),
            profile=False,
            return_file_paths_only=False,
            report_progress=False,
            request_id=str(seed),
        )

    scheduler = server.scheduler()
    reqs = [request(DELAYED, 1), request(Guidance.cfg(3.0), 2)]
    made = scheduler._try_merge_generation_reqs(reqs)
    assert made.prompt == ["prompt 1", "prompt 2"]
    assert [one.guidance for one in server.ours.asked_of(made)] == [DELAYED, Guidance.cfg(3.0)]
    wrong = request(DELAYED, 2)
    wrong.extra["diffusers_kwargs"]["basinescape"]["guidance"] = {}  # it is its own error, not the scheduler's
    for other in (wrong, request(None, 2), request(Guidance.cfg(3.0, rule="apg"), 2)):
        assert scheduler._try_merge_generation_reqs([reqs[0], other]) is None
    output = sglang_server.OutputBatch(output=torch.zeros(2, 1), usage={"basinescape": ["first", "second"]})
    assert [one.usage["basinescape"] for one in scheduler._split_batched_output(output, reqs)] == [["first"], ["second"]]
    merged = sglang_server.OutputBatch()
    for told in ("first", "second"):
        server.worker._merge_expanded_singletons(merged, sglang_server.OutputBatch(usage={"basinescape": [told]}))
    assert merged.usage == {"basinescape": ["first", "second"]}


@pytest.mark.parametrize(
    ("guidance", "given", "told"),
    [
        (DELAYED, {"do_classifier_free_guidance": False}, "give a negative_prompt"),
        (DELAYED, {"guidance_scale_2": 3.0}, "guidance_scale_2 is not followed"),
        (DELAYED, {"cfg_gate_step": 0.5}, "use Guidance's interval"),
        (MINIMUM, {"did_sp_shard_latents": True}, r"use At\(timestep=...\)"),
        (Guidance.cfg(2.0, rule="apg"), {"guidance_rescale": 0.5}, "stand beside the rule 'apg'"),
        (Guidance.guard(4.0), {"image_latent": torch.zeros(1)}, "name plain guidance"),
        (Guidance.guard(4.0), {"enable_teacache": True}, "cannot be judged"),
        (Guidance.cfg(2.0, restart=(100, 500, 2)), {}, "goes back in the steps"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_work(server, guidance, given, told):
    stage = server.stage(network)
    with pytest.raises(ValueError, match=told):
        stage.forward(batch_of(extra=named(guidance), **given), arguments(), server.policy.CFGPolicy())
    assert not stage.calls


def test_a_cache_that_counts_the_networks_calls_is_refused_before_work(server):
    stage = server.stage(network)
    stage._cache_dit_enabled = True
    stage.forward(batch_of(extra={}), arguments(), server.policy.CFGPolicy())
    stage.calls.clear()
    with pytest.raises(ValueError, match="set enable_cache_dit to false"):
        stage.forward(batch_of(extra=named(DELAYED)), arguments(), server.policy.CFGPolicy())
    assert not stage.calls


def test_the_log_tells_what_http_responses_leave_out(server, caplog):
    caplog.set_level(logging.INFO)
    _, facts, _ = denoise(server, named(Guidance.guard(SCALE)))
    told = [one for one in caplog.records if one.name == "basinescape.hosts.sglang" and "picture" in one.getMessage()]
    assert len(told) == len(facts) == 3
    for i, (record, entry) in enumerate(zip(told, facts, strict=True)):
        assert f"picture {i}: transition_step {entry['transition_step']}, score {entry['score']}" in record.getMessage()
        assert (record.levelno == logging.WARNING) == entry["suspect"]
    denoise(server, named(Guidance.delayed(SCALE, until=FirstMinimum(drop=0.99))))
    assert "3 of 3 samples had no transition" in caplog.text


def test_a_model_with_a_loop_of_its_own_is_told_of(server, caplog):
    def execute(extra, forward, **given):
        batch = batch_of(extra=extra, **given)
        caplog.clear()
        server.worker()._execute_forward_common(batch, forward_fn=lambda: forward(batch) or batch, return_req=False)
        return [line for line in caplog.messages if "nothing was guided" in line]

    def guided(batch):
        server.stage(network).forward(batch, arguments(), server.policy.CFGPolicy())

    def own(batch):
        return None

    assert len(execute(named(DELAYED), own)) == 1
    assert not execute({}, own) and not execute(named(DELAYED), own, is_warmup=True)
    assert not execute(named(DELAYED), guided) and not execute(named(DELAYED), guided, do_classifier_free_guidance=False)


def test_unknown_names_and_policies_are_refused(server):
    class Own(server.policy.CFGPolicy):
        pass

    class Builds(server.policy.CFGPolicy):
        def build(self, *given):
            return Builds()

    stage = server.stage(network)
    with pytest.raises(ValueError, match="its own Own"):
        stage.forward(batch_of(extra=named(DELAYED)), arguments(), Own())
    with pytest.raises(ValueError, match="builds its own Builds"):
        stage.forward(batch_of(extra=named(DELAYED)), arguments(), Builds())
    with pytest.raises(ValueError, match="basinescape takes guidance"):
        stage.forward(batch_of(extra=named(DELAYED, juge=True)), arguments(), server.policy.CFGPolicy())
    batch = batch_of(extra=named(DELAYED))
    batch.timesteps = batch.timesteps - 1
    with pytest.raises(ValueError, match="none of the scheduler's own"):
        stage.forward(batch, arguments(), server.policy.CFGPolicy())
    assert not stage.calls
