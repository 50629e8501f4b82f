"""Answers of jobs. The event loop calls these: a future belongs to its loop."""

import asyncio
from typing import TypeVar

from service.engine.queue import Job

T = TypeVar("T")


def settle(answer: "asyncio.Future[T]", result: T, error: BaseException | None) -> None:
    """Set a result or an error, unless the caller has left."""
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)


def deliver(jobs: list[Job]) -> None:
    """Say that the jobs are complete."""
    for job in jobs:
        if not job.answer.done():
            job.answer.set_result(None)


def expire(job: Job) -> None:
    """Give a job up at its deadline."""
    fail([job], TimeoutError())


def fail(jobs: list[Job], error: Exception) -> None:
    """Give jobs up with an error."""
    for job in jobs:
        job.abandoned = True
        if not job.answer.done():
            job.answer.set_exception(error)
