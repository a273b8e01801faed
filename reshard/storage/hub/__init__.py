"""The Hugging Face Hub, through huggingface_hub alone: what is there, and how a folder gets there."""
