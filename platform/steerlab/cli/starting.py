"""The command that writes a first job of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerlab.cli.terminal import console, explained, say_line


def init(
    method: Annotated[str, typer.Argument(help="Method of the job: `steerlab describe` lists them.")],
    model: Annotated[
        str, typer.Option(help="Source of the model: a folder, hf:OWNER/NAME, ... Default: a small made-up one.")
    ] = "tiny:model",
    data: Annotated[
        list[str] | None,
        typer.Option(help="File or source of rows; for other data sets ROLE=FILE: --data a.jsonl --data safety=b.csv."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Job file to write; default: METHOD.yaml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Write a commented job and a search space for a method; finds the format of the rows."""
    from steerlab.cli import job_template

    with explained():
        job_file = output or Path(f"{method}.yaml")
        space = job_template.space_file(job_file)
        for path in (job_file, space):
            if path.exists() and not force:
                raise ValueError(f"{path} exists already: name another file with --output, or replace it with --force")
        template = job_template.of(method, model, _by_role(data or []))
        text, of_space = job_template.written(template, job_file)
        job_file.write_text(text, encoding="utf-8")
        space.write_text(of_space, encoding="utf-8")
        job_template.checked(job_file)
        for role, given in template.given.items():
            how = ", ".join(f"{name} {value}" for name, value in given.items() if name != "source")
            say_line(f"data.{role}: {given['source']} is read as {how}")
        stand_ins = [role for role in template.data if role not in template.given]
        if stand_ins:
            say_line(f"stand-ins for your own rows: {', '.join(f'data.{role}' for role in stand_ins)}")
        console.print(f"wrote {job_file} and {space}; next: steerlab plan {job_file}", highlight=False, soft_wrap=True)


def _by_role(data: list[str]) -> dict[str, str]:
    """Return sources by role; a source without a role is under "". Raises ValueError for two of one role."""
    named: dict[str, str] = {}
    for text in data:
        role, equals, source = text.partition("=")
        # Sources may hold "=" themselves: tiny:errands/train?overlap=0.5.
        role, source = (role, source) if equals and role.isidentifier() else ("", text)
        if role in named:
            raise ValueError(f"--data {text}: {'the first data set' if not role else f'data.{role}'} is given twice")
        named[role] = source
    return named
