"""Run by vLLM's Python: greedy tokens of a folder on several ranks, as a line "TOKENS [...]".

`python vllm_generate.py FOLDER RANKS LOAD_FORMAT DTYPE PROMPTS NEW_TOKENS`, PROMPTS in JSON."""

import json
import sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, ranks, load_format, dtype, prompts, new_tokens = sys.argv[1:]
    engine = LLM(
        folder,
        load_format=load_format,
        tensor_parallel_size=int(ranks),
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
    )
    sampling = SamplingParams(temperature=0, max_tokens=int(new_tokens), detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in json.loads(prompts)], sampling)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
