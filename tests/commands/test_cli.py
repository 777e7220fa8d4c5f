"""The command line: options that reach the sampler, and one clear line for each bad input."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from basinescape import At, Calibration, FirstMinimum, Guidance, Sampler, Settled
from basinescape.bench import cli
from basinescape.bench.scenario import PRESETS, prompts
from basinescape.bulk import ray
from basinescape.calibration.baseline import Baseline
from basinescape.commands import model_loading
from basinescape.models.sd import StableDiffusion
from bulkruns import QUICK, run, said, sound, write
from PIL import Image
from typer.main import get_command

COMMANDS = tuple(get_command(cli.app).commands)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", (), "no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', (), "line 2"),
        ('{"prompt": "a", "id": "../x"}', (), "id must be"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "X"}', (), "already used in line 1"),
        ('{"prompt": "a"}', ("--scheduler", "nope"), "scheduler"),
        ('{"prompt": "a"}', ("--until", "soon"), "until"),
        ('{"prompt": "a"}', ("--until", "settled", "--steps", "4"), "no unguided gaps of these steps"),
        (
            '{"prompt": "a"}',
            ("--guidance", "guard", "--until", "500"),
            "which guidance guard does not have: leave it out, or take --guidance delayed or opposite",
        ),
        ('{"prompt": "a"}', ("--guidance", "cfg", "--until", "500"), "which guidance cfg does not have: leave it out, or take"),
        ('{"prompt": "a"}\n{"prompt": "b", "width": 63}', (), "line 2: width must be a multiple of"),
        ('{"prompt": "a", "guidance": "guarded"}', (), "line 1: guidance must be one of cfg, delayed, opposite, guard"),
        ('{"prompt": "a"}', ("--count", "0"), "count must be a whole number of at least 1, got 0"),
        ('{"prompt": "a"}', ("--before", "-1"), "before is -1.0, which guidance guard does not have: leave it out, or take"),
        ('{"prompt": "a"}', ("--opposite-scale", "3", "--until", "500"), "take --guidance opposite"),
        ('{"prompt": "a"}', ("--earliest", "3"), "earliest is 3, which guidance guard does not have"),
        ('{"prompt": "a"}', ("--latest", "3", "--guidance", "delayed"), "give --until auto, too"),
        ('{"prompt": "a"}', ("--similarity", "pixels"), "give --training-images or --dedup, too"),
        ('{"prompt": "a"}', ("--threshold", "0.5"), "give --training-images or --dedup, too"),
        ('{"prompt": "a"}', ("--workers", "2"), "give --engine ray, too"),
        ('{"prompt": "a"}', ("--restart", "300"), "restart must be LOW,HIGH,TIMES"),
        ('{"prompt": "a"}', ("--restart", "500,300,1"), "restart must go back"),
        ('{"prompt": "a"}', ("--rule", "rescale", "--rule-option", "phi"), "rule_option must be a name and a number"),
        ('{"prompt": "a"}', ("--rule", "rescale", "--rule-option", "phi=9"), "phi must be a finite number"),
        ('{"prompt": "a"}', ("--rule-option", "phi=0.5"), "has no option 'phi'"),
        ('{"prompt": "a"}', ("--training-images", "/nowhere"), "does not exist"),
        ('{"prompt": "a"}', ("--capture", "--device", "cpu"), "capture records CUDA graphs"),
        ('{"prompt": "a"}', ("--dtype", "int3"), "dtype"),
        ('{"prompt": "a"}', ("--device", "abacus"), "device"),
        ('{"prompt": "a"}', ("--scale", "nan"), "scale"),
        ('{"prompt": "a"}', ("--steps", "0"), "steps"),
        ('{"prompt": "a"}', ("--batch-size", "0"), "batch_size"),
        ('{"prompt": "a"}', ("--model", "./missing"), "does not exist"),
        ('{"prompt": "a"}', ("--height", "63"), "height must be a multiple of"),
        ('{"prompt": "a"}', ("--width", "0"), "width must be a multiple of"),
        ('{"prompt": "a"}', ("--clip-skip", "-1"), "clip_skip must be a whole number from 0 to"),
        ('{"prompt": "a"}', ("--until", "6800"), "timestep must be at most 1000, which is noise (0 is the image); got 6800"),
        ('{"txt": "a"}', (), "line 1: unknown column 'txt': call it 'text'"),
        ('{"prompt": "a"}', ("--option", "height"), "option must be a name and a value, as height=768; got 'height'"),
        (
            '{"prompt": "a"}',
            ("--option", "num_frames=9"),
            "num_frames: no option of StableDiffusionPipeline, whose options are height, width, ",
        ),
        ('{"prompt": "a"}', ("--option", "height=tall"), "height must be a multiple of"),
        ('{"prompt": "a"}', ("--clip-skip", "99"), "clip_skip must be a whole number from 0 to"),
    ],
)
def test_bad_input_ends_with_one_line_before_any_work(tmp_path, monkeypatch, capsys, text, options, says):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text(text)
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, *options)
    assert code == 2 and says in error.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--steps", "many"), "Invalid value for '--steps'"),
        (("--scheduling", "x"), "No such option"),
        (("--prompts",), "requires an argument"),
        ((), "Missing option '--prompts'"),
        (("--prompts", "/dev/null", "--out", "out"), "holds no prompts"),
    ],
)
def test_a_wrong_command_line_is_one_line(monkeypatch, capsys, options, says):
    code, error = run(monkeypatch, capsys, *options)
    assert code == 2 and says in error and len(error.splitlines()) == 1 and error.startswith("basinescape: ")


def test_an_error_nobody_foresaw_is_one_line_unless_asked_for_more(tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("WARNING", "basinescape")  # sets the level back after the test

    def broken(*_, **__):
        raise KeyError("sample_size")

    monkeypatch.setattr(Sampler, "from_pretrained", broken)
    prompts = tmp_path / "prompts.jsonl"
    write(prompts, 1)
    arguments = ("--prompts", prompts, "--out", tmp_path / "out")
    code, error = run(monkeypatch, capsys, *arguments)
    assert code == 2 and error == "basinescape: KeyError: 'sample_size' (set BASINESCAPE_DEBUG=1 to see where)\n"
    monkeypatch.setenv("BASINESCAPE_DEBUG", "1")
    with pytest.raises(KeyError):
        monkeypatch.setattr(sys, "argv", ["basinescape", "generate", *map(str, arguments)])
        cli.main()


def test_whose_pictures_these_are_is_said_first_where_no_model_is_given(tmp_path, monkeypatch, capsys, caplog, drawn):
    write(tmp_path / "p.jsonl", 1)
    for given, told in (((), True), (("--model", "tiny"), False)):
        caplog.clear()
        assert run(monkeypatch, capsys, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", *QUICK, *given)[0] == 0
        assert (
            caplog.messages[:1]
            == ["no --model is given: the pictures are of 'tiny', a small one that ships, to try things out"]
        ) == told


HEAVY = {"torch", "diffusers", "transformers", "triton", "numpy", "PIL", "matplotlib", "jinja2"}


@pytest.mark.process
def test_help_is_quick_and_fits(monkeypatch, tmp_path):
    """Of every command: it loads nothing heavy, and no option's name is cut off at 80 columns."""
    code = (
        "import sys\n"
        "from basinescape.bench import cli\n"
        f"for name in ('', {', '.join(map(repr, COMMANDS))}):\n"
        "    sys.argv = ['basinescape', *name.split(), '--help']\n"
        "    try: cli.main()\n"
        "    except SystemExit: pass\n"
        f"print({HEAVY} & set(sys.modules), file=sys.stderr)"
    )
    monkeypatch.setenv("COLUMNS", "80")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n" and done.stdout.count("Usage: basinescape") == 1 + len(COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 80 and "…" not in done.stdout
    for command in get_command(cli.app).commands.values():
        for option in command.params:
            assert option.param_type_name == "argument" or any(f"{name} " in done.stdout for name in option.opts)


def test_pickled_weights_are_refused_with_one_line(pipe, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.jsonl"
    write(prompts, 1)
    pipe.save_pretrained(tmp_path / "model", safe_serialization=False)
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", tmp_path / "out", "--model", tmp_path / "model")
    assert code == 2 and "pickle" in error and not (tmp_path / "out").exists()


def test_the_commands_options_reach_the_sampler(tmp_path, monkeypatch, capsys, drawn):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,seed,negative_prompt\na cat,7,\na dog,8,blurry\n")
    options = (
        "--height",
        128,
        "--width",
        192,
        "--clip-skip",
        1,
        "--negative-prompt",
        "ugly",
        "--guidance",
        "cfg",
        "--scale",
        3,
    )
    assert run(monkeypatch, capsys, "--prompts", prompts, "--out", tmp_path / "out", *QUICK[:2], *QUICK[-2:], *options)[0] == 0
    (asked,) = drawn.asked
    assert (asked["prompts"], asked["negative_prompt"]) == (["a cat", "a dog"], ["ugly", "blurry"])
    assert (asked["height"], asked["width"], asked["clip_skip"]) == (128, 192, 1)
    assert [line["seed"] for line in sound(tmp_path / "out")] == [7, 8]
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (stored["height"], stored["width"], stored["clip_skip"], stored["negative_prompt"]) == (128, 192, 1, "ugly")
    assert Guidance.from_dict(stored["guidance"]) == Guidance.cfg(3)


def planned_guard(out):
    return Guidance.from_dict(json.loads((out / "run.json").read_text())["guidance"])


@pytest.mark.slow
def test_a_model_is_guarded_and_with_a_calibration_as_that_was_made(tmp_path, monkeypatch, capsys, caplog, mine):
    """Scheduler, steps and scale too, beside the model or given; what cannot be had of it is said."""
    prompts, made = tmp_path / "prompts.jsonl", mine / "calibration.json"
    write(prompts, 3)
    asked = ("--prompts", prompts, "--model", mine, "--device", "cpu")
    assert run(monkeypatch, capsys, *asked, "--steps", 5, "--out", tmp_path / "before") == (0, "")
    assert planned_guard(tmp_path / "before") == Guidance.guard(7.5)
    own = (*asked, "--steps", 5, "--scheduler", "euler", "--scale", 5)
    arguments = ["basinescape", "calibrate", "--out", made, *own, "--no-progress"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None) and Calibration.load(made).images == 3
    assert str(tmp_path) not in made.read_text()
    code, error = run(monkeypatch, capsys, *asked, "--out", tmp_path / "few")
    assert code == 0 and "is of 3 pictures, and thresholds need 199: it is left out" in error
    assert planned_guard(tmp_path / "few") == Guidance.guard(7.5)  # and so is its scale
    code, error = run(monkeypatch, capsys, *asked, "--calibration", made, "--out", tmp_path / "asked")
    assert code == 2 and "3 ordinary pictures cannot tell: calibrate with 199 or more" in error
    assert not (tmp_path / "asked").exists()
    known = Calibration.load(made)
    looks = tuple((1.0 + i / 1000,) * 5 for i in range(200))
    replace(known, scores=tuple(i / 1000 for i in range(200)), first_gaps=looks).save(made)
    code, error = said(monkeypatch, capsys, *asked, "--out", tmp_path / "after")
    assert code == 0 and error.startswith("calibrated: ") and "5 steps, scale 5, EulerDiscreteScheduler" in error
    lines = sound(tmp_path / "after")
    assert all(line["attempts"] >= 1 and line["status"] == "ok" for line in lines)
    stored = json.loads((tmp_path / "after" / "run.json").read_text())
    assert planned_guard(tmp_path / "after") == Guidance.guard(5.0, Calibration.load(made))
    assert (stored["steps"], stored["scheduler"]["class"]) == (5, "EulerDiscreteScheduler")
    moved = made.rename(tmp_path / "elsewhere.json")
    assert run(monkeypatch, capsys, *asked, "--out", tmp_path / "after", "--calibration", moved)[0] == 0
    for i, (options, says) in enumerate(
        {
            ("--steps", 2): "no attempt is given up early",
            ("--scale", 3): "the calibration is of scale 5, not 3: the guard goes without it",
        }.items()
    ):
        code, error = run(monkeypatch, capsys, *asked, "--calibration", moved, *options, "--out", tmp_path / str(i))
        assert code == 0 and says in error + caplog.text and planned_guard(tmp_path / str(i)).early is None
    code, error = run(monkeypatch, capsys, *asked, "--calibration", tmp_path / "missing.json", "--out", tmp_path / "bad")
    assert code == 2 and "missing.json" in error and len(error.splitlines()) == 1 and not (tmp_path / "bad").exists()


def test_a_rule_reaches_the_sampler(tmp_path, monkeypatch, capsys, drawn):
    write(tmp_path / "p.jsonl", 1)
    options = ("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", *QUICK, "--rule", "cfg-zero")
    assert run(monkeypatch, capsys, *options)[0] == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["guidance"]["rule"] == "cfg-zero"
    code, error = run(monkeypatch, capsys, *options[:-1], "nope")
    assert code == 2 and "rule must be one of cfg, rescale" in error


def test_a_calibration_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    write(tmp_path / "p.jsonl", 1)
    arguments = ["basinescape", "calibrate", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "none" / "c.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "in a folder that exists" in capsys.readouterr().err


def planned(out):
    """The guidance of a run."""
    return Guidance.from_dict(json.loads((out / "run.json").read_text())["guidance"])


def test_more_options_reach_the_sampler(tmp_path, monkeypatch, capsys, drawn, mine):
    write(tmp_path / "p.jsonl", 3)
    base = ("--prompts", tmp_path / "p.jsonl", "--model", mine, "--steps", 4, "--device", "cpu")
    given = {
        ("--until", "auto", "--latest", 3): Guidance.delayed(7.5, until=FirstMinimum(latest=3)),
        ("--restart", "300,600,2", "--until", 600): Guidance.delayed(7.5, until=At(600), restart=(300, 600, 2)),
        ("--guidance", "cfg", "--rule", "rescale", "--rule-option", "phi=0.5"): Guidance.cfg(7.5, rule="rescale", phi=0.5),
        ("--guidance", "opposite", "--until", 600): Guidance.opposite(2.0, scale=7.5, until=At(600)),
    }
    code, error = said(monkeypatch, capsys, *base, "--out", tmp_path / "said", "--batch-size", 2, "--until", 600)
    assert code == 0 and error.startswith("guidance is delayed, as --until asks: no picture is judged")
    for i, (options, guidance) in enumerate(given.items()):
        assert run(monkeypatch, capsys, *base, "--out", tmp_path / str(i), "--batch-size", 2, *options) == (0, "")
        assert planned(tmp_path / str(i)) == guidance


def test_settled_and_the_transition_come_from_the_calibration(tmp_path, monkeypatch, capsys, drawn, mine):
    write(tmp_path / "p.jsonl", 1)
    ordinary = Baseline((1.0,) * 5, (2.0,) * 5, (0.5, 0.6, 0.7, 0.8, 0.9), 640.0)
    levels = (801.0, 601.0, 401.0, 201.0, 1.0)
    made = Calibration({}, 5, 7.5, levels, (1.0,) * 5, (0.1,), ((1.0,) * 5,), {}, ordinary)
    made.save(mine / "calibration.json")
    base = ("--prompts", tmp_path / "p.jsonl", "--model", mine, "--steps", 5, "--device", "cpu", "--scheduler", "ddim")
    until = {(): At(640.0), ("--until", "settled"): Settled(ordinary.unguided, 1.5, 1, 2), ("--until", 500): At(500)}
    for i, (options, rule) in enumerate(until.items()):
        code, error = run(monkeypatch, capsys, *base, "--out", tmp_path / str(i), "--guidance", "delayed", *options)
        assert (code, error, planned(tmp_path / str(i)).until) == (0, "", rule)


def test_what_needs_a_gpu_is_asked_of_a_clusters_workers_alone(monkeypatch):
    monkeypatch.setattr(ray, "cluster", lambda workers: (2, True))  # whose workers have GPUs
    loading = {"device": None, "dtype": None, "attention": "xformers", "allow_pickle": False, "compile": True, "capture": True}
    load, here = model_loading.for_workers("tiny", "own", loading, None)
    assert load.keywords == loading | {"device": "cuda", "dtype": "float16", "scheduler": "own"}
    assert model_loading.sampler("tiny", None, "own", None, **here).provenance["device"] == "cpu"
    _, here = model_loading.for_workers("tiny", "own", loading | {"attention": "flash"}, None)
    with pytest.raises(ValueError, match="attention must be one of sdpa, xformers, got 'flash'"):
        model_loading.sampler("tiny", None, "own", None, **here)


def test_copies_of_training_images_are_marked(tmp_path, monkeypatch, capsys, drawn):
    """Drawn pictures are of one colour each: like one another, and like the picture that has a mark of its own least of all."""
    write(tmp_path / "p.jsonl", 2)
    folder = tmp_path / "training" / "deep"
    folder.mkdir(parents=True)
    for i, prompt in enumerate(prompts(PRESETS["tiny"])["memorized"][:2]):
        shutil.copy(prompt.image, folder / f"{i}.png")
    own = Image.open(folder / "1.png").convert("RGB")

    def with_a_copy(model, latents, output, generators, **size):
        made = drawn.decode(model, latents, output, generators, **size)
        return replace(made, images=[own]) if generators[0].initial_seed() == 1 else made

    monkeypatch.setattr(StableDiffusion, "decode", with_a_copy)
    asked = ("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", "--training-images", folder.parent, *QUICK)
    code, error = run(monkeypatch, capsys, *asked, "--similarity", "pixels")
    plain, copied = sound(tmp_path / "out")
    assert (code, error) == (0, "1 marked as copies of training images (p1): see copy and nearest in manifest.jsonl\n")
    assert (copied["copy"], copied["nearest"], copied["measure"]) == (True, "deep/1.png", "pixels")
    assert copied["similarity"] == pytest.approx(1) and not plain["copy"] and plain["similarity"] < 0.5
    stored = json.loads((tmp_path / "out" / "run.json").read_text())["training_images"]
    assert stored.pop("sha256") and stored == {"images": 2, "thresholds": {"pixels": 0.81}}
    code, error = run(monkeypatch, capsys, *asked, "--similarity", "pixels", "--threshold", 0.9)
    assert code == 2 and "its training_images differ" in error
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:-99])
    code, error = run(monkeypatch, capsys, *asked, "--similarity", "pixels")
    assert code == 2 and "2.png' cannot be read" in error
    assert run(monkeypatch, capsys, *asked, "--similarity", "pixels", "--on-error", "skip")[0] == 0
