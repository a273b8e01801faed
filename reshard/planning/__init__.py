"""Planning from headers alone: rules, the model's parameters, their cuts, and the plan.

A plan is frozen data. Nothing here writes a file or reads a tensor.
"""
