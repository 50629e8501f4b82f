"""API keys and their scopes: read from settings and files, and checked before the service starts."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Scope = Literal["embed", "observe", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
SHORTEST = 8
MANY = re.compile(r"[+,._ -]+")  # separates scopes; in the file names of a mounted secret only . _ - are allowed


@dataclass(frozen=True)
class Grant:
    """One key and its scopes. `named` is False if the key was given without scopes, so that it may do everything.

    Its repr does not show the key: logs and errors must not hold it.
    """

    key: bytes
    scopes: frozenset[Scope]
    named: bool = True

    def __repr__(self) -> str:
        return f"Grant({'+'.join(sorted(self.scopes))})"


def grants(key: str | None, scoped: Iterable[str], file: Path | None) -> tuple[Grant, ...]:
    """All keys of a service. Raises ValueError, whose message holds no key.

    Parameters
    ----------
    key: may embed, and everything else that no other key names. If another key names "admin", this one may not
        administer.
    scoped: entries of the form "SCOPE[+SCOPE...]=KEY".
    file: a file with lines of that form, or a folder with one file a key, named for the key's scopes; see `_folder`.
    """
    found = [_entry(text, "api_keys") for text in scoped]
    if file is not None:
        found += _folder(file) if file.is_dir() else _lines(file)
    if key is not None:
        found.append(Grant(_sane(key, "api_key"), frozenset(SCOPES), named=False))
    taken = frozenset(scope for grant in found if grant.named for scope in grant.scopes)
    return tuple(it if it.named else Grant(it.key, it.scopes - (taken - {"embed"}), named=False) for it in found)


def _entry(text: str, where: str) -> Grant:
    """Parse SCOPE[+SCOPE...]=KEY. Raises ValueError for another form."""
    scopes, equals, key = text.strip().partition("=")
    words = [word for word in MANY.split(scopes.strip().lower()) if word]
    if equals and words and all(word in SCOPES for word in words):
        return Grant(_sane(key, where), frozenset(scope for scope in SCOPES if scope in words))
    raise ValueError(f"{where}: write SCOPE=KEY or SCOPE+SCOPE=KEY; the scopes are {', '.join(SCOPES)}")


def _lines(path: Path) -> Iterator[Grant]:
    """The keys of a file, one a line: SCOPE[+SCOPE...]=KEY, or a bare KEY for everything that no other key names.

    Empty lines and lines that start with # are skipped.
    """
    lines = [line.strip() for line in _read(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"api_keys_file: {path} holds no key")
    for number, line in enumerate(lines, 1):
        where = f"api_keys_file: {path}, key {number}"
        # A bare key may end in the = of base64. Any other line with an equals sign names scopes, or misspells them.
        if re.fullmatch(r"[^=]{8,}={0,2}", line):
            yield Grant(_sane(line, where), frozenset(SCOPES), named=False)
        else:
            yield _entry(line, where)


def _folder(folder: Path) -> Iterator[Grant]:
    """The keys of a mounted secret: one file a key, named for its scopes, such as "admin" or "embed-observe".

    Numbers in a name are ignored, so that admin-1 and admin-2 can exist while one replaces the other. Names that start
    with a dot are skipped: Kubernetes keeps there the files that the others point to.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ValueError(f"api_keys_file: {folder} holds no key; its files are named for scopes: {', '.join(SCOPES)}")
    for path in files:
        words = [word for word in MANY.split(path.name.lower()) if word and not word.isdecimal()]
        if not words or any(word not in SCOPES for word in words):
            raise ValueError(f"api_keys_file: {path} is named for no scope; the scopes are {', '.join(SCOPES)}")
        yield Grant(_sane(_read(path), f"api_keys_file: {path}"), frozenset(it for it in SCOPES if it in words))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"api_keys_file: {path} cannot be read: {reason}") from None


def _sane(text: str, where: str) -> bytes:
    """The key without white space around it. Raises ValueError for a key that no client could send."""
    key = text.strip()
    if len(key) < SHORTEST:
        raise ValueError(f"{where}: the key is shorter than {SHORTEST} characters")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{where}: the key holds a character that cannot be sent in a header; use printable ASCII")
    return key.encode()
