"""Transformer pipelines in our own loop: equal to diffusers' own call, and to a plain loop over its transformer."""

import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler, escape
from basinescape.kernels import definition
from families import CASES
from rounding import assert_same_but_for_rounding

STEPS, SCALE = 4, 4.0
PROMPTS, SEEDS, NEGATIVE = ["a picture of a cat", "a frog"], [5, 6], ["fog and rain", "a"]  # of different lengths


def ours(name, pipe, guidance, prompts=PROMPTS, seeds=SEEDS, negative=NEGATIVE, output="latent", **options):
    given = {"negative_prompt": negative, "output": output, **CASES[name].options, **options}
    return Sampler.from_pipeline(pipe)(prompts, seeds, STEPS, guidance, progress=False, **given)


@pytest.mark.parametrize("name", CASES)
def test_plain_cfg_is_the_pipelines_own(pipes, name):
    pipe = pipes(name)

    def stock():
        return torch.from_numpy(CASES[name].stock(pipe, PROMPTS, SEEDS, STEPS, SCALE, NEGATIVE))

    found = torch.from_numpy(ours(name, pipe, Guidance.cfg(SCALE), output="np").images)
    assert found.std() > 0.01
    assert_same_but_for_rounding(found, stock(), pipe, stock)


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance.delayed(SCALE, until=At(800)),
        Guidance.delayed(SCALE, until=FirstMinimum(latest=2)),
        Guidance.opposite(1.0, scale=SCALE, until=At(800)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["sd3", "pixart", "flux", "qwen", "wan"])
def test_the_pipelines_own_call_inside_escape_gives_our_images(pipes, name, guidance):
    pipe = pipes(name)
    with escape(pipe, guidance) as run:
        found = CASES[name].stock(pipe, PROMPTS, SEEDS, STEPS, 2.0, NEGATIVE)
    expected = ours(name, pipe, guidance, output="np")
    assert run.transition_step.tolist() == expected.transition_step.tolist() and min(run.transition_step) > 0
    assert abs(found - expected.images).max() <= 1 / 255


class Stock:
    """What the pipeline's own call tells its transformer and has of its scheduler, for a loop written out."""

    def __init__(self, name, pipe):
        self.pipe, self.calls = pipe, []
        hook = pipe.transformer.register_forward_pre_hook(self._record, with_kwargs=True)
        try:
            CASES[name].stock(pipe, PROMPTS, SEEDS, STEPS, SCALE, NEGATIVE, output="latent")
        finally:
            hook.remove()
        self.doubled = len(self.calls) == STEPS
        first = self.calls[0]["hidden_states"]
        self.noise = first.chunk(2)[0] if self.doubled else first
        self.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        self.timesteps = pipe.scheduler.timesteps

    def _record(self, module, given, named):
        self.calls.append({**named, "hidden_states": given[0]} if given else dict(named))

    def predicted(self, k, x):
        """(uncond, cond) of step k."""
        if self.doubled:
            told = {**self.calls[k], "hidden_states": torch.cat([x, x])}
            return [half[:, : x.shape[1]] for half in self.pipe.transformer(**told)[0].chunk(2)]
        cond, uncond = (self.pipe.transformer(**{**self.calls[2 * k + i], "hidden_states": x})[0] for i in (0, 1))
        return uncond, cond


@torch.no_grad()
def plain_loop(name, pipe, guidance, stock):
    """The method's definitions over the stock transformer: latents and transition steps."""
    x, gaps, left, own = stock.noise.clone(), [], torch.full((len(SEEDS),), -1), pipe.scheduler
    own.set_begin_index(0)
    own._step_index = None
    if hasattr(own, "model_outputs"):  # a multistep solver begins afresh
        own.model_outputs, own.lower_order_nums, own.last_sample = [None] * len(own.model_outputs), 0, None
    for k, t in enumerate(stock.timesteps):
        u, c = stock.predicted(k, x)
        gaps.append((c - u).flatten(1).norm(dim=1))
        for i in range(len(x)):
            if isinstance(guidance.until, At):
                leaves = t <= guidance.until.timestep
            else:
                minimum = k >= 2 and definition.is_minimum(*(gap[i] for gap in gaps[-3:]))
                leaves = minimum or k == guidance.until.latest
            if left[i] < 0 and leaves:
                left[i] = k
        w = torch.where(left >= 0, guidance.scale, guidance.before).view(-1, *[1] * (x.ndim - 1))
        guided = u + w * (c - u)
        if name == "qwen":
            longer = c.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
            guided = torch.where(w > 1, guided * longer, guided)
        x = own.step(guided, t, x, return_dict=False)[0]
    return x, left


@pytest.mark.parametrize("name", CASES)
def test_delayed_and_opposite_are_a_plain_loop_over_the_stock_transformer(pipes, name):
    pipe = pipes(name)
    stock = Stock(name, pipe)
    for guidance in (
        Guidance.delayed(SCALE, until=At(800)),
        Guidance.opposite(2.0, scale=SCALE, until=FirstMinimum(latest=3)),
    ):
        expected, left = plain_loop(name, pipe, guidance, stock)
        found = ours(name, pipe, guidance)
        assert found.transition_step.tolist() == left.tolist() and 0 < left.min() < STEPS
        assert found.noise_gap.nan_to_num(1).min() > 1e-3
        again = lambda guidance=guidance: plain_loop(name, pipe, guidance, stock)[0]  # noqa: E731
        assert_same_but_for_rounding(found.latents, expected, pipe, again)


@pytest.mark.parametrize("name", CASES)
def test_a_sample_is_the_same_alone_in_another_order_and_from_embeddings(pipes, name):
    pipe, guidance = pipes(name), Guidance.delayed(SCALE, until=FirstMinimum(latest=2))
    both = ours(name, pipe, guidance, [*PROMPTS, "a longer picture of a cat"], [5, 6, 7], None)
    for order in ([1], [2, 0]):
        texts, seeds = ([*PROMPTS, "a longer picture of a cat"][i] for i in order), [5 + i for i in order]
        texts = list(texts)
        found = ours(name, pipe, guidance, texts, seeds, None)
        again = lambda texts=texts, seeds=seeds: ours(name, pipe, guidance, texts, seeds, None).latents  # noqa: E731
        assert_same_but_for_rounding(found.latents, both.latents[order], pipe, again)
        assert found.transition_step.tolist() == both.transition_step[order].tolist()
