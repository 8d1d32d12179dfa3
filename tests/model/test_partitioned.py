# SPDX-License-Identifier: Apache-2.0
"""The sorted two-segment form is the official mask blend: forward to the bit, gradients to 1e-12, in float64."""

import pytest
import torch
from torch import Tensor

from tests.support.tiny import ALL, SplitConfig, layout, naive_pack, random_samples, tiny_model
from tests.support.train_once import run_config

TOKENS = 48


def _blend_gap(num_vision: int) -> dict[str, float]:
    """Run one decoder layer both ways on the same weights; the largest differences."""
    from megatron_eve.model.build import build_model
    from megatron_eve.parallel.groups import init_model_parallel

    state = init_model_parallel(layout(), seed=1)
    (model,), _ = build_model(run_config(tiny_model(layers=1), layout()), state=state)
    layer = model.decoder.layers[0].double()
    _randomise(layer)
    x = torch.randn(TOKENS, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    modules = {
        "qkv": layer.self_attention.linear_qkv,
        "norm": layer.input_layernorm,
        "mlp": layer.mlp,
    }
    gaps = {}
    for name, module in modules.items():
        sorted_out, sorted_grads = _sorted(module, x, num_vision)
        blend_out, blend_grads = _blend(module, x, num_vision)
        gaps[f"{name} forward"] = float((sorted_out - blend_out).abs().max())
        gaps[f"{name} gradients"] = max(
            float((a - b).abs().max()) for a, b in zip(sorted_grads, blend_grads, strict=True)
        )
    return gaps


def _randomise(layer: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for param in layer.parameters():
        param.data = torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.2


def _sorted(module: torch.nn.Module, x: Tensor, num_vision: int) -> tuple[Tensor, list[Tensor]]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, num_vision)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return out.detach(), [x.grad, *(p.grad.clone() for p in module.parameters())]


def _blend(module: torch.nn.Module, x: Tensor, num_vision: int) -> tuple[Tensor, list[Tensor]]:
    """Both branches on every token, as EVEv2's moe_function does."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    mask = (torch.arange(len(x)) < num_vision).double()[:, None, None]
    if hasattr(module, "_branch"):
        text, vision = module._branch(x, "text"), module._branch(x, "vision")
    else:
        text, vision = (
            out[0] if isinstance(out := branch(x), tuple) else out
            for branch in (module.text, module.vision)
        )
    out = text * (1 - mask) + vision * mask
    out.square().sum().backward()
    return out.detach(), [x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("num_vision", [0, 8, 24, TOKENS - 8, TOKENS])
def test_sorted_form_equals_the_blend(gloo1, num_vision):  # type: ignore[no-untyped-def]
    """Segments are whole blocks, as the packer makes them; 0 and TOKENS: one modality alone."""
    (gaps,) = gloo1.run(_blend_gap, num_vision)
    for name, gap in gaps.items():
        assert gap <= (1e-12 if "gradients" in name else 0.0), f"{name}: {gap}"


@pytest.mark.parametrize("num_vision", [1, TOKENS - 1])
def test_a_segment_of_one_token(gloo1, num_vision):  # type: ignore[no-untyped-def]
    """BLAS multiplies a single row by another kernel, which sums in another order: the last bit may differ."""
    (gaps,) = gloo1.run(_blend_gap, num_vision)
    for name, gap in gaps.items():
        assert gap <= (1e-12 if "gradients" in name else 4e-15), f"{name}: {gap}"


def _whole_model_gap(split: SplitConfig, kind: str) -> tuple[float, float]:
    """Largest relative difference of the loss rows' logits and of any gradient, whole model, float64."""
    import torch.nn.functional as F

    from checkpoints_convert.tensors import hf_to_eve
    from megatron_eve.model.build import build_model
    from megatron_eve.model.micro_batch import RankPlace, micro_batch
    from megatron_eve.parallel.groups import init_model_parallel
    from tests.support.reference_eve import batch_loss, build_reference

    config = tiny_model(split)
    samples = {
        "mixed": random_samples(5, seed=3),
        "text": random_samples(10, seed=4)[1::5],
        "image": random_samples(10, seed=5)[0::5],
        "one label": random_samples(4, seed=6)[3:],
    }[kind]
    reference = build_reference(config, dtype=torch.float64)
    state = init_model_parallel(layout(), seed=1)
    (model,), _ = build_model(run_config(config, layout()), state=state)
    model.double()
    model.load_state_dict(hf_to_eve(reference.state_dict(), config), strict=False)
    pack = naive_pack(samples, model=config, tokens=160, align=8)
    batch = micro_batch(
        pack,
        place=RankPlace(),
        split_attention=split.attention,
        align=8,
        device=torch.device("cpu"),
    )
    logits = model.logits(batch)
    rows = F.cross_entropy(logits, batch.label_targets, reduction="none")
    loss = (rows * batch.label_weights).sum() / batch.num_labels
    loss.backward()
    want = batch_loss(reference, [[sample.reference() for sample in samples]])
    want.backward()
    gradients = hf_to_eve(
        {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in reference.named_parameters()
        },
        config,
    )
    worst = 0.0
    for name, param in model.named_parameters():
        assert param.grad is not None, f"{name} has no gradient, not even zero"
        worst = max(worst, float((param.grad - gradients[name]).abs().max()))
    return abs(float(loss - want)), worst


@pytest.mark.parametrize("kind", ["mixed", "text", "image", "one label"])
@pytest.mark.parametrize(
    "split",
    [
        ALL,
        SplitConfig(norm=False, attention=False, ffn=False),
        SplitConfig(norm=False, attention=False, ffn=True),
        SplitConfig(norm=True, attention=False, ffn=False),
        SplitConfig(norm=False, attention=True, ffn=True),
    ],
    ids=["all", "dense", "ffn", "norm", "attention-ffn"],
)
def test_whole_model_in_float64(gloo1, split, kind):  # type: ignore[no-untyped-def]
    """Pixels and RoPE tables are fp32 on both sides; from there on everything is float64."""
    ((loss_gap, grad_gap),) = gloo1.run(_whole_model_gap, split, kind)
    assert loss_gap <= 1e-13
    assert grad_gap <= 1e-12
