"""The image projector: one CLIP image embedding to N tokens of the text's width (IP-Adapter's `image_proj`)."""

from jaxtyping import Float
from torch import Tensor, nn


class ImageProjection(nn.Module):
    """Linear to `num_tokens` x `cross_attention_dim`, then LayerNorm on each token (section 3.2: N = 4, 768)."""

    def __init__(self, image_embed_dim: int, cross_attention_dim: int, num_tokens: int = 4):
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(image_embed_dim, num_tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, image_embeds: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch tokens cross_attention_dim"]:
        return self.norm(self.proj(image_embeds).unflatten(-1, (self.num_tokens, -1)))
