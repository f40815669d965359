"""Distances to the k-th nearest of a bank, beside PyTorch's matrix product and top-k."""

import numpy as np

from jaxood import parallel
from jaxood.bench import measure
from jaxood.scores import SCORES
from jaxood.stages.parts import networks

K, ROWS, BLOCK = 50, 256, 1024


def rows(flags):
    rng = np.random.default_rng(0)
    draw = lambda count: rng.normal(size=(count, flags.dim)).astype(np.float32)
    bank, queries, k = draw(flags.bank), draw(flags.queries), min(K, flags.bank)
    entry = SCORES['knn']
    params = entry.fit({'features': bank, 'labels': np.zeros(len(bank), np.int32)}, {}, k=k)
    head = {'kernel': np.zeros((flags.dim, 2), np.float32), 'bias': np.zeros(2, np.float32)}
    network = networks.Network(None, {'params': {'head': head}}, {}, '', parallel.setup(), ROWS)
    outputs = {'features': queries, 'logits': np.zeros((len(queries), 2), np.float32)}

    def ours():
        return np.concatenate(list(network.outside(entry.score, params, outputs)))

    yield measure.speed(
        f'k={k}, {flags.bank:,} x {flags.dim}',
        len(queries),
        ours,
        _torch(flags, bank, queries, k, ours()) if measure.has('torch') else None,
        flags.rounds,
        peer='PyTorch: matmul, topk',
        flops=2.0 * flags.bank * flags.dim * len(queries),
    )


def _torch(flags, bank, queries, k, wanted):
    """() -> the same distances; checks once that they are."""
    import torch

    device, _, wait = measure.torch_device(flags)
    unit = lambda x: torch.nn.functional.normalize(torch.from_numpy(x).to(device))
    table = unit(bank)

    def theirs():
        found = []
        with torch.inference_mode():
            for block in unit(queries).split(BLOCK):
                cosine = (block @ table.T).topk(k, dim=1).values[:, -1]
                found.append((2.0 - 2.0 * cosine).clamp(min=0.0).sqrt())
        wait()
        return torch.cat(found).cpu().numpy()

    np.testing.assert_allclose(theirs(), wanted, atol=1e-3)
    return theirs
