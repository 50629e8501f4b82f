"""Every way of going wrong that is played, and what must come of it."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.e2e.replica import Replica
from tests.support.alertmanager import Notice, Webhook
from tools.demo.traffic import Traffic
from tools.stack import Prometheus, StackError, call, wait

RATE = 40.0
COLLAPSES = frozenset({"EmbeddingCompleteCollapse", "EmbeddingDirectionsDied"})


@dataclass(frozen=True)
class Seen:
    """What a scenario came to, in words; seconds to the notification, or that it was watched."""

    passed: bool
    words: str
    seconds: float


@dataclass
class World:
    """The parts, and the pictures to send."""

    a: Replica
    b: Replica
    prometheus: Prometheus
    webhook: Webhook
    alertmanager: str
    pictures: Sequence[str]
    narrow: Sequence[str]

    def name(self, instance: str) -> str:
        return {self.a.address: "a", self.b.address: "b"}.get(instance, instance)

    def verdict(self, replica: Replica) -> str:
        state: str = replica.spectrum()["verdict"]["state"]
        return state

    @contextmanager
    def traffic(self, *replicas: Replica, pictures: Sequence[str] | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            for replica in replicas:
                stack.enter_context(Traffic(replica.url, pictures or self.pictures, RATE))
            yield

    def reset(self, *replicas: Replica) -> None:
        """Back to the healthy encoder with a fresh monitor; no alert left. Raises StackError."""
        for replica in replicas:
            if (done := replica.swap("fashion-directclr", "off"))[0] != 200:
                raise StackError(f"could not go back to the healthy encoder: {done}")
        if not wait(lambda: not self.alerts(), 60, 0.5):
            raise StackError(f"alerts are left: {self.alerts()}")

    def alerts(self) -> dict[str, str]:
        """name -> pending or firing, of those that somebody would be told of."""
        alerts = (alert for alert in self.prometheus.alerts() if alert["labels"]["severity"] != "info")
        return {alert["labels"]["alertname"]: alert["state"] for alert in alerts}

    def until_healthy(self, *replicas: Replica) -> None:
        """Wait for the verdict `healthy`, under traffic. Raises StackError."""
        if not wait(lambda: all(self.verdict(replica) == "healthy" for replica in replicas), 90, 0.5):
            raise StackError("; ".join(str(replica.spectrum()["verdict"]) for replica in replicas))

    def nothing(self, seconds: float) -> Seen:
        """Watch for so long; anything that reaches the webhook is one too many."""
        mark = time.monotonic()
        time.sleep(seconds)
        came = self.webhook.since(mark)
        return Seen(not came, self._words(came, mark) or "nothing", time.monotonic() - mark)

    def one(self, alerts: frozenset[str], severity: str, instance: str, within: float, linger: float = 12.0) -> Seen:
        """Wait for one of `alerts` on that instance, then on; any other notification is one too many."""
        mark = time.monotonic()
        wait(lambda: bool(self.webhook.since(mark)), within)
        if not (came := self.webhook.since(mark)):
            return Seen(False, f"nothing within {within:.0f} s; Prometheus has {self.alerts() or 'none'}", within)
        took = came[0].at - mark
        time.sleep(linger)
        came = self.webhook.since(mark)
        right = {(it.alert in alerts, it.severity, it.instance) for it in came} == {(True, severity, instance)}
        words = self._words(came, mark)
        if muted := self.muted():
            words += f"; muted: {', '.join(muted)}"
        return Seen(right and len({it.alert for it in came}) == 1, words, took)

    def muted(self) -> list[str]:
        """The alerts that Alertmanager holds back because another explains them."""
        alerts = json.loads(call(f"http://{self.alertmanager}/api/v2/alerts"))
        held = {(a["labels"]["alertname"], a["labels"]["severity"]) for a in alerts if a["status"]["inhibitedBy"]}
        return [f"{name.removeprefix('Embedding')} ({severity})" for name, severity in sorted(held)]

    def _words(self, came: Sequence[Notice], mark: float) -> str:
        return ", ".join(
            f"{it.alert.removeprefix('Embedding')} ({it.severity}, {self.name(it.instance)}, {it.at - mark:.0f} s)"
            for it in came
        )


def healthy(world: World) -> Seen:
    with world.traffic(world.a, world.b):
        world.until_healthy(world.a, world.b)
        return world.nothing(30)


def narrow(world: World) -> Seen:
    with world.traffic(world.a):
        world.until_healthy(world.a)
    with world.traffic(world.a, pictures=world.narrow):
        return world.one(frozenset({"EmbeddingTrafficNarrowed"}), "ticket", world.a.address, 60)


def hot_image(world: World) -> Seen:
    """A third of the traffic is one picture."""
    hot = [it for i, it in enumerate(world.pictures) for it in ([it, world.pictures[0]] if i % 2 else [it])]
    with world.traffic(world.a, pictures=hot):
        world.until_healthy(world.a)
        seen = world.nothing(30)
        rows = world.a.spectrum()["counters"]["rows"]
        share = rows["duplicate"] / (rows["duplicate"] + rows["sampled"])
        counted = share > 0.25 and world.verdict(world.a) == "healthy"
    return Seen(seen.passed and counted, f"{seen.words}; {share:.0%} counted as duplicates", seen.seconds)


def one_image(world: World) -> Seen:
    """All of the traffic is one picture: nothing can be said, and nothing is."""
    with world.traffic(world.a, pictures=world.pictures[:1]):
        seen = world.nothing(30)
        verdict = world.verdict(world.a)
    return Seen(seen.passed and verdict == "insufficient_data", f"{seen.words}; {verdict}", seen.seconds)


def refused_swap(world: World) -> Seen:
    with world.traffic(world.a):
        world.until_healthy(world.a)
        status, words = world.a.swap("fashion-collapsed", "enforce")
        seen = world.nothing(15)
        stays = world.verdict(world.a) == "healthy"
    return Seen(seen.passed and stays and status == 409, f"{status}: {words}; {seen.words}", seen.seconds)


def collapsed_swap(world: World) -> Seen:
    with world.traffic(world.a):
        world.until_healthy(world.a)
        status, words = world.a.swap("fashion-collapsed", "warn")
        if status != 200:
            return Seen(False, f"{status}: {words}", 0.0)
        return world.one(COLLAPSES, "page", world.a.address, 90)


def damaged_swap(world: World) -> Seen:
    with world.traffic(world.a):
        world.until_healthy(world.a)
        status, words = world.a.swap("damaged", "off")
        seen = world.nothing(10)
        stays = world.verdict(world.a) == "healthy"
    refused = status == 422 and "changed or damaged" in words
    return Seen(seen.passed and stays and refused, f"{status}; {seen.words}", seen.seconds)


def damaged_start(world: World) -> Seen:
    """A replica that finds its weight file damaged does not come up, and that is said."""
    world.b.stop()
    child = world.b.launch(encoder=world.b.settings["encoders_dir"] / "damaged")  # type: ignore[operator]
    try:
        seen = world.one(frozenset({"EmbeddingServiceDown"}), "ticket", world.b.address, 90, linger=5)
        refused = child.wait(60) != 0
    finally:
        world.b.stop()
        world.b.start()
    return Seen(seen.passed and refused, f"exit code {child.returncode}; {seen.words}", seen.seconds)


def altered_weights(world: World) -> Seen:
    """Weights that are not those of the canary, let in by gate=off and a lenient canary_min_cosine."""
    with world.traffic(world.b):
        world.until_healthy(world.b)
        status, words = world.b.swap("altered", "off")
        if status != 200:
            return Seen(False, f"{status}: {words}", 0.0)
        return world.one(frozenset({"EmbeddingModelFault"}), "page", world.b.address, 60)


def _restart(world: World, sent: signal.Signals) -> Seen:
    with world.traffic(world.a):
        world.until_healthy(world.a)
        if not wait(lambda: world.a.spectrum()["windows"]["60"]["rows"] >= 600, 60):
            return Seen(False, "too little traffic", 0.0)
    time.sleep(2.5)  # two periods of saving
    before = world.a.spectrum()["windows"]["60"]["rows"]
    mark = time.monotonic()
    world.a.stop(sent)
    world.a.start()
    took = time.monotonic() - mark
    spectrum = world.a.spectrum()
    after, verdict = spectrum["windows"]["60"]["rows"], spectrum["verdict"]["state"]
    with world.traffic(world.a):
        seen = world.nothing(10)
        world.until_healthy(world.a)
    words = f"{before} rows before, {after} after {took:.0f} s, verdict then {verdict}; {seen.words}"
    return Seen(seen.passed and after >= before / 3, words, took)


def restart(world: World) -> Seen:
    return _restart(world, signal.SIGTERM)


def kill(world: World) -> Seen:
    return _restart(world, signal.SIGKILL)


def one_of_two(world: World) -> Seen:
    """In a sum over the replicas the healthy one would hide the other."""
    with world.traffic(world.a, world.b):
        world.until_healthy(world.a, world.b)
        status, words = world.b.swap("fashion-collapsed", "warn")
        if status != 200:
            return Seen(False, f"{status}: {words}", 0.0)
        seen = world.one(COLLAPSES, "page", world.b.address, 90)
        stays = world.verdict(world.a) == "healthy"
    return Seen(seen.passed and stays, f"{seen.words}; a is {'healthy' if stays else 'not'}", seen.seconds)


@dataclass(frozen=True)
class Scenario:
    """Its name, what must come of it, and how it is played."""

    expected: str
    play: Callable[[World], Seen]


SCENARIOS = {
    "healthy": Scenario("nothing", healthy),
    "narrow": Scenario("TrafficNarrowed, a ticket; no page", narrow),
    "hot-image": Scenario("nothing; duplicates are counted", hot_image),
    "one-image": Scenario("nothing; insufficient_data", one_image),
    "refused-swap": Scenario("409; nothing", refused_swap),
    "collapsed-swap": Scenario("one page: a collapse", collapsed_swap),
    "damaged-swap": Scenario("422; nothing", damaged_swap),
    "damaged-start": Scenario("exit code not 0; ServiceDown, a ticket", damaged_start),
    "altered-weights": Scenario("one page: ModelFault", altered_weights),
    "restart": Scenario("rows are still there; nothing", restart),
    "kill": Scenario("rows are still there; nothing", kill),
    "one-of-two": Scenario("one page: a collapse, of b", one_of_two),
}
