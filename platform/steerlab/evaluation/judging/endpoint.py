"""Where a judge answers: any server of the chat completions API that OpenAI defined, a local one (vLLM, llama.cpp) included."""

from __future__ import annotations

import os
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue

from steerlab.job import Frozen


def _url(url: str) -> str:
    """Return a base URL without a slash at its end. Raises ValueError if it is none, or holds a password."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r:.80} is no base URL: it is what stands before /chat/completions, such as https://HOST/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("a base URL in a job holds no user, password or option: name the variable of the key in key_env")
    return url.rstrip("/")


class Price(Frozen):
    """What tokens cost, as the provider's page says."""

    input: float = Field(ge=0)
    """Price of a million tokens that are read."""
    output: float = Field(ge=0)
    """Price of a million tokens that are written."""
    currency: str = "USD"
    """Name of the currency."""

    def of(self, input_tokens: float, output_tokens: float) -> float:
        """Return the price of so many tokens."""
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


class Endpoint(Frozen):
    """A judge behind an API. What is asked is kept by its content in ROOT/artifacts/answers, and asked once."""

    base_url: Annotated[str, AfterValidator(_url)]
    """What stands before /chat/completions: https://api.openai.com/v1, http://127.0.0.1:8000/v1."""
    model: str = Field(min_length=1)
    """Name of the model there. Prefer a dated name: an alias may become another model without a change of the job."""
    key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """NAME of the environment variable that holds the key, never the key; null sends none, as local servers need none."""
    max_tokens: int | None = Field(1024, ge=1)
    """Longest answer in tokens; null leaves the limit to the server."""
    temperature: float | None = Field(0.0, ge=0)
    """Sampling temperature; null sends none, for models that refuse one."""
    options: dict[str, JsonValue] = {}
    """Further fields of each request: {max_completion_tokens: 500}, {seed: 1}."""
    parallel: int = Field(8, ge=1, le=256)
    """Calls at a time."""
    retries: int = Field(6, ge=0, le=100)
    """Further tries of a call that met a limit (429), an error of the server (5xx), a cut connection or an answer that is no
    JSON of the API."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds for one try."""
    wait_s: float = Field(1.0, ge=0)
    """Seconds before the second try, doubled for each further one. Retry-After of the server goes first."""
    longest_wait_s: float = Field(60.0, ge=0)
    """Longest wait between two tries, in seconds."""
    price: Price | None = None
    """Price of the tokens; null says and records tokens only."""

    def key(self) -> str | None:
        """Return the key; None if the endpoint takes none. Raises ValueError if the variable is not set here."""
        if self.key_env is None:
            return None
        if not (key := os.environ.get(self.key_env, "").strip()):
            raise ValueError(f"key_env: the environment variable {self.key_env}, the key of {self.base_url}, is not set here")
        return key
