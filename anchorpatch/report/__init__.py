"""One run on one page: what a folder holds, gathered and written as HTML."""
