"""Run by vLLM's Python: the names of the model classes that it has, as JSON."""

import json

from vllm.model_executor.models.registry import ModelRegistry

print(json.dumps(sorted(ModelRegistry.get_supported_archs())))
