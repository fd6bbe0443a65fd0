"""The JSON schema of jobs, with which editors complete and check job files: schema.json beside this file.

It accepts what `file.validate` accepts, but for what one field says about another and for the grammar of sources. After a
change to any config: `python -m steerlab schema > platform/steerlab/job/schema.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from steerlab.job.job import Job

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(kind: type[Job]) -> str:
    """Return the JSON schema of job files."""
    found: dict[str, Any] = {"$schema": _DIALECT, **kind.model_json_schema()}
    source = found["$defs"]["ModelConfig"]["properties"]["source"]
    # The job that trains the model, where it stands in the file itself.
    source["anyOf"] = [{"$ref": "#"} if choice.get("type") == "object" else choice for choice in source["anyOf"]]
    for union in _unions(found):
        for choice in union["oneOf"]:
            config, tag = found["$defs"][choice["$ref"].rpartition("/")[2]], union["discriminator"]["propertyName"]
            config["required"] = sorted({*config.get("required", ()), tag})
    return json.dumps(found, indent=1)


def _unions(node: object) -> Iterator[dict[str, Any]]:
    """Find the unions whose choices are told apart by a tag."""
    if isinstance(node, dict):
        if "discriminator" in node:
            yield node
        for value in node.values():
            yield from _unions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _unions(value)
