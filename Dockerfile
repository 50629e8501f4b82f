# The embedding service.     docker build -t fullrank .     with the CPU build of torch
#   docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t fullrank .     the plain registry's, the CUDA build
# PYTHON may carry a digest, as in --build-arg PYTHON=3.11-slim@sha256:...; SECURITY.md says how a release pins it.
ARG PYTHON=3.11-slim

FROM python:${PYTHON} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
# From the largest and most stable layer to the smallest: the locked dependencies, torch, the application.
COPY requirements/image.txt requirements/torch.txt /src/requirements/
RUN /venv/bin/pip install --require-hashes -r /src/requirements/image.txt
RUN /venv/bin/pip install -r /src/requirements/torch.txt --index-url ${TORCH_INDEX} \
 # Headers, static libraries, compilers and test programs serve those who build against torch.
 && rm -rf /venv/lib/python*/site-packages/torch/include /venv/lib/python*/site-packages/torch/test \
 && find /venv -type f \( -name '*.a' -o -path '*/torch/bin/*' ! -name torch_shm_manager \) -delete \
 && find /venv -type d -name tests \( -path '*/sympy/*' -o -path '*/networkx/*' -o -path '*/mpmath/*' \) -prune -exec rm -rf {} +
COPY . /src
RUN /venv/bin/pip install --no-deps --no-build-isolation --target /app /src/fullrank /src \
 && /venv/bin/pip uninstall --yes --quiet pip

FROM python:${PYTHON}
# /state is for FULLRANK_STATE_DIR: a volume mounted there takes this owner.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin fullrank \
 && install -d -o fullrank -g fullrank /state
COPY --from=build /venv /venv
COPY --from=build /app /app
ENV PATH=/venv/bin:/app/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    FULLRANK_HOST=0.0.0.0 FULLRANK_PORT=8000 ORT_DISABLE_TELEMETRY=1
USER 10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready, not merely alive: weights loaded, warmed, canary passed.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"FULLRANK_PORT\"]}/readyz', timeout=2)"]
CMD ["fullrank", "serve"]
