"""Plugin of the trainer: a network of torchvision on the images of a NumPy file.

python -m consensus.train workers=4 'plugins=[own_images]' data=own_images data.root=images.npz \
    model=torchvision model.options.name=resnet18 data.validation=0.1

The file has `x` (N, height, width, 3) uint8 and `y` (N,), the class of each image.
"""

import numpy as np
from torchvision.models import get_model

from consensus import DATASETS, MODELS, Dataset, Samples


@DATASETS.register("own_images")
def own_images(root: str) -> Dataset:
    with np.load(root) as file:
        x, y = file["x"].transpose(0, 3, 1, 2), file["y"]
    test = np.random.default_rng(0).random(len(x)) < 0.2
    return Dataset(Samples(x[~test], y[~test]), Samples(x[test], y[test]))


@MODELS.register("torchvision")
def torchvision(num_classes: int, name: str = "resnet18"):
    return get_model(name, num_classes=num_classes)
