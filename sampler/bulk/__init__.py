"""Sets of images: prompts in, a folder with a manifest out."""
