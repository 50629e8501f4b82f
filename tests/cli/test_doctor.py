"""fullrank doctor: what it finds on a machine that can serve, and on ones that cannot."""

import http.server
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli import app
from cli.doctor import Finding, scraped
from models.artifact import load, save
from service.settings import PRETRAINED
from tools.stack import free_port, prometheus

Findings = dict[str, tuple[str, str]]


def examine(*arguments: object) -> tuple[int, Findings]:
    """The exit code, and check -> state and words."""
    done = CliRunner().invoke(app, ["doctor", "--json", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, {it["check"]: (it["state"], it["says"]) for it in json.loads(done.stdout)}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLRANK_PORT", str(free_port()))
    monkeypatch.setenv("FULLRANK_THREADS", "1")


def test_a_machine_that_can_serve(small_artifact: Path) -> None:
    code, found = examine("--encoder", small_artifact)
    assert code == 0, found
    assert {found[it][0] for it in ("versions", "device", "threads", "port", "encoder", "engine", "speed")} == {"ok"}
    assert "is free" in found["port"][1]


def test_bfloat16_is_named_tried_and_refused_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FULLRANK_DTYPE", "bfloat16")
    monkeypatch.setattr("models.processor.cpu_instructions", lambda: {"avx2"})
    code, found = examine("--encoder", PRETRAINED / "cifar10-directclr")
    assert code == 0, found
    assert found["engine"] == ("ok", "the torch engine, bfloat16 on cpu")
    assert found["device"][0] == "note"
    assert "FULLRANK_DTYPE=float32 is faster here" in found["device"][1]
    monkeypatch.setattr("models.engines.PARITY_COSINE", 0.9999999)
    code, found = examine("--encoder", PRETRAINED / "cifar10-directclr")
    assert code == 1
    assert "in bfloat16 have cosine 0.9999" in found["encoder"][1]


def test_a_taken_port_a_bad_folder_and_too_many_threads(
    small_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("FULLRANK_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("FULLRANK_STATE_DIR", str(tmp_path / "file" / "state"))
        monkeypatch.setenv("FULLRANK_THREADS", "512")
        code, found = examine("--encoder", small_artifact)
    assert code == 1
    assert found["port"][0] == found["state_dir"][0] == "fail"
    assert found["threads"][0] == "note"
    assert "FULLRANK_THREADS=" in found["threads"][1]


def test_threads_are_held_to_a_containers_quota(
    small_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setattr("service.settings.CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("FULLRANK_THREADS", "4")
    _, found = examine("--encoder", small_artifact)
    assert found["threads"][0] == "note"
    assert "on 2 cores: threads would wait for each other; FULLRANK_THREADS=2" in found["threads"][1]


def test_a_setting_and_an_encoder_that_are_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, found = examine("--encoder", tmp_path / "nowhere[1]")
    assert code == 1
    assert "nowhere[1] is not a folder" in found["encoder"][1]
    monkeypatch.setenv("FULLRANK_PORT", "many")
    code, found = examine()
    assert code == 1
    assert found["settings"][1].startswith("port: ")


def test_a_reference_of_too_few_rows_is_told(small_artifact: Path, tmp_path: Path) -> None:
    artifact = load(small_artifact)
    assert artifact.reference is not None
    save(replace(artifact, reference=replace(artifact.reference, basis_rows=20)), tmp_path / "few")
    code, found = examine("--encoder", tmp_path / "few")
    assert (code, found["reference"][0]) == (0, "note")
    assert "the reference was measured on 20 and " in found["reference"][1]


def test_an_address_of_prometheus_that_is_none(small_artifact: Path) -> None:
    code, found = examine("--encoder", small_artifact, "--prometheus", "http://127.0.0.1:90a")
    assert (code, found["prometheus"]) == (1, ("fail", "http://127.0.0.1:90a: Invalid port: '90a'"))


@pytest.mark.parametrize("answer", [b"[]", b'{"data": null}', b'{"data": {"result": [{}], "groups": []}}', b"<html>"])
def test_an_address_of_something_else(answer: bytes) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        said = f"{url}: its answers are not those of a Prometheus; is this its address?"
        assert scraped(url) == Finding("prometheus", "fail", said)
        server.shutdown()


def test_it_asks_a_real_prometheus(tool: Callable[[str], str], small_artifact: Path, tmp_path: Path) -> None:
    tool("prometheus")
    code, found = examine("--encoder", small_artifact, "--prometheus", f"http://127.0.0.1:{free_port()}")
    assert (code, found["prometheus"][0]) == (1, "fail")
    with prometheus(tmp_path, []) as server:
        code, found = examine("--encoder", small_artifact, "--prometheus", f"{server.url}/")
    assert (code, found["prometheus"][0]) == (0, "note")
    assert "scrapes no replica" in found["prometheus"][1]
