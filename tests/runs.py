"""Runs of `generate`: by the command or the function, with pictures that no network makes, and what their folder must be."""

import hashlib
import json
import sys

import pytest
import torch
from basinescape import Guidance, Output
from basinescape.bench import cli
from basinescape.generate import generate
from basinescape.prompts import Job
from PIL import Image

QUICK = ("--steps", 2, "--guidance", "delayed", "--until", 500, "--device", "cpu")


def run(monkeypatch, capsys, *arguments):
    """Exit code and standard error of `basinescape generate`."""
    monkeypatch.setattr(sys, "argv", ["basinescape", "generate", "--no-progress", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


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


def jobs(count):
    return [Job(f"p{i}", f"a picture of a cat {i}", i) for i in range(count)]


def make(sampler, jobs, out, **options):
    return generate(sampler, jobs, out, Guidance.cfg(7.5), "tiny", **{"steps": 2, "progress": False} | options)


class Drawn:
    """Pictures drawn without a network, in the place of `Sampler.__call__`: what it was asked, and what befalls a prompt."""

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
