"""Tokenizers and chat templates that do not lie beside the model but are named by sources of their own."""

from __future__ import annotations

import hashlib
import json

from steerlab import models
from steerlab.data import sources
from steerlab.guards import files
from steerlab.inputs.rendering import TemplateError, default_of
from steerlab.job import written_out


def fingerprint(name: str, source: str) -> str:
    """Return a value that changes when what is behind a source of `Encoder.elsewhere` changes; part of a stage's key."""
    if name == "tokenizer":
        return sources.fingerprint(source)
    return f"sha256:{hashlib.sha256(template_of(source).encode()).hexdigest()}"


def template_of(source: str) -> str:
    """Return a chat template: a text is one itself, everything else is the source of a file or model that holds one.

    Raises:
        ValueError: the source is wrong, or holds no template.
    """
    if written_out(source):
        return source
    path = sources.fetch(source)
    if path.is_dir():
        named = path / "chat_template.jinja"
        template = files.read_text(named) if named.is_file() else models.load_tokenizer(path).chat_template
    else:
        text = files.read_text(path)
        template = json.loads(text).get("chat_template") if path.suffix == ".json" else text
    try:
        return default_of(template)
    except TemplateError as error:
        raise ValueError(f"model.chat_template {source}: {error}") from None
