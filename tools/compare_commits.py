# SPDX-License-Identifier: Apache-2.0
"""Whether two commits compute the same bits: for changes that are to move code and nothing else.

    python -m tools.compare_commits origin/main HEAD

Each commit is checked out into a folder of its own and used through its commands alone, so that its modules may lie
where they like. It resolves every recipe, trains the curriculum of `eve_tiny` in four layouts on the same shards, and
converts a checkpoint to a release and back. Compared are the fields of every recipe, every logged figure but times, the
hash of every tensor of every checkpoint (moments included), every byte of both, and the golden files. What a
commit gave is kept in WORK and not computed again; shards and tokenizer there are those of WORK's first BASE."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import ConfigError, EveError
from megatron_eve.folder_lock import only_one
from megatron_eve.metrics.definitions import METRICS
from megatron_eve.metrics.sinks import read_metrics
from megatron_eve.run_files import CHECKPOINTS, COMPLETE, CONFIG, METRICS_FILE
from megatron_eve.whole import write_json

RECIPES = ("text", "stage1", "stage2_1", "stage2_2", "stage3")
"""Of `eve_tiny_...`, in the order in which each starts from the weights of the one before."""
ONE_PROCESS = "parallel.gpus_per_node=1"
LAYOUTS = {
    "one": (ONE_PROCESS, "parallel.tensor=1", "parallel.distributed_optimizer=false"),
    "TP2+SP": ("parallel.sequence_parallel=true",),
    "PP2": ("parallel.tensor=1", "parallel.pipeline=2"),
    "CP2": ("parallel.tensor=1", "parallel.context=2", "data.sample_align=4"),
}
"""Fields that are laid over the recipes, which ask for two processes with tensor parallelism."""
TIMES = {"time", "eta_s", "memory_gib", "read_retries"} | {
    metric.name for metric in METRICS.values() if metric.reduction == "mean"
}
"""Keys of metrics.jsonl that another run of the same commit has otherwise."""
SHOWN = 20

Facts = dict[str, list[str]]
"""What is compared: "figure loss" -> its value at each step, "tensor NAME" -> its hash. The first word is the kind."""
Parts = dict[str, Facts]
"""Where facts come from: "recipes", "PP2 stage1", "release", ..."""


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all is equal, 1 if not or if a command of a commit failed, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    work = args.work.absolute()
    commits = [
        _git("rev-parse", "--verify", f"{name}^{{commit}}").decode().strip()
        for name in (args.base, args.head)
    ]
    make_data(work, base=commits[0])
    base, head = (
        parts_of(name, work=work, steps=args.steps, until=args.until, layouts=args.layouts)
        for name in commits
    )
    lines = list(differences(base, head))
    allowed = [line for line in lines if any(fnmatchcase(line, rule) for rule in args.allow)]
    refused = [line for line in lines if line not in allowed]
    print(table(base, refused))
    print(*refused[:SHOWN], sep="\n", end="\n" if refused else "")
    report = args.work / f"{commits[0][:12]}-{commits[1][:12]}.json"
    write_json(report, {"commits": commits, "differences": refused, "allowed": allowed})
    print(
        f"{sum(map(len, base.values()))} facts of {args.base}: {len(refused)} differ in {args.head}, "
        f"{len(allowed)} may differ: all in {report}"
    )
    return int(bool(refused))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_commits",
        description="Whether two commits train, save and convert to the same bits. About 20 minutes a commit.",
        epilog="example: python -m tools.compare_commits origin/main HEAD --layouts PP2 --until stage1",
    )
    parser.add_argument("base", metavar="BASE", help="a commit, as git names it")
    parser.add_argument("head", metavar="HEAD", help="the one to compare with it")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/compare"), help="folder for all of it (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=50, help="of each training run (%(default)s)")
    parser.add_argument(
        "--until", choices=RECIPES, default=RECIPES[-1], help="last recipe to train (%(default)s)"
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS], help="to train in (all)"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help="lines about what may differ, as they are printed, with * for any text",
    )
    return parser


def differences(base: Parts, head: Parts) -> Iterator[str]:
    """A line for each fact that differs or that one commit alone has."""
    for part, facts in base.items():
        others = head[part]
        for name in sorted(facts.keys() | others.keys()):
            old, new = facts.get(name), others.get(name)
            if old is None or new is None:
                yield f"{part}: {name}: in {'HEAD' if old is None else 'BASE'} alone"
            elif old != new:
                yield f"{part}: {name}: {_first_difference(old, new)}"


def _first_difference(old: Sequence[str], new: Sequence[str]) -> str:
    if len(old) != len(new):
        return f"{len(old)} -> {len(new)} values"
    apart = [index for index, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
    where = f"{len(apart)} of {len(old)} values, first {apart[0] + 1}: " if len(old) > 1 else ""
    return f"{where}{old[apart[0]]:.80} -> {new[apart[0]]:.80}"


def table(base: Parts, lines: Sequence[str]) -> str:
    """What each part of BASE has, by kind, and how many of `lines` are about it."""
    rows = []
    for part, facts in base.items():
        counts: Counter[str] = Counter()
        for name, values in facts.items():
            counts[name.partition(" ")[0]] += len(values)
        apart = sum(line.startswith(f"{part}: ") for line in lines)
        kinds = ", ".join(f"{number:,} {kind}s" for kind, number in counts.items())
        rows.append(f"{part:26}{f'{apart} differ' if apart else 'equal':12}{kinds}")
    return "\n".join(rows)


def _git(*arguments: str) -> bytes:
    """What git prints. Raises: ConfigError."""
    done = subprocess.run(["git", *arguments], capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise ConfigError(f"`git {' '.join(arguments)}` found nothing here, name a commit: {said}")
    return done.stdout


def parts_of(commit: str, *, work: Path, steps: int, until: str, layouts: Sequence[str]) -> Parts:
    """The facts of a commit by part, from WORK or by its commands. Raises: EveError if one of these fails."""
    code = _checkout(commit, work=work)
    folder = work / f"{commit[:12]}-{steps}"
    folder.mkdir(exist_ok=True)
    todo: dict[str, Callable[[], Facts]] = {"recipes": partial(_recipe_facts, code, folder)}
    for layout in layouts:
        run = partial(_run_facts, code, folder / layout, fields=LAYOUTS[layout], steps=steps)
        for recipe in RECIPES[: RECIPES.index(until) + 1]:
            todo[f"{layout} {recipe}"] = partial(run, recipe=recipe)
    todo[f"release of {layouts[0]} {until}"] = partial(
        _release_facts, code, folder / layouts[0], recipe=until
    )
    record = folder / "parts.json"
    with only_one(folder, what="comparison"):
        known: Parts = json.loads(record.read_text()) if record.exists() else {}
        for part, facts in todo.items():
            if part not in known:
                print(f"{commit[:12]}: {part}", flush=True)
                known[part] = facts()
                write_json(record, known)
    return {part: known[part] for part in todo}


def make_data(work: Path, *, base: str) -> None:
    """Shards and tokenizer by the base's commands, unless they are there, named as the recipes name them."""
    data, out = work / "data", work / "made"
    if data.exists():
        return
    code = _checkout(base, work=work)
    demo = ("eve-tiny", "--out", out, "--train-images", 200, "--stop-after", "shards")
    _python("tools.demo", *demo, code=code, folder=work)
    half = work / ".data"
    shutil.rmtree(half, ignore_errors=True)
    for name in ("text", "captions", "questions"):
        (half / "demo" / name).mkdir(parents=True)
        (half / "demo" / name / "shards").symlink_to(out / "data/shards" / name)
    (half / "demo/tokenizer").symlink_to(out / "data/tokenizer")
    half.rename(data)


def _checkout(commit: str, *, work: Path) -> Path:
    """The tree of a commit, without git."""
    code = work / "code" / commit[:12]
    if not code.exists():
        half = code.with_name(f".{code.name}")
        half.mkdir(parents=True, exist_ok=True)
        top = _git("rev-parse", "--show-toplevel").decode().strip()
        tree = _git("-C", top, "archive", commit)
        subprocess.run(["tar", "-x", "-C", half], input=tree, check=True)
        half.rename(code)
    return code


def _python(module: str, *arguments: object, code: Path, folder: Path) -> str:
    """`python -m` with a commit's code in FOLDER; its output, which FOLDER/log.txt has, too. Raises: EveError."""
    log = folder / "log.txt"
    with log.open("a") as errors:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        errors.write(done.stdout)
    if done.returncode:
        last = log.read_text(errors="replace").splitlines()[-3:]
        raise EveError(f"{module} of {code.name} ended with {done.returncode}, see {log}: {last}")
    return done.stdout


def _recipe_facts(code: Path, folder: Path) -> Facts:
    """Every field of every recipe that has a golden file, and the golden files."""
    facts = _file_facts(code, "tests/**/golden/**/*")
    for golden in sorted(code.glob("tests/config/golden/*.txt")):
        text = _python("megatron_eve.train", golden.stem, "--dry-run", code=code, folder=folder)
        facts |= _field_facts(text.partition("\n\n")[0], prefix=f"{golden.stem} ")
    return facts


def _run_facts(
    code: Path, folder: Path, *, recipe: str, fields: Sequence[str], steps: int
) -> Facts:
    """Fields, figures and tensors of a run in FOLDER/runs, from the weights of the run before it there."""
    run = folder / f"runs/eve_tiny_{recipe}"
    shutil.rmtree(run, ignore_errors=True)  # of a comparison that was stopped
    folder.mkdir(exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to("../../data")
    processes = ("--nproc-per-node", 1 if ONE_PROCESS in fields else 2)
    launch = ("--standalone", "--local-addr", "127.0.0.1", *processes, "-m", "megatron_eve.train")
    train = (run.name, *fields, f"train.steps={steps}", "logging.every_steps=1")
    _python("torch.distributed.run", *launch, *train, code=code, folder=folder)
    facts = _field_facts((run / CONFIG).read_text())
    records = read_metrics(run / METRICS_FILE)
    for key in sorted(set().union(*records) - TIMES):
        facts[f"figure {key}"] = [repr(record.get(key)) for record in records]
    for checkpoint in sorted((run / CHECKPOINTS).glob("step_*")):
        facts |= _tensor_facts(checkpoint)
    return facts


def _release_facts(code: Path, folder: Path, *, recipe: str) -> Facts:
    """Every file of a release, and of the checkpoint that is made from it."""
    convert = partial(_python, "checkpoints_convert", code=code, folder=folder)
    tokenizer = ("--tokenizer", "data/demo/tokenizer")
    convert(
        "release", f"runs/eve_tiny_{recipe}", "release", *tokenizer, "--skip-check", "--overwrite"
    )
    convert("hf-to-megatron", "release", "imported", "--overwrite")
    facts = _file_facts(folder, "release/**/*") | _file_facts(folder, "imported/**/*")
    for name in (COMPLETE, CONFIG):  # they hold the path of FOLDER, or the size of one that does
        del facts[f"file imported/{name}"]
    model = (folder / "imported" / CONFIG).read_text().replace(f"{folder}/", "")
    return facts | _field_facts(model, prefix="imported ")


def _field_facts(text: str, *, prefix: str = "") -> Facts:
    """Lines of a resolved configuration."""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {f"field {prefix}{key}": [value] for key, _, value in pairs}


def _tensor_facts(checkpoint: Path) -> Facts:
    """Hash, shape and type of every tensor, and what else the manifest says, but of the files that hold them."""
    manifest: Mapping[str, Mapping[str, object]] = json.loads((checkpoint / COMPLETE).read_text())
    tensors = {
        f"tensor {name} of {checkpoint.name}": [json.dumps(entry)]
        for name, entry in manifest["tensors"].items()
    }
    return tensors | {
        f"field {key} of {checkpoint.name}": [json.dumps(manifest[key])]
        for key in manifest.keys() - {"tensors", "files", "seal"}
    }


def _file_facts(folder: Path, pattern: str) -> Facts:
    """SHA-256 of every file below a folder that fits a pattern."""
    return {
        f"file {path.relative_to(folder)}": [hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


if __name__ == "__main__":
    end_with(main)
