"""A simulated encoder for tests of verdicts: a class mixture mapped into d dimensions, and a monitor that sees it."""

import torch

from fullrank import SpectrumMonitor

D, CLASSES = 64, 10


class World:
    """Rows of a healthy encoder: ten classes along the leading directions, detail along all."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
        self.centres = torch.zeros(CLASSES, D)
        self.centres[:, :9] = 1.5 * torch.randn(CLASSES, 9, generator=generator)
        self.scale = torch.arange(1, D + 1).float() ** -0.5

    def rows(self, n, seed, classes=range(CLASSES)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.tensor(list(classes))[torch.randint(len(classes), (n,), generator=generator)]
        return (self.centres[labels] + torch.randn(n, D, generator=generator) * self.scale + 0.5) @ self.basis


def verdict(reference, rows, canary=None):
    with SpectrumMonitor(D, reference, clock=lambda: 0.0) as monitor:
        monitor.observe(rows)
        if canary is not None:
            monitor.record_canary(canary)
        assert monitor.flush(20)
        return monitor.snapshot().verdict


def project(rows, k, seed=None, basis=None):
    if basis is None:
        basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed))).Q
    frame = basis[:, :k].float()
    return rows @ frame @ frame.T


def watched(reference, parts, seconds=0.0):
    """The snapshots after each part, (rows, inputs, seconds that they take), of one monitor."""
    now = [0.0]
    snapshots = []
    with SpectrumMonitor(D, reference, clock=lambda: now[0]) as monitor:
        for rows, inputs, length in parts:
            for i, part in enumerate(rows.split(64)):
                now[0] += length * len(part) / len(rows)
                monitor.observe(part, inputs=None if inputs is None else inputs[64 * i : 64 * i + 64])
            assert monitor.flush(120)
            snapshots.append(monitor.snapshot())
    return snapshots


def inputs_of(rows):
    """Descriptors that the encoder would map to the rows."""
    return rows[:, :12] * 2 + 1
