"""The stand-in of ComfyUI does what ComfyUI's core documents: predictions, clones, the order of a guider's functions."""

import comfy
import pytest
import torch

SIGMA = torch.tensor([0.3, 2.0])


def drawn():
    rng = torch.Generator().manual_seed(0)
    return torch.randn((2, 5), generator=rng), torch.randn((2, 5), generator=rng)


@pytest.mark.parametrize("kind", ["EPS", "V", "CONST"])
def test_a_network_that_knows_the_noise_gives_the_clean_latents(kind):
    (clean, noise), sampling = drawn(), getattr(comfy, kind)()
    share = SIGMA / 5 if kind == "CONST" else SIGMA
    s = share[:, None]
    noisy = sampling.noise_scaling(s, noise, clean)
    ratio = (1 + s**2).sqrt()
    output = {"EPS": noise, "V": (noise - s * clean) / ratio, "CONST": noise - clean}[kind]
    torch.testing.assert_close(sampling.calculate_denoised(share, output, noisy), clean)


def test_a_network_of_noise_gets_latents_of_constant_size_and_the_timestep_of_its_sigma():
    sampling = comfy.EPS()
    sigmas = sampling.log_sigmas.exp()
    assert torch.equal(sampling.timestep(sigmas), torch.arange(1000)) and sampling.sigma_max == sigmas[-1]
    clean, noise = torch.randn((2, 200_000), generator=torch.Generator().manual_seed(0))
    given = sampling.calculate_input(torch.tensor([3.0]), (clean + 3 * noise)[None])
    torch.testing.assert_close(given.std(), torch.tensor(1.0), atol=0.01, rtol=0)


def patcher():
    return comfy.Patcher(lambda x, t, cond: cond * torch.ones_like(x), comfy.EPS())


def guided(patcher, cfg=3.0, **conds):
    return comfy.CFGGuider(patcher, cfg, **{"positive": 2.0, "negative": 0.5} | conds)


def once(model, x, sigmas, extra_args, disable):
    """A sampler that calls its model once."""
    return model(x, sigmas[0] * x.new_ones(len(x)), **extra_args)


def test_a_clone_is_changed_alone():
    first = patcher()
    first.add_wrapper_with_key("outer_sample", "a", "wrapper")
    other = first.clone()
    other.model_options["transformer_options"]["x"] = 1
    other.add_wrapper_with_key("outer_sample", "a", "further")
    other.set_model_sampler_post_cfg_function(print)
    assert first.model_options == {"transformer_options": {}} and other.model is first.model
    assert first.wrappers == {"outer_sample": {"a": ["wrapper"]}} and other.wrappers["outer_sample"]["a"] == [
        "wrapper",
        "further",
    ]
    other.remove_wrappers_with_key("outer_sample", "a")
    assert other.wrappers == {"outer_sample": {}}


def test_plain_guidance_combines_denoised_predictions():
    x, sigma = drawn()[0], torch.tensor([2.0, 2.0])
    found = guided(patcher()).predict_noise(x, sigma, patcher().model_options)
    torch.testing.assert_close(found, x - 2.0 * (0.5 + 3 * (2.0 - 0.5)))


def test_at_scale_one_the_unconditional_prediction_is_made_only_on_request():
    model, made = patcher(), []
    model.model.network = lambda x, t, cond: made.append(cond) or cond * torch.ones_like(x)
    x, sigma = drawn()[0], torch.tensor([2.0, 2.0])
    torch.testing.assert_close(guided(model, 1.0).predict_noise(x, sigma, model.model_options), x - 4)
    assert made == [2.0]
    model.set_model_sampler_cfg_function(lambda args: args["cond"], disable_cfg1_optimization=True)
    guided(model, 1.0).predict_noise(x, sigma, model.model_options)
    assert made == [2.0, 2.0, 0.5]


def test_functions_of_the_model_follow_each_other():
    """The CFG function is given noise and returns it; what comes after sees the denoised result of all before."""
    model, x = patcher(), drawn()[0]

    def cfg(args):
        torch.testing.assert_close(args["cond"], 4 * torch.ones_like(x))
        torch.testing.assert_close(args["cond_denoised"], args["input"] - args["cond"])
        return args["uncond"]

    model.set_model_sampler_cfg_function(cfg)
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 1)
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 2)
    found = guided(model).predict_noise(x, torch.tensor([2.0, 2.0]), model.model_options)
    torch.testing.assert_close(found, 2 * (x - 1 + 1))


def test_a_sampling_run_is_wrapped_in_order_and_told_its_schedule():
    model, order, sigmas = patcher(), [], torch.tensor([2.0, 0.0])
    for key in "ab":
        model.add_wrapper_with_key(
            "outer_sample", key, lambda executor, *given, key=key, **named: order.append(key) or executor(*given, **named)
        )
    model.set_model_sampler_calc_cond_batch_function(
        lambda args: (
            order.append(args["model_options"]["transformer_options"]["sample_sigmas"])
            or comfy.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], args["model_options"])
        )
    )
    x = drawn()[0]
    found = guided(model).sample(once, x, sigmas)
    torch.testing.assert_close(found, x - 2.0 * (0.5 + 3 * 1.5))
    assert order[:2] == ["a", "b"] and order[2] is sigmas and "sample_sigmas" not in model.model_options["transformer_options"]
