"""A custom node of ComfyUI, *Load Radial LoRA*: a LoRA, and the attention that it was trained with.

ComfyUI finds it by a link or a copy of this folder in its ``custom_nodes``; `README.md` beside this file is the manual.
`node` is what the user sees, `fit` checks that a file belongs to a model, `attention` is what runs in each layer.
"""

from radial.comfyui.node import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
