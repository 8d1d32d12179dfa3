# SPDX-License-Identifier: Apache-2.0
"""Every call towards Transformer Engine against the signatures of the pinned release, by syntax trees alone.

tests/golden/transformer_engine.json is made from the release's wheel by tests/support/te_signatures.py. The stand-in
has exactly these signatures, so that tests/model/test_te_backend.py fails on a keyword that does not exist; and
megatron-core's wrappers, read from the installed package, pass nothing else."""

import ast
import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.repo.tree import REPO, python_files, text_of
from tests.support.te_runs import STAND_IN
from tests.support.te_signatures import CALLABLES, RECIPES, definition, parameters, table

TABLE: dict[str, Any] = json.loads((REPO / "tests/golden/transformer_engine.json").read_text())
STAND_IN_FILES = {
    "Linear": "module.py",
    "LayerNormLinear": "module.py",
    "RMSNorm": "module.py",
    "DotProductAttention": "attention.py",
    "fp8_autocast": "fp8.py",
    "checkpoint": "distributed.py",
    "get_cublas_workspace": "cpp_extensions/gemm.py",
}


def names(listed: list[str]) -> set[str]:
    return {name.strip("*=") for name in listed}


def megatron_wrappers() -> ast.Module:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    return ast.parse((Path(spec.origin).parent / "extensions/transformer_engine.py").read_text())


def test_the_table_is_of_the_pinned_release() -> None:
    (pinned,) = re.findall(r"^transformer-engine==(\S+)", text_of("constraints.txt"), flags=re.M)
    assert TABLE["wheel"].startswith(f"transformer_engine-{pinned}-")


def test_the_table_is_that_of_an_installed_release() -> None:
    try:
        distribution = importlib.metadata.distribution("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Transformer Engine is not installed")
    found = table(Path(str(distribution.locate_file(""))))
    assert {k: v for k, v in found.items() if k not in ("wheel", "sha256")} == {
        k: v for k, v in TABLE.items() if k not in ("wheel", "sha256")
    }


@pytest.mark.parametrize("name", [n for n in CALLABLES if n.split(".")[0] in STAND_IN_FILES])
def test_the_stand_in_has_the_signatures_of_the_release(name: str) -> None:
    first = name.split(".")[0]
    path = STAND_IN / "transformer_engine/pytorch" / STAND_IN_FILES[first]
    function = definition(ast.parse(path.read_text()), CALLABLES[name][1])
    assert parameters(function) == TABLE["parameters"][name]


@pytest.mark.parametrize("name", RECIPES)
def test_the_stand_in_has_the_recipes_of_the_release(name: str) -> None:
    """Those fields that anything sets, with nothing added."""
    path = STAND_IN / "transformer_engine/common/recipe/__init__.py"
    body = definition(ast.parse(path.read_text()), name).body
    fields = {n.target.id for n in body if isinstance(n, ast.AnnAssign)}
    assert fields and fields <= set(TABLE["recipes"][name])


@pytest.mark.parametrize(
    ("wrapper", "wrapped"),
    [
        ("TELinear", "Linear"),
        ("TELayerNormColumnParallelLinear", "LayerNormLinear"),
        ("TEDotProductAttention", "DotProductAttention"),
    ],
)
def test_megatron_passes_what_the_release_takes(wrapper: str, wrapped: str) -> None:
    """Keywords of super().__init__(...) and what is put into its **extra_kwargs; old userbuffer options aside."""
    init = definition(megatron_wrappers(), f"{wrapper}.__init__")
    passed = keywords_of_super(init, "__init__")
    for node in ast.walk(init):
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "extra_kwargs":
            passed.add(ast.literal_eval(target.slice))
    obsolete = {"ub_split_ag", "ub_atomic_gemm_ag", "ub_split_rs", "ub_atomic_gemm_rs"}
    assert len(passed) > 8
    assert passed - obsolete <= names(TABLE["parameters"][wrapped])


def test_megatron_calls_the_forwards_as_the_release_defines_them() -> None:
    wrappers = megatron_wrappers()
    for wrapper, wrapped in (
        ("TELinear", "Linear"),
        ("TELayerNormColumnParallelLinear", "LayerNormLinear"),
    ):
        passed = keywords_of_super(definition(wrappers, f"{wrapper}.forward"), "forward")
        assert passed == {"is_first_microbatch"} <= names(TABLE["parameters"][f"{wrapped}.forward"])
    packed = {
        "qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "max_seqlen_q",
        "max_seqlen_kv", "attn_mask_type",
    }  # fmt: skip
    assert packed <= names(TABLE["parameters"]["DotProductAttention.forward"])


def keywords_of_super(function: ast.FunctionDef, method: str) -> set[str]:
    calls = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"super().{method}"
    ]
    assert calls
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None}


def test_the_facts_that_the_product_relies_on() -> None:
    """See model/te.py and config/gpu_checks.py."""
    from megatron_eve.config.gpu_checks import FP8_BLOCK

    assert TABLE["fp8_block"] == FP8_BLOCK
    assert TABLE["workspace_is_cached"] == ["functools.lru_cache(maxsize=None)"]
    assert TABLE["product_asks_for_its_workspace_by_name"] is True
    # megatron-core passes DelayedScaling two arguments that it does not have
    assert TABLE["recipes_ignore_unknown_arguments"] is True


def test_nothing_calls_transformer_engine_past_the_wrappers() -> None:
    """Direct calls would need a check here: its modules are reached through megatron-core, but for te.py's function."""
    direct = {
        path
        for path in python_files(tests=False)
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(
            name.startswith("transformer_engine")
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        )
    }
    assert direct == {"megatron_eve/model/te.py"}
