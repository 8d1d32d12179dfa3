# SPDX-License-Identifier: Apache-2.0
"""Optional services: what W&B is asked for and what is said of it; and that none can end a run or hold it up, whatever
it raises and wherever it hangs."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_eve.metrics import optional_sinks
from megatron_eve.metrics.background import BackgroundSink, is_left_behind
from megatron_eve.metrics.sinks import read_metrics
from megatron_eve.run_files import METRICS_FILE
from tests.metrics.test_sinks import open_sinks

REPOSITORY = Path(__file__).parents[2]
RECORDS_KEPT = "the run goes on without it, metrics.jsonl has every record"


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.finished = False
        self.url = "https://server/run"
        self.settings = SimpleNamespace(sync_dir="FOLDER/wandb/offline-run")

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


class FakeWandb:
    """Records what wandb.init was asked for."""

    Settings = dict

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.run = FakeRun()
        self.mode: str | None = None
        self.has_login: bool | Exception = True
        self.fails_online: Exception | None = None
        self.torn_down = 0

    def setup(self, settings: Any = None) -> Any:
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt
        if isinstance(self.has_login, Exception):
            raise self.has_login
        return self.has_login

    def init(self, **arguments: Any) -> FakeRun:
        self.inits.append(arguments)
        if arguments["mode"] == "online" and self.fails_online is not None:
            raise self.fails_online
        return self.run

    def teardown(self) -> None:
        self.torn_down += 1


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> FakeWandb:
    caplog.set_level(logging.INFO)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


def train_two_steps(run_dir: Path, *, switch: str = "logging.wandb") -> list[float | None]:
    """Steps that metrics.jsonl has after a run of two."""
    sinks = open_sinks(run_dir, f"{switch}=true")
    for step in (1, 2):
        sinks.log(step, {"loss": 1.0})
    sinks.close()
    return [record["step"] for record in read_metrics(run_dir / METRICS_FILE)]


def lines_of(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [line for line in caplog.messages if line.startswith(name)]


def test_wandb_keeps_one_run_over_restarts(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    for start in (0, 5):
        sinks = open_sinks(tmp_path / "stage1", "logging.wandb=true", start_step=start)
        sinks.log(start + 1, {"loss": 1.0})
        sinks.close()
    first, second = fake_wandb.inits
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("megatron-eve", "stage1", "allow")
    assert first["id"] == (tmp_path / "stage1" / optional_sinks.RUN_ID_FILE).read_text().strip()
    assert first["config"]["optim.peak_lr"] == "0.001"
    assert fake_wandb.run.logged == [(1, {"train/loss": 1.0}), (6, {"train/loss": 1.0})]
    assert fake_wandb.run.finished


def test_two_run_folders_are_two_wandb_runs(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    for name in ("a", "b"):
        open_sinks(tmp_path / name, "logging.wandb=true").close()
    assert fake_wandb.inits[0]["id"] != fake_wandb.inits[1]["id"]


@pytest.mark.parametrize(
    ("setting", "login", "mode", "told"),
    [
        (None, True, "online", "online, https://server/run"),
        ("online", True, "online", "online, https://server/run"),
        (None, False, "offline", "offline, without a login in WANDB_API_KEY, netrc and wandb's"),
        ("offline", True, "offline", "offline, as WANDB_MODE or wandb's settings say"),
        ("disabled", True, "disabled", "disabled, as WANDB_MODE or wandb's settings say"),
    ],
)
def test_wandb_goes_where_its_own_settings_and_login_say(
    tmp_path: Path,
    fake_wandb: FakeWandb,
    caplog: pytest.LogCaptureFixture,
    setting: str | None,
    login: bool,
    mode: str,
    told: str,
) -> None:
    fake_wandb.mode, fake_wandb.has_login = setting, login
    open_sinks(tmp_path, "logging.wandb=true").close()
    assert [arguments["mode"] for arguments in fake_wandb.inits] == [mode]
    (line,) = lines_of(caplog, "W&B")
    assert line.startswith(f"W&B: {told}")
    assert line.endswith("wandb sync FOLDER/wandb/offline-run") == (mode == "offline")


@pytest.mark.parametrize("place", ["init", "login"])
def test_a_server_that_does_not_answer_means_offline(
    tmp_path: Path, fake_wandb: FakeWandb, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    away = ConnectionError("connection refused\nwhile retrying: a long story")
    if place == "init":
        fake_wandb.fails_online = away
    else:
        fake_wandb.has_login = away
    assert train_two_steps(tmp_path) == [1, 2]
    assert fake_wandb.inits[-1]["mode"] == "offline"
    assert fake_wandb.torn_down == 1
    assert [step for step, _ in fake_wandb.run.logged] == [1, 2]
    (line,) = lines_of(caplog, "W&B")
    assert line == (
        "W&B: offline for this start, the server does not take it (ConnectionError: connection refused); "
        "send it later: wandb sync FOLDER/wandb/offline-run"
    )


def refuse(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError("the service has crashed\nand says so at length")


def leave(*arguments: Any, **keywords: Any) -> Any:
    raise SystemExit(3)


@pytest.mark.parametrize("place", ["setup", "init", "run.log", "run.finish"])
@pytest.mark.parametrize("failure", [refuse, leave])
def test_no_failure_of_wandb_ends_a_run(
    tmp_path: Path,
    fake_wandb: FakeWandb,
    caplog: pytest.LogCaptureFixture,
    place: str,
    failure: Callable[..., Any],
) -> None:
    owner = fake_wandb.run if place.startswith("run.") else fake_wandb
    setattr(owner, place.split(".")[-1], failure)
    assert train_two_steps(tmp_path) == [1, 2]
    (line,) = lines_of(caplog, "W&B failed")
    assert line.endswith(RECORDS_KEPT)
    assert not is_left_behind()


def test_records_that_are_not_sent_in_time_stay_on_the_disk(
    tmp_path: Path, fake_wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    def too_slow() -> None:
        raise TimeoutError

    fake_wandb.run.finish = too_slow  # type: ignore[method-assign]
    assert train_two_steps(tmp_path) == [1, 2]
    assert lines_of(caplog, "W&B")[-1] == (
        "W&B: not all records are sent after 30 s; send them later: wandb sync FOLDER/wandb/offline-run"
    )


def test_tensorboard_that_cannot_write_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    assert train_two_steps(tmp_path, switch="logging.tensorboard") == [1, 2]
    (line,) = lines_of(caplog, "TensorBoard failed: ")
    assert line.endswith(RECORDS_KEPT)


def test_a_package_that_is_broken_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(optional_sinks.importlib, "import_module", refuse)
    assert train_two_steps(tmp_path) == [1, 2]
    assert lines_of(caplog, "wandb cannot be imported: RuntimeError: the service has crashed;")


@pytest.mark.parametrize("place", ["open", "log", "close"])
def test_a_service_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture, place: str) -> None:
    answer = threading.Event()

    class Hanging:
        def __init__(self) -> None:
            self.wait_in("open")

        def wait_in(self, here: str) -> None:
            if here == place:
                answer.wait()

        def log(self, step: int, values: Mapping[str, float]) -> None:
            self.wait_in("log")

        def close(self) -> None:
            self.wait_in("close")

    sink = BackgroundSink("Board", Hanging, close_s=0.2)
    sink.log(1, {"loss": 1.0})
    sink.close()
    assert is_left_behind(), "the process must leave without it"
    assert caplog.messages == [
        "Board has not taken the last records within 0 s: left behind; metrics.jsonl has them all"
    ]
    answer.set()
    sink._thread.join(10)
    assert not is_left_behind()


SCRIPT = """
import logging, sys
from pathlib import Path
from megatron_eve.metrics import optional_sinks
from tests.metrics.test_sinks import open_sinks
optional_sinks.REACH_S = 2
logging.basicConfig(level=logging.INFO, format="%(message)s")
sinks = open_sinks(Path(sys.argv[1]), "logging.wandb=true")
sinks.log(1, {"loss": 1.0, "grad_norm": float("nan")})
sinks.close()
"""


@pytest.mark.parametrize("login", ["netrc", "none", "offline"])
def test_wandb_itself(tmp_path: Path, login: str) -> None:
    """Its own look-up of a login, a server at which nobody listens, and records that `wandb sync` would take."""
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {
        "HOME": str(tmp_path),
        "PYTHONPATH": str(REPOSITORY),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    environment |= {"WANDB_MODE": "offline"} if login == "offline" else {}
    key = "0123456789" * 4
    (tmp_path / ".netrc").write_text(
        f"machine 127.0.0.1:9\n login user\n password {key}\n" if login == "netrc" else ""
    )
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run_dir)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    told = {
        "netrc": "offline for this start, the server does not take it (CommError: ",
        "none": "offline, without a login in ",
        "offline": "offline, as WANDB_MODE or wandb's settings say; send it later: wandb sync ",
    }
    (line,) = [line for line in done.stderr.splitlines() if "step 1/100" not in line]
    assert line.startswith(f"W&B: {told[login]}")
    (synced,) = (run_dir / "wandb").glob("offline-run-*")
    assert line.endswith(f"wandb sync {synced}")
    assert list(synced.glob("*.wandb"))
    assert "loss" in (run_dir / METRICS_FILE).read_text()
