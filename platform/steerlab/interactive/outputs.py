"""Outputs of a model that a notebook can display: texts, images, activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple, overload

from torch import Tensor

from steerlab.guards.texts import plain

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from PIL import Image


def html_table(header: Sequence[str], body: Sequence[Sequence[object]], caption: str = "") -> str:
    """Return a table as HTML with all texts escaped, since they may come from a model or a stranger's file."""

    def cells(row: Sequence[object], tag: str) -> str:
        style = "text-align:left;vertical-align:top;white-space:pre-wrap"
        return "".join(f'<{tag} style="{style}">{escape(plain(str(cell)))}</{tag}>' for cell in row)

    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in body)
    head = f"<caption>{escape(plain(caption))}</caption>" if caption else ""
    return f"<table>{head}<thead><tr>{cells(header, 'th')}</tr></thead><tbody>{rows}</tbody></table>"


class Text(NamedTuple):
    """One continuation of a prompt."""

    prompt: str
    data: str
    strength: float
    """Strength of the newest patch; 1 for a model without one."""
    sample: int
    """Number of the continuation among those of one prompt and strength, from 0."""
    text: str
    num_tokens: int
    finished: bool
    """False if the continuation was cut at `max_new_tokens`."""


class Texts(Sequence[str]):
    """Continuations, ordered by strength and then by prompt; a sequence of their texts."""

    def __init__(self, rows: Sequence[Text]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [row.text for row in self.rows[index]]
        return self.rows[index].text

    def __eq__(self, other: object) -> bool:
        return self.rows == other.rows if isinstance(other, Texts) else list(self) == other

    def __hash__(self) -> int:
        return hash(self.rows)

    def __repr__(self) -> str:
        return repr(list(self))

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths, in the order of the request."""
        return tuple(dict.fromkeys(row.strength for row in self.rows))

    def at(self, strength: float) -> list[str]:
        """Return the texts of one strength, in the order of the prompts. Raises ValueError for a strength without texts."""
        if strength not in self.strengths:
            raise ValueError(f"there are no texts at strength {strength:g}; the strengths are {_listed(self.strengths)}")
        return [row.text for row in self.rows if row.strength == strength]

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas table with a row for each text."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(Text._fields))

    def _repr_html_(self) -> str:
        of_prompt: dict[tuple[str, str, int], dict[float, str]] = {}
        for row in self.rows:
            of_prompt.setdefault((row.prompt, row.data, row.sample), {})[row.strength] = row.text
        header = ["prompt", *(f"strength {strength:g}" for strength in self.strengths)]
        body = [
            ["\n".join(part for part in (prompt, data) if part), *(texts.get(s, "") for s in self.strengths)]
            for (prompt, data, _), texts in of_prompt.items()
        ]
        return html_table(header, body)


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


@dataclass(frozen=True)
class Images:
    """Images of some prompts at some strengths."""

    tensor: Tensor
    """(S, B, C, H, W) with values in [0, 1], on the CPU: S strengths, B prompts."""
    strengths: tuple[float, ...]
    prompts: tuple[str, ...]

    def __getitem__(self, index: int) -> Image.Image:
        """Return the image of a prompt at the first strength."""
        return self.at(self.strengths[0])[index]

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, strength: float) -> list[Image.Image]:
        """Return the images of one strength, in the order of the prompts. Raises ValueError for another strength."""
        from steerlab.steered import pictures

        if strength not in self.strengths:
            raise ValueError(f"there are no images at strength {strength:g}; the strengths are {_listed(self.strengths)}")
        return [pictures.picture(image) for image in self.tensor[self.strengths.index(strength)]]

    def sheet(self) -> Image.Image:
        """Return one image with a row for each prompt and a column for each strength."""
        from steerlab.steered import pictures

        return pictures.sheet(self.tensor, self.strengths, self.prompts)

    def _repr_png_(self) -> bytes:
        import io

        content = io.BytesIO()
        self.sheet().save(content, "PNG")
        return content.getvalue()


class Activations(Mapping[str, Tensor]):
    """Activations by module, (M, D) float32 on the CPU: M texts, or the selected tokens of all texts."""

    def __init__(self, values: Mapping[str, Tensor], table: pa.Table) -> None:
        self._values, self._table = dict(values), table

    def __getitem__(self, module: str) -> Tensor:
        if module not in self._values:
            raise KeyError(f"{module} was not extracted; these modules were: {', '.join(list(self._values)[:8])}")
        return self._values[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def texts(self) -> list[int]:
        """Number of each vector's text, from 0."""
        numbers: list[int] = self._table.column("sample_id").to_pylist()
        return numbers

    def to_table(self) -> pa.Table:
        """Return a pyarrow table with the columns of an extraction's files: ids, then a list for each module."""
        return self._table

    def to_frame(self) -> pd.DataFrame:
        """Return `to_table` as a pandas table."""
        return self._table.to_pandas()

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(values.shape)}" for name, values in list(self.items())[:4])
        return f"Activations({shapes}{', ...' if len(self) > 4 else ''})"

    def _repr_html_(self) -> str:
        body: list[list[object]] = [
            [name, f"{len(z)} x {z.shape[1]}", f"{float(z.norm(dim=1).mean()):.3g}"] for name, z in self.items()
        ]
        return html_table(["module", "vectors x width", "mean norm"], body)
