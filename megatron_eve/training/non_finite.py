# SPDX-License-Identifier: Apache-2.0
"""If a loss or gradient is not finite: which module it came from, and how often a run may skip the step."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_eve.errors import EveError

MAX_SKIPS_IN_A_ROW = 10
"""A run with train.on_non_finite=skip ends after skipping so many steps in a row."""


class NonFiniteLossError(EveError):
    """The loss or the gradient of a step is NaN or infinite; nothing was updated."""


class NonFiniteProbe:
    """Within this context, finds the first module whose output, or else the gradient of whose output, is not finite.

    Looks at every call of every module that holds no other, with a synchronisation each: for a second pass over a step
    that failed, not for training."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = chunks
        self._forward: str | None = None
        self._backward: str | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> "NonFiniteProbe":
        for chunk in self._chunks:
            for name, module in chunk.named_modules():
                if not any(module.children()):
                    name = name.replace("module.", "")  # of the wrappers
                    self._handles.append(module.register_forward_hook(self._watch(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def found(self) -> str | None:
        """What this process found, in words; None if all was finite."""
        return self._forward or self._backward

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                if self._forward is None and (count := _count(tensor)):
                    self._forward = f"output of {name} ({count} of {tensor.numel():,} values)"
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: self._look_at_gradient(name, grad))

        return hook

    def _look_at_gradient(self, name: str, gradient: Tensor) -> None:
        if self._backward is None and (count := _count(gradient)):
            self._backward = f"gradient of {name}'s output ({count} of {gradient.numel():,} values)"


def _count(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.isfinite(tensor.detach()).sum())


def origin_of_non_finite(
    chunks: Sequence[torch.nn.Module], again: Callable[[], object], *, pipeline_rank: int
) -> str:
    """Run the step's forward and backward once more with a probe; the first finding of each process that has one.

    Collective: `again` is, and the findings are gathered. Layers count from the start of their pipeline stage."""
    with NonFiniteProbe(chunks) as probe:
        again()
    mine = probe.found()
    world = torch.distributed.get_world_size()
    findings: list[str | None] = [None] * world
    torch.distributed.all_gather_object(
        findings, mine and f"{mine} on pipeline stage {pipeline_rank}"
    )
    distinct = list(dict.fromkeys(finding for finding in findings if finding))
    return "; ".join(distinct[:3]) or "no module in a second pass over the same samples"


class SkipGuard:
    """Ends a run that leaves out too many steps in a row."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def count(self, *, skipped: bool) -> None:
        """Raises: NonFiniteLossError after MAX_SKIPS_IN_A_ROW skipped steps."""
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise NonFiniteLossError(
                f"{self._in_a_row} steps in a row were not finite and were skipped; the last lines of the log name "
                "the modules"
            )
