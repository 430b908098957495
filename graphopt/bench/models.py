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
                elif p.dim() >= 2 and p.numel():
                    fan_in = p.shape[0] if type(child).__name__ == "Conv1D" else p[0].numel()
                    normal(p, 0.0, fan_in**-0.5)
                else:
                    normal(p, 1.0 if name.endswith("weight") else 0.0, 0.1)
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None and child.running_var is not None:
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


class _OneToken(nn.Module):
    """One step of a decoder, with the keys and values of the tokens before as inputs.

    ``forward(tokens [1, 1], keys, values, keys, values, ...)``, keys and values of each layer being
    ``[1, key/value heads, tokens before, head size]``, gives the last hidden state, then the new token's keys and values of
    each layer ``[1, key/value heads, 1, head size]``. The caller writes them into its cache: no system has to copy a cache
    in order to return it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, *before: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer, keys, values in zip(cache.layers, before[0::2], before[1::2], strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
        out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
        # copies, as a view would keep the keys and values of all tokens alive
        return (out, *(x[:, :, -1:].clone() for layer in cache.layers for x in (layer.keys, layer.values)))


def decode(layers: int = 6, before: int = 512) -> Model:
    """One token of a Llama of width 1024 (16 heads, 4 key/value heads) after ``before`` others.

    With 6 layers, 303.6 MB of weights are read a token (the embedding not counted, of which one row is read): that, at the
    speed of memory, is the limit. The keys and values of 512 tokens add 6.3 MB.
    """
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(hidden_size=1024, intermediate_size=3264, num_hidden_layers=layers, num_attention_heads=16,
                         num_key_value_heads=4, vocab_size=32000)  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    cache = (torch.randn(1, 4, before, 64, generator=generator) for _ in range(2 * layers))
    return redraw(_OneToken(LlamaModel(config))), (_tokens(32000, 1), *cache)


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
    f.__name__: f for f in (mlp, bert, gpt2, llama, decode, t5, vit, swin, resnet50, convnext, mobilenet)
}  # fmt: skip
