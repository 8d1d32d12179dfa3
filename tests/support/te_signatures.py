# SPDX-License-Identifier: Apache-2.0
r"""The table of Transformer Engine's signatures, read from its sources without importing them.

    python -m tests.support.te_signatures transformer_engine-2.11.0-py3-none-any.whl \
        > tests/golden/transformer_engine.json

The wheel is pure Python and loads nowhere without a GPU's libraries; its syntax tree says all that is needed: the
parameters of what is called, and the few facts of its insides that the product relies on. What is called is found in
our own files and in those of megatron-core that stand between us and Transformer Engine."""

import ast
import functools
import hashlib
import importlib.util
import json
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

from tests.repo.tree import python_files, text_of
from tests.support.call_sites import CallSite, call_sites
from tests.support.signatures import signature_text

_PYTORCH = "transformer_engine/pytorch"
_ATTENTION = f"{_PYTORCH}/attention/dot_product_attention/dot_product_attention.py"
CALLABLES = {
    "Linear": (f"{_PYTORCH}/module/linear.py", "Linear.__init__"),
    "Linear.forward": (f"{_PYTORCH}/module/linear.py", "Linear.forward"),
    "LayerNormLinear": (f"{_PYTORCH}/module/layernorm_linear.py", "LayerNormLinear.__init__"),
    "LayerNormLinear.forward": (
        f"{_PYTORCH}/module/layernorm_linear.py",
        "LayerNormLinear.forward",
    ),
    "RMSNorm": (f"{_PYTORCH}/module/rmsnorm.py", "RMSNorm.__init__"),
    "DotProductAttention": (_ATTENTION, "DotProductAttention.__init__"),
    "DotProductAttention.forward": (_ATTENTION, "DotProductAttention.forward"),
    "fp8_autocast": (f"{_PYTORCH}/quantization.py", "fp8_autocast"),
    "checkpoint": (f"{_PYTORCH}/distributed.py", "checkpoint"),
    "get_cublas_workspace": (f"{_PYTORCH}/cpp_extensions/gemm.py", "get_cublas_workspace"),
    "FusedAdam": (f"{_PYTORCH}/optimizers/fused_adam.py", "FusedAdam.__init__"),
}
MEGATRON_FILES = (
    "extensions/transformer_engine.py",
    "fp8_utils.py",
    "optimizer/__init__.py",
    "optimizer/clip_grads.py",
    "optimizer/distrib_optimizer.py",
    "optimizer/optimizer.py",
    "tensor_parallel/layers.py",
    "tensor_parallel/random.py",
    "transformer/transformer_block.py",
)
"""Of megatron.core: what a step of backend `te` runs through."""
RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling")
_RECIPE_FILE = "transformer_engine/common/recipe/__init__.py"


class Sources:
    """The Python files of a wheel or of a folder that holds `transformer_engine/`."""

    def __init__(self, place: Path) -> None:
        self._archive = zipfile.ZipFile(place) if place.is_file() else None
        self._folder = place

    def tree(self, path: str) -> ast.Module:
        text = self._archive.read(path) if self._archive else (self._folder / path).read_bytes()
        with warnings.catch_warnings():  # of escapes in their docstrings
            warnings.simplefilter("ignore")
            return ast.parse(text)

    def has(self, path: str) -> bool:
        if self._archive is not None:
            return path in self._archive.namelist()
        return (self._folder / path).is_file()


@functools.cache
def our_call_sites() -> list[CallSite]:
    """Of Transformer Engine's names, in the packages and the tests that run on a GPU."""
    paths = [p for p in python_files(tests=True) if not p.startswith("tests/support/stand_in_te")]
    return [site for path in paths for site in _sites(text_of(path), path)]


@functools.cache
def megatron_call_sites() -> list[CallSite]:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    return [site for name in MEGATRON_FILES for site in _sites((folder / name).read_text(), name)]


def _sites(text: str, path: str) -> list[CallSite]:
    if "transformer_engine" not in text:
        return []
    return call_sites(text, path=path, library="transformer_engine")


def definition(tree: ast.Module, name: str) -> Any:
    """The class or function `name` or `Class.method`."""
    body: Any = tree
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        body = next(n for n in body.body if isinstance(n, kinds) and n.name == part)
    return body


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names in order without self; `*` before keyword-only ones, `=` behind those with a default."""
    args = function.args
    positional = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    first_default = len(positional) - len(args.defaults)
    found = [name + ("=" if i >= first_default else "") for i, name in enumerate(positional)]
    found = [name for name in found if name != "self"]
    if args.vararg:
        found.append(f"*{args.vararg.arg}")
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(f"*{arg.arg}" + ("=" if default is not None else ""))
    return [*found, *([f"**{args.kwarg.arg}"] if args.kwarg else [])]


def calls_within(node: ast.AST) -> set[str]:
    return {
        n.func.id
        for n in ast.walk(node)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }


def table(place: Path) -> dict[str, Any]:
    """Everything that the tests compare with."""
    sources = Sources(place)
    recipes = sources.tree(_RECIPE_FILE)
    gemm = sources.tree(f"{_PYTORCH}/cpp_extensions/gemm.py")
    workspace = definition(gemm, "get_cublas_workspace")
    return {
        "wheel": place.name,
        "sha256": hashlib.sha256(place.read_bytes()).hexdigest() if place.is_file() else None,
        "parameters": {
            name: parameters(definition(sources.tree(path), path_in_file))
            for name, (path, path_in_file) in CALLABLES.items()
        },
        "signatures": {
            callee: signature_text(sources, callee)
            for callee in sorted({s.callee for s in (*our_call_sites(), *megatron_call_sites())})
        },
        "recipes": {
            name: [
                n.target.id for n in definition(recipes, name).body if isinstance(n, ast.AnnAssign)
            ]
            for name in RECIPES
        },
        "recipes_ignore_unknown_arguments": any(
            isinstance(n, ast.ImportFrom) and n.module == "pydantic.dataclasses"
            for n in recipes.body
        ),
        "workspace_is_cached": [ast.unparse(d) for d in workspace.decorator_list],
        "product_asks_for_its_workspace_by_name": "get_cublas_workspace"
        in calls_within(definition(gemm, "general_gemm")),
        "fp8_block": _block_edge(sources),
    }


def _block_edge(sources: Sources) -> int:
    """The literal with which the block quantizer's module sets its block_len."""
    tree = sources.tree(f"{_PYTORCH}/tensor/float8_blockwise_tensor.py")
    quantizer = definition(tree, "Float8BlockQuantizer.__init__")
    for node in ast.walk(quantizer):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.block_len":
            return int(ast.literal_eval(node.value))
    raise ValueError("Float8BlockQuantizer sets no block_len")


if __name__ == "__main__":
    json.dump(table(Path(sys.argv[1])), sys.stdout, indent=1)
    print()
