"""The generate command: its folder, its manifest, and one clear line for each bad input."""

import hashlib
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from basinescape import Guidance, Output, Sampler
from basinescape.bench import cli
from basinescape.generate import generate
from basinescape.prompts import Job
from PIL import Image

QUICK = ("--steps", 2, "--until", 500, "--device", "cpu")


def run(monkeypatch, capsys, *arguments):
    """Exit code and standard error of `basinescape generate`."""
    monkeypatch.setattr(sys, "argv", ["basinescape", "generate", "--no-progress", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


def test_a_folder_is_filled_and_refused_to_another_run(tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "a picture of a cat", "id": "cat"}\n{"prompt": "a picture of a frog"}\n')
    arguments = ("--prompts", prompts, "--out", out, "--steps", 3, "--until", 500, "--device", "cpu")
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [(line["id"], line["status"], line["seed"]) for line in lines] == [("cat", "ok", 0), ("0001", "ok", 1)]
    assert sorted(path.name for path in (out / "images").iterdir()) == ["0001.png", "cat.png"]
    assert json.loads((out / "run.json").read_text())["steps"] == 3
    code, error = run(monkeypatch, capsys, *arguments, "--scale", 3)
    assert code == 2 and "another run" in error


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", (), "no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', (), "line 2"),
        ('{"prompt": "a", "id": "../x"}', (), "id must be"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "X"}', (), "already used in line 1"),
        ('{"prompt": "a"}', ("--scheduler", "nope"), "scheduler"),
        ('{"prompt": "a"}', ("--until", "soon"), "until"),
        ('{"prompt": "a"}', ("--dtype", "int3"), "dtype"),
        ('{"prompt": "a"}', ("--device", "abacus"), "device"),
        ('{"prompt": "a"}', ("--scale", "nan"), "scale"),
        ('{"prompt": "a"}', ("--steps", "0"), "steps"),
        ('{"prompt": "a"}', ("--batch-size", "0"), "batch_size"),
        ('{"prompt": "a"}', ("--model", "./missing"), "does not exist"),
        ('{"prompt": "a"}', ("--height", "63"), "height must be a multiple of"),
        ('{"prompt": "a"}', ("--width", "0"), "width must be a multiple of"),
        ('{"prompt": "a"}', ("--clip-skip", "-1"), "clip_skip must be a whole number from 0 to"),
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
        (("--prompts", ".", "--out", "out"), "directory"),
        (("--prompts", "/dev/null", "--out", "out"), "holds no prompts"),
    ],
)
def test_a_wrong_command_line_is_one_line(monkeypatch, capsys, options, says):
    code, error = run(monkeypatch, capsys, *options)
    assert code == 2 and says in error and len(error.splitlines()) == 1 and error.startswith("basinescape: ")


def test_an_error_nobody_foresaw_is_one_line_unless_asked_for_more(tmp_path, monkeypatch, capsys):
    def broken(*_):
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


@pytest.mark.parametrize("command", [(), ("generate",), ("evaluate",), ("bench",)])
def test_help_is_quick_and_fits(command, monkeypatch, tmp_path):
    """It loads neither torch nor diffusers, and nothing is cut off at 80 columns."""
    code = (
        f"import sys; sys.argv = ['basinescape', *{command}, '--help']\n"
        "from basinescape.bench import cli\n"
        "try: cli.main()\n"
        "finally: print({'torch', 'diffusers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    monkeypatch.setenv("COLUMNS", "80")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n" and done.stdout.startswith("Usage: basinescape")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout and (command or done.stdout.count("...") == 1)  # COMMAND [ARGS]...


def write(path, count):
    path.write_text("".join(json.dumps({"prompt": f"a picture of a cat {i}", "id": f"p{i}"}) + "\n" for i in range(count)))


def sound(out):
    """The manifest's lines, each a JSON object about another image, whose file is there as it was made."""
    text = (out / "manifest.jsonl").read_text()
    assert text.endswith("\n")
    found = [json.loads(line, parse_constant=pytest.fail) for line in text.split("\n")[:-1]]
    assert len({line["id"] for line in found}) == len(found)
    for line in found:
        if line["status"] == "ok":
            assert hashlib.sha256((out / "images" / f"{line['id']}.png").read_bytes()).hexdigest() == line["sha256"]
    return found


def test_a_killed_job_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 3)
    arguments = ("--prompts", prompts, "--out", out, "--steps", 2, "--until", 500, "--device", "cpu", "--batch-size", 2)
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])  # killed while it wrote a line
    before = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    kept = (out / "images" / "p2.png").read_bytes()
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    after = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert [name for name in after if after[name] != before[name]] == ["p2.png"]
    assert (out / "images" / "p2.png").read_bytes() == kept


def test_a_sample_that_fails_loses_no_other(tmp_path, monkeypatch, capsys):
    made = Sampler.__call__

    def failing(self, prompts, *arguments, **options):
        if "a picture of a cat 1" in prompts:
            raise RuntimeError("out of memory")
        return made(self, prompts, *arguments, **options)

    monkeypatch.setattr(Sampler, "__call__", failing)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 4)
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, *QUICK, "--guidance", "cfg")
    assert code == 1 and "p1" in error
    assert {entry["id"]: entry["status"] for entry in sound(out)} == {
        "p0": "ok",
        "p1": "failed: out of memory",
        "p2": "ok",
        "p3": "ok",
    }
    assert sorted(path.stem for path in (out / "images").iterdir()) == ["p0", "p2", "p3"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 1)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, "--steps", 2)
    assert code == 2 and "not empty" in error
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_pickled_weights_are_refused_with_one_line(pipe, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.jsonl"
    write(prompts, 1)
    pipe.save_pretrained(tmp_path / "model", safe_serialization=False)
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", tmp_path / "out", "--model", tmp_path / "model")
    assert code == 2 and "pickle" in error and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def sampler(pipe):
    return Sampler.from_pipeline(pipe, "dpmsolver++")


@pytest.fixture
def drawn(monkeypatch):
    """Pictures drawn without a network: what the sampler was asked, and what befalls a prompt."""

    class Drawn:
        def __init__(self):
            self.asked = []  # options of each call
            self.faults, self.flagged, self.cut, self.infinite = {}, set(), {}, {}  # of prompts; infinite: in which dtypes

        def __call__(self, sampler, prompts, seeds, steps, **options):
            self.asked.append({"prompts": prompts, "seeds": seeds, **options})
            for prompt in prompts:
                if prompt in self.faults:
                    raise self.faults[prompt]
            dtype = str(sampler.pipe.unet.dtype).removeprefix("torch.")
            return Output(
                images=[Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for seed in seeds],
                latents=torch.zeros(len(prompts), 4, 8, 8),
                transition_step=torch.ones(len(prompts), dtype=torch.int64),
                noise_gap=torch.tensor([[float("nan"), seed + 0.1] for seed in seeds]),
                timesteps=torch.tensor([999.0, 334.0]),
                finite=torch.tensor([dtype not in self.infinite.get(prompt, ()) for prompt in prompts]),
                nsfw_content_detected=[prompt in self.flagged for prompt in prompts] if self.flagged else None,
                truncated=[self.cut.get(prompt, "") for prompt in prompts],
            )

    drawn = Drawn()
    monkeypatch.setattr(Sampler, "__call__", lambda self, *arguments, **options: drawn(self, *arguments, **options))
    return drawn


def jobs(count):
    return [Job(f"p{i}", f"a picture of a cat {i}", i) for i in range(count)]


def make(sampler, jobs, out, **options):
    return generate(sampler, jobs, out, Guidance.cfg(7.5), "tiny", **{"steps": 2, "progress": False} | options)


def test_a_job_killed_at_any_byte_of_its_manifest_ends_as_if_it_had_not_been(sampler, drawn, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    make(sampler, jobs(5), whole, batch_size=2)
    expected, text = sound(whole), (whole / "manifest.jsonl").read_bytes()
    ends = [i for i, byte in enumerate(text) if byte == ord("\n")]
    for cut in sorted({0, len(text), *range(5, len(text), 61), *(end + k for end in ends for k in (-1, 0, 1))}):
        shutil.copytree(whole, out)
        (out / "manifest.jsonl").write_bytes(text[:cut])
        if cut % 2:  # images of lines that were not written yet
            for i in range(text[:cut].count(b"\n"), 5):
                (out / "images" / f"p{i}.png").rename(out / "images" / f"p{i}.png.part")
        make(sampler, jobs(5), out, batch_size=2)
        assert sound(out) == expected, cut
        shutil.rmtree(out)


def test_images_that_are_gone_or_changed_are_made_again_and_counted(tmp_path, monkeypatch, capsys, drawn):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 4)
    arguments = ("--prompts", prompts, "--out", out, *QUICK)
    monkeypatch.setattr(sys, "argv", ["basinescape", "generate", "--no-progress", *map(str, arguments)])

    def said():
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    assert said() == f"4 images in {out / 'images'} (4 new)\n"
    before = {path.name: path.read_bytes() for path in (out / "images").iterdir()}
    (out / "images" / "p0.png").unlink()
    (out / "images" / "p2.png").write_bytes(b"")
    assert said() == f"4 images in {out / 'images'} (2 new)\n"
    assert {path.name: path.read_bytes() for path in (out / "images").iterdir()} == before
    assert sorted(line["id"] for line in sound(out)) == ["p0", "p1", "p2", "p3"]
    shutil.rmtree(out / "images")
    assert said() == f"4 images in {out / 'images'} (4 new)\n" and len(sound(out)) == 4
    assert said() == f"4 images in {out / 'images'} (0 new)\n"


def test_a_lone_surrogate_costs_its_line_and_no_other(tmp_path, monkeypatch, capsys):
    """A tokenizer takes no half of a character."""
    text = b'{"prompt": "a cat \\ud83d"}\n{"prompt": "a picture of a cat"}\n'
    out = tmp_path / "out"
    for _ in range(2):  # also when it is gone on with
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        code, error = run(monkeypatch, capsys, "--prompts", "-", "--out", out, *QUICK)
        assert code == 1 and "1 failed (0000)" in error and "Traceback" not in error
        status = {line["id"]: line["status"] for line in sound(out)}
        assert status.pop("0000").startswith("failed: ") and status == {"0001": "ok"}


@pytest.mark.parametrize(
    "error", [TypeError("t"), IndexError("i"), OverflowError("o"), KeyError("k"), torch.OutOfMemoryError("m")]
)
def test_any_fault_of_one_sample_costs_that_one_and_is_tried_once_a_run(sampler, drawn, tmp_path, error):
    drawn.faults["a picture of a cat 2"] = error
    written = make(sampler, jobs(5), tmp_path / "out")
    assert [line["status"] == "ok" for line in written] == [True, True, False, True, True]
    assert written[2]["status"].startswith("failed: ") and str(error) in written[2]["status"]
    assert sum(call["prompts"] == ["a picture of a cat 2"] for call in drawn.asked) == 1
    assert [line["id"] for line in make(sampler, jobs(5), tmp_path / "out")] == ["p2"]
    drawn.faults.clear()
    assert [line["status"] for line in make(sampler, jobs(5), tmp_path / "out")] == ["ok"]
    assert {line["status"] for line in sound(tmp_path / "out")} == {"ok"}


def test_a_bug_that_hits_every_sample_is_no_success(tmp_path, monkeypatch, capsys, drawn):
    prompts = tmp_path / "prompts.jsonl"
    write(prompts, 3)
    drawn.faults |= {f"a picture of a cat {i}": AttributeError("no attribute 'ravel'") for i in range(3)}
    arguments = ("--prompts", prompts, "--out", tmp_path / "out", *QUICK)
    code, error = run(monkeypatch, capsys, *arguments)
    assert code == 1 and "3 failed (p0, p1, p2)" in error
    assert {line["status"] for line in sound(tmp_path / "out")} == {"failed: AttributeError: no attribute 'ravel'"}


def test_a_job_that_is_interrupted_stops_quietly_and_goes_on(tmp_path, monkeypatch, capsys, drawn):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 3)
    drawn.faults["a picture of a cat 1"] = KeyboardInterrupt()
    arguments = ("--prompts", prompts, "--out", out, "--batch-size", 1, *QUICK)
    assert run(monkeypatch, capsys, *arguments) == (130, "")
    assert [line["id"] for line in sound(out)] == ["p0"]
    drawn.faults.clear()
    assert run(monkeypatch, capsys, *arguments)[0] == 0 and [line["id"] for line in sound(out)] == ["p0", "p1", "p2"]


def test_a_full_disk_ends_the_job_and_leaves_it_to_be_gone_on_with(sampler, drawn, tmp_path, monkeypatch):
    def full(image, *_, **__):
        if image.getpixel((0, 0))[0] == 1:
            raise OSError(28, "No space left on device")
        saved(image, *_, **__)

    saved = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        make(sampler, jobs(3), tmp_path / "out")
    assert [line["id"] for line in sound(tmp_path / "out")] == ["p0"]
    monkeypatch.setattr(Image.Image, "save", saved)
    make(sampler, jobs(3), tmp_path / "out")
    assert [line["id"] for line in sound(tmp_path / "out")] == ["p0", "p1", "p2"]


def test_what_is_not_finite_is_tried_once_in_float32(random_pipeline, drawn, tmp_path):
    sampler = Sampler.from_pipeline(random_pipeline("sd", 8, "epsilon").to(torch.bfloat16))
    drawn.infinite = {"a picture of a cat 1": {"bfloat16"}, "a picture of a cat 2": {"bfloat16", "float32"}}
    written = make(sampler, jobs(4), tmp_path / "out", batch_size=3)
    assert sound(tmp_path / "out") == json.loads(json.dumps(written).replace("NaN", "null"))
    assert [line["status"] for line in written] == ["ok", "ok", "failed: the sample is not finite", "ok"]
    assert [line.get("retried") for line in written] == [None, "float32", "float32", None]
    assert [len(call["prompts"]) for call in drawn.asked] == [3, 1, 1, 1]
    assert sorted(path.stem for path in (tmp_path / "out" / "images").iterdir()) == ["p0", "p1", "p3"]
    assert sampler.pipe.unet.dtype == torch.bfloat16


def test_a_fault_in_float32_is_that_samples_own(random_pipeline, drawn, tmp_path, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("no memory for float32")

    sampler = Sampler.from_pipeline(random_pipeline("sd", 8, "epsilon").to(torch.bfloat16))
    monkeypatch.setattr(Sampler, "in_float32", full)
    drawn.infinite = {"a picture of a cat 0": {"bfloat16"}}
    written = make(sampler, jobs(2), tmp_path / "out")
    assert [line["status"] for line in written] == [
        "failed: the sample is not finite, and in float32: no memory for float32",
        "ok",
    ]


def test_a_network_that_gives_nan_is_marked_and_saves_no_image(random_pipeline, tmp_path):
    pipe = random_pipeline("sd", 8, "epsilon")
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    (line,) = make(Sampler.from_pipeline(pipe), jobs(1), tmp_path / "out")
    assert line["status"] == "failed: the sample is not finite" and "retried" not in line  # it was float32
    assert sound(tmp_path / "out")[0]["noise_gap"] == [None, None] and not list((tmp_path / "out" / "images").iterdir())


def test_what_was_cut_and_flagged_is_in_the_manifest_and_said_in_a_line(tmp_path, monkeypatch, capsys, drawn):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 3)
    drawn.flagged, drawn.cut = {"a picture of a cat 1"}, {"a picture of a cat 0": "of 1", "a picture of a cat 2": "by night"}
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, *QUICK)
    assert code == 0
    assert [line["nsfw_content_detected"] for line in sound(out)] == [False, True, False]
    assert [line.get("truncated") for line in sound(out)] == ["of 1", None, "by night"]
    cut, flagged = error.splitlines()
    assert cut.startswith("2 cut") and "(p0, p2)" in cut and flagged.startswith("1 flagged") and "(p1)" in flagged


def test_negative_prompts_are_the_lines_own_before_the_runs(sampler, drawn, tmp_path):
    asked = [Job("a", "a", 0), Job("b", "b", 1, "blurry"), Job("c", "c", 2), Job("d", "d", 3, "")]
    make(sampler, asked, tmp_path / "none", height=64, width=128, clip_skip=1)
    assert [(call["prompts"], call["negative_prompt"]) for call in drawn.asked] == [
        (["a", "c"], None),  # for SDXL none is not the same as an empty one
        (["b", "d"], ["blurry", ""]),
    ]
    assert {(call["height"], call["width"], call["clip_skip"]) for call in drawn.asked} == {(64, 128, 1)}
    drawn.asked.clear()
    make(sampler, asked, tmp_path / "one", negative_prompt="ugly")
    assert [call["negative_prompt"] for call in drawn.asked] == [["ugly", "blurry", "ugly", ""]]
    assert [line["negative_prompt"] for line in sound(tmp_path / "one")] == ["ugly", "blurry", "ugly", ""]
    assert all("negative_prompt" not in line for line in sound(tmp_path / "none")[:2])


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
    assert run(monkeypatch, capsys, "--prompts", prompts, "--out", tmp_path / "out", *QUICK, *options)[0] == 0
    (asked,) = drawn.asked
    assert (asked["prompts"], asked["seeds"], asked["negative_prompt"]) == (["a cat", "a dog"], [7, 8], ["ugly", "blurry"])
    assert (asked["height"], asked["width"], asked["clip_skip"], asked["guidance"]) == (128, 192, 1, Guidance.cfg(3))
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (stored["height"], stored["width"], stored["clip_skip"], stored["negative_prompt"]) == (128, 192, 1, "ugly")


def test_an_image_is_that_of_the_sampler_alone(random_pipeline, tmp_path):
    sampler = Sampler.from_pipeline(random_pipeline("sdxl", 8, "epsilon"))
    asked = [Job("a", "a cat", 0), Job("b", "a cat", 0, "blurry"), Job("c", "a cat", 0, "")]
    make(sampler, asked, tmp_path / "out", height=40, batch_size=1)
    for job in asked:
        alone = sampler([job.prompt], [job.seed], 2, Guidance.cfg(7.5), job.negative_prompt, height=40, progress=False).images[
            0
        ]
        with Image.open(tmp_path / "out" / "images" / f"{job.id}.png") as image:
            assert image.tobytes() == alone.tobytes() and image.size == (32, 40)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"height": 128}, "height"),
        ({"width": 128}, "width"),
        ({"clip_skip": 1}, "clip_skip"),
        ({"negative_prompt": "ugly"}, "negative_prompt"),
        ({"jobs": [Job("p0", "a picture of a cat 0", 0, "ugly")]}, "prompts_sha256"),
    ],
)
def test_other_settings_are_another_run(sampler, drawn, tmp_path, change, differs):
    make(sampler, jobs(1), tmp_path / "out", height=64)
    make(sampler, jobs(1), tmp_path / "out", batch_size=3)  # 64 is the model's own
    with pytest.raises(ValueError, match=f"another run .its {differs} differ"):
        make(sampler, **{"jobs": jobs(1), "out": tmp_path / "out"} | change)


def test_jobs_of_one_id_are_refused(sampler, tmp_path):
    with pytest.raises(ValueError, match="ids that differ"):
        make(sampler, [Job("a", "a cat", 0), Job("A", "a dog", 1)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
