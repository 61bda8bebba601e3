"""The attention of one step, as a recipe of these settings gives it."""

from radial import Pattern, VideoGrid
from train.attention.recipe import AttentionRecipe
from train.attention.sequence import SequenceGroup
from train.attention.step import StepAttention


def step_attention(
    pattern: Pattern,
    grid: VideoGrid,
    *,
    block: int = 128,
    dense_layers: int = 0,
    all_dense: bool = False,
    backend: str | None = None,
    sequence: SequenceGroup | None = None,
) -> StepAttention:
    """As `AttentionRecipe.step`."""
    recipe = AttentionRecipe(pattern, block, dense_layers, backend=backend)
    return recipe.step(grid, dense=all_dense, sequence=sequence)
