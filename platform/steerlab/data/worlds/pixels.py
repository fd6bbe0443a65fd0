"""Small images with captions that need no download from a hub, and diffusion models that learn to draw them.

    pixels:digits/train, pixels:digits/test      scikit-learn's 1,797 digits of 8 x 8 pixels, every fifth one in the test split;
                                                 captions `three`, and `thin three` or `bold three` for the third of each
                                                 class with the least or most ink
    pixels:fashion/train, pixels:fashion/test    Fashion-MNIST (Debian package) reduced to 16 x 16; captions name the class
    pixels:digits-model, pixels:fashion-model    UNet with cross-attention to an embedding table of the caption's words
    pixels:digits-classes                        UNet with an embedding of the class

Rows have `image` (grey, unsigned bytes of shape (height, width)), `text` (the caption), `label` (the class) and `style`.

Axes: N images, H height, W width, S pixels of the reduced side, O pixels of the original side.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from steerlab.guards.json_values import Json, JsonObject

VERSION = "1"
"""Part of every artifact key: raise it whenever any row or a model's configuration changes."""

Pixels = npt.NDArray[np.uint8]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOTHES = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""Names of Fashion-MNIST's classes by number, one word each."""
STYLES = ("thin", "bold")
FASHION = "deb:dataset-fashion-mnist#usr/share/datasets/fashion-mnist"
_TEST_EVERY = 5
_FASHION_SIDE = 16
_FASHION_FILES = {"train": "train", "test": "t10k"}
_SPLITS = ("train", "test")


def rows(name: str, locate: Callable[[str], Path], limit: int | None = None) -> list[dict[str, object]]:
    """Return the rows of a data set.

    Args:
        name: `digits/train`, `digits/test`, `fashion/train` or `fashion/test`.
        locate: Returns the local folder of a source; called for Fashion-MNIST's Debian package.
        limit: Number of rows, from the first; None returns all.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    kind, _, split = name.partition("/")
    if kind not in ("digits", "fashion") or split not in _SPLITS:
        known = ", ".join(f"pixels:{kind}/{split}" for kind in ("digits", "fashion") for split in _SPLITS)
        raise ValueError(f"unknown data set 'pixels:{name}'; known: {known}")
    return (_digits(split) if kind == "digits" else _fashion(split, locate(FASHION), limit))[:limit]


def _digits(split: str) -> list[dict[str, object]]:
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    digits = load_digits()
    assert isinstance(digits, Bunch), "the other forms that `load_digits` can return are not asked for"
    images_NHW: Pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # scikit-learn's values are 0 to 16
    labels_N = digits.target
    ink_N = digits.images.sum((1, 2))
    # Quantiles are taken per class: any one has less ink than any eight, so quantiles over all digits would separate the
    # classes.
    bounds = {digit: np.quantile(ink_N[labels_N == digit], [1 / 3, 2 / 3]) for digit in range(10)}
    rows: list[dict[str, object]] = []
    for number, (image, digit, ink) in enumerate(zip(images_NHW, labels_N.tolist(), ink_N.tolist(), strict=True)):
        low, high = bounds[digit]
        style = "thin" if ink <= low else "bold" if ink >= high else ""
        # The quantiles are those of both splits, so that a style means the same in either.
        if (number % _TEST_EVERY == 0) == (split == "test"):
            caption = f"{style} {DIGITS[digit]}".strip()
            rows.append({"image": image, "text": caption, "label": DIGITS[digit], "style": style})
    return rows


def _fashion(split: str, directory: Path, limit: int | None) -> list[dict[str, object]]:
    part = _FASHION_FILES[split]
    labels_N = read_idx(directory / f"{part}-labels-idx1-ubyte.gz")[:limit]
    # The images are cut to the limit before they are reduced, which takes seconds for all images.
    images_NHW = read_idx(directory / f"{part}-images-idx3-ubyte.gz")[:limit]
    small = reduced(images_NHW, _FASHION_SIDE)
    return [
        {"image": image, "text": CLOTHES[label], "label": CLOTHES[label], "style": ""}
        for image, label in zip(small, labels_N.tolist(), strict=True)
    ]


def read_idx(path: Path) -> Pixels:
    """Read a gzipped array of unsigned bytes in the IDX format (MNIST's).

    Raises:
        ValueError: the file has another format or length.
    """
    content = gzip.decompress(path.read_bytes())
    # The header is two zero bytes, the type (8: unsigned byte), the number of axes, then each size as a big-endian uint32.
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = [int(size) for size in np.frombuffer(content[4:start], dtype=">u4")]
    if len(content) != start + int(np.prod(shape)):
        raise ValueError(f"{path.name} holds {len(content) - start} values instead of {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def reduced(images_NHW: Pixels, side: int) -> Pixels:
    """Reduce square images (N, O, O) to (N, side, side) by averaging the area that each new pixel covers."""
    old = images_NHW.shape[1]
    edges = np.arange(side + 1) * (old / side)
    # `cover_SO` is the length that new pixel s shares with old pixel o. From 28 to 16 a new one is 1.75 old ones wide and
    # shares its edges.
    cover_SO = np.clip(
        np.minimum(edges[1:, None], np.arange(1, old + 1)) - np.maximum(edges[:-1, None], np.arange(old)), 0, None
    )
    share_SO = (cover_SO / cover_SO.sum(1, keepdims=True)).astype(np.float32)
    # The images are reduced in blocks, because the product is computed in float32 and Fashion-MNIST has 60,000 images.
    small_NSS = np.concatenate(
        [share_SO @ block @ share_SO.T for block in np.array_split(images_NHW, max(1, len(images_NHW) // 4096))]
    )
    return np.round(small_NSS).astype(np.uint8)


MODELS = ("digits-model", "digits-classes", "fashion-model")
"""Names of the untrained models."""


def write_model(name: str, directory: Path) -> None:
    """Write the configuration of an untrained pipeline, in the layout of diffusers, without weights.

    Raises:
        ValueError: the name is not one of `MODELS`.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model 'pixels:{name}'; known: {', '.join(f'pixels:{model}' for model in MODELS)}")
    # v-prediction, trailing timesteps and a zero terminal SNR belong together (Lin et al., arXiv 2305.08891): without them a
    # model never trains on pure noise, from which sampling starts, and images of black background come out grey.
    scheduler: JsonObject = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "clip_sample": True,
    }
    parts: dict[str, tuple[str, JsonObject]] = {"scheduler": ("diffusers", scheduler)}
    if name == "digits-classes":
        # The table has one class more than the digits: the last one means "no class" in guidance.
        parts["unet"] = ("diffusers", _unet("UNet2DModel", 8, (32, 64), num_class_embeds=len(DIGITS) + 1))
    else:
        words, side, widths = ((*STYLES, *DIGITS), 8, (32, 64)) if name == "digits-model" else (CLOTHES, 16, (32, 64, 64))
        parts["unet"] = ("diffusers", _unet("UNet2DConditionModel", side, widths, cross_attention_dim=32))
        parts["words"] = (
            "steerlab.pixels",
            {"_class_name": "CaptionTable", "words": list(words), "width": 32, "length": 2},
        )
    index: JsonObject = {part: [library, config["_class_name"]] for part, (library, config) in parts.items()}
    classes = list(DIGITS) if name == "digits-classes" else []
    files = {"scheduler": "scheduler_config.json"}
    for part, (_, config) in parts.items():
        (directory / part).mkdir(parents=True)
        (directory / part / files.get(part, "config.json")).write_text(json.dumps(config, indent=1))
    (directory / "model_index.json").write_text(
        json.dumps({"_class_name": "PixelPipeline", "classes": classes, **index}, indent=1)
    )


def _unet(kind: str, side: int, widths: Sequence[int], **settings: Json) -> JsonObject:
    """Return the config of a UNet with attention in its middle block only, so that it is fast on a CPU."""
    return {
        "_class_name": kind,
        "sample_size": side,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": list(widths),
        "down_block_types": ["DownBlock2D" for _ in widths],
        "up_block_types": ["UpBlock2D" for _ in widths],
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        **settings,
    }
