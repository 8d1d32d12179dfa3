# SPDX-License-Identifier: Apache-2.0
"""AdamW with the state layout of Transformer Engine's FusedAdam, for machines without Transformer Engine.

One integer `step` per parameter group and `exp_avg`, `exp_avg_sq` per parameter: what megatron-core's distributed
optimizer saves and loads on a GPU, so that checkpoints made on a CPU have the same layout. The update is AdamW
(Loshchilov & Hutter, arXiv 1711.05101, algorithm 2) with bias correction, equal to torch.optim.AdamW
(tests/optim/test_adam.py).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_eve import device


def use_where_no_other() -> None:
    """Put FusedAdam where megatron-core looks for one; on a GPU only without Transformer Engine's or Apex's, which are
    faster.

    megatron-core would fall back to torch.optim.AdamW, whose `step` per parameter its distributed optimizer cannot save
    and resume. An Adam with their state layout takes the production path."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if device.has_gpu() and distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


class FusedAdam(torch.optim.Optimizer):
    """See the module docstring. `adam_w_mode=False` adds the weight decay to the gradient instead (plain Adam)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise TypeError(
                "FusedAdam.step takes no closure: megatron-core computes the gradients itself"
            )
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        correction1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
        correction2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
        state = self.state[param]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        grad = param.grad
        assert grad is not None
        if group["weight_decay"] and self.adam_w_mode:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            grad = grad.add(param, alpha=group["weight_decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (state["exp_avg_sq"].sqrt() / correction2**0.5).add_(group["eps"])
        param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / correction1)
