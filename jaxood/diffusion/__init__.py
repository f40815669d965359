"""Gaussian diffusion as pure functions on arrays of any shape: images, latents, feature vectors.

schedules  ᾱ_t, the signal left at each time
process    noise to a level, what networks predict, the training loss
samplers   the way back, with guidance

A new entry is one function there and one line here.
"""

from jaxood.diffusion import process, samplers, schedules
from jaxood.diffusion.process import Prediction

SCHEDULES = {  # (num_steps, **options) -> alpha_bar float32[T + 1]
    'linear': schedules.linear,
    'cosine': schedules.cosine,
    'scaled_linear': schedules.scaled_linear,
}

PREDICTIONS = {  # what the network is trained to output
    'eps': Prediction(process.eps_target, process.eps_estimate),
    'x_0': Prediction(process.x_0_target, process.x_0_estimate),
    'v': Prediction(process.v_target, process.v_estimate),
}

SAMPLERS = {  # one step from level t to level s
    'ddpm': samplers.ddpm,
    'ddim': samplers.ddim,
    'dpmpp_2m': samplers.dpmpp_2m,
    'pndm': samplers.Multistep(samplers.pndm, samplers.pndm_start),
}

MIXES = {  # (network, condition_i, condition_j, ratio, guidance) -> network(x, t)
    'label': samplers.label_mixed,
    'score': samplers.score_mixed,
}
