"""Groups of options: a command takes dataclasses, whose fields are its options, and its help shows them in groups."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function as a command. Its arguments are dataclasses; each of their fields is an option, in the group TITLE."""
    groups = {name: group for name, group in get_type_hints(function).items() if name != "return"}

    def command(**given: Any) -> None:
        made = {name: group(**{field.name: given[field.name] for field in fields(group)}) for name, group in groups.items()}
        function(**made)

    options = [option for group in groups.values() for option in _options(group)]
    command.__signature__ = Signature(options)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {option.name: option.annotation for option in options}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    return command


def _options(group: Any) -> list[Parameter]:
    """Return the fields of a dataclass as parameters of a command."""
    found, hints = [], get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind, option = get_args(hints[field.name])
        option = copy.copy(option)  # commands share it
        option.rich_help_panel = group.TITLE
        default = Parameter.empty if field.default is MISSING else field.default
        found.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]))
    return found


class Grouped(TyperCommand):
    """A command whose help has a section for each group of its options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(option, "rich_help_panel", None) or "Other", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example with its line breaks unchanged."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(f"{self.epilog}\n")


def add(app: typer.Typer, function: Callable[..., None], example: str) -> None:
    """Give an app a command of grouped options."""
    app.command(cls=Grouped, epilog=f"Example:\n{example}")(grouped(function))
