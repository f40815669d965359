"""DLSR's scores: features restored from a depth by the LFDN, and what is left compared."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import diffusion, parallel
from jaxood.bench import measure
from jaxood.models.denoisers import LFDN
from jaxood.models.initial import compile_init
from jaxood.stages.parts import restorers

SIZES = {  # channels of the blocks that are restored, h, residual blocks
    'small': ((16, 32, 64), 128, 4),
    'full': ((24, 32, 56, 112, 160, 272, 64), 1440, 16),  # 720 channels of EfficientNet-B4
}
T, DEPTH, IMAGES = 100, 3, 4096


def rows(flags):
    widths, width, blocks = SIZES[flags.size]
    edges, channels, devices = np.cumsum([0, *widths]), sum(widths), parallel.setup()
    model = LFDN(width=width, num_blocks=blocks, dtype=jnp.dtype(flags.dtype))
    batch = flags.batch or restorers.ROWS
    count = max(IMAGES // batch, 1) * batch
    z = np.random.default_rng(0).normal(size=(count, channels)).astype(np.float32)
    outputs = {'taps': z, 'mark': np.arange(count, dtype=np.uint32)}
    init = compile_init(model.init)
    params = init(jax.random.key(0), jnp.zeros((1, channels)), jnp.ones(1, jnp.int32))['params']
    restorer = restorers.Restorer(
        model=model,
        snapshots=[jax.device_get(params)],
        alpha_bar=np.asarray(diffusion.SCHEDULES['linear'](T), np.float32),
        columns=tuple(range(channels)),
        edges=tuple(edges.tolist()),
        eta=1.0,
        stride=1,
        seed=0,
        devices=devices,
        key='',
    )
    network = jax.jit(lambda params, z, t: model.apply({'params': params}, z, t))
    once = measure.flops(network, params, jnp.zeros((count, channels)), jnp.ones(count, jnp.int32))
    yield measure.speed(
        f'scoring at depth {DEPTH}, {flags.size}, {channels} channels',
        count,
        lambda: restorer.restore(outputs, [DEPTH], batch),
        _torch(flags, params, z, batch, restorer) if measure.has('torch') else None,
        flags.rounds,
        peer='PyTorch, restated',
        flops=DEPTH * once,
        dtype=flags.dtype,
    )


def _torch(flags, params, z, batch, restorer):
    """() -> errors of the same network, with the same weights, in PyTorch."""
    import torch
    from torch.nn import functional as F

    device, compiled, wait = measure.torch_device(flags)
    tensor = lambda x: torch.tensor(np.asarray(x), device=device)
    p = jax.tree.map(tensor, params)
    a, width = tensor(restorer.alpha_bar), restorer.model.width
    dense = lambda layer, x: F.linear(x, layer['kernel'].T, layer['bias'])
    norm = lambda layer, x: F.layer_norm(x, x.shape[-1:], layer['scale'], layer['bias'], 1e-5)
    rates = torch.exp(-np.log(1e4) * torch.arange(width // 2, device=device) / (width // 2))

    def network(z, t):
        angle = (t - 1) * rates[None]
        tau = torch.cat([angle.cos(), angle.sin()], dim=-1)
        tau = F.silu(dense(p['time_2'], F.silu(dense(p['time_1'], tau))))
        h = dense(p['linear_in'], F.silu(z))
        for i in range(restorer.model.num_blocks):
            block = p[f'block_{i}']
            x = dense(block['linear_1'], F.silu(norm(block['norm_1'], h)))
            x = x + dense(block['embedding'], tau)
            h = h + dense(block['linear_2'], F.silu(norm(block['norm_2'], x)))
        return dense(p['linear_out'], F.silu(norm(p['norm_out'], h)))

    run = compiled(network)

    def theirs():
        found = []
        with torch.inference_mode(), measure.torch_dtype(flags):
            for z_0 in tensor(z).split(batch):
                x = a[DEPTH].sqrt() * z_0 + (1.0 - a[DEPTH]).sqrt() * torch.randn_like(z_0)
                for t in range(DEPTH, 0, -1):
                    x_0 = run(x, t).float()
                    eps = (x - a[t].sqrt() * x_0) / (1.0 - a[t]).sqrt()
                    sigma = ((1 - a[t - 1]) / (1 - a[t]) * (1 - a[t] / a[t - 1])).sqrt()
                    rest = (1.0 - a[t - 1] - sigma**2).clamp(min=0.0).sqrt()
                    x = a[t - 1].sqrt() * x_0 + rest * eps + sigma * torch.randn_like(x)
                found.append((x - z_0).square().mean(dim=1))
        wait()
        return found

    return theirs
