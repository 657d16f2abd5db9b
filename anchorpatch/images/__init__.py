"""From a folder of image files to pixels."""
