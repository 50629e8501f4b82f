"""An imported encoder, an ONNX graph without training images of its own: its reference, its images, damaged weights."""

from dataclasses import replace

import onnx
import torch
from torch import nn

from fullrank import Reference
from models.artifact import Artifact, Canary, Graph
from models.backbones import Encoder
from models.embedder import Embedder
from models.preprocess import prepare_arrays
from models.references import embedded, in_chunks, synthetic_canary
from training.data import SOURCES, ImageSet


def images_of_source(artifact: Artifact, source: str, split: str, count: int) -> ImageSet:
    """The first images of a data set's split, sized as the encoder takes them."""
    images = SOURCES[source].read(SOURCES[source].default, split)
    assert isinstance(images, ImageSet)
    chosen = images.take(slice(0, count))
    return replace(chosen, images=torch.from_numpy(prepare_arrays(chosen.images, artifact.card.preprocessing)))


def referenced(artifact: Artifact, source: str, count: int) -> Artifact:
    """With a reference from the first training images of a data set, and the synthetic canary that users get."""
    images = images_of_source(artifact, source, "train", count)
    embedder = Embedder(artifact)
    preprocessing = artifact.card.preprocessing
    rows, inputs = embedded(in_chunks(images.images, preprocessing), embedder)
    canary = synthetic_canary(preprocessing)
    expected, _ = embedded(in_chunks(canary, preprocessing), embedder)
    reference = Reference.build(rows, canary=expected, labels=images.labels, inputs=inputs)
    return replace(artifact, reference=reference, canary=Canary(canary, expected, ""))


class GraphWeights(Encoder):
    """The weights of a graph, in the order in which its nodes use them, to be changed as a module's."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        used = (name for node in onnx.load_model_from_string(graph.model).graph.node for name in node.input)
        self.names = [name for name in dict.fromkeys(used) if name in graph.weights]
        self.kept = nn.ParameterList(nn.Parameter(graph.weights[name].clone(), False) for name in self.names)

    def of(self, graph: Graph) -> Graph:
        """The graph with these weights as they are now."""
        changed = {name: weight.detach() for name, weight in zip(self.names, self.kept, strict=True)}
        return replace(graph, weights={**graph.weights, **changed})
