# SPDX-License-Identifier: Apache-2.0
"""Whether two commits compute the same bits: for changes that are to move code and nothing else.

    python -m tools.compare_commits origin/main HEAD

Each commit is checked out into a folder of its own and used through its commands alone, so that its modules may lie
where they like. It trains the curriculum of `eve_tiny` in four layouts on the same shards and converts the last
checkpoint. Compared are the resolved configuration, every logged figure but times, the hash of every tensor of every
checkpoint (moments included), every byte of the converted folder, and the golden files. What a commit gave is kept in
WORK and not computed again. Exit code 1: something differs; the lines say what."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_eve.command import end_with
from megatron_eve.errors import ConfigError, EveError
from megatron_eve.run_files import COMPLETE, CONFIG
from megatron_eve.whole import write_text

RECIPES = ("text", "stage1", "stage2_1", "stage2_2", "stage3")
"""Of `eve_tiny_...`, in the order in which each starts from the weights of the one before."""
LAYOUTS = {
    "one process": ("gpus_per_node=1", "tensor=1", "distributed_optimizer=false"),
    "TP2+SP": ("sequence_parallel=true",),
    "PP2": ("tensor=1", "pipeline=2"),
    "CP2": ("tensor=1", "context=2"),
}
"""Fields of `parallel` that are laid over the recipes, which have tensor parallelism 2."""
FOR_LAYOUT = {"CP2": ("data.sample_align=4",)}
TIMES = {
    *("time", "step_time_s", "data_wait_s", "data_wait_fraction", "eta_s", "memory_gib"),
    *("tokens_per_s_per_gpu", "useful_tflops_per_gpu", "executed_tflops_per_gpu"),
    *("mfu", "hardware_utilization", "read_retries"),
}
"""Keys of metrics.jsonl that another run of the same commit has otherwise."""
GOLDEN = "tests/golden"
SHOWN = 20

Facts = dict[str, str]
"""What is compared: "LAYOUT RECIPE: step 12 loss" -> its value or hash as text."""


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all is equal, 1 if not or if a command of a commit failed, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    try:
        names = [commit_of(name) for name in (args.base, args.head)]
        data = _data(args.work.absolute(), base=names[0])
        base, head = (
            facts_of(name, work=args.work.absolute(), data=data, steps=args.steps) for name in names
        )
    except EveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    differences = list(compare(base, head))
    for line in differences[:SHOWN]:
        print(line)
    if len(differences) > SHOWN:
        print(f"and {len(differences) - SHOWN} more")
    report = args.work / f"{names[0][:12]}-{names[1][:12]}.json"
    write_text(report, json.dumps({"facts": len(base), "differences": differences}, indent=1))
    print(f"{len(base)} facts of {args.base}, {len(differences)} differ in {args.head}: {report}")
    return int(bool(differences))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_commits",
        description="Whether two commits train, save and convert to the same bits. About ten minutes a commit.",
    )
    parser.add_argument("base", metavar="BASE", help="a commit, as git names it")
    parser.add_argument("head", metavar="HEAD", help="the one to compare with it")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/compare"), help="folder for all of it (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=50, help="of each training run (%(default)s)")
    return parser


def compare(base: Mapping[str, str], head: Mapping[str, str]) -> Iterator[str]:
    """A line for each fact that differs or that one commit alone has."""
    for name in [*base, *(name for name in head if name not in base)]:
        old, new = base.get(name, "absent"), head.get(name, "absent")
        if old != new:
            yield f"{name}: {old} -> {new}"


def commit_of(name: str) -> str:
    """Whole hash of a commit. Raises: ConfigError."""
    done = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ConfigError(f"git knows no commit {name!r} here; call this in a checkout")
    return done.stdout.strip()


def facts_of(commit: str, *, work: Path, data: Path, steps: int) -> Facts:
    """All facts of a commit, from WORK or by training. Raises: EveError if one of its commands fails."""
    record = work / f"{commit[:12]}-{steps}.json"
    if record.exists():
        facts: Facts = json.loads(record.read_text())
        return facts
    code, facts = _checkout(commit, work=work), {}
    for layout in LAYOUTS:
        folder = work / commit[:12] / layout.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").exists():
            (folder / "data").symlink_to(data)
        for recipe in RECIPES:
            print(f"{commit[:12]}: {layout}, {recipe}", flush=True)
            _train(f"eve_tiny_{recipe}", layout=layout, steps=steps, code=code, folder=folder)
            facts |= _run_facts(folder / f"runs/eve_tiny_{recipe}", prefix=f"{layout} {recipe}: ")
    _python(
        *("checkpoints_convert", "megatron-to-hf", f"runs/eve_tiny_{RECIPES[-1]}", "hf"),
        *("--tokenizer", "data/demo/tokenizer", "--overwrite"),
        code=code,
        folder=folder,
    )
    facts |= _file_facts(folder / "hf", prefix="converted: ")
    facts |= _file_facts(code / GOLDEN, prefix="golden: ")
    write_text(record, json.dumps(facts, indent=1))
    return facts


def _data(work: Path, *, base: str) -> Path:
    """Shards and tokenizer by the base's commands, where the recipes look for them: WORK/data/demo."""
    data = work / "data"
    if not data.exists():
        code, out = _checkout(base, work=work), work / "made"
        _python(
            *("tools.demo", "eve-tiny", "--out", out, "--train-images", "200"),
            *("--stop-after", "shards"),
            code=code,
            folder=work,
        )
        links = work / ".data/demo"
        for name in ("text", "captions", "questions"):
            (links / name).mkdir(parents=True, exist_ok=True)
            (links / name / "shards").symlink_to(out / "data/shards" / name)
        (links / "tokenizer").symlink_to(out / "data/tokenizer")
        (work / ".data").rename(data)
    return data


def _checkout(commit: str, *, work: Path) -> Path:
    """The tree of a commit, without git."""
    code = work / "code" / commit[:12]
    if not code.exists():
        half = code.with_name(f".{code.name}")
        half.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", commit], capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", half], input=archive, check=True)
        half.rename(code)
    return code


def _train(recipe: str, *, layout: str, steps: int, code: Path, folder: Path) -> None:
    """One run into FOLDER/runs/RECIPE, from the weights of the run before it there; a run that is done is kept."""
    fields = [f"parallel.{field}" for field in LAYOUTS[layout]]
    processes = 1 if "gpus_per_node=1" in LAYOUTS[layout] else 2
    _python(
        *("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", processes, "-m", "megatron_eve.train", recipe, *fields),
        *FOR_LAYOUT.get(layout, ()),
        f"train.steps={steps}",
        "logging.every_steps=1",
        code=code,
        folder=folder,
    )


def _python(module: str, *arguments: object, code: Path, folder: Path) -> None:
    """`python -m` with a commit's code in FOLDER; output in FOLDER/log.txt. Raises: EveError."""
    log = folder / "log.txt"
    with log.open("ab") as output:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        last = log.read_text(errors="replace").splitlines()[-3:]
        raise EveError(f"{module} of {code.name} ended with {done.returncode}, see {log}: {last}")


def _run_facts(run: Path, *, prefix: str) -> Facts:
    """Configuration, figures and tensors of a finished run."""
    facts = {}
    for line in (run / CONFIG).read_text().splitlines():
        key, _, value = line.partition(": ")
        facts[f"{prefix}{key}"] = value
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key in sorted(record.keys() - TIMES):
            facts[f"{prefix}step {record['step']} {key}"] = repr(record[key])
    for checkpoint in sorted((run / "checkpoints").glob("step_*")):
        tensors = json.loads((checkpoint / COMPLETE).read_text())["tensors"]
        for name, entry in tensors.items():
            facts[f"{prefix}{checkpoint.name} {name}"] = json.dumps(entry, sort_keys=True)
    return facts


def _file_facts(folder: Path, *, prefix: str) -> Facts:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        f"{prefix}{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


if __name__ == "__main__":
    end_with(main)
