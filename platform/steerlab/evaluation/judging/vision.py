"""Judges of images: a classifier trained on a data set, structural similarity, and CLIP or DINOv2 models.

The classifier needs no model hub: it is a network with one hidden layer (scikit-learn) on the pixels of a data set, which may
be the one that the diffusion model was trained on. The activations of its hidden layer serve as features to compare images.

Axis legend: N images, P pixels of all channels, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from steerlab import models
from steerlab.data import rows
from steerlab.evaluation.judging import scorers
from steerlab.job import DataSet
from steerlab.steered import pictures

if TYPE_CHECKING:
    from PIL.Image import Image
    from sklearn.neural_network import MLPClassifier

Floats = npt.NDArray[np.float32]
_HIDDEN, _ROUNDS = 128, 40
"""Number of units of the classifier's hidden layer, and of passes over its training images."""
_BATCH = 64
_SIGMA = 1.5
"""Standard deviation of the SSIM window, in pixels."""
_C1, _C2 = 0.01**2, 0.03**2
"""Constants of SSIM for values between 0 and 1, (K1 L)^2 and (K2 L)^2 with L = 1."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier of pixels."""

    model: MLPClassifier
    classes: tuple[str, ...]
    shape: tuple[int, ...]

    def predict(self, images_NCHW: Tensor) -> list[str]:
        """Return the most likely class of each image."""
        return [str(name) for name in self.model.predict(self._pixels(images_NCHW))]

    def features(self, images_NCHW: Tensor) -> Floats:
        """Return the activations of the hidden layer (ReLU), (N, F), normalised to length 1."""
        # MLPClassifier does not expose its hidden layer, so its first layer is computed here.
        hidden_NF = np.maximum(self._pixels(images_NCHW) @ self.model.coefs_[0] + self.model.intercepts_[0], 0)
        return hidden_NF / np.maximum(np.linalg.norm(hidden_NF, axis=1, keepdims=True), 1e-12)

    def _pixels(self, images_NCHW: Tensor) -> Floats:
        if tuple(images_NCHW.shape[1:]) != self.shape:
            raise ValueError(
                f"the classifier was trained on images of {self.shape} (channels, height, width); the model draws "
                f"{tuple(images_NCHW.shape[1:])}"
            )
        return images_NCHW.flatten(1).numpy().astype(np.float32)


def classifier(data: DataSet, field: str, seed: int = 0) -> Classifier:
    """Train a classifier that predicts `field` from the images of a data set. It is cached within the process.

    Raises:
        ValueError: the rows lack the field, or all have the same value.
    """
    return _trained(data.model_dump_json(), field, seed)


# The key is JSON because a config of a data set is not hashable.
@lru_cache(maxsize=4)
def _trained(data_json: str, field: str, seed: int) -> Classifier:
    """Train the classifier of a data set; `field` holds the class. Tasks of one process that need the same one share it."""
    from sklearn.neural_network import MLPClassifier

    images_NCHW, labels = _labelled(DataSet.model_validate_json(data_json), field)
    classes: tuple[str, ...] = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise ValueError(f"classifier: all rows have {field} {labels[0]!r}, so there is nothing to classify")
    # tol=0 and n_iter_no_change switch early stopping off, so that every classifier gets the same number of passes.
    pixels_NP = images_NCHW.flatten(1).numpy()
    model = MLPClassifier((_HIDDEN,), max_iter=_ROUNDS, random_state=seed, tol=0, n_iter_no_change=_ROUNDS, alpha=1e-3)
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of rounds is fixed, whether or not it converges
        model.fit(pixels_NP, labels)
    return Classifier(model, classes, tuple(images_NCHW.shape[1:]))


def check_classifier(data: DataSet | None, name: str = "classifier") -> None:
    """Refuse data for a classifier of images that are not images; `name` is the config's field. Raises ValueError."""
    if data is not None and data.format != "image":
        raise ValueError(f"{name}.format {data.format}: a classifier of images needs format image")


def accuracy(judge: Classifier, data: DataSet, field: str) -> list[float]:
    """Return for each image of a data set 1 if the classifier predicts its label, else 0."""
    images_NCHW, labels = _labelled(data, field)
    return [float(predicted == label) for predicted, label in zip(judge.predict(images_NCHW), labels, strict=True)]


def _labelled(data: DataSet, field: str) -> tuple[Tensor, list[str]]:
    check_classifier(data)
    image_rows = rows.read(data)
    missing = next((row for row in image_rows if field not in row), None)
    if missing is not None:
        raise ValueError(f"classifier: a row has no field {field!r} (it has: {', '.join(missing)})")
    values = np.stack([np.asarray(row["image"]) for row in image_rows]).astype(np.float32) / 255
    # Grey images have no channel axis. The copy makes the array contiguous, which torch needs to share its memory.
    images_NCHW = torch.from_numpy(values[:, None] if values.ndim == 3 else np.moveaxis(values, -1, 1).copy())
    return images_NCHW, [str(row[field]) for row in image_rows]


def ssim(a_CHW: Tensor, b_CHW: Tensor) -> float:
    """Return the structural similarity (SSIM) of two images with values in [0, 1], the mean over pixels and channels.

    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 13,
    2004, eq. 13, with the paper's Gaussian window (sigma 1.5 pixels) and constants. The window is cut off at 3.5 sigma, and the
    image is mirrored at its border.
    """
    # Computed in float64, since E[x^2] - E[x]^2 cancels almost completely where an image is uniform.
    maps = []
    for a_HW, b_HW in zip(a_CHW.double().numpy(), b_CHW.double().numpy(), strict=True):
        mean_a, mean_b = _blurred(a_HW), _blurred(b_HW)
        # Variance and covariance under the window, by E[x^2] - E[x]^2.
        var_a, var_b = _blurred(a_HW**2) - mean_a**2, _blurred(b_HW**2) - mean_b**2
        covariance = _blurred(a_HW * b_HW) - mean_a * mean_b
        top = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
        maps.append(top / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2)))
    return float(np.mean(maps))


def _blurred(x_HW: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return gaussian_filter(x_HW, _SIGMA, truncate=3.5)


class Clip:
    """A CLIP model and its processor, by source."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        directory = scorers.check_model(source)
        loaded: Any = models.named.load(directory, CLIPModel)
        self._model, self._device = loaded.to(device), device
        models.named.load_tokenizer(directory)  # checks the tokenizer's files, which the processor would load unchecked
        self._processor = models.named.load_processor(directory, CLIPProcessor)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors of texts, (N, F)."""
        inputs = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(self._device)
        return _direction(self._model.get_text_features(**inputs))

    @torch.inference_mode()
    def images(self, images_NCHW: Tensor) -> Tensor:
        """Return the unit vectors of images, (N, F)."""
        return torch.cat(
            [
                _direction(
                    self._model.get_image_features(
                        **self._processor(images=_pictures(part), return_tensors="pt").to(self._device)
                    )
                )
                for part in images_NCHW.split(_BATCH)
            ]
        )


def check_clip(source: str) -> None:
    """Refuse a source that is not a CLIP model. Raises ValueError."""
    from transformers import CLIPModel

    directory = scorers.check_model(source)
    models.named.check(directory, CLIPModel)
    models.named.check_processor(directory)


def check_embedder(source: str) -> None:
    """Refuse a source that is not a model of images. Raises ValueError."""
    scorers.check_embedder(source)
    models.named.check_processor(scorers.check_model(source))


def embed(source: str, images_NCHW: Tensor, device: torch.device) -> Tensor:
    """Return the unit vectors of images, (N, F): CLIP's image features, or the pooled output of a model such as DINOv2."""
    from transformers import AutoImageProcessor, AutoModel

    directory = scorers.check_model(source)
    # AutoModel of a CLIP checkpoint would require texts besides the images.
    if models.named.read_config(directory).model_type == "clip":
        return Clip(source, device).images(images_NCHW)
    processor = models.named.load_processor(directory, AutoImageProcessor)
    model = models.named.load(directory, AutoModel).to(device)  # type: ignore[arg-type]
    with torch.inference_mode():
        parts = [
            model(**processor(images=_pictures(part), return_tensors="pt").to(device)) for part in images_NCHW.split(_BATCH)
        ]
    return _direction(torch.cat([part.pooler_output for part in parts]))


def _pictures(images_NCHW: Tensor) -> list[Image]:
    # Processors expect three channels, but images of a small world are grey.
    return [pictures.picture(image).convert("RGB") for image in images_NCHW]


def _direction(output: Any) -> Tensor:
    """Return unit vectors on the CPU."""
    # `get_image_features` and `get_text_features` return a tensor in transformers 4, an output object in transformers 5.
    x_NF = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(x_NF.float(), dim=-1).cpu()
