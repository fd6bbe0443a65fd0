"""Commands that try a result by hand: generate with it, explain its effect on tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from steerlab.cli.opening import Artifact, artifact_of
from steerlab.cli.terminal import JsonOption, RootOption, console, explained, folding_table, say_line

if TYPE_CHECKING:
    from rich.table import Table

    from steerlab.run import Reported
    from steerlab.steered.model import Asked, Shown, Steered

DeviceOption = Annotated[
    str, typer.Option(help="Where the model runs: auto (a GPU if torch can use one), cpu, cuda, cuda:1 and so on.")
]


def generate(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, its folder, or a folder made by export.")],
    prompt: Annotated[str | None, typer.Option(help="The instruction, or what is to be drawn.")] = None,
    data: Annotated[str | None, typer.Option(help="Data for the instruction, such as the text to translate.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts: a .txt with one per line, or rows with prompt (or instruction) and data.")
    ] = None,
    strength: Annotated[
        list[float] | None, typer.Option(help="Strengths of the patch: --strength 0 0.5 1. Default: what the run reported.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of an image's noise, or of sampled tokens.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Largest number of new tokens; default 64.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of sampled tokens; 0, the default, is greedy.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample from the likeliest tokens with this total probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this number of likeliest tokens.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample tokens with at least this share of the likeliest one's probability."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Texts for each prompt and strength.")] = None,
    guidance: Annotated[list[float] | None, typer.Option(min=0, help="Guidance scales of images; default: the job's.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for images.")] = Path("images"),
    inverse: Annotated[
        bool, typer.Option("--inverse", help="Use the inverse of the patch's maps, which induces what they remove.")
    ] = False,
    device: DeviceOption = "auto",
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate with a result, at several strengths side by side: texts, or images with a contact sheet and an animation."""
    from steerlab.steered import stacks
    from steerlab.steered.model import Asked

    with explained():
        asked = _prompts(prompt, data, prompts)
        scales = None if guidance is None else tuple(guidance)
        artifact = artifact_of(run_folder, root, inverse)
        loaded = stacks.load(artifact.path, device=device, **artifact.loading)
        strengths = _strengths(strength, artifact, loaded, quiet=as_json)
        requests = [
            Asked(one, strengths, seed, about, max_new_tokens, temperature, top_p, top_k, min_p, samples, scales)
            for one, about in asked
        ]
        # On a terminal, tokens are shown as they are generated; a file or a pipe gets the finished texts only.
        watched = _on_terminal(requests) if console.is_terminal and not as_json else nullcontext()
        with watched as watch:
            shown = loaded.each_side_by_side(requests, watch)
        for number, (request, one) in enumerate(zip(requests, shown, strict=True), 1):
            # Images of several prompts have the same names, so each prompt gets a folder of its own.
            folder = output if len(requests) == 1 else output / f"{number:03d}"
            _write(one.files, folder)
            if not as_json:
                console.print(_side_by_side(request, one, titled=len(requests) > 1))
                _say_overview(one, folder)
        if as_json:
            print(json.dumps([_as_json(*pair) for pair in zip(requests, shown, strict=True)], indent=1, ensure_ascii=False))


_NAMES = (("prompt", "instruction", "question", "text"), ("data", "input", "context"))
"""Fields of a row that hold the prompt, and its data; the first name that the row has is taken."""


def _prompts(prompt: str | None, data: str | None, file: Path | None) -> list[tuple[str, str | None]]:
    """Return the prompts with their data. Raises ValueError for a request with no prompt, with two, or with a bad row."""
    from steerlab.data import sources

    if (prompt is None) == (file is None):
        raise ValueError("give --prompt with one prompt, or --prompts with a file of them")
    if prompt is not None:
        return [(prompt, data)]
    if data is not None:
        raise ValueError("--data goes with --prompt; in a file of prompts each row has its own data")
    read: list[tuple[str, str | None]] = []
    for number, row in enumerate(sources.rows(str(file)), 1):
        columns = [next((row[name] for name in names if row.get(name) is not None), None) for names in _NAMES]
        if not isinstance(columns[0], str) or not isinstance(columns[1], str | None):
            has = ", ".join(map(str, row))
            raise ValueError(f"{file} row {number}: needs a text in one of {', '.join(_NAMES[0])}; it has {has:.200}")
        if columns[0].strip():
            read.append((columns[0], columns[1]))
    if not read:
        raise ValueError(f"{file} contains no prompt")
    return read


@contextmanager
def _on_terminal(requests: Sequence[Asked]) -> Iterator[Callable[[list[Shown]], None]]:
    """Show outputs on the terminal while they are generated; they disappear at the end, when the finished ones are printed."""
    from rich.console import Group
    from rich.live import Live

    with Live(console=console, transient=True, refresh_per_second=8) as live:

        def watch(shown: list[Shown]) -> None:
            pairs = zip(requests, shown, strict=True)
            # The screen cuts what does not fit at its bottom, so prompts without any output yet are not shown.
            begun = [(request, one) for request, one in pairs if any(text for _, text in one.outputs)]
            live.update(Group(*(_side_by_side(request, one, titled=len(requests) > 1) for request, one in begun)))

        yield watch


def _side_by_side(request: Asked, shown: Shown, *, titled: bool) -> Table:
    table = folding_table("strength", "output", title=escape(request.prompt) if titled else None)
    for value, text in shown.outputs:
        table.add_row(f"{value:g}", escape(text))
    return table


def _as_json(request: Asked, shown: Shown) -> dict[str, object]:
    outputs = [{"strength": value, "output": text} for value, text in shown.outputs]
    return {"prompt": request.prompt, "data": request.data, "outputs": outputs}


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def _say_overview(shown: Shown, folder: Path) -> None:
    if shown.files:
        # Besides one image per strength, `files` holds a contact sheet and an animation of all of them.
        overview = sorted(shown.files.keys() - {text for _, text in shown.outputs})
        console.print(f"in {folder}, with {', '.join(overview)}", soft_wrap=True, highlight=False, markup=False)


def explain(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, its folder, or a folder made by export.")],
    prompt: Annotated[str, typer.Option(help="The instruction.")],
    data: Annotated[str | None, typer.Option(help="Data for the instruction, such as the text to translate.")] = None,
    response: Annotated[str | None, typer.Option(help="Response to explain; default: the model's own, greedily.")] = None,
    strength: Annotated[float | None, typer.Option(help="Strength of the patch. Default: what the run reported.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of tokens to name at each position.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of the model's own response.")] = 32,
    inverse: Annotated[
        bool, typer.Option("--inverse", help="Use the inverse of the patch's maps, which induces what they remove.")
    ] = False,
    device: DeviceOption = "auto",
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a patch does at each token of a response: what it promotes and demotes, its norm, the KL to the base."""
    from steerlab.steered import explain, language, stacks

    with explained():
        artifact = artifact_of(run_folder, root, inverse)
        model = stacks.load(artifact.path, device=device, **artifact.loading)
        if not isinstance(model, language.SteeredModel):
            raise ValueError(f"{run_folder} draws images; explain works on the tokens of a language model")
        (scale,) = _strengths(None if strength is None else [strength], artifact, model, quiet=as_json)
        # Without a given response, the effect is shown on the text that the model itself generates at this strength.
        text = response or model.answer(prompt, data or "", max_new_tokens=max_new_tokens, strength=scale)
        if not text:
            raise ValueError("the model's answer to this prompt is empty: give one with --response")
        effects = explain.explain(model, model.encoder.conversation(prompt, data or "", text), num=top, strength=scale)
        if as_json:
            tokens = [effect._asdict() for effect in effects]
            print(json.dumps({"response": text, "strength": scale, "tokens": tokens}, indent=1))
            return
        table = folding_table("token", "norm", "KL, nats", "promotes", "demotes", title=escape(f"strength {scale:g}: {text}"))
        for effect in effects:
            moved = (", ".join(f"{t!r} {by:+.2f}" for t, by in tokens) for tokens in (effect.promoted, effect.demoted))
            table.add_row(escape(repr(effect.token)), f"{effect.norm:.2f}", f"{effect.kl:.4f}", *map(escape, moved))
        console.print(table)


def _strengths(requested: list[float] | None, artifact: Artifact, loaded: Steered, *, quiet: bool = False) -> tuple[float, ...]:
    """Return the requested strengths; if none are given, return the reported one and print it."""
    # A model whose patch is folded into its weights, or that has none, exists at a single strength.
    if requested or not loaded.patches:
        return tuple(requested or (1.0,))
    if not quiet:
        say_strength(artifact.reported)
    return (artifact.reported.strength,)


def say_strength(reported: Reported) -> None:
    """Print the strength that a run reported, which is used because none was given."""
    reason = f", {reported.reason}" if reported.reason else ""
    say_line(f"at strength {reported.strength:g}{reason}; --strength takes another")
