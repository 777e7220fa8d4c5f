"""Runs of `generate`: by the command or the function, with pictures that no network makes, and what their folder must be."""

import hashlib
import json
import sys
from dataclasses import fields

import pytest
import torch
from basinescape import Guidance, checks
from basinescape.bench import cli
from basinescape.bulk.generate import generate
from basinescape.bulk.settings import Files, Placement, Recipe
from basinescape.data.prompts import Job
from basinescape.models import Decoded, Encoded, PromptedUNet
from PIL import Image

QUICK = ("--steps", 2, "--guidance", "delayed", "--until", 500, "--device", "cpu")


def run(monkeypatch, capsys, *arguments):
    """Exit code and standard error of `basinescape generate`, without what it says of its own choices."""
    code, error = said(monkeypatch, capsys, *arguments)
    chosen = ("calibrated: ", "guidance is delayed, as ")
    return code, "".join(line for line in error.splitlines(keepends=True) if not line.startswith(chosen))


def said(monkeypatch, capsys, *arguments):
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
            assert hashlib.sha256((out / line["file"]).read_bytes()).hexdigest() == line["sha256"]
    return found


def jobs(count):
    return [Job(f"p{i}", f"a picture of a cat {i}", i) for i in range(count)]


def make(sampler, jobs, out, guidance=Guidance.cfg(7.5), **options):
    """`generate` with the options of all its objects by their names."""
    options = {"steps": 2} | options
    owners = {Recipe: {"guidance": guidance}, Files: {}, Placement: {}}
    for owner, own in owners.items():
        own |= {field.name: options.pop(field.name) for field in fields(owner) if field.name in options}
    recipe, files, placement = (owner(**own) for owner, own in owners.items())
    return generate(
        sampler, jobs, out, recipe, files=files, placement=placement, **{"model": "tiny", "progress": False} | options
    )


class Drawn:
    """Pictures of one colour, the seed's, drawn without a network: what was asked, and what befalls a prompt.

    asked: what each batch of prompts was encoded with. faults: of the network, while a prompt is in its batch. infinite: in
    which dtypes a prompt's sample is not finite. cut: what the text encoder's limit cut off. flagged: seeds of unsafe pictures.
    """

    def __init__(self):
        self.asked, self.calls = [], 0
        self.faults, self.flagged, self.cut, self.infinite = {}, set(), {}, {}
        self._prompts = [""]

    def encode(self, model, prompts, height, width, count=1, negative_prompt=None, **options):
        checks.texts("prompts", prompts)
        whole = [text for text in prompts if text]
        if whole:
            negative = [n for n, text in zip(negative_prompt, prompts, strict=True) if text]
            self.asked.append({"prompts": whole, "negative_prompt": negative, "height": height, "width": width, **options})
        self._prompts += [text for text in whole if text not in self._prompts]
        numbers = torch.tensor([self._prompts.index(text) for text in prompts] * 2, dtype=model.dtype)
        truncated = [self.cut.get(text, "") for text in prompts]
        return Encoded({"encoder_hidden_states": numbers.view(-1, 1, 1)}, truncated=truncated)

    def network(self, model, encoded, plain=False):
        dtype = str(model.dtype).removeprefix("torch.")

        def predict(latents, timesteps, encoder_hidden_states, return_dict):
            self.calls += 1
            there = [self._prompts[int(number)] for number in encoder_hidden_states.flatten()]
            for fault in [self.faults[prompt] for prompt in there if prompt in self.faults][:1]:
                if isinstance(fault, Exception):
                    raise fault
                fault()
            bad = torch.tensor([dtype in self.infinite.get(prompt, ()) for prompt in there])
            return (torch.where(bad.view(-1, 1, 1, 1), torch.nan, latents * 0.5),)

        return PromptedUNet(predict, encoded.inputs)

    def decode(self, model, latents, output, generators, **options):
        (seed,) = (generator.initial_seed() for generator in generators)
        finite = latents.isfinite().flatten(1).all(dim=1)
        image = Image.new("RGB", (8, 8), (seed % 256, 0, 0))
        return Decoded([image], finite, [seed in self.flagged] if self.flagged else None)
