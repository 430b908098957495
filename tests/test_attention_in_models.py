"""Attention of real transformers classes (``attn_implementation="eager"``): each is found, with what it is, and is right against f64.

Models have random weights, one layer where that is all there is to see, and run through PyTorch's operators: what is tested is the
graph. Kernels have tests of their own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.passes.pipelines import LEVELS

transformers: Any = pytest.importorskip("transformers")

_EAGER = {"attn_implementation": "eager"}
_SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, **_EAGER}
_TEXT = {**_SMALL, "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_TEXT, "use_cache": False}
_SHARED = {**_DECODER, "num_key_value_heads": 2}
_IMAGE = {**_SMALL, "image_size": 32, "patch_size": 8}
_BOTH = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
         "decoder_ffn_dim": 64, "d_model": 64, "vocab_size": 50, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, **_EAGER}  # fmt: skip


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def clip() -> nn.Module:
    t = transformers
    return t.CLIPModel(t.CLIPConfig(text_config=_TEXT, vision_config=_IMAGE, projection_dim=32, **_EAGER))  # type: ignore[no-any-return]


def model(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A model by the name of its class, and its configuration."""
    kind = re.sub("(Encoder)?Model$", "Config", name)
    return lambda: getattr(transformers, name)(getattr(transformers, kind)(**config))


# what makes the model, what its inputs are, and what is to be found of each attention
CAUSAL = "causal"
MODELS: dict[str, tuple[Callable[[], nn.Module], str, list[str]]] = {
    "BERT": (model("BertModel", **_TEXT), "text", [""]),
    "GPT-2": (model("GPT2Model", n_embd=64, n_layer=1, n_head=4, vocab_size=50, n_positions=64, use_cache=False, bos_token_id=1,
                    eos_token_id=2, **_EAGER), "text", [CAUSAL]),
    "Llama": (model("LlamaModel", **_SHARED), "text", [CAUSAL]),
    "Mistral": (model("MistralModel", sliding_window=8, **_SHARED), "text", ["causal window"]),
    "Gemma2": (model("Gemma2Model", sliding_window=8, head_dim=16, **{**_SHARED, "num_hidden_layers": 2}), "text",
               ["causal window softcap", "causal softcap"]),
    "Qwen2": (model("Qwen2Model", **_SHARED), "text", [CAUSAL]),
    "Phi": (model("PhiModel", **_DECODER), "text", [CAUSAL]),
    "GPT-NeoX": (model("GPTNeoXModel", **_DECODER), "text", [CAUSAL]),
    "OPT": (model("OPTModel", ffn_dim=64, word_embed_proj_dim=64, **without(_DECODER, "intermediate_size")), "text", [CAUSAL]),
    "Bloom": (model("BloomModel", hidden_size=64, n_layer=1, n_head=4, vocab_size=50, use_cache=False, **_EAGER), "text",
              ["causal alibi"]),
    # its slopes are rounded to bf16 together with the positions: no multiple of the distance
    "Falcon": (model("FalconModel", alibi=True, new_decoder_architecture=False, **without(_DECODER, "intermediate_size")), "text",
               ["bias"]),
    "T5": (model("T5Model", d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=50, use_cache=False, **_EAGER),
           "two texts", ["bias", "causal bias", ""]),
    "DeBERTa": (model("DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16,
                      **without(_TEXT, "attn_implementation")), "text", ["bias"]),
    "Swin": (model("SwinModel", image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4, **_EAGER), "image",
             ["bias", "bias"]),
    "ViT": (model("ViTModel", **_IMAGE), "image", [""]),
    "CLIP": (clip, "text and image", ["", CAUSAL]),
    "Whisper": (model("WhisperModel", num_mel_bins=8, max_source_positions=20, max_target_positions=20, decoder_start_token_id=1, **_BOTH),
                "sound", ["", CAUSAL, ""]),
    "BART": (model("BartModel", max_position_embeddings=64, **_BOTH), "two texts", ["", CAUSAL, ""]),
}  # fmt: skip


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 50, (2, 20), generator=generator)
    image, sound = torch.randn(2, 3, 32, 32, generator=generator), torch.randn(2, 8, 40, generator=generator)
    return {
        "text": {"input_ids": words},
        "two texts": {"input_ids": words, "decoder_input_ids": words[:, :9]},
        "image": {"pixel_values": image},
        "text and image": {"input_ids": words, "pixel_values": image},
        "sound": {"input_features": sound, "decoder_input_ids": words[:, :9]},
    }[kind]


def found() -> list[str]:
    """What the attentions of the compiled graphs are: their attributes that are not as by default, and whether they have a bias."""
    out = []
    for report in graphopt.reports():
        for operands, attrs in re.findall(r"= attention\((.*?)\) (\{.*?\})", report.text_after):
            words = [w for w in ("causal", "window", "softcap", "alibi") if w in attrs]
            out.append(" ".join([*words, *(["bias"] if operands.count(",") > 2 + ("alibi" in attrs) else [])]))
    return out


pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_found(name: str) -> None:
    make, kind, wanted = MODELS[name]
    torch.manual_seed(0)
    eager, given = make().eval(), inputs(kind)
    until = LEVELS[2].index("recognise-attention") + 1
    compiled = torch.compile(eager, backend="graphopt", options={"backend": "eager", "pipeline": ",".join(LEVELS[2][:until])})
    results = [
        next(v for v in run(**args).values() if torch.is_tensor(v) and v.is_floating_point())
        for run, args in (
            (copy.deepcopy(eager).double(), {k: v.double() if v.is_floating_point() else v for k, v in given.items()}),
            (compiled, given), (eager, given),
        )
    ]  # fmt: skip
    exact, own, yardstick = results
    assert sorted(found()) == sorted(wanted)
    assert all("softmax(" not in r.text_after for r in graphopt.reports())
    assert float((own - exact).abs().max()) <= 2 * float((yardstick - exact).abs().max())
