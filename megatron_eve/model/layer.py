# SPDX-License-Identifier: Apache-2.0
"""The decoder layer: megatron-core's TransformerLayer with a forward that hands the modality routing to its modules.

Construction, checkpoints and pipeline placement are the parent's. The forward is Qwen2.5's pre-norm layer (EVEv2
modeling_qwen2.py:839-884), which has no dropout and no bias after the row-parallel linears, so that the parent's
bias-dropout-add is a plain addition. After its attention the last layer goes on with the labelled rows only."""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_eve.model.modality import ModalityPackedSeqParams, select_rows
from megatron_eve.model.partitioned import apply_partitioned


class EveTransformerLayer(TransformerLayer):
    """One decoder layer on a residual stream in modality order."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: ModalityPackedSeqParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """[rows, 1, h] -> [rows, 1, h], in the last layer -> [kept rows, 1, h].

        TransformerBlock passes more arguments; all others must be None."""
        given = sorted(name for name, value in unused.items() if value is not None)
        if packed_seq_params is None or attention_mask is not None or given:
            raise ValueError(
                f"EveTransformerLayer takes hidden_states and packed_seq_params only, not {given}"
            )
        vision = packed_seq_params.num_local_vision
        x = apply_partitioned(self.input_layernorm, hidden_states, vision)
        kept = packed_seq_params.kept if self.layer_number == self.config.num_layers else None
        attended = self.self_attention(x, packed_seq_params=packed_seq_params, kept=kept)
        if kept is not None:
            hidden_states = select_rows(hidden_states, kept.residual)
            vision = kept.num_local_vision
        hidden_states = hidden_states + attended
        x = apply_partitioned(self.pre_mlp_layernorm, hidden_states, vision)
        return hidden_states + apply_partitioned(self.mlp, x, vision)[0], None
