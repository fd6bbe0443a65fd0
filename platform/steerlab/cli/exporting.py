"""The command that writes a result for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from steerlab.cli.opening import Artifact, artifact_of, opened_store, split
from steerlab.cli.terminal import RootOption, console, explained, say_line
from steerlab.cli.trying import say_strength

if TYPE_CHECKING:
    from steerlab.storage.store import Store


class Format(StrEnum):
    """Formats of `steerlab export`; all but the first are those of `steered.foreign_formats`."""

    CHECKPOINT = "checkpoint"
    GGUF = "gguf"
    EASYSTEER = "easysteer"
    PEFT = "peft"
    LOGIT_HEAD = "logit-head"


def export(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    directory: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    strength: Annotated[
        float | None, typer.Option(help="Strength at which a patch is folded. Default: what the run reported.")
    ] = None,
    inverse: Annotated[
        bool, typer.Option("--inverse", help="Use the inverse of the patch's maps, which induces what they remove.")
    ] = False,
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="checkpoint (transformers, diffusers), gguf (control vector of llama.cpp and repeng), easysteer, peft "
            "(low-rank adapter), logit-head (safetensors).",
        ),
    ] = Format.CHECKPOINT,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Write the vectors nearest to maps that are not additions; prints the error.")
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder to this hub repository.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    root: RootOption = None,
) -> None:
    """Write a checkpoint that plain transformers or diffusers loads; a patch that cannot be folded is written beside it."""
    from steerlab.steered import publishing

    with explained():
        if push is not None:
            publishing.check_name(push)
        artifact = artifact_of(run_folder, root, inverse)
        scale = artifact.reported.strength if strength is None else strength
        if strength is None and artifact.reported.reason:
            say_strength(artifact.reported)
        if format_ is Format.CHECKPOINT:
            if approximate:
                raise ValueError("--approximate is about vectors: give --format gguf or --format easysteer")
            _write_checkpoint(artifact, directory, scale, run_folder, root)
        else:
            _write_foreign(artifact, directory, format_, scale, approximate, run_folder, root)
        if push is not None:
            say_line(f"uploaded to {publishing.push(directory, push, private=not public)}")


def _write_checkpoint(artifact: Artifact, directory: Path, strength: float, folder: str, root: str | None) -> None:
    from steerlab.run import card
    from steerlab.steered import export as exports

    written = exports.write(artifact.path, directory, strength=strength, loading=artifact.loading)
    is_drawing = any(directory.rglob("model_index.json"))
    base, run = _base(artifact), _run(folder, root)
    lines = f"```python\n{_relative(written.lines, directory, base)}\n```"
    (directory / "README.md").write_text(
        card.written(lines, "checkpoint", strength, base=base, is_drawing=is_drawing, run=run), encoding="utf-8"
    )
    if written.reason is not None:
        console.print(f"not folded: {escape(written.reason)}. Three lines load it:", soft_wrap=True)
    console.print(f"\n{escape(written.lines)}\n", soft_wrap=True, highlight=False)


def _write_foreign(
    artifact: Artifact, directory: Path, format_: Format, strength: float, approximate: bool, folder: str, root: str | None
) -> None:
    from steerlab.run import card
    from steerlab.steered import foreign_formats

    base = _base(artifact)
    written = foreign_formats.write(
        artifact.path,
        directory,
        format_.value,
        strength=strength,
        loading=artifact.loading,
        base=base,
        approximate=approximate,
    )
    lines = _relative(written.lines, directory, base)
    text = card.written(lines, format_.value, strength, note=written.note, base=base, run=_run(folder, root))
    (directory / "README.md").write_text(text, encoding="utf-8")
    if written.note is not None:
        say_line(f"not exact: {written.note}")
    say_line(f"wrote {directory}; README.md explains its use:\n\n{written.lines}")


def _relative(lines: str, directory: Path, base: str | None) -> str:
    """Return the lines for the card, with local paths shortened to their last name: readers of the card have other paths."""
    named = lines.replace(str(directory), directory.name)
    return named.replace(base, Path(base).name) if base is not None and Path(base).is_absolute() else named


def _base(artifact: Artifact) -> str | None:
    """Return the hub id or the path of the model at the end of an artifact's chain; None if it has neither."""
    from steerlab.run import card
    from steerlab.storage import bases

    source = None
    for directory in bases.chain(artifact.path):
        below = bases.read(directory)
        source = below.source if below is not None else source
    return card.hub_id(source)


def _run(folder: str, root: str | None) -> tuple[Store, str] | None:
    """Return ROOT and the path of the run; None for a folder that was exported before."""
    if (Path(folder) / "prompt.json").is_file():
        return None
    own_root, below = split(folder, root)
    return opened_store(root or own_root), below
