"""The command that serves a result to other programs."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from steerlab.cli.opening import artifact_of
from steerlab.cli.terminal import RootOption, explained, say_line


def serve(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, its folder, or a folder made by export.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 8000,
    strength: Annotated[
        float | None, typer.Option(help="Strength of a request that names none. Default: what the run reported.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the model in the API.")] = "steerlab",
    device: Annotated[str, typer.Option(help="Device of the model: cpu, cuda, cuda:1.")] = "cpu",
    batch_rows: Annotated[int, typer.Option(min=1, help="Largest number of prompts in a batch.")] = 32,
    inverse: Annotated[
        bool, typer.Option("--inverse", help="Use the inverse of the patch's maps, which induces what they remove.")
    ] = False,
    root: RootOption = None,
) -> None:
    """Serve a result on this machine by OpenAI's chat API, extended by `strength` and `data` parts; Ctrl-C stops the server."""
    with explained("the server has ended"):
        if not name or "@" in name:
            raise ValueError(f"--name {name!r:.60}: the name must not contain @, which separates the name from a strength")
        artifact = artifact_of(run_folder, root, inverse)
        scale = artifact.reported.strength if strength is None else strength
        from steerlab.serving import server
        from steerlab.serving.batches import Batches
        from steerlab.steered import language, stacks

        model = stacks.load(artifact.path, **artifact.loading, device=device)
        if not isinstance(model, language.SteeredModel):
            raise ValueError(f"{run_folder} draws images, and the chat API is for language models")
        # A model whose patch is folded into its weights, or that has none, exists at strength 1 only.
        scale = scale if model.patches else 1.0
        served = server.Served(model, name, scale, Batches(model, batch_rows))

        def ready(chosen: int) -> None:
            at = f" at strength {scale:g}" if model.patches else ""
            say_line(f"serving {name}{at}: http://{server.HOST}:{chosen}/v1 (Ctrl-C stops it)")

        asyncio.run(server.serve(served, port, ready))
