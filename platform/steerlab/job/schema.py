"""Generate the JSON schema of jobs, by which editors complete and check job files (schema.json in this folder).

It does not express relations between two fields, nor the syntax of sources; otherwise it accepts what `file.validate` accepts.
After a change to any config, run `python -m steerlab schema --anew > platform/steerlab/job/schema.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from steerlab.job.job import Job

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(kind: type[Job]) -> str:
    """Return the JSON schema of job files, as text."""
    root: dict[str, Any] = {"$schema": _DIALECT, **kind.model_json_schema()}
    source = root["$defs"]["ModelConfig"]["properties"]["source"]
    # `model.source` may also contain a whole job instead of a source. "#" is the schema itself, so an inner job is checked like
    # the outer one.
    source["anyOf"] = [{"$ref": "#"} if choice.get("type") == "object" else choice for choice in source["anyOf"]]
    for union in _unions(root):
        for choice in union["oneOf"]:
            config, tag = root["$defs"][choice["$ref"].rpartition("/")[2]], union["discriminator"]["propertyName"]
            # pydantic does not require a tag that has a default, so an editor could not distinguish the choices.
            config["required"] = sorted({*config.get("required", ()), tag})
    return json.dumps(root, indent=1)


def _unions(node: object) -> Iterator[dict[str, Any]]:
    """Yield the unions of a schema whose choices differ by a tag."""
    if isinstance(node, dict):
        if "discriminator" in node:
            yield node
        for value in node.values():
            yield from _unions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _unions(value)
