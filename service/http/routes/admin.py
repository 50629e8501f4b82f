"""POST /admin/encoders: put another encoder in service without stopping."""

from dataclasses import asdict
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from service.http.access import Administering
from service.http.context import service_of
from service.http.routes import operations
from service.http.routes.schemas import KEY, SWAP_RESPONSES

router = APIRouter(tags=["administration"], route_class=Administering)


class SwapBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"name": "fashion-directclr", "gate": "enforce"}}
    )

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Name of an encoder's folder in FULLRANK_ENCODERS_DIR; never a path.",
    )
    gate: Literal["enforce", "warn", "off"] | None = Field(
        None,
        description="enforce: refuse a collapsed encoder; warn: serve it, compared with the incumbent's reference; "
        "off: just serve it. Default: FULLRANK_GATE.",
    )
    replaces: str | None = Field(
        None,
        description="The encoder to replace. Default: the one of the same name, otherwise the default encoder.",
    )


class Encoder(BaseModel):
    model: str
    revision: str


class Figures(BaseModel):
    """Geometry of the normalised embeddings of the canary images; null if there are too few rows."""

    rows: int
    dimension: int
    participation_ratio: float
    effective_rank: float
    total_variance: float
    dead_fraction: float


class Judged(BaseModel):
    passed: bool
    reason: str
    candidate: Figures | None
    incumbent: Figures | None


class Swapped(BaseModel):
    """The encoder that serves now, the one before, the one that recent traffic is compared with, and the judgement."""

    served: Encoder
    previous: Encoder
    compared_with: Encoder
    judgement: Judged | None


@router.post("/admin/encoders", responses=SWAP_RESPONSES, openapi_extra=KEY)
async def swap(body: SwapBody, request: Request) -> Swapped:
    """Load, warm up and judge an encoder, then serve it with a fresh monitor. On any refusal the old one stays."""
    service = service_of(request)
    done = await service.swap(body.name, body.gate or service.settings.gate, body.replaces)
    return Swapped(
        served=Encoder(model=done.served.name, revision=done.served.revision),
        previous=Encoder(model=done.previous.name, revision=done.previous.revision),
        compared_with=Encoder.model_validate(operations.baseline_of(done.served)),
        judgement=None if done.judgement is None else Judged.model_validate(asdict(done.judgement)),
    )
