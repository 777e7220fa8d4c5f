"""The prompt that a picture's file says it was made from: in its XMP, or as common programs write it into PNG files."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .xmp import PROMPT, fields_in

A1111, COMFYUI = "parameters", "prompt"  # the keywords of the texts that these programs write
END = re.compile(r"\n(?:Negative prompt: |Steps: \d)")  # what follows the prompt in A1111's parameters
# ComfyUI's inputs: those that lead from a sampler to its prompt, and those that hold it
POSITIVE = ("positive", "conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from", "guider")
WORDS = ("text", "text_g", "t5xxl", "prompt", "string", "value")


def prompt_in(source: Path | bytes, otherwise: str) -> tuple[str | None, str]:
    """Return (the prompt, ""), or (None, the reason why there is none). otherwise: the beginning of that reason."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format == "PNG" and not {A1111, COMFYUI, "xmp"} & image.info.keys():
                image.load()  # texts may follow the pixels
            said = dict(image.info)
    except Exception as error:  # Pillow may raise anything for a broken file
        return None, f"{otherwise}, and it cannot be read: {error}"
    if prompt := fields_in(said).get(PROMPT):
        return prompt, ""
    parameters, graph = said.get(A1111), said.get(COMFYUI)
    prompt = END.split(f"\n{parameters}", maxsplit=1)[0].strip() if isinstance(parameters, str) else ""
    if prompt and not prompt.startswith("{"):  # JSON of other programs
        return prompt, ""
    if isinstance(graph, str):
        prompts = set(_of_comfyui(graph))
        if len(prompts) == 1:
            return prompts.pop(), ""
        return None, f"{otherwise}, and its workflow has {len(prompts) or 'no'} prompts"
    return None, f"{otherwise}, and none in it"


def _of_comfyui(text: str) -> Iterator[str]:
    """The positive prompts of the samplers in a ComfyUI workflow, in its API format."""
    try:
        nodes = json.loads(text)
    except (ValueError, RecursionError):
        return
    if not isinstance(nodes, Mapping):
        return
    for node in nodes.values():
        inputs = node.get("inputs") if isinstance(node, Mapping) else None
        if isinstance(inputs, Mapping) and "Sampler" in str(node.get("class_type")):
            yield from _texts(nodes, inputs)


def _texts(nodes: Mapping[str, Any], inputs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that a sampler's inputs lead to by links, [id of a node, output], also through nodes that change them."""
    links, seen = [inputs.get(name) for name in POSITIVE], set[str]()
    while links:
        link = links.pop()
        if not isinstance(link, list) or not link or (id := str(link[0])) in seen:
            continue
        node = nodes.get(id)
        if not isinstance(node, Mapping) or not isinstance(node.get("inputs"), Mapping):
            continue
        seen.add(id)
        for value in map(node["inputs"].get, WORDS):
            if isinstance(value, str) and value.strip():
                yield value.strip()
            links.append(value)
        links += map(node["inputs"].get, POSITIVE)
