"""Any model type of transformers, small and with random weights: no file and no network is needed."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

# What a model may hold at most; a larger one is not built.
MOST_PARAMETERS = 200_000_000
VOCABULARY = 300


class Level(NamedTuple):
    """How a config is made small."""

    widths: bool  # hidden sizes and heads too
    layers: int  # at most so many
    others: bool = True  # vocabulary, experts, inner sizes


# From the smallest on: not every model can be made as small.
LEVELS = (Level(True, 2), Level(True, 1000), Level(False, 2), Level(False, 1000, False))

LAYERS = re.compile(
    r"(num_|n_)?(\w+_)?(hidden_|encoder_|decoder_)?(layers?|blocks)|(\w+_)?depth|layers"
)
# Sizes, each with what it is made at most.
MOST = {
    re.compile(names): most
    for names, most in {
        r"(\w+_)?vocab_size(_\w+)?": VOCABULARY,
        r"(\w+_)?(num|n|moe_num)_(\w+_)?experts": 16,
        r"(moe_)?(num_experts_per_tok|topk|top_k_experts|top_k|moe_k)|experts_per_token": 2,
        r"(\w+_)?(intermediate_(size|dim)|ffn_dim|ffn_hidden_size|feedforward_dim|d_ff|n_inner)": 64,
        r"(\w+_)?(mlp_dim|mlp_hidden_size)|dim_feedforward|d_inner": 64,
        r"image_size|pretrain_image_size": 224,
        r"(\w+_)?(max_position_embeddings|n_positions|max_seq_len|max_sequence_length)": 512,
    }.items()
}
TOKEN = re.compile(r"\w*(token_id|token_index|_id|token_idx|_token)")
# transformers' own, in place of timm's.
RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
}
# What the defaults of a type lack or need otherwise when it is small.
GIVEN: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "bamba": {"mamba_n_heads": 16, "mamba_d_head": 64},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 8},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "hunyuan_vl_text": {"head_dim": 32},
    "informer": {"prediction_length": 4, "context_length": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 32},
    **dict.fromkeys(("conditional_detr", "dab-detr", "deformable_detr", "detr"), RESNET),
    **dict.fromkeys(("omdet-turbo", "table-transformer"), RESNET),
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8},
}
# A part's names for a width of the model around it.
OUTER = re.compile(
    r"(out|text|output|llm|lm|language|target|projector)_(hidden_size|hidden_dim|dim)"
)
# Widths, each with the heads that they are cut into.
WIDTHS = {
    "hidden_size": ("num_attention_heads", "attention_heads", "num_heads"),
    "d_model": (
        "encoder_attention_heads",
        "decoder_attention_heads",
        "num_attention_heads",
        "num_heads",
        "n_head",
    ),
    "n_embd": ("n_head",),
    "embed_dim": ("num_heads", "num_attention_heads"),
    "dim": ("n_heads",),
    "emb_dim": ("n_heads",),
    "hidden_dim": ("num_attention_heads", "num_heads"),
}
KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "n_head_kv")


def model_types() -> list[str]:
    return sorted(CONFIG_MAPPING)


def model_class(model_type: str) -> type[PreTrainedModel] | None:
    """The plainest class of a model type; None: the type is a part of another model's."""
    config_class = CONFIG_MAPPING[model_type]
    name = MODEL_MAPPING_NAMES.get(model_type)
    known = getattr(transformers, name if isinstance(name, str) else (name or [""])[0], None)
    try:
        if known is not None and known.config_class is config_class:
            return known
    except ImportError:  # a stand-in; what it needs, it says when it is built
        return known
    module_name = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return known
    found = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and issubclass(kind, PreTrainedModel)
        and kind.__module__ == module_name
        and getattr(kind, "config_class", None) is config_class
        and "PreTrainedModel" not in kind.__name__
    ]
    # A stable sort: a whole model before one with a head, and this before its parts.
    found.sort(key=lambda kind: (not kind.__name__.endswith("Model"), "For" not in kind.__name__))
    return found[0] if found else known


def shrunk(
    config: PreTrainedConfig, level: Level, outer: dict[int, int] | None = None
) -> PreTrainedConfig:
    """The same kind of config with small sizes, for its parts too.

    Args:
        config: left as it is.
        level: how small.
        outer: for a part, widths of the model around it, and what they are made.
    """
    values = vars(config)
    changes = set_apart(config)
    words = values.get("text_config")
    if isinstance(words, PreTrainedConfig):
        changes["text_config"] = shrunk(words, level)
        outer = {width_of(words): width_of(changes["text_config"])}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            if value is not words:
                changes[name] = shrunk(value, level, outer)
        elif outer and is_int(value) and value in outer and OUTER.fullmatch(name):
            changes[name] = outer[value]
        elif is_int(value):
            if LAYERS.fullmatch(name):
                changes[name] = min(value, level.layers)
            elif level.others and name in ("n_group", "topk_group"):
                changes[name] = 1
            elif level.others:
                most = next((most for names, most in MOST.items() if names.fullmatch(name)), value)
                changes[name] = min(value, most)
    if level.widths:
        changes |= narrow(values)
    changes |= GIVEN.get(config.model_type, {})
    if level.others:
        changes |= special_ids(values, changes.get("vocab_size"))
        changes |= lists_of_layers(config, changes)
    taken = inspect.signature(type(config).__init__).parameters
    small = type(config)(**{name: value for name, value in changes.items() if name in taken})
    for name, value in values.items():
        if name not in vars(small):
            setattr(small, name, changes.get(name, value))
    return small


def width_of(config: PreTrainedConfig) -> int:
    return number(config, 0, *WIDTHS)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def narrow(values: dict[str, Any]) -> dict[str, Any]:
    """Few heads, each as wide as it was."""
    changes = {}
    for width, heads in WIDTHS.items():
        counts = {name: values[name] for name in heads if is_int(values.get(name))}
        if counts and is_int(values.get(width)):
            most = max(counts.values())
            few = min(most, 4)
            changes[width] = values[width] // most * few
            changes |= {name: min(count, 4) for name, count in counts.items()}
            for name in KEY_VALUE:
                if is_int(values.get(name)):
                    changes[name] = max(1, few * values[name] // most)
    return changes


def set_apart(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config has otherwise than its class has it by itself, as a part of a larger one does."""
    try:
        usual = vars(type(config)())
    except Exception:
        usual = {}
    return {
        name: value
        for name, value in vars(config).items()
        if not (name in usual and repr(usual[name]) == repr(value))
    }


def special_ids(values: dict[str, Any], vocabulary: Any) -> dict[str, Any]:
    """Small ids, each its own, for tokens that a small vocabulary lacks."""
    if not isinstance(vocabulary, int):
        vocabulary = VOCABULARY
    found, last = {}, vocabulary - 1
    for name, value in values.items():
        if TOKEN.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool):
            if value >= vocabulary:
                found[name] = last
                last -= 1
        elif TOKEN.fullmatch(name) and isinstance(value, list) and value:
            found[name] = [last]
            last -= 1
    return found


def lists_of_layers(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Lists with one entry a layer that do not follow from the number of layers."""
    found = {}
    given = {
        field.name: field
        for field in (dataclasses.fields(config) if dataclasses.is_dataclass(config) else ())
    }
    cut = {
        vars(config)[name]: new
        for name, new in changes.items()
        if LAYERS.fullmatch(name) and isinstance(new, int)
    }
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) > 2 and len(value) in cut:
            field = given.get(name)
            if field is not None and field.default is None:
                continue
            found[name] = value[: cut[len(value)]]
    return found


def build(model_type: str, level: Level) -> PreTrainedModel:
    """A model with random weights, always the same ones.

    Raises:
        ValueError: it would be too large.

    Whatever the config or the model raises comes through.
    """
    kind = model_class(model_type)
    config = shrunk(CONFIG_MAPPING[model_type](), level)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(one.numel() for one in kind(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size // 1_000_000} million parameters")
    torch.manual_seed(0)
    return kind(config).eval()


# Inputs.

# Arguments that a model is given even where it can do without.
ALWAYS = ("decoder_input_ids", "bbox", "use_cache")
# Those that stand for others, and are left out where they are not required.
RATHER_NOT = ("inputs_embeds", "decoder_inputs_embeds", "hidden_states")


def wanted(config: Any, *names: str) -> Any:
    """The first of these that the config or a config in it has, its own before those of its parts."""
    parts = [config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, PreTrainedConfig):
                return value
    return None


def number(config: Any, default: int, *names: str) -> int:
    value = wanted(config, *names)
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return value if isinstance(value, int) and value > 0 else default


def offers(module: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs that the module's forward may take, the fullest first; it refuses some. None: no input is known."""
    parameters = inspect.signature(module.forward).parameters
    required = {
        name
        for name, one in parameters.items()
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    values = {name: made for name, made in made_up(module).items() if name in parameters}
    if not required <= values.keys():
        return
    main = module.main_input_name
    fullest = [name for name in values if name in required or name not in RATHER_NOT]
    least = [name for name in values if name in required or name in (main, *ALWAYS)]
    tried = set()
    for names in (fullest, least, sorted(required)):
        for turn in range(max([len(values[name]) for name in names], default=0)):
            chosen = {name: values[name][min(turn, len(values[name]) - 1)] for name in names}
            key = str({name: getattr(value, "shape", value) for name, value in chosen.items()})
            if key not in tried:
                tried.add(key)
                yield chosen


def made_up(module: PreTrainedModel) -> dict[str, list[Any]]:
    """For each argument that we know some values, the likeliest first."""
    config = module.config
    generator = torch.Generator().manual_seed(0)
    try:
        rows = module.get_input_embeddings().num_embeddings
    except Exception:
        rows = number(config, 100, "vocab_size")
    vocabulary = min(rows, number(config, rows, "vocab_size"))

    def ids(*shape: int) -> Tensor:
        # Neither padding and the like, which come first, nor images and the like, which come last.
        return torch.randint(3, max(4, vocabulary - 40), shape, generator=generator)

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    width = number(config, 32, "hidden_size", "d_model", "n_embd", "embed_dim", "dim")
    outer = number(config, width, "cross_attention_hidden_size", "encoder_hidden_size")
    size = number(config, 64, "image_size", "pretrain_image_size", "input_size")
    channels = number(config, 3, "num_channels", "in_channels", "in_chans")
    patch = number(config, 16, "patch_size")
    frames = number(config, 2, "num_frames", "frames_per_clip")
    mels = number(config, 80, "num_mel_bins", "feature_size", "n_mels", "mel_bins", "input_dim")
    length = 2 * number(config, 32, "max_source_positions")
    codebooks = number(config, 4, "num_codebooks", "num_code_groups", "audio_codebooks")
    pixels = channels * patch * patch
    flat = floats(16, pixels * number(config, 1, "temporal_patch_size"))
    image = floats(1, channels, size, size)
    video = floats(1, frames, channels, size, size)
    images = [image, video, floats(1, 16, pixels), flat, image[:, None]]
    past = number(config, 32, "context_length") + max(wanted(config, "lags_sequence") or [0])
    times = wanted(config, "num_time_features") or 0
    hidden = floats(1, 8, width)
    return {
        "input_ids": [
            ids(1, 8),
            ids(1, 8, codebooks),
            ids(codebooks, 8),
            ids(1, codebooks, 8),
            ids(1, 128),
        ],
        "decoder_input_ids": [ids(1, 5), ids(1, 5, codebooks), ids(codebooks, 5)],
        "bbox": [torch.tensor([[[1, 2, 3, 4]] * 8])],
        "entity_ids": [ids(1, 4)],
        "entity_position_ids": [torch.arange(8).expand(1, 4, 8)],
        "task_inputs": [ids(1, 77)],
        "pixel_values": images,
        "images": images,
        "image": images,
        "pixel_values_videos": [video],
        "flattened_patches": [floats(1, 16, pixels + 2)],
        "pixel_attention_mask": [torch.ones(1, 16, dtype=torch.int64)],
        "spatial_shapes": [torch.tensor([[4, 4]])],
        "grid_thw": [torch.tensor([[1, 4, 4]])],
        "hidden_states": [hidden, flat, image, hidden[0]],
        "inputs_embeds": [hidden],
        "decoder_inputs_embeds": [hidden],
        "query_embeds": [hidden],
        "encoder_hidden_states": [floats(1, 8, outer)],
        "input_features": [
            floats(1, mels, length),
            floats(1, length, mels),
            floats(1, 64, mels),
            floats(1, mels, 3000),
            floats(1, 1, 1024, mels),
        ],
        "input_features_mask": [torch.ones(1, n, dtype=torch.int64) for n in (length, length, 64)],
        "feature_attention_mask": [
            torch.ones(1, n, dtype=torch.int64) for n in (length, length, 64)
        ],
        "input_values": [
            floats(1, 16000),
            floats(1, 1, 16000),
            floats(1, number(config, 64, "max_length"), mels),
            floats(1, 64, mels),
        ],
        "past_values": [
            floats(1, past),
            floats(1, past, number(config, 1, "input_size", "num_input_channels")),
        ],
        "past_observed_mask": [torch.ones(1, past)],
        "past_time_features": [floats(1, past, times)],
        "future_time_features": [floats(1, number(config, 1, "prediction_length"), times)],
        "visual_feats": [floats(1, 4, number(config, 2048, "visual_feat_dim"))],
        "visual_pos": [floats(1, 4, number(config, 4, "visual_pos_dim"))],
        "states": [floats(1, 4, number(config, 1, "state_dim"))],
        "actions": [floats(1, 4, number(config, 1, "act_dim"))],
        "rewards": [floats(1, 4, 1)],
        "returns_to_go": [floats(1, 4, 1)],
        "timesteps": [torch.arange(4)[None]],
        "audio_codes": [ids(1, codebooks, 8)],
        "codebook_idx": [2],
        "timestep": [torch.tensor([1])],
        "use_cache": [False],
    }


def parts(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """The model and each model in it, with the beginning of the names of what it holds."""
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            yield f"{name}." if name else "", part


def run(model: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**inputs)


def name_of(model: nn.Module, place: int) -> str:
    """The parameter or buffer whose memory begins there."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.untyped_storage().data_ptr() == place:
            return name
    return "(computed)"
