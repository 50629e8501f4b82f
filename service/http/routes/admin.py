"""POST /admin/encoders puts another encoder in service, PUT /admin/references/MODEL another reference."""

from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from models.card import NAME
from service.http.access import Administering
from service.http.context import service_of
from service.http.routes import operations
from service.http.routes.schemas import KEY
from service.http.routes.schemas_watching import REFERENCE_BODY, REFERENCE_RESPONSES, SWAP_RESPONSES

router = APIRouter(tags=["administration"], route_class=Administering)


class SwapBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"name": "fashion-byol", "gate": "enforce"}}
    )

    name: str = Field(
        pattern=f"^{NAME}$",
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


class Referenced(BaseModel):
    """A reference as it was stored, and what it can do."""

    model: str
    dimension: int
    rows: int = Field(description="Rows that gave its figures.")
    calibrated: bool = Field(description="Whether its thresholds are those of its own healthy traffic.")
    inputs: bool = Field(description="Whether it knows its inputs.")
    canary: int = Field(description="Canary images it has embeddings of.")


ModelName = Annotated[str, Path(pattern=f"^{NAME}$", description="A model's name at POST /observe.")]


@router.put("/admin/references/{model}", responses=REFERENCE_RESPONSES, openapi_extra=REFERENCE_BODY)
async def reference(request: Request, model: ModelName) -> Referenced:
    """Store the reference with which rows of this model from POST /observe are compared, from now on.

    The body is what `save_file(reference.tensors(), ...)` writes. The model's windows begin anew.
    """
    found = await service_of(request).sidecar.put_reference(model, await request.body())
    return Referenced(
        model=model,
        dimension=found.dimension,
        rows=found.rows,
        calibrated=found.calibration is not None,
        inputs=found.inputs is not None,
        canary=0 if found.canary is None else len(found.canary),
    )


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
