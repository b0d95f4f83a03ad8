"""Reading a file from anywhere fsspec reads, with a fault of the store told in one line."""

from typing import Any

import aiohttp

from discovery.errors import DiscoveryError

CONNECT_S = 10
READ_S = 60


def fetch(url: str, most_bytes: int, s3_endpoint: str | None = None) -> bytes:
    """All of a file. Raises `DiscoveryError` that names the URL without its query, which may hold a key.

    s3_endpoint  the service that `s3://` URLs are of; None: as the environment says, else Amazon's
    """
    import fsspec

    shown = url.split("?", 1)[0]
    is_s3 = url.startswith(("s3://", "s3a://"))
    faults: tuple[type[Exception], ...] = (OSError, ValueError, aiohttp.ClientError, *_store_faults(is_s3))
    try:
        with fsspec.open(url, "rb", **(_s3_options(s3_endpoint) if is_s3 else {})) as stream:
            data: Any = stream.read(most_bytes + 1)
    except ImportError as error:
        needed = "pip install 'interpretops[s3]'" if is_s3 else str(error)
        raise DiscoveryError(f"{shown}: cannot be read, as its store needs a package: {needed}") from error
    except faults as error:
        at = f" at {s3_endpoint}" if is_s3 and s3_endpoint else ""
        told = " ".join(str(error).replace(url, shown).split()) or type(error).__name__
        raise DiscoveryError(f"{shown}: cannot be read{at} ({type(error).__name__}: {told})") from error
    if len(data) > most_bytes:
        raise DiscoveryError(f"{shown}: is larger than {most_bytes} bytes; split it")
    return bytes(data)


def _s3_options(endpoint: str | None) -> dict[str, Any]:
    """Few attempts, each bounded: an unreachable store is told within seconds. Keys are the environment's."""
    patience = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"max_attempts": 1}}
    return {"endpoint_url": endpoint, "config_kwargs": patience, "skip_instance_cache": True}


def _store_faults(is_s3: bool) -> tuple[type[Exception], ...]:
    """What the S3 client raises of its own: no keys, no connection, no such region."""
    if not is_s3:
        return ()
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # told where the file is opened
        return ()
    return BotoCoreError, ClientError
