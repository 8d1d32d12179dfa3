# SPDX-License-Identifier: Apache-2.0
"""The fused permutation and rotary positions: Triton's interpreter against the PyTorch twin, the attention module's own
arithmetic against both, and compilation for the GPUs that the product is for. Needs the package `triton`, which
`make test` installs, and neither a GPU nor its driver."""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eve.model.micro_batch import RankPlace, micro_batch
from tests.support.tiny import naive_pack, random_samples, tiny_model

triton = pytest.importorskip(
    "triton",
    reason="Triton is not installed: `make test` does it, or `pip install -c constraints.txt -e '.[test]'`",
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


def poisoned(like: Tensor, *shape: int, **options: Any) -> Tensor:
    """In place of Tensor.new_empty."""
    return like.new_full(shape, torch.nan if like.is_floating_point() else -1, **options)


class Case:
    """Inputs: `tokens` of a sequence in `rows` rows, of which the others hold none: by `routing`, or by chance."""

    def __init__(
        self,
        *,
        tokens: int,
        rows: int,
        dim: int,
        dtype: torch.dtype,
        routing: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(tokens + rows)
        if routing is None:
            self.to_sequence = torch.randperm(rows, generator=generator)[:tokens]
            self.to_rows = torch.full((rows,), tokens)
            self.to_rows[self.to_sequence] = torch.arange(tokens)
        else:
            self.to_sequence, self.to_rows = routing
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
        """q, k, v and the gradient; what the kernels leave unwritten in their outputs is NaN."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "new_empty", poisoned)
            return self._fused(module)

    def _fused(self, module: ModuleType) -> tuple[list[Tensor], Tensor]:
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
    assert_equal_to_the_twin(Case(**SIZES[size], dtype=dtype), interpreted)


def assert_equal_to_the_twin(case: Case, module: ModuleType) -> None:
    """Both compute in fp32 and round once; a contracted multiply-add may move the last bit."""
    (out, grad), (expected, expected_grad) = case.fused(module), case.twin(module)
    is_fp32 = case.mixed.dtype == torch.float32
    tolerance = dict(rtol=1e-6, atol=1e-6) if is_fp32 else dict(rtol=1e-3, atol=1e-3)
    for found, wanted in zip([*out, grad], [*expected, expected_grad], strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)
    assert torch.equal(out[2], expected[2])  # values are only moved
    empty = case.to_rows == case.to_sequence.numel()
    assert torch.equal(grad[empty], torch.zeros_like(grad[empty]))


PACKS = {
    "both segments are padding": (0, {}),
    "no picture: the vision segment is padding": (None, {}),
    "a picture and none": (2, {}),
    "rows of a sequence-parallel stream": (2, dict(tp_size=2, sequence_parallel=True)),
    "a part of a zigzag, with rows that hold no token": (2, dict(cp_rank=1, cp_size=2)),
    "a part of a zigzag without a picture": (None, dict(cp_size=2)),
}


def routing_of(samples: int | None, place: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(to_sequence, to_rows) that the product makes of a pack of so many samples; None: of one without a picture."""
    chosen = random_samples(2, seed=3)[1:] if samples is None else random_samples(samples, seed=3)
    pack = naive_pack(chosen, model=tiny_model(), tokens=48, align=8, sample_align=8)
    batch = micro_batch(
        pack, place=RankPlace(**place), split_attention=True, align=8, device=torch.device("cpu")
    )
    if samples is None:
        assert not len(batch.patches) and batch.routing.num_vision == 8
    return batch.routing.to_sequence, batch.routing.to_rows


@pytest.mark.parametrize("name", PACKS)
def test_kernels_equal_their_twin_on_packs(interpreted: ModuleType, name: str) -> None:
    """Routings of the product. A row without a token feeds nothing and gets an exact zero."""
    routing = routing_of(*PACKS[name])
    tokens, rows = (index.numel() for index in routing)
    assert (rows > tokens) == ("zigzag" in name)
    case = Case(tokens=tokens, rows=rows, dim=8, dtype=torch.float32, routing=routing)
    assert_equal_to_the_twin(case, interpreted)


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
        from megatron_eve.model.fused_rope import FusedRopeSelfAttention

        case = Case(**SIZES["rows without a token"], dtype=torch.float32)
        case.mixed[case.to_rows == case.to_sequence.numel()] = 0
        routing = ModalityPackedSeqParams(
            num_vision=0,
            num_local_vision=0,
            sequence_lengths=(),
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


SHAPES_7B = {"GROUPS": 4, "PER_GROUP": 7, "HALF": 64, "BLOCK_HALF": 64}


def compiled(kernel: str, *, capability: int, constants: dict[str, int]) -> Any:
    """A kernel as a launch compiles it: BF16, int64 indices, every pointer a multiple of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load_kernels("compiled_rope_permute"), kernel)
    types = {
        name: "*i64" if name in ("to_sequence", "to_rows") else "*bf16"
        for name in function.arg_names
    }
    types |= {"num_tokens": "i32"} if "num_tokens" in types else {}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if types[name].startswith("*")
    }
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}
    )


def bytes_on_the_stack(cubin: bytes, folder: Path) -> int:
    """Where registers go that do not fit, by the tool in Triton's own package."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,), (local,) = (re.findall(rf"{name}:(\d+)", printed) for name in ("STACK", "LOCAL"))
    return int(stack) + int(local)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_kernels_compile_for(kernel: str, capability: int, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """To machine code, at the 7B shapes, without spilling registers to memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = compiled(kernel, capability=capability, constants=SHAPES_7B)
    assert f".target sm_{capability}" in made.asm["ptx"]
    assert made.asm["cubin"][:4] == b"\x7fELF"
    assert bytes_on_the_stack(made.asm["cubin"], tmp_path) == 0


def test_a_spill_would_be_seen(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The same kernel with heads so wide that one warp cannot hold the angles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wide = {"GROUPS": 1, "PER_GROUP": 1, "HALF": 2048, "BLOCK_HALF": 2048}
    made = compiled("_forward_kernel", capability=90, constants=wide)
    assert bytes_on_the_stack(made.asm["cubin"], tmp_path) > 0
