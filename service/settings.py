"""All settings of the service, from FULLRANK_* environment variables or keyword arguments."""

import contextlib
import difflib
import functools
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

import models
from fullrank.verdict import CANARY_COSINE
from service import keys

NONE = Path("none")  # serves no encoder
PRETRAINED = Path(models.__file__).parent / "pretrained"
DEFAULT = PRETRAINED / "fashion-byol"
Gate = Literal["enforce", "warn", "off"]
Engine = Literal["auto", "onnx", "torch"]


CGROUP = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """The number of CPUs this process may use: its affinity, or its container's quota rounded down if that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups v2 and v1
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in files).split())
            if quota > 0:
                allowed = min(allowed, max(1, quota // period))
    return allowed


# Variables that Kubernetes sets in every container of a namespace with a Service called fullrank or fullrank-something.
LINKS = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
LINK = re.compile(r"(tcp|udp|sctp)://.*")


class Settings(BaseSettings):
    """Serve an encoder over HTTP. Each flag --some-name may also be given as the variable FULLRANK_SOME_NAME.

    Example: fullrank serve --encoder models/pretrained/fashion-directclr --port 8000
    """

    model_config = SettingsConfigDict(
        env_prefix="FULLRANK_",
        extra="forbid",
        hide_input_in_errors=True,  # the input may be a key
        env_ignore_empty=True,
        validate_default=True,
        cli_prog_name="fullrank serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    encoder: Path = Field(
        DEFAULT,
        description="Folder of the encoder served at start. none serves no encoder: the service is a sidecar, which "
        "takes embeddings at POST /observe.",
    )
    encoders: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        max_length=16,
        description="More encoders to serve: names under encoders_dir or folders, comma-separated. A request's model "
        "chooses one. All stay in memory.",
    )
    encoders_dir: Path = Field(
        PRETRAINED, description="The one folder whose encoders POST /admin/encoders may swap to, by name."
    )
    gate: Gate = Field(
        "enforce",
        description="What to do with a collapsed encoder, at start and by default in a swap, where it is compared with "
        "the incumbent. enforce refuses it. warn serves it with a warning (after a swap, recent traffic is still "
        "compared with the incumbent's reference). off serves it.",
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    api_key: SecretStr | None = Field(
        None,
        min_length=8,
        description="Bearer key that every route needs which embeds, observes or administers. It may embed, and do "
        "everything else that no key of api_keys names. Without any key, routes that administer or reveal state answer "
        "on loopback only. Set a key behind a proxy on the same host, since all its requests come over loopback.",
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Keys with scopes: SCOPE=KEY or SCOPE+SCOPE=KEY, comma-separated. The scopes are embed, observe "
        "(POST /observe), metrics (/moments, /neighbours and, once a key names this scope, /metrics) and admin (all of "
        "/admin).",
    )
    api_keys_file: Path | None = Field(
        None,
        description="A file with such keys, one a line. Or a folder (a mounted secret) with one file a key, named for "
        "the key's scopes, such as embed or embed-observe.",
    )
    aliases: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Other names for encoders, for clients whose model name is fixed: NAME=ENCODER, comma-separated. "
        "ENCODER is an encoder in service, or default, which is itself an alias of the default encoder.",
    )

    device: str = Field("cpu", description="Torch device: cpu, cuda, cuda:1.")
    engine: Engine = Field(
        "auto",
        description="What runs the encoder: onnx (onnxruntime, on a CPU in float32) or torch. auto is onnx if it can "
        "run this encoder, otherwise torch.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of the forward pass. bfloat16 runs in the torch engine. It is faster on a recent GPU "
        "and on a CPU that multiplies in it (AMX), and slower on any other. An encoder whose embeddings it turns to a "
        "cosine below 0.9999 is refused.",
    )
    threads: int = Field(
        max(1, available_cpus() - 1),
        ge=1,
        description="CPU threads of one forward pass. Use no more than there are free cores: the threads wait for each "
        "other, so two on one core are far slower than one.",
    )
    lanes: int = Field(
        2,
        ge=1,
        le=2,
        description="Batches in work at a time. With 2, one is decoded while the other is embedded. With 1 an encoder "
        "that takes less time than the decoding of its images answers sooner.",
    )
    decode_threads: int = Field(
        max(1, min(4, available_cpus() - 1)),
        ge=1,
        description="Threads that decode one batch's images, and processes that decode large ones.",
    )
    decode_seconds: float = Field(
        5.0, ge=0.1, le=600, description="CPU seconds to decode one large image; an image that takes longer is refused."
    )
    decode_memory_bytes: int = Field(
        512 * 2**20,
        ge=64 * 2**20,
        description="Bytes of memory that a process which decodes large images may take, beyond its size at start.",
    )

    max_batch: int = Field(32, ge=1, description="Images in one forward pass.")
    max_pending_images: int = Field(
        512, ge=1, description="Images admitted and not yet answered. Beyond this, requests get 429 with Retry-After."
    )
    max_images_per_request: int = Field(128, ge=1, description="Images in one request.")
    max_body_bytes: int = Field(
        32 * 2**20, ge=1024, description="Bytes in one request body, enforced while it streams."
    )
    max_pending_bytes: int = Field(
        256 * 2**20,
        ge=2**20,
        description="Bytes of request bodies held at once, over all connections. Beyond this, requests with bodies of "
        "more than 64 KiB get 429 with Retry-After.",
    )
    max_connections: int = Field(
        1000,
        ge=1,
        description="Connections open at once. Beyond this, a new one replaces one that has been idle for a while, or "
        "gets 503 if there is none.",
    )
    max_pixels: int = Field(
        50_000_000, ge=1, description="Width x height of one image, read from its header before any pixel is allocated."
    )
    max_whole_pixels: int = Field(
        16_000_000,
        ge=1,
        description="Width x height of one image that is not a JPEG. Such images are decoded in full, a JPEG at a "
        "fraction of its size.",
    )
    request_timeout: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds from a request's first byte. If its head and body have not arrived by then, it gets 408; "
        "if its answer is not ready, 504. A client that has not read its answer by then is disconnected.",
    )
    liveness_seconds: float = Field(
        60.0,
        gt=0,
        description="Seconds after which a replica that cannot embed (its threads ended, no work finishes, or every "
        "pass fails) answers 503 on /healthz, so that it is restarted. /readyz answers 503 at once.",
    )
    drain_seconds: float = Field(
        0.0, ge=0, description="Seconds between SIGTERM (readiness off) and the end of listening, for load balancers."
    )

    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may call from a browser, such as https://app.example.org; comma-separated, "
        "or * for any.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Logs for people, or one JSON object a line.")
    access_log: bool = Field(False, description="Log every request: route, code, seconds, images, request id.")
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry spans where OTEL_EXPORTER_OTLP_ENDPOINT says; needs fullrank-server[tracing].",
    )
    otlp_metrics: bool = Field(
        False,
        description="Also push what /metrics shows to an OpenTelemetry collector, where OTEL_EXPORTER_OTLP_ENDPOINT "
        "says, every OTEL_METRIC_EXPORT_INTERVAL milliseconds (60000); needs fullrank-server[tracing].",
    )

    windows: Annotated[tuple[Annotated[float, Field(gt=0)], ...], NoDecode] = Field(
        (300.0, 3600.0), min_length=1, description="Seconds of recent traffic watched; a JSON list or comma-separated."
    )
    block_rows: int = Field(256, ge=2, description="Rows in one block of the monitor's statistics.")
    monitor: bool = Field(True, description="Watch the embeddings at all.")
    monitor_rate: float = Field(
        50.0,
        gt=0,
        description="The most images a second that each encoder's monitor looks at; of more, it takes a random sample. "
        "This bounds the monitor's cost. One of several clients gets at most a quarter; so does one of several keys "
        "that post to /observe. inf looks at all.",
    )
    state_dir: Path | None = Field(
        None,
        description="Folder where the monitors' windows and the page's history are stored, so that a restart does not "
        "lose them. Each replica needs its own: a second one on the same folder stores nothing and logs that.",
    )
    state_period: float = Field(
        30.0, gt=0, description="Seconds between two saves of the windows. They are also saved at shutdown."
    )
    references_dir: Path | None = Field(
        None,
        description="Folder of references, NAME.safetensors (fullrank.Reference.tensors()), with which rows of the "
        "model NAME from POST /observe are compared.",
    )
    max_observed_models: int = Field(8, ge=0, description="Models that POST /observe may name; each has a monitor.")
    max_observed_bytes: int = Field(
        2**31,
        ge=2**20,
        description="Bytes of memory of all monitors of POST /observe together, estimated from their dimensions: 776 "
        "MiB at 2,048 dimensions, 20 at 256. A model that got no rows for the longest window is removed.",
    )
    canary_period: float = Field(
        60.0,
        gt=0,
        description="Seconds in which all canary images are embedded again, a few at a time. It is longer if that "
        "would take over 0.5 % of the engine's time.",
    )
    canary_min_cosine: float = Field(
        CANARY_COSINE,
        gt=0,
        le=1,
        description="Least cosine between a canary image's embedding at load time and its stored one. An encoder below "
        "it is refused.",
    )

    @model_validator(mode="before")
    @classmethod
    def _knows_the_variables(cls, values: dict[str, object]) -> dict[str, object]:
        """Refuse a variable FULLRANK_... that is no setting: a misspelt name of a key would leave the service open."""
        known = {f"FULLRANK_{name}".upper() for name in cls.model_fields}
        for variable, value in os.environ.items():
            name = variable.upper()
            if name.startswith("FULLRANK_") and name not in known and not (LINKS.fullmatch(name) or LINK.match(value)):
                near = difflib.get_close_matches(name, known, 1, 0.5)
                hint = f"; did you mean {near[0]}?" if near else "; `fullrank serve --help` lists them"
                raise ValueError(f"the variable {variable} is no setting of this service{hint}")
        if isinstance(port := values.get("port"), str) and LINK.match(port):
            return {name: value for name, value in values.items() if name != "port"}
        return values

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: dict[str, object]) -> dict[str, object]:
        for name in ("encoders", "windows", "cors_origins", "api_keys"):
            if isinstance(text := values.get(name), str):
                parts = (part.strip(" \"'") for part in text.strip("[] ").split(","))
                values = values | {name: [part for part in parts if part]}
        return values

    @model_validator(mode="before")
    @classmethod
    def _split_aliases(cls, values: dict[str, object]) -> dict[str, object]:
        if not isinstance(text := values.get("aliases"), str):
            return values
        aliases = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            alias, equals, name = (piece.strip() for piece in part.partition("="))
            if not (alias and equals and name):
                raise ValueError(f"aliases: write NAME=ENCODER, comma-separated, not {part!r}")
            aliases[alias] = name
        return values | {"aliases": aliases}

    @field_validator("api_key", mode="before")
    @classmethod
    def _without_newline(cls, key: object) -> object:
        return key.strip() if isinstance(key, str) else key

    @field_validator("windows")
    @classmethod
    def _shortest_first(cls, windows: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(windows))

    @field_validator("device")
    @classmethod
    def _names_a_device(cls, device: str) -> str:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"{device!r} is no torch device; write cpu, cuda or cuda:1") from error
        return device

    @functools.cached_property
    def grants(self) -> tuple[keys.Grant, ...]:
        """All keys with their scopes."""
        key = None if self.api_key is None else self.api_key.get_secret_value()
        return keys.grants(key, [it.get_secret_value() for it in self.api_keys], self.api_keys_file)

    @model_validator(mode="after")
    def _keys_can_be_used(self) -> "Settings":
        assert self.grants is not None
        return self

    @model_validator(mode="after")
    def _serves_none_alone(self) -> "Settings":
        if self.encoder == NONE and self.encoders:
            raise ValueError("encoder is none, so encoders must be empty; name one of them as encoder")
        return self

    @model_validator(mode="after")
    def _fits(self) -> "Settings":
        if self.max_images_per_request > self.max_pending_images:
            raise ValueError(
                f"max_images_per_request ({self.max_images_per_request}) exceeds max_pending_images "
                f"({self.max_pending_images}): such a request could never be admitted"
            )
        return self
