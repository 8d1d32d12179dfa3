# SPDX-License-Identifier: Apache-2.0
"""How training on images changed the language model's text: its loss on passages that no stage has seen.

    python -m tools.demo.text_loss runs/demo-smollm2 --llm LLM --imported A --stage2-1 B --stage3 C

Stages 1 and 2.1 freeze the text weights, so after them the loss must be that of the imported model, to the last bit;
stage 3 trains all weights, and its loss is reported. Against the language model as transformers itself computes it,
rounding is allowed. Writes text_loss.json and text_loss.md. Exit codes: 0 as expected, 1 not, 2 wrong usage."""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_eve.command import end_with, reports_errors
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.evaluation.scoring import aligned
from megatron_eve.whole import write_json

PASSAGES = (
    "Water boils at a lower temperature on a high mountain because the air pressure there is lower.",
    "The Danube rises in the Black Forest and flows through ten countries before it reaches the Black Sea.",
    "In 1928 Alexander Fleming noticed that a mould in one of his dishes had killed the bacteria around it.",
    "A prime number is a whole number greater than one that has no divisors other than one and itself.",
    "Bees tell one another where flowers are by a dance whose direction points relative to the sun.",
    "The moon always shows the same side to the earth because it turns once on its axis in every orbit.",
    "Bread rises because yeast turns sugar into carbon dioxide, which is caught in the dough.",
    "The first printed books in Europe were made in Mainz in the middle of the fifteenth century.",
    "Iron rusts when oxygen and water reach it, so ships are painted and bridges are coated with zinc.",
    "A chess game begins with thirty-two pieces on the board, and white always makes the first move.",
)
MAX_IMPORT_GAP = 1e-4  # nats per token, of rounding in another order


@torch.inference_mode()
def passage_losses(folder: Path, passages: Sequence[str]) -> list[float]:
    """Mean loss of the next token of each passage, by the folder's own tokenizer and model code, on the CPU."""
    transformers: Any = importlib.import_module("transformers")
    tokenizer = load_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    losses = []
    for passage in passages:
        ids = torch.tensor([tokenizer.encode(passage)])
        logits = model(input_ids=ids).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    return losses


def problems(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """What is not as expected. Keys: llm, imported, stage2_1, stage3."""
    found = []
    gap = max(abs(a - b) for a, b in zip(losses["llm"], losses["imported"], strict=True))
    if gap > MAX_IMPORT_GAP:
        found.append(
            f"import: a passage's loss moved by {gap:.2g}, allowed {MAX_IMPORT_GAP:g} (rounding)"
        )
    pairs = zip(losses["imported"], losses["stage2_1"], strict=True)
    changed = [number for number, (a, b) in enumerate(pairs, start=1) if a != b]
    if changed:
        found.append(
            f"stage 2.1: the loss of passages {changed} changed, though the text weights are frozen"
        )
    return found


def report(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """A table and a verdict."""
    before = losses["imported"]
    titles = {
        "llm": "the language model, by transformers",
        "imported": "imported, before stage 1",
        "stage2_1": "after stage 2.1 (text frozen)",
        "stage3": "after stage 3 (all trained)",
    }
    cells = []
    for name, title in titles.items():
        own = losses[name]
        same = sum(a == b for a, b in zip(before, own, strict=True))
        cells.append((title, f"{fmean(own):.6f}", f"{same} of {len(own)}"))
    found = problems(losses)
    verdict = (
        "NOT MET: " + "; ".join(found)
        if found
        else "MET: stage 2.1 left every bit of the text loss."
    )
    return [
        *aligned(("model", "nats per token, mean of passages", "same bits as imported"), cells),
        "",
        verdict,
    ]


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, judge."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo.text_loss",
        description="Compare the text loss of a language model and of what training made of it.",
        epilog="example: python -m tools.demo.text_loss OUT --llm smollm2-hf --imported hf-import "
        "--stage2-1 hf-stage2_1 --stage3 hf",
    )
    parser.add_argument(
        "out", type=Path, help="folder for text_loss.json and text_loss.md; replaced"
    )
    for option in ("llm", "imported", "stage2-1", "stage3"):
        parser.add_argument(f"--{option}", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    folders = {name: getattr(arguments, name) for name in ("llm", "imported", "stage2_1", "stage3")}
    losses = {name: passage_losses(folder, PASSAGES) for name, folder in folders.items()}
    lines = report(losses)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "text_loss.json", {"passages": PASSAGES, "losses": losses})
    (arguments.out / "text_loss.md").write_text("\n".join(["# Text loss", "", *lines, ""]))
    print("\n".join(lines))
    print(f"wrote the loss of {len(PASSAGES)} passages by {len(folders)} models to {arguments.out}")
    return 1 if problems(losses) else 0


if __name__ == "__main__":
    end_with(main)
