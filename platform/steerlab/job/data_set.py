"""Configs of the data sets of a job, and of the places in a model that are read or steered.

The file is longer than 300 lines because every setting of a data set is described where it is declared.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from steerlab.job import compositions
from steerlab.job.source_fields import Source
from steerlab.job.typed import Frozen, Seed


def _spelt(value: object) -> object:
    """Turn the keys of `map` into texts: YAML reads 0 and true as a number and a boolean, but a saved job has texts."""
    if not isinstance(value, dict):
        return value
    return {str(key).lower() if isinstance(key, bool) else str(key): name for key, name in value.items()}


Names = Annotated[dict[str, str], BeforeValidator(_spelt)]
"""Values of a field -> the texts that replace them."""


_MOST_SEEDS = 100_000


class DataSet(Frozen):
    """One data set and how its rows become tokens."""

    source: Source | Annotated[tuple[Source, ...], Field(min_length=1)]
    """Source of the rows: `hf:owner/name#split`, a path or URI (json, jsonl, yaml, parquet, csv, tsv, txt, compressed or not; a
    folder of shards or a pattern), `sdist:NAME==VERSION#path`, `tiny:KIND/SPLIT` and others (`steerlab describe source`). Of a
    list, one source is read after another."""
    format: Literal["instruction", "text", "preference", "conversation", "image"] = "instruction"
    """instruction: fields instruction and output, optionally input, system, history; text: one field, named by `field`;
    preference: a prompt with `chosen` and `rejected` (texts, messages or HH-RLHF dialogues), `completions` with scores, or a
    `completion` with a `label`; conversation: `messages`, `conversations`, or `prompt` and `completion`; image: an `image`
    (values from 0 to 255, grey or RGB) and its caption in `field`. jobs/README.md, section Data files, shows each."""
    field: str = "text"
    """Field of the text (format text) or the caption (format image). A path names a nested field: prompt.text."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of a text file without a header, separated by commas in .csv and by tabs in other files; null if the
    rows of the file have names."""
    rows_at: str | None = Field(None, exclude_if=lambda path: path is None)
    """Path of the list of rows in a JSON or YAML object that holds several lists: data.train. Null finds the only list."""
    # An empty setting is left out of the dump: keys of artifacts are hashes of it, and must not change with a new setting.
    rename: dict[str, str] = Field({}, exclude_if=lambda renamed: not renamed)
    """Fields to rename, {old: new}: {question: instruction, answer: output}; other settings use the new names. A field that
    already has the new name is dropped. A path takes a nested field out: {answers.text.0: output}."""
    fill: dict[str, str] = Field({}, exclude_if=lambda filled: not filled)
    """Fields that are set to one text in every row: {output: "I can't help with that."}."""
    map: dict[str, Names] = Field({}, exclude_if=lambda mapped: not mapped)
    """Texts that replace the values of a field: {label: {0: negative, 1: positive}}; any other value makes the row bad."""
    compose: dict[str, str] = Field({}, exclude_if=lambda composed: not composed)
    """Fields made from others, after `map`: {instruction: "{question}\\n{choices}"}; fields and paths in braces, {{ for a
    brace. A list of texts becomes lettered lines (A. first), with {choices:lines} plain ones, with {choices:commas} one."""
    as_text: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
    """Fields whose numbers and booleans are read as texts, as JSON writes them; in other text fields they make the row bad."""
    where: dict[str, tuple[float | None, float | None]] = {}
    """Keep rows whose number in a field is in [low, high]; null is an open end, true counts as 1. Rows with null or NaN in the
    field are left out."""
    equals: dict[str, str | int | float | bool | None] = {}
    """Keep rows whose field equals this value: 1 equals 1.0 and the text "1", true the text "true", null also NaN. Applied
    before `map` and `compose`."""
    subset: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(None, exclude_if=lambda subset: subset is None)
    """Name, or names, of the subsets to read from a JSON object of lists of texts, {none: [...], pixel art: [...]}; null reads
    all."""
    tags: tuple[str, ...] = Field((), exclude_if=lambda tags: not tags)
    """Texts, such as styles of captions, that are appended to the rows' texts in turn, after a comma (format text)."""
    seeds: tuple[Seed, Seed] | None = Field(None, exclude_if=lambda seeds: seeds is None)
    """Range [start, end) of noise seeds: each prompt of an image is repeated once for each of them (format text). Null draws it
    once, with a seed computed from its words."""
    first_sentence: bool = False
    """Cut each text after its first sentence (format text)."""
    min_chars: int = Field(0, ge=0)
    """Least number of characters of a text, after `first_sentence` (format text); shorter ones are left out."""
    distinct: bool = False
    """Keep only the first of equal texts (format instruction: of equal instruction and input), so that no text is in two parts
    of a split."""
    shuffle: Seed | None = None
    """Seed by which the remaining rows are shuffled; null keeps their order."""
    limit: int | None = Field(None, ge=1, le=2**53)
    """Number of rows taken, from `offset` on; null takes all."""
    offset: int = Field(0, ge=0)
    """Number of rows skipped, after the filters and the shuffle, so that one file can be split."""
    needs_input: bool = False
    """Keep only rows whose `input` is not empty (format instruction)."""
    skip_bad: bool = Field(False, exclude_if=lambda skips: not skips)
    """Leave out bad rows and warn of their number; false refuses a data set with a bad row. A row is bad if it is no object,
    lacks a field, or has a value that a setting or the format cannot use. A damaged file is always refused."""
    loss_on: Literal["all", "response", "last_response"] = "all"
    """Tokens in the loss. all: every token but padding (as in ASIDE's paper); response: the response, in format conversation
    every answer; last_response: the last answer (format conversation). Format preference always takes response."""
    also: tuple[DataSet, ...] = Field((), exclude_if=lambda others: not others)
    """Data sets whose rows are appended, to mix in a share of other data. `data.train` and `data.validation` mix the formats
    instruction, conversation and text, for example plain texts to keep the language (with loss_on all); elsewhere the format
    must be the same."""
    weight: float | None = Field(None, gt=0, exclude_if=lambda weight: weight is None)
    """Share of this data set in the mixture with those of `also`, relative to their weights; all of them have one or none has.
    Each gives its exact share, from its first row on (`shuffle` for random ones), rounded by largest remainders."""
    mixed_rows: int | None = Field(None, ge=1, le=2**40, exclude_if=lambda num: num is None)
    """Number of rows of a mixture by weights. Null takes the largest that repeats no row; in a larger one, data sets that are
    too small begin again."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, in the order in which they are read."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def subsets(self) -> tuple[str, ...]:
        """Names of the subsets that are read; empty if all are."""
        return (self.subset,) if isinstance(self.subset, str) else self.subset or ()

    @property
    def needed_fields(self) -> tuple[str, ...]:
        """Fields that every row must have, by their names after `rename`."""
        of_format = {
            "text": (self.field,),
            "instruction": ("instruction", "output"),
            "preference": ("chosen", "rejected"),
            "conversation": (),
            "image": ("image", self.field),
        }
        return tuple(dict.fromkeys((*of_format[self.format], *self.where, *self.equals)))

    @model_validator(mode="before")
    @classmethod
    def _responses(cls, values: object) -> object:
        """Set the default of `loss_on` for format preference: response."""
        if isinstance(values, dict) and values.get("format") == "preference":
            return {"loss_on": "response", **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> DataSet:
        # Checked when the job is read: each of these would otherwise fail or train nothing hours later.
        if self.format == "text" and self.loss_on == "response":
            raise ValueError("loss_on response needs format instruction: plain text has no response")
        if self.format == "preference" and self.loss_on == "all":
            raise ValueError("loss_on all: a preference is one of responses; format preference needs loss_on response")
        if self.loss_on == "last_response" and self.format != "conversation":
            raise ValueError(
                f"loss_on last_response: rows of format {self.format} have one response; conversations have several"
            )
        if self.format == "image" and self.loss_on == "response":
            raise ValueError("loss_on response: an image has no response")
        if self.seeds is not None and not 0 <= self.seeds[0] < self.seeds[1]:
            raise ValueError(f"seeds {list(self.seeds)}: give a range [start, end) of whole numbers from 0")
        if self.seeds is not None and self.seeds[1] - self.seeds[0] > _MOST_SEEDS:
            times = self.seeds[1] - self.seeds[0]
            raise ValueError(f"seeds {list(self.seeds)} draw each text {times:,} times; at most {_MOST_SEEDS:,}")
        if (self.seeds is not None or self.tags) and self.format != "text":
            raise ValueError(f"seeds and tags are about prompts (format text); rows of format {self.format} have none")
        for template in self.compose.values():
            compositions.check(template)
        for name in self.compose.keys() & self.fill.keys():
            raise ValueError(f"compose and fill both make the field {name!r}")
        new = list(self.rename.values())
        for name in new:
            if new.count(name) > 1:
                raise ValueError(f"rename gives the name {name!r} to two fields")
        for name in self.needed_fields:
            if name in self.rename and name not in new and name not in self.compose and name not in self.fill:
                raise ValueError(f"rename takes the field {name!r} away, which format {self.format} or a filter needs")
        self._check_weights()
        for other in self.also:
            # A row of a language model's training is one sequence in each of these formats, so their rows can share a batch.
            are_sequences = {other.format, self.format} <= {"instruction", "conversation", "text"}
            if other.loss_on != self.loss_on or not (are_sequences or other.format == self.format):
                raise ValueError(
                    f"also: rows of format {other.format} with loss_on {other.loss_on} do not go with format {self.format} and "
                    f"loss_on {self.loss_on}"
                )
        return self

    @property
    def parts(self) -> tuple[DataSet, ...]:
        """The data set without `also`, then those of `also`: each with one format, in the order of their rows."""
        return (self.model_copy(update={"also": ()}), *(part for other in self.also for part in other.parts))

    def _check_weights(self) -> None:
        weighted = [self.weight is not None, *(other.weight is not None for other in self.also)]
        # A weight alone is that of a part, which the data set around it mixes.
        if self.also and any(weighted) and not all(weighted):
            number = weighted.index(False)
            which = "this data set" if number == 0 else f"also.{number - 1}"
            raise ValueError(f"weight: {which} has none; give one to all data sets of a mixture, or to none")
        if any(other.weight is not None and other.also for other in self.also):
            raise ValueError("also: a data set of a mixture cannot be one itself; list all of them in one `also`")
        if self.also and any(weighted) and len({part.format for part in self.parts}) > 1:
            raise ValueError("weight: a mixture by weights has rows of one format; without weights, also can mix formats")
        if self.also and any(weighted) and len({part.skip_bad for part in self.parts}) > 1:
            raise ValueError("skip_bad: the rows of a mixture by weights are read as one; set it alike in all of its data sets")
        if self.mixed_rows is not None and not (self.also and all(weighted)):
            raise ValueError("mixed_rows is about a mixture by weights: give this data set and those of `also` a weight")


Role = Literal["instruction", "data", "response"]
Phase = Literal["prompt", "generation", "prompt_end"]
Span = tuple[int | None, int | None]


def _joined(modules: object) -> object:
    """Turn a list of expressions into one that matches what any of them does; `:k` after all of them stays at the end.

    Raises:
        ValueError: the list is empty, or its expressions take different elements of tuples.
    """
    if not isinstance(modules, list | tuple) or not all(isinstance(pattern, str) for pattern in modules):
        return modules
    split = [re.fullmatch(r"(.*?)(:\d{1,3})?", pattern, re.DOTALL) for pattern in modules]
    parts = [(match[1], match[2] or "") for match in split if match is not None]
    if len({element for _, element in parts}) != 1:
        raise ValueError(f"modules {list(modules)}: give one expression or more, with the same element (:k) after each")
    return "|".join(f"(?:{pattern})" for pattern, _ in parts) + parts[0][1] if len(parts) > 1 else modules[0]


class Selection(Frozen):
    """Modules and tokens at which a model is read or steered. An exclusion always wins over a selection.

    A token is in phase `generation` if the model generated it or, in a row with a response, if it belongs to the response; all
    others are in phase `prompt`, and the last of these is the `prompt_end`, at which the first token of the answer is computed.
    Positions count a row's tokens from 0, without padding; negative ones count back from the end of the prompt.
    """

    modules: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[str])] = r".*post_attention_layernorm"
    """Regular expression that matches whole module paths, or a list of them; `:k` after it takes element k of a module's tuple
    output."""
    exclude_modules: str | None = None
    """Regular expression of modules that are left out; null leaves out none."""
    side: Literal["output", "input"] = "output"
    """Tensor that is read or changed: the module's output, or its first argument."""
    phases: tuple[Phase, ...] = ("prompt", "generation")
    """Phases whose tokens are selected. [prompt_end, generation] are the tokens at which an answer is computed."""
    roles: tuple[Role, ...] | None = None
    """Roles whose tokens are selected; null selects every role."""
    exclude_roles: tuple[Role, ...] = ()
    """Roles whose tokens are left out."""
    positions: tuple[Span, ...] | None = None
    """Spans [start, end) of positions, a null end is open: [[-1, null]] is the last token of the prompt. Null selects all."""
    exclude_positions: tuple[Span, ...] = ()
    """Spans of positions that are left out: [[0, 1]] leaves out the first token."""
    token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, exclude_if=lambda ids: ids is None)
    """Ids of the vocabulary whose tokens are selected, such as those of the letters of choices; null selects every id."""
    exclude_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), exclude_if=lambda ids: not ids)
    """Ids of the vocabulary whose tokens are left out, such as those of marks of a chat template."""

    @property
    def takes_all_tokens(self) -> bool:
        """Whether every token is selected, which spares a mask."""
        every = {"prompt", "generation"} <= set(self.phases) and self.roles is None and self.positions is None
        return every and not self.exclude_roles and not self.exclude_positions and not self.asks_ids

    @property
    def asks_ids(self) -> bool:
        """Whether the ids of tokens decide which are selected."""
        return self.token_ids is not None or bool(self.exclude_token_ids)

    @model_validator(mode="after")
    def _check(self) -> Selection:
        if not self.phases:
            raise ValueError("phases is empty, so no token is selected")
        if not set(self.roles or get_args(Role)) - set(self.exclude_roles):
            raise ValueError("exclude_roles takes every selected role out again, so no token is selected")
        for span in (*(self.positions or ((None, None),)), *self.exclude_positions):
            start, end = span
            if start is not None and end is not None and (start < 0) == (end < 0) and start >= end:
                raise ValueError(f"the span [{start}, {end}) of positions is empty")
        if self.token_ids is not None and not set(self.token_ids) - set(self.exclude_token_ids):
            raise ValueError("token_ids and exclude_token_ids leave no id, so no token is selected")
        if self.positions == () or any(span in self.exclude_positions for span in self.positions or ()):
            raise ValueError("the positions select no token")
        return self


Pixels = Literal["mean", "pixel"]
Pooling = Literal["mean", "median", "max", "min", "last", "none"]


class ExtractConfig(Frozen):
    """Which activations of the model are read, and how they are stored."""

    select: Selection = Selection()
    """Modules and tokens that are read."""
    pooling: tuple[Pooling, ...] = Field(("mean",), min_length=1)
    """How the vectors of a row's selected tokens are reduced to one; `none`, which must stand alone, keeps one per token.
    Padding never counts."""
    keep: Literal["rows", "moments"] = "rows"
    """rows: one Parquet row per text (or token); moments: only count, mean and variance of each neuron over all rows."""
    second_moment: bool = False
    """With keep moments: also the uncentred second moment, a D x D matrix per module of width D."""
    dtype: Literal["float16", "float32"] = "float32"
    """Type on disk; with float16 a value above its range is an error."""
    max_tokens: int = Field(512, ge=1)
    """Tokens of a text; longer texts are cut, and their number is reported."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens of one forward pass, including padding; texts of similar length are batched together."""
    rows_per_shard: int = Field(4096, ge=1)
    """Rows of the data set per Parquet file. An extraction that was killed continues after its last complete file."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_bfloat16(cls, value: object) -> object:
        if value == "bfloat16":
            raise ValueError("Arrow has no bfloat16: float16 keeps more digits in the same space, float32 all of them")
        return value

    @model_validator(mode="after")
    def _check(self) -> ExtractConfig:
        if "none" in self.pooling and len(self.pooling) > 1:
            raise ValueError("pooling none keeps one row a token and cannot stand beside others")
        if len(set(self.pooling)) < len(self.pooling):
            raise ValueError(f"pooling {list(self.pooling)} names one twice")
        if self.second_moment and self.keep != "moments":
            raise ValueError("second_moment needs keep: moments")
        return self


PromptStyle = Literal["aside", "plain"]
ResponseRole = Literal["data", "instruction", "response"]
MAX_EXAMPLES = 100
"""Worked examples before a question at most; a whole file of them would make every prompt too long."""
PROMPT_FIELDS = ("prompt_style", "response_role", "thinking")
"""Fields of `DataConfig` by which texts become tokens."""


class DataConfig(Frozen):
    """The data sets of a job, by their use, and the prompt format that they share."""

    train: DataSet | None = None
    """Rows of the training stage."""
    validation: DataSet | None = None
    """Rows of the evaluation loss during training."""
    safety: DataSet | None = None
    """Rows that show behaviour to preserve, such as refusals of harmful requests."""
    basis: DataSet | None = None
    """Rows whose activations span a method's basis; null takes those of `safety`."""
    utility: DataSet | None = None
    """Rows that show abilities, such as solved problems, for a method that tells them from the behaviour of `safety`."""
    source: DataSet | None = None
    """Texts with the behaviour to steer away from; a method moves their activations towards those of `target`."""
    target: DataSet | None = None
    """Texts with the behaviour to steer to."""
    preference: DataSet | None = None
    """Pairs of a preferred and a rejected response (format preference)."""
    examples: DataSet | None = None
    """Worked examples before each question (method prompt), of format instruction. `limit`, which must be given, is their
    number."""
    prompt_style: PromptStyle = "aside"
    """aside: the framing of ASIDE's paper (arXiv 2503.10566) with headings Instruction, Input, Response; plain: the bare texts
    in the chat template. Rows of messages keep their own turns in both."""
    response_role: ResponseRole = "data"
    """Role of response tokens (ASIDE's paper: data)."""
    thinking: bool = Field(False, exclude_if=lambda thinks: not thinks)
    """true: prompts end where the chat template lets the model begin a thought (Qwen 3: before `<think>`), and thoughts in
    answers are trained. false: prompts end as before a stored answer without a thought."""

    @property
    def by_role(self) -> dict[str, DataSet]:
        """The data sets of the job, by use; uses without one are left out."""
        data_sets = {
            "train": self.train,
            "validation": self.validation,
            "safety": self.safety,
            "basis": self.basis,
            "utility": self.utility,
            "source": self.source,
            "target": self.target,
            "preference": self.preference,
            "examples": self.examples,
        }
        return {role: data for role, data in data_sets.items() if data is not None}

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for role, data in self.by_role.items():
            if role != "validation" and (data.format == "preference") != (role == "preference"):
                raise ValueError(f"{role}: rows of format {data.format} do not belong there; pairs go to data.preference")
            if data.weight is not None and not data.also:
                raise ValueError(f"{role}.weight {data.weight:g}: there is nothing to mix with; list other data sets in `also`")
            formats = dict.fromkeys(part.format for part in data.parts)
            if role == "examples" and (set(formats) != {"instruction"} or data.also):
                raise ValueError(f"examples: worked examples are rows of format instruction from one source, not {data.format}")
            if role == "examples" and (data.limit is None or data.limit > MAX_EXAMPLES):
                raise ValueError(f"examples.limit: give the number of worked examples, at most {MAX_EXAMPLES}")
            if len(formats) > 1 and role not in ("train", "validation"):
                raise ValueError(
                    f"{role}.also: rows of formats {' and '.join(formats)}; only train and validation can mix formats"
                )
        return self
