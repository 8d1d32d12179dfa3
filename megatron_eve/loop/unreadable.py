# SPDX-License-Identifier: Apache-2.0
"""Ends a run in which more samples turn out to be unreadable than data.max_unreadable allows.

Comes in: each step's counts, summed over all processes, so that all of them end at the same step. Counted from one
epoch's end to the next, in which every sample comes about once, together with what was known when the run started."""

from megatron_eve.errors import DataError, ElsewhereError


class UnreadableGuard:
    """Counts over an epoch."""

    def __init__(self, *, left: int, epoch_samples: int, is_teller: bool) -> None:
        """`left`: how many samples may turn out to be unreadable in an epoch. `is_teller`: the process that says so."""
        self._left, self._epoch_samples, self._is_teller = left, epoch_samples, is_teller
        self._samples = 0.0
        self._unreadable = 0.0

    def count(self, *, samples: float, unreadable: float) -> None:
        """A step's counts. Raises: DataError, or ElsewhereError on processes that do not tell."""
        if self._samples >= self._epoch_samples:
            self._samples = self._unreadable = 0.0
        self._samples += samples
        self._unreadable += unreadable
        if self._unreadable <= self._left:
            return
        if not self._is_teller:
            raise ElsewhereError("too many samples cannot be read")
        raise DataError(
            f"{self._unreadable:,.0f} samples could not be read in this epoch, data.max_unreadable leaves "
            f"{self._left:,}; quarantine.jsonl in the run's folder names file, row and reason of each. Copy these "
            "shards again, or raise data.max_unreadable; then start again to go on from the newest checkpoint."
        )
