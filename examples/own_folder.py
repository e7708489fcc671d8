"""Plugin of the trainer: image files that need not fit in memory, with random augmentation.

python -m consensus.train workers=4 'plugins=[own_folder]' data=own_folder data.root=images \
    data.loader_workers=4 model=network model.options.name=resnet18

`images/train` and `images/test` have a folder of image files for each class.
"""

from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

from consensus import DATASETS, MODELS, Dataset


@DATASETS.register("own_folder")
def own_folder(root: str, size: int = 224) -> Dataset:
    augment = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ToImage()])
    plain = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.ToImage()])
    return Dataset(ImageFolder(f"{root}/train", augment), ImageFolder(f"{root}/test", plain))


@MODELS.register("network")
def network(num_classes: int, name: str = "resnet18"):
    return get_model(name, num_classes=num_classes)
