"""The planner that runs in vLLM's environment: a program of its own, which imports nothing of `reshard`."""
