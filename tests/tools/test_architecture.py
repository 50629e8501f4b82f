"""The picture of the rooms: current, and no room stands on one above it."""

import xml.etree.ElementTree as ET

from tools.architecture import PICTURE, PLACES, ROOT, arrows, drawn, imports, picture, room_of, upward


def test_the_committed_picture_is_current() -> None:
    assert PICTURE.read_text() == picture(), "make architecture"


def test_every_room_is_in_it() -> None:
    rooms, _ = arrows()
    top = {it.parent.name for it in ROOT.glob("*/__init__.py")} - {"tests"}
    assert top <= {room.partition("/")[0] for room in rooms}
    shown = [it.text for it in ET.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")]
    assert {f"{room}/" for room in rooms} <= set(shown)


def test_no_room_stands_on_one_above_it() -> None:
    assert upward(arrows()[1]) == set()
    assert upward({("fullrank", "service")}) == {("fullrank", "service")}


def test_arrows_that_follow_from_others_are_left_out() -> None:
    chain = {("cli", "training"), ("training", "models"), ("models", "fullrank")}
    assert drawn(chain | {("cli", "models"), ("cli", "fullrank"), ("training", "fullrank")}) == chain
    assert drawn(chain | {("fullrank", "models")}) == chain | {("fullrank", "models")}  # the wrong way is always shown


def test_what_counts_as_an_import() -> None:
    source = """
from typing import TYPE_CHECKING
import service.http.app, numpy
if TYPE_CHECKING:
    from training import loop
def late():
    from models import artifact
"""
    assert {room_of(name) for name in imports(source)} == {"service/http", "models", None}
    assert room_of("service.http.app") in PLACES
    assert room_of("service.settings") == "service"
