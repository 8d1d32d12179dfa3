# SPDX-License-Identifier: Apache-2.0
"""Reads the SQLite export of Nsight Systems: `nsys export --type sqlite -o rank0000.sqlite rank0000.nsys-rep`.

Tables and columns are those of NVIDIA's "SQLite Export Schema Reference" (Nsight Systems documentation, 2021.5), which
later versions extend: a table exists only where something was recorded, further columns are ignored, an export that
lacks one of the needed columns is refused by name. Event types of NVTX_EVENTS: 59 push and pop, 60 start and end.
globalTid holds process and thread, (pid << 24) + tid under 24 bits each; a correlationId is unique within a process."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_eve.metrics.captured import PREFIX

from .kinds import COPY, kernel_kind
from .trace import ProfileError, Range, Trace, Work

_PUSH_POP, _START_END = 59, 60
_PROCESS = 1 << 24
_NEEDED = {
    "StringIds": ("id", "value"),
    "NVTX_EVENTS": ("start", "end", "eventType", "text", "textId", "globalTid"),
    "CUPTI_ACTIVITY_KIND_RUNTIME": ("start", "globalTid", "correlationId"),
    "CUPTI_ACTIVITY_KIND_KERNEL": (
        *("start", "end", "deviceId", "streamId", "correlationId", "globalPid"),
        *("demangledName", "shortName"),
    ),
}
_COPIES = {
    "CUPTI_ACTIVITY_KIND_MEMCPY": "memcpy",
    "CUPTI_ACTIVITY_KIND_MEMSET": "memset",
}
_COPY_COLUMNS = ("start", "end", "deviceId", "streamId", "correlationId", "globalPid")


def read_nsight(path: Path, *, rank: int) -> Trace:
    """One rank's trace. Raises: ProfileError if a table or column is missing or the file is no SQLite export."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            _check(connection, path)
            launches = _launches(connection)
            work = [*_kernels(connection, launches), *_copies(connection, launches)]
            ranges = list(_ranges(connection))
    except sqlite3.DatabaseError as error:
        raise ProfileError(f"{path} is no SQLite export of Nsight Systems: {error}") from error
    return Trace(rank=rank, device="cuda", source="Nsight Systems", ranges=ranges, work=work)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    for table, columns in _NEEDED.items():
        found = _columns(connection, table)
        if not found:
            raise ProfileError(
                f"{path} has no table {table}; capture with `python -m tools.profile command`, it traces both"
            )
        _check_columns(found, columns, path=path, table=table)
    for table in _COPIES:
        if found := _columns(connection, table):
            _check_columns(found, _COPY_COLUMNS, path=path, table=table)


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}


def _check_columns(found: set[str], needed: tuple[str, ...], *, path: Path, table: str) -> None:
    missing = [column for column in needed if column not in found]
    if missing:
        raise ProfileError(
            f"{path}: table {table} has no column {', '.join(missing)}; its columns are {', '.join(sorted(found))}"
        )


def _launches(connection: sqlite3.Connection) -> dict[tuple[int, int], tuple[int, int]]:
    """(process, correlation id) -> (time, thread) of the call that launched it."""
    rows = connection.execute(
        "SELECT globalTid, correlationId, start FROM CUPTI_ACTIVITY_KIND_RUNTIME"
    )
    return {(tid // _PROCESS, correlation): (start, tid) for tid, correlation, start in rows}


def _kernels(connection: sqlite3.Connection, launches: Any) -> Iterator[Work]:
    rows = connection.execute(
        'SELECT k.start, k."end", k.deviceId, k.streamId, k.correlationId, k.globalPid, '
        "COALESCE(long.value, short.value, '?') FROM CUPTI_ACTIVITY_KIND_KERNEL AS k "
        "LEFT JOIN StringIds AS long ON long.id = k.demangledName "
        "LEFT JOIN StringIds AS short ON short.id = k.shortName"
    )
    for *place, name in rows:
        yield _work(*place, name=name, kind=kernel_kind(name), launches=launches)


def _copies(connection: sqlite3.Connection, launches: Any) -> Iterator[Work]:
    for table, name in _COPIES.items():
        if _columns(connection, table):
            columns = ", ".join(f'"{column}"' for column in _COPY_COLUMNS)
            for place in connection.execute(f"SELECT {columns} FROM {table}"):
                yield _work(*place, name=name, kind=f"{COPY}: {name}", launches=launches)


def _work(
    start: int,
    end: int,
    device: int,
    stream: int,
    correlation: int,
    process: int,
    *,
    name: str,
    kind: str,
    launches: dict[tuple[int, int], tuple[int, int]],
) -> Work:
    # Work of a CUDA graph, or launched before the capture began, has no call: it belongs where it ran.
    launched_at, thread = launches.get((process // _PROCESS, correlation), (start, -1))
    return Work(
        name=name,
        kind=kind,
        start=start,
        end=end,
        lane=f"device {device} stream {stream}",
        launched_at=launched_at,
        launch_thread=thread,
    )


def _ranges(connection: sqlite3.Connection) -> Iterator[Range]:
    rows = connection.execute(
        'SELECT n.start, n."end", n.globalTid, COALESCE(n.text, s.value) AS name FROM NVTX_EVENTS AS n '
        "LEFT JOIN StringIds AS s ON s.id = n.textId WHERE n.eventType IN (?, ?) "
        'AND n."end" IS NOT NULL AND name LIKE ?',
        (_PUSH_POP, _START_END, f"{PREFIX}%"),
    )
    for start, end, thread, name in rows:
        yield Range(name=name.removeprefix(PREFIX), start=start, end=end, thread=thread)
