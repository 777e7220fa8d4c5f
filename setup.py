from pathlib import Path

from setuptools import find_packages, setup

# Benchmarks, and the training of the pipelines that ship, run in a checkout alone.
BENCH = find_packages("bench", exclude=["speed*", "gpu*", "testbed*"])
PACKAGES = ["basinescape", *(f"basinescape.{name}" for name in find_packages("sampler"))]
PACKAGES += ["basinescape.kernels", "basinescape.bench", *(f"basinescape.bench.{name}" for name in BENCH)]

setup(
    name="basinescape",
    version="0.1.0",
    description="A fast sampler for guided diffusion models that keeps samples from reproducing training images",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir={"basinescape": "sampler", "basinescape.kernels": "kernels", "basinescape.bench": "bench"},
    package_data={
        "basinescape": [
            "py.typed",
            "assets/captions.jsonl",
            "assets/tiny/**/*",
            "assets/tiny/*",
            "assets/flow/**/*",
            "assets/flow/*",
        ],
        "basinescape.auditing": ["*.html.jinja"],
        "basinescape.bench.evaluation": ["*.html.jinja"],
        "basinescape.hosts.comfyui": ["example_workflows/*.json", "pyproject.toml"],
        "basinescape.hosts.webui": ["scripts/*.py"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "diffusers>=0.35",
        "transformers>=4.50",
        "safetensors>=0.4",
        "scipy",
        "numpy",
        "pillow",
        "matplotlib",
        "tqdm",
        "typer>=0.12",
        "jinja2",
        "accelerate",
        "psutil",
        "packaging",
    ],
    extras_require={
        "test": [
            "c2pa-python",
            "datasets",
            "peft",
            "pyarrow",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "mypy",
            "ruff",
            "torchsde",
            "webdataset",
        ],
        "docs": ["mkdocs", "mkdocstrings-python"],
        "evaluate": ["onnxruntime", "pyyaml", "scikit-learn", "torchmetrics"],
        "kdiffusion": ["k-diffusion", "setuptools<82"],  # its clip-anytorch imports pkg_resources, which later ones lack
        "xformers": ["xformers"],
        "ray": ["ray"],
        "formats": ["datasets", "prometheus_client", "pyarrow", "webdataset"],
        "provenance": ["c2pa-python"],
    },
    entry_points={
        "console_scripts": ["basinescape=basinescape.bench.cli:main"],
        # Plugins of servers, which find them by these groups.
        "sglang.multimodal_gen.plugins": ["basinescape=basinescape.hosts.sglang:register"],
        "vllm_omni.general_plugins": ["basinescape=basinescape.hosts.vllm_omni:register"],
    },
)
