"""An exact check of attention and its gradients at sampled tokens: cheap enough for any length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from radial.layout import BlockLayout


@torch.no_grad()
def sampled_errors(
    layout: BlockLayout, inputs: Sequence[Tensor], results: Sequence[Tensor], tokens: Tensor
) -> list[float]:
    """Relative errors ‖x - exact‖ / ‖exact‖ at ``tokens``, one head, no padded text; NaN where a result is not finite.

    Output and dq of a token need its row alone. dk and dv need the normaliser of every row that attends to it, which is
    computed here too, in float32.

    Args:
        layout: of that head.
        inputs: q, k, v and the gradient of the output, (tokens, head_dim), one head of one sample, the tokens in the
            order of the layout's blocks.
        results: out, or out, dq, dk, dv, in the same shape, for scale head_dim ** -0.5.
        tokens: (samples,) positions.
    """
    q, k, v, grad = inputs
    n, block, scale = layout.grid.tokens, layout.block, q.shape[-1] ** -0.5
    kept = layout.derived("mask", lambda: layout.mask().to(q.device))

    def allowed(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(block, 1)[:, :n]

    at = [x[tokens].double() for x in (q, k, v, grad)]
    scores = (at[0] @ k.double().T * scale).masked_fill_(~allowed(kept[tokens // block]), -torch.inf)
    p = scores.softmax(-1)
    exact = [p @ v.double()]
    if len(results) > 1:
        dp = at[3] @ v.double().T
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        exact.append(scale * ds @ k.double())
        lse = []
        for i, rows in enumerate(q.float().split(8 * block)):
            of = kept[8 * i : 8 * i + -(-len(rows) // block)].repeat_interleave(block, 0)[: len(rows)]
            lse.append((rows @ k.float().T * scale).masked_fill_(~allowed(of), -torch.inf).logsumexp(-1).double())
        p_T = (at[1] @ q.double().T * scale - torch.cat(lse)).exp() * allowed(kept.T[tokens // block])
        ds_T = p_T * (at[2] @ grad.double().T - (results[0].double() * grad.double()).sum(-1))
        exact += [scale * ds_T @ q.double(), p_T @ grad.double()]
    return [((r[tokens] - e).norm() / e.norm()).item() for r, e in zip(results, exact, strict=True)]
