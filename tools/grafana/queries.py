"""PromQL that the dashboards share: selectors, groupings and thresholds."""

AT = 'instance=~"$instance"'
JOB = 'job=~"(.+/)?fullrank"'
OF = f'{AT},model=~"$model"'
RECENT = f'{OF},window="5m"'
PER = "by (instance, model)"
EACH = "{{instance}} {{model}}"
# References and thresholds are a revision's: those of two are two lines.
ENCODER, NAMED = "by (model, revision)", "{{model}}@{{revision}}"


def threshold(signal: str, name: str = "threshold") -> tuple[str, str]:
    return f'max {ENCODER} (fullrank_threshold{{{OF},signal="{signal}"}})', f"{name} {NAMED}"


def rate(metric: str, by: str, matchers: str = AT) -> str:
    return f"sum by ({by}) (rate({metric}{{{matchers}}}[$__rate_interval]))"
