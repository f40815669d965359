"""Networks that a diffusion process can train.

DENOISERS  of images: network(x_t, t, condition=None, *, keys=None)
RESTORERS  of feature vectors: network(z_t, t)
"""

from jaxood.models.denoisers.lfdn import LFDN
from jaxood.models.denoisers.unet import UNet

DENOISERS = {
    'unet': UNet,
}

RESTORERS = {
    'lfdn': LFDN,
}
