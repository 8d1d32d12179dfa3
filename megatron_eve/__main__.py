# SPDX-License-Identifier: Apache-2.0
"""One command for everything: `megatron-eve COMMAND ...`, or `python -m megatron_eve COMMAND ...`.

Each COMMAND is a short name of a `python -m` program, with its arguments, messages and exit codes. Only that program is
imported. Unlike `python -m`, the installed script does not look for modules in the working directory, so a user's own
folders `tools` or `slurm` there do no harm."""

import difflib
import runpy
import sys
from collections.abc import Sequence

from megatron_eve.command import end_with

COMMANDS = {
    "data": (
        "megatron_eve.data_prep",
        "shards from annotations and images, tokenizers, checks of both",
    ),
    "convert": (
        "megatron_eve.checkpoints_convert",
        "weights from and to Hugging Face, a release, its check",
    ),
    "train": ("megatron_eve.train", "one stage, as a recipe says"),
    "generate": ("megatron_eve.generate", "an answer of a checkpoint or release"),
    "serve": ("megatron_eve.inference.serve", "an OpenAI-compatible server with a chat page"),
    "evaluate": ("megatron_eve.evaluation.checkpoint", "easy-VQA on a checkpoint beside its run"),
    "lmms-eval": ("megatron_eve.evaluation.lmms_eval", "benchmarks by lmms-eval"),
    "plan": ("megatron_eve.tools.plan", "layouts of a recipe that fit a cluster"),
    "profile": ("megatron_eve.tools.profile", "where the time of some steps goes"),
    "plot": ("megatron_eve.tools.plot", "curves of runs"),
    "submit": ("megatron_eve.slurm.submit", "stages as a chain of Slurm jobs"),
}
"""Name of a command -> its program and what that is for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, which ends the process with its own exit code; returns for help (0) and wrong usage (2)."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        print(f"error: there is no command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    sys.argv = [f"megatron-eve {name}", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def usage() -> str:
    """The commands and what each is for."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-eve COMMAND ...",
            "",
            *lines,
            "",
            "megatron-eve COMMAND --help says more of each.",
        ]
    )


if __name__ == "__main__":
    end_with(main)
