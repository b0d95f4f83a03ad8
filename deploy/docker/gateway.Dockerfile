# The gateway: no torch, no vLLM. From the repository's root:
#   docker build -f deploy/docker/gateway.Dockerfile -t interpretops-gateway .
FROM python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7 AS build
WORKDIR /build
COPY locks/build.txt locks/gateway.txt locks/
RUN pip install --no-cache-dir --no-deps --require-hashes -r locks/build.txt && \
    python -m venv /opt/interpretops && \
    /opt/interpretops/bin/pip install --no-cache-dir --no-deps --require-hashes -r locks/gateway.txt
COPY pyproject.toml README.md LICENSE ./
COPY discovery discovery
COPY interpretops interpretops
COPY mechctl mechctl
COPY proxy proxy
COPY steering_kernels steering_kernels
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir wheels . && \
    /opt/interpretops/bin/pip install --no-cache-dir --no-deps --no-index wheels/*.whl

FROM python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7
COPY --from=build /opt/interpretops /opt/interpretops
WORKDIR /srv/interpretops
COPY policies policies
COPY sae_artifacts sae_artifacts
# It writes only to these two folders and /tmp, so its root file system may be read-only.
RUN useradd --uid 65532 --no-create-home --shell /usr/sbin/nologin interpretops && \
    install -d -o interpretops -g interpretops /var/cache/interpretops /var/lib/interpretops
ENV PATH=/opt/interpretops/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    INTERPRETOPS_CACHE_DIR=/var/cache/interpretops \
    INTERPRETOPS_PATHS_STATE=/var/lib/interpretops/state
USER 65532:65532
EXPOSE 8000 8001
ENTRYPOINT ["mechctl"]
CMD ["serve"]
