# SPDX-License-Identifier: Apache-2.0
"""One made-up capture of two steps on a GPU, written as Nsight's SQLite export and as torch.profiler's trace.

Times in microseconds. The steps are [0, 1000] and [1100, 2100]; a kernel lies in the gap between them.

    step 1  stream 7   GEMM 100-300          flash 400-450     memcpy 480-520        Adam 900-1050
            stream 20        all-gather 200-500
    step 2  stream 7   GEMM 1200-1300 (backward)               index 1400-1450 (permutation)
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESS = 4242
MAIN, AUTOGRAD = 1, 2
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"
FLASH = "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>"
ADAM = "void multi_tensor_apply_kernel<AdamFunctorMaster>"
GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
INDEX = "void at::native::index_elementwise_kernel<128, 4>"
FILL = "void at::native::vectorized_elementwise_kernel<4, FillFunctor>"


@dataclass(frozen=True)
class Kernel:
    """Work on the device and the call that launched it."""

    name: str
    start: float
    end: float
    stream: int
    launched: float
    thread: int = MAIN


@dataclass(frozen=True)
class Marked:
    """A range of the host."""

    name: str
    start: float
    end: float
    thread: int = MAIN
    is_start_end: bool = False  # of autograd, as opposed to push and pop


KERNELS = (
    Kernel(GEMM, 100, 300, 7, launched=90),
    Kernel(GATHER, 200, 500, 20, launched=95),
    Kernel(FLASH, 400, 450, 7, launched=350),
    Kernel("memcpy", 480, 520, 7, launched=20),
    Kernel(ADAM, 900, 1050, 7, launched=880),
    Kernel(FILL, 1060, 1090, 7, launched=1055),
    Kernel(GEMM, 1200, 1300, 7, launched=1160, thread=AUTOGRAD),
    Kernel(INDEX, 1400, 1450, 7, launched=1350),
)
RANGES = (
    Marked("eve/step=11", 0, 1000),
    Marked("eve/data_wait", 0, 30),
    Marked("eve/forward=0", 50, 600),
    Marked("eve/layer=1", 80, 500),
    Marked("eve/module=linear_qkv", 85, 98),
    Marked("eve/module=linear_qkv.vision", 88, 98),
    Marked("eve/module=core_attention", 340, 360),
    Marked("eve/optimizer", 870, 990),
    Marked("eve/step=12", 1100, 2100),
    Marked("eve/layer=2/backward", 1140, 1200, AUTOGRAD, is_start_end=True),
    Marked("eve/module=linear_qkv.text/backward", 1150, 1170, AUTOGRAD, is_start_end=True),
    Marked("eve/forward=0", 1320, 1500),
    Marked("eve/permutation", 1340, 1360),
    Marked("somebody else's", 0, 2000),
)


def write_sidecar(folder: Path, *, rank: int = 0, step_s: float = 1e-3, **facts: Any) -> None:
    """What the trainer writes beside a trace: two steps of 600 vision and 300 text tokens."""
    step = {
        "step_time_s": step_s,
        "data_wait_s": 3e-5,
        "vision_tokens": 600.0,
        "text_tokens": 300.0,
        "computed_tokens": 1000.0,
        "ideal_flops": 4e8,
        "executed_flops": 5e8,
    }
    whole = {
        "rank": rank,
        "recipe": "eve7b_stage2_2",
        "stage": "2.2",
        "device": "NVIDIA H200",
        "dtype": "bf16",
        "peak_flops": 1e12,
        "world_size": 2,
        "parallel": {"tensor": 2},
        "steps": [{"step": 11, **step}, {"step": 12, **step}],
    }
    (folder / f"rank{rank:04d}.steps.json").write_text(json.dumps(whole | facts))


def write_sqlite(
    path: Path, *, kernels: Sequence[Kernel] = KERNELS, ranges: Sequence[Marked] = RANGES
) -> None:
    """Nsight Systems' export, with the documented columns that the reader asks for and a few that it does not."""
    with sqlite3.connect(path) as db:
        db.executescript("""
            CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
            CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
                category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
                domainId INTEGER NOT NULL);
            CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL,
                eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL,
                returnValue INTEGER NOT NULL);
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL,
                deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
                correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
                shortName INTEGER NOT NULL, gridX INTEGER NOT NULL);
            CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL,
                deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
                correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL);
        """)
        for number, marked in enumerate(ranges):
            text, text_id = (marked.name, None) if number % 2 else (None, 1000 + number)
            db.execute("INSERT INTO StringIds VALUES (?, ?)", (1000 + number, marked.name))
            db.execute(
                "INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, NULL, NULL, ?, ?, NULL, ?, 0)",
                (_ns(marked.start), _ns(marked.end), 60 if marked.is_start_end else 59, number,
                 text, _tid(marked.thread), text_id),
            )  # fmt: skip
        db.execute(  # a mark is no range
            "INSERT INTO NVTX_EVENTS VALUES (5, NULL, 34, NULL, NULL, NULL, 'eve/step=99', ?, NULL, NULL, 0)",
            (_tid(MAIN),),
        )
        for number, kernel in enumerate(kernels):
            _insert_kernel(db, number, kernel)


def _insert_kernel(db: sqlite3.Connection, number: int, kernel: Kernel) -> None:
    runtime = "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, 0, 0)"
    launched = _ns(kernel.launched)
    db.execute(runtime, (launched, launched + 500, _tid(kernel.thread), number))
    # The same correlation id in another process, at a time that would put the work elsewhere.
    db.execute(runtime, (_ns(2050), _ns(2051), ((PROCESS + 1) << 24) + MAIN, number))
    place = (_ns(kernel.start), _ns(kernel.end), 0, 1, kernel.stream, number, PROCESS << 24)
    if kernel.name == "memcpy":
        db.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, ?, ?, ?, ?, ?, 1, 1)", place
        )
        return
    db.execute("INSERT INTO StringIds VALUES (?, ?)", (number, kernel.name))
    db.execute(
        "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, 1)",
        (*place, number),
    )


def write_kineto(
    path: Path, *, kernels: Sequence[Kernel] = KERNELS, ranges: Sequence[Marked] = RANGES
) -> None:
    """The same as torch.profiler's trace."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]
    for marked in ranges:
        events.append(
            _event("user_annotation", marked.name, marked.start, marked.end, marked.thread)
        )
    for number, kernel in enumerate(kernels):
        launched = kernel.launched
        call = _event("cuda_runtime", "cudaLaunchKernel", launched, launched + 0.5, kernel.thread)
        is_copy = kernel.name == "memcpy"
        cat, name = ("gpu_memcpy", "Memcpy HtoD") if is_copy else ("kernel", kernel.name)
        work = _event(cat, name, kernel.start, kernel.end, kernel.stream)
        work["args"] = {"device": 0, "stream": kernel.stream, "correlation": number}
        events += [call | {"args": {"correlation": number}}, work]
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))


def _event(cat: str, name: str, start: float, end: float, tid: int) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid}


def _ns(microseconds: float) -> int:
    return round(1000 * microseconds)


def _tid(thread: int) -> int:
    return (PROCESS << 24) + thread
