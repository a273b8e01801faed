"""Plans and manifests as pictures: a page of its own, and a drawing for the model card."""
