"""The training loop, and what it needs to know about each network that learns from images."""
