"""The 32x32 U-Net of configs/metric_mixup.py: its training step and DDIM, beside diffusers'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import diffusion, parallel
from jaxood.bench import measure
from jaxood.diffusion import samplers
from jaxood.models.denoisers import UNet
from jaxood.models.initial import compile_init
from jaxood.stages import train_diffusion
from jaxood.synthesis import generator, pure
from jaxood.train import loop, state

SIZES = {
    'small': dict(channels=32, multipliers=(1, 2, 2), num_blocks=1, attention_sizes=(16,)),
    'full': dict(channels=128, multipliers=(1, 2, 2, 2), num_blocks=2, attention_sizes=(16,)),
}
BATCH = {'small': 16, 'full': 128}
CLASSES, SHAPE, T, DROPOUT = 10, (32, 32, 3), 1000, 0.1


def rows(flags):
    size, devices = SIZES[flags.size], parallel.setup()
    batch = devices.batch_size(flags.batch or BATCH[flags.size])
    model = UNet(num_classes=CLASSES, dropout=DROPOUT, dtype=jnp.dtype(flags.dtype), **size)
    x, t = jnp.zeros((1, *SHAPE)), jnp.ones(1, jnp.int32)
    one_hot = jnp.zeros((1, CLASSES + 1))
    params = compile_init(model.init)(jax.random.key(0), x, t, one_hot)['params']
    params = jax.device_get(params)  # a training step takes the memory of what it updates
    network = jax.jit(lambda params, *inputs: model.apply({'params': params}, *inputs))
    inputs = (
        jnp.zeros((batch, *SHAPE)),
        jnp.ones(batch, jnp.int32),
        jnp.zeros((batch, CLASSES + 1)),
    )
    once = measure.flops(network, params, *inputs)
    theirs = _diffusers(flags, size, batch) if measure.has('torch', 'diffusers') else (None, None)
    peer = 'diffusers UNet2DModel'
    update, work = _training(devices, model, params, batch)
    yield measure.speed(
        *(f'training, {flags.size}, batch {batch}', batch, update, theirs[0], flags.rounds),
        peer=peer,
        flops=work,
        dtype=flags.dtype,
    )
    yield measure.speed(
        f'DDIM of {flags.steps} steps, {flags.size}, batch {batch}',
        *(batch, _sampling(devices, model, params, batch, flags.steps), theirs[1], flags.rounds),
        peer=peer,
        flops=flags.steps * once,
        dtype=flags.dtype,
    )


def _schedule():
    return np.asarray(diffusion.SCHEDULES['cosine'](T), np.float32)


def _training(devices, model, params, batch):
    """(() -> one update of parameters, optimiser and average; its floating-point operations)."""
    rng, tx = np.random.default_rng(0), state.adam(steps=1000)
    loss = functools.partial(
        train_diffusion.loss_fn,
        model=model,
        alpha_bar=_schedule(),
        prediction=diffusion.PREDICTIONS['eps'],
        label_dropout=0.1,
        flip=True,
    )
    step = devices.compile_step(
        functools.partial(loop.train_step, loss_fn=loss, tx=tx, ema_limit=0.9999)
    )
    now = [devices.replicate(state.create(params, tx, {}, ema=True))]
    host = {
        'image': rng.integers(0, 256, (batch, *SHAPE), np.uint8),
        'label': rng.integers(0, CLASSES, batch).astype(np.int32),
        'index': np.arange(batch, dtype=np.int32),
    }
    key = jax.random.key(1)

    def update():
        now[0], metrics = step(now[0], None, devices.shard(host), key)
        jax.block_until_ready(metrics)

    return update, measure.flops(step, now[0], None, devices.shard(host), key)


def _sampling(devices, model, params, batch, steps):
    """() -> a batch of images, without guidance."""
    generate = generator.generator(
        model,
        alpha_bar=_schedule(),
        timesteps=samplers.strided(T, steps),
        prediction=diffusion.PREDICTIONS['eps'],
        sampler=diffusion.SAMPLERS['ddim'],
        guided=False,
    )
    make = pure.build(SHAPE, CLASSES, generate)
    compiled = devices.compile_rows(lambda shared, index: make(shared, index, shared['key']))
    shared = devices.replicate({'params': params, 'key': jax.random.key(2)})
    index = devices.shard(np.arange(batch, dtype=np.int32))
    return measure.call(compiled, shared, index)


def _diffusers(flags, size, batch):
    """The same two in PyTorch: (an update, a batch of images)."""
    import torch
    from diffusers import UNet2DModel

    device, compiled, wait = measure.torch_device(flags)
    widths = [size['channels'] * m for m in size['multipliers']]
    attends = [SHAPE[0] >> level in size['attention_sizes'] for level in range(len(widths))]
    network = UNet2DModel(
        sample_size=SHAPE[0],
        layers_per_block=size['num_blocks'],
        block_out_channels=widths,
        down_block_types=['AttnDownBlock2D' if a else 'DownBlock2D' for a in attends],
        up_block_types=['AttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attends)],
        attention_head_dim=widths[-1],  # one head
        norm_num_groups=min(32, size['channels'] // 4),
        norm_eps=1e-6,
        dropout=DROPOUT,
        num_class_embeds=CLASSES + 1,
    ).to(device, memory_format=torch.channels_last)
    average = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)
    run = compiled(network)
    alpha_bar = torch.tensor(_schedule()[1:], device=device)
    images = torch.randint(0, 256, (batch, SHAPE[2], *SHAPE[:2]), device=device).byte()
    labels = torch.randint(0, CLASSES, (batch,), device=device)

    def update():
        network.train()
        x_0 = images.float() / 127.5 - 1.0
        x_0 = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x_0.flip(-1), x_0)
        condition = torch.where(torch.rand(batch, device=device) < 0.1, CLASSES, labels)
        t, eps = torch.randint(0, T, (batch,), device=device), torch.randn_like(x_0)
        a = alpha_bar[t, None, None, None]
        x_t = (a.sqrt() * x_0 + (1.0 - a).sqrt() * eps).to(memory_format=torch.channels_last)
        with measure.torch_dtype(flags):
            got = run(x_t, t, class_labels=condition).sample
        loss = (got.float() - eps).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 1e-4)
        wait()

    def sample():
        network.eval()
        x = torch.randn(batch, SHAPE[2], *SHAPE[:2], device=device)
        times = torch.linspace(T - 1, 0, flags.steps + 1).long().tolist()
        with torch.inference_mode(), measure.torch_dtype(flags):
            for t, s in zip(times, times[1:]):
                x = x.to(memory_format=torch.channels_last)
                eps = run(x, torch.tensor(t, device=device), class_labels=labels).sample.float()
                a, b = alpha_bar[t], alpha_bar[s]
                x_0 = ((x - (1.0 - a).sqrt() * eps) / a.sqrt()).clamp(-1.0, 1.0)
                x = b.sqrt() * x_0 + (1.0 - b).sqrt() * eps
        wait()

    return update, sample
