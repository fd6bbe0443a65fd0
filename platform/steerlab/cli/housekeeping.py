"""Commands that list the content of a ROOT, and remove what none of its runs and sweeps needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from steerlab.cli.opening import opened_store
from steerlab.cli.terminal import JsonOption, console, explained, folding_table, say_line, typed_root

if TYPE_CHECKING:
    from steerlab.run.inventory import Entry, Inventory

RootArgument = Annotated[
    str | None,
    typer.Argument(parser=typed_root, metavar="ROOT", help="A path or URI. Default: $STEERLAB_ROOT or ~/steerlab."),
]
_MOST_SHOWN = 40
"""Rows of a table of leftovers; the others are counted."""


def ls(root: RootArgument = None, as_json: JsonOption = False) -> None:
    """Show the runs and sweeps of a ROOT with their status and sizes, and the size of what they do not name."""
    from steerlab.run import default_root, inventory
    from steerlab.run.capacity import in_words
    from steerlab.storage.store import Store

    with explained():
        store = Store(root or default_root())  # writes no test file, so that a read-only ROOT can be listed
        content = inventory.take(store)
        if as_json:
            print(json.dumps([_row(entry, content) for entry in content.entries], indent=1))
            return
        table = folding_table("run or sweep", "status", "folder", "its artifacts", title=store.root)
        for entry in content.entries:
            table.add_row(entry.folder, entry.status, in_words(entry.num_bytes), in_words(content.bytes_of(entry)))
        if content.entries:
            console.print(table)
        for entry in content.entries:
            if entry.problem:
                say_line(f"{entry.folder}: {entry.problem}")
        named = content.named
        rest = sum(size for address, size in content.artifacts.items() if address not in named)
        say_line(
            f"{len(content.artifacts)} artifacts, {in_words(sum(content.artifacts.values()))}, of which no run names "
            f"{in_words(rest)}; checkpoints and parts of unfinished stages, {in_words(sum(content.work.values()))}"
        )
        if rest:
            say_line(f"steerlab gc {store.root}   shows what can be removed")


def gc(
    root: RootArgument = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove the folders; without this they are only listed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the artifacts and checkpoints of a ROOT that none of its runs and sweeps names; without --yes, only show them."""
    from steerlab.run import cleaning
    from steerlab.run.capacity import in_words

    with explained():
        store = opened_store(root)
        leftovers = cleaning.leftovers(store)
        listed = [("artifact", address, size) for address, size in leftovers.artifacts.items()]
        listed += [("checkpoints and parts", address, size) for address, size in leftovers.work.items()]
        removed = cleaning.remove(store, leftovers) if yes and listed else None
        if as_json:
            lines = [{"what": what, "stage": stage, "key": key, "bytes": size} for what, (stage, key), size in listed]
            print(json.dumps({"removed": removed is not None, "left over": lines}, indent=1))
            return
        if not listed:
            say_line(f"{store.root}: every artifact is named by a run or a sweep; nothing to remove")
            return
        listed.sort(key=lambda line: -line[2])
        table = folding_table("what", "stage", "key", "size", title=f"named by no run and no sweep of {store.root}")
        for what, (stage, key), size in listed[:_MOST_SHOWN]:
            table.add_row(what, stage, key[:12], in_words(size))
        console.print(table)
        if len(listed) > _MOST_SHOWN:
            say_line(f"and {len(listed) - _MOST_SHOWN} smaller ones; --json lists all")
        if removed is None:
            say_line(
                f"{in_words(leftovers.num_bytes)} in {len(listed)} folders; remove them with: steerlab gc {store.root} --yes"
            )
        else:
            say_line(f"removed {removed.artifacts} artifacts and {removed.work} work folders, {in_words(removed.num_bytes)}")


def _row(entry: Entry, content: Inventory) -> dict[str, str | int]:
    return {
        "kind": entry.kind,
        "folder": entry.folder,
        "status": entry.status,
        "bytes": entry.num_bytes,
        "artifact_bytes": content.bytes_of(entry),
        "artifacts": len(entry.names),
    }
