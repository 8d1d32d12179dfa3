# SPDX-License-Identifier: Apache-2.0
"""EVEv2 on megatron-core: patch and word embedding, decoder, and a loss on labelled tokens only.

Legend: T tokens of a pack, L labelled rows, h hidden size, V vocabulary, tp tensor-parallel size.
"""

import copy
import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_eve.config.schema import ModelConfig
from megatron_eve.model.accelerators import has_fused_weight_gradient
from megatron_eve.model.layer_specs import Backend, layer_spec
from megatron_eve.model.micro_batch import MicroBatch
from megatron_eve.model.modality import ModalityPackedSeqParams
from megatron_eve.model.norm import RMSNorm
from megatron_eve.model.patch_embedding import PatchEmbedding


class EveModel(LanguageModule):
    """One pipeline stage (or one model chunk of it) of the model.

    The first stage turns a micro-batch into hidden states in modality order, every stage runs its layers, the last
    one returns the cross entropy of each labelled row."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        model: ModelConfig,
        backend: Backend,
        pre_process: bool,
        post_process: bool,
        groups: ProcessGroupCollection,
        vp_stage: int | None,
        seed: int,
    ) -> None:
        super().__init__(config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.model_config = model
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = model.tie_word_embeddings
        tp_size = groups.tp.size()
        padded_vocab = math.ceil(model.vocab_size / tp_size) * tp_size
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=padded_vocab,
                max_sequence_length=model.max_position_embeddings,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
            self.patch_embedding = PatchEmbedding(config, model=model, seed=seed)
        self.decoder = TransformerBlock(
            config,
            spec=layer_spec(model.split, backend=backend),
            post_layer_norm=False,  # ours below: it runs on labelled rows only
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            self._build_output(padded_vocab)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def _build_output(self, padded_vocab: int) -> None:
        # The rows that reach the norm and the output layer are gathered, whole, on every rank: no sequence parallelism.
        config = copy.copy(self.config)
        config.sequence_parallel = False
        config.gradient_accumulation_fusion &= has_fused_weight_gradient()
        self.final_layernorm = RMSNorm(
            config, self.model_config.hidden_size, self.model_config.rms_norm_eps
        )
        self.output_layer = ColumnParallelLinear(
            self.model_config.hidden_size,
            padded_vocab,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process
            and self.share_embeddings_and_output_weights,
            tp_group=self.tp_group,
        )

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by megatron-core's schedules with the hidden states of the previous stage."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(tensors[0])

    def forward(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T or T/tp, 1, h] for the next stage, or, on the last one, the loss of each labelled row [L]
        in fp32."""
        routing = self._with_rope(batch.routing, batch.position_ids)
        hidden = self.decoder(
            hidden_states=self._embed(batch) if self.pre_process else None,
            attention_mask=None,
            packed_seq_params=routing,
        )
        if not self.post_process:
            return hidden
        return self._loss_of_rows(hidden, batch)

    def logits(self, batch: MicroBatch) -> Tensor:
        """Logits of this rank's part of the vocabulary at the labelled rows [L, V/tp]; single-stage models only."""
        if not (self.pre_process and self.post_process):
            raise ValueError("logits() needs the whole model in one pipeline stage")
        routing = self._with_rope(batch.routing, batch.position_ids)
        hidden = self.decoder(
            hidden_states=self._embed(batch), attention_mask=None, packed_seq_params=routing
        )
        return self._logits_of_rows(hidden, batch)

    def _embed(self, batch: MicroBatch) -> Tensor:
        vision = self.patch_embedding(batch.patches, sources=batch.vision_sources)
        text = self.embedding(batch.text_ids.unsqueeze(0), None)
        # A stage whose embeddings are frozen still needs a graph: re-entrant recomputation gives no gradient to the
        # weights of layers whose input requires none.
        hidden = torch.cat([vision, text])
        return (
            hidden
            if hidden.requires_grad or not torch.is_grad_enabled()
            else hidden.requires_grad_()
        )

    def _with_rope(
        self, routing: ModalityPackedSeqParams, positions: Tensor
    ) -> ModalityPackedSeqParams:
        """The routing with cos and sin, [T, 1, head_dim], computed in fp32 (modeling_qwen2.py:137)."""
        model = self.model_config
        exponent = (
            torch.arange(0, model.head_dim, 2, device=positions.device).float() / model.head_dim
        )
        inverse_frequency = 1.0 / model.rope_theta**exponent
        angles = torch.outer(positions.float(), inverse_frequency)
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        routing = copy.copy(routing)
        routing.rope_cos = angles.cos().to(self.config.params_dtype)
        routing.rope_sin = angles.sin().to(self.config.params_dtype)
        return routing

    def _logits_of_rows(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        if self.config.sequence_parallel:
            # Each rank's gradient of the gathered rows is already complete (the output layer all-reduces it), so the
            # backward is a split, not a reduce-scatter.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        rows = hidden.index_select(0, batch.label_rows)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        logits, _ = self.output_layer(self.final_layernorm(rows), weight=weight)
        return self._hide_vocabulary_padding(logits[:, 0])

    def _hide_vocabulary_padding(self, logits: Tensor) -> Tensor:
        """Columns beyond the vocabulary, there only to divide it by tp, take no part in the softmax."""
        first = self.tp_group.rank() * logits.shape[1]
        num_real = self.model_config.vocab_size - first
        if num_real >= logits.shape[1]:
            return logits
        column = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(column >= num_real, torch.finfo(logits.dtype).min)

    def _loss_of_rows(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        logits = self._logits_of_rows(hidden, batch).unsqueeze(1)
        targets = batch.label_targets.unsqueeze(1)
        return vocab_parallel_cross_entropy(logits.float(), targets)[:, 0]
