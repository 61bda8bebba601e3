"""What a plan cannot derive and somebody measured: one table, with its sources.

Rates are of one NVIDIA H200, bf16, torch 2.11; for other GPUs they are scaled by peak FLOP/s (kernels) or by memory
bandwidth (everything else). `python -m train.bench --json F`, then `python -m train.bench.compare F` sets a
prediction beside a measurement; a number here may change only with such a file at hand.

Activations are counted in hidden states: the tokens of one rank x model width x bytes of the run's precision.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED_ON = "NVIDIA H200"

# backend -> (tokens, forward, backward) in FLOP/s over the blocks really computed, head_dim 128
SPARSE = {
    # README, "Use the attention alone": python -m radial bench, Wan and Hunyuan masks
    "fa4": ((75_600, 611e12, 575e12), (147_600, 652e12, 537e12), (291_600, 666e12, 547e12), (461_056, 659e12, 548e12)),
    # FlexAttention's Triton kernels on the same masks, measured before they were left for fa4 on Hopper
    "flex": ((69_120, 428e12, 393e12), (147_600, 411e12, 353e12), (291_600, 404e12, 349e12), (460_800, 418e12, 384e12)),
}
DENSE = {
    "fa4": ((75_600, 695e12, 648e12), (147_600, 709e12, 632e12), (291_600, 654e12, 603e12), (461_056, 656e12, 586e12)),
    # torch's scaled_dot_product_attention, cuDNN kernels
    "sdpa": ((69_120, 622e12, 560e12), (291_600, 572e12, 540e12)),
}

HEAD_MASKS = 0.875
"""Share of ``SPARSE`` that masks of each head reach, whose lists are made whenever a layer runs: two layers of Wan-14B
at 321 frames, 0.6 and 0.4 of the released mask's blocks."""

LINEAR, LINEAR_FP8 = 800e12, 1540e12
"""FLOP/s of the linear modules in layers of Wan-14B, LoRA included, in bf16 and with ``trainer.fp8``."""

LINK = 0.66
"""Share of a link's rate that all-to-alls reach: 300 GB/s of an H200's 450."""

PCIE = 5.5e10
"""Bytes a second, each way, of page-locked copies beside the GPU's work; measured on an H200."""


@dataclass(frozen=True)
class LayerCosts:
    """What a transformer layer costs beside its attention and GEMM kernels, eager or compiled.

    Attributes:
        passes: times that a hidden state goes through the GPU's memory in one forward of norms, rotary angles, gates,
            casts and pauses; a backward takes twice as many.
        saved: hidden states that autograd saves in a forward without a policy, beside the feed-forward's middle.
        running: hidden states at the peak of a backward that runs the layer again, its input not counted.
        running_selective: the same without running attention again, its output not counted either.
        running_saved: the same where nothing runs again.
        saved_modulated, running_modulated: more of both where each token has its own timestep, and so its own scales,
            shifts and gates.
    """

    passes: float
    saved: float
    running: float
    running_selective: float
    running_saved: float
    saved_modulated: float = 0.0
    running_modulated: float = 0.0


# eager: passes from 3.59 s a layer at 291,600 tokens; the rest from the trace in tests/train/planning/test_planning.py
EAGER = LayerCosts(
    passes=280,
    saved=19.2,
    running=29.2,
    running_selective=28.2,
    running_saved=7.0,
    saved_modulated=12.0,
    running_modulated=17.0,
)
EAGER_OF = {
    "hunyuan": LayerCosts(passes=280, saved=15.0, running=29.2, running_selective=28.2, running_saved=7.0),
    "hunyuan15": LayerCosts(passes=280, saved=13.5, running=20.3, running_selective=20.2, running_saved=4.9),
    # modulates and rotates in float32
    "mochi": LayerCosts(passes=280, saved=25.7, running=38.6, running_selective=37.6, running_saved=4.7),
}
"""Families whose layers differ much from Wan's, by the same trace."""
# compiled: tests/train/bench/measured, where running is that of dense layers; saved as counted on a CPU
COMPILED = LayerCosts(passes=44, saved=13.1, running=16.6, running_selective=10.5, running_saved=7.0)
PLAIN_ATTENTION = {2: 34.0, 4: 19.0}
"""Hidden states of attention's width at the peak of the backward in plain torch, by bytes of an element; counted in
tests/train/planning/test_kernels.py."""
MODULATION = 6
"""Hidden states that scales, shifts and gates of each token take, which all layers share."""
FP8_PASSES = 24
"""More passes of that kind with ``trainer.fp8``, which rounds activations and gradients."""
FP8_MIDDLE = 6.0
"""Bytes that a number of a feed-forward's middle adds to the peak of layers that are not compiled: two float32 copies
before it is rounded, of which a part finds room that is there anyway; counted in
tests/train/planning/test_planning.py."""

CONTEXT = 1.5 * 2**30
"""Bytes of a GPU that CUDA, NCCL and cuBLAS take outside of torch's allocator: assumed, as the next two are."""
FRAGMENTATION = 0.04
"""Share of a GPU's memory that the allocator holds and cannot use."""
PROCESS = 8 * 2**30
"""Bytes of CPU memory of a process beside what it locks: 7.4 and 9.5 GiB in the runs of 40 layers on an H200."""
MARGIN = 0.1
"""Share of what a step may allocate that chosen policies leave free where they can: a plan may be off by that much."""
CPU_SPARE = 0.1
"""Share of a node's CPU memory that stays free, for the file cache and everybody else."""
