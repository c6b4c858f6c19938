"""The parts of a draft's layer on this device, in bfloat16, beside the eager reference in float32."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.func import functional_call
from torch.nn.functional import linear
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half

from hf_eagle.benchmark import measures
from hf_eagle.benchmark.shapes import Shapes
from hf_eagle.drafts.layers import EagleMLP, EagleRMSNorm, Rotation
from hf_eagle.drafts.row_layout import RowLayout
from hf_eagle.drafts.ttt_attention import ttt_attention
from hf_eagle.losses.fused_head import FusedHeadLoss, LossRows

from .costs import SHARE, batch_of
from .sizes import Sizes


OWN_STEPS = 3  # later steps whose keys attention also sees


def measure(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """Time of forward and backward, ours and the eager form's, and the distance of ours from exact numbers."""
    shapes = next(iter(sizes.drafts.values()))
    length = sizes.batches[0][1]
    for what, ours, eager, inputs in (
        ("attention", *attention(shapes, length, device)),
        ("norm", *norm(shapes, length, device)),
        ("MLP", *mlp(shapes, length, device)),
        ("rotation", *rotation(shapes, length, device)),
        ("head and loss", *head(shapes, length, device)),
    ):
        exact, found = (results(eager, [x.float() for x in inputs]), results(ours, inputs))
        pairs = zip(found, exact, strict=True)
        apart = max(float((x.float() - y).norm() / y.norm().clamp_min(1e-30)) for x, y in pairs)

        ways = {"ours": partial(timed, ours, inputs, device), "eager": partial(timed, eager, inputs, device)}
        medians = measures.alternating_medians(ways, sizes.repeats)
        yield {"what": what, **{f"{name}_ms": x["ms"] for name, x in medians.items()}, "distance": apart}


def timed(function: Callable, inputs: list[torch.Tensor], device: torch.device) -> dict[str, float]:
    return {"ms": 1000 * measures.seconds(partial(results, function, inputs), device)}


def results(function: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients of a random sum of it, under autocast if the first input is in bfloat16."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast(leaves[0].device.type, torch.bfloat16, enabled=leaves[0].dtype == torch.bfloat16):
        out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum() if out.dim() else out, leaves)]


# Each returns our function, the eager one, and what both take. The first input decides whether autocast is on.


def attention(shapes: Shapes, length: int, device: torch.device):
    answered = batch_of(shapes, 1, length, torch.device("cpu"))["loss_mask"][0].nonzero()[:, 0]
    layout = RowLayout.of(answered, torch.zeros(1, length, dtype=torch.long)).counted().to(device)
    rows, keys = len(layout.rows), len(layout.keys)
    heads, kv_heads, width = shapes.num_attention_heads, shapes.num_key_value_heads, shapes.head_dim
    forms = [(rows, heads, width), *[(keys, kv_heads, width)] * 2, *[(rows, kv_heads, width)] * (2 * OWN_STEPS)]

    def by(implementation: str):
        attend = ttt_attention(implementation, device)
        return lambda query, key, value, *own: attend(
            query, key, value, list(own[:OWN_STEPS]), list(own[OWN_STEPS:]), layout, width**-0.5
        )

    return by("sdpa"), by("eager"), [torch.randn(form, device=device, dtype=torch.bfloat16) for form in forms]


def norm(shapes: Shapes, length: int, device: torch.device):
    with device:
        modules = EagleRMSNorm(shapes.hidden_size), LlamaRMSNorm(shapes.hidden_size)
    return _of_modules(*modules, _rows(length, shapes.hidden_size, device))


def mlp(shapes: Shapes, length: int, device: torch.device):
    config = LlamaConfig(hidden_size=shapes.hidden_size, intermediate_size=shapes.intermediate_size)
    with device:
        modules = EagleMLP(config), LlamaMLP(config)
    return _of_modules(*modules, _rows(length, shapes.hidden_size, device))


def _of_modules(ours: torch.nn.Module, eager: torch.nn.Module, x: torch.Tensor):
    """Two modules as functions of their input and of the weights of the first one."""
    names, weights = zip(*ours.named_parameters(), strict=True)

    def by(module: torch.nn.Module) -> Callable:
        return lambda x, *given: functional_call(module, dict(zip(names, given, strict=True)), (x,))

    return by(ours), by(eager), [x, *weights]


def rotation(shapes: Shapes, length: int, device: torch.device):
    angles = torch.rand(length, 1, shapes.head_dim // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(length, shapes.num_attention_heads, shapes.head_dim, device=device, dtype=torch.bfloat16)
    return (
        lambda x: Rotation.apply(x, cos.to(x.dtype), sin.to(x.dtype), True),
        lambda x: x * cos.to(x.dtype) + rotate_half(x) * sin.to(x.dtype),
        [x],
    )


def head(shapes: Shapes, length: int, device: torch.device):
    rows = int(SHARE * length)
    where = torch.arange(rows, device=device)
    probs = (3 * torch.randn(rows, shapes.draft_vocab_size, device=device)).softmax(-1)
    factor = torch.full((rows,), 1 / rows, device=device)
    compared = LossRows("ce", probs, probs.argmax(-1), None, where, factor)

    def eager(normed, weight):
        return -(probs * linear(normed, weight).float().log_softmax(-1)).sum(-1).mean()

    def ours(normed, weight):
        return FusedHeadLoss.apply(normed, weight, compared, True)[0]

    weight = 0.02 * torch.randn(shapes.draft_vocab_size, shapes.hidden_size, device=device)
    return ours, eager, [_rows(rows, shapes.hidden_size, device), weight]


def _rows(rows: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, width, device=device, dtype=torch.bfloat16)
