"""Code paths: flags, sizes, values, modes; parts that run rarely, never, without gradient, recomputed or compiled."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from networks import Head, conv_bn


class Flags(nn.Module):
    """Branches by a flag, by the kind of an optional layer, by the input's size."""

    def __init__(self, use_context: bool = True) -> None:
        super().__init__()
        self.use_context = use_context
        self.stem, self.context, self.unused = conv_bn(3, 24), conv_bn(24, 24), None
        self.down, self.keep = conv_bn(24, 32, stride=2), conv_bn(24, 32)
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.use_context:
            x = x + self.context(x)
        if self.unused is not None:
            x = self.unused(x)
        return self.head(self.down(x) if min(x.shape[-2:]) > 8 else self.keep(x))


class ByValue(nn.Module):
    """An early exit that a tensor's value decides: the other branch reads the same channels (adaptive inference)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.easy = conv_bn(3, 24), nn.Linear(24, 5)
        self.hard, self.head = conv_bn(24, 32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        early = self.easy(x.mean((2, 3)))
        if early.softmax(1).amax().item() > 0.999:
            return early
        return self.head(self.hard(x))


class Auxiliary(nn.Module):
    """A second classifier, on inner channels, that runs only in training (Inception), and a layer that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last = conv_bn(3, 24), conv_bn(24, 32, stride=2), conv_bn(32, 40)
        self.aux, self.head, self.forgotten = nn.Sequential(conv_bn(32, 16, 1), Head(16)), Head(40), nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.mid(self.stem(x))
        aux = self.aux(x) if self.training else None
        x = self.head(self.last(x))
        return x if aux is None else (x, aux)


class StochasticDepth(nn.Module):
    """Residual branches dropped by sample, dropout of channels, noise in training."""

    class DropPath(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.p = p

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
            return x * mask / (1 - self.p)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_bn(3, 24), nn.Sequential(conv_bn(24, 32, 1), nn.Conv2d(32, 24, 3, padding=1))
        self.drop_path, self.drop, self.last, self.head = (
            self.DropPath(0.1),
            nn.Dropout2d(0.1),
            conv_bn(24, 32),
            Head(32),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.drop_path(self.body(x))
        if self.training:
            x = x + torch.randn_like(x) * 0.01
        return self.head(self.last(self.drop(x)))


class Checkpointed(nn.Module):
    """Activations recomputed in the backward pass: both kinds, and a sequence in segments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = conv_bn(3, 24), conv_bn(24, 32), conv_bn(32, 24)
        self.rest, self.head = nn.Sequential(conv_bn(24, 24), conv_bn(24, 32), conv_bn(32, 24)), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.one, x, use_reentrant=False)
        x = checkpoint(self.two, x, use_reentrant=True) if x.requires_grad else self.two(x)
        return self.head(checkpoint_sequential(self.rest, 2, x, use_reentrant=False))


class DenseCheckpointed(nn.Module):
    """DenseNet's saving of memory: a closure concatenates its arguments, and is checkpointed."""

    class Layer(nn.Module):
        def __init__(self, i: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, 32, 1, bias=False)
            self.norm2, self.conv2 = nn.BatchNorm2d(32), nn.Conv2d(32, 12, 3, padding=1, bias=False)

        def bottleneck(self, *inputs: Tensor) -> Tensor:
            return self.conv1(F.relu(self.norm1(torch.cat(inputs, 1))))

        def forward(self, *features: Tensor) -> Tensor:
            if any(f.requires_grad for f in features):
                out = checkpoint(self.bottleneck, *features, use_reentrant=False)
            else:
                out = self.bottleneck(*features)
            return self.conv2(F.relu(self.norm2(out)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = conv_bn(3, 24), nn.ModuleDict({f"layer{i}": self.Layer(24 + 12 * i) for i in range(3)})
        self.norm, self.head = nn.BatchNorm2d(60), Head(60)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers.values():
            features.append(layer(*features))
        return self.head(F.relu(self.norm(torch.cat(features, 1))))


class NoGrad(nn.Module):
    """A backbone that is frozen, kept in eval mode, and run under ``torch.no_grad``; its features are detached."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 24), conv_bn(24, 32)).requires_grad_(False)
        self.neck, self.head = conv_bn(32, 32), Head(32)

    def train(self, mode: bool = True) -> NoGrad:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(self.neck(x.detach()))


class InferenceGuide(nn.Module):
    """A small network under ``torch.inference_mode`` guides another one."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = nn.Sequential(conv_bn(3, 24), nn.Conv2d(24, 1, 1))
        self.body, self.last, self.head = conv_bn(3, 32), conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            guide = self.guide(x).sigmoid()
        return self.head(self.last(self.body(x) * guide.clone()))


class PartlyCompiled(nn.Module):
    """A block that is compiled already, inside a network that isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = conv_bn(3, 24), conv_bn(32, 24), Head(24)
        self.block = torch.compile(conv_bn(24, 32), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.block(self.stem(x))))


class Scripted(nn.Module):
    """A block that ``torch.jit`` has scripted, inside a network that isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = conv_bn(3, 24), conv_bn(32, 24), Head(24)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.block = torch.jit.script(conv_bn(24, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.block(self.stem(x))))


class MixedPrecision(nn.Module):
    """A part under ``torch.autocast``, in half the bits, and channels last in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last, self.head = conv_bn(3, 24), conv_bn(24, 32), conv_bn(32, 24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            x = self.mid(x)
        return self.head(self.last(x.float()))


class OwnFunction(nn.Module):
    """An activation that is an ``autograd.Function``, with a gradient by hand."""

    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            s = torch.sigmoid(ctx.saved_tensors[0])
            return grad * (s * (1 + ctx.saved_tensors[0] * (1 - s)))

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 24), (24, 32), (32, 24)))
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        swish = self.Swish.apply
        return self.head(swish(self.conv3(swish(self.conv2(swish(self.conv1(x)))))))


class Materialised(nn.Module):
    """Lazy layers that have learned their widths from an input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LazyConv2d(24, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(32, 3, padding=1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(24), nn.ReLU(), nn.Linear(24, 5),
        )  # fmt: skip
        self.body(torch.zeros(2, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class WalkedByName(nn.Module):
    """A dict of layers from a configuration, walked by name, outputs kept by number (Darknet's ports)."""

    LAYERS = (("conv", 24), ("conv", 32), ("route", (-1, 0)), ("conv", 24), ("shortcut", 0), ("conv", 32))

    def __init__(self) -> None:
        super().__init__()
        self.layers, widths = nn.ModuleDict(), []
        for n, (kind, value) in enumerate(self.LAYERS):
            if kind == "conv":
                self.layers[f"{kind}_{n}"] = conv_bn(widths[-1] if widths else 3, value)
            widths.append(
                {"conv": value, "shortcut": widths[-1:] and widths[-1]}.get(kind) or sum(widths[v] for v in value)
            )
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for n, (kind, value) in enumerate(self.LAYERS):
            if kind == "conv":
                x = self.layers[f"conv_{n}"](x)
            else:
                x = torch.cat([outputs[v] for v in value], 1) if kind == "route" else x + outputs[value]
            outputs.append(x)
        return self.head(x)


class Hooked(nn.Module):
    """Features taken by forward hooks, one of which also rescales its module's result (feature extractors)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.deep = conv_bn(3, 24), conv_bn(24, 32, stride=2), conv_bn(32, 40)
        self.lateral, self.head = nn.Conv2d(24, 40, 1), Head(40)
        self.taken: dict[str, Tensor] = {}
        self.stem.register_forward_hook(self.take)
        self.mid.register_forward_hook(self.double)

    def take(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.taken["stem"] = output

    @staticmethod
    def double(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output * 2

    def forward(self, x: Tensor) -> Tensor:
        deep = self.deep(self.mid(self.stem(x)))
        return self.head(F.relu(F.interpolate(deep, scale_factor=2) + self.lateral(self.taken.pop("stem"))))


class Asserts(nn.Module):
    """Code that checks the widths it was built with, prints shapes, and reads sizes off its own layers."""

    class Block(nn.Module):
        def __init__(self, planes: int) -> None:
            super().__init__()
            self.planes, self.conv = planes, nn.Conv2d(planes, planes, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            assert c == self.planes, f"expected {self.planes} channels, got {c}"
            return x + F.relu(self.conv(x)).reshape(b, self.planes, h, w)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.wide, self.head = conv_bn(3, 24), self.Block(24), conv_bn(24, 48), Head(48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.block(self.stem(x)))
        return self.head(x.view(x.size(0), self.wide[0].out_channels, *x.shape[2:]))


EXAMPLES = {}
READ_ACROSS = [MixedPrecision]
CAUSES = [
    Flags, ByValue, Auxiliary, StochasticDepth, Checkpointed, DenseCheckpointed, NoGrad, InferenceGuide, PartlyCompiled,
    Scripted, MixedPrecision, OwnFunction, Materialised, WalkedByName, Hooked, Asserts,
]  # fmt: skip
