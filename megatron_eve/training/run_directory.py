# SPDX-License-Identifier: Apache-2.0
"""Which run owns a run directory. Its checkpoints decide, and RUN_DIR/.lock keeps a second process out.
RUN_DIR/config.txt is the configuration of the latest start, for people and tools."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_eve.checkpoint.manifest import check_bytes, read_manifest
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.text_form import config_text, flatten, lines_of
from megatron_eve.config.values import NONE
from megatron_eve.errors import ConfigError
from megatron_eve.folder_lock import only_one
from megatron_eve.run_files import CONFIG, first_whole, newest_first
from megatron_eve.whole import write_text

# After a restart, for the earlier processes, which the system is still ending.
_PATIENCE_S = 30.0
_LOSS = ("optim.loss_normalization", "optim.loss_group_samples")


@contextmanager
def claimed(run_dir: Path, config: RunConfig) -> Iterator[None]:
    """Hold the run directory and write the configuration into it. A full disk leaves the old one.

    Raises: ConfigError if it is another run's, or another process has it; OSError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with only_one(run_dir, what="run", patience_s=_PATIENCE_S):
        refuse_other_run(config, run_dir=run_dir)
        write_text(run_dir / CONFIG, config_text(config))
        yield


def refuse_other_run(config: RunConfig, *, run_dir: Path) -> None:
    """A run directory belongs to one recipe, model, stage and loss; lengths, learning rates and layouts may change.

    Raises: ConfigError naming the fields that differ from those of the run that is there."""
    written = _written_config(run_dir)
    if written is None:
        return
    before = lines_of(written)
    now = flatten(config)
    differ = [
        f"{key} was {before.get(key)}, is {value}"
        for key, value in now.items()
        if key.startswith(("recipe", "model.", "stage.")) and before.get(key) != value
    ]
    if differ:
        raise ConfigError(
            f"{run_dir} holds the checkpoints of another run: {'; '.join(differ)}. Choose another run_dir, and "
            f"checkpoint.load_weights_from={run_dir} to start from its weights"
        )
    _refuse_other_loss(before, now, run_dir=run_dir)


def _refuse_other_loss(before: Mapping[str, str], now: Mapping[str, str], *, run_dir: Path) -> None:
    """A changed default of the recipe would let the run go on with another loss unnoticed."""
    written = {key: before.get(key, NONE) for key in _LOSS}
    wanted = {key: now[key] for key in _LOSS}
    if written != wanted:
        was, is_now = (
            " ".join(f"{key}={value}" for key, value in found.items())
            for found in (written, wanted)
        )
        is_offered = written["optim.loss_normalization"] != "microbatch_mean"
        as_before = f"Add `{was}` to go on as before, or choose" if is_offered else "Choose"
        raise ConfigError(
            f"{run_dir} holds checkpoints of a run with {was}, this run has {is_now}. {as_before} another run_dir, and "
            f"checkpoint.load_weights_from={run_dir} to start from its weights"
        )


def _written_config(run_dir: Path) -> str | None:
    """The configuration of the newest checkpoint whose config.txt is undamaged; if there is none, RUN_DIR/config.txt,
    which has no hash. None: there is no checkpoint that another run could spoil."""
    checkpoints = newest_first(run_dir)
    found = first_whole(checkpoints, check=_undamaged_config)  # a resume names the broken ones
    if found:
        return found[1]
    path = run_dir / CONFIG
    return path.read_text(errors="replace") if checkpoints and path.exists() else None


def _undamaged_config(checkpoint: Path) -> str:
    check_bytes(checkpoint, [CONFIG], read_manifest(checkpoint))
    return (checkpoint / CONFIG).read_text()
