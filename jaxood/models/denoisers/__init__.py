"""Networks that a diffusion process can train: network(x_t, t, condition=None, *, keys=None)."""

from jaxood.models.denoisers.unet import UNet

DENOISERS = {
    'unet': UNet,
}
