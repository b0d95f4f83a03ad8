# The gateway: no torch, no vLLM. From the repository's root:
#   docker build -f deploy/docker/gateway.Dockerfile -t interpretops-gateway .
FROM python:3.11-slim AS build
WORKDIR /build
COPY locks/gateway.txt locks/gateway.txt
RUN python -m venv /opt/interpretops && \
    /opt/interpretops/bin/pip install --no-cache-dir --no-deps --require-hashes -r locks/gateway.txt
COPY pyproject.toml README.md LICENSE ./
COPY discovery discovery
COPY interpretops interpretops
COPY proxy proxy
COPY steering_kernels steering_kernels
RUN /opt/interpretops/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim
COPY --from=build /opt/interpretops /opt/interpretops
WORKDIR /srv/interpretops
COPY policies policies
COPY sae_artifacts sae_artifacts
# What it writes lies in these two folders and in /tmp: its root file system may be read-only.
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
