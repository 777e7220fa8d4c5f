"""Checks of arguments. They raise ValueErrors that name the argument, the given value and the allowed values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import index
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def whole_number(value: Any) -> int | None:
    """`value` as an int, numpy's whole numbers included; None for anything else, True and 3.0 included."""
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def texts(name: str, given: str | Iterable[str] | None) -> list[str]:
    """A string or a non-empty sequence of strings as a list."""
    found = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} must be a string or a non-empty list of strings, got {given!r}")
    for text in found:
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name} must be text without half a surrogate pair, got {text!r}")
    return found


def one_each(name: str, given: str | Sequence[str | None] | None, count: int) -> list[str | None] | None:
    """A list with a string or None for each of `count` prompts. given: that list, or one string for all; None returns None."""
    if given is None:
        return None
    if not isinstance(given, Iterable):
        raise ValueError(f"{name} must be a string, or a list with a string or None for each prompt; got {given!r}")
    found: list[str | None] = [given] * count if isinstance(given, str) else list(given)
    if len(found) != count:
        raise ValueError(f"{name} has {len(found)} entries for {count} prompts")
    if any(text is not None for text in found):
        texts(name, [text for text in found if text is not None])
    return found


def seeds(given: int | Sequence[int], count: int) -> list[int]:
    """`count` seeds as a list. given: one seed for each image, or the first seed, counted up from there."""
    first = whole_number(given)
    each: Iterable[Any] = range(first, first + count) if first is not None else given if isinstance(given, Iterable) else [None]
    numbers = [whole_number(seed) for seed in each]
    found = [seed for seed in numbers if seed is not None and 0 <= seed < 2**63]
    if len(found) < len(numbers):
        raise ValueError(f"seeds must be whole numbers from 0 to 2**63 - 1, got {given!r}")
    if len(found) != count:
        raise ValueError(f"seeds must be as many as images: got {len(found)} seeds for {count} images")
    return found


def at_least_one(name: str, given: int) -> int:
    """A whole number of at least 1."""
    return at_least(name, given, 1)


def at_least(name: str, given: int, least: int) -> int:
    """A whole number of at least `least`."""
    found = whole_number(given)
    if found is None or found < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {given!r}")
    return found


def finite(name: str, given: float) -> float:
    """A finite number, numpy's included, as a float."""
    if isinstance(given, bool) or not isinstance(given, Real) or not math.isfinite(given):
        raise ValueError(f"{name} must be a finite number, got {given!r}")
    return float(given)


def share(name: str, given: float) -> float:
    """A number from 0 to 1."""
    if isinstance(given, bool) or not isinstance(given, Real) or not 0 <= given <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {given!r}")
    return float(given)


def rate(given: float) -> float:
    """A number between 0 and 1, neither of which says anything."""
    if not 0 < share("rate", given) < 1:
        raise ValueError(f"rate must be between 0 and 1, got {given!r}")
    return given


def line(error: Exception) -> str:
    """The message of an error in one line; its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def device(given: str | torch.device | None) -> torch.device:
    """`given` as a torch device that is available; None: a GPU if there is one, else the CPU."""
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device such as 'cuda' or 'cpu', got {given!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(given)!r}, but torch {torch.__version__} sees no CUDA GPU here; use 'cpu'")
    return found


def dtype(given: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`given` as a dtype to compute in; None: float16 on a GPU, float32 elsewhere."""
    if given is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(str(given).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {given!r}")
    return found
