"""See a collapse while training: what held-out embeddings look like after each epoch.

    python examples/training_loop.py

Two noisy views of each point are pulled together. With nothing else the loss falls to nothing, and with it the
variance: a complete collapse, to which the rank is blind. Asking each dimension to vary makes copies of few directions:
a dimensional collapse, to which the variance is blind. Forbidding copies as well (VICReg) prevents both. No loss says
which it was.
"""

import torch
from torch import Tensor, nn

from fullrank import Moments, measures

WIDTH = 32


def loss_of(a: Tensor, b: Tensor, spread: float, decorrelate: float) -> Tensor:
    """Invariance, unit variances and no covariances, weighted (VICReg: Bardes et al. 2022, section 4)."""
    loss = 25 * (a - b).square().mean()
    for z in (a, b):
        covariance = z.T.cov()
        loss = loss + spread * torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        loss = loss + decorrelate * (covariance - covariance.diag().diag()).square().sum() / WIDTH
    return loss


for name, spread, decorrelate in (("pull", 0.0, 0.0), ("spread", 25.0, 0.0), ("vicreg", 25.0, 1.0)):
    torch.manual_seed(0)
    images, held_out = torch.randn(2048, 64), torch.randn(1024, 64)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, WIDTH))
    optimizer = torch.optim.Adam(encoder.parameters(), 2e-3)
    for epoch in range(6):
        for batch in images.split(128):
            a, b = (encoder(batch + 0.3 * torch.randn_like(batch)) for _ in range(2))
            loss = loss_of(a, b, spread, decorrelate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moments = Moments(WIDTH)
        with torch.no_grad():
            for batch in held_out.split(256):
                moments.add(encoder(batch))
            cosine = measures.mean_cosine(encoder(held_out))
        print(
            f"{name} epoch {epoch + 1}: loss {loss.item():.3f}, effective rank {moments.effective_rank():.1f} of "
            f"{WIDTH}, variance {float(moments.covariance().trace()):.3g}, mean cosine {cosine:.2f}"
        )
