"""The encoder's card (encoder.json): architecture, preprocessing, origin, training and measured quality."""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, model_validator

from models.backbones import Encoder
from models.backbones.resnet import Name, ResNet, Stem
from models.backbones.vit import Activation, FinalNorm, Pool, Positions, ViT
from models.preprocess import Preprocessing, Strict

WEIGHTS, GRAPH = "encoder.safetensors", "encoder.onnx"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class Architecture(Strict):
    """A ResNet. Its arguments are those of `models.backbones.resnet.ResNet`."""

    name: Name
    width: int = Field(default=64, ge=1, le=1024)
    in_channels: Literal[1, 3] = 3
    stem: Stem = "7x7"
    wide: int = Field(default=1, ge=1, le=16, description="the 3x3 convolutions of bottlenecks are so many times wider")
    groups: int = Field(default=1, ge=1, le=64, description="of the 3x3 convolutions of bottlenecks")
    stride_first: bool = Field(default=False, description="bottlenecks stride in their first convolution")
    stem_relu: bool = Field(default=True, description="a ReLU follows the stem's normalisation")

    def build(self) -> Encoder:
        return ResNet(**self.model_dump())

    def named(self) -> str:
        return self.name


class ViTArchitecture(Strict):
    """A vision transformer. Its arguments are those of `models.backbones.vit.ViT`."""

    name: Literal["vit"] = "vit"
    size: int = Field(ge=4, le=2048, description="height and width of the input in pixels")
    patch: int = Field(ge=1, le=256)
    width: int = Field(ge=1, le=8192)
    depth: int = Field(ge=1, le=256)
    heads: int = Field(ge=1, le=256)
    hidden: int = Field(ge=1, le=65536, description="width of the hidden layer of each block's MLP")
    in_channels: Literal[1, 3] = 3
    class_token: bool = True
    registers: int = Field(default=0, ge=0, le=64)
    layer_scale: bool = False
    activation: Activation = "gelu"
    positions: Positions = "learned"
    patch_bias: bool = True
    qkv_bias: bool = True
    pre_norm: bool = Field(default=False, description="normalise the tokens before the first block, as CLIP does")
    final_norm: FinalNorm = "tokens"
    eps: float = Field(default=1e-6, gt=0, lt=1)
    pool: Pool = "class"
    projection: int = Field(default=0, ge=0, description="outputs of a linear layer after pooling; 0: none")

    @model_validator(mode="after")
    def _geometry(self) -> "ViTArchitecture":
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is no multiple of patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if "class" in self.pool and not self.class_token:
            raise ValueError(f"pool {self.pool!r} needs a class token")
        return self

    def build(self) -> Encoder:
        return ViT(**self.model_dump(exclude={"name"}))

    def named(self) -> str:
        """The usual name of this geometry, such as vit_small_patch16."""
        sizes = {values: size for size, values in VIT_SIZES.items()}
        size = sizes.get((self.width, self.depth))
        return f"vit_{size}_patch{self.patch}" if size else f"vit_{self.width}x{self.depth}_patch{self.patch}"


AnyArchitecture = Architecture | ViTArchitecture

# Width and depth by name: Dosovitskiy et al. 2021, table 1; tiny and small from DeiT (Touvron et al. 2021), table 1;
# giant from DINOv2 (Oquab et al. 2023), table 16.
VIT_SIZES = {
    "tiny": (192, 12),
    "small": (384, 12),
    "base": (768, 12),
    "large": (1024, 24),
    "huge": (1280, 32),
    "giant": (1536, 40),
}
SMALL_IMAGE = 64  # up to this side a ResNet gets a 3x3 stem


def architecture(name: str, *, size: int, in_channels: Literal[1, 3] = 3, **arguments: Any) -> AnyArchitecture:
    """The architecture called `name`, such as resnet18 or vit_tiny_patch4, for images of size x size pixels.

    A ViT's name is vit_SIZE_patchN with SIZE one of tiny, small, base, large, huge, giant. `arguments` override the
    architecture's. Raises ValueError for an unknown name, or if size is no multiple of the patch.
    """
    if name.startswith("vit_"):
        kind, _, patch = name.removeprefix("vit_").partition("_patch")
        if kind in VIT_SIZES and patch.isdigit() and int(patch) > 0:
            width, depth = VIT_SIZES[kind]
            values = {"width": width, "depth": depth, "heads": width // 64, "hidden": 4 * width, "patch": int(patch)}
            return ViTArchitecture(**({"size": size, "in_channels": in_channels} | values | arguments))
    elif name in Name.__args__:  # type: ignore[attr-defined]
        stem = "3x3" if size <= SMALL_IMAGE else "7x7"
        return Architecture(**({"name": name, "stem": stem, "in_channels": in_channels} | arguments))
    known = ", ".join([*Name.__args__, *(f"vit_{kind}_patchN" for kind in VIT_SIZES)])  # type: ignore[attr-defined]
    raise ValueError(f"unknown architecture {name!r}; known are {known}")


class Source(Strict):
    """The origin of imported weights, and what the import dropped and assumed."""

    family: str
    file: str = Field(description="name of the file or folder")
    sha256: str = Field(description="of the file; of a folder's weights, in the order of their names")
    licence: str = ""
    weights: str = Field(default="", description="which of several sets of weights: online or ema")
    kept: int = Field(default=0, description="tensors")
    dropped: dict[str, int] = Field(default_factory=dict, description="tensors left out, by reason")
    assumed: dict[str, str] = Field(default_factory=dict, description="what the weights do not say, and was assumed")
    preprocessing: str = Field(default="", description="where the preprocessing was read from")


class EncoderCard(Strict):
    schema_version: Literal[1, 2] = 2
    name: str = Field(pattern=f"^{NAME}$")
    architecture: AnyArchitecture | None = Field(default=None, description="absent: the graph is the encoder")
    graph: Literal["encoder.onnx"] | None = None
    preprocessing: Preprocessing
    dimension: int = Field(ge=1)
    nested_dimensions: tuple[int, ...] = Field(
        default=(),
        description="the shorter lengths that training included (Matryoshka): the first so many coordinates"
        " are an embedding by themselves. Empty: none are",
    )
    source: Source | None = None
    training: dict[str, Any] = Field(default_factory=dict, description="method, data, recipe, epochs, seed, command")
    quality: dict[str, Any] = Field(default_factory=dict, description="what was measured, and on what")
    canary_licence: str = Field(default="", description="licence of the canary images")
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of every other file of the folder")

    @property
    def identity(self) -> str:
        """SHA-256, in hexadecimal digits, of everything that determines an image's embedding.

        These are the weights, the preprocessing and the architecture, or the graph if the encoder is a graph only. A
        graph made from the weights is left out: it computes the same.
        """
        # Defaults are left out, so that a field added later does not change the identity.
        described = [
            it.model_dump(mode="json", exclude_defaults=True) if it is not None else self.files[GRAPH]
            for it in (self.architecture, self.preprocessing)
        ]
        return hashlib.sha256(json.dumps([self.files[WEIGHTS], *described], sort_keys=True).encode()).hexdigest()

    @property
    def revision(self) -> str:
        """The first 12 hexadecimal digits of `identity`."""
        return self.identity[:12]

    def is_of(self, identity: str) -> bool:
        """Whether what an artifact's reference or a corpus says of its encoder, identity or revision, is this one's.

        Version 0.1.0 called its encoders (schema version 1) by their weights alone. What it wrote is still taken.
        """
        former = self.files[WEIGHTS] if self.schema_version == 1 else self.identity
        return identity in (self.identity, self.revision, former, former[:12])

    @model_validator(mode="after")
    def _nested(self) -> "EncoderCard":
        if any(not 1 <= it <= self.dimension for it in self.nested_dimensions):
            raise ValueError(f"nested_dimensions must lie between 1 and the dimension {self.dimension}")
        return self

    @model_validator(mode="after")
    def _agree(self) -> "EncoderCard":
        if self.architecture is None:
            if self.graph is None:
                raise ValueError("an encoder needs an architecture or a graph")
            return self
        if self.architecture.in_channels != self.preprocessing.channels:
            raise ValueError("architecture.in_channels and preprocessing.channels differ")
        if isinstance(self.architecture, ViTArchitecture) and self.architecture.size != self.preprocessing.size:
            raise ValueError("architecture.size and preprocessing.size differ")
        return self
