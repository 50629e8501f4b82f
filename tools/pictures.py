"""Takes the pictures of the live page and of a report in docs/images, in a real browser.

    python -m tools.pictures [--out docs/images] [--only report]

live-page-healthy.png: the default encoder on real images. live-page.png: the same page some time after a collapsed
encoder was swapped in. live-page-phone.png: that on a phone in the dark. report.png: the head of `fullrank report` on
the collapsed encoder against the healthy one, and report-measures.png: the collapsed one's spectrum and first measures.
It needs chromium and the extras `dev` and `report`.
"""

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, BrowserType, Page, ViewportSize, sync_playwright

from tools import demo
from tools.demo.traffic import Traffic, encoded
from tools.stack import StackError, call, service, wait
from training.data import SAMPLE, read_fashion_mnist

RATE = 16.0  # images a second: the sample's 1,000 test images in 62 s, so none comes twice in the shortest window
WINDOWS = "60,300"
HEALTHY_SECONDS = 150.0
COLLAPSED_SECONDS = 90.0
LIMIT = 600.0
WIDE: ViewportSize = {"width": 1280, "height": 1480}
REPORT: ViewportSize = {"width": 1100, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 844}


def browser_binary() -> str:
    """The path of a chromium. Raises StackError, naming the package to install, if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        raise StackError("there is no chromium on the PATH; on Debian: apt install chromium")
    return path


def launched(kind: BrowserType) -> Browser:
    """A browser without a window. Raises StackError if there is none."""
    return kind.launch(executable_path=browser_binary(), args=["--no-sandbox"], timeout=1000 * LIMIT)


def collapsed(url: str) -> bool:
    """Whether the verdict is a collapse."""
    return "collapse" in json.loads(call(f"{url}/spectrum"))["verdict"]["state"]


def healthy(url: str) -> bool:
    """Whether the verdict is healthy."""
    return bool(json.loads(call(f"{url}/spectrum"))["verdict"]["state"] == "healthy")


def shoot(page: Page, path: Path, word: str) -> None:
    """Save a picture of the page once its heading says `word` and it has drawn."""
    page.get_by_role("heading", level=2).filter(has_text=word).wait_for(timeout=1000 * LIMIT)
    page.wait_for_timeout(3000)
    page.screenshot(path=path)
    print(path, flush=True)


def take(out: Path, folder: Path) -> None:
    """Run the service, send it images, swap the encoder, and take the pictures. Raises StackError."""
    encoders = demo.encoders(folder / "encoders")
    images = encoded(read_fashion_mnist(SAMPLE, "test").images)
    first = encoders / demo.HEALTHY
    with (
        service(folder, encoder=first, encoders_dir=encoders, windows=WINDOWS, block_rows=64) as url,
        Traffic(url, images, RATE),
        sync_playwright() as playwright,
    ):
        browser = launched(playwright.chromium)
        pages = {
            "wide": browser.new_page(viewport=WIDE, color_scheme="light"),
            "phone": browser.new_page(viewport=PHONE, color_scheme="dark", device_scale_factor=2),
        }
        for page in pages.values():
            page.goto(url)
        time.sleep(HEALTHY_SECONDS)
        if not wait(lambda: healthy(url), LIMIT, 1.0):
            raise StackError("the encoder is not judged healthy; is the machine overloaded?")
        shoot(pages["wide"], out / "live-page-healthy.png", "healthy")
        call(f"{url}/admin/encoders", {"name": demo.COLLAPSED.name, "gate": "warn"}, timeout=300)
        time.sleep(COLLAPSED_SECONDS)
        if not wait(lambda: collapsed(url), LIMIT, 1.0):
            raise StackError("no collapse was found; is the machine overloaded?")
        shoot(pages["wide"], out / "live-page.png", "collapse")
        shoot(pages["phone"], out / "live-page-phone.png", "collapse")
        browser.close()


def take_report(out: Path, folder: Path) -> None:
    """Make a report on two encoders, on the sample's test images, and take its pictures. Raises StackError."""
    encoders = demo.encoders(folder / "encoders")
    images = folder / "images"
    images.mkdir()
    for i, text in enumerate(encoded(read_fashion_mnist(SAMPLE, "test").images)):
        (images / f"{i:04}.png").write_bytes(base64.b64decode(text))
    made = folder / "report.html"
    pair = [str(encoders / demo.COLLAPSED.name), "--against", str(encoders / demo.HEALTHY)]
    command = [sys.executable, "-m", "cli", "report", *pair, "--data", str(images), "--out", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StackError(f"fullrank report: {done.stderr}")
    with sync_playwright() as playwright:
        browser = launched(playwright.chromium)
        page = browser.new_page(viewport=REPORT, color_scheme="light")
        page.goto(made.as_uri())
        page.screenshot(path=out / "report.png")
        heading = page.get_by_role("heading", level=2, name=demo.COLLAPSED.name, exact=True)
        heading.evaluate("it => it.scrollIntoView()")
        page.screenshot(path=out / "report-measures.png")
        browser.close()
    print(out / "report.png", out / "report-measures.png", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", choices=("live", "report"), help="one kind of picture")
    arguments = parser.parse_args()
    kinds = {"live": take, "report": take_report}
    try:
        for name in [arguments.only] if arguments.only else kinds:
            with tempfile.TemporaryDirectory(prefix="fullrank-pictures-") as folder:
                kinds[name](arguments.out, Path(folder))
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
