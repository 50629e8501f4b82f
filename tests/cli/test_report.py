"""fullrank report: one page on an encoder, on rows or on a service; what is wrong is named and nothing is written."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

from cli import app
from fullrank import Moments, Reference, SpectrumMonitor
from fullrank.verdict import judge_window
from models.artifact import load
from tests.support.encoders import write_encoder
from tests.support.images import encoded, pictures
from tools.stack import free_port

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def report(out: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """The figures as JSON, and the page. It loads nothing, and has the title that it should."""
    done = run(*arguments, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    page = out.read_text()
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert not re.findall(r"(?:src|href|srcset)=['\"](?!data:)[^'\"]*|url\(|@import|<script", page), (
        "it loads something"
    )
    return json.loads(done.stdout), page


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A healthy encoder, and one of whose 32 dimensions 28 are dead."""
    root = tmp_path_factory.mktemp("encoders")
    write_encoder(root / "sound", 0)
    write_encoder(root / "dying", 0, dead=28)
    return root / "sound", root / "dying"


def test_an_encoder_on_its_canary(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    found, page = report(tmp_path / "report.html", encoders[0])
    (subject,) = found["subjects"]
    assert subject["verdict"]["state"] == "pass"
    canary = load(encoders[0]).canary
    assert canary is not None
    expected = Moments(32).add(canary.embeddings).participation_ratio()
    measured = subject["measures"]["participation_ratio"]
    assert measured["estimate"] == pytest.approx(expected, rel=1e-4)
    assert measured["lower"] < measured["estimate"] < measured["upper"]
    assert "Nearest neighbours" in page
    assert page.count("data:image/png;base64,") > 30
    assert "of 32 directions" in page


def test_an_encoder_on_images_is_judged_by_its_reference(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i, picture in enumerate(pictures(400, 5)):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(picture))
    (tmp_path / "images" / "broken.png").write_bytes(b"x")
    found, page = report(tmp_path / "report.html", encoders[0], "--data", tmp_path / "images")
    (subject,) = found["subjects"]
    assert subject["verdict"]["state"] == "healthy", subject["verdict"]
    assert subject["facts"]["images"] == "400"
    assert "1 files could not be read" in " ".join(subject["notes"])
    assert "broken.png" in page
    assert subject["measures"]["canary_cosine"]["estimate"] == pytest.approx(1, abs=1e-4)


def test_two_encoders_and_what_changes_for_a_search(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    sound, dying = encoders
    found, page = report(tmp_path / "same.html", sound, "--against", sound)
    assert found["comparison"]["overlap"]["10"]["estimate"] == 1
    assert found["comparison"]["distance_spearman"]["estimate"] == pytest.approx(1)
    found, page = report(tmp_path / "dying.html", dying, sound)
    assert found["subjects"][0]["verdict"]["state"] == "refused"
    assert found["comparison"]["overlap"]["10"]["estimate"] < 0.9
    for words in ("What changes for a search", "Images that moved most", "Differences that are lost", "refused"):
        assert words in page


def test_a_refused_encoder_is_not_headed_healthy_because_its_own_reference_says_so(
    encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    """A reference made from a collapsed encoder's own embeddings finds them as they were."""
    (tmp_path / "images").mkdir()
    for i, picture in enumerate(pictures(400, 5)):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(picture))
    sound, dying = encoders
    found, page = report(tmp_path / "page.html", dying, "--against", sound, "--data", tmp_path / "images")
    first, second = found["subjects"]
    assert (first["gate"]["passed"], second["gate"]["passed"]) == (False, True)
    banners = re.findall(r'<div class="verdict (\w+)"><b>([^<]+)</b>([^<]*)', page)
    assert banners[0][:2] == ("bad", "refused")
    assert banners[0][2].startswith("dying: ")
    assert [it[1] for it in banners[:2]].count("healthy") <= 1


GAUSSIAN = torch.randn(3000, 24, generator=torch.Generator().manual_seed(0)).numpy()


def test_rows_are_measured_as_the_library_measures_them(tmp_path: Path) -> None:
    rows = GAUSSIAN * np.linspace(1, 0.1, 24, dtype=np.float32)
    rows[5] = np.nan
    rows[7] = 0
    np.save(tmp_path / "rows.npy", rows)
    found, page = report(tmp_path / "report.html", tmp_path / "rows.npy")
    (subject,) = found["subjects"]
    good = torch.from_numpy(np.delete(rows, [5, 7], 0))
    moments = Moments(24).add(good / good.norm(dim=1, keepdim=True))
    assert subject["measures"]["effective_rank"]["estimate"] == pytest.approx(moments.effective_rank(), rel=1e-6)
    assert subject["measures"]["total_variance"]["estimate"] == pytest.approx(float(moments.covariance().trace()))
    assert subject["verdict"]["state"] == "insufficient_data"  # nothing to compare with
    assert subject["notes"] == [
        "1 of 3,000 rows are not finite, and count in nothing else.",
        "1 of 3,000 rows are all zero, and count in nothing else.",
    ]
    assert f"The embeddings use about {moments.effective_rank():.1f} of 24 directions." in page


def test_every_figure_has_bounds_that_hold_the_truth(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", GAUSSIAN)
    measures = report(tmp_path / "report.html", tmp_path / "rows.npy")[0]["subjects"][0]["measures"]
    truth = {"participation_ratio": 24, "effective_rank": 24, "total_variance": 1, "mean_cosine": 0, "std_ratio": 1}
    for name, value in truth.items():
        found = measures[name]
        assert found["lower"] * 0.98 - 0.002 <= value <= found["upper"] * 1.02 + 0.002, (name, found)


def test_rows_against_rows_are_judged_and_matched_by_name(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(3000)]
    order = np.random.default_rng(0).permutation(3000)
    alive = GAUSSIAN * 0.8 ** np.arange(24, dtype=np.float32)
    dead = alive.copy()
    dead[:, 6:] *= 1e-4
    pq.write_table(pa.table({"id": names, "embedding": list(alive)}), tmp_path / "before.parquet")
    pq.write_table(pa.table({"id": [names[i] for i in order], "v": list(dead[order])}), tmp_path / "after.parquet")
    pq.write_table(pa.table({"id": names, "v": list(GAUSSIAN)}), tmp_path / "same.parquet")
    done = run(tmp_path / "after.parquet", "--out", tmp_path / "x.html")
    assert done.exit_code == 1
    assert "its columns of float lists are v: --column" in done.stderr
    found, _ = report(tmp_path / "same.html", tmp_path / "same.parquet", tmp_path / "same.parquet", "--column", "v")
    assert found["comparison"]["overlap"]["10"]["estimate"] == 1
    np.save(tmp_path / "after.npy", dead[order])
    (tmp_path / "after.txt").write_text("\n".join(names[i] for i in order) + "\n")
    found, page = report(tmp_path / "pair.html", tmp_path / "after.npy", "--against", tmp_path / "before.parquet")
    assert found["subjects"][0]["verdict"]["state"] == "dimensional_collapse"
    assert 0 < found["comparison"]["overlap"]["10"]["estimate"] < 0.95  # the weaker half of the directions is gone
    assert "they are gone" in page
    window = SpectrumMonitor(24, Reference.build(alive[::2], alive[1::2]))
    with window:
        window.observe(dead)
        window.flush()
    snapshot = window.snapshot()
    said = judge_window(snapshot.windows[300.0], snapshot.reference)
    assert said.state == found["subjects"][0]["verdict"]["state"]


POINT = np.ones((600, 24), np.float32)
FEW = np.eye(2, 24, dtype=np.float32)


@pytest.mark.parametrize("rows", [POINT, FEW, np.concatenate((FEW[:1], np.zeros((2, 24), np.float32)))])
def test_rows_of_one_point_and_hardly_any_rows_get_their_page(tmp_path: Path, rows: np.ndarray) -> None:
    np.save(tmp_path / "rows.npy", rows)
    found, page = report(tmp_path / "report.html", tmp_path / "rows.npy")
    measures = found["subjects"][0]["measures"]
    assert measures.get("effective_rank") is None or measures["effective_rank"]["estimate"] in (0, None)
    assert "rows.npy" in page


def test_a_file_whose_name_is_no_unicode_gets_its_page(tmp_path: Path) -> None:
    rows = Path(os.fsdecode(os.fsencode(tmp_path) + b"/not\xffunicode.npy"))
    np.save(rows, FEW)
    _, page = report(tmp_path / "report.html", rows)
    assert r"not\udcffunicode.npy" in page


def test_rows_of_one_point_are_judged_and_judge_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "point.npy", POINT)
    np.save(tmp_path / "sound.npy", GAUSSIAN[:600])
    found, _ = report(tmp_path / "report.html", tmp_path / "point.npy", tmp_path / "sound.npy")
    assert found["subjects"][0]["verdict"]["state"] == "complete_collapse"
    found, page = report(tmp_path / "report.html", tmp_path / "sound.npy", tmp_path / "point.npy")
    assert found["subjects"][0]["verdict"]["state"] == "insufficient_data"
    assert "all rows at one point" in page


def test_rows_that_cannot_be_matched_are_still_measured(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", GAUSSIAN)
    np.save(tmp_path / "b.npy", GAUSSIAN[:2000])
    found, page = report(tmp_path / "report.html", tmp_path / "a.npy", tmp_path / "b.npy")
    assert found["comparison"] is None
    assert "cannot be matched" in page


def test_rows_are_judged_by_no_encoder_but_the_one_that_made_them(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    rows = torch.randn(300, load(encoders[0]).card.dimension, generator=torch.Generator().manual_seed(0)).tolist()
    own = load(encoders[0]).card.revision
    for revision, code in ((own, 0), ("0123456789ab", 1)):
        schema = pa.schema([("embedding", pa.list_(pa.float32()))], {"encoder": "sound", "revision": revision})
        pq.write_table(pa.table({"embedding": rows}, schema), tmp_path / "rows.parquet")
        page = tmp_path / f"{code}.html"
        done = run(tmp_path / "rows.parquet", "--against", encoders[0], "--out", page)
        assert done.exit_code == code, done.stderr
        assert page.exists() is (code == 0)
    assert f"holds rows of sound@0123456789ab, not of sound@{own}: give the encoder that made them" in done.stderr


def test_rows_are_judged_by_an_encoder(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    reference = load(encoders[0]).reference
    assert reference is not None
    rows = torch.randn(2000, 32, generator=torch.Generator().manual_seed(1)).double() * reference.eigenvalues.sqrt()
    np.save(tmp_path / "rows.npy", (rows @ reference.basis.T + reference.mean).numpy())
    found, _ = report(tmp_path / "report.html", tmp_path / "rows.npy", "--against", encoders[0])
    assert found["subjects"][0]["facts"]["judged by"] == "sound"
    assert found["subjects"][0]["verdict"]["state"] in ("healthy", "traffic_shifted", "traffic_narrowed")
    assert found["subjects"][0]["measures"]["head"]["estimate"] == pytest.approx(1, abs=0.3)


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """A server that answers /spectrum as the service does, from a real monitor; and other things badly."""
    with SpectrumMonitor(24, Reference.build(GAUSSIAN[::2], GAUSSIAN[1::2])) as monitor:
        monitor.observe(GAUSSIAN)
        monitor.flush()
        answer = json.dumps({"model": "gauss", "revision": "abc"} | monitor.snapshot().to_dict()).encode()
    pages = {"/spectrum": (200, answer), "/off/spectrum": (404, b'{"error": {"message": "the monitor is off"}}')}
    pages |= {"/html/spectrum": (200, b"<html>"), "/json/spectrum": (200, b"{}")}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = pages[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_running_service(service: str, tmp_path: Path) -> None:
    found, page = report(tmp_path / "report.html", service)
    (subject,) = found["subjects"]
    assert (subject["name"], subject["verdict"]["state"]) == ("gauss", "healthy")
    assert subject["measures"]["participation_ratio"]["estimate"] == pytest.approx(24, abs=0.5)
    assert "Healthy: the reference has" in page


@pytest.mark.parametrize(
    ("path", "message"),
    [("/off", "status 404. the monitor is off"), ("/html", "no JSON"), ("/json", "no spectrum")],
)
def test_a_service_that_answers_badly(service: str, tmp_path: Path, path: str, message: str) -> None:
    done = run(service + path, "--out", tmp_path / "report.html")
    assert done.exit_code == 1
    assert message in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def integers(folder: Path) -> Path:
    np.save(folder / "rows.npy", np.zeros((9, 9), int))
    return folder / "rows.npy"


def nothing_finite(folder: Path) -> Path:
    np.save(folder / "rows.npy", np.full((900, 9), np.nan, np.float32))
    return folder / "rows.npy"


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (integers, 1, "found int64"),
        (nothing_finite, 1, "none of its 900 rows is finite and not zero"),
        (lambda it: it, 1, "is empty: give an encoder's folder"),
        (lambda it: it / "nowhere", 1, "does not exist"),
        (lambda it: ROOT / "README.md", 1, "ends neither in .npy nor in .parquet"),
        (lambda it: f"http://127.0.0.1:{free_port()}", 1, "is the service running?"),
        (lambda it: "http://[", 1, "http://["),
    ],
)
def test_what_cannot_be_reported_is_named_and_nothing_is_written(
    tmp_path: Path, make: Any, code: int, message: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    done = run(make(tmp_path / "in"), "--out", tmp_path / "out" / "report.html")
    assert done.exit_code == code, done.output
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
    assert list((tmp_path / "out").iterdir()) == []


def test_a_page_that_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.html", "is not a folder")):
        done = run(integers(tmp_path), "--out", out)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())


def test_an_unlike_pair_is_refused(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(encoders[0], "--against", integers(tmp_path))
    assert done.exit_code == 2
    assert "encoder and rows cannot be compared" in " ".join(done.stderr.split())


PEAK = """
import re, sys
from pathlib import Path
from cli import app
from typer.testing import CliRunner

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

peaks = []
for file in sys.argv[1:]:
    done = CliRunner().invoke(app, ["report", file, "--out", file + ".html"])
    assert done.exit_code == 0, done.output
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    chunk = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)).numpy()
    small, large = tmp_path / f"small.{kind}", tmp_path / f"large.{kind}"
    for path, times in ((small, 4), (large, 100)):
        if kind == "npy":
            rows = np.lib.format.open_memmap(path, "w+", np.float32, (times * len(chunk), 64))
            for i in range(times):
                rows[i * len(chunk) : (i + 1) * len(chunk)] = chunk
            rows.flush()
            continue
        schema = pa.schema([("embedding", pa.list_(pa.float32(), 64))])
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            lists = pa.FixedSizeListArray.from_arrays(pa.array(chunk.reshape(-1)), 64)
            for _ in range(times):
                writer.write_table(pa.table({"embedding": lists}))
    grown = large.stat().st_size / 2**20
    assert grown > 120
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(large)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert float(done.stdout) < grown / 3, done.stdout
