"""The node that guides, and what it does to a model."""

from __future__ import annotations

import logging
from typing import Any

from basinescape.hosts.guidance_widgets import WIDGETS, Settings

from .described import Node, Output
from .guided import CFG_FUNCTION, Guided

logger = logging.getLogger(__name__)
ID = "BasinEscape"
OUTER_SAMPLE = "outer_sample"  # comfy.patcher_extension.WrappersMP's, around a run


def patched(model: Any, **widgets: Any) -> Any:
    """A clone of ComfyUI's `model` that is guided so. Raises ValueError for widgets out of range and an old ComfyUI."""
    if not hasattr(model, "add_wrapper_with_key"):
        raise ValueError("this ComfyUI has no wrappers around a run (ModelPatcher.add_wrapper_with_key): update it")
    clone = model.clone()
    guided = Guided(Settings(**widgets))
    options = clone.model_options
    if CFG_FUNCTION in options:
        logger.warning("Basin Escape: a node before it has set a CFG function, which it replaces: that node now does nothing")
    clone.set_model_sampler_cfg_function(guided, disable_cfg1_optimization=True)
    maker = options.get("sampler_calc_cond_batch_function")
    if maker is None or isinstance(getattr(maker, "__self__", None), Guided):  # else another node makes the predictions
        clone.set_model_sampler_calc_cond_batch_function(guided.predicted)
    clone.remove_wrappers_with_key(OUTER_SAMPLE, ID)
    clone.add_wrapper_with_key(OUTER_SAMPLE, ID, guided.sampled)
    return clone


NODE = Node(
    ID,
    "Basin Escape (delayed or opposite guidance)",
    "Keeps samples from reproducing training images: guidance is held back, or reversed, until a sample has left the basin of "
    "attraction of a training image; then it has the sampler's cfg. Connect it between the model and the sampler.",
    {"model": "Model"},
    WIDGETS,
    (Output("MODEL", "Model"),),
    lambda **given: (patched(**given),),
)
