"""Where the pipelines that ship come from: scenes, captions and training."""
