"""kNN against a naive loop, spectra against NumPy, and parity of evaluation with the bytes that a client sends."""

import io
import json
import math

import numpy as np
import pytest
import torch

from models.artifact import Artifact, EncoderCard
from models.embedder import Embedder
from models.preprocess import Preprocessing, decode, to_image
from tests.support.training import TINY
from training.data import SAMPLE, read_fashion_mnist
from training.evaluate import Spectrum, evaluate_pixels, knn_accuracy, probe_table, quality


def naive_knn(bank, bank_labels, queries, labels, k, temperature):  # type: ignore[no-untyped-def]
    correct = 0
    for query, truth in zip(queries.tolist(), labels.tolist(), strict=True):
        similar = []
        for row, label in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, row, strict=True))
            similar.append((dot / math.hypot(*query) / math.hypot(*row), label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(similar, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        correct += max(votes, key=lambda label: votes[label]) == truth
    return correct / len(queries)


def test_weighted_knn_is_the_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 4, generator=generator) for n in (60, 40))
    bank_labels, labels = (torch.randint(0, 3, (n,), generator=generator) for n in (60, 40))
    expected = naive_knn(bank, bank_labels, queries, labels, 7, 0.3)
    assert 0.2 < expected < 0.8
    assert knn_accuracy(bank, bank_labels, queries, labels, 7, 0.3) == pytest.approx(expected)


def test_rows_without_a_label_neither_vote_nor_count() -> None:
    generator = torch.Generator().manual_seed(1)
    bank, queries = torch.randn(80, 6, generator=generator), torch.randn(30, 6, generator=generator)
    known, true = torch.arange(80) % 4, torch.arange(30) % 4
    some, asked = torch.arange(80) % 3 > 0, torch.arange(30) % 5 > 0
    expected = quality(bank[some], known[some], queries[asked], true[asked])
    found = quality(bank, known.where(some, -1), queries, true.where(asked, -1))
    for key in ("knn", "knn_bank", "knn_queries"):
        assert found[key] == expected[key]
    assert probe_table(bank, known.where(some, -1), queries, true.where(asked, -1)) == probe_table(
        bank[some], known[some], queries[asked], true[asked]
    )


def test_knn_refuses_a_bank_smaller_than_k() -> None:
    with pytest.raises(ValueError, match="3 rows"):
        knn_accuracy(torch.ones(3, 2), torch.zeros(3).long(), torch.ones(1, 2), torch.zeros(1).long(), k=20)


def test_spectrum_is_that_of_the_normalised_centred_rows() -> None:
    rows = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 12) + 3
    spectrum = Spectrum.of(rows)
    unit = (rows / rows.norm(dim=1, keepdim=True)).double().numpy()
    eigenvalues = np.linalg.eigvalsh(np.cov(unit.T))[::-1].clip(0)
    p = eigenvalues / eigenvalues.sum()
    np.testing.assert_allclose(spectrum.eigenvalues.numpy(), eigenvalues, rtol=1e-3, atol=1e-9)
    assert spectrum.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert spectrum.total_variance == pytest.approx(eigenvalues.sum(), rel=1e-4)


def test_evaluation_and_serving_embed_a_file_alike() -> None:
    """An image as an array and the same image as PNG bytes give the same embedding, at the encoder's size or not."""
    images = read_fashion_mnist(SAMPLE, "test").images[:4]
    for size in (28, 20):
        torch.manual_seed(0)
        preprocessing = Preprocessing(size=size, resize="stretch", channels=1, mean=(0.286,), std=(0.353,))
        card = EncoderCard(name="x", architecture=TINY, preprocessing=preprocessing, dimension=32)
        embedder = Embedder(Artifact(card, TINY.build()))
        pixels = []
        for image in images:
            file = io.BytesIO()
            to_image(image).save(file, "PNG")
            pixels.append(decode(file.getvalue(), preprocessing))
        torch.testing.assert_close(embedder.embed(np.stack(pixels)), embedder.embed_arrays(images), rtol=0, atol=0)


def test_raw_pixels_already_tell_garments_apart() -> None:
    quality = evaluate_pixels(read_fashion_mnist(SAMPLE, "train"), read_fashion_mnist(SAMPLE, "test"))
    assert 0.7 < quality["knn"] < 0.85
    assert quality["dimension"] == 784


def test_probes_on_few_labels_are_left_out_where_too_few_rows_remain() -> None:
    """Ten of 1,000 are too few for a probe, a hundred are not."""
    quality = evaluate_pixels(read_fashion_mnist(SAMPLE, "train"), read_fashion_mnist(SAMPLE, "test"), probes=True)
    assert 0.7 < quality["linear_ten_percent_top1"] + 0.05 < quality["linear_top1"] + 0.1 < 0.95
    assert quality["linear_top5"] > quality["linear_top1"]
    assert "linear_one_percent_top1" not in quality


def test_the_curve_is_the_spectrum_at_log_spaced_ranks() -> None:
    spectrum = Spectrum.of(torch.randn(500, 40, generator=torch.Generator().manual_seed(0)))
    curve = spectrum.curve()
    assert (curve["ranks"][0], curve["ranks"][-1]) == (1, 40)
    for rank, value in zip(curve["ranks"], curve["eigenvalues"], strict=True):
        assert value == pytest.approx(float(spectrum.eigenvalues[int(rank) - 1]), rel=1e-3)
    assert spectrum.std_ratio == pytest.approx(1, abs=0.05)
    assert spectrum.effective_rank <= spectrum.rankme <= 40


def test_few_rows_have_a_participation_ratio_that_json_can_hold() -> None:
    """20 rows at three points: the sample's own ratio, (tr C)^2 / tr C^2, where no unbiased one is known."""
    rows = torch.eye(3).repeat(7, 1)[:20]
    values = torch.linalg.eigvalsh(torch.cov(rows.double().T))
    found = Spectrum.of(rows).summary()
    assert found["participation_ratio"] == pytest.approx(float(values.sum() ** 2 / values.square().sum()), abs=0.005)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
