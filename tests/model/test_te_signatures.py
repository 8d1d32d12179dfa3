# SPDX-License-Identifier: Apache-2.0
"""Every call towards Transformer Engine against the signatures of the pinned release, by syntax trees alone.

tests/golden/transformer_engine.json is made from the release's wheel by tests/support/te_signatures.py. Every call in
our files and in megatron-core's, read from the installed package, is bound to the signature there; and the stand-in has
exactly these, so that tests/model/test_te_backend.py runs what a keyword that does not exist would stop."""

import ast
import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.repo.tree import REPO, python_files, text_of
from tests.support.call_sites import CallSite, call_sites
from tests.support.signatures import misfit
from tests.support.te_runs import STAND_IN
from tests.support.te_signatures import (
    CALLABLES,
    MEGATRON_FILES,
    RECIPES,
    definition,
    megatron_call_sites,
    our_call_sites,
    parameters,
    table,
)

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


def test_the_facts_that_the_product_relies_on() -> None:
    """See model/te.py and config/gpu_checks.py."""
    from megatron_eve.config.gpu_checks import FP8_BLOCK

    assert TABLE["fp8_block"] == FP8_BLOCK
    assert TABLE["workspace_is_cached"] == ["functools.lru_cache(maxsize=None)"]
    assert TABLE["product_asks_for_its_workspace_by_name"] is True
    # megatron-core passes DelayedScaling two arguments that it does not have
    assert TABLE["recipes_ignore_unknown_arguments"] is True


NOT_IN_THE_RELEASE = {
    # names of older releases, tried where newer ones do not import
    "attention.apply_rotary_pos_emb",
    "cpp_extensions.cast_to_fp8",
    # behind have-not-imported: the router's product, which megatron-core then does by PyTorch; no router here
    "module.base.get_workspace",
    # constructed for weights that are FP8 themselves, which no option here asks for
    "float8_tensor.Float8Tensor",
    "tensor.float8_tensor.Float8Tensor",
}
MISFITS = {
    # the product of a router, see above
    "pytorch.cpp_extensions.general_gemm": {"workspace"},
    # the release ignores them: test_the_facts_that_the_product_relies_on; `interval` is for releases before 1.8
    "common.recipe.DelayedScaling.__init__": {"override_linear_precision", "interval"},
    # for releases before 1.0 and 1.2, see the branches there
    "pytorch.Linear.__init__": {
        *("ub_split_ag", "ub_split_rs", "ub_atomic_gemm_ag", "ub_atomic_gemm_rs"),
    },
    "pytorch.LayerNormLinear.__init__": {"ub_split_ag", "ub_atomic_gemm_ag"},
}
"""Options that megatron-core's text names, and that the release lacks."""


@pytest.mark.parametrize("site", our_call_sites(), ids=str)
def test_we_call_what_the_release_has(site: CallSite) -> None:
    """Every call in our own files, spelled out to the last option."""
    assert site.unknown == () and misfit(site, TABLE["signatures"][site.callee]) is None


@pytest.mark.parametrize("path", MEGATRON_FILES)
def test_megatron_calls_what_the_release_has(path: str) -> None:
    wrong = []
    for site in megatron_call_sites():
        if site.path != path:
            continue
        short = site.callee.removeprefix("transformer_engine.")
        if short.removeprefix("pytorch.") in NOT_IN_THE_RELEASE:
            assert TABLE["signatures"][site.callee] is None, f"{site}: it is there"
            continue
        lacking = MISFITS.get(short, set())
        left = [
            tuple(n for n in names if n not in lacking) for names in (site.keywords, site.spread)
        ]
        site = dataclasses.replace(site, keywords=left[0], spread=left[1])
        problem = misfit(site, TABLE["signatures"][site.callee])
        wrong += [f"{site}: {problem}"] if problem else []
    assert wrong == []


def test_the_calls_of_a_step_are_among_them() -> None:
    """So that a parser that finds nothing does not pass: modules, precision, recomputation, optimizer."""
    called = {site.callee.removeprefix("transformer_engine.") for site in megatron_call_sites()}
    assert called >= {
        "common.recipe.Float8BlockScaling",
        "common.recipe.Float8CurrentScaling",
        "pytorch.DotProductAttention.__init__",
        "pytorch.DotProductAttention.forward",
        "pytorch.LayerNormLinear.__init__",
        "pytorch.LayerNormLinear.forward",
        "pytorch.Linear.__init__",
        "pytorch.Linear.forward",
        "pytorch.RMSNorm",
        "pytorch.distributed.activation_recompute_forward",
        "pytorch.distributed.checkpoint",
        "pytorch.fp8_autocast",
        "pytorch.optimizers.FusedAdam",
        "pytorch.optimizers.multi_tensor_applier",
    }
    (adam,) = [s for s in megatron_call_sites() if s.callee.endswith("optimizers.FusedAdam")]
    assert {"lr", "eps", "betas", "adam_w_mode", "master_weights"} <= set(adam.spread)
    ours = {(site.path, site.callee.rsplit(".", 1)[-1]) for site in our_call_sites()}
    assert ("megatron_eve/model/te.py", "get_cublas_workspace") in ours


def test_packed_attention_is_called_as_the_release_defines_it() -> None:
    """What megatron-core hands on from PackedSeqParams, under the names that those have."""
    packed = {
        "qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "max_seqlen_q",
        "max_seqlen_kv", "attn_mask_type",
    }  # fmt: skip
    assert packed <= names(TABLE["parameters"]["DotProductAttention.forward"])


def test_what_replaces_a_function_takes_what_it_took() -> None:
    """te.py puts a function in the place of get_cublas_workspace."""
    text = text_of("megatron_eve/model/te.py")
    replacement = definition(ast.parse(text), "give_each_stream_a_workspace.get_cublas_workspace")
    assert parameters(replacement) == TABLE["parameters"]["get_cublas_workspace"]


def test_nothing_else_names_transformer_engine() -> None:
    """A call that no import shows would escape: of a module found by its name."""
    direct = {
        path
        for path in python_files(tests=False)
        for node in ast.walk(ast.parse(text_of(path)))
        if (
            isinstance(node, ast.Import | ast.ImportFrom)
            and any(
                name.startswith("transformer_engine")
                for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            )
        )
        or (isinstance(node, ast.Constant) and str(node.value).startswith("transformer_engine"))
    }
    # accelerators.py asks whether the module has FusedAdam, and calls nothing.
    assert direct == {"megatron_eve/model/te.py", "megatron_eve/model/accelerators.py"}


EVASIONS = """
import transformer_engine as engine
from transformer_engine.pytorch import Linear as L, fp8_autocast
from transformer_engine import pytorch as te
import transformer_engine.pytorch.optimizers
import functools
OPTIONS = {"bias": True} | dict(return_bias=True)
class Mine(te.RMSNorm):
    def __init__(self):
        super().__init__(hidden=1)
def build():
    from transformer_engine.pytorch import distributed
    more = {} if build else OPTIONS
    more["nonsense"] = 1
    cls = L
    cls(1, 2, **more)
    with fp8_autocast(enable=True):
        distributed.checkpoint(build)
    functools.partial(engine.pytorch.Linear, in_feature=1)
    transformer_engine.pytorch.optimizers.FusedAdam([], rate=1.0)
"""


@pytest.mark.parametrize(
    ("callee", "word"),
    [
        ("pytorch.RMSNorm.__init__", "hidden"),
        ("pytorch.Linear", "nonsense"),
        ("pytorch.fp8_autocast", "enable"),
        ("pytorch.Linear", "in_feature"),
        ("pytorch.optimizers.FusedAdam", "rate"),
    ],
)
def test_a_wrong_keyword_is_found_under_any_name(callee: str, word: str) -> None:
    """Aliases of modules and names, imports in functions, context managers, parents, partial, spread options."""
    tables = {
        "pytorch.RMSNorm.__init__": "(hidden_size: int=1)",
        **{
            f"pytorch.{name}": TABLE["signatures"].get(f"transformer_engine.pytorch.{name}")
            or TABLE["signatures"][f"transformer_engine.pytorch.{name}.__init__"]
            for name in ("Linear", "fp8_autocast", "optimizers.FusedAdam")
        },
    }
    found = [
        misfit(site, tables[callee])
        for site in call_sites(EVASIONS, path="evasions.py", library="transformer_engine")
        if site.callee == f"transformer_engine.{callee}"
    ]
    assert f"got an unexpected keyword argument '{word}'" in found
