"""Which rows a job reads, and where in a model they are read or steered."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from steerlab.job import compositions
from steerlab.job.source_fields import Source
from steerlab.job.typed import Frozen, Seed


def _spelt(value: object) -> object:
    """Write the keys of a table of names as texts: YAML reads 0 and true as numbers and booleans, a saved job holds texts."""
    if not isinstance(value, dict):
        return value
    return {str(key).lower() if isinstance(key, bool) else str(key): name for key, name in value.items()}


Names = Annotated[dict[str, str], BeforeValidator(_spelt)]
"""Values and the texts that stand for them."""


_MOST_SEEDS = 100_000


class DataSet(Frozen):
    """One data set and how its rows become tokens."""

    source: Source | Annotated[tuple[Source, ...], Field(min_length=1)]
    """Rows: `hf:owner/name#split`, a path or URI (json, jsonl, yaml, parquet, csv, tsv, txt, compressed or not; a folder of
    shards or a pattern), `sdist:NAME==VERSION#path`, `gym:NAME?seed=N&size=N`, `tiny:NAME`; several are read one after
    another."""
    format: Literal["instruction", "text", "preference", "conversation", "image"] = "instruction"
    """instruction: fields instruction, input (optional), output, and where there are some system and history; text: one field,
    named by `field`; preference: a prompt with a preferred and another response, in any of the forms that pairs.py lists;
    conversation: messages, in any of the forms that dialogues.py lists; image: an `image` (values from 0 to 255, grey or
    RGB) and its caption in `field`."""
    field: str = "text"
    """Field that holds the text (format text), or the caption (format image). A path names a nested one: prompt.text."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of a text file without a header, separated by commas in .csv and by tabs elsewhere; null where rows
    have names."""
    rows_at: str | None = Field(None, exclude_if=lambda path: path is None)
    """Where the list of rows lies in a JSON or YAML object that holds several, as a path: data.train."""
    # Not written where it is empty: the keys of artifacts stay what they were before there was such a setting.
    rename: dict[str, str] = Field({}, exclude_if=lambda renamed: not renamed)
    """Fields under other names, {question: instruction, answer: output}; everything else here goes by the new ones. What a row
    had under a new name is dropped. A path takes a nested field out: {answers.text.0: output}."""
    fill: dict[str, str] = Field({}, exclude_if=lambda filled: not filled)
    """Fields that every row gets with one text, {output: "I can't help with that."}, in place of what it had."""
    map: dict[str, Names] = Field({}, exclude_if=lambda mapped: not mapped)
    """Names in place of values, {label: {0: negative, 1: positive}}; a value without a name is refused."""
    compose: dict[str, str] = Field({}, exclude_if=lambda composed: not composed)
    """Fields made from others, {instruction: "{question}\\n{choices}"}: names and paths in braces, {{ for a brace. A list of
    texts becomes lettered lines (A. first), with {choices:lines} plain ones, with {choices:commas} one line. After `map`."""
    as_text: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
    """Fields whose numbers and booleans are taken as texts, as JSON writes them; elsewhere they are refused."""
    where: dict[str, tuple[float | None, float | None]] = {}
    """Keep rows whose number in a field lies in [low, high]; null is open, true counts as 1. What holds nothing (null, NaN) is
    left out."""
    equals: dict[str, str | int | float | bool | None] = {}
    """Keep rows whose field has this value: 1 is 1.0 and the text "1", true is the text "true", null is null and NaN. Before
    `map` and `compose`."""
    subset: str | None = Field(None, exclude_if=lambda subset: subset is None)
    """Subset of a JSON object of lists of texts, {none: [...], pixel art: [...]}, by its name."""
    tags: tuple[str, ...] = Field((), exclude_if=lambda tags: not tags)
    """Written behind the texts, after a comma, one after another in turn (format text): styles of captions."""
    seeds: tuple[Seed, Seed] | None = Field(None, exclude_if=lambda seeds: seeds is None)
    """Each text so many times, once for each seed of the noise in [start, end) (format text, prompts of images). Null: once,
    with a seed that its words decide."""
    first_sentence: bool = False
    """Keep each text's first sentence only (format text)."""
    min_chars: int = Field(0, ge=0)
    """Leave out texts that are shorter after that (format text)."""
    distinct: bool = False
    """Keep the first of equal texts (format instruction: of equal instruction and input) only, so that none is on two sides
    of a split."""
    shuffle: Seed | None = None
    """Seed of the order of the rows that are kept; null leaves them as they are."""
    limit: int | None = Field(None, ge=1, le=2**53)
    """Rows taken from `offset` on; null takes all."""
    offset: int = Field(0, ge=0)
    """Rows skipped first (after everything above), so that one file can be split."""
    needs_input: bool = False
    """Keep only rows whose `input` is not empty (instruction format)."""
    skip_bad: bool = Field(False, exclude_if=lambda skips: not skips)
    """Leave out rows that are bad (no row at all, a field that is missing or no text, a number or a name that is none, no pair,
    no conversation) and warn of how many, in place of refusing the data set. What the file itself breaks (no UTF-8, an archive
    that is not whole) is refused all the same."""
    loss_on: Literal["all", "response", "last_response"] = "all"
    """Tokens in the loss: all but padding (ASIDE's paper), or the response only, as it always is for format preference; of
    format conversation all answers (response), or the last one (last_response)."""
    also: tuple[DataSet, ...] = Field((), exclude_if=lambda others: not others)
    """Data sets of the same format whose rows follow: a share of other data mixed in."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, in the order in which they are read."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def needed_fields(self) -> tuple[str, ...]:
        """Fields that every row must have, by their new names."""
        named = {
            "text": (self.field,),
            "instruction": ("instruction", "output"),
            "preference": ("chosen", "rejected"),
            "conversation": (),
            "image": ("image", self.field),
        }
        return tuple(dict.fromkeys((*named[self.format], *self.where, *self.equals)))

    @model_validator(mode="before")
    @classmethod
    def _responses(cls, values: object) -> object:
        """Let the loss of pairs be that of their responses where nothing is said."""
        if isinstance(values, dict) and values.get("format") == "preference":
            return {"loss_on": "response", **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> DataSet:
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
        for other in self.also:
            if (other.format, other.loss_on) != (self.format, self.loss_on):
                raise ValueError(
                    f"also: rows of format {other.format} with loss_on {other.loss_on} do not go with format {self.format} and "
                    f"loss_on {self.loss_on}"
                )
        return self


Role = Literal["instruction", "data", "response"]
Phase = Literal["prompt", "generation"]
Span = tuple[int | None, int | None]


class Selection(Frozen):
    """Where a model is read or steered: the one language for both. What is excluded is always taken out again.

    A token is of phase `generation` when the model wrote it or, in a row that holds a response, when it is the response's;
    positions count a row's tokens without padding from 0, negative ones count back from the end of the prompt.
    """

    modules: str = r".*post_attention_layernorm"
    """Regular expression that matches whole module paths; `:k` behind it picks element k of a module's tuple output."""
    exclude_modules: str | None = None
    """Modules left out again."""
    side: Literal["output", "input"] = "output"
    """What is read or changed: the module's output, or its first argument."""
    phases: tuple[Phase, ...] = ("prompt", "generation")
    """Tokens by phase."""
    roles: tuple[Role, ...] | None = None
    """Tokens by role; null takes every role."""
    exclude_roles: tuple[Role, ...] = ()
    """Roles left out again."""
    positions: tuple[Span, ...] | None = None
    """Tokens by position: spans [start, end), null is open; null for all. The last token of the prompt is [[-1, null]]."""
    exclude_positions: tuple[Span, ...] = ()
    """Positions left out again: [[0, 1]] leaves out the first token."""

    @property
    def takes_all_tokens(self) -> bool:
        """Say whether no token is left out."""
        every = len(set(self.phases)) == len(get_args(Phase)) and self.roles is None and self.positions is None
        return every and not self.exclude_roles and not self.exclude_positions

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
        if self.positions == () or any(span in self.exclude_positions for span in self.positions or ()):
            raise ValueError("the positions select no token")
        return self


Pooling = Literal["mean", "max", "min", "last", "none"]


class ExtractConfig(Frozen):
    """What is read of the model's activations, and how it is kept."""

    select: Selection = Selection()
    """Modules and tokens."""
    pooling: tuple[Pooling, ...] = Field(("mean",), min_length=1)
    """How a row's selected tokens become one vector; `none`, alone, keeps one row a token. Padding never counts."""
    keep: Literal["rows", "moments"] = "rows"
    """rows: a Parquet row for each text (or token); moments: count, mean and variance of each neuron, nothing stored a row."""
    second_moment: bool = False
    """With moments: the uncentred second moment as well, a D x D matrix for each module."""
    dtype: Literal["float16", "float32"] = "float32"
    """Type on disk; float16 fails on a value above its range."""
    max_tokens: int = Field(512, ge=1)
    """Longer texts are cut, and counted."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens of one forward pass, padding included: texts of similar length go together."""
    rows_per_shard: int = Field(4096, ge=1)
    """Rows of the data set in one Parquet file, the unit that a killed extraction continues with."""

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
PROMPT_FIELDS = ("prompt_style", "response_role", "thinking")
"""Fields of `DataConfig` by which texts become tokens."""


class DataConfig(Frozen):
    """The data sets of a job by what they are for, and the prompt format that they share."""

    train: DataSet | None = None
    """Rows for the training stage."""
    validation: DataSet | None = None
    """Rows for the evaluation loss during training."""
    safety: DataSet | None = None
    """Rows whose behaviour is to be kept: refusals of harmful requests."""
    source: DataSet | None = None
    """Texts whose activations are moved, away from what they have in common."""
    target: DataSet | None = None
    """Texts whose activations are the goal."""
    preference: DataSet | None = None
    """Pairs of a preferred and another response (format preference)."""
    prompt_style: PromptStyle = "aside"
    """aside: the paper's framing with Instruction/Input/Response headings; plain: the texts alone inside the chat template.
    Prompts that come as messages are turns of their own in either."""
    response_role: ResponseRole = "data"
    """Role of response tokens (ASIDE's paper: data)."""
    thinking: bool = Field(False, exclude_if=lambda thinks: not thinks)
    """Prompts end where the chat template lets a model begin a thought (Qwen 3: before `<think>`), and the thoughts in answers
    are trained. False ends prompts as stored answers without a thought begin."""

    @property
    def by_role(self) -> dict[str, DataSet]:
        """The data sets that there are, by what they are for."""
        named = {
            "train": self.train,
            "validation": self.validation,
            "safety": self.safety,
            "source": self.source,
            "target": self.target,
            "preference": self.preference,
        }
        return {role: data for role, data in named.items() if data is not None}

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for role, data in self.by_role.items():
            if role != "validation" and (data.format == "preference") != (role == "preference"):
                raise ValueError(f"{role}: rows of format {data.format} do not belong there; pairs go to data.preference")
        return self
