"""Sources that are generated on this machine: problems of reasoning-gym, the tiny world, small images."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from steerlab.data.sources.cache import filled_once, tree_sha256
from steerlab.data.sources.packages import fetch_package
from steerlab.data.worlds import pixels, tiny, tiny_checkpoint
from steerlab.job.grammar import GENERATORS, PINS, Source, SourceError, parse

GYM = "wheel:reasoning-gym==0.1.25"
GYM_TREE = "10895fd721d789cf3146488f5a3d5668d3c46f79a89e8819601f24342231f741"
"""`tree_sha256` of the unpacked wheel. Its code is run, so the copy in the cache is compared with it before each run."""
GYM_ROWS = "1"
"""Version of the rows, part of fingerprints: raise it whenever `_GENERATE` makes other rows from the same problems."""

_GENERATE = """
import importlib, itertools, json, sys, types

root, module, name, seed, size = sys.argv[1:]
# The __init__ of these packages would import every generator, and a dozen dependencies that this one does not use.
for package in (*itertools.accumulate(module.split(".")[:-1], "{}.{}".format), "reasoning_gym.coaching"):
    bare = sys.modules[package] = types.ModuleType(package)
    bare.__path__ = [f"{root}/{package.replace('.', '/')}"]
importlib.import_module(module)
from reasoning_gym.factory import create_dataset

for problem in create_dataset(name, seed=int(seed), size=int(size)):
    solution = problem["metadata"].get("answer_cot", problem["answer"])
    print(json.dumps({"instruction": problem["question"], "output": solution, "answer": problem["answer"]}))
"""
"""Program that prints one row per line. It runs in a process of its own because it replaces packages in `sys.modules`."""


def fetch_gym(source: Source, cache: Path) -> Path:
    """Return a file of reasoning-gym's problems, generated once by the code of the pinned wheel, which is not installed."""
    numbers = re.findall("[0-9]+", source.inside)
    # The name contains everything that determines the rows, so the folder never has to be checked.
    root = cache / "gym" / "-".join((source.name, *numbers, PINS[GYM][:16], GYM_ROWS))
    if not root.exists():
        package = fetch_package(parse(GYM), cache)
        if tree_sha256(package) != GYM_TREE:
            raise SourceError(f"{package} is not the content of {GYM}, so its code is not run; remove the folder")
        # With -I and pycache_prefix neither the user's modules nor .pyc files planted next to the sources can run instead of
        # them.
        isolated = [sys.executable, "-I", "-B", "-X", f"pycache_prefix={os.devnull}"]
        command = [*isolated, "-c", _GENERATE, str(package), GENERATORS[source.name], source.name, *numbers]
        with filled_once(root) as directory:
            (directory / "content").mkdir()
            with (directory / "content" / "rows.jsonl").open("w") as file:
                # The output goes directly into the file, because a million rows would otherwise be held in memory.
                result = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False)
            if result.returncode:
                reason = result.stderr.strip() or f"exit code {result.returncode}"
                raise SourceError(f"'{source.text}' could not be generated: {reason.splitlines()[-1]}")
    return root / "rows.jsonl"


def fetch_tiny(source: Source, cache: Path) -> Path:
    """Return the folder of the tiny world's untrained model (configuration and tokenizer)."""
    if source.name != "model":
        raise SourceError(f"'{source.text}' is data, not a file; the made-up world's model is tiny:model")
    root = cache / "tiny" / f"model-{tiny.VERSION}"
    if not root.exists():
        with filled_once(root) as directory:
            (directory / "content").mkdir()
            tiny_checkpoint.write_model(directory / "content")
    return root


def fetch_pixels(source: Source, cache: Path) -> Path:
    """Return the folder of an untrained diffusion model of small images."""
    root = cache / "pixels" / f"{source.name.replace('/', '-')}-{pixels.VERSION}"
    if not root.exists():
        with filled_once(root) as directory:
            (directory / "content").mkdir()
            try:
                pixels.write_model(source.name, directory / "content")
            except ValueError as error:
                raise SourceError(str(error)) from None
    return root


def pixel_rows(source: Source, fetch: Callable[[str], Path], limit: int | None) -> Iterator[dict[str, object]]:
    """Return small images with captions; `fetch` returns the local path of a source, such as Fashion-MNIST's."""
    try:
        return iter(pixels.rows(source.name, fetch, limit))
    except ValueError as error:
        raise SourceError(str(error)) from None
