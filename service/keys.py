"""Keys and what each may do: read from settings and from files, checked before the service starts."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Scope = Literal["embed", "observe", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
SHORTEST = 8
MANY = re.compile(r"[+,._ -]+")  # between scopes; in the name of a file in a mounted secret only . _ - may be used


@dataclass(frozen=True)
class Grant:
    """One key and what it may do. `named` is False where nobody said what, so that it may do everything.

    Its text is not shown in logs or errors.
    """

    key: bytes
    scopes: frozenset[Scope]
    named: bool = True

    def __repr__(self) -> str:
        return f"Grant({'+'.join(sorted(self.scopes))})"


def grants(key: str | None, scoped: Iterable[str], file: Path | None) -> tuple[Grant, ...]:
    """All keys of a service. Raises ValueError that names no key.

    Parameters
    ----------
    key: may do everything that no other key is named for. With a key for "admin" beside it, it may not administer.
    scoped: "SCOPE[+SCOPE...]=KEY" each.
    file: lines of the same form, or a folder whose files hold a key each and are named for its scopes; see `_folder`.
    """
    found = [_entry(text, "api_keys") for text in scoped]
    if file is not None:
        found += _folder(file) if file.is_dir() else _lines(file)
    if key is not None:
        found.append(Grant(_sane(key, "api_key"), frozenset(SCOPES), named=False))
    taken = frozenset(scope for grant in found if grant.named for scope in grant.scopes)
    return tuple(it if it.named else Grant(it.key, it.scopes - (taken - {"embed"}), named=False) for it in found)


def _entry(text: str, where: str) -> Grant:
    """SCOPE[+SCOPE...]=KEY, or, in a file, a bare KEY."""
    scopes, equals, key = text.strip().partition("=")
    words = [word for word in MANY.split(scopes.strip().lower()) if word]
    if equals and words and all(word in SCOPES for word in words):
        return Grant(_sane(key, where), frozenset(scope for scope in SCOPES if scope in words))
    raise ValueError(f"{where}: write SCOPE=KEY or SCOPE+SCOPE=KEY; the scopes are {', '.join(SCOPES)}")


def _lines(path: Path) -> Iterator[Grant]:
    """The keys of a file, one a line: SCOPE[+SCOPE...]=KEY, or a bare KEY that may do what no other is named for.

    Empty lines and those that start with # are skipped.
    """
    lines = [line.strip() for line in _read(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"api_keys_file: {path} holds no key")
    for number, line in enumerate(lines, 1):
        where = f"api_keys_file: {path}, key {number}"
        # A bare key may end as base64 does; anything else with an equals sign names scopes, or misspells them.
        if re.fullmatch(r"[^=]{8,}={0,2}", line):
            yield Grant(_sane(line, where), frozenset(SCOPES), named=False)
        else:
            yield _entry(line, where)


def _folder(folder: Path) -> Iterator[Grant]:
    """The keys of a mounted secret: a file a key, named for its scopes, such as "admin" or "embed-observe".

    Numbers in a name are ignored, so that admin-1 and admin-2 may be there while one replaces the other. Names that
    start with a dot are skipped: that is where Kubernetes keeps the files that the others point to.
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
    """The key without white space around it. Raises ValueError for one that no client could send."""
    key = text.strip()
    if len(key) < SHORTEST:
        raise ValueError(f"{where}: the key is shorter than {SHORTEST} characters")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{where}: the key holds a character that cannot be sent in a header; use printable ASCII")
    return key.encode()
