# SPDX-License-Identifier: Apache-2.0
"""Builds: every sample ends in exactly one place, restarts change nothing, and foreign folders are left alone."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.build_options import BuildOptions
from data_prep.build_shards import build_shards, dry_run, report_lines
from data_prep.images import ImageLimits
from data_prep.inspect_shards import iterate_samples
from data_prep.parts import PartJob, build_part
from megatron_eve.errors import ConfigError, DataError
from tests.data_prep.pictures import encode, noise, sample, tree, write_dataset

LIMITS = ImageLimits(validate="full", max_pixels=10**6, max_aspect_ratio=50)


def _options(data: Path, out: Path, *, workers: int = 1, samples_per_part: int = 4) -> BuildOptions:
    return BuildOptions(
        data=data,
        image_folder=data.parent,
        out=out,
        source="test",
        samples_per_part=samples_per_part,
        shard_bytes=5_000,
        limits=LIMITS,
        workers=workers,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("build") / "input", num_samples=30)


@pytest.fixture(scope="module")
def built(data: Path) -> Path:
    """An uninterrupted build with one worker."""
    out = data.parent.parent / "built"
    build_shards(_options(data, out))
    return out


def test_every_sample_ends_in_exactly_one_place(data: Path, built: Path) -> None:
    wanted = [entry["id"] for entry in json.loads(data.read_text())]
    good = [found.id for found in iterate_samples(built)]
    records = [json.loads(line) for line in (built / "quarantine.jsonl").open()]
    assert [record["id"] for record in records] == [f"bad-{i}" for i in range(30) if i % 7 == 3]
    assert {record["reason"] for record in records} == {"missing_image"}
    assert [wanted[record["index"]] for record in records] == [record["id"] for record in records]
    assert good == [name for name in wanted if not name.startswith("bad")]
    content = json.loads((built / "dataset.json").read_text())
    assert content["complete"] is True
    assert content["counts"]["entries"] == 30
    assert content["counts"]["samples"] == len(good)
    assert content["counts"]["quarantined"] == {"missing_image": len(records)}
    assert content["counts"]["text_only"] == sum(name.startswith("text") for name in good)


def test_rows_hold_the_files_bytes(data: Path, built: Path) -> None:
    for found in iterate_samples(built):
        number = found.id.split("-")[1]
        original = (data.parent / f"images/{number}.jpg").read_bytes()
        assert found.images == ((original,) if found.id.startswith("image") else ())
        assert found.source == "test"


def test_the_index_names_files_relative_to_the_folder(built: Path) -> None:
    index = json.loads((built / "index.json").read_text())
    names = [shard["raw_data"]["basename"] for shard in index["shards"]]
    assert names[0] == "part-00000/shard.00000.mds"
    assert len(names) > len({name.split("/")[0] for name in names}) == 8
    assert all((built / name).stat().st_size <= 5_000 for name in names)


def test_workers_do_not_change_a_byte(data: Path, built: Path, tmp_path: Path) -> None:
    build_shards(_options(data, tmp_path / "two", workers=2))
    assert tree(tmp_path / "two") == tree(built)


def test_a_complete_build_is_kept(data: Path, built: Path) -> None:
    before = tree(built)
    report = build_shards(_options(data, built))
    assert report.num_kept_parts == report.num_parts == 8
    assert tree(built) == before


def test_the_report_is_arithmetic(data: Path, tmp_path: Path) -> None:
    report = build_shards(_options(data, tmp_path / "out"))
    lines = report_lines(report, out=tmp_path / "out")
    assert lines[0] == "30 samples = 26 in shards + 4 in quarantine"
    assert lines[1] == "quarantine: missing_image 4"
    assert lines[-1].endswith(f"to {tmp_path / 'out'}")


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "input", num_samples=20, size=220)
    arguments = ["--samples-per-part", "2", "--validate", "full", "--shard-bytes", "60000"]
    command = [sys.executable, "-m", "data_prep", "build-shards", str(data), str(data.parent)]

    def start(out: Path) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*command, str(out), "--workers", "2", *arguments], stderr=subprocess.DEVNULL
        )

    whole = [str(data), str(data.parent), str(tmp_path / "whole"), "--workers", "1", *arguments]
    assert main(["build-shards", *whole]) == 0
    process = start(tmp_path / "killed")
    while len(list((tmp_path / "killed").glob("part-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/index.json").exists()
    _wait_until_gone(workers)
    (tmp_path / "killed/.tmp-part-00077.123").mkdir(exist_ok=True)  # what a killed worker leaves
    num_parts = len(list((tmp_path / "killed").glob("part-*")))
    assert 2 <= num_parts < 10
    assert start(tmp_path / "killed").wait() == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return found


def _wait_until_gone(pids: list[int]) -> None:
    """Workers must end by themselves once their parent is gone."""
    assert pids
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(_is_running(pid) for pid in pids):
            return
        time.sleep(0.02)
    raise AssertionError(f"orphans are still running: {pids}")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_index_of_json_files_and_json_lines_give_the_same_rows(
    data: Path, built: Path, tmp_path: Path
) -> None:
    entries = json.loads(data.read_text())
    names = [f"index-{number}.json" for number in range(len(entries))]
    for name, entry in zip(names, entries, strict=True):
        (data.parent / name).write_text(json.dumps(entry))
    (data.parent / "index.json").write_text(json.dumps(names))
    (data.parent / "lines.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    expected = list(iterate_samples(built))
    for name in ("index.json", "lines.jsonl"):
        out = tmp_path / name
        build_shards(_options(data.parent / name, out))
        assert list(iterate_samples(out)) == expected


def test_several_images_in_a_row(tmp_path: Path) -> None:
    first, second = encode(noise(30, 50), "JPEG"), encode(noise(20, 10), "PNG")
    (tmp_path / "a.jpg").write_bytes(first)
    (tmp_path / "b.png").write_bytes(second)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample("two", ["a.jpg", "b.png", "a.jpg"])]))
    build_shards(_options(path, tmp_path / "out"))
    (found,) = iterate_samples(tmp_path / "out")
    assert found.images == (first, second, first)
    assert found.image_sizes == ((30, 50), (20, 10), (30, 50))


def test_re_encoded_images_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(encode(noise(mode="P"), "GIF"))
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample("s", ["a.gif", "a.gif"])]))
    report = build_shards(_options(path, tmp_path / "out"))
    assert report.counts.changed == {"gif_to_png": 2}
    assert "re-encoded images: gif_to_png 2" in report_lines(report, out=tmp_path / "out")


def test_keys_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    rows = [sample(str(i), licence="mine", prompt="x") for i in range(3)]
    rows[2]["conversations"][0]["weight"] = 1  # type: ignore[index]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    options = dataclasses.replace(_options(path, tmp_path / "out"), samples_per_part=1)
    report = build_shards(dataclasses.replace(options, ignored_keys=("prompt",)))
    expected = {"conversations.weight": 1, "licence": 3, "prompt": 3}
    assert report.counts.unknown_keys == expected
    written = json.loads((tmp_path / "out/dataset.json").read_text())
    assert written["counts"]["unknown_keys"] == expected
    lines = [line for line in report_lines(report, out=tmp_path) if "licence" in line]
    assert lines == [
        "keys that are not read, and in how many samples: conversations.weight 1, licence 3, prompt 3"
    ]
    with pytest.raises(DataError, match=r"unread_text 3\), the first one because key `prompt`"):
        build_shards(options, overwrite=True)


def test_keys_that_are_data_do_not_fill_the_report(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample(str(i), **{f"key-{i:03d}": 1}) for i in range(130)]))
    keys = build_shards(_options(path, tmp_path / "out")).counts.unknown_keys
    assert len(keys) == 101
    assert (keys["key-099"], keys["(other keys)"]) == (1, 30)


def test_samples_for_plain_alone_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(noise(), "JPEG"))
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample("a", "a.jpg", "Say it.", "A leaf."), sample("b", "a.jpg")]))
    report = build_shards(_options(path, tmp_path / "out"))
    assert (report.counts.samples, report.counts.plain_only) == (2, 1)
    lines = report_lines(report, out=tmp_path)
    assert any(line.startswith("1 samples have an image without a mark") for line in lines)


def test_other_input_or_options_are_refused(data: Path, built: Path) -> None:
    before = tree(built)
    with pytest.raises(ConfigError, match=r"options\.samples_per_part is 4 there, 5 now"):
        build_shards(_options(data, built, samples_per_part=5))
    changed = data.parent / "other.json"
    changed.write_text(json.dumps(json.loads(data.read_text())[:-1]))
    with pytest.raises(ConfigError, match=r"input\.\w+ is .* there"):
        build_shards(_options(changed, built))
    assert tree(built) == before


def test_a_folder_with_something_else_is_never_touched(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds \['thesis\.txt'\]"):
            build_shards(_options(data, tmp_path), overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_overwrite_builds_anew(data: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(_options(data, out, samples_per_part=3))
    build_shards(_options(data, out), overwrite=True)
    assert tree(out) == tree(built)
    assert os.listdir(tmp_path) == ["out"]


def test_overwriting_keeps_the_old_shards_until_the_new_ones_stand(
    data: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_shards(_options(data, out, samples_per_part=3))
    old = tree(out)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.build_shards._finish", killed)
        with pytest.raises(KeyboardInterrupt):
            build_shards(_options(data, out), overwrite=True)
    assert tree(out) == old
    report = build_shards(_options(data, out), overwrite=True)
    assert report.num_kept_parts == 8  # of the build that was killed
    assert tree(out) == tree(built)
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_left_aside_between_the_renames_comes_back(
    data: Path, built: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build_shards(_options(data, out))
    os.rename(out, tmp_path / ".replaced-out")  # a build with --overwrite was killed here
    assert build_shards(_options(data, out)).num_kept_parts == 8
    assert tree(out) == tree(built)
    assert os.listdir(tmp_path) == ["out"]


def test_of_a_link_the_folder_behind_it_is_overwritten(
    data: Path, built: Path, tmp_path: Path
) -> None:
    real, link = tmp_path / "disk" / "shards", tmp_path / "out"
    build_shards(_options(data, real, samples_per_part=3))
    link.symlink_to(real)
    build_shards(_options(data, link), overwrite=True)
    assert link.is_symlink() and tree(real) == tree(built)
    assert os.listdir(real.parent) == ["shards"]


def test_overwriting_deletes_nothing_that_is_no_builds(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(_options(data, out))
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"also holds thesis\.txt"):
        build_shards(_options(data, out), overwrite=True)
    assert (out / "thesis.txt").exists()


def test_a_second_build_at_the_same_time_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use by another build"):
            build_shards(_options(data, tmp_path / "out"))


def test_a_part_of_other_samples_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(_options(data, out))
    (out / "index.json").unlink()
    part = json.loads((out / "part-00002/part.json").read_text())
    (out / "part-00002/part.json").write_text(json.dumps(part | {"entries_sha256": "0"}))
    with pytest.raises(DataError, match="part-00002 was made from other samples"):
        build_shards(_options(data, out))
    (out / "part-00002/part.json").write_text("{")
    with pytest.raises(DataError, match="delete the folder"):
        build_shards(_options(data, out))


def test_nothing_good_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample("a", "absent.jpg"), sample("b", None, "Hi", "")]))
    with pytest.raises(DataError, match=r"all 2 samples .*empty_answer 1, missing_image 1"):
        build_shards(_options(path, tmp_path / "out"))
    assert not (tmp_path / "out/index.json").exists()
    assert len((tmp_path / "out/quarantine.jsonl").read_text().splitlines()) == 2
    path.write_text("[]")
    with pytest.raises(DataError, match="holds no samples"):
        build_shards(_options(path, tmp_path / "none"))


def test_a_failing_part_leaves_no_trace(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = _options(data, tmp_path)
    job = PartJob(number=0, entries=[], out=tmp_path, shard_bytes=9, context=options.context)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_prep.parts.publish_folder", fail)
    with pytest.raises(OSError, match="No space left"):
        build_part(job)
    assert os.listdir(tmp_path) == []


def test_a_dry_run_writes_nothing(data: Path, tmp_path: Path) -> None:
    lines = dry_run(_options(data, tmp_path / "out"))
    assert "8 parts = ceil(30 / 4)" in lines[1]
    assert lines[2] == "first 30 samples: 26 good + 4 for quarantine".replace(":", " =", 1)
    assert "bad-3: missing_image" in lines[3]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("workers", 0, "--workers 0 is below 1"),
        ("samples_per_part", 0, "--samples-per-part 0"),
        ("shard_bytes", 1 << 32, "most that MDS can address"),
        ("image_folder", Path("/absent"), "is not a folder"),
    ],
)
def test_bad_options_are_refused(data: Path, field: str, value: object, message: str) -> None:
    fields = {
        "data": data,
        "image_folder": data.parent,
        "out": Path("out"),
        "source": "s",
        "samples_per_part": 1,
        "shard_bytes": 1,
        "limits": LIMITS,
        "workers": 1,
    }
    with pytest.raises(ConfigError, match=message):
        BuildOptions(**(fields | {field: value}))  # type: ignore[arg-type]
