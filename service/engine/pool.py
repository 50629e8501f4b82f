"""A pool of processes that decode images which may take long. They have a memory limit and can be killed.

Each process belongs to a thread that hands it one image at a time and waits. Requests take turns image by image, so a
request with many images delays the others by one image each. An image that takes too long or too much memory ends its
process and is refused. The next image starts another process.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from models.decode import ImageError
from models.preprocess import Preprocessing
from service.engine.queue import Part, Pixels
from service.engine.worker import read_frame, write_frame

LOOK_MS = 50  # milliseconds between two checks whether a client still waits for an image
START = """import json, sys
sys.path[:] = json.loads(sys.argv.pop())
from service.engine.worker import main
main()"""


@dataclass(frozen=True)
class SlowImage:
    """An image that may take long to decode: its file, how to prepare it, and its limits in pixels.

    refused: turns an ImageError into the exception that the image's request fails with.
    """

    data: bytes
    preprocessing: Preprocessing
    max_pixels: int
    max_whole_pixels: int
    refused: Callable[[ImageError], Exception]

    def head(self) -> dict[str, Any]:
        """What a worker needs to know besides the file."""
        limits = {"max_pixels": self.max_pixels, "max_whole_pixels": self.max_whole_pixels}
        return {"preprocessing": self.preprocessing.model_dump(mode="json")} | limits


class Process:
    """One worker process. decode() is for one thread; stop() for any."""

    def __init__(self, seconds: float, memory: int) -> None:
        self._seconds = seconds
        self._memory = memory
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        # -P and the parent's own path: modules in the working directory must not take the place of ours.
        command = [sys.executable, "-P", "-c", START, str(memory), str(seconds), json.dumps(sys.path)]
        pipe = subprocess.PIPE
        # A session of its own: an interrupt at the terminal is for the parent, which answers what it accepted.
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)
        self._answers = select.poll()
        self._answers.register(self._child.stdout, select.POLLIN)  # type: ignore[arg-type]

    def decode(self, image: SlowImage, wanted: Callable[[], bool]) -> Pixels:
        """Decode an image to (channels, size, size) uint8.

        Raises ImageError. Once the image is no longer wanted, kills the process and raises TimeoutError.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            # This blocks while the pipe is full. The process reads at once, or it is killed, which ends the wait.
            write_frame(self._child.stdin, image.head(), image.data)  # type: ignore[arg-type]
            while not self._answers.poll(LOOK_MS):
                if not wanted():
                    self.stop()
                    raise TimeoutError
            answer = read_frame(self._child.stdout)  # type: ignore[arg-type]
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            answer = None
        if answer is None:
            raise self._death()
        head, rest = answer
        if "code" in head:
            raise ImageError(head["code"], head["message"])
        return np.frombuffer(rest, np.uint8).reshape(head["shape"])

    def _death(self) -> ImageError:
        """The reason why the process ended, as an ImageError."""
        self.stop()
        limits = f"the limits are {self._seconds:g} s of CPU and {self._memory / 2**20:.0f} MiB"
        cause = "too long" if self._child.returncode == -signal.SIGPROF else "too much memory, or ended its decoder"
        return ImageError("image_too_costly", f"decoding the image took {cause}; {limits}: scale it down first")

    def stop(self) -> None:
        """Kill the process and wait for its end."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):  # some of what was written may not have been read
                if pipe is not None:
                    pipe.close()

    @property
    def running(self) -> bool:
        """Whether the process still runs."""
        return self._child.poll() is None

    @property
    def identity(self) -> int:
        """The process id."""
        return self._child.pid


@dataclass(eq=False)
class Task:
    """A part of a request being decoded: the images decoded so far, and the indices of the others."""

    part: Part
    images: list[Any]
    left: deque[int]
    running: int = 0
    queued: float = field(default_factory=time.monotonic)


class Pool:
    """Decodes parts of requests in `processes` processes, each image in at most `seconds` of CPU and `memory` bytes.

    finish: called on a thread of the pool with a part and its pixels, or the exception it fails with. on_killed: called
    when a process ended before its image was decoded. Parts that no client waits for any more are dropped.
    """

    def __init__(
        self,
        processes: int,
        seconds: float,
        memory: int,
        finish: Callable[[Part, list[Pixels] | Exception], None],
        on_killed: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_killed = on_killed  # a process ended before its image was decoded
        self._seconds = seconds
        self._memory = memory
        self._finish = finish
        self._size = processes
        self._tasks: deque[Task] = deque()
        self._came = threading.Condition()
        self._closing = False
        self._processes: dict[int, Process] = {}
        self._threads: list[threading.Thread] = []

    def put(self, part: Part, images: Sequence[Any]) -> None:
        """Queue a part: its images of type SlowImage are decoded, the others are pixels already. Never blocks."""
        task = Task(part, list(images), deque(i for i, image in enumerate(images) if isinstance(image, SlowImage)))
        with self._came:
            self._tasks.append(task)
            # The threads start with the first images that need them: most services never see any.
            while len(self._threads) < min(self._size, len(self._tasks) + len(task.left) - 1) and not self._closing:
                name = f"decode_{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
                self._threads[-1].start()
            self._came.notify(len(task.left))

    def close(self) -> None:
        """Kill the processes and end the threads. Waiting parts are dropped."""
        with self._came:
            self._closing = True
            self._tasks.clear()
            for process in self._processes.values():
                process.stop()
            self._came.notify_all()
        for thread in self._threads:
            thread.join(10)

    def _work(self) -> None:
        mine = threading.get_ident()
        while (taken := self._take()) is not None:
            task, index = taken
            try:
                task.images[index] = self._decode(mine, task, index)
            except TimeoutError:
                self._give_up(task)
            except Exception as error:
                image = task.images[index]
                self._give_up(task)
                self._finish(task.part, image.refused(error) if isinstance(error, ImageError) else error)
            else:
                self._next(task)
        if (process := self._processes.pop(mine, None)) is not None:
            process.stop()

    def _take(self) -> tuple[Task, int] | None:
        """Wait for the next image, of the request whose turn it is. None means that the thread should end."""
        with self._came:
            while not self._closing:
                while self._tasks and not self._tasks[0].part.job.wanted(time.monotonic()):
                    self._tasks.popleft()
                if self._tasks:
                    task = self._tasks.popleft()
                    index = task.left.popleft()
                    task.running += 1
                    if task.left:
                        self._tasks.append(task)
                    return task, index
                self._came.wait()
        return None

    def _decode(self, mine: int, task: Task, index: int) -> Pixels:
        with self._came:
            if self._closing:
                raise TimeoutError
            process = self._processes.get(mine)
            if process is None or not process.running:
                process = self._processes[mine] = Process(self._seconds, self._memory)
        try:
            return process.decode(cast(SlowImage, task.images[index]), lambda: task.part.job.wanted(time.monotonic()))
        finally:
            if not process.running:
                self._on_killed()

    def _give_up(self, task: Task) -> None:
        """Drop the part's remaining images."""
        with self._came:
            task.left.clear()
            if task in self._tasks:
                self._tasks.remove(task)

    def _next(self, task: Task) -> None:
        """Hand the part over if its last image is decoded."""
        with self._came:
            task.running -= 1
            complete = not task.left and not task.running
        if complete and not any(isinstance(image, SlowImage) for image in task.images):
            task.part.job.decode_seconds += time.monotonic() - task.queued
            self._finish(task.part, task.images)
