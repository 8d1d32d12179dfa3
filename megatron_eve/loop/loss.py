# SPDX-License-Identifier: Apache-2.0
"""What a micro-batch contributes to the loss, in the two normalisations.

With l_i the cross entropy of a label token, M_k the label tokens of micro-batch k, K the micro-batches with any:

    global_tokens     sum over all i of l_i  /  sum_k M_k
    microbatch_mean   sum_k (sum_{i in k} l_i / M_k)  /  K      (official: HF Trainer over EVE's forward)

Both are a sum of numerators over a sum of denominators, taken over every micro-batch and data-parallel rank, which is
what megatron-core's per-token loss computes: it divides the summed gradients once by the summed denominators. A
micro-batch without any label counts for nothing in either (the official code gives NaN). Context-parallel ranks
share a micro-batch: each adds its own tokens' part, one of them the micro-batch itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eve.config.schema import LossNormalization
from megatron_eve.parallel.batch import MicroBatch


@dataclass(frozen=True, slots=True)
class MicroBatchLoss:
    """Numerator (with gradient) and denominator of one micro-batch, and the sums that are logged."""

    numerator: Tensor  # 0-d float32
    denominator: Tensor  # 0-d int32
    logged: Tensor  # [2] float64: numerator and denominator, detached


def micro_batch_loss(
    row_losses: Tensor, *, batch: MicroBatch, normalization: LossNormalization
) -> MicroBatchLoss:
    """row_losses [L] float32, the cross entropy of every labelled row, padding rows included."""
    total = (row_losses * batch.label_weights).sum()
    if normalization == "global_tokens":
        denominator = batch.num_labels
    else:
        total = total / max(batch.num_pack_labels, 1)
        denominator = int(batch.num_pack_labels > 0 and batch.is_first_context_rank)
    logged = torch.stack(
        [total.detach().double(), torch.tensor(denominator, device=total.device).double()]
    )
    return MicroBatchLoss(
        numerator=total,
        denominator=torch.tensor(denominator, dtype=torch.int, device=total.device),
        logged=logged,
    )
