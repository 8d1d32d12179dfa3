# SPDX-License-Identifier: Apache-2.0
"""Every metric of a run, declared once: its name (the key in metrics.jsonl), its unit, and how the steps between two
logged ones become one value.

Computed values (loss, gradient, counts) are those of the logged step, so that a run killed and resumed anywhere writes
the same numbers; times are averaged over the steps since the last record. Values arrive here as those of the whole run,
the global batch and all processes; only times and memory are rank 0's own."""

from dataclasses import dataclass
from typing import Literal

Reduction = Literal["last", "mean", "max", "sum"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that a record can hold."""

    name: str
    unit: str
    reduction: Reduction
    meaning: str


_ALL = (
    Metric(
        "loss",
        "nats/token",
        "last",
        "cross entropy of the global batch as optim.loss_normalization weighs it",
    ),
    Metric("grad_norm", "1", "last", "global norm of the gradient before clipping"),
    Metric("lr", "1", "last", "learning rate of the decoder"),
    Metric("patch_embedding_lr", "1", "last", "learning rate of the patch embedding"),
    Metric("samples", "samples", "last", "samples of the global batch"),
    Metric("vision_tokens", "tokens", "last", "vision tokens, padding not counted"),
    Metric("text_tokens", "tokens", "last", "text tokens, padding not counted"),
    Metric("label_tokens", "tokens", "last", "tokens that carry a label"),
    Metric("computed_tokens", "tokens", "last", "tokens of all packs, padding included"),
    Metric("fill", "fraction", "last", "computed tokens that are not padding"),
    Metric("ideal_flops", "FLOP", "last", "what the step's loss and gradients need (flops.py)"),
    Metric("executed_flops", "FLOP", "last", "the same with padding and recomputation (flops.py)"),
    Metric("samples_checksum", "1", "last", "of the ids of the step's samples, pack by pack"),
    Metric("quarantined", "samples", "sum", "samples whose labels were masked while reading"),
    Metric(
        "unreadable", "samples", "sum", "of these, rows that could not be read, each once a start"
    ),
    Metric("read_retries", "reads", "sum", "reads of shards that failed and were tried again"),
    Metric("skipped", "steps", "sum", "steps whose loss or gradient was not finite: no update"),
    Metric("step_time_s", "s", "mean", "time of one step"),
    Metric("data_wait_s", "s", "mean", "time of one step spent waiting for data"),
    Metric("data_wait_fraction", "fraction", "mean", "share of the time spent waiting for data"),
    Metric("tokens_per_s_per_gpu", "tokens/s", "mean", "tokens without padding, per process"),
    Metric("useful_tflops_per_gpu", "TFLOP/s", "mean", "ideal FLOPs per second and process"),
    Metric("executed_tflops_per_gpu", "TFLOP/s", "mean", "executed FLOPs per second and process"),
    Metric("mfu", "fraction", "mean", "ideal FLOPs per second, of the device's peak"),
    Metric("hardware_utilization", "fraction", "mean", "executed FLOPs per second, of the peak"),
    Metric("memory_gib", "GiB", "max", "peak memory allocated on the device"),
    Metric("eta_s", "s", "last", "time left at the present speed"),
    Metric(
        "evaluated_step", "steps", "last", "step of the checkpoint that `evaluation/...` tells of"
    ),
    Metric(
        "evaluations_unfinished", "evaluations", "last", "over budget, failed, stopped or skipped"
    ),
)

EVALUATION_PREFIX = "evaluation/"
"""It begins the names that the evaluation command gave its numbers (training/evaluation.py)."""

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
