"""The order in which the files of tests run: the long ones first, so that no worker is alone with one in the end."""

# Each takes 20 seconds or more; the longest come first.
LONG = (
    "service/http/test_page.py",
    "service/http/test_docs.py",
    "cli/test_report.py",
    "test_contributing.py",
    "scale/test_bulk.py",
    "training/test_loop.py",
    "service/engine/test_decode_budget.py",
    "fullrank/monitor/test_exit.py",
    "packaging/test_server.py",
    "service/http/test_attacks.py",
    "deploy/test_rules.py",
    "e2e/test_live.py",
    "e2e/test_encoders.py",
    "e2e/test_sidecar.py",
    "training/test_distributed.py",
)


def place(file: str) -> int:
    """Where a file, named from tests/, comes among the others."""
    return LONG.index(file) if file in LONG else len(LONG)
