"""Reads the encoder in a run's checkpoint as an artifact, to export it before the run has ended or after it failed."""

import json
from pathlib import Path

import torch
from pydantic import TypeAdapter

from models.artifact import AnyArchitecture, Artifact, EncoderCard
from training.checkpoint import TrainingError
from training.data import SOURCES

PREFIX = "encoder."


def artifact_of(path: Path) -> Artifact:
    """The encoder at the checkpoint's step, without a reference. Raises TrainingError if it is no such file."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        recipe = json.loads(state["recipe"])
        architecture: AnyArchitecture = TypeAdapter(AnyArchitecture).validate_python(recipe["architecture"])
        encoder = architecture.build()
        own = {name.removeprefix(PREFIX): it for name, it in state["method"].items() if name.startswith(PREFIX)}
        encoder.load_state_dict(own)
        preprocessing = SOURCES[recipe["data"]].sized(recipe.get("image_size"))
        step = int(state["step"])
    except OSError:
        raise
    except Exception as error:  # on damaged bytes torch may raise any exception
        reason = f"{path} is damaged, or no checkpoint of this version ({error}); a run writes checkpoint.pt"
        raise TrainingError(reason) from error
    card = EncoderCard(
        name=recipe["name"],
        architecture=architecture,
        preprocessing=preprocessing,
        dimension=encoder.dimension,
        training=recipe | {"checkpoint_step": step},
    )
    return Artifact(card, encoder.eval().requires_grad_(False))
