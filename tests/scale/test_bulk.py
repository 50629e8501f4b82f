"""Bulk embedding: every id exactly once, bad images as rows, and the same bytes however often a run was killed."""

import json
import random
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from fullrank import Moments, Reference
from fullrank.descriptors import describe
from models.artifact import CARD, WEIGHTS, load, save
from models.embedder import Embedder, normalize
from models.preprocess import decode
from scale import bulk, output, sources
from scale.corpus import referenced
from scale.output import Run, sampled
from tests.support.bulk import RUN, command, png


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images in two folders, one that is cut off, one that is no image and a file of another kind."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(40):
        path = folder / f"class{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(index))
    (folder / "class0" / "cut.png").write_bytes(png(99)[:200])
    (folder / "class0" / "text.jpg").write_bytes(b"hello")
    (folder / "notes.md").write_text("no image")
    return folder


def run(source: str, encoder: Path, out: Path, **options: int) -> list[str]:
    failures = list[str]()
    bulk.run_local(bulk.begin(out, encoder, sources.shards(source)), encoder, out, failed=failures.append, **options)
    return failures


def rows_of(out: Path) -> dict[str, tuple[list[float] | None, str | None]]:
    """id -> (embedding, error) of all output files; every id must be there once."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(out.glob("*.parquet"))])
    found = {it["id"]: (it["embedding"], it["error"]) for it in table.to_pylist()}
    assert len(found) == len(table)
    return found


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


def test_merged_moments_are_those_of_all_rows(
    images: Path, small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FILES_A_SHARD", 7)
    run(str(images), small_artifact, tmp_path)
    report = bulk.report(tmp_path)
    rows = torch.tensor([row for row, error in rows_of(tmp_path).values() if error is None])
    whole = Moments(rows.shape[1]).add(rows)
    assert (report.shards, report.rows, report.errors) == (6, 42, 2)
    assert report.total_variance == pytest.approx(float(rows.double().var(0).sum()), rel=1e-6)
    assert report.participation_ratio == pytest.approx(whole.participation_ratio(), rel=1e-6)


def test_tar_parquet_and_lists_give_the_same_rows(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    files = sorted(images.rglob("*.png"))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in files:
            tar.add(file, str(file.relative_to(images)))
    ids = [str(file.relative_to(images)) for file in files]
    cells = [file.read_bytes() for file in files]
    pq.write_table(pa.table({"id": ids, "image": cells}), tmp_path / "plain.parquet")
    pq.write_table(
        pa.table({"id": ids, "image": [{"bytes": it, "path": None} for it in cells]}), tmp_path / "hf.parquet"
    )
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)) + "\n")
    found = []
    for name in ("shard.tar", "plain.parquet", "hf.parquet", "list.txt"):
        out = tmp_path / f"{name}-out"
        assert run(str(tmp_path / name), small_artifact, out) == []
        found.append({key.removeprefix(f"{images}/"): value for key, value in rows_of(out).items()})
    assert all(it == found[0] for it in found)
    assert len(found[0]) == 41


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


def test_an_unreadable_shard_is_left_for_the_next_run(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "good.tar", "w") as tar:
        tar.add(images / "class0" / "00.png", "00.png")
    whole = (data / "good.tar").read_bytes()
    (data / "torn.tar").write_bytes(whole[:700])
    [failure] = run(str(data), small_artifact, tmp_path / "out")
    assert "torn.tar" in failure
    assert set(rows_of(tmp_path / "out")) == {"00.png"}
    (data / "torn.tar").write_bytes(whole)
    assert run(str(data), small_artifact, tmp_path / "out") == []
    assert {file.stem for file in (tmp_path / "out").glob("*.parquet")} == {"good", "torn"}


def test_rows_of_two_encoders_are_never_mixed(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / bulk.RUN).write_text('{"encoder": "other", "revision": "0123"}')
    with pytest.raises(bulk.BulkError, match="holds rows of other@0123"):
        run(str(images), small_artifact, tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_rows_of_two_preprocessings_are_never_mixed(
    version: int, images: Path, small_artifact: Path, tmp_path: Path
) -> None:
    """Also where the corpus was begun by 0.1.0, which called an encoder by its weights alone: it goes on once."""
    bare, out, found = tmp_path / "encoder", tmp_path / "out", sources.shards(str(images))
    save(replace(load(small_artifact), reference=None, canary=None), bare)
    said = json.loads((bare / CARD).read_text()) | {"schema_version": version}
    (bare / CARD).write_text(json.dumps(said))
    if version == 1:
        out.mkdir()
        former = said["files"][WEIGHTS][:12]
        (out / bulk.RUN).write_text(json.dumps({"encoder": said["name"], "revision": former}))
    assert len(bulk.begin(out, bare, found)) == 1
    assert len(bulk.begin(out, bare, found)) == 1
    assert Run.of(out).revision == load(bare).card.revision
    said["preprocessing"] |= {"resize": "crop"}
    (bare / CARD).write_text(json.dumps(said))
    with pytest.raises(bulk.BulkError, match=r"holds rows of .*choose another --out"):
        bulk.begin(out, bare, found)
    with pytest.raises(bulk.BulkError, match="holds rows of"):
        referenced(out, bare)


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_rows_of_two_precisions_are_never_mixed(
    images: Path, small_artifact: Path, tmp_path: Path, file_format: output.Format
) -> None:
    found = sources.shards(str(images))

    def begin(dtype: output.Dtype) -> list[sources.Shard]:
        return bulk.begin(tmp_path, small_artifact, found, file_format=file_format, dtype=dtype)

    bulk.run_local(begin("bfloat16"), small_artifact, tmp_path)
    [shard] = Run.of(tmp_path).shards(tmp_path)
    rows = Run.of(tmp_path).read_rows(tmp_path, shard)
    names = sorted(str(file.relative_to(images)) for file in images.rglob("[0-9]*.png"))
    reduced = Embedder(load(small_artifact), dtype=torch.bfloat16).embed_files([images / name for name in names])
    assert normalize(reduced).numpy() == pytest.approx(rows, abs=1e-6)
    plain = Embedder(load(small_artifact)).embed_files([images / name for name in names])
    assert 1e-5 < np.abs(normalize(plain).numpy() - rows).max() < 1e-2
    assert json.loads((tmp_path / bulk.RUN).read_text())["dtype"] == bulk.report(tmp_path).dtype == "bfloat16"
    if file_format == "parquet":
        assert pq.read_schema(tmp_path / f"{shard}.parquet").metadata[b"dtype"] == b"bfloat16"
    assert begin("bfloat16") == []
    with pytest.raises(bulk.BulkError, match="computed in bfloat16, not in float32: give --dtype bfloat16, or"):
        begin("float32")
    (tmp_path / bulk.RUN).write_text(json.dumps(asdict(Run.of(tmp_path)) | {"dtype": "int8"}))
    with pytest.raises(bulk.BulkError, match="'int8' is none of float32, bfloat16"):
        Run.of(tmp_path)


def test_a_source_that_changed_is_refused_and_no_id_comes_twice(
    images: Path, small_artifact: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(images / "class1", data)
    run(str(data), small_artifact, tmp_path / "out")
    (data / "new.png").write_bytes(png(500))
    with pytest.raises(bulk.BulkError, match=r"1 shards .* added or removed"):
        run(str(data), small_artifact, tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 20


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
    with pytest.raises(bulk.BulkError, match="holds rows as npy, not as parquet"):
        bulk.begin(out, small_artifact, found)


def test_object_storage_gives_the_same_rows(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for file in sorted(images.rglob("*.png")):
        store.pipe_file(f"/bucket/{file.relative_to(images)}", file.read_bytes())
    store.pipe_file("/lists/all.txt", b"memory://bucket/class0/00.png\nmemory://bucket/gone.png\n")
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(images / "class0" / "00.png", "00.png")
    store.pipe_file("/tars/some.tar", (tmp_path / "some.tar").read_bytes())
    for source in ("memory://bucket", "memory://lists/all.txt", "memory://tars/"):
        assert run(source, small_artifact, tmp_path / source.rstrip("/").rpartition("/")[2]) == []
    run(str(images), small_artifact, tmp_path / "local")
    there, here = rows_of(tmp_path / "bucket"), rows_of(tmp_path / "local")
    assert there == {name: row for name, row in here.items() if name != "class0/text.jpg"}
    listed = rows_of(tmp_path / "all.txt")
    assert "gone.png" in str(listed["memory://bucket/gone.png"][1])
    torch.testing.assert_close(
        torch.tensor(listed["memory://bucket/class0/00.png"][0]), torch.tensor(here["class0/00.png"][0])
    )
    assert set(rows_of(tmp_path / "tars")) == {"00.png"}
    with pytest.raises(sources.SourceError, match=r"nosuch://bucket/.*rotocol"):
        sources.shards("nosuch://bucket/")
    with pytest.raises(sources.SourceError, match="holds no images"):
        sources.shards("memory://empty/")


def test_the_reference_is_of_the_whole_corpus(
    images: Path, small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FILES_A_SHARD", 50)
    data = tmp_path / "data"
    data.mkdir()
    for index in range(260):
        (data / f"{index:03d}.png").write_bytes(png(1000 + index))
    (data / "bad.png").write_bytes(b"no image")
    out, found = tmp_path / "out", sources.shards(str(data))
    bulk.run_local(bulk.begin(out, small_artifact, found), small_artifact, out)
    with pytest.raises(bulk.BulkError, match="no descriptors"):
        referenced(out, small_artifact)
    left = bulk.begin(out, small_artifact, found, inputs=True)
    assert len(left) == 6  # again: their descriptors are missing
    bulk.run_local(left, small_artifact, out)
    made = referenced(out, small_artifact, limit=160).reference
    assert made is not None
    artifact = load(small_artifact)
    names = [f"{index:03d}.png" for index in range(260)]
    rows = normalize(Embedder(artifact).embed_files([data / name for name in names])).double()
    drawn = random.Random(0).sample(range(260), 160)
    held_out = torch.tensor(sorted(set(range(260)) - set(drawn[:80])))
    direct = Reference.build(rows[drawn[:80]].float(), rows[held_out].float())
    assert (made.rows, made.bands) == (180, direct.bands)
    torch.testing.assert_close(made.mean, rows[held_out].mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(made.eigenvalues, direct.eigenvalues, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(made.band_energy, direct.band_energy, atol=1e-7, rtol=1e-3)
    assert made.canary is not None
    run = Run.of(out)
    some, inputs = sampled(run, out, drawn)
    torch.testing.assert_close(some.double(), rows[drawn], atol=1e-5, rtol=0)
    pixels = np.stack([decode((data / names[i]).read_bytes(), artifact.card.preprocessing) for i in drawn])
    torch.testing.assert_close(inputs, torch.from_numpy(describe(pixels)))
    with pytest.raises(bulk.BulkError, match="too few for a reference"):
        referenced(out, small_artifact, limit=100)
    # A shard of an earlier version knows the thumbnails only, and so does the whole then.
    older = sorted(out.glob("*.inputs.safetensors"))[1]
    save_file({"inputs": load_file(older)["inputs"][:, :64].contiguous()}, older)
    torch.testing.assert_close(sampled(run, out, drawn)[1], inputs[:, :64])


def test_a_run_of_an_earlier_version_goes_on(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    card = load(small_artifact).card
    (tmp_path / bulk.RUN).write_text(json.dumps({"encoder": card.name, "revision": card.revision}))
    assert run(str(images), small_artifact, tmp_path) == []
    [file] = tmp_path.glob("*.moments.safetensors")
    before = bulk.report(tmp_path)
    save_file(Moments.from_tensors(load_file(file)).tensors(), file)  # as that version wrote them
    assert bulk.report(tmp_path) == before
    file.write_bytes(b"torn")
    with pytest.raises(bulk.BulkError, match=f"{file.name}: .*remove .*parquet and run again"):
        bulk.report(tmp_path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere", "no file and no folder"),
        ("empty", "holds no images"),
        ("empty.txt", "one path or address a line"),
        ("model.bin", "expected a folder, a .tar"),
        ("s3://bucket/key.csv", "expected a folder, a .tar"),
    ],
)
def test_a_bad_source_is_named(source: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(sources.SourceError, match=says):
        sources.shards(source if "://" in source else str(tmp_path / source))


def test_a_files_name_is_no_command(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    name = "pipe:touch PWNED; cat x.tar #.tar"
    with tarfile.open(data / name, "w") as tar:
        tar.add(images / "class0" / "00.png", "00.png")
    assert run(str(data), small_artifact, tmp_path / "out") == []
    assert len(rows_of(tmp_path / "out")) == 1
    assert not list(tmp_path.rglob("PWNED"))
    assert not Path("PWNED").exists()
