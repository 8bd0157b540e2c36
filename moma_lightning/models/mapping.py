"""The mapping from the MLLM's hidden state to a CLIP image embedding."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Mapping(nn.Module):
    """SwiGLU MLP without bias: down(silu(gate(x)) * up(x)).

    The paper speaks of a mapping only; the form is that of the released weights (`llm_mapping`, 4096 -> 1024), whose
    keys `mapping.{gate_proj,up_proj,down_proj}.weight` are this module's own under the name `mapping`.
    """

    def __init__(self, hidden_size: int, embed_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, embed_dim, bias=False)
        self.up_proj = nn.Linear(hidden_size, embed_dim, bias=False)
        self.down_proj = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch embed_dim"]:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
