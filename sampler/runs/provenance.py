"""The record of what made images: the model's weights, its scheduler, and the machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from .environment import environment


def settings_of(scheduler: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what decides images beside the weights: scheduler, dtype, device and library versions, as plain data."""
    return {
        "scheduler": {"class": type(scheduler).__name__, **_public(scheduler.config)},
        "dtype": str(dtype).removeprefix("torch."),
        **environment(device),
    }


def weights_sha256(pipe: Any) -> str:
    """The SHA-256 of a diffusers pipeline as it is: its modules' tensors and configurations by name, and its vocabularies.

    For weights on the meta device (sequential offloading), it hashes the source that the pipeline was loaded from instead.
    """
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            digest.update(f"{name} {json.dumps(_public(getattr(part, 'config', {})), sort_keys=True)}".encode())
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                if tensor.device.type == "meta":
                    digest.update(str(pipe.config.get("_name_or_path")).encode("utf-8", "surrogatepass"))
                else:
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif hasattr(part, "get_vocab"):
            digest.update(f"{name} {sorted(part.get_vocab().items())}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _public(config: Any) -> dict[str, Any]:
    """A configuration as json reads it back, without diffusers' private entries, whose order differs from run to run."""
    config = config.to_dict() if hasattr(config, "to_dict") else config
    return json.loads(json.dumps({name: value for name, value in config.items() if name[0] != "_"}, default=str))
