# SPDX-License-Identifier: Apache-2.0
"""Runs that are not in this package: a function of a user's own file, `my_recipes.py:my_run`, and the text that a run
wrote, `RUN_DIR/config.txt`."""

import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import isfunction
from pathlib import Path
from typing import TypeVar

from megatron_eve.config.schema import RunConfig
from megatron_eve.config.text_form import config_from_text
from megatron_eve.errors import ConfigError

T = TypeVar("T")


def recipe_of_function(reference: str) -> RunConfig:
    """What the function of `FILE.py:FUNCTION` returns.

    Most such functions lay their own values over a recipe of ours by `dataclasses.replace`, whose name and folder come
    with it. So `recipe` always becomes the function's name, as it says which function filled the other fields, and a
    run_dir that is `runs/` and the name of the recipe that was returned becomes `runs/FUNCTION`.

    Raises: ConfigError if the file or function is not there, the file or function raises, or it returns something else.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; a recipe of your own is FILE.py:FUNCTION.")
    with _on_path(path.parent):
        names = _run(path, lambda: runpy.run_path(str(path), run_name=path.stem))
        own = {k: v for k, v in names.items() if isfunction(v) and v.__module__ == path.stem}
        if name not in own:
            there_are = ", ".join(own) or "no functions"
            raise ConfigError(f"{path} has no function {name!r}; it has {there_are}.")
        config = _run(path, own[name])
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{reference} returned {type(config).__name__}; expected a RunConfig (megatron_eve.config.schema)."
        )
    is_default = config.run_dir == f"runs/{config.recipe}"
    return replace(config, recipe=name, run_dir=f"runs/{name}" if is_default else config.run_dir)


def recipe_of_text(path: Path) -> RunConfig:
    """The configuration in a config.txt: with its own run_dir, so that the run goes on unless that is overridden.

    Raises: ConfigError if the file is not there or not such a text; the message names it.
    """
    try:
        return config_from_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The file's own folder is searched for its imports, as for a script."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _run(path: Path, function: Callable[[], T]) -> T:
    """Calls a user's code; if it raises, the message has the kind, the text and the last line of that file."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        place = f"{path}:{line}" if line else str(path)
        raise ConfigError(f"{place}: {type(error).__name__}: {error}") from error
