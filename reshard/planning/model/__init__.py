"""The model as a plan sees it: its parameters, their styles and heads, and the source tensors that they are made of."""
