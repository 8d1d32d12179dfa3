# SPDX-License-Identifier: Apache-2.0
"""The official 20 steps in float64, and how far float32 runs of them may lie apart.

Adam divides by the gradient's own size. So an element whose gradient is below the rounding of its tensor's gradient
(the key bias in front of a softmax, which hardly feels it) moves by rounding alone, and no one relative tolerance on
weights would be both true and strict. The bound here follows each element through the steps instead. With d_t the
difference of the two runs' gradients in step t, s = sqrt(v) + eps, primes for the other run, and E_b the
bias-corrected moving average with decay b:

    |m' - m| <= E_beta1(d)            |s' - s| <= sqrt(E_beta2(d^2))  =: e        (Minkowski)
    |m'/s' - m/s| <= (|m' - m| + |m/s| e) / (s - e)

d_t is the tolerance that the gradients themselves are held to. An update is below 2 lr (Cauchy-Schwarz, in the first
20 steps with these betas), so two of them differ by 4 lr at most. Adding an update to a weight rounds by half an ulp.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_eve.config.schema import ModelConfig
from tests.support.official import (
    PATCH_EMBEDDING_LR,
    PEAK_LR,
    STEPS,
    WARMUP_FRACTION,
    initial_weights,
    micro_batches_of_step,
)
from tests.support.reference_eve import ReferenceEve, batch_loss

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True, slots=True)
class ExactSteps:
    """The float64 run; trained parameters by their official names."""

    losses: Tensor  # [20]
    final: dict[str, Tensor]
    bound: dict[str, Tensor]  # on the difference of two float32 runs, element by element


@cache
def exact_steps(case: str, model: ModelConfig, *, stage2_1: bool, grad_rtol: float) -> ExactSteps:
    """Run the plain reference in float64 with torch's AdamW. `grad_rtol`: of two runs' gradients, relative to the
    largest entry of each tensor. `stage2_1`: the text weights are frozen."""
    eve = ReferenceEve(model)
    eve.load_state_dict(initial_weights(case), strict=True)
    eve.double()
    for name, param in eve.named_parameters():
        param.requires_grad_(not stage2_1 or "moe_" in name or "vision_tower" in name)
    trained = {name: param for name, param in eve.named_parameters() if param.requires_grad}
    tower = [param for name, param in trained.items() if "vision_tower" in name]
    rest = [param for name, param in trained.items() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(
        [dict(params=rest, lr=PEAK_LR), dict(params=tower, lr=PATCH_EMBEDDING_LR)],
        betas=(BETA1, BETA2),
        eps=EPS,
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _share_of_peak)
    bounds = {name: _Bound(param) for name, param in trained.items()}
    losses = []
    for step in range(STEPS):
        # A step of text alone has zero gradients for the vision weights, not none: momentum goes on moving them.
        optimizer.zero_grad(set_to_none=False)
        batch = [
            [sample.reference() for sample in samples] for samples in micro_batches_of_step(step)
        ]
        loss = batch_loss(eve, batch, normalization="official")
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            for name, param in trained.items():
                if any(param is other for other in group["params"]):
                    bounds[name].follow(optimizer.state[param], lr=group["lr"], rtol=grad_rtol)
        schedule.step()
        losses.append(loss.item())
    return ExactSteps(
        losses=torch.tensor(losses, dtype=torch.float64),
        final={name: param.detach() for name, param in trained.items()},
        bound={name: bound.total for name, bound in bounds.items()},
    )


def _share_of_peak(step: int) -> float:
    """HF's cosine schedule: the first step has learning rate 0."""
    warmup = math.ceil(WARMUP_FRACTION * STEPS)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


class _Bound:
    """The module docstring's bound on one parameter, summed over the steps."""

    def __init__(self, param: Tensor) -> None:
        self.param, self.total = param, torch.zeros_like(param, requires_grad=False)
        self.mean, self.square = 0.0, 0.0  # moving averages of d and d^2, not yet corrected

    @torch.no_grad()
    def follow(self, state: dict[str, Tensor], *, lr: float, rtol: float) -> None:
        """Add one step; `state` is AdamW's after it."""
        assert self.param.grad is not None
        difference = rtol * self.param.grad.abs().max().item()
        self.mean = BETA1 * self.mean + (1 - BETA1) * difference
        self.square = BETA2 * self.square + (1 - BETA2) * difference**2
        correction1 = 1 - BETA1 ** state["step"].item()
        correction2 = 1 - BETA2 ** state["step"].item()
        mean, error = self.mean / correction1, math.sqrt(self.square / correction2)
        size = (state["exp_avg_sq"] / correction2).sqrt() + EPS
        ratio = (state["exp_avg"] / correction1).abs() / size
        update = (mean + ratio * error) / (size - error).clamp(min=1e-300)
        self.total += lr * update.clamp(max=4.0)
        self.total += 2 * 2.0**-24 * self.param.abs()  # both runs round
