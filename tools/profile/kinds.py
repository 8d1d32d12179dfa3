# SPDX-License-Identifier: Apache-2.0
"""Kinds of work by the names of kernels and operators. The first pattern that fits decides; a name that fits none is
`other`, and the report's list of top kernels shows whether that matters. Where work belongs (optimizer, permutation) is
known from its range and overrides the name, except for communication and copies."""

import re

COMMUNICATION = "communication"
OTHER = "other"
COPY = "copy"

_COLLECTIVES = (
    ("all-reduce", r"all_?reduce"),
    ("all-gather", r"all_?gather"),
    ("reduce-scatter", r"reduce_?scatter"),
    ("broadcast", r"broadcast"),
    ("send-receive", r"send_?recv|isend|irecv|\b(send|recv)\b"),
)
_KERNELS = (
    ("attention", r"flash|fmha|sdpa|fused_attn|scaled_dot_product|ScaledDotProduct|attention"),
    ("matrix product", r"gemm|xmma|cutlass|cublas|nvjet|splitk|gemv|aten::(mm|addmm|bmm|baddbmm|matmul|linear)$"),
    ("norm", r"norm"),
    ("optimizer", r"adam|multi_tensor"),
    ("cast and transpose", r"cast|transpose|quantize|fp8|amax"),
    ("gather and scatter", r"index|gather|scatter|embedding|permute"),
    ("elementwise", r"elementwise|vectorized|reduce|softmax|silu|swiglu|gelu|cat|triton|fill|rope|rotary"
                    r"|aten::(add|mul|div|sub|sum|mean|pow|square|rsqrt|sqrt|exp|log|neg|sigmoid|lerp|addc|zero|copy|max|min)"),
)  # fmt: skip


def communication_kind(name: str) -> str | None:
    """`communication: all-reduce` for a kernel of NCCL or an operation of gloo; None for anything else."""
    if not re.search(r"nccl|^gloo:", name, flags=re.I):
        return None
    for kind, pattern in _COLLECTIVES:
        if re.search(pattern, name, flags=re.I):
            return f"{COMMUNICATION}: {kind}"
    return f"{COMMUNICATION}: {OTHER}"


def kernel_kind(name: str) -> str:
    """The kind of a kernel or operator."""
    communication = communication_kind(name)
    if communication is not None:
        return communication
    for kind, pattern in _KERNELS:
        if re.search(pattern, name, flags=re.I):
            return kind
    return OTHER


def placed_kind(kind: str, *, module: str) -> str:
    """The kind once it is known where the work belongs."""
    if kind.startswith((COMMUNICATION, COPY)):
        return kind
    return module if module in ("optimizer", "permutation") else kind
