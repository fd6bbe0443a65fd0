"""Rows of images and prompts: digits, IDX files, subsets, tags, seeds, Debian packages."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from steerlab.data import rows, sources
from steerlab.data.worlds import pixels
from steerlab.job import DataSet, SamplerConfig
from steerlab.models.diffusion import saved_pipelines


def test_digits_are_split_and_captioned_by_their_ink() -> None:
    train, test = (pixels.rows(f"digits/{split}", Path) for split in ("train", "test"))
    assert len(train) + len(test) == 1797 and len(test) == 360
    assert train[0]["image"].shape == (8, 8) and train[0]["image"].dtype == np.uint8
    both = [*train, *test]
    for label in ("one", "eight"):
        ink = {
            style: [r["image"].sum() for r in both if (r["label"], r["style"]) == (label, style)]
            for style in ("thin", "", "bold")
        }
        assert max(ink["thin"]) < min(ink[""]) and max(ink[""]) < min(ink["bold"])
    assert {r["text"] for r in both if r["style"] == "bold"} == {f"bold {digit}" for digit in pixels.DIGITS}


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(sources.SourceError, match="pixels:digits/train"):
        sources.rows("pixels:digit/train")
    with pytest.raises(sources.SourceError, match="pixels:digits-model"):
        sources.fetch("pixels:model")


def test_areas_are_averaged(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    assert np.array_equal(pixels.reduced(images, 14), np.round(images.reshape(3, 14, 2, 14, 2).mean((2, 4), dtype=np.float32)))
    assert np.array_equal(pixels.reduced(images, 28), images)
    # 28 -> 16 covers 1.75 pixels each: twice 1.75 is 3.5, so four new pixels are exactly seven old ones.
    four = pixels.reduced(images, 16).astype(float).reshape(3, 4, 4, 4, 4).mean((2, 4))
    assert np.abs(four - images.reshape(3, 4, 7, 4, 7).mean((2, 4))).max() < 0.5


def test_an_idx_file_is_read_and_a_broken_one_refused(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    head = b"\0\0\x08\x03" + np.array([2, 3, 4], dtype=">u4").tobytes()
    (tmp_path / "a.gz").write_bytes(gzip.compress(head + values.tobytes()))
    assert np.array_equal(pixels.read_idx(tmp_path / "a.gz"), values)
    (tmp_path / "b.gz").write_bytes(gzip.compress(head + values.tobytes()[:-1]))
    with pytest.raises(ValueError, match="23 values instead of 2 x 3 x 4"):
        pixels.read_idx(tmp_path / "b.gz")


def test_prompts_come_from_a_subset_with_tags_and_seeds(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"none": ["a cat", "a dog"], "pixel art": ["a cat in pixels"]}))
    source = str(tmp_path / "prompts.json")
    data = DataSet(source=source, format="text", subset="none", tags=("sketch", "oil"), seeds=(0, 2))
    found = [(row["text"], row["seed"]) for row in rows.read(data)]
    assert found == [("a cat, sketch", 0), ("a cat, sketch", 1), ("a dog, oil", 0), ("a dog, oil", 1)]
    with pytest.raises(ValueError, match="has no such subset; it has none, pixel art"):
        rows.check(DataSet(source=source, format="text", subset="pixels"))


def test_several_subsets_are_read_and_a_name_that_is_none_of_them_is_told(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"none": ["a cat"], "pixel art": ["a cat in pixels"], "oil": ["b"]}))
    source = str(tmp_path / "prompts.json")
    both = DataSet(source=source, format="text", subset=("oil", "none"))
    assert [row["text"] for row in rows.read(both)] == ["a cat", "b"], "in the order of the file"
    assert DataSet(**both.model_dump()) == both and DataSet(source=source, format="text", subset=("oil",)).subsets == ("oil",)
    for read in (rows.read, rows.check):
        with pytest.raises(ValueError, match=r"subset 'pixels': .* has no such subset; it has none, oil, pixel art"):
            read(DataSet(source=source, format="text", subset=("none", "pixels", "oil")))


def test_what_has_no_subsets_is_told_so() -> None:
    with pytest.raises(ValueError, match="not a JSON object of lists"):
        rows.read(DataSet(source="tiny:topics/train", format="text", subset="farm", limit=2))


def test_a_debian_package_needs_a_pin_and_its_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pin = "0" * 64
    with pytest.raises(sources.SourceError, match="has no pinned hash"):
        sources.fingerprint("deb:hello")
    assert sources.fingerprint(f"deb:hello@sha256:{pin}#usr") == f"deb:hello@sha256:{pin}#usr"
    with pytest.raises(sources.SourceError, match="points outside its package"):
        sources.parse(f"deb:hello@sha256:{pin}#../etc")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sources.SourceError, match="no apt-get and dpkg-deb: unpack it elsewhere"):
        sources.fetch(f"deb:hello@sha256:{pin}", tmp_path)


def test_an_archive_with_another_hash_is_not_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\necho other > hello_1_all.deb\n")
    (tools / "dpkg-deb").write_text("#!/bin/sh\nexit 1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    with pytest.raises(sources.SourceError, match="is not the pinned 0000"):
        sources.fetch(f"deb:hello@sha256:{'0' * 64}", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "packages").glob("deb-*"))


def test_the_files_of_a_pipeline_name_the_same_classes_wherever_these_stand(tmp_path: Path) -> None:
    """Caches and artifacts are shared between versions: what one wrote must be readable for the others."""
    pixels.write_model("digits-model", tmp_path / "made")
    made = json.loads((tmp_path / "made" / "model_index.json").read_text())
    assert made["words"] == ["steerlab.pixels", "CaptionTable"]
    loaded = saved_pipelines.load(tmp_path / "made", SamplerConfig())
    loaded.pipeline.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert (saved["words"], saved["_class_name"]) == (made["words"], "PixelPipeline")
    assert saved_pipelines.load(tmp_path / "saved", SamplerConfig()).pipeline.words.known == loaded.pipeline.words.known
