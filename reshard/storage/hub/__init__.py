"""The Hugging Face Hub, through huggingface_hub alone: its names, its files and its failures in our words."""
