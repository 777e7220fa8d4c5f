"""Transition rules, one in each file. To add one, write its file and add its name to the list below."""

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
    """The words that `rule_named` accepts, apart from FILE.py:NAME."""
    return [rule.word for rule in RULES.values() if rule.word]


def rule_named(name: str) -> type[Transition]:
    """Return the rule with this word or class name. For FILE.py:NAME run that file and register its rule NAME.

    Raises ValueError if there is no such rule, FileNotFoundError for a missing file.
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
    """Raise the errors of `named` for a text that is neither a number nor a rule's name."""
    try:
        float(text)
    except ValueError:
        rule_named(text)


def named(text: str, calibration: Calibrated | None = None, **given: Any) -> Transition:
    """Return the transition for a text that a user typed: a timestep in 0..1000, or a name as for `rule_named`.

    given: options of the rule; None: not given. Raises ValueError for a text or options that do not fit.
    """
    try:
        timestep = float(text)
    except ValueError:
        return rule_named(text).asked(calibration, **given)
    return At.asked(timestep=timestep, **given)
