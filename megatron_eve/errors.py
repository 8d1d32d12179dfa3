# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause. Each message says what was found, what was expected, which field, file or
sample it concerns, and what to change."""


class EveError(Exception):
    """Base of every error that this package raises for something a user, file or cluster caused."""

    is_final = False
    """Whether another start would find the same: exit code 2, after which slurm/launcher.py starts no other one."""


class ConfigError(EveError):
    """A field of the run's configuration is wrong or contradicts another one."""

    is_final = True


class InUseError(ConfigError):
    """Another process has the folder: a later start with the same configuration may find it free."""

    is_final = False


class MissingHereError(ConfigError):
    """This machine lacks a GPU or a package that the configuration asks for: a node that is broken looks the same, and
    a later start may be on another one."""

    is_final = False


class DataError(EveError):
    """A data set, shard, sample or image is wrong as a whole; single bad samples are quarantined instead."""


class CheckpointError(EveError):
    """A checkpoint or a set of weights is missing, incomplete or does not fit the model."""


class ParallelError(EveError):
    """The parallel layout cannot be set up on the processes that are there."""

    def __init__(self, text: str, *, is_final: bool = False) -> None:
        super().__init__(text)
        self.is_final = is_final


class ElsewhereError(EveError):
    """Another process has failed and tells why; this one only ends."""
