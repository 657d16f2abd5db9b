"""The procedural sample set and the bundled weights."""
