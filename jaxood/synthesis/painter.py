"""A text-to-image model as functions that strategies call."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxood.models.stable_diffusion import pipeline
from jaxood.rng import key_each, key_for


class Painter(NamedTuple):
    """A pipeline, how it samples, and the look of the ID images.

    `shared`, which its methods take, holds `params` (the pipeline's), `guidance` (w, traced:
    another one compiles nothing), `null` float32[M, D] (the empty prompt's embedding), and for the
    strategies themselves `contexts` float32[P, M, D], the embeddings of P prompts.

    Attributes:
        size: pixels a side that the pipeline paints.
        shape: (H, W, C) of the ID images.
        guided: whether the null branch is computed, in one batch with the other.
        steps: from the top down; of an edit, those below its depth are taken.
        options: the sampler's own keywords, as (name, value) pairs.
    """

    networks: pipeline.Networks
    size: int
    shape: tuple[int, int, int]
    sampler: str
    steps: int
    guided: bool
    options: tuple[tuple[str, Any], ...] = ()

    def noise(self, key, index):
        """Latents of pure noise, row i from (key, index[i])."""
        vae = self.networks.vae
        side = self.size // vae.factor
        draw = lambda k: jax.random.normal(k, (side, side, vae.latent_channels))
        return jax.vmap(draw)(key_each(key_for(key, 'start'), index))

    def encode(self, shared, images):
        """ID images float32[B, H, W, C] in [-1, 1] -> the mean of their latents [B, h, w, 4]."""
        images = resize(images, self.size, self.size)
        return pipeline.encode_images(self.networks, shared['params'], images)

    def decode(self, shared, latents):
        """Latents -> images like the ID images, float32[B, H, W, C] in [-1, 1]."""
        images = pipeline.decode_latents(self.networks, shared['params'], latents)
        return resize(jnp.clip(images, -1.0, 1.0), *self.shape[:2])

    def paint(self, shared, latents, context, key, index, *, depth: int | None = None):
        """Walks latents from level `depth` (None: pure noise) down towards prompts -> images.

        Args:
            context: float32[B, M, D], the prompts' embeddings.
            key, index: row i's noise on the way comes from (key, index[i]).
        """
        schedule = self.networks.schedule
        latents = pipeline.denoise(
            self.networks,
            shared['params'],
            latents,
            context,
            shared['null'],
            key_each(key_for(key, 'steps'), index),
            guidance=shared['guidance'] if self.guided else None,
            timesteps=pipeline.grid(schedule, sampler=self.sampler, steps=self.steps, start=depth),
            sampler=self.sampler,
            **dict(self.options),
        )
        return self.decode(shared, latents)


def resize(images, height: int, width: int):
    """Cubic, antialiased where it shrinks; within [-1, 1], and as they are if they have that size.

    float32[B, H, W, C] -> float32[B, height, width, C].
    """
    shape = (images.shape[0], height, width, images.shape[3])
    if shape == images.shape:
        return images
    return jnp.clip(jax.image.resize(images, shape, 'cubic', antialias=True), -1.0, 1.0)
