"""The format a step computes in: auto's choice, float32 as no autocast at all, a run that keeps what it began in."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from models.artifact import load
from tests.support.training import OPTIONS, TINY
from training import checkpoint, precision
from training.data import SAMPLE, load_split
from training.finetune import supervised
from training.loop import Run, Trainer, TrainingError, train
from training.precision import Precision
from training.recipes import Recipe, recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def small() -> Recipe:
    settings = {"architecture": TINY, "options": OPTIONS["directclr"], "epochs": 2, "learning_rate": 0.05}
    return replace(recipe("fashion-directclr"), **settings)  # type: ignore[arg-type]


def trainer(numbers: Precision) -> Trainer:
    chosen = small()
    return Trainer(chosen, load_split("fashion", SAMPLE, chosen.held_out, None, chosen.seed), numbers=numbers)


def has(monkeypatch: pytest.MonkeyPatch, *instructions: str) -> None:
    monkeypatch.setattr(precision, "cpu_instructions", lambda: set(instructions))


@pytest.mark.parametrize(
    ("instructions", "chosen"),
    [
        ((), "float32"),
        (("avx2", "avx512_f", "avx512_vnni"), "float32"),
        (("avx2", "avx512_bf16"), "bfloat16"),
        (("amx_bf16", "amx_tile"), "bfloat16"),
        (("amx_tile", "amx_int8", "avx512_fp16"), "float32"),
    ],
)
def test_auto_on_a_processor_is_bfloat16_only_where_it_multiplies_in_it(
    instructions: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, *instructions)
    assert precision.choose("auto", CPU) == chosen


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float16")])
def test_auto_on_a_card_is_a_half_format_that_it_does_not_emulate(
    native: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision.choose("auto", CUDA) == chosen


def test_what_is_asked_for_is_taken_and_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch)
    assert precision.choose("bfloat16", CPU) == "bfloat16"
    assert precision.choose("float16", CUDA) == "float16"
    assert precision.choose("auto", torch.device("meta")) == "float32"
    with pytest.raises(ValueError, match="float16, which trains on CUDA only, not on cpu: take auto or float32"):
        precision.choose("float16", CPU)
    with pytest.raises(ValueError, match="precision is 'half'; it must be one of auto, float32, bfloat16, float16"):
        precision.choose("half", CPU)  # type: ignore[arg-type]


def test_instructions_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own list and Linux' agree on what the choice rests on."""
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("no /proc/cpuinfo")
    told = precision.cpu_instructions() & precision.CPU_BFLOAT16
    monkeypatch.setattr(torch.cpu, "get_capabilities", None, raising=False)
    assert told == precision.cpu_instructions() & precision.CPU_BFLOAT16


def gradients(numbers: Precision) -> tuple[float, list[torch.Tensor]]:
    """The loss of one step and what it left in every parameter."""
    each = trainer(numbers)
    each.method.train()
    loss = float(each.train_step(each.views(*next(each.feed.batches(0, 0)))))
    return loss, [parameter.detach().clone() for parameter in each.method.parameters()]


def test_float32_is_the_step_without_autocast_to_the_last_bit() -> None:
    """The step written out by hand, with plain torch."""
    loss, left = gradients("float32")
    bare = trainer("float32")
    bare.method.train()
    views = bare.views(*next(bare.feed.batches(0, 0)))
    assert not torch.is_autocast_enabled("cpu")
    expected = bare.method(views)
    expected.backward()
    warm = 1 / round(bare.recipe.epochs * bare.steps_per_epoch * bare.recipe.warmup or 1)
    rate, decay = bare.recipe.learning_rate * min(1.0, warm), bare.recipe.weight_decay
    assert loss == float(expected.detach())
    with torch.no_grad():
        for parameter, after in zip(bare.method.parameters(), left, strict=True):
            assert parameter.grad is not None
            step = parameter.grad + (decay if parameter.ndim > 1 else 0.0) * parameter
            torch.testing.assert_close(after, parameter - rate * step, rtol=1e-6, atol=1e-7)


def test_bfloat16_is_near_float32_and_not_it() -> None:
    (exact, weights), (rounded, others) = gradients("float32"), gradients("bfloat16")
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
    assert all(parameter.dtype == torch.float32 for parameter in others)
    assert any(not torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_fine_tuning_takes_a_format_too(small_artifact: Path) -> None:
    images = load_split("fashion", SAMPLE, 100, None, 0).held_out
    artifact = load(small_artifact)
    found = {
        numbers: supervised(artifact, images, images, epochs=1, frozen=False, batch_size=32, precision=numbers)
        for numbers in ("float32", "bfloat16")
    }
    assert found["bfloat16"].top1 == pytest.approx(found["float32"].top1, abs=0.15)
    with pytest.raises(ValueError, match="float16, which trains on CUDA only"):
        supervised(artifact, images, images, epochs=1, precision="float16")


class Stop(Console):
    """A console that ends the run when the first epoch's line is printed, and keeps what was said."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=400)

    def print(self, *objects: object, **options: object) -> None:  # type: ignore[override]
        super().print(*objects, **options)  # type: ignore[arg-type]
        if "loss" in str(objects[0]):
            raise KeyboardInterrupt


def test_a_resumed_run_keeps_the_format_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun where bfloat16 is not native, resumed where it is: it stays in float32, and another wish is refused."""
    has(monkeypatch)
    console, out = Stop(), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(small(), Run(out, data=SAMPLE), console)
    assert "fashion-directclr on cpu in float32 (what is native here): 2 epochs of" in console.file.getvalue()  # type: ignore[attr-defined]
    has(monkeypatch, "avx512_bf16")
    assert trainer("auto").precision == "bfloat16"
    with pytest.raises(TrainingError, match="began in float32, not bfloat16: --precision float32, or none"):
        train(small(), Run(out, data=SAMPLE, resume=True, precision="bfloat16"), Stop())
    console = Console(file=io.StringIO(), width=400)
    artifact = train(small(), Run(out, data=SAMPLE, resume=True), console)
    assert "in float32" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "resumed at step" in console.file.getvalue()  # type: ignore[attr-defined]
    assert artifact.card.training["precision"] == "float32"
    whole = train(small(), Run(tmp_path / "whole", data=SAMPLE, precision="float32"), Console(file=io.StringIO()))
    assert artifact.card.revision == whole.card.revision


def test_a_run_in_float16_does_not_go_on_where_float16_does_not_train() -> None:
    each = trainer("float32")
    state = each.state([]) | {"precision": "float16"}
    with pytest.raises(TrainingError, match="began in float16 and cannot go on here: precision is float16, which"):
        trainer("auto").restore(state)
    state.pop("precision")  # written before there was a choice
    older = trainer("auto")
    older.restore(state)
    assert older.precision == "bfloat16"


def test_the_scaler_scales_in_float16_alone_and_its_state_is_kept() -> None:
    """On a CPU torch's scaler works too, so that its arithmetic can be seen without a card."""
    assert not precision.scaler("bfloat16", CPU).is_enabled()
    assert not precision.scaler("float32", CPU).is_enabled()
    each = trainer("float32")
    each.scaler = precision.scaler("float16", CPU)
    each.method.train()
    each.train_step(each.views(*next(each.feed.batches(0, 0))))
    plain = gradients("float32")[1]
    for parameter, expected in zip(each.method.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)
    assert each.state([])["scaler"]["scale"] == 65536.0
    assert each.state([])["scaler"]["_growth_tracker"] == 1


def test_a_checkpoint_that_knows_less_of_an_architecture_is_still_of_the_same_run(tmp_path: Path) -> None:
    each, path = trainer("float32"), tmp_path / "checkpoint.pt"
    state = each.state([])
    described = json.loads(state["recipe"])
    described["architecture"] = {
        key: described["architecture"][key] for key in ("name", "width", "in_channels", "stem")
    }
    checkpoint.save(state | {"recipe": json.dumps(described)}, path)
    each.restore(checkpoint.load(path, each.recipe, CPU))
    described["architecture"]["width"] = 5
    checkpoint.save(state | {"recipe": json.dumps(described)}, path)
    with pytest.raises(TrainingError, match=r"is a run with architecture = .*'width': 5"):
        checkpoint.load(path, each.recipe, CPU)
