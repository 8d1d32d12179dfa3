# SPDX-License-Identifier: Apache-2.0
"""How much each sample weighs in a step's loss. The weight belongs to the sample: packs, micro-batches and ranks do not
change it.

With n_s the label tokens of sample s and l_i the cross entropy of a label token, summed over all samples of a step:

    global_tokens   sum_i l_i  /  sum_s n_s
    sample_mean     sum_s (sum_{i in s} l_i / n_s)  /  samples with a label
    sqrt_tokens     sum_s (sum_{i in s} l_i / sqrt(n_s))  /  sum_s sqrt(n_s)               (NEO, InternVL)
    official        sum_g (sum_{i in g} l_i / sum_{s in g} n_s)  /  groups with a label    (official: see below)

`official`: the HF trainer over EVE's forward gives the mean over micro-batches of each one's token mean, whatever ranks
and accumulation steps they are on. Its micro-batches are `optim.loss_group_samples` = k consecutive samples
in data order, so group g holds the samples at places g * k to g * k + k - 1 of the step (data/plan/order.py numbers
them). A sample whose labels were masked while reading keeps its place and adds nothing; a group without any label
counts for nothing (the official code gives NaN). In a step of packs the last group may be smaller; it counts as one.

Label counts are known once samples are read, so data-parallel ranks exchange them: one sum of a table of a fixed size.
Then each rank gives every label token its weight, scaled so that the mean over all label tokens of the step is 1, and
the loss is a sum of weighted token losses over the number of label tokens. That is what megatron-core's per-token loss
computes: it divides the summed gradients once by the summed denominators."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eve.config.schema import OptimConfig
from megatron_eve.data.sample import Pack
from megatron_eve.model.micro_batch import MicroBatch


@dataclass(frozen=True, slots=True)
class MicroBatchLoss:
    """Numerator (with gradient) and denominator of one micro-batch, and the sums that are logged."""

    numerator: Tensor  # 0-d float32
    denominator: Tensor  # 0-d int32
    logged: Tensor  # [2] float64: numerator and denominator, detached


def micro_batch_loss(row_losses: Tensor, *, batch: MicroBatch) -> MicroBatchLoss:
    """row_losses [L] float32, the cross entropy of every labelled row, padding rows included."""
    total = (row_losses * batch.label_weights).sum()
    denominator = torch.tensor(batch.num_labels, dtype=torch.int, device=total.device)
    return MicroBatchLoss(
        numerator=total,
        denominator=denominator,
        logged=torch.stack([total.detach().double(), denominator.double()]),
    )


def label_weights(
    packs: Sequence[Pack], *, optim: OptimConfig, group: ProcessGroup, device: torch.device
) -> list[Tensor]:
    """[labels] float32 for each pack of this data-parallel rank. Collective over `group`, the data-parallel one, unless
    every token weighs the same."""
    if optim.loss_normalization == "global_tokens":
        return [torch.ones(pack.label_rows.numel()) for pack in packs]
    counts = _step_label_counts(packs, group=group, device=device)
    weights = token_weights(counts, optim=optim)
    return [weights[_places_of_labels(pack)].float() for pack in packs]


def token_weights(label_counts: Tensor, *, optim: OptimConfig) -> Tensor:
    """[places] float64: what one label token of the sample at each place weighs; the mean over label tokens is 1.

    label_counts [places] int64, 0 where a place holds no sample or a sample without a label."""
    counts = label_counts.double()
    match optim.loss_normalization:
        case "global_tokens":
            shared_by = torch.ones_like(counts)
        case "sample_mean":
            shared_by = counts
        case "sqrt_tokens":
            shared_by = counts.sqrt()
        case "official":
            assert optim.loss_group_samples is not None  # resolve() has checked it
            shared_by = _sums_of_groups(counts, size=optim.loss_group_samples)
        case "microbatch_mean":
            raise AssertionError("resolve() refuses microbatch_mean")
    weights = torch.where(counts > 0, 1 / shared_by, 0.0)
    total = (weights * counts).sum()
    return weights * (counts.sum() / total) if total > 0 else weights


def _sums_of_groups(counts: Tensor, *, size: int) -> Tensor:
    """[places] the sum over `size` consecutive places, at each of them; the last group may have fewer."""
    group_of_place = torch.arange(counts.numel()) // size
    sums = torch.zeros_like(counts).index_add_(0, group_of_place, counts)
    return sums[group_of_place]


def _step_label_counts(
    packs: Sequence[Pack], *, group: ProcessGroup, device: torch.device
) -> Tensor:
    """[places] int64 on the CPU: label tokens of the sample at each place of the step, whichever rank has read it."""
    table = torch.zeros(2, packs[0].step_places, dtype=torch.int64)  # label tokens, samples
    for pack in packs:
        places = torch.tensor(pack.sample_places, dtype=torch.int64)
        table[0].index_add_(0, _places_of_labels(pack), torch.ones_like(pack.label_rows))
        table[1].index_add_(0, places, torch.ones_like(places))
    on_device = table.to(device)
    torch.distributed.all_reduce(on_device, group=group)
    counts, samples = on_device.cpu()
    assert int(samples.max()) <= 1, "two samples of a step have the same place"
    return counts


def _places_of_labels(pack: Pack) -> Tensor:
    """[labels] int64: the place of the sample that each label of a pack belongs to."""
    position = pack.modality_order[pack.label_rows]  # in sequence order
    sample = torch.searchsorted(pack.cu_seqlens[1:].long(), position, right=True)
    return torch.tensor(pack.sample_places, dtype=torch.int64)[sample]
