"""`digits`: 1,797 handwritten digits of 8 × 8 pixels that come with scikit-learn; nothing is downloaded.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49 (the test part, as in `sklearn.datasets.load_digits`).
"""

from celora.data.inputs import PixelArrays
from celora.data.table import Table
from celora.lazy import Lazy, torch

sklearn_datasets = Lazy("sklearn.datasets")


def read_digits() -> Table:
    """Images (1797, 1, 8, 8) float32 in [0, 1], labels "0" to "9"."""
    source = sklearn_datasets.load_digits()
    images = torch.from_numpy(source.images).to(torch.float32).unsqueeze(1) / 16  # pixels are whole numbers, 0 to 16
    labels = [str(int(label)) for label in source.target]
    return Table(
        inputs=PixelArrays(images), labels=labels, groups=None, splits=None,
        rows=[f"digits:{number}" for number in range(1, len(labels) + 1)],
    )  # fmt: skip
