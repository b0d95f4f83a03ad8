# The engine on a GPU: vLLM's own image and the plugin. From the repository's root:
#   docker build -f deploy/docker/engine-gpu.Dockerfile -t interpretops-engine:gpu .
FROM vllm/vllm-openai:v0.32.0
WORKDIR /srv/interpretops
COPY pyproject.toml README.md LICENSE ./
COPY discovery discovery
COPY interpretops interpretops
COPY proxy proxy
COPY steering_kernels steering_kernels
# Only what is missing may come: nothing that vLLM's image holds is moved.
RUN python3 -m pip list --format=freeze > /tmp/stock.txt && \
    python3 -m pip install --no-cache-dir --constraint /tmp/stock.txt . && \
    rm /tmp/stock.txt && \
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
