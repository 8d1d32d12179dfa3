# SPDX-License-Identifier: Apache-2.0
"""The fused permutation and rotary positions: Triton's interpreter against the PyTorch twin, the attention module's own
arithmetic against both, and compilation for the GPUs that the product is for. Needs the package `triton`, no GPU."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip(
    "triton", reason="Triton is not installed (it comes with torch's CUDA build)"
)

SOURCE = Path(__file__).parents[2] / "megatron_eve" / "kernels" / "rope_permute.py"
GROUPS, PER_GROUP = 2, 3
POISON = 1e30


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The kernels' module with Triton's interpreter in place of its compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield load_kernels("interpreted_rope_permute")


def load_kernels(name: str) -> ModuleType:
    """Under a name of its own: whether a kernel is interpreted is decided when its module is executed."""
    spec = importlib.util.spec_from_file_location(name, SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case:
    """Inputs: `tokens` of a sequence in `rows` rows of which the others hold none."""

    def __init__(self, *, tokens: int, rows: int, dim: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(tokens + rows)
        self.to_sequence = torch.randperm(rows, generator=generator)[:tokens]
        self.to_rows = torch.full((rows,), tokens)
        self.to_rows[self.to_sequence] = torch.arange(tokens)
        width = GROUPS * (PER_GROUP + 2) * dim
        self.mixed = torch.randn(rows, width, generator=generator).to(dtype)
        empty = self.to_rows == tokens
        self.mixed[empty] = POISON if dtype == torch.float32 else 6e4  # must feed nothing
        angles = torch.rand(tokens, dim // 2, generator=generator) * 100
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.d_out = [
            torch.randn(tokens, heads, dim, generator=generator).to(dtype)
            for heads in (GROUPS * PER_GROUP, GROUPS, GROUPS)
        ]

    def fused(self, module: ModuleType) -> tuple[list[Tensor], Tensor]:
        mixed = self.mixed.clone().requires_grad_()
        out = module.permute_rope(
            mixed,
            to_sequence=self.to_sequence,
            to_rows=self.to_rows,
            cos=self.cos,
            sin=self.sin,
            groups=GROUPS,
            per_group=PER_GROUP,
        )
        torch.autograd.backward(out, self.d_out)
        assert mixed.grad is not None
        return [x.detach() for x in out], mixed.grad

    def twin(self, module: ModuleType) -> tuple[list[Tensor], Tensor]:
        mixed = self.mixed.clone().requires_grad_()
        out = module.permute_rope_reference(
            mixed,
            to_sequence=self.to_sequence,
            cos=self.cos,
            sin=self.sin,
            groups=GROUPS,
            per_group=PER_GROUP,
        )
        torch.autograd.backward(out, self.d_out)
        assert mixed.grad is not None
        return [x.detach() for x in out], mixed.grad


SIZES = {
    "a permutation": dict(tokens=24, rows=24, dim=16),
    "rows without a token": dict(tokens=17, rows=24, dim=16),
    "one token": dict(tokens=1, rows=8, dim=16),
    "head dim no power of two": dict(tokens=13, rows=13, dim=24),
    "Qwen2.5's head dim": dict(tokens=5, rows=8, dim=128),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_equal_their_twin(interpreted: ModuleType, size: str, dtype: torch.dtype) -> None:
    """Both compute in fp32 and round once; a contracted multiply-add may move the last bit."""
    case = Case(**SIZES[size], dtype=dtype)
    (out, grad), (expected, expected_grad) = case.fused(interpreted), case.twin(interpreted)
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-3, atol=1e-3)
    for found, wanted in zip([*out, grad], [*expected, expected_grad], strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)
    assert torch.equal(out[2], expected[2])  # values are only moved


def test_rows_without_a_token_get_exact_zeros(interpreted: ModuleType) -> None:
    case = Case(**SIZES["rows without a token"], dtype=torch.float32)
    _, grad = case.fused(interpreted)
    empty = case.to_rows == case.to_sequence.numel()
    assert empty.any() and torch.equal(grad[empty], torch.zeros_like(grad[empty]))


def _attention_gap() -> float:
    """The fused module's q, k, v against those of the attention it derives from, on a real routing."""
    from megatron_eve.model.attention import EveSelfAttention
    from megatron_eve.model.modality import ModalityPackedSeqParams

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from megatron_eve.kernels.attention import FusedRopeSelfAttention

        case = Case(**SIZES["rows without a token"], dtype=torch.float32)
        case.mixed[case.to_rows == case.to_sequence.numel()] = 0
        routing = ModalityPackedSeqParams(
            to_sequence=case.to_sequence,
            to_rows=case.to_rows,
            rope_cos=case.cos,
            rope_sin=case.sin,
        )
        results = []
        for attention in (EveSelfAttention, FusedRopeSelfAttention):
            module = attention.__new__(attention)
            torch.nn.Module.__init__(module)
            module.num_query_groups_per_partition = GROUPS
            module.num_attention_heads_per_partition = GROUPS * PER_GROUP
            module.hidden_size_per_attention_head = 16
            results.append(module._to_heads(case.mixed, routing))
        gaps = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    return max(gaps)


def test_the_attention_module_computes_the_same_with_it(gloo1) -> None:  # type: ignore[no-untyped-def]
    (gap,) = gloo1.run(_attention_gap)
    assert gap < 1e-5


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_kernels_compile_for(kernel: str, capability: int, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """To machine code, at the 7B shapes, without spilling registers to memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    constants = {"GROUPS": 4, "PER_GROUP": 7, "HALF": 64, "BLOCK_HALF": 64}
    function = getattr(load_kernels("compiled_rope_permute"), kernel)
    types = {
        name: "*i64" if name in ("to_sequence", "to_rows") else "*bf16"
        for name in function.arg_names
    }
    types |= {"num_tokens": "i32"} if "num_tokens" in types else {}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=types, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}
    )
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert ".local" not in compiled.asm["ptx"]
