"""A node as data, and as a class of ComfyUI's first and third version of nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from basinescape.hosts.guidance_widgets import Widget

CATEGORY = "sampling/custom_sampling/guiders"


class Output(NamedTuple):
    """An output of a node: its name and ComfyUI type, and whether it is a list of one value a sample."""

    name: str
    kind: str
    listed: bool = False


@dataclass(frozen=True)
class Node:
    """A node: its id, name and description, its connections (name -> ComfyUI type), widgets, outputs and function.

    function: (connections and widgets by name) -> its outputs.
    """

    id: str
    name: str
    description: str
    connections: dict[str, str]
    widgets: dict[str, Widget]
    outputs: tuple[Output, ...]
    function: Callable[..., tuple]

    def first_version(self) -> type:
        """As a class for NODE_CLASS_MAPPINGS."""

        def typed(widget: Widget) -> tuple[Any, dict[str, Any]]:
            options = {**widget.options, "tooltip": widget.tooltip}
            return (options.pop("options") if widget.kind == "Combo" else widget.kind.upper(), options)

        required: dict[str, tuple] = {name: (kind.upper(),) for name, kind in self.connections.items()}
        required |= {name: typed(widget) for name, widget in self.widgets.items()}
        own = {
            "CATEGORY": CATEGORY,
            "DESCRIPTION": self.description,
            "FUNCTION": "execute",
            "RETURN_TYPES": tuple(one.kind.upper() for one in self.outputs),
            "RETURN_NAMES": tuple(one.name for one in self.outputs),
            "OUTPUT_IS_LIST": tuple(one.listed for one in self.outputs),
            "INPUT_TYPES": classmethod(lambda cls: {"required": required}),
            "execute": lambda _, **given: self.function(**given),
        }
        return type(self.id, (), own)

    def third_version(self, io: Any) -> type:
        """As a class of ComfyUI's `io.ComfyNode`."""
        inputs = [getattr(io, kind).Input(name) for name, kind in self.connections.items()]
        for name, (kind, options, tooltip) in self.widgets.items():
            inputs.append(getattr(io, kind).Input(name, **options, tooltip=tooltip))
        outputs = [getattr(io, one.kind).Output(display_name=one.name, is_output_list=one.listed) for one in self.outputs]
        schema = {"node_id": self.id, "display_name": self.name, "category": CATEGORY, "description": self.description}
        own = {
            "define_schema": classmethod(lambda cls: io.Schema(**schema, inputs=inputs, outputs=outputs)),
            "execute": classmethod(lambda cls, **given: io.NodeOutput(*self.function(**given))),
        }
        return type(self.id, (io.ComfyNode,), own)
