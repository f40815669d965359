"""Loss functions of logits and features, one float32 value a row; the mean is the detector's.

`detection`: cross-entropy, outlier exposure, KL to and from the uniform distribution, energies.
`perturb`: DOE's perturbation of weights, and the regret that it follows.
`selfsup`: contrast, clusters and self-given labels, of whole batches.
`margin`: cosines, angular margins, AdaCos's scale: what heads make logits of.
`contrastive`: images and their captions.
"""
