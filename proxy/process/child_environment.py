"""The environment variables that child processes may inherit: an allow-list, so that secrets do not leak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_NAMES: Final = frozenset(
    [
        "CC",
        "CONDA_PREFIX",
        "CPATH",
        "CPLUS_INCLUDE_PATH",
        "CXX",
        "C_INCLUDE_PATH",
        "GLIBC_TUNABLES",
        "HOME",
        "HOSTNAME",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "LIBRARY_PATH",
        "LOGNAME",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PATH",
        "SHELL",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
        "TEMP",
        "TERM",
        "TMP",
        "TMPDIR",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "XDG_RUNTIME_DIR",
    ]
)
_PREFIXES: Final = (
    # Python, compilers and allocators
    *("LC_", "PYTHON", "NUMBA_", "MALLOC_", "TCMALLOC_", "JEMALLOC_"),
    # vLLM and its dependencies
    *("VLLM_", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_", "CUTLASS_", "AOTI_", "RAY_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_"),
    # devices and their interconnects
    *("CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_"),
    *("ROCM_", "ROCR_", "HIP_", "HSA_", "AMD_", "MIOPEN_"),
    # threads
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_", "ONEDNN_", "DNNL_"),
)
_SECRET_WORDS: Final = frozenset(
    ("CREDENTIAL", "CREDENTIALS", "DSN", "KEY", "KEYS", "PASSWD", "PASSWORD", "SECRET", "TOKEN")
)
_FETCHING: Final = frozenset(
    [
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    ]
)


def child_environment(environ: Mapping[str, str], *, fetches: bool = False) -> dict[str, str]:
    """The part of ``environ`` needed to run a model; with ``fetches``, also to reach Hugging Face."""
    return {
        name: value
        for name, value in environ.items()
        if name in _NAMES
        or (name.startswith(_PREFIXES) and not _SECRET_WORDS & set(name.split("_")))
        or (fetches and name.upper() in _FETCHING)
    }
