# SPDX-License-Identifier: Apache-2.0
"""Plans as Markdown tables."""

from collections.abc import Sequence

from .calibration import Fitted
from .cluster import Cluster
from .layouts import Plan
from .mix import Mix, samples_per_pack

_TIME_PARTS = (
    ("products", "products"),
    ("attention", "attention"),
    ("memory", "memory"),
    ("tensor", "TP"),
    ("context", "CP"),
    ("pipeline", "PP"),
    ("data", "DP"),
    ("optimizer", "optimizer"),
    ("host", "host"),
)
_MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")


def heading(fastest: Plan, *, cluster: Cluster, mix: Mix, constants: str) -> str:
    """The basis of the tables."""
    config = fastest.config
    samples = samples_per_pack(config, mix)
    packs = fastest.filled * fastest.micro_batches * config.parallel.data
    gpu = cluster.gpu
    return "\n".join(
        [
            f"{config.recipe} on {cluster}: {gpu.memory / 1e9:.0f} GB, {gpu.peak_flops / 1e12:.0f} TFLOP/s, NVLink "
            f"{gpu.nvlink_bytes_per_s / 1e9:.0f} GB/s, network {cluster.network_bytes_per_s / 1e9:.0f} GB/s a node",
            f"a sample: {mix.vision:,.0f} vision + {mix.text:,.0f} text tokens, {mix.labels:,.0f} labelled; a pack of "
            f"{config.data.pack_tokens:,} holds {samples:,.1f}, a step {packs:,.1f} packs",
            f"constants: {constants}",
        ]
    )


def layouts_table(plans: Sequence[Plan]) -> str:
    """Fastest first: what a step costs and what limits it."""
    rows = [
        (
            "layout",
            "GB",
            "micro-batches",
            "filled",
            "step s",
            "tokens/s",
            "MFU",
            "days",
            "largest cost beside the products",
        )
    ]
    for one in plans:
        rows.append(
            (
                one.name,
                f"{one.memory.total / 1e9:.1f}",
                str(one.micro_batches),
                f"{100 * one.filled:.0f}%",
                f"{one.time.total:.2f}",
                f"{one.tokens_per_s:,.0f}",
                f"{100 * one.mfu:.0f}%",
                "-" if one.days is None else f"{one.days:.2f}",
                _limit(one),
            )
        )
    return _table(rows)


def _limit(one: Plan) -> str:
    empty = 100 * (1 - one.filled)
    return one.time.limit if empty < 10 else f"{one.time.limit}; {empty:.0f}% empty packs"


def memory_table(plans: Sequence[Plan], *, cluster: Cluster) -> str:
    """Bytes on the fullest rank by part, and what is left or missing."""
    rows = [("layout", *(f"{part} GB" for part in _MEMORY_PARTS), "total GB", "left GB")]
    for one in plans:
        held = one.memory
        rows.append(
            (
                one.name,
                *(f"{getattr(held, part) / 1e9:.2f}" for part in _MEMORY_PARTS),
                f"{held.total / 1e9:.2f}",
                f"{(cluster.gpu.memory - held.total) / 1e9:+.2f}",
            )
        )
    return _table(rows)


def time_table(plans: Sequence[Plan]) -> str:
    """Seconds of a step by part."""
    rows = [("layout", *(f"{label} s" for _, label in _TIME_PARTS), "step s")]
    for one in plans:
        parts = (f"{getattr(one.time, name):.3f}" for name, _ in _TIME_PARTS)
        rows.append((one.name, *parts, f"{one.time.total:.3f}"))
    return _table(rows)


def fitted_table(fitted: Sequence[Fitted]) -> str:
    """Measured runs beside the model."""
    rows = [("run", "processes", "measured ms", "model ms", "error")]
    for one in fitted:
        rows.append(
            (
                one.run.name,
                str(one.run.config.parallel.world_size),
                f"{1e3 * one.run.step_s:,.1f}",
                f"{1e3 * one.time.total:,.1f}",
                f"{100 * one.error:+.1f}%",
            )
        )
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
