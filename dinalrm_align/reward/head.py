"""DiNa-LRM's reward head (arXiv 2602.11146): one FiLM adapter per backbone layer, then gated query attention.

Shape letters: B samples, N image tokens, L text tokens, Q queries, W head width. Parameter names match the released
checkpoints. RMSNorm has torch's default eps and is computed in float32.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinalrm_align.reward.backbones import Taps
from dinalrm_align.reward.config import HeadConfig


class LayerAdapter(nn.Module):
    """FiLM adapter of one backbone layer. Maps tokens (B, N, width_in) and temb (B, temb_dim) to (B, N, width // 4).

    Computes proj(x (1 + gamma) + beta + layer_embed) with x = proj_in(tokens). An MLP predicts gamma and beta from temb
    (embedded timestep and pooled prompt); gamma = beta = 0 at initialisation. film: False omits gamma and beta.
    """

    def __init__(self, width_in: int, temb_dim: int, width: int, *, use_proj_in: bool, film: bool) -> None:
        super().__init__()
        self.film = film
        self.layer_embed = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.proj_in = nn.Linear(width_in, width) if use_proj_in or width_in != width else nn.Identity()
        if film:
            last = _zero(nn.Linear(2 * width, 2 * width))
            self.cond_mlp = nn.Sequential(nn.Linear(temb_dim, 2 * width), nn.SiLU(), last)
        self.proj = nn.Linear(width, width // 4)

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        hidden = self.proj_in(tokens)
        if self.film:
            gamma, beta = self.cond_mlp(temb)[:, None].chunk(2, dim=-1)
            hidden = hidden * (1 + gamma) + beta
        return self.proj(hidden + self.layer_embed)


class QueryAttention(nn.Module):
    """Cross-attention from queries (B, Q, W) to image tokens (B, N, W), and to text tokens (B, L, W) if `text` is True.

    Returns the update (B, Q, W) to add to the queries. Image and text tokens have separate softmaxes. gated: multiply
    the value of each token by a gate that is predicted from the token.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, text: bool, gated: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.text, self.gated = heads, dropout, text, gated
        self.norm_q, self.norm_v = nn.RMSNorm(width), nn.RMSNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k_vis = nn.Linear(width, width)
        self.to_v_vis = nn.Linear(width, width)
        if text:
            self.norm_t = nn.RMSNorm(width)
            self.to_k_text = nn.Linear(width, width)
            self.to_v_text = nn.Linear(width, width)
        if gated:
            self.gate_vis = nn.Sequential(nn.Linear(width, width), nn.SiLU(), _zero(nn.Linear(width, 1)))
        if gated and text:
            self.gate_text = nn.Sequential(nn.Linear(width, width), nn.SiLU(), _zero(nn.Linear(width, 1)))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, queries: Tensor, visual: Tensor, text: Tensor | None = None) -> Tensor:
        query = self.to_q(_norm(self.norm_q, queries))
        read = self._read(query, _norm(self.norm_v, visual), "vis")
        if self.text:
            read = read + self._read(query, _norm(self.norm_t, text), "text")
        return self.to_out(read)

    def _read(self, query: Tensor, tokens: Tensor, stream: str) -> Tensor:
        """Return the attention output (B, Q, W) of query (B, Q, W) over tokens (B, N, W). stream: "vis" or "text"."""
        value = getattr(self, f"to_v_{stream}")(tokens)
        if self.gated:
            value = value * torch.sigmoid(getattr(self, f"gate_{stream}")(tokens))
        key = getattr(self, f"to_k_{stream}")(tokens)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        value = value.to(query.dtype)
        read = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return read.transpose(1, 2).flatten(-2)


class RewardHead(nn.Module):
    """Maps the tokens of selected backbone layers (`Taps`) to one raw score per sample.

    width_in: channels of the tokens. num_text_taps: number of layers whose text tokens are read; may be 0.
    temb_dim: channels of temb (embedded timestep and pooled prompt); default: `width_in`.
    """

    def __init__(
        self, config: HeadConfig, width_in: int, num_visual_taps: int, num_text_taps: int, temb_dim: int | None = None
    ) -> None:
        super().__init__()
        width = width_in if config.width == -1 else config.width
        heads, dropout = config.num_attn_heads, config.dropout
        if width % heads:
            raise ValueError(f"num_attn_heads: got {heads}, which do not divide the width {width}")

        def adapters(count: int) -> nn.ModuleList:
            sizes = (width_in, width_in if temb_dim is None else temb_dim, width)
            options = dict(use_proj_in=config.use_proj_in, film=config.film)
            return nn.ModuleList(LayerAdapter(*sizes, **options) for _ in range(count))

        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.num_queries, width))
        self.layer_adapters_visual = adapters(num_visual_taps)
        self.layer_adapters_text = adapters(num_text_taps)
        self.agg_visual = nn.Linear(num_visual_taps * (width // 4), width)
        self.agg_text = nn.Linear(num_text_taps * (width // 4), width) if num_text_taps else None
        self.attn1 = QueryAttention(width, heads, dropout, text=num_text_taps > 0, gated=config.value_gates)
        self.attn2 = QueryAttention(width, heads, dropout, text=False, gated=False)
        self.norm_ff = nn.RMSNorm(width)
        wide = 4 * width
        self.ff = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width), nn.Dropout(dropout))
        self.head = nn.Linear(width, 1)
        self.use_logistic = config.use_logistic
        if config.use_logistic:
            self.eta3 = nn.Parameter(torch.tensor(0.0))
            self.eta4 = nn.Parameter(torch.tensor(0.15))

    def forward(self, taps: Taps | Sequence[Taps]) -> Tensor:
        """Return raw scores (B,), float32, differentiable. taps: `Taps` of one noise level, or a list of K `Taps`.

        FiLM conditions the tokens of each noise level on that level's `temb`. Attention reads the tokens of all levels.
        """
        levels = [taps] if isinstance(taps, Taps) else taps
        visual = self._aggregate(self.layer_adapters_visual, self.agg_visual, [(t.visual, t.temb) for t in levels])
        text = None
        if self.agg_text is not None:
            text = self._aggregate(self.layer_adapters_text, self.agg_text, [(t.text, t.temb) for t in levels])
        queries = self.query_tokens.expand(visual.shape[0], -1, -1)
        queries = queries + self.attn1(queries, visual, text)
        queries = queries + self.attn2(queries, visual)
        queries = queries + self.ff(_norm(self.norm_ff, queries))
        with torch.autocast(queries.device.type, enabled=False):  # bfloat16 resolves a score of 10 to 0.06
            raw = F.linear(queries.float(), self.head.weight.float(), self.head.bias.float()).mean(dim=(1, 2))
        if not self.use_logistic:
            return raw
        return 4 * torch.sigmoid((raw - self.eta3.float()) / (self.eta4.float().abs() + 1e-6)) - 2  # in (-2, 2)

    def _aggregate(
        self, adapters: nn.ModuleList, join: nn.Linear, levels: list[tuple[tuple[Tensor, ...], Tensor]]
    ) -> Tensor:
        """Fuse the layers' image or text tokens within each noise level. Return the levels' tokens, concatenated."""
        dtype, joined = self.query_tokens.dtype, []
        for streams, temb in levels:
            pairs = zip(adapters, streams, strict=True)
            adapted = [adapter(tokens.to(dtype), temb.to(dtype)) for adapter, tokens in pairs]
            joined.append(join(torch.cat(adapted, dim=-1)))
        return torch.cat(joined, dim=1)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _norm(norm: nn.RMSNorm, tokens: Tensor) -> Tensor:
    return F.rms_norm(tokens.float(), norm.normalized_shape, norm.weight.float()).to(norm.weight.dtype)
