"""The benchmark models (:mod:`graphopt.bench.models`) at sizes that an interpreter can run: the same classes, few and narrow layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import nn

from graphopt.bench.models import Model, _image, _OneToken, _Only, _tokens, redraw

WORDS = {"vocab_size": 50}
DECODER = {**WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


def _text(model: nn.Module, field: str = "last_hidden_state") -> Model:
    return redraw(_Only(model, field, "input_ids")), (_tokens(50, 11),)


def _picture(model: nn.Module, size: int, field: str = "last_hidden_state") -> Model:
    return redraw(_Only(model, field, "pixel_values")), (_image(size),)


def mlp() -> Model:
    layers = nn.Sequential(nn.Linear(40, 70), nn.GELU(), nn.Linear(70, 40), nn.GELU(), nn.Linear(40, 33))
    return redraw(layers), (torch.randn(7, 40, generator=torch.Generator().manual_seed(1)),)


def bert() -> Model:
    config = hf.BertConfig(**WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    return _text(hf.BertModel(config))


def gpt2() -> Model:
    config = hf.GPT2Config(**WORDS, n_embd=32, n_layer=1, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=0)
    return _text(hf.GPT2LMHeadModel(config), "logits")


def llama() -> Model:
    return _text(hf.LlamaModel(hf.LlamaConfig(**DECODER, use_cache=False)))


def decode() -> Model:
    cache = (torch.randn(1, 2, 13, 8, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    return redraw(_OneToken(hf.LlamaModel(hf.LlamaConfig(**DECODER)))), (_tokens(50, 1), *cache)


def t5() -> Model:
    return _text(hf.T5EncoderModel(hf.T5Config(**WORDS, num_layers=1, d_model=32, d_kv=16, d_ff=48, num_heads=2)))


def vit() -> Model:
    config = hf.ViTConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4)
    return _picture(hf.ViTModel(config, add_pooling_layer=False), 16)


def swin() -> Model:
    config = hf.SwinConfig(image_size=32, embed_dim=16, depths=[2, 1], num_heads=[1, 2], window_size=4)
    return _picture(hf.SwinModel(config, add_pooling_layer=False), 28)


def resnet50() -> Model:
    config = hf.ResNetConfig(num_labels=10, embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1])
    return _picture(hf.ResNetForImageClassification(config), 24, "logits")


def convnext() -> Model:
    return _picture(hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)), 16)


def mobilenet() -> Model:
    return _picture(hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.1)), 16)


MODELS: dict[str, Callable[[], Model]] = {
    f.__name__: f for f in (mlp, bert, gpt2, llama, decode, t5, vit, swin, resnet50, convnext, mobilenet)
}  # fmt: skip
