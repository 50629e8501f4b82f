"""Reads the encoder in a run's checkpoint as an artifact, to export it before the run has ended or after it failed."""

import json
from pathlib import Path

from models.artifact import Artifact, EncoderCard
from training.checkpoint import TrainingError, describe, how, precision_of, read, recipe_of, refused, settings_of
from training.data import SOURCES
from training.plugins import OwnArchitecture, PluginError, brought

PREFIX = "encoder."


def artifact_of(path: Path) -> Artifact:
    """The encoder at the checkpoint's step, without a reference. Raises TrainingError if it is no such file,
    PluginError if no plugin in this process brings the backbone or the data set that it was trained with."""
    try:
        state = read(path, mmap=True)
        recipe = recipe_of(json.loads(state["recipe"]))
        source = brought("data set", recipe.data, SOURCES)
        encoder = recipe.architecture.build()
        own = {name.removeprefix(PREFIX): it for name, it in state["method"].items() if name.startswith(PREFIX)}
        encoder.load_state_dict(own)
        progress = {"checkpoint_step": int(state["step"])} | how(settings_of(state), precision_of(state))
    except (OSError, PluginError):
        raise
    except Exception as error:
        reason = f"{refused(path, error)}; a run writes checkpoint.pt"
        raise TrainingError(reason) from error
    architecture = None if isinstance(recipe.architecture, OwnArchitecture) else recipe.architecture
    card = EncoderCard(
        name=recipe.name,
        architecture=architecture,
        graph="encoder.onnx" if architecture is None else None,
        preprocessing=source.sized(recipe.image_size),
        dimension=encoder.dimension,
        training=describe(recipe) | progress,
    )
    return Artifact(card, encoder.eval().requires_grad_(False))
