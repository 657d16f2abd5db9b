"""One module per command, each with the whole job, and what several of them share."""
