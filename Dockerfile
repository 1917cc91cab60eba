# The server on CPUs. Build it here, then run it with a key (or --insecure, which lets anyone who reaches the port in):
#
#   docker build -t seraph .
#   docker run -p 8000:8000 -v seraph-models:/var/lib/seraph -e SERAPH_API_KEY=choose-one seraph
#
# The server over vLLM, on NVIDIA GPUs (docs/gpu.md; --ipc=host is for the processes of several GPUs):
#
#   docker build --target gpu -t seraph-gpu .
#   docker run --gpus all --ipc=host -p 8000:8000 -v seraph-models:/var/lib/seraph -e SERAPH_API_KEY=choose-one seraph-gpu
#
# Arguments after the image's name go to `seraph serve`. Models are fetched once, into the volume.

ARG PYTHON_VERSION=3.12
# vLLM's own image. Its Python is another build than the one above, so the wheel for it is built inside of it.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# The locked environment first: it changes seldom, and this layer is then taken from the builder's cache.
COPY requirements/ requirements/
RUN python -m venv /opt/seraph \
    && /opt/seraph/bin/pip install --no-deps --only-binary :all: --require-hashes --requirement requirements/runtime.txt \
    && pip install --no-deps --only-binary :all: --require-hashes --requirement requirements/build.txt
COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/seraph/bin/pip install --no-deps --no-index /wheels/*.whl

FROM ${VLLM_IMAGE} AS gpu-build
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
COPY requirements/ requirements/
RUN python3 -m pip install --no-deps --only-binary :all: --require-hashes --ignore-installed \
    --requirement requirements/build.txt
COPY . .
RUN python3 -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${VLLM_IMAGE} AS gpu
USER root
# What vLLM's image has stays as it is; pip adds what Seraph needs beside it, in versions that go with it.
RUN --mount=type=bind,from=gpu-build,source=/wheels,target=/wheels \
    python3 -m pip list --format=freeze > /tmp/vllm.txt \
    && python3 -m pip install --no-cache-dir --break-system-packages --only-binary :all: \
        --constraint /tmp/vllm.txt /wheels/*.whl \
    && rm /tmp/vllm.txt
RUN groupadd --system --gid 10001 seraph \
    && useradd --system --uid 10001 --gid seraph --no-create-home --home-dir /var/lib/seraph seraph \
    && install --directory --owner seraph --group seraph /var/lib/seraph
# HOME: vLLM and Triton keep what they compile there, in the volume.
ENV PYTHONUNBUFFERED=1 \
    HOME=/var/lib/seraph \
    SERAPH_HOME=/var/lib/seraph \
    SERAPH_ENGINE=vllm
VOLUME /var/lib/seraph
USER 10001:10001
WORKDIR /var/lib/seraph
EXPOSE 8000
STOPSIGNAL SIGTERM
# Liveness as below; a large model is fetched for longer.
HEALTHCHECK --interval=10s --timeout=3s --start-period=1800s --retries=3 \
    CMD ["python3", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/health/live'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["seraph", "serve", "--host", "0.0.0.0"]

# The last stage is the one that is built where no target is named.
FROM python:${PYTHON_VERSION}-slim-bookworm
RUN groupadd --system --gid 10001 seraph \
    && useradd --system --uid 10001 --gid seraph --no-create-home --home-dir /var/lib/seraph seraph \
    && install --directory --owner seraph --group seraph /var/lib/seraph
COPY --from=build /opt/seraph /opt/seraph
ENV PATH=/opt/seraph/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SERAPH_HOME=/var/lib/seraph
VOLUME /var/lib/seraph
USER 10001:10001
WORKDIR /var/lib/seraph
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start fetches and packs the model. /health/live answers as soon as the server listens; http.client, because
# urllib would ask a proxy that the environment names.
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/health/live'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["seraph", "serve", "--host", "0.0.0.0"]
