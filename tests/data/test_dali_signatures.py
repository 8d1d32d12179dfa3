# SPDX-License-Identifier: Apache-2.0
"""Every call of DALI in our files against the signatures that the installed release ships as text (.pyi and .py), the
options of GPU decoding included, which no CPU runs. Nothing of DALI is imported."""

import ast
import importlib.util
from pathlib import Path

import pytest

from tests.repo.tree import python_files, text_of
from tests.support.call_sites import CallSite, call_sites
from tests.support.signatures import misfit, signature_text
from tests.support.te_signatures import Sources

SPEC = importlib.util.find_spec("nvidia.dali")
assert SPEC is not None and SPEC.origin is not None
DALI = Path(SPEC.origin).parent
INSTALLED = Sources(DALI.parents[1])


def sites_in(text: str, path: str) -> list[CallSite]:
    return call_sites(text, path=path, library="nvidia.dali") if "nvidia" in text else []


SITES = [site for path in python_files(tests=True) for site in sites_in(text_of(path), path)]


def signature_of(site: CallSite) -> str | None:
    """Of what is called; pipeline_def hands its options on to Pipeline."""
    is_pipeline = site.callee.endswith(".pipeline_def")
    return signature_text(INSTALLED, "nvidia.dali.Pipeline" if is_pipeline else site.callee)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_dali_is_called_as_it_is_defined(site: CallSite) -> None:
    signature = signature_of(site)
    assert signature is not None, "DALI has no such name"
    assert site.unknown == () and misfit(site, signature) is None


def test_the_graph_is_among_them() -> None:
    """So that a parser that finds nothing does not pass; the decoder with the options that only a GPU gets."""
    from megatron_eve.data.read.image import GPU_DECODER_OPTIONS

    ours = {
        s.callee.removeprefix("nvidia.dali."): s for s in SITES if "data/read/image.py" in s.path
    }
    assert ours.keys() == {"fn.external_source", "fn.decoders.image", "pipeline_def"}
    assert set(ours["fn.decoders.image"].spread) == set(GPU_DECODER_OPTIONS)
    assert (
        "adjust_orientation" in ours["fn.decoders.image"].keywords
    )  # False: data/read/pixels.py turns
    assert "device_id" in ours["pipeline_def"].keywords


def test_images_come_back_from_the_gpu_by_a_method_that_is_there() -> None:
    """`as_cpu`, on what a pipeline whose last operator runs on the GPU returns."""
    text = text_of("megatron_eve/data/read/image.py")
    assert "images.as_cpu()" in text
    assert signature_text(INSTALLED, "nvidia.dali.tensors.TensorListGPU.as_cpu") == "()"


WRONG = """
from nvidia import dali
from nvidia.dali import fn as f, pipeline_def
from nvidia.dali.fn import decoders as dec
MORE = {"jpeg_fancy_upsample": True}
def build(options):
    f.resize(1, sizes=2)
    dec.image(1, **MORE)
    dali.fn.decoders.image_crop_random(1)
    pipeline_def(batchsize=3)
    f.resize(1, **options)
"""


def test_what_is_wrong_would_be_seen() -> None:
    """Under other names, behind **, in the pipeline's own options, and an operator that does not exist."""
    resize, image, operator, pipeline, unknown = sorted(
        sites_in(WRONG, "wrong.py"), key=lambda site: site.line
    )
    for site, word in ((resize, "sizes"), (image, "jpeg_fancy_upsample"), (pipeline, "batchsize")):
        signature = signature_of(site)
        assert signature is not None
        assert misfit(site, signature) == f"got an unexpected keyword argument '{word}'"
    assert signature_of(operator) is None
    assert unknown.unknown == ("**options",)


def test_no_pipeline_is_built_elsewhere() -> None:
    """By a module found by its name, which no import shows."""
    named = {
        path
        for path in python_files(tests=False)
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Constant) and str(node.value).startswith("nvidia.dali")
    }
    assert named == {"tools/bench/gpu_full.py"}  # asks whether it is there
