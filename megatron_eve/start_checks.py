# SPDX-License-Identifier: Apache-2.0
"""A run must agree with the files that it names before anything is built: its model with the weights that it starts
from, its tokenizer with the model and with the tokenizer of the weights, its choices about pictures with its shards.

resolve() checks the configuration by itself; this reads those files, small ones, and imports no torch unless the run
has checkpoints of its own. A dry run does the same with the files that exist, and says which do not."""

import logging
from pathlib import Path

from megatron_eve.config.schema import RunConfig
from megatron_eve.config.weights_model import (
    fact_of_weights,
    model_of_weights,
    refuse_other_model,
)
from megatron_eve.data.read.shard_record import check_exif_rotation
from megatron_eve.errors import CheckpointError
from megatron_eve.run_files import checkpoints_of

_LOG = logging.getLogger(__name__)


def check_start(config: RunConfig, *, dry_run: bool) -> None:
    """Raises: ConfigError where two of them disagree, DataError for an unreadable record of shards, CheckpointError for
    weights that cannot be read or, unless it is a dry run, are missing."""
    run_dir = Path(config.run_dir)
    if checkpoints_of(run_dir):
        if dry_run:  # the run itself checks while it holds the folder's lock
            from megatron_eve.training.run_directory import refuse_other_run

            refuse_other_run(config, run_dir=run_dir)
    else:
        _check_weights(config, dry_run=dry_run)
    _check_tokenizer(config, dry_run=dry_run)
    shards = [Path(source.path) for source in config.data.sources]
    check_exif_rotation(shards, exif_rotation=config.data.exif_rotation)


def _check_weights(config: RunConfig, *, dry_run: bool) -> None:
    start = config.checkpoint.load_weights_from
    if start is None:
        return
    stored = model_of_weights(start)
    if stored is not None:
        refuse_other_model(
            config.model,
            stored,
            weights=start,
            copy_text_to_vision=config.checkpoint.copy_text_to_vision,
        )
    elif not dry_run:
        raise CheckpointError(
            f"no checkpoint folder {start}, which checkpoint.load_weights_from names; make it first, or set "
            "checkpoint.load_weights_from=none to start from random weights."
        )
    else:
        _LOG.warning("%s is not here: its model is not compared with this one", start)


def _check_tokenizer(config: RunConfig, *, dry_run: bool) -> None:
    from megatron_eve.data.read.tokenizer import STOP_TEXT, load_tokenizer, refuse_ids_beyond
    from megatron_eve.data.read.vocabulary import FACT, refuse_other_vocabulary

    folder = Path(config.data.tokenizer)
    if dry_run and not folder.exists():
        _LOG.warning("%s is not here: its ids are not compared with model.vocab_size", folder)
        return
    tokenizer = load_tokenizer(folder)
    tokenizer.token_id(STOP_TEXT)
    refuse_ids_beyond(tokenizer, vocab_size=config.model.vocab_size)
    own = checkpoints_of(Path(config.run_dir))
    weights = config.run_dir if own else config.checkpoint.load_weights_from
    if weights is not None:
        recorded = fact_of_weights(weights, FACT)
        refuse_other_vocabulary(recorded, tokenizer.backend, folder=folder, weights=weights)
