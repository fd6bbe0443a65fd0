"""The stage that fits maps in closed form.

A method is fitted either on extracted activations of both samples, or one place after another: then each map is fitted on the
activations that the texts cause while the maps of all earlier places act (AcT, https://arxiv.org/abs/2410.23054, section 4).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from pydantic import Field

from steerlab import patches
from steerlab.data import rows
from steerlab.guards import expressions, late
from steerlab.guards.json_values import JsonObject
from steerlab.job import DataSet, ExtractConfig, Job, MethodConfig, Selection, own_code
from steerlab.job.own_code import Code
from steerlab.methods import TABLE, fitted
from steerlab.patches.maps import Map
from steerlab.stages import extract
from steerlab.stages.spread import calls, reserved, subject
from steerlab.stages.spread.subject import Loading, Subject
from steerlab.storage.bases import BASE, PROMPT
from steerlab.storage.plan import ModelRef, Stage, Work

if TYPE_CHECKING:
    import ray
    from torch import Tensor

    from steerlab.activations.parquet import Activations
    from steerlab.methods.math.sequential_fit import Reading
    from steerlab.steered.language import SteeredModel
else:
    ray = late.module("ray")

_WALK_FIELDS = {"select", "max_tokens", "batch_tokens"}
"""Fields of `extract` that affect a fit of one place after another; its key contains only these."""


class Params(subject.OnModel):
    """Parameters of the stage."""

    method: JsonObject
    """The method's config."""
    reads: tuple[str, ...]
    """Roles of the data sets whose extracted activations the method loads."""
    walked: dict[str, DataSet] = Field(default={}, exclude_if=lambda walked: not walked)
    """Texts that a fit of one place after another runs through the model, by the role of their data set; empty if the method is
    fitted on extracted activations of both samples."""
    fingerprints: dict[str, str | list[str]] = Field(default={}, exclude_if=lambda fingerprints: not fingerprints)
    """Fingerprints of these texts, by role."""
    extract: ExtractConfig | None = Field(default=None, exclude_if=lambda config: config is None)
    """Settings of the forward passes on these texts; None without texts."""


def stage(job: Job, model: Subject, extractions: Mapping[str, Stage]) -> Stage:
    """Return the stage that fits the job's method; `extractions` are stages of the activations it loads, by data role."""
    assert job.extract is not None
    method = fitted(job.method)
    walked = {role: job.data.by_role[role] for role in method.walked(job.method)}
    params = Params(
        method=subject.dumped(job.method),
        reads=tuple(sorted(extractions)),
        walked=walked,
        fingerprints={role: rows.fingerprint(data) for role, data in walked.items()},
        extract=job.extract if walked else None,
        **model.fields,
    )
    declared = subject.dumped(params, exclude={"extract": ExtractConfig.model_fields.keys() - _WALK_FIELDS})
    inputs = {**model.inputs, **extract.read_by(extractions)}
    return Stage("fit", 3, declared, run, inputs, job.method.name, model.paths)


def run(work: Work) -> None:
    """Fit in one Ray task and write the patch, the prompt settings and a reference to the patch's model."""
    params = Params.model_validate(work.params)
    inputs = {role: work.stage.inputs[extract.read_as(role)] for role in params.reads}
    activations = {role: ModelRef(artifact=(work.store.root, stage.name, stage.key)) for role, stage in inputs.items()}
    method = fitted(params.method)
    config = method.Config.model_validate(params.method)
    walks = method.walks(config)
    # A fit of one place after another loads the model and may use a GPU; a fit on stored activations needs one CPU.
    resources = reserved.of_actors(work.scale) if walks else {"num_cpus": 1}
    fit = calls.result(_fit, (subject.of(work), params, activations, own_code.codes_in(params.method)), **resources)
    patch = patches.ActivationPatch.from_maps(fit.maps, fit.selection, method.strength_range, config.pixels)
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
    """Write the reference to a patch's model (`base.json`) and that model's prompt settings (`prompt.json`)."""
    # An artifact is named by stage and key, not by path: the patch stays valid when ROOT is moved, since ROOT contains both.
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
    """Prompt settings of that model."""
    seconds: float
    num_rows: dict[str, int]
    """Number of samples of the roles "source" and "target"."""


def _fit(loading: Loading, params: Params, activations: dict[str, ModelRef], codes: tuple[Code, ...]) -> _Fit:
    """Fit the maps of a method.

    Raises:
        ValueError: `method.steer` selects none of the extracted places, or the method's `fit` does not return maps.
    """
    from steerlab.activations.parquet import Activations

    # Received before the config is read, because the method may be one of the files sent with this task.
    own_code.receive(codes)
    # Activations are opened on the node that fits, so that an artifact in a bucket is downloaded there and not by the driver.
    read = {role: Activations.open(ref.locate()) for role, ref in activations.items()}
    method = fitted(params.method)
    config = method.Config.model_validate(params.method)
    fit = _in_order(loading, params, read) if method.walks(config) else _at_once(params, read)
    if config.inverse:
        fit = replace(fit, maps={name: fitted_map.inverse() for name, fitted_map in fit.maps.items()})
    return fit


def _at_once(params: Params, read: Mapping[str, Activations]) -> _Fit:
    """Fit all maps on extracted activations."""
    target, method = read["target"], fitted(params.method)
    config = method.Config.model_validate(params.method)
    selection = steered(Selection.model_validate(target.origin.selection), method.steers(config))
    names = _among(selection, target.modules)
    columns = {role: {name: sample.column(name, config.pooling) for name in names} for role, sample in read.items()}
    # The clock starts after the columns are read, so that `seconds` does not include the time of the disk.
    start_s = time.monotonic()
    maps = checked_maps(config, method.fit(config, columns["source"], columns["target"]))
    return _Fit(
        dict(maps),
        selection,
        target.origin.fingerprint,
        target.origin.prompt,
        time.monotonic() - start_s,
        {role: sample.num_rows for role, sample in read.items()},
    )


def _among(selection: Selection, places: Sequence[str]) -> list[str]:
    """Return the places that a selection contains. Raises ValueError if there are none."""
    names = [name for name in places if _takes(selection, name)]
    if not names:
        raise ValueError(
            f"method.steer.modules {selection.modules!r} selects none of the extracted places: {', '.join(places[:5])}"
        )
    return names


def checked_maps(config: MethodConfig, maps: object) -> Mapping[str, Map]:
    """Return the maps of a method's `fit` after checking their types.

    Raises:
        ValueError: the value is not a mapping from places to maps.
    """
    # A method may be a user's own file, which was not type-checked.
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
    """The method that distinguishes a `Map` from other values at run time: a Tensor has no method of this name."""

    def layer(self) -> object: ...


def steered(read: Selection, steer: Selection | None) -> Selection:
    """Return where maps act: on every token of the modules of the extraction, unless the method selects others (`steer`)."""
    # The side is always that of the extraction: a map that was fitted on inputs is meaningless for outputs.
    if steer is not None:
        return steer.model_copy(update={"side": read.side})
    return Selection(modules=read.modules, exclude_modules=read.exclude_modules, side=read.side)


def _takes(selection: Selection, name: str) -> bool:
    """Return whether a selection contains a place, which is named `module` or `module:element`."""
    module = name.partition(":")[0]
    # The pattern may end in `:NUMBER`, an element of the module's output, which does not restrict the modules.
    pattern = re.sub(r":\d+$", "", selection.modules)
    excluded = selection.exclude_modules is not None and expressions.whole(selection.exclude_modules, [module])
    return bool(expressions.whole(pattern, [module])) and not excluded


def _in_order(loading: Loading, params: Params, read: Mapping[str, Activations]) -> _Fit:
    """Fit the maps in the order in which the model runs their places, in one pass over the texts."""
    from steerlab.activations.reading import about_model
    from steerlab.methods.math.sequential_fit import fit_in_order
    from steerlab.patches import taps

    method = fitted(params.method)
    config = method.Config.model_validate(params.method)
    model = subject.load(loading)
    assert params.extract is not None, "the stage declares the settings of its forward passes"
    selection = steered(params.extract.select, method.steers(config))
    places = _among(selection, [tap.name for tap in taps.select(model.model, params.extract.select)])
    # Extracted target activations are those of the plain model; otherwise target texts run through the model as well.
    extracted = {name: read["target"].column(name, config.pooling) for name in places} if "target" in read else None
    readings, num_rows = _readings(model, params, selection)

    def fit_one(name: str, source_ND: Tensor, target_MD: Tensor) -> Map | None:
        target = target_MD.cpu() if extracted is None else extracted[name]
        return checked_maps(config, method.fit(config, {name: source_ND.cpu()}, {name: target})).get(name)

    start_s, select = time.monotonic(), params.extract.select
    taps_of = [taps.tap(name) for name in places]
    maps = fit_in_order(model.model, taps_of, select, readings, config.pooling, fit_one, pixels=config.pixels)
    about = about_model(model, params.extract)
    seconds = time.monotonic() - start_s
    num_rows = {role: sample.num_rows for role, sample in read.items()} | num_rows
    return _Fit(dict(maps), selection, str(about["fingerprint"]), cast("JsonObject", about["prompt"]), seconds, num_rows)


def _readings(model: SteeredModel, params: Params, steer: Selection) -> tuple[list[Reading], dict[str, int]]:
    """Return the texts of a fit of one place after another in batches, and the number of texts by role.

    Raises:
        ValueError: the model has patches and the texts need several batches.
    """
    import torch

    from steerlab.activations.reading import TextReader, batches
    from steerlab.methods.math.sequential_fit import Reading
    from steerlab.patches import token_masks

    assert params.extract is not None
    reader = TextReader(model, params.extract)
    encoded = {role: reader.encode(rows.read(data), data.format, 0)[0] for role, data in params.walked.items()}
    # The reader only tokenises here; its hooks would record every pass of the fit.
    reader.close()
    texts = [(text, role == "target") for role, some in encoded.items() for text in some]
    readings = []
    for chunk in batches([len(text) for text, _ in texts], params.extract.batch_tokens):
        batch = model.encoder.collate([texts[i][0] for i in chunk]).to(model.device)
        is_target_B = torch.tensor([texts[i][1] for i in chunk])
        read_BT, steered_BT = (token_masks.selected(batch, select, model.device) for select in (params.extract.select, steer))
        readings.append(Reading(batch.patched_inputs, read_BT, steered_BT, is_target_B))
    # The fit runs batches in threads side by side (sequential_fit.py), but a model's patches hold the roles of one call.
    if model.patches and len(readings) > 1:
        raise ValueError(
            f"method.incremental: on a model with patches, the {len(texts)} texts must fit into one batch; raise "
            "extract.batch_tokens or set method.incremental: false"
        )
    return readings, {role: len(some) for role, some in encoded.items()}
