"""Bulk embedding on a Ray cluster: actors embed shards exactly as a local run does.

Plain actors and not Ray Data. Ray Data divides its input into blocks of its own and names its files after them, and its
checkpoint is written after the block: a crash in between leaves rows twice. Here a shard is one call, its file has the
shard's name and is renamed into place, so a call that Ray repeats writes the same bytes again.
"""

import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fullrank import __version__ as VERSION
from models.artifact import ArtifactError
from scale.bulk import RUN, BulkError, Embedding, Written, sweep
from scale.places import Place, place
from scale.sources import Shard, SourceError

AHEAD = 2  # shards given to an actor: one that it works on, and the next
CONNECT = 10.0  # seconds for an address to answer
START = 300.0  # seconds for the first actor to start
ATTEMPTS = 3  # at a shard whose process dies


class Embedder:
    """What Ray runs in each actor. It loads the encoder with its first shard, also after Ray started it again."""

    def __init__(self, encoder: str, out: str, device: str, engine: str, identity: str) -> None:
        self._arguments = encoder, out, device, engine
        self._identity = identity
        self._embedding: Embedding | None = None

    def prepare(self) -> str:
        """Load the encoder, once, and return the node's name. Raises BulkError if the node has another one.

        It also raises BulkError if the node sees another output folder.
        """
        here = socket.gethostname()
        encoder, out, device, engine = self._arguments
        if self._embedding is None:
            if identity_of(place(out)) != self._identity:
                message = f"{here} does not see the same {out}: the folder has to be shared by all nodes"
                raise BulkError(message)
            try:
                self._embedding = Embedding(encoder, out, device, engine)
            except (ArtifactError, OSError) as error:
                raise BulkError(f"{here} cannot load {encoder}, which every node needs: {error}") from error
            if self._embedding.artifact.card.revision != json.loads(self._identity)["revision"]:
                raise BulkError(f"{here} has another revision in {encoder}; copy the same encoder to every node")
        return here

    def embed(self, shard: Shard) -> Written:
        """Embed one shard, as a local run does."""
        self.prepare()
        assert self._embedding is not None
        return self._embedding(shard)


def identity_of(out: Place) -> str:
    """What an output folder says of its run, and with which version of this package; "" if it says nothing."""
    try:
        return json.dumps(json.loads((out / RUN).read_text()) | {"version": VERSION}, sort_keys=True)
    except (OSError, ValueError):
        return ""


def run_ray(
    shards: Sequence[Shard],
    encoder: Path,
    out: Place,
    *,
    address: str,
    processes: int | None = None,
    device: str = "cpu",
    engine: str = "auto",
    done: Callable[[Written], None] = lambda written: None,
    failed: Callable[[str], None] = lambda reason: None,
) -> None:
    """Embed the shards on a Ray cluster, in `processes` actors of one thread each; None means one for each CPU.

    address: HOST:PORT of the cluster's head on a machine of the cluster, ray://HOST:PORT elsewhere, auto for the
    cluster that runs here, or local to start one here. `done` and `failed` are as in run_local. Raises BulkError if the
    address does not answer, if no actor can be started, or if output cannot be written.
    """
    with connected(address) as ray:
        available = int(ray.cluster_resources().get("CPU", 0)) if processes is None else processes
        resources = {"num_cpus": 1, "num_gpus": 1 if device.startswith("cuda") else 0}
        actor = ray.remote(max_restarts=-1, max_task_retries=ATTEMPTS, **resources)(Embedder)
        arguments = str(encoder.resolve()), str(out.resolve()), device, engine, identity_of(out)
        count = max(1, min(available, len(shards)))
        Crew(ray, [actor.remote(*arguments) for _ in range(count)], done, failed).embed(shards)
    try:
        sweep(out)  # an actor that was killed leaves files half written; another one has written them
    except OSError as error:
        raise BulkError(f"{out}: {error}") from error


class Crew:
    """Actors, and the shards that they work on. An actor that does not start gets no shards."""

    def __init__(
        self, ray: Any, actors: Sequence[Any], done: Callable[[Written], None], failed: Callable[[str], None]
    ) -> None:
        self._ray = ray
        self._done = done
        self._failed = failed
        self._starting = {actor.prepare.remote(): actor for actor in actors}
        self._working: dict[Any, tuple[Any, Shard]] = {}
        self._started = False

    def embed(self, shards: Sequence[Shard]) -> None:
        """Have all shards embedded. Raises BulkError."""
        left = deque(shards)
        while left or self._working:
            patience = None if self._started else START
            ready, _ = self._ray.wait([*self._working, *self._starting], num_returns=1, timeout=patience)
            if not ready:
                raise BulkError(f"no actor started within {START:g} s; `ray status` says which CPUs or GPUs are free")
            for reference in ready:
                actor = self._start(reference) if reference in self._starting else self._finish(reference)
                while actor and left and sum(it is actor for it, _ in self._working.values()) < AHEAD:
                    shard = left.popleft()
                    self._working[actor.embed.remote(shard)] = actor, shard

    def _start(self, reference: Any) -> Any:
        """The actor, ready; None if it died, while others start or work. Raises BulkError if it was the last."""
        actor = self._starting.pop(reference)
        try:
            self._result(reference)
        except self._ray.exceptions.RayActorError as error:
            if self._starting or self._started:
                return None
            raise BulkError(
                f"every process died {ATTEMPTS + 1} times as it loaded the encoder, perhaps because memory ran out; "
                "run the same command again to go on, with fewer --processes"
            ) from error
        self._started = True
        return actor

    def _finish(self, reference: Any) -> Any:
        actor, shard = self._working.pop(reference)
        try:
            self._done(self._result(reference))
        except SourceError as error:
            self._failed(str(error))
        except OSError as error:
            raise BulkError(f"the output cannot be written: {error}; run the same command again to go on") from error
        except self._ray.exceptions.RayActorError:
            self._failed(f"{shard.name}: the process died {ATTEMPTS + 1} times, its node was lost or memory ran out")
        return actor

    def _result(self, reference: Any) -> Any:
        """What a call returned. Raises what it raised, and BulkError if the node cannot run it at all."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, SourceError | OSError | BulkError):
                raise cause from None
            reason = str(cause or error).strip().rpartition("\n")[2]
            raise BulkError(
                f"a node cannot run this: {reason}; every node needs fullrank-server[ray,bulk] {VERSION}"
            ) from error


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """A connection to a Ray cluster. Raises BulkError, within seconds if nothing listens there."""
    _answers(address)
    # Ray itself would try twenty times, half a minute each, to reach an address that listens and says nothing.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", f"{CONNECT:g}")
    try:
        import ray
    except ImportError as error:
        raise BulkError("Ray is missing: pip install 'fullrank-server[ray]'") from error
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **options)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise BulkError(
            f"no Ray cluster at {address}: {reason}; start one with `ray start --head`, or leave --ray out"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """Raise BulkError if the address is none, or nothing listens there."""
    if address in ("auto", "local"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise BulkError(f"--ray {address}: expected HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        socket.create_connection((host, port), CONNECT).close()
    except OSError as error:
        raise BulkError(
            f"no Ray cluster at {address}: {error}; start one with `ray start --head`, or leave --ray out"
        ) from error
