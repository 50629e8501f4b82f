"""What is no encoder, or no data, is refused with its reason, and nothing that it holds is run."""

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.backbones import ResNet
from models.importers import ImportRefusedError, Options, import_encoder

State = dict[str, Tensor]


def resnet(**options: Any) -> State:
    torch.manual_seed(0)
    return ResNet("resnet18", **({"width": 4} | options)).state_dict()


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


class Exploit:
    """Unpickled as code, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Write a ResNet with one tensor of another kind."""

    def write(path: Path) -> None:
        state = resnet()
        torch.save(state | {name: change(state[name])}, path)

    return write


def packed(path: Path, bomb: str) -> None:
    """Write a checkpoint with one member of 64 MB of zeros, packed to 64 kB."""
    torch.save(resnet(), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(1 << 26) if name.endswith(bomb) else content)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a language model": (
        lambda p: torch.save({"model.embed_tokens.weight": torch.ones(9, 3), "lm_head.weight": torch.ones(9, 3)}, p),
        "look like those of a language model",
    ),
    "a detector": (
        lambda p: torch.save({"rpn.head.conv.weight": torch.ones(2), "roi_heads.box.weight": torch.ones(2)}, p),
        "look like those of a detector",
    ),
    "the state of an optimiser": (
        lambda p: torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}, p),
        "looks like the state of an optimiser",
    ),
    "numbers": (lambda p: torch.save([1, 2, 3], p), "holds no tensors by name"),
    "one tensor": (lambda p: torch.save(torch.ones(3), p), "holds no tensors by name"),
    "empty": (lambda p: p.write_bytes(b""), "it is empty"),
    "text": (lambda p: p.write_text("<html>404</html>"), "neither a safetensors file nor one that torch.save wrote"),
    "truncated": (
        lambda p: (torch.save(resnet(), p), p.write_bytes(p.read_bytes()[:-3000])),
        "truncated or damaged",
    ),
    "truncated safetensors": (
        lambda p: (save_file(resnet(), p), p.write_bytes(p.read_bytes()[:-3000])),
        "truncated or damaged",
    ),
    "a tensor is missing": (
        lambda p: torch.save(without(resnet(), "layer4.1.bn2.weight"), p),
        r"1 are missing, such as layer4\.1\.bn2\.weight",
    ),
    "another ResNet's": (
        lambda p: torch.save(resnet() | {"layer1.0.se.fc.weight": torch.ones(2)}, p),
        r"1 have no place in it, such as layer1\.0\.se\.fc\.weight",
    ),
    "another shape": (
        lambda p: torch.save(resnet() | {"layer2.0.bn1.bias": torch.ones(5)}, p),
        r"1 have another shape, such as layer2\.0\.bn1\.bias \(5,\), not \(8,\)",
    ),
    "not finite": (
        lambda p: torch.save(resnet() | {"bn1.bias": torch.full((4,), torch.nan)}, p),
        "bn1.bias holds values that are not finite",
    ),
    "collapsed": (
        lambda p: torch.save({k: torch.zeros_like(v) for k, v in resnet().items()}, p),
        "gives every image the same embedding",
    ),
    "a number for a vector": (
        lambda p: torch.save(resnet() | {"bn1.weight": torch.tensor(1.0)}, p),
        r"1 have another shape, such as bn1\.weight \(\), not \(4,\)",
    ),
    "complex": (
        changed("conv1.weight", lambda it: it.to(torch.complex64)),
        r"conv1\.weight is of type torch\.complex64",
    ),
    "integers": (changed("conv1.weight", lambda it: it.to(torch.int8)), r"conv1\.weight is of type torch\.int8"),
    "float8": (changed("conv1.weight", lambda it: it.to(torch.float8_e4m3fn)), r"is of type torch\.float8_e4m3fn"),
    "sparse": (
        changed("conv1.weight", lambda it: it.to_sparse()),
        r"conv1\.weight is sparse",
    ),
    "without values": (
        changed("conv1.weight", lambda it: it.to("meta")),
        r"conv1\.weight is on the meta device",
    ),
    "a strange patch embedding": (
        lambda p: torch.save(
            {"cls_token": torch.tensor(1.0), "pos_embed": torch.tensor(2.0), "patch_embed.proj.weight": torch.ones(3)}
            | {"blocks.0.attn.qkv.weight": torch.tensor(1.0)},
            p,
        ),
        "has names of timm, and shapes that none of its encoders has",
    ),
    "half a gated layer": (
        lambda p: torch.save(
            {
                "embeddings.cls_token": torch.ones(1, 1, 4),
                "embeddings.patch_embeddings.projection.weight": torch.ones(4, 3, 2, 2),
                "encoder.layer.0.mlp.gate_proj.weight": torch.ones(8, 4),
            },
            p,
        ),
        r"has names of huggingface, and shapes that none of its encoders has.*blocks\.0\.mlp\.up_proj\.weight",
    ),
    "a packed storage": (lambda p: packed(p, "/data/0"), r"data/0 unpacks from \d+ to 67108864 bytes"),
    "a packed pickle": (lambda p: packed(p, "data.pkl"), r"data\.pkl unpacks from \d+ to 67108864 bytes"),
    "depth unknown": (
        lambda p: torch.save({k: v for k, v in resnet().items() if "layer4.1" not in k}, p),
        r"a ResNet of \(2, 2, 2, 1\) blocks",
    ),
    "a segmentation network": (
        lambda p: torch.save(
            {"backbone." + k: v for k, v in resnet().items()} | {"classifier.0.weight": torch.ones(2, 32, 3, 3)}, p
        ),
        "is a segmentation network's.*export its backbone to ONNX",
    ),
    "a detector with a known backbone": (
        lambda p: torch.save(
            {"backbone.body." + k: v for k, v in resnet().items()} | {"rpn.head.conv.weight": torch.ones(2)}, p
        ),
        r"anything else comes through ONNX.*look like those of a detector",
    ),
    "stem unknown": (
        lambda p: torch.save(resnet() | {"conv1.weight": torch.ones(4, 3, 5, 5)}, p),
        "its first convolution is 5 x 5",
    ),
    "CLIP's ResNet": (
        lambda p: torch.save({"visual." + k: v for k, v in resnet().items()}, p),
        "CLIP's own ResNet with attention pooling",
    ),
    "rotary positions": (
        lambda p: torch.save(
            {"patch_embed.proj.weight": torch.ones(4, 3, 2, 2), "blocks.0.attn.qkv.weight": torch.ones(12, 4)}, p
        ),
        "names of its 2 tensors are those of no ResNet or vision transformer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    write, message = REFUSED[name]
    write(tmp_path / "c.pth")
    with pytest.raises(ImportRefusedError, match=message):
        import_encoder(tmp_path / "c.pth")
    with pytest.raises(ImportRefusedError):
        import_encoder(tmp_path / "c.pth", Options(strip=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet18", "pretrained_cfg": "a1_in1k"}, "config.json: this preprocessing cannot be read"),
        ([1], "or config.json beside it is damaged"),
    ],
)
def test_a_record_of_another_form_is_refused(config: object, message: str, tmp_path: Path) -> None:
    names = {"conv1.weight": "embedder.embedder.convolution.weight"} if config == [1] else {}
    save_file({names.get(name, name): tensor for name, tensor in resnet().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportRefusedError, match=message):
        import_encoder(tmp_path)


def test_a_shard_without_names_is_refused(tmp_path: Path) -> None:
    torch.save(resnet(), tmp_path / "a.bin")
    torch.save([torch.ones(2)], tmp_path / "b.bin")
    index = {"weight_map": {"conv1.weight": "a.bin", "fc.weight": "b.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ImportRefusedError, match=r"b\.bin holds no tensors by name, though pytorch_model.bin.index"):
        import_encoder(tmp_path)


def test_a_wrong_family_is_refused(tmp_path: Path) -> None:
    torch.save(resnet(), tmp_path / "c.pth")
    for family in ("moco", "simsiam", "open_clip", "luckmatters", "huggingface"):
        with pytest.raises(ImportRefusedError):
            import_encoder(tmp_path / "c.pth", Options(family=family))
    with pytest.raises(ImportRefusedError, match="--family resnet: choose one of auto"):
        import_encoder(tmp_path / "c.pth", Options(family="resnet"))
    for family in ("mae", "dinov2"):
        with pytest.raises(ImportRefusedError, match=f"--family {family}: its encoders are vision transformers"):
            import_encoder(tmp_path / "c.pth", Options(family=family))
    with pytest.raises(ImportRefusedError, match=r"below encoder_q.*read as --family moco says; leave that out"):
        import_encoder(tmp_path / "c.pth", Options(family="moco"))
    with pytest.raises(ImportRefusedError, match="--weights ema: this source has one set of weights"):
        import_encoder(tmp_path / "c.pth", Options(weights="ema"))
    assert import_encoder(tmp_path / "c.pth", Options(weights="online"))[1].kept == 120
    with pytest.raises(ImportRefusedError, match="--pool cls: a ResNet's"):
        import_encoder(tmp_path / "c.pth", Options(pool="cls"))


def test_nobody_is_told_to_run_a_file_s_code(tmp_path: Path) -> None:
    """torch's own error says that loading without `weights_only` will likely succeed."""
    path = tmp_path / "c.pth"
    path.write_bytes(pickle.dumps({"state_dict": {}}, protocol=4))
    with pytest.raises(ImportRefusedError, match="cannot be read as tensors: Weights only load failed") as refused:
        import_encoder(path)
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_are_named_and_left_out_and_code_is_not_run(legacy: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = {
        "state_dict": resnet(),
        "hyper_parameters": SimpleNamespace(lr=0.1, inner=argparse.Namespace(a=[1])),
        "callbacks": {"x": Exploit(trace)},
    }
    path = tmp_path / "c.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ImportRefusedError, match=r"types\.SimpleNamespace|pathlib|cannot be read as tensors|--strip"):
        import_encoder(path)
    artifact, report = import_encoder(path, Options(strip=True))
    assert "types.SimpleNamespace" in report.left_out
    assert not trace.exists()
    for name, tensor in resnet().items():
        assert torch.equal(artifact.encoder.state_dict()[name], tensor)


def test_the_blocked_objects_are_named_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"state_dict": resnet(), "config": SimpleNamespace(a=1)}, tmp_path / "c.ckpt")
    with pytest.raises(ImportRefusedError, match=r"more than tensors and containers: types\.SimpleNamespace.*--strip"):
        import_encoder(tmp_path / "c.ckpt")


def test_a_whole_module_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(ResNet("resnet18", width=4), tmp_path / "c.pth")
    with pytest.raises(ImportRefusedError, match=r"more than tensors and containers: .*torch\.nn\.modules"):
        import_encoder(tmp_path / "c.pth")
    with pytest.raises(ImportRefusedError, match=r"holds a pickled module.*save module\.state_dict\(\)"):
        import_encoder(tmp_path / "c.pth", Options(strip=True))


def test_hostile_pickles_do_nothing_and_end(tmp_path: Path) -> None:
    """Bare pickles, views outside their storage, containers of stubs, deep nesting."""
    trace = tmp_path / "trace"
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps({"x": Exploit(trace)}, protocol=2))
    outside = tmp_path / "outside.pth"
    torch.save({"conv1.weight": torch.ones(4)}, outside)
    with zipfile.ZipFile(outside) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for strip in (False, True):
        with pytest.raises(ImportRefusedError):
            import_encoder(bare, Options(strip=strip))
    record = next(name for name in members if name.endswith("data/0"))
    with zipfile.ZipFile(outside, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:4] if name == record else data)
    with pytest.raises(ImportRefusedError, match="truncated or damaged"):
        import_encoder(outside, Options(strip=True))
    deep: Any = []
    for _ in range(150):
        deep = [deep]
    torch.save({"state_dict": resnet(), "deep": deep}, bare)
    assert import_encoder(bare, Options(strip=True))[1].kept == 120
    assert not trace.exists()


def test_a_container_that_holds_itself_many_times_is_walked_once(tmp_path: Path) -> None:
    """Forty levels of two references each: 2^40 paths. And one that holds itself."""
    content: dict[str, Any] = {"w": torch.ones(2)}
    for _ in range(40):
        content = {"a": content, "b": content, "c": [content, content]}
    content["itself"] = content
    torch.save(content, tmp_path / "c.pth")
    for strip in (False, True):
        with pytest.raises(ImportRefusedError, match="holds no tensors by name"):
            import_encoder(tmp_path / "c.pth", Options(strip=strip))


def test_an_index_of_another_kind_is_refused(tmp_path: Path) -> None:
    for text in ("[]", '{"weight_map": [1]}', '{"weight_map": {}}', "3"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ImportRefusedError, match="an index names files beside it"):
            import_encoder(tmp_path)


@pytest.mark.parametrize("setting", [("mean", "nan,0,0"), ("std", "inf,1,1"), ("std", "0,1,1"), ("scale", "inf")])
def test_a_normalisation_that_is_no_number_is_refused(setting: tuple[str, str], tmp_path: Path) -> None:
    torch.save(resnet(), tmp_path / "c.pth")
    with pytest.raises(ImportRefusedError, match=r"must be finite numbers|std must be positive"):
        import_encoder(tmp_path / "c.pth", Options(settings=dict([setting])))


def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    for name, source in (("c.pth", "/dev/zero"), ("c.onnx", "/dev/zero"), ("p.pth", ""), ("p.onnx", "")):
        path = tmp_path / name
        path.symlink_to(source) if source else os.mkfifo(path)
        with pytest.raises(ImportRefusedError, match="is no regular file"):
            import_encoder(path)
    torch.save(resnet(), tmp_path / "good.pth")
    with pytest.raises(ImportRefusedError, match="no regular file"):
        import_encoder(tmp_path / "good.pth", Options(preprocess=tmp_path / "p.pth"))


def test_archives_of_programs_are_refused(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    script = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(Doubled()), script)  # type: ignore[no-untyped-call]
    with pytest.raises(ImportRefusedError, match="TorchScript archive, which holds code"):
        import_encoder(script)
    exported = tmp_path / "exported.pt2"
    torch.export.save(torch.export.export(Doubled(), (torch.ones(2),)), exported)
    with pytest.raises(ImportRefusedError, match=r"torch\.export, whose loader may run code"):
        import_encoder(exported)


def test_folders_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(ImportRefusedError, match="does not exist"):
        import_encoder(tmp_path / "nowhere")
    with pytest.raises(ImportRefusedError, match="holds no checkpoint"):
        import_encoder(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save(resnet(), tmp_path / name)
    with pytest.raises(ImportRefusedError, match=r"holds 2 checkpoints \(a\.pth, b\.pth\)"):
        import_encoder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"conv1.weight": "../a.pth"}}')
    with pytest.raises(ImportRefusedError, match="an index names files beside it"):
        import_encoder(tmp_path)
    index.write_text('{"weight_map": {"conv1.weight": "part.safetensors"}}')
    with pytest.raises(ImportRefusedError, match=r"part\.safetensors: missing"):
        import_encoder(tmp_path)
    state = {name: tensor.clone() for name, tensor in resnet().items()}
    half = list(state)[:60]
    save_file({k: state[k] for k in half}, tmp_path / "1.safetensors")
    save_file({k: v for k, v in state.items() if k not in half}, tmp_path / "2.safetensors")
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    assert import_encoder(tmp_path)[1].kept == 120
