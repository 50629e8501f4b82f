"""Each family's way of wrapping an encoder, by its published layout: the encoder comes out, the rest is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.backbones import Encoder, ResNet, ViT
from models.importers import ImportRefusedError, Options, import_encoder

State = dict[str, Tensor]


def randomised(module: Encoder, seed: int) -> Encoder:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.01)
    return module.eval()


def resnet(seed: int = 0, name: Any = "resnet18", **options: Any) -> Encoder:
    return randomised(ResNet(name, **({"width": 4} | options)), seed)


def vit(seed: int = 0, **options: Any) -> Encoder:
    sizes: dict[str, Any] = {"size": 32, "patch": 16, "width": 16, "depth": 2, "heads": 1, "hidden": 32}
    return randomised(ViT(**(sizes | options)), seed)


def below(prefix: str, module: Encoder) -> State:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def published(module: Encoder) -> State:
    """A vision transformer's tensors as FAIR publishes them: one position for the class token, here of zeros."""
    state = dict(module.state_dict())
    state["pos_embed"] = torch.cat([torch.zeros_like(state["pos_embed"][:, :1]), state["pos_embed"]], 1)
    return state


def head(prefix: str) -> State:
    return {f"{prefix}0.weight": torch.ones(3, 3), f"{prefix}0.bias": torch.ones(3)}


def sequential(module: Encoder, first: int, shortcut: bool) -> State:
    """lightly's numbering: stem 0 and 1, layers from `first` on."""
    names = {"conv1.": "0.", "bn1.": "1."} | {f"layer{i}.": f"{first + i - 1}." for i in range(1, 5)}
    state = {}
    for name, tensor in module.state_dict().items():
        part = next(part for part in names if name.startswith(part))
        new = names[part] + name[len(part) :]
        state["backbone." + (new.replace("downsample", "shortcut") if shortcut else new)] = tensor
    return state


WRAPPED: dict[str, tuple[Encoder, Callable[[Encoder], Any], str, set[str]]] = {
    "fair": (
        resnet(),
        lambda m: {"epoch": 1, "model": below("module.backbone.", m) | head("module.projector.") | head("module.bn.")},
        "fair",
        {"the projector", "the projector's last normalisation"},
    ),
    "directclr": (
        resnet(),
        lambda m: {"backbone": m.state_dict(), "head": {"weight": torch.ones(2, 2)}},
        "fair",
        {"the head behind the representation"},
    ),
    "directclr training": (
        resnet(),
        lambda m: {"model": below("module.backbone.", m) | head("module.online_head.") | head("module.projector.")},
        "fair",
        {"the projector", "the online classifier"},
    ),
    "vicreg x2": (resnet(width=8), lambda m: m.state_dict(), "torchvision", set()),
    "simsiam": (
        resnet(),
        lambda m: {"state_dict": below("module.encoder.", m) | head("module.encoder.fc.") | head("module.predictor.")},
        "simsiam",
        {"the projector", "the predictor"},
    ),
    "moco": (
        resnet(),
        lambda m: {
            "state_dict": below("module.encoder_q.", m)
            | head("module.encoder_q.fc.")
            | below("module.encoder_k.", resnet(1))
            | {"module.queue": torch.ones(2, 2), "module.queue_ptr": torch.ones(1)}
        },
        "moco",
        {"the projector", "the momentum encoder", "the queue of negatives"},
    ),
    "moco v3": (
        vit(positions="sincos"),
        lambda m: {
            "state_dict": {f"module.base_encoder.{k}": v for k, v in published(m).items()}
            | head("module.base_encoder.head.")
            | head("module.momentum_encoder.head.")
            | head("module.predictor.")
        },
        "moco",
        {"the projector", "the momentum encoder", "the predictor"},
    ),
    "dino": (
        vit(),
        lambda m: {
            "student": {f"module.backbone.{k}": v for k, v in published(vit(1)).items()},
            "teacher": {f"backbone.{k}": v for k, v in published(m).items()} | head("head.mlp."),
        },
        "dino",
        {"the projection head"},
    ),
    "mae": (
        vit(),
        lambda m: {"model": published(m) | {"mask_token": torch.ones(1), "decoder_pos_embed": torch.ones(1, 1, 1)}},
        "mae",
        {"the decoder", "the decoder's token"},
    ),
    "luckmatters": (
        resnet(stem="3x3"),
        lambda m: {
            "online_network_state_dict": below("encoder.", m) | head("projetion.net."),
            "target_network_state_dict": below("encoder.", resnet(1, stem="3x3")),
            "predictor_state_dict": head("layer."),
        },
        "luckmatters",
        {"the projector", "the ema network", "the predictor"},
    ),
    "solo-learn": (
        resnet(stem="3x3+2"),
        lambda m: {
            "state_dict": below("backbone.", m)
            | head("projector.")
            | below("momentum_backbone.", resnet(1, stem="3x3"))
            | {"classifier.weight": torch.ones(2, 2)}
        },
        "solo-learn",
        {"the projector", "the momentum network", "the online classifier"},
    ),
    "lightly example": (
        resnet(),
        lambda m: {"state_dict": sequential(m, 4, False) | head("projection_head.layers.")},
        "lightly",
        {"the projector"},
    ),
    "lightly benchmark": (
        resnet(stem="3x3", stem_relu=False),
        lambda m: {"state_dict": sequential(m, 2, True) | head("prediction_head.layers.")},
        "lightly",
        {"the predictor"},
    ),
    "lightly imagenet": (
        resnet(),
        lambda m: {
            "state_dict": below("backbone.", m) | head("projection_head.") | below("teacher_backbone.", resnet(1))
        },
        "lightly",
        {"the projector", "the momentum network"},
    ),
    "stable-pretraining": (
        vit(),
        lambda m: {
            "state_dict": {f"backbone.{k}": v for k, v in published(m).items()} | head("callbacks_modules.probe.")
        },
        "stable-pretraining",
        {"a probe"},
    ),
    "compiled": (resnet(name="resnet50"), lambda m: below("_orig_mod.module.", m), "torchvision", set()),
    "our own": (vit(layer_scale=True, registers=2), lambda m: m.state_dict(), "timm", set()),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_encoder_comes_out_of_its_wrapping(name: str, tmp_path: Path) -> None:
    encoder, wrap, family, reasons = WRAPPED[name]
    torch.save(wrap(encoder), tmp_path / "checkpoint.pth")
    artifact, report = import_encoder(
        tmp_path / "checkpoint.pth", Options(settings={"heads": "1"} if name == "moco v3" else {})
    )
    assert report.family == family
    assert set(report.dropped) == reasons
    theirs, ours = encoder.state_dict(), artifact.encoder.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    size = artifact.card.preprocessing.size
    x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if name != "dino":  # whose positions of 32 pixels stay, as its size does
            torch.testing.assert_close(artifact.encoder(x), encoder(x))


def test_the_moving_average_is_taken_when_it_is_asked_for(tmp_path: Path) -> None:
    for name, default in (("moco", "online"), ("dino", "ema"), ("luckmatters", "online"), ("solo-learn", "online")):
        _, wrap, _, _ = WRAPPED[name]
        torch.save(wrap(WRAPPED[name][0]), tmp_path / "c.pth")
        found = {which: import_encoder(tmp_path / "c.pth", Options(weights=which))[0] for which in ("online", "ema")}  # type: ignore[arg-type]
        usual, report = import_encoder(tmp_path / "c.pth")
        assert report.weights == default
        assert "--weights chooses" in report.assumed["weights"]
        first = [next(iter(it.encoder.parameters())) for it in (found["online"], found["ema"], usual)]
        assert not torch.equal(first[0], first[1])
        assert torch.equal(first[2], first[0 if default == "online" else 1])
    torch.save(resnet().state_dict(), tmp_path / "c.pth")
    _artifact, report = import_encoder(tmp_path / "c.pth")
    torch.save({"state_dict": WRAPPED["simsiam"][1](resnet())["state_dict"]}, tmp_path / "c.pth")
    with pytest.raises(ImportRefusedError, match="--weights ema"):
        import_encoder(tmp_path / "c.pth", Options(family="moco", weights="ema"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "resnet34"}, "resnet34"),
        ({"name": "resnet101", "width": 2}, "resnet101"),
        ({"name": "resnet50", "width": 2, "wide": 2}, "resnet50"),
        ({"name": "resnet50", "width": 4, "wide": 2, "groups": 4}, "resnet50"),
    ],
)
def test_geometry_is_read_from_the_shapes(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    encoder = resnet(**options)
    torch.save(encoder.state_dict(), tmp_path / "c.pth")
    artifact, report = import_encoder(tmp_path / "c.pth")
    assert report.architecture == named
    for key, value in options.items():
        assert getattr(artifact.card.architecture, key) == value


def test_what_the_weights_do_not_say_is_asked_and_answered(tmp_path: Path) -> None:
    torch.save({"model": published(vit(heads=1))}, tmp_path / "c.pth")
    artifact, report = import_encoder(tmp_path / "c.pth")
    assert report.assumed["heads"] == "1"
    assert "pool" in import_encoder(tmp_path / "c.pth", Options(family="mae"))[1].assumed
    settings = {"heads": "4", "activation": "quick_gelu", "size": "64", "mean": "0,0,0", "std": "1,1,1"}
    artifact, report = import_encoder(tmp_path / "c.pth", Options(settings=settings, pool="cls+mean"))
    architecture = artifact.card.architecture
    assert (architecture.heads, architecture.activation, architecture.pool) == (4, "quick_gelu", "class+mean")  # type: ignore[union-attr]
    assert artifact.card.dimension == 32
    assert (artifact.card.preprocessing.size, artifact.card.preprocessing.mean) == (64, (0.0, 0.0, 0.0))
    assert artifact.encoder.state_dict()["pos_embed"].shape == (1, 16, 16)
    assert "heads" not in report.assumed
    for settings, message in (
        ({"heads": "many"}, "--set heads=many: give a number"),
        ({"heads": "3"}, "no multiple of heads"),
        ({"activation": "relu"}, "choose one of gelu"),
        ({"size": "50"}, "no multiple of patch"),
        ({"colour": "blue"}, "--set colour: nothing asks for it here"),
        ({"std": "0,0,0"}, "std must be positive"),
    ):
        with pytest.raises(ImportRefusedError, match=message):
            import_encoder(tmp_path / "c.pth", Options(settings=settings))


def test_a_folder_with_a_model_card_says_its_licence(tmp_path: Path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n")
    artifact, report = import_encoder(tmp_path)
    assert report.licence == "apache-2.0"
    source = artifact.card.source
    assert source is not None
    assert source.sha256 == report.sha256
    assert len(report.sha256) == 64
    assert import_encoder(tmp_path, Options(licence="MIT"))[1].licence == "MIT"


def test_old_batch_norms_have_no_count_and_half_precision_becomes_single(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in resnet().state_dict().items()}
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "c.pth")
    encoder = import_encoder(tmp_path / "c.pth")[0].encoder
    assert {it.dtype for it in encoder.parameters()} == {torch.float32}


def test_a_timm_record_beside_a_resnet_says_whose_it_is(tmp_path: Path) -> None:
    """timm's ResNets have torchvision's names. Only config.json tells that their images are prepared otherwise."""
    torch.manual_seed(0)
    save_file(ResNet("resnet18", width=8).state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.95}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    artifact, report = import_encoder(tmp_path)
    assert report.family == "timm"
    assert report.preprocessing_from == "config.json"
    how = artifact.card.preprocessing
    assert (how.size, how.to, how.resize, how.interpolation) == (64, 67, "short", "bicubic")  # floor(64 / 0.95)
