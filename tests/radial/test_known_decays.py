"""Masks of heads that fall off at known rates."""

import torch

from radial import HeadMasks, VideoGrid, build_head_layouts
from radial.known_decays import fit_known, known_pattern


def test_spatial_heads_keep_near_frames_and_temporal_ones_the_same_place(tmp_path):
    grid = VideoGrid(17, 16, 24)
    pattern = known_pattern(grid, 4, 0.2)
    layout = build_head_layouts(pattern, grid, 128, layers=1, heads=4).layer(0)
    assert abs(1 - layout.sparsity - 0.2) < 0.02
    frame = torch.arange(layout.blocks) * 128 // grid.tokens_per_frame
    far = (frame[:, None] - frame).abs() > 8
    kept = layout.mask()[:, far].double().mean(-1)
    near = layout.mask()[:, ~far].double().mean(-1)
    assert kept[0] < kept[3] and near[0] > near[3]
    fit_known(grid, tmp_path / "masks.safetensors", heads=4, layers=3, share=0.2, coverage=0.5)
    about = HeadMasks.read(tmp_path / "masks.safetensors").about
    assert about.layers == (0, 1, 2) and about.order == "patches" and about.share == 0.2
