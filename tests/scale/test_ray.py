"""Bulk embedding and serving on a real Ray cluster, which takes long to start: `make soak` runs this."""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

pytest.importorskip("ray", reason="pip install 'fullrank-server[ray]'")

from fullrank.fleet import BROKEN
from models.artifact import load
from models.embedder import Embedder, normalize
from scale import bulk, ray_bulk, sources
from tests.support.browser import chromium
from tests.support.encoders import write_encoder
from tests.support.images import as_files, encoded, pictures
from tests.support.ray_cluster import PATIENCE, RAY, ROOT, cluster, environment, named, wait_for
from tests.support.ray_faulty import broken
from tools.stack import free_port

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    write_encoder(root / "alpha", 2)
    write_encoder(root / "beta", 3)
    write_encoder(root / "collapsed", 1, dead=31)
    return root


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[tuple[str, Path]]:
    with cluster(cpus=4) as found:
        yield found


# ---- bulk


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index, picture in enumerate(pictures(120, 1)):
        (folder / f"{index:03d}.png").write_bytes(encoded(picture))
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def embed(*arguments: str, folder: Path, shard: int = 8) -> subprocess.Popen[str]:
    """`fullrank embed` in a process of its own, with small shards."""
    program = f"from scale import sources; sources.FILES_A_SHARD = {shard}; from cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, "embed", *arguments],
        cwd=ROOT,
        env=environment(folder, COLUMNS="200"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_cluster_writes_the_bytes_of_a_local_run_even_if_its_workers_are_killed(
    ray_cluster: tuple[str, Path], encoders: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = ray_cluster
    monkeypatch.setattr(sources, "FILES_A_SHARD", 8)
    local = tmp_path / "local"
    bulk.run_local(bulk.begin(local, encoders / "alpha", sources.shards(str(images))), encoders / "alpha", local)
    out = tmp_path / "out"
    arguments = [str(images), "--encoder", str(encoders / "alpha"), "--out", str(out), "--ray", address]
    run = embed(*arguments, "--processes", "2", folder=folder)
    wait_for(lambda: run.poll() is not None or len(list(out.glob("*.parquet"))) >= 3)
    for worker in named(folder, "ray::Embedder"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    printed, complaints = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, complaints
    assert "121" in printed
    assert contents(out) == contents(local)
    # What is complete is skipped; what is missing is done again.
    victim = next(out.glob("*.parquet"))
    victim.unlink()
    again = embed(*arguments, folder=folder)
    _, complaints = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, complaints
    assert complaints.count("images, shard") + complaints.count("bad, shard") == 1
    assert contents(out) == contents(local)


def test_an_address_that_does_not_answer_ends_with_a_remedy(encoders: Path, images: Path, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{port}", f"127.0.0.1:{port}"):
            arguments = [str(images), "--encoder", str(encoders / "alpha"), "--out", str(tmp_path / "out")]
            run = embed(*arguments, "--ray", address, folder=tmp_path)
            _, complaints = run.communicate(timeout=PATIENCE)
            assert run.returncode == 1
            assert f"no Ray cluster at {address}" in complaints
            assert "ray start --head" in complaints


@pytest.mark.parametrize("address", ["nowhere", "host:", "host:port", "ray://"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(bulk.BulkError, match="expected HOST:PORT"), ray_bulk.connected(address):
        pass


# ---- serving


def test_a_collector_that_hears_nothing_ends_itself(ray_cluster: tuple[str, Path]) -> None:
    address, folder = ray_cluster
    program = f"""
import time
import ray
from scale.ray_actors import CollectorActor
from scale.reports import Report
ray.init({address!r}, namespace="fullrank", log_to_driver=False)
options = {{"name": "silent", "lifetime": "detached", "num_cpus": 0}}
collector = ray.remote(CollectorActor).options(**options).remote(leave=1.0)
ray.get(collector.push.remote(Report("one", [], [])))
while "silent" in ray.util.list_named_actors():
    time.sleep(0.1)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment(folder), timeout=PATIENCE)


ARGUMENTS = {
    "min_replicas": 2,
    "max_replicas": 3,
    "pending_images": 100,
    "upscale_delay": 1,
    "downscale_delay": 3600,
    "cpus": 0.5,
    "period": 0.5,
}


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def configuration(encoders: Path) -> dict[str, Any]:
    """The application: the shipped one, with small encoders and one replica that can be made to collapse."""
    (application,) = yaml.safe_load((ROOT / "deploy" / "ray" / "fullrank.yaml").read_text())["applications"]
    watched = {"monitor_rate": "inf", "block_rows": 32, "request_timeout": PATIENCE, "canary_period": 1}
    settings = {"encoder": str(encoders / "alpha"), "encoders_dir": str(encoders), **watched}
    application["args"] = ARGUMENTS | {"settings": settings}
    application["import_path"] = "tests.support.ray_faulty:app"
    return dict(application)


@pytest.fixture(scope="module")
def serving(
    ray_cluster: tuple[str, Path], configuration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Two replicas that `serve run` starts."""
    address, folder = ray_cluster
    options = {"host": "0.0.0.0", "port": port, "request_timeout_s": PATIENCE}
    file = tmp_path_factory.mktemp("serve") / "fullrank.yaml"
    file.write_text(yaml.safe_dump({"http_options": options, "applications": [configuration]}))
    log = file.with_name("log")
    with log.open("w") as output:
        command = [str(RAY.with_name("serve")), "run", "--address", address, str(file)]
        run = subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=output, stderr=output)
    try:
        wait_for(lambda: run.poll() is not None or answers(f"http://127.0.0.1:{port}/readyz"))
        assert run.poll() is None, log.read_text()[-3000:]
        yield run
    finally:
        run.send_signal(signal.SIGINT)
        try:
            run.wait(120)
        except subprocess.TimeoutExpired:
            run.kill()


@pytest.fixture(scope="module")
def fleet(serving: subprocess.Popen[bytes], port: int) -> str:
    """The URL of the replicas."""
    return f"http://127.0.0.1:{port}"


def test_two_replicas_are_one_service(fleet: str, encoders: Path) -> None:
    images = pictures(64, 5)
    answer = post(fleet, images).json()
    expected = normalize(Embedder(load(encoders / "alpha")).embed(images[:, None])).tolist()
    for mine, his in zip(answer["embeddings"], expected, strict=True):
        assert mine == pytest.approx(his, abs=1e-4)
    for seed in range(20):
        post(fleet, pictures(64, 100 + seed))
    wait_for(lambda: total(fleet, "fullrank_images_total") == 21 * 64)
    wait_for(lambda: sum(it["windows"]["300"]["rows"] for it in spectrum(fleet)["fleets"]) >= 21 * 64 - 2 * 32)
    found = spectrum(fleet)
    assert [it["replicas"] for it in found["fleets"]] == [2]
    assert len({it["instance"] for it in found["replicas"]}) == 2
    wait_for(lambda: spectrum(fleet)["fleets"][0]["verdict"]["state"] == "healthy")
    assert found["problems"] == []
    assert get(fleet, "/spectrum").json()["model"] == "alpha"
    assert get(fleet, "/moments").status_code == 200  # over loopback


def test_a_client_that_is_not_local_is_not_taken_for_one_behind_the_proxy(fleet: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks which address would be used
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = probe.getsockname()[0]
    url = fleet.replace("127.0.0.1", address)
    assert get(url, "/healthz").status_code == 200
    assert get(url, "/moments").status_code == 403
    answer = httpx.get(f"{url}/moments", headers={"Host": "localhost"}, timeout=PATIENCE)
    assert answer.status_code == 403


def test_the_replica_that_collapses_alone_is_named(fleet: str, ray_cluster: tuple[str, Path]) -> None:
    """By the scrape, by /spectrum?fleet=1, and on the page."""
    sick, well = sorted({it["instance"] for it in spectrum(fleet)["replicas"]})
    file = broken(ray_cluster[1])

    def problems() -> list[str]:
        found: list[str] = spectrum(fleet)["problems"]
        return found

    file.write_text(sick)
    try:
        # The replica says so with its next report. The collector surveys all replicas now and then.
        wait_for(lambda: any(f"{sick} stands out alone among 2 replicas of alpha@" in it for it in problems()))
        assert states(fleet)[sick] in BROKEN
        assert states(fleet)[well] not in BROKEN  # whether it had rows enough to be healthy is up to Ray
        assert not [it for it in problems() if it.startswith(well)]
        metrics = get(fleet, "/metrics").text
        for replica, value in ((sick, "1.0"), (well, "0.0")):
            assert re.search(f'^fullrank_fleet_outlier{{instance="{replica}",.*}} {value}$', metrics, re.MULTILINE)
        with chromium() as browser:
            page = browser.new_page()
            page.set_default_timeout(1000 * PATIENCE)
            page.goto(fleet)
            page.locator("#problems li", has_text=f"{sick} stands out alone among 2 replicas").wait_for()
            row = page.locator("#fleet tr").filter(has=page.get_by_role("rowheader", name=sick))
            assert row.locator("td b.bad").count() == 1
            row = page.locator("#fleet tr").filter(has=page.get_by_role("rowheader", name=well))
            assert row.count() == 1
            assert row.locator("td b.bad").count() == 0
    finally:
        file.unlink()
    wait_for(lambda: states(fleet)[sick] not in BROKEN)


def test_a_swap_reaches_every_replica_and_a_collapsed_encoder_none(fleet: str) -> None:
    refused = admin(fleet, "collapsed")
    assert refused.status_code == 409, refused.text
    assert {it["model"] for it in spectrum(fleet)["replicas"]} == {"alpha"}
    swapped = admin(fleet, "beta")
    assert swapped.status_code == 200, swapped.text
    found = spectrum(fleet)
    assert [it["model"] for it in found["replicas"]] == ["beta", "beta"]
    missing = admin(fleet, "none")
    assert missing.status_code == 404


def test_killing_a_replica_under_load_loses_no_request_and_no_count(fleet: str, ray_cluster: tuple[str, Path]) -> None:
    """The replica that takes its place serves what the others were swapped to."""
    _, folder = ray_cluster
    before = {it["instance"] for it in spectrum(fleet)["replicas"]}
    stop = threading.Event()
    asked = 0

    def load_it(seed: int) -> int:
        answered = 0
        while not stop.is_set():
            post(fleet, pictures(8, seed))
            answered += 1
        return answered

    counts = [total(fleet, "fullrank_images_total")]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(load_it, seed) for seed in range(4)]
        wait_for(lambda: total(fleet, "fullrank_images_total") > counts[0] + 64)
        os.kill(named(folder, "ServeReplica:fullrank")[0], signal.SIGKILL)

        def replaced() -> bool:
            counts.append(total(fleet, "fullrank_images_total"))
            now = {it["instance"] for it in spectrum(fleet)["replicas"]}
            return len(now) == 2 and now != before

        wait_for(replaced)
        stop.set()
        asked = sum(it.result() for it in clients)
    assert asked > 0
    assert counts == sorted(counts)
    assert total(fleet, "fullrank_fleet_lost_replicas_total") == 1
    assert {it["model"] for it in spectrum(fleet)["replicas"]} == {"beta"}


def test_pending_images_start_another_replica(fleet: str) -> None:
    slow = slow_images()
    grown = threading.Event()

    def load_it() -> None:
        while not grown.is_set():
            answer = httpx.post(fleet + "/embed", files=as_files(slow), timeout=PATIENCE)
            assert answer.status_code in (200, 429, 504), answer.text

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(load_it) for _ in range(8)]
        try:
            wait_for(lambda: len({it["instance"] for it in spectrum(fleet)["replicas"]}) == 3)
        finally:
            grown.set()
        for it in clients:
            it.result()


def test_an_update_to_fewer_replicas_answers_what_the_others_had_taken(
    fleet: str, serving: subprocess.Popen[bytes], ray_cluster: tuple[str, Path], configuration: dict[str, Any]
) -> None:
    """Counters go on, and so does the swap: the settings are the same."""
    before = set(pending(fleet))
    assert len(before) == 3
    counts = [total(fleet, "fullrank_images_total")]
    arguments = configuration["args"] | {"min_replicas": 1, "max_replicas": 1}
    program = f"""
from scale.serve import Arguments
from tests.support.ray_faulty import app
serve.run(app(Arguments(**{arguments!r})), name="fullrank", route_prefix="/")
"""

    def updated() -> bool:
        counts.append(total(fleet, "fullrank_images_total"))
        return len(pending(fleet)) == 1 and before.isdisjoint(pending(fleet))

    answered = answers_while(fleet, ray_cluster, program, updated)
    counts.append(total(fleet, "fullrank_images_total"))
    assert counts == sorted(counts)
    assert counts[-1] == counts[0] + answered
    assert {it["model"] for it in spectrum(fleet)["replicas"]} == {"beta"}


def test_a_deleted_application_answers_what_it_had_taken(
    fleet: str, serving: subprocess.Popen[bytes], ray_cluster: tuple[str, Path]
) -> None:
    """The last test: it ends the fleet."""

    def gone() -> bool:
        return httpx.get(f"{fleet}/healthz", timeout=PATIENCE).status_code == 404

    answers_while(fleet, ray_cluster, "serve.delete('fullrank')", gone)
    serving.send_signal(signal.SIGINT)
    assert serving.wait(PATIENCE) == 0


# ---- helpers


def answers_while(fleet: str, ray_cluster: tuple[str, Path], program: str, done: Callable[[], bool]) -> int:
    """Keep every replica busy, run a program that stops some, and see each request answered. Returns the images."""
    address, folder = ray_cluster
    script = f"import ray; ray.init({address!r}); from ray import serve; serve.status(); print('ready'); input(); "
    command = [sys.executable, "-c", script.replace("; ", "\n") + program]
    slow = slow_images()[:16]
    asked: list[concurrent.futures.Future[httpx.Response]] = []
    with (
        subprocess.Popen(
            command, cwd=ROOT, env=environment(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as operator,
        concurrent.futures.ThreadPoolExecutor(16) as pool,
    ):
        assert operator.stdin is not None
        assert operator.stdout is not None
        assert any("ready" in line for line in operator.stdout), "the operator's program ended"

        def all_are_busy() -> bool:
            if len(asked) < 16:
                asked.append(pool.submit(httpx.post, fleet + "/embed", files=as_files(slow), timeout=PATIENCE))
            return all(pending(fleet).values())

        wait_for(all_are_busy)
        operator.stdin.write("\n")
        operator.stdin.flush()
        wait_for(done)
        assert [it.result().status_code for it in asked] == [200] * len(asked)
        operator.communicate(timeout=PATIENCE)
    return len(asked) * len(slow)


def pending(url: str) -> dict[str, float]:
    """Images that each replica has admitted and not answered."""
    found = re.findall(r'^fullrank_pending_images{instance="(.*)"} (.*)$', get(url, "/metrics").text, re.MULTILINE)
    return {replica: float(value) for replica, value in found}


def states(url: str) -> dict[str, str]:
    """Each replica's verdict."""
    return {it["instance"]: it["verdict"]["state"] for it in spectrum(url)["replicas"]}


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=30).status_code == 200
    return False


def get(url: str, path: str) -> httpx.Response:
    return httpx.get(url + path, timeout=PATIENCE)


def post(url: str, images: Any) -> httpx.Response:
    """Embed, and send the request again as a client has to where a replica died: each is answered in the end."""
    for _ in range(20):
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.post(url + "/embed", files=as_files([encoded(it) for it in images]), timeout=PATIENCE)
            if answer.status_code == 200:
                return answer
        time.sleep(0.5)
    raise AssertionError("a request was never answered")


def admin(url: str, name: str) -> httpx.Response:
    return httpx.post(url + "/admin/encoders", json={"name": name}, timeout=PATIENCE)


def spectrum(url: str) -> dict[str, Any]:
    answer = get(url, "/spectrum?fleet=1")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def total(url: str, name: str) -> float:
    """A series without labels of the fleet's scrape."""
    answer = get(url, "/metrics")
    assert answer.status_code == 200, answer.text
    return next(float(line.split()[1]) for line in answer.text.splitlines() if line.startswith(name + " "))


def slow_images() -> list[bytes]:
    """Files that are small and take long to decode."""
    return [encoded(Image.new("L", (3900, 3900), shade)) for shade in range(8)] * 4
