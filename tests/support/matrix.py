# SPDX-License-Identifier: Apache-2.0
"""The parity harness: one training step of the product in any layout against the plain reference.

Compared are the loss, the gradient norm, every parameter's gradient and the weights after one optimizer step, which the
reference makes with torch.optim.AdamW on its own gradients. The weights go through the converter and a checkpoint.

Adam's first step is lr * g / (|g| + eps). With the usual eps of 1e-8 that is the gradient's sign: a factor between two
gradients would not show, and where a gradient is nearly zero, rounding would decide. EPS is in the order of the largest
gradients, in the product and in the reference, so that the step is a smooth function of the gradient whose relative
error is at most twice the gradient's. The learning rates are large, and differ between patch embedding and decoder, so
that the change of a weight is not lost in the rounding of the weight, and a weight in the wrong group shows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig, SplitConfig
from tests.support.canonical import Shard, assemble, local_shards
from tests.support.tiny import ALL, DENSE, RawSample, layout, tiny_model

LOSS_RTOL = 1e-6
GRAD_RTOL = 1e-5  # of the largest entry of the parameter's gradient
STEP_RTOL = 2 * GRAD_RTOL  # of the largest change of the parameter; see the module docstring
EPS, LR, PATCH_LR = 1.0, 8.0, 16.0
FLOAT32_EPS = torch.finfo(torch.float32).eps

STAGES: dict[str, tuple[Any, ...]] = {
    "1": ("patch_embedding",),
    "2.1": ("patch_embedding", "vision"),
    "2.2": ("patch_embedding", "vision", "text"),
}

SPLITS = {
    "all": ALL,
    "dense": DENSE,
    "ffn": SplitConfig(norm=False, attention=False, ffn=True),
    "norm": SplitConfig(norm=True, attention=False, ffn=False),
    "all-tied": ALL,
    "all-wide": ALL,
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a step is spread over processes, and what of it is computed again in the backward pass."""

    parallel: ParallelConfig
    recompute: str = "none"


def _named(parallel: ParallelConfig, recompute: str = "none") -> Layout:
    return Layout(parallel=parallel, recompute=recompute)


SP2 = dict(tensor=2, sequence_parallel=True)
DISTOPT = dict(distributed_optimizer=True)
OVERLAPPED = dict(distributed_optimizer=True, overlap=True)

LAYOUTS: dict[str, Layout] = {
    "1": _named(layout()),
    "1 full": _named(layout(), "full"),
    "tp2": _named(layout(tensor=2)),
    "tp2 sp": _named(layout(**SP2)),
    "tp2 sp full": _named(layout(**SP2), "full"),
    "tp2 sp selective": _named(layout(**SP2), "selective"),
    "pp2": _named(layout(pipeline=2)),
    "pp2 selective": _named(layout(pipeline=2), "selective"),
    "pp2 full": _named(layout(pipeline=2), "full"),
    "pp2 virtual": _named(layout(pipeline=2, virtual=2)),
    "dp2 overlap": _named(layout(data=2, overlap=True)),
    "dp2 distopt": _named(layout(data=2, **DISTOPT)),
    "dp2 distopt overlap": _named(layout(data=2, **OVERLAPPED)),
    "cp2": _named(layout(context=2)),
    "cp2 full": _named(layout(context=2), "full"),
    "cp2 distopt": _named(layout(context=2, **DISTOPT)),
    "cp2 distopt overlap": _named(layout(context=2, **OVERLAPPED)),
    "pp4": _named(layout(pipeline=4)),
    "cp4": _named(layout(context=4)),
    "dp4 distopt": _named(layout(data=4, **DISTOPT)),
    "tp2 sp pp2": _named(layout(pipeline=2, **SP2)),
    "tp2 sp cp2": _named(layout(context=2, **SP2)),
    "tp2 sp cp2 distopt overlap": _named(layout(context=2, **SP2, **OVERLAPPED)),
    "tp2 cp2 selective": _named(layout(tensor=2, context=2), "selective"),
    "tp2 sp dp2 distopt overlap": _named(layout(data=2, **SP2, **OVERLAPPED)),
    "tp2 pp2 virtual full": _named(layout(tensor=2, pipeline=2, virtual=2), "full"),
    "pp2 dp2 distopt": _named(layout(pipeline=2, data=2, **DISTOPT)),
    "pp2 virtual dp2 distopt overlap": _named(layout(pipeline=2, virtual=2, data=2, **OVERLAPPED)),
    "pp2 cp2": _named(layout(pipeline=2, context=2)),
    "pp2 virtual cp2": _named(layout(pipeline=2, virtual=2, context=2)),
    "cp2 dp2 distopt overlap": _named(layout(context=2, data=2, **OVERLAPPED)),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One step to be taken: configuration, folder of the weights, the samples of each pack of the global batch."""

    config: RunConfig
    weights: str
    packs: Sequence[Sequence[RawSample]]


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """What one process saw of a step. Gradients are there for trainable parameters only."""

    metrics: dict[str, float]
    before: list[Shard]
    gradients: list[Shard]
    after: list[Shard]


def model_of(split: str) -> ModelConfig:
    """The tiny model with the split of this name; `wide`: wider than its heads together."""
    model = tiny_model(SPLITS[split], tied=split.endswith("tied"))
    return replace(model, hidden_size=40) if split.endswith("wide") else model


def step_config(model: ModelConfig, spread: Layout, *, stage: str, **changes: Any) -> RunConfig:
    """The configuration of a check."""
    from tests.support.train_once import run_config

    optim = dict(
        peak_lr=LR,
        patch_embedding_lr=PATCH_LR,
        min_lr=0.0,
        warmup_fraction=0.0,
        adam_eps=EPS,
        clip_grad=None,
        weight_decay=0.0,
        **changes.pop("optim", {}),
    )
    train = {"recompute": spread.recompute, **changes.pop("train", {})}
    return run_config(
        model, spread.parallel, trainable=STAGES[stage], optim=optim, train=train, **changes
    )


def take_steps(checks: Sequence[Check], *, drop_all_reduce: bool = False) -> list[RankStep]:
    """One real train_step for each check, all of the same layout, in a gloo worker."""
    from megatron_eve.parallel.groups import init_model_parallel

    state = init_model_parallel(checks[0].config.parallel, seed=1)
    return [_take_step(check, state=state, drop_all_reduce=drop_all_reduce) for check in checks]


def _take_step(check: Check, *, state: Any, drop_all_reduce: bool) -> RankStep:
    from megatron_eve.training.step import train_step
    from tests.support.train_once import (
        build_all,
        packs_of_rank,
        without_sequence_parallel_all_reduce,
    )

    config = check.config
    training, state = build_all(config, weights=check.weights, state=state)
    chunks, wrapped, optimizer = training.chunks, training.wrapped, training.optimizer
    if drop_all_reduce:
        wrapped[0].config.finalize_model_grads_func = without_sequence_parallel_all_reduce
    before = local_shards(chunks, lambda param: param)
    result = train_step(
        wrapped,
        packs_of_rank(check.packs, config=config, state=state),
        optimizer=optimizer,
        schedule=training.schedule,
        config=config,
        state=state,
        stop_requested=False,
    )
    for chunk in wrapped:
        complete_gradients(chunk, state)
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)  # else the next forward would
    return RankStep(
        metrics=result.metrics,
        before=before,
        gradients=local_shards(chunks, gradient_or_none),
        after=local_shards(chunks, lambda param: param),
    )


def accumulate(checks: Sequence[Check], *, in_float64: bool = False) -> list[list[Shard]]:
    """This rank's gradients of the global batch of each check, all of the same layout, without a step; in a worker."""
    from megatron_eve.parallel.groups import init_model_parallel
    from megatron_eve.training.step import forward_backward
    from tests.support.train_once import build, packs_of_rank

    state = init_model_parallel(checks[0].config.parallel, seed=1)
    found = []
    for check in checks:
        config = check.config
        chunks, wrapped, _, _ = build(
            config, weights=check.weights, state=state, in_float64=in_float64
        )
        packs = packs_of_rank(check.packs, config=config, state=state)
        forward_backward(wrapped, packs, config=config, state=state)
        for chunk in wrapped:
            complete_gradients(chunk, state)
        found.append(local_shards(chunks, gradient_or_none))
    return found


def gradient_or_none(param: torch.nn.Parameter) -> Tensor | None:
    """The reduced gradient of a trainable parameter."""
    return param.main_grad if param.requires_grad else None  # type: ignore[attr-defined]


def complete_gradients(chunk: Any, state: Any) -> None:
    """With the distributed optimizer each data-parallel rank holds the reduced gradients of its shard only."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    group = state.groups.dp_cp
    for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
        shard = bucket.grad_data.numel() // group.size()
        mine = bucket.grad_data[group.rank() * shard : (group.rank() + 1) * shard].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)


@dataclass(frozen=True)
class Expected:
    """The plain reference's step, by the names of an unsharded EveModel."""

    loss: float
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    updated: dict[str, Tensor]  # as if everything were trained

    def trainable(self, stage: str) -> set[str]:
        """Names that the stage trains; written down here again, not asked of the product."""
        return {name for name in self.weights if _group(name) in STAGES[stage]}


def _group(name: str) -> str:
    if name.startswith("patch_embedding."):
        return "patch_embedding"
    return "vision" if ".vision." in name else "text"


def reference_step(model: ModelConfig, packs: Sequence[Sequence[RawSample]]) -> Expected:
    """Loss, gradients and torch's AdamW on the reference model; in this process."""
    from checkpoints_convert.tensors import hf_to_eve
    from tests.support.reference_eve import batch_loss, build_reference

    reference = build_reference(model)
    weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
    loss = batch_loss(reference, [[sample.reference() for sample in samples] for samples in packs])
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in reference.named_parameters()}
    vision_tower = [p for n, p in reference.named_parameters() if "vision_tower" in n]
    others = [p for n, p in reference.named_parameters() if "vision_tower" not in n]
    adam = torch.optim.AdamW(
        [{"params": others, "lr": LR}, {"params": vision_tower, "lr": PATCH_LR}],
        betas=(0.9, 0.999),
        eps=EPS,
        weight_decay=0.0,
    )
    adam.step()
    updated = {name: p.detach() for name, p in reference.named_parameters()}
    return Expected(float(loss), *(hf_to_eve(t, model) for t in (weights, gradients, updated)))


def differences(ranks: Sequence[RankStep], expected: Expected, *, stage: str) -> list[str]:
    """What is not as in the reference; empty if all is well."""
    trainable = expected.trainable(stage)
    want_norm = sum(expected.gradients[n].double().square().sum().item() for n in trainable) ** 0.5
    problems = []
    for rank, step in enumerate(ranks):
        for name, want in (("loss", expected.loss), ("grad_norm", want_norm)):
            bound = LOSS_RTOL if name == "loss" else GRAD_RTOL
            if not abs(step.metrics[name] - want) <= bound * want:
                problems.append(f"rank {rank}: {name} {step.metrics[name]:.9g}, not {want:.9g}")
    before, gradients, after = (
        assemble(getattr(step, field) for step in ranks)
        for field in ("before", "gradients", "after")
    )
    if before.keys() != expected.weights.keys() or gradients.keys() != trainable:
        return [*problems, f"trained: {sorted(gradients.keys() ^ trainable)} differ"]
    for name in before:
        rows = expected.weights[name].shape[0]  # the vocabulary may be padded
        if not torch.equal(before[name][:rows], expected.weights[name]):
            problems.append(f"{name}: loaded with other values")
        if name not in trainable:
            if not torch.equal(after[name], before[name]):
                problems.append(f"{name}: frozen, yet changed")
            continue
        problems += _gradient_problems(name, gradients[name], expected)
        problems += _update_problems(name, before[name], after[name], expected)
    return problems


def _gradient_problems(name: str, gradient: Tensor, expected: Expected) -> list[str]:
    want = expected.gradients[name]
    scale = want.abs().max()
    assert scale > 0, f"{name} has no gradient in the reference: the check would prove nothing"
    assert scale <= EPS, f"{name}: a gradient of {scale:.2g} is above Adam's eps, see EPS"
    error = float((gradient[: len(want)] - want).abs().max() / scale)
    problems = [] if error <= GRAD_RTOL else [f"{name}: gradient off by {error:.1e}"]
    if gradient[len(want) :].any():
        problems.append(f"{name}: vocabulary padding has a gradient")
    return problems


def _update_problems(name: str, before: Tensor, after: Tensor, expected: Expected) -> list[str]:
    want = expected.updated[name]
    change = (want - expected.weights[name]).abs().max()
    bound = STEP_RTOL * change + FLOAT32_EPS * want.abs().max()
    error = (after[: len(want)] - want).abs().max()
    problems = [] if error <= bound else [f"{name}: update off by {float(error / change):.1e}"]
    if torch.equal(after[: len(want)], before[: len(want)]):
        problems.append(f"{name}: trained, yet unchanged")
    if not torch.equal(after[len(want) :], before[len(want) :]):
        problems.append(f"{name}: vocabulary padding changed")
    return problems
