# The engine on a CPU, including the default model. From the repository's root:
#   docker build -f deploy/docker/engine-cpu.Dockerfile -t interpretops-engine:cpu .
FROM python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7
# libnuma: vLLM's CPU kernels are linked against it. g++: torch compiles small functions with it.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ libnuma1 && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /srv/interpretops
COPY locks/cpu.txt locks/cpu.txt
RUN pip install --no-cache-dir --no-deps --require-hashes \
    --extra-index-url https://download.pytorch.org/whl/cpu -r locks/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY discovery discovery
COPY interpretops interpretops
COPY mechctl mechctl
COPY proxy proxy
COPY steering_kernels steering_kernels
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && \
    python -c "import pathlib, interpretops.model.default_model as m; m.ensure_default_model(pathlib.Path('/'))"
# torch looks up the user's name, so it needs one. The engine writes to its home and to /tmp.
RUN useradd --uid 65532 --create-home --home-dir /var/cache/engine --shell /usr/sbin/nologin engine
# Containers may not bind memory to a NUMA node, and the runtime assigns the CPUs.
ENV HOME=/var/cache/engine \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    TRANSFORMERS_OFFLINE=1 \
    VLLM_CPU_OMP_THREADS_BIND=nobind \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_PLUGINS=interpretops
USER 65532:65532
EXPOSE 8100
ENTRYPOINT ["python", "-P", "-m", "vllm.entrypoints.openai.api_server"]
