"""Convolutions that feed recurrent layers and attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Head, conv_bn


class Recurrent(nn.Module):
    """Columns as a sequence into a bidirectional LSTM, then a GRU (CRNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 24), nn.MaxPool2d(2), conv_bn(24, 32), nn.AdaptiveAvgPool2d((1, 8)))
        self.lstm, self.gru = nn.LSTM(32, 16, bidirectional=True, batch_first=True), nn.GRU(32, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).squeeze(2).permute(0, 2, 1)
        x, _ = self.lstm(x)
        _, hidden = self.gru(x)
        return self.head(hidden[-1])


class ConvRecurrent(nn.Module):
    """Gates of a convolutional LSTM, split by the hidden width, over frames. (B, 3, 3, 12, 12)."""

    class Cell(nn.Module):
        def __init__(self, i: int, hidden_dim: int) -> None:
            super().__init__()
            self.hidden_dim = hidden_dim
            self.conv = nn.Conv2d(i + hidden_dim, 4 * hidden_dim, 3, padding=1)

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            h, c = state
            i, f, o, g = torch.split(self.conv(torch.cat([x, h], dim=1)), self.hidden_dim, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c

        def init_hidden(self, b: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
            weight = self.conv.weight
            return weight.new_zeros(b, self.hidden_dim, *size), weight.new_zeros(b, self.hidden_dim, *size)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell, self.last, self.head = conv_bn(3, 24), self.Cell(24, 16), conv_bn(16, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell.init_hidden(x.shape[0], tuple(x.shape[-2:]))
        for t in range(x.shape[1]):
            h, c = self.cell(self.stem(x[:, t]), (h, c))
        return self.head(self.last(h))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` on the patches of a convolutional stem, positions by sine and cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 24, stride=2), nn.Conv2d(24, 32, 2, 2))
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        angle = torch.arange(16)[:, None] / 100 ** (torch.arange(16) / 16)
        self.register_buffer("pe", torch.cat([angle.sin(), angle.cos()], 1))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(x + self.pe[: x.size(1)])[:, 0])


class ObjectQueries(nn.Module):
    """Learned queries look at the features, (N, B, C), by ``nn.MultiheadAttention`` (DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 24, stride=2), conv_bn(24, 40, stride=2))
        self.input_proj, self.query_embed = nn.Conv2d(40, 32, 1), nn.Embedding(6, 32)
        self.cross, self.norm = nn.MultiheadAttention(32, 4, dropout=0.1), nn.LayerNorm(32)
        self.linear1, self.linear2 = nn.Linear(32, 64), nn.Linear(64, 32)
        self.class_embed, self.bbox_embed = nn.Linear(32, 6), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        memory = self.input_proj(self.backbone(x)).flatten(2).permute(2, 0, 1)
        queries = self.query_embed.weight.unsqueeze(1).repeat(1, x.shape[0], 1)
        target = self.norm(queries + self.cross(queries, memory, memory)[0])
        target = (target + self.linear2(F.relu(self.linear1(target)))).transpose(0, 1)
        return {"pred_logits": self.class_embed(target), "pred_boxes": self.bbox_embed(target).sigmoid()}


class FusedQKV(nn.Module):
    """One linear layer for queries, keys and values, reshaped (B, N, 3, heads, width), a class token (ViT)."""

    class Attention(nn.Module):
        def __init__(self, dim: int, num_heads: int, fused: bool) -> None:
            super().__init__()
            self.num_heads, self.head_dim, self.fused = num_heads, dim // num_heads, fused
            self.scale = self.head_dim**-0.5
            self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            if self.fused:
                x = F.scaled_dot_product_attention(q, k, v)
            else:
                attn = (q * self.scale) @ k.transpose(-2, -1)
                x = attn.softmax(dim=-1) @ v
            return self.proj(x.transpose(1, 2).reshape(b, n, c))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 24, stride=2), nn.Conv2d(24, 32, 2, 2))
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        self.norm1, self.attn1 = nn.LayerNorm(32), self.Attention(32, 4, fused=False)
        self.norm2, self.attn2 = nn.LayerNorm(32), self.Attention(32, 2, fused=True)
        self.norm3, self.mlp = nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x))
        return self.head((x + self.mlp(self.norm3(x)))[:, 0])


class Windows(nn.Module):
    """Windows rolled, partitioned, attended with a table of relative positions, and put back (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.window, self.heads = nn.Sequential(conv_bn(3, 24), nn.Conv2d(24, 32, 2, 2)), 4, 4
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.table = nn.Parameter(torch.randn(49, 4))
        rows = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        relative = (rows[:, :, None] - rows[:, None, :] + 3).permute(1, 2, 0)
        self.register_buffer("index", relative[..., 0] * 7 + relative[..., 1])
        self.merge_norm, self.merge, self.head = nn.LayerNorm(128), nn.Linear(128, 48, bias=False), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        s = self.window
        y = torch.roll(self.norm(x), (-2, -2), (1, 2)).view(b, h // s, s, w // s, s, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(-1, s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1)
        attn = (q @ k.transpose(-2, -1) * 8**-0.5 + bias.unsqueeze(0)).softmax(-1)
        y = self.proj((attn @ v).transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (2, 2), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(self.merge_norm(x)).mean((1, 2)))


class CrossBranches(nn.Module):
    """Queries of one convolutional branch look at keys and values of the other, heads by ``view`` and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.a, self.b = nn.Sequential(conv_bn(3, 24, stride=2), conv_bn(24, 32)), conv_bn(3, 24, stride=4)
        self.to_q, self.to_kv = nn.Conv2d(32, 32, 1, bias=False), nn.Conv2d(24, 64, 1, bias=False)
        self.out, self.head = nn.Conv2d(32, 32, 1), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        n, _, h, w = a.shape
        q = self.to_q(a).view(n, self.heads, -1, h * w)
        k, v = self.to_kv(b).flatten(2).view(n, 2 * self.heads, -1, b.shape[2] * b.shape[3]).chunk(2, dim=1)
        attn = torch.einsum("bhdi,bhdj->bhij", q * 8**-0.5, k).softmax(dim=-1)
        y = torch.einsum("bhij,bhdj->bhdi", attn, v).reshape(n, -1, h, w)
        return self.head(a + self.out(y))


class LinearAttention(nn.Module):
    """Keys times values first, kernels by ELU, attention over positions in 1x1 convolutions (EfficientViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 8
        self.stem, self.qkv = conv_bn(3, 32, stride=2), nn.Conv2d(32, 96, 1, bias=False)
        self.mix = nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False)
        self.proj, self.head = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        qkv = self.mix(self.qkv(x)).reshape(b, -1, 3 * self.dim, h * w).transpose(-1, -2)
        q, k, v = qkv[..., : self.dim], qkv[..., self.dim : 2 * self.dim], qkv[..., 2 * self.dim :]
        q, k = F.elu(q) + 1, F.elu(k) + 1
        v = F.pad(v, (0, 1), mode="constant", value=1.0)
        out = q @ (k.transpose(-1, -2) @ v)
        out = out[..., :-1] / (out[..., -1:] + 1e-6)
        return self.head(x + self.proj(out.transpose(-1, -2).reshape(b, -1, h, w)))


class TokenMixer(nn.Module):
    """Linear layers over positions between linear layers over channels (MLP-Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm1, self.norm2 = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32), nn.LayerNorm(32)
        self.tokens = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.channels = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.norm2(x))).mean(1))


class Pooled(nn.Module):
    """A learned query pools the positions by attention (CLIP's ResNet), ``F.multi_head_attention_forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pos = (
            nn.Sequential(conv_bn(3, 24, stride=2), conv_bn(24, 32, stride=2)),
            nn.Parameter(torch.randn(17, 32)),
        )
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(32, o) for o in (32, 32, 32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).flatten(start_dim=2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0) + self.pos[:, None, :]
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        x, _ = F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=4, in_proj_weight=None,
            in_proj_bias=bias, bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
            training=self.training, need_weights=False,
        )  # fmt: skip
        return x.squeeze(0)


EXAMPLES = {ConvRecurrent: (3, 3, 12, 12)}
CAUSES = [
    Recurrent, ConvRecurrent, Encoder, ObjectQueries, FusedQKV, Windows, CrossBranches, LinearAttention, TokenMixer,
    Pooled,
]  # fmt: skip
READ_ACROSS = [cause for cause in CAUSES if cause not in (Recurrent, ConvRecurrent)]
