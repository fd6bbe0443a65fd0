"""The stage that fits maps in closed form.

A method is fitted either on extracted activations of both samples, or place after place: then each map is fitted on what the
source texts cause with the maps of all earlier places in force (AcT, https://arxiv.org/abs/2410.23054, section 4).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import ray
from pydantic import Field

from steerlab import patches
from steerlab.data import rows
from steerlab.guards import expressions
from steerlab.guards.json_values import JsonObject
from steerlab.job import DataSet, ExtractConfig, Job, MethodConfig, Selection, own_code
from steerlab.job.own_code import Code
from steerlab.methods import TABLE, fitted
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
"""Fields of `extract` that change a fit place after place; the others are left out of its key."""


class Params(subject.OnModel):
    """Parameters of the stage."""

    method: JsonObject
    """The method's config."""
    reads: tuple[str, ...]
    """Roles of the data sets whose extracted activations the method reads."""
    source: DataSet | None = Field(default=None, exclude_if=lambda source: source is None)
    """Source texts of a fit place after place; None if the method is fitted on extracted activations of both samples."""
    source_fingerprint: str | list[str] | None = Field(default=None, exclude_if=lambda fingerprint: fingerprint is None)
    extract: ExtractConfig | None = Field(default=None, exclude_if=lambda config: config is None)
    """How the source texts are read; None if `source` is None."""


def stage(job: Job, model: Subject, extractions: Mapping[str, Stage]) -> Stage:
    """Return the stage that fits the job's method; `extractions` are the stages of the activations it reads, by data role."""
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
    return Stage("fit", 2, declared, run, inputs, job.method.name, model.paths)


def run(work: Work) -> None:
    """Fit in one Ray task and write the patch, the prompt settings and a reference to the model that the patch is for."""
    params = Params.model_validate(work.params)
    inputs = {role: work.stage.inputs[extract.read_as(role)] for role in params.reads}
    activations = {role: ModelRef(artifact=(work.store.root, stage.name, stage.key)) for role, stage in inputs.items()}
    method = fitted(params.method)
    walks = method.walks(method.Config.model_validate(params.method))
    # A fit place after place loads the model and may use a GPU; a fit on extracted activations is arithmetic on one CPU.
    resources = reserved.of_actors(work.scale) if walks else {"num_cpus": 1}
    task = _fit.options(**resources)  # type: ignore[attr-defined]
    future = task.remote(subject.of(work), params, activations, own_code.codes_in(params.method))
    # Short waits: Python handles a signal, or an exception that another thread raises in this one, only between calls of Ray.
    while not ray.wait([future], timeout=_POLL_S)[0]:
        pass
    fit: _Fit = ray.get(future)
    patch = patches.ActivationPatch.from_maps(fit.maps, fit.selection, method.strength_range)
    patches.save(patch, work.directory / "patch", fit.fingerprint)
    write_base(work, params, fit.prompt)
    facts = {
        "seconds": fit.seconds,
        "places": len(fit.maps),
        "neurons": sum(fitted_map.width for fitted_map in fit.maps.values()),
        "rows": fit.num_rows,
    }
    (work.directory / "fit.json").write_text(json.dumps(facts, indent=2))


def write_base(work: Work, params: subject.OnModel, prompt: JsonObject) -> None:
    """Write which model a patch is for (`base.json`) and how that model is prompted (`prompt.json`)."""
    # An artifact is named by stage and key, not by path: the patch stays valid when ROOT moves, since both lie in it.
    below = work.stage.inputs.get(subject.MODEL)
    base = {"stage": below.name, "key": below.key} if below else {"source": params.model.source}
    (work.directory / BASE).write_text(json.dumps(base))
    (work.directory / PROMPT).write_text(json.dumps(prompt))


@dataclass(frozen=True)
class _Fit:
    """Result of a fit, small enough to be sent to the driver: a few vectors for each place."""

    maps: dict[str, Map]
    """The fitted maps by place."""
    selection: Selection
    """Modules and tokens on which the maps act."""
    fingerprint: str
    """Fingerprint of the model that the patch is for."""
    prompt: JsonObject
    """How that model is prompted."""
    seconds: float
    num_rows: dict[str, int]
    """Number of samples, of the roles "source" and "target"."""


@ray.remote(scheduling_strategy=reserved.ANYWHERE)
def _fit(loading: Loading, params: Params, activations: dict[str, ModelRef], codes: tuple[Code, ...]) -> _Fit:
    """Fit the maps of a method.

    Raises:
        ValueError: `method.steer` selects none of the extracted places, or the method's `fit` returns something else than maps.
    """
    from steerlab.activations.parquet import Activations

    # Before the config is read: the method may be one of the files that were sent along.
    own_code.receive(codes)
    # Opened on the node that fits: an artifact in a bucket is downloaded there, and not by the driver.
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
    columns = {role: {name: sample.column(name, config.pooling) for name in names} for role, sample in read.items()}
    # The clock starts after the columns are read: `seconds` is the time of the method, not of the disk.
    start_s = time.monotonic()
    if method.walks(config):
        maps, num_source = _walk(loading, params, columns["target"], selection)
    else:
        maps = checked_maps(config, method.fit(config, columns["source"], columns["target"]))
        num_source = read["source"].num_rows
    if config.inverse:
        maps = {name: fitted_map.inverse() for name, fitted_map in maps.items()}
    return _Fit(
        dict(maps),
        selection,
        target.origin.fingerprint,
        target.origin.prompt,
        time.monotonic() - start_s,
        {"source": num_source, "target": target.num_rows},
    )


def checked_maps(config: MethodConfig, maps: object) -> Mapping[str, Map]:
    """Return what a method's `fit` returned.

    Raises:
        ValueError: it is no mapping from places to maps.
    """
    # A method may be a user's own file, which no type checker has seen.
    code = TABLE.foreign(config)
    method = f"method {config.name}" + (f" of {code}" if code else "")
    if not isinstance(maps, Mapping):
        raise ValueError(f"{method}: fit must return a Map for each place; it returned a {type(maps).__name__}")
    for place, value in maps.items():
        if not isinstance(value, _MapLike):
            raise ValueError(f"{method}: fit must return a Map for each place; {place} got a {type(value).__name__}")
    return cast("Mapping[str, Map]", maps)


@runtime_checkable
class _MapLike(Protocol):
    """The method that tells a `Map` from other values at run time: a Tensor has none of this name."""

    def layer(self) -> object: ...


def steered(read: Selection, steer: Selection | None) -> Selection:
    """Return where maps act: on every token of the modules that were read, unless the method selects others (`steer`)."""
    # The side is always that of the extraction: a map that was fitted on inputs means nothing on outputs.
    if steer is not None:
        return steer.model_copy(update={"side": read.side})
    return Selection(modules=read.modules, exclude_modules=read.exclude_modules, side=read.side)


def _takes(selection: Selection, name: str) -> bool:
    """Return whether a selection contains a place, which is named `module` or `module:element`."""
    module = name.partition(":")[0]
    # The pattern may end in the number of an element of the module's output, too; it does not restrict the modules.
    pattern = re.sub(r":\d+$", "", selection.modules)
    excluded = selection.exclude_modules is not None and expressions.whole(selection.exclude_modules, [module])
    return bool(expressions.whole(pattern, [module])) and not excluded


def _walk(loading: Loading, params: Params, target: dict[str, Tensor], steer: Selection) -> tuple[Mapping[str, Map], int]:
    """Fit the maps in the order in which the model runs their places; return them and the number of source texts."""
    from steerlab.activations.reading import TextReader, batches
    from steerlab.methods.math.sequential_fit import Reading, fit_in_order
    from steerlab.patches import taps

    method = fitted(params.method)
    config = method.Config.model_validate(params.method)
    model = subject.load(loading)
    extract, data = params.extract, params.source
    assert extract is not None and data is not None, "the stage of a fit place after place declares its source texts"
    reader = TextReader(model, extract)
    texts, _ = reader.encode(rows.read(data), data.format, 0)
    # The reader only tokenises here; its hooks would read every pass of the fit.
    reader.close()
    readings = []
    for chunk in batches([len(text) for text in texts], extract.batch_tokens):
        batch = model.encoder.collate([texts[i] for i in chunk]).to(model.device)
        readings.append(Reading(batch.patched_inputs, taps.selected(batch, extract.select), taps.selected(batch, steer)))
    # The fit runs batches in threads side by side (sequential_fit.py), and a model's patches know the tokens of one call only.
    if model.patches and len(readings) > 1:
        raise ValueError(
            f"method.incremental: on a model that carries patches the {len(texts)} source texts must fit into one batch; "
            "raise extract.batch_tokens or set method.incremental: false"
        )
    places = [taps.tap(name) for name in target]

    def fit_one(name: str, source_ND: Tensor) -> Map | None:
        return checked_maps(config, method.fit(config, {name: source_ND.cpu()}, {name: target[name]})).get(name)

    pooling = config.pooling
    return fit_in_order(model.model, places, extract.select, readings, pooling, fit_one), len(texts)
