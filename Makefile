# Every target sets up .venv by itself. TORCH chooses the build of torch to install first, for example
#   make serve TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"    the CPU build, small
#   make serve TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"  another CUDA build
TORCH   ?= torch==2.13.0
PYTHON  ?= python3
HOST    ?= 127.0.0.1
PORT    ?= 8000
ENCODER ?= models/pretrained/fashion-directclr
BIN     := .venv/bin

.PHONY: openapi serve test soak demo e2e compose-test grafana-test dashboards bench lint clean

serve: .venv/serve
	$(BIN)/fullrank serve --encoder $(ENCODER) --host $(HOST) --port $(PORT)

test: lint
	$(BIN)/python -m pytest -m "not soak"

soak: .venv/dev
	$(BIN)/python -m pytest -m soak

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

openapi: .venv/serve
	$(BIN)/python -m service.http.openapi

demo: .venv/serve
	$(BIN)/python -m tools.demo

e2e: .venv/dev
	$(BIN)/python -m tests.e2e

compose-test: .venv/serve
	$(BIN)/python -m tests.compose

grafana-test: .venv/dev
	$(BIN)/python -m tests.compose.grafana

dashboards: .venv/dev
	$(BIN)/python -m tools.grafana

bench: .venv/dev
	$(BIN)/python -m benchmarks

.venv/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

.venv/serve: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/serve

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
