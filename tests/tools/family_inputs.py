"""Inputs of a family's model, and the tensor of its output that is compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from family_tables import IMAGE_TOKENS, VISION_MODELS

ROWS, LENGTH, GRID = 2, 9, 4  # a batch of texts; an image has GRID by GRID patches
IDS = torch.randint(3, 100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def inputs(model: Any) -> dict[str, Any]:
    """Return the arguments of one forward: text if the model takes any, an image or more if the tables say so."""
    config, names = model.config, inspect.signature(model.forward).parameters
    if config.model_type in VISION_MODELS:
        return _LAYOUTS[VISION_MODELS[config.model_type]](config)
    if config.model_type in _OWN:
        return _OWN[config.model_type](config)
    if "input_ids" not in names:
        return _guessed(model, names)
    found: dict[str, Any] = {"input_ids": IDS.clone()}
    if not model.tp_plan and config.model_type not in IMAGE_TOKENS:
        return _guessed(model, names)
    if config.is_encoder_decoder and "decoder_input_ids" in names:
        found["decoder_input_ids"] = IDS[:, :5].clone()
    if config.model_type in IMAGE_TOKENS:
        layout, count = IMAGE_TOKENS[config.model_type]
        found |= _LAYOUTS[layout](config.vision_config)
        image = torch.full((ROWS, count), config.image_token_id)
        found["input_ids"] = torch.cat([IDS[:, :2], image, IDS[:, 2:]], dim=1)
        if "mm_token_type_ids" in names or "token_type_ids" in names:
            name = "mm_token_type_ids" if "mm_token_type_ids" in names else "token_type_ids"
            found[name] = (found["input_ids"] == config.image_token_id).long()
    return found


def _guessed(model: Any, names: Any) -> dict[str, Any]:
    """Return what a model takes that does not run on text alone: an image, boxes, a waveform or features of sounds, of
    a size that it runs on.

    Raises LookupError if it runs on none.
    """
    config = model.config
    side = getattr(config, "image_size", None) or 16
    side = side if isinstance(side, int) else side[-1]
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 16
    channels = getattr(config, "num_channels", None) or 3
    extra: dict[str, Any] = {"decoder_input_ids": IDS[:, :5].clone()} if "decoder_input_ids" in names else {}
    extra |= {"input_ids": IDS.clone()} if "input_ids" in names else {}
    extra |= {"bbox": torch.zeros(ROWS, LENGTH, 4, dtype=torch.long)} if "bbox" in names else {}
    tensors: dict[str, list[torch.Tensor]] = {
        "pixel_values": [_noise(ROWS, channels, size, size) for size in (side, 16, 32, 64, 224)],
        "input_values": [_noise(ROWS, 4000), _noise(ROWS, 1, 4000), _noise(ROWS, 64, bins)],
        "input_features": [
            *(_noise(ROWS, bins, length) for length in (32, 200)),
            *(_noise(ROWS, length, bins) for length in (32, 200)),
            _noise(ROWS, 64, getattr(config, "hidden_size", 64)),
        ],
        "past_values": [_noise(ROWS, length, channels) for length in (32, 512)],
    }
    candidates: list[Callable[[], dict[str, Any]]] = [lambda: {}]
    candidates += [lambda n=name, t=one: {n: t} for name, some in tensors.items() if name in names for one in some]
    candidates += [lambda make=make: make(config) for make in _LAYOUTS.values()]
    for make in candidates:
        try:
            given = {**extra, **make()}
            with torch.inference_mode():
                main_output(model(**given))
        except Exception:
            continue
        return given
    raise LookupError("no input is known that it runs on")


def main_output(outputs: Any) -> torch.Tensor:
    """Return the logits, else the last hidden state, else the first floating tensor."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    named = dict(outputs) if isinstance(outputs, dict) else dict(enumerate(outputs))
    chosen = [named.get("logits"), named.get("last_hidden_state"), *named.values()]
    return next(value for value in chosen if isinstance(value, torch.Tensor) and value.is_floating_point())


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _pixels(vision: Any) -> dict[str, Any]:
    """One image for each row, not cut into patches."""
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    size = GRID * patch
    return {"pixel_values": _noise(ROWS, 3, size, size)}


def _sized_pixels(vision: Any) -> dict[str, Any]:
    found = _pixels(vision)
    return {**found, "image_sizes": torch.full((ROWS, 2), found["pixel_values"].shape[-1])}


def _patches(vision: Any) -> dict[str, Any]:
    """The patches of all images in one sequence, with the grids they come from."""
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
    volume = 3 * vision.patch_size**2 * frames
    grids = torch.tensor([[1, GRID, GRID]] * ROWS)
    return {"pixel_values": _noise(ROWS * GRID**2, volume), "image_grid_thw": grids}


def _bare_patches(vision: Any) -> dict[str, Any]:
    found = _patches(vision)
    return {"pixel_values": found["pixel_values"], "grid_thw": found["image_grid_thw"]}


def _hidden_patches(vision: Any) -> dict[str, Any]:
    found = _patches(vision)
    return {"hidden_states": found["pixel_values"], "grid_thw": found["image_grid_thw"]}


def _placed_patches(vision: Any) -> dict[str, Any]:
    """Patches in each row, with the position of each."""
    side = vision.pooling_kernel_size * 2
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(ROWS, -1, -1)
    pixels = _noise(ROWS, side**2, 3 * vision.patch_size**2)
    return {"pixel_values": pixels, "pixel_position_ids": places.contiguous()}


def _image_placed_patches(vision: Any) -> dict[str, Any]:
    found = _placed_patches(vision)
    return {"pixel_values": found["pixel_values"], "image_position_ids": found["pixel_position_ids"]}


_LAYOUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{"pixels": _pixels, "sized pixels": _sized_pixels, "patches": _patches, "bare patches": _bare_patches},
    **{"hidden patches": _hidden_patches, "placed patches": _placed_patches},
    "image placed patches": _image_placed_patches,
}


def _embedded(length: int) -> Callable[[Any], dict[str, Any]]:
    return lambda config: {"inputs_embeds": _noise(ROWS, length, config.hidden_size)}


def _drafted(config: Any) -> dict[str, Any]:
    """A block of noise, and hidden states of the text before it, from layers of the model that it drafts for."""
    width = config.hidden_size * len(config.target_layer_ids)
    return {
        "noise_embeds": _noise(ROWS, config.block_size, config.hidden_size),
        "context_hidden_states": _noise(ROWS, 5, width),
    }


def _codes(config: Any) -> dict[str, Any]:
    """A text token and one token of each codebook at every position."""
    codes = torch.stack([IDS % 60 + 3 for _ in range(config.num_codebooks + 1)], dim=-1)
    return {"input_ids": codes}


def _question(config: Any) -> dict[str, Any]:
    one = torch.ones(1, 1, dtype=torch.long)
    return {"input_ids": IDS[:1].clone(), "marks": one * 5, "num_options": one * 2, "question_type_ids": one * 0}


def _robot(config: Any) -> dict[str, Any]:
    image = torch.full((ROWS, GRID**2), config.vlm_config.image_token_id)
    return {
        "input_ids": torch.cat([image, IDS], dim=1),
        "pixel_values": _pixels(config.vlm_config.vision_config)["pixel_values"][:, None],
        "pixel_attention_mask": torch.ones(ROWS, 1, dtype=torch.bool),
        "state": _noise(ROWS, config.max_state_dim),
        "noise": _noise(ROWS, config.chunk_size, config.max_action_dim),
        "timestep": torch.full((ROWS,), 0.5),
    }


def _heard(config: Any) -> dict[str, Any]:
    """Text, and the audio that belongs to it."""
    heard = _noise(ROWS, LENGTH * config.downsample_factor, config.audio_config.hidden_size)
    return {"input_ids": IDS.clone(), "encoder_inputs_embeds": heard, "num_delay_tokens": 2}


def _scanned(config: Any) -> dict[str, Any]:
    return {**_pixels(config.vision_config), "decoder_input_ids": IDS.clone()}


def _on_canvas(config: Any) -> dict[str, Any]:
    """A text, and the canvas to refine: the model would draw a random one."""
    canvas = torch.randint(3, 100, (ROWS, config.canvas_length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": IDS.clone(), "decoder_input_ids": canvas}


def _segmented(config: Any) -> dict[str, Any]:
    return {"pixel_values": _noise(1, 3, 192, 192)}


_OWN: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{"jev": _question, "kyutai_speech_to_text": _codes, "muse_glimmer_assistant": _drafted},
    **{"qwen3_omni_moe_talker_text": _embedded(LENGTH), "qwen3_omni_moe_talker_code_predictor": _embedded(4)},
    **{"pi0": _robot, "voxtral_realtime": _heard, "pp_formulanet": _scanned},
    **{"deepseek_ocr2_vision": _segmented, "diffusion_gemma": _on_canvas},
}
