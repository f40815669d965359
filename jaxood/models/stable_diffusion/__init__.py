"""Stable Diffusion 1.x and 2.x in Flax, configured by the files of a diffusers pipeline folder."""
