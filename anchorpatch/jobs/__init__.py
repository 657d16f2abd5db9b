"""One module a verb, each the whole job in one place."""
