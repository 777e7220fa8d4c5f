from pathlib import Path

from setuptools import setup

setup(
    name="basinescape",
    version="0.1.0",
    description="A fast sampler for guided diffusion models that keeps samples from reproducing training images",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        "basinescape",
        "basinescape.kernels",
        "basinescape.hosts",
        "basinescape.models",
        "basinescape.bench",
        "basinescape.bench.evaluation",
        "basinescape.bench.gpu",
        "basinescape.bench.methods",
        "basinescape.bench.speed",
        "basinescape.bench.testbed",
    ],
    package_dir={"basinescape": "sampler", "basinescape.kernels": "kernels", "basinescape.bench": "bench"},
    package_data={"basinescape.bench": ["tiny/**/*", "tiny/*"], "basinescape.bench.evaluation": ["report.html.jinja"]},
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
        "packaging",
    ],
    extras_require={
        "test": ["peft", "pyarrow", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "torchsde"],
        "evaluate": ["faiss-cpu", "onnxruntime", "pyyaml", "scikit-learn", "torchmetrics"],
        "xformers": ["xformers"],
    },
    entry_points={"console_scripts": ["basinescape=basinescape.bench.cli:main"]},
)
