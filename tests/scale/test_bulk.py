"""Bulk embedding: every id exactly once, bad images as rows, and the same bytes however often a run was killed."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from models.artifact import load
from models.embedder import Embedder, normalize
from scale import bulk, sources
from scale.output import Run
from tests.support.bulk import RUN, command, png, rows_of, run
from tests.support.process import until


def test_a_folder_becomes_rows_and_bad_images_become_errors(
    images: Path, small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FILES_A_SHARD", 16)
    assert run(str(images), small_artifact, tmp_path / "out") == []
    found = rows_of(tmp_path / "out")
    assert len(found) == 42
    assert {name for name, (_, error) in found.items() if error} == {"class0/cut.png", "class0/text.jpg"}
    assert "no image in a known format" in str(found["class0/text.jpg"][1])
    assert found["class0/cut.png"][0] is None
    names = [name for name, (_, error) in found.items() if not error]
    expected = normalize(Embedder(load(small_artifact)).embed_files([images / name for name in names]))
    torch.testing.assert_close(torch.tensor([found[name][0] for name in names]), expected, atol=1e-5, rtol=0)


def test_two_processes_write_what_one_writes(
    images: Path, small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FILES_A_SHARD", 11)
    run(str(images), small_artifact, tmp_path / "one")
    run(str(images), small_artifact, tmp_path / "two", processes=2)
    contents = [{file.name: file.read_bytes() for file in (tmp_path / it).iterdir()} for it in ("one", "two")]
    assert contents[0] == contents[1]


def killed_and_finished(images: Path, encoder: Path, out: Path, delays: list[float]) -> None:
    """Start the run, kill it so long after its first shard, over and over, and let the last one end."""
    whole = command(8, images, encoder, out)
    for delay in delays:
        with subprocess.Popen(whole, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
    subprocess.run(whole, check=True, timeout=600, capture_output=True)


def test_a_killed_run_ends_with_the_unbroken_runs_bytes(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    killed_and_finished(images, small_artifact, tmp_path / "whole", [])
    killed_and_finished(images, small_artifact, tmp_path / "killed", [0.0, 0.01])
    contents = [{file.name: file.read_bytes() for file in (tmp_path / it).iterdir()} for it in ("whole", "killed")]
    assert contents[0] == contents[1]
    assert len(rows_of(tmp_path / "killed")) == 42


@pytest.mark.soak
def test_twenty_kills(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    killed_and_finished(images, small_artifact, tmp_path / "whole", [])
    rng = np.random.default_rng(0)
    for trial in range(20):
        killed_and_finished(images, small_artifact, tmp_path / str(trial), [float(rng.uniform(0, 0.1))])
        contents = [{f.name: f.read_bytes() for f in (tmp_path / it).iterdir()} for it in ("whole", str(trial))]
        assert contents[0] == contents[1]


def test_a_full_disk_stops_the_run_and_leaves_what_is_complete(
    images: Path, small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FILES_A_SHARD", 16)
    real, calls = Path.replace, list[str]()

    def full(fresh: Path, target: Path) -> Path:
        if target.suffix == ".parquet":
            calls.append(target.name)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        return real(fresh, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(bulk.BulkError, match="No space left"):
        run(str(images), small_artifact, tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    assert list(tmp_path.glob(".*")) == []
    assert run(str(images), small_artifact, tmp_path) == []
    assert len(rows_of(tmp_path)) == 42


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_a_file_that_cannot_grow_is_an_error_and_leaves_nothing_half_written(
    images: Path, small_artifact: Path, tmp_path: Path, file_format: str
) -> None:
    """A real failure of write(2): the process may write no file as large as the rows of a shard."""
    out = tmp_path / "out"
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n{RUN}"
    asked = 8, images, small_artifact, out, file_format
    done = subprocess.run(command(*asked, script=limited), capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "the output cannot be written: [Errno 27] File too large" in done.stderr
    assert {file.name for file in out.iterdir()} == {bulk.RUN}
    subprocess.run(command(*asked), check=True, timeout=600, capture_output=True)
    assert len(Run.of(out).shards(out)) == 6


def test_a_process_that_dies_is_an_error(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(small_artifact, encoder)
    left = bulk.begin(tmp_path / "out", encoder, sources.shards(str(images)))
    (encoder / "encoder.json").unlink()
    with pytest.raises(bulk.BulkError, match="a process ended by itself"):
        bulk.run_local(left, encoder, tmp_path / "out", processes=2)


def test_an_interrupted_run_of_several_processes_does_not_go_on(
    small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard of so many images that its first batch comes long before its last."""
    monkeypatch.setattr(sources, "FILES_A_SHARD", 4096)
    monkeypatch.setattr(bulk, "POLL", 0.01)
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "0.png").write_bytes(png(0))
    for index in range(1, 3000):
        (data / f"{index}.png").hardlink_to(data / "0.png")
    left = bulk.begin(out, small_artifact, sources.shards(str(data)))

    def interrupt(images: int) -> None:
        if images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bulk.run_local(left, small_artifact, out, processes=2, progress=interrupt)
    assert {file.name for file in out.iterdir()} == {bulk.RUN}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_the_processes_of_a_killed_run_end_with_it(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    told = "print(*(it.pid for it in multiprocessing.active_children()), flush=True)"
    script = "import multiprocessing\n" + RUN.replace("print(it.name, flush=True)", f"{told}, processes=2")
    whole = command(8, images, small_artifact, tmp_path / "out", script=script)
    with subprocess.Popen(whole, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        others = process.stdout.readline().split()
        process.send_signal(signal.SIGKILL)
    assert len(others) == 2
    until(lambda: not any(lives(it) for it in others))


def lives(process: str) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_npy_files_hold_what_parquet_files_hold(
    images: Path, small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FILES_A_SHARD", 16)
    found = sources.shards(str(images))
    out = tmp_path / "npy"
    bulk.run_local(bulk.begin(out, small_artifact, found, file_format="npy"), small_artifact, out)
    run(str(images), small_artifact, tmp_path / "parquet")
    said = dict[str, tuple[list[float] | None, str | None]]()
    for file in sorted(out.glob("*.npy")):
        lines = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
        for line, row in zip(lines, np.load(file), strict=True):
            said[line["id"]] = None if line["error"] else row.tolist(), line["error"]
            assert np.isnan(row).all() == (line["error"] is not None)
    assert said == rows_of(tmp_path / "parquet")
    assert bulk.report(out) == bulk.report(tmp_path / "parquet")
    assert bulk.begin(out, small_artifact, found, file_format="npy") == []
    with pytest.raises(bulk.BulkError, match="holds rows as npy, not as parquet: give --format npy, or"):
        bulk.begin(out, small_artifact, found)
