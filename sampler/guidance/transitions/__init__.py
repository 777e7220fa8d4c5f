"""Transition rules, one a file. A new one is its file and its name in the list below."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .at import At
from .base import RULES, Calibrated, Statistic, Transition, register
from .fallen import Fallen
from .first_minimum import FirstMinimum
from .settled import Settled

__all__ = ["RULES", "At", "Fallen", "FirstMinimum", "Settled", "Statistic", "Transition", "named", "register", "rule_named"]

for _rule in (At, FirstMinimum, Fallen, Settled):
    register(_rule)


def words() -> list[str]:
    """What `rule_named` knows beside FILE.py:NAME."""
    return [rule.word for rule in RULES.values() if rule.word]


def rule_named(name: str) -> type[Transition]:
    """The rule that a word or class name stands for, or that FILE.py:NAME holds, which is run for it.

    Raises ValueError where there is none, FileNotFoundError for a missing file.
    """
    for rule in RULES.values():
        if name in (rule.word, rule.__name__):
            return rule
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"until must be a timestep, {', '.join(map(repr, words()))} or FILE.py:NAME, got {name!r}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"until must name a Python file, got {name!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Transition)):
        raise ValueError(f"until is {name!r}, but {file} has no transition rule {attribute!r}")
    return register(found)


def check(text: str) -> None:
    """Raises what `named` does for a text that is neither a number nor a rule's name."""
    try:
        float(text)
    except ValueError:
        rule_named(text)


def named(text: str, calibration: Calibrated | None = None, **given: Any) -> Transition:
    """The transition that a user types: a timestep in 0..1000, or a name as for `rule_named` with its options.

    given: options; None for those that nobody gave. Raises ValueError for what does not fit.
    """
    try:
        timestep = float(text)
    except ValueError:
        return rule_named(text).asked(calibration, **given)
    return At.asked(timestep=timestep, **given)
