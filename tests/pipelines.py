"""Tiny pipelines of Stable Diffusion and CLIP: our networks with the reference's arrays."""

import functools
import tempfile

import numpy as np
from flax.traverse_util import unflatten_dict
from reference import make_stable_diffusion as reference

from jaxood.models import components

PIPELINES = tuple(reference.PIPELINES)


@functools.cache
def golden():
    """What diffusers and transformers computed: 'sd1/unet' ... -> array."""
    return dict(np.load(reference.FILE))


@functools.cache
def folder(pipeline):
    """A pipeline folder, made once for all tests; they leave it as it is."""
    return reference.folder(tempfile.mkdtemp(), pipeline)


def network(pipeline, name, **keywords):
    """(tree name -> module, variables) of a component with the reference's arrays."""
    component = components.COMPONENTS[name]
    modules = component.build(reference.config(pipeline, name), **keywords)
    place = folder(pipeline) / ('' if name == 'clip' else name)
    arrays = components.Arrays(components.weight_files(place, component.files, None))
    flat = dict(components.convert(component, component.targets(modules), arrays))
    return modules, {'params': unflatten_dict(flat, sep='/')}


def relative(ours, theirs):
    """The largest difference, over the largest value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
