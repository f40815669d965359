"""Tiny pipelines of Stable Diffusion and CLIP: our networks with the reference's arrays."""

import functools
import tempfile

import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from reference import make_stable_diffusion as reference

from jaxood.models import components
from jaxood.models.stable_diffusion import ldm

PIPELINES = tuple(reference.PIPELINES)
UNUSED = {  # what is in LDM's files, too, and not needed
    'betas': (1000,),
    'alphas_cumprod_prev': (1000,),
    'sqrt_one_minus_alphas_cumprod': (1000,),
    'log_one_minus_alphas_cumprod': (1000,),
    'sqrt_recipm1_alphas_cumprod': (1000,),
    'posterior_log_variance_clipped': (1000,),
    'logvar': (1000,),
    'model_ema.decay': (),
    'model_ema.diffusion_modelout2bias': (4,),
    'first_stage_model.loss.logvar': (),
    'cond_stage_model.transformer.text_model.embeddings.position_ids': (1, 77),
}


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


def ldm_names(component, config):
    """diffusers' name -> LDM's, and diffusers' name -> shape there."""
    modules = components.COMPONENTS[component].build(config)
    targets = components.COMPONENTS[component].targets(modules)
    shapes = {n: components.shape_of_theirs(target) for n, target in targets.items()}
    return {n: ldm.NAMES[component](n, modules['']) for n in targets}, shapes


def single(path, pipeline='sd1', change=lambda content: None):
    """Writes a pipeline as one file with LDM's names, `change`d before -> the file."""
    content = {n: np.zeros(shape, np.float32) for n, shape in UNUSED.items()}
    for component, stem in reference.WEIGHTS.items():
        arrays = safetensors.numpy.load_file(folder(pipeline) / component / f'{stem}.safetensors')
        for name, new in ldm_names(component, reference.config(pipeline, component))[0].items():
            array = arrays[name if name in arrays else name.removeprefix('text_model.')]
            if component == 'vae' and '.attn_1.' in new and array.ndim == 2:
                array = array[..., None, None]
            content[new] = array
    change(content)
    safetensors.numpy.save_file(content, path)
    return path


def relative(ours, theirs):
    """The largest difference, over the largest value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
