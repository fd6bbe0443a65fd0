"""Settings of a judge's server: any server of OpenAI's chat completions API, including local ones (vLLM, llama.cpp)."""

from __future__ import annotations

import os
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue

from steerlab.job import Frozen


def _url(url: str) -> str:
    """Return a base URL without a slash at its end. Raises ValueError if it is not a URL or contains a password."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r:.80} is not a base URL: give the part before /chat/completions, such as https://HOST/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("a base URL in a job must hold no user, password or option: name the variable of the key in key_env")
    return url.rstrip("/")


class Price(Frozen):
    """Prices of tokens, from the provider's page."""

    input: float = Field(ge=0)
    """Price of a million input tokens."""
    output: float = Field(ge=0)
    """Price of a million output tokens."""
    currency: str = "USD"
    """Name of the currency."""

    def of(self, input_tokens: float, output_tokens: float) -> float:
        """Return the price of these numbers of tokens."""
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


class Endpoint(Frozen):
    """A judge's API. Each question is asked once; answers are stored in ROOT/artifacts/answers under a hash of the question."""

    base_url: Annotated[str, AfterValidator(_url)]
    """URL before /chat/completions: https://api.openai.com/v1, http://127.0.0.1:8000/v1."""
    model: str = Field(min_length=1)
    """Name of the model. Prefer a dated name, since the provider may change the model of an alias."""
    key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """NAME of the environment variable with the key, never the key itself; null sends no key, which local servers accept."""
    max_tokens: int | None = Field(1024, ge=1)
    """Longest answer in tokens; null leaves the limit to the server."""
    temperature: float | None = Field(0.0, ge=0)
    """Sampling temperature; null omits it, for models that refuse this field."""
    options: dict[str, JsonValue] = {}
    """Further fields of each request: {max_completion_tokens: 500}, {seed: 1}."""
    parallel: int = Field(8, ge=1, le=256)
    """Number of concurrent calls."""
    retries: int = Field(6, ge=0, le=100)
    """Retries of a call after a limit (429), an error of the server (5xx), a broken connection or an answer that is not JSON of
    the API."""
    timeout_s: float = Field(120.0, gt=0)
    """Timeout of one try, in seconds."""
    wait_s: float = Field(1.0, ge=0)
    """Seconds before the second try, doubled for each further one. A Retry-After of the server has priority."""
    longest_wait_s: float = Field(60.0, ge=0)
    """Longest wait between two tries, in seconds."""
    price: Price | None = None
    """Price of the tokens; with null, only tokens are reported and recorded."""

    def key(self) -> str | None:
        """Return the key; None if the endpoint needs none. Raises ValueError if the variable is not set here."""
        if self.key_env is None:
            return None
        if not (key := os.environ.get(self.key_env, "").strip()):
            raise ValueError(f"key_env: the environment variable {self.key_env}, the key of {self.base_url}, is not set here")
        return key
