"""Draws docs/images/architecture.svg: the packages ("rooms") of this repository and the imports between them.

    python -m tools.architecture [--check]

It reads the import statements of every module, also inside functions, except those for type checkers. A room may import
only rooms below it: an import that points up is drawn in red. An arrow that follows from others is left out: if a
imports b and b imports c, a may import c. --check writes nothing, and ends with exit code 1 if the picture is old.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
# The place of each room in the picture: row, and column in halves.
PLACES = {
    "cli": (0, 4),
    "tools": (0, 2),
    "benchmarks": (0, 0),
    "scale": (1, 4),
    "service/http": (2, 0),
    "service/encoders": (3, 0),
    "service/watching": (4, 0),
    "service/engine": (5, 0),
    "service": (6, 0),
    "training": (6, 2),
    "models": (7, 2),
    "theory": (7, 6),
    "fullrank": (8, 2),
}
WHAT = {
    "benchmarks": "every figure we quote",
    "cli": "the command",
    "fullrank": "the library: statistics, monitor, verdict",
    "models": "what an encoder is",
    "scale": "past one machine",
    "service": "settings, metrics, logs",
    "service/encoders": "which encoders serve; swaps",
    "service/engine": "queue and batches",
    "service/http": "routes, errors, limits",
    "service/watching": "canary, sampling, sidecar",
    "theory": "the labs",
    "tools": "generators, the demonstration",
    "training": "how an encoder is made",
}
WIDTH = 230
HEIGHT = 50
ACROSS = 270
DOWN = 84
MARGIN = 24


def modules() -> Iterator[Path]:
    """Every Python file of a room, relative to the repository."""
    tops = {room.partition("/")[0] for room in PLACES}
    for top in sorted(tops):
        yield from sorted(it.relative_to(ROOT) for it in (ROOT / top).rglob("*.py"))


def room_of(module: str) -> str | None:
    """The room of a module: "service.http.app" -> "service/http"; None for a module that is not ours."""
    parts = module.split(".")
    inner = "/".join(parts[:2])
    return inner if inner in PLACES else parts[0] if parts[0] in PLACES else None


def imports(source: str) -> Iterator[str]:
    """The modules that a file imports when it runs, `from a import b` as a.b."""
    left: list[ast.AST] = [ast.parse(source)]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        left += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows() -> tuple[set[str], set[tuple[str, str]]]:
    """All rooms with a file, and a pair (from, to) for every import between two of them."""
    rooms: set[str] = set()
    found: set[tuple[str, str]] = set()
    for path in modules():
        room = room_of(".".join(path.with_suffix("").parts))
        assert room is not None
        rooms.add(room)
        targets = {room_of(name) for name in imports((ROOT / path).read_text())}
        found |= {(room, target) for target in targets if target not in (None, room) and target is not None}
    return rooms, found


def upward(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The imports that point to a higher or the same row, which are forbidden.

    Benchmarks measure everything, and tools describe the command in the reference.
    """
    above = {(here, there) for here, there in found if PLACES[there][0] <= PLACES[here][0] and here != "benchmarks"}
    return above - {("tools", "cli")}


def drawn(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that do not follow from others."""

    down = found - upward(found)

    def reaches(here: str, there: str, but: tuple[str, str]) -> bool:
        onward = {it[1] for it in down if it[0] == here and it != but}
        return there in onward or any(reaches(it, there, but) for it in onward)

    return {it for it in found if it not in down or not reaches(*it, but=it)}


def picture() -> str:
    """The SVG, the same for the same imports."""
    rooms, found = arrows()
    levels = sorted({PLACES[room][0] for room in rooms})
    corners = {
        room: (MARGIN + PLACES[room][1] * ACROSS // 2, MARGIN + levels.index(PLACES[room][0]) * DOWN) for room in rooms
    }
    size = tuple(max(it[axis] for it in corners.values()) + (WIDTH, HEIGHT)[axis] + MARGIN for axis in (0, 1))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif">',
        "<title>Rooms, and which imports which</title>",
        f'<rect width="{size[0]}" height="{size[1]}" fill="#ffffff"/>',
    ]
    for here, there in sorted(drawn(found)):
        lines += arrow(corners[here], corners[there], "#c0392b" if (here, there) in upward(found) else "#5d6d7e")
    for room in sorted(rooms):
        lines += box(corners[room], room)
    return "\n".join([*lines, "</svg>"]) + "\n"


def arrow(here: tuple[int, int], there: tuple[int, int], colour: str) -> list[str]:
    """The SVG of an arrow from one box to another: down, or along the row."""
    if here[1] == there[1]:
        right = here[0] < there[0]
        x1, x2 = (here[0] + WIDTH, there[0]) if right else (here[0], there[0] + WIDTH)
        y1 = y2 = here[1] + HEIGHT // 2
    else:
        down = here[1] < there[1]
        x1, x2 = here[0] + WIDTH // 2, there[0] + WIDTH // 2
        y1, y2 = (here[1] + HEIGHT, there[1]) if down else (here[1], there[1] + HEIGHT)
    path = (
        f"M{x1},{y1} C{x1},{y1 + DOWN // 2} {x2},{y2 - DOWN // 2} {x2},{y2}" if y1 != y2 else f"M{x1},{y1} L{x2},{y2}"
    )
    return [
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        f'<circle cx="{x2}" cy="{y2}" r="4" fill="{colour}"/>',
    ]


def box(corner: tuple[int, int], room: str) -> list[str]:
    """The SVG of a room's box, with its name and its purpose."""
    x, y = corner
    middle = x + WIDTH // 2
    return [
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3f8" stroke="#34495e"/>',
        f'<text x="{middle}" y="{y + 21}" text-anchor="middle" font-size="14" font-weight="bold">{room}/</text>',
        f'<text x="{middle}" y="{y + 39}" text-anchor="middle" font-size="11">{escape(WHAT[room])}</text>',
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the committed picture is current")
    arguments = parser.parse_args()
    current = picture()
    if not arguments.check:
        PICTURE.write_text(current)
        print(PICTURE.relative_to(ROOT))
    elif not PICTURE.exists() or PICTURE.read_text() != current:
        print("docs/images/architecture.svg is old: make architecture", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
