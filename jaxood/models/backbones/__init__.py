"""Feature extractors: `(images float[B, H, W, C], *, train, keys, after) -> (features, maps)`.

`features` [B, D] is the penultimate vector, what the head reads. `maps` are the stages' outputs,
NHWC, and the module's `map_names` their names; for convolutional networks the last one's spatial
mean is `features`. `keys` are dropout's, one a row; None drops nothing. With `after=i`, `images` is
stage i's map instead, and the network goes on from there (`maps` then holds the later ones). Every
backbone has the fields `dtype` (of compute; parameters and batch statistics stay float32) and
`axis_name` (of the pmap axis over which BatchNorm averages; None under jit, where the batch is
global already).
"""

from jaxood.models.backbones import densenet, efficientnet, inception, resnet, vit, wrn
from jaxood.models.backbones.cnn import CNN
from jaxood.models.backbones.densenet import DenseNet
from jaxood.models.backbones.efficientnet import EfficientNet
from jaxood.models.backbones.inception import Inception
from jaxood.models.backbones.resnet import ResNet
from jaxood.models.backbones.vit import ViT
from jaxood.models.backbones.wrn import WRN

BACKBONES = {
    'wrn': WRN,
    'densenet': DenseNet,
    'resnet': ResNet,
    'efficientnet': EfficientNet,
    'vit': ViT,
    'inception': Inception,
    'cnn': CNN,
}

# The maps that DLSR reads where it is not told others: of B4 and ResNet-50 its official code's, of
# ViT-B/16 (blocks 2, 5, 8, 11 of 0-11) and all others our choice, one for each resolution or depth.
TAPS = {
    'efficientnet': lambda names: names[:-1],  # all but the head's
    'resnet': lambda names: names[:3],  # of CIFAR's these are all
    'vit': lambda names: names[-1 :: -max(1, len(names) // 4)][::-1],
}

# Of layouts with the same names, the first is taken for granted.
LAYOUTS = (
    *wrn.LAYOUTS,
    *densenet.LAYOUTS,
    *resnet.LAYOUTS,
    *efficientnet.LAYOUTS,
    *vit.LAYOUTS,
    *inception.LAYOUTS,
)
