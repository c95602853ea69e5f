"""A small neural network in NumPy that reads handwritten digits.

The parameters are a dict of float32 arrays, and so are their gradients: what `fusedstep.GD` and
`fusedstep.Adam` take as they are.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Params = dict[str, Array]

LAYER_SIZES = (64, 256, 128, 10)  # 8 x 8 pixels, two hidden layers, ten digits


class Digits(NamedTuple):
    """Images as rows of pixels in [0, 1], and the digits that they show."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


def load_digits(seed: int = 0) -> Digits:
    """Return the 1797 digits that come with scikit-learn, a random quarter of them for testing."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = sklearn_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def init_params(rng: np.random.Generator, layer_sizes: tuple[int, ...] = LAYER_SIZES) -> Params:
    """Return random weights (He et al. 2015) and zero biases."""
    params = {}
    for i, (inputs, outputs) in enumerate(pairwise(layer_sizes)):
        weights = rng.standard_normal((inputs, outputs), dtype=np.float32)
        params[f"w{i}"] = weights * np.float32(np.sqrt(2 / inputs))
        params[f"b{i}"] = np.zeros(outputs, np.float32)
    return params


def forward(params: Params, images: Array) -> list[Array]:
    """Return the input of every layer, and last the scores of the ten digits."""
    activations = [images]
    layers = len(params) // 2
    for i in range(layers):
        x = activations[-1] @ params[f"w{i}"] + params[f"b{i}"]
        activations.append(np.maximum(x, 0) if i < layers - 1 else x)
    return activations


def loss_and_grads(params: Params, images: Array, labels: Array) -> tuple[float, Params]:
    """Return the mean cross-entropy and its gradients."""
    activations = forward(params, images)
    log_probabilities = log_softmax(activations[-1])
    rows = np.arange(len(labels))
    loss = -float(log_probabilities[rows, labels].mean())

    delta = np.exp(log_probabilities)
    delta[rows, labels] -= 1
    delta /= len(labels)
    return loss, backward(params, activations, delta)


def backward(params: Params, activations: list[Array], delta: Array) -> Params:
    """Return the gradients, by backpropagation.

    `activations` is what `forward` returned, `delta` the gradient of the loss with respect to the
    scores, and then to the output of each layer before.
    """
    grads = {}
    for i in reversed(range(len(params) // 2)):
        grads[f"w{i}"] = activations[i].T @ delta
        grads[f"b{i}"] = delta.sum(axis=0)
        delta = (delta @ params[f"w{i}"].T) * (activations[i] > 0)
    return grads


def log_softmax(scores: Array) -> Array:
    scores = scores - scores.max(axis=1, keepdims=True)
    logarithms: Array = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return logarithms


def accuracy(params: Params, images: Array, labels: Array) -> float:
    """Return the share of `images` that are read correctly."""
    return float((forward(params, images)[-1].argmax(axis=1) == labels).mean())
