"""Loads translated tensors into our module. Each tensor must have its place, and the module must embed images."""

from typing import Any

import torch
from torch import Tensor

from models.artifact import AnyArchitecture, Artifact
from models.importers.base import SHOWN, Found, ImportRefusedError


def loaded(architecture: AnyArchitecture, found: Found) -> Any:
    """The module with its tensors loaded. Raises ImportRefusedError unless every tensor has its place."""
    with torch.device("meta"):
        module = architecture.build()
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):  # old files lack it, and only training uses it
            found.tensors.setdefault(name, torch.zeros(tensor.shape, dtype=tensor.dtype))
    missing = [name for name in expected if name not in found.tensors]
    surplus = [name for name in found.tensors if name not in expected]
    unlike = [
        f"{name} {tuple(found.tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found.tensors and found.tensors[name].shape != tensor.shape
    ]
    faults = [
        f"{len(names)} {words}, such as {', '.join(names[:SHOWN])}"
        for names, words in ((missing, "are missing"), (unlike, "have another shape"), (surplus, "have no place in it"))
        if names
    ]
    if faults:
        raise ImportRefusedError(
            f"the tensors are not those of {architecture.named()}: {'; '.join(faults)}. Nothing is left to chance: "
            "give the family it comes from (--family), or export it to ONNX and import the .onnx file"
        )
    for name, like in expected.items():
        if like.is_floating_point() and (kind := _no_weights(found.tensors[name])):
            raise ImportRefusedError(f"{name} is {kind}; save the weights as plain floating-point tensors")
    module.load_state_dict({name: _own(found.tensors[name], like) for name, like in expected.items()}, assign=True)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ImportRefusedError(
                f"{name} holds values that are not finite: the training diverged, or the file is damaged"
            )
    return module.eval().requires_grad_(False)


def _no_weights(tensor: Tensor) -> str:
    """Why a tensor holds no floating-point numbers that can be read; empty if it does."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    # Types of one byte are floating-point numbers only beside a scale that lies elsewhere.
    return "" if tensor.is_floating_point() and tensor.itemsize > 1 else f"of type {tensor.dtype}"


def _own(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a tensor in the type and layout of our module, not a view of a larger tensor."""
    tensor = tensor.detach().to(like.dtype).contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


@torch.inference_mode()
def refuse_dead(artifact: Artifact) -> None:
    """Raise ImportRefusedError unless two different images give two different finite rows."""
    how = artifact.card.preprocessing
    noise = torch.randn(2, how.channels, how.size, how.size, generator=torch.Generator().manual_seed(0))
    rows = artifact.encoder(noise)
    if not rows.isfinite().all():
        raise ImportRefusedError("its embeddings are not finite: the weights are damaged, or of another architecture")
    if torch.equal(rows[0], rows[1]):
        raise ImportRefusedError(
            "it gives every image the same embedding: complete collapse, or weights of another architecture"
        )
