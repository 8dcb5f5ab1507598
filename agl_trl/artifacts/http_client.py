"""The HTTP client that the Hub's client speaks with and brings, under one name."""

import huggingface_hub


if int(huggingface_hub.__version__.partition(".")[0]) >= 2:
    import httpx2 as httpx
else:
    import httpx  # type: ignore[no-redef]

__all__ = ["httpx"]
