"""How docstrings become pages: their columns of names, `name:  what it is`, become lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A line such as "prompts, seeds:  what they are", whose further lines are indented.
ENTRY = re.compile(r"^(?P<names>[A-Za-z_*][\w.*]*(?:, [A-Za-z_*][\w.*]*)*):\s+(?P<text>\S.*)$")


def listed(docstring: str) -> str:
    """The docstring with each column of names as a Markdown list."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        entry = ENTRY.match(line)
        if entry:
            if not inside and lines and lines[-1].strip():
                lines.append("")
            names = ", ".join(f"`{name}`" for name in entry["names"].split(", "))
            lines.append(f"- {names}: {entry['text']}")
            inside = True
        elif inside and line.startswith(" "):
            lines.append(f"  {line.strip()}")
        else:
            if inside and line.strip():
                lines.append("")
            inside = False
            lines.append(line)
    return "\n".join(lines)


class Lists(griffe.Extension):
    """Applies `listed` to each docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)
