"""Load and fingerprint tokenizers and chat templates that a job names by their own sources instead of using the model's."""

from __future__ import annotations

import hashlib
import json

from steerlab import models
from steerlab.data import sources
from steerlab.guards import files
from steerlab.inputs.rendering import TemplateError, default_of
from steerlab.job import written_out


def fingerprint(name: str, source: str) -> str:
    """Return a value that changes with the content of a source of `Encoder.elsewhere`; part of a stage's key.

    `name` is `tokenizer` or `chat_template`.
    """
    if name == "tokenizer":
        return sources.fingerprint(source)
    # The text is hashed, so that the same template in another file gives the same key.
    return f"sha256:{hashlib.sha256(template_of(source).encode()).hexdigest()}"


def template_of(source: str) -> str:
    """Return the text of a chat template.

    `source` is the text itself, or the source of a Jinja file, of a tokenizer_config.json, or of a model with a template.

    Raises:
        ValueError: the source is wrong, or has no template.
    """
    if written_out(source):
        return source
    path = sources.fetch(source)
    if path.is_dir():
        # transformers 5 saves templates in this file, older versions in tokenizer_config.json.
        named = path / "chat_template.jinja"
        template = files.read_text(named) if named.is_file() else models.load_tokenizer(path).chat_template
    else:
        text = files.read_text(path)
        template = json.loads(text).get("chat_template") if path.suffix == ".json" else text
    try:
        return default_of(template)
    except TemplateError as error:
        raise ValueError(f"model.chat_template {source}: {error}") from None
