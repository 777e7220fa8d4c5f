"""What a terminal shows: a bar that moves, no words of other libraries, the version."""

import os
import subprocess
import sys
import warnings
from io import StringIO

import basinescape
import pytest
from basinescape import Guidance, Sampler
from basinescape.bench import cli
from basinescape.commands.quiet import quieten
from basinescape.data.prompts import Job
from basinescape.runs.progress import Progress
from bulkruns import make
from tqdm import tqdm


class Terminal(StringIO):
    def isatty(self):
        return True


def test_the_bar_moves_with_the_steps(tmp_path, monkeypatch, drawn):
    shares, tell = [], tqdm.update
    sampler, jobs = Sampler.from_pretrained("tiny", "cpu", scheduler="ddim"), [Job(f"p{i}", f"p{i}", i) for i in range(2)]
    monkeypatch.setattr(tqdm, "update", lambda self, n=1: (tell(self, n), shares.append(self.n))[0])
    make(sampler, jobs, tmp_path / "out", Guidance.cfg(2.0), steps=4, batch_size=2, progress=Progress(stream=Terminal()))
    assert {0.5, 1.0, 1.5} <= set(shares) and shares[-1] == 2 and max(shares) == 2


def test_libraries_are_silent_and_others_are_not():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quieten()
        for module in ("torchsde._brownian.brownian_interval", "diffusers.schedulers", "transformers", "mine.transformers"):
            warnings.warn_explicit("something", UserWarning, "a.py", 1, module)
    assert len(heard) == 1
    for library in ("diffusers", "transformers"):
        assert os.environ[f"{library.upper()}_VERBOSITY"] == "error"  # for what they say on import


@pytest.mark.process
def test_prompts_are_read_before_a_library_is_loaded_and_so_silenced(tmp_path):
    loaded = "[m for m in ('diffusers', 'transformers') if m in sys.modules]"
    code = f"import sys, basinescape.data.prompts, basinescape.runs.progress; print({loaded})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.strip() == "[]"


def test_the_version_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["basinescape", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None) and capsys.readouterr().out == f"basinescape {basinescape.__version__}\n"
