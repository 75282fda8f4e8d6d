"""One file an operator: a reference in plain torch and the fast path beside it, with the same signature."""
