"""What Figures 3 to 6 show, computed; `anchorpatch.figures` draws it."""
