"""JSON that people can read: non-ASCII letters are not escaped."""

from __future__ import annotations

import json
import math
from typing import Any

# Characters at which some readers end a line, although JSON Lines does not.
BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """The value as JSON in UTF-8, without a line break unless `indent` is given; see `finite`.

    Half a surrogate pair, which UTF-8 cannot hold, is escaped, and so are the characters of BREAKS.
    """
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.translate(BREAKS).encode("utf-8", "backslashreplace")


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
