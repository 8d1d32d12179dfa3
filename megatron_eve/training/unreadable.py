# SPDX-License-Identifier: Apache-2.0
"""Ends a run in which more samples turn out to be unreadable than data.max_unreadable allows.

Comes in: each step's number of samples that no step before has found unreadable, summed over all processes, so that all
of them end at the same step. With what was known when the run started, this is the share of the data that is lost."""

from megatron_eve.errors import DataError, ElsewhereError


class UnreadableGuard:
    """Counts from the start of the run's processes."""

    def __init__(self, *, left: int, is_teller: bool) -> None:
        """`left`: how many samples may turn out to be unreadable. `is_teller`: this process gives the reason."""
        self._left, self._is_teller = left, is_teller
        self._found = 0.0

    def count(self, unreadable: float) -> None:
        """Add a step's new ones. Raises: DataError, or ElsewhereError on processes that do not give the reason."""
        self._found += unreadable
        if self._found <= self._left:
            return
        if not self._is_teller:
            raise ElsewhereError("too many samples cannot be read")
        raise DataError(
            f"{self._found:,.0f} samples could not be read since this start, data.max_unreadable leaves "
            f"{self._left:,}; quarantine.jsonl in the run's folder names file, row and reason of each. Copy these "
            "shards again, or raise data.max_unreadable; then start again to go on from the newest checkpoint."
        )
