"""Noise schedules: how much signal is left at each step, ᾱ_t.

Every function returns float32[T + 1] whose index is the paper's t: entry 0 is clean data (exactly
1), entry T the noisiest level. They compute in float64 (1 - β is close to 1) and round at the end.
"""

import numpy as np


def linear(num_steps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """ᾱ_t = Π_{i≤t} (1 - β_i), with β_1 ... β_T evenly spaced.

    Ho et al. 2020 (arXiv:2006.11239), Eq. 4 and Sec. 4. The defaults are the paper's, for T = 1000:
    they leave almost no signal there (ᾱ_T = 4e-5). With far fewer steps raise `beta_end`, or the
    chain ends before it reaches noise.
    """
    return _from_beta(np.linspace(beta_start, beta_end, num_steps))


def cosine(num_steps: int, *, offset: float = 0.008) -> np.ndarray:
    """Signal level ᾱ_t of the cosine schedule.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), Eq. 17:

        ᾱ_t = f(t) / f(0),   f(t) = cos²(π/2 · (t/T + s) / (1 + s))

    Args:
        num_steps: T, the number of noising steps.
        offset: s, keeps the first steps from being too small.
    """
    t = np.arange(num_steps + 1) / num_steps
    f = np.cos(0.5 * np.pi * (t + offset) / (1.0 + offset)) ** 2
    return _from_beta(np.minimum(1.0 - f[1:] / f[:-1], 0.999))  # Sec. 3.2: no singularity at t = T


def scaled_linear(
    num_steps: int, *, beta_start: float = 0.00085, beta_end: float = 0.012
) -> np.ndarray:
    """ᾱ_t with √β_1 ... √β_T evenly spaced; latent diffusion's code calls this "linear".

    Rombach et al. 2022 (arXiv:2112.10752), official code. The defaults are Stable Diffusion's, for
    T = 1000; DLSR (arXiv:2411.10701, official code) has T = 100 and β from 0.0015 to 0.0195.
    """
    return _from_beta(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)


def _from_beta(beta: np.ndarray) -> np.ndarray:
    return np.concatenate([[1.0], np.cumprod(1.0 - beta)]).astype(np.float32)
