"""Names in the single files of Stable Diffusion 1.x, those of the original latent-diffusion (LDM).

Rombach et al. 2022 (arXiv:2112.10752), CompVis/stable-diffusion. `NAMES` has a function for each
component of a pipeline, from diffusers' name of an array to the one in such a file; the arrays are
the same, but for the autoencoder's attention, which is a 1x1 convolution there. The settings it
needs are those of our modules. Weights are the plain ones: where a file holds their moving average,
too, it is under `model_ema`, and in the published "emaonly" files it is the plain one.
"""

import re
from collections.abc import Iterable, Sequence

from jaxood.errors import UserError

UNET, VAE, TEXT = 'model.diffusion_model.', 'first_stage_model.', 'cond_stage_model.transformer.'
LEFTOVERS = '|'.join(  # what training left in the file and sampling does without
    (
        r'model_ema\..*',
        r'betas|(sqrt_|log_)?(recip_|recipm1_|one_minus_)?alphas_cumprod(_prev)?',
        r'posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)',
        r'logvar|lvlb_weights|scale_factor',
        r'(first_stage_model\.)?loss\..*',
        r'cond_stage_model\..*\.position_ids',
    )
)
OTHERS = {  # how names begin -> whose they are
    'conditioner.': 'Stable Diffusion XL',
    'cond_stage_model.model.': 'Stable Diffusion 2.x',
    'model.diffusion_model.joint_blocks.': 'Stable Diffusion 3',
    'control_model.': 'a ControlNet',
    'lora_': 'a LoRA, changes to a Stable Diffusion',
}

_UNET_ENDS = {
    'time_embedding.linear_1': 'time_embed.0',
    'time_embedding.linear_2': 'time_embed.2',
    'conv_in': 'input_blocks.0.0',
    'conv_norm_out': 'out.0',
    'conv_out': 'out.2',
}
_RESNET = {
    'norm1': 'in_layers.0',
    'conv1': 'in_layers.2',
    'time_emb_proj': 'emb_layers.1',
    'norm2': 'out_layers.0',
    'conv2': 'out_layers.3',
    'conv_shortcut': 'skip_connection',
}
_VAE = {
    'conv_shortcut': 'nin_shortcut',
    'conv_norm_out': 'norm_out',
    'downsamplers.0': 'downsample',
    'upsamplers.0': 'upsample',
    'group_norm': 'norm',
    'to_q': 'q',
    'to_k': 'k',
    'to_v': 'v',
    'to_out.0': 'proj_out',
}


def unet(name: str, *, layers: int, attends: Sequence[bool]) -> str:
    """'up_blocks.1.attentions.2.norm.bias' -> 'model.diffusion_model.output_blocks.5.1.norm.bias'.

    LDM counts through: each way has `layers` + 1 blocks a level, a resnet and what follows it; on
    the way down the last of them is the change of size, and the first block of all is `conv_in`.

    Args:
        layers: of a level on the way down.
        attends: whether a level looks at the prompt, downwards.
    """
    within = re.fullmatch(r'(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)', name)
    if not within:
        module, _, array = name.rpartition('.')
        return f'{UNET}{_UNET_ENDS[module]}.{array}'
    way, kind, rest = within[1], within[3], within[5]
    level, number = int(within[2] or 0), int(within[4])
    first = level * (layers + 1)
    if kind == 'resnets':
        module, _, array = rest.rpartition('.')
        rest = f'{_RESNET[module]}.{array}'
    if way == 'mid':  # resnet, attention, resnet
        return f'{UNET}middle_block.{1 if kind == "attentions" else 2 * number}.{rest}'
    if kind == 'downsamplers':
        return f'{UNET}input_blocks.{first + layers + 1}.0.{rest.replace("conv", "op")}'
    if kind == 'upsamplers':  # in the level's last block
        return f'{UNET}output_blocks.{first + layers}.{1 + attends[::-1][level]}.{rest}'
    blocks = (
        f'input_blocks.{1 + first + number}' if way == 'down' else f'output_blocks.{first + number}'
    )
    return f'{UNET}{blocks}.{int(kind == "attentions")}.{rest}'


def vae(name: str, *, levels: int) -> str:
    """'encoder.mid_block.attentions.0.to_q.bias' -> 'first_stage_model.encoder.mid.attn_1.q.bias'.

    Args:
        levels: of sizes. LDM counts them from the largest image, on both ways.
    """
    name = re.sub(r'mid_block\.resnets\.(\d)', lambda m: f'mid.block_{int(m[1]) + 1}', name)
    name = name.replace('mid_block.attentions.0', 'mid.attn_1')
    name = re.sub(r'up_blocks\.(\d+)', lambda m: f'up.{levels - 1 - int(m[1])}', name)
    name = name.replace('down_blocks', 'down').replace('resnets', 'block')
    words = '|'.join(map(re.escape, _VAE))
    return VAE + re.sub(rf'(?<=\.)({words})(?=\.)', lambda m: _VAE[m[1]], name)


def text_encoder(name: str) -> str:
    """The text encoder has the names of transformers."""
    return TEXT + name


NAMES = {  # component -> (name, module) -> name in the file
    'text_encoder': lambda name, module: text_encoder(name),
    'unet': lambda name, module: unet(name, layers=module.layers, attends=module.attends),
    'vae': lambda name, module: vae(name, levels=len(module.channels)),
}


def check(names: Iterable[str]) -> None:
    """Raises a UserError if the names are those of another model, or of no such file at all."""
    names = tuple(names)
    advice = (
        'Supported as one file is Stable Diffusion 1.x; 2.x as a folder, which diffusers makes: '
        'StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER).'
    )
    for beginning, whose in OTHERS.items():
        if any(name.startswith(beginning) for name in names):
            raise UserError(f'this is {whose} (it has {beginning}*). {advice}')
    if not any(name.startswith((UNET, VAE, TEXT)) for name in names):
        raise UserError(
            f'none of its {len(names)} arrays is named {UNET}*, {VAE}* or {TEXT}*, as in the '
            f'original files. {advice} If it belongs to a folder of diffusers, give the folder.'
        )
