# The engine on a GPU: vLLM's own image and the plugin. From the repository's root, with the digest of that image for
# your architecture, as `docker buildx imagetools inspect vllm/vllm-openai:v0.32.0` or your own registry tells it:
#   docker build -f deploy/docker/engine-gpu.Dockerfile --build-arg VLLM_DIGEST=<64 hex> -t interpretops-engine:gpu .
ARG VLLM_DIGEST
FROM python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7 AS build
WORKDIR /build
COPY locks/build.txt locks/build.txt
RUN pip install --no-cache-dir --no-deps --require-hashes -r locks/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY discovery discovery
COPY interpretops interpretops
COPY mechctl mechctl
COPY proxy proxy
COPY steering_kernels steering_kernels
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir wheels .

FROM vllm/vllm-openai:v0.32.0@sha256:${VLLM_DIGEST}
WORKDIR /srv/interpretops
COPY locks/gateway.txt locks/missing.py locks/
COPY --from=build /build/wheels wheels
# Only missing packages are installed: versions in vLLM's image must not change.
RUN python3 locks/missing.py locks/gateway.txt > /tmp/missing.txt && \
    python3 -m pip install --no-cache-dir --no-deps --require-hashes -r /tmp/missing.txt && \
    python3 -m pip install --no-cache-dir --no-deps --no-index wheels/*.whl && \
    python3 locks/missing.py --check interpretops && \
    rm -r /tmp/missing.txt wheels && \
    useradd --uid 65532 --create-home --home-dir /var/cache/engine --shell /usr/sbin/nologin engine
ENV HOME=/var/cache/engine \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    TRANSFORMERS_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_PLUGINS=interpretops
USER 65532:65532
EXPOSE 8100
ENTRYPOINT ["python3", "-P", "-m", "vllm.entrypoints.openai.api_server"]
