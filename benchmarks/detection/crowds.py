"""Changes of who sends what, and faults of the model beneath them, written down and committed before any was run.

The encoder is healthy in the first two groups. Whose fault each case is, and which need not be found (weak), was
decided before the run as well. An older encoder, where a case has one, is the benchmark's `--other`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.detection import pictures
from benchmarks.detection.cases import Bench, Case, Draw, quantised
from fullrank.descriptors import describe
from models.artifact import Artifact
from models.embedder import Embedder
from training.data import ImageSet, load_split

WEAK = (
    "a crawler takes class after class",
    "night, a batch of two classes",
    "a tenth are one tile",
    "a bot's noise, a twentieth",
    "a stale cache answers a tenth",
)
SEASON, FIRST_HALF = (2, 4), (0, 1, 2, 3, 4)  # classes
# Rows a second; and a night in these, 400 seconds: after 300 a window still has the last rows of the day.
NIGHT, NIGHT_ROWS = 1.0, 400


def crowds(bench: Bench, other: Artifact) -> list[Case]:
    """All of them, and healthy traffic."""
    trained = _trained_on(bench)
    cases = [*_traffic(bench), *_harmless(bench, trained), *_model(bench, other, trained)]
    return [*(replace(case, strong=case.name not in WEAK) for case in cases), bench.usual]


def _trained_on(bench: Bench) -> Tensor:
    """Images that the encoder was trained on, two thirds as many as the usual ones."""
    card = bench.artifact.card.training
    fit = load_split(card["data"], None, card["held_out"], None, card["seed"]).fit
    assert isinstance(fit, ImageSet)
    return fit.images[-2 * len(bench.images) // 3 :]


def _beside(bench: Bench, name: str, images: Tensor, share: float) -> Case:
    """A share of the rows are these images (k, c, s, s) uint8, the others the usual ones; the model is healthy."""
    healthy = replace(bench.usual, name=name, kind="traffic", served=bench.embed)
    return replace(_under(bench, healthy, images, share), served=None)


def _under(bench: Bench, case: Case, images: Tensor, share: float) -> Case:
    """A case beneath this share of other images."""
    assert case.served is not None
    k, traffic, generator = len(images), bench.traffic, bench.generator

    def draw(m: int) -> Tensor:
        other = torch.rand(m, generator=generator) < share
        return torch.where(other, torch.randint(k, (m,), generator=generator), traffic.independent(m) + k)

    pool = torch.cat((case.served(images), case.pool))
    inputs = torch.cat((torch.from_numpy(describe(images.numpy())), case.inputs))
    return replace(case, pool=pool, inputs=inputs, draw=draw)


def _turns(bench: Bench, case: Case) -> Case:
    """A case with other images in front of its pool: these and the usual ones alternate every 64 rows, 3.2 seconds."""
    k = len(case.pool) - len(bench.clean)

    def draw(m: int) -> Tensor:
        return bench.traffic.independent(m) % k + k * (torch.arange(m) // 64 % 2)

    return replace(case, draw=draw)


def _of(bench: Bench, classes: tuple[int, ...]) -> Draw:
    """Rows of these classes alone, alike."""
    return lambda m: bench.traffic.of(
        torch.tensor(classes)[torch.randint(len(classes), (m,), generator=bench.generator)]
    )


def _season(bench: Bench) -> Draw:
    """Within 2 minutes nine rows of ten are of two classes."""

    def draw(m: int) -> Tensor:
        share = (torch.arange(m) / 2400).clamp(max=0.9)
        usual = bench.traffic.independent(m)
        return torch.where(torch.rand(m, generator=bench.generator) < share, _of(bench, SEASON)(m), usual)

    return draw


def _traffic(bench: Bench) -> list[Case]:
    """Sixteen kinds of other traffic."""
    images, n, shape, generator = bench.images, len(bench.images), bench.images.shape, bench.generator
    base = replace(bench.usual, kind="traffic")

    def crawled(m: int) -> Tensor:
        return bench.traffic.of(torch.arange(m) * len(bench.traffic.classes) // m)

    def share(name: str, images: Tensor, part: float) -> Case:
        return _beside(bench, name, images, part)

    tile, first = pictures.no_image(shape), frozenset((0,))
    stuck = pictures.grained(images[7:8].expand(shape), generator)
    return [
        replace(base, name="a season of two classes", draw=_season(bench)),
        replace(base, name="half of the classes vanish", draw=_of(bench, FIRST_HALF)),
        replace(base, name="a crawler takes class after class", draw=crawled),
        replace(base, name="night, a batch of two classes", draw=lambda m: _of(bench, SEASON)(NIGHT_ROWS), rate=NIGHT),
        replace(share("a tenth are one tile", tile, 0.1), keyed=first),
        replace(share("half are one tile", tile, 0.5), keyed=first),
        share("a customer's logos, a third", pictures.logos(n // 3, shape, generator), 1 / 3),
        share("screenshots, a third", pictures.screenshots(n // 3, shape, generator), 1 / 3),
        share("blank pages, a fifth", pictures.blank(n // 5, shape, generator), 0.2),
        share("a bot's noise, a twentieth", pictures.noise(n // 20, shape, generator), 0.05),
        share("collages of four, half", pictures.collages(images[: n // 2]), 0.5),
        share("turned by 90 degrees, a quarter", images[: n // 4].rot90(1, (-2, -1)), 0.25),
        share("a tenant's dark images, a quarter", images[: n // 4] // 5, 0.25),
        share("a burst of three photographs, 40 %", pictures.burst(images[:3], 2 * n // 5, generator), 0.4),
        share("a camera is stuck", stuck, 1.0),
        _turns(bench, share("two clients in turn, one zooms", pictures.zoomed(images[: n // 2]), 0.5)),
    ]


def _harmless(bench: Bench, trained: Tensor) -> list[Case]:
    """Five changes of traffic that must read as healthy. Where requests repeat they carry keys, but for one case."""
    everything, usual = frozenset(range(len(bench.clean))), bench.traffic.independent

    def again(times: int) -> Draw:
        return lambda m: usual(m // times).repeat_interleave(times)

    def once(m: int) -> Tensor:
        order = torch.randperm(len(bench.clean), generator=bench.generator)
        return order.repeat(m // len(order) + 1)[:m]

    base = bench.usual
    return [
        replace(base, name="night, the usual mix", draw=lambda m: usual(NIGHT_ROWS), rate=NIGHT),
        replace(_beside(bench, "a re-index beside, two thirds", trained, 2 / 3), kind="none"),
        replace(base, name="each request three times", draw=again(3), keyed=everything),
        replace(base, name="each request twice, no keys", draw=again(2)),
        replace(base, name="a cache in front, no image twice", draw=once),
    ]


def _model(bench: Bench, other: Artifact, trained: Tensor) -> list[Case]:
    """Nine faults of the model, each beneath one of these changes."""
    images, n, shape, generator = bench.images, len(bench.images), bench.images.shape, bench.generator
    mean, alive = bench.reference.mean.float(), torch.ones(bench.dimension)
    alive[torch.randperm(bench.dimension, generator=generator)[: bench.dimension // 2]] = 0
    older = bench.forwarded("two replicas in turn, one older, each request twice", Embedder(other))

    def hung(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[::8] = rows[0]
        return rows

    upside_down, _ = bench.pixels("images upside down at night", lambda images: images.flip(-2))
    dead = bench.changed("half of the units dead in the season", lambda rows: rows * alive)
    shrunk = bench.changed("spread a fifth, classes vanish", lambda rows: mean + (rows - mean) / 5)
    unscaled = bench.forwarded("no division by std, a re-index beside", _unscaled(bench.artifact))
    coarse = bench.broken("3-bit weights, screenshots beside", quantised(3))
    late = bench.changed("answers to the next request, two clients", lambda rows: rows.roll(1, 0))
    stopped = bench.changed("a worker gives one answer to an eighth, a dark tenant", hung)
    return [
        replace(dead, draw=_season(bench)),
        replace(shrunk, draw=_of(bench, FIRST_HALF)),
        _under(bench, unscaled, trained, 2 / 3),
        _under(bench, coarse, pictures.screenshots(n // 3, shape, generator), 1 / 3),
        _turns(bench, _under(bench, late, pictures.zoomed(images[: n // 2]), 0.5)),
        _under(bench, stopped, images[: n // 4] // 5, 0.25),
        replace(
            upside_down,
            name="images upside down at night",
            draw=lambda m: bench.traffic.independent(NIGHT_ROWS),
            rate=NIGHT,
        ),
        _stale(bench, older),
        _replicas(bench, older),
    ]


def _unscaled(artifact: Artifact) -> Embedder:
    """Preprocessing that takes the mean away and does not divide by the deviation."""
    preprocessing = artifact.card.preprocessing
    wrong = preprocessing.model_copy(update={"std": tuple(1.0 for _ in preprocessing.std)})
    return Embedder(replace(artifact, card=artifact.card.model_copy(update={"preprocessing": wrong})))


def _stale(bench: Bench, older: Case) -> Case:
    """A cache in front of the model, which the canary does not pass, keeps older answers of 100 popular images."""
    popular, n = torch.randperm(len(bench.clean), generator=bench.generator)[:100], len(bench.clean)

    def draw(m: int) -> Tensor:
        usual = bench.traffic.independent(m)
        return torch.where(torch.rand(m, generator=bench.generator) < 0.1, bench.some(popular)(m) + n, usual)

    pool, inputs = torch.cat((bench.clean, older.pool)), bench.inputs.repeat(2, 1)
    return replace(bench.usual, name="a stale cache answers a tenth", kind="model", pool=pool, inputs=inputs, draw=draw)


def _replicas(bench: Bench, older: Case) -> Case:
    """Requests and the canary's images go to both in turn."""

    def draw(m: int) -> Tensor:
        rows = bench.traffic.independent(m // 2).repeat_interleave(2)
        return rows + len(bench.clean) * (torch.arange(len(rows)) % 2)

    canary = bench.canary.clone()
    canary[1::2] = older.canary[1::2]
    pool, inputs = torch.cat((bench.clean, older.pool)), bench.inputs.repeat(2, 1)
    return replace(older, pool=pool, inputs=inputs, canary=canary, draw=draw, served=None)
