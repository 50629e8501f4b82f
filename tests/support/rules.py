"""The shipped alert rules, as tests read them."""

from pathlib import Path

import yaml


def about_embeddings(deploy: Path) -> set[str]:
    """The alerts on what an encoder makes of its traffic, none of which a slow machine sets off."""
    groups = yaml.safe_load((deploy / "prometheus" / "rules" / "embeddings.yml").read_text())["groups"]
    names = {rule["alert"] for group in groups if group["name"] != "embedding-monitor" for rule in group["rules"]}
    assert {"EmbeddingModelFault", "EmbeddingCompleteCollapse", "EmbeddingTrafficShifted"} <= names
    return names
