"""A small LLaVA-NeXT of our own: its scenes, its questions and its training."""
