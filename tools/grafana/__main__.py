"""Writes the dashboards and the alerting files: python -m tools.grafana, or make dashboards.

Both are committed, and a test compares them with this program's output.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from tools.grafana.alerting import provisioned
from tools.grafana.boards import DASHBOARDS

HERE = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
HEADER = "# Written by python -m tools.grafana from deploy/prometheus/rules and deploy/alertmanager: change those.\n"


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that writes text of several lines as a block."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
)


def plain(model: Any) -> Any:
    """A model of the SDK as dicts and lists."""
    return json.loads(json.dumps(model, cls=JSONEncoder))


def files() -> dict[Path, str]:
    """The content of each file."""
    boards = {
        HERE / "dashboards" / f"{name}.json": json.dumps(plain(build()), indent=2, ensure_ascii=False, sort_keys=True)
        + "\n"
        for name, build in DASHBOARDS.items()
    }
    alerts = {
        HERE / "provisioning" / "alerting" / name: HEADER
        + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
        for name, content in provisioned(plain).items()
    }
    return boards | alerts


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE))
