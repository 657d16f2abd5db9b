"""One module a verb, each the whole job in one place; the parts of the large ones in rooms."""
