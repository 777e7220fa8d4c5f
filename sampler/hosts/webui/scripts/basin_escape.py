"""The sliders of basinescape in AUTOMATIC1111 and Forge, which load this file."""

import gradio as gr
from basinescape.hosts.guidance_widgets import WIDGETS
from basinescape.hosts.webui.guided import NAME, guide
from modules import scripts, shared


class BasinEscape(scripts.Script):
    """Keeps pictures from reproducing training images: guidance is held back, or reversed, until a picture has left the basin
    of attraction of a training image; then it has the CFG scale."""

    def title(self):
        return NAME

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        with gr.Accordion(NAME, open=False):
            enabled = gr.Checkbox(label="Enable", value=False)
            made = [component(name, widget) for name, widget in WIDGETS.items()]
        self.infotext_fields = [(enabled, lambda read: f"{NAME} until" in read)]
        self.infotext_fields += [(one, f"{NAME} {name}") for one, name in zip(made, WIDGETS, strict=True)]
        self.paste_field_names = [f"{NAME} {name}" for name in WIDGETS]
        return [enabled, *made]

    def process_before_every_sampling(self, p, enabled, *sliders, **given):
        if not enabled:
            return
        skips = getattr(shared.opts, "skip_early_cond", 0)
        refused = "'Ignore negative prompt during early sampling' leaves predictions out: set it to 0" if skips else None
        guide(p, refused, **dict(zip(WIDGETS, sliders, strict=True)))


def component(name, widget):
    """A widget as gradio has it."""
    options, value, info = widget.options, widget.options["default"], widget.tooltip
    if widget.kind == "Combo":
        return gr.Dropdown(label=name, choices=options["options"], value=value, info=info)
    return gr.Slider(label=name, minimum=options["min"], maximum=options["max"], step=options["step"], value=value, info=info)
