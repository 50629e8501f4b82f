"""Watch the embeddings of any PyTorch code: three lines beside it.

    python examples/beside_pytorch.py

A random network embeds random images; the second time a bug copies one dimension over 48 of the 64. Each row still
looks like an embedding; all rows together do not.
"""

import torch
from torch import nn

from fullrank import SpectrumMonitor

torch.manual_seed(0)
encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 64)).eval()

for bug in (False, True):
    monitor = SpectrumMonitor(dimension=64)  # one
    for _ in range(64):
        images = torch.randn(32, 3, 16, 16)
        with torch.no_grad():
            embeddings = encoder(images)
        if bug:
            embeddings[:, :48] = embeddings[:, :1]
        monitor.observe(embeddings)  # two: a tensor on any device, or a numpy array; copies and returns
    monitor.close()  # takes in what waits; a server never needs to
    window = monitor.snapshot().windows[300.0]  # three
    ratio = window.participation_ratio
    print(
        f"{'broken' if bug else 'healthy'}: {window.rows} rows, effective rank {window.effective_rank:.1f} of 64, "
        f"participation ratio {ratio.estimate:.1f} ({ratio.lower:.1f} to {ratio.upper:.1f})"
    )
