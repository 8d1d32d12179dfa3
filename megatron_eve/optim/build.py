# SPDX-License-Identifier: Apache-2.0
"""AdamW on megatron-core's optimizers, with a learning rate of its own for the patch embedding, and its schedule.

The official code has two groups of learning rates: `vision_tower_lr` and the rest (EVEv2 eve_trainer.py:149-197)."""

from collections.abc import Sequence

from megatron_eve import device
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.sizes import warmup_steps
from megatron_eve.parallel.groups import ParallelState

device.install()

from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.optimizer import MegatronOptimizer, ParamKey, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.optimizer_param_scheduler import (  # noqa: E402
    OptimizerParamScheduler,
    ParamGroupOverride,
)

from megatron_eve.config.megatron import optimizer_config  # noqa: E402
from megatron_eve.optim import adam  # noqa: E402


def build_optimizer(
    model: Sequence[DistributedDataParallel], *, config: RunConfig, state: ParallelState
) -> MegatronOptimizer:
    """The optimizer of the trainable parameters of these chunks."""
    overrides = {
        ParamKey(name="*patch_embedding*"): ParamGroupOverride(
            max_lr=config.optim.patch_embedding_lr,
            min_lr=config.optim.min_lr,
            is_decoupled_lr=True,  # separates the groups in a checkpoint
        )
    }
    adam.use_where_no_other()
    return get_megatron_optimizer(
        optimizer_config(config.optim, config=config),
        list(model),
        config_overrides=overrides,
        use_gloo_process_groups=device.has_gpu(),
        pg_collection=state.groups if not device.has_gpu() else None,
    )


def update_weights(optimizer: MegatronOptimizer, *, grad_norm: float) -> None:
    """What the optimizer's own step() does after `prepare_grads` and `get_grad_norm`: clip by this norm, and update.

    The trainer looks at the norm before it lets weights change; step() would prepare the gradients and reduce the norm
    over the model a second time."""
    for part in optimizer.chained_optimizers:
        params = part.get_parameters()
        if params and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                params, max_norm=part.config.clip_grad, total_norm=grad_norm
            )
    optimizer.step_with_ready_grads()


def build_schedule(
    optimizer: MegatronOptimizer, *, config: RunConfig, steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then cosine to `min_lr`, counted in optimizer steps."""
    optim = config.optim
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.peak_lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=min(warmup_steps(config, steps=steps), steps - 1),
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows its configuration
    )
