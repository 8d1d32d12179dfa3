# SPDX-License-Identifier: Apache-2.0
"""A Python interpreter that has imported torch, megatron-core and DALI before it is started.

One process imports them. `warm_python()` is a program of a few milliseconds that has this process fork: the child gets
the program's arguments, environment, folder and open files, and shares no threads, groups or random state with another
child. The program passes signals on and ends as its child ends; if it is killed, the child is killed too.

It is for commands whose work is of interest, not their start: a fresh interpreter needs seven seconds for the imports.
Unlike `python` it knows no options but -m, -c, -u and -W, and sys.modules is full."""

import atexit
import contextlib
import gc
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
pipe = socket.socket(socket.AF_UNIX)
pipe.connect({address!r})
call = dict(
    arguments=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd(), executable=__file__
)
socket.send_fds(pipe, [b"f"], [0, 1, 2])
pipe.sendall(json.dumps(call).encode() + b"\\n")
answers = pipe.makefile()
child = int(answers.readline())
def pass_on(number, frame):
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
    signal.signal(number, pass_on)
code = int(answers.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""
READY = "ready"


@dataclass(frozen=True)
class Call:
    """One start of the program."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    executable: str


class WarmPython:
    """Owns the process that forks."""

    def __init__(self, folder: Path) -> None:
        self.executable = folder / "python"
        address = str(folder / "s")
        self.executable.write_text(CLIENT.format(python=sys.executable, address=address))
        self.executable.chmod(0o755)
        repository = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm_python", address],
            cwd=repository,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == READY

    def close(self) -> None:
        """End it, and with it all that still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()


@cache
def warm_python() -> str:
    """The program, to be started in place of `sys.executable`; one for the whole of this test process."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    python = WarmPython(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(python.close)
    return str(python.executable)


class Server:
    """Forks a process for each connection, answers when it has ended, kills it when the connection is closed."""

    def __init__(self, address: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, tuple[socket.socket, int]] = {}  # by process: connection, pidfd

    def next_call(self) -> Call | None:
        """Serve. Returns in each forked process what it has to do, and None in this one, when stdin ends."""
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        while True:
            for key, _ in self._selector.select():
                if key.fd == sys.stdin.fileno():
                    for child in list(self._children):
                        self._end(child)
                    return None
                if key.fileobj is self._listener:
                    if (call := self._accept()) is not None:
                        return call
                elif key.data in self._children:
                    self._end(key.data)

    def _accept(self) -> Call | None:
        connection, _ = self._listener.accept()
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        call = Call(**json.loads(connection.makefile().readline()))
        child = os.fork()
        if not child:
            self._leave(files, connection)
            return call
        for number in files:
            os.close(number)
        connection.sendall(f"{child}\n".encode())
        pidfd = os.pidfd_open(child)
        self._children[child] = (connection, pidfd)
        self._selector.register(pidfd, selectors.EVENT_READ, child)
        self._selector.register(connection, selectors.EVENT_READ, child)
        return None

    def _end(self, child: int) -> None:
        """The child has ended; or its program has, and then the child and all that it started are killed."""
        connection, pidfd = self._children.pop(child)
        pid, status = os.waitpid(child, os.WNOHANG)
        if not pid:
            for process in psutil.Process(child).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        self._selector.unregister(pidfd)
        self._selector.unregister(connection)
        os.close(pidfd)
        with contextlib.suppress(OSError):
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        connection.close()

    def _leave(self, files: list[int], connection: socket.socket) -> None:
        """In the child: close what is the server's."""
        os.setsid()
        self._selector.close()
        self._listener.close()
        connection.detach()
        for other, pidfd in self._children.values():
            other.close()
            os.close(pidfd)
        for standard, number in enumerate(files):
            os.dup2(number, standard)
            os.close(number)


def become(call: Call, path: list[str]) -> None:
    """Be the interpreter that was called; `path`: sys.path without what a call adds."""
    os.environ.clear()
    os.environ.update(call.environment)
    os.chdir(call.folder)
    sys.executable = call.executable
    random.seed()
    _reseed_numpy()
    options, (kind, *arguments) = _split(call.arguments)
    is_unbuffered = "-u" in options or bool(call.environment.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=False, write_through=is_unbuffered)  # type: ignore[union-attr]
    if "-W" in options:
        warnings.simplefilter("ignore")  # the one kind that is used
    first = {"-m": call.folder, "-c": ""}.get(kind, os.path.dirname(os.path.abspath(kind)))
    extra = [p for p in call.environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [first, *extra, *path]
    main: dict[str, Any] = vars(sys.modules["__main__"])
    if kind == "-m":
        sys.argv = arguments
        sys.modules.pop(arguments[0], None)
        runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]
    elif kind == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), main)
    else:
        sys.argv = [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options, and the rest from -m, -c or the script on."""
    place = 0
    while arguments[place] in ("-u", "-W"):
        place += 1 + (arguments[place] == "-W")
    return arguments[:place], arguments[place:]


def _reseed_numpy() -> None:
    import numpy as np

    np.random.seed()


def main(address: str) -> Call | None:
    """Import and serve. Returns in each forked process the call that it has to answer."""
    import nvidia.dali
    import torch
    import torch._inductor  # deterministic algorithms import it
    import torch.distributed.run

    import megatron_eve.training.run  # noqa: F401

    assert nvidia.dali is not None
    torch.set_num_threads(1)
    assert threading.active_count() == 1
    gc.freeze()  # else every process takes two seconds to sort all of it out as it ends
    server = Server(address)
    print(READY, flush=True)
    return server.next_call()


if __name__ == "__main__":
    _path = [p for p in sys.path[1:] if p not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    _call = main(sys.argv[1])
    if _call is not None:
        become(_call, _path)
