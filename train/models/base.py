"""The interface of a model family: one adapter each, and what all of them share."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.encoders.decoding import TILED
from radial import VideoGrid
from train.attention.step import StepAttention
from train.errors import UserError
from train.models.conditions import Conditions
from train.models.layout_attention import LayoutAttention
from train.models.pipelines import PipelineTraits
from train.models.rope import TemporalRope
from train.models.weights import check_weights

ADAPTERS: dict[str, type[ModelAdapter]] = {}
"""Every family by its name; defining a subclass of `ModelAdapter` with a ``family`` puts it here."""


class ModelAdapter(PipelineTraits, ABC):
    """A frozen diffusers transformer with our attention on each self-attention (or joint attention).

    A new family is one file in train/models/families with a subclass, and a YAML in conf/model. Whatever a family's own
    convention is, an adapter takes noise levels sigma in (0, 1), 1 being pure noise, and gives the velocity eps - x0.
    """

    encoder: ClassVar[str]
    """What makes its latents and text, a key of `data.encoders.FAMILIES`; by default ``family``."""
    processor_class: ClassVar[type[LayoutAttention]]
    """What computes each self-attention."""
    lora_targets: ClassVar[str]
    """Regex of the modules that carry the LoRA: Q, K, V and O of self-attention, of the video's tokens."""
    text_lora_targets: ClassVar[str | None] = None
    """The same of the text's tokens in joint attention, where they have projections of their own."""
    tiny_config: ClassVar[Mapping[str, Any]]
    """A config of the class with every kind of layer, small enough for a test on a CPU; its heads divide by 2."""
    idle_weights: ClassVar[bool] = False
    """Whether some of the model's weights never get a gradient, such as what its last layer makes of the text."""
    riflex: ClassVar[int | str] = "which of its frequencies to slow down is not known"
    """RIFLEx's k, counted from 1 (`train.models.rope`); or why ``rope=riflex`` is refused."""
    takes_first_frame: ClassVar[bool] = False
    """Whether the model goes on from a clip's first latent frame, the condition ``image.first_frame``, (batch, C, 1, H,
    W): ``objective.first_frame``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "family" in cls.__dict__:
            other = ADAPTERS.setdefault(cls.family, cls)
            assert other is cls, f"family {cls.family} is both {other} and {cls}"
            if "encoder" not in cls.__dict__:
                cls.encoder = cls.family
            if "decodes_tiled" not in cls.__dict__:
                cls.decodes_tiled = cls.encoder in TILED

    def __init__(self, transformer: Any, text_tokens: int) -> None:
        self.transformer = transformer  # a diffusers model; the library has no types
        self.text_tokens = text_tokens
        self.rope = TemporalRope()
        """How temporal positions go on past the native length."""
        self.sigma_range = (0.0, 1.0)
        """The noise levels that this model is for: from the first up to below the second."""
        self.boundary: float | None = None
        """Of two experts: the noise level from which on the first one runs (`train.models.experts`)."""
        self._attention: StepAttention | None = None  # of the forward in work
        self._hooks: Sequence[RemovableHandle] = ()
        self.install_processors()

    def predicted(self, forward: Callable[..., Any], given: Mapping[str, Any]) -> Tensor:
        """What the transformer's own ``forward`` gives for what the family's pipeline has ``given`` to it."""
        out: Tensor = forward(**given)[0]
        return out

    def install_processors(self) -> None:
        """Puts a processor of ours on each self-attention."""
        for layer in self.layers():
            # by hand, since not every class of diffusers has a set_processor
            self.self_attention(layer).processor = self.processor_class()

    @classmethod
    def load(
        cls, path: str | Path, subfolder: str | None = None, *, text_tokens: int, dtype: torch.dtype
    ) -> ModelAdapter:
        """Loads the transformer from a diffusers folder; what the family keeps in fp32 stays so.

        Raises:
            UserError: the folder holds another class of model, or weights that its config.json does not describe.
            OSError: the folder has no config.json.
        """
        config = cls.model_class.load_config(path, subfolder=subfolder)
        wanted, found = cls.model_class.__name__, config.get("_class_name")
        if found != wanted:
            raise UserError(
                f"model.path {path} holds a {found}, expected a {wanted}: choose the model=... that fits the weights"
            )
        with torch.device("meta"):
            described = cls.model_class.from_config(config)
        check_weights(Path(path) / (subfolder or ""), described)
        model = cls.model_class.from_pretrained(path, subfolder=subfolder, torch_dtype=dtype, use_safetensors=True)
        return cls(model, text_tokens)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, text_tokens: int) -> ModelAdapter:
        """A transformer with random weights (training a base, benchmarks, tests).

        Raises:
            UserError: the config does not make a model of the class.
        """
        known, name = list(inspect.signature(cls.model_class.__init__).parameters), cls.model_class.__name__
        for key in config:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f", expected some of {', '.join(known[1:])}"
                raise UserError(f"model.architecture.{key} is not a setting of {name}{hint}")
        try:
            model = cls.model_class(**config)
        except (TypeError, ValueError, ArithmeticError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"model.architecture does not make a {name} ({reason}): check its values") from error
        return cls(model, text_tokens)

    @classmethod
    def cut(cls, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """A model's config with that many layers, one of each kind at least: what benchmarks measure."""
        return {**config, "num_layers": layers}

    @property
    def device(self) -> torch.device:
        """Where the model runs: the place of what lies outside its layers, whose weights may stream."""
        inside = {id(parameter) for layer in self.layers() for parameter in layer.parameters()}
        return next(p.device for p in self.transformer.parameters() if id(p) not in inside)

    @property
    def transformers(self) -> list[Any]:
        """The diffusers models in ``transformer``, one of which runs in a forward."""
        return [self.transformer]

    @property
    def takes_guidance(self) -> bool:
        """Whether the model takes the weight of guidance as an input: one pass gives the guided velocity then."""
        return bool(getattr(self.transformers[0].config, "guidance_embeds", False))

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """The transformer's layers in the order in which they run; each has one self-attention."""

    @abstractmethod
    def self_attention(self, layer: nn.Module) -> Any:
        """A layer's self-attention: the module that calls its ``processor``."""

    def targets(self, *, text: bool) -> str:
        """Regex of the modules that carry the LoRA; ``text`` adds those of the text's tokens.

        A family whose regex matches a layer that never gets a gradient leaves it out here.

        Raises:
            UserError: the family has none of those.
        """
        if not text:
            return self.lora_targets
        if self.text_lora_targets is None:
            raise UserError(f"lora.text is true, but the text has no attention of its own in family {self.family}")
        return f"{self.lora_targets}|{self.text_lora_targets}"

    @abstractmethod
    def feed_forwards(self) -> list[nn.Module]:
        """The feed-forward layers of the video tokens, (batch, tokens, dim) in and out."""

    @abstractmethod
    def grid(self, latent: Tensor) -> VideoGrid:
        """The token grid of a latent batch, (batch, C, F, H, W)."""

    def set_attention(self, attention: StepAttention) -> None:
        """Gives each self-attention its layout, and everything that follows the sequence its order and its shard.

        It holds for the micro-batches that follow, until their backward has run.
        """
        layers, heads, _ = self.attention_shape
        for number, layer in enumerate(self.layers()):
            processor = self.self_attention(layer).processor
            processor.layout = attention.own_layout(number, layers, heads)
            processor.backend = attention.backend_of(number)
            processor.shard = attention.shard
        self.unset_attention()
        self._attention = attention
        if attention.moves_tokens:
            self._hooks = self.hook_tokens()  # anew: a LoRA that came or went has exchanged modules

    def unset_attention(self) -> None:
        """Leaves the video's tokens in their places, for a model that goes on without our attention."""
        for hook in self._hooks:
            hook.remove()
        self._attention, self._hooks = None, ()

    @abstractmethod
    def hook_tokens(self) -> Sequence[RemovableHandle]:
        """Hooks `to_layers` and `from_layers` to where the video's tokens, and their positions, enter and leave them.

        Called only where ranks share sequences or a pattern has its own order of tokens.
        """

    def to_layers(self, x: Tensor, dim: int = 1) -> Tensor:
        """As of `train.attention.step.StepAttention`; ``x`` itself where no attention is set."""
        return x if self._attention is None else self._attention.to_layers(x, dim)

    def from_layers(self, x: Tensor) -> Tensor:
        """The inverse of `to_layers`."""
        return x if self._attention is None else self._attention.from_layers(x)

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """The model's prediction of eps - x0.

        Args:
            x: (batch, C, F, H, W) noised latent.
            sigma: (batch,) noise levels in (0, 1).
            conditions: of the samples.

        Returns:
            (batch, C, F, H, W) float32, whole on every rank of a sequence-parallel group.
        """

    def given_frames(self, conditions: Conditions) -> int:
        """Latent frames at the clip's start that the conditions give the model clean: no loss, no sampling there."""
        return 0

    @classmethod
    def noise_levels(cls, steps: int, shift: float) -> list[float]:
        """The noise levels at which the family's sampler takes its Euler steps, falling; a last step goes to 0."""
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)  # the library has no types
        scheduler.set_timesteps(steps)
        return scheduler.sigmas[:-1].tolist()

    @abstractmethod
    def random_conditions(self, latent: Tensor) -> Conditions:
        """Conditions of the right names and shapes for a latent batch, on its device: benchmarks, tests."""

    @abstractmethod
    def linear_flops(self, grid: VideoGrid) -> float:
        """Floating-point operations of one sample's forward outside self-attention, without a LoRA."""

    @property
    @abstractmethod
    def patch(self) -> tuple[int, int, int]:
        """Patch size in latent cells, (t, h, w)."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latent that is noised and predicted; what a model takes in may be more."""
        config = self.transformer.config
        return config.out_channels or config.in_channels

    @property
    @abstractmethod
    def attention_shape(self) -> tuple[int, int, int]:
        """(layers, heads, head_dim) of self-attention: what FLOPs are counted from."""

    def check(self, latent: Tensor, conditions: Conditions) -> None:
        """Holds a batch, of shards that are new to the model, against what it takes; looks at names and shapes alone.

        Raises:
            UserError: naming what was found and what was expected.
        """
        if latent.shape[1] != self.latent_channels:
            raise UserError(
                f"the shards' latents have {latent.shape[1]} channels, the model takes {self.latent_channels}: "
                "they were made by another VAE"
            )
        expected = self.random_conditions(latent.to("meta"))
        for name, text in expected.text.items():
            found = conditions.named("text", name).tokens.shape
            if found[2] != text.tokens.shape[2] or found[1] > self.text_tokens:
                raise UserError(
                    f"the shards' text {name} is (tokens, width) {tuple(found[1:])}, the model takes up to "
                    f"{self.text_tokens} tokens of width {text.tokens.shape[2]}: it was made by another text encoder"
                )
        for kind in ("pooled", "image"):
            for name, tensor in getattr(expected, kind).items():
                found, wanted = conditions.named(kind, name).shape, tensor.shape
                if len(found) != len(wanted) or found[-1] != wanted[-1] or (len(wanted) == 5 and found != wanted):
                    raise UserError(
                        f"the shards' {kind}.{name} has shape {tuple(found[1:])}, the model takes {tuple(wanted[1:])}"
                    )
