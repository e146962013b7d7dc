"""Losses of refined masks against values by hand and against a plain re-statement."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rfmedsam2.errors import UsageError
from segment_anything_hq.tasks.losses import (
    RefinementMasks,
    boundary_normalized_focal_loss,
    cross_entropy,
    dice_loss,
    error_region,
    mask_losses,
    normalized_focal_loss,
    sam_ref_losses,
)


def some(seed=0, objects=3, size=(5, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(objects, *size, generator=rng) * 3
    return logits, (torch.rand(objects, *size, generator=rng) > 0.5).float()


def plain_nfl(logits, masks, alpha=0.5, gamma=2.0, weights=None, valid=None) -> float:
    """RITM's loss, object by object and pixel by pixel."""
    losses = []
    for i in range(len(logits)):
        pixels = [(y, x) for y, x in np.ndindex(*logits.shape[1:]) if valid is None or valid[i, y, x]]
        ground_truth = {
            p: 1 / (1 + math.exp(-logits[i][p])) if masks[i][p] else 1 / (1 + math.exp(logits[i][p])) for p in pixels
        }
        beta = {p: (1 - ground_truth[p]) ** gamma for p in pixels}
        scale = len(pixels) / sum(beta.values())
        share = {p: alpha if masks[i][p] else 1 - alpha for p in pixels}
        weight = {p: 1.0 if weights is None else float(weights[i][p]) for p in pixels}
        terms = [-weight[p] * share[p] * beta[p] * scale * math.log(ground_truth[p]) for p in pixels]
        losses.append(sum(terms) / sum(weight.values()))
    return sum(losses) / len(losses)


def test_normalized_focal_loss_by_hand():
    # both pixels are the truth with 1/2: focal weights 1/4 scaled to 1, so half the entropy log 2 each
    loss = normalized_focal_loss(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]]))
    assert loss.item() == pytest.approx(0.5 * math.log(2), rel=1e-6)


def test_easy_pixels_hand_their_weight_to_hard_ones():
    # the second pixel is right beyond doubt: the first gets all the weight, two pixels' worth, averaged over two
    loss = normalized_focal_loss(torch.tensor([[[0.0, 60.0]]]), torch.ones(1, 1, 2))
    assert loss.item() == pytest.approx(0.5 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("figures", [{}, {"alpha": 0.25}, {"gamma": 1.0}])
def test_normalized_focal_loss_is_ritms(figures):
    logits, masks = some()
    assert normalized_focal_loss(logits, masks, **figures).item() == pytest.approx(
        plain_nfl(logits.double().numpy(), masks.numpy(), **figures), rel=1e-5
    )


def test_pixels_that_do_not_count_change_nothing():
    logits, masks = some()
    valid = some(1)[1].bool()
    expected = plain_nfl(logits.double().numpy(), masks.numpy(), valid=valid.numpy())
    assert normalized_focal_loss(logits, masks, valid=valid).item() == pytest.approx(expected, rel=1e-5)
    other = torch.where(valid, logits, 17.0)
    for loss in (normalized_focal_loss, dice_loss, cross_entropy):
        assert loss(other, masks, valid=valid).item() == pytest.approx(loss(logits, masks, valid=valid).item())


def test_the_scale_is_not_differentiated():
    logits = torch.tensor([[[0.5, -1.0]]], requires_grad=True)
    masks = torch.ones(1, 1, 2)
    normalized_focal_loss(logits, masks).backward()
    p = torch.sigmoid(logits.detach())
    scale = 2 / ((1 - p) ** 2).sum()
    # d/dx of -(1 - p)^2 log p with p' = p (1 - p)
    slope = 2 * (1 - p) ** 2 * p * p.log() - (1 - p) ** 3
    assert torch.allclose(logits.grad, 0.5 * scale * slope / 2, rtol=1e-5)


def test_a_certain_and_wrong_pixel_still_learns():
    logits = torch.tensor([[[-40.0, 1.0]]], requires_grad=True)
    loss = normalized_focal_loss(logits, torch.ones(1, 1, 2))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad[0, 0, 0] < -0.1


def test_error_region_weighs_half_as_much_again():
    logits, masks = some()
    region = error_region(*some(2))
    weights = np.where(region.numpy(), 1.5, 1.0)
    expected = plain_nfl(logits.double().numpy(), masks.numpy(), weights=weights)
    assert boundary_normalized_focal_loss(logits, masks, region=region).item() == pytest.approx(expected, rel=1e-5)
    same = boundary_normalized_focal_loss(logits, masks, region=region, weight=1.0)
    assert same.item() == pytest.approx(normalized_focal_loss(logits, masks).item())


def test_boundary_weighted_loss_by_hand():
    # two pixels, both undecided: the weighted average of equal losses is that loss; one hard pixel in the region is
    # worth 1.5 of 2.5
    hard = torch.tensor([[[0.0, 60.0]]])
    region = torch.tensor([[[True, False]]])
    loss = boundary_normalized_focal_loss(hard, torch.ones(1, 1, 2), region=region)
    assert loss.item() == pytest.approx(1.5 / 2.5 * math.log(2), rel=1e-6)


def test_error_region_is_where_the_cut_mask_is_wrong():
    coarse = torch.tensor([[[-1.0, 1.0, -1.0, 1.0, 0.0]]])
    masks = torch.tensor([[[0.0, 1.0, 1.0, 0.0, 1.0]]])
    assert error_region(coarse, masks).tolist() == [[[False, False, True, True, True]]]


def test_dice_and_cross_entropy_by_hand():
    logits, masks = torch.zeros(1, 1, 4), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    losses = mask_losses(logits, masks)
    # overlap 1, sums 2 + 2
    assert losses["dice"].item() == pytest.approx(1 - 3 / 5)
    assert losses["bce"].item() == pytest.approx(math.log(2))


def test_objects_count_alike():
    logits, masks = some()
    apart = [mask_losses(logits[i : i + 1], masks[i : i + 1]) for i in range(3)]
    together = mask_losses(logits, masks)
    for name, loss in together.items():
        assert loss.item() == pytest.approx(sum(part[name].item() for part in apart) / 3, rel=1e-5)


def refinement(seed, size=(4, 6)) -> RefinementMasks:
    (coarse, masks), (error, _), (refined, _) = (some(seed + k, size=size) for k in range(3))
    return RefinementMasks(coarse=coarse, error=error, refined=refined, masks=masks)


def test_sam_refs_seven_terms():
    decoded, masks = some(9)
    overall, patch = refinement(0, (5, 7)), refinement(5)
    losses = sam_ref_losses(decoded, masks, overall=overall, patch=patch)
    expected = {"nfl": plain_nfl(decoded.double().numpy(), masks.numpy())}
    for name, given in (("global", overall), ("patch", patch)):
        wrong = (given.coarse > 0).numpy() != (given.masks > 0.5).numpy()
        p, w = given.error.sigmoid().double().numpy(), wrong.astype(float)
        overlap, total = (p * w).sum((1, 2)), p.sum((1, 2)) + w.sum((1, 2))
        expected[f"dice_{name}"] = np.mean(1 - (2 * overlap + 1) / (total + 1))
        expected[f"bce_{name}"] = -np.mean(w * np.log(p) + (1 - w) * np.log(1 - p))
        weights = np.where(wrong, 1.5, 1.0)
        expected[f"bnfl_{name}"] = plain_nfl(given.refined.double().numpy(), given.masks.numpy(), weights=weights)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert len(losses) == 7


def test_without_a_patch_four_terms_are_left():
    decoded, masks = some(9)
    assert set(sam_ref_losses(decoded, masks, overall=refinement(0), patch=None)) == {
        "nfl",
        "dice_global",
        "bce_global",
        "bnfl_global",
    }


def test_masks_of_another_size_are_refused():
    with pytest.raises(UsageError, match=r"must have the same shape"):
        mask_losses(torch.zeros(1, 4, 4), torch.zeros(1, 8, 8))
