"""The dashboards. Every panel is one call, with its PromQL; `python -m tools.grafana` writes them as JSON."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from tools.grafana.fleet import fleet
from tools.grafana.panels import board, lines, query, variable
from tools.grafana.queries import AT, JOB, rate


def quantile(q: float) -> tuple[str, str]:
    return f"histogram_quantile({q}, {rate('fullrank_request_seconds_bucket', 'le')})", f"p{q * 100:g}"


def serving() -> Dashboard:
    images, requests = rate("fullrank_images_total", "instance"), rate("fullrank_requests_total", "instance")
    failed = rate("fullrank_requests_total", "instance", f'{AT},code=~"5.."')
    phases = f"{rate('fullrank_phase_seconds_sum', 'phase')} / {rate('fullrank_phase_seconds_count', 'phase')}"
    return board(
        "fullrank-serving",
        "fullrank: serving",
        variable("instance", "Replica", "label_values(fullrank_pending_images, instance)"),
        "Rate, errors, duration",
        lines(
            "Requests",
            "By route and status.",
            query(rate("fullrank_requests_total", "route, code"), "{{route}} {{code}}"),
            unit="reqps",
        ),
        lines(
            "Errors",
            "Share of requests answered 5xx.",
            query(f"({failed} or 0 * {requests}) / {requests}", "5xx {{instance}}"),
            unit="percentunit",
        ),
        lines(
            "Duration",
            "From a request's first byte to its answer's last.",
            *(query(*quantile(q)) for q in (0.5, 0.95, 0.99)),
            unit="s",
        ),
        "Objectives",
        lines(
            "Failures of requests to embed",
            "Dashed: what the objective allows over 30 days. A page at 14.4 times that over 5 m and 1 h, or 6 times "
            "over 30 m and 6 h.",
            *(query(f"job:fullrank_errors_per_request:ratio_rate{w}", f"{{{{job}}}} {w}") for w in ("5m", "1h", "6h")),
            query("1 - fullrank:availability_objective:ratio", "objective"),
            unit="percentunit",
            width=12,
        ),
        lines(
            "Requests to embed that take over a second",
            "Dashed: what the objective allows over 30 days.",
            *(query(f"job:fullrank_slow_per_request:ratio_rate{w}", f"{{{{job}}}} {w}") for w in ("5m", "1h", "6h")),
            query("1 - fullrank:latency_objective:ratio", "objective"),
            unit="percentunit",
            width=12,
        ),
        "Where the time goes",
        lines(
            "Mean time by phase",
            "Queue: more arrives than is embedded. Forward: the model or its device. Decode: large images.",
            query(phases, "{{phase}}"),
            unit="s",
        ),
        lines(
            "Images a second",
            "Embedded and answered.",
            query(images, "{{instance}}"),
        ),
        lines(
            "Batch size",
            "Images in a forward pass: mean, median and 95th percentile.",
            query(f"{images} / {rate('fullrank_batches_total', 'instance')}", "mean {{instance}}"),
            *(
                query(f"histogram_quantile({q}, {rate('fullrank_batch_size_bucket', 'le')})", f"p{q * 100:g}")
                for q in (0.5, 0.95)
            ),
        ),
        "Saturation",
        lines(
            "Pending images",
            "Admitted and not yet answered, and the limit beyond which requests get 429.",
            query(f"sum by (instance) (fullrank_pending_images{{{AT}}})", "pending {{instance}}"),
            query(f"max by (instance) (fullrank_pending_images_limit{{{AT}}})", "limit {{instance}}"),
        ),
        lines(
            "Images not embedded",
            "A second, by reason.",
            query(rate("fullrank_rejected_images_total", "reason"), "{{reason}}"),
        ),
        lines(
            "CPU and memory",
            "Cores busy, and resident GiB.",
            query(f"rate(process_cpu_seconds_total{{{JOB},{AT}}}[$__rate_interval])", "cores {{instance}}"),
            query(f"process_resident_memory_bytes{{{JOB},{AT}}} / 2^30", "GiB {{instance}}"),
        ),
    )


def training() -> Dashboard:
    run = 'run=~"$run"'
    parts = "{{run}} {{part}}"
    return board(
        "fullrank-training",
        "fullrank: training runs",
        variable("run", "Run", "label_values(fullrank_training_epoch, run)"),
        "Does it learn?",
        lines("Loss", "Mean of the last epoch.", query(f"fullrank_training_loss{{{run}}}", "{{run}}"), minimum=None),
        lines(
            "kNN accuracy",
            "On training images that the gradient has not seen.",
            query(f"fullrank_training_knn_accuracy_ratio{{{run}}}", "{{run}}"),
            unit="percentunit",
        ),
        lines(
            "Progress",
            "Epochs finished, over the recipe's.",
            query(f"fullrank_training_epoch{{{run}}} / fullrank_training_epochs{{{run}}}", "{{run}}"),
            unit="percentunit",
        ),
        "Does it collapse?",
        lines(
            "Effective rank",
            "Of the representation, which is served, and of the projection, which the loss sees. A loss that falls "
            "with them is a collapse.",
            query(f"fullrank_training_effective_rank{{{run}}}", parts),
        ),
        lines(
            "Participation ratio",
            "(tr C)² / tr C²: dominated by the strongest directions.",
            query(f"fullrank_training_participation_ratio{{{run}}}", parts),
        ),
        lines(
            "Total variance of normalised rows",
            "Near 0 is complete collapse, which ranks do not show.",
            query(f"fullrank_training_total_variance{{{run}}}", parts),
        ),
        "How fast?",
        lines(
            "Learning rate", "At the last epoch's end.", query(f"fullrank_training_learning_rate{{{run}}}", "{{run}}")
        ),
        lines(
            "Views a second",
            "Augmented images trained on, over the last epoch.",
            query(f"fullrank_training_views_per_second{{{run}}}", "{{run}}"),
        ),
        lines(
            "Time since the last epoch",
            "A run that has stopped keeps growing here.",
            query(f"time() - fullrank_training_timestamp_seconds{{{run}}}", "{{run}}"),
            unit="s",
        ),
    )


DASHBOARDS = {"fleet": fleet, "serving": serving, "training": training}
