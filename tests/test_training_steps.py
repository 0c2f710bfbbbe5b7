"""What a training step is made of: the draw, the optimizer, the length of the run."""

import numpy as np
import pytest
import torch

from sdedit.export.muon import Muon, orthogonalize
from sdedit.export.train import LOG_SIGMA_MEAN, LOG_SIGMA_STD, draw_batch, learning_rate_scale

PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
SYMMETRIES = [np.rot90(side, turns) for side in (PICTURE, PICTURE[:, ::-1]) for turns in range(4)]


def drawn(batch: int, seed: int = 0, step: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw_batch(torch.from_numpy(PICTURE)[None], batch, seed, step)


def test_pictures_are_drawn_under_the_eight_symmetries_alike():
    clean, _, _ = drawn(4000)
    pixels = ((clean + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    counts = [int((pixels == symmetry).all(axis=(1, 2, 3)).sum()) for symmetry in SYMMETRIES]
    assert sum(counts) == 4000
    assert max(abs(count - 500) for count in counts) < 5 * 4000**0.5 * (7 / 64) ** 0.5


def test_every_picture_is_drawn():
    pictures = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 4, 4, 3)
    clean, _, _ = draw_batch(pictures, 200, 0, 0)
    assert ((clean[:, 0, 0, 0] + 1) * 127.5).round().unique().tolist() == [0, 1, 2, 3, 4]


def test_a_draw_depends_on_the_seed_and_the_step_alone():
    first = drawn(4, seed=1, step=2)
    torch.manual_seed(99)
    again, later, other = drawn(4, seed=1, step=2), drawn(4, seed=1, step=3), drawn(4, seed=2, step=2)
    for j in range(3):
        assert torch.equal(first[j], again[j])
    for j in (1, 2):
        assert not torch.equal(first[j], later[j])
        assert not torch.equal(first[j], other[j])


def test_each_part_of_the_noise_levels_is_drawn_once():
    _, sigma, _ = drawn(64)
    normal = (sigma.log() - LOG_SIGMA_MEAN) / LOG_SIGMA_STD
    assert (torch.special.ndtr(normal.double()) * 64).floor().tolist() == list(range(64))


def test_noise_is_unit_noise():
    _, _, noise = drawn(500)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_matrices_of_one_shape_are_updated_as_each_alone():
    torch.manual_seed(0)
    shapes = [(6, 4, 3, 3), (6, 36), (4, 9), (9, 4), (6, 4, 3, 3)]
    together = [torch.randn(shape) for shape in shapes]
    alone = [p.clone() for p in together]
    joint, single = Muon(together, lr=0.1), [Muon([p], lr=0.1) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in (joint, *single):
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
def test_an_orthogonalized_matrix_keeps_its_directions_and_nearly_unit_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = orthogonalize(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ found @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6
    assert values.max() < 1.25
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("step", "over", "scale"), [(0, 0.0, 0.01), (99, 0.1, 1.0), (5000, 0.5, 1.0), (9000, 0.75, 0.5), (9999, 1.0, 0.0)]
)
def test_the_learning_rate_rises_stays_and_falls_to_zero(step, over, scale):
    assert learning_rate_scale(step, over, decay=0.5) == pytest.approx(scale)
