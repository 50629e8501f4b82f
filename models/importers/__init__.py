"""Imports encoders of other libraries: checkpoint -> artifact. Each family (source of weights) has a short file.

A checkpoint is read as data (`checkpoint`). Its family is recognised by its tensors' names, which are then changed to
ours (`layouts`). Depth, width and so on are read from shapes (`geometry`). What shapes do not show is a question, for
which the family has a default. The import is refused if a tensor is missing, or is left without a place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.artifact import CARD, AnyArchitecture, Artifact, EncoderCard, Preprocessing, Source, load
from models.importers import (
    clip,
    dino,
    dinov2,
    fair,
    geometry,
    huggingface,
    lightly_train,
    lightning,
    luckmatters,
    mae,
    moco,
    onnx,
    records,
    simsiam,
    timm,
    torchvision,
)
from models.importers.base import SHOWN, WHOLE, Checkpoint, Family, Found, ImportRefusedError, Questions, Weights
from models.importers.checkpoint import read, record
from models.importers.hints import SEGMENTATION, looks_like
from models.importers.hints import after as hints
from models.importers.loading import loaded, refuse_dead
from models.importers.report import Report

__all__ = ["FAMILIES", "ImportRefusedError", "Options", "Report", "import_encoder"]

# In the order in which they are tried: families with more specific names come first.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        fair.FAMILY,
        moco.FAMILY,
        simsiam.FAMILY,
        dino.FAMILY,
        dinov2.FAMILY,
        luckmatters.FAMILY,
        mae.FAMILY,
        clip.FAMILY,
        lightning.LIGHTLY,
        lightning.SOLO,
        torchvision.FAMILY,
        huggingface.FAMILY,
        timm.FAMILY,
        lightning.STABLE,
        lightly_train.FAMILY,
    )
}
UNLIKE = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
PREPROCESSING = ("size", "to", "resize", "interpolation", "antialias", "centre", "mean", "std", "scale")


@dataclass(frozen=True)
class Options:
    """The user's options for an import; see `fullrank import --help`."""

    family: str = "auto"
    weights: Weights | None = None
    pool: str | None = None
    preprocess: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    licence: str | None = None
    strip: bool = False
    nested_dimensions: tuple[int, ...] = ()


def import_encoder(source: Path, options: Options | None = None) -> tuple[Artifact, Report]:
    """Import the encoder in a checkpoint, a folder, an ONNX file or an artifact. Returns the artifact and a report.

    Raises ImportRefusedError, or ArtifactError for a damaged artifact of ours.
    """
    options = options or Options()
    if options.family not in ("auto", "onnx", "fullrank", *FAMILIES):
        raise ImportRefusedError(
            f"--family {options.family}: choose one of auto, onnx, fullrank, {', '.join(FAMILIES)}"
        )
    if source.is_dir() and (source / CARD).is_file():
        return _ours(source, options)
    questions = Questions(options.settings, options.weights, options.pool)
    if source.suffix == ".onnx" or options.family == "onnx":
        how, origin = _given(options)

        def choose(own: Preprocessing, channels: int) -> Preprocessing:
            return _adjusted(_channels(how or own, channels, questions), questions)

        imported = onnx.read(source, questions, choose, options.pool)
        return _graph(imported, questions, options, origin)
    checkpoint = read(source, options.strip)
    family = _family(checkpoint, options.family)
    given, origin = _given(options)
    try:
        found = family.translate(checkpoint, questions)
        _fitting(found, checkpoint, family, options)
        if given is not None:
            found.preprocessing = given
            found.origin = origin
        architecture, how = _described(found, questions)
        _all_used(questions, options.settings)
        module = loaded(architecture, found)
    except ImportRefusedError as error:
        raise ImportRefusedError(f"{error}{hints(checkpoint, options.family)}") from error
    except UNLIKE as error:  # of tensors that a family's own names never have, or of a config that is none of its
        beside = f", or {', '.join(checkpoint.records)} beside it is damaged" if checkpoint.records else ""
        what = f"names of {family.name}, and shapes that none of its encoders has{beside}"
        raise ImportRefusedError(f"{checkpoint.path} has {what} ({error!r})") from error
    card = EncoderCard(
        name=_name(options.name or (source.stem if source.is_file() else source.name)),
        architecture=architecture,
        preprocessing=how,
        dimension=module.dimension,
        nested_dimensions=_nested(options, module.dimension),
        source=_source(checkpoint, family, found, questions, options),
    )
    artifact = Artifact(card, module)
    refuse_dead(artifact)
    return artifact, Report.of(artifact, checkpoint.left_out, found.dropped)


def _family(checkpoint: Checkpoint, name: str) -> Family:
    if name != "auto":
        if name not in FAMILIES:
            raise ImportRefusedError(f"--family {name}: {checkpoint.path} is no {name} source")
        return FAMILIES[name]
    # timm's ResNets have torchvision's names; its config.json says whose they are, and how to prepare their images.
    if records.is_timm(checkpoint.records.get("config.json")):
        return FAMILIES["timm"]
    for family in FAMILIES.values():
        if family.claims(checkpoint):
            return family
    tensors = checkpoint.state()
    keys = [str(key) for key in checkpoint.content] if isinstance(checkpoint.content, Mapping) else []
    what = looks_like(checkpoint)
    if not tensors:
        if any(name.startswith("torch.nn.modules.") for name in checkpoint.left_out):
            raise ImportRefusedError(f"{checkpoint.path} {WHOLE}")
        raise ImportRefusedError(
            f"{checkpoint.path} holds no tensors by name"
            + (f"; it looks like {what}" if what else f" (it has {', '.join(keys[:SHOWN]) or 'nothing'})")
            + "; give the file with the encoder's weights (a state_dict)"
        )
    raise ImportRefusedError(
        f"{checkpoint.path}: no family knows these names"
        + (f", which look like those of {what}" if what else "")
        + f": {', '.join(list(tensors)[:SHOWN])}. Known are {', '.join(FAMILIES)}; anything else comes through ONNX"
    )


def _fitting(found: Found, checkpoint: Checkpoint, family: Family, options: Options) -> None:
    """Raise ImportRefusedError if the family has no such networks, or the checkpoint has not the weights asked for."""
    if found.kind == "resnet" and family.name in ("mae", "dinov2"):
        raise ImportRefusedError(f"--family {family.name}: its encoders are vision transformers, and this is a ResNet")
    if options.weights is not None and options.weights != (found.weights or "online"):
        raise ImportRefusedError(
            f"--weights {options.weights}: this source has one set of weights; leave --weights out"
        )
    if found.kind == "resnet" and looks_like(checkpoint) == SEGMENTATION:
        raise ImportRefusedError(
            "its convolutional classifier is a segmentation network's, whose ResNet usually strides less and dilates "
            "more, which weights do not show; export its backbone to ONNX and import the .onnx file"
        )


def _given(options: Options) -> tuple[Preprocessing | None, str]:
    if options.preprocess is None:
        return None, ""
    return records.preprocessing(record(options.preprocess), str(options.preprocess)), options.preprocess.name


def _described(found: Found, questions: Questions) -> tuple[AnyArchitecture, Preprocessing]:
    """The architecture and the preprocessing, with one image size. Positions are resampled if that size needs it."""
    how = found.preprocessing
    assert how is not None
    if found.kind == "resnet":
        architecture: AnyArchitecture = geometry.resnet(found, questions)
        return architecture, _adjusted(_channels(how, architecture.in_channels, questions), questions)
    native = geometry.native_size(found.tensors)
    if not found.origin.endswith(".json"):
        # The preprocessing of the family's published models, at this model's size; DINOv2 is rarely used at its 518.
        size = min(native, how.size) if "dinov2" in found.origin.lower() else native
        how = how.model_copy(update={"size": size, "to": round(size * how.target / how.size)})
    how = _adjusted(how, questions)
    architecture = geometry.vit(found, questions, how.size)
    found.tensors["pos_embed"] = geometry.resampled_positions(found, how.size, architecture.patch)
    return architecture, _channels(how, architecture.in_channels, questions)


def _channels(how: Preprocessing, channels: int, questions: Questions) -> Preprocessing:
    """The preprocessing for this number of channels. For one channel, mean and std are averages over the three."""
    if how.channels == channels:
        return how
    changes: dict[str, Any] = {"channels": channels, "fill": how.fill[:channels]}
    changes |= {key: (sum(values) / 3,) for key, values in (("mean", how.mean), ("std", how.std))}
    questions.assumed |= {key: f"{changes[key][0]:.4g}, for its one channel" for key in ("mean", "std")}
    return how.model_copy(update=changes)


def _adjusted(how: Preprocessing, questions: Questions) -> Preprocessing:
    """Apply the user's settings. A size without a `to` keeps their ratio. Raises ImportRefusedError for a bad value."""
    questions.asked |= set(PREPROCESSING)
    given = {key: questions.settings[key] for key in PREPROCESSING if key in questions.settings}
    if not given:
        return how
    values: dict[str, Any] = how.model_dump() | given
    values |= {key: tuple(given[key].split(",")) for key in ("mean", "std") if key in given}
    if "size" in given and "to" not in given and given["size"].isdigit():
        values["to"] = round(int(given["size"]) * how.target / how.size)
    for key in given:
        questions.assumed.pop(key, None)
    checked: Preprocessing = geometry.checked(Preprocessing, values)
    return checked


def _all_used(questions: Questions, settings: Mapping[str, str]) -> None:
    if unused := sorted(set(settings) - questions.asked):
        raise ImportRefusedError(
            f"--set {unused[0]}: nothing asks for it here; this source asks for {', '.join(sorted(questions.asked))}"
        )


def _origin(text: str, options: Options) -> str:
    """The source of the preprocessing, and the values in it that the user set."""
    given = [key for key in PREPROCESSING if key in options.settings]
    return f"{text}; --set {', '.join(given)}" if given else text


def _source(checkpoint: Checkpoint, family: Family, found: Found, questions: Questions, options: Options) -> Source:
    config = checkpoint.records.get("config.json")
    timms = config.get("pretrained_cfg") if isinstance(config, Mapping) else None
    stated = timms.get("license") if isinstance(timms, Mapping) else None
    reasons: dict[str, int] = {}
    for reason in found.dropped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return Source(
        family=family.name,
        file=checkpoint.path.name,
        sha256=checkpoint.sha256,
        licence=options.licence or checkpoint.licence or str(stated or ""),
        weights=found.weights,
        kept=len(found.tensors),
        dropped=reasons,
        assumed=questions.assumed,
        preprocessing=_origin(found.origin, options),
    )


def _graph(imported: onnx.Imported, questions: Questions, options: Options, origin: str) -> tuple[Artifact, Report]:
    _all_used(questions, options.settings)
    recorded = imported.recorded
    origin = origin or ("the file's own record" if recorded else "ImageNet's (256, 224, bilinear)")
    lengths = options.nested_dimensions or (recorded.nested_dimensions if recorded else ())
    options = replace(options, nested_dimensions=lengths)
    source = Source(
        family="onnx",
        file=imported.path.name,
        sha256=imported.sha256,
        licence=options.licence or (recorded.licence if recorded else ""),
        kept=len(imported.graph.weights),
        assumed=questions.assumed,
        preprocessing=_origin(origin, options),
    )
    card = EncoderCard(
        name=_name(options.name or (recorded.name if recorded else imported.path.stem)),
        graph="encoder.onnx",
        preprocessing=imported.preprocessing,
        dimension=imported.dimension,
        nested_dimensions=_nested(options, imported.dimension),
        source=source,
    )
    artifact = Artifact(card, None, graph=imported.graph)
    return artifact, Report.of(artifact, (), {})


def _ours(source: Path, options: Options) -> tuple[Artifact, Report]:
    """Import an artifact of ours, of any schema version. Only its name, licence and nested dimensions may change."""
    for flag, given in (
        ("family", options.family not in ("auto", "fullrank")),
        ("pool", options.pool),
        ("set", options.settings),
    ):
        if given:
            raise ImportRefusedError(f"--{flag}: {source} is an artifact already, whose card says all that")
    artifact = load(source)
    found = artifact.card.source
    origin = found or Source(family="fullrank", file=source.name, sha256=artifact.card.files["encoder.safetensors"])
    changes: dict[str, Any] = {"name": _name(options.name or artifact.card.name)}
    if options.nested_dimensions:
        changes["nested_dimensions"] = _nested(options, artifact.card.dimension)
    if found is not None or options.licence:
        changes["source"] = origin.model_copy(update={"licence": options.licence or origin.licence})
    card = artifact.card.model_copy(update=changes)
    renamed = Artifact(card, artifact.module, artifact.reference, artifact.canary, artifact.graph)
    shown = card.model_copy(update={"source": origin})
    return renamed, Report.of(Artifact(shown, artifact.module, graph=artifact.graph), (), {})


def _nested(options: Options, dimension: int) -> tuple[int, ...]:
    """The nested dimensions that the user names, in ascending order. Raises ImportRefusedError."""
    lengths = tuple(sorted(set(options.nested_dimensions)))
    if lengths and not 1 <= lengths[0] <= lengths[-1] <= dimension:
        raise ImportRefusedError(
            f"--nested-dimensions {','.join(map(str, lengths))}: they lie between 1 and the embedding's {dimension}"
        )
    return lengths


def _name(text: str) -> str:
    """Turn text into a name that a card accepts."""
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in text)
    return kept.lstrip("._-")[:64] or "encoder"
