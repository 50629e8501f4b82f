"""fullrank reference, from embeddings alone."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli import app
from fullrank import Reference

ROWS = np.random.default_rng(1).standard_normal((2200, 16)).astype(np.float32)


def run(*arguments):
    return CliRunner().invoke(app, ["reference", *map(str, arguments)])


def test_a_file_of_rows_gives_a_calibrated_reference(tmp_path):
    rows = ROWS.copy()
    rows[7] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    done = run(tmp_path / "rows.npy", "--out", tmp_path / "theirs.safetensors", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["rows"], said["skipped"], said["dimension"], said["calibrated"]) == (2199, 1, 16, True)
    made = Reference.from_tensors(load_file(tmp_path / "theirs.safetensors"))
    assert made.calibration is not None
    assert made.participation_ratio == pytest.approx(16, rel=0.02)
    again = run(tmp_path / "rows.npy", "--out", tmp_path / "theirs.safetensors")
    assert again.exit_code == 2
    assert "--replace" in again.output


def test_too_few_rows_are_named_with_how_many_are_wanted(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS[:200])
    done = run(tmp_path / "rows.npy", "--out", tmp_path / "few.safetensors")
    assert done.exit_code == 0, done.output
    assert "build it from 1056 rows or more" in " ".join(done.output.split())
    assert Reference.from_tensors(load_file(tmp_path / "few.safetensors")).calibration is None


def test_rows_come_over_http(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS[:100])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        done = run(f"{address}/rows.npy", "--out", tmp_path / "theirs.safetensors")
        missing = run(f"{address}/other.npy", "--out", tmp_path / "other.safetensors")
        server.shutdown()
    assert done.exit_code == 0, done.output
    assert Reference.from_tensors(load_file(tmp_path / "theirs.safetensors")).rows == 50
    assert missing.exit_code == 1
    assert "404" in missing.output


@pytest.mark.parametrize(("name", "content"), [("rows.npy", b"no array"), ("rows.parquet", b"no table")])
def test_a_damaged_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    done = run(tmp_path / name, "--out", tmp_path / "theirs.safetensors")
    assert done.exit_code == 1
    assert name in done.output
    assert not (tmp_path / "theirs.safetensors").exists()


def test_the_file_to_write_is_asked_for(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS[:100])
    assert "--out" in run(tmp_path / "rows.npy").output
    assert run(tmp_path / "rows.npy").exit_code == 2
