"""Feature extractors: `(images float[B, H, W, C], *, train, keys) -> (features [B, D], maps)`.

`maps` are the stages' outputs, NHWC, and the last one's spatial mean is `features`. `keys` are
dropout's, one a row; None drops nothing. Every backbone has the fields `dtype` (of compute;
parameters and batch statistics stay float32) and `axis_name` (of the pmap axis over which BatchNorm
averages; None under jit, where the batch is global already).
"""

from jaxood.models.backbones.cnn import CNN
from jaxood.models.backbones.wrn import WRN

BACKBONES = {'wrn': WRN, 'cnn': CNN}
