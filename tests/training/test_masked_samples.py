# SPDX-License-Identifier: Apache-2.0
"""A sample that turns out to be unreadable counts for nothing, exactly: on packs of the real data path."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eve.config.schema import BatchConfig
from megatron_eve.data.read.quarantine import UNREADABLE
from megatron_eve.data.sample import Pack
from tests.data.conftest import MODEL, WriteShards, data_config, make_sample, write_shards
from tests.data.test_loader import open_loader, run
from tests.support.tiny import layout

__all__ = ["write_shards"]
WEIGHTS: tuple[Any, ...] = ("global_tokens", "sample_mean", "sqrt_tokens", "official")
TINY = dataclasses.replace(MODEL, vocab_size=320)


def losses_and_gradients(model: Any, data: Any, steps: list[list[Pack]]) -> list[Any]:
    """In a worker: loss and gradients by each kind of WEIGHTS of each step's packs, of the same random model."""
    from megatron_eve.parallel.groups import init_model_parallel
    from megatron_eve.training.step import forward_backward
    from tests.support.train_once import build, run_config

    config = run_config(model, layout())
    state = init_model_parallel(config.parallel, seed=1)
    found = []
    torch.manual_seed(0)
    chunks, wrapped, _, _ = build(config, weights=None, state=state)
    for weights, packs in itertools.product(WEIGHTS, steps):
        optim = dataclasses.replace(
            config.optim,
            loss_normalization=weights,
            loss_group_samples=2 if weights == "official" else None,
        )
        config = dataclasses.replace(config, data=data, optim=optim)
        logged = torch.stack(forward_backward(wrapped, packs, config=config, state=state)).sum(0)
        gradients = {name: p.main_grad.clone() for name, p in chunks[0].named_parameters()}
        found.append((logged.tolist(), gradients))
    return found


def without_labels(pack: Pack, names: set[str]) -> Pack:
    """The pack with the labels of some samples taken away, as if the batch did not ask for them."""
    bounds = pack.cu_seqlens.tolist()
    keep = torch.ones(pack.num_tokens, dtype=torch.bool)
    for i, name in enumerate(pack.sample_ids):
        if name in names:
            keep[bounds[i] : bounds[i + 1]] = False
    rows = keep[pack.modality_order[pack.label_rows]]
    return dataclasses.replace(
        pack, label_rows=pack.label_rows[rows], label_targets=pack.label_targets[rows]
    )


@pytest.mark.parametrize("unit", ["samples", "packs"])
def test_an_unreadable_sample_counts_for_nothing(
    write_shards: WriteShards, tmp_path: Path, gloo1: Any, unit: Any
) -> None:
    from data_prep.__main__ import main
    from megatron_eve.data.read.tokenizer import load_tokenizer

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("What is it? It is number 1. And more.\n" * 20)
    tokenizer = tmp_path / "tokenizer"
    assert main(["tokenizer", "train", str(corpus), str(tokenizer), "--vocab-size", "300"]) == 0
    folder = write_shards("a", [make_sample(i, sizes=[(64, 96)]) for i in range(8)])
    data = data_config(
        [folder], tokenizer=tokenizer, max_text_tokens=250, pack_tokens=512, max_unreadable=0.5
    )
    batch = BatchConfig(unit=unit, size=8 if unit == "samples" else 3)
    tiny = load_tokenizer(tokenizer)
    (whole,) = run(open_loader(data, tiny, batch=batch), 1)
    loader = open_loader(data, tiny, batch=batch)
    shard = folder / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b"It is number 1", b"It is \xffumber 1"))
    (damaged,) = run(loader, 1)
    lost = {(name, reason) for pack in damaged for name, reason in pack.quarantined}
    assert lost == {("shard.00000.mds row 1", "damaged_row")}
    assert {reason for _, reason in lost} <= UNREADABLE
    expected = [without_labels(pack, {"sample-00001"}) for pack in whole]
    results = gloo1.run(losses_and_gradients, TINY, data, [damaged, expected])[0]
    for weights, found, right in zip(WEIGHTS, results[::2], results[1::2], strict=True):
        assert found[0][1] == right[0][1] > 0  # denominators
        assert found[0][0] == pytest.approx(right[0][0], rel=1e-6), weights
        for name, gradient in right[1].items():
            error = float((found[1][name] - gradient).abs().max())
            assert error <= 1e-5 * max(float(gradient.abs().max()), 1e-6), (weights, name)
