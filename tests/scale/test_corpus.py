"""What a bulk run leaves: rows of one encoder alone, their moments, and the reference of the whole corpus."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
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
from tests.support.bulk import png, rows_of, run


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
