"""Writes dashboards/fullrank.json. Run it after a change: python deploy/grafana/dashboard.py

Every panel is one call below, with its PromQL; the rest is the grid. A test holds that the committed file is what this
writes, and that every expression returns data from a real service.
"""

import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards" / "fullrank.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
AT = 'instance=~"$instance"'
RECENT = f'{AT},window="5m"'
PER = "by (instance, model)"
Json = dict[str, Any]
DASHED: Json = {
    "matcher": {"id": "byRegexp", "options": "/^(reference|threshold|limit) /"},
    "properties": [{"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [6, 6]}}],
}


def query(expression: str, legend: str, **options: Any) -> Json:
    return {"datasource": SOURCE, "expr": expression, "legendFormat": legend, **options}


def panel(kind: str, title: str, about: str, *queries: Json, width: int = 8, height: int = 8, **rest: Any) -> Json:
    """`about` is what the small i beside the title says: what is healthy, and what the shape means."""
    defaults, overrides = rest.pop("defaults", {}), rest.pop("overrides", [])
    targets = [{"refId": chr(ord("A") + i), **q} for i, q in enumerate(queries)]
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": SOURCE,
        "targets": targets,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        **rest,
    }


def lines(title: str, about: str, *queries: Json, unit: str = "short", minimum: float | None = 0, **rest: Any) -> Json:
    defaults: Json = {"unit": unit, "custom": {"lineWidth": 2, "fillOpacity": 0, "showPoints": "never"}}
    if minimum is not None:
        defaults["min"] = minimum
    options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return panel("timeseries", title, about, *queries, defaults=defaults, options=options, overrides=[DASHED], **rest)


def rank_as(kind: str) -> Json:
    conversion = {"targetField": "rank", "destinationType": kind}
    return {"id": "convertFieldType", "options": {"conversions": [conversion]}}


def row(title: str) -> Json:
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": 24, "h": 1}}


def quantile(q: float) -> Json:
    buckets = f"sum by (le) (rate(fullrank_request_seconds_bucket{{{AT}}}[$__rate_interval]))"
    return query(f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}")


def rate(metric: str, by: str, matchers: str = AT) -> str:
    return f"sum by ({by}) (rate({metric}{{{matchers}}}[$__rate_interval]))"


REQUESTS, IMAGES = rate("fullrank_requests_total", "instance"), rate("fullrank_images_total", "instance")
FAILED = rate("fullrank_requests_total", "instance", f'{AT},code=~"5.."')

EMBEDDINGS = [
    row("Embeddings: recent traffic, five minutes"),
    panel(
        "state-timeline",
        "Verdict",
        "One row for each verdict that a replica had. Exactly one holds at a time.",
        query(f"sum by (instance, model, state) (fullrank_verdict{{{AT}}}) == 1", "{{instance}} {{model}}: {{state}}"),
        width=24,
        height=6,
        options={"showValue": "never", "mergeValues": True, "legend": {"showLegend": False}},
        defaults={"color": {"mode": "palette-classic-by-name"}},
    ),
    lines(
        "Effective rank",
        "exp(entropy) of the covariance's eigenvalues. Dashed: reference and threshold. No line: too few rows.",
        query(f"max {PER} (fullrank_effective_rank{{{RECENT}}})", "{{instance}} {{model}}"),
        query(f"max by (model) (fullrank_reference_effective_rank{{{AT}}})", "reference {{model}}"),
        query(f'max by (model) (fullrank_threshold{{{AT},signal="effective_rank"}})', "threshold {{model}}"),
    ),
    lines(
        "Participation ratio",
        "(tr C)² / tr C², unbiased at any number of rows, with 95 % bounds.",
        query(f"max by (instance, bound) (fullrank_participation_ratio{{{RECENT}}})", "{{instance}} {{bound}}"),
        query(f"max by (model) (fullrank_reference_participation_ratio{{{AT}}})", "reference {{model}}"),
        query(f'max by (model) (fullrank_threshold{{{AT},signal="participation_ratio"}})', "threshold {{model}}"),
    ),
    lines(
        "Total variance of normalised embeddings",
        "Near 0 everything lies at one point, which ranks do not show.",
        query(f"max {PER} (fullrank_total_variance{{{RECENT}}})", "{{instance}} {{model}}"),
        query(f'max by (model) (fullrank_threshold{{{AT},signal="total_variance"}})', "threshold {{model}}"),
    ),
    panel(
        "heatmap",
        "Energy in the reference's directions: $instance",
        "Rows: bands of directions up to a rank, the strongest first; colour: variance over the reference's. All near "
        "1 is healthy. A low head (ranks 1, 2, 4) with the tail near 1 is narrow traffic; a tail at 0 is a collapsed "
        "subspace; a tail far above 1 is foreign images or changed preprocessing.",
        # format=heatmap would subtract neighbouring series and clamp at 0; time series with numeric names are rows.
        query(
            f'max by (rank) (fullrank_band_energy_ratio{{{RECENT},bound="estimate"}})', "{{rank}}", format="time_series"
        ),
        width=16,
        repeat="instance",
        repeatDirection="v",
        options={
            "calculate": False,
            "cellGap": 0,
            "legend": {"show": True},
            "tooltip": {"mode": "single", "showColorScale": True},
            "color": {"mode": "scheme", "scheme": "RdYlBu", "steps": 64, "min": 0, "max": 1.5, "reverse": False},
            "yAxis": {"axisPlacement": "left"},
            "rowsFrame": {"layout": "auto"},
        },
    ),
    panel(
        "barchart",
        "Spectrum now",
        "Eigenvalues of the covariance at ranks 1, 2, 4, 8, ...",
        query(f"max by (rank) (fullrank_eigenvalue{{{RECENT}}})", "", format="table", instant=True),
        options={"xField": "rank", "legend": {"showLegend": False}},
        defaults={"custom": {"scaleDistribution": {"type": "log", "log": 10}}},
        transformations=[
            rank_as("number"),
            {"id": "sortBy", "options": {"sort": [{"field": "rank"}]}},
            rank_as("string"),
            {"id": "organize", "options": {"excludeByName": {"Time": True}}},
        ],
    ),
    lines(
        "Canary: least cosine to the stored embeddings",
        "Fixed images through the path of requests. Below the threshold the model itself has changed.",
        query(f"min {PER} (fullrank_canary_cosine_min{{{AT}}})", "{{instance}} {{model}}"),
        query(f'max by (model) (fullrank_threshold{{{AT},signal="canary_cosine"}})', "threshold {{model}}"),
        minimum=None,
        width=6,
    ),
    lines(
        "Variety of the images themselves",
        "Participation ratio of 8x8 thumbnails. If it falls with the embeddings', it is the traffic.",
        query(f"max {PER} (fullrank_input_participation_ratio{{{AT}}})", "{{instance}} {{model}}"),
        width=6,
    ),
    lines(
        "Rows by fate",
        "Duplicates enter once; dropped rows found the monitor's buffer full.",
        query(rate("fullrank_rows_total", "fate"), "{{fate}}"),
        unit="cps",
        width=6,
    ),
    lines(
        "The monitor itself",
        "CPU seconds a second, and the age of the statistics.",
        query(rate("fullrank_monitor_seconds_total", "instance"), "CPU {{instance}}"),
        query(f"max by (instance) (time() - fullrank_snapshot_timestamp_seconds{{{AT}}})", "age {{instance}}"),
        unit="s",
        width=6,
    ),
]

SERVING = [
    row("Serving"),
    lines(
        "Requests",
        "By route and status.",
        query(rate("fullrank_requests_total", "route, code"), "{{route}} {{code}}"),
        unit="reqps",
    ),
    lines(
        "Errors",
        "Share of requests answered 5xx.",
        query(
            f"({FAILED} or 0 * {REQUESTS}) / {REQUESTS}",
            "5xx {{instance}}",
        ),
        unit="percentunit",
    ),
    lines(
        "Duration",
        "From a request's first byte to its answer's last.",
        quantile(0.5),
        quantile(0.95),
        quantile(0.99),
        unit="s",
    ),
    lines(
        "Mean time by phase",
        "Where an answered request's time went.",
        query(
            f"{rate('fullrank_phase_seconds_sum', 'phase')} / {rate('fullrank_phase_seconds_count', 'phase')}",
            "{{phase}}",
        ),
        unit="s",
    ),
    lines(
        "Throughput and batching",
        "Images a second, and images in a forward pass.",
        query(IMAGES, "images/s {{instance}}"),
        query(f"{IMAGES} / {rate('fullrank_batches_total', 'instance')}", "batch {{instance}}"),
    ),
    lines(
        "Saturation",
        "Images admitted and not yet answered, the limit, and what was rejected, a second.",
        query(f"sum by (instance) (fullrank_pending_images{{{AT}}})", "pending {{instance}}"),
        query(f"max by (instance) (fullrank_pending_images_limit{{{AT}}})", "limit {{instance}}"),
        query(rate("fullrank_rejected_images_total", "reason"), "rejected: {{reason}}"),
    ),
]


def laid_out(panels: list[Json]) -> list[Json]:
    """Left to right, top to bottom, 24 columns wide."""
    x = y = tallest = 0
    for number, item in enumerate(panels, 1):
        place = item["gridPos"]
        if x + place["w"] > 24:
            x, y, tallest = 0, y + tallest, 0
        item["id"], place["x"], place["y"] = number, x, y
        x, tallest = x + place["w"], max(tallest, place["h"])
    return panels


def dashboard() -> Json:
    variables: list[Json] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {
            "name": "instance",
            "type": "query",
            "label": "Replica",
            "datasource": SOURCE,
            "multi": True,
            "includeAll": True,
            "query": {"query": "label_values(fullrank_verdict, instance)", "refId": "instance"},
            "refresh": 2,
            "sort": 1,
            "current": {"text": "All", "value": "$__all"},
        },
    ]
    return {
        "uid": "fullrank",
        "title": "fullrank: embeddings and serving",
        "tags": ["fullrank"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": variables},
        "panels": laid_out(EMBEDDINGS + SERVING),
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
