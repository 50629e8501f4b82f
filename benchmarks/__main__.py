"""List the benchmarks: `python -m benchmarks`."""

import ast
from pathlib import Path


def main() -> None:
    for path in sorted(Path(__file__).parent.iterdir()):
        module = path / "__main__.py" if path.is_dir() else path
        if module.is_file() and module.suffix == ".py" and not path.stem.startswith("_"):
            summary = (ast.get_docstring(ast.parse(module.read_text())) or "").split("\n", 1)[0]
            print(f"python -m benchmarks.{path.stem:<16} {summary}")


if __name__ == "__main__":
    main()
