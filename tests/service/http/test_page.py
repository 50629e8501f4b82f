"""The live page in a real browser, over a real service, in each of its states. Nothing here is timed.

With SCREENSHOTS=DIR in the environment each state is also saved as a picture.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from service.http.app import Server
from service.settings import Settings
from tests.support.browser import chromium
from tests.support.images import as_files, encoded, pictures
from tests.support.process import get, running, until

WAIT = 120_000.0
expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as it:
        yield it


def embed(url: str, count: int, seed: int = 20) -> None:
    images = [encoded(picture) for picture in pictures(count, seed)]
    for i in range(0, count, 64):
        assert httpx.post(f"{url}/embed", files=as_files(images[i : i + 64])).status_code == 200


@pytest.fixture(scope="module")
def healthy(settings: Callable[..., Settings]) -> Iterator[tuple[str, Server]]:
    """A service with healthy traffic, beside an encoder that had none and a model that is observed."""
    with running(settings(encoders="beta", block_rows=64, max_body_bytes=2**20)) as (url, server):
        embed(url, 640)
        rows = np.random.default_rng(0).normal(size=(40, 16)).tolist()
        assert httpx.post(f"{url}/observe", json={"model": "theirs", "rows": rows}).status_code == 202
        until(lambda: get(f"{url}/spectrum").json()["verdict"]["state"] == "healthy")
        yield url, server


@contextmanager
def opened(browser: Browser, url: str, width: int = 1280, scheme: Any = "light", **hooks: Any) -> Iterator[Page]:
    """The page, which must log no error and break no policy."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(WAIT)
    page = context.new_page()
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda it: said.append(it.text) if "Content Security Policy" in it.text else None)
    for pattern, answer in hooks.items():
        page.route(re.compile(pattern), answer)
    page.goto(url)
    try:
        yield page
        assert said == []
    finally:
        context.close()


def keep(page: Page, name: str) -> None:
    """Save a picture of the whole page, if asked for."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(500)
        page.screenshot(path=Path(folder, f"{name}.png"), full_page=True)


def answering(document: dict[str, Any], other: dict[str, Any] | None = None) -> Callable[[Route], None]:
    """Answers /history with this document and whatever else with the other; no events, so that the page asks again
    every two seconds."""

    def answer(route: Route) -> None:
        asked = route.request.url
        if "/events" in asked:
            route.fulfill(status=429)
        else:
            route.fulfill(json=document if "/history" in asked else other)

    return answer


def heading(page: Page) -> Any:
    return page.locator("#state")


def tile(page: Page, name: str) -> Any:
    return page.locator(f'[data-tile="{name}"]')


def test_healthy(browser: Browser, healthy: tuple[str, Server]) -> None:
    url, server = healthy
    with opened(browser, url) as page:
        expect(heading(page)).to_have_text("healthy")
        expect(page.locator("#link")).to_have_text("live")
        spectrum = get(f"{url}/spectrum").json()
        rank = spectrum["windows"]["300"]["effective_rank"]
        expect(tile(page, "Effective rank").locator(".value")).to_have_text(f"{rank:.3g}")
        expect(tile(page, "Effective rank")).to_have_class(re.compile("good"))
        expect(tile(page, "Canary angle")).to_contain_text("°")
        expect(tile(page, "Duplicates").locator(".value")).to_have_text(re.compile("not measured|%"))
        assert page.locator("#spectrum canvas").count() == page.locator("#bands canvas").count() == 1
        keep(page, "healthy")
        # Text beside each picture says what it shows.
        assert page.locator("#bands").get_attribute("aria-label").startswith("Energy in directions")  # type: ignore[union-attr]
        # Three models are listed, each with its verdict; the keyboard alone chooses another.
        names = page.locator("#list button b")
        expect(names).to_have_text(["alpha", "beta", "theirs"])
        page.locator("#list button").first.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        expect(page.locator("#identity")).to_contain_text("beta")
        expect(heading(page)).to_have_text("not enough data yet")
        expect(tile(page, "Effective rank").locator(".value")).to_have_text("not measured")
        # Of a window without rows no threshold is said, nor how they came.
        expect(tile(page, "Shift of the mean")).to_contain_text("of the reference's variance; too few rows")
        expect(tile(page, "Inputs")).to_contain_text("no rows yet")
        assert page.url.endswith("#model=beta&window=300")
        keep(page, "empty")
        until(lambda: server.service.listeners.count == 1)  # one stream, also after the change


def test_an_image_that_is_dropped_is_embedded(browser: Browser, healthy: tuple[str, Server], tmp_path: Path) -> None:
    url, _ = healthy
    with opened(browser, url) as page:
        expect(heading(page)).to_have_text("healthy")
        name = "it's <b>bold.png"
        image = encoded(pictures(1, 77)[0])
        page.locator("#file").set_input_files({"name": name, "mimeType": "image/png", "buffer": image})
        expect(page.locator("#result figure")).to_have_count(9)  # the image, and eight neighbours
        assert page.locator("#result b").count() == 0
        keep(page, "dropped")
        expect(page.locator("#result")).to_contain_text("32 numbers from alpha@")
        expect(page.locator("#result")).to_contain_text("forward")
        command = page.locator("#result pre").text_content() or ""
        (tmp_path / name).write_bytes(image)
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert len(json.loads(done.stdout)["embeddings"][0]) == 32  # the command that it shows does the same

        page.locator("#file").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"hello, world"})
        expect(page.locator("#result .fault")).to_contain_text("text/plain")
        large = {"name": "large.png", "mimeType": "image/png", "buffer": b"\0" * 2**21}
        page.locator("#file").set_input_files(large)
        expect(page.locator("#result .fault")).to_contain_text("2 MiB; this service takes 1 MiB")
        broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"\0" * 1000}
        page.locator("#file").set_input_files(broken)
        expect(page.locator("#result .fault")).not_to_contain_text("MiB")


def test_a_key_is_asked_for(browser: Browser, settings: Callable[..., Settings]) -> None:
    with running(settings(api_key="the-right-key")) as (url, _), opened(browser, url) as page:
        image = {"name": "a.png", "mimeType": "image/png", "buffer": encoded(pictures(1, 77)[0])}
        page.locator("#file").set_input_files(image)
        expect(page.locator("#result .fault")).to_contain_text("needs the service's key")
        for key in ("wrong-key-0", "the-right-key"):
            page.locator("#key").fill(key)
            page.keyboard.press("Enter")
            if key.startswith("wrong"):
                expect(page.locator("#keys")).to_be_visible()
                expect(page.locator("#result .fault")).to_contain_text("needs the service's key")
        expect(page.locator("#result figure")).to_have_count(9)
        assert "the-right-key" not in page.content()


def test_a_collapse_and_the_swap_that_brought_it(browser: Browser, settings: Callable[..., Settings]) -> None:
    with running(settings(block_rows=64, gate="warn", windows="20,300")) as (url, server):
        until(lambda: server.service.history.latest > 0)
        assert httpx.post(f"{url}/admin/encoders", json={"name": "collapsed"}, timeout=120).status_code == 200
        with opened(browser, url) as page:
            for seed in range(100):
                embed(url, 512, seed)
                if "collapse" in (heading(page).text_content() or ""):
                    break
            expect(heading(page)).to_have_text(re.compile("collapse"))
            expect(page.locator("#verdict")).to_have_class(re.compile("bad"))
            expect(page.locator("#reason a")).to_have_attribute("href", re.compile("runbooks/Embedding"))
            expect(page.locator("#list em").first).to_have_text(re.compile("collapse"))
            expect(page.locator("#events")).to_contain_text("swap")
            for name in ("Effective rank", "Participation ratio", "Total variance"):
                expect(tile(page, name)).not_to_have_class(re.compile("good"))
            keep(page, "collapsed")


def test_no_tile_that_an_alarm_is_about_is_green(browser: Browser, healthy: tuple[str, Server]) -> None:
    """One beyond its threshold is in the alarm's colour, though its bounds are wide; one within it has no colour."""
    url, _ = healthy
    spectrum, document = get(f"{url}/spectrum").json(), get(f"{url}/history").json()
    low, high = spectrum["thresholds"]["participation_ratio"], spectrum["reference"]["participation_ratio"]
    entry = next(it for it in document["encoders"] if it["model"] == spectrum["model"])
    wide = {"lower": 1.0, "estimate": 0.9 * low, "upper": 2 * high}
    kept = {"lower": high - 1, "estimate": high, "upper": high + 1}
    spread = ("Effective rank", "Participation ratio", "Total variance")
    windows = spectrum["windows"]
    cases: list[tuple[str, dict[str, Any], dict[str, str]]] = [
        (
            "complete_collapse",
            {"effective_rank": 1.2, "participation_ratio": wide, "total_variance": 1e-9},
            dict.fromkeys(spread, "bad"),
        ),
        (
            "dimensional_collapse",
            {"effective_rank": 1.2, "participation_ratio": kept},
            {"Effective rank": "bad", "Participation ratio": "", "Total variance": ""},
        ),
        ("traffic_shifted", {"participation_ratio": kept}, {"Shift of the mean": "", "Participation ratio": "good"}),
        ("model_fault", {"participation_ratio": kept}, {"Canary angle": "", "Participation ratio": "good"}),
    ]

    with opened(browser, url, **{r":\d+/(events|history|spectrum)(\?|$)": answering(document, spectrum)}) as page:
        for state, figures, tones in cases:
            spectrum["verdict"] = {"state": state, "reason": "said here"}
            spectrum["windows"] = {key: window | figures for key, window in windows.items()}
            entry |= spectrum["verdict"]
            expect(heading(page)).to_have_text(state.replace("_", " "))
            for name, tone in tones.items():
                expect(tile(page, name)).to_have_class(re.compile(f"^card tile ?{tone}$"))
            if "collapse" in state:
                keep(page, state)
                page.set_viewport_size({"width": 390, "height": 844})
                keep(page, f"{state}-phone")
                page.set_viewport_size({"width": 1280, "height": 900})


def test_the_tile_of_inputs_shows_what_is_beyond_its_threshold(browser: Browser, healthy: tuple[str, Server]) -> None:
    url, _ = healthy
    spectrum, document = get(f"{url}/spectrum").json(), get(f"{url}/history").json()
    alike, unlike = "distance of the images from the reference's", "shift of their textures"
    cases: list[tuple[tuple[float | None, ...], str, str, str]] = [
        ((0.2, None, 0.4, None), "0.2", "good", f"{alike}, unusual above 0.4"),
        ((0.2, 0.3, 0.4, 0.1), "0.3", "watch", f"{unlike}, unusual above 0.1; {alike} 0.2, unusual above 0.4"),
        ((0.5, 0.05, 0.4, 0.1), "0.5", "watch", f"{alike}, unusual above 0.4; {unlike} 0.05, unusual above 0.1"),
        ((0.2, 0.3, None, None), "0.2", "", f"{alike}; {unlike} 0.3"),
    ]

    with opened(browser, url, **{r":\d+/(events|history|spectrum)(\?|$)": answering(document, spectrum)}) as page:
        for (distance, texture, far, rough), value, tone, note in cases:
            spectrum["inputs"] = {"distance": distance, "texture_shift": texture}
            spectrum["thresholds"] |= {"input_distance": far, "texture_shift": rough}
            expect(tile(page, "Inputs").locator(".value")).to_have_text(value)
            expect(tile(page, "Inputs")).to_contain_text(note)
            expect(tile(page, "Inputs")).to_have_class(re.compile(f"^card tile ?{tone}$"))


def test_images_left_out_of_the_sample_are_said(browser: Browser, healthy: tuple[str, Server]) -> None:
    url, _ = healthy
    spectrum, document = get(f"{url}/spectrum").json(), get(f"{url}/history").json()
    with opened(browser, url, **{r":\d+/(events|history|spectrum)(\?|$)": answering(document, spectrum)}) as page:
        for unsampled, said in (
            (0, "; none dropped since"),
            (384, "; none dropped and 384 left out at random, beyond"),
        ):
            spectrum["counters"]["unsampled"] = unsampled
            expect(tile(page, "Rows")).to_contain_text(said)


def test_loading_and_unreachable(browser: Browser, healthy: tuple[str, Server]) -> None:
    url, _ = healthy
    document = get(f"{url}/history").json()
    nothing = {"encoders": [], "model": None, "history": None, "phase": "starting", "fault": "the service is starting"}

    with opened(browser, url, **{"/(events|history)": answering(document | nothing)}) as page:
        expect(heading(page)).to_have_text("loading")
        expect(page.locator("#figures")).to_be_hidden()
        keep(page, "loading")
    with opened(browser, url, **{r":\d+/(events|history|spectrum)": lambda route: route.abort()}) as page:
        expect(heading(page)).to_have_text("no answer")
        expect(page.locator("#reason")).to_contain_text("trying again")
        keep(page, "unreachable")
    with opened(browser, f"{url}/#model=nobody") as page:
        expect(heading(page)).to_have_text("not watched")
        page.get_by_role("button", name="show the default encoder").click()
        expect(heading(page)).to_have_text("healthy")


def test_where_no_stream_is_to_be_had_it_polls(browser: Browser, healthy: tuple[str, Server]) -> None:
    url, _ = healthy
    with opened(browser, url, **{"/events": lambda route: route.fulfill(status=429)}) as page:
        expect(page.locator("#link")).to_have_text("polling")
        expect(heading(page)).to_have_text("healthy")
        expect(tile(page, "Effective rank")).to_have_class(re.compile("good"))


def test_stale_figures_are_said_to_be_and_a_restart_is_survived(
    browser: Browser, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    kept = settings(block_rows=64, state_dir=tmp_path)
    with running(kept) as (url, _):
        embed(url, 640)
        until(lambda: get(f"{url}/spectrum").json()["verdict"]["state"] == "healthy")
        port = int(url.rsplit(":", 1)[1])
        manager = opened(browser, url)
        page = manager.__enter__()
        expect(heading(page)).to_have_text("healthy")
    expect(heading(page)).to_have_text("no answer")
    expect(page.locator("#reason")).to_contain_text("when it was healthy")
    expect(page.locator("body")).to_have_class("old")
    expect(tile(page, "Effective rank").locator(".value")).to_be_visible()  # the last figures stay
    keep(page, "stale")
    with running(kept, port):
        expect(heading(page)).to_have_text("healthy")
        expect(page.locator("body")).not_to_have_class("old")
        manager.__exit__(None, None, None)


def luminance(colour: str) -> float:
    """Relative luminance of rgb(r, g, b), by WCAG 2.2."""
    parts = [int(it) / 255 for it in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (it / 12.92 if it <= 0.04045 else ((it + 0.055) / 1.055) ** 2.4 for it in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


CONTRAST = """() => [...document.querySelectorAll("h1,h2,h3,p,a,b,em,small,span,td,th,.value,button,code")]
  .filter((it) => it.checkVisibility() && it.textContent.trim())
  .map((it) => {
    let behind = it;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const style = getComputedStyle(it);
    return [it.textContent.slice(0, 30), style.color, getComputedStyle(behind ?? document.body).backgroundColor];
  })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_it_fits_and_can_be_read(browser: Browser, healthy: tuple[str, Server], scheme: str) -> None:
    url, _ = healthy
    with opened(browser, url, 390, scheme) as page:
        expect(heading(page)).to_have_text("healthy")
        expect(tile(page, "Effective rank")).to_be_visible()
        keep(page, f"phone-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        sizes = page.evaluate(
            "[...document.querySelectorAll('body *')].filter(it => it.checkVisibility() && it.textContent.trim())"
            ".map(it => parseFloat(getComputedStyle(it).fontSize))"
        )
        assert min(sizes) >= 12
        texts = page.evaluate(CONTRAST)
        assert len(texts) > 60
        for text, front, back in texts:
            if re.fullmatch(r"rgb\([\d, ]+\)", back) and re.fullmatch(r"rgb\([\d, ]+\)", front):
                light, dark = sorted((luminance(front), luminance(back)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, front, back)


def test_text_from_outside_stays_text(browser: Browser, healthy: tuple[str, Server]) -> None:
    """No name with markup can be served; if one ever is, it is shown as it is. And 200 encoders can be filtered."""
    url, _ = healthy
    document = get(f"{url}/history").json()
    evil = "<img src=x onerror=alert(1)>"
    document["encoders"][0] |= {"model": evil, "reason": evil}
    document["model"] = evil
    document["history"]["events"] = [{"time": document["time"], "kind": "swap", "from": evil, "to": evil}]
    many = {**document["encoders"][1], "observed": True}
    document["encoders"] += [
        many | {"model": f"m{i}", "state": "model_fault" if i == 77 else "healthy"} for i in range(200)
    ]

    with opened(browser, url, 390, **{"/(events|history)": answering(document)}) as page:
        page.on("dialog", lambda _: pytest.fail("a script ran"))
        expect(page.locator("#list button")).to_have_count(203)
        expect(page.locator("#reason")).to_have_text(evil)
        assert page.locator("#encoders img, #verdict img, #events img").count() == 0
        expect(page.locator("#count")).to_have_text("203 encoders; 1 needs a look")
        keep(page, "many")
        page.locator("#filter").fill("model fault")
        expect(page.locator("#list button b")).to_have_text(["m77"])
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def replica(name: str, state: str, reason: str, revision: str = "260875d9ec73") -> dict[str, Any]:
    """One replica of the answer to /spectrum?fleet=1, as far as the page reads it."""
    verdict = {"state": state, "reason": reason}
    return {"instance": name, "model": "alpha", "revision": revision, "seconds_ago": 1.2, "verdict": verdict}


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_fleets_replicas_are_listed(browser: Browser, healthy: tuple[str, Server], width: int, scheme: str) -> None:
    """The answers are what tests/scale/test_ray.py gets from replicas on Ray."""
    url, _ = healthy
    document = get(f"{url}/history").json() | {"fleet": True}
    whole = {"model": "alpha", "revision": "260875d9ec73", "replicas": 3, "verdict": {"state": "healthy", "reason": ""}}
    fell = "directions 3 to 32 hold 0.1 of the reference's variance over 640 rows"
    answers = {
        "fleets": [whole],
        "replicas": [replica("a1", "healthy", "near"), replica("b2", "dimensional_collapse", fell)],
        "problems": ["b2 stands out alone among 2 replicas of alpha@260875d9ec73"],
    }

    with opened(
        browser, url, width, scheme, **{r"/(events|history|spectrum\?fleet)": answering(document, answers)}
    ) as page:
        fleet = page.locator("#fleet")
        expect(fleet.locator("li")).to_have_text(answers["problems"])
        expect(fleet.locator("tr th:first-child")).to_have_text(["replica", "all 3", "a1", "b2"])
        expect(fleet.locator("tr").nth(3)).to_contain_text(f"dimensional collapse{fell}")
        expect(fleet.locator("tr").nth(3)).to_contain_text("1.2 s ago")
        keep(page, f"fleet-{width}-{scheme}")
        table = fleet.locator(".scroll")
        assert table.evaluate("it => it.scrollWidth <= it.clientWidth")  # all of it is seen
