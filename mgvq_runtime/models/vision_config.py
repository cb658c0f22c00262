"""Shape of the vision tower, read from a Hugging Face config.json (used by `models.config`).

One dataclass describes the towers of all families; one reader a family knows the file's spellings
and what the hub leaves out. What would change an answer and is not implemented is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgvq_runtime.models.config_fields import MAX_INTEGER, MAX_LAYERS, Fields

VISION_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
"""Activations of the vision tower that `models.vision` implements."""

VISION_NORMS = ("layer_norm", "rms_norm")
"""Norms of the vision tower that `models.vision` implements."""

_VISION_ROPE_TYPES = ("default", "axial")


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower and of what makes decoder rows of its output."""

    depth: int
    embed_dim: int
    num_heads: int
    intermediate_size: int
    hidden_size: int
    """Width of the decoder rows: the decoder's hidden size."""
    hidden_act: str
    patch_size: int
    in_channels: int = 3
    temporal_patch_size: int = 1
    spatial_merge_size: int = 1
    """Side of the square of patches that becomes one decoder row."""
    layer_norm_eps: float = 1e-6
    norm: str = "layer_norm"
    rope_theta: float | None = None
    """Base of the 2-D rope; None where positions are learned."""
    image_size: int | None = None
    """Side of a tile in pixels, all of one size; None where a picture keeps its own."""
    has_class_token: bool = False
    """Whether each tile begins with a row that is not a patch, dropped at the end."""
    patch_bias: bool = False
    qkv_bias: bool = True
    has_qk_norm: bool = False
    """Whether queries and keys are normalised over their full width, before the split by head."""
    has_layer_scale: bool = False
    """Whether each branch of a block is scaled by a learned vector."""

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        assert self.image_size is not None, "only tiles have one size"
        return self.image_size // self.patch_size


def qwen2_vl_vision_from_hf(fields: Fields, text_hidden_size: int) -> VisionConfig:
    """Read Qwen2-VL's vision part; the hub leaves out what is the default.

    Args:
        fields: `vision_config` of config.json.
        text_hidden_size: D, the decoder's width.

    Raises:
        ConfigError: naming the key that is wrong or asks for what is not implemented.
    """
    embed_dim = fields.integer("embed_dim", default=1280)
    num_heads = fields.integer("num_heads", default=16)
    fields.divides("4 * num_heads", 4 * num_heads, "embed_dim", embed_dim)
    hidden_size = fields.integer("hidden_size", default=text_hidden_size)
    if hidden_size != text_hidden_size:
        fields.refuse("hidden_size", hidden_size, f"the decoder's {text_hidden_size}")
    _check_channels(fields, "in_channels" if fields.has("in_channels") else "in_chans")
    mlp_ratio = fields.number("mlp_ratio", default=4)
    if not 1 <= embed_dim * mlp_ratio <= MAX_INTEGER:
        product = f"a number that makes 1 to {MAX_INTEGER} with embed_dim ({embed_dim})"
        fields.refuse("mlp_ratio", mlp_ratio, product)
    rope = Fields(fields.mapping("rope_parameters", default={}), f"{fields.prefix}rope_parameters.")
    rope.one_of("rope_type", _VISION_ROPE_TYPES, default="axial")
    return VisionConfig(
        depth=fields.integer("depth", default=32, high=MAX_LAYERS),
        embed_dim=embed_dim,
        num_heads=num_heads,
        intermediate_size=int(embed_dim * mlp_ratio),
        hidden_size=hidden_size,
        hidden_act=fields.one_of("hidden_act", VISION_ACTIVATIONS, default="quick_gelu"),
        patch_size=fields.square("patch_size", default=14),
        temporal_patch_size=fields.square("temporal_patch_size", default=2),
        spatial_merge_size=fields.integer("spatial_merge_size", default=2),
        rope_theta=rope.number("rope_theta", default=10000.0),
    )


def siglip_from_hf(fields: Fields, text_hidden_size: int, last_layer: int) -> VisionConfig:
    """Read LLaVA-OneVision's SigLIP; what is left out is that of so400m-patch14-384.

    Args:
        fields: `vision_config` of config.json.
        text_hidden_size: D, the decoder's width.
        last_layer: The last block that is run, counted from the end: -1 or -2.

    Raises:
        ConfigError: naming the key that is wrong or asks for what is not implemented.
    """
    fields.one_of("model_type", ("siglip_vision_model",), default="siglip_vision_model")
    embed_dim, num_heads = _width_and_heads(fields, 1152, 16)
    _check_channels(fields, "num_channels")
    num_layers = fields.integer("num_hidden_layers", default=25 - last_layer, high=MAX_LAYERS)
    return VisionConfig(
        depth=num_layers + 1 + last_layer,
        embed_dim=embed_dim,
        num_heads=num_heads,
        intermediate_size=fields.integer("intermediate_size", default=4304),
        hidden_size=text_hidden_size,
        hidden_act=fields.one_of("hidden_act", VISION_ACTIVATIONS, default="gelu_pytorch_tanh"),
        patch_size=fields.square("patch_size", default=14),
        layer_norm_eps=fields.number("layer_norm_eps", default=1e-6),
        image_size=fields.square("image_size", default=384),
        patch_bias=True,
    )


def intern_vit_from_hf(
    fields: Fields, text_hidden_size: int, merge_size: int, is_hub: bool
) -> VisionConfig:
    """Read InternVL2's InternViT, in the hub's spelling or in transformers'.

    Args:
        fields: `vision_config` of config.json.
        text_hidden_size: D, the decoder's width.
        merge_size: Side of the square of patches that becomes one decoder row.
        is_hub: Whether the spelling is the hub's.

    Raises:
        ConfigError: naming the key that is wrong or asks for what is not implemented.
    """
    embed_dim, num_heads = _width_and_heads(fields, 1024, 16)
    _check_channels(fields, "num_channels")
    if not fields.boolean("use_absolute_position_embeddings", default=True):
        fields.refuse("use_absolute_position_embeddings", False, "true")
    if not fields.boolean("use_mean_pooling", default=True):
        fields.refuse("use_mean_pooling", False, "true: a norm after the tower is not implemented")
    image_size = fields.square("image_size", default=448)
    patch_size = fields.square("patch_size", default=14)
    fields.divides("patch_size * merge", patch_size * merge_size, "image_size", image_size)
    return VisionConfig(
        depth=fields.integer("num_hidden_layers", default=24, high=MAX_LAYERS),
        embed_dim=embed_dim,
        num_heads=num_heads,
        intermediate_size=fields.integer("intermediate_size", default=4096),
        hidden_size=text_hidden_size,
        hidden_act=fields.one_of("hidden_act", VISION_ACTIVATIONS, default="gelu"),
        patch_size=patch_size,
        spatial_merge_size=merge_size,
        layer_norm_eps=fields.number("layer_norm_eps", default=1e-6),
        norm=fields.one_of("norm_type", VISION_NORMS, default="layer_norm"),
        image_size=image_size,
        has_class_token=True,
        patch_bias=True,
        qkv_bias=fields.boolean("qkv_bias" if is_hub else "attention_bias", default=is_hub),
        has_qk_norm=fields.boolean("qk_normalization" if is_hub else "use_qk_norm", default=False),
        has_layer_scale=True,
    )


def _width_and_heads(fields: Fields, width: int, heads: int) -> tuple[int, int]:
    embed_dim = fields.integer("hidden_size", default=width)
    num_heads = fields.integer("num_attention_heads", default=heads)
    fields.divides("num_attention_heads", num_heads, "hidden_size", embed_dim)
    return embed_dim, num_heads


def _check_channels(fields: Fields, key: str) -> None:
    channels = fields.integer(key, default=3)
    if channels != 3:
        fields.refuse(key, channels, "3: pictures are RGB")
