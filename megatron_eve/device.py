# SPDX-License-Identifier: Apache-2.0
"""What a machine without a GPU needs: megatron-core made to run on CPU tensors.

`install()` makes unmodified megatron-core 0.16.1 run on CPU tensors with the gloo backend; where CUDA is available it
does nothing. megatron-core has no CPU path of its own; it names the CUDA device in four ways, which are redirected:

1. `torch.cuda.current_device()` passed as `device=`          (layers, DDP buffers, pipeline communication)
2. the literal "cuda" in `torch.zeros(..., device="cuda")`, `t.cuda()`, `t.to("cuda")`     (schedules, optimizers)
3. the legacy dtype strings `param.type() == "torch.cuda.FloatTensor"`                     (optimizers)
4. streams, synchronisation and the CUDA random generator

megatron-core is also imported with torch.compile switched off, and a warning about its random generator is filtered
out. Elsewhere three more of its objects, or of Transformer Engine's, are changed: the optimizer's Adam (optim/adam.py),
the padding of its gradient buffers (checkpoint/training_state.py) and the workspaces of products (model/te.py).

The packages that import megatron.core call `install()` first.
"""

import contextlib
import logging
import sys
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_eve.errors import EveError

CPU = torch.device("cpu")
_active_mode: "_CudaMeansCpu | None" = None


def has_gpu() -> bool:
    """Whether this process computes on CUDA devices."""
    return torch.cuda.is_available()


def local_device(local_rank: int) -> torch.device:
    """The device that the process with this rank on its node computes on."""
    return torch.device("cuda", local_rank) if has_gpu() else CPU


def collective_backend() -> str:
    """The torch.distributed backend that fits the device."""
    return "nccl" if has_gpu() else "gloo"


def device_name() -> str | None:
    """The name of this process' GPU, for example "NVIDIA H200"; None on a CPU."""
    return torch.cuda.get_device_name() if has_gpu() else None


def peak_memory_gib() -> float | None:
    """The most memory that this process' tensors have taken on its device; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if has_gpu() else None


def install() -> None:
    """Redirect megatron-core's four ways of naming CUDA to the CPU. Idempotent; does nothing where CUDA is available.

    Raises: EveError if megatron.core was imported before (its import-time decorators would already be evaluated).
    """
    global _active_mode
    if _active_mode is not None or has_gpu():
        return
    if "megatron.core" in sys.modules:
        raise EveError(
            "megatron.core was imported before megatron_eve on a machine without CUDA; "
            "import megatron_eve.model (or any part of megatron_eve that uses megatron-core) first"
        )
    _redirect_cuda_functions()
    _import_megatron_without_compile()
    _active_mode = _CudaMeansCpu()
    _active_mode.__enter__()


def _redirect_cuda_functions() -> None:
    # Every replacement is its own function object: torch._dynamo keeps a table of torch functions by identity and
    # rejects duplicates.
    cuda: Any = torch.cuda
    stream = _InOrder()
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda device=None: None
    cuda.set_device = lambda device: None
    cuda.empty_cache = lambda: None
    cuda.Stream = _InOrder
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    # torch.manual_seed() itself calls torch.cuda.manual_seed_all(), so only megatron-core's explicit
    # torch.cuda.manual_seed() may reseed the one generator that a CPU has.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _import_megatron_without_compile() -> None:
    # megatron-core decorates about 50 functions with torch.compile at import; on a CPU each first call would cost a
    # C++ compilation (40 s for one fused activation), and the decorators alone 3 s of import.
    real_compile = torch.compile
    torch.compile = lambda fn=None, **_: fn if fn is not None else (lambda f: f)  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():  # on a CPU nobody expects Apex and Transformer Engine
            warnings.simplefilter("ignore")
            import megatron.core.models.gpt  # noqa: F401  (evaluates every decorator now)
            from megatron.core.tensor_parallel import random as tp_random
    finally:
        torch.compile = real_compile
    tp_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    tp_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    # fork() warns when the CPU generator moves inside it; here that is the generator it forks.
    logging.getLogger(tp_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


class _InOrder(torch.cuda.Stream):
    """A CUDA stream on a machine that does all work, in order, before the call returns."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_InOrder":
        return object.__new__(cls)  # the real constructor refuses without CUDA

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> None: ...  # type: ignore[override]
    def synchronize(self) -> None: ...


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, torch.device) and device.type == "cuda"


_CHANGED_CALLS = frozenset(
    {
        torch.Tensor.cuda,
        torch.Tensor.pin_memory,
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.backward,
    }
)
"""What is called in another way even without keywords."""


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of every torch call that names CUDA (cases 2 and 3 above)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not kwargs and func not in _CHANGED_CALLS:
            return func(*args)  # nearly all calls, ten thousand a step
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        elif func is torch.Tensor.backward:
            # func runs with this mode popped; the backward of custom Functions needs it back
            with self:
                return _backward(*args, **kwargs)
        return func(*args, **kwargs)


def _backward(
    tensor: torch.Tensor,
    gradient: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)
