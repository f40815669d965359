"""Pipeline folders from nothing: settings in diffusers' words, a Stable Diffusion of our own, and
the frame for one that comes as a single file."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from jaxood.errors import UserError
from jaxood.models.clip import tokenizer
from jaxood.models.components import COMPONENTS, CONFIG, read_json
from jaxood.models.stable_diffusion import folder

SCHEDULER = {
    '_class_name': 'DDIMScheduler',
    'beta_end': 0.012,
    'beta_schedule': 'scaled_linear',
    'beta_start': 0.00085,
    'clip_sample': False,
    'num_train_timesteps': 1000,
    'prediction_type': 'epsilon',
    'set_alpha_to_one': False,
    'steps_offset': 1,
    'timestep_spacing': 'leading',
}


def text_config(
    *, vocab_size: int, positions: int, width: int, layers: int, heads: int, projection: int
) -> dict[str, Any]:
    """Of a text encoder; the last two tokens of the vocabulary start and end texts."""
    return {
        'architectures': ['CLIPTextModel'],
        'model_type': 'clip_text_model',
        'vocab_size': vocab_size,
        'bos_token_id': vocab_size - 2,
        'eos_token_id': vocab_size - 1,
        'pad_token_id': vocab_size - 1,
        'max_position_embeddings': positions,
        'projection_dim': projection,
        **_transformer(width, layers, heads),
    }


def vision_config(
    *,
    size: int,
    patch: int,
    image_channels: int,
    width: int,
    layers: int,
    heads: int,
    projection: int,
) -> dict[str, Any]:
    """Of an image encoder."""
    return {
        'model_type': 'clip_vision_model',
        'image_size': size,
        'patch_size': patch,
        'num_channels': image_channels,
        'projection_dim': projection,
        **_transformer(width, layers, heads),
    }


def _transformer(width, layers, heads):
    return {
        'hidden_size': width,
        'intermediate_size': 4 * width,
        'num_hidden_layers': layers,
        'num_attention_heads': heads,
        'hidden_act': 'quick_gelu',
        'layer_norm_eps': 1e-5,
    }


def clip_config(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole CLIP."""
    own = {key: value for key, value in text.items() if key != 'architectures'}
    return {
        'architectures': ['CLIPModel'],
        'model_type': 'clip',
        'projection_dim': text['projection_dim'],
        'text_config': own,
        'vision_config': dict(vision),
    }


def vae_config(
    *, size: int, image_channels: int, channels: Sequence[int], layers: int, groups: int
) -> dict[str, Any]:
    """Of an autoencoder; `scaling_factor` is measured when it is trained."""
    levels = len(channels)
    return {
        '_class_name': 'AutoencoderKL',
        'in_channels': image_channels,
        'out_channels': image_channels,
        'block_out_channels': list(channels),
        'down_block_types': ['DownEncoderBlock2D'] * levels,
        'up_block_types': ['UpDecoderBlock2D'] * levels,
        'layers_per_block': layers,
        'latent_channels': 4,
        'norm_num_groups': groups,
        'sample_size': size,
        'scaling_factor': 1.0,
        'act_fn': 'silu',
    }


def unet_config(
    *, size: int, channels: Sequence[int], layers: int, heads: int, groups: int, width: int
) -> dict[str, Any]:
    """Of a U-Net that looks at the prompt at every level but the last, as SD 1.x.

    Args:
        size: of the latents.
        width: of the prompt's tokens.
    """
    levels = len(channels)
    return {
        '_class_name': 'UNet2DConditionModel',
        'sample_size': size,
        'in_channels': 4,
        'out_channels': 4,
        'block_out_channels': list(channels),
        'down_block_types': [*['CrossAttnDownBlock2D'] * (levels - 1), 'DownBlock2D'],
        'up_block_types': ['UpBlock2D', *['CrossAttnUpBlock2D'] * (levels - 1)],
        'layers_per_block': layers,
        'attention_head_dim': heads,  # the number of heads: see `unet`
        'norm_num_groups': groups,
        'cross_attention_dim': width,
    }


STABLE_DIFFUSION_1_5 = {
    'text_encoder': text_config(
        vocab_size=49_408, positions=77, width=768, layers=12, heads=12, projection=768
    ),
    'unet': unet_config(
        size=64, channels=(320, 640, 1280, 1280), layers=2, heads=8, groups=32, width=768
    ),
    'vae': vae_config(
        size=512, image_channels=3, channels=(128, 256, 512, 512), layers=2, groups=32
    )
    | {'scaling_factor': 0.18215},
}
NO_WORDS = (
    'A single file has no tokenizer: put vocab.json and merges.txt (1.6 MB) of '
    'https://huggingface.co/openai/clip-vit-large-patch14 into a folder, and give it with '
    '--config-from=FOLDER.'
)


def write(
    place: pathlib.Path,
    configs: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Any],
    words: tuple[dict[str, int], Sequence[tuple[str, str]]],
    *,
    length: int,
) -> None:
    """Writes the pipeline folder, in diffusers' layout, and in it, as `clip/`, the whole CLIP.

    Args:
        configs: of 'text_encoder', 'unet', 'vae', 'clip'.
        params: of the same; CLIP's as {'text': ..., 'vision': ..., 'logit_scale': ...}.
        words: vocabulary and merges, see `tokenizer.learn`.
        length: tokens of a prompt.
    """
    _frame(place)
    for part in ('tokenizer', 'clip'):
        tokenizer.save(place / part, *words, length=length)
    pipeline = [_part(name, name, configs, params) for name in folder.KINDS['stable-diffusion']]
    folder.save(place, None, pipeline, to_diffusers=True)
    folder.save(place / 'clip', None, [_part('clip', '.', configs, params)], to_diffusers=True)


def frame(place: pathlib.Path, words: pathlib.Path) -> None:
    """Writes a pipeline folder of Stable Diffusion 1.5 without weights.

    Args:
        place: folder to write.
        words: one with CLIP's `vocab.json` and `merges.txt`, or with `tokenizer` that has them.

    Raises:
        UserError: they are not there, or damaged.
    """
    files = ('vocab.json', 'merges.txt')
    found = [p for p in (words, words / 'tokenizer') if all((p / f).is_file() for f in files)]
    if not found:
        raise UserError(f'{words}: there are no {" and ".join(files)}. {NO_WORDS}')
    tokenizer.load(found[0])  # or says what is wrong
    _frame(place)
    vocabulary = read_json(found[0] / files[0])
    merges = tokenizer.read_merges((found[0] / files[1]).read_text('utf-8'))
    tokenizer.save(place / 'tokenizer', vocabulary, merges)
    for name, config in STABLE_DIFFUSION_1_5.items():
        (place / name).mkdir()
        _write_json(place / name / CONFIG, config)


def _frame(place):
    """The files of a pipeline that say what belongs to it, and how it samples."""
    index = {
        'text_encoder': ['transformers', 'CLIPTextModel'],
        'tokenizer': ['transformers', 'CLIPTokenizer'],
        'unet': ['diffusers', 'UNet2DConditionModel'],
        'vae': ['diffusers', 'AutoencoderKL'],
        'scheduler': ['diffusers', 'DDIMScheduler'],
    }
    index |= {name: [None, None] for name in ('safety_checker', 'feature_extractor')}
    index |= {'_class_name': 'StableDiffusionPipeline', 'requires_safety_checker': False}
    place.mkdir(parents=True, exist_ok=True)
    (place / folder.SCHEDULER).parent.mkdir(exist_ok=True)
    _write_json(place / folder.INDEX, index)
    _write_json(place / folder.SCHEDULER, SCHEDULER)


def _part(name, place, configs, params):
    component, config = COMPONENTS[name], configs[name]
    modules = component.build(config)
    targets = component.targets(modules)
    flat = flatten_dict(params[name], sep='/')
    arrays = ((t.path, np.asarray(flat[t.path])) for t in targets.values())
    dtypes = {t.path: str(np.asarray(flat[t.path]).dtype) for t in targets.values()}
    return folder.Part(name, place, dict(config), modules, targets, arrays, dtypes)


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')
