"""Routes of the live page: its HTML, and the scripts and styles that this loads."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse

from service.http.errors import Problem

router = APIRouter(include_in_schema=False)
FOLDER = Path(str(files("service.http.page")))
# Nothing inline, and nothing from another server: text that the page shows can become no script. blob: and data: are
# the picture that was dropped and canary images.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
TYPES = {".js": "text/javascript", ".css": "text/css", ".txt": "text/plain", ".svg": "image/svg+xml"}
ASSETS = {str(it.relative_to(FOLDER)): it for it in sorted(FOLDER.rglob("*")) if it.suffix in TYPES and it.is_file()}
RUNBOOKS = {it.stem: it for it in sorted((FOLDER / "runbooks").glob("*.md"))}


@router.get("/", response_class=HTMLResponse)
async def page() -> FileResponse:
    """The live page."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS, media_type="text/html")


@router.get("/runbooks/{name}", response_class=FileResponse)
async def runbook(name: str) -> FileResponse:
    """What to do about an alert, as Markdown text."""
    if name not in RUNBOOKS:
        raise Problem(404, "not_found", f"there is no runbook {name!r}; there are: {', '.join(RUNBOOKS)}")
    return FileResponse(RUNBOOKS[name], headers=HEADERS, media_type="text/plain; charset=utf-8")


@router.get("/page/{name:path}", response_class=FileResponse)
async def asset(name: str) -> FileResponse:
    """A file that the page loads."""
    if name not in ASSETS:
        raise Problem(404, "not_found", f"the page has no file {name!r}")
    # A vendored file has its version in its name.
    caching = {"Cache-Control": "max-age=86400"} if name.startswith("vendor/") else {}
    return FileResponse(ASSETS[name], headers=HEADERS | caching, media_type=TYPES[ASSETS[name].suffix])
