# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause. Each message says what was found, what was expected, which field, file or
sample it concerns, and what to change."""


class EveError(Exception):
    """Base of every error that this package raises for something that a user, file or cluster caused."""

    is_final = False
    """Whether another start would fail alike: exit code 2, after which slurm/launcher.py does not start again."""


class ConfigError(EveError):
    """A field of the run's configuration is wrong or contradicts another one."""

    is_final = True


class InUseError(ConfigError):
    """Another process has the folder; it may be free for a later start with the same configuration."""

    is_final = False


class MissingHereError(ConfigError):
    """This machine lacks a GPU or a package that the configuration asks for. A broken node looks the same, and a later
    start may be on another one."""

    is_final = False


class DataError(EveError):
    """A data set, shard, sample or image is wrong as a whole; single bad samples are quarantined instead."""


class CheckpointError(EveError):
    """A checkpoint or a set of weights is missing, incomplete or does not fit the model."""


class ParallelError(EveError):
    """The parallel layout does not fit the processes."""

    def __init__(self, text: str, *, is_final: bool = False) -> None:
        super().__init__(text)
        self.is_final = is_final


class ElsewhereError(EveError):
    """Another process has failed and gives the reason; this one only ends."""
