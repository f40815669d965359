"""CLIP. Radford et al. 2021 (arXiv:2103.00020): texts and images as vectors that can be compared.

text vision  the two encoders
transformer  what they share
tokenizer    texts to token ids
"""
