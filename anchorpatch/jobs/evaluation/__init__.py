"""The parts of evaluating an ordinary network: Tables 3 and 4."""
