# SPDX-License-Identifier: Apache-2.0
"""Bringing files to the disk while the processor has something else to do."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_eve.whole import sync_path


class WriteBack:
    """Files that go to the disk while others are written or read; at the end of the block all of them are there.

        with WriteBack() as disk:
            for path in paths:
                write(path)
                disk.sync(path)

    Raises: OSError, at the end of the block, with what the file system refused; a disk that is full may say so only
    here."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-back")
        self._files: list[Future[None]] = []

    def sync(self, path: Path) -> None:
        """Begin with a file that is written and closed."""
        self._files.append(self._thread.submit(sync_path, path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=error is not None)
        if error is None:
            for file in self._files:
                file.result()
