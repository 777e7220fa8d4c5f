"""ComfyUI nodes: put this folder, or a link to it, into `custom_nodes`, and basinescape into ComfyUI's environment.

`pyproject.toml` has the form of ComfyUI's registry, `example_workflows` a workflow. ComfyUI prefers NODE_CLASS_MAPPINGS where a
module has both, so a version that knows the schema V3 gets `comfy_entrypoint` alone.
"""

from . import judge, node

NODES = (node.NODE, judge.NODE)

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError:  # an older ComfyUI
    NODE_CLASS_MAPPINGS = {one.id: one.first_version() for one in NODES}
    NODE_DISPLAY_NAME_MAPPINGS = {one.id: one.name for one in NODES}
else:

    class Extension(ComfyExtension):
        async def get_node_list(self):
            return [one.third_version(io) for one in NODES]

    async def comfy_entrypoint():
        return Extension()
