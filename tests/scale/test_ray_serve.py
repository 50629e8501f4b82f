"""Serving on a real Ray cluster, which takes long to start: `make soak` runs this. The tests follow one another."""

import concurrent.futures
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytest.importorskip("ray", reason="pip install 'fullrank-server[ray]'")

from fullrank.fleet import BROKEN
from models.artifact import load
from models.embedder import Embedder, normalize
from tests.support.browser import chromium
from tests.support.encoders import write_encoder
from tests.support.images import as_files, pictures
from tests.support.ray_cluster import PATIENCE, RAY, ROOT, cluster, environment, named, wait_for
from tests.support.ray_faulty import broken
from tests.support.ray_fleet import (
    admin,
    answers,
    answers_while,
    get,
    pending,
    post,
    sample,
    slow_images,
    spectrum,
    states,
    total,
    wait_for_reports,
)
from tools.stack import free_port

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    write_encoder(root / "alpha", 2)
    write_encoder(root / "beta", 3)
    write_encoder(root / "collapsed", 5, dead=30)
    return root


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[tuple[str, Path]]:
    with cluster(cpus=4, gpus=1) as found:
        yield found


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
    "gpus": 0.25,  # three replicas share the one
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


def test_a_collector_that_is_killed_goes_on_where_it_was(fleet: str, ray_cluster: tuple[str, Path]) -> None:
    """With the counts of the replica that was killed before. A scrape meanwhile says in words what is missing."""
    _, folder = ray_cluster
    replicas = set(pending(fleet))
    names = ("fullrank_images_total", "fullrank_fleet_lost_replicas_total")
    before = [total(fleet, name) for name in names]
    (collector,) = named(folder, "ray::CollectorActor")
    os.kill(collector, signal.SIGKILL)

    def replaced() -> bool:
        answer = get(fleet, "/metrics")
        if answer.status_code == 200:
            assert [sample(answer.text, name) for name in names] == before
        else:
            assert answer.status_code == 503
            assert "the collector of the fleet" in answer.text
        return set(named(folder, "ray::CollectorActor")) not in (set(), {collector})

    wait_for(replaced)
    wait_for(lambda: get(fleet, "/metrics").status_code == 200)
    assert set(pending(fleet)) == replicas
    assert [total(fleet, name) for name in names] == before
    post(fleet, pictures(64, 77))
    wait_for(lambda: total(fleet, names[0]) == before[0] + 64)


def test_no_counter_falls_when_a_replica_is_killed_together_with_the_collector(
    fleet: str, ray_cluster: tuple[str, Path]
) -> None:
    """As both are if their node is lost, and whichever replica answered the last scrape."""
    _, folder = ray_cluster
    before = {it["instance"] for it in spectrum(fleet)["replicas"]}
    names = ("fullrank_images_total", "fullrank_fleet_lost_replicas_total")
    shown = [[total(fleet, name) for name in names]]
    for process in [*named(folder, "ray::CollectorActor"), named(folder, "ServeReplica:fullrank")[0]]:
        os.kill(process, signal.SIGKILL)

    def replaced() -> bool:
        answer = get(fleet, "/metrics")
        if answer.status_code != 200:
            return False
        shown.append([sample(answer.text, name) for name in names])
        now = {it["instance"] for it in spectrum(fleet)["replicas"]}
        return len(now) == 2 and now != before

    wait_for(replaced)
    for counts in zip(*shown, strict=True):
        assert list(counts) == sorted(counts)
    assert shown[-1][1] == shown[0][1] + 1


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
    wait_for_reports(fleet)
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
