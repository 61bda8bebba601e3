"""The LoRA: injecting it with PEFT, and moving its weights in and out of plain state dicts.

y = W x + s B A x        A: (rank, in)   B: (out, rank), zero at the start   (arXiv 2106.09685)

The factor s is alpha / rank, of rsLoRA alpha / sqrt(rank) (arXiv 2312.03732). DoRA also trains the norm of each row of
the tuned weight: V = W + s B A, y = (m / |V|) V x, with |V| a constant of the gradient (arXiv 2402.09353).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import Parameter

from train.errors import UserError
from train.lora.reading import Lora
from train.parallel.zero import set_whole_parameter, whole_shape

ADAPTER = "default"
MAGNITUDE = "lora_magnitude_vector"
"""What PEFT calls m of a DoRA."""


def inject_lora(
    transformer: Any, rank: int, alpha: int, targets: str, seed: int, *, rslora: bool = False, dora: bool = False
) -> list[str]:
    """Freezes the model and adds fp32 LoRA weights to every module whose name matches ``targets`` in full.

    Args:
        rslora: whether the factor is that of rsLoRA.
        dora: whether it is a DoRA.

    Returns:
        The names of the modules that carry a LoRA.

    Raises:
        UserError: nothing matches; or a DoRA's layer has a weight with a row of zeros.
    """
    matched = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(targets, n)]
    if not matched:
        raise UserError(f"lora.targets {targets!r} matches no linear layer of the model")
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            use_dora=dora,
            target_modules=matched,
            init_lora_weights=True,
        )
        transformer.add_adapter(lora, ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name in matched:
        layer = transformer.get_submodule(name)
        assert type(layer) is Linear
        layer.__class__ = _DoraLinear if dora else _LoraLinear
        layer.lora_B[ADAPTER].__class__ = _AddedLinear
    _set_magnitudes(transformer)
    return matched


class _LoraLinear(Linear):
    """PEFT's linear layer with a LoRA, its forward in fewer passes over the output.

    The factor goes to the narrow side, and the second product adds to the frozen layer's output: no second tensor of
    the output's size is made in the forward, nor one of the gradient's in the backward. A class, since a compiler that
    met another ``forward`` on each module would compile each layer by itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return out
        narrow = self.lora_A[ADAPTER](x) * self.scaling[ADAPTER]
        total: Tensor = self.lora_B[ADAPTER](narrow, out)
        return total


class _DoraLinear(_LoraLinear):
    """The same of a DoRA.

    With g = m / |V| - 1 it adds g times what there is without the bias: of a g near 0, bfloat16 keeps as many digits as
    of any number.
    """

    def forward(self, x: Tensor) -> Tensor:
        total = super().forward(x)
        if self.disable_adapters:
            return total
        with torch.autocast(x.device.type, enabled=False):
            more = (self.magnitude / self.row_norms() - 1).to(total.dtype)
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        kept = total if bias is None else total - more * bias
        return torch.addcmul(kept, total, more)

    @property
    def magnitude(self) -> Tensor:
        """m, (out,), float32."""
        m: Tensor = self.lora_magnitude_vector[ADAPTER].weight  # type: ignore[assignment]
        return m

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|V|, (out,), float32."""
        w: Tensor = self.base_layer.weight  # type: ignore[assignment]
        a: Tensor = self.lora_A[ADAPTER].weight  # type: ignore[assignment]
        b: Tensor = self.lora_B[ADAPTER].weight  # type: ignore[assignment]
        return torch.addmm(w.float(), b, a, alpha=self.scaling[ADAPTER]).norm(dim=1)


@torch.no_grad()
def _set_magnitudes(transformer: Any) -> None:
    """Makes m of every DoRA layer the norms of now, so that it changes what its A and B change."""
    for name, layer in transformer.named_modules():
        if isinstance(layer, _DoraLinear):
            norms = layer.row_norms()
            if not norms.is_meta and not norms.all():
                raise UserError(
                    f"lora.dora is true, but {int((norms == 0).sum())} rows of {name}'s weight are zero, and DoRA "
                    "divides by their norms: leave the layer out of lora.targets, or set lora.dora=false"
                )
            layer.magnitude.copy_(norms)


class _AddedLinear(nn.Linear):
    """to + x W^T for ``x`` (..., in) and ``to`` (..., out); a module's forward, so that ZeRO 3 gathers its weight."""

    def forward(self, x: Tensor, to: Tensor) -> Tensor:  # type: ignore[override]
        return torch.addmm(to.flatten(0, -2), x.flatten(0, -2), self.weight.t()).view(to.shape)


def lora_parameters(transformer: Any) -> dict[str, Parameter]:
    """The LoRA's parameters by their names in files, ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``; of a
    DoRA also ``<module>.lora_magnitude_vector``."""
    parameters = {
        n.replace(f"{MAGNITUDE}.{ADAPTER}.weight", MAGNITUDE).replace(f".{ADAPTER}.", "."): p
        for n, p in transformer.named_parameters()
        if ".lora_" in n
    }
    assert parameters.keys() == get_peft_model_state_dict(transformer, adapter_name=ADAPTER).keys()
    return parameters


def start_from(transformer: Any, lora: Lora, scale: float) -> None:
    """Sets the injected LoRA to one that was read from a file; a smaller rank is filled up with fresh, silent ranks.

    Layers that the file does not cover stay as they are.

    Args:
        transformer: with the LoRA that `inject_lora` made.
        lora: strength and alpha are in its tensors.
        scale: the factor of the injected LoRA.

    Raises:
        UserError: the file changes what the LoRA does not, or has a greater rank; nothing is set then.
    """
    parameters = lora_parameters(transformer)
    if lora.differences:
        raise UserError(f"lora.init changes {min(lora.differences)} as a whole, expected low-rank changes alone")
    for name, (down, _) in lora.pairs.items():
        own = parameters.get(f"{name}.lora_A.weight")
        if own is None:
            raise UserError(f"lora.init covers {name}, which is not among the layers to train: set lora.targets")
        if len(down) > len(own):
            raise UserError(f"lora.init has rank {len(down)} at {name}, lora.rank is {len(own)}: raise it")
    with torch.no_grad():
        for name, (down, up) in lora.pairs.items():
            parameters[f"{name}.lora_A.weight"][: len(down)] = down
            parameters[f"{name}.lora_B.weight"][:, : len(down)] = up / scale
    _set_magnitudes(transformer)


def check_saved(expected: dict[str, Parameter], shapes: dict[str, tuple[int, ...]]) -> None:
    """Holds the shapes of saved tensors against the parameters that they are for.

    Raises:
        UserError: they do not fit.
    """
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or unknown:
        name = (missing or unknown)[0]
        raise UserError(
            f"the checkpoint has {len(missing)} missing and {len(unknown)} unknown tensors (first: {name}): "
            "it was made for another model, or with other lora.targets, lora.text or lora.dora"
        )
    for name, shape in shapes.items():
        if shape != whole_shape(expected[name]):
            raise UserError(
                f"LoRA tensor {name} has shape {shape}, expected {tuple(whole_shape(expected[name]))}: "
                "check lora.rank and the model"
            )


def load_parameters(expected: dict[str, Parameter], state: dict[str, Tensor]) -> None:
    """Loads saved tensors into parameters, whole or spread over ranks by ZeRO; every rank must call it.

    Raises:
        UserError: the tensors do not fit the parameters; nothing is loaded then.
    """
    check_saved(expected, {name: tuple(tensor.shape) for name, tensor in state.items()})
    for name, parameter in expected.items():
        set_whole_parameter(parameter, state[name])
