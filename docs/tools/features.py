"""Which tests show which feature: the columns of the tables on the page "What is supported". Cells are counted, not written."""

STOCK, USE, GUARD = "tests/models/test_stock.py", "tests/models/test_use.py", "tests/hosts/test_guard.py"
PIPELINES, MODULAR, JUDGE = (
    "tests/hosts/test_escape_pipeline.py",
    "tests/hosts/test_modular.py",
    "tests/detection/test_judge.py",
)
KDIFFUSION, COMFYUI, LOOP = "tests/hosts/test_kdiffusion.py", "tests/hosts/test_comfyui.py", "tests/hosts/test_own_loop.py"

# host -> feature -> tests whose cases are each of one pipeline
MODELS: dict[str, dict[str, tuple[str, ...]]] = {
    "`Sampler`": {
        "diffusers' own images": (
            f"{STOCK}::test_plain_cfg_is_the_pipelines_own",
            "tests/test_sampler.py::test_pipelines_of_other_shapes_give_the_pipelines_own_images",
        ),
        "delayed, opposite": (f"{STOCK}::test_delayed_and_opposite_are_a_plain_loop_over_the_stock_transformer",),
        "guard": (f"{JUDGE}::test_every_family_runs_under_a_guard_alone_as_in_a_batch",),
        "judge": (f"{JUDGE}::test_pictures_of_every_family_are_judged_alone_as_in_a_batch",),
        "lean network": ("tests/models/test_lean.py::test_it_samples_the_same",),
    },
    "`escape`": {
        "diffusers' own images": (f"{PIPELINES}::test_plain_cfg_is_the_pipelines_own",),
        "other weights": (f"{PIPELINES}::test_other_weights_are_the_predictions_they_say",),
        "guidance by sample": (f"{PIPELINES}::test_samples_of_a_batch_go_their_own_ways",),
        "guard": (f"{GUARD}::test_every_pipeline_is_judged_and_begun_again", f"{GUARD}::test_verdicts_are_the_samplers"),
    },
    "modular": {
        "diffusers' own images": (f"{MODULAR}::test_plain_cfg_is_the_stock_guiders",),
        "guidance by sample": (f"{MODULAR}::test_samples_of_a_batch_go_their_own_ways",),
        "judge": (f"{MODULAR}::test_it_judges_as_the_stock_pipeline",),
    },
}

# host -> feature -> tests
HOSTS: dict[str, dict[str, tuple[str, ...]]] = {
    "modular diffusers": {
        "the sampler's images": (f"{MODULAR}::test_it_gives_the_samplers_images",),
        "judge": (f"{MODULAR}::test_it_judges_as_the_stock_pipeline",),
        "guidance by sample": (f"{MODULAR}::test_samples_of_a_batch_go_their_own_ways",),
        "a prediction nobody needs is not made": (f"{MODULAR}::test_a_prediction_that_nobody_needs_is_not_made",),
        "refuses what it cannot do": (f"{MODULAR}::test_what_it_cannot_follow_is_refused",),
    },
    "k-diffusion": {
        "the sampler's images": (f"{KDIFFUSION}::test_it_gives_the_samplers_images",),
        "judge": (f"{KDIFFUSION}::test_it_judges_as_the_sampler",),
        "guidance by sample": (f"{KDIFFUSION}::test_samples_of_a_batch_go_their_own_ways",),
        "a prediction nobody needs is not made": (f"{KDIFFUSION}::test_a_prediction_that_nobody_needs_is_not_made",),
        "refuses what it cannot do": (f"{KDIFFUSION}::test_what_it_cannot_do_is_one_line",),
    },
    "ComfyUI": {
        "the sampler's images": (f"{COMFYUI}::test_plain_guidance_is_what_the_sampler_would_do",),
        "judge": (f"{COMFYUI}::test_the_second_node_judges_as_the_other_hosts",),
        "guidance by sample": (f"{COMFYUI}::test_a_run_begins_anew_and_samples_go_their_own_ways",),
        "a prediction nobody needs is not made": (f"{COMFYUI}::test_the_conditional_prediction_is_made_where_it_has_a_weight",),
        "refuses what it cannot do": (f"{COMFYUI}::test_what_cannot_be_followed_is_refused",),
    },
    "your own loop": {
        "the sampler's images": (f"{LOOP}::test_a_loop_of_ones_own_is_the_sampler",),
        "judge": (f"{LOOP}::test_a_loop_of_ones_own_judges_as_the_sampler",),
        "guidance by sample": (f"{LOOP}::test_each_sample_may_have_a_guidance_of_its_own",),
        "a prediction nobody needs is not made": (f"{LOOP}::test_a_prediction_that_nobody_needs_is_not_asked_for",),
        "refuses what it cannot do": (f"{LOOP}::test_what_it_cannot_do_is_one_line",),
    },
}
