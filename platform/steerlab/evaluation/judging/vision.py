"""What judges images: a classifier trained on a data set, structural similarity, and CLIP or DINOv2 by name.

The embedded judge needs no hub: a network of one hidden layer (scikit-learn) on the pixels of a data set that the diffusion
model may have been trained on. Its hidden layer gives the features by which images are compared. Axes: N images, K classes,
F features.
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
_BATCH = 64
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


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
        """Return what the hidden layer computes, (N, F), each row of length 1."""
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
    """Train a classifier of the values of `field` on the images of a data set; once a process.

    Raises:
        ValueError: the rows have no such field, or one value of it alone.
    """
    return _trained(data.model_dump_json(), field, seed)


@lru_cache(maxsize=4)
def _trained(data_json: str, field: str, seed: int) -> Classifier:
    from sklearn.neural_network import MLPClassifier

    images_NCHW, labels = _labelled(DataSet.model_validate_json(data_json), field)
    classes: tuple[str, ...] = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise ValueError(f"classifier: all rows have {field} {labels[0]!r}; there is nothing to tell apart")
    pixels_NP = images_NCHW.flatten(1).numpy()
    model = MLPClassifier((_HIDDEN,), max_iter=_ROUNDS, random_state=seed, tol=0, n_iter_no_change=_ROUNDS, alpha=1e-3)
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of rounds is set
        model.fit(pixels_NP, labels)
    return Classifier(model, classes, tuple(images_NCHW.shape[1:]))


def check_classifier(data: DataSet | None, name: str = "classifier") -> None:
    """Refuse data that no classifier of images is trained or judged on. Raises ValueError."""
    if data is not None and data.format != "image":
        raise ValueError(f"{name}.format {data.format}: a classifier of images is trained on images")


def accuracy(judge: Classifier, data: DataSet, field: str) -> list[float]:
    """Say of each image of another data set whether the classifier is right, 0 or 1."""
    images_NCHW, labels = _labelled(data, field)
    return [float(found == label) for found, label in zip(judge.predict(images_NCHW), labels, strict=True)]


def _labelled(data: DataSet, field: str) -> tuple[Tensor, list[str]]:
    check_classifier(data)
    found = rows.read(data)
    missing = next((row for row in found if field not in row), None)
    if missing is not None:
        raise ValueError(f"classifier: a row has no field {field!r} (it has: {', '.join(missing)})")
    values = np.stack([np.asarray(row["image"]) for row in found]).astype(np.float32) / 255
    images_NCHW = torch.from_numpy(values[:, None] if values.ndim == 3 else np.moveaxis(values, -1, 1).copy())
    return images_NCHW, [str(row[field]) for row in found]


def ssim(a_CHW: Tensor, b_CHW: Tensor) -> float:
    """Return the structural similarity of two images with values in [0, 1], a mean over pixels and channels.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 13, 2004, eq. 13, with its
    Gaussian window (sigma 1.5 pixels) and constants; the window is cut off at 3.5 sigma and mirrored at the border.
    """
    found = []
    for a_HW, b_HW in zip(a_CHW.double().numpy(), b_CHW.double().numpy(), strict=True):
        mean_a, mean_b = _blurred(a_HW), _blurred(b_HW)
        var_a, var_b = _blurred(a_HW**2) - mean_a**2, _blurred(b_HW**2) - mean_b**2
        covariance = _blurred(a_HW * b_HW) - mean_a * mean_b
        top = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
        found.append(top / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2)))
    return float(np.mean(found))


def _blurred(x_HW: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return gaussian_filter(x_HW, _SIGMA, truncate=3.5)


class Clip:
    """A CLIP model and its processor, by source."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        directory = scorers.check_model(source)
        loaded: Any = models.named.load(directory, CLIPModel)
        self._model, self._device = loaded.to(device), device
        models.named.load_tokenizer(directory)  # the processor loads it again, and looks at nothing
        self._processor = models.named.load_processor(directory, CLIPProcessor)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return the directions of texts, (N, F)."""
        inputs = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(self._device)
        return _direction(self._model.get_text_features(**inputs))

    @torch.inference_mode()
    def images(self, images_NCHW: Tensor) -> Tensor:
        """Return the directions of images, (N, F)."""
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
    """Refuse a source that is no CLIP model. Raises ValueError."""
    from transformers import CLIPModel

    directory = scorers.check_model(source)
    models.named.check(directory, CLIPModel)
    models.named.check_processor(directory)


def check_embedder(source: str) -> None:
    """Refuse a source that is no model of images. Raises ValueError."""
    scorers.check_embedder(source)
    models.named.check_processor(scorers.check_model(source))


def embed(source: str, images_NCHW: Tensor, device: torch.device) -> Tensor:
    """Return the directions of images by a model of images: DINOv2's pooled output, (N, F); CLIP's image features."""
    from transformers import AutoImageProcessor, AutoModel

    directory = scorers.check_model(source)
    if models.named.read_config(directory).model_type == "clip":
        return Clip(source, device).images(images_NCHW)
    processor = models.named.load_processor(directory, AutoImageProcessor)
    model: Any = models.named.load(directory, AutoModel).to(device)  # type: ignore[arg-type]
    with torch.inference_mode():
        parts = [
            model(**processor(images=_pictures(part), return_tensors="pt").to(device)) for part in images_NCHW.split(_BATCH)
        ]
    return _direction(torch.cat([part.pooler_output for part in parts]))


def _pictures(images_NCHW: Tensor) -> list[Image]:
    return [pictures.picture(image).convert("RGB") for image in images_NCHW]


def _direction(found: Any) -> Tensor:
    """Return unit vectors on the CPU; transformers hands out a tensor or what holds it."""
    x_NF = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(x_NF.float(), dim=-1).cpu()
