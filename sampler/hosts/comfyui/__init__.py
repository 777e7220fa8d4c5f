"""A ComfyUI node: put this folder, or a link to it, into `custom_nodes`, and basinescape into ComfyUI's environment.

An example workflow is in `example_workflows`. ComfyUI prefers NODE_CLASS_MAPPINGS where a module has both, so a version that
knows the schema V3 gets `comfy_entrypoint` alone.
"""

from basinescape.hosts.widgets import WIDGETS

from . import node

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError:  # an older ComfyUI

    class BasinEscape:
        CATEGORY, DESCRIPTION, FUNCTION = node.CATEGORY, node.DESCRIPTION, "execute"
        RETURN_TYPES = ("MODEL",)

        @classmethod
        def INPUT_TYPES(cls):
            def typed(widget):
                options = dict(widget.options)
                return (options.pop("options") if widget.kind == "Combo" else widget.kind.upper(), options)

            return {"required": {"model": ("MODEL",), **{name: typed(widget) for name, widget in WIDGETS.items()}}}

        def execute(self, **given):
            return (node.patched(**given),)

    NODE_CLASS_MAPPINGS = {node.ID: BasinEscape}
    NODE_DISPLAY_NAME_MAPPINGS = {node.ID: node.NAME}
else:

    class BasinEscape(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            widgets = [getattr(io, widget.kind).Input(name, **widget.options) for name, widget in WIDGETS.items()]
            return io.Schema(
                node_id=node.ID,
                display_name=node.NAME,
                category=node.CATEGORY,
                description=node.DESCRIPTION,
                inputs=[io.Model.Input("model"), *widgets],
                outputs=[io.Model.Output()],
            )

        @classmethod
        def execute(cls, **given):
            return io.NodeOutput(node.patched(**given))

    class Extension(ComfyExtension):
        async def get_node_list(self):
            return [BasinEscape]

    async def comfy_entrypoint():
        return Extension()
