"""The folder that InvokeAI loads. It becomes the module of its own name there, so that name must be no package's."""

from basinescape.hosts.invokeai.node import BasinEscapeInvocation

__all__ = ["BasinEscapeInvocation"]
