"""Tells what a refused checkpoint may be instead, by the names in it: a language model, a detector and the like."""

from collections.abc import Mapping

from models.importers.base import Checkpoint

SEGMENTATION = "a segmentation network"
MARKS = {
    "a language model": (
        "embed_tokens",
        "lm_head",
        "wte.weight",
        "h.0.attn.c_attn",
        "word_embeddings",
        "tok_embeddings",
        "SelfAttention.",
    ),
    "a detector": ("rpn.", "roi_heads", "bbox", "fpn.", "anchor", "class_embed.", "detect."),
    "the state of an optimiser": ("param_groups", "exp_avg", "momentum_buffer"),
}


def looks_like(checkpoint: Checkpoint) -> str | None:
    """What other kind of network has such names; None if none is known."""
    tensors = checkpoint.state()
    if any(name.startswith("classifier.") and tensor.ndim == 4 for name, tensor in tensors.items()):
        return SEGMENTATION
    keys = [str(key) for key in checkpoint.content] if isinstance(checkpoint.content, Mapping) else []
    text = " ".join([*tensors, *keys])
    return next((kind for kind, marks in MARKS.items() if any(mark in text for mark in marks)), None)


def after(checkpoint: Checkpoint, family: str) -> str:
    """What else may help after a refusal: what the names look like, and that the family was the user's choice."""
    what = looks_like(checkpoint)
    looks = f". Its names look like those of {what}" if what else ""
    forced = f". It was read as --family {family} says; leave that out, and its names decide"
    return looks + (forced if family != "auto" else "")
