"""Tables of the family walk: small numbers for configuration fields, by name, and the needs of single families."""

from __future__ import annotations

from typing import Any

VOCAB = 130
FIRST_SPECIAL = 100  # token ids from here on stand for images, audio and the like; texts hold lower ones

# Field name -> value, for any (nested) configuration whose field is a number.
SMALL: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64},
    **{"d_model": 64, "embed_dim": 64, "n_embd": 64, "hidden_dim": 64, "ffn_dim": 96, "ffn_hidden_size": 96},
    **{"num_attention_heads": 8, "num_heads": 8, "n_head": 8, "attention_heads": 8, "num_key_value_heads": 2},
    **{"head_dim": 8, "global_head_dim": 8, "sliding_window": 16, "attention_chunk_size": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    # encoder and decoder
    **{"encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
    # experts
    **{"n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2},
    **{"num_experts_per_tok": 2, "top_k_experts": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1},
    **{"n_shared_experts": 1, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    **{"expert_ffn_hidden_size": 24, "intermediate_size_mlp": 96, "first_k_dense_replace": 1},
    # compressed attention
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "index_block_size": 4, "index_kpool": 4},
    # linear attention and state space
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8},
    # embeddings of each layer
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0},
    **{"linear_head_dim": 8, "linear_num_heads": 8, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 16},
    **{"n_groups": 2, "chunk_size": 8, "mamba_d_ssm": 64, "mamba_expand": 1},
    # others of the text model
    **{"swa_num_attention_heads": 8, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 16},
    **{"rel_extent": 16, "d_rel": 8, "unpadded_vocab_size": VOCAB, "o_lora_rank": 16, "o_groups": 8},
    **{"moe_hidden_size": 64, "shared_experts_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24},
    **{"dense_intermediate_size": 96, "shared_intermediate_size": 24, "num_experts_per_token": 2},
    **{"hc_lowrank": 16, "ple_embed_dim": 8, "ngram_vocab_size_base": 200, "split_ngram_parts": 4},
    **{"backbone_hidden_size": 64, "thinker_hidden_size": 64, "embedding_size": 64, "codebook_size": 64},
    **{"text_vocab_size": VOCAB, "codebook_vocab_size": 64, "num_codebooks": 4, "num_code_groups": 4},
    **{"num_centroids": 16, "centroid_intermediate_top_k": 4, "embedding_rank": 16, "router_hidden_size": 16},
    **{"query_pre_attn_scalar": 8, "rotary_dim": 8, "index_topk_blocks": 2, "canvas_length": 16},
    # vision and audio
    **{"alignment_intermediate_size": 96, "projector_hidden_size": 64, "projection_hidden_dim": 64},
    **{"projection_intermediate_size": 96, "mlp_dim": 96, "output_channels": 16, "window_size": 8},
    **{"num_pos_feats": 8, "downsample_channels": [32, 64], "global_attn_indexes": [1], "base_channels": 32},
    **{"channel_multiplier": [1, 2], "num_embeddings": 64, "latent_channels": 32, "pos_emb_height": 8},
    **{"pos_emb_width": 8, "patch_sizes": [4, 2], "hidden_sizes": [32, 64], "posemb_grid_size": 4},
    **{"max_img_size": 16, "vision_hidden_size": 64, "output_dim": 64, "downsample_hidden_size": 16},
    **{"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0], "num_filters": 4, "n_window": 8},
    **{"adapter_in_dim": 64, "adapter_out_dim": 64, "adapter_input_size": 64, "audio_hidden_size": 64},
    **{"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16, "num_blocks": 2},
    **{
        "mm_tokens_per_image": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 16,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
    },
    **{"post_conv_out_channels": 64, "decoder_hidden_size": 64, "image_token_embed_dim": 64, "upsample_groups": 64},
    **{"vector_quantization_hidden_dimension": 16, "codebook_dim": 16, "decoder_dim": 64, "emb_dim": 64},
    **{"upsample_initial_channel": 64, "num_embeds": 64, "n_mel_bins": 16, "mel_vocab_size": 64},
    **{"image_size": 16, "patch_size": 4, "out_hidden_size": 64, "num_position_embeddings": 16, "projection_dim": 64},
    **{"text_hidden_size": 64, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    **{"num_mel_bins": 16, "max_source_positions": 16, "conv_channels": 8, "text_embed_dim": 64},
}
# Set even if they are None.
NEVER_NONE = ("pad_token_id", "bos_token_id", "eos_token_id", "num_key_value_heads", "head_dim")
LAYER_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers", "decoder_layers"),
    "num_encoder_layers",
)
LAYERS = 2

# Model type -> keyword arguments of the configuration before it is shrunk: parts that are absent by default.
NESTED: dict[str, dict[str, Any]] = {
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_assistant": {
        "text_config": {
            **{"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
            **{"num_kv_shared_layers": 30},
        }
    },
}
# Model type -> keyword arguments of its configuration that override the shrunk ones (nested ones are merged).
_STEP = {"sliding_window": 16, "share_expert_dim": 24}
_COMPASS_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_TEXT: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _COMPASS_ROPE, "full_attention": _COMPASS_ROPE},
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "dots3_note_text": {
        **{"swa_num_attention_heads": 8, "swa_num_key_value_heads": 8, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 24], "rope_parameters": {"mrope_section": [1, 1, 2]}},
    "glm4v_moe_text": {"rope_parameters": {"partial_rotary_factor": 1.0}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 24},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
        **{"indexer_compress_ratio": 4},
    },
    "t5gemma2_text": {"dropout_rate": 0.0},
}
_MHA = {"num_key_value_heads": 8}
_CODEC: dict[str, Any] = {"downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
_ASSISTANT = {
    **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2},
    **{"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}
OVERRIDES: dict[str, dict[str, Any]] = {
    **_TEXT,
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"num_expert_group": 1, "n_group": 1},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": _TEXT["deepseek_ocr2_text"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {"text_config": _TEXT["dots3_note_text"]},
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 100, "<image>": 101, "<|visual token 000000|>": 102}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "llama4_vision_model": {"intermediate_size": 256},
    "mistral4": {"head_dim": 16},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_glimmer_assistant": {"block_size": 4},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "step3p5": _STEP,
    "step3p7": {"text_config": _STEP},
    "vibevoice": {"audio_config": _CODEC, "semantic_model_config": _CODEC},
    "cohere_compass": {"text_config": _TEXT["cohere_compass_text"]},
    "deepseek_v4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "diffusion_gemma": {"text_config": _TEXT["diffusion_gemma_text"]},
    "dots1": {
        **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "ernie4_5_vl_moe": {"text_config": _TEXT["ernie4_5_vl_moe_text"]},
    "esmc": _MHA,
    "florence2": {
        "vision_config": {
            **{"embed_dim": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4]},
            **{"num_groups": [2, 2, 4, 4], "max_position_embeddings": 16},
        }
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "glm4v_moe": {"text_config": _TEXT["glm4v_moe_text"]},
    "glm5_next": {"text_config": _TEXT["glm5_next_text"]},
    "hunyuan_vl": {
        "text_config": _TEXT["hunyuan_vl_text"],
        "vision_config": {"max_image_size": 16, "min_image_size": 8, "num_key_value_heads": 8},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemo_speechlm": {
        "audio_config": {"asr_config": _MHA, "diarization_config": {"audio_config": _MHA}},
        "word_timestamp_config": _MHA,
    },
    "neomme": {"head_dim": 16},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2, "text_config": _TEXT["qwen3_omni_moe_talker_text"]}},
    "qwen4_exp": {"text_config": _TEXT["qwen4_exp_text"]},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": _TEXT["t5gemma2_text"]},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _CODEC,
        "semantic_tokenizer_encoder_config": _CODEC,
        "acoustic_tokenizer_chunk_size": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Vision models with a plan of their own -> how they take an image (family_inputs).
VISION_MODELS = {
    "dots3_note_vision_encoder": "bare patches",
    "ernie4_5_vl_moe_vision": "hidden patches",
    "gemma4_vision": "placed patches",
    "llama4_vision_model": "pixels",
    "muse_glimmer_vision": "bare patches",
}
# Wrappers run on text and an image -> how they take it, and how many tokens stand for it.
IMAGE_TOKENS = {
    **{"llava": ("pixels", 16), "gemma3": ("pixels", 4), "mistral3": ("sized pixels", 4), "internvl": ("pixels", 4)},
    **{"paligemma": ("pixels", 16), "llama4": ("pixels", 4), "gemma4": ("image placed patches", 4)},
    **dict.fromkeys(
        (
            *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe"),
            *("glm46v", "glm_ocr", "ernie4_5_vl_moe", "dots3_note", "muse_glimmer"),
        ),
        ("patches", 4),
    ),
}
