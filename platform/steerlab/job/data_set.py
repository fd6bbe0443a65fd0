"""Config of one data set of a job: where its rows come from, which rows are taken, and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from steerlab.job import compositions
from steerlab.job.source_fields import Source
from steerlab.job.typed import Frozen, Seed


def _spelt(value: object) -> object:
    """Turn the keys of `map` into texts: YAML parses 0 and true as a number and a boolean, but a saved job has texts."""
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
    # An empty setting is excluded from the dump: keys of artifacts are hashes of it, and must not change with a new setting.
    rename: dict[str, str] = Field({}, exclude_if=lambda renamed: not renamed)
    """Fields to rename, {old: new}: {question: instruction, answer: output}; other settings use the new names. A field that
    already has the new name is dropped. A path extracts a nested field: {answers.text.0: output}."""
    fill: dict[str, str] = Field({}, exclude_if=lambda filled: not filled)
    """Fields that are set to one text in every row: {output: "I can't help with that."}."""
    map: dict[str, Names] = Field({}, exclude_if=lambda mapped: not mapped)
    """Texts that replace the values of a field: {label: {0: negative, 1: positive}}; any other value makes the row bad."""
    compose: dict[str, str] = Field({}, exclude_if=lambda composed: not composed)
    """Fields made from others, after `map`: {instruction: "{question}\\n{choices}"}; fields and paths in braces, {{ for a
    brace. A list of texts becomes lettered lines (A. first), with {choices:lines} plain ones, with {choices:commas} one."""
    as_text: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
    """Fields whose numbers and booleans are converted to texts, as JSON writes them; in other text fields they make the row
    bad."""
    where: dict[str, tuple[float | None, float | None]] = {}
    """Keep rows whose number in a field is in [low, high]; null is an open end, true counts as 1. Rows with null or NaN in the
    field are skipped."""
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
    """Least number of characters of a text, after `first_sentence` (format text); shorter ones are skipped."""
    distinct: bool = False
    """Keep only the first of equal texts (format instruction: of equal instruction and input), so that no text is in two parts
    of a split."""
    shuffle: Seed | None = None
    """Seed by which the remaining rows are shuffled; null does not shuffle."""
    limit: int | None = Field(None, ge=1, le=2**53)
    """Number of rows taken, from `offset` on; null takes all."""
    offset: int = Field(0, ge=0)
    """Number of rows skipped, after the filters and the shuffle, so that one file can be split."""
    needs_input: bool = False
    """Keep only rows whose `input` is not empty (format instruction)."""
    skip_bad: bool = Field(False, exclude_if=lambda skips: not skips)
    """Skip bad rows and warn of their number; false refuses a data set with a bad row. A row is bad if it is not an object,
    lacks a field, or has a value that a setting or the format cannot use. A damaged file is always refused."""
    loss_on: Literal["all", "response", "last_response"] = "all"
    """Tokens in the loss. all: every token but padding (as in ASIDE's paper); response: the response, in format conversation
    every answer; last_response: the last answer (format conversation). Format preference always takes response."""
    also: tuple[DataSet, ...] = Field((), exclude_if=lambda others: not others)
    """Data sets whose rows are appended, to mix in a share of other data. `data.train` and `data.validation` mix the formats
    instruction, conversation and text, for example plain texts to keep the language (with loss_on all); elsewhere the format
    must be the same."""
    weight: float | None = Field(None, gt=0, exclude_if=lambda weight: weight is None)
    """Share of this data set in the mixture with those of `also`, relative to their weights; either all data sets of the
    mixture have a weight or none. Each gives its exact share, from its first row on (`shuffle` for random ones), rounded by
    largest remainders."""
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
        # The settings are checked when the job is read: each of these would otherwise fail or train nothing hours later.
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
            raise ValueError(f"seeds {list(self.seeds)} draw each text {times:,} times; the maximum is {_MOST_SEEDS:,}")
        if (self.seeds is not None or self.tags) and self.format != "text":
            raise ValueError(f"seeds and tags apply to prompts (format text); rows of format {self.format} have no prompts")
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
                raise ValueError(f"rename removes the field {name!r}, which format {self.format} or a filter needs")
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
        # The weight of a single data set belongs to a part of a mixture, which the data set around it mixes.
        if self.also and any(weighted) and not all(weighted):
            number = weighted.index(False)
            which = "this data set" if number == 0 else f"also.{number - 1}"
            raise ValueError(f"weight: {which} has no weight; give one to all data sets of a mixture, or to none")
        if any(other.weight is not None and other.also for other in self.also):
            raise ValueError("also: a data set of a mixture cannot be a mixture itself; list all of them in one `also`")
        if self.also and any(weighted) and len({part.format for part in self.parts}) > 1:
            raise ValueError("weight: a mixture by weights has rows of one format; without weights, also can mix formats")
        if self.also and any(weighted) and len({part.skip_bad for part in self.parts}) > 1:
            raise ValueError(
                "skip_bad: the rows of a mixture by weights are read as one; set it to the same value in all of its data sets"
            )
        if self.mixed_rows is not None and not (self.also and all(weighted)):
            raise ValueError("mixed_rows applies to a mixture by weights: give this data set and those of `also` a weight")
