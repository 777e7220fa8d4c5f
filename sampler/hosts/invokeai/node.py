"""The node: InvokeAI's own denoising node with the guidance's fields, and what became of each picture as outputs."""

from contextvars import ContextVar
from typing import Any, Literal

from basinescape.hosts.guidance_widgets import FALLEN, MINIMUM, TIMESTEP, WIDGETS, Settings
from basinescape.hosts.invokeai.extension import BasinEscapeExtension
from basinescape.kernels.rules import RULES
from invokeai.app.invocations import denoise_latents
from invokeai.app.invocations.baseinvocation import invocation, invocation_output
from invokeai.app.invocations.fields import InputField, OutputField
from invokeai.app.invocations.primitives import LatentsOutput

EXTENSION: ContextVar[BasinEscapeExtension | None] = ContextVar("basin_escape_extension", default=None)


class Manager(denoise_latents.ExtensionsManager):
    """InvokeAI's manager of a denoising's extensions, to which it adds our node's extension first."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        if (extension := EXTENSION.get()) is not None:
            extension.manager = self
            self.add_extension(extension)


denoise_latents.ExtensionsManager = Manager


def field(name: str) -> Any:
    """A widget as InvokeAI has it."""
    _, options, tooltip = WIDGETS[name]
    limits = {"ge": options["min"], "le": options["max"]} if "min" in options else {}
    return InputField(default=options["default"], description=tooltip, **limits)


@invocation_output("basin_escape_output")
class BasinEscapeOutput(LatentsOutput):
    """Latents, and of each picture what became of it."""

    transition_step: list[int] = OutputField(description="The step at which full guidance began; -1: never.")
    score: list[float] = OutputField(description="The basin score: how much a picture looks like a copy; empty if not judged.")
    suspect: list[bool] = OutputField(description="Whether the score is above 0.3; empty if not judged.")


@invocation(
    "basin_escape_denoise_latents",
    title="Denoise - SD1.5, SDXL (Basin Escape)",
    tags=["latents", "denoise", "memorization"],
    category="latents",
    version="1.0.0",
)
class BasinEscapeInvocation(denoise_latents.DenoiseLatentsInvocation):
    """Denoises with guidance held back, or reversed, until a picture has left the basin of attraction of a training image."""

    before: float = field("before")
    until: Literal[TIMESTEP, MINIMUM, FALLEN] = field("until")  # type: ignore[valid-type]  # names of the package's own
    timestep: float = field("timestep")
    latest: float = field("latest")
    rule: Literal[tuple(RULES)] = field("rule")  # type: ignore[valid-type]
    judge: bool = InputField(default=True, description="Ask whether the finished pictures look like copies: four more calls.")

    def invoke(self, context: Any) -> BasinEscapeOutput:
        if self.cfg_rescale_multiplier > 0:
            raise ValueError("cfg_rescale_multiplier is the rule 'rescale' here: set it to 0, and choose that rule")
        if self.ip_adapter:
            raise ValueError("ip_adapter is given, and InvokeAI's modular denoising, as in this node, ignores it: remove it")
        if self.judge and self.denoising_end < 1:
            raise ValueError(
                f"denoising_end is {self.denoising_end:g}, and pictures are judged at the end: switch judge off here, and on "
                "in the node that takes the last steps"
            )
        settings = Settings(**{name: getattr(self, name) for name in WIDGETS})
        extension = BasinEscapeExtension(settings, self.judge)
        token = EXTENSION.set(extension)
        try:
            made = self._new_invoke(context)
        finally:
            EXTENSION.reset(token)
        state, verdict = extension.state, extension.verdict
        return BasinEscapeOutput(
            latents=made.latents,
            width=made.width,
            height=made.height,
            transition_step=[] if state is None else state.transition_step.tolist(),
            score=[] if verdict is None else verdict.score.tolist(),
            suspect=[] if verdict is None else verdict.suspect.tolist(),
        )
