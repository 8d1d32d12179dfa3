# SPDX-License-Identifier: Apache-2.0
"""The only mapping from our configuration to megatron-core's TransformerConfig, DDP and optimizer configurations.

What a decoder's table (decoder.py) does not say and Qwen2.5 fixes (RMSNorm, SwiGLU, no dropout) is set here, so that
nothing else in the package needs to know megatron-core's names for it."""

from typing import Any

import torch
import torch.nn.functional as F

from megatron_eve import device
from megatron_eve.config.decoder import decoder_layer
from megatron_eve.config.schema import (
    GpuConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)

device.install()

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLAIN_GPU = GpuConfig()
_FP8_RECIPES = {"current": "tensorwise", "delayed": "delayed", "block": "blockwise"}
_AMAX_HISTORY = 1024
"""Steps whose maxima give a delayed scale: Transformer Engine's own default; megatron-core's is 1."""


def transformer_config(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    dtype: str,
    recompute: str = "none",
    deterministic: bool = False,
    gpu: GpuConfig = PLAIN_GPU,
) -> TransformerConfig:
    """megatron-core's description of the decoder and of how it is spread over processes."""
    torch_dtype = DTYPES[dtype]
    pipelined = parallel.pipeline > 1
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=decoder_layer(model).qkv.has_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=model.init_std,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=gpu.fused_weight_gradients,
        use_cpu_initialization=not device.has_gpu(),
        bf16=dtype == "bf16",
        params_dtype=torch_dtype,
        pipeline_dtype=torch_dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
        # interleaved schedules of two stages are silently wrong without overlapped, unbatched P2P
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=pipelined and not interleaved,
        calculate_per_token_loss=True,
        deterministic_mode=deterministic,
        **_recompute_fields(recompute),
        **_fp8_fields(gpu),
    )


def _fp8_fields(gpu: GpuConfig) -> dict[str, Any]:
    """E4M3 forward; gradients in E5M2, but in E4M3 with scales of blocks: TE's defaults for each recipe."""
    if gpu.fp8 == "none":
        return {}
    return dict(
        fp8="e4m3" if gpu.fp8 == "block" else "hybrid",
        fp8_recipe=_FP8_RECIPES[gpu.fp8],
        fp8_amax_history_len=_AMAX_HISTORY,
        fp8_amax_compute_algo="max",
        first_last_layers_bf16=bool(gpu.bf16_first_layers or gpu.bf16_last_layers),
        num_layers_at_start_in_bf16=gpu.bf16_first_layers,
        num_layers_at_end_in_bf16=gpu.bf16_last_layers,
    )


def _recompute_fields(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    if recompute == "selective":
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return {}


def ddp_config(parallel: ParallelConfig) -> DistributedDataParallelConfig:
    """How gradients are bucketed and reduced; always accumulated and reduced in fp32."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )


def optimizer_config(optim: OptimConfig, *, config: RunConfig) -> OptimizerConfig:
    """AdamW with fp32 main weights; learning rates are set each step by the schedule."""
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.peak_lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad if optim.clip_grad is not None else 0.0,
        bf16=config.train.dtype == "bf16",
        params_dtype=DTYPES[config.train.dtype],
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
