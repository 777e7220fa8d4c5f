"""The hosts that are tested, and what of them runs in the tests: the docs' matrix is made of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A host, the package and version that it was tested with, the month, how, and the file of its tests.

    how: "package": installed, and run as a whole; "own code": files or functions of the package, where it is at hand, and a
    stand-in of the same contract everywhere; "stand-in": the contract alone.
    """

    name: str
    package: str
    version: str
    date: str
    how: str
    file: str

    def __str__(self):
        return f"{self.name} {self.version} ({self.date})"


SGLANG = Host("SGLang-Diffusion", "sglang", "0.5.23", "November 2026", "own code", "test_sglang.py")
VLLM_OMNI = Host("vLLM-Omni", "vllm-omni", "0.30.0", "November 2026", "own code", "test_vllm_omni.py")
FORGE = Host("Forge", "stable-diffusion-webui-forge", "dfdcbab", "June 2025", "own code", "test_webui.py")
INVOKEAI = Host("InvokeAI", "invokeai", "6.14.2", "November 2026", "own code", "test_invokeai.py")
HOSTS = [
    Host("diffusers pipelines", "diffusers", "0.42.1", "November 2026", "package", "test_escape_pipeline.py"),
    Host("diffusers modular", "diffusers", "0.42.1", "November 2026", "package", "test_modular.py"),
    Host(
        "diffusers modular: Flux.2, Qwen-Image, Wan",
        "diffusers",
        "0.42.1",
        "November 2026",
        "package",
        "test_modular_families.py",
    ),
    Host("k-diffusion", "k-diffusion", "0.1.1.post1", "November 2026", "package", "test_kdiffusion.py"),
    Host("ComfyUI", "comfyui", "0.18.1", "November 2026", "stand-in", "test_comfyui.py"),
    SGLANG,
    VLLM_OMNI,
    FORGE,
    INVOKEAI,
    Host("AUTOMATIC1111", "stable-diffusion-webui", "029adbe", "February 2025", "stand-in", "test_webui.py"),
]
