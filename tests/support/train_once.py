# SPDX-License-Identifier: Apache-2.0
"""One forward, backward and optimizer step of the product in any layout, inside gloo workers."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_eve.checkpoint.weights import load_weights, save_weights
from megatron_eve.config.recipes import RECIPES
from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainableGroup
from megatron_eve.loop.step import forward_backward
from megatron_eve.model.build import build_model
from megatron_eve.model.stages import freeze
from megatron_eve.optim.build import build_optimizer
from megatron_eve.parallel.groups import ParallelState, init_model_parallel
from megatron_eve.parallel.wrap import wrap_for_training
from tests.support.tiny import layout, naive_pack, random_samples

TOKENS, ALIGN = 160, 8
EVERYTHING: tuple[TrainableGroup, ...] = ("patch_embedding", "vision", "text")


def run_config(model: ModelConfig, parallel: ParallelConfig, **changes: Any) -> RunConfig:
    """A complete configuration around a tiny model."""
    base = RECIPES["eve_tiny_stage3"]()
    config = dataclasses.replace(
        base,
        model=model,
        parallel=parallel,
        data=dataclasses.replace(
            base.data, pack_tokens=TOKENS, align=ALIGN, sample_align=2 * parallel.context
        ),
        train=dataclasses.replace(base.train, dtype="fp32"),
        stage=dataclasses.replace(base.stage, trainable=changes.pop("trainable", EVERYTHING)),
    )
    for section, fields in changes.items():
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **fields)}
        )
    return config


def global_batch(num_packs: int) -> list[list[Any]]:
    """The samples of each pack of a global batch."""
    return [random_samples(5, seed=10 + index) for index in range(num_packs)]


def build(config: RunConfig, *, weights: str | None) -> tuple[Any, Any, ParallelState, Any]:
    """Bare chunks, wrapped chunks, state and megatron-core's config, with weights loaded."""
    state = init_model_parallel(config.parallel, seed=1)
    chunks, mcore = build_model(
        config.model,
        parallel=config.parallel,
        state=state,
        dtype=config.train.dtype,
        recompute=config.train.recompute,
    )
    if weights is not None:
        load_weights(chunks, weights, copy_text_to_vision=False)
    freeze(chunks, trainable=config.stage.trainable)
    wrapped = wrap_for_training(chunks, config=mcore, parallel=config.parallel, state=state)
    return chunks, wrapped, state, mcore


def gradients_of_batch(
    config: RunConfig, weights: str, out: str, *, num_packs: int = 4, drop_all_reduce: bool = False
) -> float:
    """Run one global batch and save the full gradients as a weights folder; returns the loss."""
    chunks, wrapped, state, mcore = build(config, weights=weights)
    optimizer = build_optimizer(wrapped, config=config, state=state)
    mcore.grad_scale_func = optimizer.scale_loss
    if drop_all_reduce:
        mcore.finalize_model_grads_func = _without_sequence_parallel_all_reduce
    batch = global_batch(num_packs)[state.dp_rank :: state.dp_size]
    sizes = {"tokens": TOKENS, "align": ALIGN, "sample_align": config.data.sample_align}
    packs = [naive_pack(s, model=config.model, **sizes) for s in batch]
    logged = forward_backward(wrapped, packs, config=config, state=state)
    sums = torch.zeros(2, dtype=torch.float64)
    if logged and state.is_last_stage and state.tp_rank == 0:
        sums = torch.stack(logged).sum(0)
    torch.distributed.all_reduce(sums)
    for chunk in wrapped:
        _complete_gradients(chunk, state)
    for chunk in chunks:
        for param in chunk.parameters():
            grad = param.main_grad if param.requires_grad else torch.zeros_like(param)
            param.data.copy_(grad)
    save_weights(chunks, out, config_text="")
    return float(sums[0] / sums[1])


def _complete_gradients(chunk: Any, state: ParallelState) -> None:
    """With the distributed optimizer each data-parallel rank holds the reduced gradients of its shard only."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            group = state.groups.dp_cp
            shard = bucket.grad_data.numel() // group.size()
            mine = bucket.grad_data[group.rank() * shard : (group.rank() + 1) * shard].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def _without_sequence_parallel_all_reduce(model: Any, *args: Any, **kwargs: Any) -> None:
    """finalize_model_grads with one of its all-reduces missing."""
    from megatron.core.distributed import finalize_model_grads as module_function

    for chunk in model:
        for param in chunk.parameters():
            param.sequence_parallel = False
    module_function(model, *args, **kwargs)


def write_reference_weights(model: ModelConfig, out: str, *, gradients: bool = False) -> float:
    """The reference model's weights (or its gradients of the global batch) as a weights folder; returns the loss."""
    from checkpoints_convert.tensors import hf_to_eve
    from tests.support.reference_eve import batch_loss, build_reference

    reference = build_reference(model)
    tensors: dict[str, Tensor] = dict(reference.state_dict())
    loss = 0.0
    if gradients:
        batch = [[sample.reference() for sample in samples] for samples in global_batch(4)]
        total = batch_loss(reference, batch)
        total.backward()
        loss = float(total)
        tensors = {name: param.grad for name, param in reference.named_parameters()}
    state = init_model_parallel(layout(), seed=1)
    chunks, _ = build_model(model, parallel=layout(), state=state, dtype="fp32")
    chunks[0].load_state_dict(hf_to_eve(tensors, model), strict=False)
    save_weights(chunks, out, config_text="")
    return loss


def read_weights(model: ModelConfig, folder: str) -> dict[str, Tensor]:
    """A weights folder as an unsharded state dict."""
    state = init_model_parallel(layout(), seed=1)
    chunks, _ = build_model(model, parallel=layout(), state=state, dtype="fp32")
    load_weights(chunks, folder, copy_text_to_vision=False)
    return {name: param.detach() for name, param in chunks[0].named_parameters()}
