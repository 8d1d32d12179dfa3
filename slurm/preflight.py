# SPDX-License-Identifier: Apache-2.0
"""Checks of a node before 128 ranks depend on it. Standard library only, so that it can report a broken
environment.

    python -m slurm.preflight RUN_DIR          check this node
    python -m slurm.launcher ...               checks every node of the job with it

One JSON line a node: its name, clock, versions and `problems`; exit 1 and a line on stderr for each problem. The
launcher compares the nodes' clocks and versions with each other. Not checked here: anything that needs the GPU itself
(bandwidth, ECC counters); a node without nvidia-smi passes, as the CPU machines of the tests do.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import commands
from .outcome import NOT_STARTED

MIN_FREE_GIB = 100.0
"""A 7B checkpoint with optimizer state is 14 GiB of bf16 weights and 84 GiB of fp32 states."""
MAX_CLOCK_SPREAD_S = 60.0
"""Includes the spread of the check's starts; enough to find a node without NTP."""
PACKAGES = ("torch", "megatron-core", "mosaicml-streaming", "nvidia-dali-cuda130", "megatron-eve")
TIMEOUT_S = 180

log = logging.getLogger("slurm.preflight")


def gpu_problems(env: Mapping[str, str]) -> list[str]:
    """Fewer GPUs than Slurm promised, or a driver that does not answer."""
    text = env.get("SLURM_GPUS_ON_NODE", "")
    expected = int(text) if text.isdigit() else 0
    if not expected or shutil.which("nvidia-smi") is None:
        return []
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return ["nvidia-smi did not answer in 60 s"]
    if result.returncode:
        return [
            f"nvidia-smi failed with {result.returncode}: {result.stderr.strip() or result.stdout.strip()}"
        ]
    found = len(result.stdout.split())
    return [] if found >= expected else [f"found {found} GPUs, expected {expected}"]


def memlock_problems() -> list[str]:
    """InfiniBand registers memory with the card; a small limit shows as a crash inside NCCL. Only with a card."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or not Path("/sys/class/infiniband").is_dir():
        return []
    return [
        f"memlock limit is {soft} bytes, expected unlimited (limits.conf or slurmd's LimitMEMLOCK)"
    ]


def run_dir_problems(run_dir: Path, *, min_free_gib: float) -> list[str]:
    """The run's folder is there, can be written from here, and has room for the next checkpoint."""
    try:
        with tempfile.NamedTemporaryFile(dir=run_dir, prefix=".preflight-") as file:
            file.write(b"x")
    except OSError as error:
        return [f"cannot write into {run_dir}: {error.strerror}"]
    free_gib = shutil.disk_usage(run_dir).free / 2**30
    if free_gib < min_free_gib:
        return [
            f"{free_gib:.1f} GiB are free in {run_dir}, expected {min_free_gib:g} (EVE_MIN_FREE_GIB)"
        ]
    return []


def versions() -> dict[str, str]:
    """The versions with which this node would train."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def check_this_node(run_dir: Path, *, env: Mapping[str, str]) -> dict[str, object]:
    """All checks of one node, as the JSON line that check_nodes reads."""
    min_free_gib = float(env.get("EVE_MIN_FREE_GIB") or MIN_FREE_GIB)
    problems = (
        gpu_problems(env)
        + memlock_problems()
        + run_dir_problems(run_dir, min_free_gib=min_free_gib)
    )
    node = env.get("SLURMD_NODENAME") or os.uname().nodename
    return {"node": node, "time": time.time(), "versions": versions(), "problems": problems}


def outliers(reports: Mapping[str, Mapping[str, object]]) -> dict[str, list[str]]:
    """Nodes whose versions differ from most nodes', or whose clock is far from the median clock."""
    if not reports:
        return {}
    texts = {
        node: json.dumps(report["versions"], sort_keys=True) for node, report in reports.items()
    }
    usual = Counter(texts.values()).most_common(1)[0][0]
    clocks = {node: float(str(report["time"])) for node, report in reports.items()}
    median = sorted(clocks.values())[len(clocks) // 2]
    found: dict[str, list[str]] = {}
    for node in reports:
        if texts[node] != usual:
            found.setdefault(node, []).append(
                f"found versions {texts[node]}, expected as on most nodes {usual}"
            )
        if abs(clocks[node] - median) > MAX_CLOCK_SPREAD_S:
            found.setdefault(node, []).append(
                f"clock is {clocks[node] - median:+.0f} s from the median node's"
            )
    return found


def parse_reports(text: str) -> dict[str, dict[str, object]]:
    """The nodes' JSON objects; Slurm's own lines and two reports on one line do no harm."""
    reports: dict[str, dict[str, object]] = {}
    for match in re.finditer(r'\{"node"', text):
        try:
            report, _end = json.JSONDecoder().raw_decode(text, match.start())
        except json.JSONDecodeError:
            continue  # torn; the node counts as silent
        reports[str(report["node"])] = report
    return reports


def ask_nodes(hosts: Sequence[str], *, run_dir: Path) -> dict[str, dict[str, object]]:
    """One `srun` of the check, again for minutes where Slurm itself could not start it. Raises: SlurmError."""
    command = [
        "srun",
        "--export=ALL",
        f"--nodes={len(hosts)}",
        f"--ntasks={len(hosts)}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=0",
    ]
    command += [
        os.environ.get("PYTHON", sys.executable),
        "-m",
        f"{__package__}.preflight",
        str(run_dir),
    ]
    started, waits = time.monotonic(), commands.pauses(commands.patience_s())
    while True:
        text, errors = _output(command)
        reports = parse_reports(text)
        could_not = commands.is_away(errors) or any(words in errors for words in NOT_STARTED)
        if reports or not could_not:
            return reports
        words = " / ".join(line for line in errors.splitlines() if line.strip())
        pause = next(waits, None)
        if pause is None:
            spent = time.monotonic() - started
            raise commands.SlurmError(f"the nodes could not be checked in {spent:.0f} s: {words}")
        log.warning("the nodes could not be checked: %s; again in %.0f s", words, pause)
        time.sleep(pause)


def _output(command: Sequence[str]) -> tuple[str, str]:
    """The command's stdout and stderr until it ends or its time is up; stderr goes to the log, too."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
        )
        text, errors = result.stdout, result.stderr
    except subprocess.TimeoutExpired as error:
        text, errors = _text(error.stdout), _text(error.stderr)
    except FileNotFoundError as error:
        raise commands.SlurmError("found no command srun on PATH") from error
    sys.stderr.write(errors)
    sys.stderr.flush()
    return text, errors


def _text(value: str | bytes | None) -> str:
    """subprocess returns bytes after a timeout, even if text was asked for."""
    return value.decode(errors="replace") if isinstance(value, bytes) else (value or "")


def check_nodes(hosts: Sequence[str], *, run_dir: Path) -> list[str]:
    """Check every node of the job; logs each problem and returns the names of the bad nodes. Raises: SlurmError."""
    reports = ask_nodes(hosts, run_dir=run_dir)
    problems = {
        node: [str(p) for p in _listed(report["problems"])] for node, report in reports.items()
    }
    for node, found in outliers(reports).items():
        problems[node] += found
    for node in hosts:
        if node not in reports:
            problems[node] = [f"no answer to the check within {TIMEOUT_S} s"]
    for node, found in sorted(problems.items()):
        for problem in found:
            log.error("preflight: %s: %s", node, problem)
    return sorted(node for node, found in problems.items() if found)


def _listed(value: object) -> list[object]:
    """A JSON list, checked."""
    if not isinstance(value, list):
        raise TypeError(f"found {type(value).__name__} in a preflight report, expected a list")
    return value


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m slurm.preflight`."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.preflight",
        description="Check this node before a run.",
        epilog="Example: srun --ntasks-per-node=1 python -m slurm.preflight runs/eve7b_stage1",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="folder of the run, shared by all nodes"
    )
    report = check_this_node(parser.parse_args(argv).run_dir, env=os.environ)
    sys.stdout.write(
        json.dumps(report) + "\n"
    )  # one write: print() makes two, and nodes' lines would mix
    sys.stdout.flush()
    for problem in _listed(report["problems"]):
        print(f"preflight: {report['node']}: {problem}", file=sys.stderr)
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
