"""The stage that fits maps in closed form: on extracted activations, or place after place along the source texts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from pydantic import Field

from steerlab import patches
from steerlab.data import rows
from steerlab.guards import expressions
from steerlab.guards.json_values import JsonObject
from steerlab.job import DataSet, ExtractConfig, Job, Selection, own_code
from steerlab.job.own_code import Code
from steerlab.methods import fitted
from steerlab.patches.maps import Map
from steerlab.stages import extract
from steerlab.stages.spread import reserved, subject
from steerlab.stages.spread.subject import Loading, Subject
from steerlab.storage.bases import BASE, PROMPT
from steerlab.storage.plan import ModelRef, Stage, Work

if TYPE_CHECKING:
    from torch import Tensor

_POLL_S = 0.5


_WALK_FIELDS = {"select", "max_tokens", "batch_tokens"}
"""Fields of `extract` that matter where texts are walked through."""


class Params(subject.OnModel):
    """Parameters of the stage."""

    method: JsonObject
    """The method's config."""
    reads: tuple[str, ...]
    """Roles of the extracted activations."""
    source: DataSet | None = Field(default=None, exclude_if=lambda source: source is None)
    """Texts that are walked through, place after place; None where both samples are extracted."""
    source_fingerprint: str | list[str] | None = Field(default=None, exclude_if=lambda fingerprint: fingerprint is None)
    extract: ExtractConfig | None = Field(default=None, exclude_if=lambda config: config is None)
    """How these texts are read."""


def stage(job: Job, model: Subject, extractions: Mapping[str, Stage]) -> Stage:
    """Return the fitting stage of a job; `extractions` leave the activations that its method reads, by data role."""
    assert job.extract is not None
    method = fitted(job.method)
    walks = method.walks(job.method)
    source = job.data.by_role["source"] if walks else None
    params = Params(
        method=subject.dumped(job.method),
        reads=tuple(sorted(extractions)),
        source=source,
        source_fingerprint=None if source is None else rows.fingerprint(source),
        extract=job.extract if walks else None,
        **model.fields,
    )
    declared = subject.dumped(params, exclude={"extract": ExtractConfig.model_fields.keys() - _WALK_FIELDS})
    inputs = {**model.inputs, **extract.read_by(extractions)}
    return Stage("fit", 2, declared, run, inputs, job.method.name, model.places)


def run(work: Work) -> None:
    """Fit in one task of the cluster and write the patch, the prompt settings and what the patch stands on."""
    params = Params.model_validate(work.params)
    inputs = {role: work.stage.inputs[extract.read_as(role)] for role in params.reads}
    activations = {role: ModelRef(artifact=(work.store.root, stage.name, stage.key)) for role, stage in inputs.items()}
    method = fitted(params.method)
    walks = method.walks(method.Config.model_validate(params.method))
    resources = reserved.of_actors(work.scale) if walks else {"num_cpus": 1}
    task = _fit.options(**resources)  # type: ignore[attr-defined]
    future = task.remote(subject.of(work), params, activations, own_code.codes_in(params.method))
    while not ray.wait([future], timeout=_POLL_S)[0]:
        pass
    fit: _Fit = ray.get(future)
    patch = patches.ActivationPatch.from_maps(fit.maps, fit.selection, method.strength_range)
    patches.save(patch, work.directory / "patch", fit.fingerprint)
    write_base(work, params, fit.prompt)
    facts = {
        "seconds": fit.seconds,
        "places": len(fit.maps),
        "neurons": sum(one.width for one in fit.maps.values()),
        "rows": fit.num_rows,
    }
    (work.directory / "fit.json").write_text(json.dumps(facts, indent=2))


def write_base(work: Work, params: subject.OnModel, prompt: JsonObject) -> None:
    """Write what the patch of a frozen model stands on, and how that model is prompted."""
    below = work.stage.inputs.get(subject.MODEL)
    base = {"stage": below.name, "key": below.key} if below else {"source": params.model.source}
    (work.directory / BASE).write_text(json.dumps(base))
    (work.directory / PROMPT).write_text(json.dumps(prompt))


@dataclass(frozen=True)
class _Fit:
    """What a fit hands back: a few vectors a place, and where they act."""

    maps: dict[str, Map]
    selection: Selection
    fingerprint: str
    """Of the model that the patch is for."""
    prompt: JsonObject
    """How that model is prompted."""
    seconds: float
    num_rows: dict[str, int]


@ray.remote(scheduling_strategy=reserved.ANYWHERE)
def _fit(loading: Loading, params: Params, activations: dict[str, ModelRef], codes: tuple[Code, ...]) -> _Fit:
    """Fit the maps of a method."""
    from steerlab.activations.parquet import Activations

    own_code.receive(codes)
    read = {role: Activations.open(ref.locate()) for role, ref in activations.items()}
    target = read["target"]
    method = fitted(params.method)
    config = method.Config.model_validate(params.method)
    selection = steered(Selection.model_validate(target.origin.selection), method.steers(config))
    names = [name for name in target.modules if _takes(selection, name)]
    if not names:
        raise ValueError(
            f"method.steer.modules {selection.modules!r} takes none of the extracted places: {', '.join(target.modules[:5])}"
        )
    columns = {role: {name: one.column(name, config.pooling) for name in names} for role, one in read.items()}
    start_s = time.monotonic()
    if method.walks(config):
        maps, num_source = _walk(loading, params, columns["target"], selection)
    else:
        maps = method.fit(config, columns["source"], columns["target"])
        num_source = read["source"].num_rows
    if config.inverse:
        maps = {name: found.inverse() for name, found in maps.items()}
    return _Fit(
        dict(maps),
        selection,
        target.origin.fingerprint,
        target.origin.prompt,
        time.monotonic() - start_s,
        {"source": num_source, "target": target.num_rows},
    )


def steered(read: Selection, steer: Selection | None) -> Selection:
    """Return where maps act: every token of what was read, unless the method says otherwise."""
    if steer is not None:
        return steer.model_copy(update={"side": read.side})
    return Selection(modules=read.modules, exclude_modules=read.exclude_modules, side=read.side)


def _takes(selection: Selection, name: str) -> bool:
    """Say whether a selection takes a place that was read."""
    module = name.partition(":")[0]
    pattern = re.sub(r":\d+$", "", selection.modules)
    excluded = selection.exclude_modules is not None and expressions.whole(selection.exclude_modules, [module])
    return bool(expressions.whole(pattern, [module])) and not excluded


def _walk(loading: Loading, params: Params, target: dict[str, Tensor], steer: Selection) -> tuple[Mapping[str, Map], int]:
    """Fit place after place along the source texts."""
    from steerlab.activations.reading import TextReader, batches
    from steerlab.methods.math.sequential_fit import Reading, fit_in_order
    from steerlab.patches import taps

    method = fitted(params.method)
    config = method.Config.model_validate(params.method)
    model = subject.load(loading)
    extract, data = params.extract, params.source
    assert extract is not None and data is not None, "the stage declares what is walked through"
    reader = TextReader(model, extract)
    texts, _ = reader.encode(rows.read(data), data.format, 0)
    reader.close()
    readings = []
    for chunk in batches([len(text) for text in texts], extract.batch_tokens):
        batch = model.encoder.collate([texts[i] for i in chunk]).to(model.device)
        readings.append(Reading(batch.patched_inputs, taps.selected(batch, extract.select), taps.selected(batch, steer)))
    if model.patches and len(readings) > 1:
        raise ValueError(
            f"method.incremental: on a model that carries patches the {len(texts)} source texts must fit into one batch; "
            "raise extract.batch_tokens or set method.incremental: false"
        )
    places = [taps.tap(name) for name in target]

    def fit_one(name: str, source_ND: Tensor) -> Map | None:
        return method.fit(config, {name: source_ND.cpu()}, {name: target[name]}).get(name)

    pooling = config.pooling
    return fit_in_order(model.model, places, extract.select, readings, pooling, fit_one), len(texts)
