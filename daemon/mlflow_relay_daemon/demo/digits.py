"""The data: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TEST_SHARE = 5  # every fifth image is for testing


def save_digits(path: Path) -> tuple[int, int]:
    """Write the data for the ranks; return how many images there are to train on and to test.

    images, test_images: (n, 65) float64, the last column is 1; labels, test_labels: (n,) int64.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    images = np.column_stack([pixels / 16, np.ones(len(pixels))])
    is_test = np.arange(len(images)) % TEST_SHARE == 0
    np.savez(
        path,
        images=images[~is_test],
        labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
    )
    return int((~is_test).sum()), int(is_test.sum())
