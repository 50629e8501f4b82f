"""A bulk run, here or as a script for a process of its own, that can be killed; and the rows that it wrote."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from scale import bulk, sources
from tests.support.images import encoded, noise

# Arguments: files a shard, source, encoder, output, and the format if it is not Parquet.
RUN = """
import sys
from pathlib import Path
from scale import bulk, sources
from scale.places import place
each, source, encoder, out, *form = sys.argv[1:]
sources.FILES_A_SHARD = int(each)
encoder, out = Path(encoder), place(out)
left = bulk.begin(out, encoder, sources.shards(source), file_format=(form or ["parquet"])[0])
bulk.run_local(left, encoder, out, done=lambda it: print(it.name, flush=True))
"""


def command(each: int, source: Path | str, encoder: Path, out: Path | str, *form: str, script: str = RUN) -> list[str]:
    """The command of a run with so many files a shard."""
    return [sys.executable, "-c", script, str(each), str(source), str(encoder), str(out), *form]


def png(seed: int) -> bytes:
    """A small grey image of noise."""
    return encoded(noise((40, 30), "L", seed))


def run(source: str, encoder: Path, out: Path, **options: int) -> list[str]:
    """Embed a source in this process; what failed."""
    failures = list[str]()
    bulk.run_local(bulk.begin(out, encoder, sources.shards(source)), encoder, out, failed=failures.append, **options)
    return failures


def rows_of(out: Path) -> dict[str, tuple[list[float] | None, str | None]]:
    """id -> (embedding, error) of all output files; every id must be there once."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(out.glob("*.parquet"))])
    found = {it["id"]: (it["embedding"], it["error"]) for it in table.to_pylist()}
    assert len(found) == len(table)
    return found
