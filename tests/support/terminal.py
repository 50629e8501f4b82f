"""An interactive shell on a pseudo-terminal, typed into as a person would."""

import os
import pty
import re
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b\([A-Z]|\x07")
SECONDS = 120.0  # only a shell that never answers takes them


class Terminal:
    """What the shell wrote, without control sequences, since `type` was last called."""

    def __init__(self, file: int) -> None:
        self.file, self.raw = file, b""

    def type(self, text: str) -> None:
        self.raw = b""
        os.write(self.file, text.encode())

    def shown(self) -> str:
        return CONTROL.sub(b"", self.raw).decode(errors="replace")

    def shows(self, text: str) -> bool:
        """Waits until `text` is shown; False where the shell ends or never writes it."""
        end = time.monotonic() + SECONDS
        while text not in self.shown():
            if time.monotonic() > end:
                return False
            if select.select([self.file], [], [], 1.0)[0]:
                try:
                    self.raw += os.read(self.file, 65536)
                except OSError:  # the shell has ended
                    return False
        return True


@contextmanager
def interactive(shell: str, environment: dict[str, str]) -> Iterator[Terminal]:
    """The shell after it has read its settings and waits for a line."""
    pid, file = pty.fork()
    if pid == 0:
        os.execvpe(shell, [shell, "-i"], environment)
    try:
        terminal = Terminal(file)
        terminal.type("echo rea''dy\n")
        assert terminal.shows("ready"), terminal.shown()
        yield terminal
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(file)
