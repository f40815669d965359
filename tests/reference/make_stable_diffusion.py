"""Writes stable_diffusion.npz: what diffusers and transformers compute with tiny pipelines.

    python tests/reference/make_stable_diffusion.py [--real-merges=bpe_simple_vocab_16e6.txt.gz]

needs torch, diffusers and transformers. Weights are not stored: `arrays` makes each from its name
and shape; names and shapes are written down as the two libraries have them. `folder` writes a whole
pipeline folder from these, without any of the three libraries: the tests' Stable Diffusion.
"""

import gzip
import json
import math
import pathlib
import sys
import tempfile
import zlib

import numpy as np

FILE = pathlib.Path(__file__).with_name('stable_diffusion.npz')
START, END = '<|startoftext|>', '<|endoftext|>'
STEPS, GUIDANCE_SCALE = 20, 4.0
SAMPLERS = {'ddim': 'DDIMScheduler', 'dpmpp_2m': 'DPMSolverMultistepScheduler'}
SAMPLERS['pndm'] = 'PNDMScheduler'
PROMPTS = ('a photo of a three', '')
TEXTS = (
    *('a photo of a cat', '', '   ', "It's  THE\tend,\n isn't it? 12345", 'ça va? naïve café'),
    *(
        '日本語のテキスト',
        '👩‍👩‍👧 🏳️‍🌈 ok',
        'x' * 300,
        'a photo of a three ' * 40,
        'e\u0301 \u00a0 \u200d',
    ),
    *('<|endoftext|> inside', 'ſtraße ǅ İstanbul', 'a_b-c.d/e\\f "q" #1 @x', '\u0000\u0007'),
)

TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
UNET = dict(
    sample_size=8,
    block_out_channels=(16, 24),
    down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    norm_num_groups=8,
    cross_attention_dim=16,
    layers_per_block=1,
    attention_head_dim=4,
)
VAE = dict(
    block_out_channels=(8, 16),
    down_block_types=('DownEncoderBlock2D',) * 2,
    up_block_types=('UpDecoderBlock2D',) * 2,
    norm_num_groups=4,
    layers_per_block=1,
)
SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule='scaled_linear',
    num_train_timesteps=1000,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
)
PIPELINES = {
    'sd1': dict(text=TEXT, unet=UNET, vae=VAE, scheduler=SCHEDULER, pad=END),
    'sd2': dict(
        text=TEXT | dict(hidden_act='gelu', projection_dim=12),
        unet=UNET
        | dict(
            attention_head_dim=(2, 3), use_linear_projection=True, transformer_layers_per_block=2
        ),
        vae=VAE,
        scheduler=SCHEDULER | dict(prediction_type='v_prediction'),
        pad='!',
    ),
    'deep': dict(
        text=TEXT | dict(num_hidden_layers=1, num_attention_heads=4, layer_norm_eps=1e-3),
        unet=UNET
        | dict(
            block_out_channels=(8, 16, 16),
            down_block_types=('DownBlock2D', *['CrossAttnDownBlock2D'] * 2),
            up_block_types=(*['CrossAttnUpBlock2D'] * 2, 'UpBlock2D'),
            layers_per_block=2,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-3,
        ),
        vae=VAE
        | dict(
            block_out_channels=(4, 8, 8),
            down_block_types=('DownEncoderBlock2D',) * 3,
            up_block_types=('UpDecoderBlock2D',) * 3,
            layers_per_block=2,
            scaling_factor=0.3,
        ),
        scheduler=SCHEDULER,
        pad=END,
    ),
}
CLIP = dict(
    text_config=TEXT | dict(projection_dim=12),
    vision_config=dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
        projection_dim=12,
    ),
    projection_dim=12,
)


def vocabulary():
    """A tiny CLIP vocabulary: bytes, bytes that end a word, a few merges, the two special tokens.

    -> (token -> id, merges). The byte's characters are GPT-2's.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(len(rest))]
    merges = []
    for word in ('photo', 'three', 'of', 'cat', 'the'):
        parts = [*word[:-1], f'{word[-1]}</w>']
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    merges = list(dict.fromkeys(merges))
    tokens = [*letters, *(f'{c}</w>' for c in letters), *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def real_vocabulary(path):
    """CLIP's own, from its merges, as OpenAI's code builds it."""
    lines = gzip.decompress(pathlib.Path(path).read_bytes()).decode().split('\n')
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(vocabulary()[0])[:256]
    tokens = [*letters, *(f'{c}</w>' for c in letters), *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def arrays(shapes, prefix=''):
    """Random arrays, each by its name (RandomState's stream is frozen), of order 1 in effect."""
    found = {}
    for name, shape in shapes.items():
        seed = zlib.crc32((prefix + name).encode())
        draw = np.random.RandomState(seed).uniform(-1, 1, shape)
        if len(shape) == 1 and name.endswith('.weight'):  # of a normalisation
            draw = 1 + draw / 2
        elif len(shape) > 1 and 'token_embedding' not in name:
            draw *= math.sqrt(3 * shape[0] / draw.size)
        found[name] = draw.astype(np.float32)
    return found


def shapes(pipeline):
    """component -> name -> shape, as the libraries wrote them; 'clip' has one component."""
    return json.loads(str(np.load(FILE)['shapes']))[pipeline]


def config(pipeline, component):
    """The component's `config.json`, as diffusers or transformers write it."""
    return json.loads(str(np.load(FILE)['configs']))[pipeline][component]


def folder(place, pipeline='sd1', dtype=np.float32):
    """Writes a pipeline folder (or, for 'clip', transformers' folder of a CLIP) -> the folder."""
    place = pathlib.Path(place)
    if pipeline == 'clip':
        _component(place, 'clip', 'clip', 'model', dtype)
        _tokenizer(place, END)
        return place
    for component, file in WEIGHTS.items():
        _component(place / component, pipeline, component, file, dtype)
    for component, name in (('scheduler', 'scheduler_config'), ('.', 'model_index')):
        (place / component).mkdir(exist_ok=True)
        text = json.dumps(config(pipeline, component), indent=2)
        (place / component / f'{name}.json').write_text(text)
    _tokenizer(place / 'tokenizer', PIPELINES[pipeline]['pad'])
    return place


WEIGHTS = {
    'text_encoder': 'model',
    'unet': 'diffusion_pytorch_model',
    'vae': 'diffusion_pytorch_model',
}


def _component(place, pipeline, component, file, dtype):
    from safetensors.numpy import save_file

    place.mkdir(parents=True, exist_ok=True)
    (place / 'config.json').write_text(json.dumps(config(pipeline, component), indent=2))
    made = arrays(shapes(pipeline)[component], pipeline)
    made = {name: array.astype(dtype) for name, array in made.items()}
    save_file(made, place / f'{file}.safetensors', metadata={'format': 'pt'})


def _tokenizer(place, pad):
    place.mkdir(parents=True, exist_ok=True)
    tokens, merges = vocabulary()
    (place / 'vocab.json').write_text(json.dumps(tokens, ensure_ascii=False))
    lines = ['#version: 0.2', *(' '.join(pair) for pair in merges), '']
    (place / 'merges.txt').write_text('\n'.join(lines))
    facts = dict(tokenizer_class='CLIPTokenizer', model_max_length=77, pad_token=pad)
    facts |= dict(bos_token=START, eos_token=END, unk_token=END)
    (place / 'tokenizer_config.json').write_text(json.dumps(facts, indent=2))


def latents(pipeline, size=6):
    """Noise to start from, float32[2, size, size + 1, 4]: odd sizes are harder."""
    seed = zlib.crc32(pipeline.encode())
    return np.random.RandomState(seed).standard_normal((2, size, size + 1, 4)).astype(np.float32)


def images(size, seed=0):
    """float32[2, size, size, 3] in [-1, 1]."""
    return np.random.RandomState(seed).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def nhwc(x):
    return x.permute(0, 2, 3, 1).numpy()


def nchw(x):
    import torch

    return torch.from_numpy(x).permute(0, 3, 1, 2)


def fill(module, prefix):
    """Random arrays into a PyTorch module; -> name -> shape."""
    import torch

    own = {name: tuple(p.shape) for name, p in module.named_parameters()}
    made = {k: torch.from_numpy(v) for k, v in arrays(own, prefix).items()}
    module.load_state_dict(made, strict=False)
    module.eval().requires_grad_(False)
    return own


def modules(pipeline):
    """The PyTorch modules of a pipeline, filled; their configs, names and shapes."""
    import diffusers
    import transformers

    p, count = PIPELINES[pipeline], len(vocabulary()[0])
    ends = dict(vocab_size=count, bos_token_id=count - 2, eos_token_id=count - 1, pad_token_id=1)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**p['text'], **ends))
    found = {
        'text_encoder': text,
        'unet': diffusers.UNet2DConditionModel(**p['unet']),
        'vae': diffusers.AutoencoderKL(**p['vae']),
    }
    return found, {name: fill(module, pipeline) for name, module in found.items()}


def tokenizer(words, pad):
    import transformers

    tokens, merges = words
    options = dict(pad_token=pad, model_max_length=77)
    return transformers.CLIPTokenizer(vocab=tokens, merges=merges, **options)


def ids(tokenizer, texts):
    options = dict(padding='max_length', max_length=77, truncation=True)
    return np.array(tokenizer(list(texts), **options)['input_ids'], np.int32)


def pipeline_outputs(name):
    """-> (outputs, shapes, configs) of one of `PIPELINES`."""
    import diffusers
    import torch

    p = PIPELINES[name]
    found, names = modules(name)
    text, unet, vae = found.values()
    words = tokenizer(vocabulary(), p['pad'])
    prompt_ids = ids(words, PROMPTS)
    start = latents(name)
    out = {'ids': ids(words, TEXTS)}
    hidden = text(torch.from_numpy(prompt_ids).long())
    out['hidden'] = hidden.last_hidden_state.numpy()
    out['pooled'] = hidden.pooler_output.numpy()
    times = torch.tensor([981, 20])
    out['unet'] = nhwc(unet(nchw(start), times, hidden.last_hidden_state).sample)
    size = 2 ** len(p['vae']['block_out_channels']) * 3
    moments = vae.encode(nchw(images(size))).latent_dist
    out['mean'], out['log_variance'] = nhwc(moments.mean), nhwc(moments.logvar)
    out['decoded'] = nhwc(vae.decode(nchw(start)).sample)
    scheduler = diffusers.PNDMScheduler(**p['scheduler'])
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for sampler, kind in SAMPLERS.items():
        pipe.scheduler = getattr(diffusers, kind).from_config(scheduler.config, clip_sample=False)
        out[sampler] = sample(pipe, start)
    pipe.scheduler = scheduler
    with tempfile.TemporaryDirectory() as place:
        pipe.save_pretrained(place)
        files = {'.': 'model_index', 'scheduler': 'scheduler/scheduler_config'}
        files |= {name: f'{name}/config' for name in found}
        read = lambda file: json.loads(pathlib.Path(place, f'{file}.json').read_text())
        configs = {name: read(file) for name, file in files.items()}
    return out, names, configs


def sample(pipe, start):
    """One whole sampling, to the decoded images [2, H, W, 3], about in [-1, 1], not clipped."""
    import torch

    noise = nchw(start)
    pipe.check_inputs = lambda *a, **k: None  # it asks for multiples of 8
    with torch.no_grad():
        found = pipe(
            list(PROMPTS),
            latents=noise,
            output_type='latent',
            height=noise.shape[2] * pipe.vae_scale_factor,
            width=noise.shape[3] * pipe.vae_scale_factor,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
        ).images
        return nhwc(pipe.vae.decode(found / pipe.vae.config.scaling_factor).sample)


def clip_outputs():
    """-> (outputs, shapes, configs) of the tiny CLIP."""
    import torch
    import transformers

    count = len(vocabulary()[0])
    ends = dict(vocab_size=count, bos_token_id=count - 2, eos_token_id=count - 1, pad_token_id=1)
    settings = transformers.CLIPConfig(**CLIP | {'text_config': CLIP['text_config'] | ends})
    model = transformers.CLIPModel(settings)
    names = fill(model, 'clip')
    prompt_ids = ids(tokenizer(vocabulary(), END), PROMPTS)
    text = model.text_model(torch.from_numpy(prompt_ids).long())
    vision = model.vision_model(nchw(images(12)))
    out = {
        'projected_text': model.text_projection(text.pooler_output).numpy(),
        'projected_image': model.visual_projection(vision.pooler_output).numpy(),
        'pooled_image': vision.pooler_output.numpy(),
    }
    return out, {'clip': names}, {'clip': json.loads(settings.to_json_string())}


def main(real=None):
    stored, names, configs = {}, {}, {}
    for name in (*PIPELINES, 'clip'):
        made = clip_outputs() if name == 'clip' else pipeline_outputs(name)
        stored |= {f'{name}/{k}': v for k, v in made[0].items()}
        names[name], configs[name] = made[1:]
    if real:
        stored['real_ids'] = ids(tokenizer(real_vocabulary(real), END), TEXTS)
    elif FILE.exists():
        stored['real_ids'] = np.load(FILE)['real_ids']
    stored['shapes'], stored['configs'] = json.dumps(names), json.dumps(configs)
    np.savez_compressed(FILE, **stored)
    for key, value in stored.items():
        if isinstance(value, np.ndarray):
            print(key, value.shape, value.dtype, np.abs(value).max())


if __name__ == '__main__':
    main(next((a.split('=')[1] for a in sys.argv if a.startswith('--real-merges=')), None))
