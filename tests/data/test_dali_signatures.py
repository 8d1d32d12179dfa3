# SPDX-License-Identifier: Apache-2.0
"""Every keyword of every DALI call in the product against the signatures that the installed release ships (.pyi), the
options of GPU decoding included, which no CPU runs."""

import ast
import importlib.util
import inspect
import warnings
from pathlib import Path

import pytest

from tests.repo.tree import python_files, text_of

SPEC = importlib.util.find_spec("nvidia.dali")
assert SPEC is not None and SPEC.origin is not None
DALI = Path(SPEC.origin).parent


def dali_calls() -> list[tuple[str, str, set[str]]]:
    """(file, operator such as decoders.image, its keywords), dicts of options spread by ** resolved by hand below."""
    found = []
    for path in python_files(tests=False):
        if "nvidia.dali" not in text_of(path):
            continue
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).startswith("fn."):
                found.append(
                    (path, name.removeprefix("fn."), {k.arg for k in node.keywords if k.arg})
                )
    return found


def keywords_of(operator: str) -> set[str]:
    if operator == "external_source":  # written in Python, not in the stubs
        from nvidia.dali import fn

        return set(inspect.signature(fn.external_source).parameters) - {"kwargs"}
    *module, name = operator.split(".")
    stub = DALI.joinpath("fn", *module, "__init__.pyi")
    with warnings.catch_warnings():  # of escapes in the stubs' docstrings
        warnings.simplefilter("ignore")
        tree = ast.parse(stub.read_text())
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert functions, operator
    return {arg.arg for node in functions for arg in (*node.args.args, *node.args.kwonlyargs)}


def test_dali_is_called_with_keywords_that_it_has() -> None:
    calls = dali_calls()
    assert {operator for _, operator, _ in calls} >= {"external_source", "decoders.image", "resize"}
    wrong = {
        f"{path}: fn.{operator}": unknown
        for path, operator, keywords in calls
        if (unknown := keywords - keywords_of(operator))
    }
    assert wrong == {}


def test_gpu_decoding_options_are_options_of_the_decoder() -> None:
    from megatron_eve.data.image import GPU_DECODER_OPTIONS

    assert GPU_DECODER_OPTIONS.keys() <= keywords_of("decoders.image")


def test_the_pipeline_is_defined_with_keywords_that_it_has() -> None:
    from nvidia.dali import Pipeline

    has = set(inspect.signature(Pipeline.__init__).parameters)
    for path in python_files(tests=False):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipeline_def":
                assert {k.arg for k in node.keywords if k.arg} <= has, path


@pytest.mark.parametrize("operator", ["decoders.image"])
def test_a_wrong_keyword_would_be_seen(operator: str) -> None:
    assert "jpeg_fancy_upsample" not in keywords_of(operator)
