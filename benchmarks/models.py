"""The benchmark models: real ``transformers`` classes with random weights, built offline from a configuration.

Each factory returns ``(module, example_inputs)``; inputs are a tuple of tensors. Library initialisation makes attention
nearly uniform, so that a wrong softmax axis can pass unseen; weights are drawn again so that every part matters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Model = tuple[nn.Module, tuple[torch.Tensor, ...]]


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters and statistics again: matrices scaled by their fan-in, scales around 1, shifts around 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(p: torch.Tensor, mean: float, std: float) -> None:
        p.copy_(torch.randn(p.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for child in module.modules():
            for name, p in child.named_parameters(recurse=False):
                if isinstance(child, nn.Embedding):
                    normal(p, 0.0, 1.0)
                elif p.dim() >= 2:
                    fan_in = p.shape[0] if type(child).__name__ == "Conv1D" else p[0].numel()
                    normal(p, 0.0, fan_in**-0.5)
                else:
                    normal(p, 1.0 if name.endswith("weight") else 0.0, 0.1)
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None:
                normal(child.running_mean, 0.0, 0.2)
                child.running_var.uniform_(0.5, 1.5, generator=generator)
        for name, p in module.named_parameters():  # sharper attention: scores with a spread of a few units
            if p.dim() == 2 and any(part in name for part in ("query", "key", "q_proj", "k_proj")):
                p.mul_(1.5)
    return module.eval()


def _tokens(vocabulary: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(1))


def _image(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


class _Only(nn.Module):
    """Calls a model and returns one field of its output."""

    def __init__(self, model: nn.Module, field: str, keyword: str) -> None:
        super().__init__()
        self.model, self.field, self.keyword = model, field, keyword

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = getattr(self.model(**{self.keyword: x}), self.field)
        return out


def mlp() -> Model:
    """1024-4096-1024-1000 with GELU, 32 rows."""
    layers = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.GELU(), nn.Linear(1024, 1000))
    return redraw(layers), (torch.randn(32, 1024, generator=torch.Generator().manual_seed(1)),)


def bert(layers: int = 6, tokens: int = 128) -> Model:
    """BERT-base widths."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=layers))
    return redraw(_Only(model, "last_hidden_state", "input_ids")), (_tokens(30522, tokens),)


def gpt2(layers: int = 6, tokens: int = 128) -> Model:
    """GPT-2 widths with the language-model head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, use_cache=False))
    return redraw(_Only(model, "logits", "input_ids")), (_tokens(50257, tokens),)


def llama(layers: int = 6, tokens: int = 128) -> Model:
    """A Llama of width 768: 12 heads, 4 key/value heads, RMSNorm, RoPE, SwiGLU."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12,
                         num_key_value_heads=4, vocab_size=32000, use_cache=False)  # fmt: skip
    return redraw(_Only(LlamaModel(config), "last_hidden_state", "input_ids")), (_tokens(32000, tokens),)


def resnet50(size: int = 224) -> Model:
    """ResNet-50 v1.5."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    return redraw(_Only(model, "logits", "pixel_values")), (_image(size),)


def vit(layers: int = 6, size: int = 224) -> Model:
    """ViT-base widths."""
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(num_hidden_layers=layers, image_size=size), add_pooling_layer=False)
    return redraw(_Only(model, "last_hidden_state", "pixel_values")), (_image(size),)


def t5(layers: int = 6, tokens: int = 128) -> Model:
    """T5 encoder of width 512."""
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(num_layers=layers))
    return redraw(_Only(model, "last_hidden_state", "input_ids")), (_tokens(32128, tokens),)


def swin(size: int = 224) -> Model:
    """Swin tiny."""
    from transformers import SwinConfig, SwinModel

    return redraw(_Only(SwinModel(SwinConfig(), add_pooling_layer=False), "last_hidden_state", "pixel_values")), (_image(size),)


def convnext(size: int = 224) -> Model:
    """ConvNeXt tiny."""
    from transformers import ConvNextConfig, ConvNextModel

    return redraw(_Only(ConvNextModel(ConvNextConfig()), "last_hidden_state", "pixel_values")), (_image(size),)


def mobilenet(size: int = 224) -> Model:
    """MobileNetV2."""
    from transformers import MobileNetV2Config, MobileNetV2Model

    return redraw(_Only(MobileNetV2Model(MobileNetV2Config()), "last_hidden_state", "pixel_values")), (_image(size),)


MODELS: dict[str, Callable[[], Model]] = {
    f.__name__: f for f in (mlp, bert, gpt2, llama, t5, vit, swin, resnet50, convnext, mobilenet)
}  # fmt: skip
